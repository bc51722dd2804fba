"""f-distill against its gradient theorem, its table of weights and its exact optima."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.diffusion import (
    GaussianMixture,
    RatioNormalizer,
    discriminator_loss,
    dmd_loss,
    f_distill_weight,
    fake_score_loss,
    generator_loss,
    karras_sigmas,
)
from steelyard.divergences import (
    JEFFREYS,
    JENSEN_SHANNON,
    JENSEN_SHANNON_DOUBLE,
    KL,
    NEYMAN_CHI2,
    PEARSON_CHI2,
    REVERSE_KL,
    SOFTENED_REVERSE_KL,
    SQUARED_HELLINGER,
    TOTAL_VARIATION,
    alpha_divergence,
    skew_jensen_shannon,
)

quick = settings(deadline=None, max_examples=15)
seeds = st.integers(0, 2**31)
close = {"rtol": 1e-9, "atol": 1e-9}

# f and h as the paper writes them, with what ours is a multiple of.
TABLE = {
    "rkl": (REVERSE_KL, 1, lambda r: -r.log(), torch.ones_like),
    "sf": (
        *(SOFTENED_REVERSE_KL, 1),
        lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
        lambda r: 1 / (r + 1),
    ),
    "js": (
        *(JENSEN_SHANNON_DOUBLE, 1),
        lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
        lambda r: r / (r + 1),
    ),
    "sh": (SQUARED_HELLINGER, 2, lambda r: 1 - r.sqrt(), lambda r: r.sqrt() / 4),
    "kl": (KL, 1, lambda r: r * r.log(), lambda r: r),
    "jf": (JEFFREYS, 1, lambda r: (r - 1) * r.log(), lambda r: r + 1),
    "neyman": (NEYMAN_CHI2, 2, lambda r: (1 - r) ** 2 / (2 * r), lambda r: 1 / r),
}
SMOOTH = [row[0] for row in TABLE.values()] + [
    JENSEN_SHANNON,
    PEARSON_CHI2,
    alpha_divergence(0.3),
    skew_jensen_shannon(0.2),
]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def double(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def two_modes() -> GaussianMixture:
    """0.7 N(-1, 0.4) + 0.3 N(2, 0.6)."""
    return GaussianMixture(double(0.7, 0.3), double([-1.0], [2.0]), double(0.4, 0.6))


# --- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE)
def test_weights_are_the_table_and_the_second_derivative_of_f(name):
    divergence, multiple, f, h = TABLE[name]
    r = torch.linspace(0.05, 12.0, 40, dtype=torch.float64, requires_grad=True)
    [first] = torch.autograd.grad(f(r).sum(), r, create_graph=True)
    [second] = torch.autograd.grad(first.sum(), r)
    weight = f_distill_weight(r.log(), divergence)
    torch.testing.assert_close(weight, multiple * (r**2 * second).detach(), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(weight, multiple * h(r).detach(), **close)


@pytest.mark.parametrize("divergence", SMOOTH, ids=lambda d: d.name)
def test_weights_are_r_squared_times_the_second_derivative_of_ours(divergence):
    log_ratio = torch.linspace(-9, 9, 50, dtype=torch.float64)
    r = log_ratio.exp()
    expected = r.square() * divergence.second_derivative(r)
    torch.testing.assert_close(f_distill_weight(log_ratio, divergence), expected, **close)
    centred = f_distill_weight(log_ratio, divergence.centred())
    torch.testing.assert_close(centred, expected, **close)


def test_weights_add_up_like_their_divergences():
    log_ratio = normal(0, 30)
    h = {name: f_distill_weight(log_ratio, row[0]) for name, row in TABLE.items()}
    torch.testing.assert_close(h["jf"], h["kl"] + h["rkl"], **close)
    torch.testing.assert_close(h["js"] + h["sf"], torch.ones_like(log_ratio), **close)
    assert torch.equal(h["rkl"], torch.ones_like(log_ratio))
    # The best discriminator's logit is the log-ratio.
    torch.testing.assert_close(h["js"], torch.sigmoid(log_ratio), **close)
    torch.testing.assert_close(h["sf"], torch.sigmoid(-log_ratio), **close)


@quick
@given(seeds)
def test_normalised_weights_have_mean_one_and_no_scale(seed):
    log_ratio = normal(seed, 16)
    for divergence in (KL, JENSEN_SHANNON_DOUBLE, NEYMAN_CHI2):
        raw = f_distill_weight(log_ratio, divergence)
        got = f_distill_weight(log_ratio, divergence, normalize=True)
        torch.testing.assert_close(got, raw / (raw.mean() + 1e-6), **close)
        assert abs(got.mean() - 1) < 1e-4
    both = [
        f_distill_weight(log_ratio, d, normalize=True)
        for d in (JENSEN_SHANNON, JENSEN_SHANNON_DOUBLE)
    ]
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_at_extreme_ratios_reach_their_limits(dtype):
    log_ratio = torch.tensor([-1e4, 0.0, 1e4], dtype=dtype, requires_grad=True)
    for divergence, limits in (
        (REVERSE_KL, [1.0, 1.0, 1.0]),
        (JENSEN_SHANNON_DOUBLE, [0.0, 0.5, 1.0]),
        (SOFTENED_REVERSE_KL, [1.0, 0.5, 0.0]),
        (KL, [0.0, 1.0, math.inf]),
        (TOTAL_VARIATION, [0.0, 0.0, 0.0]),
    ):
        got = f_distill_weight(log_ratio, divergence)
        assert got.tolist() == limits
        assert got.dtype == dtype
        assert not got.requires_grad
        normalised = f_distill_weight(log_ratio, divergence, normalize=True)
        assert normalised.isfinite().all()
    # One sample takes all the weight there is: the batch mean is a third of it.
    assert f_distill_weight(log_ratio, KL, normalize=True).tolist()[2] == pytest.approx(3, rel=1e-2)


def test_reverse_kl_is_dmd2_bit_for_bit():
    x, teacher, fake = normal(0, 3, 8, 2)
    weight = f_distill_weight(normal(1, 8), REVERSE_KL)
    results = []
    for options in ({}, {"weight": weight}):
        leaf = x.clone().requires_grad_()
        loss = dmd_loss(leaf, teacher, fake, **options)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


# --- the gradient theorem -----------------------------------------------------------------------


def quadrature_divergence(divergence, teacher, mean, std, sigma=0.0):
    """D_f(teacher || N(mean, std^2)) in one dimension, both noised by sigma."""
    grid = torch.linspace(-14, 14, 4001, dtype=torch.float64).unsqueeze(1)
    spread = (std**2 + sigma**2) ** 0.5
    student = -0.5 * ((grid[:, 0] - mean) / spread) ** 2 - torch.log(
        spread * math.sqrt(2 * math.pi)
    )
    step = (grid[1] - grid[0]).item()
    return divergence.terms(teacher.log_prob(grid, sigma), student).sum() * step


def gauss_hermite(n: int):
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


@pytest.mark.parametrize("divergence", SMOOTH, ids=lambda d: d.name)
def test_weighted_dmd_gradient_is_the_gradient_of_the_divergence(divergence):
    """Every expectation by quadrature, every score through its denoiser."""
    sigma, teacher = 0.8, two_modes()
    mean, std = double(0.4).squeeze().requires_grad_(), double(0.9).squeeze().requires_grad_()
    exact = torch.autograd.grad(
        quadrature_divergence(divergence, teacher, mean, std, sigma), (mean, std)
    )
    nodes, mass = gauss_hermite(80)
    z, noise = (axis.reshape(-1) for axis in torch.meshgrid(nodes, nodes, indexing="ij"))
    probability = (mass.unsqueeze(1) * mass).reshape(-1)
    x = (mean + std * z).unsqueeze(1)
    noised = (x + sigma * noise.unsqueeze(1)).detach()
    student = GaussianMixture(double(1.0), double([0.4]), double(0.9))
    log_ratio = teacher.log_prob(noised, sigma) - student.log_prob(noised, sigma)
    weight = f_distill_weight(log_ratio, divergence) * probability * len(x)
    factor = torch.full((len(x),), sigma**-2, dtype=torch.float64)
    loss = dmd_loss(
        x, teacher.denoise(noised, sigma), student.denoise(noised, sigma),
        weight=weight, factor=factor,
    )  # fmt: skip
    got = torch.autograd.grad(loss, (mean, std))
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-6)


def descend(divergence, mean, std, steps=60, rate=0.35):
    """Fit a Gaussian student to the two modes by the weighted score difference.

    Expectations by quadrature; the step is scaled by the Fisher information of a Gaussian.
    """
    teacher, (nodes, mass) = two_modes(), gauss_hermite(60)
    for _ in range(steps):
        x = (mean + std * nodes).unsqueeze(1)
        student = -0.5 * nodes**2 - math.log(std) - 0.5 * math.log(2 * math.pi)
        weight = f_distill_weight(teacher.log_prob(x) - student, divergence)
        pull = mass * weight * (teacher.score(x)[:, 0] + nodes / std)
        mean += rate * std**2 * pull.sum().item()
        std *= math.exp(rate / 2 * (pull * std * nodes).sum().item())
    return mean, std


@pytest.mark.parametrize("divergence", [REVERSE_KL, SOFTENED_REVERSE_KL], ids=lambda d: d.name)
def test_seeking_divergences_lock_on_the_heavy_mode(divergence):
    mean, std = descend(divergence, -0.5, 0.8)
    assert abs(mean + 1) < 0.1
    assert abs(std - 0.42) < 0.04


@pytest.mark.parametrize(
    "divergence", [JENSEN_SHANNON_DOUBLE, SQUARED_HELLINGER, KL], ids=lambda d: d.name
)
def test_covering_divergences_spread_over_both_modes(divergence):
    mean, std = descend(divergence, -0.5, 1.0)
    assert 1.2 < std < 1.7
    assert -0.5 < mean < 0.5
    if divergence == KL:  # moments of the teacher
        assert abs(mean + 0.1) < 0.01
        variance = 0.7 * (0.16 + 0.81) + 0.3 * (0.36 + 2.1**2)
        assert abs(std - math.sqrt(variance)) < 0.01


@pytest.mark.parametrize(
    "divergence", [KL, REVERSE_KL, JENSEN_SHANNON_DOUBLE], ids=lambda d: d.name
)
def test_nothing_moves_where_student_and_teacher_agree(divergence):
    x = normal(0, 10, 2)
    teacher = GaussianMixture(double(1.0), torch.zeros(1, 2).double(), double(1.0))
    log_ratio = teacher.log_prob(x) - teacher.log_prob(x)
    weight = f_distill_weight(log_ratio, divergence, normalize=True)
    torch.testing.assert_close(weight, torch.ones_like(weight), rtol=0, atol=1e-5)
    leaf = x.clone().requires_grad_()
    clean = teacher.denoise(x, 1.0)
    loss = dmd_loss(leaf, clean, clean, weight=weight)
    loss.backward()
    assert loss == 0
    assert (leaf.grad == 0).all()


def test_divergences_of_the_table_add_up_and_fall_with_noise():
    mean, std, teacher = double(0.4).squeeze(), double(0.9).squeeze(), two_modes()
    values = {
        name: [quadrature_divergence(row[0], teacher, mean, std, sigma) for sigma in (0, 0.5, 2)]
        for name, row in TABLE.items()
        if name != "neyman"
    }
    for js, sf, rkl in zip(values["js"], values["sf"], values["rkl"], strict=True):
        assert (js + sf).item() == pytest.approx(rkl.item(), rel=1e-8)
    for series in values.values():
        assert series[0] > series[1] > series[2] > 0


# --- the pseudo target --------------------------------------------------------------------------


@quick
@given(seeds)
def test_dmd_loss_is_the_pseudo_target_loss(seed):
    x, teacher, fake = normal(seed, 3, 4, 2, 3)
    weight = normal(seed + 1, 4).abs()
    leaf = x.clone().requires_grad_()
    loss = dmd_loss(leaf, teacher, fake, weight=weight)
    loss.backward()
    size = (x - teacher).abs().mean((1, 2), keepdim=True) + 1e-6
    g = weight.reshape(-1, 1, 1) * (fake - teacher) / size
    reference = x.clone().requires_grad_()
    pseudo = 0.5 * (reference - (reference - g).detach()).square().mean()
    pseudo.backward()
    torch.testing.assert_close(loss, pseudo, **close)
    torch.testing.assert_close(loss, 0.5 * g.square().mean(), **close)
    torch.testing.assert_close(leaf.grad, reference.grad, **close)
    torch.testing.assert_close(leaf.grad, g / g.numel(), **close)


def test_a_small_direction_keeps_its_digits_beside_a_large_sample():
    x = torch.full((1, 2), 1e4, requires_grad=True)
    teacher = torch.full((1, 2), 9e3)
    dmd_loss(x, teacher, teacher + 1e-1).backward()
    expected = (teacher + 1e-1 - teacher) / (1000.0 + 1e-6) / 2
    torch.testing.assert_close(x.grad, expected, rtol=1e-6, atol=0)


def test_the_loss_grows_with_the_square_of_a_weight_and_the_gradient_with_it():
    x, teacher, fake = normal(0, 3, 4, 2)
    x.requires_grad_()
    one = dmd_loss(x, teacher, fake)
    three = dmd_loss(x, teacher, fake, weight=torch.full((4,), 3.0, dtype=torch.float64))
    assert three.item() == pytest.approx(9 * one.item())
    gradients = [torch.autograd.grad(loss, x)[0] for loss in (one, three)]
    torch.testing.assert_close(gradients[1], 3 * gradients[0], **close)


def test_only_the_sample_carries_a_gradient():
    x, teacher, fake = normal(0, 3, 4, 2)
    others = [t.clone().requires_grad_() for t in (teacher, fake, x[:, 0].abs(), x[:, 1].abs())]
    leaf = x.clone().requires_grad_()
    dmd_loss(leaf, others[0], others[1], weight=others[2], factor=others[3]).backward()
    dmd_loss(leaf, others[0], others[1]).backward()
    assert leaf.grad.abs().max() > 0
    assert all(tensor.grad is None for tensor in others)


def test_dmd_loss_at_the_teacher_and_in_half_precision():
    x = torch.ones(2, 3)
    same = x.clone().requires_grad_()
    dmd_loss(same, x, x).backward()
    assert (same.grad == 0).all()
    for dtype in (torch.float16, torch.bfloat16):
        x, teacher, fake = normal(0, 3, 4, 2).to(dtype)
        got = dmd_loss(x, teacher, fake)
        expected = dmd_loss(x.float(), teacher.float(), fake.float())
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected.to(dtype))
    assert dmd_loss(torch.full((1, 2), torch.nan), torch.zeros(1, 2), torch.zeros(1, 2)).isnan()


# --- the ratio ----------------------------------------------------------------------------------


def released_ratio(logits, t, means, k, bins=10):
    """The released code as a loop over bins; updates ``means``."""
    pooled = logits.mean(1) if logits.dim() == 2 else logits
    ratio = pooled.clamp(-10, 10).exp().clamp(0.1, 20)
    place = [min(int(v * bins), bins - 1) for v in t.tolist()]
    for b in set(place):
        mine = torch.tensor([p == b for p in place])
        means[b] = k * means[b] + (1 - k) * ratio[mine].mean()
    return ratio / (means[place] + 1e-6)


@quick
@given(seeds, st.floats(0, 0.9), st.sampled_from([(12,), (12, 5)]))
def test_normaliser_is_the_loop_over_bins(seed, k, shape):
    g = torch.Generator().manual_seed(seed)
    normalizer = RatioNormalizer(ema=k).double()
    means = torch.ones(10, dtype=torch.float64)
    for _ in range(3):
        logits = 4 * torch.randn(*shape, dtype=torch.float64, generator=g)
        t = torch.rand(12, dtype=torch.float64, generator=g)
        expected = released_ratio(logits, t, means, k)
        torch.testing.assert_close(normalizer(logits, t).exp(), expected, **close)
        torch.testing.assert_close(normalizer.means, means, **close)


def test_without_memory_each_bin_has_mean_ratio_one():
    logits, t = 2 * normal(0, 400), torch.linspace(0, 1, 400, dtype=torch.float64)
    ratio = RatioNormalizer(bins=4).double()(logits, t).exp()
    for b in range(4):
        mine = (t * 4).floor().clamp(max=3) == b
        assert abs(ratio[mine].mean() - 1) < 1e-5


def test_a_float32_buffer_does_not_cost_digits_of_the_batch():
    logits, t = normal(0, 30), torch.rand(30, dtype=torch.float64)
    single, precise = RatioNormalizer(bins=2), RatioNormalizer(bins=2).double()
    torch.testing.assert_close(single(logits, t), precise(logits, t), **close)


def test_a_sample_alone_in_its_bin_loses_its_weight_unless_bins_remember():
    logits, t = torch.tensor([2.0]), torch.tensor([0.5])
    assert RatioNormalizer()(logits, t).abs().item() < 1e-6
    remembered = RatioNormalizer(ema=0.5)(logits, t).exp().item()
    assert remembered == pytest.approx(math.exp(2) / (0.5 + 0.5 * math.exp(2)), rel=1e-5)


def test_evaluation_uses_the_bins_and_leaves_them():
    normalizer = RatioNormalizer(bins=2, t_min=1.0, t_max=3.0)
    normalizer(torch.tensor([1.0, 0.0]), torch.tensor([1.5, 9.0]))
    torch.testing.assert_close(normalizer.means, torch.tensor([math.e, 1.0]))
    normalizer.eval()
    got = normalizer(torch.tensor([2.0, 2.0]), torch.tensor([-5.0, 2.0]))
    torch.testing.assert_close(got, torch.tensor([1.0, 2.0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(normalizer.means, torch.tensor([math.e, 1.0]))
    copy = RatioNormalizer(bins=2)
    copy.load_state_dict(normalizer.state_dict())
    assert torch.equal(copy.means, normalizer.means)


def test_normaliser_clips_detaches_and_survives_nan():
    normalizer = RatioNormalizer(bins=1, ema=0.5)
    logits = torch.tensor([1e4, -1e4], requires_grad=True)
    got = normalizer(logits, torch.zeros(2))
    assert not got.requires_grad
    assert normalizer.means.item() == pytest.approx(0.5 + 0.5 * (20 + 0.1) / 2)
    before = normalizer.means.clone()
    got = normalizer(torch.tensor([torch.nan, 0.0]), torch.zeros(2))
    assert got.isnan().tolist() == [True, False]
    torch.testing.assert_close(normalizer.means, 0.5 * before + 0.5)
    half = RatioNormalizer()(torch.zeros(3, 2).half(), torch.rand(3).half())
    assert half.dtype == torch.float16


def test_best_discriminator_is_the_log_ratio():
    """Minimise the loss over a table of logits: samples repeated in proportion to p and q."""
    p, q = torch.tensor([6, 3, 1]), torch.tensor([2, 3, 5])
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([logits], max_iter=100, tolerance_grad=1e-12, tolerance_change=0)

    def closure():
        optimiser.zero_grad()
        loss = discriminator_loss(logits.repeat_interleave(p), logits.repeat_interleave(q))
        loss.backward()
        return loss

    optimiser.step(closure)
    log_ratio = (p.double() / q).log()
    torch.testing.assert_close(logits.detach(), log_ratio, rtol=0, atol=1e-6)
    ratio = logits.detach().exp()
    assert (ratio * q / 10).sum().item() == pytest.approx(1, abs=1e-6)


# --- the other losses ---------------------------------------------------------------------------


@quick
@given(seeds)
def test_adversarial_losses_are_binary_cross_entropies(seed):
    real, fake = 5 * normal(seed, 4, 2), 5 * normal(seed + 1, 7)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    expected = bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))
    torch.testing.assert_close(discriminator_loss(real, fake), expected, **close)
    torch.testing.assert_close(generator_loss(fake), bce(fake, torch.ones_like(fake)), **close)


@quick
@given(seeds, st.floats(0.1, 3))
def test_fake_loss_is_the_published_weighting(seed, sigma_data):
    prediction, x = normal(seed, 2, 4, 2, 3)
    sigma = normal(seed + 1, 4).abs() + 0.1
    squares = (prediction - x).square().mean((1, 2))
    torch.testing.assert_close(fake_score_loss(prediction, x), squares.mean(), **close)
    weight = 1 / sigma**2 + 1 / sigma_data**2
    got = fake_score_loss(prediction, x, sigma=sigma, sigma_data=sigma_data, reduction="none")
    torch.testing.assert_close(got, weight * squares, **close)
    total = fake_score_loss(prediction, x, sigma=sigma, sigma_data=sigma_data, reduction="sum")
    torch.testing.assert_close(total, (weight * squares).sum(), **close)


def test_losses_pass_gradcheck_and_detach_their_targets():
    prediction, x = normal(0, 2, 3, 2)
    prediction.requires_grad_()
    sigma = double(0.5, 1.0, 2.0)
    assert torch.autograd.gradcheck(lambda p: fake_score_loss(p, x, sigma=sigma), (prediction,))
    real, fake = normal(1, 4).requires_grad_(), normal(2, 5).requires_grad_()
    assert torch.autograd.gradcheck(discriminator_loss, (real, fake))
    assert torch.autograd.gradcheck(generator_loss, (fake,))
    target, level = x.clone().requires_grad_(), sigma.clone().requires_grad_()
    fake_score_loss(prediction, target, sigma=level).backward()
    assert target.grad is None
    assert level.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_adversarial_losses_stay_finite(dtype):
    logits = torch.tensor([1e4, -1e4], dtype=dtype, requires_grad=True)
    loss = discriminator_loss(logits, logits) + generator_loss(logits)
    loss.backward()
    assert loss.isfinite()
    assert loss.dtype == dtype
    assert logits.grad.isfinite().all()


def test_losses_compile_and_vectorise():
    x, teacher, fake = normal(0, 3, 4, 3)
    log_ratio = normal(1, 4)

    def total(x):
        weight = f_distill_weight(log_ratio, JENSEN_SHANNON_DOUBLE, normalize=True)
        return dmd_loss(x, teacher, fake, weight=weight) + fake_score_loss(x, fake)

    compiled = torch.compile(total, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), total(x), **close)
    many = torch.stack((x, 2 * x))
    expected = torch.stack([torch.func.grad(total)(row) for row in many])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(total))(many), expected, **close)


def test_karras_levels_are_the_published_ones():
    got = karras_sigmas(18, dtype=torch.float64)
    high, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
    expected = [(high + i / 17 * (low - high)) ** 7 for i in range(18)]
    torch.testing.assert_close(got, double(*expected), rtol=1e-10, atol=0)
    assert (got.diff() < 0).all()
    linear = karras_sigmas(5, sigma_min=1.0, sigma_max=5.0, rho=1.0)
    torch.testing.assert_close(linear, torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]))
    assert karras_sigmas(1).tolist() == pytest.approx([80.0])


# --- the analytic teacher -----------------------------------------------------------------------


def ring(components: int = 4) -> GaussianMixture:
    g = torch.Generator().manual_seed(3)
    means = 2 * torch.randn(components, 2, dtype=torch.float64, generator=g)
    stds = 0.2 + torch.rand(components, dtype=torch.float64, generator=g)
    return GaussianMixture(torch.arange(1.0, components + 1).double(), means, stds)


@quick
@given(seeds, st.floats(0, 3))
def test_mixture_is_the_one_of_torch_and_its_score_the_derivative(seed, sigma):
    teacher, x = ring(), normal(seed, 6, 2).requires_grad_()
    spread = (teacher.stds**2 + sigma**2).sqrt().unsqueeze(1).expand(-1, 2)
    reference = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(teacher.weights),
        torch.distributions.Independent(torch.distributions.Normal(teacher.means, spread), 1),
    )
    torch.testing.assert_close(teacher.log_prob(x, sigma), reference.log_prob(x), **close)
    [score] = torch.autograd.grad(teacher.log_prob(x, sigma).sum(), x)
    torch.testing.assert_close(teacher.score(x.detach(), sigma), score, **close)
    clean = x.detach() + sigma**2 * score
    torch.testing.assert_close(teacher.denoise(x.detach(), sigma), clean, **close)


def test_denoiser_is_the_mean_of_clean_samples_given_the_noised():
    """Self-normalised average of 200,000 clean samples; errors about 0.005, the bound is 0.05."""
    teacher, x, sigma = ring(), double([0.5, -0.5]), 0.7
    clean = teacher.sample(200_000, generator=torch.Generator().manual_seed(0))
    weight = torch.softmax(-0.5 * ((x - clean) / sigma).square().sum(1), 0)
    torch.testing.assert_close(weight @ clean, teacher.denoise(x, sigma)[0], rtol=0, atol=0.05)


def test_samples_follow_the_mixture():
    """50,000 samples: standard error of a weight is 0.002, of a mean below 0.02; bounds are 5."""
    teacher = GaussianMixture(double(1.0, 3.0), double([-9.0], [9.0]), double(0.5, 2.0))
    x = teacher.sample(50_000, generator=torch.Generator().manual_seed(0))[:, 0]
    right = x > 0
    assert abs(right.double().mean() - 0.75) < 0.01
    assert abs(x[right].mean() - 9) < 0.06
    assert abs(x[right].std() - 2) < 0.05
    assert abs(x[~right].std() - 0.5) < 0.02


def test_noise_levels_per_item_and_far_points():
    teacher, x = ring(), normal(0, 3, 2)
    sigma = double(0.0, 0.5, 80.0)
    for method in (teacher.log_prob, teacher.score, teacher.denoise):
        alone = torch.cat([method(x[i : i + 1], sigma[i].item()) for i in range(3)])
        torch.testing.assert_close(method(x, sigma), alone, **close)
    far = torch.full((1, 2), 1e4)
    single = GaussianMixture(teacher.weights.float(), teacher.means.float(), teacher.stds.float())
    for method in (single.log_prob, single.score, single.denoise):
        assert method(far, 0.1).isfinite().all()
        assert method(far.half(), 1.0).dtype == torch.float16


def test_a_component_of_weight_zero_does_not_count():
    means, stds = double([-1.0], [1.0]), double(0.5, 0.5)
    some = GaussianMixture(double(0.0, 2.0), means, stds)
    one = GaussianMixture(double(1.0), means[1:], stds[1:])
    x = normal(0, 4, 1).requires_grad_()
    torch.testing.assert_close(some.log_prob(x, 0.3), one.log_prob(x, 0.3), **close)
    torch.testing.assert_close(some.score(x, 0.3), one.score(x, 0.3), **close)
    [gradient] = torch.autograd.grad(some.log_prob(x).sum(), x)
    assert gradient.isfinite().all()


def test_mixture_passes_gradcheck():
    teacher, x = ring(2), normal(0, 2, 2).requires_grad_()
    for method in (teacher.log_prob, teacher.score, teacher.denoise):
        assert torch.autograd.gradcheck(lambda x, method=method: method(x, 0.5), (x,))


X, B = torch.zeros(3, 2), torch.zeros(3)
MIXTURE = GaussianMixture(torch.ones(2), torch.zeros(2, 1), torch.ones(2))


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: f_distill_weight(X, KL), ValueError, "log_ratio"),
        (lambda: f_distill_weight(B[:0], KL), ValueError, "log_ratio"),
        (lambda: f_distill_weight(B.long(), KL), TypeError, "log_ratio"),
        (lambda: RatioNormalizer(bins=0), ValueError, "bins"),
        (lambda: RatioNormalizer(ema=1.0), ValueError, "ema"),
        (lambda: RatioNormalizer(lower=0.0), ValueError, "lower"),
        (lambda: RatioNormalizer(lower=2.0, upper=1.0), ValueError, "upper"),
        (lambda: RatioNormalizer(t_min=1.0), ValueError, "t_max"),
        (lambda: RatioNormalizer()(B, B[:2]), ValueError, "t must"),
        (lambda: RatioNormalizer()(B[:0], B[:0]), ValueError, "logits"),
        (lambda: RatioNormalizer()(X[None], B[:1]), ValueError, "logits"),
        (lambda: dmd_loss(X, X[:2], X), ValueError, "teacher_x0"),
        (lambda: dmd_loss(X, X, X[:, :1]), ValueError, "fake_x0"),
        (lambda: dmd_loss(X, X, X, weight=X), ValueError, "weight"),
        (lambda: dmd_loss(X, X, X, factor=B[:1]), ValueError, "factor"),
        (lambda: dmd_loss(X, X, X, eps=-1.0), ValueError, "eps"),
        (lambda: dmd_loss(X[:0], X[:0], X[:0]), ValueError, "x must"),
        (lambda: fake_score_loss(X, X[:2]), ValueError, "x must"),
        (lambda: fake_score_loss(X, X, sigma=B[:2]), ValueError, "sigma"),
        (lambda: fake_score_loss(X, X, sigma_data=0.0), ValueError, "sigma_data"),
        (lambda: fake_score_loss(X, X, reduction="x"), ValueError, "reduction"),
        (lambda: discriminator_loss(B[:0], B), ValueError, "real_logits"),
        (lambda: discriminator_loss(B, B[:0]), ValueError, "fake_logits"),
        (lambda: generator_loss(B.long()), TypeError, "fake_logits"),
        (lambda: karras_sigmas(0), ValueError, "n must"),
        (lambda: karras_sigmas(3, sigma_min=9.0, sigma_max=1.0), ValueError, "sigma_max"),
        (lambda: karras_sigmas(3, rho=0.0), ValueError, "rho"),
        (lambda: GaussianMixture(B, X, B), ValueError, "weights"),
        (lambda: GaussianMixture(B - 1, X, B + 1), ValueError, "weights"),
        (lambda: GaussianMixture(B + 1, X, B), ValueError, "stds"),
        (lambda: GaussianMixture(B[:2] + 1, X, B + 1), ValueError, "weights"),
        (lambda: GaussianMixture(B + 1, B, B + 1), ValueError, "means"),
        (lambda: MIXTURE.log_prob(X), ValueError, "x must"),
        (lambda: MIXTURE.score(X[:, :1], -1.0), ValueError, "sigma"),
        (lambda: MIXTURE.score(X[:, :1], torch.ones(2)), ValueError, "sigma"),
        (lambda: MIXTURE.denoise(X[:0, :1], 1.0), ValueError, "x must"),
        (lambda: MIXTURE.sample(0), ValueError, "n must"),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()
