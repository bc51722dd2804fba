"""The policy losses against their formulas: PPO, BPO, the threshold, GRPO and GBPO."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import Tensor

from steelyard.policy import (
    bounded_ratio_optimum,
    bpo_loss,
    bpo_target_ratio,
    bpo_threshold_loss,
    gbpo_loss,
    gbpo_signals,
    group_relative_advantages,
    grpo_loss,
    ppo_gap,
    ppo_loss,
)

properties = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 100_000)
epsilons = st.sampled_from([0.01, 0.1, 0.2, 0.5, 1.0])
temperatures = st.sampled_from([1e-3, 0.1, 1.0, 10.0])


def draw(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def close(actual: Tensor, expected: Tensor | np.ndarray | float, tolerance: float = 1e-9) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def gradient(loss: Tensor, at: Tensor) -> Tensor:
    return torch.autograd.grad(loss, at)[0]


# ---------------------------------------------------------------- PPO


@properties
@given(seeds, epsilons)
def test_ppo_is_the_published_clipped_surrogate(seed, epsilon):
    """The three lines of the PPO documentation of stable-baselines3, in NumPy."""
    log_ratio, advantages = draw(seed, 64), draw(seed + 1, 64)
    ratio, advantage = np.exp(log_ratio.numpy()), advantages.numpy()
    unclipped = advantage * ratio
    clipped = advantage * np.clip(ratio, 1 - epsilon, 1 + epsilon)
    close(ppo_loss(log_ratio, advantages, epsilon=epsilon), -np.minimum(unclipped, clipped).mean())


@properties
@given(seeds, epsilons, st.sampled_from([0.0, 0.28, 3.0]))
def test_ppo_band_may_be_asymmetric(seed, epsilon, epsilon_high):
    log_ratio, advantages = draw(seed, 32), draw(seed + 1, 32)
    values = ppo_loss(
        log_ratio, advantages, epsilon=epsilon, epsilon_high=epsilon_high, reduction="none"
    )
    for value, x, a in zip(values, log_ratio, advantages, strict=True):
        ratio = math.exp(x)
        edge = min(ratio, 1 + epsilon_high) if a > 0 else max(ratio, 1 - epsilon)
        assert value.item() == pytest.approx(-a.item() * edge, abs=1e-12)


@properties
@given(seeds, epsilons)
def test_shifted_ppo_is_a_one_sided_hinge_at_every_ratio(seed, epsilon):
    log_ratio, advantages = draw(seed, 64, scale=3.0), draw(seed + 1, 64)
    advantages[:4] = 0.0
    sign = advantages.sign()
    shifted = ppo_loss(log_ratio, advantages, epsilon=epsilon, reduction="none")
    shifted = shifted + (1 + epsilon * sign) * advantages
    close(ppo_gap(log_ratio, advantages, epsilon), shifted)
    hinge = advantages.abs() * (sign * (1 + epsilon * sign - log_ratio.exp())).clamp(min=0)
    close(shifted, hinge)


@properties
@given(seeds, epsilons)
def test_bpo_dominates_shifted_ppo_and_equals_it_before_the_target(seed, epsilon):
    log_ratio, advantages = draw(seed, 64), draw(seed + 1, 64)
    sign = advantages.sign()
    target = 1 + epsilon * sign
    bpo = bpo_loss(log_ratio, target, advantages.abs(), reduction="none")
    ppo = ppo_gap(log_ratio, advantages, epsilon)
    before = sign * (target - log_ratio.exp()) >= 0
    close(bpo[before], ppo[before])
    assert (bpo >= ppo - 1e-12).all()
    assert (bpo[~before] > 0).all()
    assert (ppo[~before] == 0).all()


@properties
@given(seeds, st.sampled_from([0.1, 0.2, 0.5]))
def test_ppo_and_hard_bpo_have_one_gradient_inside_the_band(seed, epsilon):
    inside = 1 + 0.99 * epsilon * draw(seed, 64).tanh()
    log_ratio = inside.log().requires_grad_()
    advantages = draw(seed + 1, 64)
    target = 1 + epsilon * advantages.sign()
    ppo = gradient(ppo_loss(log_ratio, advantages, epsilon=epsilon), log_ratio)
    bpo = gradient(bpo_loss(log_ratio, target, advantages.abs()), log_ratio)
    gap = gradient(ppo_gap(log_ratio, advantages, epsilon).mean(), log_ratio)
    close(bpo, ppo)
    close(gap, ppo)
    close(ppo, -(advantages * inside) / 64)


def test_only_bpo_pulls_an_overshoot_back():
    log_ratio = torch.tensor([1.5, 0.5]).log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0])
    ppo = gradient(ppo_loss(log_ratio, advantages, reduction="sum"), log_ratio)
    target = 1 + 0.2 * advantages
    bpo = gradient(bpo_loss(log_ratio, target, advantages.abs(), reduction="sum"), log_ratio)
    assert ppo.tolist() == [0.0, 0.0]
    close(bpo, torch.tensor([1.5, -0.5]), 1e-6)


# ---------------------------------------------------------------- BPO


@properties
@given(seeds)
def test_bpo_gradient_is_weight_times_sign_times_ratio(seed):
    log_ratio, target = draw(seed, 64).requires_grad_(), draw(seed + 1, 64).exp()
    weight = draw(seed + 2, 64).abs()
    loss = bpo_loss(log_ratio, target, weight, reduction="sum")
    ratio = log_ratio.detach().exp()
    close(loss.detach(), (weight * (ratio - target).abs()).sum())
    close(gradient(loss, log_ratio), weight * (ratio - target).sign() * ratio)


def test_bpo_first_step_is_the_policy_gradient():
    log_ratio = torch.zeros(64, dtype=torch.float64, requires_grad=True)
    advantages = draw(0, 64)
    target = bpo_target_ratio(advantages, torch.zeros_like(advantages), temperature=0.0)
    loss = bpo_loss(log_ratio, target, advantages.abs(), reduction="sum")
    close(loss.detach(), 0.2 * advantages.abs().sum())
    close(gradient(loss, log_ratio), -advantages)


def test_bpo_is_zero_with_zero_gradient_at_the_target():
    log_ratio = torch.zeros(3, requires_grad=True)
    loss = bpo_loss(log_ratio, torch.ones(3), torch.ones(3))
    loss.backward()
    assert loss.item() == 0
    assert log_ratio.grad.tolist() == [0.0] * 3


@properties
@given(seeds, epsilons, temperatures)
def test_target_is_a_tanh_band_about_one(seed, epsilon, temperature):
    returns, threshold = draw(seed, 64, scale=3.0), draw(seed + 1, 64)
    target = bpo_target_ratio(returns, threshold, epsilon=epsilon, temperature=temperature)
    shift = epsilon * np.tanh((returns - threshold).numpy() / (2 * temperature))
    close(target, 1 + shift)
    order = (returns - threshold).argsort()
    assert (target[order].diff() >= -1e-12).all()


@properties
@given(seeds, epsilons, st.sampled_from([0.05, 0.28, 4.0]), temperatures)
def test_target_fills_an_asymmetric_band(seed, epsilon, epsilon_high, temperature):
    returns, threshold = draw(seed, 64, scale=3.0), draw(seed + 1, 64)
    target = bpo_target_ratio(
        returns, threshold, epsilon=epsilon, epsilon_high=epsilon_high, temperature=temperature
    )
    low, high = 1 - epsilon, 1 + epsilon_high
    scaled = ((returns - threshold) / temperature).numpy()
    close(target, low + (high - low) * 0.5 * (1 + np.tanh(scaled / 2)))
    assert target.min() >= low - 1e-12
    assert target.max() <= high + 1e-12


@properties
@given(seeds, temperatures, st.integers(-64, 64), st.sampled_from([0.25, 2.0, 64.0]))
def test_target_ignores_a_common_shift_and_a_common_scale(seed, temperature, shift, scale):
    returns, threshold = draw(seed, 16), draw(seed + 1, 16)
    target = bpo_target_ratio(returns, threshold, temperature=temperature)
    moved = bpo_target_ratio(returns + shift, threshold + shift, temperature=temperature)
    scaled = bpo_target_ratio(returns * scale, threshold * scale, temperature=temperature * scale)
    close(moved, target)
    close(scaled, target)


def test_target_limits_are_the_hard_band_and_one():
    returns, threshold = draw(0, 64), draw(1, 64)
    hard = bpo_target_ratio(returns, threshold, epsilon=0.3, temperature=0.0)
    close(hard, 1 + 0.3 * (returns - threshold).sign())
    close(bpo_target_ratio(returns, threshold, epsilon=0.3, temperature=1e-12), hard)
    close(bpo_target_ratio(returns, threshold, temperature=1e12), torch.ones(64))


@pytest.mark.parametrize("temperature", [0.0, 1e-3])
def test_target_at_a_tie_is_the_middle_of_the_band(temperature):
    tie = torch.tensor([2.0])
    target = bpo_target_ratio(tie, tie, epsilon=0.2, epsilon_high=0.4, temperature=temperature)
    assert target.item() == pytest.approx(1.1, abs=1e-6)


def test_target_is_the_optimum_of_the_bounded_ratio_problem():
    probs, q = draw(0, 6).softmax(-1), draw(1, 6)
    best = bounded_ratio_optimum(probs, q, low=0.7, high=1.3, temperature=0.5)
    target = bpo_target_ratio(q, best.threshold.expand(6), epsilon=0.3, temperature=0.5)
    close(target, best.ratio)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_target_saturates_at_the_edges_without_overflow(dtype):
    returns, threshold = torch.tensor([1e4, -1e4], dtype=dtype), torch.zeros(2, dtype=dtype)
    target = bpo_target_ratio(returns, threshold, epsilon=0.25, temperature=1e-3)
    assert target.dtype == dtype
    assert target.tolist() == [1.25, 0.75]


@pytest.mark.parametrize("temperature", [0.0, 1e-3])
def test_nan_returns_give_nan_targets(temperature):
    returns, threshold = torch.tensor([math.nan, 1.0]), torch.zeros(2)
    target = bpo_target_ratio(returns, threshold, temperature=temperature)
    assert target.isnan().tolist() == [True, False]


# ---------------------------------------------------------------- the threshold


@properties
@given(seeds, temperatures)
def test_threshold_losses_are_their_formulas(seed, temperature):
    returns, threshold = draw(seed, 64, scale=3.0), draw(seed + 1, 64)
    distance = (returns - threshold).numpy()
    softplus = np.logaddexp(distance / temperature, 0)
    close(
        bpo_threshold_loss(returns, threshold, kind="temperature", temperature=temperature),
        (temperature * softplus - distance / 2).mean(),
    )
    code = bpo_threshold_loss(returns, threshold, kind="code", temperature=temperature)
    close(code, (np.logaddexp(distance, 0) - distance / 2).mean())
    close(code, bpo_threshold_loss(returns, threshold, kind="temperature"))
    close(bpo_threshold_loss(returns, threshold, kind="median"), np.abs(distance).mean() / 2)


def test_temperature_loss_tends_to_the_median_loss():
    returns, threshold = draw(0, 64), draw(1, 64)
    median = bpo_threshold_loss(returns, threshold, kind="median")
    soft = bpo_threshold_loss(returns, threshold, kind="temperature", temperature=1e-12)
    close(soft, median)


def test_code_loss_is_a_mean_for_small_and_a_median_for_large_distances():
    zeros = torch.zeros(2, dtype=torch.float64)
    small = torch.tensor([1e-2, -3e-2], dtype=torch.float64)
    loss = bpo_threshold_loss(small, zeros, reduction="none")
    close(loss - math.log(2), small.square() / 8, 1e-8)
    large = torch.tensor([100.0, -1e4], dtype=torch.float64)
    close(bpo_threshold_loss(large, zeros, reduction="none"), large.abs() / 2)


def expected_threshold_loss(u: Tensor, probs: Tensor, q: Tensor, temperature: float) -> Tensor:
    values = bpo_threshold_loss(
        q, u.expand_as(q), kind="temperature", temperature=temperature, reduction="none"
    )
    return (probs * values).sum()


@properties
@given(seeds, temperatures)
def test_temperature_loss_is_stationary_at_the_soft_threshold(seed, temperature):
    probs, q = draw(seed, 6).softmax(-1), draw(seed + 1, 6)
    best = bounded_ratio_optimum(probs, q, low=0.8, high=1.2, temperature=temperature)
    u = best.threshold.clone().requires_grad_()
    assert gradient(expected_threshold_loss(u, probs, q, temperature), u).abs() < 1e-9


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_minimising_the_temperature_loss_recovers_the_soft_threshold_from_data(temperature):
    q = draw(0, 41).exp()  # skewed: mean, median and thresholds differ
    probs = torch.full_like(q, 1 / 41)

    def loss(u: float) -> float:
        return expected_threshold_loss(torch.tensor(u).double(), probs, q, temperature).item()

    found = minimize_scalar(loss, bracket=(q.min().item(), q.max().item()), tol=1e-12).x
    best = bounded_ratio_optimum(probs, q, low=0.8, high=1.2, temperature=temperature)
    assert found == pytest.approx(best.threshold.item(), abs=1e-5)
    assert abs(found - q.median().item()) > 1e-3


def test_the_temperature_in_the_loss_changes_the_threshold():
    """The released code trains at temperature 1 whatever the target's temperature."""
    probs, q = torch.full((5,), 0.2, dtype=torch.float64), draw(0, 5).exp()
    u = bounded_ratio_optimum(probs, q, low=0.8, high=1.2, temperature=1e-2).threshold
    u = u.clone().requires_grad_()
    code = bpo_threshold_loss(q, u.expand(5), kind="code")
    assert gradient(code, u).abs() > 1e-2


