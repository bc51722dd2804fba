"""The PRESTO estimators: what scikit-learn asks of them, and what the method promises."""

import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from steelyard.classification import (
    PrestoClassifier,
    PrestoClassifierCV,
    lambda_max,
    presto_path,
    proportional_odds_nll,
)


def rare(seed=0, n=600, p=4, edges=(0.0, 2.5, 4.0), change=0.0):
    """Three steps; the last class is rare. The slope of feature 0 changes at the last step."""
    rng = np.random.default_rng(seed)
    X = rng.uniform(-1, 1, (n, p))
    slope = np.zeros(p)
    slope[:2] = 1.0
    eta = np.array(edges) + (X @ slope)[:, None] + change * np.outer(X[:, 0], [0, 0, 1])
    y = (rng.random((n, 1)) > 1 / (1 + np.exp(-np.maximum.accumulate(eta, 1)))).sum(1)
    return X, y, 1 - 1 / (1 + np.exp(-eta.max(1)))


@parametrize_with_checks(
    [PrestoClassifier(), PrestoClassifierCV(n_lambdas=3, cv=2, tol=1e-6)],
)
def test_scikit_learn_finds_nothing_to_object(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


def test_fit_is_that_of_the_path_and_the_likelihood():
    X, y, _ = rare()
    top = lambda_max(X, y)
    model = PrestoClassifier(top / 10).fit(X, y)
    path = presto_path(X, y, lambdas=torch.tensor([top / 10], dtype=torch.float64))
    np.testing.assert_array_equal(model.coef_, path.coef[0].numpy())
    assert model.coef_.shape == (4, 3)
    assert model.intercept_.shape == (3,)
    assert model.kkt_ < 1e-8
    assert model.n_nonzero_ == int(path.nonzero[0])
    values = (torch.tensor(t) for t in (X, y, model.intercept_, model.coef_))
    assert float(proportional_odds_nll(*values)) == pytest.approx(model.nll_, abs=1e-12)
    picked = model.predict_proba(X)[np.arange(len(y)), y]
    assert -np.log(picked).mean() == pytest.approx(model.nll_, abs=1e-12)


def test_probabilities_are_those_of_the_boundaries_and_small_ones_keep_their_digits():
    X, y, _ = rare()
    model = PrestoClassifier(0.01).fit(X, y)
    model.intercept_, model.coef_ = np.array([1.0, 2.0, 50.0]), np.zeros((4, 3))
    probs = model.predict_proba(X[:1])[0]
    edges = 1 / (1 + np.exp([-1.0, -2.0, -50.0]))
    np.testing.assert_allclose(probs[:3], np.diff(edges, prepend=0), rtol=1e-12)
    assert probs[3] == pytest.approx(np.exp(-50), rel=1e-12)
    np.testing.assert_allclose(model.predict_log_proba(X[:1])[0, 3], -50, rtol=1e-12)


def test_without_penalty_the_last_boundary_is_near_the_logistic_regression_of_its_split():
    X, y, _ = rare(n=4000, change=0.7)
    free = PrestoClassifier(0.0).fit(X, y)
    split = LogisticRegression(C=np.inf, tol=1e-8).fit(X, y <= 2)
    np.testing.assert_allclose(free.coef_[:, 2], split.coef_[0], atol=0.15)
    assert abs(free.coef_[0, 2] - free.coef_[0, 1]) > 0.3


@pytest.mark.parametrize("crossing", ["sort", "cummax"])
def test_crossed_boundaries_are_put_in_order_and_said(crossing):
    X, y, _ = rare()
    model = PrestoClassifier(0.01, crossing=crossing).fit(X, y)
    model.intercept_ = np.array([0.0, -1.0, 2.0])
    model.coef_ = np.zeros((4, 3))
    with pytest.warns(UserWarning, match="boundaries cross in 5 of 5 rows"):
        probs = model.predict_proba(X[:5])
    assert model.crossing_share(X) == 1.0
    sigma = 1 / (1 + np.exp([0.0, 1.0, -2.0]))
    cumulative = np.sort(sigma) if crossing == "sort" else sigma[[0, 0, 2]]
    np.testing.assert_allclose(probs[0].cumsum()[:3], cumulative, atol=1e-12)
    assert (probs >= 0).all()


def test_no_warning_where_nothing_crosses():
    X, y, _ = rare()
    model = PrestoClassifier(0.05, penalize_base=False).fit(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict(X)
    assert model.crossing_share(X) == 0.0


def test_borrowing_beats_the_rare_rows_alone():
    # Squared error of the rare probability over ten fixed samples with about 1 % rare rows. The
    # logistic regression sees about 12 of them; the gap is several times its spread.
    ours, alone = [], []
    for seed in range(10):
        X, y, truth = rare(seed, n=1200, edges=(0.0, 3.0, 5.0))
        model = PrestoClassifier(0.003, penalize_base=False).fit(X, y)
        peer = LogisticRegression(C=np.inf).fit(X, y == 3)
        ours.append(np.mean((model.predict_proba(X)[:, 3] - truth) ** 2))
        alone.append(np.mean((peer.predict_proba(X)[:, 1] - truth) ** 2))
    assert np.mean(ours) < 0.6 * np.mean(alone)


def test_cross_validation_takes_the_largest_of_the_best_penalties():
    X, y, _ = rare()
    model = PrestoClassifierCV(n_lambdas=8).fit(X, y)
    assert model.scores_.shape == (5, 8)
    assert model.lam_ == model.lambdas_[model.scores_.mean(0).argmin()]
    again = PrestoClassifier(model.lam_).fit(X, y)
    np.testing.assert_allclose(model.coef_, again.coef_, atol=1e-7)
    assert model.lambdas_[0] == pytest.approx(lambda_max(X, y))
    equal = PrestoClassifierCV(lambdas=[0.3, 3.0, 0.4]).fit(X, y)  # all empty, all the same
    assert equal.lam_ == 3.0


@pytest.mark.parametrize("scoring", ["brier", "rare_log_loss"])
def test_scores_are_those_of_fits_to_the_folds(scoring):
    X, y, _ = rare()
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    model = PrestoClassifierCV(lambdas=[0.05, 0.01], cv=folds, scoring=scoring).fit(X, y)
    for fold, (train, test) in enumerate(folds.split(X, y)):
        for place, lam in enumerate([0.05, 0.01]):
            probs = PrestoClassifier(lam).fit(X[train], y[train]).predict_proba(X[test])
            hit = np.eye(4)[y[test]]
            if scoring == "brier":
                expected = ((hit - probs) ** 2).sum(1).mean()
            else:
                r = probs[:, 3]
                expected = -(hit[:, 3] * np.log(r) + (1 - hit[:, 3]) * np.log1p(-r)).mean()
            assert model.scores_[fold, place] == pytest.approx(expected, rel=1e-6)


def test_works_in_a_pipeline_and_a_grid_search_and_clones():
    X, y, _ = rare()
    pipeline = make_pipeline(StandardScaler(), PrestoClassifier())
    grid = {"prestoclassifier__lam": [0.1, 0.01], "prestoclassifier__penalize_base": [True, False]}
    search = GridSearchCV(pipeline, grid, cv=2, scoring="neg_log_loss").fit(X, y)
    # the truth has one slope for all steps, which only a free base can keep at full size
    assert search.best_params_["prestoclassifier__penalize_base"] is False
    copy = clone(PrestoClassifierCV(cv=3, scoring="rare_log_loss", l1_ratio=0.5))
    assert copy.get_params()["l1_ratio"] == 0.5
    with pytest.raises(NotFittedError):
        copy.predict(X)


def test_labels_of_any_kind_keep_their_order():
    pandas = pytest.importorskip("pandas")
    X, y, _ = rare()
    steps = np.array(["seen", "clicked", "asked", "bought"])
    plain = PrestoClassifier().fit(X, y)
    frame = pandas.DataFrame(X, columns=list("abcd"))
    column = pandas.Series(pandas.Categorical(steps[y], categories=steps, ordered=True))
    by_column = PrestoClassifier().fit(frame, column)
    assert by_column.feature_names_in_.tolist() == list("abcd")
    by_name = PrestoClassifier(classes=list(steps)).fit(X, steps[y])
    for model in (by_column, by_name, PrestoClassifier().fit(X, 10.0 * y - 3)):
        np.testing.assert_array_equal(model.coef_, plain.coef_)
    assert by_column.classes_.tolist() == steps.tolist()
    assert by_name.predict(X).tolist() == steps[plain.predict(X)].tolist()
    with pytest.warns(UserWarning, match="sorted by alphabet"):
        PrestoClassifier().fit(X, steps[y])


def test_errors_name_what_is_wrong():
    X, y, _ = rare(n=80)
    with pytest.raises(ValueError, match=r"y must hold whole numbers or categories, got 1\.5"):
        PrestoClassifier().fit(X, np.where(y == 1, 1.5, y))
    with pytest.raises(ValueError, match="at least two classes"):
        PrestoClassifier().fit(X, y * 0)
    with pytest.raises(ValueError, match="NaN"):
        PrestoClassifier().fit(np.where(X > 0.9, np.nan, X), y)
    with pytest.raises(ValueError, match="infinity"):
        PrestoClassifier().fit(np.where(X > 0.9, np.inf, X), y)
    with pytest.raises(ValueError, match=r"lam must be >= 0\.0"):
        PrestoClassifier(-1.0).fit(X, y)
    with pytest.raises(ValueError, match="crossing must be one of 'sort', 'cummax'"):
        PrestoClassifier(crossing="clip").fit(X, y)
    with pytest.raises(ValueError, match=r"classes must hold every label once.*missing: \[2\]"):
        PrestoClassifier(classes=[0, 1, 3]).fit(X, y % 3)
    with pytest.raises(ValueError, match=r"positive entry|non-zero number"):
        PrestoClassifier().fit(X, y, np.zeros(80))
    with pytest.raises(ValueError, match="scoring must be one of"):
        PrestoClassifierCV(scoring="accuracy").fit(X, y)
    with pytest.raises(ValueError, match="at least 2 rows for cross-validation"):
        PrestoClassifierCV().fit(X, np.where(np.arange(80) == 5, 2, y % 2))
    sorted_rows = np.argsort(y, kind="stable")
    whole = [(sorted_rows[:30], sorted_rows[30:])]
    with pytest.raises(ValueError, match="each fold must train on all classes"):
        PrestoClassifierCV(cv=whole).fit(X, y)


def test_classes_that_the_features_separate_are_reported():
    X = np.arange(30.0)[:, None]
    y = np.repeat([0, 1, 2], 10)
    with pytest.warns(ConvergenceWarning, match="no finite fit without a penalty"):
        PrestoClassifier(0.0, max_iter=8).fit(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PrestoClassifier(1e-3).fit(X, y).score(X, y) == 1.0
