r"""What :class:`~steelyard.integrations.trl.DistillationTrainer` minimises: PLD, SinKD, DCKD, ADPA.

Each takes hidden states of the tokens that count and makes logits block by block, so that neither
the student's nor a teacher's ``[B, T, V]`` exists. The formulas are those of
:mod:`steelyard.distillation`.
"""
# ruff: noqa: E402, a missing extra must be reported before its imports are tried

from steelyard._extras import require

require("trl", extra="trl")

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from steelyard._checks import check_choice, check_count, check_range
from steelyard.distillation import sinkhorn_kd_loss
from steelyard.integrations.trl._backbone import LinearHead
from steelyard.integrations.trl._row_loss import (
    LikelihoodAndDivergence,
    PlackettLuce,
    SparseAdvantage,
    TeacherRows,
    row_loss,
)
from steelyard.integrations.trl.advantage_cache import TokenAdvantages

__all__ = ["ADPA", "DCKD", "PLD", "Loss", "Objective", "Rows", "SinKD"]


@dataclass(frozen=True)
class Rows:
    """Tokens that count, one row each, by the kind of response they belong to.

    Attributes:
        hidden: the student's states that predict them, ``[N, D]`` for each kind.
        targets: the tokens, ``[N]`` for each kind.
        head: of the student.
        teacher: states ``[N, D']`` of the teacher for each kind; empty without one.
        teacher_head: its head.
        advantages: at the tokens of kind "own".
    """

    hidden: Mapping[str, Tensor]
    targets: Mapping[str, Tensor]
    head: LinearHead
    teacher: Mapping[str, Tensor]
    teacher_head: LinearHead | None = None
    advantages: TokenAdvantages | None = None

    def of_teacher(self, *kinds: str) -> TeacherRows:
        """The teacher's rows of some kinds, one after the other."""
        assert self.teacher_head is not None  # the trainer looked
        return TeacherRows(torch.cat([self.teacher[kind] for kind in kinds]), self.teacher_head)


class Loss(NamedTuple):
    """What an objective returns."""

    value: Tensor
    """0-d, differentiable."""
    parts: dict[str, Tensor]
    """For the log, 0-d each."""


class Objective(Protocol):
    """An objective of the trainer: any object with these three, such as the classes here."""

    kinds: ClassVar[tuple[str, ...]]
    """Responses it looks at, of ``"chosen"``, ``"rejected"`` and ``"own"``."""
    needs_teacher: ClassVar[bool]
    """Whether ``rows.teacher`` has to be there; advantages come from two teachers or a file."""

    def loss(self, rows: Rows) -> Loss:
        """Return the loss of a batch."""


@dataclass(frozen=True)
class DCKD:
    r"""Fine-tune on chosen responses, follow the aligned teacher on chosen and rejected ones.

    .. math:: \mathrm{NLL}(y_w) + \alpha \left[ \mathrm{KD}(y_w) + \mathrm{KD}(y_l) \right]

    with means over tokens: :func:`steelyard.distillation.dckd_loss`.

    Attributes:
        alpha: weight of the divergences, at least 0. Default 1.

    Source: Gao et al. (2025), arXiv:2502.17927.
    """

    alpha: float = 1.0
    kinds: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    needs_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, at_least=0.0, below=math.inf)

    def loss(self, rows: Rows) -> Loss:
        """See :class:`Objective`."""
        targets, teacher = rows.targets, rows.of_teacher(*self.kinds)
        chosen, rejected = (max(len(targets[kind]), 1) for kind in self.kinds)
        terms = (
            LikelihoodAndDivergence(
                targets["chosen"], nll=1 / chosen, teacher=teacher, kl=self.alpha / chosen
            ),
            LikelihoodAndDivergence(
                targets["rejected"],
                nll=0.0,
                teacher=teacher,
                first=len(targets["chosen"]),
                kl=self.alpha / rejected,
            ),
        )
        value = row_loss(torch.cat([rows.hidden[k] for k in self.kinds]), rows.head, terms)
        parts = {
            "nll": terms[0].totals[0] / chosen,
            "kl_chosen": terms[0].totals[1] / chosen,
            "kl_rejected": terms[1].totals[1] / rejected,
        }
        return Loss(value, parts)


