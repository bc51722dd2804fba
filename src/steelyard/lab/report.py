"""One self-contained HTML page from the results of runs.

The page holds its figures, its style and its script, loads nothing, and works offline, on a phone,
in print, in light and in dark, and without scripts. Every text is escaped, whatever a recipe is
called, and a policy in the page forbids the browser to run or load anything else.
"""

import base64
import hashlib
import json
import shlex
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steelyard.lab._format import effect, number
from steelyard.lab._report_figures import figures_beside
from steelyard.lab._report_live import read_unfinished
from steelyard.lab._report_page import Entry, page_content
from steelyard.lab.progress import duration
from steelyard.lab.storage import write_atomic
from steelyard.recipes import catalog

if TYPE_CHECKING:
    import jinja2

    from steelyard.lab.recipe import Recipe

Result = dict[str, Any]

MAX_BYTES = 2**27
"""Larger files are refused: a result is some hundred kilobytes."""

_NEEDED = {
    "recipe": str,
    "form": str,
    "config": dict,
    "seeds": list,
    "metrics": dict,
    "claims": list,
    "started": str,
}
_TEMPLATES = Path(__file__).with_name("templates")


def render_report(
    results: Sequence[Result], out: Path, *, figures: Mapping[str, Sequence[Path]] | None = None
) -> None:
    """Write the page: a scoreboard of all systems, then a section for each with its results.

    Args:
        results: contents of ``result.json`` files.
        out: the HTML file; its folder is made if missing.
        figures: figure files by recipe, or by ``"<recipe>-<form>"`` where both forms are shown.
            They are put into the page; of the same figure as SVG and PNG the SVG is taken.

    Raises:
        OSError: ``out`` cannot be written.
    """
    given = figures or {}
    entries = [
        Entry(
            result,
            result["form"],
            tuple(
                given.get(f"{result['recipe']}-{result['form']}", given.get(result["recipe"], ()))
            ),
            command(result),
        )
        for result in results
    ]
    _write(out, render_page(entries))


def render_results(
    files: Sequence[Path], out: Path, *, unfinished: Sequence[Path] = ()
) -> list[Path]:
    """Write the page from ``result.json`` files.

    Of results that differ in nothing but their date the newest is shown. Figures are taken from
    the folder ``figures`` beside a file, or drawn again.

    Args:
        files: as :func:`find_results` returns them.
        out: the HTML file.
        unfinished: folders of runs without a result yet; the page says how far they are.

    Returns:
        The files that are on the page.

    Raises:
        ValueError: a file is not a result.
    """
    with tempfile.TemporaryDirectory() as scratch:
        entries = read_entries(files, Path(scratch))
        _write(out, render_page(list(entries.values()), unfinished=unfinished))
    return list(entries)


def read_entries(files: Sequence[Path], scratch: Path) -> dict[Path, Entry]:
    """Read results with their figures, the newest of each recipe, form, configuration and seeds.

    Args:
        files: result files.
        scratch: where figures are drawn that are not beside a file; drawn ones are used again.
    """
    newest: dict[tuple[str, ...], tuple[Result, Path]] = {}
    for file in files:
        result = read_result(file)
        tried = [*result["seeds"], *result.get("failed", {})]
        settings = json.dumps([result["config"], len(tried)], sort_keys=True)
        key = (result["recipe"], result["form"], settings)
        if key not in newest or newest[key][0]["started"] <= result["started"]:
            newest[key] = (result, file)
    return {
        file: Entry(
            result,
            result["form"] if is_run(file.parent) else file.stem,
            tuple(_figures(result, file, scratch)),
            command(result),
        )
        for result, file in newest.values()
    }


def render_page(
    entries: Sequence[Entry], *, unfinished: Sequence[Path] = (), version: str = ""
) -> str:
    """Return the page as text.

    Args:
        entries: the results.
        unfinished: folders of runs that have not finished.
        version: for a page that a server keeps current; what the server calls this content.
    """
    from markupsafe import Markup

    style, script = (
        (_TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            page_content(entries),
            runs=read_unfinished(unfinished),
            style=Markup(style),  # nosec B704  # both are files of this package
            script=Markup(script),  # nosec B704
            script_digest=digest,
            version=version,
        )
    )


def render_live(unfinished: Sequence[Path]) -> str:
    """Return the part of the page that says how far unfinished runs are."""
    return _environment().get_template("live.html.j2").render(runs=read_unfinished(unfinished))


