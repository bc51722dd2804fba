r"""One denoising step as an action: its Gaussian law, a sample, the log-probability.

DDPO and Flow-GRPO see sampling as a Markov decision process whose action is the next, less noisy
sample. Here are the two transition laws; the policy gradient itself is a clipped surrogate on the
difference of ``logprob`` between the new and the old network, for example
:func:`~steelyard.diffusion.awm_loss`.

The log-probabilities are *means* over the non-batch dimensions, as in the released codes: a sum
grows with the dimension and overflows the ratio.

Sources: Black et al. (2023), DDPO, arXiv:2305.13301; Liu et al. (2025), Flow-GRPO,
arXiv:2505.05470; Song et al. (2021), DDIM, arXiv:2010.02502.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from steelyard._checks import check_choice, check_range, given
from steelyard._reduce import widen
from steelyard.diffusion._samplers import denoising_mean
from steelyard.diffusion._time import (
    Times,
    as_column,
    check_items,
    check_step,
    item_mean,
)

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class DenoisingStep(NamedTuple):
    """A denoising step: what was drawn, from which Gaussian, and how likely it was.

    Attributes:
        x_prev: the next, less noisy sample, ``[B, *D]``; detached.
        mean: of the transition, ``[B, *D]``; carries the gradient.
        std: of the transition: 0-d for scalar times, ``[B, 1, .., 1]`` for times ``[B]``.
        logprob: mean over ``*D`` of the log-density of ``x_prev``, ``[B]``; carries the gradient.
    """

    x_prev: Tensor
    mean: Tensor
    std: Tensor
    logprob: Tensor


def flow_grpo_step(
    x: Tensor,
    velocity: Tensor,
    t: Times,
    t_prev: Times,
    *,
    noise_level: float = 0.7,
    generator: torch.Generator | None = None,
    x_prev: Tensor | None = None,
) -> DenoisingStep:
    r"""Take one stochastic step of a flow and say how likely it was (Flow-GRPO).

    Data at time 0, noise at time 1. With ``dt = t_prev - t < 0`` and
    :math:`\sigma_t = a \sqrt{t / (1 - t)}`,

    .. math::
        \mu = x\Big(1 + \frac{\sigma_t^2}{2t} dt\Big)
            + v\Big(1 + \frac{\sigma_t^2 (1 - t)}{2t}\Big) dt, \qquad
        x_\mathrm{prev} \sim \mathcal N(\mu, \sigma_t^2 |dt|)

    At ``t = 1`` the denominator ``1 - t`` of :math:`\sigma_t` is ``1 - t_prev`` instead. With
    ``noise_level=0`` this is the Euler step of the ODE, and ``logprob`` is ``inf`` at the mean and
    ``-inf`` elsewhere, without a gradient.

    Args:
        x: ``[B, *D]``.
        velocity: ``E[noise - data | x]`` of the network, same shape.
        t: time in (0, 1], a number or ``[B]``.
        t_prev: the next time, in [0, t), a number or ``[B]``.
        noise_level: ``a`` >= 0.
        generator: source of the noise when ``x_prev`` is drawn.
        x_prev: a stored sample to be scored in place of a new one, same shape as ``x``; detached.

    Returns:
        :class:`DenoisingStep`: ``x_prev``, ``mean``, ``std`` (with :math:`\sqrt{|dt|}`),
        ``logprob`` (mean over ``*D``), in the dtype of ``x``. Gradients flow through ``mean`` and
        ``logprob``, never through ``x_prev``.

    Raises:
        ValueError: shapes differ or are empty, a number ``t`` or ``t_prev`` out of range, or a
            negative ``noise_level``.
        TypeError: a tensor is not floating point.

    Example:
        Without noise it is the Euler step; with noise the velocity counts more, not less:

        >>> import torch
        >>> x, v = torch.zeros(1, 2), torch.ones(1, 2)
        >>> flow_grpo_step(x, v, 0.5, 0.25, noise_level=0.0).x_prev
        tensor([[-0.2500, -0.2500]])
        >>> flow_grpo_step(x, v, 0.5, 0.25, noise_level=1.0).mean
        tensor([[-0.3750, -0.3750]])

    Source: Liu et al. (2025), Eq. 9, arXiv:2505.05470.
    """
    check_items(x=x, velocity=velocity, **given(x_prev=x_prev))
    now, after, variance = _flow_schedule(x, t, t_prev, noise_level)
    mean = denoising_mean(widen(x), widen(velocity), now, after, variance)
    return _gaussian_step(mean, (variance * (now - after)).sqrt(), x.dtype, x_prev, generator)


def flow_grpo_kl(
    velocity: Tensor,
    ref_velocity: Tensor,
    t: Times,
    t_prev: Times,
    *,
    noise_level: float = 0.7,
    form: Literal["exact", "reference"] = "exact",
) -> Tensor:
    r"""KL divergence between the steps of two velocity fields, or the released code's penalty.

    .. math::
        \mathrm{exact} = \frac{|dt|}{2}
            \Big(\frac{\sigma_t (1 - t)}{2t} + \frac{1}{\sigma_t}\Big)^2 \|v - v_\mathrm{ref}\|^2

    .. math::
        \mathrm{reference} = \frac{1}{d}\,\frac{\|\mu - \mu_\mathrm{ref}\|^2}{2 \sigma_t^2}
            = \frac{|dt|}{d}\,\mathrm{exact}

    The released code leaves ``|dt|`` out of the variance and takes the mean over the ``d``
    dimensions, so the strength of its penalty depends on the number of steps and on the dimension.

    Args:
        velocity: ``[B, *D]``.
        ref_velocity: of the frozen reference network, same shape; detached.
        t: time in (0, 1], a number or ``[B]``.
        t_prev: the next time, in [0, t), a number or ``[B]``.
        noise_level: ``a`` > 0, as in :func:`flow_grpo_step`.
        form: ``"exact"`` = KL of the two transitions, a sum over ``*D``; ``"reference"`` = as
            released.

    Returns:
        ``[B]``, non-negative, dtype of ``velocity``.

    Raises:
        ValueError: shapes differ or are empty, a number out of range, or an unknown ``form``.
        TypeError: a tensor is not floating point.

    Example:
        Half the step, half the KL; the released penalty falls to a quarter:

        >>> import torch
        >>> v, ref = torch.ones(1, 4), torch.zeros(1, 4)
        >>> for t_prev in (0.25, 0.375):
        ...     kl = flow_grpo_kl(v, ref, 0.5, t_prev, noise_level=1.0)
        ...     released = flow_grpo_kl(v, ref, 0.5, t_prev, noise_level=1.0, form="reference")
        ...     print(kl.item(), released.item())
        1.125 0.0703125
        0.5625 0.017578125

    Source: Liu et al. (2025), Sec. 4.3, arXiv:2505.05470; ``"reference"`` is its released code.
    """
    check_items(velocity=velocity, ref_velocity=ref_velocity)
    check_choice("form", form, ("exact", "reference"))
    check_range("noise_level", noise_level, above=0.0)
    now, after, variance = _flow_schedule(velocity, t, t_prev, noise_level)
    gap = (widen(velocity) - widen(ref_velocity.detach())).square()
    scale = variance.sqrt()
    rate = (scale * (1 - now) / (2 * now) + 1 / scale).square() / 2
    step = now - after
    if form == "reference":
        return item_mean(step.square() * rate * gap).to(velocity.dtype)
    per_item = step * rate * gap
    return per_item.reshape(gap.shape[0], -1).sum(1).to(velocity.dtype)


def ddpo_step(
    x: Tensor,
    eps_pred: Tensor,
    alphabar: Times,
    alphabar_prev: Times,
    *,
    eta: float = 1.0,
    generator: torch.Generator | None = None,
    x_prev: Tensor | None = None,
) -> DenoisingStep:
    r"""Take one DDIM step of a noise-prediction network and say how likely it was (DDPO).

    With :math:`\bar\alpha` the squared share of the data in ``x`` and :math:`\bar\alpha_p` that
    after the step,

    .. math::
        \hat x_0 = \frac{x - \sqrt{1 - \bar\alpha}\,\epsilon}{\sqrt{\bar\alpha}}, \qquad
        s^2 = \eta^2\,\frac{1 - \bar\alpha_p}{1 - \bar\alpha}
            \Big(1 - \frac{\bar\alpha}{\bar\alpha_p}\Big), \qquad
        x_\mathrm{prev} \sim \mathcal N\big(\sqrt{\bar\alpha_p}\,\hat x_0
            + \sqrt{1 - \bar\alpha_p - s^2}\,\epsilon,\; s^2\big)

    Where ``s = 0`` (``eta=0``, or ``alphabar_prev=1``), ``logprob`` is ``inf`` at the mean and
    ``-inf`` elsewhere, without a gradient: leave such a step out of a loss.

    Args:
        x: ``[B, *D]``.
        eps_pred: noise predicted by the network, same shape.
        alphabar: cumulative product of the alphas at this step, in (0, 1), a number or ``[B]``.
        alphabar_prev: the same after the step, in (alphabar, 1], a number or ``[B]``.
        eta: noise of the sampler, in [0, 1]; 1 is the ancestral sampler of DDPM.
        generator: source of the noise when ``x_prev`` is drawn.
        x_prev: a stored sample to be scored in place of a new one, same shape as ``x``; detached.

    Returns:
        :class:`DenoisingStep`: ``x_prev``, ``mean``, ``std``, ``logprob`` (mean over ``*D``), in
        the dtype of ``x``. Gradients flow through ``mean`` and ``logprob``, never ``x_prev``.

    Raises:
        ValueError: shapes differ or are empty, or a number is out of range.
        TypeError: a tensor is not floating point.

    Example:
        A perfect prediction ends at the clean sample, here 3:

        >>> import torch
        >>> clean, noise = torch.tensor([[3.0]]), torch.tensor([[-1.0]])
        >>> x = 0.25**0.5 * clean + 0.75**0.5 * noise
        >>> step = ddpo_step(x, noise, 0.25, 1.0)
        >>> round(step.x_prev.item(), 4), step.std.item()
        (3.0, 0.0)

    Source: Song et al. (2021), Eq. 12 and 16, arXiv:2010.02502; Black et al. (2023), Sec. 4,
    arXiv:2305.13301.
    """
    check_items(x=x, eps_pred=eps_pred, **given(x_prev=x_prev))
    check_range("eta", eta, at_least=0.0, at_most=1.0)
    if not isinstance(alphabar, Tensor):
        check_range("alphabar", alphabar, above=0.0, below=1.0)
    if not isinstance(alphabar_prev, Tensor):
        lowest = 0.0 if isinstance(alphabar, Tensor) else alphabar
        check_range("alphabar_prev", alphabar_prev, above=lowest, at_most=1.0)
    kept = as_column("alphabar", alphabar, x)
    kept_prev = as_column("alphabar_prev", alphabar_prev, x)
    noise = widen(eps_pred)
    clean = (widen(x) - (1 - kept).sqrt() * noise) / kept.sqrt()
    # 1 - a/b as (b - a)/b and 1 - b - s^2 as (1-b)(1 - eta^2 (1 - a/b)/(1-a)): no cancellation
    # that could leave a negative number under the root.
    share = (kept_prev - kept) / kept_prev / (1 - kept)
    variance = eta**2 * (1 - kept_prev) * share
    direction = ((1 - kept_prev) * (1 - eta**2 * share)).sqrt()
    mean = kept_prev.sqrt() * clean + direction * noise
    return _gaussian_step(mean, variance.sqrt(), x.dtype, x_prev, generator)


def _flow_schedule(
    like: Tensor, t: Times, t_prev: Times, noise_level: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return both times and the squared scale as columns of ``like``."""
    check_range("noise_level", noise_level, at_least=0.0)
    check_step(t=t, t_prev=t_prev)
    now, after = as_column("t", t, like), as_column("t_prev", t_prev, like)
    denominator = 1 - torch.where(now < 1, now, after)
    return now, after, noise_level**2 * now / denominator


def _gaussian_step(
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    x_prev: Tensor | None,
    generator: torch.Generator | None,
) -> DenoisingStep:
    """Draw ``x_prev`` unless given, and score it."""
    if x_prev is None:
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        x_prev = (mean.detach() + std * noise).to(dtype)
    # The rounded sample is scored, so that scoring it again later gives the same number.
    sample = widen(x_prev.detach())
    random = std > 0
    width = torch.where(random, std, 1.0)
    gap = sample - mean
    logprob = item_mean(-0.5 * (gap / width).square() - width.log() - _HALF_LOG_TWO_PI)
    # A step without noise has no density: inf at its one value, -inf elsewhere.
    at_mean = (gap == 0).reshape(gap.shape[0], -1).all(1)
    point_mass = torch.where(at_mean, math.inf, -math.inf).to(logprob.dtype)
    logprob = torch.where(random.reshape(-1), logprob, point_mass)
    return DenoisingStep(x_prev.detach(), mean.to(dtype), std.to(dtype), logprob.to(dtype))
