r"""Projection of an update onto the sphere's tangent space, and the test for scale invariance.

A weight whose length the network does not feel, since a normalisation follows, moves on a sphere.
Its gradient is tangent to that sphere, its momentum is not, and the radial part of the update only
lengthens the weight and so shortens every later step.

Source: Heo et al. (2021), AdamP: Slowing Down the Slowdown for Momentum Optimizers on
Scale-invariant Weights, arXiv:2006.08217.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from steelyard._checks import check_choice, check_floating, check_not_empty, check_same_shape

View = Literal["channel", "layer"]
VIEWS: tuple[View, ...] = ("channel", "layer")
NORM_FLOOR = 1e-8
_FEW_ROWS = 8  # usually enough to tell that a gradient is not tangent
_CACHED = 2**18  # elements: what a block of rows may have to stay in cache


def tangent_project(update: Tensor, weight: Tensor, view: View = "channel") -> Tensor:
    r"""Remove from an update its component along the weight.

    .. math:: \Pi_w(x) = x - (\hat w \cdot x)\, \hat w , \qquad \hat w = w / \|w\|

    for each row of the view. A row of zeros has no direction, and leaves its update as it is.

    Args:
        update: the update ``x``, any shape.
        weight: the weight ``w``, of the same shape.
        view: ``"channel"`` takes ``weight[i]`` as one vector for each ``i``, ``"layer"`` the whole
            tensor as one vector.

    Returns:
        The projected update, in the shape and dtype of ``update``; differentiable in both.

    Raises:
        ValueError: the shapes differ, a tensor is empty, or the view is unknown.
        TypeError: a tensor is not floating.

    Example:
        >>> weight = torch.tensor([[3.0, 4.0]])
        >>> tangent_project(torch.tensor([[3.0, 4.0]]), weight)  # purely radial
        tensor([[0., 0.]])
        >>> tangent_project(torch.tensor([[-4.0, 3.0]]), weight)  # purely tangent
        tensor([[-4.,  3.]])

    Source: arXiv:2006.08217, the projection of the algorithms AdamP and SGDP.
    """
    check_choice("view", view, VIEWS)
    check_floating(update=update, weight=weight)
    check_same_shape(update=update, weight=weight)
    check_not_empty("update", update)
    rows, along = as_rows(weight, view), as_rows(update, view)
    wide = torch.promote_types(rows.dtype, torch.float32)
    rows, along = rows.to(wide), along.to(wide)
    squared = rows.square().sum(1, keepdim=True)
    share = (rows * along).sum(1, keepdim=True) / squared.where(squared > 0, 1.0)
    return (along - share * rows).reshape(update.shape).to(update.dtype)


def scale_invariance_score(weight: Tensor, grad: Tensor, view: View = "channel") -> Tensor:
    r"""Measure how far a gradient is from tangent, in units of what chance would give.

    .. math:: \max_i |\cos(w_i, g_i)| \sqrt{D}

    over the rows of the view, of length ``D``. Two random directions have an expected ``|cos|`` of
    about :math:`0.8 / \sqrt D`, so the score of a weight that is not scale-invariant is about 1 or
    more, and rounding alone keeps it from 0 otherwise. The optimisers project a tensor when its
    score is below ``delta``.

    Args:
        weight: any shape.
        grad: its raw gradient (not the momentum), of the same shape.
        view: as in :func:`tangent_project`.

    Returns:
        The score, 0-d. Rows whose gradient or weight is zero count as tangent.

    Raises:
        ValueError: the shapes differ, a tensor is empty, or the view is unknown.
        TypeError: a tensor is not floating.

    Example:
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> tangent = torch.tensor([[0.0, 5.0], [1.0, 0.0]])
        >>> scale_invariance_score(weight, tangent)
        tensor(0.)
        >>> scale_invariance_score(weight, weight)
        tensor(1.4142)

    Source: arXiv:2006.08217, the condition of the algorithms AdamP and SGDP (as coded: a cosine
    against ``delta / sqrt(dim)``, the largest over rows).
    """
    check_choice("view", view, VIEWS)
    check_floating(weight=weight, grad=grad)
    check_same_shape(weight=weight, grad=grad)
    check_not_empty("weight", weight)
    rows, slopes = as_rows(weight, view), as_rows(grad, view)
    wide = torch.promote_types(rows.dtype, torch.float32)
    rows, slopes = rows.to(wide), slopes.to(wide)
    lengths = (rows.norm(dim=1).clamp_min(NORM_FLOOR), slopes.norm(dim=1).clamp_min(NORM_FLOOR))
    cosine = (rows * slopes).sum(1).abs() / lengths[0] / lengths[1]
    score: Tensor = cosine.max() * math.sqrt(rows.shape[1])
    return score


def as_rows(tensor: Tensor, view: View = "channel") -> Tensor:
    """Return the tensor as rows that are one weight vector each; a view whenever there is one."""
    if view == "channel" and tensor.dim() == 2:
        return tensor
    if view == "layer" or tensor.dim() == 0:
        return tensor.reshape(1, -1)
    return tensor.reshape(tensor.shape[0], -1)


def radial_coefficients(
    weight: Tensor, grad: Tensor, update: Tensor, *, delta: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Decide whether a tensor is projected, and how much of each row the projection takes away.

    Both views follow from the same four inner products of each row, so trying the second costs
    nothing, and the choice needs no synchronisation with the host.

    Args:
        weight: rows ``[R, D]``, float32 or wider.
        grad: raw gradient ``[R, D]``.
        update: update ``[R, D]``.
        delta: threshold of the score.
        eps: floor of the norms.

    Returns:
        Coefficients ``[R, 1]``, to be used as ``update - coefficients * weight`` (0 where neither
        view passes), and whether a view passed, 0-d.
    """
    row_length = weight.shape[1]
    ww, gg = row_dot(weight, weight), row_dot(grad, grad)
    wg, wu = row_dot(weight, grad), row_dot(weight, update)
    channel = _score(wg, ww, gg, eps).max() * math.sqrt(row_length) < delta
    all_wg, all_ww, all_gg, all_wu = (each.sum(0, keepdim=True) for each in (wg, ww, gg, wu))
    layer = _score(all_wg, all_ww, all_gg, eps).max() * math.sqrt(weight.numel()) < delta
    by_row = wu / (ww.sqrt() + eps).square()
    by_layer = (all_wu / (all_ww.sqrt() + eps).square()).expand_as(by_row)
    taken = torch.where(channel, by_row, torch.where(layer, by_layer, torch.zeros_like(by_row)))
    return taken.unsqueeze(1), channel | layer


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of the rows of two matrices, ``[R]``, without a product matrix in memory."""
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).reshape(-1)


class Radial(NamedTuple):
    """That a tensor is to be projected, by which view, and its lengths."""

    view: View
    lengths: Tensor
    """Of the rows, ``[R]``; of the whole with ``"layer"``, ``[1]``."""

    def taken(self, weight: Tensor, update: Tensor, eps: float, products: Tensor) -> Tensor:
        """Return ``[R, 1]`` or ``[1]``: the projection is ``update - taken * weight``."""
        along = _dots_on_host(weight, update, products)
        if self.view == "channel":
            return (along / (self.lengths + eps).square()).unsqueeze(1)
        return along.sum() / (self.lengths + eps).square()


def product_size(row_length: int) -> int:
    """How many elements :func:`radial_on_host` needs for products of rows of this length."""
    return max(_CACHED, row_length)


def radial_on_host(
    weight: Tensor, grad: Tensor, products: Tensor, *, delta: float, eps: float
) -> Radial | None:
    """Decide as :func:`radial_coefficients` does, with passes that are quick on a processor.

    Needs no update yet: where neither view passes, the step can be a plain one.

    Args:
        weight: rows ``[R, D]``, float32 or wider.
        grad: raw gradient ``[R, D]``.
        products: memory of ``product_size(D)`` elements to write to: fresh memory costs more than
            the arithmetic.
        delta: threshold of the score.
        eps: floor of the norms.

    Returns:
        The view that passes, ``None`` if neither does.
    """
    few, bound = slice(0, _FEW_ROWS), delta / math.sqrt(weight.shape[1])
    if _largest_cosine(weight[few], grad[few], products, eps)[0] < bound:  # else all would fail
        largest, lengths = _largest_cosine(weight, grad, products, eps)
        if largest < bound:
            return Radial("channel", lengths)
    ww, gg, wg = _whole_products(weight, grad)
    cosine = abs(wg) / (max(math.sqrt(ww), eps) * max(math.sqrt(gg), eps))
    if cosine < delta / math.sqrt(weight.numel()):
        return Radial("layer", torch.full((1,), math.sqrt(ww), dtype=weight.dtype))
    return None


def _largest_cosine(
    weight: Tensor, grad: Tensor, products: Tensor, eps: float
) -> tuple[float, Tensor]:
    """Largest absolute cosine of rows, and the lengths of the weight's."""
    along = _dots_on_host(weight, grad, products)
    lengths, slopes = (torch.linalg.vector_norm(rows, dim=1) for rows in (weight, grad))
    cosine = along.abs() / (lengths.clamp_min(eps) * slopes.clamp_min(eps))
    return float(cosine.max()), lengths


