r"""f-divergences ``D_f(p || q) = E_q[f(p/q)]``: one registry, one convention, exact in log space.

The first argument is the numerator ``p``, logarithms are natural, ``f(1) = 0``. With zeros,

.. math:: D_f(p\|q) = \sum_{q>0} q f(p/q) + f'(\infty)\, p(q = 0), \qquad f(0) = \lim_{t\to0} f(t).

``KL`` is ``KL(p || q)`` and ``REVERSE_KL`` is ``KL(q || p)``. Papers name the same two functions by
who is the policy, the student or the posterior; ``docs/concepts/divergences.md`` translates.

Source: Go et al. (2023), arXiv:2302.08215; Xu et al. (2025), arXiv:2502.15681.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from steelyard._checks import check_floating, check_mask, check_range, check_same_shape
from steelyard._reduce import Reduction, accumulation_dtype, fill_masked, reduce_masked
from steelyard.divergences import generators as g
from steelyard.divergences.generators import Generator, Interior

# Stands for log 0: exp() of it is 0 and differences of two stay finite, in float32 too.
_LOG_ZERO = -1e30


@dataclass(frozen=True)
class FDivergence:
    r"""An f-divergence: a convex generator together with its perspective ``g(t) = t f(1/t)``.

    Users take the constants (``KL``, ``JENSEN_SHANNON``, ...) and the factories
    (``alpha_divergence``, ``skew_jensen_shannon``). Two divergences are equal when their names are.
    Methods take and return tensors of one shape; half precision is computed in float32.

    Attributes:
        name: of the divergence.
        dual_name: of the one with swapped arguments.
        interior: ``(log p, log q) -> q f(p/q)`` for finite logarithms.
        generator: derivatives, conjugate and value at zero of ``f``.
        perspective: the same of ``g(t) = t f(1/t)``.
        slope_at_one: ``f'(1)``.

    Example:
        The derivative is taken at the logarithm of the ratio, so that it survives ``exp(1e4)``:

        >>> JENSEN_SHANNON.derivative_at_log(torch.tensor([-1e4, 0.0, 1e4])).tolist()
        [-4999.6533203125, 0.0, 0.3465735912322998]
        >>> KL.reversed() == REVERSE_KL
        True
    """

    name: str
    dual_name: str
    interior: Interior = field(repr=False, compare=False)
    generator: Generator = field(repr=False, compare=False)
    perspective: Generator = field(repr=False, compare=False)
    slope_at_one: float = field(default=0.0, repr=False, compare=False)

    @property
    def at_zero(self) -> float:
        """``f(0)``, the limit from the right: the cost of ``p = 0`` per unit of ``q``."""
        return self.generator.at_zero

    @property
    def slope_at_infinity(self) -> float:
        """``lim f(t)/t`` at infinity: the cost of ``q = 0`` per unit of ``p``."""
        return self.perspective.at_zero

    def f(self, t: Tensor) -> Tensor:
        """Return ``f(t)`` for ``t`` in ``[0, inf)``; NaN for negative ``t``.

        The gradient at exactly ``t = 0`` is given as 0; ``derivative`` has the limit.
        """
        return _in_accumulation_dtype(lambda x: self._terms(_log(x), torch.zeros_like(x)), t=t)

    def derivative(self, t: Tensor) -> Tensor:
        """Return ``f'(t)`` for ``t`` in ``[0, inf]``, limits at both ends."""
        return _in_accumulation_dtype(lambda x: self.generator.derivative(_log(x)), t=t)

    def second_derivative(self, t: Tensor) -> Tensor:
        """Return ``f''(t)`` for ``t`` in ``[0, inf)``; 0 for total variation (a delta at 1)."""
        return _in_accumulation_dtype(
            lambda x: torch.exp(self.generator.log_second_derivative(_log(x))), t=t
        )

    def conjugate(self, y: Tensor) -> Tensor:
        """Return ``f*(y) = sup_{t >= 0} t y - f(t)``, ``inf`` outside its domain.

        The domain ends at ``slope_at_infinity``; at the end itself the limit is returned.
        """
        return _in_accumulation_dtype(self._conjugate, y=y)

    def derivative_at_log(self, log_t: Tensor) -> Tensor:
        """Return ``f'(exp(log_t))`` without forming the ratio; limits at ``-inf`` and ``inf``."""
        return _in_accumulation_dtype(self.generator.derivative, log_t=log_t)

    def pseudo_reward(self, log_t: Tensor) -> Tensor:
        r"""Return ``-f'(exp(log_t))``, the reward whose policy gradient descends ``D_f(pi || p)``.

        .. math:: \nabla D_f(\pi\|p) = -E_\pi[r \nabla \log \pi], \quad r = -f'(\pi/p).

        Args:
            log_t: ``log pi - log p``, any shape; ``inf`` where the target has no mass. Detach it
                before use in a loss: the theorem needs no gradient through the reward.

        Example:
            Total variation and Jensen-Shannon punish a forbidden sample by a finite amount, the
            KL of the policy to the target by an infinite one:

            >>> forbidden = torch.tensor(torch.inf)
            >>> [d.pseudo_reward(forbidden).item() for d in (TOTAL_VARIATION, REVERSE_KL, KL)]
            [-0.5, 0.0, -inf]

        Source: Go et al. (2023), Theorem 1, arXiv:2302.08215.
        """
        return -self.derivative_at_log(log_t)

    def reversed(self) -> "FDivergence":
        """Return the divergence of swapped arguments: ``D_g(p || q) = D_f(q || p)``.

        Its generator is ``g(t) = t f(1/t)``; derivatives and conjugate are closed forms too.
        """
        return FDivergence(
            name=self.dual_name,
            dual_name=self.name,
            interior=partial(g.swapped, base=self.interior),
            generator=self.perspective,
            perspective=self.generator,
            slope_at_one=-self.slope_at_one,
        )

    def centred(self) -> "FDivergence":
        """Return ``f(t) - f'(1) (t - 1)``: same divergence of distributions, ``f >= 0 = f'(1)``."""
        if self.slope_at_one == 0.0:
            return self
        names = (f"{self.name} (centred)", f"{self.dual_name} (centred)")
        return _affine(self, names, slope=-self.slope_at_one)

    def terms(self, p_logprobs: Tensor, q_logprobs: Tensor) -> Tensor:
        """Return ``q f(p/q)`` item by item, zeros included; ``f_divergence`` sums these.

        Args:
            p_logprobs: ``log p``, any shape; ``-inf`` where ``p = 0``.
            q_logprobs: ``log q``, the same shape.

        Returns:
            ``q f(p/q)``; ``f(0) q`` where ``p = 0``; ``slope_at_infinity * p`` where ``q = 0``;
            0 where both are zero.
        """
        return _in_accumulation_dtype(self._terms, p_logprobs=p_logprobs, q_logprobs=q_logprobs)

    def _terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        # With a finite stand-in for log 0 the interior formulas reach their finite limits by
        # themselves, gradients included; only infinite limits are put in by hand.
        low_p, low_q = log_p.clamp(min=_LOG_ZERO), log_q.clamp(min=_LOG_ZERO)
        places = []
        if self.at_zero == math.inf:
            places.append((log_p == -math.inf) & (log_q > -math.inf))
        if self.slope_at_infinity == math.inf:
            places.append((log_q == -math.inf) & (log_p > -math.inf))
        if not places:
            return self.interior(low_p, low_q)
        infinite = places[0] | places[-1]
        terms = self.interior(low_p.masked_fill(infinite, 0.0), low_q.masked_fill(infinite, 0.0))
        return terms.masked_fill(infinite, math.inf)

    def _conjugate(self, y: Tensor) -> Tensor:
        # The supremum sits at t = 0 below f'(0); at f'(inf) it is the limit t f'(t) - f(t), which
        # is -g'(1/t); beyond f'(inf) it is infinite.
        log_zero = torch.full_like(y, -math.inf)
        flat = y <= self.generator.derivative(log_zero)
        end, outside = y == self.slope_at_infinity, y > self.slope_at_infinity
        value = self.generator.conjugate(torch.where(flat | end | outside, self.slope_at_one, y))
        value = torch.where(flat, -self.at_zero, value)
        value = torch.where(end, -self.perspective.derivative(log_zero), value)
        return torch.where(outside, math.inf, value)


