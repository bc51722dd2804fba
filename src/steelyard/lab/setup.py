"""What a run was asked to do, and with what: the content of its ``config.json``."""

import importlib.metadata
import os
import platform
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import steelyard
from steelyard._checks import check_range
from steelyard.lab.recipe import Recipe
from steelyard.lab.storage import (
    FORMAT,
    DamagedError,
    LabError,
    make_folder,
    read_sealed,
    write_sealed,
)

# Packages that can change a number.
_PACKAGES = (
    "torch",
    "numpy",
    "scipy",
    "gymnasium",
    "mujoco",
    "ale-py",
    "stable-baselines3",
    "transformers",
    "trl",
    "scikit-learn",
)


@dataclass(frozen=True)
class Setup:
    """One run's settings; written once, before anything else.

    Attributes:
        recipe: what the recipe is found by.
        source_sha256: digest of the recipe's file when the run began.
        form: ``"quick"`` or ``"full"``.
        config: the configuration as JSON values.
        seeds: the seeds, in order.
        workers: processes at once.
        threads: threads of each; kept on resume, since it can change the last digits.
        checkpoint_seconds: wall-clock seconds between checkpoints.
        tensorboard: whether TensorBoard events are written.
        versions: packages that can change a number.
        started: ISO time, UTC.
    """

    recipe: str
    source_sha256: str
    form: str
    config: dict[str, Any]
    seeds: tuple[int, ...]
    workers: int
    threads: int
    checkpoint_seconds: float
    tensorboard: bool
    versions: dict[str, str]
    started: str

    def write(self, folder: Path) -> None:
        """Write ``config.json``, and a copy beside what the seeds will store."""
        content = {"format": FORMAT} | asdict(self) | {"seeds": list(self.seeds)}
        write_sealed(_path(folder), content)
        write_sealed(_path(make_folder(folder / "seeds")), content)

    @classmethod
    def read(cls, folder: Path) -> "Setup":
        """Read ``config.json``.

        Raises:
            LabError: not a run's folder, or the file was altered or exchanged after the run began.
        """
        if not _path(folder).exists():
            raise LabError(f"{folder} is not the folder of a run: it has no config.json")
        try:
            stored = read_sealed(_path(folder))
        except DamagedError as error:
            raise LabError(f"{folder}: {error}; a run cannot change its settings") from error
        with suppress(DamagedError):  # a copy that is lost or damaged says nothing
            if read_sealed(_path(folder / "seeds")) != stored:
                raise LabError(
                    f"{folder}: config.json and seeds/config.json are of different runs; "
                    "put back the one that the seeds were run with"
                )
        names = {field.name for field in fields(cls)}
        values = {name: value for name, value in stored.items() if name in names}
        return cls(**values | {"seeds": tuple(values["seeds"])})

    def with_workers(self, workers: int | None) -> "Setup":
        """Return the same run with another number of processes at once."""
        if workers is None:
            return self
        check_range("workers", workers, at_least=1)
        return replace(self, workers=workers)

    def differences(self, recipe: Recipe) -> list[str]:
        """Say what has changed since the run began that can change its numbers."""
        now = installed_versions()
        changed = [
            f"{name} was {self.versions.get(name, 'absent')}, is {now.get(name, 'absent')}"
            for name in sorted(self.versions.keys() | now.keys())
            if self.versions.get(name) != now.get(name)
        ]
        if recipe.digest() != self.source_sha256:
            changed.append(f"the recipe's file {recipe.path.name} or a part of it was edited")
        return changed


def new_setup(
    recipe: Recipe,
    form: str,
    config: Any,
    seeds: int,
    workers: int | None,
    *,
    checkpoint_seconds: float,
    tensorboard: bool,
) -> Setup:
    """Check the settings of a new run and fill in what was left open.

    Args:
        recipe: the loaded recipe.
        form: ``"quick"`` or ``"full"``.
        config: the recipe's ``Config``, a dict of fields to change in the form's, or ``None``.
        seeds: how many; seeds are ``0, 1, ...``.
        workers: processes at once; ``None`` = as many as there are seeds or cores.
        checkpoint_seconds: wall-clock seconds between checkpoints, at least 0.
        tensorboard: whether TensorBoard events are written.

    Raises:
        ValueError: a setting is out of range, or a field of ``config`` is unknown.
    """
    check_range("seeds", seeds, at_least=1)
    check_range("checkpoint_seconds", checkpoint_seconds, at_least=0)
    workers = min(cores(), seeds) if workers is None else workers
    check_range("workers", workers, at_least=1)
    chosen = recipe.form(form).config
    share = max(1, cores() // workers)
    if isinstance(config, dict):
        chosen = recipe.config_from(recipe.config_to(chosen) | config)
    elif config is not None:
        chosen = config
    return Setup(
        recipe=recipe.reference,
        source_sha256=recipe.digest(),
        form=form,
        config=recipe.config_to(chosen),
        seeds=tuple(range(seeds)),
        workers=workers,
        threads=min(share, recipe.form(form).threads or share),
        checkpoint_seconds=checkpoint_seconds,
        tensorboard=tensorboard,
        versions=installed_versions(),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def installed_versions() -> dict[str, str]:
    """Versions of Python, Steelyard and the installed packages that can change a number."""
    versions = {"steelyard": steelyard.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def machine() -> dict[str, Any]:
    """Processor, cores and system; nothing that names the machine or its user."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        processor = models[0] if models else processor
    except OSError:
        pass
    return {"processor": processor, "cores": cores(), "system": platform.system()}


def _path(folder: Path) -> Path:
    return folder / "config.json"
