"""Valid calls of policy objectives and preference learning."""

# ruff: noqa: C408, PLW0108 - a case reads like the call it stands for

import numpy as np
import torch

from _fuzz_values import (
    classes,
    generator,
    integers,
    linear,
    negative,
    ones,
    positive,
    probs,
    real,
    unit,
)
from steelyard import policy, preference
from steelyard.divergences import KL

GROUPS = (0, 0, 0, 1, 1, 1)


def groups():
    """Two groups of three."""
    return integers(*GROUPS)


def actor():
    """A small discrete policy in double precision."""
    return policy.mlp_actor_critic(
        3, 2, continuous=False, hidden=(4,), critic_heads=2, generator=generator()
    ).double()


def batch(size=4, width=3):
    """A minibatch of experience."""
    return policy.Samples(
        observations=real(size, width),
        actions=classes(size),
        logprobs=negative(size),
        advantages=real(size),
        returns=real(size, shift=1),
    )


def float_batch():
    """The same in single precision for the dense updater."""
    wide = batch(width=4)
    return policy.Samples(*(x.float() if x.is_floating_point() else x for x in wide))


def steps():
    """Rewards, values and ends of three steps of two environments."""
    ends = torch.zeros(3, 2, dtype=torch.bool)
    return dict(
        rewards=real(3, 2),
        values=real(3, 2, shift=1),
        next_values=real(3, 2, shift=2),
        terminated=ends,
        truncated=ends.clone(),
    )


def token_loss(**more):
    """A loss of two responses of three tokens."""
    return dict(log_ratio=real(2, 3), mask=ones(2, 3)) | more


def dense():
    """A dense network written by hand."""
    network = torch.nn.Sequential(linear(3, 4), torch.nn.Tanh(), linear(4, 2)).float()
    return policy.DenseNetwork(network, 5)


def environments():
    """Two copies of a small environment."""
    from steelyard.integrations.mujoco import make_vector_env

    return make_vector_env("CartPole-v1", 2)


def normalizer():
    """A normalizer that has seen rows."""
    moments = policy.ObservationNormalizer((2,))
    moments.update(real(4, 2).numpy())
    return moments


def float_actor():
    """A policy for those environments."""
    return policy.mlp_actor_critic(4, 2, continuous=False, hidden=(4,), critic_heads=2)


def updated(metric, *arguments):
    """The result of a metric after one update."""

    def call(**given):
        metric.update(**given)
        return metric.compute()

    return dict(call_=call)


