r"""Fairness over several protected attributes at once: a penalty, and what to judge it by.

The penalty is the distance covariance of predictions and protected attributes. It is zero only if
they are independent, it takes attributes of any type and dimension, and taken with all of them
together it sees the cells (women of one race) that each attribute alone hides.

What is compared is the law of the predictions between groups (demographic parity). Whether the
predictions are right in each group is another question, which nothing here answers.

Source: Lee, Antonio, Avanzi, Marchi, Zhou (2025), Machine Learning with Multitype Protected
Attributes: Intersectional Fairness through Regularisation, arXiv:2509.08163.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import special
from torch import Tensor, nn

from steelyard._checks import (
    check_choice,
    check_count,
    check_floating,
    check_range,
    check_tensor,
)
from steelyard.divergences import (
    concatenated_distance_covariance,
    distance_covariance,
    joint_distance_covariance,
)
from steelyard.tabular._columns import as_numbers
from steelyard.tabular._sensitive import cell_index

__all__ = [
    "DistanceCovarianceRegularizer",
    "group_js",
    "ranked_probability_score",
    "unfairness",
]

Measure = Literal["concatenated", "joint", "marginal"]
Array = NDArray[np.float64]
MEASURES: tuple[Measure, ...] = ("concatenated", "joint", "marginal")
_SMALLEST_MASS = 1e-10  # inside the logarithm of the entropies; the paper's
_KERNEL_CELLS = 1 << 20  # kernel values held at a time


class DistanceCovarianceRegularizer(nn.Module):
    r"""Penalty on the dependence of predictions on protected attributes.

    .. math::
        R = \begin{cases}
        \mathrm{dCov}^2(\hat y, [S_1, \dots, S_d]) & \text{concatenated} \\
        \mathrm{JdCov}^2(\hat y, S_1, \dots, S_d) & \text{joint} \\
        \sum_k \mathrm{dCov}^2(\hat y, S_k) & \text{marginal} \end{cases}

    ``concatenated`` vanishes in the population exactly when predictions are independent of every
    combination of attributes. ``joint`` also holds the dependence *among* the attributes, so it
    has a floor that no model can reach below, and its terms of three variables may be negative.
    ``marginal`` misses intersections; it is here to compare with.

    The unbiased estimate is 0 on average under independence, so it is negative about half of the
    time there. Don't clamp it and don't take its root: both bias the gradient.

    Args:
        measure: ``"concatenated"``, ``"joint"`` or ``"marginal"``.
        strength: what the penalty is multiplied by, at least 0.
        c: offset of the joint measure, finite.
        unbiased: the U-statistic, which needs 4 items; ``False`` = the plug-in form, never
            negative for ``concatenated`` and ``marginal``, and biased upward by ``O(1/N)``.

    Example:
        Exclusive or of two fair bits: each attribute alone sees nothing.

        >>> s1 = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(50)
        >>> s2 = torch.tensor([0.0, 1.0, 0.0, 1.0]).repeat(50)
        >>> prediction = (s1 != s2).float()
        >>> for measure in ("marginal", "concatenated", "joint"):
        ...     penalty = DistanceCovarianceRegularizer(measure, unbiased=False)
        ...     print(measure, round(penalty(prediction, [s1, s2]).item(), 4))
        marginal 0.0
        concatenated 0.0732
        joint 0.125

    Source: Lee et al. (2025), arXiv:2509.08163.
    """

    def __init__(
        self,
        measure: Measure = "concatenated",
        strength: float = 1.0,
        *,
        c: float = 1.0,
        unbiased: bool = True,
    ) -> None:
        super().__init__()
        check_choice("measure", measure, MEASURES)
        check_range("strength", strength, at_least=0.0, below=math.inf)
        check_range("c", c, above=-math.inf, below=math.inf)
        self.measure, self.strength, self.c, self.unbiased = measure, strength, c, unbiased

    def forward(
        self,
        outputs: Tensor,
        sensitive: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the penalty of a batch, ``strength`` included.

        Args:
            outputs: predictions ``[N]`` or ``[N, D]``.
            sensitive: one tensor for each attribute, ``[N]`` or ``[N, K]``, boolean or floating;
                detached. A single tensor is *one* attribute. Use :func:`encode_sensitive` for
                categories.
            mask: ``[N]``, true = counts.

        Returns:
            0-d tensor in the dtype of ``outputs``; 0 if nothing counts.

        Raises:
            ValueError: wrong shapes, no attribute, or fewer than 4 items (unbiased).
            TypeError: not a tensor, or an integer one, which could be a code or a number.
        """
        check_floating(outputs=outputs)
        attributes = _attributes(sensitive)
        if mask is not None:
            check_tensor("mask", mask)
            outputs, attributes = _kept(outputs, attributes, mask)
            if not len(outputs):
                return outputs.sum()
        _check_rows(outputs, attributes, 4 if self.unbiased else 1)
        if self.measure == "joint":
            value = joint_distance_covariance(
                outputs, *attributes, c=self.c, unbiased=self.unbiased
            )
        elif self.measure == "concatenated":
            value = concatenated_distance_covariance(outputs, attributes, unbiased=self.unbiased)
        else:
            each = [distance_covariance(outputs, s, unbiased=self.unbiased) for s in attributes]
            value = torch.stack(each).sum()
        return (self.strength * value).to(outputs.dtype)

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"{self.measure!r}, strength={self.strength}, c={self.c}, unbiased={self.unbiased}"


