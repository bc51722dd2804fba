r"""TRL's DPO trainer on a leash of any f-divergence, or with a weight on each token.

Data, reference model, PEFT, ``accelerate`` and most of the log stay TRL's. What is replaced is the
loss of a pair.
"""
# ruff: noqa: E402, a missing extra must be reported before its imports are tried

from steelyard._extras import require

require("trl", extra="trl")

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import trl
from torch import Tensor

from steelyard._checks import check_range
from steelyard._reduce import widen
from steelyard.divergences import (
    JENSEN_SHANNON_DOUBLE,
    KL,
    REVERSE_KL,
    FDivergence,
    alpha_divergence,
)
from steelyard.integrations.trl._backbone import (
    causal_model,
    check_no_virtual_tokens,
    check_plain_head,
    check_same_vocabulary,
    head_of,
)
from steelyard.integrations.trl._fused_head import has_plain_head
from steelyard.integrations.trl._preference_rows import check_responses, check_tokenized_pairs
from steelyard.integrations.trl._watch import Seen, Watch
from steelyard.integrations.trl.sparse_po import SparsePO, TokenPairs, TokenWeights
from steelyard.preference import (
    PUBLISHED_BETAS,
    f_dpo_loss,
    implicit_reward,
    preference_calibration_error,
    preference_health,
    ranking_report,
)

__all__ = ["DPOTrainer", "FDPOTrainer"]

_SHARE = "rater_share"
"""Name in a batch of the share of raters that prefer the chosen response."""


