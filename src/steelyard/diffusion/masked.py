r"""Masked diffusion: the uncertainty of what is masked, what an action gains, the likelihood.

A state is a row of tokens some of which are ``mask_id``. Everywhere ``model`` is a callable
``ids [B, L] -> logits [B, L, V]`` that predicts each masked position given the others; if
``mask_id`` is below ``V`` its logit counts as ``-inf``. Entropies are in nats. The sampler itself
is :func:`steelyard.diffusion.masked_decoding.decode_masked`.

Source: Yang, Teoh, Yang, Zhang and Lamb (2026), Improving Sampling for Masked Diffusion Models via
Information Gain, arXiv:2602.18176.
"""

from collections.abc import Callable, Iterator, Sequence
from math import comb
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from steelyard._checks import (
    check_callable,
    check_choice,
    check_count,
    check_floating,
    check_integer_dtype,
    check_mask,
    check_not_empty,
    check_shape,
)
from steelyard._reduce import accumulation_dtype

__all__ = [
    "InformationGainScores",
    "MaskedModel",
    "information_gain_scores",
    "masked_nelbo",
    "position_entropies",
    "transfer_schedule",
]

MaskedModel = Callable[[Tensor], Tensor]
Future = Literal["mean", "sum"]
Candidate = tuple[Sequence[int] | Tensor, Sequence[int] | Tensor]

_CACHED = 2**17  # logits: what is made of so many stays in cache
_MOST_ENUMERATED = 16
"""Positions of the longest sequence whose 2^L masks are enumerated."""
_ROWS = 4096
"""States given to the model at once while enumerating: bounds the memory."""


class InformationGainScores(NamedTuple):
    """What :func:`information_gain_scores` returns: three ``[N]`` and the 0-d ``entropy``."""

    cost: Tensor
    next_entropy: Tensor
    objective: Tensor
    entropy: Tensor


