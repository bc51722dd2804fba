"""Sums over all pairs of items, block by block: O(N * block) memory, forward and backward.

A term maps the first item of a block to sums over the pairs (block row, item from that row on);
each unordered pair of different items is seen once, so that no distance is computed twice.
The backward pass recomputes one block at a time.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

Term = Callable[..., tuple[Tensor, ...]]


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances of ``x [M, D]`` to ``y [N, D]``, shape ``[M, N]``; no product trick."""
    if x.shape[1] == 1:
        return (x - y.T).abs()
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def pair_sums(x: Tensor, y: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``sum_ij a_ij b_ij``, ``sum_j a_ij [N]`` and ``sum_j b_ij [N]`` in float64."""
    product, x_rows, y_rows = _block_sum(partial(_pair_term, block), block, x, y)
    return product, x_rows, y_rows


def row_sums(x: Tensor, block: int) -> Tensor:
    """Return ``sum_j a_ij``, shape ``[N]``, in float64."""
    (rows,) = _block_sum(partial(_row_term, block), block, x)
    return rows


def joint_sum(
    xs: Sequence[Tensor], rows: Sequence[Tensor], *, c: float, unbiased: bool, block: int
) -> Tensor:
    """Return ``sum_ij (prod_k (U_k + c) - c^d)`` in float64.

    Args:
        xs: ``d`` variables ``[N, D_k]``.
        rows: their distance sums ``[N]``.
        c: offset.
        unbiased: U-centred distances, or doubly centred ones.
        block: rows at once.
    """
    term = partial(_joint_term, block, c, unbiased)
    (total,) = _block_sum(term, block, *xs, *rows)
    return total


def _block_sum(term: Term, block: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    sums: tuple[Tensor, ...] = _BlockSum.apply(term, block, *tensors)  # type: ignore[no-untyped-call]
    return sums


class _BlockSum(torch.autograd.Function):
    @staticmethod
    def forward(term: Term, block: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        starts = range(0, tensors[0].shape[0], block)
        totals = term(0, *tensors)
        for start in starts[1:]:
            totals = tuple(t + s for t, s in zip(totals, term(start, *tensors), strict=True))
        return totals

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.term, ctx.block, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted, tensors = ctx.needs_input_grad[2:], ctx.saved_tensors
        leaves = [t for t, want in zip(tensors, wanted, strict=True) if want]

        def sums(start: int, *leaves: Tensor) -> tuple[Tensor, ...]:
            given = iter(leaves)
            pairs = zip(tensors, wanted, strict=True)
            found: tuple[Tensor, ...] = ctx.term(
                start, *(next(given) if want else t for t, want in pairs)
            )
            return found

        totals = [torch.zeros_like(t) for t in leaves]
        for start in range(0, tensors[0].shape[0], ctx.block):
            pull_back = torch.func.vjp(partial(sums, start), *leaves)[1]
            totals = [t + part for t, part in zip(totals, pull_back(grads), strict=True)]
        found = iter(totals)
        return (None, None, *(next(found) if want else None for want in wanted))


def _pair_term(block: int, start: int, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    a, b = (distances(t[start : start + block], t[start:]) for t in (x, y))
    return _once_and_twice(a * b), _rows_of(a, start), _rows_of(b, start)


def _row_term(block: int, start: int, x: Tensor) -> tuple[Tensor, ...]:
    return (_rows_of(distances(x[start : start + block], x[start:]), start),)


def _joint_term(
    block: int, c: float, unbiased: bool, start: int, *tensors: Tensor
) -> tuple[Tensor, ...]:
    d, n = len(tensors) // 2, tensors[0].shape[0]
    one, two = (n - 2, (n - 1) * (n - 2)) if unbiased else (n, n * n)
    product: Tensor | float = 1.0
    for x, row in zip(tensors[:d], tensors[d:], strict=True):
        a = distances(x[start : start + block], x[start:])
        mean = (row / one - row.sum() / (2 * two)).to(a.dtype)
        centred = mean[start : start + block, None] + mean[start:] - a
        if unbiased:
            diagonal = torch.eye(*a.shape, dtype=torch.bool, device=a.device)
            centred = centred.masked_fill(diagonal, 0.0)
        product = product * (centred + c)
    return (_once_and_twice(torch.as_tensor(product) - math.pow(c, d)),)


def _once_and_twice(block: Tensor) -> Tensor:
    # the square of the block's own pairs holds both (i, j) and (j, i), the rest one of them
    own = block.shape[0]
    return block[:, :own].sum(dtype=torch.float64) + 2 * block[:, own:].sum(dtype=torch.float64)


def _rows_of(a: Tensor, start: int) -> Tensor:
    # the block gives its own rows in full from here on, and later rows their part of its columns
    own = a.shape[0]
    rows, later = a.sum(1, dtype=torch.float64), a[:, own:].sum(0, dtype=torch.float64)
    return pad(torch.cat([rows, later]), (start, 0))
