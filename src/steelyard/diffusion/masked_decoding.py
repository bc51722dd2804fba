r"""Fill the masked positions of a sequence: greedy heuristics and the look-ahead of Info-Gain.

The heuristics commit what is most certain now. Info-Gain tries several actions, evaluates the
states they lead to in one batch, and commits the one with the best balance of the uncertainty it
takes and the uncertainty it leaves.

Source: Yang, Teoh, Yang, Zhang and Lamb (2026), Improving Sampling for Masked Diffusion Models via
Information Gain, arXiv:2602.18176.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from steelyard._checks import (
    check_callable,
    check_choice,
    check_count,
    check_integer_dtype,
    check_not_empty,
    check_range,
    check_shape,
)
from steelyard.diffusion._arguments import check_no_nan
from steelyard.diffusion.masked import (
    Future,
    MaskedModel,
    entropies_of,
    masked_logits,
    remaining_entropy,
    transfer_schedule,
)

__all__ = ["DecodedTokens", "Sampler", "decode_masked"]

Sampler = Literal["info_gain", "entropy", "confidence", "margin", "lookahead"]

_SAMPLERS = ("info_gain", "entropy", "confidence", "margin", "lookahead")


class DecodedTokens(NamedTuple):
    """What :func:`decode_masked` returns: ``[L]``, ``[masked]`` and 0-d."""

    tokens: Tensor
    order: Tensor
    cumulative_entropy: Tensor


def decode_masked(
    model: MaskedModel,
    tokens: Tensor,
    *,
    mask_id: int,
    sampler: Sampler = "info_gain",
    steps: int | None = None,
    num_candidates: int | None = 8,
    position_temperature: float = 0.2,
    token_temperature: float = 0.0,
    bypass: float | None = 0.8,
    block_size: int | None = None,
    future: Future = "mean",
    generator: torch.Generator | None = None,
) -> DecodedTokens:
    r"""Fill every masked position of a sequence, a few a step.

    ============== ===========================================================================
    ``sampler``    a step commits, of the masked positions of the current block
    ============== ===========================================================================
    ``confidence`` those whose most probable token has the largest probability
    ``entropy``    those of the smallest entropy
    ``margin``     those with the largest lead of the first over the second probability
    ``info_gain``  the action of the largest :math:`-\mathcal{H}(z + a) - \sum_{i \in a} H_i(z)`
    ``lookahead``  the action of the largest :math:`-\mathcal{H}(z + a)`
    ============== ===========================================================================

    The candidate actions of the last two are the positions ``confidence`` would take, and
    ``num_candidates - 1`` draws without replacement with weights :math:`e^{c_i / \tau}`, ``c`` the
    confidence (Gumbel top-k); repeated actions count once. :math:`\mathcal{H}` is over everything
    that is still masked, also in later blocks. All candidates go through the model in one call, and
    the logits of the chosen one serve the next step: no more calls than positions plus blocks.

    Args:
        model: ``ids [B, L] -> logits [B, L, V]``, without dropout.
        tokens: ``[L]`` integers; ``mask_id`` where masked, the others are never changed.
        mask_id: its logit is excluded.
        sampler: see the table.
        steps: in all, shared evenly among blocks, in a block by :func:`transfer_schedule`; at least
            the number of blocks. ``None`` = one position a step.
        num_candidates: >= 1. ``None`` = every masked position alone, no draws; if a step commits
            several, those of the best objectives. 1 is the ``confidence`` sampler, exactly.
        position_temperature: ``tau``, >= 0. 0 is the ``confidence`` sampler, exactly.
        token_temperature: 0 = argmax; else tokens are drawn from the softmax of ``logits / T``. The
            heuristics choose positions without looking at the draws, so at 1 an exact model is
            sampled exactly, one position a step.
        bypass: for the two samplers with candidates: if each masked position of the block has a
            probability of at least this, commit the argmax of all of them at once. ``None`` =
            never. It saves the look-ahead, so it does nothing where there is none.
        block_size: fill blocks of so many positions, counted from the first masked one, in turn.
            ``None`` = one block.
        future: ``"mean"`` or ``"sum"`` over what is masked, see
            :func:`steelyard.diffusion.masked.information_gain_scores`.
        generator: for the draws.

    Returns:
        ``tokens [L]``; ``order``, the committed positions in turn (within a step the more certain
        first; ties go to the lower index); ``cumulative_entropy``, the sum over commitments of the
        entropy at that time (it says how unsure the model was, not whether it was right).

    Raises:
        ValueError: wrong shape, empty, a setting out of range, or NaN from the model.
        TypeError: ``tokens`` or ``mask_id`` not integer. What ``model`` itself
            raises, such as for a token it does not know, comes through.

    Example:
        A hub that two noisy copies follow, and a free token: Info-Gain settles the hub first and
        knows the copies better, confidence starts with the free token:

        >>> import itertools, torch
        >>> from steelyard.diffusion.tabular_masked import TabularMaskedModel
        >>> states = torch.tensor(list(itertools.product((0, 1), repeat=4)))
        >>> hub, *copies, free = states.T
        >>> probs = torch.where(free == 0, 0.6, 0.4)
        >>> for copy in copies:
        ...     probs = probs * torch.where(copy == hub, 0.95, 0.05)
        >>> model = TabularMaskedModel(states, probs, vocab_size=2, mask_id=2)
        >>> start = torch.full((4,), 2)
        >>> decode_masked(model, start, mask_id=2, num_candidates=None, bypass=None).order
        tensor([0, 1, 2, 3])
        >>> decode_masked(model, start, mask_id=2, sampler="confidence").order
        tensor([3, 0, 1, 2])

    Source: Yang et al. (2026), arXiv:2602.18176; confidence and margin: LLaDA, arXiv:2502.09992,
    and Dream, arXiv:2508.15487.
    """
    check_callable(model=model)
    check_integer_dtype(tokens=tokens)
    check_shape("tokens", tokens, (None,))
    check_not_empty("tokens", tokens)
    check_count("mask_id", mask_id, at_least=-(2**63))  # of any sign
    decoder = _Decoder(
        model=model,
        mask_id=mask_id,
        sampler=sampler,
        num_candidates=num_candidates,
        position_temperature=position_temperature,
        token_temperature=token_temperature,
        bypass=bypass,
        future=future,
        generator=generator,
    )
    decoder.check()
    ids = tokens.clone()
    order = [tokens.new_empty(0, dtype=torch.long)]
    costs = []
    with torch.no_grad():
        for block, counts in _blocks(tokens == mask_id, steps, block_size):
            logits = None
            for count in counts:
                positions = block[ids[block] == mask_id]
                if len(positions) == 0:
                    break
                if logits is None:
                    logits = masked_logits(model, ids[None], mask_id)[0]
                step = decoder.step(ids, logits, positions, count)
                ids[step.positions] = step.tokens.to(ids.dtype)
                order.append(step.positions)
                costs.append(step.cost)
                logits = step.next_logits
    total = torch.stack(costs).sum() if costs else torch.zeros((), device=tokens.device)
    return DecodedTokens(ids, torch.cat(order), total)


def _blocks(
    masked: Tensor, steps: int | None, block_size: int | None
) -> Iterator[tuple[Tensor, list[int]]]:
    """Yield the masked positions of each block and how many to commit at each step."""
    if block_size is not None:
        check_count("block_size", block_size, at_least=1)
    if steps is not None:
        check_count("steps", steps, at_least=1)
    positions = masked.nonzero().squeeze(1)
    if len(positions) == 0:
        return
    size = len(masked) if block_size is None else block_size
    _, lengths = torch.unique((positions - positions[0]) // size, return_counts=True)
    blocks = torch.split(positions, lengths.tolist())
    if steps is not None and steps < len(blocks):
        raise ValueError(
            f"steps must be at least the number of blocks, {len(blocks)} with "
            f"block_size={block_size}, got {steps}"
        )
    shares = transfer_schedule(steps, len(blocks)).tolist() if steps is not None else None
    for index, block in enumerate(blocks):
        share = len(block) if shares is None else shares[index]
        yield block, [count for count in transfer_schedule(len(block), share).tolist() if count]


class _Step(NamedTuple):
    """What one step commits, and the logits of the state after it if they are known."""

    positions: Tensor
    tokens: Tensor
    cost: Tensor
    next_logits: Tensor | None = None


@dataclass(frozen=True)
class _Decoder:
    """The settings of a decoding and the choice of one step."""

    model: MaskedModel
    mask_id: int
    sampler: Sampler
    num_candidates: int | None
    position_temperature: float
    token_temperature: float
    bypass: float | None
    future: Future
    generator: torch.Generator | None

    def check(self) -> None:
        check_choice("sampler", self.sampler, _SAMPLERS)
        check_choice("future", self.future, ("mean", "sum"))
        if self.num_candidates is not None:
            check_count("num_candidates", self.num_candidates, at_least=1)
        for name in ("position_temperature", "token_temperature"):
            check_range(name, getattr(self, name), at_least=0.0, below=math.inf)
        if self.bypass is not None:
            check_range("bypass", self.bypass, at_least=0.0)

    @property
    def looks_ahead(self) -> bool:
        if self.sampler not in ("info_gain", "lookahead"):
            return False
        if self.num_candidates is None:
            return True
        return self.num_candidates > 1 and self.position_temperature > 0

    def step(self, ids: Tensor, logits: Tensor, positions: Tensor, count: int) -> _Step:
        """Choose what to commit among ``positions`` (ascending), given the logits ``[L, V]``."""
        here = logits[positions]
        log_probs = here.log_softmax(-1)
        check_no_nan("model(ids)", log_probs)
        entropies = entropies_of(here)
        tokens = self._draw(here)
        confidence = log_probs.amax(-1).exp()
        if self.looks_ahead and self._is_certain(confidence):
            first = _ranked(confidence)
            return _Step(positions[first], here.argmax(-1)[first], entropies.sum())
        if self.looks_ahead and len(positions) > count:
            return self._look_ahead(ids, here, positions, tokens, confidence, entropies, count)
        chosen = _ranked(self._certainty(log_probs, confidence, entropies))[:count]
        return _Step(positions[chosen], tokens[chosen], entropies[chosen].sum())

    def _draw(self, logits: Tensor) -> Tensor:
        """Take the argmax of each row or draw from its softmax at the token temperature."""
        if self.token_temperature == 0:
            return logits.argmax(-1)
        # In float64: rounded noise would favour some tokens.
        noise = self._gumbel(logits.shape, logits.device)
        return (logits.double() + self.token_temperature * noise).argmax(-1)

    def _gumbel(self, shape: torch.Size | tuple[int, ...], device: torch.device) -> Tensor:
        source = device if self.generator is None else self.generator.device
        draw = torch.empty(shape, dtype=torch.float64, device=source)
        return -draw.exponential_(generator=self.generator).log().to(device)

    def _is_certain(self, confidence: Tensor) -> bool:
        if self.bypass is None:
            return False
        lowest = confidence.amin()
        return bool(lowest >= self.bypass - 8 * torch.finfo(lowest.dtype).eps)

    def _certainty(self, log_probs: Tensor, confidence: Tensor, entropies: Tensor) -> Tensor:
        """Local score of each position: the larger, the earlier it is committed."""
        if self.sampler == "entropy":
            return -entropies
        if self.sampler == "margin" and log_probs.shape[-1] > 1:
            first, second = log_probs.topk(2, dim=-1).values.exp().unbind(-1)
            return first - second
        return confidence

    def _look_ahead(
        self,
        ids: Tensor,
        logits: Tensor,
        positions: Tensor,
        tokens: Tensor,
        confidence: Tensor,
        entropies: Tensor,
        count: int,
    ) -> _Step:
        """Commit the candidate whose state has the best objective; one call for all of them."""
        places, values = self._candidates(logits, tokens, confidence, count)
        states = ids.repeat(len(places), 1).scatter(1, positions[places], values.to(ids.dtype))
        next_logits = masked_logits(self.model, states, self.mask_id)
        objective = -remaining_entropy(next_logits, states == self.mask_id, self.future)
        check_no_nan("model(ids)", objective)
        cost = entropies[places].sum(-1)
        if self.sampler == "info_gain":
            objective = objective - cost
        best = _ranked(objective)
        if places.shape[1] == count:
            winner = best[0]
            first = _ranked(confidence[places[winner]])
            place, value = places[winner][first], values[winner][first]
            return _Step(positions[place], value, cost[winner], next_logits[winner])
        alone = best[:count]  # scored alone, committed together: their joint state is not known
        place = places[alone, 0]
        return _Step(positions[place], values[alone, 0], cost[alone].sum())

    def _candidates(
        self, logits: Tensor, tokens: Tensor, confidence: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """Distinct actions: places among the masked positions and their tokens, ``[N', k]``."""
        if self.num_candidates is None:
            return torch.arange(len(tokens), device=tokens.device)[:, None], tokens[:, None]
        drawn = self.num_candidates - 1
        # Relative to the largest, so that a tiny temperature cannot overflow.
        scaled = (confidence - confidence.amax()).double() / self.position_temperature
        noise = self._gumbel((drawn, len(tokens)), tokens.device)
        places = (scaled + noise).topk(count, dim=-1).indices
        places = torch.cat([_ranked(confidence)[None, :count], places]).sort(-1).values
        values = tokens[places]
        if self.token_temperature > 0:
            values[1:] = self._draw(logits[places[1:]])
        actions = torch.stack([places, values], -1).flatten(1).tolist()
        distinct = list(
            {tuple(action): n for n, action in reversed(list(enumerate(actions)))}.values()
        )
        keep = torch.tensor(sorted(distinct), device=tokens.device)
        return places[keep], values[keep]


def _ranked(scores: Tensor) -> Tensor:
    """Indices by descending score, ties to the lower index.

    Scores that differ by less than rounding are ties: the same marginals computed in another order,
    or in a batch of another size, must give the same decoding.
    """
    decimals = 9 if scores.dtype == torch.float64 else 6
    rounded = torch.round(scores.double(), decimals=decimals)
    return rounded.argsort(descending=True, stable=True)