@cache
def _environment() -> "jinja2.Environment":
    """Return what renders the templates: every text is escaped, every unknown name an error."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": number, "effect": effect, "duration": duration, "moment": _moment}
    return made


def _moment(started: str) -> str:
    """Shorten an ISO time in UTC, as the lab writes it, to what a person reads."""
    return f"{started[:16].replace('T', ' ')} UTC" if started[16:].endswith("+00:00") else started


def find_results(places: Iterable[Path]) -> list[Path]:
    """Find result files: a file itself, a run's ``result.json``, or those in folders below.

    Args:
        places: result files, run folders, folders of runs, folders of copied results. In a folder
            of copies a JSON file that is no result is passed over.

    Raises:
        FileNotFoundError: a place does not exist.
    """
    files: list[Path] = []
    for place in places:
        if place.is_file():
            files.append(place)
        elif not place.is_dir():
            raise FileNotFoundError(f"there is no {place}")
        elif is_run(place):
            files += [file for file in (place / "result.json",) if file.is_file()]
        else:
            found = sorted(place.glob("*/result.json"))
            copies = sorted([*place.glob("*.json"), *place.glob("*/*.json")])
            files += found
            files += [file for file in copies if not is_run(file.parent) and _is_result(file)]
    return list(dict.fromkeys(file.absolute() for file in files))


def find_unfinished(places: Iterable[Path]) -> list[Path]:
    """Find folders of runs that are going on or were stopped, as :func:`find_results` looks."""
    folders = [
        folder
        for place in places
        if place.is_dir()
        for folder in ([place] if is_run(place) else sorted(place.iterdir()))
        if is_run(folder) and _is_unfinished(folder)
    ]
    return list(dict.fromkeys(folder.absolute() for folder in folders))


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's own, not one of copied results."""
    return (folder / "config.json").is_file() or (folder / "result.json").is_file()


def _is_unfinished(folder: Path) -> bool:
    """A run without a result, or one that was resumed after its result was written."""
    result, clock = folder / "result.json", folder / "clock.json"
    if not result.is_file():
        return True
    return clock.is_file() and clock.stat().st_mtime > result.stat().st_mtime


def _is_result(file: Path) -> bool:
    """Look at the beginning only: other JSON files beside results may be large."""
    try:
        with file.open("rb") as opened:
            return b'"recipe"' in opened.read(200)
    except OSError:
        return False


def read_result(file: Path) -> Result:
    """Read a ``result.json``.

    Raises:
        ValueError: it is not one.
    """
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{file} is larger than {MAX_BYTES} bytes: no result of a run is")
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(result, dict):
        raise ValueError(f"{file} is not the result of a run")
    for key, kind in _NEEDED.items():
        if not isinstance(result.get(key), kind):
            found = type(result[key]).__name__ if key in result else "nothing"
            expected = f"{key!r} must be a {kind.__name__}, got {found}"
            raise ValueError(f"{file} is not the result of a run: {expected}")
    return result


def command(result: Result) -> str:
    """Return the command that runs this result again.

    Flags are given where the configuration differs from the form's, or all of them if the recipe
    cannot be loaded here.
    """
    known = result["recipe"] in catalog.names()
    words = ["steelyard", "run", result["recipe"] if known else f"{result['recipe']}.py"]
    if result["form"] == "full":
        words.append("--full")
    words += ["--seeds", str(len(result["seeds"]) + len(result.get("failed", {})))]
    defaults = _defaults(result)
    for name, value in result["config"].items():
        if name not in defaults or defaults[name] != value:
            words += _flag(name, value)
    return shlex.join(words)


def _flag(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else f"--no-{name.replace('_', '-')}"]
    return [flag, *map(str, _flat(value))]


def _flat(value: Any) -> list[Any]:
    return [leaf for item in value for leaf in _flat(item)] if isinstance(value, list) else [value]


def _defaults(result: Result) -> dict[str, Any]:
    recipe = _recipe(result)
    return recipe.config_to(recipe.form(result["form"]).config) if recipe else {}


def _recipe(result: Result) -> "Recipe | None":
    """Load the catalogue's recipe of a result; ``None`` if there is none or it cannot load here."""
    from steelyard.lab.recipe import load_recipe

    if result["recipe"] not in catalog.names():
        return None
    try:
        return load_recipe(result["recipe"])
    except (ValueError, ImportError):
        return None


def _figures(result: Result, file: Path, scratch: Path) -> list[Path]:
    """Return the figures beside a result file, or draw them."""
    if (file.parent / "figures").is_dir():
        drawn = figures_beside(file, whole=is_run(file.parent))
        if drawn or not is_run(file.parent):
            return drawn
    key = f"{file} {file.stat().st_mtime_ns}"
    folder = scratch / hashlib.sha256(key.encode()).hexdigest()[:16]
    return sorted(folder.iterdir()) if folder.is_dir() else _draw(result, folder)


def _draw(result: Result, folder: Path) -> list[Path]:
    from steelyard.lab.plots import draw_figures

    recipe = _recipe(result)
    extra = recipe.figures(result) if recipe and recipe.figures else None
    return draw_figures(result, extra, folder)


def _write(out: Path, html: str) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, html.encode())
