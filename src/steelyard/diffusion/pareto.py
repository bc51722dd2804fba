r"""Quality of a set of points with several objectives: fronts and hypervolume.

Every objective is minimised. ``a`` dominates ``b`` if no objective of ``a`` is larger and one is
smaller. These are measures, not losses: they carry no gradient, and the hypervolume is computed on
the CPU.

Sources: Deb et al. (2002), NSGA-II; Fonseca, Paquete and Lopez-Ibanez (2006), An improved
dimension-sweep algorithm for the hypervolume indicator; While, Bradstreet and Barone (2012), A
fast way of calculating exact hypervolumes.
"""

import importlib
import importlib.util
import math
from bisect import bisect_left, bisect_right
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steelyard._checks import check_floating, check_not_empty, check_shape
from steelyard.diffusion._arguments import check_no_nan

__all__ = ["hypervolume", "non_dominated_sort"]

Floats = NDArray[np.float64]

_BLOCK = 512
"""Rows compared at a time in the sorting: bounds its memory at ``_BLOCK * N`` comparisons."""


def hypervolume(points: Tensor, reference: Tensor) -> Tensor:
    r"""Measure the volume that a set of points dominates, up to a reference point.

    .. math::
        \mathrm{HV}(P; r) = \mathrm{vol}\Big( \bigcup_{p \in P,\, p < r}
            [p_1, r_1] \times \dots \times [p_m, r_m] \Big)

    All objectives are minimised. Exact for any ``m``. Only points below ``r`` in every objective
    count. It depends on the unit of each objective: normalise before you compare. With three or
    more objectives the package ``moocore`` computes it if it is installed; otherwise a sweep of
    O(N log N) for ``m = 3``, and a recursion down to it that grows by a factor ``N`` an objective.

    Args:
        points: ``[N, m]``, any order, dominated points and repetitions allowed; no NaN.
        reference: ``[m]``, finite.

    Returns:
        0-d, dtype and device of ``points``, computed in float64. No gradient.

    Raises:
        ValueError: wrong shapes, empty, NaN, or a reference that is not finite.
        TypeError: not floating point.

    Example:
        The point in the middle adds the unit square that the other two leave; one that they
        dominate adds nothing:

        >>> import torch
        >>> reference = torch.tensor([4.0, 4.0])
        >>> hypervolume(torch.tensor([[1.0, 3.0], [3.0, 1.0]]), reference)
        tensor(5.)
        >>> hypervolume(torch.tensor([[1.0, 3.0], [3.0, 1.0], [2.0, 2.0], [3.0, 3.0]]), reference)
        tensor(6.)

    Source: Zitzler and Thiele (1998); used by Yuan et al. (2025), arXiv:2412.03718.
    """
    check_floating(points=points, reference=reference)
    check_shape("points", points, (None, None))
    check_not_empty("points", points)
    check_shape("reference", reference, (points.shape[1],))
    limit, values = (x.detach().to("cpu", torch.float64).numpy() for x in (reference, points))
    if not all(map(math.isfinite, limit.tolist())):
        raise ValueError(f"reference must be finite, got {limit.tolist()}")
    if not math.isfinite(values.sum()):  # NaN, infinity or an overflow
        if np.isnan(values).any():
            raise ValueError("points must not contain NaN")
        values = values[(values < limit).all(axis=1)]
        if np.isinf(values).any():
            return torch.full((), torch.inf, dtype=points.dtype, device=points.device)
    volume = _volume(values, limit)
    return torch.tensor(volume, dtype=points.dtype, device=points.device)


def _volume(points: Floats, reference: Floats) -> float:
    """Dispatch on the number of objectives; every point is finite."""
    if len(points) > 0 and points.shape[1] >= 3 and _has_moocore():
        # It leaves out by itself what is not below the reference.
        return float(importlib.import_module("moocore").hypervolume(points, ref=reference))
    points = points[(points < reference).all(axis=1)]
    return _volume_of_any_dimension(points, reference)


@cache
def _has_moocore() -> bool:
    """Look for the package without importing it."""
    return importlib.util.find_spec("moocore") is not None


def _volume_of_any_dimension(points: Floats, reference: Floats) -> float:
    """Slice along the last objective until three are left.

    A point adds, over those not above it in the last objective, ``(r - p)_last`` times its own
    volume in the other objectives minus what ``max(q, p)`` of those others cover there.
    """
    if len(points) == 0:
        return 0.0
    if points.shape[1] == 1:
        return float(reference[0] - points.min())
    if points.shape[1] == 2:
        return _area(points, reference)
    if points.shape[1] == 3:
        return _volume_by_sweep(points, reference)
    points = _non_dominated(points)
    points = points[np.argsort(-points[:, -1], kind="stable")]
    total = 0.0
    for index, point in enumerate(points):
        limited = np.maximum(points[index + 1 :, :-1], point[:-1])
        covered = _volume_of_any_dimension(limited, reference[:-1])
        own = float(np.prod(reference[:-1] - point[:-1]))
        total += float(reference[-1] - point[-1]) * (own - covered)
    return total


def _area(points: Floats, reference: Floats) -> float:
    """Sum the strips between neighbours in the first objective."""
    points = points[np.argsort(points[:, 0], kind="stable")]
    widths = np.diff(points[:, 0], append=reference[0])
    return float(widths @ (reference[1] - np.minimum.accumulate(points[:, 1])))


