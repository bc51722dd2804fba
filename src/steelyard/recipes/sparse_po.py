"""SparsePO: does weighing tokens keep the policy near its reference where it does not matter?

A preference may depend on few tokens. DPO moves all of them; a mask on the states that matter
leaves the others alone. An oracle knows these states and is the ceiling; learned masks approach it
in part, and nothing is claimed of them beyond finding the states.

exact       1024 sequences of five tokens under a table of logits; the reward looks at one position.
            DPO, TDPO1, TDPO2, a random mask, the oracle, the oracle's mask at a wrong position, and
            SparsePO with common and independent masks. Divergences by enumeration, split by
            position; also at the lowest loss on held-out pairs.
text        a word model of 20 Newsgroups in which a cue announces every word of a sentiment
            lexicon (VADER), so that the states that matter can be told from their prefix. The same
            methods and MaPO at two betas.

Source: Christopoulou et al. (2024), SparsePO: Controlling Preference Alignment of LLMs via Sparse
Token Masks, arXiv:2410.05102.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steelyard._checks import check_choice, check_count, check_range
from steelyard.lab import Claim, Form, Lab, prefixed
from steelyard.lab.data import newsgroups, sentiment_lexicon
from steelyard.lab.preferences import (
    Pairs,
    PreferenceLearner,
    PreferenceSettings,
    Responses,
    cost_at_level,
    draw_pairs,
    next_token_laws,
    score_pairs,
)
from steelyard.lab.tiny_lm import Samples, sample
from steelyard.lab.words import LexiconReward, WordText, word_model, word_text
from steelyard.preference import mask_sparsity
from steelyard.recipes._sparse_po_testbed import (
    LENGTH,
    PLACE,
    WRONG_PLACE,
    Problem,
    TokenWeighted,
    area_under_curve,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("exact", "text")
BETAS = (0.3, 1.0)
TEXT_BETAS = (0.3, 0.8)
METHODS = (
    *("dpo", "tdpo1", "tdpo2", "random", "oracle", "misplaced"),
    *("common l1=0.0", "common l1=0.01", "common l1=0.03", "independent l1=0.01"),
)
TEXT_METHODS = (
    *("dpo", "tdpo1", "tdpo2", "mapo", "random", "oracle"),
    *("common l1=0.0", "common l1=0.003", "independent l1=0.003"),
)


@dataclass(frozen=True)
class Config:
    """What is run, and how large."""

    parts: tuple[str, ...] = ("exact",)
    """Which of exact, text."""
    updates: int = 300
    """Of the exact part, on all pairs."""
    pairs: int = 300
    """Of the exact part, and as many held out."""
    learning_rate: float = 0.03
    """Of the exact part, policy and masks."""
    text_methods: tuple[str, ...] = (
        *("dpo", "tdpo1", "mapo", "random"),
        *("oracle", "common l1=0.003"),
    )
    text_pairs: int = 3200
    text_updates: int = 50
    """Of 64 pairs each: about one pass."""
    text_learning_rate: float = 5e-4
    text_base_steps: int = 500
    """Training steps of the word model."""
    text_evaluation: int = 256
    """Samples of each final policy, and held-out pairs."""

    def __post_init__(self) -> None:
        for part in self.parts:
            check_choice("parts", part, PARTS)
        for method in self.text_methods:
            check_choice("text_methods", method, TEXT_METHODS)
        for name in ("updates", "pairs", "text_pairs", "text_updates", "text_base_steps"):
            check_count(name, getattr(self, name))
        check_count("text_evaluation", self.text_evaluation, at_least=2)
        check_range("learning_rate", self.learning_rate, above=0.0)
        check_range("text_learning_rate", self.text_learning_rate, above=0.0)


QUICK = Form(Config(), seeds=5, minutes=1, threads=1)
FULL = Form(Config(parts=PARTS), seeds=5, minutes=6, threads=1)
CURVES = ("loss", "accuracy", "chosen_change", "rejected_change")
UNITS = {
    "step": "updates",
    "loss": "loss of the batches (nats)",
    "accuracy": "share of pairs with a positive log ratio",
    "chosen_change": "log ratio of chosen responses (nats)",
    "rejected_change": "log ratio of rejected responses (nats)",
}

_PAPER = "Christopoulou et al. (2024), arXiv:2410.05102"


def _exact_claims() -> Iterator[Claim]:
    for beta in BETAS:
        at = f"exact/beta={beta}"
        yield Claim(
            f"Exact, beta {beta}: DPO spends at least three quarters of its divergence on "
            "positions that do not matter",
            f"{_PAPER}, motivation",
            metric=f"{at}/dpo/wasted_share",
            baseline=0.75,
            direction="higher",
        )
        yield Claim(
            f"Exact, beta {beta}: with the oracle mask nothing is spent there",
            f"{_PAPER}, Eq. 8",
            metric=f"{at}/oracle/wasted",
            baseline=1e-9,
            direction="lower",
            min_seeds=1,
        )
        yield Claim(
            f"Exact, beta {beta}: and its reward is at most 0.2 below that of DPO (from -2 to 2)",
            f"{_PAPER}, frontier",
            metric=f"{at}/oracle/reward",
            baseline=f"{at}/dpo/reward",
            direction="higher",
            margin=-0.2,
        )
        yield Claim(
            f"Exact, beta {beta}: it pays less than half of DPO's divergence",
            f"{_PAPER}, frontier",
            metric=f"{at}/oracle/kl",
            baseline=f"{at}/dpo/half_kl",
            direction="lower",
        )
        yield Claim(
            f"Exact, beta {beta}: control, the same mask at a wrong position earns less than "
            "at the right one",
            "control",
            metric=f"{at}/misplaced/reward",
            baseline=f"{at}/oracle/reward",
            direction="lower",
        )


def _text_claims() -> Iterator[Claim]:
    yield Claim(
        "Text, beta 0.3: the oracle spends a smaller share of its divergence on states that do not "
        "matter than DPO",
        f"{_PAPER}, motivation",
        metric="text/oracle beta=0.3/wasted_share",
        baseline="text/dpo beta=0.3/wasted_share",
        direction="lower",
    )
    yield Claim(
        "Text, at equal reward: the oracle spends less there than DPO, in nats",
        f"{_PAPER}, frontier",
        metric="text/oracle/wasted_at_level",
        baseline="text/dpo/wasted_at_level",
        direction="lower",
    )
    yield Claim(
        "Text, beta 0.3: a learned common mask with L1 weighs the states that matter above others "
        "(area under the curve above 1/2)",
        f"{_PAPER}, learned masks",
        metric="text/common l1=0.003 beta=0.3/mask_auc",
        baseline=0.5,
        direction="higher",
    )


CLAIMS: tuple[Claim, ...] = (*_exact_claims(), *_text_claims())


def run(config: Config, lab: Lab) -> dict[str, float]:
    """Run the chosen parts for one seed."""
    parts = {"exact": run_exact, "text": run_text}
    metrics: dict[str, float] = {}
    for part in config.parts:
        metrics |= parts[part](config, lab)
    return metrics


# ---- 1. Exact: one position matters ----------------------------------------------------------


def run_exact(config: Config, lab: Lab) -> dict[str, float]:
    """Fit every method to the same pairs at both betas."""
    problem = Problem(config.pairs, lab.seed)
    metrics: dict[str, float] = {}
    for beta in BETAS:
        for name in METHODS:
            trial = f"exact/beta={beta}/{name}"
            found = lab.compute(trial, partial(fit, problem, name, beta, config))
            metrics |= prefixed(trial, found)
        half = metrics[f"exact/beta={beta}/dpo/kl"] / 2
        metrics[f"exact/beta={beta}/dpo/half_kl"] = half
    return metrics


def fit(problem: Problem, name: str, beta: float, config: Config) -> dict[str, float]:
    """Train policy and masks on all pairs; measure at the end and at the lowest held-out loss."""

    def at(place: int) -> Callable[[Responses], Tensor]:
        return lambda side: (torch.arange(LENGTH) == place).expand(side.logprobs.shape)

    method = TokenWeighted(
        name,
        beta,
        relevant=at(PLACE),
        misplaced=at(WRONG_PLACE),
        noise=lambda side: problem.noise.expand(side.logprobs.shape),
        size=LENGTH,
    ).double()
    table = problem.table.clone().requires_grad_()
    optimizer = torch.optim.AdamW(
        [
            {"params": [table], "weight_decay": 0.0},
            {"params": list(method.parameters()), "weight_decay": 0.01},
        ],
        lr=config.learning_rate,
    )
    best, early = float("inf"), {}
    for update in range(config.updates):
        if update % 10 == 0:
            with torch.no_grad():
                held_out = method(problem.batch(table, problem.held_out)).item()
                if held_out < best:
                    best = held_out
                    early = problem.measures(table, method)
        optimizer.zero_grad()
        method(problem.batch(table, problem.train)).backward()
        optimizer.step()
    with torch.no_grad():
        final = problem.measures(table, method)
    kept = ("reward", "kl", "wasted", "held_out_accuracy")
    return final | {f"early/{key}": early[key] for key in kept}


# ---- 2. Text: a cue announces what matters ---------------------------------------------------

CUE = "=>"
PROMPT_WORDS, WORDS_DRAWN, TEXT_SCALE, LEVEL = 4, 14, 8.0, 0.6


@dataclass(frozen=True)
class TextSetting:
    """A reference, pairs, and what is needed to look at a policy."""

    text: WordText
    reference: Any
    train: Pairs
    held_out: Pairs
    prompts: tuple[Tensor, Tensor]
    reward: LexiconReward
    judge: LexiconReward
    noise: Tensor
    """``[V]``, a random weight for each previous token."""

    def relevant(self, side: Responses) -> Tensor:
        """States that follow the cue: which word of the lexicon comes is decided there."""
        if side.previous is None:
            raise ValueError("side must know the token before each, got none")
        return side.previous == self.text.id_of(CUE)


def text_setting(config: Config, seed: int) -> TextSetting:
    """Plant the cue, train the word model, and let raters compare its responses."""
    generator = torch.Generator().manual_seed(seed)
    lexicon = sentiment_lexicon("vader")
    text = word_text(planted(body, lexicon) for _, body in newsgroups("train"))
    model = word_model(text, seed=seed, steps=config.text_base_steps)
    # Centred, so that a cue is worth nothing by itself and only the word after it matters.
    ratings = LexiconReward(text, lexicon).values[text.windows]
    centre = ratings[ratings != 0].mean().item()
    reward = LexiconReward(text, {word: rating - centre for word, rating in lexicon.items()})

    def pairs(count: int) -> Pairs:
        return draw_pairs(
            model,
            *text.prompts(count, generator, length=PROMPT_WORDS),
            reward,
            max_new_tokens=WORDS_DRAWN,
            generator=generator,
            scale=TEXT_SCALE,
        )

    return TextSetting(
        text,
        model,
        pairs(config.text_pairs),
        pairs(config.text_evaluation),
        text.prompts(config.text_evaluation, generator, length=PROMPT_WORDS),
        reward,
        LexiconReward(text, sentiment_lexicon("afinn")),
        torch.rand(len(text.tokenizer), generator=generator),
    )


def planted(body: str, lexicon: dict[str, float]) -> str:
    """Put the cue before every word of the lexicon.

    Example:
        >>> planted("a good day", {"good": 2.0})
        'a => good day'
    """
    words = (f"{CUE} {word}" if word in lexicon else word for word in body.split())
    return " ".join(words)


def run_text(config: Config, lab: Lab) -> dict[str, float]:
    """Train every method at every beta from one reference; compare at equal reward."""

    @cache
    def setting() -> TextSetting:
        return text_setting(config, lab.seed)

    def make(name: str, beta: float) -> PreferenceLearner:
        found = setting()
        sizes = found.reference.config
        method = TokenWeighted(
            name,
            beta,
            relevant=found.relevant,
            noise=lambda side: found.noise[side.previous],
            layers=sizes.num_hidden_layers,
            size=sizes.hidden_size,
        )

        def last(model: Any, step: int) -> dict[str, float]:
            if step < config.text_updates:
                return {}
            return text_measures(found, model, method, lab.seed)

        return PreferenceLearner(
            copy.deepcopy(found.reference),
            found.train,
            method,
            PreferenceSettings(
                updates=max(1, config.text_updates // 10),
                learning_rate=config.text_learning_rate,
                objective_rate=10 * config.text_learning_rate,
                states=name != "dpo",
            ),
            seed=lab.seed,
            probe=last,
        )

    start = lab.compute("text/reference", lambda: reference_measures(setting(), lab.seed))
    metrics = prefixed("text/reference", start)
    curves: dict[str, list[dict[str, float]]] = {}
    for name in config.text_methods:
        curves[name] = []
        for beta in TEXT_BETAS:
            trial = f"text/{name} beta={beta}"
            row = lab.train(trial, partial(make, name, beta), total=config.text_updates)[-1]
            found = {k.removeprefix("final/"): v for k, v in row.items() if "final/" in k}
            curves[name].append(found)
            metrics |= prefixed(trial, found)
    return metrics | prefixed("text", at_equal_reward(curves, start["reward"]))


def at_equal_reward(curves: dict[str, list[dict[str, float]]], start: float) -> dict[str, float]:
    """Divergence of each method at a reward that DPO and the oracle both exceed, if it gets there.

    Args:
        curves: measures at every beta, by method.
        start: reward of the reference, which costs nothing.
    """
    best = {name: max(start, *(row["reward"] for row in rows)) for name, rows in curves.items()}
    reached = min(best[name] for name in ({"dpo", "oracle"} & set(best) or set(best)))
    level = start + LEVEL * (reached - start)
    found = {"level": level}
    for name, rows in curves.items():
        for key in ("wasted", "kl") if best[name] >= level else ():
            points = [(row["reward"], row[key]) for row in rows] + [(start, 0.0)]
            found[f"{name}/{key}_at_level"] = cost_at_level(points, level)
    return found


def draw(setting: TextSetting, model: Any, seed: int) -> Samples:
    """Draw responses to the prompts of the evaluation."""
    generator = torch.Generator().manual_seed(seed + 1)
    return sample(model, *setting.prompts, max_new_tokens=WORDS_DRAWN, generator=generator)


def reference_measures(setting: TextSetting, seed: int) -> dict[str, float]:
    """Reward and judge of the reference, and how many of its states matter."""
    drawn = draw(setting, setting.reference, seed)
    previous = torch.cat([setting.prompts[0][:, -1:], drawn.tokens[:, :-1]], dim=1)
    return {
        "reward": setting.reward(drawn.tokens, drawn.mask).mean().item(),
        "judge": setting.judge(drawn.tokens, drawn.mask).mean().item(),
        "relevant_share": (previous == setting.text.id_of(CUE)).double().mean().item(),
    }


@torch.no_grad()
def text_measures(
    setting: TextSetting, model: Any, method: TokenWeighted, seed: int
) -> dict[str, float]:
    """Reward and divergence on samples, split by whether a state matters; the masks."""
    drawn = draw(setting, model, seed)
    relevant, kl = sample_divergence(setting, model, drawn)
    spent = torch.stack([(kl * keep).sum(-1).mean() for keep in (relevant, ~relevant)])
    policy, reference = (score_pairs(m, setting.held_out) for m in (model, setting.reference))
    chosen, rejected = (p - r for p, r in zip(policy, reference, strict=True))
    found = {
        "reward": setting.reward(drawn.tokens, drawn.mask).mean().item(),
        "judge": setting.judge(drawn.tokens, drawn.mask).mean().item(),
        "kl": spent.sum().item(),
        "wasted": spent[1].item(),
        "wasted_share": (spent[1] / spent.sum()).item(),
        "pair_accuracy": (chosen > rejected).double().mean().item(),
        **mask_measures(setting, method),
    }
    return prefixed("final", found)


def sample_divergence(setting: TextSetting, model: Any, drawn: Samples) -> tuple[Tensor, Tensor]:
    """Which states of samples matter, and ``KL(policy || reference)`` in each, ``[N, T]``."""
    ids, shown = setting.prompts
    # Only the first response of each pair is looked at; the second need only differ from it.
    pairs = Pairs(
        ids,
        shown,
        drawn.tokens,
        drawn.mask,
        (drawn.tokens - 1).abs(),
        drawn.mask,
        torch.ones(len(ids)),
    )
    laws, ref_laws = (next_token_laws(m, pairs)[0][: len(ids)] for m in (model, setting.reference))
    previous = torch.cat([ids[:, -1:], drawn.tokens[:, :-1]], dim=1)
    kl = (laws.exp() * (laws - ref_laws)).sum(-1).where(drawn.mask, 0.0)
    return previous == setting.text.id_of(CUE), kl


def mask_measures(setting: TextSetting, method: TokenWeighted) -> dict[str, float]:
    """How well the reward mask finds the states that matter, on held-out chosen responses."""
    pairs = setting.held_out
    _, hidden = next_token_laws(setting.reference, pairs, with_hidden=True)
    previous = torch.cat([pairs.prompt_ids[:, -1:], pairs.chosen[:, :-1]], dim=1)
    nothing = torch.zeros(pairs.chosen.shape)
    side = Responses(
        nothing, nothing, pairs.chosen_mask, nothing, hidden[:, : len(pairs)], previous
    )
    mask = method.masks(side)[0]
    if mask is None:
        return {}
    kept = pairs.chosen_mask
    inside = setting.relevant(side) & kept
    return {
        "mask_auc": area_under_curve(mask[inside], mask[kept & ~inside]),
        "mask_mean": mask[kept].mean().item(),
        "mask_inside": mask[inside].mean().item(),
        "sparsity": mask_sparsity(mask, kept).item(),
    }


def figures(result: dict[str, Any]) -> "dict[str, Figure]":
    """What every method spends where it does not matter, against beta."""
    from steelyard.lab.plots import draw_against

    if "exact" not in result["config"]["parts"]:
        return {}
    seeds = list(result["metrics"].values())
    panels = {
        ("one position of five matters", label): {
            name: {
                beta: [values[f"exact/beta={beta}/{name}/{key}"] for values in seeds]
                for beta in BETAS
            }
            for name in ("dpo", "tdpo1", "common l1=0.01", "oracle")
        }
        for key, label in (
            ("reward", "expected reward"),
            ("wasted", "nats spent on other positions"),
        )
    }
    title = "What each method earns, and what it spends where nothing depends on it"
    return {"exact": draw_against(panels, "beta", title)}
