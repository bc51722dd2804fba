"""Every run of the tests tries the same examples, so that a failure is a change and not a draw."""

import sys

import pytest
from hypothesis import settings

settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")


@pytest.fixture(autouse=True)
def _module_search_path(monkeypatch):
    """Forget the folders that a recipe or a function of the user's added: tests know no order."""
    monkeypatch.setattr(sys, "path", [*sys.path])
