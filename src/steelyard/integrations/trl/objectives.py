r"""Objectives for :class:`steelyard.integrations.trl.GRPOTrainer`, ready to be passed to it.

Each function returns the keyword arguments of the trainer that make up a method::

    trainer = GRPOTrainer(model, reward, args, dataset, **objectives.gbpo(temperature=1e-4))

They are short combinations of functions of :mod:`steelyard.policy`; write your own the same way.
Nothing of TRL is imported here.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor

from steelyard._reduce import Aggregate
from steelyard.policy import (
    adora_weights,
    canon_advantages,
    gbpo_loss,
    gbpo_signals,
    group_relative_advantages,
    grpo_loss,
)

__all__ = [
    "AdvantageFunction",
    "BatchWeight",
    "BoundedSignals",
    "Objective",
    "PolicyLoss",
    "WeighedSignals",
    "adora",
    "canon",
    "dr_grpo",
    "gbpo",
    "grpo",
]

BatchWeight = Literal["equal", "tokens"]
"""What a micro-batch counts in the mean over micro-batches and ranks."""


class AdvantageFunction(Protocol):
    """``advantages(rewards, groups, **named) -> [N]`` or a named tuple of ``[N]``.

    Called by the names of its parameters, once for each batch of completions, on the completions
    of all ranks together. It is given what it names:

    ``rewards``
        weighted sum of the reward functions, ``[N]``.
    ``groups``
        integer id of the prompt, ``[N]``.
    ``lengths``
        tokens of each completion that the model wrote, ``[N]`` integers.
    ``entropy``
        mean entropy in nats of the sampling policy over these tokens, ``[N]``; costs a forward
        pass.
    ``rewards_per_function``
        ``[N, F]``, NaN where a function returned ``None``.
    ``columns``
        dictionary of the data set's columns, each a list of ``N``.
    ``step``, ``total_steps``
        optimiser steps done and to be done.
    ``max_completion_length``
        the trainer's setting.

    Completions for which every reward function returned ``None`` are left out: ``N`` is then
    smaller, groups are ragged, and their advantage is 0.

    A named tuple must have a field ``advantages``; its other fields travel with the completions to
    the policy loss, and their means are logged as ``signals/NAME``.
    """

    def __call__(self, rewards: Tensor, groups: Tensor, **named: Any) -> Any:
        """Return the advantages."""


class PolicyLoss(Protocol):
    """``policy_loss(log_ratio, mask, **named) -> 0-d``, the mean loss of a micro-batch.

    Called by the names of its parameters, on the completions of one rank. It is given what it
    names:

    ``log_ratio``
        ``[B, T]``, differentiable; masked places hold anything.
    ``mask``
        ``[B, T]``, true = a token of the completion.
    ``advantages`` and the other fields that the advantage function returned
        each ``[B]``.
    ``logprobs``, ``token_entropy``
        ``[B, T]``; log-probabilities are differentiable, entropies are so if TRL's entropy bonus
        is on.
    ``max_completion_length``
        the trainer's setting.
    """

    def __call__(self, log_ratio: Tensor, mask: Tensor, **named: Any) -> Tensor:
        """Return the loss."""


class Objective(TypedDict):
    """Keyword arguments of the trainer."""

    advantages: Callable[..., Any]
    policy_loss: Callable[..., Tensor]
    batch_weight: BatchWeight


class BoundedSignals(NamedTuple):
    """What GBPO's advantage function returns, each ``[N]``."""

    advantages: Tensor
    target_ratio: Tensor
    weight: Tensor


class WeighedSignals(NamedTuple):
    """What ADORA's advantage function returns, each ``[N]``."""

    advantages: Tensor
    prompt_weight: Tensor


def grpo(
    *,
    scale: Literal["group", "batch", "none"] = "group",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    aggregate: Aggregate = "token",
) -> Objective:
    r"""Group-relative advantages under PPO's clip.

    Args:
        scale: what advantages are divided by, see
            :func:`steelyard.policy.group_relative_advantages`.
        epsilon: lower half-width of the clip.
        epsilon_high: upper half-width; ``None`` = ``epsilon``.
        aggregate: ``"sequence"`` (the paper's) gives TRL's loss type "grpo", ``"token"`` its
            "dapo". TRL adds 1e-4 to the deviation, we 1e-6.

    Returns:
        Keyword arguments of the trainer.

    Example:
        >>> objective = grpo()
        >>> rewards, groups = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1])
        >>> objective["advantages"](rewards=rewards, groups=groups)
        tensor([ 0.7071, -0.7071,  0.0000,  0.0000])

    Source: Shao et al. (2024), arXiv:2402.03300; Yu et al. (2025), DAPO, arXiv:2503.14476.
    """
    loss = functools.partial(
        grpo_loss, epsilon=epsilon, epsilon_high=epsilon_high, aggregate=aggregate
    )
    return Objective(
        advantages=functools.partial(group_relative_advantages, scale=scale),
        policy_loss=loss,
        batch_weight=_weight_of(aggregate),
    )


