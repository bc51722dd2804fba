"""Causal bounds under hidden confounding: exact, estimated, and what they are worth.

Every interval of this package contains the no-assumption interval on the same outcome range, which
is always reported beside it.
"""

from typing import TYPE_CHECKING, Any

from steelyard.causal.bounds import (
    AggregatedBounds,
    Bounds,
    aggregate_bounds,
    divergence_radius,
    finite_support_bounds,
    ipm_radius,
    manski_bounds,
    radius_derivative,
)
from steelyard.causal.policies import effect_bounds, policy_bounds, policy_radius
from steelyard.causal.risk import debiased_risk

if TYPE_CHECKING:
    from steelyard.causal.estimator import CausalBounds, CausalInterval

__all__ = [
    "AggregatedBounds",
    "Bounds",
    "CausalBounds",
    "CausalInterval",
    "aggregate_bounds",
    "debiased_risk",
    "divergence_radius",
    "effect_bounds",
    "finite_support_bounds",
    "ipm_radius",
    "manski_bounds",
    "policy_bounds",
    "policy_radius",
    "radius_derivative",
]


def __getattr__(name: str) -> Any:
    # scikit-learn is optional: its estimator is loaded when asked for
    if name in {"CausalBounds", "CausalInterval"}:
        from steelyard.causal import estimator

        return getattr(estimator, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
