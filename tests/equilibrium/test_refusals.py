"""Arguments that no system can be solved with are refused by name, and NaN stays NaN."""

import pytest
import torch

from steelyard import equilibrium

REST = torch.ones(2, dtype=torch.float64)


def pull(u):
    return REST - u


@pytest.mark.parametrize("solve", [equilibrium.relax, equilibrium.fixed_point])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_solver_refuses_a_start_that_is_not_finite(solve, value):
    with pytest.raises(ValueError, match="start must be finite"):
        solve(pull, torch.full_like(REST, value))


def test_relaxation_refuses_integers():
    with pytest.raises(TypeError, match="start must have a floating"):
        equilibrium.relax(pull, torch.zeros(2, dtype=torch.int32))


@pytest.mark.parametrize(
    ("name", "value"),
    [("loss_gradient", REST), ("activation", 3), ("points", 0), ("beta", float("nan"))],
)
def test_an_error_vector_refuses_what_it_cannot_use(name, value):
    arguments = {"loss_gradient": lambda r: r, name: value}
    with pytest.raises((TypeError, ValueError), match=name):
        equilibrium.error_vector(pull, u=REST, **arguments)


def test_an_error_vector_takes_an_expanded_state():
    expanded = torch.ones(1, dtype=torch.float64).expand(2)
    found = equilibrium.error_vector(pull, lambda r: r, expanded)
    torch.testing.assert_close(found, REST)


def test_nan_in_a_jacobian_comes_out():
    assert equilibrium.symmetry_measure(torch.full((2, 2), float("nan"))).isnan()


def test_huge_probes_give_no_nan():
    probes = torch.full((1, 2), 1e30)
    loss = equilibrium.homeostatic_loss(lambda u: -u + u.flip(0), torch.zeros(2), probes)
    assert not loss.isnan()
