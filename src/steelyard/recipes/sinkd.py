"""SinKD against KL, reverse KL and JS: what does transport over the batch see?

SinKD transports the student's outputs on a batch onto the teacher's. The cost between two outputs
is their L1 distance, and which output belongs to which image does not enter. So it should be blind
to a shuffle of the teacher's outputs, which ruins every paired loss; and with one item it is twice
the total variation, which does not know how far apart two classes are.

mode      one item, 50 ordered bins: the bell-shaped student that is nearest to a teacher with two
          modes by KL, reverse KL, JS, SinKD and, as a contrast, by transport along the bins.
pairing   digits: 60 labels, and 900 images with the teacher's outputs, in their right order or
          shuffled within each batch. Every method has four settings, one chosen on a validation
          split.
grid      SinKD by its epsilon and its number of iterations, right order.

Source: Cui et al. (2024), SinKD, arXiv:2402.17110.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from steelyard._checks import check_choice, check_count, check_range
from steelyard.distillation import sinkhorn_kd_loss
from steelyard.divergences import JENSEN_SHANNON, KL, REVERSE_KL, FDivergence, f_divergence
from steelyard.lab import Claim, Form, Lab, prefixed
from steelyard.lab.data import digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Term = Callable[[Tensor, Tensor], Tensor]  # student logits, teacher logits

PARTS = ("mode", "pairing", "grid")
TEMPERATURE = 2.0  # of every loss, as in the published code
EPSILONS = (0.03, 0.1, 0.3, 1.0)
ITERATIONS = (5, 20)


@dataclass(frozen=True)
class Config:
    """What is run, and how large."""

    parts: tuple[str, ...] = ("mode", "pairing")
    """Which of mode, pairing, grid."""
    shuffled: tuple[float, ...] = (0.0, 1.0)
    """Shares of a batch whose teacher outputs are dealt to other images."""
    labelled: int = 60
    """Images with a label; the 900 with a teacher's output include them."""
    steps: int = 600
    batch_size: int = 32
    learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        for part in self.parts:
            check_choice("parts", part, PARTS)
        for share in self.shuffled:
            check_range("shuffled", share, at_least=0.0, at_most=1.0)
        check_count("steps", self.steps)
        check_range("labelled", self.labelled, at_least=1, at_most=900)
        check_range("batch_size", self.batch_size, at_least=2, at_most=900)
        check_range("learning_rate", self.learning_rate, above=0.0)


QUICK = Form(Config(), seeds=5, minutes=2, threads=1)
FULL = Form(Config(parts=PARTS, shuffled=(0.0, 0.5, 1.0)), seeds=10, minutes=6, threads=1)

_PAPER = "Cui et al. (2024), arXiv:2402.17110"
_RIGHT, _SHUFFLED = "pairing/shuffled=0.0", "pairing/shuffled=1.0"


def _beats(place: str, better: str, worse: str, words: str, source: str) -> Claim:
    return Claim(
        words,
        source,
        metric=f"{place}/{better}/accuracy",
        baseline=f"{place}/{worse}/accuracy",
        direction="higher",
    )


def _exactly(metric: str, words: str, source: str) -> Claim:
    return Claim(words, source, metric=metric, baseline=1e-9, direction="lower", min_seeds=1)


def _claims() -> Iterator[Claim]:
    blind = "derived: the plan ignores the order of the rows"
    words = "A shuffle of the teacher's rows moves SinKD by rounding only"
    yield _exactly("pairing/exact/difference", words, blind)
    yield Claim(
        "Shuffled outputs cost SinKD at most one point of accuracy",
        blind,
        metric=f"{_SHUFFLED}/sinkd/accuracy",
        baseline=f"{_RIGHT}/sinkd/accuracy",
        direction="higher",
        margin=-0.01,
    )
    yield Claim(
        "Shuffled outputs cost KD accuracy",
        "a paired loss",
        metric=f"{_SHUFFLED}/kd/accuracy",
        baseline=f"{_RIGHT}/kd/accuracy",
        direction="lower",
    )
    helps, fewer = f"{_PAPER}, distillation helps", "derived: a set tells less than pairs"
    for place, better, worse, words, source in (
        (_SHUFFLED, "sinkd", "kd", "Shuffled outputs: SinKD alone above KD", blind),
        (_SHUFFLED, "sinkd", "ce", "Shuffled outputs: SinKD alone above labels alone", blind),
        (_RIGHT, "kd", "ce", "Right order: KD above labels alone", helps),
        (_RIGHT, "sinkd", "ce", "Right order: SinKD above labels alone", helps),
        (_RIGHT, "kd+sinkd", "kd", "Right order: adding SinKD to KD improves on KD", _PAPER),
        (_RIGHT, "kd", "sinkd", "Limit: in right order SinKD alone is below KD", fewer),
    ):
        yield _beats(place, better, worse, words, source)
    yield from _mode_claims()


