r"""How a preference policy is doing: calibration of its preferences, fate of the likelihoods.

A falling loss and a rising margin do not tell whether chosen responses became more likely, nor how
far the policy left its reference, nor whether a confidence of 0.9 is right nine times in ten.

Sources: Wang et al. (2023), arXiv:2309.16240; Razin et al. (2024), arXiv:2410.08847.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from steelyard._checks import (
    check_count,
    check_floating,
    check_mask,
    check_not_empty,
    check_range,
    check_same_shape,
    check_shape,
    check_tensor,
)
from steelyard._reduce import reduce_masked, widen
from steelyard.divergences import KL, FDivergence, kl_estimate
from steelyard.divergences.f_divergences import check_divergence
from steelyard.preference._pairs import check_pairs
from steelyard.preference._scores import is_extrapolated, reward_of

__all__ = [
    "PreferenceHealth",
    "expected_calibration_error",
    "preference_calibration_error",
    "preference_health",
]


class PreferenceHealth(NamedTuple):
    """What :func:`preference_health` returns, each 0-d."""

    chosen_change: Tensor
    """Mean of ``log pi - log ref`` of chosen responses; negative = they became less likely."""
    rejected_change: Tensor
    """The same of rejected responses."""
    chosen_falls: Tensor
    """Share of pairs whose chosen response became less likely."""
    both_fall: Tensor
    """Share of pairs of which both became less likely: likelihood displacement."""
    accuracy: Tensor
    """Share of pairs with a positive margin."""
    margin: Tensor
    """Mean difference of the implicit rewards."""
    kl_k1: Tensor
    """``KL(ref || pi)`` by the mean of ``-log u``, if responses are samples of the reference."""
    kl_k3: Tensor
    """The same by ``u - 1 - log u``: never negative, less noise near the reference."""
    beyond_range: Tensor
    """Share of responses whose score is a tangent: see
    :func:`~steelyard.preference.implicit_reward`."""


def expected_calibration_error(confidence: Tensor, correct: Tensor, *, bins: int = 10) -> Tensor:
    r"""Mean gap between how sure and how right one is, over bins of equal confidence.

    .. math:: \mathrm{ECE} = \sum_b \frac{n_b}{N} \left| \mathrm{acc}_b - \mathrm{conf}_b \right|

    The bins are :math:`((b-1)/\text{bins},\ b/\text{bins}]`; the first has 0 too. The estimate is
    biased upwards in small samples. Over several ranks, gather the items first: it is no mean over
    batches.

    Args:
        confidence: in [0, 1], shape ``[N]``.
        correct: boolean or numbers in [0, 1] (1/2 = a tie), shape ``[N]``.
        bins: how many, at least 1. Default 10.

    Returns:
        0-d in [0, 1], dtype of ``confidence``. NaN propagates.

    Raises:
        TypeError: ``confidence`` is not floating or ``bins`` not an integer.
        ValueError: shapes differ or are not ``[N]``, nothing in them, or ``bins < 1``.

    Example:
        Sure at 0.9 and right three times in four:

        >>> right = torch.tensor([True, True, True, False])
        >>> expected_calibration_error(torch.full((4,), 0.9), right, bins=10)
        tensor(0.1500)

    Source: Naeini et al. (2015); Wang et al. (2023), Sec. 4, arXiv:2309.16240.
    """
    check_floating(confidence=confidence)
    check_shape("confidence", confidence, (None,))
    check_tensor("correct", correct)
    check_same_shape(confidence=confidence, correct=correct)
    check_not_empty("confidence", confidence)
    check_count("bins", bins)
    sure = widen(confidence)
    edges = torch.arange(bins + 1, device=sure.device, dtype=torch.float64) / bins
    edges = edges.to(confidence.dtype).to(sure.dtype)  # 0.3 is the edge 0.3 in each dtype
    place = (torch.bucketize(sure, edges) - 1).clamp(0, bins - 1)
    gaps = sure.new_zeros(bins).index_add(0, place, correct.to(sure.dtype) - sure)
    return (gaps.abs().sum() / sure.numel()).to(confidence.dtype)


def preference_calibration_error(margin: Tensor, *, bins: int = 10) -> Tensor:
    r"""Calibration error of a policy read as a judge of pairs.

    The policy prefers the response of larger implicit reward, with confidence
    :math:`\max(p, 1-p)`, :math:`p = \sigma(\text{margin})`. A margin of 0 is half right.

    Args:
        margin: implicit reward of the chosen minus that of the rejected response, ``[N]``.
        bins: bins of [0, 1]; confidences lie in its upper half. Default 10.

    Returns:
        0-d in [0, 1].

    Raises:
        TypeError: ``margin`` is not floating or ``bins`` not an integer.
        ValueError: ``margin`` is not ``[N]`` or empty, or ``bins < 1``.

    Example:
        Undecided is calibrated; sure and wrong half of the time is not:

        >>> preference_calibration_error(torch.zeros(2))
        tensor(0.)
        >>> preference_calibration_error(torch.tensor([9.0, -9.0]))
        tensor(0.4999)

    Source: Wang et al. (2023), Sec. 4, arXiv:2309.16240; ties are ours.
    """
    check_floating(margin=margin)
    check_shape("margin", margin, (None,))
    check_not_empty("margin", margin)
    correct = (margin.sign() + 1) / 2
    return expected_calibration_error(margin.abs().sigmoid(), correct, bins=bins)


@torch.no_grad()
def preference_health(
    chosen_log_ratio: Tensor,
    rejected_log_ratio: Tensor,
    *,
    beta: float = 0.1,
    divergence: FDivergence = KL,
    mask: Tensor | None = None,
) -> PreferenceHealth:
    r"""Tell a margin that grew by raising the chosen response from one that sank them both.

    A falling loss says nothing about that. With a bounded score (``JENSEN_SHANNON``) large margins
    *must* come from lowering rejected responses, and the chosen ones may sink along.

    Args:
        chosen_log_ratio: ``log pi - log ref`` of chosen responses, summed over tokens, ``[B]``.
        rejected_log_ratio: the same of rejected responses, ``[B]``.
        beta: strength of the leash, > 0.
        divergence: as in :func:`~steelyard.preference.f_dpo_loss`.
        mask: ``[B]``, true = the pair counts.

    Returns:
        The fields of :class:`PreferenceHealth`, float32 or wider, without gradient; all 0 if no
        pair counts. Each is a mean over pairs, so ranks may be averaged by their numbers of pairs.
        The two KL estimates hold only if both responses of a pair were sampled from the reference.

    Raises:
        TypeError: a tensor is not floating, or ``divergence`` not an ``FDivergence``.
        ValueError: as for :func:`~steelyard.preference.f_dpo_loss`.

    Example:
        A margin of 2 log 2 both times; the second policy has left both responses behind:

        >>> two = torch.tensor([2.0]).log()
        >>> good = preference_health(two, -two, beta=1.0)
        >>> bad = preference_health(-9 * two, -11 * two, beta=1.0)
        >>> good.margin, bad.margin
        (tensor(1.3863), tensor(1.3863))
        >>> good.both_fall, bad.both_fall
        (tensor(0.), tensor(1.))

    Source: Razin et al. (2024), Unintentional Unalignment, arXiv:2410.08847, for the displacement;
    Schulman (2020), Approximating KL divergence, for k1 and k3.
    """
    check_pairs(chosen_log_ratio=chosen_log_ratio, rejected_log_ratio=rejected_log_ratio)
    check_mask(mask, chosen_log_ratio)
    check_range("beta", beta, above=0.0, below=math.inf)
    check_divergence(divergence)
    chosen, rejected = widen(chosen_log_ratio), widen(rejected_log_ratio)
    margin = reward_of(chosen_log_ratio, beta, divergence)
    margin = margin - reward_of(rejected_log_ratio, beta, divergence)
    fall = (chosen < 0, rejected < 0)
    ratios = (chosen_log_ratio, rejected_log_ratio)
    extrapolated = torch.stack([is_extrapolated(x, divergence) for x in ratios])

    def mean(values: Tensor) -> Tensor:
        return reduce_masked(values.to(margin.dtype), mask, "mean")

    k1, k3 = (
        (kl_estimate(chosen, kind) + kl_estimate(rejected, kind)) / 2 for kind in ("k1", "k3")
    )
    return PreferenceHealth(
        chosen_change=mean(chosen),
        rejected_change=mean(rejected),
        chosen_falls=mean(fall[0]),
        both_fall=mean(fall[0] & fall[1]),
        accuracy=mean(margin > 0),
        margin=mean(margin),
        kl_k1=mean(k1),
        kl_k3=mean(k3),
        beyond_range=mean(extrapolated.to(margin.dtype).mean(0)),
    )
