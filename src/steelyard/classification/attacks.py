r"""Attacks on a classifier: projected gradient, and one that can be differentiated.

Give the model inputs in the range of ``bounds`` and let it normalise them itself; an attack on
normalised inputs has another radius. Attacks put a module in eval mode while they run, give every
submodule its mode back, and leave the ``grad`` of the parameters alone.

Sources: Madry et al. (2018), arXiv:1706.06083, for the projected attack; Sow, Lin, Wang, Liang
(2023), arXiv:2308.00311, for the log-barrier one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from steelyard._checks import (
    check_callable,
    check_choice,
    check_count,
    check_floating,
    check_not_empty,
    check_not_nan,
    check_pair,
    check_range,
    check_shape,
)
from steelyard.classification._implicit import attach_gradient
from steelyard.classification.doubly_robust import ItemLoss, item_losses

__all__ = ["CountedAttack", "counted_pgd_attack", "log_barrier_attack", "pgd_attack"]

Model = Callable[[Tensor], Tensor]
Bounds = tuple[float, float] | None
Norm = Literal["linf", "l2"]


class CountedAttack(NamedTuple):
    """What :func:`counted_pgd_attack` returns: the attacked inputs and ``kappa``, ``[B]`` int64."""

    x: Tensor
    kappa: Tensor


def pgd_attack(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    norm: Norm = "linf",
    loss: ItemLoss | None = None,
    bounds: Bounds = (0, 1),
    random_start: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Climb the loss inside a ball around each input: projected gradient ascent.

    .. math::
        x \leftarrow \Pi\big(x + a\,\mathrm{sign}(g)\big) \ (\ell_\infty), \qquad
        x \leftarrow \Pi\big(x + a\,g / \|g\|_2\big) \ (\ell_2), \qquad
        g = \nabla_x \ell(f(x), y)

    :math:`\Pi` projects on the ball of radius ``epsilon``, then clips to ``bounds``. One step of
    size ``epsilon`` without a random start is the fast gradient sign method.

    Args:
        model: returns logits ``[B, K]``; modules are in eval mode meanwhile.
        x: inputs within ``bounds``, ``[B, ...]``; detached.
        y: labels, ``[B]`` or what ``loss`` takes.
        epsilon: radius >= 0.
        step_size: ``a`` >= 0.
        steps: >= 0.
        norm: ``"linf"`` or ``"l2"`` (per item).
        loss: ``loss(logits, y)``, per item or one number; ``None`` = cross-entropy.
        bounds: lowest and highest input; ``None`` = no box.
        random_start: start at a point drawn uniformly from the ball, else at ``x``.
        generator: for the random start.

    Returns:
        Attacked inputs in the shape and dtype of ``x``, without a gradient.

    Raises:
        ValueError: empty input, or a setting out of range.
        TypeError: ``x`` is not floating point, ``bounds`` are no two numbers, or ``model`` or
            ``loss`` cannot be called.

    Example:
        Against a linear model the attack is exact: every feature moves by ``epsilon`` against it:

        >>> import torch
        >>> weight = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
        >>> x, y = torch.tensor([[0.5, 0.5]]), torch.tensor([1])
        >>> settings = {"epsilon": 0.1, "step_size": 0.04, "steps": 5, "random_start": False}
        >>> pgd_attack(lambda x: x @ weight.T, x, y, **settings)
        tensor([[0.4000, 0.6000]])

    Source: Madry et al. (2018), Sec. 2, arXiv:1706.06083.
    """
    settings = (epsilon, step_size, steps, norm, loss, bounds, random_start, generator)
    return _pgd(model, x, y, *settings, count=False).x


