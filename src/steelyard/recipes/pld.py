"""PLD against CE, label smoothing, KD, DKD, DIST and ListMLE: does a ranking teach best?

A small student learns from few labelled images and from a larger teacher that was trained on other
images of the same kind. PLD asks it for the teacher's order of the classes with the label first,
and has no mixing weight to tune. The labels are right ("clean"), or one in five is wrong for the
student and its validation split ("noisy"), or for the teacher too ("noisy-teacher").

Every method gets the same tuning budget: six settings of its own, the paper's first (Fashion-MNIST:
three); the validation split chooses, the test split is reported. All start from the same weights
and see the same batches. "untuned" is the first setting, without any choice.

digits       scikit-learn's digits: 100 images for the student, an MLP with 16 hidden units.
sensitivity  on digits: five mixing weights of KD, DKD and DIST, five temperatures of PLD.
fashion      Fashion-MNIST: 1,000 images for the student, a convolutional net.

Control "order", digits: PLD with the teacher's own favourite class in place of the label.

Source: Bassam, Zhu and Bian (2025), PLD, arXiv:2506.12542.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from steelyard._checks import check_choice, check_count, check_range
from steelyard.distillation import dist_loss, kd_loss, plackett_luce_loss, pld_loss
from steelyard.lab import Claim, Form, Lab, prefixed
from steelyard.preference import expected_calibration_error
from steelyard.recipes._pld_data import (
    STUDENTS,
    TEACHERS,
    Split,
    digits_splits,
    fashion_splits,
    seeded,
    spoiled,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # student logits, teacher logits, labels
Problems = Callable[[str, str], "Problem"]  # data set and condition

PARTS = ("digits", "sensitivity", "fashion")
CONDITIONS = ("clean", "noisy", "noisy-teacher")


@dataclass(frozen=True)
class Config:
    """What is run, and how large."""

    parts: tuple[str, ...] = ("digits", "sensitivity")
    """Which of digits, sensitivity, fashion."""
    conditions: tuple[str, ...] = ("clean", "noisy")
    """Which of clean, noisy, noisy-teacher."""
    wrong: float = 0.2
    """Share of wrong labels where they are noisy."""
    learning_rate: float = 5e-3
    digits_images: int = 100
    """For the student; as many again to validate, 900 for the teacher, the rest to test."""
    digits_epochs: int = 120
    fashion_images: int = 1000
    """For the student; half as many to validate, the published test set to test."""
    fashion_teacher_images: int = 10_000
    fashion_epochs: int = 10
    fashion_settings: int = 3
    """How many of a method's six settings are tried, the first ones."""

    def __post_init__(self) -> None:
        for part in self.parts:
            check_choice("parts", part, PARTS)
        for condition in self.conditions:
            check_choice("conditions", condition, CONDITIONS)
        check_range("wrong", self.wrong, at_least=0.0, at_most=0.9)
        for name in ("digits_epochs", "fashion_epochs", "fashion_settings"):
            check_count(name, getattr(self, name))
        for name, most in (("digits", 400), ("fashion", 20_000), ("fashion_teacher", 30_000)):
            count = getattr(self, f"{name}_images")
            check_range(f"{name}_images", count, at_least=10, at_most=most)
        check_range("learning_rate", self.learning_rate, above=0.0)


QUICK = Form(Config(), seeds=5, minutes=3, threads=1)
FULL = Form(Config(parts=PARTS), seeds=7, minutes=7, threads=1)
UNITS = {"accuracy": "accuracy on the test split"}

_PAPER = "Bassam, Zhu and Bian (2025), arXiv:2506.12542"


def _above(
    place: str, rival: str, words: str, source: str = _PAPER, *, key: str = "accuracy"
) -> Claim:
    return Claim(
        f"{words}: PLD above {rival.upper() if rival != 'listmle' else 'ListMLE'}",
        source,
        metric=f"{place}/pld/{key}",
        baseline=f"{place}/{rival}/{key}",
        direction="higher",
    )


def _claims() -> Iterator[Claim]:
    words = {"clean": "right labels", "noisy": "one label in five wrong"}
    for data, rivals in (("digits", ("ce", "listmle", "kd", "dist")), ("fashion", ("ce", "kd"))):
        for condition, labels in words.items():
            for rival in rivals:
                yield _above(f"{data}/{condition}", rival, f"{data}, {labels}, tuned alike")
    knobless = f"{_PAPER}, no mixing weight"
    for condition, labels in words.items():
        place, untuned = f"digits/{condition}", "the papers' settings untuned"
        yield _above(place, "kd", f"digits, {labels}, {untuned}", knobless, key="untuned")
        for rival in ("kd", "dist"):
            yield Claim(
                f"digits, {labels}: PLD loses less to a bad temperature than {rival.upper()} to a "
                "bad mixing weight (best minus worst of five)",
                knobless,
                metric=f"sensitivity/{condition}/pld/spread",
                baseline=f"sensitivity/{condition}/{rival}/spread",
                direction="lower",
            )
    yield Claim(
        "PLD gains more over CE when labels are wrong than when they are right",
        "derived: a wrong label has little weight",
        metric="digits/noisy/pld/gain",
        baseline="digits/clean/pld/gain",
        direction="higher",
    )
    yield Claim(
        "Control: with wrong labels the teacher's own order, without any label, is within a point "
        "of PLD",
        "derived: then the teacher carries it",
        metric="digits/noisy/order/accuracy",
        baseline="digits/noisy/pld/accuracy",
        direction="higher",
        margin=-0.01,
    )


