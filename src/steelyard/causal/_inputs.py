"""Checks of tensor values: what a bound is asked of must be a law and a propensity.

Values are not looked at while a function is traced or vectorised; a wrong one then gives NaN or
infinity.
"""

import math

import torch
from torch import Tensor

from steelyard._checks import check_floating, check_not_empty

__all__ = ["as_law", "as_tensor", "check_outcome_range", "check_propensity", "require_all"]


def as_tensor(name: str, value: Tensor | float, like: Tensor | None = None) -> Tensor:
    """Take a number or a floating tensor; a number gets the dtype of ``like`` or float64."""
    if isinstance(value, bool) or not isinstance(value, Tensor | int | float):
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
    if not isinstance(value, Tensor):
        dtype = torch.float64 if like is None else like.dtype
        return torch.tensor(value, dtype=dtype, device=None if like is None else like.device)
    check_floating(**{name: value})
    check_not_empty(name, value)
    return value


def require_all(fits: Tensor, name: str, expected: str, values: Tensor) -> None:
    """Raise unless all is true, as far as values may be looked at."""
    if torch.compiler.is_compiling() or torch._C._functorch.is_batchedtensor(fits):
        return
    if not bool(fits.all()):
        wrong = values[~fits] if fits.shape == values.shape else values
        raise ValueError(f"{name} must {expected}, got {float(wrong.detach().flatten()[0])}")


def check_propensity(name: str, e: Tensor, *, one_allowed: bool = False) -> None:
    """Require probabilities in (0, 1), or (0, 1]."""
    if one_allowed:
        require_all((e > 0) & (e <= 1), name, "lie in (0, 1]", e)
    else:
        require_all((e > 0) & (e < 1), name, "lie in (0, 1)", e)


def as_law(y: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Check a law of finite support, ``[..., S]``, and return it in float64 with sum exactly 1."""
    check_floating(y=y, p=p)
    check_not_empty("y", y)
    if y.dim() == 0 or p.dim() == 0 or y.shape[-1] != p.shape[-1]:
        raise ValueError(
            "y and p must have shape [..., S] with the same S, "
            f"got {list(y.shape)} and {list(p.shape)}"
        )
    require_all(torch.isfinite(y), "y", "be finite", y)
    require_all(torch.isfinite(p), "p", "be finite", p)
    require_all(p >= 0, "p", "not be negative", p)
    slack = 1e-6 + p.shape[-1] * torch.finfo(p.dtype).eps
    y, p = y.detach().double(), p.detach().double()
    y, p = torch.broadcast_tensors(y, p)  # type: ignore[no-untyped-call]
    total = p.sum(-1, keepdim=True)
    require_all((total - 1).abs() <= slack, "p", "sum to 1 over its last dimension", total)
    return y, p / total


def check_outcome_range(
    outcome_range: tuple[float, float], y: Tensor, kept: Tensor, name: str = "y"
) -> tuple[float, float]:
    """Require a finite range that holds every kept outcome, and return it as two floats."""
    try:
        low, high = (float(end) for end in outcome_range)
    except (TypeError, ValueError):
        raise TypeError(
            f"outcome_range must be two numbers (lowest, highest), got {outcome_range!r}"
        ) from None
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(
            f"outcome_range must be finite with lowest <= highest, got {outcome_range!r}"
        )
    inside = ((y >= low) & (y <= high)) | ~kept
    require_all(inside, name, f"lie in outcome_range, [{low}, {high}]", y)
    return low, high
