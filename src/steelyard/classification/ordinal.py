r"""Ordered classes with boundaries that are tied together, for the probability of a rare last one.

A rare outcome (default, purchase, disease) usually follows commoner steps. The proportional-odds
model gives all steps one slope and so borrows from all rows, and is wrong when the slopes differ; a
logistic regression of the rare class is right, and uses its few rows only. PRESTO gives each
boundary a slope and shrinks the change from one to the next.

Source: Faletto, Bien (2023), Predicting Rare Events by Shrinking Towards Proportional Odds,
arXiv:2305.18700.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from steelyard._checks import (
    check_count,
    check_floating,
    check_integer_dtype,
    check_not_empty,
    check_range,
    check_shape,
)
from steelyard._reduce import Reduction, reduce_masked, widen
from steelyard.classification._labels import check_values
from steelyard.classification._presto_path import Path
from steelyard.classification._presto_solver import Data

__all__ = ["PrestoPath", "lambda_max", "presto_path", "presto_penalty", "proportional_odds_nll"]

LOG_2 = 0.6931471805599453


class PrestoPath(NamedTuple):
    """What :func:`presto_path` returns, for ``L`` penalties."""

    lambdas: Tensor
    intercept: Tensor
    coef: Tensor
    nll: Tensor
    nonzero: Tensor
    kkt: Tensor


def proportional_odds_nll(
    X: Tensor,
    y: Tensor,
    intercept: Tensor,
    coef: Tensor,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Minus log-probability of ordered classes, each boundary with a slope of its own.

    With :math:`\eta_k = \alpha_k + x^\top \beta_k`, :math:`\eta_{-1} = -\infty` and
    :math:`\eta_{K-1} = \infty`,

    .. math::
        P(y \le k \mid x) = \sigma(\eta_k), \qquad
        L = -\log\big(\sigma(\eta_y) - \sigma(\eta_{y-1})\big) .

    It is computed as :math:`-\log\sigma(\eta_y) - \log\sigma(-\eta_{y-1})
    - \log(1 - e^{-(\eta_y - \eta_{y-1})})`, which does not cancel. Equal columns of ``coef`` are
    the proportional-odds model; ``K = 2`` is logistic regression of ``y = 0``.

    Args:
        X: features, ``[N, p]``.
        y: classes, integer ``[N]`` in ``0..K-1``; the highest is the rare one.
        intercept: :math:`\alpha`, ``[K-1]``, rising where there are no features.
        coef: :math:`\beta`, ``[p, K-1]``. A positive slope *lowers* the rare class; other packages
            use the opposite sign.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A 0-d tensor, or ``[N]``; twice differentiable. Infinite, with a zero gradient, where the
        boundaries of the item's class cross: a line search must step back. NaN passes through.

    Raises:
        ValueError: a shape does not fit, a class is out of range or the input is empty.
        TypeError: ``y`` is not of integers, another argument not floating.

    Example:
        The two boundaries are at 1/4 and 3/4, and the feature moves only the upper one:

        >>> import math
        >>> X = torch.tensor([[0.0], [1.0]])
        >>> intercept = torch.tensor([-math.log(3), math.log(3)])
        >>> coef = torch.tensor([[0.0, -1.0]])
        >>> y = torch.tensor([2, 2])
        >>> (-proportional_odds_nll(X, y, intercept, coef, reduction="none")).exp()
        tensor([0.2500, 0.4754])

    Source: arXiv:2305.18700, Section 2; the stable form is ours.
    """
    check_floating(X=X, intercept=intercept, coef=coef)
    check_integer_dtype(y=y)
    check_shape("X", X, (None, None))
    check_not_empty("X", X)
    check_shape("y", y, (X.shape[0],))
    check_shape("intercept", intercept, (None,))
    check_not_empty("intercept", intercept)
    last = intercept.shape[0]
    check_shape("coef", coef, (X.shape[1], last))
    check_values("y", y, last)
    eta = widen(intercept) + widen(X) @ widen(coef)
    label = y.long().unsqueeze(1)
    has_upper, has_lower = (label < last).squeeze(1), (label > 0).squeeze(1)
    upper = eta.gather(1, torch.where(label < last, label, last - 1)).squeeze(1)
    lower = eta.gather(1, torch.where(label > 0, label - 1, 0)).squeeze(1)
    losses = torch.where(has_upper, -logsigmoid(upper), 0.0)
    losses = losses + torch.where(has_lower, -logsigmoid(-lower), 0.0)
    between = has_upper & has_lower
    crossed = between & (upper <= lower)
    gap = torch.where(between & ~crossed, upper - lower, 1.0)
    losses = torch.where(between, losses - _log1mexp(gap), losses)
    losses = torch.where(crossed, torch.inf, losses)
    return reduce_masked(losses, None, reduction).to(X.dtype)


