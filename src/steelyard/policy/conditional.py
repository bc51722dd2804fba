r"""Advantages that look at a property of the answers beside their reward: CANON and ADORA.

CANON splits the answers to a prompt in two halves by a metric (entropy, length) and compares each
answer with the mean reward of the other half (inter) or of its own (intra). ADORA multiplies the
advantages of a whole prompt by a weight that says how useful the prompt is now.

Both are vectorised over groups of any size; nothing carries a gradient. A group must be whole on
one rank, or gathered, before these functions see it.

Sources: Chen et al. (2025), Conditional Advantage Estimation for Reinforcement Learning in Large
Reasoning Models, arXiv:2509.23962; Ren et al. (2026), ADORA, arXiv:2602.10019.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from steelyard._checks import (
    check_choice,
    check_floating,
    check_groups,
    check_not_empty,
    check_not_nan,
    check_range,
    check_same_shape,
    check_shape,
    check_tensor,
)
from steelyard._reduce import accumulation_dtype
from steelyard.policy._groups import group_index, group_rank, group_sum

__all__ = [
    "AdoraWeights",
    "adora_weights",
    "canon_advantages",
    "canon_mu_schedule",
    "canon_split",
]


class AdoraWeights(NamedTuple):
    """What :func:`adora_weights` returns, each ``[N]`` and constant within a group."""

    weights: Tensor
    length_advantage: Tensor
    difficulty_advantage: Tensor


def canon_split(metric: Tensor, groups: Tensor) -> Tensor:
    """Tell which answers belong to the high-metric half of their group.

    The ``floor(G/2)`` smallest of each group are the low half; ties keep the order of the input.

    Args:
        metric: ``[N]``, for example mean token entropy or length, without NaN; detached.
        groups: integer group id of each answer, ``[N]``.

    Returns:
        Boolean ``[N]``. The answer of a group of one is high.

    Raises:
        ValueError: wrong shapes, empty input, or a NaN in ``metric``, which has no place.
        TypeError: ``groups`` is not integer, or ``metric`` complex.

    Example:
        >>> import torch
        >>> canon_split(torch.tensor([30.0, 10.0, 20.0, 7.0]), torch.tensor([0, 0, 0, 5]))
        tensor([ True, False,  True,  True])

    Source: Chen et al. (2025), Sec. 3, arXiv:2509.23962.
    """
    check_shape("metric", metric, (None,))
    check_not_empty("metric", metric)
    if metric.is_complex():
        raise TypeError(f"metric must be of real numbers, got {metric.dtype}")
    check_groups(groups, metric)
    index, count = group_index(groups)  # waits for the device, so the next line may too
    if bool(metric.isnan().any()):
        raise ValueError(f"metric must hold no NaN, got {int(metric.isnan().sum())}")
    return group_rank(metric.detach(), index, count) >= (count // 2)[index]


def canon_advantages(
    rewards: Tensor,
    metric: Tensor,
    groups: Tensor,
    *,
    mu: float = 0.5,
    alpha: float | None = None,
) -> Tensor:
    r"""Compare each answer with the other half of its group and with its own half.

    With :math:`M^\pm` the mean reward of the high and the low half,

    .. math::
        A^{\mathrm{inter}} = \begin{cases} \alpha R - M^- & \text{high} \\
            R - \alpha M^+ & \text{low} \end{cases}, \qquad
        A^{\mathrm{intra}} = \begin{cases} R - M^+ & \text{high} \\ R - M^- & \text{low}
            \end{cases}, \qquad
        A = \mu A^{\mathrm{inter}} + (1 - \mu) A^{\mathrm{intra}}

    At ``mu = 1/2``, ``alpha = None`` and halves of equal size this is the reward minus the group
    mean, whatever the metric. To weight the low half instead, pass ``-metric``.

    Args:
        rewards: ``[N]``; detached.
        metric: ``[N]``, what the halves are made by; detached.
        groups: integer group id of each answer, ``[N]``.
        mu: weight of the inter term, in [0, 1].
        alpha: weight of the high half in the inter term, in (0, 1]; ``None`` = 1. Below 1 an answer
            of the high half is worth less, so shorter answers win if the metric is length.

    Returns:
        ``[N]``, dtype of ``rewards``. A group of one has nothing to compare with and gets 0.

    Raises:
        ValueError: wrong shapes, empty input, a NaN in ``metric``, or ``mu`` or ``alpha`` out of
            range.
        TypeError: ``rewards`` not floating point or ``groups`` not integer.

    Example:
        Two right answers, both long: inter rewards the long half, intra sees no difference in it:

        >>> import torch
        >>> rewards, length = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([9.0, 8, 2, 1])
        >>> group = torch.zeros(4, dtype=torch.long)
        >>> canon_advantages(rewards, length, group, mu=1.0)
        tensor([ 1.,  1., -1., -1.])
        >>> canon_advantages(rewards, length, group, mu=0.0)
        tensor([0., 0., 0., 0.])

    Source: Chen et al. (2025), Eq. 3 to 9, arXiv:2509.23962.
    """
    check_floating(rewards=rewards)
    check_shape("rewards", rewards, (None,))
    check_same_shape(rewards=rewards, metric=metric)
    check_range("mu", mu, at_least=0.0, at_most=1.0)
    scale = 1.0 if alpha is None else alpha
    check_range("alpha", scale, above=0.0, at_most=1.0)
    high = canon_split(metric, groups)
    index, count = group_index(groups)
    reward = rewards.detach().to(accumulation_dtype(rewards.dtype))
    high_mean = _mean_where(reward, high, index, count)
    low_mean = _mean_where(reward, ~high, index, count)
    inter = torch.where(high, scale * reward - low_mean, reward - scale * high_mean)
    intra = reward - torch.where(high, high_mean, low_mean)
    mixed = mu * inter + (1 - mu) * intra
    return mixed.masked_fill((count == 1)[index], 0.0).to(rewards.dtype)


def _mean_where(values: Tensor, kept: Tensor, index: Tensor, count: Tensor) -> Tensor:
    """Mean over the kept items of each item's group, ``[N]``; 0 where a group keeps none."""
    total = group_sum(values.where(kept, 0.0), index, count)
    return (total / group_sum(kept.to(values.dtype), index, count).clamp(min=1))[index]


