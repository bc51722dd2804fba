"""Policy optimisation: advantages, losses on the probability ratio, exact theory, rollouts."""

from steelyard.policy.actor_critic import ActorCritic, cnn_actor_critic, mlp_actor_critic
from steelyard.policy.advantages import (
    GBPOSignals,
    GeneralizedAdvantages,
    divergence_weights,
    gae,
    gbpo_signals,
    group_relative_advantages,
    mean_token_entropy,
)
from steelyard.policy.bounded_ratio import (
    BoundedRatioOptimum,
    TabularImprovement,
    bounded_ratio_optimum,
    tabular_improvement,
)
from steelyard.policy.conditional import (
    AdoraWeights,
    adora_weights,
    canon_advantages,
    canon_mu_schedule,
    canon_split,
)
from steelyard.policy.learner import OnPolicyLearner, TrainingSettings
from steelyard.policy.losses import (
    bpo_loss,
    bpo_target_ratio,
    bpo_threshold_loss,
    gbpo_loss,
    grpo_loss,
    ppo_gap,
    ppo_loss,
)
from steelyard.policy.normalization import ObservationNormalizer, RewardNormalizer, RunningMoments
from steelyard.policy.objectives import BPO, PPO, Objective, Samples
from steelyard.policy.rollout import Rollout, RolloutCollector
from steelyard.policy.updates import (
    AutogradUpdater,
    DenseNetwork,
    DenseUpdater,
    Updater,
    make_updater,
)

__all__ = [
    "BPO",
    "PPO",
    "ActorCritic",
    "AdoraWeights",
    "AutogradUpdater",
    "BoundedRatioOptimum",
    "DenseNetwork",
    "DenseUpdater",
    "GBPOSignals",
    "GeneralizedAdvantages",
    "Objective",
    "ObservationNormalizer",
    "OnPolicyLearner",
    "RewardNormalizer",
    "Rollout",
    "RolloutCollector",
    "RunningMoments",
    "Samples",
    "TabularImprovement",
    "TrainingSettings",
    "Updater",
    "adora_weights",
    "bounded_ratio_optimum",
    "bpo_loss",
    "bpo_target_ratio",
    "bpo_threshold_loss",
    "canon_advantages",
    "canon_mu_schedule",
    "canon_split",
    "cnn_actor_critic",
    "divergence_weights",
    "gae",
    "gbpo_loss",
    "gbpo_signals",
    "group_relative_advantages",
    "grpo_loss",
    "make_updater",
    "mean_token_entropy",
    "mlp_actor_critic",
    "ppo_gap",
    "ppo_loss",
    "tabular_improvement",
]
