r"""Regrets and weights of mixtures that have a closed form: coins, Gaussian means, regressions.

The companions of :mod:`steelyard.estimation.universal_mixture` for continuous parameters. Regrets
are per symbol and in nats; weights are the prior mass of ``{theta : KL(truth || theta) <= eps}``.

Source: Feder, Urbanke, Fogel (2025), arXiv:2506.07661, closed forms derived.
"""

import torch
from torch import Tensor

from steelyard._checks import check_count, check_floating, check_not_empty, check_range, check_shape
from steelyard.estimation._numbers import (
    Number,
    as_wide,
    broadcast,
    check_values,
    narrow_dtype,
    widen,
)
from steelyard.estimation._special import log1p_minus

__all__ = [
    "bernoulli_regret",
    "bernoulli_weight",
    "gaussian_regret",
    "gaussian_weight",
    "linear_regression_regret",
]

_BISECTIONS = 120
_QUADRATURE_NODES = 20
# Two tails this many times larger than their difference have lost five digits of it.
_TAIL_RATIO = 1e5


def bernoulli_regret(truth: Number, n: int, *, a: float = 1.0, b: float = 1.0) -> Tensor:
    r"""Regret per toss of the coin learner with a Beta prior.

    .. math::
        R_o = \frac1n \mathbb{E}_{k \sim \mathrm{Bin}(n, \theta_0)} \Big[
            k \log \theta_0 + (n - k) \log(1 - \theta_0)
            - \log \frac{B(k + a, n - k + b)}{B(a, b)} \Big]

    The learner predicts heads with ``(k + a) / (n + a + b)``: ``a = b = 1`` is Laplace's rule,
    ``a = b = 1/2`` that of Jeffreys, whose cost is ``(1/2) log n + O(1)`` in total.

    Args:
        truth: probability of heads, in [0, 1]; a float or a tensor of any shape.
        n: number of tosses, >= 1.
        a: prior weight of heads, > 0.
        b: prior weight of tails, > 0.

    Returns:
        Shape of ``truth``, nats per toss, >= 0; float64 for a float.

    Raises:
        TypeError: ``truth`` is no number or floating tensor.
        ValueError: a number out of range.

    Example:
        A sure coin under Laplace's rule costs ``log(n + 1)``:

        >>> (100 * bernoulli_regret(1.0, 100)).exp()
        tensor(101.0000, dtype=torch.float64)

    Source: arXiv:2506.07661, closed form derived.
    """
    (theta,) = as_wide(truth=truth)
    _check_probability("truth", theta)
    check_count("n", n)
    check_range("a", a, above=0.0)
    check_range("b", b, above=0.0)
    heads = torch.arange(n + 1, dtype=theta.dtype, device=theta.device)
    tails = n - heads
    p = theta.unsqueeze(-1)
    own = torch.xlogy(heads, p) + torch.xlogy(tails, 1 - p)
    ways = -_log_beta(heads + 1, tails + 1) - torch.log(heads.new_tensor(n + 1.0))
    mixture = _log_beta(heads + a, tails + b) - _log_beta(heads.new_tensor(a), heads.new_tensor(b))
    # where the truth cannot go, own is -inf and the probability exactly 0
    excess = torch.where(torch.isinf(own), 0.0, own - mixture)
    return (((ways + own).exp() * excess).sum(-1) / n).to(narrow_dtype(truth))


