r"""Gaussian graphical models as exponential families: exact cumulants of their statistics.

The statistics are the coordinates, their squares and the products along the edges of a graph. Each
is a linear and a quadratic form of a Gaussian vector, whose joint cumulants are traces: with
:math:`x = \mu + V^{1/2} u` a statistic is :math:`b \cdot u + u^\top B u` up to a constant, and

.. math::
    \kappa(q_1, \dots, q_r) = 2^{r-1} \sum_{\text{cyclic orders}} \operatorname{tr}(B_1 \cdots B_r),
    \qquad
    \kappa(\ell_1, \ell_2, q_1, \dots, q_k) = 2^k \sum_{\text{orders}} b_1^\top B_1 \cdots B_k b_2 .
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from steelyard._checks import check_floating, check_same_dtype, check_same_shape, check_shape
from steelyard.estimation._family import TRUTH, third_moment
from steelyard.estimation.exponential_family import check_edges


class GaussianGraphicalFamily:
    r"""Normal laws whose precision matrix is zero off the edges of a graph.

    .. math::
        \xi(x) = (x_i, \; x_i^2, \; x_i x_j : (i, j) \in E), \qquad
        \theta = (h_i, \; -\tfrac12 K_{ii}, \; -K_{ij}), \quad h = K \mu .

    A truth is given by rows of data, each of them equally likely.

    Args:
        dim: variables ``d``, at least 1.
        edges: pairs ``i < j``, each once; ``None`` = all.

    Raises:
        ValueError: the dimension or an edge is out of range.

    Example:
        The model without edges has two parameters for each variable:

        >>> family = GaussianGraphicalFamily(3, edges=[])
        >>> family.size
        6
        >>> standard = torch.tensor([0.0, 0.0, 0.0, -0.5, -0.5, -0.5])
        >>> family.mean(standard)
        tensor([0., 0., 0., 1., 1., 1.])

    Source: arXiv:2105.08947, the example of Gaussian graphical models; the cumulants are derived.
    """

    def __init__(self, dim: int, edges: Sequence[tuple[int, int]] | None = None) -> None:
        self.dim, self.edges = dim, check_edges(dim, edges, name="dim")
        left = [*range(dim), *(i for i, _ in self.edges)]
        right = [*range(dim), *(j for _, j in self.edges)]
        self._left, self._right = torch.tensor(left), torch.tensor(right)

    @property
    def size(self) -> int:
        """Number of parameters ``p = 2 d + len(edges)``."""
        return 2 * self.dim + len(self.edges)

    def statistics(self, data: Tensor) -> Tensor:
        """Return the statistics of rows ``[n, d]``, ``[n, p]``."""
        check_floating(data=data)
        check_shape("data", data, (None, self.dim))
        return torch.cat([data, data[:, self._left] * data[:, self._right]], 1)

    def precision(self, theta: Tensor) -> Tensor:
        """Return the precision matrix, ``[d, d]``; the first ``d`` entries are not read."""
        check_floating(theta=theta)
        check_shape("theta", theta, (self.size,))
        d = self.dim
        half = torch.zeros(d, d, dtype=theta.dtype, device=theta.device)
        # squares enter once on the diagonal, products twice
        half = half.index_put(
            (self._left.to(theta.device), self._right.to(theta.device)), theta[d:]
        )
        return -(half + half.mT)

    def moments(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean ``[d]`` and the covariance matrix ``[d, d]`` of the variables."""
        covariance, failed = torch.linalg.inv_ex(self.precision(theta))
        if bool(failed):
            raise ValueError("theta must have an invertible precision matrix, got a singular one")
        covariance = (covariance + covariance.mT) / 2
        return covariance @ theta[: self.dim], covariance

    def log_normalizer(self, theta: Tensor) -> Tensor:
        """Return ``psi(theta)``; infinite where the precision is not positive definite."""
        factor, failed = torch.linalg.cholesky_ex(self.precision(theta))
        if bool(failed):
            return torch.where(theta.detach().isnan().any(), math.nan, theta.new_tensor(math.inf))
        h = theta[: self.dim].unsqueeze(1)
        quadratic = (h * torch.cholesky_solve(h, factor)).sum()
        log_det = 2 * factor.diagonal().log().sum()
        total: Tensor = (quadratic - log_det + self.dim * math.log(2 * math.pi)) / 2
        return total

    def mean(self, theta: Tensor) -> Tensor:
        """Return ``eta``, the mean of the statistics, ``[p]``."""
        mu, v = self.moments(theta)
        second = v + torch.outer(mu, mu)
        return torch.cat([mu, second[self._left, self._right]])

    def covariance(self, theta: Tensor) -> Tensor:
        """Return ``G``, their covariance, ``[p, p]``."""
        b, quadratic = self._forms(theta)
        flat = quadratic.flatten(1)
        return b @ b.mT + 2 * flat @ flat.mT

    def third_cumulant(self, theta: Tensor) -> Tensor:
        """Return ``T``, the third derivatives of ``psi``, ``[p, p, p]``."""
        b, quadratic = self._forms(theta)
        linear = 2 * torch.einsum("ai,cij,bj->abc", b, quadratic, b)
        products = torch.einsum("aij,bjk->abik", quadratic, quadratic)
        cubic = 8 * torch.einsum("abik,cki->abc", products, quadratic)
        return linear + linear.permute(0, 2, 1) + linear.permute(2, 1, 0) + cubic

    def fourth_contraction(self, theta: Tensor, pairs: Tensor) -> Tensor:
        """Sum the fourth derivatives of ``psi`` times ``pairs[a, b] pairs[c, d]``, 0-d."""
        check_floating(theta=theta, pairs=pairs)
        check_shape("pairs", pairs, (self.size, self.size))
        check_same_dtype(theta=theta, pairs=pairs)
        b, quadratic = self._forms(theta)
        weighted = torch.einsum("ab,bij->aij", pairs, quadratic)
        squares = torch.einsum("aij,ajk->ik", weighted, quadratic)
        both = torch.einsum("aij,akl->ijkl", weighted, quadratic)
        outer = b.mT @ pairs @ b
        image = torch.einsum("aij,aj->i", weighted, b)
        mixed = torch.einsum("aij,ak->kij", weighted, b)
        quartic = 32 * (squares * squares.mT).sum()
        quartic = quartic + 16 * torch.einsum("ijkl,jkli->", both, both)
        crossed = 16 * (outer * squares.mT).sum() + 16 * image.square().sum()
        return quartic + crossed + 16 * torch.einsum("ijk,kij->", mixed, mixed)

    def kl(self, theta: Tensor, other: Tensor) -> Tensor:
        """Return ``KL(g(theta) || g(other))`` in the Bregman form, 0-d."""
        check_floating(theta=theta, other=other)
        check_same_shape(theta=theta, other=other)
        gap = self.log_normalizer(other) - self.log_normalizer(theta)
        return gap - ((other - theta) * self.mean(theta)).sum()

    def truth_mean(self, truth: Tensor) -> Tensor:
        """Mean of the statistics over rows of data ``[n, d]``."""
        return self._rows(truth).mean(0)

    def truth_cumulants(self, truth: Tensor) -> tuple[Tensor, Tensor]:
        """Covariance ``[p, p]`` and third moment ``[p, p, p]`` of the statistics of rows."""
        statistics = self._rows(truth)
        centred = statistics - statistics.mean(0)
        weights = centred.new_full((len(centred),), 1 / len(centred))
        third = third_moment(weights, centred)
        if not bool(third.detach().isfinite().all()):
            raise ValueError(f"{TRUTH} must be smaller: the third moments of its squares overflow")
        return centred.mT @ centred / len(centred), third

    def start(self, eta: Tensor) -> Tensor:
        """Return the independent normal laws with the right means and variances."""
        check_floating(eta=eta)
        check_shape("eta", eta, (self.size,))
        d = self.dim
        mu, second = eta[:d], eta[d : 2 * d]
        variance = second - mu.square()
        if not bool((variance > 0).all()):
            raise ValueError("eta must let each variable vary, got a variance of 0")
        off = eta.new_zeros(len(self.edges))
        return torch.cat([mu / variance, -0.5 / variance, off])

    def to(self, dtype: torch.dtype) -> "GaussianGraphicalFamily":
        """Return the family, which holds no floating numbers."""
        return self

    def _rows(self, truth: Tensor) -> Tensor:
        check_floating(**{TRUTH: truth})
        check_shape(TRUTH, truth, (None, self.dim))
        if truth.shape[0] < 2 or not bool(torch.isfinite(truth.detach()).all()):
            raise ValueError(f"{TRUTH} must be finite rows of data, at least two")
        return self.statistics(truth)

    def _forms(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the linear and quadratic part of each statistic in a standard normal vector."""
        d, p = self.dim, self.size
        mu, v = self.moments(theta)
        root, failed = torch.linalg.cholesky_ex(v)
        if bool(failed):
            raise ValueError("theta must have a positive definite precision matrix")
        quadratic = torch.zeros(p, d, d, dtype=theta.dtype, device=theta.device)
        index = torch.arange(d, p, device=theta.device)
        quadratic[index, self._left, self._right] += 0.5
        quadratic[index, self._right, self._left] += 0.5
        linear = torch.cat(
            [torch.eye(d, dtype=theta.dtype, device=theta.device), mu.new_zeros(p - d, d)]
        )
        linear = linear + 2 * quadratic @ mu
        return linear @ root, root.mT @ quadratic @ root
