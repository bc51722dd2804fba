r"""The exact frontier between predictive value and disparity of one binned variable or score.

Both information values are sums over bins, so choosing bins under a fairness budget is a linear
problem in 0/1 variables, one for each interval of pre-bins. HiGHS solves it to proved optimality.

Source: Sudjianto, Burakov (2025), Sec. 6 and 8, arXiv:2509.09855, state the trade-off; the program
is our own.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, sparse

from steelyard._checks import check_count, check_range
from steelyard.tabular._columns import as_numbers
from steelyard.tabular.disparity import fairness_probability
from steelyard.tabular.optimal_binning import interval_sums
from steelyard.tabular.tables import iv_and_variance

__all__ = ["ParetoPoint", "pareto_front"]

Array = NDArray[np.float64]
_SCALE = 1e6  # HiGHS accepts rows violated by 1e-6 and gaps of 1e-6: both are made irrelevant


@dataclass(frozen=True)
class ParetoPoint:
    """One point of :func:`pareto_front`: the best bins within a budget.

    Standard errors are those of the delta method for these bins; ``fair_probability`` is the
    probability that the true disparity is within ``epsilon``. All are optimistic if the pre-bins
    are counts of the rows on which the bins are then used.
    """

    epsilon: float
    iv_perf: float
    iv_fair: float
    edges: tuple[int, ...]
    iv_perf_standard_error: float
    iv_fair_standard_error: float
    fair_probability: float


@dataclass(frozen=True)
class _Intervals:
    """Candidate bins ``(start, end]`` and what each adds."""

    start: NDArray[np.int64]
    end: NDArray[np.int64]
    performance: Array
    unfairness: Array
    odds: Array
    size: int


def pareto_front(
    pre_bins: ArrayLike,
    *,
    fairness_grid: ArrayLike,
    max_bins: int | None = None,
    monotonic: bool = True,
    min_bin_share: float = 0.0,
) -> list[ParetoPoint]:
    r"""Find, for each budget, the bins that predict most while the groups differ least.

    .. math::
        \max_{\text{bins}} \mathrm{IV}(\text{good}, \text{bad}) \quad \text{subject to} \quad
        \mathrm{IV}(\text{reference}, \text{protected}) \le \varepsilon

    over partitions of the pre-bins into at most ``max_bins`` intervals, with WoE that does not fall
    if ``monotonic``. Every point is a proved optimum, checked against the budget in exact terms
    after the solver's tolerance. Pre-bins of a score
    (:func:`score_pre_bins`) give the frontier of a whole model.

    Args:
        pre_bins: counts per pre-bin in order, ``[m, 4]``: good, bad, reference group, protected
            group. 10 to 30 pre-bins are solved in a moment.
        fairness_grid: budgets, each >= 0, in nats.
        max_bins: largest number of bins; ``None`` = m.
        monotonic: WoE (good over bad) does not decrease from one bin to the next. Reverse the
            rows for the other direction.
        min_bin_share: smallest share of the rows in a bin, in [0, 1].

    Returns:
        One :class:`ParetoPoint` for each budget, in the given order; ``edges`` run from 0 to m. A
        bin with an empty cell is never used. One bin for all is always within the budget.

    Raises:
        TypeError: not numbers.
        ValueError: wrong shape, negative counts, an absent class or group, or a setting out of
            range.
        RuntimeError: the solver gave up.

    Example:
        The best bins also separate the groups. Other bins keep much of the value without that:

        >>> counts = [[20, 30, 20, 30], [30, 20, 25, 25], [40, 10, 40, 10], [45, 5, 28, 22]]
        >>> for point in pareto_front(counts, fairness_grid=[0.0, 0.01, 0.2, 0.3], max_bins=3):
        ...     print(point.edges, round(point.iv_perf, 3), round(point.iv_fair, 4))
        (0, 4) 0.0 0.0
        (0, 3, 4) 0.459 0.0001
        (0, 1, 3, 4) 0.739 0.1739
        (0, 1, 2, 4) 0.784 0.2444

    Source: the frontier of Sudjianto, Burakov (2025), Sec. 6.3 and 8, arXiv:2509.09855, for one
    variable, as an exact program.
    """
    counts = _check_pre_bins(pre_bins)
    grid = np.atleast_1d(as_numbers("fairness_grid", fairness_grid))
    if grid.ndim != 1 or not np.isfinite(grid).all() or (grid < 0).any():
        raise ValueError(f"fairness_grid must be finite and >= 0, got {grid.tolist()}")
    most = len(counts) if max_bins is None else max_bins
    check_count("max_bins", most)
    check_range("min_bin_share", min_bin_share, at_least=0.0, at_most=1.0)
    intervals = _intervals(counts, min_bin_share)
    rows = [_cover_rows(intervals)]
    if monotonic:
        rows.append(_order_rows(intervals))
    return [_point(intervals, rows, counts, float(epsilon), most) for epsilon in grid]


def _check_pre_bins(pre_bins: ArrayLike) -> Array:
    counts = as_numbers("pre_bins", pre_bins)
    if counts.ndim != 2 or counts.shape[1] != 4 or not len(counts):
        raise ValueError(f"pre_bins must have shape [m, 4], m >= 1, got {list(counts.shape)}")
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError("pre_bins must be finite and >= 0")
    columns = ("good", "bad", "reference", "protected")
    for name, total in zip(columns, counts.sum(0), strict=True):
        if total == 0:
            raise ValueError(f"pre_bins must hold rows of every kind, got none in column {name!r}")
    return counts


def _intervals(counts: Array, min_bin_share: float) -> _Intervals:
    good, bad, reference, protected = (interval_sums(column) for column in counts.T)
    allowed = np.triu(np.ones_like(good, dtype=bool), 1)
    for table in (good, bad, reference, protected):
        allowed &= table > 0
    rows = good + bad
    allowed &= rows >= min_bin_share * rows[0, -1] * (1 - 1e-12)
    allowed[0, -1] = True
    start, end = np.nonzero(allowed)
    return _Intervals(
        start=start,
        end=end,
        performance=_terms(good, bad)[start, end],
        unfairness=_terms(reference, protected)[start, end],
        odds=good[start, end] / bad[start, end],
        size=len(counts),
    )


def _terms(first: Array, second: Array) -> Array:
    """Jeffreys term of every interval, exactly 0 where the shares are equal fractions."""
    n_first, n_second = first[0, -1], second[0, -1]
    p, q = first / n_first, second / n_second
    with np.errstate(divide="ignore", invalid="ignore"):
        terms: Array = (p - q) * (np.log(first) - np.log(second) - math.log(n_first / n_second))
    return np.where(first * n_second == second * n_first, 0.0, terms)


def _cover_rows(intervals: _Intervals) -> optimize.LinearConstraint:
    """Each pre-bin lies in exactly one bin: flow of one unit from border 0 to border m."""
    number = np.arange(len(intervals.start))
    ones = np.ones(len(number))
    flow = sparse.coo_array(
        (
            np.concatenate([ones, -ones]),
            (np.concatenate([intervals.start, intervals.end]), np.concatenate([number, number])),
        ),
        shape=(intervals.size + 1, len(number)),
    )
    supply = np.zeros(intervals.size + 1)
    supply[0], supply[-1] = 1.0, -1.0
    return optimize.LinearConstraint(flow.tocsr(), supply, supply)


def _order_rows(intervals: _Intervals) -> optimize.LinearConstraint:
    """No fall of the odds at a border.

    At most one bin ends at a border and one begins there, so all that end with odds >= t and all
    that begin with odds < t exclude each other: one row for each t, tighter than one for each pair.
    """
    row, column, rows = [], [], 0
    for border in range(1, intervals.size):
        ending = np.flatnonzero(intervals.end == border)
        beginning = np.flatnonzero(intervals.start == border)
        for level in np.unique(intervals.odds[ending]):
            lower = beginning[intervals.odds[beginning] < level]
            if not len(lower):
                continue
            members = np.concatenate([ending[intervals.odds[ending] >= level], lower])
            row.append(np.full(len(members), rows))
            column.append(members)
            rows += 1
    if not rows:
        return optimize.LinearConstraint(np.zeros((1, len(intervals.start))), 0.0, 1.0)
    place = (np.concatenate(row), np.concatenate(column))
    matrix = sparse.csr_array((np.ones(len(place[0])), place), shape=(rows, len(intervals.start)))
    return optimize.LinearConstraint(matrix, -np.inf, 1.0)


def _point(
    intervals: _Intervals,
    rows: list[optimize.LinearConstraint],
    counts: Array,
    epsilon: float,
    max_bins: int,
) -> ParetoPoint:
    number = len(intervals.start)
    fair = sparse.csr_array(_SCALE * intervals.unfairness[None, :])
    few = np.ones((1, number))
    constraints = [
        *rows,
        optimize.LinearConstraint(fair, -np.inf, _SCALE * epsilon),
        optimize.LinearConstraint(few, -np.inf, max_bins),
    ]
    gain = -_SCALE * intervals.performance
    # bins that alone break the budget are out: the tolerance cannot let them in
    upper = (intervals.unfairness <= epsilon * (1 + 1e-12)).astype(np.float64)
    while True:
        solution = optimize.milp(
            gain,
            integrality=np.ones(number),
            bounds=optimize.Bounds(0, upper),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
        if solution.x is None or solution.status != 0:
            raise RuntimeError(f"the solver stopped at budget {epsilon}: {solution.message}")
        chosen = solution.x > 0.5
        unfairness = float(intervals.unfairness[chosen].sum())
        if unfairness <= epsilon * (1 + 1e-12):
            break
        # within the solver's tolerance but not within the budget: forbid this partition
        cut = chosen.astype(np.float64)[None, :]
        constraints.append(optimize.LinearConstraint(cut, -np.inf, chosen.sum() - 1))
    edges = (0, *np.sort(intervals.end[chosen]).tolist())
    merged = np.add.reduceat(counts, edges[:-1], axis=0)
    _, performance_variance = iv_and_variance(merged[:, 0], merged[:, 1])
    _, fair_variance = iv_and_variance(merged[:, 2], merged[:, 3])
    fair_error = math.sqrt(fair_variance)
    return ParetoPoint(
        epsilon=epsilon,
        iv_perf=float(intervals.performance[chosen].sum()),
        iv_fair=unfairness,
        edges=edges,
        iv_perf_standard_error=math.sqrt(performance_variance),
        iv_fair_standard_error=fair_error,
        fair_probability=fairness_probability(max(unfairness, 0.0), fair_error, epsilon),
    )
