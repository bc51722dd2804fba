"""Many runs at once: seeds x recipes as Ray tasks, on this machine or on a cluster.

The folder of a sweep holds ``sweep.json``, what was asked for, and one ordinary run folder a
recipe. A task starts the same worker process as ``steelyard run``, so a seed gives the same bytes
whoever computes it. If a Ray worker is lost, its seed's process writes a checkpoint and ends, and
Ray gives the seed to another one, which goes on from there. If the driver is lost, the same command
goes on with what is stored. Every machine of a cluster must see the folder at the same path.
"""

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from steelyard._checks import check_range
from steelyard._extras import require
from steelyard.lab.pool import StopSignals, run_seeds
from steelyard.lab.progress import Display, open_display, say
from steelyard.lab.recipe import load_recipe
from steelyard.lab.runner import SeedsFailedError
from steelyard.lab.session import Session, owned
from steelyard.lab.setup import Setup, cores, new_setup
from steelyard.lab.storage import FORMAT, LabError, make_folder, read_sealed, write_sealed
from steelyard.lab.training import CHECKPOINT_SECONDS, StoppedError

RETRIES = 3
STOP_SECONDS = 60.0
REPORT_SECONDS = 1.0
POLL_SECONDS = 0.5

Failures = dict[int, str]


@dataclass(frozen=True)
class Plan:
    """What a sweep was asked for; written once, before its runs.

    Attributes:
        recipes: what each recipe is found by.
        form: ``"quick"`` or ``"full"``.
        seeds: how many of each; ``None`` for as many as the form says.
        checkpoint_seconds: wall-clock seconds between checkpoints.
    """

    recipes: tuple[str, ...]
    form: str
    seeds: int | None
    checkpoint_seconds: float

    @classmethod
    def read(cls, folder: Path) -> "Plan":
        """Read ``sweep.json``.

        Raises:
            DamagedError: it is missing or was altered.
        """
        stored = read_sealed(_plan_path(folder))
        values = {name: stored[name] for name in cls.__dataclass_fields__}
        return cls(**values | {"recipes": tuple(values["recipes"])})

    def write(self, folder: Path) -> None:
        """Write ``sweep.json``."""
        content = {"format": FORMAT} | asdict(self) | {"recipes": list(self.recipes)}
        write_sealed(_plan_path(folder), content)


def is_sweep(folder: Path) -> bool:
    """Whether a folder is that of a sweep."""
    return _plan_path(folder).is_file()


def start_sweep(
    recipes: Sequence[str],
    *,
    form: str = "quick",
    seeds: int | None = None,
    out: str | Path | None = None,
    address: str | None = None,
    cpus: int | None = None,
    retries: int = RETRIES,
    console: Console | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> Path:
    """Run several recipes over their seeds on Ray; go on if ``out`` holds the same sweep.

    Args:
        recipes: names (``"bpo"``) or paths (``"mine.py"``), each once.
        form: ``"quick"`` or ``"full"``.
        seeds: how many of each recipe; the form's by default.
        out: the folder; by default ``runs/sweep-<date>-<time>``. One run folder a recipe is in it.
        address: of a Ray cluster, ``"auto"`` for the one this machine belongs to; by default a Ray
            of its own is started here.
        cpus: cores of that Ray; all by default.
        retries: how often a seed is given to another worker when its worker is lost.
        console: where to write; by default the standard output.
        checkpoint_seconds: wall-clock seconds between checkpoints.

    Returns:
        The folder.

    Raises:
        ValueError: a setting is out of range, a recipe does not exist or is named twice.
        ModuleNotFoundError: Ray is not installed.
        StoppedError: Ctrl-C; the message says how to go on.
        SeedsFailedError: one line for each seed that failed.
        LabError: ``out`` holds something else, another process uses it, or no cluster answers.
    """
    if not recipes:
        raise ValueError("recipes must name at least one, got none")
    require("ray", extra="sweep")  # before anything is written
    loaded = [load_recipe(recipe) for recipe in recipes]
    names = [recipe.name for recipe in loaded]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"recipes must differ, got {min(twice)!r} twice")
    for recipe in loaded:  # its mistakes come out before anything is written
        new_setup(recipe, form, None, seeds or 1, None, checkpoint_seconds=0, tensorboard=False)
    if seeds is not None:
        check_range("seeds", seeds, at_least=1)
    _check_resources(cpus, retries)
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = (Path(out) if out is not None else Path("runs") / f"sweep-{now}").absolute()
    plan = Plan(tuple(r.reference for r in loaded), form, seeds, checkpoint_seconds)
    make_folder(folder)
    with owned(folder):
        _agree(folder, plan)
        return _execute(folder, plan, address, cpus, retries, console or Console())


