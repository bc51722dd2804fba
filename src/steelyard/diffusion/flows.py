r"""Linear flows: one time convention, every prediction type, samplers and denoising policies.

On the path ``x = (1 - tau) data + tau noise`` four quantities say the same thing, each for a given
``x`` and time: the velocity ``dx/dt``, the score ``grad log p_t(x)``, the expected noise and the
expected data. The functions ``a_to_b`` here go from the velocity to each and back; any other pair
is two of them in a row. ``data_at`` (0 or 1) is the time at which the data are: 0 in Stable
Diffusion 3, Flow-GRPO and AWM, 1 in most of the flow-matching literature.

Samplers (``flow_times``, ``sample_ode``, ``sample_sde``) take any callable ``v(x, t)``. One step of
the stochastic samplers with its log-probability is a policy: ``flow_grpo_step``, ``ddpo_step``.

Sources: Lipman et al. (2023), arXiv:2210.02747; Liu et al. (2025), Flow-GRPO, arXiv:2505.05470;
Black et al. (2023), DDPO, arXiv:2305.13301; Xue et al. (2025), arXiv:2509.25050.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from steelyard._checks import check_choice, check_floating, check_not_empty, check_shape, given
from steelyard._reduce import widen
from steelyard.diffusion._samplers import flow_times, sample_ode, sample_sde
from steelyard.diffusion._time import (
    DataAt,
    Times,
    check_items,
    noise_fraction,
    refuse_end,
    toward_noise,
)
from steelyard.diffusion._transitions import (
    DenoisingStep,
    ddpo_step,
    flow_grpo_kl,
    flow_grpo_step,
)

__all__ = [
    "DenoisingStep",
    "FiniteDataVelocity",
    "data_to_velocity",
    "ddpo_step",
    "finite_data_velocity",
    "flow_grpo_kl",
    "flow_grpo_step",
    "flow_times",
    "interpolate",
    "noise_to_velocity",
    "sample_ode",
    "sample_sde",
    "score_to_velocity",
    "velocity_target",
    "velocity_to_data",
    "velocity_to_noise",
    "velocity_to_score",
]

_NO_SCORE = "the data end, where the score has no value"
_NO_NOISE_SHARE = "the data end, where x does not depend on the noise"
_NO_DATA_SHARE = "the noise end, where x does not depend on the data"


class FiniteDataVelocity(NamedTuple):
    """What :func:`finite_data_velocity` returns: ``velocity [N, D]``, ``posterior [N, K]``."""

    velocity: Tensor
    posterior: Tensor


def interpolate(data: Tensor, noise: Tensor, t: Times, *, data_at: DataAt = 0) -> Tensor:
    r"""Put samples on the linear path.

    .. math::
        x_t = (1 - t)\,\mathrm{data} + t\,\mathrm{noise} \quad (\texttt{data\_at=0}), \qquad
        x_t = t\,\mathrm{data} + (1 - t)\,\mathrm{noise} \quad (\texttt{data\_at=1})

    Args:
        data: ``[B, *D]``.
        noise: same shape.
        t: time in [0, 1], a number or ``[B]``.
        data_at: the time at which the data are, 0 or 1.

    Returns:
        Same shape and dtype as ``data``.

    Raises:
        ValueError: shapes differ or are empty, a number ``t`` outside [0, 1], or ``data_at``.
        TypeError: a tensor is not floating point.

    Example:
        >>> import torch
        >>> data, noise = torch.tensor([[8.0]]), torch.tensor([[0.0]])
        >>> interpolate(data, noise, 0.25), interpolate(data, noise, 0.25, data_at=1)
        (tensor([[6.]]), tensor([[2.]]))

    Source: Lipman et al. (2023), Eq. 22 with sigma_min = 0, arXiv:2210.02747.
    """
    check_items(data=data, noise=noise)
    tau = noise_fraction(t, data, data_at)
    return ((1 - tau) * widen(data) + tau * widen(noise)).to(data.dtype)


def velocity_target(data: Tensor, noise: Tensor, *, data_at: DataAt = 0) -> Tensor:
    r"""Velocity of the path between one sample and one noise, the target of flow matching.

    .. math::
        u = \frac{dx_t}{dt} = \mathrm{noise} - \mathrm{data} \quad (\texttt{data\_at=0}), \qquad
        u = \mathrm{data} - \mathrm{noise} \quad (\texttt{data\_at=1})

    Args:
        data: ``[B, *D]``.
        noise: same shape.
        data_at: the time at which the data are, 0 or 1.

    Returns:
        Same shape and dtype as ``data``.

    Raises:
        ValueError: shapes differ or are empty, or ``data_at``.
        TypeError: a tensor is not floating point.

    Example:
        The two conventions differ in sign, so a network trained in one walks away in the other:

        >>> import torch
        >>> data, noise = torch.tensor([[8.0]]), torch.tensor([[1.0]])
        >>> velocity_target(data, noise), velocity_target(data, noise, data_at=1)
        (tensor([[-7.]]), tensor([[7.]]))

    Source: Lipman et al. (2023), Eq. 23 with sigma_min = 0, arXiv:2210.02747.
    """
    check_items(data=data, noise=noise)
    check_choice("data_at", data_at, (0, 1))
    return toward_noise(noise - data, data_at)


def velocity_to_noise(velocity: Tensor, x: Tensor, t: Times, *, data_at: DataAt = 0) -> Tensor:
    r"""Expected noise from a velocity.

    .. math:: E[\mathrm{noise} \mid x] = x + (1 - \tau)\,w, \qquad w = \pm v

    with the noise fraction :math:`\tau` and ``w`` the velocity towards the noise.

    Args:
        velocity: ``[B, *D]``.
        x: same shape.
        t: time in [0, 1], a number or ``[B]``.
        data_at: the time at which the data are, 0 or 1.

    Returns:
        Same shape and dtype as ``velocity``.

    Raises:
        ValueError: shapes differ or are empty, a number ``t`` outside [0, 1], or ``data_at``.
        TypeError: a tensor is not floating point.

    Example:
        >>> import torch
        >>> data, noise = torch.tensor([[8.0]]), torch.tensor([[1.0]])
        >>> x = interpolate(data, noise, 0.25)
        >>> velocity_to_noise(velocity_target(data, noise), x, 0.25)
        tensor([[1.]])

    Source: Xue et al. (2025), preliminaries, arXiv:2509.25050.
    """
    check_items(velocity=velocity, x=x)
    tau = noise_fraction(t, x, data_at)
    noise = widen(x) + (1 - tau) * toward_noise(widen(velocity), data_at)
    return noise.to(velocity.dtype)


def velocity_to_data(velocity: Tensor, x: Tensor, t: Times, *, data_at: DataAt = 0) -> Tensor:
    r"""Expected data from a velocity.

    .. math:: E[\mathrm{data} \mid x] = x - \tau\,w, \qquad w = \pm v

    with the noise fraction :math:`\tau` and ``w`` the velocity towards the noise.

    Args:
        velocity: ``[B, *D]``.
        x: same shape.
        t: time in [0, 1], a number or ``[B]``.
        data_at: the time at which the data are, 0 or 1.

    Returns:
        Same shape and dtype as ``velocity``.

    Raises:
        ValueError: shapes differ or are empty, a number ``t`` outside [0, 1], or ``data_at``.
        TypeError: a tensor is not floating point.

    Example:
        >>> import torch
        >>> data, noise = torch.tensor([[8.0]]), torch.tensor([[1.0]])
        >>> x = interpolate(data, noise, 0.75, data_at=1)
        >>> velocity_to_data(velocity_target(data, noise, data_at=1), x, 0.75, data_at=1)
        tensor([[8.]])

    Source: Xue et al. (2025), preliminaries, arXiv:2509.25050.
    """
    check_items(velocity=velocity, x=x)
    tau = noise_fraction(t, x, data_at)
    return (widen(x) - tau * toward_noise(widen(velocity), data_at)).to(velocity.dtype)


def velocity_to_score(velocity: Tensor, x: Tensor, t: Times, *, data_at: DataAt = 0) -> Tensor:
    r"""Score of the noised law from a velocity.

    .. math:: \nabla \log p_t(x) = -\frac{E[\mathrm{noise} \mid x]}{\tau}
        = -\frac{x + (1 - \tau)\,w}{\tau}, \qquad w = \pm v

    with the noise fraction :math:`\tau` and ``w`` the velocity towards the noise.

    Args:
        velocity: ``[B, *D]``.
        x: same shape.
        t: time in [0, 1] but not the data end, a number or ``[B]``; a tensor that holds the data
            end gives non-finite values there.
        data_at: the time at which the data are, 0 or 1.

    Returns:
        Same shape and dtype as ``velocity``.

    Raises:
        ValueError: shapes differ or are empty, a number ``t`` outside [0, 1] or at the data end,
            or ``data_at``.
        TypeError: a tensor is not floating point.

    Example:
        At the noise end the law is the standard normal, whose score is ``-x`` whatever the data:

        >>> import torch
        >>> velocity_to_score(torch.tensor([[123.0]]), torch.tensor([[0.5]]), 1.0)
        tensor([[-0.5000]])

    Source: Xue et al. (2025), preliminaries, arXiv:2509.25050.
    """
    refuse_end(t, data_at, _NO_SCORE)
    check_items(velocity=velocity, x=x)
    tau = noise_fraction(t, x, data_at)
    noise = widen(x) + (1 - tau) * toward_noise(widen(velocity), data_at)
    return (-noise / tau).to(velocity.dtype)


def noise_to_velocity(noise: Tensor, x: Tensor, t: Times, *, data_at: DataAt = 0) -> Tensor:
    r"""Velocity from the expected noise: the inverse of :func:`velocity_to_noise`.

    .. math:: w = \frac{E[\mathrm{noise} \mid x] - x}{1 - \tau}, \qquad v = \pm w

    with the noise fraction :math:`\tau` and ``w`` the velocity towards the noise.

    Args:
        noise: ``[B, *D]``.
        x: same shape.
        t: time in [0, 1] but not the noise end, a number or ``[B]``; a tensor that holds the
            noise end gives non-finite values there.
        data_at: the time at which the data are, 0 or 1.

    Returns:
        Same shape and dtype as ``noise``.

    Raises:
        ValueError: shapes differ or are empty, a number ``t`` outside [0, 1] or at the noise end,
            or ``data_at``.
        TypeError: a tensor is not floating point.

    Example:
        >>> import torch
        >>> noise_to_velocity(torch.tensor([[1.0]]), torch.tensor([[6.25]]), 0.25)
        tensor([[-7.]])

    Source: Xue et al. (2025), preliminaries, arXiv:2509.25050.
    """
    check_choice("data_at", data_at, (0, 1))
    refuse_end(t, 1 - data_at, _NO_DATA_SHARE)
    check_items(noise=noise, x=x)
    tau = noise_fraction(t, x, data_at)
    away = (widen(noise) - widen(x)) / (1 - tau)
    return toward_noise(away, data_at).to(noise.dtype)


def data_to_velocity(data: Tensor, x: Tensor, t: Times, *, data_at: DataAt = 0) -> Tensor:
    r"""Velocity from the expected data: the inverse of :func:`velocity_to_data`.

    .. math:: w = \frac{x - E[\mathrm{data} \mid x]}{\tau}, \qquad v = \pm w

    with the noise fraction :math:`\tau` and ``w`` the velocity towards the noise.

    Args:
        data: ``[B, *D]``.
        x: same shape.
        t: time in [0, 1] but not the data end, a number or ``[B]``; a tensor that holds the data
            end gives non-finite values there.
        data_at: the time at which the data are, 0 or 1.

    Returns:
        Same shape and dtype as ``data``.

    Raises:
        ValueError: shapes differ or are empty, a number ``t`` outside [0, 1] or at the data end,
            or ``data_at``.
        TypeError: a tensor is not floating point.

    Example:
        >>> import torch
        >>> data_to_velocity(torch.tensor([[8.0]]), torch.tensor([[6.25]]), 0.25)
        tensor([[-7.]])

    Source: Xue et al. (2025), preliminaries, arXiv:2509.25050.
    """
    refuse_end(t, data_at, _NO_NOISE_SHARE)
    check_items(data=data, x=x)
    tau = noise_fraction(t, x, data_at)
    away = (widen(x) - widen(data)) / tau
    return toward_noise(away, data_at).to(data.dtype)


def score_to_velocity(score: Tensor, x: Tensor, t: Times, *, data_at: DataAt = 0) -> Tensor:
    r"""Velocity from the score: the inverse of :func:`velocity_to_score`.

    .. math:: w = -\frac{x + \tau \nabla \log p_t(x)}{1 - \tau}, \qquad v = \pm w

    with the noise fraction :math:`\tau` and ``w`` the velocity towards the noise.

    Args:
        score: ``[B, *D]``.
        x: same shape.
        t: time in [0, 1] but not the noise end, a number or ``[B]``; a tensor that holds the
            noise end gives non-finite values there.
        data_at: the time at which the data are, 0 or 1.

    Returns:
        Same shape and dtype as ``score``.

    Raises:
        ValueError: shapes differ or are empty, a number ``t`` outside [0, 1] or at the noise end,
            or ``data_at``.
        TypeError: a tensor is not floating point.

    Example:
        Halfway, standard normal data have variance 1/2 and score ``-2 x``: noise and data weigh
        the same, and nothing moves:

        >>> import torch
        >>> x = torch.tensor([[0.3]])
        >>> score_to_velocity(-2 * x, x, 0.5).abs()
        tensor([[0.]])

    Source: Xue et al. (2025), preliminaries, arXiv:2509.25050.
    """
    check_choice("data_at", data_at, (0, 1))
    refuse_end(t, 1 - data_at, _NO_DATA_SHARE)
    check_items(score=score, x=x)
    tau = noise_fraction(t, x, data_at)
    away = -(widen(x) + tau * widen(score)) / (1 - tau)
    return toward_noise(away, data_at).to(score.dtype)


def finite_data_velocity(
    x: Tensor,
    data: Tensor,
    t: Times,
    *,
    probs: Tensor | None = None,
    data_at: DataAt = 0,
) -> FiniteDataVelocity:
    r"""Exact velocity field of a finite set of data points: what a perfect network would learn.

    .. math::
        w_k(x) \propto p_k \exp\Big(-\frac{\|x - (1 - \tau)\,\mathrm{data}_k\|^2}{2\tau^2}\Big),
        \qquad \bar d = \sum_k w_k\,\mathrm{data}_k, \qquad
        E[\mathrm{noise} - \mathrm{data} \mid x] = \frac{x - \bar d}{\tau}

    with the noise fraction :math:`\tau`; the velocity is its negative with ``data_at=1``.
    Integrated from noise it reproduces the data points with their probabilities.

    Differentiable in ``x``, ``data``, ``t`` and ``probs``. Memory ``O(N (K + D))``.

    Args:
        x: ``[N, D]``.
        data: ``[K, D]``.
        t: time in [0, 1] but not the data end, a number or ``[N]``; a tensor that holds the data
            end gives non-finite values there.
        probs: non-negative weights ``[K]``, normalised inside; ``None`` = equal. A weight of 0
            leaves the point out and gets no gradient.
        data_at: the time at which the data are, 0 or 1.

    Returns:
        ``velocity [N, D]`` and ``posterior [N, K]``, the probability of each data point given
        ``x``; in the dtype of ``x``.

    Raises:
        ValueError: wrong shapes, empty input, a number ``t`` outside [0, 1] or at the data end, or
            ``data_at``.
        TypeError: a tensor is not floating point.

    Example:
        Near the data end the field points away from the nearest point, here the one at 2:

        >>> import torch
        >>> data, x = torch.tensor([[-2.0], [2.0]]), torch.tensor([[1.0]])
        >>> field = finite_data_velocity(x, data, 0.1)
        >>> field.velocity, field.posterior
        (tensor([[-10.]]), tensor([[0., 1.]]))

    Source: Xue et al. (2025), Sec. 2, arXiv:2509.25050 (``data_at=0``); Yuan et al. (2024),
    ParetoFlow, arXiv:2412.03718 (``data_at=1``); enumeration of the conditional expectation.
    """
    refuse_end(t, data_at, _NO_NOISE_SHARE)
    check_floating(x=x, data=data, **given(probs=probs))
    check_shape("x", x, (None, None))
    check_not_empty("x", x)
    check_shape("data", data, (None, x.shape[1]))
    check_not_empty("data", data)
    tau = noise_fraction(t, x, data_at)
    position, points = widen(x), data.to(tau.dtype)
    # |x - a d|^2 from inner products, about the mean of the data: no [N, K, D] tensor, and a common
    # offset of the data costs no digits. What does not depend on k drops out of the softmax.
    centre = points.detach().mean(0)
    offset, spread = position - (1 - tau) * centre, points - centre
    closeness = offset @ spread.T - (1 - tau) * spread.square().sum(1) / 2
    log_weights = (1 - tau) / tau.square() * closeness
    if probs is not None:
        check_shape("probs", probs, (data.shape[0],))
        log_weights = log_weights + _log_probs(probs.to(tau.dtype))
    posterior = torch.softmax(log_weights, dim=1)
    away = (position - posterior @ points) / tau
    return FiniteDataVelocity(toward_noise(away, data_at).to(x.dtype), posterior.to(x.dtype))


def _log_probs(probs: Tensor) -> Tensor:
    # Twice where: the gradient of log at 0 would be NaN after the softmax.
    positive = probs > 0
    logs = torch.where(positive, torch.where(positive, probs, 1.0).log(), -torch.inf)
    # Negative or NaN weights must show: they come out as NaN.
    return torch.where(probs >= 0, logs, torch.nan)
