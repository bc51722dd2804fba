"""An index of all runs of this user: one small SQLite file.

The index is a convenience. A run's folder holds everything; a run never stops because the index
is missing, locked, damaged or not writable.
"""

import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import platformdirs

from steelyard.lab.storage import LabError

HOME_VARIABLE = "STEELYARD_HOME"
WAIT_SECONDS = 5.0

_TABLE = """
CREATE TABLE IF NOT EXISTS runs (
    folder TEXT PRIMARY KEY,
    recipe TEXT NOT NULL,
    form TEXT NOT NULL,
    started TEXT NOT NULL,
    status TEXT NOT NULL,
    seeds INTEGER NOT NULL,
    verdicts TEXT NOT NULL,
    wall_seconds REAL NOT NULL
)
"""
_COLUMNS = "folder, recipe, form, started, status, seeds, verdicts, wall_seconds"


class IndexUnavailableError(LabError):
    """The index cannot be used; the message names its file and the reason."""


def index_path() -> Path:
    """Where the index is: below ``STEELYARD_HOME`` if set, else the user's data folder."""
    home = os.environ.get(HOME_VARIABLE)
    return (Path(home) if home else platformdirs.user_data_path("steelyard")) / "runs.sqlite"


def record_run(
    *,
    folder: Path,
    recipe: str,
    form: str,
    started: str,
    status: str,
    seeds: int,
    verdicts: Sequence[str] = (),
    wall_seconds: float = 0.0,
) -> None:
    """Write or replace the row of a run's folder.

    Args:
        folder: the run's folder; stored as an absolute path.
        recipe: its recipe.
        form: ``"quick"`` or ``"full"``.
        started: ISO time.
        status: ``"running"``, ``"stopped"``, ``"failed"`` or ``"finished"``. A killed run stays
            ``"running"``.
        seeds: number of seeds.
        verdicts: one a claim.
        wall_seconds: time of all sessions.

    Raises:
        IndexUnavailableError: the index cannot be used.
    """
    row = (str(folder.absolute()), recipe, form, started, status, seeds)
    with _index() as index:
        index.execute(
            f"INSERT OR REPLACE INTO runs ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (*row, json.dumps(list(verdicts)), wall_seconds),
        )


def list_runs() -> list[dict[str, Any]]:
    """Return all runs, newest first, as dicts with the arguments of :func:`record_run`.

    Raises:
        IndexUnavailableError: the index cannot be used.
    """
    with _index() as index:
        rows = index.execute(  # the columns are a constant
            f"SELECT {_COLUMNS} FROM runs ORDER BY started DESC, folder"  # nosec B608
        ).fetchall()
    names = _COLUMNS.split(", ")
    runs = [dict(zip(names, row, strict=True)) for row in rows]
    return [
        run | {"folder": Path(run["folder"]), "verdicts": json.loads(run["verdicts"])}
        for run in runs
    ]


@contextmanager
def _index() -> Iterator[sqlite3.Connection]:
    """One short transaction; other processes wait for it."""
    path = index_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=WAIT_SECONDS)) as connection, connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute(_TABLE)
            yield connection
    except (sqlite3.Error, OSError) as error:
        raise IndexUnavailableError(f"the index of runs {path} cannot be used: {error}") from error
