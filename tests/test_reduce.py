"""Masked reductions: means over kept items, exact zeros, float32 accumulation."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard._reduce import accumulation_dtype, aggregate_tokens, fill_masked, reduce_masked

properties = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 100_000)
HALVES = [torch.float16, torch.bfloat16]
AGGREGATES = ["token", "sequence", "sequence_sum"]


def draw(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return values, torch.rand(*shape, generator=generator) < 0.5


def test_only_half_precision_accumulates_in_a_wider_dtype():
    for dtype in HALVES:
        assert accumulation_dtype(dtype) == torch.float32
    for dtype in (torch.float32, torch.float64):
        assert accumulation_dtype(dtype) == dtype


def test_filling_replaces_masked_places_and_their_gradient():
    values = torch.tensor([1.0, math.nan, math.inf], requires_grad=True)
    filled = fill_masked(values, torch.tensor([1, 0, 0]), 7.0)
    assert filled.tolist() == [1.0, 7.0, 7.0]
    filled.square().sum().backward()
    assert values.grad.tolist() == [2.0, 0.0, 0.0]
    assert fill_masked(values, None) is values


@pytest.mark.parametrize("dtype", HALVES)
def test_filling_keeps_the_dtype(dtype):
    values = torch.ones(2, dtype=dtype)
    assert fill_masked(values, torch.tensor([1.0, 0.0]), 0.5).dtype == dtype


@properties
@given(seeds)
def test_reductions_are_over_kept_items(seed):
    values, mask = draw(seed, 3, 4)
    kept = values[mask].numpy()
    assert reduce_masked(values, mask, "sum").item() == pytest.approx(kept.sum(), abs=1e-12)
    mean = kept.mean() if len(kept) else 0.0
    assert reduce_masked(values, mask, "mean").item() == pytest.approx(mean, abs=1e-12)
    assert torch.equal(reduce_masked(values, mask, "none"), values * mask)
    assert torch.equal(reduce_masked(values, None, "none"), values)
    everything = reduce_masked(values, None, "mean").item()
    assert everything == pytest.approx(values.numpy().mean(), abs=1e-12)


@properties
@given(seeds)
def test_aggregates_are_loops_over_sequences(seed):
    values, mask = draw(seed, 5, 3)
    rows = [v[m].numpy() for v, m in zip(values, mask, strict=True) if m.any()]
    expected = {
        "token": np.concatenate(rows).mean() if rows else 0.0,
        "sequence": np.mean([row.mean() for row in rows]) if rows else 0.0,
        "sequence_sum": np.mean([row.sum() for row in rows]) if rows else 0.0,
    }
    for aggregate, value in expected.items():
        actual = aggregate_tokens(values, mask, aggregate)
        assert actual.item() == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_no_mask_is_a_full_mask(aggregate):
    values, mask = draw(0, 5, 3)
    full = aggregate_tokens(values, torch.ones_like(mask), aggregate)
    assert torch.equal(aggregate_tokens(values, None, aggregate), full)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_full_mask_of_poison_is_exactly_zero_with_zero_gradient(poison):
    mask = torch.zeros(2, 3, dtype=torch.bool)
    reductions = [lambda x, r=r: reduce_masked(x, mask, r) for r in ("none", "mean", "sum")]
    aggregates = [lambda x, a=a: aggregate_tokens(x, mask, a) for a in AGGREGATES]
    for function in reductions + aggregates:
        values = torch.full((2, 3), poison, requires_grad=True)
        result = function(values)
        result.sum().backward()
        assert (result == 0).all()
        assert (values.grad == 0).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_sums_do_not_stall_or_overflow(dtype):
    values = torch.full((2, 50_000), 2.0, dtype=dtype)
    mean = reduce_masked(values, None, "mean")
    assert mean.dtype == dtype
    assert mean.item() == 2.0
    for aggregate in ("token", "sequence"):
        assert aggregate_tokens(values, None, aggregate).item() == 2.0
    small = torch.full((3000,), 0.25, dtype=dtype)
    assert reduce_masked(small, None, "sum").item() == pytest.approx(750.0, rel=1e-2)


def test_counts_of_long_half_precision_masks_are_exact():
    mask = torch.ones(1, 70_000, dtype=torch.bfloat16)
    values = torch.ones(1, 70_000, dtype=torch.bfloat16)
    assert reduce_masked(values, mask, "mean").item() == 1.0
    assert aggregate_tokens(values, mask, "sequence").item() == 1.0


def test_unknown_reductions_and_broadcasting_masks_are_named():
    values = torch.ones(2, 3)
    with pytest.raises(
        ValueError, match="reduction must be one of 'none', 'mean', 'sum', got 'avg'"
    ):
        reduce_masked(values, None, "avg")
    with pytest.raises(ValueError, match=r"aggregate must be one of .* got 'batch'"):
        aggregate_tokens(values, None, "batch")
    for mask in (torch.ones(3), torch.ones(2, 1)):
        with pytest.raises(ValueError, match="mask must have shape"):
            reduce_masked(values, mask, "mean")
        for aggregate in AGGREGATES:
            with pytest.raises(ValueError, match="mask must have shape"):
                aggregate_tokens(values, mask, aggregate)
