"""LDR with the weights of the k largest gaps capped, forward and backward."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from paired import OURS, Contest, Run, agreeing

LEVEL, SCALE = "plain torch, bisection of the level", "plain torch, bisection of the scale"
HALVINGS = 30  # leave nothing that float32 could tell
MARGIN = 0.1


def contest(rows: int, classes: int, top_k: int) -> Contest:
    """The mean over ``rows`` items at temperature 1."""
    runs = runs_of(rows, classes, top_k)
    # One small problem in which the cap binds and one of the size.
    small = runs_of(8, 50, top_k)

    def errors() -> dict[str, float]:
        agreeing({name: run() for name, run in small.items()}, LEVEL, 1e-4)
        return agreeing({name: run() for name, run in runs.items()}, LEVEL, 1e-4)

    return Contest(runs, errors, small)


def runs_of(rows: int, classes: int, top_k: int) -> dict[str, Run]:
    from steelyard.classification import ldr_loss

    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(rows, classes, generator=generator)
    labels = torch.randint(classes, (rows,), generator=generator)
    logits.requires_grad_()

    def with_gradient(loss: Callable[[Tensor, Tensor], Tensor]) -> Run:
        def run() -> Tensor:
            logits.grad = None
            loss(logits, labels).backward()
            assert logits.grad is not None
            return logits.grad

        return run

    return {
        OURS: with_gradient(lambda f, y: ldr_loss(f, y, margin=MARGIN, top_k=top_k)),
        LEVEL: with_gradient(lambda f, y: bisected(f, y, top_k, weights_by_level)),
        SCALE: with_gradient(lambda f, y: bisected(f, y, top_k, weights_by_scale)),
    }


def bisected(
    logits: Tensor, labels: Tensor, top_k: int, weights: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """``sum p d - sum p log(K p)`` at the best ``p``, which by Danskin needs no gradient."""
    own = logits.gather(1, labels[:, None])
    gaps = logits - own + MARGIN
    gaps = gaps.scatter(1, labels[:, None], 0.0)
    with torch.no_grad():
        p = weights(gaps, top_k)
        penalty = torch.special.xlogy(p, p * logits.shape[1]).sum(1)
    return ((p * gaps).sum(1) - penalty).mean()


def weights_by_level(gaps: Tensor, top_k: int) -> Tensor:
    """Halve the bracket of ``nu`` in ``sum min(1/k, exp(d - nu)) = 1``."""
    top = gaps.amax(1, keepdim=True)
    low, high = top - 1 - math.log(gaps.shape[1]), top + math.log(gaps.shape[1]) + 1
    low = torch.minimum(low, gaps.logsumexp(1, keepdim=True) - 20)
    for _ in range(HALVINGS):
        level = (low + high) / 2
        much = (gaps - level).exp_().clamp_(max=1 / top_k).sum(1, keepdim=True) > 1
        low, high = torch.where(much, level, low), torch.where(much, high, level)
    return (gaps - (low + high) / 2).exp_().clamp_(max=1 / top_k)


def weights_by_scale(gaps: Tensor, top_k: int) -> Tensor:
    """The same with the exponentials taken once; loses items far below the largest gap."""
    shares = gaps.softmax(1)
    low, high = torch.zeros(len(gaps), 1), torch.full((len(gaps), 1), 20.0)
    for _ in range(HALVINGS):
        scale = (low + high) / 2
        much = (shares * scale.exp()).clamp_(max=1 / top_k).sum(1, keepdim=True) > 1
        low, high = torch.where(much, low, scale), torch.where(much, scale, high)
    return (shares * ((low + high) / 2).exp()).clamp_(max=1 / top_k)
