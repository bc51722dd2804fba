"""LDR losses against cross-entropy, a numeric solver, and their theorems."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from steelyard.classification import ldr_loss, ldr_weights, normalize_logits

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)
temperatures = st.floats(0.05, 50)
close = {"rtol": 0, "atol": 1e-12}
INF = float("inf")


def batch(seed: int, rows: int = 6, classes: int = 5, scale: float = 2.0):
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, classes, generator=g, dtype=torch.float64)
    return logits, torch.randint(0, classes, (rows,), generator=g)


def gaps(logits, labels, margin):
    rows = range(len(labels))
    plain = logits - logits[rows, labels].unsqueeze(1) + margin
    plain[rows, labels] = 0.0
    return plain


def objective(weights, delta, temperature):
    """The problem's objective, by its definition."""
    classes = delta.shape[-1]
    divergence = torch.special.xlogy(weights, classes * weights).sum(-1)
    return (weights * delta).sum(-1) - temperature * divergence


@quick
@given(seeds)
def test_temperature_one_without_margin_is_cross_entropy_less_log_k(seed):
    logits, labels = batch(seed)
    logits.requires_grad_()
    ours = ldr_loss(logits, labels, margin=0.0)
    torch.testing.assert_close(
        ours, functional.cross_entropy(logits, labels) - math.log(5), **close
    )
    [a] = torch.autograd.grad(ours, logits)
    [b] = torch.autograd.grad(functional.cross_entropy(logits, labels), logits)
    torch.testing.assert_close(a, b, **close)


@quick
@given(seeds, temperatures)
def test_any_temperature_is_tempered_cross_entropy_times_the_temperature(seed, t):
    logits, labels = batch(seed)
    got = ldr_loss(logits, labels, temperature=t, margin=0.0, reduction="none")
    tempered = functional.cross_entropy(logits / t, labels, reduction="none")
    torch.testing.assert_close(got, t * (tempered - math.log(5)), rtol=0, atol=1e-10)


@quick
@given(seeds, st.floats(0, 2))
def test_limits_are_the_largest_and_the_mean_gap_and_finite_temperatures_tend_to_them(seed, c):
    logits, labels = batch(seed)
    delta = gaps(logits, labels, c)
    ends = {0.0: delta.amax(-1), INF: delta.mean(-1)}
    for end, expected in ends.items():
        got = ldr_loss(logits, labels, temperature=end, margin=c, reduction="none")
        torch.testing.assert_close(got, expected, **close)
    for t, expected, error in ((1e-9, ends[0.0], 2e-9), (1e9, ends[INF], 1e-7)):
        near = ldr_loss(logits, labels, temperature=t, margin=c, reduction="none")
        torch.testing.assert_close(near, expected, rtol=0, atol=error)
    for t in (1e-200, 1e200):
        end = 0.0 if t < 1 else INF
        got = ldr_loss(logits, labels, temperature=t, margin=c, reduction="none")
        torch.testing.assert_close(got, ends[end], **close)


def test_a_huge_temperature_keeps_its_digits():
    """lambda (logsumexp - log K) loses all digits at 1e12; the expansion of psi is the truth."""
    logits, labels = batch(0)
    delta = gaps(logits, labels, 0.0)
    expected = delta.mean(-1) + delta.var(-1, correction=0) / 2e12
    got = ldr_loss(logits, labels, temperature=1e12, margin=0.0, reduction="none")
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
    plain = 1e12 * ((delta / 1e12).logsumexp(-1) - math.log(5))
    assert (plain - expected).abs().max() > 1e-6


