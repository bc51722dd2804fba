r"""Advantage weighted matching: reinforcement learning with the pretraining loss of a flow.

A denoising policy (DDPO, Flow-GRPO) scores every step of a stochastic sampler. Advantage weighted
matching (AWM) keeps the finished sample only, noises it as in pretraining, and takes the negative
pretraining loss for its log-likelihood. Any sampler may make the samples, and the target of the
regression is the clean one: :func:`noisy_target_variance_ratio` says how much more a denoising
policy's target varies.

Data are at time 0, noise at time 1; velocities are ``noise - data``.

Source: Xue, Ge, Zhang, Li, Ma (2025), Advantage Weighted Matching, arXiv:2509.25050.
"""

from collections.abc import Hashable, Sequence
from typing import Literal

import torch
from torch import Tensor

from steelyard._checks import (
    check_choice,
    check_floating,
    check_groups,
    check_mask,
    check_not_empty,
    check_range,
    check_same_shape,
    check_shape,
)
from steelyard._reduce import Reduction, fill_masked, reduce_masked, widen
from steelyard.diffusion._noisy_targets import (
    edm_noisy_target_variance,
    noisy_score_target,
    noisy_target_variance_ratio,
)
from steelyard.diffusion._time import check_items, item_mean

__all__ = [
    "awm_log_likelihood",
    "awm_loss",
    "awm_proximity",
    "clip_advantages",
    "edm_noisy_target_variance",
    "noisy_score_target",
    "noisy_target_variance_ratio",
    "prompt_advantages",
]

Weighting = Literal["ghuber", "uniform", "t", "t2", "huber"]

# The smallest residual that the root-like weightings tell from zero (released code).
_RESIDUAL_FLOOR = 1e-10

# Ratios are computed from log-ratios clamped to plus or minus this; beyond it gradients are 0.
_LOG_RATIO_LIMIT = 20.0

# "elbo" proximity: the noise level of Flow-GRPO and the last time that divides by 1 - t.
_ELBO_NOISE_LEVEL = 0.7
_ELBO_LAST_TIME = 0.99


def awm_log_likelihood(
    velocity: Tensor,
    clean: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    weighting: Weighting = "ghuber",
    power: float = 0.25,
) -> Tensor:
    r"""Score a clean sample by minus the pretraining loss of one noised copy of it.

    With the mean squared residual :math:`m = \frac1d \|v - (\mathrm{noise} - \mathrm{clean})\|^2`,

    .. math::
        \ell = -\begin{cases}
            m & \text{uniform} \\ t\,m & \text{t} \\ t^2\,m & \text{t2} \\
            t\,(\sqrt{m + \delta} - \sqrt\delta) & \text{huber} \\
            t\,\big((m + \delta)^p - \delta^p\big)/p & \text{ghuber}
        \end{cases}
        \qquad \delta = 10^{-10}

    A concave weighting divides each item's gradient by a power of its own residual, so that no
    item of negative advantage can push without limit.

    Args:
        velocity: ``v(x_t, t)`` of the network at ``x_t = (1 - t) clean + t noise``, ``[B, *D]``.
            In half precision convert it to float32 first: the difference of two log-likelihoods
            is far smaller than they are.
        clean: finished samples, same shape; detached.
        noise: the noise that made ``x_t``, same shape; detached. Use the same noise and time for
            the old and the new network.
        t: ``[B]``, in (0, 1).
        weighting: see above.
        power: ``p`` of ``"ghuber"``, in (0, 1]; 1 is ``"t"``, 1/2 twice ``"huber"``.

    Returns:
        ``[B]``, <= 0, dtype of ``velocity``.

    Raises:
        ValueError: shapes differ or are empty, an unknown ``weighting``, or ``power`` out of range.
        TypeError: a tensor is not floating point.

    Example:
        A residual a hundred times larger costs ten times more, not ten thousand:

        >>> import torch
        >>> velocity, zero = torch.tensor([[1.0], [100.0]]), torch.zeros(2, 1)
        >>> t = torch.full((2,), 0.5)
        >>> awm_log_likelihood(velocity, zero, zero, t, weighting="uniform").tolist()
        [-1.0, -10000.0]
        >>> awm_log_likelihood(velocity, zero, zero, t).round(decimals=2)
        tensor([ -1.9900, -19.9900])

    Source: Xue et al. (2025), Sec. 4 and released code, arXiv:2509.25050.
    """
    check_items(velocity=velocity, clean=clean, noise=noise)
    check_floating(t=t)
    check_shape("t", t, (velocity.shape[0],))
    check_choice("weighting", weighting, ("ghuber", "uniform", "t", "t2", "huber"))
    check_range("power", power, above=0.0, at_most=1.0)
    target = widen(noise.detach()) - widen(clean.detach())
    residual = item_mean((widen(velocity) - target).square())
    time = t.detach().to(residual.dtype)
    if weighting == "uniform":
        cost = residual
    elif weighting == "t":
        cost = time * residual
    elif weighting == "t2":
        cost = time.square() * residual
    elif weighting == "huber":
        cost = time * _above_floor(residual, 0.5)
    else:
        cost = time * _above_floor(residual, power) / power
    return -cost.to(velocity.dtype)


