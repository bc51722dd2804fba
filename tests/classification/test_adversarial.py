"""Losses and weights of adversarial training against their definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from steelyard.classification import (
    dlr_loss,
    gairat_weights,
    mail_weights,
    mart_loss,
    tail_robust_accuracy,
    trades_loss,
)

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)
close = {"rtol": 0, "atol": 1e-12}


def batch(seed: int, rows: int = 6, classes: int = 5):
    g = torch.Generator().manual_seed(seed)
    clean, attacked = 2 * torch.randn(2, rows, classes, generator=g, dtype=torch.float64)
    return clean, attacked, torch.randint(0, classes, (rows,), generator=g)


def others(values, labels):
    """Entries of each row but the label's."""
    return [torch.cat((row[:y], row[y + 1 :])) for row, y in zip(values, labels, strict=True)]


@quick
@given(seeds, st.floats(0, 10))
def test_trades_is_cross_entropy_and_the_divergence_of_torch(seed, beta):
    clean, attacked, labels = batch(seed)
    got = trades_loss(clean, attacked, labels, beta=beta)
    divergence = functional.kl_div(
        attacked.log_softmax(-1), clean.softmax(-1), reduction="batchmean"
    )
    expected = functional.cross_entropy(clean, labels) + beta * divergence
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    assert divergence >= 0
    same = trades_loss(clean, clean, labels, beta=beta)
    torch.testing.assert_close(same, functional.cross_entropy(clean, labels), **close)


@quick
@given(seeds, st.floats(0, 10))
def test_mart_is_its_formula_with_the_small_constants(seed, beta):
    clean, attacked, labels = batch(seed)
    got = mart_loss(clean, attacked, labels, beta=beta, reduction="none")
    p, q = clean.softmax(-1), attacked.softmax(-1)
    for i, y in enumerate(labels):
        rest = others(q, labels)[i].max()
        bce = -q[i, y].log() - (1.0001 - rest + 1e-12).log()
        divergence = (p[i] * (p[i].log() - (q[i] + 1e-12).log())).sum()
        expected = bce + beta * divergence * (1.0000001 - p[i, y])
        torch.testing.assert_close(got[i], expected, rtol=0, atol=1e-10)


def test_both_losses_pass_gradcheck_in_both_logits():
    clean, attacked, labels = batch(1)
    clean.requires_grad_()
    attacked.requires_grad_()
    for loss in (trades_loss, mart_loss):
        assert torch.autograd.gradcheck(lambda a, b, f=loss: f(a, b, labels), (clean, attacked))


@pytest.mark.parametrize("loss", [trades_loss, mart_loss])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_stay_finite(loss, dtype):
    clean = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]]).to(dtype).requires_grad_()
    attacked = torch.tensor([[-1e4, 1e4, 0.0], [5.0, 1.0, -1.0]]).to(dtype).requires_grad_()
    labels = torch.tensor([0, 1])
    got = loss(clean, attacked, labels, beta=0.5)
    assert got.dtype == dtype
    assert got.isfinite()
    got.backward()
    assert clean.grad.isfinite().all()
    assert attacked.grad.isfinite().all()
    exact = loss(clean.double(), attacked.double(), labels, beta=0.5)
    torch.testing.assert_close(got.double(), exact, rtol=max(torch.finfo(dtype).eps, 1e-5), atol=0)


@pytest.mark.parametrize("loss", [trades_loss, mart_loss])
def test_masked_rows_do_not_count(loss):
    clean, attacked, labels = batch(2)
    mask = torch.tensor([1, 0, 1, 1, 0, 1])
    kept = mask == 1
    dirty, ignored = attacked.clone(), labels.clone()
    dirty[~kept], ignored[~kept] = math.nan, -100
    dirty.requires_grad_()
    got = loss(clean, dirty, ignored, mask=mask)
    torch.testing.assert_close(got, loss(clean[kept], attacked[kept], labels[kept]), **close)
    [slope] = torch.autograd.grad(got, dirty)
    assert (slope[~kept] == 0).all()
    nothing = loss(clean, dirty, ignored, mask=torch.zeros(6))
    assert nothing == 0
    assert (torch.autograd.grad(nothing, dirty)[0] == 0).all()
    assert loss(clean, attacked, labels, reduction="none").shape == (6,)


@quick
@given(st.integers(1, 30), st.floats(-3, 3))
def test_gairat_is_its_formulas_decreases_in_kappa_and_ends_in_equal_weights(steps, lam):
    kappa = torch.arange(steps + 1, dtype=torch.float64)
    place = lam + 5 * (1 - 2 * kappa / steps)
    expected = {
        "tanh": (1 + place.tanh()) / 2,
        "sigmoid": place.sigmoid(),
        "discrete": (steps + 1 - kappa) / (steps + 1),
    }
    for kind, value in expected.items():
        raw = gairat_weights(kappa, steps, kind=kind, lam=lam, normalize="none")
        torch.testing.assert_close(raw, value, **close)
        assert (raw.diff() < 0).all()
        scaled = gairat_weights(kappa, steps, kind=kind, lam=lam)
        torch.testing.assert_close(scaled, value / value.mean(), rtol=1e-9, atol=0)
    equal = gairat_weights(kappa, steps, lam=math.inf, normalize="none")
    assert (equal == 1).all()


