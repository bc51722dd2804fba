"""A seed killed at any instant and resumed ends with the bytes of an unbroken one."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

KILLS = 25
Fork = Callable[[Callable[[], None]], int]
Numbers = Callable[[Path], dict[str, bytes]]


def finish(fork: Fork, work: Callable[[], None]) -> None:
    _, status = os.waitpid(fork(work), 0)
    assert status == 0


def test_kills_at_random_instants_do_not_change_a_byte(
    fast_folder: Path, fork: Fork, run_seed: Callable[..., None], stored_numbers: Numbers
) -> None:
    began = time.monotonic()
    finish(fork, lambda: run_seed(fast_folder / "unbroken"))
    length = time.monotonic() - began
    expected = stored_numbers(fast_folder / "unbroken")
    assert len(expected) == 4  # three trials and the seed's result
    instants = random.Random(20260101)
    kills = several = runs = 0
    while kills < KILLS:
        runs += 1
        folder = fast_folder / f"run{runs}"
        landed = 0
        for _ in range(instants.randint(1, 4)):
            child = fork(lambda f=folder: run_seed(f))
            time.sleep(instants.uniform(0, 0.7 * length))
            os.kill(child, signal.SIGKILL)
            landed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        finish(fork, lambda f=folder: run_seed(f))
        assert stored_numbers(folder) == expected
        kills += landed
        several += landed > 1
    assert several > 0, "no run was killed more than once"


def test_a_kill_before_every_flush_rename_and_removal_does_not_change_a_byte(
    fast_folder: Path,
    fork: Fork,
    run_seed: Callable[..., None],
    stored_numbers: Numbers,
) -> None:
    short = {"steps": 4, "momenta": (0.9,), "pause": 0.0}
    finish(fork, lambda: run_seed(fast_folder / "unbroken", **short))
    expected = stored_numbers(fast_folder / "unbroken")

    def doomed(folder: Path, fatal: int) -> None:
        calls = 0

        def deadly(function: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **options: object) -> object:
                nonlocal calls
                calls += 1
                if calls == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return call

        for name in ("fsync", "replace", "unlink"):
            setattr(os, name, deadly(getattr(os, name)))
        run_seed(folder, **short)

    for fatal in range(1, 200):
        folder = fast_folder / str(fatal)
        _, status = os.waitpid(fork(lambda f=folder, n=fatal: doomed(f, n)), 0)
        finish(fork, lambda f=folder: run_seed(f, **short))
        assert stored_numbers(folder) == expected
        if not os.WIFSIGNALED(status):
            assert status == 0
            break
    assert fatal > 30, "fewer writes than a run of four checkpoints makes"
