r"""Token shift and log-probabilities of Hugging Face models from hidden states, not from logits.

One forward pass gives the hidden states (caught at the decoder's end) and the logits of the last
position. If these are ``hidden W^T + bias``, the head is linear and everything else is computed in
blocks by :mod:`steelyard.fused`. Heads that cap or scale their logits, adapters on the head and
models without ``logits_to_keep`` go through full logits, with the same results.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from steelyard._checks import check_callable, check_count, check_range, check_shape
from steelyard.fused import LinearLogprobs, TokenShift, linear_logprobs, linear_token_shift
from steelyard.tokens._arguments import check_token_ids
from steelyard.tokens._decoding import takes
from steelyard.tokens.shift import token_shift

# Entries of a block of logits where the blocked kernels do not apply.
_BLOCK = 2**22


@dataclass(frozen=True)
class HiddenStates:
    """What :func:`hidden_states_and_head` returns: the head's input and the head, or logits."""

    hidden: Tensor | None
    """Input of the head, ``[B, T, D]``; ``None`` if the head is not linear."""
    weight: Tensor | None
    """The head, ``[V, D]``."""
    bias: Tensor | None
    """Bias of the head, ``[V]``, or ``None``."""
    logits: Tensor | None
    """Full logits ``[B, T, V]`` where the head is not linear, else ``None``."""

    @property
    def vocabulary(self) -> int:
        """``V``."""
        if self.logits is not None:
            return self.logits.shape[-1]
        assert self.weight is not None  # one of the two is there
        return self.weight.shape[0]


def hidden_states_and_head(
    model: Any, input_ids: Tensor, *, attention_mask: Tensor | None = None
) -> HiddenStates:
    r"""Run a causal language model up to its head: ``logits = hidden W^T + bias``.

    That the model's own logits are these is checked on the last position of each row. Where they
    are not (soft caps, scales, adapters on the head), the full logits are returned.

    Args:
        model: a causal language model of Hugging Face, used as it is (call ``model.eval()``).
        input_ids: integers, ``[B, T]``, ``T >= 1``.
        attention_mask: ``[B, T]``, 1 = a token, 0 = padding, on the right.

    Returns:
        ``hidden`` ``[B, T, D]``, ``weight`` ``[V, D]``, ``bias`` ``[V]`` or ``None``, and
        ``logits`` = ``None``; or only ``logits`` ``[B, T, V]``. With gradients, if enabled.

    Raises:
        TypeError: ids are not integers, or the model returns no ``logits``.
        ValueError: wrong shapes.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8,
        ...     num_hidden_layers=1, num_attention_heads=2)
        >>> model, ids = LlamaForCausalLM(config).eval(), torch.tensor([[1, 2, 3]])
        >>> run = hidden_states_and_head(model, ids)
        >>> torch.allclose(run.hidden @ run.weight.T, model(ids).logits, atol=1e-6)
        True

    Source: memory-bounded form of the measurement of Meng et al. (2026), arXiv:2603.22446.
    """
    check_callable(model=model)
    check_token_ids("input_ids", input_ids)
    if input_ids.shape[1] == 0:
        raise ValueError("input_ids must have at least one token a row, got T = 0")
    if attention_mask is not None:
        check_shape("attention_mask", attention_mask, tuple(input_ids.shape))
    decoder, head = _decoder_and_head(model)
    caught: list[Any] = []
    options: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": False}
    if head is not None:
        options["logits_to_keep"] = 1
        handle = decoder.register_forward_hook(lambda module, inputs, output: caught.append(output))
        try:
            last = _logits(model(input_ids=input_ids, **options))
        finally:
            handle.remove()
        hidden = _hidden(caught)
        if hidden is not None and _is_linear(hidden, head, last, input_ids):
            return HiddenStates(hidden, head.weight, head.bias, None)
        del options["logits_to_keep"]
    return HiddenStates(None, None, None, _logits(model(input_ids=input_ids, **options)))


