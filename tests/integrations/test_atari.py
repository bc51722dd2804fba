"""Atari games as the learner takes them."""

from typing import Any

import numpy as np
import pytest

gymnasium = pytest.importorskip("gymnasium")
atari = pytest.importorskip("steelyard.integrations.atari")
pytestmark = pytest.mark.rl

FIRE = 1


@pytest.fixture(scope="module")
def envs() -> Any:
    made = atari.make_atari_env("ALE/Breakout-v5", 2)
    yield made
    made.close()


def play(envs: Any, seed: int, steps: int = 60) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    frames = [envs.reset(seed=seed)[0].copy()]
    for _ in range(steps):
        frames.append(envs.step(generator.integers(0, 4, size=2))[0].copy())
    return frames


def test_observations_are_four_grey_frames_of_bytes(envs: Any) -> None:
    observations, _ = envs.reset(seed=0)
    assert observations.shape == (2, 4, 84, 84)
    assert observations.dtype == np.uint8
    assert observations.max() > 0
    assert envs.single_action_space.n == 4
    assert envs.metadata["autoreset_mode"] is gymnasium.vector.AutoresetMode.DISABLED


def test_each_step_brings_one_new_frame(envs: Any) -> None:
    before = envs.reset(seed=0)[0].copy()
    after = envs.step(np.full(2, FIRE))[0]
    assert np.array_equal(after[:, :3], before[:, 1:])


def test_a_step_lasts_four_frames_of_the_game(envs: Any) -> None:
    envs.reset(seed=0)
    ale = envs.envs[0].unwrapped.ale
    before = ale.getEpisodeFrameNumber()
    envs.step(np.full(2, FIRE))
    assert ale.getEpisodeFrameNumber() - before == atari.FRAME_SKIP
    assert ale.getFloat("repeat_action_probability") == 0.25


def test_a_seed_decides_the_whole_game_with_its_sticky_actions(envs: Any) -> None:
    first, again, other = play(envs, 3), play(envs, 3), play(envs, 4)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_copies_with_different_seeds_begin_differently(envs: Any) -> None:
    frames = play(envs, 3, steps=20)
    assert any(not np.array_equal(frame[0], frame[1]) for frame in frames)


def test_a_partial_reset_leaves_the_other_copy_alone(envs: Any) -> None:
    play(envs, 3, steps=10)
    before = envs.step(np.full(2, FIRE))[0].copy()
    mask = np.array([True, False])
    after, _ = envs.reset(seed=[9, 9], options={"reset_mask": mask})
    assert np.array_equal(after[1], before[1])
    assert not np.array_equal(after[0], before[0])


@pytest.mark.parametrize("num_envs", [0, -1])
def test_a_number_of_copies_below_one_is_named(num_envs: int) -> None:
    with pytest.raises(ValueError, match="num_envs must be >= 1"):
        atari.make_atari_env("ALE/Pong-v5", num_envs)


@pytest.mark.parametrize(
    "env_id", ["ALE/Pongg-v5", "ALE/Pong-v99", "ALE/Pong v5", "CartPole-v1", ""]
)
def test_an_unknown_game_is_named(env_id: str) -> None:
    with pytest.raises(ValueError, match=f"game.*{env_id}"):
        atari.make_atari_env(env_id, 1)
