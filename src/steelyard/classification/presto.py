r"""PRESTO as scikit-learn estimators, with one penalty or one chosen by cross-validation.

Loaded when first asked for; needs scikit-learn (``steelyard[tabular]``).

Source: Faletto, Bien (2023), arXiv:2305.18700.
"""

import warnings
from typing import Any, Literal, Self

import numpy as np

from steelyard._checks import check_choice, check_count, check_not_text, check_range
from steelyard._extras import require
from steelyard.classification._presto_path import Path, class_probabilities
from steelyard.classification._presto_solver import Array, Data, Fit

_base = require("sklearn.base", extra="tabular")
_exceptions = require("sklearn.exceptions", extra="tabular")
_multiclass = require("sklearn.utils.multiclass", extra="tabular")
_selection = require("sklearn.model_selection", extra="tabular")
_validation = require("sklearn.utils.validation", extra="tabular")

__all__ = ["PrestoClassifier", "PrestoClassifierCV"]

Crossing = Literal["sort", "cummax"]
Scoring = Literal["brier", "rare_log_loss"]


class _OrderedClassifier(_base.ClassifierMixin, _base.BaseEstimator):  # type: ignore[misc, name-defined]
    """What both estimators share: checks, prediction, and what a fit leaves."""

    penalize_base: bool
    l1_ratio: float
    standardize: bool
    tol: float
    max_iter: int
    classes: Any
    crossing: Crossing

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        # the accuracy asked for there is on three clusters that have no order
        tags.classifier_tags.poor_score = True
        return tags

    def predict_proba(self, X: Any) -> Array:
        """Return the probability of each class, ``[n, K]``."""
        eta = self._boundaries(X)
        crossed = _crossed(eta)
        if crossed.any():
            warnings.warn(
                f"boundaries cross in {crossed.sum()} of {len(eta)} rows and were put in order; "
                "a larger lam makes that rarer",
                stacklevel=2,
            )
        return class_probabilities(_in_order(eta, self.crossing))

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable label of each row."""
        best = self.predict_proba(X).argmax(1)
        return np.asarray(self.classes_[best])

    def predict_log_proba(self, X: Any) -> Array:
        """Return the log-probability of each class, ``[n, K]``."""
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(self.predict_proba(X)))

    def crossing_share(self, X: Any) -> float:
        """Return the share of rows whose boundaries cross, where ``predict_proba`` repairs."""
        return float(_crossed(self._boundaries(X)).mean())

    def _prepare(self, X: Any, y: Any, sample_weight: Any) -> tuple[Path, Array, np.ndarray, Array]:
        """Check everything; return the path, rows, codes (0 where the weight is 0), weights."""
        self._check_settings()
        check_not_text(X=X, sample_weight=sample_weight)
        if sample_weight is not None and not np.asarray(sample_weight).any():
            raise ValueError("sample_weight must have a positive entry, got zeros only")
        ordered = _ordered_categories(y) if self.classes is None else list(self.classes)
        X, y = _validation.validate_data(self, X, y, dtype=np.float64)
        weight = _validation._check_sample_weight(
            sample_weight, X, dtype=np.float64, ensure_non_negative=True
        )
        if not weight.any():
            raise ValueError("sample_weight must have a positive entry, got zeros only")
        kept = weight > 0
        self.classes_, kept_codes = _encode(y[kept], ordered)
        codes = np.zeros(len(y), dtype=np.intp)
        codes[kept] = kept_codes
        return self._path(X, codes, weight), X, codes, weight

    def _path(self, X: Array, codes: np.ndarray, weight: Array) -> Path:
        data = Data.build(X, codes, weight, len(self.classes_), standardize=self.standardize)
        return Path(
            data,
            penalize_base=self.penalize_base,
            l1_ratio=self.l1_ratio,
            tol=self.tol,
            max_iter=self.max_iter,
        )

    def _keep(self, path: Path, fit: Fit) -> None:
        self.intercept_, self.coef_ = path.data.original(fit.z)
        self.nll_, self.objective_, self.n_iter_ = fit.nll, fit.objective, max(fit.iterations, 1)
        self.n_nonzero_ = int(np.count_nonzero(fit.z[:, 1:]))
        self.kkt_ = fit.kkt * self.tol / path.threshold
        if fit.kkt > path.threshold:
            warnings.warn(
                f"stopped after {fit.iterations} steps at a violation of {self.kkt_:.1e}, above "
                f"tol = {self.tol:.1e}; classes that the features separate have no finite fit "
                "without a penalty",
                _exceptions.ConvergenceWarning,
                stacklevel=3,
            )

    def _check_settings(self) -> None:
        check_range("l1_ratio", self.l1_ratio, at_least=0.0, at_most=1.0)
        check_range("tol", self.tol, above=0.0)
        check_count("max_iter", self.max_iter)
        check_choice("crossing", self.crossing, ("sort", "cummax"))

    def _boundaries(self, X: Any) -> Array:
        _validation.check_is_fitted(self)
        check_not_text(X=X)
        X = _validation.validate_data(self, X, dtype=np.float64, reset=False)
        return np.asarray(self.intercept_ + X @ self.coef_)


class PrestoClassifier(_OrderedClassifier):
    r"""Ordered classes with a slope for each boundary, tied to that of the boundary before.

    .. math::
        P(y \le k \mid x) = \sigma(\alpha_k + x^\top \beta_k), \qquad
        \min_{\alpha, \beta} \; -\frac1n \sum_i \log P(y_i \mid x_i)
        + \lambda \sum_k w_k \big( a \lVert \psi_k \rVert_1
        + \tfrac{1-a}{2} \lVert \psi_k \rVert_2^2 \big),

    with the changes :math:`\psi_k = \beta_k - \beta_{k-1}` of the slopes of standardised features.
    The highest class is the rare one. The larger ``lam``, the nearer to proportional odds (or, with
    ``penalize_base``, to no features at all); 0 is a model with free slopes.

    Args:
        lam: penalty, >= 0; :func:`steelyard.classification.lambda_max` gives its scale.
        penalize_base: penalise the slopes of the first boundary, too (:math:`w_0 = 1`), as the
            released code does. With few features, ``False`` is often better.
        l1_ratio: ``a`` in [0, 1]; 0 is the ridge variant.
        standardize: scale the features to unit variance first; ``coef_`` is in your units.
        tol: largest violation of the conditions of optimality, as a share of the largest slope of
            the model without features.
        max_iter: Newton steps.
        classes: the labels from the commonest step to the rare end; ``None`` = the order of an
            ordered pandas categorical, else numbers in rising order. Strings are then sorted by
            alphabet, with a warning.
        crossing: what to do at ``predict`` where boundaries cross, which gives a class a negative
            probability: ``"sort"`` them (monotone rearrangement), or take the running maximum.
            A warning says in how many rows.

    Attributes:
        coef_: slopes ``[p, K-1]``; a positive one lowers the classes above the boundary.
        intercept_: ``[K-1]``.
        classes_: labels in their order.
        nll_: mean negative log-likelihood of the fit.
        objective_: with the penalty.
        kkt_: the violation that remains, as a share (compare with ``tol``).
        n_nonzero_: increments that are not zero; ``K - 1 + n_nonzero_`` degrees of freedom.
        n_iter_: Newton steps taken.
        n_features_in_: number of features.
        feature_names_in_: their names, if a frame was given.

    Raises:
        ValueError: labels that are not whole numbers or categories, one class only, NaN or
            infinity, settings out of range, ``classes`` without one of the labels.

    Example:
        The feature acts on both steps alike. Six rare rows say little about it, the others much,
        and one increment serves both:

        >>> rng = np.random.default_rng(0)
        >>> X = rng.standard_normal((600, 1))
        >>> noise = rng.logistic(size=600)
        >>> y = np.digitize(X[:, 0] + noise, [0.0, 4.5])
        >>> int((y == 2).sum())
        6
        >>> model = PrestoClassifier(0.01, penalize_base=False).fit(X, y)
        >>> model.coef_.round(2)
        array([[-1.23, -1.23]])
        >>> model.n_nonzero_
        1

    Source: arXiv:2305.18700.
    """

    def __init__(
        self,
        lam: float = 0.01,
        *,
        penalize_base: bool = True,
        l1_ratio: float = 1.0,
        standardize: bool = True,
        tol: float = 1e-8,
        max_iter: int = 100,
        classes: Any = None,
        crossing: Crossing = "sort",
    ) -> None:
        self.lam = lam
        self.penalize_base = penalize_base
        self.l1_ratio = l1_ratio
        self.standardize = standardize
        self.tol = tol
        self.max_iter = max_iter
        self.classes = classes
        self.crossing = crossing

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit features ``X`` ``[n, p]`` with ordered labels ``y`` ``[n]`` and weights ``[n]``."""
        check_range("lam", self.lam, at_least=0.0)
        path = self._prepare(X, y, sample_weight)[0]
        self._keep(path, path.fit(float(self.lam)))
        return self


