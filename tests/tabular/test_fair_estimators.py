"""The fair estimators: scikit-learn's contract, files, and what the penalty does."""

import json
import warnings

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from torch import nn

sklearn = pytest.importorskip("sklearn")
from sklearn.base import clone  # noqa: E402
from sklearn.linear_model import LinearRegression, PoissonRegressor  # noqa: E402
from sklearn.model_selection import GridSearchCV  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402
from sklearn.utils.estimator_checks import check_estimator  # noqa: E402

from steelyard.divergences import distance_covariance  # noqa: E402
from steelyard.tabular.calibration import calibrate_strength  # noqa: E402
from steelyard.tabular.fair_estimators import FairClassifier, FairRegressor  # noqa: E402
from steelyard.tabular.fairness import ranked_probability_score  # noqa: E402

linear = {"hidden": (), "learning_rate": 0.1, "max_epochs": 40, "random_state": 0}


def gerrymander(seed: int = 0, n: int = 400):
    """A proxy for race xor sex, and labels that follow it: 08, section 11."""
    random = np.random.default_rng(seed)
    race, sex = random.integers(0, 2, (2, n))
    proxy = 2 * (race ^ sex) - 1 + 0.7 * random.normal(size=n)
    X = np.column_stack([random.normal(size=n), proxy])
    y = (X.sum(1) + random.logistic(size=n) > 0).astype(int)
    return X, y, pd.DataFrame({"race": np.where(race, "x", "y"), "sex": sex})


def gap(outputs, sensitive):
    cells = sensitive.assign(output=outputs).groupby(list(sensitive.columns))["output"].mean()
    return cells.max() - cells.min()


@pytest.mark.parametrize(
    "estimator",
    [
        FairRegressor(**linear | {"max_epochs": 20}),
        FairRegressor(**linear | {"max_epochs": 20}, loss="poisson", strength=0.0),
        FairClassifier(**linear | {"max_epochs": 20}),
    ],
)
def test_estimators_pass_the_checks_of_scikit_learn(estimator):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_estimator(estimator)


@pytest.fixture(scope="module")
def gaps():
    X, y, sensitive = gerrymander()
    found = {}
    for measure in ("none", "marginal", "concatenated", "joint"):
        model = FairClassifier(
            **linear,
            measure="joint" if measure == "none" else measure,
            strength=0.0 if measure == "none" else 20.0,
        )
        model.fit(X, y, sensitive=sensitive)
        found[measure] = gap(model.predict_proba(X)[:, 1], sensitive)
    return found


def test_intersectional_penalties_close_the_gap_that_marginal_ones_leave(gaps):
    # one data set, far from the thresholds: 0.43, 0.44, 0.13, 0.09 in the specification
    assert gaps["none"] > 0.2
    assert gaps["marginal"] > 0.2
    assert gaps["concatenated"] < 0.5 * gaps["none"]
    assert gaps["joint"] < 0.5 * gaps["none"]


def test_a_huge_strength_leaves_the_best_predictor_without_the_proxy():
    random = np.random.default_rng(1)
    sex = random.integers(0, 2, 800)
    X = np.column_stack([random.normal(size=800), sex.astype(float)])
    y = X[:, 0] + 2 * X[:, 1] + 0.1 * random.normal(size=800)
    model = FairRegressor(**linear | {"max_epochs": 120}, strength=100.0).fit(X, y, sensitive=sex)
    weight = model.network_[0].weight.detach().numpy()[0] / X.std(0) * model.target_scale_
    assert abs(weight[1]) < 0.4  # 2 without the penalty
    assert weight[0] == pytest.approx(1.0, abs=0.3)


def test_all_features_proxies_and_a_huge_strength_leave_a_constant():
    random = np.random.default_rng(2)
    sex = random.integers(0, 2, 400)
    X = np.column_stack([sex + 0.1 * random.normal(size=400)])
    y = X[:, 0] + 0.1 * random.normal(size=400)
    model = FairRegressor(**linear | {"max_epochs": 120}, strength=100.0).fit(X, y, sensitive=sex)
    assert model.predict(X).std() < 0.05 * y.std()


def test_without_a_penalty_squared_loss_is_least_squares():
    random = np.random.default_rng(3)
    X = random.normal(size=(300, 3)) * [1, 10, 0.1] + 5
    y = X @ [1.0, 0.2, -3.0] + 7 + random.normal(size=300)
    settings = linear | {"max_epochs": 300, "patience": 100}
    model = FairRegressor(**settings, strength=0.0, weight_decay=0.0, validation_fraction=0.0)
    expected = LinearRegression().fit(X, y).predict(X)
    np.testing.assert_allclose(model.fit(X, y).predict(X), expected, atol=1e-2)


