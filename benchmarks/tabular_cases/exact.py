"""The best monotone partition of many pre-bins: dynamic programming beside integer solvers."""

import numpy as np

from paired import OURS, Contest, Run

SHARE, ROWS = 0.03, 50_000


def contest(prebins: int, bins: int, seconds: int) -> Contest:
    """The solvers of ``optbinning`` stop after ``seconds``, whether their optimum is proved or not.

    Ours proves its own: the programme is exact.
    """
    runs = runs_of(prebins, bins, seconds)
    return Contest(runs, lambda: errors(runs), runs_of(10, 4, 2))


def runs_of(prebins: int, bins: int, seconds: int) -> dict[str, Run]:
    import optbinning

    from steelyard.tabular import optimal_bins

    random = np.random.default_rng(0)
    x = random.random(ROWS)
    rate = np.linspace(0.05, 0.4, prebins) * np.exp(0.3 * random.standard_normal(prebins))
    code = np.minimum((x * prebins).astype(np.int64), prebins - 1)
    y = (random.random(ROWS) < rate[code]).astype(np.int64)
    cuts = np.arange(1, prebins) / prebins
    good, bad = (np.bincount(code, w, minlength=prebins) for w in (1 - y, y))

    def ours() -> float:
        return optimal_bins(
            good, bad, max_bins=bins, min_bin_share=SHARE, monotonic="decreasing"
        ).iv

    def theirs(solver: str) -> Run:
        def run() -> float:
            found = optbinning.OptimalBinning(
                user_splits=cuts,
                max_n_prebins=prebins,
                min_prebin_size=1e-4,
                max_n_bins=bins,
                min_bin_size=SHARE,
                monotonic_trend="ascending",  # of the rate of bads
                solver=solver,
                time_limit=seconds,
            ).fit(x, y)
            found.binning_table.build()
            return float(found.binning_table.iv)

        return run

    return {OURS: ours} | {f"optbinning {s.upper()}": theirs(s) for s in ("cp", "mip")}


def errors(runs: dict[str, Run]) -> dict[str, float]:
    """How much of the optimum the others miss; none may be above it."""
    found = {name: run() for name, run in runs.items()}
    if max(found.values()) > found[OURS] * (1 + 1e-9):
        raise AssertionError(f"a peer is above the optimum: {found}")
    return {name: 1 - value / found[OURS] for name, value in found.items()}
