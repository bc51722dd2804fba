r"""Losses that the distillation methods are compared with: KD and DIST.

Sources: Hinton et al. (2015), arXiv:1503.02531; Huang et al. (2022), arXiv:2205.10536; both as
written in arXiv:2506.12542.
"""

import torch
from torch import Tensor
from torch.nn import functional

from steelyard._checks import check_range
from steelyard._reduce import widen
from steelyard.distillation._arguments import check_labels, check_pair


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.1,
    temperature: float = 2.0,
) -> Tensor:
    r"""Mix cross-entropy and the KL divergence from the teacher at a temperature.

    .. math:: \alpha\, \mathrm{CE}(y, s) + (1 - \alpha)\, T^2\,
        \mathrm{KL}(\mathrm{softmax}(t / T) \,\|\, \mathrm{softmax}(s / T))

    Args:
        student: logits ``[B, C]``.
        teacher: logits ``[B, C]``; detached.
        labels: ``[B]``, integers.
        alpha: weight of the labels, in [0, 1].
        temperature: ``T``, above 0.

    Returns:
        The batch mean, 0-d.

    Raises:
        ValueError: a shape or number does not fit.
        TypeError: a dtype does not fit.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0]])
        >>> kd_loss(logits, logits, torch.tensor([1]), alpha=0.0)
        tensor(0.)

    Source: arXiv:1503.02531; constants of arXiv:2506.12542.
    """
    check_pair(student, teacher, 2, names=("student", "teacher"))
    check_labels("labels", labels, (student.shape[0],))
    check_range("alpha", alpha, at_least=0.0, at_most=1.0)
    check_range("temperature", temperature, above=0.0)
    wide, target = widen(student), widen(teacher.detach())
    hard = functional.cross_entropy(wide, labels.long())
    soft = functional.kl_div(
        (wide / temperature).log_softmax(1),
        (target / temperature).log_softmax(1),
        log_target=True,
        reduction="batchmean",
    )
    return (alpha * hard + (1 - alpha) * temperature**2 * soft).to(student.dtype)


def dist_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    beta: float,
    gamma: float,
    temperature: float = 1.0,
) -> Tensor:
    r"""Match correlations with the teacher's probabilities, within items and within classes.

    .. math:: \alpha\, \mathrm{CE}(y, s) + \beta\, \tfrac1B \sum_i (1 - \rho(p_i, q_i))
        + \gamma\, \tfrac1C \sum_c (1 - \rho(p_{\cdot c}, q_{\cdot c}))

    with :math:`\rho` Pearson's correlation; a constant row or column counts as uncorrelated.

    Args:
        student: logits ``[B, C]``.
        teacher: logits ``[B, C]``; detached.
        labels: ``[B]``, integers.
        alpha: weight of the labels, at least 0.
        beta: weight of the rows (items), at least 0.
        gamma: weight of the columns (classes), at least 0.
        temperature: of both softmaxes, above 0; no factor ``T**2``.

    Returns:
        0-d.

    Raises:
        ValueError: a shape or number does not fit.
        TypeError: a dtype does not fit.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]])
        >>> dist_loss(logits, logits, torch.tensor([1, 2]), alpha=0, beta=1, gamma=1).abs() < 1e-6
        tensor(True)

    Source: arXiv:2205.10536.
    """
    check_pair(student, teacher, 2, names=("student", "teacher"))
    check_labels("labels", labels, (student.shape[0],))
    for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
        check_range(name, value, at_least=0.0)
    check_range("temperature", temperature, above=0.0)
    wide, target = widen(student), widen(teacher.detach())
    hard = functional.cross_entropy(wide, labels.long())
    p, q = (wide / temperature).softmax(1), (target / temperature).softmax(1)
    rows, columns = 1 - _pearson(p, q, 1), 1 - _pearson(p, q, 0)
    return (alpha * hard + beta * rows.mean() + gamma * columns.mean()).to(student.dtype)


def _pearson(a: Tensor, b: Tensor, dim: int) -> Tensor:
    a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
    cross, scale = (a * b).sum(dim), a.square().sum(dim) * b.square().sum(dim)
    constant = scale == 0  # and not "> 0", which would hide a NaN
    return torch.where(constant, 0.0, cross / torch.where(constant, 1.0, scale).sqrt())
