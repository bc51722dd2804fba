"""Start a run, or go on with one."""

from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from steelyard.lab.pool import run_seeds
from steelyard.lab.progress import duration, open_display, say
from steelyard.lab.recipe import Recipe, load_recipe
from steelyard.lab.session import Session, owned
from steelyard.lab.setup import Setup, new_setup
from steelyard.lab.storage import LabError, make_folder
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
    with owned(folder):
        _require_new(folder)  # another process may have been faster
        setup.write(folder)
        say(console, _announcement(folder, loaded, setup))
        return _execute(Session(folder, loaded, setup, console), console)


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
    with owned(folder):
        for change in setup.differences(recipe):
            say(console, f"Warning: since the run began, {change}; its numbers may change.")
        session = Session(folder, recipe, setup, console)
        if session.pending:
            done = f"{session.finished} of {len(setup.seeds)} seeds have finished."
            say(console, f"Resuming {folder}: {done}")
        else:
            say(console, f"{folder} has finished already; its result is drawn again.")
        return _execute(session, console)


def _execute(session: Session, console: Console) -> Path:
    folder, setup = session.folder, session.setup
    try:
        with open_display(console, len(setup.seeds), session.finished) as display:
            failures = run_seeds(folder, setup, session.pending, display, session.tick)
        session.conclude(failures)
    except (KeyboardInterrupt, StoppedError):
        session.stop()
        raise StoppedError(f"Stopped. Continue with: steelyard resume {folder}") from None
    if failures:
        done = len(setup.seeds) - len(failures)
        lines = [
            *session.failure_lines(failures),
            f"{done} of {len(setup.seeds)} seeds finished.",
            f"Try the others again with: steelyard resume {folder}",
        ]
        raise SeedsFailedError("\n".join(lines))
    return folder


def _require_new(folder: Path) -> None:
    with suppress(FileNotFoundError, NotADirectoryError):  # making it says what is wrong
        leftovers = {"lock", ".config.json.tmp"}  # of a run that was killed as it began
        if any(path.name not in leftovers for path in folder.iterdir()):
            raise LabError(
                f"{folder} exists; resume with `steelyard resume {folder}` or choose another --out"
            )


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
