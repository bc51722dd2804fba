r"""Special functions that keep their digits where the textbook forms cancel.

All are elementwise, differentiable, and meant for float64.
"""

import math

import torch
from torch import Tensor

_SERIES_TERMS = 18
_STIRLING_FROM = 16.0
_STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188)


def log1p_minus(x: Tensor) -> Tensor:
    """Return ``log(1 + x) - x``, never positive, ``-x^2/2`` for small ``x``."""
    y = x / (2 + x)
    return torch.where(x.abs() < 0.5, y * (2 * y * y * _odd_series(y) - x), torch.log1p(x) - x)


def log1p_cubic(x: Tensor) -> Tensor:
    """Return ``log(1 + x) - x + x^2/2``, of the sign of ``x``, ``x^3/3`` for small ``x``."""
    y = x / (2 + x)
    series = x**3 / (2 * (2 + x)) + 2 * y**3 * _odd_series(y)
    return torch.where(x.abs() < 0.5, series, torch.log1p(x) - x + x * x / 2)


def _odd_series(y: Tensor) -> Tensor:
    # log((1 + y) / (1 - y)) = 2 y + 2 y^3 (1/3 + y^2/5 + ...), and (1 + y) / (1 - y) = 1 + x.
    square = y * y
    total = torch.zeros_like(y)
    for term in reversed(range(_SERIES_TERMS)):
        total = total * square + 1 / (2 * term + 3)
    return total


def log_poisson(count: Tensor, rate: Tensor) -> Tensor:
    r"""Return :math:`\log(r^s e^{-r} / \Gamma(s + 1))` for real ``count`` ``s >= 0``, ``r > 0``.

    For large counts by Stirling's series and the deviance, so that no large terms cancel.
    """
    large = count.clamp(min=_STIRLING_FROM)
    inverse = 1 / large
    correction = torch.zeros_like(large)
    for coefficient in reversed(_STIRLING):
        correction = correction * inverse**2 + coefficient
    deviance = large * log1p_minus((rate - large) * inverse)
    by_series = deviance - 0.5 * torch.log(2 * math.pi * large) - correction * inverse
    small = count.clamp(max=_STIRLING_FROM)
    direct = small * torch.log(rate) - rate - torch.lgamma(small + 1)
    return torch.where(count >= _STIRLING_FROM, by_series, direct)
