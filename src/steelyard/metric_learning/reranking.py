r"""Losses for rerankers, taken apart: how much each document counts, and in which direction.

A reranker scores a query and a document by the logits of "yes" and "no". Contrastive learning and
supervised fine-tuning (SFT) both move the hidden state of a document by a scalar weight times a
direction, so weight and direction can be chosen separately.

Source: Dai et al. (2025), Supervised Fine-Tuning or Contrastive Learning? Towards Better Multimodal
LLM Reranking, arXiv:2510.14824.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from steelyard._checks import (
    check_choice,
    check_floating,
    check_mask,
    check_not_empty,
    check_range,
    check_same_shape,
    check_shape,
    check_tensor,
)
from steelyard._reduce import Reduction, fill_masked, reduce_masked, widen

__all__ = ["contrastive_rerank_loss", "rerank_weights", "sft_rerank_loss", "unified_rerank_loss"]

Scheme = Literal["contrastive", "sft", "constant"]
Direction = Literal["yes_minus_no", "yes"]
_SCHEMES = ("contrastive", "sft", "constant")
_NOTHING = -1e30  # a logit without weight; finite, so that its slope is 0 and not NaN


def contrastive_rerank_loss(
    scores: Tensor,
    *,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Tell the relevant document of a query from the others (InfoNCE over its list).

    .. math:: L = -\log \frac{e^{z_+ / T}}{e^{z_+ / T} + \sum_i e^{z_i^- / T}}

    With several positives, the mean over them of the loss of each against the negatives alone.

    Args:
        scores: ``[B, N + 1]``, the documents of each query.
        labels: 0/1 of the same shape; ``None`` = document 0 is the positive.
        temperature: ``T`` > 0.
        mask: same shape, true = counts; a padded document is in no denominator.
        reduction: over the queries with a kept positive. A query without one is undefined and
            gives 0; it does not count. A query without negatives gives 0 and counts.

    Returns:
        0-d, or ``[B]`` for ``"none"``; dtype of ``scores``.

    Raises:
        ValueError: wrong shapes, empty input, ``temperature <= 0``.
        TypeError: ``scores`` not floating point.

    Example:
        A constant added to all scores of a query changes nothing:

        >>> import torch
        >>> scores = torch.tensor([[1.0, 0.0]])
        >>> contrastive_rerank_loss(scores), contrastive_rerank_loss(scores + 100)
        (tensor(0.3133), tensor(0.3133))

    Source: Dai et al. (2025), Sec. 3, arXiv:2510.14824; several positives are ours.
    """
    _check_lists(mask, scores=scores)
    check_range("temperature", temperature, above=0.0)
    positive, negative = _roles(scores, labels, mask)
    logits = _widen(scores, mask) / temperature
    gap = _log_negatives(logits, negative) - logits
    each = -logsigmoid(-gap).where(positive, 0.0)
    count = positive.sum(-1)
    loss = each.sum(-1) / count.clamp(min=1)
    return reduce_masked(loss.to(scores.dtype), count > 0, reduction)


