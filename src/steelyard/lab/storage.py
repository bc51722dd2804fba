"""What a run keeps on disk, and how it is believed again after a crash.

Three rules make a run survive a kill at any instant:

- a file is written beside its place, flushed to the disk and renamed (:func:`write_atomic`), so a
  reader sees the old file or the new one, never half of one;
- a small file that vouches for others is *sealed*: it carries the digest of its own content
  (:func:`write_sealed`), and the length and digest of what it vouches for;
- the metrics log only grows. A checkpoint records how much of it existed; a resumed trial cuts the
  log back to that length and goes on (:class:`TrialStore`).

Nothing is pickled: tensors pass through ``torch.load(weights_only=True)``, all else is JSON.
"""

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

FORMAT = 1
KEPT_CHECKPOINTS = 2

Row = dict[str, float]


class LabError(RuntimeError):
    """A run cannot go on; the message is one line for a person, without a traceback."""

    exit_code = 1


class StorageError(LabError):
    """The file system refused: disk full, no permission, read-only, not a folder..."""


class DamagedError(LabError):
    """A stored file is not what was written."""


@contextmanager
def named_errors(path: Path, doing: str = "write") -> Iterator[None]:
    """Turn an ``OSError`` into a :class:`StorageError` that names the path and the reason."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot {doing} {path}: {error.strerror or error}") from error


def make_folder(path: Path) -> Path:
    """Create a folder and its parents; return it."""
    with named_errors(path, "create"):
        path.mkdir(parents=True, exist_ok=True)
    return path


def read_bytes(path: Path) -> bytes | None:
    """Content of a file, ``None`` if there is none."""
    with named_errors(path, "read"):
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old content or the new one, on the disk.

    Raises:
        StorageError: the file system refused; the old content is untouched.
    """
    scratch = path.with_name(f".{path.name}.tmp")
    with named_errors(path):
        try:
            with scratch.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
        except OSError:
            with suppress(OSError):
                scratch.unlink()
            raise
        _sync_folder(path.parent)


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write JSON atomically, with the digest of the rest under the key ``sha256``."""
    sealed = {**content, "sha256": _seal(content)}
    write_atomic(path, (json.dumps(sealed, indent=2) + "\n").encode())


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what :func:`write_sealed` wrote, without the digest.

    Raises:
        DamagedError: the file is missing, truncated, altered or of another format.
        StorageError: the file system refused.
    """
    data = read_bytes(path)
    if data is None:
        raise DamagedError(f"{path.name} is missing")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):  # neither UTF-8 nor JSON, or brackets without end
        raise DamagedError(f"{path.name} is truncated or damaged") from None
    if not isinstance(content, dict) or content.pop("sha256", None) != _seal(content):
        raise DamagedError(f"{path.name} was altered (its digest does not match)")
    if content.get("format", FORMAT) != FORMAT:
        raise DamagedError(
            f"{path.name} has format {content['format']}; this version reads {FORMAT}"
        )
    return content


@contextmanager
def locked(path: Path, refusal: str, *, wait: float = 0.0) -> Iterator[None]:
    """Hold a lock file; the kernel frees it when the process dies, however it dies.

    A record lock belongs to one process: it is not inherited by the environments' own
    processes, which may outlive a killed worker for a moment.

    Args:
        path: the lock file; created if missing, never removed.
        refusal: message of the error.
        wait: seconds to wait for another process to let go.

    Raises:
        LabError: another process holds it.
        StorageError: the lock file cannot be created.
    """
    with named_errors(path, "create"):
        file = path.open("ab")
    with file:
        give_up = time.monotonic() + wait
        while not _try_lock(file, path):
            if time.monotonic() >= give_up:
                raise LabError(refusal)
            time.sleep(0.1)
        yield


def _try_lock(file: BinaryIO, path: Path) -> bool:
    with named_errors(path, "lock"):
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
    return True


