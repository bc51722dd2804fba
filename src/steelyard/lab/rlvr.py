"""Reinforcement learning with verifiable rewards, small enough for a laptop.

:class:`RLVRLearner` is the loop that every group-relative method shares: sample several answers to
each prompt, score them, turn the scores into a loss, take a few steps. What distinguishes the
methods is an :data:`Objective`, a plain function that the recipe writes.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from steelyard._checks import check_choice, check_count, check_range
from steelyard._reduce import reduce_masked
from steelyard.lab.tiny_lm import (
    completion_logprobs,
    decode_completions,
    encode_completions,
    encode_rows,
    pretrain,
    sample,
    tiny_lm,
    tiny_tokenizer,
)

if TYPE_CHECKING:
    from steelyard.lab.tasks import Task

__all__ = [
    "Evaluation",
    "Objective",
    "RLVRLearner",
    "RLVRSettings",
    "Rollouts",
    "Update",
    "base_copies",
    "base_model",
    "evaluate",
    "finetune",
]


@dataclass(frozen=True)
class Rollouts:
    """Answers to a batch of prompts, ``N`` in all, those to one prompt side by side."""

    prompt_ids: Tensor
    """``[N, P]``, padded on the left."""
    prompt_mask: Tensor
    """Bool ``[N, P]``."""
    tokens: Tensor
    """``[N, T]``, padded on the right."""
    mask: Tensor
    """Bool ``[N, T]``, true up to and with the end token."""
    logprobs: Tensor
    """``[N, T]``, of the sampling policy."""
    entropy: Tensor
    """``[N]``, of the sampling policy in nats, mean over the tokens of an answer."""
    rewards: Tensor
    """``[N]``."""
    groups: Tensor
    """``[N]``, number of the prompt in the batch."""
    rows: list[dict[str, Any]]
    """The task's row behind each answer."""
    step: int
    """Updates done before."""

    @property
    def lengths(self) -> Tensor:
        """Tokens of each answer, ``[N]`` float, the end token included."""
        return self.mask.sum(-1).to(self.rewards.dtype)


class Update(NamedTuple):
    """What an :data:`Objective` makes of a batch."""

    loss: Callable[[Tensor, Tensor], Tensor]
    """``loss(log_ratio [n, T], index [n])`` of the answers at ``index``, for each minibatch."""
    log: Mapping[str, float] = MappingProxyType({})
    """What to log of the batch beside the learner's own numbers."""


Objective = Callable[[Rollouts], Update]
"""A method. Called once for each batch, so that group statistics are of complete groups."""


@dataclass(frozen=True)
class RLVRSettings:
    """Sizes of one update.

    Args:
        prompts: prompts a batch.
        samples: answers to each prompt.
        epochs: passes over the batch.
        minibatches: parts of the batch, one optimiser step each; a divisor of ``prompts``, and
            groups are never torn.
        learning_rate: constant.
        optimizer: ``"adam"`` (AdamW without decay) or ``"sgd"``.
        temperature: of sampling and of the ratio.
        max_grad_norm: the gradient is scaled down to it; infinite = never.
        band: ratios outside ``1 - band .. 1 + band`` are counted in the log.

    Raises:
        ValueError: a number out of range.
    """

    prompts: int = 16
    samples: int = 8
    epochs: int = 1
    minibatches: int = 1
    learning_rate: float = 2e-4
    optimizer: Literal["adam", "sgd"] = "adam"
    temperature: float = 1.0
    max_grad_norm: float = 1.0
    band: float = 0.2

    def __post_init__(self) -> None:
        for name in ("prompts", "samples", "epochs", "minibatches"):
            check_count(name, getattr(self, name))
        if self.prompts % self.minibatches:
            raise ValueError(
                f"minibatches must divide prompts={self.prompts}, got {self.minibatches}"
            )
        for name in ("learning_rate", "temperature", "max_grad_norm", "band"):
            check_range(name, getattr(self, name), above=0.0)
        check_choice("optimizer", self.optimizer, ("adam", "sgd"))


def base_model(
    task: "Task",
    *,
    seed: int,
    demonstrations: int = 8192,
    steps: int = 600,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    mixed: bool = True,
    **architecture: Any,
) -> tuple[Any, Any]:
    """Train a small language model from scratch on demonstrations of a task.

    Args:
        task: what it learns.
        seed: of the weights, the demonstrations and their order.
        demonstrations: how many are written.
        steps: of training.
        batch_size: demonstrations a step.
        learning_rate: peak.
        mixed: true shows demonstrations that are right part of the time: a base for reinforcement
            learning. False shows right ones only.
        **architecture: of :func:`~steelyard.lab.tiny_lm.tiny_lm`.

    Returns:
        The model and its tokenizer.
    """
    generator = torch.Generator().manual_seed(seed)
    tokenizer = tiny_tokenizer(task.symbols)
    model = tiny_lm(tokenizer, seed=seed, **architecture)
    finetune(
        model,
        tokenizer,
        task,
        generator=generator,
        demonstrations=demonstrations,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        mixed=mixed,
    )
    return model, tokenizer


