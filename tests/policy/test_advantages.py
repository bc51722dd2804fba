"""Advantage estimators against plain loops: GAE, group-relative, GBPO signals."""

import math
from itertools import pairwise
from statistics import median

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steelyard.policy import (
    bounded_ratio_optimum,
    gae,
    gbpo_signals,
    group_relative_advantages,
)

properties = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 100_000)
coefficients = st.sampled_from([0.0, 0.5, 0.95, 1.0])


def close(actual: Tensor, expected: Tensor | np.ndarray | list, tolerance: float = 1e-9) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------- GAE


def trajectory(seed: int, steps: int, envs: int = 3, ends: float = 0.2) -> dict[str, Tensor]:
    """Random rewards and values; terminations and truncations at random places, apart."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values, next_values = torch.randn(
        3, steps, envs, generator=generator, dtype=torch.float64
    )
    event = torch.rand(steps, envs, generator=generator)
    return {
        "rewards": rewards,
        "values": values,
        "next_values": next_values,
        "terminated": event < ends / 2,
        "truncated": (event >= ends / 2) & (event < ends),
    }


def gae_loop(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    gae_lambda: float,
) -> np.ndarray:
    r, v, w, term, trunc = (
        x.numpy() for x in (rewards, values, next_values, terminated, truncated)
    )
    result = np.zeros_like(r)
    for b in range(r.shape[1]):
        following = 0.0
        for t in reversed(range(r.shape[0])):
            delta = r[t, b] + (0.0 if term[t, b] else gamma * w[t, b]) - v[t, b]
            ended = term[t, b] or trunc[t, b]
            following = delta + (0.0 if ended else gamma * gae_lambda * following)
            result[t, b] = following
    return result


@properties
@given(seeds, st.integers(1, 40), coefficients, coefficients)
def test_gae_is_the_backward_loop(seed, steps, gamma, gae_lambda):
    data = trajectory(seed, steps)
    estimate = gae(**data, gamma=gamma, gae_lambda=gae_lambda)
    close(estimate.advantages, gae_loop(**data, gamma=gamma, gae_lambda=gae_lambda))
    close(estimate.returns, estimate.advantages + data["values"])


@pytest.mark.parametrize("steps", [1, 2, 3, 127, 128, 129, 5000])
@pytest.mark.parametrize("ends", [0.0, 0.01])
def test_gae_is_the_backward_loop_at_any_length(steps, ends):
    data = trajectory(steps, steps, envs=1, ends=ends)
    for gamma, gae_lambda in ((0.99, 0.95), (1.0, 1.0)):
        estimate = gae(**data, gamma=gamma, gae_lambda=gae_lambda)
        close(estimate.advantages, gae_loop(**data, gamma=gamma, gae_lambda=gae_lambda))


def episodes(terminated: Tensor, truncated: Tensor) -> list[slice]:
    """The episodes of one column; the last may be cut by the end of the rollout."""
    last = (terminated | truncated).nonzero().flatten().tolist()
    edges = [0, *(t + 1 for t in last), len(terminated)]
    return [slice(a, b) for a, b in pairwise(edges) if a < b]


@properties
@given(seeds, coefficients, coefficients)
def test_gae_is_a_discounted_sum_of_errors_within_each_episode(seed, gamma, gae_lambda):
    data = trajectory(seed, 12, envs=1)
    estimate = gae(**data, gamma=gamma, gae_lambda=gae_lambda).advantages[:, 0]
    column = {name: tensor[:, 0] for name, tensor in data.items()}
    future = column["next_values"].masked_fill(column["terminated"], 0.0)
    error = column["rewards"] + gamma * future - column["values"]
    for episode in episodes(column["terminated"], column["truncated"]):
        for t in range(episode.start, episode.stop):
            steps = range(t, episode.stop)
            expected = sum((gamma * gae_lambda) ** (k - t) * error[k].item() for k in steps)
            assert estimate[t].item() == pytest.approx(expected, abs=1e-9)


@properties
@given(seeds, coefficients)
def test_gae_with_lambda_one_is_the_bootstrapped_return_minus_the_value(seed, gamma):
    """The sum telescopes because consecutive steps agree on values, as they do in a rollout."""
    data = trajectory(seed, 12, envs=1)
    ended = data["terminated"] | data["truncated"]
    following = data["values"].roll(-1, 0)
    following[-1] = data["next_values"][-1]
    data["next_values"] = torch.where(ended, data["next_values"], following)
    estimate = gae(**data, gamma=gamma, gae_lambda=1.0)
    column = {name: tensor[:, 0] for name, tensor in data.items()}
    for episode in episodes(column["terminated"], column["truncated"]):
        end = episode.stop - 1
        tail = 0.0 if column["terminated"][end] else column["next_values"][end].item()
        for t in range(episode.start, episode.stop):
            rewards = column["rewards"][t : episode.stop].tolist()
            expected = (
                sum(gamma**k * r for k, r in enumerate(rewards)) + gamma ** len(rewards) * tail
            )
            assert estimate.returns[t, 0].item() == pytest.approx(expected, abs=1e-9)


@properties
@given(seeds, coefficients)
def test_gae_with_lambda_zero_is_the_temporal_difference_error(seed, gamma):
    data = trajectory(seed, 9)
    future = data["next_values"].masked_fill(data["terminated"], 0.0)
    error = data["rewards"] + gamma * future - data["values"]
    close(gae(**data, gamma=gamma, gae_lambda=0.0).advantages, error)


def test_a_termination_ends_the_value_and_a_truncation_does_not():
    step = {
        "rewards": torch.ones(1, 2),
        "values": torch.zeros(1, 2),
        "next_values": torch.full((1, 2), 10.0),
        "terminated": torch.tensor([[True, False]]),
        "truncated": torch.tensor([[False, True]]),
    }
    close(gae(**step, gamma=0.9).advantages, [[1.0, 10.0]], 1e-6)
    both = step | {"truncated": torch.tensor([[True, True]])}
    close(gae(**both, gamma=0.9).advantages, [[1.0, 10.0]], 1e-6)


@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_the_reset_step_after_an_episode_touches_no_real_step(end):
    """Under next-step autoreset the step after an end only resets: its numbers mean nothing."""
    data = trajectory(0, 8, envs=1, ends=0.0)
    data[end][3] = True  # step 4 is the reset
    dummy = {name: data[name].clone() for name in ("rewards", "values", "next_values")}
    for tensor in dummy.values():
        tensor[4] = 1e6
    real = torch.arange(8) != 4
    estimate = gae(**data).advantages[real]
    assert torch.equal(gae(**(data | dummy)).advantages[real], estimate)
    kept = {name: tensor[:4] for name, tensor in data.items()}
    close(estimate[:4], gae(**kept).advantages)


def test_gae_takes_any_trailing_shape_number_masks_and_strides():
    data = trajectory(1, 10, envs=6)
    expected = gae(**data)
    shaped = {name: tensor.reshape(10, 2, 3) for name, tensor in data.items()}
    close(gae(**shaped).advantages, expected.advantages.reshape(10, 2, 3))
    column = {name: tensor[:, 0] for name, tensor in data.items()}
    close(gae(**column).advantages, expected.advantages[:, 0])
    floats = data | {name: data[name].double() for name in ("terminated", "truncated")}
    assert torch.equal(gae(**floats).advantages, expected.advantages)
    strided = {name: tensor.T.contiguous().T for name, tensor in data.items()}
    assert torch.equal(gae(**strided).advantages, expected.advantages)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gae_accumulates_half_precision_in_float32(dtype):
    data = trajectory(2, 50)
    floats = ("rewards", "values", "next_values")
    halves = data | {name: data[name].to(dtype) for name in floats}
    singles = halves | {name: halves[name].float() for name in floats}
    estimate, expected = gae(**halves), gae(**singles)
    assert torch.equal(estimate.advantages, expected.advantages.to(dtype))
    assert torch.equal(estimate.returns, expected.returns.to(dtype))


def test_gae_carries_no_gradient():
    data = trajectory(3, 5)
    for name in ("rewards", "values", "next_values"):
        data[name].requires_grad_()
    assert not any(part.requires_grad for part in gae(**data))


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"values": torch.ones(3, 1)}, ValueError, "values"),
        ({"next_values": torch.ones(2)}, ValueError, "next_values"),
        ({"terminated": torch.ones(1, 1)}, ValueError, "terminated"),
        ({"truncated": torch.ones(2, 2)}, ValueError, "truncated"),
        ({"rewards": torch.ones(2, 1, dtype=torch.long)}, TypeError, "rewards"),
        ({"values": np.ones((2, 1))}, TypeError, "values"),
        ({"gamma": 1.01}, ValueError, "gamma"),
        ({"gamma": math.nan}, ValueError, "gamma"),
        ({"gae_lambda": -0.1}, ValueError, "gae_lambda"),
    ],
)
def test_wrong_gae_arguments_are_named(change, error, named):
    names = ("rewards", "values", "next_values", "terminated", "truncated")
    with pytest.raises(error, match=named):
        gae(**({name: torch.ones(2, 1) for name in names} | change))


def test_an_empty_time_axis_is_named():
    with pytest.raises(ValueError, match="rewards must not be empty"):
        gae(*(torch.ones(0, 3) for _ in range(5)))


# ---------------------------------------------------------------- relative to a group


def grouped(seed: int, *, binary: bool = False) -> tuple[Tensor, Tensor]:
    """Ragged groups of 1 to 6 rewards, interleaved, with far-apart and negative ids."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 7, size=rng.integers(1, 6))
    ids = np.repeat(rng.choice([-7, 0, 3, 1000, 10**12], len(sizes), replace=False), sizes)
    rewards = rng.integers(0, 2, len(ids)) if binary else rng.integers(-3, 4, len(ids)) / 2
    return torch.tensor(rewards, dtype=torch.float64), torch.from_numpy(rng.permutation(ids))


