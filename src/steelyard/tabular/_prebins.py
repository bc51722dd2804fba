"""Ordered pre-bins of one column with their goods and bads, and how they are joined to bins.

The columns of a table in memory and those counted by a database meet here: both are counts.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steelyard._extras import require
from steelyard.tabular.optimal_binning import Trend, optimal_bins

__all__ = [
    "BinningRule",
    "PreBins",
    "SortedNumbers",
    "count_levels",
    "final_bins",
    "level_prebins",
    "quantile_cuts",
    "stump_borders",
]

Array = NDArray[np.float64]
Integers = NDArray[np.int64]
_FINE = 8000  # resolution at which optimal bins are refined
_LEAVES = 20  # supervised candidates for them


@dataclass(frozen=True)
class PreBins:
    """Candidates in order: numeric with ``cuts`` ``[m - 1]``, or groups of ``levels`` ``[m]``."""

    good: Array
    bad: Array
    cuts: Array
    levels: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class BinningRule:
    """Settings that decide which pre-bins are joined."""

    method: str
    max_bins: int | None
    smoothing: float
    monotonic: Trend | None
    min_bin_share: float
    max_prebins: int
    num_rounds: int
    learning_rate: float

    def candidates(self) -> int:
        """Return how many pre-bins to start from."""
        if self.method == "quantile" and self.max_bins is not None:
            return self.max_bins
        return max(self.max_prebins, _FINE) if self.method == "optimal" else self.max_prebins


class SortedNumbers:
    """Sorted values of a column that count goods and bads between any cuts.

    Two sorts, of all values and of those of the bads: no value is ever assigned to a bin.
    """

    def __init__(self, values: Array, bad: Array, weight: Array | None) -> None:
        self.cumulative: Array | None = None
        if weight is None:
            self.every, self.of_bad = np.sort(values), np.sort(values[bad > 0])
        else:
            order = np.argsort(values)
            self.every, self.of_bad = values[order], np.empty(0)
            self.cumulative = np.cumsum(weight[order])
            self.cumulative_bad = np.cumsum((weight * bad)[order])

    def quantile_prebins(self, number: int) -> PreBins:
        """Count between quantiles."""
        if not len(self.every):
            return PreBins(np.empty(0), np.empty(0), np.empty(0), ())
        return self.count(quantile_cuts(self.every, number, cumulative=self.cumulative))

    def count(self, cuts: Array) -> PreBins:
        """Count goods and bads between cuts."""
        ends = np.append(cuts, np.inf)
        place = np.searchsorted(self.every, ends, side="right")
        if self.cumulative is None:
            below = place.astype(np.float64)
            below_bad = np.searchsorted(self.of_bad, ends, side="right").astype(np.float64)
        else:
            below = np.append(0.0, self.cumulative)[place]
            below_bad = np.append(0.0, self.cumulative_bad)[place]
        rows, bads = np.diff(below, prepend=0.0), np.diff(below_bad, prepend=0.0)
        return PreBins(np.maximum(rows - bads, 0.0), np.maximum(bads, 0.0), cuts, ())

    def cuts_near(self, cuts: Array, reach: int, step: int) -> Array:
        """Return the cuts and others up to ``reach`` rows away."""
        place = np.searchsorted(self.every, cuts, side="right")[:, None]
        near = np.unique(place + np.append(np.arange(-reach, reach + 1, step), 0))
        near = near[(near > 0) & (near < len(self.every))]
        return _between(self.every[near - 1], self.every[near])


def _between(left: Array, right: Array) -> Array:
    """Half-way cuts of different neighbours, rounded so that they part them."""
    left, right = left[left < right], right[left < right]
    middle = left / 2 + right / 2
    return np.where((middle >= right) | (middle < left), left, middle)


def quantile_cuts(ordered: Array, number: int, *, cumulative: Array | None = None) -> Array:
    """Return cuts half-way between neighbouring values near the quantiles of sorted values.

    All neighbouring values are separated if there are no more than ``number`` distinct ones.
    """
    steps = np.flatnonzero(ordered[1:] > ordered[:-1])
    if len(steps) >= number:
        if cumulative is None:
            targets = len(ordered) * np.arange(1, number) / number
            place = np.ceil(targets - 1e-9).astype(np.int64) - 1
        else:
            targets = cumulative[-1] * np.arange(1, number) / number
            place = np.searchsorted(cumulative, targets * (1 - 1e-12), side="left")
        edges = ordered[place]
        edges = edges[np.append(True, edges[1:] > edges[:-1])]
        last = np.searchsorted(ordered, edges, side="right") - 1
        steps = last[last < len(ordered) - 1]
    return _between(ordered[steps], ordered[steps + 1])


def count_levels(
    values: NDArray[Any], bad: Array, weight: Array | None
) -> tuple[list[Any], Array, Array]:
    """Count goods and bads of each level, in the order of their first appearance."""
    places: dict[Any, int] = {}
    codes = np.array([places.setdefault(v, len(places)) for v in values.tolist()], dtype=np.int64)
    rows = np.bincount(codes, weight, minlength=len(places)).astype(np.float64)
    weighted = bad if weight is None else weight * bad
    bads = np.bincount(codes, weighted, minlength=len(places)).astype(np.float64)
    return list(places), np.maximum(rows - bads, 0.0), bads


def level_prebins(
    levels: Sequence[Any], good: Array, bad: Array, *, smoothing: float, number: int
) -> PreBins:
    """Order levels by their share of goods; the best groups are then neighbours.

    Beyond ``number`` levels, neighbours in that order are joined first.
    """
    if not levels:
        return PreBins(np.empty(0), np.empty(0), np.empty(0), ())
    share = (good + smoothing) / (good + bad + 2 * smoothing)
    order = np.argsort(share, kind="stable")
    rows = (good + bad)[order]
    first = _equal_groups(rows, number) if len(levels) > number else np.arange(len(levels))
    names = [levels[i] for i in order]
    groups = [tuple(names[a:b]) for a, b in zip(first, [*first[1:], len(names)], strict=True)]
    goods, bads = (np.add.reduceat(count[order], first) for count in (good, bad))
    return PreBins(goods, bads, np.empty(0), tuple(groups))


def _equal_groups(rows: Array, number: int) -> Integers:
    """Return the first items of groups of neighbours with about the same number of rows."""
    middle = np.cumsum(rows) - rows / 2
    group = np.minimum((middle / rows.sum() * number).astype(np.int64), number - 1)
    return np.flatnonzero(np.diff(group, prepend=-1))


def stump_borders(good: Array, bad: Array, *, num_rounds: int, learning_rate: float) -> Integers:
    """Return the borders at which boosted stumps split pre-bins, sorted, each in 1 .. m - 1.

    Depth-1 trees of one feature see only counts per pre-bin, so two weighted rows per pre-bin
    train the ensemble that all the rows would.
    """
    xgboost = require("xgboost", extra="tabular")
    place = np.repeat(np.arange(len(good), dtype=np.float32), 2)[:, None]
    label = np.tile([0.0, 1.0], len(good))
    weight = np.stack([good, bad], axis=1).ravel()
    kept = weight > 0
    data = xgboost.DMatrix(place[kept], label=label[kept], weight=weight[kept], nthread=1)
    settings = {
        "objective": "binary:logistic",
        "max_depth": 1,
        "eta": learning_rate,
        "lambda": 1.0,
        "min_child_weight": 0.0,
        "base_score": float(bad.sum() / (good.sum() + bad.sum())),
        "tree_method": "exact",
        "nthread": 1,
        "seed": 0,
    }
    model = xgboost.train(settings, data, num_boost_round=num_rounds)
    splits = set()
    for line in "".join(model.get_dump()).splitlines():
        if "[" in line:
            splits.add(int(np.ceil(float(line.partition("<")[2].partition("]")[0]))))
    return np.array(sorted(splits), dtype=np.int64)


def final_bins(
    pre: PreBins, apart: Array, rule: BinningRule, numbers: SortedNumbers | None = None
) -> PreBins:
    """Join pre-bins by the rule; ``numbers`` let optimal cuts move to any row."""
    size, rows = len(pre.good), pre.good + pre.bad
    if rule.method == "optimal":
        least = rule.min_bin_share * (rows.sum() + apart.sum())
        if size <= rule.max_prebins:
            return _best_of(pre, apart, rule)
        leaves = _tree_borders(pre.good, pre.bad, least)
        quantiles = _equal_groups(rows, rule.max_prebins)
        found = _best_of(_join(pre, np.unique([0, *quantiles, *leaves, size])), apart, rule)
        return found if numbers is None else _moved(found, apart, rule, numbers)
    borders = np.arange(size + 1)
    if rule.method == "xgboost":
        inner: list[int] = []
        if size > 1 and pre.good.sum() > 0 and pre.bad.sum() > 0:
            inner = stump_borders(
                pre.good, pre.bad, num_rounds=rule.num_rounds, learning_rate=rule.learning_rate
            ).tolist()
        borders = np.array([0, *inner, size], dtype=np.int64)
    elif rule.max_bins is not None and size > rule.max_bins:
        borders = np.append(_equal_groups(rows, rule.max_bins), size)
    joined = _join(pre, borders)
    rows = joined.good + joined.bad
    short = rows.min() < rule.min_bin_share * (rows.sum() + apart.sum()) * (1 - 1e-12)
    many = rule.max_bins is not None and len(rows) > rule.max_bins
    return _best_of(joined, apart, rule) if short or many or rule.monotonic else joined


def _join(pre: PreBins, borders: Integers) -> PreBins:
    good, bad = (np.add.reduceat(count, borders[:-1]) for count in (pre.good, pre.bad))
    cuts = pre.cuts[borders[1:-1] - 1] if len(pre.cuts) else pre.cuts
    groups = itertools.pairwise(borders.tolist())
    levels = tuple(sum(pre.levels[a:b], ()) for a, b in groups) if pre.levels else ()
    return PreBins(good, bad, cuts, levels)


def _best_of(pre: PreBins, apart: Array, rule: BinningRule) -> PreBins:
    """Choose the best of the borders, exactly."""
    best = optimal_bins(
        pre.good,
        pre.bad,
        max_bins=len(pre.good) if rule.max_bins is None else rule.max_bins,
        min_bin_share=rule.min_bin_share,
        monotonic=rule.monotonic,
        smoothing=rule.smoothing,
        apart=apart,
    )
    return _join(pre, best.edges)


def _moved(found: PreBins, apart: Array, rule: BinningRule, numbers: SortedNumbers) -> PreBins:
    """Move the cuts row by row.

    Each step is exact over its candidates and these hold the last choice: it never gets worse.
    """
    reach = 2 * len(numbers.every) // rule.max_prebins
    while reach > 0 and len(found.cuts):
        step = max(1, reach // 8)
        cuts = numbers.cuts_near(found.cuts, reach, step)
        found = _best_of(numbers.count(cuts), apart, rule)
        reach = step if step > 1 else 0
    return found


def _tree_borders(good: Array, bad: Array, least: float) -> list[int]:
    """Return the borders of the leaves of a classification tree, best split first."""
    before_good, before_bad = (np.concatenate([[0.0], np.cumsum(c)]) for c in (good, bad))
    open_leaves = [(0, len(good), *_split(before_good, before_bad, 0, len(good), least))]
    borders: list[int] = []
    while open_leaves and len(borders) < _LEAVES - 1:
        open_leaves.sort(key=lambda leaf: leaf[2])
        start, end, gain, middle = open_leaves.pop()
        if gain <= 0:
            break
        borders.append(middle)
        for a, b in ((start, middle), (middle, end)):
            open_leaves.append((a, b, *_split(before_good, before_bad, a, b, least)))
    return borders


def _split(
    before_good: Array, before_bad: Array, start: int, end: int, least: float
) -> tuple[float, int]:
    """Return the largest fall of the Gini impurity in (start, end] and where it is."""
    place = np.arange(start + 1, end)
    if not len(place):
        return 0.0, start
    left = [before[place] - before[start] for before in (before_good, before_bad)]
    right = [before[end] - before[place] for before in (before_good, before_bad)]
    whole = [before[end] - before[start] for before in (before_good, before_bad)]
    enough = (left[0] + left[1] >= least) & (right[0] + right[1] >= least)
    sides = [2 * g * b / np.maximum(g + b, 1e-300) for g, b in (left, right, whole)]
    gain = np.where(enough, sides[2] - sides[0] - sides[1], 0.0)
    best = int(gain.argmax())
    return float(gain[best]), int(place[best])
