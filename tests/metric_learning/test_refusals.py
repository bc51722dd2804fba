"""Arguments that the functions of this package refuse by name."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from steelyard.metric_learning import (
    MultiHeadContrastive,
    OPISMetric,
    PairTemperature,
    barlow_twins_loss,
    bounded_temperature,
    opis,
    rerank_weights,
    sft_rerank_loss,
    tcm_loss,
    unified_rerank_loss,
)

ROWS, LABELS = torch.eye(4), torch.tensor([0, 0, 1, 1])
LOGITS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: PairTemperature(3, low=2.0, high=1.0), "high must be greater than low, 2.0"),
        (lambda: MultiHeadContrastive(3, 4, 3, low=2.0, high=1.0), "greater than low, 2.0"),
        (lambda: bounded_temperature(ROWS, low=2.0, high=1.0), "greater than low, 2.0"),
        (lambda: bounded_temperature(ROWS, high=math.nan), "high must be finite"),
        (lambda: OPISMetric(far_range=(0.1, math.nan)), r"far_range\[1\]"),
        (lambda: OPISMetric(threshold_range=(0.5, 0.1)), r"threshold_range\[1\]"),
        (lambda: OPISMetric(grid=1), "grid must be >= 2"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(call: Callable[[], Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()


@pytest.mark.parametrize("far_range", [None, "text", 3, (0.01,), (0.01, 0.1, 0.2)])
def test_a_range_that_is_not_two_numbers_is_refused(far_range: Any) -> None:
    with pytest.raises(TypeError, match="far_range must be two numbers"):
        OPISMetric(far_range=far_range)
    with pytest.raises(TypeError, match="far_range must be two numbers"):
        opis(ROWS, LABELS, far_range=far_range)


@pytest.mark.parametrize("loss", [sft_rerank_loss, rerank_weights, unified_rerank_loss])
def test_labels_that_are_missing_are_refused_by_name(loss: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"labels must be a torch\.Tensor, got NoneType"):
        loss(LOGITS, LOGITS, None)


def test_unbiased_is_read_as_true_or_false() -> None:
    views = torch.eye(4, 3), torch.eye(4, 3).flip(0)
    falsy, truthy = (barlow_twins_loss(*views, unbiased=flag) for flag in (None, "yes"))
    assert falsy == barlow_twins_loss(*views, unbiased=False)
    assert truthy == barlow_twins_loss(*views, unbiased=True)
    assert falsy != truthy


def test_true_is_the_number_one() -> None:
    assert bounded_temperature(ROWS, high=True).equal(bounded_temperature(ROWS, high=1.0))
    assert tcm_loss(ROWS, LABELS, margin_positive=True) == tcm_loss(
        ROWS, LABELS, margin_positive=1.0
    )


def test_weights_are_nan_where_the_threshold_meets_nan() -> None:
    no = torch.tensor([[0.0, math.nan, 0.0]])
    weights = rerank_weights(torch.zeros(1, 3), no, torch.eye(3)[:1], mask_threshold=0.1)
    assert weights.isnan().tolist() == [[False, True, False]]