POLICY = {
    "policy.ActorCritic": lambda: dict(
        trunk=linear(3, 4), actor=linear(4, 2), critic=linear(4, 1), action_size=2, continuous=False
    ),
    "policy.ActorCritic.evaluate": lambda: dict(
        self_=actor(), observations=real(4, 3), actions=classes(4)
    ),
    "policy.ActorCritic.logprob": lambda: dict(
        self_=actor(), parameters=real(4, 2), actions=classes(4)
    ),
    "policy.ActorCritic.entropy": lambda: dict(self_=actor(), parameters=real(4, 2)),
    "policy.ActorCritic.noise": lambda: dict(self_=actor(), shape=(4,), generator=generator()),
    "policy.ActorCritic.sample": lambda: dict(
        self_=actor(), parameters=real(4, 2), noise=unit(4, 2)
    ),
    "policy.ActorCritic.greedy": lambda: dict(self_=actor(), observations=real(4, 3)),
    "policy.AutogradUpdater": lambda: dict(
        policy=actor(), objective=policy.BPO(), generator=generator()
    ),
    "policy.AutogradUpdater.epoch": lambda: dict(
        self_=policy.AutogradUpdater(actor(), policy.BPO(), generator=generator()),
        samples=batch(),
        minibatch=2,
        learning_rate=0.01,
    ),
    "policy.DenseUpdater": lambda: dict(
        policy=float_actor(), objective=policy.BPO(), generator=generator()
    ),
    "policy.DenseUpdater.epoch": lambda: dict(
        self_=policy.DenseUpdater(float_actor(), policy.BPO(), generator=generator()),
        samples=float_batch(),
        minibatch=2,
        learning_rate=0.01,
    ),
    "policy.DenseNetwork": lambda: dict(network=torch.nn.Sequential(linear(3, 2)).float(), rows=4),
    "policy.DenseNetwork.forward": lambda: dict(self_=dense(), x=real(5, 3).float()),
    "policy.make_updater": lambda: dict(
        policy=actor(), objective=policy.PPO(), generator=generator()
    ),
    "policy.BPO": lambda: dict(),
    "policy.BPO.loss": lambda: dict(
        self_=policy.BPO(), log_ratio=real(4), heads=real(4, 2), batch=batch()
    ),
    "policy.BPO.slopes": lambda: dict(
        self_=policy.BPO(), log_ratio=real(4), heads=real(4, 2), batch=batch()
    ),
    "policy.PPO": lambda: dict(),
    "policy.PPO.loss": lambda: dict(
        self_=policy.PPO(), log_ratio=real(4), heads=real(4, 1), batch=batch()
    ),
    "policy.PPO.slopes": lambda: dict(
        self_=policy.PPO(), log_ratio=real(4), heads=real(4, 1), batch=batch()
    ),
    "policy.RunningMoments": lambda: dict(shape=(2,)),
    "policy.RunningMoments.update": lambda: dict(
        self_=policy.RunningMoments((2,)), batch=real(4, 2).numpy()
    ),
    "policy.ObservationNormalizer": lambda: dict(shape=(2,)),
    "policy.ObservationNormalizer.__call__": lambda: dict(
        self_=normalizer(), observations=real(4, 2).numpy()
    ),
    "policy.ObservationNormalizer.update": lambda: dict(
        self_=policy.ObservationNormalizer((2,)), batch=real(4, 2).numpy()
    ),
    "policy.RewardNormalizer": lambda: dict(num_envs=2, gamma=0.9),
    "policy.RewardNormalizer.__call__": lambda: dict(
        self_=policy.RewardNormalizer(2, gamma=0.9),
        rewards=real(2).numpy(),
        done=np.array([False, True]),
    ),
    "policy.OnPolicyLearner": lambda: dict(
        envs=environments(),
        objective=policy.BPO(),
        settings=policy.TrainingSettings(rollout_steps=4, minibatch=2, epochs=1, hidden=(4,)),
        seed=0,
    ),
    "policy.RolloutCollector": lambda: dict(
        envs=environments(), policy=float_actor(), steps=4, seed=0
    ),
    "policy.TrainingSettings": lambda: dict(hidden=(4, 4)),
    "policy.adora_weights": lambda: dict(
        rewards=integers(1, 0, 1, 0, 0, 1).double(),
        lengths=positive(6),
        groups=groups(),
        max_length=9.0,
        weight=0.5,
    ),
    "policy.bounded_ratio_optimum": lambda: dict(
        base_probs=probs(2, 4), q_values=real(2, 4, shift=1), low=0.8, high=1.2
    ),
    "policy.bpo_loss": lambda: token_loss(target_ratio=positive(2, 3), weight=positive(2, 3)),
    "policy.bpo_target_ratio": lambda: dict(
        returns=real(4), threshold=real(4, shift=1), epsilon_high=0.3
    ),
    "policy.bpo_threshold_loss": lambda: dict(
        returns=real(4), threshold=real(4, shift=1), mask=ones(4)
    ),
    "policy.canon_advantages": lambda: dict(
        rewards=real(6), metric=real(6, shift=1), groups=groups(), alpha=0.6
    ),
    "policy.canon_mu_schedule": lambda: dict(step=3, total=9, warmup=2, cycles=2),
    "policy.canon_split": lambda: dict(metric=real(6), groups=groups()),
    "policy.cnn_actor_critic": lambda: dict(
        observation_shape=(1, 36, 36), num_actions=2, features=4, generator=generator()
    ),
    "policy.divergence_weights": lambda: dict(kl=positive(2, 3), scale=0.5, alpha=0.5),
    "policy.gae": steps,
    "policy.gbpo_loss": lambda: token_loss(target_ratio=positive(2), weight=positive(2)),
    "policy.gbpo_signals": lambda: dict(rewards=real(6), groups=groups()),
    "policy.group_relative_advantages": lambda: dict(rewards=real(6), groups=groups()),
    "policy.grpo_loss": lambda: token_loss(advantages=real(2), epsilon_high=0.3),
    "policy.mean_token_entropy": lambda: dict(logits=real(2, 3, 4), mask=ones(2, 3)),
    "policy.mlp_actor_critic": lambda: dict(
        observation_size=3, action_size=2, continuous=True, hidden=(4,), generator=generator()
    ),
    "policy.ppo_gap": lambda: dict(log_ratio=real(4), advantages=real(4, shift=1), epsilon=0.2),
    "policy.ppo_loss": lambda: token_loss(advantages=real(2, 3, shift=1), epsilon_high=0.3),
    "policy.tabular_improvement": lambda: dict(
        transitions=probs(3, 2, 3),
        rewards=real(3, 2),
        base_policy=probs(3, 2, shift=1),
        initial=probs(3),
        gamma=0.9,
        epsilon=0.2,
    ),
}


