r"""The exact minimum of a quadratic with a weighted L1 penalty, by its active set.

.. math:: \min_u \; \tfrac12 u^\top H u - c^\top u + \sum_j w_j |u_j|

On a set of coordinates with given signs this is one linear system. The minimiser moves towards its
solution along a line, past coordinates that change sign while that pays, and a coordinate that ends
at zero leaves the set. When the set is optimal, coordinates whose slope exceeds their weight enter.
Each step lowers the objective, and there are finitely many sets, so the end is exact.

Source: the feature-sign search of Lee, Battle, Raina, Ng (2007), with an exact line search.
"""

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

MAX_STEPS = 10_000
ENTER = 8
"""Coordinates that enter at once; a few, so that most of them are there to stay."""


def lasso_quadratic(
    hessian: Vector, linear: Vector, weights: Vector, start: Vector, *, tolerance: float
) -> Vector:
    """Return the minimiser of the quadratic with the penalty.

    Args:
        hessian: positive definite ``[m, m]``.
        linear: ``c``, ``[m]``.
        weights: ``w >= 0``, ``[m]``.
        start: any point ``[m]``; a good one saves steps, the result is the same.
        tolerance: largest violation of the conditions of optimality that may remain.
    """
    u = start.copy()
    active = (u != 0) | (weights == 0)
    signs = np.sign(u)
    _settle(hessian, linear, weights, u, active, signs)
    enter = ENTER
    for _ in range(MAX_STEPS):
        slope = hessian @ u - linear
        excess = np.where(active, 0.0, np.abs(slope) - weights)
        order = np.argsort(-excess)[:enter]
        entering = order[excess[order] > tolerance]
        if entering.size == 0:
            break
        active[entering] = True
        signs[entering] = -np.sign(slope[entering])
        _settle(hessian, linear, weights, u, active, signs)
        if np.any(u[entering] != 0):
            enter = ENTER
        elif enter == 1:  # the rest is rounding
            break
        else:
            enter = 1
    return u


def _settle(
    hessian: Vector,
    linear: Vector,
    weights: Vector,
    u: Vector,
    active: NDArray[np.bool_],
    signs: Vector,
) -> None:
    """Minimise over the active set, in place."""
    for _ in range(MAX_STEPS):
        index = np.flatnonzero(active)
        if index.size == 0:
            return
        block = hessian if index.size == len(u) else hessian[np.ix_(index, index)]
        penalty, here, sign = weights[index], u[index], signs[index]
        target = np.asarray(np.linalg.solve(block, linear[index] - penalty * sign), np.float64)
        wrong = (here == 0) & (penalty > 0) & (target * sign <= 0)
        if wrong.any():  # entered together with others, and not worth it beside them
            active[index[wrong]] = False
            continue
        if not np.any((penalty > 0) & (target * sign <= 0)):
            u[index] = target
            return
        there = _descend(block, linear[index], penalty, here, target, sign)
        u[index] = there
        signs[index] = np.sign(there)
        active[index] = (there != 0) | (penalty == 0)


def _descend(
    block: Vector, linear: Vector, penalty: Vector, here: Vector, target: Vector, signs: Vector
) -> Vector:
    """Go from here towards the target while the objective falls; it falls at the start."""
    direction = target - here
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = np.where((penalty > 0) & (here != 0), -here / direction, np.inf)
    inside = np.flatnonzero((crossing > 0) & (crossing <= 1))
    inside = inside[np.argsort(crossing[inside])]
    times = crossing[inside]
    curvature = float(direction @ block @ direction)
    first = float(direction @ (block @ here - linear) + (penalty * signs) @ direction)
    jumps = np.cumsum(2 * penalty[inside] * np.abs(direction[inside]))
    after = first + curvature * times + jumps
    stops = np.flatnonzero(after >= 0)
    k = stops[0] if stops.size else len(times)
    passed = jumps[k - 1] if k else 0.0
    reach = min(-(first + passed) / curvature, 1.0)
    if k < len(times) and reach >= times[k]:
        there: Vector = here + times[k] * direction
        there[inside[k]] = 0.0
        return there
    there = here + reach * direction
    return there
