"""The torchmetrics objects against the functions they count for."""

import copy
import math

import pytest
import torch

torchmetrics = pytest.importorskip("torchmetrics")

from steelyard.preference import (  # noqa: E402
    AlignmentGapMetric,
    FlipRateMetric,
    FullRankingAccuracyMetric,
    IdealizedRankingAccuracyMetric,
    RankingAccuracyMetric,
    RewardAccuracyMetric,
    TieAwareRankingAccuracyMetric,
    full_ranking_accuracy,
    idealized_ranking_accuracy,
    ranking_accuracy,
    ranking_transitions,
    reward_accuracy,
    tie_aware_ranking_accuracy,
)

N = 50
BATCHES = [slice(0, 7), slice(7, 8), slice(8, 50)]


def columns(count: int, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return list(10 * torch.randn(count, N, generator=g) - 40)


ALPHA = torch.rand(N, generator=torch.Generator().manual_seed(1)).where(torch.arange(N) > 9, 0.5)
RANKS = torch.stack(
    [torch.randperm(3, generator=torch.Generator().manual_seed(s)) for s in range(N)]
)
LENGTHS = torch.randint(5, 30, (2, N), generator=torch.Generator().manual_seed(2))
FOUR = columns(4)
RATIO = FOUR[2] - FOUR[3]
COMPLEX = FOUR[0].to(torch.complex64)


def with_lengths(chosen, rejected, a, b):
    return ranking_accuracy(chosen, rejected, chosen_lengths=a, rejected_lengths=b)


def gap(chosen, rejected, ratio, alpha):
    return idealized_ranking_accuracy(ratio, alpha).median - ranking_accuracy(chosen, rejected)


CASES = [
    (RankingAccuracyMetric, ranking_accuracy, FOUR[:2]),
    (RankingAccuracyMetric, with_lengths, [*FOUR[:2], *LENGTHS]),
    (RewardAccuracyMetric, reward_accuracy, FOUR),
    (TieAwareRankingAccuracyMetric, tie_aware_ranking_accuracy, [ALPHA, FOUR[0], FOUR[1]]),
    (FullRankingAccuracyMetric, full_ranking_accuracy, [RANKS, torch.stack(FOUR[:3], -1)]),
    (
        IdealizedRankingAccuracyMetric,
        lambda *x: idealized_ranking_accuracy(*x).median,
        [RATIO, ALPHA],
    ),
    (AlignmentGapMetric, gap, [*FOUR[:2], RATIO, ALPHA]),
    (FlipRateMetric, lambda *x: ranking_transitions(*x).flip_rate, FOUR),
]
every = pytest.mark.parametrize(("kind", "function", "data"), CASES)


@every
def test_metric_over_batches_is_the_value_of_the_whole(kind, function, data):
    metric = kind()
    for part in BATCHES:
        metric.update(*(x[part] for x in data))
    torch.testing.assert_close(metric.compute(), function(*data))
    metric.reset()
    metric.update(*data)
    torch.testing.assert_close(metric.compute(), function(*data))


@every
def test_forward_gives_the_value_of_the_batch_and_keeps_the_sum(kind, function, data):
    metric = kind()
    for part in BATCHES:
        batch = [x[part] for x in data]
        torch.testing.assert_close(metric(*batch), function(*batch))
    torch.testing.assert_close(metric.compute(), function(*data))


@every
def test_counts_of_two_processes_add_up(kind, function, data):
    ranks = [kind(), kind()]
    ranks[0].update(*(x[:13] for x in data))
    ranks[1].update(*(x[13:] for x in data))
    merged = kind()
    for name, how in merged._reductions.items():
        setattr(merged, name, how(torch.stack([getattr(rank, name) for rank in ranks])))
    merged._update_count = 2
    torch.testing.assert_close(merged.compute(), function(*data))


@every
def test_nan_is_not_silent(kind, function, data):
    metric = kind()
    for place in range(len(data)):
        if not data[place].is_floating_point():
            continue
        broken = [x.clone() for x in data]
        broken[place][3] = math.nan
        metric.reset()
        for part in BATCHES:
            metric.update(*(x[part] for x in broken))
        assert metric.compute().isnan()


@every
def test_metrics_are_copied_and_half_precision_counts_exactly(kind, function, data):
    metric = kind()
    metric.update(*data)
    assert copy.deepcopy(metric).compute() == metric.compute()
    half = kind()
    small = [x.bfloat16() if x.is_floating_point() else x for x in data]
    for _ in range(9):  # 450 of them: bfloat16 itself cannot count beyond 256
        half.update(*small)
    once = kind()
    once.update(*small)
    torch.testing.assert_close(half.compute(), once.compute())


def test_metrics_live_in_a_collection():
    collection = torchmetrics.MetricCollection(
        {"reward": RewardAccuracyMetric(), "flip": FlipRateMetric()}
    )
    collection.update(*FOUR)
    result = collection.compute()
    torch.testing.assert_close(result["reward"], reward_accuracy(*FOUR))
    torch.testing.assert_close(result["flip"], ranking_transitions(*FOUR).flip_rate)


def test_binary_accuracy_of_torchmetrics_agrees():
    from torchmetrics.functional.classification import binary_accuracy

    chosen, rejected = FOUR[:2]
    theirs = binary_accuracy((chosen >= rejected).long(), torch.ones(N, dtype=torch.long))
    metric = RankingAccuracyMetric()
    metric.update(chosen, rejected)
    torch.testing.assert_close(metric.compute(), theirs)


def test_details_show_the_parts():
    ideal = IdealizedRankingAccuracyMetric(betas=(0.05, 2.0), unanimous="code", eps=0.01)
    ideal.update(RATIO, 0.8)
    expected = idealized_ranking_accuracy(RATIO, 0.8, (0.05, 2.0), unanimous="code", eps=0.01)
    for mine, theirs in zip(ideal.details(), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    flips = FlipRateMetric()
    flips.update(*FOUR)
    torch.testing.assert_close(flips.details(), ranking_transitions(*FOUR).share)


def test_tolerance_is_passed_on():
    p1, p2, split = torch.tensor([0.3]), torch.tensor([0.35]), torch.tensor([0.5])
    for eps, expected in ((0.01, 0.0), (0.1, 1.0)):
        metric = TieAwareRankingAccuracyMetric(tie_eps=eps)
        metric.update(split, p1, p2)
        assert metric.compute() == expected


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: RankingAccuracyMetric(no_such_option=1), ValueError, "no_such_option"),
        (lambda: RankingAccuracyMetric().update(FOUR[0], FOUR[1][:3]), ValueError, "rejected"),
        (lambda: AlignmentGapMetric().update(*FOUR[:2], RATIO[:3], 0.7), ValueError, "ref_log"),
        (
            lambda: FlipRateMetric().update(*FOUR[:2], FOUR[2][:3], FOUR[3][:3]),
            ValueError,
            "ref_chosen",
        ),
        (lambda: IdealizedRankingAccuracyMetric(eps=0.7).update(RATIO, 0.7), ValueError, "eps"),
        (lambda: IdealizedRankingAccuracyMetric(betas=3), TypeError, "betas"),
        (lambda: IdealizedRankingAccuracyMetric(betas=(0.1, -1.0)), ValueError, "betas"),
        (lambda: IdealizedRankingAccuracyMetric(eps=float("nan")), ValueError, "eps"),
        (lambda: IdealizedRankingAccuracyMetric().update(RATIO, RATIO.numpy()), TypeError, "alpha"),
        (lambda: RankingAccuracyMetric().update(*FOUR[:2], COMPLEX, COMPLEX), TypeError, "lengths"),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()
