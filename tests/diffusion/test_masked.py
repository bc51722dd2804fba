"""Masked diffusion and Info-Gain against exact tables, brute force and their identities."""

import math
from itertools import combinations, permutations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.diffusion.masked import (
    information_gain_scores,
    masked_nelbo,
    position_entropies,
    transfer_schedule,
)
from steelyard.diffusion.masked_decoding import decode_masked
from steelyard.diffusion.tabular_masked import TabularMaskedModel

quick = settings(deadline=None, max_examples=20)
seeds = st.integers(0, 2**31)
close = {"rtol": 0, "atol": 1e-9}
INF = math.inf


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def table(seed: int, length: int = 4, vocab: int = 3, power: int = 3) -> TabularMaskedModel:
    """A law over all sequences, far from uniform."""
    states = torch.tensor(list(product(range(vocab), repeat=length)))
    probs = random(seed, len(states)) ** power
    return TabularMaskedModel(states, probs / probs.sum(), vocab, vocab)


def noisy_hub(free: float = 0.6) -> TabularMaskedModel:
    states = torch.tensor(list(product((0, 1), repeat=4)))
    probs = torch.where(states[:, 3] == 0, free, 1 - free).double() / 2
    for copy in (1, 2):
        probs = probs * torch.where(states[:, copy] == states[:, 0], 0.95, 0.05)
    return TabularMaskedModel(states, probs, 2, 2)


def independent(probs: torch.Tensor):
    """A model ``[L, V]`` whose positions know nothing of each other."""
    return lambda ids: probs.log().expand(len(ids), -1, -1)


class Counted:
    """A model that remembers the size of every batch."""

    def __init__(self, model):
        self.model, self.batches, self.states = model, [], []

    def __call__(self, ids):
        self.batches.append(len(ids))
        self.states.append(ids.clone())
        return self.model(ids)


def law(model: TabularMaskedModel) -> dict[tuple[int, ...], float]:
    states = model.indicators.argmax(-1).tolist()
    return dict(zip(map(tuple, states), model.log_probs.exp().tolist(), strict=True))


def masks(model: TabularMaskedModel) -> torch.Tensor:
    return torch.full((model.indicators.shape[1],), model.mask_id)


# Entropies


def test_entropies_are_those_of_torch_distributions():
    logits = 5 * random(0, 2, 6, 9) - 2
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(position_entropies(logits), expected, **close)
    swapped = logits.transpose(0, 1)
    torch.testing.assert_close(position_entropies(swapped), expected.T, **close)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_entropies_at_the_extremes_are_exact_and_keep_the_dtype(dtype):
    scale = 6e4 if dtype == torch.float16 else 1e4
    logits = torch.tensor([[0.0] * 4, [scale, 0, 0, 0], [0, 0, -INF, -INF], [-scale] * 4])
    got = position_entropies(logits.to(dtype))
    assert got.dtype == dtype
    expected = torch.tensor([math.log(4), 0.0, math.log(2), math.log(4)], dtype=dtype)
    torch.testing.assert_close(got, expected)
    assert not torch.signbit(got).any()


def test_half_precision_accumulates_in_single():
    logits = torch.zeros(1, 50_000, dtype=torch.bfloat16)
    assert float(position_entropies(logits)) == pytest.approx(math.log(50_000), rel=4e-3)


def test_outside_the_mask_entropy_and_gradient_are_zero_even_for_excluded_rows():
    logits = torch.full((2, 3), -INF).double()
    logits[1] = torch.tensor([0.0, 1.0, -INF])
    logits.requires_grad_()
    mask = torch.tensor([False, True])
    got = position_entropies(logits, mask)
    got.sum().backward()
    assert got[0] == 0
    assert torch.equal(logits.grad[0], torch.zeros(3).double())
    assert logits.grad.isfinite().all()
    nothing = position_entropies(logits, torch.zeros(2, dtype=torch.bool))
    assert torch.equal(nothing, torch.zeros(2).double())


def test_gradients_of_entropies_are_right():
    logits, mask = random(0, 2, 3, 4).requires_grad_(), torch.tensor([[1, 0, 1], [1, 1, 0]])
    assert torch.autograd.gradcheck(lambda x: position_entropies(x, mask), (logits,))


# The exact model


@quick
@given(seeds, st.integers(0, 2**4 - 1))
def test_tabular_model_is_the_conditional_by_counting(seed, code):
    model = table(seed, vocab=2)
    hidden = [bool(code >> i & 1) for i in range(4)]
    truth = (random(seed + 1, 4) > 0.5).long()
    ids = torch.where(torch.tensor(hidden), 2, truth)
    agreeing = {
        s: p
        for s, p in law(model).items()
        if all(h or s[i] == ids[i] for i, h in enumerate(hidden))
    }
    total = sum(agreeing.values())
    got = model(ids[None])[0].exp()
    for i, v in product(range(4), range(2)):
        expected = sum(p for s, p in agreeing.items() if s[i] == v) / total
        assert float(got[i, v]) == pytest.approx(expected, abs=1e-12)


def test_tabular_model_is_uniform_where_no_state_agrees_and_one_hot_where_observed():
    model = TabularMaskedModel(torch.tensor([[0, 0, 0], [1, 1, 1]]), torch.tensor([1.0, 0.0]), 4, 9)
    probs = model(torch.tensor([[0, 3, 9], [1, 9, 9], [9, 9, 9]])).exp()
    quarter = [0.25] * 4
    one = torch.eye(4).tolist()
    # The second state has probability 0, so seeing its tokens agrees with nothing either.
    assert probs[0].tolist() == [one[0], one[3], quarter]
    assert probs[1].tolist() == [one[1], quarter, quarter]
    assert probs[2].tolist() == [one[0]] * 3


