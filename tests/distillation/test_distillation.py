"""PLD, KD, DIST, SinKD, DCKD and ADPA against products, enumeration, an LP and autograd."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

from steelyard.distillation import (
    adpa_loss,
    adpa_term,
    dckd_loss,
    dist_loss,
    kd_loss,
    plackett_luce_loss,
    pld_loss,
    sinkhorn_kd_loss,
    teacher_advantage,
)

CHECK = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 10_000)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labels(batch: int, classes: int, seed: int = 0) -> Tensor:
    return torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(seed))


# ---- Plackett-Luce --------------------------------------------------------------------------


def pl_probability(scores: Tensor, order: tuple[int, ...]) -> Tensor:
    left, product = list(order), torch.ones((), dtype=torch.float64)
    for item in order:
        product = product * scores[item].exp() / scores[left].exp().sum()
        left.remove(item)
    return product


@CHECK
@given(seed=seeds)
def test_ranking_probabilities_are_the_products_and_sum_to_one(seed):
    scores = randn(4, seed=seed)
    orders = list(itertools.permutations(range(4)))
    each = torch.stack([pl_probability(scores, o) for o in orders])
    found = plackett_luce_loss(
        scores.expand(24, 4),
        torch.tensor(orders),
        torch.ones(24, 4, dtype=torch.float64),
        reduction="none",
    )
    torch.testing.assert_close(found, -each.log())
    torch.testing.assert_close(each.sum(), torch.ones((), dtype=torch.float64))
    assert orders[int(each.argmax())] == tuple(scores.argsort(descending=True).tolist())


def test_worked_example_with_its_gradient():
    s = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    loss = pld_loss(s, torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64), torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(0.4289190, abs=1e-7)
    assert s.grad[0].tolist() == pytest.approx([0.0835047, -0.1848365, 0.1013317], abs=1e-7)


@CHECK
@given(seed=seeds, temperature=st.sampled_from([0.5, 1.0, 4.0]))
def test_pld_is_the_explicit_sum(seed, temperature):
    s, t, y = randn(3, 5, seed=seed), randn(3, 5, seed=seed + 1), labels(3, 5, seed)
    q, total = (t / temperature).softmax(1), []
    for i in range(3):
        rest = sorted((c for c in range(5) if c != y[i]), key=lambda c: -t[i, c].item())
        order = [int(y[i]), *rest]
        total.append(
            sum(q[i, c] * (s[i, order[k:]].logsumexp(0) - s[i, c]) for k, c in enumerate(order))
        )
    found = pld_loss(s, t, y, temperature=temperature, reduction="none")
    torch.testing.assert_close(found, torch.stack(total))


@CHECK
@given(seed=seeds, shift=st.floats(-50, 50))
def test_pld_ignores_shifts_and_names_of_classes(seed, shift):
    s, t, y = randn(2, 5, seed=seed), randn(2, 5, seed=seed + 1), labels(2, 5, seed)
    base = pld_loss(s, t, y)
    torch.testing.assert_close(pld_loss(s + shift, t - shift, y), base)
    names = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(pld_loss(s[:, names], t[:, names], names.argsort()[y]), base)


@CHECK
@given(seed=seeds)
def test_pld_is_convex_with_one_flat_direction_and_a_bounded_gradient(seed):
    t, y = randn(1, 4, seed=seed), labels(1, 4, seed)
    s = randn(1, 4, seed=seed + 1).requires_grad_()
    hessian = torch.autograd.functional.hessian(lambda z: pld_loss(z, t, y), s)[0, :, 0]
    values = torch.linalg.eigvalsh(hessian)
    assert values[0].abs() < 1e-10
    assert values[1] > 0
    assert values[-1] <= 0.5 + 1e-12
    pld_loss(s, t, y).backward()
    assert s.grad.sum().abs() < 1e-12
    assert s.grad.abs().max() <= 1
    assert s.grad[0, y[0]] <= 0


@CHECK
@given(seed=seeds)
def test_two_classes_are_cross_entropy_times_the_teachers_belief(seed):
    s, t, y = randn(3, 2, seed=seed), randn(3, 2, seed=seed + 1), labels(3, 2, seed)
    belief = t.softmax(1).gather(1, y[:, None])[:, 0]
    expected = belief * functional.cross_entropy(s, y, reduction="none")
    torch.testing.assert_close(pld_loss(s, t, y, reduction="none"), expected)


def test_a_sure_teacher_gives_cross_entropy_and_a_wrong_one_hardly_any_label():
    s, y = randn(2, 4), torch.tensor([0, 1])
    right = 1e3 * functional.one_hot(y, 4).double()
    torch.testing.assert_close(pld_loss(s, right, y), functional.cross_entropy(s, y))
    wrong = torch.tensor([[0.0, 0.0, 1e3, 0.0]], dtype=torch.float64)
    left = s[:1, 1:].logsumexp(1) - s[:1, 2]
    torch.testing.assert_close(pld_loss(s[:1], wrong, y[:1], reduction="none"), left)


def test_ties_go_to_the_lower_class_and_right_orders_end_at_zero():
    s, y = randn(1, 4), torch.tensor([2])
    order = torch.tensor([[2, 0, 1, 3]])
    expected = plackett_luce_loss(s, order, torch.full((1, 4), 0.25, dtype=torch.float64))
    torch.testing.assert_close(pld_loss(s, torch.zeros(1, 4, dtype=torch.float64), y), expected)
    spread = -100.0 * order.argsort(1).double()
    assert pld_loss(spread, torch.zeros(1, 4, dtype=torch.float64), y) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_and_half_precision_stay_finite(dtype):
    s = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype, requires_grad=True)
    t, y = torch.tensor([[-1e4, 1e4, 0.0]], dtype=dtype), torch.tensor([0])
    for loss in (pld_loss(s, t, y), kd_loss(s, t, y), sinkhorn_kd_loss(s, t)):
        assert loss.dtype == dtype
        (grad,) = torch.autograd.grad(loss, s, retain_graph=True)
        assert grad.isfinite().all()


# ---- KD and DIST ----------------------------------------------------------------------------


def test_kd_is_its_formula():
    s, t, y = randn(3, 4), randn(3, 4, seed=1), labels(3, 4)
    p, q = (s / 3).softmax(1), (t / 3).softmax(1)
    expected = 0.2 * functional.cross_entropy(s, y) + 0.8 * 9 * (q * (q / p).log()).sum(1).mean()
    torch.testing.assert_close(kd_loss(s, t, y, alpha=0.2, temperature=3.0), expected)


def test_dist_is_one_minus_correlations():
    s, t, y = randn(5, 4), randn(5, 4, seed=1), labels(5, 4)
    p, q = (s / 2).softmax(1), (t / 2).softmax(1)
    rows = torch.stack([torch.corrcoef(torch.stack([p[i], q[i]]))[0, 1] for i in range(5)])
    cols = torch.stack([torch.corrcoef(torch.stack([p[:, c], q[:, c]]))[0, 1] for c in range(4)])
    expected = 0.5 * functional.cross_entropy(s, y) + 2 * (1 - rows).mean() + 3 * (1 - cols).mean()
    torch.testing.assert_close(
        dist_loss(s, t, y, alpha=0.5, beta=2, gamma=3, temperature=2.0), expected
    )


def test_dist_of_one_item_has_finite_gradients():
    s = randn(1, 3).requires_grad_()
    dist_loss(s, randn(1, 3, seed=1), torch.tensor([0]), alpha=1, beta=1, gamma=1).backward()
    assert s.grad.isfinite().all()


# ---- SinKD ----------------------------------------------------------------------------------


def sinkhorn_by_hand(s: Tensor, t: Tensor, temperature: float, epsilon: float, n: int) -> Tensor:
    cost = (
        (torch.softmax(s / temperature, 1)[:, None] - torch.softmax(t / temperature, 1)[None])
        .abs()
        .sum(-1)
    )
    plan = (-cost / epsilon).exp()
    for _ in range(n):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return (plan * cost).sum()


@CHECK
@given(seed=seeds, n=st.integers(1, 20))
def test_sinkd_is_the_plain_iteration_with_its_gradient(seed, n):
    s, t = randn(4, 5, seed=seed).requires_grad_(), randn(4, 5, seed=seed + 1)
    ours, plain = sinkhorn_kd_loss(s, t, num_iterations=n), sinkhorn_by_hand(s, t, 2.0, 0.1, n)
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)
    mine, theirs = torch.autograd.grad(ours, s)[0], torch.autograd.grad(plain, s)[0]
    torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)
    assert mine.sum(1).abs().max() < 1e-12


@CHECK
@given(seed=seeds, n=st.integers(1, 5))
def test_sinkd_does_not_see_the_pairing(seed, n):
    s, t = randn(4, 5, seed=seed), randn(4, 5, seed=seed + 1)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    base = sinkhorn_kd_loss(s, t, num_iterations=n)
    torch.testing.assert_close(sinkhorn_kd_loss(s[order], t, num_iterations=n), base)
    torch.testing.assert_close(sinkhorn_kd_loss(s, t[order], num_iterations=n), base)
    torch.testing.assert_close(sinkhorn_kd_loss(s + 3, t - 1, num_iterations=n), base)


def test_sinkd_limits_are_assignment_and_mean():
    s, t = 3 * randn(5, 4), 3 * randn(5, 4, seed=1)
    cost = torch.cdist((s / 2).softmax(1), (t / 2).softmax(1), p=1.0)
    rows, columns = linear_sum_assignment(cost.numpy())
    sharp = sinkhorn_kd_loss(s, t, epsilon=1e-3, num_iterations=5000)
    torch.testing.assert_close(sharp, cost[rows, columns].sum(), atol=5e-3, rtol=0)
    flat = sinkhorn_kd_loss(s, t, epsilon=1e6)
    torch.testing.assert_close(flat, cost.sum() / 5, atol=1e-5, rtol=0)


def test_detached_plan_is_the_same_value_and_another_gradient():
    s, t = randn(4, 5).requires_grad_(), randn(4, 5, seed=1)
    losses = [sinkhorn_kd_loss(s, t, gradient=g) for g in ("unroll", "detach")]
    torch.testing.assert_close(*losses)
    a, b = (torch.autograd.grad(loss, s)[0] for loss in losses)
    assert not torch.allclose(a, b)
    assert torch.autograd.gradcheck(lambda z: sinkhorn_kd_loss(z, t, num_iterations=3, p=2), (s,))


def test_identical_constant_clouds_cost_nothing_even_for_gradients():
    s = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    for p in (1, 2):
        loss = sinkhorn_kd_loss(s, torch.zeros(3, 4, dtype=torch.float64), p=p)
        assert loss.item() == 0
        assert torch.autograd.grad(loss, s)[0].isfinite().all()


# ---- DCKD and ADPA --------------------------------------------------------------------------


def test_worked_example_of_the_advantage():
    ref, dpo = (
        torch.tensor([0.5, 0.5], dtype=torch.float64).log(),
        torch.tensor([0.8, 0.2], dtype=torch.float64).log(),
    )
    student = torch.tensor([[[0.6, 0.4]]], dtype=torch.float64).log().requires_grad_()
    advantage = teacher_advantage(dpo, ref)
    assert advantage.tolist() == pytest.approx([0.4700036, -0.9162907], abs=1e-7)
    term = adpa_term(student, advantage.expand(1, 1, 2))
    term.backward()
    assert term.item() == pytest.approx(0.0845141, abs=1e-7)
    assert student.grad.flatten().tolist() == pytest.approx([-0.3327106, 0.3327106], abs=1e-7)


@CHECK
@given(seed=seeds)
def test_expected_advantage_is_a_difference_of_divergences(seed):
    dpo, ref, student = (randn(2, 3, 5, seed=seed + i) for i in range(3))
    a, p = teacher_advantage(dpo, ref), student.log_softmax(-1)

    def kl(x, y):
        return (x.exp() * (x - y)).sum(-1).mean()

    expected = kl(p, ref.log_softmax(-1)) - kl(p, dpo.log_softmax(-1))
    torch.testing.assert_close(-adpa_term(student, a), expected)
    ones = (ref.softmax(-1) * a.exp()).sum(-1)
    torch.testing.assert_close(ones, torch.ones_like(ones))
    torch.testing.assert_close(ref.softmax(-1) * a.exp(), dpo.softmax(-1))
    torch.testing.assert_close(adpa_term(dpo, a), -kl(dpo.log_softmax(-1), ref.log_softmax(-1)))


@CHECK
@given(seed=seeds)
def test_gradient_is_minus_probability_times_centred_advantage(seed):
    student, a = randn(1, 2, 4, seed=seed).requires_grad_(), randn(1, 2, 4, seed=seed + 1)
    (grad,) = torch.autograd.grad(adpa_term(student, a), student)
    p = student.detach().softmax(-1)
    torch.testing.assert_close(grad, -p * (a - (p * a).sum(-1, keepdim=True)) / 2)
    shifted = adpa_term(student, a + 3.0)
    torch.testing.assert_close(shifted, adpa_term(student, a) - 3)
    torch.testing.assert_close(torch.autograd.grad(shifted, student)[0], grad)
    torch.testing.assert_close(adpa_term(student, 2 * a), 2 * adpa_term(student, a))


def test_advantages_telescope_to_reward_minus_value_on_a_tree():
    ref = {
        (): randn(2).log_softmax(0),
        (0,): randn(2, seed=1).log_softmax(0),
        (1,): randn(2, seed=2).log_softmax(0),
    }
    reward = {
        leaf: randn(1, seed=5 + i)[0] for i, leaf in enumerate(itertools.product((0, 1), repeat=2))
    }
    value = dict(reward)
    for node in ((0,), (1,), ()):
        value[node] = torch.logsumexp(
            torch.stack([ref[node][a] + value[(*node, a)] for a in (0, 1)]), 0
        )
    aligned = {n: torch.stack([ref[n][a] + value[(*n, a)] - value[n] for a in (0, 1)]) for n in ref}
    for leaf, r in reward.items():
        total = sum(teacher_advantage(aligned[leaf[:t]], ref[leaf[:t]])[leaf[t]] for t in (0, 1))
        torch.testing.assert_close(total, r - value[()])


def test_identical_teachers_or_no_weight_leave_fine_tuning():
    student, tokens, own = randn(2, 3, 5), torch.randint(5, (2, 3)), randn(2, 4, 5, seed=1)
    nll = functional.cross_entropy(student.flatten(0, 1), tokens.flatten())
    teacher = randn(2, 4, 5, seed=2)
    same = teacher_advantage(teacher, teacher)
    torch.testing.assert_close(adpa_loss(student, tokens, own, same), nll)
    torch.testing.assert_close(adpa_loss(student, tokens, own, randn(2, 4, 5), gamma=0.0), nll)
    other, own_tokens = randn(2, 3, 5, seed=3), torch.randint(5, (2, 4))
    torch.testing.assert_close(
        dckd_loss(student, own, other, teacher, tokens, own_tokens, alpha=0.0), nll
    )
    torch.testing.assert_close(
        dckd_loss(student, own, student, own, tokens, own_tokens, alpha=3.0), nll
    )


def test_dckd_is_three_token_means_with_their_own_masks():
    sw, sl, tw, tl = (
        randn(2, 3, 5),
        randn(2, 4, 5, seed=1),
        randn(2, 3, 5, seed=2),
        randn(2, 4, 5, seed=3),
    )
    yw, yl = torch.randint(5, (2, 3)), torch.randint(5, (2, 4))
    mw = torch.tensor([[1, 1, 0], [1, 0, 0]])
    ml = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0]]).bool()
    keep_w, keep_l = mw.bool(), ml

    def kl(t, s):
        return functional.kl_div(
            s.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="sum"
        ) / len(s)

    expected = functional.cross_entropy(sw[keep_w], yw[keep_w]) + 0.7 * (
        kl(tw[keep_w], sw[keep_w]) + kl(tl[keep_l], sl[keep_l])
    )
    padded = torch.where(keep_w, yw, -100)
    found = dckd_loss(sw, sl, tw, tl, padded, yl, alpha=0.7, mask_chosen=mw, mask_rejected=ml)
    torch.testing.assert_close(found, expected)


def test_fully_masked_batches_are_zero_with_zero_gradient_whatever_they_hold():
    bad = torch.full((1, 2, 3), torch.nan, requires_grad=True)
    none, tokens = torch.zeros(1, 2), torch.full((1, 2), -100)
    losses = (
        adpa_loss(bad, tokens, bad, bad.detach(), mask_chosen=none, mask_own=none),
        dckd_loss(
            bad, bad, bad, bad, tokens, tokens, alpha=1.0, mask_chosen=none, mask_rejected=none
        ),
        adpa_term(bad, bad.detach(), mask=none, aggregate="sequence"),
    )
    for loss in losses:
        assert loss.item() == 0
        assert torch.autograd.grad(loss, bad)[0].abs().max() == 0


def test_top_k_keeps_the_aligned_teachers_likeliest():
    dpo, ref = randn(3, 6), randn(3, 6, seed=1)
    full, cut = teacher_advantage(dpo, ref), teacher_advantage(dpo, ref, top_k=2)
    kept = torch.zeros_like(full, dtype=torch.bool).scatter(-1, dpo.topk(2).indices, True)
    torch.testing.assert_close(cut, torch.where(kept, full, 0.0))
    torch.testing.assert_close(teacher_advantage(dpo, ref, top_k=100), full)
    ties = teacher_advantage(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0]), top_k=1)
    assert (ties != 0).tolist() == [True, False, False]


def test_tokens_that_both_teachers_exclude_have_no_advantage():
    dpo, ref = torch.tensor([0.0, 1.0, -math.inf]), torch.tensor([0.0, 0.0, -math.inf])
    assert teacher_advantage(dpo, ref).isfinite().all()


def test_gradients_by_finite_differences():
    s, a, y = randn(1, 2, 4).requires_grad_(), randn(1, 2, 4, seed=1), torch.tensor([[0, 3]])
    assert torch.autograd.gradcheck(lambda z: adpa_loss(z, y, z, a), (s,))
    assert torch.autograd.gradcheck(lambda z: dckd_loss(z, z, a, -a, y, y, alpha=0.5), (s,))
    flat, label = randn(2, 4).requires_grad_(), torch.tensor([0, 1])
    assert torch.autograd.gradcheck(lambda z: pld_loss(z, randn(2, 4, seed=2), label), (flat,))
    assert torch.autograd.gradcheck(lambda z: kd_loss(z, randn(2, 4, seed=2), label), (flat,))
    assert torch.autograd.gradcheck(
        lambda z: dist_loss(z, randn(2, 4, seed=2), label, alpha=1, beta=1, gamma=1), (flat,)
    )


def test_wrong_arguments_are_named():
    s, y = randn(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="teacher_logits must have the shape"):
        pld_loss(s, randn(2, 4), y)
    with pytest.raises(TypeError, match="labels must have an integer"):
        pld_loss(s, s, y.double())
    with pytest.raises(ValueError, match="temperature"):
        pld_loss(s, s, y, temperature=0.0)
    with pytest.raises(ValueError, match="must not be empty"):
        kd_loss(s[:0], s[:0], y[:0])
    with pytest.raises(ValueError, match="alpha"):
        kd_loss(s, s, y, alpha=1.5)
    with pytest.raises(ValueError, match="epsilon"):
        sinkhorn_kd_loss(s, s, epsilon=0.0)
    with pytest.raises(ValueError, match="gradient must be one of"):
        sinkhorn_kd_loss(s, s, gradient="implicit")
    with pytest.raises(ValueError, match="student_logits must have shape"):
        sinkhorn_kd_loss(s[None], s[None])
    with pytest.raises(ValueError, match="mask"):
        adpa_term(s[None], s[None], mask=torch.ones(2, 1))
    with pytest.raises(ValueError, match="top_k"):
        teacher_advantage(s, s, top_k=0)
    with pytest.raises(ValueError, match="chosen_tokens"):
        adpa_loss(s[None], y[None, :1], s[None], s[None])
    with pytest.raises(ValueError, match="rejected_tokens"):
        dckd_loss(s[None], s[None], s[None], s[None], y[None], y[None, :1], alpha=1.0)
