"""Error vectors against closed forms, autograd through the fixed point, and the Cayley identity."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steelyard.equilibrium import (
    EquilibriumNetwork,
    dsilu,
    error_vector,
    feedback_angle,
    fixed_point,
    holomorphic_sigmoid,
    homeostatic_loss,
    relax,
    rotated_feedback,
    symmetry_measure,
)

CHECK = settings(deadline=None, max_examples=15)
seeds = st.integers(0, 10_000)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def system(seed: int, n: int = 4, *, symmetric: bool = False, strength: float = 0.25):
    """A field, its loss gradient in activities, and its fixed point."""
    weight, drive, target = (
        strength * randn(n, n, seed=seed),
        randn(n, seed=seed + 1),
        randn(n, seed=seed + 2),
    )
    if symmetric:
        weight = (weight + weight.T) / 2

    def field(u):
        return holomorphic_sigmoid(u) @ weight.to(u.dtype).T + drive - u

    def loss_gradient(r):
        return r - target

    return (
        field,
        loss_gradient,
        fixed_point(field, torch.zeros(n, dtype=torch.float64)),
        weight,
        target,
    )


# ---- fixed points ---------------------------------------------------------------------------


def test_newton_and_relaxation_find_the_same_point():
    field, _, u, *_ = system(0)
    assert field(u).abs().max() < 1e-12
    torch.testing.assert_close(
        relax(field, torch.zeros(4, dtype=torch.float64), rate=0.5, tolerance=1e-11), u
    )


def test_newton_solves_rows_apart_and_complex_states():
    roots = fixed_point(
        lambda u: u**2 - torch.tensor([[1.0], [4.0]], dtype=torch.float64),
        torch.full((2, 1), 9.0, dtype=torch.float64),
    )
    torch.testing.assert_close(roots.flatten(), torch.tensor([1.0, 2.0], dtype=torch.float64))
    found = fixed_point(lambda u: u**2 + 1, torch.tensor([0.3 + 1.5j], dtype=torch.complex128))
    torch.testing.assert_close(found, torch.tensor([1j], dtype=torch.complex128))


def test_newton_halves_steps_that_would_overshoot():
    found = fixed_point(torch.atan, torch.tensor([3.0], dtype=torch.float64))  # diverges undamped
    assert found.abs().item() < 1e-12


def test_float32_stops_where_rounding_does():
    u = fixed_point(lambda u: holomorphic_sigmoid(u) * 3 + 1e3 - u, torch.zeros(3))
    assert u.dtype == torch.float32
    torch.testing.assert_close(u, torch.full((3,), 1003.0))


def test_solvers_say_when_they_fail():
    with pytest.raises(RuntimeError, match="no fixed point"):
        fixed_point(lambda u: u**2 + 1, torch.ones(1, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="no rest"):
        relax(lambda u: -3 * u, torch.ones(1), max_iterations=20)
    with pytest.raises(ValueError, match="keep the shape"):
        fixed_point(lambda u: u[:1], torch.ones(2))
    with pytest.raises(ValueError, match="start must not be empty"):
        fixed_point(lambda u: u, torch.ones(0))
    with pytest.raises(TypeError, match="floating or complex"):
        fixed_point(lambda u: u, torch.ones(2, dtype=torch.long))


# ---- error vectors --------------------------------------------------------------------------


@CHECK
@given(seed=seeds, activity=st.booleans())
def test_symmetric_systems_have_equal_error_vectors(seed, activity):
    field, loss_gradient, u, *_ = system(seed, symmetric=True)
    if not activity:  # symmetric in the state: a linear field
        weight = system(seed, symmetric=True)[3]
        drive = randn(4, seed=seed + 1)
        field = lambda s: s @ weight.to(s.dtype) - 2 * s + drive  # noqa: E731
        u = torch.linalg.solve(2 * torch.eye(4, dtype=torch.float64) - weight, drive)
    settings_ = {"activation": holomorphic_sigmoid if activity else None}
    v = error_vector(field, loss_gradient, u, **settings_)
    torch.testing.assert_close(
        v, error_vector(field, loss_gradient, u, method="backprop", **settings_)
    )


@CHECK
@given(seed=seeds)
def test_backprop_vector_gives_the_derivative_through_resolved_fixed_points(seed):
    n = 3
    weight, drive, target = (
        0.25 * randn(n, n, seed=seed),
        randn(n, seed=seed + 1),
        randn(n, seed=seed + 2),
    )

    def rest(bias):
        return fixed_point(
            lambda u: holomorphic_sigmoid(u) @ weight.T + bias - u,
            torch.zeros(n, dtype=torch.float64),
        )

    def loss(bias):
        return (holomorphic_sigmoid(rest(bias)) - target).square().sum() / 2

    u = rest(drive)
    delta = error_vector(
        lambda s: holomorphic_sigmoid(s) @ weight.T + drive - s,
        lambda r: r - target,
        u,
        method="backprop",
        activation=holomorphic_sigmoid,
    )
    step = 1e-5
    for i in range(n):
        shift = torch.zeros(n, dtype=torch.float64)
        shift[i] = step
        slope = (loss(drive + shift) - loss(drive - shift)) / (2 * step)
        assert delta[i].item() == pytest.approx(slope.item(), abs=1e-7)


@CHECK
@given(seed=seeds)
def test_exact_vector_is_how_the_point_moves_with_the_nudge(seed):
    field, loss_gradient, u, *_ = system(seed)
    step = 1e-5
    moved = [fixed_point(lambda s, b=b: field(s) + b * loss_gradient(s), u) for b in (step, -step)]
    torch.testing.assert_close(
        error_vector(field, loss_gradient, u),
        (moved[0] - moved[1]) / (2 * step),
        atol=1e-7,
        rtol=1e-6,
    )


@CHECK
@given(seed=seeds)
def test_cayley_identity_relates_the_two_vectors(seed):
    matrix, push = (
        randn(4, 4, seed=seed) - 4 * torch.eye(4, dtype=torch.float64),
        randn(4, seed=seed + 1),
    )
    field, gradient, zero = (
        (lambda u: u @ matrix.T),
        (lambda r: push),
        torch.zeros(4, dtype=torch.float64),
    )
    v, delta = (error_vector(field, gradient, zero, method=m) for m in ("exact", "backprop"))
    even, odd = (matrix + matrix.T) / 2, (matrix - matrix.T) / 2
    turn, eye = torch.linalg.solve(even, odd), torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(v, torch.linalg.solve(eye + turn, (eye - turn) @ delta))
    torch.testing.assert_close(v @ even @ v, delta @ even @ delta)


@pytest.mark.parametrize("a", [0.0, 0.5, 1.0, 2.0])
def test_in_two_dimensions_the_angle_is_that_of_the_skew_part(a):
    matrix = torch.tensor([[-1.0, a], [-a, -1.0]], dtype=torch.float64)
    field, gradient, zero = (
        (lambda u: u @ matrix.T),
        torch.ones_like,
        torch.zeros(2, dtype=torch.float64),
    )
    v, delta = (error_vector(field, gradient, zero, method=m) for m in ("exact", "backprop"))
    assert torch.cosine_similarity(v, delta, dim=0).item() == pytest.approx(
        (1 - a**2) / (1 + a**2), abs=1e-12
    )
    assert v.norm().item() == pytest.approx(delta.norm().item())


@pytest.mark.parametrize("points", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("beta", [0.05, 0.4])
def test_estimate_of_the_worked_example_is_known_in_closed_form(points, beta):
    b, y = torch.tensor([3.0], dtype=torch.float64), 1.0
    found = error_vector(
        lambda u: b - u, lambda r: r - y, b, method="cauchy", points=points, beta=beta
    )
    assert found.item() == pytest.approx(2 / (1 - beta**points), rel=1e-10)


@pytest.mark.parametrize("points", [1, 2, 4])
def test_error_of_the_estimate_falls_with_the_power_of_the_points(points):
    field, loss_gradient, u, *_ = system(3, strength=0.5)
    common = {"activation": holomorphic_sigmoid}
    exact = error_vector(field, loss_gradient, u, **common)
    errors = [
        (
            error_vector(
                field, loss_gradient, u, method="cauchy", points=points, beta=beta, **common
            )
            - exact
        ).norm()
        for beta in (0.04, 0.02)
    ]
    assert math.log2((errors[0] / errors[1]).item()) == pytest.approx(points, abs=0.3)


def test_two_point_estimate_does_not_see_the_sign_of_the_nudge():
    field, loss_gradient, u, *_ = system(1)
    plus = [fixed_point(lambda s, b=b: field(s) + b * loss_gradient(s), u) for b in (0.2, -0.2)]
    found = error_vector(field, loss_gradient, u, method="cauchy", points=2, beta=0.2)
    torch.testing.assert_close(found, (plus[0] - plus[1]) / 0.4)


def test_error_vector_refuses_a_state_that_moves_and_bad_numbers():
    field, loss_gradient, u, *_ = system(0)
    with pytest.raises(ValueError, match="u must be a fixed point"):
        error_vector(field, loss_gradient, u + 1)
    with pytest.raises(ValueError, match="method must be one of"):
        error_vector(field, loss_gradient, u, method="rbp")
    with pytest.raises(ValueError, match="points"):
        error_vector(field, loss_gradient, u, method="cauchy", points=0)
    with pytest.raises(ValueError, match="beta"):
        error_vector(field, loss_gradient, u, method="cauchy", beta=0.0)
    with pytest.raises(RuntimeError, match="nudged by"):
        error_vector(
            lambda s: -s,
            lambda r: r**2 + 1,
            torch.zeros(1, dtype=torch.float64),
            method="cauchy",
            beta=0.9,
        )


# ---- homeostasis ----------------------------------------------------------------------------


@CHECK
@given(seed=seeds)
def test_homeostatic_loss_sees_the_skew_part_only(seed):
    n = 4
    matrix, extra = randn(n, n, seed=seed), randn(n, n, seed=seed + 1)
    zero, axes = torch.zeros(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)

    def loss(m):
        return homeostatic_loss(
            lambda u: u @ m.T, zero, axes, reduction="sum"
        )  # the trace, exactly

    expected = (matrix - matrix.T).square().sum() / 2
    turned = torch.linalg.qr(extra)[0]
    torch.testing.assert_close(loss(matrix), expected)
    torch.testing.assert_close(loss(matrix + extra + extra.T), expected)
    torch.testing.assert_close(loss(turned.T @ matrix @ turned), expected)
    torch.testing.assert_close(
        loss(extra + extra.T), torch.zeros_like(expected), atol=1e-10, rtol=0
    )


def test_one_gradient_step_shrinks_the_skew_part_and_keeps_the_symmetric():
    weight = randn(4, 4).requires_grad_()
    zero, axes = torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    homeostatic_loss(lambda u: u @ weight.T - u, zero, axes, reduction="sum").backward()
    w = weight.detach()
    torch.testing.assert_close(weight.grad, 2 * (w - w.T))
    after = w - 0.1 * weight.grad
    torch.testing.assert_close(after - after.T, (1 - 4 * 0.1) * (w - w.T))
    torch.testing.assert_close(after + after.T, w + w.T)


def test_probes_estimate_the_trace_without_bias():
    # 20,000 probes; band of four standard errors from the variance formula: false alarm 6e-5.
    matrix = randn(5, 5)
    probes = randn(20_000, 5, seed=1)
    found = homeostatic_loss(lambda u: u @ matrix.T, torch.zeros(5, dtype=torch.float64), probes)
    inner = matrix.T @ matrix - matrix @ matrix
    spread = (2 * ((inner + inner.T) / 2).square().sum() / 20_000).sqrt()
    assert abs(found - (matrix - matrix.T).square().sum() / 2) < 4 * spread


def test_homeostatic_loss_normalises_reduces_and_passes_gradcheck():
    weight, probes, u = randn(3, 3).requires_grad_(), randn(2, 3, seed=1), randn(3, seed=2)

    def loss(w, **more):
        return homeostatic_loss(lambda s: holomorphic_sigmoid(s) @ w.T - s, u, probes, **more)

    assert torch.autograd.gradcheck(loss, (weight,))
    torch.testing.assert_close(loss(weight, normalize=True) * 3, loss(weight))
    torch.testing.assert_close(loss(weight, reduction="none").mean(), loss(weight))
    with pytest.raises(ValueError, match="probes must have shape"):
        homeostatic_loss(lambda s: s, u, randn(2, 4))
    with pytest.raises(ValueError, match="probes must not be empty"):
        homeostatic_loss(lambda s: s, u, randn(0, 3))


def test_symmetry_measure_and_feedback_angle_at_their_ends():
    forward, random = randn(4, 3), randn(3, 4, seed=1)
    assert feedback_angle(forward, rotated_feedback(forward, random, 0.0)).item() == pytest.approx(
        0.0, abs=1e-6
    )
    torch.testing.assert_close(rotated_feedback(forward, random, 90.0), random)
    orthogonal = random - (random * forward.T).sum() / forward.square().sum() * forward.T
    orthogonal = orthogonal * forward.norm() / orthogonal.norm()
    assert feedback_angle(
        forward, rotated_feedback(forward, orthogonal, 30.0)
    ).item() == pytest.approx(30.0)
    assert symmetry_measure(torch.zeros(2, 2)).item() == 1.0
    even, odd = forward[:3] + forward[:3].T, forward[:3] - forward[:3].T
    expected = even.norm() / (even.norm() + odd.norm())
    torch.testing.assert_close(symmetry_measure(forward[:3]), expected)
    with pytest.raises(ValueError, match="jacobian must have shape"):
        symmetry_measure(torch.ones(2, 3))


@pytest.mark.parametrize("activation", [holomorphic_sigmoid, dsilu])
def test_activations_are_holomorphic_and_finite(activation):
    z = torch.tensor([0.3 + 0.2j], dtype=torch.complex128)
    h = 1e-6
    along, across = (
        (activation(z + h) - activation(z - h)) / (2 * h),
        (activation(z + 1j * h) - activation(z - 1j * h)) / (2j * h),
    )
    torch.testing.assert_close(along, across, atol=1e-8, rtol=1e-8)
    assert activation(torch.tensor([-1e4, 1e4])).tolist() == pytest.approx([0.0, 1.0])
    assert torch.autograd.gradcheck(activation, (randn(4).requires_grad_(),))


# ---- network --------------------------------------------------------------------------------


def network(
    seed: int = 0, *, symmetric: bool = False, n: int = 5, strength: float = 0.3, mask=None
) -> EquilibriumNetwork:
    weight = strength * randn(n, n, seed=seed)
    if symmetric:
        weight = (weight + weight.T) / 2
    return EquilibriumNetwork(
        weight,
        randn(n, seed=seed + 1),
        randn(3, 2, seed=seed + 2),
        readout_bias=randn(3, seed=seed + 3),
        mask=mask,
    )


def batch(n: int = 5, size: int = 4) -> tuple[Tensor, Tensor]:
    return randn(size, n, seed=9), torch.arange(size) % 3


@CHECK
@given(seed=seeds)
def test_gradients_by_backprop_are_those_of_an_unrolled_network(seed):
    net, (drive, target) = network(seed, strength=0.15), batch()
    u = net.settle(drive)
    found = net.gradients(u, drive, target, method="backprop")
    state = torch.zeros_like(drive)
    for _ in range(300):
        state = state + 0.5 * net.field(state, drive)
    net.loss(state, target).backward()
    for name, value in found._asdict().items():
        torch.testing.assert_close(value, getattr(net, name).grad, atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize(
    ("method", "points"),
    [("exact", 2), ("backprop", 2), ("cauchy", 1), ("cauchy", 2), ("cauchy", 4)],
)
@torch.no_grad()
def test_network_vectors_agree_with_the_function_for_any_field(method, points):
    net, (drive, target) = network(), batch()
    u = net.settle(drive)
    assert net.field(u, drive).abs().max() < 1e-9
    rows = net.error_vectors(u, drive, target, method=method, points=points, beta=0.2)
    for i in range(len(u)):

        def gradient(r, i=i):
            logits = r[-2:] @ net.readout.detach().to(r.dtype).T + net.readout_bias.detach()
            powers = logits.exp()
            surprise = powers / powers.sum() - torch.nn.functional.one_hot(target[i], 3)
            return torch.nn.functional.pad(surprise @ net.readout.detach().to(r.dtype), (3, 0))

        one = error_vector(
            lambda s, i=i: net.field(s, drive[i]),
            gradient,
            u[i],
            method=method,
            points=points,
            beta=0.2,
            activation=net.activation,
        )
        torch.testing.assert_close(rows[i], one, atol=1e-8, rtol=1e-7)


def test_symmetric_network_needs_no_backprop_and_asymmetric_does():
    drive, target = batch()
    for symmetric in (True, False):
        net = network(symmetric=symmetric)
        u = net.settle(drive)
        v, delta = (net.error_vectors(u, drive, target, method=m) for m in ("exact", "backprop"))
        assert torch.allclose(v, delta, atol=1e-9) is symmetric


def test_mask_removes_connections_and_their_gradient():
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    net, (drive, target) = network(mask=mask), batch()
    u = net.settle(drive)
    found = net.gradients(u, drive, target)
    assert (found.weight[~mask] == 0).all()
    assert (net.connections()[~mask] == 0).all()


def test_network_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="weight must have shape"):
        EquilibriumNetwork(torch.ones(2, 3), torch.ones(2), torch.ones(1, 1))
    with pytest.raises(ValueError, match="readout must read"):
        EquilibriumNetwork(torch.ones(2, 2), torch.ones(2), torch.ones(1, 3))
    net, (drive, target) = network(), batch()
    with pytest.raises(ValueError, match="drive must have shape"):
        net.settle(drive[:, :2])
    with pytest.raises(ValueError, match="target"):
        net.loss(net.settle(drive), target[:2])
    assert (
        EquilibriumNetwork(torch.zeros(2, 2), torch.zeros(2), torch.eye(2))
        .gradients(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]))
        .readout_bias
        is None
    )


@pytest.mark.parametrize("activation", [holomorphic_sigmoid, dsilu])
@pytest.mark.parametrize("value", [None, "text", 0.5, [0.5]])
def test_activations_name_what_is_no_tensor(activation, value):
    with pytest.raises(TypeError, match=r"z must be a torch\.Tensor"):
        activation(value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_drive_that_is_not_finite_is_refused_before_settling(value):
    with pytest.raises(ValueError, match="drive must be finite, got 1"):
        plain_network().settle(torch.tensor([[0.3, value]], dtype=torch.float64))


def test_classes_are_integers_of_any_width_and_states_may_share_memory():
    net, drive = plain_network(), torch.tensor([[0.3, 0.6]], dtype=torch.float64).expand(2, 2)
    u, target = net.settle(drive), torch.tensor([1, 0])
    wanted = net.gradients(u, drive, target)
    found = net.gradients(u[:1].expand(2, 2), drive, target.to(torch.uint8))
    torch.testing.assert_close(found.weight, wanted.weight)
    torch.testing.assert_close(found.readout, wanted.readout)
    with pytest.raises(TypeError, match="target must have an integer dtype"):
        net.gradients(u, drive, target.half())


def test_homeostasis_names_a_field_that_cannot_be_called_and_takes_expanded_states():
    with pytest.raises(TypeError, match="field must be callable"):
        homeostatic_loss("text", torch.zeros(2), torch.eye(2))
    weight = torch.tensor([[0.0, 3.0], [1.0, 0.0]])
    value = homeostatic_loss(
        lambda u: weight @ u, torch.zeros(1).expand(2), torch.eye(2), reduction="sum"
    )
    assert value.item() == 4.0


def plain_network():
    weight = torch.tensor([[0.0, 0.5], [-0.3, 0.0]], dtype=torch.float64)
    return EquilibriumNetwork(weight, torch.zeros(2).double(), torch.eye(2).double())
