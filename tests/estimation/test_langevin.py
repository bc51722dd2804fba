"""SGLD against the stationary law of its own recursion."""

import copy
import math

import pytest
import torch

from steelyard.estimation import SGLD

# Chains run side by side; a variance of 40,000 independent values has a relative standard error of
# sqrt(2 / 40000) = 0.7 %, so 3.5 % is five of them: false alarms below 1e-6.
CHAINS, TOLERANCE = 40_000, 0.035


def run(lr, *, num_data=50.0, precision=2.0, temperature=1.0, gradient_noise=0.0, steps=60):
    """Sample N(0, 1/(num_data precision)) by steps on the mean loss; return the last two states."""
    g = torch.Generator().manual_seed(0)
    theta = torch.zeros(CHAINS, dtype=torch.float64, requires_grad=True)
    sampler = SGLD([theta], lr, num_data=num_data, temperature=temperature, generator=g)
    for _ in range(steps):
        before = theta.detach().clone()
        theta.grad = precision * theta.detach()
        if gradient_noise:
            noise = torch.randn(CHAINS, dtype=torch.float64, generator=g)
            theta.grad += gradient_noise * noise / num_data
        sampler.step()
    return before, theta.detach()


@pytest.mark.parametrize("lr", [0.05, 0.3, 0.8])
def test_stationary_variance_and_correlation_are_those_of_the_recursion(lr):
    before, after = run(lr)
    # in the terms of the sampler: eta = 2 lr / N, a = N precision
    eta, a = 2 * lr / 50, 100.0
    assert after.var().item() == pytest.approx(1 / (a * (1 - eta * a / 4)), rel=TOLERANCE)
    correlation = torch.corrcoef(torch.stack([before, after]))[0, 1].item()
    assert correlation == pytest.approx(1 - eta * a / 2, abs=0.03)


def test_minibatch_noise_adds_the_variance_of_the_formula():
    s, eta, a = 10.0, 2 * 0.3 / 50, 100.0
    _, after = run(0.3, gradient_noise=s)
    expected = (eta + eta**2 * s**2 / 4) / (1 - (1 - eta * a / 2) ** 2)
    assert after.var().item() == pytest.approx(expected, rel=TOLERANCE)


def test_variance_is_proportional_to_temperature_and_to_one_over_the_data():
    base = run(0.3)[1].var()
    assert (run(0.3, temperature=4.0)[1].var() / base).item() == pytest.approx(4.0, rel=1e-9)
    assert (run(0.3, num_data=5.0)[1].var() / base).item() == pytest.approx(10.0, rel=1e-9)


def test_temperature_zero_is_gradient_descent():
    ours, theirs = (torch.ones(3, requires_grad=True) for _ in range(2))
    for optimizer, theta in (
        (SGLD([ours], 0.1, num_data=10, temperature=0.0), ours),
        (torch.optim.SGD([theirs], 0.1), theirs),
    ):
        for _ in range(3):
            optimizer.zero_grad()
            theta.square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_generator_makes_runs_equal_and_the_global_state_stays():
    def sample():
        theta = torch.zeros(4, requires_grad=True)
        sampler = SGLD([theta], 0.1, num_data=1, generator=torch.Generator().manual_seed(3))
        theta.grad = torch.zeros(4)
        sampler.step()
        return theta.detach()

    state = torch.get_rng_state()
    torch.testing.assert_close(sample(), sample(), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_parameters_without_a_gradient_stay_and_groups_have_their_own_settings():
    still, warm, cold = (torch.zeros(2, requires_grad=True) for _ in range(3))
    sampler = SGLD(
        [{"params": [still, warm]}, {"params": [cold], "temperature": 0.0}], 0.1, num_data=1
    )
    warm.grad, cold.grad = torch.zeros(2), torch.zeros(2)
    sampler.step()
    assert still.abs().sum() == 0
    assert cold.abs().sum() == 0
    assert (warm != 0).all()
    schedule = torch.optim.lr_scheduler.StepLR(sampler, 1, 0.5)
    sampler.step()
    schedule.step()
    assert sampler.param_groups[0]["lr"] == 0.05


def test_closure_copy_and_half_precision():
    theta = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    sampler = SGLD([theta], 0.1, num_data=1)

    def closure():
        sampler.zero_grad()
        loss = theta.square().sum()
        loss.backward()
        return loss

    assert sampler.step(closure) == 2
    assert theta.dtype == torch.bfloat16
    assert torch.isfinite(theta).all()
    copied = copy.deepcopy(sampler)
    assert copied.param_groups[0]["num_data"] == 1
    copied.load_state_dict(sampler.state_dict())
    copied.step()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0, "num_data": 1}, "lr must be > 0"),
        ({"lr": 0.1, "num_data": 0}, "num_data must be > 0"),
        ({"lr": 0.1, "num_data": 1, "temperature": -1.0}, "temperature must be >= 0"),
        ({"lr": math.nan, "num_data": 1}, "lr must be > 0"),
    ],
)
def test_errors_name_the_argument(settings, message):
    with pytest.raises(ValueError, match=message):
        SGLD([torch.zeros(1, requires_grad=True)], **settings)
