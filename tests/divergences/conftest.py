"""Every test that asks for ``divergence`` runs on every generator, unless it names its own."""

import pytest
import torch

from steelyard import divergences as d

NAMED = [
    d.KL,
    d.REVERSE_KL,
    d.JENSEN_SHANNON,
    d.JENSEN_SHANNON_DOUBLE,
    d.TOTAL_VARIATION,
    d.PEARSON_CHI2,
    d.NEYMAN_CHI2,
    d.SQUARED_HELLINGER,
    d.JEFFREYS,
    d.SOFTENED_REVERSE_KL,
]
FAMILIES = [
    *(d.alpha_divergence(order) for order in (-1.5, 0.0, 0.3, 0.5, 0.8, 1.0, 3.0)),
    *(d.skew_jensen_shannon(beta) for beta in (0.1, 0.75)),
    *(d.skew_jensen_shannon(beta, rescaled=True) for beta in (0.0, 0.3, 1.0)),
]
OFF_CENTRE = [x.centred() for x in NAMED if x.slope_at_one != 0.0]
ALL = [*NAMED, *FAMILIES, *OFF_CENTRE, d.SOFTENED_REVERSE_KL.reversed()]


def pytest_generate_tests(metafunc):
    marks = metafunc.definition.iter_markers("parametrize")
    chosen = any("divergence" in mark.args[0] for mark in marks)
    if "divergence" in metafunc.fixturenames and not chosen:
        metafunc.parametrize("divergence", ALL, ids=lambda x: x.name)


@pytest.fixture
def laws():
    """Two pairs of strictly positive distributions over 6 outcomes, as log-probabilities."""
    generator = torch.Generator().manual_seed(0)
    logits = 2.0 * torch.randn(2, 2, 6, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1).unbind(0)