def test_tabular_model_adds_repeated_states_and_normalises_tiny_probabilities():
    states = torch.tensor([[0, 0], [0, 0], [1, 0]])
    model = TabularMaskedModel(
        states, torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64) * 1e-300, 2, 2
    )
    torch.testing.assert_close(
        model(masks(model)[None])[0, 0].exp(), torch.tensor([0.5, 0.5], dtype=torch.float64)
    )
    assert model.double().state_dict().keys() == {"log_probs", "indicators"}


# Scores


@quick
@given(seeds, st.sampled_from(["mean", "sum"]))
def test_scores_are_the_loop_over_candidates_with_one_call(seed, future):
    model = Counted(table(seed))
    tokens = torch.tensor([3, 3, 1, 3])
    candidates = [([0], [1]), ([1], [0]), ([3, 0], [2, 2]), (torch.tensor([0, 1, 3]), [0, 1, 2])]
    got = information_gain_scores(model, tokens, candidates, 3, future=future)
    assert model.batches == [5]

    def remaining(state):
        left = [i for i in range(4) if state[i] == 3]
        entropies = [position_entropies(model.model(state[None]))[0, i] for i in left]
        return sum(entropies) / (len(left) if future == "mean" else 1) if left else 0.0

    assert float(got.entropy) == pytest.approx(float(remaining(tokens)), abs=1e-9)
    now = position_entropies(model.model(tokens[None]))[0]
    for n, (positions, values) in enumerate(candidates):
        state = tokens.clone()
        state[torch.as_tensor(positions)] = torch.as_tensor(values)
        cost = float(now[torch.as_tensor(positions)].sum())
        assert float(got.cost[n]) == pytest.approx(cost, abs=1e-9)
        assert float(got.next_entropy[n]) == pytest.approx(float(remaining(state)), abs=1e-9)
        objective = -float(remaining(state)) - cost
        assert float(got.objective[n]) == pytest.approx(objective, abs=1e-9)
    assert got.next_entropy[3] == 0


def test_noisy_hub_scores_are_the_published_ones():
    actions = [([i], [0]) for i in range(4)]
    model = noisy_hub()
    got = information_gain_scores(model, masks(model), actions, 2)
    assert got.objective.tolist() == pytest.approx([-1.0498, -1.0883, -1.0883, -1.3662], abs=5e-5)
    assert int(got.cost.argmin()) == 3
    assert int(got.objective.argmax()) == 0


def test_mean_and_sum_of_the_future_can_choose_differently():
    # The free bit is now cheap. A mean over what is left counts the copies' gain too little.
    model = noisy_hub(free=0.97)
    actions = [([0], [0]), ([3], [0])]
    mean, total = (
        information_gain_scores(model, masks(model), actions, 2, future=f).objective
        for f in ("mean", "sum")
    )
    assert mean[0] < mean[1]
    assert total[0] > total[1]


@quick
@given(seeds, st.integers(0, 3))
def test_expected_gain_is_own_entropy_plus_mutual_informations(seed, position):
    model = table(seed)
    p = torch.zeros(3, 3, 3, 3, dtype=torch.float64)
    for state, value in law(model).items():
        p[state] = value
    candidates = [([position], [v]) for v in range(3)]
    got = information_gain_scores(model, masks(model), candidates, 3, future="sum")
    marginal = p.sum([d for d in range(4) if d != position])
    gain = (marginal * (got.entropy - got.next_entropy)).sum()

    def entropy(q):
        return float(-(q * q.log()).sum())

    expected = entropy(marginal)
    for other in set(range(4)) - {position}:
        pair = p.sum([d for d in range(4) if d not in (position, other)])
        single = p.sum([d for d in range(4) if d != other])
        mutual = entropy(marginal) + entropy(single) - entropy(pair)
        assert mutual >= -1e-12
        expected += mutual
    assert float(gain) == pytest.approx(expected, abs=1e-9)


def test_gain_of_the_likeliest_token_can_be_negative():
    states = torch.tensor([[0, 0], [0, 1], [1, 0]])
    model = TabularMaskedModel(states, torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64), 2, 2)
    got = information_gain_scores(model, masks(model), [([0], [0])], 2)
    assert got.next_entropy[0] > got.entropy  # ln 2 for the second bit, more than before


@quick
@given(seeds)
def test_committing_together_loses_the_total_correlation(seed):
    model = table(seed)
    pair = torch.zeros(3, 3, dtype=torch.float64)
    for (a, b, *_), value in law(model).items():
        pair[a, b] += value
    cost = information_gain_scores(model, masks(model), [([0, 1], [0, 0])], 3).cost[0]
    total_correlation = float(cost + (pair * pair.log()).sum())
    expected = (pair * (pair / (pair.sum(1, keepdim=True) * pair.sum(0))).log()).sum()
    assert total_correlation == pytest.approx(float(expected), abs=1e-9)
    assert total_correlation > 0
    alone = independent(random(seed, 4, 3).softmax(1))
    p = alone(torch.zeros(1, 4))[0, :2].exp()
    cost = information_gain_scores(alone, masks(model), [([0, 1], [0, 0])], 3).cost[0]
    joint = p[0][:, None] * p[1]
    assert float(cost + (joint * joint.log()).sum()) == pytest.approx(0, abs=1e-9)


