r"""AdamP and SGDP: Adam and momentum SGD that do not lengthen scale-invariant weights.

Each update of a tensor with two or more dimensions is tested (see
:func:`steelyard.optim.scale_invariance_score`); if the raw gradient is tangent to the weight, the
update loses its radial part and the weight decay is reduced. Everything else is Adam with decoupled
decay, or SGD with momentum and decoupled decay.

On a processor each tensor is worked on alone, in one scratch buffer that stays in cache: fresh
memory costs more there than arithmetic. Elsewhere the moments of all tensors go through PyTorch's
grouped operations. Both are the same formulas.

Source: Heo et al. (2021), AdamP: Slowing Down the Slowdown for Momentum Optimizers on
Scale-invariant Weights, arXiv:2006.08217.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import Optimizer, ParamsT

from steelyard._checks import check_range
from steelyard.optim.projection import as_rows, radial_coefficients

_FUSED = (torch.float32, torch.float64)


class _Projected(Optimizer, ABC):
    """What AdamP and SGDP share: checks of gradients, the projection, decay and step."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        check_range("lr", float(defaults["lr"]), at_least=0.0)
        check_range("eps", defaults["eps"], at_least=0.0)
        check_range("weight_decay", defaults["weight_decay"], at_least=0.0)
        check_range("wd_ratio", defaults["wd_ratio"], at_least=0.0)
        if not defaults["delta"] >= 0.0:
            raise ValueError(f"delta must be >= 0.0, got {defaults['delta']}")
        super().__init__(params, defaults)
        self._scratch: dict[tuple[torch.dtype, torch.device], Tensor] = {}

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
        key = (like.dtype, like.device)
        have = self._scratch.get(key)
        if have is None or have.numel() < like.numel():
            have = self._scratch[key] = torch.empty(like.numel(), dtype=key[0], device=key[1])
        return have[: like.numel()].view(like.shape)

    def _apply(
        self, group: dict[str, Any], param: Tensor, grad: Tensor, update: Tensor, rate: Any
    ) -> None:
        """Project ``update`` in place if the test says so; then decay and step."""
        decay = group["lr"] * group["weight_decay"] * self._decay_gain(group)
        kept: Tensor | float = 1.0
        if param.dim() > 1 and param.numel() > 0 and group["delta"] > 0:
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


def _downhill(param: Tensor, group: dict[str, Any]) -> Tensor:
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


