"""Sweeps: on a Ray started for them, on a cluster by address, with workers and drivers lost."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from steelyard.lab import LabError, session, sweep
from steelyard.lab.index import list_runs
from steelyard.lab.runner import SeedsFailedError, start_run
from steelyard.lab.storage import DamagedError
from steelyard.lab.sweep import Plan, is_sweep, resume_sweep, run_folders, start_sweep

pytest.importorskip("ray")

PROGRAM = """
import sys
from steelyard import cli
from steelyard.lab import session
session.draw = lambda *_: None
sys.exit(cli.main(sys.argv[1:]))
"""


def slower(toy_path: str, folder: Path, name: str) -> Path:
    """A recipe whose seeds take a few seconds."""
    source = Path(toy_path).read_text()
    source = source.replace("pause: float = 0.002", "pause: float = 0.05")
    copy = folder / f"{name}.py"
    copy.write_text(source.replace("steps: int = 24", "steps: int = 60"))
    return copy


def wait_for(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    give_up = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < give_up, "waited too long"
        time.sleep(0.05)
    return found


def processes(folder: Path) -> dict[int, int]:
    """Process ids of the seeds' processes below a folder, with those of their parents."""
    listing = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout
    pattern = re.compile(rf"\s*(\d+)\s+(\d+) .*steelyard\.lab\.worker {re.escape(str(folder))}/")
    found = (pattern.match(line) for line in listing.splitlines())
    return {int(match[1]): int(match[2]) for match in found if match}


def rows(folder: Path) -> int:
    return sum(len(p.read_bytes().splitlines()) for p in folder.rglob("seeds/*/*/*/metrics.jsonl"))


