"""Argument checks shared by every package: one line at a call, one wording for every error.

Each check raises ``ValueError`` or ``TypeError`` naming the argument, what was expected and what
came. Only shapes, dtypes and Python numbers are looked at, never tensor values, so that a check
costs no synchronisation and ``torch.compile`` traces through it.
"""

import math
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT


def check_tensor(name: str, tensor: Tensor) -> None:
    """Require a tensor that stores all its values."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got the layout {tensor.layout}")


def given(**tensors: Tensor | None) -> dict[str, Tensor]:
    """Keep the optional arguments that are there, for ``check_floating(**given(mask=mask))``."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def check_floating(**tensors: Tensor) -> None:
    """Require floating-point tensors."""
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must have a floating dtype, got {tensor.dtype}")


def check_same_shape(**tensors: Tensor | None) -> None:
    """Require that all tensors have the shape of the first; ``None`` passes."""
    present = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    for name, tensor in present:
        check_tensor(name, tensor)
    first_name, first = present[0]
    for name, tensor in present[1:]:
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name} must have the shape of {first_name}, {list(first.shape)}, "
                f"got {list(tensor.shape)}"
            )


def check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...]) -> None:
    """Require a shape; ``None`` in ``expected`` admits any length there."""
    check_tensor(name, tensor)
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
    check_tensor(name, mask)
    if mask.is_complex():
        raise TypeError(f"{name} must be of booleans, zeros and ones, got {mask.dtype}")
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
    except (TypeError, ValueError, RuntimeError):  # several values have no truth value
        raise TypeError(f"{name} must be a number, got {type(value).__name__}") from None
    if not fits:
        low = f"> {above}" if above > -math.inf else f">= {at_least}"
        high = f"< {below}" if below < math.inf else f"<= {at_most}"
        parts = [part for part in (low, high) if "inf" not in part]
        if not math.isfinite(value):
            parts.append("finite")
        raise ValueError(f"{name} must be {' and '.join(parts)}, got {value}")


def check_not_nan(name: str, value: float) -> None:
    """Require a real number, which may be infinite."""
    try:
        unknown = math.isnan(value)
    except (TypeError, ValueError, RuntimeError):  # such as an array of several values
        raise TypeError(f"{name} must be a number, got {type(value).__name__}") from None
    if unknown:
        raise ValueError(f"{name} must be a number, got {value}")


def check_pair(name: str, pair: Any) -> None:
    """Require two items, such as the ends of a range, whatever they are."""
    if isinstance(pair, str) or not hasattr(pair, "__len__") or len(pair) != 2:
        raise TypeError(f"{name} must be two numbers, got {pair!r:.60}")


def check_callable(**functions: Any) -> None:
    """Require functions, or objects that can be called like one."""
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"{name} must be callable, got {type(function).__name__}")


def check_same_dtype(**tensors: Tensor) -> None:
    """Require the dtype of the first tensor in all."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{name} must have the dtype of {first_name}, {first.dtype}, got {tensor.dtype}"
            )


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Require one of a few values."""
    if isinstance(value, Tensor) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_not_empty(name: str, tensor: Tensor) -> None:
    """Require at least one element."""
    check_tensor(name, tensor)
    if tensor.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {list(tensor.shape)}")


def check_integer_dtype(**tensors: Tensor) -> None:
    """Require tensors of integers, which booleans are not."""
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"{name} must have an integer dtype, got {tensor.dtype}")


def check_count(name: str, value: int, *, at_least: int = 1, expected: str = "an integer") -> None:
    """Require an integer, which a bool is not, of at least ``at_least``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    check_range(name, value, at_least=at_least)


def check_groups(groups: Tensor, values: Tensor, *, name: str = "groups") -> None:
    """Require one integer group id for each of the ``N`` values."""
    check_integer_dtype(**{name: groups})
    check_shape(name, groups, (values.shape[0],))


def check_not_text(**arrays: Any) -> None:
    """Refuse text where an estimator takes numbers; scikit-learn checks the rest."""
    for name, array in arrays.items():
        kind = getattr(getattr(array, "dtype", None), "kind", "")
        if isinstance(array, str) or kind in ("S", "U"):
            raise TypeError(f"{name} must be an array of numbers, got text")


def checked_parameters(params: ParamsT) -> ParamsT:
    """Require something to optimise, and keep what a generator yields; torch checks the items."""
    if isinstance(params, Tensor):  # torch refuses a lone one by name
        return params
    if not isinstance(params, Iterable):
        raise TypeError(
            f"params must be an iterable of tensors or groups, got {type(params).__name__}"
        )
    listed = list(params)
    if not listed:
        raise ValueError("params must hold at least one parameter, got none")
    return cast("ParamsT", listed)
