"""What the recipe on causal bounds is tested on: laws whose truth is known, and other solvers."""

import itertools
import math
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.special import expit
from scipy.stats import norm
from torch import Tensor

from steelyard.causal import debiased_risk, radius_derivative
from steelyard.causal.bounds import Divergence

Array = NDArray[np.float64]

DIVERGENCES: tuple[Divergence, ...] = ("kl", "hellinger", "chi2", "tv", "js")
AT_ZERO = {"kl": 0.0, "hellinger": 0.5, "chi2": 0.5, "tv": 0.5, "js": math.log(2) / 2}
RANGE_SIZES = (200, 2_000, 20_000)
RANGE_PROPENSITY = 0.7
ESTIMATORS = ("plain", "debiased", "corrected")
CELL_DIVERGENCES: tuple[Divergence, ...] = ("kl", "chi2")
OUTCOMES = {"kg": (-50.0, 50.0), "more than 5 kg": (0.0, 1.0)}


# ---- exact ----------------------------------------------------------------------------------

VALUES = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)
UNIT = (0.0, 1.0)
CONFOUNDERS = 3  # values of the hidden confounder


class Models(NamedTuple):
    """Observed and interventional laws ``[M, 2, 5]`` and propensities ``[M, 2]``, by arm."""

    observed: Tensor
    interventional: Tensor
    propensity: Tensor


def random_models(count: int, generator: np.random.Generator) -> Models:
    """Draw a hidden confounder that acts on the arm and on the outcome, in each model anew."""
    confounder = generator.dirichlet(np.ones(CONFOUNDERS), count)
    treated = generator.beta(0.5, 0.5, (count, CONFOUNDERS)).clip(1e-3, 1 - 1e-3)
    arm = np.stack([1 - treated, treated], 1)  # [M, 2, U]
    outcome = generator.dirichlet(np.full(len(VALUES), 0.5), (count, 2, CONFOUNDERS))
    joint = confounder[:, None, :] * arm
    propensity = joint.sum(-1)
    observed = np.einsum("mau,mauy->may", joint / propensity[..., None], outcome)
    interventional = np.einsum("mu,mauy->may", confounder, outcome)
    return Models(*map(torch.from_numpy, (observed, interventional, propensity)))


def divergence(name: str, p: Tensor, q: Tensor) -> Tensor:
    """``E_q f(p/q)``, written out here a second time."""
    t = p / q
    middle = (t + 1) / 2
    values = {
        "kl": torch.xlogy(t, t),
        "hellinger": (t.sqrt() - 1).square() / 2,
        "chi2": (t - 1).square() / 2,
        "tv": (t - 1).abs() / 2,
        "js": (torch.xlogy(t, t) - 2 * torch.xlogy(middle, middle)) / 2,
    }[name]
    return (q * values).sum(-1)


def by_linear_program(p: Tensor, e: Tensor) -> Tensor:
    """Largest mean with ``sum |p - q| / 2 <= 1 - e``, as a linear program in ``(q, |p - q|)``."""
    size = len(VALUES)
    eye = np.eye(size)
    found = []
    for law, kept in zip(p.numpy(), e.numpy(), strict=True):
        rows = np.block([[eye, -eye], [-eye, -eye], [np.zeros(size), np.ones(size)]])
        limits = np.concatenate([law, -law, [2 * (1 - kept)]])
        total = np.concatenate([np.ones(size), np.zeros(size)])[None]
        goal = np.concatenate([-VALUES.numpy(), np.zeros(size)])
        found.append(-linprog(goal, rows, limits, total, [1.0]).fun)
    return torch.tensor(found, dtype=torch.float64)


def by_dual_problem(p: Tensor, e: Tensor, *, name: Divergence) -> Tensor:
    """Least value of the dual, one problem after the other: never below the largest mean."""
    found = []
    for law, kept in zip(p, e, strict=True):
        rows = torch.zeros(len(VALUES), dtype=torch.long)
        treated, propensity = torch.ones_like(VALUES), kept.expand(len(VALUES))
        dual = fit_dual(VALUES, treated, propensity, rows, name, debias=False, weights=law)
        risk = partial(debiased_risk, VALUES, treated, propensity, debias=False, reduction="none")
        found.append((law * risk(dual.scale[rows], dual.shift[rows], name)).sum())
    return torch.stack(found)


class Dual(NamedTuple):
    """``lambda`` and ``u`` of each cell and arm, ``[C, 2]``."""

    scale: Tensor
    shift: Tensor