def test_without_a_penalty_poisson_loss_with_exposure_is_poisson_regression():
    random = np.random.default_rng(4)
    X, exposure = random.normal(size=(600, 2)), random.uniform(0.2, 3, 600)
    counts = random.poisson(exposure * np.exp(X @ [0.5, -0.3] - 0.5))
    settings = linear | {"max_epochs": 300, "patience": 100}
    model = FairRegressor(
        **settings, loss="poisson", strength=0.0, weight_decay=0.0, validation_fraction=0.0
    ).fit(X, counts, exposure=exposure)
    peer = PoissonRegressor(alpha=0.0, tol=1e-8)
    peer.fit(X, counts / exposure, sample_weight=exposure)
    np.testing.assert_allclose(model.predict(X), peer.predict(X), rtol=2e-2)


def test_poisson_penalty_is_on_rates_unless_counts_are_asked_for():
    # exposure differs between groups, rates don't: only the count penalty distorts the rates
    random = np.random.default_rng(5)
    sex = random.integers(0, 2, 600)
    exposure = np.where(sex == 1, 3.0, 0.5)
    X = np.column_stack([random.normal(size=600), sex + 0.1 * random.normal(size=600)])
    counts = random.poisson(exposure * np.exp(0.3 * X[:, 0]))
    shift = {}
    for penalise in ("rate", "count"):
        model = FairRegressor(**linear, loss="poisson", penalise=penalise, strength=20.0)
        rates = model.fit(X, counts, sensitive=sex, exposure=exposure).predict(X)
        shift[penalise] = abs(np.log(rates[sex == 1].mean() / rates[sex == 0].mean()))
    assert shift["rate"] < 0.1
    assert shift["count"] > 5 * shift["rate"]


def test_strength_does_not_depend_on_the_unit_of_a_squared_target():
    X, y, sensitive = gerrymander()
    settings = linear | {"max_epochs": 20}
    one = FairRegressor(**settings).fit(X, y, sensitive=sensitive).predict(X)
    scaled = FairRegressor(**settings).fit(X, 1000.0 * y + 5, sensitive=sensitive).predict(X)
    np.testing.assert_allclose(scaled, 1000 * one + 5, rtol=1e-8)


def test_sensitive_attributes_may_be_frames_series_arrays_or_mappings():
    X, y, sensitive = gerrymander(n=200)
    settings = linear | {"max_epochs": 3}
    expected = FairClassifier(**settings).fit(X, y, sensitive=sensitive).predict_proba(X)
    for same in (
        pl.from_pandas(sensitive),
        sensitive.to_numpy(),
        {name: sensitive[name].tolist() for name in sensitive},
    ):
        got = FairClassifier(**settings).fit(X, y, sensitive=same).predict_proba(X)
        np.testing.assert_allclose(got, expected, rtol=1e-12)
    model = FairClassifier(**settings).fit(X, y, sensitive=sensitive["race"])
    assert model.sensitive_names_ == ["race"]


def test_equal_seeds_give_equal_models_and_leave_the_global_generator_alone():
    X, y, sensitive = gerrymander(n=200)
    model = FairClassifier(hidden=(8,), dropout=0.2, max_epochs=3, random_state=3)
    state = torch.get_rng_state()
    first = model.fit(X, y, sensitive=sensitive).predict_proba(X)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    np.testing.assert_array_equal(clone(model).fit(X, y, sensitive).predict_proba(X), first)
    other = clone(model).set_params(random_state=4).fit(X, y, sensitive).predict_proba(X)
    assert abs(other - first).max() > 1e-3


def test_without_attributes_the_estimator_warns_that_nothing_is_penalised():
    X, y, _ = gerrymander(n=60)
    with pytest.warns(UserWarning, match="without a penalty"):
        FairClassifier(**linear | {"max_epochs": 2}).fit(X, y)


def test_early_stopping_keeps_the_best_weights():
    X, y, _ = gerrymander(n=200)
    model = FairClassifier(
        hidden=(32,), learning_rate=0.1, strength=0.0, patience=10, random_state=0
    ).fit(X, y)
    curve = model.objective_curve_
    # three rounds of patience, the last of them after the best
    assert model.n_iter_ == len(curve) < 500
    assert int(np.argmin(curve)) + 1 + 10 <= len(curve)
    watched = np.array(curve)
    assert watched[-1] > watched.min()


def test_grid_search_and_pipelines_route_the_attributes():
    X, y, sensitive = gerrymander(n=240)

    def score(model, X, y, sensitive):
        table = np.column_stack([sensitive["race"] == "x", sensitive["sex"]]).astype(float)
        outputs = torch.from_numpy(model.predict_proba(X)[:, 1])
        return -float(distance_covariance(outputs, torch.from_numpy(table)))

    with sklearn.config_context(enable_metadata_routing=True):
        from sklearn.metrics import get_scorer_names, make_scorer

        assert "accuracy" in get_scorer_names()
        fair = FairClassifier(**linear | {"max_epochs": 40}).set_fit_request(sensitive=True)
        model = make_pipeline(StandardScaler(), fair)
        grid = {"fairclassifier__strength": [0.0, 30.0]}
        accuracy = make_scorer(lambda t, p: float((t == p).mean()))
        search = GridSearchCV(model, grid, cv=3, scoring=accuracy).fit(X, y, sensitive=sensitive)
        assert search.best_params_["fairclassifier__strength"] == 0.0  # fairness costs accuracy
        path = calibrate_strength(
            model,
            X,
            y,
            sensitive,
            strengths=(0.0, 30.0),
            target=0.5,
            seeds=[0],
            parameter="fairclassifier__strength",
        )
        assert path.divergence.shape == (2, 1)
        fitted = search.best_estimator_
        assert score(fitted, X, y, sensitive) < 0


