"""Bins of tables: counts against loops, constraints, frames, errors, the estimator contract."""

import json
import time

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("xgboost")

from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from steelyard.tabular import (
    WoEBinner,
    cross_fitted_iv,
    iv_inference,
    optimal_bins,
    psi_test,
    woe_table,
)

METHODS = ("xgboost", "quantile", "optimal")


def data(seed: int = 0, rows: int = 3000, columns: int = 3) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    X = random.normal(size=(rows, columns))
    y = (random.random(rows) < 1 / (1 + np.exp(1.5 - X[:, 0] + 0.5 * X[:, 1] ** 2))).astype(int)
    return X, y


@parametrize_with_checks([WoEBinner(method=method) for method in METHODS])
def test_it_keeps_the_contract_of_an_estimator(estimator, check):
    check(estimator)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weighted", [False, True])
def test_counts_and_woe_are_those_of_the_rows(method, weighted):
    X, y = data()
    X = X.round(1)  # ties
    X[::7, 1] = np.nan
    weight = np.random.default_rng(1).integers(0, 4, len(y)) if weighted else np.ones(len(y))
    binner = WoEBinner(method=method)
    binner.fit(X, y, sample_weight=weight if weighted else None)
    codes, woe = binner.bin_indices(X), binner.transform(X)
    for place, bins in enumerate(binner.columns_):
        number = len(bins.good)
        good = np.bincount(codes[:, place], weight * (1 - y), minlength=number)
        bad = np.bincount(codes[:, place], weight * y, minlength=number)
        np.testing.assert_allclose(bins.good, good)
        np.testing.assert_allclose(bins.bad, bad)
        table = woe_table(good, bad, smoothing=0.5)
        np.testing.assert_allclose(woe[:, place], table.woe[codes[:, place]])
        assert binner.iv_[place] == pytest.approx(table.iv)
        assert len(binner.table(place)["bin"]) == number


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("trend", ["increasing", "decreasing", "auto", True])
def test_monotone_share_and_number_of_bins_hold(method, trend):
    X, y = data(2)
    binner = WoEBinner(4, method, monotonic=trend, min_bin_share=0.1).fit(X, y)
    for bins in binner.columns_:
        rows = bins.good + bins.bad
        assert len(rows) <= 4
        assert (rows >= 0.1 * len(y) - 1e-9).all()
        step = np.diff(bins.woe)
        up, down = (step >= -1e-12).all(), (step <= 1e-12).all()
        assert {"increasing": up, "decreasing": down}.get(trend, up or down)


def test_optimal_is_the_optimum_of_its_pre_bins_and_no_method_is_better():
    X, y = data(3)
    values = X.round(0)  # few values: the pre-bins are the values
    best = WoEBinner(method="optimal").fit(values, y).iv_
    for method in METHODS:
        assert (WoEBinner(method=method).fit(values, y).iv_ <= best + 1e-12).all()
    code = np.unique(values[:, 0], return_inverse=True)[1]
    good, bad = np.bincount(code, 1 - y), np.bincount(code, y)
    direct = optimal_bins(good, bad, max_bins=5, min_bin_share=0.05, smoothing=0.5)
    assert best[0] == pytest.approx(direct.iv)


def test_stumps_are_those_of_xgboost_on_all_rows():
    xgboost = pytest.importorskip("xgboost")
    X, y = data(4, rows=2000)
    X = X[:, :1].round(1)
    binner = WoEBinner(max_bins=None, min_bin_share=0.0, num_rounds=8).fit(X, y)
    settings = {"objective": "binary:logistic", "max_depth": 1, "eta": 0.3}
    settings |= {"min_child_weight": 0, "base_score": float(y.mean()), "tree_method": "exact"}
    model = xgboost.train(settings, xgboost.DMatrix(X, label=y), 8)
    thresholds = sorted(set(model.trees_to_dataframe()["Split"].dropna()))
    np.testing.assert_allclose(binner.columns_[0].cuts, thresholds, atol=1e-6)


