"""Metric learning: consistent thresholds, contrastive losses with several heads, reranking."""

from typing import TYPE_CHECKING, Any

from steelyard.metric_learning.contrastive import (
    barlow_twins_loss,
    moco_loss,
    simclr_loss,
    simsiam_loss,
)
from steelyard.metric_learning.multi_head import (
    MultiHeadContrastive,
    PairTemperature,
    adaptive_temperature_loss,
    bounded_temperature,
    temperature_penalty,
)
from steelyard.metric_learning.operating_points import (
    OPIS,
    OperatingPoints,
    operating_point_utility,
    opis,
)
from steelyard.metric_learning.ranking_metrics import ndcg, recall, reciprocal_rank
from steelyard.metric_learning.reranking import (
    contrastive_rerank_loss,
    rerank_weights,
    sft_rerank_loss,
    unified_rerank_loss,
)
from steelyard.metric_learning.threshold_consistent import tcm_loss

if TYPE_CHECKING:
    from steelyard.metric_learning.opis_metric import OPISMetric

__all__ = [
    "OPIS",
    "MultiHeadContrastive",
    "OPISMetric",
    "OperatingPoints",
    "PairTemperature",
    "adaptive_temperature_loss",
    "barlow_twins_loss",
    "bounded_temperature",
    "contrastive_rerank_loss",
    "moco_loss",
    "ndcg",
    "operating_point_utility",
    "opis",
    "recall",
    "reciprocal_rank",
    "rerank_weights",
    "sft_rerank_loss",
    "simclr_loss",
    "simsiam_loss",
    "tcm_loss",
    "temperature_penalty",
    "unified_rerank_loss",
]


def __getattr__(name: str) -> Any:
    # torchmetrics is optional: its metric is loaded when asked for
    if name == "OPISMetric":
        from steelyard.metric_learning.opis_metric import OPISMetric

        return OPISMetric
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
