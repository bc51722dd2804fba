"""Cross-sampling: its limits, its budget, its controls, and its exact value on small trees."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.tokens import (
    cross_sample,
    exact_cross_sampling,
    random_switch_positions,
    switch_above_entropy,
    switch_above_js,
    switch_at,
    switch_below_js,
    token_shift,
    trace_cross_sampling,
)
from steelyard.tokens.cross_sampling import draw_token, effective_probability, jensen_shannon

properties = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**31)
LOG_2 = math.log(2.0)
DEPTH = 3


class Table:
    """A model whose next-token law depends on the last token and the length."""

    def __init__(self, seed, vocabulary=5, scale=2.0):
        generator = torch.Generator().manual_seed(seed)
        shape = (16, vocabulary, vocabulary)
        self.logits = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        self.calls = 0

    def __call__(self, ids):
        self.calls += 1
        return self.logits[ids.shape[1] % 16, ids[:, -1]]


def tree(seed, branches=2, depth=DEPTH, scale=1.5):
    """Random next-token probabilities of every prefix shorter than the depth."""
    generator = torch.Generator().manual_seed(seed)
    return {
        prefix: (scale * torch.randn(branches, generator=generator, dtype=torch.float64)).softmax(0)
        for length in range(depth)
        for prefix in itertools.product(range(branches), repeat=length)
    }


def model_of(law):
    return lambda ids: torch.stack([law[tuple(row)] for row in ids.tolist()]).log()


def run(host, other, *, seed=0, rows=64, **settings):
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.arange(rows)[:, None] % 5
    return cross_sample(
        host,
        other,
        prompt,
        max_new_tokens=8,
        generator=generator,
        **{"js_threshold": 0.1} | settings,
    )


@properties
@given(seeds)
def test_equal_models_never_switch_and_draw_the_same(seed):
    model = Table(seed)
    plain = run(model, Table(seed + 1), js_threshold=1.0)
    for threshold in (0.0, 0.1, 1.0):
        same = run(model, Table(seed), js_threshold=threshold)
        assert not same.switched.any()
        assert torch.equal(same.tokens, plain.tokens)


@properties
@given(seeds)
def test_thresholds_at_the_ends_give_the_pure_models(seed):
    host, other = Table(seed), Table(seed + 1)
    pure_host, pure_other = run(host, host), run(other, other)
    for threshold in (LOG_2, 10.0, math.inf):
        never = run(host, other, js_threshold=threshold)
        assert torch.equal(never.tokens, pure_host.tokens)
        assert not never.switched.any()
    for threshold in (-1e-9, -math.inf):
        always = run(host, other, js_threshold=threshold)
        assert torch.equal(always.tokens, pure_other.tokens)
        assert always.switched.all()


@properties
@given(seeds, st.integers(0, 9))
def test_a_budget_bounds_switches_from_none_to_the_plain_rule(seed, budget):
    host, other = Table(seed), Table(seed + 1)
    free, bounded = run(host, other), run(host, other, budget=budget)
    assert (bounded.switched.sum(-1) <= budget).all()
    if budget == 0:
        assert torch.equal(bounded.tokens, run(host, host).tokens)
    if budget >= 8:
        assert torch.equal(bounded.tokens, free.tokens)
        assert torch.equal(bounded.switched, free.switched)
    # Up to its last switch a response is that of the free rule, with the same random numbers.
    for row in range(len(free.tokens)):
        spent = bounded.switched[row].nonzero().flatten().tolist()
        until = spent[-1] + 1 if len(spent) == budget > 0 else 0 if budget == 0 else 8
        assert torch.equal(bounded.tokens[row, :until], free.tokens[row, :until])


@properties
@given(seeds)
def test_on_a_fixed_trajectory_fewer_positions_switch_as_the_threshold_rises(seed):
    host, other = Table(seed).logits.flatten(0, 1), Table(seed + 1).logits.flatten(0, 1)
    laws = host.log_softmax(-1), other.log_softmax(-1)
    counts = [int(switch_above_js(e)(*laws, 0).sum()) for e in torch.linspace(-0.1, 0.8, 30)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == len(host)
    assert counts[-1] == 0


def test_the_intervention_is_not_run_once_no_row_can_switch():
    host, other = Table(0), Table(1)
    run(host, other, js_threshold=-1.0, budget=3)
    assert (host.calls, other.calls) == (8, 3)
    run(host, other, budget=0)
    assert (host.calls, other.calls) == (16, 3)


def test_responses_end_with_the_end_token_and_are_filled_with_it():
    host, other = Table(0), Table(1)
    trace = trace_cross_sampling(
        host,
        other,
        torch.zeros(200, 1, dtype=torch.long),
        rule=switch_above_js(0.05),
        max_new_tokens=8,
        generator=torch.Generator().manual_seed(0),
        eos_id=3,
    )
    ended = (trace.tokens == 3).long().cumsum(-1) > 0
    assert ended.any()
    assert not ended.all()
    before = torch.cat((torch.zeros(200, 1, dtype=torch.bool), ended[:, :-1]), 1)
    assert torch.equal(trace.mask, ~before)
    assert (trace.tokens[before] == 3).all()
    assert not trace.switched[before].any()
    assert (trace.effective[~trace.switched] == 0).all()


def test_sampling_stops_when_all_have_ended():
    def ends(ids):
        model.calls += 1
        return torch.tensor([[-math.inf, 0.0]]).expand(len(ids), 2)

    model = ends
    model.calls = 0
    prompt = torch.zeros(3, 1, dtype=torch.int32)
    sample = cross_sample(ends, ends, prompt, js_threshold=0.1, max_new_tokens=5, eos_id=1)
    assert model.calls == 2  # host and intervention, once each
    assert sample.tokens.tolist() == [[1] * 5] * 3
    assert sample.tokens.dtype == torch.int64


@properties
@given(seeds, st.sampled_from([None, 0, 1, 2]), st.floats(-0.1, 0.3))
def test_enumeration_is_the_sum_over_all_responses(seed, budget, threshold):
    base, rl = tree(seed), tree(seed + 1)
    won = switches = total = 0.0
    for response in itertools.product(range(2), repeat=DEPTH):
        prob, used = 1.0, 0
        for t, token in enumerate(response):
            p, q = base[response[:t]], rl[response[:t]]
            m = (p + q) / 2
            js = ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
            switch = bool(js > threshold) and (budget is None or used < budget)
            prob *= (q if switch else p)[token].item()
            used += switch
        total += prob
        won += prob * (sum(response) == 2)
        switches += prob * used
    exact = exact_cross_sampling(
        base, rl, lambda x: sum(x) == 2, js_threshold=threshold, budget=budget
    )
    assert total == pytest.approx(1.0)
    assert exact.success_probability == pytest.approx(won, abs=1e-12)
    assert exact.expected_switches == pytest.approx(switches, abs=1e-12)


@properties
@given(seeds, st.sampled_from([None, 1]))
def test_forward_is_backward_with_the_roles_exchanged(seed, budget):
    base, rl = tree(seed), tree(seed + 1)
    settings = {"success": lambda x: x[-1] == 0, "js_threshold": 0.05, "budget": budget}
    forward = exact_cross_sampling(base, rl, **settings)
    assert forward == exact_cross_sampling(rl, base, direction="backward", **settings)


def test_the_ends_of_the_enumeration_are_the_pure_models():
    base, rl = tree(0), tree(1)

    def success(law):
        return exact_cross_sampling(law, law, lambda x: x[0] == x[-1], js_threshold=0.1)

    def mixed(**settings):
        return exact_cross_sampling(base, rl, lambda x: x[0] == x[-1], **settings)

    assert success(base).expected_switches == 0
    assert mixed(js_threshold=LOG_2) == success(base)
    assert mixed(js_threshold=-1.0, budget=0) == success(base)
    always = mixed(js_threshold=-1.0)
    assert always.success_probability == pytest.approx(success(rl).success_probability)
    assert always.expected_switches == pytest.approx(DEPTH)
    assert mixed(js_threshold=0.05, budget=DEPTH) == mixed(js_threshold=0.05)


def test_responses_may_end_early_and_have_impossible_tokens():
    base = {(): [0.5, 0.25, 0.25], (0,): [1.0, 0.0]}
    rl = {(): torch.tensor([0.0, 0.5, 0.5]), (0,): [0.0, 1.0]}
    lengths = []
    exact = exact_cross_sampling(
        base, rl, lambda x: lengths.append(len(x)) or x == (0, 1), js_threshold=0.3
    )
    # JS at the root is 0.216 (kept), below it log 2: (0, 1) with probability 1/2.
    assert exact == (0.5, 0.5)
    assert sorted(lengths) == [1, 1, 2]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("budget", [None, 1])
def test_monte_carlo_agrees_with_the_enumeration(direction, budget):
    base, rl = tree(5), tree(6)
    exact = exact_cross_sampling(
        base, rl, lambda x: sum(x) >= 2, js_threshold=0.05, budget=budget, direction=direction
    )
    models = [model_of(base), model_of(rl)]
    rows = 4000
    sample = cross_sample(
        *(models if direction == "forward" else reversed(models)),
        torch.zeros(rows, 0, dtype=torch.long),
        js_threshold=0.05,
        budget=budget,
        max_new_tokens=DEPTH,
        generator=torch.Generator().manual_seed(0),
    )
    # Two-sided, 4 standard errors: 6e-5 false alarms a comparison for a new seed.
    share = (sample.tokens.sum(-1) >= 2).double().mean().item()
    error = math.sqrt(exact.success_probability * (1 - exact.success_probability) / rows)
    assert 0.05 < exact.success_probability < 0.95
    assert abs(share - exact.success_probability) < 4 * error
    switches = sample.switched.sum(-1).double()
    assert abs(switches.mean().item() - exact.expected_switches) < 4 * max(
        switches.std().item() / math.sqrt(rows), 1e-12
    )


@properties
@given(seeds)
def test_effective_averages_to_the_total_variation_distance(seed):
    """The mean is over all draws of the intervention model, so it is exact."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randint(0, 5, (2, 4), generator=generator).double()
    weights[0, 0], weights[1, 1] = 1.0, 1.0
    p, q = weights / weights.sum(-1, keepdim=True)
    drawn = q.nonzero().flatten()
    rows = (len(drawn), 4)
    chance = effective_probability(p.log().expand(rows), q.log().expand(rows), drawn)
    mean = (q[drawn] * chance).sum().item()
    assert mean == pytest.approx((p - q).abs().sum().item() / 2, abs=1e-12)


