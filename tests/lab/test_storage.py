"""Damage is detected, named, and costs time but no number."""

import errno
import hashlib
import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from steelyard.lab import Lab, StorageError
from steelyard.lab.storage import (
    DamagedError,
    LabError,
    MetricsLog,
    locked,
    make_folder,
    read_sealed,
    write_atomic,
    write_sealed,
)

TRIAL = "sgd/0.9"


class BrokenError(Exception):
    """Stands for a crash."""


@pytest.fixture
def trial(tmp_path: Path) -> Path:
    return tmp_path / "run" / "seeds" / "0" / TRIAL


@pytest.fixture
def train(tmp_path: Path, toy: ModuleType) -> Callable[..., list[dict[str, float]]]:
    """Train the toy in ``tmp_path/run``; ``crash`` = step at which it breaks down."""

    def work(crash: int | None = None, observer: Any = None, **options: Any) -> Any:
        config = toy.Config(steps=8, pause=0.0)
        learner = toy.Regression(0, 0.9, config)
        advance = learner.advance

        def crashing() -> dict[str, float]:
            if learner.step == crash:
                raise BrokenError
            return advance()

        learner.advance = crashing
        options = {"checkpoint_seconds": 0, "tensorboard": False} | options
        lab = Lab(tmp_path / "run", 0, observer=observer, **options)
        return lab.train(TRIAL, lambda: learner, config.steps)

    return work


@pytest.fixture
def expected(tmp_path: Path, toy: ModuleType) -> list[dict[str, float]]:
    learner = toy.Regression(0, 0.9, toy.Config(steps=8, pause=0.0))
    lab = Lab(tmp_path / "unbroken", 0, tensorboard=False)
    return lab.train(TRIAL, lambda: learner, 8)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip_bit(path: Path, place: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 1
    path.write_bytes(bytes(data))


def remove(path: Path) -> None:
    path.unlink()


def claim_another_format(path: Path) -> None:
    write_sealed(path, read_sealed(path) | {"format": 99})


@pytest.mark.parametrize(
    ("damage", "file", "reason"),
    [
        (truncate, "step-5.pt", "step-5.pt is truncated"),
        (flip_bit, "step-5.pt", "step-5.pt was altered"),
        (remove, "step-5.pt", "step-5.pt is missing"),
        (remove, "step-5.json", "step-5.json is missing"),
        (truncate, "step-5.json", "step-5.json is truncated or damaged"),
        (claim_another_format, "step-5.json", "has format 99; this version reads 1"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    damage: Any, file: str, reason: str, trial: Path, train: Any, expected: Any, notes: Any
) -> None:
    with pytest.raises(BrokenError):
        train(crash=5)
    damage(trial / "checkpoints" / file)
    assert train(observer=notes) == expected
    (warning,) = notes.warnings
    assert reason in warning
    assert "checkpoints/step-5.pt" in warning
    assert warning.endswith("using step-4")


def test_a_flipped_bit_in_a_manifest_is_found_wherever_it_is(
    trial: Path, train: Any, expected: Any, notes: Any
) -> None:
    with pytest.raises(BrokenError):
        train(crash=5)
    manifest = trial / "checkpoints" / "step-5.json"
    whole = manifest.read_bytes()
    digits = [place for place, byte in enumerate(whole) if chr(byte).isalnum()]
    for place in digits:
        flip_bit(manifest, place)
        with pytest.raises(DamagedError):
            read_sealed(manifest)
        manifest.write_bytes(whole)
    assert len(digits) > 100


def test_with_every_checkpoint_damaged_the_trial_starts_again_and_says_so(
    trial: Path, train: Any, expected: Any, notes: Any
) -> None:
    with pytest.raises(BrokenError):
        train(crash=5)
    for step in (4, 5):
        flip_bit(trial / "checkpoints" / f"step-{step}.pt")
    assert train(observer=notes) == expected
    assert len(notes.warnings) == 2
    assert all("starting again" in warning for warning in notes.warnings)


def test_a_metrics_file_cut_before_the_newest_checkpoint_falls_back_to_the_one_before(
    trial: Path, train: Any, expected: Any, notes: Any
) -> None:
    with pytest.raises(BrokenError):
        train(crash=5)
    truncate(trial / "metrics.jsonl")
    assert train(observer=notes) == expected
    assert "metrics.jsonl is truncated" in notes.warnings[0]
    assert notes.warnings[0].endswith("using step-4")


@pytest.mark.parametrize(
    ("damage", "reason"), [(flip_bit, "metrics.jsonl was altered"), (remove, "is missing")]
)
def test_an_altered_or_lost_metrics_file_is_named_and_the_rows_are_made_again(
    damage: Any, reason: str, trial: Path, train: Any, expected: Any, notes: Any
) -> None:
    with pytest.raises(BrokenError):
        train(crash=5)
    damage(trial / "metrics.jsonl")
    assert train(observer=notes) == expected
    assert reason in notes.warnings[0]
    assert train(observer=None) == expected


def test_rows_past_the_checkpoint_are_cut_off(trial: Path, train: Any, expected: Any) -> None:
    with pytest.raises(BrokenError):
        train(crash=5)
    with (trial / "metrics.jsonl").open("a") as log:
        log.write('{"step": 6, "loss": 0.0}\n{"step": 7, "lo')
    assert train() == expected
    logged = (trial / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in logged] == expected


@pytest.mark.parametrize("damage", [truncate, flip_bit])
@pytest.mark.parametrize("file", ["done.json", "metrics.jsonl"])
def test_a_finished_trial_is_only_believed_if_its_files_are_whole(
    file: str, damage: Any, trial: Path, train: Any, expected: Any, notes: Any
) -> None:
    train()
    damage(trial / file)
    assert train(observer=notes) == expected
    assert file in notes.warnings[0]
    assert "not taken as finished" in notes.warnings[0]


def test_only_the_newest_two_checkpoints_are_kept(trial: Path, train: Any) -> None:
    train()
    names = sorted(path.name for path in (trial / "checkpoints").iterdir())
    assert names == ["step-7.json", "step-7.pt", "step-8.json", "step-8.pt"]


def test_a_full_disk_is_one_line_with_the_path_and_nothing_stored_is_lost(
    trial: Path, train: Any, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BrokenError):
        train(crash=5)
    before = {path.name: path.read_bytes() for path in (trial / "checkpoints").iterdir()}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left on device") as caught:
            train()
    assert str(trial) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {p.name: p.read_bytes() for p in (trial / "checkpoints").iterdir()} == before
    assert train() == expected


def test_a_write_that_the_kernel_cuts_short_is_reported_and_made_good(
    trial: Path, train: Any, expected: Any, fork: Any
) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))  # a few lines of the log
        with pytest.raises(StorageError, match=r"metrics\.jsonl: File too large"):
            train(checkpoint_seconds=1000)

    assert os.waitpid(fork(limited), 0)[1] == 0
    assert (trial / "metrics.jsonl").stat().st_size == 400  # it ends inside a line
    assert train() == expected


def test_a_failed_write_leaves_the_old_content_and_no_scratch_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomic(tmp_path / "file", b"old")

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageError, match="Read-only file system"):
        write_atomic(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_folder_below_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot create .*file/run: Not a directory"):
        make_folder(tmp_path / "file" / "run")


def test_a_folder_without_permission_is_named(tmp_path: Path, fork: Any) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)

    def denied() -> None:
        if os.geteuid() == 0:
            os.seteuid(65534)  # root may write everywhere
        with pytest.raises(StorageError, match=r"closed/run: Permission denied"):
            make_folder(tmp_path / "closed" / "run")

    assert os.waitpid(fork(denied), 0)[1] == 0