class AdamP(_Projected):
    r"""Adam with decoupled decay whose updates of scale-invariant weights stay tangent.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        u &= m \,/\, \bigl(\sqrt{v / (1 - \beta_2^t)} + \epsilon\bigr) \\
        u &\leftarrow \Pi_w(u), \; r = \rho \quad \text{if } \textstyle\max_i |\cos(w_i, g_i)|
             < \delta / \sqrt{D}, \quad \text{else } r = 1 \\
        w &\leftarrow w (1 - \eta \lambda r) - \eta\, u / (1 - \beta_1^t)

    The state has the keys of :class:`torch.optim.Adam` (``step``, ``exp_avg``, ``exp_avg_sq``), so
    that a run with Adam can go on with AdamP.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, at least 0.
        betas: decay of the two moments, each in [0, 1).
        eps: floor of the denominator and of the norms.
        weight_decay: decoupled decay, at least 0.
        delta: a tensor is projected when its score is below this; 0 makes it AdamW, infinity
            projects every tensor of two or more dimensions.
        wd_ratio: factor of the decay of projected tensors.
        nesterov: take the gradient once more into the update.
        foreach: group the moments of all tensors in one call; ``None`` does so on a GPU only.
        maximize: step uphill.
        capturable: keep the step counter and the bias corrections on the device, for CUDA graphs.

    Raises:
        ValueError: an argument is out of range, or a gradient is sparse.

    Example:
        The loss ``-cos(w, a)`` does not feel the length of ``w``; AdamP hardly changes it.

        >>> weight = torch.nn.Parameter(torch.tensor([[1.0, 0.0]]))
        >>> optimizer = AdamP([weight], lr=0.1)
        >>> for _ in range(50):
        ...     optimizer.zero_grad()
        ...     (-torch.cosine_similarity(weight, torch.tensor([[0.0, 1.0]]))).sum().backward()
        ...     optimizer.step()
        >>> direction = weight.detach() / weight.detach().norm()
        >>> bool(direction[0, 1] > 0.9), bool(weight.detach().norm() < 2)
        (True, True)

    Source: arXiv:2006.08217, algorithm AdamP, with the test as coded.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        check_range("betas[0]", betas[0], at_least=0.0, below=1.0)
        check_range("betas[1]", betas[1], at_least=0.0, below=1.0)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "nesterov": nesterov,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            state = self.state[p]
            if not state:
                device = p.device if group["capturable"] else torch.device("cpu")
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        grads = [_downhill(p, group) for p in params]
        if self._use_foreach(group, params):
            self._grouped(group, params, grads)
            return
        for p, grad in zip(params, grads, strict=True):
            if self._can_fuse(group, p, grad):
                self._fused(group, p, grad)
            else:
                self._grouped(group, [p], [grad])

    def _can_fuse(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> bool:
        state = self.state[param]
        tensors = (param, grad, state["exp_avg"], state["exp_avg_sq"])
        return (
            param.device.type == "cpu"
            and param.dtype in _FUSED
            and not group["nesterov"]
            and group["foreach"] is None
            and not torch.compiler.is_compiling()
            and all(t.is_contiguous() for t in tensors)
        )

    def _fused(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> None:
        """Let PyTorch's one-pass Adam step from zero: where it arrives is minus the update."""
        state, (beta1, beta2) = self.state[param], group["betas"]
        update = self._buffer(param).zero_()
        adam(
            [update],
            [grad],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=1.0,
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )
        rate = group["lr"]
        self._apply(group, param, grad, update, -rate)

    def _grouped(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Take the formulas as they stand, over lists of tensors."""
        beta1, beta2 = group["betas"]
        states = [self.state[p] for p in params]
        means = [s["exp_avg"] for s in states]
        squares = [s["exp_avg_sq"] for s in states]
        torch._foreach_add_([s["step"] for s in states], 1)
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)
        tops: Iterable[Tensor] = means
        if group["nesterov"]:
            tops = torch._foreach_lerp(means, grads, 1 - beta1)
        roots = torch._foreach_sqrt(squares)
        for p, grad, top, root, state in zip(params, grads, tops, roots, states, strict=True):
            count = state["step"] if group["capturable"] else float(state["step"])
            update = top / root.div_((1 - beta2**count) ** 0.5).add_(group["eps"])
            self._apply(group, p, grad, update, group["lr"] / (1 - beta1**count))


class SGDP(_Projected):
    r"""SGD with momentum and decoupled decay whose updates of scale-invariant weights stay tangent.

    .. math::
        b &\leftarrow \mu b + (1 - \tau) g, \qquad u = b \;\text{ or, with Nesterov, }\; g + \mu b\\
        u &\leftarrow \Pi_w(u), \; r = \rho \quad \text{if } \textstyle\max_i |\cos(w_i, g_i)|
             < \delta / \sqrt{D}, \quad \text{else } r = 1 \\
        w &\leftarrow w \left(1 - \frac{\eta \lambda r}{1 - \mu}\right) - \eta\, u

    Three things differ from :class:`torch.optim.SGD`: the decay is decoupled and divided by
    ``1 - momentum`` (the gain that coupled decay would have in the long run), dampening applies
    to the first gradient too, and ``nesterov`` may go with dampening.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, at least 0.
        momentum: in [0, 1).
        dampening: in [0, 1].
        weight_decay: decoupled decay, at least 0; mind the division by ``1 - momentum``.
        nesterov: take the gradient once more into the update.
        delta: a tensor is projected when its score is below this; 0 never, infinity always.
        wd_ratio: factor of the decay of projected tensors.
        project_buffer: project the stored momentum too, as the authors' code does without
            Nesterov (there by writing in place); the paper's text keeps it as it is.
        foreach: group the momentum of all tensors in one call; ``None`` does so on a GPU only.
        eps: floor of the norms.
        maximize: step uphill.

    Raises:
        ValueError: an argument is out of range, a gradient is sparse, or
            ``lr * weight_decay / (1 - momentum)`` reaches 1.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = SGDP([weight], lr=0.5, momentum=0.9)
        >>> weight.grad = torch.tensor([[-4.0, 3.0]])  # tangent: the length grows by Pythagoras
        >>> optimizer.step()
        >>> weight.detach()
        tensor([[5.0000, 2.5000]])

    Source: arXiv:2006.08217, algorithm SGDP, with the test and the decay as coded.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        project_buffer: bool = False,
        foreach: bool | None = None,
        *,
        eps: float = 1e-8,
        maximize: bool = False,
    ) -> None:
        check_range("momentum", momentum, at_least=0.0, below=1.0)
        check_range("dampening", dampening, at_least=0.0, at_most=1.0)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "project_buffer": project_buffer,
            "foreach": foreach,
            "eps": eps,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _decay_gain(self, group: dict[str, Any]) -> float:
        return float(1 / (1 - group["momentum"]))

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        momentum = group["momentum"]
        decay = float(group["lr"]) * group["weight_decay"] * self._decay_gain(group)
        if decay >= 1:
            raise ValueError(
                f"weight_decay must keep lr * weight_decay / (1 - momentum) below 1, got {decay:g}"
            )
        grads = [_downhill(p, group) for p in params]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(
                    p, memory_format=torch.preserve_format
                )
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        grouped = self._use_foreach(group, params)
        if grouped:
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, grads, alpha=1 - group["dampening"])
        for p, grad, buffer in zip(params, grads, buffers, strict=True):
            if not grouped:
                buffer.mul_(momentum).add_(grad, alpha=1 - group["dampening"])
            if group["nesterov"]:
                update = torch.add(grad, buffer, alpha=momentum, out=self._buffer(p))
            elif group["project_buffer"]:
                update = buffer
            else:
                update = self._buffer(p).copy_(buffer)
            self._apply(group, p, grad, update, group["lr"])