# ---------------------------------------------------------------- groups of answers


def aggregate_by_hand(values: np.ndarray, mask: np.ndarray, aggregate: str) -> float:
    sums = [
        sum(v for v, m in zip(*row, strict=True) if m) for row in zip(values, mask, strict=True)
    ]
    lengths = [int(sum(row)) for row in mask]
    kept = [i for i, length in enumerate(lengths) if length]
    if aggregate == "token":
        return sum(sums) / sum(lengths)
    if aggregate == "sequence":
        return sum(sums[i] / lengths[i] for i in kept) / len(kept)
    return sum(sums[i] for i in kept) / len(kept)


@pytest.mark.parametrize("aggregate", ["token", "sequence", "sequence_sum"])
@properties
@given(seed=seeds)
def test_grpo_and_gbpo_are_loops_over_tokens(aggregate, seed):
    answers, tokens = 5, 7
    log_ratio, advantages = draw(seed, answers, tokens), draw(seed + 1, answers)
    mask = draw(seed + 2, answers, tokens) > 0
    mask[0] = False
    mask[1, 0] = True
    target = 1 + 0.2 * draw(seed + 3, answers).tanh()
    ratio = np.exp(log_ratio.numpy())
    ppo, bpo = np.empty_like(ratio), np.empty_like(ratio)
    for i, t in np.ndindex(answers, tokens):
        a, r = advantages[i].item(), ratio[i, t]
        ppo[i, t] = -min(r * a, min(max(r, 0.8), 1.28) * a)
        bpo[i, t] = abs(a) * abs(r - target[i].item())
    kept = mask.numpy()
    grpo = grpo_loss(log_ratio, advantages, epsilon_high=0.28, mask=mask, aggregate=aggregate)
    close(grpo, aggregate_by_hand(ppo, kept, aggregate))
    gbpo = gbpo_loss(log_ratio, target, advantages.abs(), mask=mask, aggregate=aggregate)
    close(gbpo, aggregate_by_hand(bpo, kept, aggregate))
    everything = np.ones_like(kept)
    unmasked = grpo_loss(log_ratio, advantages, epsilon_high=0.28, aggregate=aggregate)
    close(unmasked, aggregate_by_hand(ppo, everything, aggregate))


