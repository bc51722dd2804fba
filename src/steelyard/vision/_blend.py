"""Ways to lay a source over an image: hard, transparent, with a soft edge, in gradients."""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import splu
from torch import Tensor

Places = NDArray[np.int64]

BOX = 5


def opacity_blend(image: Tensor, source: Tensor, opacity: Tensor) -> Tensor:
    """``image (1 - opacity) + source opacity``; exactly the image where the opacity is 0."""
    return torch.where(opacity > 0, image * (1 - opacity) + source * opacity, image)


def box_blurred(mask: Tensor) -> Tensor:
    """Mean of a mask over 5x5 pixels; the image goes on mirrored, its border not repeated."""
    blurred = mask
    for dim in (0, 1):
        length = mask.shape[dim]
        offsets = torch.arange(-(BOX // 2), BOX // 2 + 1, device=mask.device)
        places = _mirrored(torch.arange(length, device=mask.device)[:, None] + offsets, length)
        blurred = torch.stack([blurred.index_select(dim, place) for place in places.T]).mean(0)
    return blurred


def _mirrored(index: Tensor, length: int) -> Tensor:
    period = max(1, 2 * (length - 1))
    index = index.remainder(period)
    return torch.minimum(index, period - index) if length > 1 else torch.zeros_like(index)


def gradient_blend(image: Tensor, source: Tensor, mask: Tensor) -> Tensor:
    """Give the masked region the source's differences and the image's values around it.

    Solves the discrete Poisson equation on the mask, one factorisation for all channels; the edge
    of the image is free. A mask that covers the image has nothing around it: the source is taken.
    """
    if not bool(mask.any()) or bool(mask.all()):
        return torch.where(mask, source, image)
    inside = mask.detach().cpu().numpy().ravel()
    values = image.detach().cpu().double().numpy().reshape(len(image), -1)
    colours = source.detach().cpu().double().numpy().reshape(len(image), -1)
    here, there = _neighbours(*mask.shape)
    here, there = here[inside[here]], there[inside[here]]
    unknowns = int(inside.sum())
    number = np.cumsum(inside) - 1
    row, known = number[here], ~inside[there]
    right = np.zeros((unknowns, len(values)))
    np.add.at(right, row, (colours[:, here] - colours[:, there]).T)
    np.add.at(right, row[known], values[:, there[known]].T)
    links = (np.ones(len(row) - known.sum()), (row[~known], number[there[~known]]))
    degrees = sparse.diags(np.bincount(row, minlength=unknowns).astype(float))
    laplacian = degrees - sparse.csr_matrix(links, (unknowns, unknowns))
    result = values.copy()
    result[:, inside] = splu(laplacian.tocsc()).solve(right).T
    return torch.from_numpy(result.reshape(image.shape)).to(image.device, image.dtype)


def _neighbours(height: int, width: int) -> tuple[Places, Places]:
    """All pairs of pixels that share a side, both ways, as places in reading order."""
    index = np.arange(height * width).reshape(height, width)
    upper, lower = index[:-1].ravel(), index[1:].ravel()
    left, right = index[:, :-1].ravel(), index[:, 1:].ravel()
    return (
        np.concatenate((upper, lower, left, right)),
        np.concatenate((lower, upper, right, left)),
    )
