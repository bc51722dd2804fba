"""f-DPG on language models: what is wanted, the loss, a learner that remembers its estimates."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steelyard.divergences import FDivergence
from steelyard.lab.rlvr import RLVRLearner, RLVRSettings, Rollouts, Update
from steelyard.lab.tasks import Task
from steelyard.lab.tiny_lm import completion_logprobs
from steelyard.preference import LogPartition, RunningBaseline, dpg_loss, dpg_pseudo_rewards
from steelyard.recipes._f_dpg_testbed import FLOOR


@dataclass(frozen=True)
class Target:
    """What is wanted of a sample, and the unnormalised target it makes of the base model."""

    wanted: Callable[[Tensor, Tensor], Tensor]
    """``wanted(tokens, mask) -> [N]``."""
    scores: Callable[[Tensor, Tensor, float], Tensor]
    """``scores(base_logprobs, wanted, floor) -> log P [N]``."""


class DPG:
    """f-DPG as the objective of a learner: target scores, running estimates, the loss.

    Without a divergence it is REINFORCE on what is wanted.
    """

    def __init__(self, base: Any, target: Target, divergence: FDivergence | None) -> None:
        self._base, self._target, self._divergence = base, target, divergence
        self._partition, self._baseline = LogPartition(), RunningBaseline()

    def __call__(self, rollouts: Rollouts) -> Update:
        """Turn a batch of samples into the loss of one update."""
        sampled = rollouts.logprobs.sum(-1)
        shift = self._baseline.value.float()
        if self._divergence is None:
            self._baseline.update(rollouts.rewards)
            advantages = rollouts.rewards - shift

            def reinforce(log_ratio: Tensor, index: Tensor) -> Tensor:
                return -(advantages[index] * log_ratio.sum(-1)).mean()

            return Update(reinforce)
        with torch.no_grad():
            prompts = rollouts.prompt_ids, rollouts.prompt_mask
            base = completion_logprobs(self._base, *prompts, rollouts.tokens, rollouts.mask)
        floor = FLOOR if self._divergence.slope_at_infinity == math.inf else -math.inf
        scores = self._target.scores(base.sum(-1), rollouts.rewards, floor)
        log_z = self._partition(scores - sampled)
        divergence = self._divergence
        self._baseline.update(dpg_pseudo_rewards(sampled, scores, log_z, divergence=divergence))

        def loss(log_ratio: Tensor, index: Tensor) -> Tensor:
            policy = (log_ratio + rollouts.logprobs[index]).sum(-1)
            return dpg_loss(policy, scores[index], log_z, divergence=divergence, baseline=shift)

        return Update(loss, {"log_z": self._partition.value.clamp(min=-1e3).item()})

    def state_dict(self) -> dict[str, Any]:
        """Return the running estimates."""
        return {
            "partition": self._partition.state_dict(),
            "baseline": self._baseline.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a state."""
        self._partition.load_state_dict(state["partition"])
        self._baseline.load_state_dict(state["baseline"])


class DPGLearner(RLVRLearner):
    """The learner of the lab with an objective that remembers, and a last look at the policy."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        task: Task,
        objective: DPG,
        settings: RLVRSettings,
        *,
        seed: int,
        total: int,
        last: Callable[[Any], dict[str, float]],
    ) -> None:
        super().__init__(model, tokenizer, task, objective, settings, seed=seed)
        self._estimates, self._total, self._last = objective, total, last

    def advance(self) -> dict[str, float]:
        """Do one update; after the last one measure the policy."""
        row = super().advance()
        return row | (self._last(self.model) if self.step == self._total else {})

    def state_dict(self) -> dict[str, Any]:
        """Add the running estimates."""
        return super().state_dict() | {"estimates": self._estimates.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a state."""
        super().load_state_dict(state)
        self._estimates.load_state_dict(state["estimates"])


def sampling_task(
    name: str, prompts: list[str], reward: Callable[..., list[float]], max_new_tokens: int
) -> Task:
    """Draw prompts at random; nothing to demonstrate."""

    def rows(count: int, generator: torch.Generator) -> list[dict[str, Any]]:
        picks = torch.randint(len(prompts), (count,), generator=generator)
        return [{"prompt": prompts[pick]} for pick in picks.tolist()]

    def show(rows: Any, generator: torch.Generator) -> list[str]:
        raise NotImplementedError(f"task {name} has no solutions to show")

    return Task(name, (), max_new_tokens, rows, reward, show, show)
