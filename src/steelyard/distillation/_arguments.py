"""Checks that the distillation losses share."""

from torch import Tensor

from steelyard._checks import (
    check_floating,
    check_integer_dtype,
    check_not_empty,
    check_same_shape,
    check_shape,
)


def check_pair(
    student: Tensor,
    teacher: Tensor,
    dims: int,
    *,
    names: tuple[str, str] = ("student_logits", "teacher_logits"),
) -> None:
    """Require two non-empty logit tensors of one shape; the last dimension is classes."""
    named = dict(zip(names, (student, teacher), strict=True))
    check_floating(**named)
    check_shape(names[0], student, (None,) * dims)
    check_same_shape(**named)
    check_not_empty(names[0], student)


def check_labels(name: str, labels: Tensor, shape: tuple[int, ...]) -> None:
    """Require integer labels of a shape."""
    check_shape(name, labels, shape)
    check_integer_dtype(**{name: labels})
