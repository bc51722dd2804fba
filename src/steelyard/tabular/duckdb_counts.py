"""Bin counts computed inside DuckDB: a table of any size becomes a few hundred numbers.

Aggregate queries read each needed column once. Sources are the path of a Parquet file (or a
glob of several) or a DuckDB relation. Counts add across tables and machines, so the statistics of
this package work on the sum of such results from anywhere.
"""

from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steelyard._checks import check_count, check_range
from steelyard._extras import require
from steelyard.tabular._columns import check_names
from steelyard.tabular._prebins import quantile_cuts
from steelyard.tabular.column_bins import quoted
from steelyard.tabular.drift import PSITest, psi_test

__all__ = ["duckdb_bin_counts", "duckdb_cuts", "duckdb_level_counts", "duckdb_psi"]

Array = NDArray[np.float64]
_FEW_CUTS = 32  # up to here comparing with every cut is faster than DuckDB's histogram
_FLOATS = ("FLOAT", "DOUBLE")
_COLUMNS = 20  # of a file in one query: the counters of more outgrow the processor's cache


def duckdb_bin_counts(
    source: Any, cuts: Mapping[str, Any], *, by: str | None = None
) -> dict[str, Array]:
    """Count the rows of each bin of many columns, each column read once.

    Args:
        source: path of a Parquet file, or a DuckDB relation.
        cuts: for each numeric column its cuts in rising order, ``[J - 1]``; a value on a cut
            belongs to the left bin.
        by: column of two values, for example the outcome; its larger value is the second.

    Returns:
        For each column the counts ``[J + 1]``, the missing values (NULL and NaN) last; with ``by``
        ``[J + 1, 2]``.

    Raises:
        ValueError: an unknown column, cuts that do not rise, ``by`` without two values or with
            missing ones.
        ModuleNotFoundError: DuckDB is not installed.

    Example:
        >>> import duckdb
        >>> table = duckdb.sql("SELECT range::DOUBLE AS age, range % 2 AS y FROM range(100)")
        >>> duckdb_bin_counts(table, {"age": [9, 49]}, by="y")["age"]
        array([[ 5.,  5.],
               [20., 20.],
               [25., 25.],
               [ 0.,  0.]])

    Source: counts are all that WoE, IV, PSI and their inference need; Sudjianto, Burakov (2025),
    arXiv:2509.09855.
    """
    if not isinstance(cuts, Mapping):
        raise TypeError(f"cuts must map column names to cuts, got {type(cuts).__name__}")
    relation = open_relation(source)
    kinds = _column_kinds(relation, cuts=cuts, by=[] if by is None else [by])
    checked = {name: _check_cuts(name, values) for name, values in cuts.items()}
    # each query reads its own columns of a file; a relation may be dear to evaluate twice
    size = _COLUMNS if isinstance(source, str | Path) else max(len(checked), 1)
    names = list(checked)
    result: dict[str, Array] = {}
    for start in range(0, max(len(names), 1), size):
        some = {name: checked[name] for name in names[start : start + size]}
        result |= _counted(relation, some, kinds, by)
    return result


def _counted(
    relation: Any, cuts: Mapping[str, Array], kinds: Mapping[str, str], by: str | None
) -> dict[str, Array]:
    """Count the bins of a few columns in one query."""
    parts, widths = ["count(*)"], []
    for name, borders in cuts.items():
        columns = _counters(name, borders, floating=kinds[name] in _FLOATS)
        parts += columns
        widths.append(len(columns))
    rows = grouped_rows(relation, parts, by)
    result = {}
    place = 1
    for (name, borders), width in zip(cuts.items(), widths, strict=True):
        cells = [_from_counters(row[0], row[place : place + width], borders) for row in rows]
        result[name] = np.stack(cells, axis=1) if by is not None else cells[0]
        place += width
    return result


