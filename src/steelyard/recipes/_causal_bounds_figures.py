"""Figures of the recipe on causal bounds."""

import itertools
from typing import TYPE_CHECKING, Any

from steelyard.lab.interval_plots import Interval, draw_intervals, over_seeds
from steelyard.lab.line_plots import draw_lines
from steelyard.recipes._causal_bounds_testbed import (
    CELL_DIVERGENCES,
    DIVERGENCES,
    ESTIMATORS,
    OUTCOMES,
    RANGE_SIZES,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw"]


def draw(result: dict[str, Any]) -> "dict[str, Figure]":
    """Draw widths, effects, growth with the sample, and errors over the number of rows."""
    parts, config = result["config"]["parts"], result["config"]
    seeds = list(result["metrics"].values())
    drawn = {}
    if "exact" in parts:
        drawn["widths"] = draw_intervals(
            {
                name: {"": over_seeds([m[f"exact/{name}/width_over_manski"] for m in seeds])}
                for name in DIVERGENCES
            },
            "width, Manski = 1",
            "Every interval is wider than the no-assumption interval",
            "Mean over 500 random discrete models and both arms.",
            reference=1.0,
        )
    if "nhefs" in parts:
        for outcome in OUTCOMES:
            drawn[f"effect, {outcome}"] = draw_intervals(
                _effect_rows(seeds, outcome),
                f"effect of stopping to smoke ({outcome})",
                "What the data say when confounders may be hidden",
                "Mark: difference of the means. Line: bounds, interquartile means over seeds.",
                reference=0.0,
            )
    if "range" in parts:
        growth = {
            name: {float(n): [m[f"range/n={n}/{name}"] for m in seeds] for n in RANGE_SIZES}
            for name in ("chi2", "manski")
        }
        title = "Without a declared range the bound follows the largest outcome seen"
        drawn["range"] = draw_lines({"outcomes of t_3": growth}, "rows", "upper bound", title)
    panels = {}
    if "cells" in parts:
        for name, kind in itertools.product(CELL_DIVERGENCES, ("dual", "bound")):
            keys = {e: f"cells/{name}/n={{n}}/{e}_{kind}" for e in ESTIMATORS}
            panels[f"cells, {name}, {kind}"] = _over_sizes(seeds, keys, config["cell_sizes"])
    if "rate" in parts:
        keys = {e: f"rate/n={{n}}/{e}" for e in ESTIMATORS[:2]}
        panels["networks, chi2, bound"] = _over_sizes(seeds, keys, config["rate_sizes"])
    if panels:
        title = "How far noise in the propensity moves an estimate, with and without debiasing"
        drawn["debiasing"] = draw_lines(panels, "rows", "root mean square", title, log_y=True)
    return drawn


def _effect_rows(seeds: list[dict[str, float]], outcome: str) -> dict[str, dict[str, Interval]]:
    def middle(key: str) -> float:
        return over_seeds([m[f"nhefs/{outcome}/{key}"] for m in seeds]).value

    means = middle("difference_of_means")
    return {
        name: {
            label: Interval(means, middle(f"{name}{s}_lower"), middle(f"{name}{s}_upper"))
            for label, s in (("no covariates", ""), ("eight cells", "_cells"))
        }
        for name in ("manski", *DIVERGENCES)
    }


def _over_sizes(
    seeds: list[dict[str, float]], keys: dict[str, str], sizes: list[int]
) -> dict[str, dict[float, list[float]]]:
    """Collect the values of the seeds by line and size; what was not measured is left out."""
    return {
        line: {float(n): [m[key.format(n=n)] for m in seeds] for n in sizes}
        for line, key in keys.items()
        if key.format(n=sizes[0]) in seeds[0]
    }
