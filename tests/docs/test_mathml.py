from collections.abc import Callable
from types import ModuleType

Script = Callable[[str], ModuleType]


def test_formulas_become_mathml(script: Script) -> None:
    convert = script("mathml").on_page_content
    inline = convert('<span class="arithmatex">\\(a &lt; b\\)</span>')
    block = convert('<div class="arithmatex">\\[\n\\frac{a}{b}\n\\]</div>')
    assert 'display="inline"' in inline
    assert "<mo>&#x0003C;</mo>" in inline
    assert "<mfrac>" in block
    assert 'display="block"' in block


def test_names_with_underscores_and_broken_lines_are_drawn(script: Script) -> None:
    convert = script("mathml").on_page_content
    page = convert('<div class="arithmatex">\\[\\texttt{log\\_ratio},\\\nx\\]</div>')
    assert "log_ratio" in page
    assert "\\" not in page


def test_text_without_formula_is_left_alone(script: Script) -> None:
    page = '<p>costs $5 <span class="other">\\(x\\)</span></p>'
    assert script("mathml").on_page_content(page) == page
