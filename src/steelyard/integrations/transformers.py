"""Info-Gain decoding for masked-language and masked-diffusion models of Hugging Face Transformers.

:class:`InfoGainSampler` wraps any module that maps ``input_ids`` to an object with ``.logits``:
``BertForMaskedLM`` and its kin, LLaDA, Dream. Nothing of ``transformers`` is imported here; the
model you pass brings it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steelyard._checks import check_count, check_integer_dtype
from steelyard.diffusion.masked import Future
from steelyard.diffusion.masked_decoding import DecodedTokens, Sampler, decode_masked

__all__ = ["InfoGainSampler"]


class InfoGainSampler:
    r"""Generate from a masked model, looking ahead at what each commitment tells about the rest.

    Every setting is passed to :func:`steelyard.diffusion.masked_decoding.decode_masked`, which has
    the formulas. Prompts of a batch are decoded one after the other; the candidates of one prompt
    are the batch that the model sees.

    Args:
        model: called as ``model(input_ids=ids)`` with ``ids [B, L]``; returns an object with
            ``logits [B, L, V]``. Put into evaluation mode while it is used, then set back.
        mask_id: the mask token, usually ``tokenizer.mask_token_id``; ``None`` takes it from
            ``tokenizer``, or else from ``model.config.mask_token_id``.
        tokenizer: anything with a ``mask_token_id``; only read if ``mask_id`` is ``None``.
        sampler: ``"info_gain"``, ``"lookahead"``, ``"confidence"``, ``"entropy"`` or ``"margin"``.
        num_candidates: actions tried a step, >= 1; ``None`` = every masked position alone.
        position_temperature: >= 0, of the draw of candidates.
        token_temperature: >= 0; 0 = argmax.
        bypass: fill a block at once if each of its positions is at least this probable; ``None`` =
            never.
        future: ``"mean"`` or ``"sum"`` of the entropies that remain.
        shift_logits: the logit at a position predicts the *next* one, as in Dream.
        penalties: subtracted from the logits of these tokens, for example of the end token, 4.0,
            so that it is not chosen too early.

    Raises:
        ValueError: no mask id is known.

    Example:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> class Counting(torch.nn.Module):  # each token is most likely its own position
        ...     def forward(self, input_ids):
        ...         logits = 4.0 * torch.eye(8)[: input_ids.shape[1]]
        ...         return SimpleNamespace(logits=logits.expand(len(input_ids), -1, -1))
        >>> sampler = InfoGainSampler(Counting(), mask_id=7)
        >>> sampler.generate(torch.tensor([0, 1]), max_new_tokens=4).tokens
        tensor([0, 1, 2, 3, 4, 5])

    Source: Yang et al. (2026), arXiv:2602.18176.
    """

    def __init__(
        self,
        model: nn.Module,
        mask_id: int | None = None,
        *,
        tokenizer: Any = None,
        sampler: Sampler = "info_gain",
        num_candidates: int | None = 8,
        position_temperature: float = 0.2,
        token_temperature: float = 0.0,
        bypass: float | None = 0.8,
        future: Future = "mean",
        shift_logits: bool = False,
        penalties: Mapping[int, float] | None = None,
    ) -> None:
        self.model = model
        self.mask_id = _mask_id(model, mask_id, tokenizer)
        self.sampler: Sampler = sampler
        self.num_candidates = num_candidates
        self.position_temperature = position_temperature
        self.token_temperature = token_temperature
        self.bypass = bypass
        self.future: Future = future
        self.shift_logits = shift_logits
        self.penalties = dict(penalties or {})

    def generate(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int,
        *,
        steps: int | None = None,
        block_size: int | None = 32,
        generator: torch.Generator | None = None,
    ) -> DecodedTokens:
        """Append ``max_new_tokens`` masks to each prompt and fill them.

        Args:
            prompt_ids: ``[P]`` or ``[B, P]`` integers, all of one length; ``P`` may be 0. Masks in
                a prompt are filled too, as part of the first blocks.
            max_new_tokens: >= 1.
            steps: in all, for each prompt; ``None`` = one position a step.
            block_size: positions of a block; ``None`` = one block.
            generator: for the draws.

        Returns:
            ``tokens [P + new]``, ``order [new]`` (positions in turn), ``cumulative_entropy`` (0-d);
            with a leading ``B`` for a batch.

        Raises:
            ValueError: wrong shape or a setting out of range.
            TypeError: ``prompt_ids`` not integer.
        """
        _check_ids("prompt_ids", prompt_ids)
        check_count("max_new_tokens", max_new_tokens, at_least=1)
        masks = prompt_ids.new_full((*prompt_ids.shape[:-1], max_new_tokens), self.mask_id)
        ids = torch.cat([prompt_ids, masks], -1)
        return self.fill(ids, steps=steps, block_size=block_size, generator=generator)

    def fill(
        self,
        ids: Tensor,
        *,
        steps: int | None = None,
        block_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> DecodedTokens:
        """Fill the masks of sequences, wherever they are.

        Args:
            ids: ``[L]`` or ``[B, L]`` integers; the rows of a batch have equally many masks.
            steps: in all, for each row; ``None`` = one position a step.
            block_size: positions of a block, from the first mask on; ``None`` = one block.
            generator: for the draws.

        Returns:
            As :meth:`generate`; a batch is filled row by row.

        Raises:
            ValueError: wrong shape, rows with different numbers of masks, a setting out of range.
            TypeError: ``ids`` not integer.
        """
        _check_ids("ids", ids)
        rows = ids if ids.dim() == 2 else ids[None]
        counts = (rows == self.mask_id).sum(-1).tolist()
        if len(set(counts)) != 1:
            raise ValueError(f"ids must have rows with equally many masks, got {counts}")
        with _evaluating(self.model):
            filled = [
                decode_masked(
                    self._logits,
                    row,
                    mask_id=self.mask_id,
                    sampler=self.sampler,
                    steps=steps,
                    num_candidates=self.num_candidates,
                    position_temperature=self.position_temperature,
                    token_temperature=self.token_temperature,
                    bypass=self.bypass,
                    block_size=block_size,
                    future=self.future,
                    generator=generator,
                )
                for row in rows
            ]
        if ids.dim() == 1:
            return filled[0]
        return DecodedTokens(*(torch.stack(parts) for parts in zip(*filled, strict=True)))

    def _logits(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids).logits
        if self.shift_logits:
            logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
        if self.penalties:
            penalty = torch.zeros_like(logits[0, 0])
            for token, amount in self.penalties.items():
                penalty[token] = amount
            logits = logits - penalty
        return logits


def _mask_id(model: nn.Module, mask_id: int | None, tokenizer: Any) -> int:
    """Take the first mask id that is known."""
    config = getattr(model, "config", None)
    found = (mask_id, *(getattr(s, "mask_token_id", None) for s in (tokenizer, config)))
    known = next((number for number in found if number is not None), None)
    if known is None:
        raise ValueError("mask_id must be given: neither tokenizer nor model.config has one")
    return int(known)


def _check_ids(name: str, ids: Tensor) -> None:
    check_integer_dtype(**{name: ids})
    if ids.dim() not in (1, 2) or (ids.dim() == 2 and ids.shape[0] == 0):
        raise ValueError(f"{name} must have shape [L] or [B, L], got {list(ids.shape)}")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while: candidates are compared by their logits."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
