"""The bounded-ratio optimum of one state: linear programming, limits, invariances, regulariser."""

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.special import logit, rel_entr, xlogy
from torch import Tensor

from steelyard.policy import BoundedRatioOptimum, bounded_ratio_optimum

BANDS = [
    (Fraction(4, 5), Fraction(6, 5)),
    (Fraction(1, 2), Fraction(3)),
    (Fraction(0), Fraction(4)),
    (Fraction(9, 10), Fraction(28, 25)),
]
bands = st.sampled_from(BANDS)
temperatures = st.sampled_from([1e-3, 0.1, 1.0, 30.0])
properties = settings(max_examples=50, deadline=None)


class State(NamedTuple):
    """Integer weights and integer action values: ties, atoms and zero probabilities are common."""

    weights: list[int]
    values: list[int]

    @property
    def probs(self) -> Tensor:
        weights = torch.tensor(self.weights, dtype=torch.float64)
        return weights / weights.sum()

    @property
    def q(self) -> Tensor:
        return torch.tensor(self.values, dtype=torch.float64)


@st.composite
def states(draw: st.DrawFn, least_weight: int = 0) -> State:
    actions = draw(st.integers(1, 7))
    weights = draw(
        st.lists(st.integers(least_weight, 4), min_size=actions, max_size=actions).filter(any)
    )
    values = draw(st.lists(st.integers(-3, 3), min_size=actions, max_size=actions))
    return State(weights, values)


def optimum(
    state: State, band: tuple[Fraction, Fraction], temperature: float = 0.0
) -> BoundedRatioOptimum:
    low, high = map(float, band)
    return bounded_ratio_optimum(state.probs, state.q, low=low, high=high, temperature=temperature)


# ---------------------------------------------------------------- one state, hard optimum


@properties
@given(states(), bands)
def test_hard_optimum_is_the_linear_programming_optimum(state, band):
    low, high = map(float, band)
    probs, q = state.probs.numpy(), state.q.numpy()
    program = linprog(-probs * q, A_eq=probs[None], b_eq=[1.0], bounds=[(low, high)] * len(q))
    best = optimum(state, band)
    assert (probs * best.ratio.numpy() * q).sum() == pytest.approx(-program.fun, abs=1e-9)
    assert best.improvement.item() == pytest.approx(-program.fun - (probs * q).sum(), abs=1e-9)


@properties
@given(states(), bands)
def test_hard_threshold_is_the_lower_quantile(state, band):
    low, high = band
    level = (high - 1) / (high - low)
    total = sum(state.weights)
    reached = [
        value
        for value in sorted(state.values)
        if Fraction(sum(w for w, v in zip(*state, strict=True) if v <= value), total) >= level
    ]
    assert optimum(state, band).threshold.item() == reached[0]