def gaussian_regret(
    truth: Number, n: int, *, noise_variance: Number, prior_variance: Number
) -> Tensor:
    r"""Regret per observation for a Gaussian mean with the prior ``N(0, prior_variance)``.

    .. math::
        n R_o = \tfrac12 \log\Big(1 + \frac{n \tau^2}{\sigma^2}\Big)
            + \frac{n (\theta_0^2 - \tau^2)}{2 (\sigma^2 + n \tau^2)}

    Args:
        truth: the mean :math:`\theta_0`; a float or a tensor of any shape.
        n: number of observations, >= 1.
        noise_variance: :math:`\sigma^2 > 0`.
        prior_variance: :math:`\tau^2 \ge 0`; 0 = a single model, at 0.

    Returns:
        Broadcast shape of the numbers, nats per observation, >= 0.

    Raises:
        TypeError: an argument is no number or floating tensor.
        ValueError: a number out of range.

    Example:
        Twice the data, about half the price: a parameter costs ``log(n) / (2n)``.

        >>> [round(gaussian_regret(0.5, n, noise_variance=1.0, prior_variance=1.0).item(), 4)
        ...  for n in (50, 100, 200)]
        [0.032, 0.0194, 0.0114]

    Source: arXiv:2506.07661, closed form derived.
    """
    theta, s2, t2 = as_wide(
        truth=truth, noise_variance=noise_variance, prior_variance=prior_variance
    )
    check_count("n", n)
    check_values("noise_variance", s2, above=0.0, at_least=0.0)
    check_values("prior_variance", t2, at_least=0.0)
    total = 0.5 * torch.log1p(n * t2 / s2) + n * (theta**2 - t2) / (2 * (s2 + n * t2))
    return (total / n).to(narrow_dtype(truth, noise_variance, prior_variance))


def linear_regression_regret(
    X: Tensor, truth: Tensor, *, noise_variance: Number, prior_variance: Tensor
) -> Tensor:
    r"""Regret per item of Bayesian linear regression at a fixed design, for any ``d`` and ``n``.

    .. math::
        n R = \tfrac12 \Big[ \log\det\big(I + X \Lambda X^\top / \sigma^2\big)
            + \mathrm{tr}\, \Sigma^{-1} \big(\sigma^2 I + X \theta_0 \theta_0^\top X^\top\big)
            - n \Big], \qquad \Sigma = \sigma^2 I + X \Lambda X^\top

    The prior is ``N(0, diag(prior_variance))``. Features whose prior variance decays cost nearly
    nothing, however many there are.

    Args:
        X: design, ``[n, d]``; ``d > n`` is allowed.
        truth: coefficients :math:`\theta_0`, ``[d]``.
        noise_variance: :math:`\sigma^2 > 0`.
        prior_variance: diagonal of :math:`\Lambda`, ``[d]``, >= 0.

    Returns:
        0-d tensor in nats per item, >= 0.

    Raises:
        TypeError: not floating point.
        ValueError: wrong shapes, empty, or a variance out of range.

    Example:
        A thousand more features of summable variance are nearly free:

        >>> import torch
        >>> wave = torch.arange(20.0).unsqueeze(1) * torch.arange(1.0, 1011.0)
        >>> X, truth = torch.cos(wave), torch.zeros(1010)
        >>> variance = torch.arange(1.0, 1011.0) ** -3
        >>> for d in (10, 1010):
        ...     linear_regression_regret(X[:, :d], truth[:d], noise_variance=1.0,
        ...                              prior_variance=variance[:d])
        tensor(0.0463)
        tensor(0.0463)

    Source: arXiv:2506.07661, closed form derived.
    """
    check_floating(X=X, truth=truth, prior_variance=prior_variance)
    check_shape("X", X, (None, None))
    check_not_empty("X", X)
    check_shape("truth", truth, (X.shape[1],))
    check_shape("prior_variance", prior_variance, (X.shape[1],))
    check_values("prior_variance", prior_variance, at_least=0.0)
    (s2,) = as_wide(noise_variance=noise_variance)
    check_shape("noise_variance", s2, ())
    check_values("noise_variance", s2, above=0.0, at_least=0.0)
    n, d = X.shape
    design = widen(X)
    if n > d:  # outside the column space nothing is learned and nothing is paid
        design = torch.linalg.qr(design).R
    identity = torch.eye(len(design), dtype=design.dtype, device=design.device)
    signal = design * widen(prior_variance) @ design.T / s2
    factor, failed = torch.linalg.cholesky_ex(identity + signal)
    if bool(failed):  # the identity is lost beside a huge signal: take the factor without squares
        root = design * widen(prior_variance).sqrt() / s2.sqrt()
        upper = torch.linalg.qr(torch.cat([root.T, identity])).R
        factor = (upper * upper.diagonal().sign().unsqueeze(1)).T
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    shift = inverse @ (design @ widen(truth)) / s2.sqrt()
    log_det = 2 * factor.diagonal().log().sum()
    total: Tensor = 0.5 * (log_det + inverse.square().sum() + shift.square().sum() - len(design))
    return (total / n).to(narrow_dtype(X, truth, prior_variance))