@pytest.fixture
def launch() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Start the command in a process of its own."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A Ray cluster of one node, as somebody's machines would run it, apart from any other."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as place:
        port, client_port = free_port(), free_port()
        head = subprocess.Popen(
            [
                *(Path(sys.executable).with_name("ray"), "start", "--head", "--block"),
                *(f"--port={port}", f"--ray-client-server-port={client_port}"),
                *("--num-cpus=2", "--include-dashboard=false", f"--temp-dir={place}"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
            start_new_session=True,
        )
        wait_for((Path(place) / "ray_current_cluster").exists)
        yield f"127.0.0.1:{port}"
        head.terminate()  # it ends what it has started
        head.wait(60)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def unbroken(recipe: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Digest of all metrics of a plain run of two seeds."""
    monkeypatch.setattr(session, "draw", lambda *_: None)
    start_run(str(recipe), seeds=2, out=folder, console=Console(file=io.StringIO()))
    return str(json.loads((folder / "result.json").read_text())["metrics_sha256"])


def test_a_lost_worker_and_a_lost_driver_cost_nothing(
    tmp_path: Path, toy_path: str, launch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [slower(toy_path, tmp_path, name) for name in ("first", "second")]
    out = tmp_path / "out"
    command = ("sweep", *map(str, names), "--seeds", "2", "--out", str(out), "--cpus", "2")
    driver = launch(*command)
    killed = wait_for(lambda: rows(out) > 20 and processes(out))
    seed, ray_worker = next(iter(killed.items()))
    os.kill(ray_worker, signal.SIGKILL)
    wait_for(lambda: seed not in processes(out))
    heard = []
    while "its worker was lost" not in (line := driver.stdout.readline()):
        heard.append(line)
        assert driver.poll() is None, "".join(heard)
    driver.kill()  # the default: Ray goes with it
    wait_for(lambda: not processes(out))
    driver.communicate()
    assert not all((run / "result.json").exists() for run in run_folders(out))
    again = launch(*command)
    said, _ = again.communicate(timeout=200)
    assert again.returncode == 0, said
    expected = unbroken(names[0], tmp_path / "plain", monkeypatch)
    for run in run_folders(out):
        result = json.loads((run / "result.json").read_text())
        assert result["seeds"] == [0, 1]
        assert result["failed"] == {}
        assert result["metrics_sha256"] == expected  # both are copies of one recipe
    indexed = [row["folder"] for row in list_runs() if out in row["folder"].parents]
    assert sorted(indexed) == sorted(run_folders(out))
    assert {row["status"] for row in list_runs()} == {"finished"}


def test_a_cluster_is_used_by_address_and_a_stopped_sweep_goes_on(
    tmp_path: Path, toy_path: str, launch: Any, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = slower(toy_path, tmp_path, "only")
    out = tmp_path / "out"
    options = ("--out", str(out), "--address", cluster)
    driver = launch("sweep", str(recipe), "--seeds", "2", *options)
    wait_for(lambda: rows(out) > 10 and len(processes(out)) == 2)
    driver.send_signal(signal.SIGINT)
    said, _ = driver.communicate(timeout=120)
    assert driver.returncode == 130, said
    assert f"Stopped. Continue with: steelyard resume {out}" in said
    assert not processes(out)
    assert [row["status"] for row in list_runs()] == ["stopped"]
    assert len(list(out.rglob("step-*.pt"))) >= 2  # the workers wrote checkpoints
    resumed = launch("resume", str(out), "--address", cluster)
    said, _ = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, said
    (run,) = run_folders(out)
    result = json.loads((run / "result.json").read_text())
    assert result["metrics_sha256"] == unbroken(recipe, tmp_path / "plain", monkeypatch)


def test_a_seed_that_fails_is_named_and_the_others_finish(
    tmp_path: Path, toy_path: str, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "draw", lambda *_: None)
    source = Path(toy_path).read_text()
    recipe = tmp_path / "failing.py"
    recipe.write_text(source.replace("= ()\n", '= ("raise", "", "kill")\n', 1))
    assert recipe.read_text() != source
    file = io.StringIO()
    out = tmp_path / "out"
    with pytest.raises(SeedsFailedError) as caught:
        start_sweep([str(recipe)], out=out, address=cluster, console=Console(file=file, width=200))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith('failing seed 0 failed: KeyError: "the toy\'s own mistake" (see ')
    assert lines[1].startswith("failing seed 2 failed: killed by SIGKILL (out of memory?) (see ")
    assert lines[2:] == [
        "1 of 3 seeds finished.",
        f"Try the others again with: steelyard resume {out}",
    ]
    assert "failing seed 1: finished" in file.getvalue()


def test_an_address_where_nobody_answers_is_one_line(tmp_path: Path, toy_path: str) -> None:
    with pytest.raises(LabError, match="no Ray at address nowhere"):
        start_sweep([toy_path], out=tmp_path / "out", address="nowhere")


@pytest.mark.parametrize(
    ("recipes", "changes", "says"),
    [
        ([], {}, "recipes must name at least one"),
        (["TOY", "TOY"], {}, "recipes must differ, got 'toy' twice"),
        (["TOY"], {"seeds": 0}, "seeds must be >= 1, got 0"),
        (["TOY"], {"cpus": 0}, "cpus must be >= 1, got 0"),
        (["TOY"], {"retries": -1}, "retries must be >= 0, got -1"),
        (["TOY"], {"form": "half"}, "form"),
        (["nothing-like-it"], {}, "nothing-like-it"),
    ],
)
def test_a_mistake_is_named_before_anything_is_written(
    recipes: list[str], changes: dict[str, Any], says: str, tmp_path: Path, toy_path: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        start_sweep(
            [toy_path if name == "TOY" else name for name in recipes],
            out=tmp_path / "out",
            **changes,
        )
    assert not (tmp_path / "out").exists()


def test_a_folder_keeps_its_plan(tmp_path: Path, toy_path: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    Plan((toy_path,), "quick", 2, 30.0).write(out)
    assert is_sweep(out)
    with pytest.raises(LabError, match="holds a sweep of other recipes or settings"):
        start_sweep([toy_path], seeds=3, out=out)
    plan = json.loads((out / "sweep.json").read_text())
    (out / "sweep.json").write_text(json.dumps(plan | {"seeds": 9}))
    with pytest.raises(DamagedError, match=r"sweep\.json was altered"):
        resume_sweep(out)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    with pytest.raises(LabError, match="exists and is no sweep"):
        start_sweep([toy_path], out=tmp_path / "other")


class Recorder:
    """A display that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **_: self.told.append((name, *arguments))


def test_progress_of_a_seed_that_moves_to_another_worker_is_told_in_order() -> None:
    display = Recorder()
    shown = sweep._Shown(display)
    step = {"trial": "t", "step": 3, "total": 9, "rate": 1.0}
    shown.hear([("a", {"started": True}), ("a", step), ("b", step), ("a", {"started": True})])
    shown.hear([("a", {"note": "a warning"})])
    shown.ended("a", None)
    assert display.told == [
        ("started", "a"),
        ("progressed", "a"),
        ("started", "b"),  # its first words were lost with the board
        ("progressed", "b"),
        ("note", "a: its worker was lost; going on from its checkpoint"),
        ("note", "a: a warning"),
        ("ended", "a", None),
    ]