@quick
@given(seeds, temperatures)
def test_the_loss_lies_between_mean_and_maximum_and_falls_convexly_with_temperature(seed, t):
    logits, labels = batch(seed)
    delta = gaps(logits, labels, 0.1)
    low, middle, high = (
        ldr_loss(logits, labels, temperature=t * s, reduction="none") for s in (1.0, 1.5, 2.0)
    )
    assert (low <= delta.amax(-1) + 1e-12).all()
    assert (low >= delta.amax(-1) - t * math.log(5) - 1e-12).all()
    assert (low >= delta.mean(-1) - 1e-12).all()
    assert (low >= middle - 1e-12).all()
    assert (middle >= high - 1e-12).all()
    assert (low + high >= 2 * middle - 1e-11).all()


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("t", [0.0, 0.3, 2.0])
def test_loss_and_weights_solve_the_problem_found_by_a_general_solver(t, top_k):
    optimize = pytest.importorskip("scipy.optimize")
    logits, labels = batch(3, rows=3)
    value = ldr_loss(logits, labels, temperature=t, top_k=top_k, reduction="none")
    weights = ldr_weights(logits, labels, temperature=t, top_k=top_k)
    delta = gaps(logits, labels, 0.1)
    torch.testing.assert_close(objective(weights, delta, t), value, **close)
    assert (weights >= 0).all()
    assert (weights <= 1 / top_k + 1e-12).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3).double(), **close)
    for row, d in enumerate(delta):

        def loss(p, d=d):
            return -float(objective(torch.from_numpy(p), d, t))

        def slope(p, d=d):
            return -d.numpy() + t * (np.log(np.maximum(5 * p, 1e-300)) + 1)

        found = optimize.minimize(
            loss,
            np.full(5, 0.2),
            jac=slope,
            bounds=[(1e-12, 1 / top_k)] * 5,
            constraints={"type": "eq", "fun": lambda p: p.sum() - 1},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert -found.fun == pytest.approx(float(value[row]), abs=1e-6)


@quick
@given(seeds, st.floats(0.05, 20), st.integers(1, 9))
def test_capped_weights_satisfy_the_optimality_conditions(seed, t, top_k):
    """p = min(1/k, exp((delta - nu)/t)): free logs lie on one line, capped ones on or above it."""
    logits, labels = batch(seed, classes=9)
    delta = gaps(logits, labels, 0.1)
    weights = ldr_weights(logits, labels, temperature=t, top_k=top_k)
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(labels)).double(), **close)
    for p, d in zip(weights, delta, strict=True):
        free = p < 1 / top_k - 1e-9
        nu = d - t * p.log()
        if free.any():
            assert nu[free].max() - nu[free].min() < 1e-8 * max(1.0, t)
            assert (nu[~free] >= nu[free].mean() - 1e-7 * max(1.0, t)).all()


@quick
@given(seeds, st.sampled_from([0.0, 0.4, 3.0, INF]))
def test_top_one_is_the_plain_loss_top_k_the_mean_and_the_value_falls_between(seed, t):
    logits, labels = batch(seed)
    delta = gaps(logits, labels, 0.1)
    values = [
        ldr_loss(logits, labels, temperature=t, top_k=k, reduction="none") for k in range(1, 6)
    ]
    for one, next_one in itertools.pairwise(values):
        assert (one >= next_one - 1e-12).all()
    torch.testing.assert_close(values[-1], delta.mean(-1), **close)
    if t == 0:
        for k, value in enumerate(values, 1):
            torch.testing.assert_close(value, delta.topk(k, -1).values.mean(-1), **close)


@quick
@given(seeds, st.sampled_from([0.0, 0.3, 2.0, 1e4, INF]), st.integers(1, 5))
def test_the_gradient_is_the_weights_less_the_label(seed, t, top_k):
    logits, labels = batch(seed)
    logits.requires_grad_()
    ldr_loss(logits, labels, temperature=t, top_k=top_k, reduction="sum").backward()
    weights = ldr_weights(logits, labels, temperature=t, top_k=top_k)
    onehot = functional.one_hot(labels, 5)
    torch.testing.assert_close(logits.grad, weights - onehot, rtol=0, atol=1e-11)
    torch.testing.assert_close(logits.grad.sum(-1), torch.zeros(6).double(), **close)
    own = logits.grad.gather(1, labels.unsqueeze(1))
    assert ((own >= -1) & (own <= 1e-12)).all()
    assert not weights.requires_grad


@quick
@given(seeds, temperatures, st.floats(-5, 5), st.integers(1, 4))
def test_a_common_shift_changes_nothing_and_classes_can_be_renamed(seed, t, shift, top_k):
    logits, labels = batch(seed)
    settings_ = {"temperature": t, "top_k": top_k, "reduction": "none"}
    expected = ldr_loss(logits, labels, **settings_)
    torch.testing.assert_close(
        ldr_loss(logits + shift, labels, **settings_), expected, rtol=0, atol=1e-10
    )
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    renamed = ldr_loss(logits[:, order], order.argsort()[labels], **settings_)
    torch.testing.assert_close(renamed, expected, rtol=0, atol=1e-10)


@quick
@given(seeds, st.floats(0, 3))
def test_at_infinity_the_loss_is_symmetric_and_uniform_noise_only_rescales_it(seed, c):
    logits, labels = batch(seed)
    by_label = torch.stack(
        [
            ldr_loss(
                logits, torch.full_like(labels, y), temperature=INF, margin=c, reduction="none"
            )
            for y in range(5)
        ],
        1,
    )
    total = 4 * c
    torch.testing.assert_close(
        by_label.sum(1), torch.full((6,), total, dtype=torch.float64), **close
    )
    eta, clean = 0.3, by_label.gather(1, labels.unsqueeze(1)).squeeze(1)
    noisy = (1 - eta) * clean + eta * (by_label.sum(1) - clean) / 4
    expected = (1 - eta * 5 / 4) * clean + eta * total / 4
    torch.testing.assert_close(noisy, expected, **close)