def duckdb_psi(
    base: Any,
    current: Any,
    columns: Sequence[str] | None = None,
    *,
    num_bins: int = 10,
    alpha: float = 0.05,
    smoothing: float = 0.5,
    cuts: Mapping[str, Any] | None = None,
) -> dict[str, PSITest]:
    """Test every numeric column of a table for drift against a base table, each column read once.

    Missing values are a bin of their own wherever one of the tables has some.

    Args:
        base: path of a Parquet file or a DuckDB relation.
        current: the same columns later.
        columns: names; ``None`` = all numeric columns that both have.
        num_bins: bins of about equal size in ``base``, >= 2.
        alpha: level of each test, in (0, 1).
        smoothing: added to every cell, >= 0.
        cuts: cuts for each column, to keep those of an earlier period; ``None`` = quantiles of a
            sample of ``base``, see :func:`duckdb_cuts`.

    Returns:
        A :class:`PSITest` for each column with at least two bins.

    Raises:
        ValueError: unknown columns, or a setting out of range.
        ModuleNotFoundError: DuckDB is not installed.

    Example:
        >>> import duckdb
        >>> base = duckdb.sql("SELECT range AS x, range % 7 AS z FROM range(5000)")
        >>> later = duckdb.sql("SELECT range * 1.2 AS x, range % 7 AS z FROM range(5000)")
        >>> {name: round(test.p_value, 3) for name, test in duckdb_psi(base, later).items()}
        {'x': 0.0, 'z': 1.0}

    Source: :func:`psi_test`.
    """
    check_count("num_bins", num_bins, at_least=2)
    check_range("alpha", alpha, above=0.0, below=1.0)
    first, second = open_relation(base, name="base"), open_relation(current, name="current")
    if columns is not None:
        _column_kinds(first, columns=columns)
        _column_kinds(second, columns=columns)
    else:
        both = set(second.columns)
        columns = [name for name in numeric_columns(first) if name in both]
    if cuts is None:
        cuts = duckdb_cuts(first, columns, num_bins=num_bins)
    cuts = {name: cuts[name] for name in columns}
    before, after = duckdb_bin_counts(base, cuts), duckdb_bin_counts(current, cuts)
    result = {}
    for name in columns:
        p, q = before[name], after[name]
        kept = np.arange(len(p)) < (len(p) if p[-1] + q[-1] > 0 else len(p) - 1)
        if kept.sum() > 1:
            result[name] = psi_test(p[kept], q[kept], alpha, smoothing=smoothing)
    return result


def duckdb_cuts(
    source: Any,
    columns: Sequence[str],
    *,
    num_bins: int = 10,
    sample_rows: int = 20_000,
    seed: int = 0,
) -> dict[str, Array]:
    """Place cuts near the quantiles of numeric columns, from a random sample of the rows.

    Args:
        source: path of a Parquet file or a DuckDB relation.
        columns: numeric columns.
        num_bins: number of bins of about equal size, >= 1.
        sample_rows: rows to draw, about; the sample is what enters Python.
        seed: of the sample; repeatable on one thread.

    Returns:
        Cuts per column, at most ``num_bins - 1``.

    Raises:
        ValueError: an unknown column or a setting out of range.
        ModuleNotFoundError: DuckDB is not installed.

    Example:
        >>> import duckdb
        >>> duckdb_cuts(duckdb.sql("SELECT range AS x FROM range(8)"), ["x"], num_bins=4)["x"]
        array([1.5, 3.5, 5.5])
    """
    check_count("num_bins", num_bins)
    check_count("sample_rows", sample_rows)
    relation = open_relation(source)
    _column_kinds(relation, columns=columns)
    if len(columns) == 0:
        return {}
    total = relation.aggregate("count(*)").fetchall()[0][0]
    names = ", ".join(f"{quoted(name)}::DOUBLE AS c{i}" for i, name in enumerate(columns))
    query = f"SELECT {names} FROM source"  # nosec B608  # names are quoted
    if total > sample_rows:
        query += f" USING SAMPLE {100 * sample_rows / total} PERCENT (bernoulli, {int(seed)})"
    sample = relation.query("source", query).fetchnumpy()
    cuts = {}
    for i, name in enumerate(columns):
        values = np.ma.filled(np.ma.asarray(sample[f"c{i}"], dtype=np.float64), np.nan)
        values = np.sort(values[np.isfinite(values)])
        cuts[name] = quantile_cuts(values, num_bins) if len(values) else np.empty(0)
    return cuts


def duckdb_level_counts(
    source: Any, columns: Sequence[str], *, by: str
) -> dict[str, tuple[list[Any], Array]]:
    """Count the rows of each level of columns of text, for both values of ``by``, in one scan.

    Returns:
        For each column its levels and the counts ``[L + 1, 2]``, missing values last.

    Raises:
        TypeError: ``columns`` or ``by`` are no names, or ``source`` is of another kind.
        ValueError: an unknown column, or ``by`` without two values or with missing ones.
        ModuleNotFoundError: DuckDB is not installed.
    """
    relation = open_relation(source)
    _column_kinds(relation, columns=columns, by=[by])
    parts = ["count(*)", *(f"histogram({quoted(name)})" for name in columns)]
    rows = grouped_rows(relation, parts, by)
    result = {}
    for place, name in enumerate(columns, start=1):
        tables = [row[place] or {} for row in rows]
        levels = sorted({*tables[0], *tables[1]}, key=str)
        counts = np.array([[t.get(level, 0) for t in tables] for level in levels], dtype=float)
        counts = counts.reshape(-1, 2)
        missing = np.array([[row[0] for row in rows]], dtype=float) - counts.sum(0)
        result[name] = (levels, np.concatenate([counts, missing]))
    return result


