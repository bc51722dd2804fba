r"""Row sums of Gaussian kernels in log space, in memory that does not grow with ``N^2``.

Everything in :mod:`steelyard.divergences.cauchy_schwarz` is a function of

.. math:: r_j = \log \sum_i \exp(-\|u_j - v_i\|^2 / 2).

A product of Gaussian kernels is the Gaussian kernel of the joined features, so one such sum serves
a product of two: the features below are a tensor ``[N, D]`` each, already divided by its bandwidth,
and stay apart so that a gradient is computed only for those that need one.

Kernels are formed a block of rows at a time, in the forward pass and again in the backward pass,
in the dtype the caller asks for. Exponents are one matrix product,
``[u, -|u|^2/2, 1] [v, 1, -|v|^2/2]'``, always in float64 where the device has it: the difference
of large terms would cost float32 its digits as soon as points are many bandwidths apart.
"""

from typing import Any

import torch
from torch import Tensor

from steelyard.divergences._blocks import row_blocks


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on the one device type that has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def log_self_sums(
    dtype: torch.dtype, block_size: int | None, first: Tensor, second: Tensor | None = None
) -> Tensor:
    """Return ``r`` for ``u = v = [first, second]``, the diagonal included.

    Args:
        dtype: of the kernel blocks.
        block_size: rows a block; ``None`` = chosen from ``N``.
        first: features ``[N, D]`` in the wide dtype.
        second: features ``[N, K]``.

    Returns:
        Shape ``[N]``, in ``[0, log N]``, in the wide dtype; differentiable in all features.
    """
    second = first[:, :0] if second is None else second
    inputs = (dtype, block_size, first, second)
    sums: Tensor = _LogSelfSums.apply(*inputs)  # type: ignore[no-untyped-call]  # torch's own
    return sums


def log_cross_sums(
    dtype: torch.dtype,
    block_size: int | None,
    rows: tuple[Tensor, Tensor],
    columns: tuple[Tensor, Tensor],
) -> Tensor:
    """Return ``r`` for ``u = rows`` and ``v = columns``; it does not underflow.

    Args:
        dtype: of the kernel blocks.
        block_size: rows a block; ``None`` = chosen from ``N``.
        rows: features ``[M, D]`` and ``[M, K]`` in the wide dtype; ``K`` may be 0.
        columns: features ``[N, D]`` and ``[N, K]``.

    Returns:
        Shape ``[M]``, at most ``log N``, in the wide dtype; differentiable in all features.
    """
    inputs = (dtype, block_size, *rows, *columns)
    sums: Tensor = _LogCrossSums.apply(*inputs)  # type: ignore[no-untyped-call]  # torch's own
    return sums


