"""Protected attributes of any type, as numbers that distances can be taken of.

A two-valued attribute becomes 0/1, a category one column for each level, a continuous attribute its
place between its smallest and largest value. A category is never its integer code: codes would say
that level 2 is farther from level 0 than level 1 is.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steelyard._checks import check_count

__all__ = ["encode_sensitive", "intersectional_groups"]

_CATEGORY_DTYPES = ("category", "categorical", "enum")


class _Column(NamedTuple):
    values: NDArray[Any]  # float64 if continuous, else the index of the level
    levels: list[str] | None  # None: continuous


def encode_sensitive(
    sensitive: Any, *, categorical: Collection[str | int] | None = None
) -> dict[str, Tensor]:
    """Turn protected attributes of any type into tensors for a penalty.

    Two distinct values become 0/1, a category one column per level, a continuous attribute is
    scaled to [0, 1]. Strings, booleans and categorical dtypes are categories; numbers are
    continuous unless named in ``categorical``.

    Args:
        sensitive: frame (pandas, polars), series, mapping from names to arrays, ``[N]`` (one
            attribute) or ``[N, d]`` (a column for each).
        categorical: names of numeric attributes that are codes of categories; positions if the
            attributes have no names.

    Returns:
        A tensor ``[N, levels]`` or ``[N, 1]`` in float64 for each attribute, by name.

    Raises:
        ValueError: empty, of different lengths, repeated names, missing or infinite values, or a
            name in ``categorical`` that is not there.

    Example:
        >>> encoded = encode_sensitive({"sex": ["f", "m", "f"], "age": [20, 60, 30]})
        >>> encoded["sex"].squeeze().tolist(), encoded["age"].squeeze().tolist()
        ([0.0, 1.0, 0.0], [0.0, 1.0, 0.25])
        >>> encode_sensitive(["a", "b", "c"])["0"].tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]

    Source: Lee et al. (2025), arXiv:2509.08163.
    """
    return {name: _encode(column) for name, column in _columns(sensitive, categorical).items()}


def intersectional_groups(
    sensitive: Any, *, bins: int = 4, categorical: Collection[str | int] | None = None
) -> NDArray[np.str_]:
    """Name the cell of each item: its combination of all protected attributes.

    Args:
        sensitive: as in :func:`encode_sensitive`.
        bins: a continuous attribute is cut at its quantiles into at most this many bins, at least
            1.
        categorical: as in :func:`encode_sensitive`.

    Returns:
        Labels ``[N]``, only of cells that occur.

    Raises:
        ValueError: as :func:`encode_sensitive`, or ``bins`` below 1.
        TypeError: ``bins`` is no integer.

    Example:
        >>> cells = intersectional_groups({"sex": ["f", "m", "f"], "age": [20, 60, 30]}, bins=2)
        >>> cells.tolist()
        ['sex=f, age=[20, 30)', 'sex=m, age=[30, 60]', 'sex=f, age=[30, 60]']
    """
    check_count("bins", bins)
    parts = [
        _labels(name, column, bins) for name, column in _columns(sensitive, categorical).items()
    ]
    return np.array([", ".join(cell) for cell in zip(*parts, strict=True)])


def cell_index(groups: Any, n: int, name: str = "groups") -> tuple[NDArray[np.int64], int]:
    """Number the groups of ``n`` items: labels ``[n]``, or the rows of ``[n, d]``."""
    labels = np.asarray(groups, dtype=object if isinstance(groups, list | tuple) else None)
    if labels.ndim not in {1, 2} or len(labels) != n:
        raise ValueError(f"{name} must have shape [{n}] or [{n}, d], got {list(labels.shape)}")
    index = np.zeros(n, dtype=np.int64)
    for column in labels.reshape(n, -1).T:
        missing = [_is_missing(label) for label in column.tolist()]
        if any(missing):
            raise ValueError(f"{name} must not be missing, got {sum(missing)} of {n} without one")
        level = _levels(column)[1]
        index = np.unique(index * (level.max() + 1) + level, return_inverse=True)[1]
    return index, int(index.max()) + 1


def _columns(sensitive: Any, categorical: Collection[str | int] | None) -> dict[str, _Column]:
    marked = {str(name) for name in categorical or ()}
    raw = _raw_columns(sensitive)
    if unknown := sorted(marked - raw.keys()):
        raise ValueError(f"categorical names {unknown}, but sensitive has {sorted(raw)}")
    columns: dict[str, _Column] = {}
    length: int | None = None
    for name, values in raw.items():
        column = _typed(name, values, category=name in marked)
        length = len(column.values) if length is None else length
        if len(column.values) != length:
            raise ValueError(
                f"sensitive[{name!r}] must have {length} items like the first attribute, "
                f"got {len(column.values)}"
            )
        columns[name] = column
    if not length:
        raise ValueError("sensitive must hold at least one attribute and one item, got none")
    return columns


def _raw_columns(sensitive: Any) -> dict[str, Any]:
    if isinstance(sensitive, Mapping):
        return {str(name): values for name, values in sensitive.items()}
    if hasattr(sensitive, "columns"):
        names = [str(name) for name in sensitive.columns]
        if len(set(names)) < len(names):
            raise ValueError(f"sensitive must not repeat a column name, got {names}")
        return dict(zip(names, (sensitive[name] for name in sensitive.columns), strict=True))
    if isinstance(sensitive, Tensor):
        sensitive = sensitive.detach().numpy(force=True)
    if getattr(sensitive, "ndim", None) == 1 or hasattr(sensitive, "to_numpy"):
        return {str(getattr(sensitive, "name", None) or 0): sensitive}
    # object keeps strings and numbers apart that share a list
    table = sensitive if isinstance(sensitive, np.ndarray) else np.array(sensitive, dtype=object)
    if table.ndim == 1:
        return {"0": table}
    if table.ndim != 2:
        raise ValueError(f"sensitive must have shape [N] or [N, d], got {list(table.shape)}")
    return {str(k): table[:, k] for k in range(table.shape[1])}


def _typed(name: str, values: Any, *, category: bool) -> _Column:
    dtype = str(getattr(values, "dtype", "")).lower()
    category = category or dtype.startswith(_CATEGORY_DTYPES)
    array = np.asarray(values, dtype=object if isinstance(values, list | tuple) else None)
    array = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if array.ndim != 1:
        raise ValueError(f"sensitive[{name!r}] must have shape [N], got {list(array.shape)}")
    items = array.tolist()
    if missing := sum(map(_is_missing, items)):
        raise ValueError(
            f"sensitive[{name!r}] must not be missing, got {missing} of {len(items)} without a "
            "value; drop those rows or give them a category of their own"
        )
    numeric = all(isinstance(item, int | float) and not isinstance(item, bool) for item in items)
    if category or not numeric or len(set(items)) <= 2:
        levels, index = _levels(array)
        return _Column(index, levels)
    numbers = array.astype(np.float64)
    if not np.isfinite(numbers).all():
        raise ValueError(f"sensitive[{name!r}] must be finite, got infinite values")
    return _Column(numbers, None)


def _is_missing(item: object) -> bool:
    absent = item is None or type(item).__name__ in {"NAType", "NaTType"}
    return absent or (isinstance(item, float) and math.isnan(item))


def _levels(column: NDArray[Any]) -> tuple[list[str], NDArray[np.int64]]:
    # mixed types have no order of their own, so labels that are objects are ordered as text
    labels = column if column.dtype != object else [str(item) for item in column.tolist()]
    levels, index = np.unique(labels, return_inverse=True)
    return [str(level) for level in levels.tolist()], index.astype(np.int64)


def _encode(column: _Column) -> Tensor:
    values, levels = column
    if levels is not None and len(levels) > 2:
        return torch.from_numpy(np.eye(len(levels))[values])
    low, high = values.min(), values.max()
    scaled = (values - low) / (high - low) if high > low else np.zeros(len(values))
    return torch.from_numpy(np.asarray(scaled, dtype=np.float64))[:, None]


def _labels(name: str, column: _Column, bins: int) -> list[str]:
    values, levels = column
    if levels is not None:
        return [f"{name}={levels[k]}" for k in values]
    edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1), method="higher"))
    if len(edges) < 3:  # one bin, or one value
        return [f"{name}=[{edges[0]:g}, {edges[-1]:g}]"] * len(values)
    place = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    last = len(edges) - 2
    return [f"{name}=[{edges[k]:g}, {edges[k + 1]:g}{']' if k == last else ')'}" for k in place]


def spread_rows(
    strata: NDArray[np.int64], share: float, generator: torch.Generator
) -> NDArray[np.bool_]:
    """Mark a random ``share`` of the rows, the same share of each stratum as far as it goes."""
    order = shuffled_by_stratum(strata, generator)
    place = np.arange(1, len(order) + 1)
    marked = np.zeros(len(order), dtype=bool)
    marked[order] = np.floor(place * share) > np.floor((place - 1) * share)
    return marked


def shuffled_by_stratum(strata: NDArray[np.int64], generator: torch.Generator) -> NDArray[np.int64]:
    """Order the rows by stratum, at random within each."""
    shuffled = torch.randperm(len(strata), generator=generator).numpy()
    order: NDArray[np.int64] = shuffled[np.argsort(strata[shuffled], kind="stable")]
    return order
