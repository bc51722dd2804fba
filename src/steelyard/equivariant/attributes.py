r"""What a kernel may know of a pair of points with directions, and which pairs it sees.

A kernel that depends only on rigid-motion invariants of a pair gives an equivariant layer. Three
invariants are the published choice in space; a fourth completes the set.

Sources: Bekkers et al. (2024), arXiv:2310.02970; Bellaard, Smets, Duits (2025), arXiv:2504.03299;
Gasteiger et al. (2020), Directional Message Passing for Molecular Graphs, arXiv:2003.03123.
"""

from typing import Literal

import torch
from torch import Tensor

from steelyard._checks import (
    check_choice,
    check_count,
    check_floating,
    check_integer_dtype,
    check_not_empty,
    check_range,
    check_same_shape,
    check_shape,
)
from steelyard._reduce import accumulation_dtype

__all__ = ["invariant_attributes", "polynomial_cutoff", "polynomial_features", "radius_graph"]

Invariants = Literal["paper", "complete"]
# Distances computed at once by radius_graph: 32 MB in double precision.
DISTANCES_AT_ONCE = 2**22


def invariant_attributes(
    pos: Tensor,
    ori: Tensor,
    edge_index: Tensor,
    *,
    invariants: Invariants = "paper",
    eps: float = 0.0,
) -> Tensor:
    r"""Invariants of pairs of (position, direction) under rotations and translations.

    With :math:`w = x_s - x_r` for sender ``s`` and receiver ``r``, in space

    .. math:: a = \left(w \cdot o_r,\ \lVert w - (w \cdot o_r) o_r \rVert,\ o_s \cdot o_r\right)

    and :math:`w \cdot o_s` as the fourth with ``"complete"``: two pairs have the same four numbers
    if and only if a rotation or reflection and a translation carry one onto the other. In the plane

    .. math:: a = \left(R(o_r)^\top w,\ o_s \cdot o_r\right)

    where :math:`R(o)` turns the first axis onto ``o``; ``"complete"`` adds the sine of the angle
    from :math:`o_r` to :math:`o_s`, which tells the two senses of turning apart.

    Args:
        pos: positions, ``[P, n]``, ``n`` = 2 or 3.
        ori: unit vectors, ``[P, n]``.
        edge_index: integers in ``[0, P)``, ``[2, E]``, senders in row 0, receivers in row 1.
        invariants: ``"paper"`` (three) or ``"complete"`` (four).
        eps: added to the square under the root. With 0 the norm is exact and its gradient is 0
            where ``w`` is parallel to the direction; second derivatives grow like one over the
            norm there, and are bounded by ``1 / sqrt(eps)`` with a positive ``eps``.

    Returns:
        ``[E, 3]`` or ``[E, 4]``; ``E = 0`` is allowed.

    Raises:
        ValueError: wrong shapes, ``n`` not 2 or 3, or an edge out of range.
        TypeError: wrong dtypes.

    Example:
        A turn by a right angle of all positions and directions changes nothing:

        >>> import torch
        >>> pos, ori = torch.tensor([[0.0, 0, 0], [3.0, 0, 4]]), torch.eye(3)[[2, 0]]
        >>> edge = torch.tensor([[1], [0]])
        >>> invariant_attributes(pos, ori, edge, invariants="complete")
        tensor([[4., 3., 0., 3.]])
        >>> turn = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
        >>> invariant_attributes(pos @ turn.T, ori @ turn.T, edge, invariants="complete")
        tensor([[4., 3., 0., 3.]])

    Source: Bekkers et al. (2024), Theorem 1 (cosine for the angle, as in its
    code), arXiv:2310.02970; the fourth: Bellaard et al. (2025), arXiv:2504.03299.
    """
    check_points(pos)
    check_same_shape(pos=pos, ori=ori)
    check_floating(ori=ori)
    check_choice("invariants", invariants, ("paper", "complete"))
    check_range("eps", eps, at_least=0.0)
    check_edge_index(edge_index, pos.shape[0])
    send, receive = edge_index
    w, sender, receiver = pos[send] - pos[receive], ori[send], ori[receive]
    spatial = spatial_attributes(w, receiver, eps=eps)
    parts = [spatial, fiber_attributes(sender, receiver, invariants=invariants)]
    if invariants == "complete" and pos.shape[1] == 3:
        parts.append((w * sender).sum(-1, keepdim=True))
    return torch.cat(parts, dim=-1)


