"""Sums and order statistics of groups of items, without a loop over groups.

Items ``[N]`` belong to ``G`` groups. ``index [N]`` is the number of an item's group, ``count [G]``
the size of each; both come from :func:`group_index`.
"""

import torch
from torch import Tensor


def group_index(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return each item's group number 0..G-1 and the size of each group."""
    _, index, count = torch.unique(groups, return_inverse=True, return_counts=True)
    return index, count


def group_sum(values: Tensor, index: Tensor, count: Tensor) -> Tensor:
    """Sum of each group, ``[G]``."""
    return values.new_zeros(count.shape[0]).index_add(0, index, values)


def group_centred(values: Tensor, index: Tensor, count: Tensor) -> Tensor:
    """Distance from the group mean, exactly 0 where all values of a group are equal.

    The mean is taken about the median: that of equal values would be off by a rounding error,
    which a division by the deviation, a rounding error too, blows up to 1.
    """
    distance = values - group_median(values, index, count)[index]
    return distance - (group_sum(distance, index, count) / count)[index]


def group_std(centred: Tensor, index: Tensor, count: Tensor) -> Tensor:
    """Unbiased deviation of each group, 0 for a group of one."""
    return (group_sum(centred.square(), index, count) / (count - 1).clamp(min=1)).sqrt()


def group_order(values: Tensor, index: Tensor) -> Tensor:
    """Positions that sort values within groups, groups in order; ties keep their order."""
    order = values.argsort(stable=True)
    return order[index[order].argsort(stable=True)]


def group_rank(values: Tensor, index: Tensor, count: Tensor) -> Tensor:
    """Rank of each value within its group from 0, smallest first; ties keep their order."""
    order = group_order(values, index)
    places = torch.arange(len(values), device=values.device)
    start = count.cumsum(0) - count
    return torch.empty_like(order).scatter_(0, order, places - start[index[order]])


def group_median(values: Tensor, index: Tensor, count: Tensor) -> Tensor:
    """Median of each group, the mean of the two middle values of an even one."""
    ordered, start = values[group_order(values, index)], count.cumsum(0) - count
    return (ordered[start + (count - 1) // 2] + ordered[start + count // 2]) / 2


def group_quantile(values: Tensor, index: Tensor, count: Tensor, level: float) -> Tensor:
    """Smallest value with at least ``level`` of its group at or below it."""
    ordered, start = values[group_order(values, index)], count.cumsum(0) - count
    rank = torch.ceil(level * count.double() - 1e-9).long() - 1
    return ordered[start + rank.clamp(min=0)]
