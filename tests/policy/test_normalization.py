"""Running moments equal those of all rows at once, and survive storage."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from steelyard.policy import ObservationNormalizer, RewardNormalizer, RunningMoments


def stored(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any),
    shift=st.floats(-1e3, 1e3),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_moments_merged_batch_by_batch_are_those_of_all_rows(
    sizes: list[int], shift: float, seed: int
) -> None:
    batches = [np.random.default_rng(seed).normal(shift, 2.0, (n, 3)) for n in sizes]
    moments = RunningMoments((3,))
    for batch in batches:
        moments.update(batch)
    rows = np.concatenate(batches)
    assert moments.count == len(rows)
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(moments.variance, rows.var(0), rtol=1e-9, atol=1e-7)


def test_float32_rows_far_from_zero_keep_their_variance() -> None:
    rows = (1e4 + np.random.default_rng(0).normal(size=(1000, 1))).astype(np.float32)
    moments = RunningMoments((1,))
    for batch in np.split(rows, 100):
        moments.update(batch)
    np.testing.assert_allclose(moments.variance, rows.astype(np.float64).var(0), rtol=1e-6)


def test_observations_are_centred_scaled_and_clipped() -> None:
    rows = np.random.default_rng(0).normal(5.0, 3.0, (500, 2))
    normalizer = ObservationNormalizer((2,))
    normalizer.update(rows)
    expected = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-8)
    np.testing.assert_allclose(normalizer(rows), expected, rtol=1e-9, atol=1e-9)
    assert normalizer(np.array([[1e6, -1e6]])).tolist() == [[10.0, -10.0]]


def test_a_constant_observation_becomes_zero() -> None:
    normalizer = ObservationNormalizer((1,))
    normalizer.update(np.full((4, 1), 7.0))
    assert normalizer(np.array([[7.0]])).tolist() == [[0.0]]


def plain_scaling(
    rewards: NDArray[np.float64], done: NDArray[np.bool_], gamma: float
) -> NDArray[np.float64]:
    """Rewards ``[T, B]`` over the deviation of every discounted return seen up to each step."""
    seen: list[float] = []
    running, scaled = np.zeros(rewards.shape[1]), np.zeros_like(rewards)
    for t, reward in enumerate(rewards):
        running = running * gamma + reward
        seen += running.tolist()
        scaled[t] = np.clip(reward / np.sqrt(np.var(seen) + 1e-8), -10, 10)
        running = np.where(done[t], 0.0, running)
    return scaled


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_rewards_are_divided_by_the_deviation_of_the_discounted_return(gamma: float) -> None:
    generator = np.random.default_rng(0)
    rewards, done = generator.normal(1.0, 3.0, (50, 3)), generator.random((50, 3)) < 0.1
    normalizer = RewardNormalizer(3, gamma=gamma)
    scaled = np.stack([normalizer(r, d) for r, d in zip(rewards, done, strict=True)])
    np.testing.assert_allclose(scaled, plain_scaling(rewards, done, gamma), rtol=1e-9)


def test_steps_that_only_reset_leave_the_moments_alone() -> None:
    normalizer = RewardNormalizer(2, gamma=0.5)
    none = np.zeros(2, dtype=np.bool_)
    normalizer(np.array([1.0, 3.0]), none)
    normalizer(np.array([0.0, 5.0]), none, np.array([False, True]))
    assert normalizer.moments.count == 3
    np.testing.assert_allclose(normalizer.moments.mean, np.mean([1.0, 3.0, 6.5]))


@pytest.mark.parametrize("gamma", [-0.1, 1.0, float("nan")])
def test_a_discount_without_a_finite_return_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma"):
        RewardNormalizer(2, gamma=gamma)


def test_a_stored_normalizer_goes_on_as_if_never_stored() -> None:
    generator = np.random.default_rng(0)
    rows, done = generator.normal(size=(20, 3)), generator.random((20, 3)) < 0.2
    observations, rewards = ObservationNormalizer((3,)), RewardNormalizer(3, gamma=0.9)
    for row, end in zip(rows[:10], done[:10], strict=True):
        observations.update(row[None])
        rewards(row, end)
    others = ObservationNormalizer((3,)), RewardNormalizer(3, gamma=0.9)
    for new, old in zip(others, (observations, rewards), strict=True):
        new.load_state_dict(stored(old.state_dict()))
    for row, end in zip(rows[10:], done[10:], strict=True):
        for normalizer in (observations, others[0]):
            normalizer.update(row[None])
        assert np.array_equal(observations(row), others[0](row))
        assert np.array_equal(rewards(row, end), others[1](row, end))


def test_a_state_is_a_snapshot() -> None:
    normalizer = RewardNormalizer(1, gamma=0.9)
    normalizer(np.ones(1), np.zeros(1, dtype=np.bool_))
    state = normalizer.state_dict()
    normalizer(np.ones(1), np.zeros(1, dtype=np.bool_))
    assert state["running"].tolist() == [1.0]
    assert state["moments"]["count"] == 1


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: RunningMoments(3), TypeError, "shape"),
        (lambda: RunningMoments((2.5,)), TypeError, "shape"),
        (lambda: RunningMoments((-1,)), ValueError, "shape"),
        (lambda: RunningMoments((2,)).update([[1.0, 2.0]]), TypeError, "batch"),
        (lambda: RunningMoments((2,)).update(np.array([["a", "b"]])), TypeError, "batch"),
        (lambda: RunningMoments((2,)).update(np.zeros((4, 1))), ValueError, "batch"),
        (lambda: ObservationNormalizer((2,))(np.zeros((4, 3))), ValueError, "observations"),
        (lambda: ObservationNormalizer((2,))(None), TypeError, "observations"),
        (lambda: RewardNormalizer(2.5, gamma=0.9), TypeError, "num_envs"),
        (lambda: RewardNormalizer(-1, gamma=0.9), ValueError, "num_envs"),
        (lambda: scaled(rewards=torch.zeros(2)), TypeError, "rewards"),
        (lambda: scaled(rewards=np.zeros(3)), ValueError, "rewards"),
        (lambda: scaled(done=np.zeros(2, dtype=np.int64)), TypeError, "done"),
        (lambda: scaled(done=np.zeros((2, 1), dtype=np.bool_)), ValueError, "done"),
        (lambda: scaled(valid=np.ones(3, dtype=np.bool_)), ValueError, "valid"),
    ],
)
def test_wrong_arguments_are_named(call: Any, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=rf"^{named} must"):
        call()


def scaled(**changed: Any) -> NDArray[np.float64]:
    step = {"rewards": np.zeros(2), "done": np.zeros(2, dtype=np.bool_)} | changed
    return RewardNormalizer(2, gamma=0.5)(**step)


def test_a_single_observation_is_normalised_like_a_row() -> None:
    normalizer = ObservationNormalizer((2,))
    normalizer.update(np.array([[0.0, 1.0], [2.0, 5.0]]))
    row = np.array([3.0, 3.0])
    np.testing.assert_array_equal(normalizer(row), normalizer(row[None])[0])