def pair(**more):
    """Log-probabilities of four chosen and rejected responses."""
    return dict(chosen_logprobs=negative(4), rejected_logprobs=negative(4, shift=1)) | more


def four(**more):
    """The same under the policy and the reference."""
    reference = dict(
        ref_chosen_logprobs=negative(4, shift=2), ref_rejected_logprobs=negative(4, shift=3)
    )
    return pair() | reference | more


def token_pair(**more):
    """Log-ratios and divergences of the tokens of two pairs."""
    return (
        dict(
            chosen_log_ratio=real(2, 3),
            rejected_log_ratio=real(2, 4),
            chosen_kl=positive(2, 3),
            rejected_kl=positive(2, 4),
            mask_chosen=ones(2, 3),
            mask_rejected=ones(2, 4),
        )
        | more
    )


def tilted(**more):
    """Scores of samples against a target."""
    return (
        dict(
            policy_logprobs=negative(4),
            target_log_scores=negative(4, shift=1),
            log_z=0.1,
            divergence=KL,
        )
        | more
    )


def heads(**more):
    """Hidden states and heads of a policy and its reference."""
    return (
        dict(
            policy_hidden=real(2, 3, 4),
            policy_weight=real(5, 4),
            ref_hidden=real(2, 3, 4, shift=1),
            ref_weight=real(5, 4, shift=1),
            mask=ones(2, 3),
            policy_bias=real(5),
            ref_bias=real(5, shift=1),
        )
        | more
    )


