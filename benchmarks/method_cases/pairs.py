"""TCM with its gradient, and OPIS, over all pairs of a batch."""

from collections.abc import Callable

import torch
from torch import Tensor

from paired import OURS, Contest, Run, agreeing

# One and the same, up to pairs exactly on a margin. The first indexes rows of every pair: 68 GB at
# 8192 items.
PML_TCM = "pytorch-metric-learning TCM"
PML = "pytorch-metric-learning Contrastive"
DENSE = "plain torch, dense, 100 thresholds"
DENSE_EXACT = "plain torch, dense, exact"
BOTH = "pytorch-metric-learning and plain torch"
PER_CLASS = 16
THRESHOLDS = 100


def contest(task: str, n: int, width: int) -> Contest:
    """``task`` is ``"tcm"``, ``"opis"`` or ``"tcm_opis"``."""
    losses, scores = tcm_runs(n, width), opis_runs(n, width)
    small_losses, small_scores = tcm_runs(256, width), opis_runs(256, width)

    def errors() -> dict[str, float]:
        found = {name: run() for name, run in losses.items()} if task != "opis" else {}
        agreed = agreeing(found, PML, 1e-2) if found else {}
        if task != "tcm":
            # The grid has an error of its own: ours on the same grid must agree with it.
            exact = {OURS: scores[OURS](), DENSE_EXACT: scores[DENSE_EXACT]()}
            grid = {OURS: ours_on_the_grid(n, width), DENSE: scores[DENSE]()}
            agreed |= agreeing(grid, OURS, 1e-3) | agreeing(exact, DENSE_EXACT, 1e-4)
        return agreed

    if task == "tcm":
        return Contest(losses, errors, small_losses)
    if task == "opis":
        return Contest(scores, errors, small_scores)

    def both(losses: dict[str, Run], scores: dict[str, Run]) -> dict[str, Run]:
        return {
            OURS: lambda: (losses[OURS](), scores[OURS]()),
            BOTH: lambda: (losses[PML](), scores[DENSE]()),
        }

    return Contest(both(losses, scores), errors, both(small_losses, small_scores))


def batch(n: int, width: int) -> tuple[Tensor, Tensor]:
    """Rows around a centre for each class, some classes tighter than others."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) // PER_CLASS
    classes = n // PER_CLASS
    centres = torch.randn(classes, width, generator=generator)
    spread = 0.3 + 0.7 * torch.rand(classes, 1, generator=generator)
    rows = centres[labels] + spread[labels] * torch.randn(n, width, generator=generator)
    order = torch.randperm(n, generator=generator)
    return rows[order] + 1.5, labels[order]  # off the origin: negatives with a positive cosine


def tcm_runs(n: int, width: int) -> dict[str, Run]:
    from pytorch_metric_learning import distances, losses, reducers

    from steelyard.metric_learning import tcm_loss

    rows, labels = batch(n, width)
    rows.requires_grad_()

    def with_gradient(loss: Callable[[Tensor, Tensor], Tensor]) -> Run:
        def run() -> Tensor:
            rows.grad = None
            loss(rows, labels).backward()
            assert rows.grad is not None
            return rows.grad

        return run

    contrastive = losses.ContrastiveLoss(
        pos_margin=0.9,
        neg_margin=0.5,
        distance=distances.CosineSimilarity(),
        reducer=reducers.AvgNonZeroReducer(),
    )
    runs = {OURS: with_gradient(tcm_loss), PML: with_gradient(contrastive)}
    if n <= 1024:
        runs[PML_TCM] = with_gradient(losses.ThresholdConsistentMarginLoss())
    return runs


def opis_runs(n: int, width: int) -> dict[str, Run]:
    from steelyard.metric_learning import opis

    rows, labels = batch(n, width)
    return {
        OURS: lambda: opis(rows, labels).opis,
        DENSE: lambda: dense_opis(rows, labels),
        DENSE_EXACT: lambda: dense_exact_opis(rows, labels),
    }


def ours_on_the_grid(n: int, width: int) -> Tensor:
    from steelyard.metric_learning import opis

    return opis(*batch(n, width), grid=THRESHOLDS).opis


def utilities(within: Tensor, across: Tensor) -> Tensor:
    """From the shares of accepted pairs of a class, and of pairs between it and the others."""
    total = within + (1 - across)
    return torch.where(total > 0, 2 * within * (1 - across) / total.clamp(min=1e-12), 0.0)


def dense_distances(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return all distances, which pairs are of one class, and the range of thresholds."""
    unit = torch.nn.functional.normalize(rows)
    distances = (2 - 2 * (unit @ unit.T)).clamp_(min=0).sqrt_()
    same = labels[:, None] == labels
    negatives = distances[~same]  # each pair twice, which moves no quantile
    ends = []
    for rate in (0.01, 0.1):
        position = rate * (len(negatives) - 1)
        low = negatives.kthvalue(int(position) + 1).values
        ends.append(low)
    return distances, same, torch.stack(ends)


def dense_opis(rows: Tensor, labels: Tensor) -> Tensor:
    """What one writes: all distances in float32, counted between the thresholds of a grid."""
    distances, same, (low, high) = dense_distances(rows, labels)
    classes = int(labels.max()) + 1
    at = torch.linspace(0, 1, THRESHOLDS) * (high - low) + low
    place = torch.bucketize(distances, at, out_int32=True)
    place += labels[:, None].int() * (THRESHOLDS + 1)
    same.fill_diagonal_(False)
    every = torch.bincount(place.flatten(), minlength=classes * (THRESHOLDS + 1))
    inside = torch.bincount(place[same], minlength=classes * (THRESHOLDS + 1))
    itself = torch.zeros_like(every)  # the diagonal, at distance 0 up to rounding
    itself.index_add_(0, place.diagonal(), torch.ones(len(labels), dtype=torch.long))
    counts = (x.view(classes, -1).double() for x in (inside, every - inside - itself))
    accepted = [(c.cumsum(1) / c.sum(1, keepdim=True))[:, :-1] for c in counts]
    return utilities(*accepted).var(0, correction=0).mean()


def dense_exact_opis(rows: Tensor, labels: Tensor) -> Tensor:
    """The exact integral with whole matrices: every distance sorted with what it changes."""
    distances, same, (low, high) = dense_distances(rows.double(), labels)
    classes = int(labels.max()) + 1
    total, places, changes = torch.zeros(2), [low[None]], [torch.zeros(1, 2)]
    for label in range(classes):
        mine = distances[labels == label]
        own = same[labels == label]
        square = mine[:, labels == label]
        row, column = torch.triu_indices(len(square), len(square), 1)
        within, across = square[row, column].sort().values, mine[~own].sort().values
        steps = [x[(x > low) & (x < high)] for x in (within, across)]
        place = torch.cat((low[None], *steps)).sort().values
        accepted = (
            torch.searchsorted(x, place, right=True).double() / len(x) for x in (within, across)
        )
        values = utilities(*accepted)
        powers = torch.stack((values, values.square()), 1)
        total = total + powers[0]
        places.append(place[1:])
        changes.append(powers.diff(dim=0))
    place, order = torch.cat(places).sort()
    sums = (total + torch.cat(changes)[order].cumsum(0)) / classes
    width = torch.cat((place, high[None])).diff() / (high - low)
    return ((sums[:, 1] - sums[:, 0].square()) * width).sum()
