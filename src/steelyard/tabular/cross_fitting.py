"""Information values of bins that were chosen on other rows, so that their p-values hold.

Loaded when first asked for; needs scikit-learn (``steelyard[tabular]``).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from steelyard._checks import check_count
from steelyard._extras import require
from steelyard.tabular._columns import check_rows
from steelyard.tabular.binning import WoEBinner

_base = require("sklearn.base", extra="tabular")
_selection = require("sklearn.model_selection", extra="tabular")
_utils = require("sklearn.utils", extra="tabular")

__all__ = ["CrossFittedIV", "cross_fitted_iv"]


@dataclass(frozen=True)
class CrossFittedIV:
    """What :func:`cross_fitted_iv` returns for a column."""

    iv: float
    statistic: float
    degrees_of_freedom: int
    p_value: float


def cross_fitted_iv(
    binner: WoEBinner, X: Any, y: Any, *, folds: int = 5, seed: int = 0
) -> dict[str, CrossFittedIV]:
    r"""Test every column with bins chosen on the other folds.

    .. math:: T = \sum_k \frac{\mathrm{IV}_k}{1/n_{gk} + 1/n_{bk}} \to \chi^2_{\sum_k (J_k - 1)}

    if the column says nothing about ``y``. On the rows that chose the bins the same test finds
    something in noise.

    Args:
        binner: settings; cloned for each fold.
        X: array or frame, ``[n, d]``.
        y: two labels, ``[n]``.
        folds: number of folds, >= 2.
        seed: of the split into folds.

    Returns:
        For each column ``iv`` (mean over folds, less its bias under no association, not below 0),
        ``statistic``, ``degrees_of_freedom`` and ``p_value`` (1 where every fold has one bin).

    Raises:
        TypeError: ``binner`` is no :class:`WoEBinner`, or ``X`` or ``y`` is a single value.
        ValueError: as :meth:`WoEBinner.fit`, or fewer members of a class than folds.

    Example:
        Noise in optimal bins, tested on the rows that chose them and on others:

        >>> import numpy as np
        >>> random = np.random.default_rng(2)
        >>> X, y = random.normal(size=(2000, 1)), random.integers(0, 2, 2000)
        >>> binner = WoEBinner(method="optimal")
        >>> bool(binner.fit(X, y).evaluate(X, y)["x0"].p_value < 0.01)
        True
        >>> bool(cross_fitted_iv(binner, X, y)["x0"].p_value > 0.05)
        True

    Source: our remedy for bins chosen on the same data (04 Sec. 4.3).
    """
    if not isinstance(binner, WoEBinner):
        raise TypeError(f"binner must be a WoEBinner, got {type(binner).__name__}")
    check_rows(X=X, y=y)
    check_count("folds", folds, at_least=2)
    check_count("seed", seed, at_least=0)
    if np.ndim(y) != 1:
        raise ValueError(f"y must have one dimension, got {np.ndim(y)}")
    classes = len(np.unique(y))
    if classes != 2:
        raise ValueError(f"y must hold two classes, got {classes}")
    splitter = _selection.StratifiedKFold(folds, shuffle=True, random_state=seed)
    labels = np.asarray(y)
    results = []
    for train, test in splitter.split(np.zeros(len(labels)), labels):
        fitted = _base.clone(binner).fit(_utils._safe_indexing(X, train), labels[train])
        results.append(fitted.evaluate(_utils._safe_indexing(X, test), labels[test]))
    return {name: _combine([result[name] for result in results]) for name in results[0]}


def _combine(tests: list[Any]) -> CrossFittedIV:
    found = [test for test in tests if test is not None]
    freedom = sum(test.degrees_of_freedom for test in found)
    if not freedom:
        return CrossFittedIV(0.0, 0.0, 0, 1.0)
    # the critical value is the scale 1/n_g + 1/n_b times a chi-square quantile
    scales = [test.critical / stats.chi2.ppf(0.95, test.degrees_of_freedom) for test in found]
    statistic = sum(test.iv / scale for test, scale in zip(found, scales, strict=True))
    excess = sum(
        test.iv - scale * test.degrees_of_freedom for test, scale in zip(found, scales, strict=True)
    )
    return CrossFittedIV(
        iv=max(0.0, float(excess) / len(tests)),
        statistic=float(statistic),
        degrees_of_freedom=freedom,
        p_value=float(stats.chi2.sf(statistic, freedom)),
    )
