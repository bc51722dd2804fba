r"""Weighted least squares as a scikit-learn estimator, with its stability number.

Loaded when first asked for; needs scikit-learn (``steelyard[tabular]``).
"""

from typing import Any

import numpy as np
import torch

from steelyard._checks import check_not_text
from steelyard._extras import require
from steelyard.estimation.least_squares import orthonormal_basis, weighted_least_squares

_base = require("sklearn.base", extra="tabular")
_validation = require("sklearn.utils.validation", extra="tabular")

__all__ = ["WeightedLeastSquares"]


class WeightedLeastSquares(_base.RegressorMixin, _base.BaseEstimator):  # type: ignore[misc, name-defined]
    r"""Linear regression on a few chosen points that says whether the points were enough.

    .. math:: \hat f = \arg\min_{v \in V_m} \frac1n \sum_i w_i \big( y_i - v(x_i) \big)^2

    The fit is :func:`weighted_least_squares` with ``sample_weight`` as the weights of a sampler.
    With ``candidates``, the population the points were chosen from, the features are first made
    orthonormal on it (:func:`orthonormal_basis`), and ``lambda_min_`` compares the sample with the
    population: near 1 the sample stands for it, near 0 the coefficients rest on chance.

    Args:
        fit_intercept: add a constant to the features; off, because a basis has its own.
        candidates: features of the population, ``[P, m]``, array or frame; ``None`` = the features
            are taken as orthonormal already.
        measure: probabilities of the candidates, ``[P]``; ``None`` = equal.

    Attributes:
        coef_: coefficients of the given features, ``[m]``.
        intercept_: constant, 0 without ``fit_intercept``.
        gram_: ``G`` in the orthonormal features.
        lambda_min_: smallest eigenvalue of ``gram_``, the stability number.
        lambda_max_: the largest.
        leave_one_out_: mean weighted squared error of each point predicted from the others;
            infinite if some point alone fixes a coefficient.
        n_features_in_: number of features.
        feature_names_in_: their names, if a frame was given.

    Example:
        Twelve of 400 labels, chosen by volume sampling; the fit knows what it stands on:

        >>> import torch
        >>> from steelyard.estimation import orthonormal_basis, sample_volume
        >>> x = torch.linspace(-1, 1, 400, dtype=torch.float64)
        >>> measure = torch.full_like(x, 1 / 400)
        >>> powers = x.unsqueeze(1) ** torch.arange(4)
        >>> basis = orthonormal_basis(powers, measure)
        >>> random = torch.Generator().manual_seed(0)
        >>> points, weights = sample_volume(basis, measure, 12, generator=random)
        >>> model = WeightedLeastSquares(candidates=powers.numpy())
        >>> y = (1 - x**3).numpy()
        >>> model = model.fit(powers[points].numpy(), y[points], sample_weight=weights.numpy())
        >>> model.coef_.round(6) + 0.0
        array([ 1.,  0.,  0., -1.])
        >>> bool(model.lambda_min_ > 0.3)
        True
        >>> bool(WeightedLeastSquares(candidates=powers.numpy()).fit(
        ...     powers[:12].numpy(), y[:12]).lambda_min_ > 0.3)  # twelve neighbours
        False

    Source: Nouy, Michel (2023), arXiv:2312.14057.
    """

    def __init__(
        self, *, fit_intercept: bool = False, candidates: Any = None, measure: Any = None
    ) -> None:
        self.fit_intercept = fit_intercept
        self.candidates = candidates
        self.measure = measure

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "WeightedLeastSquares":
        """Fit the points ``X`` ``[n, m]`` with values ``y`` ``[n]`` and weights ``[n]``."""
        check_not_text(X=X, sample_weight=sample_weight)
        if sample_weight is not None and not np.asarray(sample_weight).any():
            raise ValueError("sample_weight must have a positive entry, got zeros only")
        X, y = _validation.validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        check_not_text(y=y)
        weights = _validation._check_sample_weight(sample_weight, X, dtype=np.float64)
        if (weights < 0).any():
            raise ValueError(f"sample_weight must be >= 0 everywhere, got {weights.min():g}")
        features = self._features(X)
        identity = np.eye(features.shape[1])
        basis, change = features, identity
        if self.candidates is not None:
            basis, change = self._orthonormal(features, identity)
        fit = weighted_least_squares(*(torch.tensor(a) for a in (basis, y * 1.0, weights)))
        coef = change @ fit.coef.numpy()
        self.coef_ = coef[1:] if self.fit_intercept else coef
        self.intercept_ = float(coef[0]) if self.fit_intercept else 0.0
        self.gram_ = fit.gram.numpy()
        self.lambda_min_, self.lambda_max_ = float(fit.lambda_min), float(fit.lambda_max)
        self.leave_one_out_ = float(fit.leave_one_out)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Return the values of the fit at the rows of ``X``."""
        _validation.check_is_fitted(self)
        check_not_text(X=X)
        X = _validation.validate_data(self, X, dtype=np.float64, reset=False)
        prediction: np.ndarray = X @ self.coef_ + self.intercept_
        return prediction

    def _features(self, X: np.ndarray) -> np.ndarray:
        return np.column_stack([np.ones(len(X)), X]) if self.fit_intercept else X

    def _orthonormal(
        self, features: np.ndarray, identity: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Express the rows in features orthonormal on the candidates, and that change of basis."""
        population = _validation.check_array(self.candidates, dtype=np.float64)
        if population.shape[1] != self.n_features_in_:
            raise ValueError(
                f"candidates must have the {self.n_features_in_} features of X, "
                f"got {population.shape[1]}"
            )
        count = len(population)
        measure = np.full(count, 1 / count) if self.measure is None else np.asarray(self.measure)
        if measure.shape != (count,):
            raise ValueError(f"measure must have shape [{count}], got {list(measure.shape)}")
        # rows of measure 0 are only evaluated: the points, and the change of basis itself
        rows = np.concatenate([self._features(population), features, identity])
        law = np.concatenate([measure, np.zeros(len(rows) - count)])
        every = orthonormal_basis(torch.from_numpy(rows), torch.from_numpy(law)).numpy()
        return every[count : count + len(features)], every[count + len(features) :]
