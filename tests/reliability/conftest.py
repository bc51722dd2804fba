import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a script of reliability/, which is no package."""
    monkeypatch.syspath_prepend(str(ROOT / "reliability"))
    return importlib.import_module
