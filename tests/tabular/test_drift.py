"""Population stability: the size of the test, the agreement with IV, and many periods."""

import numpy as np
import pytest
from scipy import stats

from steelyard.tabular import iv_inference, psi, psi_over_time, psi_test


def test_the_test_is_the_scaled_chi_square_and_agrees_with_iv():
    base, current = [200, 300, 500], [180, 330, 490]
    test = psi_test(base, current, 0.01)
    assert test.psi == psi(base, current)
    assert test.critical == pytest.approx(stats.chi2.ppf(0.99, 2) * 2 / 1000)
    assert test.p_value == pytest.approx(iv_inference(base, current).p_value)
    assert (test.psi > test.critical) == (test.p_value < 0.01)


def test_psi_takes_shares_and_counts_alike():
    assert psi([0.25, 0.75], [0.5, 0.5]) == pytest.approx(psi([25, 75], [300, 300]), abs=1e-14)


def test_the_level_holds_and_a_fixed_threshold_means_nothing_in_small_samples():
    # 2,000 draws: the rate of a 5 % test is within 0.035 .. 0.065 (3 standard errors)
    random = np.random.default_rng(0)
    share = np.full(10, 0.1)
    base, current = random.multinomial(5000, share, 2000), random.multinomial(500, share, 2000)
    tests = [psi_test(b, c) for b, c in zip(base, current, strict=True)]
    assert np.mean([test.p_value < 0.05 for test in tests]) == pytest.approx(0.05, abs=0.015)
    assert np.mean([test.psi > 0.02 for test in tests]) > 0.3  # "not stable", without any drift


def test_twenty_rows_a_bin_are_too_few_for_the_exact_level():
    # 2,000 draws; the law is asymptotic, so the rate is a little above the level of 5 %
    random = np.random.default_rng(0)
    share = np.full(10, 0.1)
    base, current = random.multinomial(2000, share, 2000), random.multinomial(200, share, 2000)
    tests = [psi_test(b, c, smoothing=0.01) for b, c in zip(base, current, strict=True)]
    assert 0.055 < np.mean([test.p_value < 0.05 for test in tests]) < 0.09


def test_the_family_of_periods_has_one_false_alarm_rate():
    # 400 histories of 12 stable months: 5 % of them at most ring, plus 3 standard errors
    random = np.random.default_rng(1)
    share = np.full(5, 0.2)
    alarms = singles = 0
    for _ in range(400):
        base, months = random.multinomial(50_000, share), random.multinomial(1000, share, 12)
        drift = psi_over_time(base, months)
        alarms += drift.drifted.any()
        singles += (drift.p_value < 0.05).any()
    assert alarms / 400 < 0.085
    assert singles / 400 > 0.3


def test_adjusted_p_values_are_those_of_holm():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    random = np.random.default_rng(2)
    months = random.multinomial(300, [0.3, 0.3, 0.4], 8)
    drift = psi_over_time([310, 290, 400], months)
    expected = multitest.multipletests(drift.p_value, 0.05, method="holm")
    np.testing.assert_allclose(drift.adjusted_p_value, expected[1])
    np.testing.assert_array_equal(drift.drifted, expected[0])


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="current is empty in bin 1"):
        psi([1, 2], [3, 0])
    with pytest.raises(ValueError, match="two bins"):
        psi_test([5], [4])
    with pytest.raises(ValueError, match="alpha"):
        psi_test([5, 4], [4, 5], alpha=0)
    with pytest.raises(ValueError, match=r"periods\[1\] is empty in bin 0"):
        psi_over_time([5, 4], [[4, 5], [0, 5]])
    with pytest.raises(ValueError, match=r"periods must have shape \[T, J\]"):
        psi_over_time([5, 4], [4, 5])
