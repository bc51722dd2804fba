r"""PRESTO's fit to machine precision: Newton steps on a quadratic model, each solved exactly.

In the increments of the boundaries, :math:`z_k = (\delta_k, \psi_k)` and
:math:`\eta_k = \sum_{l \le k} z_l^\top (1, x)`, an item of class ``k`` costs

.. math::
    \log(1 + e^{-\eta_k}) + \log(1 + e^{\eta_{k-1}}) - \log(1 - e^{-z_k^\top (1, x)}) ,

each term where it exists: three convex functions of one number. Their second derivatives give the
Hessian as sums of weighted Gram matrices of the rows of one or two classes,

.. math:: H_{kl} = \sum_{m \ge \max(k, l)} S_m + [k = l]\, R_k ,

so that a step costs ``O(n p^2)`` and never builds the design of ``n (K - 1)`` rows. Features that
the penalty keeps at zero are left out until their slope asks for them.

Everything is NumPy in float64: the matrices are small and an iteration is a few dozen operations.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from steelyard.classification._lasso_quadratic import lasso_quadratic

Array = NDArray[np.float64]

RIDGE = 1e-10
"""Share of the mean curvature added to the model, so that equal columns have a solution. Steps
shorten by it, the point they end at stays."""

ARMIJO = 1e-4
MAX_HALVINGS = 50


@dataclass(frozen=True)
class Data:
    """Rows sorted by class, centred and scaled, with weights that sum to 1."""

    x: Array
    weight: Array
    starts: NDArray[np.intp]
    mean: Array
    scale: Array

    @property
    def boundaries(self) -> int:
        """``K - 1``."""
        return len(self.starts) - 2

    @classmethod
    def build(
        cls, x: Array, y: NDArray[np.intp], weight: Array, classes: int, *, standardize: bool
    ) -> Self:
        """Sort and scale; centring changes only the intercepts, and the conditioning."""
        order = np.argsort(y, kind="stable")
        order = order[weight[order] > 0]
        weight = weight[order] / weight.sum()
        mean = weight @ x[order]
        centred = x[order] - mean
        spread = np.sqrt(weight @ centred**2)
        # a constant column is zero up to rounding, and must not be blown up to noise of size 1
        constant = spread <= 1e-13 * np.maximum(np.abs(mean), 1e-300)
        centred[:, constant] = 0.0
        scale = np.where(constant, 1.0, spread) if standardize else np.ones_like(mean)
        starts = np.searchsorted(y[order], np.arange(classes + 1))
        return cls(centred / scale, weight, starts, mean, scale)

    def null(self) -> Array:
        """Return the increments of the intercepts of the model without features."""
        cumulative = np.cumsum(np.add.reduceat(self.weight, self.starts[:-1]))[:-1]
        alpha = np.log(cumulative) - np.log1p(-cumulative)
        return np.diff(alpha, prepend=0.0)

    def original(self, z: Array) -> tuple[Array, Array]:
        """Turn increments ``[K-1, p+1]`` into ``intercept [K-1]`` and ``coef [p, K-1]``."""
        boundaries = np.cumsum(z, axis=0)
        coef = boundaries[:, 1:] / self.scale
        return boundaries[:, 0] - coef @ self.mean, np.ascontiguousarray(coef.T)


@dataclass(frozen=True)
class Penalty:
    """``l1 * |psi| + l2 / 2 * psi^2`` on the increments of each boundary, both ``[K-1]``."""

    l1: Array
    l2: Array

    @classmethod
    def build(cls, lam: float, boundaries: int, *, penalize_base: bool, l1_ratio: float) -> Self:
        """Give every block the weight ``lam``, but 0 the first one if it is free."""
        blocks = np.full(boundaries, float(lam))
        if not penalize_base:
            blocks[0] = 0.0
        return cls(blocks * l1_ratio, blocks * (1 - l1_ratio))

    def value(self, psi: Array) -> float:
        return float(self.l1 @ np.abs(psi).sum(1) + 0.5 * self.l2 @ (psi**2).sum(1))

    def violation(self, psi: Array, slope: Array) -> Array:
        """How far each increment is from optimal, given the slope of the likelihood there."""
        smooth = slope + self.l2[:, None] * psi
        bound = self.l1[:, None]
        result: Array = np.where(
            psi == 0, np.maximum(np.abs(smooth) - bound, 0.0), np.abs(smooth + bound * np.sign(psi))
        )
        return result


class Likelihood:
    """The mean negative log-likelihood on some of the features, and its derivatives."""

    def __init__(self, data: Data, features: NDArray[np.intp]) -> None:
        rows, q = len(data.weight), data.boundaries
        self.data, self.features = data, features
        self.design = np.empty((rows, len(features) + 1))
        self.design[:, 0] = 1.0
        self.design[:, 1:] = data.x if len(features) == data.x.shape[1] else data.x[:, features]
        low, high = data.starts[1], data.starts[-2]  # rows above the first, below the last class
        label = np.repeat(np.arange(q + 1), np.diff(data.starts))
        flat = np.arange(rows) * q
        self.low, self.high = int(low), int(high)
        self.upper = (flat + label)[:high]
        self.lower = (flat + label - 1)[low:]
        self.middle = (flat + label)[low:high]
        self.upper_weight = data.weight[:high]
        self.lower_weight = data.weight[low:]
        self.middle_weight = data.weight[low:high]

    def increments(self, z: Array) -> Array:
        """``z_k^T (1, x)``, ``[n, K-1]``."""
        return np.asarray(self.design @ z.T)

    def value(self, increments: Array) -> float:
        """Mean of minus log-probability; infinite where a class that occurs has none."""
        gap = increments.ravel()[self.middle]
        if gap.size and gap.min() <= 0:
            return np.inf
        eta = np.cumsum(increments, axis=1).ravel()
        total = self.upper_weight @ _softplus(-eta[self.upper])
        total += self.lower_weight @ _softplus(eta[self.lower])
        # log(1 - exp(-gap)), by the form that does not cancel
        return float(total - self.middle_weight @ _log1mexp(gap))

    def residuals(self, increments: Array) -> Array:
        """Slope in each ``eta``, ``[n, K-1]``."""
        eta = np.cumsum(increments, axis=1).ravel()
        ratio = 1 / np.expm1(np.minimum(increments.ravel()[self.middle], 700.0))
        slopes = np.zeros(increments.size)
        slopes[self.upper] -= self.upper_weight * _sigmoid(-eta[self.upper])
        slopes[self.lower] += self.lower_weight * _sigmoid(eta[self.lower])
        slopes[self.middle] -= self.middle_weight * ratio
        slopes[self.middle - 1] += self.middle_weight * ratio
        return slopes.reshape(increments.shape)

    def slope(self, residuals: Array) -> Array:
        """Slope in ``z``, ``[K-1, p+1]``."""
        return _from_above(residuals.T @ self.design)

    def slope_everywhere(self, residuals: Array) -> Array:
        """Slope in the increments of all features, ``[K-1, P]``."""
        return _from_above(residuals.T @ self.data.x)

    def hessian(self, increments: Array) -> Array:
        """Second derivatives in ``z``, ``[(K-1)(p+1), (K-1)(p+1)]``."""
        q, width = self.data.boundaries, self.design.shape[1]
        eta = np.cumsum(increments, axis=1).ravel()
        gap = increments.ravel()[self.middle]
        upper = np.sqrt(self.upper_weight) * _root_curvature(eta[self.upper])
        lower = np.sqrt(self.lower_weight) * _root_curvature(eta[self.lower])
        # r (1 + r) with r = 1 / (e^gap - 1) is 1 / (2 sinh(gap / 2))^2
        middle = np.sqrt(self.middle_weight) / (2 * np.sinh(np.minimum(gap, 700.0) / 2))
        starts = self.data.starts
        grams = np.empty((q, width, width))
        result = np.empty((q, width, q, width))
        for k in range(q):
            first, change, end = starts[k], starts[k + 1], starts[k + 2]
            root = np.concatenate([upper[first:change], lower[change - self.low : end - self.low]])
            grams[k] = _gram(self.design[first:end], root)
        grams = _from_above(grams)
        for k in range(q):
            for m in range(q):
                result[k, :, m] = grams[max(k, m)]
        for k in range(1, q):
            rows = slice(starts[k], starts[k + 1])
            root = middle[starts[k] - self.low : starts[k + 1] - self.low]
            result[k, :, k] += _gram(self.design[rows], root)
        return result.reshape(q * width, q * width)


@dataclass(frozen=True)
class Fit:
    """A solution in the scaled coordinates."""

    z: Array
    nll: float
    objective: float
    kkt: float
    iterations: int
    slope: Array


def solve(
    data: Data,
    penalty: Penalty,
    start: Array,
    *,
    threshold: float,
    max_iter: int,
    candidates: NDArray[np.bool_] | None = None,
) -> Fit:
    """Minimise the penalised likelihood.

    Args:
        data: rows.
        penalty: weights.
        start: increments ``[K-1, p+1]`` at which every class that occurs has a probability.
        threshold: largest violation of the conditions of optimality that ends the search.
        max_iter: Newton steps in total; fewer than needed show in ``kkt``.
        candidates: features to begin with; all that are not zero are added.
    """
    z, used = start.copy(), 0
    features = np.any(z[:, 1:] != 0, axis=0)
    if candidates is not None:
        features |= candidates
    if penalty.l1[0] == 0 or not np.any(penalty.l1):
        features[:] = True
    while True:
        index = np.flatnonzero(features)
        likelihood = Likelihood(data, index)
        columns = np.concatenate([[0], index + 1])
        inner, steps = _newton(
            likelihood, penalty, z[:, columns], threshold=threshold, max_iter=max_iter - used
        )
        z[:, columns] = inner
        used += steps
        increments = likelihood.increments(inner)
        residuals = likelihood.residuals(increments)
        slope = likelihood.slope_everywhere(residuals)
        violation = penalty.violation(z[:, 1:], slope)
        kkt = max(
            float(violation.max(initial=0.0)),
            float(np.abs(_from_above(residuals.sum(0)[:, None])).max()),
        )
        asking = ~features & np.any(violation > threshold, axis=0)
        if not asking.any() or used >= max_iter:
            nll = likelihood.value(increments)
            return Fit(z, nll, nll + penalty.value(z[:, 1:]), kkt, used, slope)
        features |= asking


def _newton(
    likelihood: Likelihood, penalty: Penalty, z: Array, *, threshold: float, max_iter: int
) -> tuple[Array, int]:
    shape = z.shape
    l1 = np.repeat(penalty.l1[:, None], shape[1], axis=1)
    l2 = np.repeat(penalty.l2[:, None], shape[1], axis=1)
    l1[:, 0] = l2[:, 0] = 0.0  # intercepts
    increments = likelihood.increments(z)
    objective = likelihood.value(increments) + penalty.value(z[:, 1:])
    for step in range(max_iter):
        slope = likelihood.slope(likelihood.residuals(increments))
        violation = max(
            float(np.abs(slope[:, 0]).max()),
            float(penalty.violation(z[:, 1:], slope[:, 1:]).max(initial=0.0)),
        )
        # one decade more than was asked for costs at most one step: convergence is quadratic
        if violation <= 0.1 * threshold:
            return z, step
        hessian = likelihood.hessian(increments)
        diagonal = np.einsum("ii->i", hessian)
        diagonal += l2.ravel() + RIDGE * diagonal.mean()
        flat = z.ravel()
        linear = hessian @ flat - (slope + l2 * z).ravel()
        accuracy = min(0.01 * threshold, 0.1 * violation)
        target = lasso_quadratic(hessian, linear, l1.ravel(), flat, tolerance=accuracy)
        direction = target.reshape(shape) - z
        fall = float((slope * direction).sum()) + penalty.value(target.reshape(shape)[:, 1:])
        fall -= penalty.value(z[:, 1:])
        moved = _line_search(likelihood, penalty, z, direction, increments, objective, fall)
        if moved is None:  # no lower value in floating point
            return z, step + 1
        z, increments, objective = moved
    return z, max_iter


def _line_search(
    likelihood: Likelihood,
    penalty: Penalty,
    z: Array,
    direction: Array,
    increments: Array,
    objective: float,
    fall: float,
) -> tuple[Array, Array, float] | None:
    change = likelihood.increments(direction)
    gap, rate = increments.ravel()[likelihood.middle], change.ravel()[likelihood.middle]
    falling = rate < 0
    room = float((gap[falling] / -rate[falling]).min()) if falling.any() else np.inf
    size = 1.0 if room > 1 else 0.99 * room
    rounding = 1e-15 * max(1.0, abs(objective))
    for _ in range(MAX_HALVINGS):
        there = z + direction if size == 1.0 else z + size * direction
        inside = increments + size * change
        value = likelihood.value(inside) + penalty.value(there[:, 1:])
        if value <= objective + ARMIJO * size * fall + rounding:
            return there, inside, value
        size /= 2
    return None


def _gram(rows: Array, root: Array) -> Array:
    weighted = rows * root[:, None]
    return np.asarray(weighted.T @ weighted)


def _from_above(blocks: Array) -> Array:
    """Sum of the blocks from each one to the last: boundary ``m`` holds the increments up to it."""
    return np.cumsum(blocks[::-1], axis=0)[::-1]


def _softplus(x: Array) -> Array:
    return np.asarray(np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x))))


def _sigmoid(x: Array) -> Array:
    small = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1.0, small) / (1 + small))


def _root_curvature(x: Array) -> Array:
    """``sqrt(sigma(x) sigma(-x))``."""
    half = np.exp(-0.5 * np.abs(x))
    return np.asarray(half / (1 + half * half))


def _log1mexp(x: Array) -> Array:
    """``log(1 - exp(-x))`` for positive ``x``."""
    near = x < 0.6931471805599453
    return np.asarray(
        np.where(
            near,
            np.log(-np.expm1(-np.where(near, x, 1.0))),
            np.log1p(-np.exp(-np.where(near, 1.0, x))),
        )
    )
