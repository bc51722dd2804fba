r"""Metrics of the four cells of a confusion matrix, hard or soft, with a gradient everywhere.

Pass one to :func:`steelyard.classification.anyloss`, or call it: ``ACCURACY(tp, fp, fn, tn)``. The
cells may have any common shape. A quotient whose denominator is 0 is 0, without a gradient.
Balanced accuracy, G-mean and Youden's J use the rates of both classes: if one class has no item,
its rate is undefined and the other rate alone counts.

Source: Han, Moniz, Chawla (2024), Sec. 3, arXiv:2405.14745, for accuracy, F-beta, G-mean and
balanced accuracy; the others by the same recipe.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from steelyard._checks import check_floating, check_range

__all__ = [
    "ACCURACY",
    "BALANCED_ACCURACY",
    "COHEN_KAPPA",
    "FOWLKES_MALLOWS",
    "GEOMETRIC_MEAN",
    "JACCARD",
    "MATTHEWS",
    "PRECISION",
    "RECALL",
    "SPECIFICITY",
    "YOUDEN",
    "ConfusionMetric",
    "f_beta",
]


@dataclass(frozen=True)
class ConfusionMetric:
    """A named function of the cells ``(tp, fp, fn, tn)``; larger is better.

    Args:
        name: shown in its ``repr``.
        formula: called with the four cells.

    Example:
        >>> import torch
        >>> MATTHEWS
        ConfusionMetric(name='matthews')
        >>> MATTHEWS(*torch.tensor([3.0, 0.0, 0.0, 5.0]))
        tensor(1.)
    """

    name: str
    formula: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = field(repr=False)

    def __call__(self, tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
        """Return the metric of these cells, in their shape."""
        check_floating(tp=tp, fp=fp, fn=fn, tn=tn)
        return self.formula(tp, fp, fn, tn)


def f_beta(beta: float = 1.0) -> ConfusionMetric:
    r"""Return the F-measure that weighs recall ``beta`` times as much as precision.

    .. math::
        F_\beta = \frac{(1 + \beta^2)\,\mathrm{TP}}
            {(1 + \beta^2)\,\mathrm{TP} + \beta^2\,\mathrm{FN} + \mathrm{FP}}

    Args:
        beta: >= 0; 0 is precision, large is recall.

    Returns:
        A metric for :func:`~steelyard.classification.anyloss`.

    Raises:
        ValueError: ``beta`` is negative or not finite.

    Example:
        Recall is 1 and precision 1/2:

        >>> import torch
        >>> cells = torch.tensor([2.0, 2.0, 0.0, 9.0])
        >>> [round(float(f_beta(beta)(*cells)), 4) for beta in (0.0, 1.0, 2.0, 1e6)]
        [0.5, 0.6667, 0.8333, 1.0]

    Source: Han et al. (2024), Sec. 3, arXiv:2405.14745.
    """
    check_range("beta", beta, at_least=0.0)
    square = beta * beta

    def formula(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
        # Divided by 1 + beta^2, so that a large beta cannot overflow half precision.
        return _ratio(tp, tp + (square * fn + fp) / (1 + square))

    return ConfusionMetric(f"f_beta({beta:g})", formula)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient, 0 without a gradient where the denominator is 0."""
    some = denominator != 0
    return (numerator / denominator.where(some, 1.0)).where(some, 0.0)


def _root(values: Tensor) -> Tensor:
    """Square root, 0 without a gradient at 0, where the slope is infinite."""
    some = values != 0
    return values.where(some, 1.0).sqrt().where(some, 0.0)


def _rates(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> tuple[Tensor, Tensor]:
    """Rates of true positives and true negatives; that of an empty class is the other's."""
    positive, negative = _ratio(tp, tp + fn), _ratio(tn, tn + fp)
    no_positive, no_negative = tp + fn == 0, tn + fp == 0
    return positive.where(~no_positive, negative), negative.where(~no_negative, positive)


def _accuracy(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    return _ratio(tp + tn, tp + fp + fn + tn)


def _balanced_accuracy(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    positive, negative = _rates(tp, fp, fn, tn)
    return (positive + negative) / 2


def _geometric_mean(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    positive, negative = _rates(tp, fp, fn, tn)
    return _root(positive) * _root(negative)


def _youden(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    positive, negative = _rates(tp, fp, fn, tn)
    return positive + negative - 1


def _matthews(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    spread = _root((tp + fp) * (tp + fn)) * _root((tn + fp) * (tn + fn))
    return _ratio(tp * tn - fp * fn, spread)


def _cohen_kappa(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    return _ratio(2 * (tp * tn - fp * fn), (tp + fp) * (fp + tn) + (tp + fn) * (fn + tn))


def _fowlkes_mallows(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    return _root(_ratio(tp, tp + fp)) * _root(_ratio(tp, tp + fn))


def _precision(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    return _ratio(tp, tp + fp)


def _recall(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    return _ratio(tp, tp + fn)


def _specificity(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    return _ratio(tn, tn + fp)


def _jaccard(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor) -> Tensor:
    return _ratio(tp, tp + fp + fn)


ACCURACY = ConfusionMetric("accuracy", _accuracy)
"""``(TP + TN) / n``."""

BALANCED_ACCURACY = ConfusionMetric("balanced_accuracy", _balanced_accuracy)
"""Mean of the true-positive and the true-negative rate."""

COHEN_KAPPA = ConfusionMetric("cohen_kappa", _cohen_kappa)
"""Agreement beyond chance, ``(accuracy - chance) / (1 - chance)``."""

FOWLKES_MALLOWS = ConfusionMetric("fowlkes_mallows", _fowlkes_mallows)
"""Geometric mean of precision and recall."""

GEOMETRIC_MEAN = ConfusionMetric("geometric_mean", _geometric_mean)
"""Geometric mean of the true-positive and the true-negative rate."""

JACCARD = ConfusionMetric("jaccard", _jaccard)
"""``TP / (TP + FP + FN)``."""

MATTHEWS = ConfusionMetric("matthews", _matthews)
"""Matthews correlation of predictions and labels, in [-1, 1]."""

PRECISION = ConfusionMetric("precision", _precision)
"""``TP / (TP + FP)``."""

RECALL = ConfusionMetric("recall", _recall)
"""``TP / (TP + FN)``."""

SPECIFICITY = ConfusionMetric("specificity", _specificity)
"""``TN / (TN + FP)``."""

YOUDEN = ConfusionMetric("youden", _youden)
"""Youden's J, true-positive rate + true-negative rate - 1."""
