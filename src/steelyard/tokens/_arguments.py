"""Argument checks of this package that no other needs."""

import math
from typing import Any, SupportsFloat

from torch import Tensor

from steelyard._checks import check_not_empty, check_tensor


def check_has_vocabulary(name: str, tensor: Tensor) -> None:
    """Require at least one row and one column."""
    if tensor.dim() == 0:
        raise ValueError(f"{name} must have shape [.., V], got a scalar")
    check_not_empty(name, tensor)


def check_threshold(name: str, value: Any) -> None:
    """Require a number (or a tensor of one); infinities are allowed, NaN is not."""
    is_number = isinstance(value, SupportsFloat) and not isinstance(value, bool)
    if not is_number or (isinstance(value, Tensor) and value.numel() != 1):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if math.isnan(float(value)):
        raise ValueError(f"{name} must not be NaN")


def check_token_ids(name: str, ids: Tensor) -> None:
    """Require integer ids ``[B, T]`` with at least one row; ``T = 0`` is allowed."""
    check_tensor(name, ids)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype.itemsize == 1:
        raise TypeError(f"{name} must have a wide integer dtype, got {ids.dtype}")
    if ids.dim() != 2 or ids.shape[0] == 0:
        raise ValueError(f"{name} must have shape [B, T] with B >= 1, got {list(ids.shape)}")
