r"""The one time convention of the package, and what every formula on a path needs from it.

A sample on the linear path mixes data and Gaussian noise,

.. math:: x_\tau = (1 - \tau)\,\mathrm{data} + \tau\,\mathrm{noise},

with the *noise fraction* :math:`\tau`. Papers run time both ways, so the argument ``data_at`` says
at which time the data are: with ``data_at=0`` the time is the noise fraction, ``t = tau``; with
``data_at=1`` it is ``t = 1 - tau``. A velocity is always the derivative of the path by ``t``:
``noise - data`` with ``data_at=0``, ``data - noise`` with ``data_at=1``.
"""

from typing import Literal

import torch
from torch import Tensor

from steelyard._checks import (
    check_choice,
    check_floating,
    check_not_empty,
    check_range,
    check_same_shape,
    check_shape,
)
from steelyard._reduce import accumulation_dtype

DataAt = Literal[0, 1]
Times = float | Tensor


def check_items(**tensors: Tensor) -> None:
    """Require floating tensors ``[B, *D]`` of one shape with at least one element."""
    check_floating(**tensors)
    check_same_shape(**tensors)
    name, first = next(iter(tensors.items()))
    if first.dim() == 0:
        raise ValueError(f"{name} must have shape [B, *D], got []")
    check_not_empty(name, first)


def as_column(name: str, value: Times, like: Tensor) -> Tensor:
    """Return numbers per item so that they broadcast against ``like``, in float32 or better.

    Args:
        name: of the argument, for errors.
        value: a number, a 0-d tensor or ``[B]``.
        like: ``[B, *D]``.

    Returns:
        A 0-d tensor, or ``[B, 1, .., 1]`` with as many dimensions as ``like``.
    """
    dtype = accumulation_dtype(like.dtype)
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=dtype, device=like.device)
    check_floating(**{name: value})
    if value.dim() == 0:
        return value.to(dtype)
    check_shape(name, value, (like.shape[0],))
    return value.to(dtype).reshape(-1, *[1] * (like.dim() - 1))


def refuse_arrays(**values: Times) -> None:
    """Require numbers or tensors where an array of another library would pass for either."""
    for name, value in values.items():
        if not isinstance(value, Tensor) and getattr(value, "ndim", 0) > 0:
            raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")


def check_time(name: str, t: Times, *, above: float = -1.0, below: float = 2.0) -> None:
    """Require a number in ``[0, 1]``, strictly inside a bound if asked; tensors are not read."""
    refuse_arrays(**{name: t})
    if not isinstance(t, Tensor):
        check_range(name, t, at_least=0.0, at_most=1.0, above=above, below=below)


def check_step(**times: Times) -> None:
    """Require a later and an earlier time, ``0 <= earlier < later <= 1``; tensors are not read."""
    (late_name, late), (early_name, early) = times.items()
    check_time(late_name, late, above=0.0)
    check_time(early_name, early, below=1.0 if isinstance(late, Tensor) else late)


def noise_fraction(t: Times, like: Tensor, data_at: DataAt) -> Tensor:
    """Return ``tau`` as a column of ``like``: ``t`` with ``data_at=0``, else ``1 - t``."""
    check_choice("data_at", data_at, (0, 1))
    check_time("t", t)
    column = as_column("t", t, like)
    return column if data_at == 0 else 1 - column


def refuse_end(t: Times, end: int, reason: str) -> None:
    """Raise if ``t`` is the number ``end``, where a formula has no value; tensors are not read."""
    refuse_arrays(t=t)
    if not isinstance(t, Tensor) and t == end:
        raise ValueError(f"t must not be {end}, {reason}, got {t}")


def toward_noise(velocity: Tensor, data_at: DataAt) -> Tensor:
    """Return ``noise - data`` from a velocity, and a velocity from ``noise - data``."""
    return velocity if data_at == 0 else -velocity


def item_mean(values: Tensor) -> Tensor:
    """Mean over all dimensions but the first: ``[B, *D] -> [B]``."""
    return values.reshape(values.shape[0], -1).mean(1)