def _whole_products(weight: Tensor, grad: Tensor) -> tuple[float, ...]:
    """Inner products ``w w``, ``g g``, ``w g`` of whole tensors, a block at a time in cache."""
    totals = [0.0, 0.0, 0.0]
    size = max(1, _CACHED // weight.shape[1])
    for start in range(0, len(weight), size):
        w, g = (rows[start : start + size].view(-1) for rows in (weight, grad))
        parts = (torch.dot(w, w), torch.dot(g, g), torch.dot(w, g))
        totals = [total + float(part) for total, part in zip(totals, parts, strict=True)]
    return tuple(totals)


def _dots_on_host(a: Tensor, b: Tensor, products: Tensor) -> Tensor:
    """Inner products of rows, a few rows at a time, so that their products stay in cache."""
    rows, length = a.shape
    size = max(1, _CACHED // length)
    if rows <= size:
        return torch.mul(a, b, out=products[: a.numel()].view(rows, length)).sum(1)
    blocks = (slice(start, start + size) for start in range(0, rows, size))
    return torch.cat([_dots_on_host(a[block], b[block], products) for block in blocks])


def _score(wg: Tensor, ww: Tensor, gg: Tensor, eps: float) -> Tensor:
    return wg.abs() / (ww.sqrt().clamp_min(eps) * gg.sqrt().clamp_min(eps))
