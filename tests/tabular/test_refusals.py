"""Arguments that the functions on counts and scores refuse by name."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from steelyard.tabular import (
    DistanceCovarianceRegularizer,
    adverse_impact_ratio,
    fairness_probability,
    optimal_bins,
    pareto_front,
    psi,
    psi_over_time,
    psi_test,
    score_pre_bins,
    woe_table,
)

COUNTS = [20.0, 30.0, 50.0]
COMPLEX = np.array(COUNTS, dtype=complex)


@pytest.mark.parametrize("wrong", ["text", [[1.0], [1.0, 2.0]], COMPLEX, torch.zeros(3) + 1j])
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x: psi(x, COUNTS), "base"),
        (lambda x: psi_test(COUNTS, x), "current"),
        (lambda x: psi_over_time(COUNTS, x), "periods"),
        (lambda x: woe_table(x, COUNTS), "good"),
        (lambda x: optimal_bins(COUNTS, x), "bad"),
        (lambda x: optimal_bins(COUNTS, COUNTS, apart=x), "apart"),
        (lambda x: pareto_front(x, fairness_grid=[0.1]), "pre_bins"),
        (lambda x: fairness_probability(x, 0.1, 0.1), "iv"),
        (lambda x: score_pre_bins(x, [0], [1]), "scores"),
        (lambda x: adverse_impact_ratio(x, [0, 1], 0.5), "scores"),
    ],
)
def test_what_holds_no_real_numbers_is_refused_by_name(
    call: Callable[[Any], Any], name: str, wrong: Any
) -> None:
    with pytest.raises(TypeError, match=f"^{name} must hold (real )?numbers"):
        call(wrong)


@pytest.mark.parametrize(("cutoff", "error"), [(None, TypeError), (math.nan, ValueError)])
def test_a_cutoff_that_is_no_number_is_refused(cutoff: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="cutoff must be a number"):
        adverse_impact_ratio([0.1, 0.2], [0, 1], cutoff)


def test_an_infinite_cutoff_approves_everyone() -> None:
    assert adverse_impact_ratio([0.1, 0.2], [0, 1], math.inf) == 1.0


def test_the_period_of_a_bad_count_is_named() -> None:
    with pytest.raises(ValueError, match=r"^periods\[1\] must be finite and >= 0"):
        psi_over_time(COUNTS, [COUNTS, [-1.0, 2.0, 3.0]])


def test_shapes_that_do_not_broadcast_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="iv, se and epsilon must broadcast"):
        fairness_probability(np.ones(2), np.ones(3), 0.1)


def test_rows_apart_that_are_no_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"apart must have shape \[k, 2\], got \[3\]"):
        optimal_bins(COUNTS, COUNTS, apart=[1.0, 2.0, 3.0])


def test_outputs_without_an_axis_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"outputs must have shape \[N\]"):
        DistanceCovarianceRegularizer()(torch.tensor(1.0), torch.ones(5), mask=torch.ones(5))


def test_a_tensor_with_a_gradient_gives_its_numbers() -> None:
    counts = torch.tensor(COUNTS, requires_grad=True)
    assert psi(counts, torch.tensor([5.0, 3.0, 2.0]).bfloat16()) == psi(COUNTS, [5, 3, 2])
