"""The figure of :func:`steelyard.anatomy.plot_weights`: two panels over one axis."""

import math
from collections.abc import Mapping

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from steelyard.lab.plots import COLOURS, DASHES, STYLE, spread

COINCIDE = 1e-9
"""Curves that differ by less than this share of their size are drawn as one."""

FAR_APART = 10.0
"""Ratio of the peaks of two curves from which one linear scale no longer shows both."""

DECADES = 5
"""How far below the largest value a logarithmic axis reaches at most."""

GAP = 0.1
"""Least distance of two names beside a panel, as a share of its height."""

Panels = Mapping[str, Mapping[str, Tensor]]


def draw(
    x: Tensor,
    panels: Panels,
    *,
    title: str,
    xlabel: str,
    ylabels: tuple[str, str],
    limits: tuple[float, float],
    neutral: float | None,
    heights: tuple[float, float] | None,
    reading: str,
    log: bool,
) -> Figure:
    """Draw the panels below each other.

    ``neutral`` is marked by a line, ``heights`` are the limits of the lower panel if fixed, and
    ``log`` shows sizes without their sign.
    """
    with mpl.rc_context({**STYLE, "path.simplify": False}):  # every point is in the SVG
        figure = Figure(figsize=(7.2, 5.8), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        for axes, (panel, curves), ylabel in zip(
            (upper, lower), panels.items(), ylabels, strict=True
        ):
            axes.set_title(f"{panel}{_coinciding(curves)}", loc="left", fontsize=10)
            axes.set_ylabel(f"{ylabel} (size)" if log else ylabel)
            if neutral is not None:
                axes.axvline(neutral, color="#999999", lw=0.8)
            if heights is not None and axes is lower:
                axes.set_ylim(*heights)
            _draw_panel(axes, x, panel, curves, log)
        lower.set_xlabel(xlabel)
        lower.set_xlim(*limits)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.supxlabel(reading, fontsize=8, color="#555555", x=0.01, ha="left")
    return figure


def _draw_panel(axes: Axes, x: Tensor, panel: str, curves: Mapping[str, Tensor], log: bool) -> None:
    """Draw one panel; later curves are thinner, so that an earlier one shows below them."""
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        curves = {
            name: torch.where(curve == 0, math.nan, curve.abs()) for name, curve in curves.items()
        }
    else:
        axes.axhline(0, color="#999999", lw=0.8)
    for style, (name, curve) in enumerate(curves.items()):
        axes.plot(
            x.numpy(),
            curve.numpy(),
            color=COLOURS[style % len(COLOURS)],
            linestyle=DASHES[style % len(DASHES)],
            lw=max(3.2 - 0.5 * style, 1.4),
            gid=f"{panel}/{name}",
        )
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, high / 10**DECADES) if log else low, high)
    _label_ends(axes, float(x[-1]), curves)


def _label_ends(axes: Axes, end: float, curves: Mapping[str, Tensor]) -> None:
    """Write each name at its curve's end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    last = [min(max(_last_finite(curve), low), high) for curve in curves.values()]
    scale = axes.transData + axes.transAxes.inverted()
    heights = [float(scale.transform((0.0, value))[1]) for value in last]
    for style, (name, value, height) in enumerate(
        zip(curves, last, _inside(spread(heights, gap=GAP)), strict=True)
    ):
        colour = COLOURS[style % len(COLOURS)]
        axes.annotate(
            name,
            xy=(end, value),
            xytext=(1.03, height),
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontweight="bold",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "relpos": (0, 0.5)},
        )


def _inside(heights: list[float]) -> list[float]:
    """Move names that are ``GAP`` apart into the panel, if they have room there."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    moved = list(heights)
    for rank, index in enumerate(order):
        moved[index] = min(max(moved[index], GAP * rank), 1 - GAP * (len(order) - 1 - rank))
    return moved


def _last_finite(curve: Tensor) -> float:
    finite = curve[curve.isfinite()]
    return float(finite[-1]) if len(finite) else -math.inf


def merged(panels: Panels) -> dict[str, dict[str, Tensor]]:
    """Give objectives that coincide in every panel one curve, called ``"a = b"``."""
    groups = _groups(list(panels.values()))
    return {
        panel: {" = ".join(group): curves[group[0]] for group in groups}
        for panel, curves in panels.items()
    }


def _groups(panels: list[Mapping[str, Tensor]]) -> list[list[str]]:
    """Sort the names into groups whose curves coincide in all the panels."""
    groups: list[list[str]] = []
    for name in panels[0]:
        for group in groups:
            if all(_coincide(curves[name], curves[group[0]]) for curves in panels):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def _coinciding(curves: Mapping[str, Tensor]) -> str:
    """Say which curves of one panel lie on each other."""
    groups = [group for group in _groups([curves]) if len(group) > 1]
    if any(len(group) == len(curves) for group in groups):
        return ", where all coincide"
    return "".join(f", where {', '.join(group)} coincide" for group in groups)


def _coincide(a: Tensor, b: Tensor) -> bool:
    size = float(b.abs().amax())
    return torch.allclose(a, b, rtol=0.0, atol=COINCIDE * size, equal_nan=True)


def needs_log(panels: Panels) -> bool:
    """Whether no curve changes its sign and the peaks are too far apart for one linear scale."""
    curves = [curve for panel in panels.values() for curve in panel.values() if bool(curve.any())]
    one_sign = all(bool((curve >= 0).all() | (curve <= 0).all()) for curve in curves)
    peaks = sorted(float(curve.abs().amax()) for curve in curves)
    return one_sign and bool(peaks) and peaks[-1] > FAR_APART * peaks[0]
