r"""Distillation from an aligned teacher: DCKD on preference pairs, ADPA by token advantages.

Source: Gao et al. (2025), Advantage-Guided Distillation for Preference Alignment in Small Language
Models, arXiv:2502.17927.
"""

import torch
from torch import Tensor

from steelyard._checks import (
    check_count,
    check_floating,
    check_mask,
    check_not_empty,
    check_range,
    check_same_shape,
    check_shape,
)
from steelyard._reduce import Aggregate, aggregate_tokens, fill_masked, reduce_masked, widen
from steelyard.distillation._arguments import check_labels


def dckd_loss(
    student_chosen: Tensor,
    student_rejected: Tensor,
    teacher_chosen: Tensor,
    teacher_rejected: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    *,
    alpha: float,
    mask_chosen: Tensor | None = None,
    mask_rejected: Tensor | None = None,
) -> Tensor:
    r"""Fine-tune on chosen responses, and follow the teacher on chosen and on rejected ones.

    .. math:: \mathrm{NLL}(y_w) + \alpha \left[ \mathrm{KD}(y_w) + \mathrm{KD}(y_l) \right], \qquad
        \mathrm{KD}(y) = \tfrac1{|y|} \sum_t \mathrm{KL}(\text{teacher}_t \| \text{student}_t)

    Args:
        student_chosen: logits ``[B, T, V]``; those at ``t`` score token ``t``.
        student_rejected: logits ``[B, T', V]``.
        teacher_chosen: of the aligned teacher ``[B, T, V]``; detached.
        teacher_rejected: ``[B, T', V]``; detached.
        chosen_tokens: ``[B, T]``, integers; ignored where masked.
        rejected_tokens: ``[B, T']``; only its shape is used.
        alpha: weight of the two divergences, at least 0.
        mask_chosen: ``[B, T]``, true = counts.
        mask_rejected: ``[B, T']``.

    Returns:
        0-d; each of the three terms is a mean over the tokens that count.

    Raises:
        ValueError: a shape or number does not fit.
        TypeError: a dtype does not fit.

    Example:
        A student equal to its teacher pays for the tokens alone.

        >>> logits, tokens = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]]), torch.tensor([[0, 1]])
        >>> loss = dckd_loss(logits, logits, logits, logits, tokens, tokens, alpha=5.0)
        >>> torch.allclose(loss, torch.nn.functional.cross_entropy(logits[0], tokens[0]))
        True

    Source: arXiv:2502.17927, DCKD.
    """
    check_range("alpha", alpha, at_least=0.0)
    check_floating(
        student_chosen=student_chosen,
        student_rejected=student_rejected,
        teacher_chosen=teacher_chosen,
        teacher_rejected=teacher_rejected,
    )
    check_same_shape(student_chosen=student_chosen, teacher_chosen=teacher_chosen)
    check_same_shape(student_rejected=student_rejected, teacher_rejected=teacher_rejected)
    check_labels("rejected_tokens", rejected_tokens, tuple(student_rejected.shape[:-1]))
    nll = _mean_nll(student_chosen, chosen_tokens, mask_chosen, "chosen")
    chosen = _mean_kl(teacher_chosen, student_chosen, mask_chosen, "chosen")
    rejected = _mean_kl(teacher_rejected, student_rejected, mask_rejected, "rejected")
    return (nll + alpha * (chosen + rejected)).to(student_chosen.dtype)


def teacher_advantage(
    dpo_logits: Tensor, ref_logits: Tensor, *, top_k: int | None = None
) -> Tensor:
    r"""Advantage of every next token, from a teacher before and after alignment.

    .. math:: A(s, a) = \log \pi_{\text{dpo}}(a | s) - \log \pi_{\text{ref}}(a | s) = Q(s, a) - V(s)

    in units of the teacher's ``beta``, with ``V`` the soft value: it is not centred under either
    teacher.

    Args:
        dpo_logits: of the aligned teacher ``[.., V]``.
        ref_logits: of the same teacher before alignment ``[.., V]``.
        top_k: keep the advantages of the aligned teacher's ``top_k`` likeliest tokens (ties: lower
            index first), 0 elsewhere; ``None`` keeps all. Both sides are normalised over the whole
            vocabulary first.

    Returns:
        ``[.., V]``, without gradient. Signed and unbounded: outliers live in the tail, which
        ``top_k`` cuts. A token that both teachers exclude (``-inf``) gets 0.

    Raises:
        ValueError: shapes differ, or ``top_k`` is below 1.
        TypeError: logits are not floating.

    Example:
        >>> dpo, ref = torch.tensor([0.8, 0.2]).log(), torch.tensor([0.5, 0.5]).log()
        >>> teacher_advantage(dpo, ref)
        tensor([ 0.4700, -0.9163])
        >>> teacher_advantage(dpo, ref, top_k=1)
        tensor([0.4700, 0.0000])

    Source: arXiv:2502.17927; normalised as derived there, not from truncated probabilities.
    """
    check_floating(dpo_logits=dpo_logits, ref_logits=ref_logits)
    check_same_shape(dpo_logits=dpo_logits, ref_logits=ref_logits)
    check_not_empty("dpo_logits", dpo_logits)
    aligned = widen(dpo_logits.detach()).log_softmax(-1)
    before = widen(ref_logits.detach()).log_softmax(-1)
    excluded = (aligned == -torch.inf) & (before == -torch.inf)
    advantage = torch.where(excluded, 0.0, aligned - before)
    if top_k is not None:
        check_count("top_k", top_k)
        best = aligned.argsort(dim=-1, descending=True, stable=True)[..., :top_k]
        kept = torch.zeros_like(advantage, dtype=torch.bool).scatter(-1, best, True)
        advantage = torch.where(kept, advantage, 0.0)
    return advantage.to(dpo_logits.dtype)


