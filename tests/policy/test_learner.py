"""The learner learns, repeats itself from its seed, goes on exactly from a file, and says no."""

import io
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from steelyard.policy import (
    BPO,
    PPO,
    Objective,
    OnPolicyLearner,
    Samples,
    TrainingSettings,
    gae,
)

gymnasium = pytest.importorskip("gymnasium")
vector = pytest.importorskip("gymnasium.vector")
mujoco = pytest.importorskip("steelyard.integrations.mujoco")
atari = pytest.importorskip("steelyard.integrations.atari")
pytestmark = pytest.mark.rl

SMALL = TrainingSettings(rollout_steps=5, epochs=2, minibatch=8, hidden=(8,), learning_rate=1e-3)


def make_learner(
    envs: Any = None,
    objective: Objective | None = None,
    settings: TrainingSettings = SMALL,
    seed: int = 0,
) -> OnPolicyLearner:
    envs = mujoco.make_vector_env("CartPole-v1", 3) if envs is None else envs
    return OnPolicyLearner(envs, objective or BPO(), settings, seed=seed)


def parameters_of(learner: OnPolicyLearner) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in learner.policy.parameters()])


@pytest.mark.parametrize(
    "objective", [PPO(), BPO(temperature=0.1), BPO(threshold="value")], ids=["ppo", "bpo", "value"]
)
def test_cart_pole_is_learned(objective: Objective) -> None:
    settings = TrainingSettings(rollout_steps=32, epochs=4, minibatch=64, learning_rate=2e-3)
    learner = make_learner(mujoco.make_vector_env("CartPole-v1", 8), objective, settings)
    first = learner.advance()["return"]
    best = 0.0
    while learner.step < 12_000 and best < 100:
        best = max(best, learner.advance()["return"])
    assert first < 40, "a policy that acts at random falls after about 20 steps"
    assert best >= 100


def test_the_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    first, again, other = (make_learner(seed=seed) for seed in (0, 0, 1))
    rows = [[learner.advance() for _ in range(4)] for learner in (first, again, other)]
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]
    assert torch.equal(parameters_of(first), parameters_of(again))


