r"""Does a policy give the preferred answer the higher probability, and could it?

*Ranking accuracy* compares the log-probabilities of the two answers. It is not the reward accuracy
that trainers log, which compares them after those of the reference are taken off. The *idealized*
accuracy is what a perfect optimum of DPO or RLHF would reach from this reference; the *flip
threshold* is the DPO loss at which one pair starts to be ranked right.

Log-probabilities are sums over the answer's tokens, prompt masked, both answers with or both
without their end token. Score in float32: near-ties flip with precision.

Source: Chen, Malladi, Zhang, Chen, Zhang, Ranganath, Cho (2024), Preference Learning Algorithms Do
Not Learn Preference Rankings, arXiv:2405.19534.
"""

import math

import torch
from torch import Tensor

from steelyard._checks import (
    check_floating,
    check_mask,
    check_not_empty,
    check_range,
    check_same_shape,
    check_shape,
    check_tensor,
)
from steelyard._reduce import Reduction, fill_masked, reduce_masked, widen
from steelyard.preference._pairs import check_pairs, share_right, stable_softplus

__all__ = [
    "dpo_gamma_loss",
    "full_ranking_accuracy",
    "ranking_accuracy",
    "reward_accuracy",
    "tie_aware_ranking_accuracy",
]


def ranking_accuracy(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    *,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Share of pairs whose preferred answer is at least as probable as the rejected one.

    .. math::
        R = \mathrm{mean}\ 1[\log \pi(y_w) \ge \log \pi(y_l)], \qquad
        \tilde R = \mathrm{mean}\ 1\!\left[\frac{\log \pi(y_w)}{|y_w|} \ge
            \frac{\log \pi(y_l)}{|y_l|}\right]

    With lengths it is :math:`\tilde R`. Longer preferred answers make :math:`R` look bad, so report
    both. The reference plays no part in either.

    Args:
        chosen_logprobs: ``log pi(y_w | x)``, summed over tokens, ``[N]``.
        rejected_logprobs: ``log pi(y_l | x)``, ``[N]``.
        chosen_lengths: tokens of ``y_w``, ``[N]``, >= 1; with ``rejected_lengths`` or not at all.
        rejected_lengths: tokens of ``y_l``, ``[N]``, >= 1.
        mask: ``[N]``, true = counts.
        reduction: ``"mean"`` (default) over kept pairs, ``"sum"``, or ``"none"`` for 1 and 0.

    Returns:
        0-d, or ``[N]`` for ``"none"``; dtype of ``chosen_logprobs``, no gradient. A NaN makes its
        pair NaN.

    Raises:
        TypeError: a log-probability is not floating point, or lengths are complex.
        ValueError: shapes differ, empty input, or the lengths of one side only.

    Example:
        The long answer is less probable, but not token by token:

        >>> chosen, rejected = torch.tensor([-12.0, -3.0]), torch.tensor([-8.0, -5.0])
        >>> ranking_accuracy(chosen, rejected)
        tensor(0.5000)
        >>> long, short = torch.tensor([6, 2]), torch.tensor([2, 2])
        >>> ranking_accuracy(chosen, rejected, chosen_lengths=long, rejected_lengths=short)
        tensor(1.)

    Source: Chen et al. (2024), Def. 2.3 and Eq. 15, arXiv:2405.19534.
    """
    check_pairs(chosen_logprobs=chosen_logprobs, rejected_logprobs=rejected_logprobs)
    chosen, rejected = chosen_logprobs, rejected_logprobs
    if (chosen_lengths is None) != (rejected_lengths is None):
        missing = "chosen_lengths" if chosen_lengths is None else "rejected_lengths"
        raise ValueError(f"{missing} must be given with the other lengths, got None")
    if chosen_lengths is not None and rejected_lengths is not None:
        check_same_shape(
            chosen_logprobs=chosen, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths
        )
        for name, lengths in (("chosen", chosen_lengths), ("rejected", rejected_lengths)):
            if lengths.is_complex():
                raise TypeError(f"{name}_lengths must have a real dtype, got {lengths.dtype}")
        chosen, rejected = widen(chosen) / chosen_lengths, widen(rejected) / rejected_lengths
    return share_right(chosen >= rejected, (chosen, rejected), chosen_logprobs, mask, reduction)


def reward_accuracy(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Share of pairs whose implicit DPO reward is larger for the preferred answer.

    .. math:: \mathrm{mean}\ 1[h > 0], \qquad
        h = \log\frac{\pi(y_w)}{\pi(y_l)} - \log\frac{\pi_\mathrm{ref}(y_w)}{\pi_\mathrm{ref}(y_l)}

    This is ``rewards/accuracies`` of trainers. It can be 1 while no pair is ranked right: see
    :func:`ranking_accuracy`.

    Args:
        chosen_logprobs: ``log pi(y_w | x)``, ``[N]``.
        rejected_logprobs: ``log pi(y_l | x)``, ``[N]``.
        ref_chosen_logprobs: the same of the reference, ``[N]``.
        ref_rejected_logprobs: the same of the reference, ``[N]``.
        mask: ``[N]``, true = counts.
        reduction: ``"mean"`` (default), ``"sum"`` or ``"none"``.

    Returns:
        0-d, or ``[N]`` for ``"none"``; dtype of ``chosen_logprobs``, no gradient.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes differ or empty input.

    Example:
        Training moved the pair the right way, and left it ranked wrong:

        >>> policy, reference = (torch.tensor([-9.0]), torch.tensor([-5.0])), (
        ...     torch.tensor([-9.5]), torch.tensor([-4.5])
        ... )
        >>> reward_accuracy(*policy, *reference), ranking_accuracy(*policy)
        (tensor(1.), tensor(0.))

    Source: Chen et al. (2024), Remark 2.5, arXiv:2405.19534.
    """
    given = check_pairs(
        chosen_logprobs=chosen_logprobs,
        rejected_logprobs=rejected_logprobs,
        ref_chosen_logprobs=ref_chosen_logprobs,
        ref_rejected_logprobs=ref_rejected_logprobs,
    )
    chosen, rejected, ref_chosen, ref_rejected = (widen(x) for x in given)
    margin = (chosen - rejected) - (ref_chosen - ref_rejected)
    return share_right(margin > 0, (margin,), chosen_logprobs, mask, reduction)


def tie_aware_ranking_accuracy(
    alpha: Tensor,
    p1: Tensor,
    p2: Tensor,
    *,
    tie_eps: float = 0.01,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Ranking accuracy where raters may be split evenly: then the two must be nearly equal.

    .. math::
        1[\,|p_1 - p_2| < \epsilon\,] \ \text{ if } \alpha = \tfrac12, \qquad
        1[p_1 > p_2] \ \text{ if } \alpha > \tfrac12, \qquad
        1[p_1 < p_2] \ \text{ if } \alpha < \tfrac12

    The paper's ``p`` are probabilities of sequences. Those of long answers are all about 0, so all
    of them tie; pass length-normalised log-probabilities and a tolerance in nats per token instead.

    Args:
        alpha: share of raters that prefer the first answer, ``[N]``, in [0, 1].
        p1: probability, or score, of the first answer, ``[N]``.
        p2: of the second, ``[N]``.
        tie_eps: tolerance, > 0 (default 0.01, as published for probabilities).
        mask: ``[N]``, true = counts.
        reduction: ``"mean"`` (default), ``"sum"`` or ``"none"``.

    Returns:
        0-d, or ``[N]`` for ``"none"``; dtype of ``p1``, no gradient.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes differ, empty input, or ``tie_eps <= 0``.

    Example:
        Two answers of 100 tokens that a model separates clearly, though raters do not. On
        probabilities nothing can be seen:

        >>> log_p1, log_p2 = torch.tensor([-80.0]), torch.tensor([-120.0])
        >>> split = torch.tensor([0.5])
        >>> tie_aware_ranking_accuracy(split, log_p1.exp(), log_p2.exp())
        tensor(1.)
        >>> tie_aware_ranking_accuracy(split, log_p1 / 100, log_p2 / 100)
        tensor(0.)

    Source: Chen et al. (2024), Def. C.1, arXiv:2405.19534.
    """
    check_floating(alpha=alpha)
    check_pairs(p1=p1, p2=p2)
    check_same_shape(p1=p1, alpha=alpha)
    check_range("tie_eps", tie_eps, above=0.0)
    first, second = widen(p1), widen(p2)
    ordered = torch.where(alpha > 0.5, first > second, first < second)
    right = torch.where(alpha == 0.5, (first - second).abs() < tie_eps, ordered)
    return share_right(right, (alpha, p1, p2), p1, mask, reduction)


def full_ranking_accuracy(
    human_rank: Tensor,
    logprobs: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Share of prompts whose answers the policy orders exactly as the raters do.

    Right if :math:`\log \pi(y_i) \ge \log \pi(y_j)` for every pair with a better rank of ``i``. For
    two answers it is :func:`ranking_accuracy`. Answers of equal human rank may come in any order.

    Args:
        human_rank: ``[N, K]``, smaller = better; any real dtype.
        logprobs: ``log pi(y | x)``, or length-normalised, ``[N, K]``.
        mask: ``[N]``, true = counts.
        reduction: ``"mean"`` (default), ``"sum"`` or ``"none"``.

    Returns:
        0-d, or ``[N]`` for ``"none"``; dtype of ``logprobs``, no gradient.

    Raises:
        TypeError: ``logprobs`` not floating point.
        ValueError: shapes differ or empty input.

    Example:
        >>> human = torch.tensor([[1, 2, 3], [1, 2, 3]])
        >>> full_ranking_accuracy(human, torch.tensor([[-1.0, -4.0, -9.0], [-1.0, -9.0, -4.0]]))
        tensor(0.5000)

    Source: Chen et al. (2024), Def. A.8, arXiv:2405.19534.
    """
    check_floating(logprobs=logprobs)
    check_shape("logprobs", logprobs, (None, None))
    check_not_empty("logprobs", logprobs)
    check_tensor("human_rank", human_rank)
    if human_rank.is_complex():
        raise TypeError(f"human_rank must have a real dtype, got {human_rank.dtype}")
    check_same_shape(logprobs=logprobs, human_rank=human_rank)
    # By probability within equal ranks, then by rank: right if nothing rises from place to place.
    by_logprob = logprobs.argsort(dim=-1, descending=True, stable=True)
    by_rank = human_rank.gather(-1, by_logprob).argsort(dim=-1, stable=True)
    ordered = logprobs.gather(-1, by_logprob).gather(-1, by_rank)
    right = (ordered[:, :-1] >= ordered[:, 1:]).all(-1)
    unknown = (human_rank.isnan() | logprobs.isnan()).any(-1)
    marker = logprobs.detach()[:, 0].masked_fill(unknown, math.nan)
    return share_right(right, (marker,), marker, mask, reduction)


def dpo_gamma_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float = 0.1,
    gamma: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""DPO with a weight on the reference: 1 is DPO, 0 leaves the reference out.

    .. math:: L^\gamma = -\log\sigma\bigl(\beta\,[\log\pi(y_w) - \log\pi(y_l) + \gamma c]\bigr),
        \qquad c = \log\pi_\mathrm{ref}(y_l) - \log\pi_\mathrm{ref}(y_w)

    With a smaller ``gamma`` more pairs end ranked right, and the policy moves further: at 0 the
    threshold of every pair is log 2 (:func:`~steelyard.preference.dpo_flip_threshold`).

    Args:
        chosen_logprobs: ``log pi(y_w | x)``, summed over tokens (never averaged), ``[B]``.
        rejected_logprobs: ``log pi(y_l | x)``, ``[B]``.
        ref_chosen_logprobs: the same of the reference, ``[B]``; detached.
        ref_rejected_logprobs: the same of the reference, ``[B]``; detached.
        beta: > 0 (default 0.1).
        gamma: >= 0 (default 1).
        mask: ``[B]``, true = counts.
        reduction: ``"mean"`` (default) over kept pairs, ``"sum"`` or ``"none"``.

    Returns:
        0-d, or ``[B]`` for ``"none"``; dtype of ``chosen_logprobs``.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes differ, empty input, or a setting out of range.

    Example:
        The policy is still the reference, which has the pair wrong by 5 nats. DPO starts at log 2
        as for any pair; without the reference the pair counts as wrong:

        >>> chosen, rejected = torch.tensor([-10.0]), torch.tensor([-5.0])
        >>> dpo_gamma_loss(chosen, rejected, chosen, rejected)
        tensor(0.6931)
        >>> dpo_gamma_loss(chosen, rejected, chosen, rejected, gamma=0.0)
        tensor(0.9741)

    Source: Chen et al. (2024), Def. 2.2 and Eq. 4, arXiv:2405.19534.
    """
    given = check_pairs(
        chosen_logprobs=chosen_logprobs,
        rejected_logprobs=rejected_logprobs,
        ref_chosen_logprobs=ref_chosen_logprobs,
        ref_rejected_logprobs=ref_rejected_logprobs,
    )
    check_mask(mask, chosen_logprobs)
    check_range("beta", beta, above=0.0, below=math.inf)
    check_range("gamma", gamma, at_least=0.0, below=math.inf)
    chosen, rejected, ref_chosen, ref_rejected = (fill_masked(widen(x), mask) for x in given)
    error = ref_rejected.detach() - ref_chosen.detach()
    losses = stable_softplus(-beta * ((chosen - rejected) + gamma * error))
    return reduce_masked(losses, mask, reduction).to(chosen_logprobs.dtype)
