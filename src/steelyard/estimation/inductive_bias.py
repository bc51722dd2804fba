r"""Inductive bias of a task: how many nats it takes to pick a model that generalises.

.. math:: I(\varepsilon) = -\log \Pr_{h \sim p_h}\big( e(h) \le \varepsilon \big)

over hypotheses that fit the training data, ``e`` their test error. Good hypotheses may have
probability ``exp(-500)``, so their share is read off a fitted law: a scaled noncentral
chi-square. Values mean something only as differences at one error level, one hypothesis law and
one metric. Divide by ``log 2`` for bits.

Where the hypotheses are those of a kernel, :mod:`steelyard.estimation.kernel_hypotheses` needs no
fit.

Source: Boopathy, Yue, Hwang, Iyer, Fiete (2024), Towards Exact Computation of Inductive Bias,
arXiv:2406.15941.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from steelyard._checks import (
    check_choice,
    check_floating,
    check_not_empty,
    check_same_shape,
    check_shape,
    given,
)
from steelyard.estimation import _noncentral
from steelyard.estimation._numbers import (
    Number,
    as_wide,
    broadcast,
    check_values,
    narrow_dtype,
    widen,
)

__all__ = [
    "EmpiricalInductiveBias",
    "Satterthwaite",
    "empirical_inductive_bias",
    "inductive_bias",
    "satterthwaite",
]


class EmpiricalInductiveBias(NamedTuple):
    """What :func:`empirical_inductive_bias` returns, both 0-d or of the shape of the error."""

    nats: Tensor
    standard_error: Tensor


class Satterthwaite(NamedTuple):
    """What :func:`satterthwaite` returns: ``scale * chi2_df`` has the moments."""

    df: Tensor
    scale: Tensor


def inductive_bias(
    test_error: Number,
    df: Number,
    noncentrality: Number,
    scale: Number,
    *,
    method: Literal["exact", "saddlepoint", "sankaran", "reference"] = "exact",
) -> Tensor:
    r"""Nats needed to reach a test error, when errors follow ``scale * chi2_df(noncentrality)``.

    .. math:: I(\varepsilon) = -\log F(\varepsilon / \mathrm{scale};\ \mathrm{df}, \mathrm{nc})

    =============== =======================================================================
    method          value
    =============== =======================================================================
    ``exact``       the law itself, summed in log space: no underflow in any tail
    ``saddlepoint`` within 1 % from 1 nat on (3 % for one or two degrees), at constant cost
    ``sankaran``    ``-log Phi(z)`` of Sankaran's power transform: right near the bulk only
    ``reference``   ``z^2 / 2``, the fallback of the released code: see below
    =============== =======================================================================

    The last is too small in the tail (19 % at 555 nats) and rises again above the mean error,
    where the answer is near 0.

    Args:
        test_error: the level :math:`\varepsilon \ge 0`.
        df: degrees of freedom, > 0.
        noncentrality: >= 0.
        scale: > 0.
        method: how the tail is taken.

    Returns:
        Broadcast shape of the numbers, in nats, >= 0; infinite at error 0. Differentiable; dtype
        of the tensors given, float64 for floats.

    Raises:
        TypeError: an argument is no number or floating tensor.
        ValueError: a number out of range, unknown ``method``, or an exact sum of more than
            sixteen million terms (a noncentrality or ``test_error / scale`` above about 1e11).

    Example:
        A good model of probability ``exp(-555)``, and what the approximations make of it:

        >>> for method in ("exact", "saddlepoint", "sankaran", "reference"):
        ...     print(f"{inductive_bias(0.02, 400.0, 300.0, 0.001, method=method):.3f}")
        555.335
        555.335
        452.616
        448.297

    Source: arXiv:2406.15941, Eq. 1 and section 3.3; the log-space sum and the saddlepoint are
    derived.
    """
    check_choice("method", method, ("exact", "saddlepoint", "sankaran", "reference"))
    numbers = as_wide(test_error=test_error, df=df, noncentrality=noncentrality, scale=scale)
    error, d, nc, unit = broadcast(*numbers)
    check_values("test_error", error, at_least=0.0)
    check_values("df", d, above=0.0, at_least=0.0)
    check_values("noncentrality", nc, at_least=0.0)
    check_values("scale", unit, above=0.0, at_least=0.0)
    inside = (error > 0) & (error < torch.inf)
    x = torch.where(inside, error / unit, d + nc)
    if method in ("sankaran", "reference"):
        score = _noncentral.sankaran_score(x, d, nc)
        nats = score.square() / 2 if method == "reference" else -torch.special.log_ndtr(score)
    elif method == "saddlepoint":
        nats = -_noncentral.saddlepoint(x, d, nc)
    else:
        if bool(x[inside].isinf().any()):
            raise ValueError("test_error / scale must be finite, got an overflow")
        rows = zip(x.reshape(-1), d.reshape(-1), nc.reshape(-1), strict=True)
        tails = [_noncentral.log_cdf(*row) for row in rows]
        nats = -torch.stack(tails).reshape(x.shape) if tails else x
    nats = torch.where(inside, nats, torch.where(error > 0, 0.0, torch.inf))
    return nats.to(narrow_dtype(test_error, df, noncentrality, scale)) + 0.0  # no minus zero


def empirical_inductive_bias(
    test_error: Number, errors: Tensor, *, weights: Tensor | None = None
) -> EmpiricalInductiveBias:
    r"""Nats needed to reach a test error, by counting sampled hypotheses.

    .. math::
        I = -\log F, \quad F = \frac{\sum_s w_s 1[e_s \le \varepsilon]}{\sum_s w_s}, \qquad
        \mathrm{se} = \frac{1}{F} \Big(
            \frac{\sum_s w_s^2 (1[e_s \le \varepsilon] - F)^2}{(\sum_s w_s)^2} \Big)^{1/2}

    Without weights the standard error is ``sqrt((1 - F) / (S F))``. Of no use beyond ``log S``
    nats; there :func:`scaled_ncx2_fit` and :func:`inductive_bias` extrapolate.

    Args:
        test_error: the level :math:`\varepsilon`; a float, or a tensor of any shape.
        errors: test errors of sampled hypotheses, ``[S]``, of any metric.
        weights: non-negative importance, or the law of a finite hypothesis space, ``[S]``.

    Returns:
        ``nats`` and ``standard_error``, shape of ``test_error``; both infinite where no
        hypothesis is good enough.

    Raises:
        TypeError: not floating point.
        ValueError: wrong shapes, empty, NaN errors, or weights negative or all 0.

    Example:
        A quarter of the hypotheses generalise: two bits.

        >>> import torch
        >>> errors = torch.tensor([0.1, 0.5, 0.6, 0.9])
        >>> bias = empirical_inductive_bias(0.2, errors)
        >>> bias.nats / torch.tensor(2.0).log(), bias.standard_error
        (tensor(2.), tensor(0.8660))

    Source: arXiv:2406.15941, Eq. 1; standard error derived.
    """
    check_floating(errors=errors, **given(weights=weights))
    check_shape("errors", errors, (None,))
    check_not_empty("errors", errors)
    check_same_shape(errors=errors, weights=weights)
    (level,) = as_wide(test_error=test_error)
    if bool(errors.isnan().any()) or bool(level.isnan().any()):
        raise ValueError("errors and test_error must be numbers, got NaN")
    weight = torch.ones_like(widen(errors)) if weights is None else widen(weights)
    check_values("weights", weight, at_least=0.0)
    total = weight.sum()
    check_values("the sum of weights", total, above=0.0, at_least=0.0)
    good = (widen(errors) <= level.unsqueeze(-1)).to(weight.dtype)
    share = (weight * good).sum(-1) / total
    variance = (weight * (good - share.unsqueeze(-1))).square().sum(-1)
    # roots, quotients and logarithms of 0 are replaced before they spoil a gradient
    spread = torch.where(variance > 0, variance.where(variance > 0, 1.0).sqrt(), 0.0) / total
    some = share > 0
    kept = share.where(some, 1.0)
    error = torch.where(some, spread / kept, torch.inf)
    nats = torch.where(some, -kept.clamp(max=1.0).log(), torch.inf)
    dtype = narrow_dtype(errors)
    return EmpiricalInductiveBias(nats.to(dtype) + 0.0, error.to(dtype))


def satterthwaite(mean: Number, variance: Number) -> Satterthwaite:
    r"""Fit a scaled chi-square by two moments.

    .. math:: \mathrm{scale} = \frac{\mathrm{Var}}{2\, \mathrm{mean}}, \qquad
        \mathrm{df} = \frac{2\, \mathrm{mean}^2}{\mathrm{Var}}

    Args:
        mean: > 0.
        variance: > 0.

    Returns:
        ``df`` and ``scale``, broadcast shape; use with noncentrality 0.

    Raises:
        TypeError: an argument is no number or floating tensor.
        ValueError: a number out of range.

    Example:
        >>> df, scale = satterthwaite(mean=10.0, variance=20.0)  # of chi2 with 10 degrees
        >>> df.item(), scale.item()
        (10.0, 1.0)

    Source: arXiv:2406.15941, start values of section 3.3 (standard).
    """
    m, v = broadcast(*as_wide(mean=mean, variance=variance))
    check_values("mean", m, above=0.0, at_least=0.0)
    check_values("variance", v, above=0.0, at_least=0.0)
    dtype = narrow_dtype(mean, variance)
    return Satterthwaite((2 * m.square() / v).to(dtype), (v / (2 * m)).to(dtype))