def resume_sweep(
    folder: str | Path,
    *,
    address: str | None = None,
    cpus: int | None = None,
    retries: int = RETRIES,
    console: Console | None = None,
) -> Path:
    """Go on with a sweep, however it ended; arguments and errors as :func:`start_sweep`."""
    _check_resources(cpus, retries)
    folder = Path(folder).absolute()
    plan = Plan.read(folder)
    with owned(folder):
        return _execute(folder, plan, address, cpus, retries, console or Console())


def run_folders(folder: Path) -> list[Path]:
    """Return the run folders of a sweep, in order."""
    return [folder / load_recipe(recipe).name for recipe in Plan.read(folder).recipes]


def _check_resources(cpus: int | None, retries: int) -> None:
    if cpus is not None:
        check_range("cpus", cpus, at_least=1)  # with none, Ray would wait for ever
    check_range("retries", retries, at_least=0)


def _agree(folder: Path, plan: Plan) -> None:
    """Write the plan of a new sweep; refuse a folder of anything else."""
    if is_sweep(folder):
        if Plan.read(folder) != plan:
            raise LabError(
                f"{folder} holds a sweep of other recipes or settings; "
                f"resume it with `steelyard resume {folder}` or choose another --out"
            )
    elif any(path.name != "lock" for path in folder.iterdir()):
        raise LabError(f"{folder} exists and is no sweep; choose another --out")
    else:
        plan.write(folder)


def _execute(
    folder: Path,
    plan: Plan,
    address: str | None,
    cpus: int | None,
    retries: int,
    console: Console,
) -> Path:
    with ExitStack() as stack:
        sessions = [_open(folder, plan, recipe, stack, console) for recipe in plan.recipes]
        seeds = sum(len(session.setup.seeds) for session in sessions)
        finished = sum(session.finished for session in sessions)
        say(console, f"Sweeping {len(sessions)} recipes, {seeds} seeds. Folder: {folder}")
        if finished:
            say(console, f"{finished} of {seeds} seeds have finished before.")
        failures: dict[str, Failures] = {session.recipe.name: {} for session in sessions}
        try:
            for session in sessions:
                if not session.pending:
                    session.conclude({})
            if finished < seeds:
                with (
                    _connected(address, cpus, console) as ray,
                    open_display(console, seeds, finished) as display,
                ):
                    _compute(ray, sessions, failures, display, retries)
        except (KeyboardInterrupt, StoppedError):
            for session in sessions:
                session.stop()
            raise StoppedError(f"Stopped. Continue with: steelyard resume {folder}") from None
        _raise_failures(folder, sessions, failures, seeds)
    return folder


def _open(folder: Path, plan: Plan, recipe: str, stack: ExitStack, console: Console) -> Session:
    """Own one run of a sweep; make its folder if a killed driver had not come to it."""
    loaded = load_recipe(recipe)
    place = make_folder(folder / loaded.name)
    stack.enter_context(owned(place))
    if (place / "config.json").exists():
        setup = Setup.read(place)
        for change in setup.differences(loaded):
            say(console, f"Warning: since {loaded.name} began, {change}; its numbers may change.")
    else:
        setup = new_setup(
            loaded,
            plan.form,
            None,
            plan.seeds or loaded.form(plan.form).seeds,
            cores(),  # one thread a seed: the sweep fills the cores
            checkpoint_seconds=plan.checkpoint_seconds,
            tensorboard=True,
        )
        setup.write(place)
    return Session(place, loaded, setup, console)


