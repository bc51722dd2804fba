import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def root() -> Path:
    return ROOT


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a script of docs/, which is no package."""

    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(ROOT / "docs")  # they import each other
        spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / f"docs/{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def blocks() -> Callable[[str], list[tuple[str, str]]]:
    """Read the Python blocks of a page: (title, code), the title empty if there is none."""
    fence = re.compile(r'^```python(?: title="([^"]*)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)
    return lambda page: fence.findall((ROOT / page).read_text(encoding="utf-8"))
