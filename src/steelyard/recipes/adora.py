"""ADORA: which prompts deserve more weight?

ADORA multiplies the advantages of all answers to a prompt by one number. "Attenuate" damps prompts
whose right answers are not longer than the wrong ones; "amplify" boosts prompts that are hard and
whose right answers are longer. Here half of the prompts are of a hard family, where longer answers
are right more often, and half of an easy one, solved four times in five, where shorter ones are.

share       from one base model, without training: the share of the hard family in the gradient.
train       GRPO, both modes, and two controls: the weights of "amplify" dealt to other prompts at
            random, and divided by their mean (the balance without the larger step).
sweep       group sizes, thresholds and weights.

Source: Ren et al. (2026), ADORA, arXiv:2602.10019.
"""

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
from steelyard.lab.tasks import Task, filler_sorting
from steelyard.policy import adora_weights, group_relative_advantages, grpo_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("share", "train", "sweep")
Mode = Literal["grpo", "attenuate", "amplify", "random", "normalized"]

WEIGHTS: dict[Mode, tuple[float, ...]] = {"attenuate": (0.05, 0.2), "amplify": (1.5, 3.0)}
COMPARED: tuple[Mode, ...] = ("grpo", "attenuate", "amplify")
THRESHOLDS = (0.3, 0.7)
SIZES = (4, 16)


@dataclass(frozen=True)
class Config:
    """What is run, and how large."""

    parts: tuple[str, ...] = ("share", "train")
    """Which of share, train, sweep."""
    steps: int = 40
    """Batches of reinforcement learning."""
    prompts: int = 16
    """Prompts a batch."""
    samples: int = 8
    """Answers to a prompt."""
    learning_rate: float = 2e-4
    optimizer: Literal["adam", "sgd"] = "adam"
    base_steps: int = 600
    """Training steps of the base model on demonstrations."""
    share_batches: int = 20
    """Batches of the part share."""

    def __post_init__(self) -> None:
        for part in self.parts:
            check_choice("parts", part, PARTS)
        for name in ("steps", "prompts", "base_steps", "share_batches"):
            check_count(name, getattr(self, name))
        check_count("samples", self.samples, at_least=2)
        check_range("learning_rate", self.learning_rate, above=0.0)


QUICK = Form(Config(), seeds=3, minutes=5, threads=1)
FULL = Form(Config(parts=PARTS), seeds=10, minutes=40, threads=1)
CURVES = ("reward/hard", "reward/easy", "length", "boosted")
UNITS = {
    "step": "batches",
    "reward/hard": "share of right answers, hard prompts",
    "reward/easy": "share of right answers, easy prompts",
    "length": "tokens an answer",
    "boosted": "share of prompts with the larger weight",
}

_PAPER = "Ren et al. (2026), arXiv:2602.10019"

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "Amplify moves the gradient to the hard family: a larger share of its norm than GRPO",
        f"{_PAPER}, weighted advantage",
        metric="share/amplify/hard_share",
        baseline="share/grpo/hard_share",
        direction="higher",
    ),
    Claim(
        "Amplify solves hard prompts sooner than GRPO (mean accuracy over training)",
        f"{_PAPER}, amplification",
        metric="train/amplify/hard_mean",
        baseline="train/grpo/hard_mean",
        direction="higher",
    ),
    Claim(
        "Amplify solves hard prompts sooner than the same weights dealt at random",
        "control: the choice of prompts matters, not the larger step",
        metric="train/amplify/hard_mean",
        baseline="train/random/hard_mean",
        direction="higher",
    ),
    Claim(
        "Amplify with weights of mean 1 solves hard prompts sooner than GRPO",
        "control: the balance matters, not the larger step",
        metric="train/normalized/hard_mean",
        baseline="train/grpo/hard_mean",
        direction="higher",
    ),
    Claim(
        "Attenuate ends with longer answers than GRPO",
        f"{_PAPER}, attenuation",
        metric="train/attenuate/length",
        baseline="train/grpo/length",
        direction="higher",
    ),
    Claim(
        "Attenuate ends at most 3 points below GRPO in accuracy",
        f"{_PAPER}, attenuation",
        metric="train/attenuate/reward",
        baseline="train/grpo/reward",
        direction="higher",
        margin=-0.03,
    ),
)


