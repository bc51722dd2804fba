"""f-DPO against its theorems, exact optima, and TRL's own lines of code."""

import importlib.util
import itertools
import math
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid, relu

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
    FDivergence,
    alpha_divergence,
    f_divergence,
    skew_jensen_shannon,
)
from steelyard.divergences.generators import Generator
from steelyard.preference import (
    f_dpo_loss,
    implicit_reward,
    preference_health,
    regularised_optimum,
)

quick = settings(deadline=None, max_examples=20)
seeds = st.integers(0, 2**31)
close = {"rtol": 0, "atol": 1e-12}

# The family of the paper, from reverse to forward KL in its words, and all others that qualify.
FAMILY = [KL, alpha_divergence(0.7), alpha_divergence(0.5), alpha_divergence(0.3), REVERSE_KL]
QUALIFYING = [
    *FAMILY,
    JENSEN_SHANNON,
    JENSEN_SHANNON_DOUBLE,
    NEYMAN_CHI2,
    SQUARED_HELLINGER,
    JEFFREYS,
    SOFTENED_REVERSE_KL,
    skew_jensen_shannon(0.2),
    skew_jensen_shannon(0.7, rescaled=True),
]
REFUSED = [
    PEARSON_CHI2,
    TOTAL_VARIATION,
    alpha_divergence(1.5),
    SOFTENED_REVERSE_KL.reversed(),
]
some = st.sampled_from(QUALIFYING)
every = pytest.mark.parametrize("divergence", QUALIFYING, ids=lambda d: d.name)


