"""Fairness over several attributes at once: what does a penalty on all of them together see?

A model can be fair to women and to each race, and unfair to the women of one race. The distance
covariance of predictions and all protected attributes together sees that; the sum over attributes
does not.

xor         two fair bits and a feature that stands for their exclusive or, which no bit shows.
compas      new arrest within two years; sex, race and continuous age are protected.
taiwan      default on a credit card; sex and continuous age.
law         grade of the first year of law school; race and sex. Regression.
search      learning rates, on seeds of their own; every method has as many strengths as any other.

Compared are the three measures (all attributes concatenated, jointly with their own dependence, one
by one; the second is the dearest and gets one strength on real tables) and, for linear classifiers,
the reduction of fairlearn (where installed), which needs age in bins and lists the cells. The
attributes are no inputs of any model. Judged is the divergence of scores between cells above what
chance gives, twice: as published, with bandwidth 0.15, and with a bandwidth relative to the spread
of the scores, so that shrinking all of them is no gain. The frontiers are those of the second.

Source: Lee, Antonio, Avanzi, Marchi, Zhou (2025), arXiv:2509.08163.
"""

import importlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from steelyard._checks import check_choice, check_count
from steelyard._extras import require
from steelyard.lab import Claim, Form, Lab, prefixed
from steelyard.recipes._fair_dcov_testbed import (
    Array,
    Study,
    cell_means,
    judge,
    real,
    split,
    volume,
    xor,
)
from steelyard.tabular.fairness import MEASURES, Measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REAL = ("compas", "taiwan", "law")
PARTS = ("xor", *REAL, "search")
STRENGTHS = {
    "xor": (20.0,),
    "compas": (5.0, 20.0, 40.0, 100.0),  # 40 is the paper's choice
    "taiwan": (20.0, 100.0, 500.0, 2000.0),  # the dependence is ten times weaker
    "law": (0.2, 1.0, 4.0, 20.0),  # outputs in standard deviations of the grade, not in [0, 1]
}
BOUNDS = (0.2, 0.1, 0.05, 0.01)  # of the reduction: largest differences of acceptance
HEADLINE = {"compas": 20.0, "taiwan": 500.0, "law": 4.0}


@dataclass(frozen=True)
class Config:
    """What is run, and how large."""

    parts: tuple[str, ...] = ("xor", "compas")
    """Which of xor, compas, taiwan, law, search."""
    xor_rows: int = 4000
    """Rows of the simulation, 60 % of them for training."""
    rows: int = 4000
    """Most rows of a real table, drawn anew by each seed; of taiwan twice as many."""
    epochs: int = 50
    """Most epochs of each phase of training."""
    permutations: int = 3
    """How often cells are permuted to see what chance gives."""

    def __post_init__(self) -> None:
        for part in self.parts:
            check_choice("parts", part, PARTS)
        for name in ("epochs", "permutations"):
            check_count(name, getattr(self, name))
        for name in ("xor_rows", "rows"):
            check_count(name, getattr(self, name), at_least=200)


QUICK = Form(Config(), seeds=3, minutes=2, threads=1)
FULL = Form(Config(parts=PARTS), seeds=5, minutes=6, threads=1)

_PAPER = "Lee et al. (2025), arXiv:2509.08163"


def _real_claims(name: str) -> Iterator[Claim]:
    weakest, strongest = (f"{name}/concatenated/{STRENGTHS[name][k]:g}" for k in (0, -1))
    for key, words in (("published", "divergence, bandwidth 0.15,"), ("unfairness", "unfairness")):
        yield Claim(
            f"{name}: the {words} falls from the weakest to the strongest penalty",
            f"{_PAPER}, calibration curve",
            f"{strongest}/{key}",
            f"{weakest}/{key}",
            "lower",
        )
    yield Claim(
        f"{name}: cutting that divergence by 70 % costs at most "
        + ("5 % more squared error" if name == "law" else "0.05 of the AUC"),
        f"{_PAPER}, accuracy against divergence",
        f"{name}/concatenated/cost_of_cut",
        0.05,
        "lower",
    )
    yield Claim(
        f"{name}, control: with a bandwidth relative to the spread of the scores the strongest "
        "penalty lowers the divergence too, so it is not shrinkage alone",
        "metric corrected",
        f"{strongest}/divergence",
        f"{name}/none/divergence",
        "lower",
    )
    yield Claim(
        f"{name}: the frontier of all attributes together dominates more than one by one",
        f"{_PAPER}, against marginal penalties",
        f"{name}/concatenated/volume",
        f"{name}/marginal/volume",
        "higher",
    )


