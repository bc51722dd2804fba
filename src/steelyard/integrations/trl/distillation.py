r"""A trainer that distils into a small language model: PLD, SinKD, DCKD, ADPA.

``transformers.Trainer`` with teachers as models, or with their advantages in a file. The
vocabulary is worked through in blocks, so that no logits of whole batches exist.
"""
# ruff: noqa: E402, a missing extra must be reported before its imports are tried

from steelyard._extras import require

require("trl", extra="trl")

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset  # type: ignore[import-untyped]
from torch import Tensor

from steelyard._checks import check_count, check_range
from steelyard.integrations.trl._backbone import (
    causal_model,
    check_plain_head,
    check_same_vocabulary,
    head_of,
    hidden_states,
    through,
)
from steelyard.integrations.trl._loop import ObjectiveTrainer
from steelyard.integrations.trl._preference_rows import check_responses, check_tokenized_pairs
from steelyard.integrations.trl._rewards import check_prompt_column
from steelyard.integrations.trl._sequences import generate_responses, pad_batch, response_tokens
from steelyard.integrations.trl.advantage_cache import (
    AdvantageCache,
    TokenAdvantages,
    check_finite,
    top_advantages,
)
from steelyard.integrations.trl.distillation_objectives import Loss, Objective, Rows

__all__ = ["DistillationTrainer"]

_BATCH = ("input_ids", "attention_mask", "completion_mask")


