"""AWM against its theorems: same minimiser, smaller variance, exact tilts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.diffusion import (
    awm_log_likelihood,
    awm_loss,
    awm_proximity,
    clip_advantages,
    ddpo_step,
    edm_noisy_target_variance,
    finite_data_velocity,
    flow_grpo_step,
    interpolate,
    noisy_score_target,
    noisy_target_variance_ratio,
    prompt_advantages,
    score_to_velocity,
    velocity_target,
)

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)
close = {"rtol": 1e-9, "atol": 1e-9}
WEIGHTINGS = ("ghuber", "uniform", "t", "t2", "huber")


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def uniform(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- noisy targets ------------------------------------------------------------------------------

steps = st.tuples(st.floats(0.05, 0.98), st.floats(0.0, 0.95)).map(lambda p: (p[0], p[0] * p[1]))


@quick
@given(seeds, st.floats(0.02, 0.98))
def test_target_from_the_clean_sample_is_the_pretraining_target(seed, t):
    clean, noise = normal(seed, 2, 3, 2)
    x = interpolate(clean, noise, t)
    score = noisy_score_target(x, clean, t, 0.0)
    torch.testing.assert_close(score, -noise / t, rtol=1e-8, atol=1e-8)
    velocity = score_to_velocity(score, x, t)
    torch.testing.assert_close(velocity, velocity_target(clean, noise), rtol=1e-7, atol=1e-7)


@quick
@given(seeds, steps)
def test_exact_target_is_the_score_of_the_conditional_law(seed, times):
    t, s = times
    x_t, x_s = normal(seed, 2, 3, 2).requires_grad_()
    kept = (1 - t) / (1 - s)
    law = torch.distributions.Normal(kept * x_s.detach(), math.sqrt(t**2 - kept**2 * s**2))
    [expected] = torch.autograd.grad(law.log_prob(x_t).sum(), x_t)
    got = noisy_score_target(x_t.detach(), x_s.detach(), t, s)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@quick
@given(seeds, steps)
def test_log_density_of_the_reversed_step_is_score_matching_with_the_euler_target(seed, times):
    """At noise level sqrt 2 a Flow-GRPO step is the time reversal of the diffusion."""
    t, s = times
    x_t, x_s, velocity = normal(seed, 3, 2, 3)
    step = flow_grpo_step(x_t, velocity, t, s, noise_level=math.sqrt(2.0), x_prev=x_s)
    score = -(x_t + (1 - t) * velocity) / t
    target = noisy_score_target(x_t, x_s, t, s, form="euler")
    variance = 2 * t / (1 - t) * (t - s)
    matching = -variance / 2 * (score - target).square().mean(1)
    constant = -0.5 * math.log(2 * math.pi * variance)
    torch.testing.assert_close(step.logprob, matching + constant, rtol=1e-7, atol=1e-7)


def test_euler_target_tends_to_the_exact_one_linearly_in_the_step():
    """The error relative to the target, which itself grows like the root of 1/step."""
    t, noise = 0.6, normal(0, 4, 2)
    x_t, errors = normal(1, 4, 2), []
    for length in (0.02, 0.01, 0.005):
        s = t - length
        kept = (1 - t) / (1 - s)
        spread = math.sqrt(t**2 - kept**2 * s**2)
        x_s = (x_t - spread * noise) / kept
        exact = noisy_score_target(x_t, x_s, t, s)
        euler = noisy_score_target(x_t, x_s, t, s, form="euler")
        errors.append(((euler - exact).norm() / exact.norm()).item())
    assert 1.9 < errors[0] / errors[1] < 2.1
    assert 1.9 < errors[1] / errors[2] < 2.1


@quick
@given(steps)
def test_variance_ratio_is_that_of_the_signal_to_noise_ratios(times):
    t, s = times
    ratio = noisy_target_variance_ratio(t, s).item()
    noise_t, noise_s = (t / (1 - t)) ** 2, (s / (1 - s)) ** 2
    assert ratio == pytest.approx(1 / (1 - noise_s / noise_t), rel=1e-8)
    assert ratio >= 1 - 1e-15  # one unit in the last place
    kept = (1 - t) / (1 - s)
    assert ratio == pytest.approx(t**2 / (t**2 - kept**2 * s**2), rel=1e-8)
    assert noisy_target_variance_ratio(t, s / 2) <= ratio + 1e-12
    assert noisy_target_variance_ratio(t, 0.0) == 1


def test_variance_ratio_diverges_like_one_over_the_step_and_keeps_its_digits():
    t = torch.tensor([0.5, 0.5], dtype=torch.float64)
    lengths = torch.tensor([2.0**-30, 2.0**-31], dtype=torch.float64)
    ratio = noisy_target_variance_ratio(t, t - lengths)
    # t^2 (1-s)^2 / ((t-s)(t + s - 2ts)) tends to t (1-t) / (2 (t-s)).
    torch.testing.assert_close(ratio, 0.125 / lengths, rtol=1e-8, atol=0)
    assert noisy_target_variance_ratio(1.0, 0.9) == 1


def test_second_moment_of_sampled_targets_follows_the_ratio():
    """200,000 pairs: relative standard error 0.0045 each, the bound is 6 of the difference."""
    noise = normal(0, 3, 200_000, 1)
    t, s = 0.5, 0.4
    clean = torch.where(noise[0] > 0.3, 1.0, -1.0).double()
    x_s = interpolate(clean, noise[1], s)
    kept = (1 - t) / (1 - s)
    x_t = kept * x_s + math.sqrt(t**2 - kept**2 * s**2) * noise[2]
    moments = [noisy_score_target(x_t, x_s, t, s).square().mean()]
    x_t = interpolate(clean, noise[1], t)
    moments.append(noisy_score_target(x_t, clean, t, 0.0).square().mean())
    assert abs(moments[0] / moments[1] / noisy_target_variance_ratio(t, s) - 1) < 0.04


def test_clean_and_noisy_targets_have_the_same_minimiser_and_the_noisy_one_a_larger_error():
    """Least squares of the score on x for Gaussian data, slope -1/variance.

    The error of a fitted slope is normal with variance residual/(n Var x). Over 400 fits of 500
    pairs the ratio of two such variances has relative standard error 0.1; the bound is 3.5.
    """
    t, s, std = 0.5, 0.45, 0.8
    variance = (1 - t) ** 2 * std**2 + t**2
    kept = (1 - t) / (1 - s)
    noise = normal(3, 3, 400, 500)
    clean = std * noise[0]
    x_s = interpolate(clean, noise[1], s)
    noisy_x = kept * x_s + math.sqrt(t**2 - kept**2 * s**2) * noise[2]
    clean_x = interpolate(clean, noise[1], t)
    slopes = {}
    for name, x, target in (
        ("clean", clean_x, noisy_score_target(clean_x, clean, t, 0.0)),
        ("noisy", noisy_x, noisy_score_target(noisy_x, x_s, t, s)),
    ):
        slopes[name] = (x * target).sum(1) / x.square().sum(1)
        # 200,000 pairs in all: five standard errors are below 0.04.
        assert abs(slopes[name].mean() + 1 / variance) < 0.04
    moment = 1 / t**2
    residual = moment - 1 / variance
    noisy_residual = noisy_target_variance_ratio(t, s).item() * moment - 1 / variance
    ratio = (slopes["noisy"].var() / slopes["clean"].var()).item()
    assert abs(ratio / (noisy_residual / residual) - 1) < 0.35


@quick
@given(st.floats(0.1, 80), st.floats(0, 0.95), st.floats(0.1, 2))
def test_edm_variance_is_that_of_the_noisy_target(sigma_t, share, sigma_data):
    sigma_s = share * sigma_t
    got = edm_noisy_target_variance(sigma_t, sigma_s, sigma_data=sigma_data).item()
    # y_s = x_0 + sigma_s n_1 + root n_2 - sigma_t^2/root n_2 with independent noises.
    root = math.sqrt(sigma_t**2 - sigma_s**2)
    expected = sigma_data**2 + sigma_s**2 + (root - sigma_t**2 / root) ** 2
    assert got == pytest.approx(expected, rel=1e-7)
    assert edm_noisy_target_variance(sigma_t, 0.0, sigma_data=sigma_data) == sigma_data**2


def test_numbers_and_tensors_mix_and_keep_the_dtype():
    s = torch.tensor([0.0, 0.4])
    for got in (noisy_target_variance_ratio(0.5, s), edm_noisy_target_variance(0.5, s)):
        assert got.shape == (2,)
        assert got.dtype == torch.float32
    torch.testing.assert_close(noisy_target_variance_ratio(0.5, s), torch.tensor([1.0, 1.8]))
    x = normal(0, 2, 3).bfloat16()
    for form in ("exact", "euler"):
        got = noisy_score_target(x, x, torch.tensor([0.5, 0.9]), 0.3, form=form)
        assert got.dtype == torch.bfloat16


def test_noisy_targets_pass_gradcheck():
    x_t, x_s = normal(0, 2, 2, 3).requires_grad_()
    t = torch.tensor([0.6, 0.9], dtype=torch.float64, requires_grad=True)
    s = torch.tensor([0.2, 0.0], dtype=torch.float64, requires_grad=True)
    for form in ("exact", "euler"):
        assert torch.autograd.gradcheck(
            lambda *inputs, form=form: noisy_score_target(*inputs, form=form), (x_t, x_s, t, s)
        )
    assert torch.autograd.gradcheck(noisy_target_variance_ratio, (t, s))
    assert torch.autograd.gradcheck(edm_noisy_target_variance, (t, s))


# --- the surrogate log-likelihood ---------------------------------------------------------------


def published(residual, t, weighting, power):
    return {
        "uniform": residual,
        "t": t * residual,
        "t2": t**2 * residual,
        "huber": ((residual + 1e-10).sqrt() - 1e-5) * t,
        "ghuber": ((residual + 1e-10) ** power - 1e-10**power) * t / power,
    }[weighting]


@quick
@given(seeds, st.sampled_from(WEIGHTINGS), st.floats(0.05, 1))
def test_log_likelihood_is_minus_the_published_cost(seed, weighting, power):
    velocity, clean, noise = normal(seed, 3, 4, 2, 3)
    t = uniform(seed, 4)
    got = awm_log_likelihood(velocity, clean, noise, t, weighting=weighting, power=power)
    residual = (velocity - (noise - clean)).square().mean((1, 2))
    torch.testing.assert_close(got, -published(residual, t, weighting, power), **close)
    assert (got <= 0).all()


def test_default_is_ghuber_with_power_one_quarter_and_its_relatives():
    velocity, clean, noise = normal(0, 3, 4, 3)
    t = uniform(0, 4)
    score = {w: awm_log_likelihood(velocity, clean, noise, t, weighting=w) for w in WEIGHTINGS}
    assert torch.equal(awm_log_likelihood(velocity, clean, noise, t), score["ghuber"])
    half = awm_log_likelihood(velocity, clean, noise, t, power=0.5)
    torch.testing.assert_close(half, 2 * score["huber"], **close)
    one = awm_log_likelihood(velocity, clean, noise, t, power=1.0)
    torch.testing.assert_close(one, score["t"], **close)


def test_log_likelihood_is_exactly_zero_without_a_residual_and_precise_near_it():
    clean, noise = normal(0, 2, 3, 2)
    t = torch.full((3,), 0.5, dtype=torch.float64)
    for weighting in WEIGHTINGS:
        exact = awm_log_likelihood(noise - clean, clean, noise, t, weighting=weighting)
        assert (exact == 0).all()
    zero = torch.zeros(3, 2)
    near = awm_log_likelihood(zero + 1e-8, zero, zero, t.float())
    # (m + f)^p - f^p at m = 1e-16 is p f^(p-1) m to first order; in float32 the plain form is 0.
    expected = -0.5 * 1e-10**-0.75 * 1e-16
    torch.testing.assert_close(near, torch.full((3,), expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_log_likelihood_passes_gradcheck_and_detaches_its_targets(weighting):
    velocity, clean, noise = normal(0, 3, 3, 2)
    t = uniform(0, 3)
    velocity.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: awm_log_likelihood(v, clean, noise, t, weighting=weighting), (velocity,)
    )
    others = [tensor.clone().requires_grad_() for tensor in (clean, noise, t)]
    awm_log_likelihood(velocity, *others, weighting=weighting).sum().backward()
    assert all(tensor.grad is None for tensor in others)


def test_ghuber_gradient_is_normalised_by_each_items_own_residual():
    velocity, clean, noise = normal(0, 3, 3, 4)
    velocity.requires_grad_()
    t = uniform(0, 3)
    awm_log_likelihood(velocity, clean, noise, t).sum().backward()
    gap = (velocity - (noise - clean)).detach()
    residual = gap.square().mean(1, keepdim=True) + 1e-10
    expected = -t.unsqueeze(1) * residual**-0.75 * 2 * gap / 4
    torch.testing.assert_close(velocity.grad, expected, **close)


def test_extreme_velocities_stay_finite():
    zero, t = torch.zeros(2, 3), torch.tensor([0.01, 0.99])
    for weighting in WEIGHTINGS:
        velocity = torch.full((2, 3), 1e4, requires_grad=True)
        score = awm_log_likelihood(velocity, zero, zero, t, weighting=weighting)
        score.sum().backward()
        assert score.isfinite().all()
        assert velocity.grad.isfinite().all()
    half = awm_log_likelihood(zero.half() + 300, zero.half(), zero.half(), t.half())
    assert half.dtype == torch.float16
    full = awm_log_likelihood(zero + 300, zero, zero, t)
    torch.testing.assert_close(half.float(), full, rtol=2e-3, atol=1e-4)


# --- the policy loss ----------------------------------------------------------------------------


@quick
@given(seeds, st.floats(0.05, 1.5))
def test_loss_is_the_clipped_surrogate(seed, clip):
    new, old, advantages = normal(seed, 3, 6)
    got = awm_loss(new, old, advantages, clip=clip, reduction="none")
    ratio = (new - old).exp()
    expected = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    torch.testing.assert_close(got, expected, **close)
    plain = -advantages * ratio
    assert (got >= plain - 1e-12).all()
    inside = (ratio - 1).abs() <= clip
    torch.testing.assert_close(got[inside], plain[inside], **close)
    torch.testing.assert_close(awm_loss(new, old, advantages, clip=clip), expected.mean(), **close)
    torch.testing.assert_close(
        awm_loss(new, old, advantages, clip=clip, reduction="sum"), expected.sum(), **close
    )


def network_scores(weighting="ghuber", items=5, times=3):
    """Log-likelihoods ``[B, K]`` of a linear network, its parameters and the advantages."""
    parameters = normal(7, 2, 2).requires_grad_()
    clean, noise = normal(8, items * times, 2), normal(9, items * times, 2)
    t = 0.1 + 0.8 * uniform(10, items * times)
    velocity = interpolate(clean, noise, t) @ parameters
    score = awm_log_likelihood(velocity, clean, noise, t, weighting=weighting)
    return score.reshape(items, times), parameters, normal(11, items)


def test_on_policy_both_orders_and_plain_matching_have_one_gradient():
    score, parameters, advantages = network_scores()
    losses = {
        "exp first": awm_loss(score, score, advantages),
        "sum first": awm_loss(score.mean(1), score.mean(1), advantages),
        "matching": -(advantages * score.mean(1)).mean(),
    }
    gradients = [
        torch.autograd.grad(loss, parameters, retain_graph=True)[0] for loss in losses.values()
    ]
    assert gradients[0].abs().max() > 0.01
    torch.testing.assert_close(gradients[0], gradients[1], **close)
    torch.testing.assert_close(gradients[0], gradients[2], **close)
    assert losses["exp first"].item() == pytest.approx(-advantages.mean().item())


def test_equal_advantages_give_the_pretraining_gradient_and_zero_ones_none():
    score, parameters, advantages = network_scores("uniform")
    [pretraining] = torch.autograd.grad(-score.mean(), parameters, retain_graph=True)
    loss = awm_loss(score, score, torch.ones_like(advantages))
    [got] = torch.autograd.grad(loss, parameters, retain_graph=True)
    torch.testing.assert_close(got, pretraining, **close)
    [none] = torch.autograd.grad(awm_loss(score, score, 0 * advantages), parameters)
    assert (none == 0).all()


def matching_gradient(velocity, x, data, probs, t, advantages):
    """Gradient by the velocity at ``x`` of the AWM loss, expected over data and noise given x."""
    posterior = finite_data_velocity(x, data, t, probs=probs).posterior[0]
    noise = (x - (1 - t) * data) / t
    field = velocity.expand(len(data), -1).clone().requires_grad_()
    times = torch.full((len(data),), t, dtype=torch.float64)
    score = awm_log_likelihood(field, data, noise, times, weighting="uniform")
    losses = awm_loss(score, score, advantages, reduction="none")
    (posterior * losses).sum().backward()
    return field.grad.sum(0)


@quick
@given(seeds, st.floats(0.2, 0.9))
def test_weights_on_finite_data_fit_the_velocity_of_the_tilted_law(seed, t):
    x, data, probs = normal(seed, 1, 2), normal(seed + 1, 4, 2), uniform(seed, 4) + 0.1
    weights = uniform(seed + 2, 4)
    tilted = finite_data_velocity(x, data, t, probs=probs * weights).velocity
    at_tilted = matching_gradient(tilted, x, data, probs, t, weights)
    torch.testing.assert_close(at_tilted, torch.zeros_like(at_tilted), rtol=0, atol=1e-9)
    plain = finite_data_velocity(x, data, t, probs=probs).velocity
    posterior = finite_data_velocity(x, data, t, probs=probs).posterior[0]
    # At the untilted field the step is the covariance of advantage and velocity.
    targets = (x - (1 - t) * data) / t - data
    covariance = posterior @ (weights.unsqueeze(1) * targets) - (posterior @ weights) * plain[0]
    got = matching_gradient(plain, x, data, probs, t, weights)
    torch.testing.assert_close(got, -covariance * 2 / 2, **close)  # 2 / D with D = 2


def test_a_baseline_changes_nothing_at_the_exact_field_and_something_elsewhere():
    x, data, probs = normal(0, 1, 2), normal(1, 4, 2), uniform(0, 4) + 0.1
    advantages, t = normal(2, 4), 0.5
    exact = finite_data_velocity(x, data, t, probs=probs).velocity
    plain = matching_gradient(exact, x, data, probs, t, advantages)
    shifted = matching_gradient(exact, x, data, probs, t, advantages + 3)
    torch.testing.assert_close(plain, shifted, **close)
    off = matching_gradient(exact + 0.5, x, data, probs, t, advantages + 3)
    assert (off - matching_gradient(exact + 0.5, x, data, probs, t, advantages)).abs().max() > 0.1


def test_loss_takes_denoising_policies_too():
    """DDPO and Flow-GRPO are the same surrogate on the log-probability of a step."""
    x, network, x_prev = normal(0, 3, 4, 2)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64)
    network.requires_grad_()
    for step in (
        flow_grpo_step(x, network, 0.6, 0.5, x_prev=x_prev),
        ddpo_step(x, network, 0.3, 0.5, x_prev=x_prev),
    ):
        loss = awm_loss(step.logprob, step.logprob, advantages, clip=1e-4)
        [got] = torch.autograd.grad(loss, network, retain_graph=True)
        [expected] = torch.autograd.grad(-(advantages * step.logprob).mean(), network)
        torch.testing.assert_close(got, expected, **close)


def test_loss_passes_gradcheck_and_only_the_new_likelihood_carries_a_gradient():
    new, old, advantages = (0.3 * normal(0, 3, 4, 3)).requires_grad_()
    old, advantages = old.detach().requires_grad_(), advantages.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda n: awm_loss(n, old, advantages, clip=0.2), (new,))
    awm_loss(new, old, advantages).backward()
    assert old.grad is None
    assert advantages.grad is None


def test_masks_leave_items_out():
    score, old, advantages = normal(0, 3, 4)
    mask = torch.tensor([True, False, True, False])
    got = awm_loss(score, old, advantages, mask=mask)
    torch.testing.assert_close(got, awm_loss(score[mask], old[mask], advantages[mask]), **close)
    hidden = torch.where(mask, score, torch.nan).requires_grad_()
    loss = awm_loss(hidden, old, advantages, mask=mask)
    loss.backward()
    assert loss == got
    assert hidden.grad.isfinite().all()
    nothing = awm_loss(hidden, old, advantages, mask=torch.zeros(4, dtype=torch.bool))
    [gradient] = torch.autograd.grad(nothing, hidden)
    assert nothing == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_ratios_stay_finite(dtype):
    new = torch.tensor([1e4, -1e4, 1e4, -1e4], dtype=dtype, requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, -1e-5, -1e-5], dtype=dtype)
    loss = awm_loss(new, torch.zeros_like(new), advantages, reduction="none")
    assert loss.isfinite().all()
    assert loss.dtype == dtype
    loss.sum().backward()
    assert new.grad.isfinite().all()


def test_nan_shows():
    score = torch.tensor([0.0, torch.nan])
    assert awm_loss(score, torch.zeros(2), torch.ones(2)).isnan()


def test_loss_compiles_and_vectorises():
    score, old, advantages = normal(0, 3, 4, 3)
    compiled = torch.compile(awm_loss, fullgraph=True, backend="eager")
    expected = awm_loss(score, old, advantages)
    torch.testing.assert_close(compiled(score, old, advantages), expected, **close)
    rows = torch.func.vmap(torch.func.grad(awm_loss))(score, old, advantages)
    [together] = torch.autograd.grad(
        awm_loss(score.requires_grad_(), old, advantages, reduction="sum") / 3, score
    )
    torch.testing.assert_close(rows, together, **close)


@quick
@given(seeds)
def test_proximity_is_the_published_penalty(seed):
    velocity, reference = normal(seed, 2, 4, 2, 3)
    t = uniform(seed, 4)
    t[0] = 1.0
    squares = (velocity - reference).square().mean((1, 2))
    got = awm_proximity(velocity, reference, t, reduction="none")
    torch.testing.assert_close(got, squares, **close)
    got = awm_proximity(velocity, reference, t, weighting="elbo")
    variance = 0.7**2 * t / (1 - t.clamp(max=0.99))
    torch.testing.assert_close(got, (squares / (2 * variance)).mean(), **close)


def test_proximity_passes_gradcheck_and_detaches_the_reference():
    velocity, t = normal(0, 3, 2).requires_grad_(), uniform(0, 3)
    reference = normal(1, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: awm_proximity(v, reference, t, weighting="elbo"), (velocity,)
    )
    awm_proximity(velocity, reference, t).backward()
    assert velocity.grad.abs().max() > 0.01
    assert reference.grad is None


# --- advantages ---------------------------------------------------------------------------------


@quick
@given(seeds, st.booleans())
def test_advantages_are_the_loop_over_prompts(seed, global_std):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(-2, 3, (20,), generator=g)
    rewards = torch.rand(20, dtype=torch.float64, generator=g)
    got = prompt_advantages(rewards, ids, global_std=global_std)
    names = [f"prompt {i}" for i in ids.tolist()]
    assert torch.equal(prompt_advantages(rewards, names, global_std=global_std), got)
    for prompt in ids.unique():
        mine = ids == prompt
        std = (rewards if global_std else rewards[mine]).std(correction=0)
        expected = (rewards[mine] - rewards[mine].mean()) / (std + 1e-4)
        torch.testing.assert_close(got[mine], expected, rtol=1e-7, atol=1e-9)
        assert abs(got[mine].sum()) < 1e-9


@quick
@given(seeds, st.floats(0.5, 50), st.floats(-5, 5))
def test_advantages_ignore_scale_and_shift_of_the_rewards(seed, scale, shift):
    rewards, ids = uniform(seed, 12), torch.arange(12) // 4
    expected = prompt_advantages(rewards, ids, eps=1e-12)
    got = prompt_advantages(scale * rewards + shift, ids, eps=1e-12)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("global_std", [True, False])
def test_equal_rewards_and_single_samples_have_exactly_no_advantage(dtype, global_std):
    rewards = torch.tensor([0.1, 0.1, 0.1, 7.3], dtype=dtype, requires_grad=True)
    got = prompt_advantages(rewards, ["a", "a", "a", "b"], global_std=global_std)
    assert got.dtype == dtype
    assert not got.requires_grad
    assert got.tolist() == [0.0] * 4


def test_clipping_divides_by_the_limit():
    advantages = torch.tensor([-7.0, -5.0, 1.0, 6.0])
    torch.testing.assert_close(clip_advantages(advantages), torch.tensor([-1.0, -1.0, 0.2, 1.0]))
    same = clip_advantages(advantages, limit=5.0, maximum=5.0)
    assert same.tolist() == [-5.0, -5.0, 1.0, 5.0]
    assert clip_advantages(advantages, limit=2.0, maximum=3.0)[-1] == 3.0
    assert not clip_advantages(advantages.requires_grad_()).requires_grad


V, T1 = torch.zeros(3, 2), torch.full((3,), 0.5)
L = torch.zeros(3)


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: awm_log_likelihood(V, V[:2], V, T1), ValueError, "clean"),
        (lambda: awm_log_likelihood(V, V, V, T1[:2]), ValueError, "t must"),
        (lambda: awm_log_likelihood(V, V, V, 0.5), TypeError, "t must"),
        (lambda: awm_log_likelihood(V, V, V, T1, weighting="x"), ValueError, "weighting"),
        (lambda: awm_log_likelihood(V, V, V, T1, power=0.0), ValueError, "power"),
        (lambda: awm_log_likelihood(V.long(), V, V, T1), TypeError, "velocity"),
        (lambda: awm_log_likelihood(V[:0], V[:0], V[:0], L[:0]), ValueError, "velocity"),
        (lambda: awm_loss(L, L[:2], L), ValueError, "old_log_likelihood"),
        (lambda: awm_loss(L, L, L[:2]), ValueError, "advantages"),
        (lambda: awm_loss(V, V, torch.zeros(2)), ValueError, "advantages"),
        (lambda: awm_loss(L, L, L, clip=0.0), ValueError, "clip"),
        (lambda: awm_loss(L, L, L, reduction="x"), ValueError, "reduction"),
        (lambda: awm_loss(L, L, L, mask=torch.ones(2)), ValueError, "mask"),
        (lambda: awm_loss(L[:0], L[:0], L[:0]), ValueError, "log_likelihood"),
        (lambda: awm_loss(V[None], V[None], L[:1]), ValueError, "log_likelihood"),
        (lambda: awm_proximity(V, V, T1, weighting="x"), ValueError, "weighting"),
        (lambda: awm_proximity(V, V[:1], T1), ValueError, "ref_velocity"),
        (lambda: prompt_advantages(L, ["a"]), ValueError, "prompts"),
        (lambda: prompt_advantages(L, L), TypeError, "prompts"),
        (lambda: prompt_advantages(L[:0], []), ValueError, "rewards"),
        (lambda: prompt_advantages(L.long(), "abc"), TypeError, "rewards"),
        (lambda: prompt_advantages(L, "abc", eps=0.0), ValueError, "eps"),
        (lambda: clip_advantages(L, limit=0.0), ValueError, "limit"),
        (lambda: clip_advantages(L, maximum=-1.0), ValueError, "maximum"),
        (lambda: noisy_target_variance_ratio(0.5, 0.5), ValueError, "s must"),
        (lambda: noisy_target_variance_ratio(0.0, 0.0), ValueError, "t must"),
        (lambda: noisy_target_variance_ratio(1.1, 0.0), ValueError, "t must"),
        (lambda: edm_noisy_target_variance(1.0, 1.0), ValueError, "sigma_s"),
        (lambda: edm_noisy_target_variance(0.0, 0.0), ValueError, "sigma_t"),
        (lambda: noisy_score_target(V, V, 0.5, 0.6), ValueError, "s must"),
        (lambda: noisy_score_target(V, V, 0.5, 0.1, form="x"), ValueError, "form"),
        (lambda: noisy_score_target(V, V[:1], 0.5, 0.1), ValueError, "x_s"),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()
