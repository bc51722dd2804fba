"""Federated averaging when clients take part at different, unknown rates."""

from steelyard.federated.aggregation import Aggregate, aggregate
from steelyard.federated.participation import (
    IntervalMoments,
    ParticipationWeights,
    interval_moments,
)
from steelyard.federated.processes import (
    MarkovRates,
    cyclic_participation,
    markov_participation,
    markov_rates,
    participation_from_labels,
)

__all__ = [
    "Aggregate",
    "IntervalMoments",
    "MarkovRates",
    "ParticipationWeights",
    "aggregate",
    "cyclic_participation",
    "interval_moments",
    "markov_participation",
    "markov_rates",
    "participation_from_labels",
]
