"""Measure PLD and SinKD, forward and backward, beside plain KD, the paper's listing and POT.

Everything runs on one thread, in float32, on a batch of 256. Each case has a process of its own,
where the contestants that compute the same must first agree; KD computes something else and is the
measure of what a distillation loss costs. Memory: the peak of one run in a fork beyond what the
fork held at the start. Time: rounds run all contestants in turn (A B C, then C B A); the figure to
read is our CPU time over another's inside one round, median over the rounds, with smallest and
largest.

    python benchmarks/distillation.py               # about 15 minutes; updates the committed result
    python benchmarks/distillation.py --quick       # a small batch, one round; writes nothing
    python benchmarks/distillation.py --only pld    # rows of tasks that were not run stay
"""

from typing import Any

from paired import OURS, Contest, Run, agreeing
from suite import Case, Suite, Target, main

PACKAGES = ("steelyard", "torch", "numpy", "POT")
KD, LISTING, KEPT = "steelyard KD", "plain torch PLD", "steelyard, order kept"
POT, HELD = "POT ot.sinkhorn", "steelyard, plan held"
TASKS = ("pld", "sinkd")
CLASSES = (1000, 100_000)
BATCH, QUICK_BATCH = 256, 32
ITERATIONS, EPSILON, TEMPERATURE = 20, 0.1, 2.0


def contest(task: str, batch: int, classes: int) -> Contest:
    """What takes part in a case."""
    import torch

    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(batch, classes, generator=generator)
    start = 3 * torch.randn(batch, classes, generator=generator)
    labels = torch.randint(classes, (batch,), generator=generator)
    losses = {"pld": pld_losses, "sinkd": sinkd_losses}[task](teacher, labels)

    def step(loss: Any, start: Any) -> Run:
        """One forward and backward pass; returns the loss and the gradient."""

        def run() -> Any:
            student = start.clone().requires_grad_()
            value = loss(student)
            value.backward()
            return value.detach(), student.grad

        return run

    def errors() -> dict[str, float]:
        found = {name: step(loss, start)() for name, loss in losses.items() if name != KD}
        agreeing({name: value for name, (value, _) in found.items()}, OURS, 1e-4)
        # With the plan held constant the gradient is another one.
        gradients = {name: gradient for name, (_, gradient) in found.items() if name != HELD}
        return agreeing(gradients, OURS, 1e-3)

    return Contest({name: step(loss, start) for name, loss in losses.items()}, errors)


def pld_losses(teacher: Any, labels: Any) -> dict[str, Any]:
    """PLD; its formula in plain PyTorch; PLD with the teacher's order computed once; KD."""
    import torch

    from steelyard.distillation import kd_loss, plackett_luce_loss, pld_loss

    def listing(student: Any) -> Any:
        """Sort ascending with the label last, running log-sum-exp from the left."""
        lifted = teacher.scatter(1, labels[:, None], torch.inf)
        order = lifted.argsort(dim=1)
        ranked = student.gather(1, order)
        weights = teacher.softmax(1).gather(1, order)
        return (weights * (ranked.logcumsumexp(1) - ranked)).sum(1).mean()

    lifted = teacher.scatter(1, labels[:, None], torch.inf)
    order = lifted.argsort(dim=1, descending=True, stable=True)
    weights = teacher.softmax(1).gather(1, order)
    return {
        OURS: lambda student: pld_loss(student, teacher, labels),
        LISTING: listing,
        KEPT: lambda student: plackett_luce_loss(student, order, weights),
        KD: lambda student: kd_loss(student, teacher, labels),
    }


def sinkd_losses(teacher: Any, labels: Any) -> dict[str, Any]:
    """SinKD through its iterations; POT on the same cost, as many iterations; KD."""
    import ot
    import torch

    from steelyard.distillation import kd_loss, sinkhorn_kd_loss

    mass = torch.full((len(teacher),), 1 / len(teacher))

    def pot(student: Any) -> Any:
        p, q = ((logits / TEMPERATURE).softmax(1) for logits in (student, teacher))
        cost = torch.cdist(p, q, p=1.0)
        # POT ends with the rows of the plan, ours with the columns: transpose.
        options: dict[str, Any] = {"numItermax": ITERATIONS, "stopThr": 0.0, "warn": False}
        plan = ot.sinkhorn(mass, mass, cost.T, EPSILON, method="sinkhorn", **options).T
        return len(teacher) * (plan * cost).sum()

    return {
        OURS: lambda student: sinkhorn_kd_loss(student, teacher),
        HELD: lambda student: sinkhorn_kd_loss(student, teacher, gradient="detach"),
        POT: pot,
        KD: lambda student: kd_loss(student, teacher, labels),
    }


SUITE = Suite(
    "distillation",
    [
        Case(task, "distillation", {"classes": classes, "batch": BATCH}, quick, named=True)
        for task in TASKS
        for classes, quick in zip(
            CLASSES, ({"classes": CLASSES[0], "batch": QUICK_BATCH}, None), strict=True
        )
    ],
    [Target("pld", "time", KD, 2.0), Target("sinkd", "time", POT, 1.0)],
    PACKAGES,
)

if __name__ == "__main__":
    main(SUITE, __file__, __doc__)
