"""Rollouts from environments whose observation tells the step, so that every value is known."""

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from steelyard.policy import (
    ActorCritic,
    ObservationNormalizer,
    RewardNormalizer,
    Rollout,
    RolloutCollector,
    mlp_actor_critic,
)

gymnasium = pytest.importorskip("gymnasium")
vector = pytest.importorskip("gymnasium.vector")
pytestmark = pytest.mark.rl

Mode = vector.AutoresetMode
MODES = list(Mode)
SHIFT = 100.0


class Counter(gymnasium.Env):  # type: ignore[misc, name-defined]
    """Observes ``100 * episode + step`` and is rewarded with the action it was given."""

    def __init__(self, length: int, *, cut: bool, discrete: bool = False) -> None:
        self.length, self.cut = length, cut
        self.observation_space = gymnasium.spaces.Box(-1e9, 1e9, (1,))
        box = gymnasium.spaces.Box(-0.5, 0.5, (1,))
        self.action_space = gymnasium.spaces.Discrete(3) if discrete else box
        self.episode, self.time = -1, 0

    def observe(self) -> Any:
        return np.array([SHIFT * self.episode + self.time], dtype=np.float32)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.episode, self.time = self.episode + 1, 0
        return self.observe(), {}

    def step(self, action: Any) -> Any:
        self.time += 1
        ended = self.time == self.length
        reward = float(np.asarray(action).reshape(-1)[0])
        return self.observe(), reward, ended and not self.cut, ended and self.cut, {}


def make_counters(mode: Any = Mode.DISABLED, *, asynchronous: bool = False, **kind: Any) -> Any:
    """One environment cut after 3 steps, one that terminates after 5."""
    makers = [lambda: Counter(3, cut=True, **kind), lambda: Counter(5, cut=False, **kind)]
    if asynchronous:
        return vector.AsyncVectorEnv(makers, autoreset_mode=mode, context="fork")
    return vector.SyncVectorEnv(makers, autoreset_mode=mode, copy=False)


def make_policy(*, discrete: bool = False, std: float = 1.0) -> ActorCritic:
    """The critic's value of an observation is the observation."""
    size = 3 if discrete else 1
    actor, critic = nn.Sequential(nn.Linear(1, size)), nn.Sequential(nn.Linear(1, 1))
    for network in (actor, critic):
        nn.init.zeros_(network[0].weight)
        nn.init.zeros_(network[0].bias)
    nn.init.ones_(critic[0].weight)
    return ActorCritic(
        nn.Identity(),
        actor,
        critic,
        action_size=size,
        continuous=not discrete,
        log_std=float(np.log(std)),
    )


def joined(rollouts: list[Rollout]) -> SimpleNamespace:
    names = ("observations", "rewards", "values", "next_values", "terminated", "truncated", "valid")
    return SimpleNamespace(
        **{name: torch.cat([getattr(r, name) for r in rollouts]) for name in names},
        returns=[x for r in rollouts for x in r.episode_returns],
        lengths=[x for r in rollouts for x in r.episode_lengths],
    )