def test_agrees_with_optbinning_on_the_same_cuts():
    optbinning = pytest.importorskip("optbinning")
    X, y = data(5)
    X = X[:, :1]
    binner = WoEBinner(method="optimal", smoothing=0.0).fit(X, y)
    for place, bins in enumerate(binner.columns_):
        peer = optbinning.OptimalBinning(
            user_splits=bins.cuts,
            user_splits_fixed=[True] * len(bins.cuts),
            min_bin_size=None,
            max_n_bins=20,
            monotonic_trend=None,
        ).fit(X[:, place], y)
        table = peer.binning_table
        woe = table.build()["WoE"].tolist()
        np.testing.assert_allclose(bins.woe, np.array(woe[: len(bins.woe)], float), atol=1e-9)
        assert table.iv == pytest.approx(bins.iv, abs=1e-9)


def test_iv_is_not_below_that_of_optbinning_on_its_own_bins():
    optbinning = pytest.importorskip("optbinning")
    X, y = data(6, rows=5000)
    binner = WoEBinner(method="optimal", smoothing=0.0).fit(X, y)
    for place in range(3):
        peer = optbinning.OptimalBinning(monotonic_trend=None, max_n_bins=5, min_bin_size=0.05)
        peer.fit(X[:, place], y)
        peer.binning_table.build()
        assert binner.iv_[place] >= 0.999 * peer.binning_table.iv


def frame_columns() -> tuple[dict, np.ndarray]:
    random = np.random.default_rng(0)
    level = random.choice(["rent", "own", "free"], 900)
    income = random.normal(size=900).round(1).tolist()
    income[3] = None
    job = level.tolist()
    job[5] = None
    y = (random.random(900) < np.where(level == "own", 0.1, 0.4)).astype(int)
    return {"income": income, "job": job, "flag": (y + random.integers(0, 2, 900)) > 1}, y


@pytest.mark.parametrize("method", METHODS)
def test_pandas_polars_and_objects_give_the_same_bins(method):
    pandas, polars = pytest.importorskip("pandas"), pytest.importorskip("polars")
    columns, y = frame_columns()
    wide, narrow = pandas.DataFrame(columns), polars.DataFrame(columns, strict=False)
    array = np.empty((900, 3), dtype=object)
    for place, values in enumerate(columns.values()):
        array[:, place] = list(values)
    binner = WoEBinner(method=method).fit(wide, y)
    assert binner.get_feature_names_out().tolist() == ["income", "job", "flag"]
    assert [bins.has_missing for bins in binner.columns_] == [True, True, False]
    expected = binner.transform(wide)
    np.testing.assert_array_equal(binner.transform(narrow), expected)
    other = WoEBinner(method=method).fit(narrow, y)
    np.testing.assert_array_equal(other.transform(narrow), expected)
    np.testing.assert_array_equal(WoEBinner(method=method).fit(array, y).transform(array), expected)
    category = wide.assign(job=wide["job"].astype("category"))
    np.testing.assert_array_equal(binner.transform(category), expected)
    cast = narrow.with_columns(polars.col("job").cast(polars.Categorical))
    np.testing.assert_array_equal(binner.transform(cast), expected)


def test_output_can_be_a_frame():
    pandas = pytest.importorskip("pandas")
    columns, y = frame_columns()
    frame = pandas.DataFrame(columns)
    out = WoEBinner().set_output(transform="pandas").fit_transform(frame, y)
    assert list(out.columns) == ["income", "job", "flag"]


def test_a_level_belongs_to_one_bin_and_levels_are_grouped_by_risk():
    random = np.random.default_rng(1)
    level = random.integers(0, 30, 6000)
    y = (random.random(6000) < (level % 3 + 1) / 5).astype(int)
    binner = WoEBinner(3, "optimal", categorical=[0]).fit(level[:, None], y)
    groups = binner.columns_[0].levels
    assert sorted(sum(groups, ())) == sorted(set(level.tolist()))
    assert len(groups) == 3
    for group in groups:
        assert len({item % 3 for item in group}) == 1


def test_special_and_missing_values_stay_apart():
    X, y = data(7)
    X[:300, 0], X[300:600, 0], X[:300, 2] = -999.0, np.nan, -999.0
    binner = WoEBinner(method="optimal", special_values={"x0": [-999.0]}).fit(X, y)
    bins = binner.columns_[0]
    assert bins.labels()[-2:] == ["= -999.0", "missing"]
    assert bins.good[-2] + bins.bad[-2] == 300
    assert binner.columns_[2].special == ()
    assert (binner.bin_indices(X)[:300, 0] == len(bins.woe) - 2).all()
    assert bins.woe[-1] != 0


