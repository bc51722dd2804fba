r"""The soft maximum ``T log mean exp(v / T)`` and its weights, accurate at every temperature.

It runs from the mean (``T = inf``) to the maximum (``T = 0``), and its gradient is the tempered
softmax. Near the mean the usual ``T (logsumexp(v / T) - log n)`` loses all its digits, because it
is a small difference times a large ``T``; ``log1p(mean(expm1))`` does not.
"""

import math

import torch
from torch import Tensor


def check_temperature(name: str, value: float) -> None:
    """Require a number in [0, inf], both ends included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not value >= 0:
        raise ValueError(f"{name} must be >= 0, inf allowed, got {value}")


def limit(temperature: float, dtype: torch.dtype) -> float | None:
    """Return 0 or inf if the temperature is that limit in this dtype, else ``None``.

    Beyond the root of the range the two differ by less than a rounding error, and quotients by the
    temperature still neither overflow nor underflow.
    """
    info = torch.finfo(dtype)
    if temperature < math.sqrt(info.tiny):
        return 0.0
    return math.inf if temperature > math.sqrt(info.max) else None


def log_mean_exp(scaled: Tensor, kept: Tensor | None = None) -> Tensor:
    """``log((1/n) sum exp(s))`` over the last dimension, of values whose largest kept one is 0."""
    if kept is None:
        excess, total = scaled.expm1().mean(-1), scaled.exp().mean(-1)
    else:
        count = kept.sum(-1).clamp(min=1)
        excess = scaled.expm1().where(kept, 0.0).sum(-1) / count
        total = scaled.exp().where(kept, 0.0).sum(-1) / count
    near = excess > -0.5
    return torch.where(near, excess.where(near, 0.0).log1p(), total.where(~near, 1.0).log())


def soft_maximum(values: Tensor, temperature: float | Tensor, kept: Tensor | None = None) -> Tensor:
    """``T log mean exp(v / T)`` of kept values over the last dimension, 0 where none is kept.

    A tensor ``temperature`` holds one positive number per row.
    """
    if kept is not None:
        values = values.where(kept, 0.0)
    top = _top(values, kept)
    bound = None if isinstance(temperature, Tensor) else limit(temperature, values.dtype)
    if bound is not None:
        weights = soft_weights(values, bound, kept)
        return (weights * values).sum(-1)
    rate = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    scaled = (values - top) / rate
    return top.squeeze(-1) + temperature * log_mean_exp(scaled, kept)


def soft_weights(values: Tensor, temperature: float | Tensor, kept: Tensor | None = None) -> Tensor:
    """Softmax of ``v / T`` over kept values of the last dimension, detached.

    Ties of the maximum share at ``T = 0``; where nothing is kept all weights are 0.
    """
    values = values.detach()
    keep = torch.ones_like(values, dtype=torch.bool) if kept is None else kept
    gaps = (values.where(keep, 0.0) - _top(values, kept)).where(keep, -math.inf)
    bound = None if isinstance(temperature, Tensor) else limit(temperature, values.dtype)
    if bound is None:
        rate = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
        shares = (gaps / rate).exp()
    else:
        shares = (keep if bound else (gaps == 0) | gaps.isnan()).to(values.dtype)
        shares = torch.where(gaps.isnan(), gaps, shares)
    total = shares.sum(-1, keepdim=True)
    return shares / total.where(total != 0, 1.0)


def kl_to_uniform(weights: Tensor) -> Tensor:
    """``sum p log(K p)`` over the last dimension."""
    negentropy: Tensor = torch.special.xlogy(weights, weights).sum(-1)
    return negentropy + math.log(weights.shape[-1])


def _top(values: Tensor, kept: Tensor | None) -> Tensor:
    """Largest kept value of each row, detached, ``[..., 1]``; 0 where none is kept."""
    values = values.detach()
    if kept is None:
        return values.amax(-1, keepdim=True)
    top = values.where(kept, -math.inf).amax(-1, keepdim=True)
    return top.where(kept.any(-1, keepdim=True), 0.0)
