r"""Confusion-matrix metrics as losses: AnyLoss.

A steep sigmoid centred on the decision threshold turns each probability into an almost-0/1 label.
Sums of these give a confusion matrix that has a gradient, and every metric of its four cells,
F-beta, balanced accuracy, G-mean, gives the loss ``1 - metric``.

The loss belongs to the whole batch: the mean over micro-batches is not the loss of their union.
To accumulate gradients, or to train on several ranks, add up the cells of :func:`soft_confusion`
first (across ranks with an all-reduce that has a gradient), then apply the metric. Draw stratified
batches, so that no class is missing.

Source: Han, Moniz, Chawla (2024), AnyLoss: Transforming Classification Metrics into Loss Functions,
arXiv:2405.14745.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor
from torch.nn import functional

from steelyard._checks import (
    check_callable,
    check_choice,
    check_floating,
    check_mask,
    check_not_empty,
    check_range,
    check_same_shape,
    check_shape,
    check_tensor,
)
from steelyard._reduce import accumulation_dtype, fill_masked
from steelyard.classification._labels import check_logits, check_number, check_values, class_labels

__all__ = [
    "Metric",
    "SoftConfusion",
    "anyloss",
    "anyloss_with_logits",
    "multiclass_anyloss",
    "soft_confusion",
]

Metric = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""A metric of the cells ``(tp, fp, fn, tn)``; larger is better."""


class SoftConfusion(NamedTuple):
    """The four cells of :func:`soft_confusion`, each 0-d; they add up to the number of items."""

    tp: Tensor
    fp: Tensor
    fn: Tensor
    tn: Tensor


def soft_confusion(
    probs: Tensor,
    labels: Tensor,
    *,
    amplification: float = 73.0,
    threshold: float = 0.5,
    mask: Tensor | None = None,
) -> SoftConfusion:
    r"""Count true and false positives and negatives so that the counts have a gradient.

    .. math::
        q_i = \sigma(L (p_i - t)), \qquad
        \mathrm{TP} = \sum y_i q_i, \quad \mathrm{FN} = \sum y_i (1 - q_i), \quad
        \mathrm{FP} = \sum (1 - y_i) q_i, \quad \mathrm{TN} = \sum (1 - y_i)(1 - q_i)

    Each cell is summed on its own, never by subtraction, so that a small one keeps its digits. The
    gradient :math:`L q (1 - q)` is taken without rounding ``1 - q``: it does not vanish on one side
    before the other. Still, a confidently wrong item has next to none: lower ``amplification``, or
    raise it during training (10 to 73), if items are stuck.

    Args:
        probs: probability of class 1, ``[N]``. A raw score works too, with its own ``threshold``.
        labels: 0 or 1, ``[N]``, any dtype; detached.
        amplification: ``L`` > 0. In float64 73 is the largest integer for which no ``q`` is 1.
        threshold: ``t``, the centre of the amplifier and the threshold to predict with.
        mask: ``[N]``, true = counts.

    Returns:
        ``tp``, ``fp``, ``fn``, ``tn``: sums over kept items, 0-d, dtype of ``probs``.

    Raises:
        ValueError: wrong shapes, empty input, a label outside [0, 1], or a setting out of range.
        TypeError: ``probs`` is not floating point.

    Example:
        One item of each kind, far from the threshold but for the last:

        >>> import torch
        >>> probs, labels = torch.tensor([0.9, 0.8, 0.1, 0.49]), torch.tensor([1, 0, 1, 0])
        >>> [round(float(cell), 3) for cell in soft_confusion(probs, labels)]
        [1.0, 1.325, 1.0, 0.675]

    Source: Han et al. (2024), Sec. 3, arXiv:2405.14745.
    """
    check_number("threshold", threshold)
    values, target = _checked("probs", probs, labels, amplification, mask)
    cells = _cells(amplification * (values - threshold), target, mask)
    return SoftConfusion(*(cell.to(probs.dtype) for cell in cells))


