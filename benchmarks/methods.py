"""Measure the methods beside other packages: optimisers, losses, samplers, scores, a network.

Everything runs on one thread. Each case has a process of its own, where the contestants must first
agree. Memory: every contestant runs once in a fork; its peak beyond what the fork held at the
start. Time: rounds run all contestants in turn (A B C, then C B A), quick ones several times; the
figure to read is our CPU time over a peer's inside one round, median over the rounds, with the
smallest and the largest.

    python benchmarks/methods.py                # about 10 minutes; updates the committed result
    python benchmarks/methods.py --quick        # small sizes, one round; writes nothing
    python benchmarks/methods.py --only adamp dpp       # rows of tasks that were not run stay
    python benchmarks/methods.py --list         # the cases and the targets

What each case computes stands in ``benchmarks/method_cases/``.
"""

import argparse
import importlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from paired import OURS, Row, in_a_process, measure, setting

RESULT = Path(__file__).parent / "results/methods.json"
ROUNDS = 5
PACKAGES = (
    "steelyard",
    "torch",
    "numpy",
    "timm",
    "pytorch_optimizer",
    "pytorch-metric-learning",
    "dppy",
    "pymoo",
    "moocore",
)


@dataclass(frozen=True)
class Case:
    """One task at one size.

    Attributes:
        task: what is computed.
        module: of ``method_cases``, whose function ``contest`` takes ``size``.
        size: arguments by name, shown in the tables.
        quick: the size of the quick form.
    """

    task: str
    module: str
    size: dict[str, Any]
    quick: dict[str, Any]

    def arguments(self, *, quick: bool) -> dict[str, Any]:
        named = {"task": self.task} if self.module in ("optimisers", "pairs", "designs") else {}
        return named | (self.quick if quick else self.size)


@dataclass(frozen=True)
class Target:
    """Our figure over that of the best of some peers, at most.

    Attributes:
        task: the cases it holds for.
        figure: ``"time"`` or ``"memory"``.
        peers: how the names of the peers begin.
        most: the largest ratio that meets the target.
        least: it holds for cases whose first number of ``size`` is at least this.
    """

    task: str
    figure: str
    peers: str
    most: float
    least: int = 0

    def covers(self, row: Row) -> bool:
        numbers = [value for value in row["size"].values() if isinstance(value, int)]
        return row["task"] == self.task and max(numbers[:1], default=0) >= self.least


def _cases() -> Iterator[Case]:
    for task in ("adamp", "sgdp"):
        for tensors in ("100 matrices", "240 mixed"):
            yield Case(task, "optimisers", {"tensors": tensors}, {"tensors": "small"})
    yield Case("tcm", "pairs", {"n": 1024, "width": 128}, {"n": 256, "width": 128})
    for task in ("tcm", "opis", "tcm_opis"):
        yield Case(task, "pairs", {"n": 8192, "width": 128}, {"n": 1280, "width": 128})
    size = {"rows": 512, "classes": 10_000, "top_k": 5}
    yield Case("ldr", "label_robust", size, size | {"rows": 32})
    for task in ("dpp", "volume"):
        size = {"candidates": 10_000, "width": 50}
        yield Case(task, "designs", size, size | {"candidates": 1000})
    for width, layers in ((32, 0), (64, 2), (256, 4)):
        size = {"candidates": 64, "length": 128, "width": width, "layers": layers}
        yield Case("info_gain", "decoding", size, size | {"candidates": 8})
    size = {"points": 1000, "objectives": 3}
    yield Case("hypervolume", "volumes", size, size | {"points": 100})
    size = {"systems": 600, "particles": 5, "directions": 12, "hidden": 64, "layers": 5}
    yield Case("ponita", "messages", size, size | {"systems": 20, "hidden": 16})


