"""f-DPO: which divergence should hold a policy to its reference?

DPO holds the policy by the reverse KL. Other divergences forbid it less to move and more to abandon
what the reference does. Divergences are compared at equal expected reward, never at equal beta,
whose scale differs between them. Names are those of the paper: reverse KL is KL(policy ||
reference), forward KL is KL(reference || policy), JSD the unhalved Jensen-Shannon divergence.

optimum     exact optima over 64 items, beta solved for 60 % of the way to the largest reward: what
            is kept of the reference. Entropy is shown without a claim: it does not grow.
pairs       a softmax over 64 items learns from 3000 noisy pairs, six divergences at four betas.
            With a bounded score and a small beta the loss comes near its floor while the mass goes
            to items that are no good.
text        a word model of 20 Newsgroups, pairs of its own samples, raters who follow a sentiment
            lexicon (VADER); a second lexicon (AFINN) is the judge. Coverage at equal reward.
smollm2     SmolLM2-135M with LoRA, pairs of its own answers, a short run. Seed 0 only, without a
            claim.

Your own preferences: ``--model DIR --pairs FILE.jsonl`` (fields ``prompt``, ``chosen``,
``rejected``) trains that model (a folder, or "smollm2") with ``--divergence`` and ``--beta`` and
leaves it in the folder ``model`` of the run.

Source: Wang et al. (2023), Beyond Reverse KL: Generalizing Direct Preference Optimization with
Diverse Divergence Constraints, arXiv:2309.16240.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steelyard._checks import check_choice, check_count, check_range
from steelyard.divergences import (
    JENSEN_SHANNON_DOUBLE,
    KL,
    REVERSE_KL,
    FDivergence,
    alpha_divergence,
    f_divergence,
)
from steelyard.lab import Claim, Form, Lab, prefixed
from steelyard.lab.data import sentiment_lexicon
from steelyard.lab.preferences import (
    PairBatch,
    PreferenceLearner,
    PreferenceSettings,
)
from steelyard.lab.pretrained import load_language_model
from steelyard.lab.real_models import answer_pairs, mean_score, train_on_file, with_adapters
from steelyard.lab.words import lexicon_score
from steelyard.preference import f_dpo_loss, regularised_optimum
from steelyard.recipes._f_dpo_tools import (
    TextSetting,
    compare_curves,
    draw_figures,
    reference_measures,
    text_measures,
    text_setting,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("optimum", "pairs", "text", "smollm2")
DIVERGENCES: dict[str, FDivergence] = {
    "reverse-kl": KL,
    "alpha=0.3": alpha_divergence(0.7),
    "alpha=0.5": alpha_divergence(0.5),
    "alpha=0.7": alpha_divergence(0.3),
    "forward-kl": REVERSE_KL,
    "jsd": JENSEN_SHANNON_DOUBLE,
}
LINE = ("reverse-kl", "alpha=0.3", "alpha=0.5", "alpha=0.7", "forward-kl")
BETAS = (0.1, 0.3, 1.0, 3.0)
# Three betas each over a factor of ten, about where the rewards reached are alike.
TEXT_BETAS = {
    "reverse-kl": (0.3, 1.0, 3.0),
    "forward-kl": (0.01, 0.03, 0.1),
    "jsd": (0.6, 2.0, 6.0),
}


@dataclass(frozen=True)
class Config:
    """What is run, and how large."""

    parts: tuple[str, ...] = ("optimum", "pairs")
    """Which of optimum, pairs, text, smollm2."""
    draws: int = 10
    """Random problems of the optimum part."""
    updates: int = 600
    """Of the pairs part."""
    text_pairs: int = 6000
    text_updates: int = 100
    """Of 64 pairs each: about one pass."""
    text_learning_rate: float = 5e-4
    text_base_steps: int = 600
    """Training steps of the word model."""
    text_evaluation: int = 512
    """Samples of each final policy, and held-out pairs."""
    smollm2_pairs: int = 48
    smollm2_updates: int = 20
    model: str = ""
    """Train your own model: its folder, or "smollm2"."""
    pairs: str = ""
    """File of your preferences, JSON lines."""
    divergence: str = "reverse-kl"
    """Of your training: reverse-kl, alpha=0.3, alpha=0.5, alpha=0.7, forward-kl or jsd."""
    beta: float = 0.1
    """Of your training."""
    own_updates: int = 100
    """Of your training."""
    batch_size: int = 8
    """Pairs an update, of your training."""
    learning_rate: float = 1e-4
    """Of your training."""
    lora_rank: int = 16
    """Of your training; 0 = all weights."""
    max_tokens: int = 512
    """Longest prompt, and longest response, of your training."""

    def __post_init__(self) -> None:
        for part in self.parts:
            check_choice("parts", part, PARTS)
        check_choice("divergence", self.divergence, tuple(DIVERGENCES))
        least = {"lora_rank": 0, "text_evaluation": 2, "smollm2_pairs": 2}
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), int):
                check_count(field.name, value, at_least=least.get(field.name, 1))
        for name in ("text_learning_rate", "beta", "learning_rate"):
            check_range(name, getattr(self, name), above=0.0)
        if bool(self.model) != bool(self.pairs):
            raise ValueError(
                f"model and pairs belong together, got model={self.model!r}, pairs={self.pairs!r}"
            )


QUICK = Form(Config(), seeds=5, minutes=1, threads=1)
FULL = Form(Config(parts=PARTS), seeds=5, minutes=8, threads=1)
CURVES = ("loss", "accuracy", "chosen_change", "rejected_change")
UNITS = {
    "step": "updates",
    "loss": "loss of the batches (nats)",
    "accuracy": "share of pairs with a positive margin",
    "chosen_change": "log ratio of chosen responses (nats)",
    "rejected_change": "log ratio of rejected responses (nats)",
}

_PAPER = "Wang et al. (2023), arXiv:2309.16240"


def _claims() -> Iterator[Claim]:
    for more, less in pairwise(LINE):
        yield Claim(
            f"At equal reward the exact optimum covers the reference better with {less} than with "
            f"{more}: smaller KL(reference || policy)",
            f"{_PAPER}, Thm 1; measured",
            metric=f"optimum/{less}/forward_kl",
            baseline=f"optimum/{more}/forward_kl",
            direction="lower",
        )
    yield Claim(
        "At equal reward forward KL keeps more of the reference's mass above a tenth of its "
        "probability than reverse KL",
        f"{_PAPER}, diversity",
        metric="optimum/forward-kl/kept",
        baseline="optimum/reverse-kl/kept",
        direction="higher",
    )
    yield Claim(
        "At equal reward no divergence has a smaller KL(policy || reference) than reverse KL "
        "(smallest difference over problems)",
        f"{_PAPER}, Thm 1",
        metric="optimum/smallest_reverse_gap",
        baseline=0.0,
        direction="higher",
        margin=-1e-6,
        min_seeds=1,
    )
    jsd, usual = "pairs/jsd beta=0.3", "pairs/reverse-kl beta=0.3"
    yield Claim(
        "Pairs, beta 0.3: the loss of JSD is within 0.02 of that of reverse KL",
        "finite pairs",
        metric=f"{jsd}/loss",
        baseline=f"{usual}/loss",
        direction="lower",
        margin=-0.02,
    )
    yield Claim(
        "And yet its policy earns at least 0.5 less: a low loss does not say where the mass went",
        "finite pairs: a bounded score and a small beta",
        metric=f"{jsd}/reward",
        baseline=f"{usual}/reward",
        direction="lower",
        margin=0.5,
    )
    yield Claim(
        "There the chosen items lost more probability than with reverse KL",
        "finite pairs: likelihood displacement",
        metric=f"{jsd}/chosen_change",
        baseline=f"{usual}/chosen_change",
        direction="lower",
    )
    yield Claim(
        "With beta 3 the policy of JSD earns more than with beta 0.3",
        "finite pairs: JSD needs a larger beta",
        metric="pairs/jsd beta=3.0/reward",
        baseline=f"{jsd}/reward",
        direction="higher",
    )
    yield Claim(
        "Text, at equal lexicon reward: forward KL covers the reference better than reverse KL",
        f"{_PAPER}, diversity",
        metric="text/forward-kl/coverage_at_level",
        baseline="text/reverse-kl/coverage_at_level",
        direction="lower",
    )
    yield Claim(
        "Text: reverse KL reaches a higher lexicon reward than forward KL, each at its best beta",
        f"{_PAPER}, accuracy",
        metric="text/reverse-kl/best_reward",
        baseline="text/forward-kl/best_reward",
        direction="higher",
    )
    yield Claim(
        "Text: at its best beta reverse KL also raises the lexicon that raters did not use",
        "held-out judge",
        metric="text/reverse-kl/judge_gain",
        baseline=0.0,
        direction="higher",
    )


CLAIMS: tuple[Claim, ...] = tuple(_claims())


def run(config: Config, lab: Lab) -> dict[str, float]:
    """Run the chosen parts for one seed, or train on the user's pairs."""
    if config.model:
        return run_own(config, lab)
    parts = dict(zip(PARTS, (run_optimum, run_pairs, run_text, run_smollm2), strict=True))
    metrics: dict[str, float] = {}
    for part in config.parts:
        metrics |= parts[part](config, lab)
    return metrics


