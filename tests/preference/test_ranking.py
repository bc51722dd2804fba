"""Ranking accuracy, its ceiling and the flip threshold against the paper's theorems."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid

from steelyard.preference import (
    PUBLISHED_BETAS,
    dpo_flip_threshold,
    dpo_gamma_loss,
    full_ranking_accuracy,
    idealized_log_ratio,
    idealized_ranking_accuracy,
    ipo_flip_threshold,
    ranking_accuracy,
    ranking_report,
    ranking_transitions,
    reward_accuracy,
    tie_aware_ranking_accuracy,
)

quick = settings(deadline=None, max_examples=30)
seeds = st.integers(0, 2**31)
betas = st.floats(0.01, 10.0)
close = {"rtol": 1e-10, "atol": 1e-10}


def pairs(seed: int, n: int = 200, scale: float = 10.0):
    """Policy and reference log-probabilities of chosen and rejected answers."""
    g = torch.Generator().manual_seed(seed)
    return tuple(scale * torch.randn(4, n, dtype=torch.float64, generator=g) - 30)


def shares(seed: int, n: int = 200) -> torch.Tensor:
    return torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 7))


# --- the flip threshold ------------------------------------------------------------------------


@quick
@given(seeds, betas, st.floats(0.0, 2.0))
def test_a_pair_is_ranked_right_exactly_when_its_loss_is_at_most_the_threshold(seed, beta, gamma):
    chosen, rejected, ref_chosen, ref_rejected = pairs(seed)
    loss = dpo_gamma_loss(*pairs(seed), beta=beta, gamma=gamma, reduction="none")
    threshold = dpo_flip_threshold(ref_chosen - ref_rejected, beta, gamma=gamma)
    right = ranking_accuracy(chosen, rejected, reduction="none") == 1
    margin = beta * (chosen - rejected)
    seen = margin.abs() > 1e-6  # at a rounding error from the threshold either side may win
    # Both are softplus of numbers that differ by the margin; where softplus is flat in float64
    # (below -700 both are 0) the loss tells nothing.
    seen &= torch.maximum(loss, threshold) > 1e-300
    assert seen.sum() > 100
    assert torch.equal((loss <= threshold)[seen], right[seen])


@quick
@given(seeds, betas)
def test_at_a_policy_tie_the_loss_is_the_threshold(seed, beta):
    chosen, _, ref_chosen, ref_rejected = pairs(seed)
    loss = dpo_gamma_loss(chosen, chosen, ref_chosen, ref_rejected, beta=beta, reduction="none")
    threshold = dpo_flip_threshold(ref_chosen - ref_rejected, beta)
    torch.testing.assert_close(loss, threshold, **close)
    assert ranking_accuracy(chosen, chosen) == 1  # the definition is not strict


def test_hand_case_of_the_threshold():
    c = torch.tensor([5.0, 30.0, 0.0], dtype=torch.float64)
    expected = torch.tensor([0.4740769841801067, 0.04858735157374191, math.log(2)])
    torch.testing.assert_close(dpo_flip_threshold(-c, 0.1), expected.double(), rtol=0, atol=1e-8)
    assert dpo_flip_threshold(torch.tensor([-1e4, 1e4]), 1.0).tolist() == [0.0, 1e4]


def test_the_required_margin_is_beta_c_and_the_required_move_is_c_for_every_beta():
    c = torch.linspace(-3, 8, 12, dtype=torch.float64)
    for beta in PUBLISHED_BETAS:
        needed = -torch.log(torch.expm1(dpo_flip_threshold(-c, beta))) / beta
        torch.testing.assert_close(needed, c, rtol=1e-6, atol=1e-6)


@quick
@given(seeds, betas)
def test_a_loss_below_log_two_ranks_a_pair_right_that_the_reference_had_right(seed, beta):
    chosen, rejected, ref_chosen, ref_rejected = pairs(seed)
    loss = dpo_gamma_loss(*pairs(seed), beta=beta, reduction="none")
    for bound in (0.6, math.log(2) - 1e-9):
        covered = (ref_chosen >= ref_rejected) & (loss <= bound)
        assert ranking_accuracy(chosen, rejected, mask=covered, reduction="none")[covered].all()


def test_a_loss_of_0_70_does_not():
    chosen, rejected, ref_chosen, ref_rejected = (torch.tensor([x]) for x in (-5.1, -5.0, 0.0, 0.0))
    loss = dpo_gamma_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1)
    assert math.log(2) < loss < 0.70
    assert ranking_accuracy(ref_chosen, ref_rejected) == 1
    assert ranking_accuracy(chosen, rejected) == 0


@quick
@given(seeds, st.floats(0.01, 2.0))
def test_ipo_statement_both_ways(seed, tau):
    ref_ratio = pairs(seed)[0] + 30
    threshold = ipo_flip_threshold(ref_ratio, tau)
    target = 1 / (2 * tau)
    hopeless = ref_ratio < -target
    assert torch.equal(threshold == -math.inf, hopeless)
    # zero loss: h = 1/(2 tau)
    assert not ((ref_ratio + target)[hopeless] >= 0).any()
    # any h with a loss at or below the threshold ranks the pair right
    for share in (-1.0, -0.5, 0.0, 0.99):
        h = target + share * threshold[~hopeless].sqrt() * (1 - 1e-12)
        assert ((h - target).square() <= threshold[~hopeless]).all()
        assert (h + ref_ratio[~hopeless] >= -1e-9).all()
    # and the bound is sharp
    h = target - threshold[~hopeless].sqrt() * (1 + 1e-6) - 1e-9
    assert (h + ref_ratio[~hopeless] < 0).all()


# --- DPO-gamma ---------------------------------------------------------------------------------


@quick
@given(seeds, betas)
def test_gamma_one_is_dpo_and_gamma_zero_ignores_the_reference(seed, beta):
    chosen, rejected, ref_chosen, ref_rejected = pairs(seed)
    margin = (chosen - rejected) - (ref_chosen - ref_rejected)
    losses = dpo_gamma_loss(*pairs(seed), beta=beta, reduction="none")
    torch.testing.assert_close(losses, -logsigmoid(beta * margin), **close)
    free = dpo_gamma_loss(*pairs(seed), beta=beta, gamma=0.0, reduction="none")
    torch.testing.assert_close(free, -logsigmoid(beta * (chosen - rejected)), **close)
    threshold = dpo_flip_threshold(ref_chosen - ref_rejected, beta, gamma=0.0)
    torch.testing.assert_close(threshold, torch.full_like(threshold, math.log(2)), **close)


@quick
@given(seeds, betas)
def test_gradients_of_both_answers_cancel_and_are_those_of_the_formula(seed, beta):
    given_ = [x.clone().requires_grad_() for x in pairs(seed)]
    loss = dpo_gamma_loss(*given_, beta=beta, gamma=0.7, reduction="sum")
    grads = torch.autograd.grad(loss, given_[:2], retain_graph=True)
    torch.testing.assert_close(grads[0] + grads[1], torch.zeros_like(grads[0]), **close)
    h = (given_[0] - given_[1]) - 0.7 * (given_[2] - given_[3])
    torch.testing.assert_close(grads[0], -beta * torch.sigmoid(-beta * h), **close)
    assert torch.autograd.grad(loss, given_[2], allow_unused=True)[0] is None


def test_gamma_loss_passes_gradcheck():
    chosen, rejected, ref_chosen, ref_rejected = pairs(0, n=5, scale=2.0)

    def loss(a, b):
        return dpo_gamma_loss(a, b, ref_chosen, ref_rejected, beta=0.5, gamma=0.3)

    assert torch.autograd.gradcheck(loss, (chosen.requires_grad_(), rejected.requires_grad_()))
    ratio = (ref_chosen - ref_rejected).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dpo_flip_threshold(x, 0.7), (ratio,))
    assert torch.autograd.gradcheck(lambda x: ipo_flip_threshold(x, 0.01), (ratio,))
    alpha = shares(1, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a: idealized_log_ratio(x, a, 0.3), (ratio, alpha))


def test_gamma_loss_agrees_with_liger():
    module = pytest.importorskip("liger_kernel.chunked_loss.dpo_loss")
    given_ = [x.float() for x in pairs(3)]
    theirs = module.LigerFusedLinearDPOFunction.preference_loss_fn(
        given_[0],
        given_[1],
        torch.zeros(400, 1),
        ref_chosen_logps=given_[2],
        ref_rejected_logps=given_[3],
        beta=0.1,
    )[0]
    ours = dpo_gamma_loss(*given_, reduction="sum") / 200  # they divide by half the targets
    torch.testing.assert_close(ours, theirs)


def test_a_constant_per_prompt_in_the_reference_changes_nothing():
    chosen, rejected, ref_chosen, ref_rejected = pairs(4)
    shift = 100 * shares(4)
    moved = (chosen, rejected, ref_chosen + shift, ref_rejected + shift)
    for call in (dpo_gamma_loss, reward_accuracy):
        torch.testing.assert_close(call(*pairs(4)), call(*moved), **close)


# --- accuracies --------------------------------------------------------------------------------


def test_accuracy_by_hand_with_ties_masks_and_reductions():
    chosen, rejected = (
        torch.tensor([-1.0, -3.0, -2.0, -9.0]),
        torch.tensor([-2.0, -1.0, -2.0, -1.0]),
    )
    assert ranking_accuracy(chosen, rejected, reduction="none").tolist() == [1, 0, 1, 0]
    assert ranking_accuracy(chosen, rejected) == 0.5
    assert ranking_accuracy(chosen, rejected, reduction="sum") == 2
    mask = torch.tensor([True, False, True, True])
    torch.testing.assert_close(ranking_accuracy(chosen, rejected, mask=mask), torch.tensor(2 / 3))
    assert ranking_accuracy(chosen, rejected, mask=torch.zeros(4)) == 0


@quick
@given(seeds)
def test_normalized_accuracy_is_that_of_means_and_equal_lengths_change_nothing(seed):
    chosen, rejected, *_ = pairs(seed)
    g = torch.Generator().manual_seed(seed)
    lengths = [torch.randint(1, 50, (200,), generator=g) for _ in range(2)]
    got = ranking_accuracy(chosen, rejected, chosen_lengths=lengths[0], rejected_lengths=lengths[1])
    assert got == (chosen / lengths[0] >= rejected / lengths[1]).double().mean()
    same = ranking_accuracy(
        chosen, rejected, chosen_lengths=lengths[0], rejected_lengths=lengths[0]
    )
    assert same == ranking_accuracy(chosen, rejected)


@quick
@given(seeds)
def test_reward_accuracy_is_another_metric(seed):
    chosen, rejected, ref_chosen, ref_rejected = pairs(seed)
    expected = (chosen - ref_chosen > rejected - ref_rejected).double().mean()
    assert reward_accuracy(*pairs(seed)) == expected
    # from any reference, a small step in the right direction on every pair: reward accuracy 1,
    # ranking accuracy that of the reference
    step = (ref_chosen + 1e-6, ref_rejected, ref_chosen, ref_rejected)
    assert reward_accuracy(*step) == 1
    reference = ranking_accuracy(ref_chosen, ref_rejected)
    assert abs(ranking_accuracy(*step[:2]) - reference) <= 0.005
    assert reward_accuracy(chosen, rejected, chosen, rejected) == 0  # strict


def test_tie_rule_reduces_to_accuracy_without_ties():
    chosen, rejected, *_ = pairs(5)
    alpha = shares(5)
    for_first = alpha > 0.5
    p1 = torch.where(for_first, chosen, rejected)
    p2 = torch.where(for_first, rejected, chosen)
    assert tie_aware_ranking_accuracy(alpha, p1, p2) == ranking_accuracy(chosen, rejected)


def test_tie_rule_by_hand():
    alpha = torch.tensor([0.5, 0.5, 0.9, 0.9, 0.1, 0.1, 0.9])
    p1 = torch.tensor([0.30, 0.30, 0.4, 0.3, 0.4, 0.3, 0.3])
    p2 = torch.tensor([0.305, 0.35, 0.3, 0.4, 0.3, 0.4, 0.3])
    right = tie_aware_ranking_accuracy(alpha, p1, p2, tie_eps=0.01, reduction="none")
    assert right.tolist() == [1, 0, 1, 0, 0, 1, 0]
    assert tie_aware_ranking_accuracy(alpha, p1, p2, tie_eps=0.1) == 4 / 7


def test_on_probabilities_of_long_answers_everything_ties():
    log_p1, log_p2 = -100 - 50 * shares(1), -100 - 50 * shares(2)
    split = torch.full_like(log_p1, 0.5)
    assert tie_aware_ranking_accuracy(split, log_p1.exp(), log_p2.exp()) == 1
    assert tie_aware_ranking_accuracy(split, log_p1 / 100, log_p2 / 100) < 0.2


@quick
@given(seeds)
def test_full_ranking_of_two_is_ranking_accuracy(seed):
    chosen, rejected, *_ = pairs(seed)
    rejected[:20] = chosen[:20]  # ties count as right in both
    flip = shares(seed) > 0.5
    both = torch.stack(
        (torch.where(flip, rejected, chosen), torch.where(flip, chosen, rejected)), -1
    )
    rank = torch.stack((1 + flip.long(), 2 - flip.long()), -1)
    assert full_ranking_accuracy(rank, both) == ranking_accuracy(chosen, rejected)


@quick
@given(seeds, st.integers(2, 5))
def test_full_ranking_is_a_kendall_tau_of_one(seed, k):
    stats = pytest.importorskip("scipy.stats")
    g = torch.Generator().manual_seed(seed)
    logprobs = torch.randn(30, k, dtype=torch.float64, generator=g)
    rank = torch.stack([torch.randperm(k, generator=g) for _ in range(30)])
    rank[:10] = logprobs[:10].argsort(-1, descending=True).argsort(-1)
    got = full_ranking_accuracy(rank, logprobs, reduction="none")
    tau = [
        stats.kendalltau(-r.numpy(), x.numpy()).statistic
        for r, x in zip(rank, logprobs, strict=True)
    ]
    assert got.bool().tolist() == [t > 1 - 1e-9 for t in tau]
    assert got[:10].all()


def test_equal_human_ranks_come_in_any_order():
    rank = torch.tensor([[1, 1, 2]] * 3)
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-2.0, -1.0, -3.0], [-1.0, -3.0, -2.0]])
    assert full_ranking_accuracy(rank, logprobs, reduction="none").tolist() == [1, 1, 0]


# --- the idealized optimum ---------------------------------------------------------------------


@quick
@given(seeds, st.floats(0.05, 5.0), st.floats(0.02, 0.98))
def test_optimum_minimises_the_rater_weighted_loss(seed, beta, alpha):
    ref_ratio = (pairs(seed)[0][:5] + 30) / 5
    best = idealized_log_ratio(ref_ratio, alpha, beta)

    def loss(policy_ratio):
        h = policy_ratio - ref_ratio
        return (-alpha * logsigmoid(beta * h) - (1 - alpha) * logsigmoid(-beta * h)).sum()

    slope = torch.func.grad(loss)(best)
    assert slope.abs().max() < 1e-9
    assert loss(best) < min(loss(best + 0.1 / beta), loss(best - 0.1 / beta))


@quick
@given(seeds, st.floats(0.1, 5.0))
def test_optimum_of_rlhf_with_a_bradley_terry_reward_has_the_same_ratio(seed, beta):
    g = torch.Generator().manual_seed(seed)
    ref, rewards = torch.randn(2, 6, dtype=torch.float64, generator=g)
    ref = ref.log_softmax(0)
    best = (ref + rewards / beta).log_softmax(0)
    alpha = torch.sigmoid(rewards[0] - rewards[1])
    got = idealized_log_ratio(ref[:1] - ref[1:2], alpha, beta)
    torch.testing.assert_close(got, best[:1] - best[1:2], rtol=1e-9, atol=1e-9)


@quick
@given(seeds)
def test_idealized_accuracy_goes_from_the_raters_to_the_reference_as_beta_grows(seed):
    ref_ratio, alpha = pairs(seed)[0] + 30, shares(seed)
    result = idealized_ranking_accuracy(ref_ratio, alpha, (1e-6, 1e9))
    assert result.per_beta[0] == (alpha > 0.5).double().mean()
    assert result.per_beta[1] == (ref_ratio > 0).double().mean()
    sure = 0.5 + alpha / 2
    falling = idealized_ranking_accuracy(ref_ratio, sure).per_beta
    assert (falling.diff() <= 0).all()


def test_split_raters_leave_the_reference_as_it_is():
    ref_ratio = pairs(1)[0] + 30
    for beta in PUBLISHED_BETAS:
        assert torch.equal(idealized_log_ratio(ref_ratio, 0.5, beta), ref_ratio)
    # strict, as published: an optimum with equal probabilities is not right
    assert idealized_ranking_accuracy(torch.zeros(1), 0.5).max == 0


def test_idealized_summary_and_the_two_rules_for_unanimous_raters():
    ref_ratio = torch.tensor([0.5, -1.0, -68.0, -69.07], dtype=torch.float64)
    alpha = torch.ones(4, dtype=torch.float64)
    result = idealized_ranking_accuracy(ref_ratio, alpha, (0.1, 10.0, 0.01, 7.0))
    assert result.per_beta.tolist() == [0.75, 0.25, 1.0, 0.25]
    assert (result.min, result.median, result.max) == (0.25, 0.5, 1.0)
    # log(999)/0.1 = 69.067 for the clipped share, log(1000)/0.1 = 69.078 for the released code
    clip, code = (
        idealized_ranking_accuracy(ref_ratio, alpha, (0.1,), unanimous=how).per_beta.item()
        for how in ("clip", "code")
    )
    assert (clip, code) == (0.75, 1.0)
    # and the code keeps a minority below eps
    tiny = torch.full((4,), 1 - 1e-4, dtype=torch.float64)
    far = torch.full((4,), -80.0, dtype=torch.float64)
    assert idealized_ranking_accuracy(far, tiny, (0.1,)).max == 0
    assert idealized_ranking_accuracy(far, tiny, (0.1,), unanimous="code").max == 1
    zero = torch.zeros(4, dtype=torch.float64)
    mirrored = idealized_ranking_accuracy(-ref_ratio, zero, (0.1,), unanimous="code")
    assert mirrored.max == 0
    assert idealized_ranking_accuracy(-ref_ratio, zero, (0.1,)).max == 0.25


def test_small_betas_do_not_overflow():
    ref_ratio, alpha = torch.tensor([-50.0, -5000.0]), torch.tensor([0.999, 0.999])
    assert idealized_log_ratio(ref_ratio, alpha, 0.01).isfinite().all()
    assert idealized_ranking_accuracy(ref_ratio, alpha, (0.01,)).per_beta == 0.5
    assert idealized_log_ratio(ref_ratio, 1.0, 0.1).isinf().all()


def test_a_ratio_of_log_probabilities_would_point_the_wrong_way():
    # What the released simulator does without normalisation: log pi(y_w)/log pi(y_l) for their
    # ratio. With the reference in favour of y_w and raters evenly split it says "wrong".
    ref_chosen, ref_rejected = torch.tensor([-10.0]), torch.tensor([-30.0])
    assert ref_chosen / ref_rejected < 1
    assert idealized_ranking_accuracy(ref_chosen - ref_rejected, 0.5).min == 1


# --- bookkeeping and report --------------------------------------------------------------------


@quick
@given(seeds)
def test_transitions_are_the_four_parts(seed):
    chosen, rejected, ref_chosen, ref_rejected = pairs(seed)
    result = ranking_transitions(*pairs(seed), beta=0.3)
    torch.testing.assert_close(result.share.sum(), torch.ones((), dtype=torch.float64))
    assert 0 <= result.flip_rate <= 1
    before, after = ref_chosen >= ref_rejected, chosen >= rejected
    loss = dpo_gamma_loss(*pairs(seed), beta=0.3, reduction="none")
    margin = 0.3 * ((chosen - rejected) - (ref_chosen - ref_rejected))
    for row in (0, 1):
        for column in (0, 1):
            part = (before == bool(row)) & (after == bool(column))
            torch.testing.assert_close(result.share[row, column], part.double().mean())
            torch.testing.assert_close(result.mean_loss[row, column], loss[part].mean())
            torch.testing.assert_close(result.mean_margin[row, column], margin[part].mean())
    torch.testing.assert_close(result.flip_rate, after[~before].double().mean())
    torch.testing.assert_close(result.share[:, 1].sum(), ranking_accuracy(chosen, rejected))
    torch.testing.assert_close(result.share[1].sum(), ranking_accuracy(ref_chosen, ref_rejected))


def test_nothing_wrong_means_a_flip_rate_of_zero():
    up, down = torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, -2.0])
    result = ranking_transitions(up, down, up, down)
    assert result.flip_rate == 0
    assert result.mean_loss[0].isnan().all()


def test_report_holds_what_its_parts_say():
    chosen, rejected, ref_chosen, ref_rejected = pairs(9)
    g = torch.Generator().manual_seed(0)
    lengths = [torch.randint(5, 50, (200,), generator=g) for _ in range(2)]
    alpha = shares(9)
    named = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    report = ranking_report(*pairs(9), beta=0.2, alpha=alpha, loss_level=0.5, **named)
    ref_ratio = ref_chosen - ref_rejected
    assert report.ranking_accuracy == ranking_accuracy(chosen, rejected)
    assert report.reference_accuracy == ranking_accuracy(ref_chosen, ref_rejected)
    assert report.reward_accuracy == reward_accuracy(*pairs(9))
    assert report.normalized_ranking_accuracy == ranking_accuracy(chosen, rejected, **named)
    ideal = idealized_ranking_accuracy(ref_ratio, alpha)
    assert torch.equal(report.idealized.per_beta, ideal.per_beta)
    assert report.alignment_gap == ideal.median - report.ranking_accuracy
    per_token = ref_chosen / lengths[0] - ref_rejected / lengths[1]
    normalized = idealized_ranking_accuracy(per_token, alpha)
    assert torch.equal(report.normalized_idealized.per_beta, normalized.per_beta)
    gap = normalized.median - report.normalized_ranking_accuracy
    assert report.normalized_alignment_gap == gap
    assert report.unreachable_share == (dpo_flip_threshold(ref_ratio, 0.2) < 0.5).double().mean()
    assert torch.equal(report.hardest(3), ref_ratio.argsort()[:3])
    torch.testing.assert_close(report.mean_lengths, torch.stack(lengths).double().mean(-1))
    assert report.transitions.share.shape == (2, 2)
    bare = ranking_report(*pairs(9))
    assert bare.idealized is bare.alignment_gap is bare.mean_lengths is None
    assert bare.normalized_ranking_accuracy is None
    assert bare.loss_level == bare.loss.mean()
    no_votes = ranking_report(*pairs(9), **named)
    assert no_votes.normalized_idealized is no_votes.normalized_alignment_gap is None


# --- dtypes, extremes, errors ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_results_have_the_input_dtype(dtype):
    given_ = [x.to(dtype) for x in pairs(2)]
    ratio = given_[2] - given_[3]
    assert ranking_accuracy(*given_[:2]).dtype == dtype
    assert reward_accuracy(*given_).dtype == dtype
    assert dpo_gamma_loss(*given_).dtype == dtype
    assert dpo_flip_threshold(ratio, 0.1).dtype == dtype
    assert ipo_flip_threshold(ratio, 0.1).dtype == dtype
    assert idealized_log_ratio(ratio, 0.7, 0.1).dtype == dtype
    assert {x.dtype for x in idealized_ranking_accuracy(ratio, 0.7)} == {dtype}
    assert {x.dtype for x in ranking_transitions(*given_)} == {dtype}
    assert ranking_report(*given_, alpha=0.7).alignment_gap.isfinite()
    wide = dpo_gamma_loss(*(x.float() for x in given_), reduction="none")
    if dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(dpo_gamma_loss(*given_, reduction="none"), wide.to(dtype))


@pytest.mark.parametrize("size", [400.0, 1e4])
def test_extreme_log_ratios_are_finite(size):
    chosen = torch.tensor([-size, size, 0.0], requires_grad=True)
    zero = torch.zeros(3)
    loss = dpo_gamma_loss(chosen, zero, zero, zero, beta=1.0, reduction="none")
    torch.testing.assert_close(loss, torch.tensor([size, 0.0, math.log(2)]))
    (grad,) = torch.autograd.grad(loss.sum(), chosen)
    torch.testing.assert_close(grad, torch.tensor([-1.0, 0.0, -0.5]))


def test_softplus_keeps_its_tail_in_float64():
    x = torch.tensor([21.0, 30.0], dtype=torch.float64)
    torch.testing.assert_close(
        dpo_flip_threshold(x, 1.0), x + torch.log1p(torch.exp(-x)), rtol=1e-15, atol=0
    )


def test_nan_is_not_silent_and_masks_hide_it():
    chosen, rejected, ref_chosen, ref_rejected = (x.clone() for x in pairs(3))
    chosen[0] = math.nan
    given_ = (chosen, rejected, ref_chosen, ref_rejected)
    mask = torch.ones(200, dtype=torch.bool)
    mask[0] = False
    assert ranking_accuracy(chosen, rejected).isnan()
    assert ranking_accuracy(chosen, rejected, mask=mask) == ranking_accuracy(
        chosen[1:], rejected[1:]
    )
    assert reward_accuracy(*given_).isnan()
    assert dpo_gamma_loss(*given_).isnan()
    parameters = [x.clone().requires_grad_() for x in given_]
    loss = dpo_gamma_loss(*parameters, mask=mask)
    torch.testing.assert_close(loss, dpo_gamma_loss(*(x[1:] for x in given_)))
    grad = torch.autograd.grad(loss, parameters[0])[0]
    assert grad.isfinite().all()
    assert grad[0] == 0
    nothing = dpo_gamma_loss(*parameters, mask=torch.zeros(200))
    assert nothing == 0
    assert torch.autograd.grad(nothing, parameters[0])[0].eq(0).all()
    result = idealized_ranking_accuracy(chosen, 0.7)
    assert all(x.isnan().all() for x in result)
    assert idealized_ranking_accuracy(chosen, 0.7, mask=mask).median.isfinite()
    assert full_ranking_accuracy(torch.tensor([[1, 2]]), torch.tensor([[-1.0, math.nan]])).isnan()
    half = torch.full((200,), 0.5, dtype=torch.float64)
    assert tie_aware_ranking_accuracy(half, chosen, rejected).isnan()
    assert ranking_transitions(*given_).share.isnan().all()
    assert ranking_transitions(*given_).flip_rate.isnan()


def test_loss_is_traced_and_vectorised():
    given_ = pairs(6, n=12)
    rows = [x.view(3, 4) for x in given_]
    losses = torch.func.vmap(dpo_gamma_loss)(*rows)
    expected = torch.stack([dpo_gamma_loss(*(x[i] for x in rows)) for i in range(3)])
    torch.testing.assert_close(losses, expected)
    compiled = torch.compile(dpo_gamma_loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given_), dpo_gamma_loss(*given_))
    wide = torch.randn(12, 4, dtype=torch.float64)
    strided = dpo_gamma_loss(*wide.unbind(-1))
    assert strided == dpo_gamma_loss(*(x.clone() for x in wide.unbind(-1)))


L, R = torch.zeros(3), torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: ranking_accuracy(L, L[:2]), ValueError, "rejected_logprobs"),
        (lambda: ranking_accuracy(L[:0], L[:0]), ValueError, "chosen_logprobs"),
        (lambda: ranking_accuracy(R, R), ValueError, "chosen_logprobs"),
        (lambda: ranking_accuracy(L.long(), L), TypeError, "chosen_logprobs"),
        (lambda: ranking_accuracy(L, L, chosen_lengths=L), ValueError, "rejected_lengths"),
        (lambda: ranking_accuracy(L, L, rejected_lengths=L), ValueError, "chosen_lengths"),
        (
            lambda: ranking_accuracy(L, L, chosen_lengths=L[:2], rejected_lengths=L),
            ValueError,
            "chosen_lengths",
        ),
        (lambda: ranking_accuracy(L, L, mask=L[:2]), ValueError, "mask"),
        (lambda: ranking_accuracy(L, L, reduction="x"), ValueError, "reduction"),
        (lambda: reward_accuracy(L, L, L, L[:2]), ValueError, "ref_rejected_logprobs"),
        (lambda: tie_aware_ranking_accuracy(L[:2], L, L), ValueError, "alpha"),
        (lambda: tie_aware_ranking_accuracy(L.long(), L, L), TypeError, "alpha"),
        (lambda: tie_aware_ranking_accuracy(L, L, L, tie_eps=0.0), ValueError, "tie_eps"),
        (lambda: full_ranking_accuracy(L, L), ValueError, "logprobs"),
        (lambda: full_ranking_accuracy(L, R), ValueError, "human_rank"),
        (lambda: idealized_log_ratio(L, 1.1, 0.1), ValueError, "alpha"),
        (lambda: idealized_log_ratio(L, L[:2], 0.1), ValueError, "alpha"),
        (lambda: idealized_log_ratio(L, 0.5, 0.0), ValueError, "beta"),
        (lambda: idealized_ranking_accuracy(R, 0.5), ValueError, "ref_log_ratio"),
        (lambda: idealized_ranking_accuracy(L, 0.5, ()), ValueError, "betas"),
        (lambda: idealized_ranking_accuracy(L, 0.5, (0.1, -1.0)), ValueError, "beta"),
        (lambda: idealized_ranking_accuracy(L, 0.5, eps=0.5), ValueError, "eps"),
        (lambda: idealized_ranking_accuracy(L, 0.5, unanimous="x"), ValueError, "unanimous"),
        (lambda: idealized_ranking_accuracy(L, 0.5, mask=L[:2]), ValueError, "mask"),
        (lambda: dpo_flip_threshold(L, -1.0), ValueError, "beta"),
        (lambda: dpo_flip_threshold(L, 1.0, gamma=-1.0), ValueError, "gamma"),
        (lambda: dpo_flip_threshold(L.long(), 1.0), TypeError, "ref_log_ratio"),
        (lambda: ipo_flip_threshold(L, 0.0), ValueError, "tau"),
        (lambda: dpo_gamma_loss(L, L, L, L, beta=0.0), ValueError, "beta"),
        (lambda: dpo_gamma_loss(L, L, L, L, gamma=-0.1), ValueError, "gamma"),
        (lambda: dpo_gamma_loss(L, L, L, L, mask=L[:2]), ValueError, "mask"),
        (lambda: ranking_report(L, L, L, L, chosen_lengths=L), ValueError, "rejected_lengths"),
        (lambda: ranking_report(L, L, L, L).hardest(0), ValueError, "count"),
        (lambda: ranking_transitions(L, L, L, L[:2]), ValueError, "ref_rejected_logprobs"),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()
