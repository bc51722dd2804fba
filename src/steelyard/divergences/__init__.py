"""Divergences between two distributions: one convention, exact values, stable gradients.

``D_f(p || q) = E_q[f(p/q)]``, natural logarithm, the first argument is the numerator.
"""

from steelyard.divergences.cauchy_schwarz import (
    cauchy_schwarz_divergence,
    cauchy_schwarz_mutual_information,
    conditional_cauchy_schwarz,
    gaussian_cauchy_schwarz,
    hsic,
    median_bandwidth,
    mmd_squared,
)
from steelyard.divergences.distance_covariance import (
    IndependenceTest,
    concatenated_distance_covariance,
    distance_correlation,
    distance_correlation_test,
    distance_covariance,
    joint_distance_covariance,
    u_centred_distances,
)
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
from steelyard.divergences.sinkhorn import (
    SinkhornPotentials,
    sinkhorn_divergence,
    sinkhorn_plan,
    sinkhorn_potentials,
)

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
    "IndependenceTest",
    "SinkhornPotentials",
    "alpha_divergence",
    "cauchy_schwarz_divergence",
    "cauchy_schwarz_mutual_information",
    "concatenated_distance_covariance",
    "conditional_cauchy_schwarz",
    "distance_correlation",
    "distance_correlation_test",
    "distance_covariance",
    "f_divergence",
    "gaussian_cauchy_schwarz",
    "hsic",
    "joint_distance_covariance",
    "kl_estimate",
    "median_bandwidth",
    "mmd_squared",
    "monte_carlo_divergence",
    "sinkhorn_divergence",
    "sinkhorn_plan",
    "sinkhorn_potentials",
    "skew_jensen_shannon",
    "u_centred_distances",
]
