"""Sinkhorn plans against linear programming, closed forms and a plain log-domain loop."""

import itertools
import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog
from torch.autograd import gradcheck, gradgradcheck

from steelyard.divergences import _scaling, _semi_dual, sinkhorn_divergence, sinkhorn_plan
from steelyard.divergences import sinkhorn as module

F64 = torch.float64
QUICK = settings(deadline=None, max_examples=30)
seeds = st.integers(0, 10_000)
sizes = st.integers(1, 7)
epsilons = st.sampled_from([0.01, 0.05, 0.3, 2.0])


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def mass(*shape, seed=0):
    weights = rand(*shape, seed=seed) + 0.1
    return weights / weights.sum(-1, keepdim=True)


def uniform(size):
    return torch.full((size,), 1 / size, dtype=F64)


def plain_loop(cost, epsilon, a, b, count):
    """Row, then column normalisation of exp(-cost / epsilon) in log space."""
    log_plan = -cost / epsilon
    for _ in range(count):
        log_plan = log_plan - log_plan.logsumexp(-1, keepdim=True) + a.log().unsqueeze(-1)
        log_plan = log_plan - log_plan.logsumexp(-2, keepdim=True) + b.log().unsqueeze(-2)
    return log_plan.exp()


def marginal_error(plan, a, b):
    return max((plan.sum(-1) - a).abs().max().item(), (plan.sum(-2) - b).abs().max().item())


# --- the plan ---


@QUICK
@given(seeds, sizes, sizes, epsilons)
def test_plan_is_non_negative_with_the_given_marginals(seed, rows, columns, epsilon):
    a, b = mass(rows, seed=seed), mass(columns, seed=seed + 1)
    plan = sinkhorn_plan(rand(rows, columns, seed=seed), epsilon, a=a, b=b)
    assert (plan >= 0).all()
    assert marginal_error(plan, a, b) <= 1e-9
    assert plan.sum().item() == pytest.approx(1.0, abs=1e-12)


@QUICK
@given(seeds, sizes, sizes)
def test_plan_is_the_fixed_point_of_the_plain_loop(seed, rows, columns):
    a, b = mass(rows, seed=seed), mass(columns, seed=seed + 1)
    cost = rand(rows, columns, seed=seed)
    plan = sinkhorn_plan(cost, 0.2, a=a, b=b, tolerance=1e-13)
    torch.testing.assert_close(plan, plain_loop(cost, 0.2, a, b, 1000), rtol=0, atol=1e-9)


