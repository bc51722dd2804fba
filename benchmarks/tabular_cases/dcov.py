"""The distance-covariance penalty of predictions and a categorical attribute, with gradient."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from paired import OURS, Contest, Run, agreeing

DENSE, BLOCKS = "plain torch, dense", "plain torch, in blocks"
BLOCK, LEVELS = 512, 4
LARGEST_DENSE = 5000  # beyond, its matrices of n^2 entries no longer fit


def contest(n: int) -> Contest:
    """The dense form of the papers, and the same sums a block of rows at a time."""
    runs, small = runs_of(n), runs_of(64)
    return Contest(runs, lambda: agreeing({k: f() for k, f in runs.items()}, BLOCKS, 1e-3), small)


def runs_of(n: int) -> dict[str, Run]:
    from steelyard.tabular import DistanceCovarianceRegularizer

    generator = torch.Generator().manual_seed(0)
    level = torch.randint(LEVELS, (n,), generator=generator)
    start = torch.randn(n, generator=generator) + 0.3 * level
    attribute = torch.nn.functional.one_hot(level, LEVELS).float()
    penalty = DistanceCovarianceRegularizer("concatenated")

    def step(value: object) -> Run:
        def run() -> Tensor:
            x = start.clone().requires_grad_()
            value(x).backward()  # type: ignore[operator]
            assert x.grad is not None
            return x.grad

        return run

    runs = {
        OURS: step(lambda x: penalty(x, [attribute])),
        BLOCKS: step(lambda x: in_blocks(x, attribute)),
        DENSE: step(lambda x: dense(x, attribute)),
    }
    if n > LARGEST_DENSE:
        del runs[DENSE]
    return runs


def dense(x: Tensor, attribute: Tensor) -> Tensor:
    """Mean product of two U-centred distance matrices."""
    n = len(x)
    centred = []
    for distance in ((x[:, None] - x).abs(), torch.cdist(attribute, attribute)):
        rows = distance.sum(1)
        matrix = distance - rows[:, None] / (n - 2) - rows / (n - 2)
        matrix = matrix + rows.sum() / ((n - 1) * (n - 2))
        centred.append(matrix - torch.diag(matrix.diagonal()))
    return (centred[0] * centred[1]).sum() / (n * (n - 3))


def in_blocks(x: Tensor, attribute: Tensor) -> Tensor:
    """The same from sums, each block computed again for the gradient."""
    n = len(x)

    def sums(first: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = (first[:, None] - x).abs(), torch.cdist(level, attribute)
        return (a * b).sum().double(), a.sum(1).double(), b.sum(1).double()

    parts = [
        checkpoint(sums, *pair, use_reentrant=False)
        for pair in zip(x.split(BLOCK), attribute.split(BLOCK), strict=True)
    ]
    product = torch.stack([part[0] for part in parts]).sum()
    a, b = (torch.cat([part[place] for part in parts]) for place in (1, 2))
    whole = product - 2 * (a * b).sum() / (n - 2) + a.sum() * b.sum() / ((n - 1) * (n - 2))
    return whole / (n * (n - 3))
