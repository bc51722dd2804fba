"""Kernel hypothesis spaces against direct conditioning, sampling, and the isotropic law."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.polynomial.legendre import leggauss

from steelyard.estimation import (
    empirical_inductive_bias,
    error_moments,
    exact_inductive_bias,
    inductive_bias,
    kernel_hypothesis_space,
    satterthwaite,
)

quick = settings(deadline=None, max_examples=20)
seeds = st.integers(0, 2**31)


def numbers(seed, *shapes):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, dtype=torch.float64, generator=g) for shape in shapes]


def covariance(seed, size, decay=1.0):
    """A random covariance with eigenvalues ``exp(-decay i)``."""
    (a,) = numbers(seed, (size, size))
    q = torch.linalg.qr(a).Q
    return q * torch.exp(-decay * torch.arange(size)) @ q.T


@quick
@given(seeds, st.integers(1, 6), st.integers(1, 5), st.integers(1, 3), st.floats(0.5, 2))
def test_space_is_the_joint_gaussian_conditioned_on_the_fit(seed, n, points, outputs, width):
    X, y, X_new, y_new = numbers(seed, (n, 2), (n, outputs), (points, 2), (points, outputs))
    everything = torch.cat([X, X_new])
    distance = (everything.unsqueeze(1) - everything).square().sum(2)
    joint = torch.exp(-distance / (2 * width**2)) + 1e-6 * torch.eye(n + points)
    precision = torch.linalg.inv(joint)  # conditioning, read from the precision matrix
    cov = torch.linalg.inv(precision[n:, n:])
    mean = -cov @ precision[n:, :n] @ y
    space = kernel_hypothesis_space(X, y, X_new, y_new, width, jitter=1e-6)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(space.mean, mean, **close)
    torch.testing.assert_close(space.covariance, cov - 1e-6 * torch.eye(points), **close)
    moments = error_moments(space.covariance, space.mean - y_new)
    torch.testing.assert_close(space.error_mean, moments.mean)
    torch.testing.assert_close(space.error_variance, moments.variance)


def test_without_data_it_is_the_prior_and_each_point_narrows_it():
    X, y, X_new = numbers(0, (6, 3), (6,), (8, 3))
    y_new = X_new[:, 0].sin()
    empty = kernel_hypothesis_space(X[:0], y[:0], X_new, y_new, 1.0)
    assert (empty.mean == 0).all()
    distance = torch.cdist(X_new, X_new)
    torch.testing.assert_close(empty.covariance, torch.exp(-distance.square() / 2))
    traces = [
        kernel_hypothesis_space(X[:n], y[:n], X_new, y_new, 1.0).covariance.trace()
        for n in range(7)
    ]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(traces))


def test_training_points_leave_nothing_open():
    X, y = numbers(1, (5, 2), (5,))
    space = kernel_hypothesis_space(X, y, X[:3], y[:3], 0.5)
    torch.testing.assert_close(space.mean, y[:3])
    assert space.covariance.abs().max() < 1e-13
    assert exact_inductive_bias(1e-9, space.covariance, space.mean - y[:3]) == 0


def test_moments_are_those_of_a_hundred_thousand_draws():
    # Relative standard errors of mean and variance are below 0.3 and 1.2 %; five of them.
    residual = numbers(3, (4, 3))[0]
    cov = covariance(2, 4)
    (z,) = numbers(4, (100_000, 4, 3))
    draws = residual + torch.linalg.cholesky(cov) @ z
    errors = draws.square().mean((1, 2))
    moments = error_moments(cov, residual)
    assert moments.mean.item() == pytest.approx(errors.mean().item(), rel=0.015)
    assert moments.variance.item() == pytest.approx(errors.var().item(), rel=0.06)


@quick
@given(seeds, st.integers(1, 5), st.integers(1, 4), st.floats(0.02, 1.5))
def test_isotropic_law_is_the_scaled_noncentral_chi_square(seed, points, outputs, fraction):
    (residual,) = numbers(seed, (points, outputs))
    c, size = 0.3, points * outputs
    cov = c * torch.eye(points, dtype=torch.float64)
    level = fraction * error_moments(cov, residual).mean
    expected = inductive_bias(level, float(size), residual.square().sum() / c, c / size)
    got = exact_inductive_bias(level, cov, residual, method="imhof")
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    if size > 3:
        near = exact_inductive_bias(level, cov, residual, method="saddlepoint")
        torch.testing.assert_close(near, expected, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("outputs", [1, 5])
def test_inversion_agrees_with_counting(outputs):
    # 4 * 10^5 draws, five standard errors at three levels: false alarms below 1e-5.
    residual = 0.3 * numbers(5, (6, outputs))[0]
    cov = covariance(6, 6, decay=0.7)
    (z,) = numbers(7, (400_000, 6, outputs))
    errors = (residual + torch.linalg.cholesky(cov) @ z).square().mean((1, 2))
    levels = errors.quantile(torch.tensor([0.002, 0.1, 0.8], dtype=torch.float64))
    counted = empirical_inductive_bias(levels, errors)
    exact = exact_inductive_bias(levels, cov, residual, method="imhof")
    assert ((counted.nats - exact).abs() < 5 * counted.standard_error).all()


@settings(deadline=None, max_examples=10)
@given(seeds, st.integers(1, 8), st.floats(0.0, 3))
def test_an_independent_test_point_adds_its_error(seed, size, decay):
    """P(Q + E <= x) is the integral of P(Q <= x - e) over the law of E, here exponential."""
    (residual,) = numbers(seed, (size, 2))
    cov = covariance(seed + 1, size, decay)
    level = 0.4 * error_moments(cov, residual).mean.item()
    # one more point with two outputs of variance 1/2 and no residual: e ~ exp(rate)
    block = torch.block_diag(cov, torch.full((1, 1), 0.5, dtype=torch.float64))
    longer = torch.cat([residual, torch.zeros(1, 2, dtype=torch.float64)])
    nats = exact_inductive_bias(level, block, longer, method="imhof")
    assume(nats < 25)  # where `auto` uses the inversion; deeper, the quadrature below is too coarse
    got = nats.neg().exp()
    rate = 2.0 * (size + 1)
    nodes, weights = (torch.from_numpy(a) for a in leggauss(40))
    left = level * (nodes + 1) / 2
    tail = exact_inductive_bias(left * (size + 1) / size, cov, residual, method="imhof")
    integrand = rate * torch.exp(-rate * (level - left) - tail)
    torch.testing.assert_close(got, (weights * integrand).sum() * level / 2, rtol=1e-4, atol=0)


@quick
@given(seeds, st.integers(10, 30), st.integers(1, 4), st.floats(0, 0.3))
def test_saddlepoint_is_within_one_percent_of_the_inversion_at_any_depth(
    seed, size, outputs, decay
):
    (residual,) = numbers(seed, (size, outputs))
    cov = covariance(seed, size, decay)
    mean = error_moments(cov, residual).mean
    levels = mean * torch.tensor([0.05, 0.2, 0.5, 0.8], dtype=torch.float64)
    exact = exact_inductive_bias(levels, cov, residual, method="imhof")
    near = exact_inductive_bias(levels, cov, residual, method="saddlepoint")
    far = exact > 1
    torch.testing.assert_close(near[far], exact[far], rtol=0.01, atol=0)
    auto = exact_inductive_bias(levels, cov, residual)
    torch.testing.assert_close(auto, torch.where(near < 25, exact, near), rtol=0, atol=0)


def test_bias_falls_with_the_error_to_zero_and_scales_with_the_unit():
    residual = numbers(8, (5, 2))[0]
    cov = covariance(9, 5)
    levels = torch.linspace(0, 6, 60, dtype=torch.float64)
    for method in ("imhof", "saddlepoint", "auto"):
        nats = exact_inductive_bias(levels, cov, residual, method=method)
        assert nats[0] == math.inf
        assert (nats[1:].diff() <= 1e-12).all()
        assert 0 <= nats[-1] < 0.01
        scaled = exact_inductive_bias(9 * levels, 9 * cov, 3 * residual, method=method)
        torch.testing.assert_close(scaled[1:], nats[1:], rtol=1e-8, atol=1e-10)
    assert exact_inductive_bias(math.inf, cov, residual) == 0


def test_directions_without_freedom_cannot_be_chosen_away():
    # two points whose predictions move together, apart by 2: an error of 1 stays
    cov = torch.ones(2, 2, dtype=torch.float64)
    residual = torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert exact_inductive_bias(0.99, cov, residual) == math.inf
    # beyond it, 2 z^2 / 2 <= eps - 1
    expected = inductive_bias(0.5, 1.0, 0.0, 1.0)
    torch.testing.assert_close(exact_inductive_bias(1.5, cov, residual), expected)
    nothing = torch.zeros(2, 2, dtype=torch.float64)
    assert exact_inductive_bias(1.01, nothing, residual) == 0
    assert exact_inductive_bias(0.99, nothing, residual) == math.inf


def test_moment_fit_is_worse_than_the_exact_law_in_the_tail():
    residual = 0.1 * numbers(10, (20,))[0]
    cov = covariance(11, 20, decay=0.5)
    moments = error_moments(cov, residual)
    level = 0.05 * moments.mean
    exact = exact_inductive_bias(level, cov, residual, method="imhof")
    df, scale = satterthwaite(moments.mean, moments.variance)
    fitted = inductive_bias(level, df, 0.0, scale)
    assert (fitted / exact - 1).abs() > 0.1


def test_vectors_and_columns_agree_in_every_dtype():
    X, y, X_new, y_new = numbers(12, (4, 2), (4,), (3, 2), (3,))
    flat = kernel_hypothesis_space(X, y, X_new, y_new, 1.0)
    column = kernel_hypothesis_space(X, y.unsqueeze(1), X_new, y_new.unsqueeze(1), 1.0)
    torch.testing.assert_close(flat.mean, column.mean.squeeze(1))
    torch.testing.assert_close(flat.error_variance, column.error_variance)
    single = kernel_hypothesis_space(X.float(), y.float(), X_new.float(), y_new.float(), 1.0)
    assert {x.dtype for x in single} == {torch.float32}
    torch.testing.assert_close(single.mean.double(), flat.mean, rtol=1e-3, atol=1e-4)
    nats = exact_inductive_bias(0.5, single.covariance, single.mean - y_new.float())
    assert nats.dtype == torch.float32


def test_gradients_reach_data_and_bandwidth():
    data = [x.requires_grad_() for x in numbers(13, (3, 2), (3, 2), (2, 2), (2, 2))]
    width = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *a: kernel_hypothesis_space(*a[:4], a[4], jitter=1e-3)[2:], (*data, width)
    )


def test_errors_name_the_argument():
    X, y = torch.zeros(3, 2), torch.zeros(3)
    with pytest.raises(ValueError, match="not positive definite with jitter 0"):
        kernel_hypothesis_space(X, y, X, y, 1.0)
    with pytest.raises(ValueError, match="bandwidth must be > 0"):
        kernel_hypothesis_space(X, y, X, y, 0.0)
    with pytest.raises(ValueError, match=r"X_train must have shape \[any, 2\]"):
        kernel_hypothesis_space(X[:, :1], y, X, y, 1.0)
    with pytest.raises(ValueError, match=r"y_train must have the outputs of y_test"):
        kernel_hypothesis_space(X, y, X, y.unsqueeze(1), 1.0)
    with pytest.raises(ValueError, match=r"y_test must have shape \[3\]"):
        kernel_hypothesis_space(X, y, X, y[:2], 1.0)
    with pytest.raises(ValueError, match="X_test must not be empty"):
        kernel_hypothesis_space(X, y, X[:0], y[:0], 1.0)
    with pytest.raises(ValueError, match="jitter must be >= 0"):
        kernel_hypothesis_space(X, y, X, y, 1.0, jitter=-1.0)
    with pytest.raises(ValueError, match=r"covariance must have shape \[3, 3\]"):
        error_moments(torch.zeros(3, 2), y)
    with pytest.raises(ValueError, match="test_error must be >= 0"):
        exact_inductive_bias(-1.0, torch.eye(3), y)
    with pytest.raises(ValueError, match="method must be one of"):
        exact_inductive_bias(1.0, torch.eye(3), y, method="davies")
    with pytest.raises(TypeError, match="residual must have a floating dtype"):
        error_moments(torch.eye(3), torch.zeros(3, dtype=torch.long))
