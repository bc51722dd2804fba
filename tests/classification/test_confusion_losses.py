"""AnyLoss against its closed forms, its hard limit in torchmetrics, and its theorems."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from steelyard.classification import (
    ACCURACY,
    BALANCED_ACCURACY,
    COHEN_KAPPA,
    FOWLKES_MALLOWS,
    GEOMETRIC_MEAN,
    JACCARD,
    MATTHEWS,
    PRECISION,
    RECALL,
    SPECIFICITY,
    YOUDEN,
    anyloss,
    anyloss_with_logits,
    f_beta,
    multiclass_anyloss,
    soft_confusion,
)

quick = settings(deadline=None, max_examples=25)
few = settings(deadline=None, max_examples=6)  # for tests of each metric
seeds = st.integers(0, 2**31)
scales = st.floats(0.1, 200)
close = {"rtol": 0, "atol": 1e-12}

ALL = (
    ACCURACY,
    BALANCED_ACCURACY,
    COHEN_KAPPA,
    FOWLKES_MALLOWS,
    GEOMETRIC_MEAN,
    JACCARD,
    MATTHEWS,
    PRECISION,
    RECALL,
    SPECIFICITY,
    YOUDEN,
    f_beta(0.5),
    f_beta(1.0),
    f_beta(2.0),
)
metrics = pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.name)


def batch(seed: int, n: int = 23):
    """Probabilities and labels with both classes."""
    g = torch.Generator().manual_seed(seed)
    probs = torch.rand(n, dtype=torch.float64, generator=g)
    labels = (torch.rand(n, generator=g) < 0.3).long()
    labels[0], labels[1] = 1, 0
    return probs, labels


def amplified(probs, amplification=73.0, threshold=0.5):
    return 1 / (1 + torch.exp(-amplification * (probs - threshold)))


@quick
@given(seeds, scales, st.floats(0.1, 0.9))
def test_cells_are_the_sums_of_the_paper_and_add_up(seed, scale, threshold):
    probs, labels = batch(seed)
    tp, fp, fn, tn = soft_confusion(probs, labels, amplification=scale, threshold=threshold)
    q, y, n = amplified(probs, scale, threshold), labels.double(), len(probs)
    torch.testing.assert_close(tp, (y * q).sum(), **close)
    torch.testing.assert_close(fp, q.sum() - (y * q).sum(), **close)
    torch.testing.assert_close(fn, y.sum() - (y * q).sum(), **close)
    torch.testing.assert_close(tn, n - y.sum() - q.sum() + (y * q).sum(), **close)
    assert min(tp, fp, fn, tn) >= 0
    torch.testing.assert_close(tp + fp + fn + tn, torch.tensor(float(n)).double(), **close)


@quick
@given(seeds, scales)
def test_losses_are_the_formulas_of_the_paper(seed, scale):
    probs, labels = batch(seed)
    q, y, n = amplified(probs, scale), labels.double(), len(probs)
    sy, sq, syq = y.sum(), q.sum(), (y * q).sum()
    b2 = 4.0
    expected = {
        ACCURACY: 1 - (n - sy - sq + 2 * syq) / n,
        f_beta(2.0): 1 - (1 + b2) * syq / (b2 * sy + sq),
        GEOMETRIC_MEAN: 1 - (syq * (n - sy - sq + syq) / (sy * (n - sy))).sqrt(),
        BALANCED_ACCURACY: 1 - (n * (syq + sy) - sy * (sq + sy)) / (2 * sy * (n - sy)),
    }
    for metric, value in expected.items():
        got = anyloss(probs, labels, metric, amplification=scale)
        torch.testing.assert_close(got, value, rtol=0, atol=1e-9)


@quick
@given(seeds)
def test_gradients_in_the_amplified_labels_are_the_closed_forms(seed):
    probs, labels = batch(seed)
    q, y, n = probs.requires_grad_(), labels.double(), len(probs)
    sy, sq, syq = (v.detach() for v in (y.sum(), q.sum(), (y * q).sum()))
    cells = ((y * q).sum(), ((1 - y) * q).sum(), (y * (1 - q)).sum(), ((1 - y) * (1 - q)).sum())
    d, u = 4 * sy + sq, n - sy - sq + syq
    expected = {
        ACCURACY: (1 - 2 * y) / n,
        f_beta(2.0): -5 * (y * d - syq) / d**2,
        GEOMETRIC_MEAN: -(y * u + (y - 1) * syq) / (2 * (sy * (n - sy) * syq * u).sqrt()),
        BALANCED_ACCURACY: -(n * y - sy) / (2 * sy * (n - sy)),
    }
    for metric, gradient in expected.items():
        [got] = torch.autograd.grad(1 - metric(*cells), q, retain_graph=True)
        torch.testing.assert_close(got, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
@metrics
def test_hard_limit_is_the_metric_of_torchmetrics(metric, seed):
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    probs, labels = batch(seed)
    args = (probs, labels)
    beta = {"f_beta(0.5)": 0.5, "f_beta(1)": 1.0, "f_beta(2)": 2.0}.get(metric.name, 1.0)
    recall = torchmetrics.binary_recall(*args)
    specificity = torchmetrics.binary_specificity(*args)
    expected = {
        "accuracy": torchmetrics.binary_accuracy(*args),
        "balanced_accuracy": (recall + specificity) / 2,
        "cohen_kappa": torchmetrics.binary_cohen_kappa(*args),
        "fowlkes_mallows": (torchmetrics.binary_precision(*args) * recall).sqrt(),
        "geometric_mean": (recall * specificity).sqrt(),
        "jaccard": torchmetrics.binary_jaccard_index(*args),
        "matthews": torchmetrics.binary_matthews_corrcoef(*args),
        "precision": torchmetrics.binary_precision(*args),
        "recall": recall,
        "specificity": specificity,
        "youden": recall + specificity - 1,
    }.get(metric.name, torchmetrics.binary_fbeta_score(*args, beta=beta))
    got = anyloss(probs, labels, metric, amplification=1e9)
    assert float(got) == pytest.approx(1 - float(expected), abs=1e-6)


@pytest.mark.parametrize("average", ["macro", "micro", "weighted"])
@pytest.mark.parametrize("seed", range(5))
def test_hard_limit_over_classes_is_that_of_torchmetrics(average, seed):
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    g = torch.Generator().manual_seed(seed)
    labels = torch.cat((torch.arange(4), torch.randint(0, 4, (40,), generator=g)))
    probs = torch.randn(44, 4, generator=g, dtype=torch.float64).softmax(-1)
    target = functional.one_hot(labels, 4)
    expected = torchmetrics.multilabel_f1_score(
        probs, target, num_labels=4, threshold=0.4, average=average
    )
    got = multiclass_anyloss(
        probs, labels, f_beta(1.0), average=average, amplification=1e9, threshold=0.4
    )
    assert float(got) == pytest.approx(1 - float(expected), abs=1e-6)


def test_two_classes_macro_is_the_mean_of_both_sides():
    probs, labels = batch(1)
    both = torch.stack((1 - probs, probs), 1)
    got = multiclass_anyloss(both, labels, JACCARD)
    one, other = anyloss(probs, labels, JACCARD), anyloss(1 - probs, 1 - labels, JACCARD)
    torch.testing.assert_close(got, (one + other) / 2, **close)


def test_a_class_that_does_not_occur_leaves_the_macro_average_to_the_others():
    probs, labels = batch(2)
    three = torch.stack((1 - probs, probs, torch.zeros_like(probs)), 1)
    for average in ("macro", "weighted"):
        expected = multiclass_anyloss(three[:, :2], labels, RECALL, average=average)
        got = multiclass_anyloss(three, labels, RECALL, average=average)
        torch.testing.assert_close(got, expected, **close)
    # A metric of the user's that divides by the support does not spoil the others.
    three.requires_grad_()
    multiclass_anyloss(three, labels, lambda tp, fp, fn, tn: tp / (tp + fn)).backward()
    assert three.grad.isfinite().all()
    assert three.grad.abs().sum() > 0


@quick
@given(seeds)
def test_without_amplification_every_item_is_half_of_each(seed):
    probs, labels = batch(seed)
    n, positives = len(probs), int(labels.sum())
    expected = {
        BALANCED_ACCURACY: 0.5,
        GEOMETRIC_MEAN: 0.5,
        ACCURACY: 0.5,
        f_beta(1.0): 1 - positives / (positives + n / 2),
    }
    for metric, value in expected.items():
        got = anyloss(probs, labels, metric, amplification=1e-12)
        assert float(got) == pytest.approx(value, abs=1e-10)


@quick
@given(seeds, scales)
def test_f_beta_joins_precision_and_recall_and_is_twice_jaccard_over_one_plus_jaccard(seed, scale):
    probs, labels = batch(seed)
    cells = soft_confusion(probs, labels, amplification=scale)
    torch.testing.assert_close(f_beta(0.0)(*cells), PRECISION(*cells), **close)
    torch.testing.assert_close(f_beta(1e8)(*cells), RECALL(*cells), rtol=0, atol=1e-9)
    jaccard = JACCARD(*cells)
    torch.testing.assert_close(f_beta(1.0)(*cells), 2 * jaccard / (1 + jaccard), **close)


@quick
@given(seeds, scales)
def test_swapping_the_labels_changes_only_metrics_of_the_positive_class(seed, scale):
    probs, labels = batch(seed)
    for metric in (ACCURACY, BALANCED_ACCURACY, GEOMETRIC_MEAN, MATTHEWS, COHEN_KAPPA, YOUDEN):
        one = anyloss(probs, labels, metric, amplification=scale)
        other = anyloss(1 - probs, 1 - labels, metric, amplification=scale)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    f1 = anyloss(probs, labels, f_beta(1.0)), anyloss(1 - probs, 1 - labels, f_beta(1.0))
    assert abs(f1[0] - f1[1]) > 1e-6


@quick
@given(seeds, scales)
def test_geometric_mean_is_the_harder_loss_and_equal_rates_make_it_equal(seed, scale):
    probs, labels = batch(seed)
    geometric = anyloss(probs, labels, GEOMETRIC_MEAN, amplification=scale)
    assert geometric >= anyloss(probs, labels, BALANCED_ACCURACY, amplification=scale) - 1e-12
    twin = torch.cat((probs, 1 - probs)), torch.cat((labels, 1 - labels))
    torch.testing.assert_close(
        anyloss(*twin, GEOMETRIC_MEAN), anyloss(*twin, BALANCED_ACCURACY), **close
    )


@quick
@given(seeds)
def test_balanced_accuracy_of_balanced_classes_is_accuracy_with_its_gradient(seed):
    probs, labels = batch(seed, 20)
    labels = torch.arange(20) % 2
    slopes = []
    for metric in (ACCURACY, BALANCED_ACCURACY):
        leaf = probs.clone().requires_grad_()
        loss = anyloss(leaf, labels, metric)
        slopes.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    torch.testing.assert_close(slopes[0], slopes[1], **close)


@quick
@given(seeds, scales)
def test_accuracy_is_the_mean_absolute_error_and_f1_the_dice_loss_of_the_soft_labels(seed, scale):
    probs, labels = batch(seed)
    q, y = amplified(probs, scale), labels.double()
    accuracy = anyloss(probs, labels, ACCURACY, amplification=scale)
    torch.testing.assert_close(accuracy, (y - q).abs().mean(), **close)
    dice = 1 - 2 * (y * q).sum() / (y.sum() + q.sum())
    f1 = anyloss(probs, labels, f_beta(1.0), amplification=scale)
    torch.testing.assert_close(f1, dice, **close)


@few
@given(seeds)
@metrics
def test_order_and_duplication_change_nothing(metric, seed):
    probs, labels = batch(seed)
    expected = anyloss(probs, labels, metric)
    order = torch.randperm(len(probs), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(anyloss(probs[order], labels[order], metric), expected, **close)
    twice = anyloss(probs.repeat(2), labels.repeat(2), metric)
    torch.testing.assert_close(twice, expected, **close)


@quick
@given(seeds)
def test_f_loss_falls_with_positives_and_rises_with_negatives(seed):
    probs, labels = batch(seed)
    probs.requires_grad_()
    anyloss(probs, labels, f_beta(1.5), amplification=5.0).backward()
    assert (probs.grad[labels == 1] < 0).all()
    assert (probs.grad[labels == 0] > 0).all()


def test_seventy_three_is_the_largest_scale_that_does_not_saturate_and_in_float32_thirty_three():
    one, label = torch.ones(1, dtype=torch.float64), torch.ones(1)
    assert soft_confusion(one, label, amplification=73.0).tp < 1
    assert soft_confusion(one, label, amplification=74.0).tp == 1
    one = one.float()
    assert soft_confusion(one, label, amplification=33.0).tp < 1
    assert soft_confusion(one, label, amplification=34.0).tp == 1


def test_slope_at_the_threshold_is_a_sixteenth_of_the_scale_for_both_amplifiers():
    for amplify in ("probability", "logit"):
        logit = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        anyloss_with_logits(logit, torch.zeros(1), ACCURACY, amplify=amplify).backward()
        assert float(logit.grad) == pytest.approx(73 / 16, abs=1e-12)
    centre = math.log(0.2 / 0.8)
    slopes = []
    for amplify in ("probability", "logit"):
        logit = torch.tensor([centre], dtype=torch.float64, requires_grad=True)
        loss = anyloss_with_logits(logit, torch.zeros(1), ACCURACY, threshold=0.2, amplify=amplify)
        assert float(loss.detach()) == pytest.approx(0.5, abs=1e-12)
        slopes.append(float(torch.autograd.grad(loss, logit)[0]))
    assert slopes[0] == pytest.approx(slopes[1], abs=1e-10)


@few
@given(seeds, scales)
@metrics
def test_logits_give_the_loss_of_their_probabilities(metric, seed, scale):
    probs, labels = batch(seed)
    got = anyloss_with_logits(probs.logit(), labels, metric, amplification=scale, threshold=0.3)
    expected = anyloss(probs, labels, metric, amplification=scale, threshold=0.3)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@metrics
def test_gradcheck(metric):
    probs, labels = batch(3, 9)
    probs.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p: anyloss(p, labels, metric, amplification=4.0), (probs,)
    )
    logits = probs.detach().logit().requires_grad_()
    for amplify in ("probability", "logit"):
        assert torch.autograd.gradcheck(
            lambda z, a=amplify: anyloss_with_logits(
                z, labels, metric, amplification=4.0, amplify=a
            ),
            (logits,),
        )


def test_gradcheck_of_the_multiclass_loss():
    g = torch.Generator().manual_seed(0)
    probs = torch.rand(7, 3, generator=g, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1, 2, 0, 1])
    for average in ("macro", "micro", "weighted"):
        assert torch.autograd.gradcheck(
            lambda p, a=average: multiclass_anyloss(
                p, labels, f_beta(2.0), average=a, amplification=4.0
            ),
            (probs,),
        )


def test_gradient_does_not_round_to_nothing_on_one_side():
    """In float32 ``q (1 - q)`` is 0 for q = 1 and not for q = 1e-9; ours is the same on both."""
    probs = torch.tensor([0.9, 0.1], requires_grad=True)
    anyloss(probs, torch.tensor([0, 1]), ACCURACY).backward()
    assert probs.grad[0] > 0
    torch.testing.assert_close(probs.grad[0], -probs.grad[1], rtol=1e-4, atol=0)


@metrics
def test_extreme_logits_and_missing_classes_are_finite(metric):
    extreme = torch.tensor([1e4, -1e4, 0.0, 50.0, -50.0])
    for labels in (torch.tensor([1, 0, 1, 0, 1]), torch.zeros(5), torch.ones(5)):
        for values in (extreme, -extreme, torch.full((5,), 1e4), torch.full((5,), -1e4)):
            for amplify in ("probability", "logit"):
                logits = values.clone().requires_grad_()
                loss = anyloss_with_logits(logits, labels, metric, amplify=amplify)
                loss.backward()
                assert loss.isfinite()
                assert logits.grad.isfinite().all()


def test_a_class_without_items_leaves_the_rates_to_the_other():
    probs = torch.tensor([0.9, 0.2, 0.3], dtype=torch.float64)
    for labels, rate in ((torch.zeros(3), SPECIFICITY), (torch.ones(3), RECALL)):
        expected = anyloss(probs, labels, rate)
        for metric in (BALANCED_ACCURACY, GEOMETRIC_MEAN):
            torch.testing.assert_close(anyloss(probs, labels, metric), expected, **close)
    torch.testing.assert_close(
        anyloss(probs, torch.zeros(3), YOUDEN), 2 * anyloss(probs, torch.zeros(3), SPECIFICITY)
    )


def test_without_positives_the_f_loss_is_one_and_has_no_gradient():
    probs = torch.tensor([0.4, 0.6], dtype=torch.float64, requires_grad=True)
    loss = anyloss(probs, torch.zeros(2), f_beta(1.0))
    loss.backward()
    assert loss == 1
    assert (probs.grad == 0).all()


def test_the_number_of_items_is_that_of_the_batch_not_of_the_training_set():
    """With the n of a larger set, as in the released Keras losses, the cells do not add up."""
    probs, labels = batch(4, 10)
    q, y = amplified(probs), labels.double()
    sy, sq, syq, full = y.sum(), q.sum(), (y * q).sum(), 100
    ours = anyloss(probs, labels, ACCURACY)
    released = 1 - (full - sy - sq + 2 * syq) / full
    torch.testing.assert_close(ours, 10 * released, **close)
    assert abs(ours - released) > 0.1


def test_released_gradient_of_the_geometric_mean_is_four_times_too_large():
    """The factor in front of the bracket is -1/2 by the chain rule; the code has -2."""
    probs, labels = batch(6)
    q, y, n = probs.requires_grad_(), labels.double(), len(probs)
    cells = ((y * q).sum(), ((1 - y) * q).sum(), (y * (1 - q)).sum(), ((1 - y) * (1 - q)).sum())
    [ours] = torch.autograd.grad(1 - GEOMETRIC_MEAN(*cells), q)
    sy, syq, u = y.sum(), cells[0].detach(), cells[3].detach()
    released = -2 * (y * u + (y - 1) * syq) / (sy * (n - sy) * syq * u).sqrt()
    torch.testing.assert_close(4 * ours, released, rtol=1e-10, atol=0)


def test_cells_of_micro_batches_add_up_and_their_mean_loss_is_not_the_loss():
    probs, labels = batch(5, 20)
    halves = [soft_confusion(probs[i::2], labels[i::2]) for i in range(2)]
    cells = [a + b for a, b in zip(*halves, strict=True)]
    whole = anyloss(probs, labels, f_beta(1.0))
    torch.testing.assert_close(1 - f_beta(1.0)(*cells), whole, **close)
    mean = sum(anyloss(probs[i::2], labels[i::2], f_beta(1.0)) for i in range(2)) / 2
    assert abs(mean - whole) > 1e-3


def test_masked_items_do_not_count_even_if_they_are_nan():
    probs, labels = batch(6, 12)
    mask = torch.arange(12) % 3 > 0
    dirty = probs.clone()
    dirty[~mask] = math.nan
    dirty.requires_grad_()
    for metric in ALL:
        got = anyloss(dirty, labels, metric, mask=mask)
        torch.testing.assert_close(got, anyloss(probs[mask], labels[mask], metric), **close)
        [slope] = torch.autograd.grad(got, dirty)
        assert (slope[~mask] == 0).all()
        assert slope.isfinite().all()
    three = torch.rand(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(12) % 3
    mask = torch.arange(12) % 4 > 0
    for average in ("macro", "micro", "weighted"):
        got = multiclass_anyloss(
            three, classes.where(mask, -100), JACCARD, average=average, mask=mask
        )
        expected = multiclass_anyloss(three[mask], classes[mask], JACCARD, average=average)
        torch.testing.assert_close(got, expected, **close)


@metrics
def test_a_fully_masked_batch_is_exactly_zero(metric):
    probs, labels = batch(7, 6)
    probs.requires_grad_()
    nothing = torch.zeros(6)
    losses = (
        anyloss(probs, labels, metric, mask=nothing),
        anyloss(probs, labels, lambda tp, fp, fn, tn: tp / (tp + fp), mask=nothing),
        multiclass_anyloss(torch.stack((probs, probs), 1), labels, metric, mask=nothing),
    )
    for loss in losses:
        assert loss == 0
        [slope] = torch.autograd.grad(loss, probs)
        assert (slope == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    """10,000 items: their count alone is beyond half precision's digits."""
    g = torch.Generator().manual_seed(0)
    probs, labels = torch.rand(10_000, generator=g).to(dtype), torch.rand(10_000, generator=g) < 0.1
    got = anyloss(probs, labels, f_beta(1.0))
    assert got.dtype == dtype
    expected = anyloss(probs.double(), labels, f_beta(1.0)).to(dtype)
    torch.testing.assert_close(got, expected, rtol=0, atol=torch.finfo(dtype).eps)


