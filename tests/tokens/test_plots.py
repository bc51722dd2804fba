"""Heat maps show text and never obey it; curves say what they found."""

import io
import itertools
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rich.console import Console
from scipy.stats import binomtest

from steelyard.tokens import (
    CrossSamplingCurve,
    heat_map_html,
    heat_map_text,
    plot_cross_sampling,
    plot_js_percentiles,
)
from steelyard.tokens._heat_maps import _ink, _paper
from steelyard.tokens.plots import wilson_interval

HOSTILE = (
    "<script>alert(1)</script>",
    '" onmouseover="x',
    "'><img src=http://x>",
    "&amp;",
    "[bold red]no markup[/]",
    "\x1b[31mred\x1b[0m",
    "\u202ereversed",
    "\x00",
    "{title}",
    "a\nb\tc",
)


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.names, self.text = set(), set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text.append(data)


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_html_escapes_every_text_and_loads_nothing():
    js = torch.linspace(0, math.log(2), len(HOSTILE))
    page = heat_map_html(HOSTILE, js, title="<b>title</b>")
    tags = Tags()
    tags.feed(page)
    assert tags.tags == {
        *("html", "head", "meta", "title", "style", "body", "h1", "p", "span"),
        *("details", "summary", "table", "tr", "th", "td"),
    }
    assert tags.names <= {
        "lang",
        "charset",
        "http-equiv",
        "content",
        "name",
        "style",
        "class",
        "title",
    }
    assert "http" not in page.replace("http-equiv", "").replace("http://x", "")
    assert "default-src 'none'" in page
    text = "".join(tags.text)
    assert "<b>title</b>" in text
    for token in HOSTILE[:5]:
        assert text.count(token) >= 2  # in the response and in the table
    assert "\x1b" not in page
    assert "\x00" not in page
    assert "\u202e" not in page
    assert r"\x1b[31mred" in text
    assert r"\u202ereversed" in text


def test_html_counts_the_high_tokens_and_holds_all_numbers():
    page = heat_map_html(["a", "b", "c"], torch.tensor([0.0, 0.1, 0.25]))
    assert "1 of 3 tokens have a divergence above 0.1 nats" in page
    assert page.count("class=high") == 1
    assert re.findall(r"<td>(0\.\d+)</td>", page) == ["0.0000", "0.1000", "0.2500"]


def test_terminal_text_cannot_steer_the_terminal():
    text = heat_map_text(HOSTILE, torch.full((len(HOSTILE),), 0.3))
    assert "[bold red]no markup[/]" in text.plain
    stream = io.StringIO()
    Console(file=stream, force_terminal=True, color_system="truecolor", width=500).print(text)
    written = stream.getvalue()
    escapes = re.findall(r"\x1b[^m]*m", written)
    assert "\x1b[31m" not in escapes  # the token's own
    assert all(re.fullmatch(r"\x1b\[[\d;]*m", escape) for escape in escapes)
    assert r"\x1b[31mred\x1b[0m" in re.sub(r"\x1b\[[\d;]*m", "", written)
    assert "\u202e" not in written
    assert "\x00" not in written


def test_high_tokens_show_without_colour():
    text = heat_map_text(["low", "high"], torch.tensor([0.1, 0.11]))
    assert ["bold underline" in str(span.style) for span in text.spans] == [False, True]


def test_colours_darken_with_the_divergence_and_stay_readable():
    steps = [math.log(2) * (i / 200) ** 2 for i in range(201)]
    papers = [_paper(js) for js in steps]
    lights = [luminance(paper) for paper in papers]
    assert all(a >= b for a, b in itertools.pairwise(lights))
    assert lights[0] == 1.0
    assert lights[-1] < 0.1
    # 4.5 is what the accessibility guidelines ask of body text.
    assert min(contrast(_ink(js), paper) for js, paper in zip(steps, papers, strict=True)) > 4.5
    assert _paper(-1e-9) == _paper(0.0)
    assert _paper(0.7) == _paper(math.log(2))


@pytest.mark.parametrize("draw", [heat_map_text, heat_map_html])
@pytest.mark.parametrize(
    ("tokens", "js", "error", "message"),
    [
        (["a"], torch.zeros(2), ValueError, "tokens must be as many as js, 2, got 1"),
        ("ab", torch.zeros(2), TypeError, "tokens must be a sequence of strings"),
        ([1], torch.zeros(1), TypeError, "tokens must be a sequence of strings"),
        ([], torch.zeros(0), ValueError, "js must not be empty"),
        (["a"], torch.zeros(1, 1), ValueError, "js must have shape"),
        (["a"], torch.zeros(1).long(), TypeError, "js must have a floating"),
        (["a"], torch.tensor([math.nan]), ValueError, "js must not be NaN"),
    ],
)
def test_errors_of_the_heat_maps_name_the_argument(draw, tokens, js, error, message):
    with pytest.raises(error, match=message):
        draw(tokens, js)
    if draw is heat_map_html and error is TypeError and tokens == [1]:
        with pytest.raises(TypeError, match="title must be a string"):
            draw(["a"], torch.zeros(1), title=3)


def drawn(figure):
    FigureCanvasAgg(figure).draw()
    return figure.axes[0]


