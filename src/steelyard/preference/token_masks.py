r"""Where the token weights of SparsePO come from: activations, or a small learned head.

Both read the **reference** model. A mask at ``t`` must come from the state that predicts token
``t``, before that token is seen: it weighs a state, not a token, and cannot single out a word that
its prefix does not announce.

Source: Christopoulou et al. (2024), SparsePO, arXiv:2410.05102.
"""

import math

import torch
from torch import Tensor, nn

from steelyard._checks import (
    check_count,
    check_floating,
    check_mask,
    check_not_empty,
    check_range,
    check_shape,
)
from steelyard._reduce import accumulation_dtype, aggregate_tokens, widen

__all__ = ["LearnedTokenMask", "activation_mask", "mask_sparsity"]


def activation_mask(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Weight tokens by how active the reference model is at them (MaPO).

    .. math:: m_t = \frac1L \sum_l \frac{a^l_t - \min_{t'} a^l_{t'}}{\max_{t'} a^l_{t'}
        - \min_{t'} a^l_{t'}}, \qquad a^l_t = \frac1D \sum_d h^l_{td}

    with minimum and maximum over the tokens of a response that count. The z-score that the paper
    takes first cancels. Where all tokens of a layer are equally active (one token is) the mask
    is 1. Call it once for each kind of activation (MLP, attention, residual) and average.

    Args:
        hidden: activations of the **reference** model, ``[L, B, T, D]``; those at ``t`` belong to
            the state that predicts token ``t``. Detached.
        mask: which tokens count, ``[B, T]``.

    Returns:
        ``[B, T]`` in [0, 1], dtype of ``hidden``; 0 where ``mask`` is false. No gradient. Computed
        in float32 or wider. NaN propagates within its response.

    Raises:
        TypeError: ``hidden`` is not floating.
        ValueError: shapes do not fit, or nothing in ``hidden``.

    Example:
        A change of scale or offset of a layer changes nothing:

        >>> hidden = torch.tensor([[[[0.0], [1.0], [4.0]]], [[[2.0], [1.0], [0.0]]]])
        >>> activation_mask(hidden)
        tensor([[0.5000, 0.3750, 0.5000]])
        >>> torch.equal(activation_mask(3 * hidden + 1), activation_mask(hidden))
        True

    Source: Christopoulou et al. (2024), Sec. 3.2, arXiv:2410.05102.
    """
    _check_states(hidden, (None,) * 4)
    if mask is not None:
        check_mask(mask, hidden[0, :, :, 0])
    active = widen(hidden.detach()).mean(-1)
    kept = torch.ones_like(active[0], dtype=torch.bool) if mask is None else mask != 0
    least = active.masked_fill(~kept, math.inf).amin(-1, keepdim=True)
    most = active.masked_fill(~kept, -math.inf).amax(-1, keepdim=True)
    spread = most - least
    constant = spread == 0
    scaled = torch.where(constant, 1.0, (active - least) / spread.masked_fill(constant, 1.0))
    return torch.where(kept, scaled.mean(0), 0.0).to(hidden.dtype)


class LearnedTokenMask(nn.Module):
    r"""Learn a weight for each state from the reference model's hidden states, with exact zeros.

    .. math:: m_t = \mathrm{ReLU}\Big( \sum_l v_l\, m^l_t \Big), \qquad
        m^l_t = \mathrm{ReLU}\left( \mathrm{LN}(h^l_t) \cdot w_l + b_l \right)

    One head serves both terms (SparsePO-common), two serve one each (SparsePO-indep). The mask is
    trained together with the policy by :func:`~steelyard.preference.sparse_po_loss`, in a parameter
    group of its own with weight decay (the paper: AdamW, 0.01), and thrown away afterwards.

    It starts at exactly 1 (TDPO1): ``w = 0``, ``b = 1``, ``v = 1/L``. A mixer drawn around 0 would
    start half of all heads at 0 everywhere, where no gradient reaches them.

    Args:
        num_layers: ``L``, without the embedding layer.
        hidden_size: ``D``.
        dropout: probability of dropping a layer's weight and the output's; survivors grow by
            ``1 / (1 - dropout)``. Default 0; the paper takes 0.01. Off in ``eval()``.

    Shape:
        ``hidden [L, B, T, D] -> mask [B, T]``, at least 0 and unbounded above, in the wider of the
        dtypes of ``hidden`` and the parameters. With a ``transformers`` model:
        ``torch.stack(out.hidden_states[1:])[:, :, :-1]`` are the states that predict tokens 1 to T.

    Raises:
        TypeError: ``num_layers`` or ``hidden_size`` not an integer, ``hidden`` not floating.
        ValueError: a number or shape does not fit.

    Example:
        >>> head = LearnedTokenMask(num_layers=2, hidden_size=4)
        >>> head(torch.ones(2, 1, 3, 4))
        tensor([[1., 1., 1.]], grad_fn=<ReluBackward0>)
        >>> [name for name, _ in head.named_parameters()]
        ['layer_weight', 'layer_bias', 'mix_weight', 'norm.weight', 'norm.bias']

    Source: Christopoulou et al. (2024), Sec. 3.3, arXiv:2410.05102; the initialisation is ours.
    """

    def __init__(self, num_layers: int, hidden_size: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        check_count("num_layers", num_layers)
        check_count("hidden_size", hidden_size)
        check_range("dropout", dropout, at_least=0.0, below=1.0)
        self.norm = nn.LayerNorm(hidden_size, eps=1e-5)
        self.layer_weight = nn.Parameter(torch.zeros(num_layers, hidden_size))
        self.layer_bias = nn.Parameter(torch.ones(num_layers))
        self.mix_weight = nn.Parameter(torch.full((num_layers,), 1.0 / num_layers))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the mask ``[B, T]`` of states ``[L, B, T, D]``."""
        layers, size = self.layer_weight.shape
        _check_states(hidden, (layers, None, None, size))
        states = self.norm(hidden.to(torch.promote_types(hidden.dtype, self.norm.weight.dtype)))
        each = torch.einsum("lbtd,ld->lbt", states, self.layer_weight.to(states.dtype))
        each = self.dropout(torch.relu(each + self.layer_bias[:, None, None]))
        mixed = torch.einsum("lbt,l->bt", each, self.mix_weight.to(each.dtype))
        dropped: Tensor = self.dropout(mixed)
        return torch.relu(dropped)


def mask_sparsity(token_mask: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Share of tokens whose weight is exactly 0, averaged over responses.

    Args:
        token_mask: weights, ``[B, T]``; detached.
        mask: which tokens count, ``[B, T]``. Responses without any are left out.

    Returns:
        0-d in [0, 1] (the paper prints percent), float32 or wider; 0 if no token counts.
        NaN where one counts.

    Raises:
        TypeError: ``token_mask`` is not floating.
        ValueError: shapes do not fit, or nothing in them.

    Example:
        >>> weights = torch.tensor([[0.0, 2.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
        >>> mask_sparsity(weights, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
        tensor(0.3750)

    Source: Christopoulou et al. (2024), Sec. 4, arXiv:2410.05102.
    """
    check_floating(token_mask=token_mask)
    check_shape("token_mask", token_mask, (None, None))
    check_not_empty("token_mask", token_mask)
    check_mask(mask, token_mask)
    weights = token_mask.detach()
    zero = (weights == 0).to(accumulation_dtype(token_mask.dtype))
    zero = zero.masked_fill(weights.isnan(), math.nan)
    return aggregate_tokens(zero, mask, "sequence")


def _check_states(hidden: Tensor, expected: tuple[int | None, ...]) -> None:
    check_floating(hidden=hidden)
    check_shape("hidden", hidden, expected)
    check_not_empty("hidden", hidden)