def pairs(seed: int, n: int = 8, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(2, n, dtype=torch.float64, generator=g)
    return x[0], x[1]


def problem(seed: int, actions: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    rewards = torch.randn(actions, dtype=torch.float64, generator=g)
    return rewards, torch.randn(actions, dtype=torch.float64, generator=g).softmax(-1)


# --- the loss ----------------------------------------------------------------------------------


@quick
@given(seeds, st.floats(0.01, 3), some)
def test_loss_is_the_formula_written_with_ratios(seed, beta, divergence):
    chosen, rejected = pairs(seed)
    margin = divergence.derivative(chosen.exp()) - divergence.derivative(rejected.exp())
    expected = torch.logaddexp(-beta * margin, torch.zeros_like(margin))
    got = f_dpo_loss(chosen, rejected, beta=beta, divergence=divergence, reduction="none")
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@quick
@given(seeds, st.floats(0.01, 3))
def test_kl_is_dpo(seed, beta):
    chosen, rejected = pairs(seed, scale=20.0)
    got = f_dpo_loss(chosen, rejected, beta=beta)
    torch.testing.assert_close(got, -logsigmoid(beta * (chosen - rejected)).mean(), **close)


def test_worked_example():
    up = torch.tensor([2.0], dtype=torch.float64).log()
    half = alpha_divergence(0.5)
    expected = [(KL, math.log(5 / 4)), (JENSEN_SHANNON_DOUBLE, math.log(3 / 2))]
    expected += [(d, math.log1p(math.exp(-m))) for d, m in ((REVERSE_KL, 1.5), (half, 2**0.5))]
    for divergence, loss in expected:
        got = f_dpo_loss(up, -up, beta=1.0, divergence=divergence)
        assert got.item() == pytest.approx(loss, abs=1e-12)


def test_alpha_runs_from_reverse_to_forward_kl():
    """The paper's alpha is 1 - A; at its ends the loss differs from the two KLs by O(alpha)."""
    chosen, rejected = pairs(0, scale=0.5)
    for order, end in ((1 - 1e-6, KL), (1e-6, REVERSE_KL)):
        near = f_dpo_loss(chosen, rejected, divergence=alpha_divergence(order), reduction="none")
        far = f_dpo_loss(chosen, rejected, divergence=end, reduction="none")
        torch.testing.assert_close(near, far, rtol=0, atol=1e-6)
        assert (near != far).any()


@every
def test_at_the_reference_the_loss_is_log_two_and_the_gradient_scales_with_curvature(divergence):
    chosen = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    loss = f_dpo_loss(chosen, torch.zeros_like(chosen), beta=0.6, divergence=divergence)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-15)
    curvature = divergence.second_derivative(torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(chosen.grad, (-0.6 / 2 / 3 * curvature).expand(3), **close)


def test_curvature_at_the_reference_is_one_and_half_for_the_double_jensen_shannon():
    one = torch.ones(1, dtype=torch.float64)
    for d in FAMILY:
        assert d.second_derivative(one).item() == pytest.approx(1, abs=1e-12)
    assert JENSEN_SHANNON_DOUBLE.second_derivative(one).item() == pytest.approx(0.5, abs=1e-12)


@quick
@given(seeds, st.floats(-5, 5))
def test_constants_in_the_derivative_change_nothing(seed, slope):
    """f + c (t - 1): the same divergence, the same loss."""
    chosen, rejected = pairs(seed, scale=1.0)

    def shifted(log_t):
        return REVERSE_KL.generator.derivative(log_t) + slope

    base = REVERSE_KL.generator
    moved = Generator(shifted, base.log_second_derivative, base.conjugate, base.at_zero)
    other = FDivergence(
        *("shifted", "other", REVERSE_KL.interior, moved, REVERSE_KL.perspective), -1.0 + slope
    )
    got = f_dpo_loss(chosen, rejected, divergence=other)
    torch.testing.assert_close(got, f_dpo_loss(chosen, rejected, divergence=REVERSE_KL), **close)
    plain = f_dpo_loss(chosen, rejected, divergence=KL.centred())
    torch.testing.assert_close(plain, f_dpo_loss(chosen, rejected), **close)


def test_halving_the_generator_halves_beta():
    chosen, rejected = pairs(5)
    half = f_dpo_loss(chosen, rejected, beta=0.6, divergence=JENSEN_SHANNON)
    double = f_dpo_loss(chosen, rejected, beta=0.3, divergence=JENSEN_SHANNON_DOUBLE)
    torch.testing.assert_close(half, double, **close)


@every
def test_gradient_is_the_published_one(divergence):
    chosen, rejected = (x.requires_grad_() for x in pairs(1, scale=1.0))
    f_dpo_loss(chosen, rejected, beta=0.7, divergence=divergence, reduction="sum").backward()
    reward = [implicit_reward(x, beta=0.7, divergence=divergence) for x in (chosen, rejected)]
    common = 0.7 * torch.sigmoid(reward[1] - reward[0])
    for x, sign in ((chosen, -1), (rejected, 1)):
        u = x.detach().exp()
        expected = sign * common * u * divergence.second_derivative(u)
        torch.testing.assert_close(x.grad, expected.detach(), rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(
        lambda a, b: f_dpo_loss(a, b, beta=0.7, divergence=divergence), (chosen, rejected)
    )


def test_weight_falls_with_the_ratio_and_stays_below_one_for_jensen_shannon():
    x = torch.linspace(-9, 9, 50, dtype=torch.float64, requires_grad=True)
    slopes = {}
    for d in (*FAMILY, JENSEN_SHANNON_DOUBLE):
        reward = implicit_reward(x, beta=1.0, divergence=d).sum()
        (slopes[d.name],) = torch.autograd.grad(reward, x)
    torch.testing.assert_close(slopes["kl"], torch.ones_like(x), **close)
    for d in (*FAMILY[1:], JENSEN_SHANNON_DOUBLE):
        assert (slopes[d.name].diff() < 0).all()
    torch.testing.assert_close(slopes["reverse_kl"], torch.exp(-x), rtol=1e-12, atol=0)
    assert (slopes["jensen_shannon_double"] < 1).all()


def test_scores_are_bounded_above_as_the_table_says():
    far = torch.tensor([1e4], dtype=torch.float64)
    for d, bound in (
        (JENSEN_SHANNON_DOUBLE, math.log(2)),
        (REVERSE_KL, 1.0),  # f' <= 0, and f'(1) = -1
        (alpha_divergence(0.7), 1 / 0.3),
        (alpha_divergence(0.3), 1 / 0.7),
    ):
        assert implicit_reward(far, beta=1.0, divergence=d).item() == pytest.approx(bound)
    assert implicit_reward(far, beta=1.0).item() == 1e4


def test_other_pairwise_losses_take_the_difference_of_implicit_rewards():
    chosen, rejected = pairs(2)
    margin = implicit_reward(chosen) - implicit_reward(rejected)
    torch.testing.assert_close(relu(1 - margin), relu(1 - 0.1 * (chosen - rejected)), **close)
    ipo = ((chosen - rejected) - 1 / (2 * 0.1)) ** 2
    torch.testing.assert_close((margin / 0.1 - 5) ** 2, ipo, rtol=0, atol=1e-9)


# --- extreme ratios ----------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extreme_ratios_are_finite_with_a_finite_gradient_that_pulls(divergence, dtype):
    for size in (400.0, 1e4):
        ends = torch.tensor([-size, 0.0, size], dtype=dtype)
        chosen, rejected = (x.requires_grad_() for x in torch.cartesian_prod(ends, ends).T)
        loss = f_dpo_loss(chosen, rejected, divergence=divergence, reduction="none")
        slopes = torch.autograd.grad(loss.sum(), (chosen, rejected))
        assert loss.dtype == dtype
        for value in (loss, *slopes, f_dpo_loss(chosen, rejected, divergence=divergence)):
            assert value.isfinite().all()
        sank = (chosen == -size) & (rejected > chosen)
        assert (slopes[0][sank] < 0).all()
        rewards = implicit_reward(ends, divergence=divergence)
        assert rewards[0] < rewards[1] <= rewards[2]
        same = loss[chosen == rejected]
        torch.testing.assert_close(same, torch.full_like(same, math.log(2)))


@pytest.mark.parametrize("divergence", [REVERSE_KL, alpha_divergence(0.3)], ids=lambda d: d.name)
def test_float64_is_exact_at_minus_four_hundred(divergence):
    low = torch.tensor([-400.0], dtype=torch.float64, requires_grad=True)
    loss = f_dpo_loss(low, torch.zeros_like(low), divergence=divergence)
    loss.backward()
    c = 1.0 if divergence == REVERSE_KL else 0.7
    assert loss.item() == pytest.approx(0.1 * math.exp(400 * c) / c, rel=1e-12)
    assert low.grad.item() == pytest.approx(-0.1 * math.exp(400 * c), rel=1e-12)


def test_beyond_the_range_the_score_is_the_tangent_and_keeps_its_order():
    x = torch.tensor([-64.0, -65.0, -70.0, -400.0], requires_grad=True)
    reward = implicit_reward(x, beta=1.0, divergence=REVERSE_KL)
    slope = math.exp(64)
    expected = 1 - slope - slope * torch.tensor([0.0, 1.0, 6.0, 336.0])
    torch.testing.assert_close(reward, expected, rtol=1e-5, atol=0)
    (grad,) = torch.autograd.grad(reward.sum(), x)
    torch.testing.assert_close(grad, torch.full((4,), slope), rtol=1e-5, atol=0)


def test_a_score_that_is_steep_at_large_ratios_is_safe_too():
    """KL plus chi-square: f'(t) = log t + t."""
    generator = Generator(
        lambda log_t: log_t + torch.exp(log_t),
        lambda log_t: torch.logaddexp(-log_t, torch.zeros_like(log_t)),
        lambda y: y,  # not used by the loss
        0.0,
    )
    mixed = FDivergence("kl+chi2", "other", KL.interior, generator, generator, 1.0)
    high = torch.tensor([400.0, 3.0], requires_grad=True)
    loss = f_dpo_loss(-high, high, divergence=mixed, reduction="none")
    loss.sum().backward()
    assert loss.isfinite().all()
    assert high.grad.isfinite().all()
    margin = 0.1 * (6 + math.exp(3) - math.exp(-3))
    assert loss[1].item() == pytest.approx(math.log1p(math.exp(margin)), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_computed_in_float32(dtype):
    chosen, rejected = (x.to(dtype) for x in pairs(3))
    for d in QUALIFYING:
        wide = f_dpo_loss(chosen.double(), rejected.double(), divergence=d)
        got = f_dpo_loss(chosen, rejected, divergence=d)
        assert got.dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), wide, rtol=max(eps, 1e-5), atol=1e-6)


# --- masks, transforms, errors -----------------------------------------------------------------


def test_masked_pairs_do_not_count_whatever_they_hold():
    chosen, rejected = pairs(4)
    mask = torch.arange(8) % 2 == 0
    expected = f_dpo_loss(chosen[mask], rejected[mask], divergence=REVERSE_KL)
    chosen[1], rejected[3] = math.nan, -1e300
    chosen.requires_grad_()
    got = f_dpo_loss(chosen, rejected, divergence=REVERSE_KL, mask=mask)
    torch.testing.assert_close(got, expected, **close)
    none = f_dpo_loss(chosen, rejected, divergence=REVERSE_KL, mask=torch.zeros(8))
    (got + none).backward()
    assert none.item() == 0
    assert (chosen.grad[~mask] == 0).all()
    assert (chosen.grad[mask] != 0).all()


def test_nan_propagates():
    x = torch.tensor([math.nan, 0.0])
    for d in QUALIFYING:
        assert f_dpo_loss(x, torch.zeros(2), divergence=d).isnan()
        assert implicit_reward(x, divergence=d).isnan().tolist() == [True, False]


def test_reductions_and_strides():
    chosen, rejected = pairs(6)
    each = f_dpo_loss(chosen, rejected, reduction="none")
    torch.testing.assert_close(each.sum(), f_dpo_loss(chosen, rejected, reduction="sum"))
    torch.testing.assert_close(each.mean(), f_dpo_loss(chosen, rejected))
    wide = torch.stack((chosen, rejected), 1)
    torch.testing.assert_close(f_dpo_loss(wide[:, 0], wide[:, 1], reduction="none"), each)


@pytest.mark.parametrize("divergence", [KL, JENSEN_SHANNON, alpha_divergence(0.25)])
def test_loss_compiles_in_one_graph_and_works_under_functional_transforms(divergence):
    chosen, rejected = pairs(7)

    def loss(a, b):
        return f_dpo_loss(a, b, divergence=divergence, reduction="none").sum()

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(chosen, rejected), loss(chosen, rejected), **close)
    one = torch.func.vmap(lambda a, b: loss(a[None], b[None]))(chosen, rejected)
    torch.testing.assert_close(one.sum(), loss(chosen, rejected), **close)
    slope = torch.func.grad(loss)(chosen, rejected)
    x = chosen.clone().requires_grad_()
    loss(x, rejected).backward()
    torch.testing.assert_close(slope, x.grad, **close)


@pytest.mark.parametrize("divergence", REFUSED, ids=lambda d: d.name)
def test_divergences_with_a_finite_slope_at_zero_are_refused_with_the_reason(divergence):
    x = torch.zeros(2)
    for call in (
        lambda: f_dpo_loss(x, x, divergence=divergence),
        lambda: implicit_reward(x, divergence=divergence),
        lambda: preference_health(x, x, divergence=divergence),
    ):
        with pytest.raises(ValueError, match=r"divergence must have f'\(0\) = -inf.*no mass"):
            call()


X = torch.zeros(3)


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: f_dpo_loss(X, X[:2]), ValueError, "rejected_log_ratio"),
        (lambda: f_dpo_loss(X[:0], X[:0]), ValueError, "chosen_log_ratio"),
        (lambda: f_dpo_loss(X[None], X[None]), ValueError, "chosen_log_ratio"),
        (lambda: f_dpo_loss(X.long(), X), TypeError, "chosen_log_ratio"),
        (lambda: f_dpo_loss(X, X, beta=0.0), ValueError, "beta"),
        (lambda: f_dpo_loss(X, X, beta=math.nan), ValueError, "beta"),
        (lambda: f_dpo_loss(X, X, divergence="kl"), TypeError, "divergence"),
        (lambda: f_dpo_loss(X, X, mask=X[:2]), ValueError, "mask"),
        (lambda: f_dpo_loss(X, X, reduction="x"), ValueError, "reduction"),
        (lambda: implicit_reward(X, beta=-1.0), ValueError, "beta"),
        (lambda: regularised_optimum(X, X, 1.0, KL), ValueError, "ref_probs"),
        (lambda: regularised_optimum(X, X[:2], 1.0, KL), ValueError, "ref_probs"),
        (lambda: regularised_optimum(X[:0], X[:0], 1.0, KL), ValueError, "rewards"),
        (lambda: regularised_optimum(X[0], X[0] + 1, 1.0, KL), ValueError, "rewards"),
        (lambda: regularised_optimum(X / 0, X + 1 / 3, 1.0, KL), ValueError, "rewards"),
        (lambda: regularised_optimum(X, X + 1 / 3, 0.0, KL), ValueError, "beta"),
        (lambda: regularised_optimum(X, X + 1 / 3, 1.0, "kl"), TypeError, "divergence"),
        (
            lambda: regularised_optimum(X, X + 1 / 3, 1.0, TOTAL_VARIATION),
            ValueError,
            "strictly convex",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()


# --- the closed-form optimum -------------------------------------------------------------------


def objective(probs, rewards, ref, beta, divergence):
    gain = (probs * rewards).sum(-1)
    return gain - beta * f_divergence(probs.log(), ref.log().expand_as(probs), divergence)


@every
@pytest.mark.parametrize("beta", [0.05, 0.5, 5.0])
def test_optimum_has_reward_beta_slope_plus_a_constant(divergence, beta):
    for seed in range(2):
        rewards, ref = problem(seed)
        probs = regularised_optimum(rewards, ref, beta, divergence)
        assert probs.sum().item() == pytest.approx(1, abs=1e-12)
        assert (probs > 0).all()
        multiplier = rewards - beta * divergence.derivative(probs / ref)
        torch.testing.assert_close(multiplier, multiplier[:1].expand(6), rtol=0, atol=1e-10)


def test_optimum_of_kl_is_the_tilted_reference():
    rewards, ref = problem(0)
    for beta in (1e-3, 0.1, 3.0):
        expected = (ref.log() + rewards / beta).softmax(-1)
        torch.testing.assert_close(regularised_optimum(rewards, ref, beta, KL), expected, **close)


@quick
@given(seeds, st.floats(0.1, 3), st.sampled_from([*QUALIFYING, PEARSON_CHI2]))
def test_no_policy_does_better_than_the_optimum(seed, beta, divergence):
    rewards, ref = problem(seed)
    g = torch.Generator().manual_seed(seed)
    best = regularised_optimum(rewards, ref, beta, divergence)
    others = torch.randn(30, 6, dtype=torch.float64, generator=g).softmax(-1)
    others = torch.cat((others, 0.99 * best + 0.01 * others))
    value = objective(best, rewards, ref, beta, divergence)
    assert (objective(others, rewards, ref, beta, divergence) <= value + 1e-12).all()


@quick
@given(seeds, st.floats(-50, 50), some)
def test_optimum_ignores_a_constant_of_the_prompt_and_follows_the_order_of_rewards(
    seed, shift, divergence
):
    rewards, ref = problem(seed)
    probs = regularised_optimum(rewards, ref, 0.3, divergence)
    moved = regularised_optimum(rewards + shift, ref, 0.3, divergence)
    torch.testing.assert_close(moved, probs, rtol=0, atol=1e-9)
    assert ((probs / ref)[rewards.argsort()].diff() > 0).all()


@every
def test_value_at_the_optimum_is_the_dual_value(divergence):
    rewards, ref = problem(3)
    beta = 0.4
    probs = regularised_optimum(rewards, ref, beta, divergence)
    multiplier = (rewards - beta * divergence.derivative(probs / ref))[0]
    dual = multiplier + beta * (ref * divergence.conjugate((rewards - multiplier) / beta)).sum()
    torch.testing.assert_close(objective(probs, rewards, ref, beta, divergence), dual)


def test_chi_square_puts_exact_zeros_where_it_must_and_breaks_the_reparametrisation():
    rewards = torch.tensor([0.0, 0.1, 1.0, 2.0], dtype=torch.float64)
    ref = torch.full((4,), 0.25, dtype=torch.float64)
    beta = 0.2
    probs = regularised_optimum(rewards, ref, beta, PEARSON_CHI2)
    # By hand: two actions are left; u = 1 + (r - lambda) / (2 beta), mean of u/4 over them is 1.
    multiplier = 1.5 + 2 * beta - 2 * 2 * beta
    expected = ((1 + (rewards - multiplier) / (2 * beta)).clamp(min=0)) / 4
    torch.testing.assert_close(probs, expected, **close)
    assert (probs[:2] == 0).all()
    implied = beta * PEARSON_CHI2.derivative(probs / ref)
    assert (implied[3] - implied[2]).item() == pytest.approx(1.0)
    assert implied[1] == implied[0]  # true rewards differ by 0.1


def test_mass_outside_the_support_of_the_reference_is_bought_only_at_a_finite_price():
    rewards = torch.tensor([0.0, 1.0, 9.0, 9.0], dtype=torch.float64)
    ref = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64)
    assert (regularised_optimum(rewards, ref, 1.0, KL)[2:] == 0).all()
    probs = regularised_optimum(rewards, ref, 1.0, REVERSE_KL)
    # The price of mass there is 0, so the multiplier is 9 and u = 1 / (9 - r).
    expected = torch.tensor([1 / 18, 1 / 16], dtype=torch.float64)
    torch.testing.assert_close(probs[:2], expected, **close)
    torch.testing.assert_close(probs[2:], ((1 - expected.sum()) / 2).expand(2), **close)
    low = torch.tensor([0.0, 1.0, -9.0, -9.0], dtype=torch.float64)
    assert (regularised_optimum(low, ref, 1.0, REVERSE_KL)[2:] < 1e-15).all()


