"""Checks and reductions that the modules on ranking share."""

import math

from torch import Tensor
from torch.nn.functional import softplus

from steelyard._checks import (
    check_floating,
    check_mask,
    check_not_empty,
    check_same_shape,
    check_shape,
)
from steelyard._reduce import Reduction, reduce_masked, widen


def check_pairs(**tensors: Tensor) -> tuple[Tensor, ...]:
    """Require non-empty floating tensors ``[N]`` of one shape, and return them."""
    check_floating(**tensors)
    name, first = next(iter(tensors.items()))
    check_shape(name, first, (None,))
    check_not_empty(name, first)
    check_same_shape(**tensors)
    return tuple(tensors.values())


def stable_softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))``, accurate to float64 everywhere."""
    # torch.nn.functional.softplus turns linear at 20, where the rest is 2e-9
    return softplus(x, threshold=40.0)


def share_right(
    right: Tensor, sources: tuple[Tensor, ...], like: Tensor, mask: Tensor | None, how: Reduction
) -> Tensor:
    """Reduce booleans as numbers, NaN where a source is NaN, in the dtype of ``like``."""
    check_mask(mask, right)
    values = right.to(widen(like).dtype)
    for source in sources:
        values = values.masked_fill(source.isnan(), math.nan)
    return reduce_masked(values, mask, how).to(like.dtype)
