"""Actor-critic networks: a policy over actions and value heads for one observation.

An :class:`ActorCritic` is an optional shared trunk, an actor that gives the parameters of the law
of actions (means of a diagonal Gaussian, or logits), and a critic with one head (the value) or two
(the value and the threshold that bounded policy optimisation regresses). Both heads of the critic
are linear maps of its last hidden features.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from steelyard._checks import (
    check_callable,
    check_choice,
    check_count,
    check_floating,
    check_range,
    check_same_shape,
    check_tensor,
)
from steelyard.policy._arguments import check_lengths

__all__ = ["ActorCritic", "cnn_actor_critic", "mlp_actor_critic"]

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
_SMALLEST_FRAME = 20
"""What a kernel of 8 with stride 4, then one of 4, need to give one number."""
_Layer = TypeVar("_Layer", nn.Linear, nn.Conv2d)
_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


class ActorCritic(nn.Module):
    """Policy and value heads over a batch of observations.

    Args:
        trunk: maps observations to features shared by actor and critic.
        actor: features ``[N, F]`` to action parameters ``[N, A]``: means or logits.
        critic: features to heads ``[N, K]``: value, and threshold if K = 2.
        action_size: A.
        continuous: diagonal Gaussian with a learned, state-independent deviation if true, else
            categorical.
        log_std: first log standard deviation of the Gaussian, finite.

    Raises:
        TypeError: a network is not callable, ``action_size`` no integer, or ``log_std`` no number.
        ValueError: ``action_size`` below 1, or ``log_std`` not finite.

    Example:
        >>> import torch
        >>> policy = mlp_actor_critic(3, 2, continuous=True)
        >>> logprob, entropy, heads = policy.evaluate(torch.zeros(5, 3), torch.zeros(5, 2))
        >>> logprob.shape, heads.shape
        (torch.Size([5]), torch.Size([5, 1]))
    """

    def __init__(
        self,
        trunk: nn.Module,
        actor: nn.Module,
        critic: nn.Module,
        *,
        action_size: int,
        continuous: bool,
        log_std: float = 0.0,
    ) -> None:
        super().__init__()
        check_callable(trunk=trunk, actor=actor, critic=critic)
        check_count("action_size", action_size)
        check_range("log_std", log_std)
        self.trunk, self.actor, self.critic = trunk, actor, critic
        self.continuous = continuous
        self.action_size = action_size
        self.log_std = nn.Parameter(torch.full((action_size,), log_std)) if continuous else None

    def evaluate(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability ``[N]`` and entropy ``[N]`` of the actions, and heads ``[N, K]``."""
        check_tensor("observations", observations)
        check_tensor("actions", actions)
        features = self.trunk(observations)
        parameters = self.actor(features)
        return (
            self.logprob(parameters, actions),
            self.entropy(parameters),
            self.critic(features),
        )

    def logprob(self, parameters: Tensor, actions: Tensor) -> Tensor:
        """Log-probability ``[N]`` of actions (``[N, A]`` or integer ``[N]``), nats."""
        check_floating(parameters=parameters)
        check_tensor("actions", actions)
        shape = parameters.shape[:-1] if self.log_std is None else parameters.shape
        if actions.shape != shape:
            raise ValueError(f"actions must have shape {list(shape)}, got {list(actions.shape)}")
        if self.log_std is None:
            logprobs = parameters.log_softmax(-1)
            return logprobs.gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)
        score = (actions - parameters) * (-self.log_std).exp()
        constant = self.log_std.sum() + self.action_size * HALF_LOG_TWO_PI
        return -0.5 * score.square().sum(-1) - constant

    def entropy(self, parameters: Tensor) -> Tensor:
        """Entropy ``[N]`` of the action law, nats."""
        check_floating(parameters=parameters)
        if self.log_std is None:
            logprobs = parameters.log_softmax(-1)
            return -(logprobs.exp() * logprobs).sum(-1)
        entropy = self.log_std.sum() + self.action_size * (0.5 + HALF_LOG_TWO_PI)
        return entropy.expand(parameters.shape[:-1])

    def noise(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """Draw what :meth:`sample` needs for actions of a leading shape, ahead of time."""
        check_lengths("shape", shape)
        size = (*shape, self.action_size)
        if self.continuous:
            return torch.randn(size, generator=generator)
        return -torch.empty(size).exponential_(generator=generator).log_()

    def sample(self, parameters: Tensor, noise: Tensor) -> Tensor:
        """Actions from action parameters and noise: ``[N, A]`` or integer ``[N]``.

        Categorical actions are the largest of logits plus Gumbel noise.
        """
        check_floating(parameters=parameters, noise=noise)
        check_same_shape(parameters=parameters, noise=noise)
        if self.log_std is None:
            return (parameters + noise).argmax(-1)
        return parameters + self.log_std.exp() * noise

    def greedy(self, observations: Tensor) -> Tensor:
        """Most likely actions."""
        check_tensor("observations", observations)
        parameters: Tensor = self.actor(self.trunk(observations))
        return parameters if self.continuous else parameters.argmax(-1)


def mlp_actor_critic(
    observation_size: int,
    action_size: int,
    *,
    continuous: bool,
    hidden: Sequence[int] = (64, 64),
    activation: Literal["tanh", "relu"] = "tanh",
    critic_heads: int = 1,
    generator: torch.Generator | None = None,
) -> ActorCritic:
    """Make two separate multi-layer perceptrons with the usual orthogonal initialisation.

    Args:
        observation_size: D.
        action_size: A, the dimension of the actions or their number.
        continuous: Gaussian if true, else categorical.
        hidden: widths of the hidden layers of each network.
        activation: ``"tanh"`` or ``"relu"``.
        critic_heads: 1 (value) or 2 (value and threshold).
        generator: source of the initial weights.

    Raises:
        TypeError: a size is not an integer, or ``hidden`` no sequence.
        ValueError: a size below 1 or an unknown activation.

    Example:
        >>> sum(p.numel() for p in mlp_actor_critic(17, 6, continuous=True).parameters())
        11085
    """
    check_count("observation_size", observation_size)
    check_count("action_size", action_size)
    check_choice("activation", activation, tuple(_ACTIVATIONS))
    check_count("critic_heads", critic_heads)
    check_choice("critic_heads", critic_heads, (1, 2))
    check_lengths("hidden", hidden, at_least=1)

    def network(outputs: int, gain: float) -> nn.Sequential:
        layers: list[nn.Module] = []
        for inputs, width in pairwise((observation_size, *hidden)):
            layers += [_orthogonal(nn.Linear(inputs, width), math.sqrt(2), generator)]
            layers += [_ACTIVATIONS[activation]()]
        last = nn.Linear((observation_size, *hidden)[-1], outputs)
        return nn.Sequential(*layers, _orthogonal(last, gain, generator))

    actor, critic = network(action_size, 0.01), network(critic_heads, 1.0)
    return ActorCritic(nn.Identity(), actor, critic, action_size=action_size, continuous=continuous)


def cnn_actor_critic(
    observation_shape: Sequence[int],
    num_actions: int,
    *,
    features: int = 256,
    critic_heads: int = 1,
    generator: torch.Generator | None = None,
) -> ActorCritic:
    """Make the two-layer convolutional network of Mnih et al. (2013) for stacked grey frames.

    Args:
        observation_shape: ``(C, H, W)``, pixels 0..255.
        num_actions: A.
        features: width of the shared features.
        critic_heads: 1 (value) or 2 (value and threshold).
        generator: source of the initial weights.

    Raises:
        TypeError: a size is not an integer, or ``observation_shape`` no sequence.
        ValueError: a size below 1, or frames smaller than the convolutions need, 20 by 20.

    Example:
        >>> import torch
        >>> policy = cnn_actor_critic((4, 84, 84), 6)
        >>> policy.greedy(torch.zeros(2, 4, 84, 84, dtype=torch.uint8)).shape
        torch.Size([2])
    """
    check_count("num_actions", num_actions)
    check_count("critic_heads", critic_heads)
    check_choice("critic_heads", critic_heads, (1, 2))
    check_count("features", features)
    check_lengths("observation_shape", observation_shape, at_least=1)
    if len(observation_shape) != 3 or min(observation_shape[1:]) < _SMALLEST_FRAME:
        raise ValueError(
            f"observation_shape must be (C, H, W) with H and W >= {_SMALLEST_FRAME}, "
            f"got {tuple(observation_shape)}"
        )
    channels, height, width = observation_shape
    convolutions = nn.Sequential(
        _Pixels(),
        _orthogonal(nn.Conv2d(channels, 16, 8, stride=4), math.sqrt(2), generator),
        nn.ReLU(),
        _orthogonal(nn.Conv2d(16, 32, 4, stride=2), math.sqrt(2), generator),
        nn.ReLU(),
        nn.Flatten(),
    )
    with torch.no_grad():
        flat = convolutions(torch.zeros(1, channels, height, width)).shape[1]
    trunk = nn.Sequential(
        *convolutions, _orthogonal(nn.Linear(flat, features), math.sqrt(2), generator), nn.ReLU()
    )
    actor = _orthogonal(nn.Linear(features, num_actions), 0.01, generator)
    critic = _orthogonal(nn.Linear(features, critic_heads), 1.0, generator)
    return ActorCritic(trunk, actor, critic, action_size=num_actions, continuous=False)


class _Pixels(nn.Module):
    def forward(self, observations: Tensor) -> Tensor:
        return observations.float() / 255


def _orthogonal(layer: _Layer, gain: float, generator: torch.Generator | None) -> _Layer:
    nn.init.orthogonal_(layer.weight, gain, generator=generator)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
