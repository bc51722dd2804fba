"""Arguments of the wrong kind are refused by name."""

import pytest
import torch

from steelyard import diffusion

X = torch.ones(2, 3)


@pytest.mark.parametrize("convert", [diffusion.noise_to_velocity, diffusion.score_to_velocity])
@pytest.mark.parametrize(("name", "value"), [("data_at", None), ("t", torch.ones(2).numpy())])
def test_a_velocity_names_the_time_it_cannot_use(convert, name, value):
    with pytest.raises((TypeError, ValueError), match=rf"\b{name} must be"):
        convert(X, X, **{"t": 0.5, name: value})


def test_the_start_of_the_bins_is_a_number():
    with pytest.raises(TypeError, match="t_min must be a number"):
        diffusion.RatioNormalizer(t_min=[0.5])


def test_a_grid_of_times_stays_finite_at_a_tiny_shift():
    assert diffusion.flow_times(4, shift=1e-89).isfinite().all()
