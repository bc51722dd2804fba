"""The stable-baselines3 adapter: its update is our loss, and the trainer around it is intact."""

import copy
import itertools

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import TransformReward

pytest.importorskip("stable_baselines3")

from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy
from stable_baselines3.common.vec_env import VecNormalize

from steelyard.integrations.stable_baselines3 import BPO, ThresholdPolicy, with_threshold
from steelyard.policy import bpo_loss, bpo_target_ratio, bpo_threshold_loss

pytestmark = pytest.mark.rl

SMALL = {"n_steps": 64, "batch_size": 32, "n_epochs": 2, "seed": 0, "device": "cpu"}


def small(env="CartPole-v1", policy="MlpPolicy", **settings):
    return BPO(policy, env, **{**SMALL, **settings})


class AtRolloutEnd(BaseCallback):
    """Keeps the policy and the whole rollout as they are just before the update."""

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        self.policy = copy.deepcopy(self.model.policy)
        self.batch = next(self.model.rollout_buffer.get(None))


def parameters_of(policy):
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


def update_by_hand(policy, batch, model, *, continuous):
    """Take the steps of an update on one whole-batch minibatch, from the losses of the library.

    Returns the mean of the loss and of its policy term, which unlike its gradient shows the target
    itself, not only on which side of it a ratio is.
    """
    kind_of, extra = policy.optimizer_class, policy.optimizer_kwargs
    optimizer = kind_of(policy.parameters(), lr=model.learning_rate, **extra)
    actions = batch.actions if continuous else batch.actions.long().flatten()
    returns = batch.returns
    logged = []
    for _ in range(model.n_epochs):
        values, logprob, entropy = policy.evaluate_actions(batch.observations, actions)
        values = values[:, 0]
        baseline = values.detach() if model.online_weight else batch.old_values
        loss = 0.5 * (returns - values).square().mean() - model.ent_coef * entropy.mean()
        threshold = baseline
        if model.use_threshold:
            features = policy.extract_features(batch.observations, policy.vf_features_extractor)
            threshold = policy.threshold_net(policy.mlp_extractor.forward_critic(features))[:, 0]
            kind = model.threshold_kind
            temperature = model.temperature or 1.0
            loss = loss + model.threshold_coef * bpo_threshold_loss(
                returns, threshold, kind=kind, temperature=temperature
            )
        target = bpo_target_ratio(returns, threshold, epsilon=0.2, temperature=model.temperature)
        weight = (returns - baseline).abs()
        policy_loss = bpo_loss(logprob - batch.old_log_prob, target, weight)
        loss = loss + policy_loss
        logged.append([loss.item(), policy_loss.item()])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), model.max_grad_norm)
        optimizer.step()
    return np.mean(logged, axis=0)


# Plain gradient descent shows every term of the gradient; Adam's first steps only their signs.
SGD = {"learning_rate": 0.02, "policy_kwargs": {"optimizer_class": torch.optim.SGD}}
ADAM = {"learning_rate": 3e-4, "policy_kwargs": {}}


@pytest.mark.parametrize(
    ("env", "settings"),
    [
        ("CartPole-v1", {"n_epochs": 1, **ADAM}),
        ("CartPole-v1", ADAM),
        ("CartPole-v1", {}),
        ("CartPole-v1", {"temperature": 0.5, "ent_coef": 0.3}),
        ("Pendulum-v1", {"temperature": 50.0, "ent_coef": 0.3, "learning_rate": 1e-3}),
        ("CartPole-v1", {"use_threshold": False}),
        ("CartPole-v1", {"use_threshold": False, "online_weight": False, "temperature": 0.5}),
        ("CartPole-v1", {"online_weight": False, "threshold_kind": "median", "temperature": 0.0}),
        ("CartPole-v1", {"threshold_kind": "temperature", "temperature": 2.0}),
        ("CartPole-v1", {"threshold_coef": 3.0, "max_grad_norm": 0.1}),
    ],
)
def test_update_is_a_descent_on_our_losses(env, settings):
    settings = {"batch_size": 128, "n_epochs": 3, **SGD, **settings}
    model = small(make_vec_env(env, n_envs=2), **settings)
    seen = AtRolloutEnd()
    model.learn(128, callback=seen)
    before = parameters_of(seen.policy)
    logged = update_by_hand(seen.policy, seen.batch, model, continuous=env == "Pendulum-v1")
    by_hand, trained = parameters_of(seen.policy), parameters_of(model.policy)
    assert (trained - before).abs().max() > 1e-4
    torch.testing.assert_close(trained, by_hand, atol=1e-6, rtol=0)
    values = model.logger.name_to_value
    names = ("train/loss", "train/policy_gradient_loss")
    assert [values[name] for name in names] == pytest.approx(logged, rel=1e-5)


