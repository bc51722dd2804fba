import dataclasses
import re

import pytest

from steelyard.recipes import catalog

NAMES = (
    "bpo token-shift awm scorecard doubly-robust f-dpg f-distill fair-dcov f-dpo pld sparse-po "
    "rerank information-projection anyloss adora universality cs-ib presto causal-bounds canon "
    "sinkd amcl info-gain dpp-least-squares inductive-bias ponita divergen ldr fedau paretoflow "
    "adamp ranking-accuracy equilibrium-propagation tcm adpa"
)


@pytest.fixture
def source(tmp_path):
    for folder in ("recipes", "policy"):
        (tmp_path / folder).mkdir()
    return tmp_path


def test_the_35_systems_stand_in_order():
    assert [system.name for system in catalog.SYSTEMS] == NAMES.split()
    assert [system.number for system in catalog.SYSTEMS] == list(range(1, 36))


def test_no_public_name_belongs_to_two_systems():
    names = [(s.package, name) for s in catalog.SYSTEMS for name in s.names]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("system", catalog.SYSTEMS, ids=lambda system: system.name)
def test_every_entry_is_whole(system):
    assert re.fullmatch(r"\d{4}\.\d{5}", system.arxiv)
    assert all(name.isidentifier() for name in system.names)
    assert system.names
    assert system.purpose.endswith(".")
    assert system.purpose.count(". ") == 0
    assert system.title


def test_an_empty_tree_is_planned(source):
    assert {catalog.status(system, source=source) for system in catalog.SYSTEMS} == {"planned"}


def test_all_names_exported_is_a_ready_method(source):
    system = dataclasses.replace(catalog.find("adora"), names=("one", "two"))
    init = source / "policy" / "__init__.py"
    init.write_text('__all__ = ["one", "two", "three"]\nimport a_package_nobody_has\n')
    assert catalog.status(system, source=source) == "method ready, experiment to come"


def test_a_name_that_is_only_imported_does_not_count(source):
    system = dataclasses.replace(catalog.find("canon"), names=("one", "two"))
    (source / "policy" / "__init__.py").write_text('from x import two\n__all__ = ["one"]\n')
    assert catalog.status(system, source=source) == "planned"


def test_a_recipe_file_is_a_ready_recipe(source):
    (source / "recipes" / "token_shift.py").touch()
    assert catalog.status(catalog.find("token-shift"), source=source) == "recipe ready"


def test_a_misspelled_name_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"'ponitta'; did you mean 'ponita'\?.*steelyard list"):
        catalog.find("ponitta")
    with pytest.raises(ValueError, match=r"'qqqq'\. `steelyard list`"):
        catalog.find("qqqq")