class DistillationTrainer(ObjectiveTrainer):
    r"""Distil from an aligned teacher into a student of the same tokenizer.

    ========== ============================================ ===================================
    objective  data                                         teachers
    ========== ============================================ ===================================
    ``PLD``    ``prompt``, ``chosen`` (or ``completion``)   one
    ``SinKD``  ``prompt``, ``chosen`` (or ``completion``)   one
    ``DCKD``   ``prompt``, ``chosen``, ``rejected``         the aligned one
    ``ADPA``   ``prompt``, ``chosen``; responses of the     aligned and before alignment, or
               student are sampled, or given in a column    their advantages in a file
               ``own_ids`` of tokens
    ========== ============================================ ===================================

    For ADPA responses are sampled once, from the student as it comes. With ``advantages=FILE`` the
    teachers' advantages are computed once and stored with them, and later runs need no teacher.
    For ADPA+ start from a student trained by DCKD.

    Means over tokens are those of a micro-batch of one rank; micro-batches count alike.

    Args:
        model: the student, or the name or folder of one.
        teacher: the (aligned) teacher, or its name or folder; frozen.
        args: ``transformers.TrainingArguments``.
        train_dataset: of texts or conversations, see above.
        eval_dataset: the same; ADPA needs the teachers for it.
        objective: for example ``DCKD(alpha=1.0)``.
        reference_teacher: the teacher before alignment, for ADPA. Not the student.
        advantages: file of :class:`~steelyard.integrations.trl.AdvantageCache` for the training
            data: read if it is there, else written.
        max_length: tokens that are kept of prompt and response.
        max_new_tokens: longest response that is sampled.
        temperature: of the sampling. Default 1.
        generation_batch_size: prompts that are answered at a time.
        processing_class: the tokenizer; ``None`` = the one stored with the student.
        peft_config: adapter for the student.
        **kwargs: others of ``transformers.Trainer``.

    Raises:
        ValueError: vocabularies that differ, an empty completion, a pair of identical responses, a
            file made for other data, a teacher that is missing, a head that is not linear. From
            ``train``: scores that are NaN, with the model they come from.
        TypeError: ``objective`` is none.

    Example:
        ::

            trainer = DistillationTrainer(
                student, aligned, args, pairs, objective=ADPA(gamma=1.0),
                reference_teacher=before, advantages="advantages.safetensors",
            )

    Source: Gao et al. (2025), arXiv:2502.17927; PLD: arXiv:2506.12542; SinKD: arXiv:2402.17110.
    """

    def __init__(
        self,
        model: Any,
        teacher: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        objective: Objective,
        reference_teacher: Any = None,
        advantages: str | Path | None = None,
        max_length: int | None = 1024,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        generation_batch_size: int = 16,
        processing_class: Any = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        for name in ("kinds", "needs_teacher", "loss"):
            if not hasattr(objective, name):
                raise TypeError(f"objective must be like DCKD(), got {type(objective).__name__}")
        check_count("max_new_tokens", max_new_tokens)
        check_count("generation_batch_size", generation_batch_size)
        check_range("temperature", temperature, above=0.0, below=float("inf"))
        self._objective = objective
        self._max_length = max_length
        self._sampling: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "batch_size": generation_batch_size,
        }
        self.columns = (*(f"{kind}_ids" for kind in ("prompt", *objective.kinds)), "row")
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        self._cache: AdvantageCache | None = None
        self._place_teachers(teacher, reference_teacher, advantages)
        self.data_collator = self._collate
        if train_dataset is not None:
            self.train_dataset = self._prepare("train_dataset", train_dataset, advantages)
        if isinstance(eval_dataset, Mapping):
            self.eval_dataset = {
                name: self._prepare(f"eval_dataset[{name!r}]", part)
                for name, part in eval_dataset.items()
            }
        elif eval_dataset is not None:
            self.eval_dataset = self._prepare("eval_dataset", eval_dataset)

    def _place_teachers(self, teacher: Any, reference: Any, path: str | Path | None) -> None:
        """Check which teachers there have to be, and freeze them."""
        own = "own" in self._objective.kinds
        stored = own and path is not None and Path(path).exists()
        if self._objective.needs_teacher and teacher is None:
            raise ValueError(f"teacher must be given for {self._objective}")
        if path is not None and not own:
            raise ValueError(
                f"advantages must be None for {self._objective}, which has no use for it"
            )
        if own and not stored and (teacher is None or reference is None):
            raise ValueError(
                "teacher and reference_teacher must both be given for advantages, "
                + ("or a file of them" if path is None else f"as there is no file {path} yet")
            )
        given = {"teacher": teacher, "reference_teacher": reference}
        placed = {k: None if m is None else self.place(m) for k, m in given.items()}
        self.teacher, self.reference_teacher = placed["teacher"], placed["reference_teacher"]
        check_same_vocabulary(student=self.model, **placed)
        for name, found in placed.items():
            if found is not None:
                check_plain_head(name, found)

    # Data.

    def _prepare(self, name: str, dataset: Any, path: str | Path | None = None) -> Any:
        """Tokens of a data set, with the student's own responses if they are needed."""
        check_prompt_column(name, dataset)
        if not isinstance(dataset, Dataset):
            raise TypeError(f"{name} must be a datasets.Dataset, got {type(dataset).__name__}")
        if "chosen" not in dataset.column_names and "completion" in dataset.column_names:
            dataset = dataset.rename_column("completion", "chosen")
        columns = [kind for kind in self._objective.kinds if kind != "own"]
        missing = [column for column in columns if column not in dataset.column_names]
        if missing:
            raise ValueError(
                f"{name} must have a column {missing[0]!r}, got the columns {dataset.column_names}"
            )
        check_responses(name, dataset, columns)
        tokens = [response_tokens(row, self.processing_class, columns) for row in dataset]
        for row, found in enumerate(tokens):
            _check_room(name, row, found, self._max_length)
        prepared = Dataset.from_list([{**found, "row": -1} for found in tokens])
        if "rejected" in columns:
            check_tokenized_pairs(name, prepared, self._max_length)
        if "own" in self._objective.kinds:
            given = dataset["own_ids"] if "own_ids" in dataset.column_names else None
            prepared = self._with_own(name, prepared, given, path)
        return prepared

    def _with_own(
        self, name: str, prepared: Any, given: Sequence[list[int]] | None, path: str | Path | None
    ) -> Any:
        prompts: list[list[int]] = prepared["prompt_ids"][:]
        if path is not None and Path(path).exists():
            self._cache = AdvantageCache(path)
            self._cache.check(prompts, check_same_vocabulary(student=self.model))
            rows = range(len(prompts))
            return self._own_columns(prepared, [self._cache[row].response for row in rows], rows)
        if self.teacher is None or self.reference_teacher is None:
            raise ValueError(f"teacher and reference_teacher must both be given for {name}")
        own = self._sample(prompts) if given is None else [list(ids) for ids in given]
        for row, ids in enumerate(own):
            if len(ids) == 0:
                raise ValueError(
                    f"{name} row {row}: 'own_ids' is an empty completion, of no tokens"
                )
        if path is None:
            return self._own_columns(prepared, own, [-1] * len(own))
        found = self._everywhere(
            (row, self._advantages_of(prompts[row], own[row])) for row in self._mine(len(own))
        )
        if self.accelerator.is_main_process:
            size = check_same_vocabulary(student=self.model)
            AdvantageCache.write(path, zip(prompts, own, found, strict=True), vocab_size=size)
        self.accelerator.wait_for_everyone()
        self._cache = AdvantageCache(path)
        return self._own_columns(prepared, own, range(len(own)))

    def _own_columns(self, prepared: Any, own: list[list[int]], rows: Sequence[int]) -> Any:
        return (
            prepared.remove_columns("row").add_column("own_ids", own).add_column("row", list(rows))
        )

    def _sample(self, prompts: list[list[int]]) -> list[list[int]]:
        """A response of the student to each prompt, the work shared by all ranks."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "responses must be given under FSDP and DeepSpeed, as a column own_ids of tokens "
                "or in the file advantages=, which one process can write"
            )
        mine = self._mine(len(prompts))
        written = generate_responses(
            self.model, self.processing_class, [prompts[row] for row in mine], **self._sampling
        )
        found: list[list[int]] = self._everywhere(zip(mine, written, strict=True))
        return found

    def _mine(self, number: int) -> range:
        return range(self.accelerator.process_index, number, self.accelerator.num_processes)

    def _everywhere(self, mine: Iterator[Any]) -> list[Any]:
        """Results of all ranks, in order, from pairs of place and result."""
        return [result for _, result in sorted(gather_object(list(mine)), key=lambda pair: pair[0])]

    @torch.no_grad()
    def _advantages_of(self, prompt: list[int], own: list[int]) -> TokenAdvantages:
        """Advantages at each token of one response, on the CPU."""
        device = self.accelerator.device
        ids = torch.tensor([[*prompt, *own]], device=device)
        mask = torch.ones_like(ids)
        states = [
            hidden_states(model, ids, mask)[0, len(prompt) - 1 : -1]
            for model in (self.teacher, self.reference_teacher)
        ]
        found = self._compare(*states)
        return TokenAdvantages(*(tensor.cpu() for tensor in found))

    def _compare(self, aligned: Tensor, reference: Tensor) -> TokenAdvantages:
        top_k = getattr(self._objective, "top_k", 50)
        heads = head_of(self.teacher), head_of(self.reference_teacher)
        return top_advantages(aligned, heads[0], reference, heads[1], top_k=top_k)

    def _collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """One padded batch for each kind of response, all of one width."""
        pairs = [
            (example["prompt_ids"], example[f"{kind}_ids"])
            for kind in self._objective.kinds
            for example in examples
        ]
        padding = self.processing_class.pad_token_id
        whole = pad_batch(pairs, padding=padding, max_length=self._max_length)
        number = len(examples)
        batch: dict[str, Any] = {
            kind: {name: whole[name][place * number : (place + 1) * number] for name in _BATCH}
            for place, kind in enumerate(self._objective.kinds)
        }
        if "own" in batch and self._cache is not None and examples[0]["row"] >= 0:
            batch["own"] |= self._stored(batch["own"]["completion_mask"], examples, self._cache)
        return batch

    def _stored(
        self, mask: Tensor, examples: list[dict[str, Any]], cache: AdvantageCache
    ) -> dict[str, Tensor]:
        """Advantages from the file, at the places of the tokens they belong to."""
        shape = (*mask.shape, cache.top_k)
        indices, values = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
        for place, example in enumerate(examples):
            found = cache[example["row"]].advantages
            check_finite(f"{cache.path}, row {example['row']}", found.values)
            kept = int(mask[place].sum())
            indices[place][mask[place] != 0] = found.indices[:kept]
            values[place][mask[place] != 0] = found.values[:kept]
        return {"indices": indices, "values": values}

    # The loss.

    def objective_loss(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Return the objective's loss of a batch, 0-d, and log its parts."""
        kinds = self._objective.kinds
        ids, attention, kept = (torch.cat([inputs[k][name] for k in kinds]) for name in _BATCH)
        masks = dict(zip(kinds, (kept[:, 1:] != 0).chunk(len(kinds)), strict=True))
        teacher: dict[str, Tensor] = {}
        if self._objective.needs_teacher:
            teacher = self._teacher_rows(self.teacher, ids, attention, masks)
        advantages = self._advantages(inputs, masks) if "own" in kinds else None
        inner = self.accelerator.unwrap_model(model)

        def of_student(ids: Tensor, attention: Tensor) -> Loss:
            states = hidden_states(inner, ids, attention)[:, :-1]
            parts = zip(kinds, states.chunk(len(kinds)), strict=True)
            targets = zip(kinds, ids[:, 1:].chunk(len(kinds)), strict=True)
            head = head_of(inner)
            rows = Rows(
                hidden={k: part[masks[k]].to(head.weight.dtype) for k, part in parts},
                targets={k: part[masks[k]] for k, part in targets},
                head=head,
                teacher=teacher,
                teacher_head=head_of(self.teacher) if teacher else None,
                advantages=advantages,
            )
            # Blocks of logits are made in the precision of the head.
            with torch.autocast(ids.device.type, enabled=False):
                loss = self._objective.loss(rows)
            _check_scores(loss.value, rows)
            return loss

        loss: Loss = through(model, inner, of_student, ids, attention)
        for name, value in loss.parts.items():
            self.note(name, value)
        return loss.value

    @torch.no_grad()
    def _teacher_rows(
        self, model: Any, ids: Tensor, attention: Tensor, masks: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        states = hidden_states(model, ids, attention)[:, :-1].chunk(len(masks))
        dtype = causal_model(model).get_output_embeddings().weight.dtype
        parts = zip(masks.items(), states, strict=True)
        return {kind: part[mask].to(dtype) for (kind, mask), part in parts}

    @torch.no_grad()
    def _advantages(
        self, inputs: Mapping[str, Any], masks: Mapping[str, Tensor]
    ) -> TokenAdvantages:
        own, mask = inputs["own"], masks["own"]
        if "indices" in own:
            return TokenAdvantages(own["indices"][:, 1:][mask], own["values"][:, 1:][mask])
        states = [
            self._teacher_rows(teacher, own["input_ids"], own["attention_mask"], {"own": mask})
            for teacher in (self.teacher, self.reference_teacher)
        ]
        with torch.autocast(mask.device.type, enabled=False):
            found = self._compare(*(part["own"] for part in states))
        check_finite("this batch", found.values)
        return found


def _check_room(name: str, row: int, tokens: Mapping[str, Any], max_length: int | None) -> None:
    start = len(tokens["prompt_ids"])
    if start == 0:
        raise ValueError(f"{name} row {row}: the prompt must have a token to begin with, got none")
    if max_length is not None and start >= max_length:
        raise ValueError(
            f"{name} row {row}: the prompt must leave room for a response within "
            f"max_length={max_length}, got {start} tokens"
        )
    for column, ids in tokens.items():
        if len(ids) == 0:
            raise ValueError(f"{name} row {row}: {column!r} is an empty completion, of no tokens")


def _check_scores(value: Tensor, rows: Rows) -> None:
    """Require a finite loss, and say whose scores made it another."""
    if bool(value.isfinite()):
        return
    for who, states in (("teacher", rows.teacher), ("student", rows.hidden)):
        for kind, part in states.items():
            if not bool(part.isfinite().all()):
                raise ValueError(
                    f"scores of the {who} must be finite, got NaN or infinite hidden states on "
                    f"{kind} responses: its weights or its precision are at fault"
                )
    raise ValueError(
        f"the loss must be finite, got {float(value.detach())}: a head holds NaN or infinity"
    )
