from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.lab.claims import (
    Claim,
    _iqm_of_sorted,
    interquartile_mean,
    judge,
    paired_bootstrap,
)

numbers = st.floats(-1e3, 1e3, allow_subnormal=False)
samples = st.lists(numbers, min_size=1, max_size=12)
quick = settings(deadline=None, max_examples=50)


def reference_iqm(values: list[float]) -> float:
    """Integral of the quantile function over the middle half, in rational numbers."""
    ordered, n = sorted(map(Fraction, values)), len(values)
    total = Fraction(0)
    for rank, value in enumerate(ordered):
        low = max(Fraction(rank, n), Fraction(1, 4))
        high = min(Fraction(rank + 1, n), Fraction(3, 4))
        total += 2 * max(high - low, Fraction(0)) * value
    return float(total)


def runs(new: list[float], old: list[float]) -> dict[str, dict[str, float]]:
    return {str(i): {"new": a, "old": b} for i, (a, b) in enumerate(zip(new, old, strict=True))}


def claim(**changes: object) -> Claim:
    fields = {"metric": "new", "baseline": "old", "direction": "higher"} | changes
    return Claim("new beats old", "here", **fields)


@quick
@given(samples)
def test_interquartile_mean_is_the_integral_of_the_middle_half(values):
    assert interquartile_mean(values) == pytest.approx(reference_iqm(values), rel=1e-9, abs=1e-9)


def test_interquartile_mean_of_a_multiple_of_four_is_the_trimmed_mean():
    from scipy.stats import trim_mean

    values = np.random.default_rng(0).standard_normal(16)
    assert interquartile_mean(values) == pytest.approx(trim_mean(values, 0.25), abs=1e-12)


@quick
@given(samples, numbers, st.floats(0.1, 10))
def test_interquartile_mean_and_interval_follow_translation_and_scale(values, shift, scale):
    moved = [scale * value + shift for value in values]
    tolerance = {"rel": 1e-9, "abs": 1e-8}
    expected = scale * interquartile_mean(values) + shift
    assert interquartile_mean(moved) == pytest.approx(expected, **tolerance)
    ends = [scale * end + shift for end in paired_bootstrap(values, resamples=200)]
    assert paired_bootstrap(moved, resamples=200) == pytest.approx(ends, **tolerance)


@quick
@given(samples, st.randoms())
def test_the_order_of_seeds_changes_nothing(values, random):
    shuffled = random.sample(values, len(values))
    assert interquartile_mean(shuffled) == interquartile_mean(values)
    assert paired_bootstrap(shuffled) == paired_bootstrap(values)


@quick
@given(samples)
def test_the_interval_holds_the_effect_and_stays_within_the_values(values):
    low, high = paired_bootstrap(values)
    assert min(values) <= low <= interquartile_mean(values) + 1e-9
    assert interquartile_mean(values) - 1e-9 <= high <= max(values)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 10])
def test_equal_differences_have_an_interval_of_no_width(count):
    assert paired_bootstrap([0.1] * count) == (0.1, 0.1)
    assert interquartile_mean([0.1] * count) == 0.1


def test_one_failed_seed_of_five_does_not_decide():
    assert interquartile_mean([8.0, 8.0, -1e6, 8.0, 8.0]) == 8.0


@pytest.mark.parametrize(("count", "coverage", "alarms"), [(3, 0.76, 0.12), (5, 0.91, 0.045)])
def test_coverage_and_false_alarms_are_what_the_docstring_says(count, coverage, alarms):
    experiments = np.sort(np.random.default_rng(7).standard_normal((1500, count)), axis=1)
    draws = np.sort(np.random.default_rng(0).integers(count, size=(2000, count)), axis=1)
    means = _iqm_of_sorted(experiments[:, draws])
    low, high = np.quantile(means, [0.025, 0.975], axis=1)
    assert np.mean((low <= 0) & (high >= 0)) == pytest.approx(coverage, abs=0.03)
    assert np.mean(low > 0) == pytest.approx(alarms, abs=0.025)


