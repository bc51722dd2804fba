import math

import pytest
import torch
from torch.autograd import gradcheck

from steelyard.divergences import (
    JENSEN_SHANNON,
    KL,
    PEARSON_CHI2,
    REVERSE_KL,
    f_divergence,
    kl_estimate,
    monte_carlo_divergence,
)

KINDS = ("k1", "k2", "k3")


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(actual, expected, rtol=1e-9, atol=1e-9):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


# --- monte_carlo_divergence --------------------------------------------------------------------


def test_estimate_is_the_mean_of_the_generator(divergence):
    log_ratio = tensor(-3.0, -0.2, 0.0, 0.4, 2.0)
    close(monte_carlo_divergence(log_ratio, divergence), divergence.f(log_ratio.exp()).mean())


def test_enumerated_samples_with_their_weights_are_exact(divergence, laws):
    log_p, log_q = (x[0] for x in laws)
    proposal = torch.full_like(log_q, -math.log(6))  # each outcome once, under a uniform law
    estimate = monte_carlo_divergence(
        log_p - log_q, divergence, log_weights=log_q - proposal + 12.3
    )
    close(estimate, f_divergence(log_p, log_q, divergence))


def test_estimate_converges_to_the_divergence(laws):
    log_p, log_q = (x[1] for x in laws)
    generator = torch.Generator().manual_seed(0)
    draws = torch.multinomial(log_q.exp(), 200_000, replacement=True, generator=generator)
    for divergence in (KL, JENSEN_SHANNON):
        estimate = monte_carlo_divergence((log_p - log_q)[draws], divergence.centred())
        close(estimate, f_divergence(log_p, log_q, divergence), 0.02, 0.0)


def test_importance_weights_correct_for_the_proposal(laws):
    log_p, log_q = (x[1] for x in laws)
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(6, (200_000,), generator=generator)
    estimate = monte_carlo_divergence(
        (log_p - log_q)[draws], JENSEN_SHANNON, log_weights=log_q[draws]
    )
    close(estimate, f_divergence(log_p, log_q, JENSEN_SHANNON), 0.02, 0.0)


def test_a_sample_without_mass_under_p_costs_the_value_at_zero(divergence):
    estimate = monte_carlo_divergence(tensor(-math.inf, 0.0), divergence)
    close(estimate, tensor(divergence.at_zero / 2)[0])


def test_a_sample_of_weight_zero_is_left_out(divergence):
    estimate = monte_carlo_divergence(
        tensor(0.7, math.inf), divergence, log_weights=tensor(-1.0, -math.inf)
    )
    close(estimate, divergence.f(tensor(0.7).exp())[0])


def test_huge_ratio_under_a_tiny_weight_does_not_overflow():
    # weight exp(-2000), t^2 = exp(1990): the product is exp(-10)
    estimate = monte_carlo_divergence(
        tensor(0.0, 995.0), PEARSON_CHI2, log_weights=tensor(0.0, -2000.0)
    )
    close(estimate, tensor(math.exp(-10))[0])


def test_weights_are_detached_and_ratios_are_not(divergence):
    log_ratio, log_weights = tensor(0.3, -0.5).requires_grad_(), tensor(0.1, 0.2).requires_grad_()
    monte_carlo_divergence(log_ratio, divergence, log_weights=log_weights).backward()
    assert log_weights.grad is None
    t = log_ratio.detach().exp()
    expected = log_weights.detach().softmax(0) * t * divergence.derivative(t)
    close(log_ratio.grad, expected)


def test_monte_carlo_gradcheck(divergence):
    log_ratio = tensor(0.3, -0.5, 1.2).requires_grad_()
    assert gradcheck(lambda x: monte_carlo_divergence(x, divergence), log_ratio)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_monte_carlo_half_precision_accumulates_in_float32(dtype):
    log_ratio = torch.linspace(-1, 1, 5000).to(dtype)
    estimate = monte_carlo_divergence(log_ratio, KL)
    assert estimate.dtype == dtype
    close(estimate, monte_carlo_divergence(log_ratio.float(), KL).to(dtype), 0, 0)


