"""Linear flows: conversions both ways, exact fields, samplers, denoising policies."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from steelyard.diffusion import (
    data_to_velocity,
    ddpo_step,
    finite_data_velocity,
    flow_grpo_kl,
    flow_grpo_step,
    flow_times,
    interpolate,
    noise_to_velocity,
    sample_ode,
    sample_sde,
    score_to_velocity,
    velocity_target,
    velocity_to_data,
    velocity_to_noise,
    velocity_to_score,
)

quick = settings(deadline=None, max_examples=20)
seeds = st.integers(0, 2**31)
inner_times = st.floats(0.02, 0.98)
ends = st.sampled_from([0, 1])
close = {"rtol": 1e-9, "atol": 1e-9}


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gaussian_field(mean: float, std: float, data_at: int = 0):
    """Exact velocity of data ``N(mean, std^2)``."""

    def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        tau = (t if data_at == 0 else 1 - t).reshape(-1, *[1] * (x.dim() - 1))
        variance = (1 - tau) ** 2 * std**2 + tau**2
        slope = (tau - (1 - tau) * std**2) / variance
        away = slope * (x - (1 - tau) * mean) - mean
        return away if data_at == 0 else -away

    return field


# --- conversions --------------------------------------------------------------------------------


@quick
@given(seeds, inner_times, ends)
def test_every_prediction_of_a_pair_is_the_pair(seed, t, data_at):
    data, noise = normal(seed, 2, 3, 2)
    x = interpolate(data, noise, t, data_at=data_at)
    velocity = velocity_target(data, noise, data_at=data_at)
    tau = t if data_at == 0 else 1 - t
    torch.testing.assert_close(x, (1 - tau) * data + tau * noise, **close)
    for convert, expected in (
        (velocity_to_noise, noise),
        (velocity_to_data, data),
        (velocity_to_score, -noise / tau),
    ):
        torch.testing.assert_close(convert(velocity, x, t, data_at=data_at), expected, **close)


@quick
@given(seeds, inner_times, ends)
def test_conversions_there_and_back_change_nothing(seed, t, data_at):
    velocity, x = normal(seed, 2, 3, 4)
    pairs = (
        (velocity_to_noise, noise_to_velocity),
        (velocity_to_data, data_to_velocity),
        (velocity_to_score, score_to_velocity),
    )
    for there, back in pairs:
        for first, second in ((there, back), (back, there)):
            value = first(velocity, x, t, data_at=data_at)
            again = second(value, x, t, data_at=data_at)
            torch.testing.assert_close(again, velocity, rtol=1e-8, atol=1e-8)


@quick
@given(seeds, inner_times)
def test_the_two_conventions_are_time_and_sign_reversed(seed, t):
    velocity, x = normal(seed, 2, 3, 2)
    for convert in (velocity_to_noise, velocity_to_data, velocity_to_score):
        here = convert(velocity, x, t)
        there = convert(-velocity, x, 1 - t, data_at=1)
        torch.testing.assert_close(here, there, **close)
    for convert in (noise_to_velocity, data_to_velocity, score_to_velocity):
        here = convert(velocity, x, t)
        there = -convert(velocity, x, 1 - t, data_at=1)
        torch.testing.assert_close(here, there, **close)


@quick
@given(seeds, ends)
def test_the_velocity_is_the_derivative_of_the_path(seed, data_at):
    data, noise = normal(seed, 2, 1, 3)
    before = interpolate(data, noise, 0.3, data_at=data_at)
    after = interpolate(data, noise, 0.8, data_at=data_at)
    slope = (after - before) / 0.5  # exact, the path is straight
    torch.testing.assert_close(slope, velocity_target(data, noise, data_at=data_at), **close)


def test_times_per_item_are_the_loop_over_items():
    velocity, x = normal(0, 2, 4, 3, 2)
    t = torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64)
    for convert in (velocity_to_score, velocity_to_data, score_to_velocity, noise_to_velocity):
        together = convert(velocity, x, t)
        alone = [convert(velocity[i : i + 1], x[i : i + 1], t[i].item()) for i in range(4)]
        torch.testing.assert_close(together, torch.cat(alone), **close)


def test_ends_of_the_path():
    x, velocity = normal(1, 2, 3, 2)
    torch.testing.assert_close(velocity_to_score(velocity, x, 1.0), -x, **close)
    torch.testing.assert_close(velocity_to_noise(velocity, x, 1.0), x, **close)
    torch.testing.assert_close(velocity_to_data(velocity, x, 0.0), x, **close)
    torch.testing.assert_close(velocity_to_data(velocity, x, 1.0, data_at=1), x, **close)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    velocity, x = normal(3, 2, 64, 8).to(dtype)
    for convert in (velocity_to_score, velocity_to_data, score_to_velocity, data_to_velocity):
        got = convert(velocity, x, 0.3)
        assert got.dtype == dtype
        torch.testing.assert_close(got, convert(velocity.float(), x.float(), 0.3).to(dtype))
    step = flow_grpo_step(x, velocity, 0.5, 0.4, x_prev=x)
    exact = flow_grpo_step(x.float(), velocity.float(), 0.5, 0.4, x_prev=x.float())
    assert step.logprob.dtype == step.mean.dtype == step.std.dtype == dtype
    torch.testing.assert_close(step.logprob, exact.logprob.to(dtype))


def test_conversions_are_differentiable():
    value, x = normal(4, 2, 2, 3).requires_grad_()
    t = torch.tensor([0.3, 0.6], dtype=torch.float64, requires_grad=True)
    functions = (
        *(velocity_to_noise, velocity_to_data, velocity_to_score),
        *(noise_to_velocity, data_to_velocity, score_to_velocity, interpolate),
    )
    for function in functions:
        assert torch.autograd.gradcheck(function, (value, x, t))


# --- the exact field of finite data -------------------------------------------------------------


def enumerated(x, data, tau, probs):
    """E[noise - data | x] and the posterior, from normal densities one by one."""
    velocity, posterior = [], []
    for point in x:
        density = torch.stack(
            [
                prob
                * torch.exp(torch.distributions.Normal((1 - tau) * d, tau).log_prob(point).sum())
                for d, prob in zip(data, probs, strict=True)
            ]
        )
        weight = density / density.sum()
        targets = (point - (1 - tau) * data) / tau - data
        velocity.append(weight @ targets)
        posterior.append(weight)
    return torch.stack(velocity), torch.stack(posterior)


@quick
@given(seeds, st.floats(0.1, 1.0))
def test_finite_field_is_the_enumerated_expectation(seed, tau):
    x, data = normal(seed, 5, 3), normal(seed + 1, 4, 3)
    probs = torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.01
    velocity, posterior = enumerated(x, data, tau, probs)
    field = finite_data_velocity(x, data, tau, probs=probs)
    torch.testing.assert_close(field.velocity, velocity, **close)
    torch.testing.assert_close(field.posterior, posterior, **close)
    other = finite_data_velocity(x, data, 1 - tau, probs=7 * probs, data_at=1)
    torch.testing.assert_close(other.velocity, -velocity, **close)
    torch.testing.assert_close(other.posterior, posterior, **close)


@quick
@given(seeds, st.floats(0.1, 0.99))
def test_finite_field_has_the_score_of_the_noised_points(seed, t):
    x, data = normal(seed, 4, 2).requires_grad_(), normal(seed + 1, 3, 2)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(3, dtype=torch.float64)),
        torch.distributions.Independent(torch.distributions.Normal((1 - t) * data, t), 1),
    )
    [score] = torch.autograd.grad(mixture.log_prob(x).sum(), x)
    velocity = finite_data_velocity(x.detach(), data, t).velocity
    torch.testing.assert_close(velocity_to_score(velocity, x.detach(), t), score, **close)


def test_finite_field_per_item_times_and_zero_probabilities():
    x, data = normal(0, 3, 2), normal(1, 4, 2)
    t = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    together = finite_data_velocity(x, data, t)
    for i in range(3):
        alone = finite_data_velocity(x[i : i + 1], data, t[i].item())
        torch.testing.assert_close(together.velocity[i : i + 1], alone.velocity, **close)
    probs = torch.tensor([1.0, 0.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    some = finite_data_velocity(x, data, t, probs=probs)
    few = finite_data_velocity(x, data[::2], t, probs=probs[::2])
    torch.testing.assert_close(some.velocity, few.velocity, **close)
    assert (some.posterior[:, 1::2] == 0).all()
    some.velocity.sum().backward()
    assert probs.grad.isfinite().all()
    wrong = torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    assert finite_data_velocity(x, data, t, probs=wrong).velocity.isnan().all()


def test_finite_field_is_differentiable_in_everything():
    x, data = normal(0, 2, 2).requires_grad_(), normal(1, 3, 2).requires_grad_()
    t = torch.tensor([0.4, 0.8], dtype=torch.float64, requires_grad=True)
    probs = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64, requires_grad=True)

    def field(x, data, t, probs):
        return tuple(finite_data_velocity(x, data, t, probs=probs))

    assert torch.autograd.gradcheck(field, (x, data, t, probs))


def test_a_common_offset_of_the_data_costs_no_digits():
    x, data, offset = normal(0, 4, 3), normal(1, 5, 3), 1e4
    here = finite_data_velocity(x, data, 0.2)
    there = finite_data_velocity(x + 0.8 * offset, data + offset, 0.2)
    torch.testing.assert_close(there.posterior, here.posterior, rtol=0, atol=1e-9)
    single = finite_data_velocity((x + 0.8 * offset).float(), (data + offset).float(), 0.2)
    torch.testing.assert_close(single.posterior.double(), here.posterior, rtol=0, atol=0.02)


def test_finite_field_far_away_and_half_precision_stay_finite():
    x = torch.tensor([[1e4], [-1e4]])
    field = finite_data_velocity(x, torch.tensor([[-1.0], [1.0]]), 0.01)
    assert field.velocity.isfinite().all()
    assert field.posterior.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    half = finite_data_velocity(torch.ones(1, 1).half(), torch.ones(2, 1).half(), 0.5)
    assert half.velocity.dtype == half.posterior.dtype == torch.float16
    assert half.posterior.tolist() == [[0.5, 0.5]]


# --- samplers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("data_at", [0, 1])
def test_ode_reaches_the_reference_integrator(data_at):
    data = normal(5, 3, 2)

    def field(x, t):
        return finite_data_velocity(x, data, t, data_at=data_at).velocity

    def flat(t, x):
        point = torch.from_numpy(x).reshape(1, 2)
        return field(point, torch.full((1,), t, dtype=torch.float64)).numpy().ravel()

    start = normal(6, 1, 2)
    span = (1.0, 0.2) if data_at == 0 else (0.0, 0.8)
    reference = solve_ivp(flat, span, start.numpy().ravel(), rtol=1e-10, atol=1e-12).y[:, -1]
    times = torch.linspace(*span, 401, dtype=torch.float64)
    got = sample_ode(field, start, times, data_at=data_at)
    np.testing.assert_allclose(got.numpy().ravel(), reference, atol=1e-5)
    back = sample_ode(field, got, times.flip(0), data_at=data_at)
    torch.testing.assert_close(back, start, rtol=0, atol=1e-4)


def test_heun_is_of_second_order_and_euler_of_first():
    field = gaussian_field(1.5, 0.5)
    start = normal(0, 8, 1)
    # The exact flow of a Gaussian moves quantiles to quantiles.
    exact = 1.5 + 0.5 * start
    errors = {
        method: [
            (sample_ode(field, start, flow_times(n, dtype=torch.float64), method=method) - exact)
            .abs()
            .max()
            for n in (40, 80)
        ]
        for method in ("euler", "heun")
    }
    assert 1.7 < errors["euler"][0] / errors["euler"][1] < 2.3
    assert 3.4 < errors["heun"][0] / errors["heun"][1] < 4.6


def test_heun_never_evaluates_the_data_end():
    for data_at in (0, 1):
        seen = []

        def field(x, t, seen=seen, data_at=data_at):
            seen.append(t[0].item())
            return gaussian_field(0.0, 1.0, data_at)(x, t)

        sample_ode(field, torch.ones(2, 1), flow_times(3, data_at=data_at), data_at=data_at)
        assert len(seen) == 5
        assert float(data_at) not in seen


@pytest.mark.parametrize("data_at", [0, 1])
@pytest.mark.parametrize("noise_level", [0.0, 0.7, math.sqrt(2.0), lambda t: 0.8])
def test_sde_samples_have_the_law_of_the_data_at_any_noise_level(noise_level, data_at):
    """20,000 samples: standard errors 0.0035 and 0.0025, bounds of 6 beside the step error."""
    g = torch.Generator().manual_seed(1)
    start = torch.randn(20_000, 1, dtype=torch.float64, generator=g)
    times = flow_times(200, data_at=data_at, dtype=torch.float64)
    field = gaussian_field(1.5, 0.5, data_at)
    got = sample_sde(field, start, times, noise_level=noise_level, data_at=data_at, generator=g)
    assert abs(got.mean() - 1.5) < 0.03
    assert abs(got.std() - 0.5) < 0.025


def test_sde_recovers_the_probabilities_of_finite_data():
    """10,000 samples: standard error 0.0046, the bound is 5 of them beside the step error."""
    g = torch.Generator().manual_seed(0)
    data, probs = torch.tensor([[-1.0], [2.0]]), torch.tensor([0.3, 0.7])
    start = torch.randn(10_000, 1, generator=g)

    def field(x, t):
        return finite_data_velocity(x, data, t, probs=probs).velocity

    got = sample_sde(field, start, flow_times(60), generator=g)
    assert abs((got > 0.5).float().mean() - 0.7) < 0.03


def test_sde_without_noise_is_the_euler_sampler():
    field, start = gaussian_field(1.0, 0.3), normal(0, 5, 2)
    times = flow_times(7, shift=3.0, dtype=torch.float64)
    euler = sample_ode(field, start, times, method="euler")
    torch.testing.assert_close(sample_sde(field, start, times, noise_level=0.0), euler, **close)


def test_sde_is_a_chain_of_flow_grpo_steps():
    field, start = gaussian_field(1.0, 0.3), normal(0, 5, 2)
    times = flow_times(4, dtype=torch.float64)
    got = sample_sde(field, start, times, generator=torch.Generator().manual_seed(3))
    g, x = torch.Generator().manual_seed(3), start
    for t, t_prev in pairwise(times.tolist()):
        velocity = field(x, torch.full((5,), t, dtype=torch.float64))
        x = flow_grpo_step(x, velocity, t, t_prev, generator=g).x_prev
    torch.testing.assert_close(got, x, **close)


def test_flow_times_run_from_noise_to_data_and_shift():
    assert flow_times(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert flow_times(4, data_at=1).tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    shifted = flow_times(10, shift=3.0, dtype=torch.float64)
    plain = flow_times(10, dtype=torch.float64)
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain), **close)
    assert flow_times(3).dtype == torch.get_default_dtype()


# --- Flow-GRPO ----------------------------------------------------------------------------------


@quick
@given(seeds, st.floats(0.05, 1.0), st.floats(0.0, 0.95), st.floats(0.05, 2.0))
def test_flow_grpo_step_is_the_published_formula(seed, t, share, a):
    t_prev = share * t
    x, velocity, x_prev = normal(seed, 3, 4, 2, 3)
    step = flow_grpo_step(x, velocity, t, t_prev, noise_level=a, x_prev=x_prev)
    dt = t_prev - t
    sigma = a * math.sqrt(t / (1 - (t_prev if t == 1 else t)))
    mean = x * (1 + sigma**2 * dt / (2 * t))
    mean = mean + velocity * (1 + sigma**2 * (1 - t) / (2 * t)) * dt
    law = torch.distributions.Normal(mean, sigma * math.sqrt(-dt))
    torch.testing.assert_close(step.mean, mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(step.std.item(), sigma * math.sqrt(-dt), rtol=1e-9, atol=0)
    expected = law.log_prob(x_prev).mean((1, 2))
    torch.testing.assert_close(step.logprob, expected, rtol=1e-7, atol=1e-7)
    assert torch.equal(step.x_prev, x_prev)


@quick
@given(seeds, st.floats(0.05, 1.0), st.floats(0.0, 0.95))
def test_flow_grpo_without_noise_is_the_euler_step(seed, t, share):
    x, velocity = normal(seed, 2, 3, 2)
    step = flow_grpo_step(x, velocity, t, share * t, noise_level=0.0)
    torch.testing.assert_close(step.mean, x + (share * t - t) * velocity, **close)
    torch.testing.assert_close(step.x_prev, step.mean, **close)
    assert step.logprob.tolist() == [math.inf] * 3
    moved = flow_grpo_step(x, velocity, t, share * t, noise_level=0.0, x_prev=step.mean + 1)
    assert moved.logprob.tolist() == [-math.inf] * 3


def test_steps_carry_the_gaussian_law_from_time_to_time():
    """Moments propagate exactly through an affine step."""
    mean, std = 1.5, 0.5
    field = gaussian_field(mean, std)

    def final_moments(steps: int, a: float) -> tuple[float, float]:
        times = flow_times(steps, dtype=torch.float64).tolist()
        m, variance = 0.0, 1.0
        for t, t_prev in pairwise(times):
            x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
            velocity = field(x, torch.full((2,), t, dtype=torch.float64))
            step = flow_grpo_step(x, velocity, t, t_prev, noise_level=a)
            shift, end = step.mean[:, 0].tolist()
            slope = end - shift
            m, variance = slope * m + shift, slope**2 * variance + step.std.item() ** 2
        return m, variance

    for a in (0.0, 0.3, 0.7, math.sqrt(2.0)):
        m, variance = final_moments(400, a)
        assert abs(m - mean) < 0.01
        assert abs(variance - std**2) < 0.01


@quick
@given(st.floats(0.1, 1.5), st.floats(-2, 2), st.floats(0.1, 2))
def test_the_first_step_has_too_much_variance_however_short(a, mean, std):
    """By a^4/4: the scale at the noise end grows as fast as the step shrinks."""
    x, h = torch.tensor([[0.0], [1.0]], dtype=torch.float64), 1e-5
    velocity = gaussian_field(mean, std)(x, torch.ones(2, dtype=torch.float64))
    step = flow_grpo_step(x, velocity, 1.0, 1 - h, noise_level=a)
    slope = (step.mean[1] - step.mean[0]).item()
    variance = slope**2 + step.std.item() ** 2
    right = (1 - h) ** 2 + h**2 * std**2
    assert abs(variance - right - a**4 / 4) < 1e-4


@quick
@given(seeds, st.floats(0.05, 1.0), st.floats(0.0, 0.95), st.floats(0.1, 2.0))
def test_exact_kl_is_that_of_the_two_transitions(seed, t, share, a):
    x, velocity, reference = normal(seed, 3, 2, 3)
    laws = []
    for v in (velocity, reference):
        step = flow_grpo_step(x, v, t, share * t, noise_level=a)
        laws.append(torch.distributions.Normal(step.mean, step.std.expand_as(step.mean)))
    expected = torch.distributions.kl_divergence(*laws).sum(1)
    got = flow_grpo_kl(velocity, reference, t, share * t, noise_level=a)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


@quick
@given(seeds, st.floats(0.05, 1.0), st.floats(0.0, 0.95), st.floats(0.1, 2.0))
def test_released_kl_has_no_step_length_and_a_mean(seed, t, share, a):
    x, velocity, reference = normal(seed, 3, 2, 3)
    t_prev = share * t
    sigma = a * math.sqrt(t / (1 - (t_prev if t == 1 else t)))
    means = [flow_grpo_step(x, v, t, t_prev, noise_level=a).mean for v in (velocity, reference)]
    expected = ((means[0] - means[1]) ** 2 / (2 * sigma**2)).mean(1)
    got = flow_grpo_kl(velocity, reference, t, t_prev, noise_level=a, form="reference")
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)
    exact = flow_grpo_kl(velocity, reference, t, t_prev, noise_level=a)
    torch.testing.assert_close(got, exact * (t - t_prev) / 3, rtol=1e-9, atol=1e-12)


def test_steps_take_times_per_item():
    x, velocity, x_prev = normal(0, 3, 3, 2, 2)
    t = torch.tensor([1.0, 0.6, 0.3], dtype=torch.float64)
    t_prev = torch.tensor([0.8, 0.5, 0.0], dtype=torch.float64)
    together = flow_grpo_step(x, velocity, t, t_prev, x_prev=x_prev)
    kl = flow_grpo_kl(velocity, x, t, t_prev)
    assert together.std.shape == (3, 1, 1)
    bars, bars_prev = 1 - t.clamp(max=0.9), 1 - t_prev / 2
    ddpo = ddpo_step(x, velocity, bars, bars_prev, x_prev=x_prev)
    for i in range(3):
        at = slice(i, i + 1)
        alone = flow_grpo_step(
            x[at], velocity[at], t[i].item(), t_prev[i].item(), x_prev=x_prev[at]
        )
        torch.testing.assert_close(together.mean[at], alone.mean, **close)
        torch.testing.assert_close(together.logprob[at], alone.logprob, **close)
        torch.testing.assert_close(together.std[i].squeeze(), alone.std, **close)
        single = flow_grpo_kl(velocity[at], x[at], t[i].item(), t_prev[i].item())
        torch.testing.assert_close(kl[at], single, **close)
        bar, bar_prev = bars[i].item(), bars_prev[i].item()
        one = ddpo_step(x[at], velocity[at], bar, bar_prev, x_prev=x_prev[at])
        if bar_prev < 1:
            torch.testing.assert_close(ddpo.logprob[at], one.logprob, **close)


# --- DDPO ---------------------------------------------------------------------------------------


@quick
@given(seeds, st.floats(0.01, 0.9), st.floats(0.05, 0.95), st.floats(0.01, 1.0))
def test_ddpo_step_is_the_published_formula(seed, bar, share, eta):
    bar_prev = bar + share * (1 - bar)
    x, eps, x_prev = normal(seed, 3, 2, 3)
    step = ddpo_step(x, eps, bar, bar_prev, eta=eta, x_prev=x_prev)
    clean = (x - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
    std = eta * math.sqrt((1 - bar_prev) / (1 - bar) * (1 - bar / bar_prev))
    mean = math.sqrt(bar_prev) * clean + math.sqrt(1 - bar_prev - std**2) * eps
    torch.testing.assert_close(step.mean, mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(step.std.item(), std, rtol=1e-9, atol=0)
    expected = torch.distributions.Normal(mean, std).log_prob(x_prev).mean(1)
    torch.testing.assert_close(step.logprob, expected, rtol=1e-7, atol=1e-7)


@quick
@given(st.floats(0.01, 0.9), st.floats(0.05, 0.95))
def test_ddpo_at_full_noise_is_the_posterior_of_the_diffusion(bar, share):
    """With the true noise the step is ``q(x_prev | x, x_0)`` of DDPM."""
    bar_prev = bar + share * (1 - bar)
    clean, eps = normal(0, 2, 2, 3)
    x = math.sqrt(bar) * clean + math.sqrt(1 - bar) * eps
    step = ddpo_step(x, eps, bar, bar_prev)
    alpha = bar / bar_prev
    mean = math.sqrt(bar_prev) * (1 - alpha) / (1 - bar) * clean
    mean = mean + math.sqrt(alpha) * (1 - bar_prev) / (1 - bar) * x
    variance = (1 - bar_prev) / (1 - bar) * (1 - alpha)
    torch.testing.assert_close(step.mean, mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(step.std.item() ** 2, variance, rtol=1e-9, atol=0)


def test_ddpo_without_noise_or_at_the_end_is_deterministic():
    x, eps = normal(0, 2, 2, 3)
    for step in (ddpo_step(x, eps, 0.3, 0.7, eta=0.0), ddpo_step(x, eps, 0.3, 1.0)):
        assert step.std == 0
        torch.testing.assert_close(step.x_prev, step.mean, **close)
        assert step.logprob.tolist() == [math.inf] * 2
    clean = (x - math.sqrt(0.7) * eps) / math.sqrt(0.3)
    torch.testing.assert_close(ddpo_step(x, eps, 0.3, 1.0).mean, clean, **close)


# --- both policies ------------------------------------------------------------------------------


def both_policies(x, network, **options):
    return (
        flow_grpo_step(x, network, 0.6, 0.5, **options),
        ddpo_step(x, network, 0.3, 0.5, **options),
    )


def test_scoring_a_drawn_sample_again_gives_its_log_probability():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x, network = normal(0, 2, 4, 3).to(dtype)
        drawn = both_policies(x, network, generator=torch.Generator().manual_seed(0))
        for i, step in enumerate(drawn):
            again = both_policies(x, network, x_prev=step.x_prev)[i]
            assert torch.equal(again.logprob, step.logprob)


def test_gradients_flow_through_the_mean_and_never_through_the_sample():
    x, network = normal(0, 2, 4, 3)
    network.requires_grad_()
    for step in both_policies(x, network, generator=torch.Generator().manual_seed(0)):
        assert not step.x_prev.requires_grad
        [got] = torch.autograd.grad(step.logprob.sum(), network, retain_graph=True)
        gap = (step.x_prev - step.mean).detach() / step.std**2 / 3
        [slope] = torch.autograd.grad((gap * step.mean).sum(), network)
        assert got.abs().max() > 0.01
        torch.testing.assert_close(got, slope, **close)


def test_log_probabilities_and_kl_pass_gradcheck():
    x, network, x_prev = normal(0, 3, 2, 3)
    network.requires_grad_()
    for i in range(2):
        assert torch.autograd.gradcheck(
            lambda v, i=i: both_policies(x, v, x_prev=x_prev)[i].logprob, (network,)
        )
    for form in ("exact", "reference"):
        assert torch.autograd.gradcheck(
            lambda v, form=form: flow_grpo_kl(v, x, 0.6, 0.5, form=form), (network,)
        )


def test_reference_velocity_is_detached():
    velocity, reference = normal(0, 2, 2, 3).requires_grad_().unbind()
    reference = reference.detach().requires_grad_()
    flow_grpo_kl(velocity, reference, 0.6, 0.5).sum().backward()
    assert reference.grad is None


def test_samples_of_a_step_have_its_mean_and_deviation():
    """100,000 draws: standard errors below 0.003 std, bound of 6 (p < 1e-8)."""
    x, network = torch.full((100_000, 1), 0.4), torch.full((100_000, 1), -1.0)
    for step in both_policies(x, network, generator=torch.Generator().manual_seed(0)):
        score = (step.x_prev - step.mean) / step.std
        assert abs(score.mean()) < 0.02
        assert abs(score.std() - 1) < 0.015


def test_log_probability_is_a_mean_so_it_does_not_grow_with_the_dimension():
    x, network, x_prev = normal(0, 3, 2, 4)
    wide = (x.repeat(1, 5), network.repeat(1, 5))
    for i in range(2):
        small = both_policies(x, network, x_prev=x_prev)[i].logprob
        large = both_policies(*wide, x_prev=x_prev.repeat(1, 5))[i].logprob
        torch.testing.assert_close(small, large, **close)


def test_non_contiguous_and_items_without_features():
    x, velocity, x_prev = normal(0, 3, 3, 4).transpose(1, 2)
    plain = flow_grpo_step(x.contiguous(), velocity.contiguous(), 0.6, 0.5, x_prev=x_prev)
    strided = flow_grpo_step(x, velocity, 0.6, 0.5, x_prev=x_prev)
    assert torch.equal(plain.logprob, strided.logprob)
    flat = flow_grpo_step(x[:, 0], velocity[:, 0], 0.6, 0.5, x_prev=x_prev[:, 0])
    column = flow_grpo_step(x[:, :1], velocity[:, :1], 0.6, 0.5, x_prev=x_prev[:, :1])
    torch.testing.assert_close(flat.logprob, column.logprob, **close)


def test_large_inputs_stay_finite_and_nan_shows():
    x = torch.full((1, 2), 1e4)
    step = flow_grpo_step(x, x, 0.5, 0.4, x_prev=x)
    assert step.logprob.isfinite().all()
    step = flow_grpo_step(x * torch.nan, x, 0.5, 0.4, x_prev=x)
    assert step.logprob.isnan().all()


def test_steps_compile_and_vectorise():
    x, velocity, x_prev = normal(0, 3, 2, 3)
    t = torch.tensor([0.6, 0.4], dtype=torch.float64)

    def score(velocity):
        return flow_grpo_step(x, velocity, t, t / 2, x_prev=x_prev).logprob

    compiled = torch.compile(score, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(velocity), score(velocity), **close)
    many = torch.stack((velocity, 2 * velocity))
    expected = torch.stack((score(velocity), score(2 * velocity)))
    torch.testing.assert_close(torch.func.vmap(score)(many), expected, **close)


X = torch.zeros(3, 2)


def still(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x)


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: interpolate(X, X[:2], 0.5), ValueError, "noise"),
        (lambda: interpolate(X, X, 1.5), ValueError, "t must be"),
        (lambda: interpolate(X, X, torch.rand(2)), ValueError, "t must have shape"),
        (lambda: interpolate(X, X, torch.ones(3, dtype=torch.long)), TypeError, "t must"),
        (lambda: interpolate(X, X, 0.5, data_at=2), ValueError, "data_at"),
        (lambda: interpolate(X.long(), X, 0.5), TypeError, "data"),
        (lambda: interpolate(X[:0], X[:0], 0.5), ValueError, "data"),
        (lambda: interpolate(X[0, 0], X[0, 0], 0.5), ValueError, "data"),
        (lambda: velocity_target(X, X[:, :1]), ValueError, "noise"),
        (lambda: velocity_to_score(X, X, 0.0), ValueError, "data end"),
        (lambda: velocity_to_score(X, X, 1.0, data_at=1), ValueError, "data end"),
        (lambda: data_to_velocity(X, X, 0.0), ValueError, "data end"),
        (lambda: score_to_velocity(X, X, 1.0), ValueError, "noise end"),
        (lambda: noise_to_velocity(X, X, 0.0, data_at=1), ValueError, "noise end"),
        (lambda: finite_data_velocity(X, X, 0.0), ValueError, "data end"),
        (lambda: finite_data_velocity(X, X[:, :1], 0.5), ValueError, "data"),
        (lambda: finite_data_velocity(X, X[:0], 0.5), ValueError, "data"),
        (lambda: finite_data_velocity(X, X, 0.5, probs=torch.ones(2)), ValueError, "probs"),
        (lambda: flow_times(0), ValueError, "steps"),
        (lambda: flow_times(3, shift=0.0), ValueError, "shift"),
        (lambda: sample_ode(still, X, [1.0]), ValueError, "times"),
        (lambda: sample_ode(still, X, [1.0, 0.5, 0.5]), ValueError, "times"),
        (lambda: sample_ode(still, X, [1.5, 0.5]), ValueError, "times"),
        (lambda: sample_ode(still, X, [1.0, 0.0], method="rk4"), ValueError, "method"),
        (lambda: sample_ode(lambda x, t: t, X, [1.0, 0.0]), ValueError, "velocity_fn"),
        (lambda: sample_sde(still, X, [0.0, 1.0]), ValueError, "times must run towards"),
        (lambda: sample_sde(still, X, [1.0, 0.0], data_at=1), ValueError, "times must run"),
        (lambda: sample_sde(still, X, [1.0, 0.0], noise_level=-1.0), ValueError, "noise_level"),
        (lambda: flow_grpo_step(X, X, 0.5, 0.5), ValueError, "t_prev"),
        (lambda: flow_grpo_step(X, X, 0.0, 0.0), ValueError, "t must"),
        (lambda: flow_grpo_step(X, X, 0.5, 0.1, noise_level=-1.0), ValueError, "noise_level"),
        (lambda: flow_grpo_step(X, X, 0.5, 0.1, x_prev=X[:1]), ValueError, "x_prev"),
        (lambda: flow_grpo_kl(X, X, 0.5, 0.1, noise_level=0.0), ValueError, "noise_level"),
        (lambda: flow_grpo_kl(X, X, 0.5, 0.1, form="x"), ValueError, "form"),
        (lambda: ddpo_step(X, X, 0.5, 0.4), ValueError, "alphabar_prev"),
        (lambda: ddpo_step(X, X, 1.0, 1.0), ValueError, "alphabar"),
        (lambda: ddpo_step(X, X, 0.5, 0.6, eta=1.5), ValueError, "eta"),
        (lambda: ddpo_step(X, X[:1], 0.5, 0.6), ValueError, "eps_pred"),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()
