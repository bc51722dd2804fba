r"""SparsePO: preference optimisation with a weight on every token.

In a state ``h`` with leash ``beta m(h)`` the optimal policy has the advantage

.. math:: A(h, z) = \beta\, m(h) \left[ \log \frac{\pi(z|h)}{\text{ref}(z|h)}
    + KL(\text{ref}(\cdot|h) \| \pi(\cdot|h)) \right], \qquad E_{\text{ref}}[A] = 0

so a response is worth the sum of these over its tokens, and a pair is a Bradley-Terry choice
between two sums. With ``m = 1`` that is TDPO1. One mask for both terms follows from the theory; two
of them (SparsePO-indep) are a heuristic.

A mask at ``t`` must come from the state that predicts token ``t``, before that token is seen: it
weighs a state, not a token. It cannot single out a word that its prefix does not announce.

Source: Christopoulou et al. (2024), SparsePO, arXiv:2410.05102; Zeng et al. (2024), Token-level
Direct Preference Optimization, arXiv:2404.11999.
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
)
from steelyard._reduce import Reduction, fill_masked, reduce_masked, widen

__all__ = [
    "sparse_po_loss",
    "sparse_po_reward",
    "tdpo1_loss",
    "tdpo2_loss",
]


def sparse_po_loss(
    chosen_log_ratio: Tensor,
    rejected_log_ratio: Tensor,
    chosen_kl: Tensor,
    rejected_kl: Tensor,
    *,
    beta: float = 0.1,
    reward_mask_chosen: Tensor | None = None,
    reward_mask_rejected: Tensor | None = None,
    kl_mask_chosen: Tensor | None = None,
    kl_mask_rejected: Tensor | None = None,
    l1_reward: float = 0.0,
    l1_kl: float = 0.0,
    l1_aggregate: Literal["sum", "mean"] = "sum",
    mask_chosen: Tensor | None = None,
    mask_rejected: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Raise chosen over rejected responses, each token with its own weight and its own leash.

    .. math::
        L = -\log \sigma\left( \beta (u - \delta) \right)
            + \lambda_u \left( |m^u_w|_1 + |m^u_l|_1 \right)
            + \lambda_d \left( |m^d_w|_1 + |m^d_l|_1 \right)

    .. math::
        u = \sum_t m^u_{w,t} \rho_{w,t} - \sum_t m^u_{l,t} \rho_{l,t}, \qquad
        \delta = \sum_t m^d_{l,t} K_{l,t} - \sum_t m^d_{w,t} K_{w,t}

    with :math:`\rho` the log ratios and :math:`K = KL(\text{ref}\|\pi)` of the states. **Nothing is
    detached**: gradients reach the policy through both terms, and the masks.

    ================ =======================================================================
    method           masks
    ================ =======================================================================
    DPO              KL masks 0
    TDPO1            all 1 (the default; :func:`tdpo1_loss`)
    TDPO2            :func:`tdpo2_loss`
    MaPO             one :func:`~steelyard.preference.activation_mask` for both terms
    SparsePO-common  one :class:`~steelyard.preference.LearnedTokenMask` for both terms
    SparsePO-indep   two of them
    ================ =======================================================================

    Masks times ``c`` and ``beta / c`` give the same loss, and no term divides by the mass of a
    mask: log ``beta`` times the mean mask, and compare at equal scale. Only the penalty and weight
    decay keep masks from growing.

    Args:
        chosen_log_ratio: ``log pi - log ref`` of each token of chosen responses, ``[B, T]``.
        rejected_log_ratio: of rejected responses, ``[B, T']``.
        chosen_kl: ``KL(ref || pi)`` over the vocabulary, at least 0, ``[B, T]``.
        rejected_kl: ``[B, T']``.
        beta: strength of the leash, > 0. The paper takes 0.1 (HH) and 0.8 (IMDB, TL;DR).
        reward_mask_chosen: ``m^u`` at least 0, ``[B, T]``, any dtype; ``None`` = 1.
        reward_mask_rejected: ``[B, T']``.
        kl_mask_chosen: ``m^d`` at least 0, ``[B, T]``; ``None`` = 1.
        kl_mask_rejected: ``[B, T']``.
        l1_reward: ``lambda_u``, at least 0. The paper takes 0.001 (HH, common) or 0.
        l1_kl: ``lambda_d``, at least 0.
        l1_aggregate: norm of a mask over the kept tokens of a response: ``"sum"`` (default, as
            published; long responses pay more) or ``"mean"``.
        mask_chosen: which tokens count, ``[B, T]``; false on the prompt and on padding.
        mask_rejected: ``[B, T']``.
        reduction: ``"mean"`` (default), ``"sum"`` or ``"none"``, over pairs. A pair without any
            token that counts is none.

    Returns:
        0-d, or ``[B]`` for ``"none"``. NaN propagates from tokens that count.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: a shape or number does not fit, or the batch is empty.

    Example:
        The policy moved from (1/2, 1/2) to (4/5, 1/5) on tokens 0 (chosen) and 1 (rejected):

        >>> chosen, rejected = torch.tensor([[1.6]]).log(), torch.tensor([[0.4]]).log()
        >>> kl, zero = torch.tensor([[0.2231436]]), torch.zeros(1, 1)
        >>> sparse_po_loss(chosen, rejected, kl, kl, beta=1.0)  # log(5/4)
        tensor(0.2231)
        >>> sparse_po_loss(chosen, rejected, kl, kl, beta=1.0, kl_mask_rejected=zero)  # log(6/5)
        tensor(0.1823)

    Source: Christopoulou et al. (2024), Eq. 8 and 9, arXiv:2410.05102.
    """
    check_range("l1_reward", l1_reward, at_least=0.0, below=math.inf)
    check_range("l1_kl", l1_kl, at_least=0.0, below=math.inf)
    check_choice("l1_aggregate", l1_aggregate, ("sum", "mean"))
    check_range("beta", beta, above=0.0, below=math.inf)
    chosen = (chosen_log_ratio, chosen_kl, reward_mask_chosen, kl_mask_chosen, mask_chosen)
    rejected = (
        *(rejected_log_ratio, rejected_kl),
        *(reward_mask_rejected, kl_mask_rejected, mask_rejected),
    )
    _check_response("chosen", *chosen)
    _check_response("rejected", *rejected)
    check_shape("rejected_log_ratio", rejected_log_ratio, (chosen_log_ratio.shape[0], None))
    margin = beta * (_advantage(*chosen) - _advantage(*rejected))
    loss = -logsigmoid(margin)
    for weight, which in ((l1_reward, 2), (l1_kl, 3)):
        if weight > 0:
            for response in (chosen, rejected):
                loss = loss + weight * _l1(response[which], response[0], response[4], l1_aggregate)
    pairs = _pairs(chosen_log_ratio, rejected_log_ratio, mask_chosen, mask_rejected)
    dtype = torch.promote_types(chosen_log_ratio.dtype, rejected_log_ratio.dtype)
    return reduce_masked(loss, pairs, reduction).to(dtype)


