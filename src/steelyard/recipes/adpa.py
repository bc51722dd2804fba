"""DCKD and ADPA: a small model learns preferences from an aligned teacher.

DPO tells a student which of two responses is better. DCKD tells it the aligned teacher's next-token
law on both; ADPA raises, on the student's own responses, the advantage of every next token, read
off the teacher before and after alignment. More reward costs distance from where the student began,
so methods are compared by the best reward within a budget of KL, over four settings each and all
times of the training.

exact       all 1,024 sequences of five tokens, a bigram student, a teacher with a law of its own
            for every prefix. Rewards and KL are exact. The teacher is aligned perfectly ("exact"),
            which favours distillation, or by DPO on the same 150 pairs as the student ("fitted").
text        20 Newsgroups, 12 words at a time; the reward is a sentiment lexicon, a second lexicon
            judges. Teacher: a transformer aligned by DPO, stopped by other pairs; student: a much
            smaller one.
smollm2     SmolLM2-135M before and after DPO with LoRA teaches three of its own layers by ADPA,
            with the trainer of ``steelyard.integrations.trl``. Seed 0 only, without a claim: one
            short run.

Without a claim: in part exact, ADPA+ (starts from DCKD) and ADPA without the unaligned teacher.

Source: Gao et al. (2025), DCKD and ADPA, arXiv:2502.17927.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steelyard._checks import check_choice, check_count, check_range
from steelyard.distillation import adpa_loss, dckd_loss, teacher_advantage
from steelyard.lab import Claim, Form, Lab, prefixed
from steelyard.recipes._adpa_smollm2 import teach_layers
from steelyard.recipes._adpa_testbed import (
    BETA,
    LENGTH,
    VOCABULARY,
    Look,
    Testbed,
    dpo_loss,
    draw,
    identities,
    make_testbed,
)
from steelyard.recipes._adpa_text import (
    TEXT_LOOKS,
    Scene,
    TextLoss,
    dpo_on_text,
    look_at_text,
    look_steps,
    make_scene,
    next_tokens,
    perplexity,
    train_text,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("exact", "text", "smollm2")
TEACHERS = ("exact", "fitted")
BUDGETS = (0.5, 1.0, 2.0, 4.0)  # nats a sequence, from the student before
TEXT_BUDGETS = (1.0, 2.0, 4.0, 8.0)
LOOKS = 16  # times at which a training is measured, more often at first, the last at its end

# Four settings each: alpha of KD and DCKD, gamma of ADPA, beta of DPO.
SETTINGS: dict[str, tuple[float, ...]] = {
    "kd": (0.5, 1.0, 2.0, 4.0),
    "dckd": (0.5, 1.0, 2.0, 4.0),
    "adpa": (0.5, 1.0, 3.0, 5.0),
    "adpa+": (0.5, 1.0, 3.0, 5.0),
    "adpa-alone": (0.5, 1.0, 3.0, 5.0),
    "dpo": (1.0, 0.5, 0.3, 0.1),
}
ON_TEXT = ("kd", "dckd", "adpa", "dpo")


@dataclass(frozen=True)
class Config:
    """What is run, and how large."""

    parts: tuple[str, ...] = ("exact",)
    """Which of exact, text, smollm2."""
    pairs: int = 150
    """Noisy preference pairs of the part exact."""
    steps: int = 300
    """Full-batch steps of the part exact."""
    words: int = 800
    """Size of the vocabulary of the part text."""
    base_steps: int = 600
    """Training steps of teacher and student before alignment."""
    text_pairs: int = 1500
    updates: int = 100
    """Of alignment and distillation on text, with 32 pairs each."""
    prompts: int = 256
    """Held-out prompts of a measurement on text, and as many to choose by."""
    smollm2_pairs: int = 24
    smollm2_updates: int = 30
    """Of the distillation, with four pairs each; the teacher's alignment takes a third of them."""

    def __post_init__(self) -> None:
        for part in self.parts:
            check_choice("parts", part, PARTS)
        for name in ("pairs", "words", "base_steps", "text_pairs", "prompts"):
            check_count(name, getattr(self, name))
        for name, least in (("steps", LOOKS), ("updates", TEXT_LOOKS)):
            check_range(name, getattr(self, name), at_least=least)
        check_count("smollm2_pairs", self.smollm2_pairs, at_least=4)
        check_count("smollm2_updates", self.smollm2_updates, at_least=3)


QUICK = Form(Config(), seeds=8, minutes=3, threads=1)
FULL = Form(Config(parts=PARTS), seeds=5, minutes=10, threads=1)

_PAPER = "Gao et al. (2025), arXiv:2502.17927"