def spatial_attributes(w: Tensor, o: Tensor, *, eps: float) -> Tensor:
    """Return ``w`` along ``o`` and across it (a length in space, signed in the plane)."""
    along = (w * o).sum(-1, keepdim=True)
    if w.shape[-1] == 2:
        across = w[..., 1:] * o[..., :1] - w[..., :1] * o[..., 1:]
    else:
        across = safe_norm(w - along * o, eps=eps)
    return torch.cat((along, across), dim=-1)


def fiber_attributes(sender: Tensor, receiver: Tensor, *, invariants: Invariants) -> Tensor:
    """Return the cosine between directions, and in the plane the sine for ``"complete"``."""
    cosine = (sender * receiver).sum(-1, keepdim=True)
    if invariants == "paper" or sender.shape[-1] == 3:
        return cosine
    sine = receiver[..., :1] * sender[..., 1:] - receiver[..., 1:] * sender[..., :1]
    return torch.cat((cosine, sine), dim=-1)


def safe_norm(w: Tensor, *, eps: float) -> Tensor:
    """Euclidean length over the last dimension, ``[.., 1]``, with gradient 0 at 0."""
    squared = w.square().sum(-1, keepdim=True)
    if eps > 0:
        return (squared + eps).sqrt()
    return torch.where(squared > 0, torch.where(squared > 0, squared, 1.0).sqrt(), 0.0)


def polynomial_cutoff(r: Tensor, r_max: float, p: int = 6) -> Tensor:
    r"""Fall from 1 at distance 0 to 0 at ``r_max``, with two smooth derivatives there.

    .. math::
        1 - \tfrac{(p+1)(p+2)}{2} u^p + p(p+2) u^{p+1} - \tfrac{p(p+1)}{2} u^{p+2},
        \qquad u = r / r_{\max} < 1

    and 0 from ``r_max`` on.

    Args:
        r: distances >= 0, any shape.
        r_max: > 0.
        p: exponent, >= 1; the larger, the later the fall.

    Returns:
        In [0, 1], the shape and dtype of ``r``.

    Raises:
        ValueError: ``r_max`` or ``p`` out of range. TypeError: ``r`` not floating point.

    Example:
        >>> import torch
        >>> polynomial_cutoff(torch.tensor([0.0, 1.0, 2.0, 5.0]), 2.0, p=2)
        tensor([1.0000, 0.3125, 0.0000, 0.0000])

    Source: Gasteiger et al. (2020), arXiv:2003.03123.
    """
    check_floating(r=r)
    check_range("r_max", r_max, above=0.0)
    check_range("p", p, at_least=1)
    # Clamped before the powers: at a large distance they would overflow to inf - inf.
    u = (r.to(accumulation_dtype(r.dtype)) / r_max).clamp(max=1.0)
    bracket = (p + 1) * (p + 2) / 2 - p * (p + 2) * u + p * (p + 1) / 2 * u.square()
    return torch.where(u >= 1, 0.0, 1 - u**p * bracket).to(r.dtype)


