"""Causal bounds under hidden confounding: do they cover, and what are they worth?

The propensity alone bounds how far the law of the outcome under an intervention can be from the one
observed. The paper turns that into intervals, one for each of five divergences. Every one of them
contains the classical no-assumption (Manski) interval on the same outcome range; this recipe
measures how much wider they are, beside whether they are right.

exact       500 random discrete models with a hidden confounder: coverage of the true mean, the
            radius, Manski inside, and the solver against a linear program and the dual problem.
range       unbounded outcomes: the bound with the range read off the sample, 200 to 20,000 rows.
ihdp        real infants, simulated outcomes, 5 of 25 covariates observed: coverage of the mean
            under each arm, over all and in four groups; width against propensity.
nhefs       stopping to smoke and weight, real data, rows drawn anew for each seed: bounds on the
            effect in kg (declared range -50 to 50) and on the chance to gain more than 5 kg.
cells       eight cells of covariates, a noisy propensity: how far the dual variables and bounds of
            the plain and of the debiased risk move from those with the true propensity.
rate        the same with the networks of the estimator, on the paper's simulated model.

Source: Jung, Kang (2026), arXiv:2601.17160.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor

from steelyard._checks import check_choice, check_count
from steelyard.causal import (
    Bounds,
    divergence_radius,
    effect_bounds,
    finite_support_bounds,
    manski_bounds,
    policy_bounds,
)
from steelyard.lab import Claim, Form, Lab, data, prefixed
from steelyard.recipes._causal_bounds_testbed import (
    CELL_DIVERGENCES,
    COVARIATES,
    DIVERGENCES,
    LIMIT,
    OBSERVED,
    OUTCOMES,
    RANGE_PROPENSITY,
    RANGE_SIZES,
    RATE_RANGE,
    UNIT,
    VALUES,
    GivenPropensity,
    by_dual_problem,
    by_linear_program,
    cell_errors,
    divergence,
    draw_cells,
    draw_rate,
    ihdp_outcomes,
    random_models,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

PARTS = ("exact", "range", "ihdp", "nhefs", "cells", "rate")


@dataclass(frozen=True)
class Config:
    """What is run, and how large."""

    parts: tuple[str, ...] = PARTS
    """Which of exact, range, ihdp, nhefs, cells, rate."""
    models: int = 500
    """Random discrete models."""
    checked: int = 10
    """Of them, those whose bounds are also computed by other means."""
    epochs: int = 60
    """Most epochs of a network."""
    width: int = 32
    """Hidden units in each of two layers."""
    cell_sizes: tuple[int, ...] = (500, 2_000, 8_000)
    """Rows in part cells."""
    repetitions: int = 1
    """Samples of each size in part cells."""
    rate_sizes: tuple[int, ...] = (500, 1_000)
    """Rows in part rate."""

    def __post_init__(self) -> None:
        for part in self.parts:
            check_choice("parts", part, PARTS)
        for name in ("models", "epochs", "width", "repetitions"):
            check_count(name, getattr(self, name))
        check_count("checked", self.checked, at_least=1)
        if self.checked > self.models:
            raise ValueError(f"checked must be at most models = {self.models}, got {self.checked}")
        for name in ("cell_sizes", "rate_sizes"):
            sizes = getattr(self, name)
            if len(sizes) < 2 or list(sizes) != sorted(set(sizes)) or sizes[0] < 100:
                raise ValueError(f"{name} must be two or more rising sizes from 100, got {sizes}")


QUICK = Form(Config(), seeds=5, minutes=2, threads=1)
FULL = Form(
    Config(checked=40, epochs=128, width=64, repetitions=2, rate_sizes=(500, 1_000, 2_000)),
    seeds=8,
    minutes=5,
    threads=1,
)

_PAPER = "Jung, Kang (2026), arXiv:2601.17160"
_OURS = "derived: every f-ball contains the no-assumption interval"
_DEBIASED = f"{_PAPER}, debiasing"
_WHOLE = "derived: the whole debiased risk, radius included"


def _claim(
    direction: str, bound: str | float, metric: str, source: str = _PAPER
) -> Callable[[str], Claim]:
    terms: dict[str, Any] = {"direction": direction, "baseline": bound}
    return lambda statement: Claim(statement, source, metric, **terms)


_most, _least = partial(_claim, "lower"), partial(_claim, "higher")

_BOUNDS: dict[str, Callable[[str], Claim]] = {
    "The intervals of all five divergences cover the true mean in all models and both arms": _least(
        1.0, "exact/all/coverage", f"{_PAPER}, Thm 1 and 2"
    ),
    "No divergence exceeds its radius (largest ratio at most 1)": _most(
        1 + 1e-9, "exact/all/largest_ratio", f"{_PAPER}, Thm 1"
    ),
    "Every one of them contains the no-assumption interval, which needs no divergence": _least(
        1.0, "exact/all/containment", _OURS
    ),
    "The exact solver agrees with a linear program (TV) and the dual problem to 1e-6": _most(
        1e-6, "exact/all/solver_error", "independent computation"
    ),
    "chi2 is the narrowest of the five on average, by more than the best of the others": _most(
        "exact/all/narrowest_other", "exact/chi2/width", f"{_PAPER}, experiments"
    ),
    "No declared range: the chi2 upper end at 20,000 rows is 1 or more above that at 200": _least(
        1.0, "range/growth/chi2", "refutes bounds without a bounded outcome"
    ),
    **{
        f"IHDP, 20 of 25 covariates hidden: the intervals cover {words} in 95 % or more": _least(
            0.95, f"ihdp/all/coverage_of_{group}", f"{_PAPER}, IHDP"
        )
        for group, words in (("arms", "the means of both arms"), ("groups", "those of four groups"))
    },
    "IHDP: intervals shorten as the propensity rises (rank correlation below -0.9)": _most(
        -0.9, "ihdp/all/width_and_propensity", f"{_PAPER}, Thm 1"
    ),
    "IHDP: chi2 is the narrowest of the five, as estimated": _most(
        "ihdp/all/narrowest_other", "ihdp/chi2/width", f"{_PAPER}, experiments"
    ),
    **{
        f"NHEFS, {outcome}: the shortest of the five is wider than Manski's interval": _least(
            1.0, f"nhefs/{outcome}/smallest_width_ratio", _OURS
        )
        for outcome in OUTCOMES
    },
    "NHEFS, more than 5 kg: not even Manski's interval tells the sign of the effect": _least(
        0.0, "nhefs/more than 5 kg/zero_inside_by", "what no assumption on confounders buys"
    ),
}


def _cell_claims(name: str) -> dict[str, Callable[[str], Claim]]:
    slope, large = f"cells/{name}/slope", f"cells/{name}/n=8000"
    return {
        f"Cells, {name}: the error of the bound falls faster with the debiased risk": _most(
            f"{slope}/plain_bound", f"{slope}/debiased_bound", _DEBIASED
        ),
        f"Cells, {name}, 8,000 rows: that error is smaller with the debiased risk": _most(
            f"{large}/plain_bound", f"{large}/debiased_bound", _DEBIASED
        ),
        f"Cells, {name}, 8,000 rows: it is smaller once the radius is debiased as well": _most(
            f"{large}/plain_bound", f"{large}/corrected_bound", _WHOLE
        ),
    }


_RATES: dict[str, Callable[[str], Claim]] = {
    "Cells, chi2: the debiased dual variables ignore the propensity (log lambda to 0.001)": _most(
        0.001, "cells/chi2/summary/debiased_dual", _WHOLE
    ),
    "Cells, chi2: with a debiased radius so does the bound (to 0.001)": _most(
        0.001, "cells/chi2/summary/corrected_bound", _WHOLE
    ),
    "Cells, kl: with a debiased radius the error of the bound falls faster than the plain": _most(
        "cells/kl/slope/plain_bound", "cells/kl/slope/corrected_bound", _WHOLE
    ),
    "Cells, kl: the error of the dual variables falls faster with the debiased risk": _most(
        "cells/kl/slope/plain_dual", "cells/kl/slope/debiased_dual", _DEBIASED
    ),
    **{text: make for name in CELL_DIVERGENCES for text, make in _cell_claims(name).items()},
    "Networks: the error of the bound falls faster with the debiased risk": _most(
        "rate/slope/plain", "rate/slope/debiased", f"{_PAPER}, noise of order n^(-1/4)"
    ),
    "Networks, 1,000 rows: that error is smaller with the debiased risk": _most(
        "rate/n=1000/plain", "rate/n=1000/debiased", _DEBIASED
    ),
}

CLAIMS: tuple[Claim, ...] = tuple(make(text) for text, make in (_BOUNDS | _RATES).items())


def run(config: Config, lab: Lab) -> dict[str, float]:
    """Run the chosen parts for one seed."""
    parts: dict[str, Callable[[Config, int], dict[str, float]]] = {
        "exact": exact,
        "range": unbounded,
        "ihdp": ihdp,
        "nhefs": nhefs,
        "cells": cells,
        "rate": rate,
    }
    metrics: dict[str, float] = {}
    for part in config.parts:
        metrics |= prefixed(part, lab.compute(part, partial(parts[part], config, lab.seed)))
    return metrics


# ---- 1. Exact: random discrete models --------------------------------------------------------


def exact(config: Config, seed: int) -> dict[str, float]:
    """Cover, contain, compare widths; check the solver on the first few models."""
    models = random_models(config.models, np.random.default_rng([seed, 0]))
    p, q, e = models
    truth = q @ VALUES
    manski = manski_bounds(VALUES, p, e, outcome_range=UNIT)
    manski_width = manski.upper - manski.lower
    covered, contained, ratios, errors, widths = [], [], [], [], {}
    values: dict[str, float] = {}
    for name in DIVERGENCES:
        low, high = finite_support_bounds(VALUES, p, e, name, outcome_range=UNIT)
        inside = (low <= truth + 1e-9) & (truth <= high + 1e-9)
        around = (low <= manski.lower + 1e-9) & (manski.upper <= high + 1e-9)
        covered.append(_share(inside))
        contained.append(_share(around))
        ratios.append(float((divergence(name, p, q) / divergence_radius(e, name)).max()))
        few = slice(config.checked)
        other = by_linear_program if name == "tv" else partial(by_dual_problem, name=name)
        errors.append(float((other(p[few, 1], e[few, 1]) - high[few, 1]).abs().max()))
        widths[name] = high - low
        values |= {
            f"{name}/width": float(widths[name].mean()),
            f"{name}/width_over_manski": float((widths[name] / manski_width).mean()),
        }
    others = torch.stack([width for name, width in widths.items() if name != "chi2"])
    return values | {
        "manski/width": float(manski_width.mean()),
        "all/coverage": min(covered),
        "all/containment": min(contained),
        "all/largest_ratio": max(ratios),
        "all/solver_error": max(errors),
        "all/narrowest_other": float(others.mean((1, 2)).min()),
        "all/chi2_is_narrowest": _share(widths["chi2"] <= others.amin(0) + 1e-12),
    }


# ---- 2. Range: unbounded outcomes ------------------------------------------------------------


def unbounded(config: Config, seed: int) -> dict[str, float]:
    """Outcomes of Student's law with 3 degrees of freedom: what a sample says of the upper end."""
    y = np.random.default_rng([seed, 1]).standard_t(3, RANGE_SIZES[-1])
    values: dict[str, float] = {}
    for n in RANGE_SIZES:
        outcome = torch.from_numpy(y[:n])
        law = torch.full_like(outcome, 1 / n)
        chi2 = finite_support_bounds(outcome, law, RANGE_PROPENSITY, "chi2").upper
        manski = manski_bounds(outcome, law, RANGE_PROPENSITY).upper
        values |= {f"n={n}/chi2": float(chi2), f"n={n}/manski": float(manski)}
    first, last = RANGE_SIZES[0], RANGE_SIZES[-1]
    for name in ("chi2", "manski"):
        values[f"growth/{name}"] = values[f"n={last}/{name}"] - values[f"n={first}/{name}"]
    return values


