"""The batched tasks give Gymnasium's numbers, bit by bit."""

from typing import Any

import numpy as np
import pytest

gymnasium = pytest.importorskip("gymnasium")
mujoco = pytest.importorskip("steelyard.integrations.mujoco")
pytestmark = pytest.mark.rl

COPIES = 3
SHOW = {"exclude_current_positions_from_observation": False}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((env_id, {}) for env_id in mujoco.SUPPORTED),
    *((env_id, SHOW) for env_id in mujoco.SUPPORTED if env_id != "InvertedPendulum-v5"),
    ("Hopper-v5", {"terminate_when_unhealthy": False}),
    ("Hopper-v5", {"healthy_state_range": (-3.0, 3.0), "healthy_reward": 0.3}),
    ("Hopper-v5", {"healthy_z_range": (1.1, 1.3), "healthy_angle_range": (-0.05, 0.05)}),
    ("Hopper-v5", {"forward_reward_weight": 2.0, "ctrl_cost_weight": 0.5}),
    ("Hopper-v5", {"frame_skip": 2, "reset_noise_scale": 0.1}),
    ("Walker2d-v5", {"terminate_when_unhealthy": False}),
    ("Walker2d-v5", {"healthy_z_range": (1.1, 1.3), "healthy_angle_range": (-0.1, 0.1)}),
    ("HalfCheetah-v5", {"ctrl_cost_weight": 0.7, "forward_reward_weight": 0.2}),
    ("Swimmer-v5", {"ctrl_cost_weight": 0.7, "frame_skip": 2}),
    ("Ant-v5", {"include_cfrc_ext_in_observation": False}),
    ("Ant-v5", {"terminate_when_unhealthy": False, "contact_cost_weight": 0.1}),
    ("Ant-v5", {"healthy_z_range": (0.5, 0.8), "contact_force_range": (-0.2, 0.3)}),
    ("Ant-v5", {"main_body": 2, "ctrl_cost_weight": 0.1}),
    ("InvertedPendulum-v5", {"reset_noise_scale": 0.15}),
    ("Hopper-v5", {"max_episode_steps": 9}),
    ("HalfCheetah-v5", {"max_episode_steps": 40}),
    ("Ant-v5", {"max_episode_steps": 1}),
]


def assert_same_run(env_id: str, steps: int, *, seed: int = 0, **kwargs: Any) -> dict[str, int]:
    """Step both kinds side by side with random actions; return how the episodes ended."""
    fast, plain = (
        mujoco.make_vector_env(env_id, COPIES, fast=fast, **kwargs) for fast in (True, False)
    )
    assert isinstance(fast, mujoco.MujocoVectorEnv)
    assert isinstance(plain, gymnasium.vector.SyncVectorEnv)
    generator = np.random.default_rng(seed)
    space = fast.single_action_space
    assert np.array_equal(fast.reset(seed=seed)[0], plain.reset(seed=seed)[0])
    ended = {"terminated": 0, "truncated": 0}
    for step in range(steps):
        shape = (COPIES, *space.shape)
        actions = generator.uniform(1.5 * space.low, 1.5 * space.high, shape).astype(np.float32)
        pairs = zip(fast.step(actions)[:4], plain.step(actions)[:4], strict=True)
        done = np.zeros(COPIES, dtype=np.bool_)
        for name, (mine, theirs) in zip(
            ("observation", "reward", "terminated", "truncated"), pairs, strict=True
        ):
            assert mine.dtype == theirs.dtype
            assert np.array_equal(mine, theirs), f"{name} at step {step}"
            if name in ended:
                ended[name] += int(mine.sum())
                done |= mine
        # Also copies that are in the middle of an episode.
        mask = done | (generator.random(COPIES) < 0.01)
        if mask.any():
            seeds = generator.integers(1 << 30, size=COPIES).tolist()
            resets = [
                envs.reset(seed=seeds, options={"reset_mask": mask.copy()})[0]
                for envs in (fast, plain)
            ]
            assert np.array_equal(*resets)
    for envs in (fast, plain):
        envs.close()
    return ended


@pytest.mark.parametrize(("env_id", "kwargs"), CASES, ids=str)
def test_every_number_equals_gymnasiums(env_id: str, kwargs: dict[str, Any]) -> None:
    ended = assert_same_run(env_id, 150, **kwargs)
    limit = kwargs.get("max_episode_steps")
    assert (ended["truncated"] > 0) == (limit is not None)
    falls = env_id in ("Hopper-v5", "Walker2d-v5", "InvertedPendulum-v5")
    if falls and limit is None and kwargs.get("terminate_when_unhealthy", True):
        assert ended["terminated"] > 0