def counted_pgd_attack(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    norm: Norm = "linf",
    loss: ItemLoss | None = None,
    bounds: Bounds = (0, 1),
    random_start: bool = True,
    generator: torch.Generator | None = None,
) -> CountedAttack:
    r""":func:`pgd_attack` that also counts how long each item stays right.

    .. math:: \kappa_i = \#\{0 \le k < \text{steps} : \arg\max f(x_i^{(k)}) = y_i\}

    Each iterate is looked at *before* the step from it, the random start included. An item that no
    step turns has ``kappa = steps``. :func:`~steelyard.classification.gairat_weights` takes it.

    Args:
        model: returns logits ``[B, K]``; modules are in eval mode meanwhile.
        x: inputs within ``bounds``, ``[B, ...]``; detached.
        y: integer labels, ``[B]``.
        epsilon: radius >= 0.
        step_size: >= 0.
        steps: >= 0.
        norm: ``"linf"`` or ``"l2"`` (per item).
        loss: ``loss(logits, y)``, per item or one number; ``None`` = cross-entropy.
        bounds: lowest and highest input; ``None`` = no box.
        random_start: start at a point drawn uniformly from the ball, else at ``x``.
        generator: for the random start.

    Returns:
        ``x``, the attacked inputs, and ``kappa``, ``[B]`` in 0 to ``steps``.

    Raises:
        ValueError: empty input, or a setting out of range.
        TypeError: ``x`` is not floating point, ``bounds`` are no two numbers, or ``model`` or
            ``loss`` cannot be called.

    Example:
        The first item is misclassified after one step, the second never:

        >>> import torch
        >>> model = lambda x: torch.cat((0.5 - x, x - 0.5), 1)
        >>> x, y = torch.tensor([[0.53], [0.9]]), torch.tensor([1, 1])
        >>> settings = {"epsilon": 0.1, "step_size": 0.05, "steps": 3, "random_start": False}
        >>> counted_pgd_attack(model, x, y, **settings).kappa
        tensor([1, 3])

    Source: Zhang et al. (2021), Geometry-aware Instance-reweighted Adversarial Training,
    arXiv:2010.01736.
    """
    settings = (epsilon, step_size, steps, norm, loss, bounds, random_start, generator)
    return _pgd(model, x, y, *settings, count=True)


