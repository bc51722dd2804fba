r"""From the intervals of single arms to effects and to the value of a policy.

Source: Jung, Kang (2026), Information-Theoretic Causal Bounds under Unmeasured Confounding,
arXiv:2601.17160.
"""

import torch
from torch import Tensor

from steelyard._checks import (
    check_floating,
    check_not_empty,
    check_same_shape,
    check_shape,
    check_tensor,
)
from steelyard.causal._inputs import check_propensity, require_all
from steelyard.causal.bounds import Bounds, Divergence, divergence_radius

__all__ = ["effect_bounds", "policy_bounds", "policy_radius"]


def effect_bounds(lower: Tensor, upper: Tensor) -> Bounds:
    r"""Bounds on the effect of arm 1 against arm 0 from the bounds of the two means.

    .. math:: [\, L_1 - U_0,\ U_1 - L_0 \,]

    Args:
        lower: ``[..., 2]``, arms 0 and 1.
        upper: ``[..., 2]``.

    Returns:
        ``lower`` and ``upper`` of the difference, ``[...]``.

    Raises:
        ValueError: shapes differ or do not end in 2.
        TypeError: not floating point.

    Example:
        >>> effect_bounds(torch.tensor([0.2, 0.4]), torch.tensor([0.6, 0.9]))
        Bounds(lower=tensor(-0.2000), upper=tensor(0.7000))

    Source: Jung, Kang (2026), arXiv:2601.17160.
    """
    check_floating(lower=lower, upper=upper)
    check_same_shape(lower=lower, upper=upper)
    if lower.shape[-1:] != (2,):
        raise ValueError(f"lower must have shape [..., 2], got {list(lower.shape)}")
    return Bounds(lower[..., 1] - upper[..., 0], upper[..., 1] - lower[..., 0])


def policy_radius(
    policy: Tensor,
    propensity: Tensor,
    divergence: Divergence,
    *,
    weights: Tensor | None = None,
) -> Tensor:
    r"""Largest average divergence under a policy, over the covariates.

    .. math::
        E_X \sum_a \pi(a \mid X)\, D_f(P_{a,X} \| Q_{a,X})
        \le E_X \sum_a \pi(a \mid X)\, B_f(e_a(X))

    Args:
        policy: probabilities of the arms ``[N, K]``, or one arm for each item, integer ``[N]``.
        propensity: probability of each arm, in (0, 1), ``[N, K]``.
        divergence: see :func:`divergence_radius`.
        weights: of the items, ``[N]``, not negative, not all 0; ``None`` = equal.

    Returns:
        0-d tensor.

    Raises:
        ValueError: wrong shapes, probabilities that do not sum to 1, an arm that is not there.
        TypeError: not floating point (an integer policy is one arm for each item).

    Example:
        >>> e = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
        >>> policy_radius(torch.tensor([1, 0]), e, "tv")
        tensor(0.3750)

    Source: Jung, Kang (2026), Corollary T1.2, arXiv:2601.17160.
    """
    check_floating(propensity=propensity)
    check_shape("propensity", propensity, (None, None))
    check_not_empty("propensity", propensity)
    check_propensity("propensity", propensity)
    shares = _policy_shares(policy, propensity)
    return _mean_over_items((shares * divergence_radius(propensity, divergence)).sum(1), weights)


def policy_bounds(
    lower: Tensor, upper: Tensor, policy: Tensor, *, weights: Tensor | None = None
) -> Bounds:
    r"""Bounds on the value of a policy from the bounds of each arm at each covariate.

    .. math:: V(\pi) = E_X \sum_a \pi(a \mid X)\, \theta(a, X) \in
        \Big[ E_X \sum_a \pi\, L(a, X),\ E_X \sum_a \pi\, U(a, X) \Big]

    Sharp if the arms' intervals are and nothing ties one covariate to another. A soft policy mixes
    the intervals, it does not shorten them. For an effect that compares two policies on the same
    items, take bounds of the difference only where they differ: the rest cancels.

    Args:
        lower: ``[N, K]``, one column for each arm.
        upper: ``[N, K]``.
        policy: probabilities of the arms ``[N, K]`` (soft), or one arm for each item, integer
            ``[N]``.
        weights: of the items, ``[N]``, not negative, not all 0; ``None`` = equal.

    Returns:
        ``lower`` and ``upper``, 0-d.

    Raises:
        ValueError: wrong shapes, probabilities that do not sum to 1, an arm that is not there.
        TypeError: not floating point (an integer policy is one arm for each item).

    Example:
        >>> lower = torch.tensor([[0.0, 0.2], [0.1, 0.4]])
        >>> upper = torch.tensor([[1.0, 0.8], [0.5, 0.6]])
        >>> policy_bounds(lower, upper, torch.tensor([1, 1]))
        Bounds(lower=tensor(0.3000), upper=tensor(0.7000))
        >>> policy_bounds(lower, upper, torch.tensor([[0.5, 0.5], [0.0, 1.0]]))
        Bounds(lower=tensor(0.2500), upper=tensor(0.7500))

    Source: Jung, Kang (2026), arXiv:2601.17160.
    """
    check_floating(lower=lower, upper=upper)
    check_shape("lower", lower, (None, None))
    check_same_shape(lower=lower, upper=upper)
    check_not_empty("lower", lower)
    shares = _policy_shares(policy, lower)
    return Bounds(*(_mean_over_items((shares * end).sum(1), weights) for end in (lower, upper)))


def _policy_shares(policy: Tensor, like: Tensor) -> Tensor:
    items, arms = like.shape
    check_tensor("policy", policy)
    if policy.is_complex():
        raise TypeError(f"policy must have an integer or a floating dtype, got {policy.dtype}")
    if not policy.is_floating_point():
        check_shape("policy", policy, (items,))
        there = (policy >= 0) & (policy < arms)
        require_all(there, "policy", f"hold arms 0 to {arms - 1}", policy)
        return torch.nn.functional.one_hot(policy.long(), arms).to(like.dtype)
    check_shape("policy", policy, (items, arms))
    require_all(policy >= 0, "policy", "not be negative", policy)
    total = policy.sum(1)
    slack = 1e-6 + arms * torch.finfo(policy.dtype).eps
    require_all((total - 1).abs() <= slack, "policy", "sum to 1 over the arms", total)
    return policy.to(like.dtype)


def _mean_over_items(values: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return values.mean()
    check_floating(weights=weights)
    check_shape("weights", weights, tuple(values.shape))
    require_all(weights >= 0, "weights", "not be negative", weights)
    total = weights.sum()
    require_all(total > 0, "weights", "not all be 0", total)
    return (weights * values).sum() / total
