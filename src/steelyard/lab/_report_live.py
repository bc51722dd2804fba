"""How far runs are that have not finished, read from their folders while others write there.

Nothing is written or locked. What is half written is passed over; the next look will find it.
"""

import json
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from steelyard.lab.claims import judge
from steelyard.lab.recipe import Recipe, load_recipe

# A running lab writes its clock about every ten seconds.
SILENCE_SECONDS = 60.0
TAIL_BYTES = 1_000_000  # of a trial's log; longer logs are drawn from here on
POINTS = 80
WIDTH, HEIGHT = 120.0, 28.0

Part = dict[str, Any]


def read_unfinished(folders: Sequence[Path]) -> list[Part]:
    """Return how far each run is: its seeds, their trials, and the claims so far."""
    runs = [_run(folder) for folder in folders]
    return [run for run in runs if run is not None]


def _run(folder: Path) -> Part | None:
    config = _json(folder / "config.json")
    if not isinstance(config.get("seeds"), list) or "recipe" not in config:
        return None
    reference = str(config["recipe"])
    recipe = _recipe(reference)
    seeds = [_seed(folder / "seeds" / str(seed), seed, recipe) for seed in config["seeds"]]
    metrics = {str(seed["seed"]): seed["metrics"] for seed in seeds if seed["metrics"] is not None}
    return {
        "folder": folder.name,
        "recipe": recipe.name if recipe else Path(reference).stem,
        "form": config.get("form", ""),
        "started": config.get("started", ""),
        "seconds": _json(folder / "clock.json").get("wall_seconds", 0.0),
        "running": _age(folder / "clock.json") < SILENCE_SECONDS,
        "seeds": seeds,
        "finished": len(metrics),
        "claims": _claims(reference, json.dumps(metrics)) if metrics else (),
    }


def _seed(folder: Path, seed: int, recipe: Recipe | None) -> Part:
    result = _json(folder / "result.json")
    logs = sorted(folder.rglob("metrics.jsonl")) if folder.is_dir() else []
    trials = [_trial(log, folder, recipe.curves if recipe else ()) for log in logs]
    if result:
        state = "finished"
    elif (folder / "error.log").is_file():
        state = "failed"
    else:
        state = "begun" if folder.is_dir() else "waiting"
    return {
        "seed": seed,
        "state": state,
        "done": sum(1 for trial in trials if trial["done"]),
        "trials": [trial for trial in trials if not trial["done"]] if not result else [],
        "metrics": result.get("metrics") if result else None,
    }


def _trial(log: Path, folder: Path, curves: Sequence[str]) -> Part:
    done = (log.parent / "done.json").is_file()
    rows = [] if done else _rows(log)
    last = rows[-1] if rows else {}
    names = [name for name in last if name != "step"]
    drawn = next((name for name in curves if name in names), names[0] if names else "")
    return {
        "name": log.parent.relative_to(folder).as_posix(),
        "done": done,
        "step": last.get("step"),
        "values": {name: last[name] for name in ([drawn, *names] if names else [])},
        "drawn": drawn,
        "line": _polyline([row.get(drawn) for row in rows]),
    }


def _rows(log: Path) -> list[Part]:
    """Read the rows that are whole: the first after a cut and the last may not be."""
    try:
        with log.open("rb") as opened:
            size = opened.seek(0, 2)
            opened.seek(max(0, size - TAIL_BYTES))
            lines = opened.read().splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def _polyline(values: Sequence[Any]) -> str:
    """Return the points of a small curve; empty if there is nothing to draw."""
    finite = [v for v in values if isinstance(v, int | float) and math.isfinite(v)]
    if len(finite) < 2:
        return ""
    stride = max(1, len(finite) // POINTS)
    kept = finite[::-1][::stride][::-1]  # with the last
    low, span = min(kept), (max(kept) - min(kept)) or 1.0
    across = WIDTH / max(1, len(kept) - 1)
    return " ".join(
        f"{index * across:.1f},{HEIGHT - 2 - (value - low) / span * (HEIGHT - 4):.1f}"
        for index, value in enumerate(kept)
    )


@lru_cache(maxsize=64)
def _claims(reference: str, metrics: str) -> tuple[Part, ...]:
    """Judge the claims on the seeds so far; kept, since pages ask again and again."""
    recipe = _recipe(reference)
    judged = judge(recipe.claims, json.loads(metrics)) if recipe else []
    return tuple(asdict(j.claim) | asdict(j) for j in judged if j.verdict != "NOT RUN")


@lru_cache(maxsize=64)
def _recipe(reference: str) -> Recipe | None:
    """Load the recipe for its claims; a page about a run needs none."""
    try:
        return load_recipe(reference)
    except Exception:  # a file of the user's, moved or half edited, can raise anything
        return None


def _json(file: Path) -> Part:
    with suppress(OSError, ValueError):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    return {}


def _age(file: Path) -> float:
    with suppress(OSError):
        return time.time() - file.stat().st_mtime
    return math.inf
