"""What AdamP and SGDP share: checks of gradients, scratch memory, projection, decay and step."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from steelyard._checks import check_range, checked_parameters
from steelyard.optim.projection import (
    Radial,
    as_rows,
    product_size,
    radial_coefficients,
    radial_on_host,
)

_FUSED = (torch.float32, torch.float64)

_Key = tuple[str, torch.dtype, torch.device]


class Projected(Optimizer, ABC):
    """An optimiser whose updates of scale-invariant weights stay tangent."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        if not isinstance(defaults["lr"], Tensor):
            check_range("lr", defaults["lr"])
        check_range("lr", float(defaults["lr"]), at_least=0.0)
        check_range("eps", defaults["eps"], at_least=0.0)
        check_range("weight_decay", defaults["weight_decay"], at_least=0.0)
        check_range("wd_ratio", defaults["wd_ratio"], at_least=0.0)
        if defaults["delta"] != math.inf:  # infinity projects every matrix
            check_range("delta", defaults["delta"], at_least=0.0)
        super().__init__(checked_parameters(params), defaults)
        self._scratch: dict[_Key, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_scratch": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._scratch = {}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: evaluates the model again and returns the loss; optional.

        Returns:
            What the closure returned.

        Raises:
            ValueError: a gradient is sparse, or the decay of one step is 1 or more.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in params):
                raise ValueError(
                    f"grad must be dense: {type(self).__name__} does not take sparse gradients "
                    "(for example of an embedding with sparse=True)"
                )
            if any(p.is_complex() for p in params):
                raise TypeError(f"{type(self).__name__} takes real parameters, got a complex one")
            if params:
                self._step_group(group, params)
        return loss

    @abstractmethod
    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Step the parameters of one group, all of which have a gradient."""

    def _use_foreach(self, group: dict[str, Any], params: list[Tensor]) -> bool:
        wanted = group["foreach"]
        return wanted if wanted is not None else all(p.device.type == "cuda" for p in params)

    def _buffer(self, like: Tensor) -> Tensor:
        """Return scratch memory in the shape and layout of ``like``, shared by all tensors."""
        return self._memory("update", like, like.numel()).view(like.shape)

    def _products(self, param: Tensor) -> Tensor:
        return self._memory("products", param, product_size(param[0].numel()))

    def _memory(self, use: str, like: Tensor, size: int) -> Tensor:
        key = (use, like.dtype, like.device)
        have = self._scratch.get(key)
        if have is None or have.numel() < size:
            have = self._scratch[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        return have[:size]

    def _apply(
        self, group: dict[str, Any], param: Tensor, grad: Tensor, update: Tensor, rate: Any
    ) -> None:
        """Project ``update`` in place if the test says so; then decay and step."""
        decay = group["lr"] * group["weight_decay"] * self._decay_gain(group)
        kept: Tensor | float = 1.0
        if self._is_projectable(group, param):
            passed = _project_(param, grad, update, delta=group["delta"], eps=group["eps"])
            kept = torch.where(passed, group["wd_ratio"], 1.0)
            if param.device.type == "cpu" and not torch.compiler.is_compiling():
                kept = float(kept)
        if group["weight_decay"] != 0:
            param.mul_(1 - decay * kept)
        if isinstance(rate, Tensor):
            param.sub_(update * rate)
        else:
            param.add_(update, alpha=-rate)

    def _decay_gain(self, group: dict[str, Any]) -> float:
        return 1.0

    def _is_plain(self, group: dict[str, Any], param: Tensor, *others: Tensor) -> bool:
        """Tell whether tensors of one kind are such that PyTorch's one-pass steps take them."""
        return (
            group["foreach"] is None
            and param.device.type == "cpu"
            and param.dtype in _FUSED
            and not torch.compiler.is_compiling()
            and param.is_contiguous()
            and all(t.is_contiguous() for t in others)
        )

    def _is_projectable(self, group: dict[str, Any], param: Tensor) -> bool:
        return param.dim() > 1 and param.numel() > 0 and bool(group["delta"] > 0)

    def _radial(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> Radial | None:
        if not self._is_projectable(group, param):
            return None
        rows = as_rows(param), as_rows(grad), self._products(param)
        return radial_on_host(*rows, delta=group["delta"], eps=group["eps"])

    def _step_tangent(
        self,
        group: dict[str, Any],
        param: Tensor,
        update: Tensor,
        radial: Radial,
        *,
        rate: float,
        in_place: bool = False,
    ) -> None:
        """Decay and step by ``rate`` times the tangent part of ``update``.

        The update is not changed unless ``in_place``: what the projection takes of a row is a share
        of the weight's row, and joins the decay.
        """
        rows, steps = as_rows(param), as_rows(update)
        taken = radial.taken(rows, steps, group["eps"], self._products(param))
        decay = float(group["lr"]) * group["weight_decay"] * self._decay_gain(group)
        if in_place:
            steps.addcmul_(taken, rows, value=-1)
            taken.zero_()
        kept = taken.mul_(-rate).add_(1 - decay * group["wd_ratio"])
        if rate == 1:
            torch.addcmul(steps, rows, kept, out=rows)
        else:
            rows.mul_(kept).add_(steps, alpha=rate)


def downhill(param: Tensor, group: dict[str, Any]) -> Tensor:
    grad = param.grad
    if grad is None:  # `step` has left those out
        raise ValueError("grad must not be None")
    return -grad if group["maximize"] else grad


def _project_(param: Tensor, grad: Tensor, update: Tensor, *, delta: float, eps: float) -> Tensor:
    """Take the radial part out of ``update``, in place; return whether a view passed (0-d)."""
    wide = torch.promote_types(param.dtype, torch.float32)
    weight, slope = as_rows(param).to(wide), as_rows(grad).to(wide)
    step = as_rows(update).to(wide)
    taken, passed = radial_coefficients(weight, slope, step, delta=delta, eps=eps)
    on_host = param.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_host and not passed:
        return passed
    rows = as_rows(update)
    if rows.data_ptr() == update.data_ptr() and rows.dtype == wide:
        rows.addcmul_(taken, weight, value=-1)
    else:  # no view of this memory layout, or half precision
        update.copy_((step - taken * weight).reshape(update.shape))
    return passed
