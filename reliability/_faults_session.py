"""One session of a run: the command ``steelyard`` in a process of its own, its words in a file.

Starting an interpreter and importing PyTorch takes seconds in which a run stores nothing. So a
session is a fork of this warm process, and so are its workers: what runs is the same code. A
*fresh* session starts interpreters as a user's would.
"""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from steelyard import cli
from steelyard.lab import pool, runner, worker

CHECKPOINT_SECONDS = 0.05
CRASHED = 70
PATIENCE = 300.0


@dataclass(frozen=True)
class Ended:
    """A session that is over: its exit code (negative: the signal) and what it said."""

    code: int
    text: str

    @property
    def last_line(self) -> str:
        lines = self.text.strip().splitlines()
        return lines[-1] if lines else "(said nothing)"


class Session:
    """A command that runs.

    Args:
        arguments: of ``steelyard``.
        output: file for what it says.
        fresh: start new interpreters for the command and its workers.
        environment: set for it.
        prepare: called in its process first.
        tensorboard: whether a run that it starts writes events.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        output: Path,
        *,
        fresh: bool = False,
        environment: Mapping[str, str] | None = None,
        prepare: Callable[[], None] | None = None,
        tensorboard: bool = False,
    ) -> None:
        self._output = output
        self._code: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _child(output, lambda: _drive(arguments, fresh, environment, prepare, tensorboard))

    def ended(self) -> bool:
        """Look, without waiting."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code is not None

    def sleep(self, seconds: float) -> bool:
        """Sleep so long or until the session ends; tell whether it still runs."""
        give_up = time.monotonic() + seconds
        while not self.ended():
            left = give_up - time.monotonic()
            if left <= 0:
                return True
            time.sleep(min(0.005, left))
        return False

    def workers(self) -> list[int]:
        """Process ids of the seeds that run now."""
        return [] if self.ended() else children(self.pid)

    def kill(self) -> None:
        """End the command alone."""
        if not self.ended():
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def wait(self) -> Ended:
        """Wait for the end; after five minutes end it and say so."""
        late = self.sleep(PATIENCE)
        if late:
            for pid in (*self.workers(), self.pid):
                kill(pid)
            self.sleep(PATIENCE)
        text = self._output.read_text(errors="replace")
        return Ended(self._code or 0, text + "\n(did not end)" * late)


def children(parent: int) -> list[int]:
    """Process ids of the living children of a process (Linux)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        fields = _status(int(folder.name))
        if fields and fields[0] != "Z" and int(fields[1]) == parent:
            found.append(int(folder.name))
    return sorted(found)


def alive(pid: int) -> bool:
    """Tell whether a process runs."""
    fields = _status(pid)
    return bool(fields) and fields[0] != "Z"


def kill(pid: int) -> None:
    """Send SIGKILL to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def starve(pid: int) -> None:
    """Let a process have no more memory than it has."""
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_AS, (1 << 20, 1 << 20))


def _status(pid: int) -> list[str]:
    """State, parent and the rest of a process's line in ``/proc``; nothing if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


class _Fork:
    """What the pool uses of ``subprocess.Popen``, by a fork that runs the worker's ``main``."""

    def __init__(self, command: Sequence[str], *, stdout: object, **_: object) -> None:
        folder, seed, parent, channel = command[-4:]
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setpgid(0, 0)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            _child(stdout, lambda: _work(Path(folder), int(seed), int(parent), int(channel)))

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        return self.returncode or 0

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _work(folder: Path, seed: int, parent: int, channel: int) -> int:
    code = worker.main(folder, seed, parent, channel)
    if note := os.environ.get("STEELYARD_FAULTS_MODULES"):
        Path(note).write_text("\n".join(sys.modules))
    return code


def _child(output: object, work: Callable[[], int]) -> None:
    """Run in a forked child and end it; never returns."""
    code = CRASHED
    try:
        if isinstance(output, Path):
            output = output.open("wb")
        for descriptor in (1, 2):
            os.dup2(output.fileno(), descriptor)  # type: ignore[attr-defined]
        # Whatever the parent has put in their place, such as a test's capture.
        sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))  # noqa: SIM115
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _drive(
    arguments: Sequence[str],
    fresh: bool,
    environment: Mapping[str, str] | None,
    prepare: Callable[[], None] | None,
    tensorboard: bool,
) -> int:
    os.setsid()
    os.environ.update(environment or {})
    if prepare is not None:
        prepare()
    if fresh:
        os.execv(sys.executable, [sys.executable, __file__, *arguments])
    pool.subprocess = SimpleNamespace(Popen=_Fork, DEVNULL=subprocess.DEVNULL)
    return _command(arguments, tensorboard)


def _command(arguments: Sequence[str], tensorboard: bool = False) -> int:
    """Run the command with more checkpoints than a user would want."""
    defaults = runner.start_run.__kwdefaults__
    defaults |= {"checkpoint_seconds": CHECKPOINT_SECONDS, "tensorboard": tensorboard}
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(_command(sys.argv[1:]))