@pytest.mark.parametrize("divergence", [*QUALIFYING, PEARSON_CHI2], ids=lambda d: d.name)
def test_optimum_survives_extreme_problems(divergence):
    rewards = torch.tensor([1e4, -1e4, 0.0, 1e4 - 1], dtype=torch.float64)
    ref = torch.tensor([1e-12, 0.5, 0.5 - 1e-12, 0.0], dtype=torch.float64)
    for beta in (1e-3, 1.0, 1e6):
        probs = regularised_optimum(rewards, ref, beta, divergence)
        assert probs.isfinite().all()
        assert (probs >= 0).all()
        assert probs.sum().item() == pytest.approx(1, abs=1e-12)
    certain = regularised_optimum(rewards, ref, 1e-3, JENSEN_SHANNON)
    assert certain[0].item() == pytest.approx(1, abs=1e-6)


def test_optimum_is_batched_follows_dtypes_and_works_without_autograd():
    problems = [problem(seed) for seed in range(4)]
    rewards, ref = (torch.stack(x) for x in zip(*problems, strict=True))
    together = regularised_optimum(rewards, ref, 0.3, JEFFREYS)
    for row, (r, q) in zip(together, problems, strict=True):
        torch.testing.assert_close(row, regularised_optimum(r, q, 0.3, JEFFREYS), **close)
    with torch.inference_mode():
        again = regularised_optimum(rewards, ref, 0.3, JEFFREYS)
    assert torch.equal(again, together)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        low = regularised_optimum(rewards.to(dtype), ref.to(dtype), 0.3, JEFFREYS)
        assert low.dtype == dtype
        torch.testing.assert_close(low.double(), together, rtol=0, atol=0.02)
    assert regularised_optimum(torch.tensor([3.0]), torch.tensor([1.0]), 0.3, KL).item() == 1


