r"""f-divergence between the next-token laws of two linear heads, without their logits.

A block of rows is taken to the end at once: logits of both heads, the divergence, and, since the
upstream gradient of a mean or a sum is one number, the gradients too. So each logit is computed
once, and the backward pass only multiplies by that number.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from steelyard._checks import check_choice, check_shape
from steelyard._reduce import Reduction
from steelyard.divergences import FDivergence
from steelyard.divergences.f_divergences import check_divergence
from steelyard.fused._blocks import (
    Head,
    HeadGradients,
    block_rows,
    check_chunk_size,
    check_head,
    empty_rows,
    fill_rows,
    rows_in_cache,
    slices,
)
from steelyard.fused._compile import run_eagerly
from steelyard.fused._slopes import divergence_and_slopes


def linear_divergence(
    p_hidden: Tensor,
    p_weight: Tensor,
    q_hidden: Tensor,
    q_weight: Tensor,
    divergence: FDivergence,
    *,
    p_bias: Tensor | None = None,
    q_bias: Tensor | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Exact ``D_f(p || q)`` of two heads row by row, never holding ``[N, V]``.

    .. math::
        p_n = \mathrm{softmax}\big((h^p_n W_p^\top + b_p) / \tau\big), \quad
        q_n = \mathrm{softmax}\big((h^q_n W_q^\top + b_q) / \tau\big), \quad
        D_n = D_f(p_n\|q_n)

    in nats; no factor ``temperature ** 2``. Nothing is detached: gradients, once differentiable,
    reach whichever tensors require them, so a frozen teacher costs no backward pass. Both heads may
    be one tensor. Extra memory is ``O(chunk_size * V)``, beside the gradients themselves.

    Args:
        p_hidden: hidden states of the numerator, shape ``[N, D]``; ``N = 0`` is allowed.
        p_weight: its head, shape ``[V, D]``.
        q_hidden: hidden states of the denominator, shape ``[N, D']``.
        q_weight: its head, shape ``[V, D']``.
        divergence: for example ``KL``, for ``KL(p || q)``.
        p_bias: shape ``[V]``; ``-inf`` gives an entry no mass.
        q_bias: the same for ``q``.
        temperature: divides both logits, > 0.
        mask: shape ``[N]``, true = counts; other rows are dropped before any product.
        chunk_size: rows worked on at a time; ``None`` picks a bounded number.
        reduction: ``"mean"`` over kept rows, ``"sum"`` or ``"none"`` (0 at masked rows). With
            ``"none"`` the backward pass computes the logits again.

    Returns:
        0-d tensor, or shape ``[N]`` for ``"none"``; non-negative up to rounding; 0 without a kept
        row. Half precision is computed in float32 and returned in the input dtype.

    Raises:
        TypeError: a tensor is not floating point, ``divergence`` is not an ``FDivergence``,
            ``chunk_size`` is not an integer.
        ValueError: shapes do not fit, ``temperature <= 0`` or ``chunk_size < 1``.

    Example:
        A student without mass where the teacher has some: the Jensen-Shannon divergence stays
        finite, and its gradient pulls the student's hidden state towards the teacher's.

        >>> from steelyard.divergences import JENSEN_SHANNON
        >>> head = torch.eye(2)
        >>> teacher = torch.tensor([[0.0, 200.0]])
        >>> student = torch.tensor([[200.0, 0.0]], requires_grad=True)
        >>> print(f"{linear_divergence(teacher, head, student, head, JENSEN_SHANNON).item():.4f}")
        0.6931
        >>> student = torch.tensor([[1.0, 0.0]], requires_grad=True)
        >>> linear_divergence(teacher, head, student, head, JENSEN_SHANNON).backward()
        >>> student.grad
        tensor([[ 0.1525, -0.1525]])

    Source: Go et al. (2023), section 2, arXiv:2302.08215, for the divergences.
    """
    check_head("p_", p_hidden, p_weight, p_bias, temperature)
    check_head("q_", q_hidden, q_weight, q_bias, temperature)
    check_shape("q_hidden", q_hidden, (p_hidden.shape[0], None))
    check_shape("q_weight", q_weight, (p_weight.shape[0], None))
    if mask is not None:
        check_shape("mask", mask, (p_hidden.shape[0],))
    check_divergence(divergence)
    check_chunk_size(chunk_size)
    check_choice("reduction", reduction, ("none", "mean", "sum"))
    heads = (p_weight, p_bias, q_weight, q_bias)
    task = _Task(divergence, temperature, chunk_size, reduction)
    value: Tensor = run_eagerly(_of_kept_rows, p_hidden, q_hidden, mask, heads, task)
    return value


