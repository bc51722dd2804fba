"""f-DPG: which divergence should bring a policy to its target?

The target is the base model conditioned, or tilted, to what is wanted. Every divergence has its
minimum there; on the way they differ in how fast the samples satisfy and in how much of the target
they cover. Names are those of the paper: forward KL is KL(target || policy), reverse KL is
KL(policy || target).

exact       1024 sequences of five tokens, "token 3 at least three (or four) times": four
            divergences and plain REINFORCE, on samples; all measures by enumeration.
variance    the variance of each gradient at the start, against how rare the target is, by
            enumeration. All divergences then reward two values only, so that they differ in the
            size of the gradient, not in its noise relative to its size.
text        a word model of 20 Newsgroups and a tilt by a sentiment lexicon (VADER), with a second
            lexicon (AFINN) as the judge. To try, without claims: a rare word occurs; half of the
            samples hold a word that one in ten has.
smollm2     SmolLM2-135M with LoRA towards a tilt by the lexicon, a short run. Seed 0 only, without
            a claim.

Source: Go et al. (2023), Aligning Language Models with Preferences through f-divergence
Minimization, arXiv:2302.08215.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steelyard._checks import check_choice, check_count, check_range
from steelyard.divergences import (
    JENSEN_SHANNON_DOUBLE,
    KL,
    REVERSE_KL,
    TOTAL_VARIATION,
    FDivergence,
)
from steelyard.lab import Claim, Form, Lab, prefixed
from steelyard.lab.data import newsgroups, sentiment_lexicon
from steelyard.lab.pretrained import load_language_model
from steelyard.lab.real_models import question_prompts, with_adapters
from steelyard.lab.rlvr import RLVRLearner, RLVRSettings
from steelyard.lab.tiny_lm import Samples, completion_logprobs, sample
from steelyard.lab.words import (
    LexiconReward,
    WordText,
    distinct,
    lexicon_score,
    self_bleu,
    word_model,
    word_text,
)
from steelyard.preference import (
    exponential_log_target,
    fit_distributional_constraints,
    pointwise_log_target,
    rlhf_log_target,
)
from steelyard.recipes._f_dpg_learner import DPG, DPGLearner, Target, sampling_task
from steelyard.recipes._f_dpg_testbed import LENGTH, Exact, ExactLearner, gradient_noise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("exact", "variance", "text", "smollm2")
DIVERGENCES: dict[str, FDivergence] = {
    "forward-kl": REVERSE_KL,
    "js": JENSEN_SHANNON_DOUBLE,
    "tv": TOTAL_VARIATION,
    "reverse-kl": KL,
}
METHODS = (*DIVERGENCES, "reinforce")


@dataclass(frozen=True)
class Config:
    """What is run, and how large."""

    parts: tuple[str, ...] = ("exact", "variance")
    """Which of exact, variance, text, smollm2."""
    updates: int = 1000
    """Of the exact part."""
    batch_size: int = 64
    """Sequences an update of the exact part."""
    learning_rate: float = 0.03
    """Of the exact part."""
    text_methods: tuple[str, ...] = ("forward-kl", "js", "reverse-kl", "reinforce")
    """Which of forward-kl, js, tv, reverse-kl, reinforce."""
    text_targets: tuple[str, ...] = ("lexicon",)
    """Which of word, lexicon, moment."""
    text_updates: int = 60
    text_samples: int = 128
    """Samples an update on text."""
    text_learning_rate: float = 5e-4
    text_base_steps: int = 400
    """Training steps of the word model."""
    text_evaluation: int = 256
    """Samples of each final policy; eight times as many of the base model."""
    beta: float = 0.1
    """Strength of the leash that the lexicon target stands for."""
    smollm2_updates: int = 20
    """Of eight samples each."""

    def __post_init__(self) -> None:
        for name, known in (
            ("parts", PARTS),
            ("text_methods", METHODS),
            ("text_targets", ("word", "lexicon", "moment")),
        ):
            for value in getattr(self, name):
                check_choice(name, value, known)
        for name in ("updates", "text_updates", "text_base_steps", "smollm2_updates"):
            check_count(name, getattr(self, name))
        for name in ("batch_size", "text_samples", "text_evaluation"):
            check_count(name, getattr(self, name), at_least=2)
        for name in ("learning_rate", "text_learning_rate", "beta"):
            check_range(name, getattr(self, name), above=0.0)


QUICK = Form(Config(), seeds=5, minutes=1, threads=1)
FULL = Form(Config(parts=PARTS), seeds=5, minutes=8, threads=1)
CURVES = ("satisfied", "entropy", "forward_kl", "reward")
UNITS = {
    "step": "updates",
    "satisfied": "probability to satisfy",
    "entropy": "entropy of the policy (nats)",
    "forward_kl": "KL(target || policy) (nats)",
    "reward": "mean of what is wanted",
}

_PAPER = "Go et al. (2023), arXiv:2302.08215"


def _exact_claims() -> Iterator[Claim]:
    for target, words in (("common", "7 % target"), ("rare", "0.6 % target")):
        at = f"exact/{target}"
        for method in ("reverse-kl", "js"):
            yield Claim(
                f"Exact, {words}: {method} satisfies more often than forward KL",
                f"{_PAPER}, alignment",
                metric=f"{at}/{method}/satisfied",
                baseline=f"{at}/forward-kl/satisfied",
                direction="higher",
            )
        yield Claim(
            f"Exact, {words}: KL(target || policy) of reverse KL is more than twice that of "
            "forward KL (difference to twice)",
            f"{_PAPER}, coverage",
            metric=f"{at}/reverse-kl/forward_kl",
            baseline=f"{at}/forward-kl/twice_forward_kl",
            direction="higher",
        )
        yield Claim(
            f"Exact, {words}: reverse KL ends with less entropy than forward KL",
            f"{_PAPER}, diversity",
            metric=f"{at}/reverse-kl/entropy",
            baseline=f"{at}/forward-kl/entropy",
            direction="lower",
        )
        yield Claim(
            f"Exact, {words}: REINFORCE on the constraint covers less of the target than forward "
            "KL",
            "control: a reward without a target",
            metric=f"{at}/reinforce/forward_kl",
            baseline=f"{at}/forward-kl/forward_kl",
            direction="higher",
        )


def _start_and_text_claims() -> Iterator[Claim]:
    for low, high in (("tv", "js"), ("js", "forward-kl")):
        yield Claim(
            f"At the start and the rarest target the gradient of {high} has more variance than "
            f"that of {low}",
            f"{_PAPER}, Thm 1 and bounded rewards",
            metric=f"variance/rarest/{high}",
            baseline=f"variance/rarest/{low}",
            direction="higher",
            min_seeds=1,
        )
    yield Claim(
        "Relative to the size of the gradient, the noise at the start is the same for all "
        "(largest difference of signal-to-noise ratios)",
        "derived: the rewards have two values there",
        metric="variance/largest_snr_difference",
        baseline=1e-6,
        direction="lower",
        min_seeds=1,
    )
    at = "text/lexicon"
    for statement, source, key, winner, loser in (
        ("reverse KL ends with more reward", "alignment", "wanted", "reverse-kl", "forward-kl"),
        ("forward KL keeps more entropy", "diversity", "entropy", "forward-kl", "reverse-kl"),
        ("forward KL keeps more word pairs", "control", "distinct", "forward-kl", "reinforce"),
    ):
        yield Claim(
            f"Text, lexicon: {statement} than {loser}",
            f"{_PAPER}, {source}",
            metric=f"{at}/{winner}/{key}",
            baseline=f"{at}/{loser}/{key}",
            direction="higher",
        )


CLAIMS: tuple[Claim, ...] = (*_exact_claims(), *_start_and_text_claims())


def run(config: Config, lab: Lab) -> dict[str, float]:
    """Run the chosen parts for one seed."""
    parts = {
        "exact": run_exact,
        "variance": run_variance,
        "text": run_text,
        "smollm2": run_smollm2,
    }
    metrics: dict[str, float] = {}
    for part in config.parts:
        metrics |= parts[part](config, lab)
    return metrics


# ---- 1. Exact: 1024 sequences ----------------------------------------------------------------

# How often the marked token must occur, and how often it does so under the base.
TARGETS = {"common": (3, 0.07), "rare": (4, 0.006)}


def run_exact(config: Config, lab: Lab) -> dict[str, float]:
    """Train every method towards two targets from the same base."""
    metrics: dict[str, float] = {}
    for target, (least, z) in TARGETS.items():
        problem = Exact(least, lab.seed, z)
        metrics[f"exact/{target}/z"] = problem.log_z.exp().item()
        for method in METHODS:
            name = f"exact/{target}/{method}"
            make = partial(
                ExactLearner,
                problem,
                DIVERGENCES.get(method),
                updates=config.updates,
                batch_size=config.batch_size,
                learning_rate=config.learning_rate,
                seed=lab.seed,
            )
            final = lab.train(name, make, total=config.updates)[-1]
            metrics |= prefixed(name, {k: v for k, v in final.items() if k != "step"})
        metrics[f"exact/{target}/forward-kl/twice_forward_kl"] = (
            2 * metrics[f"exact/{target}/forward-kl/forward_kl"]
        )
    return metrics


# ---- 2. Variance of the gradient at the start ------------------------------------------------


def run_variance(config: Config, lab: Lab) -> dict[str, float]:
    """Variance of one sample's gradient with the best baseline, for targets ever rarer."""
    del config

    def study() -> dict[str, float]:
        metrics: dict[str, float] = {}
        differences = []
        for least in range(1, LENGTH):
            problem = Exact(least, lab.seed)
            names = ("forward-kl", "js", "tv")
            found = {name: gradient_noise(problem, DIVERGENCES[name]) for name in names}
            metrics[f"least={least}/z"] = problem.log_z.exp().item()
            for name, (variance, ratio) in found.items():
                metrics[f"least={least}/{name}"] = variance
                metrics[f"least={least}/{name}/snr"] = ratio
            ratios = [ratio for _, ratio in found.values()]
            differences.append((max(ratios) - min(ratios)) / max(ratios))
        rarest = {name: metrics[f"least={LENGTH - 1}/{name}"] for name in names}
        return metrics | prefixed("rarest", rarest) | {"largest_snr_difference": max(differences)}

    return prefixed("variance", lab.compute("variance", study))


