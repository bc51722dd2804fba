r"""How differently the classes fare at one common threshold: utilities and OPIS.

A match is accepted when the distance of two unit vectors is at most ``d``. Each class has its own
rates there, and OPIS is the variance of their utilities over the classes, averaged over a range of
thresholds. Classes are walked a few at a time, on purpose: memory is that of a block against all,
and of the distances in the range.
Nothing here carries a gradient.

Source: Zhang et al. (2024), Sec. 3, arXiv:2307.04047.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from steelyard._checks import (
    check_count,
    check_floating,
    check_groups,
    check_not_empty,
    check_pair,
    check_range,
    check_shape,
)
from steelyard.metric_learning._unit_rows import unit_rows

__all__ = ["OPIS", "OperatingPoints", "operating_point_utility", "opis"]

_BINS = 2**14  # of the distance, to find two order statistics without sorting all pairs
_BLOCK_ELEMENTS = 2**18  # distances at once: they stay in cache
_ROWS = 64  # so many at least in a product: thinner ones are slow
# Below this, 2 - 2 s has lost digits that the differences of unit vectors still have.
_NEAR = 1e-3
_ROUNDING = 1e-12


class OperatingPoints(NamedTuple):
    """What :func:`operating_point_utility` returns, each ``[G, C]``."""

    utility: Tensor
    sensitivity: Tensor
    specificity: Tensor


class OPIS(NamedTuple):
    """What :func:`opis` returns."""

    opis: Tensor
    """Variance of the classes' utilities, averaged over the range; 0-d, in [0, 1/4]."""
    mean_utility: Tensor
    """Utility averaged over classes and the range; 0-d."""
    threshold_range: tuple[Tensor, Tensor]
    """Lowest and highest threshold, 0-d float64 each."""


class _Class(NamedTuple):
    """Squared distances of one class."""

    within: Tensor
    """Between its items, ``[pairs]``."""
    across: Tensor
    """From its items to those of other classes, ``[items, N]``; infinite where none is meant."""
    across_count: int


