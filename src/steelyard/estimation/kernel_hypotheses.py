r"""The hypotheses of a kernel that fit the training data, and the exact law of their test error.

Functions drawn from a Gaussian process and conditioned on an exact fit are Gaussian on the test
points, so that their mean squared test error is a weighted sum of noncentral chi-squares: moments,
tail and inductive bias follow without sampling.

Source: Boopathy, Yue, Hwang, Iyer, Fiete (2024), arXiv:2406.15941, sections 3.2 and 3.3.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from steelyard._checks import (
    check_choice,
    check_floating,
    check_not_empty,
    check_range,
    check_shape,
)
from steelyard.estimation._generalized_chi_square import (
    WeightedChiSquares,
    inverted_log_tail,
    saddlepoint_log_tail,
)
from steelyard.estimation._numbers import Number, as_wide, check_values, narrow_dtype, widen

__all__ = [
    "ErrorMoments",
    "KernelHypothesisSpace",
    "error_moments",
    "exact_inductive_bias",
    "kernel_hypothesis_space",
]

# Above this many nats the saddlepoint is as good as anyone needs, and cheaper.
_SADDLEPOINT_FROM = 25.0


class KernelHypothesisSpace(NamedTuple):
    """What :func:`kernel_hypothesis_space` returns."""

    mean: Tensor
    covariance: Tensor
    error_mean: Tensor
    error_variance: Tensor


class ErrorMoments(NamedTuple):
    """What :func:`error_moments` returns, both 0-d."""

    mean: Tensor
    variance: Tensor


def kernel_hypothesis_space(
    X_train: Tensor,
    y_train: Tensor,
    X_test: Tensor,
    y_test: Tensor,
    bandwidth: Number,
    *,
    jitter: float = 0.0,
) -> KernelHypothesisSpace:
    r"""Condition a Gaussian process on an exact fit and look at its test error.

    .. math::
        h(X_*) \sim \mathcal{N}(m, C), \quad m = K_* K^{-1} y, \quad
        C = K_{**} - K_* K^{-1} K_*^\top, \qquad k(a, b) = e^{-\|a - b\|^2 / (2\, \mathrm{bw}^2)}

    independently for each output column. Solved by a Cholesky factor, for up to about ten
    thousand training points.

    Args:
        X_train: inputs, ``[n, d]``; ``n = 0`` gives the space before any data.
        y_train: targets, ``[n]`` or ``[n, k]``.
        X_test: inputs, ``[N, d]``.
        y_test: targets, ``[N]`` or ``[N, k]``.
        bandwidth: of the kernel, > 0. On many features 1 makes every point its own island (the
            mean is then 0): standardise, or take a median distance.
        jitter: added to the diagonal of ``K``, >= 0; 0 = exact fit. Repeated training points and
            wide kernels need some, about 1e-10.

    Returns:
        ``mean`` of the shape of ``y_test``, ``covariance`` ``[N, N]`` (symmetric; small
        eigenvalues may be negative by rounding), and ``error_mean``, ``error_variance`` of the
        mean squared error over points and outputs (0-d).

    Raises:
        TypeError: not floating point.
        ValueError: wrong shapes, no test point, ``bandwidth <= 0``, negative ``jitter``, or a
            training kernel that is not positive definite.

    Example:
        Test points that were trained on leave nothing to choose:

        >>> import torch
        >>> X = torch.linspace(0.0, 3.0, 4, dtype=torch.float64).unsqueeze(1)
        >>> y = X.squeeze(1).sin()
        >>> seen = kernel_hypothesis_space(X, y, X[:2], y[:2], bandwidth=1.0)
        >>> new = kernel_hypothesis_space(X, y, X + 0.5, (X + 0.5).squeeze(1).sin(), bandwidth=1.0)
        >>> print(f"{seen.error_mean.abs():.6f} {new.error_mean:.6f}")
        0.000000 0.061015

    Source: arXiv:2406.15941, section 3.2.
    """
    _check_data(X_train, y_train, X_test, y_test)
    check_range("jitter", jitter, at_least=0.0)
    (width,) = as_wide(bandwidth=bandwidth)
    check_shape("bandwidth", width, ())
    check_values("bandwidth", width, above=0.0, at_least=0.0)
    train, test = widen(X_train), widen(X_test)
    targets, outputs = widen(y_train), widen(y_test)
    covariance = _kernel(test, test, width)
    if len(train):
        factor = _cholesky(_kernel(train, train, width), jitter)
        half = torch.linalg.solve_triangular(factor, _kernel(train, test, width), upper=False)
        columns = targets.unsqueeze(1) if targets.dim() == 1 else targets
        solved = torch.linalg.solve_triangular(factor, columns, upper=False)
        mean = (half.T @ solved).reshape(outputs.shape)
        covariance = covariance - half.T @ half
    else:
        mean = torch.zeros_like(outputs)
    dtype = narrow_dtype(X_train, y_train, X_test, y_test)
    moments = error_moments(covariance, mean - outputs)
    return KernelHypothesisSpace(*(x.to(dtype) for x in (mean, covariance, *moments)))


def error_moments(covariance: Tensor, residual: Tensor) -> ErrorMoments:
    r"""Mean and variance of the test error of Gaussian hypotheses.

    .. math::
        \mathbb{E} e = \frac{\mathrm{tr}\, C}{N} + \frac{\|D\|_F^2}{N k}, \qquad
        \mathrm{Var}\, e = \frac{2 k\, \mathrm{tr}\, C^2 + 4\, \mathrm{tr}\, D^\top C D}{(N k)^2}

    Args:
        covariance: :math:`C` of the predictions on the test points, shared by the outputs,
            ``[N, N]``.
        residual: :math:`D`, their mean minus the targets, ``[N]`` or ``[N, k]``.

    Returns:
        ``mean`` and ``variance``, for :func:`satterthwaite`.

    Raises:
        TypeError: not floating point.
        ValueError: wrong shapes or empty.

    Example:
        >>> import torch
        >>> mean, variance = error_moments(torch.eye(4), torch.zeros(4))  # chi2_4 / 4
        >>> mean, variance
        (tensor(1.), tensor(0.5000))

    Source: arXiv:2406.15941, section 3.3; moments derived.
    """
    c, d = _gaussian(covariance, residual)
    points, outputs = d.shape
    mean = c.trace() / points + d.square().mean()
    spread = 2 * outputs * (c * c.T).sum() + 4 * (d * (c @ d)).sum()
    dtype = narrow_dtype(covariance, residual)
    return ErrorMoments(mean.to(dtype), (spread / (points * outputs) ** 2).to(dtype))


@torch.no_grad()
def exact_inductive_bias(
    test_error: Number,
    covariance: Tensor,
    residual: Tensor,
    *,
    method: Literal["auto", "imhof", "saddlepoint"] = "auto",
) -> Tensor:
    r"""Nats needed to reach a test error within a kernel's hypotheses, without a fitted law.

    .. math::
        I(\varepsilon) = -\log \Pr\Big( \frac{1}{N k}
            \|D + C^{1/2} Z\|_F^2 \le \varepsilon \Big), \qquad
        \|D + C^{1/2} Z\|_F^2 = \sum_i \lambda_i \chi^2_k\big( \|v_i^\top D\|^2 / \lambda_i \big)

    ``"imhof"`` inverts the characteristic function. The contour goes through the saddlepoint, so
    that the *relative* error of the probability is about 1e-10 at 1000 nats as at 1; Imhof's own
    line ends near 30 nats. ``"saddlepoint"`` costs one root; its error falls with the number of
    directions (below 1 % from a few on). ``"auto"`` is the first below 25 nats, the second above.

    Eigenvalues that rounding cannot tell from 0 are taken as 0: what remains of the residual
    along them is a part of the error that no hypothesis avoids.

    Args:
        test_error: the level :math:`\varepsilon \ge 0` of the mean squared error; a float, or a
            tensor of any shape.
        covariance: ``[N, N]``, symmetric.
        residual: ``[N]`` or ``[N, k]``, mean prediction minus target.
        method: how the tail is taken.

    Returns:
        Shape of ``test_error``, nats, >= 0; infinite where no hypothesis is good enough. No
        gradient.

    Raises:
        TypeError: not floating point.
        ValueError: wrong shapes, empty, not finite, negative ``test_error``, unknown ``method``, or
            numbers so far apart in size that rounding leaves nothing of the tail.

    Example:
        Training removes bias: the nats needed for an error of 0.01 fall with each point.

        >>> import torch
        >>> X = torch.linspace(0.0, 6.0, 31, dtype=torch.float64).unsqueeze(1)
        >>> y = X.squeeze(1).sin()
        >>> for n in (0, 2, 4, 6):
        ...     kept = torch.linspace(0, 30, n).long()
        ...     space = kernel_hypothesis_space(X[kept], y[kept], X, y, bandwidth=1.0)
        ...     bias = exact_inductive_bias(0.01, space.covariance, space.mean - y)
        ...     print(f"{bias:.2f}")
        13.74
        9.95
        4.64
        0.91

    Source: arXiv:2406.15941, sections 3.2 and 3.3; both tail methods derived.
    """
    check_choice("method", method, ("auto", "imhof", "saddlepoint"))
    c, d = _gaussian(covariance, residual)
    (level,) = as_wide(test_error=test_error)
    check_values("test_error", level, at_least=0.0)
    for name, tensor in (("covariance", c), ("residual", d)):
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    values, vectors = torch.linalg.eigh(c / 2 + c.T / 2)
    projected = (vectors.T @ d).square().sum(1)
    random = values > len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    unavoidable = float(projected[~random].sum()) / d.numel()
    law = WeightedChiSquares(
        values[random] / d.numel(), d.shape[1], projected[random] / values[random]
    )
    if not bool(law.noncentrality.isfinite().all()):
        raise ValueError("residual must be smaller beside covariance: its square overflows")
    nats = [_nats(law, error - unavoidable, method) for error in level.flatten().tolist()]
    if any(math.isnan(value) for value in nats):
        raise ValueError(
            "test_error, covariance and residual must be of sizes that float64 holds side by side"
        )
    result = torch.tensor(nats, dtype=level.dtype).reshape(level.shape)
    return result.to(narrow_dtype(covariance, residual)).to(covariance.device)


def _nats(law: WeightedChiSquares, x: float, method: str) -> float:
    if len(law.weights) == 0:
        return 0.0 if x >= 0 else torch.inf
    if x <= 0:
        return torch.inf
    if x == torch.inf:
        return 0.0
    nats = torch.inf if method == "imhof" else -float(saddlepoint_log_tail(law, x))
    if nats == 0.0:  # no mass beyond: nothing to invert
        return 0.0
    if method == "imhof" or (method == "auto" and nats < _SADDLEPOINT_FROM):
        nats = -float(inverted_log_tail(law, x))
    return max(nats, 0.0)


def _gaussian(covariance: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Check and widen a covariance ``[N, N]`` and a residual, made ``[N, k]``."""
    check_floating(covariance=covariance, residual=residual)
    check_shape("covariance", covariance, (None, None))
    check_not_empty("covariance", covariance)
    points = covariance.shape[0]
    check_shape("covariance", covariance, (points, points))
    _check_targets("residual", residual, points)
    check_not_empty("residual", residual)
    d = widen(residual)
    return widen(covariance), d.unsqueeze(1) if d.dim() == 1 else d


