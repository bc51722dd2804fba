"""Measure one update of DPO, f-DPO, SparsePO, DCKD and ADPA beside TRL and beside full logits.

An update is what a trainer does with a batch: the forward passes of all models, the loss, what it
logs, the backward pass. The models are small (two layers) with a large vocabulary, so that the head
is most of the work, as in small language models. Everything runs on one thread, in float32. Each
case has a process of its own, where loss and gradients of the contestants must first agree. Memory:
the peak of one update, gradients included, in a fork beyond what the fork held at the start. Time:
rounds run all contestants in turn (A B C, then C B A); the figure to read is our CPU time over a
peer's inside one round, median over the rounds, with smallest and largest.

    python benchmarks/preference.py                 # about 20 minutes; updates the committed result
    python benchmarks/preference.py --quick         # small sizes, one round; writes nothing
    python benchmarks/preference.py --only dckd     # rows of tasks that were not run stay

TRL has no SparsePO, DCKD or ADPA.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paired import OURS, Contest, Run, agreeing
from suite import Case, Suite, Target, main

PACKAGES = ("steelyard", "torch", "transformers", "trl")
PLAIN, TRL, KERNEL = "plain, full logits", "TRL DPOTrainer", "steelyard, TRL's kernel"
TASKS = ("dpo", "f_dpo", "sparse_po", "dckd", "adpa")
VOCABULARIES = (32_768, 131_072)
QUICK = {"vocabulary": 4096, "length": 96}
PAIRS, LENGTH, PROMPT, WIDTH, TOP_K = 2, 256, 64, 256, 50
SYMBOLS = ("a", "b", "c", "=")


@dataclass(frozen=True)
class Size:
    """What a case is measured at: sequences are prompt and response together."""

    vocabulary: int
    pairs: int = PAIRS
    length: int = LENGTH
    prompt: int = PROMPT
    width: int = WIDTH


def model_of(size: Size, seed: int) -> Any:
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=2 * size.width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=size.length,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def sequences(size: Size, seed: int) -> dict[str, Any]:
    """Random tokens: prompts, then responses of uneven lengths, padded on the right."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    shape = (size.pairs, size.length)
    ids = torch.randint(3, size.vocabulary, shape, generator=generator)
    place = torch.arange(size.length)
    ends = torch.linspace(0.75 * size.length, size.length, size.pairs).long()
    kept = (place < ends[:, None]).long()
    return {
        "input_ids": ids * kept,
        "attention_mask": kept,
        "completion_mask": kept * (place >= size.prompt),
    }


def joined(*parts: dict[str, Any]) -> dict[str, Any]:
    import torch

    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def update(model: Any, loss_of: Any) -> Run:
    """Loss and backward pass; returns the loss and the gradient of the head."""

    def run() -> Any:
        model.zero_grad(set_to_none=True)
        model.train()
        loss = loss_of()
        loss.backward()
        return loss.detach(), model.get_output_embeddings().weight.grad

    return run


# The formulas on full logits.


def logits_of(model: Any, part: dict[str, Any]) -> Any:
    output = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"])
    return output.logits[:, :-1]


def scored(logits: Any, part: dict[str, Any]) -> Any:
    """Log-probabilities of the tokens, 0 outside responses."""
    found = logits.log_softmax(-1).gather(-1, part["input_ids"][:, 1:, None])[..., 0]
    return found * part["completion_mask"][:, 1:]


def plain_pairs(task: str, policy: Any, reference: Any, batch: dict[str, Any]) -> Any:
    """DPO, f-DPO with the Jensen-Shannon divergence, and TDPO1 (SparsePO with masks of 1)."""
    import torch
    from torch.nn.functional import logsigmoid

    logits = logits_of(policy, batch)
    with torch.no_grad():
        ref = logits_of(reference, batch)
    ratio = scored(logits, batch) - scored(ref, batch)
    if task == "sparse_po":
        p, q = ref.log_softmax(-1), logits.log_softmax(-1)
        ratio = ratio + (p.exp() * (p - q)).sum(-1) * batch["completion_mask"][:, 1:]
    score = ratio.sum(1)
    if task == "f_dpo":
        score = logsigmoid(score)
    chosen, rejected = score.chunk(2)
    return -logsigmoid(0.1 * (chosen - rejected)).mean()


def plain_distillation(
    task: str, student: Any, teachers: Sequence[Any], parts: Sequence[dict[str, Any]]
) -> Any:
    import torch

    from steelyard.distillation import adpa_loss, dckd_loss, teacher_advantage

    both = joined(*parts)
    chosen, other = logits_of(student, both).chunk(2)
    tokens = [part["input_ids"][:, 1:] for part in parts]
    masks = [part["completion_mask"][:, 1:] for part in parts]
    if task == "dckd":
        with torch.no_grad():
            goal = logits_of(teachers[0], both).chunk(2)
        return dckd_loss(
            chosen, other, *goal, *tokens, alpha=1.0, mask_chosen=masks[0], mask_rejected=masks[1]
        )
    with torch.no_grad():
        scores = [logits_of(teacher, parts[1]) for teacher in teachers]
        advantage = teacher_advantage(*scores, top_k=TOP_K)
    return adpa_loss(chosen, tokens[0], other, advantage, mask_chosen=masks[0], mask_own=masks[1])


