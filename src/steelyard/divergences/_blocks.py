"""Blocks of rows: how pairwise computations bound their memory."""

from collections.abc import Iterator

from steelyard._checks import check_count

# Entries of one block of pairs. At 4 MB in float64 it stays in cache, which is also fastest.
_BLOCK_ENTRIES = 2**19
# A block has at least so many rows: fewer would read all columns for too little work.
_LEAST_ROWS = 16


def block_rows(columns: int, block_size: int | None = None) -> int:
    """Return how many rows of pairs to hold at once.

    Args:
        columns: number of columns each row is paired with.
        block_size: rows a block, >= 1; ``None`` = as many as make about half a million entries,
            at least 16.

    Raises:
        ValueError: ``block_size`` is less than 1.
    """
    if block_size is None:
        return max(_LEAST_ROWS, _BLOCK_ENTRIES // max(columns, 1))
    check_count("block_size", block_size)
    return block_size


def row_blocks(rows: int, columns: int, block_size: int | None = None) -> Iterator[slice]:
    """Cut ``range(rows)`` into slices, so that a ``[block, columns]`` table stays small.

    Args:
        rows: number of rows to cover.
        columns: number of columns each row is paired with.
        block_size: as in :func:`block_rows`.

    Returns:
        Consecutive slices that cover ``range(rows)`` once; the last may be shorter.

    Raises:
        ValueError: ``block_size`` is less than 1.
    """
    size = block_rows(columns, block_size)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
