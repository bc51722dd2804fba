r"""f-DPO: preference optimisation on a leash of any f-divergence, and its exact optimum.

The policy that maximises ``E_pi[r] - beta D_f(pi || ref)`` has ``r = beta f'(pi/ref)`` plus a
constant of the prompt. The constant cancels in the difference of two responses to one prompt, so a
pair needs no normaliser: the implicit reward of a response is ``beta f'(u)``, ``u = pi/ref``.

``D_f(pi || ref) = E_ref[f(u)]``. ``KL`` is what the f-DPO paper calls reverse KL, and gives DPO;
``REVERSE_KL`` is its forward KL, ``JENSEN_SHANNON_DOUBLE`` its JSD, ``alpha_divergence(1 - a)`` its
alpha-divergence of index ``a``. A ratio is of whole responses: the sum over tokens, not their mean.

Source: Wang et al. (2023), Beyond Reverse KL, arXiv:2309.16240.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from steelyard._checks import (
    check_floating,
    check_mask,
    check_not_empty,
    check_range,
    check_same_shape,
)
from steelyard._reduce import Reduction, fill_masked, reduce_masked
from steelyard.divergences import KL, FDivergence
from steelyard.divergences.f_divergences import check_divergence
from steelyard.preference._pairs import check_pairs
from steelyard.preference._scores import reward_of, saturated

__all__ = [
    "f_dpo_loss",
    "implicit_reward",
    "regularised_optimum",
]

_EPS = torch.finfo(torch.float64).eps

# How far from 1 the probabilities may sum before they are divided by it.
_TOLERANCE = 1e-13

# Newton's method takes about ten; where it does not help, the bracket is halved.
_MOST_STEPS = 200


def implicit_reward(
    log_ratio: Tensor, *, beta: float = 0.1, divergence: FDivergence = KL
) -> Tensor:
    r"""Reward under which the policy is optimal, up to a constant of the prompt.

    .. math:: \hat r = \beta \left[ f'(u) - f'(1) \right], \qquad \log u = \text{log\_ratio}

    It is 0 where the policy equals the reference. Every pairwise loss (logistic, hinge, squared)
    may use the difference of two, never one alone: the constant does not cancel there.

    Where the slope :math:`u f''(u)` exceeds :math:`e^{64}` (float64: :math:`e^{600}`; float16:
    :math:`e^{10}`) the reward goes on along its tangent in ``log_ratio``. So it stays finite and
    increasing with a gradient that pulls; a clamp would have none.

    Args:
        log_ratio: ``log pi - log ref``, summed over the tokens of a response, any shape.
        beta: strength of the leash, > 0. Its scale differs between divergences: the paper takes 0.1
            to 0.3, and 0.03 for ``REVERSE_KL``.
        divergence: with ``f'(0) = -inf``; ``KL`` (default) gives DPO.

    Returns:
        Shape and dtype of ``log_ratio``. NaN propagates; float16 is capped at its largest number.

    Raises:
        TypeError: ``log_ratio`` is not floating or ``divergence`` not an ``FDivergence``.
        ValueError: ``beta`` out of range, or ``f'(0)`` finite, as for total variation and
            Pearson's chi-square.

    Example:
        The Jensen-Shannon divergence pays at most ``log 2`` for raising a response; the rest of a
        margin must come from lowering the other:

        >>> from steelyard.divergences import JENSEN_SHANNON_DOUBLE
        >>> log_ratio = torch.tensor([-400.0, 0.0, 400.0])
        >>> implicit_reward(log_ratio, beta=1.0)
        tensor([-400.,    0.,  400.])
        >>> implicit_reward(log_ratio, beta=1.0, divergence=JENSEN_SHANNON_DOUBLE)
        tensor([-399.3069,    0.0000,    0.6931])

    Source: Wang et al. (2023), Theorem 1, arXiv:2309.16240.
    """
    check_floating(log_ratio=log_ratio)
    check_range("beta", beta, above=0.0, below=math.inf)
    check_divergence(divergence)
    return saturated(reward_of(log_ratio, beta, divergence), log_ratio.dtype)


def f_dpo_loss(
    chosen_log_ratio: Tensor,
    rejected_log_ratio: Tensor,
    *,
    beta: float = 0.1,
    divergence: FDivergence = KL,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Raise chosen over rejected responses on a leash of any f-divergence to the reference.

    .. math:: L = -\log \sigma\left( \beta f'(u_w) - \beta f'(u_l) \right), \qquad
        \nabla L = -\beta\, \sigma(-m) \left[ u_w f''(u_w) \nabla \log \pi(y_w)
        - u_l f''(u_l) \nabla \log \pi(y_l) \right]

    The weight :math:`u f''(u)` is 1 for ``KL`` (DPO), :math:`1/u` for ``REVERSE_KL``,
    :math:`1/(1+u)` for ``JENSEN_SHANNON_DOUBLE``, :math:`u^{A-1}` for order ``A``. Log ratios of
    :math:`\pm 400` are safe in every dtype; see :func:`implicit_reward`.

    Args:
        chosen_log_ratio: ``log pi - log ref`` of chosen responses, summed over tokens, ``[B]``.
        rejected_log_ratio: the same of rejected responses, ``[B]``.
        beta: strength of the leash, > 0, default 0.1. Compare divergences over a sweep of it.
        divergence: with ``f'(0) = -inf``. Default ``KL``.
        mask: ``[B]``, true = the pair counts.
        reduction: ``"mean"`` (default), ``"sum"`` or ``"none"``.

    Returns:
        0-d, or ``[B]`` for ``"none"``; ``log 2`` at the reference. NaN propagates.

    Raises:
        TypeError: a tensor is not floating, or ``divergence`` not an ``FDivergence``.
        ValueError: wrong shapes, an empty batch, ``beta`` out of range; ``f'(0)`` finite: the
            optimum can then put no mass on a response, which breaks ``r = beta f'(u)``.

    Example:
        The same move, up by a factor of 2 for one response and down for the other:

        >>> from steelyard.divergences import JENSEN_SHANNON_DOUBLE, REVERSE_KL
        >>> up = torch.tensor([2.0]).log()
        >>> for d in (KL, REVERSE_KL, JENSEN_SHANNON_DOUBLE):
        ...     print(d.name, round(f_dpo_loss(up, -up, beta=1.0, divergence=d).item(), 6))
        kl 0.223144
        reverse_kl 0.201413
        jensen_shannon_double 0.405465

    Source: Wang et al. (2023), Sec. 4, arXiv:2309.16240; ``KL``: Rafailov et al. (2023), Eq. 7,
    arXiv:2305.18290.
    """
    check_pairs(chosen_log_ratio=chosen_log_ratio, rejected_log_ratio=rejected_log_ratio)
    check_mask(mask, chosen_log_ratio)
    check_range("beta", beta, above=0.0, below=math.inf)
    check_divergence(divergence)
    chosen, rejected = (fill_masked(x, mask) for x in (chosen_log_ratio, rejected_log_ratio))
    margin = reward_of(chosen, beta, divergence) - reward_of(rejected, beta, divergence)
    loss = reduce_masked(-logsigmoid(margin), mask, reduction)
    return saturated(loss, torch.promote_types(chosen_log_ratio.dtype, rejected_log_ratio.dtype))


