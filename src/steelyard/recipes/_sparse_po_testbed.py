"""What the recipe ``sparse_po`` compares: methods as masks, and a problem that is enumerated."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from steelyard.lab.enumeration import AllSequences
from steelyard.lab.preferences import PairBatch, Responses
from steelyard.preference import (
    LearnedTokenMask,
    activation_mask,
    sparse_po_loss,
    sparse_po_reward,
    tdpo1_loss,
    tdpo2_loss,
)

VOCABULARY, LENGTH, PLACE, WRONG_PLACE = 4, 5, 2, 1
LIKED, DISLIKED, WORTH = 3, 0, 2.0


class TokenWeighted(nn.Module):
    """A method: where its masks come from, and the loss that they enter.

    Args:
        name: of the method; ``l1=`` in it is the penalty of learned masks.
        beta: strength of the leash.
        relevant: says which states of a side matter, ``[B, T]``: what the oracle knows.
        misplaced: the oracle of the control.
        noise: a fixed random weight in [0, 1) for each state, ``[B, T]``.
        layers: of the hidden states that a learned mask reads.
        size: of them.
    """

    def __init__(
        self,
        name: str,
        beta: float,
        *,
        relevant: Callable[[Responses], Tensor],
        noise: Callable[[Responses], Tensor],
        misplaced: Callable[[Responses], Tensor] | None = None,
        layers: int = 1,
        size: int = 1,
    ) -> None:
        super().__init__()
        self.kind, _, penalty = name.partition(" l1=")
        self.beta, self.l1 = beta, float(penalty or 0.0)
        self._fixed = {"oracle": relevant, "misplaced": misplaced, "random": noise}
        count = {"common": 1, "independent": 2}.get(self.kind, 0)
        self.heads = nn.ModuleList(LearnedTokenMask(layers, size) for _ in range(count))

    def masks(self, side: Responses) -> tuple[Tensor | None, Tensor | None]:
        """Weights of the reward and of the KL term of each token, ``[B, T]``; ``None`` = 1."""
        if self.kind in ("dpo", "tdpo1", "tdpo2"):
            return None, torch.zeros_like(side.logprobs) if self.kind == "dpo" else None
        if (rule := self._fixed.get(self.kind)) is not None:
            mask = rule(side).to(side.logprobs.dtype)
            return mask, mask
        if side.ref_hidden is None:
            raise ValueError(f"method {self.kind} needs the states of the reference, got none")
        if self.kind == "mapo":
            mask = activation_mask(side.ref_hidden, side.mask)
            return mask, mask
        return self.heads[0](side.ref_hidden), self.heads[-1](side.ref_hidden)

    def forward(self, batch: PairBatch) -> Tensor:
        """Return the loss of a batch of pairs."""
        chosen, rejected = batch
        tokens = *(side.log_ratio for side in batch), *(_kl(side) for side in batch)
        if self.kind in ("tdpo1", "tdpo2"):
            loss = tdpo1_loss if self.kind == "tdpo1" else tdpo2_loss
            return loss(
                *tokens, beta=self.beta, mask_chosen=chosen.mask, mask_rejected=rejected.mask
            )
        (reward_chosen, kl_chosen), (reward_rejected, kl_rejected) = map(self.masks, batch)
        penalty = self.l1 if self.kind == "independent" else self.l1 / 2
        return sparse_po_loss(
            *tokens,
            beta=self.beta,
            reward_mask_chosen=reward_chosen,
            reward_mask_rejected=reward_rejected,
            kl_mask_chosen=kl_chosen,
            kl_mask_rejected=kl_rejected,
            l1_reward=penalty,  # one head for both terms pays once
            l1_kl=penalty,
            mask_chosen=chosen.mask,
            mask_rejected=rejected.mask,
        )


def _kl(side: Responses) -> Tensor:
    return torch.zeros_like(side.logprobs) if side.kl is None else side.kl


class Problem:
    """A reference over all sequences, a reward that looks at one position, and pairs."""

    def __init__(self, pairs: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.space = AllSequences(VOCABULARY, LENGTH)
        table = (self.space.num_prefixes, VOCABULARY)
        self.table = torch.randn(table, dtype=torch.float64, generator=generator)
        token = self.space.tokens[:, PLACE]
        self.rewards = WORTH * ((token == LIKED).double() - (token == DISLIKED).double())
        law = self.space.logprobs(self.table).sum(-1).exp()
        self.train = self._pairs(law, pairs, generator)
        self.held_out = self._pairs(law, pairs, generator)
        self.noise = torch.rand(LENGTH, dtype=torch.float64, generator=generator)

    def _pairs(self, law: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        both = torch.multinomial(law, 2 * count, replacement=True, generator=generator)
        one, two = both.chunk(2)
        two = torch.where(one == two, (two + 1) % len(law), two)
        gap = self.rewards[one] - self.rewards[two]
        first = torch.rand(count, generator=generator, dtype=law.dtype) < gap.sigmoid()
        return torch.where(first, one, two), torch.where(first, two, one)

    def batch(self, table: Tensor, pairs: tuple[Tensor, Tensor]) -> PairBatch:
        """Look at pairs through a policy; the hidden state of a token is its position."""
        reference = self.table.log_softmax(-1)
        kl = (reference.exp() * (reference - table.log_softmax(-1))).sum(-1)
        places = torch.eye(LENGTH, dtype=torch.float64)

        def side(rows: Tensor) -> Responses:
            return Responses(
                self.space.logprobs(table, rows),
                self.space.logprobs(self.table, rows),
                torch.ones(len(rows), LENGTH, dtype=torch.bool),
                kl[self.space.prefixes[rows]],
                places.expand(1, len(rows), LENGTH, LENGTH),
            )

        return PairBatch(side(pairs[0]), side(pairs[1]))

    def measures(self, table: Tensor, method: TokenWeighted) -> dict[str, float]:
        """Reward and divergence of a policy, exactly, and its masks."""
        law = self.space.logprobs(table).sum(-1).exp()
        spent = self.space.kl_by_position(table, self.table)
        wasted = (spent.sum() - spent[PLACE]).item()
        batch = self.batch(table, self.held_out)
        margin = torch.stack([_reward(side, method) for side in batch])
        found = {
            "reward": (law * self.rewards).sum().item(),
            "kl": spent.sum().item(),
            "wasted": wasted,
            "wasted_share": wasted / max(spent.sum().item(), 1e-12),
            "held_out_accuracy": (margin[0] > margin[1]).double().mean().item(),
        }
        mask = method.masks(batch.chosen)[0]
        if mask is not None:
            found |= {f"mask/{place}": mask[0, place].item() for place in range(LENGTH)}
        return found


def _reward(side: Responses, method: TokenWeighted) -> Tensor:
    reward_mask, kl_mask = method.masks(side)
    if method.kind == "tdpo2":
        kl_mask = torch.full_like(side.logprobs, 0.5)
    return sparse_po_reward(
        side.log_ratio,
        _kl(side),
        beta=method.beta,
        reward_mask=reward_mask,
        kl_mask=kl_mask,
        mask=side.mask,
    )


def area_under_curve(inside: Tensor, outside: Tensor) -> float:
    """Probability that a weight inside is larger than one outside; ties count one half.

    Example:
        >>> area_under_curve(torch.tensor([2.0, 1.0]), torch.tensor([0.0, 1.0]))
        0.875
    """
    ordered = outside.sort().values
    below = torch.searchsorted(ordered, inside, right=False)
    up_to = torch.searchsorted(ordered, inside, right=True)
    return ((below + up_to).double().mean() / (2 * len(ordered))).item()
