"""CANON and ADORA against loops over groups and against their theorems."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.policy import (
    adora_weights,
    canon_advantages,
    canon_mu_schedule,
    canon_split,
    group_relative_advantages,
)

quick = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 2**31)
close = {"rtol": 0, "atol": 1e-12}


def batch(seed: int, sizes: tuple[int, ...] = (4, 6, 2, 8), binary: bool = False):
    """Rewards, metric without ties and shuffled group ids."""
    g = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    rewards = torch.rand(n, dtype=torch.float64, generator=g)
    rewards = (rewards > 0.5).double() if binary else rewards
    metric = torch.randperm(n, generator=g).double()
    ids = torch.tensor([7, -3, 100, 0, 5])[: len(sizes)].repeat_interleave(torch.tensor(sizes))
    return rewards, metric, ids[torch.randperm(n, generator=g)]


def canon_loop(rewards, metric, groups, mu, alpha=1.0):
    result = torch.empty_like(rewards)
    for group in groups.unique():
        places = (groups == group).nonzero().squeeze(1)
        places = places[metric[places].argsort(stable=True)]
        half = len(places) // 2
        low, high = places[:half], places[half:]
        low_mean, high_mean = rewards[low].mean(), rewards[high].mean()
        inter_high = alpha * rewards[high] - low_mean
        inter_low = rewards[low] - alpha * high_mean
        result[high] = mu * inter_high + (1 - mu) * (rewards[high] - high_mean)
        result[low] = mu * inter_low + (1 - mu) * (rewards[low] - low_mean)
    return result


@quick
@given(seeds, st.floats(0, 1), st.floats(0.1, 1))
def test_canon_is_the_loop_over_groups_of_any_size(seed, mu, alpha):
    rewards, metric, groups = batch(seed, (4, 5, 2, 7, 3))
    got = canon_advantages(rewards, metric, groups, mu=mu, alpha=alpha)
    torch.testing.assert_close(got, canon_loop(rewards, metric, groups, mu, alpha), **close)


@quick
@given(seeds)
def test_canon_at_one_half_with_equal_halves_is_reward_minus_group_mean(seed):
    rewards, metric, groups = batch(seed)
    expected = group_relative_advantages(rewards, groups, scale="none")
    torch.testing.assert_close(canon_advantages(rewards, metric, groups), expected, **close)


@quick
@given(seeds, st.floats(0, 1))
def test_canon_closed_form_and_zero_sum(seed, mu):
    rewards, metric, groups = batch(seed)
    high = canon_split(metric, groups)
    got = canon_advantages(rewards, metric, groups, mu=mu)
    for group in groups.unique():
        mine = groups == group
        plus, minus = rewards[mine & high].mean(), rewards[mine & ~high].mean()
        sign = 2.0 * high[mine].double() - 1.0
        closed = rewards[mine] - (plus + minus) / 2 + (mu - 0.5) * sign * (plus - minus)
        torch.testing.assert_close(got[mine], closed, **close)
        assert abs(got[mine].sum()) < 1e-12


@quick
@given(seeds)
def test_inter_doubles_the_signal_of_the_halves_and_intra_removes_it(seed):
    rewards, metric, groups = batch(seed)
    high = canon_split(metric, groups)
    plain = group_relative_advantages(rewards, groups, scale="none")
    inter = canon_advantages(rewards, metric, groups, mu=1.0)
    intra = canon_advantages(rewards, metric, groups, mu=0.0)
    for group in groups.unique():
        for half in (high, ~high):
            mine = (groups == group) & half
            torch.testing.assert_close(inter[mine].mean(), 2 * plain[mine].mean(), **close)
            assert abs(intra[mine].mean()) < 1e-12


@quick
@given(seeds, st.floats(0, 1))
def test_canon_has_no_direction_and_no_scale_of_the_metric(seed, mu):
    rewards, metric, groups = batch(seed)
    expected = canon_advantages(rewards, metric, groups, mu=mu)
    for changed in (-metric, metric.exp(), 3 * metric - 5):
        got = canon_advantages(rewards, changed, groups, mu=mu)
        torch.testing.assert_close(got, expected, **close)


@quick
@given(seeds, st.floats(-5, 5), st.floats(0.1, 5))
def test_canon_ignores_a_constant_reward_and_follows_its_scale(seed, shift, scale):
    rewards, metric, groups = batch(seed)
    expected = scale * canon_advantages(rewards, metric, groups, mu=0.8)
    got = canon_advantages(scale * rewards + shift, metric, groups, mu=0.8)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@quick
@given(seeds)
def test_a_balanced_second_condition_is_not_amplified(seed):
    """Equally many of the condition's members in both halves: inter equals the plain mean."""
    rewards, metric, groups = batch(seed, (8,))
    high = canon_split(metric, groups)
    members = torch.cat((high.nonzero()[:2, 0], (~high).nonzero()[:2, 0]))
    inter = canon_advantages(rewards, metric, groups, mu=1.0)
    plain = group_relative_advantages(rewards, groups, scale="none")
    torch.testing.assert_close(inter[members].mean(), plain[members].mean(), **close)


