"""Exact samples of projection determinantal point processes, by rejection."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from steelyard.estimation._numbers import wide_dtype

# A candidate whose residual has fallen below this share of its length lies in the span.
SPANNED = 1e-12
_CHUNK_ENTRIES = 2**22
_USED = 2.0  # above every share


def projection_sets(
    phi: Tensor, mu: Tensor, copies: int, generator: torch.Generator | None
) -> Tensor:
    """Draw ``[copies, m]`` candidates by the sequential rule, several copies side by side.

    The next point has density ``residual * mu``. It is found by rejection, without a pass over all
    candidates: points come from ``kernel * mu`` and are kept with probability ``residual /
    kernel``, after ``m / (m - k)`` tries on average when ``k`` points are chosen.
    """
    m = phi.shape[1]
    size = max(1, _CHUNK_ENTRIES // (m * (m + _tries(m))))
    starts = range(0, copies, size)
    source = _Source(phi, mu, generator)
    return torch.cat([_side_by_side(source, min(size, copies - start)) for start in starts])


def _side_by_side(source: "_Source", copies: int) -> Tensor:
    m = source.phi.shape[1]
    every = torch.arange(copies, device=source.phi.device)
    chosen = torch.empty(copies, m, dtype=torch.long, device=source.phi.device)
    span = source.phi.new_zeros(copies, m, m)
    tries = source.draw(span)
    place = torch.arange(tries.points.shape[1], device=every.device)
    for k in range(m):
        found, first = (tries.uniform < tries.share).max(1)
        while not bool(found.all()):  # all tries are used up: very rare
            tries.refill(~found, source.draw(span[~found]))
            found, first = (tries.uniform < tries.share).max(1)
        chosen[:, k] = tries.points[every, first]
        tries.uniform.masked_fill_(place <= first.unsqueeze(1), _USED)
        direction = tries.rows[every, first].unsqueeze(2)
        for _ in range(2):  # once leaves an error of the order of the cancellation
            direction = direction - span @ (span.mT @ direction)
        direction = direction / torch.linalg.vector_norm(direction, dim=1, keepdim=True)
        span[:, :, k] = direction.squeeze(2)
        tries.share.sub_((tries.rows @ direction).squeeze(2).square() / tries.kernel)
        tries.share.masked_fill_(tries.share <= SPANNED, 0.0)
    return chosen


class _Tries(NamedTuple):
    """Points to be kept or not, each ``[copies, tries]``; the rows ``[copies, tries, m]``."""

    points: Tensor
    rows: Tensor
    kernel: Tensor
    share: Tensor
    """Of the length squared that the chosen points leave."""
    uniform: Tensor

    def refill(self, which: Tensor, fresh: "_Tries") -> None:
        for old, new in zip(self, fresh, strict=True):
            old[which] = new


class _Source:
    """Draws independent points with density ``kernel * mu``."""

    def __init__(self, phi: Tensor, mu: Tensor, generator: torch.Generator | None) -> None:
        self.phi, self.generator = phi, generator
        self.kernel = _squared_lengths(phi)
        self.total = (mu * self.kernel).cumsum(0)

    def draw(self, span: Tensor) -> _Tries:
        """Draw for each ``span``, ``[copies, m, m]``; columns of 0 are not filled yet."""
        shape = (len(span), _tries(self.phi.shape[1]))
        index = draw_cumulated(self.total, shape, self.generator)
        rows, kernel = self.phi[index], self.kernel[index]
        share = 1 - (rows @ span).square().sum(2) / kernel
        share = torch.where(share > SPANNED, share, 0.0)
        device, dtype = self.phi.device, share.dtype
        uniform = torch.rand(shape, generator=self.generator, dtype=dtype, device=device)
        return _Tries(index, rows, kernel, share, uniform)


def _tries(m: int) -> int:
    """Twice as many points as it takes on average, and some: ``m (1 + 1/2 + .. + 1/m)``."""
    return 8 + math.ceil(2 * m * (1 + math.log(m)))


def _squared_lengths(rows: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return lengths.square()


def draw(mass: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Draw ``[count]`` indices from unnormalised probabilities ``[P]``; never one of 0."""
    return draw_cumulated(mass.cumsum(0), (count,), generator)


def draw_cumulated(
    total: Tensor, shape: tuple[int, ...], generator: torch.Generator | None
) -> Tensor:
    uniform = torch.rand(
        shape, generator=generator, dtype=wide_dtype(total.device), device=total.device
    )
    index = torch.searchsorted(total, uniform * total[-1], right=True)
    # rounding may put uniform * total at the total itself
    last = torch.searchsorted(total, total[-1])
    return torch.minimum(index, last)