def test_token_and_sequence_means_differ_on_ragged_answers():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    advantages = torch.tensor([1.0, -1.0])
    losses = {
        aggregate: grpo_loss(torch.zeros(2, 3), advantages, mask=mask, aggregate=aggregate).item()
        for aggregate in ("token", "sequence", "sequence_sum")
    }
    assert losses == {"token": -0.5, "sequence": 0.0, "sequence_sum": -1.0}


@pytest.mark.parametrize("ties", ["half", "exact"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 1000.1])
def test_groups_of_equal_rewards_have_zero_loss_and_gradient(ties, reward):
    rewards, groups = torch.full((7,), reward), torch.zeros(7, dtype=torch.long)
    signals = gbpo_signals(rewards, groups, ties=ties)
    log_ratio = draw(0, 7, 3).float().requires_grad_()
    for loss in (
        gbpo_loss(log_ratio, signals.target_ratio, signals.advantages.abs()),
        grpo_loss(log_ratio, group_relative_advantages(rewards, groups)),
    ):
        assert loss.item() == 0
        assert (gradient(loss, log_ratio) == 0).all()


def test_ratios_of_one_token_answers_reduce_grpo_to_ppo():
    log_ratio, advantages = draw(0, 16), draw(1, 16)
    close(grpo_loss(log_ratio[:, None], advantages), ppo_loss(log_ratio, advantages))
    target, weight = draw(2, 16).exp(), advantages.abs()
    close(gbpo_loss(log_ratio[:, None], target, weight), bpo_loss(log_ratio, target, weight))
