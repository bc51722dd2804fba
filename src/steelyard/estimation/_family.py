"""What an exponential family offers, its member with given means, and moments of statistics."""

from typing import Protocol, TypeVar

import torch
from torch import Tensor

MAX_NEWTON_STEPS = 100
STEP_TOLERANCE = 1e-10
ENOUGH_STEPS = 30
LOOSE_TOLERANCE = 1e-4
SMALLEST_STEP = 1e-10

TRUTH = "truth or truth_probs"
"""The methods of a family call it ``truth``, the functions that take a family ``truth_probs``."""

CHUNK = 2**22
"""Numbers of a temporary block, 32 MB."""

F = TypeVar("F", bound="Family")


class Family(Protocol):
    """An exponential family; ``theta`` is ``[p]``."""

    @property
    def size(self) -> int:
        """Number of parameters ``p``."""

    def log_normalizer(self, theta: Tensor) -> Tensor:
        """Return ``psi``, infinite outside the family."""

    def mean(self, theta: Tensor) -> Tensor:
        """Return the gradient of ``psi``, ``[p]``."""

    def covariance(self, theta: Tensor) -> Tensor:
        """Return the Hessian of ``psi``, ``[p, p]``."""

    def third_cumulant(self, theta: Tensor) -> Tensor:
        """Return the third derivatives of ``psi``, ``[p, p, p]``."""

    def fourth_contraction(self, theta: Tensor, pairs: Tensor) -> Tensor:
        """Sum the fourth derivatives of ``psi`` times ``pairs[a, b] pairs[c, d]``."""

    def truth_mean(self, truth: Tensor) -> Tensor:
        """Mean of the statistics under a truth, ``[p]``."""

    def truth_cumulants(self, truth: Tensor) -> tuple[Tensor, Tensor]:
        """Covariance and third cumulant of the statistics under a truth."""

    def start(self, eta: Tensor) -> Tensor:
        """Return a member to begin the search for the means ``eta`` at."""

    def to(self: F, dtype: torch.dtype) -> F:
        """Return the family in another dtype."""


def member_with_means(family: Family, eta: Tensor) -> Tensor:
    """Solve ``family.mean(theta) = eta`` by Newton steps, halved where the likelihood falls."""
    theta = family.start(eta)
    value = family.log_normalizer(theta) - theta @ eta
    for taken in range(MAX_NEWTON_STEPS):
        gap = eta - family.mean(theta)
        step, failed = torch.linalg.solve_ex(family.covariance(theta), gap)
        if bool(failed) or not bool(torch.isfinite(step).all()):
            break
        # on the edge of what can be reached steps never shrink, however small the gap becomes
        share, decrement = (step.abs() / (1 + theta.abs())).max(), gap @ step
        if bool(share <= STEP_TOLERANCE):
            return theta
        if taken > ENOUGH_STEPS and bool((share <= LOOSE_TOLERANCE) & (decrement <= 1e-12)):
            return theta  # nearly dependent statistics: this is what rounding leaves
        rounding = 1e-14 * (1 + value.abs() + (theta * eta).abs().sum())
        size, there, trial = 1.0, theta, value
        while size > SMALLEST_STEP:
            there = theta + size * step
            trial = family.log_normalizer(there) - there @ eta
            if bool(trial <= value - 1e-4 * size * decrement + rounding):
                break
            size /= 2
        theta, value = there, trial
    raise ValueError(
        "no member of the family has the means of this truth: they lie on the edge of what the "
        "statistics can reach, as with a cell that has no observation"
    )


def third_moment(weights: Tensor, centred: Tensor) -> Tensor:
    """Weighted third moment ``[p, p, p]`` of rows ``[n, p]``, in blocks of bounded memory."""
    p = centred.shape[1]
    total = centred.new_zeros(p, p * p)
    rows = max(1, CHUNK // (p * p))
    for begin in range(0, len(centred), rows):
        block, share = centred[begin : begin + rows], weights[begin : begin + rows]
        products = (block.unsqueeze(2) * block.unsqueeze(1)).reshape(len(block), p * p)
        total = total + (share.unsqueeze(1) * block).mT @ products
    return total.reshape(p, p, p)
