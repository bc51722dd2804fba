"""Whole runs: processes, signals, locks, the result."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from steelyard.lab import LabError, StorageError, session
from steelyard.lab.index import list_runs
from steelyard.lab.runner import SeedsFailedError, resume_run, start_run
from steelyard.lab.setup import Setup
from steelyard.lab.storage import locked, write_sealed

SETTINGS: dict[str, Any] = {"seeds": 2, "workers": 2, "checkpoint_seconds": 0, "tensorboard": False}

Launch = Callable[[str], "subprocess.Popen[str]"]

PROGRAM = """
import sys
from steelyard.lab import LabError, session
from steelyard.lab.runner import resume_run, start_run
session.draw = lambda *_: None
try:
    {call}
except LabError as error:
    print(error)
    sys.exit(error.exit_code)
"""


class Output:
    """A console that is no terminal, and what was said on it."""

    def __init__(self) -> None:
        self._file = io.StringIO()
        self.console = Console(file=self._file, width=80)

    @property
    def text(self) -> str:
        return self._file.getvalue()


@pytest.fixture
def output() -> Output:
    return Output()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out figures and report: they take seconds and are tested elsewhere."""
    monkeypatch.setattr(session, "draw", lambda *_: None)


def start(toy_path: str, folder: Path, output: Output, **changes: Any) -> Path:
    options = SETTINGS | {"out": folder, "console": output.console} | changes
    return start_run(toy_path, **options)


@pytest.fixture
def launch() -> Iterator[Callable[[str], "subprocess.Popen[str]"]]:
    """Start a run in a process of its own, as a terminal would."""
    started: list[subprocess.Popen[str]] = []

    def start(call: str) -> "subprocess.Popen[str]":
        program = [sys.executable, "-c", PROGRAM.format(call=call)]
        started.append(
            subprocess.Popen(
                program,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def starting(toy_path: str, folder: Path, **changes: Any) -> str:
    return f"start_run({toy_path!r}, **{SETTINGS | {'out': str(folder)} | changes!r})"


def resuming(folder: Path) -> str:
    return f"resume_run({str(folder)!r})"


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "waited too long"
        time.sleep(0.02)


def checkpoints(folder: Path, seed: int) -> list[Path]:
    return sorted(folder.glob(f"seeds/{seed}/**/step-*.json"))


def workers_of(folder: Path) -> list[int]:
    """Process ids of the workers that write into a folder."""
    listing = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pid=,args="], capture_output=True, text=True, check=True
    ).stdout
    pattern = re.compile(rf"\s*(\d+) .*steelyard\.lab\.worker {re.escape(str(folder))} ")
    return [int(match[1]) for line in listing.splitlines() if (match := pattern.match(line))]


@pytest.fixture(scope="module")
def unbroken(
    toy_path: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], str]:
    """A run without any interruption: its folder, result and what it said."""
    output = Output()
    folder = start(toy_path, tmp_path_factory.mktemp("unbroken") / "run", output, tensorboard=True)
    return folder, json.loads((folder / "result.json").read_text()), output.text


@pytest.fixture(scope="module")
def expected(
    unbroken: tuple[Path, Any, str], stored_numbers: Callable[[Path], dict[str, bytes]]
) -> dict[str, bytes]:
    return stored_numbers(unbroken[0])


def test_a_run_leaves_everything_in_its_folder(unbroken: tuple[Path, Any, str]) -> None:
    folder, _, said = unbroken
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "result.json", "report.html", "figures"}
    assert names >= {"seeds", "tensorboard"}
    assert {path.suffix for path in (folder / "figures").iterdir()} == {".png", ".svg"}
    assert "2 seeds, 2 at a time" in said
    assert f"Folder: {folder}" in said
    assert "2 of 2 seeds finished" in said
    assert "Warning" not in said
    assert not list(folder.rglob("*.tmp"))


def test_the_result_stands_alone(unbroken: tuple[Path, Any, str]) -> None:
    folder, result, _ = unbroken
    assert (result["recipe"], result["form"], result["seeds"]) == ("toy", "quick", [0, 1])
    assert result["config"]["momenta"] == [0.0, 0.9]
    assert result["versions"].keys() >= {"steelyard", "python", "torch", "numpy"}
    assert result["machine"].keys() == {"processor", "cores", "system"}
    assert result["steps"] == 2 * 2 * 24
    assert result["steps_per_second"] > 0
    assert 0 < result["wall_seconds"] < 120
    assert result["metrics"]["0"].keys() == {"optimum", "sgd/0.0/loss", "sgd/0.9/loss"}
    assert result["failed"] == {}
    assert [claim["verdict"] for claim in result["claims"]] == ["UNDECIDED", "NOT RUN"]
    assert str(folder) not in json.dumps(result)
    curve = result["curves"]["sgd/0.9"]["loss"]
    assert curve["step"] == list(range(1, 25))
    assert curve["values"].keys() == {"0", "1"}