def model_logprobs(
    model: Any,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> LinearLogprobs:
    r"""Log-probability of each token after those before it, never holding ``[B, T, V]``.

    .. math:: \log \pi(x_t | x_{<t}), \qquad H_t = -\sum_v \pi(v | x_{<t}) \log \pi(v | x_{<t}),
        \qquad t = 1, \dots, T - 1

    Differentiable, if gradients are enabled.

    Args:
        model: a causal language model of Hugging Face, used as it is (call ``model.eval()``).
        input_ids: integers, ``[B, T]``, ``T >= 2``.
        attention_mask: ``[B, T]``, 1 = a token, 0 = padding, on the right; results there have no
            meaning.
        temperature: divides the logits, > 0.
        chunk_size: rows of logits made at a time; ``None`` picks a bounded number.

    Returns:
        ``logprobs`` and ``entropy``, each ``[B, T - 1]``; column ``t`` belongs to token ``t + 1``.

    Raises:
        TypeError: as :func:`hidden_states_and_head`.
        ValueError: wrong shapes, ``temperature <= 0``.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8,
        ...     num_hidden_layers=1, num_attention_heads=2)
        >>> model, ids = LlamaForCausalLM(config).eval(), torch.tensor([[1, 2, 3]])
        >>> plain = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
        >>> torch.allclose(model_logprobs(model, ids).logprobs, plain[..., 0], atol=1e-6)
        True

    Source: :func:`steelyard.fused.linear_logprobs` on the hidden states.
    """
    check_callable(model=model)
    check_token_ids("input_ids", input_ids)
    _check_has_next("input_ids", input_ids)
    check_range("temperature", temperature, above=0.0, below=float("inf"))
    run = hidden_states_and_head(model, input_ids, attention_mask=attention_mask)
    targets = input_ids[:, 1:]
    source = run.logits if run.hidden is None else run.hidden
    assert source is not None  # one of the two is there
    work = torch.promote_types(source.dtype, torch.float32)
    check_range("temperature", temperature, at_least=torch.finfo(work).tiny)  # finite inverse
    if run.hidden is not None and run.weight is not None:
        found = linear_logprobs(
            run.hidden[:, :-1].flatten(0, 1),
            run.weight,
            targets.flatten(),
            bias=run.bias,
            temperature=temperature,
            chunk_size=chunk_size,
        )
        return LinearLogprobs(*(field.view_as(targets) for field in found))
    assert run.logits is not None  # one of the two is there
    logits = run.logits[:, :-1]
    logprobs = (logits.to(work) / temperature).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs.clamp(min=torch.finfo(work).min)).sum(-1)
    chosen = logprobs.gather(-1, targets[..., None].long())[..., 0]
    return LinearLogprobs(chosen.to(logits.dtype), entropy.to(logits.dtype))


