r"""Distance covariance: dependence of variables of any dimension, zero only under independence.

With ``a_ij = |x_i - x_j|`` and ``b_ij = |y_i - y_j|`` (Euclidean), the squared distance covariance
is the mean product of the two centred distance matrices. Everything here is differentiable;
coincident items take the subgradient 0.

Cost: two scalar variables O(N log N) time and O(N) memory, gradient included; a scalar and a
constant variable of m distinct rows (one-hot attributes) O(N log N + N m) and O(N); the rest
O(N^2) time and O(N * block) memory, forward and backward. Sums are taken in float64 whatever the
input dtype. NaN or infinity in any item gives NaN.

Sources: Szekely, Rizzo and Bakirov (2007), arXiv:0803.4101; Szekely and Rizzo (2014),
arXiv:1310.2926; Chakraborty and Zhang (2019); Lee et al. (2025), arXiv:2509.08163.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from steelyard._checks import check_floating, check_range
from steelyard._reduce import accumulation_dtype
from steelyard.divergences import _concordance
from steelyard.divergences._blocks import block_rows
from steelyard.divergences._pair_blocks import distances, joint_sum, pair_sums, row_sums

__all__ = [
    "IndependenceTest",
    "concatenated_distance_covariance",
    "distance_correlation",
    "distance_correlation_test",
    "distance_covariance",
    "joint_distance_covariance",
    "u_centred_distances",
]

_MIN_UNBIASED = 4
# A constant variable with at most this many distinct rows is treated as categorical.
_MAX_LEVELS = 256


class IndependenceTest(NamedTuple):
    """Result of :func:`distance_correlation_test`."""

    statistic: Tensor
    p_value: Tensor


class _Sums(NamedTuple):
    product: Tensor  # sum_ij a_ij b_ij
    x_rows: Tensor  # sum_j a_ij, [N]
    y_rows: Tensor


def distance_covariance(
    x: Tensor, y: Tensor, *, unbiased: bool = True, block_size: int | None = None
) -> Tensor:
    r"""Squared distance covariance of two variables.

    .. math::
        \mathrm{dCov}^2_u = \frac{1}{N(N-3)} \sum_{ij} \tilde A_{ij} \tilde B_{ij}, \qquad
        \mathrm{dCov}^2_v = \frac{1}{N^2} \sum_{ij} A_{ij} B_{ij}

    with the U-centred (:func:`u_centred_distances`) or doubly centred distances. The unbiased form
    has mean 0 under independence and may be negative: do not clamp it in a loss. The plug-in form
    is non-negative and biased upwards by O(1/N). Nothing is detached.

    Args:
        x: shape ``[N]`` or ``[N, D]``.
        y: shape ``[N]`` or ``[N, K]``; one-hot rows for a category.
        unbiased: the unbiased form (default) or the plug-in form.
        block_size: rows of distances held at once, where the cost is quadratic; ``None`` picks
            about half a million distances, at least 16 rows.

    Returns:
        0-d tensor in the wider of the two dtypes, in units of x times units of y.

    Raises:
        ValueError: shapes do not fit, fewer than 4 items (unbiased) or none (plug-in).
        TypeError: a tensor is not floating point.

    Example:
        A dependence without any correlation:

        >>> x = torch.arange(-10.0, 11.0)
        >>> y = x.square()
        >>> round((x * (y - y.mean())).mean().item(), 3), round(distance_covariance(x, y).item(), 3)
        (-0.0, 12.829)

    Source: Szekely and Rizzo (2014), Eq. 2.6, arXiv:1310.2926.
    """
    return _estimate(x, y, unbiased, block_size).to(torch.promote_types(x.dtype, y.dtype))


def distance_correlation(x: Tensor, y: Tensor, *, block_size: int | None = None) -> Tensor:
    r"""Bias-corrected (squared) distance correlation, 0 in the mean under independence.

    .. math::
        \mathrm{dCor} = \mathrm{dCov}^2_u(x, y) /
        \sqrt{\mathrm{dCov}^2_u(x, x)\, \mathrm{dCov}^2_u(y, y)}

    Args:
        x: shape ``[N]`` or ``[N, D]``.
        y: shape ``[N]`` or ``[N, K]``.
        block_size: see :func:`distance_covariance`.

    Returns:
        0-d tensor in [-1, 1]; 1 for similar samples (shift, rotation, scale); 0, with a zero
        gradient, when a variable is constant.

    Raises:
        ValueError: shapes do not fit or fewer than 4 items.
        TypeError: a tensor is not floating point.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [3.0, 1.0], [1.0, 1.0]])
        >>> round(distance_correlation(x, 3 - 2 * x.flip(1)).item(), 4)
        1.0

    Source: Szekely and Rizzo (2014), Eq. 2.8, arXiv:1310.2926.
    """
    return _correlation(x, y, block_size).to(torch.promote_types(x.dtype, y.dtype))


def distance_correlation_test(
    x: Tensor, y: Tensor, *, block_size: int | None = None
) -> IndependenceTest:
    r"""Chi-square test of independence, without permutations.

    .. math:: T = N\, \mathrm{dCor} + 1, \qquad p = P(\chi^2_1 > T)

    The test is conservative: at levels up to 0.05 its false-alarm rate is at most the level.

    Args:
        x: shape ``[N]`` or ``[N, D]``.
        y: shape ``[N]`` or ``[N, K]``.
        block_size: see :func:`distance_covariance`.

    Returns:
        ``(statistic, p_value)``, 0-d tensors; the p-value is 1 where the statistic is negative.

    Raises:
        ValueError: shapes do not fit or fewer than 4 items.
        TypeError: a tensor is not floating point.

    Example:
        >>> x = torch.linspace(-1, 1, 50)
        >>> statistic, p_value = distance_correlation_test(x, x.square())
        >>> bool(p_value < 0.05)
        True

    Source: Shen, Panda and Vogelstein (2022), arXiv:1912.12150.
    """
    check_floating(x=x, y=y)
    statistic = x.shape[0] * _correlation(x, y, block_size) + 1
    p_value = torch.special.erfc((statistic.clamp(min=0) / 2).sqrt())
    dtype = torch.promote_types(x.dtype, y.dtype)
    return IndependenceTest(statistic.to(dtype), p_value.to(dtype))


def concatenated_distance_covariance(
    x: Tensor,
    attributes: Sequence[Tensor],
    *,
    unbiased: bool = True,
    block_size: int | None = None,
) -> Tensor:
    r"""Squared distance covariance of ``x`` with all attributes as one vector.

    .. math:: \mathrm{CCdCov}(x; S_1, \dots, S_d) = \mathrm{dCov}^2(x, [S_1, \dots, S_d])

    Zero in the population iff ``x`` is independent of every *combination* of attributes: the
    marginal covariances can all be 0 when this one is not.

    Args:
        x: shape ``[N]`` or ``[N, D]``.
        attributes: one or more of shape ``[N]`` or ``[N, K_k]``.
        unbiased: see :func:`distance_covariance`.
        block_size: see :func:`distance_covariance`.

    Returns:
        0-d tensor in the widest dtype given.

    Raises:
        ValueError: no attribute, shapes do not fit, too few items.
        TypeError: a tensor is not floating point.

    Example:
        Two fair bits and their exclusive or: no marginal sees it.

        >>> s1, s2 = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])
        >>> x = (s1 != s2).double()
        >>> distance_covariance(x, s1, unbiased=False).item()
        0.0
        >>> round(concatenated_distance_covariance(x, [s1, s2], unbiased=False).item(), 4)
        0.0732

    Source: Lee et al. (2025), arXiv:2509.08163.
    """
    if not hasattr(attributes, "__len__"):
        raise TypeError(f"attributes must be a list of tensors, got {type(attributes).__name__}")
    if len(attributes) == 0:
        raise ValueError("attributes must hold at least one tensor, got none")
    columns = _columns(x=x, **{f"attributes[{k}]": s for k, s in enumerate(attributes)})[1:]
    dtype = attributes[0].dtype
    for column in columns:
        dtype = torch.promote_types(dtype, column.dtype)
    y = torch.cat([column.to(dtype) for column in columns], 1)
    return distance_covariance(x, y, unbiased=unbiased, block_size=block_size)


def joint_distance_covariance(
    *variables: Tensor, c: float = 1.0, unbiased: bool = True, block_size: int | None = None
) -> Tensor:
    r"""Squared joint distance covariance of several variables.

    .. math::
        \mathrm{JdCov}^2 = E \prod_k (U_k + c) - c^d
        = \sum_{|S| \ge 2} c^{d - |S|}\, E \prod_{k \in S} U_k

    with ``U_k`` the centred distances, minus sign as in :func:`u_centred_distances`. The unbiased
    form divides the sum over all pairs (diagonal included, where U is 0) by ``N (N - 3)``, the
    plug-in form by ``N^2``. With two variables it is :func:`distance_covariance` for every ``c``.
    Terms of three and more variables may be negative. Nothing is detached.

    Args:
        variables: two or more of shape ``[N]`` or ``[N, D_k]``.
        c: offset, finite; larger weighs pairs of variables more against larger sets.
        unbiased: see :func:`distance_covariance`.
        block_size: see :func:`distance_covariance`.

    Returns:
        0-d tensor in the widest dtype given.

    Raises:
        ValueError: fewer than two variables, shapes do not fit, too few items, ``c`` not finite.
        TypeError: a tensor is not floating point.

    Example:
        Three bits, pairwise independent and jointly not:

        >>> s1, s2 = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])
        >>> joint_distance_covariance((s1 != s2).float(), s1, s2, unbiased=False).item()
        0.125

    Source: Chakraborty and Zhang (2019), JASA; Lee et al. (2025), arXiv:2509.08163.
    """
    if len(variables) < 2:
        raise ValueError(f"variables must be two or more tensors, got {len(variables)}")
    check_range("c", c, above=-math.inf, below=math.inf)
    if len(variables) == 2:
        return distance_covariance(*variables, unbiased=unbiased, block_size=block_size)
    columns = _columns(**{f"variables[{k}]": v for k, v in enumerate(variables)})
    n = _count("variables", columns[0], unbiased)
    block = block_rows(n, block_size)
    dtype = columns[0].dtype
    for column in columns:
        dtype = torch.promote_types(dtype, column.dtype)
    work = [_centred(column, accumulation_dtype(dtype)) for column in columns]
    rows = [_rows(column, block) for column in work]
    total = joint_sum(work, rows, c=c, unbiased=unbiased, block=block)
    return (total / (n * (n - 3) if unbiased else n * n)).to(dtype)


def u_centred_distances(x: Tensor) -> Tensor:
    r"""U-centred distance matrix, with the sign of the centred kernel.

    .. math::
        \tilde A_{ij} = \frac{a_{i\cdot} + a_{\cdot j}}{N-2} - a_{ij}
        - \frac{a_{\cdot\cdot}}{(N-1)(N-2)} \quad (i \ne j), \qquad \tilde A_{ii} = 0

    This is minus the usual sign: products of two matrices do not notice, products of three do.
    It holds the whole matrix; the other functions of this module do not.

    Args:
        x: shape ``[N]`` or ``[N, D]``, ``N >= 4``.

    Returns:
        Shape ``[N, N]``, symmetric, rows of sum 0, in the dtype of ``x``.

    Raises:
        ValueError: ``x`` has another shape or fewer than 4 items.
        TypeError: ``x`` is not floating point.

    Example:
        >>> centred = u_centred_distances(torch.tensor([0.0, 1.0, 3.0, 7.0]))
        >>> centred.sum(0).abs().max().item() < 1e-6, centred.diagonal().tolist()
        (True, [0.0, 0.0, 0.0, 0.0])

    Source: Szekely and Rizzo (2014), Eq. 2.4, arXiv:1310.2926 (opposite sign).
    """
    (column,) = _columns(x=x)
    n = _count("x", column, unbiased=True)
    column = _centred(column, accumulation_dtype(x.dtype))
    a = distances(column, column)
    row = a.sum(1) / (n - 2)
    centred = row[:, None] + row - a - row.sum() / (n - 1)
    return centred.masked_fill(torch.eye(n, dtype=torch.bool, device=x.device), 0.0).to(x.dtype)


def _estimate(x: Tensor, y: Tensor, unbiased: bool, block_size: int | None) -> Tensor:
    x_column, y_column = _columns(x=x, y=y)
    n = _count("x", x_column, unbiased)
    return _covariance(_sums(x_column, y_column, block_rows(n, block_size)), n, unbiased)


def _correlation(x: Tensor, y: Tensor, block_size: int | None) -> Tensor:
    x_column, y_column = _columns(x=x, y=y)
    n = _count("x", x_column, unbiased=True)
    sums = _sums(x_column, y_column, block_rows(n, block_size))
    covariance = _covariance(sums, n, unbiased=True)
    variance = _variance(x_column, sums.x_rows) * _variance(y_column, sums.y_rows)
    constant = variance <= 0
    return torch.where(constant, 0.0, covariance / torch.where(constant, 1.0, variance).sqrt())


def _covariance(sums: _Sums, n: int, unbiased: bool) -> Tensor:
    product, x_rows, y_rows = sums
    mixed, total = x_rows @ y_rows, x_rows.sum() * y_rows.sum()
    if unbiased:
        return (product - 2 * mixed / (n - 2) + total / ((n - 1) * (n - 2))) / (n * (n - 3))
    return product / n**2 - 2 * mixed / n**3 + total / n**4


def _variance(x: Tensor, rows: Tensor) -> Tensor:
    # squared distances add up in closed form: no second pass over the pairs
    n = x.shape[0]
    centred = _centred(x, torch.float64)
    squares = 2 * n * centred.square().sum() - 2 * centred.sum(0).square().sum()
    return _covariance(_Sums(squares, rows, rows), n, unbiased=True)


def _sums(x: Tensor, y: Tensor, block: int) -> _Sums:
    if x.shape[1] == 1 and y.shape[1] == 1:
        return _scalar_sums(x[:, 0], y[:, 0])
    for scalar, other in ((x, y), (y, x)):
        levels = _levels(other) if scalar.shape[1] == 1 else None
        if levels is not None:
            sums = _categorical_sums(scalar[:, 0], *levels)
            return sums if scalar is x else _Sums(sums.product, sums.y_rows, sums.x_rows)
    work = accumulation_dtype(torch.promote_types(x.dtype, y.dtype))
    return _Sums(*pair_sums(_centred(x, work), _centred(y, work), block))


def _scalar_sums(x: Tensor, y: Tensor) -> _Sums:
    x, y = _centred(x, torch.float64), _centred(y, torch.float64)
    pair = _concordance.sort_pair(x, y)
    return _Sums(
        _concordance.distance_product(x, y, pair),
        _concordance.distance_sums(x, pair.by_x),
        _concordance.distance_sums(y, pair.by_y),
    )


def _categorical_sums(x: Tensor, levels: Tensor, level: Tensor) -> _Sums:
    # sum_ij |x_i - x_j| b_ij = 2 sum_i x_i w_i with w_i = sum_j sign(x_i - x_j) b_ij; a level adds
    # its distance times (its members below x_i - those above).
    x, levels = _centred(x, torch.float64), levels.double()
    b = distances(levels, levels)
    order = _concordance.sort_with_ties(x)
    level_by_x = level.gather(0, order.items)
    weight = torch.zeros_like(x)
    for k in range(len(levels)):
        members = torch.nn.functional.pad((level_by_x == k).cumsum(0), (1, 0))
        signed = members.gather(0, order.first) + members.gather(0, order.end) - members[-1]
        weight += b[k].gather(0, level_by_x) * signed
    counts = torch.bincount(level, minlength=len(levels)).to(b.dtype)
    product = 2 * (x.gather(0, order.items) * weight).sum()
    return _Sums(product, _concordance.distance_sums(x, order), (b @ counts).gather(0, level))


def _levels(y: Tensor) -> tuple[Tensor, Tensor] | None:
    # distinct rows and the row of each item, if y is constant and they are few
    if y.requires_grad or torch.compiler.is_compiling():
        return None
    if len(torch.unique(y[: 2 * _MAX_LEVELS], dim=0)) > _MAX_LEVELS:
        return None
    levels, level = torch.unique(y, dim=0, return_inverse=True)
    return (levels, level) if len(levels) <= _MAX_LEVELS else None


def _rows(x: Tensor, block: int) -> Tensor:
    if x.shape[1] != 1:
        return row_sums(x, block)
    scalar = x[:, 0].double()
    return _concordance.distance_sums(scalar, _concordance.sort_with_ties(scalar))


def _centred(x: Tensor, dtype: torch.dtype) -> Tensor:
    # distances do not notice, rounding does
    return x.to(dtype) - x.detach().to(torch.float64).mean(0).to(dtype)


def _columns(**variables: Tensor) -> list[Tensor]:
    # every variable as [N, D]
    check_floating(**variables)
    columns: list[Tensor] = []
    for name, variable in variables.items():
        if variable.dim() not in {1, 2} or 0 in variable.shape[1:]:
            raise ValueError(f"{name} must have shape [N] or [N, D], got {list(variable.shape)}")
        if columns and variable.shape[0] != columns[0].shape[0]:
            raise ValueError(
                f"{name} must have N = {columns[0].shape[0]} items like {next(iter(variables))}, "
                f"got shape {list(variable.shape)}"
            )
        columns.append(variable[:, None] if variable.dim() == 1 else variable)
    return columns


def _count(name: str, column: Tensor, unbiased: bool) -> int:
    n, least = column.shape[0], _MIN_UNBIASED if unbiased else 1
    if n < least:
        form = "unbiased" if unbiased else "plug-in"
        raise ValueError(
            f"{name} is too short: the {form} form needs N >= {least} items, got N = {n}"
        )
    return n
