"""A short slice of each kind of fault, on the toy; and a campaign that sees what it should."""

import importlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

KINDS = ("kill", "corrupt", "full-disk", "read-only", "lock")


@pytest.fixture(scope="module")
def faults() -> Iterator[ModuleType]:
    """The script, imported once: its toy is run once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # as the script sets it, but undone
        patch.syspath_prepend(str(Path(__file__).parents[2] / "reliability"))
        yield importlib.import_module("faults")


@pytest.fixture(scope="module")
def toy(faults: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A case that has run without faults; figures take seconds and are left out."""
    home = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEELYARD_HOME", str(home / "home"))
        patch.setattr("steelyard.lab.session.draw", lambda *_: None)
        commands = (f"{faults.TOY} --seeds 2 --steps {steps} --pause 0.005" for steps in (50, 40))
        case = faults.Case("toy", *(tuple(command.split()) for command in commands), home / "toy")
        case.prepare()
        yield case


@pytest.fixture
def trial(faults: ModuleType, toy: Any, tmp_path: Path):
    def make(number: int = 0):
        return faults.Trial(toy, tmp_path, random.Random(number))

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_recovers_from_each_kind_of_fault(faults, trial, kind, monkeypatch) -> None:
    monkeypatch.setattr("_faults_kinds.FRESH", 0.0)  # new interpreters take seconds
    try:
        outcome = faults.attempt(kind, trial())
    except faults.SkipError as reason:
        pytest.skip(str(reason))
    assert outcome.status in ("recovered", "refused"), outcome
    assert outcome.hits > 0


def test_settings_of_another_run_are_refused_and_nothing_is_touched(trial, monkeypatch) -> None:
    import _faults_kinds

    monkeypatch.setattr(_faults_kinds, "_sort", lambda path: path.name)
    choose = random.Random.choice

    def settings(chance: random.Random, options):
        wanted = [o for o in options if o == "replace" or str(o).endswith("config.json")]
        return choose(chance, [o for o in wanted if "seeds/" not in str(o)] or options)

    monkeypatch.setattr(random.Random, "choice", settings)
    outcome = _faults_kinds.corrupt(trial())
    assert outcome.status == "refused"
    assert "are of different runs" in outcome.reason


def test_other_numbers_and_a_run_that_cannot_go_on_are_told_apart(trial, toy) -> None:
    ours = trial()
    assert ours.settle().status == "recovered"
    kept, toy.expected = toy.expected, toy.expected | {"metrics.jsonl": b"other"}
    try:
        outcome = ours.settle()
    finally:
        toy.expected = kept
    assert outcome.status == "wrong"
    assert outcome.reason == "other numbers in metrics.jsonl"
    (ours.folder / "seeds/0/result.json").unlink()
    (ours.folder / "seeds/0/result.json").mkdir()
    lost = ours.settle()
    assert lost.status == "lost"
    assert "result.json" in lost.reason


def test_a_traceback_and_an_end_without_a_reason_are_complaints(faults) -> None:
    from _faults_run import complaint
    from _faults_session import Ended

    assert "a traceback" in complaint(Ended(1, "Traceback (most recent call last):\nKeyError: 1"))
    assert "exit code -11" in complaint(Ended(-11, ""))
    assert "without a line that says why" in complaint(Ended(1, "Running toy\n"))
    assert complaint(Ended(1, "steelyard: cannot write x: No space left on device")) == ""


def test_a_result_keeps_the_rows_of_other_kinds(faults, tmp_path: Path) -> None:
    def record(kind: str, trials: int) -> dict:
        row = faults._empty(kind, "toy") | {"trials": trials}
        return {"seed": 0, "versions": {}, "skipped": {}, "rows": [row]}

    out = tmp_path / "faults.json"
    for kind, trials in (("lock", 2), ("kill", 3), ("lock", 5)):
        faults.store(record(kind, trials), out)
    stored = json.loads(out.read_text())
    assert [(row["kind"], row["trials"]) for row in stored["rows"]] == [("kill", 3), ("lock", 5)]
    assert stored["total"]["trials"] == 8


def test_the_committed_campaign_lost_nothing(faults) -> None:
    stored = json.loads(faults.RESULT.read_text())
    kills = sum(row["trials"] for row in stored["rows"] if row["kind"] == "kill")
    assert kills >= 100
    assert stored["total"]["lost"] == stored["total"]["wrong"] == 0
