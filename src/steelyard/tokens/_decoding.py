"""Next-token logits of plain callables and of Hugging Face models, the latter with a cache."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from steelyard._checks import check_callable, check_not_empty
from steelyard.tokens._arguments import check_token_ids

NextToken = Callable[[Tensor], Tensor]
"""A model: ids ``[B, T]`` to next-token logits ``[B, V]``."""


class CachedNextToken:
    """A Hugging Face causal language model as a callable ``ids [B, T] -> logits [B, V]``.

    Keys and values of the tokens seen in the last call are kept. A call that goes on from them
    feeds only what is new; a call that departs from them (another continuation of the same prompt)
    crops the cache to the common prefix. :func:`cross_sample` wraps such models by itself; wrap
    them beforehand to keep the prompt's cache from one threshold to the next.

    Rows have equal length and no padding. The model is used as it is: call ``model.eval()`` first.

    Args:
        model: has ``config`` and returns ``logits`` ``[B, T, V]`` and, if it can, a
            ``past_key_values``. One without a usable cache is run in full at every call.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8,
        ...     num_hidden_layers=1, num_attention_heads=2)
        >>> next_token = CachedNextToken(LlamaForCausalLM(config).eval())
        >>> next_token(torch.tensor([[1, 2, 3]])).shape, next_token.cached_tokens
        (torch.Size([1, 11]), 3)
        >>> _ = next_token(torch.tensor([[1, 2, 7, 7]]))  # feeds the last two only
        >>> next_token.fed_tokens
        5

    Source: the cached decoding that cross-sampling needs, Meng et al. (2026), arXiv:2603.22446.
    """

    def __init__(self, model: Any) -> None:
        check_callable(model=model)
        self.model = model
        self.fed_tokens = 0
        """Tokens a row that the model was run on, over all calls."""
        self._ids: Tensor | None = None
        self._cache: Any = None
        self._keep = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}

    @property
    def cached_tokens(self) -> int:
        """Tokens a row whose keys and values are kept."""
        return 0 if self._ids is None else self._ids.shape[1]

    def __call__(self, ids: Tensor) -> Tensor:
        """Return next-token logits ``[B, V]`` of ids ``[B, T]``, ``T >= 1``."""
        check_token_ids("ids", ids)
        check_not_empty("ids", ids)
        start = self._crop_to_prefix(ids)
        cache, self._cache, self._ids = self._cache, None, None  # lost if the model raises
        options = {"past_key_values": cache, **self._keep}
        with torch.no_grad():
            output = self.model(input_ids=ids[:, start:], use_cache=True, **options)
        self.fed_tokens += ids.shape[1] - start
        self._cache = getattr(output, "past_key_values", None)
        if self._cache is not None:
            self._ids = ids
        logits: Tensor = output.logits[:, -1]
        return logits

    def _crop_to_prefix(self, ids: Tensor) -> int:
        # How many leading tokens need not be fed; the last one always is, for its logits.
        old = self._ids
        if old is None or len(old) != len(ids) or old.device != ids.device:
            self._cache = None
            return 0
        shared = min(old.shape[1], ids.shape[1] - 1)
        same = (old[:, :shared] == ids[:, :shared]).all(0)
        shared = int(same.long().cumprod(0).sum())
        if shared == old.shape[1]:
            return shared
        try:
            # Negative = tokens to remove, which all versions understand.
            self._cache.crop(shared - old.shape[1])
            cropped = shared > 0 and self._cache.get_seq_length() == shared
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
            cropped = False  # sliding windows and recurrent states cannot always go back
        if not cropped:
            self._cache = None
            return 0
        return shared


def as_next_token(name: str, model: Any) -> NextToken:
    """Return a plain callable as it is and a Hugging Face model with a cache around it."""
    if not callable(model):
        raise TypeError(f"{name} must be callable, got {type(model).__name__}")
    if hasattr(model, "config") and takes(model, "past_key_values"):
        return CachedNextToken(model)
    return model  # type: ignore[no-any-return]


def takes(model: Any, argument: str) -> bool:
    """Tell whether the forward pass has a keyword, or hands all keywords on."""
    parameters = inspect.signature(getattr(model, "forward", model)).parameters
    return argument in parameters or any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
    )


def next_logprobs(name: str, model: NextToken, ids: Tensor, temperature: float) -> Tensor:
    """Return next-token log-probabilities ``[B, V]`` in float32 or better, checked."""
    logits = model(ids)
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        came = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"{name} must return a floating tensor of logits, got {came}")
    if logits.dim() != 2 or logits.shape[0] != ids.shape[0] or logits.shape[1] == 0:
        raise ValueError(f"{name} must return logits [{ids.shape[0]}, V], got {list(logits.shape)}")
    work = torch.promote_types(logits.dtype, torch.float32)
    logprobs = (logits.to(work) / temperature).log_softmax(-1)
    if bool(logprobs.isnan().any()):
        raise ValueError(f"{name} returned a row with NaN, +inf or no finite logit")
    return logprobs
