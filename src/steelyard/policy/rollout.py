"""Collect rollouts from Gymnasium vector environments into pre-allocated buffers.

What a step costs in Python is kept to what cannot be done later: values, log-probabilities and
bootstraps are computed once for the whole rollout, and the noise of all actions is drawn ahead.

Time limits are told from terminations under each of Gymnasium's autoreset modes: the value that
follows a truncated step is that of the state it was cut in. Under ``NEXT_STEP`` the step after the
end of an episode only resets; it is marked invalid and must be left out of every mean.

Under ``DISABLED`` the collector resets finished copies itself, each episode with a seed of its own.
Then the state of every environment follows from its episode's seed and actions, so that
:meth:`RolloutCollector.state_dict` can restore *any* deterministic environment exactly, by playing
the running episodes again, without asking it for its internals.

Buffers and networks are on the CPU, in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from steelyard._checks import check_choice, check_count, check_shape
from steelyard.policy._arguments import check_attributes
from steelyard.policy.actor_critic import ActorCritic
from steelyard.policy.normalization import ObservationNormalizer, RewardNormalizer
from steelyard.policy.updates import DenseNetwork

__all__ = ["Rollout", "RolloutCollector"]

_NOISE = 1 << 20
"""Stands in the place of an environment's number in the seed of the action noise."""
_OF_ENVIRONMENTS = (
    *("num_envs", "metadata", "reset", "step"),
    *("single_observation_space", "single_action_space"),
)
_OF_POLICY = ("trunk", "actor", "critic", "action_size", "continuous", "noise", "sample")
_EVALUATION_ROWS = 4096
"""Rows evaluated at once after a rollout: bounds the memory of convolutional features."""


@dataclass(frozen=True)
class Rollout:
    """``T`` steps of ``B`` environments; tensors are ``[T, B, ..]``."""

    observations: Tensor
    """As the policy saw them (normalised if asked for)."""
    actions: Tensor
    """As the policy drew them, before clipping to the action space."""
    logprobs: Tensor
    rewards: Tensor
    """As the learner sees them (normalised if asked for)."""
    values: Tensor
    """Head 0 of the critic."""
    next_values: Tensor
    """Value of the state each step led to, before any reset."""
    terminated: Tensor
    truncated: Tensor
    valid: Tensor
    """False at steps that only reset an environment."""
    episode_returns: tuple[float, ...]
    """Undiscounted, unnormalised returns of the episodes that ended here, in order."""
    episode_lengths: tuple[int, ...]


