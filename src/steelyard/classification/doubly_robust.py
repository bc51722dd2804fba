r"""Doubly robust training: an adversary on the inputs and one on the weights of the items.

.. math::
    \min_\theta \max_{w \in \Delta} \sum_i w_i\, \ell_i(\theta, \delta_i^*)
        - r \sum_i w_i \log(N w_i)
    \;=\; \min_\theta\; r \log \frac1N \sum_i e^{\ell_i(\theta, \delta_i^*) / r}

The best weights are a softmax of the losses. A mini-batch's own softmax is a biased estimate of
theirs; :class:`ScgdTracker` follows the mean over all items instead. Everything stays in log space,
so small temperatures do not overflow. Watch the effective sample size ``1 / sum w^2`` and raise the
temperature if it falls to a few items: mislabelled items have large losses, too.

Source: Sow, Lin, Wang, Liang (2023), Doubly Robust Instance-Reweighted Adversarial Training,
arXiv:2308.00311.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from steelyard._checks import (
    check_callable,
    check_floating,
    check_integer_dtype,
    check_mask,
    check_not_empty,
    check_range,
    check_same_shape,
    check_shape,
    check_tensor,
)
from steelyard._reduce import accumulation_dtype
from steelyard.classification._tempered import check_temperature, soft_maximum, soft_weights

__all__ = [
    "DoublyRobustStep",
    "ScgdTracker",
    "doubly_robust_step",
    "kl_dro_value",
    "kl_dro_weights",
]

ItemLoss = Callable[[Tensor, Tensor], Tensor]


class DoublyRobustStep(NamedTuple):
    """What :func:`doubly_robust_step` returns, all before the step and without a gradient."""

    value: Tensor
    weights: Tensor
    losses: Tensor


def kl_dro_value(losses: Tensor, temperature: float, *, mask: Tensor | None = None) -> Tensor:
    r"""Worst mean loss over weights on the items that stay near uniform.

    .. math::
        T \log \frac1N \sum_i e^{\ell_i / T}
            = \max_{w \in \Delta} \sum_i w_i \ell_i - T\,\mathrm{KL}(w \,\|\, 1/N)

    It goes from the largest loss (T = 0) to the mean (T = inf), about
    :math:`\bar\ell + \mathrm{Var}(\ell) / 2T` for large T. Its gradient in the losses is
    :func:`kl_dro_weights`. On several ranks gather the losses first.

    Args:
        losses: ``[N]``.
        temperature: T, the strength of the penalty, in [0, inf].
        mask: ``[N]``, true = counts.

    Returns:
        0-d, dtype of ``losses``; exactly 0 without a kept item.

    Raises:
        ValueError: wrong shapes, empty input or ``temperature`` negative.
        TypeError: ``losses`` is not floating point.

    Example:
        >>> import torch
        >>> losses = torch.tensor([0.0, 1.0, 5.0])
        >>> [round(float(kl_dro_value(losses, t)), 3) for t in (0.0, 0.01, 1.0, float("inf"))]
        [5.0, 4.989, 3.926, 2.0]

    Source: Sow et al. (2023), Eq. 6, arXiv:2308.00311.
    """
    values, kept = _checked(losses, temperature, mask)
    return soft_maximum(values, temperature, kept).to(losses.dtype)


def kl_dro_weights(losses: Tensor, temperature: float, *, mask: Tensor | None = None) -> Tensor:
    r"""Return the worst weights: the maximiser of :func:`kl_dro_value`.

    .. math:: w_i = \frac{e^{\ell_i / T}}{\sum_j e^{\ell_j / T}}

    Args:
        losses: ``[N]``; detached.
        temperature: T in [0, inf]; at 0 the largest losses share, at inf all are equal.
        mask: ``[N]``, true = counts; the others get weight 0.

    Returns:
        ``[N]``, sum 1 (0 without a kept item), dtype of ``losses``, without a gradient.

    Raises:
        ValueError: wrong shapes, empty input or ``temperature`` negative.
        TypeError: ``losses`` is not floating point.

    Example:
        A temperature far below the losses does not overflow:

        >>> import torch
        >>> kl_dro_weights(torch.tensor([100.0, 100.0, 98.0]), 0.01)
        tensor([0.5000, 0.5000, 0.0000])

    Source: Sow et al. (2023), Sec. 3, arXiv:2308.00311.
    """
    values, kept = _checked(losses, temperature, mask)
    return soft_weights(values, temperature, kept).to(losses.dtype)


class ScgdTracker(nn.Module):
    r"""Item weights for mini-batches, from a moving estimate of the mean over all items.

    .. math::
        u \leftarrow (1 - \eta)\, u + \eta\, g_B, \qquad g_B = \frac1{|B|} \sum_{i \in B}
            e^{\ell_i / T}, \qquad v_i = \frac{e^{\ell_i / T}}{u}

    Multiply the losses by ``weights / B`` and sum. With the losses of the *same* batch before the
    last step, the estimate follows the moving network (the corrected form),

    .. math:: u \leftarrow (1 - \eta)(u - g_B^{\mathrm{old}}) + g_B,

    kept at :math:`\eta g_B` or more. On several ranks gather the losses first.

    Args:
        eta: step of the estimate, in (0, 1]. 1 forgets: ``weights / B`` is the batch's softmax.
        temperature: T > 0.

    Attributes:
        log_value: ``log u``, 0-d, float64; ``-inf`` before the first batch, whose mean it then is.

    Raises:
        ValueError: ``eta`` or ``temperature`` out of range.

    Example:
        After an easy batch, a hard one weighs more than its own softmax would say:

        >>> import torch
        >>> tracker = ScgdTracker(eta=0.5, temperature=1.0)
        >>> tracker.update(torch.tensor([0.0, 0.0]))
        tensor([1., 1.])
        >>> tracker.update(torch.tensor([1.0, 1.0]))
        tensor([1.4621, 1.4621])

    Source: Sow et al. (2023), Sec. 3, arXiv:2308.00311; the form of the correction is the usual one
    of stochastically corrected compositional gradients.
    """

    log_value: Tensor

    def __init__(self, eta: float, temperature: float) -> None:
        super().__init__()
        check_range("eta", eta, above=0.0, at_most=1.0)
        check_range("temperature", temperature, above=0.0)
        self.eta = eta
        self.temperature = temperature
        self.register_buffer("log_value", torch.tensor(-math.inf, dtype=torch.float64))

    @torch.no_grad()
    def update(
        self,
        losses: Tensor,
        *,
        previous_losses: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Take a batch into the estimate and return the weights of its items.

        Args:
            losses: ``[B]``; detached.
            previous_losses: losses of the same items at the parameters before the last step,
                ``[B]``, for the corrected form. The first batch has no estimate to correct.
            mask: ``[B]``, true = counts; the others get weight 0. Without a kept item the estimate
                stays.

        Returns:
            ``[B]``, mean about 1, dtype of ``losses``, without a gradient.

        Raises:
            ValueError: wrong shapes or empty input.
            TypeError: a tensor is not floating point.
        """
        values, kept = _checked(losses, self.temperature, mask)
        values = values.to(self.log_value.dtype)
        batch = soft_maximum(values, self.temperature, kept) / self.temperature
        moved = self._moved(batch)
        if previous_losses is not None:
            check_same_shape(losses=losses, previous_losses=previous_losses)
            older, _ = _checked(previous_losses, self.temperature, mask)
            before = soft_maximum(older.to(values.dtype), self.temperature, kept)
            moved = self._corrected(batch, before / self.temperature)
        new = torch.where(self.log_value == -math.inf, batch, moved)
        some = torch.ones_like(new, dtype=torch.bool) if kept is None else kept.any()
        self.log_value.copy_(torch.where(some, new, self.log_value))
        weights = (values / self.temperature - self.log_value).exp()
        return (weights if kept is None else weights.where(kept, 0.0)).to(losses.dtype)

    def _moved(self, batch: Tensor) -> Tensor:
        if self.eta == 1:
            return batch
        old = self.log_value + math.log1p(-self.eta)
        return torch.logaddexp(old, batch + math.log(self.eta))

    def _corrected(self, batch: Tensor, before: Tensor) -> Tensor:
        """``log((1 - eta)(u - before) + batch)``, at least ``log(eta batch)``."""
        if self.eta == 1:
            return batch
        keep = math.log1p(-self.eta)
        gain = torch.logaddexp(self.log_value + keep, batch)
        loss = torch.minimum(before + keep - gain, batch.new_tensor(0.0))
        return torch.maximum(gain + torch.log1p(-loss.exp()), batch + math.log(self.eta))