def test_percentile_curve_passes_through_the_percentiles():
    js = torch.rand(3, 2001, generator=torch.Generator().manual_seed(0)).square() * 0.6
    figure = plot_js_percentiles({"RL": js, "SFT": js[:1] / 2})
    axes = drawn(figure)
    line = axes.lines[1]
    for percentile in (0, 25, 50, 90, 100):
        x, y = line.get_data()
        at = min(range(len(x)), key=lambda i: abs(x[i] - percentile))
        expected = torch.quantile(js.flatten(), percentile / 100).item()
        assert y[at] == pytest.approx(expected, abs=2e-3)
    assert "RL" in axes.get_title(loc="left")
    assert {text.get_text() for text in axes.texts} == {"RL", "SFT"}
    assert axes.get_ylim() == (0.0, math.log(2))


def test_percentile_curve_takes_zeros_and_single_values():
    axes = drawn(plot_js_percentiles({"same": torch.zeros(5), "one": torch.tensor([0.2])}))
    title = axes.get_title(loc="left")
    assert title == "same: 0 % of the positions moved by more than 0.1 nats\n(one: 100 %)"
    for curves, message in (
        ({}, "curves must not be empty"),
        ({"x": torch.zeros(0)}, "must not be empty"),
        ({"x": torch.tensor([math.nan])}, "must not hold NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            plot_js_percentiles(curves)


def test_cross_sampling_plot_states_both_recoveries_and_draws_both_lines():
    rule = CrossSamplingCurve([0.129, 0.0, 0.085], [0.95, 0.31, 0.76])
    random = CrossSamplingCurve([0.0, 0.126], [0.31, 0.385])
    figure = plot_cross_sampling(
        rule, random, host_success=0.31, intervention_success=0.91, samples=200
    )
    axes = drawn(figure)
    title = axes.get_title(loc="left")
    assert title == (
        "Switching 12.9 % of the tokens closes 107 % of the gap from base to RL\n"
        "(random positions: 12 % with 12.6 %)"
    )
    assert {"largest divergence", "random positions", "base", "RL"} == {
        text.get_text() for text in axes.texts
    }
    shown = [line.get_data() for line in axes.lines if len(line.get_xdata()) == 3]
    assert list(shown[0][0]) == pytest.approx([0.0, 8.5, 12.9])
    assert "200 responses" in figure._supxlabel.get_text()


def test_backward_plot_closes_the_gap_downwards():
    rule = CrossSamplingCurve([0.0, 0.1], [0.9, 0.3])
    random = CrossSamplingCurve([0.0, 0.1], [0.9, 0.9])
    figure = plot_cross_sampling(
        rule, random, host_success=0.9, intervention_success=0.3, host="RL", intervention="base"
    )
    title = drawn(figure).get_title(loc="left")
    assert title == (
        "Switching 10 % of the tokens closes 100 % of the gap from RL to base\n"
        "(random positions: 0 % with 0 %)"
    )
    level = plot_cross_sampling(rule, random, host_success=0.5, intervention_success=0.5)
    assert "equally often" in drawn(level).get_title(loc="left")


def test_names_with_braces_are_not_a_format():
    curve = CrossSamplingCurve([0.1], [0.5])
    figure = plot_cross_sampling(
        curve, curve, host_success=0.2, intervention_success=0.8, host="{x}", intervention="{0}"
    )
    assert "from {x} to {0}" in drawn(figure).get_title(loc="left")


def test_errors_of_the_curves_name_the_argument():
    good = CrossSamplingCurve([0.1], [0.5])
    ends = {"host_success": 0.1, "intervention_success": 0.9}
    for bad, message in (
        (CrossSamplingCurve([], []), "switched must have as many"),
        (CrossSamplingCurve([0.1, 0.2], [0.5]), "switched must have as many"),
        (CrossSamplingCurve([10.0], [0.5]), r"switched\.share_switched must be"),
        (CrossSamplingCurve([0.1], [math.nan]), r"switched\.success must be"),
    ):
        with pytest.raises(ValueError, match=message):
            plot_cross_sampling(bad, good, **ends)
    with pytest.raises(ValueError, match="host_success"):
        plot_cross_sampling(good, good, host_success=2.0, intervention_success=0.9)
    with pytest.raises(ValueError, match="samples"):
        plot_cross_sampling(good, good, samples=0, **ends)


def test_wilson_interval_is_that_of_scipy():
    for wins, samples in ((0, 10), (3, 10), (100, 100), (37, 211)):
        expected = binomtest(wins, samples).proportion_ci(method="wilson")
        assert wilson_interval(wins / samples, samples) == pytest.approx(expected, abs=1e-6)


def test_importing_the_package_loads_no_plotting_and_no_transformers():
    code = (
        "import steelyard.tokens, sys; "
        "print({'matplotlib', 'rich', 'transformers'} & {n.partition('.')[0] for n in sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "set()"


def test_a_curve_of_another_kind_is_named():
    curve = CrossSamplingCurve([0.0, 0.1], [0.3, 0.9])
    with pytest.raises(TypeError, match="control must be a CrossSamplingCurve, got str"):
        plot_cross_sampling(curve, "text", host_success=0.3, intervention_success=0.9)
