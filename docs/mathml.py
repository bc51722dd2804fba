"""Formulas on the pages: LaTeX becomes MathML at build time, so that no script is loaded.

A MkDocs hook. Browsers draw MathML themselves, so the pages are complete without a network.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

# What pymdownx.arithmatex (generic) leaves on a page.
_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?:\(|\[)(?P<latex>.+?)\\(?:\)|\])</(?P=tag)>',
    re.DOTALL,
)


def on_page_content(page_html: str, **_: Any) -> str:
    """Replace each formula of a page by MathML (called by MkDocs)."""
    return _FORMULA.sub(_to_mathml, page_html)


def _to_mathml(match: re.Match[str]) -> str:
    latex = html.unescape(match["latex"]).strip()
    latex = re.sub(r"(?<!\\)\\\n", r"\\ ", latex)  # a space written before a line's end
    mathml: str = convert(latex, display="block" if match["tag"] == "div" else "inline")
    return mathml.replace(r"\_", "_")  # the converter keeps the backslash inside names
