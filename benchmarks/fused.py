"""Measure the fused heads beside the plain formulas that hold all logits.

Every figure is taken on one thread. Time: rounds run all contestants in turn (A B C, then C B A),
each once, after a warm-up that is not counted; the figure to read is the ratio of CPU time to
``plain`` inside one round, median over the rounds. Memory: the peak of a process of its own above
what it held before the call, of which the weight gradient is named beside it. Error: the largest
deviation from float64 on a few rows, relative to the largest entry.

    python benchmarks/fused.py                # a few minutes; prints a table
    python benchmarks/fused.py --out benchmarks/results/fused.json
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

# This process must stay small: Linux counts the memory of the process that starts another in the
# other's peak. Whatever brings torch is imported where it is used.

TASKS = ("logprobs", "jensen_shannon", "kl", "total_variation", "token_shift")
WIDTHS = (256, 512, 1024)
ROUNDS = 5


@dataclass(frozen=True)
class Case:
    """One task at one size."""

    task: str
    rows: int = 512
    vocabulary: int = 32768
    width: int = 512
    dtype: str = "float32"


def inputs(case: Case) -> tuple[Any, ...]:
    import torch

    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def head(trained: bool) -> list[Any]:
        hidden = torch.randn(case.rows, case.width)
        weight = torch.randn(case.vocabulary, case.width) * (2 / case.width**0.5)
        return [x.to(dtype).requires_grad_(trained) for x in (hidden, weight)]

    if case.task == "logprobs":
        return (*head(True), torch.randint(case.vocabulary, (case.rows,)))
    return (*head(False), *head(case.task != "token_shift"))


def plain_logprobs(hidden: Any, weight: Any, targets: Any) -> tuple[Any, Any]:
    logprobs = (hidden @ weight.T).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy


def plain_divergence(task: str, p_hidden: Any, p_weight: Any, q_hidden: Any, q_weight: Any) -> Any:
    import torch

    log_p, log_q = (p_hidden @ p_weight.T).log_softmax(-1), (q_hidden @ q_weight.T).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if task == "kl":
        return (p * (log_p - log_q)).sum(-1).mean()
    if task == "total_variation":
        return ((p - q).abs().sum(-1) / 2).mean()
    log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
    return ((p * (log_p - log_m) + q * (log_q - log_m)).sum(-1) / 2).mean()


def plain_shift(
    base_hidden: Any, base_weight: Any, rl_hidden: Any, rl_weight: Any
) -> tuple[Any, ...]:
    import torch

    log_p = (base_hidden @ base_weight.T).log_softmax(-1)
    log_q = (rl_hidden @ rl_weight.T).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
    js = (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1) / 2
    kl = (p * (log_p - log_q)).sum(-1)
    entropies = -(p * log_p).sum(-1), -(q * log_q).sum(-1)
    top_p, top_q = log_p.topk(10).indices, log_q.topk(10).indices
    shared = [(top_p[:, :k, None] == top_q[:, None, :k]).sum((1, 2)) / k for k in range(1, 11)]
    rank_p = 1 + (log_p > log_p.gather(1, top_q[:, :1])).sum(-1)
    rank_q = 1 + (log_q > log_q.gather(1, top_p[:, :1])).sum(-1)
    favourite = p.gather(1, top_q[:, :1])[:, 0]
    return js, kl, *entropies, torch.stack(shared, 1), rank_p, favourite, rank_q


def contestants(case: Case) -> dict[str, Callable[..., Any]]:
    """What computes the results of a case from its inputs, by name."""
    from steelyard import divergences, fused

    if case.task == "logprobs":
        return {"steelyard": fused.linear_logprobs, "plain": plain_logprobs}
    if case.task == "token_shift":
        return {"steelyard": fused.linear_token_shift, "plain": plain_shift}
    divergence = getattr(divergences, case.task.upper())
    return {
        "steelyard": lambda *heads: fused.linear_divergence(*heads, divergence),
        "plain": lambda *heads: plain_divergence(case.task, *heads),
    }


def run_once(case: Case, function: Callable[..., Any], tensors: tuple[Any, ...]) -> list[Any]:
    """Forward and, where there is something to train, backward; results and gradients."""
    leaves = [x for x in tensors if x.requires_grad]
    for leaf in leaves:
        leaf.grad = None
    outputs = function(*tensors)
    outputs = [*outputs] if isinstance(outputs, tuple) else [outputs]
    if leaves:
        loss = outputs[0].mean()
        if case.task == "logprobs":
            loss = loss - 0.01 * outputs[1].mean()
        loss.backward()
    return [x.detach() for x in outputs] + [x.grad for x in leaves]


def measure_time(case: Case, rounds: int) -> dict[str, Any]:
    tensors, functions = inputs(case), contestants(case)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name in list(functions)[:: 1 if turn % 2 else -1]:
            begin = time.process_time()
            run_once(case, functions[name], tensors)
            if turn:
                seconds[name].append(time.process_time() - begin)
    ratios = {
        name: [mine / plain for mine, plain in zip(spent, seconds["plain"], strict=True)]
        for name, spent in seconds.items()
    }
    return {
        name: {
            "cpu_seconds": median(seconds[name]),
            "ratio": [median(ratios[name]), min(ratios[name]), max(ratios[name])],
        }
        for name in functions
    }


def measure_memory(case: Case, name: str) -> dict[str, float]:
    # The first call brings in what torch loads late; it must be small.
    tiny = Case(case.task, 4, 64, 8, case.dtype)
    run_once(tiny, contestants(tiny)[name], inputs(tiny))
    tensors, function = inputs(case), contestants(case)[name]
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = peak_mib()
    run_once(case, function, tensors)
    gradients = sum(x.numel() * x.element_size() for x in tensors if x.requires_grad) / 2**20
    return {"peak_extra_mib": peak_mib() - before, "gradients_mib": gradients}


def measure_error(case: Case) -> dict[str, float]:
    few = Case(case.task, 16, case.vocabulary, case.width, case.dtype)
    tensors = inputs(few)
    exact_inputs = tuple(
        x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for x in tensors
    )
    exact = run_once(few, contestants(few)["plain"], exact_inputs)
    errors = {}
    for name, function in contestants(few).items():
        pairs = zip(run_once(few, function, tensors), exact, strict=True)
        errors[name] = max(
            float((x - y).abs().max() / y.abs().max().clamp(min=1e-30)) for x, y in pairs
        )
    return errors


def peak_mib() -> float:
    """Largest resident size since the peak was last forgotten."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def in_a_process(what: str, case: Case, *extra: str) -> Any:
    command = [sys.executable, __file__, "--measure", what, json.dumps(asdict(case)), *extra]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(run.stdout.splitlines()[-1])


def measure(what: str, case: Case, extra: str) -> Any:
    import torch

    torch.set_num_threads(1)
    if what == "time":
        return measure_time(case, int(extra))
    return measure_memory(case, extra) if what == "memory" else measure_error(case)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.measure:
        what, case, extra = options.measure
        print(json.dumps(measure(what, Case(**json.loads(case)), extra)))
        return
    results = []
    for task in options.tasks:
        for width in options.widths:
            case = Case(task, options.rows, options.vocabulary, width, options.dtype)
            timed = in_a_process("time", case, str(options.rounds))
            errors = in_a_process("error", case, "")
            for name, figures in timed.items():
                memory = in_a_process("memory", case, name)
                row = asdict(case) | {"name": name} | figures | memory | {"error": errors[name]}
                results.append(row)
                print(
                    f"{task:16} D={width:<5} {name:10} {figures['cpu_seconds']:6.2f} s "
                    f"x{figures['ratio'][0]:.2f}  peak {memory['peak_extra_mib']:6.0f} MiB "
                    f"(gradients {memory['gradients_mib']:.0f})  error {errors[name]:.1e}",
                    flush=True,
                )
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