@torch.no_grad()
def model_token_shift(
    base_model: Any,
    rl_model: Any,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    vocabulary: int | None = None,
    top_p: float | None = None,
    top_k: int = 10,
    chunk_size: int | None = None,
) -> TokenShift:
    r"""Measure the shift at each token of a batch of responses, by teacher forcing both models.

    The fields of :func:`token_shift` from hidden states and heads, a few rows of logits at a time.

    Args:
        base_model: a causal language model of Hugging Face, used as it is (call ``eval()``).
        rl_model: the same after training, with the same tokenizer.
        input_ids: prompts and responses, ``[B, T]``, ``T >= 2``.
        attention_mask: ``[B, T]``, 1 = a token, 0 = padding, on the right; results there have no
            meaning: mask them, and those of prompts, in what follows.
        vocabulary: compare the first so many tokens, for heads padded to different sizes; ``None``
            = all, which must be equally many.
        top_p: as in :func:`token_shift`.
        top_k: as in :func:`token_shift`.
        chunk_size: rows of logits made at a time; ``None`` picks a bounded number.

    Returns:
        The fields of :func:`token_shift`, ``[B, T - 1]``; column ``t`` belongs to token ``t + 1``.

    Raises:
        TypeError: as :func:`hidden_states_and_head`.
        ValueError: wrong shapes, vocabularies that differ, a setting out of range.

    Example:
        A model has not moved from itself:

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8,
        ...     num_hidden_layers=1, num_attention_heads=2)
        >>> model, ids = LlamaForCausalLM(config).eval(), torch.tensor([[1, 2, 3]])
        >>> model_token_shift(model, model, ids).rl_top1_base_rank
        tensor([[1, 1]])

    Source: Meng et al. (2026), section 2, arXiv:2603.22446.
    """
    check_callable(base_model=base_model, rl_model=rl_model)
    check_token_ids("input_ids", input_ids)
    _check_has_next("input_ids", input_ids)
    check_count("top_k", top_k)
    for name, value in (("vocabulary", vocabulary), ("chunk_size", chunk_size)):
        if value is not None:
            check_count(name, value)
    if top_p is not None:
        check_range("top_p", top_p, above=0.0, at_most=1.0)
    runs = [
        hidden_states_and_head(model, input_ids, attention_mask=attention_mask)
        for model in (base_model, rl_model)
    ]
    _check_vocabularies(runs, vocabulary)
    if top_p is None and all(run.logits is None for run in runs):
        base, rl = (_flat_head(run, vocabulary) for run in runs)
        shift = linear_token_shift(*base, *rl, top_k=top_k, chunk_size=chunk_size)
    else:
        size = runs[0].vocabulary if vocabulary is None else vocabulary
        rows = chunk_size or max(1, _BLOCK // size)
        number = input_ids.shape[0] * (input_ids.shape[1] - 1)
        parts = []
        for start in range(0, number, rows):
            here = slice(start, min(start + rows, number))
            base_rows, rl_rows = (_logits_of_rows(run, here, size) for run in runs)
            parts.append(token_shift(base_rows, rl_rows, top_p=top_p, top_k=top_k))
        shift = TokenShift(*(torch.cat(field) for field in zip(*parts, strict=True)))
    batch, length = input_ids.shape
    return TokenShift(*(x.reshape(batch, length - 1, *x.shape[1:]) for x in shift))


def _decoder_and_head(model: Any) -> tuple[Any, Any]:
    # The part of the model below its head, and the head if it can be a plain linear layer.
    get_decoder = getattr(model, "get_decoder", None)
    get_head = getattr(model, "get_output_embeddings", None)
    config = getattr(model, "config", None)
    capped = getattr(config, "final_logit_softcapping", None) is not None
    if get_decoder is None or get_head is None or capped or not takes(model, "logits_to_keep"):
        return None, None
    decoder, head = get_decoder(), get_head()
    if decoder is None or decoder is model or type(head) is not torch.nn.Linear:
        return None, None
    return decoder, head


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise TypeError(f"the model must return logits [B, T, V], got {type(output).__name__}")
    return logits


def _hidden(caught: list[Any]) -> Tensor | None:
    # The decoder's last hidden state; nothing if it did not run exactly once.
    if len(caught) != 1:
        return None
    output = caught[0]
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None and isinstance(output, tuple):
        hidden = output[0]
    return hidden if isinstance(hidden, Tensor) else None


def _is_linear(hidden: Tensor, head: Any, last: Tensor, input_ids: Tensor) -> bool:
    if hidden.shape[:2] != input_ids.shape or hidden.shape[-1] != head.in_features:
        return False
    with torch.no_grad():
        mine = linear(hidden[:, -1], head.weight, head.bias)
        theirs = last[:, -1].to(mine.dtype)
        if last.shape[1] != 1 or mine.shape != theirs.shape:
            return False
        scale = theirs.abs().amax()
        # The same product up to the order of its sums; half precision sums in float32.
        close = (2 if mine.dtype.itemsize == 2 else 64) * torch.finfo(mine.dtype).eps
        return bool((mine - theirs).abs().amax() <= close * scale)


def _check_has_next(name: str, ids: Tensor) -> None:
    if ids.shape[1] < 2:
        raise ValueError(f"{name} must have at least two tokens a row, got T = {ids.shape[1]}")


def _check_vocabularies(runs: list[HiddenStates], vocabulary: int | None) -> None:
    sizes = [run.vocabulary for run in runs]
    if vocabulary is None and sizes[0] != sizes[1]:
        raise ValueError(
            f"base_model and rl_model must have equally many tokens, got {sizes[0]} and "
            f"{sizes[1]}; pass the size of their common vocabulary"
        )
    if vocabulary is not None and vocabulary > min(sizes):
        raise ValueError(f"vocabulary must be <= {min(sizes)}, got {vocabulary}")


def _flat_head(run: HiddenStates, vocabulary: int | None) -> tuple[Tensor, Tensor]:
    # Rows and head for a kernel without a bias: it becomes one more column, met by a 1.
    assert run.hidden is not None
    assert run.weight is not None
    hidden, weight = run.hidden[:, :-1].flatten(0, 1), run.weight[:vocabulary]
    if run.bias is None:
        return hidden, weight
    one = hidden.new_ones(len(hidden), 1)
    return torch.cat((hidden, one), 1), torch.cat((weight, run.bias[:vocabulary, None]), 1)


def _logits_of_rows(run: HiddenStates, rows: slice, vocabulary: int) -> Tensor:
    if run.logits is not None:
        return run.logits[:, :-1].flatten(0, 1)[rows, :vocabulary]
    assert run.hidden is not None
    assert run.weight is not None
    bias = None if run.bias is None else run.bias[:vocabulary]
    return linear(run.hidden[:, :-1].flatten(0, 1)[rows], run.weight[:vocabulary], bias)
