"""Reranking losses, their decomposition into weights and directions, and ranking metrics."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.metric_learning import (
    contrastive_rerank_loss,
    ndcg,
    recall,
    reciprocal_rank,
    rerank_weights,
    sft_rerank_loss,
    unified_rerank_loss,
)

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)
close = {"rtol": 0, "atol": 1e-10}


def lists(seed, queries=4, documents=6, several=False):
    g = torch.Generator().manual_seed(seed)
    yes, no = 2 * torch.randn(2, queries, documents, dtype=torch.float64, generator=g)
    labels = torch.zeros(queries, documents, dtype=torch.long)
    labels[:, 0] = 1
    if several:
        labels[:, 1] = torch.randint(0, 2, (queries,), generator=g)
    return yes, no, labels


def network(seed):
    """Hidden states through a layer into rows for yes and no."""
    g = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4, 6, 3, dtype=torch.float64, generator=g)
    layer, head = (torch.randn(*s, dtype=torch.float64, generator=g) for s in ((3, 5), (5, 2)))
    parameters = [layer.requires_grad_(), head.requires_grad_()]
    hidden = (inputs @ layer).tanh()
    hidden.retain_grad()
    yes, no = (hidden @ head).unbind(-1)
    return yes, no, [hidden, *parameters]


@quick
@given(seeds)
def test_unified_gradients_are_those_of_both_losses_for_all_parameters(seed):
    labels = lists(seed, several=True)[2]
    yes, no, parameters = network(seed)
    plain = (
        contrastive_rerank_loss(yes, labels=labels, temperature=0.7),
        sft_rerank_loss(yes, no, labels, reduction="sum") / 4,
    )
    unified = (
        unified_rerank_loss(
            yes, no, labels, weight="contrastive", direction="yes", temperature=0.7
        ),
        unified_rerank_loss(yes, no, labels),
    )
    for loss, surrogate in zip(plain, unified, strict=True):
        slopes = (torch.autograd.grad(x, parameters, retain_graph=True) for x in (loss, surrogate))
        for expected, got in zip(*slopes, strict=True):
            torch.testing.assert_close(got, expected, **close)


@quick
@given(seeds, st.floats(0.1, 3))
def test_contrastive_loss_is_cross_entropy_and_ignores_a_constant(seed, temperature):
    yes, no, labels = lists(seed)
    target = torch.zeros(4, dtype=torch.long)
    expected = torch.nn.functional.cross_entropy(yes / temperature, target)
    got = contrastive_rerank_loss(yes, temperature=temperature)
    torch.testing.assert_close(got, expected, **close)
    torch.testing.assert_close(
        contrastive_rerank_loss(yes + 100, labels=labels, temperature=temperature), got, **close
    )
    first, moved = (rerank_weights(y, no, labels, scheme="sft") for y in (yes, yes + 1))
    assert (first - moved).abs().min() > 0


@quick
@given(seeds)
def test_several_positives_are_the_mean_of_single_ones(seed):
    yes, _, _ = lists(seed, queries=1)
    labels = torch.tensor([[1, 1, 0, 0, 0, 0]])
    singles = [
        contrastive_rerank_loss(torch.cat((yes[:, i : i + 1], yes[:, 2:]), 1)) for i in (0, 1)
    ]
    got = contrastive_rerank_loss(yes, labels=labels)
    torch.testing.assert_close(got, torch.stack(singles).mean(), **close)


@quick
@given(seeds, st.floats(0.2, 3))
def test_contrastive_weights_obey_the_sum_rule_and_sft_weights_do_not(seed, temperature):
    yes, no, labels = lists(seed, several=True)
    w = rerank_weights(yes, no, labels, scheme="contrastive", temperature=temperature)
    up, down = (w * labels).sum(-1), (w * (1 - labels)).sum(-1)
    torch.testing.assert_close(up, down, rtol=0, atol=1e-12)
    assert ((up > 0) & (up <= (1 + 1e-12) / temperature)).all()  # below, but for rounding
    sft = rerank_weights(yes, no, labels, scheme="sft")
    score = torch.softmax(torch.stack((yes, no)), 0)[0]
    torch.testing.assert_close(sft, torch.where(labels == 1, 1 - score, score), **close)


def test_equal_logits_push_the_negatives_with_one_or_with_n_halves():
    zeros, labels = torch.zeros(1, 17, dtype=torch.float64), torch.zeros(1, 17, dtype=torch.long)
    labels[0, 0] = 1
    contrastive = rerank_weights(zeros, zeros, labels)
    assert contrastive[0, 0].item() == pytest.approx(16 / 17)
    assert contrastive[0, 1:].sum().item() == pytest.approx(16 / 17)
    sft = rerank_weights(zeros, zeros, labels, scheme="sft")
    assert sft[0, 1:].sum().item() == pytest.approx(8)
    lead = zeros.clone()
    lead[0, 0] = 2.0
    expected = 16 / (16 + math.exp(2))
    assert rerank_weights(lead, zeros, labels)[0, 0].item() == pytest.approx(expected)


def test_worked_example():
    yes = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    no, labels = torch.zeros_like(yes), torch.tensor([[1, 0]])
    assert contrastive_rerank_loss(yes).item() == pytest.approx(0.313262, abs=1e-6)
    assert rerank_weights(yes, no, labels)[0].tolist() == pytest.approx([0.268941] * 2, abs=1e-6)
    sft = sft_rerank_loss(yes, no, labels, reduction="none")[0]
    assert sft.tolist() == pytest.approx([0.313262, 0.693147], abs=1e-6)
    moved = rerank_weights(yes + 3, no, labels, scheme="sft")[0]
    assert moved.tolist() == pytest.approx([0.017986, 0.952574], abs=1e-6)


@quick
@given(seeds)
def test_the_mean_over_documents_is_smaller_than_the_decomposed_sum_by_their_number(seed):
    yes, no, labels = lists(seed)
    mean = sft_rerank_loss(yes, no, labels)
    per_query = sft_rerank_loss(yes, no, labels, reduction="none").sum(-1).mean()
    torch.testing.assert_close(per_query, 6 * mean, **close)
    single = sft_rerank_loss(yes, torch.zeros_like(no), labels)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(yes, labels.double())
    torch.testing.assert_close(single, expected, **close)


@quick
@given(seeds)
def test_repeating_the_negatives_adds_the_log_of_their_number(seed):
    yes, _, _ = lists(seed)
    repeated = torch.cat((yes[:, :1], yes[:, 1:].repeat(1, 3)), 1)
    shifted = torch.cat((yes[:, :1], yes[:, 1:] + math.log(3)), 1)
    got, expected = contrastive_rerank_loss(repeated), contrastive_rerank_loss(shifted)
    torch.testing.assert_close(got, expected, **close)


def test_one_negative_is_the_pairwise_logistic_loss():
    yes, _, _ = lists(0, documents=2)
    expected = torch.nn.functional.softplus(yes[:, 1] - yes[:, 0]).mean()
    torch.testing.assert_close(contrastive_rerank_loss(yes), expected, **close)


@quick
@given(seeds)
def test_the_direction_changes_no_weight_and_gradients_are_collinear(seed):
    labels = lists(seed)[2]
    yes, no, (hidden, _, head) = network(seed)
    for weight in ("sft", "contrastive", "constant"):
        w = rerank_weights(yes, no, labels, scheme=weight)
        signed = torch.where(labels == 1, -w, w)[..., None] / 4
        for direction, row in (("yes", head[:, 0]), ("yes_minus_no", head[:, 0] - head[:, 1])):
            loss = unified_rerank_loss(yes, no, labels, weight=weight, direction=direction)
            slope = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
            torch.testing.assert_close(slope, signed * row, **close)


def test_constant_weights_never_stop_and_the_threshold_stops_them():
    yes, no, labels = lists(1)
    push = torch.where(labels == 1, 1.0, -1.0).double()
    values = [unified_rerank_loss(yes + t * push, no, labels, weight="constant") for t in (0, 1, 2)]
    assert (values[1] - values[0]).item() == pytest.approx(-6)
    assert (values[2] - values[1]).item() == pytest.approx(-6)
    far = rerank_weights(100 * push, no, labels, scheme="constant", mask_threshold=0.2)
    assert far.abs().max() == 0


def test_the_threshold_keeps_what_is_wrong_with_its_probability():
    wrong = torch.tensor([[0.19, 0.21, 0.19, 0.21]], dtype=torch.float64)
    labels = torch.tensor([[1, 1, 0, 0]])
    yes = torch.where(labels == 1, -wrong.logit(), wrong.logit())
    for scheme in ("constant", "sft", "contrastive"):
        free, got = (
            rerank_weights(yes, 0 * yes, labels, scheme=scheme, mask_threshold=threshold)
            for threshold in (None, 0.2)
        )
        assert got.tolist() == (free * torch.tensor([0.0, 1.0, 0.0, 1.0])).tolist()


def test_weights_tend_to_the_hardest_negative_as_the_temperature_falls():
    yes, no, labels = lists(2)
    w = 0.01 * rerank_weights(yes, no, labels, temperature=0.01)
    w[:, 0] = yes[:, 0] - yes[:, 1:].max(-1).values  # a positive ahead has weights near 0
    behind = w[:, 0] < 0
    assert behind.any()
    hardest = torch.nn.functional.one_hot(yes[:, 1:].argmax(-1), 5).double()
    torch.testing.assert_close(w[behind, 1:], hardest[behind], rtol=0, atol=1e-3)


@quick
@given(seeds)
def test_a_masked_document_is_as_if_it_were_not_there(seed):
    yes, no, labels = lists(seed)
    mask = torch.ones_like(labels, dtype=torch.bool)
    mask[:, 4:] = False
    dirty, dirty_no = yes.clone(), no.clone()
    dirty[:, 4:], dirty_no[:, 4:] = torch.inf, torch.nan
    dirty.requires_grad_()
    short = yes[:, :4], no[:, :4], labels[:, :4]
    for weight in ("sft", "contrastive", "constant"):
        for direction in ("yes", "yes_minus_no"):
            options = {"weight": weight, "direction": direction}
            got = unified_rerank_loss(dirty, dirty_no, labels, mask=mask, **options)
            torch.testing.assert_close(got, unified_rerank_loss(*short, **options), **close)
            assert torch.autograd.grad(got, dirty)[0].isfinite().all()
    for got, expected in (
        (sft_rerank_loss(dirty, dirty_no, labels, mask=mask), sft_rerank_loss(*short)),
        (contrastive_rerank_loss(dirty, mask=mask), contrastive_rerank_loss(short[0])),
    ):
        torch.testing.assert_close(got, expected, **close)
        assert torch.autograd.grad(got, dirty)[0].isfinite().all()


def test_queries_without_positive_or_without_any_document_do_not_count():
    yes, no, labels = lists(0)
    expected = contrastive_rerank_loss(yes[:2])
    labels[2:] = 0
    torch.testing.assert_close(contrastive_rerank_loss(yes, labels=labels), expected, **close)
    assert rerank_weights(yes, no, labels)[2:].abs().max() == 0
    mask = torch.zeros_like(labels, dtype=torch.bool)
    yes.requires_grad_()
    for loss in (
        contrastive_rerank_loss(yes, mask=mask),
        sft_rerank_loss(yes, no, labels, mask=mask),
        unified_rerank_loss(yes, no, labels, mask=mask),
    ):
        assert loss == 0
        assert torch.autograd.grad(loss, yes)[0].abs().max() == 0
    alone = torch.tensor([[3.0]], requires_grad=True)
    loss = contrastive_rerank_loss(alone)
    loss.backward()
    assert loss == 0
    assert alone.grad == 0


def test_own_weights_are_detached_and_used():
    yes, no, labels = lists(0)
    own = torch.rand(4, 6, dtype=torch.float64, requires_grad=True)
    yes.requires_grad_()
    unified_rerank_loss(yes, no, labels, weight=own, reduction="sum").backward()
    assert own.grad is None
    torch.testing.assert_close(yes.grad, torch.where(labels == 1, -own, own).detach(), **close)
    assert not rerank_weights(yes, no, labels).requires_grad


def test_gradients_by_finite_differences():
    yes, no, labels = lists(0, several=True)
    yes.requires_grad_(), no.requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda y: contrastive_rerank_loss(y, labels=labels, temperature=0.5), yes)
    assert check(lambda y, n: sft_rerank_loss(y, n, labels), (yes, no))
    own = torch.rand(4, 6, dtype=torch.float64)
    assert check(lambda y, n: unified_rerank_loss(y, n, labels, weight=own), (yes, no))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_are_finite(dtype):
    yes = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], dtype=dtype, requires_grad=True)
    no = -yes.detach()
    labels = torch.tensor([[1, 0, 0], [1, 0, 0]])
    for loss in (
        contrastive_rerank_loss(yes),
        sft_rerank_loss(yes, no, labels),
        unified_rerank_loss(yes, no, labels),
        unified_rerank_loss(yes, no, labels, weight="contrastive", direction="yes"),
    ):
        assert loss.dtype == dtype
        assert loss.isfinite()
        assert torch.autograd.grad(loss, yes)[0].isfinite().all()


def test_the_losses_compile_without_a_graph_break():
    yes, no, labels = lists(0)

    def both(y, n):
        return contrastive_rerank_loss(y) + unified_rerank_loss(y, n, labels)

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(yes, no), both(yes, no))


@quick
@given(seeds, st.integers(1, 9))
def test_metrics_agree_with_torchmetrics(seed, k):
    functional = pytest.importorskip("torchmetrics.functional.retrieval")
    g = torch.Generator().manual_seed(seed)
    scores, grades = torch.randn(7, generator=g), torch.randint(0, 4, (7,), generator=g)
    exponential = torch.exp2(grades.float()) - 1
    expected = functional.retrieval_normalized_dcg(scores, exponential.long(), top_k=min(k, 7))
    torch.testing.assert_close(ndcg(scores, grades, k), expected)
    relevant = grades > 2
    # torchmetrics 1.9 leaves documents with a score <= 0 out of its recall: give it the same order
    # in positive scores
    expected = functional.retrieval_recall(scores.sigmoid(), relevant, top_k=k)
    torch.testing.assert_close(recall(scores, relevant, k), expected)
    expected = functional.retrieval_reciprocal_rank(scores.sigmoid(), relevant)
    torch.testing.assert_close(reciprocal_rank(scores, relevant), expected)


def test_recall_ranks_by_score_whatever_its_sign():
    scores, relevant = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([0, 1, 1])
    assert recall(scores, relevant, 2) == 0.5
    assert recall(scores + 10, relevant, 2) == 0.5


def test_metrics_by_hand_over_batches():
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])
    grades = torch.tensor([[0, 2, 1], [0, 1, 0], [0, 0, 0]])
    third = 1 / math.log2(3)
    best = 3 + third
    expected = [(3 * third + 0.5) / best, third, 0.0]
    assert ndcg(scores, grades, 3).tolist() == pytest.approx(expected)
    assert reciprocal_rank(scores, grades).tolist() == [0.5, 0.5, 0]  # ties keep their order
    assert recall(scores, grades, 2).tolist() == [0.5, 1, 0]
    assert ndcg(scores, grades, 1).tolist() == [0, 0, 0]
    assert ndcg(scores, grades.flip(0), 99).shape == (3,)


def test_metrics_say_nan_for_nan_and_keep_half_precision():
    scores = torch.tensor([[1.0, torch.nan], [2.0, 1.0]])
    grades = torch.tensor([[1, 0], [1, 0]])
    for value in (ndcg(scores, grades, 2), recall(scores, grades, 1)):
        assert value.isnan().tolist() == [True, False]
    assert reciprocal_rank(scores.half(), grades).dtype == torch.float16


S, L = torch.ones(2, 3), torch.tensor([[1, 0, 0], [1, 0, 0]])


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: contrastive_rerank_loss(S[0]), ValueError, "scores"),
        (lambda: contrastive_rerank_loss(S[:0]), ValueError, "scores"),
        (lambda: contrastive_rerank_loss(L), TypeError, "scores"),
        (lambda: contrastive_rerank_loss(S, labels=L[:1]), ValueError, "labels"),
        (lambda: contrastive_rerank_loss(S, temperature=0.0), ValueError, "temperature"),
        (lambda: contrastive_rerank_loss(S, mask=L[:1]), ValueError, "mask"),
        (lambda: contrastive_rerank_loss(S, reduction="x"), ValueError, "reduction"),
        (lambda: sft_rerank_loss(S, S[:1], L), ValueError, "no_logits"),
        (lambda: sft_rerank_loss(S, S, L[0]), ValueError, "labels"),
        (lambda: rerank_weights(S, S, L, scheme="x"), ValueError, "scheme"),
        (lambda: rerank_weights(S, S, L, mask_threshold=1.0), ValueError, "mask_threshold"),
        (lambda: unified_rerank_loss(S, S, L, weight="x"), ValueError, "weight"),
        (lambda: unified_rerank_loss(S, S, L, weight=S[:1]), ValueError, "weight"),
        (lambda: unified_rerank_loss(S, S, L, weight=L), TypeError, "weight"),
        (lambda: unified_rerank_loss(S, S, L, direction="x"), ValueError, "direction"),
        (lambda: ndcg(S, L[:1], 2), ValueError, "relevance"),
        (lambda: ndcg(S, L, 0), ValueError, "k"),
        (lambda: recall(S, L, 1.5), TypeError, "k"),
        (lambda: reciprocal_rank(S[:, :0], L[:, :0]), ValueError, "scores"),
        (lambda: reciprocal_rank(S[0, 0], L[0, 0]), ValueError, "scores"),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()