def members(groups: Tensor) -> list[np.ndarray]:
    ids = groups.numpy()
    return [np.flatnonzero(ids == group) for group in np.unique(ids)]


def advantages_loop(rewards: Tensor, groups: Tensor, scale: str, eps: float = 1e-6) -> np.ndarray:
    r, result = rewards.numpy(), np.zeros(len(rewards))
    for group in members(groups):
        result[group] = r[group] - r[group].mean()
        if scale == "group" and len(group) > 1:
            result[group] /= r[group].std(ddof=1) + eps
    if scale == "batch":
        result /= (r.std(ddof=1) if len(r) > 1 else 0.0) + eps
    return result


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@properties
@given(seed=seeds)
def test_group_advantages_are_the_loop_over_groups(scale, seed):
    rewards, groups = grouped(seed)
    advantages = group_relative_advantages(rewards, groups, scale=scale)
    close(advantages, advantages_loop(rewards, groups, scale))
    for group in members(groups):
        assert advantages[group].sum().item() == pytest.approx(0.0, abs=1e-9)
        if len(group) == 1:
            assert advantages[group].item() == 0


@properties
@given(seed=seeds)
def test_group_advantages_follow_a_permutation_and_a_renaming(seed):
    rewards, groups = grouped(seed)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    for function in (
        group_relative_advantages,
        lambda r, g: gbpo_signals(r, g, temperature=0.5, ties="exact").target_ratio,
    ):
        expected = function(rewards, groups)
        close(function(rewards[order], groups[order]), expected[order])
        close(function(rewards, -3 * groups + 1), expected)
        close(function(rewards, groups.unique(return_inverse=True)[1].to(torch.int32)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reward", [0.0, 0.1, 1000.1, -12345.678])
@pytest.mark.parametrize("size", [1, 3, 7, 11])
def test_equal_rewards_have_exactly_no_advantage(dtype, reward, size):
    """Rounding of the mean must not pass for a difference: divided by its own size it is 1."""
    rewards, groups = torch.full((size,), reward, dtype=dtype), torch.zeros(size, dtype=torch.long)
    for scale in ("group", "batch", "none"):
        assert (group_relative_advantages(rewards, groups, scale=scale) == 0).all()
    for ties in ("half", "exact"):
        signals = gbpo_signals(rewards, groups, ties=ties)
        assert (signals.advantages == 0).all()
        assert (signals.target_ratio == 1).all()


def test_nan_spreads_within_its_group_only():
    rewards = torch.tensor([1.0, math.nan, 1.0, 2.0])
    groups = torch.tensor([0, 0, 1, 1])
    sick = [True, True, False, False]
    assert group_relative_advantages(rewards, groups).isnan().tolist() == sick
    for ties in ("half", "exact"):
        signals = gbpo_signals(rewards, groups, ties=ties)
        assert signals.advantages.isnan().tolist() == sick
        assert signals.target_ratio.isnan().tolist() == sick


# ---------------------------------------------------------------- GBPO


def signals_loop(
    rewards: Tensor, groups: Tensor, temperature: float, low: float, high: float
) -> tuple[np.ndarray, np.ndarray]:
    r = rewards.numpy()
    advantages, target = np.zeros(len(r)), np.zeros(len(r))
    for group in members(groups):
        deviation = (r[group].std(ddof=1) if len(group) > 1 else 0.0) + 1e-6
        advantages[group] = (r[group] - r[group].mean()) / deviation
        signal = (r[group] - median(r[group])) / deviation / temperature
        target[group] = 1 - low + (low + high) * 0.5 * (1 + np.tanh(signal / 2))
    return advantages, target


@properties
@given(seeds, st.sampled_from([1e-4, 0.5, 2.0]), st.sampled_from([(0.2, 0.2), (0.2, 0.28)]))
def test_published_signals_are_the_loop_over_groups(seed, temperature, band):
    rewards, groups = grouped(seed)
    low, high = band
    signals = gbpo_signals(
        rewards, groups, temperature=temperature, epsilon_low=low, epsilon_high=high
    )
    advantages, target = signals_loop(rewards, groups, temperature, low, high)
    close(signals.advantages, advantages)
    close(signals.target_ratio, target)
    close(signals.advantages, group_relative_advantages(rewards, groups))


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1.0, 3.0], [0.8, 1.2]),
        ([4.0, 1.0, 3.0, 2.0], [1.2, 0.8, 1.2, 0.8]),
        ([1.0, 2.0, 2.0, 3.0], [0.8, 1.0, 1.0, 1.2]),
        ([3.0, 1.0, 2.0], [1.2, 0.8, 1.0]),
    ],
)
def test_the_median_of_an_even_group_interpolates(rewards, expected):
    groups = torch.zeros(len(rewards), dtype=torch.long)
    close(gbpo_signals(torch.tensor(rewards), groups).target_ratio, expected, 1e-6)


