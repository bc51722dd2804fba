"""Steelyard: a learning objective is a divergence times a weight on each item.

Every public name is imported from its package, for example ``from steelyard.policy import
bpo_loss``. Importing ``steelyard`` itself loads nothing else: the packages load on first use.
"""

import importlib
from types import ModuleType

__version__ = "0.1.0.dev0"

_PACKAGES = (
    "divergences",
    "fused",
    "policy",
    "distillation",
    "preference",
    "tabular",
    "causal",
    "tokens",
    "diffusion",
    "classification",
    "metric_learning",
    "estimation",
    "optim",
    "federated",
    "equivariant",
    "equilibrium",
    "vision",
    "anatomy",
    "lab",
    "recipes",
    "integrations",
)

__all__ = ["__version__", *_PACKAGES]  # noqa: PLE0604, the names come from one list


def __getattr__(name: str) -> ModuleType:
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