@properties
@given(states(), bands)
def test_tied_actions_share_the_ratio_that_restores_normalisation(state, band):
    best = optimum(state, band)
    low, high = map(float, band)
    tied = state.q == best.threshold
    above = state.probs[state.q > best.threshold].sum()
    below = state.probs[state.q < best.threshold].sum()
    expected = (1 - high * above - low * below) / state.probs[tied].sum()
    torch.testing.assert_close(
        best.ratio[tied], expected.expand(int(tied.sum())), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("epsilon", [0.1, 0.3])
def test_symmetric_atom_rule_is_that_of_the_median(epsilon):
    probs = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    q = torch.tensor([5.0, 1.0, -2.0], dtype=torch.float64)
    ratio = bounded_ratio_optimum(probs, q, low=1 - epsilon, high=1 + epsilon).ratio
    expected = [1 + epsilon, 1 + epsilon * (0.3 - 0.2) / 0.5, 1 - epsilon]
    assert ratio.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("q", [(3.0, 1.0), (-2.0, 5.0), (0.0, 1e-9)])
def test_two_uniform_actions_move_by_half_the_band(q):
    epsilon = 0.2
    probs, values = torch.full((2,), 0.5, dtype=torch.float64), torch.tensor(q, dtype=torch.float64)
    best = bounded_ratio_optimum(probs, values, low=1 - epsilon, high=1 + epsilon)
    policy = (probs * best.ratio)[values.argsort(descending=True)]
    assert policy.tolist() == pytest.approx([(1 + epsilon) / 2, (1 - epsilon) / 2], abs=1e-12)
    assert best.improvement.item() == pytest.approx(epsilon * abs(q[0] - q[1]) / 2, abs=1e-12)


@pytest.mark.parametrize(("samples", "elite"), [(4, 1), (10, 3), (7, 7 - 1), (100, 25)])
def test_cross_entropy_method_gives_all_weight_to_the_elite(samples, elite):
    generator = torch.Generator().manual_seed(samples)
    scores = torch.randperm(samples, generator=generator).double()
    probs = torch.full((samples,), 1 / samples, dtype=torch.float64)
    ratio = bounded_ratio_optimum(probs, scores, low=0.0, high=samples / elite).ratio
    expected = (scores >= samples - elite).double() * samples / elite
    torch.testing.assert_close(ratio, expected, atol=1e-9, rtol=0)


# ---------------------------------------------------------------- one state, both optima


@properties
@given(states(), bands, st.one_of(st.just(0.0), temperatures))
def test_ratio_is_a_bounded_density_that_rises_with_the_action_value(state, band, temperature):
    best = optimum(state, band, temperature)
    low, high = map(float, band)
    assert (state.probs * best.ratio).sum().item() == pytest.approx(1.0, abs=1e-9)
    assert best.ratio.min() >= low - 1e-12
    assert best.ratio.max() <= high + 1e-12
    assert (best.ratio[state.q.argsort()].diff() >= -1e-12).all()
    gain = (state.probs * (best.ratio - 1) * state.q).sum().item()
    assert best.improvement.item() == pytest.approx(gain, abs=1e-9)
    assert gain >= -1e-12


@properties
@given(states(), bands, temperatures)
def test_soft_ratio_is_a_sigmoid_about_the_threshold(state, band, temperature):
    best = optimum(state, band, temperature)
    low, high = map(float, band)
    share = torch.sigmoid((state.q - best.threshold) / temperature)
    torch.testing.assert_close(best.ratio, low + (high - low) * share, atol=1e-12, rtol=0)
    expected = (1 - low) / (high - low)
    assert (state.probs * share).sum().item() == pytest.approx(expected, abs=1e-9)


@properties
@given(states(least_weight=1), bands)
def test_soft_ratio_tends_to_the_hard_one_as_temperature_vanishes(state, band):
    soft, hard = optimum(state, band, 1e-4), optimum(state, band)
    torch.testing.assert_close(soft.ratio, hard.ratio, atol=1e-9, rtol=0)


@properties
@given(states(), bands)
def test_soft_ratio_tends_to_one_as_temperature_grows(state, band):
    temperature = 1e9
    slope = float(band[1] - band[0]) / (4 * temperature)
    distance = (optimum(state, band, temperature).ratio - 1).abs().max().item()
    assert distance <= slope * (max(state.values) - min(state.values)) + 1e-12


@properties
@given(states(), bands, st.sampled_from([0.0, 0.1, 1.0]), st.integers(-100, 100))
def test_a_constant_added_to_the_values_moves_only_the_threshold(state, band, temperature, shift):
    moved = State(state.weights, [value + shift for value in state.values])
    before, after = optimum(state, band, temperature), optimum(moved, band, temperature)
    torch.testing.assert_close(after.ratio, before.ratio, atol=1e-9, rtol=0)
    torch.testing.assert_close(after.threshold, before.threshold + shift, atol=1e-9, rtol=0)
    torch.testing.assert_close(after.improvement, before.improvement, atol=1e-9, rtol=0)


@properties
@given(states(), bands, st.sampled_from([0.0, 0.1, 1.0]), st.sampled_from([0.25, 2.0, 64.0]))
def test_scaling_values_and_temperature_together_keeps_the_ratio(state, band, temperature, scale):
    low, high = map(float, band)
    before = optimum(state, band, temperature)
    after = bounded_ratio_optimum(
        state.probs, state.q * scale, low=low, high=high, temperature=temperature * scale
    )
    torch.testing.assert_close(after.ratio, before.ratio, atol=1e-9, rtol=0)
    torch.testing.assert_close(after.improvement, before.improvement * scale, atol=1e-8, rtol=0)


# ---------------------------------------------------------------- the regulariser


def regulariser(ratio: np.ndarray, epsilon: float) -> np.ndarray:
    """Phi, with 0 log 0 = 0 at the edges of the band."""
    up, down = ratio - 1 + epsilon, 1 + epsilon - ratio
    return xlogy(up, up / epsilon) + xlogy(down, down / epsilon)


def band_policies(probs: np.ndarray, ratio: np.ndarray, epsilon: float):
    upper = probs * (ratio - (1 - epsilon)) / epsilon
    lower = probs * ((1 + epsilon) - ratio) / epsilon
    return upper, lower


@properties
@given(states(), st.sampled_from([0.1, 0.5]), temperatures)
def test_regulariser_is_the_sum_of_two_divergences(state, epsilon, temperature):
    probs = state.probs.numpy()
    best = bounded_ratio_optimum(
        state.probs, state.q, low=1 - epsilon, high=1 + epsilon, temperature=temperature
    )
    ratio = best.ratio.numpy().clip(1 - epsilon, 1 + epsilon)
    upper, lower = band_policies(probs, ratio, epsilon)
    divergences = rel_entr(upper, probs).sum() + rel_entr(lower, probs).sum()
    penalty = (probs * regulariser(ratio, epsilon)).sum()
    assert upper.sum() == pytest.approx(1.0, abs=1e-9)
    assert lower.sum() == pytest.approx(1.0, abs=1e-9)
    assert penalty == pytest.approx(epsilon * divergences, abs=1e-9)
    assert penalty >= -1e-12


def test_regulariser_vanishes_only_when_every_ratio_is_one():
    probs = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    flat = bounded_ratio_optimum(
        probs, torch.full_like(probs, 7.0), low=0.8, high=1.2, temperature=1
    )
    assert flat.ratio.tolist() == pytest.approx([1.0] * 3, abs=1e-12)
    assert regulariser(flat.ratio.numpy(), 0.2) == pytest.approx([0.0] * 3, abs=1e-12)
    grid = np.linspace(0.8, 1.2, 101)
    assert (regulariser(grid, 0.2)[np.abs(grid - 1) > 1e-3] > 0).all()


@properties
@given(states(least_weight=1), st.integers(0, 10_000))
def test_soft_optimum_beats_every_other_policy_of_the_band(state, seed):
    epsilon, temperature = 0.3, 0.5
    probs, q = state.probs.numpy(), state.q.numpy()

    def objective(ratio: np.ndarray) -> float:
        return float((probs * (ratio * q - temperature * regulariser(ratio, epsilon))).sum())

    best = bounded_ratio_optimum(
        state.probs, state.q, low=1 - epsilon, high=1 + epsilon, temperature=temperature
    )
    ratio = best.ratio.numpy()
    slope = logit((ratio - 1 + epsilon) / (2 * epsilon))
    assert slope * temperature == pytest.approx(q - best.threshold.item(), abs=1e-8)

    noise = np.random.default_rng(seed).normal(size=(20, len(q)))
    noise -= (noise * probs).sum(-1, keepdims=True)
    noise /= np.maximum(np.abs(noise).max(-1, keepdims=True), 1e-300)
    room = min(1 + epsilon - ratio.max(), ratio.min() - 1 + epsilon)
    for direction in noise:
        assert objective(ratio + 0.99 * room * direction) <= objective(ratio) + 1e-12


# ---------------------------------------------------------------- shapes, dtypes, errors


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_leading_dimensions_are_independent_states(temperature):
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(5, 2, 3, generator=generator, dtype=torch.float64).softmax(0)
    q = torch.randn(5, 2, 3, generator=generator, dtype=torch.float64)
    probs, q = probs.permute(1, 2, 0), q.permute(1, 2, 0)  # not contiguous
    band = {"low": 0.7, "high": 1.1, "temperature": temperature}
    best = bounded_ratio_optimum(probs, q, **band)
    assert best.ratio.shape == (2, 3, 5)
    assert best.threshold.shape == best.improvement.shape == (2, 3)
    for i, j in np.ndindex(2, 3):
        alone = bounded_ratio_optimum(probs[i, j], q[i, j], **band)
        torch.testing.assert_close(best.ratio[i, j], alone.ratio, atol=1e-12, rtol=0)
        torch.testing.assert_close(best.threshold[i, j], alone.threshold, atol=1e-12, rtol=0)
        torch.testing.assert_close(best.improvement[i, j], alone.improvement, atol=1e-12, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1e4])
