r"""Samplers of a velocity field: the ordinary equation and the stochastic family around it.

Both follow a grid of times. In the noise fraction :math:`\tau` (see ``_time``), with ``w`` the
velocity towards the noise, any scale :math:`\sigma_\tau \ge 0` gives the same laws at every time:

.. math::
    dx = \Big[w + \frac{\sigma_\tau^2}{2\tau}\big(x + (1 - \tau) w\big)\Big] d\tau
        + \sigma_\tau\,d\omega, \qquad \tau: 1 \to 0

Source: Liu et al. (2025), Flow-GRPO, arXiv:2505.05470; Heun's method as used by Karras et al.
(2022), Algorithm 1, arXiv:2206.00364.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from steelyard._checks import check_callable, check_choice, check_count, check_range, check_shape
from steelyard._reduce import widen
from steelyard.diffusion._time import DataAt, check_items, toward_noise

VelocityField = Callable[[Tensor, Tensor], Tensor]
"""``v(x [N, *D], t [N]) -> [N, *D]``, in the same time convention as the sampler's ``data_at``."""


def flow_times(
    steps: int,
    *,
    shift: float = 1.0,
    data_at: DataAt = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Grid of times from the noise to the data.

    With the noise fraction :math:`\tau_i = 1 - i / \text{steps}`,

    .. math:: \tau_i \mapsto \frac{s\,\tau_i}{1 + (s - 1)\,\tau_i}

    A shift ``s > 1`` spends more steps near the noise; the AWM experiments use 3.

    Args:
        steps: number of steps, >= 1.
        shift: > 0.
        data_at: the time at which the data are; the grid ends there.
        dtype: floating dtype of the result; ``None`` = PyTorch's default.
        device: of the result.

    Returns:
        ``[steps + 1]``, decreasing from 1 to 0 with ``data_at=0``, increasing with ``data_at=1``.

    Raises:
        ValueError: ``steps``, ``shift`` or ``data_at`` out of range.

    Example:
        >>> flow_times(4), flow_times(2, shift=3.0, data_at=1)
        (tensor([1.0000, 0.7500, 0.5000, 0.2500, 0.0000]), tensor([0.0000, 0.2500, 1.0000]))

    Source: Xue et al. (2025), released code, arXiv:2509.25050.
    """
    check_count("steps", steps)
    check_range("shift", shift, above=0.0)
    check_choice("data_at", data_at, (0, 1))
    tau = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    tau = shift * tau / (shift * tau + (1 - tau))
    t = tau if data_at == 0 else 1 - tau
    return t.to(dtype=dtype or torch.get_default_dtype(), device=device)


def sample_ode(
    velocity_fn: VelocityField,
    x: Tensor,
    times: Tensor | Sequence[float],
    *,
    method: Literal["heun", "euler"] = "heun",
    data_at: DataAt = 0,
) -> Tensor:
    r"""Follow the velocity field along a grid of times, without noise.

    .. math::
        \tilde x_{i+1} = x_i + h_i v(x_i, t_i), \qquad
        x_{i+1} = x_i + \tfrac{h_i}{2}\big(v(x_i, t_i) + v(\tilde x_{i+1}, t_{i+1})\big)

    with ``h_i = t_{i+1} - t_i``. Euler keeps the first formula. Heun takes the plain step where it
    would evaluate the field at the data end, at which fields made from a denoiser have no value.

    Works in both directions: from noise to data to sample, from data to noise to invert. Runs with
    gradients if the field has them; wrap in ``torch.no_grad()`` otherwise.

    Args:
        velocity_fn: callable ``(x [N, *D], t [N]) -> [N, *D]``.
        x: where to start, ``[N, *D]``; standard normal at the noise end.
        times: two or more strictly monotone times in [0, 1], for example ``flow_times(20)``.
        method: ``"heun"``: two evaluations a step, error of second order; ``"euler"``: one, first.
        data_at: the time convention of ``velocity_fn`` and ``times``.

    Returns:
        ``x`` at the last time, same shape and dtype.

    Raises:
        ValueError: wrong shapes, empty ``x``, times outside [0, 1] or not monotone, or an unknown
            ``method`` or ``data_at``.
        TypeError: ``x`` is not floating point.

    Example:
        The exact field of two data points takes each noise to one of them, in few steps:

        >>> import torch
        >>> from steelyard.diffusion import finite_data_velocity
        >>> data = torch.tensor([[-1.0], [3.0]])
        >>> field = lambda x, t: finite_data_velocity(x, data, t).velocity
        >>> sample_ode(field, torch.tensor([[-0.9], [0.7]]), flow_times(8)).round(decimals=3)
        tensor([[-1.],
                [ 3.]])

    Source: Karras et al. (2022), Algorithm 1, arXiv:2206.00364.
    """
    check_callable(velocity_fn=velocity_fn)
    check_items(x=x)
    check_choice("method", method, ("heun", "euler"))
    check_choice("data_at", data_at, (0, 1))
    for t, t_next in pairwise(_monotone(times)):
        step = t_next - t
        velocity = _evaluate(velocity_fn, x, t)
        guess = (widen(x) + step * velocity).to(x.dtype)
        if method == "heun" and t_next != data_at:
            average = (velocity + _evaluate(velocity_fn, guess, t_next)) / 2
            guess = (widen(x) + step * average).to(x.dtype)
        x = guess
    return x


def sample_sde(
    velocity_fn: VelocityField,
    x: Tensor,
    times: Tensor | Sequence[float],
    *,
    noise_level: float | Callable[[float], float] = 0.7,
    data_at: DataAt = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Sample with fresh noise at every step; every noise level has the same laws at every time.

    Euler-Maruyama steps of the family in the module's docstring. A number ``a`` means Flow-GRPO's
    scale :math:`\sigma_\tau = a \sqrt{\tau / (1 - \tau)}` (at the noise end the next time of the
    grid stands in the denominator); ``a = 0`` is the Euler ODE sampler, :math:`a = \sqrt 2` the
    time reversal of the diffusion that turns data into noise.

    Args:
        velocity_fn: callable ``(x [N, *D], t [N]) -> [N, *D]``.
        x: where to start, ``[N, *D]``; standard normal at the noise end.
        times: two or more times in [0, 1], strictly monotone from the noise towards the data, for
            example ``flow_times(20)``.
        noise_level: ``a`` >= 0, or a callable that takes the time (a float) and returns
            :math:`\sigma` >= 0.
        data_at: the time convention of ``velocity_fn``, ``times`` and ``noise_level``.
        generator: source of the noise.

    Returns:
        ``x`` at the last time, same shape and dtype.

    Raises:
        ValueError: wrong shapes, empty ``x``, times outside [0, 1] or not monotone towards the
            data, a negative noise level, or ``data_at``.
        TypeError: ``x`` is not floating point.

    Example:
        Standard normal data have the velocity ``(2t - 1) x / (t^2 + (1-t)^2)``, and samples have
        standard deviation 1 at any noise level:

        >>> import torch
        >>> field = lambda x, t: (x.T * (2 * t - 1) / (t**2 + (1 - t) ** 2)).T
        >>> g = torch.Generator().manual_seed(0)
        >>> x = torch.randn(20000, 1, generator=g)
        >>> for a in (0.0, 0.7, 1.4):
        ...     y = sample_sde(field, x, flow_times(100), noise_level=a, generator=g)
        ...     print(round(y.std().item(), 1))
        1.0
        1.0
        1.0

    Source: Liu et al. (2025), Eq. 8 and 9, arXiv:2505.05470.
    """
    check_callable(velocity_fn=velocity_fn)
    check_items(x=x)
    check_choice("data_at", data_at, (0, 1))
    if not callable(noise_level):
        check_range("noise_level", noise_level, at_least=0.0)
    grid = _monotone(times)
    if (grid[1] < grid[0]) != (data_at == 0):
        raise ValueError(
            f"times must run towards the data at {data_at}, got {grid[0]:g} to {grid[-1]:g}"
        )
    for t, t_next in pairwise(grid):
        tau, tau_next = (t, t_next) if data_at == 0 else (1 - t, 1 - t_next)
        scale = (
            noise_level(t)
            if callable(noise_level)
            else noise_level * (tau / (1 - (tau_next if tau == 1 else tau))) ** 0.5
        )
        check_range("noise_level", scale, at_least=0.0)
        away = toward_noise(_evaluate(velocity_fn, x, t), data_at)
        mean = denoising_mean(widen(x), away, tau, tau_next, scale**2)
        noise = torch.randn(x.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        x = (mean + scale * (tau - tau_next) ** 0.5 * noise).to(x.dtype)
    return x


def denoising_mean(
    x: Tensor,
    away: Tensor,
    tau: float | Tensor,
    tau_next: float | Tensor,
    variance: float | Tensor,
) -> Tensor:
    """Mean of one Euler-Maruyama step from ``tau`` down to ``tau_next``, at squared scale."""
    pull = variance / (2 * tau)
    return x + (tau_next - tau) * (away + pull * (x + (1 - tau) * away))


def _evaluate(velocity_fn: VelocityField, x: Tensor, t: float) -> Tensor:
    velocity = velocity_fn(x, x.new_full((x.shape[0],), t))
    check_shape("velocity_fn(x, t)", velocity, tuple(x.shape))
    return widen(velocity)


def _monotone(times: Tensor | Sequence[float]) -> list[float]:
    """Return the times as floats after checking that they are a grid in [0, 1]."""
    if isinstance(times, Tensor):
        check_shape("times", times, (None,))
    elif isinstance(times, str | bytes) or not isinstance(times, Sequence):
        raise TypeError(f"times must be a tensor or a sequence, got {type(times).__name__}")
    grid = [float(t) for t in times]
    if len(grid) < 2:
        raise ValueError(f"times must have two or more entries, got {len(grid)}")
    for t in grid:
        check_range("times", t, at_least=0.0, at_most=1.0)
    steps = [later - earlier for earlier, later in pairwise(grid)]
    if not (all(step > 0 for step in steps) or all(step < 0 for step in steps)):
        raise ValueError(f"times must be strictly increasing or strictly decreasing, got {grid}")
    return grid