def run(config: Config, lab: Lab) -> dict[str, float]:
    """Run the chosen parts for one seed, all from one base model."""
    task = filler_sorting(direction="mixed")

    @cache
    def base() -> Any:
        return base_copies(
            task, seed=lab.seed, steps=config.base_steps, hidden_size=48, num_heads=4
        )

    parts = {"share": run_share, "train": run_train, "sweep": run_sweep}
    metrics: dict[str, float] = {}
    for part in config.parts:
        metrics |= parts[part](config, lab, task, base)
    return metrics


# ---- the methods ----------------------------------------------------------------------------


def prompt_weights(
    rollouts: Rollouts, mode: Mode, *, tau: float = 0.5, weight: float | None = None
) -> Tensor:
    """Weight of each answer's prompt, ``[N]``."""
    if mode == "grpo":
        return torch.ones_like(rollouts.rewards)
    weights = adora_weights(
        rollouts.rewards,
        rollouts.lengths,
        rollouts.groups,
        mode="attenuate" if mode == "attenuate" else "amplify",
        tau=tau,
        weight=weight,
    ).weights
    if mode == "normalized":
        return weights / weights.mean()
    if mode == "random":
        generator = torch.Generator().manual_seed(rollouts.step)
        number = int(rollouts.groups.max()) + 1
        dealt = weights.reshape(number, -1)[torch.randperm(number, generator=generator)]
        return dealt.flatten()
    return weights


def weighted_grpo(
    rollouts: Rollouts, mode: Mode, *, tau: float = 0.5, weight: float | None = None
) -> Update:
    """GRPO whose advantages are multiplied by the weight of their prompt."""
    weights = prompt_weights(rollouts, mode, tau=tau, weight=weight)
    advantages = weights * group_relative_advantages(rollouts.rewards, rollouts.groups)

    def loss(log_ratio: Tensor, index: Tensor) -> Tensor:
        return grpo_loss(log_ratio, advantages[index], mask=rollouts.mask[index])

    boosted = (weights > weights.min()).to(weights.dtype).mean().item()
    return Update(loss, {"boosted": boosted, "mean_weight": weights.mean().item()})


# ---- 1. The share of the hard family in the gradient ----------------------------------------


def run_share(config: Config, lab: Lab, task: Task, base: Any) -> dict[str, float]:
    """Gradient norm of the hard family over that of both, on batches of the base model."""

    def study() -> dict[str, float]:
        modes: tuple[Mode, ...] = ("grpo", "attenuate", "amplify", "normalized")
        objectives = {mode: partial(weighted_grpo, mode=mode) for mode in modes}
        model, tokenizer = base()()
        learner = RLVRLearner(
            model, tokenizer, task, objectives["grpo"], rlvr_settings(config), seed=lab.seed + 1000
        )
        shares: dict[str, list[float]] = {mode: [] for mode in modes}
        for _ in range(config.share_batches):
            rollouts = learner.collect()
            hard = torch.tensor([row["family"] == "hard" for row in rollouts.rows])
            for mode, objective in objectives.items():
                loss = objective(rollouts).loss
                norms = [
                    learner.gradient_norm(loss, rollouts, inside.nonzero()[:, 0])
                    for inside in (hard, ~hard)
                    if bool(inside.any())
                ]
                shares[mode].append(norms[0] / max(sum(norms), 1e-12) if len(norms) > 1 else 0.5)
        return {f"{mode}/hard_share": sum(values) / len(values) for mode, values in shares.items()}

    return prefixed("share", lab.compute("share", study))


# ---- 2. Training ----------------------------------------------------------------------------


