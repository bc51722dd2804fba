"""The figures of a report: which belong to which result, and how they get into the page."""

import base64
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

_MEDIA = {".svg": "image/svg+xml", ".png": "image/png"}
# What a figure does not need to look the same: comments, the declaration, who made it.
_NEEDLESS = re.compile(r"<!--.*?-->|<metadata>.*?</metadata>|<!DOCTYPE[^>]*>|<\?xml.*?\?>", re.S)
# All characters that may stand in an address between single quotes; the rest is percent-encoded.
_PLAIN = ' !$()*+,/:;=?@[]^_`{|}~"'


def figures_beside(file: Path, *, whole: bool) -> list[Path]:
    """Return the SVG figures in the folder beside a result file that belong to it.

    Args:
        file: the result file.
        whole: whether all of them do, as in a run's folder. In a folder of several results a
            figure belongs to the result whose name its own begins with, and else to the main one.
    """
    figures = sorted((file.parent / "figures").glob("*.svg"))
    if whole:
        return figures
    names = sorted(path.stem for path in file.parent.glob("*.json"))
    main = next((name for name in ("full", "quick") if name in names), names[0])
    return [path for path in figures if _owner(path.stem, names, main) == file.stem]


def _owner(figure: str, names: list[str], main: str) -> str:
    fitting = [name for name in names if figure == name or figure.startswith(f"{name}-")]
    return max(fitting, key=len, default=main)


def one_of_each(files: Iterable[Path]) -> list[Path]:
    """Of the same figure in several formats keep one, the SVG before the PNG."""
    chosen: dict[str, Path] = {}
    for file in files:
        if file.suffix in _MEDIA and (file.stem not in chosen or file.suffix == ".svg"):
            chosen[file.stem] = file
    return list(chosen.values())


def embed(file: Path) -> dict[str, str]:
    """Turn a figure into a data URI: as an image it can neither run scripts nor load anything."""
    data, media = file.read_bytes(), _MEDIA[file.suffix]
    source = f"data:{media};base64,{base64.b64encode(data).decode('ascii')}"
    if file.suffix == ".svg":
        try:
            slim = re.sub(r"\s+", " ", _NEEDLESS.sub("", data.decode("utf-8"))).strip()
            source = f"data:{media};charset=utf-8,{quote(slim, safe=_PLAIN)}"
        except UnicodeDecodeError:  # as it is
            pass
    # Nothing in it needs escaping between single quotes: ``quote`` left none of & < > '.
    return {"name": file.stem.replace("-", " "), "source": Markup(source)}  # nosec B704
