r"""Losses that take the label for uncertain: LDR, the label-distributionally robust family.

An item costs the worst weighted average of its label gaps, less a temperature times how far the
weights are from uniform:

.. math::
    \psi_\lambda(f, y) = \max_p \sum_k p_k \delta_k - \lambda\,\mathrm{KL}(p \,\|\, 1/K), \qquad
    \delta_k = f_k - f_y + c\,[k \ne y]

At :math:`\lambda = 0` that is the hinge of the multi-class support vector machine, at 1 it is
cross-entropy (less :math:`\log K`), at infinity a linear, symmetric loss that uniform label noise
does not bias. The adaptive form, ALDR, lets each item choose its temperature.

A network can undo a temperature by scaling its logits. Pass them through :func:`normalize_logits`
if the temperature is to mean something.

Source: Zhu, Ying, Yang (2023), Label Distributionally Robust Losses for Multi-class Classification:
Consistency, Robustness and Adaptivity, arXiv:2112.14869.
"""

import math
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from steelyard._checks import check_choice, check_count, check_floating, check_range
from steelyard._reduce import Reduction, accumulation_dtype, reduce_masked
from steelyard.classification._capped import CappedMaximum, can_cap_quickly
from steelyard.classification._labels import (
    check_logits,
    checked_gaps,
    checked_values,
    label_gaps,
)
from steelyard.classification._tempered import (
    check_temperature,
    limit,
    soft_maximum,
    soft_weights,
)

__all__ = ["ldr_loss", "ldr_weights", "normalize_logits"]


