r"""The convex generators behind the f-divergences, family by family, in log space.

A generator ``f`` is convex on ``t > 0`` with ``f(1) = 0``; it gives
``D_f(p || q) = E_q[f(p / q)]``. Everything here is a function of ``log t``, because a ratio of two
probabilities overflows long before its logarithm does. Each family has

* an *interior*: ``q f(p/q)`` from ``log p`` and ``log q``, in a form that neither overflows while
  the result is finite nor loses the small values near ``p = q``;
* a *generator*: ``f'``, ``log f''``, the convex conjugate ``f*`` and ``f(0)``.

The perspective ``g(t) = t f(1/t)`` swaps the arguments, ``D_f(p || q) = D_g(q || p)``. Each family
is closed under it, so no formula is inverted numerically.

Source: the table follows Go et al. (2023), arXiv:2302.08215; the softened reverse KL is from
Xu et al. (2025), arXiv:2502.15681. Conjugates: ``f*(y) = sup_t t y - f(t)``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Interior = Callable[[Tensor, Tensor], Tensor]

LOG_2 = math.log(2.0)

# exp(80) fits in float32 and exp(-80) is nothing beside one: where an item's probability is
# exp(-80) times the other's, its share of a bounded term is dropped.
_NEGLIGIBLE = 80.0

# Newton's method from the right of a convex root: seven steps reach float64 (tested on the line).
_NEWTON_STEPS = 8


@dataclass(frozen=True)
class Generator:
    """A convex function ``f`` on ``t > 0`` with ``f(1) = 0``, known by its derivatives.

    Attributes:
        derivative: ``log t -> f'(t)``; finite limits are kept at ``log t = -inf, +inf``.
        log_second_derivative: ``log t -> log f''(t)``.
        conjugate: ``y -> f*(y)`` for ``f'(0) < y < f'(inf)``; beyond, ``FDivergence`` knows it.
        at_zero: ``f(0)``, the limit from the right; may be ``inf``.
    """

    derivative: Callable[[Tensor], Tensor]
    log_second_derivative: Callable[[Tensor], Tensor]
    conjugate: Callable[[Tensor], Tensor]
    at_zero: float


# --- affine changes: a f(t) + s (t - 1) --------------------------------------------------------


def affine(base: Generator, scale: float, slope: float) -> Generator:
    """Return the generator ``scale * f(t) + slope * (t - 1)``."""
    return Generator(
        derivative=partial(_affine_derivative, base=base, scale=scale, slope=slope),
        log_second_derivative=partial(_affine_log_second, base=base, scale=scale),
        conjugate=partial(_affine_conjugate, base=base, scale=scale, slope=slope),
        at_zero=scale * base.at_zero - slope,
    )


def affine_interior(
    log_p: Tensor, log_q: Tensor, *, base: Interior, scale: float, slope: float
) -> Tensor:
    """``q f(p/q)`` of ``scale * f(t) + slope * (t - 1)``."""
    scaled = scale * base(log_p, log_q)
    if slope == 0.0:
        return scaled
    return scaled + slope * _difference(log_p, log_q, log_p - log_q)


def _affine_derivative(log_t: Tensor, *, base: Generator, scale: float, slope: float) -> Tensor:
    return scale * base.derivative(log_t) + slope


def _affine_log_second(log_t: Tensor, *, base: Generator, scale: float) -> Tensor:
    return base.log_second_derivative(log_t) + math.log(scale)


def _affine_conjugate(y: Tensor, *, base: Generator, scale: float, slope: float) -> Tensor:
    return scale * base.conjugate((y - slope) / scale) + slope


def _difference(log_a: Tensor, log_b: Tensor, log_ratio: Tensor) -> Tensor:
    # a - b with log_ratio = log(a/b): the larger one is factored out, so that nothing overflows
    # before the result does, and nearly equal values keep their relative accuracy.
    larger = log_ratio > 0
    scale = torch.exp(torch.where(larger, log_a, log_b))
    small = torch.expm1(torch.where(larger, -log_ratio, log_ratio))
    return torch.where(larger, -scale, scale) * small


def swapped(log_p: Tensor, log_q: Tensor, *, base: Interior) -> Tensor:
    """``p f(q/p)``: the interior of the perspective generator."""
    return base(log_q, log_p)


# --- Kullback-Leibler, both ways: t log t and -log t -------------------------------------------


def kl_interior(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``p log(p/q)``."""
    return torch.exp(log_p) * (log_p - log_q)


def _kl_derivative(log_t: Tensor) -> Tensor:
    return log_t + 1.0


def _kl_conjugate(y: Tensor) -> Tensor:
    return torch.exp(y - 1.0)


def _reverse_kl_derivative(log_t: Tensor) -> Tensor:
    return -torch.exp(-log_t)


