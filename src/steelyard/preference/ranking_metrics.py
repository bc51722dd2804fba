r"""Ranking accuracy as torchmetrics objects, for trainers.

Loaded when first asked for; needs torchmetrics (``steelyard[metrics]``). All keep counts only, so
that an epoch costs no memory, and add them up across processes. A NaN log-probability makes the
result NaN. Options after the listed ones are those of ``torchmetrics.Metric``, which refuses names
it does not know.

Source: Chen et al. (2024), arXiv:2405.19534.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steelyard._checks import check_floating, check_range, check_same_shape
from steelyard._extras import require
from steelyard.preference._pairs import check_pairs
from steelyard.preference.ranking import (
    full_ranking_accuracy,
    ranking_accuracy,
    reward_accuracy,
    tie_aware_ranking_accuracy,
)
from steelyard.preference.ranking_optimum import (
    PUBLISHED_BETAS,
    IdealizedRankingAccuracy,
    Unanimous,
    check_ideal,
    idealized_pairs,
    summarise_betas,
)

_torchmetrics = require("torchmetrics", extra="metrics")

__all__ = [
    "AlignmentGapMetric",
    "FlipRateMetric",
    "FullRankingAccuracyMetric",
    "IdealizedRankingAccuracyMetric",
    "RankingAccuracyMetric",
    "RewardAccuracyMetric",
    "TieAwareRankingAccuracyMetric",
]


class _Share(_torchmetrics.Metric):  # type: ignore[misc, name-defined]
    """Share of pairs that are right: how many are, how many are NaN, and how many there are."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    right: Tensor
    unknown: Tensor
    total: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in ("right", "unknown", "total"):
            self.add_state(name, default=torch.tensor(0), dist_reduce_fx="sum")

    def _add(self, right: Tensor) -> None:
        self.right += (right == 1).sum()
        self.unknown += right.isnan().sum()
        self.total += right.numel()

    def compute(self) -> Tensor:
        """Return the share over everything seen, 0-d; NaN if nothing was."""
        return _share(self.right, self.unknown, self.total)


class RankingAccuracyMetric(_Share):
    r"""Ranking accuracy over all batches, see :func:`~steelyard.preference.ranking_accuracy`.

    Args:
        **options: of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> metric = RankingAccuracyMetric()
        >>> metric.update(torch.tensor([-12.0]), torch.tensor([-8.0]))
        >>> metric.update(torch.tensor([-3.0, -2.0]), torch.tensor([-5.0, -4.0]))
        >>> metric.compute()
        tensor(0.6667)

    Source: Chen et al. (2024), Def. 2.3 and Eq. 15, arXiv:2405.19534.
    """

    def update(
        self,
        chosen_logprobs: Tensor,
        rejected_logprobs: Tensor,
        chosen_lengths: Tensor | None = None,
        rejected_lengths: Tensor | None = None,
    ) -> None:
        """Count a batch of pairs ``[N]``; with lengths, per token."""
        right = ranking_accuracy(
            chosen_logprobs,
            rejected_logprobs,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            reduction="none",
        )
        self._add(right)


class RewardAccuracyMetric(_Share):
    r"""Reward accuracy over all batches, see :func:`~steelyard.preference.reward_accuracy`.

    Args:
        **options: of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> metric = RewardAccuracyMetric()
        >>> metric.update(*(torch.tensor([x]) for x in (-9.0, -5.0, -9.5, -4.5)))
        >>> metric.compute()
        tensor(1.)

    Source: Chen et al. (2024), Remark 2.5, arXiv:2405.19534.
    """

    def update(
        self,
        chosen_logprobs: Tensor,
        rejected_logprobs: Tensor,
        ref_chosen_logprobs: Tensor,
        ref_rejected_logprobs: Tensor,
    ) -> None:
        """Count a batch of pairs ``[N]``."""
        given = chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs
        self._add(reward_accuracy(*given, reduction="none"))


