"""The recipe on scorecards where the truth is known: true nulls, known laws, all partitions."""

from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from steelyard.lab.loans import Loans
from steelyard.tabular import iv_inference, woe_table

if TYPE_CHECKING:
    from steelyard.tabular import WoEBinner

__all__ = [
    "BINS",
    "LAWS",
    "LEVEL",
    "METHODS",
    "best_partitions",
    "counts",
    "dealt_anew",
    "expected_rejections",
    "information",
    "law_coverage",
    "noise",
    "population_coverage",
    "rejections",
]

Array = NDArray[np.float64]
Laws = tuple[Array, Array]

METHODS: dict[str, Literal["fixed", "delta"]] = {"published": "fixed", "corrected": "delta"}
LEVEL = 0.05
GOODS, BADS = 4250, 750
BINS = (2, 5, 10, 20)  # part null
LAWS = (0.022, 0.19, 0.64)  # information values in part coverage
SAMPLE = 3000  # rows drawn from the Taiwan data


def counts(codes: NDArray[Any], bad: Array) -> Laws:
    """Goods and bads of each code that occurs."""
    place = np.unique(codes, return_inverse=True)[1]
    good, ill = (np.bincount(place, weight).astype(np.float64) for weight in (1 - bad, bad))
    return good, ill


def information(codes: NDArray[Any], bad: Array) -> float:
    """Sum of the information values of the columns of bin numbers."""
    return sum(woe_table(*counts(column, bad), smoothing=0.5).iv for column in codes.T)


# ---- null -----------------------------------------------------------------------------------


def rejections(bins: int, draws: int, seed: int) -> dict[str, float]:
    """Both tests on goods and bads from one law."""
    random = np.random.default_rng((seed, bins))
    law = np.full(bins, 1 / bins)
    good, bad = (random.multinomial(total, law, size=draws) for total in (GOODS, BADS))
    return _rejected([(g, b) for g, b in zip(good, bad, strict=True)])


def dealt_anew(binner: "WoEBinner", draws: int, seed: int) -> dict[str, float]:
    """Both tests on the bins of German credit, outcomes permuted."""
    loans, random = Loans.read("german"), np.random.default_rng((seed, 1))
    codes = binner.fit(loans.features, loans.bad).bin_indices(loans.features)
    codes = codes[:, codes.max(0) > 0]
    samples: list[Laws] = []
    while len(samples) < draws:
        bad = random.permutation(loans.bad)
        samples += [counts(column, bad) for column in codes.T]
    return _rejected(samples)


def noise(binner: "WoEBinner", shuffles: int, seed: int) -> dict[str, float]:
    """The chi-square test on shuffled columns, in bins of the same rows and of other folds."""
    from steelyard.tabular import cross_fitted_iv

    loans, random = Loans.read("credit"), np.random.default_rng((seed, 2))
    same, crossed = [], []
    for _ in range(shuffles):
        features = random.permuted(loans.features, axis=0)
        found = binner.fit(features, loans.bad).evaluate(features, loans.bad)
        same += [1.0 if test is None else test.p_value for test in found.values()]
        other = cross_fitted_iv(binner, features, loans.bad, folds=2, seed=seed)
        crossed += [test.p_value for test in other.values()]
    return {"same_rows": _share_below(same), "cross_fitted": _share_below(crossed)}


def expected_rejections(bins: int) -> float:
    """Rejection rate of the published test under a true null, for large samples.

    Its statistic is near the root of a chi-square variable with ``bins - 1`` degrees of freedom,
    and it is compared with a normal quantile.
    """
    return float(stats.chi2.sf(stats.norm.ppf(1 - LEVEL) ** 2, bins - 1))


def _rejected(samples: list[tuple[Any, Any]]) -> dict[str, float]:
    return {
        name: _share_below(
            [iv_inference(*cells, method=m, smoothing=0.5).p_value for cells in samples]
        )
        for name, m in METHODS.items()
    }


def _share_below(p_values: list[float]) -> float:
    return float(np.mean(np.array(p_values) < LEVEL))


# ---- coverage -------------------------------------------------------------------------------


def tilted_laws(value: float) -> Laws:
    """Two laws on five bins with the given information value."""
    steps, good = np.linspace(-1, 1, 5), np.full(5, 0.2)

    def bad(tilt: float) -> Array:
        law: Array = special.softmax(tilt * steps)
        return law

    tilt = optimize.brentq(lambda t: woe_table(good, bad(t)).iv - value, 1e-6, 5.0)
    return good, bad(tilt)


def law_coverage(value: float, draws: int, seed: int) -> dict[str, float]:
    """Coverage over samples of 4,250 goods and 750 bads."""
    laws, random = tilted_laws(value), np.random.default_rng((seed, int(1000 * value)))
    return _coverage([(laws, value)], (GOODS, BADS), draws, random)


def population_coverage(binner: "WoEBinner", draws: int, seed: int) -> dict[str, float]:
    """Coverage over samples of 3,000 rows from the Taiwan data, its columns with IV above 0.02."""
    loans, random = Loans.read("taiwan"), np.random.default_rng((seed, 3))
    truths = []
    for bins in binner.fit(loans.features, loans.bad).columns_:
        laws = (bins.good / bins.good.sum(), bins.bad / bins.bad.sum())
        value = woe_table(*laws).iv  # no bin is empty: each holds 5 % of 30,000 rows
        if value > 0.02:
            truths.append((laws, value))
    bads = round(SAMPLE * float(loans.bad.mean()))
    return _coverage(truths, (SAMPLE - bads, bads), max(draws // len(truths), 1), random)


def _coverage(
    truths: list[tuple[Laws, float]],
    totals: tuple[int, int],
    draws: int,
    random: np.random.Generator,
) -> dict[str, float]:
    hits: dict[str, list[bool]] = {name: [] for name in METHODS}
    for laws, value in truths:
        good, bad = (random.multinomial(n, p, draws) for n, p in zip(totals, laws, strict=True))
        for cells in zip(good, bad, strict=True):
            empty = 0.5 if min(map(np.min, cells)) == 0 else 0.0
            for name, method in METHODS.items():
                low, high = iv_inference(*cells, method=method, smoothing=empty).interval
                hits[name].append(low <= value <= high)
    return {name: float(np.mean(found)) for name, found in hits.items()}


# ---- front ----------------------------------------------------------------------------------


def best_partitions(table: Array, budgets: list[float]) -> list[float]:
    """Try all partitions with rising weights of evidence; the best value within each budget."""
    m = len(table)
    values = []
    for number in range(m):
        for inner in combinations(range(1, m), number):
            cells = np.add.reduceat(table, (0, *inner), axis=0)
            if number and (cells == 0).any():
                continue
            if (np.diff(cells[:, 0] / cells[:, 1]) < 0).any():
                continue
            values.append((_value(cells[:, :2]), _value(cells[:, 2:])))
    gain, disparity = np.array(values).T
    return [float(gain[disparity <= budget + 1e-12].max()) for budget in budgets]


def _value(cells: Array) -> float:
    return woe_table(*cells.T).iv if len(cells) > 1 else 0.0
