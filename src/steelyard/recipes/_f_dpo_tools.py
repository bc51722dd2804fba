"""Beside the experiment of ``f-dpo``: the setting and measures on text, and the figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steelyard.divergences import FDivergence
from steelyard.lab.data import newsgroups, sentiment_lexicon
from steelyard.lab.preferences import Pairs, cost_at_level, draw_pairs, score_pairs
from steelyard.lab.tiny_lm import Samples, completion_logprobs, sample
from steelyard.lab.words import (
    LexiconReward,
    WordText,
    distinct,
    self_bleu,
    word_model,
    word_text,
)
from steelyard.preference import implicit_reward, preference_calibration_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROMPT_WORDS, WORDS_DRAWN, TEXT_SCALE = 4, 12, 8.0
LEVEL = 0.6  # of the way from the reference to the reward that every divergence reaches


@dataclass(frozen=True)
class TextSetting:
    """A reference, pairs, and what is needed to look at a policy."""

    text: WordText
    reference: Any
    train: Pairs
    held_out: Pairs
    samples: tuple[Tensor, Tensor, Samples]
    """Prompts, their mask, and the reference's responses."""
    reward: LexiconReward
    judge: LexiconReward


def text_setting(seed: int, *, pairs: int, base_steps: int, evaluation: int) -> TextSetting:
    """Train the word model; raters compare two of its responses by the lexicon."""
    generator = torch.Generator().manual_seed(seed)
    text = word_text(body for _, body in newsgroups("train"))
    model = word_model(text, seed=seed, steps=base_steps)
    reward = LexiconReward(text, sentiment_lexicon("vader"))

    def compared(count: int) -> Pairs:
        return draw_pairs(
            model,
            *text.prompts(count, generator, length=PROMPT_WORDS),
            reward,
            max_new_tokens=WORDS_DRAWN,
            generator=generator,
            scale=TEXT_SCALE,
        )

    train, held_out = compared(pairs), compared(evaluation)
    prompts = text.prompts(evaluation, generator, length=PROMPT_WORDS)
    drawn = sample(model, *prompts, max_new_tokens=WORDS_DRAWN, generator=generator)
    judge = LexiconReward(text, sentiment_lexicon("afinn"))
    return TextSetting(text, model, train, held_out, (*prompts, drawn), reward, judge)


def compare_curves(
    curves: dict[str, list[dict[str, float]]], start: dict[str, float]
) -> dict[str, float]:
    """Coverage of each divergence at one reward that all of them reach, and their best rewards."""
    best = {name: max(rows, key=lambda row: row["reward"]) for name, rows in curves.items()}
    reached = min(row["reward"] for row in best.values())
    level = start["reward"] + LEVEL * (reached - start["reward"])
    metrics = {"level": level}
    for name, rows in curves.items():
        points = [(row["reward"], row["forward_kl"]) for row in rows]
        points.append((start["reward"], 0.0))
        metrics[f"{name}/coverage_at_level"] = cost_at_level(points, level)
        metrics[f"{name}/best_reward"] = best[name]["reward"]
        metrics[f"{name}/judge_gain"] = best[name]["judge"] - start["judge"]
        metrics[f"{name}/best_entropy"] = best[name]["entropy"]
    return metrics


def reference_measures(setting: TextSetting) -> dict[str, float]:
    """Reward, judge and diversity of the reference."""
    drawn = setting.samples[2]
    return {
        "reward": setting.reward(drawn.tokens, drawn.mask).mean().item(),
        "judge": setting.judge(drawn.tokens, drawn.mask).mean().item(),
        "entropy": -drawn.logprobs.sum(-1).mean().item(),
        "distinct": distinct(drawn.tokens, drawn.mask),
        "self_bleu": self_bleu(drawn.tokens, drawn.mask),
    }


@torch.no_grad()
def text_measures(
    setting: TextSetting, model: Any, divergence: FDivergence, beta: float, seed: int
) -> dict[str, float]:
    """Reward, coverage and diversity of a policy, and how it judges held-out pairs."""
    generator = torch.Generator().manual_seed(seed + 1)
    ids, shown, theirs = setting.samples
    drawn = sample(model, ids, shown, max_new_tokens=WORDS_DRAWN, generator=generator)
    base = completion_logprobs(setting.reference, ids, shown, drawn.tokens, drawn.mask)
    covered = completion_logprobs(model, ids, shown, theirs.tokens, theirs.mask)
    policy, reference = (score_pairs(m, setting.held_out) for m in (model, setting.reference))
    chosen, rejected = (
        implicit_reward(p - r, beta=beta, divergence=divergence)
        for p, r in zip(policy, reference, strict=True)
    )
    own = drawn.logprobs.sum(-1)
    return {
        "final/reward": setting.reward(drawn.tokens, drawn.mask).mean().item(),
        "final/judge": setting.judge(drawn.tokens, drawn.mask).mean().item(),
        "final/forward_kl": (theirs.logprobs.sum(-1) - covered.sum(-1)).mean().item(),
        "final/reverse_kl": (own - base.sum(-1)).mean().item(),
        "final/entropy": -own.mean().item(),
        "final/distinct": distinct(drawn.tokens, drawn.mask),
        "final/self_bleu": self_bleu(drawn.tokens, drawn.mask),
        "final/pair_accuracy": (chosen > rejected).double().mean().item(),
        "final/calibration_error": preference_calibration_error(chosen - rejected).item(),
        "final/chosen_change": (policy.chosen - reference.chosen).mean().item(),
    }


def draw_figures(seeds: list[dict[str, float]], betas: Sequence[float]) -> "dict[str, Figure]":
    """Draw loss and reward of the part on pairs against beta."""
    from steelyard.lab.line_plots import draw_lines

    def drawn(key: str, label: str, title: str) -> "Figure":
        lines = {
            name: {
                beta: [seed[f"pairs/{name} beta={beta}/{key}"] for seed in seeds] for beta in betas
            }
            for name in ("reverse-kl", "forward-kl", "jsd")
        }
        return draw_lines({"3000 pairs of 64 items": lines}, "beta", label, title)

    return {
        "pairs": drawn("reward", "expected reward", "With JSD the mass can go anywhere"),
        "pairs-loss": drawn(
            "loss", "loss (nats)", "The loss of JSD does not say where the mass went"
        ),
    }
