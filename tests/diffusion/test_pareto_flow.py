"""ParetoFlow's parts against their theorems, brute force and pymoo."""

import math
from itertools import combinations, permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.diffusion import pareto
from steelyard.diffusion.pareto import hypervolume, non_dominated_sort
from steelyard.diffusion.pareto_flow import (
    categorical_to_logits,
    cone_select,
    guided_velocity,
    logits_to_categorical,
    repair_to_box,
)
from steelyard.diffusion.simplex import minimum_partitions, simplex_lattice, weight_neighbours

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)
close = {"rtol": 0, "atol": 1e-9}


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Weights


@quick
@given(st.integers(1, 4), st.integers(1, 6))
def test_lattice_is_every_composition_of_the_partitions(m, p):
    expected = {k for k in product(range(p + 1), repeat=m) if sum(k) == p}
    lattice = simplex_lattice(m, p)
    whole = [tuple(row) for row in (lattice * p).round().long().tolist()]
    assert set(whole) == expected
    assert len(whole) == len(expected) == math.comb(m + p - 1, p)
    assert whole == sorted(whole)
    torch.testing.assert_close(lattice.sum(1), torch.ones(len(whole)).double(), rtol=0, atol=1e-15)


def test_lattice_is_closed_under_permutation_of_objectives():
    rows = {tuple(row) for row in simplex_lattice(3, 6).tolist()}
    for order in permutations(range(3)):
        assert {tuple(row[j] for j in order) for row in rows} == rows


@pytest.mark.parametrize(("m", "p"), [(2, 9), (3, 27), (4, 5)])
def test_lattice_is_the_one_of_pymoo(m, p):
    ref_dirs = pytest.importorskip("pymoo.util.ref_dirs")
    expected = ref_dirs.get_reference_directions("das-dennis", m, n_partitions=p)
    np.testing.assert_allclose(simplex_lattice(m, p).numpy(), expected, rtol=0, atol=1e-12)


@quick
@given(st.integers(2, 6), st.integers(1, 3000))
def test_minimum_partitions_is_the_smallest_that_suffices(m, count):
    p = minimum_partitions(m, count)
    assert math.comb(m + p - 1, p) >= count
    assert p == 1 or math.comb(m + p - 2, p - 1) < count


def test_minimum_partitions_gives_the_published_weight_counts():
    assert len(simplex_lattice(2, minimum_partitions(2))) == 400
    assert len(simplex_lattice(3, minimum_partitions(3))) == 406
    assert minimum_partitions(1, 1) == 1


@quick
@given(seeds, st.integers(1, 12), st.integers(1, 4))
def test_neighbours_and_cone_angle_are_those_of_brute_force(seed, count, m):
    weights = random(seed, count, m) + 0.01
    k = 1 + seed % count
    found = weight_neighbours(weights, k)
    for i in range(count):
        angles = []
        for j in range(count):
            cosine = weights[i] @ weights[j] / (weights[i].norm() * weights[j].norm())
            angles.append(0.0 if i == j else math.acos(min(1.0, float(cosine))))
        order = sorted(range(count), key=lambda j, a=angles: (a[j], j))
        if m > 1:  # with one objective every angle is 0
            assert found.indices[i].tolist() == order[:k]
        assert found.indices[i, 0] == i
        others = min(m, count - 1)
        mean = sum(sorted(angles)[: others + 1]) / max(others, 1)
        expected = 2 * mean if others else 2 * math.pi
        assert abs(float(found.cone_angle[i]) - expected) < 1e-6  # acos loses digits near 1


def test_neighbours_of_a_lattice_follow_its_symmetry():
    weights = simplex_lattice(3, 12)
    index = {tuple(row): i for i, row in enumerate((weights * 12).round().long().tolist())}
    found = weight_neighbours(weights)
    assert found.indices.shape == (91, 4)
    assert torch.equal(found.indices[:, 0], torch.arange(91))
    swapped = torch.tensor([index[(b, a, c)] for a, b, c in index])
    torch.testing.assert_close(found.cone_angle[swapped], found.cone_angle, **close)
    centre = index[(4, 4, 4)]
    torch.testing.assert_close(
        weights[found.indices[centre, 1:]].amax(1), torch.full((3,), 5 / 12).double()
    )


