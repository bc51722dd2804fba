"""The KL-robust objective, its tracker and the training step, against definitions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from steelyard.classification import (
    ScgdTracker,
    doubly_robust_step,
    kl_dro_value,
    kl_dro_weights,
    log_barrier_attack,
    pgd_attack,
)

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)
temperatures = st.floats(0.05, 50)
close = {"rtol": 0, "atol": 1e-12}
INF = float("inf")


def draw(seed: int, n: int = 7):
    g = torch.Generator().manual_seed(seed)
    return 3 * torch.rand(n, generator=g, dtype=torch.float64)


def dual(weights, losses, t):
    return (weights * losses).sum() - t * torch.special.xlogy(weights, len(losses) * weights).sum()


@quick
@given(seeds, temperatures)
def test_value_and_weights_are_the_closed_forms_without_a_duality_gap(seed, t):
    losses = draw(seed)
    value, weights = kl_dro_value(losses, t), kl_dro_weights(losses, t)
    torch.testing.assert_close(weights, (losses / t).softmax(0), **close)
    plain = t * ((losses / t).logsumexp(0) - math.log(7))
    torch.testing.assert_close(value, plain, rtol=0, atol=1e-11)
    torch.testing.assert_close(dual(weights, losses, t), value, rtol=0, atol=1e-11)


@pytest.mark.parametrize("t", [0.3, 2.0])
def test_a_general_solver_finds_no_better_weights(t):
    optimize = pytest.importorskip("scipy.optimize")
    losses = draw(1, 5)
    found = optimize.minimize(
        lambda w: -float(dual(torch.from_numpy(w), losses, t)),
        np.full(5, 0.2),
        bounds=[(1e-12, 1)] * 5,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-14},
    )
    assert -found.fun == pytest.approx(float(kl_dro_value(losses, t)), abs=1e-6)
    np.testing.assert_allclose(found.x, kl_dro_weights(losses, t), atol=1e-3)


@quick
@given(seeds, temperatures)
def test_the_gradient_in_the_losses_is_the_weights(seed, t):
    losses = draw(seed).requires_grad_()
    for temperature in (t, 0.0, INF):
        [slope] = torch.autograd.grad(kl_dro_value(losses, temperature), losses)
        weights = kl_dro_weights(losses, temperature)
        torch.testing.assert_close(slope, weights, **close)
        assert not weights.requires_grad
        torch.testing.assert_close(weights.sum(), torch.tensor(1.0).double(), **close)
    assert torch.autograd.gradcheck(lambda v: kl_dro_value(v, t), (losses,))


@quick
@given(seeds, temperatures)
def test_bounds_limits_and_monotonicity_in_the_temperature(seed, t):
    losses = draw(seed)
    value = kl_dro_value(losses, t)
    assert losses.mean() - 1e-12 <= value <= losses.max() + 1e-12
    assert value >= losses.max() - t * math.log(7) - 1e-12
    assert kl_dro_value(losses, 1.5 * t) <= value + 1e-12
    torch.testing.assert_close(kl_dro_value(losses, 0.0), losses.max(), **close)
    torch.testing.assert_close(kl_dro_value(losses, INF), losses.mean(), **close)
    torch.testing.assert_close(kl_dro_value(losses, 1e-9), losses.max(), rtol=0, atol=1e-7)
    expansion = losses.mean() + losses.var(correction=0) / 2e8
    torch.testing.assert_close(kl_dro_value(losses, 1e8), expansion, rtol=0, atol=1e-14)


@quick
@given(seeds, temperatures, st.floats(-5, 5))
def test_a_constant_shifts_the_value_and_duplication_does_nothing(seed, t, shift):
    losses = draw(seed)
    value, weights = kl_dro_value(losses, t), kl_dro_weights(losses, t)
    torch.testing.assert_close(kl_dro_value(losses + shift, t), value + shift, rtol=0, atol=1e-11)
    torch.testing.assert_close(kl_dro_weights(losses + shift, t), weights, rtol=0, atol=1e-11)
    torch.testing.assert_close(kl_dro_value(losses.repeat(3), t), value, rtol=0, atol=1e-11)
    equal = kl_dro_weights(torch.full((4,), shift), t)
    torch.testing.assert_close(equal, torch.full((4,), 0.25))


def test_masked_losses_get_no_weight_and_nothing_kept_is_zero():
    losses = draw(2)
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 0])
    dirty = losses.clone()
    dirty[mask == 0] = math.nan
    dirty.requires_grad_()
    for t in (0.0, 0.5, 1e5, INF):
        value = kl_dro_value(dirty, t, mask=mask)
        torch.testing.assert_close(value, kl_dro_value(losses[mask == 1], t), **close)
        weights = kl_dro_weights(dirty, t, mask=mask)
        torch.testing.assert_close(
            weights[mask == 1], kl_dro_weights(losses[mask == 1], t), **close
        )
        assert (weights[mask == 0] == 0).all()
        [slope] = torch.autograd.grad(value, dirty)
        torch.testing.assert_close(slope, weights, **close)
        nothing = kl_dro_value(dirty, t, mask=torch.zeros(7))
        assert nothing == 0
        assert (torch.autograd.grad(nothing, dirty)[0] == 0).all()
        assert (kl_dro_weights(dirty, t, mask=torch.zeros(7)) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_losses_and_small_temperatures_stay_finite(dtype):
    losses = torch.tensor([1e4, 0.0, 9e3], dtype=dtype)
    for t in (1e-30, 1e-3, 1.0, 1e30):
        value, weights = kl_dro_value(losses, t), kl_dro_weights(losses, t)
        assert value.dtype == weights.dtype == dtype
        assert value.isfinite()
        exact = kl_dro_value(losses.double(), t)
        torch.testing.assert_close(
            value.double(), exact, rtol=max(torch.finfo(dtype).eps, 1e-6), atol=0
        )
        assert weights.isfinite().all()
    torch.testing.assert_close(kl_dro_value(losses[:1], 0.5), losses[0])


def test_nan_comes_through():
    losses = torch.tensor([1.0, math.nan])
    for t in (0.0, 1.0, INF):
        assert kl_dro_value(losses, t).isnan()
    assert kl_dro_weights(losses, 1.0).isnan().any()


def test_torch_func_and_compile_see_the_same_value():
    losses = draw(3)
    compiled = torch.compile(lambda v: kl_dro_value(v, 0.7), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(losses), kl_dro_value(losses, 0.7), **close)
    rows = torch.stack((losses, 2 * losses))
    mapped = torch.func.vmap(lambda v: kl_dro_value(v, 0.7))(rows)
    torch.testing.assert_close(mapped[1], kl_dro_value(2 * losses, 0.7), **close)


@quick
@given(seeds, st.floats(0.1, 5), st.floats(0.05, 1))
def test_the_tracker_is_the_moving_mean_of_the_exponentials(seed, t, eta):
    tracker = ScgdTracker(eta, t)
    assert tracker.log_value.dtype == torch.float64
    u = None
    for step in range(4):
        losses = draw(seed + step)
        g = (losses / t).exp().mean()
        u = g if u is None else (1 - eta) * u + eta * g
        weights = tracker.update(losses.requires_grad_())
        torch.testing.assert_close(weights, (losses.detach() / t).exp() / u, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(tracker.log_value, u.log(), rtol=0, atol=1e-10)
        assert not weights.requires_grad


@quick
@given(seeds, st.floats(0.1, 5))
def test_eta_one_is_the_softmax_of_the_batch(seed, t):
    tracker = ScgdTracker(1.0, t)
    for step in range(2):
        losses = draw(seed + step)
        expected = kl_dro_weights(losses, t)
        torch.testing.assert_close(tracker.update(losses) / 7, expected, rtol=0, atol=1e-11)
        value = t * tracker.log_value
        torch.testing.assert_close(value, kl_dro_value(losses, t), rtol=0, atol=1e-11)


@quick
@given(seeds, st.floats(0.3, 5), st.floats(0.05, 1))
def test_the_corrected_tracker_follows_the_formula_and_a_full_batch_exactly(seed, t, eta):
    tracker = ScgdTracker(eta, t)
    before = draw(seed)
    tracker.update(before)
    for step in range(1, 4):
        after = before + 0.1 * draw(seed + step)
        tracker.update(after, previous_losses=before)
        exact = (after / t).exp().mean()
        torch.testing.assert_close(tracker.log_value, exact.log(), rtol=0, atol=1e-9)
        before = after
    u, old, new = tracker.log_value.exp(), draw(seed + 7), draw(seed + 8)
    g_old, g_new = (old / t).exp().mean(), (new / t).exp().mean()
    expected = torch.maximum((1 - eta) * (u - g_old) + g_new, eta * g_new)
    tracker.update(new, previous_losses=old)
    torch.testing.assert_close(tracker.log_value.exp(), expected, rtol=1e-8, atol=0)


def test_the_tracker_does_not_overflow_resumes_and_skips_masked_items():
    tracker = ScgdTracker(0.3, 1e-3)
    weights = tracker.update(torch.tensor([1e4, 0.0]))
    torch.testing.assert_close(weights, torch.tensor([2.0, 0.0]))
    assert tracker.update(torch.tensor([1e4, 1e4])).isfinite().all()
    twin = ScgdTracker(0.3, 1e-3)
    twin.load_state_dict(tracker.state_dict())
    losses, mask = torch.tensor([5.0, math.nan, 6.0]), torch.tensor([1, 0, 1])
    masked = tracker.update(losses, mask=mask)
    plain = twin.update(losses[mask == 1])
    torch.testing.assert_close(masked[mask == 1], plain)
    assert masked[1] == 0
    assert torch.equal(tracker.log_value, twin.log_value)
    assert (tracker.update(losses, mask=torch.zeros(3)) == 0).all()
    assert torch.equal(tracker.log_value, twin.log_value)


def test_a_batch_softmax_is_biased_and_the_tracker_is_not():
    """Batches of 1 of two items: the softmax gives all weight 1, the tracker their ratio.

    500 alternating updates from near the fixed point, no randomness.
    """
    losses = torch.tensor([0.0, 2.0], dtype=torch.float64)
    tracker = ScgdTracker(0.01, 1.0)
    tracker.log_value.copy_(kl_dro_value(losses, 1.0))
    weights = [tracker.update(losses[i % 2 : i % 2 + 1]) for i in range(500)]
    found = torch.cat(weights[-2:])
    torch.testing.assert_close(found / 2, kl_dro_weights(losses, 1.0), rtol=0.02, atol=0)
    assert kl_dro_weights(losses[:1], 1.0) == 1


def problem(seed: int):
    g = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Tanh(), torch.nn.Linear(6, 3)
    ).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype))
    x = torch.rand(5, 4, generator=g, dtype=torch.float64)
    return model, x, torch.tensor([0, 1, 2, 0, 1])


@pytest.mark.parametrize("tracked", [False, True])
def test_a_step_descends_the_weighted_loss_at_the_attacked_inputs(tracked):
    model, x, y = problem(0)
    model.eval()
    twin = problem(0)[0].eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    tracker = ScgdTracker(0.4, 0.5) if tracked else None
    if tracker is not None:
        tracker.log_value.fill_(1.0)
    kept = []

    def attack(model, x, y):
        kept.append(
            pgd_attack(model, x, y, epsilon=0.1, step_size=0.05, steps=3, random_start=False)
        )
        return kept[0]

    step = doubly_robust_step(
        model, optimizer, x, y, attack=attack, temperature=0.5, tracker=tracker
    )
    losses = functional.cross_entropy(twin(kept[0]), y, reduction="none")
    if tracked:
        u = 0.6 * math.e + 0.4 * (losses.detach() / 0.5).exp().mean()
        weights, value = (losses.detach() / 0.5).exp() / u / 5, 0.5 * u.log()
    else:
        weights, value = kl_dro_weights(losses, 0.5), kl_dro_value(losses.detach(), 0.5)
    torch.testing.assert_close(step.weights, weights, rtol=0, atol=1e-10)
    torch.testing.assert_close(step.value, value, rtol=0, atol=1e-10)
    torch.testing.assert_close(step.losses, losses.detach(), **close)
    assert not any(result.requires_grad for result in step)
    (weights * losses).sum().backward()
    for ours, reference in zip(model.parameters(), twin.parameters(), strict=True):
        expected = reference.detach() - 0.05 * reference.grad
        torch.testing.assert_close(ours.detach(), expected, rtol=0, atol=1e-10)


def test_repeated_steps_lower_the_value_and_the_worst_item_gets_the_most_weight():
    model, x, y = problem(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def attack(model, x, y):
        return log_barrier_attack(
            model, x, y, epsilon=0.05, barrier=1e-3, steps=5, step_size=0.1, implicit="diagonal"
        )

    steps = [doubly_robust_step(model, optimizer, x, y, attack=attack) for _ in range(30)]
    assert steps[-1].value < 0.8 * steps[0].value
    for step in steps:
        assert step.weights.argmax() == step.losses.argmax()


def test_a_loss_of_the_users_must_be_per_item():
    model, x, y = problem(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    settings_ = {"attack": lambda model, x, y: x}
    step = doubly_robust_step(
        model, optimizer, x, y.double(), loss=lambda z, y: (z[:, 0] - y).square(), **settings_
    )
    assert step.losses.shape == (5,)
    with pytest.raises(ValueError, match="loss"):
        doubly_robust_step(model, optimizer, x, y, loss=functional.cross_entropy, **settings_)


L = torch.ones(3)


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: kl_dro_value(L[:0], 1.0), ValueError, "losses"),
        (lambda: kl_dro_value(L[:, None], 1.0), ValueError, "losses"),
        (lambda: kl_dro_value(L.long(), 1.0), TypeError, "losses"),
        (lambda: kl_dro_value(L, -1.0), ValueError, "temperature"),
        (lambda: kl_dro_weights(L, math.nan), ValueError, "temperature"),
        (lambda: kl_dro_weights(L, L), TypeError, "temperature"),
        (lambda: kl_dro_weights(L, 1.0, mask=L[:2]), ValueError, "mask"),
        (lambda: ScgdTracker(0.0, 1.0), ValueError, "eta"),
        (lambda: ScgdTracker(1.1, 1.0), ValueError, "eta"),
        (lambda: ScgdTracker(0.5, 0.0), ValueError, "temperature"),
        (lambda: ScgdTracker(0.5, INF), ValueError, "temperature"),
        (lambda: ScgdTracker(0.5, 1.0).update(L[:0]), ValueError, "losses"),
        (
            lambda: ScgdTracker(0.5, 1.0).update(L, previous_losses=L[:2]),
            ValueError,
            "previous_losses",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()