def open_relation(source: Any, *, name: str = "source") -> Any:
    """Open a Parquet file, or pass a relation through.

    Raises:
        ValueError: there is no such file, or it is damaged.
        TypeError: neither a path nor a relation.
    """
    duckdb = require("duckdb", extra="tabular")
    if isinstance(source, str | Path):
        try:
            return duckdb.read_parquet(str(source))
        except duckdb.Error as error:
            reason = str(error).split("\n", 1)[0]
            raise ValueError(f"{name} must be a Parquet file, got {source}: {reason}") from error
    if not hasattr(source, "aggregate") or not hasattr(source, "columns"):
        raise TypeError(
            f"{name} must be the path of a Parquet file or a DuckDB relation, got "
            f"{type(source).__name__}"
        )
    return source


def numeric_columns(relation: Any) -> list[str]:
    """Return the names of the columns that hold numbers."""
    numbers = ("INT", "FLOAT", "DOUBLE", "DECIMAL", "HUGEINT")
    kinds = zip(relation.columns, relation.types, strict=True)
    return [name for name, kind in kinds if any(word in str(kind) for word in numbers)]


def grouped_rows(relation: Any, parts: list[str], by: str | None) -> list[tuple[Any, ...]]:
    """Evaluate aggregates over all rows, or over the rows of each of the two values of ``by``."""
    query = ", ".join(f"{part} AS a{i}" for i, part in enumerate(parts))
    if by is None:
        rows: list[tuple[Any, ...]] = relation.aggregate(query).fetchall()
        return rows
    group = quoted(by)
    rows = relation.aggregate(f"{group} AS by_value, {query}", group).fetchall()
    values = [row[0] for row in rows]
    if any(value is None or (isinstance(value, float) and isnan(value)) for value in values):
        raise ValueError(f"column {by!r} must not have missing values")
    if len(values) != 2:
        raise ValueError(f"column {by!r} must hold two classes, got {sorted(values)[:10]}")
    return [row[1:] for row in sorted(rows)]


def _column_kinds(relation: Any, **names: Any) -> dict[str, str]:
    """Types of all columns; the names that an argument gives must be among them."""
    kinds = dict(zip(relation.columns, map(str, relation.types), strict=True))
    for argument, given in names.items():
        check_names(argument, given)
        if unknown := [name for name in given if name not in kinds]:
            raise ValueError(
                f"{argument}: the source has no column {unknown}; it has {list(kinds)[:20]}"
            )
    return kinds


def _check_cuts(name: str, values: Any) -> Array:
    borders = np.asarray(values, dtype=np.float64)
    if borders.ndim != 1 or not np.isfinite(borders).all() or (np.diff(borders) <= 0).any():
        raise ValueError(f"cuts of {name!r} must be finite and rising, got {borders.tolist()}")
    return borders


def _counters(name: str, borders: Array, *, floating: bool) -> list[str]:
    """Aggregates of one column: rows with a value, then what is at or below the cuts."""
    field = quoted(name)
    clean = f"CASE WHEN isnan({field}) THEN NULL ELSE {field} END" if floating else field
    present = f"count({field})" + (f" - count_if(isnan({field}))" if floating else "")
    if len(borders) <= _FEW_CUTS:  # NaN is above every number there
        return [present, *(f"count_if({field} <= {cut!r})" for cut in borders.tolist())]
    listed = ", ".join(f"{cut!r}::DOUBLE" for cut in borders.tolist())
    return [present, f"histogram(({clean})::DOUBLE, [{listed}])"]


def _from_counters(rows: int, cells: tuple[Any, ...], borders: Array) -> Array:
    present = float(cells[0] or 0)
    if len(borders) <= _FEW_CUTS:
        below = np.array([cell or 0 for cell in cells[1:]], dtype=np.float64)
    else:
        found = cells[1] or {}
        below = np.cumsum([float(found.get(cut, 0)) for cut in borders.tolist()])
    return np.diff(np.concatenate([[0.0], below, [present, float(rows)]]))
