r"""Random designs on candidate points: independent, projection DPP, volume-rescaled.

With the projection kernel :math:`K(x, y) = \varphi(x)^\top \varphi(y)` of an orthonormal basis,
points of a determinantal point process repel each other, so that ``m`` to ``2m`` of them give a
fit that is unbiased and quasi-optimal in expectation, where independent points need far more. All
samplers are exact. They look at all ``P`` candidates a few times only: ``O(P m^2)`` to check the
basis, then ``O(m^3 log m)`` a set. Results come in exchangeable order, with the weights that belong
in :func:`weighted_least_squares`.

Source: Nouy, Michel (2023), arXiv:2312.14057; laws standard, generalised to any weight.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from steelyard._checks import (
    check_count,
    check_floating,
    check_integer_dtype,
    check_range,
    check_same_shape,
    check_shape,
)
from steelyard.estimation._numbers import check_law, check_values, narrow_dtype, widen
from steelyard.estimation._projection_sampler import SPANNED, draw, projection_sets
from steelyard.estimation.least_squares import check_basis

__all__ = [
    "WeightedSample",
    "dpp_conditional",
    "projection_dpp_logprob",
    "sample_optimal_iid",
    "sample_projection_dpp",
    "sample_volume",
    "volume_logprob",
]


class WeightedSample(NamedTuple):
    """What the samplers return: rows of the candidates and their weights, both ``[n]``."""

    indices: Tensor
    weights: Tensor


def sample_optimal_iid(
    basis: Tensor, measure: Tensor, n: int, *, generator: torch.Generator | None = None
) -> WeightedSample:
    r"""Draw independent points from the optimal (Christoffel) density.

    .. math:: x_i \sim \nu = \frac{K(x, x)}{m} \mu, \qquad w = \frac{m}{K(x, x)}

    The empirical Gram matrix has mean ``I``; :func:`required_samples` says which ``n`` is enough.

    Args:
        basis: orthonormal on the candidates, ``[P, m]``.
        measure: their probabilities, ``[P]``.
        n: number of points, >= 1.
        generator: random numbers, on the device of ``basis``.

    Returns:
        ``indices`` and ``weights``.

    Raises:
        TypeError: not floating point.
        ValueError: wrong shapes, not a law, not orthonormal, or ``n < 1``.

    Example:
        >>> import torch
        >>> x = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
        >>> basis = (1.5**0.5 * x).unsqueeze(1)  # a line through 0: nothing to learn at 0
        >>> measure = torch.ones(3, dtype=torch.float64) / 3
        >>> random = torch.Generator().manual_seed(0)
        >>> sample = sample_optimal_iid(basis, measure, 1000, generator=random)
        >>> (sample.indices == 1).sum(), sample.weights.unique()
        (tensor(0), tensor([0.6667], dtype=torch.float64))

    Source: arXiv:2312.14057, independent sampling (standard).
    """
    phi, mu = check_basis(basis, measure)
    check_count("n", n)
    kernel = phi.square().sum(1)
    indices = draw(mu * kernel, n, generator)
    weights = phi.shape[1] / kernel[indices]
    return WeightedSample(indices, weights.to(narrow_dtype(basis, measure)))


def sample_projection_dpp(
    basis: Tensor,
    measure: Tensor,
    *,
    copies: int = 1,
    generator: torch.Generator | None = None,
) -> WeightedSample:
    r"""Draw ``m`` points that repel each other, or several such sets.

    .. math:: \Pr(x_1 .. x_m) = \frac{1}{m!} \det[\varphi_j(x_i)]^2 \prod_i \mu(x_i)

    Each point is marginally optimal, no point of a set repeats, and the fit is unbiased with
    :math:`\mathbb{E} \|f - \hat f\|^2 = (1 + m) \|f - P f\|^2` (at most that on candidates with
    vanishing determinants). One set leaves ``lambda_min`` often small; two are stable in practice.

    Args:
        basis: orthonormal on the candidates, ``[P, m]``.
        measure: their probabilities, ``[P]``.
        copies: independent sets, >= 1; drawn side by side.
        generator: random numbers, on the device of ``basis``.

    Returns:
        ``indices`` and the optimal ``weights``, ``copies * m`` of each; with several copies the
        whole is shuffled.

    Raises:
        TypeError: not floating point.
        ValueError: wrong shapes, not a law, not orthonormal, or ``copies < 1``.

    Example:
        Cubics on 50 points: four points, well apart every time.

        >>> import torch
        >>> from steelyard.estimation import orthonormal_basis
        >>> x = torch.linspace(-1, 1, 50, dtype=torch.float64)
        >>> measure = torch.full_like(x, 1 / 50)
        >>> basis = orthonormal_basis(x.unsqueeze(1) ** torch.arange(4), measure)
        >>> random = torch.Generator().manual_seed(0)
        >>> for _ in range(3):
        ...     sample_projection_dpp(basis, measure, generator=random).indices.sort().values
        tensor([ 3, 21, 39, 49])
        tensor([ 0,  2, 30, 41])
        tensor([ 2, 24, 27, 45])

    Source: arXiv:2312.14057, projection DPP (standard) and its repetition.
    """
    phi, mu = check_basis(basis, measure)
    check_count("copies", copies)
    indices = projection_sets(phi, mu, copies, generator).flatten()
    if copies > 1:
        indices = _shuffled(indices, generator)
    weights = phi.shape[1] / phi[indices].square().sum(1)
    return WeightedSample(indices, weights.to(narrow_dtype(basis, measure)))


def sample_volume(
    basis: Tensor,
    measure: Tensor,
    n: int,
    *,
    weights: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> WeightedSample:
    r"""Draw ``n >= m`` points with probability rescaled by the volume they span.

    .. math:: \gamma_n(x) = \frac{(n - m)!\, n^m}{n!} \det G(x) \prod_i \nu(x_i), \qquad
        \nu = \mu / w

    That is: ``m`` points of the projection DPP, whatever ``w``, ``n - m`` independent points from
    ``nu``, and a shuffle. The weighted fit is unbiased for every ``w`` and ``n``, and
    :math:`\mathbb{E} \|f - \hat f\|^2 \le (1 + m) \|f - P f\|^2`.

    Args:
        basis: orthonormal on the candidates, ``[P, m]``.
        measure: their probabilities, ``[P]``.
        n: number of points, at least ``m``; ``2 m`` is a good choice.
        weights: positive ``w`` of the candidates with ``sum(measure / w) = 1``, ``[P]``; ``None`` =
            optimal, ``m / K(x, x)``.
        generator: random numbers, on the device of ``basis``.

    Returns:
        ``indices`` and ``weights`` of the points; both the sampling and the fit must use them.

    Raises:
        TypeError: not floating point.
        ValueError: wrong shapes, not a law, not orthonormal, ``n < m``, or weights whose
            ``measure / weights`` is no law.

    Example:
        Any function of the space is found exactly:

        >>> import torch
        >>> from steelyard.estimation import orthonormal_basis, weighted_least_squares
        >>> x = torch.linspace(-1, 1, 50, dtype=torch.float64)
        >>> measure = torch.full_like(x, 1 / 50)
        >>> basis = orthonormal_basis(x.unsqueeze(1) ** torch.arange(3), measure)
        >>> random = torch.Generator().manual_seed(0)
        >>> points, weights = sample_volume(basis, measure, 6, generator=random)
        >>> f = x**2 - x
        >>> fit = weighted_least_squares(basis[points], f[points], weights)
        >>> print(f"{(basis @ fit.coef - f).abs().max():.6f}")
        0.000000

    Source: arXiv:2312.14057, generalised volume sampling.
    """
    phi, mu = check_basis(basis, measure)
    m = phi.shape[1]
    check_range("n", n, at_least=m)
    w, nu = _design(phi, mu, weights)
    repelling = projection_sets(phi, mu, 1, generator)[0]
    independent = draw(nu, n - m, generator)
    indices = _shuffled(torch.cat([repelling, independent]), generator)
    return WeightedSample(indices, w[indices].to(narrow_dtype(basis, measure, *_given(weights))))


def projection_dpp_logprob(basis: Tensor, measure: Tensor, indices: Tensor) -> Tensor:
    r"""Log-probability of an ordered tuple under :func:`sample_projection_dpp`.

    .. math:: 2 \log |\det[\varphi_j(x_i)]| - \log m! + \sum_i \log \mu(x_i)

    Args:
        basis: orthonormal on the candidates, ``[P, m]``.
        measure: their probabilities, ``[P]``.
        indices: integer candidates, ``[.., m]``.

    Returns:
        ``[..]``; minus infinity where an index repeats.

    Raises:
        TypeError: wrong dtypes.
        ValueError: wrong shapes, not a law, not orthonormal, or an index out of range.

    Example:
        >>> import torch
        >>> basis = torch.eye(3, dtype=torch.float64)[:, :2] * 3**0.5  # only 0 and 1 matter
        >>> measure = torch.ones(3, dtype=torch.float64) / 3
        >>> pairs = torch.tensor([[0, 1], [1, 0], [0, 0], [0, 2]])
        >>> projection_dpp_logprob(basis, measure, pairs).exp()
        tensor([0.5000, 0.5000, 0.0000, 0.0000], dtype=torch.float64)

    Source: arXiv:2312.14057, projection DPP (standard).
    """
    phi, mu = check_basis(basis, measure)
    m = phi.shape[1]
    _check_indices(indices, len(phi))
    if indices.shape[-1] != m:
        raise ValueError(f"indices must have shape [.., {m}], got {list(indices.shape)}")
    volume = 2 * torch.linalg.slogdet(phi[indices]).logabsdet
    logprob = volume - math.lgamma(m + 1) + mu.log()[indices].sum(-1)
    logprob = torch.where(_distinct(indices) == m, logprob, -torch.inf)
    return logprob.to(narrow_dtype(basis, measure))


def volume_logprob(
    basis: Tensor, measure: Tensor, indices: Tensor, *, weights: Tensor | None = None
) -> Tensor:
    r"""Log-probability of an ordered tuple under :func:`sample_volume`.

    .. math:: \log \frac{(n - m)!\, n^m}{n!} + \log \det G(x) + \sum_i \log \nu(x_i)

    Args:
        basis: orthonormal on the candidates, ``[P, m]``.
        measure: their probabilities, ``[P]``.
        indices: integer candidates, ``[.., n]`` with ``n >= m``.
        weights: ``w`` of the candidates, ``[P]``; ``None`` = optimal.

    Returns:
        ``[..]``; minus infinity where fewer than ``m`` candidates are distinct.

    Raises:
        TypeError: wrong dtypes.
        ValueError: wrong shapes, not a law, not orthonormal, an index out of range, or weights
            whose ``measure / weights`` is no law.

    Example:
        In one dimension, constants: nothing to span, so the points are independent.

        >>> import torch
        >>> basis = torch.ones(2, 1, dtype=torch.float64)
        >>> measure = torch.tensor([0.25, 0.75], dtype=torch.float64)
        >>> volume_logprob(basis, measure, torch.tensor([[0, 0], [0, 1], [1, 1]])).exp()
        tensor([0.0625, 0.1875, 0.5625], dtype=torch.float64)

    Source: arXiv:2312.14057, generalised volume sampling.
    """
    phi, mu = check_basis(basis, measure)
    m = phi.shape[1]
    _check_indices(indices, len(phi))
    n = indices.shape[-1]
    check_range("indices.shape[-1]", n, at_least=m)
    w, nu = _design(phi, mu, weights)
    # a candidate of probability 0 may have weight infinity; its tuple has probability 0 anyway
    root = torch.where(nu > 0, w / n, 0.0).sqrt()
    factor = torch.linalg.qr((root.unsqueeze(1) * phi)[indices]).R
    log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
    constant = math.lgamma(n - m + 1) + m * math.log(n) - math.lgamma(n + 1)
    logprob = constant + log_det + nu.log()[indices].sum(-1)
    logprob = torch.where(_distinct(indices) >= m, logprob, -torch.inf)
    return logprob.to(narrow_dtype(basis, measure, *_given(weights)))


def dpp_conditional(basis: Tensor, chosen: Tensor) -> Tensor:
    r"""Density of the next point of a projection DPP, given the points chosen so far.

    .. math:: x \mapsto \frac{\|\varphi(x)\|^2 - \|Q^\top \varphi(x)\|^2}{m - k}

    with ``Q`` an orthonormal basis of the span of the ``k`` chosen rows, taken with respect to the
    measure the basis is orthonormal for.

    Args:
        basis: orthonormal on the candidates, ``[P, m]``.
        chosen: rows of the basis at the chosen points, ``[k, m]`` with ``0 <= k < m``.

    Returns:
        ``[P]``, >= 0; multiplied by the measure it sums to 1. 0 at the chosen points.

    Raises:
        TypeError: not floating point.
        ValueError: wrong shapes, ``k >= m``, or linearly dependent rows.

    Example:
        >>> import torch
        >>> x = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
        >>> basis = torch.stack([x**0, 1.5**0.5 * x], 1)
        >>> dpp_conditional(basis, basis[:0])
        tensor([1.2500, 0.5000, 1.2500], dtype=torch.float64)
        >>> dpp_conditional(basis, basis[:1])  # after the left end
        tensor([0.0000, 0.6000, 2.4000], dtype=torch.float64)

    Source: arXiv:2312.14057, sequential rule (standard).
    """
    check_floating(basis=basis, chosen=chosen)
    check_shape("basis", basis, (None, None))
    check_shape("chosen", chosen, (None, basis.shape[1]))
    phi, (k, m) = widen(basis), chosen.shape
    if k >= m:
        raise ValueError(f"chosen must have fewer than {m} rows, got {k}")
    kernel = phi.square().sum(1)
    rows = widen(chosen)
    q, r = torch.linalg.qr(rows.T)
    lengths = rows.square().sum(1)
    if bool((r.diagonal().square() <= SPANNED * lengths).any()):
        raise ValueError("chosen must have linearly independent rows")
    rest = kernel - (phi @ q).square().sum(1)
    rest = torch.where(rest <= SPANNED * kernel, 0.0, rest)  # a NaN stays
    return (rest / (m - k)).to(narrow_dtype(basis, chosen))


def _shuffled(indices: Tensor, generator: torch.Generator | None) -> Tensor:
    order = torch.randperm(len(indices), generator=generator, device=indices.device)
    return indices[order]


def _design(phi: Tensor, mu: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the weights and sampling probabilities of the candidates."""
    if weights is None:
        kernel = phi.square().sum(1)
        return phi.shape[1] / kernel, mu * kernel / phi.shape[1]
    check_floating(weights=weights)
    check_same_shape(measure=mu, weights=weights)
    check_values("weights", weights, above=0.0, at_least=0.0)
    nu = mu / widen(weights)
    check_law("measure / weights", nu.to(weights.dtype))
    return widen(weights), nu


def _given(weights: Tensor | None) -> tuple[Tensor, ...]:
    return () if weights is None else (weights,)


def _check_indices(indices: Tensor, candidates: int) -> None:
    check_integer_dtype(indices=indices)
    if indices.dtype not in (torch.int32, torch.int64):  # uint8 would be a mask
        raise TypeError(f"indices must have the dtype int32 or int64, got {indices.dtype}")
    if indices.dim() == 0:
        raise ValueError("indices must have at least one dimension, got shape []")
    outside = indices[(indices < 0) | (indices >= candidates)]
    if outside.numel():
        raise ValueError(f"indices must be in [0, {candidates}), got {int(outside.flatten()[0])}")


def _distinct(indices: Tensor) -> Tensor:
    """Number of distinct indices in each tuple."""
    ordered = indices.sort(-1).values
    return 1 + (ordered[..., 1:] != ordered[..., :-1]).sum(-1)