def test_pairs_compare_with_each_other_and_equal_rewards_give_nothing_without_alpha():
    rewards, metric = torch.tensor([1.0, 0.25]), torch.tensor([3.0, 4.0])
    group = torch.zeros(2, dtype=torch.long)
    inter = canon_advantages(rewards, metric, group, mu=1.0)
    torch.testing.assert_close(inter, torch.tensor([0.75, -0.75]))
    assert canon_advantages(rewards, metric, group, mu=0.0).abs().max() == 0
    same, halves = torch.full((4,), 2.0), torch.tensor([1.0, 2.0, 3.0, 4.0])
    group = torch.zeros(4, dtype=torch.long)
    assert canon_advantages(same, halves, group, mu=0.7).abs().max() == 0
    weighted = canon_advantages(same, halves, group, mu=1.0, alpha=0.9)
    torch.testing.assert_close(weighted, torch.tensor([0.2, 0.2, -0.2, -0.2]))


def test_inter_is_an_unbiased_baseline_under_independent_rewards():
    """E[A | R] = R - p. 20,000 groups of 6: the bound is 5 standard errors (p < 1e-6)."""
    g = torch.Generator().manual_seed(0)
    groups = torch.arange(20_000).repeat_interleave(6)
    rewards = (torch.rand(len(groups), generator=g) < 0.3).double()
    metric = torch.rand(len(groups), generator=g)
    inter = canon_advantages(rewards, metric, groups, mu=1.0)
    assert abs(inter[rewards == 1].mean() - 0.7) < 0.01
    assert abs(inter[rewards == 0].mean() + 0.3) < 0.01


def test_split_keeps_the_order_of_ties_and_puts_the_larger_half_high():
    groups = torch.zeros(5, dtype=torch.long)
    assert canon_split(torch.ones(5), groups).tolist() == [False, False, True, True, True]
    assert canon_split(torch.tensor([2]), torch.tensor([9])).tolist() == [True]


def test_a_group_of_one_gets_nothing_whatever_alpha():
    rewards, groups = torch.tensor([3.0]), torch.tensor([0])
    assert canon_advantages(rewards, torch.ones(1), groups, mu=1.0, alpha=0.5).item() == 0


def test_schedule_is_the_published_one():
    inter = [canon_mu_schedule(s, 150, warmup=30, cycles=3, first="inter") for s in range(150)]
    for step, value in enumerate(inter):
        k = (step - 30) % 40
        cosine = 0.4 + 0.3 * (1 + math.cos(math.pi * k / 40))
        assert value == pytest.approx((step + 1) / 30 if step < 30 else cosine, abs=1e-12)
    intra = [canon_mu_schedule(s, 150, warmup=30, cycles=3) for s in range(150)]
    assert intra[29] == pytest.approx(0.4)
    assert intra[30] == pytest.approx(0.4)
    assert all(0 <= mu <= 1 for mu in inter + intra)
    assert canon_mu_schedule(0, 10, warmup=0, cycles=1, first="inter") == pytest.approx(1.0)


