r"""The temperature that maximises the ALDR objective, globally, for a batch at once.

With the weights maximised, the objective :math:`G(\lambda) = \psi(\lambda) - \frac a2 (\lambda -
\lambda_0)^2`, with :math:`a = \alpha \log K / \lambda_0`, is a convex function minus a convex
function, on :math:`[\lambda_0 (1 - 1/\alpha), \lambda_0]`. Its slope

.. math:: F(\lambda) = a (\lambda_0 - \lambda) - \mathrm{KL}(p_\lambda \,\|\, 1/K)

is not negative at the lower end and not positive at the upper one. A geometric grid splits the
interval. Every local maximum lies in a cell in which F goes from plus to minus. Of these cells the
two with the largest upper bound (the chord of the convex part lies above it) are solved by Newton's
method, which falls back to bisection, and the better root is returned.

The KL divergence depends on :math:`\log \lambda` with a slope bounded by :math:`\mathrm{Var}_p
(\delta/\lambda)`, whatever the scale of the logits, so a step of 5 % of the temperature is fine
enough to separate maxima that differ in value. No step looks at a value: nothing waits for a device
and the loop traces.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from steelyard.classification._tempered import kl_to_uniform, soft_maximum, soft_weights

_STEP = 0.05
_LEAST_CELLS, _MOST_CELLS = 8, 256
_CANDIDATES = 2
_NEWTON_STEPS = 10
_BLOCK = 2**20  # entries of [temperatures, B, K] that are held at a time


class _Point(NamedTuple):
    """Soft maximum, slope of the objective and slope of that, at each temperature."""

    value: Tensor
    slope: Tensor
    curvature: Tensor


@torch.no_grad()
def best_temperature(gaps: Tensor, initial: float, alpha: float) -> Tensor:
    """Maximiser over the temperature, ``[B]``, detached.

    Args:
        gaps: ``[B, K]``, K >= 2.
        initial: largest temperature, > 0.
        alpha: stiffness > 1; the smallest temperature is ``initial (1 - 1/alpha)``.
    """
    gaps = gaps.detach()
    stiffness = alpha * math.log(gaps.shape[1]) / initial
    knots = gaps.new_tensor(_grid(initial, alpha)).unsqueeze(1).expand(-1, gaps.shape[0])
    blocks = torch.split(knots, max(1, _BLOCK // gaps.numel()))
    table = [_evaluate(gaps, block, initial, stiffness) for block in blocks]
    values = torch.cat([point.value for point in table])
    slopes = torch.cat([point.slope for point in table])
    # The signs at the two ends are known; rounding must not turn them.
    slopes = torch.cat((slopes[:1].clamp(min=0), slopes[1:-1], slopes[-1:].clamp(max=0)))
    bound = _upper_bound(knots, values, initial, stiffness)
    bracketed = (slopes[:-1] >= 0) & (slopes[1:] <= 0)
    cells = bound.where(bracketed, -math.inf).topk(_CANDIDATES, 0).indices
    low, high = knots[:-1].gather(0, cells), knots[1:].gather(0, cells)
    falls = slopes[:-1].gather(0, cells), slopes[1:].gather(0, cells)
    root = _solve(gaps, (low, high), falls, initial, stiffness)
    reached = soft_maximum(gaps, root) - 0.5 * stiffness * (root - initial).square()
    return root.gather(0, reached.argmax(0, keepdim=True)).squeeze(0)


def _grid(initial: float, alpha: float) -> list[float]:
    """Temperatures from the smallest to the largest possible, in equal ratios."""
    width = -math.log1p(-1 / alpha)
    cells = min(max(math.ceil(width / _STEP), _LEAST_CELLS), _MOST_CELLS)
    inner = [initial * math.exp(-width * (cells - i) / cells) for i in range(1, cells)]
    return [initial * (1 - 1 / alpha), *inner, initial]


def _evaluate(gaps: Tensor, temperature: Tensor, initial: float, stiffness: float) -> _Point:
    """Evaluate gaps ``[B, K]`` at temperatures ``[.., B]``."""
    weights = soft_weights(gaps, temperature)
    mean = (weights * gaps).sum(-1, keepdim=True)
    scaled = (gaps - mean) / temperature.unsqueeze(-1)
    variance = (weights * scaled.square()).sum(-1)
    return _Point(
        soft_maximum(gaps, temperature),
        stiffness * (initial - temperature) - kl_to_uniform(weights),
        variance / temperature - stiffness,
    )


def _upper_bound(knots: Tensor, values: Tensor, initial: float, stiffness: float) -> Tensor:
    """Bound of the objective in each cell, ``[cells, B]``: the chord less the penalty."""
    low, high = knots[:-1], knots[1:]
    slope = (values[1:] - values[:-1]) / (high - low)
    place = torch.minimum(torch.maximum(initial + slope / stiffness, low), high)
    chord = values[:-1] + slope * (place - low)
    return chord - 0.5 * stiffness * (place - initial).square()


def _solve(
    gaps: Tensor,
    ends: tuple[Tensor, Tensor],
    slopes: tuple[Tensor, Tensor],
    initial: float,
    stiffness: float,
) -> Tensor:
    """Root of the slope between the ends, where it goes from plus to minus."""
    low, high = ends
    drop = slopes[0] - slopes[1]
    share = torch.where(drop > 0, slopes[0] / drop.where(drop > 0, 1.0), 0.5)
    place = low + share * (high - low)
    for _ in range(_NEWTON_STEPS):
        point = _evaluate(gaps, place, initial, stiffness)
        low = torch.where(point.slope >= 0, place, low)
        high = torch.where(point.slope <= 0, place, high)
        newton = place - point.slope / point.curvature
        inside = (newton >= low) & (newton <= high)
        place = torch.where(inside, newton, (low + high) / 2)
    return place
