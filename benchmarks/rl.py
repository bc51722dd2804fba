"""Measure PPO end to end: Steelyard beside a single-file loop and stable-baselines3.

All contestants train with the same settings. Every run has a process of its own, one thread, and a
warm-up rollout that is not counted. Rounds run all contestants in turn (A B C, then C B A), so that
a load on the machine falls on all of them. The figure to read is the ratio of CPU time inside one
round: median over the rounds, smallest and largest.

    python benchmarks/rl.py                   # about 20 minutes; writes benchmarks/results/rl.json
    python benchmarks/rl.py --quick           # two minutes, rough; writes nothing
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

# This process must stay small: Linux counts the memory of the process that starts another in the
# other's peak. Whatever brings torch is imported where it is used.

RESULT = Path(__file__).parent / "results/rl.json"
ENVS = ("HalfCheetah-v5", "Hopper-v5")
MINIBATCHES = (64, 256)
OURS = "steelyard"
PEERS = ("single file", "stable-baselines3")
ROLLOUTS = 4
ROUNDS = 3
Run = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One training run."""

    contestant: str
    env: str = ENVS[0]
    minibatch: int = 64
    rollouts: int = ROLLOUTS
    num_envs: int = 8
    steps: int = 256
    """Of each environment in a rollout."""
    epochs: int = 10
    seed: int = 1


