"""One response as a heat map, for a terminal and as a page.

A token is coloured by the square root of its divergence, which is a distance, on a scale that runs
to ``log 2``. Text from a model is shown, never obeyed: markup is escaped and control characters
are spelt out.
"""

import html
import math
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from steelyard._checks import check_floating, check_not_empty, check_range, check_shape

if TYPE_CHECKING:
    from rich.text import Text

# From light to dark of one hue, so that grey prints show the same order.
_LIGHT, _DARK = (255, 255, 255), (0, 62, 110)

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font-family: system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
.response {{ font-family: ui-monospace, monospace; line-height: 1.9; white-space: pre-wrap; }}
.response span, .scale span {{ border-radius: 2px; padding: 2px 1px; }}
.response span.high {{ outline: 2px solid #D55E00; }}
td, th {{ padding: 0 0.8rem; text-align: right; font-variant-numeric: tabular-nums; }}
td.token {{ font-family: ui-monospace, monospace; text-align: left; white-space: pre-wrap; }}
</style></head><body>
<h1>{title}</h1>
<p>{finding}</p>
<p class="scale">{scale}</p>
<p class="response">{response}</p>
<details><summary>Numbers</summary><table>
<tr><th>position</th><th>token</th><th>JS (nats)</th></tr>
{rows}
</table></details>
</body></html>
"""


def heat_map_text(tokens: Sequence[str], js: Tensor, *, high: float = 0.1) -> "Text":
    """Colour the tokens of a response by their divergence, for a terminal.

    Args:
        tokens: what to show for each of the ``T`` tokens.
        js: divergence of each in nats, shape ``[T]``.
        high: tokens above it are bold and underlined, so that they show without colour.

    Returns:
        A ``rich.text.Text``. Control characters (but line feeds and tabs) are spelt out, so that a
        model's text cannot steer the terminal.

    Raises:
        TypeError: ``js`` not floating point, a token no string.
        ValueError: as many tokens as values are needed, and at least one; ``js`` NaN.

    Example:
        >>> import torch
        >>> text = heat_map_text(["so", " x"], torch.tensor([0.0, 0.4]))
        >>> text.plain, [str(span.style) for span in text.spans]
        ('so x', ['#000000 on #ffffff', 'bold underline #ffffff on #3d6c91'])

    Source: Meng et al. (2026), section 3, arXiv:2603.22446.
    """
    from rich.text import Text

    text = Text()
    for token, value, is_high in _checked(tokens, js, high):
        emphasis = "bold underline " if is_high else ""
        text.append(_visible(token), style=f"{emphasis}{_ink(value)} on {_paper(value)}")
    return text


def heat_map_html(
    tokens: Sequence[str], js: Tensor, *, title: str = "Token shift", high: float = 0.1
) -> str:
    """Colour the tokens of a response by their divergence, as one page that needs nothing else.

    The page holds no script and loads nothing; every text is escaped. Each token shows its
    divergence under the pointer, and all numbers stand in a table.

    Args:
        tokens: what to show for each of the ``T`` tokens.
        js: divergence of each in nats, shape ``[T]``.
        title: heading of the page.
        high: tokens above it are outlined and counted.

    Returns:
        The page.

    Raises:
        TypeError: ``js`` not floating point, a token or ``title`` no string.
        ValueError: as many tokens as values are needed, and at least one; ``js`` NaN.

    Example:
        >>> import torch
        >>> page = heat_map_html(["<script>"], torch.tensor([0.4]))
        >>> "<script>" in page, "&lt;script&gt;" in page
        (False, True)

    Source: Meng et al. (2026), section 3, arXiv:2603.22446.
    """
    if not isinstance(title, str):
        raise TypeError(f"title must be a string, got {type(title).__name__}")
    items = [
        (html.escape(_visible(word)), value, is_high)
        for word, value, is_high in _checked(tokens, js, high)
    ]
    number = sum(is_high for _, _, is_high in items)
    response = "".join(
        f'<span{" class=high" if is_high else ""} title="JS {value:.4f}" '
        f'style="color:{_ink(value)};background:{_paper(value)}">{word}</span>'
        for word, value, is_high in items
    )
    marks = (0.0, 0.01, 0.1, 0.3, math.log(2.0))
    scale = "JS in nats: " + " ".join(
        f'<span style="color:{_ink(mark)};background:{_paper(mark)}">&nbsp;{mark:.2f}&nbsp;</span>'
        for mark in marks
    )
    rows = "\n".join(
        f'<tr><td>{place}</td><td class="token">{word}</td><td>{value:.4f}</td></tr>'
        for place, (word, value, _) in enumerate(items)
    )
    finding = f"{number} of {len(items)} tokens have a divergence above {high:g} nats (outlined)."
    return _PAGE.format(
        title=html.escape(title), finding=finding, scale=scale, response=response, rows=rows
    )


def _checked(tokens: Sequence[str], js: Tensor, high: float) -> list[tuple[str, float, bool]]:
    check_floating(js=js)
    check_shape("js", js, (None,))
    check_not_empty("js", js)
    check_range("high", high, at_least=0.0, below=float("inf"))
    listed = not isinstance(tokens, str) and hasattr(tokens, "__len__")
    if not listed or any(not isinstance(token, str) for token in tokens):
        raise TypeError("tokens must be a sequence of strings, one for each token")
    if len(tokens) != js.shape[0]:
        raise ValueError(f"tokens must be as many as js, {js.shape[0]}, got {len(tokens)}")
    if bool(js.isnan().any()):
        raise ValueError("js must not be NaN")
    # Compared in the dtype of js, so that a float32 0.1 is not above 0.1.
    return list(zip(tokens, js.detach().double().tolist(), (js > high).tolist(), strict=True))


def _visible(token: str) -> str:
    """Spell out what a terminal or a browser would obey: controls, escapes, text direction."""
    return "".join(
        char
        if char.isprintable() or char in "\n\t" or unicodedata.category(char) == "Zs"
        else char.encode("unicode_escape").decode("ascii")
        for char in token
    )


def _depth(js: float) -> float:
    return math.sqrt(min(max(js / math.log(2.0), 0.0), 1.0))


def _paper(js: float) -> str:
    depth = _depth(js)
    mixed = (
        round(light + depth * (dark - light)) for light, dark in zip(_LIGHT, _DARK, strict=True)
    )
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _ink(js: float) -> str:
    # Where white on the mixed colour begins to contrast more than black.
    return "#ffffff" if _depth(js) > 0.692 else "#000000"
