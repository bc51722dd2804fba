"""Docstrings on the reference pages: their reStructuredText becomes Markdown.

A Griffe extension. It knows what our docstrings use: ``.. math::`` blocks, roles, simple tables,
and doctests under ``Example:``.
"""

import re
from collections import deque
from typing import Any

import griffe

_MATH = re.compile(r"(?P<indent> *)\.\. math::(?P<rest>.*)")
_BORDER = re.compile(r" *=+(?: +=+)+ *")
_ROLE = re.compile(r":(?:py:)?(?:func|class|meth|mod|attr|data|obj|exc):`~?([^`]+)`")
_INLINE_MATH = re.compile(r":math:`([^`]+)`")


class DocstringMarkdown(griffe.Extension):
    """Rewrite each docstring before its sections are read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object (called by Griffe)."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(docstring: str) -> str:
    r"""Rewrite formulas, roles, tables and the heading of examples as Griffe's Markdown.

    Example:
        >>> print(to_markdown(":func:`f` is\n\n.. math:: x^2\n\nfor :math:`x`."))
        `f` is
        <BLANKLINE>
        $$
        x^2
        $$
        <BLANKLINE>
        for $x$.
        >>> print(to_markdown("== ===\na  b c\n== ===\n1  2|3\n== ==="))
        <BLANKLINE>
        | a | b c |
        | --- | --- |
        | 1 | 2\|3 |
        <BLANKLINE>
    """
    lines = deque(docstring.splitlines())
    written: list[str] = []
    while lines:
        line = lines.popleft()
        if formula := _MATH.fullmatch(line):
            written += ["", *_formula(formula["indent"], formula["rest"], lines), ""]
        elif _BORDER.fullmatch(line):
            written += ["", *_table(line, lines), ""]
        elif line == "Example:":
            written.append("Examples:")  # Griffe looks for doctests under the plural only
        else:
            written.append(_INLINE_MATH.sub(r"$\1$", _ROLE.sub(r"`\1`", line)))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(written))


def _formula(indent: str, rest: str, lines: deque[str]) -> list[str]:
    """Take the block below a ``.. math::``: the lines that are blank or indented deeper."""
    block = [rest]
    while lines and (not lines[0].strip() or lines[0].startswith(indent + " ")):
        block.append(lines.popleft())
    formula = [indent + line.strip() for line in block if line.strip()]
    return [f"{indent}$$", *formula, f"{indent}$$"]


def _table(border: str, lines: deque[str]) -> list[str]:
    """Take a simple table with one header line, up to its third border."""
    starts = [match.start() for match in re.finditer("=+", border)]
    spans = [slice(*pair) for pair in zip(starts, [*starts[1:], None], strict=True)]
    indent = border[: starts[0]]
    table: list[str] = []
    borders = 1
    while lines and borders < 3:
        line = lines.popleft()
        if _BORDER.fullmatch(line):
            borders += 1
            cells = ["---"] * len(spans) if borders == 2 else []
        else:
            cells = [line[span].strip().replace("|", r"\|") for span in spans]
        if cells:
            table.append(f"{indent}| {' | '.join(cells)} |")
    return table