def test_online_and_frozen_weights_part_after_the_first_step():
    trained = [
        parameters_of(small(online_weight=online).learn(64).policy) for online in (True, False)
    ]
    assert not torch.equal(*trained)


def test_policy_loss_does_not_pull_value_or_threshold():
    model = small(vf_coef=0.0, threshold_coef=0.0)
    heads = (model.policy.value_net, model.policy.threshold_net)
    before = copy.deepcopy([head.state_dict() for head in heads])
    model.learn(64)
    for old, head in zip(before, heads, strict=True):
        for name, tensor in head.state_dict().items():
            torch.testing.assert_close(tensor, old[name], atol=0, rtol=0)


def test_advantages_are_not_normalised():
    """Rewards and temperature times ten: the same targets, so only the weights grow."""
    losses = []
    for scale in (1.0, 10.0):
        env = TransformReward(gymnasium.make("CartPole-v1"), lambda r, scale=scale: r * scale)
        model = small(env, batch_size=64, n_epochs=1, temperature=0.0, use_threshold=False)
        torch.nn.init.zeros_(model.policy.value_net.weight)
        losses.append(model.learn(64).logger.name_to_value["train/policy_gradient_loss"])
    assert losses[1] == pytest.approx(10 * losses[0], rel=1e-5)
    assert losses[0] > 0


# --- the trainer around it


def test_learns_cartpole():
    model = BPO(
        "MlpPolicy",
        make_vec_env("CartPole-v1", n_envs=8, seed=1),
        n_steps=128,
        batch_size=256,
        n_epochs=10,
        learning_rate=2e-3,
        gamma=0.98,
        clip_range=0.3,
        seed=1,
        device="cpu",
    )
    env = make_vec_env("CartPole-v1", n_envs=4, seed=100)
    untrained, _ = evaluate_policy(model, env, n_eval_episodes=8, deterministic=False)
    trained, _ = evaluate_policy(model.learn(15_000), env, n_eval_episodes=8)
    assert untrained < 50
    assert trained > 150


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (lambda: gymnasium.make("CartPole-v1"), {}),
        (lambda: gymnasium.make("Pendulum-v1"), {}),
        (lambda: gymnasium.make("InvertedPendulum-v5"), {"ent_coef": 0.01}),
        (lambda: gymnasium.make("Pendulum-v1"), {"use_sde": True, "sde_sample_freq": 4}),
        (
            lambda: gymnasium.make("Pendulum-v1"),
            {"use_sde": True, "policy_kwargs": {"squash_output": True}},
        ),
        (SimpleMultiObsEnv, {"policy": "MultiInputPolicy"}),
        (
            lambda: FakeImageEnv(screen_height=36, screen_width=36, action_dim=3),
            {"policy": "CnnPolicy", "n_steps": 16, "batch_size": 16},
        ),
        (
            lambda: gymnasium.make("CartPole-v1"),
            {"policy_kwargs": {"share_features_extractor": False, "ortho_init": False}},
        ),
        (lambda: gymnasium.make("CartPole-v1"), {"policy_kwargs": {"net_arch": []}}),
        (lambda: gymnasium.make("CartPole-v1"), {"use_threshold": False}),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # check_env remarks on spaces of the examples
def test_learns_on_every_kind_of_space_and_survives_a_round_trip(make, settings, tmp_path):
    env = make()
    check_env(env, skip_render_check=True)
    model = small(env, **settings)
    before = parameters_of(model.policy)
    model.learn(2 * model.n_steps)
    assert torch.isfinite(parameters_of(model.policy)).all()
    assert not torch.equal(before, parameters_of(model.policy))
    model.save(tmp_path / "model.zip")
    loaded = BPO.load(tmp_path / "model.zip", env=make(), device="cpu")
    assert torch.equal(parameters_of(loaded.policy), parameters_of(model.policy))
    observations = [env.observation_space.sample() for _ in range(5)]
    for observation in observations:
        expected, _ = model.predict(observation, deterministic=True)
        actual, _ = loaded.predict(observation, deterministic=True)
        np.testing.assert_array_equal(actual, expected)
        assert env.action_space.contains(env.action_space.dtype.type(actual))
    steps = loaded.num_timesteps
    loaded.learn(loaded.n_steps, reset_num_timesteps=False)
    assert loaded.num_timesteps == steps + loaded.n_steps
    assert torch.isfinite(parameters_of(loaded.policy)).all()


