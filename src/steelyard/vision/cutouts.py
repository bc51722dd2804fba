r"""From a generated picture of one object to a cut-out, and from a cut-out to a place in an image.

Images are ``[C, H, W]`` as in torchvision; its tensor subclasses are accepted, plain tensors
returned. Connected regions are found on the CPU.

Source: Fan et al. (2024), DiverGen, arXiv:2405.10185, and its code.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from steelyard._checks import check_count, check_not_empty, check_range, check_shape

__all__ = [
    "PasteSize",
    "PlacedCutout",
    "corner_foreground",
    "largest_component",
    "paste_size",
    "place_cutout",
]

ROUNDING = 1e-9


class PasteSize(NamedTuple):
    """What :func:`paste_size` returns, in pixels."""

    width: int
    height: int


class PlacedCutout(NamedTuple):
    """What :func:`place_cutout` returns, on a canvas of the image's size."""

    source: Tensor
    """``[C, H, W]``, dtype of the cut-out."""
    alpha: Tensor
    """``[H, W]`` in [0, 1], 0 outside the cut-out."""
    visible: float
    """Share of the cut-out's opacity that lies inside the image."""


def corner_foreground(
    image: Tensor, *, background: Tensor | float | None = None, tolerance: float = 10
) -> Tensor:
    """Take what is connected to the corners and of their colour for background.

    Pixels whose every channel is within ``tolerance`` of the background's colour and that are
    joined to a corner by such pixels (4 neighbours) are background; the rest is the object. A hole
    in the object is not joined to a corner and stays object. A stand-in for a segmenter prompted at
    the corners.

    Args:
        image: ``[H, W]`` or ``[C, H, W]``, any real dtype.
        background: colour, a number or ``[C]``; ``None`` = median of the four corners.
        tolerance: in units of the image (10 is meant for 0 to 255), >= 0.

    Returns:
        Boolean ``[H, W]``, true on the object.

    Raises:
        ValueError: wrong shape, empty image or ``tolerance`` < 0.

    Example:
        >>> import torch
        >>> image = torch.full((4, 4), 250, dtype=torch.uint8)
        >>> image[1:3, 1:3] = 40
        >>> corner_foreground(image).int()
        tensor([[0, 0, 0, 0],
                [0, 1, 1, 0],
                [0, 1, 1, 0],
                [0, 0, 0, 0]], dtype=torch.int32)

    Source: Fan et al. (2024), arXiv:2405.10185; the fill is ours.
    """
    planes = image[None] if isinstance(image, Tensor) and image.dim() == 2 else image
    check_shape("image", planes, (None, None, None))
    check_not_empty("image", planes)
    check_range("tolerance", tolerance, at_least=0.0)
    values = planes.as_subclass(Tensor).double()
    if bool(values.isnan().any()):
        raise ValueError("image must not contain NaN")
    corners = values[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    if background is None:
        colour = corners.sort(1).values[:, 1:3].mean(1)
    else:
        colour = torch.as_tensor(background, dtype=torch.float64, device=values.device)
        if colour.dim() > 0:
            check_shape("background", colour, (len(values),))
        colour = colour.expand(len(values))
    near = ((values - colour[:, None, None]).abs() <= tolerance).all(0)
    regions = _regions(near)
    seeds = np.unique(regions[[0, 0, -1, -1], [0, -1, 0, -1]])
    filled = np.isin(regions, seeds[seeds > 0])
    return torch.from_numpy(~filled).to(image.device)


def largest_component(mask: Tensor) -> Tensor:
    """Keep the largest connected region of a mask (4 neighbours).

    It removes stray pixels, and real parts of an object that comes in several.

    Args:
        mask: boolean ``[H, W]``.

    Returns:
        Boolean ``[H, W]``; of regions of one size the first in reading order; an empty mask stays.

    Raises:
        ValueError: wrong shape. TypeError: not boolean.

    Example:
        >>> import torch
        >>> largest_component(torch.tensor([[True, True, False, True]]))
        tensor([[ True,  True, False, False]])

    Source: Fan et al. (2024), code, arXiv:2405.10185.
    """
    check_shape("mask", mask, (None, None))
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must have dtype torch.bool, got {mask.dtype}")
    regions = _regions(mask.as_subclass(Tensor))
    sizes = np.bincount(regions.ravel())
    if len(sizes) < 2:
        return torch.zeros_like(mask.as_subclass(Tensor))
    return torch.from_numpy(regions == 1 + sizes[1:].argmax()).to(mask.device)


def _regions(mask: Tensor) -> NDArray[np.int32]:
    """Number the 4-connected regions of a mask from 1; 0 outside."""
    regions: NDArray[np.int32]
    regions, _ = ndimage.label(mask.detach().cpu().numpy())
    return regions


def paste_size(area: float, ratio: float, height: int, width: int) -> PasteSize:
    r"""Width and height of a cut-out that shall cover a share of an image.

    .. math:: w = \sqrt{\rho\, a^2 H W}, \qquad h = w / \rho, \qquad \text{truncated}

    Args:
        area: ``a``, square root of the share of the image's area, in (0, 1].
        ratio: rho, width over height, > 0.
        height: of the image, >= 1.
        width: of the image, >= 1.

    Returns:
        ``width`` and ``height`` in pixels. Paste only if both are at least 5 and smaller than the
        image's; the rule is the caller's.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> paste_size(0.5, 2.0, 100, 200)
        PasteSize(width=100, height=50)

    Source: Fan et al. (2024), code, arXiv:2405.10185, after Zhao et al. (2023), X-Paste,
    arXiv:2212.03863.
    """
    check_range("area", area, above=0.0, at_most=1.0)
    check_range("ratio", ratio, above=0.0)
    check_range("height", height, at_least=1)
    check_range("width", width, at_least=1)
    exact = math.sqrt(ratio * height * width) * area
    # What is whole in exact arithmetic must not lose a pixel to rounding.
    return PasteSize(int(exact * (1 + ROUNDING)), int(exact / ratio * (1 + ROUNDING)))


def place_cutout(
    cutout: Tensor,
    alpha: Tensor,
    height: int,
    width: int,
    *,
    size: tuple[int, int],
    centre: tuple[float, float],
    flip: bool = False,
) -> PlacedCutout:
    """Resize a cut-out and lay it on an empty canvas of the image's size.

    Resizing is bilinear. Where the cut-out sticks out of the image it is clipped; reject a paste
    of which too little is ``visible``.

    Args:
        cutout: ``[C, h, w]``, integer or floating point.
        alpha: opacity, ``[h, w]`` in [0, 1].
        height: of the image, >= 1.
        width: of the image, >= 1.
        size: width and height of the cut-out in the image, each >= 1, for example from
            :func:`paste_size`.
        centre: x and y of the middle of the cut-out, in pixels from the corner of the image.
        flip: whether to mirror left and right.

    Returns:
        ``source``, ``alpha`` and ``visible``: the first two are arguments of
        :func:`paste_instance`.

    Raises:
        ValueError: shapes that do not fit or a number out of range.
        TypeError: ``alpha`` not floating point.

    Example:
        Half of the object lies outside:

        >>> import torch
        >>> placed = place_cutout(
        ...     torch.full((3, 2, 2), 9.0), torch.ones(2, 2), 4, 4, size=(2, 2), centre=(0.0, 2.0)
        ... )
        >>> placed.alpha[:, 0], placed.visible
        (tensor([0., 1., 1., 0.]), 0.5)

    Source: Fan et al. (2024), code, arXiv:2405.10185; the visible share is ours.
    """
    check_shape("cutout", cutout, (None, None, None))
    check_not_empty("cutout", cutout)
    check_shape("alpha", alpha, tuple(cutout.shape[1:]))
    if not alpha.is_floating_point():
        raise TypeError(f"alpha must have a floating dtype, got {alpha.dtype}")
    for name, value in (("height", height), ("width", width)):
        check_count(name, value)
    for name, pair in (("size", size), ("centre", centre)):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise TypeError(f"{name} must be two numbers, got {pair!r:.60}")
    for index in range(2):
        check_count(f"size[{index}]", size[index])
        check_range(f"centre[{index}]", centre[index], above=-math.inf, below=math.inf)
    colours, opacity = cutout.as_subclass(Tensor), alpha.as_subclass(Tensor)
    layers = torch.cat((colours.to(opacity.dtype), opacity[None]))
    layers = layers.flip(-1) if flip else layers
    layers = functional.interpolate(
        layers[None], size=(size[1], size[0]), mode="bilinear", align_corners=False
    )[0]
    left, top = (math.floor(c - s / 2 + 0.5) for c, s in zip(centre, size, strict=True))
    canvas = layers.new_zeros(len(layers), height, width)
    rows = slice(max(0, top), min(height, top + size[1]))
    columns = slice(max(0, left), min(width, left + size[0]))
    if rows.start < rows.stop and columns.start < columns.stop:
        inside = layers[:, rows.start - top : rows.stop - top]
        inside = inside[:, :, columns.start - left : columns.stop - left]
        canvas[:, rows, columns] = inside
    total = float(layers[-1].sum())
    visible = float(canvas[-1].sum()) / total if total > 0 else 0.0
    source = canvas[:-1] if cutout.is_floating_point() else canvas[:-1].round()
    return PlacedCutout(source.to(colours.dtype), canvas[-1], visible)
