"""OPIS and the rates of classes against pair counting."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.metric_learning import operating_point_utility, operating_points, opis

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)


def batch(seed, items=30, classes=4, dim=3):
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(items, dim, dtype=torch.float64, generator=g)
    labels = torch.randint(0, classes, (items,), generator=g)
    labels[: 2 * classes] = torch.arange(classes).repeat(2)
    return rows, labels


def circle(*degrees):
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack((angle.cos(), angle.sin()), -1)


def pairs(rows, labels):
    unit = torch.nn.functional.normalize(rows, dim=-1)
    for i in range(len(rows)):
        for j in range(i):
            yield int(labels[i]), int(labels[j]), float((unit[i] - unit[j]).norm())


@quick
@given(seeds)
def test_rates_are_counts_of_pairs(seed):
    rows, labels = batch(seed, 14, 3)
    thresholds = torch.tensor([1.3, 0.2, 0.9, 1.99], dtype=torch.float64)
    got = operating_point_utility(rows, labels, thresholds)
    every = list(pairs(rows, labels))
    for g, d in enumerate(thresholds.tolist()):
        for c in range(3):
            within = [x <= d for a, b, x in every if a == c == b]
            across = [x > d for a, b, x in every if (a == c) != (b == c)]
            psi, phi = sum(within) / len(within), sum(across) / len(across)
            utility = 2 * phi * psi / (phi + psi) if phi + psi else 0.0
            assert got.sensitivity[g, c].item() == pytest.approx(psi, abs=1e-12)
            assert got.specificity[g, c].item() == pytest.approx(phi, abs=1e-12)
            assert got.utility[g, c].item() == pytest.approx(utility, abs=1e-12)


@quick
@given(seeds)
def test_rates_are_monotone_and_bound_the_utility(seed):
    rows, labels = batch(seed)
    got = operating_point_utility(rows, labels, torch.linspace(0, 2, 50, dtype=torch.float64))
    assert (got.sensitivity.diff(dim=0) >= 0).all()
    assert (got.specificity.diff(dim=0) <= 0).all()
    smaller = torch.minimum(got.sensitivity, got.specificity)
    assert (got.utility <= (2 * smaller).clamp(max=1) + 1e-12).all()


@quick
@given(seeds)
def test_the_exact_integral_is_the_sum_over_steps(seed):
    rows, labels = batch(seed, 16, 3)
    low, high = 0.3, 1.4
    inside = sorted(x for _, _, x in pairs(rows, labels) if low < x < high)
    edges = torch.tensor([low, *inside, high], dtype=torch.float64)
    middle = (edges[1:] + edges[:-1]) / 2
    utility = operating_point_utility(rows, labels, middle).utility
    width = edges.diff() / (high - low)
    got = opis(rows, labels, threshold_range=(low, high))
    expected = (utility.var(-1, correction=0) * width).sum()
    torch.testing.assert_close(got.opis, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        got.mean_utility, (utility.mean(-1) * width).sum(), rtol=0, atol=1e-9
    )
    assert 0 <= got.opis <= 0.25


@quick
@given(seeds)
def test_the_grid_is_the_plain_mean_and_comes_near_the_integral(seed):
    rows, labels = batch(seed)
    exact = opis(rows, labels)
    low, high = (float(end) for end in exact.threshold_range)
    at = torch.linspace(low, high, 7, dtype=torch.float64)
    utility = operating_point_utility(rows, labels, at).utility
    got = opis(rows, labels, threshold_range=(low, high), grid=7)
    expected = utility.var(-1, correction=0).mean()
    torch.testing.assert_close(got.opis, expected, rtol=0, atol=1e-12)
    fine = opis(rows, labels, grid=20_001)
    # a step is misplaced by one cell at most; a class has at most 30 * 30 of them
    assert abs(fine.opis - exact.opis) < 4 * 900 / 20_000
    assert abs(fine.opis - exact.opis) < 0.005
    assert abs(fine.mean_utility - exact.mean_utility) < 0.005


@quick
@given(seeds, st.floats(0, 0.9))
def test_the_range_is_the_linear_quantile_of_pooled_negatives(seed, rate):
    rows, labels = batch(seed)
    negative = torch.tensor([x for a, b, x in pairs(rows, labels) if a != b], dtype=torch.float64)
    got = opis(rows, labels, far_range=(rate, rate + 0.1)).threshold_range
    for end, level in zip(got, (rate, rate + 0.1), strict=True):
        expected = torch.quantile(negative, level)
        torch.testing.assert_close(end, expected, rtol=0, atol=1e-12)


def test_blocks_do_not_change_the_range(monkeypatch):
    rows, labels = batch(5, 60)
    expected = opis(rows, labels)
    monkeypatch.setattr(operating_points, "_BLOCK_ELEMENTS", 50)
    monkeypatch.setattr(operating_points, "_BINS", 3)
    got = opis(rows, labels)
    for a, b in zip((*got[:2], *got[2]), (*expected[:2], *expected[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)  # products of other shapes round anew


def test_congruent_classes_have_no_inconsistency():
    rows = circle(-5, 5, 115, 125, 235, 245)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    got = opis(rows, labels, threshold_range=(0.1, 1.9))
    assert got.opis.item() == pytest.approx(0, abs=1e-12)
    assert got.mean_utility > 0.8
    wider = opis(circle(-5, 5, 105, 135, 235, 245), labels, threshold_range=(0.1, 1.9))
    assert wider.opis > 0.01


def test_two_classes_by_hand():
    got = opis(circle(-5, 5, 80, 100), torch.tensor([0, 0, 1, 1]), threshold_range=(0.1, 0.5))
    tight, loose = (2 * math.sin(math.radians(half)) for half in (5, 10))
    assert got.opis.item() == pytest.approx(0.25 * (loose - tight) / 0.4, abs=1e-12)
    utility = (0.5 - tight + 0.5 - loose) / 0.8
    assert got.mean_utility.item() == pytest.approx(utility, abs=1e-12)


def test_one_class_has_score_zero_and_needs_a_range():
    rows, labels = torch.eye(3), torch.zeros(3, dtype=torch.long)
    assert opis(rows, labels, threshold_range=(0.5, 1.8)).opis == 0
    with pytest.raises(ValueError, match="labels"):
        opis(rows, labels)


@quick
@given(seeds)
def test_rotation_length_names_and_order_do_not_matter(seed):
    rows, labels = batch(seed)
    g = torch.Generator().manual_seed(seed)
    expected = opis(rows, labels, threshold_range=(0.2, 1.5)).opis
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=g)).Q
    order = torch.randperm(len(rows), generator=g)
    for changed, names in ((3 * rows @ turn, labels), (rows[order], 7 - 2 * labels[order])):
        got = opis(changed, names, threshold_range=(0.2, 1.5)).opis
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


def test_items_alone_in_their_class_are_left_out():
    rows, labels = batch(1)
    more, names = torch.cat((rows, torch.randn(2, 3).double())), torch.cat((labels, labels[:2] + 9))
    assert opis(more, names) == opis(rows, labels)
    at = operating_point_utility(more, names, torch.tensor([1.0]))
    assert at.utility.shape == (1, 4)


def test_accepted_means_at_most_the_threshold_and_ties_are_exact():
    rows, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])  # every distance is sqrt 2
    root = torch.tensor([2.0], dtype=torch.float64).sqrt()
    at = operating_point_utility(rows, labels, torch.cat((root, root * (1 - 1e-12))))
    assert at.sensitivity.tolist() == [[1, 1], [0, 0]]
    assert at.specificity.tolist() == [[0, 0], [1, 1]]
    assert at.utility.abs().max() == 0


def test_a_collapsed_embedding_is_consistent():
    got = opis(torch.ones(6, 2), torch.arange(3).repeat(2), threshold_range=(0.1, 0.5))
    assert got.opis == 0
    assert got.mean_utility == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_results_keep_the_dtype_and_carry_no_gradient(dtype):
    rows, labels = batch(0)
    rows = (1e4 * rows / rows.abs().max()).to(dtype).requires_grad_()
    got = opis(rows, labels)
    assert got.opis.dtype == got.mean_utility.dtype == dtype
    assert not got.opis.requires_grad
    assert got.opis.isfinite()
    at = operating_point_utility(rows, labels, torch.tensor([1.0]))
    assert at.utility.dtype == dtype


def test_metric_over_batches_is_the_score_of_the_whole():
    pytest.importorskip("torchmetrics")
    from steelyard.metric_learning import OPISMetric

    rows, labels = batch(4)
    metric = OPISMetric(far_range=(0.05, 0.3), compute_on_cpu=True)
    for start in range(0, 30, 7):
        metric.update(rows[start : start + 7], labels[start : start + 7])
    expected = opis(rows, labels, far_range=(0.05, 0.3))
    assert metric.compute() == expected.opis
    assert metric.details() == expected
    metric.reset()
    metric.update(rows, labels)
    assert metric.compute() == expected.opis
    with pytest.raises(ValueError, match="no_such_option"):
        OPISMetric(no_such_option=1)


X, Y = torch.eye(4), torch.tensor([0, 0, 1, 1])
T = torch.ones(1)


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: opis(X[0], Y), ValueError, "embeddings"),
        (lambda: opis(X.long(), Y), TypeError, "embeddings"),
        (lambda: opis(X * torch.nan, Y), ValueError, "embeddings"),
        (lambda: opis(X, Y[:2]), ValueError, "labels"),
        (lambda: opis(X, torch.arange(4)), ValueError, "labels"),
        (lambda: opis(X, Y), ValueError, "far_range"),  # all distances equal
        (lambda: opis(X, Y, far_range=(0.1, 0.1)), ValueError, "far_range"),
        (lambda: opis(X, Y, far_range=(-0.1, 0.1)), ValueError, "far_range"),
        (lambda: opis(X, Y, threshold_range=(1.0, 1.0)), ValueError, "threshold_range"),
        (lambda: opis(X, Y, threshold_range=(0.1, 1.0), grid=1), ValueError, "grid"),
        (lambda: opis(X, Y, threshold_range=(0.1, 1.0), grid=5.0), TypeError, "grid"),
        (lambda: operating_point_utility(X, Y, T[0]), ValueError, "thresholds"),
        (lambda: operating_point_utility(X, Y, T[:0]), ValueError, "thresholds"),
        (lambda: operating_point_utility(X, Y, T.long()), TypeError, "thresholds"),
        (lambda: operating_point_utility(X, Y, T * torch.nan), ValueError, "thresholds"),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()