@dataclass
class Watch:
    """CPU seconds and calls of one method."""

    seconds: float = 0.0
    calls: int = 0

    def over(self, owner: Any, name: str) -> None:
        """Measure a method of an object from now on."""
        method = getattr(owner, name)

        def measured(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            result = method(*args, **kwargs)
            self.seconds += time.process_time() - start
            self.calls += 1
            return result

        setattr(owner, name, measured)


@dataclass
class Contestant:
    """A training loop, and how to see into it."""

    advance: Callable[[int], object]
    """Collects rollouts and updates on each, as often as told."""
    updates: Callable[[], int]
    """Optimiser steps so far."""
    stepping: Watch = field(default_factory=Watch)
    """Over the vector environment's step, with the resets it does by itself."""
    resetting: Watch = field(default_factory=Watch)
    """Over resets that the training loop asks for."""
    updating: Watch = field(default_factory=Watch)


def steelyard(case: Case, *, fast: bool = True, autograd: bool = False) -> Contestant:
    from steelyard.integrations.mujoco import make_vector_env
    from steelyard.policy import PPO, AutogradUpdater, OnPolicyLearner, TrainingSettings

    settings = TrainingSettings(
        rollout_steps=case.steps, epochs=case.epochs, minibatch=case.minibatch
    )
    envs = make_vector_env(case.env, case.num_envs, fast=fast)
    learner = OnPolicyLearner(envs, PPO(), settings, seed=case.seed)
    if autograd:
        learner.updater = AutogradUpdater(
            learner.policy, learner.objective, generator=learner.generator
        )

    def advance(rollouts: int) -> None:
        for _ in range(rollouts):
            learner.advance()

    count = _steps_of(learner.updater.optimizer) if autograd else lambda: learner.updater.steps
    contestant = Contestant(advance, count)
    contestant.stepping.over(envs, "step")
    contestant.resetting.over(envs, "reset")
    contestant.updating.over(learner.updater, "epoch")
    return contestant


def single_file(case: Case) -> Contestant:
    from single_file import SingleFilePPO

    loop = SingleFilePPO(
        case.env,
        num_envs=case.num_envs,
        steps=case.steps,
        minibatch=case.minibatch,
        epochs=case.epochs,
        seed=case.seed,
    )

    def advance(rollouts: int) -> None:
        for _ in range(rollouts):
            loop.advance()

    contestant = Contestant(advance, _steps_of(loop.optimizer))
    contestant.stepping.over(loop.envs, "step")
    contestant.updating.over(loop, "update")
    return contestant


def stable_baselines3(case: Case) -> Contestant:
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    model = PPO(
        "MlpPolicy",
        make_vec_env(case.env, case.num_envs, seed=case.seed),
        n_steps=case.steps,
        batch_size=case.minibatch,
        n_epochs=case.epochs,
        seed=case.seed,
        device="cpu",
    )

    def advance(rollouts: int) -> None:
        model.learn(rollouts * case.steps * case.num_envs, reset_num_timesteps=False)

    contestant = Contestant(advance, _steps_of(model.policy.optimizer))
    contestant.stepping.over(model.env, "step")
    contestant.updating.over(model, "train")
    return contestant


CONTESTANTS: dict[str, Callable[[Case], Contestant]] = {
    OURS: steelyard,
    f"{OURS}, SyncVectorEnv": lambda case: steelyard(case, fast=False),
    f"{OURS}, autograd updater": lambda case: steelyard(case, autograd=True),
    PEERS[0]: single_file,
    PEERS[1]: stable_baselines3,
}


def _steps_of(optimizer: Any) -> Callable[[], int]:
    """Count the steps of a torch optimiser from now on."""
    steps = [0]

    def count(*_: object) -> None:
        steps[0] += 1

    optimizer.register_step_post_hook(count)
    return lambda: steps[0]


def measure(case: Case) -> Run:
    """Train once, in this process, and report what the rollouts after the first one took."""
    import mujoco
    import torch

    torch.set_num_threads(1)
    mujoco.set_mju_user_warning(lambda _: None)  # HalfCheetah's model warns at every load
    contestant = CONTESTANTS[case.contestant](case)
    start_mib = _peak_mib()
    contestant.advance(1)
    watches = contestant.stepping, contestant.resetting, contestant.updating
    before = [watch.seconds for watch in watches]
    calls, updates = contestant.stepping.calls, contestant.updates()
    wall, cpu = time.perf_counter(), time.process_time()
    contestant.advance(case.rollouts)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    stepping, resetting, updating = (w.seconds - b for w, b in zip(watches, before, strict=True))
    steps = (contestant.stepping.calls - calls) * case.num_envs
    seconds = {
        "cpu": cpu,
        "wall": wall,
        "stepping": stepping + resetting,
        "update": updating,
        "rest": cpu - stepping - resetting - updating,
    }
    return {
        "env": case.env,
        "minibatch": case.minibatch,
        "contestant": case.contestant,
        "env_steps": steps,
        "updates": contestant.updates() - updates,
        "ms_per_step": {name: round(1e3 * value / steps, 5) for name, value in seconds.items()},
        "peak_mib": round(_peak_mib(), 1),
        "start_mib": round(start_mib, 1),
    }


def _peak_mib() -> float:
    """Largest resident memory of this process so far; Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def measure_alone(case: Case) -> Run:
    """Do :meth:`measure` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, case).result()


def run_rounds(
    envs: Iterable[str], minibatches: Iterable[int], rounds: int, rollouts: int
) -> Iterator[Run]:
    """Measure everything, one round after the other, each in the order opposite to the last."""
    cases = [(env, minibatch) for env in envs for minibatch in minibatches]
    for number in range(rounds):
        order = list(CONTESTANTS) if number % 2 == 0 else list(CONTESTANTS)[::-1]
        for env, minibatch in cases:
            for contestant in order:
                case = Case(contestant, env, minibatch, rollouts)
                yield {"round": number} | measure_alone(case)