@dataclass(frozen=True)
class _Task:
    divergence: FDivergence
    temperature: float
    chunk_size: int | None
    reduction: Reduction
    needs_grad: tuple[bool, ...] = (False,) * 6


def _of_kept_rows(
    p_hidden: Tensor, q_hidden: Tensor, mask: Tensor | None, heads: tuple[Any, ...], task: _Task
) -> Tensor:
    if mask is not None:
        kept = mask != 0
        p_hidden, q_hidden = p_hidden[kept], q_hidden[kept]
    tensors = (p_hidden, *heads[:2], q_hidden, *heads[2:])
    needs = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors)
    value: Tensor = _LinearDivergence.apply(*tensors, replace(task, needs_grad=needs))[0]  # type: ignore[no-untyped-call]
    if mask is None or value.dim() == 0:
        return value
    return value.new_zeros(mask.shape).index_put((kept,), value)


class _LinearDivergence(Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor | None, ...]:
        *tensors, task = args
        p, q = _heads(tensors, task)
        in_forward = task.reduction != "none" and any(task.needs_grad)
        factors = p.full(p.num_rows, _scale(p, task)) if in_forward else None
        values, grads = _sweep(p, q, task, factors)
        value = values if task.reduction == "none" else values.sum() * _scale(p, task)
        return (value.to(torch.promote_types(p.dtype, q.dtype)), *grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *tensors, ctx.task = inputs
        ctx.save_for_backward(*tensors)
        ctx.dtypes = tuple(None if x is None else x.dtype for x in tensors)
        ctx.gradients = output[1:]
        ctx.mark_non_differentiable(*(x for x in output[1:] if x is not None))
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_value: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
        if d_value is None:
            return (None,) * 7
        grads: tuple[Tensor | None, ...] = ctx.gradients
        ctx.gradients = ()
        if any(grad is not None for grad in grads):
            grads = tuple(None if grad is None else grad.mul_(d_value) for grad in grads)
        else:  # One factor a row, or a second pass through the same graph.
            p, q = _heads(ctx.saved_tensors, ctx.task)
            factors: Tensor = (d_value.to(_work_dtype(p, q)) * _scale(p, ctx.task)).expand(
                p.num_rows
            )
            _, grads = _sweep(p, q, ctx.task, factors)
        pairs = zip(grads, ctx.dtypes, strict=True)
        return (*(None if grad is None else grad.to(dtype) for grad, dtype in pairs), None)


def _sweep(
    p: Head, q: Head, task: _Task, factors: Tensor | None
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    # Divergence of each row and, given one factor a row, the gradients of their weighted sum.
    needs = task.needs_grad if factors is not None else (False,) * 6
    p_grads, q_grads = HeadGradients(p, needs[:3]), HeadGradients(q, needs[3:])
    rows = block_rows(p, task.chunk_size)
    p_block, q_block = (empty_rows(rows, head) for head in (p, q))
    values = torch.empty(p.num_rows, dtype=_work_dtype(p, q), device=p.device)
    for row in slices(p.num_rows, rows):
        z_p, z_q = fill_rows(p, row, p_block), fill_rows(q, row, q_block)
        for part in slices(z_p.shape[0], rows_in_cache(p)):
            here = slice(row.start + part.start, row.start + part.stop)
            values[here], slopes = divergence_and_slopes(
                z_p[part], z_q[part], task.divergence, (p_grads.wanted, q_grads.wanted)
            )
            for z, slope in zip((z_p, z_q), slopes, strict=True):
                if slope is not None and factors is not None:
                    torch.mul(slope, factors[here, None], out=z[part])
        p_grads.add(row, z_p)
        q_grads.add(row, z_q)
    return values, (*p_grads.tensors, *q_grads.tensors)


def _heads(tensors: Sequence[Any], task: _Task) -> tuple[Head, Head]:
    p_hidden, p_weight, p_bias, q_hidden, q_weight, q_bias = tensors
    p = Head(p_hidden, p_weight, p_bias, task.temperature)
    return p, Head(q_hidden, q_weight, q_bias, task.temperature)


def _work_dtype(p: Head, q: Head) -> torch.dtype:
    return torch.promote_types(p.work_dtype, q.work_dtype)


def _scale(p: Head, task: _Task) -> float:
    return 1.0 / max(p.num_rows, 1) if task.reduction == "mean" else 1.0
