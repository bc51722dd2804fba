"""What a run's driver does whoever computes its seeds: lock, index, clock, result."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from steelyard.lab.index import IndexUnavailableError, record_run
from steelyard.lab.progress import say
from steelyard.lab.recipe import Recipe
from steelyard.lab.results import collect, read_seed, seed_folder
from steelyard.lab.setup import Setup
from steelyard.lab.storage import DamagedError, LabError, locked, read_bytes


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Hold a run's folder.

    Raises:
        LabError: another process uses it.
    """
    with locked(folder / "lock", f"{folder} is in use by another process"):
        yield


class Session:
    """One driver's work on one run, from the first pending seed to the result.

    Args:
        folder: the run's folder, owned.
        recipe: what is run.
        setup: as stored in the folder.
        console: where warnings go.

    Attributes:
        pending: the seeds that have not finished yet, in order.
    """

    def __init__(self, folder: Path, recipe: Recipe, setup: Setup, console: Console) -> None:
        self.folder, self.recipe, self.setup = folder, recipe, setup
        self._console = console
        self.pending = [seed for seed in setup.seeds if not self._has_finished(seed)]
        self._clock = _Clock(folder, running=bool(self.pending))
        self.tick = self._clock.tick
        self._record("running", wall_seconds=self._clock.write())

    @property
    def finished(self) -> int:
        """How many seeds had finished when the session began."""
        return len(self.setup.seeds) - len(self.pending)

    def conclude(self, failures: Mapping[int, str]) -> None:
        """Collect what the seeds have stored, judge, draw and tell the index.

        Args:
            failures: reasons of the seeds that failed.
        """
        result = collect(self.folder, self.recipe, self.setup, failures, self._clock.write())
        draw(self.folder, self.recipe, result, self._console)
        verdicts = [claim["verdict"] for claim in result["claims"]]
        self._record("failed" if failures else "finished", verdicts, result["wall_seconds"])

    def stop(self) -> None:
        """Tell the index that the run was stopped."""
        self._record("stopped", wall_seconds=self._clock.write())

    def failure_lines(self, failures: Mapping[int, str]) -> list[str]:
        """Say of each failed seed why, and where to read more."""
        lines = []
        for seed, reason in failures.items():
            place = seed_folder(self.folder, seed)
            logs = [p for p in (place / "error.log", place / "output.log") if p.exists()]
            see = f" (see {logs[0]})" if logs else ""
            lines.append(f"seed {seed} failed: {reason}{see}")
        return lines

    def _has_finished(self, seed: int) -> bool:
        try:
            return read_seed(self.folder, seed) is not None
        except DamagedError as error:
            say(self._console, f"Warning: seed {seed} is not taken as finished: {error}")
            (seed_folder(self.folder, seed) / "result.json").unlink(missing_ok=True)
            return False

    def _record(
        self, status: str, verdicts: list[str] | None = None, wall_seconds: float = 0.0
    ) -> None:
        try:
            record_run(
                folder=self.folder,
                recipe=self.recipe.name,
                form=self.setup.form,
                started=self.setup.started,
                status=status,
                seeds=len(self.setup.seeds),
                verdicts=verdicts or [],
                wall_seconds=wall_seconds,
            )
        except IndexUnavailableError as error:
            if status == "running":  # said once a run
                say(self._console, f"Warning: {error}")


def draw(folder: Path, recipe: Recipe, result: dict[str, Any], console: Console) -> None:
    """Draw figures and report; the result is safe already, so a failure here is only said."""
    from steelyard.lab.plots import draw_figures
    from steelyard.lab.report import render_report

    try:
        extra = recipe.figures(result) if recipe.figures is not None else None
        paths = draw_figures(result, extra, folder / "figures")
        render_report([result], folder / "report.html", figures={recipe.name: paths})
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        say(console, f"Warning: the figures or the report could not be drawn: {reason}")


class _Clock:
    """Sums the wall-clock seconds of a run's sessions; a kill loses at most ten of them."""

    def __init__(self, folder: Path, *, running: bool) -> None:
        self._path = folder / "clock.json"
        self._running = running
        self._began = self._written = time.monotonic()
        self._before = 0.0
        with suppress(LabError, ValueError, KeyError, TypeError):
            stored = float(json.loads(read_bytes(self._path) or b"")["wall_seconds"])
            self._before = stored if math.isfinite(stored) else 0.0

    def tick(self) -> None:
        """Write the sum now and then."""
        if time.monotonic() - self._written > 10:
            self.write()

    def write(self) -> float:
        """Write and return the sum; not being able to write it is no reason to stop."""
        if not self._running:
            return self._before
        self._written = time.monotonic()
        seconds = self._before + self._written - self._began
        with suppress(OSError):
            self._path.write_text(json.dumps({"wall_seconds": seconds}) + "\n")
        return seconds
