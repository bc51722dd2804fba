r"""Targets of f-DPG: distributions known up to a factor, as log-scores of samples.

All are a base model ``a`` times a factor, so they compose: the result of one may be the
``base_logprobs`` of the next. With a context the same formulas hold given the context, with one
normaliser ``Z`` for each (:class:`~steelyard.preference.LogPartition`).

Source: Khalifa, Elsahar, Dymetman (2021), A Distributional Approach to Controlled Text Generation,
arXiv:2012.11635; Go et al. (2023), arXiv:2302.08215.
"""

import math

import torch
from torch import Tensor

from steelyard._checks import (
    check_floating,
    check_not_empty,
    check_not_nan,
    check_range,
    check_same_shape,
    check_shape,
    check_tensor,
    given,
)
from steelyard._reduce import widen

__all__ = [
    "exponential_log_target",
    "fit_distributional_constraints",
    "pointwise_log_target",
    "rlhf_log_target",
]

# Newton's method on a smooth convex function of a few coefficients: it needs ten steps, or the
# moments lie so near the edge of what the samples reach that each step gains a factor e.
_NEWTON_STEPS = 100
_HALVINGS = 60
_SOLVED = 1e-13
_ACCEPTED = 1e-9


def pointwise_log_target(
    base_logprobs: Tensor, satisfied: Tensor, *, log_floor: float = -math.inf
) -> Tensor:
    r"""Condition the base model on a constraint that every sample must satisfy.

    .. math:: \log P(x) = \log a(x) + \log b(x), \qquad p = a(\cdot \mid b = 1), \quad Z = a(b = 1)

    It is the law nearest to ``a`` (in ``KL(p || a)``) among those that satisfy the constraint.

    Args:
        base_logprobs: ``log a(x)``, summed over tokens, ``[N]``.
        satisfied: ``b(x)``, ``[N]``: boolean, or a degree in [0, 1].
        log_floor: smallest ``log b``. Divergences with an infinite pseudo-reward where ``P = 0``
            (``KL``, Pearson, Jeffreys) need a finite one, such as -20; then ``p`` keeps a share
            of forbidden samples of that order.

    Returns:
        ``[N]``, dtype of ``base_logprobs``.

    Raises:
        TypeError: ``base_logprobs`` not floating point, or ``log_floor`` no number.
        ValueError: shapes differ, empty input, or ``log_floor`` not below 0.

    Example:
        >>> base, contains_word = torch.tensor([0.9, 0.1]).log(), torch.tensor([False, True])
        >>> score = pointwise_log_target(base, contains_word)
        >>> score.exp(), score.softmax(0)  # Z = 0.1
        (tensor([0.0000, 0.1000]), tensor([0., 1.]))

    Source: Khalifa et al. (2021), arXiv:2012.11635.
    """
    check_floating(base_logprobs=base_logprobs)
    check_not_empty("base_logprobs", base_logprobs)
    check_tensor("satisfied", satisfied)
    check_same_shape(base_logprobs=base_logprobs, satisfied=satisfied)
    check_not_nan("log_floor", log_floor)
    if not log_floor < 0:
        raise ValueError(f"log_floor must be < 0, got {log_floor}")
    base = widen(base_logprobs)
    log_b = satisfied.to(base.dtype).log().clamp(min=log_floor)
    return (base + log_b).to(base_logprobs.dtype)


def exponential_log_target(base_logprobs: Tensor, features: Tensor, coefficients: Tensor) -> Tensor:
    r"""Tilt the base model by features, with the coefficients that give them their moments.

    .. math:: \log P(x) = \log a(x) + \sum_k \lambda_k \phi_k(x)

    For a pointwise constraint besides, pass the result of :func:`pointwise_log_target` as base.

    Args:
        base_logprobs: ``log a(x)``, ``[N]``.
        features: ``phi(x)``, ``[N, K]``.
        coefficients: ``lambda``, ``[K]``, from :func:`fit_distributional_constraints`.

    Returns:
        ``[N]``, dtype of ``base_logprobs``.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes do not fit or empty input.

    Example:
        Three of four samples have the feature; half of them should:

        >>> feature = torch.tensor([[1.0], [1.0], [1.0], [0.0]])
        >>> coefficients = fit_distributional_constraints(feature, torch.tensor([0.5]))
        >>> score = exponential_log_target(torch.full((4,), 0.25).log(), feature, coefficients)
        >>> score.softmax(0)
        tensor([0.1667, 0.1667, 0.1667, 0.5000])

    Source: Khalifa et al. (2021), arXiv:2012.11635.
    """
    check_floating(base_logprobs=base_logprobs, features=features, coefficients=coefficients)
    check_shape("base_logprobs", base_logprobs, (None,))
    check_not_empty("base_logprobs", base_logprobs)
    check_shape("features", features, (base_logprobs.shape[0], None))
    check_shape("coefficients", coefficients, (features.shape[1],))
    base = widen(base_logprobs)
    return (base + features.to(base.dtype) @ coefficients.to(base.dtype)).to(base_logprobs.dtype)


