"""Language models with a past: adapters, open questions, and training on a user's own pairs.

Needs the extras ``lm`` and, for adapters, ``trl``; importing this module does not.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from steelyard._extras import require
from steelyard.lab.preference_files import encode_pairs, read_pairs
from steelyard.lab.preferences import (
    Objective,
    PairBatch,
    Pairs,
    PreferenceLearner,
    PreferenceSettings,
    Responses,
    draw_pairs,
    token_logprobs,
)
from steelyard.lab.pretrained import load_language_model
from steelyard.lab.tiny_lm import decode_completions, encode_rows, sample
from steelyard.lab.training import Lab

__all__ = [
    "QUESTIONS",
    "answer_pairs",
    "mean_score",
    "question_prompts",
    "save_model",
    "train_on_file",
    "with_adapters",
]

QUESTIONS = (
    "Describe your morning in one sentence.",
    "Write one sentence about the weather.",
    "Say something about a film you know.",
    "Tell me about your neighbours in one sentence.",
)


def question_prompts(tokenizer: Any) -> list[str]:
    """Return open questions in the chat form of a model, up to where its answer begins."""
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in QUESTIONS
    ]


def answer_pairs(
    model: Any,
    tokenizer: Any,
    score: Callable[[str], float],
    *,
    count: int,
    max_new_tokens: int,
    generator: torch.Generator,
) -> Pairs:
    """Let a model answer the open questions twice; the answer of the higher score is chosen.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, with a chat template.
        score: of the text of an answer.
        count: questions asked; pairs of equal score are left out.
        max_new_tokens: longest answer.
        generator: of the answers.
    """

    def reward(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        texts = decode_completions(tokenizer, tokens, mask)
        return torch.tensor([score(text) for text in texts], dtype=torch.float64)

    return draw_pairs(
        model,
        *_asked(tokenizer, count),
        reward,
        max_new_tokens=max_new_tokens,
        generator=generator,
        noisy=False,
    )


def mean_score(
    model: Any,
    tokenizer: Any,
    score: Callable[[str], float],
    *,
    max_new_tokens: int,
    generator: torch.Generator,
    count: int = 32,
) -> float:
    """Mean score of a model's answers to the open questions; arguments as above."""
    drawn = sample(
        model, *_asked(tokenizer, count), max_new_tokens=max_new_tokens, generator=generator
    )
    texts = decode_completions(tokenizer, drawn.tokens, drawn.mask)
    return sum(map(score, texts)) / count


def _asked(tokenizer: Any, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    chats = question_prompts(tokenizer)
    return encode_rows(tokenizer, [{"prompt": chats[n % len(chats)]} for n in range(count)])


def with_adapters(model: Any, *, rank: int, seed: int) -> Any:
    """Freeze a model and add low-rank adapters (LoRA) to all its linear layers.

    Args:
        model: a Hugging Face model; its layers are replaced in place.
        rank: >= 1.
        seed: of the adapters' weights; the global generators are left as they were.

    Returns:
        The model of PEFT, in evaluation mode; at first it gives what the model gave.
    """
    peft = require("peft", extra="trl")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        return peft.get_peft_model(model, settings).eval()


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model, adapters merged, and its tokenizer as safetensors."""
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_on_file(
    lab: Lab,
    objective: Objective,
    *,
    model: str,
    pairs: str,
    updates: int,
    batch_size: int,
    learning_rate: float,
    rank: int,
    max_tokens: int,
) -> dict[str, float]:
    """Train a user's model on a user's pairs; leave it in the folder ``model`` of the run.

    A tenth of the pairs is only looked at.

    Args:
        lab: the workshop; seed 0 trains, the others do nothing.
        objective: the method.
        model: for :func:`~steelyard.lab.pretrained.load_language_model`.
        pairs: file, for :func:`~steelyard.lab.preference_files.read_pairs`.
        updates: how many.
        batch_size: pairs each.
        learning_rate: constant.
        rank: of the adapters; 0 = train all weights.
        max_tokens: of prompts and of responses.

    Returns:
        The last row of training, with ``held_out_loss`` and ``held_out_accuracy``.
    """
    if lab.seed != 0:
        return {}
    records = read_pairs(pairs)

    def make() -> PreferenceLearner:
        loaded, tokenizer = load_language_model(model)
        encoded = encode_pairs(tokenizer, records, max_tokens=max_tokens)
        order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(lab.seed))
        aside = len(encoded) // 10
        held_out = encoded[order[:aside]] if aside else None
        before = token_logprobs(loaded, held_out) if held_out is not None else None

        def look(trained: Any, step: int) -> dict[str, float]:
            if step >= updates:
                save_model(trained, tokenizer, lab.folder / "model")
            if held_out is None or before is None:
                return {}
            batch = held_out_batch(trained, held_out, before)
            chosen, rejected = (side.log_ratio.sum(-1) for side in batch)
            return {
                "held_out_loss": objective(batch).item(),
                "held_out_accuracy": (chosen > rejected).double().mean().item(),
            }

        return PreferenceLearner(
            with_adapters(loaded, rank=rank, seed=lab.seed) if rank else loaded,
            encoded[order[aside:]],
            objective,
            PreferenceSettings(
                batch_size=batch_size, updates=min(10, updates), learning_rate=learning_rate
            ),
            seed=lab.seed,
            probe=look,
        )

    row = lab.train("own", make, total=updates)[-1]
    return {key: value for key, value in row.items() if key != "step"}


def held_out_batch(
    model: Any, pairs: Pairs, before: tuple[torch.Tensor, torch.Tensor]
) -> PairBatch:
    """All held-out pairs as one batch, without gradient."""
    after = token_logprobs(model, pairs)
    masks = pairs.chosen_mask, pairs.rejected_mask
    chosen, rejected = (Responses(*side) for side in zip(after, before, masks, strict=True))
    return PairBatch(chosen, rejected)
