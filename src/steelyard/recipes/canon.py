"""CANON against Dr.GRPO: which way should answers change, and who decides?

An answer may start with filler tokens, which have no meaning but may go with being right. CANON
compares the longer half of a prompt's answers with the shorter half: between the halves ("inter")
it strengthens whatever direction the rewards favour, within them ("intra") it removes it.

exact       synthetic groups: the mean signal of a half is exactly twice that of Dr.GRPO.
direction   two mirrored tasks, one where longer answers are right more often and one where shorter
            ones are. One and the same setting should lengthen answers in the first and shorten them
            in the second; a fixed bonus on length can do only one. Controls: halves made at random,
            and Dr.GRPO with twice the advantages.
efficiency  a task where length does not matter: weights alpha below 1 on the long half against
            fixed penalties on length.
sweep       group sizes 4 and 16, and mu between intra and inter, on the first task.

Source: Chen et al. (2025), CANON, arXiv:2509.23962.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from steelyard._checks import check_choice, check_count, check_range
from steelyard.lab import Claim, Form, Lab, prefixed
from steelyard.lab.rlvr import (
    Objective,
    RLVRLearner,
    RLVRSettings,
    Rollouts,
    Update,
    base_copies,
)
from steelyard.lab.tasks import filler_sorting
from steelyard.policy import canon_advantages, group_relative_advantages, grpo_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Direction = Literal["long", "short", "none"]
Bases = Callable[[Direction], Callable[[], tuple[Any, Any]]]

PARTS = ("exact", "direction", "efficiency", "sweep")
TASKS: tuple[Direction, ...] = ("long", "short")
ALPHAS = (0.96, 0.9, 0.8)
PENALTIES = (0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Config:
    """What is run, and how large."""

    parts: tuple[str, ...] = ("exact", "direction", "efficiency")
    """Which of exact, direction, efficiency, sweep."""
    steps: int = 40
    """Batches of reinforcement learning."""
    prompts: int = 16
    """Prompts a batch."""
    samples: int = 8
    """Answers to a prompt."""
    learning_rate: float = 2e-4
    base_steps: int = 600
    """Training steps of the base model on demonstrations."""
    bonus: float = 0.05
    """Reward a token of the fixed length bonus."""
    early: int = 10
    """The first so many batches are "early"."""

    def __post_init__(self) -> None:
        for part in self.parts:
            check_choice("parts", part, PARTS)
        for name in ("steps", "prompts", "base_steps"):
            check_count(name, getattr(self, name))
        check_range("early", self.early, at_least=2, at_most=self.steps)
        check_count("samples", self.samples, at_least=2)
        check_range("learning_rate", self.learning_rate, above=0.0)


QUICK = Form(Config(), seeds=3, minutes=8, threads=1)
FULL = Form(Config(parts=PARTS), seeds=10, minutes=45, threads=1)
CURVES = ("reward", "length", "entropy")
UNITS = {
    "step": "batches",
    "reward": "share of right answers",
    "length": "tokens an answer",
    "entropy": "entropy of the policy (nats)",
}

_PAPER = "Chen et al. (2025), arXiv:2509.23962"
_LONG, _SHORT, _NONE = "direction/long", "direction/short", "efficiency/none"

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "The mean signal of a half is twice that of Dr.GRPO, for every group",
        f"{_PAPER}, Thm 1",
        metric="exact/smallest_amplification",
        baseline=2.0,
        direction="higher",
        margin=-1e-9,
        min_seeds=1,
    ),
    Claim(
        "Where longer answers are right more often, inter ends with longer ones than it began",
        f"{_PAPER}, direction discovery",
        metric=f"{_LONG}/inter/length_change",
        baseline=0.0,
        direction="higher",
    ),
    Claim(
        "Where longer answers are right more often, inter ends with longer ones than Dr.GRPO",
        f"{_PAPER}, direction discovery",
        metric=f"{_LONG}/inter/length",
        baseline=f"{_LONG}/dr-grpo/length",
        direction="higher",
    ),
    Claim(
        "Where shorter answers are right more often, inter ends with shorter ones than it began",
        f"{_PAPER}, direction discovery",
        metric=f"{_SHORT}/inter/length_change",
        baseline=0.0,
        direction="lower",
    ),
    Claim(
        "Where shorter answers are right more often, inter shortens sooner than Dr.GRPO",
        f"{_PAPER}, direction discovery",
        metric=f"{_SHORT}/inter/early_length",
        baseline=f"{_SHORT}/dr-grpo/early_length",
        direction="lower",
    ),
    Claim(
        "Intra removes the direction: on the first task it ends shorter than Dr.GRPO",
        f"{_PAPER}, inter and intra",
        metric=f"{_LONG}/intra/length",
        baseline=f"{_LONG}/dr-grpo/length",
        direction="lower",
    ),
    Claim(
        "A length bonus works against the second task: longer answers there than with inter",
        "a fixed direction cannot serve both tasks",
        metric=f"{_SHORT}/bonus/length",
        baseline=f"{_SHORT}/inter/length",
        direction="higher",
    ),
    Claim(
        "Control: inter lengthens more than with halves made at random",
        "the metric matters, not the size of the advantages",
        metric=f"{_LONG}/inter/length",
        baseline=f"{_LONG}/inter-random/length",
        direction="higher",
    ),
    Claim(
        "Control: inter lengthens more than Dr.GRPO with twice the advantages",
        "the metric matters, not the size of the advantages",
        metric=f"{_LONG}/inter/length",
        baseline=f"{_LONG}/dr-grpo x2/length",
        direction="higher",
    ),
    Claim(
        "Where length does not matter, alpha = 0.8 gives shorter answers than alpha = 1",
        f"{_PAPER}, CANON-Eff",
        metric=f"{_NONE}/alpha=0.8/length",
        baseline=f"{_NONE}/alpha=1/length",
        direction="lower",
    ),
    Claim(
        "alpha = 0.8 costs at most 5 points of accuracy",
        f"{_PAPER}, CANON-Eff",
        metric=f"{_NONE}/alpha=0.8/reward",
        baseline=f"{_NONE}/alpha=1/reward",
        direction="higher",
        margin=-0.05,
    ),
)


def run(config: Config, lab: Lab) -> dict[str, float]:
    """Run the chosen parts for one seed."""
    parts = {
        "exact": run_exact,
        "direction": run_direction,
        "efficiency": run_efficiency,
        "sweep": run_sweep,
    }

    @cache
    def base(direction: Direction) -> Callable[[], tuple[Any, Any]]:
        task = filler_sorting(direction=direction)
        return base_copies(
            task, seed=lab.seed, steps=config.base_steps, hidden_size=48, num_heads=4
        )

    metrics: dict[str, float] = {}
    for part in config.parts:
        metrics |= parts[part](config, lab, base)
    return metrics


# ---- the methods ----------------------------------------------------------------------------

MAX_LENGTH = 10  # tokens of the longest right answer: the constant that Dr.GRPO divides by


def policy_gradient(advantages: Tensor, rollouts: Rollouts) -> Update:
    """Clipped loss, summed over the tokens of an answer and divided by a constant."""

    def loss(log_ratio: Tensor, index: Tensor) -> Tensor:
        return (
            grpo_loss(
                log_ratio,
                advantages[index],
                epsilon_high=0.28,
                mask=rollouts.mask[index],
                aggregate="sequence_sum",
            )
            / MAX_LENGTH
        )

    return Update(loss)


def dr_grpo(rollouts: Rollouts, *, scale: float = 1.0, per_token: float = 0.0) -> Update:
    """Reward minus the group's mean; ``per_token`` is a bonus on length."""
    rewards = rollouts.rewards + per_token * rollouts.lengths
    advantages = group_relative_advantages(rewards, rollouts.groups, scale="none")
    return policy_gradient(scale * advantages, rollouts)


