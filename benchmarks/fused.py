"""Measure the fused heads beside the plain formulas, which hold all logits, and other packages.

Every figure is taken on one thread. Time: rounds run all contestants in turn (A B C, then C B A),
each once, after a warm-up that is not counted; the figure to read is the ratio of CPU time to
``plain`` inside one round, median over the rounds. Memory: the peak of a process of its own above
what it held before the call, of which the gradients are named beside it. Error: the largest
deviation of a gradient (of ``token_shift``: of a field) from float64 on a few rows, relative to the
largest entry; see ``rows_without_ties`` for total variation.

    python benchmarks/fused.py                       # about 15 minutes; updates results/fused.json
    python benchmarks/fused.py --parts half          # the parts of the list below that you want
    python benchmarks/fused.py --large               # N = 4096, V = 131072: minutes, 14 GiB free

A package that is not installed leaves a row that says so. Rows of parts that were not run stay.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from paired import middle, peak_mib

# This process must stay small: Linux counts the memory of the process that starts another in the
# other's peak. Whatever brings torch is imported where it is used.

RESULT = Path(__file__).parent / "results/fused.json"
OURS, PLAIN = "steelyard", "plain"
PLAIN_LOGPROBS = "plain, log-probabilities only"
COMPILED = "torch.compile of plain"
PEERS = {  # By task: what another package offers, and the module it needs.
    "logprobs": {
        "TRL selective_log_softmax_and_entropy": "trl",
        "Liger LigerFusedLinearGRPOLoss (no entropy)": "liger_kernel",
        "cut_cross_entropy, torch_compile (no entropy)": "cut_cross_entropy",
    },
    "jensen_shannon": {
        "TRL generalized_jsd_loss": "trl",
        "Liger LigerFusedLinearJSDLoss": "liger_kernel",
        "Liger LigerFusedLinearJSDLoss, chunk_size=128": "liger_kernel",
    },
}
ROUNDS = 3
TIE = 1e-5

Contestant = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One task at one size."""

    task: str
    rows: int = 512
    vocabulary: int = 32768
    width: int = 512
    dtype: str = "float32"


@dataclass(frozen=True)
class Part:
    """Cases that are measured in the same way.

    Attributes:
        alone: each contestant once in a process of its own, for time and memory together; without
            rounds. For what takes minutes and for the many points of a sweep.
    """

    cases: tuple[Case, ...]
    peers: bool = False
    alone: bool = False
    only_ours: tuple[Case, ...] = ()


TRAINED = ("logprobs", "jensen_shannon")
# The plain Jensen-Shannon formula needs about 18 GiB at 4096 rows: both take a quarter of them, and
# ours is measured with all of them beside it.
LARGE = {"vocabulary": 131072, "width": 1024}
PARTS = {
    "small": Part(tuple(Case(task, width=256) for task in TRAINED), peers=True),
    "half": Part(tuple(Case(task, width=512) for task in TRAINED), peers=True),
    "wide": Part(tuple(Case(task, width=1024) for task in TRAINED), peers=True),
    "others": Part(tuple(Case(task) for task in ("kl", "total_variation", "token_shift"))),
    "bfloat16": Part(
        tuple(Case(task, width=256, dtype="bfloat16") for task in TRAINED), alone=True
    ),
    "vocabulary": Part(
        tuple(
            Case(task, 256, vocabulary, 256)
            for task in TRAINED
            for vocabulary in (4096, 16384, 65536, 131072)
        ),
        alone=True,
    ),
    "rows": Part(
        tuple(Case(task, rows, 16384, 256) for task in TRAINED for rows in (64, 256, 1024, 4096)),
        alone=True,
    ),
    "large": Part(
        (Case("logprobs", 4096, **LARGE), Case("jensen_shannon", 1024, **LARGE)),
        alone=True,
        only_ours=(Case("jensen_shannon", 4096, **LARGE),),
    ),
}
TARGETS = (  # Part, task, figure, largest value.
    ("small", "logprobs", "ratio", 1.0),
    ("half", "logprobs", "ratio", 1.0),
    ("wide", "logprobs", "ratio", 1.1),
    ("small", "jensen_shannon", "ratio", 0.7),
    ("half", "jensen_shannon", "ratio", 0.7),
    ("wide", "jensen_shannon", "ratio", 0.95),
    ("half", "logprobs", "memory_ratio", 0.1),
    ("large", "logprobs", "memory_ratio", 0.1),
    ("half", "jensen_shannon", "memory_ratio", 0.2),
    ("large", "jensen_shannon", "memory_ratio", 0.2),
    ("bfloat16", "logprobs", "ratio", 0.05),
    ("bfloat16", "jensen_shannon", "ratio", 0.05),
    ("others", "token_shift", "ratio", 1.0),
    ("others", "token_shift", "memory_ratio", 0.1),
)


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