def presto_penalty(beta: Tensor, *, penalize_base: bool = True, l1_ratio: float = 1.0) -> Tensor:
    r"""Sum of the changes of the slopes from one boundary to the next.

    With :math:`\psi_0 = \beta_0`, :math:`\psi_k = \beta_k - \beta_{k-1}` and the mixing ``a``,

    .. math::
        \sum_{k, j} w_k \big( a |\psi_{jk}| + \tfrac{1 - a}{2} \psi_{jk}^2 \big),
        \qquad w_0 \in \{0, 1\}, \; w_k = 1 .

    Args:
        beta: slopes ``[p, K-1]``, of standardised features as a rule.
        penalize_base: whether :math:`w_0` is 1, as in the released code: the strongest penalty then
            leaves intercepts only. With 0 it leaves the proportional-odds model.
        l1_ratio: ``a`` in [0, 1]; 1 is PRESTO, 0 its ridge variant.

    Returns:
        A 0-d tensor, to be multiplied by the penalty weight.

    Raises:
        ValueError: the shape or the mixing is wrong.

    Example:
        >>> beta = torch.tensor([[1.0, 1.0, 3.0]])
        >>> presto_penalty(beta), presto_penalty(beta, penalize_base=False)
        (tensor(3.), tensor(2.))

    Source: arXiv:2305.18700, Section 2.
    """
    check_floating(beta=beta)
    check_shape("beta", beta, (None, None))
    check_not_empty("beta", beta)
    check_range("l1_ratio", l1_ratio, at_least=0.0, at_most=1.0)
    wide = widen(beta)
    changes = wide.diff(dim=1)
    if penalize_base:
        changes = torch.cat([wide[:, :1], changes], 1)
    total = l1_ratio * changes.abs().sum() + (1 - l1_ratio) / 2 * changes.square().sum()
    return total.to(beta.dtype)


def lambda_max(
    X: Tensor, y: Tensor, *, penalize_base: bool = True, standardize: bool = True
) -> float:
    r"""Smallest penalty at which nothing is left but intercepts, or proportional odds.

    .. math:: \max_{j, k} \left| \frac{\partial L}{\partial \psi_{jk}} \right|

    at the intercepts :math:`\alpha_k = \operatorname{logit} P(y \le k)`; with
    ``penalize_base=False`` at the proportional-odds fit, over the changes only. For a mixing ``a``
    divide by ``a``.

    Args:
        X: features ``[N, p]``, finite; a tensor or an array.
        y: classes ``[N]``, integers ``0..K-1``, each at least once.
        penalize_base: see :func:`presto_penalty`.
        standardize: scale the features to unit variance (with ``1/N``) first.

    Returns:
        A number; 0 with two classes and a free base, where nothing is penalised.

    Raises:
        ValueError: NaN or infinity, a class without a row, one class only, wrong shapes.

    Example:
        >>> X = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> y = torch.tensor([0, 1, 1, 2])
        >>> top = lambda_max(X, y)
        >>> presto_path(X, y, lambdas=torch.tensor([top, 0.99 * top])).nonzero
        tensor([0, 1])

    Source: arXiv:2305.18700, released code.
    """
    data = _data(X, y, None, standardize=standardize)
    path = Path(data, penalize_base=penalize_base, l1_ratio=1.0, tol=1e-10, max_iter=100)
    return path.lambda_max()


