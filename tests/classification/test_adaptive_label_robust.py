"""ALDR against a dense search over the temperature, and its theorems."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from steelyard.classification import (
    ALDRState,
    aldr_loss,
    aldr_temperature,
    ldr_loss,
    ldr_weights,
)

quick = settings(deadline=None, max_examples=20)
seeds = st.integers(0, 2**31)
alphas = st.sampled_from([1.0001, 1.05, 1.5, 2.0, 10.0, 1000.0])
close = {"rtol": 0, "atol": 1e-11}


def batch(seed: int, rows: int = 6, classes: int = 7):
    """Logits of rows on scales from 0.1 to 1000."""
    g = torch.Generator().manual_seed(seed)
    scale = 10 ** (4 * torch.rand(rows, 1, generator=g, dtype=torch.float64) - 1)
    logits = scale * torch.randn(rows, classes, generator=g, dtype=torch.float64)
    return logits, torch.randint(0, classes, (rows,), generator=g)


def gaps(logits, labels, margin):
    rows = range(len(labels))
    plain = logits - logits[rows, labels].unsqueeze(1) + margin
    plain[rows, labels] = 0.0
    return plain


def objective(delta, t, initial, alpha):
    """The objective at temperatures ``t [..]`` with the best weights, by its definition."""
    classes = delta.shape[-1]
    psi = t * ((delta / t.unsqueeze(-1)).logsumexp(-1) - math.log(classes))
    return psi - alpha * math.log(classes) / (2 * initial) * (t - initial) ** 2


def divergence(p):
    return torch.special.xlogy(p, p.shape[-1] * p).sum(-1)


def dense(initial, alpha, points=4001):
    return torch.linspace(initial * (1 - 1 / alpha), initial, points, dtype=torch.float64)[1:]


@quick
@given(seeds, alphas, st.floats(0.1, 20))
def test_no_temperature_on_a_dense_grid_does_better(seed, alpha, initial):
    logits, labels = batch(seed)
    setting = {"initial_temperature": initial, "alpha": alpha}
    value = aldr_loss(logits, labels, reduction="none", **setting)
    delta = gaps(logits, labels, 0.1)
    grid = dense(initial, alpha).unsqueeze(1)
    best = objective(delta, grid.expand(-1, 6), initial, alpha).amax(0)
    scale = 1 + delta.abs().amax(-1)
    assert (value >= best - 1e-11 * scale).all()
    best_t = aldr_temperature(logits, labels, **setting)
    reached = objective(delta, best_t, initial, alpha)
    torch.testing.assert_close(value, reached, rtol=1e-11, atol=1e-9)


@quick
@given(seeds, alphas, st.floats(0.1, 20))
def test_the_temperature_is_the_fixed_point_and_in_its_interval(seed, alpha, initial):
    logits, labels = batch(seed)
    t = aldr_temperature(logits, labels, initial_temperature=initial, alpha=alpha)
    p = (gaps(logits, labels, 0.1) / t.unsqueeze(1)).softmax(-1)
    expected = initial * (1 - divergence(p) / (alpha * math.log(7)))
    torch.testing.assert_close(t, expected, rtol=1e-9, atol=1e-10)
    assert (t >= initial * (1 - 1 / alpha) - 1e-12).all()
    assert (t <= initial).all()


@pytest.mark.parametrize(("alpha", "low", "high"), [(1.2, 2.0, 5.2), (2.0, 5.2, 5.55)])
def test_of_several_stationary_points_the_best_is_found(alpha, low, high):
    """One wrong class among 1000: as its gap grows the maximum jumps between two temperatures."""
    gap = torch.linspace(low, high, 40, dtype=torch.float64)
    logits = torch.zeros(40, 1000, dtype=torch.float64)
    logits[:, 1] = gap
    labels = torch.zeros(40, dtype=torch.long)
    setting = {"initial_temperature": 1.0, "alpha": alpha, "margin": 0.0}
    grid = torch.linspace(1 - 1 / alpha, 1.0, 4001, dtype=torch.float64).unsqueeze(1)
    # Two levels: exp(gap/t) once and 1 for the 999 other classes.
    share = (gap - math.log(999) * grid) / grid
    table = grid * (functional.softplus(share) + math.log(999 / 1000))
    table = table - alpha * math.log(1000) / 2 * (grid - 1) ** 2
    rises = table.diff(dim=0) > 0
    peaks = (rises[:-1] & ~rises[1:]).sum(0) + ~rises[0]
    assert (peaks > 1).sum() > 10
    value = aldr_loss(logits, labels, reduction="none", **setting)
    assert (value >= table.amax(0) - 1e-12).all()
    found = aldr_temperature(logits, labels, **setting)
    torch.testing.assert_close(found, grid[table.argmax(0), 0], rtol=0, atol=2e-3)
    jump = found[peaks > 1]
    assert jump.max() - jump.min() > 0.05


@quick
@given(seeds, alphas, st.floats(0.1, 20))
def test_the_loss_lies_between_those_of_the_two_end_temperatures(seed, alpha, initial):
    logits, labels = batch(seed)
    value = aldr_loss(logits, labels, initial_temperature=initial, alpha=alpha, reduction="none")
    low = ldr_loss(logits, labels, temperature=initial, reduction="none")
    high = ldr_loss(logits, labels, temperature=initial * (1 - 1 / alpha), reduction="none")
    tiny = 1e-12 * (1 + value.abs())
    assert (value >= low - tiny).all()
    assert (value <= high + tiny).all()


def test_a_stiff_temperature_gives_the_plain_loss():
    logits, labels = batch(1)
    got = aldr_loss(logits, labels, initial_temperature=2.0, alpha=1e12, reduction="none")
    expected = ldr_loss(logits, labels, temperature=2.0, reduction="none")
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@quick
@given(seeds, alphas)
def test_the_gradient_is_the_weights_at_that_temperature_less_the_label(seed, alpha):
    logits, labels = batch(seed)
    logits.requires_grad_()
    aldr_loss(logits, labels, alpha=alpha, initial_temperature=3.0, reduction="sum").backward()
    t = aldr_temperature(logits, labels, alpha=alpha, initial_temperature=3.0)
    assert not t.requires_grad
    for row in range(6):
        one = slice(row, row + 1)
        weights = ldr_weights(logits[one], labels[one], temperature=float(t[row]))
        expected = weights - functional.one_hot(labels[one], 7)
        torch.testing.assert_close(logits.grad[one], expected, **close)


def test_gradcheck_though_the_temperature_is_held_constant():
    """At the maximum the slope in the temperature is 0, so finite differences agree."""
    logits, labels = batch(2)
    logits = (logits / logits.abs().amax(-1, keepdim=True) * 5).requires_grad_()
    for alpha in (1.2, 2.0):
        assert torch.autograd.gradcheck(
            lambda z, a=alpha: aldr_loss(z, labels, initial_temperature=1.0, alpha=a), (logits,)
        )


@quick
@given(seeds, st.floats(-50, 50))
def test_constant_gaps_keep_the_initial_temperature_and_cost_nothing(seed, level):
    logits = torch.full((3, 5), level, dtype=torch.float64)
    labels = torch.tensor([0, 2, 4])
    t = aldr_temperature(logits, labels, margin=0.0)
    torch.testing.assert_close(t, torch.full((3,), 10.0).double(), **close)
    assert aldr_loss(logits, labels, margin=0.0).abs() < 1e-12


@quick
@given(seeds, st.sampled_from([1.05, 2.0]))
def test_alternating_steps_never_lower_the_objective_and_end_at_a_fixed_point(seed, alpha):
    logits, labels = batch(seed)
    state = ALDRState(9, initial_temperature=3.0, alpha=alpha, margin_in_weights=True)
    index = torch.tensor([8, 1, 5, 0, 3, 2])
    values = [state(logits, labels, index, reduction="none") for _ in range(60)]
    for before, after in itertools.pairwise(values):
        assert (after >= before - 1e-11 * (1 + before.abs())).all()
    best = aldr_loss(logits, labels, initial_temperature=3.0, alpha=alpha, reduction="none")
    assert (values[-1] <= best + 1e-10 * (1 + best.abs())).all()
    if alpha == 2.0:  # near 1 the steps may be short
        t = state.temperatures[index]
        p = (gaps(logits, labels, 0.1) / t.unsqueeze(1)).softmax(-1)
        expected = 3.0 * (1 - divergence(p) / (alpha * math.log(7)))
        torch.testing.assert_close(t, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("margin_in_weights", [False, True])
def test_one_step_of_the_state_is_the_formula(margin_in_weights):
    logits, labels = batch(3)
    logits.requires_grad_()
    state = ALDRState(10, initial_temperature=2.0, alpha=3.0, margin_in_weights=margin_in_weights)
    index = torch.tensor([9, 0, 4, 5, 6, 7])
    stored = torch.linspace(1.4, 2.0, 10, dtype=torch.float64)
    state.temperatures.copy_(stored)
    got = state(logits, labels, index, reduction="none")
    delta = gaps(logits.detach(), labels, 0.1)
    scores = delta if margin_in_weights else logits.detach()
    p = (scores / stored[index].unsqueeze(1)).softmax(-1)
    new = 2.0 * (1 - divergence(p) / (3.0 * math.log(7)))
    torch.testing.assert_close(state.temperatures[index], new, **close)
    untouched = [1, 2, 3, 8]
    assert torch.equal(state.temperatures[untouched], stored[untouched])
    torch.testing.assert_close(got, objective(delta, new, 2.0, 3.0), rtol=1e-12, atol=1e-10)
    got.sum().backward()
    weights = (delta / new.unsqueeze(1)).softmax(-1)
    torch.testing.assert_close(logits.grad, weights - functional.one_hot(labels, 7), **close)
    assert not state.temperatures.requires_grad


def test_the_margin_in_the_weights_changes_the_temperature():
    logits, labels = torch.tensor([[0.0, 1.0, 0.5]]), torch.tensor([0])
    states = [
        ALDRState(1, initial_temperature=1.0, margin=1.0, margin_in_weights=inside)
        for inside in (False, True)
    ]
    for state in states:
        state(logits, labels, torch.tensor([0]))
    assert (states[0].temperatures - states[1].temperatures).abs() > 0.01


def test_flipped_items_end_with_other_temperatures_than_clean_ones():
    """Contradicted and confirmed labels differ by the margin only if it is in the weights."""
    logits = torch.tensor([[4.0, 0.0, 0.0], [4.0, 0.0, 0.0]])
    labels = torch.tensor([0, 1])
    setting = {"initial_temperature": 1.0, "margin": 1.0}
    clean, flipped = aldr_temperature(logits, labels, **setting)
    assert flipped < clean


def test_temperatures_are_in_the_state_dict_and_resume():
    logits, labels = batch(4)
    index = torch.arange(6)
    first = ALDRState(6)
    first(logits, labels, index)
    second = ALDRState(6)
    second.load_state_dict(first.state_dict())
    again = [state(2 * logits, labels, index) for state in (first, second)]
    assert torch.equal(again[0], again[1])
    assert torch.equal(first.temperatures, second.temperatures)


def test_masked_rows_do_not_count_and_keep_their_temperature():
    logits, labels = batch(5)
    mask = torch.tensor([1, 0, 1, 1, 0, 1])
    dirty, ignored = logits.clone(), labels.clone()
    dirty[mask == 0], ignored[mask == 0] = math.nan, -100
    dirty.requires_grad_()
    kept = mask == 1
    got = aldr_loss(dirty, ignored, mask=mask)
    torch.testing.assert_close(got, aldr_loss(logits[kept], labels[kept]), **close)
    for inside in (False, True):
        state = ALDRState(6, margin_in_weights=inside)
        twin = ALDRState(6, margin_in_weights=inside)
        got = state(dirty, ignored, torch.arange(6), mask=mask)
        expected = twin(logits[kept], labels[kept], torch.arange(6)[kept])
        torch.testing.assert_close(got, expected, **close)
        assert (state.temperatures[mask == 0] == 10).all()
        [slope] = torch.autograd.grad(got, dirty)
        assert (slope[mask == 0] == 0).all()
        assert slope.isfinite().all()
        nothing = state(dirty, ignored, torch.arange(6), mask=torch.zeros(6))
        assert nothing == 0
        assert (torch.autograd.grad(nothing, dirty)[0] == 0).all()
    nothing = aldr_loss(dirty, ignored, mask=torch.zeros(6))
    assert nothing == 0
    assert (torch.autograd.grad(nothing, dirty)[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_stay_finite_and_close_to_float64(dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0, 5.0], [0.0, 0.0, 0.0, 0.0], [3.0, 1.0, -2.0, 0.5]])
    logits = logits.to(dtype).requires_grad_()
    labels = torch.tensor([1, 2, 0])
    error = max(torch.finfo(dtype).eps, 3e-6)
    for initial, alpha in ((0.1, 1.01), (10.0, 2.0), (1e3, 50.0)):
        setting = {"initial_temperature": initial, "alpha": alpha}
        got = aldr_loss(logits, labels, reduction="none", **setting)
        temperature = aldr_temperature(logits, labels, **setting)
        assert got.dtype == temperature.dtype == dtype
        [slope] = torch.autograd.grad(got.sum(), logits)
        assert slope.isfinite().all()
        exact = aldr_loss(logits.detach().double(), labels, reduction="none", **setting)
        torch.testing.assert_close(got.detach().double(), exact, rtol=error, atol=error)
        state = ALDRState(3, **setting)
        assert state(logits, labels, torch.arange(3)).isfinite()


def test_nan_comes_through_and_strided_logits_are_the_same():
    logits, labels = batch(6)
    strided = logits.T.contiguous().T
    torch.testing.assert_close(aldr_loss(strided, labels), aldr_loss(logits, labels), **close)
    logits[0, 0] = math.nan
    each = aldr_loss(logits, labels, reduction="none")
    assert each.isnan().tolist() == [True] + [False] * 5


def test_torch_func_and_compile_see_the_same_loss():
    logits, labels = batch(7, rows=3)
    compiled = torch.compile(aldr_loss, backend="eager", fullgraph=True)
    expected = aldr_loss(logits, labels)
    torch.testing.assert_close(compiled(logits, labels), expected, **close)
    each = torch.func.vmap(lambda z, y: aldr_loss(z.unsqueeze(0), y.unsqueeze(0)))(logits, labels)
    torch.testing.assert_close(each.mean(), expected, **close)


Z, Y = torch.zeros(3, 4), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: aldr_loss(Z[0], Y), ValueError, "logits"),
        (lambda: aldr_loss(Z[:0], Y[:0]), ValueError, "logits"),
        (lambda: aldr_loss(Z, Y + 2), ValueError, "labels"),
        (lambda: aldr_loss(Z, Y.float()), TypeError, "labels"),
        (lambda: aldr_loss(Z, Y, alpha=1.0), ValueError, "alpha"),
        (lambda: aldr_loss(Z, Y, initial_temperature=0.0), ValueError, "initial_temperature"),
        (lambda: aldr_loss(Z, Y, margin=-1.0), ValueError, "margin"),
        (lambda: aldr_temperature(Z, Y, alpha=0.5), ValueError, "alpha"),
        (lambda: ALDRState(0), ValueError, "num_items"),
        (lambda: ALDRState(3, alpha=1.0), ValueError, "alpha"),
        (lambda: ALDRState(3, margin=-1.0), ValueError, "margin"),
        (lambda: ALDRState(3)(Z, Y, Y.float()), TypeError, "index"),
        (lambda: ALDRState(3)(Z, Y, Y + 1), ValueError, "index"),
        (lambda: ALDRState(3)(Z, Y, Y[:2]), ValueError, "index"),
        (lambda: ALDRState(3)(Z, Y), TypeError, "index"),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()
