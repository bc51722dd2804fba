import doctest
from collections.abc import Callable
from types import ModuleType

Script = Callable[[str], ModuleType]


def test_examples_of_the_script_hold(script: Script) -> None:
    outcome = doctest.testmod(script("docstrings"))
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_a_formula_ends_with_its_block(script: Script) -> None:
    docstring = "A.\n\n.. math::\n    x =\n        y\n\nB.\n\nArgs:\n    x: c\n"
    expected = "A.\n\n$$\nx =\ny\n$$\n\nB.\n\nArgs:\n    x: c"
    assert script("docstrings").to_markdown(docstring) == expected


def test_an_indented_formula_stays_in_its_section(script: Script) -> None:
    docstring = "Args:\n    x: is\n\n        .. math:: y\n\n    z: is not\n"
    expected = "Args:\n    x: is\n\n        $$\n        y\n        $$\n\n    z: is not"
    assert script("docstrings").to_markdown(docstring) == expected


def test_what_is_markdown_already_is_left_alone(script: Script) -> None:
    docstring = "Summary.\n\n``x == y``; Example: none.\n\nReturns:\n    `z`"
    assert script("docstrings").to_markdown(docstring) == docstring
