r"""A recurrent network that rests at a fixed point and learns from how that point moves.

Source: Laborieux and Zenke (2024), Improving equilibrium propagation without weight symmetry
through Jacobian homeostasis, arXiv:2309.02214.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from steelyard._checks import (
    check_choice,
    check_count,
    check_floating,
    check_integer_dtype,
    check_range,
    check_shape,
    given,
)
from steelyard._reduce import Reduction, reduce_masked
from steelyard.equilibrium.activations import holomorphic_sigmoid
from steelyard.equilibrium.fixed_points import check_state
from steelyard.equilibrium.propagation import METHODS, Method, circle_estimate

RELAXATIONS, NEWTON_STEPS = 200, 60


class EquilibriumGradients(NamedTuple):
    """Means over the batch, in the shapes of the parameters; ``None`` where there is none."""

    weight: Tensor
    bias: Tensor
    readout: Tensor
    readout_bias: Tensor | None


class EquilibriumNetwork(nn.Module):
    r"""Recurrent units with a linear readout, at rest.

    .. math:: u = W \sigma(u) + b + \text{drive}, \qquad \text{logits} = R\, \sigma(u)_{-o:} + c

    The loss is the cross-entropy of the logits. Systems are solved directly, one factorisation of
    an ``n`` by ``n`` matrix for each item and step: meant for up to a few hundred units.

    Args:
        weight: ``W`` ``[n, n]``, from the unit of the column to that of the row.
        bias: ``b`` ``[n]``.
        readout: ``R`` ``[K, o]``; reads the last ``o`` units.
        readout_bias: ``c`` ``[K]``; ``None`` for none.
        activation: elementwise; holomorphic if more than two points are asked for.
        mask: connections that exist ``[n, n]``; applied to ``W`` and to its gradient.

    Raises:
        ValueError: a shape does not fit.

    Example:
        >>> weight = torch.tensor([[0.0, 0.4], [0.4, 0.0]], dtype=torch.float64)  # symmetric
        >>> network = EquilibriumNetwork(weight, torch.zeros(2).double(), torch.eye(2).double())
        >>> drive, target = torch.tensor([[0.3, 0.6]], dtype=torch.float64), torch.tensor([1])
        >>> u = network.settle(drive)
        >>> torch.allclose(u, network.activation(u) @ weight.T + drive)
        True
        >>> v = network.error_vectors(u, drive, target, method="exact")
        >>> torch.allclose(v, network.error_vectors(u, drive, target, method="backprop"))
        True

    Source: arXiv:2309.02214, experiments.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        readout: Tensor,
        *,
        readout_bias: Tensor | None = None,
        activation: Callable[[Tensor], Tensor] = holomorphic_sigmoid,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_floating(weight=weight, bias=bias, readout=readout)
        check_floating(**given(readout_bias=readout_bias))
        check_shape("bias", bias, (None,))
        count = bias.shape[0]
        check_shape("weight", weight, (count, count))
        check_shape("readout", readout, (None, None))
        if not 0 < readout.shape[1] <= count:
            raise ValueError(f"readout must read 1 to {count} units, got {list(readout.shape)}")
        if readout_bias is not None:
            check_shape("readout_bias", readout_bias, (readout.shape[0],))
        if mask is not None:
            check_shape("mask", mask, (count, count))
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = nn.Parameter(bias.detach().clone())
        self.readout = nn.Parameter(readout.detach().clone())
        self.readout_bias = (
            None if readout_bias is None else nn.Parameter(readout_bias.detach().clone())
        )
        self.activation = activation
        self.mask: Tensor | None
        self.register_buffer("mask", None if mask is None else mask.to(weight.dtype))

    def connections(self) -> Tensor:
        """Return the weights that exist, ``[n, n]``."""
        return self.weight if self.mask is None else self.weight * self.mask

    def field(self, u: Tensor, drive: Tensor) -> Tensor:
        """Return ``W sigma(u) + b + drive - u``, ``[B, n]``; zero at rest."""
        check_state("u", u)
        check_state("drive", drive)
        if drive.shape != u.shape:
            raise ValueError(f"drive must have shape {list(u.shape)}, got {list(drive.shape)}")
        weight = self.connections().to(u.dtype)
        return self.activation(u) @ weight.mT + self.bias + drive - u

    @torch.no_grad()
    def settle(self, drive: Tensor, *, tolerance: float = 1e-10) -> Tensor:
        """Find the state at rest: relax from zero, then finish by Newton's method.

        Args:
            drive: input of each unit ``[B, n]``.
            tolerance: largest residual; what rounding leaves is accepted.

        Returns:
            The states ``u`` ``[B, n]``, without gradient.

        Raises:
            RuntimeError: an item does not settle.
            ValueError: a shape or number does not fit, or ``drive`` is not finite.
        """
        self._check("drive", drive)
        if not bool(drive.isfinite().all()):
            count = int((~drive.isfinite()).sum())
            raise ValueError(f"drive must be finite, got {count} entries that are not")
        check_range("tolerance", tolerance, at_least=0.0)
        u = torch.zeros_like(drive)
        for _ in range(RELAXATIONS):
            push = self.field(u, drive)
            if bool(push.abs().max() <= tolerance):
                return u
            u = u + 0.5 * push
        return self._solve(u, drive, None, 0.0, tolerance)

    def logits(self, u: Tensor) -> Tensor:
        """Read the last units of states ``[B, n]``: logits ``[B, K]``."""
        check_state("u", u)
        read = self.activation(u)[..., -self.readout.shape[1] :]
        out = read @ self.readout.to(read.dtype).mT
        logits: Tensor = out if self.readout_bias is None else out + self.readout_bias
        return logits

    def loss(self, u: Tensor, target: Tensor, *, reduction: Reduction = "mean") -> Tensor:
        """Cross-entropy of the logits read at ``u``.

        Args:
            u: states ``[B, n]``.
            target: classes ``[B]``, integers in ``[0, K)``.
            reduction: over items.
        """
        self._check("u", u)
        check_shape("target", target, (u.shape[0],))
        check_integer_dtype(target=target)
        losses = nn.functional.cross_entropy(self.logits(u), target.long(), reduction="none")
        return reduce_masked(losses, None, reduction)

    @torch.no_grad()
    def error_vectors(
        self,
        u: Tensor,
        drive: Tensor,
        target: Tensor,
        *,
        method: Method = "exact",
        points: int = 2,
        beta: float = 0.1,
    ) -> Tensor:
        """Error vectors of the activities, item by item; see :func:`error_vector`.

        Args:
            u: states at rest ``[B, n]``.
            drive: what they were driven by ``[B, n]``; only ``"cauchy"`` reads its values.
            target: classes ``[B]``.
            method: ``"exact"``, ``"cauchy"`` or ``"backprop"``.
            points: of ``"cauchy"``, at least 1.
            beta: radius of ``"cauchy"``, above 0.

        Returns:
            ``[B, n]``.

        Raises:
            RuntimeError: a nudged system does not settle.
            TypeError: ``u`` or ``drive`` not floating, or ``target`` not integer.
            ValueError: a shape or number does not fit.
        """
        check_choice("method", method, METHODS)
        check_count("points", points)
        check_range("beta", beta, above=0.0)
        self._check("u", u)
        self._check("drive", drive)
        check_shape("drive", drive, tuple(u.shape))
        check_shape("target", target, (u.shape[0],))
        check_integer_dtype(target=target)
        if method == "cauchy":
            tolerance = 64 * torch.finfo(u.dtype).eps

            def nudged(start: Tensor, nudge: complex | float) -> Tensor:
                return self._solve(start, drive, target, nudge, tolerance)

            return circle_estimate(nudged, self.activation, u, points, beta)
        slope = self._slope(u)
        push, _ = self._nudge(u, target)
        matrix = self.connections() * slope.unsqueeze(1) - self._identity(u)
        vector: Tensor
        if method == "exact":
            vector = -slope * torch.linalg.solve(matrix, push)
        else:
            vector = -torch.linalg.solve(matrix.mT, slope * push)
        return vector

    @torch.no_grad()
    def gradients(
        self,
        u: Tensor,
        drive: Tensor,
        target: Tensor,
        *,
        method: Method = "exact",
        points: int = 2,
        beta: float = 0.1,
    ) -> EquilibriumGradients:
        """Estimate the gradient of the mean loss; exact with ``method="backprop"``.

        Args:
            u: states at rest ``[B, n]``.
            drive: what they were driven by ``[B, n]``; only ``"cauchy"`` reads its values.
            target: classes ``[B]``.
            method: whose error vectors.
            points: of ``"cauchy"``.
            beta: of ``"cauchy"``.

        Returns:
            ``weight [n, n]``, ``bias [n]``, ``readout [K, o]`` and ``readout_bias [K]``
            (``None`` if the network has none), means over the batch.

        Raises:
            RuntimeError: a nudged system does not settle.
            TypeError: ``u`` or ``drive`` not floating, or ``target`` not integer.
            ValueError: a shape or number does not fit.
        """
        errors = self.error_vectors(u, drive, target, method=method, points=points, beta=beta)
        count, activity = u.shape[0], self.activation(u)
        weight = errors.mT @ activity / count
        if self.mask is not None:
            weight = weight * self.mask
        surprise = self._surprise(u, target)
        read = activity[:, -self.readout.shape[1] :]
        bias = None if self.readout_bias is None else surprise.mean(0)
        return EquilibriumGradients(weight, errors.mean(0), surprise.mT @ read / count, bias)

    def _solve(
        self,
        u: Tensor,
        drive: Tensor,
        target: Tensor | None,
        nudge: complex | float,
        tolerance: float,
    ) -> Tensor:
        """Newton's method on the (nudged) field, from a state nearby."""
        weight, identity = self.connections().to(u.dtype), self._identity(u)
        error = float("inf")
        for _ in range(NEWTON_STEPS):
            value, inner = self.field(u, drive), weight
            if target is not None:
                push, curvature = self._nudge(u, target)
                value, inner = value + nudge * push, weight + nudge * curvature
            last, error = error, value.abs().max().item()
            stalled = error >= last and error <= 1024 * torch.finfo(u.dtype).eps * (
                1 + u.abs().max().item()
            )
            if error <= tolerance or stalled:
                return u
            matrix = inner * self._slope(u).unsqueeze(-2) - identity
            u = u - torch.linalg.solve(matrix, value)
        kind = "the network" if target is None else f"the network nudged by {nudge:.3g}"
        raise RuntimeError(
            f"{kind} does not settle: residual {error:.2g} (tolerance {tolerance:g})"
        )

    def _surprise(self, u: Tensor, target: Tensor) -> Tensor:
        """Softmax of the logits minus the one-hot target, holomorphic in ``u``."""
        logits = self.logits(u)
        top = (logits.real if logits.is_complex() else logits).amax(-1, keepdim=True)
        powers = (logits - top).exp()
        probs = powers / powers.sum(-1, keepdim=True)
        return probs - nn.functional.one_hot(target.long(), logits.shape[-1]).to(probs.dtype)

    def _nudge(self, u: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Loss gradient ``[B, n]`` and Hessian ``[B, n, n]`` in the activities."""
        surprise = self._surprise(u, target)
        one_hot = nn.functional.one_hot(target.long(), surprise.shape[-1]).to(surprise.dtype)
        probs, readout = surprise + one_hot, self.readout.to(surprise.dtype)
        pad = u.shape[-1] - readout.shape[1]
        push = nn.functional.pad(surprise @ readout, (pad, 0))
        spread = torch.diag_embed(probs) - probs.unsqueeze(-1) * probs.unsqueeze(-2)
        curvature = readout.mT @ spread @ readout
        return push, nn.functional.pad(curvature, (pad, 0, pad, 0))

    def _slope(self, u: Tensor) -> Tensor:
        u = u.contiguous()  # jvp writes to it, so no two entries may share memory
        slope: Tensor = torch.func.jvp(self.activation, (u,), (torch.ones_like(u),))[1]
        return slope

    def _identity(self, u: Tensor) -> Tensor:
        return torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)

    def _check(self, name: str, states: Tensor) -> None:
        check_floating(**{name: states})
        check_shape(name, states, (None, self.bias.shape[0]))
        if states.shape[0] == 0:
            raise ValueError(f"{name} must hold at least one item, got {list(states.shape)}")
