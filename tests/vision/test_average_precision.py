"""Average precision against pycocotools, brute force and its own axioms."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.vision import average_precision, mask_average_precision, mask_iou

quick = settings(deadline=None, max_examples=15)
seeds = st.integers(0, 2**31)
close = {"rtol": 0, "atol": 1e-12}


def scene(seed: int, images: int = 4, classes: int = 3, side: int = 12, ties: bool = True):
    """Rectangles as objects; predictions are those moved a little, and repeated ones."""
    rng = np.random.default_rng(seed)
    predictions, targets = [], []

    def rectangle(x, y, w, h):
        mask = torch.zeros(side, side, dtype=torch.bool)
        mask[max(0, y) : y + h, max(0, x) : x + w] = True
        return mask

    for _ in range(images):
        boxes = [tuple(rng.integers((0, 0, 2, 2), (8, 8, 7, 7))) for _ in range(rng.integers(0, 5))]
        labels = [int(rng.integers(classes)) for _ in boxes]
        near = [(x + rng.integers(-1, 2), y + rng.integers(-1, 2), w, h) for x, y, w, h in boxes]
        guesses = near + [b for b in boxes if rng.random() < 0.5]
        guess_labels = labels + [int(rng.integers(classes)) for _ in guesses[len(boxes) :]]
        scores = rng.integers(1, 5, len(guesses)) / 5 if ties else rng.random(len(guesses))
        blank = torch.zeros(0, side, side, dtype=torch.bool)
        targets.append(
            {
                "masks": torch.cat([blank, *(rectangle(*b)[None] for b in boxes)]),
                "labels": torch.tensor(labels, dtype=torch.long),
            }
        )
        predictions.append(
            {
                "masks": torch.cat([blank, *(rectangle(*b)[None] for b in guesses)]),
                "labels": torch.tensor(guess_labels, dtype=torch.long),
                "scores": torch.tensor(scores, dtype=torch.float64),
            }
        )
    return predictions, targets


def coco(predictions, targets, classes, limit):
    """Precision of pycocotools at each threshold, recall and class."""
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    COCO = pytest.importorskip("pycocotools.coco").COCO
    encode = pytest.importorskip("pycocotools.mask").encode

    def rows(images):
        for i, image in enumerate(images):
            for k in range(len(image["masks"])):
                rle = encode(np.asfortranarray(image["masks"][k].numpy().astype(np.uint8)))
                area = float(image["masks"][k].sum())
                score = float(image["scores"][k]) if "scores" in image else 1.0
                yield {
                    "image_id": i,
                    "category_id": int(image["labels"][k]),
                    "segmentation": rle,
                    "area": area,
                    "bbox": [0, 0, 1, 1],
                    "iscrowd": 0,
                    "score": score,
                }

    height, width = targets[0]["masks"].shape[1:]

    def data(images):
        result = COCO()
        result.dataset = {
            "images": [{"id": i, "height": height, "width": width} for i in range(len(images))],
            "categories": [{"id": c} for c in range(classes)],
            "annotations": [{**row, "id": n + 1} for n, row in enumerate(rows(images))],
        }
        result.createIndex()
        return result

    evaluation = cocoeval.COCOeval(data(targets), data(predictions), "segm")
    evaluation.params.maxDets = [limit]
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["precision"][:, :, :, 0, 0]


@quick
@given(seeds, st.sampled_from([1, 2, 300]), st.booleans())
def test_figures_are_those_of_pycocotools(seed, limit, ties):
    predictions, targets = scene(seed, ties=ties)
    got = mask_average_precision(predictions, targets, num_classes=3, max_detections=limit)
    precision = coco(predictions, targets, 3, limit)

    def mean(values):
        counted = values[values > -1]
        return counted.mean() if counted.size else -1.0

    assert got.ap.item() == pytest.approx(mean(precision), abs=1e-12)
    assert got.ap50.item() == pytest.approx(mean(precision[0]), abs=1e-12)
    assert got.ap75.item() == pytest.approx(mean(precision[5]), abs=1e-12)
    each = [mean(precision[:, :, c]) for c in range(3)]
    assert got.per_category.tolist() == pytest.approx(each, abs=1e-12)


def test_an_iou_at_the_threshold_counts():
    """IoU 0.55, 0.6 .. exactly, where the last digit of the threshold decides."""
    for k in range(10, 20):
        masks = torch.zeros(2, 1, 20, dtype=torch.bool)
        masks[0, :, :20], masks[1, :, :k] = True, True
        target = {"masks": masks[:1], "labels": torch.tensor([0])}
        found = {"masks": masks[1:], "labels": torch.tensor([0]), "scores": torch.ones(1)}
        result = mask_average_precision([found], [target])
        precision = coco([found], [target], 1, 300)
        assert result.ap.item() == pytest.approx(precision.mean(), abs=1e-12)


@quick
@given(seeds)
def test_perfect_predictions_score_one_and_a_wrong_label_zero(seed):
    _, targets = scene(seed)
    found = [{**t, "scores": torch.rand(len(t["labels"]))} for t in targets]
    present = torch.cat([t["labels"] for t in targets])
    if len(present) == 0:
        return
    result = mask_average_precision(found, targets, num_classes=4)
    assert result.ap == result.ap50 == result.ap75 == 1
    expected = [1.0 if c in present else -1.0 for c in range(4)]
    assert result.per_category.tolist() == expected
    wrong = [{**f, "labels": f["labels"] * 0 + 3} for f in found]
    assert mask_average_precision(wrong, targets, num_classes=4).ap == 0


@quick
@given(seeds)
def test_taking_false_positives_away_never_lowers_it(seed):
    predictions, targets = scene(seed, ties=False)
    before = mask_average_precision(predictions, targets, num_classes=3)
    cleaned = []
    for found, target in zip(predictions, targets, strict=True):
        best = torch.zeros(len(found["labels"]))
        if len(target["labels"]):
            same = found["labels"][:, None] == target["labels"]
            best = (mask_iou(found["masks"], target["masks"]) * same).amax(1)
        cleaned.append({key: value[best >= 0.5] for key, value in found.items()})
    after = mask_average_precision(cleaned, targets, num_classes=3)
    assert (after.per_category >= before.per_category - 1e-12).all()


def test_hand_calculation():
    """True, false, true among two objects: precision 1 to recall 0.5, then 2/3."""
    masks = torch.zeros(3, 3, 3, dtype=torch.bool)
    for k in range(3):
        masks[k, k] = True
    target = {"masks": masks[[0, 2]], "labels": torch.zeros(2, dtype=torch.long)}
    found = {
        "masks": masks,
        "labels": torch.zeros(3, dtype=torch.long),
        "scores": torch.tensor([0.9, 0.8, 0.7]),
    }
    expected = (51 + 50 * 2 / 3) / 101
    result = mask_average_precision([found], [target])
    assert result.ap.item() == pytest.approx(expected, abs=1e-12)
    cut = mask_average_precision([found], [target], max_detections=2)
    assert cut.ap.item() == pytest.approx(51 / 101, abs=1e-12)


def test_no_ground_truth_is_minus_one_and_no_prediction_zero():
    blank = torch.zeros(0, 4, 4, dtype=torch.bool)
    none = {"masks": blank, "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}
    one = {"masks": torch.ones(1, 4, 4, dtype=torch.bool), "labels": torch.tensor([1])}
    empty = mask_average_precision([none], [none])
    assert [x.tolist() for x in empty] == [-1.0, -1.0, -1.0, [-1.0]]
    missed = mask_average_precision([none], [one])
    assert missed.per_category.tolist() == [-1.0, 0.0]
    assert missed.ap == 0
    extra = mask_average_precision([{**one, "scores": torch.ones(1)}], [none])
    assert extra.ap == -1


@quick
@given(seeds, st.sampled_from([7, 2**23]))
def test_iou_is_the_double_loop_whatever_the_block(seed, block):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.rand(3, 4, 5, generator=g) > 0.5, torch.rand(2, 4, 5, generator=g) > 0.7
    expected = [[float((x & y).sum()) / max(1.0, float((x | y).sum())) for y in b] for x in a]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(average_precision, "PIXELS_AT_ONCE", block)
        got = mask_iou(a, b)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), **close)
    torch.testing.assert_close(mask_iou(b, a), got.T, **close)
    assert mask_iou(a, b).max() <= 1


def test_iou_of_empty_masks_and_of_none():
    empty = torch.zeros(1, 3, 3, dtype=torch.bool)
    assert mask_iou(empty, empty).tolist() == [[0.0]]
    assert mask_iou(empty[:0], empty).shape == (0, 1)


M = torch.ones(1, 2, 2, dtype=torch.bool)
T = {"masks": M, "labels": torch.tensor([0])}
D = {**T, "scores": torch.ones(1)}


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: mask_iou(M.int(), M), TypeError, "a must"),
        (lambda: mask_iou(M, M[0]), ValueError, "b must"),
        (lambda: mask_iou(M, torch.ones(1, 3, 2, dtype=torch.bool)), ValueError, "b must"),
        (lambda: mask_average_precision([], []), ValueError, "predictions"),
        (lambda: mask_average_precision([D], []), ValueError, "targets"),
        (lambda: mask_average_precision([T], [T]), ValueError, "scores"),
        (lambda: mask_average_precision([D], [T], max_detections=0), ValueError, "max_detections"),
        (lambda: mask_average_precision([D], [T], num_classes=0), ValueError, "num_classes"),
        (
            lambda: mask_average_precision(
                [D], [{**T, "labels": torch.tensor([5])}], num_classes=2
            ),
            ValueError,
            "labels",
        ),
        (
            lambda: mask_average_precision([{**D, "scores": torch.tensor([torch.nan])}], [T]),
            ValueError,
            "NaN",
        ),
        (
            lambda: mask_average_precision([{**D, "labels": torch.ones(1)}], [T]),
            TypeError,
            "labels",
        ),
        (lambda: mask_average_precision([{**D, "masks": M.int()}], [T]), TypeError, "masks"),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()
