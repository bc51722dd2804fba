import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from steelyard.recipes import catalog

Script = Callable[[str], ModuleType]


def result(**changes: object) -> dict[str, object]:
    """Return the smallest result a recipe can write."""
    claim = {
        "statement": "b rises | always",
        "verdict": "HOLDS",
        "effect": 0.5,
        "low": 0.25,
        "high": 0.75,
        "margin": 0.0,
        "seeds": 3,
        "note": "",
    }
    base: dict[str, object] = {
        "recipe": "bpo",
        "form": "full",
        "config": {"parts": ["exact"]},
        "seeds": [0, 1, 2],
        "steps": 12_345,
        "wall_seconds": 600.0,
        "steps_per_second": 1_500.0,
        "machine": {"processor": "a processor", "cores": 2, "system": "Linux"},
        "versions": {"torch": "2.13.0"},
        "claims": [claim],
        "metrics": {
            str(seed): {
                "stability/pole/epochs=4/bpo/largest_ratio": 1.0 + seed,
                "stability/pole/epochs=4/bpo/kl": 0.25,
                "stability/pole/epochs=4/ppo/kl": 4000.0,
                "exact/rises": 1.0,
            }
            for seed in range(3)
        },
    }
    return base | changes


def test_committed_pages_are_up_to_date(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    assert script("generate").main(["--check"]) == 0, capsys.readouterr().out


def test_a_stale_page_is_named_and_left_alone(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    generate = script("generate")
    page = tmp_path / "README.md"
    page.write_text("old")
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(generate, "expected", lambda _: iter([(page, b"new")]))
    assert generate.main(["--check"]) == 1
    assert "stale: README.md" in capsys.readouterr().out
    assert page.read_text() == "old"
    assert generate.main([]) == 0
    assert page.read_text() == "new"
    assert generate.main(["--check"]) == 0


def test_every_system_has_one_row(script: Script, root: Path) -> None:
    rows = script("generate").systems_table("", root).splitlines()[2:]
    assert len(rows) == len(catalog.SYSTEMS) == 35
    for system, row in zip(catalog.SYSTEMS, rows, strict=True):
        assert f"`{system.name}`" in row
        assert row.endswith(f"| {catalog.status(system)} |")


def test_results_show_verdict_seeds_versions_and_every_number(script: Script) -> None:
    section = script("generate")._result("full", result())
    command = "`steelyard run bpo --full --seeds 3 --parts exact`"
    assert f"{command}: 3 seeds, 12,345 steps, 10 minutes on 2 cores" in section
    assert "torch 2.13.0" in section
    assert r"| b rises \| always | **HOLDS** | +0.5 [0.25, 0.75] | 0 | 3 |  |" in section
    assert "| trial | largest ratio | kl |" in section
    assert "| pole/epochs=4/bpo | 2 (1 to 3) | 0.25 |" in section
    assert "| pole/epochs=4/ppo |  | 4,000 |" in section
    assert '??? note "All numbers: exact"' in section


def test_the_full_form_comes_first_with_the_figures(script: Script, tmp_path: Path) -> None:
    for name in ("atari", "full", "quick"):
        (tmp_path / f"{name}.json").write_text(json.dumps(result()))
    (tmp_path / "search.json").write_text("{}")
    figure = tmp_path / "bpo/figures/x.svg"
    section = script("generate").results_section(tmp_path, [figure])
    parts = re.findall(r"^(?:### Result: (\w+)|!\[x\]\((.*)\))$", section, re.MULTILINE)
    assert parts == [("full", ""), ("", "../figures/bpo-x.svg"), ("atari", ""), ("quick", "")]


def test_claims_on_parts_that_were_not_run_are_left_out(script: Script) -> None:
    claims = [dict(claim, verdict="NOT RUN") for claim in result()["claims"]]
    section = script("generate")._result("search", result(claims=claims))
    assert "NOT RUN" not in section
    assert "No claim is judged on this part." in section


def test_a_seed_that_failed_is_not_hidden(script: Script) -> None:
    section = script("generate")._result("full", result(failed={"2": "out of memory"}))
    assert "Seed 2 failed: out of memory" in section


def test_a_page_without_its_markers_is_an_error(script: Script, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- results:start -->")
    with pytest.raises(ValueError, match=r"page\.md must hold <!-- results:start -->"):
        script("page_parts").filled(page, {"results": "text"})


def test_no_committed_result_is_said_plainly(script: Script, tmp_path: Path) -> None:
    assert script("generate").results_section(tmp_path, []) == "No result is committed yet."


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_to_files_lead_somewhere(root: Path, page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (root / page).read_text(encoding="utf-8"))
    assert [link for link in links if not (root / link).exists()] == []
