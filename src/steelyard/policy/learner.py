"""An on-policy learner: rollout, advantages, epochs of minibatch updates, and what they did.

:class:`OnPolicyLearner` joins the parts of this package into the loop of PPO and BPO. Its state is
a dictionary of tensors and numbers from which training goes on exactly.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

import torch

from steelyard._checks import check_choice, check_count, check_range
from steelyard.policy._arguments import check_attributes
from steelyard.policy.actor_critic import ActorCritic, cnn_actor_critic, mlp_actor_critic
from steelyard.policy.advantages import gae
from steelyard.policy.losses import LOG_RATIO_LIMIT
from steelyard.policy.normalization import ObservationNormalizer, RewardNormalizer
from steelyard.policy.objectives import Objective, Samples
from steelyard.policy.rollout import Rollout, RolloutCollector, action_law, check_environments
from steelyard.policy.updates import make_updater

__all__ = ["OnPolicyLearner", "TrainingSettings"]

_RECENT = 20
"""Finished episodes the reported return is averaged over."""
_OF_OBJECTIVE = ("critic_heads", "epsilon", "entropy_coef", "max_grad_norm", "loss", "slopes")
_OUT_OF_BAND_SLACK = 0.01
"""A ratio counts as out of the band when it is this much outside."""


@dataclass(frozen=True)
class TrainingSettings:
    """How an on-policy learner collects and repeats its samples."""

    rollout_steps: int = 256
    """Steps of each environment in a rollout."""
    epochs: int = 10
    """Passes over each rollout."""
    minibatch: int = 64
    """Samples of one optimiser step."""
    learning_rate: float = 3e-4
    anneal: bool = False
    """Lower the learning rate linearly to 0 over ``total_steps``."""
    total_steps: int = 1_000_000
    """Environment steps of the whole training; only ``anneal`` uses it."""
    gamma: float = 0.99
    gae_lambda: float = 0.95
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers; image observations use a convolutional network instead."""
    activation: Literal["tanh", "relu"] = "tanh"
    normalize_observations: bool = False
    normalize_rewards: bool = False

    def __post_init__(self) -> None:
        for name in ("rollout_steps", "epochs", "minibatch", "total_steps"):
            check_range(name, getattr(self, name), at_least=1)
        check_range("learning_rate", self.learning_rate, above=0.0)
        check_range("gamma", self.gamma, at_least=0.0, at_most=1.0)
        check_range("gae_lambda", self.gae_lambda, at_least=0.0, at_most=1.0)
        check_choice("activation", self.activation, ("tanh", "relu"))


