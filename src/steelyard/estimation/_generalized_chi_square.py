r"""Sums of weighted noncentral chi-squares: cumulants, saddlepoint, exact inversion.

The law of :math:`Q = \sum_i w_i \chi^2_m(\mathrm{nc}_i)` with weights ``w_i > 0`` has

.. math::
    K(s) = \sum_i -\tfrac m2 \log(1 - 2 w_i s) + \frac{\mathrm{nc}_i w_i s}{1 - 2 w_i s},
    \qquad s < \frac{1}{2 \max_i w_i} .

All in float64, without gradients.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from steelyard.estimation._noncentral import saddlepoint_log_cdf

_CHUNK_ENTRIES = 2**20
_RELATIVE_ACCURACY = 1e-12
_MAX_HALVINGS = 14
_MOST_NODES = 2**20  # before the first halving; good input takes tens
# The integrand is followed until it has fallen by exp(-46) = 1e-20.
_NEGLIGIBLE = 46.0
# Slope of the far contour against the imaginary axis; below 1 the integrand can only fall on it.
_BEND = 0.8


class WeightedChiSquares(NamedTuple):
    """The law of ``sum_i weights_i chi2_multiplicity(noncentrality_i)``."""

    weights: Tensor
    multiplicity: int
    noncentrality: Tensor

    def derivative(self, s: float, order: int) -> float:
        """Return the derivative of ``K`` of order 1, 2 or 3 at ``s``."""
        ratio = self.weights / (1 - 2 * self.weights * s)
        slope = self.noncentrality * ratio / (1 - 2 * self.weights * s)
        shape = self.multiplicity * ratio + order * slope
        factor = math.factorial(order - 1) * 2 ** (order - 1)
        return float((factor * shape * ratio ** (order - 1)).sum())

    def cumulant_at(self, s: Tensor) -> Tensor:
        """Return ``K`` at complex points ``[p]``."""
        v = 1 - 2 * self.weights * s.unsqueeze(1)
        shift = self.noncentrality * (1 / v - 1)
        return (shift - self.multiplicity * torch.log(v)).sum(1) / 2


def saddlepoint_of(law: WeightedChiSquares, x: float) -> tuple[float, Tensor]:
    """Solve ``K'(s) = x > 0``; return ``s`` and ``2 w_i s / (1 - 2 w_i s)``.

    The unknown is ``log(1 - 2 s max w)``, in which the slope of ``K`` falls from infinity to 0.
    """
    from scipy.optimize import brentq

    largest = float(law.weights.max())

    def point(t: float) -> float:
        return -math.expm1(t) / (2 * largest)

    def excess(t: float) -> float:
        return math.log(law.derivative(point(t), 1) / x)

    low, high = -1.0, 1.0
    while excess(low) < 0:
        low *= 2
    while excess(high) > 0:
        high *= 2
    s = point(brentq(excess, low, high, xtol=1e-15, rtol=1e-15))
    return s, 2 * law.weights * s / (1 - 2 * law.weights * s)


def saddlepoint_log_tail(law: WeightedChiSquares, x: float) -> Tensor:
    """Return the saddlepoint's ``log P(Q <= x)``."""
    s, z = saddlepoint_of(law, x)
    tiny = 1e-8 / math.sqrt(law.derivative(0.0, 2))
    if abs(s) < tiny:  # at the mean the formula is 0/0; it is smooth, so step aside
        z = 2 * law.weights * tiny / (1 - 2 * law.weights * tiny)
    multiplicity = law.weights.new_tensor(float(law.multiplicity))
    return saddlepoint_log_cdf(z, multiplicity, law.noncentrality)


def inverted_log_tail(law: WeightedChiSquares, x: float) -> Tensor:
    r"""Return ``log P(Q <= x)`` by inversion of the transform, to relative accuracy in any tail.

    .. math::
        P(Q \le x) = \frac{1}{2 \pi i} \int_{c - i\infty}^{c + i\infty}
            \frac{e^{K(s) - s x}}{-s} ds, \quad c < 0; \qquad
        P(Q > x) = \frac{1}{2 \pi i} \int \frac{e^{K(s) - s x}}{s} ds, \quad c > 0

    Imhof's integral is the case ``c = 0``, which loses everything below ``1e-14``. Through the
    saddlepoint the integrand has no large cancelling parts. Past it the contour bends to the
    right, where ``exp(-s x)`` falls; within 45 degrees of the vertical every factor of the
    integrand does. The trapezoidal rule is then halved until it stands.
    """
    s, _ = saddlepoint_of(law, x)
    apart = 0.5 / math.sqrt(law.derivative(0.0, 2))
    if s >= apart:
        return torch.log1p(-_contour_integral(law, x, s).exp())
    return _contour_integral(law, x, min(s, -apart))


def _contour_integral(law: WeightedChiSquares, x: float, centre: float) -> Tensor:
    """Log of the tail integral along the curve through ``centre``."""
    second, third = law.derivative(centre, 2), law.derivative(centre, 3)
    # real part k (sqrt(t^2 + b^2) - b): near the centre the steepest path, k t^2 / (2 b)
    b = _BEND * 3 * second / third
    start = law.cumulant_at(law.weights.new_tensor([centre]).to(torch.complex128))[0].real
    start = start - centre * x

    side = math.copysign(1.0, centre)

    def log_integrand(t: Tensor) -> Tensor:
        root = torch.sqrt(t**2 + b**2)
        s = torch.complex(centre + _BEND * t**2 / (root + b), t)
        direction = torch.complex(_BEND * t / root, torch.ones_like(t))
        chunks = torch.split(s, max(1, _CHUNK_ENTRIES // len(law.weights)))
        cumulant = torch.cat([law.cumulant_at(chunk) for chunk in chunks])
        return cumulant - s * x - start + torch.log(direction * side / s)

    # in units of the largest value, which is that of the centre
    floor = -math.log(abs(centre)) - _NEGLIGIBLE
    step = 0.5 / math.sqrt(second)
    end = 16 * step
    while float(log_integrand(start.new_tensor([end]))[0].real) > floor:
        end *= 1.5
    if not end / step < _MOST_NODES:
        raise ValueError("test_error is too far out in the tail to invert, covariance too small")
    nodes = torch.arange(0.0, end, step, dtype=start.dtype, device=start.device)
    values = log_integrand(nodes).exp().imag
    total = (values.sum() - values[0] / 2) * step
    last_change = torch.full_like(total, torch.inf)
    for _ in range(_MAX_HALVINGS):
        middles = nodes + step / 2
        finer = (total + step * log_integrand(middles).exp().imag.sum()) / 2
        change, total = (finer / total - 1).abs(), finer
        # the error squares at each halving until rounding stops it
        if bool(change <= _RELATIVE_ACCURACY) or bool(last_change <= change.clamp(max=1e-6)):
            break
        last_change, step, nodes = change, step / 2, torch.cat([nodes, middles])
    return start + torch.log(total / math.pi)
