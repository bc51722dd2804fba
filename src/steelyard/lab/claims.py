r"""Claims judged by statistics over seeds.

A recipe states what a paper promises as a :class:`Claim`; :func:`judge` compares the metrics of
the seeds with it and answers HOLDS, FAILS or UNDECIDED. Two methods that were run with the same
seed are compared seed by seed (paired), so that what a seed does to both cancels.

How far to trust a verdict. The interval is a percentile bootstrap, which is narrow when there are
few seeds. Measured on normal differences (20,000 experiments of each size): how often the nominal
95 % interval covers the true effect, and how often HOLDS is said of two methods that are equal.

====== ========= ==========================
seeds  coverage  HOLDS without a difference
====== ========= ==========================
3      76 %      12.0 %
5      91 %      4.5 %
10     93 %      3.2 %
====== ========= ==========================

Three seeds are a demonstration: one claim in eight about nothing "holds". Five make it one in
twenty-two. With many claims, or a verdict that matters, use ten.

Sources: the interquartile mean and the bootstrap over runs follow Agarwal et al. (2021),
arXiv:2108.13264; the percentile interval is Efron (1979).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Verdict = Literal["HOLDS", "FAILS", "UNDECIDED", "NOT RUN"]

LEVEL = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Claim:
    """A statement about a metric that the seeds of a run can support or refute.

    The difference of a seed is ``metric - baseline`` if ``direction`` is ``"higher"`` and
    ``baseline - metric`` if it is ``"lower"``: positive means *as claimed*. The claim says that
    this difference is at least ``margin``. Against another method's metric with a margin of 0 it
    must be above 0 strictly, since a tie is no improvement.

    Args:
        statement: the claim in one sentence.
        source: where it is made, for example ``"Ao et al. (2026), Fig. 3"``.
        metric: key of the metric in what the recipe's ``run`` returns.
        baseline: key of the metric it is compared with, or a number.
        direction: ``"higher"`` or ``"lower"``: which way is better for the claim.
        margin: smallest difference that counts, in units of the metric. A negative margin states
            "not worse than the baseline by more than that".
        min_seeds: with fewer seeds the verdict stays UNDECIDED.

    Raises:
        ValueError: a direction that is neither, a margin or baseline that is not finite, or
            ``min_seeds`` below 1.
    """

    statement: str
    source: str
    metric: str
    baseline: str | float
    direction: Literal["higher", "lower"]
    margin: float = 0.0
    min_seeds: int = 3

    def __post_init__(self) -> None:
        if self.direction not in ("higher", "lower"):
            raise ValueError(f"direction must be 'higher' or 'lower', got {self.direction!r}")
        if not math.isfinite(self.margin):
            raise ValueError(f"margin must be finite, got {self.margin}")
        if not isinstance(self.baseline, str) and not math.isfinite(self.baseline):
            raise ValueError(f"baseline must be a metric's key or finite, got {self.baseline}")
        if self.min_seeds < 1:
            raise ValueError(f"min_seeds must be >= 1, got {self.min_seeds}")

    @property
    def strict(self) -> bool:
        """Whether a difference of exactly ``margin`` is not enough."""
        return isinstance(self.baseline, str) and self.margin == 0


@dataclass(frozen=True)
class Judgement:
    """The verdict on one claim.

    Attributes:
        claim: what was judged.
        verdict: HOLDS if the whole interval lies where the claim says, FAILS if none of it does,
            UNDECIDED in between or with too few seeds, NOT RUN without the metric.
        effect: interquartile mean over seeds of the difference, positive = as claimed; ``None``
            if not run.
        low: lower end of the interval of the effect; ``None`` below two seeds.
        high: upper end.
        seeds: number of seeds compared.
        note: why, where the verdict needs a reason; else empty.
    """

    claim: Claim
    verdict: Verdict
    effect: float | None
    low: float | None
    high: float | None
    seeds: int
    note: str = ""


def judge(
    claims: Sequence[Claim], metrics_by_seed: Mapping[str, Mapping[str, float]]
) -> list[Judgement]:
    """Judge each claim on the metrics of a run.

    Args:
        claims: the recipe's claims.
        metrics_by_seed: what ``run`` returned, by seed. A seed that lacks a claim's metric or
            baseline is left out of that claim, and the note says so.

    Returns:
        One :class:`Judgement` a claim, in the order of ``claims``.

    Raises:
        ValueError: a compared value is not finite; names the metric and the seed.

    Example:
        >>> claim = Claim("new beats old", "here", "new", "old", "higher")
        >>> runs = {"0": {"new": 3.0, "old": 1.0}, "1": {"new": 4.0, "old": 3.0},
        ...         "2": {"new": 9.0, "old": 6.0}}
        >>> [j] = judge([claim], runs)
        >>> j.verdict, j.effect, j.low, j.high
        ('HOLDS', 2.0, 1.0, 3.0)
    """
    return [_judge_one(claim, metrics_by_seed) for claim in claims]


def interquartile_mean(values: ArrayLike) -> float:
    r"""Average the middle half of the values, quartiles cut exactly.

    .. math:: \mathrm{IQM}(x) = 2 \int_{1/4}^{3/4} F^{-1}(u)\, du

    with :math:`F` the empirical distribution: a value that a quartile cuts through counts with
    the fraction inside. One or two values give their mean.

    Args:
        values: at least one number, shape ``[N]``.

    Raises:
        ValueError: no value, more than one dimension, or a value that is not finite.

    Example:
        One run that failed does not decide, and a quarter of the third value still counts:

        >>> interquartile_mean([0.0, 8.0, 8.0, 8.0, 1000.0])
        8.0
        >>> interquartile_mean([0.0, 3.0, 12.0])  # weights 1/4, 1, 1/4
        4.0
    """
    array = _finite_vector("values", values)
    return float(_iqm_of_sorted(np.sort(array)))


def paired_bootstrap(
    differences: ArrayLike, *, level: float = LEVEL, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Interval of the interquartile mean of paired differences, by the percentile bootstrap.

    The seeds are drawn with replacement, their interquartile mean taken, and the central
    ``level`` of those means returned. The generator is fixed and the differences are sorted
    first: the same differences in any order give the same interval, always. For how narrow it is
    with few seeds see the table of this module.

    Args:
        differences: one number a seed, shape ``[N]``.
        level: nominal coverage, between 0 and 1.
        resamples: number of draws.

    Returns:
        ``(low, high)``.

    Raises:
        ValueError: no or non-finite differences, ``level`` outside (0, 1), ``resamples`` below 1.

    Example:
        >>> paired_bootstrap([1.0, 2.0, 3.0])
        (1.0, 3.0)
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    if resamples < 1:
        raise ValueError(f"resamples must be >= 1, got {resamples}")
    array = np.sort(_finite_vector("differences", differences))
    draws = np.random.default_rng(0).integers(len(array), size=(resamples, len(array)))
    means = _iqm_of_sorted(array[np.sort(draws, axis=1)])
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _judge_one(claim: Claim, metrics_by_seed: Mapping[str, Mapping[str, float]]) -> Judgement:
    compared = {
        seed: difference
        for seed, metrics in metrics_by_seed.items()
        if (difference := _difference(claim, seed, metrics)) is not None
    }
    if not compared:
        return Judgement(claim, "NOT RUN", None, None, None, 0, "this part was not run")
    differences = list(compared.values())
    effect, seeds = interquartile_mean(differences), len(differences)
    low, high = paired_bootstrap(differences) if seeds > 1 else (None, None)
    notes = []
    if missing := [seed for seed in metrics_by_seed if seed not in compared]:
        notes.append(f"not measured for seed {', '.join(missing)}")
    if seeds < claim.min_seeds:
        notes.insert(0, f"{seeds} of at least {claim.min_seeds} seeds")
    verdict = _verdict(claim, low, high) if seeds >= claim.min_seeds else "UNDECIDED"
    return Judgement(claim, verdict, effect, low, high, seeds, "; ".join(notes))


def _verdict(claim: Claim, low: float | None, high: float | None) -> Verdict:
    if low is None or high is None:
        return "UNDECIDED"
    if low > claim.margin or (low == claim.margin and not claim.strict):
        return "HOLDS"
    if high < claim.margin or (high == claim.margin and claim.strict):
        return "FAILS"
    return "UNDECIDED"


def _difference(claim: Claim, seed: str, metrics: Mapping[str, float]) -> float | None:
    """Return the seed's difference in the claim's direction, ``None`` if a side is absent."""
    keys = [claim.metric, *([claim.baseline] if isinstance(claim.baseline, str) else [])]
    if any(key not in metrics for key in keys):
        return None
    for key in keys:
        if not math.isfinite(metrics[key]):
            raise ValueError(f"metric {key!r} of seed {seed} must be finite, got {metrics[key]}")
    baseline = metrics[claim.baseline] if isinstance(claim.baseline, str) else claim.baseline
    difference = float(metrics[claim.metric]) - float(baseline)
    return difference if claim.direction == "higher" else 0.0 - difference


def _finite_vector(name: str, values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} must be a non-empty vector, got shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {array[~np.isfinite(array)][0]}")
    return array


def _iqm_of_sorted(ordered: NDArray[np.float64]) -> NDArray[np.float64]:
    """Interquartile mean along the last axis of values sorted along it.

    Clipped to the values' range, so that equal values give exactly themselves.
    """
    count = ordered.shape[-1]
    parts = np.diff(np.clip(4 * np.arange(count + 1), count, 3 * count)).astype(np.float64)
    means: NDArray[np.float64] = ordered @ parts / (2 * count)
    return np.clip(means, ordered[..., 0], ordered[..., -1])
