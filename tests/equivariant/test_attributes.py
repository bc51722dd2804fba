"""Invariants against rigid motions, the envelope against its derivatives, graphs against loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.equivariant import (
    attributes,
    invariant_attributes,
    polynomial_cutoff,
    polynomial_features,
    radius_graph,
)

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)
close = {"rtol": 0, "atol": 1e-12}
kinds = st.sampled_from(["paper", "complete"])
PAIR = torch.tensor([[1], [0]])


def cloud(seed: int, dim: int = 3, points: int = 6):
    """Positions, unit vectors, edges and an orthogonal matrix."""
    g = torch.Generator().manual_seed(seed)
    pos, ori = torch.randn(2, points, dim, dtype=torch.float64, generator=g)
    Q = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=g)).Q
    edges = torch.randint(0, points, (2, 20), generator=g)
    return pos, ori / ori.norm(dim=1, keepdim=True), edges, Q


@quick
@given(seeds, kinds)
def test_invariants_ignore_rotation_reflection_and_translation_in_space(seed, kind):
    pos, ori, edges, Q = cloud(seed)
    expected = invariant_attributes(pos, ori, edges, invariants=kind)
    for R in (Q, -Q):
        got = invariant_attributes(pos @ R.T + 3, ori @ R.T, edges, invariants=kind)
        torch.testing.assert_close(got, expected, **close)


@quick
@given(seeds, kinds)
def test_invariants_ignore_rotation_and_translation_in_the_plane(seed, kind):
    pos, ori, edges, Q = cloud(seed, dim=2)
    R = Q * torch.tensor([1.0, torch.linalg.det(Q)])
    expected = invariant_attributes(pos, ori, edges, invariants=kind)
    got = invariant_attributes(pos @ R.T - 2, ori @ R.T, edges, invariants=kind)
    torch.testing.assert_close(got, expected, **close)
    assert expected.shape == (20, 4 if kind == "complete" else 3)


@quick
@given(seeds)
def test_invariants_are_their_formulas(seed):
    pos, ori, edges, _ = cloud(seed)
    rows = []
    for s, r in edges.T.tolist():
        w = pos[s] - pos[r]
        along = w.dot(ori[r])
        across = (w - along * ori[r]).norm()
        rows.append(torch.stack((along, across, ori[s].dot(ori[r]), w.dot(ori[s]))))
    got = invariant_attributes(pos, ori, edges, invariants="complete")
    torch.testing.assert_close(got, torch.stack(rows), **close)
    paper = invariant_attributes(pos, ori, edges)
    torch.testing.assert_close(paper, got[:, :3], rtol=0, atol=0)


def test_three_invariants_do_not_tell_two_pairs_apart_and_four_do():
    x, y, z = torch.eye(3, dtype=torch.float64)
    pos = torch.stack((0 * x, x))
    along, beside = torch.stack((z, x)), torch.stack((z, y))
    paper = [invariant_attributes(pos, ori, PAIR) for ori in (along, beside)]
    assert torch.equal(paper[0], paper[1])
    full = [invariant_attributes(pos, o, PAIR, invariants="complete") for o in (along, beside)]
    assert [f[0, 3].item() for f in full] == [1.0, 0.0]


@quick
@given(seeds)
def test_four_invariants_determine_the_pair_up_to_a_motion(seed):
    """The Gram matrix of (w, o_r, o_s) is a function of the four, so the triple is too."""
    pos, ori, edges, _ = cloud(seed)
    a, b, c, d = invariant_attributes(pos, ori, edges, invariants="complete").unbind(1)
    one = torch.ones_like(a)
    gram = torch.stack((a**2 + b**2, a, d, a, one, c, d, c, one), dim=1).view(-1, 3, 3)
    w = pos[edges[0]] - pos[edges[1]]
    triple = torch.stack((w, ori[edges[1]], ori[edges[0]]), dim=1)
    torch.testing.assert_close(gram, triple @ triple.mT, **close)


def test_the_sense_of_turning_is_lost_by_the_plane_cosine_and_kept_by_complete():
    pos, east = torch.tensor([[0.0, 0.0], [1.0, 2.0]]), torch.tensor([1.0, 0.0])
    north, south = torch.tensor([0.0, 1.0]), torch.tensor([0.0, -1.0])
    pairs = torch.stack((east, north)), torch.stack((east, south))
    paper = [invariant_attributes(pos, ori, PAIR) for ori in pairs]
    assert torch.equal(paper[0], paper[1])
    sines = [invariant_attributes(pos, o, PAIR, invariants="complete")[0, 3].item() for o in pairs]
    assert sines == [1.0, -1.0]


@pytest.mark.parametrize(
    ("direction", "expected"),
    [([1.0, 0, 0], [2.0, 0.0]), ([-1.0, 0, 0], [-2.0, 0.0]), ([0.0, 1, 0], [0.0, 2.0])],
)
def test_worked_examples_of_a_pair_at_distance_two(direction, expected):
    pos = torch.tensor([[0.0, 0, 0], [2.0, 0, 0]], dtype=torch.float64)
    ori = torch.tensor([direction, direction], dtype=torch.float64)
    got = invariant_attributes(pos, ori, PAIR)[0]
    torch.testing.assert_close(got, torch.tensor([*expected, 1.0]).double(), rtol=0, atol=0)


@pytest.mark.parametrize("eps", [0.0, 1e-12])
@pytest.mark.parametrize("offset", [[0.0, 0, 0], [0.0, 0, 2.0], [0.3, 0.4, 2.0]])
def test_gradients_are_finite_at_a_point_on_the_axis_and_at_itself(offset, eps):
    pos = torch.tensor([[0.0, 0, 0], offset], dtype=torch.float64, requires_grad=True)
    ori = torch.tensor([[0.0, 0, 1], [0.0, 0, 1]], dtype=torch.float64)
    edges = torch.tensor([[1, 0], [0, 0]])
    value = invariant_attributes(pos, ori, edges, invariants="complete", eps=eps)
    (first,) = torch.autograd.grad(value.sum(), pos, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), pos)
    assert first.isfinite().all()
    assert second.isfinite().all()


def test_gradcheck_of_invariants_off_the_axis():
    pos, ori, edges, _ = cloud(1, points=3)
    edges = edges[:, edges[0] != edges[1]] % 3
    edges = edges[:, edges[0] != edges[1]][:, :4]
    function = lambda p, o: invariant_attributes(p, o, edges, invariants="complete")  # noqa: E731
    assert torch.autograd.gradcheck(function, (pos.requires_grad_(), ori.requires_grad_()))
    assert torch.autograd.gradgradcheck(function, (pos, ori))


def test_smoothing_bounds_the_curvature_beside_the_axis():
    """Rounding puts a parallel vector 1e-17 beside the axis: curvature 1e17 without ``eps``."""
    ori = torch.tensor([[0.0, 0, 1], [0.0, 0, 1]], dtype=torch.float64)

    def curvature(eps):
        pos = torch.tensor([[0.0, 0, 0], [1e-17, 0, 2.0]], dtype=torch.float64)
        norm = lambda p: invariant_attributes(p, ori, PAIR, eps=eps)[0, 1]  # noqa: E731
        return torch.autograd.functional.hessian(norm, pos).abs().max().item()

    assert curvature(0.0) > 1e16
    assert curvature(1e-12) <= 1e6 * (1 + 1e-9)


@quick
@given(st.integers(1, 12), st.floats(0.1, 100))
def test_envelope_starts_at_one_and_ends_flat_at_zero(p, r_max):
    r = torch.tensor([0.0, r_max], dtype=torch.float64, requires_grad=True)
    value = polynomial_cutoff(r, r_max, p)
    assert value.tolist() == [1.0, 0.0]
    inside = torch.tensor(r_max * (1 - 1e-5), dtype=torch.float64, requires_grad=True)
    value = polynomial_cutoff(inside, r_max, p)
    (first,) = torch.autograd.grad(value, inside, create_graph=True)
    (second,) = torch.autograd.grad(first, inside)
    # The third derivative is about p^3: after 1e-5 of r_max it has made this much.
    assert abs(value) < 1e-10
    assert abs(first * r_max) < 4 * (p + 2) ** 3 * 1e-10
    assert abs(second * r_max**2) < 4 * (p + 2) ** 3 * 1e-5


def test_envelope_by_hand_monotone_and_zero_far_away_with_zero_gradient():
    assert polynomial_cutoff(torch.tensor(0.5), 1.0, p=2).item() == 0.3125
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert (polynomial_cutoff(u, 1.0).diff() <= 0).all()
    far = torch.tensor([1.0, 1.5, 1e30, 1e300], dtype=torch.float64, requires_grad=True)
    value = polynomial_cutoff(far, 1.0)
    value.sum().backward()
    assert value.abs().max() == 0
    assert far.grad.abs().max() == 0
    half = polynomial_cutoff(torch.tensor([0.5], dtype=torch.float16), 1.0)
    assert half.dtype == torch.float16


def test_gradcheck_of_envelope_and_features():
    r = torch.tensor([0.2, 0.9, 1.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: polynomial_cutoff(x, 1.0), r)
    assert torch.autograd.gradcheck(lambda x: polynomial_features(x, 3), r)


@quick
@given(seeds, st.integers(1, 4), st.integers(1, 3))
def test_features_are_all_products_in_order(seed, degree, width):
    x = torch.randn(2, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    got = polynomial_features(x, degree)
    places = torch.cartesian_prod(*[torch.arange(width)] * degree).view(-1, degree)
    torch.testing.assert_close(got[:, -(width**degree) :], x[:, places].prod(-1), **close)
    assert got.shape[1] == sum(width**k for k in range(1, degree + 1))


def test_features_of_a_scalar_are_its_powers_and_of_a_pair_fourteen():
    assert polynomial_features(torch.tensor([3.0]), 3).tolist() == [3.0, 9.0, 27.0]
    assert polynomial_features(torch.ones(2), 3).shape == (14,)


@quick
@given(seeds, st.sampled_from([None, 0.5, 1.5]), st.booleans(), st.sampled_from([3, 1000]))
def test_radius_graph_is_the_double_loop_whatever_the_block(seed, radius, batched, block):
    pos, _, _, _ = cloud(seed, points=7)
    clouds = torch.tensor([0, 0, 1, 1, 1, 0, 2]) if batched else torch.zeros(7, dtype=torch.long)
    expected = [
        (s, r)
        for r in range(7)
        for s in range(7)
        if s != r
        and clouds[s] == clouds[r]
        and (radius is None or math.dist(pos[s], pos[r]) <= radius)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attributes, "DISTANCES_AT_ONCE", block)
        got = radius_graph(pos, radius, clouds if batched else None)
    assert got.T.tolist() == [list(edge) for edge in expected]


def test_radius_graph_is_exact_far_from_the_origin():
    pos = torch.tensor([[0.0, 0.0], [0.5, 0.0], [2.0, 0.0]], dtype=torch.float64) + 1e7
    assert radius_graph(pos, 1.0).T.tolist() == [[1, 0], [0, 1]]


P3, E1 = torch.zeros(3, 3), torch.tensor([[0], [1]])


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: invariant_attributes(torch.zeros(3, 4), P3, E1), ValueError, "pos"),
        (lambda: invariant_attributes(P3, P3[:2], E1), ValueError, "ori"),
        (lambda: invariant_attributes(P3, P3, E1 + 2), ValueError, "edge_index"),
        (lambda: invariant_attributes(P3, P3, E1 - 1), ValueError, "edge_index"),
        (lambda: invariant_attributes(P3, P3, E1.float()), TypeError, "edge_index"),
        (lambda: invariant_attributes(P3, P3, E1[0]), ValueError, "edge_index"),
        (lambda: invariant_attributes(P3, P3, E1, invariants="x"), ValueError, "invariants"),
        (lambda: invariant_attributes(P3.long(), P3, E1), TypeError, "pos"),
        (lambda: invariant_attributes(P3[:0], P3[:0], E1), ValueError, "pos"),
        (lambda: invariant_attributes(P3, P3, E1, eps=-1.0), ValueError, "eps"),
        (lambda: polynomial_cutoff(P3, 0.0), ValueError, "r_max"),
        (lambda: polynomial_cutoff(P3, 1.0, 0), ValueError, "p must"),
        (lambda: polynomial_features(P3, 0), ValueError, "degree"),
        (lambda: polynomial_features(torch.tensor(1.0), 2), ValueError, "x must"),
        (lambda: radius_graph(P3, -1.0), ValueError, "radius"),
        (lambda: radius_graph(P3, 1.0, torch.zeros(3)), TypeError, "batch"),
        (lambda: radius_graph(P3, 1.0, torch.zeros(2).long()), ValueError, "batch"),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()
