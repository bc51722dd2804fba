"""GBPO against GRPO: what happens when a batch of answers is used many times?

GRPO clips the ratio of each token and so stops pulling once it has left the band; GBPO, the
group-relative form of BPO, pulls every ratio to a target at the edge of the band from both sides.
A small language model learns to sort with a verifiable reward; each batch of answers is used for
1, 4 or 12 epochs, in bands of 0.2 and 0.3.

search      five learning rates of each method at each number of epochs, on seeds that are not
            reported (run it alone: ``--parts search``).
epochs      final accuracy, collapse (best accuracy of the run minus final), largest KL of an update
            and share of ratios outside the band, at the learning rates that were found.

The outcome is open: the paper promises stability over many epochs, not that it shows here.

Source: Ao et al. (2026), Bounded Ratio Reinforcement Learning, arXiv:2604.18578.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

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
from steelyard.policy import (
    gbpo_loss,
    gbpo_signals,
    group_relative_advantages,
    grpo_loss,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("epochs", "search")
METHODS = ("grpo", "gbpo")
RATES = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3)


@dataclass(frozen=True)
class Config:
    """What is run, and how large."""

    parts: tuple[str, ...] = ("epochs",)
    """Which of epochs, search."""
    epochs: tuple[int, ...] = (1, 4, 12)
    """Passes over each batch that are compared."""
    bands: tuple[float, ...] = (0.2,)
    """Half-widths of the band."""
    steps: int = 30
    """Batches of reinforcement learning."""
    prompts: int = 16
    """Prompts a batch."""
    samples: int = 8
    """Answers to a prompt."""
    grpo_rates: tuple[float, ...] = (2e-4, 2e-4, 1e-4)
    """Learning rate of GRPO for each number of epochs, from part search."""
    gbpo_rates: tuple[float, ...] = (5e-4, 2e-4, 5e-5)
    """Learning rate of GBPO for each number of epochs, from part search."""
    base_steps: int = 600
    """Training steps of the base model on demonstrations."""

    def __post_init__(self) -> None:
        for part in self.parts:
            check_choice("parts", part, PARTS)
        for epochs in self.epochs:
            check_count("epochs", epochs)
        for band in self.bands:
            check_range("bands", band, above=0.0, below=1.0)
        for name in ("steps", "prompts", "base_steps"):
            check_count(name, getattr(self, name))
        check_count("samples", self.samples, at_least=2)
        for name in ("grpo_rates", "gbpo_rates"):
            rates = getattr(self, name)
            if len(rates) != len(self.epochs):
                raise ValueError(
                    f"{name} must give a rate for each of the {len(self.epochs)} numbers of "
                    f"epochs, got {len(rates)}"
                )
            for rate in rates:
                check_range(name, rate, above=0.0)


QUICK = Form(Config(), seeds=3, minutes=5, threads=1)
FULL = Form(Config(bands=(0.2, 0.3), steps=40), seeds=5, minutes=25, threads=1)
CURVES = ("reward", "approx_kl", "out_of_band")
UNITS = {
    "step": "batches",
    "reward": "share of right answers",
    "approx_kl": "KL from the old policy (nats a token)",
    "out_of_band": "share of ratios outside the band",
}

_PAPER = "Ao et al. (2026), arXiv:2604.18578"


def _name(epochs: int, band: float) -> str:
    return f"band={band}/epochs={epochs}"


def _claims() -> Iterator[Claim]:
    for band in (0.2, 0.3):
        many = _name(12, band)
        yield Claim(
            f"12 epochs, band {band}: GBPO leaves fewer ratios outside the band than GRPO",
            f"{_PAPER}, two-sided loss",
            metric=f"{many}/gbpo/out_of_band",
            baseline=f"{many}/grpo/out_of_band",
            direction="lower",
        )
        yield Claim(
            f"12 epochs, band {band}: GBPO's largest KL from the old policy is smaller",
            f"{_PAPER}, two-sided loss",
            metric=f"{many}/gbpo/max_kl",
            baseline=f"{many}/grpo/max_kl",
            direction="lower",
        )
        yield Claim(
            f"12 epochs, band {band}: GBPO collapses less (best minus final accuracy)",
            f"{_PAPER}, stability in epochs",
            metric=f"{many}/gbpo/collapse",
            baseline=f"{many}/grpo/collapse",
            direction="lower",
        )
        yield Claim(
            f"12 epochs, band {band}: GBPO ends at most 3 points below GRPO in accuracy",
            "check at equal tuning budgets",
            metric=f"{many}/gbpo/reward",
            baseline=f"{many}/grpo/reward",
            direction="higher",
            margin=-0.03,
        )


CLAIMS: tuple[Claim, ...] = tuple(_claims())


def run(config: Config, lab: Lab) -> dict[str, float]:
    """Run the chosen parts for one seed."""
    parts = {"epochs": run_epochs, "search": run_search}
    metrics: dict[str, float] = {}
    for part in config.parts:
        metrics |= parts[part](config, lab)
    return metrics


# ---- the methods ----------------------------------------------------------------------------


def grpo(rollouts: Rollouts, *, band: float) -> Update:
    """Clipped ratios; advantages are standardised within a group."""
    advantages = group_relative_advantages(rollouts.rewards, rollouts.groups)

    def loss(log_ratio: Tensor, index: Tensor) -> Tensor:
        mask = rollouts.mask[index]
        return grpo_loss(log_ratio, advantages[index], epsilon=band, mask=mask)

    return Update(loss)


def gbpo(rollouts: Rollouts, *, band: float) -> Update:
    """Ratios fitted to the edges of the band, above the group's median and below it."""
    signals = gbpo_signals(rollouts.rewards, rollouts.groups, epsilon_low=band, epsilon_high=band)
    weight = signals.advantages.abs()

    def loss(log_ratio: Tensor, index: Tensor) -> Tensor:
        return gbpo_loss(
            log_ratio, signals.target_ratio[index], weight[index], mask=rollouts.mask[index]
        )

    return Update(loss)


