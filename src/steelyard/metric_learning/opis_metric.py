"""OPIS as a torchmetrics object, for trainers.

Loaded when first asked for; needs torchmetrics (``steelyard[metrics]``).
"""

from typing import Any

import torch
from torch import Tensor

from steelyard._checks import check_floating, check_groups, check_shape
from steelyard._extras import require
from steelyard.metric_learning.operating_points import OPIS, check_settings, opis

_torchmetrics = require("torchmetrics", extra="metrics")

__all__ = ["OPISMetric"]


class OPISMetric(_torchmetrics.Metric):  # type: ignore[misc, name-defined]
    r"""Operating-point inconsistency over all batches of an epoch, see :func:`opis`.

    Embeddings and labels are stored, and gathered across processes when computed. Pass
    ``compute_on_cpu=True`` to store them on the CPU.

    Args:
        far_range: as in :func:`opis`.
        threshold_range: as in :func:`opis`.
        grid: as in :func:`opis`.
        **options: of ``torchmetrics.Metric``, which refuses names it does not know.

    Raises:
        TypeError: a range is not two numbers, or ``grid`` no integer.
        ValueError: a range that is empty or out of bounds, or fewer than two thresholds.

    Example:
        Batches give the score of the whole:

        >>> import torch
        >>> angle = torch.tensor([-5.0, 5.0, 80.0, 100.0]).deg2rad()
        >>> rows, labels = torch.stack((angle.cos(), angle.sin()), -1), torch.tensor([0, 0, 1, 1])
        >>> metric = OPISMetric(threshold_range=(0.1, 0.5))
        >>> metric.update(rows[:3], labels[:3])
        >>> metric.update(rows[3:], labels[3:])
        >>> metric.compute()
        tensor(0.1081)

    Source: Zhang et al. (2024), Sec. 3, arXiv:2307.04047.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    embeddings: list[Tensor]
    labels: list[Tensor]

    def __init__(
        self,
        *,
        far_range: tuple[float, float] = (0.01, 0.1),
        threshold_range: tuple[float, float] | None = None,
        grid: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_settings(far_range, threshold_range, grid)
        self.far_range = far_range
        self.threshold_range = threshold_range
        self.grid = grid
        self.add_state("embeddings", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")

    def update(self, embeddings: Tensor, labels: Tensor) -> None:
        """Store a batch: embeddings ``[N, D]`` and integer labels ``[N]``."""
        check_floating(embeddings=embeddings)
        check_shape("embeddings", embeddings, (None, None))
        check_groups(labels, embeddings, name="labels")
        self.embeddings.append(embeddings.detach())
        self.labels.append(labels)

    def compute(self) -> Tensor:
        """Return the score of everything stored, 0-d."""
        return self.details().opis

    def details(self) -> OPIS:
        """Return the score with the mean utility and the range, of what this process stored."""
        embeddings, labels = (
            torch.cat(state) if isinstance(state, list) else state
            for state in (self.embeddings, self.labels)
        )
        return opis(
            embeddings,
            labels,
            far_range=self.far_range,
            threshold_range=self.threshold_range,
            grid=self.grid,
        )
