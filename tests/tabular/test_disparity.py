"""Budgets, approval rates and score bins."""

import math

import numpy as np
import pytest

from steelyard.tabular import adverse_impact_ratio, fairness_probability, score_pre_bins


def test_the_published_example():
    assert 1 - fairness_probability(0.066, 0.0069, 0.05) == pytest.approx(0.9898, abs=5e-5)


def test_the_probability_is_the_rule_with_a_quantile():
    iv, se = 0.04, 0.006
    assert fairness_probability(iv, se, iv + 1.6448536269514722 * se) == pytest.approx(0.95)


def test_without_uncertainty_it_is_a_step_and_arrays_broadcast():
    np.testing.assert_array_equal(fairness_probability([0.1, 0.2, 0.3], 0.0, 0.2), [1.0, 1.0, 0.0])


def test_adverse_impact_is_strict_and_can_exceed_one():
    scores, groups = [0.1, 0.2, 0.3, 0.1, 0.2, 0.9], [1, 1, 1, 0, 0, 0]
    assert adverse_impact_ratio(scores, groups, 0.2) == pytest.approx(1.0)
    assert adverse_impact_ratio(scores, groups, 0.35) == pytest.approx(1.5)


def test_score_bins_count_everyone_once_from_the_riskiest():
    random = np.random.default_rng(0)
    score = random.random(5000).round(2)  # ties
    bad, group = random.random(5000) < score, random.integers(0, 2, 5000)
    table = score_pre_bins(score, bad, group, num_bins=10)
    assert table.shape == (10, 4)
    assert table[:, :2].sum() == table[:, 2:].sum() == 5000
    rate = table[:, 1] / table[:, :2].sum(1)
    assert (np.diff(rate) < 0).all()
    order = np.argsort(-score, kind="stable")[: int(table[0, :2].sum())]
    assert table[0, 1] == bad[order].sum()


@pytest.mark.parametrize(
    ("scores", "groups", "cutoff", "message"),
    [
        ([0.1, 0.2], [1, 1], 0.5, "groups must hold both"),
        ([0.1, 0.2], [0, 2], 0.5, "groups must hold both"),
        ([0.1, 0.9], [1, 0], 0.5, "reference group"),
        ([0.1, math.nan], [1, 0], 0.5, "NaN"),
        ([0.1], [1, 0], 0.5, "one shape"),
    ],
)
def test_wrong_groups_are_named(scores, groups, cutoff, message):
    with pytest.raises(ValueError, match=message):
        adverse_impact_ratio(scores, groups, cutoff)


def test_wrong_numbers_are_named():
    with pytest.raises(ValueError, match="se must be"):
        fairness_probability(0.1, -1.0, 0.2)
    with pytest.raises(ValueError, match="bad must hold"):
        score_pre_bins([0.1, 0.2], [0, 3], [0, 1])
    with pytest.raises(ValueError, match="scores"):
        score_pre_bins([0.1, math.nan], [0, 1], [0, 1])