def test_scores_in_half_precision_are_single():
    def model(ids):
        return torch.zeros(*ids.shape, 3, dtype=torch.bfloat16)

    got = information_gain_scores(model, torch.full((3,), 3), [([0], [1])], 3)
    assert {value.dtype for value in got} == {torch.float32}
    assert float(got.cost[0]) == pytest.approx(math.log(3), abs=1e-6)


# Decoding


SAMPLERS = ("info_gain", "entropy", "confidence", "margin", "lookahead")


@quick
@given(seeds, st.sampled_from(SAMPLERS), st.integers(1, 7), st.sampled_from([None, 0.5]))
def test_every_mask_is_filled_once_and_nothing_else_changes(seed, sampler, steps, bypass):
    vocab = 3
    model = Counted(table(seed % 7, length=6))
    tokens = torch.where(random(seed, 6) < 0.6, vocab, (random(seed + 1, 6) * vocab).long())
    kept = tokens.clone()
    g = torch.Generator().manual_seed(seed)
    got = decode_masked(
        model, tokens, mask_id=vocab, sampler=sampler, steps=steps, bypass=bypass, generator=g
    )
    masked = tokens == vocab
    assert torch.equal(tokens, kept)
    assert torch.equal(got.tokens[~masked], tokens[~masked])
    assert ((got.tokens >= 0) & (got.tokens < vocab)).all()
    assert sorted(got.order.tolist()) == masked.nonzero().squeeze(1).tolist()
    assert len(model.batches) <= int(masked.sum()) + 1
    assert got.tokens.dtype == tokens.dtype


@quick
@given(seeds, st.sampled_from(["confidence", "entropy", "margin"]))
def test_heuristics_commit_the_most_certain_position(seed, sampler):
    model = table(seed)
    ids = masks(model)
    order, total = [], 0.0
    while (ids == 3).any():
        logits = model(ids[None])[0]
        entropies = position_entropies(logits)
        top = logits.exp().topk(2, dim=-1).values
        score = {"confidence": top[:, 0], "entropy": -entropies, "margin": top[:, 0] - top[:, 1]}
        place = int(torch.where(ids == 3, score[sampler], -INF).argmax())
        ids[place] = logits[place].argmax()
        total += float(entropies[place])
        order.append(place)
    got = decode_masked(model, masks(model), mask_id=3, sampler=sampler)
    assert got.order.tolist() == order
    assert torch.equal(got.tokens, ids)
    assert float(got.cumulative_entropy) == pytest.approx(total, abs=1e-9)


@quick
@given(
    seeds,
    st.sampled_from(["info_gain", "lookahead"]),
    st.sampled_from(["mean", "sum"]),
    st.booleans(),
)
def test_look_ahead_over_all_positions_is_the_loop(seed, sampler, future, prompt):
    model = Counted(table(seed, length=5))
    ids = masks(model.model)
    if prompt:
        ids[2] = 1
    start, order, total = ids.clone(), [], 0.0
    while (ids == 3).any():
        logits = model.model(ids[None])[0]
        places = (ids == 3).nonzero().squeeze(1).tolist()
        actions = [([i], [int(logits[i].argmax())]) for i in places]
        scores = information_gain_scores(model.model, ids, actions, 3, future=future)
        value = scores.objective if sampler == "info_gain" else -scores.next_entropy
        best = int(value.argmax())
        ids[places[best]] = actions[best][1][0]
        order.append(places[best])
        total += float(scores.cost[best])
    got = decode_masked(
        model, start, mask_id=3, sampler=sampler, num_candidates=None, bypass=None, future=future
    )
    assert got.order.tolist() == order
    assert torch.equal(got.tokens, ids)
    assert float(got.cumulative_entropy) == pytest.approx(total, abs=1e-9)
    # One call for the start and one a step for all candidates; the last position needs none.
    n = len(order)
    assert model.batches == [1, *range(n, 1, -1)]


def test_noisy_hub_is_settled_first_by_info_gain_and_last_by_nobody_else():
    model = noisy_hub()
    for sampler in ("confidence", "entropy", "margin"):
        assert decode_masked(model, masks(model), mask_id=2, sampler=sampler).order[0] == 3
    settings = {"mask_id": 2, "num_candidates": None, "bypass": None}
    got = decode_masked(model, masks(model), **settings)
    assert got.order.tolist() == [0, 1, 2, 3]


@quick
@given(seeds, st.sampled_from([1, 2, 3]), st.sampled_from([0.0, 0.7]))
def test_one_candidate_or_no_temperature_is_the_confidence_sampler(seed, k, temperature):
    model = table(seed, length=6, vocab=2)
    settings = {"mask_id": 2, "steps": 6 // k, "token_temperature": temperature}

    def run(**more):
        g = torch.Generator().manual_seed(seed)
        return decode_masked(model, masks(model), generator=g, **settings, **more)

    expected = run(sampler="confidence")
    for sampler in ("info_gain", "lookahead"):
        for degenerate in ({"num_candidates": 1}, {"position_temperature": 0.0}):
            got = run(sampler=sampler, **degenerate)
            assert torch.equal(got.tokens, expected.tokens)
            assert torch.equal(got.order, expected.order)
            assert got.cumulative_entropy == expected.cumulative_entropy


@quick
@given(seeds)
def test_vanishing_position_temperature_leaves_the_most_confident_candidate(seed):
    model = Counted(table(seed))
    expected = decode_masked(model.model, masks(model.model), mask_id=3, sampler="confidence")
    for tau in (1e-12, 5e-324):
        model.batches.clear()
        g = torch.Generator().manual_seed(seed)
        settings = {"mask_id": 3, "position_temperature": tau, "bypass": None, "generator": g}
        got = decode_masked(model, masks(model.model), **settings)
        assert torch.equal(got.order, expected.order)
        assert set(model.batches) == {1}


@pytest.mark.parametrize("tau", [0.3, 1e9])
def test_candidates_are_drawn_with_plackett_luce_probabilities(tau):
    probs = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.4, 0.6], [0.5, 0.5]], dtype=torch.float64)
    weights = (probs.amax(1) / tau).softmax(0)
    runs, counts = 400, torch.zeros(4)
    g = torch.Generator().manual_seed(3)
    for _ in range(runs):
        model = Counted(independent(probs))
        settings = {"num_candidates": 2, "position_temperature": tau, "bypass": None}
        decode_masked(model, torch.full((4,), 2), mask_id=2, generator=g, **settings)
        second = model.states[1][-1]  # the greedy candidate alone if the draw repeated it
        counts[(second != 2).nonzero().squeeze(1)] += 1
    expected = runs * weights
    # Chi-square with 3 degrees of freedom; false-alarm rate 1e-4. The seed is fixed.
    assert float(((counts - expected) ** 2 / expected).sum()) < 21.1


