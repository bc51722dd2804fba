"""Arguments that the functions of this package refuse by name, and weights that overflow."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from steelyard.divergences import KL, REVERSE_KL
from steelyard.preference import (
    AlignmentGapMetric,
    FlipRateMetric,
    TieAwareRankingAccuracyMetric,
    dpg_divergence,
    dpg_loss,
    full_ranking_accuracy,
    fused_log_ratios,
    mask_sparsity,
    pointwise_log_target,
    ranking_report,
    variance_optimal_baseline,
)

LOGPROBS = torch.tensor([-1.0, -2.0])
RANK = torch.tensor([[-1.0, -4.0, -9.0]])


@pytest.mark.parametrize("wrong", [None, "text", 0.5, math.nan])
def test_a_ratio_that_is_no_tensor_is_refused_by_the_gap(wrong: Any) -> None:
    with pytest.raises(TypeError, match="ref_log_ratio must be a"):
        AlignmentGapMetric().update(LOGPROBS, LOGPROBS, wrong, 0.75)


@pytest.mark.parametrize("place", [2, 3])
def test_the_flip_rate_names_the_reference(place: int) -> None:
    given: list[Any] = [LOGPROBS] * 4
    given[place] = LOGPROBS.numpy()
    name = ("ref_chosen_logprobs", "ref_rejected_logprobs")[place - 2]
    with pytest.raises(TypeError, match=rf"^{name} must be a torch\.Tensor, got ndarray"):
        FlipRateMetric().update(*given)


@pytest.mark.parametrize("rank", [None, RANK.to(torch.complex64)])
def test_ranks_that_cannot_be_ordered_are_refused(rank: Any) -> None:
    with pytest.raises(TypeError, match="human_rank must"):
        full_ranking_accuracy(rank, RANK)


@pytest.mark.parametrize("tie_eps", [0.0, math.nan])
def test_a_margin_of_ties_out_of_range_is_refused_before_any_batch(tie_eps: float) -> None:
    with pytest.raises(ValueError, match="tie_eps must be > 0"):
        TieAwareRankingAccuracyMetric(tie_eps=tie_eps)


@pytest.mark.parametrize("limits", [None, 3, (0.0,), (None, 1.0), (0.0, "0.1")])
def test_a_reward_range_that_is_not_two_numbers_is_refused(limits: Any) -> None:
    with pytest.raises(TypeError, match="reward_range"):
        dpg_loss(LOGPROBS, LOGPROBS, 0.0, divergence=KL, reward_range=limits)


@pytest.mark.parametrize("floor", [None, "0.1", [0.5]])
def test_a_floor_that_is_no_number_is_refused(floor: Any) -> None:
    with pytest.raises(TypeError, match="log_floor must be a number"):
        pointwise_log_target(LOGPROBS, LOGPROBS > 0, log_floor=floor)


@pytest.mark.parametrize("side", ["policy_bias", "ref_bias"])
@pytest.mark.parametrize("bias", [torch.zeros(4), torch.zeros(3, dtype=torch.int32)])
def test_a_bias_is_refused_under_its_own_name(side: str, bias: Tensor) -> None:
    hidden, head, tokens = torch.zeros(1, 2, 2), torch.zeros(3, 2), torch.zeros(1, 2).long()
    with pytest.raises((ValueError, TypeError), match=f"^{side} must have"):
        fused_log_ratios(hidden, head, hidden, head, tokens, **{side: bias})


@pytest.mark.parametrize("place", range(4))
def test_a_report_takes_one_tensor_in_half_precision(place: int) -> None:
    given = [LOGPROBS.double(), 2 * LOGPROBS.double(), LOGPROBS.double(), LOGPROBS.double()]
    exact = ranking_report(*given).ranking_accuracy
    given[place] = given[place].bfloat16()  # these numbers are exact there
    assert ranking_report(*given).ranking_accuracy == exact


@pytest.mark.parametrize("divergence", [KL, REVERSE_KL])
def test_a_proposal_that_never_draws_the_sample_weighs_it_infinitely(divergence: Any) -> None:
    policy, target = torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -2.0])
    proposal = torch.tensor([-1e30, -2.0])
    each = dpg_divergence(
        policy,
        target,
        0.0,
        divergence=divergence,
        proposal_logprobs=proposal,
        reduction="none",
    )
    sign = divergence.terms(policy - target, torch.zeros(2))[0].sign()
    assert each.tolist() == [math.inf * sign.item(), 0.0]
    loss = dpg_loss(
        policy, target, 0.0, divergence=divergence, proposal_logprobs=proposal, reduction="none"
    )
    reward = divergence.pseudo_reward(policy - target)
    assert loss[0] == math.inf * reward[0].sign().item()
    assert loss[1] == pytest.approx(-(reward * policy)[1].item())


def test_an_infinite_weight_on_no_advantage_is_nothing() -> None:
    policy, proposal = torch.tensor([-1.0]), torch.tensor([-1e30])
    reward = KL.pseudo_reward(torch.zeros(1))  # policy and target agree
    loss = dpg_loss(
        policy, policy, 0.0, divergence=KL, proposal_logprobs=proposal, baseline=reward.item()
    )
    assert loss == 0


@pytest.mark.parametrize("name", ["log_weights", "squared_norms"])
def test_an_unknown_weight_leaves_the_best_baseline_unknown(name: str) -> None:
    weights = torch.tensor([math.nan, 1.0])
    assert variance_optimal_baseline(LOGPROBS, **{name: weights}).isnan()
    left_out = torch.tensor([math.inf, 3.0])  # an infinite reward does not count
    assert variance_optimal_baseline(left_out, **{name: weights}) == 3.0


def test_sparsity_is_nan_only_where_nan_counts() -> None:
    weights = torch.tensor([[0.0, 1.0, math.nan]])
    assert mask_sparsity(weights).isnan()
    assert mask_sparsity(weights, torch.tensor([[1, 1, 0]])) == 0.5
