"""Distillation: rankings of classes, transport between batches, advantage of aligned teachers."""

from steelyard.distillation.advantage_guided import (
    adpa_loss,
    adpa_term,
    dckd_loss,
    teacher_advantage,
)
from steelyard.distillation.baselines import dist_loss, kd_loss
from steelyard.distillation.plackett_luce import plackett_luce_loss, pld_loss
from steelyard.distillation.sinkhorn_kd import sinkhorn_kd_loss

__all__ = [
    "adpa_loss",
    "adpa_term",
    "dckd_loss",
    "dist_loss",
    "kd_loss",
    "plackett_luce_loss",
    "pld_loss",
    "sinkhorn_kd_loss",
    "teacher_advantage",
]
