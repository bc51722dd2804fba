"""The update written by hand takes the steps of automatic differentiation and Adam."""

import io
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steelyard.policy import (
    BPO,
    PPO,
    ActorCritic,
    AutogradUpdater,
    DenseNetwork,
    DenseUpdater,
    Objective,
    Samples,
    cnn_actor_critic,
    make_updater,
    mlp_actor_critic,
)

OBSERVATIONS, ACTIONS, COUNT = 5, 3, 90  # 90 is not a multiple of the minibatch


def make_policy(objective: Objective, *, continuous: bool = True, **settings: Any) -> ActorCritic:
    policy = mlp_actor_critic(
        OBSERVATIONS,
        ACTIONS,
        continuous=continuous,
        critic_heads=objective.critic_heads,
        generator=torch.Generator().manual_seed(1),
        **{"hidden": (16, 16), **settings},
    )
    if policy.log_std is not None:
        nn.init.constant_(policy.log_std, -0.3)
    return policy


@torch.no_grad()
def make_samples(policy: ActorCritic, *, off_policy: float = 0.3) -> Samples:
    """Samples of a policy that differs, so that many ratios are outside of the band."""
    generator = torch.Generator().manual_seed(2)
    observations = torch.randn(COUNT, OBSERVATIONS, generator=generator)
    actions = policy.sample(policy.actor(observations), policy.noise((COUNT,), generator))
    logprobs, _, heads = policy.evaluate(observations, actions)
    logprobs = logprobs + off_policy * torch.randn(COUNT, generator=generator)
    advantages = torch.randn(COUNT, generator=generator)
    return Samples(observations, actions, logprobs, advantages, advantages + heads[:, 0])


def parameters_of(policy: ActorCritic) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])


def run_both(
    objective: Objective, policy: ActorCritic, *, epochs: int = 1, minibatch: int = 32
) -> tuple[AutogradUpdater, DenseUpdater]:
    """The same epochs by both updaters, each on its own copy of the policy."""
    samples = make_samples(policy)
    by_hand = DenseUpdater(policy, objective, generator=torch.Generator().manual_seed(3))
    # A copy taken now would share the flat vector's views: build the reference from the numbers.
    copy = deepcopy(policy)
    for parameter in copy.parameters():
        parameter.data, parameter.grad = parameter.data.clone(), None
    reference = AutogradUpdater(copy, objective, generator=torch.Generator().manual_seed(3))
    for epoch in range(epochs):
        rate = 1e-3 / (1 + epoch)
        reference.epoch(samples, minibatch, rate)
        by_hand.epoch(samples, minibatch, rate)
    return reference, by_hand


def assert_same(reference: AutogradUpdater, by_hand: DenseUpdater) -> None:
    expected = parameters_of(reference.policy)
    assert (expected - parameters_of(by_hand.policy)).abs().max() < 1e-5
    assert torch.equal(by_hand.flat, parameters_of(by_hand.policy))


OBJECTIVES: dict[str, Objective] = {
    "ppo": PPO(),
    "ppo entropy": PPO(entropy_coef=0.05),
    "ppo raw advantages": PPO(normalize_advantages=False, epsilon=0.1),
    "bpo code": BPO(),
    "bpo temperature": BPO(threshold_kind="temperature", temperature=0.2),
    "bpo median": BPO(threshold_kind="median"),
    "bpo value": BPO(threshold="value", temperature=0.5),
    "bpo stored advantage": BPO(online_weight=False, entropy_coef=0.05),
}