class TieAwareRankingAccuracyMetric(_Share):
    r"""As :func:`~steelyard.preference.tie_aware_ranking_accuracy`, over all batches.

    Args:
        tie_eps: as there.
        **options: of ``torchmetrics.Metric``.

    Raises:
        TypeError: ``tie_eps`` is no number.
        ValueError: ``tie_eps`` not above 0 or not finite.

    Example:
        >>> import torch
        >>> metric = TieAwareRankingAccuracyMetric(tie_eps=0.1)
        >>> metric.update(*(torch.tensor(x) for x in ([0.5, 0.9], [-1.0, -2.0], [-1.05, -1.0])))
        >>> metric.compute()
        tensor(0.5000)

    Source: Chen et al. (2024), Def. C.1, arXiv:2405.19534.
    """

    def __init__(self, *, tie_eps: float = 0.01, **options: Any) -> None:
        super().__init__(**options)
        check_range("tie_eps", tie_eps, above=0.0)
        self.tie_eps = tie_eps

    def update(self, alpha: Tensor, p1: Tensor, p2: Tensor) -> None:
        """Count a batch of pairs ``[N]``."""
        right = tie_aware_ranking_accuracy(alpha, p1, p2, tie_eps=self.tie_eps, reduction="none")
        self._add(right)


class FullRankingAccuracyMetric(_Share):
    r"""As :func:`~steelyard.preference.full_ranking_accuracy`, over all batches.

    Args:
        **options: of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> metric = FullRankingAccuracyMetric()
        >>> metric.update(torch.tensor([[1, 2, 3]]), torch.tensor([[-1.0, -4.0, -9.0]]))
        >>> metric.compute()
        tensor(1.)

    Source: Chen et al. (2024), Def. A.8, arXiv:2405.19534.
    """

    def update(self, human_rank: Tensor, logprobs: Tensor) -> None:
        """Count a batch of prompts, both ``[N, K]``; ``K`` may change from batch to batch."""
        self._add(full_ranking_accuracy(human_rank, logprobs, reduction="none"))


class IdealizedRankingAccuracyMetric(_torchmetrics.Metric):  # type: ignore[misc, name-defined]
    r"""As :func:`~steelyard.preference.idealized_ranking_accuracy`, over all batches.

    Args:
        betas: as there.
        eps: as there.
        unanimous: as there.
        **options: of ``torchmetrics.Metric``.

    Raises:
        TypeError: ``betas`` is no sequence of numbers, or ``eps`` no number.
        ValueError: no ``betas``, or a setting out of range.

    Example:
        >>> import torch
        >>> metric = IdealizedRankingAccuracyMetric(betas=(0.1, 1.0))
        >>> metric.update(torch.tensor([3.0]), 0.75)
        >>> metric.update(torch.tensor([-5.0]), 0.75)
        >>> metric.compute()  # the median over betas
        tensor(0.7500)
        >>> metric.details().per_beta
        tensor([1.0000, 0.5000])

    Source: Chen et al. (2024), Corollary 3.3, arXiv:2405.19534.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    ideal_right: Tensor
    ideal_unknown: Tensor
    total: Tensor

    def __init__(
        self,
        *,
        betas: Sequence[float] = PUBLISHED_BETAS,
        eps: float = 1e-3,
        unanimous: Unanimous = "clip",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_ideal(betas, eps, unanimous)
        self.betas = tuple(betas)
        self.eps = eps
        self.unanimous = unanimous
        zeros = torch.zeros(len(self.betas), dtype=torch.long)
        self.add_state("ideal_right", default=zeros, dist_reduce_fx="sum")
        self.add_state("ideal_unknown", default=zeros.clone(), dist_reduce_fx="sum")
        self.add_state("total", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, ref_log_ratio: Tensor, alpha: Tensor | float) -> None:
        """Count a batch: ``log pi_ref(y_w) - log pi_ref(y_l)`` ``[N]``, and the raters' share."""
        self._add_ideal(ref_log_ratio, alpha)

    def _add_ideal(self, ref_log_ratio: Tensor, alpha: Tensor | float) -> None:
        right = idealized_pairs(
            ref_log_ratio, alpha, self.betas, eps=self.eps, unanimous=self.unanimous
        )
        self.ideal_right += (right == 1).sum(-1)
        self.ideal_unknown += right.isnan().sum(-1)
        self.total += right.shape[-1]

    def compute(self) -> Tensor:
        """Return the median over betas of everything seen, 0-d; NaN if nothing was."""
        return self.details().median

    def details(self) -> IdealizedRankingAccuracy:
        """Return each beta's accuracy with minimum, median and maximum, of this process."""
        return summarise_betas(_share(self.ideal_right, self.ideal_unknown, self.total))


