"""Figures that a statistician expects: bars and estimates with intervals, frontiers.

They take numbers, know no method, and look like the figures of :mod:`steelyard.lab.plots`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from steelyard.lab.claims import interquartile_mean, paired_bootstrap
from steelyard.lab.plots import BAND_RESAMPLES, BOOTSTRAP_SEEDS, COLOURS, DASHES, STYLE

__all__ = [
    "Interval",
    "draw_bars",
    "draw_frontiers",
    "draw_intervals",
    "over_seeds",
    "read_intervals",
    "seed_rows",
]

_MARKS = ("o", "s", "^", "D", "v", "P", "X")


class Interval(NamedTuple):
    """An estimate and the ends of its interval."""

    value: float
    low: float
    high: float


def over_seeds(values: Sequence[float]) -> Interval:
    """Interquartile mean of the seeds; 95 % bootstrap interval, below four seeds their range.

    Example:
        >>> over_seeds([1.0, 2.0, 6.0])
        Interval(value=2.5, low=1.0, high=6.0)
    """
    if len(values) < BOOTSTRAP_SEEDS:
        return Interval(interquartile_mean(values), min(values), max(values))
    return Interval(interquartile_mean(values), *paired_bootstrap(values, resamples=BAND_RESAMPLES))


def seed_rows(
    metrics: Sequence[Mapping[str, float]], cases: Mapping[str, str], series: Sequence[str]
) -> dict[str, dict[str, Interval]]:
    """Gather the metrics ``"<case>/<series>"`` of all seeds, as rows for :func:`draw_intervals`.

    Args:
        metrics: of each seed.
        cases: by label, the prefix of its metrics.
        series: last part of the keys; one that the first seed lacks is left out.

    Example:
        >>> seed_rows([{"a/x": 1.0}, {"a/x": 3.0}], {"case A": "a"}, ["x", "y"])
        {'case A': {'x': Interval(value=2.0, low=1.0, high=3.0)}}
    """
    return {
        label: {
            name: over_seeds([seed[f"{case}/{name}"] for seed in metrics])
            for name in series
            if f"{case}/{name}" in metrics[0]
        }
        for label, case in cases.items()
    }


def read_intervals(metrics: Mapping[str, float], prefix: str) -> dict[str, dict[str, Interval]]:
    """Find the intervals among the metrics of a seed: keys ``"<prefix>/<row>/<series>/value"``.

    The ends are in ``.../low`` and ``.../high``.

    Example:
        >>> read_intervals({"p/a/x/value": 2.0, "p/a/x/low": 1.0, "p/a/x/high": 4.0}, "p")
        {'a': {'x': Interval(value=2.0, low=1.0, high=4.0)}}
    """
    rows: dict[str, dict[str, Interval]] = {}
    for key in metrics:
        if key.startswith(f"{prefix}/") and key.endswith("/value"):
            where = key.removesuffix("/value")
            row, series = where.removeprefix(f"{prefix}/").split("/", 1)
            ends = (metrics[f"{where}/{end}"] for end in Interval._fields)
            rows.setdefault(row, {})[series] = Interval(*ends)
    return rows


def draw_bars(
    panels: Mapping[str, Mapping[str, Interval]], xlabel: str, title: str, note: str = ""
) -> Figure:
    """Draw horizontal bars with intervals, a panel for each variable.

    Args:
        panels: by panel title: for each bar its name and its value, from top to bottom.
        xlabel: what the bars measure.
        title: the finding.
        note: how to read it, below the figure.
    """
    heights = [0.5 + 0.3 * len(bars) for bars in panels.values()]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 0.8 + sum(heights)), layout="constrained")
        grid = figure.subplots(len(panels), height_ratios=heights, squeeze=False, sharex=True)
        for axes, (name, bars) in zip(grid[:, 0], panels.items(), strict=True):
            places = np.arange(len(bars))
            values, low, high = np.array(list(bars.values())).T
            colours = [COLOURS[2] if value < 0 else COLOURS[1] for value in values]
            axes.barh(places, values, color=colours, alpha=0.8, height=0.7)
            axes.hlines(places, low, high, color="black", lw=1.2)
            axes.axvline(0, color="black", lw=0.8)
            axes.set_yticks(places, bars, fontsize=8)
            axes.invert_yaxis()
            axes.margins(x=0.05)
            axes.set_title(name, loc="left", fontsize=9)
        grid[-1, 0].set_xlabel(xlabel)
        _finish(figure, title, note)
    return figure


def draw_intervals(
    rows: Mapping[str, Mapping[str, Interval]],
    xlabel: str,
    title: str,
    note: str = "",
    *,
    reference: float | None = None,
    marks: Mapping[str, float] | None = None,
) -> Figure:
    """Draw estimates with intervals, one line of each row for each series.

    Args:
        rows: by row, from top to bottom: the interval of each series.
        xlabel: what is measured.
        title: the finding.
        note: how to read it.
        reference: a number for all rows, drawn as a dashed line.
        marks: a number for single rows, drawn as a vertical tick.
    """
    series = list(dict.fromkeys(name for row in rows.values() for name in row))
    with mpl.rc_context(STYLE):
        size = (7.2, 1.2 + len(rows) * (0.16 + 0.13 * len(series)))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        for number, name in enumerate(series):
            offset = (number - (len(series) - 1) / 2) * 0.7 / len(series)
            have = [(k + offset, row[name]) for k, row in enumerate(rows.values()) if name in row]
            _estimates(axes, have, number, name)
        for place, row in enumerate(rows):
            if marks is not None and row in marks:
                axes.vlines(marks[row], place - 0.42, place + 0.42, color="#555555", lw=1.5)
        if reference is not None:
            axes.axvline(reference, color="#555555", lw=1, linestyle=(0, (3, 2)))
        axes.set_yticks(np.arange(len(rows)), rows, fontsize=9)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.margins(x=0.05)
        axes.set_xlabel(xlabel)
        if len(series) > 1:
            figure.legend(loc="outside right upper", frameon=False, fontsize=9)
        _finish(figure, title, note)
    return figure


def draw_frontiers(
    panels: Mapping[str, Mapping[str, Sequence[tuple[Interval, Interval]]]],
    xlabel: str,
    ylabel: str,
    title: str,
    note: str = "",
) -> Figure:
    """Draw what each method reaches, a panel for each case and a line for each method.

    Args:
        panels: by case and method: the points in order, each an interval along x and along y.
        xlabel: first quantity.
        ylabel: second quantity.
        title: the finding.
        note: how to read it.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.8 + 3.2 * len(panels), 3.8), layout="constrained")
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (case, lines) in zip(grid, panels.items(), strict=True):
            for name, points in lines.items():
                style = names.index(name)
                colour = COLOURS[style % len(COLOURS)]
                x, y = (np.array([point[side] for point in points]) for side in (0, 1))
                axes.errorbar(
                    x[:, 0],
                    y[:, 0],
                    xerr=np.abs(x[:, 1:] - x[:, :1]).T,
                    yerr=np.abs(y[:, 1:] - y[:, :1]).T,
                    color=colour,
                    linestyle=DASHES[style % len(DASHES)],
                    marker=_MARKS[style % len(_MARKS)],
                    ms=4,
                    lw=1.8,
                    elinewidth=0.8,
                    label=name if axes is grid[0] else None,
                )
            axes.set_title(case, loc="left", fontsize=10)
            axes.set_xlabel(xlabel)
            axes.margins(0.05)
        grid[0].set_ylabel(ylabel)
        if len(names) > 1:
            figure.legend(loc="outside right upper", frameon=False, fontsize=9)
        _finish(figure, title, note)
    return figure


def _estimates(axes: Axes, have: list[tuple[float, Interval]], style: int, name: str) -> None:
    places = [place for place, _ in have]
    values, low, high = np.array([interval for _, interval in have]).T
    colour = COLOURS[style % len(COLOURS)]
    axes.hlines(places, low, high, color=colour, lw=1.8)
    axes.plot(values, places, _MARKS[style % len(_MARKS)], color=colour, ms=5, label=name)


def _finish(figure: Figure, title: str, note: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    if note:
        figure.supxlabel(note, fontsize=8, color="#555555", x=0.01, ha="left")
