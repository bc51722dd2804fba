"""Columns of arrays and of pandas and polars frames, without requiring either package."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Column", "as_numbers", "check_names", "check_rows", "is_frame", "read_columns"]


@dataclass(frozen=True)
class Column:
    """One feature: floats with NaN for missing, or levels as objects with ``None`` for missing."""

    name: str
    numeric: bool
    values: NDArray[Any]

    def missing(self) -> NDArray[np.bool_]:
        """Tell which values are missing."""
        if self.numeric:
            nan: NDArray[np.bool_] = np.isnan(self.values)
            return nan
        return np.array([value is None for value in self.values.tolist()], dtype=bool)


def check_rows(**tables: Any) -> None:
    """Require arrays, frames or sequences, which have rows."""
    for name, table in tables.items():
        if not hasattr(table, "__len__") or getattr(table, "shape", None) == ():
            raise TypeError(f"{name} must have rows, got {type(table).__name__}")


def as_numbers(name: str, values: Any) -> NDArray[np.float64]:
    """Read an array, a tensor or a nested sequence as real numbers, whatever its shape."""
    try:
        if isinstance(values, Tensor) and not values.is_complex():
            values = values.detach().double().numpy(force=True)
        if not np.iscomplexobj(values):
            return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must hold numbers: {error}") from None
    raise TypeError(f"{name} must hold real numbers, got complex ones")


def check_names(argument: str, names: Any) -> None:
    """Require a sequence or a mapping of names, each of them text."""
    if not isinstance(names, Sequence | Mapping) or isinstance(names, str):
        raise TypeError(f"{argument} must be column names, got {type(names).__name__}")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{argument} must be column names, got {name!r}")


def is_frame(X: Any) -> bool:
    """Tell whether ``X`` is a pandas or polars frame."""
    return hasattr(X, "columns") and hasattr(X, "shape") and not isinstance(X, np.ndarray)


def read_columns(X: Any, categorical: Sequence[str | int] | None = None) -> list[Column]:
    """Split an array or a frame into columns.

    Raises:
        ValueError: duplicated names, infinite numbers, or an unknown name in ``categorical``.
        TypeError: a column that holds neither numbers nor levels.
    """
    if is_frame(X):
        names = [str(name) for name in X.columns]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"X must have distinct column names, got {repeated} more than once")
        polars = type(X).__module__.partition(".")[0] == "polars"
        pick = X.get_column if polars else X.__getitem__
        parts = [pick(name) for name in X.columns]
    else:
        names = [f"x{i}" for i in range(X.shape[1])]
        polars, parts = False, list(X.T)
    chosen = _chosen(names, categorical)
    read = _from_polars if polars else _from_array_like
    return [
        _checked(name, read(part, name, levels=name in chosen))
        for name, part in zip(names, parts, strict=True)
    ]


def _chosen(names: list[str], categorical: Sequence[str | int] | None) -> set[str]:
    chosen = set()
    for item in categorical or ():
        known = item in names if isinstance(item, str) else -len(names) <= item < len(names)
        if not known:
            raise ValueError(f"categorical names a column that X does not have: {item!r}")
        chosen.add(item if isinstance(item, str) else names[item])
    return chosen


def _from_polars(series: Any, name: str, *, levels: bool) -> NDArray[Any]:
    kind = str(series.dtype)
    if (series.dtype.is_numeric() or kind == "Boolean") and not levels:
        return np.asarray(series.cast(float).to_numpy(), dtype=np.float64)
    if not series.dtype.is_numeric() and not kind.startswith(
        ("Bool", "String", "Categorical", "Enum", "Null", "Object")
    ):
        raise TypeError(f"X: column {name!r} must hold numbers or levels, got dtype {kind}")
    return _levels(series.to_list(), name)


def _from_array_like(part: Any, name: str, *, levels: bool) -> NDArray[Any]:
    kind = getattr(part.dtype, "kind", "O")
    if kind in "iufb" and not levels:
        if isinstance(part, np.ndarray):
            return np.asarray(part, dtype=np.float64)
        return np.asarray(part.to_numpy(dtype=np.float64, na_value=np.nan))
    if kind in "mMcV":
        raise TypeError(f"X: column {name!r} must hold numbers or levels, got dtype {part.dtype}")
    items = part.tolist()
    if not isinstance(part, np.ndarray):  # pandas marks missing values in several ways
        items = [None if gone else item for item, gone in zip(items, part.isna(), strict=True)]
    types = {type(item) for item in items} - {type(None)}
    numbers = all(issubclass(t, int | float | np.number | np.bool_) for t in types)
    if numbers and types and not levels:
        return np.array([np.nan if item is None else item for item in items], dtype=np.float64)
    return _levels(items, name)


def _levels(items: list[Any], name: str) -> NDArray[Any]:
    result = np.empty(len(items), dtype=object)
    result[:] = items
    for kind in {type(item) for item in items}:
        if issubclass(kind, float | np.floating):
            result[[isinstance(item, kind) and math.isnan(item) for item in items]] = None
        elif issubclass(kind, np.generic):
            result[:] = [item.item() if isinstance(item, kind) else item for item in result]
        elif not issubclass(kind, str | int | type(None)):
            raise TypeError(
                f"X: column {name!r}: argument must be a string or a number, got {kind.__name__}"
            )
    return result


def _checked(name: str, values: NDArray[Any]) -> Column:
    numeric = values.dtype != object
    if numeric and np.isinf(values).any():
        raise ValueError(
            f"X: column {name!r} contains infinity; NaN means missing, infinity does not"
        )
    return Column(name, numeric, values)
