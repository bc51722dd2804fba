"""The network against the symmetries it promises, exact where they are exact."""

import math
import warnings

import pytest
import torch
from torch import nn

from steelyard.equivariant import Ponita, lift_vector, orientation_grid, radius_graph, read_vector

close = {"rtol": 0, "atol": 1e-10}


def model(*sizes: int, **options) -> Ponita:
    """A small double-precision network whose blocks do something at initialisation."""
    torch.manual_seed(0)
    sizes = sizes or (2, 1, 6, 2, 2, 2)
    return Ponita(*sizes, **{"layer_scale": None, **options}).double()


def cloud(seed: int = 0, dim: int = 3, points: int = 5):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    return draw(points, dim), draw(points, 2), draw(points, 1, dim)


def rotations_of(grid: torch.Tensor) -> list[torch.Tensor]:
    """All rotations that permute the grid, from images of two neighbouring directions."""
    cosine = grid @ grid.T
    nearest = cosine.masked_fill(cosine > 1 - 1e-9, -2).max()
    pairs = ((cosine - nearest).abs() < 1e-9).nonzero()
    frames = torch.stack((grid[pairs[:, 0]], grid[pairs[:, 1]]), dim=2)
    third = torch.linalg.cross(frames[..., 0], frames[..., 1])
    frames = torch.cat((frames, third[..., None]), dim=2)
    candidates = frames @ torch.linalg.inv(frames[0])
    return [R for R in candidates if torch.cdist(grid @ R.T, grid).amin(1).max() < 1e-9]


def plane_rotation(angle: float) -> torch.Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


def error_of(net: Ponita, R: torch.Tensor, **options) -> float:
    """Largest violation of equivariance over both outputs, relative to the outputs."""
    pos, x, vec = cloud(dim=len(R))
    vec = vec if net.in_vectors else None
    scalar, vector = net(pos, x, vec, **options)
    turned_vec = None if vec is None else vec @ R.T
    turned = net(pos @ R.T + 5.0, x, turned_vec, **options)
    error = (turned.scalar - scalar).abs().max() / scalar.std()
    if vector is not None:
        error = max(error, (turned.vector - vector @ R.T).abs().max() / vector.std())
    return float(error)


VARIANTS = [
    {},
    {"invariants": "complete"},
    {"separable": False},
    {"separable": False, "invariants": "complete"},
    {"radius": 2.0},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_the_icosahedron_gives_exact_equivariance_under_its_sixty_rotations(options):
    net = model(**options)
    rotations = rotations_of(net.grid)
    assert len(rotations) == 60
    chosen = rotations if not options else rotations[::7]
    with torch.no_grad():
        assert max(error_of(net, R) for R in chosen) < 1e-10
        assert error_of(net, -torch.eye(3).double()) < 1e-10  # reflections too


def test_the_dodecahedron_shares_the_rotations_of_the_icosahedron():
    net = model(orientations=20)
    rotations = rotations_of(orientation_grid(12))
    with torch.no_grad():
        assert max(error_of(net, R) for R in rotations[::9]) < 1e-10


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("count", [4, 7])
def test_the_plane_is_exact_under_as_many_rotations_as_directions(count, options):
    net = model(dim=2, orientations=count, **options)
    with torch.no_grad():
        for k in range(count):
            assert error_of(net, plane_rotation(2 * torch.pi * k / count)) < 1e-10
        assert error_of(net, plane_rotation(torch.pi / count)) > 1e-4


@pytest.mark.parametrize("invariants", ["paper", "complete"])
@pytest.mark.parametrize("dim", [2, 3])
def test_edge_directions_give_exact_equivariance_under_every_rotation(dim, invariants):
    net = model(dim=dim, orientations="edges", invariants=invariants)
    Q = torch.linalg.qr(cloud(3, dim, dim)[0]).Q
    R = Q * torch.linalg.det(Q) if dim == 3 else plane_rotation(1.0)
    with torch.no_grad():
        assert error_of(net, R) < 1e-10
        sparse = radius_graph(cloud(dim=dim)[0], 2.0)
        assert error_of(net, R, edge_index=sparse) < 1e-10


def test_equivariance_under_the_random_rotations_of_e3nn():
    o3 = pytest.importorskip("e3nn.o3")
    torch.manual_seed(1)
    rotations = [o3.rand_matrix(dtype=torch.float64) for _ in range(3)]
    distances = model(2, 0, 6, 2, 2, 0, orientations=0)
    directed = model(orientations="edges")
    with torch.no_grad():
        assert max(error_of(distances, R) for R in rotations) < 1e-10
        assert max(error_of(directed, R) for R in rotations) < 1e-10


def test_equivariance_error_under_a_random_rotation_falls_with_the_grid():
    """Mean over eight rotations; the same weights on each grid."""
    g = torch.Generator().manual_seed(0)
    matrices = [torch.linalg.qr(torch.randn(3, 3, generator=g).double()).Q for _ in range(8)]
    errors = []
    with torch.no_grad():
        for count in (6, 20, 80):
            net = model(orientations=count)
            errors.append(sum(error_of(net, R) for R in matrices) / 8)
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] > 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_translation_and_permutation_are_exact(dtype):
    net, (pos, x, vec) = model().to(dtype), (v.to(dtype) for v in cloud())
    tolerance = {"rtol": 0, "atol": 1e-6 if dtype == torch.float32 else 1e-12}
    expected = net(pos, x, vec)
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = net(pos[order], x[order], vec[order])
    shifted = net(pos + torch.tensor([4.0, -8.0, 2.0], dtype=dtype), x, vec)
    for value, other, moved in zip(expected, permuted, shifted, strict=True):
        torch.testing.assert_close(other, value[order], **tolerance)
        torch.testing.assert_close(moved, value, rtol=0, atol=10 * tolerance["atol"])


