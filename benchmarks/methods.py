"""Measure the methods beside other packages: optimisers, losses, samplers, scores, a network.

Everything runs on one thread. Each case has a process of its own, where the contestants must first
agree. Memory: every contestant runs once in a fork; its peak beyond what the fork held at the
start. Time: rounds run all contestants in turn (A B C, then C B A), quick ones several times; the
figure to read is our CPU time over a peer's inside one round, median over the rounds, with the
smallest and the largest.

    python benchmarks/methods.py                # about 10 minutes; updates the committed result
    python benchmarks/methods.py --quick        # small sizes, one round; writes nothing
    python benchmarks/methods.py --only adamp dpp       # rows of tasks that were not run stay
    python benchmarks/methods.py --list         # the cases and the targets

What each case computes stands in ``benchmarks/method_cases/``.
"""

from collections.abc import Iterator

from suite import Case, Suite, Target, main

PACKAGES = (
    "steelyard",
    "torch",
    "numpy",
    "timm",
    "pytorch_optimizer",
    "pytorch-metric-learning",
    "dppy",
    "pymoo",
    "moocore",
)


def _cases() -> Iterator[Case]:
    for task in ("adamp", "sgdp"):
        for tensors in ("100 matrices", "240 mixed"):
            yield Case(
                task,
                "method_cases.optimisers",
                {"tensors": tensors},
                {"tensors": "small"},
                named=True,
            )
    yield Case(
        "tcm", "method_cases.pairs", {"n": 1024, "width": 128}, {"n": 256, "width": 128}, named=True
    )
    for task in ("tcm", "opis", "tcm_opis"):
        yield Case(
            task,
            "method_cases.pairs",
            {"n": 8192, "width": 128},
            {"n": 1280, "width": 128},
            named=True,
        )
    size = {"rows": 512, "classes": 10_000, "top_k": 5}
    yield Case("ldr", "method_cases.label_robust", size, size | {"rows": 32})
    for task in ("dpp", "volume"):
        size = {"candidates": 10_000, "width": 50}
        yield Case(task, "method_cases.designs", size, size | {"candidates": 1000}, named=True)
    for width, layers in ((32, 0), (64, 2), (256, 4)):
        size = {"candidates": 64, "length": 128, "width": width, "layers": layers}
        yield Case("info_gain", "method_cases.decoding", size, size | {"candidates": 8})
    size = {"points": 1000, "objectives": 3}
    yield Case("hypervolume", "method_cases.volumes", size, size | {"points": 100})
    size = {"systems": 600, "particles": 5, "directions": 12, "hidden": 64, "layers": 5}
    yield Case("ponita", "method_cases.messages", size, size | {"systems": 20, "hidden": 16})


TARGETS = (
    *(Target(task, "time", "timm", 1 / 3) for task in ("adamp", "sgdp")),
    *(Target(task, "time", "torch AdamW fused", 3.0) for task in ("adamp", "sgdp")),
    *(
        Target(task, figure, "pytorch-metric-learning", most, 8192)
        for task in ("tcm", "tcm_opis")
        for figure, most in (("memory", 0.3), ("time", 0.7))
    ),
    Target("ldr", "time", "plain torch", 1 / 5),
    Target("dpp", "time", "DPPy", 1 / 3),
    Target("volume", "time", "DPPy", 1 / 3),
    Target("info_gain", "time", "one call", 1 / 5),
    Target("hypervolume", "time", "pymoo", 1.0),
    Target("ponita", "time", "plain torch", 1 / 2),
)

SUITE = Suite("methods", tuple(_cases()), TARGETS, PACKAGES)

if __name__ == "__main__":
    main(SUITE, __file__, __doc__)
