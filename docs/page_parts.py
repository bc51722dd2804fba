"""What the generators of pages share: tables, figures that are drawn once, marked parts."""

import hashlib
import inspect
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def middle(values: Sequence[float]) -> str:
    """Write a median with the smallest and the largest value."""
    middle, low, high = values
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def versions(result: dict[str, Any]) -> str:
    """List the versions of a result."""
    return ", ".join(f"{name} {version}" for name, version in result["versions"].items())


def drawn(
    path: Path,
    draw: "Callable[..., Figure]",
    *data: Any,
    helper: Callable[..., None] | None = None,
) -> bytes:
    """Return the figure ``draw(*data)``; the one at ``path`` if it shows the same.

    Another version of matplotlib writes other bytes: the digest inside tells whether the numbers,
    ``draw`` or the ``helper`` that it calls have changed.
    """
    source = json.dumps(data) + inspect.getsource(draw)
    source += inspect.getsource(helper) if helper else ""
    digest = hashlib.sha256(source.encode()).hexdigest()
    old = read(path)
    if old is not None and digest.encode() in old:
        return old
    from matplotlib import rc_context

    stream = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}):
        metadata = {"Date": None, "Description": digest}
        draw(*data).savefig(stream, format="svg", metadata=metadata)
    return stream.getvalue()


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell(text) for text in line)} |" for line in lines)


def cell(text: str) -> str:
    """Write a text on one line, without what would end a cell."""
    return " ".join(text.replace("|", "\\|").split())


def filled(path: Path, sections: Mapping[str, str]) -> tuple[Path, bytes]:
    """Return the file with each content between the markers of its name."""
    text = path.read_text(encoding="utf-8")
    for name, content in sections.items():
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"{path.name} must hold {start} and {end} once, in this order")
        text = pattern.sub(lambda _, part=f"{start}\n\n{content}\n\n{end}": part, text)
    return path, text.encode()


def read(path: Path) -> bytes | None:
    """Return the bytes of a file, ``None`` if there is none."""
    return path.read_bytes() if path.exists() else None