# ---- 1. Optimum: no learning -----------------------------------------------------------------

ITEMS, WAY = 64, 0.6


def run_optimum(config: Config, lab: Lab) -> dict[str, float]:
    """Solve random problems exactly, each divergence at the beta of equal expected reward."""

    def study() -> dict[str, float]:
        generator = torch.Generator().manual_seed(lab.seed)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in DIVERGENCES}
        for _ in range(config.draws):
            exponential = torch.empty(ITEMS, dtype=torch.float64).exponential_(generator=generator)
            ref = exponential / exponential.sum()  # Dirichlet(1)
            rewards = torch.randn(ITEMS, dtype=torch.float64, generator=generator)
            for name, divergence in DIVERGENCES.items():
                found[name].append(optimum_measures(rewards, ref, divergence))
        metrics = {
            f"{name}/{key}": sum(row[key] for row in rows) / len(rows)
            for name, rows in found.items()
            for key in rows[0]
        }
        reverse = [row["reverse_kl"] for row in found["reverse-kl"]]
        gaps = [
            row["reverse_kl"] - least
            for name in DIVERGENCES
            if name != "reverse-kl"
            for row, least in zip(found[name], reverse, strict=True)
        ]
        return metrics | {"smallest_reverse_gap": min(gaps)}

    return prefixed("optimum", lab.compute("optimum", study))


