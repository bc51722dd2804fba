"""Losses over the rows of a linear head, of which only a block of logits exists at a time.

A block is taken to the end at once: logits, loss, slope of the loss in the logits, and from it the
gradients. So each logit is made once, and the backward pass multiplies by one number.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from steelyard.distillation import pld_loss
from steelyard.fused._blocks import (
    Head,
    HeadGradients,
    block_rows,
    empty_rows,
    fill_rows,
    rows_in_cache,
    slices,
)
from steelyard.integrations.trl._backbone import LinearHead


class RowTerm(Protocol):
    """A loss that is a sum over rows, some of the rows given to :func:`row_loss`."""

    rows: int
    """How many."""

    def load(self, block: slice) -> None:
        """Get ready for a block of its rows."""

    def slope_into(self, logits: Tensor, block: slice, part: slice) -> Tensor:
        """Return the loss of some rows, 0-d, and put its slope in the place of their logits.

        Args:
            logits: ``[n, V]``, overwritten.
            block: which of its rows were loaded.
            part: which of the loaded ones these are.
        """


def row_loss(
    hidden: Tensor, head: LinearHead, terms: Sequence[RowTerm], *, chunk_size: int | None = None
) -> Tensor:
    """Sum of the terms, each over its share of the rows, one after the other.

    Args:
        hidden: ``[N, D]``.
        head: differentiable, as ``hidden`` is.
        terms: their rows add up to ``N``.
        chunk_size: rows at a time; ``None`` picks a bounded number.
    """
    tensors = (hidden, *head)
    needs = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors)
    value: Tensor = _RowLoss.apply(*tensors, tuple(terms), chunk_size, needs)  # type: ignore[no-untyped-call]
    return value


class _RowLoss(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        terms: tuple[RowTerm, ...],
        chunk_size: int | None,
        needs: tuple[bool, ...],
    ) -> Tensor:
        head = Head(hidden, weight, bias, 1.0)
        gradients = HeadGradients(head, needs)
        size = block_rows(head, chunk_size)
        buffer, total, first = empty_rows(size, head), head.full(1, 0.0)[0], 0
        for term in terms:
            for block in slices(term.rows, size):
                here = slice(first + block.start, first + block.stop)
                term.load(block)
                z = fill_rows(head, here, buffer)
                for part in slices(z.shape[0], rows_in_cache(head)):
                    total += term.slope_into(z[part], block, part)
                gradients.add(here, z)
            first += term.rows
        ctx.gradients = gradients.tensors
        ctx.dtypes = tuple(None if x is None else x.dtype for x in (hidden, weight, bias))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("row_loss keeps its gradients for one backward pass only")
        scaled = tuple(
            None if gradient is None else gradient.mul_(upstream).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        )
        ctx.gradients = None
        return (*scaled, None, None, None)


class TeacherRows:
    """Logits of another model on the same rows, made block by block.

    Args:
        hidden: its hidden states, ``[N, D']``.
        head: its head.
    """

    def __init__(self, hidden: Tensor, head: LinearHead) -> None:
        self.head = Head(hidden, *head.detached(), 1.0)
        self._buffer: Tensor | None = None
        self.logits = hidden

    def load(self, block: slice) -> None:
        """Make the logits of a block of rows; they are in ``logits`` until the next one."""
        size = block.stop - block.start
        if self._buffer is None or len(self._buffer) < size:
            self._buffer = empty_rows(size, self.head)
        self.logits = fill_rows(self.head, block, self._buffer)


class LikelihoodAndDivergence:
    r"""``a (-log s_y) + b KL(teacher || s)`` of each row.

    Args:
        targets: ``y``, ``[N]``.
        nll: ``a``.
        teacher: holds the same rows; ``None`` = no divergence.
        first: place of these rows among the teacher's.
        kl: ``b``.

    Attributes:
        totals: sums of the two over rows, before the weights, ``[2]``.
    """

    def __init__(
        self,
        targets: Tensor,
        *,
        nll: float,
        teacher: TeacherRows | None = None,
        first: int = 0,
        kl: float = 0.0,
    ) -> None:
        self.rows, self.first = len(targets), first
        self.targets, self.teacher, self.nll, self.kl = targets, teacher, nll, kl
        self.totals = torch.zeros(2, device=targets.device)

    def load(self, block: slice) -> None:
        """Make the teacher's logits."""
        if self.teacher is not None:
            self.teacher.load(slice(self.first + block.start, self.first + block.stop))

    def slope_into(self, logits: Tensor, block: slice, part: slice) -> Tensor:
        """See :class:`RowTerm`."""
        targets = self.targets[block][part][:, None]
        logs = logits.sub_(logits.logsumexp(1, keepdim=True))
        nll = -logs.gather(1, targets).sum()
        loss = self.nll * nll
        if self.teacher is None:
            slope = logs.exp_().mul_(self.nll)
        else:
            theirs = self.teacher.logits[part]
            theirs.sub_(theirs.logsumexp(1, keepdim=True))
            probs = theirs.exp()
            # Where the teacher has no mass, -inf times 0 is meant to be 0.
            kl = torch.where(probs > 0, probs * (theirs - logs), 0.0).sum()
            loss = loss + self.kl * kl
            self.totals[1] += kl
            slope = logs.exp_().mul_(self.nll + self.kl).sub_(probs, alpha=self.kl)
        slope.scatter_add_(1, targets, slope.new_full(targets.shape, -self.nll))
        self.totals[0] += nll
        return loss


class SparseAdvantage:
    r"""``-w sum_a s(a) A(a)`` of each row, for advantages of a few tokens.

    Args:
        indices: of tokens, ``[N, K]``, none twice in a row.
        values: their advantages, ``[N, K]``; 0 for the others.
        weight: ``w``.

    Attributes:
        totals: sums over rows of the expected advantage and of the mass on the tokens, ``[2]``.
    """

    def __init__(self, indices: Tensor, values: Tensor, *, weight: float) -> None:
        self.rows = len(indices)
        self.indices, self.values, self.weight = indices, values, weight
        self.totals = torch.zeros(2, device=indices.device)

    def load(self, block: slice) -> None:
        """Nothing to do."""

    def slope_into(self, logits: Tensor, block: slice, part: slice) -> Tensor:
        """See :class:`RowTerm`: the slope is ``-w s(a) (A(a) - E_s A)``."""
        indices = self.indices[block][part]
        values = self.values[block][part].to(logits.dtype)
        probs = logits.sub_(logits.logsumexp(1, keepdim=True)).exp_()
        mass = probs.gather(1, indices)
        gains = mass * values
        expected = gains.sum(1, keepdim=True)
        probs.mul_(self.weight * expected).scatter_add_(1, indices, -self.weight * gains)
        self.totals += torch.stack([expected.sum(), mass.sum()])
        return -self.weight * expected.sum()


class PlackettLuce:
    """:func:`steelyard.distillation.pld_loss` of each row.

    Args:
        targets: labels, ``[N]``.
        teacher: of the same rows.
        temperature: of the teacher.
        weight: of each row.
    """

    def __init__(
        self, targets: Tensor, teacher: TeacherRows, *, temperature: float, weight: float
    ) -> None:
        self.rows = len(targets)
        self.targets, self.teacher = targets, teacher
        self.temperature, self.weight = temperature, weight

    def load(self, block: slice) -> None:
        """Make the teacher's logits."""
        self.teacher.load(block)

    def slope_into(self, logits: Tensor, block: slice, part: slice) -> Tensor:
        """See :class:`RowTerm`."""
        with torch.enable_grad():
            leaf = logits.detach().clone().requires_grad_()
            loss = self.weight * pld_loss(
                leaf,
                self.teacher.logits[part],
                self.targets[block][part],
                temperature=self.temperature,
                reduction="sum",
            )
            (slope,) = torch.autograd.grad(loss, leaf)
        logits.copy_(slope)
        return loss.detach()
