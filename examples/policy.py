"""Train a language model on a verifiable task on one process or on many, by TRL and accelerate.

    python examples/policy.py
    torchrun --nproc-per-node 2 examples/policy.py --objective canon
    accelerate launch examples/policy.py --objective adora    # as `accelerate config` says

A tiny model first learns to sort from demonstrations of which only a part is right, then by reward.
With your own model and task replace `base_model` and `task`.
"""

import gc
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from datasets import Dataset
from trl import GRPOConfig

from steelyard.integrations.trl import GRPOTrainer, objectives
from steelyard.lab.tasks import sorting
from steelyard.lab.tiny_lm import (
    encode_completions,
    encode_rows,
    pretrain,
    tiny_lm,
    tiny_tokenizer,
)

OBJECTIVES = {
    "grpo": objectives.grpo,
    "gbpo": objectives.gbpo,
    "canon": objectives.canon,
    "adora": objectives.adora,
}


@dataclass
class Settings:
    """Settings of the example."""

    objective: Literal["grpo", "gbpo", "canon", "adora"] = "gbpo"
    """What the policy is trained by."""
    steps: int = 60
    """Updates by reward."""
    samples: int = 8
    """Answers to each prompt."""
    batch: int = 64
    """Answers of an update and process."""
    lr: float = 5e-4
    """Learning rate."""
    demonstrations: int = 300
    """Updates by demonstrations before."""
    out: Path = Path("runs/policy")
    """Where the trained model and metrics.json go."""


def base_model(task: Any, tokenizer: Any, steps: int) -> Any:
    """A model that has seen demonstrations, the same on every process."""
    generator = torch.Generator().manual_seed(0)
    rows = task.sample(2000, generator)
    answers = encode_completions(tokenizer, task.demonstrate_mixed(rows, generator))
    model = tiny_lm(tokenizer)
    prompts = encode_rows(tokenizer, rows)
    pretrain(model, *prompts, *answers, steps=steps, batch_size=64, lr=3e-3, generator=generator)
    return model


def main(settings: Settings) -> None:
    """Train, and leave together."""
    accelerator = train(settings)
    accelerator.wait_for_everyone()  # nobody leaves while the first process saves
    accelerator.free_memory()
    gc.collect()  # DDP's reducer has to go before its process group, or torch may lock up
    accelerator.end_training()


def train(settings: Settings) -> Any:
    """Train and save on the first process; return the accelerator."""
    task = sorting(4)
    tokenizer = tiny_tokenizer(task.symbols)
    trainer = GRPOTrainer(
        base_model(task, tokenizer, settings.demonstrations),
        task.reward,
        GRPOConfig(
            output_dir=str(settings.out),
            max_steps=settings.steps,
            num_generations=settings.samples,
            per_device_train_batch_size=settings.batch,
            max_completion_length=task.max_new_tokens,
            learning_rate=settings.lr,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=False,
            use_cpu=not torch.cuda.is_available(),  # without it several processes stay apart
            seed=0,
        ),
        Dataset.from_list(task.sample(512, torch.Generator().manual_seed(1))),
        processing_class=tokenizer,
        **OBJECTIVES[settings.objective](),
    )
    trainer.train()
    trainer.save_model(str(settings.out))
    if trainer.accelerator.is_main_process:
        rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
        found = {"rewards": rewards, "processes": trainer.accelerator.num_processes}
        (settings.out / "metrics.json").write_text(json.dumps(found, indent=2) + "\n")
        quarter = max(1, len(rewards) // 4)
        first, last = (sum(part) / quarter for part in (rewards[:quarter], rewards[-quarter:]))
        print(f"reward {first:.2f} -> {last:.2f}, model: {settings.out}")
    return trainer.accelerator


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
