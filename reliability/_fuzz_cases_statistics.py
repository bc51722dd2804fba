"""Valid calls of estimation and causal bounds."""

# ruff: noqa: C408 - a case reads like the call it stands for

import functools

import torch

from _fuzz_values import (
    DTYPE,
    array,
    classes,
    covariance,
    generator,
    integers,
    linear,
    ones,
    positive,
    probs,
    real,
    unit,
)
from steelyard import causal, estimation


def family():
    """Two statistics on four points."""
    return estimation.ExponentialFamily(real(4, 2), torch.ones(4, dtype=DTYPE))


def gaussian():
    """A Gaussian family on two variables."""
    return estimation.GaussianGraphicalFamily(2, edges=[(0, 1)])


def theta():
    """Natural parameters of that family."""
    return torch.tensor([0.1, -0.2, -0.6, -0.7, 0.1], dtype=DTYPE)


def of_family(**more):
    """An argument of a method of the finite family."""
    return dict(self_=family()) | more


def of_gaussian(**more):
    """An argument of a method of the Gaussian family."""
    return dict(self_=gaussian()) | more


def symmetric(size):
    """A symmetric matrix."""
    return real(size, size) + real(size, size).T


def measure():
    """A law of six candidates."""
    return probs(6)


def basis():
    """Two functions orthonormal for it."""
    return estimation.orthonormal_basis(real(6, 2), measure())


def design(**more):
    """Candidates for least squares."""
    return dict(basis=basis(), measure=measure()) | more


def mixture(**more):
    """Three laws of two symbols."""
    return dict(models=probs(3, 2), prior=probs(3)) | more


def kls(**more):
    """Distances of three hypotheses."""
    return dict(kls=positive(3), prior=probs(3)) | more


def bottleneck():
    """An information bottleneck."""
    return estimation.CauchySchwarzBottleneck(linear(2, 2), linear(2, 2), beta=0.1)


def weighted_fit(X, y, sample_weight):
    """Fit and predict."""
    return estimation.WeightedLeastSquares().fit(X, y, sample_weight=sample_weight).predict(X)


def finite(name, **arguments):
    """The case of one method of the finite family."""
    return {f"estimation.ExponentialFamily.{name}": lambda: of_family(**arguments)}


def graphical(name, **arguments):
    """The case of one method of the Gaussian family."""
    return {f"estimation.GaussianGraphicalFamily.{name}": lambda: of_gaussian(**arguments)}


