"""Optimal bins against all partitions, and against a solver of a peer."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.tabular import optimal_bins, woe_table


def best_of_all(good, bad, apart, *, max_bins, share, trend, smoothing):
    """Largest IV over all partitions, by enumeration."""
    size, rows, best = len(good), good.sum() + bad.sum() + apart.sum(), -np.inf
    for number in range(min(max_bins, size)):
        for inner in itertools.combinations(range(1, size), number):
            first = [0, *inner]
            g, b = np.add.reduceat(good, first), np.add.reduceat(bad, first)
            odds = (g + smoothing) / (b + smoothing) if smoothing or b.all() else None
            if number and (
                (g + b < share * rows).any()
                or odds is None
                or (smoothing == 0 and (g == 0).any())
                or (trend == "increasing" and (np.diff(odds) < 0).any())
                or (trend == "decreasing" and (np.diff(odds) > 0).any())
            ):
                continue
            whole = [np.append(c, extra) for c, extra in ((g, apart[:, 0]), (b, apart[:, 1]))]
            best = max(best, woe_table(*whole, smoothing=smoothing).iv)
    return best


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31))
def test_the_optimum_is_that_of_all_partitions(seed):
    random = np.random.default_rng(seed)
    size = random.integers(1, 9)
    good, bad = random.integers(0, 15, size), random.integers(0, 6, size)
    good[0], bad[0] = good[0] + 1, bad[0] + 1
    apart = random.integers(1, 9, (random.integers(0, 3), 2))
    setting = {
        "max_bins": int(random.integers(1, 6)),
        "smoothing": float(random.choice([0, 0.5])),
    }
    share, trend = random.choice([0, 0.1, 0.25]), random.choice([None, "increasing", "decreasing"])
    found = optimal_bins(good, bad, apart=apart, min_bin_share=share, monotonic=trend, **setting)
    expected = best_of_all(good, bad, apart, share=share, trend=trend, **setting)
    assert found.iv == pytest.approx(expected, abs=1e-11)
    # what is reported belongs to the edges
    first = found.edges[:-1]
    g, b = np.add.reduceat(good, first), np.add.reduceat(bad, first)
    whole = [np.append(c, extra) for c, extra in ((g, apart[:, 0]), (b, apart[:, 1]))]
    table = woe_table(*whole, smoothing=setting["smoothing"])
    assert found.iv == pytest.approx(table.iv, abs=1e-11)
    np.testing.assert_allclose(found.woe, table.woe[: len(g)], atol=1e-11)
    if trend is not None:
        step = np.diff(found.woe) * (1 if trend == "increasing" else -1)
        assert (step >= -1e-12).all()


def test_auto_is_the_better_direction():
    random = np.random.default_rng(0)
    good, bad = random.integers(1, 50, 12), random.integers(1, 50, 12)
    each = {t: optimal_bins(good, bad, monotonic=t).iv for t in ("increasing", "decreasing")}
    found = optimal_bins(good, bad, monotonic="auto")
    assert found.iv == max(each.values())
    assert found.trend == max(each, key=each.get)


def test_value_by_number_of_bins_rises_without_constraints():
    random = np.random.default_rng(1)
    good, bad = random.integers(1, 50, 12), random.integers(1, 50, 12)
    found = optimal_bins(good, bad, max_bins=12)
    assert (np.diff(found.iv_by_bins) > 0).all()
    assert found.iv_by_bins[-1] == pytest.approx(woe_table(good, bad).iv)
    assert found.iv_by_bins[0] == pytest.approx(0, abs=1e-12)


def test_equal_neighbours_are_monotone_and_one_bin_when_nothing_is_lost():
    assert optimal_bins([10, 20, 30], [1, 2, 3], monotonic="decreasing").edges.tolist() == [0, 3]


def test_one_hundred_pre_bins_are_proved_in_a_tenth_of_a_second():
    random = np.random.default_rng(0)
    good, bad = random.integers(500, 900, 100), random.integers(50, 400, 100)
    best = np.inf
    for _ in range(5):
        begin = time.process_time()
        optimal_bins(good, bad, max_bins=10, min_bin_share=0.05, monotonic="auto", smoothing=0.5)
        best = min(best, time.process_time() - begin)
    assert best < 0.1


def test_never_below_the_solver_of_optbinning():
    optbinning = pytest.importorskip("optbinning")
    random = np.random.default_rng(0)
    x = random.normal(size=4000)
    y = (random.random(4000) < 1 / (1 + np.exp(1 - np.abs(x)))).astype(int)
    for trend in ("ascending", "descending"):
        peer = optbinning.OptimalBinning(
            dtype="numerical", monotonic_trend=trend, max_n_bins=5, max_n_prebins=15
        ).fit(x, y)
        pre = optbinning.OptimalBinning(
            dtype="numerical",
            monotonic_trend=None,
            max_n_prebins=15,
            min_bin_size=None,
        ).fit(x, y)
        fine = np.searchsorted(np.union1d(pre.splits, peer.splits), x, side="right")
        good, bad = np.bincount(fine, 1 - y), np.bincount(fine, y)
        direction = "decreasing" if trend == "ascending" else "increasing"  # of the event rate
        table = peer.binning_table
        table.build()
        ours = optimal_bins(good, bad, max_bins=5, min_bin_share=0.05, monotonic=direction)
        assert ours.iv >= table.iv - 1e-9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"good": [0, 0]}, "both hold rows"),
        ({"good": [0, 0], "apart": [[1, 1]]}, "good is 0 in every pre-bin"),
        ({"good": [1, -1]}, "good must be finite"),
        ({"bad": [1]}, "one shape"),
        ({"max_bins": 0}, "max_bins"),
        ({"min_bin_share": 1.5}, "min_bin_share"),
        ({"monotonic": "up"}, "monotonic"),
        ({"apart": [[1, 0]]}, "apart is empty"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        optimal_bins(**{"good": [3, 4], "bad": [1, 2], **change})
