r"""GBPO, BPO, CANON and ADORA by name in verl.

:func:`register` writes each of ``steelyard_gbpo``, ``steelyard_bpo``, ``steelyard_canon`` and
``steelyard_adora`` into verl's registries of advantage estimators and of policy losses. A run then
chooses them as ``algorithm.adv_estimator`` and ``actor_rollout_ref.actor.policy_loss.loss_mode``;
the width of the band or clip is ``clip_ratio_low`` and ``clip_ratio_high``, the mean over tokens
``loss_agg_mode``, all of verl's actor.

verl hands its policy losses one tensor, the advantages. GBPO needs two numbers for each answer; its
estimator writes the second into the digits of a float64 advantage after the millionth, where its
loss finds it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from steelyard._checks import (
    check_choice,
    check_floating,
    check_mask,
    check_not_empty,
    check_range,
    check_shape,
)
from steelyard._extras import require
from steelyard._reduce import reduce_masked
from steelyard.policy import (
    adora_weights,
    bpo_loss,
    bpo_target_ratio,
    canon_advantages,
    gbpo_signals,
    group_relative_advantages,
    ppo_loss,
)
from steelyard.policy.losses import LOG_RATIO_LIMIT

__all__ = ["register"]

_UNIT = 2.0**-20
"""An advantage is rounded to this; below it a float64 still has the digits of the target."""

_BandLoss = Callable[[Tensor, Tensor, float, float, Tensor], Tensor]
"""``(log_ratio, advantages, low, high, mask)`` to the loss of each token, ``[B, T]``."""


def register(
    *,
    gbpo_temperature: float = 1e-4,
    bpo_temperature: float = 1e-3,
    canon_mu: float = 0.5,
    canon_alpha: float | None = None,
    adora_mode: Literal["attenuate", "amplify"] = "attenuate",
    adora_weight: float | None = None,
    adora_success_threshold: float = 0.5,
    adora_max_length: float | None = None,
) -> None:
    r"""Register advantage estimators and policy losses in verl.

    ===================  ========================================  =========================
    name                 advantages of an answer                   loss of a token
    ===================  ========================================  =========================
    ``steelyard_gbpo``   group-relative, and the GBPO target       ``|z| |rho - rho*|``
    ``steelyard_bpo``    reward minus the group mean               ``|A| |rho - rho*(A)|``
    ``steelyard_canon``  CANON's by length                         PPO's clip
    ``steelyard_adora``  group-relative times ADORA's weight       PPO's clip
    ===================  ========================================  =========================

    ``steelyard_bpo`` takes the advantages of any estimator, verl's ``gae`` too, for ``R - V``: the
    value in the place of the threshold. The loss ``steelyard_gbpo`` belongs to the estimator of
    that name. Divide by the deviation or not: ``algorithm.norm_adv_by_std_in_grpo``, which
    ``steelyard_adora`` follows.

    Every process of verl must call it: name a module that does in ``VERL_USE_EXTERNAL_MODULES``.
    Calling it again replaces the settings.

    Args:
        gbpo_temperature: softness of GBPO's target in standard deviations, positive.
        bpo_temperature: softness of BPO's target in units of the advantage, >= 0.
        canon_mu: weight of the comparison with the other half, in [0, 1].
        canon_alpha: weight of the long half in it, in (0, 1]; ``None`` = 1.
        adora_mode: damp prompts that are not useful, or boost those that are.
        adora_weight: by how much, >= 0; ``None`` = 0.1 and 2.
        adora_success_threshold: a reward above it is a success.
        adora_max_length: length from which a failure counts as truncated; ``None`` = never.

    Raises:
        ModuleNotFoundError: verl is not installed.
        ValueError: a setting is out of range.

    Example:
        A module ``objectives.py`` on the path of every worker::

            from steelyard.integrations import verl

            verl.register(canon_mu=0.8)

        and ``VERL_USE_EXTERNAL_MODULES=objectives`` in its environment.

    Source: Ao et al. (2026), arXiv:2604.18578; Chen et al. (2025), arXiv:2509.23962; Ren et al.
    (2026), arXiv:2602.10019.
    """
    check_range("gbpo_temperature", gbpo_temperature, above=0.0)
    check_range("bpo_temperature", bpo_temperature, at_least=0.0)
    check_range("canon_mu", canon_mu, at_least=0.0, at_most=1.0)
    if canon_alpha is not None:
        check_range("canon_alpha", canon_alpha, above=0.0, at_most=1.0)
    check_choice("adora_mode", adora_mode, ("attenuate", "amplify"))
    if adora_weight is not None:
        check_range("adora_weight", adora_weight, at_least=0.0)
    core = require("verl.trainer.ppo.core_algos", extra="verl")
    scores: dict[str, Callable[..., Tensor]] = {
        "steelyard_gbpo": functools.partial(_gbpo_scores, temperature=gbpo_temperature),
        "steelyard_bpo": _bpo_scores,
        "steelyard_canon": functools.partial(_canon_scores, mu=canon_mu, alpha=canon_alpha),
        "steelyard_adora": functools.partial(
            _adora_scores,
            mode=adora_mode,
            weight=adora_weight,
            success_threshold=adora_success_threshold,
            max_length=adora_max_length,
        ),
    }
    losses: dict[str, _BandLoss] = {
        "steelyard_gbpo": _gbpo_tokens,
        "steelyard_bpo": functools.partial(_bpo_tokens, temperature=bpo_temperature),
        "steelyard_canon": _clipped_tokens,
        "steelyard_adora": _clipped_tokens,
    }
    for name, score in scores.items():
        core.ADV_ESTIMATOR_REGISTRY.pop(name, None)  # verl refuses another of the same name
        core.register_adv_est(name)(_advantage_estimator(score))
    for name, tokens in losses.items():
        core.register_policy_loss(name)(_policy_loss(tokens, core.agg_loss))


def _advantage_estimator(score: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Give a function of rewards, lengths and groups the signature of verl's estimators."""

    def estimator(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        index: Sequence[Any] | None = None,
        config: Any = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        rewards = _rewards(token_level_rewards, response_mask)
        groups = _groups(index, rewards)
        lengths = (response_mask != 0).sum(-1)
        by_deviation = True if config is None else config.norm_adv_by_std_in_grpo
        scale: Literal["group", "none"] = "group" if by_deviation else "none"
        scored = score(rewards, groups, lengths, scale)
        advantages = scored[:, None] * (response_mask != 0)
        return advantages, advantages

    return estimator


def _rewards(token_level_rewards: Tensor, response_mask: Tensor) -> Tensor:
    check_floating(token_level_rewards=token_level_rewards)
    check_shape("token_level_rewards", token_level_rewards, (None, None))
    check_not_empty("token_level_rewards", token_level_rewards)
    check_mask(response_mask, token_level_rewards, name="response_mask")
    rewards = token_level_rewards.sum(-1)
    if not bool(rewards.isfinite().all()):
        where = int((~rewards.isfinite()).nonzero()[0, 0])
        raise ValueError(
            f"token_level_rewards must be finite, got a sum of {float(rewards[where])} for answer "
            f"{where}"
        )
    return rewards


def _groups(index: Sequence[Any] | None, rewards: Tensor) -> Tensor:
    """Integer ids of verl's group labels, which may be strings."""
    if index is None:
        raise ValueError("index must be given: the group of each answer (uid in verl's batch)")
    labels = np.asarray(index)
    if labels.shape != (len(rewards),):
        raise ValueError(
            f"index must have one group label for each of the {len(rewards)} answers, got shape "
            f"{list(labels.shape)}"
        )
    ids = np.unique(labels.astype(str), return_inverse=True)[1]
    return torch.as_tensor(ids, dtype=torch.long, device=rewards.device)


def _gbpo_scores(
    rewards: Tensor, groups: Tensor, lengths: Tensor, scale: str, *, temperature: float
) -> Tensor:
    # With a band from 0 to 2 the target is twice its place in the band.
    signals = gbpo_signals(
        rewards.double(), groups, temperature=temperature, epsilon_low=1.0, epsilon_high=1.0
    )
    return _pack(signals.advantages, signals.target_ratio / 2)


def _bpo_scores(rewards: Tensor, groups: Tensor, lengths: Tensor, scale: str) -> Tensor:
    return group_relative_advantages(rewards, groups, scale="none")


def _canon_scores(
    rewards: Tensor,
    groups: Tensor,
    lengths: Tensor,
    scale: str,
    *,
    mu: float,
    alpha: float | None,
) -> Tensor:
    return canon_advantages(rewards, lengths, groups, mu=mu, alpha=alpha)


def _adora_scores(
    rewards: Tensor,
    groups: Tensor,
    lengths: Tensor,
    scale: Literal["group", "none"],
    *,
    mode: Literal["attenuate", "amplify"],
    weight: float | None,
    success_threshold: float,
    max_length: float | None,
) -> Tensor:
    weights = adora_weights(
        rewards,
        lengths,
        groups,
        mode=mode,
        weight=weight,
        success_threshold=success_threshold,
        max_length=max_length,
    ).weights
    return group_relative_advantages(rewards, groups, scale=scale) * weights


def _pack(advantages: Tensor, share: Tensor) -> Tensor:
    """Write a share in [0, 1] into the digits of an advantage below ``_UNIT``, in float64."""
    whole = (advantages.double() / _UNIT).round()
    return (whole + 0.25 + share.double() / 2) * _UNIT


def _unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Read an advantage and a share back, both to about a millionth."""
    scaled = packed / _UNIT
    whole = scaled.floor()
    return whole * _UNIT, (scaled - whole - 0.25) * 2


def _policy_loss(
    tokens: _BandLoss, agg_loss: Callable[..., Tensor]
) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """Give a loss of tokens the signature of verl's policy losses."""

    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        if config is None:
            raise ValueError("config must be given: verl's actor configuration, for the clip ratio")
        low, high = (
            config.clip_ratio if width is None else width
            for width in (config.clip_ratio_low, config.clip_ratio_high)
        )
        log_ratio = log_prob - old_log_prob
        values = tokens(log_ratio, advantages, low, high, response_mask)
        if rollout_is_weights is not None:
            values = values * rollout_is_weights
        loss = agg_loss(
            loss_mat=values,
            loss_mask=response_mask,
            loss_agg_mode=loss_agg_mode,
            **config.global_batch_info,
        )
        return loss, _metrics(log_ratio.detach(), low, high, response_mask)

    return policy_loss


def _metrics(log_ratio: Tensor, low: float, high: float, mask: Tensor) -> dict[str, Any]:
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    outside = (ratio < 1 - low) | (ratio > 1 + high)
    return {
        "actor/pg_clipfrac": reduce_masked(outside.float(), mask, "mean").item(),
        "actor/ppo_kl": reduce_masked(-log_ratio, mask, "mean").item(),
    }


def _gbpo_tokens(
    log_ratio: Tensor, advantages: Tensor, low: float, high: float, mask: Tensor
) -> Tensor:
    if advantages.dtype != torch.float64:
        raise TypeError(
            "advantages must be those of the estimator steelyard_gbpo, in float64, got "
            f"{advantages.dtype}"
        )
    advantage, share = _unpack(advantages)
    target = (1 - low + (low + high) * share).to(log_ratio.dtype)
    weight = advantage.abs().to(log_ratio.dtype)
    return bpo_loss(log_ratio, target, weight, mask=mask, reduction="none")


def _bpo_tokens(
    log_ratio: Tensor,
    advantages: Tensor,
    low: float,
    high: float,
    mask: Tensor,
    *,
    temperature: float,
) -> Tensor:
    target = bpo_target_ratio(
        advantages,
        torch.zeros_like(advantages),
        epsilon=low,
        epsilon_high=high,
        temperature=temperature,
    )
    return bpo_loss(log_ratio, target, advantages.abs(), mask=mask, reduction="none")


def _clipped_tokens(
    log_ratio: Tensor, advantages: Tensor, low: float, high: float, mask: Tensor
) -> Tensor:
    return ppo_loss(
        log_ratio, advantages, epsilon=low, epsilon_high=high, mask=mask, reduction="none"
    )
