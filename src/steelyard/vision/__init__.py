"""Pasting objects into training images, and measures of what that does: DiverGen."""

from steelyard.vision.average_precision import (
    MaskAveragePrecision,
    mask_average_precision,
    mask_iou,
)
from steelyard.vision.cutouts import (
    PasteSize,
    PlacedCutout,
    corner_foreground,
    largest_component,
    paste_size,
    place_cutout,
)
from steelyard.vision.diversity import (
    BalancedDraws,
    InterSimilarity,
    RepeatFactors,
    RepeatRange,
    balanced_draws,
    federated_classes,
    federated_weights,
    free_energy,
    grouped_average,
    inter_similarity,
    repeat_factors,
    repeat_range,
    train_validation_gap,
)
from steelyard.vision.instance_paste import PastedInstance, mask_boxes, paste_instance

__all__ = [
    "BalancedDraws",
    "InterSimilarity",
    "MaskAveragePrecision",
    "PasteSize",
    "PastedInstance",
    "PlacedCutout",
    "RepeatFactors",
    "RepeatRange",
    "balanced_draws",
    "corner_foreground",
    "federated_classes",
    "federated_weights",
    "free_energy",
    "grouped_average",
    "inter_similarity",
    "largest_component",
    "mask_average_precision",
    "mask_boxes",
    "mask_iou",
    "paste_instance",
    "paste_size",
    "place_cutout",
    "repeat_factors",
    "repeat_range",
    "train_validation_gap",
]
