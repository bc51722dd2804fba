r"""TRL's GRPO trainer with the advantages and the policy loss of this library.

The trainer, its generation, rewards, KL term, entropy bonus, logging, PEFT and ``accelerate`` stay
TRL's. What is replaced are two steps: how gathered rewards become advantages, and the term of the
loss that they enter.
"""
# ruff: noqa: E402, a missing extra must be reported before its imports are tried

from steelyard._extras import require

require("trl", extra="trl")

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import trl
from accelerate.utils import gather, gather_object, is_peft_model
from torch import Tensor, nn

from steelyard._checks import check_choice, check_shape
from steelyard.integrations.trl._calls import as_signals, check_takes, names_wanted
from steelyard.integrations.trl._fused_head import has_plain_head, use_linear_logprobs
from steelyard.integrations.trl._rewards import (
    check_groups,
    check_masks,
    check_prompt_column,
    checked_reward_function,
    checked_rollout,
)
from steelyard.integrations.trl.objectives import BatchWeight
from steelyard.policy.losses import LOG_RATIO_LIMIT

__all__ = ["GRPOTrainer"]

_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
"""Loss types whose policy term another can stand in for, the rest of TRL's loss as it is."""

_OFFERED_TO_ADVANTAGES = (
    "rewards",
    "groups",
    "lengths",
    "entropy",
    "rewards_per_function",
    "columns",
    "step",
    "total_steps",
    "max_completion_length",
)

_SIGNAL = "signals/"
"""Prefix of the signals in TRL's batches and in its log."""

_MODEL_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


@dataclass
class _Pass:
    """What one evaluation of TRL's loss shows on its way."""

    inputs: dict[str, Any]
    """The micro-batch."""
    shown: dict[str, Any]
    """A copy for TRL."""
    logprobs: Tensor | None = None
    entropies: Tensor | None = None
    mask: Tensor | None = None
    weights: list[Tensor] = field(default_factory=list)
    """Of tokens, ``[B, T]``, or completions, ``[B, 1]``."""

    def note_logprobs(self, logprobs: Tensor, entropies: Tensor) -> None:
        """Keep them, and bring old ones so near that no ratio of TRL overflows: 0 * inf is NaN."""
        self.logprobs, self.entropies = logprobs, entropies
        old = self.shown.get("old_per_token_logps")
        if old is not None:
            here = logprobs.detach()
            near = old.clamp(here - LOG_RATIO_LIMIT, here + LOG_RATIO_LIMIT)
            self.shown["old_per_token_logps"] = near


