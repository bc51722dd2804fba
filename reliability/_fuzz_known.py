"""Bad answers that stand for now, and functions that answer outside their domain.

``KINDS`` holds what several functions share, by a part of the error; ``KNOWN`` holds one function
each. Both are written into the results, so that nothing is hidden by being known.
"""

KINDS: dict[str, str] = {
    "mat1 and mat2": "a module given another width or dtype: torch's own message, as of nn.Linear",
    "must be a matrix": "a module given another shape: torch's own message, as of nn.Linear",
    "expected m1 and m2": "a product of two dtypes: torch's own message",
    "out of bounds for": "labels are not read, to spare a synchronisation: torch's index error",
    "is out of bounds.": "labels are not read, to spare a synchronisation: torch's index error",
    "index out of range": "labels are not read, to spare a synchronisation: torch's index error",
    "Class values must be": "labels are not read, to spare a synchronisation: torch's own error",
    "Expected input batch_size": "a loss of torch, called with the user's labels",
    "Expected 2D array": "scikit-learn's own check of X",
    "Complex data not supported": "scikit-learn's own check of X and y",
    "Found array with": "scikit-learn's own check of X",
    "Sample weights must be": "scikit-learn's own check of sample_weight",
    "Found input variables": "scikit-learn's own check of X and y",
    "non-leaf Tensor": "torch's own check of the parameters of an optimiser",
    "Numerical result out of range": "Python's own error of a square beyond 1e154",
    "math range error": "Python's own error of a power beyond its range",
    "Low precision dtypes not supported": "no half-precision factorisations in torch on CPUs",
    "not implemented for 'Half'": "no half-precision kernel in torch on CPUs",
    "not implemented for 'BFloat16'": "no half-precision kernel in torch on CPUs",
}

KNOWN: dict[str, tuple[tuple[str, str], ...]] = {
    "anatomy.decompose": (
        ("labels", "an argument of the user's own loss"),
        ("Index tensor", "what the user's own loss says to the shape of the logits"),
        ("Size does not match", "what the user's own loss says to the shape of the logits"),
    ),
    "classification.ScgdTracker.update": (
        ("previous_losses: all nan", "documented: the first batch corrects nothing"),
        ("previous_losses: nan at", "documented: the first batch corrects nothing"),
    ),
    "divergences.joint_distance_covariance": (("argument after *", "Python's own star error"),),
    "optim.AdamP.step": (("closure", "torch's own optimiser protocol"),),
    "optim.SGDP.step": (("closure", "torch's own optimiser protocol"),),
    "equivariant.BundleConvolution.calibrate": (("NaN in", "returns nothing"),),
    "equivariant.Ponita.calibrate": (("NaN in", "returns nothing"),),
    "policy.ActorCritic.sample": (("NaN in", "actions are integers; reading logits is a sync"),),
    "policy.ActorCritic.greedy": (("NaN in", "actions are integers; reading logits is a sync"),),
    "policy.RunningMoments.update": (("NaN in", "returns nothing; the moments hold the NaN"),),
    "policy.ObservationNormalizer.update": (
        ("NaN in", "returns nothing; the moments hold the NaN"),
    ),
    "diffusion.awm_proximity": (("t: all nan", "t is not read with uniform weighting"),),
    "equilibrium.EquilibriumNetwork.error_vectors": (
        ("drive: all nan", "only the method 'cauchy' reads the drive"),
        ("drive: nan at", "only the method 'cauchy' reads the drive"),
    ),
    "equilibrium.EquilibriumNetwork.gradients": (
        ("drive: all nan", "only the method 'cauchy' reads the drive"),
        ("drive: nan at", "only the method 'cauchy' reads the drive"),
    ),
    "estimation.GaussianGraphicalFamily.precision": (
        ("theta: nan at", "documented: the first entries are not read"),
    ),
    "diffusion.decode_masked": (("ids must", "documented: what the user's own model says"),),
    "diffusion.information_gain_scores": (
        ("ids must", "documented: what the user's own model says"),
    ),
    "equilibrium.fixed_point": (("found no fixed point", "documented: no convergence"),),
    "equilibrium.relax": (("no rest after", "documented: it does not come to rest"),),
    "equilibrium.EquilibriumNetwork": (("NaN in", "an entry of the diagonal is not read"),),
    "metric_learning.opis": (("far_range", "not read when threshold_range is given"),),
    "preference.RunningBaseline.update": (("NaN in", "returns nothing; NaN is left out, as said"),),
    "preference.leave_one_out_baseline": (
        ("NaN in", "an infinite or NaN reward is left out of the means, as said"),
    ),
    "preference.variance_optimal_baseline": (
        ("rewards: all nan", "an infinite or NaN reward is left out, as said"),
        ("rewards: nan", "an infinite or NaN reward is left out, as said"),
    ),
    "preference.LogPartition.update": (("NaN in", "returns nothing; value holds the NaN"),),
    "preference.LogPartition.forward": (("NaN in", "returns nothing; value holds the NaN"),),
    "divergences.cauchy_schwarz_divergence": (("1e+30", "its square is beyond float32"),),
    "divergences.mmd_squared": (("1e+30", "its square is beyond float32"),),
    "equilibrium.homeostatic_loss": (
        ("e+30", "its square is beyond float32"),
        ("e+7", "the square of a probe of 1e74 and more is beyond float64"),
        ("e+1", "the square of a probe of 1e74 and more is beyond float64"),
    ),
    "equivariant.Ponita.forward": (
        ("e+1", "polynomials of distances of 1e100 and more are beyond float64"),
    ),
    "metric_learning.simclr_loss": (
        ("e-1", "logits over a temperature of 1e-38 are beyond float32"),
    ),
    "tabular.optimal_bins": (("iv_by_bins", "-inf where no such number of bins is allowed"),),
}