def log_barrier_attack(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    barrier: float,
    gamma: float = 0.0,
    steps: int,
    step_size: float,
    loss: ItemLoss | None = None,
    bounds: Bounds = (0, 1),
    implicit: Literal["none", "diagonal", "exact"] = "none",
) -> Tensor:
    r"""Attack by a smooth problem whose solution has a gradient in the parameters.

    In place of a projection a logarithm keeps the perturbation inside its box
    :math:`l \le \delta \le h`, with :math:`l = \max(-\epsilon, \mathrm{low} - x)` and
    :math:`h = \min(\epsilon, \mathrm{high} - x)`:

    .. math::
        \delta^* = \arg\min_\delta\; \bar\ell(\theta, \delta) = -\ell(f_\theta(x + \delta), y)
            + \frac\gamma2 \|\delta\|^2 - c \sum_k \big[\log(h_k - \delta_k)
            + \log(\delta_k - l_k)\big]

    by ``steps`` steps of gradient descent from 0; every iterate is pulled back to at least
    :math:`10^{-3} \epsilon` from the walls. At the solution the implicit function theorem gives

    .. math::
        \frac{d \delta^*}{d \theta} = -\big[\nabla^2_{\delta\delta} \bar\ell\big]^{-1}
            \nabla^2_{\delta\theta} \bar\ell

    ``"diagonal"`` keeps the barrier and ``gamma`` in the Hessian and drops the curvature of the
    network, which is 0 almost everywhere in the logits of a ReLU network; ``"exact"`` solves with
    the whole Hessian by preconditioned conjugate gradients, in the backward pass. Both suppose that
    the descent has converged, away from the pull-back. Its step must be below 2 over the largest
    curvature: about :math:`\epsilon^2 / c` at the centre, and :math:`2c / g^2` where a slope
    ``g`` of the loss presses against a wall. An input on a bound starts next to a wall, where no
    practical step is short enough: it ends at one wall or the other. For images with saturated
    pixels use ``bounds=None`` or look at the residual.

    Args:
        model: returns logits ``[B, K]``, each item's from its own input alone; modules are in eval
            mode meanwhile.
        x: inputs within ``bounds``, ``[B, ...]``; detached.
        y: labels, ``[B]`` or what ``loss`` takes.
        epsilon: half-width > 0.
        barrier: ``c`` > 0. The smaller, the nearer the walls; :math:`0.1 \epsilon^2` is a start.
        gamma: >= 0, pulls towards 0.
        steps: >= 0.
        step_size: >= 0, plain: the gradient is not normalised.
        loss: ``loss(logits, y)`` of each item, ``[B]``; ``None`` = cross-entropy.
        bounds: lowest and highest input; ``None`` = no box but ``epsilon``.
        implicit: gradient that the result carries to the parameters: ``"none"``, ``"diagonal"`` or
            ``"exact"``. The loss at the result then back-propagates the total derivative.

    Returns:
        ``x + delta``, strictly inside the box, shape and dtype of ``x``.

    Raises:
        ValueError: empty input, a setting out of range, or a loss that is not per item.
        TypeError: ``x`` is not floating point, ``bounds`` are no two numbers, or ``model`` or
            ``loss`` cannot be called.

    Example:
        Against a linear model the perturbation tends to the wall as the barrier falls:

        >>> import torch
        >>> weight = torch.tensor([[0.0], [3.0]])
        >>> x, y = torch.tensor([[0.5]]), torch.tensor([1])
        >>> for barrier in (1e-1, 1e-2, 1e-3):
        ...     settings = {"epsilon": 0.1, "barrier": barrier, "steps": 400, "step_size": 1e-3}
        ...     attacked = log_barrier_attack(lambda x: x @ weight.T, x, y, **settings)
        ...     print(round(float(attacked - x), 3))
        -0.027
        -0.086
        -0.099

    Source: Sow et al. (2023), Eq. 7, arXiv:2308.00311.
    """
    check_callable(model=model)
    _check_inputs(x, bounds)
    check_range("epsilon", epsilon, above=0.0)
    check_range("barrier", barrier, above=0.0)
    check_range("gamma", gamma, at_least=0.0)
    check_count("steps", steps, at_least=0)
    check_range("step_size", step_size, at_least=0.0)
    check_choice("implicit", implicit, ("none", "diagonal", "exact"))
    x = x.detach()
    low, high = torch.full_like(x, -epsilon), torch.full_like(x, epsilon)
    if bounds is not None:
        low, high = torch.maximum(low, bounds[0] - x), torch.minimum(high, bounds[1] - x)
    pull = torch.clamp((high - low) / 4, max=1e-3 * epsilon)
    inner_low, inner_high = low + pull, high - pull

    def slope(delta: Tensor, *, create_graph: bool) -> Tensor:
        """Gradient of the barrier problem in ``delta``."""
        losses = item_losses(model(x + delta), y, loss)
        [climb] = torch.autograd.grad(losses.sum(), delta, create_graph=create_graph)
        return gamma * delta + barrier * (1 / (high - delta) - 1 / (delta - low)) - climb

    differentiable = implicit != "none" and torch.is_grad_enabled()
    with _eval_mode(model), torch.enable_grad():
        delta = torch.clamp(torch.zeros_like(x), inner_low, inner_high)
        for _ in range(steps):
            gradient = slope(delta.requires_grad_(), create_graph=False)
            delta = torch.clamp(delta.detach() - step_size * gradient, inner_low, inner_high)
        if not differentiable:
            return (x + delta).detach()
        delta.requires_grad_()
        diagonal = gamma + barrier * (
            1 / (high - delta.detach()).square() + 1 / (delta.detach() - low).square()
        )
        residual = slope(delta, create_graph=True)
        return x + attach_gradient(delta, residual, diagonal, exact=implicit == "exact")


