r"""Divergence of a few rows and its slope in the logits of both sides.

The terms ``F(p, q) = q f(p/q)`` are homogeneous of degree 1, so with the perspective
``g(t) = t f(1/t)``,

.. math:: F = p F_p + q F_q, \qquad F_p = f'(p/q), \qquad F_q = g'(q/p):

the two derivatives that the gradient needs give the value as well.
"""

import torch
from torch import Tensor

from steelyard.divergences import FDivergence
from steelyard.fused._blocks import LOG_ZERO

Slopes = tuple[Tensor | None, Tensor | None]


def divergence_and_slopes(
    z_p: Tensor, z_q: Tensor, divergence: FDivergence, wanted: tuple[bool, bool]
) -> tuple[Tensor, Slopes]:
    """Return ``D_f(p || q)`` of each row of logits and its slopes in ``z_p``, ``z_q``.

    Args:
        z_p: logits of ``p``, shape ``[R, V]``.
        z_q: logits of ``q``, shape ``[R, V]``.
        divergence: the divergence.
        wanted: which slopes; the other ones are ``None``.
    """
    values, slopes = _by_derivatives(z_p, z_q, divergence, wanted)
    # A derivative that grows like a power of the ratio overflows where the other side has next to
    # no mass, though its product with that mass is finite; the terms themselves do not.
    if bool(values.isfinite().all()):
        return values, slopes
    return _by_autograd(z_p, z_q, divergence, wanted)


def accurate_log_softmax(z: Tensor) -> Tensor:
    """Return ``log_softmax`` over the last dimension.

    ``torch.log_softmax`` adds the exponentials in a row one after the other, which in float32 costs
    two digits at ``V = 10^5``; ``torch.logsumexp`` adds them pairwise.
    """
    return z - z.logsumexp(-1, keepdim=True)


def _by_derivatives(
    z_p: Tensor, z_q: Tensor, divergence: FDivergence, wanted: tuple[bool, bool]
) -> tuple[Tensor, Slopes]:
    log_p, log_q = accurate_log_softmax(z_p), accurate_log_softmax(z_q)
    log_p.clamp_(min=LOG_ZERO), log_q.clamp_(min=LOG_ZERO)
    log_t = log_p - log_q
    p, q = log_p.exp_(), log_q.exp_()
    by_p = p * divergence.generator.derivative(log_t)
    by_q = q * divergence.perspective.derivative(-log_t)
    total_p, total_q = by_p.sum(-1, keepdim=True), by_q.sum(-1, keepdim=True)
    return (total_p + total_q)[:, 0], (
        torch.addcmul(by_p, p, total_p, value=-1) if wanted[0] else None,
        torch.addcmul(by_q, q, total_q, value=-1) if wanted[1] else None,
    )


def _by_autograd(
    z_p: Tensor, z_q: Tensor, divergence: FDivergence, wanted: tuple[bool, bool]
) -> tuple[Tensor, Slopes]:
    with torch.enable_grad():
        p, q = z_p.detach().requires_grad_(wanted[0]), z_q.detach().requires_grad_(wanted[1])
        rows = divergence.terms(accurate_log_softmax(p), accurate_log_softmax(q)).sum(-1)
        leaves = [leaf for leaf in (p, q) if leaf.requires_grad]
        slopes = iter(torch.autograd.grad(rows.sum(), leaves) if leaves else ())
    return rows.detach(), (
        next(slopes) if wanted[0] else None,
        next(slopes) if wanted[1] else None,
    )
