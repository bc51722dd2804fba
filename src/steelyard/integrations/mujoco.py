"""MuJoCo locomotion tasks stepped as one batch: Gymnasium's physics without its per-step Python.

Gymnasium's wrappers and per-environment observation, reward and health code cost as much as the
physics itself. :class:`MujocoVectorEnv` keeps Gymnasium's own environments for reset, model and
settings, steps their simulations in a row, and computes observations, rewards and terminations
for all of them in one vectorised pass. Every observation, reward and end of an episode equals
Gymnasium's, bit by bit; only the ``info`` dictionaries are left empty.

Needs the extra ``rl``: ``pip install 'steelyard[rl]'``.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steelyard._checks import check_range
from steelyard._extras import require

gymnasium = require("gymnasium", extra="rl")
mujoco = require("mujoco", extra="rl")
_vector = require("gymnasium.vector", extra="rl")

__all__ = ["MujocoVectorEnv", "is_supported", "make_vector_env"]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

SUPPORTED = (
    "Ant-v5",
    "HalfCheetah-v5",
    "Hopper-v5",
    "InvertedPendulum-v5",
    "Swimmer-v5",
    "Walker2d-v5",
)
"""The tasks whose batched observation, reward and termination are written here."""


def is_supported(env_id: str) -> bool:
    """Tell whether :class:`MujocoVectorEnv` can step this task.

    Example:
        >>> is_supported("Hopper-v5"), is_supported("CartPole-v1")
        (True, False)
    """
    return env_id in SUPPORTED


def make_vector_env(env_id: str, num_envs: int, *, fast: bool = True, **kwargs: Any) -> Any:
    """Make a Gymnasium vector environment, batched where the same physics can be had faster.

    Args:
        env_id: a registered Gymnasium id, for example ``"Hopper-v5"``.
        num_envs: how many copies, >= 1.
        fast: use :class:`MujocoVectorEnv` for the tasks it supports; ``False`` always takes
            ``SyncVectorEnv``.
        **kwargs: settings of the task, as ``gymnasium.make`` takes them.

    Returns:
        A ``gymnasium.vector.VectorEnv`` whose autoreset is disabled: the caller resets finished
        copies with ``reset(seed=..., options={"reset_mask": mask})``, which lets a run be stored
        and resumed exactly.

    Raises:
        ValueError: ``num_envs < 1`` or an unknown id, with the nearest known ones.

    Example:
        >>> envs = make_vector_env("InvertedPendulum-v5", 3)
        >>> observation, _ = envs.reset(seed=0)
        >>> observation.shape
        (3, 4)
    """
    check_range("num_envs", num_envs, at_least=1)
    if fast and is_supported(env_id):
        return MujocoVectorEnv(env_id, num_envs, **kwargs)
    make = partial(_make, env_id, **kwargs)
    return _vector.SyncVectorEnv(
        [make] * num_envs, autoreset_mode=_vector.AutoresetMode.DISABLED, copy=False
    )


def _make(env_id: str, **kwargs: Any) -> Any:
    try:
        with _model_deprecations_unsaid():
            return gymnasium.make(env_id, disable_env_checker=True, **kwargs)
    except gymnasium.error.Error as error:
        raise ValueError(f"cannot make environment {env_id!r}: {error}") from error


@contextmanager
def _model_deprecations_unsaid() -> Iterator[None]:
    """Drop MuJoCo's remarks on the syntax of Gymnasium's model files; warn of everything else."""

    def warn(message: str) -> None:
        if "deprecated" not in message:
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(warn)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)


class MujocoVectorEnv(_vector.VectorEnv):  # type: ignore[misc, name-defined]
    """Several copies of one MuJoCo task, stepped as a batch.

    Args:
        env_id: one of :data:`SUPPORTED`.
        num_envs: how many copies, >= 1.
        **kwargs: settings of the task, as ``gymnasium.make`` takes them.

    Raises:
        ValueError: the task is not supported or ``num_envs < 1``.

    Example:
        >>> envs = MujocoVectorEnv("HalfCheetah-v5", 2)
        >>> _ = envs.reset(seed=[1, 2])
        >>> *_, truncated, _ = envs.step(envs.action_space.sample())
        >>> truncated.tolist()
        [False, False]
    """

    def __init__(self, env_id: str, num_envs: int, **kwargs: Any) -> None:
        check_range("num_envs", num_envs, at_least=1)
        if not is_supported(env_id):
            raise ValueError(f"env_id must be one of {', '.join(SUPPORTED)}, got {env_id!r}")
        made = [_make(env_id, **kwargs) for _ in range(num_envs)]
        self._envs = [env.unwrapped for env in made]
        first = self._envs[0]
        self.num_envs = num_envs
        self.spec = made[0].spec
        self.metadata = {**first.metadata, "autoreset_mode": _vector.AutoresetMode.DISABLED}
        self.single_observation_space = first.observation_space
        self.single_action_space = first.action_space
        batch = _vector.utils.batch_space
        self.observation_space = batch(first.observation_space, num_envs)
        self.action_space = batch(first.action_space, num_envs)
        self.render_mode = None
        # All copies share one model: it is constant, and stays in cache.
        self._model = first.model
        self._datas = [env.data for env in self._envs]
        self._controls = [data.ctrl for data in self._datas]
        self._task = _Task(first, env_id.split("-", maxsplit=1)[0])
        self._reads = [[read(data) for data in self._datas] for read in self._task.reads]
        self._elapsed = np.zeros(num_envs, dtype=np.int64)
        self._limit = self.spec.max_episode_steps or np.iinfo(np.int64).max
        self._observations = np.zeros(self.observation_space.shape)

    def reset(
        self,
        *,
        seed: int | list[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Floats, dict[str, Any]]:
        """Reset all copies, or those where ``options["reset_mask"]`` is true."""
        if seed is None or isinstance(seed, int):
            seeds = [None if seed is None else seed + i for i in range(self.num_envs)]
        else:
            seeds = list(seed)
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, dtype=np.bool_))
        observations = self._observations.copy()
        for i in np.flatnonzero(mask):
            observations[i], _ = self._envs[i].reset(seed=seeds[i])
            self._elapsed[i] = 0
        self._observations = observations
        return observations, {}

    def step(self, actions: NDArray[Any]) -> tuple[Floats, Floats, Bools, Bools, dict[str, Any]]:
        """Advance every copy by one action, ``[num_envs, action size]``, clipped by the caller."""
        if np.shape(actions) != self.action_space.shape:
            raise ValueError(
                f"actions must have shape {list(self.action_space.shape)}, "
                f"got {list(np.shape(actions))}"
            )
        task = self._task
        before = task.position(self._reads)
        for control, action in zip(self._controls, actions, strict=True):
            control[:] = action
        for data in self._datas:
            mujoco.mj_step(self._model, data, nstep=task.frame_skip)
        if task.needs_contacts:
            for data in self._datas:
                mujoco.mj_rnePostConstraint(self._model, data)
        state = [np.array(views) for views in self._reads]
        self._observations = task.observe(state)
        healthy = task.healthy(state)
        rewards = task.reward(state, before, actions, healthy)
        terminated = ~healthy if task.terminates else np.zeros(self.num_envs, dtype=np.bool_)
        self._elapsed += 1
        return self._observations, rewards, terminated, self._elapsed >= self._limit, {}

    def close_extras(self, **kwargs: Any) -> None:
        """Close the underlying environments."""
        for env in self._envs:
            env.close()


class _Task:
    """Observation, health and reward of one task family, for a batch of states.

    A state is a list of arrays, one for each entry of ``reads``: positions ``[B, nq]``, velocities
    ``[B, nv]``, and for Ant the torso's place ``[B, 3]`` and the contact forces ``[B, nbody, 6]``.
    Settings come from the environment, so ``gymnasium.make``'s arguments count.
    """

    def __init__(self, env: Any, family: str) -> None:
        self.family = family
        self.frame_skip: int = env.frame_skip
        self.dt: float = env.dt
        self.env = env
        self.needs_contacts = family == "Ant"
        self.reads: list[Callable[[Any], Any]] = [lambda data: data.qpos, lambda data: data.qvel]
        if self.needs_contacts:
            body = env._main_body
            self.reads += [lambda data: data.body(body).xpos, lambda data: data.cfrc_ext]
        hidden = {"Ant": 2, "Swimmer": 2, "InvertedPendulum": 0}.get(family, 1)
        excluded = getattr(env, "_exclude_current_positions_from_observation", True)
        self.hidden = hidden if excluded else 0
        self.terminates = family == "InvertedPendulum" or bool(
            getattr(env, "_terminate_when_unhealthy", False)
        )

    def position(self, reads: list[list[Any]]) -> Floats:
        """Forward coordinate of each copy, before a step."""
        source = reads[2] if self.needs_contacts else reads[0]
        return np.array([view[0] for view in source])

    def observe(self, state: list[Floats]) -> Floats:
        positions, velocities = state[:2]
        if self.family in ("Hopper", "Walker2d"):
            velocities = velocities.clip(-10, 10)
        parts = [positions[:, self.hidden :], velocities]
        if self.needs_contacts and self.env._include_cfrc_ext_in_observation:
            parts.append(self._contacts(state)[:, 1:].reshape(len(positions), -1))
        return np.concatenate(parts, axis=1)

    def healthy(self, state: list[Floats]) -> Bools:
        positions, velocities = state[:2]
        if self.family == "InvertedPendulum":
            finite = np.isfinite(positions).all(1) & np.isfinite(velocities).all(1)
            balanced: Bools = np.abs(positions[:, 1]) <= 0.2
            return finite & balanced
        if self.family == "Ant":
            low, high = self.env._healthy_z_range
            finite = np.isfinite(positions).all(1) & np.isfinite(velocities).all(1)
            standing: Bools = (low <= positions[:, 2]) & (positions[:, 2] <= high)
            return finite & standing
        if self.family in ("Hopper", "Walker2d"):
            upright: Bools = _within(positions[:, 1], self.env._healthy_z_range)
            upright &= _within(positions[:, 2], self.env._healthy_angle_range)
            if self.family == "Hopper":
                bounds = self.env._healthy_state_range
                upright &= _within(positions[:, 2:], bounds).all(1)
                upright &= _within(velocities, bounds).all(1)
            return upright
        return np.ones(len(positions), dtype=np.bool_)

    def reward(
        self, state: list[Floats], before: Floats, actions: NDArray[Any], healthy: Bools
    ) -> Floats:
        if self.family == "InvertedPendulum":
            return healthy.astype(np.float64)
        after = (state[2] if self.needs_contacts else state[0])[:, 0]
        env = self.env
        reward: Floats = env._forward_reward_weight * ((after - before) / self.dt)
        if hasattr(env, "_healthy_reward"):
            reward = reward + healthy * env._healthy_reward
        cost = env._ctrl_cost_weight * np.square(actions).sum(1)
        if self.needs_contacts:
            cost = cost + env._contact_cost_weight * np.square(self._contacts(state)).sum((1, 2))
        total: Floats = reward - cost
        return total

    def _contacts(self, state: list[Floats]) -> Floats:
        return state[3].clip(*self.env._contact_force_range)


def _within(values: Floats, bounds: tuple[float, float]) -> Bools:
    return (bounds[0] < values) & (values < bounds[1])