def test_a_single_action_cannot_move(temperature):
    probs, q = torch.ones(1, dtype=torch.float64), torch.tensor([1e4], dtype=torch.float64)
    best = bounded_ratio_optimum(probs, q, low=0.8, high=1.3, temperature=temperature)
    assert best.ratio.item() == pytest.approx(1.0, abs=1e-9)
    assert best.improvement.item() == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("temperature", [0.0, 0.1])
def test_float32_stays_normalised_over_a_large_vocabulary(temperature):
    actions = 50_000
    q = torch.randn(actions, generator=torch.Generator().manual_seed(0))
    probs = torch.full((actions,), 1 / actions)
    best = bounded_ratio_optimum(probs, q, low=0.8, high=1.2, temperature=temperature)
    assert best.ratio.dtype == torch.float32
    assert best.ratio.double().mean().item() == pytest.approx(1.0, abs=1e-4)


def test_float32_stays_normalised_at_an_atom_of_large_values():
    probs, q = torch.full((4,), 0.25), torch.tensor([1e4, 1e4, 1e4, 1e4 + 5])
    ratio = bounded_ratio_optimum(probs, q, low=0.8, high=1.2, temperature=1e-3).ratio
    assert (probs * ratio).sum().item() == pytest.approx(1.0, abs=1e-4)


