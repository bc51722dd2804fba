"""What a task is, and what every reward does with the texts that it is given."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Row = dict[str, Any]
Reward = Callable[..., list[float]]

ASK = ":"  # Ends every prompt that is made of symbols.


@dataclass(frozen=True)
class Task:
    """A sampler of prompts, the reward of an answer, and solutions to learn from."""

    name: str
    symbols: tuple[str, ...]
    """What :func:`~steelyard.lab.tiny_lm.tiny_tokenizer` needs; empty for free text."""
    max_new_tokens: int
    """Room for the longest right answer and its end token."""
    sample: Callable[[int, torch.Generator], list[Row]]
    """``sample(count, generator)``: rows with ``prompt`` and the columns the reward needs."""
    reward: Reward
    """``reward(prompts, completions, **columns)``: one float for each completion."""
    demonstrate: Callable[[Sequence[Row], torch.Generator], list[str]]
    """``demonstrate(rows, generator)``: a right completion for each row, styles varied."""
    demonstrate_mixed: Callable[[Sequence[Row], torch.Generator], list[str]]
    """``demonstrate_mixed(rows, generator)``: the same styles, right only part of the time."""


def completion_texts(
    prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]
) -> list[str]:
    """Check that everything has one entry per completion; read chats by their last message."""
    for name, column in {"prompts": prompts, **columns}.items():
        if len(column) != len(completions):
            raise ValueError(
                f"{name} must have one entry for each of the {len(completions)} completions, "
                f"got {len(column)}"
            )
    return [_text(completion) for completion in completions]


def _text(completion: Any) -> str:
    if isinstance(completion, str):
        return completion.strip()
    if isinstance(completion, Sequence) and completion and isinstance(completion[-1], Mapping):
        return str(completion[-1].get("content") or "").strip()
    raise TypeError(
        f"completions must be texts or lists of messages, got {type(completion).__name__}"
    )


def uniform(count: int, generator: torch.Generator) -> list[float]:
    """Draw ``count`` numbers in [0, 1)."""
    values: list[float] = torch.rand(count, generator=generator).tolist()
    return values