def anyloss(
    probs: Tensor,
    labels: Tensor,
    metric: Metric,
    *,
    amplification: float = 73.0,
    threshold: float = 0.5,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Train for a metric of the confusion matrix: ``1 - metric`` of the soft cells.

    .. math:: L = 1 - M(\mathrm{TP}, \mathrm{FP}, \mathrm{FN}, \mathrm{TN})

    As ``amplification`` grows it tends to one minus the metric of the predictions ``p > t``.

    Args:
        probs: probability of class 1, ``[N]``.
        labels: 0 or 1, ``[N]``, any dtype; detached.
        metric: any callable ``metric(tp, fp, fn, tn)`` that returns a 0-d tensor.
        amplification: ``L`` > 0 of :func:`soft_confusion`.
        threshold: the threshold to predict with.
        mask: ``[N]``, true = counts.

    Returns:
        0-d, dtype of ``probs``; exactly 0 without a kept item.

    Raises:
        ValueError: wrong shapes, empty input, a label outside [0, 1], or a setting out of range.
        TypeError: ``probs`` is not floating point.

    Example:
        Predicting no positive at all is right for three of four items and useless:

        >>> import torch
        >>> from steelyard.classification import ACCURACY, BALANCED_ACCURACY
        >>> probs, labels = torch.full((4,), 0.1), torch.tensor([0, 0, 0, 1])
        >>> round(float(anyloss(probs, labels, ACCURACY)), 4)
        0.25
        >>> round(float(anyloss(probs, labels, BALANCED_ACCURACY)), 4)
        0.5

    Source: Han et al. (2024), Sec. 3, arXiv:2405.14745. The batch's own number of items is used;
    the released Keras losses take that of the training set.
    """
    check_callable(metric=metric)
    check_number("threshold", threshold)
    values, target = _checked("probs", probs, labels, amplification, mask)
    cells = _cells(amplification * (values - threshold), target, mask)
    return _one_minus(metric, cells).to(probs.dtype)


def anyloss_with_logits(
    logits: Tensor,
    labels: Tensor,
    metric: Metric,
    *,
    amplification: float = 73.0,
    threshold: float = 0.5,
    amplify: Literal["probability", "logit"] = "probability",
    mask: Tensor | None = None,
) -> Tensor:
    r""":func:`anyloss` of ``sigmoid(logits)``, with a gradient that rounding cannot stop.

    .. math::
        q_i = \sigma\big(L (\sigma(z_i) - t)\big) \quad\text{or}\quad
        q_i = \sigma\big(L t (1 - t) (z_i - \mathrm{logit}\, t)\big)

    The second, ``amplify="logit"``, has the same slope at the threshold, and goes to 0 and 1 with
    the logit, where the first stays between :math:`\sigma(-Lt)` and :math:`\sigma(L(1-t))`.

    Args:
        logits: ``[N]``.
        labels: 0 or 1, ``[N]``, any dtype; detached.
        metric: any callable ``metric(tp, fp, fn, tn)`` that returns a 0-d tensor.
        amplification: ``L`` > 0.
        threshold: on the probability, in (0, 1).
        amplify: what the steep sigmoid is applied to; ``"probability"`` is the paper's.
        mask: ``[N]``, true = counts.

    Returns:
        0-d, dtype of ``logits``; exactly 0 without a kept item.

    Raises:
        ValueError: wrong shapes, empty input, a label outside [0, 1], or a setting out of range.
        TypeError: ``logits`` is not floating point.

    Example:
        >>> import torch
        >>> from steelyard.classification import f_beta
        >>> logits, labels = torch.tensor([2.0, 1.0, -1.0, -3.0]), torch.tensor([1, 0, 1, 0])
        >>> round(float(anyloss_with_logits(logits, labels, f_beta(1.0))), 4)
        0.5

    Source: Han et al. (2024), Sec. 3, arXiv:2405.14745; ``"logit"`` is derived.
    """
    check_callable(metric=metric)
    check_range("threshold", threshold, above=0.0, below=1.0)
    check_choice("amplify", amplify, ("probability", "logit"))
    values, target = _checked("logits", logits, labels, amplification, mask)
    if amplify == "probability":
        score = amplification * (_sigmoid(values) - threshold)
    else:
        centre = math.log(threshold) - math.log1p(-threshold)
        score = amplification * threshold * (1 - threshold) * (values - centre)
    return _one_minus(metric, _cells(score, target, mask)).to(logits.dtype)


def multiclass_anyloss(
    probs: Tensor,
    labels: Tensor,
    metric: Metric,
    *,
    average: Literal["macro", "micro", "weighted"] = "macro",
    amplification: float = 73.0,
    threshold: float = 0.5,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Train for the average of a metric over classes, each one against the rest.

    With the cells of class k, where :math:`y_{ik} = 1` if item i is of class k, and
    :math:`n_k` the number of its items,

    .. math::
        L_{\mathrm{macro}} = 1 - \frac{1}{|\{k : n_k > 0\}|} \sum_{n_k > 0} M_k, \qquad
        L_{\mathrm{weighted}} = 1 - \sum_k \frac{n_k}{n} M_k, \qquad
        L_{\mathrm{micro}} = 1 - M\Big(\sum_k \mathrm{cells}_k\Big)

    Args:
        probs: probability of each class, ``[N, K]``, for example a softmax.
        labels: integer class of each item, ``[N]``, in ``[0, K)``.
        metric: any callable ``metric(tp, fp, fn, tn)`` that works item by item: it is called once
            with the cells of all classes, each ``[K]``, or 0-d for ``"micro"``.
        average: ``"macro"`` = the mean over classes that occur in the batch, ``"weighted"`` = by
            their number of items, ``"micro"`` = the metric of the pooled cells.
        amplification: ``L`` > 0.
        threshold: class k is predicted where ``probs[:, k] > threshold``; with more than two
            classes that may be none.
        mask: ``[N]``, true = counts.

    Returns:
        0-d, dtype of ``probs``; exactly 0 without a kept item.

    Raises:
        ValueError: wrong shapes, empty input, a label outside ``[0, K)``, or a setting out of
            range.
        TypeError: ``probs`` is not floating point or ``labels`` not integer.

    Example:
        The rare class 2 is missed. That counts a third of the macro average, a sixth of micro:

        >>> import torch
        >>> from steelyard.classification import RECALL
        >>> labels = torch.tensor([0, 0, 0, 1, 1, 2])
        >>> probs = torch.nn.functional.one_hot(torch.tensor([0, 0, 0, 1, 1, 0])).float()
        >>> probs = torch.cat((probs, torch.zeros(6, 1)), 1)
        >>> for average in ("macro", "micro"):
        ...     loss = multiclass_anyloss(probs, labels, RECALL, average=average)
        ...     print(average, round(float(loss), 3))
        macro 0.333
        micro 0.167

    Source: derived from Han et al. (2024), Sec. 3, arXiv:2405.14745, which treats two classes.
    """
    check_callable(metric=metric)
    check_logits("probs", probs)
    check_range("amplification", amplification, above=0.0)
    check_number("threshold", threshold)
    check_choice("average", average, ("macro", "micro", "weighted"))
    check_mask(mask, probs[:, 0])
    index = class_labels(labels, probs, mask)
    row_mask = None if mask is None else (mask != 0).unsqueeze(-1).expand_as(probs)
    values = fill_masked(probs.to(accumulation_dtype(probs.dtype)), row_mask)
    target = functional.one_hot(index, probs.shape[1]).to(values.dtype)
    cells = _cells(amplification * (values - threshold), target, row_mask)
    if average == "micro":
        pooled = SoftConfusion(*(cell.sum() for cell in cells))
        return _one_minus(metric, pooled).to(probs.dtype)
    support = cells.tp.detach() + cells.fn.detach()
    present = (support > 0) | support.isnan()
    weights = support if average == "weighted" else present.to(support.dtype)
    total = (weights * _one_minus(metric, cells, present)).sum()
    return (total / weights.sum().where(present.any(), 1.0)).to(probs.dtype)


def _checked(
    name: str, values: Tensor, labels: Tensor, amplification: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Check the inputs; return values and labels in the dtype of sums, 0 where masked."""
    check_floating(**{name: values})
    check_shape(name, values, (None,))
    check_not_empty(name, values)
    check_tensor("labels", labels)
    check_same_shape(**{name: values, "labels": labels})
    check_range("amplification", amplification, above=0.0)
    check_mask(mask, values)
    dtype = accumulation_dtype(values.dtype)
    target = fill_masked(labels.detach().to(dtype), mask)
    check_values("labels", target, 1)
    return fill_masked(values.to(dtype), mask), target


def _cells(score: Tensor, target: Tensor, mask: Tensor | None) -> SoftConfusion:
    """Cells over the first dimension from amplified scores and 0/1 targets."""
    positive, negative = _sigmoid(score), _sigmoid(-score)
    terms = (
        target * positive,
        (1 - target) * positive,
        target * negative,
        (1 - target) * negative,
    )
    return SoftConfusion(*(fill_masked(term, mask).sum(0) for term in terms))


def _sigmoid(score: Tensor) -> Tensor:
    """Sigmoid whose gradient ``q (1 - q)`` is not 0 where ``q`` rounds to 1."""
    smooth = functional.logsigmoid(score).exp()
    return smooth + (score.sigmoid() - smooth).detach()


def _one_minus(metric: Metric, cells: SoftConfusion, counts: Tensor | None = None) -> Tensor:
    """``1 - metric``, or 0 without a gradient where the cells are empty or do not count."""
    total = cells.tp.detach() + cells.fp.detach() + cells.fn.detach() + cells.tn.detach()
    some = (total > 0) | total.isnan() if counts is None else counts
    filled = [cell.where(some, 1.0) for cell in cells]
    value = metric(*filled)
    if not isinstance(value, Tensor) or value.shape != total.shape:
        came = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"metric must return a tensor of shape {list(total.shape)}, got {came}")
    return (1 - value).where(some, 0.0)