@pytest.mark.parametrize("t", [0.5, 1.0, 3.0])
def test_the_population_minimiser_is_the_tempered_log_probability(t):
    q = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)

    def risk(scores):
        rows = scores.expand(4, 4)
        return (
            q * ldr_loss(rows, torch.arange(4), temperature=t, margin=0.0, reduction="none")
        ).sum()

    best = t * q.log()
    slope = torch.func.grad(risk)(best)
    assert slope.abs().max() < 1e-12
    entropy = -(q * q.log()).sum()
    assert float(risk(best)) == pytest.approx(float(-t * (math.log(4) - entropy)), abs=1e-12)
    scores = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scores], max_iter=200, tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        loss = risk(scores)
        loss.backward()
        return loss

    optimizer.step(closure)
    found = scores.detach() - scores.detach().mean()
    torch.testing.assert_close(found, best - best.mean(), rtol=0, atol=1e-4)


def test_ties_share_at_temperature_zero():
    logits, labels = torch.tensor([[0.0, 2.0, 2.0, 1.0, 1.0, 1.0]]), torch.tensor([0])
    weights = ldr_weights(logits, labels, temperature=0.0, margin=0.0)
    torch.testing.assert_close(weights, torch.tensor([[0, 0.5, 0.5, 0, 0, 0]]))
    weights = ldr_weights(logits, labels, temperature=0.0, margin=0.0, top_k=3)
    third, ninth = 1 / 3, 1 / 9
    torch.testing.assert_close(weights, torch.tensor([[0, third, third, ninth, ninth, ninth]]))
    near = ldr_weights(logits, labels, temperature=0.01, margin=0.0, top_k=3)
    torch.testing.assert_close(near, weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("t", [0.5, 3.0, INF])
def test_gradcheck(t, top_k):
    logits, labels = batch(4, rows=3)
    logits.requires_grad_()
    check = lambda z: ldr_loss(z, labels, temperature=t, top_k=top_k)  # noqa: E731
    assert torch.autograd.gradcheck(check, (logits,))
    if top_k == 1:
        assert torch.autograd.gradgradcheck(check, (logits,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("t", [0.0, 1e-30, 0.01, 1.0, 1e6, 1e30, INF])
def test_extreme_logits_stay_finite_and_close_to_float64(dtype, top_k, t):
    logits = torch.tensor([[1e4, -1e4, 0.0, 5.0], [0.0, 0.0, 0.0, 0.0], [3.0, 1.0, -2.0, 0.5]])
    logits = logits.to(dtype).requires_grad_()
    labels = torch.tensor([1, 2, 0])
    got = ldr_loss(logits, labels, temperature=t, top_k=top_k, reduction="none")
    assert got.dtype == dtype
    got.sum().backward()
    assert logits.grad.isfinite().all()
    exact = ldr_loss(logits.detach().double(), labels, temperature=t, top_k=top_k, reduction="none")
    error = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(got.detach().double(), exact, rtol=error, atol=error)


def test_many_classes_keep_their_digits_in_float32():
    g = torch.Generator().manual_seed(0)
    logits, labels = 3 * torch.randn(2, 50_000, generator=g), torch.tensor([3, 7])
    for t in (0.1, 1.0, 100.0):
        got = ldr_loss(logits, labels, temperature=t, reduction="none").double()
        exact = ldr_loss(logits.double(), labels, temperature=t, reduction="none")
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)


def test_masked_rows_do_not_count_even_with_nan_and_a_missing_label():
    logits, labels = batch(5)
    mask = torch.tensor([1, 0, 1, 1, 0, 1])
    dirty, ignored = logits.clone(), labels.clone()
    dirty[mask == 0], ignored[mask == 0] = math.nan, -100
    dirty.requires_grad_()
    for top_k in (1, 3):
        got = ldr_loss(dirty, ignored, top_k=top_k, mask=mask)
        expected = ldr_loss(logits[mask == 1], labels[mask == 1], top_k=top_k)
        torch.testing.assert_close(got, expected, **close)
        [slope] = torch.autograd.grad(got, dirty)
        assert (slope[mask == 0] == 0).all()
    nothing = ldr_loss(dirty, ignored, mask=torch.zeros(6))
    assert nothing == 0
    assert (torch.autograd.grad(nothing, dirty)[0] == 0).all()


def test_a_confident_right_item_has_a_negative_loss():
    logits = torch.tensor([[50.0, 0.0]])
    assert float(ldr_loss(logits, torch.tensor([0]))) == pytest.approx(-math.log(2))


def test_nan_comes_through_and_strided_logits_are_the_same():
    logits, labels = batch(6)
    strided = logits.T.contiguous().T
    torch.testing.assert_close(ldr_loss(strided, labels), ldr_loss(logits, labels), **close)
    logits[0, 0] = math.nan
    for t in (0.0, 1.0, INF):
        for top_k in (1, 2, 5):
            assert ldr_loss(logits, labels, temperature=t, top_k=top_k).isnan()


@pytest.mark.parametrize("top_k", [1, 2])
def test_torch_func_and_compile_see_the_same_loss(top_k):
    logits, labels = batch(7)

    def loss(z, y):
        return ldr_loss(z, y, temperature=0.7, top_k=top_k)

    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, labels), loss(logits, labels), **close)
    each = torch.func.vmap(lambda z, y: loss(z.unsqueeze(0), y.unsqueeze(0)))(logits, labels)
    torch.testing.assert_close(each.mean(), loss(logits, labels), **close)


