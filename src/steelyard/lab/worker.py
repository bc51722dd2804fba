"""The process of one seed: ``python -m steelyard.lab.worker FOLDER SEED PARENT CHANNEL``.

A fresh interpreter that gets strings and numbers only and reads all else from the run's
``config.json``. It runs in a process group of its own, so that Ctrl-C in a terminal reaches the
parent alone, which then asks the workers to stop (SIGTERM). A worker whose parent has died stops
by itself.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType

import torch

from steelyard.lab.recipe import load_recipe
from steelyard.lab.results import seed_folder, store_seed
from steelyard.lab.setup import Setup
from steelyard.lab.storage import LabError, locked
from steelyard.lab.training import Lab, StoppedError

# How long an advance and a checkpoint may take once the parent is dead.
GRACE_SECONDS = 60.0


class Channel:
    """Tells the parent through a pipe how the seed is getting on; never waits for it."""

    def __init__(self, descriptor: int) -> None:
        os.set_blocking(descriptor, False)
        os.set_inheritable(descriptor, False)
        self._descriptor = descriptor
        self._trial = ""
        self._first = (0, 0.0)
        self._sent = 0.0

    def progress(self, trial: str, step: int, total: int | None) -> None:
        """Send where the trial is and its pace, at most five times a second."""
        now = time.monotonic()
        if trial != self._trial:
            self._trial, self._first, self._sent = trial, (step, now), 0.0
        if now - self._sent < 0.2:
            return
        self._sent = now
        rate = (step - self._first[0]) / max(now - self._first[1], 1e-9)
        self._send({"trial": trial, "step": step, "total": total, "rate": rate}, patience=0.0)

    def warn(self, message: str) -> None:
        """Send a warning."""
        self._send({"warning": message[:1000]}, patience=2.0)

    def fail(self, reason: str) -> None:
        """Send why the seed ends."""
        self._send({"failure": reason[:1000]}, patience=2.0)

    def _send(self, message: dict[str, object], patience: float) -> None:
        line = (json.dumps(message, ensure_ascii=False) + "\n").encode()  # below PIPE_BUF: whole
        give_up = time.monotonic() + patience
        while True:
            try:
                os.write(self._descriptor, line)
                return
            except BlockingIOError:
                if time.monotonic() >= give_up:
                    return
                time.sleep(0.05)
            except OSError:  # the parent is gone
                return


def main(folder: Path, seed: int, parent: int, descriptor: int) -> int:
    """Run one seed to its end; return the exit code."""
    channel = Channel(descriptor)
    try:
        _work(folder, seed, parent, channel)
    except StoppedError as stop:
        return stop.exit_code
    except Exception as error:
        known = isinstance(error, LabError)
        channel.fail(str(error) if known else f"{type(error).__name__}: {error}".split("\n", 1)[0])
        traceback.print_exc()
        _write_error_log(seed_folder(folder, seed) / "error.log")
        return 1
    return 0


def _work(folder: Path, seed: int, parent: int, channel: Channel) -> None:
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    setup = Setup.read(folder)
    torch.set_num_threads(setup.threads)
    refusal = f"another process still writes seed {seed} of {folder}"
    with locked(seed_folder(folder, seed) / "lock", refusal, wait=GRACE_SECONDS):
        recipe = load_recipe(setup.recipe)
        config = recipe.config_from(setup.config)
        lab = Lab(
            folder,
            seed,
            checkpoint_seconds=setup.checkpoint_seconds,
            tensorboard=setup.tensorboard,
            observer=channel,
        )
        _obey(lab)
        store_seed(lab, recipe.run(config, lab))


def _obey(lab: Lab) -> None:
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # an environment's process, forked by the recipe
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        lab.request_stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.25)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


def _write_error_log(path: Path) -> None:
    try:
        path.write_text(traceback.format_exc())
    except OSError as error:  # the disk may be full; the reason went through the channel
        print(f"cannot write {path}: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(int, sys.argv[2:5])))