@dataclass(frozen=True)
class Extent:
    """How much of a metrics log is vouched for: its length in bytes and their digest."""

    length: int
    sha256: str

    def check(self, log: bytes | None) -> None:
        """Raise :class:`DamagedError` unless ``log`` starts with what is vouched for."""
        if log is None:
            raise DamagedError("metrics.jsonl is missing")
        if len(log) < self.length:
            raise DamagedError(
                f"metrics.jsonl is truncated ({len(log)} of {self.length} bytes vouched for)"
            )
        if hashlib.sha256(log[: self.length]).hexdigest() != self.sha256:
            raise DamagedError("metrics.jsonl was altered (its digest does not match)")


class MetricsLog:
    """An append-only file of one JSON object a line, written through at every line."""

    def __init__(self, path: Path, keep: int = 0) -> None:
        """Open the log and cut it back to its first ``keep`` bytes."""
        self._path = path
        with named_errors(path):
            self._file: BinaryIO = path.open("r+b" if path.exists() else "w+b", buffering=0)
            self._file.truncate(keep)
            kept = self._file.read()
        self._digest = hashlib.sha256(kept)
        self._length = len(kept)

    @property
    def extent(self) -> Extent:
        """What has been written so far."""
        return Extent(self._length, self._digest.hexdigest())

    def append(self, row: Row) -> None:
        """Write one line; floats by ``repr``, so that reading gives back the same numbers."""
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        rest = memoryview(line)
        with named_errors(self._path):
            while rest:  # a nearly full disk takes part of a line, then refuses
                rest = rest[self._file.write(rest) :]
        self._digest.update(line)
        self._length += len(line)

    def sync(self) -> None:
        """Wait until the lines are on the disk."""
        with named_errors(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass(frozen=True)
class Checkpoint:
    """A learner's state with the rows logged up to it."""

    step: int
    state: dict[str, Any]
    rows: list[Row]
    extent: Extent
    seconds: float


class TrialStore:
    """One trial's folder: ``metrics.jsonl``, ``checkpoints/`` and ``done.json``.

    Args:
        folder: the trial's folder; created if missing.
        warn: called with a line about each stored file that cannot be believed.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self.folder = make_folder(folder)
        self._warn = warn
        self._checkpoints = folder / "checkpoints"
        self._log_path = folder / "metrics.jsonl"
        self._done_path = folder / "done.json"
        self._log: MetricsLog | None = None
        self._state_proved = False

    def finished(self, total: int) -> list[Row] | None:
        """Return the rows of a trial that had reached ``total`` steps, or ``None``."""
        if not self._done_path.exists():
            return None
        try:
            done = read_sealed(self._done_path)
            log = read_bytes(self._log_path)
            _extent(done).check(log)
        except DamagedError as error:
            self._warn(f"{error}; the trial is not taken as finished")
            return None
        return _rows(log or b"") if done["step"] >= total else None

    def restore(self) -> Checkpoint | None:
        """Return the newest checkpoint that can be believed; name and remove those that cannot."""
        if not self._checkpoints.is_dir():
            return None
        log = read_bytes(self._log_path)
        failures: list[tuple[int, str]] = []
        found = None
        for step in self._stored_steps():
            try:
                found = self._load(step, log)
                break
            except DamagedError as error:
                failures.append((step, str(error)))
        resort = f"using step-{found.step}" if found else "no older one is left: starting again"
        for step, reason in failures:
            self._warn(f"checkpoint {self._path(step)} cannot be used: {reason}; {resort}")
            self._remove(step)
        return found

    def open(self, keep: int) -> None:
        """Cut the metrics log to what is vouched for and make it ready to grow."""
        for scratch in self.folder.rglob(".*.tmp"):  # a kill fell inside a write
            with named_errors(scratch, "remove"):
                scratch.unlink(missing_ok=True)
        self._log = MetricsLog(self._log_path, keep)

    def append(self, row: Row) -> None:
        """Log one row."""
        self._opened.append(row)

    def save(self, step: int, state: dict[str, Any], seconds: float) -> None:
        """Write a checkpoint: the state first, the manifest that vouches for it last.

        Raises:
            TypeError: the state holds something that cannot be read back without unpickling.
            StorageError: the file system refused; older checkpoints are untouched.
        """
        make_folder(self._checkpoints)
        buffer = io.BytesIO()  # torch's own file writer reports a full disk without the reason
        torch.save(state, buffer)
        data = buffer.getvalue()
        self._prove(data)
        self._opened.sync()
        write_atomic(self._path(step), data)
        manifest = {
            "format": FORMAT,
            "step": step,
            "seconds": round(seconds, 6),
            "state_bytes": len(data),
            "state_sha256": hashlib.sha256(data).hexdigest(),
        } | _vouch(self._opened.extent)
        write_sealed(self._path(step).with_suffix(".json"), manifest)
        for old in self._stored_steps()[KEPT_CHECKPOINTS:]:
            self._remove(old)

    def finish(self, step: int, seconds: float) -> None:
        """Declare the trial finished."""
        self._opened.sync()
        done = {"format": FORMAT, "step": step, "seconds": round(seconds, 6)} | _vouch(
            self._opened.extent
        )
        write_sealed(self._done_path, done)

    def newest(self) -> Path | None:
        """Path of the newest checkpoint, if there is one."""
        steps = self._stored_steps()
        return self._path(steps[0]) if steps else None

    def close(self) -> None:
        """Close the metrics log."""
        if self._log is not None:
            self._log.close()

    @property
    def _opened(self) -> MetricsLog:
        if self._log is None:
            raise RuntimeError("the trial's metrics log is not open: call open() first")
        return self._log

    def _path(self, step: int) -> Path:
        return self._checkpoints / f"step-{step}.pt"

    def _stored_steps(self) -> list[int]:
        """Steps of which any file is left, newest first."""
        if not self._checkpoints.is_dir():
            return []
        names = (
            re.fullmatch(r"step-(\d+)\.(pt|json)", p.name) for p in self._checkpoints.iterdir()
        )
        return sorted({int(match[1]) for match in names if match}, reverse=True)

    def _load(self, step: int, log: bytes | None) -> Checkpoint:
        """Read a checkpoint.

        Raises:
            DamagedError: a part of it is missing, of another length or altered.
        """
        manifest = read_sealed(self._path(step).with_suffix(".json"))
        data = read_bytes(self._path(step))
        if data is None:
            raise DamagedError(f"step-{step}.pt is missing")
        size = manifest["state_bytes"]
        if len(data) != size:
            raise DamagedError(f"step-{step}.pt is truncated ({len(data)} of {size} bytes)")
        if hashlib.sha256(data).hexdigest() != manifest["state_sha256"]:
            raise DamagedError(f"step-{step}.pt was altered (its digest does not match)")
        extent = _extent(manifest)
        extent.check(log)
        try:  # its digest is right, so somebody has made it by hand
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:
            reason = str(error).split("\n", 1)[0]
            raise DamagedError(f"step-{step}.pt holds no state: {reason}") from error
        rows = _rows((log or b"")[: extent.length])
        return Checkpoint(manifest["step"], state, rows, extent, manifest["seconds"])

    def _remove(self, step: int) -> None:
        for path in (self._path(step).with_suffix(".json"), self._path(step)):  # manifest first
            with named_errors(path, "remove"):
                path.unlink(missing_ok=True)

    def _prove(self, data: bytes) -> None:
        """Read the first state back: a recipe's mistake must not come out at the first resume."""
        if self._state_proved:
            return
        try:
            torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:
            raise TypeError(
                "state_dict() must hold only tensors, numbers, strings, None, lists and dicts; "
                f"torch.load(weights_only=True) refuses it: {str(error).splitlines()[0]}"
            ) from error
        self._state_proved = True


def read_done(folder: Path) -> tuple[int, float, Extent]:
    """Steps, seconds in training and vouched-for log of a finished trial's folder."""
    done = read_sealed(folder / "done.json")
    return done["step"], done["seconds"], _extent(done)


def check_log(folder: Path, extent: Extent) -> None:
    """Raise :class:`DamagedError` unless a trial's metrics log is the one vouched for."""
    extent.check(read_bytes(folder / "metrics.jsonl"))


def _vouch(extent: Extent) -> dict[str, Any]:
    return {"metrics_bytes": extent.length, "metrics_sha256": extent.sha256}


def _extent(content: dict[str, Any]) -> Extent:
    return Extent(content["metrics_bytes"], content["metrics_sha256"])


def _rows(log: bytes) -> list[Row]:
    return [json.loads(line) for line in log.splitlines()]


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot
            raise
    finally:
        os.close(handle)
