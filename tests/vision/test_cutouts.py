"""Cut-outs of known shapes: the corner fill, components, sizes and places."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.vision import corner_foreground, largest_component, paste_size, place_cutout

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)


def disc(height: int, width: int, radius: float) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (y - height // 2) ** 2 + (x - width // 2) ** 2 <= radius**2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("size", [(12, 17), (17, 12)])
def test_corner_fill_recovers_the_mask_on_a_plain_background(size, dtype):
    mask = disc(*size, 4)
    image = torch.where(mask, torch.tensor([[[30]], [[200]], [[90]]]), 240).to(dtype)
    assert torch.equal(corner_foreground(image), mask)
    assert torch.equal(corner_foreground(image[0]), mask)


def test_a_hole_stays_foreground_and_a_bay_does_not():
    ring = disc(15, 15, 6) & ~disc(15, 15, 3)
    image = torch.where(ring, 10, 250)
    assert torch.equal(corner_foreground(image), disc(15, 15, 6))
    ring[7, 7:] = False  # a channel to the outside
    image = torch.where(ring, 10, 250)
    assert torch.equal(corner_foreground(image), ring)


def test_every_channel_must_be_near_and_the_tolerance_is_inclusive():
    image = torch.full((3, 5, 5), 100.0)
    image[0, 2, 2], image[:, 1, 1], image[:, 3, 3] = 111.0, 110.0, 111.0
    found = corner_foreground(image).nonzero().tolist()
    assert found == [[2, 2], [3, 3]]
    assert not corner_foreground(image, tolerance=11.0).any()


def test_a_diagonal_does_not_join_and_a_stray_corner_is_outvoted():
    image = torch.full((6, 6), 250)
    for k in range(6):
        image[k, k] = 0
        if k < 5:
            image[k, k + 1] = 0
    found = corner_foreground(image, background=250)
    assert torch.equal(found, image == 0)
    image = torch.full((5, 5), 250)
    image[0, 0] = 0  # one corner of four is covered by the object
    assert corner_foreground(image).nonzero().tolist() == [[0, 0]]
    by_channel = corner_foreground(torch.full((3, 2, 2), 9), background=torch.tensor([9, 9, 50]))
    assert by_channel.all()


def neighbours_fill(mask: torch.Tensor) -> list[set[tuple[int, int]]]:
    """Components by search, in reading order."""
    left = {tuple(place) for place in mask.nonzero().tolist()}
    parts = []
    for place in sorted(left):
        if any(place in part for part in parts):
            continue
        part, queue = {place}, [place]
        while queue:
            y, x = queue.pop()
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if near in left and near not in part:
                    part.add(near)
                    queue.append(near)
        parts.append(part)
    return parts


@quick
@given(seeds)
def test_largest_component_is_that_of_a_search(seed):
    mask = torch.rand(7, 9, generator=torch.Generator().manual_seed(seed)) > 0.5
    parts = neighbours_fill(mask)
    best = max(parts, key=len)  # the first of several
    got = {tuple(place) for place in largest_component(mask).nonzero().tolist()}
    assert got == best


def test_largest_component_of_nothing_is_nothing():
    empty = torch.zeros(3, 3, dtype=torch.bool)
    assert not largest_component(empty).any()
    assert largest_component(~empty).all()


@quick
@given(st.floats(0.05, 1.0), st.floats(0.2, 5.0), st.integers(10, 2000), st.integers(10, 2000))
def test_size_has_the_area_and_ratio_asked_for(area, ratio, height, width):
    got = paste_size(area, ratio, height, width)
    exact_width = math.sqrt(ratio * area**2 * height * width)
    assert exact_width - 1 < got.width <= exact_width + 1e-4
    assert exact_width / ratio - 1 < got.height <= exact_width / ratio + 1e-4


@pytest.mark.parametrize("area", [0.1, 0.2, 0.3, 0.6, 0.7])
def test_whole_sizes_lose_no_pixel_to_rounding(area):
    assert paste_size(area, 1.0, 100, 100) == (round(100 * area), round(100 * area))
    assert paste_size(area, 4.0, 100, 100) == (round(200 * area), round(50 * area))


def test_a_cutout_of_its_own_size_is_copied_to_its_place():
    g = torch.Generator().manual_seed(0)
    cutout = torch.randint(0, 255, (3, 3, 4), generator=g, dtype=torch.uint8)
    alpha = torch.rand(3, 4, generator=g)
    placed = place_cutout(cutout, alpha, 8, 9, size=(4, 3), centre=(5.0, 3.5))
    assert placed.source.dtype == torch.uint8
    assert torch.equal(placed.source[:, 2:5, 3:7], cutout)
    assert torch.equal(placed.alpha[2:5, 3:7], alpha)
    assert placed.alpha.sum() == alpha.sum()
    assert placed.visible == pytest.approx(1.0)
    flipped = place_cutout(cutout, alpha, 8, 9, size=(4, 3), centre=(5.0, 3.5), flip=True)
    assert torch.equal(flipped.source[:, 2:5, 3:7], cutout.flip(-1))


@pytest.mark.parametrize(
    ("centre", "visible"),
    [((0.0, 4.0), 0.5), ((0.0, 0.0), 0.25), ((8.0, 8.0), 0.25), ((-5.0, 4.0), 0.0)],
)
def test_what_sticks_out_is_clipped_and_counted(centre, visible):
    ones = torch.ones(3, 4, 4), torch.ones(4, 4)
    placed = place_cutout(*ones, 8, 8, size=(4, 4), centre=centre)
    assert placed.visible == visible
    assert placed.alpha.sum() == 16 * visible


def test_resizing_is_bilinear():
    alpha = torch.tensor([[0.0, 1.0]])
    placed = place_cutout(torch.zeros(1, 1, 2), alpha, 1, 4, size=(4, 1), centre=(2.0, 0.5))
    torch.testing.assert_close(placed.alpha, torch.tensor([[0.0, 0.25, 0.75, 1.0]]))


C, A = torch.ones(3, 2, 2), torch.ones(2, 2)
PLACE = {"size": (2, 2), "centre": (1.0, 1.0)}


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: corner_foreground(A[0]), ValueError, "image"),
        (lambda: corner_foreground(C[:, :0]), ValueError, "image"),
        (lambda: corner_foreground(C, tolerance=-1.0), ValueError, "tolerance"),
        (lambda: corner_foreground(C, background=A[0]), ValueError, "background"),
        (lambda: largest_component(A), TypeError, "mask"),
        (lambda: largest_component(C > 0), ValueError, "mask"),
        (lambda: paste_size(0.0, 1.0, 10, 10), ValueError, "area"),
        (lambda: paste_size(1.5, 1.0, 10, 10), ValueError, "area"),
        (lambda: paste_size(0.5, 0.0, 10, 10), ValueError, "ratio"),
        (lambda: paste_size(0.5, 1.0, 0, 10), ValueError, "height"),
        (lambda: place_cutout(A, A, 4, 4, **PLACE), ValueError, "cutout"),
        (lambda: place_cutout(C, A[:1], 4, 4, **PLACE), ValueError, "alpha"),
        (lambda: place_cutout(C, A.int(), 4, 4, **PLACE), TypeError, "alpha"),
        (lambda: place_cutout(C, A, 0, 4, **PLACE), ValueError, "height"),
        (lambda: place_cutout(C, A, 4, 4, size=(0, 1), centre=(1.0, 1.0)), ValueError, "size"),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()
