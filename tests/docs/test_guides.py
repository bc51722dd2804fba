"""The code of guides runs from top to bottom and prints what the page shows.

The Python blocks of such a page are one program. A ``text`` block right after a Python block is the
end of what that block prints: the same words, numbers within a tenth. Training magnifies
the order in which a processor sums, so what training came to is held to what the page says of it.
"""

import math
import re
from collections.abc import Collection, Iterator
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


def numbers(text: str) -> list[float]:
    return [float(number) for number in NUMBER.findall(text)]


def agree(promised: str, printed: str, *, trained: bool = False) -> bool:
    """Whether the words are the same and, unless training made them, the numbers nearly."""
    if NUMBER.sub("#", promised).split() != NUMBER.sub("#", printed).split():
        return False
    pairs = zip(numbers(promised), numbers(printed), strict=True)
    return trained or all(math.isclose(a, b, rel_tol=0.1, abs_tol=0.02) for a, b in pairs)


def run_page(
    page: str, capsys: pytest.CaptureFixture[str], trained: Collection[int] = ()
) -> list[list[float]]:
    """Run a page as one program; return the numbers printed by each block with an output.

    ``trained`` counts, among those blocks, the ones whose numbers come from training.
    """
    names: dict[str, Any] = {"__name__": "__page__"}
    found: list[list[float]] = []
    for line, code, promised in blocks(page):
        exec(compile("\n" * line + code, page, "exec"), names)
        printed = capsys.readouterr().out
        if promised:
            end = "\n".join(printed.strip().splitlines()[-len(promised.strip().splitlines()) :])
            same = agree(promised, end, trained=len(found) in trained)
            assert same, f"{page}:{line} printed\n{end}\nnot\n{promised}"
            found.append(numbers(end))
    return found


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEELYARD_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("page", LIGHT)
def test_a_guide_prints_what_it_shows(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_page(page, capsys)


@pytest.mark.slow
def test_the_comparison_prints_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    assert run_page("docs/comparison.md", capsys)


def test_the_guide_to_diffusers_prints_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    assert run_page("docs/how-to/diffusers.md", capsys)


@pytest.mark.slow
def test_the_loss_tutorial_shows_that_bpo_moves_less_and_guesses_as_well(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("sklearn")
    ppo, bpo, *_ = run_page("docs/tutorials/loss.md", capsys, trained=(0, 1))
    assert min(ppo[1::3] + bpo[1::3]) > 0.8
    assert sum(bpo[2::3]) < sum(ppo[2::3])


@pytest.mark.slow
@pytest.mark.rl
def test_the_adapter_tutorial_trains_with_every_adapter(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for need in ("stable_baselines3", "mujoco", "trl", "datasets"):
        pytest.importorskip(need)
    found = run_page("docs/tutorials/adapter.md", capsys, trained=(0, 3, 5, 6))
    pendulum, _, _, rewards, _, (median,), (kl_right, up, down, js_right, js_up, js_down) = found
    assert all(1 <= steps <= 1000 for steps in pendulum[:2])
    assert all(0 <= share <= 100 for share in pendulum[2:])
    grpo, gbpo = rewards[:4], rewards[4:]
    assert min(grpo[-1] - grpo[0], gbpo[-1] - gbpo[0]) > 0.3
    assert median > 0.8
    assert min(kl_right, js_right) > 0.9
    assert up > down
    assert js_down < js_up < 0.1 * math.log(2) + 0.005


def test_another_number_or_another_word_is_noticed() -> None:
    assert agree("loss 1.00 after 3 steps", "loss 1.05 after 3 steps")
    assert not agree("loss 1.00 after 3 steps", "loss 1.20 after 3 steps")
    assert agree("loss 1.00 after 3 steps", "loss 1.20 after 3 steps", trained=True)
    assert not agree("loss 1.00 after 3 steps", "cost 1.00 after 3 steps", trained=True)
    assert not agree("loss 1.00", "loss 1.00 nan", trained=True)
