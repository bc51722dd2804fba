"""Arguments of the wrong kind are refused by name."""

import pytest
import torch

from steelyard import federated


@pytest.mark.parametrize(("value", "error"), [("text", TypeError), (2.0, ValueError)])
def test_a_probability_is_a_number_up_to_one(value, error):
    with pytest.raises(error, match="probability must be"):
        federated.interval_moments(value)


@pytest.mark.parametrize(("lr", "error"), [("0.1", TypeError), (float("nan"), ValueError)])
def test_a_learning_rate_is_a_number(lr, error):
    one = torch.ones(1, 1)
    with pytest.raises(error, match="lr must be a number"):
        federated.aggregate(one[0], one, torch.ones(1, dtype=torch.bool), rule="all", lr=lr)
