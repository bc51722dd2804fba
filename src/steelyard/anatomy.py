r"""See what an objective pays attention to: its gradient as a weight times a direction.

An objective acts on a model through one thing only, the gradient that each item sends back:

.. math:: \nabla_{z_i} L = w_i\, d_i, \qquad w_i = \|\nabla_{z_i} L\|_2, \quad \|d_i\|_2 = 1

The weight says how much an item counts, the direction where it moves the model. :func:`decompose`
splits the gradient of any function. :func:`weight_curves` follows an item along a ratio, a margin
or a probability, and :func:`plot_weights` draws that.

Every function takes callables and knows no method. The command ``steelyard anatomy`` draws the
library's own objectives by name.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from steelyard._checks import (
    check_choice,
    check_count,
    check_floating,
    check_not_empty,
    check_pair,
    check_range,
)
from steelyard._reduce import widen

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Decomposition",
    "LossFunction",
    "Over",
    "WeightCurves",
    "decompose",
    "draw_curves",
    "plot_weights",
    "weight_curves",
]

LossFunction = Callable[..., Tensor]
"""A function of one or two tensors that returns a loss, reduced or per item."""

Over = Literal["log_ratio", "margin", "probability"]
"""What an objective is drawn over."""

POINTS = 250
"""Points of a curve. With the default limits a step at 0.8, 1 or 1.2 falls between two of them."""

CLASSES = 10


class Decomposition(NamedTuple):
    """What :func:`decompose` returns."""

    loss: Tensor
    weight: Tensor
    direction: Tensor


class WeightCurves(NamedTuple):
    """What :func:`weight_curves` returns."""

    x: Tensor
    panels: dict[str, dict[str, Tensor]]
    over: Over
    limits: tuple[float, float]


def decompose(loss_fn: LossFunction, logits: Tensor, *args: Any) -> Decomposition:
    r"""Split the gradient of each item into its norm and its unit vector.

    .. math::
        g_i = \frac{\partial}{\partial z_i} \sum_j L_j, \qquad
        w_i = \|g_i\|_2, \qquad d_i = g_i / w_i

    ``L_j`` are the values that ``loss_fn`` returns. If it returns one loss an item
    (``reduction="none"``) and items do not meet, ``g_i`` is the gradient of the item's own loss. A
    mean over N items carries its factor 1/N into the weights. Where the loss of one item depends on
    another (a normalised batch, a ranking, a confusion matrix) ``g_i`` is the effect of row i on
    all of them. The direction points uphill: training moves against it.

    Args:
        loss_fn: called as ``loss_fn(logits, *args)``; returns a real floating tensor of any shape.
        logits: ``[.., V]`` with a row for each item, or ``[N]`` with a number for each item, such
            as a log-ratio. Not changed; need not require a gradient.
        args: passed on as they are. Parameters in them, or in ``loss_fn``, keep their gradients.

    Returns:
        ``loss`` as ``loss_fn`` gave it, detached; ``weight [..]`` (``[N]``) >= 0 and ``direction``
        of the shape of ``logits``, both in its dtype. For ``[N]`` the weight is ``|g|``, the
        direction its sign. A gradient of zero has weight 0 and direction 0, also if the loss does
        not depend on the logits at all. A gradient that is NaN or infinite shows as such.

    Raises:
        ValueError: ``logits`` is empty or 0-d.
        TypeError: ``logits`` is not floating, ``loss_fn`` not callable, or its result not a
            floating tensor. What ``loss_fn`` itself raises comes through.

    Example:
        Cross-entropy looks most at what it gets wrong; KL to a teacher stops where they agree:

        >>> from torch.nn.functional import cross_entropy, kl_div
        >>> logits = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
        >>> labels = torch.tensor([0, 0])
        >>> loss, weight, direction = decompose(cross_entropy, logits, labels)
        >>> (2 * weight).round(decimals=3)  # twice: the loss is a mean over two items
        tensor([0.0670, 1.3470])
        >>> direction.round(decimals=3)
        tensor([[-0.7070,  0.7070],
                [-0.7070,  0.7070]])
        >>> teacher = logits.softmax(-1)
        >>> decompose(lambda z: kl_div(z.log_softmax(-1), teacher, reduction="sum"), logits).weight
        tensor([0., 0.])
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
    check_floating(logits=logits)
    check_not_empty("logits", logits)
    if logits.dim() == 0:
        raise ValueError("logits must have shape [.., V] or [N], got []")
    with torch.inference_mode(False), torch.enable_grad():
        leaf = logits.detach().clone().requires_grad_()
        loss = loss_fn(leaf, *args)
        gradient = _gradient(loss, leaf)
    if gradient.dim() == 1:
        return Decomposition(loss.detach(), gradient.abs(), gradient.sign())
    # Divided by its largest entry first, so that no square over- or underflows.
    wide = widen(gradient)
    peak = wide.abs().amax(-1, keepdim=True)
    scaled = wide / torch.where(peak == 0, 1.0, peak)
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    direction = scaled / torch.where(length == 0, 1.0, length)
    weight = (peak * length).squeeze(-1)
    return Decomposition(loss.detach(), weight.to(logits.dtype), direction.to(logits.dtype))


