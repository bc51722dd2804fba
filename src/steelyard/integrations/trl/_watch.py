"""What a model shows when TRL calls it: token log-probabilities, and the hidden states below."""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput

from steelyard.fused import linear_logprobs
from steelyard.integrations.trl._backbone import (
    LinearHead,
    States,
    causal_model,
    head_of,
    is_most_likely,
)


@dataclass
class Seen:
    """One forward pass.

    Attributes:
        all_layers: ask for the hidden states of every layer.
        states: hidden states, of the first call.
        logprobs: ``[B, T - 1]``, 0 where not scored.
        aux_loss: of a mixture of experts.
    """

    all_layers: bool = False
    states: States | None = None
    logprobs: Tensor | None = None
    aux_loss: Tensor | None = None


class Watch:
    """Looks on while ``current`` is set.

    Args:
        fused: score tokens by :func:`steelyard.fused.linear_logprobs` instead of TRL's kernel.
        states: look at hidden states, too.
    """

    def __init__(self, *, fused: bool, states: bool) -> None:
        self.fused = fused
        self.states = states
        self.current: Seen | None = None

    def attach(self, model: Any, *, metrics: bool) -> None:
        """Watch a model to which TRL has added its fused head.

        Args:
            model: may be wrapped in PEFT.
            metrics: compute what TRL logs of the policy, beside log-probabilities.
        """
        inner = causal_model(model)
        if self.states:
            inner.base_model.register_forward_pre_hook(self._ask, with_kwargs=True)
            inner.base_model.register_forward_hook(self._note_states)
        trl_forward: Callable[..., Any] = inner.forward

        # The signature stays that of the model, which `generate` looks at.
        @functools.wraps(type(inner).forward)
        def forward(
            self_: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **options: Any
        ) -> Any:
            if not fused_lm_head:
                if labels is not None:
                    options["labels"] = labels
                return trl_forward(*args, **options)
            if self._takes(inner, labels, options):
                output = _score(self_, args, labels, options, metrics=metrics)
            else:
                output = trl_forward(*args, labels=labels, fused_lm_head=True, **options)
            if self.current is not None and self.current.logprobs is None:
                self.current.logprobs = output.log_probs
                self.current.aux_loss = output.aux_loss
            return output

        inner.forward = types.MethodType(forward, inner)

    def _takes(self, inner: Any, labels: Tensor, options: dict[str, Any]) -> bool:
        """Router losses, batches without a token to score and half precision stay with TRL."""
        return (
            self.fused
            and inner.get_output_embeddings().weight.dtype.itemsize >= 4
            and options.get("shift_labels") is None
            and not options.get("output_router_logits")
            and bool((labels[:, 1:] != -100).any())
        )

    def _ask(self, module: Any, args: Any, options: dict[str, Any]) -> Any:
        if self.current is not None and self.current.all_layers:
            options = {**options, "output_hidden_states": True}
        return args, options

    def _note_states(self, module: Any, args: Any, output: Any) -> None:
        if self.current is not None and self.current.states is None:
            layers = torch.stack(output.hidden_states[1:]) if self.current.all_layers else None
            self.current.states = States(output.last_hidden_state, layers)


def _score(
    model: Any, args: tuple[Any, ...], labels: Tensor, options: dict[str, Any], *, metrics: bool
) -> FusedCausalLMOutput:
    output = model.base_model(*args, **{**options, "use_cache": False})
    kept, head = labels[:, 1:] != -100, head_of(model)
    rows = output.last_hidden_state[:, :-1][kept].to(head.weight.dtype)
    targets = labels[:, 1:][kept]
    # Under autocast the head stays in its own precision.
    with torch.autocast(rows.device.type, enabled=False):
        logprobs, entropy = linear_logprobs(rows, head.weight, targets, bias=head.bias)
        shown = {"log_probs": logprobs, "entropy": entropy}
        if metrics:
            shown |= _looks(rows.detach(), head.detached(), targets, logprobs, entropy)
    fields = {
        name: values.new_zeros(kept.shape).masked_scatter(kept, values)
        for name, values in shown.items()
    }
    return FusedCausalLMOutput(**fields, label_mask=kept)


@torch.no_grad()
def _looks(
    rows: Tensor, head: LinearHead, targets: Tensor, logprobs: Tensor, entropy: Tensor
) -> dict[str, Tensor]:
    # The mean of the logits is the logit of the mean.
    mean = rows @ head.weight.mean(0)
    return {
        "mean_logits": mean if head.bias is None else mean + head.bias.mean(),
        "is_top1": is_most_likely(rows, head, targets, logprobs, entropy),
    }