@quick
@given(seeds)
def test_independent_positions_tie_in_the_sum_form_and_order_by_entropy_in_the_mean(seed):
    probs = (3 * random(seed, 5, 4)).softmax(1)
    model, tokens = independent(probs), torch.full((5,), 4)
    settings = {"mask_id": 4, "num_candidates": None, "bypass": None}
    # Committing i leaves the others as they are: the cost and what remains add up to the same.
    actions = [([i], [0]) for i in range(5)]
    scores = information_gain_scores(model, tokens, actions, 4, future="sum")
    torch.testing.assert_close(scores.objective, -scores.entropy.expand(5), **close)
    got = decode_masked(model, tokens, future="sum", **settings)
    assert got.order.tolist() == [0, 1, 2, 3, 4]
    got = decode_masked(model, tokens, future="mean", **settings)
    entropy = decode_masked(model, tokens, mask_id=4, sampler="entropy")
    assert torch.equal(got.order[:3], entropy.order[:3])
    assert got.order[3:].tolist() == sorted(got.order[3:].tolist())  # two left: a tie again


def test_a_low_bypass_takes_one_call_a_block_and_a_high_one_none():
    model = Counted(table(1, length=6, vocab=4))
    settings = {"mask_id": 4, "block_size": 2}
    for sampler in ("info_gain", "lookahead"):
        model.batches.clear()
        got = decode_masked(model, masks(model.model), sampler=sampler, bypass=1 / 4, **settings)
        assert model.batches == [1, 1, 1]
        assert [sorted(pair) for pair in got.order.view(3, 2).tolist()] == [[0, 1], [2, 3], [4, 5]]
        marginals = model.model(masks(model.model)[None])[0]
        assert torch.equal(got.tokens[:2], marginals[:2].argmax(-1))
        runs = []
        for bypass in (1.1, None):
            g = torch.Generator().manual_seed(0)
            model.batches.clear()
            decode_masked(model, masks(model.model), bypass=bypass, generator=g, **settings)
            runs.append(list(model.batches))
        assert runs[0] == runs[1]
        assert len(runs[0]) == 6  # a block of two: its start, and one look-ahead


def test_bypass_of_uniform_marginals_is_not_lost_to_rounding():
    for vocab in (3, 7, 10):
        for dtype in (torch.float32, torch.float64):
            logits = torch.full((1, 4, vocab), 0.1, dtype=dtype)
            model = Counted(lambda ids, logits=logits: logits.expand(len(ids), -1, -1))
            decode_masked(model, torch.full((4,), vocab), mask_id=vocab, bypass=1 / vocab)
            assert model.batches == [1]


def test_bypass_counts_the_entropies_of_the_state_it_fills():
    probs = torch.tensor([[0.9, 0.1], [0.15, 0.85], [0.99, 0.01]], dtype=torch.float64)
    got = decode_masked(independent(probs), torch.full((3,), 2), mask_id=2)
    assert got.tokens.tolist() == [0, 1, 0]
    assert got.order.tolist() == [2, 0, 1]
    expected = float(-(probs * probs.log()).sum())
    assert float(got.cumulative_entropy) == pytest.approx(expected, abs=1e-9)


def test_blocks_count_from_the_first_mask_and_are_filled_in_turn():
    model = table(2, length=6, vocab=2)
    tokens = torch.tensor([1, 2, 2, 0, 2, 2])
    got = decode_masked(model, tokens, mask_id=2, sampler="confidence", block_size=2)
    assert [sorted(got.order[:2].tolist()), got.order[2:].tolist()[0]] == [[1, 2], 4]
    assert got.order.tolist()[3] == 5
    whole = decode_masked(model, tokens, mask_id=2, sampler="confidence", block_size=100)
    plain = decode_masked(model, tokens, mask_id=2, sampler="confidence")
    assert torch.equal(whole.order, plain.order)


@pytest.mark.parametrize("steps", range(3, 12))
def test_any_number_of_steps_fills_every_block(steps):
    model = Counted(table(4, length=7, vocab=2))
    settings = {"mask_id": 2, "block_size": 3, "steps": steps}
    got = decode_masked(model, masks(model.model), sampler="confidence", **settings)
    assert sorted(got.order.tolist()) == list(range(7))
    shares = transfer_schedule(steps, 3).tolist()
    assert len(model.batches) == sum(min(n, s) for n, s in zip((3, 3, 1), shares, strict=True))


