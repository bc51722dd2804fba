"""Checks of arguments that the modules of this package share."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steelyard._checks import check_count

__all__ = ["check_array", "check_attributes", "check_lengths", "check_rows"]

_NUMBERS = "biuf"
"""Kinds of NumPy dtypes that hold real numbers."""


def check_lengths(name: str, lengths: Any, *, at_least: int = 0) -> None:
    """Require a sequence of integers of at least ``at_least`` each."""
    if not isinstance(lengths, Sequence) or isinstance(lengths, str):
        raise TypeError(f"{name} must be a sequence of integers, got {type(lengths).__name__}")
    for length in lengths:
        check_count(name, length, at_least=at_least, expected="a sequence of integers")


def check_array(name: str, array: NDArray[Any], *, kinds: str = _NUMBERS) -> None:
    """Require a NumPy array with a dtype of these kinds."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(array).__name__}")
    if array.dtype.kind not in kinds:
        expected = "booleans" if kinds == "b" else "numbers"
        raise TypeError(f"{name} must hold {expected}, got the dtype {array.dtype}")


def check_rows(
    name: str, array: NDArray[Any], shape: tuple[int, ...], *, kinds: str = _NUMBERS
) -> None:
    """Require an array ``[B, *shape]``."""
    check_array(name, array, kinds=kinds)
    if array.ndim == 0 or array.shape[1:] != shape:
        wanted = ", ".join(map(str, ("any", *shape)))
        raise ValueError(f"{name} must have shape [{wanted}], got {list(array.shape)}")


def check_attributes(name: str, value: Any, attributes: tuple[str, ...], *, expected: str) -> None:
    """Require an object that has these attributes."""
    lacking = [attribute for attribute in attributes if not hasattr(value, attribute)]
    if lacking:
        raise TypeError(
            f"{name} must be {expected}, got {type(value).__name__} without {', '.join(lacking)}"
        )