def canon_mu_schedule(
    step: int,
    total: int,
    *,
    warmup: int,
    cycles: int,
    first: Literal["intra", "inter"] = "intra",
) -> float:
    r"""Weight of the inter term over training: warm-up, then a cosine with restarts.

    .. math::
        f(\text{step}) = \begin{cases}
            \max \cdot (\text{step} + 1) / \text{warmup} & \text{step} < \text{warmup} \\
            \min + \tfrac12 (\max - \min)(1 + \cos(\pi k / c)) & \text{else}\end{cases}

    with ``c = (total - warmup) / cycles`` and ``k = (step - warmup) mod c``. First inter, later
    intra: ``mu = f`` with max 1, min 0.4. First intra, later inter: ``mu = 1 - f`` with max 0.6,
    min 0.

    Args:
        step: from 0.
        total: steps of the schedule, > ``warmup``; it goes on repeating after.
        warmup: steps of linear rise, >= 0.
        cycles: number of cosines after the warm-up, >= 1.
        first: which comparison dominates at the start of a cycle.

    Returns:
        ``mu`` in [0, 1].

    Raises:
        ValueError: a setting out of range.

    Example:
        >>> [round(canon_mu_schedule(s, 150, warmup=30, cycles=3), 3) for s in (0, 29, 50, 69)]
        [0.98, 0.4, 0.7, 0.999]

    Source: Chen et al. (2025), CANON-Dynamic, arXiv:2509.23962.
    """
    check_range("step", step, at_least=0)
    check_range("warmup", warmup, at_least=0)
    check_range("total", total, above=warmup)
    check_range("cycles", cycles, at_least=1)
    check_choice("first", first, ("intra", "inter"))
    high, low = (0.6, 0.0) if first == "intra" else (1.0, 0.4)
    if step < warmup:
        value = high * (step + 1) / warmup
    else:
        length = (total - warmup) / cycles
        phase = ((step - warmup) % length) / length
        value = low + 0.5 * (high - low) * (1 + math.cos(math.pi * phase))
    return 1 - value if first == "intra" else value


