"""Pictures of a shift: one response as a heat map, all positions as a curve, cross-sampling."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steelyard._checks import check_count, check_floating, check_not_empty, check_range
from steelyard.tokens._heat_maps import heat_map_html, heat_map_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "CrossSamplingCurve",
    "heat_map_html",
    "heat_map_text",
    "plot_cross_sampling",
    "plot_js_percentiles",
]

_GREY = "#666666"
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1)), (0, (7, 2, 1, 2)))
_COLOURS = ("#0072B2", "#D55E00", "#000000", "#009E73")
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "svg.hashsalt": "steelyard",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "axes.unicode_minus": False,
    "text.parse_math": False,
}


@dataclass(frozen=True)
class CrossSamplingCurve:
    """Success against the share of switched tokens, for one rule."""

    share_switched: Sequence[float]
    """Share of the generated tokens that were switched, in [0, 1]."""
    success: Sequence[float]
    """Share of the responses that succeeded, in [0, 1], for each."""


def plot_js_percentiles(curves: Mapping[str, Tensor], *, high: float = 0.1) -> "Figure":
    """Draw the percentiles of the divergence, one line for each pair of models.

    Args:
        curves: by name, the divergences of all kept positions in nats, any shape.
        high: a dashed line, and what the title counts.

    Returns:
        A matplotlib figure. Its axis grows as the square root, so that zeros have a place.

    Raises:
        TypeError: a curve is not floating point.
        ValueError: no curve, an empty one, or one with NaN.

    Example:
        >>> figure = plot_js_percentiles({"RL": torch.tensor([0.0, 0.0, 0.0, 0.4])})
        >>> figure.axes[0].get_title(loc="left")
        'RL: 25 % of the positions moved by more than 0.1 nats'

    Source: Meng et al. (2026), section 3, arXiv:2603.22446.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    if not isinstance(curves, Mapping):
        raise TypeError(f"curves must be a mapping, got {type(curves).__name__}")
    if not curves:
        raise ValueError("curves must not be empty")
    check_range("high", high, at_least=0.0, below=float("inf"))
    lines = {name: _ordered(name, values) for name, values in curves.items()}
    shares = {name: (values > high).double().mean().item() for name, values in curves.items()}
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes: Axes = figure.subplots()
        axes.set_yscale("function", functions=(_root, _square))
        axes.axhline(high, color=_GREY, lw=1, linestyle=(0, (3, 2)))
        for style, values in enumerate(lines.values()):
            colour = _COLOURS[style % len(_COLOURS)]
            share = [100 * place / max(1, len(values) - 1) for place in range(len(values))]
            axes.plot(share, values, color=colour, linestyle=_DASHES[style % len(_DASHES)], lw=2)
        axes.set_xlim(0, 100)
        axes.set_ylim(0, math.log(2.0))
        axes.set_yticks([0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, math.log(2.0)])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.2f}")
        axes.set_xlabel("percentile of positions (%)")
        axes.set_ylabel("JS divergence (nats)")
        axes.set_title(_sparsity(shares, high), loc="left", fontsize=11)
        ends = [
            (100.0, values[-1], math.sqrt(values[-1] / math.log(2.0))) for values in lines.values()
        ]
        _label_ends(axes, list(lines), ends)
    return figure