def _mode_claims() -> Iterator[Claim]:
    yield Claim(
        "Two modes: the student nearest by KL keeps the teacher's spread, to 5 %",
        "moment matching",
        metric="mode/kl/spread_error",
        baseline=0.05,
        direction="lower",
    )
    yield Claim(
        "Two modes: the student nearest by reverse KL sits on one of them, to a bin",
        f"{_PAPER}, motivation",
        metric="mode/reverse-kl/off_mode",
        baseline=1.0,
        direction="lower",
    )
    words = "One item: SinKD is twice the total variation"
    yield _exactly("mode/sinkd/tv_error", words, "derived: a plan of one entry")
    yield Claim(
        "Limit: with one item SinKD picks a mode too, to two bins",
        "derived: total variation",
        metric="mode/sinkd/off_mode",
        baseline=2.0,
        direction="lower",
    )
    words = (
        "Limit: renaming the classes leaves SinKD as it is: it cannot tell near from far classes"
    )
    yield _exactly("mode/sinkd/renaming_error", words, "derived: the L1 cost adds up over classes")
    yield Claim(
        "Contrast: the student nearest by transport along the bins spreads wider than by SinKD",
        "a cost that knows the bins",
        metric="mode/bins/std",
        baseline="mode/sinkd/std",
        direction="higher",
    )


CLAIMS: tuple[Claim, ...] = tuple(_claims())


def run(config: Config, lab: Lab) -> dict[str, float]:
    """Run the chosen parts for one seed."""

    @cache
    def problem() -> Problem:
        return make_problem(config, lab.seed)

    parts = {"mode": run_mode, "pairing": run_pairing, "grid": run_grid}
    metrics: dict[str, float] = {}
    for part in config.parts:
        metrics |= parts[part](config, lab, problem)
    return metrics


# ---- the losses -----------------------------------------------------------------------------


def divergence(student: Tensor, teacher: Tensor, kind: FDivergence) -> Tensor:
    """``kind(teacher || student)`` at the temperature, mean over the batch."""
    p, q = ((logits / TEMPERATURE).log_softmax(1) for logits in (student, teacher))
    return f_divergence(q, p, kind, reduction="mean")


def transport(
    student: Tensor, teacher: Tensor, *, epsilon: float = 0.1, iterations: int = 20
) -> Tensor:
    """SinKD by the item, so that its weight does not depend on the batch."""
    loss = sinkhorn_kd_loss(
        student, teacher, temperature=TEMPERATURE, epsilon=epsilon, num_iterations=iterations
    )
    return loss / len(student)


kd: Term = partial(divergence, kind=KL)


def weighted(student: Tensor, teacher: Tensor, *, terms: tuple[tuple[float, Term], ...]) -> Tensor:
    """Sum of weighted terms; no term is 0."""
    total = student.new_zeros(())
    for weight, term in terms:
        total = total + weight * term(student, teacher)
    return total


class Setting(NamedTuple):
    """One way to run a method: what is added to the cross-entropy of the labels."""

    term: Term
    weight_decay: float = 0.01


def _alone(term: Term) -> tuple[Setting, ...]:
    return tuple(Setting(partial(weighted, terms=((w, term),))) for w in (1.0, 0.3, 3.0, 10.0))


METHODS: dict[str, tuple[Setting, ...]] = {
    "ce": tuple(Setting(partial(weighted, terms=()), decay) for decay in (0.01, 0.0, 0.1, 1.0)),
    "kd": _alone(kd),
    "reverse-kl": _alone(partial(divergence, kind=REVERSE_KL)),
    "js": _alone(partial(divergence, kind=JENSEN_SHANNON)),
    "sinkd": _alone(transport),
    "kd+sinkd": tuple(
        Setting(partial(weighted, terms=((a, kd), (b, transport))))
        for a, b in ((1.0, 1.0), (3.0, 0.3), (3.0, 1.0), (10.0, 1.0))
    ),
}


# ---- 1. Mode behaviour in one dimension -----------------------------------------------------

BINS = 50


def run_mode(config: Config, lab: Lab, problem: "Callable[[], Problem]") -> dict[str, float]:
    """Look through all bell-shaped students for the nearest one."""
    return prefixed("mode", lab.compute("mode", partial(mode_study, lab.seed)))