def dr_grpo(*, epsilon: float = 0.2, epsilon_high: float | None = None) -> Objective:
    r"""GRPO without its two normalisations: no division by the deviation, none by the length.

    .. math::
        L = \frac{1}{B\,T_{\max}} \sum_{i,t} \ell_{it}, \qquad A_i = r_i - \bar r_{g(i)}

    Args:
        epsilon: lower half-width of the clip.
        epsilon_high: upper half-width; ``None`` = ``epsilon``.

    Returns:
        Keyword arguments of the trainer, whose ``max_completion_length`` is :math:`T_{\max}`.

    Example:
        Twice the tokens count twice:

        >>> loss = dr_grpo()["policy_loss"]
        >>> mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
        >>> loss(log_ratio=torch.zeros(2, 4), mask=mask, advantages=torch.tensor([1.0, -1.0]),
        ...      max_completion_length=4)
        tensor(0.2500)

    Source: Liu et al. (2025), arXiv:2503.20783.
    """
    return Objective(
        advantages=functools.partial(group_relative_advantages, scale="none"),
        policy_loss=functools.partial(
            _sum_over_longest, epsilon=epsilon, epsilon_high=epsilon_high
        ),
        batch_weight="equal",
    )


def gbpo(
    *,
    temperature: float = 1e-4,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    ties: Literal["half", "exact"] = "half",
    aggregate: Aggregate = "token",
) -> Objective:
    r"""Fit ratios to the targets of the bounded-ratio optimum of each group.

    .. math:: L = \mathrm{agg}_{i,t}\ |z_i|\, |\rho_{it} - \hat\rho^*_i|

    Args:
        temperature: softness of the target, in standard deviations, positive.
        epsilon_low: lower half-width of the band, in (0, 1].
        epsilon_high: upper half-width, positive.
        ties: see :func:`steelyard.policy.gbpo_signals`.
        aggregate: of the tokens, see :func:`steelyard.policy.gbpo_loss`.

    Returns:
        Keyword arguments of the trainer.

    Example:
        >>> rewards, group = torch.tensor([1.0, 0.0, 0.0]), torch.zeros(3, dtype=torch.long)
        >>> gbpo()["advantages"](rewards=rewards, groups=group).target_ratio
        tensor([1.2000, 1.0000, 1.0000])

    Source: Ao et al. (2026), GBPO, arXiv:2604.18578.
    """

    def advantages(rewards: Tensor, groups: Tensor) -> BoundedSignals:
        signals = gbpo_signals(
            rewards,
            groups,
            temperature=temperature,
            epsilon_low=epsilon_low,
            epsilon_high=epsilon_high,
            ties=ties,
        )
        return BoundedSignals(*signals, signals.advantages.abs())

    return Objective(
        advantages=advantages,
        policy_loss=functools.partial(gbpo_loss, aggregate=aggregate),
        batch_weight=_weight_of(aggregate),
    )


