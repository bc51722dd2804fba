"""Two checkpoints compared token by token, from files on this machine.

The base model and the trained one are loaded, the trained one answers the prompts, and both are
scored on its answers by :func:`steelyard.tokens.model_token_shift`. Needs the extra ``lm``;
:func:`train_and_compare` the extra ``trl``.
"""

import copy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steelyard._checks import check_count
from steelyard._extras import require
from steelyard.lab.json_lines import read_json_lines
from steelyard.lab.pretrained import load_language_model
from steelyard.lab.tiny_lm import sample
from steelyard.tokens import (
    TokenShift,
    heat_map_html,
    model_token_shift,
    plot_js_percentiles,
    rank_table,
    shift_summary,
)

if TYPE_CHECKING:
    from steelyard.lab.tasks import Task

__all__ = ["compare_checkpoints", "compare_models", "read_prompts", "train_and_compare"]

BATCH = 8
SHOWN = 8  # answers on the page


def read_prompts(path: str | Path, *, column: str = "prompt") -> list[Any]:
    """Read prompts: a field of JSON lines, or the lines of a plain text file.

    Args:
        path: ``.jsonl`` or ``.json`` = JSON lines; anything else = a prompt a line.
        column: the field; its value is a text, or a list of chat messages.

    Raises:
        ValueError: no such file, no prompt, or a line without the field; names the line.
    """
    path = Path(path)
    if path.suffix in (".jsonl", ".json"):
        found = [record[column] for record in read_json_lines(path, required=(column,))]
        for number, prompt in enumerate(found, start=1):
            if not prompt or not isinstance(prompt, str | list):
                raise ValueError(
                    f"record {number} of {path}: {column!r} must be a text or a list of messages, "
                    f"got {prompt!r}"
                )
        return found
    if not path.is_file():
        raise ValueError(f"no file at {path}")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no prompt")
    return lines


def compare_checkpoints(
    base: str | Path,
    trained: str | Path,
    prompts: str | Path,
    *,
    prompt_column: str = "prompt",
    max_new_tokens: int = 64,
    seed: int = 0,
    heat_map: str | Path | None = None,
) -> dict[str, float]:
    """Compare two local checkpoints on the prompts of a file.

    Args:
        base: folder of the base model, or ``"smollm2"``.
        trained: folder of the model after training, with the same tokenizer.
        prompts: file for :func:`read_prompts`.
        prompt_column: field of a JSON line that holds the prompt.
        max_new_tokens: longest answer.
        seed: of the answers.
        heat_map: where to write the page of coloured answers; the percentile curve goes beside it.

    Returns:
        What :func:`compare_models` returns.

    Raises:
        ValueError: unusable folders or file, or models with different vocabularies.
    """
    questions = read_prompts(prompts, column=prompt_column)
    base_model, tokenizer = load_language_model(base)
    model, its_tokenizer = load_language_model(trained)
    if tokenizer.get_vocab() != its_tokenizer.get_vocab():
        raise ValueError(
            f"base and trained model must have the same vocabulary, got {len(tokenizer)} tokens in "
            f"{base} and {len(its_tokenizer)} in {trained}, or other texts for the same ids"
        )
    return compare_models(
        base_model,
        model,
        tokenizer,
        questions,
        max_new_tokens=max_new_tokens,
        seed=seed,
        heat_map=heat_map,
    )


@torch.no_grad()
def compare_models(
    base: Any,
    trained: Any,
    tokenizer: Any,
    prompts: list[Any],
    *,
    max_new_tokens: int = 64,
    seed: int = 0,
    heat_map: str | Path | None = None,
) -> dict[str, float]:
    """Let the trained model answer, and measure its shift from the base at each token.

    Args:
        base: a causal language model of Hugging Face.
        trained: the same after training.
        tokenizer: of both, padding on the left.
        prompts: texts, or lists of chat messages.
        max_new_tokens: longest answer.
        seed: of the answers.
        heat_map: where to write the page of coloured answers, or ``None``.

    Returns:
        ``tokens`` compared, ``share_below`` (0.01 nats), ``share_above`` (0.1), percentiles
        ``js_p50 .. js_p99``, mean entropies, and of the tokens above 0.1 the share whose new
        favourite was among the base's ten likeliest and the share the base held for unlikely.

    Raises:
        ValueError: no prompts, or vocabularies that differ.
    """
    check_count("max_new_tokens", max_new_tokens)
    if not prompts:
        raise ValueError("prompts must not be empty")
    generator = torch.Generator().manual_seed(seed)
    shifts: list[TokenShift] = []
    shown: list[tuple[list[str], Tensor]] = []
    for start in range(0, len(prompts), BATCH):
        ids, mask = _encode(tokenizer, prompts[start : start + BATCH])
        drawn = sample(trained, ids, mask, max_new_tokens=max_new_tokens, generator=generator)
        for row in range(len(ids)):
            question, answer = ids[row, mask[row]], drawn.tokens[row, drawn.mask[row]]
            if answer.numel() == 0:
                raise ValueError(f"completion of prompt {start + row} is empty")
            both = torch.cat((question, answer))[None]
            shift = model_token_shift(base, trained, both)
            shift = TokenShift(*(field[0, len(question) - 1 :] for field in shift))
            shifts.append(shift)
            if len(shown) < SHOWN:
                words = [tokenizer.decode([token]) for token in answer.tolist()]
                shown.append((words, shift.js))
    whole = TokenShift(*(torch.cat(field) for field in zip(*shifts, strict=True)))
    if heat_map is not None:
        _write(Path(heat_map), shown, whole.js)
    return _metrics(whole)


