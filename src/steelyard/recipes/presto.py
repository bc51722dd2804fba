"""PRESTO: do common steps help to predict a rare last one?

Four or six ordered classes, the last one rare. A logistic regression of the last class sees its few
rows only; proportional odds lets all rows speak and gives all steps one slope; PRESTO ties the
slopes of neighbouring steps.

simulation  the paper's designs, sparse and dense changes of the slopes: squared error of the rare
            probability, and which of the changes at the last step are found.
path        one sparse sample of ten times the rows: the changes at the last step along the penalty,
            beside the truth.
soup        1,847 tastings in six levels, the paper's own data: log loss, squared error and
            calibration of the rarer end on rows left out.
rare        soup and a survey on poverty with the last class of the training rows thinned to 1 or 2
            percent; the test rows stay whole, and the odds are corrected for the thinning.

Nothing is tuned by hand: PRESTO and the lasso logistic regression, which is the control for
shrinkage without borrowing, choose among 20 penalties by the same five folds. The splits of real
data share rows, so their intervals over seeds are too narrow.

Source: Faletto, Bien (2023), arXiv:2305.18700.
"""

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit, logit

from steelyard._checks import check_choice, check_count, check_range
from steelyard.classification import presto_path
from steelyard.lab import Claim, Form, Lab, data, prefixed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
Labels = NDArray[np.int64]

PARTS = ("simulation", "path", "soup", "rare")
BASELINES = ("logistic", "logistic lasso", "po")
METHODS = (*BASELINES, "presto", "presto free base", "presto ridge", "presto rare loss")
TABLES = ("soup", "survey")
FEATURES = 10
PENALTIES = 12  # of the drawn path
CHOICES, FOLDS = 20, 5  # penalties that are tried, as published
PATH_ROWS = 10  # times the rows of a sample, so that truth and noise can be told apart


class Design(NamedTuple):
    """A law of the slopes, and the intercepts of the three boundaries."""

    share: float | None  # slopes and changes are +-0.5 with this chance; None = uniform
    intercepts: tuple[float, ...]


DESIGNS = {
    "sparse 0,3,5": Design(1 / 2, (0.0, 3.0, 5.0)),
    "sparse 0,4,6": Design(1 / 2, (0.0, 4.0, 6.0)),
    "dense 0,3,5": Design(None, (0.0, 3.0, 5.0)),
    "sparse 0,3.5,5.5": Design(1 / 2, (0.0, 3.5, 5.5)),
    "sparser 0,4,6": Design(1 / 3, (0.0, 4.0, 6.0)),
    "dense 0,2.5,4.5": Design(None, (0.0, 2.5, 4.5)),
}


@dataclass(frozen=True)
class Config:
    """What is run, and how large."""

    parts: tuple[str, ...] = PARTS
    """Which of simulation, path, soup, rare."""
    designs: tuple[str, ...] = ("sparse 0,3,5", "sparse 0,4,6", "dense 0,3,5")
    """Simulated designs: law of the slopes and intercepts."""
    methods: tuple[str, ...] = METHODS[:5]
    """What is compared."""
    repetitions: int = 5
    """Simulated samples a seed and design."""
    rows: int = 2500
    """Rows of a simulated sample."""
    splits: int = 3
    """Random splits of each real table a seed."""
    shares: tuple[float, ...] = (0.02,)
    """Share of the last class in the thinned training rows."""

    def __post_init__(self) -> None:
        choices = {"parts": PARTS, "designs": tuple(DESIGNS), "methods": METHODS}
        for name, known in choices.items():
            for chosen in getattr(self, name):
                check_choice(name, chosen, known)
        if missing := {"logistic", "presto"} - set(self.methods):
            raise ValueError(f"methods must hold {' and '.join(sorted(missing))}")
        for name in ("repetitions", "splits"):
            check_count(name, getattr(self, name))
        check_count("rows", self.rows, at_least=500)
        for share in self.shares:
            check_range("shares", share, above=0.0, below=0.1)


QUICK = Form(Config(), seeds=5, minutes=2, threads=1)
FULL = Form(Config(designs=tuple(DESIGNS), methods=METHODS, shares=(0.01, 0.02)), 8, 6, threads=1)

