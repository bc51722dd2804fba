r"""One report on how a policy ranks its preference pairs, and which pairs changed sides.

Source: Chen et al. (2024), Preference Learning Algorithms Do Not Learn Preference Rankings,
arXiv:2405.19534.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from steelyard._checks import check_count, check_not_nan, check_same_shape
from steelyard._reduce import widen
from steelyard.preference.ranking import dpo_gamma_loss, ranking_accuracy, reward_accuracy
from steelyard.preference.ranking_optimum import (
    PUBLISHED_BETAS,
    IdealizedRankingAccuracy,
    dpo_flip_threshold,
    idealized_ranking_accuracy,
)

__all__ = ["RankingReport", "RankingTransitions", "ranking_report", "ranking_transitions"]


class RankingTransitions(NamedTuple):
    """What :func:`ranking_transitions` returns.

    Attributes:
        share: ``[2, 2]``, sums to 1; row = reference wrong (0) or right (1), column = policy.
        flip_rate: 0-d, of the pairs the reference has wrong, the share the policy has right.
        mean_loss: ``[2, 2]``, DPO loss of each part; NaN where it is empty.
        mean_margin: ``[2, 2]``, reward margin ``beta h`` of each part; NaN where it is empty.
    """

    share: Tensor
    flip_rate: Tensor
    mean_loss: Tensor
    mean_margin: Tensor


@dataclass(frozen=True)
class RankingReport:
    """What :func:`ranking_report` returns; 0-d tensors unless a shape is given.

    Attributes:
        ranking_accuracy: ``R`` of the policy.
        reference_accuracy: ``R`` of the reference.
        reward_accuracy: what trainers log as ``rewards/accuracies``.
        normalized_ranking_accuracy: ``R`` per token; ``None`` without lengths.
        idealized: the ceiling for each beta; ``None`` without ``alpha``.
        normalized_idealized: the same per token; ``None`` without ``alpha`` or lengths.
        alignment_gap: ``idealized.median - ranking_accuracy``; ``None`` without ``alpha``.
        normalized_alignment_gap: the same per token.
        reference_error: ``[N]``, nats by which the reference prefers the rejected answer (``c``).
        flip_threshold: ``[N]``, DPO loss at which each pair starts to be ranked right.
        loss: ``[N]``, DPO loss of each pair.
        unreachable_share: share of pairs whose threshold is below ``loss_level``.
        loss_level: the level used.
        transitions: who changed sides.
        mean_lengths: ``[2]``, tokens of chosen and rejected answers; ``None`` without lengths.
    """

    ranking_accuracy: Tensor
    reference_accuracy: Tensor
    reward_accuracy: Tensor
    normalized_ranking_accuracy: Tensor | None
    idealized: IdealizedRankingAccuracy | None
    normalized_idealized: IdealizedRankingAccuracy | None
    alignment_gap: Tensor | None
    normalized_alignment_gap: Tensor | None
    reference_error: Tensor
    flip_threshold: Tensor
    loss: Tensor
    unreachable_share: Tensor
    loss_level: Tensor
    transitions: RankingTransitions
    mean_lengths: Tensor | None

    def hardest(self, count: int) -> Tensor:
        """Return the indices of the ``count`` pairs with the lowest flip threshold."""
        check_count("count", count)
        return self.reference_error.argsort(descending=True, stable=True)[:count]


def ranking_transitions(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float = 0.1,
) -> RankingTransitions:
    r"""Sort pairs by whether the reference and the policy rank them right.

    .. math:: \text{flip rate} = \frac{\#\{\text{reference wrong, policy right}\}}
        {\#\{\text{reference wrong}\}}

    Args:
        chosen_logprobs: ``log pi(y_w | x)``, summed over tokens, ``[N]``.
        rejected_logprobs: ``log pi(y_l | x)``, ``[N]``.
        ref_chosen_logprobs: the same of the reference, ``[N]``.
        ref_rejected_logprobs: the same of the reference, ``[N]``.
        beta: of the loss and margin shown, > 0.

    Returns:
        Shares, flip rate (0 if the reference has nothing wrong), mean loss and mean margin of the
        four parts; dtype of ``chosen_logprobs``, no gradient. A NaN in any pair makes the shares
        and the flip rate NaN. Gather the pairs of all ranks first.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes differ, empty input, or ``beta <= 0``.

    Example:
        Two pairs the reference has wrong; one of them flips, though both moved the right way:

        >>> policy = torch.tensor([-4.0, -9.0, -2.0]), torch.tensor([-5.0, -5.0, -5.0])
        >>> reference = torch.tensor([-6.0, -9.5, -3.0]), torch.tensor([-5.0, -4.5, -5.0])
        >>> transitions = ranking_transitions(*policy, *reference)
        >>> transitions.share, transitions.flip_rate
        (tensor([[0.3333, 0.3333],
                [0.0000, 0.3333]]), tensor(0.5000))

    Source: Chen et al. (2024), Sec. 4.1, arXiv:2405.19534.
    """
    given = chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs
    loss = widen(dpo_gamma_loss(*given, beta=beta, reduction="none").detach())
    chosen, rejected, ref_chosen, ref_rejected = (widen(x.detach()) for x in given)
    margin = beta * ((chosen - rejected) - (ref_chosen - ref_rejected))
    before = ranking_accuracy(ref_chosen, ref_rejected, reduction="none").to(loss.dtype)
    after = ranking_accuracy(chosen, rejected, reduction="none")
    member = torch.stack(
        [row * column for row in (1 - before, before) for column in (1 - after, after)]
    )
    count = member.sum(-1)
    share = (count / count.sum()).view(2, 2)
    wrong = count[0] + count[1]
    flip_rate = torch.where(wrong == 0, 0.0, count[1] / wrong)
    dtype = member.dtype
    means = ((member @ x.to(dtype) / count).view(2, 2) for x in (loss, margin))
    parts = (x.to(chosen_logprobs.dtype) for x in (share, flip_rate, *means))
    return RankingTransitions(*parts)


def ranking_report(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float = 0.1,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    alpha: Tensor | float | None = None,
    betas: Sequence[float] = PUBLISHED_BETAS,
    loss_level: float | None = None,
) -> RankingReport:
    r"""Report everything that log-probabilities say about a policy's rankings.

    Ranking, reward and idealized accuracy, the alignment gap, the loss each pair must reach and
    the share of pairs that a given loss leaves wrong.

    Args:
        chosen_logprobs: ``log pi(y_w | x)``, summed over tokens, ``[N]``.
        rejected_logprobs: ``log pi(y_l | x)``, ``[N]``.
        ref_chosen_logprobs: the same of the reference, ``[N]``.
        ref_rejected_logprobs: the same of the reference, ``[N]``.
        beta: of DPO, > 0.
        chosen_lengths: tokens of ``y_w``, ``[N]``, for the forms per token.
        rejected_lengths: tokens of ``y_l``, ``[N]``.
        alpha: share of raters that prefer ``y_w``, ``[N]`` or a number; ``None`` = not known, no
            idealized accuracy.
        betas: of the idealized accuracy.
        loss_level: ``None`` = the mean loss of these pairs.

    Returns:
        A :class:`RankingReport`; no gradient. Gather the pairs of all ranks first.

    Raises:
        TypeError: a log-probability is not floating point, or ``loss_level`` no number.
        ValueError: shapes differ, empty input, or a setting out of range.

    Example:
        A policy with a perfect reward accuracy that ranks one pair of two wrong. To rank that one
        right its loss must come down to 0.13:

        >>> policy = torch.tensor([-20.0, -5.0]), torch.tensor([-5.0, -6.0])
        >>> reference = torch.tensor([-22.0, -6.0]), torch.tensor([-2.0, -6.0])
        >>> report = ranking_report(*policy, *reference, alpha=0.9)
        >>> report.reward_accuracy, report.ranking_accuracy, report.idealized.median
        (tensor(1.), tensor(0.5000), tensor(0.5000))
        >>> report.flip_threshold, report.loss
        (tensor([0.1269, 0.6931]), tensor([0.4741, 0.6444]))

    Source: Chen et al. (2024), Sec. 2 to 4, arXiv:2405.19534.
    """
    given = chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs
    if loss_level is not None:
        check_not_nan("loss_level", loss_level)
    loss = dpo_gamma_loss(*given, beta=beta, reduction="none").detach()
    transitions = ranking_transitions(*given, beta=beta)
    chosen, rejected, ref_chosen, ref_rejected = (x.detach() for x in given)
    accuracy = ranking_accuracy(chosen, rejected)
    ref_ratio = widen(ref_chosen) - widen(ref_rejected)
    threshold = dpo_flip_threshold(ref_ratio, beta).to(loss.dtype)
    ideal = None if alpha is None else idealized_ranking_accuracy(ref_ratio, alpha, betas)
    level = loss.mean() if loss_level is None else loss.new_tensor(loss_level)
    lengths = _lengths(chosen, chosen_lengths, rejected_lengths)
    normalized = normalized_ideal = None
    if lengths is not None:
        normalized = ranking_accuracy(
            chosen, rejected, chosen_lengths=lengths[0], rejected_lengths=lengths[1]
        )
        if alpha is not None:
            per_token = widen(ref_chosen) / lengths[0] - widen(ref_rejected) / lengths[1]
            normalized_ideal = idealized_ranking_accuracy(per_token, alpha, betas)
    return RankingReport(
        ranking_accuracy=accuracy,
        reference_accuracy=ranking_accuracy(ref_chosen, ref_rejected),
        reward_accuracy=reward_accuracy(chosen, rejected, ref_chosen, ref_rejected),
        normalized_ranking_accuracy=normalized,
        idealized=ideal,
        normalized_idealized=normalized_ideal,
        alignment_gap=_gap(ideal, accuracy),
        normalized_alignment_gap=_gap(normalized_ideal, normalized),
        reference_error=-ref_ratio,
        flip_threshold=threshold,
        loss=loss,
        unreachable_share=(threshold < level).to(widen(loss).dtype).mean(),
        loss_level=level,
        transitions=transitions,
        mean_lengths=None if lengths is None else lengths.mean(-1),
    )


def _lengths(like: Tensor, chosen: Tensor | None, rejected: Tensor | None) -> Tensor | None:
    """Both lengths as ``[2, N]``, in a floating dtype."""
    if chosen is None and rejected is None:
        return None
    if chosen is None or rejected is None:
        missing = "chosen_lengths" if chosen is None else "rejected_lengths"
        raise ValueError(f"{missing} must be given with the other lengths, got None")
    check_same_shape(chosen_logprobs=like, chosen_lengths=chosen, rejected_lengths=rejected)
    return torch.stack((chosen, rejected)).to(widen(like).dtype)


def _gap(ideal: IdealizedRankingAccuracy | None, accuracy: Tensor | None) -> Tensor | None:
    return None if ideal is None or accuracy is None else ideal.median - accuracy
