"""Distance covariance beside dcor, an independent implementation."""

import pytest
import torch

from steelyard.divergences import (
    concatenated_distance_covariance,
    distance_correlation,
    distance_covariance,
    u_centred_distances,
)

dcor = pytest.importorskip("dcor")

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def integers(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed)).to(F64)


PAIRS = {
    "scalars": (normal(200), normal(200) + normal(200, seed=1)),
    "independent scalars": (normal(200), normal(200, seed=1)),
    "scalars over several levels": (normal(3000), normal(3000).square() + normal(3000, seed=1)),
    "ties in both": (integers(5, 300), integers(4, 300, seed=1)),
    "vectors": (normal(90, 3), normal(90, 2).cos()),
    "scalar and vector": (normal(80), normal(80, 3).square()),
    "scalar and category": (
        normal(60),
        torch.nn.functional.one_hot(integers(3, 60).long()).to(F64),
    ),
    "four items": (normal(4), normal(4, seed=1)),
}


def numpy(pair):
    return [x.numpy() for x in pair]


def close(value, expected, rtol=1e-9, atol=1e-12):
    assert value.item() == pytest.approx(float(expected), rel=rtol, abs=atol)


@pytest.mark.parametrize("name", PAIRS)
def test_unbiased_covariance_agrees_with_dcor(name):
    pair = PAIRS[name]
    close(distance_covariance(*pair), dcor.u_distance_covariance_sqr(*numpy(pair)))


@pytest.mark.parametrize("name", PAIRS)
def test_plug_in_covariance_agrees_with_dcor(name):
    pair = PAIRS[name]
    close(distance_covariance(*pair, unbiased=False), dcor.distance_covariance_sqr(*numpy(pair)))


@pytest.mark.parametrize("name", PAIRS)
def test_correlation_is_the_bias_corrected_square_of_dcor(name):
    pair = PAIRS[name]
    close(distance_correlation(*pair), dcor.u_distance_correlation_sqr(*numpy(pair)))


def test_correlation_is_not_the_plug_in_one():
    # dcor has both; the plug-in one is far from 0 for small independent samples
    x, y = normal(30), normal(30, seed=1)
    biased = dcor.distance_correlation_sqr(x.numpy(), y.numpy())
    assert biased - distance_correlation(x, y).item() > 0.03


def test_many_scalars_agree_with_the_fast_algorithm_of_dcor():
    x = normal(70_000)
    y = x.sin() + normal(70_000, seed=1)
    expected = dcor.u_distance_covariance_sqr(x.numpy(), y.numpy(), method="mergesort")
    close(distance_covariance(x, y), expected)


def test_concatenation_agrees_with_dcor_on_the_stacked_columns():
    x, s, t = normal(50), normal(50, 2, seed=1), integers(2, 50, seed=2)
    stacked = torch.cat([s, t[:, None]], 1)
    close(
        concatenated_distance_covariance(x, [s, t]),
        dcor.u_distance_covariance_sqr(x.numpy(), stacked.numpy()),
    )


def test_u_centred_distances_are_those_of_dcor_with_the_other_sign():
    x = normal(12, 2)
    expected = torch.from_numpy(dcor.u_centered(dcor.distances.pairwise_distances(x.numpy())))
    torch.testing.assert_close(u_centred_distances(x), -expected, rtol=1e-9, atol=1e-12)
