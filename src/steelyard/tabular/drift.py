"""Drift of a sample from a base: the population stability index and its test, also over time.

PSI is the information value of two samples, so its law is known: under equal shares it is a
multiple of a chi-square, whatever the shares are.

Source: Sudjianto, Burakov (2025), arXiv:2509.09855; Yurdakul, Naranjo (2020), Statistical
properties of the population stability index.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from steelyard._checks import check_range
from steelyard.tabular._columns import as_numbers
from steelyard.tabular.tables import jeffreys, smoothed_counts

__all__ = ["Drift", "PSITest", "psi", "psi_over_time", "psi_test"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class PSITest:
    """What :func:`psi_test` returns; ``psi > critical`` exactly if ``p_value < alpha``."""

    psi: float
    critical: float
    p_value: float


@dataclass(frozen=True)
class Drift:
    """What :func:`psi_over_time` returns, each per period, ``[T]``."""

    psi: Array
    critical: Array
    p_value: Array
    adjusted_p_value: Array
    drifted: NDArray[np.bool_]


def psi(base: ArrayLike, current: ArrayLike, *, smoothing: float = 0.0) -> float:
    r"""Measure how far a sample has moved from a base, in nats.

    .. math:: \mathrm{PSI} = \sum_j (p_j - q_j) \log (p_j / q_j)

    The information value of two samples: symmetric, 0 for equal shares, and unchanged if either
    sample is multiplied. How large it gets by chance depends on the sizes: see :func:`psi_test`.

    Args:
        base: counts or shares per bin, ``[J]``, >= 0.
        current: the same bins later, ``[J]``.
        smoothing: added to every cell, >= 0; at 0 an empty cell is an error.

    Returns:
        PSI, >= 0.

    Raises:
        TypeError: not numbers.
        ValueError: wrong shapes, negative counts, an empty sample, or an empty cell without
            smoothing; names the bin.

    Example:
        >>> round(psi([0.25, 0.25, 0.5], [0.2, 0.3, 0.5]), 4)
        0.0203

    Source: Sudjianto, Burakov (2025), Eq. 2, arXiv:2509.09855.
    """
    base, current = smoothed_counts(base, current, smoothing, names=("base", "current"))
    return jeffreys(base, current)


def psi_test(
    base: ArrayLike, current: ArrayLike, alpha: float = 0.05, *, smoothing: float = 0.0
) -> PSITest:
    r"""Test whether a sample still follows the base, at a level that holds.

    With equal laws, :math:`\mathrm{PSI} / (1/n + 1/m) \to \chi^2_{J-1}`, so the critical value is
    :math:`\chi^2_{1-\alpha,\,J-1}\,(1/n + 1/m)`. Fixed thresholds (0.1, 0.25) ignore the sizes:
    they are far above chance in large samples and below it in small ones. A large sample finds
    drifts too small to matter, so read ``psi`` as the size and ``p_value`` as the certainty. The
    law is asymptotic: at 20 rows per bin a 5 % test rejects a true null in about 7 %.

    Args:
        base: counts per bin, ``[J]``, J >= 2. Shares will not do: the size of the sample matters.
        current: counts of the same bins later, ``[J]``. Bins are fixed before ``current`` is seen.
        alpha: level, in (0, 1).
        smoothing: added to every cell, >= 0.

    Returns:
        ``psi``, ``critical`` and ``p_value``.

    Raises:
        TypeError: not numbers.
        ValueError: as :func:`psi`, fewer than two bins, or ``alpha`` out of range.

    Example:
        The same shares moved by the same amount, in a small and in a large sample:

        >>> base, current = [200, 300, 500], [180, 330, 490]
        >>> round(psi_test(base, current).p_value, 2)
        0.27
        >>> psi_test([100 * n for n in base], [100 * n for n in current]).p_value < 1e-9
        True

    Source: Yurdakul, Naranjo (2020), Statistical properties of the population stability index.
    Sudjianto, Burakov (2025), Sec. 4.5, arXiv:2509.09855, use a z-test instead, which does not
    hold its level: ``iv_inference(base, current, method="fixed")``.
    """
    return _test(base, current, alpha, smoothing, name="current")


def _test(
    base: ArrayLike, current: ArrayLike, alpha: float, smoothing: float, *, name: str
) -> PSITest:
    """Test counts that an error calls ``name``."""
    check_range("alpha", alpha, above=0.0, below=1.0)
    base, current = smoothed_counts(base, current, smoothing, names=("base", name))
    if len(base) < 2:
        raise ValueError("base must have at least two bins for a test, got 1")
    value, scale = jeffreys(base, current), 1 / base.sum() + 1 / current.sum()
    return PSITest(
        psi=value,
        critical=float(stats.chi2.isf(alpha, len(base) - 1) * scale),
        p_value=float(stats.chi2.sf(value / scale, len(base) - 1)),
    )


def psi_over_time(
    base: ArrayLike, periods: ArrayLike, alpha: float = 0.05, *, smoothing: float = 0.0
) -> Drift:
    """Test each period against the base, with one false alarm rate for all periods together.

    Twelve monthly tests at 5 % ring in about every second year without cause. ``drifted`` uses
    p-values adjusted by Holm's method: the chance of any false alarm is at most ``alpha``.

    Args:
        base: counts per bin, ``[J]``, J >= 2.
        periods: counts per period and bin, ``[T, J]``.
        alpha: level of all periods together, in (0, 1).
        smoothing: added to every cell, >= 0.

    Returns:
        ``psi``, ``critical`` (of the single test), ``p_value``, ``adjusted_p_value`` and
        ``drifted`` = adjusted_p_value <= alpha, each ``[T]``.

    Raises:
        TypeError: not numbers.
        ValueError: as :func:`psi_test`; names the period, as ``periods[3]``.

    Example:
        >>> drift = psi_over_time([200, 300, 500], [[20, 31, 49], [10, 20, 70], [22, 28, 50]])
        >>> drift.drifted
        array([False,  True, False])

    Source: :func:`psi_test`; Holm (1979), A simple sequentially rejective multiple test procedure.
    """
    table = as_numbers("periods", periods)
    if table.ndim != 2 or not len(table):
        raise ValueError(f"periods must have shape [T, J], T >= 1, got {list(table.shape)}")
    tests = [
        _test(base, row, alpha, smoothing, name=f"periods[{number}]")
        for number, row in enumerate(table)
    ]
    p_value = np.array([test.p_value for test in tests])
    order = np.argsort(p_value, kind="stable")
    steps = np.maximum.accumulate(p_value[order] * np.arange(len(order), 0, -1))
    adjusted = np.empty_like(p_value)
    adjusted[order] = np.minimum(steps, 1.0)
    return Drift(
        psi=np.array([test.psi for test in tests]),
        critical=np.array([test.critical for test in tests]),
        p_value=p_value,
        adjusted_p_value=adjusted,
        drifted=adjusted <= alpha,
    )
