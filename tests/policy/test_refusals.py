"""Arguments that the functions of this package refuse by name."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from steelyard.policy import (
    BPO,
    PPO,
    ActorCritic,
    Samples,
    adora_weights,
    canon_advantages,
    canon_split,
    gae,
    tabular_improvement,
)

GROUPS = torch.zeros(3, dtype=torch.long)
METRIC = torch.tensor([1.0, math.nan, 2.0])
PROBLEM = {
    "transitions": torch.ones(1, 2, 1),
    "rewards": torch.tensor([[1.0, 0.0]]),
    "base_policy": torch.tensor([[0.5, 0.5]]),
    "initial": torch.ones(1),
}


@pytest.mark.parametrize("continuous", [True, False])
@pytest.mark.parametrize(
    ("setting", "value", "error"),
    [
        ("log_std", "0.1", TypeError),
        ("log_std", None, TypeError),
        ("log_std", math.nan, ValueError),
        ("action_size", 2.0, TypeError),
        ("action_size", 0, ValueError),
        ("critic", 3, TypeError),
    ],
)
def test_a_setting_of_a_network_is_refused_whether_it_is_used_or_not(
    setting: str, value: Any, error: type[Exception], continuous: bool
) -> None:
    settings: dict[str, Any] = {
        "trunk": nn.Identity(),
        "actor": nn.Linear(3, 2),
        "critic": nn.Linear(3, 1),
        "action_size": 2,
        "continuous": continuous,
    }
    with pytest.raises(error, match=f"^{setting} must be"):
        ActorCritic(**settings | {setting: value})


def test_a_metric_with_nan_has_no_halves() -> None:
    with pytest.raises(ValueError, match="metric must hold no NaN, got 1"):
        canon_split(METRIC, GROUPS)
    with pytest.raises(ValueError, match="metric must hold no NaN, got 1"):
        canon_advantages(torch.ones(3), METRIC, GROUPS)


def test_a_complex_metric_is_refused() -> None:
    with pytest.raises(TypeError, match="metric must be of real numbers"):
        canon_split(METRIC.to(torch.complex64), GROUPS)


@pytest.mark.parametrize("name", ["terminated", "truncated"])
def test_ends_of_episodes_that_are_missing_are_refused_by_name(name: str) -> None:
    steps: dict[str, Any] = dict.fromkeys(
        ("rewards", "values", "next_values", "terminated", "truncated"), torch.zeros(2, 1)
    )
    with pytest.raises(TypeError, match=rf"^{name} must be a torch\.Tensor"):
        gae(**steps | {name: None})


@pytest.mark.parametrize("name", PROBLEM)
def test_a_finite_problem_may_mix_precisions(name: str) -> None:
    step = tabular_improvement(**PROBLEM, gamma=0.5, epsilon=0.25)
    mixed = PROBLEM | {name: PROBLEM[name].double()}
    finer = tabular_improvement(**mixed, gamma=0.5, epsilon=0.25)
    assert finer.optimal_return.dtype == torch.float64
    assert finer.optimal_return.item() == pytest.approx(step.optimal_return.item())


def test_a_band_too_narrow_for_float64_is_refused() -> None:
    with pytest.raises(ValueError, match="epsilon must be large enough"):
        tabular_improvement(**PROBLEM, gamma=0.5, epsilon=1e-300)


@pytest.mark.parametrize("objective", [PPO(), BPO(), BPO(threshold_kind="median")])
def test_slopes_of_tensors_with_a_gradient_are_plain_numbers(objective: PPO | BPO) -> None:
    numbers = torch.tensor([0.1, -0.2, 0.3])
    batch = Samples(numbers[:, None], numbers, numbers, numbers, 2 * numbers)
    ratio, heads = numbers.clone(), torch.stack((numbers, -numbers), -1)
    plain = objective.slopes(ratio, heads, batch)
    tracked = objective.slopes(ratio.requires_grad_(), heads.requires_grad_(), batch)
    for ours, theirs in zip(tracked, plain, strict=True):
        assert not ours.requires_grad
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("place", ["rewards", "lengths"])
def test_a_prompt_with_nan_has_no_weight_and_the_others_do(place: str) -> None:
    given = {"rewards": torch.tensor([1.0, 0.0, 1.0, 0.0]), "lengths": torch.arange(4.0)}
    given[place][1] = math.nan
    weights = adora_weights(**given, groups=torch.tensor([0, 0, 1, 1])).weights
    assert weights.isnan().tolist() == [True, True, False, False]


def test_transitions_without_a_solution_are_refused_by_name() -> None:
    doubled = PROBLEM | {"transitions": torch.full((1, 2, 1), 2.0)}
    with pytest.raises(ValueError, match="transitions must have rows that sum to 1"):
        tabular_improvement(**doubled, gamma=0.5, epsilon=0.25)