@pytest.mark.parametrize("divergence", [*FAMILY, JENSEN_SHANNON_DOUBLE], ids=lambda d: d.name)
def test_training_on_all_pairs_ends_at_the_optimum_with_the_entropy_of_the_labels(divergence):
    """The population loss of Bradley-Terry labels: one minimum for every divergence."""
    rewards, ref = problem(1, actions=4)
    first, second = torch.triu_indices(4, 4, 1)
    preferred = torch.sigmoid(rewards[first] - rewards[second])
    logits = ref.log().clone().requires_grad_()
    optimiser = torch.optim.LBFGS([logits], max_iter=300, tolerance_grad=1e-12, tolerance_change=0)
    optimiser.param_groups[0]["line_search_fn"] = "strong_wolfe"

    def population_loss():
        log_u = logits.log_softmax(-1) - ref.log()
        a, b = log_u[first], log_u[second]
        losses = [
            f_dpo_loss(*pair, beta=0.5, divergence=divergence, reduction="none")
            for pair in ((a, b), (b, a))
        ]
        return (preferred * losses[0] + (1 - preferred) * losses[1]).sum()

    def closure():
        optimiser.zero_grad()
        loss = population_loss()
        loss.backward()
        return loss

    optimiser.step(closure)
    expected = regularised_optimum(rewards, ref, 0.5, divergence)
    torch.testing.assert_close(logits.detach().softmax(-1), expected, rtol=0, atol=1e-5)
    entropy = -(preferred * preferred.log() + (1 - preferred) * (1 - preferred).log()).sum()
    assert population_loss().item() == pytest.approx(entropy.item(), abs=1e-9)


