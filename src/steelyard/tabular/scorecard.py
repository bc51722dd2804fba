r"""A scorecard: logistic regression on binned columns, scaled to points that add up.

Loaded when first asked for; needs scikit-learn (``steelyard[tabular]``).
"""

import json
import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from steelyard._checks import check_choice, check_count, check_range
from steelyard._extras import require
from steelyard.tabular._logistic import (
    LogisticData,
    fit_fair,
    fit_plain,
    fit_signed,
    score_bin_counts,
)
from steelyard.tabular.binning import WoEBinner
from steelyard.tabular.tables import IVInference, iv_inference

_base = require("sklearn.base", extra="tabular")
_validation = require("sklearn.utils.validation", extra="tabular")

__all__ = ["Scorecard"]

Array = NDArray[np.float64]


class Scorecard(_base.ClassifierMixin, _base.BaseEstimator):  # type: ignore[misc, name-defined]
    r"""Predict default from bins, with points per bin that a person can add by hand.

    .. math::
        \log\frac{P(\text{bad})}{P(\text{good})} = \beta_0 + \sum_f e_f(\text{bin}), \qquad
        \text{points}_f = -\Big(e_f + \frac{\beta_0}{d}\Big) \frac{\mathrm{PDO}}{\log 2}
            + \frac1d \Big( S_0 - \frac{\mathrm{PDO}}{\log 2} \log \mathrm{odds}_0 \Big)

    With ``encoding="woe"`` the effect is a coefficient times the weight of evidence, with
    ``"onehot"`` a coefficient per bin, with ``"stumps"`` the margin of boosted depth-1 trees on
    the bins. The bins are shared, so the three differ only in how freely the bins may be weighted.

    Args:
        binner: a :class:`WoEBinner`, cloned; ``None`` = its defaults.
        encoding: ``"woe"``, ``"onehot"`` or ``"stumps"``.
        C: inverse strength of the squared penalty, > 0, as in scikit-learn; ``inf`` = none.
        sign_constraint: no column may work against its own weight of evidence (``"woe"`` only).
        fairness_budget: largest information value between the groups of ``sensitive`` over bins
            of the score, on the rows of the fit; ``None`` = no limit. Not for ``"stumps"``.
        fairness_bins: number of score bins for it.
        base_points: points at ``base_odds``.
        base_odds: goods per bad at ``base_points``.
        points_to_double: points that double the odds.
        num_rounds: trees for ``"stumps"``.
        learning_rate: their step.

    Attributes:
        binner_: the fitted binner.
        effects_: log odds that each bin adds, one array per column.
        intercept_: log odds without them.
        coef_: coefficient of each column, ``[d]`` (``"woe"`` only).
        points_: points of each bin, one array per column.
        fairness_: :class:`IVInference` between the groups over score bins, if ``sensitive`` was
            given. The bins come from the same rows: check it on others.
        classes_: the two labels; the second is bad.
        n_features_in_: number of columns.
        feature_names_in_: their names, if a frame was given.

    Example:
        Twenty points double the odds, whatever the encoding:

        >>> import numpy as np
        >>> random = np.random.default_rng(0)
        >>> X = random.normal(size=(2000, 2))
        >>> y = (random.random(2000) < 1 / (1 + np.exp(2 - X[:, 0]))).astype(int)
        >>> card = Scorecard(WoEBinner(method="optimal")).fit(X, y)
        >>> points, log_odds = card.points(X), card.decision_function(X)
        >>> bool(np.allclose(np.diff(points), -np.diff(log_odds) * 20 / np.log(2)))
        True
        >>> card.reasons(np.array([[2.5, 0.0]]), number=1)
        array([['x0']], dtype=object)

    Source: Sudjianto, Burakov (2025), Sec. 5 to 8, arXiv:2509.09855; the scaling to points is
    industry practice.
    """

    def __init__(
        self,
        binner: WoEBinner | None = None,
        *,
        encoding: Literal["woe", "onehot", "stumps"] = "woe",
        C: float = 1.0,
        sign_constraint: bool = False,
        fairness_budget: float | None = None,
        fairness_bins: int = 10,
        base_points: float = 600.0,
        base_odds: float = 50.0,
        points_to_double: float = 20.0,
        num_rounds: int = 100,
        learning_rate: float = 0.3,
    ) -> None:
        self.binner = binner
        self.encoding = encoding
        self.C = C
        self.sign_constraint = sign_constraint
        self.fairness_budget = fairness_budget
        self.fairness_bins = fairness_bins
        self.base_points = base_points
        self.base_odds = base_odds
        self.points_to_double = points_to_double
        self.num_rounds = num_rounds
        self.learning_rate = learning_rate

    def fit(self, X: Any, y: Any, sample_weight: Any = None, sensitive: Any = None) -> "Scorecard":
        """Fit ``X`` ``[n, d]`` and two labels ``y`` ``[n]``; groups ``sensitive`` are 0 or 1.

        Groups are used in the fit alone: no prediction asks for them.
        """
        self._check_settings()
        binner = WoEBinner() if self.binner is None else self.binner
        self.binner_ = _base.clone(binner).fit(X, y, sample_weight=sample_weight)
        self._copy_from_binner()
        codes = self.binner_.bin_indices(X)
        bad = (_validation.column_or_1d(y) == self.classes_[1]).astype(np.float64)
        weight = _validation._check_sample_weight(sample_weight, codes, dtype=np.float64)
        group = self._group(sensitive, len(bad))
        if self.encoding == "stumps":
            self._fit_stumps(codes, bad, weight)
        else:
            self._fit_linear(codes, bad, weight, group)
        if self.encoding != "woe":  # an unseen value is then an average one
            self._centre(codes, weight)
        self._set_points()
        if group is not None:
            score = self._log_odds(codes)
            table = score_bin_counts(score, weight, group, self.fairness_bins)
            if len(table) > 1:
                self.fairness_: IVInference | None = iv_inference(*table.T, smoothing=0.5)
            else:
                self.fairness_ = None
        return self

    def decision_function(self, X: Any) -> Array:
        """Return the log odds of bad, ``[n]``."""
        _validation.check_is_fitted(self)
        return self._log_odds(self.binner_.bin_indices(X))

    def predict_proba(self, X: Any) -> Array:
        """Return the probabilities of good and bad, ``[n, 2]``."""
        log_odds = self.decision_function(X)
        return np.stack([expit(-log_odds), expit(log_odds)], axis=1)

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the likelier label, ``[n]``."""
        log_odds = self.decision_function(X)
        labels: NDArray[Any] = self.classes_[(log_odds > 0).astype(int)]
        return labels

    def points(self, X: Any) -> Array:
        """Return the total points, ``[n]``; more is safer."""
        _validation.check_is_fitted(self)
        factor, offset = self._scale()
        return offset - factor * self.decision_function(X)

    def points_table(self) -> dict[str, list[Any]]:
        """Return the scorecard as lists, ready for a data frame: one row per column and bin."""
        _validation.check_is_fitted(self)
        table: dict[str, list[Any]] = {
            name: [] for name in ("column", "bin", "points", "effect", "share", "bad_rate")
        }
        for bins, points, effects in zip(
            self.binner_.columns_, self.points_, self.effects_, strict=True
        ):
            rows = bins.good + bins.bad
            table["column"] += [bins.name] * len(rows)
            table["bin"] += bins.labels()
            table["points"] += points.tolist()
            table["effect"] += effects.tolist()
            table["share"] += (rows / rows.sum()).tolist()
            table["bad_rate"] += (bins.bad / rows).tolist()
        return table

    def reasons(
        self, X: Any, number: int = 3, *, against: Literal["best", "mean"] = "best"
    ) -> NDArray[np.object_]:
        """Name the columns that cost each row the most points.

        Args:
            X: ``[n, d]``.
            number: names per row, >= 1.
            against: compare with the best bin of the column, or with the average row of the fit.

        Returns:
            ``[n, number]``, the costliest first; ``None`` where no column costs anything.
        """
        check_choice("against", against, ("best", "mean"))
        check_count("number", number)
        _validation.check_is_fitted(self)
        codes = self.binner_.bin_indices(X)
        lost = np.empty(codes.shape)
        for place, (bins, effects) in enumerate(
            zip(self.binner_.columns_, self.effects_, strict=True)
        ):
            rows = bins.good + bins.bad
            reference = effects.min() if against == "best" else effects @ rows / rows.sum()
            lost[:, place] = np.append(effects, 0.0)[codes[:, place]] - reference
        order = np.argsort(-lost, axis=1, kind="stable")[:, :number]
        names = np.array([bins.name for bins in self.binner_.columns_], dtype=object)[order]
        names[np.take_along_axis(lost, order, axis=1) <= 0] = None
        result = np.full((len(codes), number), None, dtype=object)
        result[:, : names.shape[1]] = names
        return result

    def to_json(self) -> str:
        """Return the scorecard as text; :meth:`from_json` reads it without running code."""
        _validation.check_is_fitted(self)
        settings = self.get_params(deep=False)
        given = settings.pop("binner") is not None
        state = {
            "settings": settings,
            "own_binner": given,
            "binner": self.binner_.to_json(),
            "effects": [effects.tolist() for effects in self.effects_],
            "intercept": self.intercept_,
            "coef": self.coef_.tolist() if self.encoding == "woe" else None,
        }
        return json.dumps(state)

    @classmethod
    def from_json(cls, text: str) -> "Scorecard":
        """Rebuild a fitted scorecard from :meth:`to_json`; ``fairness_`` is not kept."""
        state = json.loads(text)
        binner = WoEBinner.from_json(state["binner"])
        card = cls(_base.clone(binner) if state["own_binner"] else None, **state["settings"])
        card.binner_ = binner
        card._copy_from_binner()
        card.effects_ = [np.array(effects) for effects in state["effects"]]
        card.intercept_ = state["intercept"]
        if state["coef"] is not None:
            card.coef_ = np.array(state["coef"])
        card._set_points()
        return card

    def _check_settings(self) -> None:
        check_choice("encoding", self.encoding, ("woe", "onehot", "stumps"))
        if not isinstance(self.C, float | int | np.number):
            raise TypeError(f"C must be a number, got {type(self.C).__name__}")
        if not self.C > 0:
            raise ValueError(f"C must be > 0, got {self.C}")
        check_range("base_odds", self.base_odds, above=0.0)
        check_range("points_to_double", self.points_to_double, above=0.0)
        check_count("fairness_bins", self.fairness_bins, at_least=2)
        if self.sign_constraint and self.encoding != "woe":
            raise ValueError(f'sign_constraint needs encoding="woe", got {self.encoding!r}')
        if self.fairness_budget is not None:
            check_range("fairness_budget", self.fairness_budget, at_least=0.0)
            if self.encoding == "stumps":
                raise ValueError('fairness_budget needs encoding="woe" or "onehot", got "stumps"')

    def _group(self, sensitive: Any, rows: int) -> NDArray[np.bool_] | None:
        if sensitive is None:
            if self.fairness_budget is not None:
                raise ValueError("fairness_budget needs the groups: pass sensitive to fit")
            return None
        group = _validation.column_or_1d(sensitive)
        if len(group) != rows or not np.array_equal(np.unique(group), [0, 1]):
            raise ValueError(
                f"sensitive must hold a 0 or a 1 for each of the {rows} rows and both of them, "
                f"got {len(group)} values {np.unique(group)[:5].tolist()}"
            )
        boolean: NDArray[np.bool_] = group == 1
        return boolean

    def _fit_linear(
        self, codes: NDArray[np.int64], bad: Array, weight: Array, group: NDArray[np.bool_] | None
    ) -> None:
        columns = self.binner_.columns_
        woe = self.encoding == "woe"
        # without a penalty the first bin of each column is the reference
        skip = 1 if math.isinf(self.C) else 0
        if woe:
            encode = [bins.woe[:, None] for bins in columns]
        else:
            encode = [np.eye(len(bins.woe))[:, skip:] for bins in columns]
        features = np.concatenate([e[codes[:, f]] for f, e in enumerate(encode)], axis=1)
        data = LogisticData(features, bad, weight, self.C)
        sign = 0.0
        if self.sign_constraint:
            sign = -1.0 if self.binner_.numerator == "good" else 1.0
        if self.fairness_budget is not None and group is not None:
            fit = fit_fair(
                data, group, self.fairness_budget, num_bins=self.fairness_bins, sign=sign
            )
        elif sign or not features.shape[1]:
            fit = fit_signed(data, sign)
        else:
            fit = fit_plain(data)
        widths = np.cumsum([e.shape[1] for e in encode])[:-1]
        parts = np.split(fit[:-1], widths)
        self.effects_ = [e @ part for e, part in zip(encode, parts, strict=True)]
        self.intercept_ = float(fit[-1])
        if woe:
            self.coef_ = fit[:-1]

    def _fit_stumps(self, codes: NDArray[np.int64], bad: Array, weight: Array) -> None:
        """Boost depth-1 trees on bin numbers and read the effect of each bin off the sum."""
        xgboost = require("xgboost", extra="tabular")
        kept = weight > 0
        places = codes[kept].astype(np.float32)
        data = xgboost.DMatrix(places, label=bad[kept], weight=weight[kept])
        settings = {
            "objective": "binary:logistic",
            "max_depth": 1,
            "eta": self.learning_rate,
            "tree_method": "hist",
            "base_score": float(weight @ bad / weight.sum()),
            "seed": 0,
        }
        model = xgboost.train(settings, data, num_boost_round=self.num_rounds)
        sizes = [len(bins.woe) for bins in self.binner_.columns_]
        grid = np.zeros((1 + sum(sizes), len(sizes)), dtype=np.float32)
        grid[1:][np.arange(sum(sizes)), np.repeat(np.arange(len(sizes)), sizes)] = np.concatenate(
            [np.arange(size) for size in sizes]
        )
        margin = model.predict(xgboost.DMatrix(grid), output_margin=True).astype(np.float64)
        self.intercept_ = float(margin[0])
        self.effects_ = np.split(margin[1:] - margin[0], np.cumsum(sizes)[:-1])

    def _centre(self, codes: NDArray[np.int64], weight: Array) -> None:
        for place, effects in enumerate(self.effects_):
            mean = float(np.average(effects[codes[:, place]], weights=weight))
            self.effects_[place] = effects - mean
            self.intercept_ += mean

    def _copy_from_binner(self) -> None:
        self.classes_ = self.binner_.classes_
        self.n_features_in_ = self.binner_.n_features_in_
        if hasattr(self.binner_, "feature_names_in_"):
            self.feature_names_in_ = self.binner_.feature_names_in_

    def _scale(self) -> tuple[float, float]:
        factor = self.points_to_double / math.log(2)
        return factor, self.base_points - factor * math.log(self.base_odds)

    def _set_points(self) -> None:
        factor, offset = self._scale()
        number = len(self.effects_)
        self.points_ = [
            offset / number - factor * (effects + self.intercept_ / number)
            for effects in self.effects_
        ]

    def _log_odds(self, codes: NDArray[np.int64]) -> Array:
        total = np.full(len(codes), self.intercept_)
        for place, effects in enumerate(self.effects_):
            total += np.append(effects, 0.0)[codes[:, place]]
        return total

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        tags.input_tags.allow_nan = True
        tags.input_tags.string = True
        tags.input_tags.categorical = True
        return tags