def stored(learner: OnPolicyLearner) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(learner.state_dict(), file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def assert_goes_on_exactly(make: Any, rollouts: int) -> set[bool]:
    """Store after each rollout, go on in a new learner; return how the episodes stood."""
    unbroken, standing = make(0), set()
    for _ in range(rollouts):
        state = stored(unbroken)
        standing |= {length > 0 for length in state["collector"]["lengths"].tolist()}
        resumed = make(1)
        resumed.load_state_dict(state)
        assert resumed.step == unbroken.step
        assert unbroken.advance() == resumed.advance()
        assert torch.equal(parameters_of(unbroken), parameters_of(resumed))
        resumed.close()
    unbroken.close()
    return standing


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Hopper-v5"])
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalised"])
def test_a_stored_learner_goes_on_exactly_at_any_point(env_id: str, normalize: bool) -> None:
    settings = replace(
        SMALL,
        rollout_steps=7,
        anneal=True,
        total_steps=1000,
        normalize_observations=normalize,
        normalize_rewards=normalize,
    )

    def make(seed: int) -> OnPolicyLearner:
        return make_learner(mujoco.make_vector_env(env_id, 4), BPO(), settings, seed)

    assert assert_goes_on_exactly(make, 12) == {False, True}


def test_a_stored_learner_of_an_atari_game_goes_on_exactly() -> None:
    settings = replace(SMALL, rollout_steps=8, epochs=1)

    def make(seed: int) -> OnPolicyLearner:
        return make_learner(atari.make_atari_env("ALE/Breakout-v5", 2), PPO(), settings, seed)

    assert True in assert_goes_on_exactly(make, 2)


@pytest.mark.parametrize("kind", ["dense", "convolutional"])
def test_a_state_is_a_snapshot_to_which_the_learner_may_go_back(kind: str) -> None:
    learner = make_learner(make_dots(1) if kind == "convolutional" else None, PPO())
    learner.advance()
    state = learner.state_dict()
    row, after = learner.advance(), parameters_of(learner)
    learner.load_state_dict(state)
    assert learner.advance() == row
    assert torch.equal(parameters_of(learner), after)


class Dots(gymnasium.Env):  # type: ignore[misc, name-defined]
    """Small images and vectors that end after five steps."""

    def __init__(self, observation: Any, action: Any, reward: float = 1.0) -> None:
        self.observation_space, self.action_space = observation, action
        self.reward = reward

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        self.observation_space.seed(int(self.np_random.integers(1 << 30)))
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        self.time += 1
        return self.observation_space.sample(), self.reward, self.time == 5, False, {}


IMAGE = gymnasium.spaces.Box(0, 255, (1, 36, 36), dtype=np.uint8)
VECTOR = gymnasium.spaces.Box(-1, 1, (2,))


def make_dots(
    count: int = 2,
    observation: Any = IMAGE,
    action: Any = None,
    *,
    reward: float = 1.0,
    mode: Any = vector.AutoresetMode.DISABLED,
) -> Any:
    action = gymnasium.spaces.Discrete(2) if action is None else action
    make = [lambda: Dots(observation, action, reward)] * count
    return vector.SyncVectorEnv(make, autoreset_mode=mode)


def capture(learner: OnPolicyLearner) -> list[Samples]:
    """Replace the updater by one that keeps what it is given."""
    kept: list[Samples] = []
    learner.updater = SimpleNamespace(epoch=lambda samples, *_: kept.append(samples))
    return kept


def test_steps_that_only_reset_are_left_out_of_the_samples() -> None:
    settings = replace(SMALL, rollout_steps=12, epochs=1)
    for mode, expected in (("NEXT_STEP", 20), ("SAME_STEP", 24), ("DISABLED", 24)):
        envs = make_dots(observation=VECTOR, mode=vector.AutoresetMode[mode])
        learner = make_learner(envs, settings=settings)
        kept = capture(learner)
        learner.advance()
        assert {len(field) for field in kept[0]} == {expected}, mode


def test_samples_are_the_rollouts_with_their_generalized_advantages() -> None:
    settings = replace(SMALL, epochs=3, gamma=0.9, gae_lambda=0.8)
    learner = make_learner(settings=settings)
    kept, rollouts = capture(learner), []
    collect = learner.collector.collect
    learner.collector.collect = lambda: rollouts.append(collect()) or rollouts[-1]  # type: ignore[method-assign, func-returns-value]
    learner.advance()
    (rollout,) = rollouts
    advantages, returns = gae(
        rollout.rewards,
        rollout.values,
        rollout.next_values,
        rollout.terminated,
        rollout.truncated,
        gamma=0.9,
        gae_lambda=0.8,
    )
    assert len(kept) == 3
    for given, expected in zip(
        kept[0],
        (rollout.observations, rollout.actions, rollout.logprobs, advantages, returns),
        strict=True,
    ):
        assert torch.equal(given, expected.flatten(0, 1))


def test_a_rollout_without_a_valid_step_changes_nothing() -> None:
    envs = make_dots(1, VECTOR, mode=vector.AutoresetMode.NEXT_STEP)
    learner = make_learner(envs, settings=replace(SMALL, rollout_steps=1))
    for _ in range(5):
        learner.advance()
    before = parameters_of(learner)
    assert learner.advance() == {"return": 5.0}
    assert torch.equal(before, parameters_of(learner))


def test_the_learning_rate_is_lowered_to_zero() -> None:
    learner = make_learner(settings=replace(SMALL, anneal=True, total_steps=30))
    rates: list[float] = []
    learner.updater = SimpleNamespace(epoch=lambda _, __, rate: rates.append(rate))
    for _ in range(3):
        learner.advance()
    assert rates == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4, 0, 0])


