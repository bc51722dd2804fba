r"""Weight vectors on the simplex, their neighbours and the cones around them.

Das and Dennis (1998) spread weights evenly with a lattice. ParetoFlow runs one flow for each, lets
flows of neighbouring weights exchange offspring, and keeps each weight's flow inside a cone.

Source: Yuan, Chen, Pal and Liu (2025), ParetoFlow: Guided Flows in Multi-Objective Optimization,
arXiv:2412.03718.
"""

import math
from bisect import bisect_left
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from steelyard._checks import (
    check_count,
    check_floating,
    check_not_empty,
    check_range,
    check_shape,
)

__all__ = ["WeightNeighbours", "minimum_partitions", "simplex_lattice", "weight_neighbours"]


class WeightNeighbours(NamedTuple):
    """What :func:`weight_neighbours` returns: ``indices [C, k]`` and ``cone_angle [C]``."""

    indices: Tensor
    cone_angle: Tensor


def simplex_lattice(
    objectives: int, partitions: int, *, dtype: torch.dtype = torch.float64
) -> Tensor:
    r"""List the weight vectors of the Das-Dennis lattice.

    .. math::
        \{ (k_1, \dots, k_m) / p : k_j \in \mathbb{N}_0,\ \textstyle\sum_j k_j = p \}

    Args:
        objectives: ``m``, >= 1.
        partitions: ``p``, >= 1.
        dtype: of the result.

    Returns:
        ``[C, m]`` with ``C = binom(m + p - 1, p)``, in lexicographic order; each row sums to 1.

    Raises:
        ValueError: a number below 1.
        TypeError: a number that is not an int.

    Example:
        >>> simplex_lattice(2, 4)[:, 0]
        tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
        >>> simplex_lattice(3, 27).shape
        torch.Size([406, 3])

    Source: Das and Dennis (1998); Yuan et al. (2025), Sec. 4, arXiv:2412.03718.
    """
    check_count("objectives", objectives, at_least=1)
    check_count("partitions", partitions, at_least=1)
    # Stars and bars: m - 1 bars among p + m - 1 places; the gaps between bars are the k_j.
    places = partitions + objectives - 1
    count = math.comb(places, partitions)
    flat = (bar for bars in combinations(range(places), objectives - 1) for bar in bars)
    bars = np.fromiter(flat, dtype=np.int64).reshape(count, objectives - 1)
    gaps = np.diff(bars, axis=1, prepend=-1, append=places) - 1
    return (torch.from_numpy(gaps).double() / partitions).to(dtype)


def minimum_partitions(objectives: int, count: int = 400) -> int:
    r"""Find the coarsest lattice with at least ``count`` weight vectors.

    .. math:: \min \{ p \ge 1 : \tbinom{m + p - 1}{p} \ge \mathrm{count} \}

    Args:
        objectives: ``m``, >= 1.
        count: >= 1; the default is the released code's.

    Returns:
        ``p``, for :func:`simplex_lattice`.

    Raises:
        ValueError: a number below 1, or more than one vector for one objective, which has one.
        TypeError: a number that is not an int.

    Example:
        >>> minimum_partitions(2), minimum_partitions(3)
        (399, 27)

    Source: released code of Yuan et al. (2025), arXiv:2412.03718.
    """
    check_count("objectives", objectives, at_least=1)
    check_count("count", count, at_least=1)
    if objectives == 1 and count > 1:
        raise ValueError(f"count must be 1 for objectives = 1, which have one weight, got {count}")
    candidates = range(1, count + 1)  # two objectives or more have over p vectors
    found = bisect_left(candidates, count, key=lambda p: math.comb(objectives + p - 1, p))
    return candidates[found]


def weight_neighbours(weights: Tensor, k: int | None = None) -> WeightNeighbours:
    r"""Find the nearest weight vectors of each weight vector, and how wide its cone is.

    .. math::
        \Phi_i = \frac{2}{m} \sum_{j \in \mathcal{N}_{m+1}(i)} \angle(w_i, w_j)

    where :math:`\mathcal{N}_{m+1}(i)` are ``i`` itself and its ``m`` nearest others: the apex angle
    is twice their mean angle, whatever ``k`` is. With fewer than ``m`` others the mean is over
    those there are. Alone, a weight has the apex angle ``2 pi``, a cone that keeps everything.

    Args:
        weights: ``[C, m]``, not negative, no row of zeros.
        k: neighbours of each, itself included, 1 to ``C``; ``None`` = ``m + 1``, at most ``C``.

    Returns:
        ``indices [C, k]`` by descending cosine, itself first, ties to the lower index; and
        ``cone_angle [C]`` in radians, dtype of ``weights``. No gradient.

    Raises:
        ValueError: wrong shape, empty, negative weights or a row of zeros, ``k`` out of range.
        TypeError: not floating point.

    Example:
        >>> found = weight_neighbours(simplex_lattice(2, 2))
        >>> found.indices
        tensor([[0, 1, 2],
                [1, 0, 2],
                [2, 1, 0]])
        >>> found.cone_angle / torch.pi  # the middle one: 2/2 (0 + pi/4 + pi/4)
        tensor([0.7500, 0.5000, 0.7500], dtype=torch.float64)

    Source: Yuan et al. (2025), Sec. 4.2, arXiv:2412.03718.
    """
    check_floating(weights=weights)
    check_shape("weights", weights, (None, None))
    check_not_empty("weights", weights)
    values = weights.detach().double()
    if not bool((values >= 0).all() & (values.sum(1) > 0).all() & values.isfinite().all()):
        raise ValueError("weights must be finite and not negative, with no row of zeros")
    total, objectives = values.shape
    wanted = min(objectives + 1, total) if k is None else k
    check_count("k", wanted, at_least=1)
    check_range("k", wanted, at_most=total)

    units = torch.nn.functional.normalize(values, dim=1)
    # The lattice is full of ties that rounding would break at random.
    cosine = torch.round(units @ units.T, decimals=12).fill_diagonal_(2.0)
    order = cosine.argsort(dim=1, descending=True, stable=True)
    others = min(objectives, total - 1)
    nearest = units[order[:, 1 : others + 1]]
    angles = angle_between(nearest, units[:, None])
    apex = 2 * angles.mean(1) if others > 0 else angles.new_full((1,), 2 * math.pi)
    return WeightNeighbours(order[:, :wanted], apex.to(weights.dtype))


def angle_between(a: Tensor, b: Tensor) -> Tensor:
    """Angle in ``[0, pi]`` between vectors of the last dimension; ``pi/2`` if one is zero.

    ``2 atan2(|a - b|, |a + b|)`` of the unit vectors: exact near 0 and pi, where the arc cosine
    loses half of the digits, and never NaN by rounding.
    """
    a = torch.nn.functional.normalize(a, dim=-1, eps=torch.finfo(a.dtype).tiny)
    b = torch.nn.functional.normalize(b, dim=-1, eps=torch.finfo(b.dtype).tiny)
    return 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))
