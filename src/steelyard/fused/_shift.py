"""How far one next-token law has moved from another: the statistics of a few rows of logits.

The formulas behind ``linear_token_shift`` here and ``token_shift`` on full logits.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from steelyard.divergences import KL


class TokenShift(NamedTuple):
    """Shift of the next-token law between a base and an RL model, one value a row."""

    js: Tensor
    """Jensen-Shannon divergence in ``[0, log 2]`` nats, shape ``[N]``."""
    kl: Tensor
    """``KL(base || rl)`` in nats, shape ``[N]``."""
    base_entropy: Tensor
    """Entropy of the base law in nats, shape ``[N]``."""
    rl_entropy: Tensor
    """Entropy of the RL law in nats, shape ``[N]``."""
    overlap: Tensor
    """Share of the ``k`` likeliest tokens that both have, ``k = 1 .. top_k``: ``[N, top_k]``."""
    rl_top1_base_rank: Tensor
    """Rank under the base of the RL model's likeliest token, from 1, int64, shape ``[N]``."""
    rl_top1_base_prob: Tensor
    """Base probability of the RL model's likeliest token, shape ``[N]``."""
    base_top1_rl_rank: Tensor
    """Rank under the RL model of the base's likeliest token, from 1, int64, shape ``[N]``."""


def shift_of_rows(base_logits: Tensor, rl_logits: Tensor, top_k: int) -> TokenShift:
    """Return every field of :class:`TokenShift` for logits ``[R, V]``, ``-inf`` allowed.

    Ties go to the lower index. ``overlap`` has ``min(top_k, V)`` columns.
    """
    base, rl = base_logits.log_softmax(-1), rl_logits.log_softmax(-1)
    base_top, rl_top = top_tokens(base, top_k), top_tokens(rl, top_k)
    js, kl = js_and_kl(base, rl)
    return TokenShift(
        js=js,
        kl=kl,
        base_entropy=entropy(base),
        rl_entropy=entropy(rl),
        overlap=_overlap(base_top, rl_top, base.dtype),
        rl_top1_base_rank=_rank(base, rl_top[:, :1]),
        rl_top1_base_prob=base.gather(1, rl_top[:, :1])[:, 0].exp(),
        base_top1_rl_rank=_rank(rl, base_top[:, :1]),
    )


def js_and_kl(p_logprobs: Tensor, q_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Jensen-Shannon divergence and ``KL(p || q)`` of rows ``[R, V]``."""
    p, q = p_logprobs.exp(), q_logprobs.exp()
    tiny = torch.finfo(p.dtype).tiny
    # Below the smallest normal number an entry weighs nothing; log 0 only has to stay finite.
    log_m = torch.add(p, q).mul_(0.5).clamp_(min=tiny).log_()
    p_part = p * (p_logprobs.clamp(min=math.log(tiny)) - log_m)
    q_part = q * (q_logprobs.clamp(min=math.log(tiny)) - log_m)
    js = (p_part.sum(-1) + q_part.sum(-1)) / 2
    return js.clamp(0.0, math.log(2.0)), KL.terms(p_logprobs, q_logprobs).sum(-1)


def entropy(logprobs: Tensor) -> Tensor:
    """Return the entropy of rows ``[R, V]`` in nats."""
    finite = logprobs.clamp(min=torch.finfo(logprobs.dtype).min)
    return -(logprobs.exp() * finite).sum(-1)


def top_tokens(logprobs: Tensor, k: int) -> Tensor:
    """Return the indices of the ``min(k, V)`` largest entries of rows, ``[R, k]``, in order.

    Equal entries come in the order of their index, which ``torch.topk`` does not promise.
    """
    k = min(k, logprobs.shape[-1])
    values, indices = logprobs.topk(k)
    # Only if more than k entries reach the k-th value may the set itself be another one.
    tied = (logprobs >= values[:, -1:]).sum(-1) > k
    indices, by_index = indices.sort(-1)
    order = values.gather(1, by_index).sort(dim=-1, descending=True, stable=True).indices
    indices = indices.gather(1, order)
    if bool(tied.any()):
        indices[tied] = logprobs[tied].sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return indices


def _overlap(base_top: Tensor, rl_top: Tensor, dtype: torch.dtype) -> Tensor:
    # A token is in both top-k sets from k = the later of its two places on.
    k = base_top.shape[-1]
    same = base_top[:, :, None] == rl_top[:, None, :]
    place = torch.arange(k, device=base_top.device)
    joined = torch.maximum(place[:, None], place[None, :])
    common = torch.zeros_like(base_top).scatter_add_(
        1, joined.flatten().expand(base_top.shape[0], -1), same.flatten(1).long()
    )
    return common.cumsum(-1).to(dtype) / (place + 1)


def _rank(logprobs: Tensor, token: Tensor) -> Tensor:
    value = logprobs.gather(1, token)
    index = torch.arange(logprobs.shape[-1], device=logprobs.device)
    earlier = (logprobs == value) & (index < token)
    return 1 + (logprobs > value).sum(-1) + earlier.sum(-1)