def test_a_row_tells_how_far_the_policy_moved() -> None:
    still = make_learner(settings=replace(SMALL, learning_rate=1e-12)).advance()
    assert still["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert still["max_ratio"] == pytest.approx(1, abs=1e-5)
    assert still["out_of_band"] == 0
    assert still["entropy"] == pytest.approx(np.log(2), abs=1e-3)
    moved = make_learner(settings=replace(SMALL, learning_rate=0.3)).advance()
    assert moved["approx_kl"] > 0.01
    assert moved["out_of_band"] > 0


def test_the_return_is_absent_before_the_first_finished_episode() -> None:
    learner = make_learner(make_dots(observation=VECTOR), settings=replace(SMALL, rollout_steps=3))
    assert "return" not in learner.advance()
    assert learner.advance()["return"] == 5.0


def test_steps_are_counted_over_all_copies() -> None:
    learner = make_learner()
    learner.advance()
    learner.advance()
    assert learner.step == 2 * 5 * 3


@pytest.mark.parametrize("kind", ["dense", "convolutional"])
def test_pixels_and_vectors_choose_their_network(kind: str) -> None:
    learner = make_learner(make_dots(observation=IMAGE if kind == "convolutional" else VECTOR))
    layers = [type(module).__name__ for module in learner.policy.modules()]
    assert ("Conv2d" in layers) == (kind == "convolutional")
    assert np.isfinite(list(learner.advance().values())).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_reward_that_is_not_finite_is_named(bad: float, normalize: bool) -> None:
    settings = replace(SMALL, normalize_rewards=normalize)
    learner = make_learner(make_dots(observation=VECTOR, reward=bad), settings=settings)
    with pytest.raises(FloatingPointError, match="rewards of environment 0"):
        learner.advance()


def test_a_parameter_that_is_not_finite_is_named() -> None:
    learner = make_learner()
    with torch.no_grad():
        learner.policy.get_parameter("critic.0.bias").fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"parameter .* is not finite"):
        learner.advance()


@pytest.mark.parametrize(
    "action",
    [
        gymnasium.spaces.MultiBinary(2),
        gymnasium.spaces.MultiDiscrete([2, 2]),
        gymnasium.spaces.Box(-1, 1, (2, 2)),
        gymnasium.spaces.Dict({"push": gymnasium.spaces.Discrete(2)}),
    ],
    ids=repr,
)
def test_an_action_space_of_another_kind_is_refused(action: Any) -> None:
    with pytest.raises(ValueError, match="action space must be"):
        make_learner(make_dots(observation=VECTOR, action=action))


@pytest.mark.parametrize(
    "observation",
    [
        gymnasium.spaces.Discrete(3),
        gymnasium.spaces.Box(-1, 1, (2, 2)),
        gymnasium.spaces.Dict({"place": VECTOR}),
    ],
    ids=repr,
)
def test_an_observation_space_of_another_kind_is_refused(observation: Any) -> None:
    with pytest.raises(ValueError, match="observations must be vectors or images"):
        make_learner(make_dots(observation=observation))


def test_environments_that_reset_themselves_train_but_cannot_be_stored() -> None:
    learner = make_learner(make_dots(observation=VECTOR, mode=vector.AutoresetMode.NEXT_STEP))
    learner.advance()
    with pytest.raises(RuntimeError, match=r"exact resume needs .*DISABLED, got NEXT_STEP"):
        learner.state_dict()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rollout_steps", 0),
        ("epochs", 0),
        ("minibatch", 0),
        ("total_steps", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("gamma", 1.1),
        ("gae_lambda", -0.1),
        ("activation", "gelu"),
    ],
)
def test_a_setting_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        replace(SMALL, **{name: value})


def test_a_negative_seed_is_named() -> None:
    with pytest.raises(ValueError, match="seed must be >= 0"):
        make_learner(seed=-1)


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"envs": "CartPole-v1"}, TypeError),
        ({"objective": "ppo"}, TypeError),
        ({"settings": {"epochs": 2}}, TypeError),
        ({"seed": 2.5}, TypeError),
        ({"seed": -1}, ValueError),
    ],
)
def test_a_learner_names_a_wrong_argument(changed: dict[str, Any], error: type[Exception]) -> None:
    learner = make_learner()
    given = {"envs": learner.envs, "objective": PPO(), "settings": SMALL, "seed": 0} | changed
    with pytest.raises(error, match=f"^{next(iter(changed))} must"):
        OnPolicyLearner(**given)