def group_js(
    outputs: ArrayLike,
    groups: Any,
    *,
    bandwidth: float | Literal["relative"],
    grid: int = 1000,
    weights: Literal["proportion", "equal"] = "proportion",
    base: float = 2.0,
) -> float:
    r"""Jensen-Shannon divergence between the laws of the predictions in each group.

    .. math:: \mathrm{JSD} = H\Big(\sum_g \pi_g P_g\Big) - \sum_g \pi_g H(P_g) \in [0, H(\pi)]

    ``P_g`` is a Gaussian kernel density of the outputs of group ``g`` on ``grid`` equally spaced
    points from the smallest to the largest of all outputs, divided by its sum. Probabilities inside
    a logarithm are at least 1e-10.

    Args:
        outputs: predictions ``[N]``, finite.
        groups: any labels ``[N]``, or a frame or array ``[N, d]`` whose rows are the cells. For
            continuous attributes see :func:`intersectional_groups`.
        bandwidth: standard deviation of the kernel in the units of ``outputs``; the paper has 0.15
            for everything, which hides the differences between claim rates near 0.1.
            ``"relative"`` = Silverman's rule on all outputs (at least one step of the grid). 0 =
            no smoothing: shares of ``grid`` equal cells, and then choose ``grid`` small, because
            empty cells count as differences.
        grid: number of points or cells, at least 2.
        weights: ``pi``, shares of the items or equal.
        base: of the logarithm; 2 gives bits.

    Returns:
        The divergence, in units of ``base``.

    Raises:
        ValueError: empty or not finite, shapes do not fit, missing group, setting out of range.
        TypeError: ``grid`` is no integer.

    Example:
        >>> group_js([0.1, 0.1, 0.9, 0.9], ["a", "b", "a", "b"], bandwidth=0.05)
        0.0
        >>> round(group_js([0.1, 0.1, 0.9, 0.9], ["a", "a", "b", "b"], bandwidth=0.05), 6)
        1.0

    Source: Lee et al. (2025), arXiv:2509.08163.
    """
    values = finite_vector("outputs", outputs)
    index, count = cell_index(groups, len(values))
    check_count("grid", grid, at_least=2)
    check_choice("weights", weights, ("proportion", "equal"))
    check_range("base", base, above=1.0, below=math.inf)
    low, high = float(values.min()), float(values.max())
    step = (high - low) / (grid - 1)
    if bandwidth == "relative":
        spread = 1.06 * values.std() * len(values) ** -0.2
        width = max(float(spread), step) or 1.0
    else:
        check_range("bandwidth", bandwidth, at_least=0.0, below=math.inf)
        width = float(bandwidth)
    points = np.linspace(low, high, grid)
    laws = np.stack([_law(values[index == g], points, width) for g in range(count)])
    shares = np.bincount(index) / len(values) if weights == "proportion" else 1 / count
    pi = np.broadcast_to(shares, (count,))
    # the mean of equal laws is that law only up to rounding
    divergence = _entropy(pi @ laws) - pi @ _entropy(laws)
    return max(float(divergence), 0.0) / math.log(base) if count > 1 else 0.0


