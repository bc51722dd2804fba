"""Measure one step of reinforcement learning on a language model: ours in TRL beside TRL's own.

The same model, prompts and generation for all. ``steelyard`` is our ``GRPOTrainer`` with
``objectives.grpo()`` and ``fused_head=True``; ``trl`` is TRL's trainer as it comes, which in 1.16
has a chunked head of its own; ``full logits`` is TRL's trainer with the log-probabilities of a
plain softmax over all logits. Two tasks: ``update`` (loss and gradients of completions that are
there) and ``step`` (sample, score and update; tokens a second).

Everything runs on one thread, each case in a process of its own; the contestants must agree in loss
and gradient first. Memory is the peak of a fork beyond what it held at the start.

    python benchmarks/rlvr.py                # about 10 minutes; updates the committed result
    python benchmarks/rlvr.py --quick        # a small vocabulary, one round; writes nothing
"""

import argparse
import copy
import json
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from paired import OURS, Contest, Row, agreeing, in_a_process, measure, setting

RESULT = Path(__file__).parent / "results/rlvr.json"
ROUNDS = 5
VOCABULARIES = (32_000, 128_000)
SIZE = {"completions": 16, "tokens": 64, "prompt": 16, "width": 256, "layers": 4}
TARGETS = (("memory", 0.3), ("time", 1.0))  # against TRL's own path and against full logits
PACKAGES = ("steelyard", "torch", "transformers", "trl", "accelerate")


def trainers(vocabulary: int) -> dict[str, Any]:
    """Build the three trainers around models with the same weights."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    from steelyard.integrations.trl import GRPOTrainer, objectives
    from steelyard.lab.tiny_lm import tiny_tokenizer

    class FullLogits(trl.GRPOTrainer):
        def _get_per_token_logps_and_entropies(  # type: ignore[no-untyped-def]
            self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        ):
            logits = model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                logits_to_keep=logits_to_keep + 1,
            ).logits[:, :-1]
            logprobs = (logits / self.temperature).log_softmax(-1)
            chosen = logprobs.gather(-1, input_ids[:, -logits_to_keep:, None])[..., 0]
            entropy = None
            if kwargs.get("compute_entropy"):
                with torch.no_grad():
                    entropy = -(logprobs.exp() * logprobs).sum(-1)
            return chosen, entropy, None

    words = [f"w{number}" for number in range(vocabulary - 3)]
    tokenizer = tiny_tokenizer(words)
    prompt = " ".join(words[: SIZE["prompt"]])
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=SIZE["width"],
        intermediate_size=4 * SIZE["width"],
        num_hidden_layers=SIZE["layers"],
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [float(index % 2) for index in range(len(completions))]

    def build(kind: Any, **extra: Any) -> Any:
        torch.manual_seed(0)
        return kind(
            model=LlamaForCausalLM(copy.deepcopy(config)),  # a trainer changes its model's
            processing_class=tokenizer,
            reward_funcs=reward,
            train_dataset=Dataset.from_list([{"prompt": prompt}] * 64),
            args=trl.GRPOConfig(
                output_dir=tempfile.mkdtemp(),
                per_device_train_batch_size=SIZE["completions"],
                num_generations=8,
                max_completion_length=SIZE["tokens"],
                loss_type="bnpo",
                report_to="none",
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
            ),
            **extra,
        )

    return {
        OURS: build(GRPOTrainer, fused_head=True, **objectives.grpo()),
        "trl": build(trl.GRPOTrainer),
        "full logits": build(FullLogits),
    }


def contest(task: str, vocabulary: int) -> Contest:
    import torch

    found = trainers(vocabulary)
    rows = [found[OURS].train_dataset[index] for index in range(SIZE["completions"])]
    prepared: dict[str, Any] = {}
    for name, trainer in found.items():
        trainer.model.train()
        trainer.state.max_steps, trainer.current_gradient_accumulation_steps = 100, 1
        torch.manual_seed(1)
        prepared[name] = trainer._generate_and_score_completions(rows)

    def update(name: str) -> torch.Tensor:
        trainer = found[name]
        trainer.model.zero_grad(set_to_none=True)
        loss: torch.Tensor = trainer.compute_loss(trainer.model, prepared[name])
        loss.backward()
        return loss

    def step(name: str) -> None:
        torch.manual_seed(2)
        prepared[name] = found[name]._generate_and_score_completions(rows)
        update(name)

    def errors() -> dict[str, float]:
        gradients = {}
        for name, trainer in found.items():
            update(name)
            gradients[name] = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
        return agreeing(gradients, "full logits", 1e-3)

    run = {"update": update, "step": step}[task]
    return Contest({name: lambda name=name: run(name) for name in found}, errors)


def summary(rows: list[Row]) -> list[Row]:
    """Each target at each vocabulary, for the update, against both peers."""
    judged = []
    for vocabulary in sorted({row["size"]["vocabulary"] for row in rows}):
        for task in ("update", "step"):
            size = {"vocabulary": vocabulary}
            case = [row for row in rows if (row["size"], row["task"]) == (size, task)]
            ours = next(row for row in case if row["name"] == OURS)
            for peer in (row for row in case if row["name"] != OURS):
                for figure, most in TARGETS:
                    if (figure, task) == ("memory", "step"):
                        continue
                    value = (
                        peer["ours_over_this"][0]
                        if figure == "time"
                        else ours["peak_extra_mib"] / max(peer["peak_extra_mib"], 0.1)
                    )
                    judged.append(
                        {"task": task, "size": size, "peer": peer["name"]}
                        | {"figure": figure, "target": most, "value": value, "met": value <= most}
                    )
    return judged


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small, one round, writes nothing")
    parser.add_argument("--out", type=Path, default=RESULT, help="where to write the result")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        import torch

        torch.set_num_threads(1)
        task, vocabulary, rounds = json.loads(given.measure)
        print(json.dumps(measure(contest(task, vocabulary), rounds)))
        return
    began = time.monotonic()
    rows: list[Row] = []
    for vocabulary in (2_000,) if given.quick else VOCABULARIES:
        for task in ("update", "step"):
            for row in in_a_process(__file__, task, vocabulary, 1 if given.quick else ROUNDS):
                tokens = SIZE["completions"] * SIZE["tokens"] / row["cpu_seconds"]
                rows.append(
                    {"task": task, "size": {"vocabulary": vocabulary}}
                    | row
                    | {"tokens_per_second": tokens}
                )
                print(
                    f"{task:7}{vocabulary:>8} {row['name']:12}{row['cpu_seconds']:8.3f} s"
                    f"{row['peak_extra_mib']:9.0f} MiB   ours/this {row['ours_over_this'][0]:.3f}"
                )
    judged = summary(rows)
    for line in judged:
        print(
            f"{'met   ' if line['met'] else 'MISSED'} {line['task']} "
            f"V={line['size']['vocabulary']} {line['figure']} against {line['peer']}: "
            f"{line['value']:.3f}, target {line['target']}"
        )
    if not given.quick:
        result = setting(PACKAGES) | {
            "date": datetime.now(UTC).date().isoformat(),
            "size": SIZE,
            "settings": {"rounds": ROUNDS, "threads": 1},
            "wall_seconds": {"all": time.monotonic() - began},
            "results": rows,
            "targets": judged,
        }
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