def fit_dual(
    y: Tensor,
    treated: Tensor,
    propensity: Tensor,
    cell: Tensor,
    name: Divergence,
    *,
    debias: bool,
    weights: Tensor | None = None,
    steps: int = 1000,
) -> Dual:
    """Minimise the risk over tables of ``lambda`` and ``u`` for outcomes in [0, 1].

    ``u + lambda f(0) = 1 + nu`` with ``nu > 0`` keeps the dual finite for every outcome up to 1.
    """
    raw = torch.full((2, int(cell.max()) + 1, 2), -0.7, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [raw],
        max_iter=steps,
        history_size=30,
        tolerance_grad=1e-11,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )
    share = torch.full_like(y, 1 / len(y)) if weights is None else weights

    def variables() -> Dual:
        scale = raw[0].clamp(-18.0, 12.0).exp()
        return Dual(scale, 1 - scale * AT_ZERO[name] + raw[1].clamp(-25.0, 7.0).exp())

    def closure() -> Tensor:
        search.zero_grad()
        scale, shift = variables()
        risk = debiased_risk(
            y, treated, propensity, scale[cell], shift[cell], name, debias=debias, reduction="none"
        )
        loss = (share * risk).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    search.step(closure)  # type: ignore[no-untyped-call]
    return Dual(*(value.detach() for value in variables()))


# ---- ihdp -----------------------------------------------------------------------------------

OBSERVED = ("bw", "momage", "sex", "first", "cig")
LIMIT = 3.0  # outcomes are scores of mean 0 and variance 1, cut at 3: their declared range


def ihdp_outcomes(
    X: Array, treated: NDArray[np.int64], generator: np.random.Generator
) -> tuple[Array, Array]:
    """Draw surface B of Hill (2011) as a cut score; return outcomes and true means ``[n, 2]``."""
    beta = generator.choice([0.0, 0.1, 0.2, 0.3, 0.4], X.shape[1], p=[0.6, 0.1, 0.1, 0.1, 0.1])
    control, linear = np.exp((X + 0.5) @ beta), X @ beta
    shift = (linear - control)[treated == 1].mean() - 4
    means = np.stack([control, linear - shift], 1)
    centre, spread = means.mean(), math.sqrt(means.var() + 1)
    means, noise = (means - centre) / spread, 1 / spread
    own = means[np.arange(len(X)), treated]
    y = np.clip(own + noise * generator.standard_normal(len(X)), -LIMIT, LIMIT)
    return y, cut_mean(means, noise)


def cut_mean(mean: Array, spread: float) -> Array:
    """Mean of a normal variable that is cut at ``-LIMIT`` and ``LIMIT``."""
    low, high = (-LIMIT - mean) / spread, (LIMIT - mean) / spread
    inside = norm.cdf(high) - norm.cdf(low)
    cut = LIMIT * (norm.sf(high) - norm.cdf(low))
    return np.asarray(mean * inside + spread * (norm.pdf(low) - norm.pdf(high)) + cut)


# ---- cells ----------------------------------------------------------------------------------

CELLS = 8
CELL_STEPS = 150  # most iterations of the search for the dual variables


class Cells(NamedTuple):
    """Laws of the outcome ``[C, 2, 5]`` by cell and arm, and the propensity of arm 1 ``[C]``."""

    laws: Tensor
    propensity: Tensor


def draw_cells(generator: np.random.Generator) -> Cells:
    """Draw the laws; propensities go from 0.35 to 0.65."""
    laws = generator.dirichlet(np.ones(len(VALUES)), (CELLS, 2))
    propensity = torch.linspace(0.35, 0.65, CELLS, dtype=torch.float64)
    return Cells(torch.from_numpy(laws), propensity)


def noisy_propensity(e: Tensor, n: int, generator: np.random.Generator) -> Tensor:
    """Add normal noise of mean and spread ``n^(-1/4)``, as in the paper; keep to [0.05, 0.95]."""
    size = n**-0.25
    noise = torch.from_numpy(generator.normal(size, size, len(e)))
    return (e + noise).clamp(0.05, 0.95)


