r"""Policy losses on the ratio ``rho = exp(log_ratio)`` of the new policy to the old one.

PPO clips the ratio; BPO fits it to the target that solves the bounded-ratio problem; GRPO and GBPO
are their critic-free forms for groups of language-model answers. All of them are a weight times a
distance between the ratio and a target, which :func:`ppo_gap` makes explicit for PPO.

Every ratio is the exponential of a log-ratio clamped to ``[-20, 20]``, so no loss overflows in
float32; beyond the clamp gradients are 0. Half precision is computed in float32 and rounded at the
end. NaN in any kept item gives NaN.

Sources: Schulman et al. (2017), arXiv:1707.06347; Shao et al. (2024), arXiv:2402.03300; Ao et al.
(2026), Bounded Ratio Reinforcement Learning, arXiv:2604.18578 (docs/systems/bpo).
"""

from typing import Literal

import torch
from torch import Tensor

from steelyard._checks import (
    check_choice,
    check_floating,
    check_mask,
    check_not_empty,
    check_range,
    check_same_shape,
    check_shape,
)
from steelyard._reduce import (
    Aggregate,
    Reduction,
    accumulation_dtype,
    aggregate_tokens,
    fill_masked,
    reduce_masked,
)

__all__ = [
    "bpo_loss",
    "bpo_target_ratio",
    "bpo_threshold_loss",
    "gbpo_loss",
    "grpo_loss",
    "ppo_gap",
    "ppo_loss",
]

LOG_RATIO_LIMIT = 20.0
"""Ratios are computed from log-ratios clamped to plus or minus this; beyond it gradients are 0."""


