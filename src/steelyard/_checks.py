"""Argument checks shared by every package: one line at a call, one wording for every error.

Each check raises ``ValueError`` or ``TypeError`` naming the argument, what was expected and what
came. Only shapes, dtypes and Python numbers are looked at, never tensor values, so that a check
costs no synchronisation and ``torch.compile`` traces through it.
"""

import math
from typing import Any

import torch
from torch import Tensor


def check_floating(**tensors: Tensor | None) -> None:
    """Require floating-point tensors; ``None`` passes."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must have a floating dtype, got {tensor.dtype}")


def check_same_shape(**tensors: Tensor | None) -> None:
    """Require that all tensors have the shape of the first; ``None`` passes."""
    given = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    for name, tensor in given:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    first_name, first = given[0]
    for name, tensor in given[1:]:
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name} must have the shape of {first_name}, {list(first.shape)}, "
                f"got {list(tensor.shape)}"
            )


def check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...]) -> None:
    """Require a shape; ``None`` in ``expected`` admits any length there."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    fits = tensor.dim() == len(expected) and all(
        want is None or want == have for want, have in zip(expected, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in expected)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(tensor.shape)}")


def check_mask(mask: Tensor | None, values: Tensor, *, name: str = "mask") -> None:
    """Require a mask of exactly the shape of ``values``: nothing broadcasts."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(mask).__name__}")
    if mask.shape != values.shape:
        raise ValueError(f"{name} must have shape {list(values.shape)}, got {list(mask.shape)}")


def check_range(
    name: str,
    value: float,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
) -> None:
    """Require a number inside an interval; ``above``/``below`` are strict; NaN never fits."""
    try:
        fits = above < value < below and at_least <= value <= at_most
    except TypeError:
        raise TypeError(f"{name} must be a number, got {type(value).__name__}") from None
    if not fits:
        low = f"> {above}" if above > -math.inf else f">= {at_least}"
        high = f"< {below}" if below < math.inf else f"<= {at_most}"
        parts = [part for part in (low, high) if "inf" not in part]
        if not math.isfinite(value):
            parts.append("finite")
        raise ValueError(f"{name} must be {' and '.join(parts)}, got {value}")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Require one of a few values."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_not_empty(name: str, tensor: Tensor) -> None:
    """Require at least one element."""
    if tensor.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {list(tensor.shape)}")


def check_integer_dtype(**tensors: Tensor | None) -> None:
    """Require tensors of integers, which booleans are not; ``None`` passes."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"{name} must have an integer dtype, got {tensor.dtype}")


def check_count(name: str, value: int, *, at_least: int = 1, expected: str = "an integer") -> None:
    """Require a Python integer, which a bool is not, of at least ``at_least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    check_range(name, value, at_least=at_least)


def check_groups(groups: Tensor, values: Tensor, *, name: str = "groups") -> None:
    """Require one integer group id for each of the ``N`` values."""
    check_integer_dtype(**{name: groups})
    check_shape(name, groups, (values.shape[0],))