class _LogSelfSums(torch.autograd.Function):
    """The kernel is symmetric: only blocks on and right of the diagonal are formed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        dtype: torch.dtype, block_size: int | None, first: Tensor, second: Tensor
    ) -> Tensor:
        points = _centred(torch.cat([first, second], 1))
        left, right = _left_factor(points), _right_factor(points)
        sums = torch.zeros_like(points[:, 0])
        for block in row_blocks(len(points), len(points), block_size):
            kernel = _self_block(left, right, block, dtype)
            sums[block] += kernel.sum(1)
            sums[block.stop :] += kernel[:, block.stop - block.start :].sum(0)
        return sums.log()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype, ctx.block_size, *features = inputs
        ctx.save_for_backward(output, *features)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # grad_j = sum_i K_ji (c_j + c_i) (u_i - u_j) with c = grad / sums.
        log_sums, *features = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        points = _centred(torch.cat(features, 1))
        left, right = _left_factor(points), _right_factor(points)
        c = (grad * torch.exp(-log_sums)).unsqueeze(1)
        moving = _needed_columns(points, features, needed)
        table = torch.cat([c * moving, moving, c], 1).to(ctx.dtype)
        total = torch.zeros_like(table, dtype=points.dtype)
        for block in row_blocks(len(points), len(points), ctx.block_size):
            kernel = _self_block(left, right, block, ctx.dtype)
            total[block] += kernel @ table[block.start :]
            total[block.stop :] += kernel[:, block.stop - block.start :].T @ table[block]
        k_cu, k_u, k_c = torch.split(total, [moving.shape[1], moving.shape[1], 1], 1)
        gradient = k_cu + c * k_u - (k_c + grad.unsqueeze(1)) * moving
        return None, None, *_split_needed(gradient, features, needed)


class _LogCrossSums(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        dtype: torch.dtype,
        block_size: int | None,
        u_1: Tensor,
        u_2: Tensor,
        v_1: Tensor,
        v_2: Tensor,
    ) -> Tensor:
        columns = torch.cat([v_1, v_2], 1)
        shift = columns.mean(0)
        u, v = torch.cat([u_1, u_2], 1) - shift, columns - shift
        left, right, paired = _left_factor(u), _right_factor(v), _paired_exponents(u, v)
        sums = _empty_table(left, right[:, :1]).squeeze(1)
        for block in row_blocks(len(left), len(right), block_size):
            exponents = _cross_exponents(left, right, paired, block)
            largest = exponents.amax(1, keepdim=True)
            kernel = exponents.sub_(largest).to(dtype).exp_()
            sums[block] = largest.squeeze(1) + kernel.sum(1).log()
        return sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype, ctx.block_size, *features = inputs
        ctx.save_for_backward(output, *features)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # With P_ji = exp(e_ji - r_j), rows of sum 1, and g = grad:
        # grad u_j = g_j (sum_i P_ji v_i - u_j), grad v_i = sum_j g_j P_ji (u_j - v_i).
        log_sums, *features = ctx.saved_tensors
        rows, columns = features[:2], features[2:]
        needed_u, needed_v = ctx.needs_input_grad[2:4], ctx.needs_input_grad[4:]
        v = torch.cat(columns, 1)
        shift = v.mean(0)
        u, v = torch.cat(rows, 1) - shift, v - shift
        left, right = _left_factor(u, log_sums), _right_factor(v)
        paired = _paired_exponents(u, v) - log_sums[: len(v)]
        g = grad.unsqueeze(1)
        u_moving, v_of_u = (_needed_columns(x, rows, needed_u) for x in (u, v))
        u_of_v, v_moving = (_needed_columns(x, columns, needed_v) for x in (u, v))
        pulled = v_of_u.to(ctx.dtype)
        table = torch.cat([g * u_of_v, g], 1).to(ctx.dtype)
        means, pushed = _empty_table(u, pulled), _empty_table(v, table)
        for block in row_blocks(len(u), len(v), ctx.block_size):
            kernel = _cross_exponents(left, right, paired, block).to(ctx.dtype).exp_()
            means[block] = kernel @ pulled
            pushed += kernel.T @ table[block]
        grad_u = g * (means - u_moving)
        grad_v = pushed[:, :-1] - pushed[:, -1:] * v_moving
        return (
            None,
            None,
            *_split_needed(grad_u, rows, needed_u),
            *_split_needed(grad_v, columns, needed_v),
        )


def _empty_table(rows: Tensor, columns: Tensor) -> Tensor:
    # Zeros of the rows of one and the columns of the other, in the wider dtype, batched with both
    # under vmap. Filled in place: small results kept between large blocks would split the heap.
    return torch.zeros_like(rows[:, :1]) * torch.zeros_like(columns[:1])


def _centred(points: Tensor) -> Tensor:
    # Kernels see differences only; small coordinates keep their digits in the products.
    return points - points.mean(0)


def _left_factor(points: Tensor, log_scale: Tensor | None = None) -> Tensor:
    half_norms = points.square().sum(1, keepdim=True) / 2
    if log_scale is not None:
        half_norms = half_norms + log_scale.unsqueeze(1)
    return torch.cat([points, -half_norms, torch.ones_like(half_norms)], 1)


def _right_factor(points: Tensor) -> Tensor:
    half_norms = points.square().sum(1, keepdim=True) / 2
    return torch.cat([points, torch.ones_like(half_norms), -half_norms], 1)


def _self_block(left: Tensor, right: Tensor, block: slice, dtype: torch.dtype) -> Tensor:
    # Rows of the block against columns from its start on, so that self pairs lie on the diagonal.
    # They are exactly 1 and the rest at most that, however far rounding has moved the products.
    exponents = (left[block] @ right[block.start :].T).to(dtype).clamp(max=0.0)
    exponents.diagonal().zero_()
    return exponents.exp_()


def _paired_exponents(u: Tensor, v: Tensor) -> Tensor:
    # Rows of equal index, subtracted directly: where they belong together, as a prediction and
    # its target do, they are the nearest pairs and must stay exact for any narrow bandwidth.
    n = min(len(u), len(v))
    return -(u[:n] - v[:n]).square().sum(1) / 2


def _cross_exponents(left: Tensor, right: Tensor, paired: Tensor, block: slice) -> Tensor:
    exponents = left[block] @ right.T
    exponents.diagonal(block.start).copy_(paired[block])
    return exponents


def _needed_columns(points: Tensor, features: list[Tensor], needed: tuple[bool, ...]) -> Tensor:
    parts = torch.split(points, [x.shape[1] for x in features], 1)
    kept = [part for part, need in zip(parts, needed, strict=True) if need]
    return torch.cat([points[:, :0], *kept], 1)


def _split_needed(
    gradient: Tensor, features: list[Tensor], needed: tuple[bool, ...]
) -> list[Tensor | None]:
    widths = [x.shape[1] if need else 0 for x, need in zip(features, needed, strict=True)]
    parts = torch.split(gradient, widths, 1)
    return [part if need else None for part, need in zip(parts, needed, strict=True)]
