"""The exact masked-diffusion model of a finite law: what a perfect network would predict."""

import torch
from torch import Tensor

from steelyard._checks import (
    check_count,
    check_floating,
    check_integer_dtype,
    check_not_empty,
    check_shape,
)

__all__ = ["TabularMaskedModel"]


class TabularMaskedModel(torch.nn.Module):
    r"""Predict each position's marginal given the observed tokens, by counting states.

    .. math::
        p(x_i = v \mid z) = \frac{\sum_s p_s\, [s \text{ agrees with } z]\, [s_i = v]}
            {\sum_s p_s\, [s \text{ agrees with } z]}

    A state agrees if it has every token that is not masked. If none does, masked positions are
    uniform over the ``V`` tokens. An observed position is one-hot at its token.

    Args:
        states: ``[S, L]`` integers in ``0 .. V-1`` other than ``mask_id``; repeated ones add up.
        probs: ``[S]``, not negative, with a positive sum; normalised here. Its dtype is the dtype
            of the logits.
        vocab_size: ``V``, >= 1.
        mask_id: any integer; usually ``V``, outside the vocabulary.

    Raises:
        ValueError: wrong shapes, empty, a token or probability out of range.
        TypeError: ``states`` not integer or ``probs`` not floating point.

    Example:
        Two equal bits: seeing one settles the other.

        >>> import torch
        >>> states = torch.tensor([[0, 0], [1, 1]])
        >>> model = TabularMaskedModel(states, torch.tensor([0.25, 0.75]), vocab_size=2, mask_id=2)
        >>> model(torch.tensor([[2, 2], [2, 0]])).exp()
        tensor([[[0.2500, 0.7500],
                 [0.2500, 0.7500]],
        <BLANKLINE>
                [[1.0000, 0.0000],
                 [1.0000, 0.0000]]])

    Source: used for Yang et al. (2026), arXiv:2602.18176; elementary.
    """

    log_probs: Tensor
    indicators: Tensor

    def __init__(self, states: Tensor, probs: Tensor, vocab_size: int, mask_id: int) -> None:
        super().__init__()
        check_integer_dtype(states=states)
        check_shape("states", states, (None, None))
        check_not_empty("states", states)
        check_floating(probs=probs)
        check_shape("probs", probs, (states.shape[0],))
        check_count("vocab_size", vocab_size, at_least=1)
        check_count("mask_id", mask_id, at_least=-(2**63))  # of any sign
        if not bool(((states >= 0) & (states < vocab_size) & (states != mask_id)).all()):
            raise ValueError(
                f"states must have tokens in 0 .. {vocab_size - 1} other than mask_id, {mask_id}"
            )
        if not bool((probs >= 0).all() & (probs.sum() > 0) & probs.isfinite().all()):
            raise ValueError("probs must be finite, not negative and not all zero")
        self.vocab_size, self.mask_id = vocab_size, mask_id
        self.register_buffer("log_probs", probs.detach().log())
        one_hot = torch.nn.functional.one_hot(states.long(), vocab_size)
        self.register_buffer("indicators", one_hot.to(probs.dtype))

    def forward(self, ids: Tensor) -> Tensor:
        """Return log marginals ``[B, L, V]`` (``-inf`` for impossible tokens) of ids ``[B, L]``."""
        check_integer_dtype(ids=ids)
        check_shape("ids", ids, (None, self.indicators.shape[1]))
        seen = ids != self.mask_id
        if not bool((~seen | ((ids >= 0) & (ids < self.vocab_size))).all()):
            raise ValueError(
                f"ids must be tokens in 0 .. {self.vocab_size - 1} or mask_id, {self.mask_id}"
            )
        tokens = torch.where(seen, ids, 0).long()
        observed = torch.nn.functional.one_hot(tokens, self.vocab_size) * seen[..., None]
        # How many observed tokens each state shares: one product for all rows and states.
        shared = observed.flatten(1).to(self.indicators.dtype) @ self.indicators.flatten(1).T
        agrees = (shared == seen.sum(-1, keepdim=True)) & (self.log_probs > -torch.inf)
        known = agrees.any(-1)
        scores = torch.where(agrees, self.log_probs, -torch.inf)
        posterior = torch.where(known[:, None], scores, 0.0).softmax(-1)
        marginals = torch.tensordot(posterior, self.indicators, dims=1)
        marginals = torch.where(known[:, None, None], marginals, 1 / self.vocab_size)
        return torch.where(seen[..., None], observed.to(marginals.dtype), marginals).log()