def adora_loop(rewards, lengths, group, mode, tau, cap, variant):
    """One group, written from the criteria."""
    mine = rewards[group], lengths[group]
    successes = [length for reward, length in zip(*mine, strict=True) if reward > 0.5]
    failures = [x for reward, x in zip(*mine, strict=True) if reward <= 0.5 and x < cap]
    if not successes and variant != "llm":
        return 1.0
    succeeded = max(successes, default=-math.inf)
    empty = math.inf if variant == "vlm" else -math.inf
    failed = sum(failures) / len(failures) if failures else empty
    longer, hard = succeeded > failed, len(successes) / len(mine[0]) <= tau
    if mode == "attenuate":
        return 1.0 if longer else 0.1
    return 2.0 if longer and hard else 1.0


@quick
@given(
    seeds,
    st.sampled_from(["attenuate", "amplify"]),
    st.sampled_from(["paper", "llm", "vlm"]),
    st.floats(0, 1),
)
def test_adora_is_the_loop_over_groups(seed, mode, variant, tau):
    rewards, _, groups = batch(seed, (1, 2, 3, 5, 8), binary=True)
    lengths = torch.randint(1, 12, rewards.shape, generator=torch.Generator().manual_seed(seed))
    got = adora_weights(
        rewards, lengths, groups, mode=mode, tau=tau, max_length=9, variant=variant
    ).weights
    for group in groups.unique():
        expected = adora_loop(rewards, lengths, groups == group, mode, tau, 9, variant)
        assert got[groups == group].tolist() == [expected] * int((groups == group).sum())


@pytest.mark.parametrize(
    ("rewards", "lengths", "expected"),
    [
        ([0.0, 0.0], [5, 6], {"paper": 1.0, "llm": 0.1, "vlm": 1.0}),
        ([1.0, 1.0], [5, 6], {"paper": 1.0, "llm": 1.0, "vlm": 0.1}),
        ([1.0, 0.0], [5, 99], {"paper": 1.0, "llm": 1.0, "vlm": 0.1}),
        ([0.0, 0.0], [99, 99], {"paper": 1.0, "llm": 0.1, "vlm": 1.0}),
        ([1.0, 0.0], [5, 5], {"paper": 0.1, "llm": 0.1, "vlm": 0.1}),
    ],
)
def test_edge_rules_of_both_releases(rewards, lengths, expected):
    arguments = (torch.tensor(rewards), torch.tensor(lengths), torch.zeros(2, dtype=torch.long))
    for variant, weight in expected.items():
        got = adora_weights(*arguments, max_length=99, variant=variant).weights
        torch.testing.assert_close(got, torch.full((2,), weight))


@quick
@given(seeds, st.floats(0.1, 10))
def test_length_advantage_ignores_the_unit_of_length_and_is_monotone(seed, unit):
    rewards, _, groups = batch(seed, binary=True)
    lengths = torch.rand(len(rewards), generator=torch.Generator().manual_seed(seed)) + 0.5
    before = adora_weights(rewards, lengths, groups).length_advantage
    assert torch.equal(adora_weights(rewards, unit * lengths, groups).length_advantage, before)
    longer = lengths + rewards  # successes only
    assert (adora_weights(rewards, longer, groups).length_advantage >= before).all()
    longer = lengths + (1 - rewards)  # failures only
    assert (adora_weights(rewards, longer, groups).length_advantage <= before).all()