def canon(
    *,
    metric: str = "length",
    mu: float | Callable[[int, int], float] = 0.5,
    alpha: float | None = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = 0.28,
) -> Objective:
    r"""Compare each completion with the half of its group that a metric puts it in, and the other.

    Args:
        metric: ``"length"``, ``"entropy"`` (costs a forward pass), or a column of numbers of the
            data set; a column is constant within a group unless a ``rollout_func`` fills it.
        mu: weight of the comparison with the other half, in [0, 1]; or a function of the steps
            done and to be done, such as
            ``functools.partial(canon_mu_schedule, warmup=30, cycles=3)``.
        alpha: weight of the high half in that comparison, in (0, 1]; ``None`` = 1.
        epsilon: lower half-width of the clip.
        epsilon_high: upper half-width; ``None`` = ``epsilon``.

    Returns:
        Keyword arguments of the trainer. The loss is that of :func:`dr_grpo`.

    Example:
        >>> group, lengths = torch.zeros(4, dtype=torch.long), torch.tensor([9, 8, 2, 1])
        >>> canon(mu=1.0)["advantages"](rewards=torch.tensor([1.0, 1.0, 0.0, 0.0]), groups=group,
        ...     lengths=lengths, step=0, total_steps=1)
        tensor([ 1.,  1., -1., -1.])

    Source: Chen et al. (2025), arXiv:2509.23962.
    """

    def compare(
        rewards: Tensor, groups: Tensor, values: Tensor, step: int, total_steps: int
    ) -> Tensor:
        weight = mu(step, total_steps) if callable(mu) else mu
        return canon_advantages(rewards, values, groups, mu=weight, alpha=alpha)

    def by_length(
        rewards: Tensor, groups: Tensor, *, lengths: Tensor, step: int, total_steps: int
    ) -> Tensor:
        return compare(rewards, groups, lengths, step, total_steps)

    def by_entropy(
        rewards: Tensor, groups: Tensor, *, entropy: Tensor, step: int, total_steps: int
    ) -> Tensor:
        return compare(rewards, groups, entropy, step, total_steps)

    def by_column(
        rewards: Tensor,
        groups: Tensor,
        *,
        columns: Mapping[str, Sequence[float]],
        step: int,
        total_steps: int,
    ) -> Tensor:
        if metric not in columns:
            raise ValueError(
                f"metric must be 'length', 'entropy' or a column, got {metric!r}; the columns are "
                f"{sorted(columns)}"
            )
        values = torch.tensor(columns[metric], dtype=torch.float64, device=rewards.device)
        return compare(rewards, groups, values, step, total_steps)

    chosen: dict[str, Callable[..., Tensor]] = {"length": by_length, "entropy": by_entropy}
    return Objective(
        advantages=chosen.get(metric, by_column),
        policy_loss=functools.partial(
            _sum_over_longest, epsilon=epsilon, epsilon_high=epsilon_high
        ),
        batch_weight="equal",
    )


def adora(
    *,
    mode: Literal["attenuate", "amplify"] = "attenuate",
    weight: float | None = None,
    success_threshold: float = 0.5,
    tau: float = 0.5,
    variant: Literal["paper", "llm", "vlm"] = "paper",
    ignore_truncated: bool = True,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    aggregate: Aggregate = "token",
) -> Objective:
    r"""GRPO with each prompt's advantages times how useful its completions show it to be.

    Args:
        mode: damp prompts that are not useful, or boost those that are.
        weight: by how much; ``None`` = 0.1 and 2.
        success_threshold: a reward above it is a success.
        tau: largest success rate of a difficult prompt.
        variant: rule for prompts without successes or failures, see
            :func:`steelyard.policy.adora_weights`.
        ignore_truncated: a failure of ``max_completion_length`` tokens is not counted as one.
        epsilon: lower half-width of the clip.
        epsilon_high: upper half-width; ``None`` = ``epsilon``.
        aggregate: of the tokens, see :func:`steelyard.policy.grpo_loss`.

    Returns:
        Keyword arguments of the trainer, which logs ``signals/prompt_weight``.

    Example:
        The first prompt's success was longer than its failure, the second's shorter:

        >>> rewards, lengths = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([90, 50, 20, 50])
        >>> adora()["advantages"](rewards=rewards, groups=torch.tensor([0, 0, 1, 1]),
        ...     lengths=lengths, max_completion_length=100).advantages
        tensor([ 0.7071, -0.7071,  0.0707, -0.0707])

    Source: Ren et al. (2026), arXiv:2602.10019.
    """

    def advantages(
        rewards: Tensor, groups: Tensor, *, lengths: Tensor, max_completion_length: int
    ) -> WeighedSignals:
        weights = adora_weights(
            rewards,
            lengths,
            groups,
            mode=mode,
            weight=weight,
            success_threshold=success_threshold,
            tau=tau,
            variant=variant,
            max_length=max_completion_length if ignore_truncated else None,
        ).weights
        return WeighedSignals(group_relative_advantages(rewards, groups) * weights, weights)

    return Objective(
        advantages=advantages,
        policy_loss=functools.partial(
            grpo_loss, epsilon=epsilon, epsilon_high=epsilon_high, aggregate=aggregate
        ),
        batch_weight=_weight_of(aggregate),
    )


def _sum_over_longest(
    log_ratio: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor,
    max_completion_length: int,
    epsilon: float,
    epsilon_high: float | None,
) -> Tensor:
    """Token sums of :func:`grpo_loss` over the longest that a completion may be."""
    total = grpo_loss(
        log_ratio,
        advantages,
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        mask=mask,
        aggregate="sequence_sum",
    )
    return total / max_completion_length


def _weight_of(aggregate: Aggregate) -> BatchWeight:
    return "tokens" if aggregate == "token" else "equal"
