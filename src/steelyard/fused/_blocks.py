"""Blocks of logits: how large they are, and the products that make and use them.

A block is a few rows (tokens) by a few columns (vocabulary entries). It is filled by one matrix
product, worked on while it is still in the cache, and overwritten by the next one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from steelyard._checks import check_count, check_floating, check_range, check_shape, given

LOG_ZERO = -1e30
"""Stands for a logit of ``-inf``: its exponential is 0, and 0 times it is 0, not NaN."""

# On a CPU a block should stay in the last cache; elsewhere it should keep the device busy.
_CPU_BLOCK_BYTES = 4 * 2**20
_DEVICE_BLOCK_BYTES = 128 * 2**20
_CPU_ROWS, _DEVICE_ROWS = 512, 4096

# Whole rows of logits: enough of them for fast products, elementwise work on those that fit the
# inner cache. The products write a few columns at a time, as wide ones run at 3/4 of the speed.
_CPU_ROWS_BYTES = 16 * 2**20
_CPU_CACHE_BYTES = 512 * 2**10
_CPU_COLUMNS = 1024
_FEWEST_ROWS = 128
_ROW_PADDING = 16


@dataclass(frozen=True)
class Head:
    """A linear layer over the vocabulary: ``logits = (hidden W^T + bias) / temperature``."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    temperature: float

    @property
    def num_rows(self) -> int:
        """``N``."""
        return self.hidden.shape[0]

    @property
    def vocabulary(self) -> int:
        """``V``."""
        return self.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the result."""
        return torch.promote_types(self.hidden.dtype, self.weight.dtype)

    @property
    def work_dtype(self) -> torch.dtype:
        """Dtype of logits and sums: float32 or better."""
        return torch.promote_types(self.dtype, torch.float32)

    @cached_property
    def product_dtype(self) -> torch.dtype:
        """Dtype of the factors of a product; half precision only where it is fast."""
        return self.dtype if _has_fast_products(self.dtype, self.device) else torch.float32

    @property
    def device(self) -> torch.device:
        """Device of the logits."""
        return self.hidden.device

    def empty(self, *shape: int) -> Tensor:
        """Return uninitialised numbers of the working dtype."""
        return torch.empty(shape, dtype=self.work_dtype, device=self.device)

    def full(self, size: int, value: float) -> Tensor:
        """Return ``size`` equal numbers of the working dtype."""
        return torch.full((size,), value, dtype=self.work_dtype, device=self.device)

    def row_blocks(self, rows: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of at most ``rows`` rows with their hidden states, ready for a product."""
        for block in slices(self.num_rows, rows):
            yield block, self.hidden[block].to(self.product_dtype)

    def column_blocks(self, columns: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of at most ``columns`` columns with their weights, ready for a product."""
        for block in slices(self.vocabulary, columns):
            yield block, self.weight[block].to(self.product_dtype)

    def logits_into(self, out: Tensor, hidden: Tensor, weight: Tensor, columns: slice) -> None:
        """Write the logits of some rows and columns into ``out``."""
        scale = 1.0 / self.temperature
        bias = None if self.bias is None else self.bias[columns].to(out.dtype)
        if hidden.dtype != out.dtype:
            out.copy_(hidden @ weight.T).mul_(scale)
            if bias is not None:
                out.add_(bias, alpha=scale)
        elif bias is None:
            torch.addmm(out, hidden, weight.T, beta=0.0, alpha=scale, out=out)
        else:
            torch.addmm(bias, hidden, weight.T, beta=scale, alpha=scale, out=out)


def add_product(
    out: Tensor, left: Tensor, right: Tensor, *, scale: float, first: bool = False
) -> None:
    """Add ``scale * left @ right`` to ``out``, or write it if it is the first addend."""
    if right.dtype == out.dtype:
        out.addmm_(left, right, beta=0.0 if first else 1.0, alpha=scale)
        return
    product = (left.to(right.dtype) @ right).to(out.dtype)
    if first:
        out.copy_(product).mul_(scale)
    else:
        out.add_(product, alpha=scale)


def slices(total: int, size: int) -> Iterator[slice]:
    """Cut ``range(total)`` into slices of at most ``size``."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def gradient_buffer(source: Tensor, dtype: torch.dtype, *, rows: int) -> Tensor:
    """Return room for the gradient of ``source``; zeros only if no row will ever write to it."""
    buffer = torch.empty(source.shape, dtype=dtype, device=source.device)
    return buffer if rows else buffer.zero_()


def tile_shape(head: Head, chunk_size: int | None) -> tuple[int, int]:
    """Return the rows and columns of one tile of logits."""
    on_cpu = head.device.type == "cpu"
    rows = chunk_size or (_CPU_ROWS if on_cpu else _DEVICE_ROWS)
    rows = max(1, min(rows, head.num_rows))
    entries = (_CPU_BLOCK_BYTES if on_cpu else _DEVICE_BLOCK_BYTES) // head.work_dtype.itemsize
    return rows, max(1, min(entries // rows, head.vocabulary))


def block_rows(head: Head, chunk_size: int | None) -> int:
    """Return how many whole rows of logits are made at a time."""
    on_cpu = head.device.type == "cpu"
    row_bytes = head.vocabulary * head.work_dtype.itemsize
    fitting = (_CPU_ROWS_BYTES if on_cpu else _DEVICE_BLOCK_BYTES) // row_bytes
    rows = chunk_size or max(fitting, _FEWEST_ROWS)
    return max(1, min(rows, head.num_rows))


def rows_in_cache(head: Head) -> int:
    """Return how many whole rows an elementwise formula should take at a time."""
    if head.device.type != "cpu":
        return max(1, head.num_rows)
    return max(1, _CPU_CACHE_BYTES // (head.vocabulary * head.work_dtype.itemsize))


def empty_rows(rows: int, head: Head) -> Tensor:
    """Return room for whole rows, a little apart so that they share no cache lines' addresses."""
    return head.empty(rows, head.vocabulary + _ROW_PADDING)[:, : head.vocabulary]


def fill_rows(head: Head, row: slice, block: Tensor) -> Tensor:
    """Write the logits of some rows into the first rows of ``block`` and return these."""
    hidden = head.hidden[row].to(head.product_dtype)
    z = block[: hidden.shape[0]]
    for here, weight in head.column_blocks(_columns_of_product(head)):
        head.logits_into(z[:, here], hidden, weight, here)
    return z


class HeadGradients:
    """Gradients of one head, added up over blocks of rows in float32 or better.

    Args:
        head: the head.
        needs: whether ``hidden``, ``weight`` and ``bias`` want a gradient.

    Attributes:
        tensors: the three gradients, ``None`` where none is wanted.
        wanted: whether any of them is.
    """

    def __init__(self, head: Head, needs: tuple[bool, ...]) -> None:
        sources = (head.hidden, head.weight, head.bias)
        self._head = head
        self.wanted = any(needs)
        self.tensors = tuple(
            gradient_buffer(source, head.work_dtype, rows=head.num_rows)
            if need and source is not None
            else None
            for source, need in zip(sources, needs, strict=True)
        )

    def add(self, row: slice, slope: Tensor) -> None:
        """Add what the rows ``row`` give, ``slope`` being the slope of the loss in their logits."""
        if not self.wanted:
            return
        d_hidden, d_weight, d_bias = self.tensors
        hidden = self._head.hidden[row].to(self._head.product_dtype)
        scale, first = 1.0 / self._head.temperature, row.start == 0
        for here, weight in self._head.column_blocks(_columns_of_product(self._head)):
            tile = slope[:, here]
            if d_hidden is not None:
                add_product(d_hidden[row], tile, weight, scale=scale, first=here.start == 0)
            if d_weight is not None:
                add_product(d_weight[here], tile.T, hidden, scale=scale, first=first)
            if d_bias is not None:
                total = tile.sum(0).mul_(scale)
                d_bias[here] = total if first else d_bias[here] + total


def _columns_of_product(head: Head) -> int:
    return _CPU_COLUMNS if head.device.type == "cpu" else head.vocabulary


def check_head(
    prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float
) -> None:
    """Check the shapes and dtypes of one head."""
    names = (f"{prefix}hidden", f"{prefix}weight", f"{prefix}bias")
    check_floating(**{names[0]: hidden, names[1]: weight}, **given(**{names[2]: bias}))
    check_shape(names[0], hidden, (None, None))
    check_shape(names[1], weight, (None, hidden.shape[1]))
    if weight.shape[0] == 0:
        raise ValueError(f"{names[1]} must have at least one row, got {list(weight.shape)}")
    if bias is not None:
        check_shape(names[2], bias, (weight.shape[0],))
    check_range("temperature", temperature, above=0.0, below=float("inf"))


def check_chunk_size(chunk_size: int | None) -> None:
    """Require a positive number of rows, or ``None``."""
    if chunk_size is not None:
        check_count("chunk_size", chunk_size, expected="an integer or None")


def _has_fast_products(dtype: torch.dtype, device: torch.device) -> bool:
    # Matrix units for half precision are the rule on accelerators and the exception on CPUs, where
    # a float32 product of converted blocks is several times faster than a half-precision one.
    return dtype.itemsize >= 4 or device.type != "cpu"