class _Gallery(NamedTuple):
    """Unit vectors of the classes with two items or more, items of a class side by side."""

    unit: Tensor
    bounds: list[int]

    def classes(self) -> Iterator[_Class]:
        """Yield the squared distances of each class, made for a few classes at a time."""
        for bounds in self._groups():
            start = bounds[0]
            classes = list(pairwise(bounds))
            own = [(slice(low - start, high - start), slice(low, high)) for low, high in classes]
            across = _squared_distances(self.unit[start : bounds[-1]], self.unit, left_out=own)
            for rows, columns in own:
                mine = self.unit[columns]
                row, column = torch.triu_indices(len(mine), len(mine), 1, device=mine.device)
                within = _squared_distances(mine, mine)[row, column]
                yield _Class(within, across[rows], len(mine) * (len(self.unit) - len(mine)))

    def _groups(self) -> Iterator[list[int]]:
        """Yield the bounds of neighbouring classes that have enough rows for a quick product."""
        group = [0]
        for high in self.bounds[1:]:
            group.append(high)
            if high - group[0] >= _ROWS or high == self.bounds[-1]:
                yield group
                group = [high]

    def negative_blocks(self) -> Iterator[Tensor]:
        """Yield every distance between two classes once, in blocks of bounded size."""
        for low, high in pairwise(self.bounds):
            later = self.unit[high:]
            if len(later):
                size = max(1, _BLOCK_ELEMENTS // len(later))
                for start in range(low, high, size):
                    rows = self.unit[start : min(start + size, high)]
                    yield _squared_distances(rows, later).sqrt_().flatten()


def operating_point_utility(
    embeddings: Tensor, labels: Tensor, thresholds: Tensor
) -> OperatingPoints:
    r"""Sensitivity, specificity and their F-score for each class at each threshold.

    Over unordered pairs of unit vectors,

    .. math::
        \psi_i(d) &= P(\text{dist} \le d \mid \text{both ends in class } i), \\
        \phi_i(d) &= P(\text{dist} > d \mid \text{one end in class } i), \qquad
        U_i = \frac{2 \phi_i \psi_i}{\phi_i + \psi_i}

    and ``U = 0`` where both are 0.

    Args:
        embeddings: ``[N, D]``, normalised inside; detached. Computed in float64.
        labels: integer class of each item, ``[N]``. A class of one item has no pair of its own: it
            and its item are left out.
        thresholds: Euclidean distances between unit vectors, ``[G]``, in any order.

    Returns:
        ``utility``, ``sensitivity``, ``specificity``, ``[G, C]`` each, classes with two items or
        more in sorted order, dtype of ``embeddings``. A single class has specificity 1.

    Raises:
        ValueError: wrong shapes, empty or NaN input, or no class with two items.
        TypeError: a tensor is not floating point or ``labels`` not integer.

    Example:
        One threshold, a tight class and a loose one:

        >>> import torch
        >>> rows = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 1.0], [-1.0, -1.0]])
        >>> at = operating_point_utility(rows, torch.tensor([0, 0, 1, 1]), torch.tensor([1.0]))
        >>> at.sensitivity, at.specificity
        (tensor([[1., 0.]]), tensor([[1., 1.]]))

    Source: Zhang et al. (2024), Sec. 3, arXiv:2307.04047; pairs counted as stated here.
    """
    gallery = _gallery(embeddings, labels)
    check_floating(thresholds=thresholds)
    check_shape("thresholds", thresholds, (None,))
    check_not_empty("thresholds", thresholds)
    at = thresholds.detach().to(gallery.unit)
    if bool(at.isnan().any()):
        raise ValueError("thresholds must not contain NaN")
    rates = [_rates(each, at) for each in gallery.classes()]
    sensitivity = torch.stack([rate[0] for rate in rates], -1)
    specificity = torch.stack([rate[1] for rate in rates], -1)
    values = (_utility(sensitivity, specificity), sensitivity, specificity)
    return OperatingPoints(*(value.to(embeddings.dtype) for value in values))


def opis(
    embeddings: Tensor,
    labels: Tensor,
    *,
    far_range: tuple[float, float] = (0.01, 0.1),
    threshold_range: tuple[float | Tensor, float | Tensor] | None = None,
    grid: int | None = None,
) -> OPIS:
    r"""Operating-point inconsistency score: 0 if one threshold treats all classes alike.

    .. math::
        \mathrm{OPIS} = \frac{1}{T (d_{\max} - d_{\min})} \int_{d_{\min}}^{d_{\max}}
            \sum_{i=1}^T \big( U_i(d) - \bar U(d) \big)^2 \, \mathrm{d}d

    with the utilities of :func:`operating_point_utility`. They are steps that change at pair
    distances, so the integral is a finite sum, taken exactly after one sort of the distances in
    the range. Always report recall beside it: a collapsed embedding has a low score.

    Args:
        embeddings: ``[N, D]``, normalised inside; detached. Computed in float64.
        labels: integer class of each item, ``[N]``; classes of one item are left out.
        far_range: false-accept rates in [0, 1] that set the range: the linear quantiles of the
            distances of all pairs between classes. Use 1e5 such pairs or more for a rate of 0.01.
        threshold_range: lowest and highest distance; given, it replaces ``far_range``, for example
            with the range found on a calibration split.
        grid: ``None`` = the exact integral; else the mean over that many equally spaced
            thresholds, ends included, >= 2. The grid needs no memory for the distances in range.

    Returns:
        ``opis``, ``mean_utility`` in the dtype of ``embeddings``, and ``threshold_range``. Scores
        compare only at the same false-accept rates.

    Raises:
        ValueError: wrong shapes, empty or NaN input, no class with two items, an empty range of
            thresholds, or (without ``threshold_range``) fewer than two classes.
        TypeError: ``embeddings`` not floating point, ``labels`` or ``grid`` not an integer.

    Example:
        Two classes of equal spread, then one of them twice as wide:

        >>> import torch
        >>> def circle(*degrees):
        ...     angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
        ...     return torch.stack((angle.cos(), angle.sin()), -1)
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> alike = opis(circle(-5, 5, 85, 95), labels, threshold_range=(0.1, 0.5))
        >>> uneven = opis(circle(-5, 5, 80, 100), labels, threshold_range=(0.1, 0.5))
        >>> round(alike.opis.item(), 6), round(uneven.opis.item(), 6)
        (0.0, 0.108116)

    Source: Zhang et al. (2024), Sec. 3, arXiv:2307.04047; the exact sum is ours.
    """
    gallery = _gallery(embeddings, labels)
    ends = check_settings(far_range, threshold_range, grid)
    low, high = _threshold_range(gallery, far_range, ends)
    if grid is None:
        score, utility = _exact_variance(gallery, low, high)
    else:
        at = torch.linspace(0, 1, grid, dtype=low.dtype, device=low.device) * (high - low) + low
        at[-1] = high
        rates = [_rates(each, at) for each in gallery.classes()]
        utilities = torch.stack([_utility(*rate) for rate in rates])
        score, utility = utilities.var(0, correction=0).mean(), utilities.mean()
    dtype = embeddings.dtype
    return OPIS(score.to(dtype), utility.to(dtype), (low, high))


def _gallery(embeddings: Tensor, labels: Tensor) -> _Gallery:
    check_floating(embeddings=embeddings)
    check_shape("embeddings", embeddings, (None, None))
    check_not_empty("embeddings", embeddings)
    check_groups(labels, embeddings, name="labels")
    unit = unit_rows(embeddings.detach().double())
    if bool(unit.isnan().any()):
        raise ValueError("embeddings must be finite, got NaN or infinite entries")
    _, index, count = torch.unique(labels, return_inverse=True, return_counts=True)
    kept = count >= 2
    if not bool(kept.any()):
        raise ValueError("labels must give some class two items, got classes of one item only")
    order = index.argsort(stable=True)
    order = order[kept[index[order]]]
    bounds = [0, *count[kept].cumsum(0).tolist()]
    return _Gallery(unit[order], bounds)


def _squared_distances(
    left: Tensor, right: Tensor, *, left_out: Sequence[tuple[slice, slice]] = ()
) -> Tensor:
    """From the products of unit vectors, and from differences where that loses digits.

    Rows and columns that are left out are infinite.
    """
    squared = torch.addmm(left.new_tensor(2.0), left, right.T, alpha=-2)
    for block in left_out:
        squared[block] = torch.inf
    if squared.numel() and bool(squared.amin() < _NEAR):
        row, column = (squared < _NEAR).nonzero(as_tuple=True)
        size = max(1, _BLOCK_ELEMENTS // left.shape[1])
        for start in range(0, len(row), size):
            r, c = row[start : start + size], column[start : start + size]
            squared[r, c] = (left[r] - right[c]).square().sum(1)
    return squared


def _rates(each: _Class, at: Tensor) -> tuple[Tensor, Tensor]:
    """Sensitivity and specificity of a class at thresholds in any order."""
    ordered, order = at.sort()
    place = torch.empty_like(order).scatter(0, order, torch.arange(len(at), device=at.device))
    accepted = _counted(each.within.sqrt(), ordered)[place]
    wrong = _counted(each.across.sqrt().flatten(), ordered)[place]
    return _shares(accepted, wrong, each)


def _counted(distances: Tensor, at: Tensor) -> Tensor:
    """How many of the distances are at most each of the ascending thresholds."""
    first = torch.searchsorted(at, distances)
    return torch.bincount(first, minlength=len(at) + 1).cumsum(0)[:-1]


def _shares(accepted: Tensor, wrong: Tensor, each: _Class) -> tuple[Tensor, Tensor]:
    """Sensitivity and specificity from the counts of accepted pairs of both kinds."""
    dtype = each.within.dtype
    sensitivity = accepted.to(dtype) / len(each.within)
    specificity = (each.across_count - wrong).to(dtype) / max(1, each.across_count)
    return sensitivity, specificity if each.across_count else torch.ones_like(sensitivity)


def _utility(sensitivity: Tensor, specificity: Tensor) -> Tensor:
    total = sensitivity + specificity
    return 2 * sensitivity * specificity / torch.where(total > 0, total, 1.0)


def _exact_variance(gallery: _Gallery, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the range of the variance and of the mean of the utilities.

    The squares are integrated class by class. For the square of the mean each class adds, at each
    of its distances, the change of its utility; sorted together and summed up they are the sum over
    classes between any two distances.
    """
    total, squares, sums = torch.zeros(3, dtype=low.dtype, device=low.device)
    places, changes = [], []
    for each in gallery.classes():
        place, utility = _steps(each, low, high)
        width = torch.cat((place, high[None])).diff()
        squares = squares + width @ utility.square()
        sums = sums + width @ utility
        total = total + utility[0]
        places.append(place[1:])
        changes.append(utility.diff())
    count, span = len(places), high - low
    mean = sums / (count * span)
    if count == 1:
        return torch.zeros_like(mean), mean
    place, order = torch.cat(places).sort()
    places.clear()
    change = torch.cat(changes)[order]
    changes.clear()
    change = torch.cat((total[None], change)).cumsum_(0).square_()
    mean_square = torch.cat((low[None], place, high[None])).diff() @ change / (count**2 * span)
    return (squares / (count * span) - mean_square).clamp(min=0), mean


def _steps(each: _Class, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Where the utility of a class changes, from ``low`` on, and its value from there on."""
    inside, below = [], []
    for squared in (each.within, each.across):
        near = squared[squared < high.square() * (1 + _ROUNDING)].sqrt_()
        inside.append(near[(near > low) & (near < high)])
        below.append((near <= low).sum())
    place, order = torch.cat(inside).sort()
    is_within = order < len(inside[0])
    accepted, wrong = (
        torch.cat((start[None], start + steps.cumsum(0)))
        for start, steps in zip(below, (is_within, ~is_within), strict=True)
    )
    return torch.cat((low[None], place)), _utility(*_shares(accepted, wrong, each))


def check_settings(
    far_range: tuple[float, float],
    threshold_range: tuple[float | Tensor, float | Tensor] | None,
    grid: int | None,
) -> list[float] | None:
    """Check the settings of :func:`opis`; return the ends of ``threshold_range``."""
    if grid is not None:
        check_count("grid", grid, at_least=2)
    if threshold_range is None:
        check_pair("far_range", far_range)
        check_range("far_range[0]", far_range[0], at_least=0.0, at_most=1.0)
        check_range("far_range[1]", far_range[1], above=far_range[0], at_most=1.0)
        return None
    check_pair("threshold_range", threshold_range)
    try:
        ends = [float(end) for end in threshold_range]
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"threshold_range must be two numbers, got {threshold_range!r:.60}"
        ) from None
    check_range("threshold_range[0]", ends[0], at_least=0.0)
    check_range("threshold_range[1]", ends[1], above=ends[0])
    return ends


def _threshold_range(
    gallery: _Gallery,
    far_range: tuple[float, float],
    ends: list[float] | None,
) -> tuple[Tensor, Tensor]:
    if ends is None:
        if len(gallery.bounds) < 3:
            raise ValueError(
                "labels must give two classes at least two items each, got one such class; "
                "threshold_range would do without pairs between classes"
            )
        low, high = _negative_quantiles(gallery, far_range)
        if not bool(low < high):
            raise ValueError(
                "far_range must span different distances of embeddings, "
                f"got {float(low)} for both ends; pass threshold_range"
            )
        return low, high
    return gallery.unit.new_tensor(ends[0]), gallery.unit.new_tensor(ends[1])


def _negative_quantiles(gallery: _Gallery, rates: tuple[float, float]) -> list[Tensor]:
    """Linear quantiles of the distances between classes, without holding them all.

    A first pass counts them in bins; a second sorts the bins that hold the neighbours of each.
    """
    bins = torch.zeros(_BINS + 1, dtype=torch.long, device=gallery.unit.device)
    for block in gallery.negative_blocks():
        bins += torch.bincount(_bin(block), minlength=_BINS + 1)
    below = bins.cumsum(0)
    count = int(below[-1])
    ranks = [rate * (count - 1) for rate in rates]
    ends = torch.tensor([[int(rank), min(int(rank) + 1, count - 1)] for rank in ranks])
    bounds = torch.searchsorted(below, ends.to(below.device), right=True).tolist()
    picked: list[list[Tensor]] = [[] for _ in rates]
    for block in gallery.negative_blocks():
        for kept, (first, last) in zip(picked, bounds, strict=True):
            edges = 2 * first / _BINS * (1 - _ROUNDING), 2 * (last + 1) / _BINS * (1 + _ROUNDING)
            near = block[(block >= edges[0]) & (block <= edges[1])]
            at = _bin(near)
            kept.append(near[(at >= first) & (at <= last)])
    found = []
    for rank, kept, (first, _), pair in zip(ranks, picked, bounds, ends, strict=True):
        offset = int(below[first - 1]) if first else 0
        left, right = torch.cat(kept).sort().values[pair.to(below.device) - offset]
        found.append(torch.lerp(left, right, rank - int(rank)))
    return found


def _bin(distances: Tensor) -> Tensor:
    return (distances * (_BINS / 2)).long().clamp(max=_BINS)
