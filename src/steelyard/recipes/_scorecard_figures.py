"""Figures of the recipe on scorecards."""

from typing import TYPE_CHECKING

from steelyard.lab.interval_plots import (
    draw_bars,
    draw_frontiers,
    draw_intervals,
    read_intervals,
    seed_rows,
)
from steelyard.recipes._scorecard_truth import (
    BINS,
    LAWS,
    LEVEL,
    METHODS,
    expected_rejections,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_encodings", "draw_fairness", "draw_inference", "draw_report"]

Seeds = list[dict[str, float]]


def draw_inference(seeds: Seeds, parts: list[str]) -> "dict[str, Figure]":
    """Rejection rates and coverage, as far as these parts were run."""
    drawn: dict[str, Figure] = {}
    if "null" in parts:
        cases = {f"{b} bins": f"null/bins={b}" for b in BINS} | {"German credit": "null/german"}
        drawn["null"] = draw_intervals(
            seed_rows(seeds, cases, list(METHODS)),
            "share of true nulls rejected",
            "The published test finds something in nothing",
            "Dashes: the nominal 5 %. Ticks: what theory expects of the published test.",
            reference=LEVEL,
            marks={f"{b} bins": expected_rejections(b) for b in BINS},
        )
    if "coverage" in parts:
        cases = {f"five bins, IV {value}": f"coverage/iv={value}" for value in LAWS}
        cases["Taiwan, 3,000 rows"] = "coverage/taiwan"
        drawn["coverage"] = draw_intervals(
            seed_rows(seeds, cases, list(METHODS)),
            "share of intervals that hold the truth",
            "How often a 95 % interval of the information value holds the truth",
            "Dashes: the nominal 95 %.",
            reference=1 - LEVEL,
        )
    return drawn


def draw_encodings(seeds: Seeds, tables: list[str], series: list[str]) -> "Figure":
    """AUC of every method on every table."""
    cases = {table: f"encodings/{table}" for table in tables}
    title = "Encodings on shared bins, beside optbinning and boosted trees"
    return draw_intervals(seed_rows(seeds, cases, series), "AUC on the other half", title)


def draw_fairness(
    seeds: Seeds, parts: list[str], shares: tuple[float, ...], budgets: tuple[float, ...]
) -> "dict[str, Figure]":
    """Frontiers of a score, and cards under a budget, as far as these parts were run."""
    drawn: dict[str, Figure] = {}
    if "front" in parts:
        panels = {}
        for table, label in (("hmda", "HMDA, by race"), ("taiwan", "Taiwan, by sex")):
            cases = {f"{share}": f"front/{table}/share={share}" for share in shares}
            rows = seed_rows(seeds, cases, ("disparity", "information")).values()
            panels[label] = {"best bins": [(row["disparity"], row["information"]) for row in rows]}
        drawn["front"] = draw_frontiers(
            panels,
            "IV between the groups",
            "IV between good and bad",
            "What bins of a score can say about the outcome within a budget on the groups",
        )
    if "model" in parts:
        cases = {f"{limit:g}": f"model/budget={limit:g}" for limit in budgets}
        rows = seed_rows(seeds, cases, ("disparity", "auc")).values()
        drawn["model"] = draw_frontiers(
            {"HMDA, by race": {"card": [(row["disparity"], row["auc"]) for row in rows]}},
            "IV between the groups, other rows",
            "AUC, other rows",
            "What a budget inside the fit costs",
        )
    return drawn


def draw_report(metrics: dict[str, float]) -> "dict[str, Figure]":
    """What an analyst looks at, from one seed: columns with tests, bins with intervals."""
    note = "Bins from one half, counts from the other, first seed; 95 % intervals."
    columns = read_intervals(metrics, "report/columns")
    names = sorted(columns, key=lambda name: -columns[name]["corrected interval"].value)
    return {
        "columns": draw_intervals(
            {name: columns[name] for name in names},
            "information value (nats)",
            "credit_data: what each column says about default",
            f"{note} Ticks: the 5 % critical value.",
            marks={name: metrics[f"report/critical/{name}"] for name in names},
        ),
        "bins": draw_bars(
            read_intervals(metrics, "report/bins"),
            "weight of evidence (right = safer)",
            "credit_data: the four columns that say most",
            note,
        ),
    }
