"""One self-contained HTML page from the results of runs.

The page holds its figures and its style, loads nothing, and works offline, on a phone, in light
and in dark. Every text is escaped, whatever a recipe is called.
"""

import base64
import json
import math
import shlex
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steelyard.lab._format import effect, number
from steelyard.lab.claims import interquartile_mean
from steelyard.lab.progress import duration
from steelyard.lab.storage import write_atomic
from steelyard.recipes import catalog

if TYPE_CHECKING:
    from steelyard.lab.recipe import Recipe

Result = dict[str, Any]

_MEDIA = {".svg": "image/svg+xml", ".png": "image/png"}


def render_report(
    results: Sequence[Result], out: Path, *, figures: Mapping[str, Sequence[Path]] | None = None
) -> None:
    """Write the page: a scoreboard of all systems, then a section for each result.

    Args:
        results: contents of ``result.json`` files.
        out: the HTML file; its folder is made if missing.
        figures: figure files by recipe, or by ``"<recipe>-<form>"`` where both forms are shown.
            They are put into the page; of the same figure as SVG and PNG the SVG is taken.

    Raises:
        OSError: ``out`` cannot be written.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "effect": effect, "duration": duration}
    sections = [
        _section(index, result, figures or {}) for index, result in enumerate(results, start=1)
    ]
    html = environment.get_template("report.html.j2").render(
        board=_scoreboard(sections),
        sections=sections,
        counts=_counts(),
        verdicts=_verdicts(sections),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, html.encode())


def render_results(files: Sequence[Path], out: Path) -> list[Path]:
    """Write the page from ``result.json`` files: of each recipe and form the newest.

    Figures are taken from the folder ``figures`` beside a file, or drawn again.

    Args:
        files: as :func:`find_results` returns them.
        out: the HTML file.

    Returns:
        The files that are on the page.

    Raises:
        ValueError: a file is not a result.
    """
    newest: dict[tuple[str, str], tuple[Result, Path]] = {}
    for file in files:
        result = read_result(file)
        key = (result["recipe"], result["form"])
        if key not in newest or newest[key][0]["started"] < result["started"]:
            newest[key] = (result, file)
    figures: dict[str, Sequence[Path]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for (recipe, form), (result, file) in newest.items():
            drawn = sorted((file.parent / "figures").glob("*.svg")) if _is_run(file) else []
            figures[f"{recipe}-{form}"] = drawn or _draw(result, Path(scratch) / f"{len(figures)}")
        render_report([result for result, _ in newest.values()], out, figures=figures)
    return [file for _, file in newest.values()]


def find_results(places: Iterable[Path]) -> list[Path]:
    """Find result files: a file itself, a run's ``result.json``, or those in folders below.

    Args:
        places: result files, run folders, folders of runs, folders of copied results.

    Raises:
        FileNotFoundError: a place does not exist.
    """
    files: list[Path] = []
    for place in places:
        if place.is_file():
            files.append(place)
        elif not place.is_dir():
            raise FileNotFoundError(f"there is no {place}")
        elif (place / "result.json").is_file():
            files.append(place / "result.json")
        else:
            files += sorted(place.glob("*/result.json"))
            copies = [*place.glob("*.json"), *place.glob("*/*.json")]
            files += sorted(file for file in copies if file.stem in catalog.FORMS)
    return list(dict.fromkeys(file.absolute() for file in files))


def read_result(file: Path) -> Result:
    """Read a ``result.json``.

    Raises:
        ValueError: it is not one.
    """
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    needed = ("recipe", "form", "config", "seeds", "metrics", "claims", "started")
    if not isinstance(result, dict) or any(key not in result for key in needed):
        raise ValueError(f"{file} is not the result of a run")
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


def _section(index: int, result: Result, figures: Mapping[str, Sequence[Path]]) -> Result:
    """Collect what the page shows of one result."""
    recipe, form = result["recipe"], result["form"]
    seeds = list(result["metrics"])
    keys = dict.fromkeys(key for metrics in result["metrics"].values() for key in metrics)
    files = figures.get(f"{recipe}-{form}", figures.get(recipe, ()))
    return {
        "anchor": f"result-{index}",
        "result": result,
        "seeds": seeds,
        "metrics": [
            _metric_row(key, [result["metrics"][seed].get(key) for seed in seeds]) for key in keys
        ],
        "figures": [_embed(file) for file in _one_of_each(files)],
        "command": command(result),
        "failed": result.get("failed", {}),
    }


def _metric_row(key: str, values: list[float | None]) -> dict[str, Any]:
    measured = [value for value in values if value is not None and math.isfinite(value)]
    middle = interquartile_mean(measured) if measured else None
    return {"key": key, "values": values, "middle": middle}


def _scoreboard(sections: Sequence[Result]) -> list[dict[str, Any]]:
    """One row a system, the catalogue's first; with the claims of its weightiest result."""
    best: dict[str, Result] = {}
    for section in sorted(sections, key=lambda section: _weight(section["result"])):
        best[section["result"]["recipe"]] = section
    rows = [
        {"name": system.name, "title": system.title, "status": catalog.status(system)}
        for system in catalog.SYSTEMS
    ]
    known = {row["name"] for row in rows}
    for name, section in best.items():
        if name not in known:
            title = section["result"].get("title", name)
            rows.append({"name": name, "title": title, "status": "your recipe"})
    return [row | {"section": best.get(row["name"])} for row in rows]


def _weight(result: Result) -> tuple[bool, int, str]:
    return result["form"] == "full", len(result["seeds"]), result["started"]


def _counts() -> dict[str, int]:
    states = [catalog.status(system) for system in catalog.SYSTEMS]
    return {state: states.count(state) for state in catalog.STATUSES}


def _verdicts(sections: Sequence[Result]) -> dict[str, int]:
    said = [claim["verdict"] for section in sections for claim in section["result"]["claims"]]
    return {verdict: said.count(verdict) for verdict in ("HOLDS", "FAILS", "UNDECIDED", "NOT RUN")}


def _one_of_each(files: Iterable[Path]) -> list[Path]:
    """Of the same figure in several formats keep one, the SVG before the PNG."""
    chosen: dict[str, Path] = {}
    for file in files:
        if file.suffix in _MEDIA and (file.stem not in chosen or file.suffix == ".svg"):
            chosen[file.stem] = file
    return list(chosen.values())


def _embed(file: Path) -> dict[str, str]:
    """Turn a figure into a data URI: as an image it can neither run scripts nor load anything."""
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    return {"name": file.stem, "source": f"data:{_MEDIA[file.suffix]};base64,{data}"}


def _is_run(file: Path) -> bool:
    return file.name == "result.json"


def _draw(result: Result, folder: Path) -> list[Path]:
    from steelyard.lab.plots import draw_figures

    recipe = _recipe(result)
    extra = recipe.figures(result) if recipe and recipe.figures else None
    return draw_figures(result, extra, folder)
