r"""Maximum-likelihood fit of a scaled noncentral chi-square to sampled test errors.

Source: Boopathy et al. (2024), arXiv:2406.15941, section 3.3.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from steelyard._checks import check_floating, check_range, check_shape
from steelyard.estimation import _noncentral
from steelyard.estimation._numbers import check_values, widen

__all__ = ["ScaledNCX2", "scaled_ncx2_fit"]

# The share of the mean that the noncentrality may make up; at 1 there are no degrees of freedom.
_MAX_SHARE = 1 - 1e-6
_NEWTON_STEPS = 8

Objective = Callable[[Tensor], Tensor]


class ScaledNCX2(NamedTuple):
    """What :func:`scaled_ncx2_fit` returns, for :func:`inductive_bias`."""

    df: Tensor
    noncentrality: Tensor
    scale: Tensor
    standard_error: dict[str, Tensor]


def scaled_ncx2_fit(errors: Tensor, *, min_gain: float = 0.0) -> ScaledNCX2:
    r"""Fit ``scale * chi2_df(noncentrality)``, location 0, by maximum likelihood.

    .. math::
        \max_{\mathrm{df}, \mathrm{nc}, \sigma} \sum_s \log \Big[ \frac{1}{\sigma}
            f\Big(\frac{e_s}{\sigma};\ \mathrm{df}, \mathrm{nc}\Big) \Big]

    The three are nearly unidentifiable: mean and variance fix two combinations, the rest hangs on
    the skewness. It is solved in mean, variance and the share ``nc / (df + nc)``; expect standard
    errors of ``df`` and ``noncentrality`` as large as the numbers, while the bias read from them
    is far more certain.

    Args:
        errors: positive test errors, ``[S]``, at least three, not all equal.
        min_gain: a noncentrality is kept only if it raises the log-likelihood over the best
            scaled chi-square (``noncentrality`` 0) by more than this; 0 = plain maximum
            likelihood, 2 = prefer two parameters unless the third earns its place.

    Returns:
        ``df``, ``noncentrality``, ``scale`` (0-d) and their ``standard_error`` by name, from the
        observed information; where that is not positive definite, as at ``noncentrality`` 0, from
        the outer product of the scores.

    Raises:
        TypeError: ``errors`` is not floating point.
        ValueError: wrong shape, fewer than three, not positive and finite, or all equal.

    Example:
        A thousand errors of 200 degrees of freedom; an error of 1/2 is seen in none of them:

        >>> import torch
        >>> from steelyard.estimation import inductive_bias
        >>> random = torch.Generator().manual_seed(0)
        >>> errors = torch.randn(1000, 200, generator=random).square().mean(1)
        >>> fit = scaled_ncx2_fit(errors, min_gain=2.0)
        >>> print(f"{fit.df:.0f} +- {fit.standard_error['df']:.0f}, {fit.noncentrality:.0f}")
        203 +- 9, 0
        >>> for law in ((200.0, 0.0, 1 / 200), fit[:3]):
        ...     print(f"{inductive_bias(0.5, *law):.1f}")
        21.9
        22.2

    Source: arXiv:2406.15941, section 3.3; start values and parametrisation derived.
    """
    check_floating(errors=errors)
    check_shape("errors", errors, (None,))
    check_range("number of errors", errors.shape[0], at_least=3)
    check_range("min_gain", min_gain, at_least=0.0)
    sample = widen(errors.detach())
    check_values("errors", sample, above=0.0, at_least=0.0)
    if bool(torch.isinf(sample).any()) or bool(sample.std() <= 1e-12 * sample.mean()):
        raise ValueError("errors must be finite and not all equal")
    unit = sample.mean()
    relative = sample / unit
    point = _maximize(relative, min_gain)
    df, noncentrality, scale = _law(point, relative)
    deviations = _standard_errors(relative, df, noncentrality, scale)
    deviations[2] = deviations[2] * unit
    names = ("df", "noncentrality", "scale")
    spread = dict(zip(names, (x.to(errors.dtype) for x in deviations), strict=True))
    df, noncentrality, scale = (x.to(errors.dtype) for x in (df, noncentrality, scale * unit))
    return ScaledNCX2(df, noncentrality, scale, spread)


def _law(point: Tensor, sample: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Parameters of the law from (mean, log variance, share), mean in standard deviations."""
    deviation = sample.std()
    mean = sample.mean() * torch.exp(point[0] * deviation / sample.mean())
    variance = deviation**2 * torch.exp(point[1])
    share = point[2]
    scale = variance / (2 * mean * (1 + share))
    total = mean / scale
    return total * (1 - share), total * share, scale