@properties
@given(seeds, st.integers(1, 6))
def test_tokens_are_drawn_by_inversion_and_never_with_probability_zero(seed, vocabulary):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(50, vocabulary, generator=generator, dtype=torch.float64)
    logits[:, 1:][torch.rand(50, vocabulary - 1, generator=generator) < 0.5] = -math.inf
    logits[:25, -1:] = -math.inf
    logits[:, 0].nan_to_num_(neginf=0.0)
    uniform = torch.rand(50, generator=generator, dtype=torch.float64)
    uniform[:5], uniform[5:15] = 0.0, 1.0 - 2.0**-53  # the ends of what a generator gives
    tokens = draw_token(logits.log_softmax(-1), uniform)
    for row, u, token in zip(logits.softmax(-1).tolist(), uniform, tokens.tolist(), strict=True):
        assert row[token] > 0
        assert sum(row[:token]) <= u + 1e-12
        assert u < sum(row[: token + 1]) + 1e-12


def test_js_of_equal_rows_is_zero_without_rounding_and_otherwise_that_of_token_shift():
    a, b = Table(0).logits[0].log_softmax(-1), Table(1).logits[0].log_softmax(-1)
    assert (jensen_shannon(a, a) == 0).all()
    torch.testing.assert_close(jensen_shannon(a, b), token_shift(a, b).js)
    gap = torch.tensor([[-math.inf, 0.0]])
    assert jensen_shannon(gap, gap) == 0


