"""Argument checks of samplers and measures, which may look at values as losses may not."""

import torch
from torch import Tensor

from steelyard._checks import check_range


def check_whole(name: str, value: int, *, at_least: int) -> None:
    """Require a Python integer, not a bool, of at least ``at_least``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    check_range(name, value, at_least=at_least)


def check_integer_dtype(name: str, tensor: Tensor) -> None:
    """Require a tensor of integers."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must have an integer dtype, got {tensor.dtype}")


def check_no_nan(name: str, tensor: Tensor) -> None:
    """Require a tensor without NaN."""
    if bool(tensor.isnan().any()):
        raise ValueError(f"{name} must not contain NaN")