def optimum_measures(rewards: Tensor, ref: Tensor, divergence: FDivergence) -> dict[str, float]:
    """Find the beta at which the optimum is 60 % of the way to the largest reward."""
    start = (ref * rewards).sum()
    wanted = start + WAY * (rewards.max() - start)
    low, high = math.log(1e-3), math.log(1e3)
    for _ in range(40):
        middle = (low + high) / 2
        policy = regularised_optimum(rewards, ref, math.exp(middle), divergence)
        low, high = (middle, high) if (policy * rewards).sum() > wanted else (low, middle)
    log_policy, log_ref = policy.log(), ref.log()
    ratio = policy / ref
    return {
        "beta": math.exp(middle),
        "reward": (policy * rewards).sum().item(),
        "entropy": -torch.special.xlogy(policy, policy).sum().item(),
        "forward_kl": f_divergence(log_policy, log_ref, REVERSE_KL).item(),
        "reverse_kl": f_divergence(log_policy, log_ref, KL).item(),
        "kept": ref[ratio > 0.1].sum().item(),
        "least_log_ratio": ratio.min().log().item(),
    }


# ---- 2. Pairs: a softmax and a finite sample -------------------------------------------------

PAIRS_DRAWN, RATE, RARE_ITEMS, RATERS_SCALE = 3000, 0.02, 7, 2.0