def bound_of(
    dual: Dual,
    y: Tensor,
    treated: Tensor,
    propensity: Tensor,
    cell: Tensor,
    name: Divergence,
    *,
    corrected: bool,
) -> Tensor:
    """Upper bound of each cell and arm, ``[C, 2]``: ``lambda (B + g*) + u``, averaged.

    ``corrected`` adds the arm's part of the debiased risk, ``e lambda B'(e) (1{A = a} - e)``, so
    that an error of the propensity counts only in second order, in the radius too.
    """
    scale, shift = dual.scale[cell], dual.shift[cell]
    risk = partial(debiased_risk, y, treated, propensity, debias=False, reduction="none")
    plain = risk(scale, shift, name)
    bounds = torch.zeros_like(dual.scale)
    for arm, c in itertools.product((0, 1), range(len(bounds))):
        here, received = cell == c, treated == bool(arm)
        e = propensity if arm else 1 - propensity
        mean = plain[here & received].mean()
        if corrected:
            added = e * radius_derivative(e, name) * (received.to(e.dtype) - e)
            mean = mean + dual.scale[c, arm] * added[here].sum() / (here & received).sum()
        bounds[c, arm] = mean
    return bounds


def cell_errors(
    population: Cells, n: int, name: Divergence, generator: np.random.Generator
) -> dict[str, float]:
    """Mean squared differences that noise in the propensity makes, on one sample."""
    cell = torch.from_numpy(generator.integers(CELLS, size=n))
    e = population.propensity[cell]
    treated = torch.from_numpy(generator.random(n)) < e
    law = population.laws[cell, treated.long()].cumsum(1).numpy()
    y = VALUES[(generator.random((n, 1)) > law[:, :-1]).sum(1)]
    noisy = noisy_propensity(e, n, generator)
    differences: dict[str, Tensor] = {}
    for kind, debias in (("plain", False), ("debiased", True)):
        duals = [
            fit_dual(y, treated, p, cell, name, debias=debias, steps=CELL_STEPS) for p in (e, noisy)
        ]
        differences[f"{kind}_dual"] = duals[1].scale.log() - duals[0].scale.log()
        for result, corrected in ((kind, False), ("corrected", True)):
            bounds = [
                bound_of(dual, y, treated, p, cell, name, corrected=corrected)
                for dual, p in zip(duals, (e, noisy), strict=True)
            ]
            differences[f"{result}_bound"] = bounds[1] - bounds[0]  # the last one is debiased
    return {key: float(value.square().mean()) for key, value in differences.items()}


# ---- rate -----------------------------------------------------------------------------------

COVARIATES = 5
RATE_RANGE = (-8.0, 10.0)  # outcomes are cut to it, and it is declared
QUADRATURE = np.polynomial.hermite_e.hermegauss(20)


class GivenPropensity:
    """A propensity model that is told the truth, plus noise; it sees standardised covariates."""

    def __init__(self, weights: Array, centre: Array, spread: Array, noise: float, seed: int):
        self.weights, self.centre, self.spread = weights, centre, spread
        self.noise = noise
        self.generator = np.random.default_rng(seed)

    def __sklearn_clone__(self) -> "GivenPropensity":
        return self

    def fit(self, X: Array, y: Array) -> "GivenPropensity":
        """Do nothing."""
        return self

    def predict_proba(self, X: Array) -> Array:
        """Return ``[n, 2]``."""
        e = true_propensity(X * self.spread + self.centre, self.weights)
        if self.noise > 0:
            e = e + self.generator.normal(self.noise, self.noise, len(e))
        e = e.clip(0.05, 0.95)
        return np.stack([1 - e, e], 1)


def arm_score(X: Array, weights: Array) -> Array:
    """Score of arm 1 without the confounder."""
    return np.asarray(X @ weights + 0.5 * np.sin(X[:, 0]) - 0.25 * X[:, 0] ** 2)


def true_propensity(X: Array, weights: Array) -> Array:
    """Average the chance of arm 1 over the hidden confounder."""
    nodes, masses = QUADRATURE
    chance = 0.05 + 0.9 * expit(arm_score(X, weights)[:, None] + 0.8 * nodes)
    return np.asarray(chance @ masses / masses.sum())


def draw_rate(
    n: int, weights: Array, generator: np.random.Generator
) -> tuple[Array, NDArray[np.int64], Array]:
    """Draw covariates, arms and outcomes of the paper's synthetic model."""
    X = generator.uniform(-2.0, 2.0, (n, COVARIATES))
    hidden = generator.standard_normal(n)
    e = 0.05 + 0.9 * expit(arm_score(X, weights) + 0.8 * hidden)
    treated = (generator.random(n) < e).astype(np.int64)
    base = 0.5 + 0.8 * np.tanh(X[:, 0]) + 0.25 * X[:, 1] ** 2 - 0.15 * np.sin(X[:, 2])
    effect = 0.7 + 0.2 * np.sin(X[:, 0]) + 0.1 * X[:, 0] + 0.8 * (e - 0.5)
    y = base + effect * treated + 0.7 * hidden + generator.standard_t(3, n)
    return X, treated, y.clip(*RATE_RANGE)