def test_labels_of_any_dtype_single_items_and_strided_tensors():
    probs, labels = batch(8, 12)
    expected = anyloss(probs, labels, JACCARD)
    for dtype in (torch.bool, torch.int8, torch.float32):
        torch.testing.assert_close(anyloss(probs, labels.to(dtype), JACCARD), expected, **close)
    strided = torch.stack((probs, probs), 1)[:, 0]
    torch.testing.assert_close(anyloss(strided, labels, JACCARD), expected, **close)
    assert anyloss(torch.tensor([0.9]), torch.tensor([1]), ACCURACY) < 1e-6


def test_nan_comes_through():
    probs = torch.tensor([0.5, math.nan])
    assert anyloss(probs, torch.tensor([0, 1]), ACCURACY).isnan()
    three = torch.tensor([[0.5, math.nan], [0.1, 0.9]])
    for average in ("macro", "micro", "weighted"):
        assert multiclass_anyloss(three, torch.tensor([0, 1]), ACCURACY, average=average).isnan()


def test_torch_func_and_compile_see_the_same_loss():
    probs, labels = batch(9, 8)
    expected = anyloss(probs, labels, GEOMETRIC_MEAN)
    rows = torch.stack((probs, 1 - probs))
    mapped = torch.func.vmap(lambda p, y: anyloss(p, y, GEOMETRIC_MEAN), in_dims=(0, None))
    torch.testing.assert_close(mapped(rows, labels)[0], expected, **close)
    compiled = torch.compile(
        lambda p, y: anyloss(p, y, GEOMETRIC_MEAN), backend="eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(probs, labels), expected, **close)


P, Y = torch.full((3,), 0.4), torch.tensor([0, 1, 0])


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: soft_confusion(P, Y[:2]), ValueError, "labels"),
        (lambda: soft_confusion(P[:, None], Y[:, None]), ValueError, "probs"),
        (lambda: soft_confusion(P[:0], Y[:0]), ValueError, "probs"),
        (lambda: soft_confusion(Y, Y), TypeError, "probs"),
        (lambda: soft_confusion(P, Y + 1), ValueError, "labels"),
        (lambda: soft_confusion(P, Y, amplification=0.0), ValueError, "amplification"),
        (lambda: soft_confusion(P, Y, threshold=math.nan), ValueError, "threshold"),
        (lambda: anyloss(P, Y, ACCURACY, mask=Y[:2]), ValueError, "mask"),
        (lambda: anyloss(P, Y, lambda *cells: torch.stack(cells)), ValueError, "metric"),
        (lambda: anyloss(P, Y, lambda *cells: 0.5), ValueError, "metric"),
        (lambda: anyloss_with_logits(P, Y, ACCURACY, threshold=1.0), ValueError, "threshold"),
        (lambda: anyloss_with_logits(P, Y, ACCURACY, amplify="x"), ValueError, "amplify"),
        (lambda: anyloss_with_logits(Y, Y, ACCURACY), TypeError, "logits"),
        (lambda: multiclass_anyloss(P, Y, ACCURACY), ValueError, "probs"),
        (lambda: multiclass_anyloss(P[:, None].expand(3, 2), P, ACCURACY), TypeError, "labels"),
        (
            lambda: multiclass_anyloss(P[:, None].expand(3, 2), Y + 1, ACCURACY),
            ValueError,
            "labels",
        ),
        (
            lambda: multiclass_anyloss(P[:, None].expand(3, 2), Y, ACCURACY, average="x"),
            ValueError,
            "average",
        ),
        (lambda: f_beta(-1.0), ValueError, "beta"),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()
