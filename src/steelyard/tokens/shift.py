r"""How far reinforcement learning has moved each next-token law, and a summary over positions.

The per-row formulas are those of :func:`steelyard.fused.linear_token_shift`, here on logits that
already exist. Nothing carries a gradient.

Source: Meng et al. (2026), Sparse but Critical: A Token-Level Analysis of Distributional Shifts in
RLVR Fine-Tuning of LLMs, arXiv:2603.22446.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from steelyard._checks import (
    check_count,
    check_floating,
    check_mask,
    check_not_empty,
    check_range,
    check_same_shape,
    check_shape,
)
from steelyard._reduce import accumulation_dtype
from steelyard.fused import TokenShift
from steelyard.fused._shift import js_and_kl, shift_of_rows
from steelyard.tokens._arguments import check_has_vocabulary, check_threshold
from steelyard.tokens._tables import positional_profile

__all__ = ["ShiftSummary", "nucleus", "shift_summary", "token_shift"]

PERCENTILES = (50.0, 90.0, 95.0, 99.0)

# Entries of a block of rows: what fits the inner cache of a CPU, what keeps a device busy.
_CPU_BLOCK, _DEVICE_BLOCK = 2**17, 2**25


class ShiftSummary(NamedTuple):
    """What :func:`shift_summary` returns."""

    share_below: Tensor
    """Share of positions with ``js <= thresholds[0]``, a scalar."""
    share_above: Tensor
    """Share of positions with ``js > thresholds[1]``, a scalar."""
    percentiles: Tensor
    """The 50th, 90th, 95th and 99th percentile of ``js``, shape ``[4]``."""
    position_means: Tensor
    """Mean ``js`` by relative position in the response, shape ``[position_bins]``."""


@torch.no_grad()
def token_shift(
    base_logits: Tensor, rl_logits: Tensor, *, top_p: float | None = None, top_k: int = 10
) -> TokenShift:
    r"""Measure how far each next-token law has moved between a base and an RL model.

    With :math:`P_t, Q_t` the two laws and :math:`M_t = \tfrac12 (P_t + Q_t)`,

    .. math::
        JS_t = \tfrac12 KL(P_t\|M_t) + \tfrac12 KL(Q_t\|M_t)
             = H(M_t) - \tfrac12 H(P_t) - \tfrac12 H(Q_t) \in [0, \log 2],

    beside :math:`KL(P_t\|Q_t)`, both entropies, the overlap of the ``k`` likeliest tokens and the
    place of each model's favourite in the other.

    Rows are worked on a few at a time; extra memory does not grow with their number. To avoid
    holding the logits at all, see :func:`steelyard.fused.linear_token_shift`.

    Args:
        base_logits: shape ``[.., V]``; ``-inf`` excludes a token.
        rl_logits: logits of the RL model after the same tokens, shape ``[.., V]``.
        top_p: in (0, 1]: replace each law by its own nucleus (:func:`nucleus`) before ``js`` and
            ``kl``, as the paper does; ``None`` compares the laws over the whole vocabulary.
            Truncated divergences may be larger than full ones, and ``kl`` is often infinite.
        top_k: the largest ``k`` of the overlap, at least 1.

    Returns:
        ``js``, ``kl``, ``base_entropy``, ``rl_entropy``, ``rl_top1_base_rank``,
        ``rl_top1_base_prob``, ``base_top1_rl_rank``, each ``[..]``, and ``overlap``
        ``[.., min(top_k, V)]``. Nats; ranks from 1, ties by lower index. Floats come in the input
        dtype; half precision is computed in float32. A row with a NaN gives NaN floats and ranks
        without meaning.

    Raises:
        TypeError: logits not floating point, ``top_k`` not an integer.
        ValueError: shapes differ or are empty, ``top_p`` outside (0, 1], ``top_k < 1``.

    Example:
        The first law has not moved; in the second, two tokens have changed places:

        >>> base = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
        >>> rl = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0]])
        >>> shift = token_shift(base, rl, top_k=2)
        >>> shift.rl_top1_base_rank, shift.overlap
        (tensor([1, 2]), tensor([[1., 1.],
                [0., 1.]]))
        >>> print(", ".join(f"{js:.4f}" for js in shift.js))
        0.0000, 0.1010

    Source: Meng et al. (2026), sections 2 and 5, arXiv:2603.22446.
    """
    check_floating(base_logits=base_logits, rl_logits=rl_logits)
    check_same_shape(base_logits=base_logits, rl_logits=rl_logits)
    check_has_vocabulary("base_logits", base_logits)
    check_count("top_k", top_k)
    if top_p is not None:
        check_range("top_p", top_p, above=0.0, at_most=1.0)
    dtype = torch.promote_types(base_logits.dtype, rl_logits.dtype)
    lead, vocabulary = base_logits.shape[:-1], base_logits.shape[-1]
    size = _CPU_BLOCK if base_logits.device.type == "cpu" else _DEVICE_BLOCK
    rows = max(1, size // vocabulary)
    work = torch.promote_types(dtype, torch.float32)
    parts = [
        _shift_of_block(base.to(work), rl.to(work), top_p, top_k)
        for base, rl in zip(
            torch.split(base_logits.reshape(-1, vocabulary), rows),
            torch.split(rl_logits.reshape(-1, vocabulary), rows),
            strict=True,
        )
    ]
    fields = (torch.cat(field) for field in zip(*parts, strict=True))
    return TokenShift(
        *(
            (x.to(dtype) if x.is_floating_point() else x).reshape((*lead, *x.shape[1:]))
            for x in fields
        )
    )


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    r"""Keep the shortest list of likeliest tokens that holds ``top_p`` of the mass.

    .. math::
        \hat p_v = \frac{p_v\, 1[v \in N]}{\sum_{u \in N} p_u}, \qquad
        N = \text{shortest prefix in descending probability with mass} \ge \tau

    The mass is compared up to a few rounding errors, so that 0.5 + 0.2 + 0.1 reaches 0.8.

    Args:
        probs: non-negative, shape ``[.., V]``; each row is divided by its sum first.
        top_p: the mass to keep, in (0, 1]; 1 keeps every token.

    Returns:
        Shape and dtype of ``probs``: rows sum to 1, zero outside the nucleus. Equal probabilities
        enter in the order of their index. A row with a NaN comes back as NaN.

    Raises:
        TypeError: ``probs`` not floating point.
        ValueError: ``probs`` empty, negative somewhere or with a row of zeros; ``top_p`` outside
            (0, 1].

    Example:
        >>> nucleus(torch.tensor([0.1, 0.6, 0.3]), 0.7)
        tensor([0.0000, 0.6667, 0.3333])

    Source: Holtzman et al. (2020), arXiv:1904.09751; as used by Meng et al. (2026), section 2,
    arXiv:2603.22446.
    """
    check_floating(probs=probs)
    check_has_vocabulary("probs", probs)
    check_range("top_p", top_p, above=0.0, at_most=1.0)
    p = probs.to(accumulation_dtype(probs.dtype))
    total = p.sum(-1, keepdim=True)
    if bool((p < 0).any() | (total == 0).any()):
        raise ValueError("probs must be non-negative with a positive sum in each row")
    p = p / total
    if top_p < 1.0:
        ordered, order = p.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1).roll(1, -1)
        before[..., 0] = 0.0
        enough = top_p - 8 * torch.finfo(p.dtype).eps
        # The first token always stays, so that a tiny top_p keeps one and not none.
        kept = (before < enough).index_fill(-1, before.new_zeros(1).long(), True)
        p = p.where(torch.zeros_like(kept).scatter(-1, order, kept) | p.isnan(), 0.0)
        p = p / p.sum(-1, keepdim=True)
    return p.to(probs.dtype)


@torch.no_grad()
def shift_summary(
    js: Tensor,
    mask: Tensor | None = None,
    *,
    thresholds: tuple[float, float] = (0.01, 0.1),
    position_bins: int = 4,
) -> ShiftSummary:
    r"""Summarise how sparse a shift is, how large, and where in the response it sits.

    Every kept token counts the same, so a long response weighs more than a short one;
    :func:`~steelyard.tokens.response_means` gives the other mean.

    Args:
        js: divergence at each position in nats, shape ``[B, T]``.
        mask: ``[B, T]``, true = counts (response tokens up to the end token).
        thresholds: "near zero" and "high".
        position_bins: equal bins of ``t / (length - 1)``, where ``t`` counts the kept tokens of a
            response from 0; a response of one token is at 0.

    Returns:
        ``share_below``, ``share_above`` (scalars), ``percentiles`` ``[4]`` (50, 90, 95 and 99,
        linear between order statistics) and ``position_means`` ``[position_bins]`` (0 for a bin
        without a token), in the dtype of ``js``. All are 0 if nothing is kept.

    Raises:
        TypeError: ``js`` not floating point, ``position_bins`` not an integer.
        ValueError: wrong shapes, empty input, ``js`` NaN at a kept place, ``thresholds`` not two
            numbers, ``position_bins < 1``.

    Example:
        One token in five has moved, at the start:

        >>> js = torch.tensor([[0.3, 0.0, 0.0, 0.0, 0.005]])
        >>> summary = shift_summary(js, position_bins=2)
        >>> print(f"{summary.share_below:.1f} {summary.share_above:.1f}")
        0.8 0.2
        >>> summary.position_means
        tensor([0.1500, 0.0017])

    Source: Meng et al. (2026), section 3, arXiv:2603.22446.
    """
    check_floating(js=js)
    check_shape("js", js, (None, None))
    check_not_empty("js", js)
    check_mask(mask, js)
    if not isinstance(thresholds, tuple | list) or len(thresholds) != 2:
        raise ValueError(f"thresholds must be two numbers, got {thresholds!r}")
    for threshold in thresholds:
        check_threshold("thresholds", threshold)
    check_count("position_bins", position_bins)
    means = positional_profile(js, mask, bins=position_bins).means
    values = js.to(accumulation_dtype(js.dtype))
    kept = values.flatten() if mask is None else values[mask != 0]
    if kept.numel() == 0:
        nothing = js.new_zeros(())
        return ShiftSummary(nothing, nothing.clone(), js.new_zeros(len(PERCENTILES)), means)
    if bool(kept.isnan().any()):
        raise ValueError("js must not be NaN at kept places")
    low, high = thresholds
    return ShiftSummary(
        share_below=(kept <= low).to(kept.dtype).mean().to(js.dtype),
        share_above=(kept > high).to(kept.dtype).mean().to(js.dtype),
        percentiles=_percentiles(kept).to(js.dtype),
        position_means=means,
    )


def _shift_of_block(base: Tensor, rl: Tensor, top_p: float | None, top_k: int) -> TokenShift:
    shift = shift_of_rows(base, rl, top_k)
    if top_p is None:
        return shift
    kept = (nucleus(logits.softmax(-1), top_p).log() for logits in (base, rl))
    js, kl = js_and_kl(*kept)
    return shift._replace(js=js, kl=kl)


def _percentiles(values: Tensor) -> Tensor:
    # torch.quantile refuses more than 2^24 values.
    ordered = values.sort().values
    place = torch.tensor(PERCENTILES, dtype=torch.float64, device=values.device)
    place = place / 100 * (len(ordered) - 1)
    lower = place.floor().long()
    upper = (lower + 1).clamp(max=len(ordered) - 1)
    return torch.lerp(ordered[lower], ordered[upper], (place - lower).to(ordered.dtype))
