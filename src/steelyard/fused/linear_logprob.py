r"""Log-probabilities and entropies of a linear head, without its logits.

The vocabulary is walked in tiles: the forward pass keeps a running maximum and two running sums
for each row, the backward pass makes each tile again and turns it into a slope in place. That costs
four matrix products where autograd on full logits costs three, and no ``[N, V]`` array, whose
allocation and passes through memory cost more unless ``D`` is large.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from steelyard._checks import check_integer_dtype, check_shape
from steelyard.fused._blocks import (
    LOG_ZERO,
    Head,
    add_product,
    check_chunk_size,
    check_head,
    gradient_buffer,
    tile_shape,
)
from steelyard.fused._compile import run_eagerly


class LinearLogprobs(NamedTuple):
    """What :func:`linear_logprobs` returns."""

    logprobs: Tensor
    """Log-probability of each target, shape ``[N]``."""
    entropy: Tensor
    """Entropy of each row's distribution in nats, shape ``[N]``."""


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> LinearLogprobs:
    r"""Log-probability of each target and entropy of each row, never holding ``[N, V]``.

    .. math::
        z = (h W^\top + b) / \tau, \qquad
        \log \pi_n = z_{n, y_n} - \log \sum_v e^{z_{nv}}, \qquad
        H_n = -\sum_v \pi_{nv} \log \pi_{nv}

    Both results are differentiable once, in ``hidden``, ``weight`` and ``bias``. Extra memory is
    ``O(chunk_size * V)`` at most, beside the gradients themselves.

    Args:
        hidden: last hidden states, shape ``[N, D]``; ``N = 0`` is allowed.
        weight: the head, shape ``[V, D]``.
        targets: integers in ``[0, V)``, shape ``[N]``.
        bias: shape ``[V]``; ``-inf`` excludes an entry, one at least must stay finite.
        temperature: divides the logits, > 0.
        chunk_size: rows worked on at a time; ``None`` picks a bounded number.

    Returns:
        ``logprobs``, shape ``[N]``, at most 0; ``entropy``, shape ``[N]``, in ``[0, log V]`` nats.
        Half precision is computed in float32 and returned in the input dtype.

    Raises:
        TypeError: a tensor is not floating point, ``targets`` or ``chunk_size`` not an integer.
        ValueError: shapes differ, a target is outside ``[0, V)``, ``temperature <= 0`` or
            ``chunk_size < 1``.

    Example:
        The same as ``log_softmax`` and ``gather``, with gradients:

        >>> hidden = torch.tensor([[1.0, 0.0], [0.0, 2.0]], requires_grad=True)
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> logprobs, entropy = linear_logprobs(hidden, weight, torch.tensor([0, 2]))
        >>> plain = (hidden @ weight.T).log_softmax(-1)[[0, 1], [0, 2]]
        >>> torch.allclose(logprobs, plain)
        True
        >>> logprobs.sum().backward()
        >>> hidden.grad
        tensor([[ 0.1554, -0.5777],
                [ 0.4683,  0.0634]])

    Source: the running log-sum-exp is that of Milakov and Gimelshein (2018), arXiv:1805.02867.
    """
    check_head("", hidden, weight, bias, temperature)
    check_chunk_size(chunk_size)
    _check_targets(targets, hidden.shape[0])
    logprobs, entropy, _ = run_eagerly(
        _LinearLogprobs.apply, hidden, weight, bias, targets, temperature, chunk_size
    )
    return LinearLogprobs(logprobs, entropy)


class _LinearLogprobs(Function):
    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        _check_target_values(targets, weight.shape[0])
        head = Head(hidden, weight, bias, temperature)
        logprobs, entropy, log_total = _statistics(head, targets, chunk_size)
        state = torch.stack((entropy, log_total))
        return logprobs.to(head.dtype), entropy.to(head.dtype), state

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, bias, targets, ctx.temperature, ctx.chunk_size = inputs
        ctx.save_for_backward(hidden, weight, bias, targets, output[2])
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, (entropy, log_total) = ctx.saved_tensors
        head = Head(hidden, weight, bias, ctx.temperature)
        d_logprobs, d_entropy = (None if d is None else d.to(head.work_dtype) for d in upstream[:2])
        if d_logprobs is None:
            d_logprobs = torch.zeros_like(log_total)
        slope = _Slope(targets, log_total, entropy, d_logprobs, d_entropy)
        grads = _gradients(head, slope, ctx.chunk_size, ctx.needs_input_grad[:3])
        return (*grads, None, None, None)


