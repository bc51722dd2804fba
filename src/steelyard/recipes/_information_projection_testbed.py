"""Laws, populations and fits of the recipe ``information_projection``."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import norm
from torch import Tensor

from steelyard.estimation import (
    ExponentialFamily,
    GaussianGraphicalFamily,
    RiskExpansion,
    binary_state_probs,
    information_projection,
    pairwise_binary_family,
    risk_expansion,
    risk_from_cumulants,
)
from steelyard.lab import data

Array = NDArray[np.float64]
AnyFamily = ExponentialFamily | GaussianGraphicalFamily

WRONG_LAWS = ("exponential of gamma", "normal of uniform", "normal of outliers")
LAWS = ("exponential", "normal", *WRONG_LAWS)
WINE_MODELS = ("pairs of 5", "pairs of 8", "pairs of 11", "normal")
TABLES = ("wine", "abalone")

SHAPE = 3.0  # of the gamma law that the exponential model meets
TRAITS = {5: (0, 1, 3, 9, 10), 8: (0, 1, 2, 3, 4, 6, 9, 10), 11: tuple(range(11))}
EDGE = 1e-12  # of the smallest eigenvalue of a covariance; far below that of fits that exist
POINTS = 10_000  # of the Monte Carlo estimate of a Bayes error between normal laws


def expansion_of(law: str) -> RiskExpansion:
    """Return c1 and c2 of a law of part exact."""
    if law.startswith("exponential"):
        k = SHAPE if "gamma" in law else 1.0
        one = torch.ones(1, 1, dtype=torch.float64)  # the mean is 1; cumulants of -x
        third, truth_third = -2 * one.view(1, 1, 1), -2 / k**2 * one.view(1, 1, 1)
        return risk_from_cumulants(one, third, 6 * one.view(1, 1, 1, 1), one / k, truth_third)
    if law == "normal":
        x, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(10))
        second, third, fourth = cumulants(weights / weights.sum(), torch.stack([x, x * x], 1))
        return risk_from_cumulants(second, third, fourth, second, third)  # exact to degree 19
    return risk_expansion(GaussianGraphicalFamily(1), torch.from_numpy(points_of(law))[:, None])


def points_of(law: str) -> Array:
    """Return equally likely points: a uniform law, or a normal one with 5 % of outliers."""
    if law == "normal of uniform":
        return np.linspace(-1.0, 1.0, 2001)
    body = norm.ppf((np.arange(190) + 0.5) / 190)
    return np.concatenate([body, np.linspace(3.0, 4.0, 5), -np.linspace(3.0, 4.0, 5)])


def losses_of(law: str, n: int, samples: int, generator: np.random.Generator) -> Array:
    """Divergence of the fitted from the best member, for each sample of ``n`` rows."""
    if law.startswith("exponential"):
        k = SHAPE if "gamma" in law else 1.0
        mean = generator.gamma(n * k, 1 / (n * k), samples)
        return np.asarray(np.log(mean) + 1 / mean - 1)
    if law == "normal":
        mean = generator.standard_normal(samples) / math.sqrt(n)
        variance = generator.chisquare(n - 1, samples) / n
        true_mean, true_variance = 0.0, 1.0
    else:
        points = points_of(law)
        rows = points[generator.integers(len(points), size=(samples, n))]
        mean, variance = rows.mean(1), rows.var(1)
        true_mean, true_variance = points.mean(), points.var()
    ratio = true_variance / variance
    return np.asarray((ratio - 1 - np.log(ratio) + (mean - true_mean) ** 2 / variance) / 2)


def above_median(measurements: Array, columns: tuple[int, ...]) -> Tensor:
    """Return the law of the traits "above its median", over all states."""
    chosen = measurements[:, columns]
    return binary_state_probs(torch.from_numpy(chosen > np.median(chosen, axis=0)))


def standardised(measurements: Array) -> Tensor:
    """Return columns of mean 0 and variance 1, cut at 3: the population of a normal model."""
    z = (measurements - measurements.mean(0)) / measurements.std(0)
    return torch.from_numpy(np.clip(z, -3.0, 3.0))


def sample(truth: Tensor, n: int, generator: np.random.Generator) -> Tensor:
    """Draw ``n`` rows of a population, a law or rows, and return their own law or rows."""
    if truth.dim() == 1:
        probs = truth.numpy() / float(truth.sum())
        return torch.from_numpy(generator.multinomial(n, probs) / n)
    return truth[torch.from_numpy(generator.integers(len(truth), size=n))]


def fitted(family: AnyFamily, found: Tensor) -> Tensor | None:
    """Return the maximum-likelihood estimate, ``None`` where there is none."""
    try:
        theta = information_projection(family, found).theta
    except ValueError:
        return None
    # on the edge of what the statistics can reach they end up dependent on one another
    smallest = torch.linalg.eigvalsh(family.covariance(theta))[0]
    return theta if bool(smallest > EDGE) else None


def gap_from(
    family: AnyFamily, best: Tensor, generator: np.random.Generator
) -> Callable[[Tensor], float]:
    """Return a function that gives 1/2 - Bayes error between the best member and another.

    It is half the total variation: a sum over states, or a mean over draws of the best member.
    """
    if isinstance(family, ExponentialFamily):
        law = family.probs(best)
        return lambda theta: float((law - family.probs(theta)).abs().sum() / 4)
    mean, covariance = (m.numpy() for m in family.moments(best))
    draws = torch.from_numpy(generator.multivariate_normal(mean, covariance, POINTS))
    statistics = family.statistics(draws)

    def gap(theta: Tensor) -> float:
        level = family.log_normalizer(theta) - family.log_normalizer(best)
        ratio = (statistics @ (theta - best) - level).exp()
        return float((1 - ratio).clamp(min=0).mean() / 2)

    return gap


def wine_model(model: str) -> tuple[AnyFamily, Tensor]:
    """Return a model of the wines and the population."""
    if model == "normal":
        return GaussianGraphicalFamily(11), standardised(data.red_wine())
    nodes = int(model.rsplit(" ", 1)[1])
    return pairwise_binary_family(nodes), above_median(data.red_wine(), TRAITS[nodes])


def nested_models(table: str) -> tuple[dict[str, AnyFamily], Tensor]:
    """Return nested models, from small to large, and the population."""
    if table == "abalone":
        chain = [(i, i + 1) for i in range(6)]
        graphs: dict[str, list[tuple[int, int]] | None] = {"none": [], "chain": chain, "all": None}
        normal = {name: GaussianGraphicalFamily(7, edges) for name, edges in graphs.items()}
        return dict(normal), standardised(data.abalone())
    truth = above_median(data.red_wine(), TRAITS[5])
    states = pairwise_binary_family(5).statistics[:, :5]
    models: dict[str, AnyFamily] = {}
    columns: list[Tensor] = []
    for order, name in ((1, "main"), (2, "pairs"), (3, "triples")):
        columns += [states[:, list(c)].prod(1) for c in itertools.combinations(range(5), order)]
        models[name] = ExponentialFamily(torch.stack(columns, 1))
    return models, truth


def gibbs(theta: Array, nodes: int, draws: int, generator: np.random.Generator) -> Tensor:
    """Return the law of at least ``draws`` states of a pairwise model, from 500 chains."""
    field, pair = theta[:nodes], np.zeros((nodes, nodes))
    pair[np.triu_indices(nodes, 1)] = theta[nodes:]
    pair += pair.T
    state = generator.integers(0, 2, (500, nodes)).astype(np.float64)
    burn, kept = 50, []
    for sweep in range(burn + math.ceil(draws / len(state))):
        for node in range(nodes):
            odds = field[node] + state @ pair[node]
            state[:, node] = generator.random(len(state)) < 1 / (1 + np.exp(-odds))
        if sweep >= burn:
            kept.append(state.copy())
    return binary_state_probs(torch.from_numpy(np.concatenate(kept)))


def cumulants(law: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the second, third and fourth cumulants of the statistics under a law."""
    z = statistics - law @ statistics
    second = torch.einsum("s,sa,sb->ab", law, z, z)
    third = torch.einsum("s,sa,sb,sc->abc", law, z, z, z)
    fourth = torch.einsum("s,sa,sb,sc,sd->abcd", law, z, z, z, z)
    for pairing in ("ab,cd->abcd", "ac,bd->abcd", "ad,bc->abcd"):
        fourth = fourth - torch.einsum(pairing, second, second)
    return second, third, fourth