class AlignmentGapMetric(IdealizedRankingAccuracyMetric):
    r"""Median idealized ranking accuracy, less the ranking accuracy, over all batches.

    Args:
        **options: as for :class:`IdealizedRankingAccuracyMetric`.

    Example:
        From this reference both pairs could be ranked right; one is:

        >>> import torch
        >>> metric = AlignmentGapMetric(betas=(0.1,))
        >>> policy = torch.tensor([-8.0, -5.0]), torch.tensor([-9.0, -2.0])
        >>> metric.update(*policy, ref_log_ratio=torch.tensor([3.0, -5.0]), alpha=0.75)
        >>> metric.compute()
        tensor(0.5000)

    Source: Chen et al. (2024), Sec. 3, arXiv:2405.19534.
    """

    higher_is_better = False
    right: Tensor
    unknown: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("right", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("unknown", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(  # type: ignore[override]
        self,
        chosen_logprobs: Tensor,
        rejected_logprobs: Tensor,
        ref_log_ratio: Tensor,
        alpha: Tensor | float,
    ) -> None:
        """Count a batch of pairs ``[N]``. For the gap per token, divide all by the lengths."""
        right = ranking_accuracy(chosen_logprobs, rejected_logprobs, reduction="none")
        check_floating(ref_log_ratio=ref_log_ratio)
        check_same_shape(chosen_logprobs=chosen_logprobs, ref_log_ratio=ref_log_ratio)
        self._add_ideal(ref_log_ratio, alpha)
        self.right += (right == 1).sum()
        self.unknown += right.isnan().sum()

    def compute(self) -> Tensor:
        """Return the gap over everything seen, 0-d; NaN if nothing was."""
        return self.details().median - _share(self.right, self.unknown, self.total)


class FlipRateMetric(_torchmetrics.Metric):  # type: ignore[misc, name-defined]
    r"""Of the pairs the reference has wrong, the share that the policy has right.

    Args:
        **options: of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> metric = FlipRateMetric()
        >>> policy = torch.tensor([-4.0, -9.0, -2.0]), torch.tensor([-5.0, -5.0, -5.0])
        >>> reference = torch.tensor([-6.0, -9.5, -3.0]), torch.tensor([-5.0, -4.5, -5.0])
        >>> metric.update(*policy, *reference)
        >>> metric.compute()
        tensor(0.5000)
        >>> metric.details()  # row: reference wrong, right; column: policy wrong, right
        tensor([[0.3333, 0.3333],
                [0.0000, 0.3333]])

    Source: Chen et al. (2024), Sec. 4.1, arXiv:2405.19534.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    counts: Tensor
    unknown: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("counts", torch.zeros(2, 2, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("unknown", torch.tensor(0), dist_reduce_fx="sum")

    def update(
        self,
        chosen_logprobs: Tensor,
        rejected_logprobs: Tensor,
        ref_chosen_logprobs: Tensor,
        ref_rejected_logprobs: Tensor,
    ) -> None:
        """Count a batch of pairs ``[N]``."""
        check_pairs(
            chosen_logprobs=chosen_logprobs,
            rejected_logprobs=rejected_logprobs,
            ref_chosen_logprobs=ref_chosen_logprobs,
            ref_rejected_logprobs=ref_rejected_logprobs,
        )
        after = ranking_accuracy(chosen_logprobs, rejected_logprobs, reduction="none")
        before = ranking_accuracy(ref_chosen_logprobs, ref_rejected_logprobs, reduction="none")
        for row in (0, 1):
            for column in (0, 1):
                self.counts[row, column] += ((before == row) & (after == column)).sum()
        self.unknown += (before.isnan() | after.isnan()).sum()

    def compute(self) -> Tensor:
        """Return the flip rate over everything seen, 0-d; 0 if the reference has nothing wrong."""
        wrong = self.counts[0].sum()
        rate = self.counts[0, 1] / wrong.clamp(min=1)
        return torch.where(self.unknown > 0, torch.nan, rate)

    def details(self) -> Tensor:
        """Return the shares of the four parts ``[2, 2]``, of this process."""
        return _share(self.counts, self.unknown, self.counts.sum())


def _share(right: Tensor, unknown: Tensor, total: Tensor) -> Tensor:
    return torch.where(unknown > 0, torch.nan, right / total)