ESTIMATION = {
    "estimation.ExponentialFamily": lambda: dict(statistics=real(4, 2), base=positive(4)),
    **{
        key: case
        for name in ("log_probs", "probs", "log_normalizer", "mean", "covariance", "third_cumulant")
        for key, case in finite(name, theta=real(2)).items()
    },
    **finite("fourth_contraction", theta=real(2), pairs=symmetric(2)),
    **finite("kl", theta=real(2), other=real(2, shift=1)),
    **finite("truth_mean", truth=probs(4)),
    **finite("truth_cumulants", truth=probs(4)),
    **finite("start", eta=real(2) / 9),
    "estimation.GaussianGraphicalFamily": lambda: dict(dim=2, edges=[(0, 1)]),
    **{
        key: case
        for name in ("precision", "moments", "log_normalizer", "mean", "covariance")
        for key, case in graphical(name, theta=theta()).items()
    },
    **graphical("third_cumulant", theta=theta()),
    **graphical("fourth_contraction", theta=theta(), pairs=symmetric(5)),
    **graphical("kl", theta=theta(), other=theta() * 1.1),
    **graphical("statistics", data=real(9, 2)),
    **graphical("truth_mean", truth=real(9, 2)),
    **graphical("truth_cumulants", truth=real(9, 2)),
    "estimation.GaussianGraphicalFamily.start": lambda: of_gaussian(eta=gaussian().mean(theta())),
    "estimation.BayesianMixture": mixture,
    "estimation.BayesianMixture.update": lambda: dict(
        self_=estimation.BayesianMixture(**mixture()), symbols=classes(4)
    ),
    "estimation.CauchySchwarzBottleneck": lambda: dict(
        encoder=linear(2, 2), decoder=linear(2, 2), beta=0.1
    ),
    "estimation.CauchySchwarzBottleneck.encode": lambda: dict(self_=bottleneck(), x=real(5, 2)),
    "estimation.CauchySchwarzBottleneck.forward": lambda: dict(self_=bottleneck(), x=real(5, 2)),
    "estimation.CauchySchwarzBottleneck.loss": lambda: dict(
        self_=bottleneck(), x=real(5, 2), y=real(5, 2, shift=1), mask=ones(5)
    ),
    "estimation.cs_ib_loss": lambda: dict(
        x=real(5, 2),
        y=real(5, 1, shift=1),
        y_hat=real(5, 1, shift=2),
        t=real(5, 2, shift=3),
        beta=0.1,
        mask=ones(5),
    ),
    "estimation.SGLD": lambda: dict(
        params=[real(3).requires_grad_()], lr=0.1, num_data=9.0, generator=generator()
    ),
    "estimation.WeightedLeastSquares.fit": lambda: dict(
        call_=weighted_fit, X=array(6, 2), y=array(6), sample_weight=positive(6).numpy()
    ),
    "estimation.WeightedLeastSquares.predict": lambda: dict(
        self_=estimation.WeightedLeastSquares().fit(array(6, 2), array(6)), X=array(4, 2)
    ),
    "estimation.ball_bound": lambda: kls(epsilon=0.9, n=5),
    "estimation.hypothesis_weight": lambda: kls(epsilon=0.9),
    "estimation.soft_bound": lambda: kls(n=5),
    "estimation.batch_regret": lambda: mixture(truth=probs(2), n=3),
    "estimation.online_regret": lambda: mixture(truth=probs(2), n=3),
    "estimation.bayes_error_risk": lambda: dict(epsilon=0.1),
    "estimation.bernoulli_regret": lambda: dict(truth=0.3, n=4),
    "estimation.bernoulli_weight": lambda: dict(truth=0.3, epsilon=0.1),
    "estimation.gaussian_regret": lambda: dict(
        truth=0.3, n=4, noise_variance=1.0, prior_variance=2.0
    ),
    "estimation.gaussian_weight": lambda: dict(
        truth=0.3, epsilon=0.1, noise_variance=1.0, prior_variance=2.0
    ),
    "estimation.linear_regression_regret": lambda: dict(
        X=real(5, 2), truth=real(2), noise_variance=1.0, prior_variance=positive(2)
    ),
    "estimation.binary_state_probs": lambda: dict(data=classes(6, 2)),
    "estimation.pairwise_binary_family": lambda: dict(nodes=3, edges=[(0, 1), (1, 2)]),
    "estimation.chernoff_rate": lambda: dict(delta=0.5),
    "estimation.required_samples": lambda: dict(m=4, delta=0.5, eta=0.1),
    "estimation.christoffel": design,
    "estimation.orthonormal_basis": lambda: dict(features=real(6, 2), measure=measure()),
    "estimation.dpp_conditional": lambda: dict(basis=basis(), chosen=basis()[:1]),
    "estimation.projection_dpp_logprob": lambda: design(indices=integers(0, 3)),
    "estimation.volume_logprob": lambda: design(indices=integers(0, 3, 5), weights=6 * measure()),
    "estimation.sample_optimal_iid": lambda: design(n=3, generator=generator()),
    "estimation.sample_projection_dpp": lambda: design(generator=generator()),
    "estimation.sample_volume": lambda: design(n=4, generator=generator()),
    "estimation.weighted_least_squares": lambda: dict(
        basis=real(5, 2), values=real(5, shift=1), weights=positive(5)
    ),
    "estimation.inductive_bias": lambda: dict(test_error=0.5, df=3.0, noncentrality=1.0, scale=0.4),
    "estimation.empirical_inductive_bias": lambda: dict(
        test_error=0.9, errors=positive(6), weights=positive(6, shift=1)
    ),
    "estimation.satterthwaite": lambda: dict(mean=1.0, variance=0.5),
    "estimation.scaled_ncx2_fit": lambda: dict(errors=positive(20)),
    "estimation.kernel_hypothesis_space": lambda: dict(
        X_train=real(4, 2),
        y_train=real(4),
        X_test=real(3, 2, shift=1),
        y_test=real(3),
        bandwidth=1.0,
        jitter=0.01,
    ),
    "estimation.error_moments": lambda: dict(covariance=covariance(3), residual=real(3)),
    "estimation.exact_inductive_bias": lambda: dict(
        test_error=0.5, covariance=covariance(3), residual=real(3)
    ),
    "estimation.information_projection": lambda: dict(family=family(), truth_probs=probs(4)),
    "estimation.pn_criterion": lambda: dict(
        family=family(), truth_probs=probs(4), n=50, threshold=0.1
    ),
    "estimation.risk_expansion": lambda: dict(family=family(), truth_probs=probs(4)),
    "estimation.tic_penalty": lambda: dict(family=family(), truth_probs=probs(4)),
    "estimation.minimum_sample_size": lambda: dict(c1=1.0, c2=0.5),
    "estimation.risk_from_cumulants": lambda: dict(
        model_covariance=covariance(2),
        model_third=torch.ones(2, 2, 2, dtype=DTYPE),
        model_fourth=torch.ones(2, 2, 2, 2, dtype=DTYPE),
        truth_covariance=covariance(2),
        truth_third=torch.ones(2, 2, 2, dtype=DTYPE),
    ),
}


