"""The score ``f'(u)`` of a response as a function of ``log u``, finite at every log ratio."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from steelyard._reduce import widen
from steelyard.divergences import FDivergence, Generator

# Scores like -exp(-log u) leave every float format. Where the slope of a score in log u passes the
# exponential of these numbers, the score goes on along its tangent.
_LOG_SLOPE_LIMIT = {
    torch.float16: 10.0,
    torch.bfloat16: 64.0,
    torch.float32: 64.0,
    torch.float64: 600.0,
}

# Every score is linear or flat beyond, to all digits, if it is not too steep before.
_END = 1024.0


def reward_of(log_ratio: Tensor, beta: float, divergence: FDivergence) -> Tensor:
    """``beta [f'(u) - f'(1)]`` in float32 or wider, with tangents beyond the exact range."""
    low, high = exact_range(divergence, log_ratio.dtype)
    log_u = widen(log_ratio)
    inside = log_u.clamp(low, high)
    slope = (inside + divergence.generator.log_second_derivative(inside)).exp().detach()
    tangent = torch.where(slope == 0, 0.0, slope * (log_u - inside))
    return beta * (divergence.derivative_at_log(inside) - divergence.slope_at_one + tangent)


def is_extrapolated(log_ratio: Tensor, divergence: FDivergence) -> Tensor:
    """Tell where a score is a tangent because ``f'`` is too steep."""
    low, high = exact_range(divergence, log_ratio.dtype)
    below = (log_ratio < low) if low > -_END else torch.zeros_like(log_ratio, dtype=torch.bool)
    return below | (log_ratio > high) if high < _END else below


def exact_range(divergence: FDivergence, dtype: torch.dtype) -> tuple[float, float]:
    """Return the log ratios between which the score is exact; refuse a finite ``f'(0)``."""
    limit = _LOG_SLOPE_LIMIT.get(dtype, 64.0)
    at_zero, low, high = _slope_limits(divergence.generator, limit)
    if at_zero != -math.inf:
        raise ValueError(
            f"divergence must have f'(0) = -inf, got {divergence.name} with f'(0) = {at_zero:.4g}: "
            "its optimum can put no mass on a response, whose reward is then not beta f'(u) plus a "
            "constant of the prompt"
        )
    return low, high


@lru_cache(maxsize=64)
def _slope_limits(generator: Generator, log_slope: float) -> tuple[float, float, float]:
    # f'(0), and the smallest and largest log u with u f''(u) <= exp(log_slope), on a grid.
    with torch.no_grad():
        at_zero = generator.derivative(torch.tensor(-math.inf, dtype=torch.float64))
        log_u = torch.arange(-_END, _END + 1, dtype=torch.float64)
        gentle = log_u + generator.log_second_derivative(log_u) <= log_slope
        low, high = torch.where(gentle, log_u, 0.0).aminmax()
        return float(at_zero), float(low), float(high)


# Depends on the divergence alone, not on data: a compiled loss keeps the two numbers as constants.
# The mark is what torch.compiler.assume_constant_result sets, which would import the compiler now.
exact_range._dynamo_marked_constant = True  # type: ignore[attr-defined]


def saturated(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast down to ``dtype``; a finite value too large for it becomes its largest number.

    The gradient passes as if nothing had been cut.
    """
    if value.dtype == dtype:
        return value
    most = torch.finfo(dtype).max
    passing = torch.where(value.isfinite(), value - value.detach(), value)
    return (value.detach().clamp(-most, most) + passing).to(dtype)