@pytest.mark.parametrize("discrete", [False, True], ids=["box", "discrete"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_the_next_value_is_that_of_the_state_reached_before_any_reset(
    mode: Any, asynchronous: bool, discrete: bool
) -> None:
    envs = make_counters(mode, asynchronous=asynchronous, discrete=discrete)
    collector = RolloutCollector(envs, make_policy(discrete=discrete), 4, seed=0)
    rollout = joined([collector.collect() for _ in range(4)])
    envs.close()
    seen = rollout.observations[..., 0]
    assert torch.equal(rollout.values, seen)
    assert torch.equal(rollout.next_values[rollout.valid], seen[rollout.valid] + 1)
    step = seen % SHIFT
    expected = torch.stack([step[:, 0] == 2, step[:, 1] == 4], 1) & rollout.valid
    assert torch.equal(rollout.truncated | rollout.terminated, expected)
    assert not rollout.truncated[:, 1].any()
    assert not rollout.terminated[:, 0].any()
    assert sorted(set(rollout.lengths)) == [3, 5]
    assert (torch.diff(seen, dim=0) >= 1).all(), "no observation may be seen twice"


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_only_the_step_that_resets_is_invalid(mode: Any) -> None:
    collector = RolloutCollector(make_counters(mode), make_policy(), 7, seed=0)
    rollout = joined([collector.collect() for _ in range(3)])
    done = rollout.truncated | rollout.terminated
    resets = torch.cat((torch.zeros(1, 2, dtype=torch.bool), done[:-1]))
    assert torch.equal(rollout.valid, ~resets if mode is Mode.NEXT_STEP else resets | True)
    assert not rollout.rewards[~rollout.valid].any()


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_episode_returns_are_sums_of_raw_rewards(mode: Any) -> None:
    collector = RolloutCollector(
        make_counters(mode),
        make_policy(),
        30,
        seed=0,
        reward_normalizer=RewardNormalizer(2, gamma=0.9),
    )
    rollout = collector.collect()
    rewards = rollout.actions[..., 0].clamp(-0.5, 0.5)
    rewards[~rollout.valid] = 0
    ended, totals = [], np.zeros(2)
    for t in range(30):
        totals += rewards[t].numpy()
        for i in np.flatnonzero((rollout.terminated | rollout.truncated)[t]):
            ended.append(totals[i])
            totals[i] = 0
    np.testing.assert_allclose(rollout.episode_returns, ended, atol=1e-6)


def test_actions_are_clipped_for_the_environment_only() -> None:
    policy = make_policy(std=3.0)
    rollout = RolloutCollector(make_counters(), policy, 40, seed=0).collect()
    actions = rollout.actions[..., 0]
    assert (actions.abs() > 0.5).any()
    torch.testing.assert_close(rollout.rewards, actions.clamp(-0.5, 0.5))
    normal = torch.distributions.Normal(0.0, 3.0)
    torch.testing.assert_close(rollout.logprobs, normal.log_prob(actions))


@pytest.mark.parametrize("continuous", [True, False])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_the_stored_logprob_and_value_are_the_policys(continuous: bool, activation: Any) -> None:
    policy = mlp_actor_critic(
        1, 1 if continuous else 3, continuous=continuous, activation=activation, critic_heads=2
    )
    envs = make_counters(discrete=not continuous)
    rollout = RolloutCollector(envs, policy, 20, seed=0).collect()
    logprobs, _, heads = policy.evaluate(rollout.observations, rollout.actions)
    torch.testing.assert_close(rollout.logprobs, logprobs.detach())
    torch.testing.assert_close(rollout.values, heads[..., 0].detach())
    assert not rollout.logprobs.requires_grad


def test_actions_follow_the_law_of_the_policy() -> None:
    policy = make_policy(discrete=True)
    policy.actor[0].bias.data = torch.tensor([0.1, 0.6, 0.3]).log()
    rollout = RolloutCollector(make_counters(discrete=True), policy, 3000, seed=0).collect()
    shares = rollout.actions.flatten().bincount() / 6000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.6, 0.3]), atol=0.02, rtol=0)


def test_observations_are_normalised_with_the_moments_of_all_seen_so_far() -> None:
    normalizer = ObservationNormalizer((1,))
    envs = make_counters(Mode.NEXT_STEP)
    collector = RolloutCollector(envs, make_policy(), 12, seed=0, observation_normalizer=normalizer)
    plain = RolloutCollector(make_counters(Mode.NEXT_STEP), make_policy(), 12, seed=0)
    raw, seen = plain.collect().observations.numpy(), collector.collect().observations.numpy()
    for t in range(12):
        past = raw[: t + 1].astype(np.float64)
        expected = (raw[t] - past.mean()) / np.sqrt(past.var() + 1e-8)
        np.testing.assert_allclose(seen[t], expected.clip(-10, 10), rtol=1e-5, atol=1e-6)


