"""Sequences that can be enumerated, and a policy on them that learns by f-DPG."""

import math
from typing import Any

import torch
from torch import Tensor

from steelyard.divergences import REVERSE_KL, TOTAL_VARIATION, FDivergence, f_divergence
from steelyard.lab.enumeration import AllSequences
from steelyard.preference import (
    LogPartition,
    RunningBaseline,
    dpg_loss,
    dpg_pseudo_rewards,
    pointwise_log_target,
)

VOCABULARY, LENGTH, MARKED = 4, 5, 3
FLOOR = -20.0  # log b of a violation, where the divergence forbids what the target does


class Exact:
    """A random base over all sequences, and its law where the constraint holds.

    The logit of the marked token is shifted so that the constraint has probability ``z``.
    """

    def __init__(self, least: int, seed: int, z: float | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.space = AllSequences(VOCABULARY, LENGTH)
        table = (self.space.num_prefixes, VOCABULARY)
        self.table = torch.randn(table, dtype=torch.float64, generator=generator)
        self.satisfied = (self.space.tokens == MARKED).sum(-1) >= least
        if z is not None:
            self.table[:, MARKED] += self._shift(z)
        self.base = self.space.logprobs(self.table).sum(-1)
        self.log_z = self.base[self.satisfied].logsumexp(0)
        self.target = pointwise_log_target(self.base, self.satisfied) - self.log_z

    def _shift(self, z: float) -> float:
        low, high = -20.0, 20.0
        marked = torch.arange(VOCABULARY) == MARKED
        for _ in range(60):
            middle = (low + high) / 2
            scores = self.space.logprobs(self.table + middle * marked).sum(-1)
            below = scores[self.satisfied].logsumexp(0).exp() < z
            low, high = (middle, high) if bool(below) else (low, middle)
        return low

    def scores(self, divergence: FDivergence) -> Tensor:
        """``log P`` of all sequences, ``[S]``; floored where the divergence needs it."""
        floor = FLOOR if divergence.slope_at_infinity == math.inf else -math.inf
        return pointwise_log_target(self.base, self.satisfied, log_floor=floor)

    def measures(self, table: Tensor) -> dict[str, float]:
        """How a policy stands to the target, exactly."""
        policy = self.space.logprobs(table).sum(-1)
        probs = policy.exp()
        return {
            "satisfied": probs[self.satisfied].sum().item(),
            "entropy": -(probs * policy).sum().item(),
            "forward_kl": f_divergence(policy, self.target, REVERSE_KL).item(),
            "tv": f_divergence(policy, self.target, TOTAL_VARIATION).item(),
            "kl_to_base": (probs * (policy - self.base)).sum().item(),
        }


class ExactLearner:
    """A table of logits that learns from its own samples; measured by enumeration."""

    def __init__(
        self,
        problem: Exact,
        divergence: FDivergence | None,
        *,
        updates: int,
        batch_size: int,
        learning_rate: float,
        seed: int,
    ) -> None:
        self._problem, self._divergence = problem, divergence
        self._updates, self._batch_size = updates, batch_size
        self._table = problem.table.clone().requires_grad_()
        self._optimizer = torch.optim.Adam([self._table], lr=learning_rate)
        self._generator = torch.Generator().manual_seed(seed)
        self._partition, self._baseline = LogPartition(), RunningBaseline()
        if self._divergence is not None:
            self._scores = problem.scores(self._divergence)
        self.step = 0

    def advance(self) -> dict[str, float]:
        """Do at most 100 updates, then measure."""
        for _ in range(min(100, self._updates - self.step)):
            self._update()
            self.step += 1
        return self._problem.measures(self._table.detach())

    def _update(self) -> None:
        every = self._problem.space.logprobs(self._table).sum(-1)
        probs = every.detach().exp()
        drawn = torch.multinomial(
            probs, self._batch_size, replacement=True, generator=self._generator
        )
        policy = every[drawn]
        self._optimizer.zero_grad()
        self._loss(policy, drawn).backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    def _loss(self, policy: Tensor, drawn: Tensor) -> Tensor:
        shift = self._baseline.value
        if self._divergence is None:
            rewards = self._problem.satisfied[drawn].double()
            self._baseline.update(rewards)
            return -((rewards - shift) * policy).mean()
        scores = self._scores[drawn]
        log_z = self._partition(scores - policy)
        self._baseline.update(
            dpg_pseudo_rewards(policy, scores, log_z, divergence=self._divergence)
        )
        return dpg_loss(policy, scores, log_z, divergence=self._divergence, baseline=shift)

    def state_dict(self) -> dict[str, Any]:
        """Return table, optimiser, estimates, generator and step."""
        return {
            "step": self.step,
            "table": self._table.detach(),
            "optimizer": self._optimizer.state_dict(),
            "partition": self._partition.state_dict(),
            "baseline": self._baseline.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a state."""
        self.step = state["step"]
        self._table.data.copy_(state["table"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._partition.load_state_dict(state["partition"])
        self._baseline.load_state_dict(state["baseline"])
        self._generator.set_state(state["generator"])

    def close(self) -> None:
        """Nothing to free."""


def gradient_noise(problem: Exact, divergence: FDivergence) -> tuple[float, float]:
    """Total variance of ``(r - B) grad log pi`` at the base, and its squared mean over it."""
    space, probs = problem.space, problem.base.exp()
    laws = problem.table.softmax(-1)
    # grad log pi(x): at each prefix on the way one-hot minus the law; prefixes do not overlap.
    one_hot = torch.nn.functional.one_hot(space.tokens, VOCABULARY).double()
    slopes = one_hot - laws[space.prefixes]  # [S, L, V]
    squared = slopes.square().sum((1, 2))
    reward = dpg_pseudo_rewards(
        problem.base, problem.scores(divergence), problem.log_z, divergence=divergence
    )
    weight = probs * squared
    centred = reward - (weight * reward).sum() / weight.sum()
    mean = torch.zeros_like(problem.table)
    terms = (probs * centred)[:, None, None] * slopes
    mean.index_add_(0, space.prefixes.flatten(), terms.flatten(0, 1))
    signal = mean.square().sum()
    variance = (weight * centred.square()).sum() - signal
    return variance.item(), (signal / variance).item()