CLAIMS: tuple[Claim, ...] = tuple(_claims())


def run(config: Config, lab: Lab) -> dict[str, float]:
    """Run the chosen parts for one seed."""

    @cache
    def teacher(data: str, noisy: bool) -> nn.Module:
        return train_teacher(config, data, lab.seed, noisy=noisy)

    @cache
    def problem(data: str, condition: str) -> Problem:
        chosen = teacher(data, condition == "noisy-teacher")
        return make_problem(config, data, condition, chosen, lab.seed)

    metrics: dict[str, float] = {}
    for part in config.parts:
        if part == "sensitivity":
            metrics |= run_sensitivity(config, lab, problem)
        else:
            metrics |= run_data(config, lab, problem, part)
    return metrics


# ---- the methods ----------------------------------------------------------------------------


def cross_entropy(
    student: Tensor, teacher: Tensor, labels: Tensor, *, smoothing: float = 0.0
) -> Tensor:
    """Labels only; the teacher is not used."""
    return functional.cross_entropy(student, labels, label_smoothing=smoothing)


def decoupled_kd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    non_target: float = 8.0,
    temperature: float = 4.0,
    mixing: float = 0.5,
) -> Tensor:
    """DKD: KL of the label against the rest, and KL among the rest, weighted apart.

    ``mixing`` 1/2 is the published sum of cross-entropy and divergences, up to a factor.
    """
    hit = functional.one_hot(labels, student.shape[1]).bool()

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = (logits / temperature).log_softmax(1)
        others = logprobs[~hit].reshape(len(logits), -1)
        return torch.stack([logprobs[hit], others.logsumexp(1)]), others.log_softmax(1)

    (p, p_rest), (q, q_rest) = parts(teacher), parts(student)
    target, rest = (p.exp() * (p - q)).sum(0), (p_rest.exp() * (p_rest - q_rest)).sum(1)
    soft = temperature**2 * (target + non_target * rest).mean()
    return 2 * (mixing * functional.cross_entropy(student, labels) + (1 - mixing) * soft)


def dist(
    student: Tensor, teacher: Tensor, labels: Tensor, *, mixing: float, temperature: float
) -> Tensor:
    """DIST with weights that sum to 1, equal for rows and columns; 0.1 is that of the paper."""
    share = (1 - mixing) / 2
    return dist_loss(
        student, teacher, labels, alpha=mixing, beta=share, gamma=share, temperature=temperature
    )


def list_mle(student: Tensor, teacher: Tensor, labels: Tensor, *, falling: bool = False) -> Tensor:
    """The same permutation as PLD, with fixed weights: equal, or halved from rank to rank."""
    classes = student.shape[1]
    label_first = teacher.scatter(1, labels[:, None], torch.inf)
    order = label_first.argsort(dim=1, descending=True, stable=True)
    ranks = torch.arange(classes - 1, -1, -1, dtype=student.dtype)
    weights = 2**ranks - 1 if falling else torch.ones_like(ranks)
    return plackett_luce_loss(student, order, (weights / weights.sum()).expand_as(student))


def teacher_order(
    student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float
) -> Tensor:
    """PLD that never sees a label."""
    return pld_loss(student, teacher, teacher.argmax(1), temperature=temperature)


class Setting(NamedTuple):
    """One way to run a method."""

    loss: Loss
    weight_decay: float = 0.01


