r"""f-DPG: policy gradients that bring a policy to an unnormalised target, for any f-divergence.

The target is known up to its normaliser, :math:`p = P/Z`. Whatever the divergence, the gradient of
:math:`D_f(\pi\|p)` is that of REINFORCE with the pseudo-reward :math:`r = -f'(\pi/p)`, so that a
choice of divergence is a choice of reward. Log-probabilities are **sums over the tokens** of a
sequence, never means, and :math:`\log P` has the same unit: the base model's sum, the end token
included (and left out where a sequence was cut off).

The policy is the first argument of the divergence: ``KL`` is the reverse KL of the paper (RLHF),
``REVERSE_KL`` its forward KL (DPG).

Source: Go, Korbak, Kruszewski, Rozen, Ryu, Dymetman (2023), Aligning Language Models with
Preferences through f-divergence Minimization, arXiv:2302.08215.
"""

import math

import torch
from torch import Tensor

from steelyard._checks import (
    check_floating,
    check_integer_dtype,
    check_mask,
    check_not_empty,
    check_not_nan,
    check_pair,
    check_same_shape,
    check_shape,
    given,
)
from steelyard._reduce import Reduction, fill_masked, reduce_masked, widen
from steelyard.divergences import FDivergence
from steelyard.divergences.f_divergences import check_divergence

__all__ = [
    "dpg_divergence",
    "dpg_loss",
    "dpg_pseudo_rewards",
    "leave_one_out_baseline",
    "variance_optimal_baseline",
]

Limits = tuple[float, float]


