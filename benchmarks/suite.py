"""What suites of paired cases share: cases, targets, options, printing, and the stored result.

A suite is a list of cases; each runs in a process of its own by way of ``paired``. A case names a
module with a function ``contest`` that takes the size and returns the contestants.
"""

import argparse
import importlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from paired import OURS, Row, in_a_process, measure, setting

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """One task at one size.

    Attributes:
        task: what is computed.
        module: whose function ``contest`` takes ``size``, and ``task`` if ``named``.
        size: arguments by name, shown in the tables.
        quick: the size of the quick form; ``None`` = not in it.
        named: the module serves several tasks.
        most_rounds: of a slow case.
    """

    task: str
    module: str
    size: dict[str, Any]
    quick: dict[str, Any] | None
    named: bool = False
    most_rounds: int = 1000

    def arguments(self, size: dict[str, Any]) -> dict[str, Any]:
        """Return what ``contest`` is called with."""
        return ({"task": self.task} if self.named else {}) | size


@dataclass(frozen=True)
class Target:
    """Our figure, by that of the best of some peers, at most.

    Attributes:
        task: the cases it holds for.
        figure: ``"time"`` or ``"memory"``; ``"seconds"`` is our CPU time by itself.
        peers: how the names of the peers begin.
        most: the largest ratio (or seconds) that meets the target.
        least: it holds for cases whose first number of ``size`` is at least this.
    """

    task: str
    figure: str
    peers: str
    most: float
    least: int = 0

    def covers(self, row: Row) -> bool:
        """Tell whether the target is for this row's case."""
        numbers = [value for value in row["size"].values() if isinstance(value, int)]
        return row["task"] == self.task and max(numbers[:1], default=0) >= self.least

    def judge(self, rows: Sequence[Row]) -> Row | None:
        """Compare ours with the peer that is hardest to beat; ``None`` if there is no such peer."""
        ours = next(row for row in rows if row["name"] == OURS)
        if self.figure == "seconds":
            values = {OURS: ours["cpu_seconds"]}
        else:
            values = {
                row["name"]: row["ours_over_this"][0]
                if self.figure == "time"
                else ours["peak_extra_mib"] / max(row["peak_extra_mib"], 0.1)
                for row in rows
                if row["name"] != OURS and row["name"].startswith(self.peers)
            }
        if not values:
            return None
        peer = max(values, key=lambda name: values[name])
        return {
            "task": self.task,
            "size": ours["size"],
            "figure": self.figure,
            "peer": peer,
            "target": self.most,
            "value": values[peer],
            "met": values[peer] <= self.most,
        }


@dataclass(frozen=True)
class Suite:
    """All cases of a script.

    Attributes:
        name: of the script and of its result.
        cases: in the order of the tables.
        targets: what is judged.
        packages: whose versions are stored.
        rounds: unless asked otherwise.
        settings: stored beside the number of rounds.
    """

    name: str
    cases: Sequence[Case]
    targets: Sequence[Target]
    packages: Sequence[str]
    rounds: int = 5
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks, in order."""
        return tuple(dict.fromkeys(case.task for case in self.cases))

    def judged(self, results: Sequence[Row]) -> list[Row]:
        """Judge each target at every size."""
        verdicts = []
        for target in self.targets:
            covered = [row for row in results if target.covers(row)]
            for size in {json.dumps(row["size"]): row["size"] for row in covered}.values():
                verdict = target.judge([row for row in covered if row["size"] == size])
                verdicts += [verdict] if verdict else []
        return verdicts


def measured(module: str, arguments: dict[str, Any], rounds: int) -> list[Row]:
    """Measure one case in this process."""
    import torch

    torch.set_num_threads(1)
    return measure(importlib.import_module(module).contest(**arguments), rounds)


def described(size: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in size.items())


def line(row: Row) -> str:
    error = "" if row["error"] is None else f"error {row['error']:.1e}"
    middle, low, high = row["ours_over_this"]
    return (
        f"{row['task']:11} {described(row['size']):58} {row['name']:46} "
        f"{row['cpu_seconds'] * 1e3:10.3f} ms  ours x{middle:.2f} ({low:.2f} to {high:.2f})  "
        f"peak {row['peak_extra_mib']:7.1f} MiB  {error}"
    )


def verdict_line(verdict: Row) -> str:
    return (
        f"{'met   ' if verdict['met'] else 'MISSED'} {verdict['task']:11} "
        f"{described(verdict['size']):58} {verdict['figure']:7} {verdict['value']:.3f} by "
        f"{verdict['peer']}, at most {verdict['target']:.3f}"
    )


def listing(suite: Suite) -> str:
    lines = [f"{case.task:11} {described(case.size)}" for case in suite.cases]
    targets = [
        f"{t.task:11} {t.figure} at most {t.most:.3g} of {t.peers or 'every peer'}"
        for t in suite.targets
    ]
    return "\n".join(("cases", *lines, "", "targets", *targets))


def main(suite: Suite, script: str, description: str | None) -> None:
    """Read the options of a script and do what they say."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument(
        "--only",
        nargs="+",
        default=suite.tasks,
        choices=suite.tasks,
        metavar="TASK",
        help=f"some of: {', '.join(suite.tasks)}",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, one round, no file")
    parser.add_argument("--list", action="store_true", help="print cases and targets, run nothing")
    parser.add_argument("--rounds", type=int, default=suite.rounds)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{suite.name}.json")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(*json.loads(options.measure))))
    elif options.list:
        print(listing(suite))
    else:
        run(suite, script, options)


def run(suite: Suite, script: str, options: argparse.Namespace) -> None:
    """Measure what was asked for, print it, and update the file unless quick."""
    out: Path = options.out
    kept = out.exists() and not options.quick
    stored = json.loads(out.read_text(encoding="utf-8")) if kept else {}
    seconds = dict(stored.get("wall_seconds", {}))
    results = [row for row in stored.get("results", ()) if row["task"] not in options.only]
    for task in options.only:
        begin = time.perf_counter()
        for case in (case for case in suite.cases if case.task == task):
            size = case.quick if options.quick else case.size
            if size is None:
                continue
            rounds = 1 if options.quick else min(options.rounds, case.most_rounds)
            for row in in_a_process(script, case.module, case.arguments(size), rounds):
                results.append({"task": task, "size": size} | row)
                print(line(results[-1]), flush=True)
        seconds[task] = round(time.perf_counter() - begin, 1)
    if options.quick:  # the targets are for the full sizes
        return
    results.sort(key=lambda row: suite.tasks.index(row["task"]))
    verdicts = suite.judged(results)
    print(*map(verdict_line, verdicts), sep="\n")
    content = {
        "benchmark": suite.name,
        "settings": {"rounds": options.rounds, "threads": 1} | suite.settings,
        **setting(suite.packages),
        "date": datetime.now(UTC).date().isoformat(),
        "wall_seconds": seconds,
        "targets": verdicts,
        "results": results,
    }
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