def test_several_positions_a_step_are_the_schedule():
    probs = torch.tensor(
        [[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.8, 0.2], [0.95, 0.05]], dtype=torch.float64
    )
    model = Counted(independent(probs))
    got = decode_masked(model, torch.full((5,), 2), mask_id=2, sampler="confidence", steps=2)
    assert len(model.batches) == 2
    assert got.order.tolist() == [4, 0, 3, 2, 1]
    # Look-ahead over single positions commits the best of them together.
    model.batches.clear()
    settings = {"num_candidates": None, "bypass": None, "steps": 2}
    got = decode_masked(model, torch.full((5,), 2), mask_id=2, **settings)
    assert got.order.tolist()[:3] == [4, 0, 3]
    assert model.batches == [1, 5, 1]


def test_ties_go_to_the_lower_index():
    tokens = torch.full((4,), 3)

    def flat(ids):
        # Equal marginals up to rounding, the last ones larger by an ulp.
        logits = torch.zeros(len(ids), 4, 3).double()
        return logits + torch.tensor([0.0, 1e-15, 2e-15, 3e-15]).view(4, 1) * torch.eye(3)[1]

    for sampler in SAMPLERS:
        settings = {"sampler": sampler, "num_candidates": None, "bypass": None}
        assert decode_masked(flat, tokens, mask_id=3, **settings).order.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_decoding_ignores_constants_and_follows_permutations_of_the_vocabulary(sampler):
    model = table(11, length=5)
    shuffle = torch.tensor([2, 0, 1, 3])  # new name of each token; the mask keeps its own
    settings = {"mask_id": 3, "sampler": sampler, "num_candidates": None, "bypass": None}
    plain = decode_masked(model, masks(model), **settings)
    shifted = decode_masked(lambda ids: model(ids) + 100.0, masks(model), **settings)
    assert torch.equal(shifted.tokens, plain.tokens)
    assert torch.equal(shifted.order, plain.order)

    def renamed(ids):
        return model(shuffle.argsort()[ids])[..., shuffle[:3].argsort()]

    got = decode_masked(renamed, masks(model), **settings)
    assert torch.equal(got.tokens, shuffle[plain.tokens])
    assert torch.equal(got.order, plain.order)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_permuting_positions_permutes_the_order(sampler):
    model = table(12, length=5)
    shuffle = torch.tensor([3, 0, 4, 2, 1])
    settings = {"mask_id": 3, "sampler": sampler, "num_candidates": None, "bypass": None}
    plain = decode_masked(model, masks(model), **settings)

    def moved(ids):  # position shuffle[i] of this model is position i of the other
        return model(ids[:, shuffle])[:, shuffle.argsort()]

    got = decode_masked(moved, masks(model), **settings)
    assert torch.equal(got.order, shuffle[plain.order])
    assert torch.equal(got.tokens[shuffle], plain.tokens)


@pytest.mark.parametrize("sampler", ["confidence", "entropy", "margin"])
def test_an_exact_model_is_sampled_exactly_in_any_order(sampler):
    model, runs = table(3, length=3, vocab=2), 500
    g = torch.Generator().manual_seed(7)
    settings = {"mask_id": 2, "sampler": sampler, "token_temperature": 1.0, "generator": g}
    results = [decode_masked(model, masks(model), **settings) for _ in range(runs)]
    # Chain rule: the mean cumulative entropy is the joint entropy. False-alarm rate 6e-5.
    probs = model.log_probs.exp()
    joint = float(-(probs * probs.log()).sum())
    costs = torch.stack([result.cumulative_entropy for result in results])
    assert abs(float(costs.mean()) - joint) < 4 * float(costs.std()) / math.sqrt(runs) + 1e-9
    # The drawn sequences follow the law: chi-square with 7 degrees of freedom, 1e-4.
    codes = torch.stack([result.tokens for result in results]) @ torch.tensor([4, 2, 1])
    expected = runs * probs
    counts = torch.bincount(codes, minlength=8)
    assert float(((counts - expected) ** 2 / expected)[expected > 1].sum()) < 29.9


def cheapest(model: TabularMaskedModel) -> float:
    """Smallest cumulative entropy of all orders with argmax tokens."""
    best = INF
    length = model.indicators.shape[1]
    for order in permutations(range(length)):
        ids, total = masks(model), 0.0
        for place in order:
            logits = model(ids[None])[0]
            total += float(position_entropies(logits)[place])
            ids[place] = logits[place].argmax()
        best = min(best, total)
    return best


def test_cumulative_entropy_is_at_least_the_best_order_and_info_gain_is_often_closest():
    settings = {"mask_id": 2, "num_candidates": None, "bypass": None, "future": "sum"}
    gaps = {"info_gain": [], "confidence": []}
    for seed in range(12):
        model = table(seed, length=4, vocab=2)
        best = cheapest(model)
        for sampler, found in gaps.items():
            got = decode_masked(model, masks(model), sampler=sampler, **settings)
            found.append(float(got.cumulative_entropy) - best)
            assert found[-1] > -1e-9
    assert max(gaps["info_gain"]) > 1e-3  # one-step look-ahead is not optimal
    assert sum(gaps["info_gain"]) < sum(gaps["confidence"])


def test_random_tables_have_less_cumulative_entropy_with_info_gain():
    total = {"info_gain": 0.0, "confidence": 0.0}
    for seed in range(40):
        model = table(seed, length=5, vocab=2)
        for sampler in total:
            settings = {"num_candidates": None, "bypass": None, "sampler": sampler}
            total[sampler] += float(
                decode_masked(model, masks(model), mask_id=2, **settings).cumulative_entropy
            )
    assert total["info_gain"] < total["confidence"]