def ldr_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    margin: float = 0.1,
    top_k: int = 1,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Lower the worst weighted average of the label gaps.

    .. math::
        \psi = \max_{p \in \Omega(k)} \sum_j p_j \delta_j - \lambda \sum_j p_j \log(K p_j), \qquad
        \Omega(k) = \{0 \le p_j \le 1/k,\ \textstyle\sum_j p_j = 1\}

    For ``top_k = 1`` this is :math:`\lambda \log \frac1K \sum_j e^{\delta_j/\lambda}`, without a
    margin :math:`\lambda\,(\mathrm{CE}(f/\lambda, y) - \log K)`. Larger k caps the weights; the
    capped optimum is found exactly from the k largest gaps. The gradient in the logits is
    :math:`p - \mathrm{onehot}(y)`. The value may be negative and is not clamped.

    ========================== ================= ========= ==========
    loss                       ``temperature``   ``top_k`` ``margin``
    ========================== ================= ========= ==========
    cross-entropy - log K      1                 1         0
    Crammer-Singer hinge       0                 1         > 0
    top-k hinge                0                 k         > 0
    symmetric linear loss      inf               any       any
    ========================== ================= ========= ==========

    Args:
        logits: ``[B, K]``, K >= 2; not normalised here, see :func:`normalize_logits`.
        labels: integer classes, ``[B]``, in ``[0, K)``.
        temperature: :math:`\lambda` in [0, inf]; both ends are the exact limits.
        margin: ``c`` >= 0, added to every gap but that of the label.
        top_k: k in 1 to K; K gives the mean gap at every temperature.
        mask: ``[B]``, true = counts.
        reduction: over items.

    Returns:
        0-d or ``[B]``, dtype of ``logits``.

    Raises:
        ValueError: wrong shapes, empty input, a label outside ``[0, K)``, or a setting out of
            range.
        TypeError: ``logits`` is not floating point, ``labels`` or ``top_k`` not an integer.

    Example:
        The loss goes from the largest gap to the mean gap:

        >>> import torch
        >>> logits, labels = torch.tensor([[1.0, 3.0, -1.0]]), torch.tensor([0])
        >>> [round(float(ldr_loss(logits, labels, temperature=t, margin=0.0)), 3)
        ...  for t in (0.0, 1.0, 10.0, float("inf"))]
        [2.0, 1.044, 0.133, 0.0]

    Source: Zhu et al. (2023), Sec. 4, arXiv:2112.14869; the solution for ``top_k > 1`` is derived.
    """
    scores, index = checked_values(logits, labels, margin, mask)
    _check_setting(scores, temperature, top_k)
    if _is_capped(scores, temperature, top_k) and can_cap_quickly(scores):
        plain = partial(_capped_values, temperature=temperature, top_k=top_k)
        solve = partial(_capped_quickly, temperature=temperature, top_k=top_k)
        values = CappedMaximum.apply(scores, index, margin, plain, solve)  # type: ignore[no-untyped-call]
    else:
        values = _ldr_values(label_gaps(scores, index, margin), temperature, top_k)
    return reduce_masked(values.to(logits.dtype), mask, reduction)


def ldr_weights(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    margin: float = 0.1,
    top_k: int = 1,
) -> Tensor:
    r"""Return the worst-case label weights: the maximiser of :func:`ldr_loss`.

    .. math:: p_j = \min\big(1/k,\ e^{(\delta_j - \nu)/\lambda}\big), \qquad \sum_j p_j = 1

    For ``top_k = 1`` this is a softmax of the gaps. At temperature 0 it is ``1/k`` on the k largest
    gaps, and ties for the last place share it.

    Args:
        logits: ``[B, K]``, K >= 2; detached.
        labels: integer classes, ``[B]``, in ``[0, K)``.
        temperature: in [0, inf].
        margin: ``c`` >= 0.
        top_k: k in 1 to K.

    Returns:
        ``[B, K]``, rows sum to 1, dtype of ``logits``, without a gradient.

    Raises:
        ValueError: wrong shapes, empty input, a label outside ``[0, K)``, or a setting out of
            range.
        TypeError: ``logits`` is not floating point, ``labels`` or ``top_k`` not an integer.

    Example:
        A cap of one half makes the runner-up count, too:

        >>> import torch
        >>> logits, labels = torch.tensor([[0.0, 9.0, 2.0, 1.0]]), torch.tensor([0])
        >>> ldr_weights(logits, labels, temperature=0.1, top_k=1).round(decimals=3)
        tensor([[0., 1., 0., 0.]])
        >>> ldr_weights(logits, labels, temperature=0.1, top_k=2).round(decimals=3)
        tensor([[0.0000, 0.5000, 0.5000, 0.0000]])

    Source: Zhu et al. (2023), Sec. 4, arXiv:2112.14869; for ``top_k > 1`` derived.
    """
    check_floating(logits=logits)
    gaps = checked_gaps(logits.detach(), labels, margin, None)
    _check_setting(gaps, temperature, top_k)
    return _ldr_weights(gaps, temperature, top_k).to(logits.dtype)


def normalize_logits(logits: Tensor, *, kind: Literal["softplus", "l1"] = "softplus") -> Tensor:
    r"""Fix the scale of each row, so that a network cannot undo the temperature of a loss.

    .. math::
        f_k \mapsto \frac{\mathrm{softplus}(f_k)}{\frac1K \sum_j \mathrm{softplus}(f_j)}
        \qquad\text{or}\qquad f_k \mapsto \frac{f_k}{\frac1K \sum_j |f_j|}

    Args:
        logits: ``[B, K]``.
        kind: ``"softplus"`` gives non-negative rows of mean 1 and is what the released code does
            for LDR, ``"l1"`` rows of mean absolute value 1, as it does for ALDR.

    Returns:
        ``[B, K]``, dtype of ``logits``, with a gradient. A row of zeros stays 0 under ``"l1"``.

    Raises:
        ValueError: wrong shape, empty input or unknown ``kind``.
        TypeError: ``logits`` is not floating point.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[1.0, -3.0], [100.0, -300.0]])
        >>> normalize_logits(logits, kind="l1")
        tensor([[ 0.5000, -1.5000],
                [ 0.5000, -1.5000]])

    Source: released code of Zhu et al. (2023); the paper does not state it.
    """
    check_logits("logits", logits, classes=1)
    check_choice("kind", kind, ("softplus", "l1"))
    values = logits.to(accumulation_dtype(logits.dtype))
    if kind == "softplus":
        # K softmax(log softplus): rows of mean 1 even where every softplus underflows.
        return (values.shape[1] * _log_softplus(values).softmax(-1)).to(logits.dtype)
    scale = values.abs().mean(-1, keepdim=True)
    return (values / scale.where(scale != 0, 1.0)).to(logits.dtype)


def _log_softplus(values: Tensor) -> Tensor:
    """Logarithm of the softplus; ``f - exp(f)/2`` far below 0, where it is that to rounding."""
    low = values < -18
    tail = values - values.where(low, -18.0).exp() / 2
    return torch.where(low, tail, functional.softplus(values.where(~low, 0.0)).log())


def _check_setting(scores: Tensor, temperature: float, top_k: int) -> None:
    check_temperature("temperature", temperature)
    check_count("top_k", top_k)
    check_range("top_k", top_k, at_most=scores.shape[1])


def _is_capped(scores: Tensor, temperature: float, top_k: int) -> bool:
    """Tell whether neither the cap nor the temperature is a limit with a form of its own."""
    return 1 < top_k < scores.shape[1] and limit(temperature, scores.dtype) is None


def _ldr_values(gaps: Tensor, temperature: float, top_k: int) -> Tensor:
    """Maximum over the capped simplex, ``[B]``; its gradient in the gaps is the maximiser."""
    if top_k == gaps.shape[1]:
        return gaps.mean(-1)
    if top_k == 1:
        return soft_maximum(gaps, temperature)
    if limit(temperature, gaps.dtype) is not None:
        return (_ldr_weights(gaps, temperature, top_k) * gaps).sum(-1)
    return _capped_values(gaps, temperature, top_k)


def _capped_values(gaps: Tensor, temperature: float, top_k: int) -> Tensor:
    top, order = gaps.topk(top_k, -1)
    _, capped, _ = _caps(gaps.detach().clone(), top.detach(), order, temperature)
    is_free = torch.arange(top_k, device=gaps.device) >= capped.unsqueeze(-1)
    free = torch.ones_like(gaps, dtype=torch.bool).scatter(-1, order, is_free)
    rest, constant = _shares(gaps, capped, temperature, top_k)
    fixed = top.where(~is_free, 0.0).sum(-1) / top_k
    return fixed + rest * soft_maximum(gaps, temperature, free) - constant


def _capped_quickly(gaps: Tensor, temperature: float, top_k: int) -> tuple[Tensor | None, Tensor]:
    """Value, ``None`` where it needs more care, and weights, which overwrite the gaps."""
    top, order = gaps.topk(top_k, -1)
    ratios, capped, totals = _caps(gaps, top, order, temperature)
    weights = _spread(ratios, top, order, capped, totals, temperature)
    mean = totals / (gaps.shape[1] - capped)
    if not bool((mean < 0.5).all()):  # its logarithm would lose digits; NaN, too
        return None, weights
    rest, constant = _shares(gaps, capped, temperature, top_k)
    is_free = torch.arange(top_k, device=gaps.device) >= capped.unsqueeze(-1)
    fixed = top.where(~is_free, 0.0).sum(-1) / top_k
    first = top.gather(-1, capped.unsqueeze(-1)).squeeze(-1)
    return fixed + rest * (first + temperature * mean.log()) - constant, weights


def _shares(gaps: Tensor, capped: Tensor, temperature: float, top_k: int) -> tuple[Tensor, Tensor]:
    """Weight of all that is not capped, and what the KL of that split costs."""
    classes = gaps.shape[1]
    rest = 1 - capped.to(gaps.dtype) / top_k
    # KL of p to uniform = KL of the capped and the free share, plus that within the free ones.
    split = rest * (classes * rest / (classes - capped)).log()
    return rest, temperature * (split + (1 - rest) * math.log(classes / top_k))


def _ldr_weights(gaps: Tensor, temperature: float, top_k: int) -> Tensor:
    """Maximiser over the capped simplex, ``[B, K]``, detached."""
    gaps = gaps.detach()
    if top_k == gaps.shape[1]:
        return torch.full_like(gaps, 1 / top_k)
    bound = limit(temperature, gaps.dtype)
    if top_k == 1 or bound == math.inf:
        return soft_weights(gaps, temperature)
    if bound == 0:
        last = gaps.topk(top_k, -1).values[:, -1:]
        above, tied = gaps > last, gaps == last
        left = (top_k - above.sum(-1, keepdim=True)) / tied.sum(-1, keepdim=True)
        return (above + tied * left).to(gaps.dtype) / top_k
    top, order = gaps.topk(top_k, -1)
    ratios, capped, totals = _caps(gaps.clone(), top, order, temperature)
    return _spread(ratios, top, order, capped, totals, temperature)


def _caps(
    gaps: Tensor, top: Tensor, order: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """How many of the largest gaps have weight ``1/k``: the least number that leaves no excess.

    With the first ``m`` capped, the next one gets ``(1 - m/k)`` times its share ``1 / w_m`` of the
    softmax over those that are left. ``w_m = 1 + exp((d_(m+1) - d_m) / T) w_(m+1)`` is built from
    its end: differences of neighbours keep the digits that a common reference would lose.

    Args:
        gaps: ``[B, K]``, overwritten.
        top: the k largest, descending.
        order: their places.
        temperature: positive and finite.

    Returns:
        ``exp((d - d_k) / T)``, 0 at the k largest but the last; the number ``m``, ``[B]``; ``w_m``.
    """
    top_k = top.shape[1]
    nothing = torch.full_like(top[:, :-1], -torch.inf)
    ratios = gaps.sub_(top[:, -1:]).div_(temperature).scatter_(-1, order[:, :-1], nothing).exp_()
    totals = [ratios.sum(-1)]
    falls = (top[:, 1:] - top[:, :-1]) / temperature
    for ratio in falls.exp().flip(-1).unbind(-1):
        totals.append(1 + ratio * totals[-1])
    left = torch.arange(1, top_k + 1, device=top.device)
    every = torch.stack(totals, -1)
    # Seen from the end, the farthest that fits; the end itself does, even if it is NaN.
    farthest = ((every >= left) * (left - 1)).amax(-1)
    return ratios, top_k - 1 - farthest, every.gather(-1, farthest.unsqueeze(-1)).squeeze(-1)


def _spread(
    ratios: Tensor,
    top: Tensor,
    order: Tensor,
    capped: Tensor,
    totals: Tensor,
    temperature: float,
) -> Tensor:
    """Weights from what :func:`_caps` returns; overwrites ``ratios``."""
    top_k = top.shape[1]
    share = ((1 - capped.to(top.dtype) / top_k) / totals).unsqueeze(-1)
    first = top.gather(-1, capped.unsqueeze(-1))
    largest = share * ((top - first).clamp(max=0) / temperature).exp()
    is_free = torch.arange(top_k, device=top.device) >= capped.unsqueeze(-1)
    largest = largest.clamp(max=1 / top_k).where(is_free, 1 / top_k)
    fall = ((top[:, -1:] - first) / temperature).exp()
    return ratios.mul_(share * fall).scatter_(-1, order, largest)