def _pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    step_size: float,
    steps: int,
    norm: Norm,
    loss: ItemLoss | None,
    bounds: Bounds,
    random_start: bool,
    generator: torch.Generator | None,
    *,
    count: bool,
) -> CountedAttack:
    _check_inputs(x, bounds)
    check_range("epsilon", epsilon, at_least=0.0)
    check_range("step_size", step_size, at_least=0.0)
    check_count("steps", steps, at_least=0)
    if steps > 0:  # the start alone needs no model
        check_callable(model=model)
    if loss is not None:
        check_callable(loss=loss)
    check_choice("norm", norm, ("linf", "l2"))
    x = x.detach()
    kappa = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
    start = x + _random_point(x, epsilon, norm, generator) if random_start else x
    attacked = _project(start, x, epsilon, norm, bounds)
    with _eval_mode(model), torch.enable_grad():
        for _ in range(steps):
            attacked = attacked.detach().requires_grad_()
            logits = model(attacked)
            if count:
                check_shape("model(x)", logits, (len(x), None))
                check_shape("y", y, (len(x),))
                kappa += logits.argmax(-1) == y
            values = item_losses(logits, y, None) if loss is None else loss(logits, y)
            [gradient] = torch.autograd.grad(values.sum(), attacked)
            step = gradient.sign() if norm == "linf" else _unit(gradient)
            attacked = _project(attacked.detach() + step_size * step, x, epsilon, norm, bounds)
    return CountedAttack(attacked.detach(), kappa)


def _project(moved: Tensor, x: Tensor, epsilon: float, norm: Norm, bounds: Bounds) -> Tensor:
    """Nearest point of the ball around ``x``, then of the box."""
    if norm == "linf":
        inside = torch.clamp(moved, x - epsilon, x + epsilon)
    else:
        delta = moved - x
        inside = x + delta * (epsilon / _norms(delta).clamp(min=epsilon)) if epsilon else x
    return inside if bounds is None else inside.clamp(*bounds)


def _random_point(
    x: Tensor, epsilon: float, norm: Norm, generator: torch.Generator | None
) -> Tensor:
    """Uniform in the ball of each item."""

    def draw(sampler: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        return sampler(shape, generator=generator, dtype=x.dtype, device=x.device)

    if norm == "linf":
        return epsilon * (2 * draw(torch.rand, x.shape) - 1)
    radius = draw(torch.rand, _column(x)) ** (1 / x[0].numel())
    return epsilon * radius * _unit(draw(torch.randn, x.shape))


def _column(x: Tensor) -> tuple[int, ...]:
    return (x.shape[0], *[1] * (x.dim() - 1))


def _norms(x: Tensor) -> Tensor:
    """Euclidean norm of each item, shaped to broadcast."""
    norms: Tensor = torch.linalg.vector_norm(x.reshape(x.shape[0], -1), dim=1)
    return norms.reshape(_column(x))


def _unit(x: Tensor) -> Tensor:
    """Each item divided by its norm; 0 stays 0."""
    norms = _norms(x)
    return x / norms.where(norms > 0, 1.0)


def _check_inputs(x: Tensor, bounds: Bounds) -> None:
    check_floating(x=x)
    check_not_empty("x", x)
    if x.dim() == 0:
        raise ValueError("x must have shape [B, ...], got []")
    if bounds is not None:
        check_pair("bounds", bounds)
        check_not_nan("bounds[0]", bounds[0])
        check_range("bounds[1]", bounds[1], above=bounds[0])
        if isinstance(bounds[0], bool) or isinstance(bounds[1], bool):
            raise TypeError(f"bounds must be two numbers, got {bounds!r:.60}")


@contextmanager
def _eval_mode(model: Model) -> Iterator[None]:
    """Put a module in eval mode, then give every submodule its own mode back."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
