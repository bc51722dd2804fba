"""AdamP and SGDP: the theorems on norms, the limits of delta, and the same steps on every path."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from steelyard.optim import SGDP, AdamP, scale_invariance_score, tangent_project

CHECK = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 10_000)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def invariant_loss(weight: Tensor, target: Tensor) -> Tensor:
    return -torch.cosine_similarity(weight.flatten(1), target.flatten(1)).sum()


def run(optimizer: torch.optim.Optimizer, weight: Tensor, target: Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        invariant_loss(weight, target).backward()
        optimizer.step()


# ---- the projection -------------------------------------------------------------------------


@CHECK
@given(seed=seeds, view=st.sampled_from(["channel", "layer"]), scale=st.floats(0.01, 100))
def test_projection_is_a_linear_orthogonal_projector(seed, view, scale):
    w, x, y = randn(3, 5, seed=seed), randn(3, 5, seed=seed + 1), randn(3, 5, seed=seed + 2)

    def project(t):
        return tangent_project(t, w, view)

    torch.testing.assert_close(project(project(x)), project(x), atol=1e-12, rtol=0)
    torch.testing.assert_close(project(2 * x - y), 2 * project(x) - project(y), atol=1e-12, rtol=0)
    torch.testing.assert_close((project(x) * y).sum(), (x * project(y)).sum(), atol=1e-12, rtol=0)
    torch.testing.assert_close(tangent_project(x, scale * w, view), project(x), atol=1e-11, rtol=0)
    assert project(x).norm() <= x.norm() + 1e-12
    inner = (project(x) * w).sum(1) if view == "channel" else (project(x) * w).sum()
    torch.testing.assert_close(inner, torch.zeros_like(inner), atol=1e-12, rtol=0)


def test_projection_leaves_rows_of_zero_weight_alone():
    w = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    x = torch.ones(2, 2, dtype=torch.float64)
    assert tangent_project(x, w).tolist() == [[1.0, 1.0], [0.0, 1.0]]


def test_gradients_of_the_projection():
    w, x = randn(2, 3).requires_grad_(), randn(2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(tangent_project, (x, w))
    assert torch.autograd.gradcheck(lambda a, b: tangent_project(a, b, "layer"), (x, w))


@CHECK
@given(seed=seeds)
def test_layer_view_ignores_the_shape_and_channel_view_the_order_of_channels(seed):
    w, x = randn(4, 6, seed=seed), randn(4, 6, seed=seed + 1)
    flat = tangent_project(x.reshape(2, 12), w.reshape(2, 12), "layer").reshape(4, 6)
    torch.testing.assert_close(flat, tangent_project(x, w, "layer"))
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(tangent_project(x[order], w[order]), tangent_project(x, w)[order])
    torch.testing.assert_close(
        scale_invariance_score(w[order], x[order]), scale_invariance_score(w, x)
    )


def test_score_is_the_largest_cosine_in_units_of_chance():
    w, g = randn(3, 4), randn(3, 4, seed=1)
    cosines = torch.cosine_similarity(w, g).abs().max() * 2
    torch.testing.assert_close(scale_invariance_score(w, g), cosines)
    assert scale_invariance_score(w, torch.zeros_like(w)) == 0


def test_score_in_half_precision_accumulates_in_float32():
    w = randn(4, 4096, dtype=torch.bfloat16)
    g = tangent_project(randn(4, 4096, seed=1), w.double()).to(torch.bfloat16)
    assert scale_invariance_score(w, g) < 0.1
    assert tangent_project(g, w).dtype == torch.bfloat16


@pytest.mark.parametrize("function", [tangent_project, scale_invariance_score])
def test_wrong_arguments_are_named(function):
    w = torch.ones(2, 3)
    with pytest.raises(ValueError, match="shape"):
        function(torch.ones(3, 2), w)
    with pytest.raises(ValueError, match="view must be one of"):
        function(w, w, "row")
    with pytest.raises(TypeError, match="floating"):
        function(w.long(), w.long())
    with pytest.raises(ValueError, match="empty"):
        function(torch.ones(0, 3), torch.ones(0, 3))


# ---- theorems on norms ----------------------------------------------------------------------


@CHECK
@given(seed=seeds, beta=st.sampled_from([0.0, 0.5, 0.9]))
def test_momentum_lengthens_a_scale_invariant_weight_as_the_lemma_says(seed, beta):
    weight, target = nn.Parameter(randn(1, 4, seed=seed)), randn(1, 4, seed=seed + 1)
    optimizer, rate = SGDP([weight], lr=0.3, momentum=beta, delta=0.0), 0.3
    pushes: list[Tensor] = []
    for t in range(8):
        before = weight.detach().clone()
        run(optimizer, weight, target, 1)
        push = (before - weight.detach()) / rate
        past = sum(beta ** (t - k) * pushes[k].square().sum() for k in range(t))
        expected = before.square().sum() + rate**2 * (push.square().sum() + 2 * past)
        torch.testing.assert_close(weight.detach().square().sum(), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            (before * push).sum(), before.new_tensor(-rate * float(past)), rtol=1e-8, atol=1e-10
        )
        pushes.append(push)


@CHECK
@given(seed=seeds, nesterov=st.booleans())
def test_with_projection_the_squared_norm_grows_by_the_squared_step(seed, nesterov):
    weight, target = nn.Parameter(randn(2, 4, seed=seed)), randn(2, 4, seed=seed + 1)
    for optimizer in (
        SGDP([weight], lr=0.2, momentum=0.9, nesterov=nesterov, eps=0.0),
        AdamP([weight], lr=0.05, eps=0.0, nesterov=nesterov),
    ):
        for _ in range(5):
            before = weight.detach().clone()
            run(optimizer, weight, target, 1)
            step = weight.detach() - before
            torch.testing.assert_close(
                weight.detach().square().sum(1), before.square().sum(1) + step.square().sum(1)
            )


def test_ratio_of_norm_growth_tends_to_one_plus_two_beta_over_one_minus_beta():
    for beta, expected in ((0.5, 3.0), (0.9, 19.0), (0.95, 39.0)):
        norms = 0.999 ** torch.arange(40_000, dtype=torch.float64)  # any summable update norms
        squares, memory, cross = norms.square(), 0.0, 0.0
        for square in squares[::1].tolist():
            cross += memory
            memory = beta * (memory + square)
        growth = (squares.sum() + 2 * cross) / squares.sum()
        assert growth.item() == pytest.approx(expected, rel=0.05)


@CHECK
@given(seed=seeds)
def test_projection_keeps_the_direction_of_travel(seed):
    w, p = randn(1, 5, seed=seed), randn(1, 5, seed=seed + 1)
    plain, projected = w - 0.1 * p, w - 0.1 * tangent_project(p, w)
    assert torch.linalg.svdvals(torch.cat([w, plain, projected]))[2] < 1e-12
    torch.testing.assert_close(tangent_project(plain, w), tangent_project(projected, w))


@CHECK
@given(seed=seeds, scale=st.sampled_from([0.25, 3.0]))
def test_scaling_the_weight_and_the_rate_together_keeps_the_direction(seed, scale):
    start, target = randn(2, 3, seed=seed), randn(2, 3, seed=seed + 1)
    makers = {
        "sgd": lambda w, c: SGDP([w], lr=0.1 * c**2, momentum=0.9, delta=0.0),
        "sgdp": lambda w, c: SGDP([w], lr=0.1 * c**2, momentum=0.9, eps=0.0),
        "adamp": lambda w, c: AdamP([w], lr=0.1 * c, eps=0.0),
    }
    for make in makers.values():
        found = []
        for c in (1.0, scale):
            weight = nn.Parameter(c * start)
            run(make(weight, c), weight, target, 6)
            found.append(weight.detach() / weight.detach().norm(dim=1, keepdim=True))
        torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-8)


# ---- limits ---------------------------------------------------------------------------------


def small_net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)
    ).to(dtype)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 10) -> list[Tensor]:
    x, y = randn(16, 6, seed=3).to(next(net.parameters()).dtype), torch.arange(16) % 3
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return [p.detach() for p in net.parameters()]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_delta_zero_is_adamw(foreach, maximize):
    ours, theirs = small_net(), small_net()
    a = AdamP(
        ours.parameters(), lr=1e-2, weight_decay=0.1, delta=0.0, foreach=foreach, maximize=maximize
    )
    b = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1, maximize=maximize)
    assert_same(train(ours, a), train(theirs, b))


def test_delta_zero_is_sgd_with_decoupled_decay():
    ours, theirs = small_net(), small_net()
    a = SGDP(ours.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2, delta=0.0)

    class Decoupled(torch.optim.SGD):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.data.mul_(1 - 0.1 * 1e-2 / (1 - 0.9))
            return super().step(closure)

    assert_same(train(ours, a), train(theirs, Decoupled(theirs.parameters(), lr=0.1, momentum=0.9)))


def test_delta_infinity_projects_every_matrix_by_rows_and_no_vector():
    matrix, vector = nn.Parameter(randn(3, 4)), nn.Parameter(randn(4, seed=1))
    before = [matrix.detach().clone(), vector.detach().clone()]
    optimizer = SGDP([matrix, vector], lr=0.1, delta=math.inf, weight_decay=0.5)
    matrix.grad, vector.grad = randn(3, 4, seed=2), randn(4, seed=3)
    optimizer.step()
    expected = before[0] * (1 - 0.1 * 0.5 * 0.1) - 0.1 * tangent_project(matrix.grad, before[0])
    torch.testing.assert_close(matrix.detach(), expected)
    plain = before[1] * (1 - 0.1 * 0.5) - 0.1 * vector.grad
    torch.testing.assert_close(vector.detach(), plain)


def test_without_momentum_projection_changes_nothing_on_an_invariant_weight():
    a, b, target = nn.Parameter(randn(2, 4)), nn.Parameter(randn(2, 4)), randn(2, 4, seed=1)
    run(SGDP([a], lr=0.2, eps=0.0), a, target, 6)
    run(torch.optim.SGD([b], lr=0.2), b, target, 6)
    torch.testing.assert_close(a.detach(), b.detach())


def test_layer_before_batchnorm_passes_the_test_and_the_last_layer_does_not():
    net = small_net()
    x, y = randn(16, 6, seed=3), torch.arange(16) % 3
    nn.functional.cross_entropy(net(x), y).backward()
    first, last = net[0].weight, net[3].weight
    assert scale_invariance_score(first, first.grad) < 1e-3
    assert scale_invariance_score(last, last.grad) > 0.1


def test_layer_view_is_tried_when_the_rows_do_not_pass():
    w = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    g = torch.tensor([[1.0, 0.3], [0.2, -1.0]], dtype=torch.float64)  # tangent only as a whole
    weight = nn.Parameter(w.clone())
    optimizer = SGDP([weight], lr=1.0, weight_decay=0.5, wd_ratio=0.2)
    weight.grad = g
    optimizer.step()
    torch.testing.assert_close(
        weight.detach(), w * (1 - 0.5 * 0.2) - tangent_project(g, w, "layer")
    )


def test_projecting_the_buffer_is_the_published_code_and_another_trajectory():
    found = {}
    for project_buffer in (False, True):
        weight, target = nn.Parameter(randn(2, 4)), randn(2, 4, seed=1)
        optimizer = SGDP([weight], lr=0.5, momentum=0.9, project_buffer=project_buffer)
        lengths = []
        for _ in range(4):
            before = weight.detach().clone()
            run(optimizer, weight, target, 1)
            buffer = optimizer.state[weight]["momentum_buffer"]
            lengths.append((buffer * before).sum(1).abs().max().item())
        found[project_buffer] = (weight.detach(), lengths)
    assert max(found[True][1]) < 1e-6  # stays tangent at the weight it was made for
    assert max(found[False][1]) > 1e-2
    assert not torch.allclose(found[True][0], found[False][0], atol=1e-4)


# ---- the same steps on every path -----------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda p, **k: AdamP(p, lr=1e-2, weight_decay=1e-2, **k),
        lambda p, **k: AdamP(p, lr=1e-2, nesterov=True, weight_decay=1e-2, **k),
        lambda p, **k: SGDP(p, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=1e-3, **k),
        lambda p, **k: SGDP(p, lr=0.1, momentum=0.9, nesterov=True, **k),
    ],
)
def test_fast_and_plain_paths_agree(make):
    nets = [small_net() for _ in range(3)]
    found = [
        train(net, make(net.parameters(), foreach=f))
        for net, f in zip(nets, (None, False, True), strict=True)
    ]
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


def test_capturable_counter_and_tensor_rate_give_the_same_steps():
    plain, other = small_net(), small_net()
    expected = train(plain, AdamP(plain.parameters(), lr=1e-2, foreach=False))
    rate = torch.tensor(1e-2, dtype=torch.float64)
    assert_same(
        train(other, AdamP(other.parameters(), lr=rate, foreach=True, capturable=True)),
        expected,
        1e-6,
    )


@pytest.mark.parametrize("kind", ["AdamP", "SGDP"])
def test_an_independent_implementation_takes_the_same_steps(kind):
    peer = pytest.importorskip("pytorch_optimizer")
    ours, theirs = small_net(), small_net()
    if kind == "AdamP":
        a = AdamP(ours.parameters(), lr=1e-2, weight_decay=1e-2, eps=1e-13)
        b = peer.AdamP(theirs.parameters(), lr=1e-2, weight_decay=1e-2, eps=1e-13)
    else:
        a = SGDP(ours.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        b = peer.SGDP(theirs.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    assert_same(train(ours, a, 5), train(theirs, b, 5), 1e-5)


def test_channels_last_weights_take_the_same_steps():
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = nn.Parameter(randn(4, 3, 2, 2).to(memory_format=layout))
        optimizer = AdamP([weight], lr=0.1)
        run(optimizer, weight, randn(4, 3, 2, 2, seed=1), 4)
        sgd = SGDP([weight], lr=0.1, momentum=0.9, project_buffer=True)
        run(sgd, weight, randn(4, 3, 2, 2, seed=1), 4)
        found.append(weight.detach().contiguous())
    torch.testing.assert_close(found[0], found[1])


# float16 cannot hold Adam's squared gradients, in torch.optim as little as here: SGDP there.
@pytest.mark.parametrize(
    ("dtype", "make"),
    [(torch.bfloat16, AdamP), (torch.bfloat16, SGDP), (torch.float16, SGDP)],
)
def test_half_precision_stays_near_float32(dtype, make):
    found = []
    for kind in (torch.float32, dtype):
        weight = nn.Parameter(randn(4, 8, dtype=kind))
        run(make([weight], lr=0.05), weight, randn(4, 8, seed=1, dtype=kind), 3)
        assert weight.dtype == kind
        found.append(weight.detach().float())
    torch.testing.assert_close(found[0], found[1], atol=0.05, rtol=0.05)


def test_state_moves_between_adam_and_adamp_and_survives_a_round_trip():
    net, twin = small_net(), small_net()
    adam = torch.optim.AdamW(net.parameters(), lr=1e-2)
    train(net, adam, 3)
    optimizer = AdamP(net.parameters(), lr=1e-2, delta=0.0)
    state = adam.state_dict()
    state["param_groups"] = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(state)
    expected = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.0)
    twin.load_state_dict(copy.deepcopy(net.state_dict()))
    expected.load_state_dict(
        copy.deepcopy(adam.state_dict()) | {"param_groups": expected.state_dict()["param_groups"]}
    )
    assert_same(train(net, optimizer, 2), train(twin, expected, 2))
    assert (
        copy.deepcopy(optimizer).state_dict()["param_groups"]
        == optimizer.state_dict()["param_groups"]
    )


def test_schedulers_hooks_and_closures_work():
    weight, target = nn.Parameter(randn(2, 3)), randn(2, 3, seed=1)
    optimizer, calls = AdamP([weight], lr=0.1), []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure():
        optimizer.zero_grad()
        loss = invariant_loss(weight, target)
        loss.backward()
        return loss

    assert optimizer.step(closure).shape == ()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert calls == [1]


def test_sparse_complex_and_impossible_settings_are_refused():
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="AdamP does not take sparse"):
        AdamP(table.parameters()).step()
    w = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    w.grad = torch.ones_like(w)
    with pytest.raises(TypeError, match="real"):
        SGDP([w], lr=0.1).step()
    real = nn.Parameter(torch.ones(2, 2))
    real.grad = torch.ones_like(real)
    with pytest.raises(ValueError, match="weight_decay must keep"):
        SGDP([real], lr=0.1, momentum=0.99, weight_decay=0.2).step()
    for bad in (
        {"lr": -1.0},
        {"betas": (1.0, 0.9)},
        {"eps": -1.0},
        {"delta": -0.1},
        {"delta": math.nan},
        {"weight_decay": -1},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            AdamP([real], **bad)
    with pytest.raises(ValueError, match="momentum"):
        SGDP([real], lr=0.1, momentum=1.0)


def test_parameters_without_gradient_and_empty_ones_are_left_alone():
    still, empty = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(0, 3))
    empty.grad = torch.ones(0, 3)
    for optimizer in (AdamP([still, empty]), SGDP([still, empty], lr=0.1)):
        optimizer.step()
    assert still.tolist() == [[1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("optimizer", [AdamP, lambda p: SGDP(p, lr=0.1)])
@pytest.mark.parametrize(("params", "error"), [([], ValueError), (None, TypeError), (3, TypeError)])
def test_parameters_that_are_missing_are_refused_by_name(optimizer, params, error):
    with pytest.raises(error, match=r"^params must"):
        optimizer(params)


@pytest.mark.parametrize("betas", [None, 0.9, (0.9,), (0.9, 0.99, 0.999)])
def test_betas_that_are_not_two_are_refused_by_name(betas):
    with pytest.raises(TypeError, match="betas must be two numbers"):
        AdamP([nn.Parameter(torch.ones(2))], betas=betas)


def test_parameters_may_come_from_a_generator():
    weight = nn.Parameter(torch.ones(2))
    assert AdamP(p for p in [weight]).param_groups[0]["params"] == [weight]
