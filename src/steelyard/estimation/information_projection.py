r"""Is a sample large enough for a model with that many parameters, even if the model is wrong?

Maximum likelihood in an exponential family lands near the information projection, the member
closest to the truth. How near, on average, is known to second order from cumulants of the
statistics, and a Kullback-Leibler divergence has a plain meaning: how well anyone could tell the
two laws apart.

Source: Sheena (2021), MLE convergence speed to information projection of exponential family:
Criterion for model dimension and sample size, arXiv:2105.08947. The expansion, the threshold and
the algorithm are derived here.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from steelyard._checks import (
    check_count,
    check_floating,
    check_range,
    check_same_dtype,
    check_shape,
    check_tensor,
)
from steelyard.estimation._family import Family, member_with_means

__all__ = [
    "PNResult",
    "Projection",
    "RiskExpansion",
    "bayes_error_risk",
    "information_projection",
    "minimum_sample_size",
    "pn_criterion",
    "risk_expansion",
    "risk_from_cumulants",
    "tic_penalty",
]

ILL_CONDITIONED = 1e10
ROWS_PER_PARAMETER = 10

NEEDED = ("to", "start", "log_normalizer", "mean", "covariance", "truth_mean")
"""Methods that tell a family from something else."""


class Projection(NamedTuple):
    """What :func:`information_projection` returns."""

    theta: Tensor
    eta: Tensor


class RiskExpansion(NamedTuple):
    """Coefficients of ``1/n`` and ``1/n^2``."""

    c1: Tensor
    c2: Tensor


class PNResult(NamedTuple):
    """What :func:`pn_criterion` returns."""

    accept: bool
    risk: float
    threshold: float
    minimum_n: int
    bayes_error_gap: float
    c1: float
    c2: float
    tic: float
    notes: tuple[str, ...]


def information_projection(family: Family, truth_probs: Tensor) -> Projection:
    r"""Find the member of the family that is closest to the truth.

    .. math::
        \theta_* = \arg\min_\theta D(g \,\|\, g_\theta)
        \iff \mathbb{E}_{\theta_*} \xi = \eta_* = \mathbb{E}_g\, \xi

    With the empirical law as the truth it is the maximum-likelihood estimate. Newton steps, halved
    where the likelihood would not rise; in float64 whatever comes in. Differentiable once in the
    truth and in the statistics.

    Args:
        family: :class:`ExponentialFamily`, :class:`GaussianGraphicalFamily`, or another with their
            methods.
        truth_probs: the truth: a law ``[S]`` on the points of an ``ExponentialFamily``; rows of
            data ``[n, d]`` for a ``GaussianGraphicalFamily``.

    Returns:
        ``theta [p]`` and ``eta [p]``.

    Raises:
        TypeError: ``family`` lacks the methods of one, or ``truth_probs`` is no tensor.
        ValueError: no member has these means, because they lie on the edge of what the statistics
            can reach (a cell with no observation, say); or the truth is not a law.

    Example:
        Two coins that the model takes for independent: the projection keeps their shares.

        >>> from steelyard.estimation import pairwise_binary_family
        >>> truth = torch.tensor([0.4, 0.1, 0.2, 0.3], dtype=torch.float64)
        >>> projection = information_projection(pairwise_binary_family(2, edges=[]), truth)
        >>> projection.eta.tolist(), projection.theta.sigmoid().tolist()
        ([0.5, 0.4], [0.5, 0.4])

    Source: arXiv:2105.08947, Section 2.
    """
    _check_family(family, truth_probs)
    wide = family.to(torch.float64)
    eta = wide.truth_mean(truth_probs.to(torch.float64))
    with torch.no_grad():
        theta = member_with_means(wide, eta.detach())
        curvature = wide.covariance(theta)
    # one more step, with the gradient of the implicit function
    theta = theta + torch.linalg.solve(curvature, eta - wide.mean(theta))
    return Projection(theta.to(truth_probs.dtype), eta.to(truth_probs.dtype))


def risk_expansion(family: Family, truth_probs: Tensor) -> RiskExpansion:
    r"""Expected divergence of the fitted from the best member, to second order in ``1/n``.

    .. math::
        \mathbb{E}\, D(g_{\theta_*} \,\|\, g_{\hat\theta}) = \frac{c_1}{n} + \frac{c_2}{n^2}
        + O(n^{-3}), \qquad c_1 = \tfrac12 \operatorname{tr}(G^{-1} \Sigma)

    with the covariance ``G`` of the statistics under the *model* and :math:`\Sigma` under the
    *truth*; :math:`c_2` as in :func:`risk_from_cumulants`. If the truth is in the family,
    :math:`c_1 = p/2`.

    Where the estimate fails to exist with positive probability, as in all families on finitely many
    points, the expectation is infinite and the expansion is that of the risk given that it exists.
    Memory is ``p^3``.

    Args:
        family: see :func:`information_projection`.
        truth_probs: see :func:`information_projection`.

    Returns:
        ``c1`` and ``c2``, 0-d.

    Raises:
        TypeError, ValueError: as :func:`information_projection`.

    Example:
        Overdispersed counts: the model believes in a smaller spread, and the risk is larger than
        half a parameter.

        >>> from steelyard.estimation import ExponentialFamily
        >>> counts = torch.arange(5, dtype=torch.float64)
        >>> base = torch.tensor([1, 4, 6, 4, 1], dtype=torch.float64)
        >>> family = ExponentialFamily(counts.unsqueeze(1), base)
        >>> spread = torch.tensor([0.3, 0.1, 0.2, 0.1, 0.3], dtype=torch.float64)
        >>> risk_expansion(family, spread).c1
        tensor(1.3000, dtype=torch.float64)
        >>> risk_expansion(family, family.probs(torch.ones(1).double())).c1
        tensor(0.5000, dtype=torch.float64)

    Source: arXiv:2105.08947; the form of c2 is derived here.
    """
    _check_family(family, truth_probs)
    wide = family.to(torch.float64)
    truth = truth_probs.to(torch.float64)
    theta = information_projection(wide, truth).theta
    sigma, kappa = wide.truth_cumulants(truth)
    c1, c2 = _expand(wide, theta, sigma, kappa)
    return RiskExpansion(c1.to(truth_probs.dtype), c2.to(truth_probs.dtype))


def risk_from_cumulants(
    model_covariance: Tensor,
    model_third: Tensor,
    model_fourth: Tensor,
    truth_covariance: Tensor,
    truth_third: Tensor,
) -> RiskExpansion:
    r"""Compute ``c1`` and ``c2`` from cumulants of the statistics, for a family of your own.

    With ``G``, ``T``, :math:`\Psi` under the model at the projection, :math:`\Sigma`,
    :math:`\kappa` under the truth and :math:`M = G^{-1} \Sigma G^{-1}`, indices raised by
    :math:`G^{-1}` and summed,

    .. math::
        c_2 = \tfrac1{24} \big[ -8\, T^{abc} \kappa_{abc} + 9 \big( T_{ab}{}^{e} T_{ecd}
        + 2\, T_{ac}{}^{e} T_{ebd} - \Psi_{abcd} \big) M^{ab} M^{cd} \big] .

    Args:
        model_covariance: ``G``, ``[p, p]``, positive definite.
        model_third: ``T``, ``[p, p, p]``.
        model_fourth: fourth *cumulant*, ``[p, p, p, p]``.
        truth_covariance: ``[p, p]``.
        truth_third: third central moment, ``[p, p, p]``.

    Returns:
        ``c1`` and ``c2``, 0-d.

    Raises:
        ValueError: a shape does not fit, or ``G`` is not positive definite.
        TypeError: a tensor is not floating point, or the dtypes differ.

    Example:
        An exponential law with its own model: the exact risk is digamma(n) - log n + 1/(n - 1).

        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> cumulants = one, -2 * one.unsqueeze(0), 6 * one.view(1, 1, 1, 1)
        >>> risk = risk_from_cumulants(*cumulants, one, -2 * one.unsqueeze(0))
        >>> risk.c1.item(), round(12 * risk.c2.item(), 9)  # 1/2 and 11/12
        (0.5, 11.0)

    Source: derived; verified on the exact risks of the exponential and the normal law.
    """
    check_floating(
        model_covariance=model_covariance,
        model_third=model_third,
        model_fourth=model_fourth,
        truth_covariance=truth_covariance,
        truth_third=truth_third,
    )
    check_shape("model_covariance", model_covariance, (None, None))
    p = model_covariance.shape[0]
    shapes = {"model_covariance": (model_covariance, 2), "model_third": (model_third, 3)}
    shapes |= {"model_fourth": (model_fourth, 4), "truth_covariance": (truth_covariance, 2)}
    shapes |= {"truth_third": (truth_third, 3)}
    for name, (tensor, order) in shapes.items():
        check_shape(name, tensor, (p,) * order)
    check_same_dtype(**{name: tensor for name, (tensor, _) in shapes.items()})
    whiten = _whitener(model_covariance, name="model_covariance")
    sandwich = whiten.mT @ whiten @ truth_covariance @ whiten.mT @ whiten
    fourth = torch.einsum("abcd,ab,cd->", model_fourth, sandwich, sandwich)
    return _combine(whiten, model_third, fourth, truth_covariance, truth_third)


def tic_penalty(family: Family, truth_probs: Tensor) -> Tensor:
    r"""Takeuchi's penalty, the effective number of parameters of a wrong model.

    .. math:: \operatorname{tr}(G^{-1} \Sigma) = 2 c_1

    AIC takes ``p`` for it, which is right if the truth is in the family.

    Args:
        family: see :func:`information_projection`.
        truth_probs: see :func:`information_projection`.

    Returns:
        0-d.

    Raises:
        TypeError, ValueError: as :func:`information_projection`.

    Example:
        A normal model of data with kurtosis 1 (two values) needs one parameter, not two:

        >>> from steelyard.estimation import GaussianGraphicalFamily
        >>> rows = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
        >>> tic_penalty(GaussianGraphicalFamily(1), rows)
        tensor(1., dtype=torch.float64)

    Source: Takeuchi (1976); arXiv:2105.08947.
    """
    _check_family(family, truth_probs)
    wide = family.to(torch.float64)
    truth = truth_probs.to(torch.float64)
    theta = information_projection(wide, truth).theta
    sigma, _ = wide.truth_cumulants(truth)
    trace: Tensor = torch.linalg.solve(wide.covariance(theta), sigma).diagonal().sum()
    return trace.to(truth_probs.dtype)


def bayes_error_risk(epsilon: float) -> float:
    r"""Largest risk at which fitted and best member are hard to tell apart.

    .. math:: C = 8 \epsilon^2

    A risk of at most ``C`` bounds the mean of ``1/2 - Er`` by ``epsilon``, where ``Er`` is the
    error of the best test between the two laws: Pinsker's inequality, then Jensen's.

    Args:
        epsilon: in (0, 1/2).

    Returns:
        ``C`` in nats.

    Raises:
        ValueError: ``epsilon`` is out of range.

    Example:
        >>> round(bayes_error_risk(0.05), 6)
        0.02

    Source: derived; the paper has a condition of its own.
    """
    check_range("epsilon", epsilon, above=0.0, below=0.5)
    return 8.0 * epsilon * epsilon


def minimum_sample_size(c1: float | Tensor, c2: float | Tensor, epsilon: float = 0.05) -> int:
    r"""Smallest sample from which on the risk stays below :func:`bayes_error_risk`.

    .. math::
        n = \Big\lceil \frac{c_1 + \sqrt{c_1^2 + 4 C c_2}}{2 C} \Big\rceil, \qquad
        C = 8 \epsilon^2

    Args:
        c1: of :func:`risk_expansion`, >= 0.
        c2: of the same; may be negative. Where it keeps the expansion below ``C`` for every ``n``
            the answer is 1, and the expansion is not to be trusted.
        epsilon: in (0, 1/2).

    Returns:
        The number of rows.

    Raises:
        TypeError: ``c1`` or ``c2`` is no number.
        ValueError: a number is out of range or not finite.

    Example:
        Without the second term, a true model needs 25 rows for each parameter at 0.05:

        >>> minimum_sample_size(10 / 2, 0.0, 0.05)
        250
        >>> minimum_sample_size(7.476, 67.4, 0.05)  # five binary traits of red wine
        383

    Source: derived.
    """
    threshold = bayes_error_risk(epsilon)
    if threshold == 0:
        raise ValueError(f"epsilon must have a square that is not rounded to 0, got {epsilon}")
    return _minimum_n(_as_float("c1", c1), _as_float("c2", c2), threshold)


def pn_criterion(
    family: Family,
    truth_probs: Tensor,
    n: int | None = None,
    *,
    epsilon: float = 0.05,
    threshold: float | None = None,
) -> PNResult:
    r"""Decide whether ``n`` rows are enough for the model.

    .. math:: \text{accept} \iff \frac{c_1}{n} + \frac{c_2}{n^2} \le C

    It complements AIC and TIC, which choose among models and do not say whether the chosen one is
    estimated well enough.

    Args:
        family: see :func:`information_projection`.
        truth_probs: the truth or its estimate; see :func:`information_projection`.
        n: rows; ``None`` = the rows given, for families that take data.
        epsilon: how much the best test between fitted and best member may beat a coin, on average,
            in (0, 1/2).
        threshold: ``C`` in nats; ``None`` = :func:`bayes_error_risk` of ``epsilon``.

    Returns:
        ``accept``; ``risk``, the expansion at ``n``; ``threshold``; ``minimum_n``; a bound
        ``bayes_error_gap`` on the mean of ``1/2 - Er``, ``sqrt(risk / 8)``; ``c1``, ``c2``;
        ``tic``; and ``notes``, sentences on what makes the numbers doubtful, empty if nothing does.

    Raises:
        TypeError: as :func:`information_projection`.
        ValueError: a number is out of range, ``n`` is missing, no projection exists.

    Example:
        >>> from steelyard.estimation import pairwise_binary_family
        >>> family = pairwise_binary_family(3)
        >>> truth = family.probs(torch.zeros(6, dtype=torch.float64))
        >>> result = pn_criterion(family, truth, 100)
        >>> result.accept, result.minimum_n, round(result.tic, 9)
        (False, 155, 6.0)
        >>> pn_criterion(family, truth, 200).accept
        True

    Source: arXiv:2105.08947; threshold derived.
    """
    _check_family(family, truth_probs)
    if n is None:
        if truth_probs.dim() != 2:
            raise ValueError("n must be given with a law, got None")
        n = truth_probs.shape[0]
    check_count("n", n)
    bound = bayes_error_risk(epsilon)
    threshold = bound if threshold is None else threshold
    check_range("threshold", threshold, above=0.0)
    wide, truth = family.to(torch.float64), truth_probs.detach().to(torch.float64)
    with torch.no_grad():
        theta = information_projection(wide, truth).theta
        sigma, kappa = wide.truth_cumulants(truth)
        c1, c2 = (float(value) for value in _expand(wide, theta, sigma, kappa))
        condition = float(torch.linalg.cond(_correlation(wide.covariance(theta))))
    risk = c1 / n + c2 / n**2
    notes = _notes(c1, c2, n, family.size, condition)
    gap = math.sqrt(max(risk, 0.0) / 8)
    smallest = _minimum_n(c1, c2, threshold)
    return PNResult(risk <= threshold, risk, threshold, smallest, gap, c1, c2, 2 * c1, notes)


def _check_family(family: Family, truth_probs: Tensor) -> None:
    missing = [name for name in NEEDED if not callable(getattr(family, name, None))]
    if missing:
        raise TypeError(
            f"family must be an exponential family, got {type(family).__name__} without the "
            f"methods {', '.join(missing)}"
        )
    check_tensor("truth_probs", truth_probs)


def _as_float(name: str, value: float | Tensor) -> float:
    try:
        return float(value + 0)  # a text is no number, though float() reads it
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}") from None


def _notes(c1: float, c2: float, n: int, p: int, condition: float) -> tuple[str, ...]:
    notes = []
    if abs(c2) / n**2 > c1 / (2 * n):
        notes.append("n is too small for the expansion: its second term is not small")
    if n < ROWS_PER_PARAMETER * p:
        notes.append(
            f"fewer than {ROWS_PER_PARAMETER} rows for each of {p} parameters: "
            "cumulants estimated from the same rows are biased"
        )
    if condition > ILL_CONDITIONED:
        notes.append(f"the statistics are nearly dependent (condition number {condition:.0e})")
    return tuple(notes)


def _minimum_n(c1: float, c2: float, threshold: float) -> int:
    check_range("c1", c1, at_least=0.0, below=math.inf)
    check_range("c2", c2, above=-math.inf, below=math.inf)
    under_root = c1 * c1 + 4 * threshold * c2
    if under_root < 0:
        return 1
    root = (c1 + math.sqrt(under_root)) / (2 * threshold)
    if root == math.inf:
        raise ValueError(f"c1, c2 and epsilon must ask for a finite size, got {c1}, {c2}")
    largest = max(1, math.ceil(root))
    # rounding may have put the root just above a whole number
    below = largest - 1
    fits = below >= 1 and c1 / below + c2 / below**2 <= threshold * (1 + 1e-12)
    return below if fits else largest


def _expand(family: Family, theta: Tensor, sigma: Tensor, kappa: Tensor) -> RiskExpansion:
    whiten = _whitener(family.covariance(theta))
    sandwich = whiten.mT @ whiten @ sigma @ whiten.mT @ whiten
    fourth = family.fourth_contraction(theta, sandwich)
    return _combine(whiten, family.third_cumulant(theta), fourth, sigma, kappa)


def _combine(
    whiten: Tensor, third: Tensor, fourth: Tensor, sigma: Tensor, kappa: Tensor
) -> RiskExpansion:
    """Contract in coordinates where the model's covariance is the identity."""
    m = whiten @ sigma @ whiten.mT
    t = _turn(third, whiten)
    skew = (t * _turn(kappa, whiten)).sum()
    trace = torch.einsum("abe,ab->e", t, m)
    turned = torch.einsum("ab,bde,dc->ace", m, t, m)
    inner = trace.square().sum() + 2 * (t * turned).sum() - fourth
    return RiskExpansion(m.diagonal().sum() / 2, (9 * inner - 8 * skew) / 24)


def _turn(tensor: Tensor, whiten: Tensor) -> Tensor:
    """Apply a matrix to each of three indices."""
    for _ in range(3):
        tensor = torch.tensordot(tensor, whiten, dims=([0], [1]))
    return tensor


def _whitener(
    covariance: Tensor, *, name: str = "the covariance of the statistics of family"
) -> Tensor:
    """Inverse of the Cholesky factor."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if bool(failed):
        raise ValueError(f"{name} must be positive definite")
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
    return inverse


def _correlation(covariance: Tensor) -> Tensor:
    spread = covariance.diagonal().sqrt()
    return covariance / torch.outer(spread, spread)