def _reverse_kl_conjugate(y: Tensor) -> Tensor:
    return -1.0 - torch.log(-y)


def _multiple(log_t: Tensor, *, factor: float) -> Tensor:
    # The exponent of a power of t; 0 * log 0 is 0, not NaN.
    return _unless_nan(log_t, torch.zeros_like(log_t)) if factor == 0.0 else factor * log_t


def _unless_nan(source: Tensor, value: Tensor) -> Tensor:
    return torch.where(source.isnan(), source, value)


KL_GENERATOR = Generator(_kl_derivative, partial(_multiple, factor=-1.0), _kl_conjugate, 0.0)
REVERSE_KL_GENERATOR = Generator(
    _reverse_kl_derivative, partial(_multiple, factor=-2.0), _reverse_kl_conjugate, math.inf
)


# --- alpha family of Amari order A -------------------------------------------------------------
# With the deformed logarithm L_c(t) = (t^c - 1)/c, L_0 = log, every formula below holds at the
# limits A = 0 and A = 1 without a special case:
#   f'(t) = L_{A-1}(t),   f(t) = [t L_{A-1}(t) - (t - 1)] / A,   f*(y) = L_A(L_{A-1}^{-1}(y)).


def alpha_generator(order: float) -> Generator:
    """``(t^A - A t - (1 - A)) / (A (A - 1))``."""
    return Generator(
        derivative=partial(_quotient, order=order - 1.0),
        log_second_derivative=partial(_multiple, factor=order - 2.0),
        conjugate=partial(_alpha_conjugate, order=order),
        at_zero=1.0 / order if order > 0.0 else math.inf,
    )


def alpha_interior(log_p: Tensor, log_q: Tensor, *, order: float) -> Tensor:
    """``(p^A q^(1-A) - A p - (1-A) q) / (A (A-1))``."""
    if order < 0.5:  # Order A with swapped arguments is order 1 - A, and 1/A stays below 2.
        return alpha_interior(log_q, log_p, order=1.0 - order)
    log_t, slope = log_p - log_q, order - 1.0
    if slope == 0.0:
        curved = torch.exp(log_p) * log_t
    else:
        curved = _difference(order * log_p - slope * log_q, log_p, slope * log_t) / slope
    return (curved - _difference(log_p, log_q, log_t)) / order