def _higher(metric: str, baseline: str, words: str, source: str = _PAPER) -> Claim:
    return Claim(words, source, metric=metric, baseline=baseline, direction="higher")


def _claims() -> Iterator[Claim]:
    for error, words in (
        (
            "telescoping_error",
            "Advantages along a sequence sum to its reward minus the root's value",
        ),
        ("gap_error", "Expected advantage = KL(student || before) - KL(student || aligned)"),
    ):
        yield Claim(
            words,
            "derived from the soft Bellman equation",
            metric=f"exact/{error}",
            baseline=1e-9,
            direction="lower",
            min_seeds=1,
        )
    place = "exact/exact"
    dckd = f"{place}/dckd/1.0/reward"
    words = (
        "The teacher's law on rejected responses too: DCKD ends with more reward than KD, alpha 1"
    )
    yield _higher(dckd, f"{place}/kd/1.0/reward", words)
    words = "Control: DCKD (alpha 1) above KD of the same total weight (alpha 2)"
    yield _higher(dckd, f"{place}/kd/2.0/reward", words, "the rejected responses, not the weight")
    words = "ADPA (gamma 1) ends with more reward than DCKD (alpha 1), at more KL"
    yield _higher(f"{place}/adpa/1.0/reward", dckd, words)
    for budget in (1.0, 2.0):
        within = f"budget={budget}"
        for teacher, told in (
            ("exact", "perfect teacher"),
            ("fitted", "teacher aligned on the same pairs"),
        ):
            yield _higher(
                f"exact/{teacher}/adpa/{within}",
                f"exact/{teacher}/dpo/{within}",
                f"Within {budget:g} nats, {told}: ADPA above DPO on the student",
            )
    for budget in (2.0, 4.0):
        within = f"budget={budget}"
        words = f"Text, within {budget:g} nats: ADPA above DPO on the student"
        yield _higher(f"text/adpa/{within}", f"text/dpo/{within}", words)
    for better, worse in (("adpa", "dckd"), ("dckd", "kd")):
        words = f"Text, within 4 nats: {better.upper()} above {worse.upper()}"
        yield _higher(f"text/{better}/budget=4.0", f"text/{worse}/budget=4.0", words)
    words = "Text, within 4 nats: DCKD above the student before"
    yield _higher("text/dckd/budget=4.0", "text/sft/reward", words)
    words = "Text, within 4 nats: the second lexicon agrees that ADPA is above the student before"
    yield _higher("text/adpa/judge budget=4.0", "text/sft/judge", words, "held-out judge")


CLAIMS: tuple[Claim, ...] = tuple(_claims())


def run(config: Config, lab: Lab) -> dict[str, float]:
    """Run the chosen parts for one seed."""
    parts = {"exact": run_exact, "text": run_text, "smollm2": run_smollm2}
    metrics: dict[str, float] = {}
    for part in config.parts:
        metrics |= parts[part](config, lab)
    return metrics


def within(looks: Sequence[Look], before: Look, budget: float) -> Look:
    """Best look whose KL is inside the budget; the student before is one of them."""
    return max((look for look in (before, *looks) if look.kl <= budget), key=lambda k: k.score)


# ---- 1. Exact: all sequences of five tokens --------------------------------------------------


def fitted_teacher(bed: Testbed, steps: int) -> Tensor:
    """Teacher aligned by DPO on the pairs: a change for each place and last token.

    The time to stop is that of the lowest loss on other pairs.
    """
    space = bed.space
    place = torch.zeros(space.num_prefixes, dtype=torch.long)
    place[space.prefixes] = torch.arange(LENGTH)
    feature = place * (1 + VOCABULARY) + bed.last
    start = torch.zeros(LENGTH * (1 + VOCABULARY), VOCABULARY, dtype=torch.float64)

    def loss(change: Tensor, pairs: tuple[Tensor, Tensor] | None = None) -> Tensor:
        return dpo_loss(bed, bed.before + change[feature], bed.before, BETA, pairs)

    looks = descend(start, loss, steps)
    change = min(looks, key=lambda look: loss(look, bed.other_pairs).item())
    return (bed.before + change[feature]).log_softmax(-1)


def descend(start: Tensor, loss: Callable[[Tensor], Tensor], steps: int) -> list[Tensor]:
    """Adam on the whole data; the parameters at each look."""
    when = look_steps(steps, LOOKS)
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([parameters], lr=0.05)
    looks = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss(parameters).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step in when:
            looks.append(parameters.detach().clone())
    return looks