def _maximize(sample: Tensor, min_gain: float) -> Tensor:
    def loss(point: Tensor) -> Tensor:
        return -_log_likelihood(sample, *_law(point, sample)).mean()

    plain = _descend(loss, 0.0, fixed=True)
    points = [plain, _descend(loss, max(_moment_share(sample), 0.1), fixed=False)]
    losses = [float(loss(point)) for point in points]
    best = int(np.argmin(losses))
    gain = len(sample) * (losses[0] - losses[best])
    return points[best] if gain > min_gain else plain


def _descend(loss: Objective, share: float, *, fixed: bool) -> Tensor:
    from scipy.optimize import minimize

    def value_and_slope(x: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        value = loss(point)
        (slope,) = torch.autograd.grad(value, point)
        return float(value.detach()), slope.numpy()

    bounds = [(None, None), (None, None), (0.0, 0.0) if fixed else (0.0, _MAX_SHARE)]
    options = {"maxiter": 200, "ftol": 1e-13, "gtol": 1e-9}
    found = minimize(
        value_and_slope,
        [0.0, 0.0, share],
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options=options,
    )
    return _polish(loss, torch.as_tensor(found.x, dtype=torch.float64), fixed=fixed)


def _polish(loss: Objective, point: Tensor, *, fixed: bool) -> Tensor:
    """Take Newton steps while they help: the share's direction is too flat for L-BFGS."""
    free = 2 if fixed or float(point[2]) <= 0 else 3
    for _ in range(_NEWTON_STEPS):
        start = point.clone().requires_grad_()
        value = loss(start)
        (slope,) = torch.autograd.grad(value, start)
        curvature = _hessian(loss, point)[:free, :free]
        step = torch.linalg.lstsq(curvature, slope[:free, None]).solution[:, 0]
        trial = point.clone()
        trial[:free] -= step
        trial[2].clamp_(0.0, _MAX_SHARE)
        if not bool(loss(trial) < value):
            break
        point = trial
    return point


def _moment_share(sample: Tensor) -> float:
    """Share of the noncentrality that matches the third moment, in [0, 0.95]."""
    centred = sample - sample.mean()
    variance = centred.square().mean()
    ratio = float(sample.mean() * (centred**3).mean() / variance**2)
    # mean * third cumulant / variance^2 = 2 (1 + 2 rho) / (1 + rho)^2, in [1.5, 2]
    root = math.sqrt(min(max(1 - ratio / 2, 0.0), 0.25))
    return min(root / (1 - root), 0.95)


def _log_likelihood(sample: Tensor, df: Tensor, noncentrality: Tensor, scale: Tensor) -> Tensor:
    return _noncentral.log_pdf(sample / scale, df, noncentrality) - torch.log(scale)


def _standard_errors(
    sample: Tensor, df: Tensor, noncentrality: Tensor, scale: Tensor
) -> list[Tensor]:
    # In units of the parameters' own size, so that the information can be inverted.
    total = df + noncentrality
    units = torch.stack([total, total, scale])
    origin = torch.stack([df, noncentrality, scale]) / units

    def each(point: Tensor) -> Tensor:
        return -_log_likelihood(sample, *(point * units))

    information = _hessian(lambda p: each(p).sum(), origin)
    values = torch.linalg.eigvalsh(information)
    if noncentrality <= 0 or values[0] <= 1e-12 * values[-1]:
        directions = torch.eye(3, dtype=origin.dtype, device=origin.device)
        jvp = torch.autograd.functional.jvp
        scores = torch.stack([jvp(each, origin, v)[1] for v in directions])  # type: ignore[no-untyped-call]
        information = scores @ scores.T
    covariance = torch.linalg.pinv(information, hermitian=True, rtol=1e-14)
    return list(covariance.diagonal().clamp(min=0.0).sqrt() * units)


def _hessian(function: Objective, point: Tensor) -> Tensor:
    matrix: Tensor = torch.autograd.functional.hessian(function, point)  # type: ignore[no-untyped-call]
    return matrix