def test_truncated_failures_count_for_difficulty_only():
    rewards, lengths = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([10, 5, 50])
    group = torch.zeros(3, dtype=torch.long)
    counted = adora_weights(rewards, lengths, group, mode="amplify")
    assert not counted.length_advantage.any()
    cut = adora_weights(rewards, lengths, group, mode="amplify", max_length=50)
    assert cut.length_advantage.all()
    assert cut.difficulty_advantage.all()
    assert cut.weights.tolist() == [2.0] * 3


def test_tau_of_one_is_always_difficult_and_below_zero_never():
    rewards, _, groups = batch(0, binary=True)
    lengths = torch.ones_like(rewards)
    assert adora_weights(rewards, lengths, groups, tau=1.0).difficulty_advantage.all()
    assert not adora_weights(rewards, lengths, groups, tau=-0.1).difficulty_advantage.any()


def test_a_weight_scales_a_whole_group_and_leaves_equal_rewards_at_zero():
    rewards, _, groups = batch(3, binary=True)
    lengths = torch.arange(len(rewards))
    weights = adora_weights(rewards, lengths, groups, weight=0.3).weights
    advantages = group_relative_advantages(rewards, groups)
    for group in groups.unique():
        assert len(weights[groups == group].unique()) == 1
        assert abs((weights * advantages)[groups == group].sum()) < 1e-9
    ones = adora_weights(rewards, lengths, groups, weight=1.0).weights
    assert torch.equal(ones, torch.ones_like(rewards))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_results_keep_the_dtype_and_carry_no_gradient(dtype):
    rewards = torch.tensor([1.0, 0.0, 1.0], dtype=dtype, requires_grad=True)
    groups = torch.zeros(3, dtype=torch.long)
    advantages = canon_advantages(rewards, torch.arange(3.0), groups)
    weights = adora_weights(rewards, torch.arange(3), groups).weights
    assert advantages.dtype == weights.dtype == dtype
    assert not advantages.requires_grad
    assert not weights.requires_grad


R, G = torch.ones(3), torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: canon_split(torch.ones(3, 1), G), ValueError, "metric"),
        (lambda: canon_split(torch.ones(0), G[:0]), ValueError, "metric"),
        (lambda: canon_split(R, R), TypeError, "groups"),
        (lambda: canon_advantages(R, torch.ones(2), G), ValueError, "metric"),
        (lambda: canon_advantages(R, R, G, mu=1.5), ValueError, "mu"),
        (lambda: canon_advantages(R, R, G, alpha=0.0), ValueError, "alpha"),
        (lambda: canon_advantages(G, R, G), TypeError, "rewards"),
        (lambda: canon_mu_schedule(-1, 9, warmup=1, cycles=1), ValueError, "step"),
        (lambda: canon_mu_schedule(0, 1, warmup=1, cycles=1), ValueError, "total"),
        (lambda: canon_mu_schedule(0, 9, warmup=1, cycles=0), ValueError, "cycles"),
        (lambda: canon_mu_schedule(0, 9, warmup=1, cycles=1, first="x"), ValueError, "first"),
        (lambda: adora_weights(R, torch.ones(2), G), ValueError, "lengths"),
        (lambda: adora_weights(R, R, G[:2]), ValueError, "groups"),
        (lambda: adora_weights(R, R, G, mode="x"), ValueError, "mode"),
        (lambda: adora_weights(R, R, G, variant="x"), ValueError, "variant"),
        (lambda: adora_weights(R, R, G, weight=-1.0), ValueError, "weight"),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()


@pytest.mark.parametrize("name", ["tau", "success_threshold", "max_length"])
@pytest.mark.parametrize(
    ("value", "error"), [(math.nan, ValueError), ("0.5", TypeError), (1j, TypeError)]
)
def test_adora_names_a_setting_that_is_no_number(name, value, error):
    rewards, groups = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
    with pytest.raises(error, match=f"^{name} must be a number"):
        adora_weights(rewards, torch.tensor([3, 4]), groups, **{name: value})
