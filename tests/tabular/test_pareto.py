"""The frontier against all partitions."""

import itertools

import numpy as np
import pytest

from steelyard.tabular import fairness_probability, iv_inference, pareto_front, psi


def best_of_all(counts, epsilon, *, max_bins, monotonic):
    size, best = len(counts), 0.0
    for number in range(1, min(max_bins, size)):
        for inner in itertools.combinations(range(1, size), number):
            table = np.add.reduceat(counts, [0, *inner])
            if (table == 0).any():
                continue
            if monotonic and (np.diff(table[:, 0] / table[:, 1]) < 0).any():
                continue
            if psi(table[:, 2], table[:, 3]) <= epsilon + 1e-13:
                best = max(best, psi(table[:, 0], table[:, 1]))
    return best


@pytest.mark.parametrize("seed", range(12))
def test_every_point_is_the_best_of_all_partitions(seed):
    random = np.random.default_rng(seed)
    counts = random.integers(0, 30, (random.integers(2, 11), 4))
    counts[0] += 1
    if seed % 2:  # a useful variable: goods towards the end
        counts = counts[np.argsort(counts[:, 0] / (counts[:, 1] + 0.5))]
    setting = {"max_bins": int(random.integers(2, 6)), "monotonic": bool(seed % 3)}
    grid = [0.0, 0.01, 0.05, 0.2, 1.0]
    points = pareto_front(counts, fairness_grid=grid, **setting)
    for epsilon, point in zip(grid, points, strict=True):
        assert point.epsilon == epsilon
        assert point.iv_perf == pytest.approx(best_of_all(counts, epsilon, **setting), abs=1e-9)
        assert point.iv_fair <= epsilon * (1 + 1e-12)
    assert (np.diff([point.iv_perf for point in points]) >= -1e-12).all()


def test_reported_values_belong_to_the_edges():
    counts = np.array([[20, 30, 20, 30], [30, 20, 25, 25], [40, 10, 40, 10], [45, 5, 28, 22]])
    (point,) = pareto_front(counts, fairness_grid=[0.2])
    table = np.add.reduceat(counts, point.edges[:-1])
    assert point.edges[0] == 0
    assert point.edges[-1] == 4
    performance, fair = iv_inference(*table.T[:2]), iv_inference(*table.T[2:])
    assert point.iv_perf == pytest.approx(performance.iv, abs=1e-12)
    assert point.iv_fair == pytest.approx(fair.iv, abs=1e-12)
    assert point.iv_perf_standard_error == pytest.approx(performance.standard_error)
    assert point.iv_fair_standard_error == pytest.approx(fair.standard_error)
    assert point.fair_probability == fairness_probability(fair.iv, fair.standard_error, 0.2)


def test_budget_zero_leaves_one_bin_although_the_solver_would_accept_two():
    # shares that differ by 1e-4: a disparity of 1e-7, within the solver's tolerance
    counts = [[3000, 7000, 5001, 5000], [7000, 3000, 5000, 5001]]
    point = pareto_front(counts, fairness_grid=[0.0])[0]
    assert 0 < psi([5001, 5000], [5000, 5001]) < 1e-7
    assert point.edges == (0, 2)


def test_budget_zero_keeps_bins_of_exactly_equal_shares():
    counts = [[10, 30, 7, 21], [20, 20, 3, 9], [30, 10, 11, 33]]
    point = pareto_front(counts, fairness_grid=[0.0])[0]
    assert point.edges == (0, 1, 2, 3)
    assert point.iv_fair == 0.0


def test_the_frontier_does_not_depend_on_the_order_of_the_grid():
    counts = np.random.default_rng(5).integers(5, 30, (9, 4))
    there = pareto_front(counts, fairness_grid=[0.01, 0.3], monotonic=False)
    back = pareto_front(counts, fairness_grid=[0.3, 0.01], monotonic=False)
    assert there == back[::-1]


def test_minimum_share_is_kept():
    counts = np.random.default_rng(6).integers(5, 30, (9, 4))
    point = pareto_front(counts, fairness_grid=[1.0], monotonic=False, min_bin_share=0.3)[0]
    rows = np.add.reduceat(counts[:, :2].sum(1), point.edges[:-1])
    assert len(rows) > 1
    assert (rows >= 0.3 * counts[:, :2].sum()).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_bins": [[1, 2, 3]]}, r"shape \[m, 4\]"),
        ({"pre_bins": [[1, 2, 3, -1]]}, "finite"),
        ({"pre_bins": [[1, 2, 3, 0]]}, "protected"),
        ({"fairness_grid": [-0.1]}, "fairness_grid"),
        ({"max_bins": 0}, "max_bins"),
        ({"min_bin_share": -1}, "min_bin_share"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        pareto_front(**{"pre_bins": [[1, 2, 3, 4], [4, 3, 2, 1]], "fairness_grid": [1], **change})
