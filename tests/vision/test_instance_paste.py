"""Pasting: what it must leave alone, what it must repair, and the four ways to blend."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from steelyard.vision import mask_boxes, paste_instance

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)
BLENDS = ["basic", "alpha", "gaussian", "poisson"]


def scene(seed: int, count: int = 4, height: int = 12, width: int = 15, dtype=torch.uint8):
    """An image, disjoint masks, labels, a source and an opacity with a soft edge."""
    g = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, height, width), generator=g).to(dtype)
    source = torch.randint(0, 256, (3, height, width), generator=g).to(dtype)
    owner = torch.randint(0, count + 2, (height // 3, width // 3), generator=g)
    owner = owner.repeat_interleave(3, 0).repeat_interleave(3, 1)
    masks = torch.stack([owner == k for k in range(count)]) if count else owner[None][:0].bool()
    alpha = torch.zeros(height, width)
    top, left = (int(torch.randint(0, 6, (), generator=g)) for _ in range(2))
    alpha[top : top + 5, left : left + 7] = torch.rand(5, 7, generator=g)[: height - top]
    labels = torch.arange(10, 10 + count)
    return image, masks, labels, source, alpha


def tight_box(mask: torch.Tensor) -> list[float]:
    places = mask.nonzero()
    if len(places) == 0:
        return [0.0] * 4
    (top, left), (bottom, right) = places.amin(0).tolist(), places.amax(0).tolist()
    return [float(left), float(top), float(right + 1), float(bottom + 1)]


@quick
@given(seeds)
def test_masks_stay_disjoint_and_boxes_tight(seed):
    image, masks, labels, source, alpha = scene(seed)
    result = paste_instance(image, masks, labels, source, alpha, 3)
    assert result.masks.sum(0).max() <= 1
    assert result.boxes.tolist() == [tight_box(mask) for mask in result.masks]
    pasted = alpha >= 0.5
    assert torch.equal(result.masks[-1], pasted)
    assert torch.equal(result.masks[:-1], (masks & ~pasted)[result.keep])
    assert result.labels.tolist() == [*labels[result.keep].tolist(), 3]
    union = result.masks.any(0)
    lost = masks.any(0) & ~union
    assert not (lost & ~masks[~result.keep].any(0)).any()  # only dropped objects lose pixels


@quick
@given(seeds, st.integers(0, 6), st.integers(0, 40), st.booleans())
def test_keep_is_the_published_rule_minus_empty_masks(seed, box, area, drop):
    image, masks, labels, source, alpha = scene(seed, count=6)
    options = {"box_threshold": box, "area_threshold": area, "drop_empty": drop}
    result = paste_instance(image, masks, labels, source, alpha, 3, **options)
    for mask, keep in zip(masks, result.keep.tolist(), strict=True):
        left = mask & (alpha < 0.5)
        moved = max(abs(a - b) for a, b in zip(tight_box(left), tight_box(mask), strict=True))
        expected = moved <= box or int(left.sum()) > area
        assert keep == (expected and not (drop and not left.any()))


def test_a_covered_object_in_the_first_pixels_is_kept_empty_by_the_published_rule():
    image = source = torch.zeros(3, 32, 32, dtype=torch.uint8)
    masks, alpha = torch.zeros(2, 32, 32, dtype=torch.bool), torch.zeros(32, 32)
    masks[0, 1:8, 1:8] = masks[1, 15:25, 15:25] = True
    alpha[:28, :28] = 1.0
    labels = torch.tensor([1, 2])
    published = paste_instance(image, masks, labels, source, alpha, 3, drop_empty=False)
    assert published.keep.tolist() == [True, False]
    assert published.boxes[0].tolist() == [0.0] * 4
    assert paste_instance(image, masks, labels, source, alpha, 3).labels.tolist() == [3]


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float16, torch.float64])
def test_an_empty_paste_changes_nothing(blend, dtype):
    image, masks, labels, source, alpha = scene(0, dtype=dtype)
    masks = masks[masks.any(2).any(1)]
    labels = labels[: len(masks)]
    result = paste_instance(image, masks, labels, source, 0 * alpha, 3, blend=blend)
    assert torch.equal(result.image, image)
    assert torch.equal(result.masks, masks)
    assert torch.equal(result.labels, labels)
    assert result.keep.all()
    assert result.image.dtype == dtype


@pytest.mark.parametrize("blend", BLENDS)
def test_a_full_paste_replaces_the_image_and_hides_everything(blend):
    image, masks, labels, source, alpha = scene(0)
    result = paste_instance(image, masks, labels, source, 0 * alpha + 1, 3, blend=blend)
    assert torch.equal(result.image, source)
    assert not result.keep.any()
    assert result.labels.tolist() == [3]
    assert result.boxes.tolist() == [[0.0, 0.0, 15.0, 12.0]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_binary_alpha_blending_is_the_basic_one(dtype):
    image, masks, labels, source, alpha = scene(1, dtype=dtype)
    hard = (alpha >= 0.5).float()
    pair = [paste_instance(image, masks, labels, source, hard, 3, blend=b) for b in BLENDS[:2]]
    assert torch.equal(pair[0].image, pair[1].image)
    assert torch.equal(pair[0].image, torch.where(hard.bool(), source, image))


def test_alpha_mixes_and_rounds_to_the_nearest():
    image = torch.tensor([[[100, 0, 255]]], dtype=torch.uint8).expand(3, 1, 3)
    source = torch.tensor([[[201, 255, 255]]], dtype=torch.uint8).expand(3, 1, 3)
    alpha = torch.tensor([[0.25, 0.5, 0.75]])
    masks = torch.zeros(0, 1, 3, dtype=torch.bool)
    labels = torch.zeros(0, dtype=torch.long)
    result = paste_instance(image, masks, labels, source, alpha, 3, blend="alpha")
    assert result.image[0].tolist() == [[125, 128, 255]]
    assert result.masks[0].tolist() == [[False, True, True]]


@pytest.mark.parametrize("size", [(12, 15), (9, 7), (2, 6), (1, 1)])
def test_gaussian_is_a_box_of_five_pixels_mirrored_at_the_border(size):
    g = torch.Generator().manual_seed(0)
    image, source = torch.rand(2, 3, *size, dtype=torch.float64, generator=g)
    alpha = torch.rand(*size, generator=g)
    masks, labels = torch.zeros(0, *size, dtype=torch.bool), torch.zeros(0, dtype=torch.long)
    result = paste_instance(image, masks, labels, source, alpha, 3, blend="gaussian")
    mask = (alpha >= 0.5).double().numpy()
    soft = torch.from_numpy(ndimage.uniform_filter(mask, 5, mode="mirror"))
    expected = image * (1 - soft) + source * soft
    torch.testing.assert_close(result.image, expected, rtol=0, atol=1e-12)


def poisson(image, source, mask):
    none = torch.zeros(0, *mask.shape, dtype=torch.bool), torch.zeros(0, dtype=torch.long)
    return paste_instance(image, *none, source, mask.double(), 0, blend="poisson").image


@quick
@given(seeds)
def test_poisson_solves_its_equation_and_leaves_the_outside(seed):
    image, _, _, source, alpha = scene(seed, dtype=torch.float64)
    mask = alpha >= 0.4
    got = poisson(image, source, mask)
    assert torch.equal(got[:, ~mask], image[:, ~mask])
    residual = torch.zeros_like(got)
    for dim, step in ((1, 1), (1, -1), (2, 1), (2, -1)):
        here = [slice(None)] * 3
        here[dim] = slice(1, None) if step < 0 else slice(None, -1)
        there = [slice(None)] * 3
        there[dim] = slice(None, -1) if step < 0 else slice(1, None)
        difference = got - source
        residual[tuple(here)] += difference[tuple(here)] - difference[tuple(there)]
    assert residual[:, mask].abs().max() < 1e-9 if mask.any() else True


def test_poisson_takes_differences_only():
    image, _, _, _, alpha = scene(2, dtype=torch.float64)
    mask = alpha >= 0.5
    torch.testing.assert_close(poisson(image, image + 77.0, mask), image, rtol=0, atol=1e-9)


def test_poisson_of_a_flat_source_is_harmonic_between_the_values_around():
    image, source = torch.zeros(3, 1, 5, dtype=torch.uint8), torch.zeros(3, 1, 5, dtype=torch.uint8)
    image[:, :, 4] = 200
    mask = torch.tensor([[False, True, True, True, False]])
    assert poisson(image, source, mask)[0].tolist() == [[0, 50, 100, 150, 200]]
    steep = torch.tensor([[[0, 250, 0, 250, 0]]], dtype=torch.uint8).expand(3, 1, 5)
    got = poisson(torch.full_like(image, 200), steep, mask)
    assert got[0, 0].tolist() == [200, 255, 200, 255, 200]  # kept in the range of the dtype


def test_disjoint_pastes_commute():
    image, masks, labels, source, _ = scene(3, count=0)
    first, second = torch.zeros(12, 15), torch.zeros(12, 15)
    first[:4, :5], second[6:, 8:] = 1.0, 1.0

    def both(a, b):
        step = paste_instance(image, masks, labels, source, a, 1)
        return paste_instance(*step[:2], step.labels, source.flip(0), b, 2)

    one = paste_instance(image, masks, labels, source, first, 1)
    one = paste_instance(one.image, one.masks, one.labels, source.flip(0), second, 2)
    other = paste_instance(image, masks, labels, source.flip(0), second, 2)
    other = paste_instance(other.image, other.masks, other.labels, source, first, 1)
    assert torch.equal(one.image, other.image)
    assert torch.equal(one.masks, other.masks.flip(0))
    assert one.labels.tolist() == other.labels.flip(0).tolist() == [1, 2]


class ImageSubclass(torch.Tensor):
    """As torchvision's image type: a subclass of Tensor and nothing else."""