@QUICK
@given(seeds, sizes, sizes, epsilons, st.integers(1, 40))
def test_exactly_k_iterations_are_those_of_the_plain_loop(seed, rows, columns, epsilon, count):
    a, b = mass(rows, seed=seed), mass(columns, seed=seed + 1)
    cost = 3 * rand(rows, columns, seed=seed)
    plan = sinkhorn_plan(cost, epsilon, a=a, b=b, num_iterations=count)
    torch.testing.assert_close(plan, plain_loop(cost, epsilon, a, b, count), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(plan.sum(0), b, rtol=0, atol=1e-12)


def test_iterations_stay_exact_across_absorptions_of_the_scalings():
    cost = 100 * rand(12, 12)
    for count in (1, 2, 100, 300):
        plan = sinkhorn_plan(cost, 0.01, num_iterations=count)
        expected = plain_loop(cost, 0.01, uniform(12), uniform(12), count)
        torch.testing.assert_close(plan, expected, rtol=0, atol=1e-10)


def test_small_epsilon_is_the_assignment():
    cost = rand(20, 20)
    rows, columns = linear_sum_assignment(cost.numpy())
    plan = sinkhorn_plan(cost, 1e-4)
    best = cost[rows, columns].mean().item()
    assert (plan * cost).sum().item() == pytest.approx(best, abs=1e-4)
    assert (plan[rows, columns] * 20 > 0.5).all()


def test_small_epsilon_with_masses_is_the_linear_program():
    rows, columns = 8, 11
    cost, a, b = rand(rows, columns), mass(rows, seed=1), mass(columns, seed=2)
    sums = np.zeros((rows + columns, rows * columns))
    for i in range(rows):
        sums[i, i * columns : (i + 1) * columns] = 1
    for j in range(columns):
        sums[rows + j, j::columns] = 1
    best = linprog(cost.numpy().ravel(), A_eq=sums, b_eq=np.concatenate([a, b]))
    for transpose in (False, True):
        problem = (cost.mT, b, a) if transpose else (cost, a, b)
        plan = sinkhorn_plan(problem[0], 1e-5, a=problem[1], b=problem[2])
        assert (plan * problem[0]).sum().item() == pytest.approx(best.fun, abs=1e-4)


def test_large_epsilon_is_the_product_of_the_marginals():
    a, b = mass(4, seed=1), mass(6, seed=2)
    plan = sinkhorn_plan(rand(4, 6), 1e8, a=a, b=b)
    torch.testing.assert_close(plan, torch.outer(a, b), rtol=0, atol=1e-8)


@QUICK
@given(seeds, epsilons)
def test_two_by_two_closed_form(seed, epsilon):
    cost = rand(2, 2, seed=seed)
    kernel = torch.exp(-cost / epsilon)
    same = (kernel[0, 0] * kernel[1, 1]).sqrt()
    other = (kernel[0, 1] * kernel[1, 0]).sqrt()
    plan = sinkhorn_plan(cost, epsilon, tolerance=1e-13)
    assert 2 * plan[0, 0].item() == pytest.approx((same / (same + other)).item(), abs=1e-9)


def test_worked_example_is_done_after_one_iteration():
    cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=F64)
    for count in (1, 7, None):
        plan = sinkhorn_plan(cost, 0.5, num_iterations=count)
        assert 2 * plan[0, 0].item() == pytest.approx(0.880797, abs=1e-6)
        assert 2 * (plan * cost).sum().item() == pytest.approx(0.238406, abs=1e-6)
    swapped = sinkhorn_plan(cost.flip(1), 0.5)
    assert 2 * (swapped * cost.flip(1)).sum().item() == pytest.approx(0.238406, abs=1e-6)


