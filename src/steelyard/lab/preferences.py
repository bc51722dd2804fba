r"""Preference pairs and learning from them, small enough for a laptop.

Pairs come from samples of a model and a reward, or from a user's file; :class:`PreferenceLearner`
is the loop that every pairwise method shares. What distinguishes the methods is an
:data:`Objective`, a plain function that the recipe writes.

Needs the extra ``lm``; importing this module does not.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steelyard._checks import check_count, check_range, check_same_shape
from steelyard.lab.tiny_lm import completion_logprobs, sample

__all__ = [
    "Objective",
    "PairBatch",
    "PairScores",
    "Pairs",
    "PreferenceLearner",
    "PreferenceSettings",
    "Responses",
    "Reward",
    "cost_at_level",
    "draw_pairs",
    "next_token_laws",
    "score_pairs",
    "token_logprobs",
    "vote",
]

_SCORED_AT_ONCE = 256

Reward = Callable[[Tensor, Tensor], Tensor]
"""``reward(tokens [N, T], mask [N, T]) -> [N]``."""


@dataclass(frozen=True)
class Pairs:
    """``N`` prompts with two responses each; both are padded to one length ``T``."""

    prompt_ids: Tensor
    """``[N, P]``, padded on the left."""
    prompt_mask: Tensor
    """Bool ``[N, P]``."""
    chosen: Tensor
    """``[N, T]``, padded on the right."""
    chosen_mask: Tensor
    """Bool ``[N, T]``."""
    rejected: Tensor
    """``[N, T]``."""
    rejected_mask: Tensor
    """Bool ``[N, T]``."""
    share: Tensor
    """``[N]``: share of raters who prefer the chosen response; 1 where it is not known."""

    def __post_init__(self) -> None:
        check_same_shape(chosen=self.chosen, rejected=self.rejected)
        for name in ("chosen", "rejected"):
            empty = ~getattr(self, f"{name}_mask").any(-1)
            if bool(empty.any()):
                row = int(empty.nonzero()[0])
                raise ValueError(f"pair {row}: {name!r} must not be empty, got no token")
        same = ((self.chosen == self.rejected) | ~self.chosen_mask).all(-1)
        same &= (self.chosen_mask == self.rejected_mask).all(-1)
        if bool(same.any()):
            row = int(same.nonzero()[0])
            raise ValueError(f"pair {row}: 'chosen' and 'rejected' must differ, got the same twice")

    def __len__(self) -> int:
        """Return the number of pairs."""
        return self.chosen.shape[0]

    def __getitem__(self, index: Tensor | slice) -> "Pairs":
        """Return the pairs at ``index``."""
        return Pairs(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    @property
    def lengths(self) -> tuple[Tensor, Tensor]:
        """Tokens of chosen and of rejected responses, ``[N]`` each."""
        return self.chosen_mask.sum(-1), self.rejected_mask.sum(-1)

    def together(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Prompt ids and mask, response tokens and mask: all chosen, then all rejected ones."""
        return (
            self.prompt_ids.repeat(2, 1),
            self.prompt_mask.repeat(2, 1),
            torch.cat([self.chosen, self.rejected]),
            torch.cat([self.chosen_mask, self.rejected_mask]),
        )


def draw_pairs(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    reward: Reward,
    *,
    max_new_tokens: int,
    generator: torch.Generator,
    scale: float = 1.0,
    noisy: bool = True,
) -> Pairs:
    r"""Draw two responses to each prompt and let raters choose by their rewards.

    .. math:: P(y_1 \succ y_2) = \sigma(\text{scale} \cdot (r_1 - r_2))

    Pairs of identical responses are left out, and without ``noisy`` those of equal reward.

    Args:
        model: a causal language model.
        prompt_ids: ``[B, P]``, padded on the left.
        prompt_mask: ``[B, P]``.
        reward: of the responses.
        max_new_tokens: longest response.
        generator: of responses and choices.
        scale: > 0; how clearly raters see a difference of 1.
        noisy: true = the choice of one rater; false = that of the majority.

    Returns:
        At most ``B`` pairs, with the share of raters behind each choice.

    Raises:
        ValueError: no pair is left, or a setting out of range.
    """
    check_range("scale", scale, above=0.0)
    ids, shown = prompt_ids.repeat(2, 1), prompt_mask.repeat(2, 1)
    drawn = sample(model, ids, shown, max_new_tokens=max_new_tokens, generator=generator)
    rewards = reward(drawn.tokens, drawn.mask).double()
    (one, two), (kept_one, kept_two) = drawn.tokens.chunk(2), drawn.mask.chunk(2)
    gap = scale * (rewards.chunk(2)[0] - rewards.chunk(2)[1])
    differ = ((one != two) & kept_one).any(-1) | (kept_one != kept_two).any(-1)
    if noisy:
        first = torch.rand(gap.shape, generator=generator, dtype=gap.dtype) < gap.sigmoid()
    else:
        first, differ = gap > 0, differ & (gap != 0)
    if not bool(differ.any()):
        raise ValueError("no pair is left: all responses to a prompt are alike")
    pick = first[:, None]
    pairs = (
        prompt_ids,
        prompt_mask.bool(),
        torch.where(pick, one, two),
        torch.where(pick, kept_one, kept_two),
        torch.where(pick, two, one),
        torch.where(pick, kept_two, kept_one),
        torch.where(first, gap, -gap).sigmoid(),
    )
    return Pairs(*(values[differ] for values in pairs))