def test_temperature_sharpens_both_models_before_the_divergence():
    flat = torch.tensor([0.0, 0.0]).expand(1, 2)
    tilted = torch.tensor([0.0, 0.5]).expand(1, 2)
    prompt = torch.zeros(1, 1, dtype=torch.long)
    settings = {"js_threshold": 0.1, "max_new_tokens": 1}
    at_one = cross_sample(lambda ids: flat, lambda ids: tilted, prompt, **settings)
    cold = cross_sample(lambda ids: flat, lambda ids: tilted, prompt, temperature=0.01, **settings)
    assert not at_one.switched.any()
    assert cold.switched.all()
    assert cold.tokens.tolist() == [[1]]


def test_controls_switch_where_they_say():
    host, other = Table(0).logits[0].log_softmax(-1), Table(1).logits[0].log_softmax(-1)
    js = token_shift(host, other)
    for threshold in (0.0, 0.1, 0.3):
        above, below = switch_above_js(threshold), switch_below_js(threshold)
        assert torch.equal(above(host, other, 0), js.js > threshold)
        assert torch.equal(below(host, other, 0), ~above(host, other, 0))
        uncertain = switch_above_entropy(threshold)(host, other, 0)
        assert torch.equal(uncertain, js.base_entropy > threshold)


def test_random_positions_keep_the_count_of_each_row_and_are_uniform():
    switched = torch.tensor([[True, True, False, False, False]]).repeat(6000, 1)
    mask = torch.tensor([1, 1, 1, 1, 0]).repeat(6000, 1)
    moved = random_switch_positions(switched, mask, generator=torch.Generator().manual_seed(0))
    assert (moved.sum(-1) == 2).all()
    assert not moved[:, 4].any()
    # Each of four places is taken by 2 of 4; standard error 0.0065, false alarm 2e-4 in all.
    assert moved[:, :4].double().mean(0).numpy() == pytest.approx(0.5, abs=4.1 * 0.0065)
    with pytest.raises(ValueError, match="mask must keep at least"):
        random_switch_positions(switched, torch.tensor([1, 0, 0, 0, 0]).repeat(6000, 1))
    with pytest.raises(TypeError, match=r"switched must have dtype torch\.bool"):
        random_switch_positions(switched.long())


