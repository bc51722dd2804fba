r"""What f-DPG remembers between steps: the normaliser of each context, and a baseline.

Both are modules, so that ``state_dict`` stores them with the policy. They keep float64.

Source: Go et al. (2023), arXiv:2302.08215; Korbak et al. (2022), Controlling
Conditional Language Models without Catastrophic Forgetting, arXiv:2112.00791, for contexts.
"""

import math

import torch
from torch import Tensor, nn

from steelyard._checks import (
    check_count,
    check_floating,
    check_integer_dtype,
    check_not_empty,
    check_shape,
)

__all__ = ["LogPartition", "RunningBaseline"]


class LogPartition(nn.Module):
    r"""Running estimate of ``log Z`` from the importance weights of all steps, one per context.

    .. math:: \hat Z = \frac1n \sum_{j \le n} \frac{P(x_j)}{q_j(x_j)}, \qquad x_j \sim q_j

    Each weight is unbiased whatever law its sample came from, so the mean over steps is; its
    logarithm is low by about :math:`\mathrm{Var}(w) / (2 n Z^2)`. Read ``value`` *before* adding a
    batch to keep the gradient of that batch unbiased given the estimate.

    Args:
        num_contexts: ``None`` for one estimate, or the number of contexts ``C``, with ids
            ``0..C-1``.
        max_log_z: ``value`` never exceeds it; a rare huge weight would otherwise rule for long.

    Raises:
        TypeError: ``num_contexts`` is not an integer, or ``max_log_z`` not a number.
        ValueError: it is below 1, or ``max_log_z`` is NaN.

    Example:
        Weights that enumerate the proposal average to ``Z``, here 0.5:

        >>> proposal, scores = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.1, 0.4]).log()
        >>> partition = LogPartition()
        >>> partition.update(scores - proposal)
        >>> partition.value.exp()
        tensor(0.5000, dtype=torch.float64)

        One for each context; nothing is known yet of the last, and
        :func:`~steelyard.preference.dpg_loss` leaves its samples out:

        >>> partition = LogPartition(num_contexts=3)
        >>> contexts = torch.tensor([0, 1, 1])
        >>> partition.update(torch.tensor([0.0, 1.0, 1.0]), contexts)
        >>> partition.value
        tensor([0., 1., -inf], dtype=torch.float64)
        >>> partition.value[contexts]  # the log_z of these samples
        tensor([0., 1., 1.], dtype=torch.float64)

    Source: Go et al. (2023), arXiv:2302.08215.
    """

    log_sum: Tensor
    count: Tensor

    def __init__(self, num_contexts: int | None = None, *, max_log_z: float = math.inf) -> None:
        super().__init__()
        if num_contexts is not None:
            check_count("num_contexts", num_contexts)
        if isinstance(max_log_z, bool) or not isinstance(max_log_z, int | float):
            raise TypeError(f"max_log_z must be a number, got {type(max_log_z).__name__}")
        if math.isnan(max_log_z):
            raise ValueError(f"max_log_z must be a number, got {max_log_z}")
        self.num_contexts = num_contexts
        self.max_log_z = max_log_z
        size = (num_contexts or 1,)
        self.register_buffer("log_sum", torch.full(size, -math.inf, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(size, dtype=torch.long))

    @property
    def value(self) -> Tensor:
        """``log Z``: 0-d, or ``[C]``; ``-inf`` where no sample with mass was seen."""
        seen = self.log_sum - self.count.clamp(min=1).to(self.log_sum.dtype).log()
        capped = seen.clamp(max=self.max_log_z)
        return capped[0] if self.num_contexts is None else capped

    def update(self, log_weights: Tensor, contexts: Tensor | None = None) -> None:
        """Add the weights of a batch. Under several ranks gather them first.

        Args:
            log_weights: ``log P(x) - log q(x)``, ``[M]``; ``-inf`` where ``P = 0``, which counts
                as a weight of 0; NaN makes the estimate NaN. Detached.
            contexts: integer id of each sample, ``[M]``; needed with ``num_contexts``, and not
                allowed without.

        Raises:
            TypeError: ``log_weights`` not floating point or ``contexts`` not integer.
            ValueError: wrong shapes, empty input, ``contexts`` missing, superfluous or out of
                range.
        """
        check_floating(log_weights=log_weights)
        check_shape("log_weights", log_weights, (None,))
        check_not_empty("log_weights", log_weights)
        log_w = log_weights.detach().to(self.log_sum)
        index = self._index(log_w, contexts)
        # Log-sum-exp by context, the old sum included; the maximum is taken out of each.
        largest = self.log_sum.scatter_reduce(0, index, log_w, "amax")
        largest = largest.masked_fill(largest == -math.inf, 0.0)
        new = torch.exp(self.log_sum - largest)
        new = new.index_add(0, index, torch.exp(log_w - largest[index]))
        self.log_sum.copy_(largest + new.log())
        self.count.index_add_(0, index, torch.ones_like(index))

    def forward(self, log_weights: Tensor, contexts: Tensor | None = None) -> Tensor:
        """Return the ``log_z`` of these samples *before* their weights are added, then add them."""
        before = self.value.clone()
        self.update(log_weights, contexts)
        return before if contexts is None else before[contexts.to(before.device, torch.long)]

    def _index(self, log_w: Tensor, contexts: Tensor | None) -> Tensor:
        if self.num_contexts is None:
            if contexts is not None:
                raise ValueError("contexts must be None, or LogPartition needs num_contexts")
            return torch.zeros(log_w.shape, dtype=torch.long, device=log_w.device)
        if contexts is None:
            raise ValueError("contexts must be given to a LogPartition with num_contexts")
        check_integer_dtype(contexts=contexts)
        check_shape("contexts", contexts, tuple(log_w.shape))
        low, high = (int(x) for x in contexts.aminmax())
        if low < 0 or high >= self.num_contexts:
            raise ValueError(
                f"contexts must lie in 0..{self.num_contexts - 1}, got {low} to {high}"
            )
        return contexts.to(log_w.device, torch.long)

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"num_contexts={self.num_contexts}, max_log_z={self.max_log_z}"


class RunningBaseline(nn.Module):
    r"""Mean of the latest pseudo-rewards, the constant taken off the next ones.

    Read ``value`` before adding the rewards it is used on: then it does not depend on them, and
    the gradient stays unbiased. It moves with the policy because it forgets all but ``window``.

    Args:
        window: how many rewards are remembered (default 1024, as published).

    Raises:
        TypeError: ``window`` is not an integer.
        ValueError: it is below 1.

    Example:
        >>> baseline = RunningBaseline(window=2)
        >>> baseline.update(torch.tensor([9.0, 1.0, -torch.inf, 2.0]))
        >>> baseline.value
        tensor(1.5000, dtype=torch.float64)

    Source: Go et al. (2023), arXiv:2302.08215; the window is that of the released code.
    """

    recent: Tensor
    count: Tensor

    def __init__(self, window: int = 1024) -> None:
        super().__init__()
        check_count("window", window)
        self.register_buffer("recent", torch.zeros(window, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    @property
    def value(self) -> Tensor:
        """The mean, 0-d; 0 before the first reward."""
        return self.recent.sum() / self.count.clamp(min=1, max=self.recent.shape[0])

    def update(self, rewards: Tensor) -> None:
        """Add rewards ``[M]``; those that are infinite or NaN are left out.

        Raises:
            TypeError: ``rewards`` not floating point.
            ValueError: wrong shape or empty input.
        """
        check_floating(rewards=rewards)
        check_shape("rewards", rewards, (None,))
        check_not_empty("rewards", rewards)
        window = self.recent.shape[0]
        known = rewards.detach()[rewards.detach().isfinite()].to(self.recent)
        places = (self.count + torch.arange(len(known), device=known.device)) % window
        self.recent[places[-window:]] = known[-window:]
        self.count += len(known)

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"window={self.recent.shape[0]}"
