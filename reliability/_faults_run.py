"""A run under test: its command, the numbers it must end with, and how an ending is judged."""

import importlib
import json
import os
import random
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from _faults_session import Ended, Session, alive, children, kill
from steelyard.lab import load_recipe

TIMES = ("wall_seconds", "started", "steps_per_second")
"""Fields of a result that are times."""


class Outcome(NamedTuple):
    """How a trial ended.

    ``status`` is ``"recovered"``, ``"refused"``, ``"lost"`` or ``"wrong"``; ``hits`` counts the
    faults that met a living process or an existing file.
    """

    status: str
    reason: str = ""
    hits: int = 1


class WrongError(Exception):
    """A session said or did what it must not."""


@dataclass
class Case:
    """A recipe with settings small enough to run hundreds of times.

    Attributes:
        name: of the recipe.
        command: the arguments of ``steelyard run``.
        other: arguments of a run with other numbers, to take foreign files from.
        home: where references and outputs are kept.
    """

    name: str
    command: tuple[str, ...]
    other: tuple[str, ...]
    home: Path
    expected: dict[str, bytes] = field(default_factory=dict)
    life: float = 0.0
    """Seconds of an unbroken run."""

    def arguments(self, folder: Path) -> list[str]:
        """Return what starts this run in a folder."""
        return ["run", *self.command, "--out", str(folder)]

    def prepare(self) -> None:
        """Run once unbroken, import what that needed, and measure a second run."""
        self.home.mkdir(parents=True)
        load_recipe(self.command[0])
        note = self.home / "modules"
        self._complete(self.home / "warm", {"STEELYARD_FAULTS_MODULES": str(note)})
        for name in note.read_text().split():
            with suppress(Exception):
                importlib.import_module(name)
        began = time.monotonic()
        self._complete(self.finished)
        self.life = time.monotonic() - began
        self.expected = numbers(self.finished)
        if numbers(self.home / "warm") != self.expected:
            raise RuntimeError(f"{self.name}: two unbroken runs differ; the recipe has no seed?")

    @property
    def finished(self) -> Path:
        """Folder of the unbroken run."""
        return self.home / "unbroken"

    @cached_property
    def interrupted(self) -> Path:
        """Folder of a run that was killed halfway, after its first checkpoints."""
        folder = self.home / "interrupted"
        session = Session(self.arguments(folder), self.home / "said")
        while session.sleep(0.01):
            if len(list(folder.glob("seeds/*/**/step-*.json"))) > 1:
                break
        for pid in (session.pid, *session.workers()):
            kill(pid)
        session.wait()
        return folder

    @cached_property
    def foreign(self) -> Path:
        """Folder of a finished run with other numbers."""
        folder = self.home / "foreign"
        ended = Session(["run", *self.other, "--out", str(folder)], self.home / "said").wait()
        if ended.code:
            raise RuntimeError(f"{self.name}: {ended.last_line}")
        return folder

    def _complete(self, folder: Path, environment: dict[str, str] | None = None) -> None:
        output = self.home / "said"
        ended = Session(self.arguments(folder), output, environment=environment).wait()
        if ended.code:
            raise RuntimeError(f"{self.name} fails without any fault: {ended.last_line}")


class Trial:
    """One run in a folder of its own, its sessions and their faults.

    Args:
        case: what is run.
        place: an empty folder for it.
        chance: draws everything that is random.
    """

    def __init__(self, case: Case, place: Path, chance: random.Random) -> None:
        self.case, self.place, self.chance = case, place, chance
        self.folder = place / "run"
        self.said = place / "said"
        self._started: list[int] = []

    def session(self, **options: Any) -> Session:
        """Start the run, or resume it if it has begun."""
        begun = (self.folder / "config.json").exists()
        arguments = ["resume", str(self.folder)] if begun else self.case.arguments(self.folder)
        return Session(arguments, self.said, **options)

    def remember(self, session: Session) -> list[int]:
        """Return the session's workers; :meth:`clear` waits for them."""
        workers = session.workers()
        self._started += workers
        return workers

    def settle(self, hits: int = 1, **options: Any) -> Outcome:
        """Go on to the end, without faults, and compare with the unbroken run."""
        ended = self.session(**options).wait()
        if untidy := complaint(ended):
            return Outcome("wrong", untidy, hits)
        if ended.code:
            return Outcome("lost", ended.last_line, hits)
        found = numbers(self.folder)
        if found == self.case.expected:
            return Outcome("recovered", "", hits)
        names = found.keys() | self.case.expected.keys()
        differ = sorted(n for n in names if found.get(n) != self.case.expected.get(n))
        return Outcome("wrong", f"other numbers in {', '.join(differ)}", hits)

    def clear(self) -> None:
        """Wait for workers whose driver was killed, then remove the folder."""
        give_up = time.monotonic() + 90
        while any(map(alive, self._started)) and time.monotonic() < give_up:
            time.sleep(0.02)
        shutil.rmtree(self.place, ignore_errors=True)


def complaint(ended: Ended) -> str:
    """Say what a session may never do, and this one did; empty if there is nothing."""
    if "Traceback" in ended.text:
        return f"a traceback: {ended.last_line}"
    if ended.code not in (0, 1):
        return f"exit code {ended.code}: {ended.last_line}"
    said = [line for line in ended.text.splitlines() if line.startswith("steelyard: ")]
    if ended.code == 1 and not said:
        return f"exit code 1 without a line that says why: {ended.last_line}"
    return ""


def tidy(ended: Ended) -> Ended:
    """Return a session that ended well or with a clear line.

    Raises:
        WrongError: it did not.
    """
    if untidy := complaint(ended):
        raise WrongError(untidy)
    return ended


def numbers(folder: Path) -> dict[str, bytes]:
    """Content of every file of a run that holds numbers of the experiment, without times."""
    files = [*folder.rglob("metrics.jsonl"), *folder.glob("seeds/*/result.json")]
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    with suppress(FileNotFoundError):
        result = json.loads((folder / "result.json").read_bytes())
        kept = {key: value for key, value in result.items() if key not in TIMES}
        found["result.json"] = json.dumps(kept).encode()
    return found


def snapshot(folder: Path) -> dict[str, bytes]:
    """Content of every file but the locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def strays() -> list[int]:
    """Children of this process that nobody waited for."""
    return children(os.getpid())
