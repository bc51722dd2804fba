"""Which tokens did reinforcement learning change, and do those few carry the gain?

A base model learns from demonstrations that are right part of the time; reinforcement learning then
makes it right most of the time. Both are compared token by token, and mixed: one model writes, and
the other takes over where the two disagree.

exact       random finite trees: cross-sampling by sampling agrees with enumeration, and its ends
            are the two models.
sort        sorting, where only the first token is a real fork: sparsity of the shift, cross-
            sampling both ways beside as many switches at random positions, and supervised training
            on right answers to the same accuracy.
modular     the same on modular sums, with or without the steps written down.
gym         the same on a data set of reasoning-gym (number sorting).
weights     advantages weighted by each token's divergence, four epochs a batch: differences are
            expected to be within noise, and nothing is claimed.
smollm2     SmolLM2-135M before and after a short run of TRL's GRPO trainer with LoRA on a data set
            of reasoning-gym: its token shift and a heat map. Seed 0 only.

Two checkpoints of your own: ``--model DIR --rl-model DIR --prompts FILE`` samples answers from the
second, compares the two on them and writes ``heat_map.html``; FILE is JSON lines with a field
``prompt``, or plain text with a prompt a line.

Source: Meng et al. (2026), Sparse but Critical, arXiv:2603.22446.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from steelyard._checks import check_choice, check_count, check_range
from steelyard.lab import Claim, Form, Lab, prefixed
from steelyard.lab.rlvr import (
    RLVRLearner,
    RLVRSettings,
    Rollouts,
    Update,
    base_model,
    evaluate,
    finetune,
    score,
)
from steelyard.lab.tasks import Task, modular_arithmetic, reasoning_gym_task, sorting
from steelyard.lab.tiny_lm import encode_rows, sample
from steelyard.lab.trees import leaves, random_tree, tree_model
from steelyard.policy import divergence_weights, group_relative_advantages, grpo_loss
from steelyard.tokens import (
    CachedNextToken,
    SwitchRule,
    cross_sample,
    exact_cross_sampling,
    model_token_shift,
    random_switch_positions,
    rank_table,
    shift_summary,
    switch_above_js,
    switch_at,
    trace_cross_sampling,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TASKS: dict[str, Callable[[], Task]] = {
    "sort": partial(sorting, 7),
    "modular": partial(modular_arithmetic, 5, 3, scratch=1.0, right=0.5),
    "gym": partial(
        reasoning_gym_task,
        "number_sorting",
        seed=0,
        exact=True,
        right=0.4,
        min_numbers=5,
        max_numbers=5,
        min_decimals=0,
        max_decimals=0,
        min_value=0,
        max_value=9,
    ),
}
LONGER = {"sort": 1, "modular": 3, "gym": 2}  # harder to learn: all training, in multiples
PARTS = ("exact", *TASKS, "weights", "smollm2")
THRESHOLDS = (0.3, 0.1, 0.03, 0.01)
SUMS: dict[str, Any] = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
DEPTH, WIDTH = 4, 3  # of the exact part's trees
HEADLINE = 0.1  # nats: the paper's mark of a high divergence


@dataclass(frozen=True)
class Config:
    """What is run, and how large."""

    parts: tuple[str, ...] = ("exact", "sort")
    """Which of exact, sort, modular, gym, weights, smollm2."""
    steps: int = 30
    """Batches of reinforcement learning on sort; other tasks take a multiple."""
    groups: int = 16
    """Prompts a batch."""
    samples: int = 8
    """Answers to a prompt."""
    learning_rate: float = 3e-4
    base_steps: int = 600
    """Training steps of the base model on demonstrations of sort; others take a multiple."""
    questions: int = 1000
    """Prompts of every comparison."""
    smollm2_steps: int = 20
    """Updates of SmolLM2."""
    model: str = ""
    """Compare your own checkpoints: folder of the base model (or "smollm2")."""
    rl_model: str = ""
    """Folder of the same model after training."""
    prompts: str = ""
    """File of prompts for your own checkpoints."""
    prompt_column: str = "prompt"
    """Field of a JSON line that holds the prompt."""
    max_new_tokens: int = 64
    """Longest answer of your own checkpoints."""

    def __post_init__(self) -> None:
        for part in self.parts:
            check_choice("parts", part, PARTS)
        for name in ("steps", "groups", "base_steps", "questions", "smollm2_steps"):
            check_count(name, getattr(self, name))
        check_count("samples", self.samples, at_least=2)
        check_count("max_new_tokens", self.max_new_tokens)
        check_range("learning_rate", self.learning_rate, above=0.0)
        given = (self.model, self.rl_model, self.prompts)
        if any(given) and not all(given):
            raise ValueError(
                "model, rl_model and prompts belong together, got "
                f"model={self.model!r}, rl_model={self.rl_model!r}, "
                f"prompts={self.prompts!r}"
            )


QUICK = Form(Config(), seeds=3, minutes=5, threads=1)
FULL = Form(Config(parts=PARTS), seeds=5, minutes=45, threads=1)

_PAPER = "Meng et al. (2026), arXiv:2603.22446"


def _claims() -> Iterator[Claim]:
    yield Claim(
        "Sampled and enumerated cross-sampling agree (largest difference, standard errors)",
        f"{_PAPER}, mixed policy",
        metric="exact/largest_error",
        baseline=4.5,
        direction="lower",
        min_seeds=1,
    )
    sort = f"sort/forward/js={HEADLINE}"
    yield Claim(
        "After RL at least 80 % of the positions have a divergence below 0.01 nats",
        f"{_PAPER}, sparsity",
        metric="sort/rl/share_below",
        baseline=0.8,
        direction="higher",
    )
    yield Claim(
        "Switching where the divergence exceeds 0.1 recovers at least 90 % of RL's gain",
        f"{_PAPER}, forward cross-sampling",
        metric=f"{sort}/recovered",
        baseline=0.9,
        direction="higher",
    )
    yield Claim(
        "That takes at most 1.25 switched tokens an answer",
        f"{_PAPER}, forward cross-sampling",
        metric=f"{sort}/switches",
        baseline=1.25,
        direction="lower",
    )
    yield Claim(
        "As many switches at random positions recover less than a third of the gain",
        "control",
        metric=f"{sort}/control_recovered",
        baseline=1 / 3,
        direction="lower",
    )
    yield Claim(
        "Going back to the base at those positions removes at least 90 % of the gain",
        f"{_PAPER}, backward cross-sampling",
        metric=f"sort/backward/js={HEADLINE}/recovered",
        baseline=0.9,
        direction="higher",
    )
    for task in TASKS:
        yield Claim(
            f"Task {task}: RL leaves more positions unmoved than supervised training to the same "
            "accuracy",
            f"{_PAPER}, contrast with supervised training",
            metric=f"{task}/rl/share_below",
            baseline=f"{task}/sft/share_below",
            direction="higher",
        )
    for task in ("modular", "gym"):
        yield Claim(
            f"Task {task}: switching above 0.01 recovers more of the gain than random positions",
            f"{_PAPER}, forward cross-sampling",
            metric=f"{task}/forward/js={THRESHOLDS[-1]}/recovered",
            baseline=f"{task}/forward/js={THRESHOLDS[-1]}/control_recovered",
            direction="higher",
        )


CLAIMS: tuple[Claim, ...] = tuple(_claims())


def run(config: Config, lab: Lab) -> dict[str, float]:
    """Run the chosen parts for one seed, or compare two checkpoints."""
    if config.model:
        return run_checkpoints(config, lab)
    metrics: dict[str, float] = {}
    for part in config.parts:
        if part in TASKS:
            metrics |= run_task(config, lab, part)
        else:
            parts = {"exact": run_exact, "weights": run_weights, "smollm2": run_smollm2}
            metrics |= parts[part](config, lab)
    return metrics


# ---- 1. Exact: finite trees -----------------------------------------------------------------


def run_exact(config: Config, lab: Lab) -> dict[str, float]:
    """Random trees of depth 4 over 3 tokens: sampled against enumerated success."""
    del config

    def study() -> dict[str, float]:
        generator = torch.Generator().manual_seed(lab.seed)
        draws, errors = 4000, []
        for _ in range(5):
            base, rl = (random_tree(DEPTH, WIDTH, generator) for _ in range(2))
            wins = {p for p in leaves(base) if torch.rand((), generator=generator) < 0.3}
            for threshold in (-1.0, 0.05, 0.2, 1.0):
                truth = exact_cross_sampling(
                    base, rl, wins.__contains__, js_threshold=threshold
                ).success_probability
                drawn = cross_sample(
                    tree_model(base),
                    tree_model(rl),
                    torch.zeros(draws, 1, dtype=torch.long),
                    js_threshold=threshold,
                    max_new_tokens=DEPTH,
                    generator=generator,
                )
                found = sum(tuple(row) in wins for row in drawn.tokens.tolist()) / draws
                error = (max(truth * (1 - truth), 1 / draws) / draws) ** 0.5
                errors.append(abs(found - truth) / error)
        return {"largest_error": max(errors)}

    return prefixed("exact", lab.compute("exact", study))


# ---- 2. A task: base, RL, supervised, and their mixtures -------------------------------------


class Models(NamedTuple):
    """The models of a task, and the questions they are compared on."""

    base: Any
    rl: Any
    sft: Any
    tokenizer: Any
    task: Task
    rows: list[dict[str, Any]]


def run_task(config: Config, lab: Lab, name: str) -> dict[str, float]:
    """Train the models of a task and compare them."""

    def study() -> dict[str, float]:
        longer = replace(
            config, steps=config.steps * LONGER[name], base_steps=config.base_steps * LONGER[name]
        )
        models, metrics = train_models(longer, TASKS[name](), lab.seed)
        generator = torch.Generator().manual_seed(lab.seed + 1)
        for kind, changed in (("rl", models.rl), ("sft", models.sft)):
            metrics |= prefixed(kind, shift_metrics(models, changed, generator))
        ends = metrics["base/accuracy"], metrics["rl/accuracy"]
        for direction in ("forward", "backward"):
            for threshold in THRESHOLDS:
                found = mix(models, direction, threshold, ends, generator)
                metrics |= prefixed(f"{direction}/js={threshold}", found)
        return metrics

    return prefixed(name, lab.compute(name, study))


def dr_grpo(rollouts: Rollouts) -> Update:
    """Reward minus the group's mean, summed over the tokens of an answer."""
    advantages = group_relative_advantages(rollouts.rewards, rollouts.groups, scale="none")

    def loss(log_ratio: Tensor, index: Tensor) -> Tensor:
        mask = rollouts.mask[index]
        total = grpo_loss(log_ratio, advantages[index], mask=mask, aggregate="sequence_sum")
        return total / rollouts.mask.shape[1]

    return Update(loss)