def test_the_control_switches_exactly_at_the_given_positions():
    host, other = Table(0), Table(1)
    positions = torch.rand(64, 8, generator=torch.Generator().manual_seed(0)) < 0.3
    prompt = torch.zeros(64, 1, dtype=torch.long)
    trace = trace_cross_sampling(host, other, prompt, rule=switch_at(positions), max_new_tokens=8)
    assert torch.equal(trace.switched, positions)
    with pytest.raises(ValueError, match="positions must reach max_new_tokens"):
        trace_cross_sampling(host, other, prompt, rule=switch_at(positions), max_new_tokens=9)
    with pytest.raises(TypeError, match=r"positions must have dtype torch\.bool"):
        switch_at(positions.long())


def test_a_generator_decides_the_responses():
    host, other = Table(0), Table(1)
    assert torch.equal(run(host, other, seed=3).tokens, run(host, other, seed=3).tokens)
    assert not torch.equal(run(host, other, seed=3).tokens, run(host, other, seed=4).tokens)


def model_returning(value):
    return lambda ids: value


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"host_model": 3}, TypeError, "host_model must be callable"),
        ({"intervention_model": None}, TypeError, "intervention_model must be callable"),
        ({"prompt_ids": torch.zeros(1, 2)}, TypeError, "prompt_ids must have a wide integer"),
        ({"prompt_ids": torch.ones(1, 2).bool()}, TypeError, "prompt_ids must have a wide integer"),
        ({"prompt_ids": torch.zeros(2).long()}, ValueError, "prompt_ids must have shape"),
        ({"prompt_ids": torch.zeros(0, 2).long()}, ValueError, "prompt_ids must have shape"),
        ({"prompt_ids": [[1]]}, TypeError, "prompt_ids must be a torch.Tensor"),
        ({"js_threshold": math.nan}, ValueError, "js_threshold must not be NaN"),
        ({"js_threshold": "0.1"}, TypeError, "js_threshold must be a number"),
        ({"budget": -1}, ValueError, "budget must be >= 0"),
        ({"budget": 1.5}, TypeError, "budget must be an integer"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be >= 1"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0"),
        ({"eos_id": -1}, ValueError, "eos_id must be >= 0"),
        ({"host_model": model_returning(torch.zeros(1, 2, 5))}, ValueError, "host_model must ret"),
        ({"host_model": model_returning([1])}, TypeError, "host_model must return a floating"),
        ({"host_model": model_returning(torch.zeros(1, 5) / 0)}, ValueError, "with NaN"),
        ({"intervention_model": Table(0, 6)}, ValueError, "the 5 tokens of host_model, got 6"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {
        "host_model": Table(0),
        "intervention_model": Table(1),
        "prompt_ids": torch.zeros(1, 2, dtype=torch.long),
        "js_threshold": 0.1,
        "max_new_tokens": 3,
        **change,
    }
    with pytest.raises(error, match=message):
        cross_sample(**arguments)


def test_a_rule_must_return_one_boolean_for_each_row():
    prompt = torch.zeros(2, 1, dtype=torch.long)
    for rule, error in (
        (lambda host, other, step: torch.ones(2), TypeError),
        (lambda host, other, step: torch.ones(3).bool(), ValueError),
    ):
        with pytest.raises(error, match="rule"):
            trace_cross_sampling(Table(0), Table(1), prompt, rule=rule, max_new_tokens=1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"base": {}}, ValueError, r"base must have the root \(\)"),
        ({"base": [0.5, 0.5]}, TypeError, "base must be a mapping"),
        ({"rl": {(): [0.5, 0.5], (0,): [1.0]}}, ValueError, r"same prefixes, \(0,\) is in one"),
        ({"rl": {(): [0.5, 0.6]}}, ValueError, "rl.* must hold probabilities"),
        ({"rl": {(): [1.5, -0.5]}}, ValueError, "rl.* must hold probabilities"),
        ({"rl": {(): [math.nan, 1.0]}}, ValueError, "rl.* must hold probabilities"),
        ({"rl": {(): [1.0]}}, ValueError, "as many tokens at"),
        ({"direction": "sideways"}, ValueError, "direction must be one of"),
        ({"budget": -1}, ValueError, "budget"),
        ({"js_threshold": math.nan}, ValueError, "js_threshold"),
        ({"success": True}, TypeError, "success must be callable"),
    ],
)
def test_errors_of_the_enumeration_name_the_argument(change, error, message):
    arguments = {
        "base": {(): [0.5, 0.5]},
        "rl": {(): [0.5, 0.5]},
        "success": bool,
        "js_threshold": 0.1,
        **change,
    }
    with pytest.raises(error, match=message):
        exact_cross_sampling(**arguments)