# ---- 3. Text ---------------------------------------------------------------------------------

WORDS_DRAWN = 16
WANTED_SHARE = 0.5  # of samples with the feature of the moment target
RARE_SHARE, COMMON_SHARE = 0.01, 0.1  # of samples of the base with the word of a target


@dataclass(frozen=True)
class TextSetting:
    """A base model, its samples, and what the targets look at."""

    text: WordText
    base: Any
    drawn: Samples
    logprobs: Tensor
    """``[N]``, of the base's samples."""
    reward: LexiconReward
    judge: LexiconReward

    def word_near(self, share: float) -> int:
        """Return the word whose share of samples with it is nearest to ``share``."""
        counts = torch.zeros(len(self.text.tokenizer), dtype=torch.float64)
        for row in self.drawn.tokens:
            counts[row.unique()] += 1
        counts[:3] = -math.inf
        return int((counts / len(self.drawn.tokens) - share).abs().argmin())


def text_setting(config: Config, seed: int) -> TextSetting:
    """Train the word model and draw from it."""
    text = word_text(body for _, body in newsgroups("train"))
    base = word_model(text, seed=seed, steps=config.text_base_steps)
    drawn = draw(base, text, 8 * config.text_evaluation, torch.Generator().manual_seed(seed))
    return TextSetting(
        text,
        base,
        drawn,
        drawn.logprobs.sum(-1),
        LexiconReward(text, sentiment_lexicon("vader")),
        LexiconReward(text, sentiment_lexicon("afinn")),
    )


