"""Align a language model with f-DPO on one process or on many, by TRL and accelerate.

    python examples/preference.py
    torchrun --nproc-per-node 2 examples/preference.py --divergence JENSEN_SHANNON_DOUBLE
    accelerate launch examples/preference.py    # as `accelerate config` says

Without arguments a tiny model from scratch learns to prefer sorted answers. With your own model
and pairs (JSON lines with prompt, chosen, rejected):

    torchrun --nproc-per-node 2 examples/preference.py --model DIR --pairs pairs.jsonl --lora
"""

import copy
import gc
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import tyro
from datasets import Dataset
from trl import DPOConfig

from steelyard import divergences
from steelyard.integrations.trl import DPOTrainer
from steelyard.lab.preference_files import read_pairs
from steelyard.lab.pretrained import load_language_model
from steelyard.lab.tasks import sorting
from steelyard.lab.tiny_lm import tiny_lm, tiny_tokenizer


@dataclass
class Settings:
    """Settings of the example."""

    model: str | None = None
    """A folder of a Hugging Face model, or smollm2; a tiny model from scratch by default."""
    pairs: Path | None = None
    """JSON lines; sorted against unsorted answers by default."""
    divergence: str = "KL"
    """A divergence of steelyard.divergences by its name: KL, JENSEN_SHANNON_DOUBLE, ..."""
    beta: float = 0.1
    """Strength of the divergence."""
    steps: int = 30
    """Updates."""
    batch: int = 8
    """Pairs of an update and process."""
    lr: float = 1e-3
    """Learning rate."""
    lora: bool = False
    """Train adapters only."""
    out: Path = Path("runs/preference")
    """Where the trained model and metrics.json go."""


def sorted_pairs(count: int) -> list[dict[str, Any]]:
    """Prompts with a right answer and the numbers in the order in which they were given."""
    task = sorting(4)
    generator = torch.Generator().manual_seed(0)
    rows = task.sample(count, generator)
    right = task.demonstrate(rows, generator)
    pairs = [
        {
            "prompt": row["prompt"],
            "chosen": f" {good}",
            "rejected": f" {row['prompt'].rstrip(' :')}",
        }
        for row, good in zip(rows, right, strict=True)
    ]
    return [pair for pair in pairs if pair["chosen"].split() != pair["rejected"].split()]


def main(settings: Settings) -> None:
    """Train, and leave together."""
    accelerator = train(settings)
    accelerator.wait_for_everyone()  # nobody leaves while the first process saves
    accelerator.free_memory()
    gc.collect()  # DDP's reducer has to go before its process group, or torch may lock up
    accelerator.end_training()


def train(settings: Settings) -> Any:
    """Train, evaluate on the last tenth of the pairs, save; return the accelerator."""
    pairs = read_pairs(settings.pairs) if settings.pairs else sorted_pairs(400)
    if settings.model:
        model, tokenizer = load_language_model(settings.model)
    else:
        tokenizer = tiny_tokenizer(sorting(4).symbols)
        model = tiny_lm(tokenizer, num_layers=1)
    held_out = max(1, len(pairs) // 10)
    trainer = DPOTrainer(
        model,
        ref_model=None if settings.lora else copy.deepcopy(model),
        args=DPOConfig(
            output_dir=str(settings.out),
            beta=settings.beta,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch,
            learning_rate=settings.lr,
            lr_scheduler_type="constant",
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            bf16=False,
            use_cpu=not torch.cuda.is_available(),  # without it several processes stay apart
            seed=0,
        ),
        train_dataset=Dataset.from_list(pairs[:-held_out]),
        eval_dataset=Dataset.from_list(pairs[-held_out:]),
        processing_class=tokenizer,
        divergence=getattr(divergences, settings.divergence),
        peft_config=peft.LoraConfig(target_modules="all-linear") if settings.lora else None,
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(str(settings.out))
    if trainer.accelerator.is_main_process:
        metrics["processes"] = trainer.accelerator.num_processes
        (settings.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        print(f"ranking accuracy {metrics['eval_ranking/accuracy']:.2f}, model: {settings.out}")
    return trainer.accelerator


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
