"""How a run shows itself: bars in a terminal, a line now and then elsewhere."""

import time
from contextlib import AbstractContextManager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

LINE_SECONDS = 30.0


class Display(Protocol):
    """Told about every seed by its label, for example ``"seed 0"``."""

    def started(self, label: str) -> None:
        """A worker begins."""
        ...

    def progressed(self, label: str, trial: str, step: int, total: int | None, rate: float) -> None:
        """``step`` of ``total`` is done, at ``rate`` steps a second."""
        ...

    def ended(self, label: str, reason: str | None) -> None:
        """A worker ended; ``reason`` if it did not finish."""
        ...

    def note(self, text: str) -> None:
        """Print a line."""
        ...


def open_display(console: Console, seeds: int, finished: int) -> AbstractContextManager[Display]:
    """Return bars for a terminal, plain lines for anything else.

    Args:
        console: where to write.
        seeds: seeds of the run.
        finished: how many of them have finished before.
    """
    return (_Bars if console.is_terminal else _Lines)(console, seeds, finished)


def say(console: Console, text: str) -> None:
    """Print a line as it is: no markup, no colours, no wrapping inside a path."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Round a duration for people.

    Example:
        >>> duration(42), duration(200), duration(4000)
        ('42 s', '3 min', '1 h 07 min')
    """
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _steps(step: int, total: int | None, rate: float) -> str:
    if total is None:
        return "computing"
    steps = f"{step:,} of {total:,} steps"
    if rate <= 0:
        return steps
    return f"{steps}, {rate:,.0f}/s, {duration(max(0, total - step) / rate)} left"


class _Bars:
    def __init__(self, console: Console, seeds: int, finished: int) -> None:
        self._progress = Progress(
            TextColumn(
                "{task.description}",
                markup=False,
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
            BarColumn(20),
            TextColumn("{task.fields[pace]}", markup=False, table_column=Column(no_wrap=True)),
            console=console,
            refresh_per_second=4,
            expand=True,
        )
        self._all = self._progress.add_task(
            "seeds finished", total=seeds, completed=finished, pace=f"{finished} of {seeds}"
        )
        self._seeds = seeds
        self._finished = finished
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "_Bars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def started(self, label: str) -> None:
        self._tasks[label] = self._progress.add_task(label, total=None, pace="starting")

    def progressed(self, label: str, trial: str, step: int, total: int | None, rate: float) -> None:
        self._progress.update(
            self._tasks[label],
            description=f"{label} {trial}",
            completed=step,
            total=total,
            pace=_steps(step, total, rate),
        )

    def ended(self, label: str, reason: str | None) -> None:
        self._progress.remove_task(self._tasks.pop(label))
        self._finished += reason is None
        pace = f"{self._finished} of {self._seeds}"
        self._progress.update(self._all, completed=self._finished, pace=pace)

    def note(self, text: str) -> None:
        say(self._progress.console, text)


class _Lines:
    def __init__(self, console: Console, seeds: int, finished: int) -> None:
        self._console = console
        self._seeds = seeds
        self._finished = finished
        self._said: dict[str, float] = {}

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def started(self, label: str) -> None:
        self._said[label] = time.monotonic()

    def progressed(self, label: str, trial: str, step: int, total: int | None, rate: float) -> None:
        if time.monotonic() - self._said[label] < LINE_SECONDS:
            return
        self._said[label] = time.monotonic()
        self.note(f"{label} {trial}: {_steps(step, total, rate)}")

    def ended(self, label: str, reason: str | None) -> None:
        self._finished += reason is None
        state = reason or "finished"
        self.note(f"{label}: {state} ({self._finished} of {self._seeds} seeds finished)")

    def note(self, text: str) -> None:
        say(self._console, text)
