r"""ParetoFlow: flows guided by weighted predictors towards a Pareto front, from logged data only.

Time runs from noise at ``t = 0`` to data at ``t = 1`` along ``x_t = t x_1 + (1 - t) x_0``, and the
velocity predicts ``x_1 - x_0``. Every objective is minimised. One flow is run for each weight
vector of a lattice; late in the sampling, offspring of neighbouring flows compete inside a cone
around the weight (weights and cones: :mod:`steelyard.diffusion.simplex`; what the result is worth:
:mod:`steelyard.diffusion.pareto`). The loop over time is the caller's.

Source: Yuan, Chen, Pal and Liu (2025), ParetoFlow: Guided Flows in Multi-Objective Optimization,
arXiv:2412.03718.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from steelyard._checks import (
    check_callable,
    check_choice,
    check_count,
    check_floating,
    check_integer_dtype,
    check_not_empty,
    check_range,
    check_same_shape,
    check_shape,
)
from steelyard.diffusion._arguments import check_no_nan
from steelyard.diffusion.simplex import angle_between

__all__ = [
    "ConeSelection",
    "GuidedVelocity",
    "categorical_to_logits",
    "cone_select",
    "guided_velocity",
    "logits_to_categorical",
    "repair_to_box",
]

VelocityFn = Callable[[Tensor, Tensor], Tensor]
Predictors = Callable[[Tensor], Tensor]

_SMOOTHING = 0.4
"""Probability shared by all classes before the logits are taken (released code)."""


class GuidedVelocity(NamedTuple):
    """What :func:`guided_velocity` returns, each ``[N, d]``."""

    guided: Tensor
    velocity: Tensor
    terminal: Tensor
    gradient: Tensor


class ConeSelection(NamedTuple):
    """What :func:`cone_select` returns: ``index [N]`` and ``angles [N, C]``."""

    index: Tensor  # type: ignore[assignment]  # hides tuple.index: the name is the API's
    angles: Tensor


def guided_velocity(
    velocity_fn: VelocityFn,
    predictors: Predictors,
    x: Tensor,
    weights: Tensor,
    t: float | Tensor,
    *,
    gamma: float = 2.0,
    gradient: Literal["detached", "full"] = "detached",
    minimum_time: float = 1e-3,
) -> GuidedVelocity:
    r"""Bend a flow towards designs whose predicted objectives are small for a weight vector.

    .. math::
        \hat x_1 = x + (1 - t)\, u(x, t), \qquad
        g = \nabla_x \Big( - \sum_j w_j f_j(\hat x_1) \Big), \qquad
        \tilde u = u + \gamma\, \frac{1 - t}{t}\, g

    ``"detached"`` takes ``u`` as a constant inside the predicted end point, so that
    :math:`g = -\sum_j w_j \nabla f_j(\hat x_1)`; this is the published code. ``"full"`` goes
    through ``u`` as well. With the exact velocity and affine predictors it is, to first order in
    ``gamma``, the velocity of the data reweighted by :math:`\exp(-\gamma \sum_j w_j f_j)`. It costs
    a backward pass through the flow model.

    Args:
        velocity_fn: ``(x [N, d], t [N]) -> [N, d]``.
        predictors: ``x1 [N, d] -> [N, m]``, differentiable, minimised, each row by itself (a batch
            norm must be in evaluation mode).
        x: ``[N, d]``; detached.
        weights: ``[N, m]``, one row a flow; detached.
        t: 0 = noise, 1 = data; a number or ``[N]``.
        gamma: >= 0, strength of the guidance.
        gradient: ``"detached"`` or ``"full"``.
        minimum_time: > 0, in place of a smaller ``t`` in the denominator; the paper's step size.

    Returns:
        ``guided``, ``velocity``, ``terminal`` (:math:`\hat x_1`), ``gradient`` (``g``); detached.
        Works under ``no_grad`` and ``inference_mode``.

    Raises:
        ValueError: wrong shapes, a setting out of range, or predictors without a gradient.
        TypeError: ``x`` or ``weights`` not floating point.

    Example:
        For affine predictors the push is ``-gamma (1 - t)/t`` times the weighted slope:

        >>> import torch
        >>> slopes = torch.tensor([[4.0, 0.0], [0.0, 2.0]])
        >>> still = lambda x, t: torch.zeros_like(x)
        >>> weights = torch.tensor([[0.5, 0.5]])
        >>> out = guided_velocity(still, lambda x: x @ slopes, torch.ones(1, 2), weights, 0.8)
        >>> out.gradient, out.guided
        (tensor([[-2., -1.]]), tensor([[-1.0000, -0.5000]]))

    Source: Yuan et al. (2025), Eq. 5, 6 and 9, arXiv:2412.03718; ``"full"`` is derived.
    """
    check_callable(velocity_fn=velocity_fn, predictors=predictors)
    check_floating(x=x, weights=weights)
    check_shape("x", x, (None, None))
    check_not_empty("x", x)
    check_shape("weights", weights, (x.shape[0], None))
    check_range("gamma", gamma, at_least=0.0, below=math.inf)
    check_range("minimum_time", minimum_time, above=0.0, at_most=1.0)
    check_choice("gradient", gradient, ("detached", "full"))
    times = _times(t, x)
    left = (1 - times)[:, None]
    # Guidance needs gradients even inside a sampler that has switched them off.
    with torch.inference_mode(False), torch.enable_grad():
        point = x.detach().clone().requires_grad_(gradient == "full")
        velocity = velocity_fn(point, times.clone())
        check_shape("velocity_fn(x, t)", velocity, (x.shape[0], x.shape[1]))
        end = point + left.clone() * (velocity if gradient == "full" else velocity.detach())
        leaf = point if gradient == "full" else end.detach().requires_grad_()
        values = predictors(end if gradient == "full" else leaf)
        check_shape("predictors(x1)", values, (weights.shape[0], weights.shape[1]))
        if not values.requires_grad:
            raise ValueError("predictors must be differentiable, got values without a gradient")
        score = -(weights.detach().clone().to(values.dtype) * values).sum()
        (slope,) = torch.autograd.grad(score, leaf)
    velocity, slope = velocity.detach(), slope.detach()
    factor = gamma * left / times.clamp(min=minimum_time)[:, None]
    return GuidedVelocity(velocity + factor * slope, velocity, end.detach(), slope)


def repair_to_box(
    x: Tensor, velocity: Tensor, t: float | Tensor, low: Tensor, high: Tensor
) -> Tensor:
    r"""Move points so that the end their velocity predicts lies in a box.

    .. math::
        x \leftarrow \min\{ \max\{ x,\ \mathrm{low} - (1 - t) u \},\ \mathrm{high} - (1 - t) u \}

    Then :math:`\hat x_1 = x + (1 - t) u` is in ``[low, high]``, up to rounding. For a fixed
    velocity, repairing twice is repairing once.

    Args:
        x: ``[N, d]``.
        velocity: ``[N, d]``.
        t: 0 = noise, 1 = data; a number or ``[N]``.
        low: ``[d]``, may be ``-inf``.
        high: ``[d]``, >= ``low``, may be ``inf``.

    Returns:
        ``[N, d]``.

    Raises:
        ValueError: wrong shapes, empty, ``t`` outside [0, 1], or ``low`` above ``high``.
        TypeError: not floating point.

    Example:
        The end ``0.5 + 0.5 * 2`` lies outside the unit interval. Moving back to 0 ends at 1:

        >>> import torch
        >>> unit = torch.zeros(1), torch.ones(1)
        >>> repair_to_box(torch.tensor([[0.5]]), torch.tensor([[2.0]]), 0.5, *unit)
        tensor([[0.]])

    Source: released code of Yuan et al. (2025), arXiv:2412.03718.
    """
    check_floating(x=x, velocity=velocity, low=low, high=high)
    check_shape("x", x, (None, None))
    check_not_empty("x", x)
    check_same_shape(x=x, velocity=velocity)
    check_shape("low", low, (x.shape[1],))
    check_shape("high", high, (x.shape[1],))
    if not bool((low <= high).all()):
        raise ValueError("low must be at most high everywhere, and neither NaN")
    ahead = (1 - _times(t, x))[:, None] * velocity
    return torch.minimum(torch.maximum(x, low - ahead), high - ahead).to(x.dtype)


def _times(t: float | Tensor, x: Tensor) -> Tensor:
    """One time a row of ``x``, in its dtype."""
    if not isinstance(t, Tensor):
        check_range("t", t, at_least=0.0, at_most=1.0)
        return x.new_full((x.shape[0],), t)
    check_floating(t=t)
    if t.dim() != 0:
        check_shape("t", t, (x.shape[0],))
    return t.detach().to(x).expand(x.shape[0])


def cone_select(scores: Tensor, weights: Tensor, cone_angle: Tensor) -> ConeSelection:
    r"""Choose for each weight the best candidate inside the cone around it.

    .. math::
        \arg\max_c \{ w \cdot s_c : \angle(s_c, w) \le \Phi / 2 \}

    A plain weighted sum keeps only extreme points of a concave front; the cone makes it reach the
    middle. Where no candidate is in the cone, the one of the smallest angle is taken.

    Angles are measured from the origin of the scores, so the origin matters: with
    ``scores = reference - objectives`` (reference: the point of the hypervolume) the cones look at
    the front. The released code passes ``-objectives`` in units of their standard deviation, whose
    origin is the mean of the data, and selects dominated regions.

    Args:
        scores: ``[N, C, m]``, larger is better; detached.
        weights: ``[N, m]``, not negative; detached.
        cone_angle: ``[N]``, apex angle in radians; ``2 pi`` keeps every candidate.

    Returns:
        ``index [N]`` into the candidates, ties to the lower; ``angles [N, C]`` in ``[0, pi]``.

    Raises:
        ValueError: wrong shapes, empty or NaN.
        TypeError: not floating point.

    Example:
        The extreme candidate has the larger sum; the cone around the diagonal keeps the middle:

        >>> import torch
        >>> scores = torch.tensor([[[1.0, 0.0], [0.45, 0.45], [0.0, 0.9]]])
        >>> weights = torch.tensor([[0.5, 0.5]])
        >>> cone_select(scores, weights, torch.tensor([6.2832])).index
        tensor([0])
        >>> cone_select(scores, weights, torch.tensor([0.5])).index
        tensor([1])

    Source: Yuan et al. (2025), Eq. 11 and 12, arXiv:2412.03718.
    """
    check_floating(scores=scores, weights=weights, cone_angle=cone_angle)
    check_shape("scores", scores, (None, None, None))
    check_not_empty("scores", scores)
    check_shape("weights", weights, (scores.shape[0], scores.shape[2]))
    check_shape("cone_angle", cone_angle, (scores.shape[0],))
    for name, tensor in (("scores", scores), ("weights", weights), ("cone_angle", cone_angle)):
        check_no_nan(name, tensor)
    values, directions = scores.detach().double(), weights.detach().double()[:, None]
    angles = angle_between(values, directions)
    weighted = (values * directions).sum(-1)
    admissible = angles <= cone_angle.detach().double()[:, None] / 2
    best = weighted.masked_fill(~admissible, -math.inf).argmax(1)
    index = torch.where(admissible.any(1), best, angles.argmin(1))
    return ConeSelection(index, angles.to(scores.dtype))


def categorical_to_logits(
    codes: Tensor, num_classes: int, *, dtype: torch.dtype = torch.float64
) -> Tensor:
    r"""Turn classes into numbers that a flow can move: smoothed log odds against class 0.

    .. math::
        p = 0.6\, \mathrm{onehot}(c) + 0.4 / n, \qquad z_i = \ln p_i - \ln p_0, \quad i = 1..n-1

    Args:
        codes: ``[N]`` integers in ``0 .. n-1``.
        num_classes: ``n``, >= 2.
        dtype: of the result.

    Returns:
        ``[N, n - 1]``; :func:`logits_to_categorical` gives the codes back.

    Raises:
        ValueError: wrong shape, empty, a code out of range, ``n < 2``.
        TypeError: ``codes`` not integer.

    Example:
        >>> import torch
        >>> categorical_to_logits(torch.tensor([0, 1, 2]), 3, dtype=torch.float32)
        tensor([[-1.7047, -1.7047],
                [ 1.7047,  0.0000],
                [ 0.0000,  1.7047]])

    Source: released code of Yuan et al. (2025), arXiv:2412.03718.
    """
    check_integer_dtype(codes=codes)
    check_shape("codes", codes, (None,))
    check_not_empty("codes", codes)
    check_count("num_classes", num_classes, at_least=2)
    if not bool(((codes >= 0) & (codes < num_classes)).all()):
        raise ValueError(f"codes must be in 0 .. {num_classes - 1}, below num_classes")
    share = _SMOOTHING / num_classes
    one_hot = torch.nn.functional.one_hot(codes.long(), num_classes).double()
    log_probs = ((1 - _SMOOTHING) * one_hot + share).log()
    return (log_probs[:, 1:] - log_probs[:, :1]).to(dtype)


def logits_to_categorical(logits: Tensor) -> Tensor:
    r"""Turn log odds against class 0 back into classes: the argmax of ``[0, logits]``.

    Args:
        logits: ``[N, n - 1]``; no NaN.

    Returns:
        ``[N]`` int64 in ``0 .. n-1``, ties to the lower class.

    Raises:
        ValueError: wrong shape, empty or NaN.
        TypeError: not floating point.

    Example:
        >>> import torch
        >>> logits_to_categorical(torch.tensor([[-1.0, -2.0], [0.1, 3.0]]))
        tensor([0, 2])

    Source: released code of Yuan et al. (2025), arXiv:2412.03718.
    """
    check_floating(logits=logits)
    check_shape("logits", logits, (None, None))
    check_not_empty("logits", logits)
    check_no_nan("logits", logits)
    return torch.nn.functional.pad(logits, (1, 0)).argmax(1)