def test_at_equal_reward_each_divergence_is_smallest_for_itself():
    """So reverse KL keeps KL(pi||ref) lowest and forward KL keeps KL(ref||pi) lowest."""
    rewards, ref = problem(2, actions=12)
    base = (rewards * ref).sum()
    goal = base + 0.6 * (rewards.max() - base)
    optima = {}
    for d in (*FAMILY, JENSEN_SHANNON_DOUBLE):
        low, high = 1e-2, 1e2
        for _ in range(26):
            beta = math.sqrt(low * high)
            probs = regularised_optimum(rewards, ref, beta, d)
            low, high = (beta, high) if (rewards * probs).sum() > goal else (low, beta)
        optima[d] = probs
    for d, best in optima.items():
        own = f_divergence(best.log(), ref.log(), d)
        for other, probs in optima.items():
            if other is not d:
                assert f_divergence(probs.log(), ref.log(), d) > own
    coverage = [f_divergence(optima[d].log(), ref.log(), REVERSE_KL) for d in FAMILY]
    assert all(a > b for a, b in itertools.pairwise(coverage))


# --- TRL ---------------------------------------------------------------------------------------


def trl_loss(chosen, rejected, kind, *, beta=0.1, coefficient=0.5):
    """Run the installed TRL's own lines, from the log ratios to the sigmoid loss."""
    pytest.importorskip("trl")
    source = Path(importlib.util.find_spec("trl").origin).parent / "trainer" / "dpo_trainer.py"
    text = source.read_text()
    start = text.find('        if self.f_divergence_type == "reverse_kl"')
    end = text.find("        loss = 0.0", start)
    if start < 0 or end < 0:
        pytest.skip("this version of TRL is organised differently")
    names = {
        "chosen_logratios": chosen,
        "rejected_logratios": rejected,
        "self": SimpleNamespace(f_divergence_type=kind, f_alpha_divergence_coef=coefficient),
        "torch": torch,
        "F": torch.nn.functional,
        "math": math,
    }
    exec(textwrap.dedent(text[start:end]), names)
    return -logsigmoid(beta * names["delta_score"])


