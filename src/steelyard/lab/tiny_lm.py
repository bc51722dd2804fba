r"""Language models small enough for a CPU, in the classes that people fine-tune.

A word-level tokenizer over a handful of symbols, a Llama or Qwen2 from scratch, batched sampling
with a key-value cache, the log-probabilities of given completions, and supervised training. The
model and the tokenizer are ordinary Hugging Face objects: TRL, PEFT and the adapters here take them
as they are. Everything below also works on a pre-trained causal model.

Prompts are padded on the left, completions on the right. Needs the extra ``lm``; importing this
module does not.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steelyard._checks import (
    check_choice,
    check_count,
    check_integer_dtype,
    check_mask,
    check_not_empty,
    check_range,
    check_same_shape,
    check_shape,
)
from steelyard._extras import require
from steelyard.lab._text import (
    decode_completions,
    encode_completions,
    encode_rows,
    tiny_tokenizer,
)

__all__ = [
    "Samples",
    "completion_logprobs",
    "decode_completions",
    "encode_completions",
    "encode_rows",
    "pretrain",
    "sample",
    "tiny_lm",
    "tiny_tokenizer",
]

_COMPACT_BELOW = 0.75  # Rows that ended are dropped once fewer than this share are still open.


@dataclass(frozen=True)
class Samples:
    """What :func:`sample` returns, each ``[B, T]``; ``T`` is the longest completion drawn."""

    tokens: Tensor
    """Token ids; the padding id after the end."""
    mask: Tensor
    """Boolean: the tokens of the completion, its end token included."""
    logprobs: Tensor
    """Log-probability of each token where it was drawn; 0 outside the mask."""


def tiny_lm(
    tokenizer: Any,
    *,
    kind: Literal["llama", "qwen2"] = "llama",
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    max_positions: int = 128,
    seed: int = 0,
) -> Any:
    """Make a decoder-only transformer from scratch, float32, for the tokens of a tokenizer.

    Args:
        tokenizer: gives the vocabulary and the ids of padding, beginning and end.
        kind: which Hugging Face class.
        hidden_size: width, a multiple of ``2 * num_heads``; the inner layers are four times wider.
        num_layers: >= 1.
        num_heads: >= 1.
        max_positions: longest prompt plus completion.
        seed: of the weights, which depend on nothing else; the global generators are left as
            they were.

    Returns:
        A ``LlamaForCausalLM`` or ``Qwen2ForCausalLM`` in evaluation mode.

    Raises:
        ValueError: a setting out of range.

    Example:
        >>> model = tiny_lm(tiny_tokenizer(["a", "b"]), hidden_size=16, num_heads=2)
        >>> type(model).__name__, model.config.eos_token_id, model.training
        ('LlamaForCausalLM', 2, False)
    """
    check_choice("kind", kind, ("llama", "qwen2"))
    check_count("num_layers", num_layers)
    check_count("num_heads", num_heads)
    check_count("hidden_size", hidden_size)
    check_count("max_positions", max_positions)
    if hidden_size % (2 * num_heads):
        raise ValueError(
            f"hidden_size must be a multiple of 2 * num_heads, got {hidden_size} and {num_heads}"
        )
    transformers = require("transformers", extra="lm")
    name = {"llama": "Llama", "qwen2": "Qwen2"}[kind]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=max_positions,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
        dtype="float32",
    )
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    return model.float().eval()


def sample(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
) -> Samples:
    r"""Draw one completion per prompt, all prompts at once.

    Each token comes from :math:`\mathrm{softmax}(z / \text{temperature})` and its log-probability
    is that of this distribution. At temperature 0 the most likely token is taken, and its
    log-probability is that at temperature 1. Rows that ended are dropped on the way, so the cost
    follows the tokens that are needed.

    Args:
        model: a Hugging Face causal language model; put in evaluation mode while sampling.
        prompt_ids: ``[B, P]``, padded on the left.
        prompt_mask: ``[B, P]``, ``True`` = token of the prompt.
        max_new_tokens: >= 1.
        temperature: >= 0.
        generator: of the draws; on the device of the model.
        eos_id: token that ends a completion; ``None`` = the model's.
        pad_id: token written after the end; ``None`` = the model's, else the end token.

    Returns:
        :class:`Samples`. A completion that never ended has a full mask and no end token.

    Raises:
        ValueError: wrong shapes, a prompt that is empty or padded on the right, or one too long
            for the model.

    Example:
        >>> tokenizer = tiny_tokenizer(["a", "b"])
        >>> model = tiny_lm(tokenizer, hidden_size=16, num_heads=2)
        >>> ids, mask = encode_rows(tokenizer, [{"prompt": "a"}, {"prompt": "b b a"}])
        >>> drawn = sample(model, ids, mask, max_new_tokens=4,
        ...                generator=torch.Generator().manual_seed(0))
        >>> again = completion_logprobs(model, ids, mask, drawn.tokens, drawn.mask)
        >>> torch.allclose(drawn.logprobs, again, atol=1e-5)
        True
    """
    _check_prompts(model, prompt_ids, prompt_mask, max_new_tokens)
    check_count("max_new_tokens", max_new_tokens)
    check_range("temperature", temperature, at_least=0.0)
    ends = _end_ids(model, eos_id)
    pad = _pad_id(model, pad_id, ends)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            drawn = _Sampler(model, temperature, generator, ends, pad).run(
                prompt_ids, prompt_mask.bool(), max_new_tokens
            )
    finally:
        model.train(was_training)
    # Tensors made in inference mode may not enter autograd: hand out ordinary copies.
    return Samples(drawn.tokens.clone(), drawn.mask.clone(), drawn.logprobs.clone())


@dataclass(frozen=True)
class _Sampler:
    model: Any
    temperature: float
    generator: torch.Generator | None
    ends: tuple[int, ...]
    pad: int

    def run(self, prompt_ids: Tensor, prompt_mask: Tensor, limit: int) -> Samples:
        batch, device = prompt_ids.shape[0], prompt_ids.device
        tokens = prompt_ids.new_full((batch, limit), self.pad)
        kept = torch.zeros(batch, limit, dtype=torch.bool, device=device)
        logprobs = torch.zeros(batch, limit, device=device)
        cache = require("transformers", extra="lm").DynamicCache(config=self.model.config)
        ends = prompt_ids.new_tensor(self.ends)
        rows = torch.arange(batch, device=device)  # which completions are still computed
        is_open = torch.ones_like(rows, dtype=torch.bool)
        inputs, positions = prompt_ids, _positions(prompt_mask)
        # Without padding the mask says nothing, and the attention is faster without one.
        mask = None if bool(prompt_mask.all()) else prompt_mask.long()
        step = 0
        while True:
            logits = self.model(
                input_ids=inputs,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            token, logprob = self._draw(logits)
            tokens[rows, step] = token.where(is_open, self.pad)
            kept[rows, step] = is_open
            logprobs[rows, step] = logprob.where(is_open, 0.0)
            is_open = is_open & ~torch.isin(token, ends)
            step += 1
            number_open = int(is_open.sum())
            if number_open == 0 or step == limit:
                return Samples(tokens[:, :step], kept[:, :step], logprobs[:, :step])
            positions = positions[:, -1:] + 1
            if number_open < _COMPACT_BELOW * rows.numel():
                keep = is_open.nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                rows, token, positions = rows[keep], token[keep], positions[keep]
                mask = None if mask is None else mask[keep]
                is_open = is_open[keep]
            inputs = token.unsqueeze(1)
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)

    def _draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.float()
        if self.temperature > 0.0:
            logprobs = torch.log_softmax(scores / self.temperature, dim=-1)
            token = torch.multinomial(logprobs.exp(), 1, generator=self.generator)
        else:
            logprobs = torch.log_softmax(scores, dim=-1)
            token = logprobs.argmax(dim=-1, keepdim=True)
        return token.squeeze(1), logprobs.gather(1, token).squeeze(1)


def completion_logprobs(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    tokens: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> Any:
    r"""Log-probability of every token of given completions, in one forward pass.

    .. math:: \log \mathrm{softmax}(z_t / \text{temperature})_{y_t}, \qquad
        H_t = -\sum_v p_{t,v} \log p_{t,v}

    Only the ``T`` positions that predict a completion token go through the head. The gradient
    flows; dropout follows the mode of the model.

    Args:
        model: a Hugging Face causal language model.
        prompt_ids: ``[B, P]``, padded on the left.
        prompt_mask: ``[B, P]``.
        tokens: ``[B, T]``, the completions, padded on the right.
        mask: ``[B, T]``, the positions that count. Attention is causal, so it sees every earlier
            token, counted or not.
        temperature: > 0.
        with_entropy: also return the entropy of each position.

    Returns:
        ``[B, T]`` float32, 0 where ``mask`` is not; with ``with_entropy`` the pair of
        log-probabilities and entropies.

    Raises:
        ValueError: wrong shapes, an empty or right-padded prompt, or a sequence too long.

    Example:
        >>> tokenizer = tiny_tokenizer(["a", "b"])
        >>> model = tiny_lm(tokenizer, hidden_size=16, num_heads=2)
        >>> ids, shown = encode_rows(tokenizer, [{"prompt": "a"}])
        >>> every = torch.arange(5).unsqueeze(1)
        >>> logprob = completion_logprobs(model, ids.expand(5, 1), shown.expand(5, 1), every,
        ...                               torch.ones(5, 1, dtype=torch.bool))
        >>> bool(torch.isclose(logprob.exp().sum(), torch.tensor(1.0)))
        True
    """
    check_shape("tokens", tokens, (prompt_ids.shape[0], None))
    check_integer_dtype(tokens=tokens)
    check_not_empty("tokens", tokens)
    check_mask(mask, tokens)
    check_range("temperature", temperature, above=0.0)
    length = tokens.shape[1]
    _check_prompts(model, prompt_ids, prompt_mask, length)
    shown = prompt_mask.bool()
    seen = torch.cat([shown, shown.new_ones(tokens.shape)], dim=1)[:, :-1]
    logits = model(
        input_ids=torch.cat([prompt_ids, tokens], dim=1)[:, :-1],
        attention_mask=None if bool(shown.all()) else seen.long(),
        position_ids=_positions(seen),
        use_cache=False,
        logits_to_keep=length,
    ).logits
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    counts = mask.bool()
    chosen = logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).where(counts, 0.0)
    if not with_entropy:
        return chosen
    entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
    return chosen, entropy.where(counts, 0.0)


def pretrain(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    tokens: Tensor,
    mask: Tensor,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    generator: torch.Generator | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train a model in place to give the completions: mean log-loss over their tokens.

    AdamW (0.9, 0.95, decay 0.01), gradients clipped to norm 1, a linear warm-up over the first
    twentieth of the steps and a cosine to zero. Rows are drawn with replacement.

    Args:
        model: a Hugging Face causal language model.
        prompt_ids: ``[N, P]``, padded on the left.
        prompt_mask: ``[N, P]``.
        tokens: ``[N, T]``, padded on the right.
        mask: ``[N, T]``, the tokens to learn.
        steps: >= 1.
        batch_size: rows a step.
        lr: peak learning rate, > 0.
        generator: of the rows, on the CPU.
        progress: called with the step, from 0, and its loss.

    Returns:
        The loss of each step. The model keeps the mode it had.

    Raises:
        ValueError: wrong shapes or a setting out of range.

    Example:
        >>> tokenizer = tiny_tokenizer(["a", "b"])
        >>> model = tiny_lm(tokenizer, hidden_size=16, num_heads=2)
        >>> prompts = encode_rows(tokenizer, [{"prompt": "a"}, {"prompt": "b"}])
        >>> answers = encode_completions(tokenizer, ["b", "a"])
        >>> losses = pretrain(model, *prompts, *answers, steps=60, batch_size=8, lr=1e-2,
        ...                   generator=torch.Generator().manual_seed(0))
        >>> drawn = sample(model, *prompts, max_new_tokens=3, temperature=0.0)
        >>> decode_completions(tokenizer, drawn.tokens, drawn.mask)
        ['b', 'a']
    """
    check_count("steps", steps)
    check_count("batch_size", batch_size)
    check_range("lr", lr, above=0.0)
    check_same_shape(tokens=tokens, mask=mask)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = max(1, steps // 20)
    was_training = model.training
    model.train()
    losses = []
    for step in range(steps):
        rows = torch.randint(prompt_ids.shape[0], (batch_size,), generator=generator)
        rows = rows.to(prompt_ids.device)
        counted = mask[rows]
        logprobs = completion_logprobs(
            model, prompt_ids[rows], prompt_mask[rows], tokens[rows], counted
        )
        loss = -logprobs.sum() / counted.sum().clamp(min=1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * _warmup_cosine(step, steps, warmup)
        optimizer.step()
        losses.append(float(loss.detach()))
        if progress is not None:
            progress(step, losses[-1])
    model.train(was_training)
    return losses


def _warmup_cosine(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _positions(mask: Tensor) -> Tensor:
    """Number the tokens from 0, whatever the padding before them."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def _check_prompts(model: Any, prompt_ids: Tensor, prompt_mask: Tensor, new_tokens: int) -> None:
    check_shape("prompt_ids", prompt_ids, (None, None))
    check_integer_dtype(prompt_ids=prompt_ids)
    check_not_empty("prompt_ids", prompt_ids)
    check_mask(prompt_mask, prompt_ids, name="prompt_mask")
    shown = prompt_mask.bool()
    if not bool(shown[:, -1].all() & (shown[:, 1:] >= shown[:, :-1]).all()):
        raise ValueError(
            "prompt_mask must be padded on the left only, with at least one token in each row"
        )
    longest = getattr(model.config, "max_position_embeddings", None)
    needed = prompt_ids.shape[1] + new_tokens
    if longest is not None and needed > longest:
        raise ValueError(
            f"prompt and completion must fit into the {longest} positions of the model, "
            f"got {prompt_ids.shape[1]} + {new_tokens}"
        )


def _end_ids(model: Any, eos_id: int | None) -> tuple[int, ...]:
    """Return the tokens that end a completion; a model may have several, or none."""
    if eos_id is not None:
        return (eos_id,)
    generation = getattr(model, "generation_config", None)
    known = getattr(generation, "eos_token_id", None)
    if known is None:
        known = getattr(model.config, "eos_token_id", None)
    if known is None:
        return ()
    return (known,) if isinstance(known, int) else tuple(known)


def _pad_id(model: Any, pad_id: int | None, ends: tuple[int, ...]) -> int:
    known = pad_id if pad_id is not None else getattr(model.config, "pad_token_id", None)
    return known if known is not None else (*ends, 0)[0]
