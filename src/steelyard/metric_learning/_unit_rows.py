"""Rows of length one, and cosines that autocast leaves alone."""

import torch
from torch import Tensor

from steelyard._reduce import widen


def unit_rows(rows: Tensor) -> Tensor:
    """Divide each row of ``[.., D]`` by its length, in float32 or better.

    Dividing by the largest entry first keeps the squares from overflowing; the direction does not
    depend on that factor, so it needs no gradient. A zero row stays zero and gets no gradient. NaN
    propagates.
    """
    rows = widen(rows)
    largest = rows.detach().abs().amax(-1, keepdim=True)
    zero = largest == 0
    scaled = (rows / torch.where(zero, 1.0, largest)).masked_fill(zero, 0.0)
    length = torch.where(zero, 1.0, torch.linalg.vector_norm(scaled, dim=-1, keepdim=True))
    return scaled / length


def cosines(left: Tensor, right: Tensor) -> Tensor:
    """Return the cosine of rows at the same place, ``[..]``."""
    return (unit_rows(left) * unit_rows(right)).sum(-1)


def products(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right^T`` in the dtype of the inputs, also inside autocast."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right.mT
