r"""The bounded-ratio problem, solved exactly: its optimum for one state and for a whole MDP.

.. math::
    \max_\rho\ E_{a \sim \pi_0}[\rho(a) Q(a)] \quad\text{subject to}\quad
    c_l \le \rho(a) \le c_h,\quad E_{a \sim \pi_0}[\rho(a)] = 1

PPO, BPO and the cross-entropy method (``c_l = 0``, ``c_h = 1/kappa``) are ways to follow this
optimum. Derivations of what the paper leaves open (atoms, asymmetric bounds, regulariser) are in
docs/systems/bpo.

Source: Ao et al. (2026), Bounded Ratio Reinforcement Learning, Thm 4.1, 4.2, arXiv:2604.18578.
"""

import math
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from steelyard._checks import check_floating, check_range, check_same_shape, check_shape

__all__ = [
    "BoundedRatioOptimum",
    "TabularImprovement",
    "bounded_ratio_optimum",
    "tabular_improvement",
]

_BISECTIONS = 100
"""Halvings of the threshold's bracket: past the resolution of float64 relative to its width."""


class BoundedRatioOptimum(NamedTuple):
    """What :func:`bounded_ratio_optimum` returns."""

    ratio: Tensor
    threshold: Tensor
    improvement: Tensor


class TabularImprovement(NamedTuple):
    """What :func:`tabular_improvement` returns."""

    base_return: Tensor
    optimal_return: Tensor
    ratio: Tensor
    median: Tensor
    bound: Tensor


def bounded_ratio_optimum(
    base_probs: Tensor,
    q_values: Tensor,
    *,
    low: float,
    high: float,
    temperature: float = 0.0,
) -> BoundedRatioOptimum:
    r"""Solve the bounded-ratio problem of each state.

    At temperature 0 the optimum is the highest ratio above a threshold and the lowest below,

    .. math::
        \rho^*(a) = c_h\ (Q > u),\qquad c_l\ (Q < u),\qquad
        \frac{1 - c_h P_> - c_l P_<}{P_=}\ (Q = u),

    with u the ``(c_h - 1)/(c_h - c_l)`` quantile of Q under the base policy (the median for a
    symmetric band), the lower one if not unique, and ``P`` the base probability above, below and
    at u. At temperature ``lambda > 0`` the regularised optimum is

    .. math::
        \rho^*(a) = c_l + (c_h - c_l)\,\sigma\big((Q - u)/\lambda\big),\qquad
        E_{\pi_0}[\rho^*] = 1 \text{ determines } u.

    Args:
        base_probs: ``[.., A]``, rows sum to 1.
        q_values: ``[.., A]``, reward units; may be infinite where the probability is 0.
        low: lower bound of the ratio, in [0, 1).
        high: upper bound of the ratio, > 1.
        temperature: lambda in reward units, >= 0.

    Returns:
        ``ratio [.., A]``; ``threshold [..]``; ``improvement [..]``, the gain
        ``E_base[(ratio - 1) Q]`` without the regulariser, never negative but for rounding.
        Computed in float64, returned in the dtype of ``q_values``; not differentiable.

    Raises:
        ValueError: shapes differ, no action, or a bound or the temperature out of range.
        TypeError: a tensor is not floating point.

    Example:
        The better half gains what the worse half loses; the cross-entropy method is the same
        problem with other bounds:

        >>> import torch
        >>> probs, q = torch.full((4,), 0.25), torch.tensor([4.0, 1.0, 3.0, 2.0])
        >>> bounded_ratio_optimum(probs, q, low=0.8, high=1.2).ratio
        tensor([1.2000, 0.8000, 1.2000, 0.8000])
        >>> bounded_ratio_optimum(probs, q, low=0.0, high=4.0).ratio  # one elite in four
        tensor([4., 0., 0., 0.])

    Source: Ao et al. (2026), Thm 4.1 and Sec. 4.6, arXiv:2604.18578.
    """
    check_floating(base_probs=base_probs, q_values=q_values)
    check_same_shape(base_probs=base_probs, q_values=q_values)
    if base_probs.dim() == 0 or base_probs.shape[-1] == 0:
        raise ValueError(
            f"base_probs must have at least one action, got shape {list(base_probs.shape)}"
        )
    check_range("low", low, at_least=0.0, below=1.0)
    check_range("high", high, above=1.0, below=math.inf)
    check_range("temperature", temperature, at_least=0.0, below=math.inf)
    probs, q = base_probs.detach().double(), q_values.detach().double()
    if temperature == 0:
        threshold = _quantile(probs, q, (high - 1) / (high - low))
        ratio = _hard_ratio(probs, q - threshold, low, high)
    else:
        threshold = _soft_threshold(probs, q, (1 - low) / (high - low), temperature)
        ratio = low + (high - low) * torch.sigmoid((q - threshold) / temperature)
    gains = torch.where(probs > 0, probs * (ratio - 1) * (q - threshold), 0.0)
    improvement = gains.sum(-1)
    dtype = q_values.dtype
    return BoundedRatioOptimum(
        ratio.to(dtype), threshold.squeeze(-1).to(dtype), improvement.to(dtype)
    )


def _quantile(probs: Tensor, values: Tensor, level: float) -> Tensor:
    """Smallest value with probability at least ``level`` at or below it, ``[.., 1]``."""
    ordered, order = values.sort(-1)
    cumulative = probs.gather(-1, order).cumsum(-1)
    rounding = 4 * values.shape[-1] * torch.finfo(probs.dtype).eps
    reached = cumulative >= level * cumulative[..., -1:] - rounding
    return ordered.gather(-1, reached.to(torch.uint8).argmax(-1, keepdim=True))