@torch.no_grad()
def regularised_optimum(
    rewards: Tensor, ref_probs: Tensor, beta: float, divergence: FDivergence
) -> Tensor:
    r"""Exact policy of a finite problem: the most reward for the least divergence.

    .. math::
        \pi^* = \arg\max_\pi \ E_\pi[r] - \beta D_f(\pi\|\text{ref})
              = \text{ref} \cdot (f')^{-1}\left( (r - \lambda) / \beta \right)_+, \qquad
        \sum_a \pi^*_a = 1

    Any strictly convex generator will do. With ``f'(0)`` finite (Pearson's chi-square) the
    constraint :math:`\pi \ge 0` can bind, and entries are then exactly 0. An action outside the
    support of the reference gets mass only if that has a finite price, ``slope_at_infinity``.

    Args:
        rewards: ``r``, shape ``[.., A]``, finite; leading dimensions are separate problems.
        ref_probs: reference, the same shape; sums to 1.
        beta: strength of the leash, > 0.
        divergence: ``D_f(pi || ref)``, for example ``KL``.

    Returns:
        Probabilities in the shape and dtype of ``rewards``, without gradient; computed in float64.

    Raises:
        TypeError: a tensor is not floating or ``divergence`` not an ``FDivergence``.
        ValueError: shapes differ, nothing in them, rewards not finite, ``ref_probs`` no
            distribution, ``beta`` out of range, or a generator that is not strictly convex.

    Example:
        For ``KL`` it is the tilted reference; chi-square drops the worst action altogether:

        >>> from steelyard.divergences import PEARSON_CHI2
        >>> rewards, ref = torch.tensor([0.0, 1.0, 2.0]), torch.full((3,), 1 / 3)
        >>> regularised_optimum(rewards, ref, 1.0, KL)
        tensor([0.0900, 0.2447, 0.6652])
        >>> regularised_optimum(rewards, ref, 0.3, PEARSON_CHI2)
        tensor([0.0000, 0.2222, 0.7778])

    Source: Wang et al. (2023), Theorem 1, arXiv:2309.16240; the multiplier of :math:`\pi \ge 0` by
    the Karush-Kuhn-Tucker conditions.
    """
    check_floating(rewards=rewards, ref_probs=ref_probs)
    check_same_shape(rewards=rewards, ref_probs=ref_probs)
    check_not_empty("rewards", rewards)
    check_range("beta", beta, above=0.0, below=math.inf)
    check_divergence(divergence)
    if rewards.dim() == 0:
        raise ValueError("rewards must have shape [.., A], got []")
    _check_problem(rewards, ref_probs, divergence)
    ref = ref_probs.double()
    ref = ref / ref.sum(-1, keepdim=True)
    r = rewards.double()
    r = r - r.amax(-1, keepdim=True)
    # With multiplier `low` some action has pi = 1; with `high` all have pi <= ref.
    edge = r - beta * divergence.derivative_at_log(-ref.log())
    low = edge.amax(-1, keepdim=True)
    high = torch.full_like(low, -beta * divergence.slope_at_one)
    multiplier = _normalising(r, ref, beta, divergence, low, high)
    probs = ref * _precise_ratio((r - multiplier) / beta, divergence)
    # What is left is rounding, or mass that has no slope left to tell how much it is.
    left = (1 - probs.sum(-1, keepdim=True)).clamp(min=0.0)
    at_edge = edge == low
    probs = probs + left * at_edge / at_edge.sum(-1, keepdim=True)
    return (probs / probs.sum(-1, keepdim=True)).to(rewards.dtype)


