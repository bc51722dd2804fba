"""Closed forms of mixtures against dense divergences, enumeration and quadrature."""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special, stats

from steelyard.estimation import (
    bernoulli_regret,
    bernoulli_weight,
    gaussian_regret,
    gaussian_weight,
    linear_regression_regret,
    online_regret,
)

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)
shapes = st.floats(0.2, 5)


def gaussian_kl(mean, cov_p, cov_q):
    """KL(N(mean, cov_p) || N(0, cov_q)) by dense matrices."""
    inverse = torch.linalg.inv(cov_q)
    log_dets = torch.logdet(cov_q) - torch.logdet(cov_p)
    return 0.5 * (log_dets + (inverse @ cov_p).trace() + mean @ inverse @ mean - len(mean))


@quick
@given(st.floats(0.01, 0.99), st.integers(1, 25), shapes, shapes)
def test_coin_regret_is_the_sum_over_the_regrets_of_the_beta_rule(truth, n, a, b):
    total = 0.0
    for seen in range(n):
        k = torch.arange(seen + 1).double()
        heads = (k + a) / (seen + a + b)
        kl = truth * torch.log(truth / heads) + (1 - truth) * torch.log((1 - truth) / (1 - heads))
        total += float(torch.from_numpy(stats.binom.pmf(k.numpy(), seen, truth)) @ kl)
    assert n * bernoulli_regret(truth, n, a=a, b=b).item() == pytest.approx(total, rel=1e-9)


def test_coin_regret_is_that_of_a_fine_grid():
    heads = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    grid = torch.stack([1 - heads, heads], 1)
    truth = torch.tensor([0.7, 0.3], dtype=torch.float64)
    expected = online_regret(grid, torch.full_like(heads, 1 / 2000), truth, 15)
    assert bernoulli_regret(0.3, 15).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_parameter_costs_half_a_log_of_the_sample():
    for a in (0.5, 1.0):
        excess = [
            n * bernoulli_regret(0.3, n, a=a, b=a).item() - 0.5 * math.log(n)
            for n in (100, 1000, 10_000, 100_000)
        ]
        assert max(excess) - min(excess) < 0.03
    # Jeffreys: 1/2 log(n / (2 pi e)) + log pi, whatever the truth
    limit = 0.5 * math.log(1 / (2 * math.pi * math.e)) + math.log(math.pi)
    for truth in (0.2, 0.5):
        got = 100_000 * bernoulli_regret(truth, 100_000, a=0.5, b=0.5).item()
        assert got - 0.5 * math.log(100_000) == pytest.approx(limit, abs=1e-3)


def test_sure_coins_cost_the_log_of_their_weight():
    assert 50 * bernoulli_regret(0.0, 50).item() == pytest.approx(math.log(51), rel=1e-12)
    batch = bernoulli_regret(torch.tensor([0.0, 1.0, 0.5]), 50)
    assert batch.dtype == torch.float32
    assert batch[0] == batch[1] > batch[2]


@quick
@given(st.floats(-3, 3), st.integers(1, 12), st.floats(0.1, 4), st.floats(0.01, 4))
def test_gaussian_regret_is_the_dense_divergence(truth, n, s2, t2):
    one = torch.ones(n, dtype=torch.float64)
    noise = s2 * torch.eye(n, dtype=torch.float64)
    expected = gaussian_kl(truth * one, noise, noise + t2 * torch.outer(one, one)) / n
    got = gaussian_regret(truth, n, noise_variance=s2, prior_variance=t2)
    assert got.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-11)


