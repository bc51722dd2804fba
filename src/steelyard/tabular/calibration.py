r"""How strong a fairness penalty should be: train at each strength, look, choose.

Source: Lee, Antonio, Avanzi, Marchi, Zhou (2025), arXiv:2509.08163.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from steelyard._checks import check_count, check_range
from steelyard._extras import require
from steelyard.divergences import concatenated_distance_covariance
from steelyard.tabular._columns import check_rows
from steelyard.tabular._sensitive import (
    cell_index,
    encode_sensitive,
    intersectional_groups,
    spread_rows,
)
from steelyard.tabular.fairness import (
    finite_vector,
    group_js,
    ranked_probability_score,
    unfairness,
)

__all__ = ["StrengthPath", "calibrate_strength", "choose_strength"]

Array = NDArray[np.float64]
# The paper's grid up to where its curves are flat, and the unpenalised model.
STRENGTHS = (0.0, 1.0, 3.0, 10.0, 20.0, 40.0)


@dataclass(frozen=True)
class StrengthPath:
    """What :func:`calibrate_strength` returns: ``L`` strengths, ``R`` seeds, held-out rows.

    ``strength`` is the chosen one. ``error`` is what the caller's ``error`` says, or the Brier
    score, the ranked probability score, or the mean squared error. All arrays are ``[L, R]``.
    """

    strength: float
    strengths: Array
    divergence: Array
    error: Array
    unfairness: Array
    covariance: Array


def calibrate_strength(
    estimator: Any,
    X: Any,
    y: ArrayLike,
    sensitive: Any,
    *,
    strengths: Sequence[float] = STRENGTHS,
    target: float | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    validation: float = 0.25,
    bins: int = 4,
    bandwidth: float | Literal["relative"] = "relative",
    error: Callable[[Array, Array], float] | None = None,
    parameter: str = "strength",
    categorical: Collection[str | int] | None = None,
) -> StrengthPath:
    """Train at each strength and seed, and choose from the divergence between groups.

    Each seed makes its own split, stratified by outcome and cell, and trains every strength on it,
    so that strengths are compared on the same rows. Choosing is :func:`choose_strength` on the mean
    over seeds.

    Args:
        estimator: :class:`FairRegressor`, :class:`FairClassifier` or a pipeline that ends in one
            (then scikit-learn's metadata routing must be on and ``sensitive`` requested). It is
            cloned, never fitted itself.
        X: features, array or frame ``[N, m]``.
        y: outcomes ``[N]``.
        sensitive: protected attributes of any type, a frame or an array, see
            :func:`encode_sensitive`.
        strengths: two or more, increasing, at least 0.
        target: largest admissible divergence in bits; ``None`` = the elbow of the curve.
        seeds: one or more.
        validation: share of held-out rows, in (0, 1).
        bins: bins of a continuous attribute in the cells.
        bandwidth: see :func:`group_js`.
        error: ``error(outcome, output) -> float``, lower is better.
        parameter: name of the strength among the parameters of ``estimator``, for example
            ``"fairclassifier__strength"`` in a pipeline.
        categorical: numeric attributes that are codes, see :func:`encode_sensitive`; the
            estimator needs the same.

    Returns:
        A :class:`StrengthPath`.

    Raises:
        TypeError: ``X``, ``y`` or ``seeds`` is a single value, or ``parameter`` no text.
        ValueError: lengths differ, strengths not increasing, a setting out of range, or no strength
            reaches the target.

    Example:
        >>> import numpy as np
        >>> from steelyard.tabular.fair_estimators import FairClassifier
        >>> random = np.random.default_rng(0)
        >>> race, sex = random.integers(0, 2, (2, 400))
        >>> proxy = 2 * (race ^ sex) - 1 + 0.7 * random.normal(size=400)
        >>> X = np.column_stack([random.normal(size=400), proxy])
        >>> y = (X.sum(1) + random.logistic(size=400) > 0).astype(int)
        >>> path = calibrate_strength(
        ...     FairClassifier(hidden=(16,), learning_rate=0.02, max_epochs=60), X, y,
        ...     np.column_stack([race, sex]), strengths=(0, 30), target=0.15, seeds=[0])
        >>> path.strength, bool(path.divergence[1] < path.divergence[0] / 2)
        (30.0, True)

    Source: Lee et al. (2025), arXiv:2509.08163.
    """
    grid = _check_strengths(strengths)
    check_range("validation", validation, above=0.0, below=1.0)
    check_rows(X=X, y=y, seeds=seeds)
    if not isinstance(parameter, str):
        raise TypeError(f"parameter must be a name, got {type(parameter).__name__}")
    if len(seeds) == 0:
        raise ValueError("seeds must hold at least one seed, got none")
    for seed in seeds:
        check_count("seeds", seed, at_least=0, expected="integers")
    outcome = np.asarray(y)
    cells = intersectional_groups(sensitive, bins=bins, categorical=categorical)
    if len(cells) != len(outcome):
        raise ValueError(f"sensitive must have {len(outcome)} items like y, got {len(cells)}")
    encoded = list(encode_sensitive(sensitive, categorical=categorical).values())
    clone = require("sklearn.base", extra="tabular").clone
    take = require("sklearn.utils", extra="tabular")._safe_indexing
    seed_parameter = parameter.removesuffix("strength") + "random_state"
    found = np.zeros((4, len(grid), len(seeds)))
    for r, seed in enumerate(seeds):
        held = _held_out(outcome, cells, validation, seed)
        kept, out = np.flatnonzero(~held), np.flatnonzero(held)
        for k, strength in enumerate(grid):
            model = clone(estimator).set_params(
                **{parameter: float(strength), seed_parameter: int(seed)}
            )
            model.fit(take(X, kept), outcome[kept], sensitive=take(sensitive, kept))
            output, numbers, loss = _predictions(model, take(X, out), outcome[out], parameter)
            found[:, k, r] = (
                group_js(output, cells[out], bandwidth=bandwidth),
                (error or loss)(numbers, output),
                unfairness(output, cells[out]),
                float(
                    concatenated_distance_covariance(
                        torch.from_numpy(output), [s[torch.from_numpy(out)] for s in encoded]
                    )
                ),
            )
    chosen = choose_strength(grid, found[0].mean(1), target=target)
    return StrengthPath(chosen, grid, *found)


def choose_strength(
    strengths: ArrayLike, divergence: ArrayLike, *, target: float | None = None
) -> float:
    """Choose a strength from a curve: the smallest that reaches the target, or the elbow.

    The elbow is the point farthest below the straight line between the ends of the curve, both axes
    scaled to [0, 1]. It moves with the largest strength of the grid; a target does not.

    Args:
        strengths: two or more, increasing, ``[L]``.
        divergence: mean divergence at each, ``[L]``.
        target: largest admissible divergence; ``None`` = the elbow.

    Returns:
        One of ``strengths``.

    Raises:
        ValueError: lengths differ, strengths not increasing, not finite, or no strength reaches
            the target.

    Example:
        The insurance curve of the paper:

        >>> curve = [0.0289, 0.0079, 0.0038, 0.0016, 0.0006]
        >>> choose_strength([0, 10, 20, 40, 150], curve)
        20.0
        >>> choose_strength([0, 10, 20, 40, 150], curve, target=0.002)
        40.0

    Source: Lee et al. (2025), arXiv:2509.08163.
    """
    grid, curve = _check_strengths(strengths), finite_vector("divergence", divergence)
    if len(curve) != len(grid):
        raise ValueError(f"divergence must have {len(grid)} values, got {len(curve)}")
    if target is not None:
        check_range("target", target, at_least=0.0, below=math.inf)
        if not (curve <= target).any():
            best = int(curve.argmin())
            raise ValueError(
                f"target = {target} is reached by no strength: the smallest divergence is "
                f"{curve[best]:.3g} at {grid[best]:g}; add larger strengths or raise the target"
            )
        return float(grid[int((curve <= target).argmax())])
    drop = curve[0] - curve[-1]
    if drop <= 0:  # the penalty does nothing: there is no elbow
        return float(grid[int(curve.argmin())])
    along = (grid - grid[0]) / (grid[-1] - grid[0])
    return float(grid[int(((curve[0] - curve) / drop - along).argmax())])


def _check_strengths(strengths: ArrayLike) -> Array:
    grid = finite_vector("strengths", strengths)
    if len(grid) < 2 or grid[0] < 0 or (np.diff(grid) <= 0).any():
        raise ValueError(
            f"strengths must be two or more increasing numbers >= 0, got {grid.tolist()}"
        )
    return grid


def _held_out(
    outcome: NDArray[Any], cells: NDArray[np.str_], share: float, seed: int
) -> NDArray[np.bool_]:
    strata = [cells]
    if len(np.unique(outcome)) <= 10:
        strata.append(outcome.astype(str))
    random = torch.Generator().manual_seed(int(seed))
    index, _ = cell_index(np.stack(strata, 1), len(cells))
    return spread_rows(index, share, random)


def _predictions(
    model: Any, X: Any, outcome: NDArray[Any], parameter: str
) -> tuple[Array, Array, Callable[[Array, Array], float]]:
    """Outputs, outcomes as numbers, and the error that belongs to the model."""
    if hasattr(model, "predict_proba"):
        numbers = (outcome == model.classes_[1]).astype(np.float64)
        return model.predict_proba(X)[:, 1], numbers, _brier
    output = np.asarray(model.predict(X), dtype=np.float64)
    settings = model.get_params()
    loss = settings.get(parameter.removesuffix("strength") + "loss")
    return output, outcome.astype(np.float64), _counts if loss == "poisson" else _squared


def _brier(outcome: Array, output: Array) -> float:
    return ranked_probability_score(output, outcome, family="bernoulli")


def _counts(outcome: Array, output: Array) -> float:
    return ranked_probability_score(output, outcome, family="poisson")


def _squared(outcome: Array, output: Array) -> float:
    return float(np.square(outcome - output).mean())