def _reduction_claims(name: str) -> Iterator[Claim]:
    for key, words in (("volume", "scores"), ("age_volume", "scores and age in ten bins")):
        yield Claim(
            f"{name}, linear models, {words}: the frontier dominates more than the reduction's",
            "independence of scores against parity of one decision",
            f"{name}/linear/{key}",
            f"{name}/reduction/{key}",
            "higher",
        )


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "Exclusive or: one by one leaves the gap between cells, to within 0.05",
        f"{_PAPER}, gerrymandering",
        "xor/marginal/20/gap",
        "xor/none/gap",
        "higher",
        -0.05,
    ),
    *(
        Claim(
            f"Exclusive or: {measure} leaves at most half of the gap",
            f"{_PAPER}, gerrymandering",
            f"xor/{measure}/20/gap_share",
            0.5,
            "lower",
        )
        for measure in ("concatenated", "joint")
    ),
    Claim(
        "Exclusive or: the price is real, because the proxy predicts: AUC falls",
        "a proxy of the cells that predicts the outcome",
        "xor/concatenated/20/auc",
        "xor/none/auc",
        "lower",
    ),
    *(claim for name in REAL for claim in _real_claims(name)),
    *(claim for name in ("compas", "taiwan") for claim in _reduction_claims(name)),
    Claim(
        "compas, linear models, decisions at 1/2: the frontier is at most 0.05 below the "
        "reduction's",
        "the reduction's own ground",
        "compas/linear/decision_volume",
        "compas/reduction/decision_volume",
        "higher",
        -0.05,
    ),
)


def run(config: Config, lab: Lab) -> dict[str, float]:
    """Run the chosen parts for one seed."""
    metrics: dict[str, float] = {}
    for part in config.parts:
        if part == "xor":
            metrics |= run_xor(config, lab)
        elif part == "search":
            metrics |= run_search(config, lab)
        else:
            metrics |= run_real(part, config, lab)
    return metrics


# ---- the methods ----------------------------------------------------------------------------

# Chosen in the part search for the model without a penalty.
RATES = {"compas": 3e-3, "taiwan": 3e-3, "law": 3e-3}
LINEAR_RATE = 3e-2
NETWORK, LINEAR = (64, 64), ()


def penalised(
    train: Study,
    test: Study,
    measure: Measure,
    strength: float,
    *,
    hidden: tuple[int, ...] = NETWORK,
    rate: float,
    epochs: int,
    seed: int,
) -> tuple[Array, Array | None]:
    """Scores of the test rows, and the decisions at 1/2 of a classifier."""
    from steelyard.tabular import FairClassifier, FairRegressor

    estimator = FairRegressor if train.regression else FairClassifier
    model = estimator(
        measure=measure,
        strength=strength,
        hidden=hidden,
        learning_rate=rate,
        max_epochs=epochs,
        patience=10,
        random_state=seed,
    )
    model.fit(train.features, train.outcome, sensitive=train.sensitive)
    if train.regression:
        return model.predict(test.features), None
    score = model.predict_proba(test.features)[:, 1]
    return score, (score > 0.5).astype(np.float64)


def reduction(train: Study, test: Study, bound: float) -> tuple[Array, Array]:
    """Scores and acceptance rates of fairlearn's randomised mixture of logistic regressions."""
    reductions = importlib.import_module("fairlearn.reductions")
    linear_model = require("sklearn.linear_model", extra="tabular")
    model = reductions.ExponentiatedGradient(
        linear_model.LogisticRegression(max_iter=1000),
        reductions.DemographicParity(difference_bound=bound),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="fairlearn")  # it assigns in old pandas style
        model.fit(train.features, train.outcome.astype(int), sensitive_features=train.cells)
    score, accepted = np.zeros(len(test.outcome)), np.zeros(len(test.outcome))
    for number, weight in model.weights_.items():
        if weight > 0:
            part = model.predictors_[number]
            chances = part.predict_proba(test.features) @ (part.classes_ == 1).astype(np.float64)
            score += weight * chances
            accepted += weight * part.predict(test.features)
    return score, accepted