def sparse_po_reward(
    log_ratio: Tensor,
    kl: Tensor,
    *,
    beta: float = 0.1,
    reward_mask: Tensor | None = None,
    kl_mask: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Implicit reward of each response: the sum of the advantages of its tokens.

    .. math:: \hat r = \beta \sum_t \left( m^u_t \rho_t + m^d_t K_t \right)

    The difference of two of these is the margin inside :func:`sparse_po_loss`. The released code
    logs :math:`m^u \rho - m^d K`, whose difference is not.

    Args:
        log_ratio: ``log pi - log ref`` of each token, ``[B, T]``.
        kl: ``KL(ref || pi)`` of each state, ``[B, T]``.
        beta: > 0, default 0.1.
        reward_mask: ``[B, T]``; ``None`` = 1.
        kl_mask: ``[B, T]``; ``None`` = 1.
        mask: which tokens count, ``[B, T]``.

    Returns:
        ``[B]``; 0 for a response without tokens that count.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: a shape or number does not fit, or nothing in the tensors.

    Example:
        Under the reference the advantages of a state average to 0:

        >>> ref, policy = torch.tensor([0.5, 0.5]), torch.tensor([0.8, 0.2])
        >>> log_ratio = (policy / ref).log()
        >>> kl = -(ref * log_ratio).sum()
        >>> reward = sparse_po_reward(log_ratio[:, None], kl.expand(2, 1), beta=1.0)
        >>> reward
        tensor([ 0.6931, -0.6931])

    Source: derived as in Zeng et al. (2024), arXiv:2404.11999, with a leash for each state.
    """
    check_range("beta", beta, above=0.0, below=math.inf)
    _check_response("", log_ratio, kl, reward_mask, kl_mask, mask)
    reward = beta * _advantage(log_ratio, kl, reward_mask, kl_mask, mask)
    return reward.to(log_ratio.dtype)


def tdpo1_loss(
    chosen_log_ratio: Tensor,
    rejected_log_ratio: Tensor,
    chosen_kl: Tensor,
    rejected_kl: Tensor,
    *,
    beta: float = 0.1,
    mask_chosen: Tensor | None = None,
    mask_rejected: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Token-level DPO, first version: :func:`sparse_po_loss` with every mask 1.

    .. math:: L = -\log \sigma\left( \beta \Big[ \sum_t \rho_w - \sum_t \rho_l
        - \Big( \sum_t K_l - \sum_t K_w \Big) \Big] \right)

    Args:
        chosen_log_ratio: ``[B, T]``.
        rejected_log_ratio: ``[B, T']``.
        chosen_kl: ``KL(ref || pi)``, ``[B, T]``; not detached.
        rejected_kl: ``[B, T']``; not detached.
        beta: > 0, default 0.1.
        mask_chosen: which tokens count, ``[B, T]``.
        mask_rejected: ``[B, T']``.
        reduction: over pairs.

    Returns:
        0-d, or ``[B]`` for ``"none"``.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: a shape or number does not fit, or the batch is empty.

    Example:
        Equal divergences cancel, and DPO remains:

        >>> chosen, rejected = torch.tensor([[1.6]]).log(), torch.tensor([[0.4]]).log()
        >>> kl = torch.full((1, 1), 0.2231436)
        >>> tdpo1_loss(chosen, rejected, kl, kl, beta=1.0)
        tensor(0.2231)

    Source: Zeng et al. (2024), Eq. 16, arXiv:2404.11999.
    """
    return sparse_po_loss(
        chosen_log_ratio,
        rejected_log_ratio,
        chosen_kl,
        rejected_kl,
        beta=beta,
        mask_chosen=mask_chosen,
        mask_rejected=mask_rejected,
        reduction=reduction,
    )


def tdpo2_loss(
    chosen_log_ratio: Tensor,
    rejected_log_ratio: Tensor,
    chosen_kl: Tensor,
    rejected_kl: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
    mask_chosen: Tensor | None = None,
    mask_rejected: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Token-level DPO, second version: the KL terms weigh ``alpha``, the chosen one is detached.

    .. math:: L = -\log \sigma\left( \beta \Big[ \sum_t \rho_w - \sum_t \rho_l
        - \alpha \Big( \sum_t K_l - \mathrm{sg} \sum_t K_w \Big) \Big] \right)

    It is :func:`sparse_po_loss` with KL masks ``alpha``, but for the stop-gradient: TDPO1 raises
    the divergence on chosen responses, this one leaves it alone.

    Args:
        chosen_log_ratio: ``[B, T]``.
        rejected_log_ratio: ``[B, T']``.
        chosen_kl: ``KL(ref || pi)``, ``[B, T]``; detached.
        rejected_kl: ``[B, T']``; not detached.
        beta: > 0, default 0.1.
        alpha: weight of the KL terms, at least 0. Default 0.5.
        mask_chosen: which tokens count, ``[B, T]``.
        mask_rejected: ``[B, T']``.
        reduction: over pairs.

    Returns:
        0-d, or ``[B]`` for ``"none"``.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: a shape or number does not fit, or the batch is empty.

    Example:
        >>> ratio = torch.zeros(1, 2)
        >>> kl = torch.full((1, 2), 0.5, requires_grad=True)
        >>> tdpo2_loss(ratio, ratio, kl, torch.zeros(1, 2), alpha=1.0).requires_grad
        False

    Source: Zeng et al. (2024), Eq. 17, arXiv:2404.11999.
    """
    check_range("alpha", alpha, at_least=0.0, below=math.inf)
    check_floating(chosen_kl=chosen_kl, rejected_kl=rejected_kl)
    return sparse_po_loss(
        chosen_log_ratio,
        rejected_log_ratio,
        chosen_kl.detach(),
        rejected_kl,
        beta=beta,
        kl_mask_chosen=torch.full_like(chosen_kl, alpha, requires_grad=False),
        kl_mask_rejected=torch.full_like(rejected_kl, alpha, requires_grad=False),
        mask_chosen=mask_chosen,
        mask_rejected=mask_rejected,
        reduction=reduction,
    )


def _advantage(
    log_ratio: Tensor,
    kl: Tensor,
    reward_mask: Tensor | None,
    kl_mask: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """``sum_t m^u rho + m^d K`` over the tokens that count, ``[B]``, float32 or wider."""
    return _weighted_sum(log_ratio, reward_mask, mask) + _weighted_sum(kl, kl_mask, mask)


def _weighted_sum(values: Tensor, weight: Tensor | None, mask: Tensor | None) -> Tensor:
    kept = _kept(values, mask)
    return (kept if weight is None else kept * _kept(weight, mask)).sum(-1)


def _l1(
    weight: Tensor | None, like: Tensor, mask: Tensor | None, aggregate: Literal["sum", "mean"]
) -> Tensor:
    kept = _kept(torch.ones_like(like) if weight is None else weight, mask).abs()
    total = kept.sum(-1)
    if aggregate == "sum":
        return total
    length = like.shape[-1] if mask is None else (mask != 0).sum(-1).clamp(min=1)
    return total / length


def _kept(values: Tensor, mask: Tensor | None) -> Tensor:
    wide = widen(values) if values.is_floating_point() else values.to(torch.float32)
    return fill_masked(wide, mask)


def _pairs(
    chosen: Tensor, rejected: Tensor, mask_chosen: Tensor | None, mask_rejected: Tensor | None
) -> Tensor | None:
    """Which pairs have a token that counts, ``[B]``."""
    if mask_chosen is None or mask_rejected is None:
        return None
    return (mask_chosen != 0).any(-1) | (mask_rejected != 0).any(-1)


def _check_response(
    which: str,
    log_ratio: Tensor,
    kl: Tensor,
    reward_mask: Tensor | None,
    kl_mask: Tensor | None,
    mask: Tensor | None,
) -> None:
    """Check the tensors of one response, named as the caller's arguments are."""
    before, after = (f"{which}_", f"_{which}") if which else ("", "")
    name = f"{before}log_ratio"
    check_floating(**{name: log_ratio, f"{before}kl": kl})
    check_shape(name, log_ratio, (None, None))
    check_not_empty(name, log_ratio)
    check_same_shape(**{name: log_ratio, f"{before}kl": kl})
    for kind, weight in (("reward_mask", reward_mask), ("kl_mask", kl_mask), ("mask", mask)):
        check_mask(weight, log_ratio, name=f"{kind}{after}")