def policy_loss(logprobs: Any, entropy: Any) -> Any:
    return -logprobs.mean() - 0.01 * entropy.mean()


def plain_logprobs(hidden: Any, weight: Any, targets: Any) -> Any:
    logprobs = (hidden @ weight.T).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return policy_loss(logprobs.gather(1, targets[:, None])[:, 0], entropy)


def plain_logprobs_only(hidden: Any, weight: Any, targets: Any) -> Any:
    return -(hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None]).mean()


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


def names(case: Case, *, peers: bool) -> list[str]:
    if not peers:
        return [OURS, PLAIN]
    more = [PLAIN_LOGPROBS] if case.task == "logprobs" else []
    return [OURS, PLAIN, *more, COMPILED, *PEERS[case.task]]


def peers_installed() -> list[str]:
    modules = {module for of_task in PEERS.values() for module in of_task.values()}
    return sorted(module for module in modules if importlib.util.find_spec(module))


def missing(case: Case, name: str) -> str | None:
    """The module that a contestant needs and that is not installed, if there is one."""
    module = PEERS.get(case.task, {}).get(name)
    return module if module and importlib.util.find_spec(module) is None else None


def contestant(case: Case, name: str) -> Contestant:
    """What computes the loss of a case (``token_shift``: all fields) from its inputs."""
    from steelyard import divergences, fused

    if case.task == "token_shift":
        return fused.linear_token_shift if name == OURS else plain_shift
    if name in PEERS.get(case.task, {}):
        return peer(name)
    if case.task == "logprobs":
        if name == OURS:
            return lambda *tensors: policy_loss(*fused.linear_logprobs(*tensors))
        plain = plain_logprobs_only if name == PLAIN_LOGPROBS else plain_logprobs
    else:
        if name == OURS:
            divergence = getattr(divergences, case.task.upper())
            return lambda *heads: fused.linear_divergence(*heads, divergence)
        plain = lambda *heads: plain_divergence(case.task, *heads)  # noqa: E731
    if name == COMPILED:
        import torch

        return torch.compile(plain, dynamic=False)
    return plain


