"""Pairs, and the learner that every pairwise method shares."""

import copy
import math

import pytest
import torch

pytest.importorskip("transformers")

from steelyard.lab.preferences import (
    PairBatch,
    Pairs,
    PreferenceLearner,
    PreferenceSettings,
    cost_at_level,
    draw_pairs,
    score_pairs,
    vote,
)
from steelyard.lab.tiny_lm import tiny_lm, tiny_tokenizer
from steelyard.preference import LearnedTokenMask, f_dpo_loss, sparse_po_loss

SETTINGS = PreferenceSettings(batch_size=8, updates=2, learning_rate=1e-2)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(["a", "b", "c"])


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_lm(tokenizer, hidden_size=16, num_heads=2)


def liked(tokens, mask):
    return ((tokens == 3) & mask).sum(-1).double()


def drawn(model, count=40, *, noisy=True, scale=1.0) -> Pairs:
    ids = torch.full((count, 1), 1)
    return draw_pairs(
        model,
        ids,
        torch.ones_like(ids).bool(),
        liked,
        max_new_tokens=4,
        generator=torch.Generator().manual_seed(0),
        scale=scale,
        noisy=noisy,
    )


def dpo(batch: PairBatch):
    chosen, rejected = (side.log_ratio.sum(-1) for side in batch)
    return f_dpo_loss(chosen, rejected, beta=0.5)


class Masked(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = LearnedTokenMask(2, 16)

    def forward(self, batch):
        chosen, rejected = batch
        masks = [self.head(side.ref_hidden) for side in batch]
        return sparse_po_loss(
            chosen.log_ratio,
            rejected.log_ratio,
            chosen.kl,
            rejected.kl,
            beta=0.5,
            reward_mask_chosen=masks[0],
            reward_mask_rejected=masks[1],
            kl_mask_chosen=masks[0],
            kl_mask_rejected=masks[1],
            mask_chosen=chosen.mask,
            mask_rejected=rejected.mask,
        )


def test_the_share_of_raters_is_that_of_the_rewards(model):
    pairs = drawn(model, scale=0.7)
    gap = liked(pairs.chosen, pairs.chosen_mask) - liked(pairs.rejected, pairs.rejected_mask)
    torch.testing.assert_close(pairs.share, (0.7 * gap).sigmoid())
    assert bool((gap < 0).any())  # one rater is sometimes in the minority


def test_the_majority_prefers_the_larger_reward_and_ties_are_left_out(model):
    assert bool((drawn(model, noisy=False).share > 0.5).all())


def test_identical_and_empty_responses_are_refused(model):
    pairs = drawn(model)
    fields = [getattr(pairs, name) for name in pairs.__dataclass_fields__]
    same = [*fields[:4], fields[2], fields[3], fields[6]]
    with pytest.raises(ValueError, match=r"pair 0: 'chosen' and 'rejected' must differ"):
        Pairs(*same)
    fields[5] = fields[5].clone()
    fields[5][3] = False
    with pytest.raises(ValueError, match=r"pair 3: 'rejected' must not be empty"):
        Pairs(*fields)


@pytest.mark.parametrize("states", [False, True])
def test_the_first_batch_sees_the_reference(model, states):
    pairs = drawn(model)
    learner = PreferenceLearner(
        copy.deepcopy(model),
        pairs,
        dpo,
        PreferenceSettings(states=states, learning_rate=1e-2),
        seed=0,
    )
    batch = learner.batch(torch.arange(5))
    torch.testing.assert_close(batch.chosen.log_ratio, torch.zeros_like(batch.chosen.logprobs))
    scores = score_pairs(model, pairs[torch.arange(5)])
    sums = [side.logprobs.detach().double().sum(-1) for side in batch]
    torch.testing.assert_close(torch.stack(sums), torch.stack(list(scores)), atol=1e-5, rtol=0)
    assert batch.rejected.previous[:, 1:].equal(pairs.rejected[:5, :-1])
    if states:
        assert batch.chosen.kl.abs().max() < 1e-5
        learner.advance()
        assert learner.batch(torch.arange(5)).chosen.kl.min() > -1e-6


@pytest.mark.parametrize(("objective", "states"), [(lambda: dpo, False), (Masked, True)])
def test_a_learner_resumes_with_the_same_numbers(model, objective, states):
    settings = PreferenceSettings(batch_size=8, updates=2, learning_rate=1e-2, states=states)
    pairs = drawn(model)

    def make():
        return PreferenceLearner(copy.deepcopy(model), pairs, objective(), settings, seed=3)

    whole, broken = make(), make()
    broken.advance()
    state = copy.deepcopy(broken.state_dict())
    resumed = make()
    resumed.load_state_dict(state)
    rows = [whole.advance(), whole.advance()]
    assert resumed.advance() == rows[1]
    assert resumed.step == whole.step == 4


def test_learning_raises_what_was_chosen(model):
    def probe(trained, step):
        return {"seen": float(step)}

    learner = PreferenceLearner(
        copy.deepcopy(model), drawn(model, noisy=False), dpo, SETTINGS, seed=0, probe=probe
    )
    rows = [learner.advance() for _ in range(15)]
    assert rows[-1]["accuracy"] > 0.9 > rows[0]["loss"] > rows[-1]["loss"]
    assert rows[-1]["seen"] == 30.0


def test_a_loss_that_is_not_finite_is_an_error(model):
    learner = PreferenceLearner(
        copy.deepcopy(model), drawn(model), lambda batch: dpo(batch) * math.nan, SETTINGS, seed=0
    )
    with pytest.raises(FloatingPointError, match="loss is nan"):
        learner.advance()


def test_the_cost_of_a_level_is_on_the_lower_front():
    points = [(0.0, 0.0), (1.0, 9.0), (2.0, 4.0), (3.0, 6.0)]
    assert cost_at_level(points, 2.5) == pytest.approx(((2 + 6**0.5) / 2) ** 2)
    assert cost_at_level(points, -1.0) == 0.0
    with pytest.raises(ValueError, match="must reach"):
        cost_at_level(points, 3.5)


def test_the_majority_of_four_raters_chooses():
    tokens = torch.arange(400).reshape(200, 2)
    mask = torch.ones_like(tokens).bool()
    share = torch.full((200,), 0.6, dtype=torch.float64)
    pairs = Pairs(tokens, mask, tokens, mask, tokens + 1000, mask, share)
    found = vote(pairs, 4, torch.Generator().manual_seed(0))
    assert set(found.share.tolist()) == {0.75, 1.0}
    # Of the votes without a tie 0.475 / (0.475 + 0.179) = 73 % agree; +-4 standard errors.
    agree = (found.chosen[:, 0] < 1000).double().mean().item()
    assert 0.57 < agree < 0.89