def test_double_brings_the_exact_grid_back_and_checkpoints_keep_it():
    net = Ponita(1, 0, 4, 1, 1, 0).double()
    torch.testing.assert_close(net.grid, orientation_grid(12), rtol=0, atol=1e-14)
    other = Ponita(1, 0, 4, 1, 1, 0, grid_kind="repelled").double()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.grid, net.grid)


def test_clouds_of_a_batch_do_not_see_each_other_and_pool():
    net = model()
    first, second = cloud(0, points=4), cloud(1, points=3)
    joined = [torch.cat(pair) for pair in zip(first, second, strict=True)]
    batch = torch.tensor([0] * 4 + [1] * 3)
    apart = [net(*first), net(*second)]
    together = net(*joined, batch=batch)
    for i in range(2):
        torch.testing.assert_close(together[i], torch.cat((apart[0][i], apart[1][i])), **close)
    for pool, reduce in (("sum", torch.sum), ("mean", torch.mean)):
        pooled = model(pool=pool)(*joined, batch=batch)
        for i in range(2):
            expected = torch.stack([reduce(output[i], 0) for output in apart])
            torch.testing.assert_close(pooled[i], expected, **close)
    alone = model(pool="sum")(*first)
    torch.testing.assert_close(alone.scalar, apart[0].scalar.sum(0, keepdim=True), **close)


@pytest.mark.parametrize("orientations", [12, 0, "edges"])
def test_given_self_loops_do_not_count_twice(orientations):
    net = model(2, 0, 6, 2, 2, 0, orientations=orientations)
    pos, x, _ = cloud()
    edges = radius_graph(pos)
    loops = torch.arange(5).expand(2, -1)
    with_loops = torch.cat((loops, edges), dim=1)
    expected = net(pos, x, edge_index=edges).scalar
    torch.testing.assert_close(net(pos, x, edge_index=with_loops).scalar, expected, **close)
    torch.testing.assert_close(net(pos, x).scalar, expected, **close)