def _metrics(shift: TokenShift) -> dict[str, float]:
    summary, table = shift_summary(shift.js[None]), rank_table(shift)
    names = ("js_p50", "js_p90", "js_p95", "js_p99")
    return {
        "tokens": float(shift.js.numel()),
        "share_below": summary.share_below.item(),
        "share_above": summary.share_above.item(),
        **dict(zip(names, summary.percentiles.tolist(), strict=True)),
        "base_entropy": shift.base_entropy.mean().item(),
        "trained_entropy": shift.rl_entropy.mean().item(),
        "favourite_in_base_top10": table.rl_top1_in_base_top[9].item(),
        "new_favourites": table.new_token_share.item(),
    }


def _encode(tokenizer: Any, prompts: list[Any]) -> tuple[Tensor, Tensor]:
    """Ids and bool mask ``[B, P]``, padded on the left; chat messages through the template."""
    texts = [
        prompt
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    return batch["input_ids"], batch["attention_mask"].bool()


def _write(path: Path, shown: list[tuple[list[str], Tensor]], js: Tensor) -> None:
    """One page with the first answers, one after the other; the percentile curve beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    words: list[str] = []
    values: list[Tensor] = []
    for tokens, row in shown:
        words += [*tokens, "\n\n"]
        values += [row, row.new_zeros(1)]
    page = heat_map_html(words, torch.cat(values), title=f"Token shift of {len(shown)} answers")
    path.write_text(page, encoding="utf-8")
    figure = plot_js_percentiles({"trained against base": js})
    figure.savefig(path.with_suffix(".svg"))


def train_and_compare(
    name_or_path: str,
    task: "Task",
    *,
    steps: int,
    seed: int,
    heat_map: str | Path | None = None,
    questions: int = 64,
) -> dict[str, float]:
    """Fine-tune a real model on a task's reward through TRL with LoRA, and compare it with itself.

    Args:
        name_or_path: for :func:`~steelyard.lab.pretrained.load_language_model`.
        task: prompts and reward.
        steps: updates, of 2 prompts with 8 answers each.
        seed: of everything.
        heat_map: as in :func:`compare_models`.
        questions: prompts of the comparison.

    Returns:
        What :func:`compare_models` returns, with ``reward_first`` and ``reward_last``: mean reward
        of the first and the last fifth of the updates.
    """
    datasets, peft, trl = (require(name, extra="trl") for name in ("datasets", "peft", "trl"))
    from steelyard.integrations.trl import GRPOTrainer, objectives

    model, tokenizer = load_language_model(name_or_path)
    base = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    rows = task.sample(2 * steps + questions, generator)
    chats = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=task.reward,
            train_dataset=datasets.Dataset.from_list(chats[: 2 * steps]),
            args=trl.GRPOConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=16,
                num_generations=8,
                max_completion_length=task.max_new_tokens,
                learning_rate=3e-4,
                seed=seed,
                report_to="none",
                logging_steps=1,
                save_strategy="no",
                use_cpu=not torch.cuda.is_available(),
                bf16=False,
            ),
            peft_config=peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
            **objectives.dr_grpo(),
        )
        trainer.train()
        rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
        trained = trainer.model.merge_and_unload().eval()
    fifth = max(1, len(rewards) // 5)
    found = compare_models(
        base,
        trained,
        tokenizer,
        [chat["prompt"] for chat in chats[2 * steps :]],
        max_new_tokens=task.max_new_tokens,
        seed=seed,
        heat_map=heat_map,
    )
    return found | {
        "reward_first": sum(rewards[:fifth]) / fifth,
        "reward_last": sum(rewards[-fifth:]) / fifth,
    }
