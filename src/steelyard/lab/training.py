"""What a recipe's ``run`` receives: a :class:`Lab`.

It trains learners so that a kill at any instant costs time but never changes a number.
"""

import math
import re
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from steelyard._checks import check_range
from steelyard.lab.storage import LabError, Row, TrialStore, named_errors

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

CHECKPOINT_SECONDS = 30.0

# Parts of a trial's name: what every file system takes, and no file of the lab's own.
_PART = re.compile(r"[A-Za-z0-9_=+,@-](?:[A-Za-z0-9_.=+,@ -]{0,98}[A-Za-z0-9_=+,@-])?")
_OWN_NAMES = re.compile(r"checkpoints|lock|.*\.(json|jsonl|log|tmp)", re.IGNORECASE)


class Learner(Protocol):
    """Something that learns in small units of work and can be written down between them.

    What follows from :meth:`state_dict` must not depend on when it was taken: everything that
    the next :meth:`advance` reads (parameters, optimiser, generators, environment states, running
    statistics, counters) is part of the state.
    """

    @property
    def step(self) -> int:
        """Environment steps or updates done so far."""
        ...

    def advance(self) -> Mapping[str, float]:
        """Do one unit of work; return the row to log."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers, strings, None, lists and dicts of them."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a state."""
        ...

    def close(self) -> None:
        """Free what the learner holds."""
        ...


class Observer(Protocol):
    """Who is told how a seed is getting on."""

    def progress(self, trial: str, step: int, total: int | None) -> None:
        """``step`` of ``total`` is done; ``total`` is ``None`` for a piece without steps."""
        ...

    def warn(self, message: str) -> None:
        """Something stored could not be used."""
        ...


class NonFiniteError(LabError):
    """A logged value is NaN or infinite, or the learner found one.

    Attributes:
        trial: name of the trial.
        step: the learner's step.
        quantity: name of the value, or the learner's own message.
        checkpoint: the last good checkpoint, or ``None``.
    """

    def __init__(self, trial: str, step: int, quantity: str, checkpoint: Path | None) -> None:
        self.trial, self.step, self.quantity, self.checkpoint = trial, step, quantity, checkpoint
        kept = f"last good checkpoint {checkpoint}" if checkpoint else "no checkpoint yet"
        super().__init__(f"trial {trial}, step {step}: {quantity}; {kept}")


class StoppedError(LabError):
    """The run was stopped on request; what was done is kept."""

    exit_code = 130