def mode_study(seed: int) -> dict[str, float]:
    """Mean and spread of the nearest student by each loss, and what SinKD cannot see."""
    generator = torch.Generator().manual_seed(seed)
    low, gap, width, share = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    modes = (10 + 3 * low, 32 + 6 * gap)
    width, share = 1.5 + width, 0.35 + 0.3 * share
    grid = torch.arange(BINS, dtype=torch.float64)
    teacher = share * bell(grid, modes[0], width) + (1 - share) * bell(grid, modes[1], width)
    means = torch.linspace(0, BINS - 1, 4 * (BINS - 1) + 1, dtype=torch.float64)
    spreads = torch.logspace(-0.3, 1.5, 120, dtype=torch.float64)
    students = bell(grid, means[:, None, None], spreads[:, None]).flatten(0, 1)
    centre, spread = moments(teacher)
    metrics: dict[str, float] = {}
    for name, values in losses_on_bins(students, teacher).items():
        mean, std = moments(students[values.argmin()])
        metrics |= {
            f"{name}/mean_error": abs(mean - centre),
            f"{name}/std": std,
            f"{name}/spread_error": abs(std / spread - 1),
            f"{name}/off_mode": min(abs(mean - mode) for mode in modes),
        }
    return metrics | {f"sinkd/{key}": value for key, value in blindness(generator).items()}


def bell(grid: Tensor, mean: Any, std: Any) -> Tensor:
    """Gaussian shape on the bins, normalised over them."""
    scores: Tensor = -(((grid - mean) / std) ** 2) / 2
    return scores.softmax(-1)