def presto_path(
    X: Tensor,
    y: Tensor,
    *,
    lambdas: Tensor | None = None,
    n_lambdas: int = 20,
    ratio: float = 0.01,
    penalize_base: bool = True,
    l1_ratio: float = 1.0,
    standardize: bool = True,
    tol: float = 1e-8,
    max_iter: int = 100,
    sample_weight: Tensor | None = None,
) -> PrestoPath:
    r"""Fit PRESTO for falling penalties, each from the one before.

    .. math:: \min_{\alpha, \beta} \; L(\alpha, \beta) + \lambda \, \mathrm{penalty}(\beta)

    with the mean of :func:`proportional_odds_nll` and :func:`presto_penalty` of the slopes of the
    standardised features. Newton steps on the exact quadratic model with the penalty, until the
    conditions of optimality hold to ``tol``; not differentiable.

    Args:
        X: features ``[N, p]``, finite; a tensor or an array.
        y: classes ``[N]``, integers ``0..K-1``, each at least once.
        lambdas: penalties ``[L]``, falling; ``None`` = ``n_lambdas`` of them from
            :func:`lambda_max` (divided by ``max(l1_ratio, 0.01)``) down to ``ratio`` of it.
        n_lambdas: number of penalties.
        ratio: the last as a share of the first, in (0, 1).
        penalize_base: see :func:`presto_penalty`.
        l1_ratio: its mixing.
        standardize: penalise slopes of features of unit variance; results are in your units.
        tol: largest violation of the conditions of optimality, as a share of the largest slope of
            the model without features.
        max_iter: Newton steps for each penalty.
        sample_weight: ``[N]``, not negative, not all 0; ``None`` = equal.

    Returns:
        ``lambdas [L]``, ``intercept [L, K-1]``, ``coef [L, p, K-1]``, ``nll [L]`` (mean),
        ``nonzero [L]`` increments (with ``K - 1`` intercepts: degrees of freedom), and ``kkt [L]``,
        the violations of the conditions that remain. All float64 but ``nonzero``.

    Raises:
        ValueError: NaN or infinity, a class without a row, one class only, wrong shapes or ranges.

    Example:
        The feature acts on the first step alone: one increment brings it in, and another takes it
        back at the second step.

        >>> X = torch.tensor([[0.0]] * 6 + [[1.0]] * 6)
        >>> y = torch.tensor([0, 0, 0, 0, 1, 2, 0, 1, 1, 1, 1, 2])
        >>> path = presto_path(X, y, n_lambdas=4)
        >>> path.nonzero
        tensor([0, 2, 2, 2])
        >>> bool(path.coef[-1, 0, 1].abs() < path.coef[-1, 0, 0].abs() / 10)
        True

    Source: arXiv:2305.18700, Section 2 and released code; the solver is ours.
    """
    check_range("tol", tol, above=0.0)
    check_count("max_iter", max_iter)
    check_count("n_lambdas", n_lambdas)
    check_range("ratio", ratio, above=0.0, below=1.0)
    check_range("l1_ratio", l1_ratio, at_least=0.0, at_most=1.0)
    data = _data(X, y, sample_weight, standardize=standardize)
    path = Path(data, penalize_base=penalize_base, l1_ratio=l1_ratio, tol=tol, max_iter=max_iter)
    grid = path.grid(n_lambdas, ratio) if lambdas is None else _numbers("lambdas", lambdas)
    if grid.ndim != 1 or grid.size == 0 or grid.min() < 0:
        raise ValueError(f"lambdas must be a row of penalties >= 0, got {grid.tolist()}")
    fits = list(path.fits(grid))
    originals = [data.original(fit.z) for fit in fits]
    return PrestoPath(
        torch.tensor(grid),
        torch.tensor(np.stack([intercept for intercept, _ in originals])),
        torch.tensor(np.stack([coef for _, coef in originals])),
        torch.tensor([fit.nll for fit in fits], dtype=torch.float64),
        torch.tensor([int(np.count_nonzero(fit.z[:, 1:])) for fit in fits]),
        torch.tensor([fit.kkt for fit in fits], dtype=torch.float64),
    )


def _data(X: Any, y: Any, sample_weight: Any, *, standardize: bool) -> Data:
    """Check tensors or arrays and sort them by class."""
    x = _numbers("X", X)
    if x.ndim != 2 or x.size == 0:
        raise ValueError(f"X must have shape [N, p] and not be empty, got {list(x.shape)}")
    label = y.detach().cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
    if label.dtype.kind not in "iu":
        raise TypeError(f"y must have an integer dtype, got {label.dtype}")
    if label.shape != (len(x),):
        raise ValueError(f"y must have shape [{len(x)}], got {list(label.shape)}")
    if label.min() < 0:
        raise ValueError(f"y must be in 0..K-1, got {label.min()}")
    if label.max() >= len(x):
        raise ValueError(f"y must be in 0..K-1, each class present, got {label.max()}")
    weight = np.ones(len(x)) if sample_weight is None else _numbers("sample_weight", sample_weight)
    if weight.shape != (len(x),) or weight.min() < 0 or weight.sum() == 0:
        raise ValueError(
            f"sample_weight must have shape [{len(x)}], no negative entry and a positive one"
        )
    kept = weight > 0
    counts = np.bincount(label[kept])
    if len(counts) < 2:
        raise ValueError("y must hold at least two classes, got one")
    if counts.min() == 0:
        missing = np.flatnonzero(counts == 0).tolist()
        raise ValueError(f"y must hold every class up to {len(counts) - 1}, got none of {missing}")
    return Data.build(x, label.astype(np.intp), weight, len(counts), standardize=standardize)


def _numbers(name: str, values: Any) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    try:
        array = array.astype(np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must hold numbers, got the dtype {array.dtype}") from None
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return array


def _log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(-x))`` for positive ``x``, by the form that does not cancel."""
    near = x < LOG_2
    small = torch.log(-torch.expm1(-torch.where(near, x, LOG_2)))
    large = torch.log1p(-torch.exp(-torch.where(near, LOG_2, x)))
    return torch.where(near, small, large)
