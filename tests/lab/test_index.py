import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steelyard.lab import index
from steelyard.lab.index import IndexUnavailableError, index_path, list_runs, record_run


def record(folder: str, **changes: Any) -> None:
    row: dict[str, Any] = {
        "folder": Path(folder),
        "recipe": "toy",
        "form": "quick",
        "started": "2026-01-01T00:00:00+00:00",
        "status": "running",
        "seeds": 3,
    }
    record_run(**row | changes)


def test_no_index_is_an_empty_one() -> None:
    assert list_runs() == []


def test_a_run_has_one_row_that_follows_it() -> None:
    record("/a")
    record("/a", status="finished", verdicts=["HOLDS", "UNDECIDED"], wall_seconds=1.5)
    record("/b", started="2026-02-01T00:00:00+00:00")
    newest, oldest = list_runs()
    assert newest["folder"] == Path("/b")
    assert oldest == {
        "folder": Path("/a"),
        "recipe": "toy",
        "form": "quick",
        "started": "2026-01-01T00:00:00+00:00",
        "status": "finished",
        "seeds": 3,
        "verdicts": ["HOLDS", "UNDECIDED"],
        "wall_seconds": 1.5,
    }


def test_a_folder_is_stored_as_an_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    record("runs/x")
    assert list_runs()[0]["folder"] == tmp_path / "runs/x"


def test_processes_that_write_at_once_lose_nothing(fork: Callable[..., int]) -> None:
    def write(process: int) -> None:
        for run in range(20):
            record(f"/{process}/{run}")

    children = [fork(lambda p=process: write(p)) for process in range(4)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert len(list_runs()) == 80


def test_a_damaged_locked_or_unwritable_index_is_one_line_with_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "WAIT_SECONDS", 0.05)
    record("/a")
    with sqlite3.connect(index_path()) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(IndexUnavailableError, match="database is locked"):
            record("/b")
    other.close()
    index_path().write_bytes(b"not a database " * 100)
    with pytest.raises(IndexUnavailableError, match="not a database") as caught:
        list_runs()
    assert str(index_path()) in str(caught.value)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STEELYARD_HOME", str(tmp_path / "file" / "below"))
    with pytest.raises(IndexUnavailableError, match="Not a directory"):
        record("/c")


def test_the_users_data_folder_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEELYARD_HOME")
    assert index_path().name == "runs.sqlite"
    assert "steelyard" in str(index_path().parent)