def test_neighbours_default_to_one_more_than_the_objectives_or_all_there_are():
    assert weight_neighbours(simplex_lattice(2, 10)).indices.shape == (11, 3)
    assert weight_neighbours(torch.eye(2)).indices.tolist() == [[0, 1], [1, 0]]
    alone = weight_neighbours(torch.ones(1, 3))
    assert alone.indices.tolist() == [[0]]
    assert float(alone.cone_angle) == pytest.approx(2 * math.pi)


def test_a_repeated_weight_is_still_its_own_first_neighbour():
    found = weight_neighbours(torch.ones(4, 2) / 2, 2)
    assert found.indices.tolist() == [[0, 1], [1, 0], [2, 0], [3, 0]]
    assert found.cone_angle.tolist() == [0.0] * 4


# Guidance


def finite_velocity(x, t, data, probs):
    """Exact velocity for finite data, data at t = 1."""
    t = t[:, None]
    logits = probs.log() - (x[:, None] - t[..., None] * data).square().sum(-1) / (2 * (1 - t) ** 2)
    return ((logits.softmax(1) @ data) - x) / (1 - t)


def mixture(seed):
    data = 2 * random(seed, 5, 3) - 1
    probs = random(seed + 1, 5) + 0.1
    return data, probs / probs.sum(), 2 * random(seed + 2, 4, 3) - 1


@quick
@given(seeds, st.floats(0.05, 0.95))
def test_terminal_of_the_exact_velocity_is_the_posterior_mean(seed, t):
    data, probs, x = mixture(seed)
    out = guided_velocity(
        lambda x, t: finite_velocity(x, t, data, probs),
        lambda x1: x1[:, :1],
        x,
        torch.ones(4, 1),
        t,
    )
    log_weight = probs.log() - ((x[:, None] - t * data) ** 2).sum(-1) / (2 * (1 - t) ** 2)
    torch.testing.assert_close(out.terminal, log_weight.softmax(1) @ data, **close)


@quick
@given(seeds, st.floats(0.05, 0.95))
def test_velocity_is_linked_to_the_score(seed, t):
    data, probs, x = mixture(seed)
    x = x.requires_grad_()
    log_density = (
        probs.log() - (x[:, None] - t * data).square().sum(-1) / (2 * (1 - t) ** 2)
    ).logsumexp(1)
    (score,) = torch.autograd.grad(log_density.sum(), x)
    velocity = finite_velocity(x, x.new_full((4,), t), data, probs)
    torch.testing.assert_close(velocity, x / t + (1 - t) / t * score, rtol=1e-8, atol=1e-8)


