"""What an analyst reports about the fairness of a finished model.

Sources: Lee, Antonio, Avanzi, Marchi, Zhou (2025), arXiv:2509.08163; Szekely and Rizzo (2014),
arXiv:1310.2926.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike

from steelyard._checks import check_count
from steelyard.divergences import (
    distance_correlation_test,
    distance_covariance,
    joint_distance_covariance,
)
from steelyard.tabular._sensitive import encode_sensitive, intersectional_groups
from steelyard.tabular.fairness import finite_vector, group_js, unfairness

__all__ = ["FairnessAudit", "audit_fairness"]


@dataclass(frozen=True)
class FairnessAudit:
    """What :func:`audit_fairness` returns.

    ``marginal`` holds the distance covariance of each attribute alone; ``remainder`` is what the
    attributes together have beyond their sum. ``group_means`` and ``group_sizes`` are by cell.
    """

    covariance: float
    p_value: float
    marginal: dict[str, float]
    remainder: float
    joint: float
    divergence: float
    unfairness: float
    group_means: dict[str, float]
    group_sizes: dict[str, int]


def audit_fairness(
    outputs: ArrayLike,
    sensitive: Any,
    *,
    bins: int = 4,
    bandwidth: float | Literal["relative"] = "relative",
    permutations: int = 0,
    categorical: Sequence[str | int] | None = None,
    random_state: int = 0,
) -> FairnessAudit:
    """Report how predictions depend on the protected attributes, together and one by one.

    The test is of the predictions against all attributes together. Only predictions are permuted:
    permuting every attribute as well, as published code does, would also find that the attributes
    depend on each other, which is no fault of a model.

    Args:
        outputs: predictions ``[N]``, finite, at least 4.
        sensitive: protected attributes of any type, see :func:`encode_sensitive`.
        bins: bins of a continuous attribute in the cells.
        bandwidth: see :func:`group_js`.
        permutations: number of permutations for the p-value; 0 = the chi-square test, which is
            conservative and costs nothing.
        categorical: numeric attributes that are codes, see :func:`encode_sensitive`.
        random_state: seed of the permutations.

    Returns:
        A :class:`FairnessAudit`; a single cell has a divergence and an unfairness of 0.

    Raises:
        TypeError: ``permutations`` or ``random_state`` is not an integer.
        ValueError: not finite, different lengths, fewer than 4 items, or a negative setting.

    Example:
        >>> race = ["x", "y"] * 100
        >>> sex = ["f", "f", "m", "m"] * 50
        >>> score = [0.2 if (r == "x") == (s == "f") else 0.6 for r, s in zip(race, sex)]
        >>> report = audit_fairness(score, {"race": race, "sex": sex})
        >>> report.p_value < 1e-3, all(abs(v) < 2e-3 for v in report.marginal.values())
        (True, True)
        >>> round(report.group_means["race=x, sex=m"], 3)
        0.6

    Source: Lee et al. (2025), arXiv:2509.08163; Szekely and Rizzo (2014), arXiv:1310.2926.
    """
    values = finite_vector("outputs", outputs)
    check_count("permutations", permutations, at_least=0)
    check_count("random_state", random_state, at_least=0)
    encoded = encode_sensitive(sensitive, categorical=categorical)
    if len(next(iter(encoded.values()))) != len(values):
        raise ValueError(f"sensitive must have {len(values)} items like outputs")
    y, columns = torch.from_numpy(values), list(encoded.values())
    together = torch.cat(columns, 1)
    covariance = float(distance_covariance(y, together))
    marginal = {name: float(distance_covariance(y, s)) for name, s in encoded.items()}
    p_value = float(distance_correlation_test(y, together).p_value)
    if permutations:
        random = np.random.default_rng(random_state)
        shuffled = [
            float(distance_covariance(y[random.permutation(len(values))], together))
            for _ in range(permutations)
        ]
        # rounding must not turn a tie into a smaller value
        reached = np.array(shuffled) >= covariance - 1e-12 * abs(covariance)
        p_value = (1 + int(reached.sum())) / (permutations + 1)
    cells = intersectional_groups(sensitive, bins=bins, categorical=categorical)
    names, index = np.unique(cells, return_inverse=True)
    sizes = np.bincount(index)
    means = np.bincount(index, values) / sizes
    return FairnessAudit(
        covariance=covariance,
        p_value=p_value,
        marginal=marginal,
        remainder=covariance - sum(marginal.values()),
        joint=float(joint_distance_covariance(y, *columns)),
        divergence=group_js(values, cells, bandwidth=bandwidth),
        unfairness=unfairness(values, cells) if len(names) > 1 else 0.0,
        group_means=dict(zip(names.tolist(), means.tolist(), strict=True)),
        group_sizes=dict(zip(names.tolist(), sizes.tolist(), strict=True)),
    )
