"""Weight of evidence and information value against their identities and by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from steelyard.tabular import iv_inference, psi, woe_table

quick = settings(deadline=None, max_examples=30)
seeds = st.integers(0, 2**31)


def counts(seed: int, bins: int = 6) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.integers(1, 300, bins), random.integers(1, 90, bins)


@quick
@given(seeds)
def test_iv_is_psi_and_the_sum_of_both_kl_and_symmetric(seed):
    good, bad = counts(seed)
    table = woe_table(good, bad)
    p, q = good / good.sum(), bad / bad.sum()
    assert table.iv == pytest.approx(stats.entropy(p, q) + stats.entropy(q, p), abs=1e-12)
    assert table.kl_good_bad == pytest.approx(stats.entropy(p, q), abs=1e-12)
    assert table.kl_bad_good == pytest.approx(stats.entropy(q, p), abs=1e-12)
    assert table.iv == pytest.approx(psi(good, bad), abs=1e-12)
    assert table.iv == pytest.approx(woe_table(bad, good).iv, abs=1e-12)
    assert table.iv == pytest.approx(table.iv_per_bin.sum(), abs=1e-12)


@quick
@given(seeds, st.integers(2, 9))
def test_iv_ignores_the_order_of_bins_and_the_number_of_goods(seed, factor):
    good, bad = counts(seed)
    order = np.random.default_rng(seed).permutation(len(good))
    iv = woe_table(good, bad).iv
    assert woe_table(good[order], bad[order]).iv == pytest.approx(iv, abs=1e-12)
    assert woe_table(factor * good, bad).iv == pytest.approx(iv, abs=1e-12)
    assert woe_table(good, factor * bad).iv == pytest.approx(iv, abs=1e-12)


@quick
@given(seeds, st.integers(0, 4))
def test_merging_bins_never_raises_a_divergence(seed, place):
    good, bad = counts(seed)
    merged = [np.add.reduceat(c, [i for i in range(6) if i != place + 1]) for c in (good, bad)]
    fine, coarse = woe_table(good, bad), woe_table(*merged)
    for name in ("iv", "kl_good_bad", "kl_bad_good", "js"):
        assert getattr(coarse, name) <= getattr(fine, name) + 1e-12


def test_merging_bins_of_equal_woe_changes_nothing():
    assert woe_table([10, 30, 60], [5, 15, 10]).iv == pytest.approx(
        woe_table([40, 60], [20, 10]).iv
    )


@quick
@given(seeds)
def test_js_is_bounded_by_log_two_and_by_an_eighth_of_iv(seed):
    good, bad = counts(seed)
    table = woe_table(good, bad)
    assert 0 <= table.js <= min(math.log(2), table.iv / 8) + 1e-12


def test_only_the_root_of_js_is_a_metric():
    laws = [np.array(law, dtype=float) for law in ([99, 1], [50, 50], [1, 99])]
    js = {(i, j): woe_table(laws[i], laws[j]).js for i in range(3) for j in range(3)}
    assert js[0, 2] > js[0, 1] + js[1, 2]
    assert math.sqrt(js[0, 2]) <= math.sqrt(js[0, 1]) + math.sqrt(js[1, 2])


def test_equal_shares_have_woe_and_iv_zero():
    table = woe_table([20, 60, 20], [10, 30, 10])
    np.testing.assert_allclose(table.woe, 0, atol=1e-12)
    assert table.iv == pytest.approx(0, abs=1e-15)
    inference = iv_inference([20, 60, 20], [10, 30, 10])
    assert inference.p_value == 1.0
    assert inference.debiased_iv == 0.0


@quick
@given(seeds, st.sampled_from([4.0, 9.0, 100.0]))
def test_more_rows_shrink_both_standard_errors_by_the_root(seed, factor):
    good, bad = counts(seed)
    for method in ("delta", "fixed"):
        few = iv_inference(good, bad, method=method)
        many = iv_inference(factor * good, factor * bad, method=method)
        assert many.iv == pytest.approx(few.iv, abs=1e-12)
        assert many.standard_error * math.sqrt(factor) == pytest.approx(few.standard_error)


def test_delta_standard_error_uses_the_derivative_of_iv():
    # finite differences of IV in the counts, then the covariance of two multinomials
    good, bad = np.array([120.0, 300.0, 80.0]), np.array([40.0, 30.0, 35.0])
    variance = 0.0
    for which, total in ((0, good.sum()), (1, bad.sum())):
        share = (good, bad)[which] / total
        slope = np.empty(3)
        for j in range(3):
            ends = []
            for step in (1e-6, -1e-6):
                moved = [good / good.sum(), bad / bad.sum()]
                moved[which] = moved[which].copy()
                moved[which][j] += step
                p, q = moved  # not renormalised: the variance removes the mean slope
                ends.append(((p - q) * np.log(p / q)).sum())
            slope[j] = (ends[0] - ends[1]) / 2e-6
        variance += (share @ slope**2 - (share @ slope) ** 2) / total
    assert iv_inference(good, bad).standard_error == pytest.approx(math.sqrt(variance), rel=1e-6)


def test_fixed_standard_error_is_the_published_formula():
    good, bad = np.array([400, 300, 100]), np.array([20, 40, 60])
    inference = iv_inference(good, bad, method="fixed")
    weight = bad / 120 - good / 800
    error = math.sqrt((weight**2 * (1 / good + 1 / bad)).sum())
    assert inference.standard_error == pytest.approx(error, abs=1e-14)
    assert inference.p_value == pytest.approx(stats.norm.sf(inference.iv / error))
    assert inference.interval == pytest.approx(
        (inference.iv - 1.959963984540054 * error, inference.iv + 1.959963984540054 * error)
    )


@pytest.mark.parametrize(("bins", "published"), [(2, 0.100), (5, 0.608), (10, 0.975)])
def test_the_chi_square_test_holds_five_percent_where_the_z_test_does_not(bins, published):
    # 2,000 draws: the rate of a 5 % test is within 0.035 .. 0.065 (3 standard errors)
    random = np.random.default_rng(bins)
    shares = np.full(bins, 1 / bins)
    draws = [random.multinomial(n, shares, size=2000) for n in (4250, 750)]
    rejected = {
        method: np.mean(
            [iv_inference(g, b, method=method).p_value < 0.05 for g, b in zip(*draws, strict=True)]
        )
        for method in ("delta", "fixed")
    }
    assert rejected["delta"] == pytest.approx(0.05, abs=0.015)
    assert rejected["fixed"] == pytest.approx(published, abs=0.035)


@pytest.mark.parametrize("strength", [0.45, 0.8])
def test_the_delta_interval_covers_where_the_published_one_does_not(strength):
    # 1,000 draws: coverage of a 95 % interval is within 0.93 .. 0.97 (3 standard errors)
    random = np.random.default_rng(7)
    p = np.full(5, 0.2)
    q = p * np.exp(strength * np.arange(-2, 3))
    q /= q.sum()
    truth = float(((p - q) * np.log(p / q)).sum())
    covered = {"delta": 0, "fixed": 0}
    for good, bad in zip(
        random.multinomial(4250, p, 1000), random.multinomial(750, q, 1000), strict=True
    ):
        for method in covered:
            low, high = iv_inference(good, bad, method=method, smoothing=0.01).interval
            covered[method] += low <= truth <= high
    assert 920 <= covered["delta"] <= 975
    assert covered["fixed"] < 800


def test_debiasing_removes_what_chance_adds():
    random = np.random.default_rng(3)
    draws = [random.multinomial(n, np.full(10, 0.1), size=2000) for n in (900, 600)]
    scale = 1 / 900 + 1 / 600
    mean = np.mean([psi(g, b) for g, b in zip(*draws, strict=True)])
    assert mean == pytest.approx(9 * scale, rel=0.05)
    one = iv_inference(draws[0][0], draws[1][0])
    assert one.debiased_iv == pytest.approx(max(0.0, one.iv - 9 * scale))
    assert one.degrees_of_freedom == 9


def test_two_bins_agree_with_the_pearson_chi_square():
    good, bad = np.array([5100, 4900]), np.array([1000, 1020])
    inference = iv_inference(good, bad)
    statistic = inference.iv / (1 / good.sum() + 1 / bad.sum())
    pearson = stats.chi2_contingency(np.stack([good, bad]), correction=False).statistic
    assert statistic == pytest.approx(pearson, rel=0.01)
    fixed = iv_inference(good, bad, method="fixed")
    assert fixed.z**2 == pytest.approx(pearson, rel=0.01)


def test_saturated_logistic_regression_has_the_woe_as_coefficients():
    sm = pytest.importorskip("statsmodels.api")
    good, bad = np.array([400, 300, 100]), np.array([20, 40, 60])
    bins, outcome = np.tile(np.eye(3), (2, 1)), np.repeat([0, 1], 3)
    weights = np.concatenate([good, bad])
    fit = sm.GLM(outcome, bins, sm.families.Binomial(), freq_weights=weights).fit(tol=1e-14)
    np.testing.assert_allclose(fit.params, np.log(bad / good), atol=1e-9)
    table = woe_table(good, bad)
    np.testing.assert_allclose(fit.bse, table.woe_standard_error, atol=1e-7)
    design = sm.add_constant(np.tile(table.woe, 2))
    slope = sm.GLM(outcome, design, sm.families.Binomial(), freq_weights=weights).fit(tol=1e-14)
    np.testing.assert_allclose(slope.params, [math.log(120 / 800), -1.0], atol=1e-9)


def test_smoothing_is_added_to_every_cell():
    smoothed = woe_table([9, 0], [1, 5], smoothing=0.5)
    assert smoothed.woe[1] == pytest.approx(math.log(0.5 / 10) - math.log(5.5 / 7))


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ([1, 0, 3], [1, 2, 3], "good is empty in bin 1"),
        ([1, 2, 3], [1, 2, 0], "bad is empty in bin 2"),
        ([0, 0], [1, 2], "good must hold at least one row"),
        ([1, -2], [1, 2], "good must be finite and >= 0"),
        ([1, 2], [1, math.nan], "bad must be finite and >= 0"),
        ([1, 2], [1, math.inf], "bad must be finite and >= 0"),
        ([1, 2], [1, 2, 3], r"bad must have the shape of good, \[2\], got \[3\]"),
        ([], [], r"good must have shape \[J\]"),
        ([[1, 2]], [[1, 2]], r"got \[1, 2\]"),
    ],
)
def test_wrong_counts_are_named(good, bad, message):
    with pytest.raises(ValueError, match=message):
        woe_table(good, bad)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="method"):
        iv_inference([1, 2], [2, 1], method="z")
    with pytest.raises(ValueError, match="level"):
        iv_inference([1, 2], [2, 1], level=1.0)
    with pytest.raises(ValueError, match="two bins"):
        iv_inference([3], [2])
    with pytest.raises(ValueError, match="smoothing"):
        woe_table([3], [2], smoothing=-1)