def _hard_ratio(probs: Tensor, distance: Tensor, low: float, high: float) -> Tensor:
    above = (probs * (distance > 0)).sum(-1, keepdim=True)
    below = (probs * (distance < 0)).sum(-1, keepdim=True)
    at = (probs * (distance == 0)).sum(-1, keepdim=True)
    tied = ((above + below + at - high * above - low * below) / at).clamp(low, high)
    ratio = torch.where(distance > 0, high, torch.where(distance < 0, low, tied))
    return torch.where(distance.isnan(), distance, ratio)


def _soft_threshold(probs: Tensor, q: Tensor, share: float, temperature: float) -> Tensor:
    """Root u of ``E[sigmoid((Q - u)/temperature)] = share`` by bisection, ``[.., 1]``.

    If all Q were equal, u would be ``Q - temperature * logit(share)``: the smallest and largest Q
    give the bracket.
    """
    shift = temperature * (math.log(share) - math.log1p(-share))
    impossible = probs == 0
    lower = q.masked_fill(impossible, math.inf).amin(-1, keepdim=True) - shift
    upper = q.masked_fill(impossible, -math.inf).amax(-1, keepdim=True) - shift
    total = probs.sum(-1, keepdim=True)
    for _ in range(_BISECTIONS):
        middle = (lower + upper) / 2
        mass = (probs * torch.sigmoid((q - middle) / temperature)).sum(-1, keepdim=True)
        too_low = mass > share * total
        lower, upper = torch.where(too_low, middle, lower), torch.where(too_low, upper, middle)
    return (lower + upper) / 2


def tabular_improvement(
    transitions: Tensor,
    rewards: Tensor,
    base_policy: Tensor,
    initial: Tensor,
    gamma: float,
    epsilon: float,
) -> TabularImprovement:
    r"""Improve a policy of a finite MDP by one exact bounded-ratio step.

    .. math::
        \eta(\pi^*) = \eta(\pi_0) + \epsilon B,\qquad
        B = \sum_s d_{\pi^*}(s)\, E_{a \sim \pi_0(\cdot|s)} |Q(s, a) - \mu(s)| \ge 0

    with Q the action values of the base policy, mu their median, and d the unnormalised discounted
    visitation ``sum_t gamma^t Pr(s_t = s)``. The returned ``optimal_return`` comes from its own
    exact solve of the improved policy, so that the identity can be checked.

    Args:
        transitions: ``[S, A, S]``, rows sum to 1.
        rewards: ``[S, A]``, expected reward.
        base_policy: ``[S, A]``, rows sum to 1.
        initial: ``[S]``, sums to 1.
        gamma: discount, in [0, 1).
        epsilon: half-width of the band, in (0, 1).

    Returns:
        ``base_return`` and ``optimal_return`` (0-d), ``ratio [S, A]``, ``median [S]``, ``bound``
        (0-d, the B above). The improved policy is ``base_policy * ratio``.

    Raises:
        ValueError: wrong shapes, ``gamma`` or ``epsilon`` out of range, or rows so far from
            probabilities that the values have no solution.
        TypeError: a tensor is not floating point.

    Example:
        One state, two actions worth 1 and 0: the step gains ``epsilon / 2`` a visit, and a
        discount of 0.5 makes two visits:

        >>> import torch
        >>> step = tabular_improvement(torch.ones(1, 2, 1), torch.tensor([[1.0, 0.0]]),
        ...     torch.tensor([[0.5, 0.5]]), torch.ones(1), gamma=0.5, epsilon=0.2)
        >>> step.base_return.item(), round(step.optimal_return.item(), 4)
        (1.0, 1.2)

    Source: Ao et al. (2026), Thm 4.2, arXiv:2604.18578.
    """
    check_floating(
        transitions=transitions, rewards=rewards, base_policy=base_policy, initial=initial
    )
    check_shape("rewards", rewards, (None, None))
    check_same_shape(rewards=rewards, base_policy=base_policy)
    states, actions = rewards.shape
    check_shape("transitions", transitions, (states, actions, states))
    check_shape("initial", initial, (states,))
    check_range("gamma", gamma, at_least=0.0, below=1.0)
    check_range("epsilon", epsilon, above=0.0, below=1.0)
    if epsilon + 1 == 1:
        raise ValueError(f"epsilon must be large enough to tell 1 + epsilon from 1, got {epsilon}")
    transitions, rewards, base_policy, initial = _promoted(
        transitions, rewards, base_policy, initial
    )
    values, _ = _solve(transitions, rewards, base_policy, initial, gamma)
    q_values = rewards + gamma * transitions @ values
    best = bounded_ratio_optimum(base_policy, q_values, low=1 - epsilon, high=1 + epsilon)
    new_values, visits = _solve(transitions, rewards, base_policy * best.ratio, initial, gamma)
    spread = (base_policy * (q_values - best.threshold[:, None]).abs()).sum(-1)
    return TabularImprovement(
        initial @ values, initial @ new_values, best.ratio, best.threshold, visits @ spread
    )


def _promoted(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return tuple(tensor.to(dtype) for tensor in tensors)


def _solve(
    transitions: Tensor, rewards: Tensor, policy: Tensor, initial: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """State values and unnormalised discounted visits of a policy, each ``[S]``, exactly."""
    chain = torch.einsum("sa,sap->sp", policy, transitions)
    system = torch.eye(len(initial), dtype=chain.dtype, device=chain.device) - gamma * chain
    try:
        values = torch.linalg.solve(system, (policy * rewards).sum(-1))
        return values, torch.linalg.solve(system.T, initial)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise ValueError(
            "transitions must have rows that sum to 1, as base_policy must: I - gamma P is singular"
        ) from None
