r"""Average precision of instance masks, as COCO defines it.

Sources: Lin et al. (2014), Microsoft COCO, arXiv:1405.0312; Gupta, Dollar, Girshick (2019), LVIS,
arXiv:1908.03195.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from steelyard._checks import check_count, check_floating, check_integer_dtype, check_shape

__all__ = ["MaskAveragePrecision", "mask_average_precision", "mask_iou"]

THRESHOLDS = 10  # 0.50, 0.55 .. 0.95
RECALLS = 101  # 0, 0.01 .. 1
# Pixels of all masks that are widened to floating point at once: 32 MB.
PIXELS_AT_ONCE = 2**23


class MaskAveragePrecision(NamedTuple):
    """What :func:`mask_average_precision` returns, in double precision.

    ``ap`` is over ten IoU thresholds, ``ap50`` and ``ap75`` at one; each is a mean over categories
    with ground truth, and -1 if there is none. ``per_category`` is ``[C]``, -1 without ground
    truth.
    """

    ap: Tensor
    ap50: Tensor
    ap75: Tensor
    per_category: Tensor


class _Matches(NamedTuple):
    scores: Tensor
    """Of one category's predictions in one image, falling, ``[D]``."""
    hits: Tensor
    """Whether each found an object of its own at each threshold, boolean ``[10, D]``."""