CASES = tuple(_cases())
TASKS = tuple(dict.fromkeys(case.task for case in CASES))
TARGETS = (
    *(Target(task, "time", "timm", 1 / 3) for task in ("adamp", "sgdp")),
    *(Target(task, "time", "torch AdamW fused", 3.0) for task in ("adamp", "sgdp")),
    *(
        Target(task, figure, "pytorch-metric-learning", most, 8192)
        for task in ("tcm", "tcm_opis")
        for figure, most in (("memory", 0.3), ("time", 0.7))
    ),
    Target("ldr", "time", "plain torch", 1 / 5),
    Target("dpp", "time", "DPPy", 1 / 3),
    Target("volume", "time", "DPPy", 1 / 3),
    Target("info_gain", "time", "one call", 1 / 5),
    Target("hypervolume", "time", "pymoo", 1.0),
    Target("ponita", "time", "plain torch", 1 / 2),
)


def measured(module: str, arguments: dict[str, Any], rounds: int) -> list[Row]:
    import torch

    torch.set_num_threads(1)
    contest = importlib.import_module(f"method_cases.{module}").contest(**arguments)
    return measure(contest, rounds)


def judged(results: Sequence[Row]) -> list[Row]:
    """Each target, at every size, against the peer that is hardest to beat."""
    verdicts = []
    for target in TARGETS:
        covered = [row for row in results if target.covers(row)]
        for size in {json.dumps(row["size"]): row["size"] for row in covered}.values():
            rows = [row for row in covered if row["size"] == size]
            ours = next(row for row in rows if row["name"] == OURS)
            ratios = {
                row["name"]: row["ours_over_this"][0]
                if target.figure == "time"
                else ours["peak_extra_mib"] / max(row["peak_extra_mib"], 0.1)
                for row in rows
                if row["name"].startswith(target.peers)
            }
            peer = max(ratios, key=lambda name: ratios[name])
            verdicts.append(
                {"task": target.task, "size": size, "figure": target.figure, "peer": peer}
                | {"target": target.most, "value": ratios[peer], "met": ratios[peer] <= target.most}
            )
    return verdicts


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
        f"{described(verdict['size']):58} {verdict['figure']:6} x{verdict['value']:.3f} of "
        f"{verdict['peer']}, at most {verdict['target']:.3f}"
    )


def listing() -> str:
    lines = [f"{case.task:11} {described(case.size)}" for case in CASES]
    targets = [
        f"{t.task:11} {t.figure} at most {t.most:.3g} of {t.peers}, the best of them"
        for t in TARGETS
    ]
    return "\n".join(("cases", *lines, "", "targets", *targets))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument(
        "--only",
        nargs="+",
        default=TASKS,
        choices=TASKS,
        metavar="TASK",
        help=f"some of: {', '.join(TASKS)}",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, one round, no file")
    parser.add_argument("--list", action="store_true", help="print cases and targets, run nothing")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(*json.loads(options.measure))))
        return
    if options.list:
        print(listing())
        return
    run(options)


def run(options: argparse.Namespace) -> None:
    """Measure what was asked for, print it, and update the file unless quick."""
    out: Path = options.out
    rounds = 1 if options.quick else options.rounds
    kept = out.exists() and not options.quick
    stored = json.loads(out.read_text(encoding="utf-8")) if kept else {}
    seconds = dict(stored.get("wall_seconds", {}))
    results = [row for row in stored.get("results", ()) if row["task"] not in options.only]
    for task in options.only:
        begin = time.perf_counter()
        for case in (case for case in CASES if case.task == task):
            arguments = case.arguments(quick=options.quick)
            size = case.quick if options.quick else case.size
            for row in in_a_process(__file__, case.module, arguments, rounds):
                results.append({"task": task, "size": size} | row)
                print(line(results[-1]), flush=True)
        seconds[task] = round(time.perf_counter() - begin, 1)
    if options.quick:  # the targets are for the full sizes
        return
    results.sort(key=lambda row: TASKS.index(row["task"]))
    verdicts = judged(results)
    print(*map(verdict_line, verdicts), sep="\n")
    content = {
        "benchmark": "methods",
        "settings": {"rounds": rounds, "threads": 1},
        **setting(PACKAGES),
        "date": datetime.now(UTC).date().isoformat(),
        "wall_seconds": seconds,
        "targets": verdicts,
        "results": results,
    }
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
