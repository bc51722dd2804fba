"""How far reinforcement learning has moved each next-token law, from two linear heads."""

import torch
from torch import Tensor

from steelyard._checks import check_count, check_shape
from steelyard.fused._blocks import (
    Head,
    block_rows,
    check_chunk_size,
    check_head,
    empty_rows,
    fill_rows,
    rows_in_cache,
    slices,
)
from steelyard.fused._compile import run_eagerly
from steelyard.fused._shift import TokenShift, shift_of_rows


def linear_token_shift(
    base_hidden: Tensor,
    base_weight: Tensor,
    rl_hidden: Tensor,
    rl_weight: Tensor,
    *,
    top_k: int = 10,
    chunk_size: int | None = None,
) -> TokenShift:
    r"""Measure how far each next-token law has moved, never holding ``[N, V]``.

    With ``P_n = softmax(h_n W^T)`` of the base and ``Q_n`` of the RL model,

    .. math::
        JS_n = \tfrac12 KL(P_n\|M_n) + \tfrac12 KL(Q_n\|M_n), \quad M_n = \tfrac12 (P_n + Q_n),

    ``KL(P_n || Q_n)``, both entropies, the overlap ``|TopK(P_n) and TopK(Q_n)| / k`` for each ``k``
    and the place of each model's favourite in the other. There is no gradient. Extra memory is
    ``O(chunk_size * V)``.

    Args:
        base_hidden: hidden states of the base model, shape ``[N, D]``; ``N = 0`` is allowed.
        base_weight: its head, shape ``[V, D]``.
        rl_hidden: hidden states of the RL model on the same tokens, shape ``[N, D']``.
        rl_weight: its head, shape ``[V, D']``.
        top_k: the largest ``k`` of the overlap, at least 1.
        chunk_size: rows worked on at a time; ``None`` picks a bounded number.

    Returns:
        The fields of :class:`TokenShift`: ``js``, ``kl``, ``base_entropy``, ``rl_entropy``,
        ``overlap`` (``[N, min(top_k, V)]``), ``rl_top1_base_rank``, ``rl_top1_base_prob``,
        ``base_top1_rl_rank``. Ranks count from 1; ties go to the lower index. Floats are in the
        input dtype; half precision is computed in float32.

    Raises:
        TypeError: a tensor is not floating point, ``top_k`` or ``chunk_size`` not an integer.
        ValueError: shapes do not fit, ``top_k < 1`` or ``chunk_size < 1``.

    Example:
        The RL model prefers the token that the base ranks second:

        >>> head = torch.eye(3)
        >>> base, rl = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[1.0, 2.0, 0.0]])
        >>> shift = linear_token_shift(base, head, rl, head, top_k=2)
        >>> shift.rl_top1_base_rank, shift.overlap
        (tensor([2]), tensor([[0., 1.]]))
        >>> print(f"{shift.rl_top1_base_prob.item():.4f} {shift.js.item():.4f}")
        0.2447 0.1010

    Source: Meng et al. (2026), Sparse but Critical, sections 2 and 5, arXiv:2603.22446.
    """
    check_head("base_", base_hidden, base_weight, None, 1.0)
    check_head("rl_", rl_hidden, rl_weight, None, 1.0)
    check_shape("rl_hidden", rl_hidden, (base_hidden.shape[0], None))
    check_shape("rl_weight", rl_weight, (base_weight.shape[0], None))
    check_count("top_k", top_k)
    check_chunk_size(chunk_size)
    base, rl = Head(base_hidden, base_weight, None, 1.0), Head(rl_hidden, rl_weight, None, 1.0)
    shift: TokenShift = run_eagerly(_in_blocks, base, rl, top_k, chunk_size)
    return shift


@torch.no_grad()
def _in_blocks(base: Head, rl: Head, top_k: int, chunk_size: int | None) -> TokenShift:
    rows = block_rows(base, chunk_size)
    base_block, rl_block = empty_rows(rows, base), empty_rows(rows, rl)
    nothing = shift_of_rows(base_block[:0], rl_block[:0], top_k)
    shift = TokenShift(*(field.new_empty(base.num_rows, *field.shape[1:]) for field in nothing))
    for row in slices(base.num_rows, rows):
        z_base, z_rl = fill_rows(base, row, base_block), fill_rows(rl, row, rl_block)
        for part in slices(z_base.shape[0], rows_in_cache(base)):
            here = slice(row.start + part.start, row.start + part.stop)
            found = shift_of_rows(z_base[part], z_rl[part], top_k)
            for field, values in zip(shift, found, strict=True):
                field[here] = values
    dtype = torch.promote_types(base.dtype, rl.dtype)
    return TokenShift(*(x.to(dtype) if x.is_floating_point() else x for x in shift))