def test_a_lock_is_refused_to_a_second_process_and_free_after_a_kill(
    tmp_path: Path, fork: Any
) -> None:
    def hold() -> None:
        with locked(tmp_path / "lock", "in use"):
            (tmp_path / "held").touch()
            signal.pause()

    child = fork(hold)
    while not (tmp_path / "held").exists():
        os.sched_yield()
    with pytest.raises(LabError, match="in use"), locked(tmp_path / "lock", "in use"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with locked(tmp_path / "lock", "in use"):
        pass


def test_numbers_in_the_log_come_back_as_they_were(tmp_path: Path) -> None:
    row = {"a": 0.1 + 0.2, "b": 5e-324, "c": 1.7976931348623157e308, "d": -0.0}
    log = MetricsLog(tmp_path / "log")
    log.append(row)
    log.close()
    back = json.loads((tmp_path / "log").read_text())
    assert {key: value.hex() for key, value in back.items()} == {
        key: value.hex() for key, value in row.items()
    }


def test_a_state_that_needs_unpickling_is_refused_at_the_first_checkpoint(
    tmp_path: Path, toy: ModuleType
) -> None:
    learner = toy.Regression(0, 0.9, toy.Config(pause=0.0))
    learner.state_dict = lambda: {"step": 1, "function": torch.nn.Linear(1, 1)}
    lab = Lab(tmp_path, 0, checkpoint_seconds=0, tensorboard=False)
    with pytest.raises(TypeError, match=r"state_dict\(\) must hold only tensors"):
        lab.train("x", lambda: learner, 3)


def test_a_forged_checkpoint_is_named_and_runs_no_code(
    trial: Path, train: Any, expected: Any, notes: Any, tmp_path: Path
) -> None:
    """A digest guards against accidents; whoever writes files can compute one."""
    with pytest.raises(BrokenError):
        train(crash=5)

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    state = trial / "checkpoints" / "step-5.pt"
    torch.save({"step": Trap()}, state)
    digest = hashlib.sha256(state.read_bytes()).hexdigest()
    manifest = state.with_suffix(".json")
    forged = {"state_bytes": state.stat().st_size, "state_sha256": digest}
    write_sealed(manifest, read_sealed(manifest) | forged)
    assert train(observer=notes) == expected
    assert "step-5.pt holds no state" in notes.warnings[0]
    assert not (tmp_path / "sprung").exists()


def test_brackets_without_end_are_damage(tmp_path: Path) -> None:
    (tmp_path / "file.json").write_bytes(b"[" * 100_000)
    with pytest.raises(DamagedError, match="truncated or damaged"):
        read_sealed(tmp_path / "file.json")
