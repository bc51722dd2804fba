"""Arrows only point down: which part of the library may import which.

Read from the source, so that an import inside a function counts as well. The map is drawn in
``docs/architecture.md``.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import steelyard
from steelyard import _extras

SOURCE = Path(steelyard.__file__).parent
BASE = frozenset({"_checks", "_extras"})
GROUND = BASE | {"_reduce", "divergences", "fused"}
ABOVE = frozenset({"anatomy", "lab", "recipes", "integrations"})
METHODS = frozenset(steelyard._PACKAGES) - GROUND - ABOVE

# The whole rule: a part may import what stands here, and itself. "version" is steelyard itself.
MAY_IMPORT: dict[str, frozenset[str]] = {
    "_checks": frozenset(),
    "_extras": frozenset(),
    "_reduce": frozenset({"_checks"}),
    "divergences": frozenset({"_checks", "_reduce"}),
    "fused": frozenset({"_checks", "_reduce", "divergences"}),
    **dict.fromkeys(METHODS, GROUND),
    "integrations": GROUND | METHODS,
    "anatomy": frozenset({"_checks", "_reduce", "_anatomy_figure"}),
    "_anatomy_figure": frozenset(),
    "lab": BASE | {"_reduce", "version"},
    "recipes": GROUND | METHODS | {"integrations", "lab"},
    "cli": GROUND | METHODS | {"integrations", "anatomy", "lab", "recipes", "version"},
    "__main__": frozenset({"cli"}),
    "version": frozenset(),
}

# Arrows that point up, each with its reason. Nothing may be added without one.
EXCEPTIONS = {
    ("_anatomy_figure", "lab.plots"): "colours and strokes of every figure are kept in one place",
    ("integrations.token_report", "lab.json_lines"): "reads the user's file of prompts",
    ("integrations.token_report", "lab.pretrained"): "loads the user's model",
    ("integrations.token_report", "lab.tasks"): "for a type alone",
    ("integrations.token_report", "lab.tiny_lm"): "samples from a model",
    ("lab._report_page", "recipes.catalog"): "the report lists systems without a result, too",
    ("lab.report", "recipes.catalog"): "the same",
    ("lab.recipe", "recipes"): "finds a recipe by its name",
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__") or "version"
        yield name, ast.parse(path.read_text(encoding="utf-8"))


MODULES = dict(modules())


def resolved(dotted: str) -> str:
    """Return the longest part of a dotted name that is a module of ours."""
    parts = dotted.split(".")[1:]
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts) or "version"


def own_imports(tree: ast.Module) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {resolved(name) for name in found if name.partition(".")[0] == "steelyard"}


def upward_arrows() -> set[tuple[str, str]]:
    arrows = set()
    for name, tree in MODULES.items():
        part = name.partition(".")[0]
        for target in own_imports(tree):
            if target.partition(".")[0] not in MAY_IMPORT[part] | {part}:
                arrows.add((name, target))
    return arrows


def test_arrows_point_down_but_for_the_named_exceptions() -> None:
    assert upward_arrows() - EXCEPTIONS.keys() == set()


def test_every_exception_is_still_needed() -> None:
    assert EXCEPTIONS.keys() - upward_arrows() == set()


@pytest.mark.parametrize("part", sorted(MAY_IMPORT))
def test_the_rule_itself_has_no_circle(part: str) -> None:
    reached, new = set(), set(MAY_IMPORT[part])
    while new:
        reached |= new
        new = {further for name in new for further in MAY_IMPORT[name]} - reached
    assert part not in reached


def test_every_part_has_a_place_in_the_rule() -> None:
    assert {name.partition(".")[0] for name in MODULES} == MAY_IMPORT.keys()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_no_method_package_imports_another(method: str) -> None:
    trees = [tree for name, tree in MODULES.items() if name.partition(".")[0] == method]
    imported = {target.partition(".")[0] for tree in trees for target in own_imports(tree)}
    assert trees
    assert imported & METHODS <= {method}


def test_a_recipe_imports_no_other_recipe_but_its_own_private_parts() -> None:
    for name, tree in MODULES.items():
        package, _, recipe = name.partition(".")
        if package != "recipes" or not recipe or recipe.startswith("_"):
            continue
        for target in own_imports(tree):
            if target.startswith("recipes."):
                assert target.startswith(f"recipes._{recipe}"), f"{name} imports {target}"


def at_import(tree: ast.Module) -> set[str]:
    """Packages of others that loading a module loads: not in functions, not for types alone."""
    found: set[str] = set()
    queue: list[ast.AST] = [tree]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            queue.extend(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            queue.extend(ast.iter_child_nodes(node))
    return found - {"steelyard"} - sys.stdlib_module_names


def test_only_adapters_load_an_optional_package() -> None:
    optional = {module for extra in _extras.EXTRAS.values() for module in extra.modules}
    loading = {name for name, tree in MODULES.items() if at_import(tree) & optional}
    assert {name for name in loading if not name.startswith("integrations.")} == set()
    assert "integrations.stable_baselines3" in loading


def test_method_packages_load_torch_numpy_and_scipy_alone() -> None:
    for name, tree in MODULES.items():
        if name.partition(".")[0] in METHODS | GROUND:
            assert at_import(tree) <= {"torch", "numpy", "scipy"}, name
