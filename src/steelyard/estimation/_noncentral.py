r"""The noncentral chi-square law in log space: its far left tail and its density.

Scalars of the law are 0-d float64 tensors, and gradients reach them. Nothing underflows: the sums
are over positive terms, taken where the terms are, in logarithms.
"""

import math
from functools import cache
from typing import NoReturn

import torch
from numpy.polynomial import Polynomial
from torch import Tensor

from steelyard.estimation._special import log1p_cubic, log1p_minus, log_poisson

# Terms farther from the largest than this many standard deviations, and this many more, are
# below e^-40 of it: the terms are log-concave.
_DEVIATIONS, _EXTRA_TERMS = 10.0, 60
_MAX_TERMS = 2**24
_LARGEST_COUNT = 2.0**53  # beyond, float64 has not every integer
# u_k / order^k of the first term left out is below 3e-14 from this order on.
_DEBYE_FROM, _DEBYE_TERMS = 15.0, 13


def log_cdf(x: Tensor, df: Tensor, noncentrality: Tensor) -> Tensor:
    r"""Return ``log P(chi2_df(nc) <= x)`` of 0-d tensors, exact in any tail.

    With :math:`y = x/2, a = d/2, \lambda = \mathrm{nc}/2` and the recursion of the incomplete
    gamma function in its order, the Poisson mixture becomes a sum of positive products

    .. math::
        F = \sum_{k \ge 0} \frac{y^{a + k} e^{-y}}{\Gamma(a + k + 1)}
            \Pr(\mathrm{Poisson}(\lambda) \le k) .
    """
    y, a, rate = x / 2, df / 2, noncentrality / 2
    low, high = _window(float(y.detach()), float(a.detach()), float(rate.detach()))
    k = torch.arange(low, high + 1, dtype=y.dtype, device=y.device)
    terms: Tensor = log_poisson(a + k, y) + _log_poisson_cdf(low, high, rate)
    return terms.logsumexp(0).clamp(max=0.0)


def _window(y: float, a: float, rate: float) -> tuple[int, int]:
    """Return the first and last ``k`` of the sum that matter."""
    root = math.sqrt(a * a + 4 * y * rate)
    # the largest term: where y/(a + k) is 1, or where (y/(a + k)) (rate/k) is, below rate
    peak = y - a if y - a > rate else 2 * y * rate / (a + root)
    half = _DEVIATIONS * math.sqrt(a + max(peak, 0.0) + 1) + _EXTRA_TERMS
    if not (peak < _LARGEST_COUNT and half < _LARGEST_COUNT):
        _refuse_terms(math.inf)
    low, high = max(0, math.floor(peak - half)), math.ceil(max(peak, 0.0) + half)
    if high - low > _MAX_TERMS:
        _refuse_terms(high - low)
    return low, high


def _refuse_terms(count: float) -> NoReturn:
    raise ValueError(
        f"the exact tail would sum {count:.1e} terms at these test_error, df, noncentrality and "
        'scale, where method="saddlepoint" is as good'
    )


def _log_poisson_cdf(low: int, high: int, rate: Tensor) -> Tensor:
    """Return ``log P(Poisson(rate) <= k)`` for ``k = low..high``."""
    value = float(rate.detach())
    if value == 0:  # 0, with the slope -1 at k = 0
        first = torch.arange(low, high + 1, device=rate.device) == 0
        return -rate * first
    reach = _DEVIATIONS * math.sqrt(value) + _EXTRA_TERMS
    start = max(0, math.floor(min(low, value) - reach))
    stop = min(high, math.ceil(value + reach))
    if stop - start > _MAX_TERMS:
        _refuse_terms(stop - start)
    beyond = high - max(stop, low - 1)
    counts = torch.arange(start, stop + 1, dtype=rate.dtype, device=rate.device)
    known = log_poisson(counts, rate).logcumsumexp(0)[max(low - start, 0) :].clamp(max=0.0)
    return torch.cat([known, rate.new_zeros(beyond)])


def saddlepoint_log_cdf(z: Tensor, multiplicity: Tensor, noncentrality: Tensor) -> Tensor:
    r"""Return the Lugannani-Rice type tail ``log Phi(r + log(u/r)/r)`` at a saddlepoint.

    For ``sum_i w_i chi2_m(nc_i)`` and the saddlepoint ``s`` of its cumulant function ``Kc``, pass
    ``z_i = 2 w_i s / (1 - 2 w_i s)``. Then, as sums of terms of one sign,

    .. math::
        r^2 = 2 (s x - K(s)) = \sum_i -m \log1pm(z_i) + \mathrm{nc}_i z_i^2, \qquad
        u^2 - r^2 = \sum_i m \, (\log(1 + z_i) - z_i + z_i^2/2) + \mathrm{nc}_i z_i^3 .

    Args:
        z: ``[.., r]``, all of one sign, not 0.
        multiplicity: ``m``, broadcast with ``z``.
        noncentrality: ``nc_i``, broadcast with ``z``.

    Returns:
        ``[..]``.
    """
    square = (noncentrality * z.square() - multiplicity * log1p_minus(z)).sum(-1)
    excess = (multiplicity * log1p_cubic(z) + noncentrality * z**3).sum(-1)
    r = torch.copysign(square.sqrt(), z[..., 0])
    tail: Tensor = torch.special.log_ndtr(r + torch.log1p(excess / square) / (2 * r))
    return tail


