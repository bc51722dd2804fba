"""Training a small network on a loss plus a penalty, in two phases."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from steelyard.tabular._sensitive import shuffled_by_stratum, spread_rows


class Objective(Protocol):
    """Mean objective of some rows, with or without its penalty."""

    def __call__(self, rows: Tensor, *, penalised: bool) -> Tensor: ...


_MAX_GRADIENT = 10.0
_REDUCTIONS = 2  # of the learning rate, each by 10
_LEAST_HELD_OUT = 20  # fewer rows say nothing about when to stop


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    learning_rate: float
    weight_decay: float
    batch_size: int
    max_epochs: int
    patience: int
    validation_fraction: float


def build_network(features: int, hidden: Sequence[int], dropout: float) -> nn.Module:
    """Make a perceptron with one output; no hidden layer is a linear model."""
    widths = [features, *hidden]
    layers: list[nn.Module] = []
    for width, following in pairwise(widths):
        layers += [nn.Linear(width, following), nn.ReLU()]
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear(widths[-1], 1))


def fit_network(
    network: nn.Module,
    objective: Objective,
    phases: Sequence[bool],
    strata: NDArray[np.int64],
    schedule: Schedule,
    generator: torch.Generator,
) -> list[float]:
    """Minimise ``objective(rows, penalised=...)`` in phases; return what was watched, by epoch.

    The penalty has a kink at constant predictions, where a fit that starts there stays: hence a
    first phase without it. Each phase keeps the best weights by its held-out rows, or by the
    training rows if too few can be held out.
    """
    share = schedule.validation_fraction
    held = np.zeros(len(strata), dtype=bool)
    if math.floor(share * len(strata)) >= _LEAST_HELD_OUT:
        held = spread_rows(strata, share, generator)
    history: list[float] = []
    for penalised in phases:
        phase = partial(objective, penalised=penalised)
        history += _phase(network, phase, strata, held, schedule, generator)
    return history


def _phase(
    network: nn.Module,
    objective: Callable[[Tensor], Tensor],
    strata: NDArray[np.int64],
    held: NDArray[np.bool_],
    schedule: Schedule,
    generator: torch.Generator,
) -> list[float]:
    optimizer, reductions = _optimizer(network, schedule, 1.0), 0
    watched = np.flatnonzero(held if held.any() else ~held)
    watch = list(_batches(watched, strata, schedule.batch_size, generator))
    history: list[float] = []
    best, best_state, since = math.inf, copy.deepcopy(network.state_dict()), 0
    for _ in range(schedule.max_epochs):
        network.train()
        for rows in _batches(np.flatnonzero(~held), strata, schedule.batch_size, generator):
            optimizer.zero_grad()
            objective(rows).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.parameters(), _MAX_GRADIENT)
            optimizer.step()
        history.append(_mean_objective(network, objective, watch))
        if not math.isfinite(history[-1]):
            raise ValueError(
                "the training objective is not finite any more: use a smaller learning_rate "
                f"(now {schedule.learning_rate}) or look for extreme values in X or y"
            )
        since += 1
        if history[-1] < best:
            best, best_state, since = history[-1], copy.deepcopy(network.state_dict()), 0
        if since < schedule.patience:
            continue
        if reductions == _REDUCTIONS:
            break
        # near the kink of the penalty steps of one length jump to and fro: go back, walk slower
        reductions, since = reductions + 1, 0
        network.load_state_dict(best_state)
        optimizer = _optimizer(network, schedule, 10.0**-reductions)
    network.load_state_dict(best_state)
    network.eval()
    return history


def _optimizer(network: nn.Module, schedule: Schedule, factor: float) -> torch.optim.Optimizer:
    rate = schedule.learning_rate * factor
    return torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=schedule.weight_decay)


@torch.no_grad()
def _mean_objective(
    network: nn.Module, objective: Callable[[Tensor], Tensor], batches: list[Tensor]
) -> float:
    network.eval()
    sizes = [len(rows) for rows in batches]
    values = [float(objective(rows)) for rows in batches]
    return float(np.average(values, weights=sizes))


def _batches(
    rows: NDArray[np.int64], strata: NDArray[np.int64], size: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Deal the rows like cards, stratum by stratum: equal batches of at least ``size`` rows."""
    order = rows[shuffled_by_stratum(strata[rows], generator)]
    count = max(len(rows) // size, 1)
    for k in range(count):
        yield torch.from_numpy(order[k::count])
