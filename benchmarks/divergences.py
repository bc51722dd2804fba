"""Measure Sinkhorn plans, distance covariance and Cauchy-Schwarz beside other packages.

Everything runs on one thread. Each case has a process of its own. Memory: every contestant runs
once in a fork of that process; its peak beyond what the fork held at the start. Time: rounds run
all contestants in turn (A B C, then C B A), quick ones several times; the figure to read is our CPU
time over a peer's inside one round, median over the rounds. Error: the largest marginal error of a
plan; of a number, its deviation from the reference named in ``reference``.

    python benchmarks/divergences.py            # about 6 minutes; updates the committed result
    python benchmarks/divergences.py --quick    # small cases, one round; writes nothing
    python benchmarks/divergences.py --tasks sinkhorn    # rows of tasks that were not run stay
"""

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from paired import OURS, SLICE, Row, Run, in_a_fork, in_a_process, middle, setting

# This process must stay small: Linux counts the memory of the process that starts another in the
# other's peak. Whatever brings torch is imported where it is used.

RESULT = Path(__file__).parent / "results/divergences.json"
POT, POT_LOG = "POT ot.sinkhorn", "POT sinkhorn_log"
BATCH, BATCH_LOG = "POT ot.batch, sinkhorn", "POT ot.batch, log_sinkhorn"
DCOR, DENSE, BLOCKED = "dcor, value only", "plain torch, dense", "plain torch, blocked"
EXACT = "POT ot.emd (no entropy)"
ROUNDS, TOLERANCE = 3, 1e-9
PACKAGES = ("steelyard", "torch", "numpy", "scipy", "numba", "POT", "dcor")


@dataclass(frozen=True)
class Case:
    """One task at one size.

    Attributes:
        task: ``sinkhorn``, ``sinkhorn_batch``, ``scalars``, ``vectors`` or ``conditional``.
        n: items.
        contestants: who takes part.
        width: dimensions of an item.
        gradient: forward and backward, else forward.
        share: Sinkhorn: epsilon over the mean cost.
        quick: part of the quick form.
    """

    task: str
    n: int
    contestants: tuple[str, ...]
    width: int = 1
    gradient: bool = False
    share: float = 0.1
    quick: bool = False


def _scalars(n: int, *, quick: bool = False) -> Iterator[Case]:
    dense = (DENSE,) if n <= 4000 else ()
    yield Case("scalars", n, (OURS, DCOR, *dense), quick=quick)
    yield Case("scalars", n, (OURS, DCOR, *dense), gradient=True, quick=quick)


CASES = (
    Case("sinkhorn", 64, (OURS, POT, POT_LOG), 3, quick=True),
    Case("sinkhorn", 512, (OURS, POT, POT_LOG), 3, quick=True),
    Case("sinkhorn", 2048, (OURS, POT), 3),
    Case("sinkhorn", 4096, (OURS, POT), 3),
    Case("sinkhorn", 64, (OURS, POT), 32, quick=True),  # so easy that overhead decides
    Case("sinkhorn", 64, (OURS, POT, POT_LOG, EXACT), 3, share=1e-4, quick=True),  # underflows
    Case("sinkhorn_batch", 64, (OURS, BATCH, BATCH_LOG), 3, quick=True),
    *_scalars(1000, quick=True),
    *_scalars(4000),
    *_scalars(10_000, quick=True),
    *_scalars(100_000),
    *_scalars(1_000_000),
    Case("vectors", 1000, (OURS, BLOCKED, DENSE, DCOR), 8, quick=True),
    Case("vectors", 5000, (OURS, BLOCKED, DENSE, DCOR), 8),
    Case("vectors", 5000, (OURS, BLOCKED, DENSE), 8, gradient=True),
    Case("vectors", 20_000, (OURS, BLOCKED), 8, gradient=True),
    *(
        Case("conditional", n, (OURS, DENSE), 9, gradient=True, quick=n == 1024)
        for n in (1024, 2048, 4096, 8192)
    ),
)
# task, least n, gradient, our figure over that of a peer, at most
TARGETS = (
    ("sinkhorn", 64, False, "time", POT, 0.7),
    ("sinkhorn_batch", 64, False, "time", BATCH, 0.7),
    ("scalars", 10_000, False, "time", DCOR, 0.5),
    ("scalars", 10_000, True, "time", DCOR, 0.5),
    ("vectors", 5000, False, "time", DCOR, 1.0),
    ("vectors", 5000, True, "time", BLOCKED, 1.0),
    ("conditional", 8192, True, "time", DENSE, 1.0),
    ("conditional", 8192, True, "memory", DENSE, 0.1),
)


