"""Seeds in processes: start, listen, stop, and say why one died."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from steelyard.lab.progress import Display
from steelyard.lab.results import seed_folder
from steelyard.lab.setup import Setup
from steelyard.lab.storage import make_folder, named_errors
from steelyard.lab.training import StoppedError

POLL_SECONDS = 0.1


def run_seeds(
    folder: Path,
    setup: Setup,
    seeds: Sequence[int],
    display: Display,
    tick: Callable[[], None],
) -> dict[int, str]:
    """Run seeds, ``setup.workers`` at a time.

    Args:
        folder: the run's folder.
        setup: as stored in the folder.
        seeds: the seeds to run, in order.
        display: told about progress.
        tick: called about ten times a second.

    Returns:
        The reason of each seed that failed; the others have finished.

    Raises:
        StoppedError: Ctrl-C or SIGTERM; the workers have written checkpoints and ended.
    """
    waiting = deque(seeds)
    running: list[_Worker] = []
    failures: dict[int, str] = {}
    with StopSignals() as stop:
        try:
            while running or (waiting and not stop.count):
                while waiting and len(running) < setup.workers and not stop.count:
                    running.append(_start(folder, setup, waiting.popleft()))
                    display.started(running[-1].label)
                time.sleep(POLL_SECONDS)
                tick()
                stop.pass_on(running, display)
                ended = [worker for worker in running if worker.process.poll() is not None]
                for worker in running:
                    worker.listen(display)
                for worker in ended:
                    running.remove(worker)
                    reason = worker.close()
                    if reason is not None and not stop.count:
                        failures[worker.seed] = reason
                    display.ended(worker.label, reason)
        finally:
            for worker in running:
                worker.kill()
    if stop.count:
        raise StoppedError("stopped")
    return failures


@dataclass
class _Worker:
    seed: int
    process: subprocess.Popen[bytes]
    channel: int
    rest: bytes = b""
    failure: str | None = None

    @property
    def label(self) -> str:
        """What the display calls it."""
        return f"seed {self.seed}"

    def listen(self, display: Display) -> None:
        """Read what the worker has said since the last time."""
        with suppress(BlockingIOError):
            while data := os.read(self.channel, 65536):
                self.rest += data
        *lines, self.rest = self.rest.split(b"\n")
        for line in lines:
            with suppress(ValueError):
                self._hear(json.loads(line), display)

    def _hear(self, message: dict[str, Any], display: Display) -> None:
        if "warning" in message:
            display.note(message["warning"])
        elif "failure" in message:
            self.failure = message["failure"]
        else:
            display.progressed(self.label, **message)

    def close(self) -> str | None:
        """Return why an ended worker failed, ``None`` if it finished."""
        os.close(self.channel)
        code = self.process.returncode
        if code == 0:
            return None
        if code < 0:
            name = signal.Signals(-code).name
            return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        stopped = "stopped by a signal" if code == StoppedError.exit_code else None
        return self.failure or stopped or f"ended with exit code {code}"

    def kill(self) -> None:
        """End a worker at once; its newest checkpoint stays."""
        self.process.kill()
        self.process.wait()
        os.close(self.channel)


class StopSignals:
    """Counts Ctrl-C, SIGTERM and SIGHUP: the first asks the workers to stop, the second ends them.

    Only the main thread can receive signals; in another one this does nothing.
    """

    def __init__(self) -> None:
        self.count = 0
        self._passed_on = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.count += 1

    def pass_on(self, running: list[_Worker], display: Display) -> None:
        """Tell the workers, once for each of the first two signals."""
        while self._passed_on < min(self.count, 2):
            self._passed_on += 1
            if self._passed_on == 1:
                display.note("Stopping: the workers write checkpoints (Ctrl-C again: at once).")
            for worker in running:
                worker.process.send_signal(
                    signal.SIGTERM if self._passed_on == 1 else signal.SIGKILL
                )


def _start(folder: Path, setup: Setup, seed: int) -> _Worker:
    place = make_folder(seed_folder(folder, seed))
    with named_errors(place / "error.log", "remove"):
        (place / "error.log").unlink(missing_ok=True)
    threads = str(setup.threads)
    listen, speak = os.pipe()
    os.set_blocking(listen, False)
    interpreter = (sys.executable, "-P", "-X", "faulthandler")
    arguments = (str(folder), str(seed), str(os.getpid()), str(speak))
    try:
        with named_errors(place / "output.log"), (place / "output.log").open("ab") as output:
            process = subprocess.Popen(
                [*interpreter, "-m", "steelyard.lab.worker", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(speak,),
                process_group=0,
                env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            )
    finally:
        os.close(speak)
    return _Worker(seed, process, listen)