def train_models(config: Config, task: Task, seed: int) -> tuple[Models, dict[str, float]]:
    """Base model from mixed demonstrations, RL from its own answers, SFT from right ones."""
    base, tokenizer = base_model(
        task, seed=seed, steps=config.base_steps, hidden_size=48, num_heads=4
    )
    generator = torch.Generator().manual_seed(seed + 2000)
    rows = equal_prompts(task.sample(2 * config.questions, generator), tokenizer)
    rows = rows[: config.questions]

    def accuracy(model: Any) -> float:
        return evaluate(model, tokenizer, task, rows, generator=generator).accuracy

    settings = RLVRSettings(
        prompts=config.groups, samples=config.samples, learning_rate=config.learning_rate
    )
    rl = copy.deepcopy(base)
    learner = RLVRLearner(rl, tokenizer, task, dr_grpo, settings, seed=seed)
    for _ in range(config.steps):
        learner.advance()
    metrics = {"base/accuracy": accuracy(base), "rl/accuracy": accuracy(rl)}
    sft = copy.deepcopy(base)
    for _ in range(40):  # to the same accuracy
        finetune(
            sft,
            tokenizer,
            task,
            generator=generator,
            demonstrations=128,
            steps=4,
            batch_size=32,
            learning_rate=config.learning_rate,
        )
        metrics["sft/accuracy"] = accuracy(sft)
        if metrics["sft/accuracy"] >= metrics["rl/accuracy"] - 0.01:
            break
    models = Models(base.eval(), rl.eval(), sft.eval(), tokenizer, task, rows)
    return models, metrics