def test_a_clear_improvement_holds_and_its_opposite_fails():
    metrics = runs([3.0, 4.0, 5.0], [1.0, 1.0, 1.0])
    [better, worse] = judge([claim(), claim(direction="lower")], metrics)
    assert (better.verdict, better.effect, better.low, better.high) == ("HOLDS", 3.0, 2.0, 4.0)
    assert (worse.verdict, worse.effect, worse.low, worse.high) == ("FAILS", -3.0, -4.0, -2.0)


def test_an_interval_across_the_margin_is_undecided():
    [judged] = judge([claim(margin=1.0)], runs([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]))
    assert judged.verdict == "UNDECIDED"
    assert judged.low < 1.0 < judged.high


def test_pairing_removes_what_a_seed_does_to_both():
    seeds = np.array([0.0, 100.0, -50.0, 900.0])
    [judged] = judge([claim()], runs(list(seeds + 1), list(seeds)))
    assert (judged.verdict, judged.low, judged.high) == ("HOLDS", 1.0, 1.0)


def test_a_tie_with_another_method_is_no_improvement():
    [judged] = judge([claim()], runs([2.0] * 3, [2.0] * 3))
    assert (judged.verdict, judged.effect) == ("FAILS", 0.0)


def test_a_value_at_a_fixed_bound_meets_it():
    metrics = runs([0.5] * 3, [0.0] * 3)
    reached = [claim(baseline=0.5), claim(baseline=0.25, margin=0.25)]
    assert [judged.verdict for judged in judge(reached, metrics)] == ["HOLDS", "HOLDS"]


def test_a_negative_margin_states_not_worse_than():
    [judged] = judge([claim(margin=-1.0)], runs([1.5] * 3, [2.0] * 3))
    assert (judged.verdict, judged.effect) == ("HOLDS", -0.5)


def test_too_few_seeds_stay_undecided_and_say_so():
    [two] = judge([claim()], runs([3.0, 4.0], [1.0, 1.0]))
    assert (two.verdict, two.effect, two.note) == ("UNDECIDED", 2.5, "2 of at least 3 seeds")
    [one] = judge([claim(min_seeds=1)], runs([3.0], [1.0]))
    assert (one.verdict, one.effect, one.low, one.high) == ("UNDECIDED", 2.0, None, None)


def test_an_absent_metric_is_not_run():
    judged = judge([claim(metric="x"), claim(baseline="x")], runs([1.0] * 3, [0.0] * 3))
    assert [j.verdict for j in judged] == ["NOT RUN", "NOT RUN"]
    assert judged[0].effect is None
    assert judge([claim()], {})[0].verdict == "NOT RUN"


def test_a_seed_without_the_metric_is_left_out_and_named():
    metrics = runs([3.0] * 4, [1.0] * 4)
    del metrics["2"]["old"]
    [judged] = judge([claim()], metrics)
    assert (judged.verdict, judged.seeds, judged.note) == ("HOLDS", 3, "not measured for seed 2")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_an_error_naming_metric_and_seed(value):
    with pytest.raises(ValueError, match="metric 'old' of seed 1 must be finite"):
        judge([claim()], runs([1.0, 2.0, 3.0], [0.0, value, 0.0]))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"direction": "up"}, "direction"),
        ({"margin": float("nan")}, "margin"),
        ({"baseline": float("inf")}, "baseline"),
        ({"min_seeds": 0}, "min_seeds"),
    ],
)
def test_a_wrong_claim_is_an_error_naming_the_field(changes, name):
    with pytest.raises(ValueError, match=name):
        claim(**changes)


@pytest.mark.parametrize("values", [[], [[1.0]], [1.0, float("nan")]])
def test_wrong_values_are_errors(values):
    with pytest.raises(ValueError, match="values must be"):
        interquartile_mean(values)
    with pytest.raises(ValueError, match="differences must be"):
        paired_bootstrap(values)


def test_wrong_bootstrap_settings_are_errors():
    with pytest.raises(ValueError, match="level"):
        paired_bootstrap([1.0], level=1.0)
    with pytest.raises(ValueError, match="resamples"):
        paired_bootstrap([1.0], resamples=0)
