"""Places where features live: points, or points with one direction each."""

from typing import NamedTuple

import torch
from torch import Tensor


class Elements(NamedTuple):
    """Points with a direction, before features are reshaped to ``[P, O, C]``."""

    base: Tensor
    """Point of each element, ``[M]``."""
    ori: Tensor | None
    """Direction of each element, ``[M, n]``; ``None`` = no direction."""


def lift(x: Tensor | None, vec: Tensor | None, elements: Elements) -> Tensor:
    """Scalars and components of vectors along each element's direction, ``[M, S + V]``."""
    parts = [] if x is None else [x[elements.base]]
    if vec is not None and elements.ori is not None:
        parts.append((vec[elements.base] * elements.ori[:, None]).sum(-1))
    return torch.cat(parts, dim=-1)


def count_of(index: Tensor, size: int) -> Tensor:
    """How often each of ``0 .. size - 1`` occurs."""
    return index.new_zeros(size).index_add(0, index, torch.ones_like(index))


def mean_at(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Mean of the values with each index; 0 where there is none."""
    total = values.new_zeros(size, *values.shape[1:]).index_add(0, index, values)
    count = count_of(index, size).clamp(min=1).to(values.dtype)
    return total / count.view(-1, *([1] * (values.dim() - 1)))


def pairs_of_elements(edge_index: Tensor, base: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Pairs of elements whose points are joined, ``[2, Q]``, and the edge of each, ``[Q]``."""
    count = count_of(base, points)
    start = count.cumsum(0) - count
    order = base.argsort(stable=True)
    send, receive = edge_index
    number = count[send] * count[receive]
    edge = torch.arange(len(send), device=base.device).repeat_interleave(number)
    rank = torch.arange(len(edge), device=base.device)
    rank = rank - (number.cumsum(0) - number)[edge]
    columns = count[receive[edge]]
    sender = order[start[send[edge]] + rank.div(columns, rounding_mode="floor")]
    receiver = order[start[receive[edge]] + rank.remainder(columns)]
    return torch.stack((sender, receiver)), edge
