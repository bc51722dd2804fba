"""Valid calls of the tabular tools."""

# ruff: noqa: C408, PLW0108 - a case reads like the call it stands for

import functools

import numpy as np

from _fuzz_values import (
    array,
    classes,
    ones,
    positive,
    real,
    unit,
)
from steelyard import tabular


def table(**more):
    """Good and bad counts of four bins."""
    return dict(good=np.array([90.0, 60.0, 75.0, 50.0]), bad=np.array([10.0, 40.0, 25.0, 50.0])) | (
        more
    )


def shares(**more):
    """Counts of three bins at two times."""
    return dict(base=np.array([20.0, 30.0, 50.0]), current=np.array([25.0, 35.0, 40.0])) | more


def rows(**more):
    """Forty rows of two columns with a label."""
    return dict(X=array(40, 2), y=(array(40) + array(40, shift=1) > 0).astype(int)) | more


@functools.cache
def fitted_binner():
    """A fitted binner."""
    return binner().fit(**rows())


def binner(**settings):
    """A quick binner."""
    return tabular.WoEBinner(method="quantile", max_bins=3, **settings)


def bin_columns(X, y, **settings):
    """Fit a binner and transform."""
    return tabular.WoEBinner(**settings).fit(X, y).transform(X)


def fit_scorecard(X, y, sample_weight=None, **settings):
    """Fit a scorecard and score."""
    card = tabular.Scorecard(binner(), **settings).fit(X, y, sample_weight=sample_weight)
    return card.predict_proba(X)


@functools.cache
def card():
    """A fitted scorecard."""
    return tabular.Scorecard(binner()).fit(**rows())


def fit_fair(estimator):
    """Fit a fair network for two epochs."""

    def call(X, y, sensitive, **settings):
        model = estimator(hidden=(4,), max_epochs=2, random_state=0, **settings)
        return model.fit(X, y, sensitive=sensitive).predict(X)

    return call


@functools.cache
def fair(estimator):
    """A fitted fair network."""
    data = rows(sensitive=classes(40).numpy())
    return estimator(hidden=(4,), max_epochs=2, random_state=0).fit(**data)


def duck():
    """A table of a hundred rows."""
    import duckdb

    return duckdb.sql("SELECT range::DOUBLE AS age, range % 2 AS y FROM range(100)")


def outputs(**more):
    """Outputs of twelve people of two groups."""
    return dict(outputs=unit(12).numpy(), groups=classes(12).numpy()) | more


FAIR_SETTINGS = dict(
    strength=1.0,
    c=1.0,
    dropout=0.0,
    learning_rate=0.005,
    weight_decay=0.0001,
    batch_size=16,
    patience=2,
    validation_fraction=0.2,
    measure="concatenated",
)


def on_rows(make, name, **more):
    """The case of a method that takes rows."""
    return {name: lambda: dict(self_=make(), X=array(6, 2)) | more}