def canon(
    rollouts: Rollouts, *, mu: float, alpha: float | None = None, random: bool = False
) -> Update:
    """Compare the longer and the shorter half; ``random`` makes the halves by chance."""
    metric = rollouts.lengths
    if random:
        generator = torch.Generator().manual_seed(rollouts.step)
        metric = torch.rand(len(metric), generator=generator)
    advantages = canon_advantages(rollouts.rewards, metric, rollouts.groups, mu=mu, alpha=alpha)
    return policy_gradient(advantages, rollouts)


INTER, INTRA = partial(canon, mu=1.0), partial(canon, mu=0.0)


# ---- 1. Exact: the signal of a half ---------------------------------------------------------


def run_exact(config: Config, lab: Lab, base: Bases) -> dict[str, float]:
    """Half means of the advantages on random groups with binary rewards."""

    def study() -> dict[str, float]:
        generator = torch.Generator().manual_seed(lab.seed)
        count, size = 1000, 2 * (config.samples // 2)
        groups = torch.arange(count).repeat_interleave(size)
        metric = torch.rand(count * size, generator=generator, dtype=torch.float64)
        chance = torch.where(metric > 0.5, 0.6, 0.4)
        rewards = torch.bernoulli(chance, generator=generator)
        inter = canon_advantages(rewards, metric, groups, mu=1.0).reshape(count, size)
        plain = group_relative_advantages(rewards, groups, scale="none").reshape(count, size)
        high = metric.reshape(count, size).argsort().argsort() >= size // 2
        signal, usual = ((values * high).sum(1) for values in (inter, plain))
        told = usual.abs() > 1e-9  # groups whose halves differ
        ratio = signal[told] / usual[told]
        return {"smallest_amplification": ratio.min().item(), "groups": told.sum().item()}

    return prefixed("exact", lab.compute("exact", study))


# ---- 2. Direction: two mirrored tasks -------------------------------------------------------


def run_direction(config: Config, lab: Lab, base: Bases) -> dict[str, float]:
    """Train every method on both tasks, from the same base model each."""
    methods: dict[str, Objective] = {
        "dr-grpo": dr_grpo,
        "inter": INTER,
        "intra": INTRA,
        "bonus": partial(dr_grpo, per_token=config.bonus),
        "inter-random": partial(INTER, random=True),
        "dr-grpo x2": partial(dr_grpo, scale=2.0),
    }
    metrics: dict[str, float] = {}
    for task in TASKS:
        metrics |= train(config, lab, base, f"direction/{task}", task, methods)
    return metrics


# ---- 3. Efficiency: a task where length does not matter --------------------------------------


def run_efficiency(config: Config, lab: Lab, base: Bases) -> dict[str, float]:
    """Weights on the long half against penalties on length."""
    methods: dict[str, Objective] = {"alpha=1": partial(canon, mu=0.5)}
    for alpha in ALPHAS:
        methods[f"alpha={alpha}"] = partial(canon, mu=0.5, alpha=alpha)
    for penalty in PENALTIES:
        methods[f"penalty={penalty}"] = partial(dr_grpo, per_token=-penalty)
    return train(config, lab, base, "efficiency/none", "none", methods)


# ---- 4. Sweep: group size and mu ------------------------------------------------------------


def run_sweep(config: Config, lab: Lab, base: Bases) -> dict[str, float]:
    """Other group sizes at an equal number of answers, and other mixtures."""
    metrics: dict[str, float] = {}
    answers = config.prompts * config.samples
    for size in (4, 16):
        resized = RLVRSettings(
            prompts=answers // size, samples=size, learning_rate=config.learning_rate
        )
        methods: dict[str, Objective] = {"dr-grpo": dr_grpo, "inter": INTER, "intra": INTRA}
        metrics |= train(config, lab, base, f"sweep/samples={size}", "long", methods, resized)
    mixtures: dict[str, Objective] = {f"mu={mu}": partial(canon, mu=mu) for mu in (0.25, 0.75)}
    return metrics | train(config, lab, base, "sweep/mixture", "long", mixtures)


# ---- shared by the parts --------------------------------------------------------------------


def train(
    config: Config,
    lab: Lab,
    base: Bases,
    group: str,
    direction: Direction,
    methods: dict[str, Objective],
    settings: RLVRSettings | None = None,
) -> dict[str, float]:
    """Train each method from one base model; return what :func:`summarise` says."""
    task = filler_sorting(direction=direction)
    settings = settings or RLVRSettings(
        prompts=config.prompts, samples=config.samples, learning_rate=config.learning_rate
    )

    def make(objective: Objective) -> RLVRLearner:
        model, tokenizer = base(direction)()
        return RLVRLearner(model, tokenizer, task, objective, settings, seed=lab.seed)

    metrics: dict[str, float] = {}
    for method, objective in methods.items():
        name = f"{group}/{method}"
        rows = lab.train(name, partial(make, objective), total=config.steps)
        metrics |= prefixed(name, summarise(rows, config.early))
    return metrics


def summarise(rows: list[dict[str, float]], early: int) -> dict[str, float]:
    """Length and reward at the end (last fifth of the batches), early on, and over all."""
    late = rows[-max(1, len(rows) // 5) :]
    length = _mean(late, "length")
    return {
        "length": length,
        "length_change": length - rows[0]["length"],
        "early_length": _mean(rows[early // 2 : early], "length"),
        "reward": _mean(late, "reward"),
        "reward_mean": _mean(rows, "reward"),
        "entropy": _mean(late, "entropy"),
    }


def _mean(rows: list[dict[str, float]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def figures(result: dict[str, Any]) -> "dict[str, Figure]":
    """Length and accuracy against the weight of the long half and against the penalty."""
    from steelyard.lab.plots import draw_against

    if "efficiency" not in result["config"]["parts"]:
        return {}
    seeds = result["metrics"].values()
    settings = {
        "weight 1 - alpha": {0.0: "alpha=1"} | {round(1 - a, 2): f"alpha={a}" for a in ALPHAS},
        "penalty a token": {0.0: "alpha=1"} | {p: f"penalty={p}" for p in PENALTIES},
    }
    panels = {
        ("length does not matter", label): {
            kind: {
                value: [metrics[f"{_NONE}/{name}/{key}"] for metrics in seeds]
                for value, name in names.items()
            }
            for kind, names in settings.items()
        }
        for key, label in (("length", "tokens an answer"), ("reward", "share of right answers"))
    }
    title = "Both knobs shorten answers; what it costs is on the right"
    return {"efficiency": draw_against(panels, "strength", title)}