def polynomial_features(x: Tensor, degree: int) -> Tensor:
    r"""All products of up to ``degree`` coordinates: :math:`x,\ x \otimes x,\ \dots`.

    Tensor powers in full: ``F + F^2 + .. + F^degree`` numbers.

    Args:
        x: ``[.., F]``.
        degree: >= 1.

    Returns:
        ``[.., F + .. + F^degree]``.

    Raises:
        ValueError: ``degree`` < 1 or a scalar ``x``. TypeError: ``x`` not floating point.

    Example:
        >>> import torch
        >>> polynomial_features(torch.tensor([2.0]), 3)
        tensor([2., 4., 8.])
        >>> polynomial_features(torch.tensor([2.0, 5.0]), 2)
        tensor([ 2.,  5.,  4., 10., 10., 25.])

    Source: code of Bekkers et al. (2024), arXiv:2310.02970.
    """
    check_floating(x=x)
    check_count("degree", degree)
    if x.dim() == 0:
        raise ValueError("x must have shape [.., F], got []")
    powers = [x]
    for _ in range(degree - 1):
        powers.append((powers[-1][..., :, None] * x[..., None, :]).flatten(-2))
    return torch.cat(powers, dim=-1)


def radius_graph(pos: Tensor, radius: float | None = None, batch: Tensor | None = None) -> Tensor:
    """Pairs of points of one cloud that are close, both ways, without self-loops.

    Distances are taken in blocks of rows, so that memory is bounded by a constant and the edges.

    Args:
        pos: ``[P, n]``; not differentiated.
        radius: largest distance, > 0; ``None`` = all pairs.
        batch: integer cloud of each point, ``[P]``; ``None`` = one cloud.

    Returns:
        ``edge_index``, ``[2, E]``, senders in row 0, receivers in row 1, sorted by receiver.

    Raises:
        ValueError: wrong shapes or ``radius`` <= 0. TypeError: wrong dtypes.

    Example:
        >>> import torch
        >>> radius_graph(torch.tensor([[0.0, 0.0], [1.0, 0.0], [9.0, 0.0]]), radius=2.0)
        tensor([[1, 0],
                [0, 1]])

    Source: the neighbourhoods of Bekkers et al. (2024), arXiv:2310.02970.
    """
    check_points(pos)
    check_batch(batch, pos)
    if radius is not None:
        check_range("radius", radius, above=0.0)
    points = pos.detach().to(accumulation_dtype(pos.dtype))
    if bool(points.isnan().any()):  # the list of edges waits for the device anyway
        raise ValueError(f"pos must hold no NaN, got {int(points.isnan().sum())}")
    index = torch.arange(len(points), device=pos.device)
    rows = max(1, DISTANCES_AT_ONCE // len(points))
    found = []
    for start in range(0, len(points), rows):
        receiver = index[start : start + rows]
        close = receiver[:, None] != index
        if batch is not None:
            close &= batch[receiver][:, None] == batch
        if radius is not None:
            mode = "donot_use_mm_for_euclid_dist"  # the product form loses digits far from 0
            close &= torch.cdist(points[receiver], points, compute_mode=mode) <= radius
        row, sender = close.nonzero(as_tuple=True)
        found.append(torch.stack((sender, receiver[row])))
    return torch.cat(found, dim=1)


def check_points(pos: Tensor) -> None:
    """Require positions ``[P, 2]`` or ``[P, 3]``."""
    check_floating(pos=pos)
    if pos.dim() != 2 or pos.shape[1] not in (2, 3):
        raise ValueError(f"pos must have shape [P, 2] or [P, 3], got {list(pos.shape)}")
    check_not_empty("pos", pos)


def check_batch(batch: Tensor | None, pos: Tensor) -> None:
    """Require one integer cloud for each point; ``None`` passes."""
    if batch is None:
        return
    check_shape("batch", batch, (pos.shape[0],))
    check_integer_dtype(batch=batch)


def check_edge_index(edge_index: Tensor, points: int) -> None:
    """Require integer pairs of existing points; compiled code trusts the values."""
    check_shape("edge_index", edge_index, (2, None))
    if edge_index.dtype not in (torch.int32, torch.int64):  # no others index a tensor
        raise TypeError(f"edge_index must have the dtype int32 or int64, got {edge_index.dtype}")
    if torch.compiler.is_compiling() or edge_index.numel() == 0:
        return
    low, high = (int(bound) for bound in edge_index.aminmax())
    if low < 0 or high >= points:
        raise ValueError(f"edge_index must lie in [0, {points}), got {low} to {high}")
