r"""Log ratios and divergences of whole batches of responses, from hidden states and heads.

What the losses of this package take, without ``[B, T, V]`` logits of either model: only the tokens
that count are looked at, and their logits are made block by block. The hidden state at ``t`` is the
one that predicts the token at ``t``: of a causal model's output, all positions but the last,
against all tokens but the first.

Results are float32 or wider. A log ratio rounded to half precision before it is summed over a
response would lose more than one training step changes.
"""

from typing import Any

import torch
from torch import Tensor

from steelyard._checks import check_floating, check_integer_dtype, check_mask, check_shape, given
from steelyard._reduce import widen
from steelyard.divergences import KL
from steelyard.fused import linear_divergence, linear_logprobs

__all__ = ["fused_log_ratios", "fused_logprobs", "fused_token_kl"]


def fused_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Log-probability of each token of a response under a linear head.

    .. math:: \log \pi_{bt} = z_{bt, y_{bt}} - \log \sum_v e^{z_{btv}}, \qquad
        z = (h W^\top + b) / \tau

    Args:
        hidden: hidden states, ``[B, T, D]``; the one at ``t`` predicts the token at ``t``.
        weight: the head, ``[V, D]``.
        tokens: integers in ``[0, V)`` where they count, ``[B, T]``.
        mask: which tokens count, ``[B, T]``; the rest costs nothing.
        bias: ``[V]``.
        temperature: divides the logits, > 0.
        chunk_size: rows worked on at a time; ``None`` picks a bounded number.

    Returns:
        ``[B, T]``, float32 or wider, 0 where masked; gradients in ``hidden``, ``weight``, ``bias``.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape or number does not fit, or a token that counts is outside ``[0, V)``.

    Example:
        Padding may hold any number:

        >>> hidden, head = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), torch.eye(2)
        >>> fused_logprobs(hidden, head, torch.tensor([[1, -100]]), mask=torch.tensor([[1, 0]]))
        tensor([[-1.3133,  0.0000]])

    Source: :func:`steelyard.fused.linear_logprobs` row by row.
    """
    check_shape("tokens", tokens, (None, None))
    check_integer_dtype(tokens=tokens)
    _check_states("", hidden, tokens.shape)
    check_mask(mask, tokens)
    kept = None if mask is None else mask != 0
    states, targets = (x.flatten(0, 1) if kept is None else x[kept] for x in (hidden, tokens))
    options: dict[str, Any] = {"bias": bias, "temperature": temperature, "chunk_size": chunk_size}
    try:
        values = linear_logprobs(widen(states), weight, targets, **options).logprobs
    except ValueError as error:  # only linear_logprobs reads the ids; it calls them targets
        raise ValueError(str(error).replace("targets", "tokens")) from None
    if kept is None:
        return values.view(tokens.shape)
    return values.new_zeros(tokens.shape).index_put((kept,), values)


def fused_log_ratios(
    policy_hidden: Tensor,
    policy_weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    policy_bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Tensor:
    r"""``log pi - log ref`` of each token; the sum over a response is what DPO compares.

    Args:
        policy_hidden: hidden states of the policy, ``[B, T, D]``.
        policy_weight: its head, ``[V, D]``.
        ref_hidden: hidden states of the reference on the same tokens, ``[B, T, D']``; detached.
        ref_weight: its head, ``[V, D']``; detached.
        tokens: integers in ``[0, V)`` where they count, ``[B, T]``.
        mask: which tokens count, ``[B, T]``; the rest costs nothing.
        policy_bias: ``[V]``.
        ref_bias: ``[V]``; detached.
        temperature: divides both logits, > 0.
        chunk_size: rows worked on at a time; ``None`` picks a bounded number.

    Returns:
        ``[B, T]``, float32 or wider, 0 where masked: for
        :func:`~steelyard.preference.sparse_po_loss`; with ``.sum(-1)`` for
        :func:`~steelyard.preference.f_dpo_loss`.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape or number does not fit, the vocabularies differ, or a token that counts
            is outside ``[0, V)``.

    Example:
        >>> head, hidden = torch.eye(2), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> ratios = fused_log_ratios(2 * hidden, head, hidden, head, torch.tensor([[0, 0]]))
        >>> ratios
        tensor([[ 0.1863, -0.8137]])
        >>> ratios.sum(-1)
        tensor([-0.6273])

    Source: Rafailov et al. (2023), Eq. 7, arXiv:2305.18290.
    """
    check_shape("tokens", tokens, (None, None))
    _check_heads(policy_hidden, policy_weight, ref_hidden, ref_weight, tokens.shape)
    _check_biases(policy_weight, policy_bias=policy_bias, ref_bias=ref_bias)

    def of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return fused_logprobs(
            hidden,
            weight,
            tokens,
            mask=mask,
            bias=bias,
            temperature=temperature,
            chunk_size=chunk_size,
        )

    with torch.no_grad():
        reference = of(ref_hidden, ref_weight, ref_bias)
    return of(policy_hidden, policy_weight, policy_bias) - reference


def fused_token_kl(
    policy_hidden: Tensor,
    policy_weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    mask: Tensor | None = None,
    policy_bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Tensor:
    r"""``KL(ref || pi)`` over the vocabulary in each state: the leash of token-level methods.

    .. math:: K_{bt} = \sum_v \text{ref}_{btv} \left( \log \text{ref}_{btv} - \log \pi_{btv} \right)

    Args:
        policy_hidden: hidden states of the policy, ``[B, T, D]``.
        policy_weight: its head, ``[V, D]``.
        ref_hidden: hidden states of the reference on the same tokens, ``[B, T, D']``; detached.
        ref_weight: its head, ``[V, D']``; detached.
        mask: which states count, ``[B, T]``; the rest costs nothing.
        policy_bias: ``[V]``.
        ref_bias: ``[V]``; detached.
        temperature: divides both logits, > 0.
        chunk_size: rows worked on at a time; ``None`` picks a bounded number.

    Returns:
        ``[B, T]`` in nats, float32 or wider, at least 0 up to rounding, 0 where masked. The
        backward pass makes the logits again.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape or number does not fit, or the vocabularies differ.

    Example:
        It grows with the distance from the reference, whatever token was drawn:

        >>> head, hidden = torch.eye(2), torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
        >>> fused_token_kl(3 * hidden, head, hidden, head)
        tensor([[0.2732, 0.0000]])

    Source: Zeng et al. (2024), arXiv:2404.11999. The released SparsePO code names the other
    order and computes this one.
    """
    _check_heads(policy_hidden, policy_weight, ref_hidden, ref_weight, None)
    _check_biases(policy_weight, policy_bias=policy_bias, ref_bias=ref_bias)
    shape = policy_hidden.shape[:2]
    check_mask(mask, policy_hidden[..., 0])
    values = linear_divergence(
        widen(ref_hidden.detach()).flatten(0, 1),
        ref_weight.detach(),
        widen(policy_hidden).flatten(0, 1),
        policy_weight,
        KL,
        p_bias=None if ref_bias is None else ref_bias.detach(),
        q_bias=policy_bias,
        temperature=temperature,
        mask=None if mask is None else mask.flatten(),
        chunk_size=chunk_size,
        reduction="none",
    )
    return values.view(shape)


def _check_heads(
    policy_hidden: Tensor,
    policy_weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    shape: torch.Size | None,
) -> None:
    _check_states("policy_", policy_hidden, shape)
    _check_states("ref_", ref_hidden, policy_hidden.shape[:2])
    check_floating(policy_weight=policy_weight, ref_weight=ref_weight)
    check_shape("policy_weight", policy_weight, (None, policy_hidden.shape[2]))
    check_shape("ref_weight", ref_weight, (policy_weight.shape[0], ref_hidden.shape[2]))


def _check_biases(weight: Tensor, **biases: Tensor | None) -> None:
    for name, bias in given(**biases).items():
        check_floating(**{name: bias})
        check_shape(name, bias, (weight.shape[0],))


def _check_states(prefix: str, hidden: Tensor, shape: torch.Size | None) -> None:
    name = f"{prefix}hidden"
    check_floating(**{name: hidden})
    check_shape(name, hidden, (None, None, None) if shape is None else (*shape, None))
