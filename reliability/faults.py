"""Break runs on purpose, resume them, and compare with a run that nothing befell.

Each trial takes one recipe with tiny settings, does one thing to it, and goes on with `steelyard
resume`. The run's numbers must then be those of an unbroken run, byte for byte.

    python reliability/faults.py                       # all of it; updates the committed result
    python reliability/faults.py --kinds kill --recipes toy pld --trials 5 --out /tmp/faults.json
    python reliability/faults.py --reproduce kill/toy/17       # one trial again, by its name
    python reliability/faults.py --list                        # kinds, recipes, numbers of trials

Outcomes:
  recovered   went on, and ended with the same numbers
  refused     one clear line where going on would be wrong (the settings were altered); nothing
              was touched
  lost        could not go on although it should
  wrong       other numbers, a traceback in place of a line, or an error that does not say why

The exit code is 1 if any trial is lost or wrong. Needs Linux; a full disk and a read-only folder
are file systems of their own if this is root, else the largest size of a file is limited and the
read-only folder is skipped.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a fork needs a process without other threads

from rich.console import Console
from rich.progress import Progress

from _faults_kinds import FRESH, KINDS, SkipError, attempt
from _faults_run import Case, Outcome, Trial
from steelyard.lab.setup import installed_versions

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "reliability" / "results" / "faults.json"
TOY = str(ROOT / "tests" / "lab" / "toy.py")

_LM = "--seeds 1 --base-steps 4 --samples 4 --prompts 4"
COMMANDS = {
    "toy": (f"{TOY} --seeds 2 --steps 120 --pause 0.002", f"{TOY} --seeds 2 --steps 90"),
    "bpo": (
        "bpo --seeds 1 --parts exact stability --mdps 5 --iterations 3 "
        "--stability-envs CartPole-v1 --stability-epochs 1 --stability-steps 1",
        "bpo --seeds 1 --parts exact --mdps 5 --iterations 2",
    ),
    "canon": (
        f"canon {_LM} --parts exact direction --steps 4 --early 2",
        f"canon {_LM} --parts direction --steps 3 --early 2",
    ),
    "adora": (
        f"adora {_LM} --parts share train --steps 4 --share-batches 2",
        f"adora {_LM} --parts train --steps 3",
    ),
    "pld": (
        "pld --seeds 2 --parts digits --digits-images 60 --digits-epochs 1",
        "pld --seeds 2 --parts digits --digits-images 50 --digits-epochs 1",
    ),
    "sinkd": ("sinkd --seeds 2 --steps 4", "sinkd --seeds 2 --steps 3"),
    "ranking-accuracy": (
        "ranking-accuracy --seeds 1 --pairs 32 --held-out 32 --updates 10 --base-steps 2",
        "ranking-accuracy --seeds 1 --pairs 32 --held-out 32 --updates 12 --base-steps 2",
    ),
}
"""Each recipe's run, and one with other numbers."""

TRIALS = {
    "kill": (60, 8),
    "corrupt": (50, 4),
    "full-disk": (16, 2),
    "read-only": (6, 1),
    "clock": (4, 1),
    "lock": (20, 1),
    "memory": (4, 2),
}
"""Trials of each kind on the toy, and on each other recipe."""

COUNTS = ("trials", "recovered", "refused", "lost", "wrong")


def main(argv: list[str] | None = None) -> int:
    """Run the campaign; return the exit code."""
    given = _parser().parse_args(argv)
    console = Console(highlight=False)
    if given.list:
        for kind, (toy, others) in TRIALS.items():
            console.print(f"{kind}: {toy} trials on the toy, {others} on each other recipe")
        for name, (command, _) in COMMANDS.items():
            console.print(f"{name}: steelyard run {command.replace(str(ROOT) + '/', '')}")
        return 0
    with tempfile.TemporaryDirectory(prefix="faults-", dir=given.scratch) as home:
        os.environ["STEELYARD_HOME"] = str(Path(home) / "home")
        if given.reproduce:
            kind, recipe, number = given.reproduce.split("/")
            plans = [[(kind, recipe, int(number))]]
        else:
            plans = [[*_plan(given.kinds, recipe, given.trials)] for recipe in given.recipes]
        out = given.out or (None if given.reproduce else RESULT)
        failed = False
        for plan in plans:  # stored recipe by recipe: a campaign that is stopped keeps what it has
            record = campaign(plan, given.seed, Path(home), console)
            failed |= any(row["lost"] + row["wrong"] for row in record["rows"])
            _say(record, console)
            if out is not None:
                store(record, out)
    if out is not None:
        console.print(f"Result: {out}")
    return int(failed)


