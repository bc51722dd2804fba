r"""Paste an object into an annotated image and repair the labels of what it covers.

Images are ``[3, H, W]`` as in torchvision; its tensor subclasses are accepted, plain tensors
returned. Nothing here is random.

Source: Fan et al. (2024), DiverGen, arXiv:2405.10185, and its code; Zhao et al. (2023), X-Paste,
arXiv:2212.03863.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from steelyard._checks import (
    check_choice,
    check_count,
    check_integer_dtype,
    check_not_empty,
    check_range,
    check_shape,
)
from steelyard.vision._blend import box_blurred, gradient_blend, opacity_blend

__all__ = ["PastedInstance", "mask_boxes", "paste_instance"]

Blend = Literal["basic", "alpha", "gaussian", "poisson"]
OPAQUE = 0.5


class PastedInstance(NamedTuple):
    """What :func:`paste_instance` returns.

    Objects that were kept, in their order, and then the pasted one.
    """

    image: Tensor
    """``[3, H, W]``, dtype of the input."""
    masks: Tensor
    """Boolean ``[K', H, W]``."""
    boxes: Tensor
    """float32 ``[K', 4]``: x1, y1, x2, y2, maxima exclusive; zeros for an empty mask."""
    labels: Tensor
    """``[K']``, dtype of the input."""
    keep: Tensor
    """Which of the objects before are still there, boolean ``[K]``."""


def paste_instance(
    image: Tensor,
    masks: Tensor,
    labels: Tensor,
    source: Tensor,
    alpha: Tensor,
    label: int,
    *,
    blend: Blend = "basic",
    box_threshold: float = 10,
    area_threshold: float = 300,
    drop_empty: bool = True,
) -> PastedInstance:
    r"""Lay an object over an image; the objects below lose what it covers, or their label.

    With the pasted mask :math:`m = [\alpha \ge 1/2]`, each object becomes :math:`M_i \wedge \neg m`
    with a tight box. It is kept if its box hardly moved or if enough of it is left:

    .. math:: \lVert b_i^{\mathrm{new}} - b_i^{\mathrm{old}} \rVert_\infty \le 10
        \quad\text{or}\quad |M_i \wedge \neg m| > 300

    ============== ===============================================================================
    ``blend``      image
    ============== ===============================================================================
    ``"basic"``    the source on ``m``
    ``"alpha"``    mixed by ``alpha``
    ``"gaussian"`` mixed by ``m`` blurred over 5x5 pixels (a box, whatever the published name says)
    ``"poisson"``  the source's differences on ``m``, joined to the image around it; needs sensible
                   colours one pixel beyond ``m``
    ============== ===============================================================================

    Only the image depends on ``blend``, labels do not.

    Args:
        image: ``[3, H, W]``, integer or floating point (any number of channels).
        masks: boolean ``[K, H, W]``; ``K = 0`` is allowed.
        labels: integer ``[K]``.
        source: the object on a canvas of the image's size and dtype, ``[3, H, W]``.
        alpha: opacity, ``[H, W]`` in [0, 1].
        label: of the object.
        blend: see the table.
        box_threshold: pixels, >= 0. Published for images of 640 to 896 pixels: scale it with the
            side of yours.
        area_threshold: pixels, >= 0; scale it with the area.
        drop_empty: drop objects with no pixel, the pasted one too. The published rule keeps a fully
            covered object whose corners all lie within ``box_threshold`` of the image's first
            pixel, because the box of nothing is zeros: ``False``.

    Returns:
        ``image``, ``masks``, ``boxes``, ``labels`` and ``keep``. Integer images are rounded and
        kept in their dtype's range.

    Raises:
        ValueError: shapes that do not fit, an empty image, ``alpha`` outside [0, 1] or a setting
            out of range.
        TypeError: wrong dtypes, or ``source`` of another dtype than ``image``.

    Example:
        An object of which 2 of 4 columns are covered keeps the rest; its box is tight:

        >>> import torch
        >>> image, source = torch.zeros(3, 2, 6), torch.ones(3, 2, 6)
        >>> mask, alpha = torch.zeros(1, 2, 6, dtype=torch.bool), torch.zeros(2, 6)
        >>> mask[:, :, :4], alpha[:, 2:] = True, 1.0
        >>> result = paste_instance(image, mask, torch.tensor([7]), source, alpha, 5)
        >>> result.labels, result.boxes
        (tensor([7, 5]), tensor([[0., 0., 2., 2.],
                [2., 0., 6., 2.]]))

    Source: Fan et al. (2024), code, arXiv:2405.10185; ``drop_empty`` is ours.
    """
    _check_arguments(image, masks, labels, source, alpha)
    check_count("label", label, at_least=-(2**63))
    check_choice("blend", blend, ("basic", "alpha", "gaussian", "poisson"))
    check_range("box_threshold", box_threshold, at_least=0.0)
    check_range("area_threshold", area_threshold, at_least=0.0)
    image, masks, labels = (given.as_subclass(Tensor) for given in (image, masks, labels))
    source, alpha = source.as_subclass(Tensor), alpha.as_subclass(Tensor)
    pasted = alpha >= OPAQUE
    left = masks & ~pasted
    moved = (mask_boxes(left) - mask_boxes(masks)).abs().amax(1)
    keep = (moved <= box_threshold) | (left.sum((1, 2)) > area_threshold)
    every = torch.cat((left, pasted[None]))
    stays = torch.cat((keep, keep.new_ones(1)))
    if drop_empty:
        stays = stays & every.any(2).any(1)
    every = every[stays]
    return PastedInstance(
        _blended(image, source, alpha, pasted, blend),
        every,
        mask_boxes(every),
        torch.cat((labels, labels.new_tensor([label])))[stays],
        stays[:-1],
    )


def mask_boxes(masks: Tensor) -> Tensor:
    """Tight boxes of masks: x1, y1, x2, y2 with exclusive maxima.

    Args:
        masks: boolean ``[K, H, W]``; ``K = 0`` is allowed.

    Returns:
        float32 ``[K, 4]``; zeros for an empty mask.

    Raises:
        ValueError: wrong shape. TypeError: not boolean.

    Example:
        >>> import torch
        >>> mask_boxes(torch.tensor([[[False, True, True], [False, False, False]]]))
        tensor([[1., 0., 3., 1.]])

    Source: Fan et al. (2024), code, arXiv:2405.10185.
    """
    check_shape("masks", masks, (None, None, None))
    if masks.dtype != torch.bool:
        raise TypeError(f"masks must have dtype torch.bool, got {masks.dtype}")
    masks = masks.as_subclass(Tensor)
    if masks.numel() == 0:  # no pixel to find a box of
        return torch.zeros(len(masks), 4, device=masks.device)
    bounds = []
    for occupied in (masks.any(1), masks.any(2)):
        length = occupied.shape[1]
        place = torch.arange(length, device=masks.device)
        low = torch.where(occupied, place, length).amin(1)
        high = torch.where(occupied, place + 1, 0).amax(1)
        bounds.append((torch.where(high > 0, low, 0), high))
    (left, right), (top, bottom) = bounds
    return torch.stack((left, top, right, bottom), dim=1).float()


def _blended(image: Tensor, source: Tensor, alpha: Tensor, pasted: Tensor, blend: Blend) -> Tensor:
    if blend == "basic":
        return torch.where(pasted, source, image)
    dtype = image.dtype
    exact = torch.float32 if dtype in (torch.uint8, torch.float16, torch.bfloat16) else dtype
    exact = exact if exact.is_floating_point else torch.float64
    below, above = image.to(exact), source.to(exact)
    if blend == "poisson":
        mixed = gradient_blend(below, above, pasted)
    else:
        opacity = alpha.to(exact) if blend == "alpha" else box_blurred(pasted.to(exact))
        mixed = opacity_blend(below, above, opacity)
    if dtype.is_floating_point:
        return mixed.to(dtype)
    limits = torch.iinfo(dtype)
    return mixed.round().clamp(limits.min, limits.max).to(dtype)


def _check_arguments(
    image: Tensor, masks: Tensor, labels: Tensor, source: Tensor, alpha: Tensor
) -> None:
    check_shape("image", image, (None, None, None))
    check_not_empty("image", image)
    if image.dtype == torch.bool or image.is_complex():
        raise TypeError(f"image must be integer or floating point, got {image.dtype}")
    size = tuple(image.shape[1:])
    check_shape("masks", masks, (None, *size))
    if masks.dtype != torch.bool:
        raise TypeError(f"masks must have dtype torch.bool, got {masks.dtype}")
    check_shape("labels", labels, (len(masks),))
    check_integer_dtype(labels=labels)
    check_shape("source", source, tuple(image.shape))
    if source.dtype != image.dtype:
        raise TypeError(f"source must have the dtype of image, {image.dtype}, got {source.dtype}")
    check_shape("alpha", alpha, size)
    if not alpha.is_floating_point():
        raise TypeError(f"alpha must have a floating dtype, got {alpha.dtype}")
    if not bool(((alpha >= 0) & (alpha <= 1)).all()):
        raise ValueError("alpha must lie in [0, 1]")