def _gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    """Gradient of the sum of ``loss``, taken without a sum that could overflow."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a torch.Tensor, got {type(loss).__name__}")
    if not loss.is_floating_point():
        raise TypeError(f"loss_fn must return a floating tensor, got {loss.dtype}")
    if not loss.requires_grad:
        return torch.zeros_like(leaf, requires_grad=False)
    (found,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss), allow_unused=True)
    return torch.zeros_like(leaf, requires_grad=False) if found is None else found


def weight_curves(
    objectives: Mapping[str, LossFunction],
    over: Over,
    *,
    limits: tuple[float, float] | None = None,
    points: int = POINTS,
    classes: int = CLASSES,
) -> WeightCurves:
    r"""Follow one item along a ratio, a margin or a probability, and decompose each objective.

    Each point is a batch of one item, so that a mean, a sum and ``"none"`` give the same curve.

    - ``"log_ratio"``: called with a log-ratio ``[1]`` and an advantage ``[1]``. Panels: the push
      ``-dL/d log_ratio`` at an advantage of +1 and of -1. ``x`` is the ratio itself.
    - ``"margin"``: called with the log-ratios to the reference of a chosen and of a rejected
      response, ``[1]`` each, at half the margin and minus half the margin. Panels: the push on
      either.
    - ``"probability"``: called with logits ``[1, V]`` and the label ``[1]``, which is class 0. The
      other classes share the rest of the probability equally. Panels: the weight, and the entry of
      minus the direction at the label.

    An objective with one required argument gets the log-ratio, the margin or the logits alone.

    Args:
        objectives: by name; all computed in float64.
        over: what to follow.
        limits: ends of the axis; default (0, 2.5) for the ratio, (-10, 10) nats for the margin,
            (0, 1) for the probability.
        points: number of points, at the middle of as many equal parts of the axis.
        classes: V >= 2; for ``"probability"`` only.

    Returns:
        ``x [points]`` and ``panels[panel][objective] [points]``, detached; ``over`` and ``limits``.

    Raises:
        ValueError: no objective, an unknown ``over``, limits out of order or out of range, or an
            objective with no or more than two required arguments.
        TypeError: ``objectives`` are no mapping, ``limits`` no two numbers, or an objective is not
            callable or returns no floating tensor.

    Example:
        Beyond the band PPO no longer looks at an action with a positive advantage:

        >>> from steelyard.policy import ppo_loss
        >>> curves = weight_curves({"ppo": ppo_loss}, "log_ratio", limits=(1.0, 1.4), points=4)
        >>> curves.x
        tensor([1.0500, 1.1500, 1.2500, 1.3500], dtype=torch.float64)
        >>> curves.panels["advantage +1"]["ppo"]
        tensor([1.0500, 1.1500, 0.0000, 0.0000], dtype=torch.float64)
    """
    check_choice("over", over, tuple(_AXES))
    axis = _AXES[over]
    if not isinstance(objectives, Mapping):
        raise TypeError(f"objectives must be a mapping, got {type(objectives).__name__}")
    if not objectives:
        raise ValueError("objectives must hold at least one function, got none")
    check_count("points", points, at_least=2)
    check_count("classes", classes, at_least=2)
    if limits is not None:
        check_pair("limits", limits)
    low, high = axis.limits if limits is None else limits
    check_range("limits[0]", low, at_least=axis.domain[0], below=high)
    check_range("limits[1]", high, at_most=axis.domain[1], below=math.inf)
    steps = torch.arange(points, dtype=torch.float64) + 0.5
    x = low + (high - low) * steps / points
    panels: dict[str, dict[str, Tensor]] = {panel: {} for panel in axis.panels}
    for name, function in objectives.items():
        try:
            curves = axis.follow(_with_two_arguments(function, axis), x, classes)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
        for panel, curve in zip(axis.panels, curves, strict=True):
            panels[panel][name] = curve
    return WeightCurves(x, panels, over, (low, high))


def _follow_log_ratio(function: LossFunction, x: Tensor, classes: int) -> tuple[Tensor, ...]:
    sides = torch.ones(1, dtype=x.dtype), -torch.ones(1, dtype=x.dtype)
    return tuple(
        torch.cat([_push(function, item, side) for item in x.log()[:, None].unbind()])
        for side in sides
    )


def _follow_margin(function: LossFunction, x: Tensor, classes: int) -> tuple[Tensor, ...]:
    def swapped(rejected: Tensor, chosen: Tensor) -> Tensor:
        return function(chosen, rejected)

    halves = (x / 2)[:, None].unbind()
    return (
        torch.cat([_push(function, half, -half) for half in halves]),
        torch.cat([_push(swapped, -half, half) for half in halves]),
    )


def _follow_probability(function: LossFunction, x: Tensor, classes: int) -> tuple[Tensor, ...]:
    label = torch.zeros(1, dtype=torch.long)
    logits = torch.zeros(len(x), classes, dtype=x.dtype)
    logits[:, 0] = x.logit() + math.log(classes - 1)
    parts = [decompose(function, row, label) for row in logits[:, None].unbind()]
    return (
        torch.cat([part.weight for part in parts]),
        torch.cat([0.0 - part.direction[:, 0] for part in parts]),
    )


def _push(function: LossFunction, log_ratio: Tensor, other: Tensor) -> Tensor:
    """Where and how hard training moves a log-ratio: minus the gradient."""
    part = decompose(function, log_ratio, other)
    return 0.0 - part.weight * part.direction  # 0.0 - 0.0 is not -0.0


@dataclass(frozen=True)
class _Axis:
    xlabel: str
    limits: tuple[float, float]
    domain: tuple[float, float]
    neutral: float | None  # where training starts, marked by a line
    panels: tuple[str, str]
    ylabels: tuple[str, str]
    heights: tuple[float, float] | None  # of the lower panel, if fixed
    reading: str
    arguments: str
    alone: Callable[[LossFunction], LossFunction]  # of a function of one argument, one of two
    follow: Callable[[LossFunction, Tensor, int], tuple[Tensor, ...]]


def _ignore_second(function: LossFunction) -> LossFunction:
    return lambda first, second: function(first)


_AXES: dict[str, _Axis] = {
    "log_ratio": _Axis(
        xlabel="ratio of the new to the old probability",
        limits=(0.0, 2.5),
        domain=(0.0, math.inf),
        neutral=1.0,
        panels=("advantage +1", "advantage -1"),
        ylabels=("push on the log-ratio",) * 2,
        heights=None,
        reading="Above 0 training raises the ratio, below 0 it lowers it, at 0 it does not look.",
        arguments="log_ratio, advantages",
        alone=_ignore_second,
        follow=_follow_log_ratio,
    ),
    "margin": _Axis(
        xlabel="margin: log-ratio of the chosen minus that of the rejected response (nats)",
        limits=(-10.0, 10.0),
        domain=(-math.inf, math.inf),
        neutral=0.0,
        panels=("chosen response", "rejected response"),
        ylabels=("push on its log-ratio",) * 2,
        heights=None,
        reading="The two responses are each half the margin away from the reference.",
        arguments="chosen_log_ratio, rejected_log_ratio",
        alone=lambda function: lambda chosen, rejected: function(chosen - rejected),
        follow=_follow_margin,
    ),
    "probability": _Axis(
        xlabel="probability of the label",
        limits=(0.0, 1.0),
        domain=(0.0, 1.0),
        neutral=None,
        panels=("weight", "direction"),
        ylabels=("norm of the gradient", "share toward the label"),
        heights=(-1.05, 1.05),
        reading="The other classes share the rest of the probability equally.",
        arguments="logits, labels",
        alone=_ignore_second,
        follow=_follow_probability,
    ),
}


def _with_two_arguments(function: LossFunction, axis: _Axis) -> LossFunction:
    """Adapt a function of one argument; refuse one that asks for more than two."""
    if not callable(function):
        raise TypeError(f"an objective must be callable, got {type(function).__name__}")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin does not say what it takes
        return function
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        return function
    required = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if len(required) == 1:
        return axis.alone(function)
    if len(required) != 2:
        raise ValueError(
            f"expected a function of ({axis.arguments}) or of the first alone, got one that "
            f"requires ({', '.join(required)}); bind the others, for example with functools.partial"
        )
    return function


def plot_weights(
    objectives: Mapping[str, LossFunction],
    over: Over,
    *,
    limits: tuple[float, float] | None = None,
    points: int = POINTS,
    classes: int = CLASSES,
    scale: Literal["auto", "linear", "log"] = "auto",
    title: str | None = None,
) -> "Figure":
    """Draw what each objective pays attention to, as :func:`weight_curves` finds it.

    Curves differ in colour, lightness and dashes, and carry their names at their ends. Objectives
    whose curves coincide in both panels share one, and its name says so.

    Args:
        objectives: by name, see :func:`weight_curves`.
        over: ``"log_ratio"``, ``"margin"`` or ``"probability"``.
        limits: ends of the axis.
        points: points of a curve.
        classes: for ``"probability"`` only.
        scale: of the upward axis. ``"log"`` shows sizes without their sign. ``"auto"`` is
            ``"log"`` if no curve changes its sign and their peaks differ more than tenfold. The
            panels of ``"probability"`` are always linear.
        title: what the figure shows; default a general one.

    Returns:
        A matplotlib figure; ``figure.savefig("anatomy.svg")`` writes it.

    Raises:
        ValueError: as :func:`weight_curves`, or an unknown ``scale``.
        TypeError: as :func:`weight_curves`.

    Example:
        >>> from functools import partial
        >>> from steelyard.policy import ppo_loss
        >>> wide = partial(ppo_loss, epsilon=0.4)
        >>> figure = plot_weights({"ppo": ppo_loss, "wide": wide}, "log_ratio", points=20)
        >>> [axes.get_title("left") for axes in figure.axes]
        ['advantage +1', 'advantage -1']
    """
    curves = weight_curves(objectives, over, limits=limits, points=points, classes=classes)
    return draw_curves(curves, scale=scale, title=title)


def draw_curves(
    curves: WeightCurves,
    *,
    scale: Literal["auto", "linear", "log"] = "auto",
    title: str | None = None,
) -> "Figure":
    """Draw what :func:`weight_curves` returned, as :func:`plot_weights` does.

    Args:
        curves: one curve or more in each panel.
        scale: as in :func:`plot_weights`.
        title: as in :func:`plot_weights`.

    Returns:
        A matplotlib figure.

    Raises:
        TypeError: ``curves`` are not :class:`WeightCurves`.
        ValueError: an unknown ``scale``.
    """
    if not isinstance(curves, WeightCurves):
        raise TypeError(f"curves must be WeightCurves, got {type(curves).__name__}")
    check_choice("scale", scale, ("auto", "linear", "log"))
    from steelyard._anatomy_figure import draw, merged, needs_log

    axis = _AXES[curves.over]
    panels = merged(curves.panels)
    log = axis.heights is None and (scale == "log" or (scale == "auto" and needs_log(panels)))
    return draw(
        curves.x,
        panels,
        title=title or "What each objective pays attention to",
        xlabel=axis.xlabel,
        ylabels=axis.ylabels,
        limits=curves.limits,
        neutral=axis.neutral,
        heights=axis.heights,
        reading=axis.reading,
        log=log,
    )
