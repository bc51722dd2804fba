r"""The implicit-function gradient of a solution that was found without a graph.

If :math:`\delta^*(\theta)` solves :math:`g(\theta, \delta) = 0`, a loss gradient ``v`` in
:math:`\delta^*` becomes :math:`-(\partial_\theta g)^\top H^{-1} v` in :math:`\theta`, with
:math:`H = \partial_\delta g` symmetric. Adding to the solution the value-free term
``-H^{-1} (g - g.detach())`` lets autograd do that.
"""

import torch
from torch import Tensor

_TOLERANCE = 1e-24
_MOST_ITERATIONS = 1000


def attach_gradient(delta: Tensor, residual: Tensor, diagonal: Tensor, *, exact: bool) -> Tensor:
    """Return the value of ``delta`` with the gradient of the solution.

    Args:
        delta: solution, ``[B, ...]``, a leaf that requires a gradient.
        residual: ``g`` at the solution, with a graph to the parameters and to ``delta``.
        diagonal: positive diagonal of the Hessian, without the curvature that is dropped; it
            preconditions the exact solve.
        exact: solve with the whole Hessian instead.
    """
    change = residual - residual.detach()
    if not exact:
        return delta.detach() - change / diagonal
    if change.requires_grad:
        change.register_hook(  # type: ignore[no-untyped-call]
            lambda v: _solve(delta, residual, diagonal, v)
        )
    return delta.detach() - change


def _solve(delta: Tensor, residual: Tensor, diagonal: Tensor, target: Tensor) -> Tensor:
    """Solve ``H z = target`` for each item by preconditioned conjugate gradients."""
    z = torch.zeros_like(target)
    remainder = target.detach().clone()
    scaled = remainder / diagonal
    direction = scaled
    energy = _dot(remainder, scaled)
    enough = _TOLERANCE * energy
    for _ in range(min(2 * delta[0].numel() + 10, _MOST_ITERATIONS)):
        # H z is the derivative of <g, z> in delta, since H is symmetric.
        [image] = torch.autograd.grad(residual, delta, direction, retain_graph=True)
        curvature = _dot(direction, image)
        # Solved, or not at a minimum in this direction: leave that item as it is.
        active = (energy > enough) & (curvature > 0)
        if not active.any():
            break
        length = torch.where(active, energy / curvature.where(active, 1.0), 0.0)
        z = z + length * direction
        remainder = remainder - length * image
        scaled = remainder / diagonal
        new_energy = _dot(remainder, scaled)
        direction = torch.where(
            active, scaled + new_energy / energy.where(active, 1.0) * direction, direction
        )
        energy = torch.where(active, new_energy, energy)
    return z


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each item, shaped to broadcast."""
    return (a * b).reshape(a.shape[0], -1).sum(1).reshape(-1, *[1] * (a.dim() - 1))