@quick
@given(seeds, st.integers(1, 8), st.integers(1, 12), st.floats(0.1, 3))
def test_regression_regret_is_the_dense_divergence(seed, n, d, s2):
    g = torch.Generator().manual_seed(seed)
    X, truth = (torch.randn(*s, dtype=torch.float64, generator=g) for s in ((n, d), (d,)))
    variance = torch.rand(d, dtype=torch.float64, generator=g)
    noise = s2 * torch.eye(n, dtype=torch.float64)
    expected = gaussian_kl(X @ truth, noise, noise + X * variance @ X.T) / n
    got = linear_regression_regret(X, truth, noise_variance=s2, prior_variance=variance)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_regression_on_a_constant_is_the_gaussian_mean():
    X, truth = torch.ones(7, 1).double(), torch.tensor([0.4], dtype=torch.float64)
    variance = torch.tensor([2.0]).double()
    got = linear_regression_regret(X, truth, noise_variance=0.5, prior_variance=variance)
    expected = gaussian_regret(0.4, 7, noise_variance=0.5, prior_variance=2.0)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_regret_is_flat_in_the_number_of_features_only_if_their_variances_decay():
    g = torch.Generator().manual_seed(0)
    X, truth = torch.randn(30, 600, generator=g).double(), torch.zeros(600).double()
    truth[:5] = 0.5

    def regret(d, variance):
        return linear_regression_regret(
            X[:, :d], truth[:d], noise_variance=1.0, prior_variance=variance
        ).item()

    decaying = torch.arange(1, 601).double() ** -3
    flat = regret(600, decaying) - regret(20, decaying[:20])
    spread = decaying.sum() / 600 * torch.ones(600).double()
    assert abs(flat) < 0.01 * regret(20, decaying[:20])
    assert regret(600, spread) > 1.5 * regret(20, decaying[:20])


def low_end(truth, epsilon):
    """Lower end of the ball around a coin, by another root finder."""

    def excess(theta):
        kl = special.rel_entr(truth, theta) + special.rel_entr(1 - truth, 1 - theta)
        return float(kl) - epsilon

    return optimize.brentq(excess, 1e-300, truth, xtol=1e-300, rtol=1e-15)


def edges(truth, epsilon):
    """Both ends; the upper one is the mirror image, for it may lie within rounding of 1."""
    return low_end(truth, epsilon), 1 - low_end(1 - truth, epsilon)


@quick
@given(st.floats(0.02, 0.98), st.floats(1e-3, 1), shapes, shapes)
def test_coin_weight_is_the_prior_mass_between_the_ends_of_the_ball(truth, epsilon, a, b):
    low, high = edges(truth, epsilon)
    mass = stats.beta.cdf(high, a, b) - stats.beta.cdf(low, a, b)
    assert bernoulli_weight(truth, epsilon, a=a, b=b).item() == pytest.approx(mass, rel=1e-8)


def test_coin_weight_keeps_relative_accuracy_for_tiny_balls_and_deep_tails():
    # width of the ball = 2 sqrt(2 eps theta (1 - theta)) to leading order; uniform density 1
    for epsilon in (1e-8, 1e-12, 1e-18):
        width = 2 * math.sqrt(2 * epsilon * 0.3 * 0.7)
        assert bernoulli_weight(0.3, epsilon).item() == pytest.approx(width, rel=10 * epsilon**0.5)
    # a peaked prior far from the ball, where the two cumulative functions differ by nothing
    for epsilon in (0.01, 1e-9):
        low, high = edges(0.9, epsilon)
        with mpmath.workdps(50):
            expected = mpmath.betainc(30, 70, low, high, regularized=True)
        got = bernoulli_weight(0.9, epsilon, a=30.0, b=70.0).item()
        assert 0 < got < 1e-30
        assert got == pytest.approx(float(expected), rel=1e-7)


def test_coin_weight_at_the_ends():
    # KL(0 || theta) = -log(1 - theta): the ball is [0, 1 - e^-eps]
    for epsilon in (1e-12, 0.3, 50.0):
        expected = -math.expm1(-epsilon)
        assert bernoulli_weight(0.0, epsilon).item() == pytest.approx(expected, rel=1e-12)
        assert bernoulli_weight(1.0, epsilon).item() == pytest.approx(expected, rel=1e-12)
    assert bernoulli_weight(0.4, 0.0) == 0
    assert bernoulli_weight(0.4, math.inf) == 1
    jeffreys = bernoulli_weight(0.0, 1e-6, a=0.5, b=0.5).item()
    assert jeffreys == pytest.approx(float(special.betainc(0.5, 0.5, -math.expm1(-1e-6))))