@contextmanager
def _connected(address: str | None, cpus: int | None, console: Console) -> Iterator[Any]:
    """Connect to Ray; end the connection, and a Ray of our own, afterwards."""
    ray = require("ray", extra="sweep")
    if ray.is_initialized():  # the caller's
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning of Ray
    options = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        say(console, "Starting Ray on this machine.")
        options |= {"num_cpus": cores() if cpus is None else cpus, "include_dashboard": False}
    try:
        ray.init(address=address or "local", **options)
    except (ConnectionError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise LabError(f"no Ray at address {address or 'local'}: {reason}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _compute(
    ray: Any,
    sessions: Sequence[Session],
    failures: Mapping[str, Failures],
    display: Display,
    retries: int,
) -> None:
    """Give every pending seed to Ray, show its progress, conclude each run when its last ended."""
    board = ray.remote(num_cpus=0, max_restarts=-1)(_Board).remote()
    tasks = {}
    for session in sessions:
        task = ray.remote(_run_seed).options(num_cpus=session.setup.threads, max_retries=retries)
        for seed in session.pending:
            label = _label(session, seed)
            tasks[task.remote(str(session.folder), seed, label, board)] = (session, seed)
    shown = _Shown(display)
    with StopSignals() as stop:
        while tasks and not stop.count:
            ended, _ = ray.wait(list(tasks), timeout=POLL_SECONDS)
            shown.hear(_messages(ray, board))
            for task in ended:
                session, seed = tasks.pop(task)
                reason = _reason(ray, task)
                if reason is not None:
                    failures[session.recipe.name][seed] = reason
                shown.ended(_label(session, seed), reason)
                if not any(other is session for other, _ in tasks.values()):
                    session.conclude(failures[session.recipe.name])
            for session, _ in tasks.values():
                session.tick()
        if stop.count:
            _cancel(ray, list(tasks), display, stop)
            raise StoppedError("stopped")


def _cancel(ray: Any, tasks: list[Any], display: Display, stop: StopSignals) -> None:
    """Ask the seeds to write checkpoints and wait for them, until a second signal."""
    display.note("Stopping: the workers write checkpoints (Ctrl-C again: at once).")
    for task in tasks:
        ray.cancel(task, force=False)
    give_up = time.monotonic() + STOP_SECONDS
    while tasks and stop.count < 2 and time.monotonic() < give_up:
        _, tasks = ray.wait(tasks, num_returns=len(tasks), timeout=POLL_SECONDS)


def _reason(ray: Any, task: Any) -> str | None:
    """Why a task's seed failed, ``None`` if it finished."""
    try:
        reason: str | None = ray.get(task)
    except ray.exceptions.RayTaskError as error:
        return str(error.cause).strip().splitlines()[0]
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"its worker was lost too often: {lines[0]}"
    return reason


def _run_seed(folder: str, seed: int, label: str, board: Any) -> str | None:
    """Run one seed in a process of its own; in a Ray worker."""
    place = Path(folder)
    setup = Setup.read(place)
    return run_seeds(place, setup, [seed], _Relay(label, board), lambda: None).get(seed)


def _label(session: Session, seed: int) -> str:
    return f"{session.recipe.name} seed {seed}"


def _raise_failures(
    folder: Path, sessions: Sequence[Session], failures: Mapping[str, Failures], seeds: int
) -> None:
    lines = [
        f"{session.recipe.name} {line}"
        for session in sessions
        for line in session.failure_lines(failures[session.recipe.name])
    ]
    if lines:
        lines.append(f"{seeds - len(lines)} of {seeds} seeds finished.")
        lines.append(f"Try the others again with: steelyard resume {folder}")
        raise SeedsFailedError("\n".join(lines))


class _Board:
    """The newest words of every seed; an actor."""

    def __init__(self) -> None:
        self._messages: list[tuple[str, dict[str, Any]]] = []

    def put(self, label: str, message: dict[str, Any]) -> None:
        self._messages.append((label, message))

    def take(self) -> list[tuple[str, dict[str, Any]]]:
        taken, self._messages = self._messages, []
        return taken


def _messages(ray: Any, board: Any) -> list[tuple[str, dict[str, Any]]]:
    """What the seeds have said since the last time; nothing while the board is moved."""
    try:
        messages: list[tuple[str, dict[str, Any]]] = ray.get(board.take.remote(), timeout=5.0)
    except ray.exceptions.RayError:
        return []
    return messages


class _Relay:
    """A display in a Ray worker that passes on to the board, now and then."""

    def __init__(self, label: str, board: Any) -> None:
        self._label, self._board = label, board
        self._sent = 0.0

    def started(self, label: str) -> None:
        self._put({"started": True})

    def progressed(self, label: str, trial: str, step: int, total: int | None, rate: float) -> None:
        if time.monotonic() - self._sent >= REPORT_SECONDS:
            self._sent = time.monotonic()
            self._put({"trial": trial, "step": step, "total": total, "rate": rate})

    def ended(self, label: str, reason: str | None) -> None:
        """Nothing: the task's value says it."""

    def note(self, text: str) -> None:
        self._put({"note": text})

    def _put(self, message: dict[str, Any]) -> None:
        self._board.put.remote(self._label, message)


class _Shown:
    """Shows on the driver's display what the board holds."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._running: set[str] = set()

    def hear(self, messages: Sequence[tuple[str, dict[str, Any]]]) -> None:
        for label, message in messages:
            if "note" in message:
                self._display.note(f"{label}: {message['note']}")
            elif "started" in message and label in self._running:
                self._display.note(f"{label}: its worker was lost; going on from its checkpoint")
            else:
                self._start(label)
            if "step" in message:
                self._display.progressed(label, **message)

    def ended(self, label: str, reason: str | None) -> None:
        self._start(label)
        self._running.discard(label)
        self._display.ended(label, reason)

    def _start(self, label: str) -> None:
        if label not in self._running:
            self._running.add(label)
            self._display.started(label)


def _plan_path(folder: Path) -> Path:
    return folder / "sweep.json"