def sudokus() -> torch.Tensor:
    """All 288 grids of 4 x 4, each 16 tokens."""
    rows = list(permutations(range(4)))

    def fits(grid):
        columns = all(len(set(column)) == len(column) for column in zip(*grid, strict=True))
        pairs = [grid[i : i + 2] for i in range(0, len(grid) - 1, 2)]
        boxes = all(len({*a[c : c + 2], *b[c : c + 2]}) == 4 for a, b in pairs for c in (0, 2))
        return columns and boxes

    grids = [()]
    for _ in range(4):
        grids = [(*grid, row) for grid in grids for row in rows if fits((*grid, row))]
    return torch.tensor(grids).view(-1, 16)


def test_sudokus_filled_several_at_a_time_are_valid_more_often_with_look_ahead():
    grids = sudokus()
    assert len(grids) == 288
    model = TabularMaskedModel(grids, torch.ones(288).double(), 4, 4)
    samplers, puzzles = ("confidence", "entropy", "info_gain"), 24
    valid, entropy = (dict.fromkeys(samplers, 0.0) for _ in range(2))
    for n in range(puzzles):
        g = torch.Generator().manual_seed(n)
        tokens = torch.full((16,), 4)
        clues = torch.randperm(16, generator=g)[:3]
        tokens[clues] = grids[int(torch.randint(288, (1,), generator=g)), clues]
        for sampler in samplers:
            settings = {"sampler": sampler, "steps": 4, "bypass": None}
            g.manual_seed(n)
            got = decode_masked(model, tokens, mask_id=4, generator=g, **settings)
            valid[sampler] += int((grids == got.tokens).all(1).any())
            entropy[sampler] += float(got.cumulative_entropy)
    assert valid["info_gain"] > 0.8 * puzzles
    assert max(valid["confidence"], valid["entropy"]) < 0.6 * puzzles
    assert entropy["info_gain"] < 0.5 * min(entropy["confidence"], entropy["entropy"])


def test_sudokus_filled_one_at_a_time_are_always_valid():
    grids = sudokus()
    model = TabularMaskedModel(grids, torch.ones(288).double(), 4, 4)
    for sampler in SAMPLERS:
        got = decode_masked(model, torch.full((16,), 4), mask_id=4, sampler=sampler, bypass=None)
        assert (grids == got.tokens).all(1).any()


def test_actions_at_the_same_positions_with_other_tokens_are_kept():
    probs = torch.full((2, 6), 1 / 6).double()
    model = Counted(independent(probs))
    g = torch.Generator().manual_seed(0)
    settings = {"num_candidates": 40, "token_temperature": 1.0, "bypass": None, "generator": g}
    decode_masked(model, torch.full((2,), 6), mask_id=6, **settings)
    states = {tuple(state) for state in model.states[1].tolist()}
    assert len(states) == model.batches[1]  # distinct
    assert model.batches[1] > 2  # more than there are positions
    model = Counted(independent(probs))
    settings.update(token_temperature=0.0)
    decode_masked(model, torch.full((2,), 6), mask_id=6, **settings)
    assert model.batches[1] == 2


def test_drawn_tokens_follow_the_softmax_at_the_token_temperature():
    logits = torch.tensor([0.0, 1.0, -INF, 2.0], dtype=torch.float64)
    runs, temperature = 800, 0.7
    tokens = torch.full((runs,), 4)
    g = torch.Generator().manual_seed(5)
    settings = {"sampler": "entropy", "steps": 1, "token_temperature": temperature, "generator": g}
    got = decode_masked(lambda ids: logits.expand(*ids.shape, 4), tokens, mask_id=4, **settings)
    counts = torch.bincount(got.tokens, minlength=4).double()
    assert counts[2] == 0
    expected = runs * (logits / temperature).softmax(0)
    kept = expected > 0
    # Chi-square with 2 degrees of freedom; false-alarm rate 1e-4. The seed is fixed.
    assert float(((counts - expected) ** 2 / expected)[kept].sum()) < 18.4


def test_the_mask_token_is_never_chosen_and_the_generator_settles_everything():
    def model(ids):
        logits = torch.zeros(*ids.shape, 4)
        logits[..., 3] = 50.0  # badly trained: it predicts the mask
        return logits + 0.1 * ids[..., None] % 3

    for sampler in SAMPLERS:
        settings = {"mask_id": 3, "sampler": sampler, "token_temperature": 1.0}
        runs = [
            decode_masked(
                model, torch.full((9,), 3), generator=torch.Generator().manual_seed(1), **settings
            )
            for _ in range(2)
        ]
        assert (runs[0].tokens < 3).all()
        assert torch.equal(runs[0].tokens, runs[1].tokens)
        assert torch.equal(runs[0].order, runs[1].order)


def test_nothing_masked_is_returned_as_it_is_without_a_call():
    model = Counted(table(0))
    got = decode_masked(model, torch.tensor([0, 1, 2, 0]), mask_id=3)
    assert got.tokens.tolist() == [0, 1, 2, 0]
    assert got.order.tolist() == []
    assert got.cumulative_entropy == 0
    assert model.batches == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_models_decode_without_gradients(dtype):
    weight = torch.nn.Parameter(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))

    def model(ids):
        return (1e4 * weight[ids] - 5e3).to(dtype)

    got = decode_masked(model, torch.full((3,), 4, dtype=torch.int32), mask_id=4)
    assert got.tokens.dtype == torch.int32
    assert got.cumulative_entropy.dtype == torch.float32
    assert got.cumulative_entropy.isfinite()
    assert not got.cumulative_entropy.requires_grad