def test_calibration_reports_the_frontier_on_held_out_rows():
    X, y, sensitive = gerrymander(n=400)
    path = calibrate_strength(
        FairClassifier(**linear | {"max_epochs": 30}),
        X,
        y,
        sensitive,
        strengths=(0.0, 20.0),
        seeds=(0, 1),
        target=0.0 + 10,
    )
    assert path.strength == 0.0  # the target is met at once
    assert (path.divergence[1] < path.divergence[0]).all()
    assert (path.covariance[1] < path.covariance[0]).all()
    assert (path.unfairness[1] < path.unfairness[0]).all()
    assert (path.error[1] > path.error[0]).all()
    again = calibrate_strength(
        FairRegressor(**linear | {"max_epochs": 5}, loss="poisson"),
        X,
        y,
        sensitive,
        strengths=(0.0, 1.0),
        seeds=[0],
        target=10.0,
    )
    assert 0 < again.error[0, 0] < 1  # the Poisson score
    assert ranked_probability_score([0.5], [0]) > 0


@pytest.mark.parametrize(
    "labels", [np.array(["no", "yes"]), np.array([0, 1]), np.array([3.0, 9.0])]
)
def test_saved_estimators_come_back_equal(tmp_path, labels):
    X, y, sensitive = gerrymander(n=100)
    frame = pd.DataFrame(X, columns=["z", "proxy"])
    model = FairClassifier(hidden=(5,), dropout=0.1, max_epochs=2, random_state=0)
    model.fit(frame, labels[y], sensitive=sensitive).save(tmp_path / "model")
    back = FairClassifier.load(tmp_path / "model")
    np.testing.assert_array_equal(back.predict_proba(frame), model.predict_proba(frame))
    np.testing.assert_array_equal(back.predict(frame), model.predict(frame))
    assert back.get_params() == model.get_params()
    assert back.feature_names_in_.tolist() == ["z", "proxy"]
    assert sorted(p.suffix for p in (tmp_path / "model").iterdir()) == [".json", ".safetensors"]
    with pytest.raises(ValueError, match="FairClassifier"):
        FairRegressor.load(tmp_path / "model")


def test_saved_regressors_and_own_networks_come_back_equal(tmp_path):
    X, y, sensitive = gerrymander(n=100)

    def factory(features):
        return nn.Sequential(nn.Linear(features, 4), nn.Tanh(), nn.Linear(4, 1))

    model = FairRegressor(network=factory, loss="poisson", max_epochs=2, random_state=0)
    model.fit(X, y, sensitive=sensitive).save(tmp_path)
    back = FairRegressor.load(tmp_path, network=factory)
    np.testing.assert_array_equal(back.predict(X), model.predict(X))
    with pytest.raises(ValueError, match="network=its factory"):
        FairRegressor.load(tmp_path)
    settings = json.loads((tmp_path / "estimator.json").read_text())["settings"]
    assert settings["loss"] == "poisson"
    model.random_state = np.random.RandomState(0)
    with pytest.raises(ValueError, match="JSON"):
        model.save(tmp_path / "other")


@pytest.mark.parametrize(
    ("estimator", "y", "extra", "message"),
    [
        (FairClassifier(), np.zeros(40), {}, "one class"),
        (FairClassifier(), np.arange(40) % 3, {}, "Only binary"),
        (FairRegressor(loss="poisson"), np.arange(40.0) - 20, {}, "counts >= 0"),
        (FairRegressor(loss="poisson"), np.zeros(40), {}, "one positive"),
        (FairRegressor(loss="poisson"), np.ones(40), {"exposure": np.zeros(40)}, "exposure"),
        (FairRegressor(), np.arange(40.0), {"exposure": np.ones(40)}, "loss='poisson'"),
        (FairRegressor(loss="huber"), np.arange(40.0), {}, "loss"),
        (FairRegressor(), np.arange(40.0), {"sensitive": np.arange(7)}, "40 items"),
        (FairRegressor(strength=-1.0), np.arange(40.0), {}, "strength"),
        (FairRegressor(measure="sum"), np.arange(40.0), {}, "measure"),
        (FairRegressor(batch_size=2), np.arange(40.0), {}, "batch_size"),
        (FairRegressor(learning_rate=0.0), np.arange(40.0), {}, "learning_rate"),
    ],
)
def test_wrong_settings_and_data_are_named(estimator, y, extra, message):
    X = np.random.default_rng(0).normal(size=(40, 2))
    with pytest.raises(ValueError, match=message):
        estimator.fit(X, y, **{"sensitive": np.arange(40) % 2} | extra)