def rlhf_log_target(ref_logprobs: Tensor, rewards: Tensor, beta: float) -> Tensor:
    r"""Return the target that reward maximisation with a KL penalty aims at.

    .. math:: \log P(x) = \log \pi_\mathrm{ref}(x) + r(x) / \beta

    :math:`E_\pi[r] - \beta\,KL(\pi\|\pi_\mathrm{ref}) = \beta \log Z - \beta\,KL(\pi\|p)`: with the
    divergence ``KL`` f-DPG is RLHF, and other divergences aim at the same optimum on other paths.

    Args:
        ref_logprobs: ``log pi_ref(x)``, summed over tokens, any shape.
        rewards: same shape.
        beta: penalty, > 0.

    Returns:
        Unnormalised, the shape and dtype of ``ref_logprobs``.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes differ, empty input, or ``beta <= 0``.

    Example:
        >>> reference, rewards = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0])
        >>> rlhf_log_target(reference, rewards, beta=0.5).softmax(0)
        tensor([0.8808, 0.1192])

    Source: Korbak et al. (2022), arXiv:2205.11275; Go et al. (2023), arXiv:2302.08215.
    """
    check_floating(ref_logprobs=ref_logprobs, rewards=rewards)
    check_not_empty("ref_logprobs", ref_logprobs)
    check_same_shape(ref_logprobs=ref_logprobs, rewards=rewards)
    check_range("beta", beta, above=0.0, below=math.inf)
    reference = widen(ref_logprobs)
    return (reference + rewards.to(reference.dtype) / beta).to(ref_logprobs.dtype)


def fit_distributional_constraints(
    features: Tensor, moments: Tensor, log_weights: Tensor | None = None
) -> Tensor:
    r"""Coefficients of the exponential tilt that gives the features these means.

    .. math::
        \lambda = \arg\min_\lambda\ \log \sum_j w_j e^{\lambda \cdot \phi(x_j)} - \lambda \cdot \mu,
        \qquad \sum_j w_j(\lambda)\, \phi(x_j) = \mu \ \text{ at the solution}

    Newton's method with halved steps, in float64. Of the solutions for linearly dependent
    features it returns one; they give the same target.

    Args:
        features: ``phi(x_j)`` of samples of the base model, ``[N, K]``; detached.
        moments: ``mu``, the means wanted, ``[K]``; strictly between the extremes of each feature.
        log_weights: ``log a(x_j) - log q(x_j)`` up to a constant for samples of another law ``q``,
            or log-probabilities if the samples enumerate everything; ``[N]``; normalised here;
            ``None`` = equal. Gather the samples of all ranks first.

    Returns:
        ``[K]``, dtype of ``features``.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes do not fit, empty or not finite input, or moments that no weighting of
            these samples has. A feature that *all* samples shall have is a pointwise constraint.

    Example:
        From three quarters to one half: the odds fall by a factor of three.

        >>> feature = torch.tensor([[1.0], [1.0], [1.0], [0.0]])
        >>> fit_distributional_constraints(feature, torch.tensor([0.5])).exp()
        tensor([0.3333])

    Source: Khalifa et al. (2021), arXiv:2012.11635.
    """
    check_floating(features=features, moments=moments, **given(log_weights=log_weights))
    check_shape("features", features, (None, None))
    check_not_empty("features", features)
    check_shape("moments", moments, (features.shape[1],))
    log_w = _log_shares(features, log_weights)
    distance = features.detach().double() - moments.detach().double()
    if not bool(distance.isfinite().all()):
        raise ValueError("features and moments must be finite")
    low, high = distance[log_w > -math.inf].aminmax(dim=0)
    for k, (below, above) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        if (below, above) != (0.0, 0.0) and not below < 0 < above:
            mean = float(moments[k])
            raise ValueError(
                f"moments[{k}] must lie strictly between {below + mean:g} and {above + mean:g}, "
                f"the extremes of this feature, got {mean:g}; a constraint on every sample is "
                "pointwise"
            )
    scale = torch.where(high > low, high - low, 1.0)
    return (_dual_minimum(distance / scale, log_w) / scale).to(features.dtype)


def _log_shares(features: Tensor, log_weights: Tensor | None) -> Tensor:
    count = features.shape[0]
    if log_weights is None:
        return features.new_full((count,), -math.log(count), dtype=torch.float64)
    check_shape("log_weights", log_weights, (count,))
    log_w = log_weights.detach().double().log_softmax(0)
    if bool(log_w.isnan().any()):
        raise ValueError("log_weights must be finite or -inf, and not all -inf")
    return log_w


def _dual_minimum(distance: Tensor, log_w: Tensor) -> Tensor:
    """Minimise ``logsumexp(log_w + distance @ lam)``; ``distance [N, K]`` is ``phi - mu``."""
    lam = distance.new_zeros(distance.shape[1])
    value, shares = _tilt(distance, log_w, lam)
    for _ in range(_NEWTON_STEPS):
        slope = shares @ distance
        if float(slope.abs().max()) <= _SOLVED:
            break
        curvature = distance.T @ (shares[:, None] * distance) - torch.outer(slope, slope)
        step = -torch.linalg.pinv(curvature, hermitian=True) @ slope
        descent, factor = float(slope @ step), 1.0
        for _ in range(_HALVINGS):
            new_value, new_shares = _tilt(distance, log_w, lam + factor * step)
            if new_value <= value + 1e-4 * factor * descent:  # false for NaN
                break
            factor /= 2
        else:
            break
        lam, value, shares = lam + factor * step, new_value, new_shares
    missed = (shares @ distance).abs().max()
    if not float(missed) <= _ACCEPTED:
        raise ValueError(
            "moments must be the means of the features under some weighting of the samples; "
            f"taken together these are not: the nearest found is off by {float(missed):.2g} of a "
            "feature's range"
        )
    return lam


def _tilt(distance: Tensor, log_w: Tensor, lam: Tensor) -> tuple[float, Tensor]:
    tilted = log_w + distance @ lam
    return float(tilted.logsumexp(0)), tilted.softmax(0)
