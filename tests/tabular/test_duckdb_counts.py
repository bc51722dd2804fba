"""Counts from a database against counts in memory."""

import numpy as np
import pytest

duckdb = pytest.importorskip("duckdb")
pandas = pytest.importorskip("pandas")

from steelyard.tabular import (  # noqa: E402
    WoEBinner,
    duckdb_bin_counts,
    duckdb_cuts,
    duckdb_level_counts,
    duckdb_psi,
    psi_test,
)


@pytest.fixture(scope="module")
def frame():
    random = np.random.default_rng(0)
    age = random.normal(40, 10, 4000).round(0)
    age[:100] = np.nan
    job = random.choice(["rent", "o'wn", "free"], 4000).astype(object)
    job[::50] = None
    y = (random.random(4000) < 1 / (1 + np.exp(age / 20))).astype(int)
    return pandas.DataFrame(
        {"age": age, "n": random.integers(0, 40, 4000), 'odd "name"': age * 2, "job": job, "y": y}
    )


@pytest.fixture(scope="module")
def parquet(frame, tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "loans.parquet"
    duckdb.from_df(frame).write_parquet(str(path))
    return path


@pytest.mark.parametrize("number", [5, 60])  # two ways to count
@pytest.mark.parametrize("by", [None, "y"])
def test_counts_are_those_of_the_rows(frame, parquet, number, by):
    cuts = {
        "age": np.linspace(20, 60, number),
        "n": np.linspace(1, 35, number),
        'odd "name"': np.linspace(30, 90, number),
    }
    for source in (parquet, str(parquet), duckdb.from_df(frame)):
        found = duckdb_bin_counts(source, cuts, by=by)
        for name, borders in cuts.items():
            code = np.searchsorted(borders, frame[name], side="left")
            code[frame[name].isna()] = number + 1
            expected = np.bincount(code, minlength=number + 2)
            if by:
                bad = np.bincount(code, frame["y"], minlength=number + 2)
                expected = np.stack([expected - bad, bad], axis=1)
            np.testing.assert_array_equal(found[name], expected)


def test_a_file_of_many_columns_is_counted_in_parts(tmp_path):
    path = tmp_path / "wide.parquet"
    columns = ", ".join(f"(range * {i + 1}) % 17 AS x{i}" for i in range(45))
    duckdb.sql(f"SELECT range % 2 AS y, {columns} FROM range(300)").write_parquet(str(path))
    cuts = {f"x{i}": [4.0, 9.0] for i in range(45)}
    parts = duckdb_bin_counts(path, cuts, by="y")
    whole = duckdb_bin_counts(duckdb.read_parquet(str(path)), cuts, by="y")
    assert list(parts) == list(whole) == list(cuts)
    for name in cuts:
        np.testing.assert_array_equal(parts[name], whole[name])
    assert duckdb_bin_counts(path, {}) == {}


def test_nan_and_null_are_both_missing_and_infinity_is_large():
    table = duckdb.sql(
        "SELECT unnest([1.0::DOUBLE, 'nan'::DOUBLE, NULL, 'inf'::DOUBLE, '-inf'::DOUBLE]) AS x"
    )
    for number in (3, 50):
        counts = duckdb_bin_counts(table, {"x": np.linspace(0, 2, number)})["x"]
        assert counts[0] == 1
        assert counts[-2:].tolist() == [1, 2]
        assert counts.sum() == 5


def test_level_counts_are_those_of_the_rows(frame, parquet):
    levels, counts = duckdb_level_counts(parquet, ["job"], by="y")["job"]
    for level, row in zip(levels, counts, strict=False):
        mine = frame["job"] == level
        assert row.tolist() == [(mine & (frame["y"] == 0)).sum(), (mine & (frame["y"] == 1)).sum()]
    assert counts.sum() == 4000
    assert counts[-1].sum() == 80


def test_psi_of_all_columns_is_that_of_each(frame, parquet):
    later = frame.assign(age=frame["age"] + 3)
    cuts = {"age": [30.0, 40.0, 50.0], "n": [10.0, 20.0]}
    tests = duckdb_psi(parquet, duckdb.from_df(later), ["age", "n"], cuts=cuts, smoothing=0.0)

    def counts(values, borders):
        code = np.searchsorted(borders, values, side="left")
        code[np.isnan(values)] = len(borders) + 1
        kept = np.bincount(code, minlength=len(borders) + 2)
        return kept[: len(kept) if np.isnan(values).any() else -1]

    for name, borders in cuts.items():
        base, current = (counts(f[name].to_numpy(float), borders) for f in (frame, later))
        assert tests[name] == psi_test(base, current)
    assert tests["age"].p_value < 1e-6
    assert tests["n"].psi == 0.0
    assert set(duckdb_psi(parquet, parquet)) == {"age", "n", 'odd "name"', "y"}


def test_cuts_are_near_the_quantiles_although_sampled():
    table = duckdb.sql("SELECT range AS x FROM range(200000)")
    cuts = duckdb_cuts(table, ["x"], num_bins=4, sample_rows=5000)["x"]
    # the standard error of a quartile of 5,000 uniforms is 0.006
    np.testing.assert_allclose(cuts / 200_000, [0.25, 0.5, 0.75], atol=0.025)


@pytest.mark.parametrize("method", ["xgboost", "quantile", "optimal"])
def test_a_binner_fitted_in_the_database_is_the_one_fitted_in_memory(frame, parquet, method):
    inside = WoEBinner(method=method).fit_duckdb(parquet, "y")
    features = frame.drop(columns="y")
    outside = WoEBinner(method=method).fit(features, frame["y"])
    np.testing.assert_allclose(inside.transform(features), outside.transform(features))
    np.testing.assert_allclose(inside.iv_, outside.iv_)
    assert inside.classes_.tolist() == [0, 1]


def test_sql_scores_like_python(frame, parquet):
    binner = WoEBinner(method="optimal").fit_duckdb(parquet, "y")
    relation = duckdb.read_parquet(str(parquet))
    query = ", ".join(f"{text} AS c{i}" for i, text in enumerate(binner.to_sql().values()))
    inside = relation.project(query).fetchnumpy()
    outside = binner.transform(frame.drop(columns="y"))
    for place in range(4):
        np.testing.assert_allclose(inside[f"c{place}"], outside[:, place])


def test_errors_name_the_argument(parquet):
    with pytest.raises(ValueError, match="no column"):
        duckdb_bin_counts(parquet, {"income": [1.0]})
    with pytest.raises(ValueError, match="rising"):
        duckdb_bin_counts(parquet, {"age": [2.0, 1.0]})
    with pytest.raises(ValueError, match="two classes"):
        duckdb_bin_counts(parquet, {"age": [2.0]}, by="n")
    with pytest.raises(ValueError, match="missing values"):
        duckdb_bin_counts(parquet, {"n": [2.0]}, by="job")
    with pytest.raises(TypeError, match="source must be"):
        duckdb_bin_counts(3, {"age": [2.0]})
    with pytest.raises(ValueError, match="no column 'default'"):
        WoEBinner().fit_duckdb(parquet, "default")
    with pytest.raises(ValueError, match="columns must be one or more of"):
        WoEBinner().fit_duckdb(parquet, "y", ["age", "income"])
    with pytest.raises(TypeError, match="columns must be column names, got 3"):
        WoEBinner().fit_duckdb(parquet, "y", [3])
    with pytest.raises(TypeError, match="cuts must map column names to cuts"):
        duckdb_bin_counts(parquet, [2.0])
    with pytest.raises(ValueError, match="by: the source has no column"):
        duckdb_bin_counts(parquet, {"age": [2.0]}, by="income")
    with pytest.raises(TypeError, match="by must be column names, got None"):
        duckdb_level_counts(parquet, ["job"], by=None)
    with pytest.raises(TypeError, match="base must be the path"):
        duckdb_psi(None, parquet)
    with pytest.raises(ValueError, match="columns: the source has no column"):
        duckdb_psi(parquet, parquet, ["income"])


@pytest.mark.parametrize("content", [None, b"", b"PAR1 and no more", b"x" * 100])
def test_a_file_that_is_no_parquet_is_an_error_naming_it(content, tmp_path):
    from steelyard.tabular.duckdb_counts import open_relation

    file = tmp_path / "table.parquet"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"source must be a Parquet file, got .*table\.parquet: "):
        open_relation(file)