def adora_weights(
    rewards: Tensor,
    lengths: Tensor,
    groups: Tensor,
    *,
    mode: Literal["attenuate", "amplify"] = "attenuate",
    success_threshold: float = 0.5,
    tau: float = 0.5,
    max_length: float | None = None,
    weight: float | None = None,
    variant: Literal["paper", "llm", "vlm"] = "paper",
) -> AdoraWeights:
    r"""Weight a prompt by how useful its rollouts show it to be.

    A prompt has the *length advantage* if its longest success is longer than its mean failure, and
    the *difficulty advantage* if at most ``tau`` of its rollouts succeed:

    .. math::
        \max_{i: R_i > \theta} L_i > \mathrm{mean}_{i: R_i \le \theta,\ L_i < L_{\max}} L_i,
        \qquad |\{R_i > \theta\}| / G \le \tau

    ``"attenuate"`` multiplies prompts *without* the length advantage by ``weight``; ``"amplify"``
    multiplies those with both. Failures cut off at ``max_length`` do not count as failures.

    ========================= ======================= ================ ================
    group                     ``paper`` (default)     ``llm``          ``vlm``
    ========================= ======================= ================ ================
    no success                weight 1                no length adv.   weight 1
    no counted failure        length advantage        length advantage no length adv.
    ========================= ======================= ================ ================

    The last two columns are what the released text and vision code do.

    Args:
        rewards: ``[N]``; detached.
        lengths: ``[N]``, tokens of each rollout, integer or floating point.
        groups: integer group id (prompt) of each rollout, ``[N]``.
        mode: ``"attenuate"`` (vision) or ``"amplify"`` (text).
        success_threshold: a reward above it is a success.
        tau: largest success rate of a difficult prompt.
        max_length: length at or above which a failure counts as truncated; ``None`` = never.
        weight: >= 0; ``None`` = 0.1 to attenuate, 2 to amplify.
        variant: rule for groups without successes or failures.

    Returns:
        ``weights`` in the dtype of ``rewards``, to be multiplied into the advantages, NaN where a
        group holds a NaN;
        ``length_advantage`` (false where a group has no success) and ``difficulty_advantage``,
        boolean.

    Raises:
        ValueError: wrong shapes, empty input, or a setting out of range.
        TypeError: ``rewards`` not floating point, ``groups`` not integer, or a setting no number.

    Example:
        The first prompt's success was longer than its failures, the second's shorter:

        >>> import torch
        >>> rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
        >>> lengths = torch.tensor([90, 50, 20, 50])
        >>> adora_weights(rewards, lengths, torch.tensor([0, 0, 1, 1])).weights
        tensor([1.0000, 1.0000, 0.1000, 0.1000])

    Source: Ren et al. (2026), Eq. 4 to 6, arXiv:2602.10019; both criteria together for
    ``"amplify"`` and the ``paper`` column of the table are our reading, see docs/errata.
    """
    check_floating(rewards=rewards)
    check_shape("rewards", rewards, (None,))
    check_not_empty("rewards", rewards)
    check_tensor("lengths", lengths)
    check_same_shape(rewards=rewards, lengths=lengths)
    check_groups(groups, rewards)
    check_choice("mode", mode, ("attenuate", "amplify"))
    check_choice("variant", variant, ("paper", "llm", "vlm"))
    factor = (0.1 if mode == "attenuate" else 2.0) if weight is None else weight
    check_range("weight", factor, at_least=0.0)
    check_not_nan("success_threshold", success_threshold)
    check_not_nan("tau", tau)
    if max_length is not None:
        check_not_nan("max_length", max_length)
    index, count = group_index(groups)
    length = lengths.detach().double()
    success = rewards.detach() > success_threshold
    failure = ~success if max_length is None else ~success & (length < max_length)
    successes = group_sum(success.double(), index, count)
    failures = group_sum(failure.double(), index, count)
    longest = length.new_full(count.shape, -math.inf)
    longest = longest.scatter_reduce(0, index, length.where(success, -math.inf), "amax")
    mean_failure = group_sum(length.where(failure, 0.0), index, count) / failures
    without = math.inf if variant == "vlm" else -math.inf
    longer = longest > mean_failure.where(failures > 0, without)
    difficult = successes / count <= tau
    useful = longer if mode == "attenuate" else longer & difficult
    multiply = ~useful if mode == "attenuate" else useful
    if variant != "llm":
        multiply = multiply & (successes > 0)
    weights = rewards.new_ones(count.shape).masked_fill(multiply, factor)
    nan = rewards.detach().isnan() | length.isnan()
    weights = weights.masked_fill(group_sum(nan.double(), index, count) > 0, math.nan)
    return AdoraWeights(weights[index], longer[index], difficult[index])
