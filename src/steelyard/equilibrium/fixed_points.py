"""Fixed points of a vector field, real or complex, by Newton's method and by relaxation.

Source: Laborieux and Zenke (2024), arXiv:2309.02214 (setting); the solvers are standard.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from steelyard._checks import (
    check_callable,
    check_count,
    check_not_empty,
    check_range,
    check_tensor,
)

Field = Callable[[Tensor], Tensor]

HALVINGS = 30
ROUNDING = 1024  # residuals of this many units in the last place cannot be told from zero


def relax(
    field: Field,
    start: Tensor,
    *,
    rate: float = 1.0,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
) -> Tensor:
    """Follow ``u <- u + rate * field(u)`` until it rests.

    Args:
        field: vector field, ``[.., n] -> [.., n]``, rows independent.
        start: first state ``[.., n]``.
        rate: step in (0, 1]; below 1 damps oscillations.
        tolerance: largest entry of the field at rest, above 0.
        max_iterations: at least 1.

    Returns:
        The state at rest, without gradient.

    Raises:
        RuntimeError: it does not come to rest; says how far it is.
        ValueError: an argument is out of range, ``start`` is not finite, or the field changes the
            shape.
        TypeError: ``start`` is neither floating nor complex.

    Example:
        >>> relax(lambda u: torch.cos(u) - u, torch.zeros(1, dtype=torch.float64), tolerance=1e-9)
        tensor([0.7391], dtype=torch.float64)

    Source: arXiv:2309.02214, free phase.
    """
    check_range("rate", rate, above=0.0, at_most=1.0)
    check_range("tolerance", tolerance, above=0.0)
    check_count("max_iterations", max_iterations)
    check_not_empty("start", start)
    _check_inexact("start", start)
    _check_finite("start", start)
    with torch.no_grad():
        u = start.detach()
        residual = u.new_tensor(float("inf")).abs()
        for _ in range(max_iterations):
            push = evaluate(field, u)
            residual = push.abs().max()
            if bool(residual <= tolerance):
                return u
            u = u + rate * push
    raise RuntimeError(
        f"no rest after {max_iterations} iterations: the field is still {residual.item():.2g} "
        f"(tolerance {tolerance:g}); a smaller rate damps oscillations"
    )


def fixed_point(
    field: Field, start: Tensor, *, tolerance: float = 1e-12, max_iterations: int = 100
) -> Tensor:
    r"""Solve ``field(u) = 0`` by Newton's method with step halving.

    .. math:: u \leftarrow u - t\, J(u)^{-1} F(u), \qquad t \in \{1, \tfrac12, \tfrac14, \dots\}

    with the largest ``t`` that lowers the residual. Complex states are solved in complex
    arithmetic, for holomorphic fields.

    Args:
        field: vector field ``F``, ``[.., n] -> [.., n]``, rows independent, of PyTorch operations
            that :func:`torch.func.jvp` and ``vmap`` follow.
        start: where to begin, ``[.., n]``, floating or complex.
        tolerance: largest residual entry allowed, above 0. In float32, and with large entries, the
            residual that rounding leaves is accepted.
        max_iterations: at least 1.

    Returns:
        The fixed point ``u`` ``[.., n]``, without gradient.

    Raises:
        RuntimeError: no convergence, with the residual.
        ValueError: ``start`` is empty, 0-d or not finite, or the field changes the shape.
        TypeError: ``start`` is neither floating nor complex.

    Example:
        >>> u = fixed_point(lambda u: u**2 - 2, torch.ones(1, dtype=torch.float64))
        >>> f"{u.item():.12f}"
        '1.414213562373'

    Source: arXiv:2309.02214 (setting).
    """
    check_state("start", start)
    _check_finite("start", start)
    check_range("tolerance", tolerance, above=0.0)
    check_count("max_iterations", max_iterations)
    with torch.no_grad():
        u = start.detach().clone()
        value = evaluate(field, u)
        for _ in range(max_iterations):
            error = value.abs().amax(-1)
            if bool((error <= tolerance).all()):
                return u
            step, failed = torch.linalg.solve_ex(jacobian(field, u), -value)
            if bool(failed.any()):  # a singular Jacobian: there is no Newton step
                break
            moved, changed = _descend(field, u, step, value)
            if not bool(changed.any()):
                break
            u, value = moved, evaluate(field, moved)
        error = value.abs().amax(-1)
        rounding = ROUNDING * torch.finfo(u.dtype).eps * (1 + u.abs().amax(-1))
        if bool((error <= torch.maximum(rounding, torch.full_like(rounding, tolerance))).all()):
            return u
    raise RuntimeError(
        f"Newton's method found no fixed point in {max_iterations} iterations: the residual is "
        f"{error.max().item():.2g} (tolerance {tolerance:g}); start nearer, or relax first"
    )


def _descend(field: Field, u: Tensor, step: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Move each row by the largest halved step that lowers its residual, if one does."""
    before = torch.linalg.vector_norm(value, dim=-1)
    found, changed = u, torch.zeros_like(before, dtype=torch.bool)
    for halving in range(HALVINGS):
        trial = u + step * 0.5**halving
        after = torch.linalg.vector_norm(evaluate(field, trial), dim=-1)
        better = (after < before) & ~changed
        found = torch.where(better.unsqueeze(-1), trial, found)
        changed = changed | better
        if bool((changed | (before == 0)).all()):
            break
    return found, changed


def jacobian(field: Field, u: Tensor) -> Tensor:
    """Jacobian ``[.., n, n]`` of a field with independent rows; complex for complex states."""
    basis = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)

    def column(direction: Tensor) -> Tensor:
        tangent: Tensor = torch.func.jvp(field, (u,), (direction.expand_as(u),))[1]
        return tangent

    return torch.func.vmap(column)(basis).movedim(0, -1)


def evaluate(field: Field, u: Tensor) -> Tensor:
    """Evaluate a field and check the shape of what it returns."""
    check_callable(field=field)
    value = field(u)
    if value.shape != u.shape:
        raise ValueError(
            f"field must keep the shape of the state, {list(u.shape)}, got {list(value.shape)}"
        )
    return value


def _check_inexact(name: str, u: Tensor) -> None:
    if not (u.is_floating_point() or u.is_complex()):
        raise TypeError(f"{name} must have a floating or complex dtype, got {u.dtype}")


def _check_finite(name: str, u: Tensor) -> None:
    """Require finite entries; the solvers read values in every step anyway."""
    finite = u.isfinite()
    if not bool(finite.all()):
        raise ValueError(f"{name} must be finite, got {int((~finite).sum())} entries that are not")


def check_state(name: str, u: Tensor) -> None:
    """Require a non-empty floating or complex tensor with at least one dimension."""
    check_tensor(name, u)
    _check_inexact(name, u)
    if u.dim() == 0:
        raise ValueError(f"{name} must have shape [.., n], got []")
    check_not_empty(name, u)
