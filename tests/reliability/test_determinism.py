"""The comparison of two runs, on the toy; and that every recipe's quick form was run twice."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def determinism(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "reliability"))
    return importlib.import_module("determinism")


def test_two_runs_of_the_toy_have_the_same_bytes(determinism, tmp_path) -> None:
    row = determinism.compare(*determinism.twice(str(ROOT / "tests/lab/toy.py"), 1, tmp_path))
    assert row["different"] == []
    assert row["files"] >= 3
    assert row["bytes"] > 1000


def test_another_byte_and_a_missing_file_are_named(determinism) -> None:
    first = {"a": b"1", "b": b"2", "c": b"3"}
    row = determinism.compare(first, {"a": b"1", "b": b"4"})
    assert row["different"] == ["b", "c"]


def test_a_run_that_fails_is_not_taken_for_equal(determinism, tmp_path) -> None:
    with pytest.raises(RuntimeError, match="ended with exit code"):
        determinism.twice(str(tmp_path / "none.py"), 1, tmp_path)


def test_rows_of_other_recipes_stay(determinism, tmp_path) -> None:
    out = tmp_path / "result.json"
    for name in ("pld", "bpo", "pld"):
        determinism.store(out, 1, {"recipe": name, "different": []})
    assert [row["recipe"] for row in json.loads(out.read_text())["rows"]] == ["bpo", "pld"]
    determinism.store(out, 2, {"recipe": "pld", "different": []})
    assert [row["recipe"] for row in json.loads(out.read_text())["rows"]] == ["pld"]


def test_the_committed_result_holds_every_recipe(determinism) -> None:
    rows = json.loads(determinism.RESULT.read_text())["rows"]
    assert [row["recipe"] for row in rows] == determinism.recipes()
    assert not any(row["different"] for row in rows)