def test_an_unseen_level_is_an_error_or_neutral_and_never_silent():
    X = np.array([["a"], ["b"]] * 50, dtype=object)
    y = np.array([0, 1] * 50)
    y[:4] = [1, 0, 1, 0]
    new = np.array([["c"], [None]], dtype=object)
    with pytest.raises(ValueError, match="column 'x0' has a value without a bin, 'c'"):
        WoEBinner().fit(X, y).transform(new)
    neutral = WoEBinner(unseen="neutral").fit(X, y)
    assert neutral.transform(new).tolist() == [[0.0], [0.0]]
    assert neutral.bin_indices(new).tolist() == [[-1], [-1]]


def test_a_constant_and_an_entirely_missing_column_have_one_bin():
    X, y = data(8)
    X[:, 0], X[:, 1] = 3.0, np.nan
    for method in METHODS:
        binner = WoEBinner(method=method, smoothing=0.0).fit(X, y)
        assert [len(bins.woe) for bins in binner.columns_[:2]] == [1, 1]
        np.testing.assert_allclose(binner.transform(X)[:, :2], 0, atol=1e-12)
        assert binner.iv_[:2] == pytest.approx(0, abs=1e-12)


def test_an_empty_cell_without_smoothing_names_column_and_bin():
    x = np.array([[1.0], [2.0], [3.0]]).repeat(20, axis=0)
    y = np.repeat([0, 1, 0], 20)
    y[:5], y[20:25] = 1, 0
    with pytest.raises(ValueError, match="column 'x0': bad is empty in bin 2"):
        WoEBinner(method="quantile", smoothing=0.0).fit(x, y)
    joined = WoEBinner(method="optimal", smoothing=0.0).fit(x, y)
    assert len(joined.columns_[0].woe) < 3
    assert np.isfinite(joined.columns_[0].woe).all()


def test_sign_can_be_turned():
    X, y = data(9)
    good, bad = (WoEBinner(numerator=side).fit_transform(X, y) for side in ("good", "bad"))
    np.testing.assert_array_equal(good, -bad)


def test_evaluate_and_drift_use_the_bins_of_the_fit():
    X, y = data(10)
    binner = WoEBinner().fit(X[:1500], y[:1500])
    codes = binner.bin_indices(X[1500:])[:, 0]
    number = len(binner.columns_[0].woe)
    good, bad = (np.bincount(codes, w, minlength=number) for w in (1 - y[1500:], y[1500:]))
    held_out = binner.evaluate(X[1500:], y[1500:])["x0"]
    assert held_out == iv_inference(good, bad, smoothing=0.5)
    base = binner.columns_[0].good + binner.columns_[0].bad
    assert binner.drift(X[1500:])["x0"] == psi_test(base, good + bad, smoothing=0.5)
    assert binner.drift(X[1500:] + 1.0)["x0"].p_value < 1e-6


def test_cross_fitting_holds_the_level_that_the_same_rows_do_not():
    # 80 noise columns: the rate of a 5 % test is below 0.124 (3 standard errors)
    random = np.random.default_rng(0)
    X, y = random.normal(size=(1500, 80)), random.integers(0, 2, 1500)
    binner = WoEBinner(method="optimal", max_prebins=30)
    tests = cross_fitted_iv(binner, X, y, folds=3)
    rate = np.mean([test.p_value < 0.05 for test in tests.values()])
    assert rate < 0.124
    same = binner.fit(X, y).evaluate(X, y)
    assert np.mean([test.p_value < 0.05 for test in same.values()]) > 0.5


def test_json_rebuilds_without_running_code():
    pandas = pytest.importorskip("pandas")
    columns, y = frame_columns()
    frame = pandas.DataFrame(columns)
    binner = WoEBinner(method="optimal", special_values={"income": [0.1]}).fit(frame, y)
    text = binner.to_json()
    json.loads(text)
    again = WoEBinner.from_json(text)
    np.testing.assert_array_equal(again.transform(frame), binner.transform(frame))
    assert again.get_params() == binner.get_params()
    assert again.get_feature_names_out().tolist() == list(columns)


