r"""The dual problem as a risk over covariates, which a network can minimise.

Source: Jung, Kang (2026), Information-Theoretic Causal Bounds under Unmeasured Confounding,
arXiv:2601.17160.
"""

import math

import torch
from torch import Tensor

from steelyard._checks import (
    check_floating,
    check_mask,
    check_not_empty,
    check_same_shape,
    check_shape,
)
from steelyard._reduce import Reduction, accumulation_dtype, fill_masked, reduce_masked
from steelyard.causal._generators import Generator, generator_of
from steelyard.causal._inputs import check_propensity, require_all
from steelyard.causal.bounds import Divergence

__all__ = ["debiased_risk"]


def debiased_risk(
    outcome: Tensor,
    treatment: Tensor,
    propensity: Tensor,
    scale: Tensor,
    shift: Tensor,
    divergence: Divergence,
    *,
    debias: bool = True,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Risk whose minimisers give the upper bound at every covariate, robust to the propensity.

    .. math::
        \ell = \lambda_A \Big\{ B_f(e_A) + g^*\Big(\frac{Y - u_A}{\lambda_A}\Big) \Big\} + u_A
        + \sum_{a \in \{0, 1\}} e_a \lambda_a B_f'(e_a) \big(1\{A = a\} - e_a\big)

    The first part is the dual of the largest mean, averaged over the covariates. The sum has mean
    0 at the true propensity and makes the mean of the risk insensitive to a small error of it
    (Neyman orthogonality), for every ``lambda`` and ``u``. For the lower bound use ``-outcome``
    and change the sign of the result. Nothing is detached.

    Args:
        outcome: ``Y``, ``[N]``.
        treatment: ``A``, 0 or 1, ``[N]``, integer, boolean or floating.
        propensity: probability of arm 1, in (0, 1), ``[N]``.
        scale: ``lambda`` of arms 0 and 1, positive, ``[N, 2]``.
        shift: ``u`` of arms 0 and 1, ``[N, 2]``.
        divergence: see :func:`divergence_radius`.
        debias: include the sum; ``False`` = the plain risk.
        mask: ``[N]``, true = counts.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` = per item.

    Returns:
        0-d, or ``[N]``; in the dtype of ``outcome``. Infinite, with a zero gradient, where
        ``Y`` is too large for its ``lambda`` and ``u``.

    Raises:
        ValueError: wrong shapes, empty, a treatment other than 0 and 1, a propensity outside
            (0, 1), a scale that is not positive.
        TypeError: not floating point.

    Example:
        At the true propensity the correction is 0 on average over the treatment:

        >>> y, e = torch.tensor([0.4, 0.4]), torch.tensor([0.5, 0.5])
        >>> scale, shift = torch.ones(2, 2), torch.full((2, 2), 0.5)
        >>> arms = torch.tensor([0, 1])
        >>> debiased_risk(y, arms, e, scale, shift, "chi2")
        tensor(0.9046)
        >>> debiased_risk(y, arms, e, scale, shift, "chi2", debias=False)
        tensor(0.9046)

    Source: Jung, Kang (2026), risk and debiased risk, arXiv:2601.17160.
    """
    generator = generator_of(divergence)
    check_floating(outcome=outcome, propensity=propensity, scale=scale, shift=shift)
    check_shape("outcome", outcome, (None,))
    check_not_empty("outcome", outcome)
    check_same_shape(outcome=outcome, treatment=treatment, propensity=propensity)
    for name, tensor in (("scale", scale), ("shift", shift)):
        check_shape(name, tensor, (len(outcome), 2))
    check_mask(mask, outcome)
    require_all((treatment == 0) | (treatment == 1), "treatment", "be 0 or 1", treatment)
    check_propensity("propensity", fill_masked(propensity, mask, 0.5))
    pair = None if mask is None else mask[:, None].expand(-1, 2)
    scale = fill_masked(scale, pair, 1.0)
    require_all(scale > 0, "scale", "be positive", scale)
    wide = accumulation_dtype(outcome.dtype)
    risk = pointwise_risk(
        fill_masked(outcome, mask).to(wide),
        treatment != 0,
        fill_masked(propensity, mask, 0.5).to(wide),
        scale.to(wide),
        fill_masked(shift, pair).to(wide),
        generator,
        debias=debias,
    )
    return reduce_masked(risk, mask, reduction).to(outcome.dtype)


def pointwise_risk(
    y: Tensor,
    treated: Tensor,
    propensity: Tensor,
    scale: Tensor,
    shift: Tensor,
    generator: Generator,
    *,
    debias: bool,
) -> Tensor:
    """Risk of each item; ``y`` ``[..., N]``, ``scale`` and ``shift`` ``[..., N, 2]``."""
    arms = torch.stack([1 - propensity, propensity], -1)
    received = torch.stack([~treated, treated], -1)
    here = treated.long().unsqueeze(-1)
    own_scale, own_shift = (
        v.gather(-1, here.expand(*v.shape[:-1], 1)).squeeze(-1) for v in (scale, shift)
    )
    radius = generator.radius(torch.where(treated, propensity, 1 - propensity))
    conjugate = own_conjugate(y, own_scale, own_shift, generator)
    finite = conjugate != math.inf  # NaN stays NaN
    # infinity is put in last: times the scale it would give the scale an infinite gradient
    risk = own_scale * (radius + conjugate.where(finite, 0.0)) + own_shift
    if debias:
        slope = arms * generator.radius_derivative(arms) * (received.to(y.dtype) - arms)
        risk = risk + (scale * slope).sum(-1)
    return risk.where(finite, math.inf)


def own_conjugate(y: Tensor, scale: Tensor, shift: Tensor, generator: Generator) -> Tensor:
    """``g*((y - shift) / scale)``, infinite beyond its domain."""
    room = generator.at_zero - (y - shift) / scale
    outside = room < 0 if generator.closed else room <= 0  # NaN is not, and stays NaN
    inner = torch.where(outside, 1.0, room)
    return torch.where(outside, math.inf, generator.conjugate(inner))
