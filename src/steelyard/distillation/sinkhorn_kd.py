r"""Distillation by transport: move a batch of student outputs onto the teacher's.

Source: Cui et al. (2024), Sinkhorn Distance Minimization for Knowledge Distillation,
arXiv:2402.17110.
"""

from typing import Literal

import torch
from torch import Tensor

from steelyard._checks import check_choice, check_count, check_range
from steelyard._reduce import widen
from steelyard.distillation._arguments import check_pair
from steelyard.divergences import sinkhorn_plan


def sinkhorn_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 2.0,
    epsilon: float = 0.1,
    num_iterations: int = 20,
    p: float = 1,
    gradient: Literal["unroll", "detach"] = "unroll",
) -> Tensor:
    r"""Cost of transporting the student's distributions onto the teacher's, over the whole batch.

    .. math::
        \sum_{ij} P_{ij} D_{ij}, \qquad D_{ij} = \|p_i - q_j\|_p, \qquad
        P = \text{rows, then columns of } e^{-D/\epsilon} \text{ scaled to 1, } n \text{ times}

    Columns of ``P`` sum to 1, so the loss grows with the batch: divide by ``B`` to compare. It does
    not see which student output belongs to which teacher output: permuting the rows of either
    leaves it as it is, so it needs a paired loss beside it.

    Args:
        student_logits: ``[B, C]``. For sequences, drop padded positions and flatten first.
        teacher_logits: ``[B, C]``; detached.
        temperature: of both softmaxes, above 0.
        epsilon: entropic regularisation in units of the cost, above 0.
        num_iterations: ``n``, at least 1.
        p: order of the norm, at least 1.
        gradient: ``"unroll"`` differentiates through the iterations, ``"detach"`` holds the plan
            constant: cheaper, and another gradient (the term through the plan is left out).

    Returns:
        0-d.

    Raises:
        ValueError: a shape, a number or ``gradient`` does not fit.
        TypeError: logits are not floating.

    Example:
        A batch of one is the norm itself; permuting the teacher's rows changes nothing.

        >>> student, teacher = torch.tensor([[0.0, 2.0], [1.0, 0.0]]), torch.eye(2)
        >>> single = sinkhorn_kd_loss(student[:1], teacher[:1], temperature=1.0)
        >>> gap = (student[:1].softmax(1) - teacher[:1].softmax(1)).abs().sum()
        >>> torch.allclose(single, gap)
        True
        >>> swapped = sinkhorn_kd_loss(student, teacher.flip(0))
        >>> torch.allclose(sinkhorn_kd_loss(student, teacher), swapped)
        True

    Source: arXiv:2402.17110, batch-wise form; its constant factor 0.001 is left out.
    """
    check_pair(student_logits, teacher_logits, 2)
    check_choice("gradient", gradient, ("unroll", "detach"))
    check_range("temperature", temperature, above=0.0)
    check_range("epsilon", epsilon, above=0.0)
    check_count("num_iterations", num_iterations)
    check_range("p", p, at_least=1.0)
    student, teacher = widen(student_logits), widen(teacher_logits.detach())
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    student, teacher = ((x.to(dtype) / temperature).softmax(1) for x in (student, teacher))
    cost = torch.cdist(student, teacher, p=float(p))
    if gradient == "detach":
        plan = sinkhorn_plan(cost.detach(), epsilon, num_iterations=num_iterations)
    else:
        plan = sinkhorn_plan(cost, epsilon, num_iterations=num_iterations)
    mass = student.shape[0]  # the plan has total mass 1
    return (mass * (plan * cost).sum()).to(student_logits.dtype)
