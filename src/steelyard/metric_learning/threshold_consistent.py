r"""Threshold-consistent margins: one similarity threshold that suits every class.

A regulariser to add to any metric-learning loss. It works on the hard pairs of a batch only and
averages over them, so its force on a hard pair does not fade as the others become easy. What it is
meant to lower is measured by :func:`steelyard.metric_learning.opis`.

Source: Zhang et al. (2024), Threshold-Consistent Margin Loss for Open-World Deep Metric Learning,
ICLR, arXiv:2307.04047.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from steelyard._checks import (
    check_floating,
    check_groups,
    check_not_empty,
    check_range,
    check_shape,
)
from steelyard.fused._compile import run_eagerly
from steelyard.metric_learning._unit_rows import products, unit_rows

__all__ = ["tcm_loss"]

_DENSE_ROWS = 1024  # up to here autograd may keep the N x N matrix
_BLOCK_ELEMENTS = 2**20  # pairs held at a time beyond


class _Margins(NamedTuple):
    positive: float
    negative: float
    weight_positive: float
    weight_negative: float


def tcm_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    margin_positive: float = 0.9,
    margin_negative: float = 0.5,
    weight_positive: float = 1.0,
    weight_negative: float = 1.0,
) -> Tensor:
    r"""Pull hard positives up to one cosine and push hard negatives down to another.

    With :math:`s_{ij}` the cosine of items :math:`i \ne j`, and the sums over pairs of the same
    class (:math:`+`) and of different classes (:math:`-`),

    .. math::
        L = \lambda_+ \frac{\sum_+ (m_+ - s)\, 1[s \le m_+]}{\sum_+ 1[s \le m_+]}
          + \lambda_- \frac{\sum_- (s - m_-)\, 1[s \ge m_-]}{\sum_- 1[s \ge m_-]}

    A part without hard pairs is 0. No gradient passes through the counts. Beyond 1024 items the
    pairs are made in blocks, again in the backward pass, and no ``N x N`` array is held; the
    result is then differentiable once.

    Args:
        embeddings: ``[N, D]``, of any length; normalised inside. A zero row has cosine 0 with
            every other and gets no gradient.
        labels: integer class of each item, ``[N]``. Draw batches with several items a class.
        margin_positive: cosine that positives should exceed, >= -1.
        margin_negative: cosine that negatives should stay below, <= 1.
        weight_positive: >= 0.
        weight_negative: >= 0.

    Returns:
        A 0-d tensor in the dtype of ``embeddings``. Over several devices gather the embeddings
        first: the counts belong to the entire batch.

    Raises:
        ValueError: wrong shapes, empty input, or a setting out of range.
        TypeError: ``embeddings`` not floating point or ``labels`` not integer.

    Example:
        Far easy items change nothing, as they would in a mean over all pairs:

        >>> import torch
        >>> hard = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0]])
        >>> tcm_loss(hard, torch.tensor([0, 0]))
        tensor(0.3000)
        >>> easy = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
        >>> tcm_loss(torch.cat((hard, easy)), torch.tensor([0, 0, 1, 1]))
        tensor(0.3000)

    Source: Zhang et al. (2024), the TCM loss of the method section, arXiv:2307.04047.
    """
    check_floating(embeddings=embeddings)
    check_shape("embeddings", embeddings, (None, None))
    check_not_empty("embeddings", embeddings)
    check_groups(labels, embeddings, name="labels")
    check_range("margin_positive", margin_positive, at_least=-1.0)
    check_range("margin_negative", margin_negative, at_most=1.0)
    check_range("weight_positive", weight_positive, at_least=0.0)
    check_range("weight_negative", weight_negative, at_least=0.0)
    numbers = (margin_positive, margin_negative, weight_positive, weight_negative)
    margins = _Margins(*map(float, numbers))  # a bool would not subtract
    unit = unit_rows(embeddings)
    if len(unit) <= _DENSE_ROWS:
        loss = _total(_sums(unit, unit, labels, labels, 0, margins), margins)
    else:
        loss = run_eagerly(_BlockedTCM.apply, unit, labels, margins)[0]
    return loss.to(embeddings.dtype)


def _hard_pairs(
    rows: Tensor, unit: Tensor, row_labels: Tensor, labels: Tensor, start: int, margins: _Margins
) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines of a block of rows with all, and which are hard positives and hard negatives.

    Written as "not on the easy side", so that a NaN counts as hard and shows in the loss.
    """
    cosine = products(rows, unit)
    same = row_labels[:, None] == labels[None, :]
    place = torch.arange(len(labels), device=labels.device)
    other = place[start : start + len(row_labels), None] != place[None, :]
    positive = same & other & ~(cosine.detach() > margins.positive)
    negative = ~same & ~(cosine.detach() < margins.negative)
    return cosine, positive, negative


def _sums(
    rows: Tensor, unit: Tensor, row_labels: Tensor, labels: Tensor, start: int, margins: _Margins
) -> Tensor:
    """Excess and number of hard positives, then of hard negatives, ``[4]``."""
    cosine, positive, negative = _hard_pairs(rows, unit, row_labels, labels, start, margins)
    return torch.stack(
        (
            torch.where(positive, margins.positive - cosine, 0.0).sum(),
            positive.sum(),
            torch.where(negative, cosine - margins.negative, 0.0).sum(),
            negative.sum(),
        )
    )


def _total(sums: Tensor, margins: _Margins) -> Tensor:
    excess_positive, hard_positive, excess_negative, hard_negative = sums
    positive: Tensor = margins.weight_positive * excess_positive / hard_positive.clamp(min=1)
    negative: Tensor = margins.weight_negative * excess_negative / hard_negative.clamp(min=1)
    return positive + negative


def _starts(count: int) -> tuple[range, int]:
    size = max(1, _BLOCK_ELEMENTS // count)
    return range(0, count, size), size


class _BlockedTCM(Function):
    """The same over blocks of rows; only the unit rows are kept for the backward pass.

    A pair appears as (i, j) and (j, i), so the slope in row i is twice that of its own block.
    """

    @staticmethod
    def forward(unit: Tensor, labels: Tensor, margins: _Margins) -> tuple[Tensor, Tensor]:
        starts, size = _starts(len(unit))
        sums = torch.zeros(4, dtype=torch.float64, device=unit.device)
        for start in starts:
            here = slice(start, start + size)
            sums += _sums(unit[here], unit, labels[here], labels, start, margins)
        return _total(sums, margins).to(unit.dtype), sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        unit, labels, ctx.margins = inputs
        ctx.save_for_backward(unit, labels, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        unit, labels, sums = ctx.saved_tensors
        margins: _Margins = ctx.margins
        pull = (-2 * margins.weight_positive / sums[1].clamp(min=1) * upstream).to(unit.dtype)
        push = (2 * margins.weight_negative / sums[3].clamp(min=1) * upstream).to(unit.dtype)
        starts, size = _starts(len(unit))
        slope = torch.empty_like(unit)
        for start in starts:
            here = slice(start, start + size)
            _, positive, negative = _hard_pairs(
                unit[here], unit, labels[here], labels, start, margins
            )
            pairs = torch.where(positive, pull, 0.0) + torch.where(negative, push, 0.0)
            slope[here] = products(pairs, unit.mT)
        return slope, None, None
