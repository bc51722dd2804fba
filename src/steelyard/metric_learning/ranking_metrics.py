"""Quality of a ranked list: discounted gain, first hit, share of hits.

Equal scores keep the order of the input. A NaN score makes the result of its list NaN. Lists
without a relevant document score 0. Nothing here carries a gradient.
"""

import torch
from torch import Tensor

from steelyard._checks import (
    check_count,
    check_floating,
    check_not_empty,
    check_same_shape,
    check_tensor,
)
from steelyard._reduce import accumulation_dtype

__all__ = ["ndcg", "recall", "reciprocal_rank"]


def ndcg(scores: Tensor, relevance: Tensor, k: int) -> Tensor:
    r"""Gain of the first ``k`` documents, discounted by rank, over that of the best order.

    .. math::
        \mathrm{DCG} = \sum_{r=1}^k \frac{2^{\mathrm{rel}_r} - 1}{\log_2(r + 1)}, \qquad
        \mathrm{nDCG} = \mathrm{DCG} / \mathrm{DCG}_\mathrm{ideal}

    Args:
        scores: ``[.., N]``; larger is ranked first, ties in the order given.
        relevance: graded, >= 0, same shape, any real dtype.
        k: >= 1; more than ``N`` means all.

    Returns:
        ``[..]`` in [0, 1], dtype of ``scores``; 0 if nothing is relevant.

    Raises:
        ValueError: shapes differ, empty input, ``k < 1``.
        TypeError: ``scores`` not floating point, or ``k`` not an integer.

    Example:
        >>> import torch
        >>> ndcg(torch.tensor([0.9, 0.8, 0.1]), torch.tensor([0, 3, 1]), k=3)  # best last but one
        tensor(0.6443)

    Source: Burges et al. (2005), Sec. 6, for the exponential gain.
    """
    ranked = _ranked(scores, relevance)
    top = _top(k, scores)
    ideal = relevance.to(ranked.dtype).sort(dim=-1, descending=True).values
    rank = torch.arange(2, top + 2, device=scores.device, dtype=ranked.dtype)
    discount = rank.log2()
    # Relative to the largest no gain overflows; powers of two cost no digit.
    most = ideal[..., :1].clamp(min=0)
    gain, best = (
        (torch.exp2(x[..., :top] - most) - torch.exp2(-most)) / discount for x in (ranked, ideal)
    )
    total = best.sum(-1)
    return _finish(gain.sum(-1) / torch.where(total > 0, total, 1.0), scores)


def reciprocal_rank(scores: Tensor, relevance: Tensor) -> Tensor:
    """One over the rank of the first relevant document.

    Args:
        scores: ``[.., N]``; larger is ranked first, ties in the order given.
        relevance: > 0 = relevant, same shape.

    Returns:
        ``[..]`` in [0, 1], dtype of ``scores``; 0 if nothing is relevant. Its mean is the MRR.

    Raises:
        ValueError: shapes differ or empty input.
        TypeError: ``scores`` not floating point.

    Example:
        >>> import torch
        >>> reciprocal_rank(torch.tensor([0.9, 0.8, 0.1]), torch.tensor([0, 1, 1]))
        tensor(0.5000)

    Source: Voorhees (1999), The TREC-8 question answering track report.
    """
    ranked = _ranked(scores, relevance)
    rank = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=ranked.dtype)
    return _finish(((ranked > 0) / rank).amax(-1), scores)


def recall(scores: Tensor, relevance: Tensor, k: int) -> Tensor:
    """Share of the relevant documents that are among the first ``k``.

    Only the order of the scores counts. ``torchmetrics`` 1.9 drops documents whose score is not
    positive, which is no option for logits.

    Args:
        scores: ``[.., N]``; larger is ranked first, ties in the order given.
        relevance: > 0 = relevant, same shape.
        k: >= 1; more than ``N`` means all.

    Returns:
        ``[..]`` in [0, 1], dtype of ``scores``; 0 if nothing is relevant.

    Raises:
        ValueError: shapes differ, empty input, ``k < 1``.
        TypeError: ``scores`` not floating point, or ``k`` not an integer.

    Example:
        >>> import torch
        >>> recall(torch.tensor([0.9, 0.8, 0.1]), torch.tensor([0, 1, 1]), k=2)
        tensor(0.5000)

    Source: Manning et al. (2008), Introduction to Information Retrieval, Sec. 8.4.
    """
    ranked = _ranked(scores, relevance)
    relevant = (ranked > 0).to(ranked.dtype)
    total = relevant.sum(-1)
    hits = relevant[..., : _top(k, scores)].sum(-1)
    return _finish(hits / total.clamp(min=1), scores)


def _ranked(scores: Tensor, relevance: Tensor) -> Tensor:
    """Relevance in the order of the scores, in float32 or better."""
    check_floating(scores=scores)
    check_tensor("relevance", relevance)
    check_same_shape(scores=scores, relevance=relevance)
    if scores.dim() == 0:
        raise ValueError("scores must have shape [.., N], got []")
    check_not_empty("scores", scores)
    order = scores.detach().sort(dim=-1, descending=True, stable=True).indices
    return relevance.detach().gather(-1, order).to(accumulation_dtype(scores.dtype))


def _top(k: int, scores: Tensor) -> int:
    check_count("k", k)
    return min(k, scores.shape[-1])


def _finish(values: Tensor, scores: Tensor) -> Tensor:
    unknown = scores.detach().isnan().any(-1)
    return values.masked_fill(unknown, torch.nan).to(scores.dtype)