def test_the_merged_metrics_name_seed_and_trial_in_a_fixed_order(
    unbroken: tuple[Path, Any, str],
) -> None:
    rows = [json.loads(line) for line in (unbroken[0] / "metrics.jsonl").read_text().splitlines()]
    order = list(dict.fromkeys((row["seed"], row["trial"]) for row in rows))
    trials = ("exact", "sgd/0.0", "sgd/0.9")
    assert order == [(seed, trial) for seed in (0, 1) for trial in trials]


def test_a_finished_run_says_so_and_keeps_its_numbers(
    unbroken: tuple[Path, Any, str], expected: dict[str, bytes], stored_numbers: Any, output: Output
) -> None:
    folder, result, _ = unbroken
    assert resume_run(folder, console=output.console) == folder
    assert "has finished already" in output.text
    assert stored_numbers(folder) == expected
    assert json.loads((folder / "result.json").read_text()) == result


def test_a_report_that_cannot_be_drawn_costs_no_result(
    unbroken: tuple[Path, Any, str], output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr("steelyard.lab.report.render_report", fail)
    (unbroken[0] / "result.json").unlink()
    resume_run(unbroken[0], console=output.console)
    assert "report could not be drawn: RuntimeError: no ink" in output.text
    assert json.loads((unbroken[0] / "result.json").read_text()) == unbroken[1]


def test_a_kill_of_the_parent_ends_the_workers_and_a_resume_gives_the_same_bytes(
    tmp_path: Path, toy_path: str, expected: dict[str, bytes], stored_numbers: Any, launch: Launch
) -> None:
    folder = tmp_path / "run"
    slow = {"pause": 0.03}  # in the configuration only: it changes no number
    first = launch(starting(toy_path, folder, config=slow))
    wait_for(lambda: checkpoints(folder, 0) and checkpoints(folder, 1))
    assert len(workers_of(folder)) == 2
    first.kill()
    first.communicate()
    wait_for(lambda: not workers_of(folder), 10)
    assert not (folder / "result.json").exists()
    had = {seed: len(checkpoints(folder, seed)) for seed in (0, 1)}
    assert all(had.values())

    second = launch(resuming(folder))
    before = checkpoints(folder, 0)
    wait_for(lambda: checkpoints(folder, 0) != before)
    second.kill()
    second.communicate()
    third = launch(resuming(folder))  # while workers may still be stopping
    said, _ = third.communicate(timeout=120)
    assert third.returncode == 0, said
    assert stored_numbers(folder) == expected
    wait_for(lambda: not workers_of(folder), 10)


def test_ctrl_c_checkpoints_says_how_to_go_on_and_loses_nothing(
    tmp_path: Path,
    toy_path: str,
    expected: dict[str, bytes],
    stored_numbers: Any,
    output: Output,
    undrawn: None,
    launch: Launch,
) -> None:
    folder = tmp_path / "run"
    # No checkpoint is due by the clock: the one that is found must come from Ctrl-C.
    process = launch(starting(toy_path, folder, config={"pause": 0.05}, checkpoint_seconds=1000))
    wait_for(lambda: list(folder.glob("seeds/*/sgd/*/metrics.jsonl")))
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.endswith(f"Stopped. Continue with: steelyard resume {folder}\n")
    assert "Traceback" not in said
    assert not workers_of(folder)
    assert checkpoints(folder, 0) or checkpoints(folder, 1)
    resume_run(folder, console=output.console)
    assert stored_numbers(folder) == expected


def test_a_seed_that_dies_is_reported_and_the_others_finish(
    tmp_path: Path, toy_path: str, output: Output, undrawn: None
) -> None:
    folder = tmp_path / "run"
    config = {"faults": ("", "kill", "raise"), "pause": 0.0}
    with pytest.raises(SeedsFailedError) as caught:
        start(toy_path, folder, output, seeds=3, config=config)
    *reasons, done, advice = str(caught.value).splitlines()
    killed, mistaken = sorted(reasons)
    assert killed.startswith("seed 1 failed: killed by SIGKILL")
    assert mistaken.startswith('seed 2 failed: KeyError: "the toy\'s own mistake"')
    assert done == "1 of 3 seeds finished."
    assert advice == f"Try the others again with: steelyard resume {folder}"
    assert caught.value.exit_code == 1
    log = (folder / "seeds/2/error.log").read_text()
    assert "Traceback" in log
    assert "toy.py" in log
    result = json.loads((folder / "result.json").read_text())
    assert result["seeds"] == [0]
    assert result["failed"].keys() == {"1", "2"}
    assert "; the verdict waits for them" in result["claims"][0]["note"]
    assert list_runs()[0]["status"] == "failed"


def test_damage_to_a_finished_seed_is_named_and_made_good(
    unbroken: tuple[Path, Any, str],
    expected: dict[str, bytes],
    tmp_path: Path,
    stored_numbers: Any,
    output: Output,
    undrawn: None,
) -> None:
    folder = Path(shutil.copytree(unbroken[0], tmp_path / "run"))
    log = folder / "seeds/1/sgd/0.9/metrics.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"loss": ', b'"loss": 1', 1))
    resume_run(folder, console=output.console)
    assert "seed 1 is not taken as finished: trial sgd/0.9: metrics.jsonl was" in output.text
    assert "1 of 2 seeds have finished" in output.text
    assert "starting again" in output.text  # the worker's warnings reach the console
    assert stored_numbers(folder) == expected


def test_an_unusable_index_warns_once_and_stops_nothing(
    tmp_path: Path, toy_path: str, output: Output, monkeypatch: pytest.MonkeyPatch, undrawn: None
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STEELYARD_HOME", str(tmp_path / "file"))
    config = {"steps": 2, "pause": 0.0}
    folder = start(toy_path, tmp_path / "run", output, seeds=1, config=config)
    assert (folder / "result.json").exists()
    assert output.text.count("Warning: the index of runs") == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"seeds": 0}, "seeds must be >= 1, got 0"),
        ({"workers": 0}, "workers must be >= 1, got 0"),
        ({"checkpoint_seconds": -1}, "checkpoint_seconds must be >= 0, got -1"),
        ({"form": "huge"}, "form must be one of 'quick', 'full', got 'huge'"),
        ({"config": {"stepz": 3}}, "unknown fields: stepz"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(
    options: Any, text: str, tmp_path: Path, toy_path: str, output: Output
) -> None:
    with pytest.raises(ValueError, match=text):
        start(toy_path, tmp_path / "run", output, **options)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_is_refused(
    tmp_path: Path, toy_path: str, output: Output
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(LabError, match=r"exists; resume with `steelyard resume .* another --out"):
        start(toy_path, tmp_path, output)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_whose_run_was_killed_as_it_began_can_be_used(
    tmp_path: Path, toy_path: str, output: Output, undrawn: None
) -> None:
    (tmp_path / "lock").touch()
    (tmp_path / ".config.json.tmp").write_text('{"rec')
    start(toy_path, tmp_path, output, seeds=1)
    assert json.loads((tmp_path / "result.json").read_text())["seeds"] == [0]


@pytest.mark.parametrize("seconds", ["3e99999", "NaN", "-Infinity", '"x"'])
def test_a_clock_that_cannot_be_believed_begins_again(tmp_path: Path, seconds: str) -> None:
    (tmp_path / "clock.json").write_text(f'{{"wall_seconds": {seconds}}}')
    assert 0 <= session._Clock(tmp_path, running=True).write() < 60


def test_a_folder_that_cannot_be_made_is_named(
    tmp_path: Path, toy_path: str, output: Output
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot create .*file/run: Not a directory"):
        start(toy_path, tmp_path / "file" / "run", output)
    with pytest.raises(StorageError, match=r"cannot create .*file: File exists"):
        start(toy_path, tmp_path / "file", output)


def test_a_folder_in_use_is_refused(
    unbroken: tuple[Path, Any, str], fork: Any, tmp_path: Path, output: Output
) -> None:
    def hold() -> None:
        with locked(unbroken[0] / "lock", "taken"):
            (tmp_path / "held").touch()
            signal.pause()

    child = fork(hold)
    wait_for((tmp_path / "held").exists)
    with pytest.raises(LabError, match="is in use by another process"):
        resume_run(unbroken[0], console=output.console)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_folder_that_is_no_run_and_altered_settings_are_refused(
    unbroken: tuple[Path, Any, str], tmp_path: Path, output: Output
) -> None:
    with pytest.raises(LabError, match=r"is not the folder of a run: it has no config\.json"):
        resume_run(tmp_path, console=output.console)
    text = (unbroken[0] / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"steps": 24', '"steps": 25'))
    with pytest.raises(LabError, match=r"config\.json was altered"):
        resume_run(tmp_path, console=output.console)


def test_a_recipe_that_no_longer_takes_the_config_is_refused(
    unbroken: tuple[Path, Any, str], tmp_path: Path, output: Output
) -> None:
    stored = json.loads((unbroken[0] / "config.json").read_text())
    del stored["sha256"]
    stored["config"]["speed"] = stored["config"].pop("pause")
    write_sealed(tmp_path / "config.json", stored)
    with pytest.raises(ValueError, match="config of toy has unknown fields: speed"):
        resume_run(tmp_path, console=output.console)
    del stored["config"]["speed"]
    write_sealed(tmp_path / "config.json", stored)
    with pytest.raises(ValueError, match="config of toy lacks fields: pause"):
        resume_run(tmp_path, console=output.console)


def test_changed_versions_and_an_edited_recipe_are_warned_about(
    unbroken: tuple[Path, Any, str], toy_path: str
) -> None:
    from dataclasses import replace

    from steelyard.lab import load_recipe

    setup = Setup.read(unbroken[0])
    recipe = load_recipe(toy_path)
    assert setup.differences(recipe) == []
    other = replace(setup, versions=setup.versions | {"torch": "1.0"}, source_sha256="")
    torch_line, recipe_line = other.differences(recipe)
    assert torch_line.startswith("torch was 1.0, is ")
    assert recipe_line == "the recipe's file toy.py or a part of it was edited"
