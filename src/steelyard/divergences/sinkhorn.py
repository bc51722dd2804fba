r"""Entropic optimal transport: Sinkhorn plans and the debiased transport cost.

.. math::
    P^* = \arg\min_P \sum_{ij} P_{ij} C_{ij} + \epsilon \sum_{ij} P_{ij} (\log P_{ij} - 1),
    \qquad P 1 = a, \quad P^T 1 = b.

The minimiser is ``P = diag(u) exp(-C/epsilon) diag(v)``; an iteration scales the rows to ``a``,
then the columns to ``b``, on a kernel that no ``epsilon`` makes underflow. Where scaling is slow,
damped Newton steps on the dual finish, ``epsilon`` coming down from the range of the costs.

Sources: Cuturi (2013), arXiv:1306.0895; Schmitzer (2019), arXiv:1610.06519 (scaling of epsilon);
Brauer et al. (2017), arXiv:1710.06635 (Newton); Cui et al. (2024), arXiv:2402.17110.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from steelyard._checks import (
    check_choice,
    check_count,
    check_floating,
    check_not_empty,
    check_range,
    check_shape,
    given,
)
from steelyard._reduce import accumulation_dtype
from steelyard.divergences._scaling import (
    absorbed_kernel,
    absorption_interval,
    first_scalings,
    plain_kernel,
    positive,
    scaled_plan,
    unrolled_plan,
)
from steelyard.divergences._semi_dual import newton_plan, solve_schur, weighted_rows

__all__ = ["SinkhornPotentials", "sinkhorn_divergence", "sinkhorn_plan", "sinkhorn_potentials"]


class SinkhornPotentials(NamedTuple):
    """Result of :func:`sinkhorn_potentials`."""

    plan: Tensor
    rows: Tensor
    columns: Tensor


def sinkhorn_plan(
    cost: Tensor,
    epsilon: float,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    num_iterations: int | None = None,
    tolerance: float = 1e-9,
    start: Tensor | None = None,
) -> Tensor:
    r"""The cheapest plan that moves ``a`` onto ``b``, made smooth by entropy.

    .. math::
        P = \arg\min_P \langle P, C\rangle + \epsilon \sum_{ij} P_{ij} (\log P_{ij} - 1),
        \qquad P 1 = a, \quad P^T 1 = b.

    ``epsilon -> 0`` is optimal transport (the assignment problem), ``epsilon -> inf`` the product
    ``a b^T``. Adding a constant to a row or a column of the cost changes nothing.

    Nothing is detached. With ``num_iterations`` the gradient runs through the iterations; with
    ``None`` it is the exact gradient of the converged plan, by implicit differentiation: one linear
    system of the smaller side, whatever the number of iterations. Pass ``cost.detach()`` for a
    constant plan.

    Args:
        cost: ``C``, shape ``[.., B, B']``, finite; leading dimensions are separate problems.
        epsilon: strength of the entropy, > 0, in the units of the cost.
        a: mass of the rows, shape ``[B]`` or ``[.., B]``, non-negative; divided by its sum. Default
            uniform. Items of zero mass are left out and have no gradient.
        b: mass of the columns, shape ``[B']`` or ``[.., B']``, likewise.
        num_iterations: exactly so many row-then-column scalings of ``exp(-cost / epsilon)``, >= 1;
            column sums are then exact, row sums approximate. No value is looked at: NaN propagates
            and the loop can be compiled. Default ``None``: until converged.
        tolerance: largest absolute error of a row or column sum when ``num_iterations`` is
            ``None``, >= 0; never below the rounding of the dtype, which grows as
            ``max|C| / epsilon``.
        start: column potential to begin from, shape ``[B']`` or ``[.., B']``, in the units of the
            cost: ``columns`` of :func:`sinkhorn_potentials` for a similar problem. It changes how
            many iterations are needed, not the converged plan; detached; entries that are not
            finite begin at 0. Default ``None``: all begin at 0.

    Returns:
        Non-negative plan of total mass 1, shape and dtype of ``cost`` (promoted with ``a`` and
        ``b``). Half precision is computed in float32.

    Raises:
        TypeError: a tensor is not floating point or a setting not a number.
        ValueError: a shape or a setting does not fit; without ``num_iterations`` also if the cost
            is not finite or a mass is negative, not finite or zero in total.

    Warns:
        RuntimeWarning: the tolerance was not reached; the message says what was.

    Example:
        At an ``epsilon`` where every entry of ``exp(-cost / epsilon)`` underflows, the plan is
        the assignment:

        >>> cost = torch.tensor([[3.0, 1.0], [2.0, 1.0]])
        >>> sinkhorn_plan(cost, 1e-3)
        tensor([[0.0000, 0.5000],
                [0.5000, 0.0000]])

    Source: Cuturi (2013), arXiv:1306.0895, Algorithm 1; Cui et al. (2024), arXiv:2402.17110.
    """
    return _solve(cost, epsilon, a, b, num_iterations, tolerance, start, potentials=False).plan


def sinkhorn_potentials(
    cost: Tensor,
    epsilon: float,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    num_iterations: int | None = None,
    tolerance: float = 1e-9,
    start: Tensor | None = None,
) -> SinkhornPotentials:
    r"""The plan of :func:`sinkhorn_plan` with its dual potentials, for the next warm start.

    .. math:: P_{ij} = \exp\big((f_i + g_j - C_{ij}) / \epsilon\big)

    ``f`` and ``g`` are unique up to a constant that moves from one to the other. They are
    constants: only the plan has a gradient.

    Args:
        cost: as in :func:`sinkhorn_plan`.
        epsilon: as in :func:`sinkhorn_plan`.
        a: as in :func:`sinkhorn_plan`.
        b: as in :func:`sinkhorn_plan`.
        num_iterations: as in :func:`sinkhorn_plan`.
        tolerance: as in :func:`sinkhorn_plan`.
        start: as in :func:`sinkhorn_plan`.

    Returns:
        ``(plan, rows, columns)``: the plan ``[.., B, B']``, ``f`` ``[.., B]`` and ``g``
        ``[.., B']`` in the units of the cost, ``-inf`` at items of zero mass.

    Raises:
        TypeError: a tensor is not floating point or a setting not a number.
        ValueError: a shape or a setting does not fit; see :func:`sinkhorn_plan`.

    Example:
        One iteration from the potentials of a solution gives the solution:

        >>> cost = torch.tensor([[0.0, 1.0, 4.0], [1.0, 0.0, 1.0], [3.0, 1.0, 0.5]])
        >>> plan, f, g = sinkhorn_potentials(cost, 0.3)
        >>> cold, warm = (sinkhorn_plan(cost, 0.3, num_iterations=1, start=s) for s in (None, g))
        >>> torch.allclose(cold, plan, atol=1e-6), torch.allclose(warm, plan, atol=1e-6)
        (False, True)

    Source: Cuturi (2013), arXiv:1306.0895.
    """
    return _solve(cost, epsilon, a, b, num_iterations, tolerance, start, potentials=True)


def sinkhorn_divergence(
    cost_xy: Tensor,
    cost_xx: Tensor,
    cost_yy: Tensor,
    epsilon: float,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    num_iterations: int | None = None,
    tolerance: float = 1e-9,
    start: Sequence[Tensor | None] = (None, None, None),
    gradient: Literal["exact", "detach"] = "exact",
) -> Tensor:
    r"""Transport cost between two clouds without the bias of the entropy.

    .. math::
        S = W_{xy} - \tfrac12 W_{xx} - \tfrac12 W_{yy}, \qquad W = \langle P, C \rangle,

    ``W`` without the entropy term ("sharp"). It is exactly 0 for identical clouds, where ``W_xy``
    is not, so that its minimum does not shrink a cloud towards its centre. The sharp form can be
    slightly negative.

    By default nothing is detached; see :func:`sinkhorn_plan` for the gradient through the plans.

    Args:
        cost_xy: shape ``[.., B, B']``.
        cost_xx: shape ``[.., B, B]``.
        cost_yy: shape ``[.., B', B']``.
        epsilon: strength of the entropy, > 0, in the units of the costs.
        a: mass of ``x``, shape ``[B]`` or ``[.., B]``; default uniform.
        b: mass of ``y``, shape ``[B']`` or ``[.., B']``; default uniform.
        num_iterations: as in :func:`sinkhorn_plan`; default ``None``, until converged.
        tolerance: as in :func:`sinkhorn_plan`.
        start: column potentials of the three plans (xy, xx, yy), each as in
            :func:`sinkhorn_plan`; detached. Default: none.
        gradient: ``"exact"`` (default), through the iterations or implicit, as
            :func:`sinkhorn_plan` has it; ``"detach"`` holds the plans constant, so that ``dW/dC``
            is ``P``: cheaper, but the gradient of the *entropic* cost, not of ``W``. Masses then
            have no gradient.

    Returns:
        Shape ``[..]`` in the units of the cost, dtype of the costs.

    Raises:
        TypeError: a tensor is not floating point or a setting not a number.
        ValueError: a shape or a setting does not fit; see :func:`sinkhorn_plan`.

    Example:
        The plain cost of a cloud to itself is not 0, the divergence is:

        >>> x = torch.tensor([[0.0], [1.0], [3.0]])
        >>> cost = torch.cdist(x, x)
        >>> (sinkhorn_plan(cost, 1.0) * cost).sum()
        tensor(0.3793)
        >>> sinkhorn_divergence(cost, cost, cost, 1.0)
        tensor(0.)

    Source: Cui et al. (2024), arXiv:2402.17110, debiased as in Genevay et al. (2018),
    arXiv:1706.00292.
    """
    check_floating(cost_xy=cost_xy, cost_xx=cost_xx, cost_yy=cost_yy)
    _check_problem("cost_xy", cost_xy, epsilon, num_iterations, tolerance)
    *batch, rows, columns = cost_xy.shape
    check_shape("cost_xx", cost_xx, (*batch, rows, rows))
    check_shape("cost_yy", cost_yy, (*batch, columns, columns))

    check_choice("gradient", gradient, ("exact", "detach"))
    if not isinstance(start, tuple | list):
        raise TypeError(f"start must be a sequence of three, got {type(start).__name__}")
    if len(start) != 3:
        raise ValueError(f"start must hold three potentials or None, got {len(start)}")

    def transport(
        cost: Tensor, source: Tensor | None, target: Tensor | None, start: Tensor | None
    ) -> Tensor:
        plan = sinkhorn_plan(
            cost.detach() if gradient == "detach" else cost,
            epsilon,
            a=source,
            b=target,
            num_iterations=num_iterations,
            tolerance=tolerance,
            start=start,
        )
        plan = plan.detach() if gradient == "detach" else plan
        work = accumulation_dtype(plan.dtype)
        return (plan.to(work) * cost.to(work)).sum((-2, -1))

    cross = transport(cost_xy, a, b, start[0])
    own = transport(cost_xx, a, a, start[1]) + transport(cost_yy, b, b, start[2])
    return (cross - own / 2).to(cost_xy.dtype)


def _solve(
    cost: Tensor,
    epsilon: float,
    a: Tensor | None,
    b: Tensor | None,
    num_iterations: int | None,
    tolerance: float,
    start: Tensor | None,
    *,
    potentials: bool,
) -> SinkhornPotentials:
    """Check, compute in the accumulation dtype, return in the dtype of the inputs."""
    _check_problem("cost", cost, epsilon, num_iterations, tolerance)
    check_floating(**given(a=a, b=b, start=start))
    dtype = cost.dtype
    for mass in (a, b):
        dtype = dtype if mass is None else torch.promote_types(dtype, mass.dtype)
    work = cost.to(accumulation_dtype(dtype))
    if num_iterations is None:
        _check_mass(a=a, b=b)
    *batch, rows, columns = work.shape
    row_mass = _marginal("a", a, (*batch, rows), work)
    column_mass = _marginal("b", b, (*batch, columns), work)
    begin: Tensor | float = 0.0
    if start is not None:  # a cost less its column potential has the same plan, from 0
        begin = _fit("start", start.detach(), (*batch, columns), work)
        begin = torch.where(begin.isfinite(), begin, 0.0)
        work = work - begin.unsqueeze(-2)
    if num_iterations is None:
        problem = (work, row_mass, column_mass, epsilon, tolerance, potentials)
        if torch.is_grad_enabled() and any(t.requires_grad for t in problem[:3]):
            plan, x, y = _ConvergedPlan.apply(*problem)  # type: ignore[no-untyped-call]
        else:  # a tenth quicker where the plan is small
            plan, x, y = _converged_plan(*problem)
    else:
        scaled = unrolled_plan(work, row_mass, column_mass, epsilon, num_iterations)
        plan, x, y = scaled.plan, scaled.log_rows().detach(), scaled.log_columns().detach()
    if potentials:
        x, y = (epsilon * x).to(dtype), (epsilon * y + begin).to(dtype)
    return SinkhornPotentials(plan.to(dtype), x, y)


def _check_problem(
    name: str, cost: Tensor, epsilon: float, num_iterations: int | None, tolerance: float
) -> None:
    check_floating(**{name: cost})
    if cost.dim() < 2:
        raise ValueError(f"{name} must have shape [.., B, B'], got {list(cost.shape)}")
    check_not_empty(name, cost)
    check_range("epsilon", epsilon, above=0.0, below=math.inf)
    check_range("tolerance", tolerance, at_least=0.0, below=math.inf)
    if num_iterations is not None:
        check_count("num_iterations", num_iterations, expected="an int or None")


def _marginal(name: str, mass: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    if mass is None:
        return torch.full(shape, 1.0 / shape[-1], dtype=like.dtype, device=like.device)
    mass = _fit(name, mass, shape, like)
    return mass / mass.sum(-1, keepdim=True)


def _fit(name: str, vector: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
    if vector.shape not in (shape, shape[-1:]):
        raise ValueError(
            f"{name} must have shape {list(shape[-1:])} or {list(shape)}, got {list(vector.shape)}"
        )
    return vector.to(like.dtype).expand(shape)


def _check_mass(**masses: Tensor | None) -> None:
    for name, mass in masses.items():
        if mass is None:
            continue
        least, most = mass.amin().item(), mass.sum(-1).amin().item()
        if not (least >= 0 and most > 0 and math.isfinite(mass.sum().item())):
            raise ValueError(
                f"{name} must be finite and non-negative with a positive sum, "
                f"got a least entry of {least} and a least sum of {most}"
            )


class _ConvergedPlan(torch.autograd.Function):
    """The converged plan with its implicit gradient, and constant log-scalings if asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        cost: Tensor,
        a: Tensor,
        b: Tensor,
        epsilon: float,
        tolerance: float,
        potentials: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        plan, x, y = _converged_plan(cost, a, b, epsilon, tolerance, potentials)
        ctx.save_for_backward(plan, a, b)
        ctx.epsilon = epsilon
        if x is not None and y is not None:
            ctx.mark_non_differentiable(x, y)
        return plan, x, y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan, a, b = ctx.saved_tensors
        grad = grads[0]
        if plan.shape[-1] <= plan.shape[-2]:
            alpha, beta = _adjoint(plan, a, b, grad)
        else:
            beta, alpha = _adjoint(plan.mT, b, a, grad.mT)
        free = grad - alpha.unsqueeze(-1) - beta.unsqueeze(-2)
        return -plan * free / ctx.epsilon, alpha, beta, None, None, None


def _adjoint(plan: Tensor, a: Tensor, b: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Solve for the multipliers of the marginal constraints, ``dL/da`` and ``dL/db``.

    ``[[diag a, P], [P^T, diag b]] [alpha; beta] = [(G P) 1; (G P)^T 1]``, ``alpha`` eliminated.
    """
    conditional = plan / positive(a).unsqueeze(-1)
    weighted = grad * conditional
    rows = weighted.sum(-1)
    columns = weighted_rows(a, weighted) - weighted_rows(a * rows, conditional)
    # Directions in which the plan does not move, up to rounding, get no weight.
    damping = 8 * torch.finfo(plan.dtype).eps
    beta = solve_schur(conditional, a, b, damping * b, columns)
    return rows - weighted_rows(beta, conditional.mT), beta


def _converged_plan(
    cost: Tensor, a: Tensor, b: Tensor, epsilon: float, tolerance: float, potentials: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    low, high = (value.item() for value in cost.aminmax())
    if not math.isfinite(high - low):
        raise ValueError("cost must be finite, got NaN or infinite entries")
    least, most = (value.item() for value in torch.cat([a.flatten(), b.flatten()]).aminmax())
    info = torch.finfo(cost.dtype)
    rounding = info.eps * most * (16 + max(-low, high) / epsilon)
    goal, guard = max(tolerance, rounding), least == 0
    if (high - low) / epsilon < -math.log(info.tiny) / 3:  # no scaling can overflow
        kernel = plain_kernel(cost, epsilon, low, a, b, guard=guard)
        v, interval = torch.ones_like(b), None
    else:
        x, y, v = first_scalings(cost, a, b, epsilon)
        kernel = absorbed_kernel(cost, epsilon, x, y, guard=guard)
        interval = absorption_interval(cost)
    scaled = scaled_plan(cost, a, b, epsilon, goal, kernel, v, interval)
    if scaled.plan is not None:
        scalings = (scaled.log_rows(), scaled.log_columns()) if potentials else (None, None)
        return scaled.plan, *scalings
    if cost.shape[-1] <= cost.shape[-2]:
        g = _potential(scaled.log_columns(), b, epsilon)
        return newton_plan(cost, a, b, epsilon, goal, g)
    f = _potential(scaled.log_rows(), a, epsilon)
    plan, y, x = newton_plan(cost.mT, b, a, epsilon, goal, f)
    return plan.mT, x, y


def _potential(log_scaling: Tensor, mass: Tensor, epsilon: float) -> Tensor:
    potential = epsilon * (log_scaling - mass.log())
    return torch.where(potential.isfinite(), potential, 0.0)