@pytest.mark.parametrize("use_threshold", [True, False])
def test_multi_discrete_and_multi_binary_actions(use_threshold):
    class Coins(gymnasium.Env):
        observation_space = spaces.Box(-1, 1, (2,), np.float32)

        def __init__(self, action_space):
            self.action_space = action_space

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return np.zeros(2, np.float32), {}

        def step(self, action):
            return np.zeros(2, np.float32), float(np.sum(action)), False, True, {}

    for action_space in (spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2)):
        model = small(Coins(action_space), use_threshold=use_threshold).learn(64)
        assert torch.isfinite(parameters_of(model.policy)).all()


def test_continuing_a_loaded_model_equals_not_stopping(tmp_path):
    """The optimiser's moments come back too: the same rollout gives the same step."""
    model = small(batch_size=64, n_epochs=1).learn(128)
    model.save(tmp_path / "model")
    loaded = BPO.load(tmp_path / "model", env=model.get_env(), device="cpu")
    loaded.rollout_buffer = copy.deepcopy(model.rollout_buffer)
    for each in (model, loaded):
        each.set_logger(model.logger)
        each.train()
    torch.testing.assert_close(
        parameters_of(loaded.policy), parameters_of(model.policy), atol=1e-7, rtol=0
    )


def test_every_setting_survives_save_and_load(tmp_path):
    settings = {
        "temperature": 0.5,
        "threshold_coef": 0.7,
        "threshold_kind": "median",
        "online_weight": False,
        "use_threshold": False,
        "target_kl": 0.1,
        "clip_range": 0.25,
    }
    small(**settings).save(tmp_path / "model")
    loaded = BPO.load(tmp_path / "model", device="cpu")
    assert {name: getattr(loaded, name) for name in settings} == settings
    assert loaded.policy_class is ActorCriticPolicy


def test_threshold_head_is_in_parameters_optimizer_and_file(tmp_path):
    model = small()
    assert "threshold_net.weight" in model.get_parameters()["policy"]
    optimised = [p for group in model.policy.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in optimised} == {id(p) for p in model.policy.parameters()}
    assert len(optimised) == len(list(model.policy.parameters()))
    before = model.policy.threshold_net.weight.detach().clone()
    model.learn(64)
    assert not torch.equal(before, model.policy.threshold_net.weight)
    other = small(seed=1)
    other.set_parameters(model.get_parameters())
    assert torch.equal(other.policy.threshold_net.weight, model.policy.threshold_net.weight)
    model.save(tmp_path / "model")
    other = small(seed=1)
    other.set_parameters(tmp_path / "model")
    assert torch.equal(parameters_of(other.policy), parameters_of(model.policy))
    model.policy.save(tmp_path / "policy")
    alone = with_threshold(ActorCriticPolicy).load(tmp_path / "policy")
    assert torch.equal(alone.threshold_net.weight, model.policy.threshold_net.weight)
    assert not hasattr(small(use_threshold=False).policy, "threshold_net")


def test_threshold_follows_the_median_of_the_returns():
    """One state, rewards of a skewed coin: V goes to the mean, u (median loss) to the median."""

    class SkewedCoin(gymnasium.Env):
        observation_space = spaces.Box(-1, 1, (1,), np.float32)
        action_space = spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return np.ones(1, np.float32), {}

        def step(self, action):
            reward = 10.0 if self.np_random.random() < 0.2 else 0.0
            return np.ones(1, np.float32), reward, True, False, {}

    model = BPO(
        "MlpPolicy",
        SkewedCoin(),
        n_steps=256,
        learning_rate=1e-2,
        threshold_kind="median",
        policy_kwargs={"net_arch": []},
        seed=0,
        device="cpu",
    ).learn(2048)
    observation = torch.ones(1, 1)
    assert model.policy.predict_values(observation).item() == pytest.approx(2.0, abs=0.7)
    assert model.policy.threshold_net(observation).item() == pytest.approx(0.0, abs=0.3)


def test_callbacks_run_and_can_stop(tmp_path):
    env = make_vec_env("CartPole-v1", n_envs=1)
    evaluation = EvalCallback(env, eval_freq=32, n_eval_episodes=1, verbose=0)
    checkpoint = CheckpointCallback(save_freq=64, save_path=tmp_path)
    small().learn(128, callback=[evaluation, checkpoint])
    assert evaluation.n_calls == 128
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "rl_model_128_steps.zip",
        "rl_model_64_steps.zip",
    ]
    model = small()
    model.learn(1000, callback=lambda scope, _: scope["self"].num_timesteps < 70)
    assert model.num_timesteps == 70