def vote(pairs: Pairs, raters: int, generator: torch.Generator) -> Pairs:
    """Let several raters vote: the majority chooses, its share is known, ties are left out.

    Args:
        pairs: ``share`` is the probability that a rater prefers the chosen response.
        raters: >= 1; how many vote on each pair.
        generator: of the votes.

    Returns:
        The pairs without a tie; ``share`` is that of the votes, above 1/2.
    """
    check_count("raters", raters)
    votes = torch.rand(raters, len(pairs), generator=generator, dtype=torch.float64)
    share = (votes < pairs.share).double().mean(0)
    turned = (share < 0.5)[:, None]
    sides = (pairs.chosen, pairs.chosen_mask), (pairs.rejected, pairs.rejected_mask)
    chosen, chosen_mask, rejected, rejected_mask = (
        torch.where(turned, two, one)
        for first, second in (sides, sides[::-1])
        for one, two in zip(first, second, strict=True)
    )
    prompts = pairs.prompt_ids, pairs.prompt_mask
    counted = Pairs(
        *prompts, chosen, chosen_mask, rejected, rejected_mask, torch.maximum(share, 1 - share)
    )
    return counted[(share != 0.5).nonzero().squeeze(1)]


def cost_at_level(points: Sequence[tuple[float, float]], level: float) -> float:
    """Cost of a level between points (level, cost).

    Straight lines join the square roots of the costs: a divergence grows with the square of what
    is gained by it. Points with no higher level at no lower cost than another are left out.

    Args:
        points: costs >= 0; for example reward and divergence of a method at several betas, and the
            reference at cost 0.
        level: the reward at which methods are compared.

    Raises:
        ValueError: no point reaches the level.

    Example:
        >>> cost_at_level([(0.0, 0.0), (2.0, 4.0), (1.0, 9.0)], 1.0)
        1.0
    """
    front: list[tuple[float, float]] = []
    for reached, cost in sorted(points, key=lambda point: (point[1], -point[0])):
        if not front or reached > front[-1][0]:
            front.append((reached, max(cost, 0.0)))  # an estimate may be below
    if not front or front[-1][0] < level:
        raise ValueError(f"points must reach the level {level}, got {points}")
    if level <= front[0][0]:
        return front[0][1]
    (low, cost), (high, more) = next(
        (below, above) for below, above in pairwise(front) if above[0] >= level
    )
    share = (level - low) / (high - low)
    return float(((1 - share) * cost**0.5 + share * more**0.5) ** 2)


class PairScores(NamedTuple):
    """Log-probabilities of responses, summed over their tokens, ``[N]`` each."""

    chosen: Tensor
    rejected: Tensor