def outcomes(**more):
    """Two laws of three outcomes."""
    return dict(y=torch.tensor([0.0, 0.5, 1.0]).double(), p=probs(3), propensity=0.4) | more


def bounds(**more):
    """Bounds on both arms of four units."""
    return dict(lower=unit(4, 2) / 4, upper=0.5 + unit(4, 2) / 4) | more


def causal_bounds(X, treatment, outcome, arm, **settings):
    """Fit and ask for an interval."""
    model = causal.CausalBounds(divergences=["tv"], max_epochs=1, random_state=0, **settings)
    return model.fit(X, treatment, outcome).interval(X, arm)


@functools.cache
def fitted_bounds():
    """A fitted model of bounds without covariates."""
    data = (classes(20).numpy(), classes(20, of=4).numpy() // 2)
    return causal.CausalBounds(divergences=["tv"], max_epochs=1).fit(None, *data)


CAUSAL = {
    "causal.CausalBounds.fit": lambda: dict(
        call_=causal_bounds,
        X=array(20, 2),
        treatment=classes(20).numpy(),
        outcome=unit(20).numpy(),
        arm=1,
        folds=2,
        outcome_range=(0.0, 1.0),
        clip=0.01,
        hidden=(4,),
        learning_rate=0.003,
        weight_decay=0.0001,
        batch_size=8,
        patience=2,
    ),
    "causal.CausalBounds.interval": lambda: dict(self_=fitted_bounds(), X=None, arm=1),
    "causal.CausalBounds.effect": lambda: dict(self_=fitted_bounds()),
    "causal.aggregate_bounds": lambda: dict(lower=unit(3, 4) / 4, upper=0.5 + unit(3, 4) / 4),
    "causal.debiased_risk": lambda: dict(
        outcome=unit(6),
        treatment=classes(6),
        propensity=unit(6, shift=1),
        scale=positive(6, 2),
        shift=real(6, 2),
        divergence="kl",
        mask=ones(6),
    ),
    "causal.divergence_radius": lambda: dict(propensity=unit(4), divergence="kl"),
    "causal.radius_derivative": lambda: dict(propensity=unit(4), divergence="kl"),
    "causal.effect_bounds": bounds,
    "causal.policy_bounds": lambda: bounds(policy=classes(4), weights=positive(4)),
    "causal.policy_radius": lambda: dict(
        policy=classes(4), propensity=probs(4, 2), divergence="tv", weights=positive(4)
    ),
    "causal.finite_support_bounds": lambda: outcomes(divergence="kl", outcome_range=(0.0, 1.0)),
    "causal.manski_bounds": lambda: outcomes(outcome_range=(0.0, 1.0)),
    "causal.ipm_radius": lambda: dict(propensity=unit(4)),
}


CASES = {**ESTIMATION, **CAUSAL}
SLOW = {
    "causal.CausalBounds.fit",
    "estimation.bernoulli_weight",
    "estimation.scaled_ncx2_fit",
}
