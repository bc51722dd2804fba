"""Tables of loans for the recipes on scorecards, and the methods that these are compared with.

Four real tables (:mod:`steelyard.lab.data`) and a simulated one; boosted trees on the raw columns,
and optbinning where it is installed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from steelyard._checks import check_choice, check_count
from steelyard._extras import require
from steelyard.lab import data

__all__ = ["LOAN_TABLES", "Loans", "auc", "boosted_trees", "halves", "optbinning_card", "portfolio"]

Array = NDArray[np.float64]
Rows = NDArray[np.int64]

# what is left out says too much about who somebody is
LOAN_TABLES: dict[str, tuple[Callable[[], data.Table], tuple[str, ...]]] = {
    "german": (data.german_credit, ("personal_status_and_sex", "foreign_worker")),
    "credit": (data.credit_data, ("Marital",)),
    "hmda": (data.mortgages, ("single",)),
    "taiwan": (data.taiwan_default, ("MARRIAGE",)),
}


@dataclass(frozen=True)
class Loans:
    """Loans and how they ended.

    Attributes:
        names: of the features.
        features: ``[n, d]``, numbers with NaN for missing, and text.
        bad: 1 where the loan went wrong, else 0, ``[n]``.
        group: 1 for the protected group, else 0, ``[n]``; ``None`` if it is not recorded. It is
            none of the features.
    """

    names: list[str]
    features: NDArray[Any]
    bad: Array
    group: Array | None

    @classmethod
    @cache
    def read(cls, name: str) -> "Loans":
        """Read ``"german"``, ``"credit"``, ``"hmda"`` (group: black) or ``"taiwan"`` (women)."""
        check_choice("name", name, tuple(LOAN_TABLES))
        read, left_out = LOAN_TABLES[name]
        table = read()
        bad, group = table.pop("bad"), table.pop("black", None)
        if "SEX" in table:
            group = (table.pop("SEX") == "female").astype(np.float64)
        columns = {key: values for key, values in table.items() if key not in left_out}
        kind = object if any(values.dtype == object for values in columns.values()) else float
        features = np.stack([values.astype(kind) for values in columns.values()], axis=1)
        return cls(list(columns), features, bad, group)

    def is_text(self) -> list[bool]:
        """Tell which columns hold text."""
        return [any(isinstance(v, str) for v in column) for column in self.features.T]

    def protected(self) -> Array:
        """Return the group.

        Raises:
            ValueError: it is not recorded.
        """
        if self.group is None:
            raise ValueError("this table does not record a group")
        return self.group


def portfolio(rows: int, seed: int) -> Loans:
    """Simulate seven features and a default in about 15 % of the rows; 30 % are protected.

    Args:
        rows: number of loans.
        seed: of the generator.

    Example:
        >>> loans = portfolio(5000, seed=0)
        >>> loans.features.shape, bool(0.13 < loans.bad.mean() < 0.17)
        ((5000, 7), True)
    """
    check_count("rows", rows)
    random = np.random.default_rng(seed)
    group = (random.random(rows) < 0.3).astype(np.float64)
    columns: dict[str, Array] = {
        "income": np.exp(random.normal(10.6 - 0.2 * group, 0.5)),
        "debt": random.beta(2 + 0.4 * group, 5),
        "used": random.beta(1.5, 3, rows),
        "history": random.gamma(4 - group, 3),
        "inquiries": random.poisson(1 + 0.4 * group).astype(np.float64),
        "employed": random.exponential(6, rows),
    }
    columns["late"] = random.poisson(0.3 + 0.5 * columns["used"]).astype(np.float64)
    risk = (
        -0.6 * (np.log(columns["income"]) - 10.6)
        + 3.0 * np.maximum(columns["debt"] - 0.3, 0)
        + 1.5 * columns["used"]
        - 0.06 * np.minimum(columns["history"], 15)
        + 0.2 * columns["inquiries"]
        + 0.7 * np.minimum(columns["late"], 3)
        - 0.5 * (columns["employed"] > 2)
    )
    level = optimize.brentq(lambda shift: special.expit(risk + shift).mean() - 0.15, -20, 20)
    bad = (random.random(rows) < special.expit(risk + level)).astype(np.float64)
    return Loans(list(columns), np.stack(list(columns.values()), axis=1), bad, group)


def halves(labels: NDArray[Any], seed: int) -> list[tuple[Rows, Rows]]:
    """Split into two stratified halves: each is once for training and once for testing."""
    selection = require("sklearn.model_selection", extra="tabular")
    splitter = selection.StratifiedKFold(2, shuffle=True, random_state=seed)
    return list(splitter.split(np.zeros(len(labels)), labels))


def auc(bad: Array, risk: Array) -> float:
    """Area under the curve of a score that is high where the risk is high."""
    return float(require("sklearn.metrics", extra="tabular").roc_auc_score(bad, risk))


def boosted_trees(
    loans: Loans, train: Rows, test: Rows, *, rounds: int, depth: int = 1, rate: float = 0.3
) -> float:
    """AUC of boosted trees on the raw columns, text as one column for each level."""
    columns = []
    for values, text in zip(loans.features.T, loans.is_text(), strict=True):
        if text:
            levels = np.unique(values[train].astype(str))
            columns.append((values.astype(str)[:, None] == levels).astype(np.float64))
        else:
            columns.append(values.astype(np.float64)[:, None])
    inputs = np.concatenate(columns, axis=1)
    model = require("xgboost", extra="tabular").XGBClassifier(
        max_depth=depth, n_estimators=rounds, learning_rate=rate, n_jobs=1
    )
    model.fit(inputs[train], loans.bad[train])
    return auc(loans.bad[test], model.predict_proba(inputs[test])[:, 1])


def optbinning_card(
    loans: Loans, train: Rows, test: Rows, *, max_bins: int, min_bin_share: float
) -> tuple[float, NDArray[Any]]:
    """AUC of optbinning's bins in a logistic regression, and the bin of each training row.

    Bins need no trend; missing values have their own.

    Raises:
        ImportError: optbinning is not installed.
    """
    import optbinning  # type: ignore[import-not-found, import-untyped, unused-ignore]
    import pandas as pd  # type: ignore[import-untyped, unused-ignore]

    linear_model = require("sklearn.linear_model", extra="tabular")
    texts = [name for name, text in zip(loans.names, loans.is_text(), strict=True) if text]
    frame = pd.DataFrame(loans.features, columns=loans.names)
    frame = frame.astype({n: object if n in texts else float for n in loans.names})
    process = optbinning.BinningProcess(
        loans.names,
        max_n_bins=max_bins,
        min_bin_size=min_bin_share,
        min_prebin_size=min_bin_share,
        categorical_variables=texts,
        binning_fit_params={name: {"monotonic_trend": None} for name in loans.names},
    )
    process.fit(frame.iloc[train], loans.bad[train].astype(int))
    woe = process.transform(frame, metric="woe", metric_missing="empirical").to_numpy(float)
    bins = process.transform(frame.iloc[train], metric="indices", metric_missing="empirical")
    model = linear_model.LogisticRegression(C=1.0, max_iter=1000).fit(woe[train], loans.bad[train])
    return auc(loans.bad[test], model.decision_function(woe[test])), bins.to_numpy(int)
