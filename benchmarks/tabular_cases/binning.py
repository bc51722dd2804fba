"""Bins of all columns of a frame and their information values."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from paired import OURS, Contest, Run

PEER = "optbinning"
BINS, SHARE = 5, 0.05


def contest(columns: int, rows: int) -> Contest:
    """``optbinning`` solves each column by constraint programming on the bins of a tree."""
    runs = runs_of(*table(columns, rows))
    return Contest(runs, lambda: errors(runs), runs_of(*table(2, 2000)))


def table(columns: int, rows: int) -> tuple[Any, NDArray[np.int64]]:
    """Normal and skewed columns, the first ten with a signal; half of them with gaps."""
    import pandas

    random = np.random.default_rng(0)
    z = random.standard_normal((columns, rows))
    risk = z[:10].sum(0) / 3 + np.abs(z[0])
    y = (random.random(rows) < 1 / (1 + np.exp(2 - risk))).astype(np.int64)
    z[1::3] = np.exp(z[1::3])
    z[2::3] = z[2::3].round(1)
    z[::2][random.random(z[::2].shape) < 0.05] = np.nan
    return pandas.DataFrame({f"x{i}": column for i, column in enumerate(z)}), y


def runs_of(frame: Any, y: NDArray[np.int64]) -> dict[str, Run]:
    import optbinning

    from steelyard.tabular import WoEBinner

    def ours(method: Any) -> Run:
        binner = WoEBinner(BINS, method, smoothing=0.0, min_bin_share=SHARE)
        return lambda: binner.fit(frame, y).iv_

    def theirs() -> NDArray[np.float64]:
        values = []
        for name in frame.columns:
            found = optbinning.OptimalBinning(
                max_n_bins=BINS, min_bin_size=SHARE, monotonic_trend=None
            ).fit(frame[name].to_numpy(), y)
            found.binning_table.build()
            values.append(found.binning_table.iv)
        return np.array(values)

    return {OURS: ours("optimal"), "steelyard, boosted stumps": ours("xgboost"), PEER: theirs}


def errors(runs: dict[str, Run]) -> dict[str, float]:
    """How much of our information the others lack; they must not find more than we do."""
    found = {name: runs[name]().sum() for name in runs}
    if found[PEER] > found[OURS] * (1 + 1e-6):
        raise AssertionError(f"the peer finds more information: {found}")
    return {name: float(1 - value / found[OURS]) for name, value in found.items()}
