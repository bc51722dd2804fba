"""The bounded-ratio step of a whole MDP: improvement identity and lower bound, 200 random MDPs."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from steelyard.policy import TabularImprovement, tabular_improvement


class MDP(NamedTuple):
    transitions: Tensor
    rewards: Tensor
    policy: Tensor
    initial: Tensor
    gamma: float
    epsilon: float

    def improve(self) -> TabularImprovement:
        return tabular_improvement(*self)

    def solve(self, policy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """State values and unnormalised visits, by NumPy."""
        chain = np.einsum("sa,sap->sp", policy, self.transitions.numpy())
        system = np.eye(len(chain)) - self.gamma * chain
        values = np.linalg.solve(system, (policy * self.rewards.numpy()).sum(-1))
        return values, np.linalg.solve(system.T, self.initial.numpy())

    def q_values(self) -> np.ndarray:
        values, _ = self.solve(self.policy.numpy())
        return self.rewards.numpy() + self.gamma * self.transitions.numpy() @ values


def random_mdp(seed: int) -> MDP:
    rng = np.random.default_rng(seed)
    states, actions = rng.integers(3, 11), rng.integers(2, 7)
    transitions = rng.dirichlet(np.full(states, 0.3), size=(states, actions))
    rewards = rng.normal(size=(states, actions))
    policy = rng.dirichlet(np.ones(actions), size=states)
    if seed % 4 == 0:  # equally good actions: an atom, often at the median
        transitions[:, 1], rewards[:, 1] = transitions[:, 0], rewards[:, 0]
        policy = np.full((states, actions), 1 / actions)
    initial = rng.dirichlet(np.ones(states))
    return MDP(
        *(torch.from_numpy(x) for x in (transitions, rewards, policy, initial)),
        gamma=float(rng.uniform(0, 0.95)),
        epsilon=float(rng.uniform(0.05, 0.95)),
    )


@pytest.fixture(scope="module")
def mdps() -> list[MDP]:
    return [random_mdp(seed) for seed in range(200)]


def test_each_state_of_an_mdp_gets_its_linear_programming_optimum(mdps):
    for mdp in mdps[:40]:
        q, probs = mdp.q_values(), mdp.policy.numpy()
        ratio = mdp.improve().ratio.numpy()
        edges = [(1 - mdp.epsilon, 1 + mdp.epsilon)] * q.shape[1]
        for state in range(3):
            weighted = probs[state] * q[state]
            program = linprog(-weighted, A_eq=probs[state][None], b_eq=[1.0], bounds=edges)
            assert (weighted * ratio[state]).sum() == pytest.approx(-program.fun, abs=1e-9)


def test_improved_policies_are_distributions_in_the_band(mdps):
    for mdp in mdps:
        ratio = mdp.improve().ratio
        total = (mdp.policy * ratio).sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total), atol=1e-9, rtol=0)
        assert ratio.min() >= 1 - mdp.epsilon - 1e-12
        assert ratio.max() <= 1 + mdp.epsilon + 1e-12


def test_improvement_identity_on_random_mdps(mdps):
    for mdp in mdps:
        step, q = mdp.improve(), mdp.q_values()
        probs = mdp.policy.numpy()
        old, _ = mdp.solve(probs)
        new, visits = mdp.solve(probs * step.ratio.numpy())
        bound = (visits[:, None] * probs * np.abs(q - step.median.numpy()[:, None])).sum()
        assert step.base_return.item() == pytest.approx(mdp.initial.numpy() @ old, abs=1e-9)
        assert step.optimal_return.item() == pytest.approx(mdp.initial.numpy() @ new, abs=1e-9)
        assert step.bound.item() == pytest.approx(bound, abs=1e-9)
        gain = step.optimal_return - step.base_return
        assert gain.item() == pytest.approx(mdp.epsilon * step.bound.item(), abs=1e-9)
        assert step.bound >= 0


def test_exact_iteration_never_lowers_the_return(mdps):
    for mdp in mdps:
        policy, last = mdp.policy, -math.inf
        for _ in range(5):
            step = mdp._replace(policy=policy).improve()
            assert step.optimal_return >= step.base_return - 1e-10
            assert step.base_return >= last - 1e-10
            policy, last = policy * step.ratio, step.base_return.item()


def mixture(mdp: MDP, best: np.ndarray) -> np.ndarray:
    share = np.random.default_rng(1).uniform()
    return (1 - share) * mdp.policy.numpy() + share * best


def anything(mdp: MDP, best: np.ndarray) -> np.ndarray:
    return np.random.default_rng(2).dirichlet(np.ones(best.shape[1]), size=len(best))


@pytest.mark.parametrize("other", [mixture, anything])
def test_lower_bound_holds_for_any_fitted_policy(
    mdps, other: Callable[[MDP, np.ndarray], np.ndarray]
):
    for mdp in mdps:
        step, base, q = mdp.improve(), mdp.policy.numpy(), mdp.q_values()
        best_ratio = step.ratio.numpy()
        policy = other(mdp, base * best_ratio)
        advantage = q - (base * q).sum(-1, keepdims=True)
        spread = (base * np.abs(q - step.median.numpy()[:, None])).sum(-1)
        misfit = (base * np.abs(advantage) * np.abs(policy / base - best_ratio)).sum(-1)
        values, visits = mdp.solve(policy)
        _, base_visits = mdp.solve(base)
        _, best_visits = mdp.solve(base * best_ratio)
        slack = mdp.epsilon * (best_visits - visits) @ spread + (visits - base_visits) @ misfit
        bound = step.base_return.item() + mdp.epsilon * step.bound.item()
        bound -= base_visits @ misfit + slack
        assert mdp.initial.numpy() @ values >= bound - 1e-9
        limit = mdp.epsilon * np.abs(best_visits - visits).sum() * spread.max()
        assert slack <= limit + np.abs(visits - base_visits).sum() * misfit.max() + 1e-9


def test_lower_bound_is_tight_at_the_optimum(mdps):
    for mdp in mdps[:50]:
        step, base, q = mdp.improve(), mdp.policy.numpy(), mdp.q_values()
        _, visits = mdp.solve(base * step.ratio.numpy())
        spread = (base * np.abs(q - step.median.numpy()[:, None])).sum(-1)
        bound = step.base_return.item() + mdp.epsilon * visits @ spread
        assert step.optimal_return.item() == pytest.approx(bound, abs=1e-9)


ONE_STATE = {
    "transitions": torch.ones(1, 2, 1),
    "rewards": torch.tensor([[1.0, 0.0]]),
    "base_policy": torch.full((1, 2), 0.5),
    "initial": torch.ones(1),
    "gamma": 0.5,
    "epsilon": 0.2,
}


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"transitions": torch.ones(2, 2, 1)}, ValueError, "transitions"),
        ({"transitions": torch.ones(1, 2, 1, dtype=torch.long)}, TypeError, "transitions"),
        ({"rewards": torch.ones(2)}, ValueError, "rewards"),
        ({"base_policy": torch.ones(1, 3)}, ValueError, "base_policy"),
        ({"initial": torch.ones(2)}, ValueError, "initial"),
        ({"initial": [1.0]}, TypeError, "initial"),
        ({"gamma": 1.0}, ValueError, "gamma"),
        ({"gamma": -0.1}, ValueError, "gamma"),
        ({"epsilon": 0.0}, ValueError, "epsilon"),
        ({"epsilon": 1.0}, ValueError, "epsilon"),
    ],
)
def test_wrong_mdp_arguments_are_named(change, error, named):
    with pytest.raises(error, match=named):
        tabular_improvement(**(ONE_STATE | change))