def bernoulli_weight(truth: Number, epsilon: Number, *, a: float = 1.0, b: float = 1.0) -> Tensor:
    r"""Beta prior mass of the coins within ``epsilon`` of the truth.

    .. math:: W(\varepsilon) = \Pr_{\theta \sim \mathrm{Beta}(a, b)}
        \big( \mathrm{KL}(\theta_0 \| \theta) \le \varepsilon \big)

    For small ``epsilon`` it goes as its square root (one parameter), at ``truth`` 0 or 1 and
    ``a = b = 1`` as ``epsilon`` itself.

    Args:
        truth: probability of heads, in [0, 1]; a float or a tensor.
        epsilon: radius in nats, >= 0; a float or a tensor.
        a: prior weight of heads, > 0.
        b: prior weight of tails, > 0.

    Returns:
        Broadcast shape of ``truth`` and ``epsilon``, in [0, 1], to relative accuracy. No gradient.

    Raises:
        TypeError: an argument is no number or floating tensor.
        ValueError: a number out of range.

    Example:
        >>> [f"{bernoulli_weight(0.5, eps).item():.3e}" for eps in (1e-2, 1e-4, 1e-6)]
        ['1.407e-01', '1.414e-02', '1.414e-03']

    Source: arXiv:2506.07661, weight; closed form derived.
    """
    theta, radius = broadcast(*as_wide(truth=truth, epsilon=epsilon))
    _check_probability("truth", theta)
    check_values("epsilon", radius, at_least=0.0)
    check_range("a", a, above=0.0)
    check_range("b", b, above=0.0)
    with torch.no_grad():
        # theta exp(-down) is the low end; the high end is its mirror image
        down, up = _log_reach(theta, radius), _log_reach(1 - theta, radius)
        low, above = theta * torch.exp(-down), (1 - theta) * torch.exp(-up)
        width = -theta * torch.expm1(-down) - (1 - theta) * torch.expm1(-up)
        return _beta_mass(low, above, width, a, b).to(narrow_dtype(truth, epsilon))


def gaussian_weight(
    truth: Number, epsilon: Number, *, noise_variance: Number, prior_variance: Number
) -> Tensor:
    r"""Prior mass of the Gaussian means within ``epsilon`` of the truth.

    .. math::
        W(\varepsilon) = \Phi\Big(\frac{\theta_0 + r}{\tau}\Big)
            - \Phi\Big(\frac{\theta_0 - r}{\tau}\Big), \qquad r = \sigma \sqrt{2 \varepsilon}

    Args:
        truth: the mean :math:`\theta_0`; a float or a tensor.
        epsilon: radius in nats, >= 0; a float or a tensor.
        noise_variance: :math:`\sigma^2 > 0` of an observation.
        prior_variance: :math:`\tau^2 > 0`.

    Returns:
        Broadcast shape of the numbers, in [0, 1], to relative accuracy.

    Raises:
        TypeError: an argument is no number or floating tensor.
        ValueError: a number out of range.

    Example:
        A truth far out in the prior is a complex one; its weight is small, and so is its pull.

        >>> [f"{gaussian_weight(m, 0.01, noise_variance=1.0, prior_variance=1.0).item():.1e}"
        ...  for m in (0.0, 2.0, 6.0)]
        ['1.1e-01', '1.5e-02', '1.9e-09']

    Source: arXiv:2506.07661, weight; closed form derived.
    """
    theta, radius, s2, t2 = broadcast(
        *as_wide(
            truth=truth,
            epsilon=epsilon,
            noise_variance=noise_variance,
            prior_variance=prior_variance,
        )
    )
    check_values("epsilon", radius, at_least=0.0)
    check_values("noise_variance", s2, above=0.0, at_least=0.0)
    check_values("prior_variance", t2, above=0.0, at_least=0.0)
    centre, half = theta.abs() / t2.sqrt(), torch.sqrt(2 * s2 * radius / t2)
    near, far = torch.special.ndtr(half - centre), torch.special.ndtr(-half - centre)
    nodes, weights = _gauss_legendre(half)
    points = centre.unsqueeze(-1) + half.unsqueeze(-1) * nodes
    density = torch.exp(-points.square() / 2) / (2 * torch.pi) ** 0.5
    narrow = half * (density * weights).sum(-1)
    mass = torch.where(narrow * _TAIL_RATIO < far, narrow, near - far)
    dtype = narrow_dtype(truth, epsilon, noise_variance, prior_variance)
    return mass.to(dtype)


