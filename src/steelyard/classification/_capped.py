"""The worst capped weights of each item on a processor, with one array of the size of the logits.

What is plain in :mod:`steelyard.classification.label_robust` keeps a dozen such arrays for the
backward pass, and fresh memory costs more than the arithmetic.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from steelyard.classification._labels import label_gaps


def can_cap_quickly(logits: Tensor) -> bool:
    """Tell whether :class:`CappedMaximum` works here: not traced, not transformed, on a CPU."""
    return (
        logits.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


class CappedMaximum(Function):
    """Value and weights of the capped maximum; the weights are the slope, by Danskin's theorem.

    ``plain`` computes the value with operations that autograd knows. It is asked where a gradient
    of the gradient is wanted, and for the value where the weights are nearly flat.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, margin: float, plain: Any, solve: Any
    ) -> Tensor:
        own = logits.gather(1, labels.unsqueeze(1))
        gaps = (logits - own).add_(margin).scatter_(1, labels.unsqueeze(1), 0.0)
        values, weights = solve(gaps)
        if values is None:
            values = plain(label_gaps(logits, labels, margin))
        slope = weights.scatter_add_(1, labels.unsqueeze(1), -torch.ones_like(own))
        ctx.save_for_backward(logits, labels, slope)
        ctx.margin, ctx.plain = margin, plain
        return values  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, slope = ctx.saved_tensors
        if torch.is_grad_enabled():
            values = ctx.plain(label_gaps(logits, labels, ctx.margin))
            (slope,) = torch.autograd.grad(values.sum(), logits, create_graph=True)
        return upstream[0].unsqueeze(1) * slope, None, None, None, None
