"""Grids against the designs they must be, lifts against their closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.equivariant import (
    lift_tensor,
    lift_vector,
    orientation_grid,
    read_tensor,
    read_vector,
)

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)
close = {"rtol": 0, "atol": 1e-12}
SOLIDS = {"tetrahedron": 4, "octahedron": 6, "cube": 8, "icosahedron": 12, "dodecahedron": 20}


def random(seed: int, *shape: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=g)


def rotations_of(grid: torch.Tensor) -> list[torch.Tensor]:
    """Rotations that permute the grid, from the images of two neighbouring directions."""
    cosine = grid @ grid.T
    nearest = cosine.masked_fill(cosine > 1 - 1e-9, -2).max()
    neighbours = ((cosine - nearest).abs() < 1e-9).nonzero().tolist()

    def frame(pair):
        a, b = grid[pair[0]], grid[pair[1]]
        return torch.stack((a, b, torch.linalg.cross(a, b)), dim=1)

    start = torch.linalg.inv(frame(neighbours[0]))
    candidates = [frame(pair) @ start for pair in neighbours]
    return [R for R in candidates if torch.cdist(grid @ R.T, grid).amin(1).max() < 1e-9]


@pytest.mark.parametrize(("kind", "count"), SOLIDS.items())
def test_a_solid_is_the_default_for_its_number_and_averages_directions_alike(kind, count):
    grid = orientation_grid(count, kind=kind)
    assert torch.equal(grid, orientation_grid(count))
    assert grid.dtype == torch.float64
    torch.testing.assert_close(grid.norm(dim=1), torch.ones(count).double(), **close)
    torch.testing.assert_close(grid.mean(0), torch.zeros(3).double(), **close)
    torch.testing.assert_close(grid.T @ grid / count, torch.eye(3).double() / 3, **close)


@pytest.mark.parametrize(
    ("count", "number"), [(4, 12), (6, 24), (8, 24), (12, 60), (20, 60)], ids=str
)
def test_a_solid_has_the_rotations_of_its_group(count, number):
    assert len(rotations_of(orientation_grid(count))) == number


def test_icosahedron_and_dodecahedron_share_their_rotations():
    for R in rotations_of(orientation_grid(12)):
        grid = orientation_grid(20)
        assert torch.cdist(grid @ R.T, grid).amin(1).max() < 1e-9


@pytest.mark.parametrize("count", [1, 3, 4, 10])
def test_the_plane_has_uniform_angles_from_zero(count):
    grid = orientation_grid(count, dim=2)
    expected = [
        [math.cos(2 * math.pi * k / count), math.sin(2 * math.pi * k / count)] for k in range(count)
    ]
    torch.testing.assert_close(grid, torch.tensor(expected, dtype=torch.float64), **close)


def test_repelled_directions_are_the_same_each_time_and_spread():
    grid = orientation_grid(16)
    assert torch.equal(grid, orientation_grid(16))
    torch.testing.assert_close(grid.norm(dim=1), torch.ones(16).double(), **close)
    apart = (grid @ grid.T).fill_diagonal_(-1).max()
    assert apart < math.cos(0.6)  # sixteen caps of radius 0.3 fit with room
    assert (grid.T @ grid / 16 - torch.eye(3) / 3).abs().max() < 0.01


def test_repulsion_from_a_random_start_finds_the_octahedron():
    """Six charges on a sphere have one minimum, up to rotation: three orthogonal axes."""
    grid = orientation_grid(6, kind="repelled", generator=torch.Generator().manual_seed(0))
    cosines = (grid @ grid.T).sort(1).values
    expected = torch.tensor([-1.0, 0, 0, 0, 0, 1]).double().expand(6, 6)
    torch.testing.assert_close(cosines, expected, rtol=0, atol=1e-3)
    assert not torch.allclose(grid, orientation_grid(6, kind="repelled"))


def test_dtype_is_followed():
    assert orientation_grid(5, dtype=torch.float32).dtype == torch.float32


@quick
@given(seeds, st.sampled_from([(3, 6), (3, 8), (3, 12), (3, 20), (2, 3), (2, 4), (2, 7)]))
def test_a_vector_lifted_and_read_comes_back_over_the_dimension(seed, shape):
    dim, count = shape
    grid, v = orientation_grid(count, dim=dim), random(seed, 2, 5, dim)
    torch.testing.assert_close(read_vector(lift_vector(v, grid), grid), v / dim, **close)


@quick
@given(seeds, st.sampled_from([12, 20]))
def test_a_tensor_lifted_and_read_follows_the_closed_form_of_a_four_design(seed, count):
    grid, A = orientation_grid(count), random(seed, 4, 3, 3)
    A = A + A.mT
    trace = A.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    expected = (2 * A + trace * torch.eye(3).double()) / 15
    torch.testing.assert_close(read_tensor(lift_tensor(A, grid), grid), expected, **close)


@quick
@given(seeds)
def test_lifting_a_turned_tensor_permutes_what_was_lifted(seed):
    grid, A = orientation_grid(12), random(seed, 3, 3)
    R = rotations_of(grid)[seed % 60]
    permutation = torch.cdist(grid @ R, grid).argmin(1)
    torch.testing.assert_close(
        lift_tensor(R @ A @ R.T, grid), lift_tensor(A, grid)[permutation], **close
    )


@pytest.mark.parametrize("count", [6, 8, 12, 20])
def test_the_scalar_read_from_a_lifted_vector_is_zero_on_a_centrally_symmetric_grid(count):
    lifted = lift_vector(random(0, 5, 3), orientation_grid(count))
    assert lifted.mean(-1).abs().max() < 1e-12


def test_worked_example_in_the_plane():
    grid = orientation_grid(4, dim=2)
    lifted = lift_vector(torch.tensor([1.0, 0.0], dtype=torch.float64), grid)
    expected = torch.tensor([1.0, 0, -1, 0], dtype=torch.float64)
    torch.testing.assert_close(lifted, expected, **close)
    back = read_vector(lifted, grid)
    torch.testing.assert_close(back, torch.tensor([0.5, 0.0], dtype=torch.float64), **close)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_results_have_the_dtype_of_the_values(dtype):
    grid = orientation_grid(12)
    v, A = torch.ones(3, dtype=dtype), torch.eye(3, dtype=dtype)
    for result in (lift_vector(v, grid), lift_tensor(A, grid)):
        assert result.dtype == dtype
        assert read_vector(result, grid).dtype == read_tensor(result, grid).dtype == dtype


def test_gradients_are_right():
    grid = orientation_grid(4)
    for call, value in (
        (lift_vector, random(0, 2, 3)),
        (lift_tensor, random(1, 2, 3, 3)),
        (read_vector, random(2, 2, 4)),
        (read_tensor, random(3, 2, 4)),
    ):
        assert torch.autograd.gradcheck(lambda x, f=call: f(x, grid), value.requires_grad_())


G = orientation_grid(6)


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: orientation_grid(0), ValueError, "count"),
        (lambda: orientation_grid(12, dim=4), ValueError, "dim"),
        (lambda: orientation_grid(12, dim=2, kind="icosahedron"), ValueError, "kind"),
        (lambda: orientation_grid(12, kind="uniform"), ValueError, "kind"),
        (lambda: orientation_grid(11, kind="icosahedron"), ValueError, "count must be 12"),
        (lambda: lift_vector(torch.ones(2), G), ValueError, "v must"),
        (lambda: lift_vector(torch.ones(3, dtype=torch.long), G), TypeError, "v must"),
        (lambda: lift_vector(torch.ones(3), torch.ones(3)), ValueError, "grid"),
        (lambda: lift_tensor(torch.ones(3), G), ValueError, "A must"),
        (lambda: read_vector(torch.ones(5), G), ValueError, "c must"),
        (lambda: read_tensor(torch.ones(6), G[:0]), ValueError, "grid"),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()
