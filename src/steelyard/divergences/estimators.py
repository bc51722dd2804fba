r"""Estimates of divergences from samples, when the sum over all outcomes is out of reach.

Sources: Go et al. (2023), arXiv:2302.08215, for f-divergences under importance weights;
Schulman (2020), "Approximating KL divergence", for the three estimates of the KL.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from steelyard._checks import check_choice, check_floating, check_not_empty, check_shape, given
from steelyard._reduce import accumulation_dtype
from steelyard.divergences.f_divergences import FDivergence, check_divergence


def monte_carlo_divergence(
    log_ratio: Tensor, divergence: FDivergence, *, log_weights: Tensor | None = None
) -> Tensor:
    r"""Estimate ``D_f(p || q)`` from the ratios ``p/q`` at samples.

    .. math:: \hat D = \sum_i w_i f(e^{\ell_i}), \qquad w_i = 1/N
        \;\text{ or }\; w = \mathrm{softmax}(\text{log\_weights}).

    Unbiased for samples of ``q``. With self-normalised weights the bias is of order ``1/N``. It
    cannot see mass of ``p`` where ``q`` has none. Under several ranks, gather the samples first:
    the weights are normalised over all of them.

    Args:
        log_ratio: ``log p(x_i) - log q(x_i)``, shape ``[N]``, nats; ``-inf`` where ``p = 0``.
            Not detached: the gradient is the pathwise one, with the samples held fixed.
        divergence: for example ``JENSEN_SHANNON``.
        log_weights: ``log q(x_i) - log s(x_i)`` up to a constant, for samples of another law
            ``s``; shape ``[N]``; detached. A sample of weight ``-inf`` is left out.

    Returns:
        A 0-d tensor in nats, in the dtype of ``log_ratio``. A centred generator
        (``KL.centred()``) makes every summand non-negative and the variance smaller.

    Raises:
        TypeError: if a tensor is not floating.
        ValueError: if ``log_ratio`` is not ``[N]`` with ``N > 0``, or the weights do not fit.

    Example:
        Samples that enumerate the outcomes, weighted by ``q``, give the exact value:

        >>> from steelyard.divergences import KL, f_divergence
        >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
        >>> estimate = monte_carlo_divergence(p - q, KL, log_weights=q)
        >>> bool(torch.isclose(estimate, f_divergence(p, q, KL)))
        True

    Source: Go et al. (2023), section 4 and appendix, arXiv:2302.08215.
    """
    check_divergence(divergence)
    check_floating(log_ratio=log_ratio, **given(log_weights=log_weights))
    check_shape("log_ratio", log_ratio, (None,))
    check_not_empty("log_ratio", log_ratio)
    ratio = log_ratio.to(accumulation_dtype(log_ratio.dtype))
    if log_weights is None:
        log_w = torch.full_like(ratio, -math.log(ratio.shape[0]))
    else:
        check_shape("log_weights", log_weights, (log_ratio.shape[0],))
        log_w = log_weights.detach().to(ratio.dtype).log_softmax(0)
        ratio = torch.where(log_w == -math.inf, 0.0, ratio)
    return divergence.terms(log_w + ratio, log_w).sum().to(log_ratio.dtype)


def kl_estimate(log_ratio: Tensor, kind: Literal["k1", "k2", "k3"] = "k1") -> Tensor:
    r"""Per-sample estimate of ``KL(old || new)`` from samples of ``old``.

    With ``l = log_ratio``:

    ======  ======================  ==================================================
    kind    value                   property
    ======  ======================  ==================================================
    ``k1``  ``-l``                  unbiased, of either sign, high variance
    ``k2``  ``l^2 / 2``             non-negative, biased, exact to second order
    ``k3``  ``exp(l) - 1 - l``      unbiased, non-negative
    ======  ======================  ==================================================

    ``k1`` and ``k3`` have the gradient of ``KL(old || new)`` in expectation, ``k2`` has not.

    Args:
        log_ratio: ``logp_new - logp_old`` at samples of ``old``, any shape. Not detached.
        kind: ``"k1"`` (default), ``"k2"`` or ``"k3"``.

    Returns:
        The shape and dtype of ``log_ratio``; half precision is computed in float32.

    Raises:
        TypeError: if ``log_ratio`` is not floating.
        ValueError: if ``kind`` is unknown.

    Example:
        The mean over ``old`` of ``k1`` and ``k3`` is the divergence; every ``k3`` is non-negative:

        >>> old, new = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
        >>> log_ratio = new.log() - old.log()
        >>> [round((old * kl_estimate(log_ratio, kind)).sum().item(), 4) for kind in ("k1", "k3")]
        [0.1438, 0.1438]
        >>> kl_estimate(log_ratio, "k3")
        tensor([0.1931, 0.0945])

    Source: Schulman (2020), "Approximating KL divergence".
    """
    check_floating(log_ratio=log_ratio)
    check_choice("kind", kind, ("k1", "k2", "k3"))
    ratio = log_ratio.to(accumulation_dtype(log_ratio.dtype))
    if kind == "k1":
        estimate = -ratio
    elif kind == "k2":
        estimate = ratio.square() / 2
    else:
        estimate = torch.expm1(ratio) - ratio
    return estimate.to(log_ratio.dtype)