def dpg_loss(
    policy_logprobs: Tensor,
    target_log_scores: Tensor,
    log_z: Tensor | float,
    *,
    divergence: FDivergence,
    proposal_logprobs: Tensor | None = None,
    baseline: Tensor | float = 0.0,
    reward_range: Limits = (-math.inf, math.inf),
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Surrogate whose gradient is that of ``D_f(policy || target)``, from samples.

    .. math::
        L_i = -\mathrm{sg}\!\left[\frac{\pi(x_i)}{q(x_i)}\,(r_i - B)\right] \log \pi(x_i), \qquad
        r_i = -f'\!\left(\frac{\pi(x_i)\,Z}{P(x_i)}\right), \qquad x_i \sim q

    Only the gradient means something: :math:`E_q[\nabla L] = \nabla D_f(\pi\|p)` for every constant
    ``baseline``. The value is no divergence; for that see :func:`dpg_divergence`. It needs a
    policy that may produce everything the target may.

    Args:
        policy_logprobs: ``log pi(x)``, summed over tokens, ``[N]``, finite. The one argument with
            a gradient.
        target_log_scores: ``log P(x)``, ``[N]``, ``-inf`` where the target forbids ``x``.
        log_z: ``log Z``, a number, 0-d or ``[N]`` (that of each sample's context). Samples with
            ``log_z = -inf`` are left out, as by ``mask``: nothing is known about their target.
            An estimate that holds the same samples adds a small bias; use the one before them.
        divergence: for example ``JENSEN_SHANNON_DOUBLE`` for the paper's JS.
        proposal_logprobs: ``log q(x)``, ``[N]``; ``None`` = samples of the policy, ``pi/q = 1``.
        baseline: ``B``, a number, 0-d or ``[N]``. It may depend on the context and on other
            samples, not on ``x_i``.
        reward_range: the pseudo-reward is clipped to it (a bias). A finite lower end keeps ``KL``
            finite on forbidden samples.
        mask: ``[N]``, true = counts.
        reduction: ``"mean"`` (default) over kept samples, ``"sum"`` or ``"none"``. Under several
            ranks the mean of ranks is the mean of all only if each keeps as many.

    Returns:
        0-d, or ``[N]`` for ``"none"``, in the dtype of ``policy_logprobs``. Infinite where a
        forbidden sample has an infinite pseudo-reward (``KL``, Pearson, Jeffreys).

    Raises:
        TypeError: a tensor is not floating point, or ``reward_range`` not two numbers.
        ValueError: shapes differ, empty input, or an empty ``reward_range``.

    Example:
        Samples that enumerate the outcomes, drawn uniformly, give the exact gradient:

        >>> from steelyard.divergences import JENSEN_SHANNON, f_divergence
        >>> logits = torch.tensor([0.0, 1.0, 2.0], requires_grad=True)
        >>> policy, target = logits.log_softmax(0), torch.tensor([0.7, 0.3, 0.0]).log()
        >>> uniform = torch.full((3,), 1 / 3).log()
        >>> loss = dpg_loss(
        ...     policy, target + 5, 5.0, divergence=JENSEN_SHANNON, proposal_logprobs=uniform
        ... )
        >>> exact = f_divergence(policy, target, JENSEN_SHANNON)
        >>> (ours,) = torch.autograd.grad(loss, logits, retain_graph=True)
        >>> (theirs,) = torch.autograd.grad(exact, logits)
        >>> torch.allclose(ours, theirs)
        True

    Source: Go et al. (2023), Theorem 1, arXiv:2302.08215.
    """
    check_divergence(divergence)
    _check_samples(policy_logprobs, target_log_scores, proposal_logprobs)
    check_mask(mask, policy_logprobs)
    check_pair("reward_range", reward_range)
    low, high = reward_range
    check_not_nan("reward_range[0]", low)
    check_not_nan("reward_range[1]", high)
    if not low < high:
        raise ValueError(f"reward_range must be (low, high) with low < high, got {reward_range}")
    log_pi = widen(policy_logprobs)
    log_z = _per_sample("log_z", log_z, log_pi)
    known = log_z != -math.inf  # NaN is none of the samples to leave out
    kept = known if mask is None else known & (mask != 0)
    log_pi = fill_masked(log_pi, kept)
    log_p = fill_masked(target_log_scores.detach().to(log_pi.dtype) - log_z, kept)
    shift = fill_masked(_per_sample("baseline", baseline, log_pi), kept)
    reward = divergence.pseudo_reward(log_pi.detach() - log_p).clamp(low, high)
    if proposal_logprobs is None:
        advantage = reward - shift
    else:
        log_q = fill_masked(proposal_logprobs.detach().to(log_pi.dtype), kept)
        weight = torch.exp(log_pi.detach() - log_q)
        weighted = _weighted_reward(reward, divergence, log_pi.detach(), log_p, log_q)
        # An infinite weight leaves the sign of the difference, or nothing where there is none.
        gap = reward - shift
        beyond = torch.where(gap == 0, 0.0, weight * gap)
        advantage = torch.where(weight == math.inf, beyond, weighted - weight * shift)
    return reduce_masked(-advantage * log_pi, kept, reduction).to(policy_logprobs.dtype)


def _weighted_reward(
    reward: Tensor, divergence: FDivergence, log_pi: Tensor, log_p: Tensor, log_q: Tensor
) -> Tensor:
    # A weight that underflows times a reward that overflows would be NaN, while the product may
    # be an ordinary number (for -log t it is p/q, whatever pi). There it is taken as the slope in
    # log pi of (p/q) f(pi/p), which the divergences form without the ratio.
    def weighted_divergence(log_weight: Tensor) -> Tensor:
        return divergence.terms(log_weight, log_p - log_q).sum()

    product = torch.exp(log_pi - log_q) * reward
    slope: Tensor = torch.func.grad(weighted_divergence)(log_pi - log_q)
    # Where even that overflows, and where the target forbids the sample, the product is infinite.
    finite = (log_p > -math.inf) & ~slope.isnan()
    return torch.where(reward.isinf(), torch.where(finite, -slope, reward), product)


def dpg_pseudo_rewards(
    policy_logprobs: Tensor,
    target_log_scores: Tensor,
    log_z: Tensor | float,
    *,
    divergence: FDivergence,
) -> Tensor:
    r"""Reward that turns ``D_f(policy || target)`` into a policy gradient.

    .. math::
        r = -f'(e^\ell), \qquad \ell = \log \pi(x) - \log P(x) + \log Z

    With :math:`\ell` written out, :math:`e^{-\ell}` for ``REVERSE_KL`` (DPG), :math:`-\ell - 1` for
    ``KL`` (RLHF), :math:`\mathrm{softplus}(-\ell) - \log 2` for ``JENSEN_SHANNON_DOUBLE``,
    :math:`-\mathrm{sign}(\ell)/2` for ``TOTAL_VARIATION``. Bounded rewards have the smallest
    variance where the target is rare under the policy.

    Args:
        policy_logprobs: ``log pi(x)``, ``[N]``; detached.
        target_log_scores: ``log P(x)``, ``[N]``, ``-inf`` allowed; detached.
        log_z: ``log Z``, a number, 0-d or ``[N]``; detached.
        divergence: any f-divergence.

    Returns:
        ``[N]``, detached, dtype of ``policy_logprobs``; the limit where the target has no mass;
        NaN where ``log_z = -inf``, which the baselines here leave out.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes differ or empty input.

    Example:
        Policy 1/2 : 1/2, target 1 : 0. The rare outcome is rewarded, the forbidden one punished:

        >>> from steelyard.divergences import JENSEN_SHANNON_DOUBLE, KL
        >>> policy, target = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log()
        >>> dpg_pseudo_rewards(policy, target, 0.0, divergence=JENSEN_SHANNON_DOUBLE)
        tensor([ 0.4055, -0.6931])
        >>> dpg_pseudo_rewards(policy, target, 0.0, divergence=KL)
        tensor([-0.3069,    -inf])

    Source: Go et al. (2023), Theorem 1, arXiv:2302.08215.
    """
    check_divergence(divergence)
    _check_samples(policy_logprobs, target_log_scores, None)
    log_pi = widen(policy_logprobs.detach())
    log_z = _per_sample("log_z", log_z, log_pi)
    log_p = target_log_scores.detach().to(log_pi.dtype) - log_z
    unknown = log_z == -math.inf
    reward = divergence.pseudo_reward(log_pi - log_p.masked_fill(unknown, 0.0))
    return reward.masked_fill(unknown, math.nan).to(policy_logprobs.dtype)


def dpg_divergence(
    policy_logprobs: Tensor,
    target_log_scores: Tensor,
    log_z: Tensor | float,
    *,
    divergence: FDivergence,
    proposal_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Estimate ``D_f(policy || target)``, to watch training or to choose the better proposal.

    .. math:: \hat D = \frac1N \sum_i \frac{p(x_i)}{q(x_i)} f\!\left(\frac{\pi(x_i)}{p(x_i)}\right),
        \qquad p = P/Z, \quad x_i \sim q

    Unbiased for the true ``log_z`` if ``q`` covers both laws. Offline f-DPG replaces the proposal
    by the policy when this is smaller for the policy: pass each in turn as ``policy_logprobs``.

    Args:
        policy_logprobs: ``log pi(x)``, ``[N]``. Not detached: the gradient for samples held
            fixed. With a proposal its mean is that of :func:`dpg_loss` without a baseline.
        target_log_scores: ``log P(x)``, ``[N]``, ``-inf`` allowed; detached.
        log_z: ``log Z``, a number, 0-d or ``[N]``; detached. Samples with ``-inf`` are left out.
        divergence: a centred one (``KL.centred()``) has terms >= 0 and a smaller variance.
        proposal_logprobs: ``log q(x)``, ``[N]``; ``None`` = samples of the policy; detached.
        mask: ``[N]``, true = counts.
        reduction: ``"mean"`` (default), ``"sum"`` or ``"none"``.

    Returns:
        Nats, 0-d or ``[N]``, in the dtype of ``policy_logprobs``.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes differ or empty input.

    Example:
        >>> from steelyard.divergences import JENSEN_SHANNON_DOUBLE
        >>> policy, target = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log()
        >>> dpg_divergence(policy, target, 0.0, divergence=JENSEN_SHANNON_DOUBLE)
        tensor(0.4315)

    Source: Go et al. (2023), arXiv:2302.08215, which estimates its metrics by importance sampling.
    """
    check_divergence(divergence)
    _check_samples(policy_logprobs, target_log_scores, proposal_logprobs)
    check_mask(mask, policy_logprobs)
    log_pi = widen(policy_logprobs)
    log_z = _per_sample("log_z", log_z, log_pi)
    known = log_z != -math.inf  # NaN is none of the samples to leave out
    kept = known if mask is None else known & (mask != 0)
    given = policy_logprobs if proposal_logprobs is None else proposal_logprobs
    log_q = fill_masked(given.detach().to(log_pi.dtype), kept)
    log_p = fill_masked(target_log_scores.detach().to(log_pi.dtype) - log_z, kept)
    terms = _weighted_terms(fill_masked(log_pi, kept), log_p, log_q, divergence)
    return reduce_masked(terms, kept, reduction).to(policy_logprobs.dtype)


def _weighted_terms(
    log_pi: Tensor, log_p: Tensor, log_q: Tensor, divergence: FDivergence
) -> Tensor:
    """``(p/q) f(pi/p)``; where ``p/q`` overflows, infinite with the sign of ``f``."""
    terms = divergence.terms(log_pi - log_q, log_p - log_q)
    weight = torch.exp(log_p - log_q)
    lost = terms.isnan() & (weight == math.inf) & ~log_pi.isnan()
    height = divergence.terms(torch.where(lost, log_pi - log_p, 0.0), torch.zeros_like(log_p))
    beyond = torch.where(lost & (height != 0), weight * height, 0.0)
    return torch.where(lost, beyond, terms)


def leave_one_out_baseline(rewards: Tensor, *, contexts: Tensor | None = None) -> Tensor:
    r"""Mean pseudo-reward of the *other* samples of the batch, or of the same context.

    .. math:: B_i = \frac{1}{n_c - 1} \sum_{j \ne i,\ c_j = c_i} r_j

    It does not depend on ``x_i``, so the gradient stays unbiased, on-policy and off-policy.

    Args:
        rewards: ``[N]``; detached. Those that are infinite or NaN are left out of the means.
        contexts: integer context id of each sample, ``[N]``; ``None`` = one context. A context
            must be whole on one rank.

    Returns:
        ``[N]``, dtype of ``rewards``; 0 where there is no other sample.

    Raises:
        TypeError: ``rewards`` not floating point or ``contexts`` not integer.
        ValueError: wrong shapes or empty input.

    Example:
        >>> rewards, contexts = torch.tensor([1.0, 2.0, 6.0, 9.0]), torch.tensor([0, 0, 0, 7])
        >>> leave_one_out_baseline(rewards, contexts=contexts)
        tensor([4.0000, 3.5000, 1.5000, 0.0000])

    Source: Kool et al. (2019), Buy 4 REINFORCE samples, get a baseline for free.
    """
    check_floating(rewards=rewards)
    check_shape("rewards", rewards, (None,))
    check_not_empty("rewards", rewards)
    reward = widen(rewards.detach())
    known = reward.isfinite()
    reward, counted = torch.where(known, reward, 0.0), known.to(reward.dtype)
    if contexts is None:
        total, count = reward.sum(), counted.sum()
    else:
        check_integer_dtype(contexts=contexts)
        check_shape("contexts", contexts, (rewards.shape[0],))
        ids, index = torch.unique(contexts, return_inverse=True)
        none = reward.new_zeros(ids.shape)
        total, count = none.index_add(0, index, reward)[index], none.index_add(0, index, counted)
        count = count[index]
    return ((total - reward) / (count - counted).clamp(min=1)).to(rewards.dtype)


def variance_optimal_baseline(
    rewards: Tensor, *, log_weights: Tensor | None = None, squared_norms: Tensor | None = None
) -> Tensor:
    r"""Constant baseline that makes the variance of the gradient smallest.

    .. math:: B^* = \frac{\sum_i w_i^2 |g_i|^2 r_i}{\sum_i w_i^2 |g_i|^2}, \qquad
        w = \pi/q, \quad g = \nabla \log \pi(x)

    Computed from the batch it is used on, it brings a bias of order ``1/N``; use earlier samples
    where that matters. Gather the samples of all ranks first.

    Args:
        rewards: ``[N]``; detached. Those that are infinite or NaN are left out.
        log_weights: ``log pi(x) - log q(x)``, ``[N]``; ``None`` = samples of the policy; detached.
        squared_norms: ``|grad log pi(x)|^2 >= 0``, ``[N]``; ``None`` = all alike; detached.

    Returns:
        0-d, dtype of ``rewards``; 0 if nothing counts, NaN for a NaN weight, or a NaN or
        negative norm, that counts.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes differ or empty input.

    Example:
        Off-policy, the samples the policy likes decide, four times as strongly per factor of two:

        >>> rewards, weights = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0])
        >>> variance_optimal_baseline(rewards, log_weights=weights.log())
        tensor(0.8000)

    Source: Greensmith, Bartlett, Baxter (2004), Variance reduction techniques for gradient
    estimates in reinforcement learning; here with importance weights.
    """
    optional = given(log_weights=log_weights, squared_norms=squared_norms)
    check_floating(rewards=rewards, **optional)
    check_shape("rewards", rewards, (None,))
    check_not_empty("rewards", rewards)
    check_same_shape(rewards=rewards, **optional)
    reward = widen(rewards.detach())
    known = reward.isfinite()
    log_share = torch.zeros_like(reward)
    if log_weights is not None:
        log_share = log_share + 2 * log_weights.detach().to(reward.dtype)
    if squared_norms is not None:
        log_share = log_share + squared_norms.detach().to(reward.dtype).log()
    log_share = log_share.masked_fill(~known, -math.inf)
    some = log_share.amax() != -math.inf  # NaN is a weight, though not a known one
    share = torch.where(some, log_share, 0.0).softmax(0)
    best = (share * torch.where(known, reward, 0.0)).sum()
    return torch.where(some, best, 0.0).to(rewards.dtype)


def _check_samples(policy: Tensor, target: Tensor, proposal: Tensor | None) -> None:
    check_floating(policy_logprobs=policy, target_log_scores=target)
    check_floating(**given(proposal_logprobs=proposal))
    check_shape("policy_logprobs", policy, (None,))
    check_not_empty("policy_logprobs", policy)
    check_same_shape(policy_logprobs=policy, target_log_scores=target, proposal_logprobs=proposal)


def _per_sample(name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """Bring a number, a 0-d tensor or one value per sample to the shape and dtype of ``like``."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
        return like.new_full(like.shape, value)
    if value.dim() > 0 and value.shape != like.shape:
        raise ValueError(
            f"{name} must be a number or have shape [] or {list(like.shape)}, "
            f"got {list(value.shape)}"
        )
    return value.detach().to(like.dtype).expand(like.shape)
