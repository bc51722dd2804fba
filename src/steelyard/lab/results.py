"""From finished seeds to one result: merged metrics, curves, verdicts, speed."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from steelyard.lab.claims import Judgement, judge
from steelyard.lab.recipe import Recipe
from steelyard.lab.setup import Setup, machine
from steelyard.lab.storage import (
    FORMAT,
    DamagedError,
    Row,
    check_log,
    read_bytes,
    read_done,
    read_sealed,
    write_atomic,
    write_sealed,
)
from steelyard.lab.training import Lab, finite_row

CURVE_POINTS = 200


def seed_folder(folder: Path, seed: int) -> Path:
    """Where one seed writes."""
    return folder / "seeds" / str(seed)


def store_seed(lab: Lab, metrics: Mapping[str, float]) -> None:
    """Declare a seed finished: its metrics, its trials in order and the digests of their logs.

    Raises:
        TypeError: ``metrics`` is not a dict.
        FloatingPointError: a metric is not finite; names it.
    """
    if not isinstance(metrics, Mapping):
        raise TypeError(f"run(config, lab) must return a dict, got {type(metrics).__name__}")
    folder = seed_folder(lab.folder, lab.seed)
    trials = {name: asdict(read_done(folder / name)[2]) for name in lab.trials}
    content = {"format": FORMAT, "seed": lab.seed, "metrics": finite_row(metrics), "trials": trials}
    write_sealed(folder / "result.json", content)


def read_seed(folder: Path, seed: int) -> dict[str, Any] | None:
    """Return a finished seed's ``result.json``; ``None`` if it is not finished.

    Raises:
        DamagedError: something that the result vouches for is not what was written.
    """
    place = seed_folder(folder, seed)
    if not (place / "result.json").exists():
        return None
    result = read_sealed(place / "result.json")
    for name, vouched in result["trials"].items():
        try:
            _, _, extent = read_done(place / name)
            if asdict(extent) != vouched:
                raise DamagedError("done.json is of another run of the trial")
            check_log(place / name, extent)
        except DamagedError as error:
            raise DamagedError(f"trial {name}: {error}") from None
    return result


def collect(
    folder: Path, recipe: Recipe, setup: Setup, failures: Mapping[int, str], wall_seconds: float
) -> dict[str, Any]:
    """Merge the finished seeds, judge the claims; write ``metrics.jsonl`` and ``result.json``.

    Args:
        folder: the run's folder.
        recipe: what was run.
        setup: how.
        failures: reasons of the seeds that failed. While there are any, no claim HOLDS or FAILS:
            the seeds that survived are a biased sample.
        wall_seconds: time of all sessions.

    Returns:
        The result, as written.
    """
    seeds = [result for seed in setup.seeds if (result := read_seed(folder, seed)) is not None]
    digest = _merge_metrics(folder, seeds)
    steps, seconds = _effort(folder, seeds)
    metrics = {str(result["seed"]): result["metrics"] for result in seeds}
    result = {
        "recipe": recipe.name,
        "title": recipe.title,
        "form": setup.form,
        "config": setup.config,
        "seeds": [result["seed"] for result in seeds],
        "failed": {str(seed): reason for seed, reason in failures.items()},
        "versions": setup.versions,
        "machine": machine(),
        "started": setup.started,
        "wall_seconds": round(wall_seconds, 3),
        "steps": steps,
        "steps_per_second": round(steps / seconds, 3) if seconds > 0 else 0.0,
        "metrics": metrics,
        "metrics_sha256": digest,
        "claims": [_claim(j, failures) for j in judge(recipe.claims, metrics)],
        "curves": _curves(folder, seeds, recipe.curves),
        "units": recipe.units,
    }
    write_atomic(folder / "result.json", _readable(result).encode())
    return result


def _claim(judgement: Judgement, failures: Mapping[int, str]) -> dict[str, Any]:
    stored = asdict(judgement)
    flat: dict[str, Any] = stored.pop("claim") | stored
    if failures and judgement.verdict != "NOT RUN":
        failed = ", ".join(map(str, failures))
        reason = f"seeds that failed: {failed}; the verdict waits for them"
        flat |= {"verdict": "UNDECIDED", "note": f"{flat['note']}; {reason}".lstrip("; ")}
    return flat


def _readable(result: dict[str, Any]) -> str:
    """JSON with a line for each field but each list of numbers on one line."""
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    return re.sub(r"\[\n\s*([-+.\deE,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)


def _logs(folder: Path, seeds: Iterable[dict[str, Any]]) -> Iterable[tuple[int, str, list[Row]]]:
    for result in seeds:
        for name in result["trials"]:
            log = read_bytes(seed_folder(folder, result["seed"]) / name / "metrics.jsonl") or b""
            yield result["seed"], name, [json.loads(line) for line in log.splitlines()]


def _merge_metrics(folder: Path, seeds: list[dict[str, Any]]) -> str:
    lines = [
        json.dumps({"seed": seed, "trial": trial} | row) + "\n"
        for seed, trial, rows in _logs(folder, seeds)
        for row in rows
    ]
    merged = "".join(lines).encode()
    write_atomic(folder / "metrics.jsonl", merged)
    return hashlib.sha256(merged).hexdigest()


def _effort(folder: Path, seeds: list[dict[str, Any]]) -> tuple[int, float]:
    """Steps of all trials that have steps, and the seconds they took."""
    done = [
        read_done(seed_folder(folder, result["seed"]) / name)
        for result in seeds
        for name in result["trials"]
    ]
    trained = [(steps, seconds) for steps, seconds, _ in done if steps > 0]
    return sum(steps for steps, _ in trained), sum(seconds for _, seconds in trained)


def _curves(
    folder: Path, seeds: list[dict[str, Any]], wanted: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
    series: dict[str, dict[str, dict[str, tuple[list[float], list[float]]]]] = {}
    for seed, trial, rows in _logs(folder, seeds):
        for metric in wanted:
            points = [(row["step"], row[metric]) for row in rows if metric in row]
            if points:
                steps, values = zip(*points, strict=True)
                of_trial = series.setdefault(trial, {}).setdefault(metric, {})
                of_trial[str(seed)] = (list(steps), list(values))
    return {
        trial: {metric: _on_one_grid(of_seed) for metric, of_seed in metrics.items()}
        for trial, metrics in series.items()
    }


def _on_one_grid(of_seed: dict[str, tuple[list[float], list[float]]]) -> dict[str, Any]:
    """Thin the seeds' series to at most ``CURVE_POINTS`` common steps.

    Seeds that logged at the same steps keep their points; others are interpolated linearly over
    the steps that all of them cover.
    """
    grids = [np.asarray(steps) for steps, _ in of_seed.values()]
    if all(np.array_equal(grid, grids[0]) for grid in grids):
        points = min(CURVE_POINTS, grids[0].size)
        grid = grids[0][np.linspace(0, grids[0].size - 1, points).round().astype(int)]
    else:
        first, last = max(g[0] for g in grids), min(g[-1] for g in grids)
        points = min(CURVE_POINTS, max(g.size for g in grids))
        grid = np.linspace(first, max(first, last), points).round()
    values = {seed: np.interp(grid, *series).tolist() for seed, series in of_seed.items()}
    return {"step": grid.astype(int).tolist(), "values": values}