@quick
@given(st.floats(-4, 4), st.floats(1e-6, 5), st.floats(0.1, 3), st.floats(0.1, 3))
def test_gaussian_weight_is_the_prior_mass_of_an_interval(truth, epsilon, s2, t2):
    r, t = math.sqrt(2 * s2 * epsilon), math.sqrt(t2)
    sign = 1 if truth < 0 else -1  # take the difference in the smaller tails
    high, low = sorted((sign * (truth - r) / t, sign * (truth + r) / t), reverse=True)
    expected = stats.norm.cdf(high) - stats.norm.cdf(low)
    got = gaussian_weight(truth, epsilon, noise_variance=s2, prior_variance=t2).item()
    assert got == pytest.approx(expected, rel=1e-7)


def test_gaussian_weight_scales_with_the_root_of_the_radius():
    density = stats.norm.pdf(1.0)
    for epsilon in (1e-10, 1e-16, 1e-22):
        got = gaussian_weight(1.0, epsilon, noise_variance=1.0, prior_variance=1.0).item()
        assert got == pytest.approx(2 * math.sqrt(2 * epsilon) * density, rel=1e-9)


def test_weights_bound_the_regrets():
    radii = torch.logspace(-4, 0.5, 100, dtype=torch.float64)
    for n in (5, 50, 500):
        coin = (radii - bernoulli_weight(0.2, radii).log() / n).min()
        assert bernoulli_regret(0.2, n).double() <= coin
        settings_ = {"noise_variance": 1.0, "prior_variance": 2.0}
        mean = (radii - gaussian_weight(0.7, radii, **settings_).log() / n).min()
        assert gaussian_regret(0.7, n, **settings_) <= mean


def test_gradients():
    def coin(theta):
        return bernoulli_regret(theta.sigmoid(), 6, a=0.7, b=1.3)

    def mean(theta, s2, t2):
        return gaussian_regret(theta, 5, noise_variance=s2.exp(), prior_variance=t2.exp())

    def weight(theta, epsilon, s2, t2):
        return gaussian_weight(
            theta, epsilon.exp(), noise_variance=s2.exp(), prior_variance=t2.exp()
        )

    def regression(X, theta, variance):
        return linear_regression_regret(X, theta, noise_variance=0.7, prior_variance=variance.exp())

    g = torch.Generator().manual_seed(0)

    def numbers(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g).requires_grad_()

    assert torch.autograd.gradcheck(coin, numbers(3))
    assert torch.autograd.gradcheck(mean, (numbers(3), numbers(3), numbers(3)))
    assert torch.autograd.gradcheck(weight, (numbers(3), numbers(3), numbers(3), numbers(3)))
    for n, d in ((3, 5), (6, 2)):
        assert torch.autograd.gradcheck(regression, (numbers(n, d), numbers(d), numbers(d)))


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"truth must be in \[0, 1\]"):
        bernoulli_regret(1.2, 3)
    with pytest.raises(ValueError, match="truth must be >= 0"):
        bernoulli_weight(math.nan, 0.1)
    with pytest.raises(ValueError, match="a must be > 0"):
        bernoulli_regret(0.5, 3, a=0.0)
    with pytest.raises(ValueError, match="epsilon must be >= 0"):
        bernoulli_weight(0.5, -1.0)
    with pytest.raises(ValueError, match="noise_variance must be > 0"):
        gaussian_regret(0.5, 3, noise_variance=0.0, prior_variance=1.0)
    with pytest.raises(ValueError, match="prior_variance must be > 0"):
        gaussian_weight(0.5, 0.1, noise_variance=1.0, prior_variance=0.0)
    with pytest.raises(TypeError, match="truth must be a number or a tensor"):
        bernoulli_regret("half", 3)
    X = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"truth must have shape \[3\]"):
        linear_regression_regret(X, X[:, 0], noise_variance=1.0, prior_variance=X[0])
    with pytest.raises(ValueError, match="prior_variance must be >= 0"):
        linear_regression_regret(X, X[0], noise_variance=1.0, prior_variance=-X[0])
    with pytest.raises(ValueError, match="X must not be empty"):
        linear_regression_regret(X[:0], X[0], noise_variance=1.0, prior_variance=X[0])