_OTHER_CELLS = {
    "FOWLKES_MALLOWS": ("tn",),
    "JACCARD": ("tn",),
    "PRECISION": ("fn", "tn"),
    "RECALL": ("fp", "tn"),
    "SPECIFICITY": ("tp", "fn"),
}
"""Cells of a confusion matrix that are in no place of a metric's formula."""

KNOWN |= {
    f"classification.{metric}": tuple(
        (f"{cell}: {where}", f"documented: the formula has no {cell}")
        for cell in cells
        for where in ("all nan", "nan at")
    )
    for metric, cells in _OTHER_CELLS.items()
}

DOMAIN: dict[str, str] = {
    "divergences.FDivergence.terms": "a log-probability above 0 is none, its exponential overflows",
    "preference.dpg_loss": "a log-probability above 0 is none, its exponential overflows",
    "divergences.FDivergence.f": "t < 0 is no density ratio",
    "divergences.FDivergence.derivative": "t < 0 is no density ratio; f'(0) may be infinite",
    "divergences.FDivergence.second_derivative": "t < 0 is no density ratio; f''(0) is infinite",
    "divergences.alpha_divergence": "f(0) and its dual are infinite for orders outside (0, 1)",
    "divergences.skew_jensen_shannon": "beta = 0 and 1 are the KL divergences, f(0) infinite",
    "diffusion.edm_noisy_target_variance": "levels of one size: infinite",
    "diffusion.data_to_velocity": "t at the end where the velocity is not defined",
    "diffusion.noise_to_velocity": "t at the end where the velocity is not defined",
    "diffusion.score_to_velocity": "t at the end where the velocity is not defined",
    "diffusion.velocity_to_score": "t at the end where the score is not defined",
    "diffusion.ddpo_step": "alphabar_prev = 1 is a step without noise",
    "diffusion.finite_data_velocity": "probabilities of total mass 0",
    "vision.federated_weights": "negative counts",
    "estimation.projection_dpp_logprob": "repeated indices span no volume: minus infinity",
    "estimation.exact_inductive_bias": "no hypothesis is good enough: infinite",
    "estimation.volume_logprob": "repeated indices span no volume: minus infinity",
    "estimation.inductive_bias": "an error of 0 has probability 0: infinity",
    "divergences.sinkhorn_plan": "marginals of total mass 0 cannot be normalised",
    "divergences.sinkhorn_potentials": "marginals of total mass 0 cannot be normalised",
    "divergences.sinkhorn_divergence": "marginals of total mass 0 cannot be normalised",
    "classification.COHEN_KAPPA": "negative counts",
    "classification.FOWLKES_MALLOWS": "negative counts",
    "classification.GEOMETRIC_MEAN": "negative counts",
    "classification.MATTHEWS": "negative counts",
    "classification.ConfusionMetric.__call__": "negative counts",
    "classification.proportional_odds_nll": "intercepts that are not ordered have likelihood 0",
    "diffusion.fake_score_loss": "sigma = 0 weighs an item infinitely",
    "diffusion.masked_nelbo": "a sequence of probability 0 under the model",
    "estimation.GaussianGraphicalFamily.log_normalizer": "a precision that is not positive",
    "estimation.GaussianGraphicalFamily.kl": "a precision that is not positive",
    "metric_learning.adaptive_temperature_loss": "a negative temperature",
    "metric_learning.temperature_penalty": "a negative temperature",
    "preference.variance_optimal_baseline": "a negative squared norm",
    "preference.ipo_flip_threshold": "pairs that never flip: minus infinity",
    "equilibrium.feedback_angle": "a zero matrix has no direction: NaN",
    "preference.idealized_log_ratio": "alpha outside (0, 1) is no share",
}
"""Functions of a real variable that answer outside their domain as ``torch.log`` does."""
