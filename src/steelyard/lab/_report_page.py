"""What the page of a report shows, from the results: systems, their claims, their sections."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steelyard.lab._report_figures import embed, one_of_each
from steelyard.lab.claims import interquartile_mean
from steelyard.recipes import catalog

VERDICTS = ("HOLDS", "UNDECIDED", "FAILS", "NOT RUN")
NONE = "no result"
OWN = "your recipe"

Part = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A result and what is shown with it.

    Attributes:
        result: the content of a ``result.json``.
        label: what tells it from others of the recipe: its form, or the name of its file.
        figures: figure files.
        command: what runs it again.
    """

    result: dict[str, Any]
    label: str
    figures: tuple[Path, ...]
    command: str


def page_content(entries: Sequence[Entry]) -> Part:
    """Return what the template needs: the systems with their results and rows, and the counts."""
    sections = [_section(index, entry) for index, entry in enumerate(entries, start=1)]
    systems = _systems(sections)
    rows = [row for system in systems for row in system["rows"]]
    said = [row["verdict"] for row in rows]
    verdicts = {name: said.count(name) for name in (*VERDICTS, NONE) if name in said}
    return {
        "systems": systems,
        "fields": sorted({system["field"] for system in systems}),
        "verdicts": verdicts,
        "claims": {name: count for name, count in verdicts.items() if name != NONE},
        "statuses": _statuses(),
        "measured": sum(1 for system in systems if system["results"]),
    }


def _statuses() -> dict[str, int]:
    states = [catalog.status(system) for system in catalog.SYSTEMS]
    return {state: states.count(state) for state in catalog.STATUSES if state in states}


def _systems(sections: Sequence[Part]) -> list[Part]:
    """All systems of the catalogue, then recipes of the user's, each with its results."""
    systems = [
        {
            "name": system.name,
            "anchor": f"system-{system.name}",
            "title": system.title,
            "purpose": system.purpose,
            "arxiv": system.arxiv,
            "names": system.names,
            "package": system.package,
            "field": system.package.replace("_", " "),
            "status": catalog.status(system),
        }
        for system in catalog.SYSTEMS
    ]
    known = {system["name"]: system["name"] for system in systems} | catalog.OTHER_RECIPES
    own: dict[str, Part] = {}
    for section in sections:
        name = section["recipe"]
        if name not in known:
            known[name] = name
            own[name] = _own(name, section["result"].get("title", ""), len(own) + 1)
    return [
        system | _filled(system, [s for s in sections if known[s["recipe"]] == system["name"]])
        for system in (*systems, *own.values())
    ]


def _own(name: str, title: str, number: int) -> Part:
    return {
        "name": name,
        "anchor": f"own-{number}",
        "title": title,
        "purpose": "",
        "arxiv": "",
        "names": (),
        "package": "",
        "field": OWN,
        "status": OWN,
    }


def _filled(system: Part, sections: list[Part]) -> Part:
    """Add a system's results, weightiest first, and its rows of the scoreboard."""
    results = sorted(sections, key=_weight, reverse=True)
    results.sort(key=lambda section: section["recipe"] != system["name"])  # its own recipe first
    rows = [
        _row(claim, section)
        for recipe in dict.fromkeys(section["recipe"] for section in results)
        for claim, section in _claims([s for s in results if s["recipe"] == recipe])
    ]
    said = [row["verdict"] for row in rows]
    verdicts = {name: said.count(name) for name in VERDICTS if name in said}
    return {"results": results, "verdicts": verdicts, "rows": rows or [_no_row(system, results)]}


def _claims(sections: list[Part]) -> list[tuple[Part, Part]]:
    """Each claim of a recipe once: from the weightiest result that judged it."""
    chosen: dict[str, tuple[Part, Part]] = {}
    for section in sections:
        for claim in section["result"]["claims"]:
            before = chosen.get(claim["statement"])
            if before is None or (before[0]["verdict"] == "NOT RUN" != claim["verdict"]):
                chosen[claim["statement"]] = (claim, section)
    return list(chosen.values())


def _row(claim: Part, section: Part) -> Part:
    return {"verdict": claim["verdict"], "claim": claim, "section": section}


def _no_row(system: Part, results: list[Part]) -> Part:
    if results:
        said = "run, no claim"
    else:
        said = NONE if system["status"] == "recipe ready" else system["status"]
    return {"verdict": NONE, "claim": None, "section": None, "said": said}


def _weight(section: Part) -> tuple[bool, bool, int, str]:
    result = section["result"]
    return (
        bool(section["judged"]),
        result["form"] == "full",
        len(result["seeds"]),
        result["started"],
    )


def _section(index: int, entry: Entry) -> Part:
    """Collect what the page shows of one result."""
    result = entry.result
    seeds = list(result["metrics"])
    keys = dict.fromkeys(key for metrics in result["metrics"].values() for key in metrics)
    judged = [claim for claim in result["claims"] if claim["verdict"] != "NOT RUN"]
    return {
        "anchor": f"result-{index}",
        "recipe": result["recipe"],
        "label": entry.label,
        "result": result,
        "seeds": seeds,
        "judged": judged,
        "left": len(result["claims"]) - len(judged),
        "metrics": [
            _metric_row(key, [result["metrics"][seed].get(key) for seed in seeds]) for key in keys
        ],
        "figures": [embed(file) for file in one_of_each(entry.figures)],
        "command": entry.command,
        "failed": result.get("failed", {}),
    }


def _metric_row(key: str, values: list[float | None]) -> Part:
    measured = [value for value in values if value is not None and math.isfinite(value)]
    middle = interquartile_mean(measured) if measured else None
    return {"key": key, "values": values, "middle": middle}
