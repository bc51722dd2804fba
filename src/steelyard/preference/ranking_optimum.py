r"""The best ranking a perfect optimum could reach, and the loss at which a pair flips.

Both need only the reference's log-probabilities: ``ref_log_ratio`` is
``log pi_ref(y_w) - log pi_ref(y_l)``, positive where the reference has the pair right.

Source: Chen et al. (2024), Preference Learning Algorithms Do Not Learn Preference Rankings,
arXiv:2405.19534.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from steelyard._checks import (
    check_choice,
    check_floating,
    check_mask,
    check_not_empty,
    check_range,
    check_same_shape,
    check_shape,
)
from steelyard._reduce import reduce_masked, widen
from steelyard.preference._pairs import share_right, stable_softplus

__all__ = [
    "PUBLISHED_BETAS",
    "IdealizedRankingAccuracy",
    "dpo_flip_threshold",
    "idealized_log_ratio",
    "idealized_ranking_accuracy",
    "ipo_flip_threshold",
]

Unanimous = Literal["clip", "code"]

# The values the paper takes the minimum, median and maximum over (appendix).
PUBLISHED_BETAS = (0.01, 0.1, 1.0, 5.0, 10.0)


class IdealizedRankingAccuracy(NamedTuple):
    """Best reachable ranking accuracy: ``per_beta [K]``, the others 0-d."""

    per_beta: Tensor
    min: Tensor
    median: Tensor
    max: Tensor


def idealized_log_ratio(ref_log_ratio: Tensor, alpha: Tensor | float, beta: float) -> Tensor:
    r"""Log-ratio of the two answers under the perfect optimum of DPO, or of RLHF.

    .. math::
        \log\frac{\pi^*(y_w)}{\pi^*(y_l)} = \log\frac{\pi_\mathrm{ref}(y_w)}{\pi_\mathrm{ref}(y_l)}
            + \frac{1}{\beta} \log\frac{\alpha}{1 - \alpha}

    Computed in logs: :math:`(\alpha/(1-\alpha))^{1/\beta}` overflows at small ``beta``.

    Args:
        ref_log_ratio: ``log pi_ref(y_w) - log pi_ref(y_l)``, any shape; the paper's ``-c``.
        alpha: share of raters that prefer ``y_w``, in [0, 1]; a number, 0-d or the same shape.
            1 gives ``inf``: see :func:`idealized_ranking_accuracy` for the cap.
        beta: > 0.

    Returns:
        Shape and dtype of ``ref_log_ratio``; differentiable.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes differ, empty input, or a number out of range.

    Example:
        Three of four raters prefer an answer that the reference finds much less likely. A small
        beta corrects the reference, a large one does not:

        >>> [idealized_log_ratio(torch.tensor(-5.0), 0.75, beta).item() > 0 for beta in (0.1, 1.0)]
        [True, False]

    Source: Chen et al. (2024), Theorem 3.1, arXiv:2405.19534.
    """
    check_floating(ref_log_ratio=ref_log_ratio)
    check_not_empty("ref_log_ratio", ref_log_ratio)
    check_range("beta", beta, above=0.0, below=math.inf)
    ratio = widen(ref_log_ratio)
    preferred = torch.logit(_rater_share(alpha, ratio))
    return (ratio + preferred / beta).to(ref_log_ratio.dtype)


def idealized_ranking_accuracy(
    ref_log_ratio: Tensor,
    alpha: Tensor | float,
    betas: Sequence[float] = PUBLISHED_BETAS,
    *,
    eps: float = 1e-3,
    unanimous: Unanimous = "clip",
    mask: Tensor | None = None,
) -> IdealizedRankingAccuracy:
    r"""Ranking accuracy of the perfect optimum, over several ``beta``.

    .. math:: R^*_\beta = \mathrm{mean}\ 1\!\left[\log\frac{\pi_\mathrm{ref}(y_w)}
        {\pi_\mathrm{ref}(y_l)} + \frac{1}{\beta} \log\frac{\alpha}{1-\alpha} > 0\right]

    ``median`` less the ranking accuracy is the alignment gap. For the length-normalised form pass
    the difference of length-normalised reference log-probabilities.

    Args:
        ref_log_ratio: ``log pi_ref(y_w) - log pi_ref(y_l)``, ``[N]``.
        alpha: share of raters that prefer ``y_w``, ``[N]`` or a number (the paper's code takes
            0.75 for data without votes).
        betas: one or more, each > 0 (default 0.01, 0.1, 1, 5, 10, as published).
        eps: smallest minority, in (0, 1/2) (default 0.001).
        unanimous: ``"clip"`` (default) clips ``alpha`` to ``[eps, 1 - eps]``. ``"code"`` is the
            released code: only a minority of exactly 0 is replaced by ``eps``, so that the odds
            become ``1/eps`` and smaller minorities than ``eps`` are kept.
        mask: ``[N]``, true = counts.

    Returns:
        ``per_beta [K]``, ``min``, ``median`` (of an even number: the mean of the middle two),
        ``max``; dtype of ``ref_log_ratio``, no gradient. A NaN makes all of them NaN.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes differ, empty input, no ``betas``, or a setting out of range.

    Example:
        The reference has one of two pairs wrong, by 5 nats:

        >>> idealized_ranking_accuracy(torch.tensor([3.0, -5.0]), 0.75, (0.1, 1.0)).per_beta
        tensor([1.0000, 0.5000])

    Source: Chen et al. (2024), Corollary 3.3, arXiv:2405.19534.
    """
    pairs = idealized_pairs(ref_log_ratio, alpha, betas, eps=eps, unanimous=unanimous)
    check_mask(mask, ref_log_ratio)
    per_beta = torch.stack([reduce_masked(row, mask, "mean") for row in pairs])
    return summarise_betas(per_beta.to(ref_log_ratio.dtype))


def idealized_pairs(
    ref_log_ratio: Tensor,
    alpha: Tensor | float,
    betas: Sequence[float],
    *,
    eps: float,
    unanimous: Unanimous,
) -> Tensor:
    """Whether the optimum ranks each pair right: 1, 0 or NaN, ``[K, N]``."""
    check_floating(ref_log_ratio=ref_log_ratio)
    check_shape("ref_log_ratio", ref_log_ratio, (None,))
    check_not_empty("ref_log_ratio", ref_log_ratio)
    check_ideal(betas, eps, unanimous)
    ratio = widen(ref_log_ratio.detach())
    share = _rater_share(alpha, ratio).detach()
    if unanimous == "clip":
        share = share.clamp(eps, 1 - eps)
    else:  # a minority of eps against a majority of 1
        share = torch.where(share == 1, 1 / (1 + eps), share)
        share = torch.where(share == 0, eps / (1 + eps), share)
    optimum = torch.stack([idealized_log_ratio(ratio, share, beta) for beta in betas])
    return share_right(optimum > 0, (optimum,), ratio, None, "none")


def check_ideal(betas: Any, eps: float, unanimous: Unanimous) -> None:
    """Check the settings of :func:`idealized_ranking_accuracy`."""
    check_range("eps", eps, above=0.0, below=0.5)
    check_choice("unanimous", unanimous, ("clip", "code"))
    if not hasattr(betas, "__len__") or isinstance(betas, str):
        raise TypeError(f"betas must be a sequence of numbers, got {type(betas).__name__}")
    if len(betas) == 0:
        raise ValueError("betas must hold at least one value, got none")
    for beta in betas:
        check_range("betas", beta, above=0.0, below=math.inf)


def summarise_betas(per_beta: Tensor) -> IdealizedRankingAccuracy:
    """Add minimum, median and maximum to the accuracies ``[K]``."""
    ordered = widen(per_beta).sort().values
    middle = ordered[[(len(ordered) - 1) // 2, len(ordered) // 2]].mean()
    median = torch.where(per_beta.isnan().any(), torch.nan, middle).to(per_beta.dtype)
    return IdealizedRankingAccuracy(per_beta, per_beta.amin(), median, per_beta.amax())


def dpo_flip_threshold(ref_log_ratio: Tensor, beta: float, *, gamma: float = 1.0) -> Tensor:
    r"""DPO loss of a pair at which it starts to be ranked right: exactly then, and below.

    .. math:: R = 1 \iff L_\mathrm{DPO} \le -\log\sigma(\beta c) = \mathrm{softplus}(-\beta c),
        \qquad c = \log\frac{\pi_\mathrm{ref}(y_l)}{\pi_\mathrm{ref}(y_w)}

    The loss is log 2 at the start, whatever the pair. A pair that the reference has wrong by ``c``
    must reach about :math:`e^{-\beta c}`: pairs with a threshold below the loss that training
    reaches stay wrong.

    Args:
        ref_log_ratio: ``log pi_ref(y_w) - log pi_ref(y_l)``, any shape; the paper's ``-c``.
        beta: > 0.
        gamma: weight of the reference, >= 0 (default 1, DPO), as in
            :func:`~steelyard.preference.dpo_gamma_loss`.

    Returns:
        Shape and dtype of ``ref_log_ratio``; differentiable.

    Raises:
        TypeError: ``ref_log_ratio`` not floating point.
        ValueError: empty input or a setting out of range.

    Example:
        Reference right by 5 nats, undecided, wrong by 5, wrong by 30:

        >>> dpo_flip_threshold(torch.tensor([5.0, 0.0, -5.0, -30.0]), beta=0.1)
        tensor([0.9741, 0.6931, 0.4741, 0.0486])

    Source: Chen et al. (2024), Theorem 4.1, arXiv:2405.19534.
    """
    check_floating(ref_log_ratio=ref_log_ratio)
    check_not_empty("ref_log_ratio", ref_log_ratio)
    check_range("beta", beta, above=0.0, below=math.inf)
    check_range("gamma", gamma, at_least=0.0, below=math.inf)
    return stable_softplus(beta * gamma * widen(ref_log_ratio)).to(ref_log_ratio.dtype)


def ipo_flip_threshold(ref_log_ratio: Tensor, tau: float) -> Tensor:
    r"""IPO loss of a pair that is low enough for it to be ranked right.

    .. math:: L_\mathrm{IPO} = \Bigl(h - \frac{1}{2\tau}\Bigr)^2 \le
        \Bigl(\log\frac{\pi_\mathrm{ref}(y_w)}{\pi_\mathrm{ref}(y_l)} + \frac{1}{2\tau}\Bigr)^2
        \implies R = 1

    if the reference is wrong by at most :math:`1/(2\tau)`. Beyond, even a loss of 0 leaves the pair
    wrong: IPO aims at a fixed margin.

    Args:
        ref_log_ratio: ``log pi_ref(y_w) - log pi_ref(y_l)``, any shape.
        tau: > 0.

    Returns:
        Shape and dtype of ``ref_log_ratio``; ``-inf`` where no loss is low enough.

    Raises:
        TypeError: ``ref_log_ratio`` not floating point.
        ValueError: empty input or ``tau <= 0``.

    Example:
        >>> ipo_flip_threshold(torch.tensor([1.0, -4.0, -6.0]), tau=0.1)
        tensor([36.,  1., -inf])

    Source: Chen et al. (2024), Prop. A.7, arXiv:2405.19534.
    """
    check_floating(ref_log_ratio=ref_log_ratio)
    check_not_empty("ref_log_ratio", ref_log_ratio)
    check_range("tau", tau, above=0.0, below=math.inf)
    slack = widen(ref_log_ratio) + 1 / (2 * tau)
    return slack.square().masked_fill(slack < 0, -math.inf).to(ref_log_ratio.dtype)


def _rater_share(alpha: Tensor | float, like: Tensor) -> Tensor:
    """``alpha`` as a tensor that broadcasts to ``like``, in its dtype."""
    if not isinstance(alpha, Tensor):
        if hasattr(alpha, "__len__"):  # a NumPy array has no truth value
            raise TypeError(f"alpha must be a number or a tensor, got {type(alpha).__name__}")
        check_range("alpha", alpha, at_least=0.0, at_most=1.0)
        return like.new_full((), alpha)
    check_floating(alpha=alpha)
    if alpha.dim() > 0:
        check_same_shape(ref_log_ratio=like, alpha=alpha)
    return alpha.to(like.dtype)