@pytest.mark.parametrize("blend", BLENDS)
def test_tensor_subclasses_are_accepted_and_inputs_are_left_alone(blend):
    arguments = scene(4)
    copies = [value.clone() for value in arguments]
    expected = paste_instance(*arguments, 3, blend=blend)
    wrapped = [value.as_subclass(ImageSubclass) for value in arguments]
    got = paste_instance(*wrapped, 3, blend=blend)
    for value, other in zip(got, expected, strict=True):
        assert type(value) is torch.Tensor
        assert torch.equal(value, other)
    assert all(torch.equal(a, b) for a, b in zip(arguments, copies, strict=True))


def test_strided_images_and_small_labels_give_the_same_result():
    image, masks, labels, source, alpha = scene(5)
    hwc = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    expected = paste_instance(image, masks, labels, source, alpha, 3)
    got = paste_instance(hwc, masks, labels.to(torch.int16), source, alpha, 3)
    assert torch.equal(got.image, expected.image)
    assert got.labels.dtype == torch.int16


@quick
@given(seeds)
def test_boxes_are_those_of_a_search(seed):
    masks = torch.rand(5, 4, 6, generator=torch.Generator().manual_seed(seed)) > 0.9
    assert mask_boxes(masks).tolist() == [tight_box(mask) for mask in masks]
    assert mask_boxes(masks[:0]).shape == (0, 4)
    assert mask_boxes(masks).dtype == torch.float32


