"""SmolLM2 teaches three of its own layers: the true run of the recipe adpa."""

import copy
import tempfile
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steelyard.lab.data import sentiment_lexicon
from steelyard.lab.preferences import (
    PairBatch,
    Pairs,
    PreferenceLearner,
    PreferenceSettings,
    draw_pairs,
)
from steelyard.lab.pretrained import load_language_model
from steelyard.lab.real_models import question_prompts, with_adapters
from steelyard.lab.tiny_lm import decode_completions, encode_rows, pretrain, sample
from steelyard.lab.words import lexicon_score
from steelyard.preference import f_dpo_loss

LAYERS, TOKENS, ANSWERS = 3, 16, 32
GAMMA = 1.0


def teach_layers(*, pairs: int, updates: int, seed: int) -> dict[str, float]:
    """Align the teacher by DPO, cut out and warm up the student, distil by ADPA.

    The reward is a sentiment lexicon, over answers to open questions.

    Returns:
        Mean reward of all models, the student's mean advantage on its own responses in the first
        and in the last pass over them, and the negative log-likelihood of chosen responses.
    """
    before, tokenizer = load_language_model("smollm2")
    chats, lexicon = question_prompts(tokenizer), sentiment_lexicon("vader")
    generator = torch.Generator().manual_seed(seed)

    def reward(tokens: Tensor, mask: Tensor) -> Tensor:
        texts = decode_completions(tokenizer, tokens, mask)
        return torch.tensor([lexicon_score(text, lexicon) for text in texts])

    def prompts(count: int) -> tuple[Tensor, Tensor]:
        return encode_rows(tokenizer, [{"prompt": chats[n % len(chats)]} for n in range(count)])

    def mean_reward(model: Any) -> float:
        drawn = sample(model, *prompts(ANSWERS), max_new_tokens=TOKENS, generator=generator)
        return reward(drawn.tokens, drawn.mask).mean().item()

    shown = draw_pairs(
        before,
        *prompts(pairs),
        reward,
        max_new_tokens=TOKENS,
        generator=generator,
        noisy=False,
    )
    aligned = align(before, shown, updates=max(1, updates // 3), seed=seed)
    student = cut_down(before, LAYERS)
    losses = warm_up(student, shown, steps=2 * updates, generator=generator)
    found = {"pairs": float(len(shown)), "warm_up_first": losses[0], "warm_up_last": losses[-1]}
    found |= {"before/reward": mean_reward(before), "aligned/reward": mean_reward(aligned)}
    found["student/reward"] = mean_reward(student)
    asked = prompts(len(chats))
    known = {tuple(ids[kept].tolist()): chat for ids, kept, chat in zip(*asked, chats, strict=True)}
    asked_of = zip(shown.prompt_ids, shown.prompt_mask, strict=True)
    rows = {
        "prompt": [known[tuple(ids[kept].tolist())] for ids, kept in asked_of],
        "chosen": decode_completions(tokenizer, shown.chosen, shown.chosen_mask),
    }
    logs = distil(student, aligned, before, tokenizer, rows, updates=updates, seed=seed)
    for key in ("advantage", "nll", "mass"):
        found |= {f"{key}_first": logs[0][key], f"{key}_last": logs[-1][key]}
    return found | {"taught/reward": mean_reward(student.eval())}


def align(model: Any, pairs: Pairs, *, updates: int, seed: int) -> Any:
    """Tune a copy by DPO with adapters, and merge them."""

    def objective(batch: PairBatch) -> Tensor:
        chosen, rejected = (side.log_ratio.sum(-1) for side in batch)
        return f_dpo_loss(chosen, rejected, beta=0.1)

    learner = PreferenceLearner(
        with_adapters(copy.deepcopy(model), rank=16, seed=seed),
        pairs,
        objective,
        PreferenceSettings(batch_size=4, updates=updates, learning_rate=5e-4),
        seed=seed,
    )
    learner.advance()
    return learner.model.merge_and_unload()


def cut_down(model: Any, layers: int) -> Any:
    """Copy a Llama with only some of its layers, evenly spread from the first to the last."""
    student = copy.deepcopy(model)
    kept = torch.linspace(0, len(student.model.layers) - 1, layers).round().long().tolist()
    student.model.layers = nn.ModuleList(student.model.layers[place] for place in kept)
    for place, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = place
    student.config.num_hidden_layers = layers
    return student


def warm_up(student: Any, pairs: Pairs, *, steps: int, generator: torch.Generator) -> list[float]:
    """Fine-tune on chosen and rejected responses, so that there is a student to speak of."""
    settings = partial(pretrain, steps=steps, batch_size=8, lr=1e-3, generator=generator)
    return settings(student, *pairs.together())


def distil(
    student: Any,
    aligned: Any,
    before: Any,
    tokenizer: Any,
    rows: dict[str, list[str]],
    *,
    updates: int,
    seed: int,
) -> list[dict[str, float]]:
    """ADPA with the trainer; the advantages are computed once. Returns the log, a row a pass."""
    import transformers
    from datasets import Dataset  # type: ignore[import-untyped]

    from steelyard.integrations.trl import ADPA, DistillationTrainer

    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        args = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=4,
            max_steps=updates,
            learning_rate=2e-4,
            logging_steps=-(-len(rows["prompt"]) // 4),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
        )
        trainer = DistillationTrainer(
            student,
            aligned,
            args,
            Dataset.from_dict(rows),
            objective=ADPA(gamma=GAMMA),
            reference_teacher=before,
            advantages=f"{folder}/advantages.safetensors",
            max_new_tokens=TOKENS,
            processing_class=tokenizer,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return [row for row in trainer.state.log_history if "advantage" in row]
