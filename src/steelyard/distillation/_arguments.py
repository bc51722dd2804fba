"""Checks that the distillation losses share."""

from torch import Tensor

from steelyard._checks import (
    check_floating,
    check_integer_dtype,
    check_not_empty,
    check_same_shape,
    check_shape,
)


def check_pair(student: Tensor, teacher: Tensor, dims: int) -> None:
    """Require two non-empty logit tensors of one shape; the last dimension is classes."""
    check_floating(student_logits=student, teacher_logits=teacher)
    check_shape("student_logits", student, (None,) * dims)
    check_same_shape(student_logits=student, teacher_logits=teacher)
    check_not_empty("student_logits", student)


def check_labels(name: str, labels: Tensor, shape: tuple[int, ...]) -> None:
    """Require integer labels of a shape."""
    check_shape(name, labels, shape)
    check_integer_dtype(**{name: labels})
