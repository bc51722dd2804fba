"""Fast paths on the CPU for losses over rankings; each equals its plain formula.

PyTorch's ``argsort`` and ``logcumsumexp`` take most of the time of a Plackett-Luce loss. NumPy
sorts integers several times faster, and while the logits of a row lie within ``SPAN`` the sums of
exponentials can be taken as they are, in float64. Rows that lie further apart, other devices and
compiled functions take the plain formulas.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

SPAN = 600.0
"""``exp`` of it and of its negative are normal numbers in float64, with room for a sum."""

_BLOCK = 2**18


def descending(values: Tensor) -> Tensor:
    """Indices ``[..., C]`` that sort each row from high to low; equal values: lower index first."""
    if torch.compiler.is_compiling():
        return _by_torch(values)
    order: Tensor = _Descending.apply(values.detach())  # type: ignore[no-untyped-call]
    return order


def plackett_luce(ranked: Tensor, weights: Tensor) -> Tensor:
    r"""Losses ``[B]``: :math:`\sum_k w_k (\log \sum_{l \ge k} e^{s_l} - s_k)` of ranked logits.

    Args:
        ranked: ``s`` ``[B, C]``, the best rank first.
        weights: ``w`` ``[B, C]``, without gradient.
    """
    if ranked.device.type != "cpu" or torch.compiler.is_compiling():
        return _plain(ranked, weights)
    losses: Tensor = _PlackettLuce.apply(ranked, weights)[0]  # type: ignore[no-untyped-call]
    return losses


def _by_torch(values: Tensor) -> Tensor:
    return values.argsort(dim=-1, descending=True, stable=True)


class _Descending(Function):
    @staticmethod
    def forward(values: Tensor) -> Tensor:
        """Sort integers of which the high half is the value and the low half the index."""
        if values.device.type != "cpu" or values.dtype != torch.float32:
            return _by_torch(values)
        bits = (values + 0.0).view(torch.int32)  # no negative zero: it is a tie
        rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        index = torch.arange(values.shape[-1])
        keys = (torch.bitwise_not(rising).long() << 32) | index
        return torch.from_numpy(np.sort(keys.numpy(), axis=-1)) & 0xFFFFFFFF

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, ...], values: Tensor) -> tuple[Tensor, int]:
        return descending(values.movedim(in_dims[0], 0)), 0


class _PlackettLuce(Function):
    """The gradient in closed form: ``w_k`` pulls up its rank and pushes down all that are left."""

    @staticmethod
    def forward(ranked: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        losses, grads = ranked.new_empty(ranked.shape[:1]), torch.empty_like(ranked)
        rows = max(1, _BLOCK // ranked.shape[1])
        for start in range(0, len(ranked), rows):
            block = slice(start, start + rows)
            losses[block], grads[block] = _block(ranked[block], weights[block])
        return losses, grads

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]
    ) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.save_for_forward(output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor, _: Any) -> tuple[Tensor, None]:
        ranked, weights, grads = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants the derivative of the gradient, too
            grads = _plain_gradient(ranked, weights)
        return grad_losses.unsqueeze(1) * grads, None

    @staticmethod
    def jvp(ctx: Any, ranked_tangent: Tensor, _: Any) -> tuple[Tensor, None]:
        (grads,) = ctx.saved_tensors
        return (grads * ranked_tangent).sum(1), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, int | None], ranked: Tensor, weights: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        """Rows are independent: those of all batches are one batch."""
        size = info.batch_size
        ranked, weights = (
            x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip((ranked, weights), in_dims, strict=True)
        )
        rows = (ranked.flatten(0, 1), weights.flatten(0, 1))
        losses, grads = _PlackettLuce.apply(*rows)  # type: ignore[no-untyped-call]
        return (losses.unflatten(0, (size, -1)), grads.unflatten(0, (size, -1))), (0, 0)


def _block(ranked: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and gradients of a few rows, in float64 if sums of exponentials stay in range."""
    wide = ranked.double()
    top = wide.amax(1, keepdim=True)
    if not bool((top - wide.amin(1, keepdim=True) < SPAN).all()):  # a NaN is not in range either
        return _plain(ranked, weights), _plain_gradient(ranked, weights)
    weights = weights.double()
    exps = (wide - top).exp_()
    left = exps.flip(1).cumsum_(1).flip(1)
    losses = ((left.log() + top - wide) * weights).sum(1)
    return losses, exps.mul_((weights / left).cumsum_(1)).sub_(weights)


def _plain(ranked: Tensor, weights: Tensor) -> Tensor:
    remaining = ranked.flip(1).logcumsumexp(1).flip(1)
    return (weights * (remaining - ranked)).sum(1)


def _plain_gradient(ranked: Tensor, weights: Tensor) -> Tensor:
    gradient: Tensor = torch.func.grad(lambda logits: _plain(logits, weights).sum())(ranked)
    return gradient