# Six settings each, the first as published for ImageNet (DKD: CIFAR-100).
TEMPERATURES = (1.0, 2.0, 4.0, 0.5, 1.5, 8.0)
METHODS: dict[str, tuple[Setting, ...]] = {
    "ce": tuple(Setting(cross_entropy, decay) for decay in (0.01, 0.1, 1.0, 0.0, 0.03, 0.3)),
    "ls": tuple(
        Setting(partial(cross_entropy, smoothing=s)) for s in (0.1, 0.3, 0.02, 0.05, 0.2, 0.4)
    ),
    "kd": tuple(
        Setting(partial(kd_loss, alpha=a, temperature=t))
        for a in (0.1, 0.5)
        for t in (2.0, 1.0, 4.0)
    ),
    "dkd": tuple(
        Setting(partial(decoupled_kd, non_target=b, temperature=t))
        for t in (4.0, 2.0)
        for b in (8.0, 2.0, 1.0)
    ),
    "dist": tuple(
        Setting(partial(dist, mixing=a, temperature=t)) for a in (0.1, 0.2) for t in (1.0, 2.0, 4.0)
    ),
    "listmle": tuple(
        Setting(partial(list_mle, falling=falling), decay)
        for falling in (False, True)
        for decay in (0.01, 0.1, 1.0)
    ),
    "order": tuple(Setting(partial(teacher_order, temperature=t)) for t in TEMPERATURES),
    "pld": tuple(Setting(partial(pld_loss, temperature=t)) for t in TEMPERATURES),
}

# What `sensitivity` turns: everything else as published.
MIXING = (0.1, 0.3, 0.5, 0.7, 0.9)
KNOBS: dict[str, tuple[Setting, ...]] = {
    "kd": tuple(Setting(partial(kd_loss, alpha=a, temperature=2.0)) for a in MIXING),
    "dkd": tuple(Setting(partial(decoupled_kd, mixing=a)) for a in MIXING),
    "dist": tuple(Setting(partial(dist, mixing=a, temperature=1.0)) for a in MIXING),
    "pld": tuple(Setting(partial(pld_loss, temperature=t)) for t in (0.5, 1.0, 2.0, 4.0, 8.0)),
}


# ---- data and models ------------------------------------------------------------------------


class Schedule(NamedTuple):
    """How long and how fast is trained."""

    learning_rate: float
    epochs: int
    batch_size: int
    seed: int


class Problem(NamedTuple):
    """What a student is given, and how it is judged."""

    train: Split
    validation: Split
    test: Split
    teacher: nn.Module
    on_test: Tensor
    """The teacher's logits."""
    student: Callable[[], nn.Module]
    schedule: Schedule


def splits_of(config: Config, data: str, seed: int) -> dict[str, Split]:
    """Images for teacher and student, to validate and to test."""
    if data == "digits":
        return digits_splits(config.digits_images, seed)
    return fashion_splits(config.fashion_images, config.fashion_teacher_images, seed)


def train_teacher(config: Config, data: str, seed: int, *, noisy: bool) -> nn.Module:
    """Train the teacher on its own images with cross-entropy."""
    images, labels = splits_of(config, data, seed)["teacher"]
    if noisy:
        labels = spoiled(labels, config.wrong, seed + 3)
    model = seeded(TEACHERS[data], seed + 1)
    epochs, rate = (60, 2e-3) if data == "digits" else (5, 1e-3)
    schedule = Schedule(rate, epochs, 100, seed)
    fit(model, None, Split(images, labels), Setting(cross_entropy), schedule)
    return model.eval()


def make_problem(
    config: Config, data: str, condition: str, teacher: nn.Module, seed: int
) -> Problem:
    """Put together what a student is given under a condition."""
    splits = splits_of(config, data, seed)
    if condition != "clean":
        for number, name in enumerate(("train", "validation")):
            images, labels = splits[name]
            splits[name] = Split(images, spoiled(labels, config.wrong, seed + 10 + number))
    epochs, batch = (config.digits_epochs, 50) if data == "digits" else (config.fashion_epochs, 100)
    with torch.no_grad():
        on_test = teacher(splits["test"].images)
    return Problem(
        splits["train"],
        splits["validation"],
        splits["test"],
        teacher,
        on_test,
        partial(seeded, STUDENTS[data], seed + 2),
        Schedule(config.learning_rate, epochs, batch, seed),
    )


# ---- training and measuring -----------------------------------------------------------------


