"""PPO for continuous actions in one plain file, in the manner of CleanRL: a peer to measure beside.

Everything is written the usual way: Gymnasium's wrappers and ``SyncVectorEnv``, ``torch.nn``,
``torch.distributions``, automatic differentiation, ``torch.optim.Adam``, one pass of Python for
each minibatch with its diagnostics. As is usual in such files, an episode cut by the time limit is
treated like one that ended.
"""

from functools import partial
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor, nn
from torch.distributions import Normal


class Batch(NamedTuple):
    """One rollout, flattened to ``N`` steps."""

    observations: Tensor
    actions: Tensor
    logprobs: Tensor
    advantages: Tensor
    returns: Tensor


def make_env(env_id: str) -> gymnasium.Env:
    env = gymnasium.make(env_id)
    env = gymnasium.wrappers.RecordEpisodeStatistics(env)
    return gymnasium.wrappers.ClipAction(env)


def layer(inputs: int, outputs: int, gain: float = 2**0.5) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(linear.weight, gain)
    nn.init.zeros_(linear.bias)
    return linear


class Agent(nn.Module):
    def __init__(self, inputs: int, actions: int, width: int = 64) -> None:
        super().__init__()
        self.critic = nn.Sequential(
            layer(inputs, width), nn.Tanh(), layer(width, width), nn.Tanh(), layer(width, 1, 1.0)
        )
        self.actor = nn.Sequential(
            layer(inputs, width),
            nn.Tanh(),
            layer(width, width),
            nn.Tanh(),
            layer(width, actions, 0.01),
        )
        self.log_std = nn.Parameter(torch.zeros(1, actions))

    def value(self, observation: Tensor) -> Tensor:
        return self.critic(observation)

    def act_and_value(
        self, observation: Tensor, action: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean = self.actor(observation)
        law = Normal(mean, self.log_std.expand_as(mean).exp())
        if action is None:
            action = law.sample()
        value = self.critic(observation)
        return action, law.log_prob(action).sum(1), law.entropy().sum(1), value


class SingleFilePPO:
    """The loop; :meth:`advance` is one rollout and its updates."""

    def __init__(
        self,
        env_id: str,
        *,
        num_envs: int,
        steps: int,
        minibatch: int,
        epochs: int,
        seed: int,
        learning_rate: float = 3e-4,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip: float = 0.2,
        value_coef: float = 0.5,
        entropy_coef: float = 0.0,
        max_grad_norm: float = 0.5,
    ) -> None:
        torch.manual_seed(seed)
        self.order = np.random.default_rng(seed)
        self.steps, self.minibatch, self.epochs = steps, minibatch, epochs
        self.gamma, self.gae_lambda, self.clip = gamma, gae_lambda, clip
        self.value_coef, self.entropy_coef = value_coef, entropy_coef
        self.max_grad_norm = max_grad_norm
        self.envs = SyncVectorEnv(
            [partial(make_env, env_id)] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP
        )
        self.agent = Agent(
            self.envs.single_observation_space.shape[0], self.envs.single_action_space.shape[0]
        )
        self.optimizer = torch.optim.Adam(self.agent.parameters(), lr=learning_rate, eps=1e-5)
        observation, _ = self.envs.reset(seed=seed)
        self.observation = torch.tensor(observation, dtype=torch.float32)
        self.done = torch.zeros(num_envs)
        self.returns: list[float] = []

    def advance(self) -> dict[str, float]:
        return self.update(self.collect())

    def collect(self) -> Batch:
        size = (self.steps, self.envs.num_envs)
        observations = torch.zeros((*size, *self.envs.single_observation_space.shape))
        actions = torch.zeros((*size, *self.envs.single_action_space.shape))
        logprobs, rewards, dones, values = (torch.zeros(size) for _ in range(4))
        for t in range(self.steps):
            observations[t], dones[t] = self.observation, self.done
            with torch.no_grad():
                action, logprob, _, value = self.agent.act_and_value(self.observation)
            actions[t], logprobs[t], values[t] = action, logprob, value.flatten()
            observation, reward, terminated, truncated, info = self.envs.step(action.numpy())
            rewards[t] = torch.tensor(reward)
            self.observation = torch.tensor(observation, dtype=torch.float32)
            self.done = torch.tensor(np.logical_or(terminated, truncated), dtype=torch.float32)
            if "final_info" in info and "episode" in info["final_info"]:
                episode = info["final_info"]["episode"]
                self.returns += episode["r"][info["final_info"]["_episode"]].tolist()
        advantages = self.advantages(rewards, values, dones)
        returns = advantages + values
        fields = (observations, actions, logprobs, advantages, returns)
        return Batch(*(field.flatten(0, 1) for field in fields))

    @torch.no_grad()
    def advantages(self, rewards: Tensor, values: Tensor, dones: Tensor) -> Tensor:
        next_value = self.agent.value(self.observation).flatten()
        next_alive = 1 - self.done
        advantages, running = torch.zeros_like(rewards), torch.zeros(rewards.shape[1])
        for t in reversed(range(self.steps)):
            delta = rewards[t] + self.gamma * next_value * next_alive - values[t]
            running = delta + self.gamma * self.gae_lambda * next_alive * running
            advantages[t] = running
            next_value, next_alive = values[t], 1 - dones[t]
        return advantages

    def update(self, batch: Batch) -> dict[str, float]:
        count = len(batch.returns)
        clip_shares = []
        for _ in range(self.epochs):
            order = self.order.permutation(count)
            for start in range(0, count, self.minibatch):
                part = order[start : start + self.minibatch]
                _, logprob, entropy, value = self.agent.act_and_value(
                    batch.observations[part], batch.actions[part]
                )
                log_ratio = logprob - batch.logprobs[part]
                ratio = log_ratio.exp()
                with torch.no_grad():
                    approx_kl = (ratio - 1 - log_ratio).mean()
                    clip_shares.append(((ratio - 1).abs() > self.clip).float().mean().item())
                advantages = batch.advantages[part]
                advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
                clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
                policy_loss = torch.max(-advantages * ratio, -advantages * clipped).mean()
                value_loss = ((value.flatten() - batch.returns[part]) ** 2).mean()
                loss = (
                    policy_loss - self.entropy_coef * entropy.mean() + self.value_coef * value_loss
                )
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.agent.parameters(), self.max_grad_norm)
                self.optimizer.step()
        return {
            "policy_loss": policy_loss.item(),
            "value_loss": value_loss.item(),
            "approx_kl": approx_kl.item(),
            "clip_share": float(np.mean(clip_shares)),
        }