def peer(name: str) -> Contestant:
    """What another package offers, brought to the inputs and the loss of the plain formula."""
    import torch

    if name == "TRL selective_log_softmax_and_entropy":
        from trl.trainer.utils import selective_log_softmax_and_entropy as both

        return lambda hidden, weight, targets: policy_loss(*both(hidden @ weight.T, targets))
    if name.startswith("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        return lambda *tensors: linear_cross_entropy(*tensors, impl="torch_compile")
    if name == "TRL generalized_jsd_loss":
        from trl.experimental.gkd.gkd_trainer import GKDTrainer

        return lambda p_hidden, p_weight, q_hidden, q_weight: GKDTrainer.generalized_jsd_loss(
            q_hidden @ q_weight.T, p_hidden @ p_weight.T, beta=0.5
        )
    from liger_kernel import chunked_loss

    if "GRPO" in name:
        grpo = chunked_loss.LigerFusedLinearGRPOLoss(0.0, compiled=False, use_ref_model=False)

        def loss(hidden: Any, weight: Any, targets: Any) -> Any:
            # Four sequences of equal advantage at ratio 1: the gradient is that of the mean.
            ids, ones = targets.view(4, -1), torch.ones(4)
            return grpo(hidden.view(4, -1, hidden.shape[1]), weight, ids, ids >= 0, ones)[0]

        return loss
    chunk = {"chunk_size": 128} if "128" in name else {}
    jsd = chunked_loss.LigerFusedLinearJSDLoss(0.0, 1.0, compiled=False, **chunk)
    return lambda p_hidden, p_weight, q_hidden, q_weight: jsd(
        q_hidden, q_weight, p_hidden, p_weight, torch.zeros(len(p_hidden), dtype=torch.long)
    )


def run_once(function: Contestant, tensors: Iterable[Any]) -> list[Any]:
    """Forward and, where there is something to train, backward; the gradients or the fields."""
    leaves = [x for x in tensors if x.requires_grad]
    for leaf in leaves:
        leaf.grad = None
    outputs = function(*tensors)
    if not leaves:
        return [*outputs]
    outputs.backward()
    return [x.grad for x in leaves]


def measure_time(case: Case, contestants: list[str], rounds: int) -> dict[str, Any]:
    tensors = inputs(case)
    functions = {name: contestant(case, name) for name in contestants}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name in list(functions)[:: 1 if turn % 2 else -1]:
            begin = time.process_time()
            run_once(functions[name], tensors)
            if turn:
                seconds[name].append(time.process_time() - begin)
    return seconds


def measure_alone(case: Case, name: str, repeats: int) -> dict[str, Any]:
    """Peak memory of the first call beyond what the process held, and CPU seconds of all."""
    # The first call brings in what torch loads late: it must be small, unless it compiles for the
    # very shape.
    compiles = name == COMPILED or "torch_compile" in name
    first = case if compiles else Case(case.task, 4, 64, 8, case.dtype)
    tensors, function = inputs(case), contestant(case, name)
    early = tensors if compiles else inputs(first)
    run_once(function, early)
    for tensor in early:
        tensor.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, seconds = peak_mib(), []
    for turn in range(repeats):
        begin = time.process_time()
        run_once(function, tensors)
        seconds.append(time.process_time() - begin)
        if not turn:
            peak = peak_mib() - before
    gradients = sum(x.numel() * x.element_size() for x in tensors if x.requires_grad) / 2**20
    return {"seconds": seconds, "peak_extra_mib": peak, "gradients_mib": gradients}


def measure_error(case: Case, contestants: list[str]) -> dict[str, Any]:
    few = Case(case.task, 16, case.vocabulary, case.width, case.dtype)
    tensors, tied = inputs(few), {}
    if case.task == "total_variation":
        every = inputs(case)
        ties = case.rows - int(rows_without_ties(*every).sum())
        errors = _errors(case, contestants, every)
        tied = {name: {"rows_with_ties": ties, "error_with_ties": error} for name, error in errors}
        kept = rows_without_ties(*tensors)
        hidden = (x[kept].detach().requires_grad_(x.requires_grad) for x in tensors[::2])
        tensors = (next(hidden), tensors[1], next(hidden), tensors[3])
    found = _errors(few, contestants, tensors)
    return {name: {"error": error} | tied.get(name, {}) for name, error in found}


def rows_without_ties(p_hidden: Any, p_weight: Any, q_hidden: Any, q_weight: Any) -> Any:
    """Rows in which no token has ``|log p/q|`` below the rounding of a float32 logit.

    The gradient of total variation takes the sign of ``p - q``. At a tie float32 cannot know it,
    whatever the formula, and one wrong sign changes the gradient by the token's full probability.
    """
    log_p, log_q = (
        (hidden.double() @ weight.double().T).log_softmax(-1)
        for hidden, weight in ((p_hidden, p_weight), (q_hidden, q_weight))
    )
    return ((log_p - log_q).abs() > TIE).all(-1)


def _errors(case: Case, contestants: list[str], tensors: Any) -> Iterator[tuple[str, float]]:
    wide = [
        x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for x in tensors
    ]
    exact = {
        name: run_once(contestant(case, name), wide)
        for name in (PLAIN, *({PLAIN_LOGPROBS} & {*contestants}))
    }
    for name in contestants:
        no_entropy = "no entropy" in name or name == PLAIN_LOGPROBS
        truth = exact[PLAIN_LOGPROBS if no_entropy else PLAIN]
        pairs = zip(run_once(contestant(case, name), tensors), truth, strict=True)
        yield name, max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)