def unfairness(outputs: ArrayLike, groups: Any) -> float:
    r"""Variance of the group means over the variance of the predictions.

    .. math:: \mathrm{UF} = \frac{\mathrm{Var}_g(\bar y_g)}{\mathrm{Var}(\hat y)}

    Both with ``n - 1``. Groups count alike whatever their size, so it can exceed 1, and a small
    cell with a chance mean moves it as much as a large one.

    Args:
        outputs: predictions ``[N]``, finite.
        groups: as in :func:`group_js`, at least two different.

    Returns:
        At least 0; 0 for constant predictions.

    Raises:
        ValueError: empty or not finite, shapes do not fit, missing group, or one group only.

    Example:
        >>> round(unfairness([0.0, 2.0, 1.0, 3.0], ["a", "a", "b", "b"]), 4)
        0.3
        >>> unfairness([0.0, 2.0, 0.0, 2.0], ["a", "a", "b", "b"])
        0.0

    Source: Lee et al. (2025), arXiv:2509.08163.
    """
    values = finite_vector("outputs", outputs)
    index, count = cell_index(groups, len(values))
    if count < 2:
        raise ValueError("groups must hold at least two different groups, got 1")
    means = np.bincount(index, values - values[0]) / np.bincount(index)
    total = float(values.var(ddof=1))
    return float(means.var(ddof=1)) / total if total > 0 else 0.0


def ranked_probability_score(
    prediction: ArrayLike,
    outcome: ArrayLike,
    *,
    family: Literal["poisson", "bernoulli"] = "poisson",
    max_count: int = 10,
) -> float:
    r"""Squared distance of predicted and observed distribution functions: lower is better.

    .. math::
        \mathrm{RPS} = \frac1N \sum_i \sum_{k=0}^{K} \big( F(k; \hat y_i) - 1\{k \ge y_i\} \big)^2

    With two outcomes this is the Brier score :math:`\frac1N \sum_i (\hat y_i - y_i)^2`.

    Args:
        prediction: means ``[N]``, at least 0 (``"poisson"``), or probabilities (``"bernoulli"``).
        outcome: counts ``[N]``, or 0 and 1.
        family: the distribution of the outcome around its prediction.
        max_count: ``K``, at least 0; larger counts are told from ``K`` by nothing.

    Returns:
        Mean over items.

    Raises:
        ValueError: empty, not finite, of different lengths, or out of the family's range.
        TypeError: ``max_count`` is no integer.

    Example:
        >>> ranked_probability_score([0.8, 0.4], [1, 0], family="bernoulli")
        0.1
        >>> ranked_probability_score([0.0], [0])
        0.0

    Source: Lee et al. (2025), arXiv:2509.08163.
    """
    mean, y = finite_vector("prediction", prediction), finite_vector("outcome", outcome)
    check_choice("family", family, ("poisson", "bernoulli"))
    check_count("max_count", max_count, at_least=0)
    if len(y) != len(mean):
        raise ValueError(f"outcome must have {len(mean)} items like prediction, got {len(y)}")
    if (y < 0).any() or (y != np.floor(y)).any():
        raise ValueError(f"outcome must hold counts 0, 1, 2, ..., got {y.min()} to {y.max()}")
    most = 1.0 if family == "bernoulli" else math.inf
    if mean.min() < 0 or mean.max() > most:
        raise ValueError(
            f"prediction must lie in [0, {most}] for {family!r}, got {mean.min()} to {mean.max()}"
        )
    if family == "bernoulli":
        if y.max() > 1:
            raise ValueError(f"outcome must be 0 or 1 for 'bernoulli', got {y.max()}")
        return float(np.square(mean - y).mean())
    score = np.zeros(len(y))
    for k in range(max_count + 1):
        score += np.square(special.pdtr(k, mean) - (k >= y))
    return float(score.mean())