class DPOTrainer(trl.DPOTrainer):  # type: ignore[misc]
    r"""``trl.DPOTrainer`` with ``divergence=``, token weights, and how well the policy ranks.

    .. math:: L = -\log \sigma\left( \beta f'(u_w) - \beta f'(u_l) \right), \qquad
        u = \pi(y|x) / \pi_\text{ref}(y|x)

    ``beta`` is ``args.beta``. With ``KL`` this is TRL's "sigmoid" loss to the last digits.
    ``args.f_divergence_type`` names a divergence, too; what differs from TRL then: scores of large
    log ratios neither overflow nor lose their gradient, orders of ``alpha_divergence`` for which
    the method does not hold (above 1, Pearson's chi-square among them) are refused, and
    ``rewards/*`` are of the divergence in use.

    With another ``args.loss_type`` than "sigmoid", ``ld_alpha`` or ``use_weighting``, and neither
    ``divergence`` nor ``sparse``, the loss is TRL's.

    Logged besides, in training: ``health/chosen_change``, ``health/both_fall`` and
    ``health/beyond_range`` (:func:`steelyard.preference.preference_health`); with ``sparse``
    ``masks/*``. At evaluation, over all pairs of the data set: ``ranking/*``
    (:func:`steelyard.preference.ranking_report`) and ``calibration_error``.

    Args:
        *args: those of ``trl.DPOTrainer``: ``model``, ``ref_model``, ``args`` ...
        divergence: ``D_f(pi || ref)``, for example ``JENSEN_SHANNON_DOUBLE``; ``None`` = as
            ``args.f_divergence_type`` says. Compare divergences over a sweep of ``beta``.
        sparse: weights of tokens; the divergence is ``KL`` then.
        fused_head: score tokens by :func:`steelyard.fused.linear_logprobs` if the head is linear
            and not in half precision; otherwise, and by default, by TRL's kernel. The divergences
            of ``sparse`` are always computed without full logits.
        rater_share: share of raters that prefer the chosen response: a number, or a column of the
            evaluation data. Sets the idealized ranking accuracy. Default 0.75, what the paper
            takes for data without votes.
        idealized_betas: for which the idealized accuracy is taken.
        **kwargs: those of ``trl.DPOTrainer``.

    Raises:
        ValueError: a divergence whose ``f'(0)`` is finite; models with two vocabularies; an empty
            response or a pair of identical ones; a setting of ``args`` without effect. From
            ``train``: a log-probability that is NaN or infinite, with its pair.
        TypeError: an argument of a wrong type.

    Example:
        ::

            trainer = DPOTrainer(
                model, args=DPOConfig(beta=0.1), train_dataset=pairs,
                divergence=JENSEN_SHANNON_DOUBLE,
            )

    Source: Wang et al. (2023), arXiv:2309.16240; Christopoulou et al. (2024), arXiv:2410.05102;
    Chen et al. (2024), arXiv:2405.19534, for the rankings.
    """

    data_collator: Any
    precompute_ref_logps: bool
    _signature_columns: list[str] | None
    _watch: Watch | None = None

    def __init__(
        self,
        *args: Any,
        divergence: FDivergence | None = None,
        sparse: SparsePO | None = None,
        fused_head: bool = False,
        rater_share: float | str = 0.75,
        idealized_betas: Sequence[float] = PUBLISHED_BETAS,
        **kwargs: Any,
    ) -> None:
        if sparse is not None and not isinstance(sparse, SparsePO):
            raise TypeError(f"sparse must be a SparsePO, got {type(sparse).__name__}")
        if not isinstance(rater_share, str):
            check_range("rater_share", rater_share, at_least=0.0, at_most=1.0)
        if divergence is not None:
            # Refused here, with the reason, rather than at the first step.
            implicit_reward(torch.zeros(1), divergence=divergence)
        self._sparse = sparse
        self._rater_share = rater_share
        self._idealized_betas = tuple(idealized_betas)
        self._pairs: list[Tensor] = []
        super().__init__(*args, **kwargs)
        self._is_ours = self._check_objective(divergence, sparse)
        self._divergence = self._named_divergence() if divergence is None else divergence
        check_same_vocabulary(model=self.model, ref_model=self.ref_model)
        if isinstance(rater_share, str):
            self.data_collator = _WithColumn(self.data_collator, rater_share)
        self._weights = TokenWeights(sparse or SparsePO(), self.accelerator)
        self.add_callback(self._weights)
        plain = has_plain_head(causal_model(self.model))
        self._watch = Watch(fused=fused_head and plain, states=sparse is not None)
        self._watch.attach(self.accelerator.unwrap_model(self.model), metrics=True)
        if self.ref_model is not None:
            self._watch.attach(self.accelerator.unwrap_model(self.ref_model), metrics=False)

    def _check_objective(self, divergence: FDivergence | None, sparse: SparsePO | None) -> bool:
        """Whether the loss is ours; refuse settings that would be without effect."""
        settings = {
            "loss_type": (self.loss_types, ["sigmoid"]),
            "ld_alpha": (self.ld_alpha, None),
            "use_weighting": (self.use_weighting, False),
        }
        other = [name for name, (value, needed) in settings.items() if value != needed]
        asked = "sparse=" if sparse is not None else "divergence="
        if other and (divergence is not None or sparse is not None):
            value, needed = settings[other[0]]
            raise ValueError(f"args.{other[0]} must be {needed!r} with {asked}, got {value!r}")
        named = self.f_divergence_type
        if named != "reverse_kl" and (divergence is not None or sparse is not None):
            raise ValueError(
                f"args.f_divergence_type must be left alone with {asked}, got {named!r}"
            )
        if sparse is not None:
            if divergence is not None:
                raise ValueError("divergence must be None with sparse=, which is for KL")
            if self.precompute_ref_logps:
                raise ValueError(
                    "args.precompute_ref_log_probs must be False with sparse=, which needs the "
                    "reference model's distributions, not only its log-probabilities"
                )
            check_no_virtual_tokens(self.model)
            for name, model in (("model", self.model), ("ref_model", self.ref_model)):
                if model is not None:
                    check_plain_head(name, self.accelerator.unwrap_model(model))
        return not other

    def _named_divergence(self) -> FDivergence:
        """What ``args.f_divergence_type`` names, if the loss is ours."""
        if not self._is_ours or self.f_divergence_type == "reverse_kl":
            return KL
        if self.f_divergence_type == "forward_kl":
            return REVERSE_KL
        if self.f_divergence_type == "js_divergence":
            return JENSEN_SHANNON_DOUBLE
        if self.f_divergence_type != "alpha_divergence":
            raise ValueError(
                "args.f_divergence_type must be 'reverse_kl', 'forward_kl', 'js_divergence' or "
                f"'alpha_divergence', got {self.f_divergence_type!r}; pass others as divergence="
            )
        divergence = alpha_divergence(self.f_alpha_divergence_coef)
        try:
            implicit_reward(torch.zeros(1), divergence=divergence)
        except ValueError as error:
            raise ValueError(
                f"args.f_alpha_divergence_coef must be at most 1, got "
                f"{self.f_alpha_divergence_coef}: {error}"
            ) from None
        return divergence

    # Data.

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        name = f"{dataset_name}_dataset" if dataset_name in ("train", "eval") else dataset_name
        check_responses(name, dataset)
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        length = None if args.truncation_mode == "keep_end" else args.max_length
        return check_tokenized_pairs(name, prepared, length)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        kept, share = self._signature_columns or [], self._rater_share
        if isinstance(share, str) and share not in kept:
            self._signature_columns = [*kept, share]

    # The loss.

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        shown = {name: value for name, value in inputs.items() if name != _SHARE}
        if self._watch is None or self.ld_alpha is not None:
            return super()._compute_loss(model, shown, return_outputs)
        reference = Seen(all_layers=bool(self._sparse and self._sparse.functions()))
        if not self.precompute_ref_logps:
            with self._watching(reference):
                logps = self.compute_ref_log_probs(self.ref_model or self.model, shown)
            shown["ref_chosen_logps"], shown["ref_rejected_logps"] = logps
        policy, precomputed = Seen(), self.precompute_ref_logps
        self.precompute_ref_logps = True  # TRL then takes those of the batch
        try:
            with self._watching(policy):
                found = super()._compute_loss(model, shown, return_outputs)
        finally:
            self.precompute_ref_logps = precomputed
        theirs, outputs = found if return_outputs else (found, None)
        loss = self._judge(policy, reference, shown, inputs.get(_SHARE), theirs)
        return (loss, outputs) if return_outputs else loss

    @contextlib.contextmanager
    def _watching(self, seen: Seen) -> Iterator[None]:
        assert self._watch is not None  # the caller looked
        self._watch.current = seen
        try:
            yield
        finally:
            self._watch.current = None

    def _judge(
        self,
        policy: Seen,
        reference: Seen,
        inputs: dict[str, Any],
        share: Tensor | None,
        theirs: Tensor,
    ) -> Tensor:
        """Our loss in the place of theirs, and what is logged of the batch."""
        mask = inputs["completion_mask"][:, 1:]
        if policy.logprobs is None:
            raise RuntimeError(f"trl {trl.__version__} does not ask for fused log-probabilities")
        tokens = policy.logprobs[:, -mask.shape[1] :]
        logps = tokens.sum(1)
        ref = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]]).to(logps)
        _check_finite("policy", logps.detach())
        _check_finite("reference", ref)
        ratios = (logps - ref).chunk(2)
        mode = "train" if self.model.training else "eval"
        self._note_health(mode, *(ratio.detach() for ratio in ratios))
        if mode == "eval":
            self._note_pairs(logps, ref, mask, share)
        if not self._is_ours:
            return theirs
        if self._sparse is None:
            settings: dict[str, Any] = {"beta": self.beta, "divergence": self._divergence}
            loss = f_dpo_loss(*ratios, **settings)
            rewards = tuple(implicit_reward(ratio.detach(), **settings) for ratio in ratios)
        else:
            heads = head_of(self.model), head_of(self.ref_model or self.model)
            pairs = TokenPairs.of(tokens, policy, reference, heads, mask)
            weights = self._weights.of(reference, mask, training=self.model.training)
            loss = pairs.loss(weights, self._sparse, self.beta)
            rewards = pairs.rewards(weights, self.beta)
            for name, total in pairs.summary(weights).items():
                self._log_token_mean(mode, f"masks/{name}", total, mask.sum())
        self._log_rewards(mode, *rewards)
        loss = loss * float(self.loss_weights[0])
        if self.aux_loss_enabled and policy.aux_loss is not None:
            loss = loss + float(self.router_aux_loss_coef) * policy.aux_loss
        return loss

    # What is logged.

    def _log_mean(self, mode: str, name: str, values: Tensor) -> None:
        self._metrics[mode][name].append(self.accelerator.gather(values).float().mean().item())

    def _log_token_mean(self, mode: str, name: str, total: Tensor, count: Tensor) -> None:
        """Log a mean over the tokens of all ranks, of which some have more."""
        sums = self.accelerator.gather(torch.stack([total, count.to(total)])[None]).sum(0)
        self._metrics[mode][name].append((sums[0] / sums[1].clamp(min=1)).item())

    def _note_health(self, mode: str, chosen: Tensor, rejected: Tensor) -> None:
        divergence = KL if self._sparse is not None else self._divergence
        health = preference_health(chosen, rejected, beta=self.beta, divergence=divergence)
        for name in ("chosen_change", "both_fall", "beyond_range"):
            self._log_mean(mode, f"health/{name}", getattr(health, name))

    def _log_rewards(self, mode: str, chosen: Tensor, rejected: Tensor) -> None:
        """Put implicit rewards of the objective in the place of TRL's ``beta log u``."""
        shown = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).float(),
        }
        for name, values in shown.items():
            self._metrics[mode][name].pop()
            self._log_mean(mode, name, values)

    def _note_pairs(self, logps: Tensor, ref: Tensor, mask: Tensor, share: Tensor | None) -> None:
        """Keep what the report on rankings needs, of all ranks, in float64."""
        if isinstance(self._rater_share, str) and share is None:
            raise ValueError(
                f"the evaluation data must have the column {self._rater_share!r} (rater_share), "
                "a number in [0, 1] for each pair"
            )
        parts = [*logps.detach().chunk(2), *ref.chunk(2), *mask.sum(1).chunk(2)]
        parts.append(torch.full_like(parts[0], 0.0) if share is None else share.to(parts[0]))
        rows = torch.stack([part.to(torch.float64) for part in parts], 1)
        self._pairs.append(self.accelerator.gather_for_metrics(rows))

    def _ranking(self) -> dict[str, float]:
        chosen, rejected, ref_chosen, ref_rejected, long, short, share = torch.cat(self._pairs).T
        self._pairs.clear()
        report = ranking_report(
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            beta=self.beta,
            chosen_lengths=long,
            rejected_lengths=short,
            alpha=share if isinstance(self._rater_share, str) else self._rater_share,
            betas=self._idealized_betas,
        )
        margin = self.beta * ((chosen - rejected) - (ref_chosen - ref_rejected))
        if self._is_ours and self._sparse is None:
            settings = {"beta": self.beta, "divergence": self._divergence}
            margin = implicit_reward(chosen - ref_chosen, **settings)
            margin = margin - implicit_reward(rejected - ref_rejected, **settings)
        assert report.idealized is not None  # as `alpha` and lengths are given
        assert report.alignment_gap is not None
        assert report.normalized_ranking_accuracy is not None
        values = {
            "ranking/accuracy": report.ranking_accuracy,
            "ranking/accuracy_per_token": report.normalized_ranking_accuracy,
            "ranking/reference_accuracy": report.reference_accuracy,
            "ranking/flip_rate": report.transitions.flip_rate,
            "ranking/idealized_min": report.idealized.min,
            "ranking/idealized_median": report.idealized.median,
            "ranking/idealized_max": report.idealized.max,
            "ranking/alignment_gap": report.alignment_gap,
            "calibration_error": preference_calibration_error(margin),
        }
        return {name: value.item() for name, value in values.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log, with the rankings of the data set that was evaluated."""
        if not self.model.training and self._pairs:
            for name, value in self._ranking().items():
                self._metrics["eval"][name] = [value]
        super().log(logs, start_time)

    # Learned masks are trained and stored beside the model, not in it.

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """TRL's optimizer, with a group of parameters for learned masks."""
        made_here = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        self._weights.join(optimizer, add=made_here)
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        self._weights.save(Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._weights.load(Path(resume_from_checkpoint))


FDPOTrainer = DPOTrainer
"""Another name of :class:`DPOTrainer`."""


class _WithColumn:
    """A collator that keeps a column of numbers."""

    def __init__(self, collate: Callable[..., dict[str, Any]], column: str) -> None:
        self.collate = collate
        self.column = column

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(examples)
        if self.column in examples[0]:
            shares = torch.tensor([float(row[self.column]) for row in examples])
            if not bool(((shares >= 0) & (shares <= 1)).all()):
                raise ValueError(
                    f"{self.column!r} (rater_share) must be in [0, 1], got {shares.tolist()}"
                )
            batch[_SHARE] = shares
        return batch


def _check_finite(who: str, logps: Tensor) -> None:
    """Require finite log-probabilities ``[2B]``, chosen responses first."""
    finite = torch.isfinite(widen(logps))
    if bool(finite.all()):
        return
    where, pairs = int((~finite).nonzero()[0, 0]), len(logps) // 2
    which = "chosen" if where < pairs else "rejected"
    raise ValueError(
        f"log-probabilities of the {who} must be finite, got {float(logps[where])} for the "
        f"{which} response of pair {where % pairs} of this batch: its weights or its precision "
        "are at fault, as no token can have probability 0 under a finite head"
    )
