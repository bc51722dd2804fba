r"""Sums over pairs of two scalar samples in O(N log N) time and O(N) memory, ties exact.

With ``T_ij = sign(x_i - x_j) sign(y_i - y_j)`` the sum of products of distances is a bilinear form,

.. math::
    \sum_{ij} |x_i - x_j|\,|y_i - y_j| = \sum_{ij} T_{ij} (x_i - x_j)(y_i - y_j) = 2\, x^\top L\, y,
    \qquad (L v)_i = \sum_j T_{ij} (v_i - v_j),

and ``L`` is symmetric. So one linear operator gives the value (``x . L y``), the gradient in ``x``
(``2 L y``), the gradient in ``y`` (``2 L x``) and, being its own adjoint, every further derivative.

``T`` is 1 but for discordant pairs (-1) and ties (0). Discordant pairs are summed level by level
down the bits of the ranks, as in a merge sort read backwards: each level is a few cumulative sums
and one stable partition over contiguous rows, with sequential memory access.

Source: the ordering idea is of Huo and Szekely (2016), arXiv:1410.1503; operator form derived here.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Rows of at most this many items are finished pair by pair.
_LEAF = 32
# From this many items on a level runs tile by tile, in cache.
_TILE = 2**15


class Sorted(NamedTuple):
    """A sort of a sample: item by place, the places ``first <= .. < end`` of its ties, any ties."""

    items: Tensor
    first: Tensor
    end: Tensor
    tied: bool


class SortedPair(NamedTuple):
    """Sorts of two samples; ``rank[k]`` is the place by ``y`` of the item at place ``k`` by ``x``.

    Ties in one sample are ordered by the other, so that a tied pair never looks discordant.
    """

    by_x: Sorted
    by_y: Sorted
    rank: Tensor
    both_first: Tensor


def sort_with_ties(x: Tensor) -> Sorted:
    """Sort ``x [N]``; nothing is differentiated."""
    values, index = x.detach().sort(stable=True)
    change = values[1:] != values[:-1]
    if not torch.compiler.is_compiling() and bool(change.all()):
        place = torch.arange(x.shape[0], device=x.device)
        return Sorted(index, place, place + 1, tied=False)
    return Sorted(index, *_tie_bounds(change), tied=True)


def sort_pair(x: Tensor, y: Tensor) -> SortedPair:
    """Sort two samples ``[N]``; nothing is differentiated."""
    x, y = x.detach(), y.detach()
    by_x, by_y = sort_with_ties(x), sort_with_ties(y)
    if by_y.tied:
        by_y = by_y._replace(items=_sort_again(y, by_x.items))
    if by_x.tied:
        by_x = by_x._replace(items=_sort_again(x, by_y.items))
    place = torch.arange(x.shape[0], device=x.device)
    rank = torch.empty_like(place).scatter_(0, by_y.items, place).gather(0, by_x.items)
    both_first = place
    if by_x.tied and by_y.tied:
        both = torch.stack([by_x.first, by_y.first.gather(0, rank)])
        both_first, _ = _tie_bounds((both[:, 1:] != both[:, :-1]).any(0))
    return SortedPair(by_x, by_y, rank, both_first)


def signed_count(order: Sorted) -> Tensor:
    """Return ``#{j: x_j < x_i} - #{j: x_j > x_i}`` by place, shape ``[N]``."""
    return order.first + order.end - order.items.shape[0]


def distance_sums(x: Tensor, order: Sorted) -> Tensor:
    """Return ``sum_j |x_i - x_j|``, shape ``[N]``, differentiable with ``sign(0) = 0``."""
    values = x.gather(0, order.items)
    below = torch.nn.functional.pad(values.cumsum(0), (1, 0))
    smaller, larger = below.gather(0, order.first), below[-1] - below.gather(0, order.end)
    sums = signed_count(order) * values - smaller + larger
    return torch.zeros_like(sums).scatter(0, order.items, sums)


def distance_product(x: Tensor, y: Tensor, pair: SortedPair) -> Tensor:
    """Return ``sum_ij |x_i - x_j| |y_i - y_j|`` of ``x [N]`` and ``y [N]``, 0-d."""
    if y.requires_grad and not x.requires_grad:
        x, y = y, x  # the operator acts on the constant side: the gradient then costs nothing
    slope: Tensor = _Concordance.apply(y, pair)  # type: ignore[no-untyped-call]
    return 2 * (x * slope).sum()


