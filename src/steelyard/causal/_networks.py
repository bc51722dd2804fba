"""Many small networks trained side by side, each for itself."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

_MAX_GRADIENT = 10.0
_LEAST_HELD_OUT = 20


@dataclass(frozen=True)
class Schedule:
    """How the networks are trained."""

    hidden: Sequence[int]
    learning_rate: float
    weight_decay: float
    batch_size: int
    max_epochs: int
    patience: int


class Members(nn.Module):
    """``M`` perceptrons with weights of their own: ``[N, inputs]`` to ``[M, N, outputs]``."""

    def __init__(
        self, members: int, inputs: int, hidden: Sequence[int], outputs: int, start: Tensor
    ) -> None:
        super().__init__()
        widths = [inputs, *hidden, outputs]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for k, (width, following) in enumerate(pairwise(widths)):
            scale = 0.1 if k == len(hidden) else math.sqrt(2.0)
            weight = torch.randn(members, width, following, dtype=torch.float64)
            self.weights.append(nn.Parameter(weight * scale / math.sqrt(max(width, 1))))
            bias = torch.zeros(members, 1, following, dtype=torch.float64)
            self.biases.append(nn.Parameter(bias + (start if k == len(hidden) else 0.0)))

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply every member to the same inputs."""
        members = self.biases[0].shape[0]
        activity = inputs.expand(members, *inputs.shape)
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            activity = torch.baddbmm(bias, activity, weight)
            if k < len(self.weights) - 1:
                activity = activity.relu()
        return activity


def train_members(
    network: Members,
    losses: Callable[[Tensor], Tensor],
    rows: Tensor,
    schedule: Schedule,
    generator: torch.Generator,
) -> None:
    """Minimise ``losses(rows)`` ``[M]``, and keep the best weights of each member by itself.

    A fifth of the rows is held out to judge that; with fewer than 20 such rows, all are used for
    both. Training ends when no member has got better for ``patience`` epochs.
    """
    rows = rows[torch.randperm(len(rows), generator=generator)]
    held = len(rows) // 5
    watched, used = (rows[:held], rows[held:]) if held >= _LEAST_HELD_OUT else (rows, rows)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay
    )
    with torch.no_grad():
        best = losses(watched)
    kept = [parameter.detach().clone() for parameter in network.parameters()]
    since = 0
    for _ in range(schedule.max_epochs):
        order = used[torch.randperm(len(used), generator=generator)]
        for batch in order.tensor_split(max(len(order) // schedule.batch_size, 1)):
            optimizer.zero_grad()
            losses(batch).sum().backward()  # type: ignore[no-untyped-call]
            _clip_each(network)
            optimizer.step()
        with torch.no_grad():
            now = losses(watched)
            better = now < best
            best = torch.where(better, now, best)
            for old, new in zip(kept, network.parameters(), strict=True):
                old[better] = new[better]
        since = 0 if bool(better.any()) else since + 1
        if since >= schedule.patience:
            break
    with torch.no_grad():
        for old, new in zip(kept, network.parameters(), strict=True):
            new.copy_(old)


def _clip_each(network: Members) -> None:
    # one norm for each member, so that a hard one doesn't slow the others
    gradients = [parameter.grad for parameter in network.parameters()]
    squares = [g.square().flatten(1).sum(1) for g in gradients if g is not None]
    norm = torch.stack(squares).sum(0).sqrt()
    factor = (_MAX_GRADIENT / norm.clamp(min=_MAX_GRADIENT))[:, None, None]
    for gradient in gradients:
        if gradient is not None:
            gradient.mul_(factor)