@quick
@given(seeds)
def test_trl_types_are_ours_at_ordinary_ratios(seed):
    chosen, rejected = (x.float() for x in pairs(seed))
    for kind, divergence in (
        ("reverse_kl", KL),
        ("forward_kl", REVERSE_KL),
        ("js_divergence", JENSEN_SHANNON_DOUBLE),  # not halved
        ("alpha_divergence", alpha_divergence(0.5)),  # its coefficient is Amari's order
    ):
        theirs = trl_loss(chosen, rejected, kind)
        ours = f_dpo_loss(chosen, rejected, divergence=divergence, reduction="none")
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    theirs = trl_loss(chosen, rejected, "alpha_divergence", coefficient=0.2)
    ours = f_dpo_loss(chosen, rejected, divergence=alpha_divergence(0.2), reduction="none")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_trl_forward_kl_is_nan_where_both_responses_sank_and_ours_is_not():
    """exp(100) is inf in float32, and inf - inf is NaN. The tangent keeps the order."""
    chosen, rejected = torch.tensor([-100.0]), torch.tensor([-110.0])
    assert trl_loss(chosen, rejected, "forward_kl").isnan()
    assert f_dpo_loss(chosen, rejected, divergence=REVERSE_KL).item() == 0


def test_trl_clamps_the_alpha_score_so_that_its_gradient_vanishes_and_ours_pulls():
    gradients = []
    for loss in (
        lambda x: trl_loss(x, torch.zeros(1), "alpha_divergence", coefficient=0.0).sum(),
        lambda x: f_dpo_loss(x, torch.zeros(1), divergence=alpha_divergence(0.0)),
    ):
        x = torch.tensor([-100.0], requires_grad=True)
        gradients.append(torch.autograd.grad(loss(x), x)[0].item())
    assert gradients[0] == 0
    assert gradients[1] < 0