# The trainers.


def settings(kind: Any, **others: Any) -> Any:
    folder = tempfile.mkdtemp()
    return kind(
        output_dir=folder,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **others,
    )


def pair_trainer(kind: Any, task: str, size: Size, **ours: Any) -> Any:
    import trl
    from datasets import Dataset

    from steelyard.lab.tiny_lm import tiny_tokenizer

    named = {"f_divergence_type": "js_divergence"} if task == "f_dpo" else {}
    return kind(
        model_of(size, 0),
        ref_model=model_of(size, 1),
        args=settings(trl.DPOConfig, beta=0.1, **named),
        train_dataset=Dataset.from_dict({"prompt": ["a ="], "chosen": [" a"], "rejected": [" b"]}),
        processing_class=tiny_tokenizer(SYMBOLS),
        **ours,
    )


def pair_runs(task: str, size: Size, small: Size) -> tuple[dict[str, Run], dict[str, Run]]:
    import trl

    from steelyard.integrations.trl import DPOTrainer, SparsePO

    sparse = {"sparse": SparsePO()} if task == "sparse_po" else {}
    trainers = {
        OURS: pair_trainer(DPOTrainer, task, size, fused_head=True, **sparse),
        KERNEL: pair_trainer(DPOTrainer, task, size, **sparse),
    }
    if task != "sparse_po":
        trainers[TRL] = pair_trainer(trl.DPOTrainer, task, size)
    policy, reference = model_of(size, 0), model_of(size, 1).eval()

    def runs(at: Size) -> dict[str, Run]:
        batch = joined(sequences(at, 2), sequences(at, 3))
        found = {
            name: update(trainer.model, lambda t=trainer: t.compute_loss(t.model, dict(batch)))
            for name, trainer in trainers.items()
        }
        found[PLAIN] = update(policy, lambda: plain_pairs(task, policy, reference, batch))
        return found

    return runs(size), runs(small)


def distillation_runs(task: str, size: Size, small: Size) -> tuple[dict[str, Run], dict[str, Run]]:
    import transformers
    from datasets import Dataset

    from steelyard.integrations.trl import ADPA, DCKD, DistillationTrainer
    from steelyard.lab.tiny_lm import tiny_tokenizer

    teachers = [model_of(size, 1), model_of(size, 4)]
    row = {"prompt": ["a ="], "chosen": [" a"], "rejected": [" b"], "own_ids": [[3, 2]]}
    trainer = DistillationTrainer(
        model_of(size, 0),
        teachers[0],
        settings(transformers.TrainingArguments),
        Dataset.from_dict(row),
        objective=DCKD() if task == "dckd" else ADPA(top_k=TOP_K),
        reference_teacher=None if task == "dckd" else teachers[1],
        processing_class=tiny_tokenizer(SYMBOLS),
        max_length=size.length,
    )
    student = model_of(size, 0)
    kinds = ("chosen", "rejected") if task == "dckd" else ("chosen", "own")

    def runs(at: Size) -> dict[str, Run]:
        parts = [sequences(at, 2), sequences(at, 3)]
        inputs = dict(zip(kinds, parts, strict=True))
        return {
            OURS: update(trainer.model, lambda: trainer.compute_loss(trainer.model, inputs)),
            PLAIN: update(student, lambda: plain_distillation(task, student, teachers, parts)),
        }

    return runs(size), runs(small)


def contest(task: str, **sizes: int) -> Contest:
    """What takes part in a case."""
    import datasets

    datasets.disable_progress_bars()
    size = Size(**sizes)
    small = Size(size.vocabulary, pairs=1, length=8, prompt=4, width=size.width)
    make = pair_runs if task in ("dpo", "f_dpo", "sparse_po") else distillation_runs
    runs, warm = make(task, size, small)

    def errors() -> dict[str, float]:
        found = {name: run() for name, run in runs.items()}
        agreeing({name: loss for name, (loss, _) in found.items()}, PLAIN, 1e-3)
        return agreeing({name: gradient for name, (_, gradient) in found.items()}, PLAIN, 1e-3)

    return Contest(runs, errors, warm)


SUITE = Suite(
    "preference",
    [
        Case(task, "preference", {"vocabulary": vocabulary}, quick, named=True)
        for task in TASKS
        for vocabulary, quick in zip(VOCABULARIES, (QUICK, None), strict=True)
    ],
    [
        Target(task, figure, peer, most)
        for task in TASKS
        for peer in (PLAIN, TRL)
        for figure, most in (("memory", 0.3), ("time", 1.0))
    ],
    PACKAGES,
    rounds=3,
    settings={"pairs": PAIRS, "length": LENGTH, "prompt": PROMPT, "width": WIDTH, "top_k": TOP_K},
)

if __name__ == "__main__":
    main(SUITE, __file__, __doc__)