def _check_probability(name: str, value: Tensor) -> None:
    check_values(name, value, at_least=0.0)
    if bool((value > 1).any()):
        raise ValueError(f"{name} must be in [0, 1], got {value.max().item()}")


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


def _log_reach(theta: Tensor, radius: Tensor) -> Tensor:
    r"""Solve ``KL(theta || theta exp(-u)) = radius`` for ``u >= 0`` (0 where ``theta`` is 0).

    Written as a sum of two terms >= 0, so that small radii keep their digits.
    """
    other = 1 - theta
    safe, low = theta.clamp(min=torch.finfo(theta.dtype).tiny), torch.zeros_like(theta)
    high = radius.clamp(max=1e300) / safe + 2.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        drop = torch.expm1(-middle)
        rise = torch.where(other > 0, -theta * drop / other, torch.inf)
        # other * (x - log1p(x)) tends to the linear term alone where other is 0
        second = torch.where(other > 0, -other * log1p_minus(rise.clamp(max=1e300)), -theta * drop)
        # log1p(expm1(-u)) - expm1(-u) = -u - expm1(-u)
        first = -theta * torch.where(middle < 0.5, log1p_minus(drop), -middle - drop)
        beyond = first + second > radius
        low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
    return torch.where(theta > 0, low, 0.0)


def _beta_mass(low: Tensor, above: Tensor, width: Tensor, a: float, b: float) -> Tensor:
    """Mass of ``[low, 1 - above]``: a difference of the smaller tails, or quadrature."""
    from scipy import special

    def cdf(p: float, q: float, x: Tensor) -> Tensor:
        return torch.as_tensor(special.betainc(p, q, x.cpu().numpy())).to(x)

    below_low, below_high = cdf(a, b, low), cdf(a, b, low + width)
    above_low, above_high = cdf(b, a, above + width), cdf(b, a, above)
    left = below_high < above_low
    difference = torch.where(left, below_high - below_low, above_low - above_high)
    both_tails = 1 - below_low - above_high
    difference = torch.where(difference > 0.5, both_tails, difference)
    tail = torch.minimum(below_high, above_low)
    nodes, weights = _gauss_legendre(width)
    steps = width.unsqueeze(-1) * (nodes + 1) / 2
    x, y = low.unsqueeze(-1) + steps, (above + width).unsqueeze(-1) - steps
    log_norm = float(special.betaln(a, b))
    density = torch.exp(torch.xlogy(a - 1.0, x) + torch.xlogy(b - 1.0, y) - log_norm)
    narrow = width * (density * weights).sum(-1) / 2
    return torch.where(narrow * _TAIL_RATIO < tail, narrow, difference).clamp(0.0, 1.0)


def _gauss_legendre(like: Tensor) -> tuple[Tensor, Tensor]:
    from numpy.polynomial.legendre import leggauss

    nodes, weights = leggauss(_QUADRATURE_NODES)
    return torch.as_tensor(nodes).to(like), torch.as_tensor(weights).to(like)