def test_boxes_are_those_of_pycocotools():
    coco = pytest.importorskip("pycocotools.mask")
    masks = torch.rand(20, 9, 7, generator=torch.Generator().manual_seed(0)) > 0.9
    rles = [coco.encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in masks]
    x, y, w, h = coco.toBbox(rles).T
    expected = np.stack((x, y, x + w, y + h), axis=1)
    filled = masks.any(2).any(1).numpy()
    np.testing.assert_array_equal(mask_boxes(masks).numpy()[filled], expected[filled])


ARGUMENTS = dict(
    zip(("image", "masks", "labels", "source", "alpha"), scene(0), strict=True), label=1
)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"image": ARGUMENTS["image"][0]}, ValueError, "image"),
        ({"image": ARGUMENTS["image"][:, :0]}, ValueError, "image"),
        ({"image": ARGUMENTS["image"] > 0}, TypeError, "image"),
        ({"masks": ARGUMENTS["masks"][:, 1:]}, ValueError, "masks"),
        ({"masks": ARGUMENTS["masks"].int()}, TypeError, "masks"),
        ({"labels": ARGUMENTS["labels"][1:]}, ValueError, "labels"),
        ({"labels": ARGUMENTS["labels"].float()}, TypeError, "labels"),
        ({"source": ARGUMENTS["source"][:, 1:]}, ValueError, "source"),
        ({"source": ARGUMENTS["source"].float()}, TypeError, "source"),
        ({"alpha": ARGUMENTS["alpha"][1:]}, ValueError, "alpha"),
        ({"alpha": ARGUMENTS["alpha"] + 1}, ValueError, "alpha"),
        ({"alpha": ARGUMENTS["alpha"] * torch.nan}, ValueError, "alpha"),
        ({"alpha": ARGUMENTS["alpha"].int()}, TypeError, "alpha"),
        ({"blend": "possion"}, ValueError, "blend"),
        ({"box_threshold": -1}, ValueError, "box_threshold"),
        ({"area_threshold": -1}, ValueError, "area_threshold"),
    ],
)
def test_wrong_arguments_are_named(change, error, named):
    with pytest.raises(error, match=named):
        paste_instance(**{**ARGUMENTS, **change})
