"""Information projection: does the expansion tell how many rows a model needs?

A fit of n rows is, on average, a divergence of c1/n + c2/n^2 away from the best member of its
model, also when the model is wrong. Each part compares that formula with what fits do.

exact       exponential and normal models with true and wrong laws, 10 to 200 rows: measured risk
            against c1/n, c1/n + c2/n^2, and p/(2n), which believes in the model.
wine        1,599 red wines are the population: a pairwise model of the traits above their median
            (5, 8 or 11 of them) and a normal law of all eleven. Samples of 50 to 1,600 rows:
            measured risk and measured Bayes error against the formula and its decision.
choice      AIC, TIC and BIC choose among nested models of five wine traits and of the seven
            measurements of 4,174 abalones: how often does their choice fail the criterion? And how
            well is the risk estimated from the sample alone, by the formula and by the bootstrap?
sampler     the cumulants from a Gibbs sampler, without a normaliser, against enumeration.

On finitely many points a sample can leave a fit without a finite answer; such samples are counted
and left out, as the expansion does. Seeds differ in the samples only: the wines are the population.

Source: Sheena (2021), arXiv:2105.08947; expansion and threshold as derived in the documentation.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from steelyard._checks import check_choice, check_count, check_range
from steelyard.estimation import (
    RiskExpansion,
    bayes_error_risk,
    information_projection,
    minimum_sample_size,
    pairwise_binary_family,
    risk_expansion,
    risk_from_cumulants,
    tic_penalty,
)
from steelyard.lab import Claim, Form, Lab, data, prefixed
from steelyard.recipes._information_projection_testbed import (
    LAWS,
    TABLES,
    TRAITS,
    WINE_MODELS,
    WRONG_LAWS,
    AnyFamily,
    Array,
    above_median,
    cumulants,
    expansion_of,
    fitted,
    gap_from,
    gibbs,
    losses_of,
    nested_models,
    sample,
    wine_model,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("exact", "wine", "choice", "sampler")
EXACT_SIZES = (10, 15, 20, 30, 50, 100, 200)
RULES = ("AIC", "TIC", "BIC", "criterion")
GIBBS = (1_000, 10_000, 100_000)


@dataclass(frozen=True)
class Config:
    """What is run, and how large."""

    parts: tuple[str, ...] = PARTS
    """Which of exact, wine, choice, sampler."""
    samples: int = 50_000
    """Simulated samples for each size in part exact."""
    models: tuple[str, ...] = ("pairs of 5", "pairs of 8", "normal")
    """Models of the wines."""
    sizes: tuple[int, ...] = (50, 100, 200, 400, 800, 1600)
    """Sample sizes, beside the smallest that the criterion accepts."""
    draws: int = 60
    """Samples of each size."""
    choices: int = 10
    """Samples of each size in part choice."""
    bootstrap: int = 10
    """Resamples of each of them."""
    epsilon: float = 0.05
    """How much a test between fit and best member may beat a coin."""

    def __post_init__(self) -> None:
        for part in self.parts:
            check_choice("parts", part, PARTS)
        for model in self.models:
            check_choice("models", model, WINE_MODELS)
        for name in ("samples", "draws", "choices", "bootstrap"):
            check_count(name, getattr(self, name), at_least=2)
        for size in self.sizes:
            check_count("sizes", size, at_least=20)
        check_range("epsilon", self.epsilon, above=0.0, below=0.5)


QUICK = Form(Config(), seeds=5, minutes=1, threads=1)
FULL = Form(Config(models=WINE_MODELS, draws=120, choices=24, bootstrap=15), 8, 5, threads=1)

_PAPER = "Sheena (2021), arXiv:2105.08947"


def _exact_claims() -> Iterator[Claim]:
    for law in LAWS:
        yield Claim(
            f"{law.capitalize()}, 15 to 200 rows: c1/n + c2/n^2 misses the risk by less than c1/n",
            f"{_PAPER}, second order",
            metric=f"exact/{law}/second_error",
            baseline=f"exact/{law}/first_error",
            direction="lower",
        )
    for law in WRONG_LAWS:
        yield Claim(
            f"{law.capitalize()}: p/(2n), which believes in the model, misses it by more than c1/n",
            f"{_PAPER}, models that are wrong",
            metric=f"exact/{law}/aic_error",
            baseline=f"exact/{law}/first_error",
            direction="higher",
        )


def _wine_claims() -> Iterator[Claim]:
    yield Claim(
        "Wine, pairs of 5, 100 to 1,600 rows: c1/n + c2/n^2 misses the risk by 5 % on average or "
        "less",
        f"{_PAPER}, second order",
        metric="wine/pairs of 5/summary/second_error",
        baseline=0.05,
        direction="lower",
    )
    yield Claim(
        "Wine, pairs of 5, 100 rows: c1/n misses the measured risk by more",
        f"{_PAPER}, second order",
        metric="wine/pairs of 5/n=100/first_error",
        baseline="wine/pairs of 5/n=100/second_error",
        direction="higher",
    )
    yield Claim(
        "Wine, normal law, 1,600 rows: p/(2n) misses the measured risk by more than c1/n",
        f"{_PAPER}, models that are wrong",
        metric="wine/normal/n=1600/aic_error",
        baseline="wine/normal/n=1600/first_error",
        direction="higher",
    )
    for model in WINE_MODELS:
        yield Claim(
            f"Wine, {model}: every accepted size keeps the measured mean of 1/2 - Bayes error "
            "within epsilon = 0.05",
            f"{_PAPER}; threshold derived",
            metric=f"wine/{model}/summary/worst_accepted_gap",
            baseline=0.05,
            direction="lower",
        )
        yield Claim(
            f"Wine, {model}: the rule is safe, not sharp: the measured mean is below the bound "
            "sqrt(risk / 8) at every size from 100 rows on",
            f"{_PAPER}; threshold derived",
            metric=f"wine/{model}/summary/smallest_slack",
            baseline=0.0,
            direction="higher",
        )


def _choice_claims() -> Iterator[Claim]:
    for table, size in (("wine", 200), ("abalone", 400)):
        yield Claim(
            f"{table.capitalize()}, {size} rows: in most samples TIC chooses a model that fails "
            "the criterion",
            f"{_PAPER}: choosing a model is another question",
            f"choice/{table}/n={size}/TIC_fails",
            0.5,
            "higher",
        )
    yield Claim(
        "Wine pairs, 200 rows, from the sample alone: c1/n + c2/n^2 is closer than the bootstrap",
        "root mean squared errors",
        "choice/wine/n=200/plug_in_error",
        "choice/wine/n=200/bootstrap_error",
        "lower",
    )
    yield Claim(
        "Cumulants of 100,000 Gibbs draws give the risk at 100 rows within 5 %",
        f"{_PAPER}, no normaliser needed",
        "sampler/100000 draws/risk_error",
        0.05,
        "lower",
    )


CLAIMS: tuple[Claim, ...] = (*_exact_claims(), *_wine_claims(), *_choice_claims())


def run(config: Config, lab: Lab) -> dict[str, float]:
    """Run the chosen parts for one seed."""
    parts: dict[str, Callable[[Config, Lab], dict[str, float]]] = {
        "exact": run_exact,
        "wine": run_wine,
        "choice": run_choice,
        "sampler": run_sampler,
    }
    metrics: dict[str, float] = {}
    for part in config.parts:
        metrics |= parts[part](config, lab)
    return metrics


# ---- 1. Exact families ----------------------------------------------------------------------


def run_exact(config: Config, lab: Lab) -> dict[str, float]:
    """Simulate the loss of the fit; everything has a closed form but its mean."""
    metrics: dict[str, float] = {}
    for place, law in enumerate(LAWS):

        def study(place: int = place, law: str = law) -> dict[str, float]:
            generator = np.random.default_rng([lab.seed, place])
            c1, c2 = (float(c) for c in expansion_of(law))
            p = 1 if law.startswith("exponential") else 2
            values: dict[str, float] = {}
            errors: list[list[float]] = []
            for n in EXACT_SIZES:
                measured = float(losses_of(law, n, config.samples, generator).mean())
                found = compare(measured, c1, c2, p, n)
                values |= prefixed(f"n={n}", found)
                if n >= 15:
                    errors.append([found[f"{kind}_error"] for kind in ("first", "second", "aic")])
            first, second, aic = np.mean(errors, axis=0)
            return values | {"c1": c1, "c2": c2} | _errors(first, second, aic)

        metrics |= prefixed(f"exact/{law}", lab.compute(f"exact/{law}", study))
    return metrics


def compare(measured: float, c1: float, c2: float, p: int, n: int) -> dict[str, float]:
    """Return the three formulas and how far each is from the measured risk, as a share."""
    formulas = {"first": c1 / n, "second": c1 / n + c2 / n**2, "aic": p / (2 * n)}
    errors = _errors(*(abs(value / measured - 1) for value in formulas.values()))
    return {"measured": measured} | formulas | errors


def _errors(first: float, second: float, aic: float) -> dict[str, float]:
    errors = {"first": first, "second": second, "aic": aic}
    return {f"{name}_error": float(error) for name, error in errors.items()}


# ---- 2. Wine: what samples of a known population do -----------------------------------------


def run_wine(config: Config, lab: Lab) -> dict[str, float]:
    """Fit samples of each size; compare risk and Bayes error with the formula."""
    metrics: dict[str, float] = {}
    for model in config.models:

        def study(model: str = model) -> dict[str, float]:
            generator = np.random.default_rng([lab.seed, WINE_MODELS.index(model)])
            return measure(*wine_model(model), config, generator)

        metrics |= prefixed(f"wine/{model}", lab.compute(f"wine/{model}", study))
    return metrics


def measure(
    family: AnyFamily, truth: Tensor, config: Config, generator: np.random.Generator
) -> dict[str, float]:
    """Measure risk and Bayes error at each size and at the smallest that is accepted."""
    best = information_projection(family, truth).theta
    c1, c2 = (float(c) for c in risk_expansion(family, truth))
    smallest = minimum_sample_size(c1, c2, config.epsilon)
    gap_to = gap_from(family, best, generator)
    found: dict[int, dict[str, float]] = {}
    for n in (*config.sizes, smallest):
        fits = [fitted(family, sample(truth, n, generator)) for _ in range(config.draws)]
        good = [theta for theta in fits if theta is not None]
        if len(good) < 2:
            continue
        risk = float(np.mean([float(family.kl(best, theta)) for theta in good]))
        row = compare(risk, c1, c2, family.size, n)
        row["gap"] = float(np.mean([gap_to(theta) for theta in good]))
        row["bound"] = math.sqrt(max(row["second"], 0.0) / 8)
        row["accepted"] = float(row["second"] <= bayes_error_risk(config.epsilon) * (1 + 1e-9))
        row["without_fit"] = 1 - len(good) / config.draws
        found[n] = row
    summary = {"c1": c1, "c2": c2, "parameters": family.size, "minimum_n": smallest}
    accepted = [row["gap"] for row in found.values() if row["accepted"]]
    later = [row for n, row in found.items() if n >= 100]
    summary["worst_accepted_gap"] = max(accepted)
    summary["smallest_slack"] = min(row["bound"] - row["gap"] for row in later)
    summary["second_error"] = float(np.mean([row["second_error"] for row in later]))
    values = prefixed("summary", summary) | prefixed("at minimum", found[smallest])
    for n in config.sizes:
        values |= prefixed(f"n={n}", found.get(n, {}))
    return values


# ---- 3. Choice: which model, and is it estimated well enough? --------------------------------


def run_choice(config: Config, lab: Lab) -> dict[str, float]:
    """Let each rule choose, on the same samples."""
    metrics: dict[str, float] = {}
    for place, table in enumerate(TABLES):

        def study(place: int = place, table: str = table) -> dict[str, float]:
            models, truth = nested_models(table)
            values: dict[str, float] = {}
            for name, family in models.items():
                c1, c2 = risk_expansion(family, truth)
                values[f"{name}/minimum_n"] = minimum_sample_size(c1, c2, config.epsilon)
            for n in config.sizes[1:]:
                generator = np.random.default_rng([lab.seed, 100 + place, n])
                values |= prefixed(f"n={n}", choose(models, truth, n, config, generator))
            return values

        metrics |= prefixed(f"choice/{table}", lab.compute(f"choice/{table}", study))
    return metrics


def choose(
    models: dict[str, AnyFamily],
    truth: Tensor,
    n: int,
    config: Config,
    generator: np.random.Generator,
) -> dict[str, float]:
    """Choose among models on samples of ``n`` rows; estimate the risk of the middle one.

    A choice fails if the true expansion of the chosen model is above the threshold.
    """
    threshold = bayes_error_risk(config.epsilon)
    names = list(models)
    middle = models[names[1]]
    best = information_projection(middle, truth).theta
    true_risk = {name: _risk(risk_expansion(models[name], truth), n) for name in names}
    failed: dict[str, list[float]] = {rule: [] for rule in RULES}
    size: dict[str, list[float]] = {rule: [] for rule in RULES}
    losses, estimates = [], []
    for _ in range(config.choices):
        found = sample(truth, n, generator)
        fits = {name: fitted(models[name], found) for name in names}
        there = {name: theta for name, theta in fits.items() if theta is not None}
        if not there:
            continue
        for rule, name in chosen_by_rules(models, there, found, n, threshold).items():
            failed[rule].append(float(true_risk[name] > threshold))
            size[rule].append(models[name].size)
        if (theta := fits[names[1]]) is not None:
            losses.append(float(middle.kl(best, theta)))
            estimates.append(estimated_risks(middle, theta, found, n, config, generator))
    values = {f"{rule}_fails": float(np.mean(failed[rule])) for rule in RULES if failed[rule]}
    values |= {f"{rule}_parameters": float(np.mean(size[rule])) for rule in RULES if size[rule]}
    if losses:
        values |= _estimation_errors(float(np.mean(losses)), np.array(estimates))
    return values


def chosen_by_rules(
    models: dict[str, AnyFamily], fits: dict[str, Tensor], found: Tensor, n: int, threshold: float
) -> dict[str, str]:
    """Return each rule's choice; the criterion's is the largest it accepts, else the smallest."""
    scores: dict[str, dict[str, float]] = {"AIC": {}, "TIC": {}, "BIC": {}}
    accepted = [next(iter(fits))]
    for name, theta in fits.items():
        family = models[name]
        fit = n * float(theta @ family.truth_mean(found) - family.log_normalizer(theta))
        scores["AIC"][name] = fit - family.size
        scores["TIC"][name] = fit - float(tic_penalty(family, found))
        scores["BIC"][name] = fit - family.size * math.log(n) / 2
        if _risk(risk_expansion(family, found), n) <= threshold:
            accepted.append(name)
    best = {rule: max(values, key=lambda name: values[name]) for rule, values in scores.items()}
    return best | {"criterion": accepted[-1]}


def estimated_risks(
    family: AnyFamily,
    theta: Tensor,
    found: Tensor,
    n: int,
    config: Config,
    generator: np.random.Generator,
) -> tuple[float, float, float]:
    """Estimate the risk from one sample: by the formula, by p/(2n), by resampling the rows."""
    refits = [fitted(family, sample(found, n, generator)) for _ in range(config.bootstrap)]
    losses = [float(family.kl(theta, refit)) for refit in refits if refit is not None]
    plug_in = _risk(risk_expansion(family, found), n)
    believed = family.size / (2 * n)
    return plug_in, believed, float(np.mean(losses)) if losses else believed


def _estimation_errors(risk: float, estimates: Array) -> dict[str, float]:
    values = {"risk": risk}
    for name, column in zip(("plug_in", "aic", "bootstrap"), estimates.T, strict=True):
        values[f"{name}_risk"] = float(column.mean())
        values[f"{name}_error"] = float(np.sqrt(np.square(column / risk - 1).mean()))
    return values


def _risk(expansion: RiskExpansion, n: int) -> float:
    return float(expansion.c1) / n + float(expansion.c2) / n**2


# ---- 4. Sampler: cumulants without a normaliser ----------------------------------------------


def run_sampler(config: Config, lab: Lab) -> dict[str, float]:
    """Estimate the cumulants of the pairwise model from Gibbs draws of it."""

    def study() -> dict[str, float]:
        family = pairwise_binary_family(5)
        truth = above_median(data.red_wine(), TRAITS[5])
        theta = information_projection(family, truth).theta
        of_truth = family.truth_cumulants(truth)
        exact = risk_expansion(family, truth)
        values: dict[str, float] = {}
        for draws in GIBBS:
            law = gibbs(theta.numpy(), 5, draws, np.random.default_rng([lab.seed, draws]))
            found = risk_from_cumulants(*cumulants(law, family.statistics), *of_truth)
            c1, c2 = (abs(float(a / b) - 1) for a, b in zip(found, exact, strict=True))
            risk = abs(_risk(found, 100) / _risk(exact, 100) - 1)
            errors = {"c1_error": c1, "c2_error": c2, "risk_error": risk}
            values |= prefixed(f"{draws} draws", errors)
        return values

    return prefixed("sampler", lab.compute("sampler", study))


# ---- figures --------------------------------------------------------------------------------


def figures(result: dict[str, Any]) -> "dict[str, Figure]":
    """Draw formulas against measured risk, Bayes errors and choices, over the number of rows."""
    from steelyard.lab.line_plots import draw_lines

    parts, config = result["config"]["parts"], result["config"]
    seeds, sizes = list(result["metrics"].values()), tuple(config["sizes"])
    models = {model: f"wine/{model}" for model in config["models"]}
    ratios: dict[str, tuple[dict[str, str], tuple[int, ...], str]] = {}
    if "exact" in parts:
        ratios["exact"] = ({law: f"exact/{law}" for law in LAWS}, EXACT_SIZES, "Exact families")
    if "wine" in parts:
        ratios["risk"] = (models, sizes, "Samples of the wines")
    formulas = {"c1/n + c2/n^2": "second", "c1/n": "first", "p/(2n)": "aic"}
    drawn = {
        name: draw_lines(
            _panels(seeds, cases, places, formulas, divisor="measured"),
            "rows",
            "formula / measured risk",
            f"{title}: how far the formulas are from the measured risk",
            reference=1.0,
        )
        for name, (cases, places, title) in ratios.items()
    }
    if "wine" in parts:
        drawn["bayes error"] = draw_lines(
            _panels(seeds, models, sizes, {"bound": "bound", "measured": "gap"}),
            "rows",
            "1/2 - Bayes error",
            "Telling the fit from the best member: measured, and the bound that decides",
            reference=float(config["epsilon"]),
        )
    if "choice" in parts:
        tables = {table: f"choice/{table}" for table in TABLES}
        rules = {rule: f"{rule}_fails" for rule in RULES}
        drawn["choice"] = draw_lines(
            _panels(seeds, tables, sizes[1:], rules),
            "rows",
            "share of samples",
            "How often a rule chooses a model that is not estimated well enough",
        )
    return drawn


def _panels(
    seeds: list[dict[str, float]],
    cases: dict[str, str],
    sizes: tuple[int, ...],
    series: dict[str, str],
    *,
    divisor: str | None = None,
) -> dict[str, dict[str, dict[float, list[float]]]]:
    """Collect the values of the seeds by case, series and size, divided by another metric."""

    def values(place: str, key: str) -> list[float]:
        there = [m for m in seeds if f"{place}/{key}" in m]
        return [m[f"{place}/{key}"] / (m[f"{place}/{divisor}"] if divisor else 1) for m in there]

    return {
        case: {
            label: {float(n): values(f"{place}/n={n}", key) for n in sizes}
            for label, key in series.items()
        }
        for case, place in cases.items()
    }
