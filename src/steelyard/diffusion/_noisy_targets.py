r"""What a denoising policy regresses on: a score target computed from a noisy sample.

Scoring the step of a stochastic sampler is denoising score matching in which the less noisy sample
stands in for the clean one. The minimiser is the same, the variance of the target is larger; here
are the targets and the exact factor.

Source: Xue, Ge, Zhang, Li, Ma (2025), Advantage Weighted Matching, arXiv:2509.25050.
"""

from typing import Literal

import torch
from torch import Tensor

from steelyard._checks import check_choice, check_floating, check_range
from steelyard._reduce import widen
from steelyard.diffusion._time import (
    Times,
    as_column,
    check_items,
    check_step,
    refuse_arrays,
)


def noisy_target_variance_ratio(t: Times, s: Times) -> Tensor:
    r"""How much more the target of a denoising policy varies than the clean one.

    Scoring the step from ``t`` to ``s`` regresses the score on :math:`\nabla \log p(x_t \mid x_s)`,
    whose second moment, over that of :math:`\nabla \log p(x_t \mid x_0)`, is

    .. math::
        \frac{t^2}{b_{t|s}^2} = \frac{1}{1 - \mathrm{SNR}_t / \mathrm{SNR}_s}, \qquad
        b_{t|s}^2 = t^2 - \Big(\frac{1 - t}{1 - s}\Big)^2 s^2, \qquad
        \mathrm{SNR}_t = \Big(\frac{1 - t}{t}\Big)^2

    It is 1 at ``s = 0``, grows with ``s`` and diverges like ``1/(t - s)``: short steps are noisy.

    Args:
        t: time in (0, 1], a number or a tensor of any shape.
        s: time in [0, t), a number or a tensor that broadcasts.

    Returns:
        Ratio >= 1 of the broadcast shape; 0-d float64 for two numbers.

    Raises:
        ValueError: a number out of range.
        TypeError: a tensor is not floating point.

    Example:
        From the middle to the data at once, by a step of 1/10, by a step of 1/50:

        >>> [round(noisy_target_variance_ratio(0.5, s).item(), 2) for s in (0.0, 0.4, 0.48)]
        [1.0, 1.8, 6.76]

    Source: Xue et al. (2025), Theorem 2, arXiv:2509.25050; closed form derived.
    """
    check_step(t=t, s=s)
    late, early = _same_kind(t=t, s=s)
    return late.square() / _conditional_variance(late, early)


def edm_noisy_target_variance(sigma_t: Times, sigma_s: Times, *, sigma_data: float = 0.5) -> Tensor:
    r"""Variance of the denoising target when it is computed from a noisy sample (EDM).

    With :math:`x_t = x_s + \sqrt{\sigma_t^2 - \sigma_s^2}\,n` the target of the denoiser is
    :math:`y_s = x_t - \sigma_t^2 n / \sqrt{\sigma_t^2 - \sigma_s^2}`, of mean :math:`x_0` and

    .. math:: \mathrm{Var}(y_s) = \sigma_\mathrm{data}^2
        + \frac{\sigma_t^2 \sigma_s^2}{\sigma_t^2 - \sigma_s^2}

    per dimension. Dividing the loss by it compares clean and noisy targets at one scale.

    Args:
        sigma_t: noise level, > 0, a number or a tensor of any shape.
        sigma_s: noise level in [0, sigma_t), a number or a tensor that broadcasts.
        sigma_data: standard deviation of the data, >= 0.

    Returns:
        Variance of the broadcast shape; 0-d float64 for two numbers. Tensors are not read: where
        their levels are equal it is infinite.

    Raises:
        ValueError: a number out of range.
        TypeError: a tensor is not floating point.

    Example:
        >>> edm_noisy_target_variance(2.0, 0.0).item(), edm_noisy_target_variance(2.0, 1.9).item()
        (0.25, 37.275...)

    Source: Xue et al. (2025), pretraining experiment and released code, arXiv:2509.25050.
    """
    check_range("sigma_data", sigma_data, at_least=0.0)
    refuse_arrays(sigma_t=sigma_t, sigma_s=sigma_s)
    if not isinstance(sigma_t, Tensor):
        check_range("sigma_t", sigma_t, above=0.0)
    if not isinstance(sigma_s, Tensor):
        below = torch.inf if isinstance(sigma_t, Tensor) else sigma_t
        check_range("sigma_s", sigma_s, at_least=0.0, below=below)
    late, early = _same_kind(sigma_t=sigma_t, sigma_s=sigma_s)
    spread = late.square() * early.square() / ((late - early) * (late + early))
    return sigma_data**2 + spread


