r"""A trainer that brings a language model to a target distribution: f-DPG.

``transformers.Trainer`` around the loop of the method: sample, score, weigh. Nothing here is of
TRL, which has no trainer of this kind.
"""
# ruff: noqa: E402, a missing extra must be reported before its imports are tried

from steelyard._extras import require

require("trl", extra="trl")

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset  # type: ignore[import-untyped]
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from steelyard._checks import check_choice, check_count, check_shape
from steelyard._reduce import reduce_masked
from steelyard.divergences import FDivergence
from steelyard.fused import linear_logprobs
from steelyard.integrations.trl._backbone import (
    check_plain_head,
    check_same_vocabulary,
    freeze,
    head_of,
    hidden_states,
    through,
)
from steelyard.integrations.trl._calls import check_takes, names_wanted
from steelyard.integrations.trl._loop import ObjectiveTrainer, switch_off_dropout
from steelyard.integrations.trl._rewards import check_prompt_column
from steelyard.integrations.trl._sequences import generate_responses, pad_batch, prompt_tokens
from steelyard.preference import (
    LogPartition,
    RunningBaseline,
    dpg_divergence,
    dpg_loss,
    dpg_pseudo_rewards,
    leave_one_out_baseline,
)

__all__ = ["DPGTrainer"]

Target = Callable[..., Tensor]
Baseline = Callable[..., Tensor] | RunningBaseline
LogZ = Literal["others", "previous", "batch"]

_OFFERED = ("base_logprobs", "completions", "prompts", "completion_ids", "columns", "step")
_STATE = "dpg_state.safetensors"


class Samples(NamedTuple):
    """Completions of the prompts of a batch, ``num_samples`` for each, and their scores."""

    batch: dict[str, Tensor]
    """``input_ids``, ``attention_mask``, ``completion_mask``, each ``[N, T]``."""
    contexts: Tensor
    """Row of the data set, ``[N]``."""
    base: Tensor
    """``log a(x)``, ``[N]``."""
    target: Tensor
    """``log P(x)``, ``[N]``."""
    proposal: Tensor | None
    """``log q(x)``, ``[N]``, or ``None`` for samples of the policy."""