def pearson_interior(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``(p - q)^2 / q``: twice order 2, in fewer operations."""
    log_t = log_p - log_q
    larger = log_t > 0
    scale = torch.exp(torch.where(larger, 2.0 * log_p - log_q, log_q))
    return scale * torch.expm1(torch.where(larger, -log_t, log_t)).square()


def hellinger_interior(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``(sqrt p - sqrt q)^2``: half of order 1/2, in fewer operations."""
    return (torch.exp(log_p / 2) - torch.exp(log_q / 2)).square()


def _quotient(log_t: Tensor, *, order: float) -> Tensor:
    # L_order(t)
    return log_t if order == 0.0 else torch.expm1(order * log_t) / order


def _alpha_conjugate(y: Tensor, *, order: float) -> Tensor:
    slope = order - 1.0
    log_t = y if slope == 0.0 else torch.log1p(slope * y) / slope
    return _quotient(log_t, order=order)


# --- skewed Jensen-Shannon: the mixture is m = b p + (1-b) q -----------------------------------


def skew_generator(beta: float) -> Generator:
    """``b t log t - (b t + 1 - b) log(b t + 1 - b)``."""
    return Generator(
        derivative=partial(_skew_derivative, beta=beta),
        log_second_derivative=partial(_skew_log_second, beta=beta),
        conjugate=partial(_skew_conjugate, beta=beta),
        at_zero=-(1.0 - beta) * math.log1p(-beta),
    )


def skew_interior(log_p: Tensor, log_q: Tensor, *, beta: float) -> Tensor:
    """``b p log(p/m) + (1-b) q log(q/m)`` with ``m = b p + (1-b) q``."""
    log_t = log_p - log_q
    rest = 1.0 - beta
    # log(m/p) and log(m/q) through log1p: exactly 0 at p = q, and right for b near 0 or 1.
    log_m_over_p = torch.log1p(rest * torch.expm1(-log_t.clamp(min=-_NEGLIGIBLE)))
    log_m_over_q = torch.log1p(beta * torch.expm1(log_t.clamp(max=_NEGLIGIBLE)))
    return -(beta * torch.exp(log_p) * log_m_over_p + rest * torch.exp(log_q) * log_m_over_q)


def _skew_derivative(log_t: Tensor, *, beta: float) -> Tensor:
    # t/(b t + 1 - b) = sigmoid(log t + logit b) / b
    return beta * (logsigmoid(log_t + _logit(beta)) - math.log(beta))


def _skew_log_second(log_t: Tensor, *, beta: float) -> Tensor:
    return math.log(beta) + logsigmoid(-log_t - _logit(beta)) - log_t


def _skew_conjugate(y: Tensor, *, beta: float) -> Tensor:
    exponent = (y / beta + math.log(beta)).clamp(max=0.0)
    rest = 1.0 - beta
    return rest * (math.log(rest) - torch.log(-torch.expm1(exponent)))


def _logit(beta: float) -> float:
    return math.log(beta) - math.log1p(-beta)


# --- total variation: |t - 1| / 2 --------------------------------------------------------------


def total_variation_interior(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``|p - q| / 2``."""
    return (torch.exp(log_p) - torch.exp(log_q)).abs() / 2


def _total_variation_derivative(log_t: Tensor) -> Tensor:
    return _unless_nan(log_t, torch.sign(log_t) / 2)


def _total_variation_log_second(log_t: Tensor) -> Tensor:
    return _unless_nan(log_t, torch.full_like(log_t, -math.inf))


def _total_variation_conjugate(y: Tensor) -> Tensor:
    return y


TOTAL_VARIATION_GENERATOR = Generator(
    _total_variation_derivative, _total_variation_log_second, _total_variation_conjugate, 0.5
)


# --- Jeffreys: (t - 1) log t -------------------------------------------------------------------


def jeffreys_interior(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``(p - q) log(p/q)``."""
    return (torch.exp(log_p) - torch.exp(log_q)) * (log_p - log_q)


def _jeffreys_derivative(log_t: Tensor) -> Tensor:
    return log_t - torch.expm1(-log_t)


def _jeffreys_log_second(log_t: Tensor) -> Tensor:
    return -logsigmoid(log_t) - log_t


def _jeffreys_conjugate(y: Tensor) -> Tensor:
    # f'(t) = y reads w + log w = 1 - y with w = 1/t = W(exp(1-y)), Lambert's W. In u = log w,
    # W + 1/W + y - 2 is exp(-u) - u - 1: nothing overflows, nothing cancels.
    u = _log_lambert_of_exp(1.0 - y)
    return torch.expm1(-u) - u


def _log_lambert_of_exp(z: Tensor) -> Tensor:
    # log W(exp z): the root u of exp(u) + u = z. Unrolled Newton is differentiable to any order.
    u = torch.where(z > 1.0, torch.log(z.clamp(min=1.0)), z)
    for _ in range(_NEWTON_STEPS):
        u = u - (torch.exp(u) + u - z) / (torch.exp(u) + 1.0)
    return u


JEFFREYS_GENERATOR = Generator(
    _jeffreys_derivative, _jeffreys_log_second, _jeffreys_conjugate, math.inf
)


# --- softened reverse KL and its perspective ---------------------------------------------------


def softened_reverse_kl_interior(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``(p + q) log((p + q) / (2 p))``."""
    total = torch.exp(log_p) + torch.exp(log_q)
    return -total * (logsigmoid(log_p - log_q) + LOG_2)


def _softened_derivative(log_t: Tensor) -> Tensor:
    # log((1+t)/(2t)) - 1/t; below -1000 the second term is infinite and alone decides.
    return -logsigmoid(log_t.clamp(min=-1e3)) - LOG_2 - torch.exp(-log_t)


def _softened_log_second(log_t: Tensor) -> Tensor:
    return logsigmoid(-log_t) - 2.0 * log_t


def _softened_conjugate(y: Tensor) -> Tensor:
    # f'(t) = y reads v - log v = 1 - log 2 - y with v = 1 + 1/t = -W_{-1}(-2 exp(y-1)),
    # and f*(y) = -1 - log(v/2). In u = log v: expm1(u) - u = -log 2 - y =: z >= 0.
    z = (-LOG_2 - y).clamp(min=1e-30)
    u = torch.minimum(torch.sqrt(2.0 * z), torch.log(2.0 * z + 2.0))
    for _ in range(_NEWTON_STEPS):
        slope = torch.expm1(u)
        u = u - (slope - u - z) / slope
    return LOG_2 - 1.0 - u


def _softened_perspective_derivative(log_t: Tensor) -> Tensor:
    return 1.0 - LOG_2 - logsigmoid(-log_t)


def _softened_perspective_log_second(log_t: Tensor) -> Tensor:
    return logsigmoid(-log_t)


def _softened_perspective_conjugate(y: Tensor) -> Tensor:
    return 2.0 * torch.exp(y - 1.0) - y


SOFTENED_REVERSE_KL_GENERATOR = Generator(
    _softened_derivative, _softened_log_second, _softened_conjugate, math.inf
)
SOFTENED_REVERSE_KL_PERSPECTIVE = Generator(
    _softened_perspective_derivative,
    _softened_perspective_log_second,
    _softened_perspective_conjugate,
    -LOG_2,
)
