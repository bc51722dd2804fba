import base64
import hashlib
import http.client
import json
import os
import re
import threading
import time
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from urllib.parse import unquote

import pytest

from steelyard.cli import main
from steelyard.lab import _report_server, index, report
from steelyard.lab._report_figures import figures_beside
from steelyard.lab._report_live import read_unfinished
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
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name == "href"]
        self.ids += [value for name, value in attrs if name == "id"]
        self.loads += [value for name, value in attrs if name in ("src", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
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
    assert parsed.tags.count("script") == 1  # our own
    assert parsed.text.count(EVIL) > 10
    assert [link for link in parsed.links if "script" in link] == []


def test_figures_are_inside_the_page_and_nothing_is_loaded(page, tmp_path):
    svg, png, other = (tmp_path / name for name in ("a.svg", "a.png", "b.png"))
    svg.write_text("<svg onload='alert(1)'/>")
    png.write_bytes(b"png")
    other.write_bytes(b"png")
    parsed = page(result(), figures={"mine": [png, svg, other]})
    assert [load.split(",")[0] for load in parsed.loads] == [
        "data:image/svg+xml;charset=utf-8",
        "data:image/png;base64",
    ]


def read(path):
    return path.read_text(encoding="utf-8")


def test_a_figure_is_embedded_as_it_is(page, tmp_path):
    svg = tmp_path / "a.svg"
    svg.write_text(
        '<svg><!-- who -->\n<path id=\'a\' d="M 0\n1" style="fill: #fff"/>&amp; 5% é</svg>'
    )
    (source,) = page(result(), figures={"mine": [svg]}).loads
    embedded = unquote(source.partition(",")[2])
    assert embedded == '<svg> <path id=\'a\' d="M 0 1" style="fill: #fff"/>&amp; 5% é</svg>'
    assert not set(source) & set("<>'&#\n")
    svg.write_bytes(b"<svg>\xff</svg>")  # not UTF-8: untouched
    (source,) = page(result(), figures={"mine": [svg]}).loads
    assert base64.b64decode(source.partition(",")[2]) == b"<svg>\xff</svg>"


def test_the_page_needs_no_network_and_forbids_it(page, tmp_path):
    parsed = page(result())
    html = read(tmp_path / "folder" / "report.html")
    assert html.startswith("<!doctype html>")
    assert not re.search(r"src=[\"']?(https?:)?//|url\(|@import", html)
    assert all(link.startswith(("#", "data:", "https://arxiv.org/abs/")) for link in parsed.links)
    script = re.search(r"<script>(.*)</script>", html, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert f"script-src 'sha256-{digest}'" in policy
    assert "connect-src 'none'" in policy


def test_every_link_in_the_page_has_its_place_and_no_place_is_twice_there(page):
    parsed = page(result(), result(recipe="bpo"), result(recipe=EVIL))
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert {link[1:] for link in parsed.links if link.startswith("#")} <= set(parsed.ids)
    assert {f"system-{system.name}" for system in catalog.SYSTEMS} <= set(parsed.ids)


# --- colours -----------------------------------------------------------------------------------

STYLE = read(Path(report.__file__).with_name("templates") / "report.css")
# What is written on what: every colour of a text, on every ground that it can lie on.
TEXTS = ("text", "dim", "link", "holds", "fails", "undecided")
GROUNDS = ("page", "card")
MORE = (("text", "accent"),)
BORDERS = tuple(product(("edge",), GROUNDS))


def themes():
    """The lists of colours in the style: light, dark by choice, dark by the system, print."""
    blocks = re.findall(r"color-scheme: (light|dark);([^}]*)}", STYLE)
    return [(name, dict(re.findall(r"--(\w+): (#\w+);", block))) for name, block in blocks]


def luminance(colour):
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    channels = (int(digits[start : start + 2], 16) / 255 for start in (0, 2, 4))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first, second):
    low, high = sorted(map(luminance, (first, second)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_the_published_formula():
    assert contrast("#000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.478, abs=1e-3)  # the known near miss


def test_every_text_has_the_contrast_that_wcag_asks_for():
    found = themes()
    assert [name for name, _ in found] == ["light", "dark", "dark", "light"]
    assert found[1] == found[2]  # chosen or by the system: the same colours
    for _, colours in found:
        for text, ground in (*product(TEXTS, GROUNDS), *MORE):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        for line, ground in BORDERS:  # of controls, and the ring of the focus
            assert contrast(colours[line], colours[ground]) >= 3, (line, ground)


def test_no_colour_of_the_style_is_left_out_of_the_contrast_test():
    rules = re.sub(r"--\w+: #\w+;", "", STYLE)
    assert set(re.findall(r"[^-]color: var\(--(\w+)\)", rules)) == set(TEXTS)
    assert set(re.findall(r"background: var\(--(\w+)\)", rules)) == {*GROUNDS, "accent"}
    assert set(re.findall(r"#[0-9a-fA-F]{3,8}\b(?=[;\s])", rules)) <= {"#fff"}  # under figures


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
    part = write(tmp_path / "results" / "bpo" / "control-ant.json")
    (tmp_path / "results" / "mine" / "notes.json").write_text("{}")
    assert report.find_results([tmp_path / "runs"]) == [run]
    assert report.find_results([tmp_path / "runs" / "one", run]) == [run]
    assert report.find_results([tmp_path / "results"]) == [part, copied]
    assert report.find_results([tmp_path / "results" / "bpo"]) == [part]
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


def test_a_result_of_the_wrong_types_is_an_error_naming_the_field(tmp_path):
    file = write(tmp_path / "result.json", recipe=["../../x"])
    with pytest.raises(ValueError, match=r"'recipe' must be a str, got list"):
        report.read_result(file)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"recipe":' * 100_000])
def test_brackets_without_end_are_an_error_naming_the_file(content, tmp_path):
    file = tmp_path / "result.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"result\.json is not JSON"):
        report.read_result(file)


def test_a_huge_result_is_refused_before_it_is_read(tmp_path):
    file = write(tmp_path / "result.json")
    with file.open("ab") as opened:
        opened.truncate(report.MAX_BYTES + 1)  # a hole: takes no room
    with pytest.raises(ValueError, match=r"is larger than"):
        report.read_result(file)


def test_a_recipe_named_like_a_path_reaches_no_other_folder(tmp_path):
    name = "../../escaped"
    curves = {name: {"../loss": {"step": [1, 2], "values": {"0": [1.0, 2.0]}}}}
    file = write(tmp_path / "in" / "result.json", recipe=name, curves=curves)
    before = set(tmp_path.rglob("*"))
    out = tmp_path / "report.html"
    report.render_results([file], out)
    assert set(tmp_path.rglob("*")) - before == {out}


# --- the scoreboard ----------------------------------------------------------------------------


def board(html: str) -> list[list[str]]:
    """The rows of the scoreboard as lists of their cells' texts."""
    table = re.search(r'<table id="board".*?</table>', html, re.S)[0]
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", table, re.S)[1:]
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in rows]
    return [[re.sub("<[^>]*>", "", cell).strip() for cell in row] for row in cells]


@pytest.fixture
def rows(tmp_path):
    def render(*results: dict) -> dict[str, list[list[str]]]:
        report.render_report(list(results), tmp_path / "r.html")
        found: dict[str, list[list[str]]] = {}
        for name, *rest in board(read(tmp_path / "r.html")):
            found.setdefault(name, []).append(rest)
        return found

    return render


def test_the_scoreboard_names_the_field_of_every_system_and_says_what_is_missing(rows):
    found = rows()
    assert list(found) == [system.name for system in catalog.SYSTEMS]
    for system in catalog.SYSTEMS:
        ((field, title, said, *_),) = found[system.name]
        assert (field, title) == (system.package.replace("_", " "), system.title)
        assert said in ("no result", *catalog.STATUSES[1:])


def test_a_claim_stands_once_from_the_result_that_judged_it(rows):
    first, second = claim(statement="first"), claim(statement="second")
    left = {"verdict": "NOT RUN", "effect": None, "low": None, "high": None, "seeds": 0}
    stability = result(recipe="bpo", form="full", claims=[first, second | left])
    control = result(recipe="bpo", form="full", claims=[first | left, second | {"effect": -2.0}])
    quick = result(recipe="bpo", claims=[first | {"effect": 9.0}, second | {"effect": 9.0}])
    found = rows(quick, control, stability)["bpo"]
    assert sorted(row[1:4] for row in found) == [
        ["first", "HOLDS", "+1.5 [1, 2]"],
        ["second", "HOLDS", "-2 [1, 2]"],
    ]


def test_another_recipe_of_a_system_stands_with_it(page, rows):
    found = rows(result(recipe="gbpo"), result(recipe="bpo"))
    assert list(found)[:3] == ["bpo", "gbpo", "token-shift"]
    assert found["gbpo"][0][0] == "policy"
    assert len(found) == 36
    assert "own-1" not in page(result(recipe="gbpo")).ids


def test_a_recipe_of_the_users_comes_last(rows):
    name, found = list(rows(result()).items())[-1]
    assert name == "mine"
    assert found[0][0] == "your recipe"


def test_a_result_without_claims_says_so(rows):
    assert rows(result(recipe="bpo", claims=[]))["bpo"][0][2] == "run, no claim"


def test_a_figure_belongs_to_the_result_it_is_named_after(tmp_path):
    for name in ("full", "control", "control-ant"):
        write(tmp_path / f"{name}.json")
    (tmp_path / "figures").mkdir()
    for name in ("claims", "control-return", "control-ant-return", "controlled"):
        (tmp_path / "figures" / f"{name}.svg").write_text("<svg/>")

    def names(of: str) -> list[str]:
        return [path.stem for path in figures_beside(tmp_path / f"{of}.json", whole=False)]

    assert names("control") == ["control-return"]
    assert names("control-ant") == ["control-ant-return"]
    assert names("full") == ["claims", "controlled"]


def test_results_that_differ_in_settings_or_seeds_are_all_shown(tmp_path):
    files = [
        write(tmp_path / "a" / "result.json"),
        write(tmp_path / "b" / "result.json", config={"epochs": 1}),
        write(tmp_path / "c" / "result.json", seeds=[0], metrics={"0": {"a": 1.0}}),
    ]
    for file in files:  # drawn already, so that the test need not
        (file.parent / "figures").mkdir()
        (file.parent / "figures" / "claims.svg").write_text("<svg/>")
    assert report.render_results(files, tmp_path / "r.html") == files


# --- runs that go on ---------------------------------------------------------------------------


def begin(folder, recipe="adora", seeds=(0, 1), trial="train/grpo"):
    """Write a run's folder as it is while the first seed has finished and the second works."""
    folder.mkdir(parents=True)
    setup = {"recipe": recipe, "form": "quick", "seeds": list(seeds), "started": "2026-01-01"}
    (folder / "config.json").write_text(json.dumps(setup))
    (folder / "clock.json").write_text(json.dumps({"wall_seconds": 90.0}))
    log = folder / "seeds" / str(seeds[-1]) / trial / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": 1 / step}) for step in (1, 2, 3)]
    log.write_text("\n".join(lines) + '\n{"step": 4, "lo')
    for seed in seeds[:-1]:
        done = folder / "seeds" / str(seed) / "result.json"
        done.parent.mkdir(parents=True)
        done.write_text(json.dumps({"seed": seed, "metrics": {"share/amplify/hard_share": 0.5}}))
    return folder


def test_a_run_that_goes_on_shows_its_seeds_its_last_whole_row_and_a_curve(tmp_path):
    folder = begin(tmp_path / "runs" / "one")
    assert report.find_unfinished([tmp_path / "runs"]) == [folder]
    assert report.find_unfinished([folder]) == [folder]
    (run,) = read_unfinished([folder])
    assert run["running"]
    assert (run["finished"], [seed["state"] for seed in run["seeds"]]) == (1, ["finished", "begun"])
    (trial,) = run["seeds"][1]["trials"]
    assert (trial["name"], trial["step"], trial["values"]) == ("train/grpo", 3, {"loss": 1 / 3})
    assert len(trial["line"].split()) == 3
    old = time.time() - 100
    os.utime(folder / "clock.json", (old, old))
    assert not read_unfinished([folder])[0]["running"]


def test_claims_on_the_finished_seeds_are_judged(tmp_path):
    folder = begin(tmp_path / "one", seeds=(0, 1, 2, 3))
    for seed in range(3):
        metrics = {"share/amplify/hard_share": 0.5, "share/grpo/hard_share": 0.4 - seed / 100}
        done = folder / "seeds" / str(seed) / "result.json"
        done.write_text(json.dumps({"seed": seed, "metrics": metrics}))
    (row,) = read_unfinished([folder])[0]["claims"]
    assert (row["verdict"], row["seeds"]) == ("HOLDS", 3)


def test_a_run_is_unfinished_until_its_result_is_newer_than_its_clock(tmp_path):
    folder = begin(tmp_path / "one")
    write(folder / "result.json")
    later = time.time() + 10
    os.utime(folder / "result.json", (later, later))
    assert report.find_unfinished([folder]) == []
    os.utime(folder / "clock.json", (later + 1, later + 1))
    assert report.find_unfinished([folder]) == [folder]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"recipe": "x", "seeds": 3}'])
def test_a_folder_that_says_nothing_useful_is_passed_over(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    assert read_unfinished([tmp_path]) == []


def test_names_in_a_run_that_goes_on_are_escaped(tmp_path):
    folder = begin(tmp_path / "<img src=x>", recipe=EVIL, trial="<b>&")
    log = folder / "seeds" / "1" / "<b>&" / "metrics.jsonl"
    log.write_text(json.dumps({"step": 1, EVIL: 2.0}) + "\n")
    parsed = Page(report.render_live([folder]))
    assert not {"script", "img", "b>&"} & set(parsed.tags)
    for text in (EVIL, "<b>&", "<img src=x>"):
        assert text in parsed.text


# --- the server --------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path):
    """A function that asks a running server; it writes what it shows to ``tmp_path / "runs"``."""
    (tmp_path / "runs").mkdir()
    site = _report_server.Site(lambda: [tmp_path / "runs"], tmp_path / "scratch")
    server = _report_server.make_server(site, 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    port = server.server_address[1]

    def ask(path="/", method="GET", **headers):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value.replace("PORT", str(port)))
        connection.endheaders()
        answer = connection.getresponse()
        body = answer.read().decode()
        connection.close()
        return answer, body

    yield ask
    server.shutdown()
    thread.join()
    server.server_close()


def finish(folder, **changes):
    """Write a finished run with its figures drawn."""
    file = write(folder / "result.json", **changes)
    (folder / "figures").mkdir(exist_ok=True)
    (folder / "figures" / "claims.svg").write_text("<svg/>")
    return file


def test_the_page_is_rendered_again_only_when_a_result_has_changed(served, tmp_path):
    answer, empty = served()
    assert (answer.status, "b is better" in empty) == (200, False)
    tag = answer.headers["ETag"]
    answer, body = served(If_None_Match=tag)
    assert (answer.status, body) == (304, "")
    finish(tmp_path / "runs" / "one")
    answer, body = served(If_None_Match=tag)
    assert answer.status == 200
    assert "b is better than a" in body
    assert answer.headers["ETag"] != tag
    assert f'data-page="{answer.headers["X-Page"]}"' in body
    assert "connect-src 'self'" in body


def test_the_live_part_follows_a_run_and_announces_its_result(served, tmp_path):
    assert 'id="live" hidden' in served("/live")[1]
    folder = begin(tmp_path / "runs" / "one")
    first, body = served("/live")
    assert "1 of 2 seeds finished" in " ".join(body.split())
    with (folder / "seeds" / "1" / "train" / "grpo" / "metrics.jsonl").open("w") as log:
        log.write(json.dumps({"step": 9, "loss": 0.1}) + "\n")
    second, body = served("/live", If_None_Match=first.headers["ETag"])
    assert second.status == 200
    assert second.headers["X-Page"] == first.headers["X-Page"]
    later = time.time() + 10
    os.utime(finish(folder), (later, later))
    third, body = served("/live")
    assert 'id="live" hidden' in body
    assert third.headers["X-Page"] != first.headers["X-Page"]


@pytest.mark.parametrize(
    "path", ["/runs/one/result.json", "/../../etc/passwd", "//etc/passwd", "/%2e%2e/x", "/live/"]
)
def test_no_path_is_a_file(path, served, tmp_path):
    finish(tmp_path / "runs" / "one")
    answer, body = served(path)
    assert (answer.status, body) == (404, "there is nothing here")


def test_another_host_name_is_refused(served):
    for host, status in {"localhost:PORT": 200, "127.0.0.1:PORT": 200, "evil.example": 403}.items():
        assert served("/live", Host=host)[0].status == status


def test_head_sends_no_content_and_other_methods_are_refused(served):
    answer, body = served(method="HEAD")
    assert (answer.status, body) == (200, "")
    assert int(answer.headers["Content-Length"]) > 1000
    assert served(method="POST")[0].status == 501


def test_a_damaged_result_leaves_the_page_as_it_was(served, tmp_path, capsys):
    finish(tmp_path / "runs" / "one")
    tag = served()[0].headers["ETag"]
    (tmp_path / "runs" / "one" / "result.json").write_text("{")
    answer, body = served()
    assert (answer.status, answer.headers["ETag"]) == (200, tag)
    assert "b is better" in body
    assert "result.json is not JSON" in capsys.readouterr().err


def test_the_server_is_of_this_machine_alone_and_a_taken_port_is_named(tmp_path):
    site = _report_server.Site(lambda: [], tmp_path)
    with _report_server.make_server(site, 0) as server:
        host, port = server.server_address
        assert host == "127.0.0.1"
        with pytest.raises(OSError, match=f"cannot listen on port {port}: "):
            _report_server.make_server(site, port)


# --- the command -------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(index.HOME_VARIABLE, str(tmp_path / "home"))
    return tmp_path


def test_the_command_takes_kept_results_and_known_runs(here, capsys):
    finish(here / "kept" / "mine")
    begin(here / "elsewhere")
    index.record_run(
        folder=here / "elsewhere",
        recipe="adora",
        form="quick",
        started="2026-01-01",
        status="running",
        seeds=2,
    )
    assert main(["report", "--results", "kept"]) == 0
    assert capsys.readouterr().out == "1 result and 1 unfinished run on report.html\n"
    assert main(["report", "--results", "absent"]) == 2
    assert capsys.readouterr().err == "steelyard: there is no absent\n"
    (here / "kept").rename(here / "results")
    assert main(["report"]) == 0
    assert capsys.readouterr().out.startswith("1 result and ")


def test_the_command_goes_on_without_the_index(here, capsys):
    (here / "home").write_text("not a folder")
    assert main(["report"]) == 0
    assert "cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "port"),
    [(["--serve"], None), (["--serve", "8123"], 8123), (["--serve", "--port", "8123"], 8123)],
)
def test_serve_takes_a_port_in_two_ways_and_writes_nothing(flags, port, here, monkeypatch):
    asked = []
    monkeypatch.setattr(_report_server, "serve", lambda places, port, say: asked.append(port))
    assert main(["report", *flags]) == 0
    assert asked == [port]
    assert not (here / "report.html").exists()


def test_ctrl_c_ends_serving_cleanly(here, monkeypatch, capsys):
    def stop(server, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_report_server._Server, "serve_forever", stop)
    assert main(["report", "--serve", "0"]) == 0
    assert "http://127.0.0.1:" in capsys.readouterr().out
    assert main(["report", "--port", "80"]) == 2
