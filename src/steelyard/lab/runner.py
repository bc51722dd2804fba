"""Start a run, or go on with one."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from steelyard.lab.index import IndexUnavailableError, record_run
from steelyard.lab.pool import run_seeds
from steelyard.lab.progress import duration, open_display, say
from steelyard.lab.recipe import Recipe, load_recipe
from steelyard.lab.results import collect, read_seed, seed_folder
from steelyard.lab.setup import Setup, new_setup
from steelyard.lab.storage import DamagedError, LabError, locked, make_folder, read_bytes
from steelyard.lab.training import CHECKPOINT_SECONDS, StoppedError


class SeedsFailedError(LabError):
    """Some seeds failed; the others are finished and stored."""


def start_run(
    recipe: str,
    *,
    form: str = "quick",
    config: Any = None,
    seeds: int | None = None,
    out: str | Path | None = None,
    workers: int | None = None,
    console: Console | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    tensorboard: bool = True,
) -> Path:
    """Run a recipe over its seeds, judge its claims and store everything in a folder.

    Args:
        recipe: a name (``"bpo"``) or a path (``"mine.py"``).
        form: ``"quick"`` or ``"full"``.
        config: the recipe's ``Config``, a dict of the fields to change in the form's, or ``None``.
        seeds: how many seeds; the form's by default.
        out: the folder, new or empty; by default ``runs/<recipe>-<form>-<date>-<time>``.
        workers: processes at once; by default one a seed, at most one a core.
        console: where to write; by default the standard output.
        checkpoint_seconds: wall-clock seconds between checkpoints.
        tensorboard: whether TensorBoard events are written.

    Returns:
        The folder.

    Raises:
        ValueError: a setting is out of range, or the recipe does not exist.
        StoppedError: Ctrl-C; the message says how to go on.
        SeedsFailedError: one line for each seed that failed.
        StorageError: the file system refused.
        LabError: the folder is not empty, or another process uses it.
    """
    console = console or Console()
    loaded = load_recipe(recipe)
    setup = new_setup(
        loaded,
        form,
        config,
        loaded.form(form).seeds if seeds is None else seeds,
        workers,
        checkpoint_seconds=checkpoint_seconds,
        tensorboard=tensorboard,
    )
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = Path(out) if out is not None else Path("runs") / f"{loaded.name}-{form}-{now}"
    _require_new(folder)
    make_folder(folder)
    with _owned(folder):
        _require_new(folder)  # another process may have been faster
        setup.write(folder)
        say(console, _announcement(folder, loaded, setup))
        return _execute(folder, loaded, setup, list(setup.seeds), console)


def resume_run(
    folder: str | Path, *, workers: int | None = None, console: Console | None = None
) -> Path:
    """Go on with a run where it ended, however it ended, and write its result again.

    Args:
        folder: the run's folder.
        workers: processes at once; as at the start by default.
        console: where to write; by default the standard output.

    Returns:
        The folder.

    Raises:
        ValueError: the recipe no longer takes the run's configuration.
        LabError: not a run's folder, its ``config.json`` was altered, or as in :func:`start_run`.
    """
    console = console or Console()
    folder = Path(folder)
    setup = Setup.read(folder).with_workers(workers)
    recipe = load_recipe(setup.recipe)
    recipe.config_from(setup.config)
    with _owned(folder):
        for change in setup.differences(recipe):
            say(console, f"Warning: since the run began, {change}; its numbers may change.")
        pending = [seed for seed in setup.seeds if not _finished(folder, seed, console)]
        if pending:
            done = len(setup.seeds) - len(pending)
            say(console, f"Resuming {folder}: {done} of {len(setup.seeds)} seeds have finished.")
        else:
            say(console, f"{folder} has finished already; its result is drawn again.")
        return _execute(folder, recipe, setup, pending, console)


def _execute(
    folder: Path, recipe: Recipe, setup: Setup, pending: list[int], console: Console
) -> Path:
    clock = _Clock(folder, running=bool(pending))
    _index(folder, recipe, setup, console, "running", wall_seconds=clock.write())
    finished = len(setup.seeds) - len(pending)
    try:
        with open_display(console, len(setup.seeds), finished) as display:
            failures = run_seeds(folder, setup, pending, display, clock.tick)
        result = collect(folder, recipe, setup, failures, clock.write())
        _draw(folder, recipe, result, console)
    except (KeyboardInterrupt, StoppedError):
        _index(folder, recipe, setup, console, "stopped", wall_seconds=clock.write())
        raise StoppedError(f"Stopped. Continue with: steelyard resume {folder}") from None
    status = "failed" if failures else "finished"
    verdicts = [claim["verdict"] for claim in result["claims"]]
    _index(folder, recipe, setup, console, status, verdicts, result["wall_seconds"])
    if failures:
        raise SeedsFailedError(_failure_lines(folder, setup, failures))
    return folder


def _require_new(folder: Path) -> None:
    with suppress(FileNotFoundError, NotADirectoryError):  # making it says what is wrong
        if any(path.name != "lock" for path in folder.iterdir()):
            raise LabError(
                f"{folder} exists; resume with `steelyard resume {folder}` or choose another --out"
            )


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    with locked(folder / "lock", f"{folder} is in use by another process"):
        yield


def _announcement(folder: Path, recipe: Recipe, setup: Setup) -> str:
    form = recipe.form(setup.form)
    seeds = len(setup.seeds)
    time_needed = ""
    if setup.config == recipe.config_to(form.config):
        minutes = form.minutes * seeds / form.seeds
        time_needed = f", about {duration(60 * minutes)} on 2 cores"
    return (
        f"Running {recipe.name} ({setup.form} form): {seeds} seed{'s' * (seeds > 1)}, "
        f"{min(setup.workers, seeds)} at a time{time_needed}. Folder: {folder}"
    )


def _finished(folder: Path, seed: int, console: Console) -> bool:
    try:
        return read_seed(folder, seed) is not None
    except DamagedError as error:
        say(console, f"Warning: seed {seed} is not taken as finished: {error}")
        (seed_folder(folder, seed) / "result.json").unlink(missing_ok=True)
        return False


def _draw(folder: Path, recipe: Recipe, result: dict[str, Any], console: Console) -> None:
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


def _failure_lines(folder: Path, setup: Setup, failures: dict[int, str]) -> str:
    lines = []
    for seed, reason in failures.items():
        place = seed_folder(folder, seed)
        log = next(p for p in (place / "error.log", place / "output.log") if p.exists())
        lines.append(f"seed {seed} failed: {reason} (see {log})")
    done = len(setup.seeds) - len(failures)
    lines.append(f"{done} of {len(setup.seeds)} seeds finished.")
    lines.append(f"Try the others again with: steelyard resume {folder}")
    return "\n".join(lines)


def _index(
    folder: Path,
    recipe: Recipe,
    setup: Setup,
    console: Console,
    status: str,
    verdicts: list[str] | None = None,
    wall_seconds: float = 0.0,
) -> None:
    try:
        record_run(
            folder=folder,
            recipe=recipe.name,
            form=setup.form,
            started=setup.started,
            status=status,
            seeds=len(setup.seeds),
            verdicts=verdicts or [],
            wall_seconds=wall_seconds,
        )
    except IndexUnavailableError as error:
        if status == "running":  # said once a run
            say(console, f"Warning: {error}")


class _Clock:
    """Sums the wall-clock seconds of a run's sessions; a kill loses at most ten of them."""

    def __init__(self, folder: Path, *, running: bool) -> None:
        self._path = folder / "clock.json"
        self._running = running
        self._began = self._written = time.monotonic()
        self._before = 0.0
        with suppress(LabError, ValueError, KeyError, TypeError):
            self._before = float(json.loads(read_bytes(self._path) or b"")["wall_seconds"])

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
