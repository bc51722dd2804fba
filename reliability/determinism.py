"""Run the quick form of every recipe twice and compare the numbers byte for byte.

The two runs are `steelyard run NAME` in processes of their own, at the same time, with other
seeds of Python's hashes. What is compared: every `metrics.jsonl`, the `result.json` of each seed,
and the run's `result.json` with its verdicts, without the times in it.

    python reliability/determinism.py                         # all; updates the committed result
    python reliability/determinism.py --recipes pld sinkd --seeds 2 --out /tmp/determinism.json

The exit code is 1 if a recipe gave other bytes. All recipes take about half an hour on two cores.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from _faults_run import numbers
from steelyard.lab.setup import installed_versions
from steelyard.recipes import catalog

RESULT = Path(__file__).resolve().parent / "results" / "determinism.json"


def recipes() -> list[str]:
    """Return the names of all recipes that ship."""
    systems = (*catalog.SYSTEMS, *map(catalog.find, catalog.OTHER_RECIPES))
    return [system.name for system in systems if catalog.status(system) == "recipe ready"]


def main(argv: list[str] | None = None) -> int:
    """Run and compare; return the exit code."""
    given = _parser().parse_args(argv)
    console = Console(highlight=False)
    failed = False
    for name in given.recipes:
        with tempfile.TemporaryDirectory(prefix="determinism-") as home:
            began = time.monotonic()
            row = compare(*twice(name, given.seeds, Path(home)))
        seconds = round(time.monotonic() - began, 1)
        failed |= bool(row["different"])
        told = f"other bytes in {', '.join(row['different'])}" if row["different"] else "same bytes"
        console.print(f"{name}: {told} ({row['files']} files, {row['bytes']:,} bytes, {seconds} s)")
        store(given.out, given.seeds, {"recipe": name, **row, "seconds": seconds})
    console.print(f"Result: {given.out}")
    return int(failed)


def twice(name: str, seeds: int, home: Path) -> list[dict[str, bytes]]:
    """Return the numbers of two runs of a recipe's quick form.

    Raises:
        RuntimeError: a run did not end well; with what it said last.
    """
    command = [sys.executable, "-m", "steelyard", "run", name, f"--seeds={seeds}"]
    command += ["--workers=2"]  # as one of two, each run takes half of the threads
    runs = []
    for number in (1, 2):
        environment = os.environ | {
            "PYTHONHASHSEED": str(number),
            "STEELYARD_HOME": str(home / f"home-{number}"),
        }
        folder = home / str(number)
        with (home / f"said-{number}").open("w") as said:
            process = subprocess.Popen(
                [*command, "--out", folder],
                stdout=said,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        runs.append((process, folder))
    for number, (process, _) in enumerate(runs, 1):
        if process.wait():
            last = (home / f"said-{number}").read_text().strip()[-500:]
            raise RuntimeError(f"{name} ended with exit code {process.returncode}: {last}")
    return [numbers(folder) for _, folder in runs]


def compare(first: Mapping[str, bytes], second: Mapping[str, bytes]) -> dict[str, Any]:
    """Return how much was compared, its digest, and the files that differ or lack."""
    names = sorted({*first, *second})
    digest = hashlib.sha256(b"".join(name.encode() + first.get(name, b"") for name in names))
    return {
        "files": len(names),
        "bytes": sum(map(len, first.values())),
        "sha256": digest.hexdigest(),
        "different": [name for name in names if first.get(name) != second.get(name)],
    }


def store(out: Path, seeds: int, row: dict[str, Any]) -> None:
    """Add a recipe's row; rows of the same versions and number of seeds stay."""
    record: dict[str, Any] = {
        "form": "quick",
        "seeds": seeds,
        "versions": installed_versions(),
        "rows": [],
    }
    if out.exists():
        before = json.loads(out.read_text())
        if all(before[key] == record[key] for key in ("seeds", "versions")):
            record = before
    rows = [old for old in record["rows"] if old["recipe"] != row["recipe"]] + [row]
    order = recipes()
    record["rows"] = sorted(rows, key=lambda each: order.index(each["recipe"]))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = recipes()
    parser.add_argument("--recipes", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--seeds", type=int, default=1, help="of each run (default: 1)")
    parser.add_argument("--out", type=Path, default=RESULT, help="default: the committed result")
    return parser


if __name__ == "__main__":
    sys.exit(main())
