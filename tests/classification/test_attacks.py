"""Attacks against exact adversaries, and the implicit gradient against unrolled descent."""

import math

import pytest
import torch
from torch.nn import functional

from steelyard.classification import counted_pgd_attack, log_barrier_attack, pgd_attack


def linear(seed: int = 0, features: int = 6):
    """A binary linear model on inputs away from the box, with the weight of class 1 - class 0."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, features, generator=g, dtype=torch.float64)
    x = 0.3 + 0.4 * torch.rand(5, features, generator=g, dtype=torch.float64)
    return (
        (lambda inputs: inputs @ weight.T),
        weight[1] - weight[0],
        x,
        torch.tensor([0, 1, 1, 0, 1]),
    )


def network(seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)
    ).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.6 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    x = torch.rand(3, 4, generator=g, dtype=torch.float64)
    return model, x, torch.tensor([0, 1, 2])


def test_against_a_linear_model_both_norms_are_exact():
    model, direction, x, y = linear()
    sign = (2.0 * y - 1).double()
    margin = sign * (x @ direction)
    exact = {
        "linf": functional.softplus(-(margin - 0.1 * direction.abs().sum())),
        "l2": functional.softplus(-(margin - 0.1 * direction.norm())),
    }
    for norm, expected in exact.items():
        attacked = pgd_attack(
            model,
            x,
            y,
            epsilon=0.1,
            step_size=0.03,
            steps=80,
            norm=norm,
            generator=torch.Generator().manual_seed(0),
        )
        losses = functional.cross_entropy(model(attacked), y, reduction="none")
        torch.testing.assert_close(losses, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_the_result_is_in_the_ball_and_in_the_box(norm, steps):
    model, x, y = network()
    g = torch.Generator().manual_seed(1)
    for epsilon in (0.0, 0.05, 0.7):
        attacked = pgd_attack(
            model, x, y, epsilon=epsilon, step_size=0.3, steps=steps, norm=norm, generator=g
        )
        delta = attacked - x
        size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
        assert (size <= epsilon + 1e-12).all()
        assert attacked.min() >= 0
        assert attacked.max() <= 1
        assert not attacked.requires_grad


def test_inputs_of_one_number_need_no_second_dimension():
    x, y = torch.tensor([0.5, 0.6], dtype=torch.float64), torch.tensor([0, 1])
    weight = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)

    def model(v):
        return v.unsqueeze(1) * weight

    for norm in ("linf", "l2"):
        attacked = pgd_attack(model, x, y, epsilon=0.1, step_size=0.1, steps=3, norm=norm)
        torch.testing.assert_close(attacked, torch.tensor([0.6, 0.5]).double())
    setting = SMOOTH | {"epsilon": 0.1, "implicit": "exact"}
    soft = log_barrier_attack(model, x, y, **setting)
    assert soft[0] > x[0]
    [slope] = torch.autograd.grad(soft[0], weight)
    assert slope[1] > 0


def test_one_step_without_a_random_start_is_the_fast_gradient_sign():
    model, x, y = network()
    leaf = x.clone().requires_grad_()
    functional.cross_entropy(model(leaf), y).backward()
    expected = (x + 0.1 * leaf.grad.sign()).clamp(0, 1)
    attacked = pgd_attack(model, x, y, epsilon=0.1, step_size=0.1, steps=1, random_start=False)
    torch.testing.assert_close(attacked, expected)
    free = pgd_attack(
        model, x, y, epsilon=0.1, step_size=0.1, steps=1, random_start=False, bounds=None
    )
    torch.testing.assert_close(free, x + 0.1 * leaf.grad.sign())


def test_more_radius_never_hurts_the_attacker_on_a_linear_model():
    model, _, x, y = linear(3)
    robust = []
    for epsilon in (0.0, 0.05, 0.1, 0.2):
        attacked = pgd_attack(model, x, y, epsilon=epsilon, step_size=epsilon, steps=5)
        robust.append(float((model(attacked).argmax(1) == y).double().mean()))
    assert robust == sorted(robust, reverse=True)


def test_the_random_start_is_uniform_in_the_ball_and_reproducible():
    """2,000 draws; the bounds are 5 standard errors of the mean (p < 1e-6)."""
    x, y = torch.full((2000, 3), 0.5, dtype=torch.float64), torch.zeros(2000, dtype=torch.long)
    setting = {"epsilon": 0.2, "step_size": 0.0, "steps": 0}
    start = {
        norm: pgd_attack(
            None, x, y, norm=norm, generator=torch.Generator().manual_seed(0), **setting
        )
        - x
        for norm in ("linf", "l2")
    }
    assert abs((start["linf"].abs() / 0.2).mean() - 0.5) < 5 * 0.289 / math.sqrt(6000)
    # The cube of the relative radius is uniform in three dimensions.
    volume = (start["l2"].norm(dim=1) / 0.2) ** 3
    assert abs(volume.mean() - 0.5) < 5 * 0.289 / math.sqrt(2000)
    assert (start["l2"].mean(0).abs() < 5 * 0.2 / math.sqrt(2000)).all()
    again = pgd_attack(None, x, y, generator=torch.Generator().manual_seed(0), **setting)
    torch.testing.assert_close(again - x, start["linf"])


def test_a_loss_of_the_users_is_climbed():
    model, x, y = network(2)
    clean = model(x).detach().softmax(-1)

    def divergence(logits, y):
        return functional.kl_div(logits.log_softmax(-1), clean, reduction="none").sum(-1)

    start, end = (
        pgd_attack(
            model,
            x,
            y,
            epsilon=0.1,
            step_size=0.03,
            steps=steps,
            loss=divergence,
            generator=torch.Generator().manual_seed(0),
        )
        for steps in (0, 10)
    )
    assert (divergence(model(end), y) > 2 * divergence(model(start), y)).all()
    scalar = pgd_attack(
        model,
        x,
        y,
        epsilon=0.1,
        step_size=0.03,
        steps=2,
        loss=functional.cross_entropy,
        random_start=False,
    )
    default = pgd_attack(model, x, y, epsilon=0.1, step_size=0.03, steps=2, random_start=False)
    torch.testing.assert_close(scalar, default)


@pytest.mark.parametrize("attack", ["pgd", "barrier"])
def test_modes_are_restored_and_parameters_untouched_even_without_grad_mode(attack):
    inner = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5))
    model = torch.nn.Sequential(inner, torch.nn.Linear(4, 3))
    inner[0].eval()
    seen = []
    model[1].register_forward_pre_hook(lambda module, _: seen.append(module.training))
    model[1].weight.grad = torch.ones(3, 4)
    before = model[0][0].running_mean.clone()
    x, y = torch.rand(2, 4), torch.tensor([0, 1])
    with torch.no_grad():
        if attack == "pgd":
            attacked = pgd_attack(model, x, y, epsilon=0.1, step_size=0.05, steps=2)
        else:
            attacked = log_barrier_attack(
                model, x, y, epsilon=0.1, barrier=1e-3, steps=2, step_size=0.01, implicit="exact"
            )
    assert not attacked.requires_grad
    assert (attacked != x).any()
    assert seen
    assert not any(seen)
    assert [module.training for module in model.modules()] == [True, True, False, True, True]
    assert torch.equal(model[0][0].running_mean, before)
    assert torch.equal(model[1].weight.grad, torch.ones(3, 4))

    def fails(logits, y):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        pgd_attack(model, x, y, epsilon=0.1, step_size=0.05, steps=2, loss=fails)
    assert model.training


def test_kappa_counts_the_iterates_before_each_step():
    model, x, y = network(5)
    setting = {"epsilon": 0.3, "step_size": 0.05, "random_start": False}
    y = model(x).argmax(1)
    y[2] = (y[2] + 1) % 3
    counted = counted_pgd_attack(model, x, y, steps=6, **setting)
    plain = pgd_attack(model, x, y, steps=6, **setting)
    torch.testing.assert_close(counted.x, plain)
    right = [model(pgd_attack(model, x, y, steps=k, **setting)).argmax(1) == y for k in range(6)]
    assert torch.equal(counted.kappa, torch.stack(right).sum(0))
    assert counted.kappa[2] == 0
    safe = counted_pgd_attack(
        lambda v: v @ torch.zeros(4, 3).double(), x, y * 0, steps=4, **setting
    )
    assert safe.kappa.tolist() == [4, 4, 4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_attacks_keep_dtype_and_shape_of_images(dtype):
    weight = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = torch.rand(2, 3, 2, 2).to(dtype)
    y = torch.tensor([0, 1])

    def model(v):
        return v.flatten(1) @ weight

    results = [
        pgd_attack(model, x, y, epsilon=0.1, step_size=0.05, steps=2, norm=norm)
        for norm in ("linf", "l2")
    ]
    results.append(
        log_barrier_attack(model, x, y, epsilon=0.1, barrier=1e-3, steps=2, step_size=0.01)
    )
    for attacked in results:
        assert attacked.dtype == dtype
        assert attacked.shape == x.shape
        assert attacked.isfinite().all()


# Curvature at the centre of the box is 10, and about 100 where the wall is nearest.
SMOOTH = {"barrier": 0.05, "steps": 400, "step_size": 0.01}


def test_the_barrier_solution_is_stationary_and_strictly_inside():
    model, x, y = network(1)
    x[0, 0], x[1, 1] = 0.04, 0.95  # boxes that are not centred
    attacked = log_barrier_attack(model, x, y, epsilon=0.1, gamma=2.0, **SMOOTH)
    delta = attacked - x
    low, high = torch.clamp(-x, min=-0.1), torch.clamp(1 - x, max=0.1)
    assert (delta > low).all()
    assert (delta < high).all()
    leaf = attacked.clone().requires_grad_()
    [climb] = torch.autograd.grad(functional.cross_entropy(model(leaf), y, reduction="sum"), leaf)
    slope = -climb + 2.0 * delta + 0.05 * (1 / (high - delta) - 1 / (delta - low))
    assert slope.abs().max() < 1e-9


def test_as_the_barrier_falls_the_solution_tends_to_the_projected_optimum():
    model, direction, x, y = linear(1)
    corner = -0.1 * (2 * y - 1).double().unsqueeze(1) * direction.sign()
    distance = []
    for barrier, step_size in ((5e-2, 1e-2), (5e-3, 1e-3), (1e-7, 5e-2)):
        setting = {"barrier": barrier, "step_size": step_size, "steps": 500}
        attacked = log_barrier_attack(model, x, y, epsilon=0.1, **setting)
        distance.append(float((attacked - x - corner).abs().mean()))
    assert distance[0] > 1.5 * distance[1] > 15 * distance[2]
    assert distance[2] < 1.01e-4  # the pull


def unrolled(model, x, y, loss, barrier, gamma, steps, step_size, epsilon=0.1):
    """Total derivative of ``loss`` through every step of the descent."""
    low, high = torch.clamp(-x, min=-epsilon), torch.clamp(1 - x, max=epsilon)
    delta = torch.zeros_like(x, requires_grad=True)
    for _ in range(steps):
        value = -functional.cross_entropy(model(x + delta), y, reduction="sum")
        value = value + gamma / 2 * delta.square().sum()
        value = value - barrier * ((high - delta).log() + (delta - low).log()).sum()
        [slope] = torch.autograd.grad(value, delta, create_graph=True)
        delta = delta - step_size * slope
    return torch.autograd.grad(loss(model(x + delta), y), list(model.parameters()))


def smooth_loss(logits, y):
    return (logits.softmax(-1) * torch.tensor([1.0, -2.0, 0.5]).double()).sum()


@pytest.mark.parametrize("gamma", [0.0, 3.0])
def test_the_exact_implicit_gradient_is_that_of_the_unrolled_descent(gamma):
    model, x, y = network(4)
    x = 0.2 + 0.6 * x  # the box is centred, so descent may start at 0 without a pull
    setting = SMOOTH | {"gamma": gamma}
    expected = unrolled(model, x, y, smooth_loss, **setting)
    attacked = log_barrier_attack(model, x, y, epsilon=0.1, implicit="exact", **setting)
    got = torch.autograd.grad(smooth_loss(model(attacked), y), list(model.parameters()))
    plain = torch.autograd.grad(smooth_loss(model(attacked.detach()), y), list(model.parameters()))
    for ours, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-9)
    assert max((a - b).abs().max() for a, b in zip(plain, expected, strict=True)) > 1e-3


def test_the_exact_implicit_gradient_is_that_of_finite_differences():
    model, x, y = network(6)
    x = 0.2 + 0.6 * x
    setting = SMOOTH | {"epsilon": 0.1}

    def total(implicit):
        attacked = log_barrier_attack(model, x, y, implicit=implicit, **setting)
        return smooth_loss(model(attacked), y)

    weight = model[0].weight
    [slope] = torch.autograd.grad(total("exact"), weight)
    for place in ((0, 0), (2, 3), (4, 1)):
        ends = []
        for change in (1e-5, -1e-5):
            with torch.no_grad():
                weight[place] += change
                ends.append(total("none"))
                weight[place] -= change
        assert float((ends[0] - ends[1]) / 2e-5) == pytest.approx(float(slope[place]), abs=1e-7)


def test_the_diagonal_gradient_is_its_formula_and_exact_for_a_loss_linear_in_the_input():
    def margin(logits, y):
        return (logits * torch.tensor([1.0, -1.0]).double()).sum(1)

    weight = torch.tensor([[1.0, -0.5, 2.0], [0.2, 0.4, -0.3]], dtype=torch.float64)
    weight.requires_grad_()
    x, y = torch.full((2, 3), 0.5, dtype=torch.float64), torch.tensor([0, 1])
    setting = {"epsilon": 0.1, "barrier": 0.05, "gamma": 1.0, "steps": 800, "step_size": 0.02}
    slopes = {}
    for implicit in ("diagonal", "exact"):
        attacked = log_barrier_attack(
            lambda v: v @ weight.T, x, y, loss=margin, implicit=implicit, **setting
        )
        [slopes[implicit]] = torch.autograd.grad(attacked.square().sum(), weight)
    torch.testing.assert_close(slopes["diagonal"], slopes["exact"], rtol=0, atol=1e-10)
    delta = attacked.detach() - x
    diagonal = 1.0 + 0.05 * (1 / (0.1 - delta) ** 2 + 1 / (0.1 + delta) ** 2)
    # delta depends on weight[0] - weight[1]: d delta / d that = 1 / diagonal.
    per_class = (2 * attacked.detach() / diagonal).sum(0)
    torch.testing.assert_close(
        slopes["exact"], torch.stack((per_class, -per_class)), rtol=0, atol=1e-9
    )


def test_the_implicit_term_of_the_attacked_loss_itself_falls_with_the_barrier():
    """Danskin: where the attack climbs the training loss, the solution's motion costs nothing.

    One input and the loss ``w x``: delta = (sqrt(c^2 + (w eps)^2) - c) / w, the term w / H.
    """
    x, y = torch.full((1, 1), 0.5, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    terms = []
    for c in (2e-2, 4e-3, 8e-4):
        setting = {"barrier": c, "steps": 600, "step_size": c / 8}
        attacked = log_barrier_attack(
            lambda v: v * weight,
            x,
            y,
            epsilon=0.1,
            loss=lambda z, y: z[:, 0],
            implicit="exact",
            **setting,
        )
        delta = (math.sqrt(c * c + 0.04) - c) / 2
        assert float(attacked.detach() - x) == pytest.approx(delta, abs=1e-9)
        [slope] = torch.autograd.grad((weight * attacked).sum(), weight)
        term = float(slope - attacked.detach().sum())
        curvature = c * (1 / (0.1 - delta) ** 2 + 1 / (0.1 + delta) ** 2)
        assert term == pytest.approx(2 / curvature, abs=1e-8)
        terms.append(term)
    assert terms[0] > 3 * terms[1] > 9 * terms[2] > 0


def test_without_a_request_the_result_carries_no_gradient():
    model, x, y = network(7)
    setting = {"epsilon": 0.1, "barrier": 0.02, "steps": 3, "step_size": 0.05}
    assert not log_barrier_attack(model, x, y, **setting).requires_grad
    same = log_barrier_attack(model, x, y, implicit="diagonal", **setting)
    assert same.requires_grad
    torch.testing.assert_close(same.detach(), log_barrier_attack(model, x, y, **setting))


def test_too_long_steps_stay_inside_by_the_pull():
    model, x, y = network(8)
    x[0, 0], x[1, 1] = 0.0, 1.0
    attacked = log_barrier_attack(model, x, y, epsilon=0.1, barrier=0.1, steps=20, step_size=1e6)
    delta = attacked - x
    assert attacked.isfinite().all()
    room = torch.minimum(torch.clamp(1 - x, max=0.1) - delta, delta - torch.clamp(-x, min=-0.1))
    assert (room >= 1e-4 - 1e-12).all()


X, Y = torch.full((2, 3), 0.5), torch.tensor([0, 1])
PGD = {"epsilon": 0.1, "step_size": 0.1, "steps": 1}
LOG = PGD | {"barrier": 0.1}


def identity(v):
    return v


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: pgd_attack(identity, X[:0], Y[:0], **PGD), ValueError, "x"),
        (lambda: pgd_attack(identity, X[0, 0], Y, **PGD), ValueError, "x"),
        (lambda: pgd_attack(identity, X.long(), Y, **PGD), TypeError, "x"),
        (lambda: pgd_attack(identity, X, Y, **PGD | {"epsilon": -1.0}), ValueError, "epsilon"),
        (lambda: pgd_attack(identity, X, Y, **PGD | {"step_size": -1}), ValueError, "step_size"),
        (lambda: pgd_attack(identity, X, Y, **PGD | {"steps": -1}), ValueError, "steps"),
        (lambda: pgd_attack(identity, X, Y, norm="l1", **PGD), ValueError, "norm"),
        (lambda: pgd_attack(identity, X, Y, bounds=(1, 0), **PGD), ValueError, "bounds"),
        (lambda: counted_pgd_attack(identity, X, Y, norm="x", **PGD), ValueError, "norm"),
        (lambda: log_barrier_attack(identity, X, Y, **LOG | {"epsilon": 0}), ValueError, "epsilon"),
        (lambda: log_barrier_attack(identity, X, Y, **LOG | {"barrier": 0}), ValueError, "barrier"),
        (lambda: log_barrier_attack(identity, X, Y, gamma=-1, **LOG), ValueError, "gamma"),
        (lambda: log_barrier_attack(identity, X, Y, implicit="x", **LOG), ValueError, "implicit"),
        (
            lambda: log_barrier_attack(identity, X, Y, loss=functional.cross_entropy, **LOG),
            ValueError,
            "loss",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()