def saddlepoint(x: Tensor, df: Tensor, noncentrality: Tensor) -> Tensor:
    """Return the saddlepoint's ``log P(chi2_df(nc) <= x)``, elementwise; it solves for itself."""
    # x v^2 - df v - nc = 0 for v = 1 - 2 s; z = 1/v - 1
    root = torch.sqrt(df**2 + 4 * x * noncentrality)
    z = (2 * x - df - root) / (df + root)
    tiny = 1e-8 / torch.sqrt(df + 2 * noncentrality)
    z = torch.where(z.abs() < tiny, z + 2 * tiny, z)  # at the mean r and u are 0/0
    return saddlepoint_log_cdf(z.unsqueeze(-1), df.unsqueeze(-1), noncentrality.unsqueeze(-1))


def sankaran_score(x: Tensor, df: Tensor, noncentrality: Tensor) -> Tensor:
    """Return the normal score of Sankaran's power transform, accurate near the bulk only."""
    mean, double = df + noncentrality, df + 2 * noncentrality
    h = 1 - 2 * mean * (df + 3 * noncentrality) / (3 * double**2)
    p = double / mean**2
    q = (h - 1) * (1 - 3 * h)
    centre = 1 + h * p * (h - 1 - (2 - h) * q * p / 2)
    score: Tensor = ((x / mean) ** h - centre) / (h * torch.sqrt(2 * p) * (1 + q * p / 2))
    return score


def log_pdf(x: Tensor, df: Tensor, noncentrality: Tensor) -> Tensor:
    r"""Return the log-density of ``chi2_df(nc)`` at ``x`` ``[S]``, ``nc = 0`` included.

    .. math:: f(x) = \tfrac12 e^{-(x + \mathrm{nc})/2}\, x^{v} \, \frac{I_v(z)}{z^v},
        \qquad v = \tfrac{\mathrm{df}}{2} - 1, \quad z = \sqrt{\mathrm{nc}\, x}
    """
    order = df / 2 - 1
    bessel = _log_bessel(order, noncentrality * x)
    return bessel + order * torch.log(x) - (x + noncentrality) / 2 - math.log(2)


def _log_bessel(order: Tensor, square: Tensor) -> Tensor:
    r"""Return ``log(I_v(z) z^-v)`` at ``z^2 = square >= 0`` for ``v > -1``.

    Debye's expansion at an order it is exact for, then the recursion
    :math:`I_{v-1} = I_{v+1} + (2v/z) I_v` down, whose terms are all positive.
    """
    steps = max(0, math.ceil(_DEBYE_FROM - float(order.detach())))
    v = order + steps
    value = _debye(v, square)
    if steps == 0:
        return value
    ratio = torch.exp(_debye(v + 1, square) - value)
    for _ in range(steps):
        growth = square * ratio + 2 * v
        value, ratio, v = value + torch.log(growth), 1 / growth, v - 1
    return value


def _debye(order: Tensor, square: Tensor) -> Tensor:
    root = torch.sqrt(1 + square / order**2)
    p_square, step = root**-2, 1 / (root * order)
    series = torch.zeros_like(root)
    for polynomial in reversed(_debye_polynomials()):
        term = torch.full_like(root, polynomial[-1])
        for coefficient in polynomial[-2::-1]:
            term = term * p_square + coefficient
        series = series * step + term
    leading = order * (root - torch.log1p(root) - torch.log(order))
    log_value: Tensor = leading - torch.log(2 * math.pi * order * root) / 2 + torch.log(series)
    return log_value


@cache
def _debye_polynomials() -> tuple[tuple[float, ...], ...]:
    """Coefficients of ``u_k(p) / p^k`` in ``p^2``, by the recursion of the ``u_k``."""
    t = Polynomial([0.0, 1.0])
    u = Polynomial([1.0])
    found = []
    for k in range(_DEBYE_TERMS):
        found.append(tuple(float(c) for c in u.coef[k::2]))
        u = t**2 * (1 - t**2) * u.deriv() / 2 + ((1 - 5 * t**2) * u).integ() / 8
    return tuple(found)