@properties
@given(seeds, st.sampled_from([(0.2, 0.2), (0.2, 0.28), (0.3, 0.1), (1.0, 3.0)]))
def test_exact_targets_are_the_bounded_ratio_optimum_of_each_group(seed, band):
    rewards, groups = grouped(seed)
    low, high = band
    target = gbpo_signals(
        rewards, groups, epsilon_low=low, epsilon_high=high, ties="exact"
    ).target_ratio
    for group in members(groups):
        probs = torch.full((len(group),), 1 / len(group), dtype=torch.float64)
        best = bounded_ratio_optimum(probs, rewards[group], low=1 - low, high=1 + high)
        close(target[group], best.ratio)
        assert target[group].mean().item() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(("right", "size"), [(1, 4), (2, 5), (3, 8)])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28)])
def test_a_right_minority_rises_and_the_wrong_stay_in_the_middle(right, size, low, high):
    rewards = torch.tensor([1.0] * right + [0.0] * (size - right), dtype=torch.float64)
    groups = torch.full((size,), 5)
    target = gbpo_signals(rewards, groups, epsilon_low=low, epsilon_high=high).target_ratio
    close(target[:right], [1 + high] * right)
    close(target[right:], [1 + (high - low) / 2] * (size - right))


@pytest.mark.parametrize("size", [4, 5, 8])
def test_exact_ties_raise_a_right_majority_by_its_share(size):
    epsilon, right = 0.2, size - 1
    rewards = torch.tensor([1.0] * right + [0.0], dtype=torch.float64)
    groups = torch.zeros(size, dtype=torch.long)
    share = right / size
    exact = gbpo_signals(rewards, groups, ties="exact").target_ratio
    close(exact, [1 + epsilon * (1 - share) / share] * right + [1 - epsilon])
    close(gbpo_signals(rewards, groups).target_ratio, [1.0] * right + [1 - epsilon])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_signals_stay_finite_and_keep_their_dtype(dtype):
    rewards = torch.tensor([1e4, -1e4, 0.5, 1.0], dtype=dtype)
    groups = torch.tensor([0, 0, 1, 1])
    for ties in ("half", "exact"):
        signals = gbpo_signals(rewards, groups, ties=ties)
        assert signals.advantages.dtype == signals.target_ratio.dtype == dtype
        close(signals.advantages, [0.5**0.5, -(0.5**0.5), -(0.5**0.5), 0.5**0.5], 1e-2)
        close(signals.target_ratio, [1.2, 0.8, 0.8, 1.2], 1e-2)