def position_entropies(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Entropy of the token at each position, in nats.

    .. math:: H_i = -\sum_v p_{iv} \ln p_{iv}, \qquad p_i = \mathrm{softmax}(\mathrm{logits}_i)

    with :math:`0 \ln 0 = 0`, in the log domain: nothing is clamped.

    Args:
        logits: ``[..., L, V]``; ``-inf`` excludes a token. A position that counts and has no other
            logit gives NaN.
        mask: ``[..., L]``, true = counts; ``None`` counts all.

    Returns:
        ``[..., L]`` in ``[0, ln V]``, dtype of ``logits``; 0 with a zero gradient outside the mask.

    Raises:
        ValueError: wrong shapes or empty.
        TypeError: ``logits`` not floating point.

    Example:
        Even odds, a certain token, and a masked-out position:

        >>> import torch
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, float("-inf")], [0.0, 0.0]])
        >>> position_entropies(logits, torch.tensor([True, True, False]))
        tensor([0.6931, 0.0000, 0.0000])

    Source: Yang et al. (2026), Sec. 3, arXiv:2602.18176.
    """
    check_floating(logits=logits)
    if logits.dim() < 2:
        raise ValueError(f"logits must have shape [..., L, V], got {list(logits.shape)}")
    check_not_empty("logits", logits)
    counts = torch.ones_like(logits[..., 0], dtype=torch.bool) if mask is None else mask
    check_mask(counts, logits[..., 0])
    counts = counts != 0
    entropies = entropies_of(torch.where(counts[..., None], logits, 0.0))
    return torch.where(counts, entropies, 0.0).to(logits.dtype)


def entropies_of(logits: Tensor) -> Tensor:
    """Entropies over the last dimension, in float32 or better, without checks."""
    log_probs = logits.to(accumulation_dtype(logits.dtype)).log_softmax(-1)
    finite = torch.where(log_probs == -torch.inf, 0.0, log_probs)
    return 0.0 - (log_probs.exp() * finite).sum(-1)  # 0, not -0, where a token is certain


def masked_logits(model: MaskedModel, ids: Tensor, mask_id: int) -> Tensor:
    """Logits of a batch of states, the mask token excluded, in float32 or better."""
    return prepared_logits(model(ids), ids, mask_id)


def prepared_logits(logits: Tensor, ids: Tensor, mask_id: int) -> Tensor:
    """Check what a model returned, exclude the mask token, raise half precision to float32."""
    check_floating(**{"model(ids)": logits})
    check_shape("model(ids)", logits, (ids.shape[0], ids.shape[1], None))
    check_not_empty("model(ids)", logits)
    logits = logits.to(accumulation_dtype(logits.dtype))
    if 0 <= mask_id < logits.shape[-1]:
        where = torch.tensor([mask_id], device=logits.device)
        logits = logits.index_fill(-1, where, -torch.inf)
    return logits


def remaining_entropy(logits: Tensor, masked: Tensor, future: Future) -> Tensor:
    """Mean or sum of the entropies of the masked positions of each state, ``[B]``; 0 if none is.

    Args:
        logits: ``[B, L, V]``.
        masked: ``[B, L]`` boolean.
        future: ``"mean"`` or ``"sum"``.
    """
    # Only masked positions are looked at: most of a long prompt's logits are never touched. On a
    # CPU a few states at a time, so that what is between logits and entropies stays in cache.
    entropies = logits.new_zeros(masked.shape)
    on_host = logits.device.type == "cpu"
    size = max(1, _CACHED // logits[0].numel()) if on_host else len(logits)
    for start in range(0, len(logits), size):
        some = slice(start, start + size)
        here = masked[some]
        entropies[some][here] = entropies_of(logits[some][here])
    total = entropies.sum(-1)
    return total / masked.sum(-1).clamp(min=1) if future == "mean" else total


@torch.no_grad()
def information_gain_scores(
    model: MaskedModel,
    tokens: Tensor,
    candidates: Sequence[Candidate],
    mask_id: int,
    *,
    future: Future = "mean",
) -> InformationGainScores:
    r"""Score actions: their immediate uncertainty against the uncertainty they leave behind.

    .. math::
        J(a \mid z) = -\mathcal{H}(z + a) - C(a \mid z), \qquad
        C(a \mid z) = \sum_{i \in a} H_i(z), \qquad
        \mathcal{H}(z) = \frac{1}{|M(z)|} \sum_{i \in M(z)} H_i(z)

    The gain :math:`\mathcal{H}(z) - \mathcal{H}(z + a)` minus the cost is ``J`` plus the entropy of
    the state before, the same for every action. The model is called once, on the state and all the
    states that the actions lead to. NaN from the model stays NaN.

    Args:
        model: ``ids [B, L] -> logits [B, L, V]``.
        tokens: ``[L]`` integers, ``mask_id`` where masked.
        candidates: ``N`` pairs of positions and the tokens to put there. Positions are masked and
            distinct; candidates may differ in length.
        mask_id: the mask token; its logit is excluded.
        future: ``"mean"`` over what is masked (published code), or ``"sum"``, which puts cost and
            entropy on one scale: with the mean, a nat of cost weighs as much as ``|M|`` nats later.

    Returns:
        ``cost [N]``, ``next_entropy [N]`` (0 if nothing is left), ``objective [N]`` (larger is
        better) and ``entropy`` (0-d, of the state before); dtype of the logits or float32 if that
        is half precision. No gradient.

    Raises:
        ValueError: wrong shapes, no candidate, a position that is not masked or is repeated, a
            token that is ``mask_id`` or outside the vocabulary.
        TypeError: ``tokens`` not integer or logits not floating point. What ``model`` itself
            raises, such as for a token it does not know, comes through.

    Example:
        A hub with two noisy copies and a free token with a clear favourite. The favourite is the
        most certain now; the hub tells most about the rest:

        >>> import itertools, torch
        >>> from steelyard.diffusion.tabular_masked import TabularMaskedModel
        >>> states = torch.tensor(list(itertools.product((0, 1), repeat=4)))
        >>> hub, *copies, free = states.T
        >>> probs = 0.5 * torch.where(free == 0, 0.6, 0.4)
        >>> for copy in copies:
        ...     probs = probs * torch.where(copy == hub, 0.95, 0.05)
        >>> model = TabularMaskedModel(states, probs, vocab_size=2, mask_id=2)
        >>> actions = [([0], [0]), ([1], [0]), ([3], [0])]
        >>> scores = information_gain_scores(model, torch.full((4,), 2), actions, mask_id=2)
        >>> scores.cost
        tensor([0.6931, 0.6931, 0.6730])
        >>> scores.objective
        tensor([-1.0498, -1.0883, -1.3662])

    Source: Yang et al. (2026), arXiv:2602.18176, in the form of the released code.
    """
    check_callable(model=model)
    check_integer_dtype(tokens=tokens)
    check_shape("tokens", tokens, (None,))
    check_not_empty("tokens", tokens)
    check_choice("future", future, ("mean", "sum"))
    _check_mask_id(mask_id)
    if not hasattr(candidates, "__len__"):
        raise TypeError(f"candidates must be a sequence, got {type(candidates).__name__}")
    if len(candidates) == 0:
        raise ValueError("candidates must not be empty")
    actions = [_action(index, candidate, tokens) for index, candidate in enumerate(candidates)]
    states = tokens.repeat(len(actions) + 1, 1)
    for state, (positions, values) in zip(states[1:], actions, strict=True):
        if bool(((tokens[positions] != mask_id) | (values == mask_id)).any()):
            raise ValueError(
                f"candidates must put other tokens than mask_id, {mask_id}, where tokens has it"
            )
        if bool((values < 0).any()):
            raise ValueError(f"candidates must have tokens >= 0, got {int(values.min())}")
        state[positions] = values
    logits = masked_logits(model, states, mask_id)
    for _, values in actions:
        if bool(((values < 0) | (values >= logits.shape[-1])).any()):
            raise ValueError(f"candidates must have tokens in 0 .. {logits.shape[-1] - 1}")
    now = position_entropies(logits[0], tokens == mask_id)
    cost = torch.stack([now[positions].sum() for positions, _ in actions])
    left = remaining_entropy(logits, states == mask_id, future)
    return InformationGainScores(cost, left[1:], -left[1:] - cost, left[0])


def _check_mask_id(mask_id: int) -> None:
    """Require an integer of any sign."""
    check_count("mask_id", mask_id, at_least=-(2**63))


def _action(index: int, candidate: Candidate, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and tokens of a candidate as tensors."""
    name = f"candidates[{index}]"
    try:
        positions, values = (torch.as_tensor(part, device=tokens.device) for part in candidate)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name} must be two lists of integers, positions and tokens, got {candidate!r:.60}"
        ) from None
    if positions.dim() != 1 or positions.shape != values.shape or len(positions) == 0:
        raise ValueError(
            f"{name} must be two lists of the same length, at least 1, "
            f"got shapes {list(positions.shape)} and {list(values.shape)}"
        )
    check_integer_dtype(**{f"{name} positions": positions})
    check_integer_dtype(**{f"{name} tokens": values})
    places = positions.tolist()
    inside = all(0 <= place < len(tokens) for place in places)
    if not inside or len(set(places)) < len(places):
        raise ValueError(f"{name} must have distinct positions in 0 .. {len(tokens) - 1}")
    return positions.long(), values.to(tokens.dtype)