def test_observation_moments_equal_gymnasiums() -> None:
    wrapper = pytest.importorskip("gymnasium.wrappers.vector").NormalizeObservation
    wrapped, normalizer = wrapper(make_counters(Mode.NEXT_STEP)), ObservationNormalizer((1,))
    collector = RolloutCollector(
        make_counters(Mode.NEXT_STEP), make_policy(), 50, seed=0, observation_normalizer=normalizer
    )
    actions = collector.collect().actions.numpy().clip(-0.5, 0.5)
    wrapped.reset(seed=0)
    for action in actions:
        wrapped.step(action)
    # Gymnasium starts from a count of 1e-4 at mean 0 and accumulates in float32.
    np.testing.assert_allclose(normalizer.mean, wrapped.obs_rms.mean, rtol=1e-3)
    np.testing.assert_allclose(normalizer.variance, wrapped.obs_rms.var, rtol=1e-3)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_reward_moments_leave_out_steps_that_only_reset(mode: Any) -> None:
    normalizer = RewardNormalizer(2, gamma=0.5)
    collector = RolloutCollector(
        make_counters(mode), make_policy(), 20, seed=0, reward_normalizer=normalizer
    )
    rollout = collector.collect()
    rewards = rollout.actions[..., 0].clamp(-0.5, 0.5).double().numpy()
    done = (rollout.terminated | rollout.truncated).numpy()
    seen, running = [], np.zeros(2)
    for t in range(20):
        valid = rollout.valid[t].numpy()
        running = np.where(valid, running * 0.5 + rewards[t], 0.0)
        seen += running[valid].tolist()
        running = np.where(done[t], 0.0, running)
    assert normalizer.moments.count == len(seen)
    np.testing.assert_allclose(normalizer.moments.mean, np.mean(seen), rtol=1e-6)
    np.testing.assert_allclose(normalizer.moments.variance, np.var(seen), rtol=1e-6)


@pytest.mark.parametrize("discrete", [False, True], ids=["box", "discrete"])
def test_the_same_seed_gives_the_same_rollout_and_another_seed_another(discrete: bool) -> None:
    first, again, other = (
        RolloutCollector(
            make_counters(discrete=discrete), make_policy(discrete=discrete), 20, seed=seed
        ).collect()
        for seed in (0, 0, 1)
    )
    assert torch.equal(first.actions, again.actions)
    assert not torch.equal(first.actions, other.actions)


class Recorder:
    """A batched environment of no library, which says nothing about its autoreset."""

    num_envs = 2
    single_observation_space = gymnasium.spaces.Box(-1, 1, (1,))
    single_action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, *, at: int = -1, **faults: float) -> None:
        self.metadata: dict[str, Any] = {}
        self.at, self.faults, self.time = at, faults, -1

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        return np.zeros((2, 1), dtype=np.float32), {}

    def step(self, actions: Any) -> Any:
        self.time += 1
        observations = np.full((2, 1), 0.5, dtype=np.float32)
        rewards, never = np.ones(2, dtype=np.float32), np.zeros(2, dtype=np.bool_)
        if self.time == self.at:
            rewards[1] = self.faults.get("reward", 1.0)
            observations[1] = self.faults.get("observation", 0.5)
        return observations, rewards, never, never, {}


def test_an_environment_that_says_nothing_is_taken_to_reset_on_the_next_step() -> None:
    collector = RolloutCollector(Recorder(), make_policy_for_recorder(), 5, seed=0)
    rollout = collector.collect()
    assert rollout.valid.all()
    assert rollout.rewards.tolist() == [[1.0, 1.0]] * 5
    with pytest.raises(RuntimeError, match="NEXT_STEP"):
        collector.state_dict()