def summarize(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row for each environment, minibatch and contestant: medians over the rounds.

    ``ratio`` is CPU time by ours in the same round: ``[median, smallest, largest]``.
    """
    groups: dict[tuple[str, int, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run["env"], run["minibatch"], run["contestant"]), []).append(run)
    rows = []
    for (env, minibatch, contestant), group in groups.items():
        ours = groups[env, minibatch, OURS]
        ratios = [_cpu(one) / _cpu(own) for one, own in zip(group, ours, strict=True)]
        rows.append(
            {
                "env": env,
                "minibatch": minibatch,
                "contestant": contestant,
                "ms_per_step": {
                    name: median(run["ms_per_step"][name] for run in group)
                    for name in group[0]["ms_per_step"]
                },
                "ratio": [median(ratios), min(ratios), max(ratios)],
                "peak_mib": median(run["peak_mib"] for run in group),
                "start_mib": median(run["start_mib"] for run in group),
            }
        )
    return rows


def against_better(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """CPU time of the better peer by ours in each round: ``[median, smallest, largest]``."""
    cpu = {(r["env"], r["minibatch"], r["round"], r["contestant"]): _cpu(r) for r in runs}
    ratios: dict[tuple[str, int], list[float]] = {}
    for env, minibatch, number, contestant in cpu:
        if contestant == OURS:
            better = min(cpu[env, minibatch, number, peer] for peer in PEERS)
            ratio = better / cpu[env, minibatch, number, OURS]
            ratios.setdefault((env, minibatch), []).append(ratio)
    return [
        {"env": env, "minibatch": minibatch, "ratio": [median(some), min(some), max(some)]}
        for (env, minibatch), some in ratios.items()
    ]


def _cpu(run: Run) -> float:
    return run["ms_per_step"]["cpu"]


def result(runs: Sequence[Run], rounds: int, rollouts: int, seconds: float) -> dict[str, Any]:
    """Everything that is stored: how it was measured, the summary, all raw runs."""
    from steelyard.lab.setup import installed_versions, machine

    case = asdict(Case(OURS, rollouts=rollouts))
    settings = {key: case[key] for key in ("num_envs", "steps", "epochs", "rollouts", "seed")}
    return {
        "benchmark": "rl",
        "settings": settings | {"rounds": rounds, "threads": 1},
        "machine": machine(),
        "versions": installed_versions(),
        "wall_seconds": round(seconds, 1),
        "against_better": against_better(runs),
        "summary": summarize(runs),
        "runs": list(runs),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    rounds = options.rounds or (1 if options.quick else ROUNDS)
    rollouts = 1 if options.quick else ROLLOUTS
    envs = options.envs or (ENVS[:1] if options.quick else ENVS)
    out = options.out or (None if options.quick else RESULT)
    os.environ["OMP_NUM_THREADS"] = "1"
    total = len(envs) * len(MINIBATCHES) * len(CONTESTANTS) * rounds
    print(f"{total} training runs, one after the other, about {total * 15 // 60 + 1} minutes.")
    runs, start = [], time.perf_counter()
    for run in run_rounds(envs, MINIBATCHES, rounds, rollouts):
        runs.append(run)
        print(
            f"{len(runs):3}/{total}  round {run['round'] + 1}  {run['env']:15} minibatch "
            f"{run['minibatch']:3}  {run['contestant']:28} {_cpu(run):.3f} CPU ms a step",
            flush=True,
        )
    stored = result(runs, rounds, rollouts, time.perf_counter() - start)
    print("\nCPU time of the better peer by ours, in the same round:")
    for row in stored["against_better"]:
        middle, low, high = row["ratio"]
        print(
            f"  {row['env']:15} minibatch {row['minibatch']:3}  "
            f"{middle:.2f} ({low:.2f} to {high:.2f})"
        )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
        print(f"Results: {out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one environment, one round, one rollout: a rough look; stored only with --out",
    )
    parser.add_argument(
        "--rounds",
        type=_positive,
        help=f"how often to measure every contestant (default {ROUNDS}; 1 with --quick)",
    )
    parser.add_argument(
        "--envs",
        nargs="+",
        metavar="ID",
        help=f"continuous Gymnasium tasks (default {' '.join(ENVS)})",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where to store the results (default benchmarks/results/rl.json)",
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