# The likelihood bound


def test_bound_of_the_exact_model_is_the_likelihood_of_every_sequence():
    model = table(1)
    got = masked_nelbo(model, torch.tensor(list(law(model))), 3, form="enumerate")
    torch.testing.assert_close(got, -model.log_probs, **close)


def inexact(seed: int, vocab: int = 3):
    weight = 4 * random(seed, 4, vocab + 1, 4, vocab) - 2

    def model(ids):
        return weight[torch.arange(4), ids].sum(1)

    return model


@quick
@given(seeds)
def test_both_forms_of_the_bound_agree(seed):
    model, x = inexact(seed), (3 * random(seed + 1, 4)).long()
    # Gauss-Legendre is exact for the polynomial in t that the integrand is.
    nodes = torch.tensor([-0.8611363115940526, -0.3399810435848563], dtype=torch.float64)
    nodes = torch.cat([nodes, -nodes.flip(0)])
    weights = torch.tensor([0.3478548451374538, 0.6521451548625461], dtype=torch.float64)
    weights = torch.cat([weights, weights.flip(0)])
    integral = 0.0
    for size in range(1, 5):
        for hidden in combinations(range(4), size):
            z = x.clone()
            z[list(hidden)] = 3
            log_probs = model(z[None])[0].log_softmax(-1)
            loss = -sum(float(log_probs[i, x[i]]) for i in hidden)
            for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
                t = (node + 1) / 2
                integral += weight / 2 * t ** (size - 1) * (1 - t) ** (4 - size) * loss
    got = masked_nelbo(model, x[None], 3, form="enumerate")
    assert float(got) == pytest.approx(integral, abs=1e-9)


def test_bound_is_at_least_the_order_averaged_likelihood():
    model = inexact(5)
    x = torch.tensor([[0, 2, 1, 1]])
    orders = []
    for order in permutations(range(4)):
        z, total = torch.full((1, 4), 3), 0.0
        for place in order:
            total += float(model(z)[0, place].log_softmax(-1)[x[0, place]])
            z[0, place] = x[0, place]
        orders.append(total)
    orders = torch.tensor(orders, dtype=torch.float64)
    got = float(masked_nelbo(model, x, 3, form="enumerate"))
    assert got == pytest.approx(-float(orders.mean()), abs=1e-9)  # average over orders
    assert got >= -float(orders.exp().mean().log())  # Jensen


def test_sampled_bound_is_unbiased():
    model = inexact(0)
    x, rows = torch.tensor([[0, 1, 2, 0]]), 4000
    expected = float(masked_nelbo(model, x, 3, form="enumerate"))
    got = masked_nelbo(model, x.expand(rows, 4), 3, generator=torch.Generator().manual_seed(0))
    # Normal approximation, false-alarm rate 6e-5. The seed is fixed.
    assert abs(float(got.mean()) - expected) < 4 * float(got.std()) / math.sqrt(rows)


def test_sampled_bound_takes_one_call():
    model = Counted(inexact(0))
    masked_nelbo(model, torch.zeros(5, 4, dtype=torch.long), 3)
    assert model.batches == [5]