# ---- 1. Exclusive or ------------------------------------------------------------------------


def run_xor(config: Config, lab: Lab) -> dict[str, float]:
    """Gap between the four cells under each measure at one strength, and of the reduction."""
    train, test = split(xor(config.xor_rows, lab.seed), config.xor_rows, lab.seed)
    settings: dict[str, Any] = {
        "hidden": LINEAR,
        "rate": LINEAR_RATE,
        "epochs": config.epochs,
        "seed": lab.seed,
    }
    runs: dict[str, Any] = {"none": partial(penalised, train, test, "marginal", 0.0, **settings)}
    for measure in MEASURES:
        runs[f"{measure}/20"] = partial(penalised, train, test, measure, 20.0, **settings)
    if find_spec("fairlearn"):
        runs["reduction"] = partial(reduction, train, test, 0.01)
    metrics = measured("xor", runs, test, config, lab)
    for name in runs:
        share = metrics[f"xor/{name}/gap"] / metrics["xor/none/gap"]
        metrics[f"xor/{name}/gap_share"] = share
    return metrics


# ---- 2. Real tables -------------------------------------------------------------------------


def run_real(name: str, config: Config, lab: Lab) -> dict[str, float]:
    """Train every method at every strength; what each frontier dominates."""
    rows = config.rows * (2 if name == "taiwan" else 1)  # weak dependence needs more
    train, test = split(real(name), rows, lab.seed)
    fit = partial(penalised, train, test, rate=RATES[name], epochs=config.epochs, seed=lab.seed)
    linear = partial(fit, hidden=LINEAR, rate=LINEAR_RATE)
    runs: dict[str, Any] = {"none": partial(fit, "marginal", 0.0)}
    families: dict[str, list[str]] = {}
    for measure in MEASURES:
        for strength in STRENGTHS[name] if measure != "joint" else (HEADLINE[name],):
            label = f"{measure}/{strength:g}"
            families.setdefault(measure, []).append(label)
            runs[label] = partial(fit, measure, strength)
    if not train.regression:
        runs["linear/none"] = partial(linear, "marginal", 0.0)
        for strength in STRENGTHS[name]:
            label = f"linear/{strength:g}"
            families.setdefault("linear", []).append(label)
            runs[label] = partial(linear, "concatenated", strength)
    if not train.regression and find_spec("fairlearn"):
        for bound in BOUNDS:
            label = f"reduction/{bound:g}"
            families.setdefault("reduction", []).append(label)
            runs[label] = partial(reduction, train, test, bound)
    metrics = measured(name, runs, test, config, lab)
    for family, labels in families.items():
        none = _read(metrics, f"{name}/linear/none" if family in SIMPLE else f"{name}/none")
        points = {label: _read(metrics, f"{name}/{label}") for label in labels}
        found = frontier(list(points.values()), none)
        metrics |= prefixed(f"{name}/{family}", found)
        for label, point in points.items():
            share = max(point["published"] / none["published"], 0.0)
            metrics[f"{name}/{label}/share"] = share
    return metrics


SIMPLE = ("linear", "reduction")  # families of linear models
CUT = 0.3  # of the divergence without a penalty


def frontier(points: list[dict[str, float]], none: dict[str, float]) -> dict[str, float]:
    """Areas that a family dominates, and what its first cut of 70 % costs.

    That is AUC lost or the share by which the squared error grows; where no strength cuts as much,
    what a constant costs.
    """
    cuts = [point for point in points if point["published"] <= CUT * none["published"]]
    if "error" in none:
        constant = none["error"] / (1 - none["skill"])  # the variance
        cost = (cuts[0]["error"] if cuts else constant) / none["error"] - 1
    else:
        cost = none["auc"] - (cuts[0]["auc"] if cuts else 0.5)
    found = {"cost_of_cut": cost, "volume": volume(points, none, ("skill", "divergence"))}
    if "age" in none:
        found["age_volume"] = volume(points, none, ("skill", "age"))
    if none.get("decision_skill", 0.0) > 0:
        found["decision_volume"] = volume(points, none, ("decision_skill", "decision"))
    return found


# ---- 3. Search ------------------------------------------------------------------------------


