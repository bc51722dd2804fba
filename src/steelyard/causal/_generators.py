"""The five generators of the paper, in the forms that its dual problem needs.

``D_f(P || Q) = E_Q f(dP/dQ)`` with ``P`` observed and ``Q`` interventional. With ``s = dQ/dP`` the
cost is ``g(s) = s f(1/s)``. Its conjugate ``g*(t)`` ends at ``t_max = f(0)``; everything is written
in the distance to that end, ``w = t_max - t``, where it is stable.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from steelyard._checks import check_choice

LOG_2 = math.log(2.0)


class Generator(NamedTuple):
    """A generator ``f`` with ``f(1) = 0``."""

    at_zero: float  # f(0) = t_max
    radius: Callable[[Tensor], Tensor]  # B(e) = e f(1/e) + (1 - e) f(0)
    radius_derivative: Callable[[Tensor], Tensor]
    conjugate: Callable[[Tensor], Tensor]  # g* of w
    closed: bool  # g* is finite at w = 0


def generator_of(divergence: str) -> Generator:
    """Look a generator up, or say which there are."""
    check_choice("divergence", divergence, tuple(GENERATORS))
    return GENERATORS[divergence]


def _js_radius(e: Tensor) -> Tensor:
    missing = 1 - e
    return (e * e.log() - (1 + e) * torch.log1p(-missing / 2) + missing * LOG_2) / 2


GENERATORS = {
    "kl": Generator(
        at_zero=0.0,
        radius=lambda e: -e.log(),
        radius_derivative=lambda e: -1 / e,
        conjugate=lambda w: -1 - w.log(),
        closed=False,
    ),
    "hellinger": Generator(
        at_zero=0.5,
        radius=lambda e: (1 - e) / (1 + e.sqrt()),
        radius_derivative=lambda e: -0.5 / e.sqrt(),
        conjugate=lambda w: 0.25 / w - 0.5,
        closed=False,
    ),
    "chi2": Generator(
        at_zero=0.5,
        radius=lambda e: (1 - e) / (2 * e),
        radius_derivative=lambda e: -0.5 / e.square(),
        conjugate=lambda w: 1 - (2 * w).sqrt(),
        closed=True,
    ),
    "tv": Generator(
        at_zero=0.5,
        radius=lambda e: 1 - e,
        radius_derivative=lambda e: -torch.ones_like(e),
        conjugate=lambda w: (0.5 - w).clamp(min=-0.5),
        closed=True,
    ),
    "js": Generator(
        at_zero=LOG_2 / 2,
        radius=_js_radius,
        radius_derivative=lambda e: (e.log() - e.log1p()) / 2,
        conjugate=lambda w: -(LOG_2 + torch.log(-torch.expm1(-2 * w))) / 2,
        closed=False,
    ),
}
