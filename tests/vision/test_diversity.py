"""Energies, gaps, similarities and sampling rules against their formulas and axioms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.vision import (
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

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)
close = {"rtol": 0, "atol": 1e-12}


def random(seed: int, *shape: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=g)


@quick
@given(seeds, st.floats(0.01, 10), st.floats(-50, 50))
def test_energy_is_its_formula_its_bounds_and_its_shift(seed, tau, shift):
    logits = random(seed, 4, 5)
    energy = free_energy(logits, tau)
    expected = [-tau * math.log(sum(math.exp(g / tau) for g in row)) for row in logits.tolist()]
    if tau > 0.1:  # the naive form overflows below
        torch.testing.assert_close(energy, torch.tensor(expected).double(), rtol=0, atol=1e-5)
    top = logits.amax(1)
    assert (energy <= -top + 1e-12).all()
    assert (energy >= -top - tau * math.log(5) - 1e-12).all()
    torch.testing.assert_close(free_energy(logits + shift, tau), energy - shift, rtol=0, atol=1e-9)


def test_energy_tends_to_minus_the_largest_logit_and_survives_large_ones():
    logits = random(0, 3, 4)
    torch.testing.assert_close(free_energy(logits, 1e-6), -logits.amax(1), rtol=0, atol=1e-5)
    large = torch.tensor([[1e4, -1e4], [-1e4, -1e4]], requires_grad=True)
    energy = free_energy(large)
    assert energy.isfinite().all()
    (gradient,) = torch.autograd.grad(energy.sum(), large)
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, 0.0], [-0.5, -0.5]]))
    assert free_energy(torch.tensor([[1.0, -torch.inf]])).tolist() == [-1.0]
    assert free_energy(torch.full((1, 2), -torch.inf)).tolist() == [torch.inf]
    assert free_energy(torch.zeros(1, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    # 2048 equal classes: the sum of exponentials overflows float16, the energy does not.
    half = free_energy(torch.full((1, 2048), 8.0, dtype=torch.float16))
    assert half.item() == pytest.approx(-8 - 0.9 * math.log(2048), rel=1e-3)


def test_gradcheck_and_compilation_of_the_energy():
    logits = random(1, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(free_energy, logits)
    compiled = torch.compile(free_energy, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits), free_energy(logits), **close)


def test_the_energy_of_real_classes_forgets_extra_ones_only_when_they_are_cut_off():
    """A sigmoid head scores classes on their own; a softmax shares its mass with the extra ones."""
    real, extra = random(2, 1, 3), random(3, 1, 2)
    first, second = torch.cat((real, extra), 1), torch.cat((real, extra + 5), 1)
    assert torch.equal(first[:, :3].sigmoid(), second[:, :3].sigmoid())
    assert not torch.allclose(first.softmax(1)[:, :3], second.softmax(1)[:, :3], atol=0.01)
    assert torch.equal(free_energy(first[:, :3]), free_energy(second[:, :3]))


def test_gap_is_zero_on_one_set_and_positive_for_a_memoriser():
    ap = {"rare": 0.2, "all": 0.4}
    assert train_validation_gap(ap, ap) == {"rare": 0.0, "all": 0.0}
    gap = train_validation_gap({"rare": 1.0, "all": 1.0}, ap)
    assert gap == pytest.approx({"rare": 0.8, "all": 0.6})
    tensors = train_validation_gap({"all": torch.tensor(0.75)}, {"all": torch.tensor(0.5)})
    assert tensors["all"] == 0.25


def test_gap_without_ground_truth_is_not_a_number():
    gap = train_validation_gap({"rare": 0.5, "all": 0.5}, {"rare": -1.0, "all": 0.25})
    assert math.isnan(gap["rare"])
    assert gap["all"] == 0.25


def test_range_uses_the_sample_deviation():
    values = random(0, 5)
    got = repeat_range(values, sigmas=2.0)
    mean = sum(values.tolist()) / 5
    deviation = math.sqrt(sum((x - mean) ** 2 for x in values.tolist()) / 4)
    expected = [mean, mean - 2 * deviation, mean + 2 * deviation]
    assert [float(x) for x in got] == pytest.approx(expected, abs=1e-12)
    same = repeat_range(torch.full((3,), 0.5, dtype=torch.float16))
    assert [float(x) for x in same] == [0.5] * 3
    assert same.mean.dtype == torch.float16


@quick
@given(seeds, st.floats(1e-30, 1e30))
def test_similarity_ignores_positive_scale_and_lies_in_its_range(seed, scale):
    real, generated = random(seed, 4, 3), random(seed + 1, 5, 3)
    got = inter_similarity(real, generated)
    scaled = inter_similarity(real * scale, generated / scale)
    torch.testing.assert_close(scaled.similarity, got.similarity, **close)
    assert got.similarity.abs().max() <= 1
    expected = torch.nn.functional.cosine_similarity(generated[:, None], real[None], dim=-1)
    torch.testing.assert_close(got.similarity, expected, **close)
    torch.testing.assert_close(got.score, expected.mean(1), **close)
    assert torch.equal(got.keep, got.score >= 0.6)


def test_a_copy_of_the_only_crop_scores_one_and_thresholds_keep_all_or_none():
    real, generated = random(0, 1, 6), random(1, 4, 6)
    copy = inter_similarity(real, real * 3)
    torch.testing.assert_close(copy.score, torch.ones(1).double(), **close)
    assert inter_similarity(real, generated, threshold=-1.0).keep.all()
    assert not inter_similarity(real, real, threshold=1.01).keep.any()
    assert inter_similarity(real, torch.zeros(1, 6).double()).score.tolist() == [0.0]


def test_the_mean_punishes_a_category_of_two_looks_and_top_one_does_not():
    real = torch.eye(2, dtype=torch.float64)
    generated = torch.tensor([[1.0, 0.0], [0.7, 0.7]], dtype=torch.float64)
    assert inter_similarity(real, generated).keep.tolist() == [False, True]
    best = inter_similarity(real, generated, top_k=1)
    assert best.score[0] == 1
    assert best.keep.all()
    torch.testing.assert_close(
        inter_similarity(real, generated, top_k=2).score, inter_similarity(real, generated).score
    )


def test_similarity_is_detached_and_keeps_the_dtype():
    real = torch.ones(2, 3, dtype=torch.float16, requires_grad=True)
    got = inter_similarity(real, real)
    assert not got.score.requires_grad
    assert got.score.dtype == got.similarity.dtype == torch.float16


def test_grouped_average_leaves_out_categories_without_ground_truth():
    ap = torch.tensor([0.5, -1.0, 0.25, 0.75, -1.0], dtype=torch.float64)
    got = grouped_average(ap, ["r", "r", "c", "c", "f"])
    assert list(got) == ["r", "c", "f", "all"]
    assert [float(x) for x in got.values()] == [0.5, 0.5, -1.0, 0.5]


def test_repeat_factors_by_hand_and_their_scaling():
    images = [[0], [0, 1], [0, 0], [0], [], [0], [0], [0], [0], [0]]
    got = repeat_factors(images, 3, threshold=0.4)
    assert got.category.tolist() == pytest.approx([1.0, 2.0, 1.0], abs=1e-12)
    assert got.image.tolist() == pytest.approx([1, 2, *[1] * 8], abs=1e-12)
    double = repeat_factors(images, 3, threshold=0.8)
    assert double.category[1] == pytest.approx(2 * math.sqrt(2), abs=1e-12)
    assert repeat_factors(images, 3, threshold=0.1).category.tolist() == [1.0] * 3


def test_federated_weights_are_powers_of_the_counts():
    counts = torch.tensor([0, 1, 9, 100])
    assert federated_weights(counts).tolist() == [0.0, 1.0, 3.0, 10.0]
    assert federated_weights(counts, 0.0).tolist() == [1.0] * 4
    assert federated_weights(counts.float(), 1.0).dtype == torch.float32


def test_federated_classes_keep_the_present_and_fill_up():
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    g = torch.Generator().manual_seed(0)
    chosen = federated_classes(torch.tensor([[2], [2]]), weights, total=3, generator=g)
    assert chosen[2]
    assert chosen.sum() == 3
    assert federated_classes(torch.tensor([0]), weights).tolist() == [True, True, False, True, True]
    many = federated_classes(torch.tensor([0, 1, 3]), weights, total=1)
    assert many.tolist() == [True, True, False, True, False]


def test_negatives_are_drawn_in_proportion_to_their_weights():
    """One of two negatives with weights 3 and 1, 2000 times: standard error 0.01, bound 5."""
    g = torch.Generator().manual_seed(0)
    weights, present = torch.tensor([5.0, 3.0, 1.0]), torch.tensor([0])
    draws = [federated_classes(present, weights, total=2, generator=g)[1] for _ in range(2000)]
    assert abs(torch.stack(draws).float().mean() - 0.75) < 0.05


def test_draws_are_balanced_over_categories_whatever_the_pool():
    """Chi-square with two degrees of freedom: above 27.6 with probability 1e-6."""
    sizes = torch.tensor([1, 0, 50, 1000])
    g = torch.Generator().manual_seed(0)
    draws = balanced_draws(sizes, 6000, generator=g)
    counts = torch.bincount(draws.category, minlength=4)
    assert counts[1] == 0
    assert ((counts[[0, 2, 3]] - 2000).square() / 2000).sum() < 27.6
    assert (draws.item < sizes[draws.category]).all()
    assert (draws.item >= 0).all()
    middle = torch.bincount(draws.item[draws.category == 2], minlength=50)
    expected = middle.sum() / 50
    assert ((middle - expected).square() / expected).sum() < 115  # 49 degrees, p < 1e-6
    again = balanced_draws(sizes, 6000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.item, draws.item)
    assert len(balanced_draws(sizes, 0).category) == 0


F, N = torch.ones(2, 3), torch.ones(3, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: free_energy(F[0]), ValueError, "logits"),
        (lambda: free_energy(F[:0]), ValueError, "logits"),
        (lambda: free_energy(F.long()), TypeError, "logits"),
        (lambda: free_energy(F, 0.0), ValueError, "temperature"),
        (lambda: train_validation_gap({}, {}), ValueError, "train"),
        (lambda: train_validation_gap({"a": 1.0}, {"b": 1.0}), ValueError, "validation"),
        (lambda: repeat_range(F[0, :1]), ValueError, "values"),
        (lambda: repeat_range(F[0], sigmas=-1.0), ValueError, "sigmas"),
        (lambda: inter_similarity(F, F[:, :2]), ValueError, "generated"),
        (lambda: inter_similarity(F[:0], F), ValueError, "real"),
        (lambda: inter_similarity(F, F, top_k=3), ValueError, "top_k"),
        (lambda: inter_similarity(F, F.long()), TypeError, "generated"),
        (lambda: grouped_average(F[0], ["a"]), ValueError, "groups"),
        (lambda: grouped_average(F[0], ["a", "b", "all"]), ValueError, "groups"),
        (lambda: repeat_factors([], 3), ValueError, "image_categories"),
        (lambda: repeat_factors([[3]], 3), ValueError, "image_categories"),
        (lambda: repeat_factors([[0]], 3, threshold=0.0), ValueError, "threshold"),
        (lambda: federated_weights(N[None]), ValueError, "image_counts"),
        (lambda: federated_weights(N, -1.0), ValueError, "power"),
        (lambda: federated_classes(N, F), ValueError, "weights"),
        (lambda: federated_classes(N, F[0], total=0), ValueError, "total"),
        (lambda: balanced_draws(F[0], 1), TypeError, "pool_sizes"),
        (lambda: balanced_draws(N * 0, 1), ValueError, "pool_sizes"),
        (lambda: balanced_draws(N, -1), ValueError, "count"),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()
