"""Scorecards: the points, the encodings, the constraints and the estimator contract."""

import json
import math

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("xgboost")

from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import parametrize_with_checks

from steelyard.tabular import Scorecard, WoEBinner, iv_inference, pareto_front, score_pre_bins
from steelyard.tabular._logistic import LogisticData, score_bin_counts, soft_iv

ENCODINGS = ("woe", "onehot", "stumps")


def data(seed: int = 0, rows: int = 4000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, outcome, and a group that the first feature gives away."""
    random = np.random.default_rng(seed)
    X = random.normal(size=(rows, 3))
    y = (random.random(rows) < 1 / (1 + np.exp(2 - 0.8 * X.sum(1)))).astype(int)
    group = (random.random(rows) < 1 / (1 + np.exp(-1.5 * X[:, 0]))).astype(int)
    return X, y, group


def known_failures(estimator):
    # XGBoost works in float32, so repeated and weighted rows agree to 1e-6 and not to 1e-7
    if estimator.encoding == "stumps":
        return {"check_sample_weight_equivalence_on_dense_data": "float32"}
    return {}


@parametrize_with_checks(
    [Scorecard(encoding=encoding) for encoding in ENCODINGS],
    expected_failed_checks=known_failures,
)
def test_it_keeps_the_contract_of_an_estimator(estimator, check):
    check(estimator)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_points_add_up_and_double_the_odds(encoding):
    X, y, _ = data()
    card = Scorecard(encoding=encoding, base_points=500, base_odds=20, points_to_double=40).fit(
        X, y
    )
    codes = card.binner_.bin_indices(X)
    by_hand = sum(points[codes[:, f]] for f, points in enumerate(card.points_))
    np.testing.assert_allclose(by_hand, card.points(X), atol=1e-9)
    odds = card.predict_proba(X)
    odds = odds[:, 0] / odds[:, 1]
    np.testing.assert_allclose(card.points(X), 500 + 40 * np.log2(odds / 20), atol=1e-8)
    table = card.points_table()
    assert len(table["points"]) == sum(map(len, card.points_))
    assert table["points"] == np.concatenate(card.points_).tolist()


def test_one_column_refits_the_woe_with_slope_minus_one():
    X, y, _ = data(1)
    card = Scorecard(WoEBinner(smoothing=0.0), C=math.inf).fit(X[:, :1], y)
    assert card.coef_[0] == pytest.approx(-1.0, abs=1e-7)
    assert card.intercept_ == pytest.approx(math.log(y.sum() / (1 - y).sum()), abs=1e-7)


def test_one_hot_of_one_column_is_saturated():
    X, y, _ = data(1)
    card = Scorecard(WoEBinner(smoothing=0.0), encoding="onehot", C=math.inf).fit(X[:, :1], y)
    bins = card.binner_.columns_[0]
    log_odds = card.effects_[0] + card.intercept_
    np.testing.assert_allclose(log_odds, np.log(bins.bad / bins.good), atol=1e-6)


def test_the_three_encodings_on_shared_bins_have_nearly_equal_auc():
    X, y, _ = data(2, rows=8000)
    binner, half = WoEBinner(), 4000
    areas = [
        roc_auc_score(
            y[half:], Scorecard(binner, encoding=e).fit(X[:half], y[:half]).points(X[half:])
        )
        for e in ENCODINGS
    ]
    assert max(areas) - min(areas) < 0.02
    assert max(areas) < 0.3  # points are high for the safe


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_rebuilds_without_running_code(encoding):
    X, y, _ = data(3)
    card = Scorecard(WoEBinner(method="quantile"), encoding=encoding).fit(X, y)
    text = card.to_json()
    json.loads(text)
    again = Scorecard.from_json(text)
    np.testing.assert_array_equal(again.points(X), card.points(X))
    assert again.binner.get_params() == card.binner.get_params()
    assert again.encoding == encoding


def test_reasons_are_the_columns_that_cost_most():
    X, y, _ = data(4)
    card = Scorecard().fit(X, y)
    codes = card.binner_.bin_indices(X[:50])
    lost = np.stack([p.max() - p[codes[:, f]] for f, p in enumerate(card.points_)], axis=1)
    reasons = card.reasons(X[:50], number=5)
    assert reasons.shape == (50, 5)
    for row, names in zip(lost, reasons, strict=True):
        expected = [f"x{f}" for f in np.argsort(-row, kind="stable") if row[f] > 1e-9]
        assert names.tolist()[: len(expected)] == expected
        assert all(name is None for name in names[len(expected) :])
    mean = card.reasons(X[:50], number=1, against="mean")
    assert set(mean.ravel()) <= {"x0", "x1", "x2", None}


def test_sign_constraint_drops_a_column_that_works_against_its_own_woe():
    random = np.random.default_rng(0)
    x = random.normal(size=(6000, 1))
    X = np.concatenate([x, x + 0.3 * random.normal(size=(6000, 1))], axis=1)
    y = (random.random(6000) < 1 / (1 + np.exp(1 - 3 * X[:, 0] + 1.5 * X[:, 1]))).astype(int)
    assert Scorecard().fit(X, y).coef_.max() > 0.1
    for numerator, sign in (("good", -1), ("bad", 1)):
        binner = WoEBinner(numerator=numerator)
        held = Scorecard(binner, sign_constraint=True).fit(X, y)
        assert (sign * held.coef_ >= 0).all()


@pytest.mark.parametrize("encoding", ["woe", "onehot"])
def test_the_fairness_budget_holds_and_costs_as_little_as_it_can(encoding):
    X, y, group = data(5, rows=3000)
    binner = WoEBinner(method="quantile")
    free = Scorecard(binner, encoding=encoding).fit(X, y, sensitive=group)
    assert free.fairness_.iv > 0.3
    areas = [roc_auc_score(y, free.decision_function(X))]
    for budget in (0.2, 0.08):
        card = Scorecard(binner, encoding=encoding, fairness_budget=budget)
        card.fit(X, y, sensitive=group)
        assert 0.5 * budget < card.fairness_.iv <= budget
        areas.append(roc_auc_score(y, card.decision_function(X)))
    assert areas[0] > areas[1] > areas[2] > 0.65


def test_a_loose_budget_changes_nothing():
    X, y, group = data(5)
    tight = Scorecard(fairness_budget=5.0).fit(X, y, sensitive=group)
    np.testing.assert_allclose(tight.coef_, Scorecard().fit(X, y).coef_, atol=1e-5)


def test_a_budget_below_chance_is_an_error_that_says_so():
    X, y, group = data(6, rows=500)
    with pytest.raises(ValueError, match="expected by chance alone"):
        Scorecard(fairness_budget=0.0).fit(X, y, sensitive=group)


def test_soft_disparity_has_the_gradient_of_finite_differences_and_no_scale():
    random = np.random.default_rng(0)
    score, weight = random.normal(size=40), random.random(40) + 0.5
    group, cuts = random.random(40) < 0.4, np.array([-0.5, 0.2, 0.9])
    value, gradient = soft_iv(score, weight, group, cuts, 0.3)
    for place in range(0, 40, 7):
        step = np.zeros(40)
        step[place] = 1e-6
        ends = [soft_iv(score + s * step, weight, group, cuts, 0.3)[0] for s in (1, -1)]
        assert gradient[place] == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-7)
    assert soft_iv(7 * score - 3, weight, group, cuts, 0.3)[0] == pytest.approx(value)
    hard = soft_iv(score, weight, group, cuts, 1e-6)[0]
    code = np.searchsorted(
        cuts,
        (score - np.average(score, weights=weight))
        / np.sqrt(np.average((score - np.average(score, weights=weight)) ** 2, weights=weight)),
    )
    shares = [np.bincount(code, weight * m, minlength=4) for m in (~group, group)]
    assert hard == pytest.approx(iv_inference(*shares).iv, abs=1e-5)


def test_the_log_loss_has_the_gradient_of_finite_differences():
    random = np.random.default_rng(1)
    problem = LogisticData(
        random.normal(size=(30, 2)), (random.random(30) < 0.4) * 1.0, random.random(30), 0.5
    )
    point = np.array([0.3, -0.7, 0.2])
    gradient = problem.loss(point)[1]
    for place in range(3):
        step = 1e-6 * np.eye(3)[place]
        slope = (problem.loss(point + step)[0] - problem.loss(point - step)[0]) / 2e-6
        assert gradient[place] == pytest.approx(slope, abs=1e-8)


def test_score_bins_of_a_card_give_a_frontier_of_the_model():
    X, y, group = data(7)
    card = Scorecard().fit(X, y, sensitive=group)
    counts = score_pre_bins(card.decision_function(X), y, group, num_bins=10)
    points = pareto_front(counts, fairness_grid=[0.0, 0.1, 0.3, 1.0])
    values = [point.iv_perf for point in points]
    assert values == sorted(values)
    assert values[0] == 0
    assert values[-1] > 0.1
    table = score_bin_counts(card.decision_function(X), np.ones(len(y)), group == 1, 10)
    assert card.fairness_.iv == iv_inference(*table.T, smoothing=0.5).iv


def test_it_works_in_a_search_with_nested_settings():
    X, y, _ = data(8)
    search = GridSearchCV(
        Scorecard(WoEBinner()), {"binner__max_bins": [1, 5], "C": [1.0]}, scoring="roc_auc", cv=3
    ).fit(X, y)
    assert search.best_params_["binner__max_bins"] == 5


def test_groups_go_through_metadata_routing():
    sklearn = pytest.importorskip("sklearn")
    X, y, group = data(9)
    with sklearn.config_context(enable_metadata_routing=True):
        card = Scorecard(fairness_budget=0.2).set_fit_request(sensitive=True)
        search = GridSearchCV(card, {"C": [1.0]}, cv=2).fit(X, y, sensitive=group)
    assert search.best_estimator_.fairness_.iv <= 0.2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"encoding": "dummy"}, "encoding"),
        ({"C": 0.0}, "C must be > 0"),
        ({"base_odds": 0.0}, "base_odds"),
        ({"points_to_double": -1.0}, "points_to_double"),
        ({"encoding": "onehot", "sign_constraint": True}, "sign_constraint"),
        ({"encoding": "stumps", "fairness_budget": 0.1}, "fairness_budget"),
        ({"fairness_budget": 0.1}, "pass sensitive"),
        ({"fairness_bins": 1}, "fairness_bins"),
    ],
)
def test_wrong_settings_are_named(setting, message):
    X, y, _ = data(rows=200)
    with pytest.raises(ValueError, match=message):
        Scorecard(**setting).fit(X, y)


def test_wrong_groups_are_named():
    X, y, _ = data(rows=200)
    with pytest.raises(ValueError, match="sensitive must hold"):
        Scorecard().fit(X, y, sensitive=np.arange(200) % 3)
    with pytest.raises(ValueError, match="number"):
        Scorecard().fit(X, y).reasons(X, number=0)


@pytest.mark.parametrize("value", [[0.5], None, "1"])
def test_a_penalty_that_is_no_number_is_named(value):
    with pytest.raises(TypeError, match="C must be a number"):
        Scorecard(C=value).fit(np.arange(20.0)[:, None], np.arange(20) % 2)