class PrestoClassifierCV(_OrderedClassifier):
    r"""PRESTO with the penalty chosen by cross-validation, each fold one warm-started path.

    Args:
        lambdas: penalties to try; ``None`` = ``n_lambdas`` of them, evenly in the log from the one
            that empties the model down to ``ratio`` of it.
        n_lambdas: their number.
        ratio: the last as a share of the first, in (0, 1).
        cv: folds, a number or a splitter of scikit-learn; a number is stratified, and at most the
            number of rows of the rarest class, so that every fold trains on every class.
        scoring: ``"brier"``, the squared error over all classes as in the paper, which the common
            classes dominate; or ``"rare_log_loss"``, the log loss of the last class against the
            rest.
        penalize_base: as in :class:`PrestoClassifier`, like all that follow.
        l1_ratio: the same.
        standardize: the same.
        tol: the same.
        max_iter: the same.
        classes: the same.
        crossing: the same.

    Attributes:
        lam_: the penalty chosen, the largest of those with the lowest mean score.
        lambdas_: those tried, falling.
        scores_: ``[folds, L]``, lower is better.

    The others are those of :class:`PrestoClassifier`, of the fit to all rows.

    Raises:
        ValueError: as there, and for a class that a fold does not train on.

    Example:
        The feature says nothing; its slopes are left out:

        >>> rng = np.random.default_rng(3)
        >>> X, y = rng.standard_normal((300, 1)), rng.integers(0, 3, 300)
        >>> PrestoClassifierCV().fit(X, y).n_nonzero_
        0

    Source: arXiv:2305.18700, Section 4 and released code.
    """

    def __init__(
        self,
        lambdas: Any = None,
        *,
        n_lambdas: int = 20,
        ratio: float = 0.01,
        cv: Any = 5,
        scoring: Scoring = "brier",
        penalize_base: bool = True,
        l1_ratio: float = 1.0,
        standardize: bool = True,
        tol: float = 1e-8,
        max_iter: int = 100,
        classes: Any = None,
        crossing: Crossing = "sort",
    ) -> None:
        self.penalize_base = penalize_base
        self.l1_ratio = l1_ratio
        self.standardize = standardize
        self.tol = tol
        self.max_iter = max_iter
        self.classes = classes
        self.crossing = crossing
        self.lambdas = lambdas
        self.n_lambdas = n_lambdas
        self.ratio = ratio
        self.cv = cv
        self.scoring = scoring

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Choose the penalty on folds of ``X`` ``[n, p]``, ``y`` ``[n]``, then fit all rows."""
        path, X, codes, weight = self._prepare(X, y, sample_weight)
        self.lambdas_ = self._grid(path)
        self.scores_ = np.stack(
            [
                self._score_fold(X, codes, weight, train, test)
                for train, test in self._folds(X, codes, weight)
            ]
        )
        best = int(self.scores_.mean(0).argmin())  # the first, which is the largest
        self.lam_ = float(self.lambdas_[best])
        *_, fit = path.fits(self.lambdas_[: best + 1])
        self._keep(path, fit)
        return self

    def _check_settings(self) -> None:
        super()._check_settings()
        check_count("n_lambdas", self.n_lambdas)
        check_range("ratio", self.ratio, above=0.0, below=1.0)
        check_choice("scoring", self.scoring, ("brier", "rare_log_loss"))

    def _grid(self, path: Path) -> Array:
        if self.lambdas is None:
            return path.grid(self.n_lambdas, self.ratio)
        grid = np.sort(np.asarray(self.lambdas, dtype=np.float64).ravel())[::-1]
        if grid.size == 0 or not np.isfinite(grid).all() or grid[-1] < 0:
            raise ValueError(f"lambdas must be finite and >= 0, got {self.lambdas!r}")
        return np.ascontiguousarray(grid)

    def _folds(
        self, X: Array, codes: np.ndarray, weight: Array
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        cv, rarest = self.cv, int(np.bincount(codes[weight > 0]).min())
        if isinstance(cv, int) and not isinstance(cv, bool):
            check_count("cv", cv, at_least=2)
            if rarest < 2:
                raise ValueError(
                    "each of the classes must have at least 2 rows for cross-validation, got 1"
                )
            cv = min(cv, rarest)
        folds = list(_selection.check_cv(cv, codes, classifier=True).split(X, codes))
        for train, _ in folds:
            if len(np.unique(codes[train][weight[train] > 0])) < len(self.classes_):
                raise ValueError("each fold must train on all classes; use a stratified cv")
        return folds

    def _score_fold(
        self, X: Array, codes: np.ndarray, weight: Array, train: np.ndarray, test: np.ndarray
    ) -> Array:
        path = self._path(X[train], codes[train], weight[train])
        label, share = codes[test], weight[test] / (weight[test].sum() or 1.0)
        rare = label == len(self.classes_) - 1
        scores = []
        for fit in path.fits(self.lambdas_):
            intercept, coef = path.data.original(fit.z)
            eta = _in_order(intercept + X[test] @ coef, self.crossing)
            if self.scoring == "brier":
                hit = np.eye(len(self.classes_))[label]
                scores.append(share @ ((hit - class_probabilities(eta)) ** 2).sum(1))
            else:
                signed = np.where(rare, eta[:, -1], -eta[:, -1])
                scores.append(share @ np.logaddexp(0.0, signed))
        return np.asarray(scores)


def _crossed(eta: Array) -> np.ndarray:
    return np.asarray((np.diff(eta, axis=1) < 0).any(1))


def _in_order(eta: Array, crossing: Crossing) -> Array:
    return np.sort(eta, axis=1) if crossing == "sort" else np.maximum.accumulate(eta, axis=1)


def _ordered_categories(y: Any) -> list[Any] | None:
    """Return the categories of an ordered pandas column, from low to high."""
    kind: Any = getattr(y, "dtype", None)
    return list(kind.categories) if getattr(kind, "ordered", False) else None


def _encode(y: np.ndarray, ordered: list[Any] | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels in their order, those that occur, and the place of each row's label."""
    if y.dtype.kind == "f" and np.any(y != np.floor(y)):
        odd = y[y != np.floor(y)][0]
        raise ValueError(
            f"Unknown label type: y must hold whole numbers or categories, got {odd:g}"
        )
    _multiclass.check_classification_targets(y)
    present, codes = np.unique(y, return_inverse=True)
    if len(present) < 2:
        raise ValueError(f"y must hold at least two classes, got one class: {present.tolist()}")
    if ordered is None:
        if present.dtype.kind not in "biuf":
            warnings.warn(
                f"labels are not numbers and were sorted by alphabet: {present.tolist()}; give "
                "their order in classes=",
                stacklevel=5,
            )
        return present, codes
    missing = sorted(set(present.tolist()) - set(ordered), key=str)
    if missing or len(set(ordered)) != len(ordered):
        raise ValueError(f"classes must hold every label once, got {ordered}; missing: {missing}")
    rank = {label: place for place, label in enumerate(ordered)}
    order = np.argsort([rank[label] for label in present.tolist()])
    return present[order], np.argsort(order)[codes]