def rlvr_settings(config: Config, samples: int | None = None) -> RLVRSettings:
    """Sizes of an update; other group sizes keep the number of answers."""
    samples = samples or config.samples
    return RLVRSettings(
        prompts=max(1, config.prompts * config.samples // samples),
        samples=samples,
        learning_rate=config.learning_rate,
        optimizer=config.optimizer,
    )


def run_train(config: Config, lab: Lab, task: Task, base: Any) -> dict[str, float]:
    """Train every mode."""
    modes: tuple[Mode, ...] = ("grpo", "attenuate", "amplify", "random", "normalized")
    metrics: dict[str, float] = {}
    for mode in modes:
        objective = partial(weighted_grpo, mode=mode)
        metrics |= train(config, lab, task, base, f"train/{mode}", objective, rlvr_settings(config))
    return metrics


# ---- 3. Sweep -------------------------------------------------------------------------------


def run_sweep(config: Config, lab: Lab, task: Task, base: Any) -> dict[str, float]:
    """Vary one setting at a time."""
    usual = rlvr_settings(config)
    runs: dict[str, tuple[Objective, RLVRSettings]] = {}
    for tau in THRESHOLDS:
        runs[f"sweep/tau={tau}"] = partial(weighted_grpo, mode="amplify", tau=tau), usual
    for mode, weights in WEIGHTS.items():
        for weight in weights:
            weighted = partial(weighted_grpo, mode=mode, weight=weight)
            runs[f"sweep/{mode} {weight}"] = weighted, usual
    for size in SIZES:
        for mode in COMPARED:
            name = f"sweep/samples={size} {mode}"
            runs[name] = partial(weighted_grpo, mode=mode), rlvr_settings(config, size)
    metrics: dict[str, float] = {}
    for name, (objective, settings) in runs.items():
        metrics |= train(config, lab, task, base, name, objective, settings)
    return metrics


# ---- shared by the parts --------------------------------------------------------------------


def train(
    config: Config,
    lab: Lab,
    task: Task,
    base: Any,
    name: str,
    objective: Objective,
    settings: RLVRSettings,
) -> dict[str, float]:
    """Train one method; say how it ended (last fifth) and how it did on the whole."""

    def make() -> RLVRLearner:
        model, tokenizer = base()()
        return RLVRLearner(model, tokenizer, task, objective, settings, seed=lab.seed)

    rows = lab.train(name, make, total=config.steps)
    late = rows[-max(1, len(rows) // 5) :]
    wanted = {
        "reward": (late, "reward"),
        "length": (late, "length"),
        "hard_final": (late, "reward/hard"),
        "hard_mean": (rows, "reward/hard"),
        "easy_mean": (rows, "reward/easy"),
        "boosted": (rows, "boosted"),
    }
    found: dict[str, float] = {}
    for metric, (chosen, key) in wanted.items():
        values = [row[key] for row in chosen if key in row]  # a batch may lack a family
        if values:
            found[f"{name}/{metric}"] = sum(values) / len(values)
    return found


def figures(result: dict[str, Any]) -> "dict[str, Figure]":
    """Accuracy on hard prompts and length against the group size."""
    from steelyard.lab.plots import draw_against

    config = result["config"]
    if not {"train", "sweep"} <= set(config["parts"]):
        return {}
    seeds = list(result["metrics"].values())

    def name(mode: str, size: int) -> str:
        usual = size == config["samples"]
        return f"train/{mode}" if usual else f"sweep/samples={size} {mode}"

    panels: dict[tuple[str, str], dict[str, dict[float, list[float]]]] = {
        ("128 answers a batch", label): {
            mode: {
                size: [metrics[f"{name(mode, size)}/{key}"] for metrics in seeds]
                for size in sorted({*SIZES, config["samples"]})
            }
            for mode in COMPARED
        }
        for key, label in (
            ("hard_mean", "hard prompts right, mean over training"),
            ("length", "tokens an answer at the end"),
        )
    }
    return {"sizes": draw_against(panels, "answers to a prompt", "Modes against the group size")}
