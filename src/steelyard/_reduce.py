"""Masked reductions shared by every package.

The rules of the library in one place: a mean is over kept items, a fully masked batch gives
exactly 0 with a zero gradient, and half precision accumulates in float32.
"""

from typing import Literal

import torch
from torch import Tensor

from steelyard._checks import check_choice, check_mask

Reduction = Literal["none", "mean", "sum"]
Aggregate = Literal["token", "sequence", "sequence_sum"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype sums are taken in: float32 for half precision, else the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def widen(tensor: Tensor) -> Tensor:
    """Cast half precision to float32, and leave wider dtypes as they are."""
    return tensor.to(accumulation_dtype(tensor.dtype))


def fill_masked(values: Tensor, mask: Tensor | None, fill: float = 0.0) -> Tensor:
    """Put a harmless number where ``mask`` is false, *before* a formula is applied.

    Masking the result alone is not enough: an overflow at a masked place would come back as
    ``0 * inf = NaN`` in the gradient.
    """
    return values if mask is None else torch.where(mask != 0, values, fill)


def reduce_masked(values: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
    """Reduce ``values`` over all its items, or return them with 0 at masked places.

    Args:
        values: any shape.
        mask: same shape, true or non-zero = counts; ``None`` keeps everything.
        reduction: ``"mean"`` over kept items, ``"sum"``, or ``"none"``.

    Returns:
        A 0-d tensor, or the shape of ``values`` for ``"none"``; in the dtype of ``values``.
    """
    check_choice("reduction", reduction, ("none", "mean", "sum"))
    check_mask(mask, values)
    kept = fill_masked(values, mask)
    if reduction == "none":
        return kept
    total = kept.sum(dtype=accumulation_dtype(values.dtype))
    if reduction == "mean":
        total = total / _count(values, mask, None).clamp(min=1)
    return total.to(values.dtype)


def aggregate_tokens(values: Tensor, mask: Tensor | None, aggregate: Aggregate) -> Tensor:
    """Average per-token values ``[B, T]`` over a batch of sequences.

    Args:
        values: per-token losses, shape ``[B, T]``.
        mask: shape ``[B, T]``, true = counts; ``None`` keeps everything.
        aggregate: ``"token"`` = sum over kept tokens / their number; ``"sequence"`` = mean over
            sequences of each one's token mean; ``"sequence_sum"`` = mean over sequences of each
            one's token sum. A sequence without a kept token does not count as a sequence.

    Returns:
        A 0-d tensor in the dtype of ``values``.
    """
    check_choice("aggregate", aggregate, ("token", "sequence", "sequence_sum"))
    if aggregate == "token":
        return reduce_masked(values, mask, "mean")
    check_mask(mask, values)
    per_sequence = fill_masked(values, mask).sum(-1, dtype=accumulation_dtype(values.dtype))
    lengths = _count(values, mask, -1)
    if aggregate == "sequence":
        per_sequence = per_sequence / lengths.clamp(min=1)
    sequences = (lengths > 0).sum().clamp(min=1)
    return (per_sequence.sum() / sequences).to(values.dtype)


def _count(values: Tensor, mask: Tensor | None, dim: int | None) -> Tensor:
    kept = torch.ones_like(values, dtype=torch.bool) if mask is None else mask != 0
    return kept.sum() if dim is None else kept.sum(dim)
