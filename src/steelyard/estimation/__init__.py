"""Estimation: mixtures and their regret, inductive bias, optimal designs, bottlenecks.

Universality of Bayesian mixtures, the information it takes to generalise, weighted least squares
from determinantal points, the Cauchy-Schwarz information bottleneck, and whether a sample is large
enough for an exponential family.
"""

from typing import TYPE_CHECKING, Any

from steelyard.estimation.bottleneck import BottleneckTerms, CauchySchwarzBottleneck, cs_ib_loss
from steelyard.estimation.chi_square_fit import ScaledNCX2, scaled_ncx2_fit
from steelyard.estimation.determinantal import (
    WeightedSample,
    dpp_conditional,
    projection_dpp_logprob,
    sample_optimal_iid,
    sample_projection_dpp,
    sample_volume,
    volume_logprob,
)
from steelyard.estimation.exponential_family import (
    ExponentialFamily,
    binary_state_probs,
    pairwise_binary_family,
)
from steelyard.estimation.gaussian_graphical import GaussianGraphicalFamily
from steelyard.estimation.inductive_bias import (
    EmpiricalInductiveBias,
    Satterthwaite,
    empirical_inductive_bias,
    inductive_bias,
    satterthwaite,
)
from steelyard.estimation.information_projection import (
    PNResult,
    Projection,
    RiskExpansion,
    bayes_error_risk,
    information_projection,
    minimum_sample_size,
    pn_criterion,
    risk_expansion,
    risk_from_cumulants,
    tic_penalty,
)
from steelyard.estimation.kernel_hypotheses import (
    ErrorMoments,
    KernelHypothesisSpace,
    error_moments,
    exact_inductive_bias,
    kernel_hypothesis_space,
)
from steelyard.estimation.langevin import SGLD
from steelyard.estimation.least_squares import (
    Christoffel,
    WeightedFit,
    chernoff_rate,
    christoffel,
    orthonormal_basis,
    required_samples,
    weighted_least_squares,
)
from steelyard.estimation.mixture_closed_forms import (
    bernoulli_regret,
    bernoulli_weight,
    gaussian_regret,
    gaussian_weight,
    linear_regression_regret,
)
from steelyard.estimation.universal_mixture import (
    BayesianMixture,
    ball_bound,
    batch_regret,
    hypothesis_weight,
    online_regret,
    soft_bound,
)

if TYPE_CHECKING:
    from steelyard.estimation.weighted_regressor import WeightedLeastSquares

__all__ = [
    "SGLD",
    "BayesianMixture",
    "BottleneckTerms",
    "CauchySchwarzBottleneck",
    "Christoffel",
    "EmpiricalInductiveBias",
    "ErrorMoments",
    "ExponentialFamily",
    "GaussianGraphicalFamily",
    "KernelHypothesisSpace",
    "PNResult",
    "Projection",
    "RiskExpansion",
    "Satterthwaite",
    "ScaledNCX2",
    "WeightedFit",
    "WeightedLeastSquares",
    "WeightedSample",
    "ball_bound",
    "batch_regret",
    "bayes_error_risk",
    "bernoulli_regret",
    "bernoulli_weight",
    "binary_state_probs",
    "chernoff_rate",
    "christoffel",
    "cs_ib_loss",
    "dpp_conditional",
    "empirical_inductive_bias",
    "error_moments",
    "exact_inductive_bias",
    "gaussian_regret",
    "gaussian_weight",
    "hypothesis_weight",
    "inductive_bias",
    "information_projection",
    "kernel_hypothesis_space",
    "linear_regression_regret",
    "minimum_sample_size",
    "online_regret",
    "orthonormal_basis",
    "pairwise_binary_family",
    "pn_criterion",
    "projection_dpp_logprob",
    "required_samples",
    "risk_expansion",
    "risk_from_cumulants",
    "sample_optimal_iid",
    "sample_projection_dpp",
    "sample_volume",
    "satterthwaite",
    "scaled_ncx2_fit",
    "soft_bound",
    "tic_penalty",
    "volume_logprob",
    "weighted_least_squares",
]


def __getattr__(name: str) -> Any:
    # scikit-learn is optional: its estimator is loaded when asked for
    if name == "WeightedLeastSquares":
        from steelyard.estimation.weighted_regressor import WeightedLeastSquares

        return WeightedLeastSquares
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
