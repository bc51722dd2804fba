"""Tails of the noncentral chi-square against multiprecision, scipy and counting; the fit."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special, stats

from steelyard.estimation import (
    empirical_inductive_bias,
    inductive_bias,
    satterthwaite,
    scaled_ncx2_fit,
)

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)
degrees = st.floats(0.5, 500)
shifts = st.floats(0, 500)
fractions = st.floats(0.02, 2)


def nats_at(x, df, nc):
    """-log P(chi2_df(nc) <= x) by the Poisson mixture of incomplete gamma functions."""
    y, a, rate = (mpmath.mpf(v) / 2 for v in (x, df, nc))
    total, largest, j = mpmath.mpf(0), mpmath.mpf(0), 0
    term_of_poisson = mpmath.exp(-rate)
    # P(a + 1, y) = P(a, y) - y^a e^-y / Gamma(a + 1): it cancels, hence the many digits
    gamma = mpmath.gammainc(a, 0, y, regularized=True)
    step = y**a * mpmath.exp(-y) / mpmath.gamma(a + 1)
    while True:
        term = term_of_poisson * gamma
        total, largest = total + term, max(largest, term)
        if term < largest * mpmath.mpf(10) ** -30 and j > min(float(rate), 50):
            return float(-mpmath.log(total))
        gamma, j = gamma - step, j + 1
        step *= y / (a + j)
        term_of_poisson *= rate / j


CASES = [
    (20.0, 400.0, 300.0),
    (1.0, 3.0, 0.0),
    (1e-3, 3.0, 5.0),
    (0.5, 0.3, 200.0),
    (30.0, 40.0, 1e-8),
    (500.0, 400.0, 300.0),
    (690.0, 400.0, 300.0),
    (900.0, 1000.0, 0.0),
    (1500.0, 20.0, 1400.0),
    (50.0, 3.0, 5.0),
]


@pytest.mark.parametrize(("x", "df", "nc"), CASES)
def test_exact_tail_agrees_with_many_digits(x, df, nc):
    with mpmath.workdps(400):
        expected = nats_at(x, df, nc)
    assert inductive_bias(x, df, nc, 1.0).item() == pytest.approx(expected, rel=1e-11, abs=1e-13)


def test_the_published_case_by_every_method():
    values = [
        inductive_bias(0.02, 400.0, 300.0, 0.001, method=method).item()
        for method in ("exact", "saddlepoint", "sankaran", "reference")
    ]
    assert values == pytest.approx([555.335, 555.33, 452.6, 448.3], rel=1e-4)


@quick
@given(fractions, degrees, shifts)
def test_exact_is_scipy_where_scipy_has_digits(fraction, df, nc):
    x = fraction * (df + nc)
    probability = stats.ncx2.cdf(x, df, nc) if nc else stats.chi2.cdf(x, df)
    if 1e-8 < probability < 1:
        got = inductive_bias(x, df, nc, 1.0).item()
        assert got == pytest.approx(-math.log(probability), rel=1e-7, abs=1e-9)


@quick
@given(degrees, shifts, st.floats(1e-3, 10))
def test_bias_falls_with_the_error_from_infinity_to_zero(df, nc, scale):
    errors = torch.linspace(0, 3, 40, dtype=torch.float64) * (df + nc) * scale
    errors = torch.cat([errors, torch.tensor([math.inf], dtype=torch.float64)])
    for method in ("exact", "saddlepoint"):
        nats = inductive_bias(errors, df, nc, scale, method=method)
        assert nats[0] == math.inf
        assert nats[-1] == 0
        assert (nats[1:].diff() <= 1e-14).all()
        assert (nats >= 0).all()


@quick
@given(degrees, shifts, fractions, st.floats(1e-4, 1e4))
def test_a_change_of_unit_changes_nothing(df, nc, fraction, unit):
    error = torch.tensor(fraction * (df + nc), dtype=torch.float64)
    got = inductive_bias(error * unit, df, nc, unit)
    torch.testing.assert_close(got, inductive_bias(error, df, nc, 1.0), rtol=1e-9, atol=1e-12)


@quick
@given(degrees, fractions)
def test_without_noncentrality_it_is_a_gamma_law(df, fraction):
    expected = special.gammainc(df / 2, fraction * df / 2)
    if expected > 1e-300:
        got = inductive_bias(fraction * df, df, 0.0, 1.0).item()
        assert got == pytest.approx(-math.log(expected), rel=1e-9, abs=1e-12)


@quick
@given(st.floats(30, 500), shifts, st.floats(0.05, 1))
def test_saddlepoint_is_within_one_percent_from_one_nat_on(df, nc, fraction):
    exact = inductive_bias(fraction * (df + nc), df, nc, 1.0).item()
    nearby = inductive_bias(fraction * (df + nc), df, nc, 1.0, method="saddlepoint").item()
    if exact >= 1:
        assert nearby == pytest.approx(exact, rel=0.01)


def test_reference_rises_again_above_the_mean_where_the_answer_is_zero():
    errors = torch.tensor([1.0, 1.5, 2.0], dtype=torch.float64) * 700
    assert (inductive_bias(errors, 400.0, 300.0, 1.0)[1:] < 1e-9).all()
    published = inductive_bias(errors, 400.0, 300.0, 1.0, method="reference")
    assert published[0] < 0.01
    assert 10 < published[1] < published[2]


def test_reference_drops_the_logarithm_of_the_normal_tail():
    sankaran, reference = (
        inductive_bias(400.0, 400.0, 300.0, 1.0, method=method).item()
        for method in ("sankaran", "reference")
    )
    z = math.sqrt(2 * reference)
    assert sankaran - reference == pytest.approx(math.log(z * math.sqrt(2 * math.pi)), abs=0.02)


def test_tails_of_thousands_of_nats_are_finite_and_far_sums_are_refused():
    assert inductive_bias(5.0, 2000.0, 10.0, 1.0).item() == pytest.approx(5003.32246, rel=1e-8)
    assert 1e5 < inductive_bias(1e-3, 1e4, 1e5, 1.0) < math.inf
    with pytest.raises(ValueError, match='method="saddlepoint"'):
        inductive_bias(1e13, 1e13, 1.0, 1.0)
    assert torch.isfinite(inductive_bias(0.9e13, 1e13, 1.0, 1.0, method="saddlepoint"))


@pytest.mark.parametrize("method", ["exact", "saddlepoint", "sankaran", "reference"])
def test_gradients_reach_every_parameter(method):
    logs = torch.tensor([0.8, 1.1, 0.9, -0.3], dtype=torch.float64, requires_grad=True)

    def nats(p):
        error, df, nc, scale = p.exp()
        return inductive_bias(error, 3 * df, 2 * nc, scale, method=method)

    assert torch.autograd.gradcheck(nats, logs)
    # many degrees of freedom, where the sums start far from 0; and no noncentrality
    for fixed in ((150.0, 120.0), (60.0, 0.0)):
        error = torch.tensor(140.0, dtype=torch.float64, requires_grad=True)
        df, nc = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in fixed)
        slope = torch.autograd.grad(inductive_bias(error, df, nc, 1.0, method=method), (error, df))
        for place in range(2):
            h = [1e-4 * (i == place) for i in range(2)]
            up = inductive_bias(140.0 + h[0], fixed[0] + h[1], fixed[1], 1.0, method=method)
            down = inductive_bias(140.0 - h[0], fixed[0] - h[1], fixed[1], 1.0, method=method)
            assert slope[place].item() == pytest.approx(((up - down) / 2e-4).item(), rel=1e-5)


def test_slope_in_the_noncentrality_is_right_at_zero():
    nc = torch.zeros((), dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(inductive_bias(3.0, 5.0, nc, 1.0), nc)[0].item()
    step = (inductive_bias(3.0, 5.0, 1e-6, 1.0) - inductive_bias(3.0, 5.0, 0.0, 1.0)) / 1e-6
    assert slope == pytest.approx(step.item(), rel=1e-5)


@quick
@given(seeds, st.integers(1, 20))
def test_counting_with_weights_is_enumeration_of_a_finite_space(seed, size):
    g = torch.Generator().manual_seed(seed)
    errors = torch.randint(0, 5, (size,), generator=g).double()
    law = torch.rand(size, dtype=torch.float64, generator=g).softmax(0)
    for level in range(5):
        nats = empirical_inductive_bias(float(level), errors, weights=law).nats
        mass = sum(w for w, e in zip(law.tolist(), errors.tolist(), strict=True) if e <= level)
        assert nats.item() == pytest.approx(-math.log(mass) if mass else math.inf, abs=1e-12)


@quick
@given(seeds)
def test_bias_of_an_event_is_that_of_a_wider_one_and_the_rest(seed):
    g = torch.Generator().manual_seed(seed)
    errors = torch.rand(50, dtype=torch.float64, generator=g)
    tight, wide = errors.quantile(0.2).item(), errors.quantile(0.7).item()
    whole = empirical_inductive_bias(tight, errors).nats
    first = empirical_inductive_bias(wide, errors).nats
    rest = empirical_inductive_bias(tight, errors[errors <= wide]).nats
    torch.testing.assert_close(whole, first + rest, rtol=1e-12, atol=1e-12)


def test_counting_agrees_with_the_law_and_knows_its_error():
    # 10^5 draws; five standard errors: false alarms below 1e-6 a level
    g = torch.Generator().manual_seed(0)
    z = torch.randn(100_000, 6, dtype=torch.float64, generator=g)
    z[:, 0] += 2.0
    errors = 0.1 * z.square().sum(1)
    levels = torch.tensor([0.25, 0.5, 1.0, 2.0], dtype=torch.float64)
    counted = empirical_inductive_bias(levels, errors)
    exact = inductive_bias(levels, 6.0, 4.0, 0.1)
    assert exact[0] > 3
    assert ((counted.nats - exact).abs() < 5 * counted.standard_error).all()
    share = counted.nats.neg().exp()
    expected = torch.sqrt((1 - share) / (100_000 * share))
    torch.testing.assert_close(counted.standard_error, expected, rtol=1e-9, atol=0)


def test_counting_at_its_ends():
    errors = torch.tensor([0.5, 1.0])
    none = empirical_inductive_bias(0.1, errors)
    assert none.nats == none.standard_error == math.inf
    everyone = empirical_inductive_bias(1.0, errors)
    assert everyone.nats == everyone.standard_error == 0
    assert everyone.nats.dtype == torch.float32


@quick
@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_two_moments_are_matched(mean, variance):
    df, scale = satterthwaite(mean, variance)
    assert (df * scale).item() == pytest.approx(mean, rel=1e-12)
    assert (2 * df * scale**2).item() == pytest.approx(variance, rel=1e-12)


def draws(df, nc, size, seed):
    rng = np.random.default_rng(seed)
    law = stats.ncx2(df, nc) if nc else stats.chi2(df)
    return torch.from_numpy(0.01 * law.rvs(size=size, random_state=rng))


def log_likelihood(errors, df, nc, scale):
    x = errors.numpy() / scale
    density = stats.ncx2.logpdf(x, df, nc) if nc > 0 else stats.chi2.logpdf(x, df)
    return density.sum() - len(errors) * math.log(scale)


@pytest.mark.parametrize(("df", "nc"), [(3.0, 2.0), (60.0, 0.0), (40.0, 60.0)])
def test_fit_is_at_least_as_likely_as_a_direct_search(df, nc):
    errors = draws(df, nc, 800, 2)
    fit = scaled_ncx2_fit(errors)
    ours = log_likelihood(errors, *(float(v) for v in fit[:3]))

    def loss(p):
        value = -log_likelihood(errors, *np.exp(p))
        return value if math.isfinite(value) else 1e10

    start = np.log([df, max(nc, 0.5), 0.01])
    found = optimize.minimize(loss, start, method="Nelder-Mead", options={"maxiter": 600})
    assert ours >= -found.fun - 1e-6


def test_fit_recovers_the_law_within_its_standard_errors():
    # Five standard errors of an asymptotically normal estimate: false alarms below 1e-6 each.
    errors = draws(3.0, 2.0, 4000, 0)
    fit = scaled_ncx2_fit(errors)
    for value, name, truth in zip(fit[:3], fit.standard_error, (3.0, 2.0, 0.01), strict=True):
        error = fit.standard_error[name]
        assert 0 < error < value
        assert abs(value - truth) < 5 * error
    for level, tolerance in ((0.005, 0.15), (0.001, 0.3)):
        exact = inductive_bias(level, 3.0, 2.0, 0.01).item()
        estimate = inductive_bias(level, *fit[:3]).item()
        assert estimate == pytest.approx(exact, abs=tolerance)


def test_a_third_parameter_must_earn_its_place_if_asked():
    errors = draws(60.0, 0.0, 500, 1)
    plain = scaled_ncx2_fit(errors, min_gain=1e9)
    assert plain.noncentrality == 0
    free = scaled_ncx2_fit(errors)
    gain = log_likelihood(errors, *map(float, free[:3])) - log_likelihood(
        errors, *map(float, plain[:3])
    )
    assert gain >= -1e-9
    mean = errors.mean().item()
    assert (plain.df * plain.scale).item() == pytest.approx(mean, rel=1e-6)  # score of a gamma law
    assert all(torch.isfinite(v) and v > 0 for v in plain.standard_error.values())


def test_fit_follows_the_unit_of_the_errors():
    errors = draws(3.0, 2.0, 500, 4)
    one, thousand = scaled_ncx2_fit(errors), scaled_ncx2_fit(1000 * errors)
    for a, b, unit in zip(one[:3], thousand[:3], (1, 1, 1000), strict=True):
        assert b.item() == pytest.approx(unit * a.item(), rel=1e-6)
    ratio = thousand.standard_error["scale"] / one.standard_error["scale"]
    assert ratio.item() == pytest.approx(1000, rel=1e-4)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="test_error must be >= 0"):
        inductive_bias(-0.1, 1.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="df must be > 0"):
        inductive_bias(0.1, 0.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="noncentrality must be >= 0"):
        inductive_bias(0.1, 1.0, math.nan, 1.0)
    with pytest.raises(ValueError, match="scale must be > 0"):
        inductive_bias(0.1, 1.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="method must be one of"):
        inductive_bias(0.1, 1.0, 0.0, 1.0, method="normal")
    with pytest.raises(TypeError, match="df must have a floating dtype"):
        inductive_bias(0.1, torch.tensor(3), 0.0, 1.0)
    errors = torch.tensor([0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="errors must not be empty"):
        empirical_inductive_bias(0.1, errors[:0])
    with pytest.raises(ValueError, match="got NaN"):
        empirical_inductive_bias(0.1, errors * math.nan)
    with pytest.raises(ValueError, match="weights must be >= 0"):
        empirical_inductive_bias(0.1, errors, weights=-errors)
    with pytest.raises(ValueError, match="sum of weights must be > 0"):
        empirical_inductive_bias(0.1, errors, weights=0 * errors)
    with pytest.raises(ValueError, match="variance must be > 0"):
        satterthwaite(1.0, 0.0)
    with pytest.raises(ValueError, match="number of errors must be >= 3"):
        scaled_ncx2_fit(errors[:2])
    with pytest.raises(ValueError, match="errors must be > 0"):
        scaled_ncx2_fit(errors - 0.1)
    with pytest.raises(ValueError, match="not all equal"):
        scaled_ncx2_fit(torch.ones(5))
