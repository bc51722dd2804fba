"""Information values and drift of many columns of a large Parquet file, with given bins."""

import atexit
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paired import OURS, Contest, Run

CUTS = np.arange(100, 1000, 100) - 0.5  # ten bins: those of the scorecard in use
CHECKED = 20_000
WRITE = """
import duckdb, sys
path, rows, columns, shift = sys.argv[1], *map(int, sys.argv[2:])
duckdb.sql("SET threads=1; SELECT setseed(0.5)")
value = f"(1000 * random() ** (1 + {shift} / 100.0))::INT::FLOAT"
each = [f"CASE WHEN random() < 0.03 THEN NULL ELSE {value} END AS x{i}" for i in range(columns)]
table = f"SELECT (random() < 0.2)::INT AS y, {', '.join(each)} FROM range({rows})"
duckdb.sql(f"COPY ({table}) TO '{path}' (FORMAT parquet)")
"""


def contest(task: str, rows: int, columns: int) -> Contest:
    """``task`` is ``"parquet_iv"``, or ``"parquet_psi"`` from the first to the second half.

    DuckDB's threads do not survive a fork, so warming up only loads the packages.
    """
    folder = Path(tempfile.mkdtemp(prefix="benchmark-tabular-"))
    atexit.register(shutil.rmtree, folder)  # forks end without it
    runs = runs_of(task, written(folder, "full", rows // 2, columns), columns)
    few = runs_of(task, written(folder, "small", CHECKED, columns), columns)
    return Contest(runs, lambda: errors(few), dict.fromkeys(runs, loaded))


def written(folder: Path, name: str, rows: int, columns: int) -> list[Path]:
    """Two files of as many rows, the second a little lower; by a process of its own."""
    paths = [folder / f"{name}-{half}.parquet" for half in (0, 1)]
    for half, path in enumerate(paths):
        numbers = map(str, (rows, columns, half))
        subprocess.run([sys.executable, "-c", WRITE, str(path), *numbers], check=True)
    return paths


def loaded() -> None:
    import duckdb  # noqa: F401
    import optbinning  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    import steelyard.tabular  # noqa: F401


def runs_of(task: str, paths: list[Path], columns: int) -> dict[str, Run]:
    names = [f"x{i}" for i in range(columns)]
    psi = task == "parquet_psi"

    def ours() -> list[float]:
        import duckdb

        from steelyard.tabular import duckdb_bin_counts, duckdb_psi, woe_table

        duckdb.sql("SET threads=1")
        cuts = dict.fromkeys(names, CUTS)
        if psi:
            found = duckdb_psi(*paths, names, cuts=cuts, smoothing=0.0)
            return [found[name].psi for name in names]
        counts = duckdb_bin_counts(
            paths[0].parent / f"{paths[0].stem[:-2]}-*.parquet", cuts, by="y"
        )
        return [woe_table(*counts[name].T).iv for name in names]

    def pandas(read: list[list[str]]) -> list[float]:
        """Read some columns at a time and count them with NumPy."""
        values = []
        if not psi:
            y = np.concatenate([frame["y"].to_numpy() for frame in frames(["y"])])
        for some in read:
            parts = frames(some)
            for name in (name for name in some if name != "y"):
                codes = [codes_of(part[name].to_numpy()) for part in parts]
                if psi:
                    cells = np.stack([np.bincount(code, minlength=len(CUTS) + 2) for code in codes])
                else:
                    both = np.concatenate(codes) + (len(CUTS) + 2) * y
                    cells = np.bincount(both, minlength=2 * len(CUTS) + 4).reshape(2, -1)
                values.append(information(cells))
        return values

    def frames(some: list[str]) -> list[Any]:
        import pandas

        return [pandas.read_parquet(path, columns=some) for path in paths]

    def optbinning() -> list[float]:
        import optbinning

        parts = frames(names if psi else [*names, "y"])
        values = []
        for name in names:
            x = np.concatenate([part[name].to_numpy() for part in parts])
            # the drift of a sample is the information that the values have on the sample
            label = [
                np.full(len(part), half) if psi else part["y"] for half, part in enumerate(parts)
            ]
            found = optbinning.OptimalBinning(
                user_splits=CUTS,
                user_splits_fixed=[True] * len(CUTS),
                min_bin_size=None,
                max_n_bins=20,
                monotonic_trend=None,
            ).fit(x, np.concatenate(label))
            found.binning_table.build()
            values.append(float(found.binning_table.iv))
        return values

    whole = [names if psi else [*names, "y"]]
    runs = {
        OURS: ours,
        "pandas, whole table": lambda: pandas(whole),
        "pandas, a column at a time": lambda: pandas([[name] for name in names]),
    }
    return runs | ({"optbinning": optbinning} if columns <= 5 else {})  # slow at this size


def codes_of(values: NDArray[Any]) -> NDArray[np.int64]:
    codes = np.searchsorted(CUTS, values, side="left")
    codes[np.isnan(values)] = len(CUTS) + 1
    return codes


def information(cells: NDArray[Any]) -> float:
    p, q = cells / cells.sum(1, keepdims=True)
    return float(((p - q) * np.log(p / q)).sum())


def errors(runs: dict[str, Run]) -> dict[str, float]:
    """Largest difference of a value, on a small file of the same kind."""
    found = {name: np.array(run()) for name, run in runs.items()}
    result = {name: float(np.abs(v / found[OURS] - 1).max()) for name, v in found.items()}
    if max(result.values()) > 1e-9:
        raise AssertionError(f"the values differ: {result}")
    return result
