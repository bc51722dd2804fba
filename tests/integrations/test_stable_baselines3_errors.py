"""Wrong use of the stable-baselines3 adapter: mistakes are named, parameters stay as they were."""

import importlib
import itertools
import sys

import gymnasium
import pytest
import torch
from gymnasium.wrappers import TransformReward

pytest.importorskip("stable_baselines3")

from stable_baselines3.dqn.policies import DQNPolicy

from steelyard.integrations.stable_baselines3 import BPO

pytestmark = pytest.mark.rl

SMALL = {"n_steps": 64, "batch_size": 32, "n_epochs": 2, "seed": 0, "device": "cpu"}


def small(env="CartPole-v1", policy="MlpPolicy", **settings):
    return BPO(policy, env, **{**SMALL, **settings})


def parameters_of(policy):
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_range": 0.0}, "clip_range must be > 0"),
        ({"clip_range": -0.2}, "clip_range must be > 0"),
        ({"clip_range": 1.5}, "clip_range must be .* got 1.5"),
        ({"clip_range": float("nan")}, "clip_range must be .* got nan"),
        ({"clip_range": lambda left: 2 * left}, "clip_range must be .* got 2.0"),
        ({"temperature": -1e-3}, "temperature must be >= 0"),
        ({"temperature": float("inf")}, "temperature must be .* got inf"),
        ({"temperature": 0.0, "threshold_kind": "temperature"}, "threshold_kind='median'"),
        ({"threshold_kind": "mean"}, "threshold_kind must be one of 'code'"),
        ({"threshold_coef": -1.0}, "threshold_coef must be >= 0"),
        ({"vf_coef": -1.0}, "vf_coef must be >= 0"),
        ({"ent_coef": float("nan")}, "ent_coef must be finite"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be > 0"),
        ({"target_kl": 0.0}, "target_kl must be > 0"),
        ({"gamma": 1.1}, "gamma must be"),
        ({"gae_lambda": -0.1}, "gae_lambda must be"),
        ({"n_steps": 0}, "n_steps must be >= 1"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"n_epochs": 0}, "n_epochs must be >= 1"),
        ({"policy": "MlpPolice"}, "MlpPolice unknown"),
        ({"env": None}, "env must be an environment"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        small(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_range": "wide"}, "clip_range must be a number or a function"),
        ({"policy": DQNPolicy}, "policy must be one of MlpPolicy"),
        ({"policy": torch.nn.Linear}, "policy must be one of MlpPolicy"),
        ({"normalize_advantage": True}, "normalize_advantage"),
    ],
)
def test_wrong_types_are_named(settings, message):
    with pytest.raises(TypeError, match=message):
        small(**settings)


def test_clip_range_schedule_that_grows_past_one_is_stopped():
    with pytest.raises(ValueError, match="clip_range must be"):
        small(clip_range=lambda left: 0.2 + 2 * (1 - left)).learn(64)


def test_uneven_minibatches_are_warned_about():
    with pytest.warns(UserWarning, match="last minibatch of each epoch has 4 items"):
        small(batch_size=20)


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # inf - inf in the buffer's GAE
def test_bad_rewards_stop_the_run_and_leave_the_parameters(reward):
    env = TransformReward(
        gymnasium.make("CartPole-v1"), lambda r: reward if next(count) >= 70 else r
    )
    count = itertools.count()
    model = small(env)
    model.learn(64)
    good = parameters_of(model.policy)
    with pytest.raises(FloatingPointError, match="returns are NaN or infinite at timestep 128"):
        model.learn(64, reset_num_timesteps=False)
    assert torch.equal(good, parameters_of(model.policy))


def test_overflowing_gradient_stops_the_run_and_leaves_the_parameters():
    env = TransformReward(gymnasium.make("CartPole-v1"), lambda _: 1e25)
    model = small(env)
    good = parameters_of(model.policy)
    with pytest.raises(FloatingPointError, match=r"gradient is not finite .* value_loss inf"):
        model.learn(64)
    assert torch.equal(good, parameters_of(model.policy))


def test_missing_extra_says_what_to_install(monkeypatch):
    from steelyard import integrations

    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    monkeypatch.delitem(sys.modules, "steelyard.integrations.stable_baselines3")
    with pytest.raises(
        ImportError, match=r"stable_baselines3 for this: pip install 'steelyard\[rl\]'"
    ):
        importlib.import_module("steelyard.integrations.stable_baselines3")
    assert "stable_baselines3" in dir(integrations)
    with pytest.raises(AttributeError, match="no_trainer"):
        _ = integrations.no_trainer
