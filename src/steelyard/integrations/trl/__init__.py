"""Trainers of TRL whose objective is a function of this library.

Each trainer is a subclass of TRL's and keeps everything of it but the objective. Names load on
first use, so importing this package does not import ``trl``; :mod:`.objectives` never does.
"""

import importlib
from typing import Any

_HOME = {
    "ADPA": "distillation_objectives",
    "AdvantageCache": "advantage_cache",
    "DCKD": "distillation_objectives",
    "DPGTrainer": "dpg",
    "DPOTrainer": "dpo",
    "DistillationTrainer": "distillation",
    "FDPOTrainer": "dpo",
    "GRPOTrainer": "grpo",
    "PLD": "distillation_objectives",
    "SinKD": "distillation_objectives",
    "SparsePO": "sparse_po",
}
"""The module each name is in."""

_MODULES = ("objectives",)

__all__ = [*_HOME, *_MODULES]  # noqa: PLE0604, the names come from two lists


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