def test_neighbours_at_the_radius_fade_out():
    net = model(radius=1.0)
    x, vec = torch.ones(2, 2).double(), torch.ones(2, 1, 3).double()

    def output(distance):
        pos = torch.tensor([[0.0, 0, 0], [distance, 0, 0]], dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return net(pos, x, vec).vector

    torch.testing.assert_close(output(1 - 1e-5), output(1 + 1e-5), rtol=0, atol=1e-9)
    assert (output(0.7) - output(1.5)).abs().max() > 1e-5


def test_a_radius_below_every_distance_warns():
    net, arguments = model(radius=1e-3), cloud()
    with pytest.warns(UserWarning, match="radius"):
        net(*arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(*(value[:1] for value in arguments))


def test_a_network_of_identities_reads_the_vector_it_was_given_over_the_dimension():
    net = model(0, 1, 1, 2, 0, 1, layer_scale=0.0)
    nn.init.ones_(net.embed.weight)
    for readout in net.readouts:
        nn.init.ones_(readout.weight)
        nn.init.zeros_(readout.bias)
    pos, _, vec = cloud()
    torch.testing.assert_close(net(pos, vec=vec).vector, vec / 3, **close)
    lifted = lift_vector(vec, net.grid)
    torch.testing.assert_close(read_vector(lifted, net.grid), vec / 3, **close)


def chain(turns: list[float]):
    """Points one apart, each step turned against the last; edges between neighbours only."""
    headings = torch.tensor([0.0, *turns], dtype=torch.float64).cumsum(0)
    steps = torch.stack((headings.cos(), headings.sin(), 0 * headings), dim=1)
    pos = torch.cat((torch.zeros(1, 3).double(), steps.cumsum(0)))
    i = torch.arange(len(pos) - 1)
    return pos, torch.stack((torch.cat((i, i + 1)), torch.cat((i + 1, i))))


@pytest.mark.parametrize(
    ("orientations", "separates"), [(0, False), (6, True), ("edges", True)], ids=str
)
def test_distances_alone_do_not_see_an_angle_and_directions_do(orientations, separates):
    """Right angles, so that the six directions are exact for the chains as they are placed."""
    net = model(1, 0, 8, 3, 1, 0, orientations=orientations, pool="sum")
    x, outputs = torch.ones(4, 1).double(), []
    for turns in ([0.0, 0.0], [math.pi / 2, -math.pi / 2]):
        pos, edges = chain(turns)
        placed = [pos @ R.T for R in rotations_of(orientation_grid(6))]
        values = torch.stack([net(p, x, edge_index=edges).scalar for p in placed]).detach()
        assert values.std() < 1e-12
        outputs.append(values.mean())
    difference = abs(outputs[0] - outputs[1])
    assert (difference > 3e-5) if separates else (difference < 1e-12)


def test_complete_invariants_reach_the_kernels():
    wide = model(separable=False, invariants="complete")
    assert wide.spatial_basis.first.in_features == 4 + 16 + 64
    assert model(separable=False).spatial_basis.first.in_features == 3 + 9 + 27
    assert model(invariants="complete").receiver_basis is not None
    assert model().receiver_basis is None


@pytest.mark.parametrize(
    "options", [*VARIANTS, {"orientations": "edges"}, {"orientations": 0}], ids=str
)
def test_forces_have_finite_gradients_on_a_small_molecule(options):
    """Methane on the axes of the grid: every bond is parallel to a direction of a cube."""
    carbon = torch.zeros(1, 3, dtype=torch.float64)
    hydrogens = orientation_grid(4) * 1.09
    pos = torch.cat((carbon, hydrogens)).requires_grad_()
    x = torch.tensor([[6.0, 1]] + [[1.0, 1]] * 4, dtype=torch.float64)
    settings = {"orientations": 8, **options}
    net = model(2, 0, 6, 2, 1, 0, pool="sum", **settings)
    energy = net(pos, x).scalar.sum()
    (gradient,) = torch.autograd.grad(energy, pos, create_graph=True)
    gradient.square().sum().backward()
    assert gradient.isfinite().all()
    assert pos.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    torch.testing.assert_close(gradient.sum(0), torch.zeros(3).double(), rtol=0, atol=1e-6)


def test_gradcheck_of_the_whole_network():
    net, (pos, x, vec) = model(2, 1, 3, 1, 1, 1, orientations=4), cloud(points=3)
    leaves = [value.requires_grad_() for value in (pos, x, vec)]
    assert torch.autograd.gradcheck(net, leaves)


@pytest.mark.parametrize("invariants", ["paper", "complete"])
def test_the_network_compiles_without_a_graph_break_on_given_edges(invariants):
    net, arguments = model(invariants=invariants), cloud()
    edges = radius_graph(arguments[0])
    torch.compiler.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    got, expected = (f(*arguments, edge_index=edges) for f in (compiled, net))
    for value, other in zip(got, expected, strict=True):
        torch.testing.assert_close(value, other, **close)


def test_calibration_keeps_the_spread_through_the_blocks_and_is_explicit():
    net, arguments = model(), cloud()
    before = {name: p.clone() for name, p in net.named_parameters()}
    net(*arguments)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    net.calibrate(*arguments)
    seen = []
    for block in net.blocks:
        block.convolution.register_forward_hook(
            lambda _, inputs, output: seen.append(output.std() / inputs[0].std())
        )
    net(*arguments)
    torch.testing.assert_close(torch.stack(seen), torch.ones(2).double(), **close)


def test_only_matrices_decay():
    net = Ponita(1, 0, 4, 2, 1, 0)
    decayed, others = net.parameter_groups(0.1)
    names = {id(p): name for name, p in net.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for p in decayed["params"]} == {"weight"}
    assert not any("norm" in names[id(p)] for p in decayed["params"])
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(others["params"]) == len(names)


def test_outputs_are_none_where_there_are_none_and_lonely_points_get_zero_from_edges():
    pos, x, vec = cloud()
    assert model(2, 0, 4, 1, 1, 0)(pos, x).vector is None
    assert model(0, 1, 4, 1, 0, 1)(pos, vec=vec).scalar is None
    lonely = model(2, 0, 4, 1, 1, 1, orientations="edges")
    edges = torch.tensor([[0], [1]])
    scalar = lonely(pos, x, edge_index=edges).scalar
    assert (scalar != 0).flatten().tolist() == [False, True, False, False, False]


def test_a_few_steps_learn_a_vector_field():
    """Predicting the vector towards the centroid: the loss must fall to a tenth."""
    net = model(1, 0, 8, 2, 0, 1, layer_scale=1.0)
    pos = cloud(5, points=6)[0]
    x, target = torch.ones(6, 1).double(), (pos.mean(0) - pos)[:, None]
    optimizer = torch.optim.Adam(net.parameter_groups(0.0), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (net(pos, x).vector - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


P, F, V = cloud()


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: Ponita(0, 0, 4, 1, 1, 0), ValueError, "in_scalars"),
        (lambda: Ponita(1, 0, 4, 1, 0, 0), ValueError, "out_scalars"),
        (lambda: Ponita(1, 0, 0, 1, 1, 0), ValueError, "hidden"),
        (lambda: Ponita(1, 0, 4, 0, 1, 0), ValueError, "layers"),
        (lambda: Ponita(1, 0, 4, 1, 1, 0, dim=4), ValueError, "dim"),
        (lambda: Ponita(1, 0, 4, 1, 1, 0, orientations=-1), ValueError, "orientations"),
        (lambda: Ponita(1, 0, 4, 1, 1, 0, orientations="x"), ValueError, "orientations"),
        (lambda: Ponita(1, 1, 4, 1, 1, 0, orientations=0), ValueError, "in_vectors"),
        (lambda: Ponita(1, 0, 4, 1, 1, 1, orientations=0), ValueError, "out_vectors"),
        (lambda: Ponita(1, 0, 4, 1, 1, 0, invariants="x"), ValueError, "invariants"),
        (lambda: Ponita(1, 0, 4, 1, 1, 0, radius=0.0), ValueError, "radius"),
        (lambda: Ponita(1, 0, 4, 1, 1, 0, pool="max"), ValueError, "pool"),
        (lambda: Ponita(1, 0, 4, 1, 1, 0, grid_kind="cube"), ValueError, "count"),
        (lambda: model()(P[:, :2], F, V), ValueError, "pos"),
        (lambda: model()(P, F[:2], V), ValueError, "x must"),
        (lambda: model()(P, None, V), ValueError, "x must"),
        (lambda: model()(P, F, V[:, 0]), ValueError, "vec"),
        (lambda: model(2, 0, 4, 1, 1, 0)(P, F, V), ValueError, "vec"),
        (lambda: model()(P, F, V, torch.tensor([[0], [5]])), ValueError, "edge_index"),
        (lambda: model()(P, F, V, batch=torch.zeros(5)), TypeError, "batch"),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()
