"""Tests that the errata name and that belong to no single package."""

import re
from pathlib import Path

import pytest
import torch


def test_tests_named_in_the_errata_exist(root: Path) -> None:
    text = (root / "docs/errata.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    sources = "".join(path.read_text(encoding="utf-8") for path in root.glob("tests/**/test_*.py"))
    assert named
    assert [name for name in sorted(named) if f"def {name}(" not in sources] == []


@pytest.mark.rl
def test_stored_actions_are_those_drawn_and_only_the_environment_sees_them_clipped() -> None:
    gymnasium = pytest.importorskip("gymnasium")
    import numpy as np

    from steelyard.policy import RolloutCollector, mlp_actor_critic

    received = []

    class Narrow(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
        action_space = gymnasium.spaces.Box(-0.1, 0.1, (1,), np.float32)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return np.zeros(1, np.float32), {}

        def step(self, action):
            received.append(float(action[0]))
            return np.zeros(1, np.float32), 0.0, False, False, {}

    torch.manual_seed(0)
    policy = mlp_actor_critic(1, 1, continuous=True)
    envs = gymnasium.vector.SyncVectorEnv([Narrow])
    rollout = RolloutCollector(envs, policy, 32, seed=0).collect()
    drawn = rollout.actions[:, 0, 0]
    assert (drawn.abs() > 0.1).any()
    torch.testing.assert_close(torch.tensor(received), drawn.clamp(-0.1, 0.1))
    # The policy starts with standard deviation 1, and its mean depends on the observation only.
    mean = policy.actor(torch.zeros(1, 1)).detach().squeeze()
    expected = torch.distributions.Normal(mean, 1.0).log_prob(drawn)
    torch.testing.assert_close(rollout.logprobs[:, 0], expected)