def f_divergence(
    p_logprobs: Tensor,
    q_logprobs: Tensor,
    divergence: FDivergence,
    *,
    dim: int = -1,
    mask: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""Exact f-divergence of two discrete laws, from their log-probabilities.

    .. math::
        D_f(p\|q) = \sum_{v:\,q_v>0} q_v f(p_v/q_v) + f'(\infty) \sum_{v:\,q_v=0} p_v,

    in nats; an item with ``p_v = q_v = 0`` counts 0. The gradient is ``f'(p/q)`` in ``p`` and
    ``f(t) - t f'(t)``, ``t = p/q``, in ``q``; nothing is detached. It has no NaN where the value is
    finite; an infinite value has a zero gradient at the items that make it infinite.

    Args:
        p_logprobs: ``log p``, shape ``[.., V]``, ``-inf`` allowed. Taken as given: pass logits
            through ``log_softmax`` first.
        q_logprobs: ``log q``, shape ``[.., V]``.
        divergence: for example ``KL``, for ``KL(p || q)``.
        dim: the dimension to sum over (default: the last).
        mask: shape ``[..]`` (without ``dim``), true = counts; other rows give 0 whatever they hold.
        reduction: ``"none"`` (default), ``"mean"`` over kept rows, or ``"sum"``.

    Returns:
        Shape ``[..]``, or 0-d when reduced; non-negative up to rounding for distributions. Half
        precision is summed in float32 and returned in the input dtype.

    Raises:
        TypeError: if a tensor is not floating.
        ValueError: if shapes differ, ``dim`` does not exist or is empty, the mask does not fit.

    Example:
        A policy that puts half of its mass where the target has none: only some divergences are
        finite.

        >>> policy = torch.tensor([0.5, 0.5]).log()
        >>> target = torch.tensor([1.0, 0.0]).log()
        >>> for d in (KL, REVERSE_KL, TOTAL_VARIATION, JENSEN_SHANNON_DOUBLE):
        ...     print(d.name, round(f_divergence(policy, target, d).item(), 4))
        kl inf
        reverse_kl 0.6931
        total_variation 0.5
        jensen_shannon_double 0.4315

    Source: Go et al. (2023), section 2, arXiv:2302.08215.
    """
    check_divergence(divergence)
    check_floating(p_logprobs=p_logprobs, q_logprobs=q_logprobs)
    check_same_shape(p_logprobs=p_logprobs, q_logprobs=q_logprobs)
    _check_dim(p_logprobs, dim)
    if mask is not None:
        check_mask(mask, p_logprobs.select(dim, 0))
        row_mask = mask.unsqueeze(dim)
        p_logprobs = fill_masked(p_logprobs, row_mask)
        q_logprobs = fill_masked(q_logprobs, row_mask)
    dtype = torch.promote_types(p_logprobs.dtype, q_logprobs.dtype)
    work = accumulation_dtype(dtype)
    rows = divergence.terms(p_logprobs.to(work), q_logprobs.to(work)).sum(dim)
    return reduce_masked(rows, mask, reduction).to(dtype)


def alpha_divergence(order: float) -> FDivergence:
    r"""Alpha-divergence of Amari order ``A``: a line from the reverse KL (0) to the KL (1) and on.

    .. math:: f(t) = \frac{t^A - A t - (1-A)}{A (A-1)}, \qquad f'(t) = \frac{t^{A-1} - 1}{A-1}.

    It is centred. ``A = 1`` gives ``KL(p || q)``, ``A = 0`` gives ``KL(q || p)``, 1/2 twice the
    squared Hellinger distance, 2 half of Pearson's chi-square, -1 half of Neyman's. f-DPO writes
    ``alpha = 1 - A``; TRL's ``f_alpha_divergence_coef`` is ``A``.

    Args:
        order: ``A``, any finite number.

    Raises:
        ValueError: if ``order`` is not finite.

    Example:
        The limits are the two KLs, not a division by zero:

        >>> t = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
        >>> torch.equal(alpha_divergence(1.0).f(t), KL.centred().f(t))
        True
        >>> alpha_divergence(0.0).derivative(t)
        tensor([-1.0000,  0.0000,  0.5000], dtype=torch.float64)

    Source: Amari (1985); Go et al. (2023), arXiv:2302.08215.
    """
    check_range("order", order, above=-math.inf, below=math.inf)
    return FDivergence(
        name=f"alpha({order:.12g})",
        dual_name=f"alpha({1.0 - order:.12g})",
        interior=partial(g.alpha_interior, order=order),
        generator=g.alpha_generator(order),
        perspective=g.alpha_generator(1.0 - order),
    )


def skew_jensen_shannon(beta: float, rescaled: bool = False) -> FDivergence:
    r"""Skewed Jensen-Shannon divergence to the mixture ``m = beta p + (1 - beta) q``.

    .. math:: D(p\|q) = \beta\, KL(p\|m) + (1 - \beta)\, KL(q\|m).

    It falls to 0 as ``beta`` goes to 0 or 1, so that ``beta`` doubles as a learning rate; libraries
    that switch to a KL at the ends jump there. ``rescaled`` divides by ``beta (1 - beta)``: the
    ends are then the limits, ``KL(p || q)`` at 0 and ``KL(q || p)`` at 1 (centred), with no jump.

    Args:
        beta: weight of ``p`` in the mixture, in ``(0, 1)``; rescaled, in ``[0, 1]``.
        rescaled: divide by ``beta (1 - beta)``; default ``False``, the form of GKD and TRL.

    Raises:
        ValueError: if ``beta`` is outside its range.

    Example:
        >>> p, q = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log()
        >>> for beta in (0.5, 0.1, 0.01):
        ...     raw, rescaled = (skew_jensen_shannon(beta, r) for r in (False, True))
        ...     print(f"{f_divergence(p, q, raw):.3f} {f_divergence(p, q, rescaled):.3f}")
        0.102 0.407
        0.034 0.373
        0.004 0.369
        >>> print(f"{f_divergence(p, q, KL):.3f}")
        0.368

    Source: Agarwal et al. (2024), arXiv:2306.13649, Eq. 1 (there ``p`` is the teacher).
    """
    if not rescaled:
        check_range("beta", beta, above=0.0, below=1.0)
        return _raw_skew(beta)
    check_range("beta", beta, at_least=0.0, at_most=1.0)
    names = (f"rescaled_skew({beta:.12g})", f"rescaled_skew({1.0 - beta:.12g})")
    if beta in (0.0, 1.0):
        end = KL if beta == 0.0 else REVERSE_KL
        return replace(end.centred(), name=names[0], dual_name=names[1])
    return _affine(_raw_skew(beta), names, scale=1.0 / (beta * (1.0 - beta)))


def _raw_skew(beta: float) -> FDivergence:
    if 1.0 - beta == 1.0:
        raise ValueError(f"beta must be > 1e-16, else 1 - beta rounds to 1, got {beta}")
    return FDivergence(
        name=f"skew({beta:.12g})",
        dual_name=f"skew({1.0 - beta:.12g})",
        interior=partial(g.skew_interior, beta=beta),
        generator=g.skew_generator(beta),
        perspective=g.skew_generator(1.0 - beta),
    )


def _affine(
    base: FDivergence, names: tuple[str, str], *, scale: float = 1.0, slope: float = 0.0
) -> FDivergence:
    # scale f(t) + slope (t - 1); its perspective is scale g(t) - slope (t - 1).
    return FDivergence(
        name=names[0],
        dual_name=names[1],
        interior=partial(g.affine_interior, base=base.interior, scale=scale, slope=slope),
        generator=g.affine(base.generator, scale, slope),
        perspective=g.affine(base.perspective, scale, -slope),
        slope_at_one=scale * base.slope_at_one + slope,
    )


def _log(t: Tensor) -> Tensor:
    # log with a zero, not an infinite, gradient at 0
    zero = t == 0
    return torch.where(zero, -math.inf, torch.log(torch.where(zero, 1.0, t)))


def _in_accumulation_dtype(function: Callable[..., Tensor], **tensors: Tensor) -> Tensor:
    check_floating(**tensors)
    check_same_shape(**tensors)
    values = list(tensors.values())
    dtype = values[0].dtype if len(values) == 1 else torch.promote_types(*(x.dtype for x in values))
    work = accumulation_dtype(dtype)
    return function(*(x.to(work) for x in values)).to(dtype)


def check_divergence(divergence: FDivergence) -> None:
    """Require an ``FDivergence``."""
    if not isinstance(divergence, FDivergence):
        raise TypeError(f"divergence must be an FDivergence, got {type(divergence).__name__}")


def _check_dim(values: Tensor, dim: int) -> None:
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an integer, got {type(dim).__name__}")
    if not -values.dim() <= dim < values.dim():
        raise ValueError(f"dim must be a dimension of p_logprobs {list(values.shape)}, got {dim}")
    if values.shape[dim] == 0:
        raise ValueError(
            f"p_logprobs must not be empty along dim {dim}, got shape {list(values.shape)}"
        )


KL = FDivergence("kl", "reverse_kl", g.kl_interior, g.KL_GENERATOR, g.REVERSE_KL_GENERATOR, 1.0)
"""``KL(p || q)``, ``f(t) = t log t``. Papers where ``p`` is the policy call it reverse KL."""

REVERSE_KL = KL.reversed()
"""``KL(q || p)``, ``f(t) = -log t``. Papers where ``p`` is the policy call it forward KL."""

JENSEN_SHANNON = replace(
    skew_jensen_shannon(0.5), name="jensen_shannon", dual_name="jensen_shannon"
)
"""``KL(p || m)/2 + KL(q || m)/2`` with ``m = (p + q)/2``; at most ``log 2``."""

JENSEN_SHANNON_DOUBLE = _affine(JENSEN_SHANNON, ("jensen_shannon_double",) * 2, scale=2.0)
"""Twice the Jensen-Shannon divergence: the form of f-DPG, f-DPO and f-distill."""

TOTAL_VARIATION = FDivergence(
    "total_variation",
    "total_variation",
    g.total_variation_interior,
    g.TOTAL_VARIATION_GENERATOR,
    g.TOTAL_VARIATION_GENERATOR,
)
"""``sum |p - q| / 2``, ``f(t) = |t - 1| / 2``; at most 1. Its derivative at ``t = 1`` is 0."""

PEARSON_CHI2 = replace(
    _affine(alpha_divergence(2.0), ("pearson_chi2", "neyman_chi2"), scale=2.0),
    interior=g.pearson_interior,
)
"""``sum (p - q)^2 / q``, ``f(t) = (t - 1)^2``."""

NEYMAN_CHI2 = PEARSON_CHI2.reversed()
"""``sum (p - q)^2 / p``, ``f(t) = (t - 1)^2 / t``."""

SQUARED_HELLINGER = replace(
    _affine(alpha_divergence(0.5), ("squared_hellinger",) * 2, scale=0.5),
    interior=g.hellinger_interior,
)
"""``sum (sqrt p - sqrt q)^2``, ``f(t) = (sqrt t - 1)^2``; at most 2."""

JEFFREYS = FDivergence(
    "jeffreys", "jeffreys", g.jeffreys_interior, g.JEFFREYS_GENERATOR, g.JEFFREYS_GENERATOR
)
"""``KL(p || q) + KL(q || p)``, ``f(t) = (t - 1) log t``."""

SOFTENED_REVERSE_KL = FDivergence(
    "softened_reverse_kl",
    "softened_kl",
    g.softened_reverse_kl_interior,
    g.SOFTENED_REVERSE_KL_GENERATOR,
    g.SOFTENED_REVERSE_KL_PERSPECTIVE,
    -1.0,
)
"""``REVERSE_KL`` minus ``JENSEN_SHANNON_DOUBLE``: ``f(t) = (t + 1) log((t + 1)/(2t))``."""
