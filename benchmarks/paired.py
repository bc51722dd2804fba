"""What benchmark scripts share: contestants measured in turn inside one process, on one thread.

A case is measured in a process of its own (``in_a_process`` starts it, ``measure`` runs there).
First the contestants must agree. Memory: every contestant runs once in a fork; the peak beyond what
the fork held at the start. Time: rounds run all contestants in turn (A B C, then C B A), quick ones
several times; the figure to read is our CPU time over a peer's inside one round.
"""

import ctypes
import json
import math
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

# The process that starts others must stay small: Linux counts the memory of the process that starts
# another in the other's peak. Whatever brings torch is imported where it is used.

OURS = "steelyard"
SLICE = 0.05  # seconds: a contestant that is quicker runs several times a turn

Run = Callable[[], Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Contest:
    """Contestants that compute the same.

    Attributes:
        runs: what is measured, by name; ours is called ``steelyard``.
        errors: compares the contestants before anything is timed, raises if they disagree, and
            returns the deviation of each; those that compute something else are left out.
        warm: cheap runs that bring in what is loaded late; none = ``runs``.
    """

    runs: Mapping[str, Run]
    errors: Callable[[], dict[str, float]]
    warm: Mapping[str, Run] | None = None


def agreeing(values: Mapping[str, Any], reference: str, tolerance: float) -> dict[str, float]:
    """Largest deviation of each tensor from the reference over its largest entry, if all agree."""
    truth = values[reference].detach().double()
    scale = truth.abs().max()
    errors = {
        name: float((value.detach().double() - truth).abs().max() / scale)
        for name, value in values.items()
    }
    for name, error in errors.items():
        if not error <= tolerance:
            raise AssertionError(f"{name} deviates from {reference} by {error:.1e}: not the same")
    return errors


def measure(contest: Contest, rounds: int) -> list[Row]:
    """Check, then measure memory and time of every contestant; one row each."""
    # In a fork, too: memory that this process had used and freed would hide later peaks.
    errors = forked(contest.errors)
    runs, warm = dict(contest.runs), dict(contest.warm or contest.runs)
    for run in warm.values():
        run()
    alone = {name: in_a_fork(run, warm[name]) for name, run in runs.items()}
    repeats = {name: max(1, math.ceil(SLICE / spent)) for name, (_, spent) in alone.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            begin = time.process_time()
            for _ in range(repeats[name]):
                runs[name]()
            seconds[name].append((time.process_time() - begin) / repeats[name])
    return [
        {
            "name": name,
            "cpu_seconds": median(seconds[name]),
            "peak_extra_mib": alone[name][0],
            "ours_over_this": middle(seconds[OURS], seconds[name]),
            "error": errors.get(name),
        }
        for name in runs
    ]


def middle(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Median, smallest and largest ratio over the rounds."""
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return [median(ratios), min(ratios), max(ratios)]


def in_a_fork(run: Run, small: Run) -> tuple[float, float]:
    """Peak MiB of one run beyond what the fork held after a small one, and its CPU seconds.

    A fork maps the code of its libraries again when it first runs it: the small run does that.
    """

    def found() -> tuple[float, float]:
        small()
        trim()
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before, begin = peak_mib(), time.process_time()
        run()
        spent = time.process_time() - begin
        peak = peak_mib() - before
        if spent < SLICE:
            begin = time.process_time()
            run()
            spent = max(time.process_time() - begin, 1e-6)
        return peak, spent

    peak, spent = forked(found)
    return peak, spent


def trim() -> None:
    """Give freed memory back, which would otherwise hide what the next run needs."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # of glibc
        libc.malloc_trim(0)


def forked(function: Callable[[], Any]) -> Any:
    """Call a function in a fork of this process and return what it returns, by way of JSON."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(writer, json.dumps(function()).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if status != 0:
        raise RuntimeError(f"a fork failed with status {status}; 9 is out of memory")
    return json.loads(text)


def peak_mib() -> float:
    """Largest resident size since the peak was last forgotten."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def in_a_process(script: str, *arguments: Any) -> list[Row]:
    """Call a script with ``--measure`` on one thread and return the rows that it prints last."""
    command = [sys.executable, script, "--measure", json.dumps(arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    run = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise SystemExit(f"{arguments} failed:\n{run.stderr}")
    rows: list[Row] = json.loads(run.stdout.splitlines()[-1])
    return rows


def setting(packages: Sequence[str]) -> Row:
    """Processor, cores and versions, without importing the packages."""
    from importlib.metadata import version

    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((x.split(":")[1].strip() for x in cpu if x.startswith("model name")), "unknown")
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    return {"machine": {"processor": model, "cores": os.cpu_count()}, "versions": versions}