def test_log_has_the_names_of_ppo_and_its_own(tmp_path):
    logged = small("Pendulum-v1", tensorboard_log=str(tmp_path)).learn(64).logger.name_to_value
    own = {"out_of_band", "threshold_loss"}
    ppo = {"approx_kl", "policy_gradient_loss", "value_loss", "entropy_loss", "loss", "std"}
    ppo |= {"explained_variance", "n_updates", "clip_range", "learning_rate"}
    assert {name.removeprefix("train/") for name in logged if "train/" in name} == own | ppo
    assert logged["train/n_updates"] == 2
    assert logged["train/clip_range"] == 0.2
    assert 0 <= logged["train/out_of_band"] <= 1
    assert all(np.isfinite(value) for value in logged.values())
    assert any(tmp_path.glob("BPO_1/events*"))
    assert "train/threshold_loss" not in small(use_threshold=False).learn(64).logger.name_to_value


def test_out_of_band_counts_ratios_past_the_tolerance():
    model = small(batch_size=64, n_epochs=1)
    seen = AtRolloutEnd()
    model.learn(64, callback=seen)
    log_ratio = torch.linspace(-0.5, 0.5, 64)
    batch = seen.batch._replace(old_log_prob=seen.batch.old_log_prob - log_ratio)
    model.policy = seen.policy
    step = model._evaluate(batch, epsilon=0.2)
    expected = ((log_ratio.exp() - 1).abs() > 0.21).float().mean()
    assert step.out_of_band.item() == pytest.approx(expected.item(), abs=1e-6)
    expected_kl = (log_ratio.exp() - 1 - log_ratio).mean()
    assert step.approx_kl.item() == pytest.approx(expected_kl.item(), rel=1e-4)


def test_schedules_are_followed_and_may_run_down_to_zero():
    clip, rate = [], []

    class Record(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_start(self):
            clip.append(self.logger.name_to_value.get("train/clip_range"))
            rate.append(self.logger.name_to_value.get("train/learning_rate"))

        def _on_training_end(self):
            self._on_rollout_start()

    model = small(clip_range=lambda left: 0.4 * left, learning_rate=lambda left: 1e-3 * (1 + left))
    model.learn(150, callback=Record(), log_interval=None)  # the last rollout ends past 150
    assert clip[1:] == pytest.approx([0.4 * (1 - 64 / 150), 0.4 * (1 - 128 / 150), 1e-6])
    assert rate[1] == pytest.approx(1e-3 * (2 - 64 / 150))
    assert torch.isfinite(parameters_of(model.policy)).all()


def test_clip_range_may_be_changed_when_loading(tmp_path):
    small().save(tmp_path / "model")
    loaded = BPO.load(tmp_path / "model", clip_range=0.1, device="cpu")
    assert loaded.clip_range == 0.1
    with pytest.raises(ValueError, match="temperature must be >= 0"):
        BPO.load(tmp_path / "model", temperature=-1.0, device="cpu")


def test_target_kl_ends_the_update_early(capsys):
    model = small(target_kl=1e-6, learning_rate=1e-2, n_epochs=10, verbose=1)
    model.learn(64)
    assert model._n_updates == 1
    assert "Update stopped in epoch 0" in capsys.readouterr().out
    assert small(target_kl=1e6, n_epochs=10).learn(64)._n_updates == 10


def test_same_seed_same_parameters():
    first, second = (small().learn(128) for _ in range(2))
    assert torch.equal(parameters_of(first.policy), parameters_of(second.policy))


def test_works_with_normalised_rewards():
    env = VecNormalize(make_vec_env("Pendulum-v1", n_envs=2))
    model = small(env).learn(128)
    assert model.get_vec_normalize_env() is env
    assert torch.isfinite(parameters_of(model.policy)).all()


# --- policies of the user's own


def test_subclass_with_its_own_evaluation_and_optimizer_is_respected():
    calls = itertools.count()

    class Mine(ActorCriticPolicy):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, optimizer_class=torch.optim.SGD)

        def evaluate_actions(self, obs, actions):
            next(calls)
            return super().evaluate_actions(obs, actions)

    model = small(policy=Mine).learn(64)
    assert next(calls) == 4
    assert isinstance(model.policy, Mine)
    assert isinstance(model.policy, ThresholdPolicy)
    assert isinstance(model.policy.optimizer, torch.optim.SGD)
    assert model.policy_class is Mine
    assert with_threshold(Mine) is with_threshold(Mine)


def test_subclass_that_never_calls_its_value_head_is_told():
    class Odd(ActorCriticPolicy):
        def evaluate_actions(self, obs, actions):
            distribution = self.get_distribution(obs)
            return obs[:, :1], distribution.log_prob(actions), distribution.entropy()

    with pytest.raises(RuntimeError, match="must call value_net"):
        small(policy=Odd).learn(64)


def test_head_keeps_the_name_by_which_devices_are_advised():
    assert with_threshold(ActorCriticPolicy).__name__ == "ActorCriticPolicy"
    assert issubclass(with_threshold(ActorCriticCnnPolicy), ActorCriticCnnPolicy)
