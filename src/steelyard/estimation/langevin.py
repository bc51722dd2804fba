r"""Stochastic gradient Langevin dynamics: sampling the posterior a mixture needs.

Source: Feder, Urbanke, Fogel (2025), arXiv:2506.07661, Langevin sampler; Welling, Teh (2011).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from steelyard._checks import check_range, checked_parameters

__all__ = ["SGLD"]


class SGLD(torch.optim.Optimizer):
    r"""Gradient descent on the mean loss plus the noise that makes it sample the posterior.

    .. math::
        \theta \leftarrow \theta - \eta \nabla \ell(\theta)
            + \sqrt{\frac{2 \eta T}{N}}\, \xi, \qquad \xi \sim \mathcal{N}(0, I)

    With :math:`\ell = U/N` the mean loss over ``N`` items *and* the prior
    (``-log prior / num_data`` added once, no weight decay beside it), the iterates sample
    :math:`e^{-U/T}` as :math:`\eta \to 0`. At a fixed step the variance is too large: for a
    Gaussian of precision ``A`` in each item, that is :math:`U = N A \theta^2/2`, and full
    gradients it is :math:`T / (N A (1 - \eta A / 2))`, and gradient noise of a minibatch adds to
    it. Average the members' *probabilities*, not logits or parameters.

    Layers that share statistics over a batch (batch normalisation) have no per-item likelihood;
    freeze them. A parameter without a gradient does not move. In half precision the noise is
    drawn in float32 and may fall below the resolution of a parameter.

    Args:
        params: parameters or parameter groups.
        lr: step :math:`\eta > 0` on the mean loss; for a schedule, any of ``torch.optim``.
        num_data: number ``N`` of training items, > 0; not the batch size.
        temperature: :math:`T \ge 0`; 1 = the posterior, 0 = plain gradient descent.
        generator: random numbers, on the device of the parameters; its state is yours to save.

    Raises:
        ValueError: a number out of range, or no parameter.
        TypeError: ``params`` cannot be iterated over.

    Example:
        The posterior of a mean of 100 items of variance 1 has standard deviation 1/10:

        >>> import torch
        >>> mean = torch.zeros(2000, requires_grad=True)  # 2000 chains at once
        >>> random = torch.Generator().manual_seed(0)
        >>> sampler = SGLD([mean], lr=0.1, num_data=100, generator=random)
        >>> for _ in range(100):
        ...     sampler.zero_grad()
        ...     (mean.square().sum() / 2).backward()
        ...     _ = sampler.step()
        >>> print(f"{mean.std():.2f}")
        0.10

    Source: arXiv:2506.07661, Langevin sampler in optimiser terms (derived).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        num_data: float,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        self.generator = generator
        params = checked_parameters(params)
        settings = {"lr": lr, "num_data": num_data, "temperature": temperature}
        super().__init__(params, settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with settings of their own if given."""
        settings = {**self.defaults, **param_group}
        check_range("lr", settings["lr"], above=0.0)
        check_range("num_data", settings["num_data"], above=0.0)
        check_range("temperature", settings["temperature"], at_least=0.0)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Tensor] | None = None
    ) -> Tensor | None:
        """Take one step; ``closure`` recomputes the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr = float(group["lr"])
            deviation = math.sqrt(2 * lr * group["temperature"] / group["num_data"])
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-lr)
                    if deviation > 0:
                        parameter.add_(self._noise(parameter), alpha=deviation)
        return loss

    def _noise(self, parameter: Tensor) -> Tensor:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        noise = torch.empty(parameter.shape, dtype=dtype, device=parameter.device)
        return noise.normal_(generator=self.generator)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {**state, "generator": self.generator}
