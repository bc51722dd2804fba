"""What the trainers need of a causal language model: hidden states, head, vocabulary, one call."""
# ruff: noqa: E402, a missing extra must be reported before its imports are tried

from steelyard._extras import require

require("trl", extra="trl")

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from steelyard.integrations.trl._fused_head import has_plain_head


class LinearHead(NamedTuple):
    """``logits = hidden W^T + bias``."""

    weight: Tensor
    bias: Tensor | None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of a few rows."""
        return nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)

    def detached(self) -> "LinearHead":
        """The same without gradient."""
        return LinearHead(self.weight.detach(), None if self.bias is None else self.bias.detach())


@dataclass(frozen=True)
class States:
    """What a backbone returns.

    Attributes:
        last: ``[B, T, D]``, what the head reads.
        layers: ``[L, B, T, D]`` without the embeddings, or ``None``.
    """

    last: Tensor
    layers: Tensor | None = None


def causal_model(model: Any) -> Any:
    """The model below PEFT, whose ``base_model`` is the backbone and which holds the head."""
    return model.get_base_model() if is_peft_model(model) else model


def head_of(model: Any) -> LinearHead:
    """The head of a model, whole if its parameters are kept in shards."""
    head = causal_model(model).get_output_embeddings()
    return LinearHead(_whole(head.weight), None if head.bias is None else _whole(head.bias))


def hidden_states(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Hidden states ``[B, T, D]`` that the head reads; at ``t`` they predict token ``t + 1``."""
    backbone = causal_model(model).base_model
    output = backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    last: Tensor = output.last_hidden_state
    return last


def through(wrapped: Any, inner: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function as if it were the ``forward`` of a wrapped model.

    DDP, FSDP and DeepSpeed prepare parameters and gradients in their own ``forward``, which calls
    that of the model they wrap. Work on parts of a model has to go on in there.

    Args:
        wrapped: the model as the trainer calls it; may be ``inner`` itself.
        inner: what it wraps.
        function: called with ``args``; may call parts of ``inner``, and ``inner`` itself.
        *args: tensors, or dictionaries and lists of them.
    """
    own = inner.__dict__.get("forward")

    def restore() -> None:
        inner.__dict__.pop("forward", None)
        if own is not None:
            inner.forward = own

    def redirected(*given: Any, **_: Any) -> Any:
        restore()
        return function(*given)

    inner.forward = redirected
    try:
        return wrapped(*args)
    finally:
        restore()


def check_plain_head(name: str, model: Any) -> None:
    """Require a linear head, which is what the fused kernels compute.

    Raises:
        ValueError: the model's head is another module, or its logits are capped or scaled.
    """
    if not has_plain_head(causal_model(model)):
        raise ValueError(
            f"{name} must have a linear head whose logits are neither capped nor scaled, got "
            f"{type(causal_model(model)).__name__}"
        )


def check_same_vocabulary(**models: Any) -> int:
    """Require that models score the same tokens; return how many there are.

    Raises:
        ValueError: the heads have different numbers of rows; names them.
    """
    sizes = {
        name: causal_model(model).get_output_embeddings().weight.shape[0]
        for name, model in models.items()
        if model is not None
    }
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"{' and '.join(sizes)} must share one vocabulary, got heads of different sizes: "
            f"{found}. Token by token they can only be compared with one tokenizer; pad the "
            "smaller head with resize_token_embeddings if the tokenizer is the same"
        )
    return int(next(iter(sizes.values())))


def check_no_virtual_tokens(model: Any) -> None:
    """Refuse PEFT methods that put tokens before the prompt, which the backbone does not show.

    Raises:
        ValueError: the adapter is one of those.
    """
    if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            "peft adapters must change weights, as LoRA does; got prompt learning "
            f"({model.active_peft_config.peft_type})"
        )


def freeze(model: Any) -> Any:
    """Put a model in evaluation mode, its parameters without gradient."""
    return model.eval().requires_grad_(False)


def _whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


@torch.no_grad()
def is_most_likely(
    hidden: Tensor, head: LinearHead, targets: Tensor, logprobs: Tensor, entropy: Tensor
) -> Tensor:
    """Whether each target is the likeliest token, with logits only where that is not plain.

    More than half of the mass is the most; and the most is at least ``exp(-entropy)``.

    Args:
        hidden: ``[N, D]``.
        head: the head.
        targets: ``[N]``.
        logprobs: of the targets, ``[N]``.
        entropy: of the rows, ``[N]``.
    """
    found = logprobs > -0.693
    unclear = (~found & (logprobs >= -entropy - 1e-3)).nonzero()[:, 0]
    rows = max(1, _BLOCK_ENTRIES // head.weight.shape[0])
    for block in torch.split(unclear, rows):
        found[block] = head.logits(hidden[block]).argmax(1) == targets[block]
    return found


_BLOCK_ENTRIES = 4 * 2**20
"""Logits that are made at a time."""