@dataclass(frozen=True)
class Compared:
    """Pairs of items: how often the first was preferred to the second."""

    ref: Tensor
    rewards: Tensor
    chosen: Tensor
    rejected: Tensor
    count: Tensor
    rare: Tensor
    """The least compared items."""


def compared_items(seed: int) -> Compared:
    """Draw a reference, rewards and pairs."""
    generator = torch.Generator().manual_seed(seed)
    ref = torch.randn(ITEMS, dtype=torch.float64, generator=generator).softmax(0)
    rewards = torch.randn(ITEMS, dtype=torch.float64, generator=generator)
    both = torch.multinomial(ref.expand(PAIRS_DRAWN, -1), 2, generator=generator)
    gap = RATERS_SCALE * (rewards[both[:, 0]] - rewards[both[:, 1]])
    draws = torch.rand(PAIRS_DRAWN, generator=generator, dtype=torch.float64)
    first = draws < gap.sigmoid()
    ordered = torch.where(first[:, None], both, both.flip(1))
    unique, count = torch.unique(ordered, dim=0, return_counts=True)
    rare = torch.bincount(both.flatten(), minlength=ITEMS).argsort(stable=True)[:RARE_ITEMS]
    return Compared(ref, rewards, unique[:, 0], unique[:, 1], count.double(), rare)


def run_pairs(config: Config, lab: Lab) -> dict[str, float]:
    """Train a softmax with every divergence at every beta, and JSD for longer."""
    problem = compared_items(lab.seed)
    runs = {
        f"{name} beta={beta}": (divergence, beta, config.updates)
        for name, divergence in DIVERGENCES.items()
        for beta in BETAS
    }
    runs["jsd beta=1.0 longer"] = (JENSEN_SHANNON_DOUBLE, 1.0, 5 * config.updates)

    def study() -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name, (divergence, beta, updates) in runs.items():
            metrics |= prefixed(name, fit_items(problem, divergence, beta, updates))
        metrics["reference/reward"] = (problem.ref * problem.rewards).sum().item()
        metrics["reference/rare_mass"] = problem.ref[problem.rare].sum().item()
        return metrics

    return prefixed("pairs", lab.compute("pairs", study))


def fit_items(
    problem: Compared, divergence: FDivergence, beta: float, updates: int
) -> dict[str, float]:
    """Adam on the loss of all pairs, from the reference."""
    reference = problem.ref.log()
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=RATE)
    share = problem.count / problem.count.sum()
    for _ in range(updates):
        log_ratio = logits.log_softmax(0) - reference
        losses = f_dpo_loss(
            log_ratio[problem.chosen],
            log_ratio[problem.rejected],
            beta=beta,
            divergence=divergence,
            reduction="none",
        )
        loss = (share * losses).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    log_policy = logits.detach().log_softmax(0)
    policy = log_policy.exp()
    return {
        "loss": loss.item(),
        "reward": (policy * problem.rewards).sum().item(),
        "entropy": -(policy * log_policy).sum().item(),
        "rare_mass": policy[problem.rare].sum().item(),
        "chosen_change": (share * (log_policy - reference)[problem.chosen]).sum().item(),
        "forward_kl": f_divergence(log_policy, reference, REVERSE_KL).item(),
    }


# ---- 3. Text ---------------------------------------------------------------------------------


def objective(batch: PairBatch, *, beta: float, divergence: FDivergence) -> Tensor:
    """f-DPO on the log ratios of whole responses."""
    chosen, rejected = (side.log_ratio.sum(-1) for side in batch)
    return f_dpo_loss(chosen, rejected, beta=beta, divergence=divergence)


