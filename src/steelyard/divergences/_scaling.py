r"""Sinkhorn scaling on a kernel that never underflows.

The plan is ``diag(u) K diag(v)`` with ``K = exp(x_i + y_j - C_ij / epsilon)``: log-scalings ``x``
and ``y`` are absorbed into the kernel before ``u`` and ``v`` could overflow: an iteration is two
matrix-vector products whatever ``epsilon``. Where scaling is slow, it is over-relaxed.

Source: Schmitzer (2019), arXiv:1610.06519 (absorption).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from steelyard.divergences._semi_dual import weighted_rows

# Scalings before Newton takes over: about the price of a Newton solve, so that the wrong choice
# costs at most twice the right one.
_PATIENCE = 200
# The step at which the error is first looked at, and the steps over which its rate is measured.
_FIRST_LOOK, _WINDOW = 2, 6


class Kernel:
    """``K``, and the log-scalings ``x``, ``y`` absorbed in it.

    Rows and columns of zero mass are empty; with ``guard`` their products are tiny instead of 0.
    """

    def __init__(self, matrix: Tensor, x: Tensor, y: Tensor, *, guard: bool) -> None:
        self.matrix, self.x, self.y = matrix, x, y
        # Batched products are 5 times faster with the vector at the left.
        self.batched = matrix.dim() > 2
        self.transposed = matrix.mT.contiguous() if self.batched else matrix.mT
        self.guard = torch.finfo(matrix.dtype).tiny if guard else None

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
    ) -> tuple["Kernel", Tensor, Tensor]:
        """Move the values of ``u`` and ``v`` into the kernel; ``u / u`` keeps the gradient."""
        flat_u, flat_v = u.detach(), v.detach()
        x, y = self.x + flat_u.log(), self.y + flat_v.log()
        kernel = absorbed_kernel(cost, epsilon, x, y, guard=self.guard is not None)
        return kernel, u / positive(flat_u), v / positive(flat_v)


@dataclass(frozen=True)
class Scaled:
    """A plan and its scalings; no plan where the patience ended first."""

    plan: Tensor | None
    kernel: Kernel
    u: Tensor
    v: Tensor

    def log_rows(self) -> Tensor:
        """Return ``x + log u``."""
        return self.kernel.x + self.u.log()

    def log_columns(self) -> Tensor:
        """Return ``y + log v``."""
        return self.kernel.y + self.v.log()


def positive(mass: Tensor) -> Tensor:
    """Return ``mass`` with 1 for 0, to divide by."""
    return torch.where(mass > 0, mass, 1.0)


def plain_kernel(
    cost: Tensor, epsilon: float, low: float, a: Tensor, b: Tensor, *, guard: bool
) -> Kernel:
    """Return the unscaled kernel, for costs so close to ``low`` that no scaling can overflow."""
    x, y = torch.full_like(a, low / epsilon), torch.zeros_like(b)
    if guard:
        x, y = x.masked_fill_(a == 0, -math.inf), y.masked_fill_(b == 0, -math.inf)
        return absorbed_kernel(cost, epsilon, x, y, guard=True)
    return Kernel(torch.sub(cost, low).mul_(-1 / epsilon).exp_(), x, y, guard=False)


def absorbed_kernel(cost: Tensor, epsilon: float, x: Tensor, y: Tensor, *, guard: bool) -> Kernel:
    """Return the kernel with the log-scalings ``x`` and ``y``."""
    scores = cost.div(-epsilon).add_(x.unsqueeze(-1)).add_(y.unsqueeze(-2))
    return Kernel(scores.exp_(), x, y, guard=guard)


def first_scalings(
    cost: Tensor, a: Tensor, b: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``x, y, v`` such that no entry exceeds 1 and each row and column has a 1 in it.

    Then ``v = exp(-y)`` stands for the unscaled columns; entries that underflow are negligible.
    """
    free_rows, free_columns = (torch.where(mass > 0, 0.0, math.inf) for mass in (a, b))
    scaled = cost / epsilon
    x = scaled.add(free_columns.unsqueeze(-2)).amin(-1)
    y = scaled.sub_((x - free_rows).unsqueeze(-1)).amin(-2)
    return x - free_rows, y - free_columns, torch.where(b > 0, torch.exp(-y), 0.0)