def in_a_process(what: str, case: Case, *extra: Any) -> Any:
    command = [sys.executable, __file__, "--measure", what, json.dumps([asdict(case), *extra])]
    settings = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        command, check=False, capture_output=True, text=True, env=os.environ | settings
    )
    if run.returncode:
        raise SystemExit(f"{what} of {case} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def measure(what: str, arguments: str) -> Any:
    import torch

    torch.set_num_threads(1)
    if what == "setting":
        from steelyard.lab.setup import installed_versions, machine

        instructions = torch.backends.cpu.get_cpu_capability()
        if torch.cpu._is_avx512_bf16_supported():
            instructions += " with bfloat16 products"
        return {
            "machine": machine() | {"instructions": instructions},
            "versions": installed_versions() | {name: version(name) for name in peers_installed()},
        }
    case, *rest = json.loads(arguments)
    functions = {"time": measure_time, "alone": measure_alone, "error": measure_error}
    return functions[what](Case(**case), *rest)


def rows_of(part: str, case: Case, rounds: int) -> Iterator[dict[str, Any]]:
    """Measure one case and yield a row for each contestant."""
    plan = PARTS[part]
    wanted = [OURS] if case in plan.only_ours else names(case, peers=plan.peers)
    present = [name for name in wanted if missing(case, name) is None]
    repeats = 3 if part in ("vocabulary", "rows") else 1
    alone = {name: in_a_process("alone", case, name, repeats) for name in present}
    seconds = {name: found.pop("seconds") for name, found in alone.items()}
    if not plan.alone:
        seconds = in_a_process("time", case, present, rounds)
    errors = {} if part in ("vocabulary", "rows", "large") else in_a_process("error", case, present)
    for name in wanted:
        row = {"part": part} | asdict(case) | {"name": name}
        if name not in present:
            yield row | {"missing": missing(case, name)}
            continue
        row |= {"cpu_seconds": median(seconds[name])} | alone[name] | errors.get(name, {})
        if PLAIN in present:
            row["ratio"] = middle(seconds[name], seconds[PLAIN])
            beside = [x["peak_extra_mib"] - x["gradients_mib"] for x in (alone[name], alone[PLAIN])]
            row["memory_ratio"] = beside[0] / beside[1]
        yield row


def judged(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each target with what was measured and whether it was met; ``None`` if it was not run."""
    verdicts = []
    for part, task, figure, target in TARGETS:
        rows = [r for r in results if (r["part"], r["task"], r["name"]) == (part, task, OURS)]
        found = next((row[figure] for row in rows if figure in row), None)
        value = found[0] if isinstance(found, list) else found
        met = None if value is None else value <= target
        verdicts.append(
            {"part": part, "task": task, "figure": figure, "target": target}
            | {"value": value, "met": met}
        )
    return verdicts


def line(row: dict[str, Any]) -> str:
    start = f"{row['part']:10} {row['task']:15} N={row['rows']} V={row['vocabulary']}"
    start = f"{start} D={row['width']:<5} {row['name']:46}"
    if "missing" in row:
        return f"{start} {row['missing']} is not installed"
    ratio = f"x{row['ratio'][0]:.2f} memory x{row['memory_ratio']:.2f}" if "ratio" in row else ""
    peak = f"peak {row['peak_extra_mib']:6.0f} MiB (gradients {row['gradients_mib']:.0f})"
    error = f"error {row['error']:.1e}" if "error" in row else ""
    return f"{start} {row['cpu_seconds']:6.2f} s {ratio}  {peak}  {error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    usual = [part for part in PARTS if part != "large"]
    parser.add_argument("--parts", nargs="+", default=usual, choices=usual)
    parser.add_argument("--large", action="store_true", help="only the large size, one round")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    parts = ["large"] if options.large else options.parts
    stored = json.loads(options.out.read_text()) if options.out.exists() else {}
    seconds = dict(stored.get("wall_seconds", {}))
    results = [row for row in stored.get("results", ()) if row["part"] not in parts]
    for part in parts:
        begin = time.perf_counter()
        for case in (*PARTS[part].cases, *PARTS[part].only_ours):
            for row in rows_of(part, case, options.rounds):
                results.append(row)
                print(line(row), flush=True)
        seconds[part] = round(time.perf_counter() - begin, 1)
        write(options.out, results, options.rounds, seconds)
    for verdict in judged(results):
        print({True: "met   ", False: "MISSED", None: "not run"}[verdict["met"]], verdict)


def write(out: Path, results: list[dict[str, Any]], rounds: int, seconds: dict[str, float]) -> None:
    order = [*PARTS]
    results = sorted(results, key=lambda row: order.index(row["part"]))
    content = {
        "benchmark": "fused",
        "settings": {"rounds": rounds, "threads": 1},
        **in_a_process("setting", Case("")),
        "wall_seconds": seconds,
        "targets": judged(results),
        "results": results,
    }
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