def _attributes(sensitive: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> list[Tensor]:
    named: dict[str, Tensor]
    if isinstance(sensitive, Tensor):
        named = {"sensitive": sensitive}
    elif isinstance(sensitive, Mapping):
        named = {f"sensitive[{name!r}]": tensor for name, tensor in sensitive.items()}
    else:
        if not isinstance(sensitive, Sequence):
            raise TypeError(f"sensitive must be tensors, got {type(sensitive).__name__}")
        named = {f"sensitive[{k}]": tensor for k, tensor in enumerate(sensitive)}
    if not named:
        raise ValueError("sensitive must hold at least one attribute, got none")
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) or tensor.dtype == torch.bool:
            continue
        if not tensor.is_floating_point():
            raise TypeError(
                f"{name} must be boolean or floating, got {tensor.dtype}: if its integers are "
                "codes of categories, use encode_sensitive, else convert them to floating"
            )
    plain = {
        name: tensor.detach().float() if getattr(tensor, "dtype", None) == torch.bool else tensor
        for name, tensor in named.items()
    }
    check_floating(**plain)
    return [tensor.detach() for tensor in plain.values()]


def _check_rows(outputs: Tensor, attributes: list[Tensor], least: int) -> None:
    check_floating(outputs=outputs)
    for k, attribute in enumerate(attributes):
        if attribute.dim() not in {1, 2} or attribute.shape[:1] != outputs.shape[:1]:
            raise ValueError(
                f"sensitive[{k}] must have shape [N] or [N, K] with the N of outputs "
                f"{list(outputs.shape)}, got {list(attribute.shape)}"
            )
    if outputs.dim() not in {1, 2} or outputs.shape[0] < least or 0 in outputs.shape:
        raise ValueError(
            f"outputs must have shape [N] or [N, D] with N >= {least}, got {list(outputs.shape)}"
        )


def _kept(outputs: Tensor, attributes: list[Tensor], mask: Tensor) -> tuple[Tensor, list[Tensor]]:
    if outputs.dim() == 0:
        raise ValueError("outputs must have shape [N] or [N, D], got []")
    if mask.shape != outputs.shape[:1]:
        raise ValueError(f"mask must have shape [{len(outputs)}], got {list(mask.shape)}")
    for attribute in attributes:
        if attribute.shape[:1] != mask.shape:
            raise ValueError(
                f"sensitive must have {len(mask)} items like outputs, got {list(attribute.shape)}"
            )
    kept = mask != 0
    return outputs[kept], [attribute[kept] for attribute in attributes]


def finite_vector(name: str, values: ArrayLike) -> Array:
    array = as_numbers(name, values)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} must have shape [N] with N >= 1, got {list(array.shape)}")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise ValueError(f"{name} must be finite, got {bad} of {len(array)} NaN or infinite")
    return array


def _law(values: Array, points: Array, width: float) -> Array:
    """Kernel density of the values on the grid, of sum 1."""
    grid, low, high = len(points), points[0], points[-1]
    if width == 0:
        place = (values - low) / (high - low) * grid if high > low else np.zeros(len(values))
        counts = np.bincount(np.minimum(place.astype(np.int64), grid - 1), minlength=grid)
        return counts / len(values)
    # in logs, because a narrow kernel can miss every point of the grid
    log_density = np.full(grid, -math.inf)
    chunk = max(_KERNEL_CELLS // grid, 1)
    for start in range(0, len(values), chunk):
        distance = (points[:, None] - values[None, start : start + chunk]) / width
        part = special.logsumexp(-0.5 * distance**2, axis=1)
        log_density = np.logaddexp(log_density, part)
    law: Array = special.softmax(log_density)
    return law


def _entropy(law: Array) -> Any:
    return -(law * np.log(np.maximum(law, _SMALLEST_MASS))).sum(-1)