def test_gairat_keeps_its_digits_where_tanh_rounds_to_minus_one():
    raw = gairat_weights(torch.tensor([10.0]), 10, lam=-20.0, normalize="none")
    assert 0 < raw < 1e-20


def test_gairat_rounds_no_half_of_the_steps():
    """The released code divides by int(K / 2), which moves the curve for odd K."""
    raw = gairat_weights(torch.tensor([3.0]), 7, normalize="none")
    released = (1 + math.tanh(-1.0 + 5 * (1 - 3 / int(7 / 2)))) / 2
    assert float(raw) == pytest.approx((1 + math.tanh(-1 + 5 * (1 - 6 / 7))) / 2, abs=1e-6)
    assert abs(float(raw) - released) > 0.1


@quick
@given(seeds, st.floats(0.5, 20), st.floats(-1, 1))
def test_mail_is_its_formula_and_rises_with_the_margin(seed, slope, bias):
    _, attacked, labels = batch(seed)
    q = attacked.softmax(-1)
    rest = torch.stack([row.max() for row in others(q, labels)])
    margin = rest - q.gather(1, labels.unsqueeze(1)).squeeze(1)
    assert (margin.abs() <= 1).all()
    raw = mail_weights(attacked, labels, slope=slope, bias=bias, normalize="none")
    torch.testing.assert_close(raw, (slope * (margin + bias)).sigmoid(), **close)
    order = margin.argsort()
    assert (raw[order].diff() >= 0).all()
    assert not mail_weights(attacked.requires_grad_(), labels).requires_grad


def test_mail_code_multiplies_by_three_and_the_paper_divides_by_the_mean():
    _, attacked, labels = batch(3)
    raw, code, mean = (
        mail_weights(attacked, labels, normalize=kind) for kind in ("none", "code", "mean")
    )
    torch.testing.assert_close(code, 3 * raw, **close)
    torch.testing.assert_close(mean, raw / raw.mean(), **close)
    assert abs(code.mean() - 1) > 0.1


def test_masked_items_get_weight_zero_and_the_mean_is_over_the_others():
    _, attacked, labels = batch(4)
    mask = torch.tensor([1, 0, 1, 1, 0, 1])
    got = mail_weights(attacked, labels.where(mask == 1, -100), mask=mask)
    expected = mail_weights(attacked[mask == 1], labels[mask == 1])
    torch.testing.assert_close(got[mask == 1], expected, **close)
    kappa = torch.tensor([0, 1, 2, 3, 4, 5])
    other = gairat_weights(kappa, 5, mask=mask)
    torch.testing.assert_close(other[mask == 1], gairat_weights(kappa[mask == 1], 5))
    for weights in (got, other):
        assert (weights[mask == 0] == 0).all()
    assert (gairat_weights(kappa, 5, mask=torch.zeros(6)) == 0).all()


@quick
@given(seeds, st.floats(0.1, 100), st.floats(-10, 10))
def test_dlr_is_its_formula_and_ignores_scale_and_shift(seed, scale, shift):
    logits, _, labels = batch(seed)
    targets = (labels + 1) % 5
    for aim in (None, targets):
        got = dlr_loss(logits, labels, targets=aim)
        for i, y in enumerate(labels):
            z, ordered = logits[i], logits[i].sort(descending=True).values
            if aim is None:
                gap, spread = z[y] - others(logits, labels)[i].max(), ordered[0] - ordered[2]
            else:
                gap, spread = z[y] - z[aim[i]], ordered[0] - (ordered[2] + ordered[3]) / 2
            torch.testing.assert_close(got[i], -gap / (spread + 1e-12), rtol=1e-9, atol=1e-10)
        moved = dlr_loss(scale * logits + shift, labels, targets=aim)
        torch.testing.assert_close(moved, got, rtol=1e-7, atol=1e-8)
    plain, right = dlr_loss(logits, labels), logits.argmax(1) == labels
    assert torch.equal(plain > 0, ~right)
    assert (plain[right] >= -1).all()


