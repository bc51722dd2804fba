"""Cauchy-Schwarz divergences, MMD and HSIC against dense formulas, theorems and extremes.

The numbers in the section titles are those of the identities listed for Yu et al. (2024),
arXiv:2404.17951.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from torch.autograd import grad, gradcheck
from torch.distributions import MultivariateNormal, kl_divergence

from steelyard.divergences import (
    cauchy_schwarz_divergence,
    cauchy_schwarz_mutual_information,
    conditional_cauchy_schwarz,
    gaussian_cauchy_schwarz,
    hsic,
    median_bandwidth,
    mmd_squared,
)
from steelyard.divergences._blocks import row_blocks

seeds = st.integers(0, 10_000)
bandwidths = st.floats(0.2, 5.0)
quick = settings(deadline=None, max_examples=25)


def sample(n, d=2, seed=0, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed * 1000 + 17 * n + d)
    return (scale * torch.randn(n, d, generator=generator, dtype=torch.float64)).to(dtype)


def close(actual, expected, rtol=1e-9, atol=1e-9):
    if not isinstance(expected, torch.Tensor):
        expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


# --- the dense formulas, as they are written -------------------------------------------------


def kernel(a, b, bandwidth):
    return torch.exp(-(a[:, None] - b[None]).square().sum(-1) / (2 * bandwidth**2))


def three_means(x, y, s):
    return kernel(x, x, s).mean(), kernel(y, y, s).mean(), kernel(x, y, s).mean()


def dense_divergence(x, y, s):
    a, b, c = three_means(x, y, s)
    return a.log() + b.log() - 2 * c.log()


def dense_mmd(x, y, s):
    a, b, c = three_means(x, y, s)
    return a + b - 2 * c


def dense_conditional(x, y, y_hat, s_x, s_y, denominator="text"):
    k = kernel(x, x, s_x)
    below = k.sum(1).square() if denominator == "text" else k.square().sum(1)
    a, b, c = (
        ((k * kernel(u, v, s_y)).sum(1) / below).sum()
        for u, v in ((y, y), (y_hat, y_hat), (y_hat, y))
    )
    return a.log() + b.log() - 2 * c.log()


def dense_information(x, t, s_x, s_t):
    k, q, n = kernel(x, x, s_x), kernel(t, t, s_t), len(x)
    a, b, c = torch.trace(k @ q) / n**2, k.sum() * q.sum() / n**4, (k @ q).sum() / n**3
    return a.log() + b.log() - 2 * c.log()


def dense_normalized(x, t, s_x, s_t):
    own = dense_information(x, x, s_x, s_x) * dense_information(t, t, s_t, s_t)
    return dense_information(x, t, s_x, s_t) / own.sqrt()


def dense_hsic(x, t, s_x, s_t):
    n = len(x)
    centring = torch.eye(n, dtype=x.dtype) - 1 / n
    return torch.trace(kernel(x, x, s_x) @ centring @ kernel(t, t, s_t) @ centring) / n**2


def reference(x, y, y_hat, s_x, s_y, **options):
    return conditional_cauchy_schwarz(x, y, y_hat, s_x, s_y, denominator="reference", **options)


def normalized(x, t, s_x, s_t, **options):
    return cauchy_schwarz_mutual_information(x, t, s_x, s_t, normalized=True, **options)


TWO = (sample(7), 0.5 + sample(5))
PAIR = (sample(7, 3), sample(7, 2, seed=1))
TRIPLE = (sample(7, 3), sample(7, 2, seed=1), sample(7, 2, seed=2))
CASES = {
    "divergence": (cauchy_schwarz_divergence, dense_divergence, TWO, (0.8,)),
    "mmd": (mmd_squared, dense_mmd, TWO, (0.8,)),
    "conditional": (conditional_cauchy_schwarz, dense_conditional, TRIPLE, (1.3, 0.7)),
    "reference": (
        reference,
        lambda *a: dense_conditional(*a, denominator="reference"),
        TRIPLE,
        (1.3, 0.7),
    ),
    "information": (cauchy_schwarz_mutual_information, dense_information, PAIR, (1.3, 0.7)),
    "normalized": (normalized, dense_normalized, PAIR, (1.3, 0.7)),
    "hsic": (hsic, dense_hsic, PAIR, (1.3, 0.7)),
}
every_statistic = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@every_statistic
@pytest.mark.parametrize("block_size", [1, 3, 7, 100, None])
def test_blocks_give_the_value_and_gradient_of_the_dense_formula(case, block_size):
    function, dense, samples, widths = case
    leaves = [x.clone().requires_grad_() for x in samples]
    value, expected = function(*leaves, *widths, block_size=block_size), dense(*leaves, *widths)
    close(value, expected)
    for actual, wanted in zip(grad(value, leaves), grad(expected, leaves), strict=True):
        close(actual, wanted)


@every_statistic
def test_gradcheck_in_samples_and_bandwidths(case):
    function, _, samples, widths = case
    leaves = [x.clone().requires_grad_() for x in samples]
    leaves += [torch.tensor(w, dtype=torch.float64, requires_grad=True) for w in widths]
    assert gradcheck(lambda *a: function(*a, block_size=3), leaves)


@every_statistic
@pytest.mark.parametrize("moving", [0, -1])
def test_a_gradient_asked_of_one_sample_alone_is_the_same(case, moving):
    function, _, samples, widths = case
    everywhere = [x.clone().requires_grad_() for x in samples]
    expected = grad(function(*everywhere, *widths), everywhere)[moving]
    alone = list(samples)
    alone[moving] = samples[moving].clone().requires_grad_()
    close(grad(function(*alone, *widths), alone[moving])[0], expected)


@every_statistic
def test_float32_and_half_precision_follow_float64(case):
    function, _, samples, widths = case
    for dtype, rtol in ((torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)):
        low = [x.to(dtype).requires_grad_() for x in samples]
        high = [x.detach().double().requires_grad_() for x in low]
        value, expected = function(*low, *widths), function(*high, *widths)
        assert value.dtype == dtype
        close(value.double(), expected, rtol=rtol, atol=1e-6)
        gradient, wanted = grad(value, low)[-1], grad(expected, high)[-1]
        assert gradient.dtype == dtype
        close(gradient.double(), wanted, rtol=rtol, atol=rtol * wanted.abs().max().item())


@every_statistic
def test_non_contiguous_samples(case):
    function, _, samples, widths = case
    strided = [torch.stack([x, x + 1], -1)[..., 0] for x in samples]
    assert not strided[0].is_contiguous()
    close(function(*strided, *widths), function(*samples, *widths))


@every_statistic
def test_nan_in_a_sample_comes_out_as_nan(case):
    function, _, samples, widths = case
    for i, x in enumerate(samples):
        broken = list(samples)
        broken[i] = x.clone()
        broken[i][2, 1] = torch.nan
        assert function(*broken, *widths).isnan()


@every_statistic
def test_functional_transforms_and_compile(case):
    function, _, samples, widths = case

    def loss(x):
        return function(*samples[:-1], x, *widths, block_size=3)

    batch = torch.stack([samples[-1], samples[-1] + 0.3])
    close(torch.func.vmap(loss)(batch), torch.stack([loss(x) for x in batch]))
    gradients = torch.func.vmap(torch.func.grad(loss))(batch)
    leaf = batch[1].clone().requires_grad_()
    close(gradients[1], grad(loss(leaf), leaf)[0])
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    close(compiled(batch[0]), loss(batch[0]))


# --- 1. the sample divergence is that of the kernel density estimates ------------------------


def test_divergence_is_that_of_kernel_density_estimates_of_width_over_root_two():
    x, y, s = sample(5, 1), 0.7 + sample(4, 1), 0.9
    grid = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    h = s / math.sqrt(2)
    p, q = (torch.exp(-((grid - z) ** 2) / (2 * h * h)).mean(0) for z in (x, y))
    pp, qq, pq = (torch.trapezoid(f, grid) for f in (p * p, q * q, p * q))
    close(cauchy_schwarz_divergence(x, y, s), pp.log() + qq.log() - 2 * pq.log())


# --- 2. the angle between mean embeddings, and its invariances -------------------------------


@quick
@given(seeds, bandwidths, st.integers(1, 6), st.integers(1, 6))
def test_divergence_is_minus_two_log_cosine_and_non_negative(seed, s, m, n):
    x, y = sample(m, seed=seed), sample(n, seed=seed + 1)
    gram = kernel(torch.cat([x, y]), torch.cat([x, y]), s)
    features = torch.linalg.eigh(gram)
    features = features.eigenvectors * features.eigenvalues.clamp(min=0).sqrt()
    mu_p, mu_q = features[:m].mean(0), features[m:].mean(0)
    value = cauchy_schwarz_divergence(x, y, s)
    close(torch.exp(-value / 2), mu_p @ mu_q / (mu_p.norm() * mu_q.norm()), atol=1e-7)
    close(mmd_squared(x, y, s), (mu_p - mu_q).square().sum(), atol=1e-7)
    assert value >= -1e-12


@quick
@given(seeds, bandwidths)
def test_divergence_is_symmetric_and_invariant_under_permutation_and_rigid_motion(seed, s):
    x, y = sample(6, 3, seed), sample(4, 3, seed + 1)
    value = cauchy_schwarz_divergence(x, y, s)
    rotation = torch.linalg.qr(sample(3, 3, seed + 2)).Q
    close(cauchy_schwarz_divergence(y, x, s), value)
    close(cauchy_schwarz_divergence(x.flip(0), y, s), value)
    close(cauchy_schwarz_divergence(x @ rotation + 50, y @ rotation + 50, s), value)
    close(cauchy_schwarz_divergence(10 * x, 10 * y, 10 * s), value)


def test_divergence_and_mmd_vanish_only_for_equal_multisets():
    x = sample(6)
    for function in (cauchy_schwarz_divergence, mmd_squared):
        close(function(x, x.flip(0), 0.5), 0.0, atol=1e-14)
        close(function(x, x.repeat(3, 1), 0.5), 0.0, atol=1e-14)
        assert function(x, torch.cat([x[:5], x[:1]]), 0.5) > 1e-3


# --- 3, 4, 8. Gaussians -----------------------------------------------------------------------


def gaussian(d, seed):
    root = sample(d, d, seed)
    return sample(1, d, seed + 1)[0], root @ root.T + 0.1 * torch.eye(d, dtype=torch.float64)


def test_gaussian_form_is_the_quadrature_of_its_definition():
    numbers = torch.tensor([[0.3, 0.7], [-0.5, 1.4]], dtype=torch.float64)
    p, q = (torch.distributions.Normal(m, s) for m, s in numbers)
    grid = torch.linspace(-20, 20, 40_001, dtype=torch.float64)
    f, g = p.log_prob(grid).exp(), q.log_prob(grid).exp()
    ff, gg, fg = (torch.trapezoid(h, grid).log() for h in (f * f, g * g, f * g))
    (mean_p, cov_p), (mean_q, cov_q) = ((m[None], (s * s)[None, None]) for m, s in numbers)
    close(gaussian_cauchy_schwarz(mean_p, cov_p, mean_q, cov_q), ff + gg - 2 * fg)


@quick
@given(seeds, st.integers(1, 4))
def test_gaussian_form_equals_kl_for_equal_covariances(seed, d):
    (mean_p, cov), (mean_q, _) = gaussian(d, seed), gaussian(d, seed + 2)
    kl = kl_divergence(MultivariateNormal(mean_p, cov), MultivariateNormal(mean_q, cov))
    close(gaussian_cauchy_schwarz(mean_p, cov, mean_q, cov), kl, rtol=1e-8)


@quick
@given(seeds, st.integers(1, 4))
def test_half_form_is_at_most_both_kl_divergences(seed, d):
    p, q = gaussian(d, seed), gaussian(d, seed + 2)
    value = gaussian_cauchy_schwarz(*p, *q)
    close(gaussian_cauchy_schwarz(*q, *p), value)
    laws = MultivariateNormal(*p), MultivariateNormal(*q)
    smaller = min(kl_divergence(*laws), kl_divergence(*laws[::-1]))
    assert -1e-12 <= value / 2 <= smaller + 1e-9


def test_squared_form_can_exceed_the_kl_divergence():
    one = torch.ones(1, dtype=torch.float64)
    value = gaussian_cauchy_schwarz(0 * one, torch.diag(0.25 * one), 3 * one, torch.diag(one))
    kl = math.log(2) + (0.25 + 9) / 2 - 0.5
    close(value, 9 / 1.25 + math.log(1.25 / (2 * 0.5)))
    assert kl < 4.82
    assert value > 7.42


@quick
@given(st.floats(-0.99, 0.99))
def test_information_of_a_gaussian_pair_is_shannon_plus_log_one_minus_quarter_rho_squared(rho):
    zero, eye = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    joint = torch.tensor([[1.0, rho], [rho, 1.0]], dtype=torch.float64)
    shannon = -0.5 * math.log1p(-rho * rho)
    value = gaussian_cauchy_schwarz(zero, joint, zero, eye)
    close(value, shannon + math.log1p(-rho * rho / 4))
    assert value <= shannon + 1e-12


def test_sample_divergence_of_gaussians_approaches_the_form_of_the_smoothed_laws():
    s, n = 0.5, 4000
    x, y = sample(n), 1.0 + 0.5 * sample(n, seed=1)
    smooth = s * s / 2 * torch.eye(2, dtype=torch.float64)
    zero, eye = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    exact = gaussian_cauchy_schwarz(zero, eye + smooth, zero + 1, 0.25 * eye + smooth)
    close(cauchy_schwarz_divergence(x, y, s), exact, rtol=0.05)


def test_gaussian_gradients_and_half_precision():
    (mean_p, cov_p), (mean_q, cov_q) = gaussian(3, 0), gaussian(3, 5)
    leaves = [x.requires_grad_() for x in (mean_p, cov_p, mean_q, cov_q)]
    assert gradcheck(gaussian_cauchy_schwarz, leaves)
    low = gaussian_cauchy_schwarz(*(x.bfloat16() for x in leaves))
    assert low.dtype == torch.bfloat16
    close(low.double(), gaussian_cauchy_schwarz(*leaves), rtol=0.05)


# --- 5, 6, 7. mutual information and HSIC ------------------------------------------------------


def test_information_and_hsic_vanish_when_one_side_is_constant():
    x, constant = sample(8), torch.full((8, 2), 3.0, dtype=torch.float64)
    for function in (cauchy_schwarz_mutual_information, hsic, normalized):
        close(function(x, constant, 1.0, 1.0), 0.0, atol=1e-14)
        close(function(constant, x, 1.0, 1.0), 0.0, atol=1e-14)
        close(function(x, sample(8, seed=1), 1e9, 1.0), 0.0, atol=1e-14)


def test_normalised_information_has_a_zero_gradient_where_a_side_is_constant():
    x, t = sample(8).requires_grad_(), torch.ones(8, 2, dtype=torch.float64, requires_grad=True)
    for gradient in grad(normalized(x, t, 1.0, 1.0), (x, t)):
        close(gradient, torch.zeros(8, 2, dtype=torch.float64), atol=0.0)


@quick
@given(seeds, bandwidths, bandwidths)
def test_information_is_non_negative_symmetric_and_blind_to_a_common_permutation(seed, s_x, s_t):
    x, t = sample(6, 2, seed), sample(6, 3, seed + 1)
    for function in (cauchy_schwarz_mutual_information, hsic, normalized):
        value = function(x, t, s_x, s_t)
        assert value >= -1e-12
        close(function(t, x, s_t, s_x), value)
        close(function(x.flip(0), t.flip(0), s_x, s_t), value)
    assert hsic(x, x, s_x, s_x) >= hsic(x, x.roll(1, 0), s_x, s_x) - 1e-12


@quick
@given(seeds, bandwidths)
def test_normalised_information_of_a_sample_with_itself_is_one(seed, s):
    x = sample(6, 2, seed)
    close(normalized(x, x, s, s), 1.0)


# --- 9, 10, 11. the conditional term ------------------------------------------------------------


@pytest.mark.parametrize("denominator", ["text", "reference"])
def test_conditional_term_vanishes_for_perfect_predictions(denominator):
    x, y, _ = TRIPLE
    close(conditional_cauchy_schwarz(x, y, y, 1.3, 0.7, denominator=denominator), 0.0, atol=1e-14)


@pytest.mark.parametrize("denominator", ["text", "reference"])
def test_narrow_inputs_give_the_correntropy_loss_and_then_the_squared_error(denominator):
    x, y, y_hat = TRIPLE
    squared = (y_hat - y).square().sum(1)
    for narrow in (1e-4, 1e-8, 1e-30):
        value = conditional_cauchy_schwarz(x, y, y_hat, narrow, 0.7, denominator=denominator)
        close(value, -2 * torch.exp(-squared / (2 * 0.7**2)).mean().log())
    wide = conditional_cauchy_schwarz(x, y, y_hat, 1e-4, 1e3, denominator=denominator)
    close(wide * 1e6, squared.mean(), rtol=1e-5)


@pytest.mark.parametrize("denominator", ["text", "reference"])
def test_wide_inputs_give_the_unpaired_divergence(denominator):
    x, y, y_hat = TRIPLE
    value = conditional_cauchy_schwarz(x, y, y_hat, 1e9, 0.7, denominator=denominator)
    close(value, cauchy_schwarz_divergence(y, y_hat, 0.7))
    permuted = conditional_cauchy_schwarz(x, y, y.flip(0), 1e9, 0.7, denominator=denominator)
    close(permuted, 0.0, atol=1e-12)
    assert conditional_cauchy_schwarz(x, y, y.flip(0), 0.5, 0.7, denominator=denominator) > 0.1


def test_the_two_denominators_differ_between_the_limits():
    values = [f(*TRIPLE, 1.3, 0.7) for f in (conditional_cauchy_schwarz, reference)]
    assert abs(values[0] - values[1]) > 1e-3


def test_conditional_term_can_be_slightly_negative_and_is_not_clamped():
    values = [
        conditional_cauchy_schwarz(sample(6, 1, k), y, y + 0.01 * sample(6, 1, k + 99), 1.0, 1.0)
        for k in range(40)
        for y in [sample(6, 1, k + 50)]
    ]
    assert -0.05 < min(values) < -1e-6


def test_conditional_gradient_is_the_published_formula():
    x, y, y_hat = TRIPLE
    y_hat = y_hat.clone().requires_grad_()
    s_x, s_y = 1.3, 0.7
    k = kernel(x, x, s_x)
    below = k.sum(1, keepdim=True).square()
    r, p = k * kernel(y_hat, y_hat, s_y) / below, k * kernel(y_hat, y, s_y) / below
    own = ((r + r.T)[..., None] * (y_hat[None] - y_hat[:, None])).sum(1) / r.sum()
    cross = (p[..., None] * (y[None] - y_hat[:, None])).sum(1) / p.sum()
    value = conditional_cauchy_schwarz(x, y, y_hat, s_x, s_y)
    close(grad(value, y_hat)[0], (own - 2 * cross) / s_y**2)


@every_statistic
def test_a_duplicated_batch_has_the_same_value(case):
    function, _, samples, widths = case
    twice = [x.repeat(2, 1) for x in samples]
    close(function(*twice, *widths), function(*samples, *widths))


def test_code_in_bits_is_the_natural_value_over_log_two():
    x, y = sample(2, 1), sample(2, 1, seed=3)
    k, n = kernel(x, x, 1.0), 2
    q = kernel(y, y, 1.0)
    bits = torch.log2((k * q).sum() / n**2) + torch.log2(k.sum() * q.sum() / n**4)
    bits = bits - 2 * torch.log2((k.sum(0) * q.sum(1)).sum() / n**3)
    close(cauchy_schwarz_mutual_information(x, y, 1.0, 1.0), bits * math.log(2))


# --- extremes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_ten_thousand_bandwidths_apart_keep_value_and_gradient(dtype):
    x, y = sample(6, 2, dtype=dtype), sample(5, 2, seed=1, dtype=dtype) + 1e4
    x.requires_grad_()
    value = cauchy_schwarz_divergence(x, y, 1.0)
    high = x.detach().double().requires_grad_()
    k = -(high[:, None] - y[None].double()).square().sum(-1) / 2
    within = [kernel(z, z, 1.0).mean().log() for z in (high, y.double())]
    expected = sum(within) - 2 * (k.flatten().logsumexp(0) - math.log(30))
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    close(value.double(), expected, rtol=tolerance)
    close(grad(value, x)[0].double(), grad(expected, high)[0], rtol=tolerance, atol=1e-3)
    assert mmd_squared(x, y, 1.0) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_off_predictions_keep_a_gradient_towards_the_targets(dtype):
    x, y = sample(6, 2, dtype=dtype), sample(6, 1, seed=1, dtype=dtype)
    y_hat = (y + 1e4).requires_grad_()
    value = conditional_cauchy_schwarz(x, y, y_hat, 0.3, 1.0)
    gradient = grad(value, y_hat)[0]
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert gradient.sum() > 1e4


def test_kernels_are_exact_in_float32_where_clusters_are_far_from_each_other():
    """Within a cluster distances are about 1, between clusters 1e4: float32 products lose both."""
    x = torch.cat([sample(5), sample(5, seed=1) + 1e4]).float()
    t = sample(10, seed=2).float()
    expected = dense_information(x.double(), t.double(), 1.0, 1.0)
    close(cauchy_schwarz_mutual_information(x, t, 1.0, 1.0).double(), expected, rtol=1e-4)


def test_one_item_on_each_side():
    one, other = (torch.tensor([[v, 0.0]], dtype=torch.float64) for v in (0.0, 3.0))
    close(cauchy_schwarz_divergence(one, other, 2.0), 9 / 4)
    close(conditional_cauchy_schwarz(one, one, other, 1.0, 2.0), 9 / 4)
    close(mmd_squared(one, other, 1.0), 2 - 2 * math.exp(-4.5))
    for function in (cauchy_schwarz_mutual_information, hsic, normalized):
        close(function(one, other, 1.0, 1.0), 0.0)


def test_memory_of_forward_and_backward_is_a_fraction_of_one_kernel_matrix():
    n = 1500
    x, y = sample(n), sample(n, 1, seed=1)
    y_hat = sample(n, 1, seed=2).requires_grad_()
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Sizes():
        conditional_cauchy_schwarz(x, y, y_hat, 1.0, 1.0, block_size=50).backward()
    assert max(sizes) <= 50 * n


# --- blocks, bandwidths, errors -----------------------------------------------------------------


@quick
@given(st.integers(0, 50), st.integers(0, 50), st.none() | st.integers(1, 60))
def test_row_blocks_cover_every_row_once(rows, columns, block_size):
    covered = [i for block in row_blocks(rows, columns, block_size) for i in range(rows)[block]]
    assert covered == list(range(rows))


def test_row_blocks_shrink_to_sixteen_as_columns_grow():
    first = [next(row_blocks(10**6, columns)).stop for columns in (10**3, 10**5, 10**8)]
    assert first == [524, 16, 16]


@quick
@given(seeds, st.integers(2, 20), st.integers(1, 4))
def test_median_bandwidth_is_the_median_distance(seed, n, d):
    x = sample(n, d, seed)
    close(median_bandwidth(x), float(np.median(pdist(x.numpy()))))
    close(median_bandwidth(3 * x + 1), 3 * median_bandwidth(x))


def test_median_bandwidth_of_ties_of_one_point_and_of_many():
    ties = torch.tensor([[0.0]] * 9 + [[2.0]], dtype=torch.bfloat16)
    assert torch.equal(median_bandwidth(ties), torch.tensor(2.0, dtype=torch.bfloat16))
    assert median_bandwidth(torch.zeros(5, 2)) == median_bandwidth(torch.zeros(1, 2)) == 1.0
    many = sample(3000, 1)
    close(median_bandwidth(many, max_points=500), median_bandwidth(many), rtol=0.1)
    assert not median_bandwidth(sample(5).requires_grad_()).requires_grad


def test_a_bandwidth_tensor_equals_the_float():
    x, y = TWO
    for dtype in (torch.float32, torch.float64):
        value = cauchy_schwarz_divergence(x, y, torch.tensor(0.5, dtype=dtype))
        close(value, cauchy_schwarz_divergence(x, y, 0.5))


X, Y = torch.zeros(4, 2), torch.ones(4, 2)
EYE, ZERO = torch.eye(2), torch.zeros(2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cauchy_schwarz_divergence(X[:, 0], Y, 1.0), ValueError, "x must have shape"),
        (lambda: cauchy_schwarz_divergence(X, Y[:, :1], 1.0), ValueError, r"y must .* \[any, 2\]"),
        (lambda: cauchy_schwarz_divergence(X[:0], Y, 1.0), ValueError, "x must not be empty"),
        (lambda: mmd_squared(X, Y[:0], 1.0), ValueError, "y must not be empty"),
        (lambda: mmd_squared(X.long(), Y, 1.0), TypeError, "x must have a floating dtype"),
        (lambda: mmd_squared(X, Y, 0.0), ValueError, "bandwidth must be > 0"),
        (lambda: mmd_squared(X, Y, math.nan), ValueError, "bandwidth must be > 0"),
        (lambda: mmd_squared(X, Y, "1"), TypeError, "bandwidth must be a number"),
        (lambda: mmd_squared(X, Y, torch.ones(1)), ValueError, "bandwidth must have shape"),
        (lambda: mmd_squared(X, Y, torch.tensor(1)), TypeError, "bandwidth must have a floating"),
        (lambda: mmd_squared(X, Y, 1.0, block_size=0), ValueError, "block_size must be >= 1"),
        (lambda: hsic(X, Y[:3], 1.0, 1.0), ValueError, r"t must have shape \[4, any\]"),
        (lambda: hsic(X, Y, 1.0, -1.0), ValueError, "bandwidth_t must be > 0"),
        (lambda: hsic(X[:, :0], Y, 1.0, 1.0), ValueError, "x must not be empty"),
        (lambda: normalized(X, Y, 0.0, 1.0), ValueError, "bandwidth_x must be > 0"),
        (lambda: conditional_cauchy_schwarz(X, Y[:, 0], Y, 1.0, 1.0), ValueError, "y must have"),
        (lambda: conditional_cauchy_schwarz(X, Y, Y[:3], 1.0, 1.0), ValueError, "y_hat must have"),
        (lambda: conditional_cauchy_schwarz(X, Y, Y, 1.0, 0.0), ValueError, "bandwidth_y must"),
        (
            lambda: conditional_cauchy_schwarz(X, Y, Y, 1.0, 1.0, denominator="code"),
            ValueError,
            "denominator must be one of 'text', 'reference'",
        ),
        (lambda: gaussian_cauchy_schwarz(ZERO, -EYE, ZERO, EYE), ValueError, "cov_p must be posi"),
        (lambda: gaussian_cauchy_schwarz(ZERO, EYE, ZERO, 0 * EYE), ValueError, "cov_q must be po"),
        (lambda: gaussian_cauchy_schwarz(ZERO, EYE[:1], ZERO, EYE), ValueError, "cov_p must have"),
        (lambda: gaussian_cauchy_schwarz(ZERO, EYE, EYE, EYE), ValueError, "mean_q must have"),
        (lambda: median_bandwidth(X[0]), ValueError, "x must have shape"),
        (lambda: median_bandwidth(X, max_points=1), ValueError, "max_points must be >= 2"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
