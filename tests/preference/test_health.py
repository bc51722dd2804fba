"""Calibration and health of preference policies against loops, enumeration and torchmetrics."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.divergences import (
    JENSEN_SHANNON,
    JENSEN_SHANNON_DOUBLE,
    KL,
    REVERSE_KL,
    f_divergence,
)
from steelyard.preference import (
    expected_calibration_error,
    implicit_reward,
    preference_calibration_error,
    preference_health,
)

quick = settings(deadline=None, max_examples=20)
seeds = st.integers(0, 2**31)
close = {"rtol": 0, "atol": 1e-12}


def pairs(seed: int, n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(2, n, dtype=torch.float64, generator=g)
    return x[0], x[1]


def law(seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(6, dtype=torch.float64, generator=g).softmax(-1)


def test_calibration_error_is_the_loop_over_bins():
    g = torch.Generator().manual_seed(0)
    confidence = torch.rand(200, dtype=torch.float64, generator=g)
    confidence[:4] = torch.tensor([0.0, 0.3, 0.7, 1.0])  # edges belong to the bin below
    correct = torch.rand(200, generator=g) < 0.6
    for bins in (1, 7, 10):
        total = 0.0
        for b in range(bins):
            inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
            inside |= (confidence == 0) & (b == 0)
            if inside.any():
                gap = correct[inside].double().mean() - confidence[inside].mean()
                total += inside.double().mean() * gap.abs()
        got = expected_calibration_error(confidence, correct, bins=bins)
        torch.testing.assert_close(got, total, **close)


def test_calibration_error_agrees_with_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.classification")
    g = torch.Generator().manual_seed(1)
    confidence = torch.rand(500, dtype=torch.float64, generator=g)
    correct = torch.rand(500, generator=g) < confidence
    got = expected_calibration_error(confidence, correct, bins=15)
    theirs = functional.binary_calibration_error(confidence, correct.long(), n_bins=15)
    torch.testing.assert_close(got, theirs.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_edges_are_those_of_the_dtype(dtype):
    """0.3 and 0.35 share (0.3, 0.4] only if 0.3 were above its own edge."""
    confidence = torch.tensor([0.3, 0.3125], dtype=dtype)
    correct = torch.tensor([1.0, 0.0])
    got = expected_calibration_error(confidence, correct, bins=10)
    assert got.dtype == dtype
    assert got.item() == pytest.approx((0.7 + 0.3125) / 2, abs=5e-3)
    assert expected_calibration_error(torch.tensor([math.nan]), torch.ones(1)).isnan()


def test_a_policy_that_knows_its_odds_is_calibrated():
    """40,000 pairs labelled by the margins themselves: the error is noise, about 0.004 in mean.

    Ten bins of 4,000 labels have standard errors below 0.008, so 0.02 is exceeded with p < 1e-6.
    """
    g = torch.Generator().manual_seed(2)
    margin = 2 * torch.randn(40_000, dtype=torch.float64, generator=g)
    agrees = torch.rand(40_000, generator=g) < torch.sigmoid(margin.abs())
    signed = torch.where(agrees, margin.abs(), -margin.abs())
    assert preference_calibration_error(signed) < 0.02
    assert preference_calibration_error(5 * signed) > 0.1
    assert preference_calibration_error(torch.zeros(5)) == 0


@quick
@given(seeds)
def test_health_is_what_it_says(seed):
    chosen, rejected = pairs(seed, n=20)
    health = preference_health(chosen, rejected, beta=0.3, divergence=JENSEN_SHANNON_DOUBLE)
    reward = [
        implicit_reward(x, beta=0.3, divergence=JENSEN_SHANNON_DOUBLE) for x in (chosen, rejected)
    ]
    both = [a < 0 and b < 0 for a, b in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    pooled = torch.cat((chosen, rejected))
    expected = {
        "chosen_change": chosen.mean(),
        "rejected_change": rejected.mean(),
        "chosen_falls": (chosen < 0).double().mean(),
        "both_fall": torch.tensor(sum(both) / 20, dtype=torch.float64),
        "accuracy": (reward[0] > reward[1]).double().mean(),
        "margin": (reward[0] - reward[1]).mean(),
        "kl_k1": -pooled.mean(),
        "kl_k3": (pooled.exp() - 1 - pooled).mean(),
        "beyond_range": torch.zeros((), dtype=torch.float64),
    }
    assert list(health._fields) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(health, name), value, rtol=1e-12, atol=1e-12)


def test_kl_estimates_average_to_the_divergence_over_the_reference():
    ref, policy = law(4), law(5)
    log_u = policy.log() - ref.log()
    first, second = (x.flatten() for x in torch.meshgrid(*[torch.arange(6)] * 2, indexing="ij"))
    weight = ref[first] * ref[second]
    exact = f_divergence(ref.log(), policy.log(), KL)
    total = torch.zeros(2, dtype=torch.float64)
    for a, b, w in zip(first, second, weight, strict=True):
        health = preference_health(log_u[a][None], log_u[b][None])
        total += w * torch.stack((health.kl_k1, health.kl_k3))
    torch.testing.assert_close(total, exact.expand(2), **close)


def test_health_counts_tangents_and_masked_pairs_not_at_all():
    x = torch.tensor([-100.0, 0.0, -100.0, math.nan], requires_grad=True)
    mask = torch.tensor([1, 1, 0, 0])
    health = preference_health(x, torch.zeros(4), divergence=REVERSE_KL, mask=mask)
    assert health.beyond_range.item() == 0.25
    assert health.chosen_change.item() == -50
    assert not health.margin.requires_grad
    assert preference_health(x, x, mask=torch.zeros(4)).margin == 0
    for d in (KL, JENSEN_SHANNON):
        far = torch.tensor([-1e4, 1e4])
        assert preference_health(far, far, divergence=d).beyond_range == 0
    half = preference_health(x[:2].half(), x[:2].half())
    assert half.margin.dtype == torch.float32


X = torch.zeros(3)


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: expected_calibration_error(X, X[:2]), ValueError, "correct"),
        (lambda: expected_calibration_error(X[:0], X[:0]), ValueError, "confidence"),
        (lambda: expected_calibration_error(X, X, bins=0), ValueError, "bins"),
        (lambda: expected_calibration_error(X, X, bins=2.0), TypeError, "bins"),
        (lambda: preference_calibration_error(X.long()), TypeError, "margin"),
        (lambda: preference_health(X, X[:2]), ValueError, "rejected_log_ratio"),
        (lambda: preference_calibration_error(X[:0]), ValueError, "margin"),
        (lambda: preference_health(X[:0], X[:0]), ValueError, "chosen_log_ratio"),
        (lambda: preference_health(X, X, beta=0.0), ValueError, "beta"),
        (lambda: preference_health(X, X, mask=X[:2]), ValueError, "mask"),
        (lambda: preference_health(X, X, divergence=None), TypeError, "divergence"),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()
