r"""Newton's method on the dual of entropic optimal transport, with the row potentials eliminated.

.. math::
    \max_g\ \langle g, b\rangle
    - \epsilon \sum_i a_i \log \sum_j b_j \exp\big((g_j - C_{ij}) / \epsilon\big).

It takes over where Sinkhorn scaling is slow; its linear system is also the one of the implicit
gradient. Rows are exact at every ``g``; the gradient of the dual is the error of the columns.

Sources: Brauer et al. (2017), arXiv:1710.06635; Cuturi and Peyre (2018), arXiv:1811.05527.
"""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

_STEPS = 2000
# Epsilon comes down by this factor, from this share of the range of the costs; a stage ends at
# this total marginal error.
_ANNEALING, _FIRST_SHARE, _STAGE_ERROR = 4.0, 0.05, 1e-2


def newton_plan(
    cost: Tensor, a: Tensor, b: Tensor, epsilon: float, goal: float, g: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Maximise the semi-dual by damped Newton steps, ``epsilon`` coming down in stages.

    Returns:
        The plan ``exp(x_i + y_j - C_ij / epsilon)`` and its log-scalings ``x`` and ``y``.
    """
    stages = [epsilon]
    spread = (cost.amax() - cost.amin()).item()
    while stages[-1] < _FIRST_SHARE * spread:
        stages.append(stages[-1] * _ANNEALING)
    damping = torch.ones_like(a[..., :1])
    left, before = _STEPS, g
    for index, stage in enumerate(reversed(stages)):
        if index >= 2:  # potentials become linear in epsilon: extrapolate
            g, before = g + (g - before) / _ANNEALING, g
        else:
            before = g
        state = _semi_dual(cost, a, b, stage, g)
        while left > 0 and not _reached(state.residual, goal, final=stage == epsilon):
            g, damping, state = _newton_step(cost, a, b, stage, g, damping, state)
            left -= 1
    error = state.residual.abs().amax().item()
    if not error <= goal:
        warnings.warn(
            f"sinkhorn_plan stopped at a marginal error of {error:.1e}, above {goal:.1e}: "
            f"epsilon={epsilon} is small for costs with a range of {spread:.3g}",
            RuntimeWarning,
            stacklevel=5,
        )
    x, y = a.log() - state.normalizer, b.log() + g / epsilon
    return state.conditional * a.unsqueeze(-1), x, y


def weighted_rows(weights: Tensor, matrix: Tensor) -> Tensor:
    """Return ``matrix^T weights``, the weighted sum of the rows of each matrix."""
    return (weights.unsqueeze(-2) @ matrix).squeeze(-2)


def solve_schur(
    conditional: Tensor, a: Tensor, b: Tensor, damping: Tensor, right: Tensor
) -> Tensor:
    """Solve ``(diag(Q^T a) - Q^T diag(a) Q + diag(damping)) z = right`` for ``b . z = 0``."""
    schur = b.unsqueeze(-1) * b.unsqueeze(-2) - conditional.mT @ (a.unsqueeze(-1) * conditional)
    diagonal = weighted_rows(a, conditional) + damping + (b == 0)
    solution: Tensor = torch.linalg.solve(schur + torch.diag_embed(diagonal), right)
    return solution


class _SemiDual(NamedTuple):
    """The dual at ``g`` with the row potentials at their optimum: rows are exact.

    ``value = <g, b> - epsilon <a, logsumexp_j(log b_j + (g_j - C_ij) / epsilon)>``, to be
    maximised; its gradient is the column error ``residual``.
    """

    value: Tensor
    residual: Tensor
    conditional: Tensor
    normalizer: Tensor


def _semi_dual(cost: Tensor, a: Tensor, b: Tensor, epsilon: float, g: Tensor) -> _SemiDual:
    offset = b.log() + g / epsilon
    scores = cost.div(-epsilon).add_(offset.unsqueeze(-2))
    normalizer = scores.logsumexp(-1)
    conditional = scores.sub_(normalizer.unsqueeze(-1)).exp_()
    value = (g * b).sum(-1) - epsilon * (a * normalizer).sum(-1)
    residual = b - weighted_rows(a, conditional)
    return _SemiDual(value, residual, conditional, normalizer)


def _reached(residual: Tensor, goal: float, *, final: bool) -> bool:
    error = residual.abs()
    return (error.amax().item() <= goal) if final else (error.sum(-1).amax().item() <= _STAGE_ERROR)


def _newton_step(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: float,
    g: Tensor,
    damping: Tensor,
    state: _SemiDual,
) -> tuple[Tensor, Tensor, _SemiDual]:
    """Take the step where it raises the dual or halves the error, else damp it more."""
    distance = state.residual.abs().sum(-1, keepdim=True)
    rounding = 8 * torch.finfo(b.dtype).eps
    damped = (damping * distance.clamp(max=1.0)).clamp(min=rounding) * b
    step = epsilon * solve_schur(state.conditional, a, b, damped, state.residual)
    trial = _semi_dual(cost, a, b, epsilon, g + step)
    rise = 1e-4 * (step * state.residual).sum(-1)
    better = (trial.value >= state.value + rise) | (
        trial.residual.abs().sum(-1) <= distance.squeeze(-1) / 2
    )
    kept = better.unsqueeze(-1)
    state = _SemiDual(
        torch.where(better, trial.value, state.value),
        torch.where(kept, trial.residual, state.residual),
        torch.where(kept.unsqueeze(-1), trial.conditional, state.conditional),
        torch.where(kept, trial.normalizer, state.normalizer),
    )
    damping = torch.where(kept, damping / 4, damping * 8).clamp(1e-10, 1e3)
    return torch.where(kept, g + step, g), damping, state