def mask_iou(a: Tensor, b: Tensor) -> Tensor:
    r"""Intersection over union of each pair of masks.

    .. math:: \mathrm{IoU}_{mn} = |A_m \cap B_n| \,/\, |A_m \cup B_n|

    Args:
        a: boolean, ``[M, H, W]``; ``M = 0`` is allowed.
        b: boolean, ``[N, H, W]``.

    Returns:
        ``[M, N]`` in double precision; 0 for two empty masks.

    Raises:
        ValueError: shapes that do not fit. TypeError: not boolean.

    Example:
        >>> import torch
        >>> left = torch.tensor([[[True, True, False]]])
        >>> right = torch.tensor([[[False, True, True]]])
        >>> mask_iou(left, right)
        tensor([[0.3333]], dtype=torch.float64)

    Source: Lin et al. (2014), arXiv:1405.0312.
    """
    _check_masks("a", a)
    _check_masks("b", b)
    check_shape("b", b, (None, *a.shape[1:]))
    flat_a, flat_b = (masks.as_subclass(Tensor).flatten(1) for masks in (a, b))
    shape = (len(flat_a), len(flat_b))
    intersection = torch.zeros(shape, dtype=torch.float64, device=a.device)
    block = max(1, PIXELS_AT_ONCE // max(1, sum(shape)))
    for start in range(0, flat_a.shape[1], block):
        # Counts of at most 2^23 pixels are exact in single precision.
        part_a = flat_a[:, start : start + block].float()
        part_b = flat_b[:, start : start + block].float()
        intersection += (part_a @ part_b.T).double()
    union = flat_a.sum(1)[:, None] + flat_b.sum(1)[None] - intersection
    return intersection / union.clamp(min=1)


def mask_average_precision(
    predictions: Sequence[Mapping[str, Tensor]],
    targets: Sequence[Mapping[str, Tensor]],
    *,
    num_classes: int | None = None,
    max_detections: int = 300,
) -> MaskAveragePrecision:
    r"""Average precision of predicted masks: the mean height of the precision-recall curve.

    At a threshold, predictions of a category are taken by falling score; each takes the free object
    of its image with the largest IoU at or above the threshold, or is false. With precision made
    monotone from the right,

    .. math:: \mathrm{AP} = \frac{1}{101} \sum_{k=0}^{100}
        \max_{r \ge k / 100} \mathrm{precision}(r)

    averaged over IoU 0.50, 0.55 .. 0.95 and over categories with ground truth. Equal to pycocotools
    without crowd regions, area limits or per-image lists of absent categories.

    Args:
        predictions: one mapping for each image: ``masks`` boolean ``[K, H, W]``, ``labels`` integer
            ``[K]``, ``scores`` ``[K]``.
        targets: as many, with ``masks`` and ``labels``.
        num_classes: ``C``; ``None`` = largest label + 1.
        max_detections: kept for each image and category, those with the largest scores, >= 1.

    Returns:
        ``ap``, ``ap50``, ``ap75``, ``per_category``.

    Raises:
        ValueError: no image, different numbers of images, shapes that do not fit, a label out of
            range, or scores that are NaN.
        TypeError: wrong dtypes.

    Example:
        A perfect prediction, and a second object that is missed:

        >>> import torch
        >>> masks = torch.tensor([[[True, False]], [[False, True]]])
        >>> labels = torch.tensor([0, 0])
        >>> found = {"masks": masks[:1], "labels": labels[:1], "scores": torch.tensor([0.9])}
        >>> result = mask_average_precision([found], [{"masks": masks, "labels": labels}])
        >>> round(float(result.ap), 4)  # recall 0.5: 51 of 101 points
        0.505

    Source: Lin et al. (2014), arXiv:1405.0312.
    """
    for name, images in (("predictions", predictions), ("targets", targets)):
        if not isinstance(images, Sequence):
            raise TypeError(f"{name} must be a sequence, got {type(images).__name__}")
        for i, image in enumerate(images):
            if not isinstance(image, Mapping):
                raise TypeError(f"{name}[{i}] must be a mapping, got {type(image).__name__}")
    if len(predictions) == 0:
        raise ValueError("predictions must have at least one image, got none")
    if len(predictions) != len(targets):
        raise ValueError(f"targets must have {len(predictions)} images, got {len(targets)}")
    check_count("max_detections", max_detections)
    for i, (predicted, target) in enumerate(zip(predictions, targets, strict=True)):
        _check_image(f"predictions[{i}]", predicted, scored=True)
        _check_image(f"targets[{i}]", target, scored=False)
    classes = _number_of_classes([*predictions, *targets], num_classes)
    precision = torch.full((classes, THRESHOLDS), -1.0, dtype=torch.float64)
    for category in range(classes):
        objects = sum(int((target["labels"] == category).sum()) for target in targets)
        if objects > 0:
            matches = [
                _match_image(predicted, target, category, max_detections)
                for predicted, target in zip(predictions, targets, strict=True)
            ]
            precision[category] = _average_precision(matches, objects)
    counted = precision[precision[:, 0] >= 0]
    if len(counted) == 0:
        counted = torch.full((1, THRESHOLDS), -1.0, dtype=torch.float64)
    means = (counted.mean(), counted[:, 0].mean(), counted[:, 5].mean(), precision.mean(1))
    device = targets[0]["masks"].device
    return MaskAveragePrecision(*(mean.to(device) for mean in means))


def _match_image(
    predicted: Mapping[str, Tensor], target: Mapping[str, Tensor], category: int, limit: int
) -> _Matches:
    """Match one category in one image, greedily by falling score, at all thresholds at once."""
    mine = (predicted["labels"] == category).nonzero().squeeze(1)
    scores = predicted["scores"][mine].detach().double().cpu()
    order = scores.argsort(descending=True, stable=True)[:limit]
    scores = scores[order]
    hits = torch.zeros(THRESHOLDS, len(scores), dtype=torch.bool)
    objects = target["masks"][target["labels"] == category]
    if len(scores) == 0 or len(objects) == 0:
        return _Matches(scores, hits)
    # Reversed, because a later object wins a tie, and the first maximum is the one found.
    iou = mask_iou(predicted["masks"][mine[order.to(mine.device)]], objects).cpu().flip(1)
    threshold = _thresholds()
    free = torch.ones(THRESHOLDS, len(objects), dtype=torch.bool)
    for d in range(len(scores)):
        best, place = torch.where(free, iou[d], -1.0).max(1)
        hits[:, d] = best >= threshold
        free[hits[:, d], place[hits[:, d]]] = False
    return _Matches(scores, hits)


def _thresholds() -> Tensor:
    # NumPy's, because an IoU may equal a threshold and the last digit of PyTorch's differs.
    return torch.from_numpy(np.linspace(0.5, 0.95, THRESHOLDS))


def _average_precision(matches: Sequence[_Matches], objects: int) -> Tensor:
    """Mean over 101 recalls of the monotone precision, ``[10]``."""
    scores = torch.cat([match.scores for match in matches])
    hits = torch.cat([match.hits for match in matches], dim=1)
    if len(scores) == 0:
        return torch.zeros(THRESHOLDS, dtype=torch.float64)
    hits = hits[:, scores.argsort(descending=True, stable=True)]
    true = hits.double().cumsum(1)
    precision = true / torch.arange(1, len(scores) + 1, dtype=torch.float64)
    precision = precision.flip(1).cummax(1).values.flip(1)
    recall = true / objects
    wanted = torch.from_numpy(np.linspace(0.0, 1.0, RECALLS)).repeat(THRESHOLDS, 1)
    place = torch.searchsorted(recall, wanted)
    padded = torch.cat((precision, precision.new_zeros(THRESHOLDS, 1)), dim=1)
    return padded.gather(1, place).mean(1)


def _number_of_classes(images: Sequence[Mapping[str, Tensor]], num_classes: int | None) -> int:
    labels = torch.cat([image["labels"].flatten().cpu().long() for image in images])
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, -1)
    classes = max(1, high + 1) if num_classes is None else num_classes
    check_count("num_classes", classes)
    if low < 0 or high >= classes:
        raise ValueError(f"labels must lie in [0, {classes}), got {low} to {high}")
    return classes


def _check_image(name: str, image: Mapping[str, Tensor], *, scored: bool) -> None:
    keys = ("masks", "labels", "scores") if scored else ("masks", "labels")
    missing = [key for key in keys if key not in image]
    if missing:
        raise ValueError(f"{name} must have {', '.join(keys)}, got {', '.join(image) or 'nothing'}")
    _check_masks(f"{name}['masks']", image["masks"])
    check_shape(f"{name}['labels']", image["labels"], (len(image["masks"]),))
    check_integer_dtype(**{f"{name}['labels']": image["labels"]})
    if scored:
        check_shape(f"{name}['scores']", image["scores"], (len(image["masks"]),))
        check_floating(**{f"{name}['scores']": image["scores"]})
        if bool(image["scores"].isnan().any()):
            raise ValueError(f"{name}['scores'] must not be NaN")


def _check_masks(name: str, masks: Tensor) -> None:
    check_shape(name, masks, (None, None, None))
    if masks.dtype != torch.bool:
        raise TypeError(f"{name} must have dtype torch.bool, got {masks.dtype}")