# ---- 3. IHDP: real covariates, simulated outcomes ---------------------------------------------


def ihdp(config: Config, seed: int) -> dict[str, float]:
    """Fit the estimator on five covariates; ask it for means of all and of four groups."""
    from steelyard._extras import require

    logistic = require("sklearn.linear_model", extra="tabular").LogisticRegression()
    X, treated, names = data.infant_health()
    generator = np.random.default_rng([seed, 2])
    y, truth = ihdp_outcomes(X, treated, generator)
    seen = X[:, [names.index(name) for name in OBSERVED]]
    model = estimator(config, seed, outcome_range=(-LIMIT, LIMIT), propensity_model=logistic)
    model.fit(seen, treated, y)
    sex, smoked = (seen[:, OBSERVED.index(name)] > 0.5 for name in ("sex", "cig"))
    groups = [(sex == a) & (smoked == b) for a, b in itertools.product((False, True), repeat=2)]
    values: dict[str, list[float]] = {}

    def note(key: str, value: float) -> None:
        values.setdefault(key, []).append(value)

    for arm, widened in itertools.product((0, 1), (True, False)):
        model.enforce_containment = widened
        result = model.interval(seen, arm)
        low, high = result.lower.numpy(), result.upper.numpy()
        case = "all" if widened else "not widened"
        note(f"{case}/coverage_of_arms", _between(low, truth[:, arm], high))
        for g in groups:
            note(f"{case}/coverage_of_groups", _between(low[g], truth[g, arm], high[g]))
        note(f"{case}/width", float((high - low).mean()))
        manski = float((result.manski.upper - result.manski.lower).mean())
        note(f"{case}/width_over_manski", float((high - low).mean()) / manski)
        ranks = spearmanr(high - low, result.propensity.numpy())
        note(f"{case}/width_and_propensity", float(ranks.statistic))
        if not widened:
            note(f"{case}/tighter_than_manski", _share(result.noise))
            for name, ends in result.by_divergence.items():
                note(f"{name}/width", float((ends.upper - ends.lower).mean()))
    for arm in (0, 1):
        own = y[treated == arm]
        error = 1.96 * own.std() / math.sqrt(len(own))
        note("naive/coverage_of_arms", float(abs(own.mean() - truth[:, arm].mean()) <= error))
    means = {key: float(np.mean(found)) for key, found in values.items()}
    others = [means[f"{name}/width"] for name in DIVERGENCES if name != "chi2"]
    return means | {"all/narrowest_other": min(others)}


