"""Per-token signals: entropy of the next token, and weights from the policy's divergence."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.divergences import kl_estimate
from steelyard.policy import divergence_weights, mean_token_entropy

properties = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 100_000)


@properties
@given(seeds)
def test_mean_token_entropy_is_the_loop_over_tokens(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(4, 5, 6, generator=generator, dtype=torch.float64)
    logits[:, :, 0] = -math.inf
    mask = torch.rand(4, 5, generator=generator) < 0.6
    mask[0] = False
    entropy = mean_token_entropy(logits, mask)
    assert entropy[0] == 0
    for i in range(1, 4):
        kept = []
        for t in range(5):
            p = np.exp(logits[i, t, 1:].numpy())
            p /= p.sum()
            if mask[i, t]:
                kept.append(-(p * np.log(p)).sum())
        assert entropy[i].item() == pytest.approx(np.mean(kept) if kept else 0.0, abs=1e-9)


def test_mean_token_entropy_ignores_masked_nan_and_extreme_logits():
    logits = torch.tensor([[[0.0, 0.0], [1e4, -1e4], [math.nan, 0.0]]], requires_grad=True)
    entropy = mean_token_entropy(logits, torch.tensor([[True, True, False]]))
    assert entropy.item() == pytest.approx(math.log(2) / 2, abs=1e-6)
    assert not entropy.requires_grad
    assert mean_token_entropy(logits).isnan().all()
    half = mean_token_entropy(torch.zeros(1, 2, 1000, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert half.item() == pytest.approx(math.log(1000), rel=1e-2)


@pytest.mark.parametrize(
    ("logits", "mask", "error", "named"),
    [
        (torch.zeros(2, 3), None, ValueError, "logits"),
        (torch.zeros(2, 3, 4, dtype=torch.long), None, TypeError, "logits"),
        (torch.zeros(2, 3, 4), torch.ones(2, 3, 4), ValueError, "mask"),
        (torch.zeros(2, 3, 4), torch.ones(2), ValueError, "mask"),
    ],
)
def test_wrong_entropy_arguments_are_named(logits, mask, error, named):
    with pytest.raises(error, match=named):
        mean_token_entropy(logits, mask)


@properties
@given(seeds, st.floats(-2, 2), st.floats(-50, 50))
def test_divergence_weights_are_a_centred_sigmoid(seed, scale, alpha):
    kl = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights = divergence_weights(kl, scale=scale, alpha=alpha)
    expected = 1 + scale / 2 * np.tanh(alpha * kl.numpy() / 2)
    assert weights.numpy() == pytest.approx(expected, abs=1e-12)
    assert (weights - 1).abs().max() <= abs(scale) / 2 + 1e-12
    assert weights.min() >= 0
    assert ((weights - 1) * scale * alpha >= 0).all()


def test_divergence_weights_are_one_where_nothing_moved_and_carry_no_gradient():
    kl = torch.zeros(4, dtype=torch.bfloat16, requires_grad=True)
    weights = divergence_weights(kl, scale=1.3, alpha=-7.0)
    assert weights.tolist() == [1.0] * 4
    assert weights.dtype == torch.bfloat16
    assert not weights.requires_grad


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"scale": 2.1}, ValueError),
        ({"scale": math.nan}, ValueError),
        ({"alpha": math.inf}, ValueError),
        ({"kl": torch.ones(2, dtype=torch.long)}, TypeError),
    ],
)
def test_wrong_weight_arguments_are_named(change, error):
    with pytest.raises(error, match=next(iter(change))):
        divergence_weights(**({"kl": torch.ones(2), "scale": 1.0, "alpha": 1.0} | change))


@properties
@given(seeds)
def test_k3_averages_to_the_divergence_and_its_weights_only_strengthen(seed):
    """KL(old || new) enters losses and weights as k3 = rho - 1 - log rho of samples of old."""
    generator = torch.Generator().manual_seed(seed)
    old, new = torch.randn(2, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    log_ratio = (new - old).requires_grad_()
    k3 = kl_estimate(log_ratio, "k3")
    exact = (old.exp() * (old - new)).sum()
    assert (old.exp() * k3).sum().item() == pytest.approx(exact.item(), abs=1e-12)
    assert k3.min() >= 0
    slope = torch.autograd.grad(k3.sum(), log_ratio)[0]
    assert slope.numpy() == pytest.approx(log_ratio.detach().expm1().numpy(), abs=1e-12)
    weights = divergence_weights(k3, scale=1.0, alpha=2.0)
    assert weights.min() >= 1
    assert torch.equal(weights.argsort(), k3.argsort())
