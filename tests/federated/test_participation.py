"""FedAU's weights against the raw history, enumeration of all histories, and quadratic clients."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steelyard.federated import (
    ParticipationWeights,
    aggregate,
    cyclic_participation,
    interval_moments,
    markov_participation,
    markov_rates,
    participation_from_labels,
)

CHECK = settings(deadline=None, max_examples=30)
histories = st.lists(st.booleans(), min_size=1, max_size=40)
cutoffs = st.none() | st.integers(1, 12)


def intervals(history: list[bool], cutoff: int | None) -> tuple[list[int], int]:
    """Completed intervals and the open rest, straight from the definition."""
    done, open_rounds = [], 0
    for came in history:
        open_rounds += 1
        if came or open_rounds == cutoff:
            done.append(open_rounds)
            open_rounds = 0
    return done, open_rounds


def follow(history: list[bool], cutoff: int | None) -> ParticipationWeights:
    tracker = ParticipationWeights(1, cutoff)
    for came in history:
        tracker.update(torch.tensor([came]))
    return tracker


@CHECK
@given(history=histories, cutoff=cutoffs)
def test_weight_is_the_mean_of_completed_intervals(history, cutoff):
    tracker = follow(history, cutoff)
    done, rest = intervals(history, cutoff)
    expected = sum(done) / len(done) if done else 1.0
    assert tracker.weights.item() == pytest.approx(expected, abs=1e-12)
    assert tracker.completed.item() == len(done)
    assert tracker.elapsed.item() == rest
    assert sum(done) + rest == len(history)


@CHECK
@given(history=histories, cutoff=cutoffs)
def test_weights_lie_between_one_and_the_cutoff(history, cutoff):
    weight = follow(history, cutoff).weights.item()
    assert 1 <= weight <= (cutoff or len(history)) + 1e-12


def test_worked_example_by_hand():
    tracker, cut = ParticipationWeights(1), ParticipationWeights(1, cutoff=2)
    history = [True, False, False, True, True]
    assert tracker.weights.tolist() == [1.0]
    found = [tracker.update(torch.tensor([c])).item() for c in history]
    assert found == pytest.approx([1, 1, 1, 2, 5 / 3])
    found = [cut.update(torch.tensor([c])).item() for c in history]
    assert found == pytest.approx([1, 1, 3 / 2, 4 / 3, 5 / 4])


@CHECK
@given(history=histories)
def test_cutoff_one_is_plain_averaging_over_all_clients(history):
    assert follow(history, 1).weights.item() == 1.0
    deltas, came = torch.randn(3, 2, dtype=torch.float64), torch.tensor([True, False, True])
    x, ones = torch.zeros(2, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    fedau = aggregate(x, deltas, came, weights=ones).x
    assert torch.equal(fedau, aggregate(x, deltas, came, rule="all").x)


def test_clients_that_always_come_have_weight_one_and_all_rules_agree():
    tracker = ParticipationWeights(3)
    for _ in range(5):
        tracker.update(torch.ones(3))
    assert tracker.weights.tolist() == [1, 1, 1]
    x, deltas, came = torch.zeros(2), torch.randn(3, 2), torch.ones(3, dtype=torch.bool)
    for rule in ("fedau", "participating", "all", "known", "mifa", "fedvarp"):
        step = aggregate(
            x, deltas, came, rule=rule, weights=torch.ones(3), probability=torch.ones(3)
        )
        torch.testing.assert_close(step.x, deltas.mean(0))


def test_periodic_clients_get_exactly_their_period_after_the_first_interval():
    tracker = ParticipationWeights(1)
    for t in range(20):
        tracker.update(torch.tensor([t % 4 == 3]))
    assert tracker.weights.item() == 4.0


@CHECK
@given(p=st.floats(0.01, 1.0), cutoff=st.integers(1, 200))
def test_relative_bias_of_the_cutoff_is_minus_the_chance_of_no_visit(p, cutoff):
    found = interval_moments(p, cutoff)
    assert p * found.mean.item() - 1 == pytest.approx(found.relative_bias.item(), abs=1e-12)
    assert found.relative_bias.item() == pytest.approx(-((1 - p) ** cutoff))
    k = torch.arange(1, cutoff + 1, dtype=torch.float64)
    law = p * (1 - p) ** (k - 1)
    law[-1] += (1 - p) ** cutoff
    mean = (law * k).sum()
    variance = (law * (k - mean).square()).sum()
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.variance, variance, atol=1e-8, rtol=1e-8)


def test_without_cutoff_the_interval_is_geometric():
    found = interval_moments(torch.tensor([0.25, 1.0], dtype=torch.float64))
    assert found.mean.tolist() == [4, 1]
    assert found.variance.tolist() == [12, 0]
    assert found.relative_bias.tolist() == [0, 0]


@pytest.mark.parametrize("cutoff", [None, 3])
def test_mean_weight_over_all_histories_by_enumeration(cutoff):
    p, rounds = 0.4, 8
    every = torch.tensor(list(product([False, True], repeat=rounds)))
    tracker = ParticipationWeights(len(every), cutoff)
    for t in range(rounds):
        tracker.update(every[:, t])
    visits = every.sum(1)
    law = p ** visits.double() * (1 - p) ** (rounds - visits).double()
    direct = [
        sum(d) / len(d) if d else 1.0 for d, _ in (intervals(h, cutoff) for h in every.tolist())
    ]
    expected = (law * torch.tensor(direct, dtype=torch.float64)).sum()
    torch.testing.assert_close((law * tracker.weights).sum(), expected)


def test_update_commutes_with_a_permutation_of_clients():
    came = torch.rand(30, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    order = torch.tensor([3, 1, 4, 0, 2])
    a, b = ParticipationWeights(5), ParticipationWeights(5)
    for row in came:
        a.update(row)
        b.update(row[order])
    assert torch.equal(a.weights[order], b.weights)


def test_state_dict_goes_on_where_it_was():
    a, b = ParticipationWeights(3, cutoff=5), ParticipationWeights(3, cutoff=5)
    came = torch.rand(20, 3, generator=torch.Generator().manual_seed(1)) < 0.3
    for row in came[:10]:
        a.update(row)
    b.load_state_dict(a.state_dict())
    for row in came[10:]:
        assert torch.equal(a.update(row), b.update(row))


def test_markov_clients_return_after_one_over_p_on_average():
    # 40,000 rounds; the standard error of the mean interval is below 2 % (correlated visits), so a
    # band of 8 % has a false-alarm rate below 1e-4. The seed is fixed.
    p = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    came = markov_participation(p, 40_000, max_up=0.3, generator=torch.Generator().manual_seed(0))
    tracker = ParticipationWeights(3)
    for row in came:
        tracker.update(row)
    torch.testing.assert_close(
        tracker.weights * p, torch.ones(3, dtype=torch.float64), atol=0.08, rtol=0
    )


@CHECK
@given(p=st.floats(0.001, 1.0), a=st.floats(0.01, 1.0))
def test_markov_rates_are_probabilities_with_the_right_stationary_law(p, a):
    up, down = markov_rates(torch.tensor([p], dtype=torch.float64), max_up=a)
    assert 0 < up <= a + 1e-12
    assert 0 <= down <= 1
    assert (up / (up + down)).item() == pytest.approx(p)


def test_cyclic_clients_are_on_for_one_stretch_of_each_period():
    came = cyclic_participation(torch.tensor([0.3, 1.0, 0.001]), 200, period=10)
    assert came[:100].sum(0).tolist() == [30, 90, 10]
    assert torch.equal(came[:100], came[100:])


def test_participation_follows_labels_within_its_bounds():
    labels = torch.eye(3, dtype=torch.float64)
    preference = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    assert participation_from_labels(labels, preference, mean=0.5).tolist() == [1.0, 0.02, 0.02]


# ---- aggregation ----------------------------------------------------------------------------


def test_expected_step_with_true_weights_is_the_mean_of_all_updates():
    p = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    deltas = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.zeros(2, dtype=torch.float64)
    mean = torch.zeros(2, dtype=torch.float64)
    for pattern in product([0, 1], repeat=3):
        came = torch.tensor(pattern)
        chance = torch.where(came.bool(), p, 1 - p).prod()
        fedau = aggregate(x, deltas, came, weights=1 / p).x
        torch.testing.assert_close(fedau, aggregate(x, deltas, came, rule="known", probability=p).x)
        mean += chance * fedau
    torch.testing.assert_close(mean, deltas.mean(0))


def stationary(p: Tensor, centres: Tensor, rule: str) -> Tensor:
    """Solve for the point where the expected step of quadratic clients vanishes."""
    weight = torch.zeros_like(p)
    for pattern in product([0, 1], repeat=len(p)):
        came = torch.tensor(pattern)
        chance = torch.where(came.bool(), p, 1 - p).prod()
        eye = torch.eye(len(p), dtype=p.dtype)
        weight += chance * aggregate(torch.zeros_like(p), eye, came, rule=rule, probability=p).x
    return (weight * centres).sum() / weight.sum()


def test_quadratic_clients_end_where_theorem_one_says():
    p = torch.tensor([0.1, 0.4, 1.0], dtype=torch.float64)
    centres = torch.tensor([0.0, 3.0, 9.0], dtype=torch.float64)
    torch.testing.assert_close(stationary(p, centres, "known"), centres.mean())
    torch.testing.assert_close(stationary(p, centres, "all"), (p * centres).sum() / p.sum())
    # p_n times the integral of prod over the others of (1 - p + p u) du, by exact quadrature
    u, w = (
        torch.tensor([-(0.6**0.5), 0.0, 0.6**0.5], dtype=torch.float64),
        torch.tensor([5.0, 8.0, 5.0], dtype=torch.float64) / 18,
    )
    u = (u + 1) / 2
    others = torch.stack(
        [torch.stack([1 - q + q * u for j, q in enumerate(p) if j != n]).prod(0) for n in range(3)]
    )
    shares = p * (others * w).sum(1)
    torch.testing.assert_close(
        stationary(p, centres, "participating"), (shares * centres).sum() / shares.sum()
    )


def test_client_drift_remains_and_vanishes_with_the_local_rate():
    centres, curvature = (
        torch.tensor([0.0, 1.0], dtype=torch.float64),
        torch.tensor([1.0, 4.0], dtype=torch.float64),
    )
    for rate, local in ((0.1, 5), (1e-4, 5)):
        shrink = 1 - (1 - rate * curvature) ** local
        x = torch.zeros(1, dtype=torch.float64)
        for _ in range(int(40 / (rate * local))):
            deltas = (shrink * (centres - x)).unsqueeze(1)
            x = aggregate(x, deltas, torch.ones(2), weights=torch.ones(2)).x
            if rate < 1e-3:
                x = (shrink * centres).sum(0, keepdim=True) / shrink.sum()
                break
        torch.testing.assert_close(
            x.squeeze(), (shrink * centres).sum() / shrink.sum(), atol=1e-9, rtol=1e-9
        )
    exact = (curvature * centres).sum() / curvature.sum()
    assert abs(x.item() - exact.item()) < 1e-3


def test_absent_clients_may_send_anything():
    x, came = torch.zeros(2), torch.tensor([True, False])
    deltas = torch.tensor([[1.0, 2.0], [float("nan"), float("inf")]])
    for rule in ("fedau", "participating", "all", "known", "mifa", "fedvarp"):
        found = aggregate(
            x, deltas, came, rule=rule, weights=torch.ones(2), probability=torch.ones(2)
        )
        assert found.x.isfinite().all()
        assert found.memory is None or found.memory.isfinite().all()


def test_a_round_without_anyone_moves_only_rules_with_memory():
    x, deltas, none = torch.ones(1), torch.ones(2, 1), torch.zeros(2)
    memory = torch.tensor([[2.0], [4.0]])
    for rule in ("fedau", "participating", "all", "known"):
        found = aggregate(
            x, deltas, none, rule=rule, weights=torch.ones(2), probability=torch.ones(2)
        )
        assert found.x.tolist() == [1.0]
    for rule in ("mifa", "fedvarp"):
        found = aggregate(x, deltas, none, rule=rule, memory=memory)
        assert found.x.tolist() == [4.0]
        assert torch.equal(found.memory, memory)


def test_memory_rules_by_hand():
    x, came = torch.zeros(1), torch.tensor([True, False])
    deltas, memory = torch.tensor([[3.0], [7.0]]), torch.tensor([[1.0], [5.0]])
    mifa = aggregate(x, deltas, came, rule="mifa", memory=memory, lr=0.5)
    assert mifa.x.item() == 0.5 * (3 + 5) / 2
    assert mifa.memory.tolist() == [[3.0], [5.0]]
    varp = aggregate(x, deltas, came, rule="fedvarp", memory=memory)
    assert varp.x.item() == (3 - 1) + (1 + 5) / 2
    assert memory.tolist() == [[1.0], [5.0]]


def test_wrong_arguments_are_named():
    x, deltas, came = torch.zeros(2), torch.zeros(3, 2), torch.ones(3)
    with pytest.raises(ValueError, match="rule must be one of"):
        aggregate(x, deltas, came, rule="median")
    with pytest.raises(ValueError, match="weights must be given"):
        aggregate(x, deltas, came)
    with pytest.raises(ValueError, match="probability must be in"):
        aggregate(x, deltas, came, rule="known", probability=torch.tensor([0.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="deltas must have shape"):
        aggregate(x, torch.zeros(3, 1), came, rule="all")
    with pytest.raises(ValueError, match="participated"):
        aggregate(x, deltas, torch.ones(2), rule="all")
    with pytest.raises(ValueError, match="at least one client"):
        aggregate(x, torch.zeros(0, 2), torch.ones(0), rule="all")
    with pytest.raises(ValueError, match="cutoff"):
        ParticipationWeights(2, cutoff=0)
    with pytest.raises(ValueError, match="num_clients"):
        ParticipationWeights(0)
    with pytest.raises(ValueError, match="participated"):
        ParticipationWeights(2).update(torch.ones(3))
    with pytest.raises(ValueError, match="probability"):
        interval_moments(float("nan"))
    with pytest.raises(ValueError, match="non-negative"):
        participation_from_labels(-torch.eye(2), torch.ones(2) / 2)