def draw(model: Any, text: WordText, count: int, generator: torch.Generator) -> Samples:
    """Draw texts from scratch."""
    ids, shown = text.prompts(count, generator)
    return sample(model, ids, shown, max_new_tokens=WORDS_DRAWN, generator=generator)


def text_target(name: str, setting: TextSetting, beta: float) -> Target:
    """Build one of the three targets."""
    if name == "lexicon":
        return Target(setting.reward, lambda base, r, floor: rlhf_log_target(base, r, beta))
    word = setting.word_near(RARE_SHARE if name == "word" else COMMON_SHARE)

    def holds(tokens: Tensor, mask: Tensor) -> Tensor:
        return ((tokens == word) & mask).any(-1).float()

    if name == "word":
        return Target(
            holds,
            lambda base, b, floor: pointwise_log_target(base, b, log_floor=floor),
        )
    feature = holds(setting.drawn.tokens, setting.drawn.mask)[:, None]
    coefficients = fit_distributional_constraints(feature, torch.tensor([WANTED_SHARE]))
    return Target(
        holds,
        lambda base, phi, floor: exponential_log_target(base, phi[:, None], coefficients),
    )


def run_text(config: Config, lab: Lab) -> dict[str, float]:
    """Train every method towards every target from one word model."""

    @cache
    def setting() -> TextSetting:
        return text_setting(config, lab.seed)

    def make(target_name: str, method: str) -> DPGLearner:
        found = setting()
        target = text_target(target_name, found, config.beta)

        def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
            del prompts
            ids = [found.text.tokenizer(text)["input_ids"] or [0] for text in completions]
            rows = [torch.tensor([line]) for line in ids]
            return [
                target.wanted(row, torch.ones_like(row, dtype=torch.bool)).item() for row in rows
            ]

        first = found.text.tokenizer.bos_token
        task = sampling_task(target_name, [first], reward, WORDS_DRAWN)
        return DPGLearner(
            copy.deepcopy(found.base),
            found.text.tokenizer,
            task,
            DPG(found.base, target, DIVERGENCES.get(method)),
            RLVRSettings(
                prompts=1, samples=config.text_samples, learning_rate=config.text_learning_rate
            ),
            seed=lab.seed,
            total=config.text_updates,
            last=partial(text_measures, config, found, target, lab.seed),
        )

    metrics: dict[str, float] = {}
    for target in config.text_targets:
        for method in config.text_methods:
            name = f"text/{target}/{method}"
            rows = lab.train(name, partial(make, target, method), total=config.text_updates)
            final = {k.removeprefix("final/"): v for k, v in rows[-1].items() if "final/" in k}
            metrics |= prefixed(name, final)
    return metrics