def absorption_interval(cost: Tensor) -> int:
    """Iterations after which scalings are still below a third of the dtype's exponent range.

    An iteration changes a scaling by at most ``B B'`` (times how far masses are from uniform, for
    which the other two thirds leave room).
    """
    bound = math.log(cost.shape[-1] * cost.shape[-2] + 1)
    return max(1, int(-math.log(torch.finfo(cost.dtype).tiny) / 3 / bound))


def unrolled_plan(cost: Tensor, a: Tensor, b: Tensor, epsilon: float, count: int) -> Scaled:
    """Scale exactly ``count`` times, looking at no value."""
    x, y, v = first_scalings(cost.detach(), a.detach(), b.detach(), epsilon)
    kernel = absorbed_kernel(cost, epsilon, x, y, guard=True)
    interval = absorption_interval(cost)
    u = a
    for step in range(count):
        if step > 0 and step % interval == 0:
            kernel, u, v = kernel.absorb(cost, epsilon, u, v)
        u = a / kernel.rows(v)
        v = b / kernel.columns(u)
    return Scaled(u.unsqueeze(-1) * kernel.matrix * v.unsqueeze(-2), kernel, u, v)


def scaled_plan(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: float,
    goal: float,
    kernel: Kernel,
    v: Tensor,
    interval: int | None,
) -> Scaled:
    """Scale until the row error is at most ``goal``; without a plan when patience ends.

    The product that begins an iteration is also the row sum of the plan before it: looking at the
    error costs no product. Slow scalings that need no absorption (``interval`` None) are
    over-relaxed; the last one is always plain, so that columns are exact.
    """
    u, pace, settling = a, _Pace(goal, may_relax=interval is None), False
    for step in range(_PATIENCE):
        total = kernel.rows(v)
        if settling or step >= pace.look:
            error = torch.dist(u * total, a, math.inf).item()
            if error <= goal and (settling or pace.relaxation == 1.0):
                plan = kernel.matrix.mul_(u.unsqueeze(-1)).mul_(v.unsqueeze(-2))
                return Scaled(plan, kernel, u, v)
            settling = error <= goal
            if not settling:
                pace.see(step, error)
        if settling or pace.relaxation == 1.0:
            u = a / total
            v = b / kernel.columns(u)
        else:
            u = u * (a / kernel.guarded(u * total)).pow_(pace.relaxation)
            total = kernel.columns(u)
            v = v * (b / kernel.guarded(v * total)).pow_(pace.relaxation)
        if interval is not None and (step + 1) % interval == 0:
            kernel, u, v = kernel.absorb(cost, epsilon, u, v)
    return Scaled(None, kernel, u, v)


class _Pace:
    """When to look at the error, and how much to over-relax, from the errors seen."""

    def __init__(self, goal: float, *, may_relax: bool) -> None:
        self.goal, self.may_relax = goal, may_relax
        self.relaxation, self.look = 1.0, _FIRST_LOOK
        self.mark, self.error = 0, math.inf  # the step where this window began, its error

    def see(self, step: int, error: float) -> None:
        """Take note of an error above the goal."""
        rate, left = 0.0, _WINDOW
        if 0.0 < error < self.error < math.inf:
            slope = math.log(error / self.error) / (step - self.mark)
            rate = math.exp(slope)
            left = math.ceil(min(math.log(self.goal / error) / slope, _WINDOW + 1))
        if step - self.mark >= _WINDOW or self.error == math.inf:
            # a last window is not worth the dearer steps
            if self.may_relax and (left > _WINDOW or self.relaxation > 1.0):
                self.relaxation = _relaxation(self.relaxation, rate)
            self.mark, self.error = step, error
        self.look = min(step + max(left, 1), self.mark + _WINDOW)


def _relaxation(current: float, rate: float) -> float:
    """Over-relaxation from the rate at which errors drop, as for successive relaxation.

    A rate ``r`` at relaxation ``w`` shows the plain rate ``(r + w - 1)^2 / (r w^2)``, whose best
    relaxation is ``2 / (1 + sqrt(1 - rate))``. Growing errors (rate 0) return to plain scaling.
    """
    if not 0.0 < rate < 1.0:
        return 1.0
    plain = min((rate + current - 1.0) ** 2 / (rate * current**2), 0.9995)
    return 2.0 / (1.0 + math.sqrt(1.0 - plain))