class RolloutCollector:
    """Step a vector environment with a policy.

    Args:
        envs: a ``gymnasium.vector.VectorEnv``, or anything with its ``reset``, ``step``,
            ``num_envs``, ``metadata`` and single spaces. Box and Discrete actions.
        policy: draws the actions.
        steps: T, steps of each environment in a rollout.
        seed: of the episodes and of the action noise.
        observation_normalizer: updated at every step.
        reward_normalizer: updated at every step.

    Raises:
        TypeError: ``envs`` or ``policy`` of another kind, or ``steps`` or ``seed`` no integer.
        ValueError: ``steps < 1``, an action space of another kind, one that does not fit the
            policy, or an observation normalizer for images.
        FloatingPointError: an environment returned a non-finite observation or reward.

    Example:
        >>> from steelyard.integrations.mujoco import make_vector_env
        >>> from steelyard.policy import mlp_actor_critic
        >>> envs = make_vector_env("InvertedPendulum-v5", 4)
        >>> collector = RolloutCollector(envs, mlp_actor_critic(4, 1, continuous=True), 16, seed=0)
        >>> collector.collect().rewards.shape
        torch.Size([16, 4])
    """

    def __init__(
        self,
        envs: Any,
        policy: ActorCritic,
        steps: int,
        *,
        seed: int,
        observation_normalizer: ObservationNormalizer | None = None,
        reward_normalizer: RewardNormalizer | None = None,
    ) -> None:
        check_environments(envs)
        check_attributes("policy", policy, _OF_POLICY, expected="an ActorCritic")
        check_count("steps", steps)
        check_count("seed", seed, at_least=0)
        self.envs, self.policy, self.steps, self.seed = envs, policy, steps, seed
        self.observation_normalizer = observation_normalizer
        self.reward_normalizer = reward_normalizer
        self.generator = torch.Generator().manual_seed(_derived_seed(seed, _NOISE))
        self._mode = _autoreset_mode(envs)
        self._low, self._high = _action_bounds(envs.single_action_space, policy)
        if observation_normalizer is not None and _is_image(envs.single_observation_space):
            raise ValueError("observation_normalizer must be None for images of bytes")
        self._episodes = np.zeros(envs.num_envs, dtype=np.int64)
        self._seeds = [self._seed(env) for env in range(envs.num_envs)]
        self._returns = np.zeros(envs.num_envs)
        self._lengths = np.zeros(envs.num_envs, dtype=np.int64)
        self._resetting = np.zeros(envs.num_envs, dtype=np.bool_)
        self._trace: list[NDArray[Any]] = []
        self._observation, _ = envs.reset(seed=self._seeds)
        _check_finite("observations", self._observation, 0)
        self._update_normalizer(self._observation)

    def _seed(self, env: int) -> int:
        """Seed of an environment's current episode, independent of all others."""
        return _derived_seed(self.seed, env, int(self._episodes[env]))

    @torch.no_grad()
    def collect(self) -> Rollout:
        """Run ``steps`` steps of every environment."""
        size = (self.steps, self.envs.num_envs)
        shape = self.envs.single_observation_space.shape
        dtype = _buffer_dtype(self.envs.single_observation_space)
        observations = torch.empty((*size, *shape), dtype=dtype)
        noise = self.policy.noise(size, self.generator)
        continuous = self.policy.continuous
        actions = torch.empty_like(noise) if continuous else torch.empty(size, dtype=torch.long)
        seen, flags = observations.numpy(), np.zeros((3, *size), dtype=np.bool_)
        terminated, truncated, valid = flags
        rewards = np.empty(size, dtype=np.float32)
        act = _actor(self.policy, self.envs.num_envs)
        final: dict[tuple[int, int], NDArray[Any]] = {}
        ended: list[tuple[float, int]] = []
        # Inference mode skips bookkeeping that no_grad keeps; what it fills was made outside of it.
        with torch.inference_mode():
            for t in range(self.steps):
                seen[t] = self._normalized(self._observation)
                action = self.policy.sample(act(observations[t]), noise[t])
                actions[t] = action
                np.logical_not(self._resetting, out=valid[t])
                reward, terminated[t], truncated[t] = self._step(action.numpy(), t, final, ended)
                rewards[t] = reward
        del self._trace[: len(self._trace) - int(self._lengths.max())]
        logprobs, values = self._evaluate(observations, actions)
        return Rollout(
            observations,
            actions,
            logprobs,
            torch.from_numpy(rewards),
            values,
            self._next_values(values, final),
            torch.from_numpy(terminated),
            torch.from_numpy(truncated),
            torch.from_numpy(valid),
            episode_returns=tuple(value for value, _ in ended),
            episode_lengths=tuple(length for _, length in ended),
        )

    def _step(
        self,
        action: NDArray[Any],
        t: int,
        final: dict[tuple[int, int], NDArray[Any]],
        ended: list[tuple[float, int]],
    ) -> tuple[NDArray[Any], NDArray[np.bool_], NDArray[np.bool_]]:
        """Advance all environments, reset what has ended, keep the books."""
        valid = ~self._resetting
        if self._low is not None:
            action = np.clip(action, self._low, self._high)
        if self._mode == "DISABLED":
            self._trace.append(action)
        self._observation, reward, terminated, truncated, info = self.envs.step(action)
        _check_finite("rewards", reward, t)
        _check_finite("observations", self._observation, t)
        done = terminated | truncated
        self._returns += reward
        self._lengths += valid
        if done.any():
            indices = np.flatnonzero(done).tolist()
            ended += [(float(self._returns[i]), int(self._lengths[i])) for i in indices]
            self._returns[done], self._lengths[done] = 0.0, 0
            last = self._restart(done, info, t)
            for i in indices if last is not None else ():
                final[t, i] = self._normalized(np.asarray(last[i]))
        self._resetting = done if self._mode == "NEXT_STEP" else self._resetting
        self._update_normalizer(self._observation)
        if self.reward_normalizer is not None:
            reward = self.reward_normalizer(np.asarray(reward, dtype=np.float64), done, valid)
        return reward, terminated, truncated

    def _restart(self, done: NDArray[np.bool_], info: dict[str, Any], t: int) -> Any:
        """Begin new episodes where the mode asks for it; return the states the old ones ended in.

        ``None`` under ``NEXT_STEP``, where the observation itself is that state.
        """
        if self._mode == "NEXT_STEP":
            return None
        if self._mode == "SAME_STEP":
            return info["final_obs"]
        last = np.array(self._observation)
        self._episodes += done
        for env in np.flatnonzero(done).tolist():
            self._seeds[env] = self._seed(env)
        self._observation, _ = self.envs.reset(
            seed=self._seeds, options={"reset_mask": np.array(done)}
        )
        _check_finite("observations", self._observation, t)
        return last

    def _normalized(self, observation: NDArray[Any]) -> NDArray[Any]:
        normalizer = self.observation_normalizer
        return observation if normalizer is None else normalizer(observation)

    def _update_normalizer(self, observation: NDArray[Any]) -> None:
        if self.observation_normalizer is not None:
            self.observation_normalizer.update(observation)

    def _evaluate(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and values of the whole rollout, each ``[T, B]``."""
        rows, acts = observations.flatten(0, 1), actions.flatten(0, 1)
        pieces = [
            self.policy.evaluate(some, act)
            for some, act in zip(
                torch.split(rows, _EVALUATION_ROWS),
                torch.split(acts, _EVALUATION_ROWS),
                strict=True,
            )
        ]
        size = observations.shape[:2]
        logprobs = torch.cat([logprob for logprob, _, _ in pieces]).view(size)
        return logprobs, torch.cat([heads[:, 0] for _, _, heads in pieces]).view(size)

    def _next_values(self, values: Tensor, final: dict[tuple[int, int], NDArray[Any]]) -> Tensor:
        """Values one step later; those of the final states where an episode ended."""
        last = self._normalized(self._observation)
        rows = [np.asarray(last), *(row[None] for row in final.values())]
        states = torch.from_numpy(np.concatenate(rows)).to(
            _buffer_dtype(self.envs.single_observation_space)
        )
        heads = self.policy.critic(self.policy.trunk(states))[:, 0]
        count = values.shape[1]
        next_values = torch.cat((values[1:], heads[None, :count]))
        if final:
            steps, envs = (torch.tensor(index) for index in zip(*final, strict=True))
            next_values[steps, envs] = heads[count:]
        return next_values

    def state_dict(self) -> dict[str, Any]:
        """Everything the next rollout depends on but the policy.

        Raises:
            RuntimeError: the environments reset themselves, so their state cannot be restored.
        """
        if self._mode != "DISABLED":
            raise RuntimeError(
                "exact resume needs environments made with AutoresetMode.DISABLED, "
                f"got {self._mode}"
            )
        normalizers = (self.observation_normalizer, self.reward_normalizer)
        return {
            "seed": self.seed,
            "generator": self.generator.get_state(),
            "episodes": torch.from_numpy(self._episodes.copy()),
            "returns": torch.from_numpy(self._returns.copy()),
            "lengths": torch.from_numpy(self._lengths.copy()),
            "trace": torch.from_numpy(np.array(self._trace)) if self._trace else None,
            "normalizers": [n.state_dict() if n is not None else None for n in normalizers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict` by playing the running episodes again.

        Raises:
            ValueError: the state is of another number of environments.
        """
        check_shape("episodes", state["episodes"], (self.envs.num_envs,))
        self.seed = state["seed"]
        self.generator.set_state(state["generator"])
        self._episodes = state["episodes"].numpy().copy()
        self._returns = state["returns"].numpy().copy()
        self._lengths = state["lengths"].numpy().copy()
        self._seeds = [self._seed(env) for env in range(len(self._episodes))]
        self._trace = [] if state["trace"] is None else list(state["trace"].numpy())
        self._replay()
        normalizers = (self.observation_normalizer, self.reward_normalizer)
        for normalizer, saved in zip(normalizers, state["normalizers"], strict=True):
            if normalizer is not None:
                normalizer.load_state_dict(saved)

    def _replay(self) -> None:
        """Bring every environment to where its current episode stands.

        All are stepped together through the trace; one whose episode begins later plays on with
        its old actions until then, and is reset to the right seed when its turn comes.
        """
        starts = len(self._trace) - self._lengths

        def reset(mask: NDArray[np.bool_]) -> None:
            if mask.any():
                options = {"reset_mask": mask}
                self._observation, _ = self.envs.reset(seed=self._seeds, options=options)

        reset(np.ones_like(starts, dtype=np.bool_))
        for index, action in enumerate(self._trace):
            self._observation, _, terminated, truncated, _ = self.envs.step(action)
            reset(terminated | truncated | (starts == index + 1))


def _derived_seed(*key: int) -> int:
    """A seed below 2^31 for each key, independent of those of other keys."""
    return int(np.random.SeedSequence(key).generate_state(1)[0] >> 1)


def check_environments(envs: Any) -> None:
    """Require what is used of a vector environment."""
    check_attributes("envs", envs, _OF_ENVIRONMENTS, expected="a vector environment")


def _autoreset_mode(envs: Any) -> str:
    """Name of the autoreset mode; environments that do not say reset on the next step."""
    mode = envs.metadata.get("autoreset_mode", "NEXT_STEP")
    name = str(getattr(mode, "name", mode)).upper()
    check_choice("autoreset_mode", name, ("NEXT_STEP", "SAME_STEP", "DISABLED"))
    return name


def action_law(space: Any) -> tuple[int, bool]:
    """Number or dimension of a space's actions, and whether they are continuous.

    Raises:
        ValueError: the space is neither a Discrete that starts at 0 nor a 1-D Box.
    """
    if hasattr(space, "n") and space.shape == () and space.start == 0:
        return int(space.n), False
    if hasattr(space, "low") and len(space.shape) == 1:
        return int(space.shape[0]), True
    raise ValueError(f"action space must be Discrete (from 0) or a 1-D Box, got {space}")


def _action_bounds(space: Any, policy: ActorCritic) -> tuple[Any, Any]:
    """Low and high of a Box space; ``None`` for a Discrete one."""
    size, continuous = action_law(space)
    if (size, continuous) != (policy.action_size, policy.continuous):
        kind = "continuous" if policy.continuous else "discrete"
        raise ValueError(
            f"policy has {policy.action_size} {kind} actions, but the environments take {space}"
        )
    return (space.low, space.high) if continuous else (None, None)


def _actor(policy: ActorCritic, rows: int) -> Callable[[Tensor], Tensor]:
    """Map observations to action parameters, the lean way for dense networks."""
    if isinstance(policy.trunk, nn.Identity) and DenseNetwork.supports(policy.actor):
        assert isinstance(policy.actor, nn.Sequential)
        return DenseNetwork(policy.actor, rows).forward
    return lambda observations: policy.actor(policy.trunk(observations))


def _is_image(space: Any) -> bool:
    return len(space.shape) == 3 and space.dtype == np.uint8


def _buffer_dtype(space: Any) -> torch.dtype:
    return torch.uint8 if _is_image(space) else torch.float32


def _check_finite(name: str, array: NDArray[Any], step: int) -> None:
    """Require finite numbers, ``[B, ..]``; bytes are finite anyway."""
    if array.dtype != np.uint8 and not np.isfinite(array).all():
        env = np.argwhere(~np.isfinite(array))[0][0]
        raise FloatingPointError(
            f"{name} of environment {env} are not finite at step {step} of the rollout"
        )
