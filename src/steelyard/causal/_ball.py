r"""Largest mean over an f-ball around a law of finite support: roots, not a convex solver.

.. math:: \max_s \Big\{ \sum_i p_i s_i y_i : s \ge 0,\ \sum_i p_i s_i = 1,\
    \sum_i p_i g(s_i) \le \eta \Big\}

With ``D_i = max y - y_i`` the optimal ratio is ``s_i = s*((nu + D_i) / lambda)``. For KL, Hellinger
and chi2, ``s*`` is a power, so ``lambda`` only normalises and ``nu`` is the root of one increasing
equation. For Jensen-Shannon ``nu`` follows from ``lambda`` by an inner root that lies in a known
interval. Roots are safeguarded Newton steps in log coordinates, all problems of a batch at once.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_POWERS = {"kl": 1.0, "hellinger": 2.0, "chi2": 0.5}
_MAX_STEPS = 200
_TOLERANCE = 1e-15
_VALUE_TOLERANCE = 3e-15  # both logarithms are known to about that
_SMALLEST = 1e-300
_LOWEST_LOG_NU = -660.0  # exp of it is near the smallest float64
_LARGEST_KAPPA = 1e20


class _Problem(NamedTuple):
    p: Tensor  # [B, S]
    gap: Tensor  # (max y - y) / range, [B, S], 0 where p = 0
    radius: Tensor  # [B, 1]
    at_top: Tensor  # mass at the largest value, [B, 1]
    all_top: Tensor  # the ball holds laws of all mass near the top, [B, 1]


def largest_mean(y: Tensor, p: Tensor, radius: Tensor, divergence: str, kept: Tensor) -> Tensor:
    """Solve for ``y``, ``p`` ``[B, S]``, ``radius`` and ``kept`` (propensity) ``[B]``; float64."""
    support = p > 0
    top = y.masked_fill(~support, -math.inf).amax(-1, keepdim=True)
    bottom = y.masked_fill(~support, math.inf).amin(-1, keepdim=True)
    if divergence == "tv":
        return _total_variation(y.where(support, top), p, top.squeeze(-1), 1 - kept)
    spread = top - bottom
    gap = ((top - y) / spread.where(spread > 0, 1.0)).where(support, 0.0)
    at_top = (p * (gap == 0)).sum(-1, keepdim=True)
    # f'(inf) is finite for these two: to leave a value altogether costs no more than f(0)
    all_top = (kept[:, None] <= at_top) & (divergence in {"hellinger", "js"})
    problem = _Problem(p, gap, radius[:, None], at_top, all_top)
    ratio = _jensen_shannon(problem) if divergence == "js" else _power(problem, _POWERS[divergence])
    lost = (p * ratio * gap).sum(-1, keepdim=True).where(~all_top, 0.0)
    return (top - spread * lost).squeeze(-1)


def _total_variation(y: Tensor, p: Tensor, top: Tensor, moved: Tensor) -> Tensor:
    """Move the lowest ``moved`` probability mass to the top."""
    y, order = y.sort(-1)
    p = p.gather(-1, order)
    left = (p.cumsum(-1) - moved[:, None]).clamp(min=0).minimum(p)
    return top - (left * (top[:, None] - y)).sum(-1)


def _power(problem: _Problem, power: float) -> Tensor:
    p, gap, radius, _, all_top = problem

    def ratio(log_nu: Tensor) -> Tensor:
        log_s = -power * (log_nu.exp() + gap).log()
        return (log_s - (log_s + p.log()).logsumexp(-1, keepdim=True)).exp()

    def excess(log_nu: Tensor) -> tuple[Tensor, Tensor]:
        # log cost minus log radius, and its slope; the cost falls in nu
        s, nu = ratio(log_nu), log_nu.exp()
        share = nu / (nu + gap)
        slope_s = -power * s * (share - (p * s * share).sum(-1, keepdim=True))
        if power == 1.0:  # KL
            cost, slope = s - 1 - s.log(), -1 / s
        elif power == 2.0:  # Hellinger
            cost, slope = (s.sqrt() - 1).square() / 2, (1 - s.rsqrt()) / 2
        else:  # chi2
            cost, slope = (s - 1).square() / (2 * s), (1 - s.square().reciprocal()) / 2
        total = (p * cost).sum(-1, keepdim=True).clamp(min=_SMALLEST)
        return (total / radius).log(), (p * slope * slope_s).sum(-1, keepdim=True) / total

    low = torch.full_like(radius, _LOWEST_LOG_NU)
    high = (4 * power / radius.sqrt() + 1).log().where(~all_top, low)
    root = _falling_root(excess, low, high, 0 * high)
    return ratio(root)


def _jensen_shannon(problem: _Problem) -> Tensor:
    # s = 1 / expm1(x + kappa gap) = 1 / (v growth + growth - 1) with v = expm1(x)
    p, gap, radius, at_top, all_top = problem
    least = at_top.log()
    state = {"log_v": least / 2}

    def ratio(log_kappa: Tensor) -> Tensor:
        exponent = (log_kappa.exp() * gap).clamp(max=700.0)
        growth, over = exponent.exp(), exponent.expm1()

        def normalisation(log_v: Tensor) -> tuple[Tensor, Tensor]:
            v = log_v.exp()
            s = 1 / (v * growth + over)
            total = (p * s).sum(-1, keepdim=True)
            slope = -(p * s * s * growth).sum(-1, keepdim=True) * v / total
            return total.log(), slope

        state["log_v"] = _falling_root(normalisation, least, 0 * least, state["log_v"])
        return 1 / (state["log_v"].exp() * growth + over)

    def excess(log_kappa: Tensor) -> tuple[Tensor, Tensor]:
        # in -log kappa, so that the cost falls
        kappa = (-log_kappa).exp()
        s = ratio(-log_kappa)
        # s log(2 s / (1 + s)) + log(2 / (1 + s)), each without cancellation at its own end
        tilt, share = (s - 1) / (s + 1), (2 * s / (1 + s)).log()
        gain = torch.log1p(tilt).where((s > 0.5) & (s < 2), share).where(s > 0, 0.0)
        loss = torch.log1p(-tilt).where(s < 2, -((1 + s) / 2).log())
        cost = (s * gain + loss) / 2
        weight = p * s * (1 + s)
        mean = (weight * gap).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True)
        slope = kappa.square() / 2 * (weight * gap * (gap - mean)).sum(-1, keepdim=True)
        total = (p * cost).sum(-1, keepdim=True).clamp(min=_SMALLEST)
        return (total / radius).log(), -slope / total

    low = torch.full_like(radius, -math.log(_LARGEST_KAPPA))
    high = (-radius.sqrt().log()).where(~all_top, low)
    root = _falling_root(excess, low, high, 0 * radius)
    return ratio(-root)


def _falling_root(
    function: Callable[[Tensor], tuple[Tensor, Tensor]], low: Tensor, high: Tensor, start: Tensor
) -> Tensor:
    """Root of a falling function with its slope, or the end of the interval nearest to one."""
    x = start.clamp(low, high)
    previous = torch.full_like(x, math.inf)
    for _ in range(_MAX_STEPS):
        value, slope = function(x)
        low, high = x.where(value >= 0, low), x.where(value <= 0, high)
        newton = x - value / slope
        # bisect if Newton's step leaves the interval or doesn't at least halve the value
        good = (newton > low) & (newton < high) & (2 * value.abs() < previous)
        step = newton.where(good, (low + high) / 2)
        narrow = _TOLERANCE * (1 + x.abs())
        done = (value.abs() <= _VALUE_TOLERANCE) | (high - low <= narrow)
        if bool((done | (good & ((newton - x).abs() <= narrow))).all()):
            break
        x, previous = step.where(~done, x), value.abs()
    return x