def run_search(config: Config, lab: Lab) -> dict[str, float]:
    """Skill of the model without a penalty at three learning rates, on splits of its own."""
    seed, metrics = lab.seed + 1000, dict[str, float]()
    for name, chosen in {"xor": LINEAR_RATE, **RATES}.items():
        rows = config.xor_rows if name == "xor" else config.rows
        train, test = split(xor(rows, seed) if name == "xor" else real(name), rows, seed)
        fit = partial(penalised, train, test, "marginal", 0.0, epochs=config.epochs, seed=seed)
        hidden = LINEAR if name == "xor" else NETWORK
        rates = (chosen / 3, chosen, chosen * 3)
        runs = {f"rate={rate:.0e}": partial(fit, rate=rate, hidden=hidden) for rate in rates}
        metrics |= measured(f"search/{name}", runs, test, config, lab)
    return metrics


# ---- shared by the parts --------------------------------------------------------------------


def measured(
    part: str, runs: dict[str, Any], test: Study, config: Config, lab: Lab
) -> dict[str, float]:
    """Run each method once and judge its scores; means of large cells where they are drawn."""
    metrics: dict[str, float] = {}
    for label, method in runs.items():

        def study(label: str = label, method: Any = method) -> dict[str, float]:
            score, accepted = method()
            found = judge(test, score, accepted, config.permutations)
            if label in ("none", f"concatenated/{HEADLINE.get(part, 20.0):g}"):
                found |= cell_means(score, test.cells)
            return found

        found = lab.compute(f"{part}/{label}", study)
        metrics |= prefixed(f"{part}/{label}", found)
    return metrics


def _read(metrics: dict[str, float], where: str) -> dict[str, float]:
    return {
        key.removeprefix(f"{where}/"): value
        for key, value in metrics.items()
        if key.startswith(f"{where}/")
    }


def figures(result: dict[str, Any]) -> "dict[str, Figure]":
    """Frontiers of each table, and means of the cells with and without the penalty."""
    from steelyard.lab.interval_plots import draw_frontiers, draw_intervals, seed_rows

    seeds, parts = list(result["metrics"].values()), result["config"]["parts"]
    drawn: dict[str, Figure] = {}
    panels = {name: _curves(name, seeds) for name in REAL if name in parts}
    if panels:
        drawn["frontier"] = draw_frontiers(
            panels,
            "skill (2 AUC - 1, or R squared)",
            "divergence between cells (bits, above chance)",
            "What fairness costs: right is more skilful, down is fairer",
            "Lines go from no penalty to the strongest. Bars: 95 % over seeds, or their range.",
        )
    for name in (part for part in parts if part != "search"):
        first = _read(seeds[0], f"{name}/none")
        names = [key for key in first if key.startswith("cell/")]
        names = [key for key in names if all(f"{name}/none/{key}" in seed for seed in seeds)]
        if not names:
            continue
        strength = f"{HEADLINE.get(name, 20.0):g}"
        methods = {"no penalty": "none", "all attributes": f"concatenated/{strength}"}
        rows: dict[str, dict[str, Any]] = {}
        for words, method in methods.items():
            cases = {key.removeprefix("cell/"): f"{name}/{method}/cell" for key in names}
            for label, case in cases.items():
                found = seed_rows(seeds, {label: case}, [label])[label]
                rows.setdefault(label, {})[words] = found[label]
        drawn[f"{name} cells"] = draw_intervals(
            rows,
            "mean score",
            f"{name}: means of the cells without and with the penalty (strength {strength})",
            "Dots: interquartile mean over seeds; bars: 95 % interval, or their range.",
        )
    return drawn


def _curves(name: str, seeds: list[dict[str, float]]) -> dict[str, list[Any]]:
    from steelyard.lab.interval_plots import seed_rows

    curves: dict[str, list[Any]] = {}
    for method in (*MEASURES, "linear", "reduction"):
        none = "linear/none" if method in SIMPLE else "none"
        places = BOUNDS if method == "reduction" else STRENGTHS[name]
        labels = [f"{method}/{place:g}" for place in places]
        there = [label for label in labels if f"{name}/{label}/skill" in seeds[0]]
        if there:
            cases = {label: f"{name}/{label}" for label in (none, *there)}
            points = seed_rows(seeds, cases, ("skill", "divergence")).values()
            curves[method] = [(point["skill"], point["divergence"]) for point in points]
    return curves