def _above_floor(residual: Tensor, power: float) -> Tensor:
    # (m + floor)^p - floor^p without the cancellation at small m.
    growth = torch.expm1(power * torch.log1p(residual / _RESIDUAL_FLOOR))
    return float(_RESIDUAL_FLOOR**power) * growth


def awm_loss(
    log_likelihood: Tensor,
    old_log_likelihood: Tensor,
    advantages: Tensor,
    *,
    clip: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Raise the likelihood of samples with a positive advantage, lower that of the others.

    .. math::
        L = \mathrm{mean}\,\max\big(-A r,\; -A\,\mathrm{clip}(r, 1 - c, 1 + c)\big), \qquad
        r = \exp(\ell - \ell_\mathrm{old})

    On-policy (``old_log_likelihood`` equal to ``log_likelihood``) the ratio is 1 and the gradient
    is that of ``-A l``: the pretraining loss times the advantage. With several times per sample
    pass ``[B, K]``; for one ratio per sample ("sum first") pass the means over ``K``. The same
    formula on log-probabilities of :func:`flow_grpo_step` or :func:`ddpo_step` is the loss of
    Flow-GRPO and DDPO (published ``clip``: 1e-4).

    The log-ratio is clamped to ``[-20, 20]``; beyond, gradients are 0. Negative advantages make
    the loss unbounded below in the network's output: use ``"ghuber"``, clipped advantages and
    :func:`awm_proximity`.

    Args:
        log_likelihood: ``[B]`` or ``[B, K]``, from :func:`awm_log_likelihood`.
        old_log_likelihood: of the network that made the samples, at the same times and noises;
            same shape; detached.
        advantages: ``[B]``, used as given; or the shape of ``log_likelihood``; detached.
        clip: ``c`` > 0; 1 never binds on-policy.
        mask: shape of ``log_likelihood``, true = counts.
        reduction: ``"mean"`` (over kept items), ``"sum"`` or ``"none"``.

    Returns:
        0-d tensor, or the shape of ``log_likelihood`` for ``"none"``; its dtype.

    Raises:
        ValueError: shapes do not fit or are empty, or ``clip`` is out of range.
        TypeError: a tensor is not floating point.

    Example:
        On-policy the gradient is minus the advantage:

        >>> import torch
        >>> likelihood = torch.tensor([-0.3, -0.7], requires_grad=True)
        >>> awm_loss(likelihood, likelihood, torch.tensor([1.0, -0.5]), reduction="sum").backward()
        >>> likelihood.grad
        tensor([-1.0000,  0.5000])

    Source: Xue et al. (2025), Sec. 4 and released code, arXiv:2509.25050.
    """
    check_floating(
        log_likelihood=log_likelihood, old_log_likelihood=old_log_likelihood, advantages=advantages
    )
    check_same_shape(log_likelihood=log_likelihood, old_log_likelihood=old_log_likelihood)
    if log_likelihood.dim() not in (1, 2):
        raise ValueError(
            f"log_likelihood must have shape [B] or [B, K], got {list(log_likelihood.shape)}"
        )
    check_not_empty("log_likelihood", log_likelihood)
    check_range("clip", clip, above=0.0)
    check_mask(mask, log_likelihood)
    log_ratio = widen(log_likelihood) - widen(old_log_likelihood.detach())
    log_ratio = fill_masked(log_ratio, mask).clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
    advantage = fill_masked(_per_item(advantages, log_ratio), mask)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    losses = torch.maximum(-advantage * ratio, -advantage * clipped)
    return reduce_masked(losses, mask, reduction).to(log_likelihood.dtype)


def _per_item(advantages: Tensor, like: Tensor) -> Tensor:
    """Advantages ``[B]`` repeated over ``K`` if ``like`` is ``[B, K]``."""
    given = advantages.detach().to(like.dtype)
    if given.shape == like.shape:
        return given
    check_shape("advantages", given, (like.shape[0],))
    return given.unsqueeze(1).expand_as(like)


def awm_proximity(
    velocity: Tensor,
    ref_velocity: Tensor,
    t: Tensor,
    *,
    weighting: Literal["uniform", "elbo"] = "uniform",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Keep the velocity near that of the pretrained network, or of a slow copy of the trained one.

    .. math::
        L = \frac1d \|v - v_\mathrm{ref}\|^2 \quad \text{(uniform)}, \qquad
        L = \frac{1}{2 \sigma_t^2}\,\frac1d \|v - v_\mathrm{ref}\|^2, \;
        \sigma_t^2 = \frac{0.7^2\,t}{1 - \min(t, 0.99)} \quad \text{(elbo)}

    Args:
        velocity: ``[B, *D]``.
        ref_velocity: same shape; detached.
        t: ``[B]``, in (0, 1); used by ``"elbo"``.
        weighting: see above.
        reduction: over the batch, ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        0-d tensor, or ``[B]`` for ``"none"``; dtype of ``velocity``.

    Raises:
        ValueError: shapes differ or are empty, or an unknown ``weighting``.
        TypeError: a tensor is not floating point.

    Example:
        >>> import torch
        >>> awm_proximity(torch.tensor([[3.0, 0.0]]), torch.zeros(1, 2), torch.tensor([0.5]))
        tensor(4.5000)

    Source: Xue et al. (2025), released code, arXiv:2509.25050.
    """
    check_items(velocity=velocity, ref_velocity=ref_velocity)
    check_floating(t=t)
    check_shape("t", t, (velocity.shape[0],))
    check_choice("weighting", weighting, ("uniform", "elbo"))
    distance = item_mean((widen(velocity) - widen(ref_velocity.detach())).square())
    if weighting == "elbo":
        time = t.detach().to(distance.dtype)
        variance = _ELBO_NOISE_LEVEL**2 * time / (1 - time.clamp(max=_ELBO_LAST_TIME))
        distance = distance / (2 * variance)
    return reduce_masked(distance, None, reduction).to(velocity.dtype)


def prompt_advantages(
    rewards: Tensor,
    prompts: Sequence[Hashable] | Tensor,
    *,
    global_std: bool = True,
    eps: float = 1e-4,
) -> Tensor:
    r"""Compare each sample with the other samples of its prompt.

    .. math:: A_i = \frac{R_i - \mathrm{mean}_{\text{prompt}} R}{\mathrm{std}\,R + \epsilon}

    with the population standard deviation, of all rewards or of the prompt's. Equal rewards of a
    prompt get exactly 0. Gather the rewards of a prompt from all ranks first; for ``global_std``,
    those of all prompts.

    Args:
        rewards: ``[N]``; detached.
        prompts: the prompt of each sample: ``N`` hashables (strings, say) or an integer ``[N]``.
        global_std: divide by the deviation of all rewards, else by that within the prompt.
        eps: > 0.

    Returns:
        ``[N]``, dtype of ``rewards``; sums to 0 within each prompt.

    Raises:
        ValueError: wrong shapes, empty input, or ``eps`` out of range.
        TypeError: ``rewards`` not floating point, or a tensor ``prompts`` not integer.

    Example:
        A prompt whose samples all got the same reward teaches nothing:

        >>> import torch
        >>> rewards = torch.tensor([1.0, 3.0, 5.0, 5.0])
        >>> prompt_advantages(rewards, ["cat", "cat", "dog", "dog"]).round(decimals=3)
        tensor([-0.6030,  0.6030,  0.0000,  0.0000])

    Source: Xue et al. (2025), released code, arXiv:2509.25050.
    """
    check_floating(rewards=rewards)
    check_shape("rewards", rewards, (None,))
    check_not_empty("rewards", rewards)
    check_range("eps", eps, above=0.0)
    index, groups = _prompt_index(prompts, rewards)
    reward = widen(rewards.detach())
    # Means are taken about each prompt's lowest reward, so that equal rewards give exactly 0.
    lowest = reward.new_full((groups,), torch.inf).scatter_reduce(0, index, reward, "amin")
    count = reward.new_zeros(groups).index_add(0, index, torch.ones_like(reward))
    above = reward - lowest[index]
    centred = above - (reward.new_zeros(groups).index_add(0, index, above) / count)[index]
    if global_std:
        std = (reward - reward.mean()).square().mean().sqrt()
    else:
        squares = reward.new_zeros(groups).index_add(0, index, centred.square())
        std = (squares / count).sqrt()[index]
    return (centred / (std + eps)).to(rewards.dtype)


def _prompt_index(prompts: Sequence[Hashable] | Tensor, rewards: Tensor) -> tuple[Tensor, int]:
    """Number the prompts: each sample's prompt 0..G-1, and ``G``."""
    if isinstance(prompts, Tensor):
        check_groups(prompts, rewards, name="prompts")
        distinct, index = torch.unique(prompts.to(rewards.device), return_inverse=True)
        return index, distinct.shape[0]
    if not hasattr(prompts, "__len__"):
        raise TypeError(f"prompts must be a sequence or a tensor, got {type(prompts).__name__}")
    if len(prompts) != rewards.shape[0]:
        raise ValueError(
            f"prompts must have one entry per reward, {rewards.shape[0]}, got {len(prompts)}"
        )
    numbers: dict[Hashable, int] = {}
    try:
        order = [numbers.setdefault(prompt, len(numbers)) for prompt in prompts]
    except TypeError:
        raise TypeError("prompts must be hashable, got one that is not") from None
    return torch.tensor(order, device=rewards.device), len(numbers)


def clip_advantages(advantages: Tensor, *, limit: float = 5.0, maximum: float = 1.0) -> Tensor:
    r"""Clip advantages and scale them to ``[-maximum, maximum]``.

    .. math:: \mathrm{clip}(A, -\mathrm{limit}, \mathrm{limit}) \cdot
        \frac{\mathrm{maximum}}{\mathrm{limit}}

    With the defaults an advantage of 1 becomes 0.2: the scale of the loss is five times smaller
    than it reads. ``maximum=limit`` clips only.

    Args:
        advantages: any shape; detached.
        limit: > 0.
        maximum: > 0, the largest result.

    Returns:
        Same shape and dtype.

    Raises:
        ValueError: empty input, or ``limit`` or ``maximum`` out of range.
        TypeError: ``advantages`` not floating point.

    Example:
        >>> import torch
        >>> clip_advantages(torch.tensor([1.0, -5.0, 50.0]))
        tensor([ 0.2000, -1.0000,  1.0000])

    Source: Xue et al. (2025), released code, arXiv:2509.25050.
    """
    check_floating(advantages=advantages)
    check_not_empty("advantages", advantages)
    check_range("limit", limit, above=0.0)
    check_range("maximum", maximum, above=0.0)
    # Divided first: then the limit itself lands on the maximum exactly.
    return (advantages.detach().clamp(-limit, limit) / limit) * maximum
