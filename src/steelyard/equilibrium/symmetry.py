r"""How far a Jacobian is from symmetric, and a loss that brings it there without tying weights.

Source: Laborieux and Zenke (2024), arXiv:2309.02214.
"""

import math

import torch
from torch import Tensor

from steelyard._checks import (
    check_callable,
    check_floating,
    check_not_empty,
    check_range,
    check_shape,
)
from steelyard._reduce import Reduction, reduce_masked
from steelyard.equilibrium.fixed_points import Field, check_state


def homeostatic_loss(
    field: Field,
    u: Tensor,
    probes: Tensor,
    *,
    normalize: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Penalise the skew part of the field's Jacobian at ``u`` by two Jacobian-vector products.

    .. math::
        \|J\epsilon\|^2 - \epsilon^\top J^2 \epsilon, \qquad
        \mathbb{E}_{\epsilon \sim N(0, I)}[\cdot] = \tfrac12 \|J - J^\top\|_F^2

    Its gradient in ``J`` is ``2 (J - J^T)``, which leaves the symmetric part alone.

    Args:
        field: ``F``, ``[n] -> [n]``; gradients flow to the parameters it closes over.
        u: state ``[n]``; detached (no gradient goes through the relaxation).
        probes: standard normal draws ``[m, n]``.
        normalize: divide by ``n``, as the published code does; its coefficients refer to that.
        reduction: over probes.

    Returns:
        The loss, 0-d or ``[m]``. A single probe may be negative; the mean tends to a number >= 0.

    Raises:
        TypeError: ``field`` cannot be called, or a tensor is none.
        ValueError: a shape does not fit.

    Example:
        Probes along the axes give the trace exactly, once they are summed.

        >>> weight = torch.tensor([[0.0, 3.0], [1.0, 0.0]])
        >>> homeostatic_loss(lambda u: weight @ u, torch.zeros(2), torch.eye(2), reduction="sum")
        tensor(4.)

    Source: arXiv:2309.02214, Eq. 12.
    """
    check_callable(field=field)
    check_state("u", u)
    check_shape("u", u, (None,))
    check_shape("probes", probes, (None, u.shape[0]))
    check_not_empty("probes", probes)
    state = u.detach().contiguous()  # jvp writes to it, so no two entries may share memory

    def penalty(probe: Tensor) -> Tensor:
        once: Tensor = torch.func.jvp(field, (state,), (probe,))[1]
        twice: Tensor = torch.func.jvp(field, (state,), (once,))[1]
        value: Tensor = once.square().sum() - (probe * twice).sum()
        return value

    losses = torch.func.vmap(penalty)(probes.to(state.dtype))
    scaled = losses / u.shape[0] if normalize else losses
    return reduce_masked(scaled, None, reduction)


def symmetry_measure(jacobian: Tensor) -> Tensor:
    r"""Share of the symmetric part in a matrix.

    .. math:: \frac{\|S\|_F}{\|S\|_F + \|A\|_F}, \qquad S = \tfrac12 (J + J^\top), A = J - S

    Args:
        jacobian: ``[.., n, n]``.

    Returns:
        ``[..]`` in [0, 1]; 1 is symmetric (so is zero), 0 skew.

    Raises:
        ValueError: not square, or empty.

    Example:
        >>> symmetry_measure(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
        tensor(1.)
        >>> symmetry_measure(torch.tensor([[0.0, 2.0], [-2.0, 0.0]]))
        tensor(0.)

    Source: arXiv:2309.02214, experiments.
    """
    check_floating(jacobian=jacobian)
    if jacobian.dim() < 2 or jacobian.shape[-1] != jacobian.shape[-2]:
        raise ValueError(f"jacobian must have shape [.., n, n], got {list(jacobian.shape)}")
    check_not_empty("jacobian", jacobian)
    even = torch.linalg.matrix_norm(jacobian + jacobian.mT)
    odd = torch.linalg.matrix_norm(jacobian - jacobian.mT)
    total = even + odd
    zero = total == 0  # and not "> 0", which would hide a NaN
    return torch.where(zero, 1.0, even / torch.where(zero, 1.0, total))


def rotated_feedback(forward: Tensor, random: Tensor, alpha: float) -> Tensor:
    r"""Mix transposed forward weights and independent ones to a given initial misalignment.

    .. math:: \sin(\alpha)\, B + \cos(\alpha)\, W^\top

    Args:
        forward: forward weights ``W`` ``[o, i]``.
        random: independent draw ``B`` of the same law ``[i, o]``.
        alpha: degrees, 0 (symmetric) to 90 (independent). The angle that results is ``alpha`` only
            as far as the draw is orthogonal to the weights; see :func:`feedback_angle`.

    Returns:
        Feedback weights ``[i, o]``.

    Raises:
        ValueError: a shape does not fit, or ``alpha`` is not finite.

    Example:
        >>> rotated_feedback(torch.tensor([[1.0, 2.0]]), torch.zeros(2, 1), 0.0).squeeze()
        tensor([1., 2.])

    Source: arXiv:2309.02214, experiments.
    """
    check_floating(forward=forward, random=random)
    check_shape("forward", forward, (None, None))
    check_shape("random", random, (forward.shape[1], forward.shape[0]))
    check_range("alpha", alpha, above=-math.inf, below=math.inf)
    angle = math.radians(alpha)
    return math.sin(angle) * random + math.cos(angle) * forward.mT


def feedback_angle(forward: Tensor, feedback: Tensor) -> Tensor:
    r"""Angle between feedback weights and the transposed forward weights, in degrees.

    Args:
        forward: ``[o, i]``.
        feedback: ``[i, o]``.

    Returns:
        0-d, in [0, 180]; NaN if one is all zero.

    Raises:
        ValueError: a shape does not fit, or a tensor is empty.

    Example:
        >>> forward = torch.tensor([[1.0, 0.0]])
        >>> feedback_angle(forward, torch.tensor([[0.0], [3.0]]))
        tensor(90.)

    Source: arXiv:2309.02214, experiments.
    """
    check_floating(forward=forward, feedback=feedback)
    check_shape("forward", forward, (None, None))
    check_shape("feedback", feedback, (forward.shape[1], forward.shape[0]))
    check_not_empty("forward", forward)
    a, b = forward.mT / forward.norm(), feedback / feedback.norm()
    # Twice the arc tangent of half-chords: exact near 0 and 180, where an arc cosine is not.
    return torch.rad2deg(2 * torch.atan2((a - b).norm(), (a + b).norm()))
