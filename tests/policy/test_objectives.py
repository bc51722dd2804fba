"""The hand-written slopes of an objective are the derivative of its loss."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steelyard.policy import BPO, PPO, Objective, Samples
from steelyard.policy.losses import LOG_RATIO_LIMIT

OBJECTIVES: dict[str, Objective] = {
    "ppo": PPO(),
    "ppo raw advantages": PPO(epsilon=0.1, value_coef=0.7, normalize_advantages=False),
    "bpo": BPO(temperature=0.3),
    "bpo hard target": BPO(temperature=1e-6),
    "bpo stored advantage": BPO(temperature=0.3, online_weight=False),
    "bpo value": BPO(threshold="value", temperature=0.3),
    "bpo temperature": BPO(threshold_kind="temperature", temperature=0.3, threshold_coef=0.2),
    "bpo median": BPO(threshold_kind="median", value_coef=0.3),
}


def both_views(
    objective: Objective, log_ratio: Tensor, heads: Tensor, batch: Samples
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    inputs = (log_ratio.clone().requires_grad_(), heads.clone().requires_grad_())
    gradients = torch.autograd.grad(objective.loss(*inputs, batch), inputs)
    return (gradients[0], gradients[1]), objective.slopes(log_ratio, heads, batch)


def batch_of(advantages: Tensor, returns: Tensor) -> Samples:
    nothing = torch.zeros_like(returns)
    return Samples(nothing[:, None], nothing, nothing, advantages, returns)


number = st.floats(-5, 5, allow_subnormal=False)
log_ratios = st.one_of(
    st.floats(-0.6, 0.6), st.floats(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT), st.floats(-800, 800)
)
rows = st.lists(st.tuples(log_ratios, number, number, number, number), min_size=1, max_size=6)


@pytest.mark.parametrize("name", OBJECTIVES)
@given(rows=rows)
@settings(deadline=None, max_examples=40)
def test_slopes_are_the_derivative_of_the_loss(name: str, rows: list[tuple[float, ...]]) -> None:
    columns = torch.tensor(rows, dtype=torch.float64)
    log_ratio, advantages, returns, heads = (*columns[:, :3].T, columns[:, 3:])
    objective = OBJECTIVES[name]
    automatic, written = both_views(
        objective, log_ratio, heads[:, : objective.critic_heads], batch_of(advantages, returns)
    )
    for expected, slope in zip(automatic, written, strict=True):
        torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("objective", [PPO(), BPO(threshold="value"), BPO()], ids=repr)
@pytest.mark.parametrize("spare", [0, 1])
def test_slopes_of_heads_the_loss_does_not_look_at_are_zero(
    objective: Objective, spare: int
) -> None:
    torch.manual_seed(0)
    log_ratio, advantages, returns = torch.randn(3, 8, dtype=torch.float64)
    heads = torch.randn(8, objective.critic_heads + spare, dtype=torch.float64)
    automatic, written = both_views(objective, log_ratio, heads, batch_of(advantages, returns))
    torch.testing.assert_close(written, automatic, rtol=1e-9, atol=1e-9)
    assert not written[1][:, objective.critic_heads :].any()


@pytest.mark.parametrize("objective", [PPO(normalize_advantages=False), BPO()], ids=["ppo", "bpo"])
@pytest.mark.parametrize("log_ratio", [-1e4, -21.0, 21.0, 1e4])
def test_slopes_stop_past_the_log_ratio_limit_even_where_the_ratio_overflows(
    objective: Objective, log_ratio: float
) -> None:
    ratios = torch.tensor([log_ratio, log_ratio])
    batch = batch_of(torch.tensor([0.0, -1.0]), torch.tensor([0.0, -1.0]))
    slope, heads = objective.slopes(ratios, torch.zeros(2, objective.critic_heads), batch)
    assert slope.tolist() == [0.0, 0.0]
    assert heads.isfinite().all()


def test_ppo_stops_outside_the_band_and_bpo_pulls_back() -> None:
    log_ratio = torch.tensor([1.5, 0.5]).log()
    batch = batch_of(torch.tensor([1.0, -1.0]), torch.tensor([1.0, -1.0]))
    ppo, _ = PPO(normalize_advantages=False).slopes(log_ratio, torch.zeros(2, 1), batch)
    bpo, _ = BPO().slopes(log_ratio, torch.zeros(2, 2), batch)
    assert ppo.tolist() == [0.0, 0.0]
    torch.testing.assert_close(bpo, torch.tensor([0.75, -0.25]))


def test_slopes_change_none_of_their_inputs() -> None:
    torch.manual_seed(0)
    log_ratio, advantages, returns = torch.randn(3, 8)
    heads, batch = torch.randn(8, 2), batch_of(advantages, returns)
    before = [x.clone() for x in (log_ratio, heads, *batch)]
    for objective in OBJECTIVES.values():
        objective.slopes(log_ratio, heads[:, : objective.critic_heads], batch)
    assert all(torch.equal(a, b) for a, b in zip(before, (log_ratio, heads, *batch), strict=True))


def test_normalised_advantages_ignore_shift_and_scale() -> None:
    torch.manual_seed(0)
    log_ratio, advantages, returns = torch.randn(3, 64, dtype=torch.float64)
    heads = torch.zeros(64, 1, dtype=torch.float64)
    plain, moved = (
        PPO().loss(log_ratio, heads, batch_of(a, returns)) for a in (advantages, 7 * advantages - 3)
    )
    torch.testing.assert_close(plain, moved, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("advantages", [[2.0], [2.0, 2.0]])
def test_one_advantage_or_equal_ones_stay_finite(advantages: list[float]) -> None:
    count = len(advantages)
    batch = batch_of(torch.tensor(advantages), torch.ones(count))
    slope, _ = PPO().slopes(torch.zeros(count), torch.zeros(count, 1), batch)
    assert slope.isfinite().all()


def test_the_weight_and_the_target_carry_no_gradient() -> None:
    """The critic learns from its own terms only: without them its gradient is zero."""
    heads = torch.randn(4, 2, requires_grad=True)
    batch = batch_of(torch.randn(4), torch.randn(4))
    BPO(value_coef=0.0, threshold_coef=0.0).loss(torch.zeros(4), heads, batch).backward()
    assert heads.grad is not None
    assert not heads.grad.any()


def test_the_critic_needs_a_second_head_only_for_a_learned_threshold() -> None:
    assert [PPO().critic_heads, BPO().critic_heads, BPO(threshold="value").critic_heads] == [
        1,
        2,
        1,
    ]


@pytest.mark.parametrize("kind", [PPO, BPO])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epsilon", 0.0),
        ("epsilon", -0.1),
        ("epsilon", 1.5),
        ("epsilon", float("nan")),
        ("value_coef", -1.0),
        ("entropy_coef", -0.01),
        ("max_grad_norm", 0.0),
    ],
)
def test_a_coefficient_out_of_range_is_named(kind: Any, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        kind(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("threshold_coef", -1.0),
        ("threshold", "mean"),
        ("threshold_kind", "mode"),
    ],
)
def test_a_setting_of_bpo_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        replace(BPO(), **{name: value})