def equal_prompts(rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """Keep the prompts of the most frequent length: no padding, one cache for all."""
    lengths = encode_rows(tokenizer, rows)[1].sum(-1)
    return [row for row, keep in zip(rows, lengths == lengths.mode().values, strict=True) if keep]


def shift_metrics(models: Models, changed: Any, generator: torch.Generator) -> dict[str, float]:
    """Shift from the base along answers of the changed model."""
    prompts = encode_rows(models.tokenizer, models.rows)
    drawn = sample(
        changed, *prompts, max_new_tokens=models.task.max_new_tokens, generator=generator
    )
    shift = model_token_shift(
        models.base, changed, torch.cat((prompts[0], drawn.tokens), 1), top_k=5
    )
    start = prompts[0].shape[1] - 1
    shift = type(shift)(*(field[:, start:] for field in shift))
    summary = shift_summary(shift.js, drawn.mask)
    table = rank_table(shift, drawn.mask, js_threshold=HEADLINE)
    percentiles = dict(zip(("p50", "p90", "p95", "p99"), summary.percentiles.tolist(), strict=True))
    return {
        "share_below": summary.share_below.item(),
        "share_above": summary.share_above.item(),
        "top1_in_base_top5": table.rl_top1_in_base_top[4].item(),
        "new_tokens": table.new_token_share.item(),
        **{f"js_{name}": value for name, value in percentiles.items()},
    }


def mix(
    models: Models,
    direction: str,
    threshold: float,
    ends: tuple[float, float],
    generator: torch.Generator,
) -> dict[str, float]:
    """Cross-sample at a threshold, and with as many switches at random positions."""
    forward = direction == "forward"
    host, other = (models.base, models.rl) if forward else (models.rl, models.base)
    start, end = ends if forward else ends[::-1]
    gap = end - start

    def traced(rule: SwitchRule) -> tuple[float, Any]:
        trace = trace_cross_sampling(
            CachedNextToken(host),
            CachedNextToken(other),
            encode_rows(models.tokenizer, models.rows)[0],
            rule=rule,
            max_new_tokens=models.task.max_new_tokens,
            generator=generator,
            eos_id=models.tokenizer.eos_token_id,
        )
        rewards = score(models.task, models.tokenizer, models.rows, trace.tokens, trace.mask)
        return rewards.mean().item(), trace

    accuracy, trace = traced(switch_above_js(threshold))
    moved = random_switch_positions(trace.switched, trace.mask, generator=generator)
    control, _ = traced(switch_at(moved))
    return {
        "accuracy": accuracy,
        "share": (trace.switched.sum() / trace.mask.sum()).item(),
        "switches": trace.switched.sum(-1).double().mean().item(),
        "effective": trace.effective.sum(-1).double().mean().item(),
        "recovered": (accuracy - start) / gap if abs(gap) > 1e-6 else 0.0,
        "control": control,
        "control_recovered": (control - start) / gap if abs(gap) > 1e-6 else 0.0,
    }


# ---- 3. Advantages weighted by divergence ---------------------------------------------------


def run_weights(config: Config, lab: Lab) -> dict[str, float]:
    """Boost tokens that have moved much, or little, with four epochs a batch; claim nothing."""
    task = TASKS["modular"]()
    steps = config.base_steps * LONGER["modular"]
    base: list[Any] = []

    def make(scale: float) -> RLVRLearner:
        if not base:
            base.extend(base_model(task, seed=lab.seed, steps=steps, hidden_size=48, num_heads=4))
        settings = RLVRSettings(
            prompts=config.groups,
            samples=config.samples,
            epochs=4,
            learning_rate=config.learning_rate,
        )
        objective = partial(weighted_grpo, scale=scale)
        model = copy.deepcopy(base[0])
        return RLVRLearner(model, base[1], task, objective, settings, seed=lab.seed)

    metrics: dict[str, float] = {}
    for name, scale in (("plain", 0.0), ("high", 1.0), ("low", -1.0)):
        rows = lab.train(f"weights/{name}", partial(make, scale), total=config.steps)
        late = rows[-max(1, len(rows) // 5) :]
        metrics[f"weights/{name}/reward"] = sum(row["reward"] for row in late) / len(late)
    return metrics


def weighted_grpo(rollouts: Rollouts, *, scale: float, alpha: float = 10.0) -> Update:
    """Weigh each token by its divergence from the old policy, estimated by k3."""
    advantages = group_relative_advantages(rollouts.rewards, rollouts.groups)

    def loss(log_ratio: Tensor, index: Tensor) -> Tensor:
        moved = log_ratio.detach()
        weights = divergence_weights(moved.exp() - 1 - moved, scale=scale, alpha=alpha)
        weighted = weights * advantages[index, None]
        ratio = log_ratio.exp()
        clipped = torch.minimum(ratio * weighted, ratio.clamp(0.8, 1.28) * weighted)
        mask = rollouts.mask[index]
        return -(clipped * mask).sum() / mask.sum()

    return Update(loss)


# ---- 4. Models with a past ------------------------------------------------------------------


def run_smollm2(config: Config, lab: Lab) -> dict[str, float]:
    """Compare SmolLM2 with itself after a short run of reinforcement learning."""
    if lab.seed != 0:
        return {}
    from steelyard.integrations.token_report import train_and_compare

    found = lab.compute(
        "smollm2",
        lambda: train_and_compare(
            "smollm2",
            reasoning_gym_task(  # part marks: a right number among other words counts for little
                "chain_sum", seed=0, form="text", max_new_tokens=16, **SUMS
            ),
            steps=config.smollm2_steps,
            seed=lab.seed,
            heat_map=lab.folder / "smollm2.html",
        ),
    )
    return prefixed("smollm2", found)


def run_checkpoints(config: Config, lab: Lab) -> dict[str, float]:
    """Compare two checkpoints of the user's on the user's prompts."""
    from steelyard.integrations.token_report import compare_checkpoints

    found = lab.compute(
        "comparison",
        lambda: compare_checkpoints(
            config.model,
            config.rl_model,
            config.prompts,
            prompt_column=config.prompt_column,
            max_new_tokens=config.max_new_tokens,
            seed=lab.seed,
            heat_map=lab.folder / f"heat_map{lab.seed or ''}.html",
        ),
    )
    return prefixed("comparison", found)


def figures(result: dict[str, Any]) -> "dict[str, Figure]":
    """Accuracy of the mixed models against the threshold, beside random positions."""
    from steelyard.lab.plots import draw_against

    config, seeds = result["config"], list(result["metrics"].values())
    drawn: dict[str, Figure] = {}
    for task in () if config["model"] else set(config["parts"]) & set(TASKS):
        panels = {
            (direction, label): {
                rule: {
                    threshold: [
                        values[f"{task}/{direction}/js={threshold}/{key}"] for values in seeds
                    ]
                    for threshold in THRESHOLDS
                }
                for rule, key in keys.items()
            }
            for direction in ("forward", "backward")
            for label, keys in (
                ("share of right answers", {"where they differ": "accuracy", "random": "control"}),
                ("switched tokens an answer", {"where they differ": "switches"}),
            )
        }
        title = f"{task}: switching where the models differ, and anywhere"
        drawn[f"{task}-cross-sampling"] = draw_against(panels, "threshold (nats)", title)
    return drawn