def run_text(config: Config, lab: Lab) -> dict[str, float]:
    """Train with four divergences at four betas from one reference; compare at equal reward."""

    @cache
    def setting() -> TextSetting:
        return text_setting(
            lab.seed,
            pairs=config.text_pairs,
            base_steps=config.text_base_steps,
            evaluation=config.text_evaluation,
        )

    def make(divergence: FDivergence, beta: float) -> PreferenceLearner:
        found, unit = setting(), max(1, config.text_updates // 10)

        def last(model: Any, step: int) -> dict[str, float]:
            if step < config.text_updates:
                return {}
            return text_measures(found, model, divergence, beta, lab.seed)

        return PreferenceLearner(
            copy.deepcopy(found.reference),
            found.train,
            partial(objective, beta=beta, divergence=divergence),
            PreferenceSettings(updates=unit, learning_rate=config.text_learning_rate),
            seed=lab.seed,
            probe=last,
        )

    start = lab.compute("text/reference", lambda: reference_measures(setting()))
    metrics = prefixed("text/reference", start)
    curves: dict[str, list[dict[str, float]]] = {}
    for name, betas in TEXT_BETAS.items():
        curves[name] = []
        for beta in betas:
            trial = f"text/{name} beta={beta}"
            make_one = partial(make, DIVERGENCES[name], beta)
            row = lab.train(trial, make_one, total=config.text_updates)[-1]
            found = {k.removeprefix("final/"): v for k, v in row.items() if "final/" in k}
            curves[name].append(found)
            metrics |= prefixed(trial, found)
    return metrics | prefixed("text", compare_curves(curves, start))


# ---- 4. Models with a past -------------------------------------------------------------------


def run_smollm2(config: Config, lab: Lab) -> dict[str, float]:
    """Let a lexicon choose between SmolLM2's answers, and train it on them with JSD."""
    if lab.seed != 0:
        return {}

    def study() -> dict[str, float]:
        base, tokenizer = load_language_model("smollm2")
        score = partial(lexicon_score, lexicon=sentiment_lexicon("vader"))
        generator = torch.Generator().manual_seed(lab.seed)
        sizes: dict[str, Any] = {"max_new_tokens": 16, "generator": generator}
        pairs = answer_pairs(base, tokenizer, score, count=config.smollm2_pairs, **sizes)
        before = mean_score(base, tokenizer, score, **sizes)
        learner = PreferenceLearner(
            with_adapters(base, rank=16, seed=lab.seed),
            pairs,
            partial(objective, beta=0.3, divergence=JENSEN_SHANNON_DOUBLE),
            PreferenceSettings(batch_size=4, updates=config.smollm2_updates, learning_rate=2e-4),
            seed=lab.seed,
        )
        row = learner.advance()
        found = {key: row[key] for key in CURVES} | {"pairs": float(len(pairs))}
        after = mean_score(learner.model, tokenizer, score, **sizes)
        return found | {"reward_before": before, "reward_after": after}

    return prefixed("smollm2", lab.compute("smollm2", study))


def run_own(config: Config, lab: Lab) -> dict[str, float]:
    """Train the user's model on the user's pairs."""
    found = train_on_file(
        lab,
        partial(objective, beta=config.beta, divergence=DIVERGENCES[config.divergence]),
        model=config.model,
        pairs=config.pairs,
        updates=config.own_updates,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        rank=config.lora_rank,
        max_tokens=config.max_tokens,
    )
    return prefixed("own", found)


def figures(result: dict[str, Any]) -> "dict[str, Figure]":
    """Loss and misplaced mass against beta."""
    if result["config"]["model"] or "pairs" not in result["config"]["parts"]:
        return {}
    return draw_figures(list(result["metrics"].values()), BETAS)
