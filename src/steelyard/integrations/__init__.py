"""Adapters: the objectives of this library inside the trainers people already use.

Each adapter is a module named after what it adapts to, needs the extra that installs it, and loads
on first use: ``from steelyard.integrations.stable_baselines3 import BPO``. Without the extra the
import says in one line what to install.
"""

import importlib
from types import ModuleType

_ADAPTERS = ("atari", "flower", "mujoco", "stable_baselines3", "transformers", "trl", "verl")

__all__ = [*_ADAPTERS]  # noqa: PLE0604, the names come from one list


def __getattr__(name: str) -> ModuleType:
    if name in _ADAPTERS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
