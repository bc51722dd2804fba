"""Log-probabilities and entropies of a trainer's model from its hidden states, in our kernel.

TRL calls a model's ``forward`` with ``fused_lm_head=True`` for them, through whatever wraps it
(PEFT, DDP, FSDP). This is the place to take part: the answer has the same form.
"""

import functools
import types
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from trl.trainer.utils import FusedCausalLMOutput

from steelyard.fused import linear_logprobs

_CAPS = ("final_logit_softcapping",)
_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def has_plain_head(model: Any) -> bool:
    """Whether the logits of a model are ``hidden W^T + bias``, by its class and configuration."""
    config = model.config.get_text_config()
    capped = any(getattr(config, name, None) is not None for name in _CAPS)
    scaled = any(getattr(config, name, None) not in (None, 1.0) for name in _SCALES)
    return type(model.get_output_embeddings()) is torch.nn.Linear and not capped and not scaled


def use_linear_logprobs(model: Any, *, temperature: float) -> None:
    """Answer TRL's calls with ``fused_lm_head=True`` by :func:`steelyard.fused.linear_logprobs`.

    A head in half precision, router losses and batches without a token to score stay with TRL's
    kernel, which returns float32 for half precision.

    Args:
        model: the model below PEFT and other wrappers, with TRL's fused head added.
        temperature: divides the logits.
    """
    trl_forward = model.forward

    # The signature stays that of the model, which `generate` looks at.
    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Any:
        head = self.get_output_embeddings()
        ours = (
            fused_lm_head
            and labels is not None
            and head.weight.dtype.itemsize >= 4
            and options.get("shift_labels") is None
            and not options.get("output_router_logits")
        )
        kept = labels[:, 1:] != -100 if ours and labels is not None else None
        if kept is None or not bool(kept.any()):
            if fused_lm_head:
                options["fused_lm_head"] = True
            return trl_forward(*args, labels=labels, **options)
        assert labels is not None  # as `ours` says
        hidden = self.base_model(*args, **{**options, "use_cache": False}).last_hidden_state
        logprobs, entropy = _score(hidden[:, :-1][kept], head, labels[:, 1:][kept], temperature)
        empty = logprobs.new_zeros(kept.shape)
        return FusedCausalLMOutput(
            log_probs=empty.masked_scatter(kept, logprobs),
            entropy=empty.masked_scatter(kept, entropy),
            label_mask=kept,
        )

    model.forward = types.MethodType(forward, model)


def _score(hidden: Tensor, head: Any, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    # FSDP2 keeps the head in shards; under autocast the head stays in its own precision.
    weight, bias = _whole(head.weight), None if head.bias is None else _whole(head.bias)
    with torch.autocast(hidden.device.type, enabled=False):
        return linear_logprobs(
            hidden.to(weight.dtype), weight, targets, bias=bias, temperature=temperature
        )


def _whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