def ppo_loss(
    log_ratio: Tensor,
    advantages: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Raise the surrogate return until the ratio leaves the band in the advantage's direction.

    .. math::
        L = -\min\big(\rho A,\ \mathrm{clip}(\rho, 1 - \epsilon, 1 + \epsilon_h) A\big)

    Past the band on the good side the gradient is zero: nothing pulls a ratio back that has gone
    too far. Compare :func:`bpo_loss`.

    Args:
        log_ratio: ``log pi(a|s) - log pi_old(a|s)``, any shape, for example ``[B]`` or ``[B, T]``.
        advantages: same shape; detached.
        epsilon: lower half-width of the band, in [0, 1].
        epsilon_high: upper half-width, >= 0; ``None`` = ``epsilon``.
        mask: same shape, true = counts.
        reduction: ``"mean"`` (over kept items), ``"sum"`` or ``"none"``.

    Returns:
        0-d tensor, or the shape of ``log_ratio`` for ``"none"``; its dtype.

    Raises:
        ValueError: shapes differ or are empty, or a half-width is out of range.
        TypeError: a tensor is not floating point.

    Example:
        The same overshoot has a gradient only where the advantage disagrees with it:

        >>> import torch
        >>> log_ratio = torch.tensor([0.5, 0.5], requires_grad=True)
        >>> ppo_loss(log_ratio, torch.tensor([1.0, -1.0]), reduction="sum").backward()
        >>> log_ratio.grad
        tensor([0.0000, 1.6487])

    Source: Schulman et al. (2017), Eq. 7, arXiv:1707.06347.
    """
    check_floating(log_ratio=log_ratio, advantages=advantages)
    check_same_shape(log_ratio=log_ratio, advantages=advantages)
    check_not_empty("log_ratio", log_ratio)
    check_mask(mask, log_ratio)
    values = _ppo_values(log_ratio, advantages, epsilon, epsilon_high, mask)
    return reduce_masked(values, mask, reduction).to(log_ratio.dtype)


def _ppo_values(
    log_ratio: Tensor,
    advantages: Tensor,
    epsilon: float,
    epsilon_high: float | None,
    mask: Tensor | None,
) -> Tensor:
    high = epsilon if epsilon_high is None else epsilon_high
    check_range("epsilon", epsilon, at_least=0.0, at_most=1.0)
    check_range("epsilon_high", high, at_least=0.0)
    ratio = _ratio(log_ratio, mask)
    advantage = fill_masked(advantages.detach().to(ratio.dtype), mask)
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + high) * advantage)


def ppo_gap(log_ratio: Tensor, advantages: Tensor, epsilon: float) -> Tensor:
    r"""Distance of the ratio from PPO's implicit target, on the one side PPO looks at.

    .. math::
        |A| \max\big(0, \mathrm{sign}(A)\,(1 + \epsilon\,\mathrm{sign}(A) - \rho)\big)
        = L_{\mathrm{PPO}} + (1 + \epsilon\,\mathrm{sign} A) A

    The PPO loss up to a constant, written as a hinge: it equals
    ``bpo_loss(log_ratio, 1 + epsilon * sign(A), |A|)`` until the target is passed and is 0 after.

    Args:
        log_ratio: any shape.
        advantages: same shape; detached.
        epsilon: half-width of the band, in [0, 1].

    Returns:
        Non-negative values per item, shape and dtype of ``log_ratio``.

    Raises:
        ValueError: shapes differ or ``epsilon`` is out of range.
        TypeError: a tensor is not floating point.

    Example:
        >>> import torch
        >>> ratio = torch.tensor([1.0, 1.1, 1.5])
        >>> ppo_gap(ratio.log(), torch.full((3,), 2.0), 0.2)
        tensor([0.4000, 0.2000, 0.0000])

    Source: Ao et al. (2026), "PPO through the lens of bounded ratios", arXiv:2604.18578; the
    identity holds for every ratio, see docs/errata.
    """
    check_floating(log_ratio=log_ratio, advantages=advantages)
    check_same_shape(log_ratio=log_ratio, advantages=advantages)
    check_range("epsilon", epsilon, at_least=0.0, at_most=1.0)
    ratio = _ratio(log_ratio, None)
    advantage = advantages.detach().to(ratio.dtype)
    missing = advantage.sign() * (1 - ratio) + epsilon
    return (advantage.abs() * missing.clamp(min=0)).to(log_ratio.dtype)


def bpo_target_ratio(
    returns: Tensor,
    threshold: Tensor,
    *,
    epsilon: float = 0.2,
    temperature: float = 1e-3,
    epsilon_high: float | None = None,
) -> Tensor:
    r"""The ratio that the bounded-ratio optimum gives an action of this return.

    .. math::
        \rho^* = 1 - \epsilon + (\epsilon + \epsilon_h)\, \sigma\big((R - u) / \lambda\big)

    Args:
        returns: estimate of the action value, any shape, reward units; detached.
        threshold: soft median u of the action values, same shape; detached. The state value
            serves too (the "value" form of the method).
        epsilon: lower half-width of the band, in (0, 1].
        temperature: lambda in *reward units*, >= 0; scaling rewards or advantages changes what
            it means. 0 is the hard limit, with the middle of the band at a tie.
        epsilon_high: upper half-width, positive; ``None`` = ``epsilon``.

    Returns:
        Targets in ``[1 - epsilon, 1 + epsilon_high]``, shape and dtype of ``returns``.

    Raises:
        ValueError: shapes differ or a setting is out of range.
        TypeError: a tensor is not floating point.

    Example:
        >>> import torch
        >>> bpo_target_ratio(torch.tensor([3.0, 1.0, 2.0]), torch.full((3,), 2.0), epsilon=0.3)
        tensor([1.3000, 0.7000, 1.0000])

    Source: Ao et al. (2026), Eq. 16, arXiv:2604.18578; asymmetric form derived in docs/systems/bpo.
    """
    check_floating(returns=returns, threshold=threshold)
    check_same_shape(returns=returns, threshold=threshold)
    high = epsilon if epsilon_high is None else epsilon_high
    check_range("epsilon", epsilon, above=0.0, at_most=1.0)
    check_range("epsilon_high", high, above=0.0)
    check_range("temperature", temperature, at_least=0.0)
    work = accumulation_dtype(returns.dtype)
    distance = returns.detach().to(work) - threshold.detach().to(work)
    if temperature == 0:
        share = torch.where(distance.isnan(), distance, (distance.sign() + 1) / 2)
    else:
        share = torch.sigmoid(distance / temperature)
    return (1 - epsilon + (epsilon + high) * share).to(returns.dtype)


def bpo_loss(
    log_ratio: Tensor,
    target_ratio: Tensor,
    weight: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Fit the ratio to its bounded target, from both sides.

    .. math:: L = w\, |\rho - \rho^*|

    The advantage-weighted total variation between the policy and the bounded-ratio optimum. The
    gradient in ``log_ratio`` is ``w * sign(rho - rho*) * rho``: past the target a pull back,
    exactly at the target 0, and at ``rho = 1`` the policy gradient if ``w = |A|`` and the target
    lies on the side of A's sign.

    Args:
        log_ratio: ``log pi(a|s) - log pi_old(a|s)``, any shape, for example ``[B]`` or ``[B, T]``.
        target_ratio: same shape, from :func:`bpo_target_ratio`; detached.
        weight: same shape, non-negative, for example ``advantages.abs()``; detached.
        mask: same shape, true = counts.
        reduction: ``"mean"`` (over kept items), ``"sum"`` or ``"none"``.

    Returns:
        0-d tensor, or the shape of ``log_ratio`` for ``"none"``; its dtype.

    Raises:
        ValueError: shapes differ or are empty.
        TypeError: a tensor is not floating point.

    Example:
        A ratio of 1.5 is pulled back to the edge of the band, where PPO would leave it:

        >>> import torch
        >>> log_ratio = torch.tensor([1.5]).log().requires_grad_()
        >>> bpo_loss(log_ratio, torch.tensor([1.2]), torch.tensor([1.0])).backward()
        >>> log_ratio.grad
        tensor([1.5000])

    Source: Ao et al. (2026), Eq. 16, arXiv:2604.18578.
    """
    check_floating(log_ratio=log_ratio, target_ratio=target_ratio, weight=weight)
    check_same_shape(log_ratio=log_ratio, target_ratio=target_ratio, weight=weight)
    check_not_empty("log_ratio", log_ratio)
    check_mask(mask, log_ratio)
    values = _bpo_values(log_ratio, target_ratio, weight, mask)
    return reduce_masked(values, mask, reduction).to(log_ratio.dtype)


def _bpo_values(
    log_ratio: Tensor, target_ratio: Tensor, weight: Tensor, mask: Tensor | None
) -> Tensor:
    ratio = _ratio(log_ratio, mask)
    target = fill_masked(target_ratio.detach().to(ratio.dtype), mask)
    return fill_masked(weight.detach().to(ratio.dtype), mask) * (ratio - target).abs()


def bpo_threshold_loss(
    returns: Tensor,
    threshold: Tensor,
    *,
    temperature: float = 1.0,
    kind: Literal["code", "temperature", "median"] = "code",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Regress the threshold ``u`` that splits the action values.

    With ``d = R - u``:

    .. math::
        L_{\mathrm{code}} = \mathrm{softplus}(d) - \tfrac d2, \qquad
        L_{\mathrm{temperature}} = T\,\mathrm{softplus}(d/T) - \tfrac d2, \qquad
        L_{\mathrm{median}} = \tfrac{|d|}2

    Minimising the second over samples of the old policy gives exactly the threshold at which the
    soft ratios average 1 (dual of the bounded-ratio problem); its limit at T = 0 is the third.
    The first is what the released code trains, whatever the temperature of the target: up to a
    constant it is ``d^2/8`` for ``|d| << 1`` (a mean) and ``|d|/2`` for ``|d| >> 1`` (a median).
    All three belong to a symmetric band.

    Args:
        returns: estimate of the action value, any shape, reward units; detached.
        threshold: prediction of u, same shape; carries the gradient.
        temperature: T in reward units, positive; ignored unless ``kind="temperature"``.
        kind: which of the three.
        mask: same shape, true = counts.
        reduction: ``"mean"`` (over kept items), ``"sum"`` or ``"none"``.

    Returns:
        0-d tensor, or the shape of ``threshold`` for ``"none"``; its dtype.

    Raises:
        ValueError: shapes differ or are empty, or a setting is out of range.
        TypeError: a tensor is not floating point.

    Example:
        The slope in u is half the share of returns below minus half the share above, softened:

        >>> import torch
        >>> u = torch.zeros(3, requires_grad=True)
        >>> returns = torch.tensor([-9.0, 9.0, 9.0])
        >>> bpo_threshold_loss(returns, u, kind="median", reduction="sum").backward()
        >>> u.grad
        tensor([ 0.5000, -0.5000, -0.5000])

    Source: Ao et al. (2026), released code, arXiv:2604.18578; dual derived in docs/systems/bpo.
    """
    check_floating(returns=returns, threshold=threshold)
    check_same_shape(threshold=threshold, returns=returns)
    check_choice("kind", kind, ("code", "temperature", "median"))
    if kind == "temperature":
        check_range("temperature", temperature, above=0.0)
    check_not_empty("threshold", threshold)
    check_mask(mask, threshold)
    work = accumulation_dtype(threshold.dtype)
    distance = fill_masked(returns.detach().to(work) - threshold.to(work), mask)
    if kind == "median":
        values = distance.abs() / 2
    else:
        scale = temperature if kind == "temperature" else 1.0
        scaled = distance / scale
        softplus = torch.logaddexp(scaled, torch.zeros_like(scaled))
        values = scale * softplus - distance / 2
    return reduce_masked(values, mask, reduction).to(threshold.dtype)


def grpo_loss(
    log_ratio: Tensor,
    advantages: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    mask: Tensor | None = None,
    aggregate: Aggregate = "token",
) -> Tensor:
    r"""PPO's clipped loss per token, with one advantage for each answer.

    .. math::
        L = \mathrm{agg}_{i,t}\ -\min\big(\rho_{it} A_i,\
            \mathrm{clip}(\rho_{it}, 1 - \epsilon, 1 + \epsilon_h) A_i\big)

    Args:
        log_ratio: per token, ``[B, T]``.
        advantages: per answer, ``[B]``, for example from :func:`group_relative_advantages`;
            detached.
        epsilon: lower half-width of the band, in [0, 1].
        epsilon_high: upper half-width, >= 0; ``None`` = ``epsilon``.
        mask: ``[B, T]``, true = a token of the answer.
        aggregate: ``"token"`` = mean over all kept tokens; ``"sequence"`` = mean over answers of
            the token mean (the original GRPO); ``"sequence_sum"`` = mean over answers of the sum.

    Returns:
        0-d tensor, dtype of ``log_ratio``.

    Raises:
        ValueError: wrong shapes or a setting out of range.
        TypeError: a tensor is not floating point.

    Example:
        On policy every ratio is 1, so the token mean is minus the mean advantage of the tokens:

        >>> import torch
        >>> mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
        >>> grpo_loss(torch.zeros(2, 3), torch.tensor([1.0, -1.0]), mask=mask)
        tensor(-0.5000)
        >>> grpo_loss(torch.zeros(2, 3), torch.tensor([1.0, -1.0]), mask=mask, aggregate="sequence")
        tensor(0.)

    Source: Shao et al. (2024), Eq. 3, arXiv:2402.03300; Yu et al. (2025), DAPO, arXiv:2503.14476.
    """
    _check_tokens(log_ratio, mask, advantages=advantages)
    per_token = advantages[:, None].expand_as(log_ratio)
    values = _ppo_values(log_ratio, per_token, epsilon, epsilon_high, mask)
    return aggregate_tokens(values, mask, aggregate).to(log_ratio.dtype)


def gbpo_loss(
    log_ratio: Tensor,
    target_ratio: Tensor,
    weight: Tensor,
    *,
    mask: Tensor | None = None,
    aggregate: Aggregate = "token",
) -> Tensor:
    r"""BPO's loss per token, with one target and one weight for each answer.

    .. math:: L = \mathrm{agg}_{i,t}\ |z_i|\, |\rho_{it} - \hat\rho^*_i|

    Args:
        log_ratio: per token, ``[B, T]``.
        target_ratio: per answer, ``[B]``, from :func:`gbpo_signals`; detached.
        weight: per answer, ``[B]``, non-negative: the absolute advantage; detached.
        mask: ``[B, T]``, true = a token of the answer.
        aggregate: as in :func:`grpo_loss`.

    Returns:
        0-d tensor, dtype of ``log_ratio``.

    Raises:
        ValueError: wrong shapes or an unknown ``aggregate``.
        TypeError: a tensor is not floating point.

    Example:
        >>> import torch
        >>> from steelyard.policy import gbpo_signals
        >>> rewards, groups = torch.tensor([1.0, 0.0, 0.0]), torch.zeros(3, dtype=torch.long)
        >>> signals = gbpo_signals(rewards, groups)
        >>> loss = gbpo_loss(torch.zeros(3, 5), signals.target_ratio, signals.advantages.abs())
        >>> round(loss.item(), 4)  # only the right answer is away from its target of 1.2
        0.077

    Source: Ao et al. (2026), GBPO, arXiv:2604.18578.
    """
    _check_tokens(log_ratio, mask, target_ratio=target_ratio, weight=weight)
    target, scale = (x[:, None].expand_as(log_ratio) for x in (target_ratio, weight))
    values = _bpo_values(log_ratio, target, scale, mask)
    return aggregate_tokens(values, mask, aggregate).to(log_ratio.dtype)


def _check_tokens(log_ratio: Tensor, mask: Tensor | None, **per_answer: Tensor) -> None:
    check_floating(log_ratio=log_ratio, **per_answer)
    check_shape("log_ratio", log_ratio, (None, None))
    check_not_empty("log_ratio", log_ratio)
    for name, tensor in per_answer.items():
        check_shape(name, tensor, (log_ratio.shape[0],))
    check_mask(mask, log_ratio)


def _ratio(log_ratio: Tensor, mask: Tensor | None) -> Tensor:
    """``exp(log_ratio)``, 1 at masked places, never overflowing, float32 or better."""
    log_ratio = fill_masked(log_ratio.to(accumulation_dtype(log_ratio.dtype)), mask)
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
