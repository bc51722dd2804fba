"""Blocks of rows: how pairwise computations bound their memory."""

from collections.abc import Iterator

from steelyard._checks import check_range

# Entries of one block of pairs. At 4 MB in float64 it stays in cache, which is also fastest.
_BLOCK_ENTRIES = 2**19


def row_blocks(rows: int, columns: int, block_size: int | None = None) -> Iterator[slice]:
    """Cut ``range(rows)`` into slices, so that a ``[block, columns]`` table stays small.

    Args:
        rows: number of rows to cover.
        columns: number of columns each row is paired with.
        block_size: rows a block, >= 1; ``None`` = as many as make about half a million entries.

    Returns:
        Consecutive slices that cover ``range(rows)`` once; the last may be shorter.

    Raises:
        ValueError: ``block_size`` is less than 1.
    """
    size = max(1, _BLOCK_ENTRIES // max(columns, 1)) if block_size is None else block_size
    check_range("block_size", size, at_least=1)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
