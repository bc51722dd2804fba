r"""Exponential families on finitely many points, and binary variables with pairwise interactions.

.. math:: g(x; \theta) = b(x)\, e^{\theta \cdot \xi(x) - \psi(\theta)}

Everything a risk needs is a sum over the points: the mean of the statistics, their covariance, and
their third and fourth cumulants.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from steelyard._checks import (
    check_count,
    check_floating,
    check_not_empty,
    check_same_dtype,
    check_same_shape,
    check_shape,
    given,
)
from steelyard.estimation._family import TRUTH, third_moment

MAX_NODES = 20
"""A million states; beyond, sums over states are the wrong tool."""

SUM_TOLERANCE = 1e-6


class ExponentialFamily:
    r"""An exponential family on ``S`` points, given by its statistics and a base measure.

    .. math::
        \psi(\theta) = \log \sum_s b_s e^{\theta \cdot \xi_s}, \qquad
        g_s = b_s e^{\theta \cdot \xi_s - \psi}

    Args:
        statistics: :math:`\xi`, ``[S, p]``, finite. No column may be a combination of the others
            and a constant: of categories coded one by one, leave one out.
        base: :math:`b \ge 0`, ``[S]``, of any sum; ``None`` = ones. Points of measure 0 are never
            drawn.

    Raises:
        ValueError: shapes do not fit, a number is not finite or negative, the statistics are
            linearly dependent.

    Example:
        A coin, and the variance of its statistic at even odds:

        >>> coin = ExponentialFamily(torch.tensor([[0.0], [1.0]]), torch.ones(2))
        >>> coin.probs(torch.zeros(1)), coin.covariance(torch.zeros(1))
        (tensor([0.5000, 0.5000]), tensor([[0.2500]]))

    Source: Sheena (2021), arXiv:2105.08947, Section 2.
    """

    def __init__(self, statistics: Tensor, base: Tensor | None = None) -> None:
        check_floating(statistics=statistics, **given(base=base))
        check_shape("statistics", statistics, (None, None))
        check_not_empty("statistics", statistics)
        points, p = statistics.shape
        base = statistics.new_ones(points) if base is None else base
        check_shape("base", base, (points,))
        if not bool(torch.isfinite(statistics).all() & torch.isfinite(base).all()):
            raise ValueError("statistics and base must be finite, got NaN or infinity")
        if bool((base < 0).any()) or not bool((base > 0).any()):
            raise ValueError("base must not be negative, and positive somewhere")
        possible = statistics.detach()[base > 0].double()
        centred = possible - possible.mean(0)
        size = centred.norm(dim=0)
        rank = int(torch.linalg.matrix_rank(centred / size.clamp_min(1e-300)))
        if rank < p:
            raise ValueError(
                f"statistics must not depend on one another, got rank {rank} of {p} columns beside "
                "a constant"
            )
        self.statistics, self.base = statistics, base

    @property
    def size(self) -> int:
        """Number of parameters ``p``."""
        return self.statistics.shape[1]

    def log_probs(self, theta: Tensor) -> Tensor:
        """Log-probability of each point, ``[..., S]``."""
        scores = self._scores(theta)
        return scores - scores.logsumexp(-1, keepdim=True)

    def probs(self, theta: Tensor) -> Tensor:
        """Probability of each point, ``[..., S]``, for ``theta`` ``[..., p]``."""
        return self._scores(theta).softmax(-1)

    def log_normalizer(self, theta: Tensor) -> Tensor:
        """Return ``psi(theta)``, ``[...]``."""
        return self._scores(theta).logsumexp(-1)

    def mean(self, theta: Tensor) -> Tensor:
        """Return ``eta``, the mean of the statistics, ``[..., p]``: the gradient of ``psi``."""
        return self.probs(theta) @ self.statistics

    def covariance(self, theta: Tensor) -> Tensor:
        """Return ``G``, their covariance, ``[..., p, p]``: the Hessian of ``psi``."""
        probs = self.probs(theta)
        centred = self.statistics - (probs @ self.statistics).unsqueeze(-2)
        return centred.mT @ (probs.unsqueeze(-1) * centred)

    def third_cumulant(self, theta: Tensor) -> Tensor:
        """Return ``T``, the third derivatives of ``psi``, ``[p, p, p]``."""
        check_shape("theta", theta, (self.size,))
        probs = self.probs(theta)
        return third_moment(probs, self.statistics - probs @ self.statistics)

    def fourth_contraction(self, theta: Tensor, pairs: Tensor) -> Tensor:
        """Sum the fourth derivatives of ``psi`` times ``pairs[a, b] pairs[c, d]``, 0-d.

        Without the ``p^4`` numbers: it is the fourth cumulant of a quadratic form.
        """
        check_floating(theta=theta, pairs=pairs)
        check_shape("theta", theta, (self.size,))
        check_shape("pairs", pairs, (self.size, self.size))
        check_same_dtype(theta=theta, pairs=pairs)
        probs = self.probs(theta)
        centred = self.statistics - probs @ self.statistics
        form = ((centred @ pairs) * centred).sum(1)
        mean = probs @ form
        mixed = pairs @ (centred.mT @ (probs.unsqueeze(1) * centred))
        return probs @ form.square() - mean.square() - 2 * (mixed * mixed.mT).sum()

    def kl(self, theta: Tensor, other: Tensor) -> Tensor:
        """Return ``KL(g(theta) || g(other))``, ``[...]``, in the Bregman form."""
        check_floating(theta=theta, other=other)
        check_same_shape(theta=theta, other=other)
        gap = self.log_normalizer(other) - self.log_normalizer(theta)
        return gap - ((other - theta) * self.mean(theta)).sum(-1)

    def truth_mean(self, truth: Tensor) -> Tensor:
        """Mean of the statistics under a law ``[S]``."""
        return self._law(truth) @ self.statistics

    def truth_cumulants(self, truth: Tensor) -> tuple[Tensor, Tensor]:
        """Covariance ``[p, p]`` and third cumulant ``[p, p, p]`` of the statistics under a law."""
        law = self._law(truth)
        centred = self.statistics - law @ self.statistics
        return centred.mT @ (law.unsqueeze(1) * centred), third_moment(law, centred)

    def start(self, eta: Tensor) -> Tensor:
        """Return a member to begin a search at."""
        check_floating(eta=eta)
        check_shape("eta", eta, (self.size,))
        if not bool(eta.isfinite().all()):
            raise ValueError("eta must be finite, got NaN or infinity")
        return torch.zeros_like(eta)

    def to(self, dtype: torch.dtype) -> "ExponentialFamily":
        """Return the family in another floating dtype."""
        family = object.__new__(ExponentialFamily)
        family.statistics, family.base = self.statistics.to(dtype), self.base.to(dtype)
        return family

    def _scores(self, theta: Tensor) -> Tensor:
        check_floating(theta=theta)
        if theta.dim() == 0 or theta.shape[-1] != self.size:
            raise ValueError(f"theta must have shape [..., {self.size}], got {list(theta.shape)}")
        return theta @ self.statistics.mT + self.base.log()

    def _law(self, truth: Tensor) -> Tensor:
        check_floating(**{TRUTH: truth})
        check_shape(TRUTH, truth, (self.statistics.shape[0],))
        values = truth.detach().double()
        if not bool((values >= 0).all()):
            raise ValueError(f"{TRUTH} must be probabilities, got a negative number or NaN")
        if abs(float(values.sum()) - 1) > SUM_TOLERANCE:
            raise ValueError(f"{TRUTH} must sum to 1, got {float(values.sum()):g}")
        if bool((values[self.base == 0] > 0).any()):
            raise ValueError(f"{TRUTH} must be 0 where base is 0: no member comes near it")
        return truth.to(self.statistics.dtype)


def pairwise_binary_family(
    nodes: int, edges: Sequence[tuple[int, int]] | None = None
) -> ExponentialFamily:
    r"""Binary variables with an effect of each and of pairs, on all ``2^nodes`` states.

    .. math:: \xi(x) = (x_1, \dots, x_d, x_i x_j : (i, j) \in E), \qquad x \in \{0, 1\}^d

    State ``s`` has the bits of the number ``s``, the first variable the highest:
    :func:`binary_state_probs` counts data in this order.

    Args:
        nodes: variables ``d``, 1 to 20.
        edges: pairs ``i < j``, each once; ``None`` = all.

    Returns:
        A family in float64 with ``p = d + len(edges)`` parameters.

    Raises:
        ValueError: the number of nodes or an edge is out of range.

    Example:
        >>> pairwise_binary_family(2).statistics
        tensor([[0., 0., 0.],
                [0., 1., 0.],
                [1., 0., 0.],
                [1., 1., 1.]], dtype=torch.float64)

    Source: arXiv:2105.08947, the example of pairwise models.
    """
    pairs = check_edges(nodes, edges)
    if nodes > MAX_NODES:
        raise ValueError(f"nodes must be <= {MAX_NODES} for a sum over states, got {nodes}")
    shifts = torch.arange(nodes - 1, -1, -1)
    states = ((torch.arange(2**nodes).unsqueeze(1) >> shifts) & 1).double()
    products = [states[:, i] * states[:, j] for i, j in pairs]
    return ExponentialFamily(torch.stack([*states.T, *products], 1))


def binary_state_probs(data: Tensor) -> Tensor:
    """Share of rows in each state of binary variables, ``[2^d]``, float64.

    Args:
        data: ``[n, d]``, bool or 0/1, ``d`` at most 20.

    Returns:
        The empirical law in the order of :func:`pairwise_binary_family`.

    Raises:
        ValueError: the shape does not fit, or an entry is neither 0 nor 1.

    Example:
        >>> binary_state_probs(torch.tensor([[0, 1], [0, 1], [1, 1], [0, 0]]))
        tensor([0.2500, 0.5000, 0.0000, 0.2500], dtype=torch.float64)
    """
    check_shape("data", data, (None, None))
    check_not_empty("data", data)
    nodes = data.shape[1]
    if nodes > MAX_NODES:
        raise ValueError(f"data must have at most {MAX_NODES} columns, got {nodes}")
    bits = data.long()
    if not bool(((data == 0) | (data == 1)).all()):
        raise ValueError("data must hold 0 and 1 only")
    shifts = torch.arange(nodes - 1, -1, -1, device=data.device)
    counts = torch.bincount((bits << shifts).sum(1), minlength=2**nodes)
    return counts.double() / len(data)


def check_edges(
    nodes: int, edges: Sequence[tuple[int, int]] | None, *, name: str = "nodes"
) -> list[tuple[int, int]]:
    """Return the pairs of a graph, all of them for ``None``; ``name`` is that of ``nodes``."""
    check_count(name, nodes)
    if edges is None:
        return list(itertools.combinations(range(nodes), 2))
    try:
        pairs = [(int(i), int(j)) for i, j in edges]
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"edges must be pairs of integers, got {edges!r:.60}") from None
    for i, j in pairs:
        if not 0 <= i < j < nodes:
            raise ValueError(f"edges must be pairs i < j below {name} = {nodes}, got ({i}, {j})")
    if len(set(pairs)) < len(pairs):
        raise ValueError(f"edges must differ, got {pairs}")
    return pairs
