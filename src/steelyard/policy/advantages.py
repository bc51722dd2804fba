"""Advantage estimators: temporal (GAE) and relative to a group of answers (GRPO, GBPO).

Everything here turns rewards into weights and targets, so nothing carries a gradient: inputs are
detached. Group ids are integers in any order and of any size; groups may differ in length.

Across ranks: a group must be whole on one rank, or its rewards gathered, before its mean, deviation
and median are taken; ``scale="batch"`` needs the rewards of all ranks.

Sources: Schulman et al. (2016), High-Dimensional Continuous Control Using Generalized Advantage
Estimation, arXiv:1506.02438; Shao et al. (2024), DeepSeekMath (GRPO), arXiv:2402.03300; Liu et al.
(2025), Understanding R1-Zero-Like Training (Dr. GRPO), arXiv:2503.20783; Ao et al. (2026), Bounded
Ratio Reinforcement Learning, arXiv:2604.18578 (docs/systems/bpo).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from steelyard._checks import (
    check_choice,
    check_floating,
    check_groups,
    check_mask,
    check_not_empty,
    check_range,
    check_same_shape,
    check_shape,
    check_tensor,
)
from steelyard._reduce import accumulation_dtype, fill_masked
from steelyard.policy._groups import (
    group_centred,
    group_index,
    group_median,
    group_quantile,
    group_std,
    group_sum,
)

__all__ = [
    "GBPOSignals",
    "GeneralizedAdvantages",
    "divergence_weights",
    "gae",
    "gbpo_signals",
    "group_relative_advantages",
    "mean_token_entropy",
]

Scale = Literal["group", "batch", "none"]


class GeneralizedAdvantages(NamedTuple):
    """What :func:`gae` returns, each ``[T, B]``."""

    advantages: Tensor
    returns: Tensor


class GBPOSignals(NamedTuple):
    """What :func:`gbpo_signals` returns, each ``[N]``."""

    advantages: Tensor
    target_ratio: Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float = 0.99,
    gae_lambda: float = 0.95,
) -> GeneralizedAdvantages:
    r"""Generalized advantage estimation that tells termination from truncation.

    .. math::
        \delta_t = r_t + \gamma (1 - \mathrm{term}_t) V(s'_t) - V(s_t), \qquad
        A_t = \delta_t + \gamma\lambda (1 - \mathrm{term}_t)(1 - \mathrm{trunc}_t) A_{t+1}

    A terminated episode has no future value; a truncated one (time limit) is bootstrapped with
    the value of the state it was cut in, which ``next_values`` must hold: *not* the value of the
    first state of the next episode.

    The recurrence is an associative scan, so time costs ``log2(T)`` vector operations, no loop
    over steps. NaN spreads backwards to the start of its episode and no further.

    Args:
        rewards: ``[T, B]`` (any trailing shape), reward units; detached.
        values: value of the state acted in, same shape; detached.
        next_values: value of the state reached, same shape; detached.
        terminated: boolean or 0/1, same shape: the task ended.
        truncated: boolean or 0/1, same shape: the episode was cut.
        gamma: discount, in [0, 1].
        gae_lambda: trace decay, in [0, 1].

    Returns:
        ``advantages`` and ``returns = advantages + values``, shape and dtype of ``rewards``.

    Raises:
        ValueError: shapes differ, the time axis is empty, or a coefficient is out of range.
        TypeError: rewards or values are not floating point, or the ends of episodes no tensors.

    Example:
        A time limit keeps the value of the last state, a termination does not:

        >>> import torch
        >>> step = dict(rewards=torch.ones(1, 1), values=torch.zeros(1, 1),
        ...             next_values=torch.full((1, 1), 10.0))
        >>> yes, no = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.bool)
        >>> gae(**step, terminated=yes, truncated=no, gamma=0.9).advantages.item()
        1.0
        >>> gae(**step, terminated=no, truncated=yes, gamma=0.9).advantages.item()
        10.0

    Source: Schulman et al. (2016), Eq. 16, arXiv:1506.02438; Pardo et al. (2018), arXiv:1712.00378.
    """
    check_floating(rewards=rewards, values=values, next_values=next_values)
    check_tensor("terminated", terminated)
    check_tensor("truncated", truncated)
    check_same_shape(
        rewards=rewards,
        values=values,
        next_values=next_values,
        terminated=terminated,
        truncated=truncated,
    )
    if rewards.dim() == 0:
        raise ValueError("rewards must have a time axis first, got a 0-d tensor")
    check_not_empty("rewards", rewards)
    check_range("gamma", gamma, at_least=0.0, at_most=1.0)
    check_range("gae_lambda", gae_lambda, at_least=0.0, at_most=1.0)
    dtype = rewards.dtype
    work = accumulation_dtype(dtype)
    reward, value, next_value = (x.detach().to(work) for x in (rewards, values, next_values))
    alive = terminated == 0
    delta = reward + gamma * fill_masked(next_value, alive) - value
    decay = gamma * gae_lambda * (alive & (truncated == 0)).to(work)
    advantages = _reverse_linear_scan(decay, delta)
    return GeneralizedAdvantages(advantages.to(dtype), (advantages + value).to(dtype))


def _reverse_linear_scan(decay: Tensor, increment: Tensor) -> Tensor:
    """Solve ``x_t = increment_t + decay_t x_{t+1}`` along the first axis by recursive doubling.

    After pass k every position holds the composition of its own map with the next ``2^k - 1``.
    """
    length, span = increment.shape[0], 1
    while span < length:
        tail = length - span
        later = fill_masked(increment[span:], decay[:tail] != 0)  # 0 * NaN must stay 0
        increment = torch.cat((increment[:tail] + decay[:tail] * later, increment[tail:]))
        decay = torch.cat((decay[:tail] * decay[span:], torch.zeros_like(decay[tail:])))
        span *= 2
    return increment


def group_relative_advantages(
    rewards: Tensor, groups: Tensor, *, scale: Scale = "group", eps: float = 1e-6
) -> Tensor:
    r"""Rewards relative to the mean of their group, in units of a standard deviation.

    .. math:: A_i = \frac{r_i - \bar r_{g(i)}}{\mathrm{std} + \epsilon}

    with the unbiased deviation of the group (GRPO), of the whole batch, or no division
    (Dr. GRPO). A group of one has nothing to compare with and gets 0, as has a group whose
    rewards are all equal.

    Args:
        rewards: ``[N]``, reward units; detached. NaN spreads within its group, and to the whole
            batch with ``scale="batch"``.
        groups: integer group id of each reward, ``[N]``.
        scale: ``"group"``, ``"batch"`` or ``"none"``.
        eps: added to the deviation, positive.

    Returns:
        ``[N]``, dtype of ``rewards``.

    Raises:
        ValueError: wrong shapes, empty input, unknown ``scale`` or ``eps`` not positive.
        TypeError: ``rewards`` not floating point or ``groups`` not integer.

    Example:
        >>> import torch
        >>> rewards = torch.tensor([1.0, 0.0, 0.0, 5.0, 5.0])
        >>> group_relative_advantages(rewards, torch.tensor([0, 0, 0, 7, 7]), scale="none")
        tensor([ 0.6667, -0.3333, -0.3333,  0.0000,  0.0000])

    Source: Shao et al. (2024), Sec. 4.1.2, arXiv:2402.03300; Liu et al. (2025), arXiv:2503.20783.
    """
    _check_rewards(rewards, groups, eps)
    check_choice("scale", scale, ("group", "batch", "none"))
    work = rewards.detach().to(accumulation_dtype(rewards.dtype))
    index, count = group_index(groups)
    centred = group_centred(work, index, count)
    if scale == "group":
        centred = centred / (group_std(centred, index, count)[index] + eps)
    elif scale == "batch":
        spread = work.std() if work.numel() > 1 else work.new_zeros(())
        centred = centred / (spread + eps)
    return centred.to(rewards.dtype)


def gbpo_signals(
    rewards: Tensor,
    groups: Tensor,
    *,
    temperature: float = 1e-4,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    ties: Literal["half", "exact"] = "half",
    eps: float = 1e-6,
) -> GBPOSignals:
    r"""Advantages and target ratios of group bounded policy optimisation.

    .. math::
        z_i = \frac{r_i - \mathrm{mean}}{\mathrm{std} + \epsilon}, \qquad
        \hat\rho^*_i = 1 - \epsilon_l + (\epsilon_l + \epsilon_h)
            \,\sigma\!\left(\frac{r_i - \mathrm{median}}{(\mathrm{std} + \epsilon)\,T}\right)

    The published rule (``ties="half"``) gives a reward equal to the median the middle of the
    band, so the targets of a group need not average 1. ``ties="exact"`` is, at small T, the
    optimum of the bounded-ratio problem on the group: the threshold is the group's
    ``epsilon_high / (epsilon_low + epsilon_high)`` quantile (the lower median when the band is
    symmetric) and the tied rewards share the one ratio in the band that brings the mean of the
    group to 1.

    Args:
        rewards: ``[N]``; detached. NaN spreads within its group.
        groups: integer group id of each reward, ``[N]``.
        temperature: softness of the target, in standard deviations, positive.
        epsilon_low: lower half-width of the band, in (0, 1].
        epsilon_high: upper half-width of the band, positive.
        ties: ``"half"`` (published) or ``"exact"``.
        eps: added to the deviation, positive.

    Returns:
        ``advantages`` z and ``target_ratio``, each ``[N]`` in the dtype of ``rewards``. All-equal
        groups and groups of one have advantage 0, hence zero loss.

    Raises:
        ValueError: wrong shapes, empty input, or a setting out of range.
        TypeError: ``rewards`` not floating point or ``groups`` not integer.

    Example:
        One right answer in four is the only one with a target away from 1; with three right in
        four it is the wrong one, and the exact rule raises the three by a third of the band:

        >>> import torch
        >>> one_group = torch.zeros(4, dtype=torch.long)
        >>> gbpo_signals(torch.tensor([1.0, 0, 0, 0]), one_group).target_ratio
        tensor([1.2000, 1.0000, 1.0000, 1.0000])
        >>> gbpo_signals(torch.tensor([1.0, 1, 1, 0]), one_group, ties="exact").target_ratio
        tensor([1.0667, 1.0667, 1.0667, 0.8000])

    Source: Ao et al. (2026), GBPO, arXiv:2604.18578; the exact rule is derived in docs/systems/bpo.
    """
    _check_rewards(rewards, groups, eps)
    check_range("temperature", temperature, above=0.0)
    check_range("epsilon_low", epsilon_low, above=0.0, at_most=1.0)
    check_range("epsilon_high", epsilon_high, above=0.0)
    check_choice("ties", ties, ("half", "exact"))
    work = rewards.detach().to(accumulation_dtype(rewards.dtype))
    index, count = group_index(groups)
    centred = group_centred(work, index, count)
    scale = group_std(centred, index, count)[index] + eps
    width = epsilon_low + epsilon_high
    if ties == "half":
        threshold = group_median(work, index, count)[index]
    else:
        threshold = group_quantile(work, index, count, epsilon_high / width)[index]
    distance = work - threshold
    target = 1 - epsilon_low + width * torch.sigmoid(distance / (scale * temperature))
    if ties == "exact":
        tied = distance == 0
        rest = group_sum(target.where(~tied, 0.0), index, count)
        shared = (count - rest) / group_sum(tied.to(work.dtype), index, count)
        shared = shared.clamp(1 - epsilon_low, 1 + epsilon_high)
        target = torch.where(tied, shared[index], target)
    return GBPOSignals((centred / scale).to(rewards.dtype), target.to(rewards.dtype))


def mean_token_entropy(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Entropy of the next-token law in nats, averaged over the kept tokens of each answer.

    .. math:: m_i = \frac{1}{|o_i|} \sum_t H\big(\mathrm{softmax}(\mathrm{logits}_{i,t})\big)

    Args:
        logits: ``[B, T, V]``, of the sampling policy at its temperature; detached; ``-inf``
            allowed.
        mask: ``[B, T]``, true = counts.

    Returns:
        ``[B]``, dtype of ``logits``; 0 for an answer without a kept token.

    Raises:
        ValueError: wrong shapes.
        TypeError: ``logits`` not floating point.

    Example:
        >>> import torch
        >>> mean_token_entropy(torch.zeros(1, 3, 4))  # uniform over four tokens: log 4
        tensor([1.3863])

    Source: conditional advantage estimation (system ``canon``), grouping metric "entropy".
    """
    check_floating(logits=logits)
    check_shape("logits", logits, (None, None, None))
    check_mask(mask, logits[..., 0])
    logprobs = logits.detach().to(accumulation_dtype(logits.dtype)).log_softmax(-1)
    entropy = torch.special.entr(logprobs.exp()).sum(-1)
    kept = torch.ones_like(entropy) if mask is None else (mask != 0).to(entropy.dtype)
    mean = fill_masked(entropy, mask).sum(-1) / kept.sum(-1).clamp(min=1)
    return mean.to(logits.dtype)


