r"""Aggregation weights from the gaps between a client's visits.

Federated averaging with any fixed weights minimises
:math:`\sum_n \omega_n p_n F_n`, where client ``n`` takes part with probability :math:`p_n`: those
that come often dominate. The weight that restores the plain mean is :math:`1 / p_n`, which is the
mean number of rounds from one visit to the next, and so can be counted.

Source: Wang and Ji (2024), A Lightweight Method for Tackling Unknown Participation Statistics in
Federated Averaging, arXiv:2306.03401.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from steelyard._checks import check_count, check_floating, check_range, check_shape


class IntervalMoments(NamedTuple):
    """Moments of one interval; see :func:`interval_moments`."""

    mean: Tensor
    variance: Tensor
    relative_bias: Tensor


class ParticipationWeights(nn.Module):
    r"""Estimate ``1 / p_n`` of every client by the mean of its completed intervals.

    An interval ends when the client takes part, or after ``cutoff`` rounds without it. The weight
    of a round uses intervals completed strictly before it, so it does not depend on who comes in
    that round; this is what makes the aggregate unbiased once the weight is ``1 / p_n``. A weight
    is 1 until the first interval is complete.

    The state is three numbers for each client (buffers, so ``state_dict`` holds them). In a
    distributed server, ``participated`` of all clients must be gathered before :meth:`update`.

    Args:
        num_clients: registered clients ``N``, at least 1, whether or not they ever come.
        cutoff: longest interval ``K``, at least 1; ``None`` for none. It bounds the weights and
            their variance, at a relative bias of ``-(1 - p)**K``.

    Attributes:
        weights: ``[N]`` float64, for the coming round; all in ``[1, cutoff]``.
        completed: ``[N]``, completed intervals of each client.
        elapsed: ``[N]``, rounds since the last one was completed.

    Raises:
        ValueError: a number is out of range, or ``participated`` has another shape.

    Example:
        >>> tracker = ParticipationWeights(1)
        >>> visits = [True, False, False, True, True]
        >>> [round(tracker.update(torch.tensor([came])).item(), 3) for came in visits]
        [1.0, 1.0, 1.0, 2.0, 1.667]
        >>> tracker = ParticipationWeights(1, cutoff=2)
        >>> [round(tracker.update(torch.tensor([came])).item(), 3) for came in visits]
        [1.0, 1.0, 1.5, 1.333, 1.25]

    Source: arXiv:2306.03401, Algorithm 2.
    """

    weights: Tensor
    completed: Tensor
    elapsed: Tensor

    def __init__(self, num_clients: int, cutoff: int | None = None) -> None:
        super().__init__()
        check_count("num_clients", num_clients)
        if cutoff is not None:
            check_count("cutoff", cutoff)
        self.cutoff = cutoff
        self.register_buffer("weights", torch.ones(num_clients, dtype=torch.float64))
        self.register_buffer("completed", torch.zeros(num_clients, dtype=torch.int64))
        self.register_buffer("elapsed", torch.zeros(num_clients, dtype=torch.int64))

    @torch.no_grad()
    def update(self, participated: Tensor) -> Tensor:
        """Enter who took part in the round that is over.

        Args:
            participated: ``[N]``, bool or 0/1.

        Returns:
            The weights ``[N]`` of the next round (a copy).
        """
        check_shape("participated", participated, (self.weights.shape[0],))
        came = participated.to(device=self.weights.device, dtype=torch.bool)
        elapsed = self.elapsed + 1
        ended = came if self.cutoff is None else came | (elapsed >= self.cutoff)
        done = self.completed + ended
        known = self.completed * self.weights
        mean = (known + elapsed) / done.clamp_min(1)
        self.weights.copy_(torch.where(ended, mean, self.weights))
        self.completed.copy_(done)
        self.elapsed.copy_(torch.where(ended, torch.zeros_like(elapsed), elapsed))
        return self.weights.clone()

    def extra_repr(self) -> str:
        """Show the settings in ``repr``."""
        return f"num_clients={self.weights.shape[0]}, cutoff={self.cutoff}"


def interval_moments(probability: Tensor | float, cutoff: int | None = None) -> IntervalMoments:
    r"""Give mean, variance and bias of one interval of a client that comes with probability ``p``.

    With :math:`r = 1 - p`, an interval is :math:`s = \min(G, K)` with ``G`` geometric, and

    .. math::
        \mathbb{E}[s] = \frac{1 - r^K}{p}, \qquad
        \mathbb{E}[s^2] = \sum_{k=1}^K (2k - 1) r^{k-1}
        = \frac{1 + r - (2K + 1) r^K + (2K - 1) r^{K+1}}{p^2} .

    Args:
        probability: ``p`` in (0, 1], any shape.
        cutoff: ``K``, at least 1, or ``None``.

    Returns:
        ``mean``, ``variance`` and ``relative_bias`` ``= p E[s] - 1 = -(1-p)**K``, in the shape of
        ``probability``. After ``M`` intervals the weight has the variance divided by ``M``.

    Raises:
        ValueError: a probability is outside (0, 1], or the cutoff is below 1.
        TypeError: ``probability`` is neither a number nor a floating tensor.

    Example:
        >>> moments = interval_moments(0.5, cutoff=2)
        >>> moments.mean.item(), moments.variance.item(), moments.relative_bias.item()
        (1.5, 0.25, -0.25)
        >>> interval_moments(0.5).variance.item()
        2.0

    Source: arXiv:2306.03401; the exact moments are derived here.
    """
    if not isinstance(probability, Tensor):
        check_range("probability", probability, above=0.0, at_most=1.0)
        probability = torch.tensor(probability, dtype=torch.float64)
    check_probability("probability", probability)
    miss = 1 - probability
    if cutoff is None:
        return IntervalMoments(
            1 / probability, miss / probability.square(), torch.zeros_like(probability)
        )
    check_count("cutoff", cutoff)
    # Sums of positive terms: the closed form of the second moment cancels badly at small p.
    steps = torch.arange(cutoff, dtype=probability.dtype, device=probability.device)
    tails = miss.unsqueeze(-1) ** steps
    mean = tails.sum(-1)
    second = ((2 * steps + 1) * tails).sum(-1)
    variance = (second - mean.square()).clamp_min(0.0)
    return IntervalMoments(mean, variance, -(miss**cutoff))


def check_probability(name: str, probability: Tensor) -> None:
    """Require values in (0, 1]; NaN never fits."""
    check_floating(**{name: probability})
    if not bool(((probability > 0) & (probability <= 1)).all()):
        worst = probability[~((probability > 0) & (probability <= 1))].flatten()[0].item()
        raise ValueError(f"{name} must be in (0, 1], got {worst}")
