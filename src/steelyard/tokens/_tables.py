"""Where probability mass went, which tokens took over, and how a value runs along a response."""

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
from steelyard._reduce import accumulation_dtype, fill_masked
from steelyard.fused import TokenShift
from steelyard.fused._shift import top_tokens
from steelyard.tokens._arguments import check_has_vocabulary, check_threshold


class PositionalProfile(NamedTuple):
    """What :func:`positional_profile` returns, each ``[bins]``."""

    means: Tensor
    """Mean of the values in each bin, 0 for an empty one."""
    counts: Tensor
    """Number of tokens in each bin, int64."""


class MassReallocation(NamedTuple):
    """What :func:`mass_reallocation` returns."""

    tv: Tensor
    """Mass that moved: the total variation distance, shape ``[..]``."""
    gain_in_base_top: Tensor
    """Share of the gained mass on the base's ``k`` likeliest tokens: ``[.., min(top_k, V)]``."""


class RankTable(NamedTuple):
    """What :func:`rank_table` returns: shares of the positions with a high divergence."""

    positions: Tensor
    """Number of positions with a high divergence, int64 scalar."""
    rl_top1_in_base_top: Tensor
    """Share with the RL favourite among the base's ``k`` likeliest: ``[max_rank]``."""
    base_top1_in_rl_top: Tensor
    """Share with the base's favourite among the RL model's ``k`` likeliest: ``[max_rank]``."""
    new_token_share: Tensor
    """Share with an RL favourite that the base held for unlikely, a scalar."""
    overlap: Tensor
    """Mean overlap of the ``k`` likeliest tokens: ``[K]``, ``K`` that of the shift."""