def test_prompts_and_padding_are_never_hidden_and_empty_rows_give_zero():
    exact = table(1)
    x = torch.tensor([[0, 1, 2, 2], [0, 1, 2, 2], [1, 1, 1, 1]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    model = Counted(exact)
    got = masked_nelbo(model, x, 3, form="enumerate", mask=mask)
    assert float(got[0]) == pytest.approx(-math.log(law(exact)[(0, 1, 2, 2)]), abs=1e-9)
    known = sum(p for s, p in law(exact).items() if s[0] == 0 and s[3] == 2)
    assert float(got[1]) == pytest.approx(-math.log(law(exact)[(0, 1, 2, 2)] / known), abs=1e-9)
    assert float(got[2]) == 0
    model.states.clear()
    for seed in range(20):
        drawn = masked_nelbo(model, x, 3, mask=mask, generator=torch.Generator().manual_seed(seed))
        assert float(drawn[2]) == 0
    hidden = torch.stack(model.states) == 3
    assert not (hidden & ~mask).any()
    assert hidden[:, :2].any(-1).all()


def test_a_fully_masked_batch_is_zero_with_zero_gradient():
    weight = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    for form in ("sample", "enumerate"):
        x = torch.tensor([[3, 0, 1], [2, 3, 3]])
        loss = masked_nelbo(lambda ids: weight[ids], x, 3, form=form, mask=nothing)
        assert loss.tolist() == [0.0, 0.0]
        weight.grad = None
        loss.sum().backward()
        assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_gradients_of_the_bound_are_right():
    weight = random(0, 4, 3).requires_grad_()
    x = torch.tensor([[0, 1, 2], [2, 2, 0]])

    def loss(weight, form):
        g = torch.Generator().manual_seed(0)
        return masked_nelbo(lambda ids: weight[ids].cumsum(1), x, 3, form=form, generator=g)

    for form in ("sample", "enumerate"):
        assert torch.autograd.gradcheck(lambda w, form=form: loss(w, form), (weight,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bound_keeps_the_dtype_and_is_finite_at_the_extremes(dtype):
    x = torch.zeros(2, 5, dtype=torch.long)

    def model(ids):
        return torch.tensor([-1e4, 0.0, 0.0], dtype=dtype).expand(*ids.shape, 3)

    got = masked_nelbo(model, x, 3, form="enumerate")
    assert got.dtype == dtype
    expected = 5 * (1e4 + math.log(2))
    assert float(got[0]) == pytest.approx(expected, rel=1e-2)


@quick
@given(st.integers(0, 40), st.integers(1, 50))
def test_schedule_shares_evenly_and_in_full(n, steps):
    got = transfer_schedule(n, steps).tolist()
    assert sum(got) == n
    assert len(got) == steps
    assert got == sorted(got, reverse=True)
    assert max(got) - min(got) <= 1


T, M = torch.full((4,), 3), table(0)
X = torch.zeros(1, 4, dtype=torch.long)


def scored(candidates, model=M, **changed):
    return information_gain_scores(model, T, candidates, 3, **changed)


def nan_model(ids):
    return torch.full((*ids.shape, 3), math.nan)


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: position_entropies(torch.ones(3)), ValueError, "logits"),
        (lambda: position_entropies(torch.ones(0, 3)), ValueError, "logits"),
        (lambda: position_entropies(X), TypeError, "logits"),
        (lambda: position_entropies(torch.ones(2, 3), torch.ones(3)), ValueError, "mask"),
        (lambda: scored([]), ValueError, "candidates"),
        (lambda: scored([([0], [0, 1])]), ValueError, r"candidates\[0\]"),
        (lambda: scored([([], [])]), ValueError, r"candidates\[0\]"),
        (lambda: scored([([0], [1]), ([4], [0])]), ValueError, r"candidates\[1\]"),
        (lambda: scored([([1, 1], [0, 0])]), ValueError, r"candidates\[0\]"),
        (lambda: scored([([0.5], [0])]), TypeError, r"candidates\[0\]"),
        (lambda: scored([([0], [3])]), ValueError, "candidates"),
        (lambda: scored([([0], [7])], independent(torch.ones(4, 3))), ValueError, "candidates"),
        (lambda: scored([([0], [0])], future="x"), ValueError, "future"),
        (lambda: scored([([0], [0])], lambda ids: ids), TypeError, r"model\(ids\)"),
        (lambda: scored([([0], [0])], lambda ids: torch.ones(2, 3)), ValueError, r"model\(ids\)"),
        (
            lambda: information_gain_scores(M, torch.tensor([0, 3, 3, 3]), [([0], [1])], 3),
            ValueError,
            "candidates",
        ),
        (lambda: transfer_schedule(-1, 2), ValueError, "num_masked"),
        (lambda: transfer_schedule(1, 0), ValueError, "steps"),
        (lambda: transfer_schedule(1.0, 1), TypeError, "num_masked"),
        (lambda: masked_nelbo(M, T, 3), ValueError, "tokens"),
        (lambda: masked_nelbo(M, X[:0], 3), ValueError, "tokens"),
        (lambda: masked_nelbo(M, X.double(), 3), TypeError, "tokens"),
        (lambda: masked_nelbo(M, X, 3, form="x"), ValueError, "form"),
        (lambda: masked_nelbo(M, X, 3, mask=torch.ones(1, 3)), ValueError, "mask"),
        (lambda: masked_nelbo(M, X.repeat(1, 5), 3, form="enumerate"), ValueError, "tokens"),
        (lambda: decode_masked(M, X, mask_id=3), ValueError, "tokens"),
        (lambda: decode_masked(M, T[:0], mask_id=3), ValueError, "tokens"),
        (lambda: decode_masked(M, T.double(), mask_id=3), TypeError, "tokens"),
        (lambda: decode_masked(M, T, mask_id=3, sampler="x"), ValueError, "sampler"),
        (lambda: decode_masked(M, T, mask_id=3, steps=0), ValueError, "steps"),
        (lambda: decode_masked(M, T, mask_id=3, steps=1, block_size=2), ValueError, "steps"),
        (lambda: decode_masked(M, T, mask_id=3, block_size=0), ValueError, "block_size"),
        (lambda: decode_masked(M, T, mask_id=3, num_candidates=0), ValueError, "num_candidates"),
        (
            lambda: decode_masked(M, T, mask_id=3, position_temperature=-1.0),
            ValueError,
            "position_temperature",
        ),
        (
            lambda: decode_masked(M, T, mask_id=3, token_temperature=INF),
            ValueError,
            "token_temperature",
        ),
        (lambda: decode_masked(M, T, mask_id=3, bypass=-0.1), ValueError, "bypass"),
        (lambda: decode_masked(M, T, mask_id=3, future="x"), ValueError, "future"),
        (lambda: decode_masked(nan_model, T, mask_id=3), ValueError, r"model\(ids\)"),
        (lambda: TabularMaskedModel(T, torch.ones(4), 3, 3), ValueError, "states"),
        (lambda: TabularMaskedModel(X.double(), torch.ones(1), 3, 3), TypeError, "states"),
        (lambda: TabularMaskedModel(X, torch.ones(1), 3, 0), ValueError, "states"),
        (lambda: TabularMaskedModel(X, torch.ones(2), 3, 3), ValueError, "probs"),
        (lambda: TabularMaskedModel(X, torch.zeros(1), 3, 3), ValueError, "probs"),
        (lambda: TabularMaskedModel(X, torch.ones(1), 0, 3), ValueError, "vocab_size"),
        (lambda: M(torch.tensor([[0, 1, 2, 5]])), ValueError, "ids"),
        (lambda: M(torch.zeros(1, 3, dtype=torch.long)), ValueError, "ids"),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=f"^{named}"):
        call()
