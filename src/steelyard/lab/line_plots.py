"""Lines over a size, with bands over seeds, and coefficient paths; know no method."""

from collections.abc import Mapping, Sequence
from typing import Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter

from steelyard.lab.interval_plots import over_seeds
from steelyard.lab.plots import COLOURS, DASHES, STYLE

__all__ = ["draw_lines", "draw_paths"]


def draw_lines(
    panels: Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]],
    xlabel: str,
    ylabel: str,
    title: str,
    *,
    reference: float | None = None,
    log_x: bool = True,
    log_y: bool = False,
) -> Figure:
    """Draw a panel for each case with a line for each series, all on one scale.

    Args:
        panels: by case and series: the values of the seeds at each place, empty = left out.
        xlabel: the places.
        ylabel: the values.
        title: the finding.
        reference: a number drawn as a dashed line.
        log_x: logarithmic places.
        log_y: logarithmic values.

    Returns:
        A figure: lines are interquartile means over seeds, bands their interval (below four seeds
        the range).

    Example:
        >>> one = {"old": {10.0: [1.0, 1.2], 100.0: [0.5, 0.4]}, "new": {10.0: [0.9]}}
        >>> figure = draw_lines({"a case": one}, "rows", "error", "Fewer errors with more rows")
        >>> [line.get_label() for line in figure.axes[0].lines]
        ['old', 'new']
    """
    series = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    unnamed = set(series)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.2 + 2.6 * len(panels), 3.6), layout="constrained")
        grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axes, (case, lines) in zip(grid, panels.items(), strict=True):
            for name, values in lines.items():
                points = [(x, *over_seeds(seeds)) for x, seeds in values.items() if len(seeds)]
                if not points:
                    continue
                x, middle, low, high = np.array(points).T
                style = series.index(name)
                colour = COLOURS[style % len(COLOURS)]
                dash = DASHES[style % len(DASHES)]
                label = name if name in unnamed else None
                unnamed.discard(name)
                axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
                axes.plot(x, middle, color=colour, linestyle=dash, marker="o", ms=3, label=label)
            if reference is not None:
                axes.axhline(reference, color="#555555", lw=1, linestyle=(0, (3, 2)))
            if log_x:
                _log(axes, "x")
            if log_y:
                _log(axes, "y")
            axes.set_title(case, loc="left", fontsize=10)
            axes.set_xlabel(xlabel)
            axes.margins(0.05)
        grid[0].set_ylabel(ylabel)
        if len(series) > 1:
            figure.legend(loc="outside right upper", frameon=False, fontsize=9)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.supxlabel(
            "Interquartile mean and 95 % interval over seeds (below four: range)",
            fontsize=8,
            color="#555555",
            x=0.01,
            ha="left",
        )
    return figure


def draw_paths(
    penalties: Sequence[float],
    groups: Mapping[str, Sequence[Sequence[float]]],
    xlabel: str,
    ylabel: str,
    title: str,
    *,
    faint: str | None = None,
) -> Figure:
    """Draw coefficients along a falling penalty, the lines of a group in one colour.

    Args:
        penalties: positive, one for each point of a line.
        groups: by group: its lines, one for each coefficient.
        xlabel: the penalty.
        ylabel: the coefficient.
        title: the finding.
        faint: a group that is drawn thin and grey.

    Returns:
        A figure with a logarithmic axis that falls from left to right.

    Example:
        >>> lines = {"zero": [[0.0, 0.1]], "not zero": [[0.0, 0.9], [0.2, 0.8]]}
        >>> figure = draw_paths([1.0, 0.1], lines, "penalty", "slope", "Two slopes", faint="zero")
        >>> left, right = figure.axes[0].get_xlim()
        >>> len(figure.axes[0].lines), bool(left > right)
        (3, True)
    """
    colours = iter(COLOURS)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.subplots()
        for name, lines in groups.items():
            colour, width = ("#999999", 1.0) if name == faint else (next(colours), 2.0)
            for number, line in enumerate(lines):
                label = name if number == 0 else None
                axes.plot(penalties, line, color=colour, lw=width, label=label)
        _log(axes, "x")
        axes.invert_xaxis()
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def _log(axes: Axes, which: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, with numbers as plain text: no text here is read as a formula."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    few = LogFormatter(minor_thresholds=(1.0, 0.4))  # decides which ticks of a short axis to name

    def plain(value: float, place: int | None) -> str:
        few.axis = axis
        few.set_locs(list(axis.get_minorticklocs()))
        return f"{value:g}" if few(value, place) else ""

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(plain))
