"""The bins of one column: how to find the bin of a value, in Python and in SQL."""

import itertools
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steelyard.tabular._columns import Column

__all__ = ["ColumnBins"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ColumnBins:
    """Bins of one column, in the order ordinary, special values, missing.

    Attributes:
        name: of the column.
        numeric: intervals of numbers, or groups of levels.
        cuts: borders of the ordinary bins, ``[J - 1]``; a value on a border belongs to the left.
        levels: the levels of each ordinary bin, for a categorical column.
        special: values that have a bin of their own.
        has_missing: whether there is a bin for missing values.
        good: goods in each bin, ``[J]``, without smoothing.
        bad: bads in each bin, ``[J]``.
        woe: weight of evidence of each bin, ``[J]``.
        iv: information value.
    """

    name: str
    numeric: bool
    cuts: Array
    levels: tuple[tuple[Any, ...], ...]
    special: tuple[Any, ...]
    has_missing: bool
    good: Array
    bad: Array
    woe: Array
    iv: float

    def num_ordinary(self) -> int:
        """Return the number of bins that are neither special nor missing."""
        return len(self.good) - len(self.special) - self.has_missing

    def index(self, column: Column) -> NDArray[np.int64]:
        """Return the bin of each value, -1 where there is none for it."""
        if column.numeric != self.numeric and len(column.values):
            kinds = {True: "numbers", False: "levels"}
            raise TypeError(
                f"X: column {self.name!r} must hold {kinds[self.numeric]} as in fit, got "
                f"{kinds[column.numeric]}"
            )
        missing = column.missing()
        if self.numeric:
            code = np.searchsorted(self.cuts, column.values, side="left").astype(np.int64)
            if self.num_ordinary() == 0:
                code[:] = -1
        else:
            bins = {level: i for i, group in enumerate(self.levels) for level in group}
            values = column.values.tolist()
            code = np.array([bins.get(value, -1) for value in values], dtype=np.int64)
        for place, value in enumerate(self.special, start=self.num_ordinary()):
            code[column.values == value] = place
        code[missing] = len(self.good) - 1 if self.has_missing else -1
        return code

    def labels(self) -> list[str]:
        """Return a readable name of each bin."""
        if self.numeric:
            borders = [-np.inf, *self.cuts, np.inf]
            ordinary = [
                f"({low:.6g}, {high:.6g}]" if high < np.inf else f"({low:.6g}, inf)"
                for low, high in itertools.pairwise(borders)
            ][: self.num_ordinary()]
        else:
            ordinary = [", ".join(map(str, group)) for group in self.levels]
        missing = ["missing"] if self.has_missing else []
        return [*ordinary, *(f"= {value}" for value in self.special), *missing]

    def sql(self, *, otherwise: str = "NULL") -> str:
        """Return the WoE as a ``CASE`` expression of standard SQL, for scoring in a database."""
        field = quoted(self.name)
        missing = repr(float(self.woe[-1])) if self.has_missing else otherwise
        absent = f"{field} IS NULL" + (f" OR isnan({field})" if self.numeric else "")
        lines = [f"WHEN {absent} THEN {missing}"]
        ordinary = self.num_ordinary()
        for value, woe in zip(self.special, self.woe[ordinary:], strict=False):
            lines.append(f"WHEN {field} = {literal(value)} THEN {float(woe)!r}")
        if self.numeric:
            for cut, woe in zip(self.cuts, self.woe, strict=False):
                lines.append(f"WHEN {field} <= {float(cut)!r} THEN {float(woe)!r}")
            last = repr(float(self.woe[ordinary - 1])) if ordinary else otherwise
        else:
            for group, woe in zip(self.levels, self.woe, strict=False):
                members = ", ".join(map(literal, group))
                lines.append(f"WHEN {field} IN ({members}) THEN {float(woe)!r}")
            last = otherwise
        return f"CASE {' '.join(lines)} ELSE {last} END"

    def to_dict(self) -> dict[str, Any]:
        """Return the bins as plain lists, numbers and strings."""
        state = asdict(self)
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in state.items()}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "ColumnBins":
        """Rebuild bins from :meth:`to_dict`."""
        arrays = {key: np.array(state[key], dtype=float) for key in ("cuts", "good", "bad", "woe")}
        levels = tuple(tuple(group) for group in state["levels"])
        return cls(**{**state, **arrays, "levels": levels, "special": tuple(state["special"])})


def quoted(name: str) -> str:
    """Quote an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(value: Any) -> str:
    """Write a level as an SQL literal."""
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return repr(value)
