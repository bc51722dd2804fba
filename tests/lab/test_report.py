import json
import re
from html.parser import HTMLParser

import pytest

from steelyard.lab import report
from steelyard.recipes import catalog

VOID = {"meta", "img", "br", "link", "input"}
EVIL = "<script>alert('x')</script>"


def claim(verdict: str = "HOLDS", **changes: object) -> dict:
    return {
        "statement": "b is better than a",
        "source": "Fig. 1",
        "metric": "b",
        "baseline": "a",
        "direction": "higher",
        "margin": 0.0,
        "verdict": verdict,
        "effect": 1.5,
        "low": 1.0,
        "high": 2.0,
        "seeds": 3,
        "note": "",
    } | changes


def result(**changes: object) -> dict:
    return {
        "recipe": "mine",
        "title": "A study",
        "form": "quick",
        "config": {"learning_rate": 3e-4, "epochs": [4, 20], "normalize": False},
        "seeds": [0, 1, 2],
        "versions": {"torch": "2.13.0"},
        "machine": {"cores": 2},
        "started": "2026-01-01T00:00:00+00:00",
        "wall_seconds": 42.0,
        "steps": 1000,
        "steps_per_second": 50.0,
        "metrics": {"0": {"a": 1.0, "b": 2.5}, "1": {"a": 2.0, "b": 3.5}, "2": {"b": 4.5}},
        "claims": [claim()],
        "curves": {"g/m": {"loss": {"step": [0, 1], "values": {"0": [1.0, 0.5]}}}},
    } | changes


class Page(HTMLParser):
    """Collects tags, texts, and every address that a browser would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


@pytest.fixture
def page(tmp_path):
    def render(*results: dict, figures: dict | None = None) -> Page:
        out = tmp_path / "folder" / "report.html"
        report.render_report(list(results), out, figures=figures)
        return Page(out.read_text(encoding="utf-8"))

    return render


def test_every_tag_is_closed(page):
    assert page(result(), result(recipe="bpo")).open == []


def test_the_scoreboard_has_every_system_without_any_result(page):
    text = page().text
    assert all(system.name in text for system in catalog.SYSTEMS)
    assert "35 systems" in text


def test_a_result_shows_claim_effect_seeds_time_and_metrics(page):
    text = page(result()).text
    for part in ("b is better than a", "HOLDS", "+1.5 [1, 2]", "42 s", "2.5", "n/a", "torch"):
        assert part in text


def test_verdicts_without_numbers_show(page):
    nothing = claim("NOT RUN", effect=None, low=None, high=None, seeds=0, note="not run")
    few = claim("UNDECIDED", low=None, high=None, seeds=1, note="1 of at least 3 seeds")
    text = page(result(claims=[nothing, few])).text
    assert "NOT RUN" in text
    assert "1 of at least 3 seeds" in text


def test_failed_seeds_are_named(page):
    assert "Seed 2 failed: killed" in " ".join(page(result(failed={"2": "killed"})).text.split())


def test_texts_are_escaped_wherever_they_come_from(page):
    evil = result(
        recipe=EVIL,
        title=EVIL,
        form=EVIL,
        config={EVIL: EVIL},
        versions={EVIL: EVIL},
        metrics={EVIL: {EVIL: 1.0}},
        claims=[claim(**dict.fromkeys(("statement", "source", "metric", "note"), EVIL))],
        failed={"0": EVIL},
    )
    parsed = page(evil, figures={EVIL: []})
    assert "script" not in parsed.tags
    assert EVIL in parsed.text


def test_figures_are_inside_the_page_and_nothing_is_loaded(page, tmp_path):
    svg, png, other = (tmp_path / name for name in ("a.svg", "a.png", "b.png"))
    svg.write_text("<svg onload='alert(1)'/>")
    png.write_bytes(b"png")
    other.write_bytes(b"png")
    parsed = page(result(), figures={"mine": [png, svg, other]})
    assert [load.split(",")[0] for load in parsed.loads] == [
        "data:image/svg+xml;base64",
        "data:image/png;base64",
    ]


def test_the_page_needs_no_network_and_fits_light_dark_and_phones(page, tmp_path):
    page(result())
    html = (tmp_path / "folder" / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=[\"']?(https?:)?//|url\(|@import", html)
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def test_two_forms_of_a_recipe_keep_their_own_figures(page, tmp_path):
    quick, full = tmp_path / "q.png", tmp_path / "f.png"
    quick.write_bytes(b"q")
    full.write_bytes(b"f")
    parsed = page(
        result(), result(form="full"), figures={"mine-quick": [quick], "mine-full": [full]}
    )
    assert len(set(parsed.loads)) == 2


def test_the_command_gives_every_flag_of_a_file_of_the_users():
    assert report.command(result()) == (
        "steelyard run mine.py --seeds 3 --learning-rate 0.0003 --epochs 4 20 --no-normalize"
    )
    full = result(form="full", config={"name": "a b", "on": True, "rest": None})
    assert report.command(full) == (
        "steelyard run mine.py --full --seeds 3 --name 'a b' --on --rest None"
    )


def write(path, **changes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result(**changes)))
    return path


def test_results_are_found_in_runs_folders_and_copies(tmp_path):
    run = write(tmp_path / "runs" / "one" / "result.json")
    copied = write(tmp_path / "results" / "mine" / "full.json")
    (tmp_path / "results" / "mine" / "notes.json").write_text("{}")
    assert report.find_results([tmp_path / "runs"]) == [run]
    assert report.find_results([tmp_path / "runs" / "one", run]) == [run]
    assert report.find_results([tmp_path / "results"]) == [copied]
    with pytest.raises(FileNotFoundError, match="there is no"):
        report.find_results([tmp_path / "absent"])


def test_of_two_runs_the_newer_is_shown_with_its_figures(tmp_path):
    old = write(tmp_path / "old" / "result.json", title="older")
    new = write(tmp_path / "new" / "result.json", title="newer", started="2026-02-02")
    out = tmp_path / "report.html"
    assert report.render_results([old, new], out) == [new]
    parsed = Page(out.read_text(encoding="utf-8"))
    assert "newer" in parsed.text
    assert "older" not in parsed.text
    assert len(parsed.loads) == 2  # drawn again: the claims and the curve


@pytest.mark.parametrize("content", ["", "[]", '{"recipe": "mine"}'])
def test_what_is_not_a_result_is_an_error_naming_the_file(content, tmp_path):
    file = tmp_path / "result.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"result\.json is not"):
        report.read_result(file)