TABULAR = {
    "tabular.DistanceCovarianceRegularizer": lambda: dict(),
    "tabular.DistanceCovarianceRegularizer.forward": lambda: dict(
        self_=tabular.DistanceCovarianceRegularizer(),
        outputs=real(6),
        sensitive=[real(6, shift=1), real(6, shift=2)],
        mask=ones(6),
    ),
    "tabular.FairClassifier.fit": lambda: rows(
        call_=fit_fair(tabular.FairClassifier), sensitive=classes(40).numpy(), **FAIR_SETTINGS
    ),
    "tabular.FairRegressor.fit": lambda: dict(
        call_=fit_fair(tabular.FairRegressor),
        X=array(40, 2),
        y=positive(40).numpy(),
        sensitive=classes(40).numpy(),
        loss="squared",
        penalise="rate",
        **FAIR_SETTINGS,
    ),
    **on_rows(lambda: fair(tabular.FairClassifier), "tabular.FairClassifier.decision_function"),
    **on_rows(lambda: fair(tabular.FairClassifier), "tabular.FairClassifier.predict"),
    **on_rows(lambda: fair(tabular.FairClassifier), "tabular.FairClassifier.predict_proba"),
    **on_rows(lambda: fair(tabular.FairRegressor), "tabular.FairRegressor.predict"),
    "tabular.Scorecard.fit": lambda: rows(
        call_=fit_scorecard,
        sample_weight=positive(40).numpy(),
        encoding="woe",
        C=1.0,
        base_points=600.0,
        base_odds=50.0,
        points_to_double=20.0,
        sign_constraint=False,
    ),
    **on_rows(card, "tabular.Scorecard.decision_function"),
    **on_rows(card, "tabular.Scorecard.predict"),
    **on_rows(card, "tabular.Scorecard.predict_proba"),
    **on_rows(card, "tabular.Scorecard.points"),
    **on_rows(card, "tabular.Scorecard.reasons", number=1, against="best"),
    "tabular.WoEBinner.fit": lambda: rows(
        call_=bin_columns,
        max_bins=3,
        method="quantile",
        smoothing=0.5,
        min_bin_share=0.05,
        max_prebins=20,
        learning_rate=0.3,
        num_rounds=5,
        unseen="error",
        numerator="good",
    ),
    "tabular.WoEBinner.fit_duckdb": lambda: dict(
        self_=binner(), source=duck(), target="y", columns=["age"]
    ),
    **on_rows(fitted_binner, "tabular.WoEBinner.transform"),
    **on_rows(fitted_binner, "tabular.WoEBinner.bin_indices"),
    **on_rows(fitted_binner, "tabular.WoEBinner.drift", alpha=0.05),
    "tabular.WoEBinner.table": lambda: dict(self_=fitted_binner(), column="x0"),
    "tabular.WoEBinner.evaluate": lambda: rows(self_=fitted_binner()),
    "tabular.ColumnBins.sql": lambda: dict(self_=fitted_binner().columns_[0], otherwise="0"),
    "tabular.adverse_impact_ratio": lambda: dict(
        scores=unit(12).numpy(), groups=classes(12).numpy(), cutoff=0.5
    ),
    "tabular.audit_fairness": lambda: dict(
        outputs=unit(12).numpy(), sensitive=classes(12).numpy(), bins=4, permutations=2
    ),
    "tabular.calibrate_strength": lambda: rows(
        estimator=tabular.FairClassifier(hidden=(4,), max_epochs=1),
        sensitive=classes(40).numpy(),
        strengths=(0.0, 1.0),
        seeds=(0,),
        target=0.1,
    ),
    "tabular.choose_strength": lambda: dict(
        strengths=np.array([0.0, 10.0, 20.0]),
        divergence=np.array([0.03, 0.01, 0.005]),
        target=0.02,
    ),
    "tabular.cross_fitted_iv": lambda: rows(binner=binner(), folds=2),
    "tabular.duckdb_bin_counts": lambda: dict(source=duck(), cuts={"age": [9, 49]}, by="y"),
    "tabular.duckdb_cuts": lambda: dict(source=duck(), columns=["age"], num_bins=4),
    "tabular.duckdb_level_counts": lambda: dict(source=duck(), columns=["age"], by="y"),
    "tabular.duckdb_psi": lambda: dict(base=duck(), current=duck(), columns=["age"]),
    "tabular.encode_sensitive": lambda: dict(sensitive=array(6, 2)),
    "tabular.fairness_probability": lambda: dict(
        iv=np.array([0.1, 0.2]), se=np.array([0.05, 0.04]), epsilon=0.15
    ),
    "tabular.group_js": lambda: outputs(bandwidth=0.1, grid=20),
    "tabular.intersectional_groups": lambda: dict(sensitive=array(12, 2), bins=2),
    "tabular.iv_inference": table,
    "tabular.woe_table": table,
    "tabular.optimal_bins": lambda: table(max_bins=3, monotonic="auto"),
    "tabular.pareto_front": lambda: dict(
        pre_bins=np.array([[20.0, 30, 20, 30], [30, 20, 25, 25], [40, 10, 40, 10]]),
        fairness_grid=[0.01, 0.2],
        max_bins=3,
    ),
    "tabular.psi": shares,
    "tabular.psi_test": shares,
    "tabular.psi_over_time": lambda: dict(
        base=np.array([20.0, 30.0, 50.0]), periods=np.array([[25.0, 35, 40], [10, 20, 70]])
    ),
    "tabular.ranked_probability_score": lambda: dict(
        prediction=positive(5).numpy(), outcome=classes(5, of=3).numpy()
    ),
    "tabular.score_pre_bins": lambda: dict(
        scores=unit(12).numpy(),
        bad=classes(12).numpy(),
        groups=classes(12, of=4).numpy() // 2,
        num_bins=3,
    ),
    "tabular.unfairness": outputs,
}

CASES = TABULAR
SLOW = {
    "tabular.calibrate_strength",
    "tabular.pareto_front",
    "tabular.cross_fitted_iv",
    "tabular.Scorecard.fit",
} | {name for name in TABULAR if "Fair" in name or "WoEBinner" in name or "duckdb" in name}
