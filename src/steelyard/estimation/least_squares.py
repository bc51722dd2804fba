r"""Weighted least squares from a few well-chosen points: bases, weights, fits, guarantees.

On ``P`` candidate points with probabilities ``measure``, the best approximation of a function in
an ``m``-dimensional space is fitted from ``n`` evaluations:

.. math::
    \hat f = \arg\min_{v \in V_m} \frac1n \sum_{i=1}^n w(x_i) \big( f(x_i) - v(x_i) \big)^2,
    \qquad G = \frac1n \sum_i w(x_i) \varphi(x_i) \varphi(x_i)^\top

with an orthonormal basis :math:`\varphi`. ``lambda_min(G)`` says how far the fit can be trusted:
at ``1 - delta`` the error in the space is amplified by at most ``1 / (1 - delta)``. Where the
points come from is in :mod:`steelyard.estimation.determinantal`.

Source: Nouy, Michel (2023), Weighted least-squares approximation with determinantal point processes
and generalized volume sampling, arXiv:2312.14057.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from steelyard._checks import check_count, check_floating, check_not_empty, check_range, check_shape
from steelyard.estimation._numbers import check_law, check_values, narrow_dtype, widen

__all__ = [
    "Christoffel",
    "WeightedFit",
    "chernoff_rate",
    "christoffel",
    "orthonormal_basis",
    "required_samples",
    "weighted_least_squares",
]

# A basis may miss orthonormality by this many square roots of its dtype's rounding unit.
_ORTHONORMAL_TOLERANCE = 8.0


class Christoffel(NamedTuple):
    """What :func:`christoffel` returns, both ``[P]``."""

    weights: Tensor
    probabilities: Tensor


class WeightedFit(NamedTuple):
    """What :func:`weighted_least_squares` returns."""

    coef: Tensor
    gram: Tensor
    lambda_min: Tensor
    lambda_max: Tensor
    leave_one_out: Tensor


def orthonormal_basis(features: Tensor, measure: Tensor) -> Tensor:
    r"""Orthonormalise features on the candidates, in order.

    .. math:: \sum_p \mu_p \varphi_i(x_p) \varphi_j(x_p) = \delta_{ij}, \qquad
        \varphi_j \in \mathrm{span}(f_1 .. f_j), \quad \langle \varphi_j, f_j \rangle > 0

    Args:
        features: any basis of the space on the candidates, ``[P, m]``.
        measure: probabilities of the candidates, ``[P]``; those of 0 get values as well.

    Returns:
        ``[P, m]``, what Gram-Schmidt would give, by Householder reflections. Differentiable.

    Raises:
        TypeError: not floating point.
        ValueError: wrong shapes, ``measure`` is no law, or linearly dependent features.

    Example:
        Legendre polynomials, from powers:

        >>> import torch
        >>> x = torch.linspace(-1, 1, 2001, dtype=torch.float64)
        >>> powers = torch.stack([x**0, x, x**2], 1)
        >>> basis = orthonormal_basis(powers, torch.full_like(x, 1 / 2001))
        >>> basis[-1] / torch.tensor([1.0, 3.0, 5.0]).sqrt()  # P_j(1) = 1
        tensor([1.0000, 0.9995, 0.9985], dtype=torch.float64)

    Source: arXiv:2312.14057 (standard).
    """
    check_floating(features=features, measure=measure)
    check_shape("features", features, (None, None))
    check_not_empty("features", features)
    check_shape("measure", measure, (features.shape[0],))
    check_law("measure", measure)
    f, mu = widen(features), widen(measure)
    size = (mu.unsqueeze(1) * f.square()).sum(0).sqrt()
    seen = mu > 0
    if int(seen.sum()) < f.shape[1]:
        raise ValueError(
            f"features must have no more columns than candidates of positive measure, got "
            f"{f.shape[1]} columns and {int(seen.sum())} candidates"
        )
    factor = torch.linalg.qr(mu[seen].sqrt().unsqueeze(1) * f[seen]).R
    pivots = factor.diagonal()
    if bool((pivots.abs() <= 16 * torch.finfo(f.dtype).eps * f.shape[1] * size).any()):
        dependent = int((pivots.abs() / size).nan_to_num().argmin())
        raise ValueError(
            f"features must be linearly independent under measure, column {dependent} is not"
        )
    # R^-1 on every row, then once more: the second pass removes what rounding left
    basis = torch.linalg.solve_triangular(factor, f, upper=True, left=False)
    gram = basis.T @ (mu.unsqueeze(1) * basis)
    root, failed = torch.linalg.cholesky_ex(gram)
    if bool(failed):
        raise ValueError("features must be finite and linearly independent under measure")
    correction = root.mT
    orthonormal: Tensor = torch.linalg.solve_triangular(correction, basis, upper=True, left=False)
    orthonormal = orthonormal * pivots.sign()
    return orthonormal.to(narrow_dtype(features, measure))


def christoffel(basis: Tensor, measure: Tensor) -> Christoffel:
    r"""Weights and sampling probabilities of the optimal independent design.

    .. math:: w(x) = \frac{m}{K(x, x)}, \qquad \nu = \frac{\mu}{w}, \qquad
        K(x, x) = \|\varphi(x)\|^2

    Args:
        basis: orthonormal on the candidates, ``[P, m]``.
        measure: their probabilities, ``[P]``.

    Returns:
        ``weights`` and ``probabilities``; a candidate where all basis functions vanish has weight
        infinity and is never drawn.

    Raises:
        TypeError: not floating point.
        ValueError: wrong shapes, ``measure`` is no law, or ``basis`` is not orthonormal for it.

    Example:
        Polynomials are sampled more densely near the ends of the interval, and weighted less:

        >>> import torch
        >>> x = torch.linspace(-1, 1, 5, dtype=torch.float64)
        >>> measure = torch.full_like(x, 0.2)
        >>> basis = orthonormal_basis(torch.stack([x**0, x], 1), measure)
        >>> design = christoffel(basis, measure)
        >>> design.probabilities
        tensor([0.3000, 0.1500, 0.1000, 0.1500, 0.3000], dtype=torch.float64)
        >>> design.weights * design.probabilities
        tensor([0.2000, 0.2000, 0.2000, 0.2000, 0.2000], dtype=torch.float64)

    Source: arXiv:2312.14057, optimal weight (standard).
    """
    phi, mu = check_basis(basis, measure)
    kernel = phi.square().sum(1)
    dtype = narrow_dtype(basis, measure)
    return Christoffel((phi.shape[1] / kernel).to(dtype), (mu * kernel / phi.shape[1]).to(dtype))


def weighted_least_squares(basis: Tensor, values: Tensor, weights: Tensor) -> WeightedFit:
    r"""Fit values at the chosen points, and say how stable the fit is.

    .. math::
        a = \arg\min_a \frac1n \sum_i w_i \big( y_i - \varphi(x_i)^\top a \big)^2, \qquad
        G = \frac1n \sum_i w_i \varphi(x_i) \varphi(x_i)^\top

    by a singular value decomposition of :math:`\sqrt{w_i / n}\, \varphi_j(x_i)`, never by the
    normal equations; the solution of smallest norm where points repeat. ``leave_one_out`` is the
    mean weighted squared error of each point predicted from the others,
    :math:`\frac1n \sum_i w_i (r_i / (1 - h_i))^2` with the leverages ``h_i``.

    Args:
        basis: of the points, an orthonormal basis' rows, ``[n, m]``.
        values: observations, ``[n]``.
        weights: ``w`` of the points, >= 0, as the sampler returned them, ``[n]``.

    Returns:
        ``coef`` ``[m]``, ``gram`` ``[m, m]``, its extreme eigenvalues ``lambda_min`` (0 when
        singular) and ``lambda_max``, and ``leave_one_out`` (infinite if some point alone fixes a
        coefficient, as for ``n <= m``). Differentiable in ``values``.

    Raises:
        TypeError: not floating point.
        ValueError: wrong shapes, empty, or negative weights.

    Example:
        >>> import torch
        >>> x = torch.tensor([-0.9, -0.3, 0.4, 0.8], dtype=torch.float64)
        >>> basis = torch.stack([x**0, 3**0.5 * x], 1)
        >>> fit = weighted_least_squares(basis, 1 - 2 * x, torch.ones_like(x))
        >>> fit.coef * torch.tensor([1.0, 3**0.5])
        tensor([ 1.0000, -2.0000], dtype=torch.float64)
        >>> print(f"stable: {fit.lambda_min:.2f} .. {fit.lambda_max:.2f}")
        stable: 1.00 .. 1.27

    Source: arXiv:2312.14057, fit (standard).
    """
    check_floating(basis=basis, values=values, weights=weights)
    check_shape("basis", basis, (None, None))
    check_not_empty("basis", basis)
    check_shape("values", values, (basis.shape[0],))
    check_shape("weights", weights, (basis.shape[0],))
    check_values("weights", weights, at_least=0.0)
    n, m = basis.shape
    root = (widen(weights) / n).sqrt()
    design = root.unsqueeze(1) * widen(basis)
    if not bool(design.isfinite().all()):
        raise ValueError("basis must be finite, and with weights in range, got NaN or infinity")
    left, singular, right = torch.linalg.svd(design, full_matrices=False)
    kept = singular > max(n, m) * torch.finfo(design.dtype).eps * singular.amax()
    left, singular, right = left[:, kept], singular[kept], right[kept]
    coef = right.T @ ((left.T @ (root * widen(values))) / singular)
    residual = widen(values) - widen(basis) @ coef
    freedom = 1 - left.square().sum(1)
    fixed = (freedom <= 64 * n * torch.finfo(design.dtype).eps) & (root > 0)
    shortened = root * residual / torch.where(freedom > 0, freedom, 1.0)
    left_out = torch.where(fixed.any(), torch.inf, shortened.square().sum())
    full = len(singular) == m
    smallest = singular[-1].square() if full else design.new_zeros(())
    largest = singular[0].square() if len(singular) else design.new_zeros(())
    results = (coef, design.T @ design, smallest, largest, left_out)
    dtype = narrow_dtype(basis, values, weights)
    return WeightedFit(*(x.to(dtype) for x in results))


def chernoff_rate(delta: float) -> float:
    r"""Rate of the matrix Chernoff bound on the smallest eigenvalue.

    .. math::
        c_\delta = \delta + (1 - \delta) \log(1 - \delta), \qquad
        \Pr\big( \lambda_{\min}(G) < 1 - \delta \big) \le m\, e^{-n c_\delta / K_w}

    for independent points, with ``K_w = m`` for the optimal weights.

    Args:
        delta: stability level, in (0, 1).

    Returns:
        In (0, 1), about ``delta^2 / 2`` for small ``delta``.

    Raises:
        ValueError: ``delta`` out of range.

    Example:
        >>> round(chernoff_rate(0.5), 4), round(chernoff_rate(0.9), 4)
        (0.1534, 0.6697)

    Source: arXiv:2312.14057, stability of independent sampling (standard).
    """
    check_range("delta", delta, above=0.0, below=1.0)
    if delta < 0.1:  # sum of delta^k / (k (k - 1)): the two terms cancel
        return sum(delta**k / (k * (k - 1)) for k in range(2, 20))
    return delta + (1 - delta) * math.log1p(-delta)


def required_samples(m: int, delta: float, eta: float) -> int:
    r"""Independent optimal points that make the fit stable with probability ``1 - eta``.

    .. math:: n = \Big\lceil \frac{m \log(m / \eta)}{c_\delta} \Big\rceil

    Determinantal and volume sampling are stable in practice with far fewer, ``2 m``.

    Args:
        m: dimension of the space, >= 1.
        delta: stability level, in (0, 1): ``lambda_min >= 1 - delta``.
        eta: probability of failure, in (0, 1).

    Returns:
        The number of points, at least ``m``.

    Raises:
        ValueError: a number out of range, or a ``delta`` or ``eta`` so small that the number of
            points overflows.

    Example:
        >>> required_samples(10, delta=0.9, eta=0.01), required_samples(10, delta=0.5, eta=0.01)
        (104, 451)

    Source: arXiv:2312.14057, stability of independent sampling (standard).
    """
    check_count("m", m)
    check_range("eta", eta, above=0.0, below=1.0)
    rate = chernoff_rate(delta)
    points = m * math.log(m / eta) / rate if rate > 0 else math.inf
    if points == math.inf:
        raise ValueError(
            f"m, delta and eta must ask for a finite number of points, got {m}, {delta}, {eta}"
        )
    return max(m, math.ceil(points))


def check_basis(basis: Tensor, measure: Tensor) -> tuple[Tensor, Tensor]:
    """Require a basis orthonormal for a law, and widen both."""
    check_floating(basis=basis, measure=measure)
    check_shape("basis", basis, (None, None))
    check_not_empty("basis", basis)
    check_shape("measure", measure, (basis.shape[0],))
    check_law("measure", measure)
    phi, mu = widen(basis), widen(measure)
    gram = phi.T @ (mu.unsqueeze(1) * phi)
    off = (gram.detach() - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max()
    eps = torch.finfo(basis.dtype).eps
    if not bool(off <= _ORTHONORMAL_TOLERANCE * eps**0.5):
        raise ValueError(
            f"basis must be orthonormal for measure, its Gram matrix is off by {off.item():.2g}; "
            "see orthonormal_basis"
        )
    return phi, mu
