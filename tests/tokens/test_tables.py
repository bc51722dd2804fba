"""Mass reallocation, rank tables, profiles along a response."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.tokens import (
    mass_reallocation,
    positional_profile,
    rank_table,
    response_means,
    token_shift,
)

properties = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31)


def pair(seed, *shape, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64))


@properties
@given(seeds, st.integers(1, 8))
def test_mass_reallocation_is_the_sum_over_the_base_top_k(seed, top_k):
    base, rl = pair(seed, 2, 3, 6)
    moved = mass_reallocation(base, rl, top_k=top_k)
    p, q = base.softmax(-1), rl.softmax(-1)
    torch.testing.assert_close(moved.tv, (p - q).abs().sum(-1) / 2, rtol=0, atol=1e-14)
    for i in range(2):
        for t in range(3):
            order = p[i, t].argsort(descending=True)
            gain = (q[i, t] - p[i, t]).clamp(min=0)[order]
            expected = gain.cumsum(0)[:top_k] / gain.sum()
            torch.testing.assert_close(moved.gain_in_base_top[i, t], expected, rtol=0, atol=1e-12)


@properties
@given(seeds)
def test_moved_mass_is_symmetric_and_all_of_it_lands_in_the_vocabulary(seed):
    base, rl = pair(seed, 5, 6)
    moved, back = mass_reallocation(base, rl, top_k=6), mass_reallocation(rl, base)
    torch.testing.assert_close(moved.tv, back.tv, rtol=0, atol=1e-14)
    assert (moved.gain_in_base_top.diff(dim=-1) >= 0).all()
    torch.testing.assert_close(moved.gain_in_base_top[:, -1], torch.ones(5).double())


def test_mass_reallocation_at_the_ends():
    base = torch.tensor([0.0, -math.inf])
    moved = mass_reallocation(base, base.flip(0))
    assert moved.tv == 1
    assert moved.gain_in_base_top.tolist() == [0.0, 1.0]
    still = mass_reallocation(base, base)
    assert still.tv == 0
    assert still.gain_in_base_top.tolist() == [0.0, 0.0]
    assert mass_reallocation(base.half(), base.half()).tv.dtype == torch.float16
    with pytest.raises(ValueError, match="rl_logits must have the shape"):
        mass_reallocation(base, torch.zeros(3))
    with pytest.raises(ValueError, match="top_k"):
        mass_reallocation(base, base, top_k=0)


@properties
@given(seeds)
def test_rank_table_is_the_loop_over_high_positions(seed):
    base, rl = pair(seed, 4, 6, 5)
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(seed)) < 0.8
    shift = token_shift(base, rl, top_k=3)
    table = rank_table(shift, mask, js_threshold=0.15, new_token_prob=0.1, max_rank=5)
    high = [(i, t) for i in range(4) for t in range(6) if mask[i, t] and shift.js[i, t] > 0.15]
    n = max(1, len(high))
    assert table.positions == len(high)
    for k in range(1, 6):
        inside = sum(bool(shift.rl_top1_base_rank[at] <= k) for at in high) / n
        assert table.rl_top1_in_base_top[k - 1].item() == pytest.approx(inside)
        inside = sum(bool(shift.base_top1_rl_rank[at] <= k) for at in high) / n
        assert table.base_top1_in_rl_top[k - 1].item() == pytest.approx(inside)
    new = sum(bool(shift.rl_top1_base_prob[at] < 0.1) for at in high) / n
    assert table.new_token_share.item() == pytest.approx(new)
    overlap = sum((shift.overlap[at] for at in high), torch.zeros(3).double()) / n
    torch.testing.assert_close(table.overlap, overlap)


@properties
@given(seeds)
def test_the_same_favourite_is_counted_alike_from_both_sides(seed):
    table = rank_table(token_shift(*pair(seed, 40, 4)), js_threshold=0.0)
    assert table.rl_top1_in_base_top[0] == table.base_top1_in_rl_top[0] == table.overlap[0]


def test_rank_table_without_a_high_position_is_zero():
    base, _ = pair(0, 3, 4)
    table = rank_table(token_shift(base, base))
    assert all((field == 0).all() for field in table)
    masked = rank_table(token_shift(*pair(0, 3, 4)), torch.zeros(3), js_threshold=-1.0)
    assert masked.positions == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"shift": (1, 2)}, TypeError, "shift must be a TokenShift"),
        ({"mask": torch.ones(4)}, ValueError, "mask must have shape"),
        ({"js_threshold": math.nan}, ValueError, "js_threshold"),
        ({"new_token_prob": 1.1}, ValueError, "new_token_prob"),
        ({"max_rank": 0}, ValueError, "max_rank"),
    ],
)
def test_errors_of_the_rank_table_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        rank_table(**({"shift": token_shift(*pair(0, 3, 4))} | change))


def test_profile_edges_are_exact():
    """Position 1 of 3 begins the second of three bins: 1/3 in floating point would be a risk."""
    for length in range(2, 60):
        bins = length - 1
        profile = positional_profile(torch.arange(length, dtype=torch.float64)[None], bins=bins)
        expected = [*range(bins - 1), (2 * length - 3) / 2]
        assert profile.means.tolist() == expected
        assert profile.counts.tolist() == [*[1] * (bins - 1), 2]


def test_profile_counts_positions_of_kept_tokens():
    values = torch.tensor([[9.0, 9.0, 1.0, 2.0, 3.0], [9.0, 5.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 0, 0, 0]])
    profile = positional_profile(values, mask, bins=2)
    assert profile.means.tolist() == [3.0, 2.5]
    assert profile.counts.tolist() == [2, 2]
    empty = positional_profile(values * math.nan, torch.zeros(2, 5))
    assert empty.means.tolist() == [0.0] * 10
    with pytest.raises(TypeError, match="bins must be an integer"):
        positional_profile(values, bins=2.0)


def test_response_means_weigh_each_response_the_same():
    values = torch.tensor([[1.0, 3.0, math.nan], [5.0, math.nan, math.nan], [math.nan] * 3])
    assert response_means(values, ~values.isnan()).tolist() == [2.0, 5.0, 0.0]
    assert response_means(values[:1, :2]).tolist() == [2.0]
    half = response_means(torch.full((1, 5000), 30.0, dtype=torch.float16))
    assert half.item() == 30.0  # the sum alone would overflow
    with pytest.raises(ValueError, match="values must have shape"):
        response_means(torch.zeros(3))
