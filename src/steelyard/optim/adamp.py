r"""AdamP and SGDP: Adam and momentum SGD that do not lengthen scale-invariant weights.

Each update of a tensor with two or more dimensions is tested (see
:func:`steelyard.optim.scale_invariance_score`); if the raw gradient is tangent to the weight, the
update loses its radial part and the weight decay is reduced. Everything else is Adam with decoupled
decay, or SGD with momentum and decoupled decay.

On a processor each tensor is worked on alone while it is in cache: fresh memory costs more there
than arithmetic. The test comes first; a tensor that fails it takes one of PyTorch's one-pass steps.
Elsewhere the moments of all tensors go through PyTorch's grouped operations. Both are the same
formulas.

Source: Heo et al. (2021), AdamP: Slowing Down the Slowdown for Momentum Optimizers on
Scale-invariant Weights, arXiv:2006.08217.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from steelyard._checks import check_pair, check_range
from steelyard.optim._projected import Projected, downhill

__all__ = ["SGDP", "AdamP"]


class AdamP(Projected):
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
        check_pair("betas", betas)
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
        grads = [downhill(p, group) for p in params]
        if self._use_foreach(group, params):
            self._grouped(group, params, grads)
            return
        if group["nesterov"]:
            one_pass = [False] * len(params)
        else:
            one_pass = [
                self._is_plain(group, p, g, *self._moments(p))
                for p, g in zip(params, grads, strict=True)
            ]
        plain: list[tuple[Tensor, Tensor]] = []
        for p, grad, quick in zip(params, grads, one_pass, strict=True):
            if not quick:
                self._grouped(group, [p], [grad])
            elif not self._is_projectable(group, p):
                plain.append((p, grad))
            else:
                self._fused(group, p, grad)
        if plain:
            self._adamw(group, *map(list, zip(*plain, strict=True)))

    def _moments(self, param: Tensor) -> tuple[Tensor, Tensor]:
        state = self.state[param]
        return state["exp_avg"], state["exp_avg_sq"]

    def _fused(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> None:
        """Take AdamW's step, or the tangent part of where Adam arrives from zero."""
        radial = self._radial(group, param, grad)
        if radial is None:
            self._adamw(group, [param], [grad])
            return
        update, rate = self._buffer(param).zero_(), float(group["lr"])
        self._one_pass(
            torch._fused_adam_, group, [update], [grad], [param], lr=rate, weight_decay=0.0
        )
        self._step_tangent(group, param, update, radial, rate=1.0)

    def _adamw(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        rate, decay = float(group["lr"]), group["weight_decay"]
        self._one_pass(
            torch._fused_adamw_, group, params, grads, params, lr=rate, weight_decay=decay
        )

    def _one_pass(
        self,
        step: Callable[..., None],
        group: dict[str, Any],
        targets: list[Tensor],
        grads: list[Tensor],
        params: list[Tensor],
        **rates: float,
    ) -> None:
        """Step ``targets`` with the state of ``params``."""
        states = [self.state[p] for p in params]
        counts = [s["step"] for s in states]
        torch._foreach_add_(counts, 1)
        means, squares = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        (beta1, beta2), eps = group["betas"], group["eps"]
        fixed = {"beta1": beta1, "beta2": beta2, "eps": eps, "amsgrad": False, "maximize": False}
        step(targets, grads, means, squares, [], counts, **fixed, **rates)

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


class SGDP(Projected):
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
        grads = [downhill(p, group) for p in params]
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
            if not grouped and momentum > 0 and self._is_plain(group, p, grad, buffer):
                self._fused(group, p, grad, buffer)
                continue
            if not grouped:
                buffer.mul_(momentum).add_(grad, alpha=1 - group["dampening"])
            if group["nesterov"]:
                update = torch.add(grad, buffer, alpha=momentum, out=self._buffer(p))
            elif group["project_buffer"]:
                update = buffer
            else:
                update = self._buffer(p).copy_(buffer)
            self._apply(group, p, grad, update, group["lr"])

    def _fused(self, group: dict[str, Any], param: Tensor, grad: Tensor, buffer: Tensor) -> None:
        """Take SGD's step after the decay, or the tangent part of the buffer."""
        rate, momentum = float(group["lr"]), group["momentum"]
        radial = self._radial(group, param, grad)
        if radial is None:
            if group["weight_decay"] != 0:
                param.mul_(1 - rate * group["weight_decay"] * self._decay_gain(group))
            torch._fused_sgd_(
                [param],
                [grad],
                [buffer],
                weight_decay=0.0,
                momentum=momentum,
                lr=rate,
                dampening=group["dampening"],
                nesterov=group["nesterov"],
                maximize=False,
                is_first_step=False,
            )
            return
        buffer.mul_(momentum).add_(grad, alpha=1 - group["dampening"])
        if group["nesterov"]:
            update = torch.add(grad, buffer, alpha=momentum, out=self._buffer(param))
            self._step_tangent(group, param, update, radial, rate=-rate)
        else:
            in_place = group["project_buffer"]
            self._step_tangent(group, param, buffer, radial, rate=-rate, in_place=in_place)
