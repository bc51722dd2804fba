r"""Self-supervised losses on two views: SimCLR, MoCo, SimSiam and Barlow Twins.

The forms that libraries and the papers' own experiments use. All but Barlow Twins work on cosines,
so the length of an embedding does not matter.

Source: Table 1 of Wang et al. (2024), Adaptive Multi-head Contrastive Learning, ECCV,
arXiv:2310.05615, and the papers named at each function.
"""

import torch
from torch import Tensor

from steelyard._checks import (
    check_floating,
    check_not_empty,
    check_range,
    check_same_dtype,
    check_same_shape,
    check_shape,
)
from steelyard._reduce import Reduction, reduce_masked, widen
from steelyard.metric_learning._unit_rows import cosines, products, unit_rows

__all__ = ["barlow_twins_loss", "moco_loss", "simclr_loss", "simsiam_loss"]


def simclr_loss(
    z_a: Tensor, z_b: Tensor, *, temperature: float = 0.5, reduction: Reduction = "mean"
) -> Tensor:
    r"""Tell the other view of an item from all other views in the batch (NT-Xent).

    Over the ``2B`` views, with :math:`p(i)` the other view of :math:`i` and cosines :math:`s`,

    .. math:: \ell_i = -s_{i, p(i)} / \tau + \log \sum_{k \ne i} e^{s_{ik} / \tau}

    The positive is in the denominator, as in every implementation; the printed formula of the
    AMCL paper leaves it out, see ``include_positive`` of :func:`moco_loss`.

    Args:
        z_a: first views, ``[B, D]``, ``B >= 2``.
        z_b: second views, ``[B, D]``.
        temperature: > 0.
        reduction: over the ``2B`` anchors, those of ``z_a`` first.

    Returns:
        0-d, or ``[2B]`` for ``"none"``; dtype of ``z_a``. Gather the views of all devices first.

    Raises:
        ValueError: shapes differ, fewer than two items, ``temperature <= 0``.
        TypeError: not floating point.

    Example:
        Views that are all alike cannot be told apart, at any temperature:

        >>> import torch
        >>> same = torch.ones(4, 3)
        >>> simclr_loss(same, same, temperature=0.1), torch.tensor(7.0).log()
        (tensor(1.9459), tensor(1.9459))

    Source: Chen et al. (2020), Eq. 1, arXiv:2002.05709.
    """
    _check_views(z_a=z_a, z_b=z_b)
    check_range("temperature", temperature, above=0.0)
    if len(z_a) < 2:
        raise ValueError(f"z_a must hold at least two items, got shape {list(z_a.shape)}")
    unit_a, unit_b = unit_rows(z_a), unit_rows(z_b)
    views = torch.cat((unit_a, unit_b))
    logits = products(views, views) / temperature
    itself = torch.eye(len(views), dtype=torch.bool, device=views.device)
    total = logits.masked_fill(itself, -torch.inf).logsumexp(-1)
    positive = (unit_a * unit_b).sum(-1).repeat(2) / temperature
    return reduce_masked((total - positive).to(z_a.dtype), None, reduction)