@torch.no_grad()
def text_measures(
    config: Config, setting: TextSetting, target: Target, seed: int, model: Any
) -> dict[str, float]:
    """Alignment, coverage and diversity of a policy, from samples of it and of the base."""
    generator = torch.Generator().manual_seed(seed + 1)
    drawn = draw(model, setting.text, config.text_evaluation, generator)
    prompts = setting.text.prompts(len(drawn.tokens), generator)
    base = completion_logprobs(setting.base, *prompts, drawn.tokens, drawn.mask).sum(-1)
    own = drawn.logprobs.sum(-1)
    # KL(target || policy) on the samples of the base, weighted to be samples of the target.
    wanted = target.wanted(setting.drawn.tokens, setting.drawn.mask)
    weight = (target.scores(setting.logprobs, wanted, -math.inf) - setting.logprobs).softmax(0)
    used = weight > 0
    prompts = setting.text.prompts(int(used.sum()), generator)
    policy = completion_logprobs(
        model, *prompts, setting.drawn.tokens[used], setting.drawn.mask[used]
    ).sum(-1)
    log_p = setting.logprobs[used] + (weight[used] * len(weight)).log()
    return {
        "final/wanted": target.wanted(drawn.tokens, drawn.mask).mean().item(),
        "final/judge": setting.judge(drawn.tokens, drawn.mask).mean().item(),
        "final/kl_to_base": (own - base).mean().item(),
        "final/forward_kl": (weight[used] * (log_p - policy)).sum().item(),
        "final/effective_samples": (1 / weight.square().sum()).item(),
        "final/entropy": -own.mean().item(),
        "final/distinct": distinct(drawn.tokens, drawn.mask),
        "final/self_bleu": self_bleu(drawn.tokens, drawn.mask),
    }


# ---- 4. A model with a past ------------------------------------------------------------------


def run_smollm2(config: Config, lab: Lab) -> dict[str, float]:
    """Bring SmolLM2 towards a tilt by the lexicon, with LoRA."""
    if lab.seed != 0:
        return {}

    def study() -> dict[str, float]:
        base, tokenizer = load_language_model("smollm2")
        model = with_adapters(copy.deepcopy(base), rank=16, seed=lab.seed)
        lexicon = sentiment_lexicon("vader")

        def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
            del prompts
            return [lexicon_score(text, lexicon) for text in completions]

        chats = question_prompts(tokenizer)
        target = Target(
            lambda tokens, mask: tokens.new_zeros(len(tokens)),
            lambda score, r, floor: rlhf_log_target(score, r, config.beta),
        )
        learner = RLVRLearner(
            model,
            tokenizer,
            sampling_task("lexicon", chats[:1], reward, max_new_tokens=16),
            DPG(base, target, JENSEN_SHANNON_DOUBLE),
            RLVRSettings(prompts=1, samples=8, learning_rate=2e-4),
            seed=lab.seed,
        )
        rows = [learner.advance() for _ in range(config.smollm2_updates)]
        third = max(1, len(rows) // 3)
        return {
            f"{key}_{when}": sum(row[key] for row in part) / third
            for key in ("reward", "entropy")
            for when, part in (("first", rows[:third]), ("last", rows[-third:]))
        }

    return prefixed("smollm2", lab.compute("smollm2", study))


def figures(result: dict[str, Any]) -> "dict[str, Figure]":
    """Variance of each gradient against how rare the target is."""
    from steelyard.lab.plots import draw_against

    if "variance" not in result["config"]["parts"]:
        return {}
    seeds = list(result["metrics"].values())
    panels = {
        ("at the start", label): {
            name: {
                float(least): [
                    math.log10(values[f"variance/least={least}/{name}{key}"]) for values in seeds
                ]
                for least in range(1, LENGTH)
            }
            for name in ("forward-kl", "js", "tv")
        }
        for key, label in (
            ("", "log10 variance of the gradient"),
            ("/snr", "log10 signal to noise"),
        )
    }
    title = "Rare targets: the rewards differ in size, not in how much they tell"
    return {"variance": draw_against(panels, "times the token must occur", title)}