def test_trl_alpha_loses_digits_near_the_kl_and_ours_does_not():
    """(exp(x) - 1) / small in float32 keeps few digits of small ratios; expm1 keeps all."""
    chosen, rejected = torch.tensor([1e-3]), torch.tensor([0.0])
    order = 0.9999
    margin = 10 * -math.expm1((order - 1) * 1e-3) / (1 - order)
    exact = math.log1p(math.exp(-margin))
    theirs = trl_loss(chosen, rejected, "alpha_divergence", beta=10.0, coefficient=order).item()
    ours = f_dpo_loss(chosen, rejected, beta=10.0, divergence=alpha_divergence(order)).item()
    assert abs(theirs - exact) > 1e-4
    assert abs(ours - exact) < 1e-6


def test_trl_accepts_orders_above_one_and_we_refuse_them():
    """Order 2 is chi-square: its optimum drops responses, and the reward is no longer f'."""
    x = torch.zeros(1)
    assert trl_loss(x, x, "alpha_divergence", coefficient=2.0).isfinite()
    with pytest.raises(ValueError, match="no mass"):
        f_dpo_loss(x, x, divergence=alpha_divergence(2.0))


def test_trl_alpha_knows_no_float64():
    x = torch.zeros(1, dtype=torch.float64)
    with pytest.raises(KeyError):
        trl_loss(x, x, "alpha_divergence")
    assert f_dpo_loss(x, x, divergence=alpha_divergence(0.5)).dtype == torch.float64