class OnPolicyLearner:
    """Train an actor-critic on a vector environment with PPO, BPO or an objective of your own.

    Args:
        envs: as :class:`RolloutCollector` takes them; made with autoreset disabled if the learner
            is to be stored and resumed.
        objective: for example ``PPO()`` or ``BPO()``.
        settings: of training.
        seed: of initial weights, episodes, action noise and the order of samples.

    Raises:
        TypeError: an argument of another kind.
        ValueError: ``seed < 0``, spaces without a network for them, or as
            :class:`RolloutCollector`.

    Example:
        >>> from steelyard.integrations.mujoco import make_vector_env
        >>> from steelyard.policy import BPO
        >>> envs = make_vector_env("CartPole-v1", 4)
        >>> learner = OnPolicyLearner(envs, BPO(), TrainingSettings(rollout_steps=64), seed=0)
        >>> row = learner.advance()
        >>> learner.step, "approx_kl" in row
        (256, True)
    """

    def __init__(
        self, envs: Any, objective: Objective, settings: TrainingSettings, *, seed: int
    ) -> None:
        check_environments(envs)
        check_attributes("objective", objective, _OF_OBJECTIVE, expected="an objective like PPO()")
        if not isinstance(settings, TrainingSettings):
            raise TypeError(f"settings must be TrainingSettings, got {type(settings).__name__}")
        check_count("seed", seed, at_least=0)
        self.envs, self.objective, self.settings = envs, objective, settings
        self.generator = torch.Generator().manual_seed(seed)
        self.policy = _make_policy(envs, objective, settings, self.generator)
        self.updater = make_updater(self.policy, objective, generator=self.generator)
        shape, count = envs.single_observation_space.shape, envs.num_envs
        normalize, rescale = settings.normalize_observations, settings.normalize_rewards
        self.collector = RolloutCollector(
            envs,
            self.policy,
            settings.rollout_steps,
            seed=seed,
            observation_normalizer=ObservationNormalizer(shape) if normalize else None,
            reward_normalizer=RewardNormalizer(count, gamma=settings.gamma) if rescale else None,
        )
        self._step = 0
        self._recent: deque[float] = deque(maxlen=_RECENT)

    @property
    def step(self) -> int:
        """Environment steps taken so far, over all copies, with those that only reset one."""
        return self._step

    def advance(self) -> dict[str, float]:
        """Collect one rollout, update the policy on it, and report.

        Returns:
            ``return`` (mean of the last 20 finished episodes; absent before the first),
            ``approx_kl`` (k3, nats), ``out_of_band`` (share of ratios more than 0.01 outside the
            band), ``max_ratio``, all over the whole rollout after the last epoch; ``value_error``
            (root mean square) before the update, ``entropy`` after it. Without a valid step in
            the rollout only ``return``.

        Raises:
            FloatingPointError: a reward, observation or parameter is not finite.
        """
        settings = self.settings
        rollout = self.collector.collect()
        samples = self._samples(rollout)
        left = max(0.0, 1 - self._step / settings.total_steps)
        rate = settings.learning_rate * (left if settings.anneal else 1.0)
        for _ in range(settings.epochs):
            self.updater.epoch(samples, settings.minibatch, rate)
        for name, parameter in self.policy.named_parameters():
            if not parameter.isfinite().all():
                raise FloatingPointError(f"parameter {name} is not finite after the update")
        self._step += rollout.rewards.numel()
        self._recent.extend(rollout.episode_returns)
        return self._report(samples)

    def _samples(self, rollout: Rollout) -> Samples:
        """Advantages and returns of the rollout, flattened to its valid steps."""
        advantages, returns = gae(
            rollout.rewards,
            rollout.values,
            rollout.next_values,
            rollout.terminated,
            rollout.truncated,
            gamma=self.settings.gamma,
            gae_lambda=self.settings.gae_lambda,
        )
        fields = (rollout.observations, rollout.actions, rollout.logprobs, advantages, returns)
        if rollout.valid.all():
            return Samples(*(field.flatten(0, 1) for field in fields))
        return Samples(*(field[rollout.valid] for field in fields))

    @torch.no_grad()
    def _report(self, samples: Samples) -> dict[str, float]:
        row = {"return": sum(self._recent) / len(self._recent)} if self._recent else {}
        if not len(samples.returns):
            return row
        pieces = [
            self.policy.evaluate(observations, actions)[:2]
            for observations, actions in zip(
                torch.split(samples.observations, 4096),
                torch.split(samples.actions, 4096),
                strict=True,
            )
        ]
        log_ratio = torch.cat([logprob for logprob, _ in pieces]) - samples.logprobs
        ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
        outside = (ratio - 1).abs() > self.objective.epsilon + _OUT_OF_BAND_SLACK
        return row | {
            "approx_kl": (ratio - 1 - log_ratio).mean().item(),
            "out_of_band": outside.float().mean().item(),
            "max_ratio": ratio.max().item(),
            "value_error": samples.advantages.square().mean().sqrt().item(),
            "entropy": torch.cat([entropy for _, entropy in pieces]).mean().item(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything training depends on, as tensors, numbers, lists and dictionaries."""
        return {
            "step": self._step,
            "policy": {key: value.clone() for key, value in self.policy.state_dict().items()},
            "updater": self.updater.state_dict(),
            "collector": self.collector.state_dict(),
            "generator": self.generator.get_state(),
            "recent": list(self._recent),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; the running episodes are played again."""
        self._step = state["step"]
        self.policy.load_state_dict(state["policy"])
        self.updater.load_state_dict(state["updater"])
        self.collector.load_state_dict(state["collector"])
        self.generator.set_state(state["generator"])
        self._recent = deque(state["recent"], maxlen=_RECENT)

    def close(self) -> None:
        """Close the environments."""
        self.envs.close()


def _make_policy(
    envs: Any, objective: Objective, settings: TrainingSettings, generator: torch.Generator
) -> ActorCritic:
    observations, actions = envs.single_observation_space, envs.single_action_space
    size, continuous = action_law(actions)
    heads = objective.critic_heads
    if len(observations.shape or ()) == 3:
        if continuous:
            raise ValueError(f"image observations need Discrete actions, got {actions}")
        return cnn_actor_critic(observations.shape, size, critic_heads=heads, generator=generator)
    if len(observations.shape or ()) != 1:
        raise ValueError(f"observations must be vectors or images, got {observations}")
    return mlp_actor_critic(
        observations.shape[0],
        size,
        continuous=continuous,
        hidden=settings.hidden,
        activation=settings.activation,
        critic_heads=heads,
        generator=generator,
    )