def test_one_item_is_the_whole_mass():
    for count in (1, None):
        assert sinkhorn_plan(torch.tensor([[3.0]]), 0.1, num_iterations=count).tolist() == [[1.0]]
    plan = sinkhorn_plan(rand(1, 4), 0.1)
    torch.testing.assert_close(plan, uniform(4).unsqueeze(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("epsilon", [0.3, 0.05, 0.01])
def test_plan_agrees_with_pot(epsilon):
    cost, a, b = rand(12, 9), mass(12, seed=1), mass(9, seed=2)
    plan = sinkhorn_plan(cost, epsilon, a=a, b=b, tolerance=1e-13)
    for method in ("sinkhorn", "sinkhorn_log"):
        other = ot.sinkhorn(
            *(x.numpy() for x in (a, b, cost)), epsilon, method, stopThr=1e-13, numItermax=20_000
        )
        np.testing.assert_allclose(plan.numpy(), other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("count", [1, 3, None])
def test_permuting_items_permutes_the_plan(count):
    cost = rand(6, 6)
    rows, columns = torch.randperm(6), torch.randperm(6)
    plan = sinkhorn_plan(cost, 0.1, num_iterations=count, tolerance=1e-14)
    permuted = sinkhorn_plan(cost[rows][:, columns], 0.1, num_iterations=count, tolerance=1e-14)
    torch.testing.assert_close(permuted, plan[rows][:, columns], rtol=0, atol=1e-12)


def test_swapping_the_clouds_transposes_the_converged_plan():
    cost, a, b = rand(5, 8), mass(5, seed=1), mass(8, seed=2)
    for epsilon in (0.1, 1e-3):
        plan = sinkhorn_plan(cost, epsilon, a=a, b=b, tolerance=1e-12)
        other = sinkhorn_plan(cost.mT, epsilon, a=b, b=a, tolerance=1e-12)
        torch.testing.assert_close(other.mT, plan, rtol=0, atol=1e-9)


def test_potentials_added_to_the_cost_leave_the_converged_plan():
    cost, u, v = rand(6, 7), 5 * rand(6, 1, seed=1), 5 * rand(1, 7, seed=2)
    plan = sinkhorn_plan(cost, 0.1, tolerance=1e-13)
    shifted = sinkhorn_plan(cost + u + v, 0.1, tolerance=1e-13)
    torch.testing.assert_close(shifted, plan, rtol=0, atol=1e-9)


@QUICK
@given(seeds)
def test_transport_cost_rises_with_epsilon_between_assignment_and_mean(seed):
    cost = 2 * rand(6, 6, seed=seed)
    values = [(sinkhorn_plan(cost, e) * cost).sum().item() for e in (1e-3, 0.03, 0.1, 1.0, 100.0)]
    rows, columns = linear_sum_assignment(cost.numpy())
    bounds = [cost[rows, columns].mean().item(), *values, cost.mean().item()]
    assert all(low <= high + 1e-8 for low, high in itertools.pairwise(bounds))


def test_row_error_falls_geometrically():
    cost, counts = rand(10, 10), (10, 20, 30, 40)
    errors = [
        (sinkhorn_plan(cost, 0.1, num_iterations=k).sum(1) - 0.1).abs().max().item() for k in counts
    ]
    first, second, third = (later / earlier for earlier, later in itertools.pairwise(errors))
    assert first < 0.5
    assert second == pytest.approx(third, rel=0.1)


# --- extremes ---


@pytest.mark.parametrize("share", [1e-3, 1e-4, 1e-6])
@pytest.mark.parametrize("with_masses", [False, True])
def test_tiny_epsilon_converges(share, with_masses):
    cost = torch.cdist(rand(32, 3), rand(32, 3, seed=1)) ** 2
    a, b = (mass(32, seed=2), mass(32, seed=3)) if with_masses else (uniform(32), uniform(32))
    plan = sinkhorn_plan(cost, share * cost.max().item(), a=a, b=b)
    assert plan.isfinite().all()
    assert marginal_error(plan, a, b) <= 1e-9


def test_over_relaxed_scaling_ends_with_exact_columns_and_the_optimal_form():
    # slow, yet without underflow: plain scaling needs about 700 iterations
    cost, epsilon = torch.cdist(rand(40, 2), rand(40, 2, seed=1)), 0.02
    a, b = mass(40, seed=2), mass(40, seed=3)
    plan = sinkhorn_plan(cost, epsilon, a=a, b=b, tolerance=1e-13)
    torch.testing.assert_close(plan.sum(0), b, rtol=0, atol=1e-15)
    expected = sinkhorn_plan(cost, epsilon, a=a, b=b, num_iterations=4000)
    torch.testing.assert_close(plan, expected, rtol=0, atol=1e-9)


def test_skewed_masses_converge_at_tiny_epsilon():
    cost, a, b = rand(9, 9), rand(9, seed=1) ** 9, mass(9, seed=2)
    a = a / a.sum()
    for epsilon in (1e-2, 1e-3, 1e-5):
        assert marginal_error(sinkhorn_plan(cost, epsilon, a=a, b=b), a, b) <= 1e-9
        low = sinkhorn_plan(cost.float(), epsilon, a=a.float(), b=b.float())
        assert marginal_error(low.double(), a, b) <= 2e-7 / epsilon


def test_tiny_epsilon_plan_has_the_form_of_the_optimum():
    # log P + C / epsilon must be a sum of a row and a column term where P has not underflowed
    cost, epsilon = rand(6, 6), 5e-3
    plan = sinkhorn_plan(cost, epsilon, a=mass(6, seed=1), b=mass(6, seed=2), tolerance=1e-13)
    form = plan.log() + cost / epsilon
    centred = form - form.mean(0) - form.mean(1, keepdim=True) + form.mean()
    assert centred.abs().max().item() < 1e-9


def test_costs_of_ten_thousand_and_large_offsets():
    cost = 1e4 * rand(16, 16)
    for count in (1, 50, None):
        assert sinkhorn_plan(cost, 1.0, num_iterations=count).isfinite().all()
    assert marginal_error(sinkhorn_plan(cost, 1.0), uniform(16), uniform(16)) <= 1e-9
    torch.testing.assert_close(
        sinkhorn_plan(cost / 1e4 + 1e4, 0.1), sinkhorn_plan(cost / 1e4, 0.1), rtol=0, atol=1e-9
    )


def test_constant_cost_gives_the_product():
    cost = torch.full((3, 5), 2.0, dtype=F64)
    for count in (1, None):
        plan = sinkhorn_plan(cost, 0.1, num_iterations=count)
        torch.testing.assert_close(plan, torch.full_like(cost, 1 / 15))


@pytest.mark.parametrize("epsilon", [0.1, 1e-3])
@pytest.mark.parametrize("count", [30, None])
def test_items_of_zero_mass_are_left_out(epsilon, count):
    cost, a, b = rand(7, 6), mass(7, seed=1), mass(6, seed=2)
    a[2] = b[0] = b[5] = 0
    a, b = a / a.sum(), b / b.sum()
    rows, columns = a > 0, b > 0
    plan = sinkhorn_plan(cost, epsilon, a=a, b=b, num_iterations=count, tolerance=1e-12)
    assert (plan[~rows] == 0).all()
    assert (plan[:, ~columns] == 0).all()
    kept = sinkhorn_plan(
        cost[rows][:, columns],
        epsilon,
        a=a[rows],
        b=b[columns],
        num_iterations=count,
        tolerance=1e-12,
    )
    torch.testing.assert_close(plan[rows][:, columns], kept, rtol=0, atol=1e-9)


@pytest.mark.parametrize("count", [5, None])
def test_zero_mass_gives_finite_gradients(count):
    cost = rand(4, 4).requires_grad_()
    a = torch.tensor([0.0, 0.3, 0.3, 0.4], dtype=F64, requires_grad=True)
    (sinkhorn_plan(cost, 0.1, a=a, b=a, num_iterations=count) * cost).sum().backward()
    assert cost.grad.isfinite().all()
    assert a.grad.isfinite().all()


def test_masses_are_divided_by_their_sum():
    cost, a = rand(4, 3), mass(4, seed=1)
    torch.testing.assert_close(
        sinkhorn_plan(cost, 0.1, a=7 * a), sinkhorn_plan(cost, 0.1, a=a), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("epsilon", [0.1, 1e-3])
@pytest.mark.parametrize("count", [20, None])
def test_batch_equals_a_loop(epsilon, count):
    cost, a, b = rand(2, 3, 5, 4), mass(2, 3, 5, seed=1), mass(4, seed=2)
    plan = sinkhorn_plan(cost, epsilon, a=a, b=b, num_iterations=count, tolerance=1e-13)
    assert plan.shape == cost.shape
    for i in range(2):
        for j in range(3):
            single = sinkhorn_plan(
                cost[i, j], epsilon, a=a[i, j], b=b, num_iterations=count, tolerance=1e-13
            )
            torch.testing.assert_close(plan[i, j], single, rtol=0, atol=1e-9)


def test_non_contiguous_inputs_and_inputs_left_alone():
    wide = rand(8, 12)
    cost = wide[::2, ::3].mT
    before = wide.clone()
    for count in (5, None):
        plan = sinkhorn_plan(cost, 0.1, num_iterations=count)
        torch.testing.assert_close(plan, sinkhorn_plan(cost.clone(), 0.1, num_iterations=count))
    assert torch.equal(wide, before)
    expanded = rand(1, 4).expand(3, 4)
    for count in (5, None):
        plan = sinkhorn_plan(expanded, 0.1, num_iterations=count)
        assert marginal_error(plan, uniform(3), uniform(4)) <= 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [20, None])
def test_low_precision_keeps_its_dtype_and_the_value(dtype, count, recwarn):
    cost = rand(9, 9).to(dtype)
    for epsilon in (0.1, 1e-3):
        plan = sinkhorn_plan(cost, epsilon, num_iterations=count)
        assert plan.dtype == dtype
        exact = sinkhorn_plan(cost.double(), epsilon, num_iterations=count)
        close = 1e-3 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(plan.double(), exact, rtol=0, atol=close)
    assert not recwarn


# --- gradients ---


@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("count", [1, 6, None])
def test_gradient_in_cost_and_masses(shape, count):
    cost = rand(*shape).requires_grad_()
    a = mass(*shape[:-1], seed=1).requires_grad_()
    b = mass(shape[-1], seed=2).requires_grad_()

    def plan(cost, a, b):
        return sinkhorn_plan(cost, 0.2, a=a, b=b, num_iterations=count, tolerance=1e-15)

    assert gradcheck(plan, (cost, a, b), atol=1e-6)


def test_gradient_of_a_newton_plan():
    # small enough for Newton steps to be needed, large enough for differences to be resolved
    cost = rand(4, 4).requires_grad_()
    assert gradcheck(
        lambda c: sinkhorn_plan(c, 0.02, tolerance=1e-15), cost, eps=1e-7, atol=1e-4, rtol=1e-3
    )


def test_second_derivatives_of_the_converged_plan():
    cost = rand(3, 3).requires_grad_()
    assert gradgradcheck(lambda c: sinkhorn_plan(c, 0.3, tolerance=1e-15), cost, atol=1e-5)


def test_gradient_across_absorptions_is_that_of_the_plain_loop(monkeypatch):
    monkeypatch.setattr(_scaling, "absorption_interval", lambda cost: 2)
    cost = rand(5, 5).requires_grad_()
    weight = rand(5, 5, seed=1)
    plans = (
        sinkhorn_plan(cost, 0.1, num_iterations=7),
        plain_loop(cost, 0.1, uniform(5), uniform(5), 7),
    )
    grads = [torch.autograd.grad((plan * weight).sum(), cost)[0] for plan in plans]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-9)


def test_implicit_gradient_is_the_limit_of_the_unrolled_one():
    cost = rand(6, 6).requires_grad_()
    weight = rand(6, 6, seed=1)
    grads = [
        torch.autograd.grad((sinkhorn_plan(cost, 0.1, **how) * weight).sum(), cost)[0]
        for how in ({"num_iterations": 400}, {"tolerance": 1e-14})
    ]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-9)


def test_gradient_vanishes_where_the_plan_has_become_an_assignment():
    cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=F64, requires_grad=True)
    (grad,) = torch.autograd.grad(sinkhorn_plan(cost, 1e-3)[0, 0], cost)
    assert grad.abs().max().item() < 1e-9