_PAPER = "Faletto, Bien (2023), arXiv:2305.18700"


def _simulation_claims() -> Iterator[Claim]:
    words = {
        "logistic": "logistic regression",
        "po": "proportional odds",
        "logistic lasso": "the control for shrinkage alone, a lasso logistic regression",
    }
    for design in tuple(DESIGNS)[:3]:
        for baseline, name in words.items():
            yield Claim(
                f"Simulated, {design}: PRESTO's squared error of the rare probability is below "
                f"that of {name} (geometric means)",
                f"{_PAPER}, Section 4" if baseline != "logistic lasso" else "equal tuning",
                f"simulation/{design}/presto/log_mse",
                f"simulation/{design}/{baseline}/log_mse",
                "lower",
            )
    for baseline, share in (("logistic", 0.6), ("po", 0.8)):
        yield Claim(
            f"Simulated, all designs: PRESTO is closer than {words[baseline]} in {100 * share:g} % "
            "of the samples or more",
            f"{_PAPER}, Section 4; the share is that of a replication",
            f"simulation/wins over {baseline}",
            share,
            "higher",
        )
    yield Claim(
        "Simulated, sparse 0,3,5: true changes of the last slopes are kept more often than false",
        f"{_PAPER}, sparse differences",
        "simulation/sparse 0,3,5/presto/kept_true",
        "simulation/sparse 0,3,5/presto/kept_false",
        "higher",
    )


def _data_claims() -> Iterator[Claim]:
    for score, baseline in (
        ("log loss", "logistic"),
        ("log loss", "po"),
        ("calibration error (sorted bins)", "logistic"),
    ):
        key = "calibration" if score.startswith("calibration") else "log_loss"
        yield Claim(
            f"Soup: PRESTO's {score} of the rarer end is below that of {baseline}",
            f"{_PAPER}, soup data",
            f"soup/presto/{key}",
            f"soup/{baseline}/{key}",
            "lower",
        )
    for table in TABLES:
        for baseline in BASELINES:
            yield Claim(
                f"{table.capitalize()}, last class thinned to 2 %: PRESTO's log loss is below that "
                f"of {baseline}",
                "rare rows on real data",
                f"rare/{table} 2 %/presto/log_loss",
                f"rare/{table} 2 %/{baseline}/log_loss",
                "lower",
            )


CLAIMS: tuple[Claim, ...] = (*_simulation_claims(), *_data_claims())


def run(config: Config, lab: Lab) -> dict[str, float]:
    """Run the chosen parts for one seed."""
    parts: dict[str, Callable[[Config, Lab], dict[str, float]]] = {
        "simulation": run_simulation,
        "path": run_path,
        "soup": run_soup,
        "rare": run_rare,
    }
    metrics: dict[str, float] = {}
    for part in config.parts:
        metrics |= parts[part](config, lab)
    return metrics


# ---- the methods ----------------------------------------------------------------------------

BARELY = 1e-6  # keeps a logistic regression finite where the few rare rows are separated
ALL = 1e3  # a penalty under which no slope changes


def fit(method: str, X: Array, y: Labels) -> Any:
    """Fit a method; the last column of its ``predict_proba`` is the rare class."""
    from steelyard.classification import PrestoClassifier, PrestoClassifierCV

    chosen = partial(PrestoClassifierCV, n_lambdas=CHOICES, cv=FOLDS)
    models: dict[str, Callable[[], Any]] = {
        "logistic": lambda: PrestoClassifier(BARELY, l1_ratio=0.0),
        "logistic lasso": chosen,
        "po": lambda: PrestoClassifier(ALL, penalize_base=False),
        "presto": chosen,
        "presto free base": lambda: chosen(penalize_base=False),
        "presto ridge": lambda: chosen(l1_ratio=0.0),
        "presto rare loss": lambda: chosen(scoring="rare_log_loss"),
    }
    last = y.max()
    return models[method]().fit(
        X, (y == last).astype(np.int64) if method.startswith("logistic") else y
    )


