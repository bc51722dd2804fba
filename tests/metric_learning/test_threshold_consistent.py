"""TCM against sums over pairs and the published implementation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.metric_learning import tcm_loss, threshold_consistent

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)


def batch(seed, items=12, classes=3, dim=4):
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(items, dim, dtype=torch.float64, generator=g)
    return rows, torch.randint(0, classes, (items,), generator=g)


def by_pairs(rows, labels, m_pos=0.9, m_neg=0.5):
    """Unordered pairs, one at a time."""
    unit = torch.nn.functional.normalize(rows, dim=-1)
    positive, negative = [], []
    for i in range(len(rows)):
        for j in range(i):
            s = unit[i] @ unit[j]
            if labels[i] == labels[j] and s <= m_pos:
                positive.append(m_pos - s)
            if labels[i] != labels[j] and s >= m_neg:
                negative.append(s - m_neg)
    zero = 0 * rows.sum()
    return sum((torch.stack(x).mean() if x else zero for x in (positive, negative)), zero)


@quick
@given(seeds)
def test_loss_and_gradient_are_those_of_the_unordered_pairs(seed):
    rows, labels = batch(seed)
    rows.requires_grad_()
    got, expected = tcm_loss(rows, labels), by_pairs(rows, labels)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    slopes = [torch.autograd.grad(value, rows)[0] for value in (got, expected)]
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-12)


def test_hand_case():
    rows = torch.tensor([[0, 1], [0.43, 0.90], [1, 0], [0.5, 0.5]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1])
    parts = [tcm_loss(rows, labels, weight_negative=0.0), tcm_loss(rows, labels, weight_positive=0)]
    assert parts[0].item() == pytest.approx(0.192893, abs=1e-6)
    assert parts[1].item() == pytest.approx(0.324983, abs=1e-6)
    assert tcm_loss(rows, labels).item() == pytest.approx(0.517876, abs=1e-6)


@quick
@given(seeds)
def test_blocks_give_the_value_and_the_gradient_of_the_matrix(seed):
    rows, labels = batch(seed, 23)
    rows.requires_grad_()
    dense = tcm_loss(rows, labels, weight_positive=0.7, weight_negative=1.3)
    slope = torch.autograd.grad(3 * dense, rows)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threshold_consistent, "_DENSE_ROWS", 0)
        patch.setattr(threshold_consistent, "_BLOCK_ELEMENTS", 23 * 5)
        blocked = tcm_loss(rows, labels, weight_positive=0.7, weight_negative=1.3)
        got = torch.autograd.grad(3 * blocked, rows)[0]
    torch.testing.assert_close(blocked, dense, rtol=0, atol=1e-12)
    torch.testing.assert_close(got, slope, rtol=0, atol=1e-12)


@pytest.mark.parametrize("limit", [0, 1024])
def test_gradient_by_finite_differences(limit, monkeypatch):
    monkeypatch.setattr(threshold_consistent, "_DENSE_ROWS", limit)
    rows, labels = batch(3, 7)
    assert torch.autograd.gradcheck(lambda x: tcm_loss(x, labels), rows.requires_grad_())


def test_nothing_of_the_size_of_all_pairs_is_kept_for_the_backward_pass():
    rows, labels = batch(0, 3000, 300, 4)
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = tcm_loss(rows.requires_grad_(), labels)
    loss.backward()
    assert kept
    assert max(kept) <= rows.numel()
    assert rows.grad.abs().sum() > 0


@quick
@given(seeds)
def test_each_part_is_bounded_and_lengths_rotations_and_order_do_not_matter(seed):
    rows, labels = batch(seed)
    g = torch.Generator().manual_seed(seed)
    expected = tcm_loss(rows, labels)
    assert 0 <= tcm_loss(rows, labels, weight_negative=0.0) <= 1.9
    assert 0 <= tcm_loss(rows, labels, weight_positive=0.0) <= 0.5
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=g)).Q
    length = torch.rand(len(rows), 1, dtype=torch.float64, generator=g) + 0.1
    order = torch.randperm(len(rows), generator=g)
    for changed, names in ((length * rows @ turn, labels), (rows[order], labels[order])):
        torch.testing.assert_close(tcm_loss(changed, names), expected, rtol=0, atol=1e-12)
    rows.requires_grad_()
    slope = torch.autograd.grad(tcm_loss(rows, labels), rows)[0]
    assert (slope * rows).sum(-1).abs().max() < 1e-12


def test_easy_pairs_change_nothing_and_give_exactly_zero():
    apart = torch.eye(3, dtype=torch.float64).repeat_interleave(2, 0).requires_grad_()
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    loss = tcm_loss(apart, labels)
    loss.backward()
    assert loss == 0
    assert apart.grad.abs().max() == 0


def test_a_pair_on_the_margin_counts_in_the_denominator():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    labels = torch.zeros(3, dtype=torch.long)
    # cosines 0, 0 on the margin and -1: the excess 1 is shared by three pairs
    assert tcm_loss(rows, labels, margin_positive=0.0).item() == pytest.approx(1 / 3)
    assert tcm_loss(rows, labels, margin_positive=-0.01).item() == pytest.approx(0.99)


def test_the_gradient_mass_over_hard_pairs_is_the_weight():
    cosine = torch.tensor([[1.0, 0.2, 0.7], [0.2, 1.0, 0.95], [0.7, 0.95, 1.0]]).double()
    cosine.requires_grad_()
    margins = threshold_consistent._Margins(0.9, 0.5, 2.0, 3.0)
    labels = torch.tensor([0, 0, 1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threshold_consistent, "products", lambda _a, _b: cosine)
        rows = torch.zeros(3, 1)
        sums = threshold_consistent._sums(rows, rows, labels, labels, 0, margins)
    slope = torch.autograd.grad(threshold_consistent._total(sums, margins), cosine)[0]
    assert slope[0, 1] + slope[1, 0] == pytest.approx(-2.0)
    assert slope[2, :2].sum() + slope[:2, 2].sum() == pytest.approx(3.0)


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_pytorch_metric_learning(seed):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    rows, labels = batch(seed, 16)
    published = losses.ThresholdConsistentMarginLoss()
    expected = published(rows, labels)
    torch.testing.assert_close(tcm_loss(rows, labels), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_and_large_inputs_stay_finite(dtype):
    rows, labels = batch(1)
    small = (1e4 * rows / rows.abs().max()).to(dtype).requires_grad_()
    loss = tcm_loss(small, labels)
    loss.backward()
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(tcm_loss(small.detach().double(), labels).item(), rel=1e-2)
    assert small.grad.isfinite().all()


def test_zero_rows_single_items_and_views_are_fine():
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0]], requires_grad=True)
    loss = tcm_loss(rows, torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == pytest.approx(0.9)
    assert rows.grad.isfinite().all()
    assert tcm_loss(torch.ones(1, 3), torch.tensor([4])) == 0
    rows, labels = batch(2)
    torch.testing.assert_close(tcm_loss(rows.T.contiguous().T, labels), tcm_loss(rows, labels))


def test_nan_shows_in_the_loss():
    rows = torch.eye(3)
    rows[0, 0] = torch.nan
    assert tcm_loss(rows, torch.tensor([0, 0, 1])).isnan()


def test_it_maps_over_batches():
    rows = torch.stack([batch(seed)[0] for seed in range(3)])
    labels = batch(0)[1]
    got = torch.func.vmap(tcm_loss, in_dims=(0, None))(rows, labels)
    torch.testing.assert_close(got, torch.stack([tcm_loss(x, labels) for x in rows]))


X, Y = torch.ones(3, 2), torch.tensor([0, 0, 1])


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: tcm_loss(X[0], Y), ValueError, "embeddings"),
        (lambda: tcm_loss(X[:0], Y[:0]), ValueError, "embeddings"),
        (lambda: tcm_loss(X.long(), Y), TypeError, "embeddings"),
        (lambda: tcm_loss(X, Y[:2]), ValueError, "labels"),
        (lambda: tcm_loss(X, Y.float()), TypeError, "labels"),
        (lambda: tcm_loss(X, Y, margin_positive=-1.1), ValueError, "margin_positive"),
        (lambda: tcm_loss(X, Y, margin_negative=1.1), ValueError, "margin_negative"),
        (lambda: tcm_loss(X, Y, weight_positive=-1), ValueError, "weight_positive"),
        (lambda: tcm_loss(X, Y, weight_negative=float("nan")), ValueError, "weight_negative"),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()
