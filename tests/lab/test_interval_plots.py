"""What the figures show of the numbers that they are given."""

import io

import numpy as np
import pytest

from steelyard.lab.interval_plots import (
    Interval,
    draw_bars,
    draw_frontiers,
    draw_intervals,
    over_seeds,
    read_intervals,
    seed_rows,
)


def image(figure):
    """Bytes of the drawing: fails where a figure cannot be drawn."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=30)
    return file.getvalue()


def spans(axes):
    """Ends of all horizontal lines of an interval, from top to bottom, by series."""
    return [
        [tuple(float(x) for x in segment[:, 0]) for segment in collection.get_segments()]
        for collection in axes.collections
    ]


def test_few_seeds_show_their_range_and_many_an_interval_inside_it():
    assert over_seeds([3.0]) == Interval(3.0, 3.0, 3.0)
    assert over_seeds([1.0, 5.0])[1:] == (1.0, 5.0)
    values = list(np.random.default_rng(0).normal(size=40))
    found = over_seeds(values)
    assert min(values) < found.low < found.value < found.high < max(values)


def test_rows_leave_out_what_was_not_measured():
    seeds = [{"a/x": 1.0, "b/x": 2.0, "b/y": 0.0}, {"a/x": 3.0, "b/x": 2.0, "b/y": 4.0}]
    rows = seed_rows(seeds, {"A": "a", "B": "b"}, ["x", "y"])
    assert list(rows) == ["A", "B"]
    assert rows["A"] == {"x": Interval(2.0, 1.0, 3.0)}
    assert rows["B"]["y"] == Interval(2.0, 0.0, 4.0)


def test_reading_intervals_keeps_their_order_and_ignores_other_metrics():
    metrics = {"p/other": 1.0, "q/a/x/value": 9.0}
    for place, row in enumerate(("b", "a")):
        metrics |= {f"p/{row}/one/two/{end}": place for end in ("value", "low", "high")}
    assert list(read_intervals(metrics, "p").items()) == [
        ("b", {"one/two": Interval(0, 0, 0)}),
        ("a", {"one/two": Interval(1, 1, 1)}),
    ]


def test_bars_have_their_values_and_lines_their_ends():
    bars = {"low": Interval(-1.0, -2.0, -0.5), "high": Interval(0.5, 0.1, 0.9)}
    figure = draw_bars({"income": bars, "age": {"all": Interval(0.2, 0.0, 0.4)}}, "WoE", "title")
    first, second = figure.axes
    assert [patch.get_width() for patch in first.patches] == [-1.0, 0.5]
    assert first.patches[0].get_facecolor() != first.patches[1].get_facecolor()
    assert spans(first) == [[(-2.0, -0.5), (0.1, 0.9)]]
    assert [label.get_text() for label in first.get_yticklabels()] == ["low", "high"]
    assert first.yaxis_inverted()  # the first bar is on top
    assert len(second.patches) == 1
    assert image(figure)


def test_intervals_of_a_series_lie_at_the_rows_that_have_it():
    rows = {
        "A": {"old": Interval(0.5, 0.4, 0.6), "new": Interval(0.2, 0.1, 0.3)},
        "B": {"new": Interval(0.7, 0.6, 0.8)},
    }
    figure = draw_intervals(rows, "share", "title", "note", reference=0.05, marks={"A": 0.55})
    (axes,) = figure.axes
    old, new, mark = spans(axes)
    assert old == [(0.4, 0.6)]
    assert new == [(0.1, 0.3), (0.6, 0.8)]
    assert mark == [(0.55, 0.55)]
    points = {line.get_label(): line.get_xdata() for line in axes.lines}
    assert list(points["new"]) == [0.2, 0.7]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["old", "new"]
    bottom, top = axes.get_ylim()
    assert bottom > top  # the first row is on top
    assert image(figure)


def test_one_series_needs_no_legend():
    assert not draw_intervals({"A": {"": Interval(1, 0, 2)}}, "x", "title").legends


@pytest.mark.parametrize("cases", [1, 3])
def test_frontiers_have_a_panel_for_each_case_and_each_name_once(cases):
    points = [(Interval(0, 0, 0), Interval(1, 1, 1)), (Interval(2, 1, 4), Interval(3, 2, 3.5))]
    panels = {f"case {k}": {"ours": points, "peer": points[::-1]} for k in range(cases)}
    figure = draw_frontiers(panels, "cost", "gain", "title")
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(panels)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ours", "peer"]
    line = figure.axes[0].lines[0]
    assert list(line.get_xdata()) == [0, 2]
    assert list(line.get_ydata()) == [1, 3]
    assert image(figure)