def student_loss(
    bed: Testbed, aligned: Tensor, method: str, setting: float, own: Tensor
) -> Callable[[Tensor], Tensor]:
    """Loss of a bigram student by method."""
    space = bed.space
    tokens = (space.tokens[bed.chosen], space.tokens[bed.rejected])

    def on(table: Tensor, rows: Tensor) -> Tensor:
        return table[space.prefixes[rows]]

    def loss(bigram: Tensor) -> Tensor:
        table = bigram[bed.last]
        chosen, rejected = on(table, bed.chosen), on(table, bed.rejected)
        if method == "dpo":
            return dpo_loss(bed, table, bed.sft[bed.last], setting)
        if method == "dckd":
            teacher = on(aligned, bed.chosen), on(aligned, bed.rejected)
            return dckd_loss(chosen, rejected, *teacher, *tokens, alpha=setting)
        if method == "kd":  # the same divergence twice, at half the weight
            teacher = on(aligned, bed.chosen), on(aligned, bed.chosen)
            twice = (tokens[0], tokens[0])
            return dckd_loss(chosen, chosen, *teacher, *twice, alpha=setting / 2)
        before = torch.zeros_like(aligned) if method == "adpa-alone" else bed.before
        advantage = teacher_advantage(on(aligned, own), on(before, own))
        return adpa_loss(chosen, tokens[0], on(table, own), advantage, gamma=setting)

    return loss


def run_exact(config: Config, lab: Lab) -> dict[str, float]:
    """Identities on the tree, then every method with either teacher."""

    @cache
    def bed() -> Testbed:
        return make_testbed(config.pairs, lab.seed)

    @cache
    def teacher(kind: str) -> Tensor:
        return bed().aligned if kind == "exact" else fitted_teacher(bed(), config.steps)

    def facts() -> dict[str, float]:
        table = bed().sft[bed().last]
        return identities(bed()) | {"sft/reward": look_at(bed(), table).reward}

    metrics = prefixed("exact", lab.compute("exact/facts", facts))
    for kind in TEACHERS:
        place = f"exact/{kind}"

        def of_teacher(kind: str = kind) -> dict[str, float]:
            look = look_at(bed(), teacher(kind))
            return {"reward": look.reward}

        metrics |= prefixed(f"{place}/teacher", lab.compute(f"{place}/teacher", of_teacher))
        for method in SETTINGS:

            def study(kind: str = kind, method: str = method) -> dict[str, float]:
                return exact_study(bed(), teacher(kind), method, config.steps, lab.seed)

            metrics |= prefixed(f"{place}/{method}", lab.compute(f"{place}/{method}", study))
    return metrics


def exact_study(
    bed: Testbed, aligned: Tensor, method: str, steps: int, seed: int
) -> dict[str, float]:
    """Train with each setting; the ends, and the best reward within each budget."""
    start, own = bed.sft, bed.own
    if method == "adpa+":
        start = descend(start, student_loss(bed, aligned, "dckd", 1.0, own), steps)[-1]
        law = bed.space.logprobs(start[bed.last]).sum(-1).exp()
        own = draw(law, 300, torch.Generator().manual_seed(seed + 1))
    found: dict[str, float] = {}
    every: list[Look] = []
    for setting in SETTINGS[method]:
        tables = descend(start, student_loss(bed, aligned, method, setting, own), steps)
        looks = [look_at(bed, table[bed.last]) for table in tables]
        found |= {f"{setting}/reward": looks[-1].reward, f"{setting}/kl": looks[-1].kl}
        every += looks
    before = look_at(bed, bed.sft[bed.last])
    return found | {f"budget={b}": within(every, before, b).reward for b in BUDGETS}


def look_at(bed: Testbed, table: Tensor) -> Look:
    """Exact KL from the student before, and exact reward."""
    kl = bed.space.kl_by_position(table, bed.sft[bed.last]).sum().item()
    reward = (bed.space.logprobs(table).sum(-1).exp() * bed.reward).sum().item()
    return Look(kl, reward, reward)


# ---- 2. Text: twelve words at a time ---------------------------------------------------------