PREFERENCE = {
    "preference.RankingAccuracyMetric": lambda: dict(),
    "preference.RankingAccuracyMetric.update": lambda: pair(
        **updated(preference.RankingAccuracyMetric())
    ),
    "preference.RewardAccuracyMetric.update": lambda: four(
        **updated(preference.RewardAccuracyMetric())
    ),
    "preference.FlipRateMetric.update": lambda: four(**updated(preference.FlipRateMetric())),
    "preference.FullRankingAccuracyMetric.update": lambda: dict(
        **updated(preference.FullRankingAccuracyMetric()),
        human_rank=classes(3, 4, of=4),
        logprobs=negative(3, 4),
    ),
    "preference.IdealizedRankingAccuracyMetric": lambda: dict(betas=(0.1, 1.0)),
    "preference.IdealizedRankingAccuracyMetric.update": lambda: dict(
        **updated(preference.IdealizedRankingAccuracyMetric()),
        ref_log_ratio=real(4),
        alpha=unit(4),
    ),
    "preference.AlignmentGapMetric.update": lambda: pair(
        **updated(preference.AlignmentGapMetric()), ref_log_ratio=real(4), alpha=unit(4)
    ),
    "preference.TieAwareRankingAccuracyMetric": lambda: dict(),
    "preference.TieAwareRankingAccuracyMetric.update": lambda: dict(
        **updated(preference.TieAwareRankingAccuracyMetric()),
        alpha=unit(4),
        p1=unit(4, shift=1),
        p2=unit(4, shift=2),
    ),
    "preference.LearnedTokenMask": lambda: dict(num_layers=2, hidden_size=4),
    "preference.LearnedTokenMask.forward": lambda: dict(
        self_=preference.LearnedTokenMask(2, 4).double(), hidden=real(2, 2, 3, 4)
    ),
    "preference.LogPartition": lambda: dict(num_contexts=2, max_log_z=3.0),
    "preference.LogPartition.update": lambda: dict(
        self_=preference.LogPartition(num_contexts=2), log_weights=real(4), contexts=classes(4)
    ),
    "preference.LogPartition.forward": lambda: dict(
        self_=preference.LogPartition(num_contexts=2), log_weights=real(4), contexts=classes(4)
    ),
    "preference.RunningBaseline": lambda: dict(),
    "preference.RunningBaseline.update": lambda: dict(
        self_=preference.RunningBaseline(), rewards=real(4)
    ),
    "preference.activation_mask": lambda: dict(hidden=real(2, 2, 3, 4), mask=ones(2, 3)),
    "preference.dpg_divergence": lambda: tilted(
        proposal_logprobs=negative(4, shift=2), mask=ones(4)
    ),
    "preference.dpg_loss": lambda: tilted(
        proposal_logprobs=negative(4, shift=2), mask=ones(4), reward_range=(-5.0, 5.0)
    ),
    "preference.dpg_pseudo_rewards": tilted,
    "preference.dpo_flip_threshold": lambda: dict(ref_log_ratio=real(4), beta=0.1),
    "preference.ipo_flip_threshold": lambda: dict(ref_log_ratio=real(4), tau=0.1),
    "preference.dpo_gamma_loss": lambda: four(mask=ones(4)),
    "preference.expected_calibration_error": lambda: dict(
        confidence=unit(6), correct=classes(6).double()
    ),
    "preference.exponential_log_target": lambda: dict(
        base_logprobs=negative(4), features=real(4, 2), coefficients=real(2)
    ),
    "preference.f_dpo_loss": lambda: dict(
        chosen_log_ratio=real(4), rejected_log_ratio=real(4, shift=1), mask=ones(4), divergence=KL
    ),
    "preference.fit_distributional_constraints": lambda: dict(
        features=unit(6, 2), moments=torch.full((2,), 0.5).double(), log_weights=real(6)
    ),
    "preference.full_ranking_accuracy": lambda: dict(
        human_rank=classes(3, 4, of=4), logprobs=negative(3, 4), mask=ones(3)
    ),
    "preference.fused_log_ratios": lambda: heads(tokens=classes(2, 3, of=5), chunk_size=2),
    "preference.fused_logprobs": lambda: dict(
        hidden=real(2, 3, 4),
        weight=real(5, 4),
        tokens=classes(2, 3, of=5),
        mask=ones(2, 3),
        bias=real(5),
    ),
    "preference.fused_token_kl": heads,
    "preference.idealized_log_ratio": lambda: dict(ref_log_ratio=real(4), alpha=unit(4), beta=0.1),
    "preference.idealized_ranking_accuracy": lambda: dict(
        ref_log_ratio=real(4), alpha=unit(4), betas=(0.1, 1.0), mask=ones(4)
    ),
    "preference.implicit_reward": lambda: dict(log_ratio=real(4), divergence=KL),
    "preference.leave_one_out_baseline": lambda: dict(rewards=real(6), contexts=groups()),
    "preference.mask_sparsity": lambda: dict(token_mask=positive(2, 3), mask=ones(2, 3)),
    "preference.pointwise_log_target": lambda: dict(
        base_logprobs=negative(4), satisfied=classes(4).bool(), log_floor=-9.0
    ),
    "preference.preference_calibration_error": lambda: dict(margin=real(6)),
    "preference.preference_health": lambda: dict(
        chosen_log_ratio=real(4), rejected_log_ratio=real(4, shift=1), divergence=KL, mask=ones(4)
    ),
    "preference.ranking_accuracy": lambda: pair(
        chosen_lengths=integers(3, 4, 5, 6), rejected_lengths=integers(6, 5, 4, 3), mask=ones(4)
    ),
    "preference.ranking_report": lambda: four(
        chosen_lengths=integers(3, 4, 5, 6),
        rejected_lengths=integers(6, 5, 4, 3),
        alpha=0.8,
        betas=(0.1, 1.0),
        loss_level=0.5,
    ),
    "preference.RankingReport.hardest": lambda: dict(
        self_=preference.ranking_report(**four()), count=2
    ),
    "preference.ranking_transitions": four,
    "preference.regularised_optimum": lambda: dict(
        rewards=real(4), ref_probs=probs(4), beta=0.5, divergence=KL
    ),
    "preference.reward_accuracy": lambda: four(mask=ones(4)),
    "preference.rlhf_log_target": lambda: dict(ref_logprobs=negative(4), rewards=real(4), beta=0.5),
    "preference.sparse_po_loss": lambda: token_pair(
        reward_mask_chosen=unit(2, 3),
        reward_mask_rejected=unit(2, 4),
        kl_mask_chosen=unit(2, 3, shift=1),
        kl_mask_rejected=unit(2, 4, shift=1),
        l1_reward=0.1,
        l1_kl=0.1,
    ),
    "preference.sparse_po_reward": lambda: dict(
        log_ratio=real(2, 3),
        kl=positive(2, 3),
        reward_mask=unit(2, 3),
        kl_mask=unit(2, 3, shift=1),
        mask=ones(2, 3),
    ),
    "preference.tdpo1_loss": token_pair,
    "preference.tdpo2_loss": token_pair,
    "preference.tie_aware_ranking_accuracy": lambda: dict(
        alpha=unit(4), p1=unit(4, shift=1), p2=unit(4, shift=2), mask=ones(4)
    ),
    "preference.variance_optimal_baseline": lambda: dict(
        rewards=real(4), log_weights=real(4, shift=1), squared_norms=positive(4)
    ),
}


CASES = {**POLICY, **PREFERENCE}
SLOW = {"policy.OnPolicyLearner", "policy.RolloutCollector", "policy.cnn_actor_critic"}
