r"""Plackett-Luce losses: the probability of a ranking as a chain of choices from what is left.

Source: PLD: A Choice-Theoretic List-Wise Knowledge Distillation (2025), arXiv:2506.12542.
"""

import torch
from torch import Tensor

from steelyard._checks import check_floating, check_not_empty, check_range, check_shape
from steelyard._reduce import Reduction, reduce_masked, widen
from steelyard.distillation._arguments import check_labels, check_pair
from steelyard.distillation._rankings import descending, plackett_luce


def pld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Have the student rank the true label first, and the other classes as the teacher does.

    .. math::
        \sum_{k=1}^C \alpha_k \Bigl( \log \sum_{l \ge k} e^{s_{\pi_l}} - s_{\pi_k} \Bigr),
        \qquad \alpha_k = \mathrm{softmax}(t / T)_{\pi_k}

    with :math:`\pi` the label, then the others by falling teacher logit (ties: lower class first).
    Convex in the student's logits. If the teacher is sure of a wrong class, the label's own weight
    :math:`\alpha_1` is nearly 0.

    Args:
        student_logits: ``s`` ``[B, C]``.
        teacher_logits: ``t`` ``[B, C]``; detached.
        labels: true classes ``[B]``, integers in ``[0, C)``.
        temperature: ``T`` of the weights, above 0; it changes neither the order nor the student.
        reduction: over the batch.

    Returns:
        The loss, 0-d or ``[B]``.

    Raises:
        ValueError: shapes differ, a tensor is empty, or the temperature is not positive.
        TypeError: labels are not integers, or logits not floating.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[2.0, 1.0, 0.0]])
        >>> pld_loss(student, teacher, torch.tensor([1]))
        tensor(0.4289)

    Source: arXiv:2506.12542, Sec. 4.2.
    """
    check_pair(student_logits, teacher_logits, 2)
    check_labels("labels", labels, (student_logits.shape[0],))
    check_range("temperature", temperature, above=0.0)
    teacher = widen(teacher_logits.detach())
    first = torch.zeros_like(teacher).scatter(1, labels.unsqueeze(1).long(), torch.inf)
    order = descending(teacher + first)
    weights = (teacher / temperature).softmax(1).gather(1, order)
    return plackett_luce_loss(student_logits, order, weights, reduction=reduction)


def plackett_luce_loss(
    student_logits: Tensor,
    permutation: Tensor,
    weights: Tensor,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Weighted negative log-probability of a ranking under the Plackett-Luce model.

    .. math:: \sum_k w_k \Bigl( \log \sum_{l \ge k} e^{s_{\pi_l}} - s_{\pi_k} \Bigr)

    Weights ``(1, 0, .., 0)`` give cross-entropy, ones give ListMLE, falling ones position-aware
    ListMLE. O(C) time and memory, without a sort.

    Args:
        student_logits: ``s`` ``[B, C]``.
        permutation: ``permutation[b, k]`` is the class at rank ``k``; each row holds every class
            once (not checked).
        weights: ``[B, C]``, ``weights[b, k]`` belongs to rank ``k``; not normalised; detached.
        reduction: over the batch.

    Returns:
        The loss, 0-d or ``[B]``.

    Raises:
        ValueError: shapes differ or a tensor is empty.
        TypeError: the permutation is not integer, or the others not floating.

    Example:
        >>> logits, order = torch.tensor([[1.0, 0.0]]), torch.tensor([[1, 0]])
        >>> cross_entropy = plackett_luce_loss(logits, order, torch.tensor([[1.0, 0.0]]))
        >>> torch.allclose(cross_entropy, torch.nn.functional.cross_entropy(logits, order[:, 0]))
        True

    Source: arXiv:2506.12542, Sec. 3.2; Xia et al. (2008) for ListMLE.
    """
    check_floating(student_logits=student_logits, weights=weights)
    check_shape("student_logits", student_logits, (None, None))
    check_not_empty("student_logits", student_logits)
    check_shape("weights", weights, tuple(student_logits.shape))
    check_labels("permutation", permutation, tuple(student_logits.shape))
    ranked = widen(student_logits).gather(1, permutation.long())
    losses = plackett_luce(ranked, weights.detach().to(ranked.dtype))
    return reduce_masked(losses, None, reduction).to(student_logits.dtype)
