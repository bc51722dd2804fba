"""Ranking accuracy: does preference learning teach a model to rank?

A policy ranks a pair right if it gives the preferred response the higher probability. What trainers
log as accuracy is something else: whether the preferred response gained more than the other one.

exact       a softmax over 50 responses: the loss at which a pair flips, the best accuracy that a
            perfect optimum reaches, and the failure of IPO beyond its margin.
tokens      a small transformer as reference, pairs of its own samples with a known Bradley-Terry
            reward (how often a rare symbol occurs), so that the share of raters is exact; DPO, and
            DPO with the weight gamma of the reference changed.
text        a word model of 20 Newsgroups; a sentiment lexicon is the reward and four simulated
            raters choose. Also the win rate of samples against those of the reference, and the
            distance that the weights travelled. Reported without a claim.

Source: Chen et al. (2024), Preference Learning Algorithms Do Not Learn Preference Rankings,
arXiv:2405.19534.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steelyard._checks import check_choice, check_count, check_range
from steelyard.lab import Claim, Form, Lab, prefixed
from steelyard.lab.data import newsgroups, sentiment_lexicon
from steelyard.lab.preferences import (
    PairBatch,
    Pairs,
    PairScores,
    PreferenceLearner,
    PreferenceSettings,
    draw_pairs,
    score_pairs,
    vote,
)
from steelyard.lab.tiny_lm import pretrain, sample, tiny_lm, tiny_tokenizer
from steelyard.lab.words import LexiconReward, WordText, word_model, word_text
from steelyard.preference import (
    dpo_gamma_loss,
    idealized_log_ratio,
    idealized_ranking_accuracy,
    ipo_flip_threshold,
    ranking_accuracy,
)
from steelyard.recipes._ranking_accuracy_tools import (
    GAMMAS,
    broken_thresholds,
    ceiling_metrics,
    distance,
    draw_figures,
    minimise,
    rank_metrics,
    raters_loss,
    summarise,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("exact", "tokens", "text")


@dataclass(frozen=True)
class Config:
    """What is run, and how large."""

    parts: tuple[str, ...] = ("exact", "tokens")
    """Which of exact, tokens, text."""
    beta: float = 0.1
    pairs: int = 2000
    """Pairs to learn from."""
    held_out: int = 1000
    """Pairs that are only looked at."""
    updates: int = 200
    """Of DPO, with 64 pairs each."""
    learning_rate: float = 3e-4
    base_steps: int = 600
    """Training steps of the reference."""
    text_updates: int = 200
    """Of DPO on text."""
    text_base_steps: int = 600
    """Training steps of the reference on text."""

    def __post_init__(self) -> None:
        for part in self.parts:
            check_choice("parts", part, PARTS)
        for name in ("updates", "text_updates"):
            check_count(name, getattr(self, name), at_least=10)
        for name in ("pairs", "held_out", "base_steps", "text_base_steps"):
            check_count(name, getattr(self, name))
        check_range("learning_rate", self.learning_rate, above=0.0)
        check_range("beta", self.beta, above=0.0)


QUICK = Form(Config(), seeds=3, minutes=2, threads=1)
FULL = Form(Config(parts=PARTS), seeds=5, minutes=6, threads=1)
CURVES = ("held_out_loss", "ranking_accuracy", "reward_accuracy", "distance")
UNITS = {
    "step": "updates",
    "held_out_loss": "loss on held-out pairs (nats)",
    "ranking_accuracy": "share of pairs ranked right",
    "reward_accuracy": "share of pairs with a positive margin",
    "distance": "distance of the weights from the reference",
}

_PAPER = "Chen et al. (2024), arXiv:2405.19534"
_DPO = "tokens/gamma=1.0"

# What must be (almost) nothing: statement, source, metric, most.
_EXACT = (
    (
        "Softmax over 50 responses: a pair is ranked right exactly where its loss is below its "
        "threshold (pairs that break it)",
        "Thm 4.1",
        "exact/violations",
        0.0,
    ),
    (
        "The minimum of the loss weighted by raters has the log ratios of the closed form (largest "
        "difference, nats)",
        "Thm 3.1",
        "exact/largest_error",
        1e-4,
    ),
    (
        "Trained to loss 0 by IPO, exactly the pairs are wrong that the reference has wrong by "
        "more than 1/(2 tau) (pairs that break it)",
        "Prop. A.7",
        "exact/ipo_violations",
        0.0,
    ),
    (
        "Transformer: no pair at any time of the training breaks the threshold",
        "Thm 4.1",
        "tokens/violations",
        0.0,
    ),
)

CLAIMS: tuple[Claim, ...] = (
    *(
        Claim(words, f"{_PAPER}, {where}", metric, most, direction="lower", min_seeds=1)
        for words, where, metric, most in _EXACT
    ),
    Claim(
        "Of the pairs that the reference has most wrong, a quarter, less than a fifth as many flip "
        "as of the quarter that it has least wrong",
        f"{_PAPER}, Sec. 4",
        metric=f"{_DPO}/flip_ratio",
        baseline=0.2,
        direction="lower",
    ),
    Claim(
        "At the lowest held-out loss, reward accuracy is at least 20 points above ranking accuracy",
        f"{_PAPER}, Remark 2.5",
        metric=f"{_DPO}/reward_accuracy",
        baseline=f"{_DPO}/ranking_accuracy",
        direction="higher",
        margin=0.2,
    ),
    Claim(
        "The ceiling for this reference and this beta is above the ranking accuracy reached",
        f"{_PAPER}, alignment gap",
        metric="tokens/ceiling",
        baseline=f"{_DPO}/ranking_accuracy",
        direction="higher",
    ),
    Claim(
        "Without the reference in the loss (gamma 0) the ranking accuracy ends higher than with "
        "DPO (gamma 1)",
        f"{_PAPER}, Eq. 4",
        metric="tokens/gamma=0.0/final_ranking_accuracy",
        baseline=f"{_DPO}/final_ranking_accuracy",
        direction="higher",
    ),
    Claim(
        "With twice the reference (gamma 2) it ends lower than with DPO",
        f"{_PAPER}, Eq. 4",
        metric="tokens/gamma=2.0/final_ranking_accuracy",
        baseline=f"{_DPO}/final_ranking_accuracy",
        direction="lower",
    ),
    Claim(
        "Without the reference in the loss the policy ends further from it, in nats a response",
        f"{_PAPER}, Eq. 4",
        metric="tokens/gamma=0.0/final_shift",
        baseline=f"{_DPO}/final_shift",
        direction="higher",
    ),
)


def run(config: Config, lab: Lab) -> dict[str, float]:
    """Run the chosen parts for one seed."""
    parts = {"exact": run_exact, "tokens": run_tokens, "text": run_text}
    metrics: dict[str, float] = {}
    for part in config.parts:
        metrics |= parts[part](config, lab)
    return metrics


# ---- 1. Exact: 50 responses ------------------------------------------------------------------

RESPONSES, TAU = 50, 0.1


def run_exact(config: Config, lab: Lab) -> dict[str, float]:
    """Fit a softmax to all pairs weighted by their raters; check every statement on the way."""

    def study() -> dict[str, float]:
        generator = torch.Generator().manual_seed(lab.seed)
        ref = 3 * torch.randn(RESPONSES, dtype=torch.float64, generator=generator)
        rewards = torch.randn(RESPONSES, dtype=torch.float64, generator=generator)
        better, worse = (rewards[:, None] > rewards).nonzero().unbind(1)
        share = (rewards[better] - rewards[worse]).sigmoid()
        ref_scores = ref.log_softmax(0)
        logits, violations = fit_softmax(ref, better, worse, share, config.beta)
        ref_ratio = ref_scores[better] - ref_scores[worse]
        found = logits[better] - logits[worse]
        expected = idealized_log_ratio(ref_ratio, share, config.beta)
        ideal = idealized_ranking_accuracy(ref_ratio, share, (config.beta,)).per_beta[0]
        return {
            "violations": float(violations),
            "largest_error": (found - expected).abs().max().item(),
            "ranking_accuracy": ranking_accuracy(logits[better], logits[worse]).item(),
            "ceiling": ideal.item(),
            **ipo_on_a_chain(ref, rewards, generator),
        }

    return prefixed("exact", lab.compute("exact", study))


def fit_softmax(
    ref: Tensor, better: Tensor, worse: Tensor, share: Tensor, beta: float
) -> tuple[Tensor, int]:
    """Minimise the DPO loss that the raters of every pair give; count broken thresholds."""
    reference = pair_scores(ref, better, worse)
    violations = 0

    def loss(logits: Tensor) -> Tensor:
        return raters_loss(pair_scores(logits, better, worse), reference, share, beta)

    def watch(logits: Tensor) -> None:
        nonlocal violations
        violations += broken_thresholds(pair_scores(logits, better, worse), reference, beta)

    return minimise(loss, ref, watch), violations


def pair_scores(logits: Tensor, better: Tensor, worse: Tensor) -> PairScores:
    """Log-probabilities of pairs of responses under a softmax."""
    scores = logits.log_softmax(0)
    return PairScores(scores[better], scores[worse])


def ipo_on_a_chain(ref: Tensor, rewards: Tensor, generator: torch.Generator) -> dict[str, float]:
    """Train by IPO on pairs along a chain of all responses, where loss 0 can be reached."""
    order = torch.randperm(RESPONSES, generator=generator)
    one, two = order[:-1], order[1:]
    better = torch.where(rewards[one] > rewards[two], one, two)
    worse = one + two - better
    reference = pair_scores(ref, better, worse)

    def losses(logits: Tensor) -> Tensor:
        policy = pair_scores(logits, better, worse)
        ratio = policy.chosen - policy.rejected - (reference.chosen - reference.rejected)
        return (ratio - 1 / (2 * TAU)).square()

    logits = minimise(lambda values: losses(values).mean(), ref, lambda values: None)
    right = ranking_accuracy(*pair_scores(logits, better, worse), reduction="none") == 1
    reachable = ipo_flip_threshold(reference.chosen - reference.rejected, TAU) >= 0
    return {
        "ipo_loss": losses(logits).max().item(),
        "ipo_violations": float((reachable != right).sum()),
        "ipo_wrong": 1 - right.double().mean().item(),
    }


# ---- 2. Tokens: a transformer that is its own rater's source ----------------------------------

SYMBOLS, SHORTEST, LONGEST, RARE, SCALE = 12, 8, 20, 0, 0.5


@dataclass(frozen=True)
class Setting:
    """A reference and pairs."""

    reference: Any
    train: Pairs
    held_out: Pairs


def run_tokens(config: Config, lab: Lab) -> dict[str, float]:
    """DPO with four weights of the reference on pairs whose raters are known exactly."""

    @cache
    def setting() -> Setting:
        return token_setting(config, lab.seed)

    metrics: dict[str, float] = {}
    for gamma in GAMMAS:
        name = f"tokens/gamma={gamma}"
        rows = train(config, lab, name, setting, gamma, config.updates)
        metrics |= prefixed(name, summarise(rows))
    metrics["tokens/violations"] = sum(metrics[f"tokens/gamma={g}/violations"] for g in GAMMAS)
    ceilings = lab.compute("tokens/ceilings", lambda: held_out_ceilings(config, setting()))
    return metrics | prefixed("tokens", ceilings)


def token_setting(config: Config, seed: int) -> Setting:
    """Train a reference on a Markov chain; pairs are its samples, and a rare symbol is liked."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer = tiny_tokenizer([f"s{number}" for number in range(SYMBOLS)])
    model = tiny_lm(tokenizer, hidden_size=48, seed=seed)
    tokens, mask = markov_chains(8192, generator)
    first = torch.full((len(tokens), 1), tokenizer.bos_token_id)
    pretrain(
        model,
        first,
        torch.ones_like(first, dtype=torch.bool),
        tokens,
        mask,
        steps=config.base_steps,
        batch_size=64,
        lr=3e-3,
        generator=generator,
    )
    liked = tokenizer.convert_tokens_to_ids(f"s{RARE}")

    def reward(tokens: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = (tokens == liked) & mask
        return found.sum(-1).double()

    def pairs(count: int, *, noisy: bool) -> Pairs:
        ids = torch.full((2 * count, 1), tokenizer.bos_token_id)
        found = draw_pairs(
            model,
            ids,
            torch.ones_like(ids, dtype=torch.bool),
            reward,
            max_new_tokens=LONGEST + 1,
            generator=generator,
            scale=SCALE,
            noisy=noisy,
        )
        return found[slice(count)]

    return Setting(model, pairs(config.pairs, noisy=True), pairs(config.held_out, noisy=False))


def markov_chains(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences of symbols ``[N, T]`` with an end, and their mask; one symbol is rare."""
    weights = torch.empty(SYMBOLS, SYMBOLS).exponential_(generator=generator) ** 2
    weights[:, RARE] = 0.04 * weights.sum(-1)
    chain = weights / weights.sum(-1, keepdim=True)
    state = torch.randint(SYMBOLS, (count,), generator=generator)
    drawn = [state]
    for _ in range(LONGEST - 1):
        state = torch.multinomial(chain[state], 1, generator=generator).squeeze(1)
        drawn.append(state)
    special = 3  # symbols come after the padding, first and end tokens
    tokens = torch.stack([*drawn, state], dim=1) + special
    lengths = torch.randint(SHORTEST, LONGEST + 1, (count,), generator=generator)
    place = torch.arange(LONGEST + 1)
    tokens[place == lengths[:, None]] = 2
    return tokens, place <= lengths[:, None]


def train(
    config: Config,
    lab: Lab,
    name: str,
    setting: Callable[[], Setting],
    gamma: float,
    updates: int,
    probe: "Callable[[Any], Mapping[str, float]] | None" = None,
) -> list[dict[str, float]]:
    """Train on the pairs; every tenth of the way say how the held-out pairs are ranked."""

    def make() -> PreferenceLearner:
        start, held_out = setting().reference, setting().held_out
        reference = score_pairs(start, held_out)

        def look(model: Any, step: int) -> dict[str, float]:
            del step
            row = rank_metrics(model, held_out, reference, config.beta, gamma)
            row["distance"] = distance(model, start)
            return row | dict(probe(model) if probe is not None else {})

        return PreferenceLearner(
            copy.deepcopy(start),
            setting().train,
            partial(gamma_objective, beta=config.beta, gamma=gamma),
            PreferenceSettings(updates=updates // 10, learning_rate=config.learning_rate),
            seed=lab.seed,
            probe=look,
        )

    return lab.train(name, make, total=updates)


def held_out_ceilings(config: Config, setting: Setting) -> dict[str, float]:
    """What the reference alone says of the held-out pairs."""
    return ceiling_metrics(setting.reference, setting.held_out, config.beta)


def gamma_objective(batch: PairBatch, *, beta: float, gamma: float) -> Tensor:
    """DPO with a weight on the reference."""
    chosen, rejected = batch
    return dpo_gamma_loss(
        chosen.logprobs.sum(-1),
        rejected.logprobs.sum(-1),
        chosen.ref_logprobs.sum(-1),
        rejected.ref_logprobs.sum(-1),
        beta=beta,
        gamma=gamma,
    )


# ---- 3. Text: raters with a lexicon ----------------------------------------------------------

PROMPT_WORDS, WORDS_DRAWN, RATERS, TEXT_SCALE = 4, 12, 4, 4.0


def run_text(config: Config, lab: Lab) -> dict[str, float]:
    """DPO on the votes of four raters; ranking accuracy and win rate along the way."""

    @cache
    def made() -> tuple[Setting, WordText, LexiconReward]:
        return text_setting(config, lab.seed)

    def win_rate(model: Any) -> dict[str, float]:
        setting, text, reward = made()
        prompts = text.prompts(
            512, torch.Generator().manual_seed(lab.seed + 1), length=PROMPT_WORDS
        )

        def rewards(of: Any, shift: int) -> Tensor:
            generator = torch.Generator().manual_seed(lab.seed + shift)
            drawn = sample(of, *prompts, max_new_tokens=WORDS_DRAWN, generator=generator)
            return reward(drawn.tokens, drawn.mask)

        gap = rewards(model, 2) - rewards(setting.reference, 3)
        return {"win_rate": ((gap.sign() + 1) / 2).mean().item()}  # a tie is half a win

    rows = train(config, lab, "text/dpo", lambda: made()[0], 1.0, config.text_updates, win_rate)
    metrics = prefixed("text/dpo", summarise(rows))
    for number, row in enumerate(rows):
        for key in ("ranking_accuracy", "win_rate", "distance"):
            metrics[f"text/dpo/row={number}/{key}"] = row[key]
    ceilings = lab.compute("text/ceilings", lambda: held_out_ceilings(config, made()[0]))
    return metrics | prefixed("text", ceilings)


def text_setting(config: Config, seed: int) -> tuple[Setting, WordText, LexiconReward]:
    """Train a word model; four raters vote on pairs of its continuations, ties are left out."""
    generator = torch.Generator().manual_seed(seed)
    text = word_text(body for _, body in newsgroups("train"))
    model = word_model(text, seed=seed, steps=config.text_base_steps)
    reward = LexiconReward(text, sentiment_lexicon("vader"))

    def pairs(count: int) -> Pairs:
        found = draw_pairs(
            model,
            *text.prompts(2 * count, generator, length=PROMPT_WORDS),
            reward,
            max_new_tokens=WORDS_DRAWN,
            generator=generator,
            scale=TEXT_SCALE,
            noisy=False,
        )
        return vote(found, RATERS, generator)[slice(count)]

    return Setting(model, pairs(config.pairs), pairs(config.held_out)), text, reward


def figures(result: dict[str, Any]) -> "dict[str, Figure]":
    """How many pairs flip, by how wrong the reference has them; accuracies against gamma."""
    if "tokens" not in result["config"]["parts"]:
        return {}
    return draw_figures(list(result["metrics"].values()))