@pytest.mark.parametrize("continuous", [True, False], ids=["gaussian", "categorical"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_fast_epoch_equals_the_reference(name: str, continuous: bool) -> None:
    objective = OBJECTIVES[name]
    policy = make_policy(objective, continuous=continuous)
    before = parameters_of(policy)
    reference, by_hand = run_both(objective, policy)
    assert_same(reference, by_hand)
    assert (before - by_hand.flat).abs().max() > 1e-4


@pytest.mark.parametrize("continuous", [True, False], ids=["gaussian", "categorical"])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("hidden", [(), (7,), (16, 12, 9)], ids=str)
def test_fast_epoch_equals_the_reference_at_any_depth(
    hidden: tuple[int, ...], activation: str, continuous: bool
) -> None:
    objective = BPO(entropy_coef=0.01)
    policy = make_policy(objective, continuous=continuous, hidden=hidden, activation=activation)
    assert_same(*run_both(objective, policy))


@pytest.mark.parametrize("minibatch", [1, 90, 1000])
def test_fast_epoch_equals_the_reference_at_any_minibatch(minibatch: int) -> None:
    assert_same(*run_both(PPO(), make_policy(PPO()), minibatch=minibatch))


def test_a_larger_minibatch_may_follow_a_smaller_one() -> None:
    objective = PPO()
    reference, by_hand = run_both(objective, make_policy(objective), minibatch=8)
    samples = make_samples(by_hand.policy)
    for updater in (reference, by_hand):
        updater.epoch(samples, 64, 1e-3)
    assert_same(reference, by_hand)


def test_clipping_bounds_the_gradient_and_equals_the_reference() -> None:
    objective = PPO(max_grad_norm=1e-4)  # so small that Adam's epsilon makes it felt
    reference, by_hand = run_both(objective, make_policy(objective))
    assert_same(reference, by_hand)
    assert by_hand.gradient.norm().item() == pytest.approx(1e-4, rel=0.02)
    _, unclipped = run_both(PPO(max_grad_norm=1e6), make_policy(objective))
    assert (unclipped.flat - by_hand.flat).abs().max() > 1e-4


def test_adam_by_hand_keeps_the_moments_of_torch_adam() -> None:
    reference, by_hand = run_both(PPO(), make_policy(PPO()), epochs=3)
    assert_same(reference, by_hand)
    states = [reference.optimizer.state[p] for p in reference.policy.parameters()]
    for mine, name in ((by_hand.first, "exp_avg"), (by_hand.second, "exp_avg_sq")):
        theirs = torch.cat([state[name].flatten() for state in states])
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-6)
    assert {int(state["step"]) for state in states} == {by_hand.steps} == {9}


def test_a_learning_rate_of_zero_changes_nothing() -> None:
    policy = make_policy(PPO())
    before = parameters_of(policy)
    make_updater(policy, PPO()).epoch(make_samples(policy), 32, 0.0)
    assert torch.equal(before, parameters_of(policy))


def test_no_samples_change_nothing() -> None:
    for continuous in (True, False):
        policy = make_policy(PPO(), continuous=continuous)
        before = parameters_of(policy)
        samples = Samples(*(field[:0] for field in make_samples(policy)))
        for kind in (AutogradUpdater, DenseUpdater):
            kind(policy, PPO()).epoch(samples, 32, 1e-3)
        assert torch.equal(before, parameters_of(policy))


@pytest.mark.parametrize("minibatch", [0, -4])
@pytest.mark.parametrize("kind", [AutogradUpdater, DenseUpdater])
def test_a_minibatch_below_one_is_named(kind: Any, minibatch: int) -> None:
    policy = make_policy(PPO())
    with pytest.raises(ValueError, match="minibatch must be >= 1"):
        kind(policy, PPO()).epoch(make_samples(policy), minibatch, 1e-3)


@pytest.mark.parametrize("kind", [AutogradUpdater, DenseUpdater])
def test_a_stored_updater_goes_on_as_if_never_stored(kind: Any) -> None:
    def fresh() -> tuple[ActorCritic, Any]:
        policy = make_policy(PPO())
        return policy, kind(policy, PPO(), generator=torch.Generator().manual_seed(5))

    policy, updater = fresh()
    samples = make_samples(policy)
    updater.epoch(samples, 32, 1e-3)
    file = io.BytesIO()
    torch.save((policy.state_dict(), updater.state_dict(), updater.generator.get_state()), file)
    snapshot = deepcopy(policy.state_dict()), updater.state_dict(), updater.generator.get_state()
    updater.epoch(samples, 32, 1e-3)  # must not change the snapshot
    file.seek(0)
    for weights, state, generator in (torch.load(file, weights_only=True), snapshot):
        other_policy, other = fresh()
        other_policy.load_state_dict(weights)
        other.load_state_dict(state)
        other.generator.set_state(generator)
        other.epoch(samples, 32, 1e-3)
        assert torch.equal(parameters_of(policy), parameters_of(other_policy))


def test_the_same_generator_shuffles_the_same_way_and_another_differs() -> None:
    results = []
    for seed in (0, 0, 1):
        policy = make_policy(PPO())
        updater = make_updater(policy, PPO(), generator=torch.Generator().manual_seed(seed))
        updater.epoch(make_samples(policy), 32, 1e-3)
        results.append(parameters_of(policy))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


class Doubled(nn.Linear):
    """Computes something else than its parent."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Backwards(nn.Sequential):
    """Runs its layers in another order."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(list(self)):
            x = layer(x)
        return x


class Squashed(ActorCritic):
    """Has another law of actions."""

    def logprob(self, parameters: Tensor, actions: Tensor) -> Tensor:
        return 0.5 * super().logprob(parameters, actions)


def actor_critic(actor: nn.Module, critic: nn.Module | None = None, **kind: Any) -> ActorCritic:
    critic = nn.Sequential(nn.Linear(4, 1)) if critic is None else critic
    settings = {"action_size": 2, "continuous": True, **kind}
    return ActorCritic(nn.Identity(), actor, critic, **settings)


def linear(inputs: int = 4, outputs: int = 2) -> nn.Linear:
    return nn.Linear(inputs, outputs)


def frozen(policy: ActorCritic) -> ActorCritic:
    next(policy.actor.parameters()).requires_grad_(False)
    return policy


def shared() -> ActorCritic:
    body = linear(4, 4)
    return actor_critic(
        nn.Sequential(body, nn.Tanh(), linear()), nn.Sequential(body, nn.Tanh(), linear(4, 1))
    )


def extra_parameter() -> ActorCritic:
    policy = actor_critic(nn.Sequential(linear()))
    policy.register_parameter("spare", nn.Parameter(torch.zeros(1)))
    return policy


def subclass() -> ActorCritic:
    actor, critic = nn.Sequential(linear()), nn.Sequential(linear(4, 1))
    return Squashed(nn.Identity(), actor, critic, action_size=2, continuous=True)


def trunk() -> ActorCritic:
    actor, critic = nn.Sequential(linear()), nn.Sequential(linear(4, 1))
    return ActorCritic(nn.Tanh(), actor, critic, action_size=2, continuous=True)


OTHERS: dict[str, Callable[[], ActorCritic]] = {
    "convolutions": lambda: cnn_actor_critic((1, 36, 36), 2, features=8),
    "layer norm": lambda: actor_critic(nn.Sequential(linear(4, 4), nn.LayerNorm(4), linear())),
    "another activation": lambda: actor_critic(nn.Sequential(linear(4, 4), nn.ELU(), linear())),
    "last layer not linear": lambda: actor_critic(nn.Sequential(linear(), nn.Tanh())),
    "not a sequence": lambda: actor_critic(linear()),
    "a sequence of its own": lambda: actor_critic(
        Backwards(linear(4, 2), nn.Tanh(), linear(4, 4)), nn.Sequential(linear(4, 1))
    ),
    "a layer of its own": lambda: actor_critic(nn.Sequential(Doubled(4, 2))),
    "no bias": lambda: actor_critic(nn.Sequential(nn.Linear(4, 2, bias=False))),
    "weight norm": lambda: actor_critic(
        nn.Sequential(torch.nn.utils.parametrizations.weight_norm(linear()))
    ),
    "double precision": lambda: actor_critic(nn.Sequential(linear())).double(),
    "a law of its own": subclass,
    "a parameter of its own": extra_parameter,
    "layers shared by actor and critic": shared,
    "a layer used twice": lambda: actor_critic(
        nn.Sequential(body := linear(4, 4), nn.Tanh(), body, nn.Tanh(), linear())
    ),
    "a frozen parameter": lambda: frozen(actor_critic(nn.Sequential(linear()))),
    "a trunk": trunk,
}


@pytest.mark.parametrize("name", OTHERS)
def test_everything_that_is_not_two_dense_networks_falls_back(name: str) -> None:
    policy = OTHERS[name]()
    updater = make_updater(policy, PPO(), generator=torch.Generator().manual_seed(0))
    assert isinstance(updater, AutogradUpdater)
    with pytest.raises(ValueError, match="policy must be a dense actor-critic"):
        DenseUpdater(policy, PPO())
    dtype = next(policy.parameters()).dtype
    shape = (1, 36, 36) if name == "convolutions" else (4,)
    actions = torch.randn(6, 2, dtype=dtype) if policy.continuous else torch.tensor([0, 1] * 3)
    numbers = torch.randn(3, 6, dtype=dtype)
    before = parameters_of(policy)
    updater.epoch(Samples(torch.randn(6, *shape, dtype=dtype), actions, *numbers), 4, 1e-3)
    after = parameters_of(policy)
    assert after.isfinite().all()
    assert not torch.equal(before, after)


def test_a_dense_network_runs_forward_like_its_module() -> None:
    network = nn.Sequential(linear(4, 8), nn.ReLU(), linear(8, 8), nn.Tanh(), linear(8, 2))
    x = torch.randn(5, 8)[:, ::2]  # not contiguous
    assert DenseNetwork.supports(network)
    torch.testing.assert_close(DenseNetwork(network, 5).forward(x), network(x).detach())


def test_a_policy_in_the_fast_updater_still_loads_and_answers() -> None:
    policy, other = make_policy(PPO()), make_policy(PPO(), hidden=(16, 16))
    updater = DenseUpdater(policy, PPO())
    nn.init.normal_(other.actor[0].weight)
    policy.load_state_dict(other.state_dict())
    assert torch.equal(updater.flat, parameters_of(other))
    observations = torch.randn(4, OBSERVATIONS)
    assert torch.equal(policy.greedy(observations), other.greedy(observations))


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: mlp_actor_critic(3, 2, continuous=True, hidden=8), TypeError, "hidden"),
        (lambda: mlp_actor_critic(3, 2, continuous=True, hidden="8"), TypeError, "hidden"),
        (lambda: mlp_actor_critic(3, 2, continuous=True, hidden=(0,)), ValueError, "hidden"),
        (lambda: cnn_actor_critic((4, 84), 2), ValueError, "observation_shape"),
        (lambda: cnn_actor_critic((4, 84, 19), 2), ValueError, "observation_shape"),
        (lambda: cnn_actor_critic((4, 84, 84), 2, features=-1), ValueError, "features"),
        (lambda: mlp_actor_critic(3, 2, continuous=True).greedy([0.0]), TypeError, "observations"),
        (lambda: dense().forward(None), TypeError, "x"),
        (lambda: dense().forward(torch.zeros(1, 3, requires_grad=True)), ValueError, "x"),
    ],
)
def test_networks_name_a_wrong_argument(call, error, named):
    with pytest.raises(error, match=rf"^{named} must"):
        call()


def dense():
    return DenseNetwork(torch.nn.Sequential(torch.nn.Linear(3, 2)), 1)


def test_frames_as_small_as_the_convolutions_allow_are_accepted():
    policy = cnn_actor_critic((1, 20, 20), 3, features=4)
    assert policy.greedy(torch.zeros(2, 1, 20, 20, dtype=torch.uint8)).shape == (2,)