def rare_probability(model: Any, X: Array) -> Array:
    """Return the probability of the last class; crossing boundaries are put in order."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="boundaries cross")
        return np.asarray(model.predict_proba(X)[:, -1])


# ---- 1. Simulation --------------------------------------------------------------------------


class Sample(NamedTuple):
    """Rows, classes, true slopes ``[p, 3]`` and true probability of the last class."""

    X: Array
    y: Labels
    slopes: Array
    rare: Array


def draw_slopes(design: Design, generator: np.random.Generator) -> Array:
    """Draw the slopes of the first boundary, then the changes to the next two."""
    shape = (FEATURES, len(design.intercepts))
    if design.share is None:
        return np.cumsum(generator.uniform(-0.5, 0.5, shape), axis=1)
    steps = 0.5 * generator.choice([-1.0, 1.0], shape)
    steps[:, 0] = 0.5
    return np.cumsum(steps * (generator.random(shape) < design.share), axis=1)


def draw_sample(design: Design, rows: int, generator: np.random.Generator) -> Sample:
    """Draw until no boundaries cross and every class has five rows."""
    while True:
        slopes = draw_slopes(design, generator)
        X = generator.uniform(-1.0, 1.0, (rows, FEATURES))
        eta = np.array(design.intercepts) + X @ slopes
        y = (generator.random((rows, 1)) > expit(eta)).sum(1)
        counts = np.bincount(y, minlength=len(design.intercepts) + 1)
        if (np.diff(eta, axis=1) > 0).all() and counts.min() >= 5:
            return Sample(X, y.astype(np.int64), slopes, expit(-eta[:, -1]))


def run_simulation(config: Config, lab: Lab) -> dict[str, float]:
    """Fit every method to the same samples of each design."""
    metrics: dict[str, float] = {}
    for design in config.designs:
        name = f"simulation/{design}"
        values = lab.compute(name, partial(simulate, config, design, lab.seed))
        metrics |= prefixed(name, values)
    for method in (name for name in config.methods if name != "presto"):
        won = [metrics[f"simulation/{d}/{method}/worse_than_presto"] for d in config.designs]
        metrics[f"simulation/wins over {method}"] = float(np.mean(won))
    return metrics


def simulate(config: Config, design: str, seed: int) -> dict[str, float]:
    """Squared error on the rows of the sample, as in the paper, for each method."""
    place = list(DESIGNS).index(design)
    errors: dict[str, list[float]] = {method: [] for method in config.methods}
    shares, crossed, kept = [], [], np.zeros((2, 2))  # kept: [true or false, kept or all]
    for repetition in range(config.repetitions):
        generator = np.random.default_rng([seed, place, repetition])
        sample = draw_sample(DESIGNS[design], config.rows, generator)
        shares.append(sample.rare.mean())
        for method in config.methods:
            model = fit(method, sample.X, sample.y)
            error = rare_probability(model, sample.X) - sample.rare
            errors[method].append(np.square(error).mean())
            if method == "presto":
                crossed.append(model.crossing_share(sample.X))
                kept += found_changes(model.coef_, sample.slopes)
    values: dict[str, float] = {}
    for method, found in errors.items():
        values[f"{method}/mse"] = float(np.mean(found))
        values[f"{method}/log_mse"] = float(np.log(found).mean())
        worse = np.greater(found, errors["presto"])
        values[f"{method}/worse_than_presto"] = float(worse.mean())
    values["presto/crossed"] = float(np.mean(crossed))
    for name, (count, total) in zip(("kept_true", "kept_false"), kept, strict=True):
        if total > 0:
            values[f"presto/{name}"] = count / total
    return values | {"sample/rare_share": float(np.mean(shares))}


def found_changes(coef: Array, slopes: Array) -> Array:
    """Count the changes at the last boundary: kept and all, of the true and of the false."""
    found, true = (np.abs(np.diff(s[:, -2:], axis=1)[:, 0]) > 1e-9 for s in (coef, slopes))
    return np.array([[(found & true).sum(), true.sum()], [(found & ~true).sum(), (~true).sum()]])


# ---- 2. Path --------------------------------------------------------------------------------


def run_path(config: Config, lab: Lab) -> dict[str, float]:
    """Follow the changes at the last boundary along the penalty, on one sparse sample."""

    def study() -> dict[str, float]:
        generator = np.random.default_rng([lab.seed, len(DESIGNS)])
        sample = draw_sample(DESIGNS["sparse 0,3,5"], PATH_ROWS * config.rows, generator)
        X, y = torch.from_numpy(sample.X), torch.from_numpy(sample.y)
        path = presto_path(X, y, n_lambdas=PENALTIES, penalize_base=False)
        changes = (path.coef[:, :, -1] - path.coef[:, :, -2]).numpy()
        truth = sample.slopes[:, -1] - sample.slopes[:, -2]
        values = {f"truth/x{j}": float(value) for j, value in enumerate(truth)}
        for place, (penalty, row) in enumerate(zip(path.lambdas.tolist(), changes, strict=True)):
            values[f"{place:02d}/penalty"] = penalty
            values |= {f"{place:02d}/x{j}": float(value) for j, value in enumerate(row)}
        return values

    return prefixed("path", lab.compute("path", study))


# ---- 3. Soup, 4. rare rows ------------------------------------------------------------------


def dummies(column: NDArray[Any]) -> Array:
    """Return a column of 0 and 1 for each level but the commonest."""
    levels, counts = np.unique(column.astype(str), return_counts=True)
    others = np.delete(levels, counts.argmax())
    return np.asarray(column.astype(str)[:, None] == others, dtype=np.float64)


def load(table: str) -> tuple[Array, Labels]:
    """Return features and classes, the last class the rarer end."""
    if table == "soup":
        columns = data.soup()
        y = 6 - columns.pop("sure").astype(np.int64)  # "sure that not" last
        return np.concatenate([dummies(column) for column in columns.values()], axis=1), y
    columns = data.poverty_survey()
    y = columns.pop("too_much").astype(np.int64)
    country = dummies(columns.pop("country"))
    person = np.stack([c.astype(np.float64) for c in columns.values()], axis=1)
    both = person[:, :, None] * country[:, None, :]  # what a person's traits do by country
    return np.concatenate([person, country, both.reshape(len(y), -1)], axis=1), y


def split(y: Labels, share: float, generator: np.random.Generator) -> tuple[Labels, Labels]:
    """Return shuffled training and test rows, ``share`` of every class in the test."""
    train, test = [], []
    for label in np.unique(y):
        rows = generator.permutation(np.flatnonzero(y == label))
        cut = round(share * len(rows))
        test.append(rows[:cut])
        train.append(rows[cut:])
    return generator.permutation(np.concatenate(train)), generator.permutation(np.concatenate(test))


def thin(
    y: Labels, rows: Labels, share: float, generator: np.random.Generator
) -> tuple[Labels, float]:
    """Leave out rows of the last class until it has ``share``; return rows and the part kept."""
    last = y[rows] == y.max()
    wanted = round(share / (1 - share) * (~last).sum())
    kept = generator.permutation(rows[last])[:wanted]
    return generator.permutation(np.concatenate([rows[~last], kept])), len(kept) / last.sum()


def scores(rare: Array, outcome: NDArray[np.bool_]) -> dict[str, float]:
    """Log loss, squared error, calibration and the area under the ROC curve."""
    inside = np.clip(rare, 1e-12, 1 - 1e-12)
    losses = -np.where(outcome, np.log(inside), np.log1p(-inside))
    order = rare[:, None] - rare[None, :]
    pairs = order[outcome][:, ~outcome]
    return {
        "log_loss": float(losses.mean()),
        "squared_error": float(np.square(rare - outcome).mean()),
        "calibration": calibration_error(rare, outcome),
        "auc": float((pairs > 0).mean() + (pairs == 0).mean() / 2),
    }


def calibration_error(rare: Array, outcome: NDArray[np.bool_]) -> float:
    """Squared gap between mean prediction and share, over bins of equal size.

    Bins hold neighbours in the *sorted* predictions; the released code sorts and then reads the
    unsorted vector.
    """
    order = np.argsort(rare, kind="stable")
    bins = np.array_split(order, max(round(len(rare) / 100), 10))
    return float(np.mean([(rare[rows].mean() - outcome[rows].mean()) ** 2 for rows in bins]))


def run_soup(config: Config, lab: Lab) -> dict[str, float]:
    """Nine tenths of the rows against the last tenth, each class split alike."""
    study = partial(held_out, config, "soup", 0.1, None, lab.seed)
    return prefixed("soup", lab.compute("soup", study))


def run_rare(config: Config, lab: Lab) -> dict[str, float]:
    """Thin the last class of the training rows; test on a whole fifth."""
    metrics: dict[str, float] = {}
    for table, share in itertools.product(TABLES, config.shares):
        study = partial(held_out, config, table, 0.2, share, lab.seed)
        values = lab.compute(f"rare/{table} {100 * share:g} percent", study)
        metrics |= prefixed(f"rare/{table} {100 * share:g} %", values)
    return metrics


def held_out(
    config: Config, table: str, test_share: float, rare_share: float | None, seed: int
) -> dict[str, float]:
    """Fit all methods on training rows and score them on test rows; means over splits."""
    X, y = load(table)
    found: dict[str, list[float]] = {}
    for number in range(config.splits):
        generator = np.random.default_rng([seed, number])
        train, test = split(y, test_share, generator)
        part_kept = 1.0
        if rare_share is not None:
            train, part_kept = thin(y, train, rare_share, generator)
        for method in config.methods:
            rare = rare_probability(fit(method, X[train], y[train]), X[test])
            rare = expit(logit(rare) - np.log(part_kept))  # thinning multiplied the odds by it
            for key, value in prefixed(method, scores(rare, y[test] == y.max())).items():
                found.setdefault(key, []).append(value)
    return {key: float(np.mean(values)) for key, values in found.items()}


# ---- figures --------------------------------------------------------------------------------


def figures(result: dict[str, Any]) -> "dict[str, Figure]":
    """Errors relative to logistic regression, losses on real data, and the coefficient path."""
    from steelyard.lab.interval_plots import Interval, draw_intervals

    config, drawn = result["config"], {}
    if "simulation" in config["parts"]:
        gaps = _against_logistic(result, [f"simulation/{d}" for d in config["designs"]], "log_mse")
        drawn["errors"] = draw_intervals(
            {d: {m: Interval(*np.exp(v)) for m, v in row.items()} for d, row in gaps.items()},
            "squared error of the rare probability, logistic regression = 1",
            "What borrowing from common steps is worth, simulated",
            "Geometric means over samples; interquartile mean and interval over seeds.",
            reference=1.0,
        )
    if "path" in config["parts"]:
        drawn["path"] = _draw_path(next(iter(result["metrics"].values())))
    tables = [f"rare/{t} {100 * s:g} %" for t in TABLES for s in config["shares"]]
    cases = ["soup"] * ("soup" in config["parts"]) + tables * ("rare" in config["parts"])
    if cases:
        drawn["losses"] = draw_intervals(
            _against_logistic(result, cases, "log_loss"),
            "log loss of the last class minus that of logistic regression (nats)",
            "On real data, rows left out",
            "Interquartile mean and interval over seeds, whose splits share rows.",
            reference=0.0,
        )
    return drawn


def _against_logistic(result: dict[str, Any], cases: list[str], key: str) -> dict[str, Any]:
    """Metric of each case and method minus that of logistic regression, over seeds."""
    from steelyard.lab.interval_plots import over_seeds

    def gap(case: str, method: str) -> list[float]:
        seeds = result["metrics"].values()
        return [m[f"{case}/{method}/{key}"] - m[f"{case}/logistic/{key}"] for m in seeds]

    methods = [method for method in result["config"]["methods"] if method != "logistic"]
    return {
        case.rsplit("/", 1)[-1]: {m: over_seeds(gap(case, m)) for m in methods} for case in cases
    }


def _draw_path(metrics: dict[str, float]) -> "Figure":
    from steelyard.lab.line_plots import draw_paths

    names = {0.0: "no change", 0.5: "+0.5", -0.5: "-0.5"}
    lines: dict[str, list[list[float]]] = {name: [] for name in names.values()}
    for feature in range(FEATURES):
        truth = names[metrics[f"path/truth/x{feature}"]]
        lines[truth].append([metrics[f"path/{k:02d}/x{feature}"] for k in range(PENALTIES)])
    return draw_paths(
        [metrics[f"path/{k:02d}/penalty"] for k in range(PENALTIES)],
        lines,
        "penalty, falling",
        "change of the slope at the last step",
        "Coefficient path of one sparse sample, by the true change",
        faint="no change",
    )
