"""Every run of the tests tries the same examples, so that a failure is a change and not a draw."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# Two workers that compile into one cache at once can bring each other down.
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")
_CACHE = Path(__file__).parents[1] / ".pytest_cache" / f"numba-{_WORKER}"
os.environ["NUMBA_CACHE_DIR"] = str(_CACHE)

settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")


@pytest.fixture(autouse=True)
def _module_search_path(monkeypatch):
    """Forget the folders that a recipe or a function of the user's added: tests know no order."""
    monkeypatch.setattr(sys, "path", [*sys.path])