@quick
@given(seeds, st.floats(0.01, 1.0), st.floats(0, 5))
def test_detached_guidance_with_affine_predictors_is_the_closed_form(seed, t, gamma):
    data, probs, x = mixture(seed)
    slopes, weights = 2 * random(seed + 3, 3, 2) - 1, random(seed + 4, 4, 2)
    t = min(t, 0.99)

    def field(x, t):
        return finite_velocity(x, t, data, probs)

    out = guided_velocity(field, lambda x1: x1 @ slopes + 7.0, x, weights, t, gamma=gamma)
    velocity = field(x, x.new_full((4,), t))
    torch.testing.assert_close(out.velocity, velocity, **close)
    torch.testing.assert_close(out.gradient, -weights @ slopes.T, **close)
    push = gamma * (1 - t) / t * (weights @ slopes.T)
    torch.testing.assert_close(out.guided, velocity - push, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_full_guidance_is_the_velocity_of_exponentially_tilted_data(t):
    data, probs, x = mixture(5)
    slopes, weights = 2 * random(6, 3, 2) - 1, random(7, 1, 2)
    out = guided_velocity(
        lambda x, t: finite_velocity(x, t, data, probs),
        lambda x1: x1 @ slopes,
        x,
        weights.expand(4, 2),
        t,
        gamma=1.0,
        gradient="full",
    )
    step = 1e-5
    times = x.new_full((4,), t)
    tilts = [
        finite_velocity(x, times, data, probs * (-s * data @ slopes @ weights[0]).exp())
        for s in (step, -step)
    ]
    torch.testing.assert_close(
        out.guided - out.velocity, (tilts[0] - tilts[1]) / (2 * step), rtol=1e-7, atol=1e-7
    )


def test_full_gradient_is_the_one_of_the_whole_chain():
    matrix = random(0, 3, 3)
    x, weights, t = random(1, 4, 3), random(2, 4, 2), random(3, 4) * 0.8 + 0.1

    def field(x, t):
        return torch.tanh(x @ matrix) * t[:, None]

    def predictors(x1):
        return torch.stack([x1.square().sum(1), x1.sin().sum(1)], 1)

    out = guided_velocity(field, predictors, x, weights, t, gradient="full")
    leaf = x.clone().requires_grad_()
    end = leaf + (1 - t)[:, None] * field(leaf, t)
    (expected,) = torch.autograd.grad(-(weights * predictors(end)).sum(), leaf)
    torch.testing.assert_close(out.gradient, expected, **close)
    detached = guided_velocity(field, predictors, x, weights, t)
    assert (detached.gradient - out.gradient).abs().max() > 0.05
    torch.testing.assert_close(detached.terminal, out.terminal, **close)


def test_guidance_off_is_the_plain_flow_and_lands_on_the_data():
    data, probs, _ = mixture(8)
    x = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    steps = 400
    for step in range(steps):
        out = guided_velocity(
            lambda x, t: finite_velocity(x, t, data, probs),
            lambda x1: x1.square(),
            x,
            torch.ones(20, 3),
            step / steps,
            gamma=0.0,
        )
        assert torch.equal(out.guided, out.velocity)
        x = x + out.guided / steps
    assert torch.cdist(x, data).amin(1).max() < 1e-6


def test_one_hot_weight_is_single_objective_guidance():
    x, t = random(0, 4, 2), 0.6

    def both(x1):
        return torch.stack([x1.square().sum(1), x1.prod(1)], 1)

    weights = torch.tensor([[0.0, 1.0]]).double().expand(4, 2)
    got = guided_velocity(lambda x, t: -x, both, x, weights, t)
    alone = guided_velocity(lambda x, t: -x, lambda x1: both(x1)[:, 1:], x, weights[:, 1:], t)
    torch.testing.assert_close(got.guided, alone.guided, **close)


def test_terminal_at_the_end_is_the_point_and_the_start_is_finite():
    x = random(0, 4, 2)
    end = guided_velocity(lambda x, t: x * 1e4, lambda x1: x1, x, torch.ones(4, 2), 1.0)
    assert torch.equal(end.terminal, x)
    assert torch.equal(end.guided, end.velocity)
    start = guided_velocity(lambda x, t: x, lambda x1: x1, x, torch.ones(4, 2), 0.0)
    torch.testing.assert_close(start.guided, x - 2.0 * 1000.0, **close)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("gradient", ["detached", "full"])
def test_guidance_works_where_gradients_are_off_and_leaves_no_graph(context, gradient):
    layer = torch.nn.Linear(2, 2)
    with context():
        out = guided_velocity(
            lambda x, t: layer(x),
            lambda x1: layer(x1).square(),
            torch.ones(3, 2),
            torch.ones(3, 2),
            torch.full((3,), 0.5),
            gradient=gradient,
        )
    assert not any(value.requires_grad for value in out)
    assert out.gradient.abs().max() > 0
    assert layer.weight.grad is None


@quick
@given(seeds, st.floats(0, 1))
def test_repair_is_idempotent_and_puts_the_end_into_the_box(seed, t):
    x, velocity = 6 * random(seed, 5, 3) - 3, 8 * random(seed + 1, 5, 3) - 4
    low = -random(seed + 2, 3)
    high = low + random(seed + 3, 3)
    once = repair_to_box(x, velocity, t, low, high)
    end = once + (1 - t) * velocity
    assert (end >= low - 1e-12).all()
    assert (end <= high + 1e-12).all()
    assert torch.equal(repair_to_box(once, velocity, t, low, high), once)
    before = x + (1 - t) * velocity
    inside = (before >= low) & (before <= high)
    assert torch.equal(once[inside], x[inside])
    torch.testing.assert_close(end, before.clamp(low, high), **close)


def test_repair_takes_a_time_for_each_row_and_open_sides():
    x, velocity = torch.zeros(2, 1), torch.full((2, 1), 3.0)
    t = torch.tensor([0.0, 1.0])
    open_box = torch.tensor([-math.inf]), torch.tensor([1.0])
    assert repair_to_box(x, velocity, t, *open_box).tolist() == [[-2.0], [0.0]]


def test_gradients_of_the_repair_are_right():
    x, velocity = random(0, 4, 2).requires_grad_(), (3 * random(1, 4, 2) - 1).requires_grad_()
    low, high = torch.zeros(2).double(), torch.ones(2).double()
    assert torch.autograd.gradcheck(lambda x, u: repair_to_box(x, u, 0.4, low, high), (x, velocity))


# Selection


@quick
@given(seeds, st.floats(0.0, 1.5))
def test_cone_selection_is_the_loop(seed, apex):
    scores, weights = 2 * random(seed, 4, 9, 3) - 1, random(seed + 1, 4, 3) + 0.01
    got = cone_select(scores, weights, torch.full((4,), apex).double())
    for i in range(4):
        angles = [
            math.acos(float(s @ weights[i] / (s.norm() * weights[i].norm()))) for s in scores[i]
        ]
        assert got.angles[i].tolist() == pytest.approx(angles, abs=1e-7)
        inside = [c for c in range(9) if angles[c] <= apex / 2]
        best = max(inside, key=lambda c, i=i: float(scores[i, c] @ weights[i]), default=None)
        assert got.index[i] == (best if inside else min(range(9), key=angles.__getitem__))


@quick
@given(seeds)
def test_wide_cone_is_the_plain_weighted_sum(seed):
    scores, weights = 2 * random(seed, 6, 12, 3) - 1, random(seed + 1, 6, 3)
    got = cone_select(scores, weights, torch.full((6,), 2 * math.pi).double())
    assert torch.equal(got.index, (scores * weights[:, None]).sum(-1).argmax(1))
    # scores better than the origin are never over a right angle away: pi keeps all of them
    got = cone_select(scores.abs(), weights, torch.full((6,), math.pi).double())
    assert torch.equal(got.index, (scores.abs() * weights[:, None]).sum(-1).argmax(1))


def test_on_a_concave_front_the_sum_takes_extremes_and_the_cone_the_point_on_the_ray():
    f1 = torch.linspace(0, 1, 201).double()
    scores = 1.0 - torch.stack([f1, 1 - f1.square()], 1)  # reference (1, 1); ZDT2's front
    weights = simplex_lattice(2, 10)[1:-1]
    weights = weights[(weights[:, 0] - 0.5).abs() > 0.05]  # at (.5, .5) both extremes are tied
    many = scores.expand(len(weights), -1, -1)
    plain = cone_select(many, weights, torch.full((len(weights),), 2 * math.pi).double())
    assert set(plain.index.tolist()) == {0, 200}
    narrow = cone_select(many, weights, torch.full((len(weights),), 1e-9).double())
    assert torch.equal(narrow.index, narrow.angles.argmin(1))
    assert len(set(narrow.index.tolist())) == len(weights)
    chosen = scores[narrow.index]
    # On the ray up to the grid's spacing: the scores share the direction of the weight.
    torch.testing.assert_close(chosen[:, 0] / chosen.sum(1), weights[:, 0], rtol=0, atol=0.02)


def zdt(seed: int, *, convex: bool) -> torch.Tensor:
    """Objectives of candidates: first coordinate uniform, the other nine in [0, 0.1]."""
    u = random(seed, 2000, 10)
    f1, rest = u[:, 0], 0.1 * u[:, 1:]
    g = 1 + 9 * rest.mean(1)
    return torch.stack([f1, g * (1 - (f1 / g).sqrt()) if convex else g * (1 - (f1 / g) ** 2)], 1)


def select(scores: torch.Tensor, *, cone: bool) -> torch.Tensor:
    weights = simplex_lattice(2, 99)
    apex = weight_neighbours(weights).cone_angle
    apex = apex if cone else torch.full_like(apex, 2 * math.pi)
    return cone_select(scores.expand(100, -1, -1), weights, apex).index.unique()


def volume_of(f: torch.Tensor, index: torch.Tensor) -> float:
    return float(hypervolume(f[index], 1.1 * f.amax(0)))


@pytest.mark.parametrize("seed", range(3))
def test_cones_from_the_reference_find_more_of_a_concave_front(seed):
    f = zdt(seed, convex=False)
    scores = 1.1 * f.amax(0) - f
    plain, cone = select(scores, cone=False), select(scores, cone=True)
    assert len(plain) < 12
    assert len(cone) > 40
    gain = volume_of(f, cone) / volume_of(f, plain) - 1
    assert gain > 0.15
    # The control: on a convex front the weighted sum loses little.
    f = zdt(seed, convex=True)
    scores = 1.1 * f.amax(0) - f
    plain, cone = select(scores, cone=False), select(scores, cone=True)
    assert abs(volume_of(f, cone) / volume_of(f, plain) - 1) < gain / 2


@pytest.mark.parametrize("seed", range(3))
def test_cones_from_the_mean_of_the_data_select_dominated_designs(seed):
    f = zdt(seed, convex=False)
    published = select(-(f - f.mean(0)) / f.std(0), cone=True)
    ours = select(1.1 * f.amax(0) - f, cone=True)
    assert len(published) > 25  # diverse, but
    assert volume_of(f, published) < 0.9 * volume_of(f, ours)
    front = set(non_dominated_sort(f)[0].tolist())
    shares = [len(front & set(chosen.tolist())) / len(chosen) for chosen in (published, ours)]
    assert shares[0] < shares[1]


@quick
@given(seeds)
def test_best_weighted_score_never_falls_with_more_neighbours(seed):
    weights = simplex_lattice(3, 4)
    scores = random(seed, len(weights), 5, 3)
    everything = torch.full((len(weights),), 2 * math.pi).double()
    last = torch.full((len(weights),), -math.inf).double()
    for k in (1, 2, 4, 8):
        near = scores[weight_neighbours(weights, k).indices].flatten(1, 2)
        index = cone_select(near, weights, everything).index
        value = (near[torch.arange(len(weights)), index] * weights).sum(1)
        assert (value >= last).all()
        last = value


def test_cone_takes_the_first_of_ties_and_survives_parallel_and_zero_scores():
    scores = torch.tensor([[[0.0, 0.0], [0.3, 0.6], [0.3, 0.6]]], dtype=torch.float64)
    got = cone_select(scores, torch.tensor([[1.0, 2.0]]).double(), torch.tensor([1e-6]).double())
    assert got.index.tolist() == [1]
    assert got.angles[0, 0] == pytest.approx(math.pi / 2)
    assert got.angles[0, 1] < 1e-15


# Categories


@pytest.mark.parametrize("n", [2, 3, 17])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_categories_come_back(n, dtype):
    codes = torch.arange(n).repeat(2)
    logits = categorical_to_logits(codes, n, dtype=dtype)
    assert logits.shape == (2 * n, n - 1)
    assert logits.dtype == dtype
    assert torch.equal(logits_to_categorical(logits), codes)


def test_logits_are_the_smoothed_log_odds():
    n, codes = 4, torch.tensor([0, 2, 3])
    p = 0.6 * torch.eye(n).double()[codes] + 0.4 / n
    expected = p[:, 1:].log() - p[:, :1].log()
    torch.testing.assert_close(categorical_to_logits(codes, n), expected, **close)
    shifted = torch.cat([torch.zeros(3, 1), expected], 1).softmax(1)
    torch.testing.assert_close(shifted, p, **close)


# Hypervolume and fronts


def by_inclusion_exclusion(points: torch.Tensor, reference: torch.Tensor) -> float:
    total = 0.0
    for size in range(1, len(points) + 1):
        for chosen in combinations(points, size):
            side = (reference - torch.stack(chosen).amax(0)).clamp(min=0)
            total -= (-1) ** size * float(side.prod())
    return total


@pytest.fixture(params=["own", "moocore"])
def backend(request, monkeypatch):
    if request.param == "moocore":
        pytest.importorskip("moocore")
    monkeypatch.setattr(pareto, "_has_moocore", lambda: request.param == "moocore")
    return request.param


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("grid", [False, True])
def test_hypervolume_is_inclusion_and_exclusion(backend, m, grid):
    for seed in range(6):
        points = random(seed, 8, m)
        points = (points * 4).round() if grid else points  # a grid has ties and repetitions
        reference = torch.full((m,), 3.0 if grid else 0.8).double()
        got = hypervolume(points, reference)
        assert float(got) == pytest.approx(by_inclusion_exclusion(points, reference), abs=1e-9)


@quick
@given(seeds, st.integers(2, 5))
def test_own_sweep_agrees_with_pymoo(seed, m):
    indicators = pytest.importorskip("pymoo.indicators.hv")
    points = random(seed, 40, m)
    points = points / points.sum(1, keepdim=True) if seed % 2 else points
    reference = torch.full((m,), 0.9).double()
    expected = indicators.HV(ref_point=reference.numpy())(points.numpy())
    kept = points[(points < reference).all(1)].numpy()
    own = pareto._volume_of_any_dimension(kept, reference.numpy())
    assert own == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert float(hypervolume(points, reference)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_hypervolume_of_the_fronts_of_zdt_tends_to_the_integral():
    f1 = torch.linspace(0, 1, 20001).double()
    reference = torch.tensor([1.1, 1.1]).double()
    zdt1, zdt2 = torch.stack([f1, 1 - f1.sqrt()], 1), torch.stack([f1, 1 - f1.square()], 1)
    assert float(hypervolume(zdt1, reference)) == pytest.approx(1.21 - 1 / 3, abs=1e-4)
    assert float(hypervolume(zdt2, reference)) == pytest.approx(1.21 - 2 / 3, abs=1e-4)


@pytest.mark.parametrize("m", [2, 3, 4])
def test_hypervolume_grows_with_points_and_ignores_order_and_dominated_ones(backend, m):
    points, reference = random(0, 15, m), torch.ones(m).double()
    last = 0.0
    for count in range(1, 16):
        volume = float(hypervolume(points[:count], reference))
        assert volume >= last - 1e-12
        last = volume
    shuffled = points[torch.randperm(15, generator=torch.Generator().manual_seed(1))]
    assert float(hypervolume(shuffled, reference)) == pytest.approx(last, abs=1e-12)
    worse = torch.cat([points, points + 0.05])
    assert float(hypervolume(worse, reference)) == pytest.approx(last, abs=1e-12)
    front = points[non_dominated_sort(points)[0]]
    assert float(hypervolume(front, reference)) == pytest.approx(last, abs=1e-12)


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_points_at_or_beyond_the_reference_do_not_count(backend, m):
    reference = torch.ones(m)
    beyond = torch.eye(m)  # touches the reference in one objective
    assert float(hypervolume(beyond, reference)) == 0.0
    inside = torch.cat([beyond, torch.full((1, m), 0.5), torch.full((1, m), math.inf)])
    assert float(hypervolume(inside, reference)) == pytest.approx(0.5**m)
    assert float(hypervolume(torch.full((1, m), -math.inf), reference)) == math.inf


@quick
@given(seeds, st.integers(1, 5), st.booleans())
def test_fronts_are_those_of_peeling(seed, m, grid):
    points = random(seed, 30, m)
    points = (points * 3).round() if grid else points
    no_larger = (points[:, None] <= points).all(-1)  # [i, j]: i nowhere larger than j
    dominates = no_larger & ~no_larger.T
    left = torch.ones(30, dtype=torch.bool)
    for front in non_dominated_sort(points):
        expected = left & ~(dominates & left[:, None]).any(0)
        assert front.tolist() == expected.nonzero().squeeze(1).tolist()
        left &= ~expected
    assert not left.any()


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_fronts_are_those_of_pymoo(m):
    sorting = pytest.importorskip("pymoo.util.nds.non_dominated_sorting")
    points = (random(m, 1500, m) * 50).round()
    expected = sorting.NonDominatedSorting().do(points.numpy())
    got = non_dominated_sort(points)
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.tolist() == sorted(theirs.tolist())


def test_equal_points_share_a_front_and_zero_has_one_sign():
    points = torch.tensor([[1.0, 0.0], [1.0, -0.0], [0.0, 1.0], [1.0, 1.0]])
    assert [front.tolist() for front in non_dominated_sort(points)] == [[0, 1, 2], [3]]
    assert [f.tolist() for f in non_dominated_sort(points.T.contiguous().T)] == [[0, 1, 2], [3]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_results_keep_the_dtype(dtype):
    points = torch.tensor([[0.25, 0.5, 0.5], [0.5, 0.25, 0.5]], dtype=dtype)
    volume = hypervolume(points, torch.ones(3, dtype=dtype))
    assert volume.dtype == dtype
    assert float(volume) == 0.25
    assert len(non_dominated_sort(points)) == 1
    out = guided_velocity(lambda x, t: x, lambda x1: x1, points, points, 0.5)
    assert {value.dtype for value in out} == {dtype}
    box = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
    assert repair_to_box(points, points, 0.5, *box).dtype == dtype
    assert cone_select(points[None], points[:1], points[0, :1]).angles.dtype == dtype
    assert weight_neighbours(points).cone_angle.dtype == dtype
    assert simplex_lattice(2, 3, dtype=dtype).dtype == dtype


P, W, NAN = torch.ones(2, 2), torch.ones(2, 2), torch.full((2, 2), math.nan)
LOW, HIGH = torch.zeros(2), torch.ones(2)


def guide(**changed):
    given = {"velocity_fn": lambda x, t: x, "predictors": lambda x1: x1, "x": P, "weights": W}
    return guided_velocity(**{**given, "t": 0.5, **changed})


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: simplex_lattice(0, 3), ValueError, "objectives"),
        (lambda: simplex_lattice(2, 1.5), TypeError, "partitions"),
        (lambda: minimum_partitions(1), ValueError, "count"),
        (lambda: minimum_partitions(2, True), TypeError, "count"),
        (lambda: weight_neighbours(torch.ones(2)), ValueError, "weights"),
        (lambda: weight_neighbours(P - 2), ValueError, "weights"),
        (lambda: weight_neighbours(P * 0), ValueError, "weights"),
        (lambda: weight_neighbours(NAN), ValueError, "weights"),
        (lambda: weight_neighbours(P, 3), ValueError, "k"),
        (lambda: guide(x=torch.ones(2)), ValueError, "x"),
        (lambda: guide(x=torch.ones(0, 2), weights=torch.ones(0, 2)), ValueError, "x"),
        (lambda: guide(x=P.long()), TypeError, "x"),
        (lambda: guide(weights=torch.ones(3, 2)), ValueError, "weights"),
        (lambda: guide(t=1.5), ValueError, "t"),
        (lambda: guide(t=torch.ones(3)), ValueError, "t"),
        (lambda: guide(gamma=-1.0), ValueError, "gamma"),
        (lambda: guide(gradient="x"), ValueError, "gradient"),
        (lambda: guide(minimum_time=0.0), ValueError, "minimum_time"),
        (lambda: guide(velocity_fn=lambda x, t: x[:1]), ValueError, "velocity_fn"),
        (lambda: guide(predictors=lambda x1: x1[:, 0]), ValueError, "predictors"),
        (lambda: guide(predictors=torch.ones_like), ValueError, "predictors"),
        (lambda: repair_to_box(P, P[:1], 0.5, LOW, HIGH), ValueError, "velocity"),
        (lambda: repair_to_box(P, P, 0.5, LOW[:1], HIGH), ValueError, "low"),
        (lambda: repair_to_box(P, P, 0.5, HIGH, LOW), ValueError, "low"),
        (lambda: repair_to_box(P, P, -0.1, LOW, HIGH), ValueError, "t"),
        (lambda: cone_select(P, W, LOW), ValueError, "scores"),
        (lambda: cone_select(NAN[None], W[:1], LOW[:1]), ValueError, "scores"),
        (lambda: cone_select(P[None], W, LOW[:1]), ValueError, "weights"),
        (lambda: cone_select(P[None], W[:1], LOW), ValueError, "cone_angle"),
        (lambda: categorical_to_logits(LOW, 3), TypeError, "codes"),
        (lambda: categorical_to_logits(torch.tensor([3]), 3), ValueError, "codes"),
        (lambda: categorical_to_logits(torch.tensor([0]), 1), ValueError, "num_classes"),
        (lambda: logits_to_categorical(LOW), ValueError, "logits"),
        (lambda: logits_to_categorical(NAN), ValueError, "logits"),
        (lambda: hypervolume(P, torch.ones(3)), ValueError, "reference"),
        (lambda: hypervolume(P, torch.tensor([1.0, math.inf])), ValueError, "reference"),
        (lambda: hypervolume(NAN, HIGH), ValueError, "points"),
        (lambda: hypervolume(torch.ones(0, 2), HIGH), ValueError, "points"),
        (lambda: hypervolume(P.long(), HIGH), TypeError, "points"),
        (lambda: non_dominated_sort(NAN), ValueError, "points"),
        (lambda: non_dominated_sort(torch.ones(3)), ValueError, "points"),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=rf"^{named}\b"):
        call()
