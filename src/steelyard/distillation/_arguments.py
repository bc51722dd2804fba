"""Checks and casts that the distillation losses share."""

import torch
from torch import Tensor

from steelyard._checks import check_floating, check_not_empty, check_same_shape, check_shape
from steelyard._reduce import accumulation_dtype


def check_pair(student: Tensor, teacher: Tensor, dims: int) -> None:
    """Require two non-empty logit tensors of one shape; the last dimension is classes."""
    check_floating(student_logits=student, teacher_logits=teacher)
    check_shape("student_logits", student, (None,) * dims)
    check_same_shape(student_logits=student, teacher_logits=teacher)
    check_not_empty("student_logits", student)


def check_labels(name: str, labels: Tensor, shape: tuple[int, ...]) -> None:
    """Require integer labels of a shape."""
    check_shape(name, labels, shape)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name} must have an integer dtype, got {labels.dtype}")


def widen(tensor: Tensor) -> Tensor:
    """Cast half precision to float32."""
    return tensor.to(accumulation_dtype(tensor.dtype))