def noisy_score_target(
    x_t: Tensor,
    x_s: Tensor,
    t: Times,
    s: Times,
    *,
    form: Literal["exact", "euler"] = "exact",
) -> Tensor:
    r"""Target that a denoising policy regresses the score on, given its own less noisy sample.

    .. math::
        \mathrm{exact} = \nabla_{x_t} \log p(x_t \mid x_s)
            = -\frac{x_t - \frac{1 - t}{1 - s} x_s}{b_{t|s}^2}, \qquad
        \mathrm{euler} = \frac{1}{2t}\Big((1 - t)\,\frac{x_s - x_t}{t - s} - x_t\Big)

    With the scale :math:`g^2 = 2t/(1 - t)` of the time reversal, the log-density of the step is
    :math:`-\frac{g^2 (t - s)}{2}\|\mathrm{score} - \mathrm{euler}\|^2` up to a constant: maximising
    it is denoising score matching with a noisy sample in the place of the clean one. Euler's form
    tends to the exact one with ``t - s``. At ``s = 0`` the exact form is the pretraining target,
    minus the noise over ``t``.

    Args:
        x_t: ``[B, *D]``.
        x_s: the less noisy sample, same shape.
        t: time in (0, 1], a number or ``[B]``.
        s: time in [0, t), a number or ``[B]``.
        form: see above.

    Returns:
        Same shape and dtype as ``x_t``.

    Raises:
        ValueError: shapes differ or are empty, a number out of range, or an unknown ``form``.
        TypeError: a tensor is not floating point.

    Example:
        From a clean sample of 1 and noise 2 at time 0.5, the target is ``-2 / 0.5``:

        >>> import torch
        >>> noisy_score_target(torch.tensor([[1.5]]), torch.tensor([[1.0]]), 0.5, 0.0)
        tensor([[-4.]])

    Source: Xue et al. (2025), Theorem 1, arXiv:2509.25050; closed forms derived.
    """
    check_items(x_t=x_t, x_s=x_s)
    check_choice("form", form, ("exact", "euler"))
    check_step(t=t, s=s)
    late, early = as_column("t", t, x_t), as_column("s", s, x_t)
    noisy, cleaner = widen(x_t), widen(x_s)
    if form == "exact":
        kept = (1 - late) / (1 - early)
        target = (kept * cleaner - noisy) / _conditional_variance(late, early)
    else:
        target = ((1 - late) * (cleaner - noisy) / (late - early) - noisy) / (2 * late)
    return target.to(x_t.dtype)


def _conditional_variance(t: Tensor, s: Tensor) -> Tensor:
    # b^2 = t^2 - a^2 s^2 as the product of its factors: no cancellation for s near t.
    return (t - s) * (t * (1 - s) + s * (1 - t)) / (1 - s).square()


def _same_kind(**values: Times) -> tuple[Tensor, Tensor]:
    """Turn two numbers or tensors into tensors of one dtype and device."""
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    check_floating(**tensors)
    like = next(iter(tensors.values()), torch.zeros((), dtype=torch.float64))
    first, second = (
        value if isinstance(value, Tensor) else like.new_full((), value)
        for value in values.values()
    )
    return first, second