def text_loss(scene: Scene, method: str, setting: float) -> TextLoss:
    """Loss of a student by method; the teachers' logits are computed on the way."""
    if method == "dpo":
        return dpo_on_text(scene.sft, scene.pairs, setting)

    def pairwise(model: Any, index: Tensor) -> Tensor:
        pairs = scene.pairs[index]
        answers = {"chosen": (pairs.chosen, pairs.chosen_mask)}
        answers["rejected"] = (pairs.rejected, pairs.rejected_mask)
        if method == "kd":  # the same divergence twice, at half the weight
            answers["rejected"] = answers["chosen"]
        (chosen, chosen_mask), (rejected, rejected_mask) = answers.values()
        student = [next_tokens(model, pairs.prompt_ids, y) for y in (chosen, rejected)]
        with torch.no_grad():
            teacher = [next_tokens(scene.aligned, pairs.prompt_ids, y) for y in (chosen, rejected)]
        return dckd_loss(
            student[0],
            student[1],
            teacher[0],
            teacher[1],
            chosen,
            rejected,
            alpha=setting / 2 if method == "kd" else setting,
            mask_chosen=chosen_mask,
            mask_rejected=rejected_mask,
        )

    def by_advantage(model: Any, index: Tensor) -> Tensor:
        pairs, tokens = scene.pairs[index], scene.own[0][index]
        prompts = pairs.prompt_ids
        with torch.no_grad():
            laws = [next_tokens(m, prompts, tokens) for m in (scene.aligned, scene.before)]
        return adpa_loss(
            next_tokens(model, prompts, pairs.chosen),
            pairs.chosen,
            next_tokens(model, prompts, tokens),
            teacher_advantage(laws[0], laws[1], top_k=50),
            gamma=setting,
            mask_chosen=pairs.chosen_mask,
            mask_own=scene.own[1][index],
        )

    return by_advantage if method == "adpa" else pairwise


def run_text(config: Config, lab: Lab) -> dict[str, float]:
    """Every method from the same student."""

    @cache
    def scene() -> Scene:
        return make_scene(
            words=config.words,
            base_steps=config.base_steps,
            pairs=config.text_pairs,
            updates=config.updates,
            seed=lab.seed,
        )

    def look(model: Any) -> dict[str, float]:
        return look_at_text(scene(), model, config.prompts, lab.seed)._asdict()

    def fluency(model: Any) -> dict[str, float]:
        return {"perplexity": perplexity(scene(), model, config.prompts)}

    def facts() -> dict[str, float]:
        models = {"sft": scene().sft, "before": scene().before, "aligned": scene().aligned}
        rows = {name: look(model) | fluency(model) for name, model in models.items()}
        return {f"{name}/{key}": value for name, row in rows.items() for key, value in row.items()}

    def study(method: str, setting: float) -> dict[str, float]:
        model, loss = copy.deepcopy(scene().sft), text_loss(scene(), method, setting)
        times = train_text(
            model, loss, len(scene().pairs), config.updates, seed=lab.seed, looks=TEXT_LOOKS
        )
        seen = {
            f"look {number}/{key}": value
            for number, _ in enumerate(times, start=1)
            for key, value in look(model).items()
        }
        return seen | fluency(model)

    metrics = prefixed("text", lab.compute("text/facts", facts))
    sft = Look(0.0, *(metrics[f"text/sft/{key}"] for key in ("score", "reward", "judge")))
    for method in ON_TEXT:
        looks = []
        for setting in SETTINGS[method]:
            name = f"text/{method}/{setting}"
            found = lab.compute(name, partial(study, method, setting))
            metrics |= prefixed(name, found)
            for n in range(1, TEXT_LOOKS + 1):
                looks.append(Look(*(found[f"look {n}/{key}"] for key in Look._fields)))
        for budget in TEXT_BUDGETS:
            best = within(looks, sft, budget)
            metrics[f"text/{method}/budget={budget}"] = best.reward
            metrics[f"text/{method}/judge budget={budget}"] = best.judge
    return metrics


# ---- 3. A model with a past ------------------------------------------------------------------


def run_smollm2(config: Config, lab: Lab) -> dict[str, float]:
    """Align SmolLM2, cut a student out of it and teach it by ADPA."""
    if lab.seed != 0:
        return {}
    study = partial(
        teach_layers, pairs=config.smollm2_pairs, updates=config.smollm2_updates, seed=lab.seed
    )
    return prefixed("smollm2", lab.compute("smollm2", study))


def figures(result: dict[str, Any]) -> "dict[str, Figure]":
    """Best reward within a budget of KL."""
    from steelyard.lab.plots import draw_against

    seeds, parts = list(result["metrics"].values()), result["config"]["parts"]
    places = {"exact/exact": BUDGETS, "exact/fitted": BUDGETS, "text": TEXT_BUDGETS}
    panels = {
        (place, "reward"): {
            method: {
                budget: [metrics[f"{place}/{method}/budget={budget}"] for metrics in seeds]
                for budget in budgets
            }
            for method in ON_TEXT
        }
        for place, budgets in places.items()
        if place.split("/")[0] in parts
    }
    if not panels:
        return {}
    title = "The best reward within a budget of KL from the student before"
    return {"budgets": draw_against(panels, "nats a sequence", title)}
