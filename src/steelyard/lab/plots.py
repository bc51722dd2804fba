"""Figures of a run, drawn from its ``result.json`` alone.

One figure for each group of curves and metric, and one forest plot of the claims. Lines differ in
colour (a palette that colour-blind readers can tell apart), in lightness and in dash pattern, and
carry their names at their ends. The same result gives the same bytes.
"""

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray

from steelyard.lab._format import effect, number
from steelyard.lab.claims import interquartile_mean, paired_bootstrap

# From dark to light as Okabe and Ito (2008) chose them, so that they also differ in grey.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DASHES = ("-", (0, (5, 2)), (0, (1, 1)), (0, (7, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
VERDICT_COLOURS = {"HOLDS": "#007A53", "FAILS": "#B3261E", "UNDECIDED": "#8A5A00"}
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "svg.hashsalt": "steelyard",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "axes.unicode_minus": False,  # as in the numbers we write ourselves
    "axes.xmargin": 0,
    "text.parse_math": False,
}
BOOTSTRAP_SEEDS = 4  # below it a bootstrap band means little: the range is drawn
BAND_RESAMPLES = 1000


@dataclass(frozen=True)
class _Line:
    method: str
    style: int  # place in COLOURS and DASHES: the same for a method in all figures
    steps: NDArray[np.float64]
    seeds: NDArray[np.float64]  # [seeds, steps]
    middle: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def draw_figures(
    result: Mapping[str, Any], extra: Mapping[str, Figure] | None, folder: Path
) -> list[Path]:
    """Draw all figures of a result and write each as PNG and SVG.

    A trial called ``"<group>/<method>"`` is a line in the figure of its group. The line is the
    interquartile mean over seeds; the band is its 95 % bootstrap interval, or the range of the
    seeds when there are fewer than four; thin lines are single seeds.

    Args:
        result: the content of a run's ``result.json``. ``result["units"]``, where present, maps a
            metric (or ``"step"``) to what its axis says.
        extra: the recipe's own figures by file name, or ``None``.
        folder: where to write; made if missing.

    Returns:
        The files: for each figure its PNG and its SVG.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Figure] = {}
    with mpl.rc_context(STYLE):
        judged = [claim for claim in result.get("claims", ()) if claim["verdict"] != "NOT RUN"]
        if judged:
            figures["claims"] = _forest_figure(judged)
        groups = _groups(result.get("curves", {}))
        styles = _styles(method for trials in groups.values() for method in trials)
        for (group, metric), trials in groups.items():
            lines = [_line(name, styles[name], curve) for name, curve in trials.items()]
            figures[f"{group} {metric}"] = _curve_figure(
                group, metric, lines, result.get("units", {})
            )
        figures.update(extra or {})
        files: list[Path] = []
        for name, figure in figures.items():
            files += _write(figure, folder / _slug(name))
    return files


def draw_against(
    panels: Mapping[tuple[str, str], Mapping[str, Mapping[float, Sequence[float]]]],
    xlabel: str,
    title: str,
) -> Figure:
    """Draw how methods respond to a setting, a panel for each case and measured quantity.

    Args:
        panels: by (case, quantity): for each method, the values of the seeds at each setting.
            Cases are rows, quantities columns.
        xlabel: the setting.
        title: the finding.

    Returns:
        A figure: points are seeds, lines their interquartile mean, bands as in
        :func:`draw_figures`.
    """
    rows, columns = (list(dict.fromkeys(key[side] for key in panels)) for side in (0, 1))
    size = (0.8 + 3.6 * len(columns), 0.9 + 2.5 * len(rows))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(rows), len(columns), squeeze=False)
        lines: list[_Line] = []
        for (case, quantity), methods in panels.items():
            axes = grid[rows.index(case), columns.index(quantity)]
            lines = [
                _line(
                    method,
                    style,
                    {
                        "step": list(points),
                        "values": dict(enumerate(zip(*points.values(), strict=True))),
                    },
                )
                for style, (method, points) in enumerate(methods.items())
            ]
            for line in lines:
                colour, dash = _look(line)
                axes.fill_between(line.steps, line.low, line.high, color=colour, alpha=0.15, lw=0)
                axes.plot(line.steps, line.seeds.T, "o", color=colour, alpha=0.4, ms=3)
                axes.plot(line.steps, line.middle, color=colour, linestyle=dash, lw=2)
            axes.set_xticks(lines[0].steps)
            if min(line.seeds.min() for line in lines) >= 0:
                axes.set_ylim(bottom=0)
            axes.set_title(case, loc="left", fontsize=10)
            axes.set_ylabel(quantity)
            axes.set_xlabel(xlabel)
            _label_ends(axes, lines)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        reading = _reading(lines).replace("Thin: single seeds", "Points: single seeds")
        reading = textwrap.fill(reading, int(16 * size[0]))
        figure.supxlabel(reading, fontsize=8, color="#555555", x=0.01, ha="left")
    return figure


def _curve_figure(group: str, metric: str, lines: list[_Line], units: Mapping[str, str]) -> Figure:
    """Draw one metric of one group, a line for each method."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for line in lines:
        colour, dash = _look(line)
        if len(line.seeds) > 1:
            axes.fill_between(line.steps, line.low, line.high, color=colour, alpha=0.15, lw=0)
            axes.plot(line.steps, line.seeds.T, color=colour, alpha=0.35, lw=0.6)
        axes.plot(line.steps, line.middle, color=colour, linestyle=dash, lw=2)
    axes.set_xlabel(units.get("step", "step"))
    axes.set_ylabel(units.get(metric, _words(metric)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_title(_finding(group, metric, lines), loc="left", fontsize=11)
    _label_ends(axes, lines)
    figure.supxlabel(_reading(lines), fontsize=8, color="#555555", x=0.01, ha="left")
    return figure


def _forest_figure(claims: Iterable[Mapping[str, Any]]) -> Figure:
    """Draw each claim's effect, interval, margin and verdict, each on its own scale."""
    rows = list(claims)
    texts = [textwrap.fill(row["statement"], 76) for row in rows]
    heights = [
        0.75 * (row["effect"] is not None) + 0.25 + 0.16 * text.count("\n")
        for row, text in zip(rows, texts, strict=True)
    ]
    figure = Figure(figsize=(7.2, 0.8 + 1.15 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(rows), height_ratios=heights, squeeze=False)[:, 0]
    for axes, row, text in zip(panels, rows, texts, strict=True):
        axes.set_title(text, loc="left", fontsize=9)
        colour = VERDICT_COLOURS.get(row["verdict"], "#666666")
        axes.set_title(row["verdict"], loc="right", fontsize=9, fontweight="bold", color=colour)
        _forest_row(axes, row, colour)
    held = sum(row["verdict"] == "HOLDS" for row in rows)
    claimed = "1 claim holds" if len(rows) == 1 else f"{len(rows)} claims hold"
    figure.suptitle(f"{held} of {claimed}", x=0.01, ha="left", fontsize=11)
    figure.supxlabel(
        "Difference per seed, right = as claimed: dot = interquartile mean, bar = 95 % interval, "
        "dashes = needed.",
        fontsize=8,
        color="#555555",
        x=0.01,
        ha="left",
    )
    return figure


def _forest_row(axes: Axes, row: Mapping[str, Any], colour: str) -> None:
    axes.set_yticks([])
    axes.set_ylim(-1, 1)
    axes.spines["left"].set_visible(False)
    if row["effect"] is None:
        axes.set_axis_off()
        return
    low = row["effect"] if row["low"] is None else row["low"]
    high = row["effect"] if row["high"] is None else row["high"]
    axes.axvline(row["margin"], color="#555555", lw=1, linestyle=(0, (3, 2)))
    axes.plot([low, high], [0, 0], color=colour, lw=3, solid_capstyle="butt")
    axes.plot([row["effect"]], [0], marker="o", ms=7, color=colour)
    ends = [low, high, row["margin"], 0.0]
    span = max(ends) - min(ends) or 1.0
    left, right = min(ends) - 0.08 * span, max(ends) + 0.08 * span
    axes.set_xlim(left, right)
    place = (row["effect"] - left) / (right - left)
    axes.annotate(
        effect(row),
        (row["effect"], 0),
        (0, 9),
        textcoords="offset points",
        ha="left" if place < 0.2 else "right" if place > 0.8 else "center",
        fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )


def _styles(methods: Iterable[str]) -> dict[str, int]:
    """Number the methods in order of appearance."""
    return {method: index for index, method in enumerate(dict.fromkeys(methods))}


def _look(line: _Line) -> tuple[str, Any]:
    return COLOURS[line.style % len(COLOURS)], DASHES[line.style % len(DASHES)]


def _groups(curves: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Sort the curves of trials ``"<group>/<method>"`` by group and metric."""
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for trial, metrics in curves.items():
        group, _, method = trial.rpartition("/")
        for metric, curve in metrics.items():
            if curve["step"] and curve["values"]:
                groups.setdefault((group, metric), {})[method] = curve
    return groups


def _line(method: str, style: int, curve: Mapping[str, Any]) -> _Line:
    steps = np.asarray(curve["step"], dtype=np.float64)
    seeds = np.asarray(list(curve["values"].values()), dtype=np.float64)
    middle = np.array([interquartile_mean(column) for column in seeds.T])
    if len(seeds) < BOOTSTRAP_SEEDS:
        return _Line(method, style, steps, seeds, middle, seeds.min(axis=0), seeds.max(axis=0))
    band = [paired_bootstrap(column, resamples=BAND_RESAMPLES) for column in seeds.T]
    low, high = np.array(band).T
    return _Line(method, style, steps, seeds, middle, low, high)


def _reading(lines: list[_Line]) -> str:
    """Say what line, band and thin lines are."""
    count = max(len(line.seeds) for line in lines)
    if count == 1:
        return "One seed."
    band = "95 % bootstrap interval" if count >= BOOTSTRAP_SEEDS else "range of the seeds"
    return f"Thick: interquartile mean over {count} seeds. Band: {band}. Thin: single seeds."


def _finding(group: str, metric: str, lines: list[_Line]) -> str:
    """State which method ends highest and by how much, or that the bands overlap."""
    place = f"{group.replace('/', ', ')}: " if group else ""
    ranked = sorted(lines, key=lambda line: -line.middle[-1])
    first = ranked[0]
    if len(ranked) == 1:
        return f"{place}{first.method} ends at {_words(metric)} {number(first.middle[-1])}"
    second = ranked[1]
    values = ", ".join(f"{line.method}: {number(line.middle[-1])}" for line in (first, second))
    if min(len(first.seeds), len(second.seeds)) > 1 and first.low[-1] <= second.high[-1]:
        return f"{place}no clear leader in final {_words(metric)}\n({values}; the bands overlap)"
    return f"{place}{first.method} ends with the highest {_words(metric)}\n({values})"


def _label_ends(axes: Axes, lines: list[_Line]) -> None:
    """Write each method's name at its line's end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    ends = [(line.middle[-1] - low) / (high - low) for line in lines]
    for line, place in zip(lines, spread(ends, gap=0.06), strict=True):
        colour, _ = _look(line)
        axes.annotate(
            line.method,
            xy=(line.steps[-1], line.middle[-1]),
            xytext=(1.03, place),
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontweight="bold",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6},
        )


def spread(places: list[float], *, gap: float) -> list[float]:
    """Move numbers apart to at least ``gap`` with the least squared movement, keeping the order.

    Subtracting ``gap`` times the rank turns it into isotonic regression, solved by pooling
    adjacent violators.

    Example:
        >>> spread([0.5, 0.5, 0.9], gap=0.25)
        [0.375, 0.625, 0.9]
    """
    order = sorted(range(len(places)), key=lambda index: places[index])
    blocks: list[list[float]] = []
    for rank, index in enumerate(order):
        blocks.append([places[index] - gap * rank])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    levels = [float(np.mean(block)) for block in blocks for _ in block]
    moved = [0.0] * len(places)
    for rank, index in enumerate(order):
        moved[index] = levels[rank] + gap * rank
    return moved


def _write(figure: Figure, stem: Path) -> list[Path]:
    FigureCanvasAgg(figure)
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    figure.savefig(files[0], dpi=150, metadata={"Software": None})
    figure.savefig(files[1], metadata={"Date": None})
    return files


def _words(name: str) -> str:
    return name.replace("_", " ")


def _slug(name: str) -> str:
    """Turn a figure's name into a file name: letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9.=_-]+", "-", name).strip("-.") or "figure"