def estimator(config: Config, seed: int, **settings: Any) -> Any:
    """Return the estimator with the networks of the configuration."""
    from steelyard.causal import CausalBounds

    return CausalBounds(
        hidden=(config.width, config.width),
        max_epochs=config.epochs,
        random_state=seed,
        **settings,
    )


def _between(low: Array, truth: Array, high: Array) -> float:
    return float(low.mean() <= truth.mean() <= high.mean())


# ---- 4. NHEFS: real outcomes -----------------------------------------------------------------


def nhefs(config: Config, seed: int) -> dict[str, float]:
    """Bound the effect without covariates, and by eight cells of sex, age and years of smoking."""
    table = data.smoking_cessation()
    rows = np.random.default_rng([seed, 3]).integers(len(table["quit"]), size=len(table["quit"]))
    table = {name: column[rows] for name, column in table.items()}
    treated = table["quit"].astype(np.int64)
    older, longer = (table[n] > np.median(table[n]) for n in ("age", "smokeyrs"))
    cell = (4 * table["sex"] + 2 * older + longer).astype(np.int64)
    gains = {"kg": table["gain"], "more than 5 kg": (table["gain"] > 5).astype(np.float64)}
    values: dict[str, float] = {}
    for name, y in gains.items():
        values |= prefixed(name, effect_of(y, treated, cell, OUTCOMES[name]))
    return values


