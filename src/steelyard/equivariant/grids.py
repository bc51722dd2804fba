r"""Grids of directions, and the way of vectors and matrices onto them and back.

A function on a grid of ``O`` unit vectors stands for a function on the circle or the sphere.
Rotations that permute the grid act on it exactly; the vertices of the Platonic solids have the
largest finite groups of them (60 rotations for the icosahedron and the dodecahedron).

Source: Bekkers et al. (2024), Fast, Expressive SE(n) Equivariant Networks through Weight-Sharing in
Position-Orientation Space, arXiv:2310.02970.
"""

import math
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from steelyard._checks import (
    check_choice,
    check_count,
    check_floating,
    check_not_empty,
    check_shape,
    check_tensor,
)

__all__ = ["lift_tensor", "lift_vector", "orientation_grid", "read_tensor", "read_vector"]

GOLDEN = (1 + math.sqrt(5)) / 2
SOLIDS = {4: "tetrahedron", 6: "octahedron", 8: "cube", 12: "icosahedron", 20: "dodecahedron"}
REPULSION_STEPS = 100
REPULSION_STEP_SIZE = 0.1


def orientation_grid(
    count: int,
    *,
    dim: int = 3,
    kind: str | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    r"""Unit vectors spread over the circle or the sphere.

    In the plane, angles :math:`2 \pi k / O` from 0. In space, the vertices of a Platonic solid, or
    points that repel each other:

    .. math:: \min_{o_1, \dots, o_O} \sum_{a < b} \lVert o_a - o_b \rVert^{-2}

    by 100 gradient steps of size 0.1, halved while a step would raise the energy. They start on a
    golden spiral, so that two calls give one grid; with a ``generator`` they start at random.

    Args:
        count: number of directions ``O``, >= 1.
        dim: 2 or 3.
        kind: ``"uniform"`` in the plane; ``"tetrahedron"`` (4), ``"octahedron"`` (6), ``"cube"``
            (8), ``"icosahedron"`` (12), ``"dodecahedron"`` (20) or ``"repelled"`` (any number) in
            space. ``None`` = the solid with that many vertices, else ``"repelled"``.
        generator: start of the repelled points; ``None`` = the spiral.
        dtype: of the result. Double, so that a model in any precision rounds the grid once;
            the functions of this module cast it to what they meet.

    Returns:
        ``[O, dim]``.

    Raises:
        ValueError: ``count`` < 1, ``dim`` not 2 or 3, a kind of the other dimension, or a solid
            that has not ``count`` vertices.

    Example:
        The vertices of an icosahedron average every direction alike:

        >>> grid = orientation_grid(12)
        >>> (grid.T @ grid / 12 * 3).round(decimals=6).abs()
        tensor([[1., 0., 0.],
                [0., 1., 0.],
                [0., 0., 1.]], dtype=torch.float64)

    Source: Bekkers et al. (2024), arXiv:2310.02970; the solids and the
    fixed start are ours.
    """
    check_count("count", count)
    check_choice("dim", dim, (2, 3))
    if dim == 2:
        if isinstance(kind, Tensor) or kind not in (None, "uniform"):
            raise ValueError(f"kind must be one of None, 'uniform' for dim = 2, got {kind!r}")
        angle = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
        return torch.stack((angle.cos(), angle.sin()), dim=-1).to(dtype)
    check_choice("kind", kind, (None, "repelled", *SOLIDS.values()))
    kind = SOLIDS.get(count, "repelled") if kind is None else kind
    if kind == "repelled":
        return _repelled(count, generator).to(dtype)
    if SOLIDS.get(count) != kind:
        vertices = next(number for number, name in SOLIDS.items() if name == kind)
        raise ValueError(f"count must be {vertices} for kind {kind!r}, got {count}")
    points = torch.tensor(_solid(kind), dtype=torch.float64)
    return functional.normalize(points, dim=-1).to(dtype)


def lift_vector(v: Tensor, grid: Tensor) -> Tensor:
    r"""Turn a vector into a function of the direction: :math:`c(o) = v \cdot o`.

    Args:
        v: ``[.., n]``.
        grid: unit vectors, ``[O, n]``; cast to the dtype of ``v``.

    Returns:
        ``[.., O]``.

    Raises:
        ValueError: shapes that do not fit. TypeError: not floating point.

    Example:
        >>> import torch
        >>> lift_vector(torch.tensor([2.0, 0.0]), orientation_grid(4, dim=2)).round().abs()
        tensor([2., 0., 2., 0.])

    Source: Bekkers et al. (2024), arXiv:2310.02970.
    """
    check_tensor("grid", grid)
    check_shape("grid", grid, (None, None))
    _check_on_grid("v", v, grid, (grid.shape[-1],))
    return torch.einsum("...n,on->...o", v, grid.to(v.dtype))


def lift_tensor(A: Tensor, grid: Tensor) -> Tensor:
    r"""Turn a matrix into a function of the direction: :math:`c(o) = o^\top A o`.

    Only the symmetric part of ``A`` is seen.

    Args:
        A: ``[.., n, n]``.
        grid: unit vectors, ``[O, n]``; cast to the dtype of ``A``.

    Returns:
        ``[.., O]``.

    Raises:
        ValueError: shapes that do not fit. TypeError: not floating point.

    Example:
        >>> import torch
        >>> lift_tensor(torch.eye(3), orientation_grid(6))
        tensor([1., 1., 1., 1., 1., 1.])

    Source: derived, as :func:`lift_vector`.
    """
    check_tensor("grid", grid)
    check_shape("grid", grid, (None, None))
    _check_on_grid("A", A, grid, (grid.shape[-1],) * 2)
    directions = grid.to(A.dtype)
    return torch.einsum("om,...mn,on->...o", directions, A, directions)


def read_vector(c: Tensor, grid: Tensor) -> Tensor:
    r"""Average the directions with weights: :math:`v = \frac1O \sum_o c(o)\, o`.

    A vector that was lifted comes back as :math:`v / n` if :math:`\frac1O \sum o o^\top = I / n`,
    which holds on every Platonic solid and on three or more uniform angles.

    Args:
        c: ``[.., O]``.
        grid: unit vectors, ``[O, n]``; cast to the dtype of ``c``.

    Returns:
        ``[.., n]``.

    Raises:
        ValueError: shapes that do not fit. TypeError: not floating point.

    Example:
        >>> import torch
        >>> grid = orientation_grid(12)
        >>> 3 * read_vector(lift_vector(torch.tensor([1.0, 2.0, 4.0]), grid), grid)
        tensor([1.0000, 2.0000, 4.0000])

    Source: Bekkers et al. (2024), arXiv:2310.02970.
    """
    check_shape("grid", grid, (None, None))
    _check_on_grid("c", c, grid, (grid.shape[0],))
    return torch.einsum("...o,on->...n", c, grid.to(c.dtype)) / grid.shape[0]


def read_tensor(c: Tensor, grid: Tensor) -> Tensor:
    r"""Average the outer products of the directions: :math:`T = \frac1O \sum_o c(o)\, o o^\top`.

    A symmetric matrix that was lifted comes back as :math:`(2 A + \mathrm{tr}(A) I) / 15` on a
    grid in space that integrates polynomials of degree 4 (icosahedron, dodecahedron).

    Args:
        c: ``[.., O]``.
        grid: unit vectors, ``[O, n]``; cast to the dtype of ``c``.

    Returns:
        ``[.., n, n]``, symmetric.

    Raises:
        ValueError: shapes that do not fit. TypeError: not floating point.

    Example:
        >>> import torch
        >>> grid = orientation_grid(12)
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 6.0]))
        >>> (15 * read_tensor(lift_tensor(A, grid), grid) - A.trace() * torch.eye(3)).diagonal()
        tensor([ 2.0000,  4.0000, 12.0000])

    Source: derived, as :func:`read_vector`.
    """
    check_shape("grid", grid, (None, None))
    _check_on_grid("c", c, grid, (grid.shape[0],))
    directions = grid.to(c.dtype)
    return torch.einsum("...o,om,on->...mn", c, directions, directions) / grid.shape[0]


def _check_on_grid(name: str, values: Tensor, grid: Tensor, ending: tuple[int, ...]) -> None:
    check_floating(**{name: values}, grid=grid)
    if grid.dim() != 2 or grid.shape[1] not in (2, 3):
        raise ValueError(f"grid must have shape [O, 2] or [O, 3], got {list(grid.shape)}")
    check_not_empty("grid", grid)
    if values.shape[-len(ending) :] != ending:
        wanted = ", ".join(map(str, ending))
        raise ValueError(f"{name} must have shape [.., {wanted}], got {list(values.shape)}")


def _solid(kind: str) -> list[tuple[float, float, float]]:
    """Vertices before normalisation. Icosahedron and dodecahedron share their 60 rotations."""
    signs = (1.0, -1.0)
    corners = [(x, y, z) for x, y, z in product(signs, repeat=3)]
    if kind == "octahedron":
        axes = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
        return [(s * x, s * y, s * z) for x, y, z in axes for s in signs]
    if kind == "cube":
        return corners
    if kind == "tetrahedron":
        return [corner for corner in corners if math.prod(corner) > 0]
    if kind == "icosahedron":
        return _cyclic(1.0, GOLDEN)
    return corners + _cyclic(GOLDEN, 1 / GOLDEN)


def _cyclic(a: float, b: float) -> list[tuple[float, float, float]]:
    """Return the cyclic permutations of (0, +-a, +-b)."""
    signed = [(s * a, t * b) for s in (1.0, -1.0) for t in (1.0, -1.0)]
    rolled = (((0.0, x, y), (y, 0.0, x), (x, y, 0.0)) for x, y in signed)
    return [point for points in rolled for point in points]


def _repelled(count: int, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        points = _golden_spiral(count)
    else:
        points = torch.randn(
            count, 3, dtype=torch.float64, generator=generator, device=generator.device
        ).cpu()
        points = points / points.norm(dim=-1, keepdim=True)
    size, (energy, gradient) = REPULSION_STEP_SIZE, _repulsion(points)
    for _ in range(REPULSION_STEPS):
        # One of two points that nearly coincide would be thrown across the sphere by a full step.
        moved = points - size * gradient
        moved = moved / moved.norm(dim=-1, keepdim=True)
        moved_energy, moved_gradient = _repulsion(moved)
        if moved_energy <= energy:
            points, energy, gradient = moved, moved_energy, moved_gradient
        else:
            size /= 2
    return points


def _golden_spiral(count: int) -> Tensor:
    index = torch.arange(count, dtype=torch.float64)
    height = 1 - (2 * index + 1) / count
    angle = index * (2 * math.pi / GOLDEN)
    radius = (1 - height.square()).sqrt()
    return torch.stack((radius * angle.cos(), radius * angle.sin(), height), dim=-1)


def _repulsion(points: Tensor) -> tuple[Tensor, Tensor]:
    """Energy of points on the sphere and the part of its gradient along the sphere."""
    difference = points[:, None] - points[None]
    squared = difference.square().sum(-1).fill_diagonal_(math.inf)
    gradient = -2 * (difference / squared.square()[..., None]).sum(1)
    gradient = gradient - (gradient * points).sum(-1, keepdim=True) * points
    return squared.reciprocal().sum() / 2, gradient
