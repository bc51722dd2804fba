"""The code on the pages runs."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from steelyard.lab import judge, load_recipe

Blocks = Callable[[str], list[tuple[str, str]]]

PAGES = ("README.md", "docs/getting-started.md", "docs/systems/bpo.md")
ROOT = Path(__file__).parents[2]
SYSTEM_PAGES = tuple(
    sorted(
        str(page.relative_to(ROOT))
        for page in (ROOT / "docs/systems").glob("*.md")
        if page.stem not in ("index", "bpo")
    )
)
HOW_TO = "docs/how-to/add-a-system.md"


def is_training(code: str) -> bool:
    return ".learn(" in code


@pytest.mark.parametrize("page", [*PAGES, *SYSTEM_PAGES])
def test_blocks_of_a_page_run(blocks: Blocks, page: str) -> None:
    ran = [code for _, code in blocks(page) if not is_training(code)]
    assert ran
    for code in ran:
        exec(compile(code, page, "exec"), {})


@pytest.mark.rl
@pytest.mark.parametrize("page", [*PAGES, "docs/how-to/stable-baselines3.md"])
def test_blocks_that_train_build_their_model(blocks: Blocks, page: str) -> None:
    pytest.importorskip("stable_baselines3")
    pytest.importorskip("mujoco")
    training = [code for _, code in blocks(page) if is_training(code)]
    assert training
    for code in training:
        untrained = code.partition("model.learn(")[0]
        names: dict[str, Any] = {}
        exec(compile(untrained, page, "exec"), names)
        names["model"].env.close()


@pytest.fixture
def files(blocks: Blocks) -> dict[str, str]:
    return {Path(title).name: code for title, code in blocks(HOW_TO)}


@pytest.fixture
def robust(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Make the method of the worked example importable as the page says."""
    module = ModuleType("steelyard.robust")
    exec(compile(files["losses.py"], "losses.py", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.mark.usefixtures("robust")
def test_tests_of_the_worked_example_pass(files: dict[str, str]) -> None:
    names: dict[str, Any] = {}
    exec(compile(files["test_losses.py"], "test_losses.py", "exec"), names)
    tests = [test for name, test in names.items() if name.startswith("test_")]
    assert len(tests) == 5
    for test in tests:
        test()


def test_docstring_of_the_worked_example_holds(robust: ModuleType) -> None:
    import doctest

    outcome = doctest.testmod(robust)
    assert outcome.attempted > 0
    assert outcome.failed == 0


@pytest.mark.usefixtures("robust")
def test_claim_of_the_worked_example_holds(files: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "welsch.py"
    path.write_text(files["welsch.py"])
    recipe = load_recipe(str(path))
    metrics = {
        str(seed): recipe.run(
            recipe.quick.config, SimpleNamespace(seed=seed, compute=lambda _, piece: piece())
        )
        for seed in range(3)
    }
    [judgement] = judge(recipe.claims, metrics)
    assert judgement.verdict == "HOLDS"