class _Concordance(torch.autograd.Function):
    """The symmetric operator ``L`` above."""

    @staticmethod
    def forward(v: Tensor, pair: SortedPair) -> Tensor:
        by_x, by_y = pair.by_x, pair.by_y
        v_by_x = v.gather(0, by_x.items)
        lost = 2 * _discordant_differences(v_by_x, pair.rank)
        if by_y.tied:
            lost = lost + _tied_differences(v.gather(0, by_y.items), by_y.first)
        result = v.shape[0] * v - v.sum() - torch.empty_like(v).scatter_(0, by_y.items, lost)
        if not by_x.tied:
            return result
        lost = _tied_differences(v_by_x, by_x.first)
        if by_y.tied:
            lost = lost - _tied_differences(v_by_x, pair.both_first)
        return result.scatter_add(0, by_x.items, -lost)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, SortedPair], output: Tensor) -> None:
        ctx.pair = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Concordance.apply(grad, ctx.pair), None  # type: ignore[no-untyped-call]


def _sort_again(x: Tensor, index: Tensor) -> Tensor:
    # the order of x with its ties in the order of ``index``
    return index.gather(0, x.gather(0, index).argsort(stable=True))


def _tie_bounds(change: Tensor) -> tuple[Tensor, Tensor]:
    # change [N-1]: whether an item differs from the one before it
    group = torch.nn.functional.pad(change.long(), (1, 0)).cumsum(0)
    counts = torch.zeros_like(group).scatter_add(0, group, torch.ones_like(group))
    end = counts.cumsum(0).gather(0, group)
    return end - counts.gather(0, group), end


def _tied_differences(v: Tensor, first: Tensor) -> Tensor:
    # sum of v_i - v_j over the ties j of i, by place; exactly 0 for an item without ties
    zeros = torch.zeros_like(v)
    total = zeros.scatter_add(0, first, v)
    count = zeros.scatter_add(0, first, torch.ones_like(v))
    return count.gather(0, first) * v - total.gather(0, first)


def _discordant_differences(v: Tensor, rank: Tensor) -> Tensor:
    """Sum ``v_i - v_j`` over the pairs that ``rank`` inverts.

    Args:
        v: shape ``[N]``, in the order of ``x``.
        rank: a permutation of ``0 .. N - 1``: the place of each item in the order of ``y``.

    Returns:
        Shape ``[N]``, in the order of ``y``.
    """
    n = v.shape[0]
    depth = max(0, math.ceil(math.log2(max(n, 1) / _LEAF)))
    size = -(-n // 2**depth) * 2**depth
    padding = torch.arange(n, size, device=rank.device)  # last in both orders: never inverted
    rank = torch.cat([rank, padding]).int()[None]
    v = torch.nn.functional.pad(v, (0, size - n))[None]
    total = torch.zeros_like(v)
    while rank.shape[1] > _TILE:
        rank, v, total = _split(rank, v, total)
    rows = max(1, _TILE // rank.shape[1])
    tiles = zip(*(torch.split(t, rows) for t in (rank, v, total)), strict=True)
    return torch.cat([_finish(*tile) for tile in tiles])[:n]


def _finish(rank: Tensor, v: Tensor, total: Tensor) -> Tensor:
    # a tile goes down to the leaves while it is in cache
    while rank.shape[1] > _LEAF:
        rank, v, total = _split(rank, v, total)
    return _finish_rows(rank, v, total).reshape(-1)


def _split(rank: Tensor, v: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Part each row, all of ranks ``0 .. 2h - 1`` in the order of ``x``, into low and high ranks.

    A low item is inverted with the high ones before it, a high one with the low ones after it. The
    sum over the *other* half before an item is that over both halves, taken before the partition,
    minus that over its own, taken after it.
    """
    half = rank.shape[1] // 2
    place = torch.arange(2 * half, device=rank.device)
    steps = place.to(v.dtype)
    high = rank >= half
    highs = high.cumsum(1)
    target = torch.where(high, highs + (half - 1), place - highs)

    def part(t: Tensor) -> Tensor:
        return torch.empty_like(t).scatter_(1, target, t).view(-1, 2, half)

    before = part((v * steps).sub_(v.cumsum(1)))
    rank, v, total = part(rank), part(v), part(total)
    own = v.cumsum(2)
    before.add_(own).addcmul_(v, steps[:half], value=-1)
    low, high = total.unbind(1)
    low += before[:, 0]
    high.sub_(before[:, 1]).add_(v[:, 1], alpha=half).sub_(own[:, 0, -1:])
    rank[:, 1] -= half
    return rank.view(-1, half), v.view(-1, half), total.view(-1, half)


def _finish_rows(rank: Tensor, v: Tensor, total: Tensor) -> Tensor:
    place = torch.arange(rank.shape[1], device=rank.device, dtype=rank.dtype)
    inverted = (rank[:, :, None] > rank[:, None, :]) ^ (place[:, None] > place)
    # the matrix is symmetric, and batched products are faster with the few rows at the left
    sides = torch.stack([torch.ones_like(v), v], 1)
    count, other = (sides @ inverted.to(v.dtype)).unbind(1)
    return total.scatter(1, rank.long(), total + count * v - other)