def store(record: dict[str, Any], out: Path) -> None:
    """Write the result; rows of other kinds and recipes with the same seed stay."""
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {(row["kind"], row["recipe"]) for row in record["rows"]}
    done |= {tuple(name.split("/")) for name in record["skipped"]}
    if out.exists():
        before = json.loads(out.read_text())
        if before["seed"] == record["seed"] and before["versions"] == record["versions"]:
            kept = [row for row in before["rows"] if (row["kind"], row["recipe"]) not in done]
            skipped = before["skipped"] | record["skipped"]
            record = record | {"rows": kept + record["rows"], "skipped": skipped}
    order = [*KINDS], [*COMMANDS]
    rows = sorted(
        record["rows"],
        key=lambda row: (order[0].index(row["kind"]), order[1].index(row["recipe"])),
    )
    total = {key: sum(row[key] for row in rows) for key in (*COUNTS, "seconds")}
    out.write_text(json.dumps(record | {"total": total, "rows": rows}, indent=1) + "\n")


def campaign(
    plan: list[tuple[str, str, int]], seed: int, home: Path, console: Console
) -> dict[str, Any]:
    """Carry out the trials ``(kind, recipe, number)``; return what is stored."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    cases: dict[str, Case] = {}
    # No thread may redraw the bar: this process forks.
    with Progress(console=console, auto_refresh=False) as bar:
        task = bar.add_task("trials", total=len(plan))
        for kind, recipe, number in plan:
            name = f"{kind}/{recipe}/{number}"
            bar.update(task, description=f"{name:<30}", refresh=True)
            if recipe not in cases:
                cases[recipe] = make_case(recipe, home)
            began = time.monotonic()
            place = home / name.replace("/", "-")
            place.mkdir()
            try:
                outcome = attempt(
                    kind, Trial(cases[recipe], place, random.Random(f"{seed}/{name}"))
                )
            except SkipError as reason:
                skipped[f"{kind}/{recipe}"] = str(reason)
                continue
            finally:
                bar.advance(task)
            reason = outcome.reason.replace(f"{place}/", "").replace(f"{home}/", "")
            outcome = outcome._replace(reason=reason)
            row = rows.setdefault((kind, recipe), _empty(kind, recipe))
            _count(row, name, outcome, time.monotonic() - began)
            if outcome.status in ("lost", "wrong"):
                console.print(f"{name} is {outcome.status}: {reason}")
    record = {"seed": seed, "versions": installed_versions(), "fresh_share": FRESH}
    return record | {"skipped": skipped, "rows": list(rows.values())}


def make_case(recipe: str, home: Path) -> Case:
    """Return a recipe's case, run once without faults."""
    command, other = COMMANDS[recipe]
    case = Case(recipe, tuple(command.split()), tuple(other.split()), home / f"case-{recipe}")
    case.prepare()
    return case


def _plan(kinds: list[str], recipe: str, trials: int | None) -> Iterator[tuple[str, str, int]]:
    for kind in kinds:
        usual = TRIALS[kind][recipe != "toy"]
        for number in range(usual if trials is None else trials):
            yield kind, recipe, number


def _empty(kind: str, recipe: str) -> dict[str, Any]:
    numbers = dict.fromkeys((*COUNTS, "hits", "seconds"), 0)
    return {"kind": kind, "recipe": recipe, **numbers, "notes": {}}


def _count(row: dict[str, Any], name: str, outcome: Outcome, seconds: float) -> None:
    row["trials"] += 1
    row[outcome.status] += 1
    row["hits"] += outcome.hits
    row["seconds"] = round(row["seconds"] + seconds, 1)
    if outcome.reason:
        row["notes"][name] = f"{outcome.status}: {outcome.reason}"


def _say(record: dict[str, Any], console: Console) -> None:
    for kind in KINDS:
        rows = [row for row in record["rows"] if row["kind"] == kind]
        if rows:
            total = {key: sum(row[key] for row in rows) for key in COUNTS}
            console.print(
                f"{rows[0]['recipe']}, {kind}: "
                + ", ".join(f"{n} {key}" for key, n in total.items())
            )
    for name, reason in record["skipped"].items():
        console.print(f"{name} was skipped: {reason}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--recipes", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--trials", type=int, help="of each kind on each recipe; see --list")
    parser.add_argument("--seed", type=int, default=0, help="draws instants, files and places")
    parser.add_argument("--out", type=Path, help="default: the committed result")
    parser.add_argument("--scratch", help="folder for the runs; default: that of the system")
    parser.add_argument("--reproduce", metavar="KIND/RECIPE/NUMBER", help="one trial, by its name")
    parser.add_argument("--list", action="store_true", help="show what would be done")
    return parser


if __name__ == "__main__":
    sys.exit(main())