def effect_of(
    y: Array,
    treated: NDArray[np.int64],
    cell: NDArray[np.int64],
    outcome_range: tuple[float, float],
) -> dict[str, float]:
    """Bound the effect by each divergence and by Manski; ``*_cells`` average over the cells."""
    everyone = np.zeros_like(cell)
    values = {"difference_of_means": float(y[treated == 1].mean() - y[treated == 0].mean())}
    for name in (*DIVERGENCES, "manski"):
        for suffix, of in (("", everyone), ("_cells", cell)):
            low, high = effect_by(name, y, treated, of, outcome_range)
            values |= {f"{name}{suffix}_lower": float(low), f"{name}{suffix}_upper": float(high)}
    widths = {n: values[f"{n}_upper"] - values[f"{n}_lower"] for n in (*DIVERGENCES, "manski")}
    values["smallest_width_ratio"] = min(widths[n] for n in DIVERGENCES) / widths["manski"]
    values["zero_inside_by"] = min(-values["manski_lower"], values["manski_upper"])
    return values


def effect_by(
    name: str,
    y: Array,
    treated: NDArray[np.int64],
    cell: NDArray[np.int64],
    outcome_range: tuple[float, float],
) -> Bounds:
    """Bound each cell's means from its own outcomes, then average; propensities are shares."""
    exact_bounds: Any = finite_support_bounds
    bound = manski_bounds if name == "manski" else partial(exact_bounds, divergence=name)
    found, sizes = [], []
    for c in np.unique(cell):
        inside = cell == c
        sizes.append(float(inside.sum()))
        for arm in (0, 1):
            own = torch.from_numpy(y[inside & (treated == arm)])
            if 0 < len(own) < sizes[-1]:
                law, share = torch.full_like(own, 1 / len(own)), len(own) / sizes[-1]
                found.append(bound(own, law, share, outcome_range=outcome_range))
            else:  # a cell without the arm tells nothing of it, one without the other all
                ends = (own.mean(), own.mean()) if len(own) else outcome_range
                found.append(Bounds(*(torch.as_tensor(end, dtype=own.dtype) for end in ends)))
    lower, upper = (torch.stack(ends).reshape(-1, 2) for ends in zip(*found, strict=True))
    weights = torch.tensor(sizes, dtype=torch.float64)
    arms = [torch.full((len(weights),), arm) for arm in (0, 1)]
    means = [policy_bounds(lower, upper, arm, weights=weights) for arm in arms]
    return effect_bounds(*(torch.stack([mean[side] for mean in means]) for side in (0, 1)))


