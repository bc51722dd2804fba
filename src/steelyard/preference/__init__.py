"""Preference alignment: f-DPO, SparsePO, f-DPG, and how well a policy ranks."""

from typing import TYPE_CHECKING, Any

from steelyard.preference.dpg import (
    dpg_divergence,
    dpg_loss,
    dpg_pseudo_rewards,
    leave_one_out_baseline,
    variance_optimal_baseline,
)
from steelyard.preference.dpo import f_dpo_loss, implicit_reward, regularised_optimum
from steelyard.preference.health import (
    PreferenceHealth,
    expected_calibration_error,
    preference_calibration_error,
    preference_health,
)
from steelyard.preference.ranking import (
    dpo_gamma_loss,
    full_ranking_accuracy,
    ranking_accuracy,
    reward_accuracy,
    tie_aware_ranking_accuracy,
)
from steelyard.preference.ranking_optimum import (
    PUBLISHED_BETAS,
    IdealizedRankingAccuracy,
    dpo_flip_threshold,
    idealized_log_ratio,
    idealized_ranking_accuracy,
    ipo_flip_threshold,
)
from steelyard.preference.ranking_report import (
    RankingReport,
    RankingTransitions,
    ranking_report,
    ranking_transitions,
)
from steelyard.preference.running_estimates import LogPartition, RunningBaseline
from steelyard.preference.sequences import fused_log_ratios, fused_logprobs, fused_token_kl
from steelyard.preference.sparse import sparse_po_loss, sparse_po_reward, tdpo1_loss, tdpo2_loss
from steelyard.preference.targets import (
    exponential_log_target,
    fit_distributional_constraints,
    pointwise_log_target,
    rlhf_log_target,
)
from steelyard.preference.token_masks import LearnedTokenMask, activation_mask, mask_sparsity

if TYPE_CHECKING:
    from steelyard.preference.ranking_metrics import (
        AlignmentGapMetric,
        FlipRateMetric,
        FullRankingAccuracyMetric,
        IdealizedRankingAccuracyMetric,
        RankingAccuracyMetric,
        RewardAccuracyMetric,
        TieAwareRankingAccuracyMetric,
    )

__all__ = [
    "PUBLISHED_BETAS",
    "AlignmentGapMetric",
    "FlipRateMetric",
    "FullRankingAccuracyMetric",
    "IdealizedRankingAccuracy",
    "IdealizedRankingAccuracyMetric",
    "LearnedTokenMask",
    "LogPartition",
    "PreferenceHealth",
    "RankingAccuracyMetric",
    "RankingReport",
    "RankingTransitions",
    "RewardAccuracyMetric",
    "RunningBaseline",
    "TieAwareRankingAccuracyMetric",
    "activation_mask",
    "dpg_divergence",
    "dpg_loss",
    "dpg_pseudo_rewards",
    "dpo_flip_threshold",
    "dpo_gamma_loss",
    "expected_calibration_error",
    "exponential_log_target",
    "f_dpo_loss",
    "fit_distributional_constraints",
    "full_ranking_accuracy",
    "fused_log_ratios",
    "fused_logprobs",
    "fused_token_kl",
    "idealized_log_ratio",
    "idealized_ranking_accuracy",
    "implicit_reward",
    "ipo_flip_threshold",
    "leave_one_out_baseline",
    "mask_sparsity",
    "pointwise_log_target",
    "preference_calibration_error",
    "preference_health",
    "ranking_accuracy",
    "ranking_report",
    "ranking_transitions",
    "regularised_optimum",
    "reward_accuracy",
    "rlhf_log_target",
    "sparse_po_loss",
    "sparse_po_reward",
    "tdpo1_loss",
    "tdpo2_loss",
    "tie_aware_ranking_accuracy",
    "variance_optimal_baseline",
]


def __getattr__(name: str) -> Any:
    # torchmetrics is optional: the metrics are loaded when asked for
    if name.endswith("Metric") and name in __all__:
        from steelyard.preference import ranking_metrics

        return getattr(ranking_metrics, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