def sft_rerank_loss(
    yes_logits: Tensor,
    no_logits: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Answer "yes" for relevant documents and "no" for others: cross-entropy per document.

    .. math::
        L_+ = \mathrm{softplus}(z_n - z_y), \qquad L_- = \mathrm{softplus}(z_y - z_n)

    Args:
        yes_logits: ``[B, N + 1]``.
        no_logits: ``[B, N + 1]``; zeros make a reranker with one logit.
        labels: 0/1 relevance, ``[B, N + 1]``.
        mask: same shape, true = counts.
        reduction: over the **documents**. The decomposition into weights and directions belongs to
            the sum over the documents of a query, which is ``N + 1`` times as large.

    Returns:
        0-d, or ``[B, N + 1]`` for ``"none"``; dtype of ``yes_logits``.

    Raises:
        ValueError: shapes differ or empty input.
        TypeError: logits not floating point.

    Example:
        >>> import torch
        >>> yes, no, labels = torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2), torch.tensor([[1, 0]])
        >>> sft_rerank_loss(yes, no, labels, reduction="none")
        tensor([[0.3133, 0.6931]])

    Source: Dai et al. (2025), Sec. 3, arXiv:2510.14824.
    """
    _check_lists(mask, yes_logits=yes_logits, no_logits=no_logits, labels=labels)
    margin = _signed_margin(yes_logits, no_logits, labels, mask)
    return reduce_masked(-logsigmoid(margin).to(yes_logits.dtype), mask, reduction)


def rerank_weights(
    yes_logits: Tensor,
    no_logits: Tensor,
    labels: Tensor,
    *,
    scheme: Scheme = "contrastive",
    temperature: float = 1.0,
    mask_threshold: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""How hard a scheme pushes each document.

    With :math:`s = \sigma(z_y - z_n)` and :math:`p` the softmax of the yes logits over a positive
    and the negatives,

    .. math::
        W_\mathrm{SFT}^+ = 1 - s_0, \quad W_{\mathrm{SFT}, i}^- = s_i, \qquad
        W_\mathrm{CL}^+ = \frac{1 - p_0}{T}, \quad W_{\mathrm{CL}, i}^- = \frac{p_i}{T}

    Contrastive weights obey a sum rule: negatives together weigh as much as the positives, at most
    ``1/T``. SFT weights of ``N`` negatives may reach ``N``.

    Args:
        yes_logits: ``[B, N + 1]``; detached.
        no_logits: ``[B, N + 1]``; detached.
        labels: 0/1 relevance, ``[B, N + 1]``.
        scheme: ``"contrastive"``, ``"sft"`` or ``"constant"`` (all ones).
        temperature: of the contrastive scheme, > 0.
        mask_threshold: in (0, 1); documents whose right answer has probability above
            ``1 - mask_threshold`` get 0. Without it the constant scheme never stops pushing.
        mask: same shape, true = counts; others get 0.

    Returns:
        ``[B, N + 1]``, >= 0, without gradient, dtype of ``yes_logits``. With several positives
        those of :func:`contrastive_rerank_loss`; a query without a positive has weights 0 there.

    Raises:
        ValueError: shapes differ, empty input, or a setting out of range.
        TypeError: logits not floating point.

    Example:
        Equal logits, four negatives: together they weigh 4/5 or 2.

        >>> import torch
        >>> zeros, labels = torch.zeros(1, 5), torch.tensor([[1, 0, 0, 0, 0]])
        >>> rerank_weights(zeros, zeros, labels, scheme="contrastive")
        tensor([[0.8000, 0.2000, 0.2000, 0.2000, 0.2000]])
        >>> rerank_weights(zeros, zeros, labels, scheme="sft")
        tensor([[0.5000, 0.5000, 0.5000, 0.5000, 0.5000]])

    Source: Dai et al. (2025), Sec. 4, arXiv:2510.14824.
    """
    _check_lists(mask, yes_logits=yes_logits, no_logits=no_logits, labels=labels)
    check_choice("scheme", scheme, _SCHEMES)
    check_range("temperature", temperature, above=0.0)
    yes, no = yes_logits.detach(), no_logits.detach()
    wrong = (-_signed_margin(yes, no, labels, mask)).sigmoid()
    if scheme == "contrastive":
        weights = _contrastive_weights(yes, labels, temperature, mask)
    else:
        weights = wrong if scheme == "sft" else torch.ones_like(wrong)
    weights = _stop_easy(weights, wrong, mask_threshold)
    return fill_masked(weights, mask).to(yes_logits.dtype)