class DPGTrainer(ObjectiveTrainer):
    r"""Minimise an f-divergence from a policy to a target known up to its normaliser.

    .. math:: \nabla D_f(\pi \| p) = \mathbb{E}_{x \sim \pi}\left[ f'\!\left( \frac{\pi(x)\,Z}{P(x)}
        \right) \nabla \log \pi(x) \right], \qquad p = P / Z

    In each step completions of the batch's prompts are sampled from the policy, with its whole
    distribution at temperature 1; the target scores them; the loss is
    :func:`steelyard.preference.dpg_loss`. Each prompt has its own ``Z``. To generate without
    prompts, give one empty prompt.

    The target is a function, called by the names of its parameters; it is given what it names:

    ``base_logprobs``
        ``log a(x)`` of the base model, summed over the tokens of the completion, ``[N]``.
    ``completions``, ``prompts``
        texts, or tokens decoded with special tokens left out.
    ``completion_ids``
        lists of tokens.
    ``columns``
        dictionary of the data set's columns, each a list of ``N``.
    ``step``
        optimiser steps done.

    It returns ``log P(x)``, ``[N]``, ``-inf`` for what is forbidden. Of several functions each is
    given the scores of the one before as ``base_logprobs``.

    Logged: ``divergence`` (its estimate, also the loss at evaluation; the training loss is none),
    ``log_z``, ``allowed`` (share of samples the target does not forbid), ``pseudo_reward``,
    ``kl_to_base``, ``entropy`` (of a token), ``completion_length``.

    Args:
        model: the policy, or the name or folder of one.
        target: function, or several.
        args: ``transformers.TrainingArguments``; ``per_device_train_batch_size`` is in prompts.
        train_dataset: with a column ``prompt`` of texts or conversations.
        eval_dataset: the same.
        divergence: ``D_f(policy || target)``: ``REVERSE_KL`` is DPG, ``KL`` is RLHF,
            ``JENSEN_SHANNON_DOUBLE`` the paper's compromise.
        base_model: ``a``; ``None`` = the model as it comes: without its adapter, or a copy.
        proposal: a model that samples in place of the policy (off-policy, with weights
            ``pi / q``); it has to cover policy and target.
        num_samples: completions for each prompt. Default 16.
        max_new_tokens: longest completion. A completion that is cut has no end token, and its
            probability is that of its tokens.
        generation_batch_size: completions that are sampled at a time.
        baseline: ``baseline(rewards, contexts=..)``, a
            :class:`~steelyard.preference.RunningBaseline` (the paper's), or ``None``. Default
            :func:`~steelyard.preference.leave_one_out_baseline`.
        log_z: which weights of a prompt estimate its ``Z``: earlier ones and those of the
            ``"others"`` in the batch (default); ``"previous"`` alone, which leaves the gradient
            unbiased and a prompt's first samples out; or all with the sample's own, ``"batch"`` (as
            published).
        max_log_z: cap of the estimates.
        reward_range: pseudo-rewards are clipped to it, a bias.
        processing_class: the tokenizer; ``None`` = the one stored with the model.
        peft_config: adapter for the policy.
        **kwargs: others of ``transformers.Trainer``.

    Raises:
        TypeError: ``target`` is no function or wants what is not there, ``divergence`` is none.
        ValueError: a number out of range, another vocabulary, no prompts, no samples to compare
            with. From ``train``: scores of a wrong shape, NaN or ``+inf``; an infinite
            pseudo-reward.

    Example:
        ::

            def polite(base_logprobs, completions):
                found = torch.tensor(["please" in text for text in completions])
                return pointwise_log_target(base_logprobs, found.to(base_logprobs.device))

            trainer = DPGTrainer(
                model, polite, args, prompts, divergence=JENSEN_SHANNON_DOUBLE
            )

    Source: Go et al. (2023), arXiv:2302.08215.
    """

    columns = ("prompt_ids", "context", "given")

    def __init__(
        self,
        model: Any,
        target: Target | Sequence[Target],
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        divergence: FDivergence,
        base_model: Any = None,
        proposal: Any = None,
        num_samples: int = 16,
        max_new_tokens: int = 64,
        generation_batch_size: int = 64,
        baseline: Baseline | None = leave_one_out_baseline,
        log_z: LogZ = "others",
        max_log_z: float = math.inf,
        reward_range: tuple[float, float] = (-math.inf, math.inf),
        processing_class: Any = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(divergence, FDivergence):
            raise TypeError(f"divergence must be an FDivergence, got {type(divergence).__name__}")
        check_count("num_samples", num_samples)
        check_count("max_new_tokens", max_new_tokens)
        check_count("generation_batch_size", generation_batch_size)
        check_choice("log_z", log_z, ("others", "previous", "batch"))
        if log_z == "others" and num_samples < 2:
            raise ValueError(
                f"num_samples must be at least 2 with log_z='others', got {num_samples}"
            )
        self._targets = _functions(target)
        self._divergence, self._num_samples = divergence, num_samples
        self._log_z_kind, self._reward_range = log_z, reward_range
        self._baseline = baseline
        self._sampling = {"max_new_tokens": max_new_tokens, "batch_size": generation_batch_size}
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("args must use neither FSDP nor DeepSpeed: the policy has to sample")
        switch_off_dropout(self.model)  # the policy that samples is the one that is trained
        self._base = self._place_base(base_model)
        self._proposal = None if proposal is None else self.place(proposal)
        check_same_vocabulary(model=self.model, base_model=self._base, proposal=self._proposal)
        for name, other in (("base_model", self._base), ("proposal", self._proposal)):
            if other is not None:
                check_plain_head(name, other)
        self.data_collator = _collate
        if train_dataset is not None:
            self.train_dataset = self._prepare("train_dataset", train_dataset)
        if eval_dataset is not None:
            self.eval_dataset = self._prepare("eval_dataset", eval_dataset)
        contexts = 1 if train_dataset is None else len(train_dataset)
        self._partition = LogPartition(num_contexts=contexts, max_log_z=max_log_z)
        for module in self._modules_with_state().values():
            module.to(self.accelerator.device)

    def _place_base(self, base_model: Any) -> Any:
        if base_model is not None:
            return self.place(base_model)
        return None if is_peft_model(self.model) else freeze(copy.deepcopy(self.model))

    def _prepare(self, name: str, dataset: Any) -> Any:
        check_prompt_column(name, dataset)
        if not isinstance(dataset, Dataset):
            raise TypeError(f"{name} must be a datasets.Dataset, got {type(dataset).__name__}")
        if len(dataset) == 0:
            raise ValueError(f"{name} must have at least one prompt, got none")
        tokenizer = self.processing_class
        start = tokenizer.bos_token_id
        nothing = [tokenizer.eos_token_id if start is None else start]
        ids = [prompt_tokens(row, tokenizer) or nothing for row in dataset]
        return _Prompts(ids, dataset)

    # The loop.

    def objective_loss(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Return the loss of fresh samples, or at evaluation their divergence; log the rest."""
        inner = self.accelerator.unwrap_model(model)
        samples = self._draw(inner, inputs)
        score = functools.partial(_sequence_logprobs, inner, samples.batch["completion_mask"])
        ids, attention = samples.batch["input_ids"], samples.batch["attention_mask"]
        policy, entropy = through(model, inner, score, ids, attention)
        _check_finite("policy", policy.detach())
        log_weights = samples.target - (
            policy.detach() if samples.proposal is None else samples.proposal
        )
        training = self.model.training
        log_z = self._log_z(log_weights, samples.contexts, training=training)
        settings: dict[str, Any] = {"divergence": self._divergence}
        found = (samples.target, log_z)
        rewards = dpg_pseudo_rewards(policy, *found, **settings).clamp(*self._reward_range)
        distance = dpg_divergence(
            policy.detach(), *found, **settings, proposal_logprobs=samples.proposal
        )
        self._note(samples, policy.detach(), entropy, log_z, rewards, distance)
        if not training:
            return distance
        loss = dpg_loss(
            policy,
            *found,
            **settings,
            proposal_logprobs=samples.proposal,
            baseline=self._baseline_of(rewards, samples.contexts),
            reward_range=self._reward_range,
        )
        self._check_loss(loss, rewards)
        gathered = self.accelerator.gather((log_weights, samples.contexts, rewards))
        self._partition.update(*gathered[:2])
        if isinstance(self._baseline, RunningBaseline):
            self._baseline.update(gathered[2])
        return loss

    @torch.no_grad()
    def _draw(self, policy: Any, inputs: Mapping[str, Any]) -> Samples:
        """Sample completions and score them under base model, target and proposal."""
        number = self._num_samples
        prompts = [ids for ids in inputs["prompt_ids"] for _ in range(number)]
        author = policy if self._proposal is None else self._proposal
        written = generate_responses(author, self.processing_class, prompts, **self._sampling)
        batch = {
            name: tensor.to(self.accelerator.device)
            for name, tensor in pad_batch(
                list(zip(prompts, written, strict=True)),
                padding=self.processing_class.pad_token_id,
                max_length=None,
            ).items()
        }
        contexts = inputs["context"].repeat_interleave(number)
        with policy.disable_adapter() if self._base is None else contextlib.nullcontext():
            base = self._score(policy if self._base is None else self._base, batch)
        _check_finite("base model", base)
        proposal = None if self._proposal is None else self._score(self._proposal, batch)
        rows = [row for row in inputs["given"] for _ in range(number)]
        return Samples(batch, contexts, base, self._judge(base, prompts, written, rows), proposal)

    def _score(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        found, _ = _sequence_logprobs(
            model, batch["completion_mask"], batch["input_ids"], batch["attention_mask"]
        )
        return found

    def _judge(
        self,
        base: Tensor,
        prompts: list[list[int]],
        written: list[list[int]],
        rows: list[dict[str, Any]],
    ) -> Tensor:
        """``log P`` of the samples."""
        decode = functools.partial(self.processing_class.batch_decode, skip_special_tokens=True)
        given: dict[str, Callable[[], Any]] = {
            "completions": lambda: decode(written),
            "prompts": lambda: decode(prompts),
            "completion_ids": lambda: written,
            "columns": lambda: {name: [row[name] for row in rows] for name in rows[0]},
            "step": lambda: self.state.global_step,
        }
        scores = base
        for function in self._targets:
            wanted = names_wanted(function, "target=", _OFFERED) - {"base_logprobs"}
            named = {name: given[name]() for name in sorted(wanted)}
            if "base_logprobs" in names_wanted(function, "target=", _OFFERED):
                named["base_logprobs"] = scores
            scores = function(**named)
            if not isinstance(scores, Tensor):
                raise TypeError(f"target= must return a tensor, got {type(scores).__name__}")
            check_shape("scores returned by target=", scores, (len(written),))
            wrong = scores.isnan() | (scores == math.inf)
            if bool(wrong.any()):
                where = int(wrong.nonzero()[0, 0])
                raise ValueError(
                    "scores returned by target= must be finite, or -inf for what is forbidden, "
                    f"got {float(scores[where])} for completion {where}: "
                    f"{decode([written[where]])[0]!r}"
                )
            scores = scores.to(base)
        return scores

    @torch.no_grad()
    def _log_z(self, log_weights: Tensor, contexts: Tensor, *, training: bool) -> Tensor:
        """``log Z`` of each sample's context, ``[N]``; at evaluation from the batch alone."""
        weights = log_weights.double()
        before = self._partition.log_sum[contexts] if training else None
        seen = self._partition.count[contexts] if training else torch.zeros_like(contexts)
        kind = self._log_z_kind if training else "batch"
        cap = self._partition.max_log_z
        if kind == "previous":
            return self._partition.value[contexts].to(log_weights)
        use = contexts[:, None] == contexts[None, :]
        if kind == "others":
            use &= ~torch.eye(len(contexts), dtype=torch.bool, device=contexts.device)
        total = weights[None, :].expand(use.shape).masked_fill(~use, -math.inf).logsumexp(1)
        if before is not None:
            total = torch.logaddexp(total, before)
        number = (use.sum(1) + seen).clamp(min=1)
        return (total - number.log()).clamp(max=cap).to(log_weights)

    def _baseline_of(self, rewards: Tensor, contexts: Tensor) -> Tensor | float:
        if self._baseline is None:
            return 0.0
        if isinstance(self._baseline, RunningBaseline):
            return self._baseline.value.clone()
        return self._baseline(rewards, contexts=contexts)

    def _check_loss(self, loss: Tensor, rewards: Tensor) -> None:
        if bool(loss.isfinite()):
            return
        low = bool((rewards == -math.inf).any())
        raise ValueError(
            f"the loss must be finite, got {float(loss.detach())}: the pseudo-reward of "
            f"{self._divergence.name} is {'-inf' if low else 'too large'} for a sample that the "
            f"{'target forbids' if low else 'policy makes very unlikely'}. Give the target a "
            "floor, as pointwise_log_target(log_floor=-20.0) does, set reward_range=, or use a "
            "divergence whose reward is bounded below, such as JENSEN_SHANNON"
        )

    def _note(
        self,
        samples: Samples,
        policy: Tensor,
        entropy: Tensor,
        log_z: Tensor,
        rewards: Tensor,
        distance: Tensor,
    ) -> None:
        known = log_z.isfinite()
        lengths = samples.batch["completion_mask"].sum(1)
        values = {
            "divergence": distance,
            "log_z": reduce_masked(log_z, known, "mean"),
            "allowed": (samples.target > -math.inf).float().mean(),
            "pseudo_reward": reduce_masked(rewards, rewards.isfinite(), "mean"),
            "entropy": entropy.detach(),
            "completion_length": lengths.float().mean(),
        }
        if samples.proposal is None:  # a mean over samples of the policy
            values["kl_to_base"] = (policy - samples.base).mean()
        for name, value in values.items():
            self.note(name, value)

    # What is remembered is stored with the model.

    def _modules_with_state(self) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {"partition": self._partition}
        if isinstance(self._baseline, RunningBaseline):
            modules["baseline"] = self._baseline
        return modules

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        tensors = {
            f"{name}.{key}": value.cpu().clone()
            for name, module in self._modules_with_state().items()
            for key, value in module.state_dict().items()
        }
        save_file(tensors, Path(output_dir or str(self.args.output_dir)) / _STATE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        tensors = load_file(Path(resume_from_checkpoint) / _STATE)
        for name, module in self._modules_with_state().items():
            start = f"{name}."
            module.load_state_dict(
                {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
            )


class _Prompts(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of a data set with the tokens of their prompts."""

    def __init__(self, ids: list[list[int]], dataset: Any) -> None:
        self.ids, self.dataset = ids, dataset

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"prompt_ids": self.ids[row], "context": row, "given": self.dataset[row]}


def _collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "context": torch.tensor([example["context"] for example in examples]),
        "prompt_ids": [example["prompt_ids"] for example in examples],
        "given": [example["given"] for example in examples],
    }


def _sequence_logprobs(
    model: Any, completion_mask: Tensor, ids: Tensor, attention: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probability of each completion ``[N]``, and the mean entropy of a token, 0-d."""
    states, mask = hidden_states(model, ids, attention)[:, :-1], completion_mask[:, 1:] != 0
    head = head_of(model)
    with torch.autocast(ids.device.type, enabled=False):
        logprobs, entropy = linear_logprobs(
            states[mask].to(head.weight.dtype), head.weight, ids[:, 1:][mask], bias=head.bias
        )
    wide = torch.promote_types(logprobs.dtype, torch.float32)
    tokens = logprobs.new_zeros(mask.shape, dtype=wide).masked_scatter(mask, logprobs.to(wide))
    return tokens.sum(1), entropy.mean()


def _functions(target: Target | Sequence[Target]) -> tuple[Target, ...]:
    functions = tuple(target) if isinstance(target, Sequence) else (target,)
    if not functions:
        raise ValueError("target must be a function or several, got none")
    for function in functions:
        names_wanted(function, "target=", _OFFERED)
    for function in functions[1:]:
        check_takes(function, "the second and later functions of target=", "base_logprobs")
    return functions


def _check_finite(who: str, logprobs: Tensor) -> None:
    if not bool(logprobs.isfinite().all()):
        where = int((~logprobs.isfinite()).nonzero()[0, 0])
        raise ValueError(
            f"log-probabilities of the {who} must be finite, got {float(logprobs[where])} for "
            f"completion {where} of this batch: its weights or its precision are at fault"
        )