def transfer_schedule(num_masked: int, steps: int) -> Tensor:
    r"""Share positions evenly among steps: ``n // S`` each, the first ``n mod S`` one more.

    Args:
        num_masked: ``n``, >= 0.
        steps: ``S``, >= 1.

    Returns:
        ``[steps]`` int64 that sums to ``num_masked``; 0 for steps too many.

    Raises:
        ValueError: a number out of range.
        TypeError: a number that is not an int.

    Example:
        >>> transfer_schedule(10, 4)
        tensor([3, 3, 2, 2])

    Source: Nie et al. (2025), LLaDA, arXiv:2502.09992; used by Yang et al. (2026).
    """
    check_count("num_masked", num_masked, at_least=0)
    check_count("steps", steps, at_least=1)
    each, more = divmod(num_masked, steps)
    return each + (torch.arange(steps) < more).long()


def masked_nelbo(
    model: MaskedModel,
    tokens: Tensor,
    mask_id: int,
    *,
    form: Literal["sample", "enumerate"] = "sample",
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Negative evidence lower bound of sequences: the training loss of masked diffusion.

    .. math::
        \mathrm{NELBO}(x) = \sum_{k=1}^{L} \mathbb{E}_{|S| = k} \Big[ \frac1k \sum_{i \in S}
            -\ln p(x_i \mid x_{-S}) \Big]
        = \int_0^1 \frac1t\, \mathbb{E}_t \Big[ \sum_{i\ \text{masked}} -\ln p(x_i \mid z) \Big] dt

    with ``S`` uniform among the sets of ``k`` positions. The first form needs no ``1/t`` and no
    clipping. It is at least ``-ln p(x)`` on average, and equal to it for every ``x`` if the model
    is exact.

    Args:
        model: ``ids [B, L] -> logits [B, L, V]``.
        tokens: ``[B, L]`` integers. A counted one that is ``mask_id`` gives ``inf``.
        mask_id: what a token is replaced by; its logit is excluded.
        form: ``"sample"`` draws ``k`` and ``S`` once a row: unbiased, one call of the model.
            ``"enumerate"`` goes through all sets of at most 16 positions.
        mask: ``[B, L]``, true = counts; the others (a prompt, padding) are never masked, and ``L``
            in the formula is the number of those that count.
        generator: for ``"sample"``.

    Returns:
        ``[B]`` in nats, dtype of the logits; differentiable through the model. A row with nothing
        that counts gives 0.

    Raises:
        ValueError: wrong shapes, empty, or too many positions to enumerate.
        TypeError: ``tokens`` not integer or logits not floating point.

    Example:
        The bound of an exact model is the negative log-likelihood, here of a fair coin copied:

        >>> import torch
        >>> from steelyard.diffusion.tabular_masked import TabularMaskedModel
        >>> copies = torch.tensor([[0, 0], [1, 1]])
        >>> model = TabularMaskedModel(copies, torch.tensor([0.5, 0.5]), vocab_size=2, mask_id=2)
        >>> masked_nelbo(model, copies, mask_id=2, form="enumerate")
        tensor([0.6931, 0.6931])

    Source: Ou et al. (2024), arXiv:2406.03736, for the equality; Yang et al. (2026),
    arXiv:2602.18176.
    """
    check_callable(model=model)
    check_integer_dtype(tokens=tokens)
    check_shape("tokens", tokens, (None, None))
    check_not_empty("tokens", tokens)
    check_mask(mask, tokens)
    _check_mask_id(mask_id)
    check_choice("form", form, ("sample", "enumerate"))
    counts = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask != 0
    if form == "sample":
        hidden, weight = _random_sets(counts, generator)
        return _hidden_loss(model, tokens, mask_id, hidden, weight)
    total: Tensor | None = None
    for hidden, weight in _all_sets(counts):
        rows = tokens.repeat(hidden.shape[0], 1)
        flat = hidden.flatten(0, 1)
        part = _hidden_loss(model, rows, mask_id, flat, weight.flatten())
        part = part.view(hidden.shape[:2]).sum(0)
        total = part if total is None else total + part
    if total is None:  # nothing counts: one call for the dtype
        total = _hidden_loss(model, tokens, mask_id, counts, tokens.new_zeros(len(tokens)))
    return total


def _hidden_loss(
    model: MaskedModel, tokens: Tensor, mask_id: int, hidden: Tensor, weight: Tensor
) -> Tensor:
    """Weighted sum of ``-ln p`` over the hidden positions of each row, ``[B]``."""
    states = tokens.masked_fill(hidden, mask_id)
    returned = model(states)
    logits = prepared_logits(returned, states, mask_id)
    # Positions in view may hold any token, even one outside the vocabulary.
    target = torch.where(hidden, tokens, 0).long()
    nll = logits.logsumexp(-1) - logits.gather(-1, target[..., None]).squeeze(-1)
    return (torch.where(hidden, nll, 0.0).sum(-1) * weight).to(returned.dtype)


def _random_sets(counts: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Hide a uniform number of uniform positions of each row; weight ``n / k``."""
    device = counts.device if generator is None else generator.device
    draw = torch.rand(
        counts.shape[0],
        counts.shape[1] + 1,
        dtype=torch.float64,
        generator=generator,
        device=device,
    ).to(counts.device)
    n = counts.sum(-1)
    k = torch.minimum((draw[:, 0] * n).long() + 1, n)
    rank = draw[:, 1:].masked_fill(~counts, 2.0).argsort(-1).argsort(-1)
    return (rank < k[:, None]) & counts, n / k.clamp(min=1)


def _all_sets(counts: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield hidden sets ``[C, B, L]`` and their weights ``[C, B]``, in chunks."""
    batch, length = counts.shape
    places = counts.any(0).nonzero().squeeze(1)
    if len(places) > _MOST_ENUMERATED:
        raise ValueError(
            f"tokens must have at most {_MOST_ENUMERATED} positions to enumerate, got {len(places)}"
        )
    n = counts.sum(-1)
    share = torch.zeros(len(places) + 1, len(places) + 1, dtype=torch.float64, device=n.device)
    for size in range(1, len(places) + 1):
        for k in range(1, size + 1):
            share[size, k] = 1 / (k * comb(size, k))
    chunk = max(1, _ROWS // batch)
    for start in range(1, 2 ** len(places), chunk):
        codes = torch.arange(start, min(start + chunk, 2 ** len(places)), device=counts.device)
        bits = (codes[:, None] >> torch.arange(len(places), device=counts.device)) & 1
        hidden = torch.zeros(len(codes), length, dtype=torch.bool, device=counts.device)
        hidden[:, places] = bits.bool()
        outside = (hidden[:, None] & ~counts).any(-1)
        weight = share[n[None], bits.sum(-1)[:, None]].masked_fill(outside, 0.0)
        yield hidden[:, None] & counts, weight
