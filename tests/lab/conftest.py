import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from steelyard.lab import Lab, load_recipe
from steelyard.lab.results import store_seed

TOY = Path(__file__).with_name("toy.py")


@pytest.fixture(autouse=True)
def _own_index(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEELYARD_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="session")
def toy_path() -> str:
    return str(TOY)


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """The toy recipe's module."""
    return sys.modules[load_recipe(TOY).config_type.__module__]


class Notes:
    """An observer that keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def progress(self, trial: str, step: int, total: int | None) -> None:
        pass

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture(scope="session")
def run_seed() -> Callable[..., None]:
    """Run one seed of the toy in this process, checkpointing after every update."""

    def run(folder: Path, seed: int = 0, observer: Notes | None = None, **changes: object) -> None:
        recipe = load_recipe(TOY)
        config = recipe.config_type(**changes)
        lab = Lab(folder, seed, checkpoint_seconds=0, tensorboard=False, observer=observer)
        store_seed(lab, recipe.run(config, lab))

    return run


@pytest.fixture
def fast_folder() -> Iterator[Path]:
    """A folder in memory where the system has one: thousands of flushes are slow on a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def fork(run_seed: Callable[..., None]) -> Callable[[Callable[[], None]], int]:
    """Run a function in a forked child; return its process id."""
    with tempfile.TemporaryDirectory() as folder:  # what is imported once here, no child imports
        run_seed(Path(folder), steps=1)
        run_seed(Path(folder), steps=2)

    def start(work: Callable[[], None]) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            torch.set_num_threads(1)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    return start


@pytest.fixture(scope="session")
def stored_numbers() -> Callable[[Path], dict[str, bytes]]:
    """Content of every file of a run that holds numbers of the experiment."""

    def read(folder: Path) -> dict[str, bytes]:
        files = [*folder.rglob("metrics.jsonl"), *folder.glob("seeds/*/result.json")]
        return {str(file.relative_to(folder)): file.read_bytes() for file in files}

    return read
