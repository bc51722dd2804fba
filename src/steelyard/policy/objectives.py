"""What an on-policy learner minimises: PPO and BPO with their critic terms, and their slopes.

An objective is a frozen set of coefficients with two views of the same loss: :meth:`loss` for
automatic differentiation, and :meth:`slopes`, its derivative in the log-ratio and in the critic's
heads written out, from which the fast update back-propagates by hand. A test holds them equal.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from steelyard._checks import check_choice, check_floating, check_range, check_shape
from steelyard.policy.losses import (
    LOG_RATIO_LIMIT,
    bpo_loss,
    bpo_target_ratio,
    bpo_threshold_loss,
    ppo_loss,
)

__all__ = ["BPO", "PPO", "Objective", "Samples"]


class Samples(NamedTuple):
    """What an update needs of each step, with ``N`` steps in the batch."""

    observations: Tensor
    """``[N, ..]``, as the policy takes them."""
    actions: Tensor
    """``[N, A]``, or integer ``[N]``."""
    logprobs: Tensor
    """Of the behaviour policy, ``[N]``."""
    advantages: Tensor
    """``[N]``."""
    returns: Tensor
    """``[N]``, advantages plus the behaviour policy's values."""


class Objective(Protocol):
    """A loss over samples, the log-ratio of the policy, and the critic's heads."""

    @property
    def critic_heads(self) -> int:
        """How many heads the critic must have."""
        ...

    @property
    def epsilon(self) -> float:
        """Half-width of the band around ratio 1."""
        ...

    @property
    def entropy_coef(self) -> float:
        """Weight of the entropy bonus, subtracted from the loss."""
        ...

    @property
    def max_grad_norm(self) -> float:
        """Largest norm of the whole gradient."""
        ...

    def loss(self, log_ratio: Tensor, heads: Tensor, batch: Samples) -> Tensor:
        """Mean loss of policy and critic, without the entropy bonus; 0-d."""
        ...

    def slopes(self, log_ratio: Tensor, heads: Tensor, batch: Samples) -> tuple[Tensor, Tensor]:
        """Derivative of :meth:`loss` in the log-ratio ``[N]`` and in the heads ``[N, K]``."""
        ...


@dataclass(frozen=True)
class PPO:
    """Clipped surrogate, squared error of the value, entropy bonus.

    Source: Schulman et al. (2017), Eq. 9, arXiv:1707.06347.
    """

    epsilon: float = 0.2
    value_coef: float = 0.5
    entropy_coef: float = 0.0
    max_grad_norm: float = 0.5
    normalize_advantages: bool = True
    """Shift and scale the advantages of each minibatch to mean 0 and deviation 1."""

    critic_heads = 1

    def __post_init__(self) -> None:
        check_range("epsilon", self.epsilon, above=0.0, at_most=1.0)
        _check_coefficients(self)

    def loss(self, log_ratio: Tensor, heads: Tensor, batch: Samples) -> Tensor:
        """Mean loss of policy and critic, without the entropy bonus; 0-d."""
        _check_batch(log_ratio, heads, batch)
        surrogate = ppo_loss(log_ratio, self._advantages(batch), epsilon=self.epsilon)
        return surrogate + self.value_coef * mse_loss(heads[:, 0], batch.returns)

    def slopes(self, log_ratio: Tensor, heads: Tensor, batch: Samples) -> tuple[Tensor, Tensor]:
        """Derivative of :meth:`loss` in the log-ratio ``[N]`` and in the heads ``[N, K]``."""
        _check_batch(log_ratio, heads, batch)
        advantages = self._advantages(batch)
        log_ratio, heads = log_ratio.detach(), heads.detach()
        ratio = log_ratio.exp()
        # The gradient stops once the ratio has left the band in the advantage's direction.
        passed = (ratio - 1) * advantages.sign() > self.epsilon
        stopped = passed.logical_or_(log_ratio.abs() > LOG_RATIO_LIMIT)
        slope = ratio.mul_(advantages).masked_fill_(stopped, 0.0).mul_(-1 / len(log_ratio))
        return slope, _value_slope(heads, batch, self.value_coef)

    def _advantages(self, batch: Samples) -> Tensor:
        if not self.normalize_advantages or len(batch.advantages) < 2:
            return batch.advantages
        std, mean = torch.std_mean(batch.advantages)
        return (batch.advantages - mean) / (std + 1e-8)