def base_copies(task: "Task", *, seed: int, **settings: Any) -> Callable[[], tuple[Any, Any]]:
    """Train a :func:`base_model` once; return a function that hands out copies of it."""
    model, tokenizer = base_model(task, seed=seed, **settings)
    return lambda: (copy.deepcopy(model), tokenizer)


def finetune(
    model: Any,
    tokenizer: Any,
    task: "Task",
    *,
    generator: torch.Generator,
    demonstrations: int,
    steps: int,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    mixed: bool = False,
) -> None:
    """Train a model in place on demonstrations of a task; arguments as in :func:`base_model`."""
    rows = task.sample(demonstrations, generator)
    show = task.demonstrate_mixed if mixed else task.demonstrate
    pretrain(
        model,
        *encode_rows(tokenizer, rows),
        *encode_completions(tokenizer, show(rows, generator)),
        steps=steps,
        batch_size=batch_size,
        lr=learning_rate,
        generator=generator,
    )


class RLVRLearner:
    """Fine-tune a small language model on a task's reward.

    A :class:`~steelyard.lab.training.Learner`: one ``advance`` is one batch of prompts. Its row
    has ``reward``, ``length`` and ``entropy`` of the answers, ``approx_kl`` (k3, nats a token),
    ``out_of_band`` (share of token ratios outside the band) and ``max_ratio`` of the updated policy
    over all tokens of the batch, and ``grad_norm``; rows with a column ``family`` add
    ``reward/<family>`` and ``length/<family>``.

    Args:
        model: a causal language model of Hugging Face; it is trained in place.
        tokenizer: its tokenizer.
        task: where prompts and rewards come from.
        objective: the method.
        settings: sizes of one update.
        seed: of prompts and answers.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        task: "Task",
        objective: Objective,
        settings: RLVRSettings,
        *,
        seed: int,
    ) -> None:
        self.model, self.tokenizer, self.task = model, tokenizer, task
        self._objective, self._settings = objective, settings
        self._generator = torch.Generator().manual_seed(seed)
        self._step = 0
        parameters = list(model.parameters())
        if settings.optimizer == "adam":
            self._optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                parameters, lr=settings.learning_rate, weight_decay=0.0
            )
        else:
            self._optimizer = torch.optim.SGD(parameters, lr=settings.learning_rate)

    @property
    def step(self) -> int:
        """Batches done."""
        return self._step

    def advance(self) -> dict[str, float]:
        """Sample a batch, update on it, and say how it went."""
        rollouts = self.collect()
        update = self._objective(rollouts)
        norms = [
            self._update(update.loss, rollouts, index)
            for _ in range(self._settings.epochs)
            for index in self._minibatches(rollouts)
        ]
        self._step += 1
        row = summarise_rewards(rollouts) | dict(update.log)
        return row | self._drift(rollouts) | {"grad_norm": sum(norms) / len(norms)}

    def state_dict(self) -> dict[str, Any]:
        """Return model, optimiser, generator and step."""
        return {
            "step": self._step,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a state."""
        self._step = state["step"]
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"])

    def close(self) -> None:
        """Nothing to free."""

    def collect(self) -> Rollouts:
        """Sample and score a batch; no update."""
        settings = self._settings
        drawn = self.task.sample(settings.prompts, self._generator)
        rows = [row for row in drawn for _ in range(settings.samples)]
        prompt_ids, prompt_mask = encode_rows(self.tokenizer, rows)
        answers = sample(
            self.model,
            prompt_ids,
            prompt_mask,
            max_new_tokens=self.task.max_new_tokens,
            temperature=settings.temperature,
            generator=self._generator,
        )
        with torch.no_grad():
            logprobs, entropy = completion_logprobs(
                self.model,
                prompt_ids,
                prompt_mask,
                answers.tokens,
                answers.mask,
                temperature=settings.temperature,
                with_entropy=True,
            )
        return Rollouts(
            prompt_ids,
            prompt_mask,
            answers.tokens,
            answers.mask,
            logprobs,
            (entropy * answers.mask).sum(-1) / answers.mask.sum(-1),
            score(self.task, self.tokenizer, rows, answers.tokens, answers.mask),
            torch.arange(settings.prompts).repeat_interleave(settings.samples),
            rows,
            self._step,
        )

    def _minibatches(self, rollouts: Rollouts) -> list[Tensor]:
        """Return the indices of the answers in each part; groups in a new order each time."""
        order = torch.randperm(self._settings.prompts, generator=self._generator)
        samples = torch.arange(self._settings.samples)
        index = order[:, None] * self._settings.samples + samples
        return [part.flatten() for part in index.chunk(self._settings.minibatches)]

    def _logprobs(self, rollouts: Rollouts, index: Tensor) -> Tensor:
        found: Tensor = completion_logprobs(
            self.model,
            rollouts.prompt_ids[index],
            rollouts.prompt_mask[index],
            rollouts.tokens[index],
            rollouts.mask[index],
            temperature=self._settings.temperature,
        )
        return found

    def gradient_norm(
        self, loss: Callable[[Tensor, Tensor], Tensor], rollouts: Rollouts, index: Tensor
    ) -> float:
        """Norm of the gradient of the loss on the answers at ``index``; it is left in the model."""
        log_ratio = self._logprobs(rollouts, index) - rollouts.logprobs[index]
        value = loss(log_ratio, index)
        if not bool(value.isfinite()):
            raise FloatingPointError(f"loss is {value.item()}")
        self._optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients).item()

    def _update(
        self, loss: Callable[[Tensor, Tensor], Tensor], rollouts: Rollouts, index: Tensor
    ) -> float:
        norm = self.gradient_norm(loss, rollouts, index)
        most = self._settings.max_grad_norm
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), most)
        self._optimizer.step()
        return norm

    @torch.no_grad()
    def _drift(self, rollouts: Rollouts) -> dict[str, float]:
        everything = torch.arange(len(rollouts.rewards))
        log_ratio = self._logprobs(rollouts, everything) - rollouts.logprobs
        ratio = log_ratio.exp()
        band = self._settings.band
        outside = ((ratio - 1).abs() > band).to(ratio.dtype)
        return {
            "approx_kl": reduce_masked(ratio - 1 - log_ratio, rollouts.mask, "mean").item(),
            "out_of_band": reduce_masked(outside, rollouts.mask, "mean").item(),
            "max_ratio": ratio.where(rollouts.mask, 1.0).max().item(),
        }


