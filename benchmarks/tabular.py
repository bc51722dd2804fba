"""Measure the tabular, ordinal and causal methods beside the packages that people use for them.

Everything runs on one thread. Each case has a process of its own, where the contestants must first
agree. Memory: every contestant runs once in a fork; its peak beyond what the fork held at the
start. Time: rounds run all contestants in turn (A B C, then C B A), quick ones several times; the
figure to read is our CPU time over a peer's inside one round, median over the rounds, with the
smallest and the largest.

    python benchmarks/tabular.py                # about an hour; updates the committed result
    python benchmarks/tabular.py --quick        # small sizes, one round; writes nothing
    python benchmarks/tabular.py --only presto binning      # rows of other tasks stay
    python benchmarks/tabular.py --list         # the cases and the targets

The Parquet files (about 1.3 GB) are written by DuckDB into a temporary folder and deleted. What
each case computes stands in ``benchmarks/tabular_cases/``.
"""

from collections.abc import Iterator

from suite import Case, Suite, Target, main

PACKAGES = (
    "steelyard",
    "torch",
    "numpy",
    "scipy",
    "pandas",
    "duckdb",
    "optbinning",
    "ortools",
    "cvxpy",
    "clarabel",
)


def _cases() -> Iterator[Case]:
    for columns in (50, 200):
        size = {"columns": columns, "rows": 100_000}
        quick = {"columns": 3, "rows": 5000} if columns == 50 else None
        yield Case("binning", "tabular_cases.binning", size, quick, most_rounds=3)
    size = {"rows": 10_000_000, "columns": 100}
    quick = {"rows": 50_000, "columns": 5}
    for task in ("parquet_iv", "parquet_psi"):
        yield Case(task, "tabular_cases.parquet", size, quick, named=True, most_rounds=1)
        few = size | {"columns": 2}
        yield Case(task, "tabular_cases.parquet", few, None, named=True, most_rounds=1)
    size = {"prebins": 100, "bins": 20, "seconds": 20}
    quick = size | {"prebins": 20, "seconds": 2}
    yield Case("exact_binning", "tabular_cases.exact", size, quick, most_rounds=1)
    size = {"rows": 2500, "features": 20, "classes": 4, "penalties": 1}
    quick = {"rows": 300, "features": 4, "classes": 3}
    yield Case("presto", "tabular_cases.presto", size, quick | {"penalties": 1})
    size = size | {"penalties": 100}
    yield Case("presto_path", "tabular_cases.presto", size, quick | {"penalties": 5}, most_rounds=3)
    for n in (512, 5000, 50_000):
        quick = {"n": 512} if n == 512 else None
        yield Case("dcov", "tabular_cases.dcov", {"n": n}, quick, most_rounds=3)
    for problems, divergence in ((1, "kl"), (500, "kl"), (500, "hellinger"), (500, "chi2")):
        size = {"problems": problems, "support": 20, "divergence": divergence}
        quick = size | {"problems": 3} if problems > 1 else None
        yield Case("bound", "tabular_cases.bounds", size, quick, most_rounds=3)


SUITE = Suite(
    "tabular",
    tuple(_cases()),
    (
        Target("binning", "time", "optbinning", 1 / 10),
        *(
            Target(task, figure, peers, most)
            for task in ("parquet_iv", "parquet_psi")
            for peers in ("pandas, whole", "pandas, a column", "optbinning")
            for figure, most in (("memory", 1 / 10), ("time", 1.0))
        ),
        Target("exact_binning", "seconds", "", 0.1),
        Target("presto", "time", "SciPy", 1.0),
        Target("presto_path", "time", "SciPy", 0.3),
        Target("dcov", "time", "plain torch", 1 / 10, 50_000),
        Target("dcov", "memory", "plain torch", 1 / 10, 50_000),
        Target("bound", "time", "cvxpy", 1 / 100),
    ),
    PACKAGES,
)

if __name__ == "__main__":
    main(SUITE, __file__, __doc__)
