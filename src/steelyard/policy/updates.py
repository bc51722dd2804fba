"""One pass of minibatch updates over a rollout: by automatic differentiation, or by hand.

:class:`AutogradUpdater` is the reference: any policy, any device. :class:`DenseUpdater` does the
same arithmetic for actor-critics made of linear, tanh and ReLU layers, with the gradients written
out: small networks spend most of their time in the bookkeeping of automatic differentiation and of
the optimiser, not in arithmetic. All parameters and gradients live in one flat vector each, every
matrix product goes to a buffer made in advance, and each field of the samples is shuffled once a
pass.

Both take the same steps: a test holds their parameters equal after an update.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from steelyard._checks import check_count, check_range, check_tensor
from steelyard.policy.actor_critic import HALF_LOG_TWO_PI, ActorCritic
from steelyard.policy.objectives import Objective, Samples

__all__ = ["AutogradUpdater", "DenseNetwork", "DenseUpdater", "Updater", "make_updater"]

ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-5
"""The value policy-gradient implementations use, larger than the optimiser's own 1e-8."""

_MINUS_ONE = torch.tensor(-1.0)
"""A tensor, because adding a scaled tensor to it is one operation."""


class Updater(Protocol):
    """Updates a policy from samples, one shuffled pass at a time."""

    def epoch(self, samples: Samples, minibatch: int, learning_rate: float) -> None:
        """Take one optimiser step for each minibatch of a random order of the samples."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """State of the optimiser; the parameters belong to the policy."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        ...


_LARGEST_RATE = 1e37
"""Adam's first steps multiply a rate by up to ten, in float32."""


def _check_epoch(samples: Samples, minibatch: int, learning_rate: float) -> None:
    if not isinstance(samples, Samples):
        raise TypeError(f"samples must be Samples, got {type(samples).__name__}")
    check_count("minibatch", minibatch)
    check_range("learning_rate", learning_rate, at_least=0.0, at_most=_LARGEST_RATE)


def _check_policy(policy: ActorCritic) -> None:
    if not isinstance(policy, ActorCritic):
        raise TypeError(f"policy must be an ActorCritic, got {type(policy).__name__}")


def make_updater(
    policy: ActorCritic, objective: Objective, *, generator: torch.Generator | None = None
) -> Updater:
    """Choose the fast updater where it applies, else the reference.

    Args:
        policy: its critic must have ``objective.critic_heads`` heads.
        objective: what is minimised.
        generator: shuffles the samples.

    Example:
        >>> from steelyard.policy import BPO, cnn_actor_critic, mlp_actor_critic
        >>> type(make_updater(mlp_actor_critic(4, 2, continuous=False, critic_heads=2), BPO()))
        <class 'steelyard.policy.updates.DenseUpdater'>
        >>> type(make_updater(cnn_actor_critic((4, 84, 84), 6, critic_heads=2), BPO()))
        <class 'steelyard.policy.updates.AutogradUpdater'>
    """
    _check_policy(policy)
    kind = DenseUpdater if DenseUpdater.supports(policy) else AutogradUpdater
    return kind(policy, objective, generator=generator)