def plot_cross_sampling(
    switched: CrossSamplingCurve,
    control: CrossSamplingCurve,
    *,
    host_success: float,
    intervention_success: float,
    host: str = "base",
    intervention: str = "RL",
    samples: int | None = None,
) -> "Figure":
    """Draw how success moves from one model to the other, beside switches at random positions.

    Args:
        switched: the divergence rule at several thresholds or budgets.
        control: as many switches at random positions.
        host_success: success of the host alone, in [0, 1].
        intervention_success: success of the intervention model alone, in [0, 1].
        host: name of the host.
        intervention: name of the intervention model.
        samples: responses behind each point; draws 95 % Wilson intervals.

    Returns:
        A matplotlib figure; its title says how much of the gap each rule closes at its best point.

    Raises:
        TypeError: ``switched`` or ``control`` is no :class:`CrossSamplingCurve`.
        ValueError: a curve is empty, has unequal lengths or leaves [0, 1]; ``samples < 1``.

    Example:
        >>> rule = CrossSamplingCurve([0.0, 0.126], [0.31, 0.95])
        >>> random = CrossSamplingCurve([0.0, 0.126], [0.31, 0.38])
        >>> figure = plot_cross_sampling(rule, random, host_success=0.31, intervention_success=0.91)
        >>> print(figure.axes[0].get_title(loc="left"))
        Switching 12.6 % of the tokens closes 107 % of the gap from base to RL
        (random positions: 12 % with 12.6 %)

    Source: Meng et al. (2026), section 4, arXiv:2603.22446.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    limits = {"host_success": host_success, "intervention_success": intervention_success}
    for name, value in limits.items():
        check_range(name, value, at_least=0.0, at_most=1.0)
    if samples is not None:
        check_count("samples", samples)
    for name, curve in (("switched", switched), ("control", control)):
        _check_curve(name, curve)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes: Axes = figure.subplots()
        ends = [
            _rule_line(axes, curve, style, samples)
            for style, curve in enumerate((switched, control))
        ]
        _label_ends(axes, ["largest divergence", "random positions"], ends)
        pair = ((host, host_success), (intervention, intervention_success))
        for name, value in pair:
            axes.axhline(value, color=_GREY, lw=1, linestyle=(0, (3, 2)))
            above = value > min(host_success, intervention_success)  # where no curve runs
            axes.annotate(
                name,
                (0.0, value),
                (4, 3 if above else -10),
                textcoords="offset points",
                color=_GREY,
                fontsize=9,
            )
        axes.set_xlim(left=0)
        axes.set_ylim(0, 1)
        axes.set_xlabel("share of tokens switched (%)")
        axes.set_ylabel("share of responses that succeed")
        title = _recovery(switched, control, host_success, intervention_success)
        axes.set_title(title.format(host=host, intervention=intervention), loc="left", fontsize=11)
        if samples is not None:
            note = f"Bars: 95 % Wilson intervals, {samples} responses each."
            figure.supxlabel(note, fontsize=8, color=_GREY, x=0.01, ha="left")
    return figure


def _ordered(name: str, values: Tensor) -> list[float]:
    check_floating(**{f"curves[{name!r}]": values})
    check_not_empty(f"curves[{name!r}]", values)
    if bool(values.isnan().any()):
        raise ValueError(f"curves[{name!r}] must not hold NaN")
    ordered = values.detach().flatten().double().clamp(min=0.0).sort().values
    if len(ordered) > 2000:  # more than a figure can show; quantiles keep both ends
        place = torch.linspace(0, len(ordered) - 1, 2000, dtype=torch.float64).round().long()
        ordered = ordered[place.to(ordered.device)]
    numbers: list[float] = ordered.tolist()
    return numbers


def _sparsity(shares: Mapping[str, float], high: float) -> str:
    (first, share), *rest = shares.items()
    title = f"{first}: {100 * share:.3g} % of the positions moved by more than {high:g} nats"
    if rest:
        title += "\n(" + ", ".join(f"{name}: {100 * part:.3g} %" for name, part in rest) + ")"
    return title


def _root(values: Any) -> Any:
    import numpy as np

    return np.sqrt(np.clip(values, 0.0, None))


def _square(values: Any) -> Any:
    return values**2


def _label_ends(
    axes: "Axes", names: Sequence[str], ends: Sequence[tuple[float, float, float]]
) -> None:
    """Write each line's name at its end (x, y, height on the axis), moved up where they overlap."""
    lowest = 0.0
    for line in sorted(range(len(names)), key=lambda line: ends[line][2]):
        x, y, height = ends[line]
        place = max(lowest, height)
        lowest = place + 0.06
        colour = _COLOURS[line % len(_COLOURS)]
        axes.annotate(
            names[line],
            xy=(x, y),
            xytext=(1.03, place),
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontweight="bold",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6},
        )


def _check_curve(name: str, curve: CrossSamplingCurve) -> None:
    if not isinstance(curve, CrossSamplingCurve):
        raise TypeError(f"{name} must be a CrossSamplingCurve, got {type(curve).__name__}")
    shares, success = curve.share_switched, curve.success
    if len(shares) == 0 or len(shares) != len(success):
        raise ValueError(
            f"{name} must have as many shares as successes and at least one, got "
            f"{len(shares)} and {len(success)}"
        )
    for label, values in (("share_switched", shares), ("success", success)):
        for value in values:
            check_range(f"{name}.{label}", value, at_least=0.0, at_most=1.0)


def _rule_line(
    axes: "Axes", curve: CrossSamplingCurve, style: int, samples: int | None
) -> tuple[float, float, float]:
    # Draws the line and returns its end for the label.
    colour = _COLOURS[style]
    points = sorted(zip(curve.share_switched, curve.success, strict=True))
    shares, success = [100 * share for share, _ in points], [value for _, value in points]
    if samples is not None:
        low, high = zip(*(wilson_interval(value, samples) for value in success), strict=True)
        # In floating point the interval may miss its own centre by a rounding error.
        below = [max(0.0, value - end) for value, end in zip(success, low, strict=True)]
        above = [max(0.0, end - value) for value, end in zip(success, high, strict=True)]
        axes.errorbar(shares, success, (below, above), fmt="none", ecolor=colour, lw=1)
    axes.plot(shares, success, "o", color=colour, linestyle=_DASHES[style], lw=2, ms=5)
    return shares[-1], success[-1], success[-1]


def wilson_interval(share: float, samples: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share.

    Example:
        >>> print("{:.3f} {:.3f}".format(*wilson_interval(0.5, 100)))
        0.404 0.596
    """
    centre = (share + z**2 / (2 * samples)) / (1 + z**2 / samples)
    half = z / (1 + z**2 / samples)
    half *= math.sqrt(share * (1 - share) / samples + z**2 / (4 * samples**2))
    return centre - half, centre + half


def _recovery(
    switched: CrossSamplingCurve, control: CrossSamplingCurve, start: float, end: float
) -> str:
    gap = end - start
    if gap == 0:
        return "{host} and {intervention} succeed equally often"

    def best(curve: CrossSamplingCurve) -> tuple[float, float]:
        points = zip(curve.success, curve.share_switched, strict=True)
        closed = [((value - start) / gap + 0.0, share) for value, share in points]  # no -0
        return max(closed, key=lambda point: (point[0], -point[1]))  # of equals the sparsest

    (closed, share), (by_chance, share_of_chance) = best(switched), best(control)
    return (
        f"Switching {100 * share:.3g} % of the tokens closes {100 * closed:.0f} % of the gap "
        f"from {{host}} to {{intervention}}\n(random positions: {100 * by_chance:.0f} % with "
        f"{100 * share_of_chance:.3g} %)"
    )
