import itertools
import sys
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text

from steelyard.lab import plots


def curve(level: float, seeds: int, noise: float = 0.01) -> dict:
    steps = list(range(0, 1000, 50))
    generator = np.random.default_rng(0)
    values = {
        str(seed): (level + noise * generator.standard_normal(len(steps))).tolist()
        for seed in range(seeds)
    }
    return {"step": steps, "values": values}


def result(seeds: int = 3, **levels: float) -> dict:
    levels = levels or {"ppo": 1.0, "bpo": 2.0}
    claim = {
        "statement": "b is better than $a$ <script>",
        "verdict": "HOLDS",
        "effect": 1.0,
        "low": 0.5,
        "high": 1.5,
        "margin": 0.0,
    }
    absent = claim | {"verdict": "NOT RUN", "effect": None, "low": None, "high": None}
    single = claim | {"verdict": "UNDECIDED", "low": None, "high": None}
    curves = {f"control/Hopper/{m}": {"return": curve(v, seeds)} for m, v in levels.items()}
    return {"claims": [claim, absent, single], "curves": curves}


def texts(figure: Figure) -> str:
    figure.draw_without_rendering()
    return "\n".join(
        text.get_text() for text in figure.findobj(match=lambda a: hasattr(a, "get_text"))
    )


def drawn(content: dict, monkeypatch, tmp_path) -> dict[str, Figure]:
    """Draw, and hand back the figures in place of writing them."""
    figures = {}
    monkeypatch.setattr(
        plots, "_write", lambda figure, stem: figures.update({stem.name: figure}) or []
    )
    plots.draw_figures(content, None, tmp_path)
    return figures


def test_each_group_and_metric_and_the_claims_get_a_png_and_an_svg(tmp_path):
    content = result()
    content["curves"]["control/Ant/ppo"] = {"return": curve(1, 3), "kl": curve(0, 3)}
    extra = {"my figure": Figure()}
    files = plots.draw_figures(content, extra, tmp_path / "new")
    stems = ["claims", "control-Hopper-return", "control-Ant-return", "control-Ant-kl", "my-figure"]
    assert [f.name for f in files] == [
        f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")
    ]
    for file in files:
        assert file.read_bytes()[:4] == b"\x89PNG" or ET.parse(file).getroot().tag.endswith("svg")


def test_the_same_result_gives_the_same_bytes(tmp_path):
    first = plots.draw_figures(result(), None, tmp_path / "one")
    again = plots.draw_figures(result(), None, tmp_path / "two")
    assert [f.read_bytes() for f in first] == [f.read_bytes() for f in again]


def test_the_title_names_the_leader_and_both_values(monkeypatch, tmp_path):
    figure = drawn(result(), monkeypatch, tmp_path)["control-Hopper-return"]
    assert "control, Hopper: bpo ends with the highest return\n(bpo: 2.01, ppo: 1.01)" in texts(
        figure
    )


def test_the_title_claims_no_leader_where_bands_overlap(monkeypatch, tmp_path):
    content = result()
    content["curves"]["control/Hopper/ppo"]["return"] = curve(1.9, 3, noise=1.0)
    figure = drawn(content, monkeypatch, tmp_path)["control-Hopper-return"]
    assert "no clear leader" in texts(figure)


@pytest.mark.parametrize(
    ("seeds", "said"), [(1, "One seed."), (3, "range of the seeds"), (4, "95 % bootstrap")]
)
def test_the_figure_says_what_its_band_is(seeds, said, monkeypatch, tmp_path):
    assert said in texts(drawn(result(seeds), monkeypatch, tmp_path)["control-Hopper-return"])


def test_lines_carry_their_names_and_units_in_place_of_a_legend(monkeypatch, tmp_path):
    content = result() | {"units": {"step": "environment steps", "return": "reward per episode"}}
    figure = drawn(content, monkeypatch, tmp_path)["control-Hopper-return"]
    axes = figure.axes[0]
    assert {label.get_text() for label in axes.texts} == {"ppo", "bpo"}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("environment steps", "reward per episode")
    assert axes.get_legend() is None


def test_a_method_looks_the_same_in_every_figure(monkeypatch, tmp_path):
    content = result()
    content["curves"]["stability/Hopper/bpo"] = {"return": curve(1, 3)}
    figures = drawn(content, monkeypatch, tmp_path)
    colours = {
        name: {t.get_text(): t.get_color() for t in figure.axes[0].texts}
        for name, figure in figures.items()
    }
    assert colours["stability-Hopper-return"]["bpo"] == colours["control-Hopper-return"]["bpo"]


def test_labels_of_equal_ends_do_not_overlap(monkeypatch, tmp_path):
    levels = dict.fromkeys(["one", "two", "three", "four", "five"], 1.0)
    figure = drawn(result(3, **levels), monkeypatch, tmp_path)["control-Hopper-return"]
    figure.draw_without_rendering()
    boxes = sorted(
        (Text.get_window_extent(t) for t in figure.axes[0].texts), key=lambda box: box.y0
    )
    assert all(below.y1 <= above.y0 + 1 for below, above in itertools.pairwise(boxes))


def test_names_are_text_and_not_formulas(tmp_path):
    content = result(3, **{"a$b_{$c": 1.0})
    assert plots.draw_figures(content, None, tmp_path)


def test_lines_differ_in_grey():
    def grey(colour: str) -> float:
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        return 0.299 * red + 0.587 * green + 0.114 * blue

    looks = [(grey(c), str(plots.DASHES[i % 5])) for i, c in enumerate(plots.COLOURS)]
    for i, (tone, dash) in enumerate(looks):
        assert all(abs(tone - t) > 8 or dash != d for t, d in looks[i + 1 :])


def test_an_empty_result_draws_nothing(tmp_path):
    assert plots.draw_figures({"claims": [], "curves": {}}, None, tmp_path) == []
    empty = {"a/b": {"loss": {"step": [], "values": {}}}}
    assert plots.draw_figures({"claims": [], "curves": empty}, None, tmp_path) == []


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.01, 0.2))
def test_spread_keeps_order_and_gap_and_moves_nothing_that_has_room(places, gap):
    moved = plots.spread(places, gap=gap)
    ranked = sorted(zip(places, moved, strict=True))
    ordered = sorted(moved)
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(ordered))
    if len(set(places)) == len(places):
        assert [m for _, m in ranked] == ordered
    if all(b - a >= gap for (a, _), (b, _) in itertools.pairwise(ranked)):
        assert moved == pytest.approx(places, abs=1e-9)
    assert np.mean(moved) == pytest.approx(np.mean(places), abs=1e-9)


def test_drawing_needs_no_pyplot_and_leaves_the_settings_alone(monkeypatch, tmp_path):
    before = {name: matplotlib.rcParams[name] for name in plots.STYLE}
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would fail
    assert plots.draw_figures(result(), None, tmp_path)
    assert {name: matplotlib.rcParams[name] for name in plots.STYLE} == before