class GRPOTrainer(trl.GRPOTrainer):  # type: ignore[misc]
    r"""``trl.GRPOTrainer`` with ``policy_loss=`` and ``advantages=``.

    Both are functions, called by the names of their parameters: they are given what they name.
    See :class:`~steelyard.integrations.trl.objectives.AdvantageFunction` and
    :class:`~steelyard.integrations.trl.objectives.PolicyLoss` for what there is, and
    :mod:`steelyard.integrations.trl.objectives` for GRPO, Dr. GRPO, GBPO, CANON and ADORA.

    The loss is

    .. math:: L = L_{\mathrm{policy}} + \beta\, \mathrm{KL} - c_e H

    with the first term from ``policy_loss`` and the others TRL's, averaged as ``args.loss_type``
    says. Token weights that TRL puts on its own policy term (``top_entropy_quantile``,
    ``off_policy_mask_threshold``, the correction for samples of vLLM) scale the gradient of each
    token of ours. ``importance_sampling_level="sequence"`` gives it the mean log-ratio of the
    completion. ``args.epsilon`` and ``epsilon_high`` then only set what TRL logs as clipped, and
    ``scale_rewards`` has no effect with ``advantages=``.

    Advantages are computed on the completions of all ranks, so groups are whole.

    Args:
        *args: those of ``trl.GRPOTrainer``: ``model``, ``reward_funcs``, ``args``,
            ``train_dataset`` ...
        policy_loss: for example ``functools.partial(grpo_loss, epsilon_high=0.28)``; ``None`` =
            TRL's ``loss_type``.
        advantages: for example ``group_relative_advantages``; ``None`` = TRL's own.
        batch_weight: ``"equal"``: each micro-batch of each rank counts the same, which makes means
            over completions exact. ``"tokens"``: each counts by its tokens, which makes means over
            tokens exact (TRL's loss type "dapo"). Only for ``policy_loss``.
        fused_head: compute log-probabilities and entropies by
            :func:`steelyard.fused.linear_logprobs`, if the model's head is linear and not in half
            precision; otherwise, and by default, by TRL's kernel. The numbers are the same.
        **kwargs: those of ``trl.GRPOTrainer``.

    Raises:
        ValueError: a data set has no column ``prompt``; a setting of ``args`` that ``policy_loss``
            or ``advantages`` would leave without effect; ``batch_weight`` unknown. From ``train``:
            a reward function returns a wrong number of rewards, NaN or infinity; two prompts in one
            group; an empty completion; advantages of a wrong shape or not finite.
        TypeError: a function needs something the trainer does not have.

    Example:
        ADORA is a weight on any advantage. The trainer gives the function what it names::

            def advantages(rewards, groups, *, lengths):
                base = group_relative_advantages(rewards, groups)
                return base * adora_weights(rewards, lengths, groups).weights

            trainer = GRPOTrainer(model, reward, args, dataset, advantages=advantages)

    Source: TRL's trainer: Shao et al. (2024), arXiv:2402.03300.
    """

    reward_funcs: list[Any]
    rollout_func: Callable[..., Any] | None
    off_policy_mask_threshold: float | None

    def __init__(
        self,
        *args: Any,
        policy_loss: Callable[..., Tensor] | None = None,
        advantages: Callable[..., Any] | None = None,
        batch_weight: BatchWeight = "equal",
        fused_head: bool = False,
        **kwargs: Any,
    ) -> None:
        check_choice("batch_weight", batch_weight, ("equal", "tokens"))
        if policy_loss is not None:
            check_takes(policy_loss, "policy_loss=", "log_ratio", "mask")
        if advantages is not None:
            check_takes(advantages, "advantages=", "rewards")
            names_wanted(advantages, "advantages=", _OFFERED_TO_ADVANTAGES)
        self._policy_loss = policy_loss
        self._advantages = advantages
        self._batch_weight = batch_weight
        self._pass: _Pass | None = None
        self._rewards: Tensor | None = None
        super().__init__(*args, **kwargs)
        self._check_settings()
        self.reward_funcs = [
            function if isinstance(function, nn.Module) else checked_reward_function(function, name)
            for function, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
        ]
        if self.rollout_func is not None:
            self.rollout_func = checked_rollout(self.rollout_func)
        # TRL masks tokens of its policy term where this is set; see `get_off_policy_mask`.
        self._off_policy_threshold = self.off_policy_mask_threshold
        if policy_loss is not None:
            self.off_policy_mask_threshold = float("inf")
        if fused_head and not self.is_deepspeed_enabled and not self.args.cast_lm_head_to_fp32:
            self._use_fused_head()

    def _check_settings(self) -> None:
        if getattr(self, "environment_factories", None) is None:
            check_prompt_column("train_dataset", self.train_dataset)
            check_prompt_column("eval_dataset", self.eval_dataset)
        if self._policy_loss is not None:
            if self.loss_type not in _CLIPPED:
                raise ValueError(
                    f"args.loss_type must be one of {', '.join(_CLIPPED)} with policy_loss=, got "
                    f"{self.loss_type!r}, which is another policy loss"
                )
            if self.args.delta is not None:
                raise ValueError(
                    f"args.delta must be None with policy_loss=, got {self.args.delta}: it belongs "
                    "to the loss that policy_loss= replaces"
                )
        if self._advantages is not None and self.multi_objective_aggregation == (
            "normalize_then_sum"
        ):
            raise ValueError(
                "args.multi_objective_aggregation must be 'sum_then_normalize' with advantages=, "
                "got 'normalize_then_sum'; let the function take 'rewards_per_function' instead"
            )

    def _use_fused_head(self) -> None:
        for model in (self.model, self.ref_model):
            if model is None:
                continue
            inner = self.accelerator.unwrap_model(model)
            inner = inner.get_base_model() if is_peft_model(inner) else inner
            if has_plain_head(inner):
                use_linear_logprobs(inner, temperature=self.temperature)

    # Advantages.

    def _generate(self, prompts: list[Any]) -> Any:
        generated = super()._generate(prompts)
        check_masks(generated[2])
        return generated

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(*args, **kwargs)
        for column, function in enumerate(self.reward_funcs):
            if isinstance(function, nn.Module) and not bool(rewards[:, column].isfinite().all()):
                where = int((~rewards[:, column].isfinite()).nonzero()[0, 0])
                raise ValueError(
                    f"reward model {self.reward_func_names[column]!r} must return finite rewards, "
                    f"got {float(rewards[where, column])} for completion {where}"
                )
        self._rewards = rewards  # of all ranks
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self._advantages is None or self._rewards is None:
            return output
        signals = self._signals(inputs, output, self._rewards)
        self._rewards = None
        mode = "train" if self.model.training else "eval"
        logged = self._logs["advantages"]
        for _ in range(min(len(logged), len(signals["advantages"]))):
            logged.pop()  # TRL's own
        logged.extend(signals["advantages"].tolist())
        first = self.accelerator.process_index * len(inputs)
        for name, values in signals.items():
            mine = values[first : first + len(inputs)]
            if name == "advantages":
                output[name] = mine.to(output[name].dtype)
            else:
                output[_SIGNAL + name] = mine
                self._metrics[mode][_SIGNAL + name].append(values.float().mean().item())
        return output

    def _signals(
        self, inputs: list[dict[str, Any]], output: dict[str, Any], per_function: Tensor
    ) -> dict[str, Tensor]:
        """Call ``advantages`` on the completions of all ranks; 0 for those without a reward."""
        assert self._advantages is not None  # the caller looked
        number = len(per_function)
        size = self.num_generations if self.model.training else self.num_generations_eval
        if number % size:
            raise ValueError(
                f"groups must be of {size} completions (num_generations), got {number} rewards, "
                "which do not divide into such groups"
            )
        if "prompt" in inputs[0]:
            first = self.accelerator.process_index * len(inputs)
            check_groups([row["prompt"] for row in inputs], first, size)
        scored = ~per_function.isnan().all(1)
        if not bool(scored.any()):
            raise ValueError("rewards must not all be None: no reward function applied to any row")
        weights = self.reward_weights.to(per_function.device)
        given: dict[str, Callable[[], Any]] = {
            "rewards": lambda: (per_function * weights).nansum(1)[scored],
            "groups": lambda: torch.arange(number, device=scored.device)[scored] // size,
            "lengths": lambda: gather(_loss_mask(output).sum(1))[scored],
            "entropy": lambda: gather(self._mean_entropy(output))[scored],
            "rewards_per_function": lambda: per_function[scored],
            "columns": lambda: _columns(inputs, scored),
            "step": lambda: self.state.global_step,
            "total_steps": lambda: self.state.max_steps,
            "max_completion_length": lambda: self.max_completion_length,
        }
        # Sorted, so that all ranks gather in one order.
        wanted = names_wanted(self._advantages, "advantages=", given)
        named = {name: given[name]() for name in sorted(wanted)}
        signals = as_signals(self._advantages(**named), int(scored.sum()))
        return {
            name: values.new_zeros(number).masked_scatter(scored, values)
            for name, values in signals.items()
        }

    def _mean_entropy(self, output: dict[str, Any]) -> Tensor:
        """Mean entropy of each completion's tokens under the policy that sampled it, ``[B]``."""
        mode = "train" if self.model.training else "eval"
        rows = getattr(self.args, f"per_device_{mode}_batch_size")
        with torch.no_grad():
            _, entropies, _ = self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([output["prompt_ids"], output["completion_ids"]], 1),
                torch.cat([output["prompt_mask"], output["completion_mask"]], 1),
                output["completion_ids"].shape[1],
                batch_size=rows,
                compute_entropy=True,
                **{name: output[name] for name in _MODEL_INPUTS if name in output},
            )
        mask = _loss_mask(output)
        total: Tensor = (entropies.float() * mask).sum(1)
        return total / mask.sum(1).clamp(min=1)

    # The policy term.

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self._policy_loss is None:
            loss: Tensor = super()._compute_loss(model, inputs)
            return loss
        self._pass = seen = _Pass(inputs, dict(inputs))
        try:
            others: Tensor = super()._compute_loss(model, seen.shown)
        finally:
            self._pass = None
        if seen.logprobs is None or seen.mask is None:
            raise RuntimeError(
                f"trl {trl.__version__} does not ask for an off-policy mask, by which its own "
                "policy loss is kept from being added to policy_loss="
            )
        policy = self._policy_term(seen, seen.logprobs, seen.mask)
        mode = "train" if self.model.training else "eval"
        if self._entropy_bonus_enabled:  # then TRL logs the loss without the bonus
            self._metrics[mode]["policy_loss"][-1] += gather(policy.detach()).mean().item()
        return others + policy * self._share(seen, seen.mask)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._pass is not None:
            self._pass.note_logprobs(*found[:2])
        return found

    def get_high_entropy_mask(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's mask of the most uncertain tokens, noted for the policy term."""
        mask: Tensor = super().get_high_entropy_mask(*args, **kwargs)
        if self._pass is not None:
            self._pass.weights.append(mask)
        return mask

    def get_off_policy_mask(
        self,
        advantages: Tensor,
        per_token_logps: Tensor,
        sampling_per_token_logps: Tensor,
        mask: Tensor,
        off_policy_threshold: float,
    ) -> Tensor:
        """Mask out TRL's own policy term, and note its mask for the policy term of ours."""
        keep = None
        if self._off_policy_threshold is not None:
            keep = super().get_off_policy_mask(
                advantages,
                per_token_logps,
                sampling_per_token_logps,
                mask,
                self._off_policy_threshold,
            )
        if self._pass is None:
            return torch.ones_like(advantages) if keep is None else keep
        self._pass.mask = mask
        if keep is not None:
            self._pass.weights.append(keep)
        return per_token_logps.new_zeros(len(per_token_logps), 1)

    def _policy_term(self, seen: _Pass, logprobs: Tensor, mask: Tensor) -> Tensor:
        assert self._policy_loss is not None  # the caller looked
        old = seen.inputs.get("old_per_token_logps")
        log_ratio = logprobs - (logprobs.detach() if old is None else old)
        if self.importance_sampling_level == "sequence":
            mean = (log_ratio * mask).sum(1) / mask.sum(1).clamp(min=1)
            log_ratio = mean[:, None].expand_as(log_ratio)
        if "importance_sampling_ratio" in seen.inputs:
            seen.weights.append(seen.inputs["importance_sampling_ratio"])
        for weight in seen.weights:  # scales the gradient of a token's loss, not its value
            fixed = log_ratio.detach()
            log_ratio = fixed + weight * (log_ratio - fixed)
        given = {
            "log_ratio": log_ratio,
            "mask": mask != 0,
            "logprobs": logprobs,
            "token_entropy": seen.entropies,
            "max_completion_length": self.max_completion_length,
            "advantages": seen.inputs["advantages"],
        }
        for name, values in seen.inputs.items():
            if name.startswith(_SIGNAL):
                given[name.removeprefix(_SIGNAL)] = values
        wanted = names_wanted(self._policy_loss, "policy_loss=", given)
        loss = self._policy_loss(**{name: given[name] for name in wanted})
        check_shape("the loss returned by policy_loss=", loss, ())
        return loss

    def _share(self, seen: _Pass, mask: Tensor) -> Tensor | float:
        """What the loss of a micro-batch counts in the sum over those of an optimiser step."""
        training = self.model.training
        steps: float = self.current_gradient_accumulation_steps if training else 1
        if self._batch_weight == "equal":
            return 1 / steps
        # Tokens of the generation batch, brought down to one rank and one optimiser step.
        tokens = seen.inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        if training:
            tokens = tokens * steps / self.args.steps_per_generation
        share: Tensor = mask.sum() / tokens
        return share


def _loss_mask(output: dict[str, Any]) -> Tensor:
    """The tokens that the model wrote and is trained on, ``[B, T]``."""
    mask: Tensor = output["completion_mask"]
    return mask * output["tool_mask"] if "tool_mask" in output else mask


def _columns(inputs: list[dict[str, Any]], scored: Tensor) -> dict[str, list[Any]]:
    """The data set's columns, of all ranks, without the rows that have no reward."""
    rows = [row for row, kept in zip(gather_object(inputs), scored.tolist(), strict=True) if kept]
    return {name: [row[name] for row in rows] for name in rows[0]}
