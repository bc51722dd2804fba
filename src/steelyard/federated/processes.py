r"""How clients come and go: participation processes for simulation.

Source: Wang and Ji (2024), arXiv:2306.03401, experiments.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from steelyard._checks import check_count, check_floating, check_not_empty, check_range, check_shape
from steelyard.federated.participation import check_probability


class MarkovRates(NamedTuple):
    """Transition probabilities of :func:`markov_rates`."""

    up: Tensor
    down: Tensor


def markov_rates(probability: Tensor, *, max_up: float = 0.05) -> MarkovRates:
    r"""Give the rates of an on/off chain whose share of time on is ``probability``.

    .. math:: \text{up} = a, \qquad \text{down} = a (1/p - 1)

    and both divided by ``down`` where that exceeds 1.

    Args:
        probability: ``p`` in (0, 1], ``[N]``.
        max_up: largest probability ``a`` of going from off to on, in (0, 1].

    Returns:
        ``up`` and ``down``, ``[N]``, with ``up / (up + down) = p``.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> rates = markov_rates(torch.tensor([0.5, 0.02], dtype=torch.float64))
        >>> [round(u, 4) for u in rates.up.tolist()], [round(d, 4) for d in rates.down.tolist()]
        ([0.05, 0.0204], [0.05, 1.0])

    Source: arXiv:2306.03401, Markovian participation.
    """
    check_probability("probability", probability)
    check_range("max_up", max_up, above=0.0, at_most=1.0)
    down = max_up * (1 / probability - 1)
    excess = down.clamp_min(1.0)
    return MarkovRates(max_up / excess, down / excess)


def markov_participation(
    probability: Tensor,
    rounds: int,
    *,
    max_up: float = 0.05,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw who takes part in each round when clients go on and off as Markov chains.

    Args:
        probability: share of rounds of each client, ``[N]`` in (0, 1].
        rounds: at least 1.
        max_up: as in :func:`markov_rates`.
        generator: source of randomness.

    Returns:
        ``[rounds, N]`` bool; the first round is drawn from the stationary law.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> p = torch.tensor([0.2, 1.0])
        >>> came = markov_participation(p, 4000, generator=torch.Generator().manual_seed(0))
        >>> [round(share, 1) for share in came.double().mean(0).tolist()]
        [0.2, 1.0]

    Source: arXiv:2306.03401, Markovian participation.
    """
    check_shape("probability", probability, (None,))
    check_not_empty("probability", probability)
    check_count("rounds", rounds)
    up, down = markov_rates(probability, max_up=max_up)
    draws = torch.rand(rounds, probability.shape[0], dtype=torch.float64, generator=generator).to(
        probability.device
    )
    came = torch.empty(draws.shape, dtype=torch.bool, device=probability.device)
    came[0] = draws[0] < probability
    for t in range(1, rounds):
        came[t] = draws[t] < torch.where(came[t - 1], 1 - down, up)
    return came


def cyclic_participation(
    probability: Tensor, rounds: int, *, period: int = 100, generator: torch.Generator | None = None
) -> Tensor:
    """Draw who takes part when every client is on for one stretch of each period.

    Args:
        probability: ``[N]`` in (0, 1]; the stretch has ``max(1, round(period * p))`` rounds, one
            less than the period at most.
        rounds: at least 1.
        period: rounds of a cycle, at least 2.
        generator: source of the initial phases, which are uniform.

    Returns:
        ``[rounds, N]`` bool.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> came = cyclic_participation(torch.tensor([0.25]), 8, period=4)
        >>> came.sum().item()
        2

    Source: arXiv:2306.03401, cyclic participation.
    """
    check_probability("probability", probability)
    check_shape("probability", probability, (None,))
    check_count("rounds", rounds)
    check_count("period", period, at_least=2)
    active = (period * probability).round().clamp(1, period - 1)
    phase = torch.randint(period, (probability.shape[0],), generator=generator)
    time = torch.arange(rounds).unsqueeze(1) + phase
    return (time % period).to(probability.device) < active


def participation_from_labels(
    label_distribution: Tensor, preference: Tensor, *, mean: float = 0.1, minimum: float = 0.02
) -> Tensor:
    r"""Tie participation to the data: clients rich in preferred classes come more often.

    .. math:: p_n = \max\bigl(p_{\min},\; \bar p\, C\, \langle d_n, q \rangle\bigr)

    clipped at 1, with :math:`d_n` the label distribution of client ``n`` and ``q`` the preference.

    Args:
        label_distribution: ``[N, C]``, rows sum to 1.
        preference: ``[C]``, sums to 1, for example a Dirichlet draw.
        mean: mean probability if classes were spread evenly, above 0.
        minimum: smallest probability, in (0, 1].

    Returns:
        Probabilities ``[N]`` in ``[minimum, 1]``.

    Raises:
        ValueError: a shape or a number does not fit, or an entry is negative.

    Example:
        >>> labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
        >>> participation_from_labels(labels, torch.tensor([0.9, 0.1]))
        tensor([0.1800, 0.0200, 0.1000])

    Source: arXiv:2306.03401, heterogeneous participation.
    """
    check_floating(label_distribution=label_distribution, preference=preference)
    check_shape("label_distribution", label_distribution, (None, None))
    check_shape("preference", preference, (label_distribution.shape[1],))
    check_range("mean", mean, above=0.0)
    check_range("minimum", minimum, above=0.0, at_most=1.0)
    for name, values in (("label_distribution", label_distribution), ("preference", preference)):
        if not bool((values >= 0).all()):
            raise ValueError(f"{name} must be non-negative, got {values.min().item()}")
    dtype = torch.promote_types(label_distribution.dtype, preference.dtype)
    match = label_distribution.to(dtype) @ preference.to(dtype)
    return (mean * preference.shape[0] * match).clamp(minimum, 1.0)