def fit(
    model: nn.Module, teacher: nn.Module | None, data: Split, setting: Setting, how: Schedule
) -> None:
    """Train in place with AdamW and a cosine; images get a little noise, the same for all."""
    generator = torch.Generator().manual_seed(how.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=how.learning_rate, weight_decay=setting.weight_decay
    )
    count = len(data.labels)
    total = how.epochs * -(-count // how.batch_size)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    for _ in range(how.epochs):
        order = torch.randperm(count, generator=generator)
        for start in range(0, count, how.batch_size):
            index = order[start : start + how.batch_size]
            images = data.images[index]
            images = images + 0.1 * torch.randn(images.shape, generator=generator)
            logits = model(images)
            with torch.no_grad():
                target = logits.detach() if teacher is None else teacher(images)
            optimizer.zero_grad()
            loss = setting.loss(logits, target, data.labels[index])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            cosine.step()


def student_of(problem: Problem, setting: Setting) -> nn.Module:
    """Train one student."""
    model = problem.student()
    fit(model, problem.teacher, problem.train, setting, problem.schedule)
    return model.eval()


@torch.no_grad()
def measure(model: nn.Module, target: Tensor, data: Split) -> dict[str, float]:
    """Accuracy, calibration error, KL from the teacher and Kendall's tau of the class orders."""
    student = model(data.images)
    confidence, predicted = student.softmax(1).max(1)
    right = predicted == data.labels
    gaps = target.log_softmax(1) - student.log_softmax(1)
    return {
        "accuracy": right.float().mean().item(),
        "ece": expected_calibration_error(confidence, right, bins=15).item(),
        "kl": (target.softmax(1) * gaps).sum(1).mean().item(),
        "kendall": kendall(student, target).item(),
    }


def kendall(a: Tensor, b: Tensor) -> Tensor:
    """Mean over rows of Kendall's tau between the orders of the columns (ties count 0)."""
    first, second = torch.triu_indices(a.shape[1], a.shape[1], 1)
    agree = (a[:, first] - a[:, second]).sign() * (b[:, first] - b[:, second]).sign()
    return agree.mean()


@torch.no_grad()
def accuracy(model: nn.Module, data: Split) -> float:
    """Share of right answers."""
    right: Tensor = model(data.images).argmax(1) == data.labels
    return right.float().mean().item()


# ---- 1. and 3. Tuned alike ------------------------------------------------------------------


def run_data(config: Config, lab: Lab, problem: Problems, data: str) -> dict[str, float]:
    """Tune every method on the validation split; report the chosen one on the test split."""
    metrics: dict[str, float] = {}
    tried = 6 if data == "digits" else config.fashion_settings
    for condition in config.conditions:
        place = f"{data}/{condition}"

        def study(method: str, condition: str = condition) -> dict[str, float]:
            given = problem(data, condition)
            return facts(given) if method == "teacher" else tuned(given, METHODS[method][:tried])

        metrics |= prefixed(place, lab.compute(f"{place}/teacher", partial(study, "teacher")))
        for method in (m for m in METHODS if data == "digits" or m != "order"):
            name = f"{place}/{method}"
            metrics |= prefixed(name, lab.compute(name, partial(study, method)))
        gain = metrics[f"{place}/pld/accuracy"] - metrics[f"{place}/ce/accuracy"]
        metrics[f"{place}/pld/gain"] = gain
    return metrics


def facts(problem: Problem) -> dict[str, float]:
    """Accuracy of the teacher, and how often its favourite is the label that the student gets."""
    return {
        "teacher_accuracy": accuracy(problem.teacher, problem.test),
        "label_agreement": accuracy(problem.teacher, problem.train),
    }


def tuned(problem: Problem, settings: tuple[Setting, ...]) -> dict[str, float]:
    """Train with every setting; the first of the best on the validation split counts."""
    models = [student_of(problem, setting) for setting in settings]
    validation = [accuracy(model, problem.validation) for model in models]
    reached = [accuracy(model, problem.test) for model in models]
    best = validation.index(max(validation))
    return measure(models[best], problem.on_test, problem.test) | {
        "validation": validation[best],
        "setting": best,
        "untuned": reached[0],
        "worst": min(reached),
        "best": max(reached),
    }


# ---- 2. Sensitivity -------------------------------------------------------------------------


def run_sensitivity(config: Config, lab: Lab, problem: Problems) -> dict[str, float]:
    """Turn one knob of each method through five values, everything else as published."""
    metrics: dict[str, float] = {}
    for condition in config.conditions:
        for method, settings in KNOBS.items():

            def study(
                condition: str = condition, settings: tuple[Setting, ...] = settings
            ) -> dict[str, float]:
                given = problem("digits", condition)
                reached = [accuracy(student_of(given, each), given.test) for each in settings]
                curve = {f"value {number}": value for number, value in enumerate(reached, start=1)}
                return curve | {"spread": max(reached) - min(reached), "worst": min(reached)}

            name = f"sensitivity/{condition}/{method}"
            metrics |= prefixed(name, lab.compute(name, study))
    return metrics


def figures(result: dict[str, Any]) -> "dict[str, Figure]":
    """Accuracy along the five values of each method's knob."""
    from steelyard.lab.line_plots import draw_lines

    config, seeds = result["config"], list(result["metrics"].values())
    if "sensitivity" not in config["parts"]:
        return {}
    panels = {
        f"digits, {condition}": {
            method: {
                float(n): [
                    metrics[f"sensitivity/{condition}/{method}/value {n}"] for metrics in seeds
                ]
                for n in range(1, 6)
            }
            for method in KNOBS
        }
        for condition in config["conditions"]
    }
    label = "mixing weight 0.1 to 0.9 (PLD: temperature 0.5 to 8)"
    title, ylabel = "What a badly set knob costs", UNITS["accuracy"]
    return {"sensitivity": draw_lines(panels, label, ylabel, title, log_x=False)}