def _statistics(
    head: Head, targets: Tensor, chunk_size: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    # Log-probability, entropy and log-sum-exp of each row. With m the running maximum,
    # s = sum exp(z - m) and u = sum (z - m) exp(z - m): log-sum-exp = m + log s, H = log s - u/s.
    rows, columns = tile_shape(head, chunk_size)
    maximum = head.full(head.num_rows, LOG_ZERO)
    total, moment = torch.zeros_like(maximum), torch.zeros_like(maximum)
    target_logit = torch.full_like(maximum, LOG_ZERO)
    buffer, scratch = head.empty(2, rows * columns)
    for here, weight in head.column_blocks(columns):
        for row, hidden in head.row_blocks(rows):
            z = _tile(buffer, hidden, weight)
            head.logits_into(z, hidden, weight, here)
            _lift_infinities(z, head)
            inside, position = _locate(targets[row], here)
            found = z.gather(1, position[:, None])[:, 0]
            target_logit[row] = torch.where(inside, found, target_logit[row])

            larger = torch.maximum(maximum[row], z.amax(1))
            e = torch.exp(z.sub_(larger[:, None]), out=_tile(scratch, hidden, weight))
            shift = maximum[row] - larger
            decay = shift.exp()
            moment[row] = decay * (moment[row] + total[row] * shift) + (z.mul_(e)).sum(1)
            total[row] = decay * total[row] + e.sum(1)
            maximum[row] = larger
    log_sum = total.log()
    logprobs = target_logit - maximum - log_sum
    logprobs = torch.where(target_logit > LOG_ZERO, logprobs, target_logit * torch.inf)
    return logprobs, (log_sum - moment / total).clamp(min=0.0), maximum + log_sum


class _Slope(NamedTuple):
    # d loss / d logits = a (onehot - pi) - b pi (log pi + H), a and b the upstream gradients.
    targets: Tensor
    log_total: Tensor
    entropy: Tensor
    d_logprobs: Tensor
    d_entropy: Tensor | None

    def into(self, z: Tensor, scratch: Tensor, row: slice, here: slice) -> None:
        """Turn a tile of logits into the slope of the loss in them."""
        log_pi = z.sub_(self.log_total[row, None])
        if self.d_entropy is None:
            z.exp_().mul_(-self.d_logprobs[row, None])
        else:
            b = self.d_entropy[row, None]
            pi = torch.exp(log_pi, out=scratch)
            offset = self.d_logprobs[row, None] + b * self.entropy[row, None]
            log_pi.mul_(-b).sub_(offset).mul_(pi)
        inside, position = _locate(self.targets[row], here)
        z.scatter_add_(1, position[:, None], self.d_logprobs[row, None] * inside[:, None])


def _gradients(
    head: Head, slope: _Slope, chunk_size: int | None, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    rows, columns = tile_shape(head, chunk_size)
    scale = 1.0 / head.temperature
    buffer, scratch = head.empty(2, rows * columns)
    num_rows, work = head.num_rows, head.work_dtype
    d_hidden = gradient_buffer(head.hidden, work, rows=num_rows) if needs[0] else None
    d_weight = gradient_buffer(head.weight, head.weight.dtype, rows=num_rows) if needs[1] else None
    d_bias = head.full(head.vocabulary, 0.0) if needs[2] else None
    for here, weight in head.column_blocks(columns):
        d_tile = None if d_weight is None else d_weight[here].to(work)
        for row, hidden in head.row_blocks(rows):
            z = _tile(buffer, hidden, weight)
            head.logits_into(z, hidden, weight, here)
            _lift_infinities(z, head)
            slope.into(z, _tile(scratch, hidden, weight), row, here)
            if d_hidden is not None:
                add_product(d_hidden[row], z, weight, scale=scale, first=here.start == 0)
            if d_tile is not None:
                add_product(d_tile, z.T, hidden, scale=scale, first=row.start == 0)
            if d_bias is not None:
                d_bias[here].add_(z.sum(0), alpha=scale)
        if d_weight is not None and d_tile is not None and d_weight.dtype != d_tile.dtype:
            d_weight[here] = d_tile
    return (
        None if d_hidden is None else d_hidden.to(head.hidden.dtype),
        d_weight,
        None if d_bias is None or head.bias is None else d_bias.to(head.bias.dtype),
    )


def _tile(buffer: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    rows, columns = hidden.shape[0], weight.shape[0]
    return buffer[: rows * columns].view(rows, columns)


def _lift_infinities(z: Tensor, head: Head) -> None:
    # Only a bias brings -inf in.
    if head.bias is not None:
        z.clamp_(min=LOG_ZERO)


def _locate(targets: Tensor, here: slice) -> tuple[Tensor, Tensor]:
    # Which targets lie in these columns, and where; the others point at a column inside, too.
    inside = (targets >= here.start) & (targets < here.stop)
    return inside, (targets - here.start).clamp(0, here.stop - here.start - 1).long()


def _check_targets(targets: Tensor, rows: int) -> None:
    check_shape("targets", targets, (rows,))
    check_integer_dtype(targets=targets)


def _check_target_values(targets: Tensor, vocabulary: int) -> None:
    if targets.numel() and bool(((targets < 0) | (targets >= vocabulary)).any()):
        low, high = (int(end) for end in targets.aminmax())
        raise ValueError(f"targets must be in [0, {vocabulary}), got values in [{low}, {high}]")