def test_group_functions_carry_no_gradient():
    rewards = torch.tensor([1.0, 2.0], requires_grad=True)
    groups = torch.zeros(2, dtype=torch.long)
    assert not group_relative_advantages(rewards, groups).requires_grad
    assert not any(part.requires_grad for part in gbpo_signals(rewards, groups))


@pytest.mark.parametrize("function", [group_relative_advantages, gbpo_signals])
@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"rewards": torch.ones(2, 2)}, ValueError, "rewards"),
        ({"rewards": torch.ones(2, dtype=torch.long)}, TypeError, "rewards"),
        ({"rewards": [1.0, 2.0]}, TypeError, "rewards"),
        ({"rewards": torch.ones(0), "groups": torch.ones(0).long()}, ValueError, "rewards"),
        ({"groups": torch.zeros(3, dtype=torch.long)}, ValueError, "groups"),
        ({"groups": torch.zeros(2)}, TypeError, "groups"),
        ({"groups": torch.zeros(2, dtype=torch.bool)}, TypeError, "groups"),
        ({"groups": ["a", "b"]}, TypeError, "groups"),
        ({"eps": 0.0}, ValueError, "eps"),
    ],
)
def test_wrong_group_arguments_are_named(function, change, error, named):
    arguments = {"rewards": torch.ones(2), "groups": torch.zeros(2, dtype=torch.long)}
    with pytest.raises(error, match=named):
        function(**(arguments | change))


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.0},
        {"epsilon_low": 0.0},
        {"epsilon_low": 1.1},
        {"epsilon_high": 0.0},
        {"ties": "middle"},
    ],
)
def test_wrong_signal_settings_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        gbpo_signals(torch.ones(2), torch.zeros(2, dtype=torch.long), **change)
    with pytest.raises(ValueError, match="scale"):
        group_relative_advantages(torch.ones(2), torch.zeros(2, dtype=torch.long), scale="std")