def losses_on_bins(students: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    """Each loss of every student ``[S, bins]`` from the teacher ``[bins]``."""
    target = teacher.expand_as(students)
    p, q = students.log(), target.log()
    along = (students.cumsum(1) - target.cumsum(1)).abs().sum(1)  # cost |i - j|, in closed form
    return {
        "kl": f_divergence(q, p, KL),
        "reverse-kl": f_divergence(p, q, KL),
        "js": f_divergence(q, p, JENSEN_SHANNON),
        "sinkd": (students - target).abs().sum(1),  # a batch of one; checked in `blindness`
        "bins": along,
    }


def moments(probs: Tensor) -> tuple[float, float]:
    """Mean and standard deviation over the bins."""
    grid = torch.arange(len(probs), dtype=probs.dtype)
    mean = (probs * grid).sum()
    return mean.item(), (probs * (grid - mean) ** 2).sum().sqrt().item()


def blindness(generator: torch.Generator) -> dict[str, float]:
    """Largest deviation from twice the total variation, and by a renaming of the classes."""
    student, teacher = (
        3 * torch.randn(16, BINS, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    renamed = torch.randperm(BINS, generator=generator)
    gaps = [
        sinkhorn_kd_loss(s[None], t[None], temperature=1.0)
        - (s.softmax(0) - t.softmax(0)).abs().sum()
        for s, t in zip(student, teacher, strict=True)
    ]
    moved = transport(student[:, renamed], teacher[:, renamed]) - transport(student, teacher)
    return {"tv_error": max(abs(gap.item()) for gap in gaps), "renaming_error": abs(moved.item())}


# ---- 2. Pairing -----------------------------------------------------------------------------


class Problem(NamedTuple):
    """Images, labels and a trained teacher."""

    images: Tensor
    """The 900 with a teacher's output; the first so many are labelled."""
    labels: Tensor
    """Of the labelled."""
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    teacher: nn.Module


def make_problem(config: Config, seed: int) -> Problem:
    """Split the digits and train a teacher on 900 of them."""
    images, labels = (torch.from_numpy(array) for array in digits())
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    known, validation, test = order[:900], order[900:1100], order[1100:]
    teacher = seeded(64, 128, seed + 1)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(seed + 1)
    for _ in range(60):
        for batch in torch.randperm(900, generator=generator).reshape(9, 100):
            index = known[batch]
            optimizer.zero_grad()
            loss = functional.cross_entropy(teacher(images[index]), labels[index])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return Problem(
        images[known],
        labels[known[: config.labelled]],
        (images[validation], labels[validation]),
        (images[test], labels[test]),
        teacher.eval(),
    )


def seeded(inputs: int, hidden: int, seed: int) -> nn.Module:
    """One hidden layer; the weights depend on the seed alone."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def dealt(count: int, share: float, generator: torch.Generator) -> Tensor:
    """Whose teacher output each row of a batch gets: a share of them, in a ring, another's."""
    source = torch.arange(count)
    chosen = torch.randperm(count, generator=generator)[: round(share * count)]
    source[chosen] = chosen.roll(1)
    return source


def train_student(
    config: Config, problem: Problem, setting: Setting, share: float, seed: int
) -> nn.Module:
    """Cross-entropy on the labelled images plus a term on a batch of all."""
    student = seeded(64, 16, seed + 2)
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=config.learning_rate, weight_decay=setting.weight_decay
    )
    with torch.no_grad():
        outputs = problem.teacher(problem.images)
    batches, shuffles = (torch.Generator().manual_seed(seed + k) for k in (3, 4))
    labelled = problem.images[: len(problem.labels)]
    for _ in range(config.steps):
        index = torch.randperm(len(outputs), generator=batches)[: config.batch_size]
        target = outputs[index][dealt(len(index), share, shuffles)]
        logits = student(torch.cat([labelled, problem.images[index]]))
        hard = functional.cross_entropy(logits[: len(labelled)], problem.labels)
        optimizer.zero_grad()
        loss = hard + setting.term(logits[len(labelled) :], target)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return student.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Share of right answers."""
    images, labels = data
    right: Tensor = model(images).argmax(1) == labels
    return right.float().mean().item()


def run_pairing(config: Config, lab: Lab, problem: Callable[[], Problem]) -> dict[str, float]:
    """Tune every method under every shuffle, from the same weights and batches."""
    metrics = prefixed("pairing/exact", lab.compute("pairing/exact", partial(exact, lab.seed)))
    for share in config.shuffled:
        for method, settings in METHODS.items():
            name = f"pairing/shuffled={share}/{method}"

            def study(
                share: float = share, settings: tuple[Setting, ...] = settings
            ) -> dict[str, float]:
                return tuned(config, problem(), settings, share, lab.seed)

            metrics |= prefixed(name, lab.compute(name, study))
    return metrics


def tuned(
    config: Config, problem: Problem, settings: tuple[Setting, ...], share: float, seed: int
) -> dict[str, float]:
    """Train with every setting; the first of the best on the validation split counts."""
    found = []
    for number, setting in enumerate(settings):
        model = train_student(config, problem, setting, share, seed)
        found.append(
            {
                "accuracy": accuracy(model, problem.test),
                "validation": accuracy(model, problem.validation),
                "setting": float(number),
            }
        )
    best = max(found, key=lambda row: row["validation"])
    return best | {"untuned": found[0]["accuracy"]}


def exact(seed: int) -> dict[str, float]:
    """Largest change of the loss by a shuffle, and that of KD, in float64."""
    generator = torch.Generator().manual_seed(seed)
    changes: dict[str, list[float]] = {"difference": [], "kd_difference": []}
    for _ in range(20):
        student, teacher = (
            4 * torch.randn(32, 10, generator=generator, dtype=torch.float64) for _ in range(2)
        )
        other = teacher[dealt(32, 1.0, generator)]
        for key, loss in (("difference", transport), ("kd_difference", kd)):
            changes[key].append((loss(student, teacher) - loss(student, other)).abs().item())
    return {key: max(values) for key, values in changes.items()}


# ---- 3. Grid --------------------------------------------------------------------------------


def run_grid(config: Config, lab: Lab, problem: Callable[[], Problem]) -> dict[str, float]:
    """Accuracy of SinKD alone at weight 1, by epsilon and iterations."""
    metrics: dict[str, float] = {}
    for epsilon in EPSILONS:
        for iterations in ITERATIONS:
            setting = Setting(partial(transport, epsilon=epsilon, iterations=iterations))

            def study(setting: Setting = setting) -> dict[str, float]:
                model = train_student(config, problem(), setting, 0.0, lab.seed)
                return {"accuracy": accuracy(model, problem().test)}

            name = f"grid/epsilon={epsilon} n={iterations}"
            metrics |= prefixed(name, lab.compute(name, study))
    return metrics


def figures(result: dict[str, Any]) -> "dict[str, Figure]":
    """Accuracy against the share of shuffled outputs, and against epsilon."""
    from steelyard.lab.line_plots import draw_lines

    seeds = list(result["metrics"].values())

    def measured(place: str) -> list[float]:
        return [metrics[f"{place}/accuracy"] for metrics in seeds]

    config, ylabel = result["config"], "accuracy on the test split"
    drawn: dict[str, Figure] = {}
    if "pairing" in config["parts"]:
        cases = {
            "paired losses": ("ce", "kd", "reverse-kl", "js"),
            "with transport": ("ce", "sinkd", "kd+sinkd"),
        }
        panels = {
            case: {
                m: {s: measured(f"pairing/shuffled={s}/{m}") for s in config["shuffled"]}
                for m in methods
            }
            for case, methods in cases.items()
        }
        title, xlabel = (
            "Transport does not see a shuffle; paired losses do",
            "share of rows shuffled",
        )
        drawn["pairing"] = draw_lines(panels, xlabel, ylabel, title, log_x=False)
    if "grid" in config["parts"]:
        panels = {
            f"{n} iterations": {"sinkd": {e: measured(f"grid/epsilon={e} n={n}") for e in EPSILONS}}
            for n in ITERATIONS
        }
        title = "SinKD alone by its regularisation, weight 1"
        drawn["grid"] = draw_lines(panels, "epsilon", ylabel, title)
    return drawn