@pytest.mark.parametrize("env_id", mujoco.SUPPORTED)
def test_the_default_time_limit_is_gymnasiums(env_id: str) -> None:
    limit = gymnasium.spec(env_id).max_episode_steps
    envs = mujoco.make_vector_env(env_id, 1, **unending(env_id))
    envs.reset(seed=0)
    actions = np.zeros(envs.action_space.shape, dtype=np.float32)
    cut = [bool(envs.step(actions)[3][0]) for _ in range(limit)]
    assert cut.index(True) == limit - 1
    envs.reset(seed=0)
    assert not envs.step(actions)[3][0]


def unending(env_id: str) -> dict[str, Any]:
    walks = env_id in ("Ant-v5", "Hopper-v5", "Walker2d-v5")
    return {"terminate_when_unhealthy": False, "frame_skip": 1} if walks else {"frame_skip": 1}


def test_a_time_limit_may_be_taken_off() -> None:
    envs = mujoco.make_vector_env("InvertedPendulum-v5", 1, max_episode_steps=-1)
    envs.reset(seed=0)
    actions = np.zeros((1, 1), dtype=np.float32)
    assert not any(envs.step(actions)[3][0] for _ in range(1100))


def test_spaces_and_spec_are_gymnasiums() -> None:
    for env_id in mujoco.SUPPORTED:
        fast, plain = (mujoco.make_vector_env(env_id, 2, fast=fast) for fast in (True, False))
        for name in ("observation", "action"):
            for space in (f"{name}_space", f"single_{name}_space"):
                assert getattr(fast, space) == getattr(plain, space)
        assert fast.num_envs == 2
        assert fast.spec.id == env_id
        assert fast.metadata["autoreset_mode"] is gymnasium.vector.AutoresetMode.DISABLED


def test_earlier_observations_are_not_overwritten() -> None:
    envs = mujoco.make_vector_env("Hopper-v5", 2)
    first, _ = envs.reset(seed=0)
    kept = first.copy()
    second = envs.step(np.ones((2, 3), dtype=np.float32))[0]
    copy = second.copy()
    envs.step(np.ones((2, 3), dtype=np.float32))
    envs.reset(seed=1, options={"reset_mask": np.array([True, False])})
    assert np.array_equal(first, kept)
    assert np.array_equal(second, copy)


def test_a_partial_reset_leaves_the_other_copies_alone() -> None:
    envs, reference = (mujoco.make_vector_env("Hopper-v5", 2) for _ in range(2))
    actions = np.ones((2, 3), dtype=np.float32)
    for each in (envs, reference):
        each.reset(seed=0)
        before = each.step(actions)[0]
    observations, _ = envs.reset(seed=9, options={"reset_mask": np.array([True, False])})
    assert np.array_equal(observations[1], before[1])
    assert not np.array_equal(observations[0], before[0])
    assert np.array_equal(envs.step(actions)[0][1], reference.step(actions)[0][1])


@pytest.mark.parametrize("make", [mujoco.make_vector_env, mujoco.MujocoVectorEnv])
@pytest.mark.parametrize("num_envs", [0, -1])
def test_a_number_of_copies_below_one_is_named(make: Any, num_envs: int) -> None:
    with pytest.raises(ValueError, match="num_envs must be >= 1"):
        make("Hopper-v5", num_envs)


@pytest.mark.parametrize(
    ("env_id", "hint"),
    [
        ("Hoper-v5", "Hopper"),
        ("CartPole-v99", "v1"),
        ("nowhere/Hopper-v5", "nowhere"),
        ("Hopper v5", "Malformed"),
        ("", "Malformed"),
    ],
)
def test_an_unknown_id_is_named_with_a_hint(env_id: str, hint: str) -> None:
    with pytest.raises(ValueError, match=rf"{env_id}.*{hint}"):
        mujoco.make_vector_env(env_id, 1)


def test_a_task_without_a_batched_form_is_named_and_made_plainly() -> None:
    with pytest.raises(ValueError, match=r"env_id must be one of Ant-v5.*'CartPole-v1'"):
        mujoco.MujocoVectorEnv("CartPole-v1", 1)
    envs = mujoco.make_vector_env("CartPole-v1", 2)
    assert isinstance(envs, gymnasium.vector.SyncVectorEnv)


@pytest.mark.parametrize("fast", [True, False])
def test_a_misspelled_setting_is_refused(fast: bool) -> None:
    with pytest.raises(TypeError, match="healthy_rewrd"):
        mujoco.make_vector_env("Hopper-v5", 1, fast=fast, healthy_rewrd=1.0)


@pytest.mark.parametrize("shape", [(2, 1), (2, 4), (1, 3), (3, 3), (3,), (2, 3, 1)], ids=str)
def test_actions_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    envs = mujoco.make_vector_env("Hopper-v5", 2)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=r"actions must have shape \[2, 3\]"):
        envs.step(np.zeros(shape, dtype=np.float32))