def _normalising(
    r: Tensor, ref: Tensor, beta: float, divergence: FDivergence, low: Tensor, high: Tensor
) -> Tensor:
    """Find where the total mass, which falls in the multiplier, is 1: Newton's method, guarded."""
    at = (low + high) / 2
    before = torch.full_like(at, math.inf)
    for _ in range(_MOST_STEPS):
        ratio = _ratio((r - at) / beta, divergence)
        total = (ref * ratio).sum(-1, keepdim=True)
        low, high = torch.where(total > 1, at, low), torch.where(total > 1, high, at)
        width = high - low
        done = ((total - 1).abs() <= _TOLERANCE) | (width <= 2 * _EPS * torch.maximum(-low, high))
        if bool(done.all()):
            break
        # The slope of log(total): dt/dy = 1/f''(t), and 0 where t = 0.
        inverse = torch.where(ratio > 0, 1 / divergence.second_derivative(ratio), 0.0)
        slope = -(ref * inverse).sum(-1, keepdim=True) / (beta * total)
        new, error = at - total.log() / slope, total.log().abs()
        trusted = (new > low) & (new < high) & (error < before / 2)
        at = torch.where(done, at, torch.where(trusted, new, low + width / 2))
        before = error
    return at


def _ratio(y: Tensor, divergence: FDivergence) -> Tensor:
    """``(f')^{-1}(y)``, 0 below ``f'(0)``: the derivative of the convex conjugate."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = y.clone().requires_grad_()
        return torch.autograd.grad(divergence.conjugate(leaf).sum(), leaf)[0]


def _precise_ratio(y: Tensor, divergence: FDivergence) -> Tensor:
    """The same with as many digits where it is small, not only as many places."""
    ratio = _ratio(y, divergence)
    small = (ratio < 1e-3) & (y > divergence.derivative(torch.zeros_like(y)))
    # Newton's method on f'(exp(log t)) = y. Where places are few the score is linear in log t.
    log_t = torch.where(small & (ratio > 0), ratio, _EPS).log()
    for _ in range(3):
        slope = (log_t + divergence.generator.log_second_derivative(log_t)).exp()
        log_t = log_t + (y - divergence.derivative_at_log(log_t)) / slope
    return torch.where(small, log_t.exp(), ratio)


def _check_problem(rewards: Tensor, ref_probs: Tensor, divergence: FDivergence) -> None:
    if not bool(rewards.isfinite().all()):
        raise ValueError("rewards must be finite, got NaN or infinite entries")
    total, least = ref_probs.double().sum(-1), ref_probs.amin()
    tolerance = math.sqrt(torch.finfo(ref_probs.dtype).eps)
    if not bool((least >= 0) & ((total - 1).abs() <= tolerance).all()):
        raise ValueError(
            "ref_probs must be non-negative and sum to 1, "
            f"got a least entry of {float(least)} and sums down to {float(total.min())}"
        )
    middle = torch.linspace(-8.0, 8.0, 17, dtype=torch.float64)
    if bool((divergence.generator.log_second_derivative(middle) == -math.inf).any()):
        raise ValueError(
            f"divergence must be strictly convex, got {divergence.name}: f' has no inverse there"
        )
