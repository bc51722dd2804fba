r"""Bayesian mixtures: exact learners, their regret, and the weight that bounds it.

A mixture :math:`Q(x^n) = \sum_\theta w(\theta) P_\theta(x^n)` pays in log-loss, beyond the truth,
at most minus the log of the prior mass near the truth, however many models there are:

.. math::
    R_o = \tfrac1n D(P_0^n \| Q)
        \le -\tfrac1n \log \sum_\theta w(\theta) e^{-n d(\theta)}
        \le \varepsilon + \tfrac1n \log \frac{1}{W(\varepsilon)}, \qquad
    W(\varepsilon) = w\{\theta : d(\theta) \le \varepsilon\}

with :math:`d(\theta) = D(P_0 \| P_\theta)`, truth first, for every :math:`\varepsilon`. Everything
is in nats and in log space. The truth need not be one of the models.

Source: Feder, Urbanke, Fogel (2025), The Universality Lens, arXiv:2506.07661; the bounds are
re-derived.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from steelyard._checks import (
    check_count,
    check_floating,
    check_integer_dtype,
    check_not_empty,
    check_same_shape,
    check_shape,
)
from steelyard.estimation._numbers import Number, as_wide, check_law, narrow_dtype, widen

__all__ = [
    "BayesianMixture",
    "ball_bound",
    "batch_regret",
    "hypothesis_weight",
    "online_regret",
    "soft_bound",
]

# Sequences of n symbols are summed by their counts; this many counts is where we refuse.
_MAX_TYPES = 5_000_000
_CHUNK_ENTRIES = 2**21


class BayesianMixture(nn.Module):
    r"""A mixture learner over finitely many laws: predict, observe, predict.

    .. math::
        w(\theta \mid x^n) \propto w(\theta) P_\theta(x^n), \qquad
        Q(x \mid x^n) = \sum_\theta w(\theta \mid x^n) P_\theta(x)

    A model that gives a symbol probability 0 leaves the posterior when the symbol comes, and the
    mixture goes on. The state is in buffers (``state_dict`` saves it); gradients are not tracked.

    Args:
        models: one law over ``S`` symbols a row, shape ``[M, S]``.
        prior: probabilities of the models, shape ``[M]``.

    Raises:
        TypeError: not floating point.
        ValueError: wrong shapes, empty, negative, or not summing to 1.

    Example:
        A fair and a two-headed coin. One tail settles it; the losses add up to
        ``-log Q(1, 1, 0) = -log(1/2 * 1/8)``:

        >>> import torch
        >>> mixture = BayesianMixture(torch.tensor([[0.5, 0.5], [0.0, 1.0]]), torch.ones(2) / 2)
        >>> loss = mixture.update(torch.tensor([1, 1]))
        >>> mixture.posterior, mixture.predict()
        (tensor([0.2000, 0.8000]), tensor([0.1000, 0.9000]))
        >>> loss + mixture.update(torch.tensor([0]))
        tensor(2.7726)
        >>> mixture.posterior
        tensor([1., 0.])

    Source: arXiv:2506.07661, learners; :math:`Q` in log space.
    """

    _log_models: Tensor
    _log_weights: Tensor

    def __init__(self, models: Tensor, prior: Tensor) -> None:
        _check_class(models, prior)
        super().__init__()
        self._dtype = narrow_dtype(models, prior)
        self.register_buffer("_log_models", widen(models.detach()).log())
        # log w(theta) P_theta(x^n), normalised after each update so that nothing drifts away
        log_prior = widen(prior.detach()).log()
        self.register_buffer("_log_weights", log_prior - log_prior.logsumexp(0))

    @torch.no_grad()
    def update(self, symbols: Tensor) -> Tensor:
        """Observe symbols and return their loss under the mixture, ``-log Q(symbols | past)``.

        Args:
            symbols: integers in ``[0, S)``, shape ``[n]``, in any order (only counts matter);
                ``n = 0`` is allowed and costs nothing.

        Returns:
            0-d tensor in nats. Infinite if no model with posterior mass allows the symbols; the
            posterior is then 0/0 and reads NaN from there on.

        Raises:
            TypeError: ``symbols`` is not integer.
            ValueError: ``symbols`` is not 1-D or has a value outside the alphabet.
        """
        counts = self._counts(symbols)
        joint = self._log_weights + _log_likelihood(counts.unsqueeze(0), self._log_models)[0]
        log_probability = joint.logsumexp(0)
        self._log_weights.copy_(joint - log_probability)
        return (-log_probability).to(self._dtype)

    @torch.no_grad()
    def predict(self) -> Tensor:
        """Return the law of the next symbol, shape ``[S]``."""
        return (
            (self._log_weights.unsqueeze(1) + self._log_models).logsumexp(0).exp().to(self._dtype)
        )

    @property
    def posterior(self) -> Tensor:
        """Probabilities of the models given what was observed, shape ``[M]``."""
        return self._log_weights.exp().to(self._dtype)

    def _counts(self, symbols: Tensor) -> Tensor:
        check_integer_dtype(symbols=symbols)
        check_shape("symbols", symbols, (None,))
        size = self._log_models.shape[1]
        outside = symbols[(symbols < 0) | (symbols >= size)]
        if outside.numel():
            raise ValueError(f"symbols must be in [0, {size}), got {outside[0].item()}")
        return torch.bincount(symbols.long(), minlength=size).to(self._log_models.dtype)


def online_regret(models: Tensor, prior: Tensor, truth: Tensor, n: int) -> Tensor:
    r"""Expected excess log-loss of the mixture per symbol, on ``n`` symbols in a row.

    .. math:: R_o = \frac1n D(P_0^n \| Q) = \frac1n \sum_{t=1}^n R_b(t)

    Exact for independent symbols: sequences are summed by their counts, of which there are
    :math:`\binom{n + S - 1}{S - 1}`; symbols the truth never shows are left out first. Nothing
    is sampled.

    Args:
        models: laws over ``S`` symbols, one a row, ``[M, S]``.
        prior: their probabilities, ``[M]``.
        truth: law of the data, ``[S]``; may or may not be a row of ``models``.
        n: number of symbols, >= 1.

    Returns:
        0-d tensor in nats per symbol, >= 0; infinite if some sequence the truth can show has
        probability 0 under the mixture. Differentiable in positive models and priors.

    Raises:
        TypeError: not floating point.
        ValueError: wrong shapes, not laws, ``n < 1``, or more than five million counts.

    Example:
        Copies of a model cost nothing; only the mass of each behaviour matters:

        >>> import torch
        >>> coins = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
        >>> few = online_regret(coins, torch.ones(2) / 2, coins[0], n=20)
        >>> many = online_regret(coins.repeat(500, 1), torch.ones(1000) / 1000, coins[0], n=20)
        >>> few, many
        (tensor(0.0322), tensor(0.0322))

    Source: arXiv:2506.07661, online regret.
    """
    log_models, log_prior, log_truth = _known_symbols(models, prior, truth, n)
    total = log_prior.new_zeros(())
    for counts in _count_chunks(n, log_truth, len(log_prior)):
        own = (counts @ log_truth.unsqueeze(1)).squeeze(1)
        mixture = (log_prior + _log_likelihood(counts, log_models)).logsumexp(1)
        total = total + _expectation(_log_multinomial(counts) + own, own - mixture)
    return (total / n).to(narrow_dtype(models, prior, truth))


def batch_regret(models: Tensor, prior: Tensor, truth: Tensor, n: int) -> Tensor:
    r"""Expected excess log-loss of the mixture on each symbol, given those before it.

    .. math::
        R_b(t) = \mathbb{E}_{X^{t-1}} D\big(P_0 \,\|\, Q(\cdot \mid X^{t-1})\big),
        \qquad t = 1..n

    Exact, as in :func:`online_regret`. Averaged over the prior it never rises with ``t``; for one
    truth it can.

    Args:
        models: laws over ``S`` symbols, one a row, ``[M, S]``.
        prior: their probabilities, ``[M]``.
        truth: law of the data, ``[S]``.
        n: number of symbols, >= 1.

    Returns:
        ``[n]`` in nats, each >= 0; infinite from where a sequence of the truth becomes impossible.

    Raises:
        TypeError: not floating point.
        ValueError: wrong shapes, not laws, ``n < 1``, or more than five million counts.

    Example:
        The chain rule: what is paid symbol by symbol is what is paid for the sequence.

        >>> import torch
        >>> models, prior = torch.eye(3) * 0.7 + 0.1, torch.ones(3) / 3
        >>> truth = torch.tensor([0.5, 0.3, 0.2])  # none of the models
        >>> batch_regret(models, prior, truth, n=4)
        tensor([0.0690, 0.2269, 0.2191, 0.2477])
        >>> online_regret(models, prior, truth, n=4)
        tensor(0.1906)

    Source: arXiv:2506.07661, batch regret.
    """
    log_models, log_prior, log_truth = _known_symbols(models, prior, truth, n)
    regrets = []
    for seen in range(n):
        total = log_prior.new_zeros(())
        for counts in _count_chunks(seen, log_truth, len(log_prior)):
            own = (counts @ log_truth.unsqueeze(1)).squeeze(1)
            joint = log_prior + _log_likelihood(counts, log_models)
            norm = joint.logsumexp(1, keepdim=True)
            # log Q(x | counts) for each next symbol: a sum over models, in log space
            longer = torch.stack([(joint + column).logsumexp(1) for column in log_models.T], 1)
            excess = (log_truth.exp() * (log_truth - (longer - norm))).sum(1)
            impossible = torch.isinf(norm.squeeze(1))
            excess = torch.where(impossible, torch.inf, excess)
            total = total + _expectation(_log_multinomial(counts) + own, excess)
        regrets.append(total)
    return torch.stack(regrets).to(narrow_dtype(models, prior, truth))


def soft_bound(kls: Tensor, prior: Tensor, n: int) -> Tensor:
    r"""Bound on the regret per symbol by the whole prior: the tighter one.

    .. math::
        -\frac1n \log \sum_\theta w(\theta) e^{-n d(\theta)}
            = \inf_q \Big\{ \mathbb{E}_q d + \tfrac1n D(q \| w) \Big\}

    Args:
        kls: ``KL(truth || model)`` per symbol of each model, ``[M]``, may be infinite.
        prior: probabilities of the models, ``[M]``.
        n: number of symbols, >= 1.

    Returns:
        0-d tensor in nats per symbol, at least the online regret and at most :func:`ball_bound`
        at every radius. For a truth outside the class it bounds the divergence from the truth.

    Raises:
        TypeError: not floating point.
        ValueError: wrong shapes, ``prior`` is no law, or ``n < 1``.

    Example:
        A thousand models, of which ten are right: the price is ``log(100) / n``.

        >>> import torch
        >>> kls = torch.full((1000,), torch.inf)
        >>> kls[:10] = 0
        >>> soft_bound(kls, torch.ones(1000) / 1000, n=50) * 50
        tensor(4.6052)

    Source: arXiv:2506.07661, weight theorem (soft form derived).
    """
    _check_bound(kls, prior)
    check_count("n", n)
    evidence = (widen(prior).log() - n * widen(kls)).logsumexp(0)
    return (-evidence / n).to(narrow_dtype(kls, prior))


def ball_bound(kls: Tensor, prior: Tensor, epsilon: Number, n: int) -> Tensor:
    r"""Bound on the regret per symbol by the weight of a ball around the truth.

    .. math:: \varepsilon + \frac1n \log \frac{1}{W(\varepsilon)}

    Args:
        kls: ``KL(truth || model)`` per symbol of each model, ``[M]``, may be infinite.
        prior: probabilities of the models, ``[M]``.
        epsilon: radius in nats, >= 0; a float, or a tensor of any shape to try many.
        n: number of symbols, >= 1.

    Returns:
        Shape of ``epsilon``, nats per symbol; infinite where the ball is empty.

    Raises:
        TypeError: not floating point.
        ValueError: wrong shapes, ``prior`` is no law, negative ``epsilon`` or ``n < 1``.

    Example:
        A wider ball costs its radius and saves on its weight:

        >>> import torch
        >>> kls, prior = torch.tensor([0.0, 0.1, 1.0]), torch.tensor([0.01, 0.49, 0.5])
        >>> ball_bound(kls, prior, torch.tensor([0.0, 0.1, 1.0]), n=10)
        tensor([0.4605, 0.1693, 1.0000])
        >>> soft_bound(kls, prior, n=10)
        tensor(0.1659)

    Source: arXiv:2506.07661, weight theorem.
    """
    _check_bound(kls, prior)
    check_count("n", n)
    (radius,) = as_wide(epsilon=epsilon)
    weight = hypothesis_weight(widen(kls), widen(prior), radius)
    return (radius - weight.log() / n).to(narrow_dtype(kls, prior))


def hypothesis_weight(kls: Tensor, prior: Tensor, epsilon: Number) -> Tensor:
    r"""Prior mass of the models within ``epsilon`` of the truth, the ball closed.

    .. math:: W(\varepsilon) = w\{\theta : D(P_0 \| P_\theta) \le \varepsilon\}

    Args:
        kls: ``KL(truth || model)``, truth first, ``[M]``; the reverse divergence is another ball.
        prior: probabilities of the models, ``[M]``.
        epsilon: radius in nats, >= 0; a float, or a tensor of any shape.

    Returns:
        Shape of ``epsilon``, in [0, 1], non-decreasing in it. A NaN in ``kls`` gives NaN.

    Raises:
        TypeError: not floating point.
        ValueError: wrong shapes, ``prior`` is no law, or negative ``epsilon``.

    Example:
        >>> import torch
        >>> kls = torch.tensor([0.0, 0.0, 0.2, torch.inf])
        >>> hypothesis_weight(kls, torch.full((4,), 0.25), torch.tensor([0.0, 0.2, torch.inf]))
        tensor([0.5000, 0.7500, 1.0000])

    Source: arXiv:2506.07661, weight.
    """
    _check_bound(kls, prior)
    (radius,) = as_wide(epsilon=epsilon)
    if bool((radius < 0).any()) or bool(radius.isnan().any()):
        raise ValueError(f"epsilon must be >= 0, got {radius.min().item()}")
    inside = widen(kls) <= radius.unsqueeze(-1)
    counted = torch.where(inside, widen(prior), 0.0)
    counted = torch.where(widen(kls).isnan(), torch.nan, counted)
    return counted.sum(-1).to(narrow_dtype(kls, prior))


def _check_bound(kls: Tensor, prior: Tensor) -> None:
    check_floating(kls=kls, prior=prior)
    check_shape("kls", kls, (None,))
    check_not_empty("kls", kls)
    check_same_shape(kls=kls, prior=prior)
    check_law("prior", prior)


def _check_class(models: Tensor, prior: Tensor) -> None:
    check_floating(models=models, prior=prior)
    check_shape("models", models, (None, None))
    check_not_empty("models", models)
    check_shape("prior", prior, (models.shape[0],))
    check_law("models", models)
    check_law("prior", prior)


def _known_symbols(
    models: Tensor, prior: Tensor, truth: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    # Logarithms, restricted to symbols the truth shows and models of positive mass.
    _check_class(models, prior)
    check_floating(truth=truth)
    check_shape("truth", truth, (models.shape[1],))
    check_law("truth", truth)
    check_count("n", n)
    shown, kept = truth > 0, prior > 0
    log_models = widen(models[kept][:, shown]).log()
    return log_models, widen(prior[kept]).log(), widen(truth[shown]).log()


def _log_likelihood(counts: Tensor, log_models: Tensor) -> Tensor:
    """Log-likelihoods ``[C, M]`` of counts ``[C, S]``, with ``0 * -inf = 0``."""
    impossible = torch.isinf(log_models)
    likelihood = counts @ log_models.masked_fill(impossible, 0.0).T
    excluded = counts @ impossible.to(counts.dtype).T > 0
    return likelihood.masked_fill(excluded, -torch.inf)


def _log_multinomial(counts: Tensor) -> Tensor:
    return torch.lgamma(counts.sum(1) + 1) - torch.lgamma(counts + 1).sum(1)


def _expectation(log_probs: Tensor, values: Tensor) -> Tensor:
    # A probability that underflows must not hide an infinite value.
    weighted = log_probs.exp() * values
    return torch.where(torch.isinf(values), torch.inf, weighted).sum()


def _count_chunks(n: int, log_truth: Tensor, models: int) -> Iterator[Tensor]:
    """Yield every way to split ``n`` among the symbols as counts ``[C, S]``, a chunk at a time."""
    symbols = len(log_truth)
    types = math.comb(n + symbols - 1, symbols - 1)
    if types > _MAX_TYPES:
        raise ValueError(
            f"n = {n} symbols of {symbols} kinds have {types:.2g} counts, at most {_MAX_TYPES:.2g} "
            "are summed; sample sequences through BayesianMixture.update instead"
        )
    left = torch.tensor([n], device=log_truth.device)
    columns: list[Tensor] = []
    for _ in range(symbols - 1):
        parents = torch.arange(len(left), device=left.device).repeat_interleave(left + 1)
        starts = (left + 1).cumsum(0) - (left + 1)
        taken = torch.arange(len(parents), device=left.device) - starts[parents]
        columns = [*(column[parents] for column in columns), taken]
        left = left[parents] - taken
    table = torch.stack([*columns, left], 1)
    for chunk in torch.split(table, max(1, _CHUNK_ENTRIES // models)):
        yield chunk.to(log_truth.dtype)