def _check_targets(name: str, tensor: Tensor, rows: int, outputs: int | None = None) -> None:
    if tensor.dim() not in (1, 2):
        raise ValueError(
            f"{name} must have shape [{rows}] or [{rows}, k], got {list(tensor.shape)}"
        )
    check_shape(name, tensor, (rows,) if tensor.dim() == 1 else (rows, outputs))


def _check_data(X_train: Tensor, y_train: Tensor, X_test: Tensor, y_test: Tensor) -> None:
    check_floating(X_train=X_train, y_train=y_train, X_test=X_test, y_test=y_test)
    check_shape("X_test", X_test, (None, None))
    check_not_empty("X_test", X_test)
    check_shape("X_train", X_train, (None, X_test.shape[1]))
    _check_targets("y_test", y_test, X_test.shape[0])
    check_not_empty("y_test", y_test)
    _check_targets("y_train", y_train, X_train.shape[0])
    if y_train.shape[1:] != y_test.shape[1:]:
        raise ValueError(
            f"y_train must have the outputs of y_test, {list(y_test.shape[1:])}, "
            f"got {list(y_train.shape[1:])}"
        )


def _kernel(a: Tensor, b: Tensor, bandwidth: Tensor) -> Tensor:
    # distances of near points must be exact: no expansion of the square
    distance = torch.cdist(
        a / bandwidth, b / bandwidth, compute_mode="donot_use_mm_for_euclid_dist"
    )
    kernel: Tensor = torch.exp(-distance.square() / 2)
    return kernel


def _cholesky(kernel: Tensor, jitter: float) -> Tensor:
    identity = torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(kernel + jitter * identity)
    if bool(failed):
        raise ValueError(
            f"the kernel of X_train is not positive definite with jitter {jitter:g}: points "
            "repeat or the bandwidth is wide; raise jitter, for example to 1e-10"
        )
    return factor