def make_policy_for_recorder() -> ActorCritic:
    return mlp_actor_critic(1, 2, continuous=False)


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalised"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["reward", "observation"])
@pytest.mark.parametrize("at", [0, 3, 4], ids=["first step", "middle", "last step"])
def test_a_number_that_is_not_finite_is_named_with_its_environment_and_step(
    name: str, bad: float, at: int, normalize: bool
) -> None:
    collector = RolloutCollector(
        Recorder(at=at, **{name: bad}),
        make_policy_for_recorder(),
        5,
        seed=0,
        observation_normalizer=ObservationNormalizer((1,)) if normalize else None,
        reward_normalizer=RewardNormalizer(2, gamma=0.9) if normalize else None,
    )
    with pytest.raises(FloatingPointError, match=f"{name}s of environment 1 .* step {at}"):
        collector.collect()


def with_spaces(**spaces: Any) -> Any:
    envs = Recorder()
    for name, space in spaces.items():
        setattr(envs, f"single_{name}_space", space)
    return envs


@pytest.mark.parametrize(
    "space",
    [
        gymnasium.spaces.MultiBinary(2),
        gymnasium.spaces.MultiDiscrete([2, 2]),
        gymnasium.spaces.Box(-1, 1, (2, 2)),
        gymnasium.spaces.Box(-1, 1, ()),
        gymnasium.spaces.Discrete(2, start=1),
        gymnasium.spaces.Dict(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("continuous", [True, False])
def test_an_action_space_of_another_kind_is_refused(space: Any, continuous: bool) -> None:
    policy = mlp_actor_critic(1, 2, continuous=continuous)
    with pytest.raises(ValueError, match="action space must be"):
        RolloutCollector(with_spaces(action=space), policy, 4, seed=0)


@pytest.mark.parametrize(
    ("space", "continuous"),
    [
        (gymnasium.spaces.Discrete(3), False),
        (gymnasium.spaces.Discrete(2), True),
        (gymnasium.spaces.Box(-1, 1, (2,)), False),
        (gymnasium.spaces.Box(-1, 1, (3,)), True),
    ],
)
def test_a_policy_that_does_not_fit_the_actions_is_refused(space: Any, continuous: bool) -> None:
    policy = mlp_actor_critic(1, 2, continuous=continuous)
    with pytest.raises(ValueError, match=r"policy has 2 .* actions, but the environments take"):
        RolloutCollector(with_spaces(action=space), policy, 4, seed=0)


def test_an_observation_normalizer_for_images_is_refused() -> None:
    envs = with_spaces(observation=gymnasium.spaces.Box(0, 255, (1, 36, 36), dtype=np.uint8))
    with pytest.raises(ValueError, match="observation_normalizer"):
        RolloutCollector(
            envs,
            make_policy_for_recorder(),
            4,
            seed=0,
            observation_normalizer=ObservationNormalizer((1, 36, 36)),
        )


def test_a_vector_of_bytes_is_an_ordinary_observation() -> None:
    envs = with_spaces(observation=gymnasium.spaces.Box(0, 255, (1,), dtype=np.uint8))
    observations = np.full((2, 1), 200, dtype=np.uint8)
    never = np.zeros(2, dtype=np.bool_)
    envs.reset = lambda **_: (observations, {})
    envs.step = lambda _: (observations, np.ones(2), never, never, {})
    rollout = RolloutCollector(envs, make_policy_for_recorder(), 4, seed=0).collect()
    assert rollout.observations.dtype == torch.float32
    assert (rollout.observations == 200).all()


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("seed", -1)])
def test_a_setting_out_of_range_is_named(name: str, value: int) -> None:
    settings = {"steps": 4, "seed": 0, name: value}
    with pytest.raises(ValueError, match=name):
        RolloutCollector(Recorder(), make_policy_for_recorder(), **settings)


def test_an_unknown_autoreset_mode_is_named() -> None:
    envs = Recorder()
    envs.metadata = {"autoreset_mode": "sometimes"}
    with pytest.raises(ValueError, match="autoreset_mode"):
        RolloutCollector(envs, make_policy_for_recorder(), 4, seed=0)


@pytest.mark.parametrize("mode", [Mode.NEXT_STEP, Mode.SAME_STEP], ids=lambda mode: mode.name)
def test_environments_that_reset_themselves_cannot_be_stored(mode: Any) -> None:
    collector = RolloutCollector(make_counters(mode), make_policy(), 4, seed=0)
    with pytest.raises(RuntimeError, match=f"DISABLED, got {mode.name}"):
        collector.state_dict()


def stored(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


class Walk(gymnasium.Env):  # type: ignore[misc, name-defined]
    """A random walk pushed by the actions, ended by its own dice: only its seed tells its path."""

    observation_space = gymnasium.spaces.Box(-1e9, 1e9, (1,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.place = self.np_random.normal(size=1)
        return self.place.astype(np.float32), {}

    def step(self, action: Any) -> Any:
        self.place = self.place + action + self.np_random.normal(size=1)
        dice = self.np_random.random()
        place = self.place.astype(np.float32)
        return place, float(self.place[0]), dice < 0.1, 0.1 < dice < 0.2, {}


def make_walks(*, asynchronous: bool = False) -> Any:
    if asynchronous:
        return vector.AsyncVectorEnv([Walk] * 3, autoreset_mode=Mode.DISABLED, context="fork")
    return vector.SyncVectorEnv([Walk] * 3, autoreset_mode=Mode.DISABLED, copy=False)


def make_walker(envs: Any, seed: int) -> RolloutCollector:
    return RolloutCollector(
        envs,
        make_policy(),
        3,
        seed=seed,
        observation_normalizer=ObservationNormalizer((1,)),
        reward_normalizer=RewardNormalizer(3, gamma=0.9),
    )


def assert_same_rollouts(first: RolloutCollector, second: RolloutCollector) -> None:
    a, b = first.collect(), second.collect()
    for name, value in vars(a).items():
        other = getattr(b, name)
        same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        assert same, name


def test_a_stored_collector_goes_on_exactly_at_any_point() -> None:
    unbroken = make_walker(make_walks(), 7)
    standing = set()
    for _ in range(25):
        state = stored(unbroken.state_dict())
        standing |= {bool(length) for length in state["lengths"].tolist()}
        resumed = make_walker(make_walks(), 8)  # the state brings its own seed
        resumed.load_state_dict(state)
        assert_same_rollouts(unbroken, resumed)
    assert standing == {False, True}, "both just ended and running episodes must have been stored"


def test_a_collector_may_go_back_to_an_earlier_state_of_its_own() -> None:
    collector, reference = make_walker(make_walks(), 7), make_walker(make_walks(), 7)
    for each in (collector, reference):
        each.collect()
    state = collector.state_dict()
    for _ in range(4):
        collector.collect()
    collector.load_state_dict(state)
    for _ in range(3):
        assert_same_rollouts(reference, collector)


def test_a_state_of_another_number_of_environments_is_refused() -> None:
    state = make_walker(make_walks(), 7).state_dict()
    collector = RolloutCollector(make_counters(), make_policy(), 3, seed=7)
    with pytest.raises(ValueError, match=r"episodes must have shape \[2\], got \[3\]"):
        collector.load_state_dict(state)


def test_a_stored_collector_goes_on_exactly_in_other_processes() -> None:
    unbroken = make_walker(make_walks(), 7)
    for _ in range(3):
        unbroken.collect()
    envs = make_walks(asynchronous=True)
    resumed = make_walker(envs, 7)
    resumed.load_state_dict(stored(unbroken.state_dict()))
    assert_same_rollouts(unbroken, resumed)
    envs.close()


def test_environments_and_policies_of_another_kind_are_named() -> None:
    with pytest.raises(TypeError, match="envs must be a vector environment, got str"):
        RolloutCollector("CartPole-v1", make_policy_for_recorder(), 4, seed=0)
    with pytest.raises(TypeError, match="policy must be an ActorCritic, got Identity"):
        RolloutCollector(Recorder(), torch.nn.Identity(), 4, seed=0)
