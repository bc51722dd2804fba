"""Logistic fits of a scorecard: plain, with signs held, or with a budget on group disparity.

The disparity of a score is the information value between two groups over its quantile bins. It is
a step function of the coefficients, so the fit uses sigmoid edges and the result is judged on hard
bins.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize
from scipy.special import expit

from steelyard._extras import require
from steelyard.tabular.tables import iv_and_variance

__all__ = ["LogisticData", "fit_fair", "fit_plain", "fit_signed", "score_bin_counts", "soft_iv"]

Array = NDArray[np.float64]
_TINY = 0.05  # of the largest effect


@dataclass(frozen=True)
class LogisticData:
    """Features ``[n, p]``, outcome ``[n]`` in {0, 1}, weights ``[n]``, and the strength C."""

    features: Array
    bad: Array
    weight: Array
    C: float

    def loss(self, parameters: Array) -> tuple[float, Array]:
        """Penalised mean log loss and its gradient; the intercept is the last parameter."""
        score = self.features @ parameters[:-1] + parameters[-1]
        share = self.weight / self.weight.sum()
        shrink = 1 / (self.C * self.weight.sum())
        value = share @ (np.logaddexp(0, score) - self.bad * score)
        slope = share * (expit(score) - self.bad)
        gradient = np.append(self.features.T @ slope + shrink * parameters[:-1], slope.sum())
        return float(value + shrink / 2 * parameters[:-1] @ parameters[:-1]), gradient


def fit_plain(data: LogisticData) -> Array:
    """Coefficients and intercept ``[p + 1]`` without constraints."""
    linear = require("sklearn.linear_model", extra="tabular")
    model = linear.LogisticRegression(C=data.C, solver="newton-cholesky", tol=1e-10, max_iter=200)
    model.fit(data.features, data.bad, sample_weight=data.weight)
    return np.append(model.coef_[0], model.intercept_[0])


def fit_signed(data: LogisticData, sign: float) -> Array:
    """Coefficients of one sign: ``-1`` = none above 0, ``+1`` = none below, 0 = free."""
    start = np.zeros(data.features.shape[1] + 1)
    return _minimise(data.loss, start, sign)


def fit_fair(
    data: LogisticData, group: NDArray[np.bool_], budget: float, *, num_bins: int, sign: float
) -> Array:
    """Fit with a disparity of the hard score bins within the budget.

    The weight of the soft disparity is raised until the budget holds, then bisected.

    Raises:
        ValueError: the budget is not reached by any weight.
    """
    free = fit_signed(data, sign)
    if _disparity(data, free, group, num_bins) <= budget:
        return free
    weight, below, above, best, start = 0.01, 0.0, None, None, free
    for _ in range(36):
        found = _penalised(data, start, group, weight, num_bins=num_bins, sign=sign)
        # a tiny coefficient still orders rows of equal score by group: try it without
        trials = (found, _without_tiny(data, found))
        held = [trial for trial in trials if _disparity(data, trial, group, num_bins) <= budget]
        if held:
            above, best, start = weight, held[0], free
        else:
            below, start = weight, found
        if above is not None and above < 1.02 * below:
            break
        if above is None and weight > 1e5:
            break
        weight = 4 * below if above is None else (below * above) ** 0.5 or above / 4
    if best is None:
        chance = (num_bins - 1) * (1 / group.sum() + 1 / (~group).sum())
        raise ValueError(
            f"fairness_budget {budget} was not reached; the disparity expected by chance alone "
            f"with {num_bins} bins of this sample is {chance:.3g}"
        )
    return best


def soft_iv(
    score: Array, weight: Array, group: NDArray[np.bool_], cuts: Array, temperature: float
) -> tuple[float, Array]:
    """Information value of the two groups over sigmoid bins of the standardised score.

    Returns the value and its gradient in ``score``. ``cuts`` are in units of the standardised
    score, so shrinking all coefficients changes nothing.
    """
    share = weight / weight.sum()
    mean = share @ score
    deviation = np.sqrt(share @ (score - mean) ** 2) + 1e-300
    standard = (score - mean) / deviation
    gate = expit((standard[:, None] - cuts) / temperature)
    ends = np.ones((len(score), 1))
    member = np.concatenate([ends, gate], axis=1) - np.concatenate([gate, 0 * ends], axis=1)
    shares = [np.where(mask, weight, 0.0) / weight[mask].sum() for mask in (~group, group)]
    p, q = (part @ member + 1e-9 for part in shares)
    log_ratio = np.log(p) - np.log(q)
    slope = np.outer(shares[0], log_ratio + 1 - q / p) + np.outer(shares[1], 1 - log_ratio - p / q)
    by_gate = (slope[:, 1:] - slope[:, :-1]) * gate * (1 - gate) / temperature
    inner = by_gate.sum(1)
    gradient = (inner - share * inner.sum() - share * standard * (inner @ standard)) / deviation
    return float((p - q) @ log_ratio), gradient


def score_bin_counts(score: Array, weight: Array, group: Any, num_bins: int) -> Array:
    """Weights of the two groups in quantile bins of a score, ``[K, 2]``; ties stay together."""
    cuts = np.unique(np.quantile(score, np.arange(1, num_bins) / num_bins))
    code = np.searchsorted(cuts, score, side="left")
    counts = [np.bincount(code, weight * mask, minlength=len(cuts) + 1) for mask in (~group, group)]
    table: Array = np.stack(counts, axis=1)
    kept: Array = table[table.sum(1) > 0]
    return kept


def _without_tiny(data: LogisticData, parameters: Array) -> Array:
    size = np.abs(parameters[:-1]) * data.features.std(axis=0)
    kept = np.where(size < _TINY * size.max(initial=0.0), 0.0, parameters[:-1])
    return np.append(kept, parameters[-1])


def _disparity(
    data: LogisticData, parameters: Array, group: NDArray[np.bool_], num_bins: int
) -> float:
    score = data.features @ parameters[:-1]
    table = score_bin_counts(score, data.weight, group, num_bins) + 0.5
    return iv_and_variance(table[:, 0], table[:, 1])[0]


def _penalised(
    data: LogisticData,
    start: Array,
    group: NDArray[np.bool_],
    strength: float,
    *,
    num_bins: int,
    sign: float,
) -> Array:
    """Minimise loss + strength * soft disparity, with bin edges renewed from the last score."""
    parameters = start
    for _ in range(3):
        score = data.features @ parameters[:-1]
        spread = score.std()
        if spread == 0:
            break
        levels = np.quantile((score - score.mean()) / spread, np.arange(1, num_bins) / num_bins)
        cuts = np.unique(levels)

        def objective(trial: Array, cuts: Array = cuts) -> tuple[float, Array]:
            value, gradient = data.loss(trial)
            trial_score = data.features @ trial[:-1]
            disparity, slope = soft_iv(trial_score, data.weight, group, cuts, 0.1)
            by_parameter = np.append(data.features.T @ slope, 0.0)
            return value + strength * disparity, gradient + strength * by_parameter

        parameters = _minimise(objective, parameters, sign, steps=60)
    return parameters


def _minimise(objective: Any, start: Array, sign: float, *, steps: int = 1000) -> Array:
    bounds = {-1.0: (None, 0.0), 1.0: (0.0, None)}.get(sign, (None, None))
    found = optimize.minimize(
        objective,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=[*([bounds] * (len(start) - 1)), (None, None)],
        options={"maxiter": steps, "ftol": 1e-15, "gtol": 1e-9},
    )
    parameters: Array = found.x
    return parameters