@torch.no_grad()
def token_logprobs(model: Any, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Log-probability of every token of chosen and of rejected responses, ``[N, T]`` each."""
    found = []
    for start in range(0, len(pairs), _SCORED_AT_ONCE):
        part = pairs[slice(start, start + _SCORED_AT_ONCE)]
        found.append(completion_logprobs(model, *part.together()).chunk(2))
    chosen, rejected = zip(*found, strict=True)
    return torch.cat(chosen), torch.cat(rejected)


def score_pairs(model: Any, pairs: Pairs) -> PairScores:
    """Score both responses of each pair under a model; no gradient."""
    chosen, rejected = token_logprobs(model, pairs)
    return PairScores(chosen.double().sum(-1), rejected.double().sum(-1))


@dataclass(frozen=True)
class Responses:
    """What an objective sees of one side of a batch of pairs."""

    logprobs: Tensor
    """``[B, T]`` of the policy, 0 outside the mask. With the gradient."""
    ref_logprobs: Tensor
    """``[B, T]`` of the reference."""
    mask: Tensor
    """Bool ``[B, T]``."""
    kl: Tensor | None = None
    """``KL(ref || policy)`` in each state, ``[B, T]``, with the gradient; if asked for."""
    ref_hidden: Tensor | None = None
    """States of the reference that predict each token, ``[L, B, T, D]``; if asked for."""
    previous: Tensor | None = None
    """The token before each, ``[B, T]``: all that a state announces itself by."""

    @property
    def log_ratio(self) -> Tensor:
        """``log pi - log ref`` of each token, ``[B, T]``."""
        return self.logprobs - self.ref_logprobs


class PairBatch(NamedTuple):
    """A batch of pairs."""

    chosen: Responses
    rejected: Responses


Objective = Callable[[PairBatch], Tensor]
"""A method: the loss of a batch, 0-d. An ``nn.Module`` is trained together with the policy."""

Probe = Callable[[Any, int], Mapping[str, float]]
"""``probe(model, step)``: what to log of the policy after a unit of work."""


@dataclass(frozen=True)
class PreferenceSettings:
    """Sizes of training.

    Args:
        batch_size: pairs an update.
        updates: updates in a unit of work, after which the row is logged.
        learning_rate: of AdamW without decay; constant.
        objective_rate: learning rate of the parameters of an objective that has some; ``None`` =
            the same.
        objective_decay: weight decay on them.
        max_grad_norm: the gradient is scaled down to it.
        states: also give the objective ``kl`` and ``ref_hidden``: full distributions of both
            models in every step, so about half as much work again.

    Raises:
        ValueError: a number out of range.
    """

    batch_size: int = 64
    updates: int = 10
    learning_rate: float = 1e-3
    objective_rate: float | None = None
    objective_decay: float = 0.01
    max_grad_norm: float = 1.0
    states: bool = False

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size)
        check_count("updates", self.updates)
        check_range("learning_rate", self.learning_rate, above=0.0)
        if self.objective_rate is not None:
            check_range("objective_rate", self.objective_rate, above=0.0)
        check_range("objective_decay", self.objective_decay, at_least=0.0)
        check_range("max_grad_norm", self.max_grad_norm, above=0.0)


class PreferenceLearner:
    """Train a language model on preference pairs.

    A :class:`~steelyard.lab.training.Learner` whose steps are updates; one ``advance`` does
    ``settings.updates`` of them, each on pairs drawn without replacement. Its row has the mean
    ``loss``, ``accuracy`` (share of pairs whose log ratio is larger for the chosen response),
    ``chosen_change`` and ``rejected_change`` (mean log ratios in nats) and ``grad_norm``, then
    what ``probe`` says. Dropout is off.

    Args:
        model: a causal language model of Hugging Face; what requires a gradient is trained in
            place. As it is now it is the reference.
        pairs: to learn from.
        objective: the method.
        settings: sizes of training.
        seed: of the order of pairs.
        probe: called with the model and the step.
    """

    def __init__(
        self,
        model: Any,
        pairs: Pairs,
        objective: Objective,
        settings: PreferenceSettings,
        *,
        seed: int,
        probe: Probe | None = None,
    ) -> None:
        self.model, self.pairs = model.eval(), pairs
        self._objective, self._settings, self._probe = objective, settings, probe
        self._generator = torch.Generator().manual_seed(seed)
        self._step = 0
        self._reference = None
        if settings.states:
            self._reference = copy.deepcopy(model).eval().requires_grad_(False)
        else:
            self._ref_logprobs = token_logprobs(model, pairs)
        groups: list[dict[str, Any]] = [
            {"params": list(self._trained().values()), "weight_decay": 0.0}
        ]
        if isinstance(objective, nn.Module) and (extra := list(objective.parameters())):
            rate = settings.objective_rate or settings.learning_rate
            decay = settings.objective_decay
            groups.append({"params": extra, "weight_decay": decay, "lr": rate})
        self._optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)

    @property
    def step(self) -> int:
        """Updates done."""
        return self._step

    def advance(self) -> dict[str, float]:
        """Do a few updates and say how they went."""
        rows = [self._update() for _ in range(self._settings.updates)]
        row = {key: sum(each[key] for each in rows) / len(rows) for key in rows[0]}
        if self._probe is not None:
            row |= self._probe(self.model, self._step)
        return row

    def state_dict(self) -> dict[str, Any]:
        """Return what is trained, optimiser, generator and step."""
        state = {
            "step": self._step,
            "model": {name: value.detach() for name, value in self._trained().items()},
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
        }
        if isinstance(self._objective, nn.Module):
            state["objective"] = self._objective.state_dict()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a state."""
        self._step = state["step"]
        for name, value in self._trained().items():
            value.copy_(state["model"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"])
        if isinstance(self._objective, nn.Module):
            self._objective.load_state_dict(state["objective"])

    def close(self) -> None:
        """Nothing to free."""

    def batch(self, index: Tensor) -> PairBatch:
        """Return the pairs at ``index`` as an objective sees them."""
        pairs = self.pairs[index]
        prompt_ids, _, tokens, mask = pairs.together()
        previous = torch.cat([prompt_ids[:, -1:], tokens[:, :-1]], dim=1)
        if self._reference is None:
            logprobs = completion_logprobs(self.model, *pairs.together())
            ref_logprobs = torch.cat([side[index] for side in self._ref_logprobs])
            given = [x.chunk(2) for x in (logprobs, ref_logprobs, mask, previous)]
            chosen, rejected = (
                Responses(p, r, m, previous=t) for p, r, m, t in zip(*given, strict=True)
            )
            return PairBatch(chosen, rejected)
        laws, _ = next_token_laws(self.model, pairs)
        with torch.no_grad():
            ref_laws, hidden = next_token_laws(self._reference, pairs, with_hidden=True)
        kl = (ref_laws.exp() * (ref_laws - laws)).sum(-1).where(mask, 0.0)
        of_tokens = tokens.unsqueeze(-1)
        logprobs, ref_logprobs = (
            law.gather(-1, of_tokens).squeeze(-1).where(mask, 0.0) for law in (laws, ref_laws)
        )
        sides = [x.chunk(2) for x in (logprobs, ref_logprobs, mask, kl)]
        sides += [hidden.chunk(2, dim=1), previous.chunk(2)]
        return PairBatch(*(Responses(*side) for side in zip(*sides, strict=True)))

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _update(self) -> dict[str, float]:
        size = min(self._settings.batch_size, len(self.pairs))
        batch = self.batch(torch.randperm(len(self.pairs), generator=self._generator)[:size])
        loss = self._objective(batch)
        if not bool(loss.isfinite()):
            raise FloatingPointError(f"loss is {loss.item()}")
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        everything = [p for group in self._optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(everything, self._settings.max_grad_norm)
        self._optimizer.step()
        self._step += 1
        chosen, rejected = (side.log_ratio.detach().sum(-1) for side in batch)
        return {
            "loss": loss.item(),
            "accuracy": (chosen > rejected).double().mean().item(),
            "chosen_change": chosen.mean().item(),
            "rejected_change": rejected.mean().item(),
            "grad_norm": norm.item(),
        }


def next_token_laws(
    model: Any, pairs: Pairs, *, with_hidden: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the whole vocabulary at every token of the responses.

    Args:
        model: a causal language model.
        pairs: ``N`` of them.
        with_hidden: also return the states behind them.

    Returns:
        ``[2N, T, V]``, chosen first, and the states of each layer but the embedding
        ``[L, 2N, T, D]``, without ``with_hidden`` empty. Outside the masks both are arbitrary.
    """
    prompt_ids, prompt_mask, tokens, _ = pairs.together()
    seen = torch.cat([prompt_mask, prompt_mask.new_ones(tokens.shape)], dim=1)[:, :-1]
    found = model(
        input_ids=torch.cat([prompt_ids, tokens], dim=1)[:, :-1],
        attention_mask=None if bool(prompt_mask.all()) else seen.long(),
        position_ids=(seen.long().cumsum(1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=tokens.shape[1],
        output_hidden_states=with_hidden,
    )
    laws = torch.log_softmax(found.logits.float(), dim=-1)
    if not with_hidden:
        return laws, laws.new_empty(0)
    return laws, torch.stack(found.hidden_states[1:])[:, :, -tokens.shape[1] :]