def test_monte_carlo_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"log_ratio must have shape \[any\], got \[2, 2\]"):
        monte_carlo_divergence(torch.zeros(2, 2), KL)
    with pytest.raises(ValueError, match="log_ratio must not be empty"):
        monte_carlo_divergence(torch.zeros(0), KL)
    with pytest.raises(ValueError, match=r"log_weights must have shape \[2\], got \[3\]"):
        monte_carlo_divergence(torch.zeros(2), KL, log_weights=torch.zeros(3))
    with pytest.raises(TypeError, match="log_ratio must have a floating dtype"):
        monte_carlo_divergence(torch.zeros(2, dtype=torch.int64), KL)


# --- kl_estimate -------------------------------------------------------------------------------


def test_k1_and_k3_are_unbiased_and_k2_is_second_order(laws):
    log_old, log_new = (x[0] for x in laws)
    exact = f_divergence(log_old, log_new, KL)
    mean = {kind: (log_old.exp() * kl_estimate(log_new - log_old, kind)).sum() for kind in KINDS}
    close(mean["k1"], exact)
    close(mean["k3"], exact)
    near = (log_old + 1e-3 * (log_new - log_old)).log_softmax(-1)
    k2 = (log_old.exp() * kl_estimate(near - log_old, "k2")).sum()
    close(k2, f_divergence(log_old, near, KL), 2e-2, 0.0)


def test_k1_and_k3_have_the_gradient_of_the_kl_and_k2_has_not(laws):
    log_old, log_new = (x[0] for x in laws)

    def gradient(value):
        logits = log_new.clone().requires_grad_()
        value(logits.log_softmax(-1)).backward()
        return logits.grad

    exact = gradient(lambda new: f_divergence(log_old, new, KL))

    def estimate(kind):
        return gradient(lambda new: (log_old.exp() * kl_estimate(new - log_old, kind)).sum())

    close(estimate("k1"), exact)
    close(estimate("k3"), exact)
    assert (estimate("k2") - exact).abs().max() > 0.1


def test_k3_is_the_centred_generator_at_the_ratio():
    log_ratio = tensor(-2.0, 0.0, 1.0)
    close(kl_estimate(log_ratio, "k3"), REVERSE_KL.centred().f(log_ratio.exp()))


def test_k2_and_k3_are_non_negative_even_for_tiny_ratios_in_float32():
    log_ratio = torch.cat([torch.linspace(-1e-3, 1e-3, 1001), torch.tensor([-1e4, 80.0])])
    for kind in ("k2", "k3"):
        assert (kl_estimate(log_ratio, kind) >= -1e-10).all()


def test_k1_is_the_default_and_the_shape_is_kept():
    log_ratio = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0)).transpose(0, 2)
    assert torch.equal(kl_estimate(log_ratio), -log_ratio)
    for kind in KINDS:
        assert kl_estimate(log_ratio, kind).shape == log_ratio.shape


@pytest.mark.parametrize("kind", KINDS)
def test_kl_estimate_transforms(kind):
    log_ratio = tensor(-0.4, 0.0, 0.9).requires_grad_()
    assert gradcheck(lambda x: kl_estimate(x, kind), log_ratio)
    close(torch.func.vmap(lambda x: kl_estimate(x, kind))(log_ratio), kl_estimate(log_ratio, kind))
    compiled = torch.compile(lambda x: kl_estimate(x, kind), fullgraph=True, backend="aot_eager")
    close(compiled(log_ratio), kl_estimate(log_ratio, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kl_estimate_half_precision_is_computed_in_float32(kind, dtype):
    log_ratio = torch.tensor([0.01, -0.02, 1.0], dtype=dtype)
    expected = kl_estimate(log_ratio.float(), kind).to(dtype)
    assert torch.equal(kl_estimate(log_ratio, kind), expected)


def test_kl_estimate_errors_name_the_argument():
    with pytest.raises(ValueError, match="kind must be one of 'k1', 'k2', 'k3', got 'k4'"):
        kl_estimate(torch.zeros(2), "k4")
    with pytest.raises(TypeError, match="log_ratio must have a floating dtype"):
        kl_estimate(torch.tensor([1]))


def test_monte_carlo_transforms(laws):
    log_ratio = laws[0] - laws[1]

    def loss(x):
        return monte_carlo_divergence(x, JENSEN_SHANNON, log_weights=x)

    batched = torch.func.vmap(loss)(log_ratio)
    close(batched, torch.stack([loss(row) for row in log_ratio]))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    close(compiled(log_ratio[0]), batched[0])