def test_it_works_in_a_pipeline_and_a_search():
    X, y = data(11)
    search = GridSearchCV(
        make_pipeline(WoEBinner(), LogisticRegression()),
        {"woebinner__max_bins": [1, 6]},
        cv=3,
        scoring="neg_log_loss",
    ).fit(X, y)
    assert search.best_params_ == {"woebinner__max_bins": 6}
    assert clone(search.best_estimator_).get_params()["woebinner__max_bins"] == 6


def test_fifty_columns_of_a_hundred_thousand_rows_take_a_tenth_of_the_peer():
    # optbinning takes 15.2 processor seconds for this; a loaded machine doubles ours at most
    random = np.random.default_rng(0)
    X = random.normal(size=(100_000, 10))
    y = (random.random(100_000) < 1 / (1 + np.exp(2 - X[:, 0]))).astype(int)
    begin = time.process_time()
    WoEBinner().fit(X, y)
    assert 5 * (time.process_time() - begin) < 3.0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_bins": 0}, "max_bins"),
        ({"max_bins": None, "method": "quantile"}, "max_bins"),
        ({"method": "tree"}, "method"),
        ({"smoothing": -1}, "smoothing"),
        ({"monotonic": "up"}, "monotonic"),
        ({"monotonic": {"x0": 3}}, "monotonic"),
        ({"min_bin_share": 0.7}, "min_bin_share"),
        ({"unseen": "zero"}, "unseen"),
        ({"numerator": "event"}, "numerator"),
        ({"num_rounds": 0}, "num_rounds"),
        ({"categorical": ["nobody"]}, "nobody"),
    ],
)
def test_wrong_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        WoEBinner(**setting).fit(*data(rows=100))


def test_wrong_data_are_named():
    X, y = data(rows=100)
    with pytest.raises(ValueError, match="one class"):
        WoEBinner().fit(X, np.zeros(100))
    with pytest.raises(ValueError, match="Only binary"):
        WoEBinner().fit(X, np.arange(100) % 3)
    with pytest.raises(ValueError, match="column 'x1' contains infinity"):
        WoEBinner().fit(np.where(np.arange(3) == 1, np.inf, X), y)
    with pytest.raises(ValueError, match=r"[Nn]egative"):
        WoEBinner().fit(X, y, sample_weight=np.full(100, -1.0))
    with pytest.raises(ValueError, match="one class only"):
        WoEBinner().fit(X, y, sample_weight=y * 1.0)
    with pytest.raises(ValueError, match="NaN"):
        WoEBinner().fit(X, np.where(np.arange(100) < 1, np.nan, y))
    with pytest.raises(ValueError, match="no column 'age'"):
        WoEBinner().fit(X, y).table("age")
    with pytest.raises(ValueError, match="one label for each"):
        WoEBinner().fit(X, y[:50])


def test_wrong_frames_are_named():
    pandas = pytest.importorskip("pandas")
    X, y = data(rows=100)
    with pytest.raises(ValueError, match="distinct column names"):
        WoEBinner().fit(pandas.DataFrame(X, columns=["a", "b", "a"]), y)
    frame = pandas.DataFrame(X, columns=["a", "b", "c"])
    with pytest.raises(TypeError, match="column 'd' must hold numbers or levels"):
        WoEBinner().fit(frame.assign(d=pandas.Timestamp("2020-01-01")), y)
    binner = WoEBinner().fit(frame, y)
    with pytest.raises(TypeError, match="column 'b' must hold numbers as in fit"):
        binner.transform(frame.assign(b="x"))
    with pytest.raises(ValueError, match="feature names"):
        binner.transform(frame[["b", "a", "c"]])


def test_values_that_fit_has_not_seen_are_blamed_on_their_argument():
    X, y = np.arange(20.0)[:, None], np.arange(20) % 2
    binner = WoEBinner(method="quantile").fit(X, y)
    with pytest.raises(ValueError, match=r"^X: column 'x0' contains infinity"):
        binner.transform(np.full((3, 1), np.inf))
    with pytest.raises(ValueError, match=r"y must hold both classes of fit, got \[0\]"):
        binner.evaluate(X, np.zeros(20, dtype=int))
    with pytest.raises(TypeError, match="binner must be a WoEBinner, got str"):
        cross_fitted_iv("text", X, y)
    with pytest.raises(TypeError, match="y must have rows, got int"):
        cross_fitted_iv(binner, X, 3)