def moco_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    temperature: float = 0.1,
    include_positive: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Tell the key of a query from the keys of earlier batches (InfoNCE).

    .. math::
        \ell = -s_+ / \tau + \log \Big( e^{s_+ / \tau} + \sum_{j=1}^M e^{s_j / \tau} \Big)

    Args:
        query: ``[B, D]``.
        key: the other views through the slow encoder, ``[B, D]``; detached.
        queue: earlier keys, ``[M, D]``; detached. Enqueue the new keys after the loss.
        temperature: > 0.
        include_positive: false drops :math:`e^{s_+/\tau}` from the denominator: the formula as
            printed in the AMCL paper. It then needs ``M >= 1`` and may be negative.
        reduction: over the ``B`` queries.

    Returns:
        0-d, or ``[B]`` for ``"none"``; dtype of ``query``.

    Raises:
        ValueError: shapes differ, empty input, ``temperature <= 0``.
        TypeError: not floating point.

    Example:
        An empty queue leaves nothing to confuse the key with:

        >>> import torch
        >>> query, key = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
        >>> moco_loss(query, key, torch.empty(0, 2))
        tensor(0.)
        >>> moco_loss(query, key, torch.tensor([[1.0, -1.0]])) == torch.tensor(2.0).log()
        tensor(True)

    Source: He et al. (2020), Eq. 1, arXiv:1911.05722; Wang et al. (2024), Eq. 1.1 and 1.4,
    arXiv:2310.05615.
    """
    _check_views(query=query, key=key)
    check_floating(queue=queue)
    check_shape("queue", queue, (None, query.shape[1]))
    check_range("temperature", temperature, above=0.0)
    if not include_positive:
        check_not_empty("queue", queue)
    unit = unit_rows(query)
    positive = cosines(query, key.detach())[:, None] / temperature
    negative = products(unit, unit_rows(queue.detach()).to(unit.dtype)) / temperature
    candidates = torch.cat((positive, negative), -1) if include_positive else negative
    loss = candidates.logsumexp(-1) - positive.squeeze(-1)
    return reduce_masked(loss.to(query.dtype), None, reduction)


def simsiam_loss(
    p_a: Tensor, p_b: Tensor, z_a: Tensor, z_b: Tensor, *, reduction: Reduction = "mean"
) -> Tensor:
    r"""Align the prediction from each view with the projection of the other.

    .. math:: \ell = -\tfrac12 \cos(p_a, \mathrm{sg}[z_b]) - \tfrac12 \cos(p_b, \mathrm{sg}[z_a])

    Args:
        p_a: predictor output for the first views, ``[B, D]``.
        p_b: for the second views, ``[B, D]``.
        z_a: projection of the first views, ``[B, D]``; detached, or the encoder collapses.
        z_b: of the second views, ``[B, D]``; detached.
        reduction: over the ``B`` items.

    Returns:
        In [-1, 1]; 0-d, or ``[B]`` for ``"none"``; dtype of ``p_a``.

    Raises:
        ValueError: shapes differ or empty input.
        TypeError: not floating point.

    Example:
        >>> import torch
        >>> p, z = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0]])
        >>> simsiam_loss(p, p, z, z), simsiam_loss(p, p, z, -z)
        (tensor(-1.), tensor(0.))

    Source: Chen and He (2021), Eq. 4, arXiv:2011.10566.
    """
    _check_views(p_a=p_a, p_b=p_b, z_a=z_a, z_b=z_b)
    loss = -0.5 * (cosines(p_a, z_b.detach()) + cosines(p_b, z_a.detach()))
    return reduce_masked(loss.to(p_a.dtype), None, reduction)


def barlow_twins_loss(
    z_a: Tensor,
    z_b: Tensor,
    *,
    redundancy: float = 5e-3,
    unbiased: bool = False,
    eps: float = 1e-12,
) -> Tensor:
    r"""Bring the cross-correlation of two views to the identity.

    .. math::
        C = \tfrac1B \hat z_a^\top \hat z_b, \qquad
        L = \sum_l (1 - C_{ll})^2 + \lambda \sum_{l \ne m} C_{lm}^2

    with each feature standardised over the batch.

    Args:
        z_a: first views, ``[B, D]``, ``B >= 2``.
        z_b: second views, ``[B, D]``.
        redundancy: :math:`\lambda`, >= 0.
        unbiased: true standardises with the variance divided by ``B - 1`` while ``C`` is divided
            by ``B``, as in the released AMCL code; then :math:`|C_{ll}| \le (B - 1) / B`.
        eps: added to the variance, >= 0. With 0 a constant feature gives NaN.

    Returns:
        0-d, the sum over the features; dtype of ``z_a``. Gather the views of all devices first.

    Raises:
        ValueError: shapes differ, fewer than two items, a setting out of range.
        TypeError: not floating point.

    Example:
        White features, equal in both views: nothing to correct, whatever their scale.

        >>> import torch
        >>> white = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> barlow_twins_loss(white, 5 * white + 3)
        tensor(0.)
        >>> barlow_twins_loss(white, white, unbiased=True)  # 2 (1 - 3/4)^2
        tensor(0.1250)

    Source: Zbontar et al. (2021), Eq. 1, arXiv:2103.03230.
    """
    _check_views(z_a=z_a, z_b=z_b)
    check_same_dtype(z_a=z_a, z_b=z_b)
    check_range("redundancy", redundancy, at_least=0.0)
    check_range("eps", eps, at_least=0.0)
    if len(z_a) < 2:
        raise ValueError(f"z_a must hold at least two items, got shape {list(z_a.shape)}")
    correlation = cross_correlation(z_a, z_b, unbiased=unbiased, eps=eps)
    diagonal = correlation.diagonal()
    itself = torch.eye(len(diagonal), dtype=torch.bool, device=diagonal.device)
    off_diagonal = correlation.masked_fill(itself, 0.0)
    loss = (1 - diagonal).square().sum() + redundancy * off_diagonal.square().sum()
    return loss.to(z_a.dtype)


def cross_correlation(z_a: Tensor, z_b: Tensor, *, unbiased: bool, eps: float) -> Tensor:
    """Return ``C``, ``[D, D]``, in float32 or better."""
    a, b = (_standardised(z, unbiased=unbiased, eps=eps) for z in (z_a, z_b))
    return products(a.mT, b.mT) / len(a)


def _standardised(z: Tensor, *, unbiased: bool, eps: float) -> Tensor:
    centred = widen(z)
    centred = centred - centred.mean(0)
    variance = centred.square().sum(0) / (len(z) - (1 if unbiased else 0))
    return centred / (variance + eps).sqrt()


def _check_views(**views: Tensor) -> None:
    check_floating(**views)
    name, first = next(iter(views.items()))
    check_shape(name, first, (None, None))
    check_same_shape(**views)
    check_not_empty(name, first)
