r"""Bins of every column of a table, their weights of evidence, and the tests that belong to them.

Loaded when first asked for; needs scikit-learn (``steelyard[tabular]``).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from steelyard._checks import check_choice, check_count, check_range
from steelyard._extras import require
from steelyard.tabular._columns import Column, check_names, is_frame, read_columns
from steelyard.tabular._prebins import (
    BinningRule,
    PreBins,
    SortedNumbers,
    count_levels,
    final_bins,
    level_prebins,
)
from steelyard.tabular.column_bins import ColumnBins, quoted
from steelyard.tabular.drift import PSITest, psi_test
from steelyard.tabular.duckdb_counts import (
    duckdb_bin_counts,
    duckdb_cuts,
    duckdb_level_counts,
    grouped_rows,
    numeric_columns,
    open_relation,
)
from steelyard.tabular.tables import (
    IVInference,
    iv_inference,
    log_share_ratio,
    smoothed_counts,
    woe_table,
)

_base = require("sklearn.base", extra="tabular")
_validation = require("sklearn.utils.validation", extra="tabular")
_multiclass = require("sklearn.utils.multiclass", extra="tabular")
_tags = require("sklearn.utils", extra="tabular")

__all__ = ["WoEBinner"]

Array = NDArray[np.float64]


class WoEBinner(
    _base.OneToOneFeatureMixin,  # type: ignore[misc, name-defined]
    _base.TransformerMixin,  # type: ignore[misc, name-defined]
    _base.BaseEstimator,  # type: ignore[misc, name-defined]
):
    r"""Cut each column into a few bins and replace values by the weight of evidence of their bin.

    .. math:: \mathrm{WoE}_j = \log\frac{n_{jg} + a}{n_g + aJ} - \log\frac{n_{jb} + a}{n_b + aJ}

    with goods (the smaller label) over bads (the larger), and ``a`` the smoothing. Missing values
    and each special value have a bin of their own, so they are never taken for average.

    Args:
        max_bins: most bins besides missing and special ones; ``None`` = no limit (not for
            ``"quantile"``).
        method: ``"xgboost"``, the published one: the splits of boosted depth-1 trees on the column
            alone; ``"quantile"``: equal shares; ``"optimal"``: the partition with the largest IV
            among borders at quantiles and at the leaves of a tree (:func:`optimal_bins`), then
            refined. Where the first two break ``max_bins``, ``min_bin_share`` or ``monotonic``,
            their bins are joined in the optimal way.
        smoothing: added to every cell, >= 0. At 0 a bin without goods or bads is an error, except
            that ``"optimal"`` joins it.
        monotonic: direction of the WoE along a numeric column: ``"increasing"``, ``"decreasing"``,
            ``"auto"`` or True for the better of both, ``None`` or False; or one for each column as
            a mapping from its name.
        min_bin_share: smallest share of the rows in a bin, in [0, 0.5).
        max_prebins: number of quantiles that ``"xgboost"`` and ``"optimal"`` start from.
        num_rounds: trees per column for ``"xgboost"``.
        learning_rate: their step, in (0, 1].
        special_values: codes with a bin of their own, for all columns, or a mapping from names.
        categorical: names or positions of columns whose numbers are levels; text always is.
        unseen: at transform, for a level, or a missing value in a column that had none:
            ``"error"``, or ``"neutral"`` for 0.
        numerator: ``"good"``; ``"bad"`` turns the sign of the WoE.

    Attributes:
        columns_: a :class:`ColumnBins` for each column.
        iv_: information values, ``[d]``, on the rows of the fit, hence optimistic: see
            :meth:`evaluate`.
        classes_: the two labels; the second is bad.
        n_features_in_: number of columns.
        feature_names_in_: their names, if a frame was given.

    Example:
        A missing value is not the average, and level "c" was never seen:

        >>> import numpy as np
        >>> X = np.array([["a", 1], ["a", 2], ["b", 8], ["b", None]] * 50, dtype=object)
        >>> y = np.array([0, 0, 1, 1] * 50)
        >>> binner = WoEBinner(method="optimal", unseen="neutral").fit(X, y)
        >>> binner.transform(np.array([["a", 1.5], ["c", None]], dtype=object)).round(2)
        array([[ 5.3 ,  5.3 ],
               [ 0.  , -4.62]])

    Source: Sudjianto, Burakov (2025), Sec. 7.1, arXiv:2509.09855, for ``"xgboost"``.
    """

    def __init__(
        self,
        max_bins: int | None = 5,
        method: Literal["xgboost", "quantile", "optimal"] = "xgboost",
        smoothing: float = 0.5,
        monotonic: Any = None,
        min_bin_share: float = 0.05,
        *,
        max_prebins: int = 100,
        num_rounds: int = 50,
        learning_rate: float = 0.3,
        special_values: Sequence[Any] | Mapping[str, Sequence[Any]] | None = None,
        categorical: Sequence[str | int] | None = None,
        unseen: Literal["error", "neutral"] = "error",
        numerator: Literal["good", "bad"] = "good",
    ) -> None:
        self.max_bins = max_bins
        self.method = method
        self.smoothing = smoothing
        self.monotonic = monotonic
        self.min_bin_share = min_bin_share
        self.max_prebins = max_prebins
        self.num_rounds = num_rounds
        self.learning_rate = learning_rate
        self.special_values = special_values
        self.categorical = categorical
        self.unseen = unseen
        self.numerator = numerator

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "WoEBinner":
        """Find the bins of ``X`` ``[n, d]`` for two labels ``y`` ``[n]``, weights ``[n]`` >= 0."""
        self._check_settings()
        columns = self._columns(X, reset=True)
        bad = self._binary(y, len(columns[0].values))
        weight = None
        if sample_weight is not None:
            weight = _validation._check_sample_weight(
                sample_weight, bad, dtype=np.float64, ensure_non_negative=True
            )
            kept = weight > 0
            if not kept.any() or len(np.unique(bad[kept])) < 2:
                raise ValueError("sample_weight leaves rows of one class only, two are needed")
            columns = [Column(c.name, c.numeric, c.values[kept]) for c in columns]
            bad, weight = bad[kept], weight[kept]
        self._set_columns([self._fit_column(column, bad, weight) for column in columns])
        return self

    def fit_duckdb(
        self,
        source: Any,
        target: str,
        columns: Sequence[str] | None = None,
        *,
        sample_rows: int = 20_000,
        seed: int = 0,
    ) -> "WoEBinner":
        """Find the bins of a Parquet file or a DuckDB relation; only counts enter Python.

        A sample places the pre-bins of numeric columns, then one query counts all rows.

        Args:
            source: path of a Parquet file or a DuckDB relation.
            target: column with the two labels.
            columns: features; ``None`` = all but the target.
            sample_rows: rows of the sample.
            seed: of the sample.

        Raises:
            TypeError: ``columns`` are no names, or ``source`` is of another kind.
            ValueError: a column is not there, or a setting out of range.
        """
        self._check_settings()
        if self.special_values:
            raise ValueError("special_values are not supported by fit_duckdb, make them NULL")
        if columns is not None:
            check_names("columns", columns)
        relation = open_relation(source)
        names = [n for n in relation.columns if n != target] if columns is None else list(columns)
        known = list(relation.columns)
        if not isinstance(target, str) or target not in known:
            raise ValueError(f"target: the source has no column {target!r}, it has {known}")
        if not names or {*names} - {*known}:
            raise ValueError(f"columns must be one or more of the source's {known}, got {names}")
        levels = {n if isinstance(n, str) else names[n] for n in self.categorical or ()}
        numbers = [n for n in numeric_columns(relation) if n in names and n not in levels]
        size = self._rule(None).candidates() if self.method == "quantile" else self.max_prebins
        cuts = duckdb_cuts(relation, numbers, num_bins=size, sample_rows=sample_rows, seed=seed)
        counts = duckdb_bin_counts(source, cuts, by=target)
        texts = [name for name in names if name not in cuts]
        fitted = {}
        for name in numbers:
            good, bad = counts[name].T
            pre = PreBins(good[:-1], bad[:-1], cuts[name], ())
            fitted[name] = self._join(name, pre, (), counts[name][-1:], numeric=True)
        for name, (found, table) in duckdb_level_counts(relation, texts, by=target).items():
            good, bad = table[:-1].T
            pre = level_prebins(found, good, bad, smoothing=self.smoothing or 0.5, number=size)
            fitted[name] = self._join(name, pre, (), table[-1:], numeric=False)
        self._set_columns([fitted[name] for name in names])
        labels = grouped_rows(relation, [f"min({quoted(target)})"], target)
        self.classes_ = np.array([row[0] for row in labels])
        self.n_features_in_, self.feature_names_in_ = len(names), np.array(names, dtype=object)
        return self

    def transform(self, X: Any) -> Array:
        """Return the weight of evidence of every value, ``[n, d]``."""
        codes = self.bin_indices(X)
        result = np.empty(codes.shape)
        for place, bins in enumerate(self.columns_):
            woe = np.append(bins.woe, 0.0)  # code -1: no bin, and unseen="neutral"
            result[:, place] = woe[codes[:, place]]
        return result

    def bin_indices(self, X: Any) -> NDArray[np.int64]:
        """Return the bin of every value, ``[n, d]``; -1 if there is none, with ``"neutral"``."""
        _validation.check_is_fitted(self)
        columns = self._columns(X, reset=False)
        codes = np.empty((len(columns[0].values), len(columns)), dtype=np.int64)
        for place, (bins, column) in enumerate(zip(self.columns_, columns, strict=True)):
            codes[:, place] = bins.index(column)
            if self.unseen == "error" and (codes[:, place] < 0).any():
                value = column.values[codes[:, place] < 0][0]
                raise ValueError(
                    f"X: column {bins.name!r} has a value without a bin, {value!r}, which did not "
                    'occur in fit; unseen="neutral" gives it WoE 0'
                )
        return codes

    def table(self, column: str | int) -> dict[str, Any]:
        """Return the bins of a column as lists, ready for ``pandas.DataFrame`` or polars."""
        bins = self._column(column)
        cells = woe_table(bins.good, bins.bad, smoothing=self.smoothing)
        rows = bins.good + bins.bad
        with np.errstate(invalid="ignore"):
            rate = bins.bad / rows
        return {
            "bin": bins.labels(),
            "rows": rows,
            "share": rows / rows.sum(),
            "good": bins.good,
            "bad": bins.bad,
            "bad_rate": rate,
            "woe": bins.woe,
            "woe_standard_error": cells.woe_standard_error,
            "iv": cells.iv_per_bin,
        }

    def evaluate(self, X: Any, y: Any) -> dict[str, IVInference | None]:
        """Test each column on other rows than those of the fit: there the p-values hold.

        Returns:
            :func:`iv_inference` for each column; ``None`` for a column of one bin.

        Raises:
            ValueError: ``y`` holds one class only or others than in fit, or ``X`` does not fit.
        """
        codes = self.bin_indices(X)
        labels = _validation.column_or_1d(y)
        if not np.isin(labels, self.classes_).all():
            raise ValueError(f"y must hold only the classes of fit, {self.classes_.tolist()}")
        bad = (labels == self.classes_[1]).astype(np.float64)
        _validation.check_consistent_length(codes, bad)
        if len(np.unique(bad)) < 2:
            raise ValueError(f"y must hold both classes of fit, got {np.unique(labels).tolist()}")
        result: dict[str, IVInference | None] = {}
        for place, bins in enumerate(self.columns_):
            code = codes[:, place]
            cells = [_per_bin(code, weight, len(bins.good)) for weight in (1 - bad, bad)]
            good, ill = (cell[bins.good + bins.bad > 0] for cell in cells)
            result[bins.name] = (
                iv_inference(good, ill, smoothing=self.smoothing) if len(good) > 1 else None
            )
        return result

    def drift(self, X: Any, alpha: float = 0.05) -> dict[str, PSITest | None]:
        """Test each column of new rows against the counts of the fit (:func:`psi_test`)."""
        codes = self.bin_indices(X)
        result: dict[str, PSITest | None] = {}
        for place, bins in enumerate(self.columns_):
            base = bins.good + bins.bad
            current = _per_bin(codes[:, place], None, len(base))
            result[bins.name] = (
                psi_test(base, current, alpha, smoothing=self.smoothing) if len(base) > 1 else None
            )
        return result

    def to_sql(self) -> dict[str, str]:
        """Return for each column an SQL expression of its WoE, to score inside a database."""
        _validation.check_is_fitted(self)
        otherwise = "0.0" if self.unseen == "neutral" else "NULL"
        return {bins.name: bins.sql(otherwise=otherwise) for bins in self.columns_}

    def to_json(self) -> str:
        """Return settings and bins as text; :meth:`from_json` reads them without running code."""
        _validation.check_is_fitted(self)
        names = getattr(self, "feature_names_in_", None)
        state = {
            "settings": self.get_params(),
            "columns": [bins.to_dict() for bins in self.columns_],
            "classes": self.classes_.tolist(),
            "names": None if names is None else names.tolist(),
        }
        return json.dumps(state)

    @classmethod
    def from_json(cls, text: str) -> "WoEBinner":
        """Rebuild a fitted binner from :meth:`to_json`."""
        state = json.loads(text)
        binner = cls(**state["settings"])
        binner._set_columns([ColumnBins.from_dict(bins) for bins in state["columns"]])
        binner.classes_ = np.array(state["classes"])
        binner.n_features_in_ = len(binner.columns_)
        if state["names"] is not None:
            binner.feature_names_in_ = np.array(state["names"], dtype=object)
        return binner

    def _check_settings(self) -> None:
        check_choice("method", self.method, ("xgboost", "quantile", "optimal"))
        check_choice("unseen", self.unseen, ("error", "neutral"))
        check_choice("numerator", self.numerator, ("good", "bad"))
        if self.max_bins is not None:
            check_count("max_bins", self.max_bins)
        elif self.method == "quantile":
            raise ValueError('max_bins must be an integer for method="quantile", got None')
        check_range("smoothing", self.smoothing, at_least=0.0)
        check_range("min_bin_share", self.min_bin_share, at_least=0.0, below=0.5)
        check_count("max_prebins", self.max_prebins)
        check_count("num_rounds", self.num_rounds)
        check_range("learning_rate", self.learning_rate, above=0.0, at_most=1.0)
        by_column = isinstance(self.monotonic, Mapping)
        for value in self.monotonic.values() if by_column else (self.monotonic,):
            choices = (None, False, True, "auto", "increasing", "decreasing")
            check_choice("monotonic", value, choices)

    def _columns(self, X: Any, *, reset: bool) -> list[Column]:
        if is_frame(X):
            columns = read_columns(X, self.categorical)
            _validation.validate_data(self, X, reset=reset, skip_check_array=True)
            if not columns or not X.shape[0]:
                raise ValueError(f"X must have rows and columns, got shape {list(X.shape)}")
            return columns
        X = _validation.validate_data(self, X, reset=reset, dtype=None, ensure_all_finite=False)
        return read_columns(X, self.categorical)

    def _binary(self, y: Any, rows: int) -> Array:
        if y is None:
            raise ValueError("WoEBinner requires y to be passed, but the target y is None")
        labels = _validation.column_or_1d(y, warn=True)
        _validation.assert_all_finite(labels, input_name="y")
        if len(labels) != rows:
            raise ValueError(
                f"y must have one label for each of the {rows} rows, got {len(labels)}"
            )
        kind = _multiclass.type_of_target(labels, input_name="y", raise_unknown=True)
        self.classes_, codes = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y must hold two classes, got one class: {self.classes_.tolist()}")
        if kind != "binary":
            raise ValueError(
                f"Only binary classification is supported. The type of the target is {kind}."
            )
        return codes.astype(np.float64)

    def _rule(self, name: str | None, *, ordered: bool = True) -> BinningRule:
        trend = self.monotonic if ordered else None  # levels come in the order of their risk
        if isinstance(trend, Mapping):
            trend = trend.get(name)
        return BinningRule(
            method=self.method,
            max_bins=self.max_bins,
            smoothing=self.smoothing,
            monotonic="auto" if trend is True else trend or None,
            min_bin_share=self.min_bin_share,
            max_prebins=self.max_prebins,
            num_rounds=self.num_rounds,
            learning_rate=self.learning_rate,
        )

    def _fit_column(self, column: Column, bad: Array, weight: Array | None) -> ColumnBins:
        special = self.special_values or ()
        if isinstance(special, Mapping):
            special = special.get(column.name, ())
        special = tuple(value for value in special if (column.values == value).any())
        missing = column.missing()
        apart = [column.values == value for value in special] + [missing]
        counts = np.array([_two_counts(mask, bad, weight) for mask in apart])
        values = np.ascontiguousarray(column.values)  # a column of an array is strided
        outside = np.logical_or.reduce(apart)
        if outside.any():
            values, bad = values[~outside], bad[~outside]
            weight = None if weight is None else weight[~outside]
        rule = self._rule(column.name)
        numbers = None
        if column.numeric:
            numbers = SortedNumbers(values, bad, weight)
            pre = numbers.quantile_prebins(rule.candidates())
        else:
            levels, good, ill = count_levels(values, bad, weight)
            pre = level_prebins(
                levels, good, ill, smoothing=self.smoothing or 0.5, number=rule.candidates()
            )
        return self._join(
            column.name, pre, special, counts, numeric=column.numeric, numbers=numbers
        )

    def _join(
        self,
        name: str,
        pre: PreBins,
        special: tuple[Any, ...],
        apart: Array,
        *,
        numeric: bool,
        numbers: SortedNumbers | None = None,
    ) -> ColumnBins:
        """Make the bins of a column from its pre-bins and the counts of special and missing."""
        has_missing = bool(apart[-1].sum() > 0)
        apart = apart if has_missing else apart[:-1]
        try:
            if len(pre.good):
                pre = final_bins(pre, apart, self._rule(name, ordered=numeric), numbers)
            good = np.concatenate([pre.good, apart[:, 0]])
            bad = np.concatenate([pre.bad, apart[:, 1]])
            cells = smoothed_counts(good, bad, self.smoothing, names=("good", "bad"))
        except ValueError as error:
            raise ValueError(f"column {name!r}: {error}") from None
        woe = log_share_ratio(*cells)
        shares = [cell / cell.sum() for cell in cells]
        return ColumnBins(
            name=name,
            numeric=numeric,
            cuts=pre.cuts,
            levels=pre.levels,
            special=special,
            has_missing=has_missing,
            good=good,
            bad=bad,
            woe=woe if self.numerator == "good" else -woe,
            iv=float(((shares[0] - shares[1]) * woe).sum()),
        )

    def _set_columns(self, columns: list[ColumnBins]) -> None:
        self.columns_ = columns
        self.iv_ = np.array([bins.iv for bins in columns])

    def _column(self, column: str | int) -> ColumnBins:
        _validation.check_is_fitted(self)
        if isinstance(column, int):
            return self.columns_[column]
        for bins in self.columns_:
            if bins.name == column:
                return bins
        raise ValueError(f"no column {column!r}; there are {[b.name for b in self.columns_]}")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.string = True
        tags.input_tags.categorical = True
        tags.target_tags.required = True
        tags.classifier_tags = _tags.ClassifierTags(multi_class=False)
        return tags


def _two_counts(mask: NDArray[np.bool_], bad: Array, weight: Array | None) -> list[float]:
    weights = mask.astype(np.float64) if weight is None else mask * weight
    return [float((weights * (1 - bad)).sum()), float((weights * bad).sum())]


def _per_bin(codes: NDArray[np.int64], weight: Array | None, number: int) -> Array:
    """Count the codes 0 .. number - 1; -1 is left out."""
    kept = codes >= 0
    weights = None if weight is None else weight[kept]
    return np.bincount(codes[kept], weights, minlength=number).astype(np.float64)
