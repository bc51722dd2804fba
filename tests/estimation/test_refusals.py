"""Arguments that no estimate can be made of are refused by name, and NaN stays NaN."""

import pytest
import torch

from steelyard import estimation

NAN = float("nan")
FAMILY = estimation.ExponentialFamily(torch.tensor([[0.0], [1.0]]))
THETA = torch.zeros(1)


@pytest.mark.parametrize("pairs", [None, "text", torch.ones(2, 2), torch.ones(1, 1).double()])
def test_a_fourth_contraction_refuses_other_pairs(pairs):
    with pytest.raises((TypeError, ValueError), match="pairs"):
        FAMILY.fourth_contraction(THETA, pairs)


@pytest.mark.parametrize("eta", [None, [0.0], torch.tensor([NAN]), torch.zeros(2)])
def test_a_search_refuses_to_start_from_other_means(eta):
    with pytest.raises((TypeError, ValueError), match="eta"):
        FAMILY.start(eta)


def test_a_gaussian_divergence_names_the_other_member():
    family = estimation.GaussianGraphicalFamily(1)
    with pytest.raises(TypeError, match="other must be"):
        family.kl(torch.tensor([0.0, -0.5]), None)


@pytest.mark.parametrize(("params", "error"), [(3, TypeError), ([], ValueError)])
def test_a_sampler_needs_parameters(params, error):
    with pytest.raises(error, match="params must"):
        estimation.SGLD(params, lr=0.1, num_data=9)


def test_a_sampler_takes_a_generator_of_parameters():
    model = torch.nn.Linear(2, 1)
    sampler = estimation.SGLD(model.parameters(), lr=0.1, num_data=9)
    assert len(sampler.param_groups[0]["params"]) == 2


@pytest.mark.parametrize(("name", "value"), [("kls", 0.5), ("prior", "text")])
def test_a_ball_bound_refuses_what_is_no_tensor(name, value):
    arguments = {"kls": torch.zeros(2), "prior": torch.full((2,), 0.5), name: value}
    with pytest.raises(TypeError, match=name):
        estimation.ball_bound(**arguments, epsilon=0.1, n=3)


def test_nan_in_the_chosen_rows_comes_out():
    basis = torch.eye(3, 2, dtype=torch.float64)
    assert estimation.dpp_conditional(basis, torch.full_like(basis[:1], NAN)).isnan().any()


@pytest.mark.parametrize("name", ["covariance", "residual"])
def test_an_exact_bias_refuses_numbers_that_are_not_finite(name):
    arguments = {"covariance": torch.eye(2), "residual": torch.ones(2)}
    arguments[name] = arguments[name] * NAN
    with pytest.raises(ValueError, match=f"{name} must be finite"):
        estimation.exact_inductive_bias(0.5, **arguments)


def test_an_exact_bias_gives_no_nan_for_a_huge_covariance():
    covariance = torch.eye(2, dtype=torch.float64) * 1e40
    with pytest.raises(ValueError, match="test_error, covariance and residual"):
        estimation.exact_inductive_bias(0.5, covariance, torch.ones(2, dtype=torch.float64))


def test_a_huge_design_has_a_finite_regret():
    X = torch.tensor([[1e100, 1.0], [1e100, 2.0], [1.0, 3.0]], dtype=torch.float64)
    truth, variance = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    regret = estimation.linear_regression_regret(
        X, truth, noise_variance=1.0, prior_variance=variance
    )
    # half the log-determinant of I + X X^T, whose largest factor is 2e200
    assert regret == pytest.approx((200 * 2.302585 + 1.6) / 2 / 3, rel=0.02)


def test_too_small_a_stability_level_is_refused():
    with pytest.raises(ValueError, match="delta"):
        estimation.required_samples(4, delta=1e-300, eta=0.1)


def test_cumulants_name_a_covariance_that_is_not_positive():
    one = torch.ones(1, 1)
    rest = (one[None], one[None, None], one, one[None])
    with pytest.raises(ValueError, match="model_covariance must be positive definite"):
        estimation.risk_from_cumulants(-one, *rest)


def test_a_bottleneck_refuses_a_width_that_is_no_number():
    with pytest.raises(ValueError, match="bandwidth_y"):
        estimation.CauchySchwarzBottleneck(
            torch.nn.Identity(), torch.nn.Identity(), 0.1, bandwidth_y=NAN
        )