@dataclass(frozen=True)
class BPO:
    """Ratio fitted to the bounded-ratio optimum, squared error of the value, threshold regression.

    Source: Ao et al. (2026), Eq. 16, arXiv:2604.18578.
    """

    epsilon: float = 0.2
    temperature: float = 1e-3
    """Lambda of the target, in reward units."""
    threshold: Literal["median", "value"] = "median"
    """What splits the actions: a learned soft median, or the value (no second head)."""
    threshold_kind: Literal["code", "temperature", "median"] = "code"
    """Which regression trains the soft median, see :func:`bpo_threshold_loss`."""
    online_weight: bool = True
    """Weigh by ``|return - V|`` of the current critic (published), else by the stored advantage."""
    value_coef: float = 0.5
    threshold_coef: float = 0.5
    entropy_coef: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        check_range("epsilon", self.epsilon, above=0.0, at_most=1.0)
        check_range("temperature", self.temperature, above=0.0)
        check_choice("threshold", self.threshold, ("median", "value"))
        check_choice("threshold_kind", self.threshold_kind, ("code", "temperature", "median"))
        check_range("threshold_coef", self.threshold_coef, at_least=0.0)
        _check_coefficients(self)

    @property
    def critic_heads(self) -> int:
        """The value, and the threshold if it is learned."""
        return 2 if self.threshold == "median" else 1

    def loss(self, log_ratio: Tensor, heads: Tensor, batch: Samples) -> Tensor:
        """Mean loss of policy and critic, without the entropy bonus; 0-d."""
        _check_batch(log_ratio, heads, batch)
        target, weight = self._target_and_weight(heads, batch)
        loss = bpo_loss(log_ratio, target, weight)
        loss = loss + self.value_coef * mse_loss(heads[:, 0], batch.returns)
        if self.threshold == "median":
            threshold_loss = bpo_threshold_loss(
                batch.returns, heads[:, 1], temperature=self.temperature, kind=self.threshold_kind
            )
            loss = loss + self.threshold_coef * threshold_loss
        return loss

    def slopes(self, log_ratio: Tensor, heads: Tensor, batch: Samples) -> tuple[Tensor, Tensor]:
        """Derivative of :meth:`loss` in the log-ratio ``[N]`` and in the heads ``[N, K]``."""
        _check_batch(log_ratio, heads, batch)
        target, weight = self._target_and_weight(heads, batch)
        log_ratio, heads = log_ratio.detach(), heads.detach()
        ratio = log_ratio.exp()
        slope = (ratio - target).sign_().mul_(ratio).mul_(weight)
        slope = slope.masked_fill_(log_ratio.abs() > LOG_RATIO_LIMIT, 0.0).mul_(1 / len(ratio))
        head_slopes = _value_slope(heads, batch, self.value_coef)
        if self.threshold == "median":
            distance = batch.returns - heads[:, 1]
            if self.threshold_kind == "median":
                half = distance.sign_().mul_(0.5)
            else:
                scale = self.temperature if self.threshold_kind == "temperature" else 1.0
                half = distance.mul_(1 / scale).sigmoid_().sub_(0.5)
            head_slopes[:, 1] = half.mul_(-self.threshold_coef / len(ratio))
        return slope, head_slopes

    def _target_and_weight(self, heads: Tensor, batch: Samples) -> tuple[Tensor, Tensor]:
        if heads.shape[-1] < self.critic_heads:
            raise ValueError(
                f"heads must hold {self.critic_heads} columns (value, threshold), "
                f"got shape {list(heads.shape)}"
            )
        value, threshold = heads.detach()[:, 0], heads.detach()[:, self.critic_heads - 1]
        target = bpo_target_ratio(
            batch.returns, threshold, epsilon=self.epsilon, temperature=self.temperature
        )
        advantages = batch.returns - value if self.online_weight else batch.advantages
        return target, advantages.abs()


def _check_coefficients(objective: Objective) -> None:
    for name in ("value_coef", "entropy_coef"):
        check_range(name, getattr(objective, name), at_least=0.0)
    check_range("max_grad_norm", objective.max_grad_norm, above=0.0)


def _check_batch(log_ratio: Tensor, heads: Tensor, batch: Samples) -> None:
    check_floating(log_ratio=log_ratio, heads=heads)
    check_shape("log_ratio", log_ratio, (None,))
    check_shape("heads", heads, (log_ratio.shape[0], None))
    if not isinstance(batch, Samples):
        raise TypeError(f"batch must be Samples, got {type(batch).__name__}")


def _value_slope(heads: Tensor, batch: Samples, coefficient: float) -> Tensor:
    """Derivative of the mean squared error of head 0, ``[N, K]`` with 0 for the other heads."""
    slopes = torch.zeros_like(heads)
    slopes[:, 0] = (heads[:, 0] - batch.returns).mul_(2 * coefficient / len(heads))
    return slopes
