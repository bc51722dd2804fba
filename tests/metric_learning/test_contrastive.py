"""SimCLR, MoCo, SimSiam and Barlow Twins against closed forms and other libraries."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.metric_learning import barlow_twins_loss, moco_loss, simclr_loss, simsiam_loss

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)
close = {"rtol": 0, "atol": 1e-10}


def views(seed, count=2, items=5, dim=4):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, items, dim, dtype=torch.float64, generator=g)


@quick
@given(seeds, st.floats(0.05, 2))
def test_simclr_is_cross_entropy_over_the_other_views(seed, temperature):
    a, b = views(seed)
    unit = torch.nn.functional.normalize(torch.cat((a, b)), dim=-1)
    got = simclr_loss(a, b, temperature=temperature, reduction="none")
    for i in range(10):
        others = [k for k in range(10) if k != i]
        logits = unit[others] @ unit[i] / temperature
        target = torch.tensor(others.index((i + 5) % 10))
        expected = torch.nn.functional.cross_entropy(logits, target)
        torch.testing.assert_close(got[i], expected, **close)
    assert (got >= math.log1p(8 * math.exp(-2 / temperature)) - 1e-12).all()
    torch.testing.assert_close(simclr_loss(3 * a, b, temperature=temperature), got.mean(), **close)


@pytest.mark.parametrize("temperature", [0.05, 0.5, 5.0])
def test_simclr_of_equal_embeddings_is_the_log_of_the_others(temperature):
    same = torch.ones(4, 3, dtype=torch.float64)
    got = simclr_loss(same, same, temperature=temperature)
    assert got.item() == pytest.approx(math.log(7), abs=1e-12)


def test_simclr_agrees_with_pytorch_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    a, b = views(0)
    expected = losses.NTXentLoss(temperature=0.2)(torch.cat((a, b)), torch.arange(5).repeat(2))
    torch.testing.assert_close(simclr_loss(a, b, temperature=0.2), expected, **close)


@quick
@given(seeds)
def test_moco_with_the_batch_as_queue_is_info_nce(seed):
    query, key, queue = views(seed, 3)
    unit = [torch.nn.functional.normalize(x, dim=-1) for x in (query, key, queue)]
    positive = (unit[0] * unit[1]).sum(-1, keepdim=True)
    logits = torch.cat((positive, unit[0] @ unit[2].T), -1) / 0.1
    got = moco_loss(query, key, queue, reduction="none")
    target = torch.zeros(5, dtype=torch.long)
    expected = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(got, expected, **close)
    printed = moco_loss(query, key, queue, include_positive=False, reduction="none")
    torch.testing.assert_close(printed, logits[:, 1:].logsumexp(-1) - logits[:, 0], **close)
    assert (printed < got).all()


def test_the_printed_formula_leaves_the_positive_out_and_may_be_negative():
    query = torch.tensor([[1.0, 0.0]])
    queue = torch.tensor([[-1.0, 0.0]])
    printed = moco_loss(query, query, queue, include_positive=False)
    assert printed.item() == pytest.approx(-20.0)
    assert moco_loss(query, query, queue) >= 0


def test_moco_with_an_empty_queue_is_zero_with_zero_gradient():
    query, key = views(1)
    query.requires_grad_()
    loss = moco_loss(query, key, torch.empty(0, 4))
    loss.backward()
    assert loss == 0
    assert query.grad.abs().max() < 1e-12


def test_no_gradient_reaches_keys_queue_or_projections():
    a, b, c, d = (x.clone().requires_grad_() for x in views(0, 4))
    moco_loss(a, b, c).backward()
    assert a.grad is not None
    assert b.grad is c.grad is None
    simsiam_loss(b, c, a, d).backward()
    assert b.grad is not None
    assert d.grad is None


@quick
@given(seeds)
def test_simsiam_is_the_mean_cosine_across_views(seed):
    p_a, p_b, z_a, z_b = views(seed, 4)
    cosine = torch.nn.functional.cosine_similarity
    expected = -(cosine(p_a, z_b) + cosine(p_b, z_a)) / 2
    got = simsiam_loss(p_a, p_b, z_a, z_b, reduction="none")
    torch.testing.assert_close(got, expected, **close)
    assert (got >= -1).all()
    torch.testing.assert_close(
        simsiam_loss(p_a, p_b, 2 * p_b, 3 * p_a), torch.tensor(-1.0).double()
    )


@quick
@given(seeds)
def test_barlow_twins_is_the_sum_over_correlations_and_ignores_scale_and_shift(seed):
    a, b = views(seed, items=6, dim=3)
    correlation = [
        torch.stack((x, y)).corrcoef()[0, 1] for x in a.T for y in b.T
    ]  # corrcoef divides by matching normalisers
    c = torch.stack(correlation).view(3, 3)
    off = c.square().sum() - c.diagonal().square().sum()
    expected = (1 - c.diagonal()).square().sum() + 0.01 * off
    got = barlow_twins_loss(a, b, redundancy=0.01)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-8)
    moved = barlow_twins_loss(2 * a + 3, b * torch.tensor([1.0, 4.0, 9.0]), redundancy=0.01)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-8)


def test_the_released_code_mixes_two_variances():
    white = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).double()
    assert barlow_twins_loss(white, white).item() == pytest.approx(0, abs=1e-12)
    mixed = barlow_twins_loss(white, white, unbiased=True)
    assert mixed.item() == pytest.approx(2 * (1 / 4) ** 2, abs=1e-9)  # 1 - (B - 1) / B


def test_two_items_are_perfectly_correlated():
    a, b = views(3, items=2)
    signs = torch.sign((a[0] - a[1])[:, None] * (b[0] - b[1]))
    expected = (1 - signs.diagonal()).square().sum() + 12
    torch.testing.assert_close(barlow_twins_loss(a, b, redundancy=1.0), expected, rtol=0, atol=1e-6)


def test_gradients_by_finite_differences():
    data = [x.clone().requires_grad_() for x in views(2, 4, items=3, dim=3)]
    a, b = data[:2]
    check = torch.autograd.gradcheck
    assert check(lambda x, y: simclr_loss(x, y, temperature=0.3), (a, b))
    assert check(lambda x: moco_loss(x, b, data[2], temperature=0.3), (a,))
    assert check(lambda x: moco_loss(x, b, data[2], include_positive=False), (a,))
    assert check(lambda x, y: simsiam_loss(x, y, data[2], data[3]), (a, b))
    assert check(lambda x, y: barlow_twins_loss(x, y, unbiased=True), (a, b))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_and_half_precision_inputs_are_finite(dtype):
    data = [(1e4 * x / x.abs().max()).to(dtype).requires_grad_() for x in views(0, 4)]
    a, b, c, d = data
    for loss in (
        simclr_loss(a, b, temperature=0.01),
        moco_loss(a, b, c, temperature=0.01),
        simsiam_loss(a, b, c, d),
        barlow_twins_loss(a, b),
    ):
        slope = torch.autograd.grad(loss, a)[0]
        assert loss.dtype == dtype
        assert loss.isfinite()
        assert slope.isfinite().all()


def test_constant_features_and_nan():
    a = torch.ones(4, 2, requires_grad=True)
    loss = barlow_twins_loss(a, a)
    loss.backward()
    assert loss == 2
    assert a.grad.isfinite().all()
    assert simclr_loss(a * torch.nan, a).isnan()


X = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: simclr_loss(X, X[:2]), ValueError, "z_b"),
        (lambda: simclr_loss(X[:1], X[:1]), ValueError, "z_a"),
        (lambda: simclr_loss(X.long(), X), TypeError, "z_a"),
        (lambda: simclr_loss(X, X, temperature=0.0), ValueError, "temperature"),
        (lambda: simclr_loss(X, X, reduction="x"), ValueError, "reduction"),
        (lambda: moco_loss(X[:0], X[:0], X), ValueError, "query"),
        (lambda: moco_loss(X, X, torch.ones(3, 5)), ValueError, "queue"),
        (lambda: moco_loss(X, X, X[:0], include_positive=False), ValueError, "queue"),
        (lambda: simsiam_loss(X, X, X, X[:2]), ValueError, "z_b"),
        (lambda: barlow_twins_loss(X[:1], X[:1]), ValueError, "z_a"),
        (lambda: barlow_twins_loss(X, X, redundancy=-1.0), ValueError, "redundancy"),
        (lambda: barlow_twins_loss(X, X, eps=-1.0), ValueError, "eps"),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()
