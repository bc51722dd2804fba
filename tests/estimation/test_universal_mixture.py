"""Bayesian mixtures over finite classes against sums over all sequences, and their theorems."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.estimation import (
    BayesianMixture,
    ball_bound,
    batch_regret,
    hypothesis_weight,
    online_regret,
    soft_bound,
)

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)
close = {"rtol": 1e-10, "atol": 1e-12}


def laws(seed: int, models: int = 4, symbols: int = 3):
    """A random class, prior and truth; every third class has impossible symbols."""
    g = torch.Generator().manual_seed(seed)
    table = torch.rand(models + 1, symbols, dtype=torch.float64, generator=g) + 1e-3
    if seed % 3 == 0:
        table[0, 0] = 0.0
    table = table / table.sum(1, keepdim=True)
    prior = torch.rand(models, dtype=torch.float64, generator=g) + 0.05
    return table[:models], prior / prior.sum(), table[models]


def kl(p, q):
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)


def sequences(symbols: int, n: int):
    return torch.tensor(list(itertools.product(range(symbols), repeat=n)))


def sequence_probs(law, table):
    """Probabilities of sequences ``[.., n]`` under laws ``[M, S]``, as ``[M, ..]``."""
    return law[:, table].prod(-1)


@quick
@given(seeds, st.integers(1, 5))
def test_online_regret_is_the_divergence_over_all_sequences(seed, n):
    models, prior, truth = laws(seed)
    table = sequences(3, n)
    mixture = prior @ sequence_probs(models, table)
    own = sequence_probs(truth.unsqueeze(0), table)[0]
    got = online_regret(models, prior, truth, n)
    torch.testing.assert_close(got, kl(own, mixture) / n, **close)


@quick
@given(seeds, st.integers(1, 12))
def test_regret_of_the_sequence_is_the_sum_of_the_regrets_of_its_symbols(seed, n):
    models, prior, truth = laws(seed)
    symbol_by_symbol = batch_regret(models, prior, truth, n)
    assert (symbol_by_symbol >= -1e-14).all()
    total = n * online_regret(models, prior, truth, n)
    torch.testing.assert_close(symbol_by_symbol.sum(), total, **close)


@quick
@given(seeds, st.integers(1, 4))
def test_probabilities_of_all_sequences_sum_to_one(seed, n):
    models, prior, _ = laws(seed)
    losses = [BayesianMixture(models, prior).update(row) for row in sequences(3, n)]
    total = torch.stack(losses).neg().exp().sum()
    torch.testing.assert_close(total, torch.ones_like(total), **close)


@quick
@given(seeds, st.integers(1, 30))
def test_regret_is_below_the_soft_bound_and_that_below_every_ball(seed, n):
    models, prior, truth = laws(seed)
    kls = kl(truth, models)
    soft = soft_bound(kls, prior, n)
    assert online_regret(models, prior, truth, n) <= soft + 1e-12
    radii = torch.cat([torch.linspace(0, 3, 50, dtype=torch.float64), kls])
    balls = ball_bound(kls, prior, radii, n)
    assert (soft <= balls + 1e-12).all()
    assert torch.isfinite(balls).any()


@quick
@given(seeds, st.integers(1, 6))
def test_prior_average_of_the_regret_is_the_mutual_information(seed, n):
    models, prior, _ = laws(seed)
    average = sum(
        w * n * online_regret(models, prior, m, n) for w, m in zip(prior, models, strict=True)
    )
    table = sequences(3, n)
    joint = prior.unsqueeze(1) * sequence_probs(models, table)
    product = prior.unsqueeze(1) * joint.sum(0)
    information = kl(joint.flatten(), product.flatten())
    torch.testing.assert_close(average, information, **close)
    assert information <= -(prior * prior.log()).sum() + 1e-12


@quick
@given(seeds)
def test_prior_average_of_the_batch_regret_never_rises(seed):
    models, prior, _ = laws(seed)
    curves = torch.stack([batch_regret(models, prior, model, 10) for model in models])
    average = prior @ curves
    assert (average.diff() <= 1e-12).all()


def test_batch_regret_at_one_truth_can_rise():
    assert any(
        (batch_regret(models, prior, truth, 6).diff() > 1e-3).any()
        for models, prior, truth in (laws(seed) for seed in range(1, 20))
    )


@quick
@given(seeds, st.integers(2, 7), st.integers(1, 15))
def test_copies_of_every_hypothesis_change_nothing(seed, copies, n):
    models, prior, truth = laws(seed)
    many, thin = models.repeat(copies, 1), prior.repeat(copies) / copies
    expected = online_regret(models, prior, truth, n)
    torch.testing.assert_close(online_regret(many, thin, truth, n), expected, **close)
    kls, many_kls = kl(truth, models), kl(truth, many)
    for radius in (0.05, 0.5, 5.0):
        got = hypothesis_weight(many_kls, thin, radius)
        torch.testing.assert_close(got, hypothesis_weight(kls, prior, radius), **close)


@quick
@given(seeds, st.floats(0.01, 0.9), st.integers(1, 15))
def test_useless_hypotheses_cost_at_most_the_log_of_what_they_leave(seed, mass, n):
    models, prior, truth = laws(seed)
    useless, _, _ = laws(seed + 1, models=6)
    more = torch.cat([models, useless])
    prior_of_more = torch.cat([(1 - mass) * prior, mass * torch.full((6,), 1 / 6).double()])
    cost = online_regret(more, prior_of_more, truth, n) - online_regret(models, prior, truth, n)
    assert cost <= math.log(1 / (1 - mass)) / n + 1e-12


@quick
@given(seeds)
def test_posterior_odds_keep_their_prior_mean_under_the_truth(seed):
    models, prior, _ = laws(seed * 3 + 1)  # no impossible symbols
    table = sequences(3, 4)
    posteriors = []
    for row in table:
        mixture = BayesianMixture(models, prior)
        mixture.update(row)
        posteriors.append(mixture.posterior)
    odds = torch.stack(posteriors) / torch.stack(posteriors)[:, :1]
    mean = sequence_probs(models[:1], table)[0] @ odds
    torch.testing.assert_close(mean, prior / prior[0], **close)


@quick
@given(seeds, st.integers(0, 40))
def test_order_and_batching_of_symbols_change_nothing(seed, n):
    models, prior, truth = laws(seed)
    g = torch.Generator().manual_seed(seed)
    symbols = torch.multinomial(truth, max(n, 1), True, generator=g)[:n]
    at_once, one_by_one = BayesianMixture(models, prior), BayesianMixture(models, prior)
    total = at_once.update(symbols[torch.randperm(n, generator=g)])
    steps = [-one_by_one.predict()[x].log() + 0 * one_by_one.update(x.view(1)) for x in symbols]
    torch.testing.assert_close(sum(steps, torch.zeros_like(total)), total, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(one_by_one.posterior, at_once.posterior, rtol=1e-9, atol=1e-12)


@quick
@given(seeds)
def test_loss_of_the_average_is_at_most_the_average_loss(seed):
    models, prior, truth = laws(seed * 3 + 1)
    symbols = torch.multinomial(truth, 5, True)
    alone = torch.stack(
        [BayesianMixture(m.unsqueeze(0), prior.new_ones(1)).update(symbols) for m in models]
    )
    assert BayesianMixture(models, prior).update(symbols) <= prior @ alone + 1e-12


def test_mixture_can_beat_its_best_model_outside_the_class():
    models = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64)
    prior, truth = torch.tensor([0.5, 0.5]).double(), torch.tensor([0.5, 0.5]).double()
    best = kl(truth, models).min()
    excess = online_regret(models, prior, truth, 1) - best
    assert excess < -0.5
    assert excess >= -best - 1e-12
    assert online_regret(models, prior, truth, 1).abs() < 1e-14


def test_grid_of_coins_approaches_the_rule_of_laplace():
    heads = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    mixture = BayesianMixture(torch.stack([1 - heads, heads], 1), torch.full_like(heads, 1 / 4000))
    mixture.update(torch.tensor([1] * 7 + [0] * 3))
    assert mixture.predict()[1].item() == pytest.approx(8 / 12, abs=1e-6)


@quick
@given(seeds)
def test_weight_rises_from_the_truth_to_one(seed):
    models, prior, truth = laws(seed)
    kls = kl(truth, models)
    radii = torch.linspace(0, 5, 200, dtype=torch.float64)
    weights = hypothesis_weight(kls, prior, radii)
    assert (weights.diff() >= 0).all()
    assert hypothesis_weight(kls, prior, math.inf).item() == pytest.approx(1.0)
    order = torch.randperm(len(prior))
    torch.testing.assert_close(hypothesis_weight(kls[order], prior[order], radii), weights, **close)


def test_ball_is_closed_and_an_empty_one_bounds_nothing():
    kls, prior = torch.tensor([0.5, 1.0]), torch.tensor([0.25, 0.75])
    assert hypothesis_weight(kls, prior, 0.5) == 0.25
    assert hypothesis_weight(kls, prior, 0.49) == 0
    assert ball_bound(kls, prior, 0.1, 3) == math.inf
    assert hypothesis_weight(torch.tensor([math.nan, 1.0]), prior, 2.0).isnan()


def test_impossible_symbols_exclude_a_model_and_then_the_class():
    models = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    mixture = BayesianMixture(models, torch.tensor([0.5, 0.5]))
    mixture.update(torch.tensor([1]))
    torch.testing.assert_close(mixture.posterior, torch.tensor([0.0, 1.0]))
    assert mixture.update(torch.tensor([2])) == math.inf
    assert mixture.posterior.isnan().all()
    truth = torch.tensor([0.2, 0.3, 0.5])
    assert online_regret(models, torch.tensor([0.5, 0.5]), truth, 3) == math.inf
    assert batch_regret(models, torch.tensor([0.5, 0.5]), truth, 3)[0] == math.inf


def test_zero_prior_and_zero_truth_drop_out():
    models, prior, truth = laws(1)
    wide = torch.cat([models, torch.zeros(4, 1).double()], 1)
    wide = torch.cat([wide, torch.tensor([[0.0, 0.0, 0.0, 1.0]]).double()])
    expected = batch_regret(models, prior, truth, 5)
    zero = torch.zeros(1).double()
    got = batch_regret(wide, torch.cat([prior, zero]), torch.cat([truth, zero]), 5)
    torch.testing.assert_close(got, expected, **close)


def test_long_sequences_do_not_underflow():
    models = torch.tensor([[0.5, 0.5], [0.6, 0.4]], dtype=torch.float64)
    mixture = BayesianMixture(models, torch.tensor([0.5, 0.5]).double())
    loss = mixture.update(torch.zeros(100_000, dtype=torch.long))
    assert loss.item() == pytest.approx(-100_000 * math.log(0.6) + math.log(2), rel=1e-12)
    regret = online_regret(models, torch.tensor([0.5, 0.5]).double(), models[0], 20_000)
    assert 20_000 * regret.item() == pytest.approx(math.log(2), abs=1e-9)


def test_gradients_with_respect_to_models_and_prior():
    logits = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def regrets(z):
        law = z.softmax(1)
        prior = z[:3, 0].softmax(0)
        kls = kl(law[3], law[:3])
        return (
            online_regret(law[:3], prior, law[3], 4),
            batch_regret(law[:3], prior, law[3], 3),
            soft_bound(kls, prior, 5),
        )

    assert torch.autograd.gradcheck(regrets, logits.requires_grad_())


def test_state_moves_through_state_dict_and_dtype_follows_the_input():
    models, prior, _ = laws(1)
    first = BayesianMixture(models.float(), prior.float())
    loss = first.update(torch.tensor([0, 1, 1]))
    second = BayesianMixture(models.float(), prior.float())
    second.load_state_dict(first.state_dict())
    assert loss.dtype == first.posterior.dtype == torch.float32
    torch.testing.assert_close(second.posterior, first.posterior)
    half = online_regret(models.half(), prior.half(), models[0].half(), 3)
    assert half.dtype == torch.float16
    expected = online_regret(models, prior, models[0], 3).half()
    torch.testing.assert_close(half, expected, rtol=0.05, atol=1e-3)


def test_errors_name_the_argument():
    models, prior, truth = laws(1)
    with pytest.raises(ValueError, match="models must sum to 1"):
        BayesianMixture(models * 2, prior)
    with pytest.raises(ValueError, match="prior must be >= 0"):
        BayesianMixture(models, torch.tensor([1.5, -0.5, 0.0, 0.0]).double())
    with pytest.raises(ValueError, match=r"prior must have shape \[4\]"):
        online_regret(models, prior[:3], truth, 2)
    with pytest.raises(ValueError, match="n must be >= 1"):
        batch_regret(models, prior, truth, 0)
    with pytest.raises(ValueError, match="sample sequences"):
        online_regret(torch.eye(9), torch.full((9,), 1 / 9), torch.full((9,), 1 / 9), 100)
    with pytest.raises(ValueError, match="truth must be >= 0"):
        online_regret(models, prior, truth * math.nan, 2)
    with pytest.raises(TypeError, match="models must have a floating dtype"):
        BayesianMixture(torch.eye(2, dtype=torch.long), prior[:2])
    with pytest.raises(ValueError, match="models must not be empty"):
        BayesianMixture(torch.zeros(0, 3), torch.zeros(0))
    mixture = BayesianMixture(models, prior)
    with pytest.raises(TypeError, match="symbols must have an integer dtype"):
        mixture.update(torch.tensor([0.0]))
    with pytest.raises(ValueError, match=r"symbols must be in \[0, 3\), got 3"):
        mixture.update(torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="epsilon must be >= 0"):
        hypothesis_weight(kl(truth, models), prior, -0.1)
    with pytest.raises(ValueError, match="prior must have the shape of kls"):
        soft_bound(kl(truth, models), prior[:2], 3)
