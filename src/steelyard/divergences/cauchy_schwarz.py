r"""Cauchy-Schwarz divergences, and the kernel statistics made of the same three means.

.. math:: D(p; q) = \log \int p^2 + \log \int q^2 - 2 \log \int p q \ge 0,

the *squared form*, in nats; the half form of some papers is one half of it. It is symmetric, is 0
only for ``p = q`` and needs no ratio ``p/q``: disjoint supports give a large number, not infinity.
On samples the integrals become means ``a, b, c`` of the Gaussian kernel
``exp(-d^2 / (2 bandwidth^2))``; the divergence is ``log a + log b - 2 log c`` where MMD and HSIC
are ``a + b - 2c``. All three keep the pairs of an item with itself.

Everything is computed in log space, so that nothing underflows at any distance, and a block of
rows at a time: memory is ``O(N * block)`` in the forward and in the backward pass, time
``O(N^2)``. Gradients reach every sample, and a bandwidth that is a tensor. Blocks have the dtype
of the input (float32 for half precision); exponents and sums are float64 where the device has it.
Statistics of a batch depend on its size: gather samples across ranks before calling.

Sources: Yu et al. (2024), arXiv:2404.17951; Gretton et al. (2005, 2012) for HSIC and MMD.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from steelyard._checks import (
    check_choice,
    check_count,
    check_floating,
    check_not_empty,
    check_range,
    check_same_shape,
    check_shape,
)
from steelyard._reduce import accumulation_dtype
from steelyard.divergences._kernel_sums import log_cross_sums, log_self_sums, wide_dtype

Bandwidth = float | Tensor

# I(x;x) below this many roundings is taken for 0: all items are equal as far as the kernel sees.
_DEGENERATE_ROUNDINGS = 64


def cauchy_schwarz_divergence(
    x: Tensor, y: Tensor, bandwidth: Bandwidth, *, block_size: int | None = None
) -> Tensor:
    r"""Cauchy-Schwarz divergence of the laws behind two samples.

    .. math::
        D = \log \frac{1}{M^2} \sum_{ij} k(x_i, x_j) + \log \frac{1}{N^2} \sum_{ij} k(y_i, y_j)
            - 2 \log \frac{1}{MN} \sum_{ij} k(x_i, y_j)

    It is exactly the divergence of the two kernel density estimates of width
    ``bandwidth / sqrt(2)``, and ``-2 log cos`` of the angle between the mean embeddings.

    Args:
        x: sample of ``p``, shape ``[M, D]``.
        y: sample of ``q``, shape ``[N, D]``.
        bandwidth: of the kernel ``exp(-d^2 / (2 bandwidth^2))``, a positive float or 0-d tensor.
        block_size: rows a block; ``None`` = about half a million pairs.

    Returns:
        0-d tensor in nats, non-negative up to rounding, 0 for equal multisets; dtype of the
        inputs.

    Raises:
        TypeError: a sample is not a floating tensor, or ``bandwidth`` is not a number.
        ValueError: a sample is empty or not 2-D, widths differ, or ``bandwidth <= 0``.

    Example:
        Two samples 10,000 bandwidths apart still have a value and a gradient, which pulls them
        together; the squared MMD has saturated.

        >>> x, y = torch.zeros(2, 1, requires_grad=True), torch.full((3, 1), 1e4)
        >>> divergence = cauchy_schwarz_divergence(x, y, bandwidth=1.0)
        >>> divergence.item()
        100000000.0
        >>> torch.autograd.grad(divergence, x)[0].T
        tensor([[-10000., -10000.]])
        >>> far = mmd_squared(x, y, bandwidth=1.0)
        >>> far.item(), torch.autograd.grad(far, x)[0].T
        (2.0, tensor([[0., 0.]]))

    Source: Principe (2010), *Information Theoretic Learning*; Yu et al. (2024), arXiv:2404.17951.
    """
    log_a, log_b, log_c = _two_sample_means(x, y, bandwidth, block_size)
    return (log_a + log_b - 2 * log_c).to(_dtype(x, y))


def mmd_squared(
    x: Tensor, y: Tensor, bandwidth: Bandwidth, *, block_size: int | None = None
) -> Tensor:
    r"""Squared maximum mean discrepancy of two samples (biased: self pairs are kept).

    .. math::
        \mathrm{MMD}^2 = \Big\| \frac1M \sum_i \phi(x_i) - \frac1N \sum_j \phi(y_j) \Big\|^2
            = a + b - 2c

    with the three means of :func:`cauchy_schwarz_divergence`. It is bounded by 2 and flat where
    the samples do not overlap.

    Args:
        x: shape ``[M, D]``.
        y: shape ``[N, D]``.
        bandwidth: of the kernel ``exp(-d^2 / (2 bandwidth^2))``, a positive float or 0-d tensor.
        block_size: rows a block; ``None`` = about half a million pairs.

    Returns:
        0-d tensor, non-negative up to rounding; dtype of the inputs.

    Raises:
        TypeError: a sample is not a floating tensor, or ``bandwidth`` is not a number.
        ValueError: a sample is empty or not 2-D, widths differ, or ``bandwidth <= 0``.

    Example:
        Two points at distance ``d``: ``2 (1 - exp(-d^2/2))``.

        >>> x = torch.zeros(1, 1)
        >>> [round(mmd_squared(x, x + d, bandwidth=1.0).item(), 4) for d in (0.0, 1.0, 100.0)]
        [0.0, 0.7869, 2.0]

    Source: Gretton et al. (2012), *A Kernel Two-Sample Test*, Eq. 5.
    """
    a, b, c = (mean.exp() for mean in _two_sample_means(x, y, bandwidth, block_size))
    return (a + b - 2 * c).to(_dtype(x, y))


def conditional_cauchy_schwarz(
    x: Tensor,
    y: Tensor,
    y_hat: Tensor,
    bandwidth_x: Bandwidth,
    bandwidth_y: Bandwidth,
    *,
    denominator: Literal["text", "reference"] = "text",
    block_size: int | None = None,
) -> Tensor:
    r"""Divergence of the conditional laws ``p(y|x)`` and ``q(y_hat|x)``: a robust regression loss.

    .. math::
        D = \log A + \log B - 2 \log C, \qquad
        A = \sum_j \frac{\sum_i K_{ji} L_{ji}}{(\sum_i K_{ji})^2}

    with ``K`` the kernel of ``x`` and ``L`` that of ``y`` with ``y`` in ``A``, of ``y_hat`` with
    ``y_hat`` in ``B``, of ``y_hat_j`` with ``y_i`` in ``C``. A narrow ``bandwidth_x`` gives the
    correntropy (Welsch) loss ``-2 log mean k(y_hat_j, y_j)``, whose small-residual limit is the
    mean squared error; a wide one compares ``y`` and ``y_hat`` as unpaired samples.

    The sums are no inner products, so the value can be slightly negative; it is not clamped.

    Args:
        x: inputs, shape ``[N, D]``; pass ``x.detach()`` unless it is attacked or learned.
        y: targets, shape ``[N, K]``.
        y_hat: predictions, shape ``[N, K]``.
        bandwidth_x: of the kernel of ``x``, a positive float or 0-d tensor. In standardised data
            of many dimensions scale it with ``sqrt(D)`` or take :func:`median_bandwidth`.
        bandwidth_y: of the kernel of ``y``, likewise.
        denominator: ``"text"`` (default) divides by ``(sum_i K_ji)^2`` as derived,
            ``"reference"`` by ``sum_i K_ji^2`` as the released code does.
        block_size: rows a block; ``None`` = about half a million pairs.

    Returns:
        0-d tensor in nats (the released code uses bits); 0 for ``y_hat = y``; dtype of the inputs.

    Raises:
        TypeError: a sample is not a floating tensor, or a bandwidth is not a number.
        ValueError: shapes do not fit or are empty (1-D tensors are refused: ``[N]`` could be one
            item or ``N``), a bandwidth is not positive, or ``denominator`` is unknown.

    Example:
        A wild label pulls the squared error without bound, this loss not at all:

        >>> x = torch.arange(4.0).unsqueeze(1)
        >>> y = torch.tensor([[0.0], [0.0], [0.0], [1000.0]])
        >>> y_hat = torch.full((4, 1), 0.1, requires_grad=True)
        >>> loss = conditional_cauchy_schwarz(x, y, y_hat, bandwidth_x=0.1, bandwidth_y=1.0)
        >>> torch.autograd.grad(loss, y_hat)[0].T.round(decimals=4)
        tensor([[0.0667, 0.0667, 0.0667, 0.0000]])

    Source: Yu et al. (2024), Proposition 1, arXiv:2404.17951.
    """
    check_floating(x=x, y=y, y_hat=y_hat)
    check_shape("x", x, (None, None))
    check_shape("y", y, (x.shape[0], None))
    check_same_shape(y=y, y_hat=y_hat)
    check_not_empty("x", x)
    check_not_empty("y", y)
    check_choice("denominator", denominator, ("text", "reference"))
    dtype = _dtype(x, y, y_hat)
    u = _scaled(x, bandwidth_x, "bandwidth_x")
    v, v_hat = (_scaled(sample, bandwidth_y, "bandwidth_y") for sample in (y, y_hat))
    blocks = (accumulation_dtype(dtype), block_size)
    if denominator == "text":
        log_denominator = 2 * log_self_sums(*blocks, u)
    else:  # the square of a kernel is the kernel of points sqrt(2) times as far apart
        log_denominator = log_self_sums(*blocks, math.sqrt(2) * u)
    log_a = log_self_sums(*blocks, u, v) - log_denominator
    log_b = log_self_sums(*blocks, u, v_hat) - log_denominator
    # a clone, since torch.compile refuses one tensor in two places of a custom function
    log_c = log_cross_sums(*blocks, (u, v_hat), (u.clone(), v)) - log_denominator
    return (log_a.logsumexp(0) + log_b.logsumexp(0) - 2 * log_c.logsumexp(0)).to(dtype)


def cauchy_schwarz_mutual_information(
    x: Tensor,
    t: Tensor,
    bandwidth_x: Bandwidth,
    bandwidth_t: Bandwidth,
    *,
    normalized: bool = False,
    block_size: int | None = None,
) -> Tensor:
    r"""Cauchy-Schwarz quadratic mutual information, ``D(p(x,t); p(x) p(t))``.

    .. math::
        I(x;t) = \log \frac{\mathrm{tr}(KQ)}{N^2} + \log \frac{1'K1 \; 1'Q1}{N^4}
            - 2 \log \frac{1'KQ1}{N^3}

    with ``K, Q`` the kernel matrices of ``x`` and ``t``. It is :func:`hsic` made free of scale:
    the same three means, compared by logarithms.

    Args:
        x: shape ``[N, D]``.
        t: shape ``[N, K]``, the item of each row paired with that of ``x``.
        bandwidth_x: of the kernel of ``x``, a positive float or 0-d tensor.
        bandwidth_t: of the kernel of ``t``, likewise.
        normalized: divide by ``sqrt(I(x;x) I(t;t))``. The result is 1 for ``t = x`` at equal
            bandwidths, and 0 with a zero gradient where ``x`` or ``t`` is constant.
        block_size: rows a block; ``None`` = about half a million pairs.

    Returns:
        0-d tensor in nats (without unit when normalised), non-negative up to rounding, 0 when
        ``x`` or ``t`` is constant; dtype of the inputs.

    Raises:
        TypeError: a sample is not a floating tensor, or a bandwidth is not a number.
        ValueError: shapes do not fit or are empty, or a bandwidth is not positive.

    Example:
        A circle: uncorrelated coordinates, yet one tells much about the other.

        >>> angle = torch.arange(12) * torch.pi / 6
        >>> x, t = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
        >>> print(f"{(x * t).mean().abs():.4f}")
        0.0000
        >>> print(f"{cauchy_schwarz_mutual_information(x, t, 0.5, 0.5):.4f}")
        0.0984

    Source: Yu et al. (2024), Proposition 2, arXiv:2404.17951.
    """
    log_a, log_b, log_c = _dependence_means(x, t, bandwidth_x, bandwidth_t, block_size)
    information = log_a + log_b - 2 * log_c
    if normalized:
        eps = torch.finfo(accumulation_dtype(_dtype(x, t))).eps
        own = [
            _self_information(sample, bandwidth, name, block_size)
            for sample, bandwidth, name in ((x, bandwidth_x, "x"), (t, bandwidth_t, "t"))
        ]
        smallest = torch.minimum(*own)
        degenerate = smallest <= _DEGENERATE_ROUNDINGS * eps
        scale = torch.where(degenerate, 1.0, own[0] * own[1]).sqrt()
        information = torch.where(degenerate, 0.0, information / scale)
    return information.to(_dtype(x, t))


def hsic(
    x: Tensor,
    t: Tensor,
    bandwidth_x: Bandwidth,
    bandwidth_t: Bandwidth,
    *,
    block_size: int | None = None,
) -> Tensor:
    r"""Hilbert-Schmidt independence criterion (biased: self pairs are kept).

    .. math::
        \mathrm{HSIC} = \frac{\mathrm{tr}(KHQH)}{N^2}
            = \frac{\mathrm{tr}(KQ)}{N^2} + \frac{1'K1 \; 1'Q1}{N^4} - 2 \frac{1'KQ1}{N^3}

    with ``H = I - 11'/N``: the squared MMD between the joint sample and the product of its
    marginals.

    Args:
        x: shape ``[N, D]``.
        t: shape ``[N, K]``, paired with ``x`` row by row.
        bandwidth_x: of the kernel of ``x``, a positive float or 0-d tensor.
        bandwidth_t: of the kernel of ``t``, likewise.
        block_size: rows a block; ``None`` = about half a million pairs.

    Returns:
        0-d tensor, non-negative up to rounding; dtype of the inputs. Papers that divide by
        ``(N - 1)^2`` report ``(N / (N - 1))^2`` times this.

    Raises:
        TypeError: a sample is not a floating tensor, or a bandwidth is not a number.
        ValueError: shapes do not fit or are empty, or a bandwidth is not positive.

    Example:
        Two items whose kernels vanish between them: ``K = Q = I``, ``HSIC = tr(H)/4 = 1/4``.

        >>> x = torch.tensor([[0.0], [100.0]])
        >>> hsic(x, x, 1.0, 1.0)
        tensor(0.2500)

    Source: Gretton et al. (2005), *Measuring Statistical Dependence with Hilbert-Schmidt Norms*.
    """
    means = _dependence_means(x, t, bandwidth_x, bandwidth_t, block_size)
    a, b, c = (mean.exp() for mean in means)
    return (a + b - 2 * c).to(_dtype(x, t))


def gaussian_cauchy_schwarz(mean_p: Tensor, cov_p: Tensor, mean_q: Tensor, cov_q: Tensor) -> Tensor:
    r"""Cauchy-Schwarz divergence of two Gaussians, in closed form (squared form).

    .. math::
        D = \delta' (S_p + S_q)^{-1} \delta
            + \log \frac{\det(S_p + S_q)}{2^D \sqrt{\det S_p \det S_q}},
        \qquad \delta = \mu_p - \mu_q

    For equal covariances it is the KL divergence. Half of it is at most the smaller of the two KL
    divergences; it itself need not be.

    Args:
        mean_p: shape ``[D]``.
        cov_p: shape ``[D, D]``, positive definite; its symmetric part is taken.
        mean_q: shape ``[D]``.
        cov_q: shape ``[D, D]``, likewise.

    Returns:
        0-d tensor in nats; dtype of the inputs, half precision is computed in float32.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes do not fit or are empty, or a covariance is not positive definite.

    Example:
        The squared form can exceed the KL divergence, 4.82 here:

        >>> mean, cov = torch.zeros(1), torch.eye(1)
        >>> print(f"{gaussian_cauchy_schwarz(mean, 0.25 * cov, mean + 3.0, cov):.2f}")
        7.42

    Source: Kampa et al. (2011), closed-form Cauchy-Schwarz PDF divergence, one component.
    """
    check_floating(mean_p=mean_p, cov_p=cov_p, mean_q=mean_q, cov_q=cov_q)
    check_shape("mean_p", mean_p, (None,))
    check_not_empty("mean_p", mean_p)
    d = mean_p.shape[0]
    for name, cov in (("cov_p", cov_p), ("cov_q", cov_q)):
        check_shape(name, cov, (d, d))
    check_shape("mean_q", mean_q, (d,))
    dtype = _dtype(mean_p, cov_p, mean_q, cov_q)
    work = accumulation_dtype(dtype)
    s_p, s_q = ((cov.to(work) + cov.to(work).T) / 2 for cov in (cov_p, cov_q))
    delta = mean_p.to(work) - mean_q.to(work)
    roots = [
        _cholesky("cov_p", s_p),
        _cholesky("cov_q", s_q),
        _cholesky("cov_p + cov_q", s_p + s_q),
    ]
    half_p, half_q, half_sum = (root.diagonal().log().sum() for root in roots)
    white = torch.linalg.solve_triangular(roots[2], delta.unsqueeze(1), upper=False)
    value: Tensor = white.square().sum() + 2 * half_sum - d * math.log(2.0) - half_p - half_q
    return value.to(dtype)


def median_bandwidth(x: Tensor, *, max_points: int = 1024) -> Tensor:
    r"""Median distance between distinct points of a sample: the usual first bandwidth to try.

    Pairs at distance 0 do not count, so that ties, as in discrete data, cannot give a bandwidth of
    0. For two samples pass their concatenation.

    Args:
        x: shape ``[N, D]``; detached.
        max_points: at most this many rows, spread evenly over ``x``, are compared; >= 2.

    Returns:
        0-d tensor, positive, dtype of ``x``; 1 when all points are equal, where every bandwidth
        gives the same kernel.

    Raises:
        TypeError: ``x`` is not a floating tensor.
        ValueError: ``x`` is empty or not 2-D, or ``max_points < 2``.

    Example:
        The distance itself, not its square: the bandwidth has the unit of the data.

        >>> x = torch.tensor([[0.0], [1.0], [3.0]])
        >>> median_bandwidth(x), median_bandwidth(100 * x)
        (tensor(2.), tensor(200.))

    Source: Gretton et al. (2012), *A Kernel Two-Sample Test*, section 8.
    """
    check_floating(x=x)
    check_shape("x", x, (None, None))
    check_not_empty("x", x)
    check_count("max_points", max_points, at_least=2)
    stride = -(-x.shape[0] // max_points)
    distances = torch.pdist(x.detach()[::stride].to(accumulation_dtype(x.dtype)))
    distances = distances[~(distances <= 0)]  # NaN stays, and is the answer then
    if distances.numel() == 0:
        return torch.ones_like(x[0, 0])
    return distances.quantile(0.5).to(x.dtype)


def _two_sample_means(
    x: Tensor, y: Tensor, bandwidth: Bandwidth, block_size: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    # Logarithms of the kernel means within x, within y, and between them.
    check_floating(x=x, y=y)
    check_shape("x", x, (None, None))
    check_shape("y", y, (None, x.shape[1]))
    check_not_empty("x", x)
    check_not_empty("y", y)
    u, v = (_scaled(sample, bandwidth, "bandwidth") for sample in (x, y))
    blocks = (accumulation_dtype(_dtype(x, y)), block_size)
    log_m, log_n = math.log(x.shape[0]), math.log(y.shape[0])
    log_a = log_self_sums(*blocks, u).logsumexp(0) - 2 * log_m
    log_b = log_self_sums(*blocks, v).logsumexp(0) - 2 * log_n
    log_c = log_cross_sums(*blocks, (u, u[:, :0]), (v, v[:, :0])).logsumexp(0) - log_m - log_n
    return log_a, log_b, log_c


def _dependence_means(
    x: Tensor, t: Tensor, bandwidth_x: Bandwidth, bandwidth_t: Bandwidth, block_size: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    # Logarithms of tr(KQ)/N^2, 1'K1 1'Q1/N^4 and 1'KQ1/N^3.
    check_floating(x=x, t=t)
    check_shape("x", x, (None, None))
    check_shape("t", t, (x.shape[0], None))
    check_not_empty("x", x)
    check_not_empty("t", t)
    u, v = _scaled(x, bandwidth_x, "bandwidth_x"), _scaled(t, bandwidth_t, "bandwidth_t")
    blocks = (accumulation_dtype(_dtype(x, t)), block_size)
    log_n = math.log(x.shape[0])
    rows_x, rows_t = log_self_sums(*blocks, u), log_self_sums(*blocks, v)
    log_a = log_self_sums(*blocks, u, v).logsumexp(0) - 2 * log_n
    log_b = rows_x.logsumexp(0) + rows_t.logsumexp(0) - 4 * log_n
    log_c = (rows_x + rows_t).logsumexp(0) - 3 * log_n
    return log_a, log_b, log_c


def _self_information(
    sample: Tensor, bandwidth: Bandwidth, name: str, block_size: int | None
) -> Tensor:
    # I(x;x): K * K is the kernel of points sqrt(2) times as far apart.
    u = _scaled(sample, bandwidth, f"bandwidth_{name}")
    blocks = (accumulation_dtype(sample.dtype), block_size)
    rows = log_self_sums(*blocks, u)
    log_a = log_self_sums(*blocks, math.sqrt(2) * u).logsumexp(0)
    return log_a + 2 * rows.logsumexp(0) - 2 * (2 * rows).logsumexp(0)


def _scaled(sample: Tensor, bandwidth: Bandwidth, name: str) -> Tensor:
    wide = wide_dtype(sample.device)
    if isinstance(bandwidth, Tensor):
        check_floating(**{name: bandwidth})
        check_shape(name, bandwidth, ())
        return sample.to(wide) / bandwidth.to(wide)
    check_range(name, bandwidth, above=0.0, below=math.inf)
    return sample.to(wide) / bandwidth


def _cholesky(name: str, matrix: Tensor) -> Tensor:
    try:
        root: Tensor = torch.linalg.cholesky(matrix)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # not in its stubs
        raise ValueError(f"{name} must be positive definite, got {matrix}") from error
    return root


def _dtype(*samples: Tensor) -> torch.dtype:
    dtype = samples[0].dtype
    for sample in samples[1:]:
        dtype = torch.promote_types(dtype, sample.dtype)
    return dtype
