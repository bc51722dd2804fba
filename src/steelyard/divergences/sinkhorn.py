r"""Entropic optimal transport: Sinkhorn plans and the debiased transport cost.

.. math::
    P^* = \arg\min_P \sum_{ij} P_{ij} C_{ij} + \epsilon \sum_{ij} P_{ij} (\log P_{ij} - 1),
    \qquad P 1 = a, \quad P^T 1 = b.

The minimiser is ``P = diag(u) exp(-C/epsilon) diag(v)``; an iteration scales the rows to ``a``,
then the columns to ``b``. The products run on a kernel into which the scalings are absorbed before
they could overflow, so that no ``epsilon`` underflows. Where scaling is slow, it is over-relaxed;
where that is slow too, damped Newton steps on the dual finish, ``epsilon`` coming down from the
range of the costs.

Sources: Cuturi (2013), arXiv:1306.0895; Schmitzer (2019), arXiv:1610.06519 (absorption, scaling of
epsilon); Brauer et al. (2017), arXiv:1710.06635 (Newton); Cui et al. (2024), arXiv:2402.17110.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steelyard._checks import check_floating, check_not_empty, check_range, check_shape
from steelyard._reduce import accumulation_dtype
from steelyard.divergences._semi_dual import newton_plan, solve_schur, weighted_rows

__all__ = ["sinkhorn_divergence", "sinkhorn_plan"]

# Scalings before Newton takes over: about the price of a Newton solve, so that the wrong choice
# costs at most twice the right one.
_PATIENCE = 200
# Iterations over which the rate of convergence is measured.
_WINDOW = 6


def sinkhorn_plan(
    cost: Tensor,
    epsilon: float,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    num_iterations: int | None = None,
    tolerance: float = 1e-9,
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
    _check_problem("cost", cost, epsilon, num_iterations, tolerance)
    check_floating(a=a, b=b)
    dtype = cost.dtype
    for mass in (a, b):
        dtype = dtype if mass is None else torch.promote_types(dtype, mass.dtype)
    work = cost.to(accumulation_dtype(dtype))
    if num_iterations is None:
        _check_mass(a=a, b=b)
    row_mass = _marginal("a", a, work[..., 0])
    column_mass = _marginal("b", b, work[..., 0, :])
    if num_iterations is None:
        plan: Tensor = _ConvergedPlan.apply(  # type: ignore[no-untyped-call]
            work, row_mass, column_mass, epsilon, tolerance
        )
    else:
        plan = _unrolled_plan(work, row_mass, column_mass, epsilon, num_iterations)
    return plan.to(dtype)


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
) -> Tensor:
    r"""Transport cost between two clouds without the bias of the entropy.

    .. math::
        S = W_{xy} - \tfrac12 W_{xx} - \tfrac12 W_{yy}, \qquad W = \langle P, C \rangle,

    ``W`` without the entropy term ("sharp"). It is exactly 0 for identical clouds, where ``W_xy``
    is not, so that its minimum does not shrink a cloud towards its centre. The sharp form can be
    slightly negative.

    Nothing is detached; see :func:`sinkhorn_plan` for the gradient through the plans.

    Args:
        cost_xy: shape ``[.., B, B']``.
        cost_xx: shape ``[.., B, B]``.
        cost_yy: shape ``[.., B', B']``.
        epsilon: strength of the entropy, > 0, in the units of the costs.
        a: mass of ``x``, shape ``[B]`` or ``[.., B]``; default uniform.
        b: mass of ``y``, shape ``[B']`` or ``[.., B']``; default uniform.
        num_iterations: as in :func:`sinkhorn_plan`; default ``None``, until converged.
        tolerance: as in :func:`sinkhorn_plan`.

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

    def transport(cost: Tensor, source: Tensor | None, target: Tensor | None) -> Tensor:
        plan = sinkhorn_plan(
            cost, epsilon, a=source, b=target, num_iterations=num_iterations, tolerance=tolerance
        )
        work = accumulation_dtype(plan.dtype)
        return (plan.to(work) * cost.to(work)).sum((-2, -1))

    value = transport(cost_xy, a, b) - (transport(cost_xx, a, a) + transport(cost_yy, b, b)) / 2
    return value.to(cost_xy.dtype)


def _check_problem(
    name: str, cost: Tensor, epsilon: float, num_iterations: int | None, tolerance: float
) -> None:
    check_floating(**{name: cost})
    if cost.dim() < 2:
        raise ValueError(f"{name} must have shape [.., B, B'], got {list(cost.shape)}")
    check_not_empty(name, cost)
    check_range("epsilon", epsilon, above=0.0, below=math.inf)
    check_range("tolerance", tolerance, at_least=0.0, below=math.inf)
    if num_iterations is None:
        return
    if not isinstance(num_iterations, int) or isinstance(num_iterations, bool):
        found = type(num_iterations).__name__
        raise TypeError(f"num_iterations must be an int or None, got {found}")
    check_range("num_iterations", num_iterations, at_least=1)


def _marginal(name: str, mass: Tensor | None, like: Tensor) -> Tensor:
    if mass is None:
        return torch.full_like(like, 1.0 / like.shape[-1])
    if mass.shape not in (like.shape, like.shape[-1:]):
        raise ValueError(
            f"{name} must have shape {list(like.shape[-1:])} or {list(like.shape)}, "
            f"got {list(mass.shape)}"
        )
    mass = mass.to(like.dtype)
    return (mass / mass.sum(-1, keepdim=True)).expand_as(like)


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


class _Kernel:
    """``K = exp(x_i + y_j - C_ij / epsilon)``; the plan is ``u_i K_ij v_j``.

    ``x`` and ``y`` are the log-scalings absorbed so far, ``u`` and ``v`` the scalings since. Rows
    and columns of zero mass are empty; with ``guard`` their products are tiny instead of 0.
    """

    def __init__(self, cost: Tensor, epsilon: float, x: Tensor, y: Tensor, *, guard: bool) -> None:
        self.x, self.y = x, y
        self.matrix = cost.div(-epsilon).add_(x.unsqueeze(-1)).add_(y.unsqueeze(-2)).exp_()
        # Batched products are 5 times faster with the vector at the left.
        self.batched = cost.dim() > 2
        self.transposed = self.matrix.mT.contiguous() if self.batched else self.matrix.mT
        self.guard = torch.finfo(cost.dtype).tiny if guard else None

    def rows(self, v: Tensor) -> Tensor:
        """Return ``K v``."""
        return self.guarded(
            weighted_rows(v, self.transposed) if self.batched else self.matrix.mv(v)
        )

    def columns(self, u: Tensor) -> Tensor:
        """Return ``K^T u``."""
        return self.guarded(
            weighted_rows(u, self.matrix) if self.batched else self.transposed.mv(u)
        )

    def guarded(self, total: Tensor) -> Tensor:
        """Return ``total`` fit to be divided by: 0 / tiny at items of zero mass."""
        return total if self.guard is None else total.clamp(min=self.guard)

    def absorb(
        self, cost: Tensor, epsilon: float, u: Tensor, v: Tensor
    ) -> tuple["_Kernel", Tensor, Tensor]:
        """Move the values of ``u`` and ``v`` into the kernel; ``u / u`` keeps the gradient."""
        flat_u, flat_v = u.detach(), v.detach()
        x, y = self.x + flat_u.log(), self.y + flat_v.log()
        kernel = _Kernel(cost, epsilon, x, y, guard=self.guard is not None)
        return kernel, u / _positive(flat_u), v / _positive(flat_v)


def _positive(mass: Tensor) -> Tensor:
    return torch.where(mass > 0, mass, 1.0)


def _start(cost: Tensor, a: Tensor, b: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``x, y, v`` such that no entry exceeds 1 and each row and column has a 1 in it.

    Then ``v = exp(-y)`` stands for the unscaled columns; entries that underflow are negligible.
    """
    free_rows, free_columns = (torch.where(mass > 0, 0.0, math.inf) for mass in (a, b))
    scaled = cost / epsilon
    x = scaled.add(free_columns.unsqueeze(-2)).amin(-1)
    y = scaled.sub_((x - free_rows).unsqueeze(-1)).amin(-2)
    return x - free_rows, y - free_columns, torch.where(b > 0, torch.exp(-y), 0.0)


def _absorption_interval(cost: Tensor) -> int:
    """Iterations after which scalings are still below a third of the dtype's exponent range.

    An iteration changes a scaling by at most ``B B'`` (times how far masses are from uniform, for
    which the other two thirds leave room).
    """
    bound = math.log(cost.shape[-1] * cost.shape[-2] + 1)
    return max(1, int(-math.log(torch.finfo(cost.dtype).tiny) / 3 / bound))


def _unrolled_plan(cost: Tensor, a: Tensor, b: Tensor, epsilon: float, count: int) -> Tensor:
    x, y, v = _start(cost.detach(), a.detach(), b.detach(), epsilon)
    kernel = _Kernel(cost, epsilon, x, y, guard=True)
    interval = _absorption_interval(cost)
    u = a
    for step in range(count):
        if step > 0 and step % interval == 0:
            kernel, u, v = kernel.absorb(cost, epsilon, u, v)
        u = a / kernel.rows(v)
        v = b / kernel.columns(u)
    return u.unsqueeze(-1) * kernel.matrix * v.unsqueeze(-2)


class _ConvergedPlan(torch.autograd.Function):
    """The converged plan with its implicit gradient."""

    @staticmethod
    def forward(
        ctx: Any, cost: Tensor, a: Tensor, b: Tensor, epsilon: float, tolerance: float
    ) -> Tensor:
        plan = _converged_plan(cost, a, b, epsilon, tolerance)
        ctx.save_for_backward(plan, a, b)
        ctx.epsilon = epsilon
        return plan

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan, a, b = ctx.saved_tensors
        grad = grads[0]
        if plan.shape[-1] <= plan.shape[-2]:
            alpha, beta = _adjoint(plan, a, b, grad)
        else:
            beta, alpha = _adjoint(plan.mT, b, a, grad.mT)
        free = grad - alpha.unsqueeze(-1) - beta.unsqueeze(-2)
        return -plan * free / ctx.epsilon, alpha, beta, None, None


def _adjoint(plan: Tensor, a: Tensor, b: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Solve for the multipliers of the marginal constraints, ``dL/da`` and ``dL/db``.

    ``[[diag a, P], [P^T, diag b]] [alpha; beta] = [(G P) 1; (G P)^T 1]``, ``alpha`` eliminated.
    """
    conditional = plan / _positive(a).unsqueeze(-1)
    weighted = grad * conditional
    rows = weighted.sum(-1)
    columns = weighted_rows(a, weighted) - weighted_rows(a * rows, conditional)
    # Directions in which the plan does not move, up to rounding, get no weight.
    damping = 8 * torch.finfo(plan.dtype).eps
    beta = solve_schur(conditional, a, b, damping * b, columns)
    return rows - weighted_rows(beta, conditional.mT), beta


def _converged_plan(cost: Tensor, a: Tensor, b: Tensor, epsilon: float, tolerance: float) -> Tensor:
    low, high = (value.item() for value in cost.aminmax())
    if not math.isfinite(high - low):
        raise ValueError("cost must be finite, got NaN or infinite entries")
    (least_a, most_a), (least_b, most_b) = (
        (value.item() for value in mass.aminmax()) for mass in (a, b)
    )
    info = torch.finfo(cost.dtype)
    rounding = info.eps * max(most_a, most_b) * (16 + max(-low, high) / epsilon)
    goal = max(tolerance, rounding)
    guard = min(least_a, least_b) == 0
    if (high - low) / epsilon < -math.log(info.tiny) / 3:  # no scaling can overflow
        v = torch.ones_like(b)
        kernel = _Kernel(
            cost, epsilon, _log_blank(a, guard) + low / epsilon, _log_blank(b, guard), guard=guard
        )
        interval = None
    else:
        x, y, v = _start(cost, a, b, epsilon)
        kernel, interval = _Kernel(cost, epsilon, x, y, guard=guard), _absorption_interval(cost)
    scaled = _scaled_plan(cost, a, b, epsilon, goal, kernel, v, interval)
    if scaled.plan is not None:
        return scaled.plan
    if cost.shape[-1] <= cost.shape[-2]:
        return newton_plan(cost, a, b, epsilon, goal, _potential(scaled.y, b, epsilon))
    return newton_plan(cost.mT, b, a, epsilon, goal, _potential(scaled.x, a, epsilon)).mT


class _Scaled(NamedTuple):
    plan: Tensor | None
    x: Tensor
    y: Tensor


def _log_blank(mass: Tensor, guard: bool) -> Tensor:
    """Return the log-scalings of an unscaled kernel: 0, or ``-inf`` at items of zero mass."""
    zeros = torch.zeros_like(mass)
    return zeros.masked_fill_(mass == 0, -math.inf) if guard else zeros


def _potential(log_scaling: Tensor, mass: Tensor, epsilon: float) -> Tensor:
    potential = epsilon * (log_scaling - mass.log())
    return torch.where(potential.isfinite(), potential, 0.0)


def _scaled_plan(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: float,
    goal: float,
    kernel: _Kernel,
    v: Tensor,
    interval: int | None,
) -> _Scaled:
    """Scale until the row error is at most ``goal``; without a plan when patience ends.

    The product that begins an iteration is also the row sum of the plan before it: looking at the
    error costs no product. Slow scalings that need no absorption (``interval`` None) are
    over-relaxed; the last one is always plain, so that columns are exact.
    """
    u, before, relaxation, settling = a, math.inf, 1.0, False
    for step in range(_PATIENCE):
        total = kernel.rows(v)
        rows = u * total
        if settling or 0 < step <= 2 * _WINDOW or step % 3 == 0 < step:
            error = torch.dist(rows, a, math.inf).item()
            if error <= goal and (settling or relaxation == 1.0):
                plan = kernel.matrix.mul_(u.unsqueeze(-1)).mul_(v.unsqueeze(-2))
                return _Scaled(plan, kernel.x, kernel.y)
            settling = error <= goal
            if interval is None and step % _WINDOW == 0 and not settling:
                relaxation, before = _relaxation(relaxation, error / before), error
        if settling or relaxation == 1.0:
            u = a / total
            v = b / kernel.columns(u)
        else:
            u = a / total * (a / kernel.guarded(rows)) ** (relaxation - 1)
            total = kernel.columns(u)
            v = b / total * (b / kernel.guarded(v * total)) ** (relaxation - 1)
        if interval is not None and (step + 1) % interval == 0:
            kernel, u, v = kernel.absorb(cost, epsilon, u, v)
    return _Scaled(None, kernel.x + u.log(), kernel.y + v.log())


def _relaxation(current: float, drop: float) -> float:
    """Over-relaxation from the drop of the error over a window, as for successive relaxation.

    A rate ``r`` at relaxation ``w`` shows the plain rate ``(r + w - 1)^2 / (r w^2)``, whose best
    relaxation is ``2 / (1 + sqrt(1 - rate))``. Growing errors return to plain scaling.
    """
    if not 0.0 < drop < 1.0:
        return 1.0
    rate = drop ** (1.0 / _WINDOW)
    plain = min((rate + current - 1.0) ** 2 / (rate * current**2), 0.9995)
    return 2.0 / (1.0 + math.sqrt(1.0 - plain))