def test_dlr_may_exceed_one_and_passes_gradcheck():
    logits = torch.tensor([[2.0, 1.5, 1.0, -3.0]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([3])
    assert dlr_loss(logits, labels) > 1
    assert torch.autograd.gradcheck(lambda z: dlr_loss(z, labels), (logits,))
    aim = torch.tensor([1])
    assert torch.autograd.gradcheck(lambda z: dlr_loss(z, labels, targets=aim), (logits,))
    for dtype in (torch.float16, torch.bfloat16):
        flat = torch.zeros(1, 3, dtype=dtype, requires_grad=True)
        value = dlr_loss(flat, torch.tensor([0]))
        assert value.dtype == dtype
        assert value == 0
        assert dlr_loss(torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype), torch.tensor([1])).isfinite()


@quick
@given(seeds, st.integers(1, 30), st.floats(0.01, 1))
def test_the_tail_is_the_mean_of_the_worst_and_at_most_the_mean(seed, classes, fraction):
    accuracy = torch.rand(classes, generator=torch.Generator().manual_seed(seed)).double()
    got = tail_robust_accuracy(accuracy, fraction)
    count = next(m for m in range(1, classes + 1) if m >= fraction * classes - 1e-9)
    expected = sum(sorted(accuracy.tolist())[:count]) / count
    assert float(got) == pytest.approx(expected, abs=1e-12)
    assert got <= accuracy.mean() + 1e-12
    torch.testing.assert_close(tail_robust_accuracy(accuracy, 1.0), accuracy.mean(), **close)


def test_the_tail_is_not_a_class_too_long_by_rounding_and_shows_nan():
    assert 0.07 * 100 > 7
    accuracy = torch.arange(100.0)
    assert tail_robust_accuracy(accuracy, 0.07) == 3
    assert tail_robust_accuracy(torch.tensor([0.1, math.nan, 0.2, 0.3]), 0.25).isnan()
    assert tail_robust_accuracy(torch.tensor([0.5], dtype=torch.bfloat16), 0.3) == 0.5


@pytest.mark.parametrize(
    ("call", "dtype"),
    [
        (lambda k: gairat_weights(k, 3), torch.float32),
        (lambda k: gairat_weights(k.half(), 3), torch.float16),
        (lambda k: gairat_weights(k.double(), 3), torch.float64),
    ],
)
def test_gairat_dtype_follows_a_floating_kappa(call, dtype):
    assert call(torch.tensor([0, 1, 3])).dtype == dtype


def test_torch_func_and_compile_see_the_same_losses():
    clean, attacked, labels = batch(5)
    for loss in (trades_loss, mart_loss):
        compiled = torch.compile(loss, backend="eager", fullgraph=True)
        expected = loss(clean, attacked, labels)
        torch.testing.assert_close(compiled(clean, attacked, labels), expected, **close)
        each = torch.func.vmap(
            lambda a, b, y, f=loss: f(a.unsqueeze(0), b.unsqueeze(0), y.unsqueeze(0))
        )
        torch.testing.assert_close(each(clean, attacked, labels).mean(), expected, **close)


Z, Y, K = torch.zeros(3, 4), torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: trades_loss(Z[0], Z[0], Y), ValueError, "clean_logits"),
        (lambda: trades_loss(Z, Z[:, :3], Y), ValueError, "adversarial_logits"),
        (lambda: trades_loss(Z, Z, Y + 2), ValueError, "labels"),
        (lambda: trades_loss(Z, Z, Y, beta=-1.0), ValueError, "beta"),
        (lambda: mart_loss(Z, Z.long(), Y), TypeError, "adversarial_logits"),
        (lambda: mart_loss(Z, Z, Y[:2]), ValueError, "labels"),
        (lambda: mart_loss(Z, Z, Y, mask=Z), ValueError, "mask"),
        (lambda: gairat_weights(Z, 3), ValueError, "kappa"),
        (lambda: gairat_weights(K[:0], 3), ValueError, "kappa"),
        (lambda: gairat_weights(K, 0), ValueError, "steps"),
        (lambda: gairat_weights(K, 3, kind="x"), ValueError, "kind"),
        (lambda: gairat_weights(K, 3, lam=math.nan), ValueError, "lam"),
        (lambda: gairat_weights(K, 3, normalize="code"), ValueError, "normalize"),
        (lambda: mail_weights(Z, Y.float()), TypeError, "labels"),
        (lambda: mail_weights(Z, Y, normalize="x"), ValueError, "normalize"),
        (lambda: mail_weights(Z, Y, slope=math.inf), ValueError, "slope"),
        (lambda: dlr_loss(Z[:, :2], Y * 0), ValueError, "3 classes"),
        (lambda: dlr_loss(Z[:, :3], Y, targets=Y), ValueError, "4 classes"),
        (lambda: dlr_loss(Z, Y, targets=Y + 2), ValueError, "targets"),
        (lambda: tail_robust_accuracy(Z, 0.3), ValueError, "class_accuracy"),
        (lambda: tail_robust_accuracy(Z[0], 0.0), ValueError, "fraction"),
        (lambda: tail_robust_accuracy(K, 0.3), TypeError, "class_accuracy"),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()