class AutogradUpdater:
    """The reference: automatic differentiation and ``torch.optim.Adam``, for any policy."""

    def __init__(
        self,
        policy: ActorCritic,
        objective: Objective,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        _check_policy(policy)
        self.policy, self.objective, self.generator = policy, objective, generator
        self.optimizer = torch.optim.Adam(policy.parameters(), betas=ADAM_BETAS, eps=ADAM_EPS)

    def epoch(self, samples: Samples, minibatch: int, learning_rate: float) -> None:
        """Take one optimiser step for each minibatch of a random order of the samples."""
        _check_epoch(samples, minibatch, learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        count = len(samples.returns)
        order = torch.randperm(count, generator=self.generator)
        for part in torch.split(order, minibatch) if count else ():
            batch = Samples(*(field[part] for field in samples))
            logprob, entropy, heads = self.policy.evaluate(batch.observations, batch.actions)
            loss = self.objective.loss(logprob - batch.logprobs, heads, batch)
            if self.objective.entropy_coef:
                loss = loss - self.objective.entropy_coef * entropy.mean()
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.policy.parameters(), self.objective.max_grad_norm)
            self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """State of the optimiser; the parameters belong to the policy."""
        return deepcopy(self.optimizer.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.optimizer.load_state_dict(state)


class DenseNetwork:
    """A sequence of linear, tanh and ReLU layers, run forward and backward into fixed buffers.

    Args:
        network: see :meth:`supports`; its parameters must have gradients allocated before
            :meth:`backward` is called, which overwrites them.
        rows: number of rows of every batch.
    """

    def __init__(self, network: nn.Sequential, rows: int) -> None:
        if not isinstance(network, nn.Sequential):
            raise TypeError(f"network must be a Sequential, got {type(network).__name__}")
        check_count("rows", rows)
        linear = [layer for layer in network if isinstance(layer, nn.Linear)]
        self.tanh = [isinstance(layer, nn.Tanh) for layer in list(network)[1::2]]
        self.weights = [layer.weight.detach() for layer in linear]
        self.transposed = [weight.t() for weight in self.weights]
        self.biases = [layer.bias.detach() for layer in linear]
        self.weight_slopes = [layer.weight.grad for layer in linear]
        self.bias_slopes = [layer.bias.grad for layer in linear]
        self.rows = rows
        self.outputs = [torch.empty(rows, layer.out_features) for layer in linear]
        self.slopes = [torch.empty(rows, layer.out_features) for layer in linear[:-1]]
        self.inputs: list[Tensor] = []

    @staticmethod
    def supports(network: nn.Module) -> bool:
        """Tell whether a network alternates float32 CPU linear layers with tanh or ReLU."""
        # Exact types: a subclass may compute something else.
        if type(network) is not nn.Sequential or len(network) % 2 == 0:
            return False
        linear, between = list(network)[::2], list(network)[1::2]
        return all(type(layer) in (nn.Tanh, nn.ReLU) for layer in between) and all(
            type(layer) is nn.Linear
            and layer.bias is not None
            and layer.weight.dtype == torch.float32
            and layer.weight.device.type == "cpu"
            for layer in linear
        )

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``[N, K]`` for rows ``[N, D]``: a buffer, valid until the next call.

        Raises:
            TypeError: ``x`` is no tensor.
            ValueError: it requires a gradient, which a buffer cannot carry.
        """
        check_tensor("x", x)
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("x must not require a gradient, got one that does")
        self.inputs = [x]
        for weight, bias, buffer, tanh in zip(
            self.transposed, self.biases, self.outputs, self.tanh, strict=False
        ):
            if tanh:  # tanh(x) = 2 sigmoid(2 x) - 1, which has a faster kernel
                x = torch.addmm(bias, x, weight, beta=2, alpha=2, out=buffer).sigmoid_()
                torch.add(_MINUS_ONE, x, alpha=2, out=x)
            else:
                x = torch.addmm(bias, x, weight, out=buffer).clamp_min_(0.0)
            self.inputs.append(x)
        return torch.addmm(self.biases[-1], x, self.transposed[-1], out=self.outputs[-1])

    def backward(self, slope: Tensor) -> None:
        """Write the parameters' gradients, given the loss's derivative in the outputs."""
        for index in range(len(self.weights) - 1, -1, -1):
            inputs = self.inputs[index]
            torch.mm(slope.t(), inputs, out=self.weight_slopes[index])
            torch.sum(slope, 0, out=self.bias_slopes[index])
            if index == 0:
                return
            slope = torch.mm(slope, self.weights[index], out=self.slopes[index - 1])
            if self.tanh[index - 1]:
                slope.addcmul_(slope * inputs, inputs, value=-1)  # tanh' = 1 - tanh^2
            else:
                slope.mul_(inputs.sign())  # inputs >= 0 after a ReLU


class DenseUpdater:
    """The same updates as :class:`AutogradUpdater` for dense actor-critics, by hand.

    The policy's parameters become views of one flat vector.

    Raises:
        ValueError: the policy is not one that :meth:`supports` admits.
    """

    def __init__(
        self,
        policy: ActorCritic,
        objective: Objective,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        _check_policy(policy)
        self.policy, self.objective, self.generator = policy, objective, generator
        if not self.supports(policy):
            raise ValueError("policy must be a dense actor-critic, see DenseUpdater.supports")
        self.flat, self.gradient = _flatten(policy)
        self.first = torch.zeros_like(self.flat)
        self.second = torch.zeros_like(self.flat)
        self.steps = 0
        self._networks: tuple[DenseNetwork, DenseNetwork] | None = None

    @staticmethod
    def supports(policy: ActorCritic) -> bool:
        """Tell whether a policy is two separate dense networks, all of whose parameters train."""
        networks = [
            network
            for network in (policy.actor, policy.critic)
            if isinstance(network, nn.Sequential) and DenseNetwork.supports(network)
        ]
        parameters = list(policy.parameters())
        layers = sum(len(network) // 2 + 1 for network in networks)
        return (
            type(policy) is ActorCritic
            and isinstance(policy.trunk, nn.Identity)
            and len(networks) == 2
            # Fewer parameters: some are shared, and their gradients add up. More: unknown use.
            and len(parameters) == 2 * layers + policy.continuous
            and all(p.requires_grad and p.dtype == torch.float32 for p in parameters)
        )

    @torch.inference_mode()
    def epoch(self, samples: Samples, minibatch: int, learning_rate: float) -> None:
        """Take one optimiser step for each minibatch of a random order of the samples."""
        _check_epoch(samples, minibatch, learning_rate)
        if not self.policy.continuous:
            one_hot = nn.functional.one_hot(samples.actions, self.policy.action_size)
            samples = samples._replace(actions=one_hot.float())
        count = len(samples.returns)
        order = torch.randperm(count, generator=self.generator)
        fields = (torch.split(field[order], minibatch) for field in samples)
        for parts in zip(*fields, strict=True) if count else ():
            self._backward(Samples(*parts))
            self._clip()
            self._adam(learning_rate)

    def _backward(self, batch: Samples) -> None:
        """Write the gradient of the loss of a minibatch into the flat gradient."""
        rows = len(batch.returns)
        if self._networks is None or self._networks[0].rows != rows:
            actor, critic = self.policy.actor, self.policy.critic
            assert isinstance(actor, nn.Sequential)
            assert isinstance(critic, nn.Sequential)
            self._networks = DenseNetwork(actor, rows), DenseNetwork(critic, rows)
        actor_net, critic_net = self._networks
        parameters = actor_net.forward(batch.observations)
        heads = critic_net.forward(batch.observations)
        law = _gaussian_slopes if self.policy.continuous else _categorical_slopes
        logprob, back = law(self.policy, parameters, batch.actions)
        slope, head_slopes = self.objective.slopes(logprob - batch.logprobs, heads, batch)
        actor_net.backward(back(slope, self.objective.entropy_coef))
        critic_net.backward(head_slopes)

    def _clip(self) -> None:
        norm = torch.linalg.vector_norm(self.gradient).item()
        scale = self.objective.max_grad_norm / (norm + 1e-6)
        if scale < 1:
            self.gradient.mul_(scale)

    def _adam(self, learning_rate: float) -> None:
        beta1, beta2 = ADAM_BETAS
        self.steps += 1
        self.first.lerp_(self.gradient, 1 - beta1)
        self.second.mul_(beta2).addcmul_(self.gradient, self.gradient, value=1 - beta2)
        correction = (1 - beta2**self.steps) ** 0.5
        size = learning_rate * correction / (1 - beta1**self.steps)
        scale = self.second.sqrt().add_(ADAM_EPS * correction)
        self.flat.addcdiv_(self.first, scale, value=-size)

    def state_dict(self) -> dict[str, Any]:
        """State of the optimiser; the parameters belong to the policy."""
        return {"first": self.first.clone(), "second": self.second.clone(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.first.copy_(state["first"])
        self.second.copy_(state["second"])
        self.steps = state["steps"]


def _flatten(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Move parameters and gradients into two vectors, of which they become views."""
    parameters = list(module.parameters())
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    gradient = torch.zeros_like(flat)
    start = 0
    for parameter in parameters:
        stop = start + parameter.numel()
        parameter.data = flat[start:stop].view_as(parameter)
        parameter.grad = gradient[start:stop].view_as(parameter)
        start = stop
    return flat, gradient


_Law = tuple[Tensor, Callable[[Tensor, float], Tensor]]
"""Log-probability, and the map from its slope and the entropy bonus to the parameters' slope."""


def _gaussian_slopes(policy: ActorCritic, means: Tensor, actions: Tensor) -> _Law:
    """Log-probability, and the map from its slope to the slope of the means.

    With z = (a - m)/s: d logp/dm = z/s and d logp/d log s = z^2 - 1; the entropy grows by one for
    each unit of log s.
    """
    log_std = policy.log_std
    assert log_std is not None
    inverse = (-log_std).exp()
    score = (actions - means).mul_(inverse)
    squared = score.square()
    constant = log_std.sum() + policy.action_size * HALF_LOG_TWO_PI
    logprob = squared.sum(-1).mul_(-0.5).sub_(constant)

    def back(slope: Tensor, entropy_coef: float) -> Tensor:
        assert log_std.grad is not None
        torch.mv(squared.sub_(1).t(), slope, out=log_std.grad)
        log_std.grad.sub_(entropy_coef)
        return score.mul_(inverse).mul_(slope[:, None])

    return logprob, back


def _categorical_slopes(policy: ActorCritic, logits: Tensor, one_hot: Tensor) -> _Law:
    """Log-probability, and the map from its slope to the slope of the logits.

    d logp/d logit = one_hot - p; the entropy's is -p (log p + H).
    """
    logprobs = logits.log_softmax(-1)
    logprob = (logprobs * one_hot).sum(-1)

    def back(slope: Tensor, entropy_coef: float) -> Tensor:
        probs = logprobs.exp()
        result = (one_hot - probs).mul_(slope[:, None])
        if entropy_coef:
            entropy = -(probs * logprobs).sum(-1, keepdim=True)
            result.addcmul_(probs, logprobs + entropy, value=entropy_coef / len(slope))
        return result

    return logprob, back
