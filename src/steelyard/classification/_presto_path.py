"""PRESTO for a row of penalties, each fit starting from the one before."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from steelyard.classification._presto_solver import (
    Array,
    Data,
    Fit,
    Likelihood,
    Penalty,
    solve,
)

SMALLEST_RATIO = 0.01
"""A ridge has no penalty that empties the model; its path starts as if it were 1 % lasso."""

EFFECTIVELY_INFINITE = 1e8
"""Slopes of a mean log-likelihood in scaled features are of order 1 at most."""


class Path:
    """The data of a path with what all its penalties share: null model, scale, settings."""

    def __init__(
        self, data: Data, *, penalize_base: bool, l1_ratio: float, tol: float, max_iter: int
    ) -> None:
        self.data, self.penalize_base, self.l1_ratio = data, penalize_base, l1_ratio
        self.max_iter = max_iter
        q, p = data.boundaries, data.x.shape[1]
        self.start = np.zeros((q, p + 1))
        self.start[:, 0] = data.null()
        self.slope = self._slope(self.start)
        scale = float(np.abs(self.slope).max(initial=0.0))
        self.threshold = tol * (scale or 1.0)

    def lambda_max(self) -> float:
        """Return the smallest penalty whose fit has no increments but free ones."""
        slope = self.slope
        if not self.penalize_base:
            slope = self.proportional_odds().slope[1:]
        return float(np.abs(slope).max(initial=0.0)) / max(self.l1_ratio, SMALLEST_RATIO)

    def proportional_odds(self) -> Fit:
        """Fit one free slope for all boundaries."""
        blocks = np.full(self.data.boundaries, EFFECTIVELY_INFINITE)
        blocks[0] = 0.0
        penalty = Penalty(blocks, np.zeros_like(blocks))
        return self._solve(penalty, self.start)

    def grid(self, count: int, ratio: float) -> Array:
        """Return ``count`` penalties from the largest down to ``ratio`` of it, evenly in the log.

        With one boundary and a free base nothing is penalised: the penalties are then 0.
        """
        top = self.lambda_max()
        return top * np.logspace(0.0, np.log10(ratio), count) if count > 1 else np.array([top])

    def fit(self, lam: float) -> Fit:
        """Fit one penalty from the null model."""
        return self._solve(self._penalty(lam), self.start)

    def fits(self, lambdas: Array) -> Iterator[Fit]:
        """Fit several, in the order given, which should be falling."""
        start, slope = self.start, self.slope
        last: float | None = None
        for lam in lambdas:
            penalty = self._penalty(lam)
            candidates = None
            if last is not None:
                # a slope moves at most about as much as the penalty: a guess, checked after the fit
                bound = 2 * penalty.l1 - self._penalty(last).l1
                candidates = np.any(np.abs(slope) >= bound[:, None], axis=0)
            fit = self._solve(penalty, start, candidates)
            start, slope, last = fit.z, fit.slope, lam
            yield fit

    def _penalty(self, lam: float) -> Penalty:
        return Penalty.build(
            lam, self.data.boundaries, penalize_base=self.penalize_base, l1_ratio=self.l1_ratio
        )

    def _solve(
        self, penalty: Penalty, start: Array, candidates: NDArray[np.bool_] | None = None
    ) -> Fit:
        return solve(
            self.data,
            penalty,
            start,
            threshold=self.threshold,
            max_iter=self.max_iter,
            candidates=candidates,
        )

    def _slope(self, z: Array) -> Array:
        likelihood = Likelihood(self.data, np.arange(z.shape[1] - 1))
        return likelihood.slope_everywhere(likelihood.residuals(likelihood.increments(z)))


def class_probabilities(eta: Array) -> Array:
    """Turn rising boundaries ``[n, K-1]`` into probabilities ``[n, K]``, small ones accurate."""
    count = len(eta)
    upper = np.column_stack([eta, np.full(count, np.inf)])
    lower = np.column_stack([np.full(count, -np.inf), eta])
    gap = np.column_stack([np.full(count, np.inf), np.diff(eta, axis=1), np.full(count, np.inf)])
    # sigma(a) - sigma(b) = sigma(a) sigma(-b) (1 - exp(-(a - b)))
    return np.asarray(_expit(upper) * _expit(-lower) * -np.expm1(-gap[:, : upper.shape[1]]))


def _expit(x: Array) -> Array:
    small = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1.0, small) / (1 + small))