@dataclass(frozen=True)
class ADPA:
    r"""Fine-tune on chosen responses, raise the teachers' advantage on the student's own.

    .. math:: \mathrm{NLL}(y_w) - \gamma \operatorname{mean}_t \sum_a \pi_\theta(a | \hat y_{<t})
        A(\hat y_{<t}, a)

    with means over tokens: :func:`steelyard.distillation.adpa_loss`. The term has no optimum at the
    teacher: watch ``advantage`` and ``nll`` in the log, and stop early.

    Attributes:
        gamma: weight of the advantage, at least 0. Default 1.
        top_k: advantages of the aligned teacher's likeliest tokens count, those of others are 0.
            Default 50. A small share of the student's mass on them (``mass`` in the log) says that
            it is too small.

    Source: Gao et al. (2025), Eq. 11, arXiv:2502.17927.
    """

    gamma: float = 1.0
    top_k: int = 50
    kinds: ClassVar[tuple[str, ...]] = ("chosen", "own")
    needs_teacher: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_range("gamma", self.gamma, at_least=0.0, below=math.inf)
        check_count("top_k", self.top_k)

    def loss(self, rows: Rows) -> Loss:
        """See :class:`Objective`."""
        assert rows.advantages is not None  # the trainer looked
        chosen, own = (max(len(rows.targets[kind]), 1) for kind in self.kinds)
        terms = (
            LikelihoodAndDivergence(rows.targets["chosen"], nll=1 / chosen),
            SparseAdvantage(*rows.advantages, weight=self.gamma / own),
        )
        value = row_loss(torch.cat([rows.hidden[k] for k in self.kinds]), rows.head, terms)
        parts = {
            "nll": terms[0].totals[0] / chosen,
            "advantage": terms[1].totals[0] / own,
            "mass": terms[1].totals[1] / own,
        }
        return Loss(value, parts)


@dataclass(frozen=True)
class PLD:
    r"""Rank the true token first and the others as the teacher does, at every place.

    :func:`steelyard.distillation.pld_loss`, mean over tokens. Sorts the vocabulary for each token.

    Attributes:
        temperature: of the teacher's weights, above 0. Default 1.

    Source: PLD (2025), arXiv:2506.12542.
    """

    temperature: float = 1.0
    kinds: ClassVar[tuple[str, ...]] = ("chosen",)
    needs_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("temperature", self.temperature, above=0.0, below=math.inf)

    def loss(self, rows: Rows) -> Loss:
        """See :class:`Objective`."""
        targets = rows.targets["chosen"]
        term = PlackettLuce(
            targets,
            rows.of_teacher("chosen"),
            temperature=self.temperature,
            weight=1 / max(len(targets), 1),
        )
        return Loss(row_loss(rows.hidden["chosen"], rows.head, (term,)), {})


@dataclass(frozen=True)
class SinKD:
    r"""Transport the student's next-token laws onto the teacher's, beside a paired loss.

    .. math:: \mathrm{NLL} + a\, \mathrm{KL}(\text{teacher} \| \text{student})
        + w\, \tfrac1b \langle P, D \rangle

    The transport does not see which law belongs to which, so it needs the others. It couples
    ``b`` tokens, at most ``max_rows``, evenly spaced among those of the batch, on one rank.
    :func:`steelyard.distillation.sinkhorn_kd_loss`, divided by ``b``.

    Attributes:
        weight: ``w``, at least 0. Default 0.1; as published it is 0.0008 for each token.
        kd_weight: ``a``, at least 0. Default 0.1, as published.
        temperature: of both laws in the transport, above 0.
        epsilon: entropic regularisation, in units of the cost.
        num_iterations: of the scaling.
        p: order of the norm.
        gradient: ``"unroll"`` or ``"detach"``.
        max_rows: tokens in the transport.

    Source: Cui et al. (2024), arXiv:2402.17110.
    """

    weight: float = 0.1
    kd_weight: float = 0.1
    temperature: float = 2.0
    epsilon: float = 0.1
    num_iterations: int = 20
    p: float = 1
    gradient: Literal["unroll", "detach"] = "unroll"
    max_rows: int = 128
    kinds: ClassVar[tuple[str, ...]] = ("chosen",)
    needs_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("weight", self.weight, at_least=0.0, below=math.inf)
        check_range("kd_weight", self.kd_weight, at_least=0.0, below=math.inf)
        check_choice("gradient", self.gradient, ("unroll", "detach"))
        check_range("temperature", self.temperature, above=0.0, below=math.inf)
        check_range("epsilon", self.epsilon, above=0.0, below=math.inf)
        check_count("num_iterations", self.num_iterations)
        check_count("max_rows", self.max_rows)

    def loss(self, rows: Rows) -> Loss:
        """See :class:`Objective`."""
        hidden, targets = rows.hidden["chosen"], rows.targets["chosen"]
        teacher, tokens = rows.of_teacher("chosen"), max(len(targets), 1)
        term = LikelihoodAndDivergence(
            targets, nll=1 / tokens, teacher=teacher, kl=self.kd_weight / tokens
        )
        paired = row_loss(hidden, rows.head, (term,))
        parts = {"nll": term.totals[0] / tokens, "kl": term.totals[1] / tokens}
        if len(targets) == 0:
            return Loss(paired, parts)
        number = min(len(targets), self.max_rows)
        places = torch.linspace(0, len(targets) - 1, number, device=targets.device).round().long()
        assert rows.teacher_head is not None  # as there is a teacher
        transport = sinkhorn_kd_loss(
            rows.head.logits(hidden[places]),
            rows.teacher_head.detached().logits(rows.teacher["chosen"][places]),
            temperature=self.temperature,
            epsilon=self.epsilon,
            num_iterations=self.num_iterations,
            p=self.p,
            gradient=self.gradient,
        )
        parts["transport"] = transport.detach() / number
        return Loss(paired + self.weight / number * transport, parts)
