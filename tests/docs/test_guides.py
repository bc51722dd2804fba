"""The code of guides runs from top to bottom and prints what the page shows.

The Python blocks of such a page are one program. A ``text`` block right after a Python block is the
end of what that block prints. Numbers may differ by a tenth, and what training comes to by a third:
other processors sum in another order.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LIGHT = (
    "docs/architecture.md",
    "docs/concepts/claims.md",
    "docs/concepts/weight-and-direction.md",
    "docs/tutorials/recipe.md",
)
LONGER = {"docs/tutorials/loss.md": "sklearn", "docs/comparison.md": "trl"}
TRAINERS = {"docs/tutorials/adapter.md": ("stable_baselines3", "mujoco", "trl", "datasets")}

TRAINED = 0.35

BLOCK = re.compile(
    r"^```python[^\n]*\n(?P<code>.*?)^```\n(?:\n?```text\n(?P<printed>.*?)^```$)?",
    re.DOTALL | re.MULTILINE,
)
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def blocks(page: str) -> Iterator[tuple[int, str, str]]:
    """Line, code and promised output of each Python block."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        yield text.count("\n", 0, found.start()) + 1, found["code"], found["printed"] or ""


def agree(promised: str, printed: str, tolerance: float = 0.1) -> bool:
    """Whether the words are the same and the numbers nearly."""
    if NUMBER.sub("#", promised).split() != NUMBER.sub("#", printed).split():
        return False
    pairs = zip(NUMBER.findall(promised), NUMBER.findall(printed), strict=True)
    return all(
        math.isclose(float(a), float(b), rel_tol=tolerance, abs_tol=tolerance / 5) for a, b in pairs
    )


def run_page(page: str, capsys: pytest.CaptureFixture[str], tolerance: float = 0.1) -> int:
    """Run a page as one program; return how many blocks promised an output."""
    names: dict[str, Any] = {"__name__": "__page__"}
    promises = 0
    for line, code, promised in blocks(page):
        exec(compile("\n" * line + code, page, "exec"), names)
        printed = capsys.readouterr().out
        if promised:
            promises += 1
            end = "\n".join(printed.strip().splitlines()[-len(promised.strip().splitlines()) :])
            assert agree(promised, end, tolerance), f"{page}:{line} printed\n{end}\nnot\n{promised}"
    return promises


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEELYARD_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("page", LIGHT)
def test_a_guide_prints_what_it_shows(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_page(page, capsys) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("page", "need"), LONGER.items())
def test_a_guide_that_takes_a_while_prints_what_it_shows(
    page: str, need: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(need)
    assert run_page(page, capsys, TRAINED) > 0


@pytest.mark.slow
@pytest.mark.rl
@pytest.mark.parametrize(("page", "needs"), TRAINERS.items())
def test_a_guide_that_trains_prints_what_it_shows(
    page: str, needs: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for need in needs:
        pytest.importorskip(need)
    assert run_page(page, capsys, TRAINED) > 0


def test_another_number_or_another_word_is_noticed() -> None:
    assert agree("loss 1.00 after 3 steps", "loss 1.05 after 3 steps")
    assert not agree("loss 1.00 after 3 steps", "loss 1.20 after 3 steps")
    assert not agree("loss 1.00 after 3 steps", "cost 1.00 after 3 steps")
    assert not agree("loss 1.00", "loss 1.00 nan")
