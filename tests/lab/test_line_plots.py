"""Lines and paths: every series is drawn and named once, whatever is missing."""

import numpy as np
import pytest

from steelyard.lab.line_plots import draw_lines, draw_paths


def labels(figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_a_series_has_one_look_and_one_entry_in_all_panels():
    old, new = {10.0: [1.0], 100.0: [0.5]}, {10.0: [0.9]}
    figure = draw_lines({"a": {"old": old, "new": new}, "b": {"new": new}}, "rows", "error", "t")
    assert labels(figure) == ["old", "new"]
    first, second = figure.axes
    assert first.lines[1].get_color() == second.lines[0].get_color()
    assert first.get_xscale() == "log"


def test_a_line_is_the_interquartile_mean_over_seeds_and_skips_empty_places():
    figure = draw_lines({"a": {"x": {1.0: [1.0, 2.0, 6.0], 2.0: [], 3.0: [5.0]}}}, "n", "y", "t")
    (line,) = figure.axes[0].lines
    np.testing.assert_allclose(line.get_xydata(), [[1.0, 2.5], [3.0, 5.0]])
    assert figure.legends == []


def test_a_series_without_any_value_is_left_out():
    figure = draw_lines({"a": {"none": {1.0: []}, "one": {1.0: [2.0]}}}, "n", "y", "t")
    assert [line.get_label() for line in figure.axes[0].lines] == ["one"]


def test_a_reference_and_logarithmic_values_are_drawn_on_demand():
    panel = {"a": {"x": {1.0: [1.0], 2.0: [10.0]}}}
    figure = draw_lines(panel, "n", "y", "t", reference=4.0, log_x=False, log_y=True)
    axes = figure.axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "log")
    assert list(axes.lines[-1].get_ydata()) == [4.0, 4.0]


def test_paths_name_each_group_once_and_the_faint_one_is_thin():
    groups = {"zero": [[0.0, 0.1], [0.0, 0.2]], "real": [[0.0, 0.9]]}
    figure = draw_paths([1.0, 0.1], groups, "penalty", "slope", "t", faint="zero")
    axes = figure.axes[0]
    assert labels(figure) == ["zero", "real"]
    assert axes.lines[0].get_linewidth() < axes.lines[2].get_linewidth()
    left, right = axes.get_xlim()
    assert left > right > 0


def test_a_path_of_another_length_is_refused():
    with pytest.raises(ValueError, match="shape"):
        draw_paths([1.0, 0.1], {"a": [[1.0]]}, "penalty", "slope", "t")