# ---- 5. Cells: what debiasing does -----------------------------------------------------------


def cells(config: Config, seed: int) -> dict[str, float]:
    """Compare each estimate with itself at the true propensity; slopes over log n.

    ``corrected`` takes the dual variables of the debiased risk and its value, radius included;
    ``debiased`` takes only the dual variables and plugs the propensity into the radius.
    """
    values: dict[str, float] = {}
    for name in CELL_DIVERGENCES:
        generator = np.random.default_rng([seed, 4])
        population = draw_cells(generator)
        errors: dict[str, list[float]] = {}
        for n in config.cell_sizes:
            squares = [
                cell_errors(population, n, name, generator) for _ in range(config.repetitions)
            ]
            for key in squares[0]:
                error = math.sqrt(np.mean([square[key] for square in squares]))
                values[f"{name}/n={n}/{key}"] = error
                errors.setdefault(key, []).append(error)
        values |= prefixed(name, _slopes(config.cell_sizes, errors))
        values |= {f"{name}/summary/{key}": max(found) for key, found in errors.items()}
    return values


def _slopes(sizes: tuple[int, ...], errors: dict[str, list[float]]) -> dict[str, float]:
    """Least-squares slope of the log error over the log size."""
    return {
        f"slope/{key}": float(np.polyfit(np.log(sizes), np.log(np.maximum(found, 1e-12)), 1)[0])
        for key, found in errors.items()
    }


# ---- 6. Rate: the paper's simulated model ----------------------------------------------------


def rate(config: Config, seed: int) -> dict[str, float]:
    """Root mean squared difference that noise in the propensity makes to the bounds."""
    generator = np.random.default_rng([seed, 5])
    weights = generator.normal(0.0, 0.6, COVARIATES)
    asked = generator.uniform(-2.0, 2.0, (200, COVARIATES))
    values: dict[str, float] = {}
    errors: dict[str, list[float]] = {}
    for n in config.rate_sizes:
        X, treated, y = draw_rate(n, weights, generator)
        noise_seed = int(generator.integers(2**31))
        for name in ("plain", "debiased"):
            ends = []
            for noise in (0.0, n**-0.25):
                given = GivenPropensity(weights, X.mean(0), X.std(0), noise, noise_seed)
                model = estimator(
                    config,
                    seed,
                    divergences=("chi2",),
                    outcome_range=RATE_RANGE,
                    propensity_model=given,
                    debias=name == "debiased",
                    enforce_containment=False,
                    batch_size=128,
                )
                model.fit(X, treated, y)
                found = [model.interval(asked, arm) for arm in (0, 1)]
                ends.append(torch.stack([end for r in found for end in (r.lower, r.upper)]))
            error = float((ends[1] - ends[0]).square().mean().sqrt())
            values[f"n={n}/{name}"] = error
            errors.setdefault(name, []).append(error)
    return values | _slopes(config.rate_sizes, errors)


# ---- shared and figures ----------------------------------------------------------------------


def _share(condition: Tensor) -> float:
    return float(condition.double().mean())


def figures(result: dict[str, Any]) -> "dict[str, Figure]":
    """Draw widths, effects, growth with the sample, and errors over the number of rows."""
    from steelyard.recipes._causal_bounds_figures import draw

    return draw(result)