def unified_rerank_loss(
    yes_logits: Tensor,
    no_logits: Tensor,
    labels: Tensor,
    *,
    weight: Scheme | Tensor = "sft",
    direction: Direction = "yes_minus_no",
    temperature: float = 1.0,
    mask_threshold: float | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Any weight with any direction, as a loss whose gradient is their product.

    With :math:`d = z_y - z_n` or :math:`z_y`, and weights held constant,

    .. math:: L = -\sum_+ W^+ d + \sum_- W^- d

    ``"contrastive"`` with ``"yes"`` has the gradient of :func:`contrastive_rerank_loss`; ``"sft"``
    with ``"yes_minus_no"`` that of :func:`sft_rerank_loss` summed over the documents of a query.
    The value is no likelihood: do not stop early on it.

    Args:
        yes_logits: ``[B, N + 1]``.
        no_logits: ``[B, N + 1]``.
        labels: 0/1 relevance, ``[B, N + 1]``.
        weight: a scheme of :func:`rerank_weights`, or a tensor ``[B, N + 1]``; detached.
        direction: ``"yes_minus_no"`` (SFT) or ``"yes"`` (contrastive).
        temperature: of the contrastive weights, > 0.
        mask_threshold: as in :func:`rerank_weights`, for a tensor too.
        mask: same shape, true = counts.
        reduction: over queries with a kept document (with a kept positive for contrastive weights),
            each the sum over its documents.

    Returns:
        0-d, or ``[B]`` for ``"none"``; dtype of ``yes_logits``.

    Raises:
        ValueError: shapes differ, empty input, or a setting out of range.
        TypeError: logits or weights not floating point.

    Example:
        The slopes in the yes logits are the weights, with a sign:

        >>> import torch
        >>> yes = torch.tensor([[1.0, 0.0]], requires_grad=True)
        >>> no, labels = torch.zeros(1, 2), torch.tensor([[1, 0]])
        >>> unified_rerank_loss(yes, no, labels, weight="sft").backward()
        >>> yes.grad
        tensor([[-0.2689,  0.5000]])

    Source: Dai et al. (2025), the unified reranking loss, arXiv:2510.14824; the surrogate is ours.
    """
    _check_lists(mask, yes_logits=yes_logits, no_logits=no_logits, labels=labels)
    check_choice("direction", direction, ("yes_minus_no", "yes"))
    positive, negative = _roles(yes_logits, labels, mask)
    if isinstance(weight, Tensor):
        check_floating(weight=weight)
        check_same_shape(yes_logits=yes_logits, weight=weight)
        wrong = (-_signed_margin(yes_logits, no_logits, labels, mask)).sigmoid().detach()
        weights = _stop_easy(weight.detach().to(wrong.dtype), wrong, mask_threshold)
    else:
        check_choice("weight", weight, _SCHEMES)
        weights = rerank_weights(
            widen(yes_logits.detach()),
            no_logits,
            labels,
            scheme=weight,
            temperature=temperature,
            mask_threshold=mask_threshold,
            mask=mask,
        )
    along = _widen(yes_logits, mask)
    if direction == "yes_minus_no":
        along = along - _widen(no_logits, mask)
    signed = torch.where(positive, -1.0, 1.0) * fill_masked(weights, mask) * along
    needs_positive = isinstance(weight, str) and weight == "contrastive"
    counted = positive.any(-1) if needs_positive else (positive | negative).any(-1)
    return reduce_masked(signed.sum(-1).to(yes_logits.dtype), counted, reduction)


def _contrastive_weights(
    yes: Tensor, labels: Tensor, temperature: float, mask: Tensor | None
) -> Tensor:
    positive, negative = _roles(yes, labels, mask)
    logits = _widen(yes, mask) / temperature
    log_negatives = _log_negatives(logits, negative)
    share = (log_negatives - logits).sigmoid() / positive.sum(-1, keepdim=True).clamp(min=1)
    upward = share.where(positive, 0.0)
    among = (logits - log_negatives).where(negative, _NOTHING).exp()
    return (upward + among * upward.sum(-1, keepdim=True)) / temperature


def _log_negatives(logits: Tensor, negative: Tensor) -> Tensor:
    return logits.where(negative, _NOTHING).logsumexp(-1, keepdim=True)


def _stop_easy(weights: Tensor, wrong: Tensor, mask_threshold: float | None) -> Tensor:
    """Set to 0 what is right already: P(right) > 1 - threshold is P(wrong) < threshold."""
    if mask_threshold is None:
        return weights
    check_range("mask_threshold", mask_threshold, above=0.0, below=1.0)
    stopped = weights.masked_fill(wrong < mask_threshold, 0.0)
    return stopped.masked_fill(wrong.isnan(), math.nan)


def _signed_margin(yes: Tensor, no: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    margin = _widen(yes, mask) - _widen(no, mask)
    return torch.where(labels != 0, margin, -margin)


def _roles(values: Tensor, labels: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which kept documents are positives and which negatives."""
    if labels is None:
        first = torch.arange(values.shape[-1], device=values.device) == 0
        positive = first.expand(values.shape)
    else:
        check_same_shape(scores=values, labels=labels)
        positive = labels != 0
    kept = torch.ones_like(positive) if mask is None else mask != 0
    return positive & kept, ~positive & kept


def _widen(values: Tensor, mask: Tensor | None) -> Tensor:
    return widen(fill_masked(values, mask))


def _check_lists(mask: Tensor | None, **tensors: Tensor) -> None:
    check_floating(**{name: value for name, value in tensors.items() if name != "labels"})
    name, first = next(iter(tensors.items()))
    check_shape(name, first, (None, None))
    for other, tensor in tensors.items():
        check_tensor(other, tensor)
    check_same_shape(**tensors)
    check_not_empty(name, first)
    check_mask(mask, first)
