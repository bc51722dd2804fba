r"""ALDR: label-robust losses that choose a temperature for each item.

An item whose worst-case weights are concentrated, because one wrong class stands out, gets a
temperature below the initial one; an item with flat weights keeps it. :func:`aldr_loss` solves for
the temperature exactly at each call. :class:`ALDRState` stores one per training item and moves it
by one alternating step, as the released code does.

Source: Zhu, Ying, Yang (2023), Sec. 5, arXiv:2112.14869.
"""

import math

import torch
from torch import Tensor, nn

from steelyard._checks import check_count, check_floating, check_groups, check_range
from steelyard._reduce import Reduction, accumulation_dtype, fill_masked, reduce_masked
from steelyard.classification._labels import check_number, check_values, checked_gaps
from steelyard.classification._temperature_search import best_temperature
from steelyard.classification._tempered import kl_to_uniform, soft_maximum, soft_weights

__all__ = ["ALDRState", "aldr_loss", "aldr_temperature"]


def aldr_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    initial_temperature: float = 10.0,
    alpha: float = 2.0,
    margin: float = 0.1,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Lower the worst case over label weights *and* temperature, item by item.

    .. math::
        \psi = \max_{\lambda \ge 0} \max_p \sum_k p_k \delta_k
            - \lambda\,\mathrm{KL}(p \,\|\, 1/K)
            - \frac{\alpha \log K}{2 \lambda_0} (\lambda - \lambda_0)^2

    The problem is concave in each variable but not in both, and may have several stationary points.
    This is the global maximum, in :math:`[\lambda_0 (1 - 1/\alpha), \lambda_0]`. The gradient in
    the logits is :math:`p^* - \mathrm{onehot}(y)`; none flows through the temperature.

    Args:
        logits: ``[B, K]``, K >= 2; not normalised here, see
            :func:`~steelyard.classification.normalize_logits`.
        labels: integer classes, ``[B]``, in ``[0, K)``.
        initial_temperature: :math:`\lambda_0` > 0, the largest temperature.
        alpha: stiffness > 1; as it grows the loss tends to ``ldr_loss`` at
            ``initial_temperature``.
        margin: ``c`` >= 0, added to every gap but that of the label; inside the weights, too.
        mask: ``[B]``, true = counts.
        reduction: over items.

    Returns:
        0-d or ``[B]``, dtype of ``logits``.

    Raises:
        ValueError: wrong shapes, empty input, a label outside ``[0, K)``, or a setting out of
            range.
        TypeError: ``logits`` is not floating point or ``labels`` not integer.

    Example:
        The loss of a contradicted label grows like that of the smallest temperature, 0.5:

        >>> import torch
        >>> logits, labels = torch.tensor([[0.0, 0.0], [0.0, 9.0]]), torch.tensor([0, 0])
        >>> settings = {"initial_temperature": 1.0, "margin": 0.0}
        >>> aldr_temperature(logits, labels, **settings)
        tensor([1.0000, 0.5000])
        >>> aldr_loss(logits, labels, reduction="none", **settings)
        tensor([0.0000, 8.4801])

    Source: Zhu et al. (2023), Sec. 5, arXiv:2112.14869; ``alpha`` in the scaling of the released
    code.
    """
    gaps = checked_gaps(logits, labels, margin, mask)
    _check_setting(initial_temperature, alpha)
    temperature = best_temperature(gaps, initial_temperature, alpha)
    values = _values(gaps, temperature, initial_temperature, alpha)
    return reduce_masked(values.to(logits.dtype), mask, reduction)


def aldr_temperature(
    logits: Tensor,
    labels: Tensor,
    *,
    initial_temperature: float = 10.0,
    alpha: float = 2.0,
    margin: float = 0.1,
) -> Tensor:
    r"""Return the temperature at which the maximum of :func:`aldr_loss` is reached.

    It is the fixed point

    .. math::
        \lambda = \lambda_0 \Big(1 - \frac{\mathrm{KL}(p_\lambda \,\|\, 1/K)}{\alpha \log K}\Big),
        \qquad p_\lambda = \mathrm{softmax}(\delta / \lambda),

    the best one where there are several. Found by bracketing on a grid and Newton's method, without
    waiting for the device.

    Args:
        logits: ``[B, K]``, K >= 2; detached.
        labels: integer classes, ``[B]``, in ``[0, K)``.
        initial_temperature: :math:`\lambda_0` > 0.
        alpha: stiffness > 1.
        margin: ``c`` >= 0.

    Returns:
        ``[B]`` in :math:`[\lambda_0 (1 - 1/\alpha), \lambda_0]`, dtype of ``logits``, without a
        gradient.

    Raises:
        ValueError: wrong shapes, empty input, a label outside ``[0, K)``, or a setting out of
            range.
        TypeError: ``logits`` is not floating point or ``labels`` not integer.

    Example:
        One class standing out against the label lowers the temperature:

        >>> import torch
        >>> logits = torch.tensor([[0.0, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, 50.0, 0.0]])
        >>> aldr_temperature(logits, torch.tensor([0, 0, 0]), margin=0.0).round(decimals=2)
        tensor([10.0000,  9.8600,  5.0000])

    Source: Zhu et al. (2023), Sec. 5, arXiv:2112.14869.
    """
    check_floating(logits=logits)
    gaps = checked_gaps(logits.detach(), labels, margin, None)
    _check_setting(initial_temperature, alpha)
    return best_temperature(gaps, initial_temperature, alpha).to(logits.dtype)


class ALDRState(nn.Module):
    r"""ALDR with a stored temperature for each training item, moved by one step at each visit.

    .. math::
        p = \mathrm{softmax}(f / \lambda_i), \qquad
        \lambda_i \leftarrow \lambda_0
            \Big(1 - \frac{\mathrm{KL}(p \,\|\, 1/K)}{\alpha \log K}\Big), \qquad
        \psi = \lambda_i \log \frac1K \sum_k e^{\delta_k / \lambda_i}
            - \frac{\alpha \log K}{2 \lambda_0} (\lambda_i - \lambda_0)^2

    The step is alternating maximisation of the objective of :func:`aldr_loss`. With
    ``margin_in_weights=True`` it never lowers that objective. Repeated on the same logits it tends
    to a stationary point, perhaps not the best one. For items that are not in the training set use
    :func:`aldr_temperature`.

    The buffer ``temperatures`` is part of the state dict: keep it with the checkpoint. On several
    ranks an item must always come to the same rank, or its temperature must be gathered.

    Args:
        num_items: number of training items, >= 1.
        initial_temperature: :math:`\lambda_0` > 0, where all items start.
        alpha: stiffness > 1.
        margin: ``c`` >= 0, in the loss.
        margin_in_weights: put the margin into the weights, as the objective says; ``False`` leaves
            it out, as the released code does.

    Attributes:
        temperatures: ``[num_items]``, float64.

    Raises:
        ValueError: a setting out of range.

    Example:
        After some visits the contradicted item has the lower temperature:

        >>> import torch
        >>> state = ALDRState(2, initial_temperature=1.0)
        >>> logits, labels = torch.tensor([[0.0, 0.0], [0.0, 9.0]]), torch.tensor([0, 0])
        >>> for _ in range(5):
        ...     loss = state(logits, labels, torch.tensor([0, 1]))
        >>> state.temperatures
        tensor([1.0000, 0.5000], dtype=torch.float64)

    Source: Zhu et al. (2023), Sec. 5, arXiv:2112.14869. The released code adds 1e-5 to the weights;
    here they are exact.
    """

    temperatures: Tensor

    def __init__(
        self,
        num_items: int,
        *,
        initial_temperature: float = 10.0,
        alpha: float = 2.0,
        margin: float = 0.1,
        margin_in_weights: bool = False,
    ) -> None:
        super().__init__()
        check_count("num_items", num_items)
        _check_setting(initial_temperature, alpha)
        check_range("margin", margin, at_least=0.0)
        self.initial_temperature = initial_temperature
        self.alpha = alpha
        self.margin = margin
        self.margin_in_weights = margin_in_weights
        start = torch.full((num_items,), float(initial_temperature), dtype=torch.float64)
        self.register_buffer("temperatures", start)

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        index: Tensor,
        *,
        mask: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """Move the temperatures of a batch by one step and return the loss with the new ones.

        Args:
            logits: ``[B, K]``, K >= 2.
            labels: integer classes, ``[B]``, in ``[0, K)``.
            index: which training item each row is, ``[B]``, in ``[0, num_items)``. Of rows with the
                same index one is stored, which one is not defined.
            mask: ``[B]``, true = counts; the temperatures of the other items stay.
            reduction: over items.

        Returns:
            0-d or ``[B]``, dtype of ``logits``.

        Raises:
            ValueError: wrong shapes, empty input, or a label or index out of range.
            TypeError: ``logits`` is not floating point, ``labels`` or ``index`` not integer.
        """
        gaps = checked_gaps(logits, labels, self.margin, mask)
        check_groups(index, logits, name="index")
        check_values("index", index, len(self.temperatures) - 1)
        places = index.long()
        old = self.temperatures[places]
        new = self._step(logits, gaps, old.to(gaps.dtype), mask)
        kept = torch.ones_like(old, dtype=torch.bool) if mask is None else mask != 0
        stored = torch.where(kept, new.to(old.dtype), old)
        with torch.no_grad():
            self.temperatures[places] = stored
        values = _values(gaps, new, self.initial_temperature, self.alpha)
        return reduce_masked(values.to(logits.dtype), mask, reduction)

    def _step(self, logits: Tensor, gaps: Tensor, old: Tensor, mask: Tensor | None) -> Tensor:
        """Temperature that is best for the weights at the old one, ``[B]``."""
        scores = gaps.detach()
        if not self.margin_in_weights:
            row_mask = None if mask is None else (mask != 0).unsqueeze(1)
            values = logits.detach().to(accumulation_dtype(logits.dtype))
            scores = fill_masked(values, row_mask)
        share = kl_to_uniform(soft_weights(scores, old)) / math.log(scores.shape[1])
        share = share.clamp(0.0, 1.0) / self.alpha
        return self.initial_temperature * (1 - share)


def _check_setting(initial_temperature: float, alpha: float) -> None:
    check_number("initial_temperature", initial_temperature)
    check_range("initial_temperature", initial_temperature, above=0.0)
    check_range("alpha", alpha, above=1.0)


def _values(gaps: Tensor, temperature: Tensor, initial: float, alpha: float) -> Tensor:
    """Objective at a fixed temperature ``[B]``, weights maximised; differentiable in the gaps."""
    stiffness = alpha * math.log(gaps.shape[1]) / initial
    penalty = 0.5 * stiffness * (temperature - initial).square()
    return soft_maximum(gaps, temperature) - penalty