def adpa_term(
    student_logits: Tensor,
    advantage: Tensor,
    *,
    mask: Tensor | None = None,
    aggregate: Aggregate = "token",
) -> Tensor:
    r"""Raise the expected advantage of the student's next token, over the whole vocabulary.

    .. math:: -\operatorname{mean}_t \sum_a \pi_\theta(a | s_t)\, A(s_t, a)

    The sum is over all actions, so the gradient :math:`-\pi_a (A_a - \mathbb{E}_\pi A)` has no
    noise from sampling one. Adding a number to all advantages of a state changes the loss by it and
    the gradient not at all. There is no optimum at the teacher: alone, the term ends at a point
    mass.

    Args:
        student_logits: ``[B, T, V]``, on the student's own responses.
        advantage: ``A`` ``[B, T, V]``; detached.
        mask: ``[B, T]``, true = counts.
        aggregate: ``"token"``, ``"sequence"`` or ``"sequence_sum"``.

    Returns:
        0-d: minus the mean.

    Raises:
        ValueError: a shape does not fit.
        TypeError: a dtype does not fit.

    Example:
        >>> student = torch.tensor([[[0.6, 0.4]]]).log()
        >>> adpa_term(student, torch.tensor([[[0.4700036, -0.9162907]]]))
        tensor(0.0845)

    Source: arXiv:2502.17927, Eq. 11.
    """
    check_floating(student_logits=student_logits, advantage=advantage)
    check_shape("student_logits", student_logits, (None, None, None))
    check_same_shape(student_logits=student_logits, advantage=advantage)
    check_not_empty("student_logits", student_logits)
    if mask is not None:
        check_mask(mask, student_logits[..., 0])
    logits, values = _keep(student_logits, mask), _keep(advantage.detach(), mask)
    expected = (logits.softmax(-1) * values).sum(-1)
    return -aggregate_tokens(expected, mask, aggregate).to(student_logits.dtype)


def adpa_loss(
    student_chosen: Tensor,
    chosen_tokens: Tensor,
    student_own: Tensor,
    advantage: Tensor,
    *,
    gamma: float = 1.0,
    mask_chosen: Tensor | None = None,
    mask_own: Tensor | None = None,
    aggregate: Aggregate = "token",
) -> Tensor:
    r"""Fine-tune on reference responses and raise the advantage on the student's own.

    .. math:: \mathrm{NLL}(y) - \gamma \operatorname{mean}_t \sum_a \pi_\theta(a | \hat y_{<t})
        A(\hat y_{<t}, a)

    Args:
        student_chosen: logits on the reference responses ``[B, T, V]``; those at ``t`` score token
            ``t``.
        chosen_tokens: ``[B, T]``, integers; ignored where masked.
        student_own: logits on responses the student wrote before training ``[B, T', V]``.
        advantage: of both teachers on those ``[B, T', V]``; see :func:`teacher_advantage`.
        gamma: weight of the advantage, at least 0.
        mask_chosen: ``[B, T]``, true = counts.
        mask_own: ``[B, T']``.
        aggregate: of the advantage term; the likelihood is a mean over tokens.

    Returns:
        0-d.

    Raises:
        ValueError: a shape or number does not fit.
        TypeError: a dtype does not fit.

    Example:
        >>> logits, tokens = torch.zeros(1, 2, 4), torch.tensor([[0, 3]])
        >>> adpa_loss(logits, tokens, logits, torch.ones(1, 2, 4), gamma=0.5)  # log 4 - 0.5
        tensor(0.8863)

    Source: arXiv:2502.17927, Eq. 11.
    """
    check_range("gamma", gamma, at_least=0.0)
    check_floating(student_chosen=student_chosen, student_own=student_own, advantage=advantage)
    check_shape("student_own", student_own, (None, None, None))
    check_not_empty("student_own", student_own)
    check_same_shape(student_own=student_own, advantage=advantage)
    check_mask(mask_own, student_own[..., 0], name="mask_own")
    nll = _mean_nll(student_chosen, chosen_tokens, mask_chosen, "chosen")
    term = adpa_term(student_own, advantage, mask=mask_own, aggregate=aggregate)
    return (nll + gamma * term).to(student_chosen.dtype)


def _mean_nll(logits: Tensor, tokens: Tensor, mask: Tensor | None, which: str) -> Tensor:
    check_shape(f"student_{which}", logits, (None, None, None))
    check_not_empty(f"student_{which}", logits)
    check_labels(f"{which}_tokens", tokens, tuple(logits.shape[:-1]))
    if mask is not None:
        check_mask(mask, tokens, name=f"mask_{which}")
        tokens = torch.where(mask != 0, tokens, 0)
    scores = _keep(logits, mask).log_softmax(-1).gather(-1, tokens.long().unsqueeze(-1))
    return reduce_masked(-scores.squeeze(-1), mask, "mean")


def _mean_kl(teacher: Tensor, student: Tensor, mask: Tensor | None, which: str) -> Tensor:
    check_shape(f"student_{which}", student, (None, None, None))
    check_not_empty(f"student_{which}", student)
    if mask is not None:
        check_mask(mask, student[..., 0], name=f"mask_{which}")
    target = _keep(teacher.detach(), mask).log_softmax(-1)
    gap = target - _keep(student, mask).log_softmax(-1)
    held = target == -torch.inf  # probability 0 costs nothing
    products = torch.where(held, 0.0, target.exp() * torch.where(held, 0.0, gap))
    return reduce_masked(products.sum(-1), mask, "mean")


def _keep(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Widen, with zeros at masked positions so that nothing there can overflow."""
    kept = None if mask is None else mask.unsqueeze(-1).expand_as(logits)
    return fill_masked(widen(logits), kept)