class Lab:
    """One seed's workshop: trains, logs, checkpoints and resumes.

    Args:
        folder: the run's folder; this seed writes below ``seeds/<seed>``.
        seed: the recipe seeds everything from it; the lab itself seeds nothing.
        checkpoint_seconds: wall-clock seconds between checkpoints; 0 = after every advance.
        tensorboard: whether rows also go to TensorBoard, below ``tensorboard/seed<seed>``.
        observer: told about progress and about stored files that cannot be used; by default
            progress is dropped and warnings are Python warnings.

    Raises:
        ValueError: a negative ``seed`` or ``checkpoint_seconds``.

    Example:
        A trial is trained once; asked for again, by another process, it is read back.

        >>> import tempfile
        >>> class Countdown:
        ...     step = 0
        ...     def advance(self):
        ...         self.step += 1
        ...         return {"left": 3.0 - self.step}
        ...     def state_dict(self): return {"step": self.step}
        ...     def load_state_dict(self, state): self.step = state["step"]
        ...     def close(self): pass
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rows = Lab(folder, 0, tensorboard=False).train("a/b", Countdown, total=3)
        ...     again = Lab(folder, 0, tensorboard=False).train("a/b", None, total=3)
        >>> rows == again, rows[-1]
        (True, {'step': 3, 'left': 0.0})
    """

    def __init__(
        self,
        folder: str | Path,
        seed: int,
        *,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        tensorboard: bool = True,
        observer: Observer | None = None,
    ) -> None:
        check_range("seed", seed, at_least=0)
        check_range("checkpoint_seconds", checkpoint_seconds, at_least=0)
        self.folder = Path(folder)
        self.seed = seed
        self.trials: list[str] = []
        self._checkpoint_seconds = checkpoint_seconds
        self._tensorboard = tensorboard
        self._observer = observer or _PythonWarnings()
        self._stopping = False
        self._interruptible = True

    def train(self, name: str, make: Callable[[], Learner], total: int) -> list[Row]:
        """Train a learner until ``step >= total``, from where an earlier process left it.

        Args:
            name: the trial's name, a slash path such as ``"control/Hopper-v5/bpo"``.
            make: builds the learner; not called if the trial had finished.
            total: steps to reach; at least 1.

        Returns:
            All logged rows from the first on, each with ``"step"``.

        Raises:
            NonFiniteError: a value in a row is not finite, or the learner raised
                ``FloatingPointError``. No checkpoint is written after it.
            StoppedError: :meth:`request_stop` was called; a checkpoint was written.
            StorageError: the file system refused.
            ValueError: the name is not a valid path or was used already, ``total`` is below 1, or
                the learner breaks its contract.
        """
        check_range("total", total, at_least=1)
        store = self._open(name)
        done = store.finished(total)
        if done is not None:
            return done
        learner = make()
        try:
            return self._train(name, store, learner, total)
        finally:
            store.close()
            learner.close()

    def compute(self, name: str, function: Callable[[], Mapping[str, float]]) -> dict[str, float]:
        """Compute something that has no steps, once; read it back ever after.

        Args:
            name: the piece's name, a slash path.
            function: returns flat metrics.

        Returns:
            What ``function`` returned, as floats.

        Raises:
            NonFiniteError: a value is not finite.
            StorageError: the file system refused.
            ValueError: the name is not a valid path or was used already.
        """
        store = self._open(name)
        rows = store.finished(0)
        if rows is None:
            self._observer.progress(name, 0, None)
            started = time.monotonic()
            rows = [_row(name, 0, function(), store)]
            store.open(keep=0)
            store.append(rows[0])
            store.finish(0, time.monotonic() - started)
            store.close()
        return {key: value for key, value in rows[0].items() if key != "step"}

    def request_stop(self) -> None:
        """Stop soon: after the current advance and a checkpoint, or at once between trials.

        Meant for a signal handler in the thread that runs the recipe.

        Raises:
            StoppedError: nothing is in the middle of an advance, so the stop is now.
        """
        self._stopping = True
        if self._interruptible:
            raise StoppedError("stopped")

    def _open(self, name: str) -> TrialStore:
        _check_name(name)
        if name.casefold() in map(str.casefold, self.trials):
            raise ValueError(f"name {name!r} was used already in this run")
        if self._stopping:
            raise StoppedError("stopped")
        self.trials.append(name)

        def warn(message: str) -> None:
            self._observer.warn(f"seed {self.seed}, {name}: {message}")

        return TrialStore(self.folder / "seeds" / str(self.seed) / name, warn)

    def _train(self, name: str, store: TrialStore, learner: Learner, total: int) -> list[Row]:
        rows, seconds = self._resume(store, learner)
        board = self._board(name, learner.step)
        saved_at = started = time.monotonic()
        self._interruptible = False
        try:
            while learner.step < total:
                row = _advance(name, learner, store)
                store.append(row)
                rows.append(row)
                self._report(name, row, total, board)
                now = time.monotonic()
                due = now - saved_at >= self._checkpoint_seconds
                if due or self._stopping or learner.step >= total:
                    store.save(learner.step, learner.state_dict(), seconds + now - started)
                    saved_at = time.monotonic()
                if self._stopping:
                    raise StoppedError("stopped")
        finally:
            self._interruptible = True
            if board is not None:
                board.close()
        store.finish(learner.step, seconds + time.monotonic() - started)
        return rows

    def _resume(self, store: TrialStore, learner: Learner) -> tuple[list[Row], float]:
        checkpoint = store.restore()
        if checkpoint is None:
            store.open(keep=0)
            return [], 0.0
        learner.load_state_dict(checkpoint.state)
        if learner.step != checkpoint.step:
            raise ValueError(
                f"load_state_dict must restore step {checkpoint.step}, got {learner.step}"
            )
        store.open(keep=checkpoint.extent.length)
        return checkpoint.rows, checkpoint.seconds

    def _board(self, name: str, step: int) -> "SummaryWriter | None":
        if not self._tensorboard:
            return None
        from torch.utils.tensorboard import SummaryWriter

        folder = self.folder / "tensorboard" / f"seed{self.seed}" / name
        with named_errors(folder):  # what a killed process drew past its checkpoint is purged
            return SummaryWriter(str(folder), purge_step=step + 1)

    def _report(self, name: str, row: Row, total: int, board: "SummaryWriter | None") -> None:
        step = int(row["step"])
        self._observer.progress(name, step, total)
        if board is not None:
            with named_errors(self.folder / "tensorboard"):
                for key, value in row.items():
                    if key != "step":
                        board.add_scalar(key, value, step)


class _PythonWarnings:
    def progress(self, trial: str, step: int, total: int | None) -> None:
        pass

    def warn(self, message: str) -> None:
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def _advance(name: str, learner: Learner, store: TrialStore) -> Row:
    before = learner.step
    try:
        logged = learner.advance()
    except FloatingPointError as error:
        raise NonFiniteError(name, learner.step, str(error), store.newest()) from error
    if learner.step <= before:
        raise ValueError(f"advance() of {name} must raise step above {before}, got {learner.step}")
    return _row(name, learner.step, logged, store)


def finite_row(values: Mapping[str, float]) -> Row:
    """Return the values as floats.

    Raises:
        FloatingPointError: one is NaN or infinite; names it.
    """
    row = {key: float(value) for key, value in values.items()}
    for key, number in row.items():
        if not math.isfinite(number):
            raise FloatingPointError(f"{key} is {number}")
    return row


def _row(name: str, step: int, logged: Mapping[str, float], store: TrialStore) -> Row:
    try:
        return {"step": step} | finite_row(logged) | {"step": step}  # first, and the lab's
    except FloatingPointError as error:
        raise NonFiniteError(name, step, str(error), store.newest()) from error


def _check_name(name: str) -> None:
    parts = name.split("/")
    if not all(_PART.fullmatch(part) and not _OWN_NAMES.fullmatch(part) for part in parts):
        raise ValueError(
            "name must be a relative path of letters, digits and _-=+,@. (no '..', no empty part, "
            f"none of the lab's own file names), got {name!r}"
        )
