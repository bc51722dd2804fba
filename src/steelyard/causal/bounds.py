r"""Bounds on a mean under an intervention when confounders are hidden: exact, for finite support.

``P`` is the law of the outcome of those who received arm ``a``, ``Q`` its law if everyone did. They
differ by at most a radius that depends on the propensity ``e`` alone, so the mean under ``Q`` lies
between the extremes over an f-ball around ``P``.

**Read this before a width.** ``Q = e P + (1 - e) R`` for some law ``R`` of those who did not
receive the arm, and the f-ball holds *every* such ``Q``. So each of these intervals contains the
no-assumption (Manski) interval on the same outcome range, whatever the divergence: they are never
shorter than :func:`manski_bounds`. And because ``R`` may lie anywhere, the ends are infinite for an
outcome without a range. "Sharp" here means sharp over the ball.

Nothing carries a gradient here.

Source: Jung, Kang (2026), Information-Theoretic Causal Bounds under Unmeasured Confounding,
arXiv:2601.17160.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from steelyard._checks import (
    check_floating,
    check_not_empty,
    check_range,
    check_same_shape,
    check_shape,
)
from steelyard._reduce import accumulation_dtype
from steelyard.causal._ball import largest_mean
from steelyard.causal._generators import generator_of
from steelyard.causal._inputs import (
    as_law,
    as_tensor,
    check_outcome_range,
    check_propensity,
    require_all,
)

__all__ = [
    "AggregatedBounds",
    "Bounds",
    "Divergence",
    "aggregate_bounds",
    "divergence_radius",
    "finite_support_bounds",
    "ipm_radius",
    "manski_bounds",
    "radius_derivative",
]

Divergence = Literal["kl", "hellinger", "chi2", "tv", "js"]
# An end of the range that was never observed still bounds the ball: it enters with next to no mass.
_UNSEEN = 1e-30


class Bounds(NamedTuple):
    """The two ends of an interval."""

    lower: Tensor
    upper: Tensor


class AggregatedBounds(NamedTuple):
    """What :func:`aggregate_bounds` returns, each ``[N]``."""

    lower: Tensor
    upper: Tensor
    k: Tensor


def divergence_radius(propensity: Tensor | float, divergence: Divergence) -> Tensor:
    r"""Largest divergence of the observed law from the interventional one.

    .. math:: D_f(P \| Q) \le B_f(e) = e f(1/e) + (1 - e) f(0)

    ========= ================================== ========================================
    name      f(t)                               B(e)
    ========= ================================== ========================================
    kl        t log t                            -log e
    hellinger (sqrt t - 1)^2 / 2                 1 - sqrt e
    chi2      (t - 1)^2 / 2                      (1 - e) / (2 e)
    tv        abs(t - 1) / 2                     1 - e
    js        (t log t - (t+1) log((t+1)/2)) / 2 (e log e - (1+e) log(1+e)) / 2 + log 2
    ========= ================================== ========================================

    Args:
        propensity: probability of the arm, in (0, 1], any shape or a number.
        divergence: one of the names above. ``"hellinger"`` and ``"chi2"`` are half of
            ``SQUARED_HELLINGER`` and ``PEARSON_CHI2`` of :mod:`steelyard.divergences`.

    Returns:
        The shape of ``propensity``, in nats for kl and js; falls in ``propensity``, 0 at 1.

    Raises:
        ValueError: a propensity outside (0, 1], or another name.
        TypeError: ``propensity`` is neither a number nor floating point.

    Example:
        >>> divergence_radius(torch.tensor([1.0, 0.25]), "hellinger")
        tensor([0.0000, 0.5000])

    Source: Jung, Kang (2026), Theorem 1, Corollary T1.1, arXiv:2601.17160.
    """
    generator = generator_of(divergence)
    e = as_tensor("propensity", propensity)
    check_propensity("propensity", e, one_allowed=True)
    return generator.radius(e.to(accumulation_dtype(e.dtype))).to(e.dtype)


def radius_derivative(propensity: Tensor | float, divergence: Divergence) -> Tensor:
    r"""Derivative of :func:`divergence_radius` in the propensity.

    .. math:: B_f'(e) = f(1/e) - f'(1/e)/e - f(0)

    Args:
        propensity: in (0, 1], any shape or a number.
        divergence: see :func:`divergence_radius`.

    Returns:
        The shape of ``propensity``; negative.

    Raises:
        ValueError: a propensity outside (0, 1], or another name.
        TypeError: ``propensity`` is neither a number nor floating point.

    Example:
        >>> radius_derivative(0.5, "kl").item(), radius_derivative(0.5, "chi2").item()
        (-2.0, -2.0)

    Source: Jung, Kang (2026), Corollary T1.1, arXiv:2601.17160.
    """
    generator = generator_of(divergence)
    e = as_tensor("propensity", propensity)
    check_propensity("propensity", e, one_allowed=True)
    return generator.radius_derivative(e.to(accumulation_dtype(e.dtype))).to(e.dtype)


def ipm_radius(propensity: Tensor | float, bound: float = 1.0) -> Tensor:
    r"""Largest integral probability metric over functions bounded by ``bound``.

    .. math:: 2C \min\{1 - e, \sqrt{-\log(e)/2}\} = 2C(1 - e)

    The first is always the smaller. For the maximum mean discrepancy of a kernel bounded by ``K``
    use ``bound = sqrt(K)``.

    Args:
        propensity: in (0, 1], any shape or a number.
        bound: ``C``, at least 0.

    Returns:
        The shape of ``propensity``.

    Raises:
        ValueError: a propensity outside (0, 1], or ``bound`` negative.
        TypeError: ``propensity`` is neither a number nor floating point.

    Example:
        >>> ipm_radius(0.75).item()
        0.5

    Source: Jung, Kang (2026), Corollary T1.3, arXiv:2601.17160.
    """
    check_range("bound", bound, at_least=0.0, below=math.inf)
    e = as_tensor("propensity", propensity)
    check_propensity("propensity", e, one_allowed=True)
    return 2 * bound * (1 - e)


def finite_support_bounds(
    y: Tensor,
    p: Tensor,
    propensity: Tensor | float,
    divergence: Divergence,
    *,
    outcome_range: tuple[float, float] | None = None,
) -> Bounds:
    r"""Exact extremes of the mean over an f-ball around a law of finite support.

    .. math::
        \max \ / \ \min_s \Big\{ \sum_i p_i s_i y_i :\ s \ge 0,\ \sum_i p_i s_i = 1,\
        \sum_i p_i s_i f(1/s_i) \le B_f(e) \Big\}

    Total variation has a closed form: the lowest ``1 - e`` of the mass moves to the largest value.
    The others are roots of one increasing equation (nested twice for Jensen-Shannon), to about
    1e-12 of the range of ``y``; all problems of a batch are solved at once.

    The interval contains that of :func:`manski_bounds` with the same ``outcome_range``, always: the
    ball holds every law ``e P + (1 - e) R``.

    Args:
        y: values, ``[..., S]``, finite; a function of the outcome if you bound the mean of one.
        p: their probabilities among those who received the arm, ``[..., S]``, sum 1. Values of
            probability 0 are not in the support.
        propensity: probability of the arm, in (0, 1), ``[...]`` or a number.
        divergence: see :func:`divergence_radius`.
        outcome_range: lowest and highest possible value. ``None`` = those of the support, as if
            the outcome could take no value but these: if ``y`` is a sample of a continuous
            outcome, the ends then move with the sample.

    Returns:
        ``lower`` and ``upper``, ``[...]``, in the dtype of ``y``; detached.

    Raises:
        ValueError: NaN or infinity, a negative probability, probabilities of another sum, a
            propensity outside (0, 1), ``y`` outside ``outcome_range``, shapes do not fit.
        TypeError: not floating point.

    Example:
        A coin, seen in 60 percent of the population; the rest could all be 0 or all be 1:

        >>> y, p = torch.tensor([0.0, 1.0]).double(), torch.tensor([0.5, 0.5]).double()
        >>> [round(end.item(), 4) for end in manski_bounds(y, p, 0.6)]
        [0.3, 0.7]
        >>> [round(end.item(), 4) for end in finite_support_bounds(y, p, 0.6, "chi2")]
        [0.1838, 0.8162]
        >>> [round(end.item(), 4) for end in finite_support_bounds(y, p, 0.6, "tv")]
        [0.1, 0.9]

    Source: Jung, Kang (2026), Theorem 2, Corollary P1, arXiv:2601.17160; the solver and the closed
    form are derived in the documentation.
    """
    generator = generator_of(divergence)
    values, law = as_law(y, p)
    e = as_tensor("propensity", propensity, values).detach()
    check_propensity("propensity", e)
    if outcome_range is not None:
        ends = check_outcome_range(outcome_range, values, law > 0)
        unseen = values.new_tensor(ends).expand(*values.shape[:-1], 2)
        values = torch.cat([values, unseen], -1)
        law = torch.cat([law, torch.full_like(unseen, _UNSEEN)], -1)
    shape = torch.broadcast_shapes(values.shape[:-1], e.shape)  # type: ignore[no-untyped-call]
    support = values.shape[-1]
    values, law = (v.expand(*shape, support).reshape(-1, support) for v in (values, law))
    kept = e.to(values.dtype).expand(shape).reshape(-1)
    # the smallest mean is minus the largest of -y: two halves of one batch
    both = [torch.cat(pair) for pair in ((values, -values), (law, law), (kept, kept))]
    largest = largest_mean(both[0], both[1], generator.radius(both[2]), divergence, both[2])
    upper, negative = largest.to(y.dtype).reshape(2, *shape)
    return Bounds(-negative, upper)


def manski_bounds(
    y: Tensor,
    p: Tensor,
    propensity: Tensor | float,
    *,
    outcome_range: tuple[float, float] | None = None,
) -> Bounds:
    r"""No-assumption bounds on the mean: those without the arm could all be at either end.

    .. math:: \big[\, e\, E_P y + (1 - e)\, m,\quad e\, E_P y + (1 - e)\, M \,\big]

    These are the sharpest bounds that hold for every model with this range. As an f-ball they are
    that of the generator ``max(t - 1/e, 0)``, of radius 0.

    Args:
        y: values, ``[..., S]``, finite.
        p: their probabilities, ``[..., S]``, sum 1.
        propensity: in (0, 1), ``[...]`` or a number.
        outcome_range: ``m`` and ``M``; ``None`` = the smallest and largest value of the support.

    Returns:
        ``lower`` and ``upper``, ``[...]``, in the dtype of ``y``; detached.

    Raises:
        ValueError: as :func:`finite_support_bounds`.
        TypeError: not floating point.

    Example:
        >>> y, p = torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.5])
        >>> manski_bounds(y, p, 0.5, outcome_range=(0.0, 10.0))
        Bounds(lower=tensor(1.), upper=tensor(6.))

    Source: Manski (1990), Nonparametric Bounds on Treatment Effects, AER 80(2).
    """
    values, law = as_law(y, p)
    e = as_tensor("propensity", propensity, values).detach()
    check_propensity("propensity", e)
    support = law > 0
    ends = (
        values.masked_fill(~support, math.inf).amin(-1),
        values.masked_fill(~support, -math.inf).amax(-1),
    )
    if outcome_range is not None:
        low, high = check_outcome_range(outcome_range, values, support)
        ends = (torch.full_like(ends[0], low), torch.full_like(ends[1], high))
    seen = e * (law * values).sum(-1)
    return Bounds(*((seen + (1 - e) * end).to(y.dtype) for end in ends))


def aggregate_bounds(lower: Tensor, upper: Tensor) -> AggregatedBounds:
    r"""Combine intervals of several divergences: the tightest combination that is not empty.

    .. math:: L_k = k\text{-th largest lower end}, \qquad U_k = k\text{-th smallest upper end}

    with the smallest ``k`` for which ``L_k <= U_k``. At ``k = 1`` this is the intersection, at
    ``k = F`` the loosest envelope. The result is valid if at least ``F - k + 1`` of the lower ends
    and as many of the upper ones are.

    For *exact* intervals ``k = 1`` is always right. Estimates can miss each other; a ``k`` above 1
    says that they did.

    Args:
        lower: lower ends, ``[F, N]``; ``-inf`` = none.
        upper: upper ends, ``[F, N]``, none below its lower end.

    Returns:
        ``lower``, ``upper`` ``[N]`` and ``k`` ``[N]`` (int64, from 1).

    Raises:
        ValueError: shapes differ, empty, NaN, or an interval with its ends swapped.
        TypeError: not floating point.

    Example:
        >>> lower = torch.tensor([[0.0, 0.0], [0.2, 0.6]])
        >>> upper = torch.tensor([[1.0, 0.5], [0.9, 1.0]])
        >>> for ends in aggregate_bounds(lower, upper):
        ...     print(ends)
        tensor([0.2000, 0.0000])
        tensor([0.9000, 1.0000])
        tensor([1, 2])

    Source: Jung, Kang (2026), arXiv:2601.17160, order-statistic aggregation.
    """
    check_floating(lower=lower, upper=upper)
    check_shape("lower", lower, (None, None))
    check_same_shape(lower=lower, upper=upper)
    check_not_empty("lower", lower)
    for name, ends in (("lower", lower), ("upper", upper)):
        require_all(~ends.isnan(), name, "not be NaN", ends)
    require_all(lower <= upper, "lower", "not exceed upper", lower)
    lows, highs = lower.sort(0, descending=True).values, upper.sort(0).values
    k = (lows <= highs).int().argmax(0, keepdim=True)
    return AggregatedBounds(
        lows.gather(0, k).squeeze(0), highs.gather(0, k).squeeze(0), k.squeeze(0) + 1
    )