OBJECTIVES: dict[str, Callable[..., Update]] = {"grpo": grpo, "gbpo": gbpo}


# ---- 1. Many epochs -------------------------------------------------------------------------


def run_epochs(config: Config, lab: Lab) -> dict[str, float]:
    """Train both methods with every number of epochs and band."""
    make = maker(config, lab.seed)
    rates = {"grpo": config.grpo_rates, "gbpo": config.gbpo_rates}
    metrics: dict[str, float] = {}
    for band in config.bands:
        for place, epochs in enumerate(config.epochs):
            for method in METHODS:
                name = f"{_name(epochs, band)}/{method}"
                learner = partial(make, method, epochs, band, rates[method][place])
                rows = lab.train(name, learner, total=config.steps)
                metrics |= prefixed(name, summarise(rows))
    return metrics


# ---- 2. Search ------------------------------------------------------------------------------


def run_search(config: Config, lab: Lab) -> dict[str, float]:
    """Try four learning rates of each method, at every number of epochs, on seeds of their own."""
    make = maker(config, lab.seed + 1000)
    metrics: dict[str, float] = {}
    for method in METHODS:
        for epochs in config.epochs:
            for rate in RATES:
                name = f"search/epochs={epochs}/{method} rate={rate}"
                learner = partial(make, method, epochs, config.bands[0], rate)
                rows = lab.train(name, learner, total=config.steps)
                metrics |= prefixed(name, summarise(rows))
    return metrics


# ---- shared by the parts --------------------------------------------------------------------


def maker(config: Config, seed: int) -> Callable[[str, int, float, float], RLVRLearner]:
    """Return ``make(method, epochs, band, rate)``; all learners start from one base model."""
    task = filler_sorting(direction="long")

    @cache
    def base() -> Callable[[], tuple[Any, Any]]:
        return base_copies(task, seed=seed, steps=config.base_steps, hidden_size=48, num_heads=4)

    def make(method: str, epochs: int, band: float, rate: float) -> RLVRLearner:
        model, tokenizer = base()()
        objective: Objective = partial(OBJECTIVES[method], band=band)
        settings = RLVRSettings(
            prompts=config.prompts,
            samples=config.samples,
            epochs=epochs,
            minibatches=2,
            learning_rate=rate,
            band=band,
        )
        return RLVRLearner(model, tokenizer, task, objective, settings, seed=seed)

    return make


def summarise(rows: list[dict[str, float]]) -> dict[str, float]:
    """Final accuracy (last fifth), how far it fell from the best, and how far ratios went."""
    window = max(1, len(rows) // 5)
    rewards = [row["reward"] for row in rows]
    smooth = [sum(rewards[end - window : end]) / window for end in range(window, len(rewards) + 1)]
    return {
        "reward": smooth[-1],
        "reward_mean": sum(rewards) / len(rewards),
        "collapse": max(smooth) - smooth[-1],
        "out_of_band": sum(row["out_of_band"] for row in rows) / len(rows),
        "mean_kl": sum(row["approx_kl"] for row in rows) / len(rows),
        "max_kl": max(row["approx_kl"] for row in rows),
    }


def figures(result: dict[str, Any]) -> "dict[str, Figure]":
    """Accuracy, collapse and ratios against the number of epochs."""
    from steelyard.lab.plots import draw_against

    config = result["config"]
    if "epochs" not in config["parts"]:
        return {}
    panels = {
        (f"band {band}", label): {
            method: {
                epochs: [
                    values[f"{_name(epochs, band)}/{method}/{key}"]
                    for values in result["metrics"].values()
                ]
                for epochs in config["epochs"]
            }
            for method in METHODS
        }
        for band in config["bands"]
        for key, label in (
            ("reward", "share of right answers at the end"),
            ("out_of_band", "share of ratios outside the band"),
        )
    }
    return {"epochs": draw_against(panels, "epochs a batch", "Using a batch of answers again")}