def costs(case: Case) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (128,) * (case.task == "sinkhorn_batch") + (case.n, case.width)
    x, y = (torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return torch.cdist(x, y)


def sinkhorn_runs(case: Case) -> dict[str, Run]:
    import ot
    import torch

    from steelyard.divergences import sinkhorn_plan

    cost = costs(case)
    epsilon = case.share * cost.mean().item()
    matrix, mass = cost.numpy(), torch.full((case.n,), 1 / case.n, dtype=torch.float64).numpy()

    def pot(method: str) -> Run:
        return lambda: ot.sinkhorn(
            mass, mass, matrix, epsilon, method, numItermax=10_000, stopThr=TOLERANCE
        )

    def batch(method: str) -> Run:
        how: Any = {"method": method, "tol": TOLERANCE, "max_iter": 10_000, "grad": "detach"}
        return lambda: ot.batch.solve_batch(cost, epsilon, **how).plan

    return {
        OURS: lambda: sinkhorn_plan(cost, epsilon, tolerance=TOLERANCE),
        POT: pot("sinkhorn"),
        POT_LOG: pot("sinkhorn_log"),
        EXACT: lambda: ot.emd(mass, mass, matrix),
        BATCH: batch("sinkhorn"),
        BATCH_LOG: batch("log_sinkhorn"),
    }


def covariance_runs(case: Case) -> dict[str, Run]:
    import dcor
    import torch

    from steelyard.divergences import distance_covariance

    generator = torch.Generator().manual_seed(0)
    shape = (case.n,) if case.task == "scalars" else (case.n, case.width)
    x, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    y = x + noise
    leaf = x.clone().requires_grad_(case.gradient)
    fast = {"method": "mergesort"} if case.task == "scalars" else {"method": "naive"}

    def run(function: Callable[..., Any]) -> Run:
        return lambda: with_gradient(function(leaf, y), leaf)

    return {
        OURS: run(distance_covariance),
        DENSE: run(dense_covariance),
        BLOCKED: run(blocked_covariance),
        DCOR: lambda: dcor.u_distance_covariance_sqr(x.numpy(), y.numpy(), **fast),
    }


def with_gradient(value: Any, leaf: Any) -> Any:
    if leaf.requires_grad:
        leaf.grad = None
        value.backward()
    return value.detach()


def dense_covariance(x: Any, y: Any) -> Any:
    import torch

    def distances(x: Any) -> Any:
        return torch.cdist(x, x) if x.dim() == 2 else (x[:, None] - x).abs()

    def centred(a: Any) -> Any:
        n, rows = len(a), a.sum(0)
        a = a - rows / (n - 2) - rows[:, None] / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
        return a.fill_diagonal_(0.0)

    n = len(x)
    return (centred(distances(x)) * centred(distances(y))).sum() / (n * (n - 3))


def blocked_covariance(x: Any, y: Any, rows: int = 64) -> Any:
    """What one writes to bound the memory: blocks of rows, checkpointed where there is a gradient.

    The sums of products and of rows are enough: no second pass over the distances. Of 32, 64, 128
    and 256 rows, 64 is the quickest here.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    def block(one: Any, two: Any, x: Any, y: Any) -> tuple[Any, Any, Any]:
        a, b = torch.cdist(one, x), torch.cdist(two, y)
        return (a * b).sum(), a.sum(1), b.sum(1)

    parts = [
        checkpoint(block, one, two, x, y, use_reentrant=False)
        for one, two in zip(x.split(rows), y.split(rows), strict=True)
    ]
    n, (products, *sums) = len(x), zip(*parts, strict=True)
    a, b = (torch.cat(s) for s in sums)
    total = torch.stack(products).sum() - 2 * (a @ b) / (n - 2)
    return (total + a.sum() * b.sum() / ((n - 1) * (n - 2))) / (n * (n - 3))


def conditional_runs(case: Case) -> dict[str, Run]:
    import torch

    from steelyard.divergences import conditional_cauchy_schwarz

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.n, case.width, generator=generator)
    y = x[:, :1].sin() + 0.1 * torch.randn(case.n, 1, generator=generator)
    leaf = (0.5 * x[:, :1]).requires_grad_(case.gradient)
    sizes = (case.width**0.5, 0.5)
    return {
        OURS: lambda: with_gradient(conditional_cauchy_schwarz(x, y, leaf, *sizes), leaf),
        DENSE: lambda: with_gradient(dense_conditional(x, y, leaf, *sizes), leaf),
    }


def dense_conditional(x: Any, y: Any, y_hat: Any, size_x: float, size_y: float) -> Any:
    """The formula with whole kernels, written with care.

    Distances by matrix products, everything in place that autograd allows, no gradient kept for the
    constant kernels: three kernels and one temporary at the peak.
    """
    import torch

    def kernel(u: Any, v: Any, size: float) -> Any:
        u, v = u / size, v / size
        exponent = torch.addmm(-v.square().sum(1) / 2, u, v.T)
        return exponent.sub_(u.square().sum(1, keepdim=True) / 2).exp_()

    with torch.no_grad():
        k = kernel(x, x, size_x)
        weight = k.sum(1).square_().reciprocal_()
        a = weight @ kernel(y, y, size_y).mul_(k).sum(1)
    b = weight @ (kernel(y_hat, y_hat, size_y) * k).sum(1)
    c = weight @ (kernel(y_hat, y, size_y) * k).sum(1)
    return a.log() + b.log() - 2 * c.log()


RUNS = {
    "sinkhorn": sinkhorn_runs,
    "sinkhorn_batch": sinkhorn_runs,
    "scalars": covariance_runs,
    "vectors": covariance_runs,
    "conditional": conditional_runs,
}


def measure(case: Case, rounds: int) -> list[Row]:
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # POT warns where it does not converge: the error says so
    small = RUNS[case.task](Case(**asdict(case) | {"n": 64, "share": 0.1}))
    for name in case.contestants:  # what is loaded late and compiled
        small[name]()
    all_runs = RUNS[case.task](case)
    runs = {name: all_runs[name] for name in case.contestants}
    alone = {name: in_a_fork(run, small[name]) for name, run in runs.items()}
    repeats = {name: max(1, math.ceil(SLICE / spent)) for name, (_, spent) in alone.items()}
    found: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            begin = time.process_time()
            for _ in range(repeats[name]):
                found[name] = runs[name]()
            seconds[name].append((time.process_time() - begin) / repeats[name])
    errors = (
        plan_errors(found, costs(case)) if case.task.startswith("sinkhorn") else deviations(found)
    )
    return [
        {"name": name, "cpu_seconds": median(seconds[name]), "peak_extra_mib": alone[name][0]}
        | {"ours_over_this": middle(seconds[OURS], seconds[name])}
        | errors[name]
        for name in runs
    ]


def plan_errors(plans: dict[str, Any], cost: Any) -> dict[str, Row]:
    """Largest marginal error and transport cost, ``None`` for NaN, which JSON does not have."""
    import numpy as np

    def known(number: float) -> float | None:
        return number if math.isfinite(number) else None

    errors = {}
    for name, found in plans.items():
        plan = np.asarray(found)
        sums = plan.sum(-1), plan.sum(-2)
        error = max(float(np.abs(s - 1 / s.shape[-1]).max()) for s in sums)
        moved = float((plan * cost.numpy()).sum((-1, -2)).mean())
        errors[name] = {"error": known(error), "transport_cost": known(moved)}
    return errors


def deviations(values: dict[str, Any]) -> dict[str, Row]:
    reference = next(name for name in (DCOR, DENSE, BLOCKED) if name in values)
    truth = float(values[reference])
    return {
        name: {"error": abs(float(value) / truth - 1), "reference": reference}
        for name, value in values.items()
    }


def rows_of(case: Case, rounds: int) -> list[Row]:
    facts = {key: value for key, value in asdict(case).items() if key not in _NOT_STORED}
    return [facts | row for row in in_a_process(__file__, asdict(case), rounds)]


_NOT_STORED = {"contestants", "quick"}


def judged(results: Sequence[Row]) -> list[Row]:
    """Each target, at every size it holds for, with what was measured and whether it was met."""
    verdicts = []
    for task, least, gradient, figure, peer, target in TARGETS:
        for row in results:
            same = (row["task"], row["gradient"], row["name"]) == (task, gradient, peer)
            if not same or row["n"] < least or row["share"] < 0.1:
                continue
            value = row["ours_over_this"][0] if figure == "time" else _memory(results, row)
            verdicts.append(
                {"task": task, "n": row["n"], "gradient": gradient, "figure": figure}
                | {"peer": peer, "target": target, "value": value, "met": value <= target}
            )
    return verdicts


def _memory(results: Sequence[Row], peer: Row) -> float:
    keys = ("task", "n", "width", "gradient", "share")
    ours = next(
        row for row in results if row["name"] == OURS and all(row[k] == peer[k] for k in keys)
    )
    return float(ours["peak_extra_mib"] / peer["peak_extra_mib"])


def line(row: Row) -> str:
    error = "none" if row["error"] is None else f"{row['error']:.1e}"
    return (
        f"{row['task']:14} N={row['n']:<8} D={row['width']:<2} {'grad' * row['gradient']:4} "
        f"{row['name']:26} {row['cpu_seconds'] * 1e3:10.3f} ms  "
        f"ours x{row['ours_over_this'][0]:.2f}  "
        f"peak {row['peak_extra_mib']:7.1f} MiB  error {error}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tasks = list(RUNS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--tasks", nargs="+", default=tasks, choices=tasks)
    parser.add_argument("--quick", action="store_true", help="small cases, one round, no file")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.measure:
        case, rounds = json.loads(options.measure)
        print(json.dumps(measure(Case(**case), rounds)))
        return
    out = options.out
    stored = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    seconds = dict(stored.get("wall_seconds", {}))
    results = [row for row in stored.get("results", ()) if row["task"] not in options.tasks]
    if options.quick:
        results = []
    rounds = 1 if options.quick else options.rounds
    for task in options.tasks:
        begin = time.perf_counter()
        for case in CASES:
            if case.task == task and (case.quick or not options.quick):
                for row in rows_of(case, rounds):
                    results.append(row)
                    print(line(row), flush=True)
        seconds[task] = round(time.perf_counter() - begin, 1)
    results.sort(key=lambda row: tasks.index(row["task"]))
    verdicts = judged(results)
    for verdict in verdicts:
        print("met   " if verdict["met"] else "MISSED", verdict)
    if not options.quick:
        content = {
            "benchmark": "divergences",
            "settings": {"rounds": rounds, "threads": 1, "tolerance": TOLERANCE},
            **setting(PACKAGES),
            "date": datetime.now(UTC).date().isoformat(),
            "wall_seconds": seconds,
            "targets": verdicts,
            "results": results,
        }
        out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
