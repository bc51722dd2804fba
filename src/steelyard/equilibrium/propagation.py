r"""Error vectors of a system at rest: the exact two, and the estimate from nudged fixed points.

The nudged system is :math:`F(u) + \beta\, \partial L / \partial r = 0`, with a **plus**: a positive
nudge climbs the loss, and gradients come out with their own sign.

Source: Laborieux and Zenke (2024), Improving equilibrium propagation without weight symmetry
through Jacobian homeostasis, arXiv:2309.02214.
"""

import cmath
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from steelyard._checks import (
    check_callable,
    check_choice,
    check_count,
    check_range,
    check_shape,
)
from steelyard.equilibrium.fixed_points import Field, check_state, evaluate, fixed_point, jacobian

Method = Literal["exact", "cauchy", "backprop"]
METHODS: tuple[Method, ...] = ("exact", "cauchy", "backprop")
AT_REST = 1e-3


def error_vector(
    field: Field,
    loss_gradient: Callable[[Tensor], Tensor],
    u: Tensor,
    *,
    method: Method = "exact",
    points: int = 2,
    beta: float = 0.1,
    activation: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    r"""Compute the error vector of a system at its fixed point.

    .. math::
        \text{exact: } v = \frac{du^*}{d\beta} = -J^{-1} g, \qquad
        \text{backprop: } \delta = -J^{-\top} g, \qquad
        \text{cauchy: } v_N = \frac1N \sum_{k=0}^{N-1} \frac{u^*_{\beta_k}}{\beta_k}

    with ``g`` the loss gradient and :math:`\beta_k = \beta e^{2\pi i k / N}`. The gradient of the
    loss in any parameter is :math:`\delta^\top \partial F / \partial \theta`; equilibrium
    propagation puts ``v`` in its place, the same where the Jacobian is symmetric. The estimate is
    off by :math:`O(\beta^N)`: the circle must not enclose a singularity of :math:`u^*_\beta`. One
    point stands for :math:`(u^*_\beta - u^*_0) / \beta`, two for the central difference.

    Args:
        field: ``F``, ``[n] -> [n]``, zero at ``u``; holomorphic if ``points`` exceeds 2.
        loss_gradient: ``dL/dr`` as a function of ``r`` ``[n]``; gets a complex tensor if ``points``
            exceeds 2.
        u: fixed point ``[n]``.
        method: as above.
        points: ``N`` of "cauchy", at least 1.
        beta: radius of "cauchy", above 0.
        activation: ``None`` for ``r = u``; otherwise ``r = activation(u)``, elementwise, and the
            vector is that of ``r``: :math:`dr^*/d\beta`, and :math:`-J_r^{-\top} g` with
            :math:`J_r = J\, \mathrm{diag}(1 / r'(u))`.

    Returns:
        The error vector ``[n]``, without gradient.

    Raises:
        ValueError: ``u`` is not a fixed point, or an argument does not fit.
        TypeError: a function cannot be called, or ``u`` is neither floating nor complex.
        RuntimeError: a nudged system has no fixed point near ``u``: the nudge is too strong.

    Example:
        ``F = b - u`` and ``L = (u - y)^2 / 2``: the estimate is ``(b - y) / (1 - beta^N)``.

        >>> b, y = torch.tensor([3.0], dtype=torch.float64), torch.tensor([1.0])
        >>> system = (lambda u: b - u, lambda r: r - y, b)
        >>> error_vector(*system).item(), error_vector(*system, method="backprop").item()
        (2.0, 2.0)
        >>> round(error_vector(*system, method="cauchy", points=4, beta=0.5).item(), 6)
        2.133333

    Source: arXiv:2309.02214, Definition 1 and the Cauchy integral.
    """
    check_choice("method", method, METHODS)
    check_state("u", u)
    check_shape("u", u, (None,))
    check_callable(loss_gradient=loss_gradient)
    if activation is not None:
        check_callable(activation=activation)
    check_count("points", points)
    check_range("beta", beta, above=0.0)
    u = u.detach().contiguous()  # jvp writes to it, so no two entries may share memory
    residual = evaluate(field, u).abs().max()
    if not bool(residual <= AT_REST * (1 + u.abs().max())):
        raise ValueError(f"u must be a fixed point of field, got a residual of {residual:.2g}")

    def activity(state: Tensor) -> Tensor:
        return state if activation is None else activation(state)

    if method == "cauchy":
        settle = partial(_nudged, field, loss_gradient, activity)
        return circle_estimate(settle, activity, u, points, beta)
    with torch.no_grad():
        slope = torch.func.jvp(activity, (u,), (torch.ones_like(u),))[1]
        push = loss_gradient(activity(u))
        check_shape("loss_gradient(r)", push, tuple(u.shape))
        matrix = jacobian(field, u)
        vector: Tensor
        if method == "exact":
            vector = -slope * torch.linalg.solve(matrix, push)
        else:
            vector = -torch.linalg.solve(matrix.mT, slope * push)
        return vector


def circle_estimate(
    settle: Callable[[Tensor, complex | float], Tensor],
    activity: Callable[[Tensor], Tensor],
    u: Tensor,
    points: int,
    beta: float,
) -> Tensor:
    """Estimate how activities move with the nudge from fixed points on a circle of nudges.

    Only half the circle is solved; the other half is the conjugate. Each point starts from its
    neighbour.

    Args:
        settle: ``(start, nudge) -> state``, solves the nudged system.
        activity: activities of a state.
        u: state at rest.
        points: ``N``, at least 1; one point is a one-sided difference.
        beta: radius, above 0.

    Returns:
        The estimate, real, in the shape of ``u``.
    """
    rest = activity(u)
    if points == 1:
        return (activity(settle(u, beta)) - rest) / beta
    total = torch.zeros_like(rest)
    state = u if points == 2 else u.to(torch.promote_types(u.dtype, torch.complex64))
    for k in range(points // 2 + 1):
        nudge: complex | float = cmath.rect(beta, 2 * cmath.pi * k / points)
        on_axis = 2 * k in (0, points)
        nudge = nudge.real if on_axis else nudge
        state = settle(state, nudge)
        # Minus the resting activity changes nothing in the sum, and keeps its digits.
        share = (activity(state) - rest) / nudge
        total = total + (share.real if share.is_complex() else share) * (1 if on_axis else 2)
    return total / points


def _nudged(
    field: Field,
    loss_gradient: Callable[[Tensor], Tensor],
    activity: Callable[[Tensor], Tensor],
    start: Tensor,
    nudge: complex | float,
) -> Tensor:
    try:
        tolerance = max(1e-13, 64 * torch.finfo(start.dtype).eps)
        return fixed_point(
            lambda state: field(state) + nudge * loss_gradient(activity(state)),
            start,
            tolerance=tolerance,
        )
    except RuntimeError as error:
        raise RuntimeError(f"the system nudged by {nudge:.3g} does not settle: {error}") from None
