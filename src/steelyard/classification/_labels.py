"""Class labels: checks of shape and dtype always, of values where that is cheap; label gaps."""

import torch
from torch import Tensor

from steelyard._checks import (
    check_floating,
    check_groups,
    check_mask,
    check_not_empty,
    check_range,
    check_shape,
)
from steelyard._reduce import accumulation_dtype, fill_masked


def check_logits(name: str, logits: Tensor, *, classes: int = 2) -> None:
    """Require floating-point ``[B, K]`` with at least one row and ``classes`` columns."""
    check_floating(**{name: logits})
    check_shape(name, logits, (None, None))
    check_not_empty(name, logits)
    if logits.shape[1] < classes:
        raise ValueError(f"{name} must have at least {classes} classes, got {list(logits.shape)}")


def check_number(name: str, value: float) -> None:
    """Require a finite number, which a bool is not: torch subtracts none from a tensor."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got bool")
    check_range(name, value)


def class_labels(
    labels: Tensor, logits: Tensor, mask: Tensor | None = None, *, name: str = "labels"
) -> Tensor:
    """Check one integer class for each row of ``logits`` and return them as int64, 0 if masked."""
    check_groups(labels, logits, name=name)
    kept = fill_masked(labels, mask, 0).long()
    check_values(name, kept, logits.shape[1] - 1)
    return kept


def check_values(name: str, labels: Tensor, highest: int) -> None:
    """Require values in ``[0, highest]`` on a CPU; elsewhere a look would wait for the device."""
    if torch.compiler.is_compiling() or labels.device.type != "cpu":
        return
    try:
        low, high = (float(end) for end in labels.detach().aminmax())
    except RuntimeError:  # torch.func.vmap hides the values
        return
    if low < 0 or high > highest:
        raise ValueError(f"{name} must be in [0, {highest}], got values in [{low:g}, {high:g}]")


def label_gaps(logits: Tensor, labels: Tensor, margin: float) -> Tensor:
    """``f_k - f_y + c`` for every class but the label, whose gap is 0; ``[B, K]``."""
    own = logits.gather(1, labels.unsqueeze(1))
    others = torch.arange(logits.shape[1], device=logits.device) != labels.unsqueeze(1)
    return logits - own + margin * others.to(logits.dtype)


def checked_values(
    logits: Tensor, labels: Tensor, margin: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Check the inputs; return logits in the dtype of sums, 0 if masked, and labels as int64."""
    check_logits("logits", logits)
    check_range("margin", margin, at_least=0.0)
    check_mask(mask, logits[:, 0])
    index = class_labels(labels, logits, mask)
    row_mask = None if mask is None else (mask != 0).unsqueeze(1)
    return fill_masked(logits.to(accumulation_dtype(logits.dtype)), row_mask), index


def checked_gaps(logits: Tensor, labels: Tensor, margin: float, mask: Tensor | None) -> Tensor:
    """Check the inputs; return the gaps ``[B, K]`` in the dtype of sums, of 0 logits if masked."""
    return label_gaps(*checked_values(logits, labels, margin, mask), margin)