def test_unrolled_plan_maps_over_a_batch_with_vmap():
    cost = rand(3, 4, 4)
    mapped = torch.func.vmap(lambda c: sinkhorn_plan(c, 0.1, num_iterations=5))(cost)
    torch.testing.assert_close(mapped, sinkhorn_plan(cost, 0.1, num_iterations=5))


def test_unrolled_plan_compiles_without_a_graph_break():
    cost = rand(4, 4)
    compiled = torch.compile(
        lambda c: sinkhorn_plan(c, 0.1, num_iterations=3), backend="eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(cost), sinkhorn_plan(cost, 0.1, num_iterations=3))


# --- potentials and warm starts ---


@pytest.mark.parametrize("epsilon", [0.1, 1e-4])
@pytest.mark.parametrize("count", [3, None])
@pytest.mark.parametrize("shape", [(6, 5), (5, 6), (2, 4, 4)])
def test_plan_is_the_exponential_of_its_potentials_less_the_cost(shape, count, epsilon):
    cost, a, b = rand(*shape), mass(shape[-2], seed=1), mass(shape[-1], seed=2)
    how = {"a": a, "b": b, "num_iterations": count}
    plan, f, g = module.sinkhorn_potentials(cost, epsilon, **how)
    torch.testing.assert_close(plan, sinkhorn_plan(cost, epsilon, **how), rtol=0, atol=0)
    implied = ((f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / epsilon).exp()
    torch.testing.assert_close(implied, plan, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("epsilon", [0.1, 1e-4])
def test_one_iteration_from_the_solution_is_the_solution(epsilon):
    cost, a, b = rand(6, 5), mass(6, seed=1), mass(5, seed=2)
    how = {"a": a, "b": b}
    plan, _, g = module.sinkhorn_potentials(cost, epsilon, tolerance=1e-14, **how)
    warm = sinkhorn_plan(cost, epsilon, num_iterations=1, start=g, **how)
    torch.testing.assert_close(warm, plan, rtol=0, atol=1e-10)
    cold = sinkhorn_plan(cost, epsilon, num_iterations=1, **how)
    assert (cold - plan).abs().max() > 1e-3


def test_potentials_of_a_former_problem_save_iterations():
    cost = torch.cdist(rand(40, 2), rand(40, 2, seed=1))
    moved = cost + 1e-4 * rand(40, 40, seed=2)
    _, _, g = module.sinkhorn_potentials(cost, 0.05)
    exact = sinkhorn_plan(moved, 0.05, tolerance=1e-14)
    warm, cold = (
        (sinkhorn_plan(moved, 0.05, num_iterations=10, start=s) - exact).abs().max()
        for s in (g, None)
    )
    assert warm < 0.01 * cold


@QUICK
@given(seeds, epsilons, st.floats(0, 1e3))
def test_start_does_not_change_the_converged_plan(seed, epsilon, size):
    cost, start = rand(5, 6, seed=seed), size * rand(6, seed=seed + 1)
    plan = sinkhorn_plan(cost, epsilon, tolerance=1e-13)
    other = sinkhorn_plan(cost, epsilon, tolerance=1e-13, start=start)
    torch.testing.assert_close(other, plan, rtol=0, atol=1e-7)


@pytest.mark.parametrize("count", [4, None])
def test_potentials_and_start_are_constants_and_the_gradient_in_the_cost_remains(count):
    cost, start = rand(4, 3).requires_grad_(), rand(3, seed=1).requires_grad_()
    plan, f, g = module.sinkhorn_potentials(cost, 0.2, num_iterations=count, start=start)
    assert plan.requires_grad
    assert not f.requires_grad
    assert not g.requires_grad
    assert torch.autograd.grad(plan[0, 0], start, retain_graph=True, allow_unused=True) == (None,)
    how = {"num_iterations": count, "start": start.detach(), "tolerance": 1e-15}
    assert gradcheck(lambda c: sinkhorn_plan(c, 0.2, **how), cost, atol=1e-6)


def test_items_of_zero_mass_have_potential_minus_infinity_and_may_start():
    cost, b = rand(4, 3), torch.tensor([0.5, 0.0, 0.5], dtype=F64)
    for count in (5, None):
        plan, f, g = module.sinkhorn_potentials(cost, 0.1, b=b, num_iterations=count)
        assert f.isfinite().all()
        assert g.isfinite().tolist() == [True, False, True]
        again = sinkhorn_plan(cost, 0.1, b=b, num_iterations=count, start=g)
        assert (again[:, 1] == 0).all()
        grown = sinkhorn_plan(cost, 0.1, start=g)
        assert marginal_error(grown, uniform(4), uniform(3)) <= 1e-9
        assert plan.sum().item() == pytest.approx(1.0)


def test_potentials_agree_with_the_entropic_values_of_geomloss():
    # its divergence is the debiased *entropic* value, ours the sharp one: they are different
    # numbers. The dual value shows the same optimum; geomloss stops annealing about 1e-4 early.
    geomloss = pytest.importorskip("geomloss")
    x, y, epsilon = rand(12, 2), rand(9, 2, seed=1), 0.05
    cost = torch.cdist(x, y) ** 2 / 2
    plan, f, g = module.sinkhorn_potentials(cost, epsilon)
    value = (f - epsilon * math.log(1 / 12)).mean() + (g - epsilon * math.log(1 / 9)).mean()
    how = {"p": 2, "blur": epsilon**0.5, "scaling": 0.99, "backend": "tensorized"}
    other = geomloss.SamplesLoss("sinkhorn", debias=False, **how)(x, y)
    assert value.item() == pytest.approx(other.item(), rel=2e-3)
    assert abs((plan * cost).sum() - other) > 0.1 * other


# --- the divergence ---


def clouds(seed=0):
    x, y = rand(6, 3, seed=seed), rand(5, 3, seed=seed + 1)
    return torch.cdist(x, y), torch.cdist(x, x), torch.cdist(y, y)


@pytest.mark.parametrize("count", [20, None])
def test_divergence_is_the_debiased_transport_cost(count):
    xy, xx, yy = clouds()
    a, b = mass(6, seed=3), mass(5, seed=4)
    how = {"num_iterations": count}
    terms = [
        (sinkhorn_plan(c, 0.1, a=s, b=t, **how) * c).sum()
        for c, s, t in ((xy, a, b), (xx, a, a), (yy, b, b))
    ]
    value = sinkhorn_divergence(xy, xx, yy, 0.1, a=a, b=b, **how)
    assert value.item() == pytest.approx((terms[0] - terms[1] / 2 - terms[2] / 2).item(), abs=1e-9)


def test_divergence_of_identical_clouds_is_zero_where_the_transport_cost_is_not():
    _, cost, _ = clouds()
    assert sinkhorn_divergence(cost, cost, cost, 0.1).item() == pytest.approx(0.0, abs=1e-15)
    assert (sinkhorn_plan(cost, 0.1) * cost).sum().item() > 0.01
    same = torch.zeros(4, 4, dtype=F64)
    assert sinkhorn_divergence(same, same, same, 0.1).item() == 0.0


def test_detached_plans_give_the_plan_as_gradient_of_the_transport_cost():
    problem = [c.requires_grad_() for c in clouds()]
    a = mass(6, seed=3).requires_grad_()
    for count in (20, None):
        how = {"a": a, "num_iterations": count}
        detached = sinkhorn_divergence(*problem, 0.1, gradient="detach", **how)
        torch.testing.assert_close(detached, sinkhorn_divergence(*problem, 0.1, **how))
        grads = torch.autograd.grad(detached, [*problem, a], allow_unused=True)
        xy, xx, yy = problem
        plans = (
            sinkhorn_plan(xy, 0.1, **how),
            sinkhorn_plan(xx, 0.1, b=a, **how) / -2,
            sinkhorn_plan(yy, 0.1, num_iterations=count) / -2,
        )
        for grad, plan in zip(grads, plans, strict=False):
            torch.testing.assert_close(grad, plan.detach())
        assert grads[3] is None


def test_divergence_from_the_potentials_of_its_three_plans_is_the_converged_one():
    problem = clouds()
    start = [module.sinkhorn_potentials(c, 0.1, tolerance=1e-14).columns for c in problem]
    warm = sinkhorn_divergence(*problem, 0.1, num_iterations=1, start=start)
    exact = sinkhorn_divergence(*problem, 0.1, tolerance=1e-14)
    torch.testing.assert_close(warm, exact, rtol=0, atol=1e-9)


def test_divergence_is_symmetric():
    xy, xx, yy = clouds()
    one = sinkhorn_divergence(xy, xx, yy, 0.1, tolerance=1e-13)
    two = sinkhorn_divergence(xy.mT, yy, xx, 0.1, tolerance=1e-13)
    assert one.item() == pytest.approx(two.item(), abs=1e-9)


def test_divergence_takes_batches_and_has_a_gradient():
    problems = [clouds(seed) for seed in (0, 10)]
    batch = [torch.stack(costs).requires_grad_() for costs in zip(*problems, strict=True)]
    value = sinkhorn_divergence(*batch, 0.1)
    for i, costs in enumerate(problems):
        assert value[i].item() == pytest.approx(sinkhorn_divergence(*costs, 0.1).item(), abs=1e-8)
    assert gradcheck(lambda *c: sinkhorn_divergence(*c, 0.3, tolerance=1e-15), batch, atol=1e-6)


# --- errors ---


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cost": torch.ones(3)}, ValueError, "cost must have shape"),
        ({"cost": torch.ones(0, 3)}, ValueError, "cost must not be empty"),
        ({"cost": torch.ones(3, 3, dtype=torch.long)}, TypeError, "cost must have a floating"),
        ({"cost": [[1.0]]}, TypeError, "cost must be a torch.Tensor"),
        ({"cost": torch.tensor([[math.nan, 1.0, 1.0]] * 4)}, ValueError, "cost must be finite"),
        ({"cost": torch.tensor([[math.inf, 1.0, 1.0]] * 4)}, ValueError, "cost must be finite"),
        ({"epsilon": 0.0}, ValueError, "epsilon must be > 0"),
        ({"epsilon": math.nan}, ValueError, "epsilon"),
        ({"epsilon": "small"}, TypeError, "epsilon must be a number"),
        ({"tolerance": -1.0}, ValueError, "tolerance must be >= 0"),
        ({"num_iterations": 0}, ValueError, "num_iterations must be >= 1"),
        ({"num_iterations": 2.0}, TypeError, "num_iterations must be an int"),
        ({"a": torch.ones(3)}, ValueError, r"a must have shape \[4\]"),
        ({"start": torch.ones(4)}, ValueError, r"start must have shape \[3\]"),
        ({"start": torch.ones(3, dtype=torch.long)}, TypeError, "start must have a floating"),
        ({"b": torch.ones(2, 3)}, ValueError, r"b must have shape \[3\]"),
        ({"a": torch.ones(4, dtype=torch.long)}, TypeError, "a must have a floating"),
        ({"a": torch.tensor([-1.0, 1, 1, 1])}, ValueError, "a must be finite and non-negative"),
        ({"a": -torch.ones(4)}, ValueError, "a must be finite and non-negative"),
        ({"b": torch.zeros(3)}, ValueError, "b must be finite and non-negative"),
        ({"b": torch.tensor([math.nan, 1, 1])}, ValueError, "b must be finite and non-negative"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {"cost": torch.ones(4, 3), "epsilon": 0.1} | change
    with pytest.raises(error, match=message):
        sinkhorn_plan(**arguments)


def test_wrong_self_costs_are_named():
    xy, xx, yy = clouds()
    with pytest.raises(ValueError, match="cost_xx must have shape"):
        sinkhorn_divergence(xy, yy, yy, 0.1)
    with pytest.raises(ValueError, match="cost_yy must have shape"):
        sinkhorn_divergence(xy, xx, xx, 0.1)
    with pytest.raises(ValueError, match="gradient must be one of 'exact', 'detach', got 'none'"):
        sinkhorn_divergence(xy, xx, yy, 0.1, gradient="none")
    with pytest.raises(ValueError, match="start must hold three potentials or None, got 1"):
        sinkhorn_divergence(xy, xx, yy, 0.1, start=[None])


def test_nan_propagates_through_a_fixed_number_of_iterations():
    cost = torch.ones(3, 3)
    cost[0, 0] = math.nan
    assert sinkhorn_plan(cost, 0.1, num_iterations=3).isnan().any()


def test_an_unreached_tolerance_warns_with_the_error_that_was_reached(monkeypatch):
    monkeypatch.setattr(_semi_dual, "_STEPS", 0)
    with pytest.warns(RuntimeWarning, match="marginal error of"):
        sinkhorn_plan(rand(20, 20), 1e-4)
