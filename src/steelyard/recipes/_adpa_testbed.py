"""All sequences of five tokens: exact teachers, rewards and divergences for the recipe adpa."""

from typing import NamedTuple

import torch
from torch import Tensor

from steelyard.distillation import teacher_advantage
from steelyard.lab.enumeration import AllSequences
from steelyard.preference import f_dpo_loss

VOCABULARY, LENGTH, BETA = 4, 5, 0.5
GOOD, LATE, REPEATED = 1.0, 0.8, 0.7


def reward_of(tokens: Tensor) -> Tensor:
    """Token 0 is good, token 1 in the last place too; a token twice in a row is not."""
    good = (tokens == 0).sum(1) * GOOD
    return good + LATE * (tokens[:, -1] == 1) - REPEATED * (tokens[:, 1:] == tokens[:, :-1]).sum(1)


class Look(NamedTuple):
    """A policy at one time of its training."""

    kl: float
    """From the student before, nats a sequence; what the choice within a budget goes by."""
    score: float
    """What is chosen by."""
    reward: float
    """What is reported."""
    judge: float = 0.0


class Testbed(NamedTuple):
    """Everything that the methods are given, in float64."""

    space: AllSequences
    last: Tensor
    """Row of the student for each prefix: 0 at the start, else 1 + the last token."""
    reward: Tensor
    """Of each sequence."""
    before: Tensor
    """Logits of the teacher before alignment ``[P, V]``."""
    aligned: Tensor
    """After perfect alignment."""
    value: float
    """Soft value of the root."""
    chosen: Tensor
    """Numbers of the chosen sequences."""
    rejected: Tensor
    other_pairs: tuple[Tensor, Tensor]
    """As many pairs again, to stop the teacher of part fitted in time."""
    sft: Tensor
    """The student before ``[1 + V, V]``."""
    own: Tensor
    """Numbers of the sequences it wrote."""


def make_testbed(pairs: int, seed: int) -> Testbed:
    """Draw a teacher, align it exactly, and train the student on 300 of its sequences."""
    generator = torch.Generator().manual_seed(seed)
    space = AllSequences(VOCABULARY, LENGTH)
    before = torch.randn(
        space.num_prefixes, VOCABULARY, generator=generator, dtype=torch.float64
    ).log_softmax(-1)
    reward = reward_of(space.tokens).double()
    aligned, value = soft_optimum(before, reward)
    last = torch.zeros(space.num_prefixes, dtype=torch.long)
    last[space.prefixes[:, 1:]] = 1 + space.tokens[:, :-1]
    law = space.logprobs(before).sum(-1).exp()
    shown = draw(law, 300, generator)
    given, other_pairs = (noisy_pairs(law, reward, pairs, generator) for _ in range(2))
    counts = torch.ones(1 + VOCABULARY, VOCABULARY, dtype=torch.float64)  # one of each unseen
    rows, tokens = last[space.prefixes[shown]].flatten(), space.tokens[shown].flatten()
    counts.index_put_((rows, tokens), torch.ones(len(rows), dtype=torch.float64), accumulate=True)
    sft = counts.log().log_softmax(-1)
    own = draw(space.logprobs(sft[last]).sum(-1).exp(), 300, generator)
    return Testbed(space, last, reward, before, aligned, value, *given, other_pairs, sft, own)


def noisy_pairs(
    law: Tensor, reward: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Chosen and rejected sequences, by one rater each."""
    one, two = (draw(law, count, generator) for _ in range(2))
    first = torch.rand(count, generator=generator) < (reward[one] - reward[two]).sigmoid()
    return torch.where(first, one, two), torch.where(first, two, one)


def draw(law: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw numbers of sequences."""
    return torch.multinomial(law, count, replacement=True, generator=generator)


def soft_optimum(before: Tensor, reward: Tensor) -> tuple[Tensor, float]:
    """Policy proportional to ``before * exp(reward / beta)`` and the soft value of the root."""
    rows, value, end = [], reward, len(before)
    while end:
        children = value.reshape(-1, VOCABULARY)
        start = end - len(children)
        weights = before[start:end] + children / BETA
        rows.append(weights.log_softmax(-1))
        value, end = BETA * weights.logsumexp(-1), start
    return torch.cat(rows[::-1]), value.item()


def dpo_loss(
    bed: Testbed,
    table: Tensor,
    reference: Tensor,
    beta: float,
    pairs: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """DPO on the pairs, or on others."""
    chosen, rejected = (
        (bed.space.logprobs(table, rows) - bed.space.logprobs(reference, rows)).sum(-1)
        for rows in pairs or (bed.chosen, bed.rejected)
    )
    return f_dpo_loss(chosen, rejected, beta=beta)


def identities(bed: Testbed) -> dict[str, float]:
    """Largest deviations from what the advantage promises."""
    advantage = BETA * teacher_advantage(bed.aligned, bed.before)
    along = advantage[bed.space.prefixes, bed.space.tokens].sum(-1)
    telescoping = (along - (bed.reward - bed.value)).abs().max()
    student = bed.sft[bed.last]

    def kl(other: Tensor) -> Tensor:
        return (student.exp() * (student - other)).sum(-1)

    expected = (student.exp() * advantage).sum(-1)
    gap = expected - BETA * (kl(bed.before) - kl(bed.aligned))
    return {"telescoping_error": telescoping.item(), "gap_error": gap.abs().max().item()}