@dataclass(frozen=True)
class Evaluation:
    """How a model answers a set of prompts; each ``[N]``."""

    rewards: Tensor
    lengths: Tensor

    @property
    def accuracy(self) -> float:
        """Mean reward."""
        return self.rewards.mean().item()

    @property
    def length(self) -> float:
        """Mean number of tokens."""
        return self.lengths.mean().item()


def evaluate(
    model: Any,
    tokenizer: Any,
    task: "Task",
    rows: list[dict[str, Any]],
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Evaluation:
    """Answer each row once and score the answers.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        task: whose reward counts.
        rows: prompts, from ``task.sample``.
        temperature: >= 0; 0 = greedy.
        generator: of the answers.
    """
    prompt_ids, prompt_mask = encode_rows(tokenizer, rows)
    answers = sample(
        model,
        prompt_ids,
        prompt_mask,
        max_new_tokens=task.max_new_tokens,
        temperature=temperature,
        generator=generator,
    )
    rewards = score(task, tokenizer, rows, answers.tokens, answers.mask)
    return Evaluation(rewards, answers.mask.sum(-1).to(rewards.dtype))


def score(
    task: "Task", tokenizer: Any, rows: list[dict[str, Any]], tokens: Tensor, mask: Tensor
) -> Tensor:
    """Reward of each answer, ``[N]``.

    Raises:
        ValueError: the reward function returns another number of rewards, or NaN.
    """
    completions = decode_completions(tokenizer, tokens, mask)
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    prompts = columns.pop("prompt")
    rewards = torch.tensor(task.reward(prompts, completions, **columns))
    if rewards.shape != (len(rows),):
        raise ValueError(
            f"reward of task {task.name} must give {len(rows)} numbers, got {list(rewards.shape)}"
        )
    if bool(rewards.isnan().any()):
        first = int(rewards.isnan().nonzero()[0])
        raise ValueError(f"reward of task {task.name} is NaN for {completions[first]!r}")
    return rewards


def summarise_rewards(rollouts: Rollouts) -> dict[str, float]:
    """Mean reward, length and entropy, and the first two by family where rows name one."""
    lengths = rollouts.lengths
    row = {
        "reward": rollouts.rewards.mean().item(),
        "length": lengths.mean().item(),
        "entropy": rollouts.entropy.mean().item(),
    }
    families = [str(each.get("family", "")) for each in rollouts.rows]
    for family in sorted(set(families) - {""}):
        inside = torch.tensor([each == family for each in families])
        row[f"reward/{family}"] = rollouts.rewards[inside].mean().item()
        row[f"length/{family}"] = lengths[inside].mean().item()
    return row