def _volume_by_sweep(points: Floats, reference: Floats) -> float:
    """Raise the third objective and keep the staircase of the first two, with its area.

    ``xs`` ascends and ``ys`` descends; the ends are sentinels. A point leaves the staircase once
    at most, so the whole costs O(N log N) searches.
    """
    right, top, _ = reference.tolist()
    xs, ys = [-math.inf, right], [top, -math.inf]
    area = volume = 0.0
    order = points[np.argsort(points[:, 2], kind="stable")]
    heights = np.diff(order[:, 2], append=reference[2]).tolist()
    for (x, y, _), height in zip(order.tolist(), heights, strict=True):
        above = ys[bisect_right(xs, x) - 1]
        if y < above:
            start = end = bisect_left(xs, x)
            left, above = x, ys[start - 1]
            while ys[end] >= y:
                area += (xs[end] - left) * (above - y)
                left, above = xs[end], ys[end]
                end += 1
            area += (xs[end] - left) * (above - y)
            xs[start:end] = [x]
            ys[start:end] = [y]
        volume += area * height
    return volume


def _non_dominated(points: Floats) -> Floats:
    """Keep the distinct points that no other dominates."""
    rows = np.unique(points, axis=0)  # lexicographic: a dominating point comes first
    kept = np.ones(len(rows), dtype=bool)
    for index in range(len(rows)):
        if kept[index]:
            worse = (rows[index + 1 :] >= rows[index]).all(axis=1)
            kept[index + 1 :] &= ~worse
    return rows[kept]


def non_dominated_sort(points: Tensor) -> list[Tensor]:
    r"""Split points into fronts: each one the non-dominated points of what the former leave.

    The number of a point's front is the length of the longest chain of dominations that ends in
    it, so the fronts come out of one pass over the points in lexicographic order:

    .. math:: \mathrm{front}(p) = 1 + \max_{q \text{ dominates } p} \mathrm{front}(q)

    All objectives are minimised. Equal points share a front.

    Args:
        points: ``[N, m]``, no NaN.

    Returns:
        The fronts, best first, each the ascending int64 indices of its points. Memory grows with
        ``N``, time with ``N^2 m``, or with ``N log^2 N`` for ``m <= 3``.

    Raises:
        ValueError: wrong shape, empty or NaN.
        TypeError: not floating point.

    Example:
        >>> import torch
        >>> non_dominated_sort(torch.tensor([[2.0, 2.0], [1.0, 4.0], [3.0, 3.0], [4.0, 1.0]]))
        [tensor([0, 1, 3]), tensor([2])]

    Source: Deb et al. (2002), NSGA-II, Sec. III-A; used by Yuan et al. (2025), arXiv:2412.03718.
    """
    check_floating(points=points)
    check_shape("points", points, (None, None))
    check_not_empty("points", points)
    check_no_nan("points", points)
    # Adding 0 turns -0 into 0. The rows come in lexicographic order, so only earlier ones dominate.
    rows, inverse = torch.unique(points.detach().double() + 0.0, dim=0, return_inverse=True)
    ranks = _ranks_by_staircases(rows) if rows.shape[1] <= 3 else _ranks_by_blocks(rows)
    front = ranks[inverse]
    order = torch.argsort(front, stable=True)
    return list(torch.split(order, torch.bincount(front).tolist()))


def _ranks_by_staircases(rows: Tensor) -> Tensor:
    """Find the front of each lexicographically sorted distinct row with at most three objectives.

    The first objective is dealt with by the order. Of the others each front keeps its staircase:
    ``ys`` ascending, ``zs`` descending. What one front dominates the fronts before it dominate too,
    so a binary search finds the first that does not.
    """
    others = torch.nn.functional.pad(rows[:, 1:], (3 - rows.shape[1], 0))
    stairs: list[tuple[list[float], list[float]]] = []
    ranks = []
    for y, z in others.tolist():
        rank = _first_not_under(stairs, y, z)
        if rank == len(stairs):
            stairs.append(([-math.inf], [math.inf]))
        ys, zs = stairs[rank]
        start = end = bisect_left(ys, y, lo=1)
        while end < len(zs) and zs[end] >= z:
            end += 1
        ys[start:end] = [y]
        zs[start:end] = [z]
        ranks.append(rank)
    return torch.tensor(ranks, device=rows.device)


def _first_not_under(stairs: list[tuple[list[float], list[float]]], y: float, z: float) -> int:
    """Find the first staircase that has no step with both coordinates at most ``(y, z)``."""
    low, high = 0, len(stairs)
    while low < high:
        middle = (low + high) // 2
        ys, zs = stairs[middle]
        if zs[bisect_right(ys, y) - 1] <= z:
            low = middle + 1
        else:
            high = middle
    return low


def _ranks_by_blocks(rows: Tensor) -> Tensor:
    """Find the front of each lexicographically sorted distinct row, a block of rows at a time."""
    ranks = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    for start in range(0, len(rows), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(rows)))
        before = _dominated_by(rows[block], rows[:start])
        if start > 0:
            ranks[block] = (before * (ranks[:start] + 1)).amax(1)
        # Chains inside the block: each pass settles one more link.
        within = _dominated_by(rows[block], rows[block]).tril(-1)
        while True:
            longer = torch.maximum(ranks[block], (within * (ranks[block] + 1)).amax(1))
            if torch.equal(longer, ranks[block]):
                break
            ranks[block] = longer
    return ranks


def _dominated_by(rows: Tensor, others: Tensor) -> Tensor:
    """Tell which of ``others`` are nowhere larger than each row, ``[rows, others]``."""
    result = torch.ones(len(rows), len(others), dtype=torch.bool, device=rows.device)
    for objective in range(rows.shape[1]):
        result &= others[:, objective] <= rows[:, objective, None]
    return result
