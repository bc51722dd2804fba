"""One rule: what is averaged over no item is 0 or refused, never NaN."""

import pytest
import torch

from steelyard import divergences as d

F64 = torch.float64
NONE, SOME = torch.zeros(0, 2, dtype=F64), torch.ones(6, 2, dtype=F64)
SAMPLES = {
    "cauchy_schwarz_divergence": lambda: d.cauchy_schwarz_divergence(NONE, SOME, 1.0),
    "conditional_cauchy_schwarz": lambda: d.conditional_cauchy_schwarz(NONE, NONE, NONE, 1.0, 1.0),
    "cauchy_schwarz_mutual_information": lambda: d.cauchy_schwarz_mutual_information(
        NONE, NONE, 1.0, 1.0
    ),
    "mmd_squared": lambda: d.mmd_squared(SOME, NONE, 1.0),
    "hsic": lambda: d.hsic(NONE, NONE, 1.0, 1.0),
    "median_bandwidth": lambda: d.median_bandwidth(NONE),
    "distance_covariance": lambda: d.distance_covariance(NONE, NONE, unbiased=False),
    "distance_correlation": lambda: d.distance_correlation(NONE, NONE),
    "joint_distance_covariance": lambda: d.joint_distance_covariance(NONE, NONE, NONE),
    "concatenated_distance_covariance": lambda: d.concatenated_distance_covariance(NONE, [NONE]),
    "sinkhorn_plan": lambda: d.sinkhorn_plan(NONE, 1.0),
    "sinkhorn_plan of no problem": lambda: d.sinkhorn_plan(torch.zeros(0, 3, 3), 1.0),
    "sinkhorn_divergence": lambda: d.sinkhorn_divergence(NONE, torch.zeros(0, 0), SOME[:2], 1.0),
    "monte_carlo_divergence": lambda: d.monte_carlo_divergence(torch.zeros(0), d.KL),
    "f_divergence over no outcome": lambda: d.f_divergence(NONE.T, NONE.T, d.KL),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_divergence_of_an_empty_sample_is_refused(name):
    with pytest.raises(ValueError, match=r"must not be empty|needs N >= \d items, got N = 0"):
        SAMPLES[name]()


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_row_that_counts_gives_zero_with_a_zero_gradient(rows, reduction):
    logits = torch.ones(rows, 4, dtype=F64, requires_grad=True)
    q = torch.full((rows, 4), 0.25, dtype=F64).log()
    mask = torch.zeros(rows, dtype=torch.bool)
    value = d.f_divergence(logits.log_softmax(-1), q, d.KL, mask=mask, reduction=reduction)
    value.backward()
    assert value.item() == 0.0
    assert (logits.grad == 0).all()


def test_per_item_results_of_no_item_are_empty():
    assert d.f_divergence(NONE, NONE, d.KL).shape == (0,)
    assert d.kl_estimate(torch.zeros(0)).shape == (0,)