def doubly_robust_step(
    model: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    *,
    attack: Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor],
    temperature: float = 1.0,
    tracker: ScgdTracker | None = None,
    loss: ItemLoss | None = None,
) -> DoublyRobustStep:
    r"""Attack a batch, weigh its items by how well that worked, take one optimiser step.

    .. math:: \theta \leftarrow \mathrm{step}\Big(\nabla_\theta \sum_i w_i\, \ell_i(\theta, x_i +
        \delta_i^*)\Big)

    with constant weights ``w``: the softmax of the batch, or ``tracker.update(losses) / B``. If the
    attack's result carries a gradient to the parameters, as :func:`log_barrier_attack` with
    ``implicit`` does, the step uses the total derivative. Gradients are set to zero first.

    Args:
        model: returns logits; called in the mode it is in.
        optimizer: of the model's parameters.
        x: batch of inputs, ``[B, ...]``.
        y: labels, ``[B]`` or what ``loss`` takes.
        attack: ``attack(model, x, y)`` returns the attacked inputs, ``[B, ...]``.
        temperature: of :func:`kl_dro_weights`, in [0, inf]; with a tracker, its own is used.
        tracker: a :class:`ScgdTracker`, ``None`` = the softmax of the batch.
        loss: ``loss(logits, y)`` of each item, ``[B]``; ``None`` = cross-entropy.

    Returns:
        ``value``: the batch's :func:`kl_dro_value` before the step, with a tracker ``T log u``;
        ``weights`` ``[B]``, which multiplied the losses; ``losses`` ``[B]``.

    Raises:
        ValueError: the loss is not of shape ``[B]``, or ``temperature`` is negative.
        TypeError: ``model``, ``attack``, ``optimizer``, ``tracker`` or ``loss`` is something else.

    Example:
        A model on which the second item is worse:

        >>> import torch
        >>> model = torch.nn.Linear(2, 2)
        >>> _ = torch.nn.init.eye_(model.weight), torch.nn.init.zeros_(model.bias)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x, y = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])
        >>> step = doubly_robust_step(model, optimizer, x, y, attack=lambda model, x, y: x)
        >>> step.weights
        tensor([0.1192, 0.8808])

    Source: Sow et al. (2023), Algorithm 1, arXiv:2308.00311.
    """
    check_callable(model=model, attack=attack)
    for method in ("zero_grad", "step"):
        check_callable(**{f"optimizer.{method}": getattr(optimizer, method, None)})
    if tracker is not None and not isinstance(tracker, ScgdTracker):
        raise TypeError(f"tracker must be a ScgdTracker, got {type(tracker).__name__}")
    check_tensor("x", x)
    check_temperature("temperature", temperature)
    attacked = attack(model, x, y)
    losses = item_losses(model(attacked), y, loss)
    if tracker is None:
        value = kl_dro_value(losses.detach(), temperature)
        weights = kl_dro_weights(losses, temperature)
    else:
        weights = tracker.update(losses) / len(losses)
        value = (tracker.temperature * tracker.log_value).to(losses.dtype)
    optimizer.zero_grad()
    (weights * losses).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return DoublyRobustStep(value, weights, losses.detach())


def item_losses(logits: Tensor, y: Tensor, loss: ItemLoss | None) -> Tensor:
    """Loss of each item, ``[B]``; cross-entropy if ``loss`` is ``None``."""
    if loss is None:
        check_integer_dtype(y=y)
        check_shape("y", y, (logits.shape[0],))
        return functional.cross_entropy(logits, y.long(), reduction="none")
    check_callable(loss=loss)
    losses = loss(logits, y)
    check_shape("loss(logits, y)", losses, (logits.shape[0],))
    return losses


def _checked(
    losses: Tensor, temperature: float, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Check the inputs; return the losses in the dtype of sums and the boolean mask."""
    check_floating(losses=losses)
    check_shape("losses", losses, (None,))
    check_not_empty("losses", losses)
    check_temperature("temperature", temperature)
    check_mask(mask, losses)
    kept = None if mask is None else mask != 0
    return losses.to(accumulation_dtype(losses.dtype)), kept