def test_the_optimum_carries_no_gradient():
    probs = torch.full((3,), 1 / 3, requires_grad=True)
    q = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    for temperature in (0.0, 1.0):
        best = bounded_ratio_optimum(probs, q, low=0.8, high=1.2, temperature=temperature)
        assert not any(part.requires_grad for part in best)


@pytest.mark.parametrize("temperature", [0.0, 0.1])
def test_nan_values_are_never_silent(temperature):
    probs, q = torch.full((2,), 0.5), torch.tensor([math.nan, 2.0])
    best = bounded_ratio_optimum(probs, q, low=0.8, high=1.2, temperature=temperature)
    assert best.ratio.isnan().any()
    assert best.improvement.isnan()


UNIFORM, VALUES = torch.full((2,), 0.5), torch.tensor([1.0, 2.0])


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"q_values": torch.ones(3)}, ValueError, "q_values"),
        ({"q_values": torch.tensor([1, 2])}, TypeError, "q_values"),
        ({"base_probs": [0.5, 0.5]}, TypeError, "base_probs"),
        ({"base_probs": torch.ones(0), "q_values": torch.ones(0)}, ValueError, "base_probs"),
        (
            {"base_probs": torch.tensor(1.0), "q_values": torch.tensor(1.0)},
            ValueError,
            "base_probs",
        ),
        ({"low": 1.0}, ValueError, "low"),
        ({"low": -0.1}, ValueError, "low"),
        ({"high": 1.0}, ValueError, "high"),
        ({"high": math.inf}, ValueError, "high"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"temperature": math.nan}, ValueError, "temperature"),
    ],
)
def test_wrong_optimum_arguments_are_named(change, error, named):
    arguments = {"base_probs": UNIFORM, "q_values": VALUES, "low": 0.8, "high": 1.2} | change
    with pytest.raises(error, match=named):
        bounded_ratio_optimum(**arguments)