def divergence_weights(kl: Tensor, *, scale: float, alpha: float) -> Tensor:
    r"""Weight each token's advantage by how far the policy has moved there.

    .. math:: w = 1 + s\,(\sigma(\alpha\, \mathrm{KL}) - \tfrac12)

    ``scale * alpha > 0`` strengthens the tokens that moved, ``< 0`` weakens them. Every weight is
    1 where the divergence is 0, so a first on-policy step is unchanged.

    Args:
        kl: per-token divergence in nats, any shape, >= 0; detached.
        scale: amplitude s, in [-2, 2] so that weights stay non-negative.
        alpha: slope, any finite number, per nat.

    Returns:
        Weights in ``[1 - |s|/2, 1 + |s|/2]``, shape and dtype of ``kl``.

    Raises:
        ValueError: ``scale`` out of range or ``alpha`` not finite.
        TypeError: ``kl`` not floating point.

    Example:
        >>> import torch
        >>> divergence_weights(torch.tensor([0.0, 100.0]), scale=1.0, alpha=1.0)
        tensor([1.0000, 1.5000])

    Source: token-level distributional shift (system ``token-shift``), weighted advantage.
    """
    check_floating(kl=kl)
    check_range("scale", scale, at_least=-2.0, at_most=2.0)
    check_range("alpha", alpha, above=-float("inf"), below=float("inf"))
    work = kl.detach().to(accumulation_dtype(kl.dtype))
    return (1 + scale * (torch.sigmoid(alpha * work) - 0.5)).to(kl.dtype)


def _check_rewards(rewards: Tensor, groups: Tensor, eps: float) -> None:
    check_floating(rewards=rewards)
    check_shape("rewards", rewards, (None,))
    check_not_empty("rewards", rewards)
    check_groups(groups, rewards)
    check_range("eps", eps, above=0.0)
