"""Arguments of the wrong kind are refused by name, and NaN stays NaN."""

import pytest
import torch

from steelyard import equivariant


@pytest.mark.parametrize("name", ["norm_weight", "w2"])
def test_channels_are_mixed_in_one_precision(name):
    f, w = torch.ones(1, 2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
    arguments = {"w1": w, "b1": w[0], "w2": w, "b2": w[0], "norm_weight": w[0]}
    arguments[name] = arguments[name].float()
    with pytest.raises(TypeError, match=f"{name} must have the dtype of conv_out"):
        equivariant.convnext_residual(f, f, **arguments)


def test_nan_distances_come_out():
    assert equivariant.polynomial_cutoff(torch.tensor([float("nan")]), 2.0).isnan().all()


def test_edges_of_bytes_are_refused():
    pos = torch.eye(3)
    with pytest.raises(TypeError, match="edge_index must have the dtype"):
        equivariant.invariant_attributes(pos, pos, torch.zeros(2, 1, dtype=torch.uint8))
