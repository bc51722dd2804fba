"""Divergences between two distributions: one convention, exact values, stable gradients.

``D_f(p || q) = E_q[f(p/q)]``, natural logarithm, the first argument is the numerator.
"""

from steelyard.divergences.estimators import kl_estimate, monte_carlo_divergence
from steelyard.divergences.f_divergences import (
    JEFFREYS,
    JENSEN_SHANNON,
    JENSEN_SHANNON_DOUBLE,
    KL,
    NEYMAN_CHI2,
    PEARSON_CHI2,
    REVERSE_KL,
    SOFTENED_REVERSE_KL,
    SQUARED_HELLINGER,
    TOTAL_VARIATION,
    FDivergence,
    alpha_divergence,
    f_divergence,
    skew_jensen_shannon,
)
from steelyard.divergences.generators import Generator

__all__ = [
    "JEFFREYS",
    "JENSEN_SHANNON",
    "JENSEN_SHANNON_DOUBLE",
    "KL",
    "NEYMAN_CHI2",
    "PEARSON_CHI2",
    "REVERSE_KL",
    "SOFTENED_REVERSE_KL",
    "SQUARED_HELLINGER",
    "TOTAL_VARIATION",
    "FDivergence",
    "Generator",
    "alpha_divergence",
    "f_divergence",
    "kl_estimate",
    "monte_carlo_divergence",
    "skew_jensen_shannon",
]
