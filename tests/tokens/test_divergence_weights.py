"""Divergence-weighted advantages (section 6 of the paper): the weights live in the policy package.

That a weight is the centred sigmoid and that k3 averages to the divergence is tested beside them.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.divergences import kl_estimate
from steelyard.policy import divergence_weights, grpo_loss

properties = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31)
scales, slopes = st.floats(-2, 2), st.floats(-50, 50)


def divergences(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(4, 5, generator=generator, dtype=torch.float64).square()


@properties
@given(seeds, scales, slopes)
def test_weights_of_opposite_scale_or_slope_average_to_one(seed, scale, alpha):
    kl = divergences(seed)
    weights = divergence_weights(kl, scale=scale, alpha=alpha)
    opposite = divergence_weights(kl, scale=-scale, alpha=alpha)
    torch.testing.assert_close(weights + opposite, torch.full_like(kl, 2.0), rtol=0, atol=1e-14)
    mirrored = divergence_weights(kl, scale=scale, alpha=-alpha)
    torch.testing.assert_close(mirrored, opposite, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("scale", "alpha"), [(0.0, 10.0), (1.0, 0.0)])
def test_without_scale_or_slope_the_loss_is_that_of_dapo(scale, alpha):
    log_ratio = divergences(0).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64)
    weights = divergence_weights(kl_estimate(log_ratio, "k3"), scale=scale, alpha=alpha)
    assert torch.equal(weights, torch.ones_like(weights))
    settings = {"epsilon": 0.2, "epsilon_high": 0.28}
    plain = grpo_loss(log_ratio, advantages, **settings)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(0.8, 1.28)
    weighted = weights * advantages[:, None]
    by_hand = -torch.minimum(ratio * weighted, clipped * weighted).mean()
    torch.testing.assert_close(plain, by_hand)


@properties
@given(seeds, st.floats(0.1, 2), st.floats(0.1, 50))
def test_boosts_stay_between_one_and_half_the_scale(seed, scale, alpha):
    """A divergence is never negative, so only half of the sigmoid is reached."""
    kl = divergences(seed)
    high = divergence_weights(kl, scale=scale, alpha=alpha)
    low = divergence_weights(kl, scale=scale, alpha=-alpha)
    assert ((high >= 1) & (high <= 1 + scale / 2)).all()
    assert ((low <= 1) & (low >= 1 - scale / 2)).all()


@properties
@given(seeds)
def test_first_step_is_unweighted_and_k3_is_exact_on_an_enumerated_vocabulary(seed):
    generator = torch.Generator().manual_seed(seed)
    old, new = 2 * torch.randn(2, 9, generator=generator, dtype=torch.float64)
    old, new = old.log_softmax(-1), new.log_softmax(-1)
    k3 = kl_estimate(new - old, "k3")
    assert (k3 >= 0).all()
    exact = (old.exp() * (old - new)).sum().item()
    assert (old.exp() * k3).sum().item() == pytest.approx(exact, abs=1e-12)
    first = kl_estimate(old - old, "k3")
    weights = divergence_weights(first, scale=2.0, alpha=-math.pi)
    assert torch.equal(weights, torch.ones_like(weights))
