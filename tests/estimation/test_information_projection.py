"""Projections on exponential families, the risk of their estimates, and the p-n criterion."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import digamma
from torch.autograd.functional import jacobian

from steelyard.estimation import (
    ExponentialFamily,
    GaussianGraphicalFamily,
    bayes_error_risk,
    binary_state_probs,
    information_projection,
    minimum_sample_size,
    pairwise_binary_family,
    pn_criterion,
    risk_expansion,
    risk_from_cumulants,
    tic_penalty,
)

quick = settings(deadline=None, max_examples=25)
few = settings(deadline=None, max_examples=6)
seeds = st.integers(0, 2**31)


def problem(seed, points=7, p=2):
    """A family on a few points, and a law that is not in it."""
    g = torch.Generator().manual_seed(seed)
    statistics = torch.randn(points, p, dtype=torch.float64, generator=g)
    base = 0.2 + torch.rand(points, dtype=torch.float64, generator=g)
    truth = 0.1 + torch.rand(points, dtype=torch.float64, generator=g)
    return ExponentialFamily(statistics, base), truth / truth.sum()


def derivatives(family, theta):
    """Second to fourth derivatives of the log-normaliser, by automatic differentiation."""

    def gradient(t):
        return torch.autograd.grad(family.log_normalizer(t), t, create_graph=True)[0]

    def second(t):
        return jacobian(gradient, t, create_graph=True)

    def third(t):
        return jacobian(second, t, create_graph=True)

    theta = theta.clone().requires_grad_()
    return (f.detach() for f in (second(theta), third(theta), jacobian(third, theta)))


def along(family, theta, *directions):
    """Derivative of the log-normaliser in one direction after another."""
    theta = theta.clone().requires_grad_()
    value = family.log_normalizer(theta)
    for direction in directions:
        value = torch.autograd.grad(value, theta, create_graph=True)[0] @ direction
    return value.detach()


def check_cumulants(family, theta):
    g = torch.Generator().manual_seed(0)
    u, v, w = torch.randn(3, family.size, dtype=torch.float64, generator=g)
    close = {"rtol": 1e-8, "atol": 1e-10}
    torch.testing.assert_close(family.mean(theta) @ u, along(family, theta, u), **close)
    second = torch.einsum("ab,a,b->", family.covariance(theta), u, v)
    torch.testing.assert_close(second, along(family, theta, u, v), **close)
    third = torch.einsum("abc,a,b,c->", family.third_cumulant(theta), u, v, w)
    torch.testing.assert_close(third, along(family, theta, u, v, w), **close)
    pairs = torch.outer(u, u) + torch.outer(v, v)
    mixed = along(family, theta, u, u, v, v)
    fourth = along(family, theta, u, u, u, u) + along(family, theta, v, v, v, v) + 2 * mixed
    torch.testing.assert_close(family.fourth_contraction(theta, pairs), fourth, **close)


def data(seed, rows=60, d=2):
    g = torch.Generator().manual_seed(seed)
    mix = torch.eye(d, dtype=torch.float64) + 0.4 * torch.rand(
        d, d, dtype=torch.float64, generator=g
    )
    rows = torch.randn(rows, d, dtype=torch.float64, generator=g)
    return (rows + 0.3 * rows**2) @ mix + 1


# Families


@few
@given(seeds)
def test_moments_are_the_derivatives_of_the_log_normaliser(seed):
    family, truth = problem(seed, p=3)
    check_cumulants(family, information_projection(family, truth).theta)


@pytest.mark.parametrize("edges", [None, [], [(0, 2)]])
def test_cumulants_of_the_gaussian_family_are_its_derivatives(edges):
    family = GaussianGraphicalFamily(3, edges)
    check_cumulants(family, information_projection(family, data(1, d=3)).theta)


def test_a_family_evaluates_many_members_at_once():
    family, _ = problem(0)
    thetas = torch.tensor([[0.0, 0.0], [1.0, -1.0]], dtype=torch.float64)
    assert family.probs(thetas).shape == (2, 7)
    torch.testing.assert_close(family.covariance(thetas)[1], family.covariance(thetas[1]))
    torch.testing.assert_close(family.mean(thetas)[1], family.mean(thetas[1]))
    torch.testing.assert_close(family.log_probs(thetas).exp(), family.probs(thetas))


def test_probabilities_of_extreme_members_are_finite():
    family, _ = problem(0)
    theta = torch.tensor([1e4, -1e4], dtype=torch.float64)
    assert torch.isfinite(family.log_normalizer(theta))
    torch.testing.assert_close(family.probs(theta).sum(), torch.tensor(1.0, dtype=torch.float64))


def test_first_derivatives_of_the_family():
    family, _ = problem(2)
    theta = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    for function in (family.log_normalizer, family.mean, family.covariance, family.log_probs):
        assert torch.autograd.gradcheck(function, (theta,))


# Projections


@quick
@given(seeds)
def test_the_projection_matches_the_means_and_no_member_is_nearer(seed):
    family, truth = problem(seed)
    theta, eta = information_projection(family, truth)
    torch.testing.assert_close(family.mean(theta), truth @ family.statistics, rtol=0, atol=1e-10)
    torch.testing.assert_close(eta, truth @ family.statistics)
    g = torch.Generator().manual_seed(seed)
    for _ in range(5):
        other = theta + torch.randn(2, dtype=torch.float64, generator=g)
        to_best = (truth * (truth.log() - family.log_probs(theta))).sum()
        to_other = (truth * (truth.log() - family.log_probs(other))).sum()
        # Pythagoras: the third side is the divergence between the members
        torch.testing.assert_close(to_other, to_best + family.kl(theta, other))
        plain = (family.probs(theta) * (family.log_probs(theta) - family.log_probs(other))).sum()
        torch.testing.assert_close(family.kl(theta, other), plain, rtol=1e-9, atol=1e-12)


def test_projection_has_the_derivative_of_the_implicit_function():
    family, truth = problem(3)
    logits = truth.log().requires_grad_()

    def projected(z):
        return information_projection(family, z.softmax(0)).theta

    assert torch.autograd.gradcheck(projected, (logits,))


def test_the_pairwise_model_is_the_maximum_likelihood_fit_of_a_general_optimiser():
    g = torch.Generator().manual_seed(0)
    shared = torch.rand(300, 1, generator=g) < 0.5
    rows = (torch.rand(300, 3, generator=g) < 0.3 + 0.4 * shared).long()
    family = pairwise_binary_family(3, edges=[(0, 1), (1, 2)])
    theta, eta = information_projection(family, binary_state_probs(rows))
    x = rows.double()
    expected = torch.cat(
        [x.mean(0), torch.stack([(x[:, 0] * x[:, 1]).mean(), (x[:, 1] * x[:, 2]).mean()])]
    )
    torch.testing.assert_close(eta, expected)

    def loss(t):
        t = torch.tensor(t, requires_grad=True)
        value = family.log_normalizer(t) - t @ expected
        value.backward()
        return value.item(), t.grad.numpy()

    peer = minimize(loss, np.zeros(5), jac=True, method="BFGS", options={"gtol": 1e-10})
    np.testing.assert_allclose(theta.numpy(), peer.x, atol=1e-6)


@pytest.mark.parametrize(
    "edges", [None, [(0, 1), (1, 2), (2, 3)], [(0, 1), (1, 2), (2, 3), (0, 3)]]
)
def test_the_gaussian_projection_has_the_moments_on_edges_and_no_precision_off_them(edges):
    rows = data(2, d=4)
    family = GaussianGraphicalFamily(4, edges)
    theta = information_projection(family, rows).theta
    mu, v = family.moments(theta)
    sample = torch.cov(rows.T, correction=0)
    torch.testing.assert_close(mu, rows.mean(0))
    for i in range(4):
        for j in range(i, 4):
            if i == j or edges is None or (i, j) in edges:
                torch.testing.assert_close(v[i, j], sample[i, j])
            else:
                assert abs(float(family.precision(theta)[i, j])) == 0.0
    if edges is None:
        torch.testing.assert_close(family.precision(theta), torch.linalg.inv(sample))


def test_gaussian_divergence_is_that_of_torch():
    family = GaussianGraphicalFamily(3)
    a, b = (information_projection(family, data(seed, d=3)).theta for seed in (0, 1))
    laws = [torch.distributions.MultivariateNormal(*family.moments(t)) for t in (a, b)]
    torch.testing.assert_close(family.kl(a, b), torch.distributions.kl_divergence(*laws))


# Risk


@few
@given(seeds)
def test_expansion_is_that_of_the_differentiated_dual(seed):
    family, truth = problem(seed)
    theta = information_projection(family, truth).theta

    def dual2(t):
        return torch.linalg.inv(family.covariance(t))

    def dual3(t):
        slope = jacobian(dual2, t, create_graph=True)
        return torch.einsum("ija,ak->ijk", slope, dual2(t))

    dual4 = torch.einsum("ijka,al->ijkl", jacobian(dual3, theta), dual2(theta))
    sigma, kappa = family.truth_cumulants(truth)
    c1 = (dual2(theta) * sigma).sum() / 2
    c2 = (dual3(theta) * kappa).sum() / 3
    c2 = c2 + 3 / 8 * torch.einsum("ijkl,ij,kl->", dual4, sigma, sigma)
    got = risk_expansion(family, truth)
    torch.testing.assert_close(got.c1, c1, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(got.c2, c2, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [1.0, 2.5])
def test_exponential_model_of_a_gamma_law_has_its_exact_risk(shape):
    def cube(value, order):
        return torch.full((1,) * order, value, dtype=torch.float64)

    # mean 1: the model's cumulants are 1, -2 (of -x), 6; the truth's 1/k, -2/k^2
    c1, c2 = risk_from_cumulants(
        cube(1.0, 2), cube(-2.0, 3), cube(6.0, 4), cube(1 / shape, 2), cube(-2 / shape**2, 3)
    )
    assert float(c1) == pytest.approx(1 / (2 * shape), rel=1e-12)
    assert float(c2) == pytest.approx(11 / (12 * shape**2), rel=1e-12)
    n = 1000.0
    exact = digamma(n * shape) - math.log(n * shape) + 1 / (n * shape - 1)
    assert n**2 * (exact - float(c1) / n) == pytest.approx(float(c2), rel=0.01)


def test_normal_model_of_a_normal_law_has_its_exact_risk():
    family = GaussianGraphicalFamily(1)
    theta = torch.tensor([1.4, -0.35], dtype=torch.float64)
    second, third, fourth = derivatives(family, theta)
    c1, c2 = risk_from_cumulants(second, third, fourth, second, third)
    assert float(c1) == pytest.approx(1.0, rel=1e-12)
    assert float(c2) == pytest.approx(61 / 12, rel=1e-10)
    n = 1000.0
    exact = (digamma((n - 1) / 2) + math.log(2 / n) + (n + 1) / (n - 3) - 1) / 2
    assert n**2 * (exact - 1 / n) == pytest.approx(61 / 12, rel=0.02)


def test_a_normal_location_has_no_second_term():
    zero = torch.zeros(2, 2, 2, dtype=torch.float64)
    model = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    truth = torch.tensor([[1.0, -0.3], [-0.3, 3.0]], dtype=torch.float64)
    c1, c2 = risk_from_cumulants(model, zero, torch.zeros(2, 2, 2, 2).double(), truth, zero + 1)
    torch.testing.assert_close(c1, torch.linalg.solve(model, truth).trace() / 2)
    assert float(c2) == 0.0


@few
@given(seeds)
def test_a_true_model_costs_half_a_parameter_each(seed):
    family, truth = problem(seed)
    theta = information_projection(family, truth).theta
    inside = family.probs(theta)
    c1, c2 = risk_expansion(family, inside)
    assert float(c1) == pytest.approx(1.0, rel=1e-9)  # p = 2
    second, third, fourth = derivatives(family, theta)
    inverse = torch.linalg.inv(second)
    traced = torch.einsum("abe,ab->e", third, inverse)
    raised = torch.einsum("abc,ai,bj,ck->ijk", third, inverse, inverse, inverse)
    short = 10 * (third * raised).sum() + 9 * traced @ inverse @ traced
    short = short - 9 * torch.einsum("abcd,ab,cd->", fourth, inverse, inverse)
    torch.testing.assert_close(c2, short / 24, rtol=1e-6, atol=1e-8)


@quick
@given(seeds)
def test_coordinates_of_the_statistics_do_not_matter(seed):
    family, truth = problem(seed)
    turn = torch.tensor([[2.0, 1.0], [-0.5, 1.0]], dtype=torch.float64)
    other = ExponentialFamily(family.statistics @ turn + 3.0, family.base)
    for a, b in zip(risk_expansion(family, truth), risk_expansion(other, truth), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_independent_blocks_add():
    (first, p), (second, q) = problem(0, points=4, p=1), problem(1, points=5, p=2)
    statistics = torch.cat(
        [
            first.statistics.repeat_interleave(5, 0),
            second.statistics.repeat(4, 1),
        ],
        1,
    )
    both = ExponentialFamily(statistics, torch.outer(first.base, second.base).flatten())
    total = risk_expansion(both, torch.outer(p, q).flatten())
    parts = [risk_expansion(first, p), risk_expansion(second, q)]
    torch.testing.assert_close(total.c1, parts[0].c1 + parts[1].c1)
    torch.testing.assert_close(total.c2, parts[0].c2 + parts[1].c2)


def test_the_expansion_predicts_measured_divergences():
    # 150 resamples: the standard error of the mean is about 5 %, and the band four of them
    family = pairwise_binary_family(3)
    g = torch.Generator().manual_seed(0)
    truth = 0.4 + torch.rand(8, dtype=torch.float64, generator=g)
    truth = truth / truth.sum()
    best = information_projection(family, truth).theta
    c1, c2 = (float(c) for c in risk_expansion(family, truth))
    n, losses = 200, []
    for _ in range(150):
        drawn = torch.multinomial(truth, n, replacement=True, generator=g)
        law = torch.bincount(drawn, minlength=8).double() / n
        losses.append(float(family.kl(best, information_projection(family, law).theta)))
    assert np.mean(losses) == pytest.approx(c1 / n + c2 / n**2, rel=0.2)


def test_takeuchi_is_the_trace_of_the_sandwich():
    family, truth = problem(5)
    theta = information_projection(family, truth).theta
    curvature = -jacobian(
        lambda t: jacobian(lambda u: truth @ family.log_probs(u), t, create_graph=True), theta
    )
    scores = jacobian(family.log_probs, theta)
    outer = scores.mT @ (truth.unsqueeze(1) * scores)
    expected = torch.linalg.solve(curvature, outer).trace()
    torch.testing.assert_close(tic_penalty(family, truth), expected)
    torch.testing.assert_close(tic_penalty(family, truth), 2 * risk_expansion(family, truth).c1)


def test_takeuchi_of_the_normal_model_is_a_function_of_the_kurtosis():
    rows = data(7, d=1)
    centred = rows - rows.mean()
    kurtosis = (centred**4).mean() / (centred**2).mean() ** 2
    got = tic_penalty(GaussianGraphicalFamily(1), rows)
    torch.testing.assert_close(got, 1 + (kurtosis - 1) / 2)


def test_takeuchi_has_its_derivative():
    family, truth = problem(6)
    logits = truth.log().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: tic_penalty(family, z.softmax(0)), (logits,))


# The criterion


def test_threshold_and_smallest_sample():
    assert bayes_error_risk(0.05) == pytest.approx(0.02)
    assert bayes_error_risk(0.025) == pytest.approx(0.005)
    assert minimum_sample_size(7.476, 67.4, 0.05) == 383
    assert minimum_sample_size(torch.tensor(4.0), torch.tensor(0.0), 0.05) == 200
    assert minimum_sample_size(1.0, -1e6, 0.05) == 1


@quick
@given(st.floats(0.01, 50), st.floats(-20, 500), st.floats(0.01, 0.3))
def test_smallest_sample_fits_and_one_less_does_not(c1, c2, epsilon):
    n, limit = minimum_sample_size(c1, c2, epsilon), bayes_error_risk(epsilon)
    assert c1 / n + c2 / n**2 <= limit * (1 + 1e-9)
    if c1 * c1 + 4 * limit * c2 >= 0 and n > 1:
        below = n - 1
        assert c1 / below + c2 / below**2 > limit * (1 - 1e-9)
    if c2 >= 0:
        assert n >= c1 / limit - 1e-6
    assert minimum_sample_size(c1, c2, min(1.2 * epsilon, 0.49)) <= n


@quick
@given(seeds)
def test_the_best_test_gains_at_most_what_the_risk_allows(seed):
    family, truth = problem(seed)
    theta = information_projection(family, truth).theta
    other = theta + torch.tensor([0.2, -0.1], dtype=torch.float64)
    p, q = family.probs(theta), family.probs(other)
    gain = 0.5 - torch.minimum(p, q).sum() / 2
    assert float(gain) <= math.sqrt(float(family.kl(theta, other)) / 8) + 1e-12


def test_criterion_reports_all_it_used():
    rows = data(3, rows=500, d=3)
    family = GaussianGraphicalFamily(3)
    result = pn_criterion(family, rows)
    c1, c2 = (float(c) for c in risk_expansion(family, rows))
    assert (result.c1, result.c2) == pytest.approx((c1, c2))
    assert result.risk == pytest.approx(c1 / 500 + c2 / 500**2)
    assert result.bayes_error_gap == pytest.approx(math.sqrt(result.risk / 8))
    assert result.tic == pytest.approx(float(tic_penalty(family, rows)))
    assert result.accept == (result.risk <= 0.02) == (result.minimum_n <= 500)
    assert pn_criterion(family, rows, 10**6).accept
    loose = pn_criterion(family, rows, threshold=10.0)
    assert loose.accept
    assert loose.threshold == 10.0


def test_criterion_says_what_makes_it_doubtful():
    family, truth = problem(0)
    assert pn_criterion(family, truth, 10_000).notes == ()
    few = pn_criterion(family, truth, 2).notes
    assert any("fewer than 10 rows for each of 2 parameters" in note for note in few)
    nearly = ExponentialFamily(
        torch.cat([family.statistics, family.statistics[:, :1] + 1e-5 * family.base[:, None]], 1)
    )
    assert any("nearly dependent" in note for note in pn_criterion(nearly, truth, 1000).notes)
    skewed = ExponentialFamily(torch.tensor([[0.0], [1.0]]).double())
    rare = torch.tensor([0.999, 0.001], dtype=torch.float64)
    assert any(
        "too small for the expansion" in note for note in pn_criterion(skewed, rare, 50).notes
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_results_come_in_the_dtype_of_the_truth(dtype):
    family, truth = problem(4)
    narrow = ExponentialFamily(family.statistics.to(dtype), family.base.to(dtype))
    low = (truth * 1024).round().div(1024)
    low[0] += 1 - low.sum()  # sixteenths of a thousand are exact in float16
    result = risk_expansion(narrow, low.to(dtype))
    assert result.c1.dtype == dtype
    exact = risk_expansion(narrow.to(torch.float64), low)
    torch.testing.assert_close(result.c1.double(), exact.c1, rtol=2e-3, atol=0)


def test_impossible_points_do_not_take_part():
    family, truth = problem(8)
    statistics = torch.cat([family.statistics, torch.tensor([[50.0, 50.0]]).double()])
    base = torch.cat([family.base, torch.zeros(1).double()])
    wider = ExponentialFamily(statistics, base)
    for a, b in zip(
        risk_expansion(family, truth),
        risk_expansion(wider, torch.cat([truth, torch.zeros(1).double()])),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="truth_probs must be 0 where base is 0"):
        information_projection(wider, torch.full((8,), 1 / 8, dtype=torch.float64))


def test_errors_name_what_is_wrong():
    family, truth = problem(0)
    coin = ExponentialFamily(torch.tensor([[0.0], [1.0]]).double())
    with pytest.raises(ValueError, match="lie on the edge of what the statistics can reach"):
        information_projection(coin, torch.tensor([1.0, 0.0]).double())
    with pytest.raises(ValueError, match=r"truth_probs must have shape \[7\], got \[6\]"):
        risk_expansion(family, truth[:6])
    with pytest.raises(ValueError, match="truth_probs must sum to 1"):
        risk_expansion(family, truth * 2)
    with pytest.raises(ValueError, match="got a negative number or NaN"):
        risk_expansion(family, truth * torch.nan)
    with pytest.raises(ValueError, match=r"must not depend on one another, got rank 1 of 2"):
        ExponentialFamily(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
    with pytest.raises(ValueError, match=r"statistics must not be empty"):
        ExponentialFamily(torch.zeros(0, 2))
    with pytest.raises(ValueError, match="base must not be negative"):
        ExponentialFamily(family.statistics, -family.base)
    with pytest.raises(ValueError, match="must be finite"):
        ExponentialFamily(family.statistics * torch.inf)
    with pytest.raises(TypeError, match="statistics must have a floating dtype"):
        ExponentialFamily(torch.eye(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"theta must have shape \[\.\.\., 2\]"):
        family.probs(torch.zeros(3).double())
    with pytest.raises(ValueError, match="n must be given with a law"):
        pn_criterion(family, truth)
    with pytest.raises(ValueError, match=r"epsilon must be > 0\.0 and < 0\.5"):
        bayes_error_risk(0.5)
    with pytest.raises(ValueError, match=r"c1 must be >= 0\.0"):
        minimum_sample_size(-1.0, 0.0, 0.05)
    with pytest.raises(ValueError, match="edges must be pairs i < j below nodes = 2"):
        pairwise_binary_family(2, [(1, 0)])
    with pytest.raises(ValueError, match="nodes must be <= 20"):
        pairwise_binary_family(21)
    with pytest.raises(ValueError, match="data must hold 0 and 1 only"):
        binary_state_probs(torch.tensor([[0, 2]]))
    with pytest.raises(ValueError, match="a variance of 0"):
        information_projection(GaussianGraphicalFamily(1), torch.ones(5, 1).double())
    with pytest.raises(ValueError, match="must be finite rows of data"):
        information_projection(GaussianGraphicalFamily(1), torch.ones(5, 1).double() * torch.nan)
    with pytest.raises(ValueError, match="positive definite"):
        risk_from_cumulants(*(torch.zeros((1,) * k).double() for k in (2, 3, 4, 2, 3)))