@torch.no_grad()
def positional_profile(
    values: Tensor, mask: Tensor | None = None, *, bins: int = 10
) -> PositionalProfile:
    r"""Average a per-token value by relative position in its response.

    .. math:: \text{bin} = \min(\lfloor \text{bins}\; t / (\text{length} - 1) \rfloor,
        \text{bins} - 1)

    where ``t`` counts the kept tokens of the response from 0. A response of one token is at 0.

    Args:
        values: ``[B, T]``.
        mask: ``[B, T]``, true = counts; what stands at masked places does not matter.
        bins: number of equal bins, at least 1.

    Returns:
        ``means`` ``[bins]`` in the dtype of ``values`` (0 for an empty bin) and ``counts``
        ``[bins]``.

    Raises:
        TypeError: ``values`` not floating point, ``bins`` not an integer.
        ValueError: wrong shapes, empty input, ``bins < 1``.

    Example:
        Two responses of different length, each with its peak at the end:

        >>> values = torch.tensor([[0.0, 0.0, 0.0, 4.0], [0.0, 2.0, 9.0, 9.0]])
        >>> mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
        >>> positional_profile(values, mask, bins=2)
        PositionalProfile(means=tensor([0., 2.]), counts=tensor([3, 3]))

    Source: Meng et al. (2026), section 3, arXiv:2603.22446.
    """
    _check_table("values", values, mask)
    check_count("bins", bins)
    kept = torch.ones_like(values, dtype=torch.bool) if mask is None else mask != 0
    place = kept.long().cumsum(-1) - 1
    last = (kept.long().sum(-1, keepdim=True) - 1).clamp(min=1)
    index = (place * bins // last).clamp(0, bins - 1)[kept]  # in integers, so that edges are exact
    counts = torch.bincount(index, minlength=bins)
    work = values.to(accumulation_dtype(values.dtype))
    sums = work.new_zeros(bins).index_add(0, index, work[kept])
    return PositionalProfile((sums / counts.clamp(min=1)).to(values.dtype), counts)


@torch.no_grad()
def response_means(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Average a per-token value within each response, so that long ones weigh no more than short.

    Args:
        values: ``[B, T]``.
        mask: ``[B, T]``, true = counts.

    Returns:
        ``[B]`` in the dtype of ``values``; 0 for a response without a kept token.

    Raises:
        TypeError: ``values`` not floating point.
        ValueError: wrong shapes or empty input.

    Example:
        >>> js = torch.tensor([[0.2, 0.0, 0.0, 0.0], [0.2, 0.0, 9.0, 9.0]])
        >>> response_means(js, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
        tensor([0.0500, 0.1000])

    Source: Meng et al. (2026), section 3, arXiv:2603.22446.
    """
    _check_table("values", values, mask)
    kept = torch.ones_like(values, dtype=torch.bool) if mask is None else mask != 0
    total = fill_masked(values, mask).sum(-1, dtype=accumulation_dtype(values.dtype))
    return (total / kept.sum(-1).clamp(min=1)).to(values.dtype)


@torch.no_grad()
def mass_reallocation(
    base_logits: Tensor, rl_logits: Tensor, *, top_k: int = 10
) -> MassReallocation:
    r"""Measure how much probability moved, and how much of it to tokens the base already liked.

    .. math::
        TV = \tfrac12 \sum_v |P_v - Q_v| = \sum_v (Q_v - P_v)_+, \qquad
        g_k = \frac{1}{TV} \sum_{v \in \mathrm{Top}_k(P)} (Q_v - P_v)_+

    Args:
        base_logits: shape ``[.., V]``, ``-inf`` allowed.
        rl_logits: shape ``[.., V]``.
        top_k: the largest ``k``, at least 1.

    Returns:
        ``tv`` ``[..]`` in [0, 1] and ``gain_in_base_top`` ``[.., min(top_k, V)]`` in [0, 1],
        rising in ``k`` (0 where nothing moved), in the input dtype.

    Raises:
        TypeError: logits not floating point, ``top_k`` not an integer.
        ValueError: shapes differ or are empty, ``top_k < 1``.

    Example:
        The base's second and third token gain 0.2 each at the expense of the first:

        >>> base, rl = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.5, 0.3])
        >>> moved = mass_reallocation(base.log(), rl.log())
        >>> print(f"{moved.tv:.2f}", moved.gain_in_base_top.round(decimals=4))
        0.40 tensor([0.0000, 0.5000, 1.0000])

    Source: Meng et al. (2026), section 5, arXiv:2603.22446.
    """
    check_floating(base_logits=base_logits, rl_logits=rl_logits)
    check_same_shape(base_logits=base_logits, rl_logits=rl_logits)
    check_has_vocabulary("base_logits", base_logits)
    check_count("top_k", top_k)
    dtype = torch.promote_types(base_logits.dtype, rl_logits.dtype)
    work = torch.promote_types(dtype, torch.float32)
    lead, vocabulary = base_logits.shape[:-1], base_logits.shape[-1]
    base = base_logits.reshape(-1, vocabulary).to(work).log_softmax(-1)
    gain = (rl_logits.reshape(-1, vocabulary).to(work).softmax(-1) - base.exp()).clamp(min=0.0)
    tv = gain.sum(-1)
    reached = gain.gather(1, top_tokens(base, top_k)).cumsum(-1)
    share = reached / tv.clamp(min=torch.finfo(work).tiny)[:, None]
    return MassReallocation(
        tv.clamp(max=1.0).to(dtype).reshape(lead),
        share.clamp(max=1.0).to(dtype).reshape((*lead, -1)),
    )


@torch.no_grad()
def rank_table(
    shift: TokenShift,
    mask: Tensor | None = None,
    *,
    js_threshold: float = 0.1,
    new_token_prob: float = 0.01,
    max_rank: int = 10,
) -> RankTable:
    r"""Tell whether, where it moved, the RL model prefers the base's own candidates or new ones.

    Over the kept positions with :math:`JS_t >` ``js_threshold``: the share whose RL favourite is
    among the base's ``k`` likeliest tokens, the same with roles exchanged, the share whose
    RL favourite had a base probability below ``new_token_prob``, and the mean overlap.

    Args:
        shift: from :func:`token_shift`, fields ``[..]``.
        mask: shape of ``shift.js``, true = counts.
        js_threshold: what counts as a high divergence, in nats.
        new_token_prob: base probability below which a favourite is new, in [0, 1].
        max_rank: the largest ``k`` of the rank shares, at least 1.

    Returns:
        ``positions`` and, over them, ``rl_top1_in_base_top`` and ``base_top1_in_rl_top``
        ``[max_rank]`` (the first entry is the share with the same favourite),
        ``new_token_share`` and ``overlap`` ``[K]``. Shares are 0 if there is no such position.

    Raises:
        TypeError: ``shift`` is no :class:`TokenShift`, ``max_rank`` not an integer.
        ValueError: wrong shapes, empty input or a setting out of range.

    Example:
        Of two positions that moved, one promoted the base's second choice, one a token from
        far down:

        >>> from steelyard.tokens import token_shift
        >>> base = torch.tensor([[0.6, 0.3, 0.1], [0.9, 0.095, 0.005]]).log()
        >>> rl = torch.tensor([[0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]).log()
        >>> table = rank_table(token_shift(base, rl), max_rank=3)
        >>> table.rl_top1_in_base_top, table.new_token_share
        (tensor([0.0000, 0.5000, 1.0000]), tensor(0.5000))

    Source: Meng et al. (2026), section 5, arXiv:2603.22446.
    """
    if not isinstance(shift, TokenShift):
        raise TypeError(f"shift must be a TokenShift, got {type(shift).__name__}")
    check_not_empty("shift", shift.js)
    check_mask(mask, shift.js)
    check_threshold("js_threshold", js_threshold)
    check_range("new_token_prob", new_token_prob, at_least=0.0, at_most=1.0)
    check_count("max_rank", max_rank)
    high = shift.js > js_threshold
    if mask is not None:
        high = high & (mask != 0)
    number = high.sum()
    dtype = accumulation_dtype(shift.js.dtype)
    ranks = torch.arange(1, max_rank + 1, device=high.device)

    def share(events: Tensor) -> Tensor:
        mean = events[high].to(dtype).sum(0) / number.clamp(min=1)
        return mean.to(shift.js.dtype)

    return RankTable(
        positions=number,
        rl_top1_in_base_top=share(shift.rl_top1_base_rank[..., None] <= ranks),
        base_top1_in_rl_top=share(shift.base_top1_rl_rank[..., None] <= ranks),
        new_token_share=share(shift.rl_top1_base_prob < new_token_prob),
        overlap=share(shift.overlap),
    )


def _check_table(name: str, values: Tensor, mask: Tensor | None) -> None:
    check_floating(**{name: values})
    check_shape(name, values, (None, None))
    check_not_empty(name, values)
    check_mask(mask, values)
