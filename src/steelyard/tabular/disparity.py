"""Disparity between two groups: budgets on an information value, approval rates, score bins.

Source: Sudjianto, Burakov (2025), Sec. 6 and 8, arXiv:2509.09855.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from steelyard._checks import check_count, check_not_nan
from steelyard.tabular._columns import as_numbers

__all__ = ["adverse_impact_ratio", "fairness_probability", "score_pre_bins"]


def fairness_probability(iv: ArrayLike, se: ArrayLike, epsilon: ArrayLike) -> Any:
    r"""Give the probability that the disparity between two groups is within a budget.

    .. math::
        P(\mathrm{IV} \le \varepsilon) = \Phi\big((\varepsilon - \mathrm{IV}) / \mathrm{SE}\big)

    Requiring it to be at least ``alpha`` is the rule :math:`IV + z_\alpha SE \le \varepsilon`. Use
    the standard error of :func:`iv_inference` with its default; the published one is too small.

    Args:
        iv: information value between the groups, >= 0, any shape.
        se: its standard error, >= 0; 0 gives a step.
        epsilon: budget, >= 0.

    Returns:
        A float, or an array of the common shape.

    Raises:
        TypeError: not numbers.
        ValueError: a negative or non-finite number, or shapes that do not broadcast.

    Example:
        >>> round(1 - fairness_probability(0.066, 0.0069, 0.05), 4)
        0.9898

    Source: Sudjianto, Burakov (2025), Eq. 25 and 26, arXiv:2509.09855.
    """
    arrays = {"iv": iv, "se": se, "epsilon": epsilon}
    value, error, budget = (as_numbers(name, array) for name, array in arrays.items())
    for name, array in zip(arrays, (value, error, budget), strict=True):
        if not np.isfinite(array).all() or (array < 0).any():
            raise ValueError(f"{name} must be finite and >= 0, got {array.min()}")
    try:
        np.broadcast_shapes(value.shape, error.shape, budget.shape)
    except ValueError:
        shapes = f"{list(value.shape)}, {list(error.shape)} and {list(budget.shape)}"
        raise ValueError(f"iv, se and epsilon must broadcast, got {shapes}") from None
    gap = budget - value
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(error > 0, gap / error, np.where(gap >= 0, np.inf, -np.inf))
    probability = stats.norm.cdf(z)
    return float(probability) if probability.ndim == 0 else probability


def adverse_impact_ratio(scores: ArrayLike, groups: ArrayLike, cutoff: float) -> float:
    r"""Compare the approval rates of two groups; below 0.8 is a common warning sign.

    .. math:: \mathrm{AIR} = P(s < c \mid a = 1) / P(s < c \mid a = 0)

    Args:
        scores: default probabilities, ``[n]``; approved when strictly below ``cutoff``.
        groups: 1 for the protected group, 0 for the reference, ``[n]``.
        cutoff: the cutoff c.

    Returns:
        The ratio, >= 0.

    Raises:
        TypeError: ``scores`` or ``cutoff`` are no numbers.
        ValueError: wrong shapes, NaN, groups other than 0 and 1, a group that is absent, or a
            reference group of which nobody is approved.

    Example:
        >>> adverse_impact_ratio([0.1, 0.3, 0.2, 0.1], [1, 1, 0, 0], cutoff=0.25)
        0.5

    Source: Sudjianto, Burakov (2025), Sec. 8, arXiv:2509.09855.
    """
    score, group = as_numbers("scores", scores), np.asarray(groups)
    if score.ndim != 1 or group.shape != score.shape:
        raise ValueError(
            f"scores and groups must have one shape [n], got {list(score.shape)} and "
            f"{list(group.shape)}"
        )
    check_not_nan("cutoff", cutoff)
    if np.isnan(score).any():
        raise ValueError("scores must not be NaN")
    found = np.unique(group)
    if not np.array_equal(found, [0, 1]):
        raise ValueError(f"groups must hold both 0 and 1 and nothing else, got {found.tolist()}")
    approved = score < cutoff
    protected, reference = approved[group == 1].mean(), approved[group == 0].mean()
    if reference == 0:
        raise ValueError(f"no one of the reference group is approved at cutoff {cutoff}")
    return float(protected / reference)


def score_pre_bins(
    scores: ArrayLike, bad: ArrayLike, groups: ArrayLike, *, num_bins: int = 15
) -> NDArray[np.float64]:
    """Count a model's score in quantile bins, ready for :func:`pareto_front`.

    Args:
        scores: default probabilities or log odds, ``[n]``.
        bad: outcome, 1 = bad, 0 = good, ``[n]``.
        groups: 1 for the protected group, 0 for the reference, ``[n]``.
        num_bins: number of bins, >= 1; equal scores stay together, so there can be fewer.

    Returns:
        Goods, bads, reference, protected per bin, ``[m, 4]``, from the riskiest to the safest, so
        that a useful score has rising WoE.

    Raises:
        TypeError: ``scores`` are no numbers.
        ValueError: wrong shapes, NaN, or values other than 0 and 1.

    Example:
        >>> score_pre_bins([0.9, 0.8, 0.2, 0.1], [1, 0, 0, 0], [1, 0, 1, 0], num_bins=2)
        array([[1., 1., 1., 1.],
               [2., 0., 1., 1.]])
    """
    check_count("num_bins", num_bins)
    score = as_numbers("scores", scores)
    if score.ndim != 1 or not len(score) or np.isnan(score).any():
        raise ValueError(f"scores must have shape [n] without NaN, got {list(score.shape)}")
    marks = []
    for name, values in (("bad", bad), ("groups", groups)):
        mark = np.asarray(values)
        if mark.shape != score.shape or not np.isin(mark, [0, 1]).all():
            raise ValueError(f"{name} must hold a 0 or a 1 for each of the {len(score)} scores")
        marks.append(mark.astype(np.float64))
    cuts = np.unique(np.quantile(-score, np.arange(1, num_bins) / num_bins, method="inverted_cdf"))
    place = np.unique(np.searchsorted(cuts, -score, side="left"), return_inverse=True)[1]
    weights = (1 - marks[0], marks[0], 1 - marks[1], marks[1])
    return np.stack([np.bincount(place, weight) for weight in weights], axis=1)