@quick
@given(seeds, st.floats(0.01, 30))
def test_normalised_rows_have_mean_one_and_softplus_is_its_definition(seed, scale):
    logits, _ = batch(seed, scale=scale)
    soft = normalize_logits(logits)
    ones = torch.ones(6, dtype=torch.float64)
    torch.testing.assert_close(soft.mean(-1), ones, **close)
    plain = functional.softplus(logits)
    torch.testing.assert_close(soft, plain / plain.mean(-1, keepdim=True), rtol=1e-9, atol=1e-12)
    signed = normalize_logits(logits, kind="l1")
    torch.testing.assert_close(signed.abs().mean(-1), ones, **close)
    torch.testing.assert_close(normalize_logits(7 * logits, kind="l1"), signed, rtol=0, atol=1e-10)


def test_normalisation_is_finite_where_softplus_underflows_and_for_zero_rows():
    logits = torch.tensor([[-1e4, -1e4 - 1, -2e4], [1e4, 0.0, -1e4]], requires_grad=True)
    soft = normalize_logits(logits)
    soft.square().sum().backward()
    assert logits.grad.isfinite().all()
    torch.testing.assert_close(soft.mean(-1), torch.ones(2))
    torch.testing.assert_close(
        soft[0, 1] / soft[0, 0], torch.tensor(math.exp(-1)), rtol=1e-3, atol=0
    )
    zero = torch.zeros(1, 3, requires_grad=True)
    normalize_logits(zero, kind="l1").sum().backward()
    assert zero.grad.isfinite().all()
    for kind in ("softplus", "l1"):
        leaf = batch(8, rows=2)[0].requires_grad_()
        assert torch.autograd.gradcheck(lambda z, k=kind: normalize_logits(z, kind=k), (leaf,))
        assert normalize_logits(leaf.half(), kind=kind).dtype == torch.float16


def test_without_normalisation_a_network_can_undo_the_temperature():
    logits, labels = batch(9)
    plain = ldr_loss(logits, labels, margin=0.0)
    undone = ldr_loss(10 * logits, labels, temperature=10.0, margin=0.0)
    torch.testing.assert_close(undone, 10 * plain, **close)
    a, b = (normalize_logits(scale * logits, kind="l1") for scale in (1.0, 10.0))
    torch.testing.assert_close(ldr_loss(a, labels), ldr_loss(b, labels), **close)


Z, Y = torch.zeros(3, 4), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: ldr_loss(Z[0], Y), ValueError, "logits"),
        (lambda: ldr_loss(Z[:0], Y[:0]), ValueError, "logits"),
        (lambda: ldr_loss(Z[:, :1], Y * 0), ValueError, "logits"),
        (lambda: ldr_loss(Z.long(), Y), TypeError, "logits"),
        (lambda: ldr_loss(Z, Y[:2]), ValueError, "labels"),
        (lambda: ldr_loss(Z, Y.float()), TypeError, "labels"),
        (lambda: ldr_loss(Z, Y + 2), ValueError, "labels"),
        (lambda: ldr_loss(Z, Y - 1), ValueError, "labels"),
        (lambda: ldr_loss(Z, Y, temperature=-1.0), ValueError, "temperature"),
        (lambda: ldr_loss(Z, Y, temperature=math.nan), ValueError, "temperature"),
        (lambda: ldr_loss(Z, Y, temperature="1"), TypeError, "temperature"),
        (lambda: ldr_loss(Z, Y, margin=-0.1), ValueError, "margin"),
        (lambda: ldr_loss(Z, Y, top_k=0), ValueError, "top_k"),
        (lambda: ldr_loss(Z, Y, top_k=5), ValueError, "top_k"),
        (lambda: ldr_weights(Z, Y, top_k=1.5), TypeError, "top_k"),
        (lambda: ldr_loss(Z, Y, mask=Z), ValueError, "mask"),
        (lambda: ldr_loss(Z, Y, reduction="x"), ValueError, "reduction"),
        (lambda: normalize_logits(Z, kind="x"), ValueError, "kind"),
        (lambda: normalize_logits(Y), TypeError, "logits"),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()
