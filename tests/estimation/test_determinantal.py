"""Laws of the designs by enumeration of all tuples; samplers against those laws and DPPy."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from steelyard.estimation import (
    _projection_sampler,
    christoffel,
    dpp_conditional,
    orthonormal_basis,
    projection_dpp_logprob,
    sample_optimal_iid,
    sample_projection_dpp,
    sample_volume,
    volume_logprob,
    weighted_least_squares,
)

quick = settings(deadline=None, max_examples=20)
seeds = st.integers(0, 2**31)
sizes = st.sampled_from([(1, 1), (1, 3), (2, 2), (2, 3), (2, 4), (3, 3), (3, 4)])
close = {"rtol": 1e-8, "atol": 1e-10}

POINTS = 5
# A sampler is judged by a chi-square statistic that exceeds its limit once in a million runs.
FALSE_ALARM = 1e-6


def problem(seed, m, points=POINTS):
    """An uneven law, a basis orthonormal for it, and another positive weight."""
    g = torch.Generator().manual_seed(seed)
    measure = torch.rand(points, dtype=torch.float64, generator=g) + 0.1
    measure = measure / measure.sum()
    basis = orthonormal_basis(torch.randn(points, m, dtype=torch.float64, generator=g), measure)
    density = torch.rand(points, dtype=torch.float64, generator=g) + 0.2
    return basis, measure, (measure * density).sum() / density


def tuples(n, points=POINTS):
    return torch.tensor(list(itertools.product(range(points), repeat=n)))


def fits(basis, values, weights, table):
    """Coefficients, and Gram matrices, of the weighted fit on every tuple."""
    rows, w = basis[table], weights[table].unsqueeze(-1)
    gram = (rows.mT @ (w * rows)) / table.shape[1]
    right = (rows.mT @ (w * values[table].unsqueeze(-1))) / table.shape[1]
    coef = torch.linalg.pinv(gram, hermitian=True, rtol=1e-12) @ right
    return coef.squeeze(-1), gram


def split(basis, measure, values):
    """Coefficients of the projection and the squared norm of what is left."""
    best = (measure.unsqueeze(1) * basis * values.unsqueeze(1)).sum(0)
    return best, (measure * (values - basis @ best).square()).sum()


def values_for(seed):
    return torch.randn(POINTS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@quick
@given(seeds, st.integers(1, 3))
def test_projection_law_sums_to_one_with_optimal_marginals_and_no_repeats(seed, m):
    basis, measure, _ = problem(seed, m)
    table = tuples(m)
    probs = projection_dpp_logprob(basis, measure, table).exp()
    assert probs.sum().item() == pytest.approx(1.0, rel=1e-10)
    repeated = torch.tensor([len(set(row)) < m for row in table.tolist()])
    assert (probs[repeated] == 0).all()
    optimal = christoffel(basis, measure)
    for place in range(m):
        marginal = torch.zeros(POINTS, dtype=torch.float64).index_add(0, table[:, place], probs)
        torch.testing.assert_close(marginal, optimal.probabilities, **close)
    _, gram = fits(basis, values_for(seed), optimal.weights, table)
    mean = (probs.view(-1, 1, 1) * gram).sum(0)
    torch.testing.assert_close(mean, torch.eye(m, dtype=torch.float64), **close)


@quick
@given(seeds, st.integers(1, 4))
def test_conditional_densities_multiply_to_the_law(seed, m):
    basis, measure, _ = problem(seed, m)
    for row in itertools.permutations(range(POINTS), m):
        logprob = 0.0
        for k in range(m):
            density = dpp_conditional(basis, basis[list(row[:k])])
            assert (measure * density).sum().item() == pytest.approx(1.0, rel=1e-9)
            assert (density[list(row[:k])] == 0).all()
            logprob += torch.log(measure[row[k]] * density[row[k]])
        expected = projection_dpp_logprob(basis, measure, torch.tensor(row))
        assert logprob.exp().item() == pytest.approx(expected.exp().item(), rel=1e-6, abs=1e-12)


@quick
@given(seeds, sizes, st.booleans())
def test_volume_law_is_a_projection_set_and_independent_points_in_random_order(seed, size, given):
    m, n = size
    basis, measure, weights = problem(seed, m)
    weights = weights if given else None
    table = tuples(n)
    probs = volume_logprob(basis, measure, table, weights=weights).exp()
    assert probs.sum().item() == pytest.approx(1.0, rel=1e-9)
    design = christoffel(basis, measure).weights if weights is None else weights
    nu = measure / design
    mixture = torch.zeros_like(probs)
    for places in itertools.combinations(range(n), m):
        rest = [i for i in range(n) if i not in places]
        repelling = projection_dpp_logprob(basis, measure, table[:, list(places)]).exp()
        mixture += repelling * nu[table[:, rest]].prod(1) / math.comb(n, m)
    torch.testing.assert_close(probs, mixture, **close)
    marginal = torch.zeros(POINTS, dtype=torch.float64).index_add(0, table[:, 0], probs)
    optimal = christoffel(basis, measure).probabilities
    torch.testing.assert_close(marginal, (m / n) * optimal + (1 - m / n) * nu, **close)


@quick
@given(seeds, sizes, st.booleans())
def test_volume_fit_is_unbiased_and_quasi_optimal_for_every_weight(seed, size, given):
    m, n = size
    basis, measure, weights = problem(seed, m)
    design = weights if given else christoffel(basis, measure).weights
    table, values = tuples(n), values_for(seed)
    probs = volume_logprob(basis, measure, table, weights=weights if given else None).exp()
    coef, gram = fits(basis, values, design, table)
    best, rest = split(basis, measure, values)
    torch.testing.assert_close(probs @ coef, best, rtol=1e-6, atol=1e-7)
    error = rest + probs @ (coef - best).square().sum(1)
    assert error <= (1 + m) * rest * (1 + 1e-8)
    if n == m:  # equality, since almost surely no determinant vanishes
        assert error.item() == pytest.approx(((1 + m) * rest).item(), rel=1e-6)
    inverse = torch.linalg.pinv(gram, hermitian=True, rtol=1e-12)
    mean = (probs.view(-1, 1, 1) * inverse).sum(0)
    limit = n / (n - m + 1) * torch.eye(m, dtype=torch.float64)
    assert torch.linalg.eigvalsh(limit - mean).min() > -1e-7


@quick
@given(seeds, sizes)
def test_volume_mean_is_the_independent_mean_times_the_determinant(seed, size):
    m, n = size
    basis, measure, weights = problem(seed, m)
    table = tuples(n)
    statistic = torch.rand(len(table), dtype=torch.float64)
    _, gram = fits(basis, values_for(seed), weights, table)
    independent = (measure / weights)[table].prod(1)
    constant = n**m * math.factorial(n - m) / math.factorial(n)
    expected = constant * (independent * statistic * torch.linalg.det(gram)).sum()
    probs = volume_logprob(basis, measure, table, weights=weights).exp()
    torch.testing.assert_close(probs @ statistic, expected, rtol=1e-8, atol=1e-10)


@quick
@given(seeds, st.integers(1, 3))
def test_smallest_volume_design_is_the_projection_one_whatever_the_weight(seed, m):
    basis, measure, weights = problem(seed, m)
    table = tuples(m)
    expected = projection_dpp_logprob(basis, measure, table).exp()
    for w in (None, weights):
        got = volume_logprob(basis, measure, table, weights=w).exp()
        torch.testing.assert_close(got, expected, **close)


@quick
@given(seeds, st.integers(1, 4))
def test_constants_reduce_to_independent_draws_and_the_sample_mean(seed, n):
    _, measure, _ = problem(seed, 1)
    basis, values = torch.ones(POINTS, 1, dtype=torch.float64), values_for(seed)
    table = tuples(n)
    probs = volume_logprob(basis, measure, table).exp()
    torch.testing.assert_close(probs, measure[table].prod(1), **close)
    coef, _ = fits(basis, values, torch.ones(POINTS, dtype=torch.float64), table)
    torch.testing.assert_close(coef[:, 0], values[table].mean(1), **close)
    best, variance = split(basis, measure, values)
    error = variance + probs @ (coef - best).square().sum(1)
    assert error.item() == pytest.approx((1 + 1 / n) * variance.item(), rel=1e-8)


@quick
@given(seeds, st.sampled_from([(1, 2), (2, 3), (2, 4)]), st.floats(0.3, 0.95), st.booleans())
def test_conditioned_independent_sampling_obeys_both_bounds(seed, size, delta, given):
    m, n = size
    basis, measure, weights = problem(seed, m)
    design = weights if given else christoffel(basis, measure).weights
    table, values = tuples(n), values_for(seed)
    probs = (measure / design)[table].prod(1)
    coef, gram = fits(basis, values, design, table)
    stable = torch.linalg.eigvalsh(gram)[:, 0] >= 1 - delta
    p = probs[stable].sum()
    if p < 1e-6:
        return
    best, rest = split(basis, measure, values)
    error = rest + (probs[stable] / p) @ (coef[stable] - best).square().sum(1)
    assert error <= (1 + 1 / ((1 - delta) * p)) * rest * (1 + 1e-9)
    largest = (design * basis.square().sum(1)).max()
    assert error <= (1 + (largest / n) / ((1 - delta) ** 2 * p)) * rest * (1 + 1e-9)


@quick
@given(seeds, st.integers(1, 3))
def test_laws_do_not_change_with_a_rotation_of_the_basis(seed, m):
    basis, measure, weights = problem(seed, m)
    g = torch.Generator().manual_seed(seed)
    turned = basis @ torch.linalg.qr(torch.randn(m, m, dtype=torch.float64, generator=g)).Q
    table, longer = tuples(m), tuples(m + 1)
    torch.testing.assert_close(
        projection_dpp_logprob(turned, measure, table).exp(),
        projection_dpp_logprob(basis, measure, table).exp(),
        **close,
    )
    torch.testing.assert_close(
        volume_logprob(turned, measure, longer, weights=weights).exp(),
        volume_logprob(basis, measure, longer, weights=weights).exp(),
        **close,
    )


def assert_law(counts, probs):
    """Chi-square test of counts against probabilities, small cells pooled."""
    total = counts.sum()
    assert counts[probs == 0].sum() == 0
    order = probs.argsort()
    pooled = (probs[order].cumsum(0) * total < 10).sum()
    expected = torch.cat([probs[order][:pooled].sum().view(1), probs[order][pooled:]]) * total
    seen = torch.cat([counts[order][:pooled].sum().view(1), counts[order][pooled:]])
    kept = expected > 0
    statistic = ((seen - expected)[kept].square() / expected[kept]).sum().item()
    assert statistic < stats.chi2.isf(FALSE_ALARM, int(kept.sum()) - 1)


def counts_of(draws, n):
    place = (draws * POINTS ** torch.arange(n - 1, -1, -1)).sum(1)
    return torch.bincount(place, minlength=POINTS**n).double()


@pytest.mark.parametrize(("m", "tries"), [(1, None), (2, None), (3, None), (3, 1), (3, 4)])
def test_projection_sampler_follows_the_law_of_ordered_tuples(m, tries, monkeypatch):
    if tries is not None:  # so few that points run out and new ones are drawn
        monkeypatch.setattr(_projection_sampler, "_tries", lambda m: tries)
    basis, measure, _ = problem(m, m)
    generator = torch.Generator().manual_seed(0)
    draws = _projection_sampler.projection_sets(basis, measure, 20_000, generator)
    probs = projection_dpp_logprob(basis, measure, tuples(m)).exp()
    assert_law(counts_of(draws, m), probs)


@pytest.mark.parametrize("given", [False, True])
def test_volume_sampler_follows_the_law_of_ordered_tuples(given):
    basis, measure, weights = problem(7, 2)
    g = torch.Generator().manual_seed(0)
    options = {"weights": weights if given else None}
    draws = [sample_volume(basis, measure, 3, generator=g, **options) for _ in range(1200)]
    probs = volume_logprob(basis, measure, tuples(3), **options).exp()
    assert_law(counts_of(torch.stack([d.indices for d in draws]), 3), probs)
    design = weights if given else christoffel(basis, measure).weights
    torch.testing.assert_close(draws[0].weights, design[draws[0].indices], **close)


def test_copies_are_independent_sets_in_exchangeable_order():
    basis, measure, _ = problem(8, 2)
    g = torch.Generator().manual_seed(0)
    draws = [sample_projection_dpp(basis, measure, copies=2, generator=g) for _ in range(1200)]
    table = tuples(4)
    probs = torch.zeros(len(table), dtype=torch.float64)
    for places in itertools.combinations(range(4), 2):
        rest = [i for i in range(4) if i not in places]
        first = projection_dpp_logprob(basis, measure, table[:, list(places)]).exp()
        probs += first * projection_dpp_logprob(basis, measure, table[:, rest]).exp() / 6
    assert_law(counts_of(torch.stack([d.indices for d in draws]), 4), probs)


def test_independent_sampler_follows_the_optimal_density():
    basis, measure, _ = problem(9, 2)
    sample = sample_optimal_iid(basis, measure, 20_000, generator=torch.Generator().manual_seed(0))
    optimal = christoffel(basis, measure)
    assert_law(counts_of(sample.indices.unsqueeze(1), 1), optimal.probabilities)
    torch.testing.assert_close(sample.weights, optimal.weights[sample.indices], **close)


def test_projection_law_is_that_of_dppy():
    finite_dpps = pytest.importorskip("dppy.finite_dpps")
    import numpy as np

    basis, measure, _ = problem(10, 3)
    root = measure.sqrt().unsqueeze(1) * basis
    peer = finite_dpps.FiniteDPP("correlation", projection=True, K=(root @ root.T).numpy())
    rng = np.random.RandomState(0)
    sets = Counter(tuple(sorted(peer.sample_exact(random_state=rng))) for _ in range(2000))
    every = list(itertools.combinations(range(POINTS), 3))
    logprob = projection_dpp_logprob(basis, measure, torch.tensor(every))
    counts = torch.tensor([sets[s] for s in every]).double()
    assert counts.sum() == 2000
    assert_law(counts, 6 * logprob.exp())


def legendre(points, m):
    x = torch.linspace(-1, 1, points, dtype=torch.float64)
    columns = [torch.ones_like(x), x]
    for k in range(1, m - 1):
        columns.append(((2 * k + 1) * x * columns[k] - k * columns[k - 1]) / (k + 1))
    measure = torch.full_like(x, 1 / points)
    return x, measure, orthonormal_basis(torch.stack(columns, 1), measure)


def test_large_designs_never_repeat_and_find_functions_of_the_space():
    x, measure, basis = legendre(2000, 60)
    g = torch.Generator().manual_seed(0)
    single = sample_projection_dpp(basis, measure, generator=g)
    assert single.indices.unique().numel() == 60
    assert torch.isfinite(projection_dpp_logprob(basis, measure, single.indices))
    points, weights = sample_projection_dpp(basis, measure, copies=2, generator=g)
    assert len(points) == 120
    fit = weighted_least_squares(basis[points], (3 * x).sin()[points], weights)
    assert (basis @ fit.coef - (3 * x).sin()).abs().max() < 1e-8


def test_two_projection_sets_are_stabler_than_as_many_independent_points():
    _, measure, basis = legendre(500, 8)
    g = torch.Generator().manual_seed(0)

    def stable(sampler):
        fits = (weighted_least_squares(basis[i], basis[i][:, 0], w) for i, w in sampler)
        return sum(bool(fit.lambda_min >= 0.3) for fit in fits)

    repelling = stable(
        sample_projection_dpp(basis, measure, copies=2, generator=g) for _ in range(100)
    )
    independent = stable(sample_optimal_iid(basis, measure, 16, generator=g) for _ in range(100))
    assert repelling > independent + 30


def test_candidates_without_mass_or_without_features_are_never_drawn():
    basis, measure, _ = problem(11, 2)
    measure = torch.cat([torch.zeros(1), measure, torch.tensor([0.0])]).double()
    basis = orthonormal_basis(torch.cat([basis[:1], basis, basis[:1]]), measure)
    empty = torch.cat([basis, torch.zeros(1, 2)])
    measure = torch.cat([measure / 2, torch.tensor([0.5])])
    empty = empty * 2**0.5
    g = torch.Generator().manual_seed(0)
    drawn = torch.cat(
        [sample_volume(empty, measure, 4, generator=g).indices for _ in range(200)]
        + [sample_optimal_iid(empty, measure, 500, generator=g).indices]
    )
    assert set(drawn.tolist()) == set(range(1, 6))
    assert volume_logprob(empty, measure, torch.tensor([1, 2, 7])) == -math.inf
    assert volume_logprob(empty, measure, torch.tensor([1, 1, 1])) == -math.inf
    assert torch.isfinite(volume_logprob(empty, measure, torch.tensor([1, 2, 2])))


def test_generator_makes_draws_equal_and_dtype_follows():
    basis, measure, _ = problem(12, 3)
    for sampler in (
        lambda g: sample_projection_dpp(basis.float(), measure.float(), copies=3, generator=g),
        lambda g: sample_volume(basis.float(), measure.float(), 5, generator=g),
        lambda g: sample_optimal_iid(basis.float(), measure.float(), 5, generator=g),
    ):
        first, second = (sampler(torch.Generator().manual_seed(4)) for _ in range(2))
        assert torch.equal(first.indices, second.indices)
        assert first.weights.dtype == torch.float32
        assert first.indices.dtype == torch.int64
    assert projection_dpp_logprob(basis.float(), measure.float(), tuples(3)).dtype == torch.float32


def test_gradients_of_the_laws():
    _, measure, _ = problem(13, 2)
    features = torch.randn(POINTS, 2, dtype=torch.float64, generator=torch.manual_seed(0))

    def logprobs(f):
        basis = orthonormal_basis(f, measure)
        return (
            projection_dpp_logprob(basis, measure, torch.tensor([[0, 3], [2, 4]])),
            volume_logprob(basis, measure, torch.tensor([[0, 3, 1], [2, 4, 4]])),
            dpp_conditional(basis, basis[:1])[1:],
        )

    assert torch.autograd.gradcheck(logprobs, features.requires_grad_())


def test_errors_name_the_argument():
    basis, measure, weights = problem(14, 2)
    with pytest.raises(ValueError, match="basis must be orthonormal"):
        sample_projection_dpp(2 * basis, measure)
    with pytest.raises(ValueError, match="copies must be >= 1"):
        sample_projection_dpp(basis, measure, copies=0)
    with pytest.raises(ValueError, match="n must be >= 2"):
        sample_volume(basis, measure, 1)
    with pytest.raises(ValueError, match="measure / weights must sum to 1"):
        sample_volume(basis, measure, 3, weights=2 * weights)
    with pytest.raises(ValueError, match="weights must be > 0"):
        sample_volume(basis, measure, 3, weights=0 * weights)
    with pytest.raises(ValueError, match="n must be >= 1"):
        sample_optimal_iid(basis, measure, 0)
    with pytest.raises(ValueError, match=r"indices must have shape \[.., 2\]"):
        projection_dpp_logprob(basis, measure, tuples(3))
    with pytest.raises(ValueError, match=r"indices must be in \[0, 5\), got 5"):
        projection_dpp_logprob(basis, measure, torch.tensor([0, 5]))
    with pytest.raises(TypeError, match="indices must have an integer dtype"):
        volume_logprob(basis, measure, torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"indices.shape\[-1\] must be >= 2"):
        volume_logprob(basis, measure, torch.tensor([0]))
    with pytest.raises(ValueError, match="chosen must have fewer than 2 rows, got 2"):
        dpp_conditional(basis, basis[:2])
    with pytest.raises(ValueError, match="linearly independent rows"):
        dpp_conditional(problem(14, 3)[0], basis.new_ones(2, 3))
