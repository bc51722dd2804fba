r"""Contrastive learning with several heads and a temperature for each pair.

Each projection head judges a pair in its own way, and a small network gives each pair its own
temperature. A penalty, the normalising constant of a Gaussian whose variance is the temperature,
keeps positive temperatures from running to 0; bounds keep negative ones from both ends.

Source: Wang et al. (2024), Adaptive Multi-head Contrastive Learning, ECCV, arXiv:2310.05615.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from steelyard._checks import (
    check_choice,
    check_count,
    check_floating,
    check_not_empty,
    check_range,
    check_same_shape,
    check_shape,
)
from steelyard._reduce import Reduction, reduce_masked, widen
from steelyard.metric_learning._unit_rows import cosines, products, unit_rows

__all__ = [
    "MultiHeadContrastive",
    "PairTemperature",
    "adaptive_temperature_loss",
    "bounded_temperature",
    "temperature_penalty",
]

Mode = Literal["hard", "soft"]


def temperature_penalty(temperature: Tensor, dim: int) -> Tensor:
    r"""Price of a temperature: what a Gaussian of that variance pays beside its similarity.

    .. math:: \Omega(\tau) = \tfrac{D}{2} \log \tau + \tfrac1\tau

    For unit vectors :math:`-\log N(z_+; z, \tau I) = -s/\tau + \Omega(\tau)` up to a constant. The
    minimum is at :math:`\tau = 2/D`; convex below :math:`4/D`.

    Args:
        temperature: > 0, any shape.
        dim: ``D``, dimension of the projections, >= 1.

    Returns:
        The shape and dtype of ``temperature``. With it the best temperature of a positive pair of
        cosine ``s`` is ``2 (1 - s) / D``.

    Raises:
        ValueError: ``dim < 1``.
        TypeError: ``temperature`` not a floating-point tensor.

    Example:
        >>> import torch
        >>> temperature_penalty(torch.tensor([0.25, 0.5, 1.0]), 4)  # least at 2/4
        tensor([1.2274, 0.6137, 1.0000])

    Source: Wang et al. (2024), the regulariser of Table 2, arXiv:2310.05615.
    """
    check_floating(temperature=temperature)
    check_count("dim", dim)
    wide = widen(temperature)
    return (0.5 * dim * wide.log() + 1 / wide).to(temperature.dtype)


def bounded_temperature(raw: Tensor, *, low: float = 0.05, high: float = 1.0) -> Tensor:
    r"""Map any number into the bounds of a temperature.

    .. math:: \tau = \mathrm{low} + (\mathrm{high} - \mathrm{low})\, \sigma(a)

    Args:
        raw: output of a network, any shape.
        low: > 0. The published code has 1e-5, which lets a single pair explode.
        high: > ``low``. The published code has 2.

    Returns:
        The shape and dtype of ``raw``, inside the bounds up to the rounding of the dtype.

    Raises:
        ValueError: ``low <= 0`` or ``high <= low``.
        TypeError: ``raw`` not a floating-point tensor.

    Example:
        >>> import torch
        >>> bounded_temperature(torch.tensor([-1e4, 0.0, 1e4]))
        tensor([0.0500, 0.5250, 1.0000])

    Source: Wang et al. (2024), Sec. 3, arXiv:2310.05615; bounds from ours, see docs/errata.
    """
    check_floating(raw=raw)
    _check_bounds(low, high)
    low, high = float(low), float(high)
    wide = widen(raw)
    width = high - low
    # from the nearer end: exact at both, never outside
    bounded = torch.where(wide < 0, low + width * wide.sigmoid(), high - width * (-wide).sigmoid())
    return bounded.to(raw.dtype)


class PairTemperature(nn.Module):
    r"""Give each pair of embeddings its own temperature.

    .. math:: \tau = \mathrm{bounded}(w^\top \mathrm{relu}(W [z_i, z_j] + b) + c)

    The order of the pair matters: the first is the anchor.

    Args:
        dim: ``D``, >= 1.
        hidden: units of the hidden layer, >= 1.
        low: lower bound, > 0.
        high: upper bound, > ``low``.
        detach_inputs: true keeps the network from moving embeddings to suit itself.

    Raises:
        ValueError: a setting out of range.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> temperature = PairTemperature(8, low=0.1, high=0.5)
        >>> tau = temperature(torch.randn(3, 5, 8), torch.randn(3, 5, 8))
        >>> tau.shape, bool(((tau > 0.1) & (tau < 0.5)).all())
        (torch.Size([3, 5]), True)

    Source: Wang et al. (2024), Sec. 3 (one network for all heads), arXiv:2310.05615.
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden: int = 128,
        low: float = 0.05,
        high: float = 1.0,
        detach_inputs: bool = False,
    ) -> None:
        super().__init__()
        check_count("dim", dim)
        check_count("hidden", hidden)
        _check_bounds(low, high)
        self.dim, self.low, self.high = dim, low, high
        self.detach_inputs = detach_inputs
        self.pair = nn.Linear(2 * dim, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        """Return the temperature of each pair, ``[..]``.

        Args:
            z_i: anchors, ``[.., D]``.
            z_j: the others, ``[.., D]``; leading shapes broadcast, so a table of all pairs needs
                no copies: the first layer is applied before they meet.
        """
        for name, z in (("z_i", z_i), ("z_j", z_j)):
            check_floating(**{name: z})
            if z.dim() == 0 or z.shape[-1] != self.dim:
                raise ValueError(f"{name} must have last size {self.dim}, got {list(z.shape)}")
        fits = all(1 in pair or pair[0] == pair[1] for pair in _facing(z_i, z_j))
        if not fits:
            raise ValueError(
                f"z_j must broadcast with z_i, {list(z_i.shape)}, got {list(z_j.shape)}"
            )
        if self.detach_inputs:
            z_i, z_j = z_i.detach(), z_j.detach()
        weight = self.pair.weight
        left, right = weight[:, : self.dim], weight[:, self.dim :]
        hidden = linear(z_i, left) + linear(z_j, right, self.pair.bias)
        raw = self.out(hidden.relu()).squeeze(-1)
        return bounded_temperature(raw, low=self.low, high=self.high)


def _facing(z_i: Tensor, z_j: Tensor) -> list[tuple[int, int]]:
    """Return the leading sizes of two tensors that meet when they are broadcast."""
    return list(zip(z_i.shape[-2::-1], z_j.shape[-2::-1], strict=False))


def adaptive_temperature_loss(
    anchor: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature_positive: Tensor,
    temperature_negative: Tensor,
    *,
    beta: float = 1.0,
    mode: Mode = "hard",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Raise the likelihood of the positive over the negatives, each at its own temperature.

    With cosines :math:`s`, in each of the ``C`` heads,

    .. math::
        \ell_\mathrm{hard} &= -\frac{s_+}{\tau_+} + \beta \Omega(\tau_+)
            + \frac{s_{n^*}}{\tau_{n^*}} - \beta \Omega(\tau_{n^*}), \qquad
            n^* = \arg\max_n s_n, \\
        \ell_\mathrm{soft} &= -\frac{s_+}{\tau_+} + \beta \Omega(\tau_+)
            + \log \sum_n \exp\Big( \frac{s_n}{\tau_n} - \beta \Omega(\tau_n) \Big)

    summed over the heads. At ``beta = 1`` the hard form is minus the log of the ratio of two
    Gaussian densities, with the temperature as variance. Put the positive among the negatives to
    have it in the denominator.

    Args:
        anchor: ``[C, B, D]``, normalised inside.
        positive: ``[C, B, D]``.
        negatives: ``[C, B, N, D]``, ``N >= 1``.
        temperature_positive: ``[C, B]``, > 0.
        temperature_negative: ``[C, B, N]``, > 0.
        beta: weight of the penalty, >= 0. Below 1 a positive with ``s > beta`` drives its
            temperature to the lower bound.
        mode: ``"hard"`` = one negative per anchor and head, no gradient through its choice;
            ``"soft"`` trains more smoothly.
        reduction: over the ``B`` anchors.

    Returns:
        0-d, or ``[B]`` for ``"none"``; dtype of ``anchor``. It may be negative, and is NaN for a
        temperature below 0, whose logarithm the penalty takes.

    Raises:
        ValueError: wrong shapes, empty input, or a setting out of range.
        TypeError: not floating point.

    Example:
        Constant temperatures and no penalty: the soft form is InfoNCE without its positive.

        >>> import torch
        >>> z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> anchor, positive, negatives = z[None, :1], z[None, 2:], z[None, None, 1:]
        >>> half = torch.full((1, 1, 2), 0.5)
        >>> adaptive_temperature_loss(
        ...     anchor, positive, negatives, half[..., 0], half, beta=0.0, mode="soft"
        ... )
        tensor(0.2176)
        >>> torch.tensor([0.0, 2**0.5]).logsumexp(0) - 2**0.5
        tensor(0.2176)

    Source: Wang et al. (2024), Eq. 2.1, arXiv:2310.05615; the soft form is ours.
    """
    named = {
        "anchor": anchor,
        "positive": positive,
        "negatives": negatives,
        "temperature_positive": temperature_positive,
        "temperature_negative": temperature_negative,
    }
    check_floating(**named)
    check_shape("anchor", anchor, (None, None, None))
    check_same_shape(anchor=anchor, positive=positive)
    heads, batch, dim = anchor.shape
    check_shape("negatives", negatives, (heads, batch, None, dim))
    check_not_empty("negatives", negatives)
    check_shape("temperature_positive", temperature_positive, (heads, batch))
    check_shape("temperature_negative", temperature_negative, tuple(negatives.shape[:-1]))
    check_range("beta", beta, at_least=0.0)
    check_choice("mode", mode, ("hard", "soft"))
    unit = unit_rows(anchor)
    similar = (unit * unit_rows(positive)).sum(-1)
    others = (unit[:, :, None] * unit_rows(negatives)).sum(-1)
    numerator = _log_density(similar, temperature_positive, dim, beta)
    if mode == "hard":
        hardest = others.detach().argmax(-1, keepdim=True)
        nearest = temperature_negative.gather(-1, hardest).squeeze(-1)
        denominator = _log_density(others.gather(-1, hardest).squeeze(-1), nearest, dim, beta)
    else:
        denominator = _log_density(others, temperature_negative, dim, beta).logsumexp(-1)
    loss = (denominator - numerator).sum(0)
    return reduce_masked(loss.to(anchor.dtype), None, reduction)


class MultiHeadContrastive(nn.Module):
    r"""Projection heads and pair temperatures on top of any encoder, as one loss.

    Each of the ``2B`` views is an anchor; its positive is the other view of its item and its
    negatives are the other ``2B - 2`` views. The loss is :func:`adaptive_temperature_loss`,
    averaged over the anchors. After training, keep the encoder and throw this away.

    Args:
        in_dim: features of the encoder, >= 1.
        hidden_dim: hidden units of each head, >= 1.
        out_dim: dimension ``D`` of the projections, >= 1.
        heads: ``C``, >= 1.
        beta: weight of the penalty, >= 0; the published code has 0.1.
        mode: ``"hard"`` (as published) or ``"soft"``, which makes temperatures for all pairs:
            memory ``O(C B^2 hidden)``.
        low: lower bound of the temperatures, > 0; the published code has 1e-5.
        high: upper bound, > ``low``; the published code has 2.

    Attributes:
        temperature: the :class:`PairTemperature` all heads share, called with anchor, other.

    Raises:
        ValueError: a setting out of range, and in ``forward`` wrong shapes or fewer than two items.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> objective = MultiHeadContrastive(16, 32, 8, heads=3)
        >>> features = torch.randn(4, 16)
        >>> projections = objective.project(features)
        >>> projections.shape, torch.allclose(projections.norm(dim=-1), torch.ones(3, 4))
        (torch.Size([3, 4, 8]), True)
        >>> objective(features, features + 0.1 * torch.randn(4, 16)).backward()

    Source: Wang et al. (2024), Eq. 2.1 and Fig. 2, arXiv:2310.05615.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int,
        out_dim: int,
        *,
        heads: int = 3,
        beta: float = 1.0,
        mode: Mode = "hard",
        low: float = 0.05,
        high: float = 1.0,
    ) -> None:
        super().__init__()
        sizes = {"in_dim": in_dim, "hidden_dim": hidden_dim, "out_dim": out_dim, "heads": heads}
        for name, size in sizes.items():
            check_count(name, size)
        check_range("beta", beta, at_least=0.0)
        check_choice("mode", mode, ("hard", "soft"))
        self.beta, self.mode = beta, mode
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, out_dim))
            for _ in range(heads)
        )
        self.temperature = PairTemperature(out_dim, low=low, high=high)

    def project(self, features: Tensor) -> Tensor:
        """Return the unit projections of ``[B, in_dim]`` features, ``[heads, B, out_dim]``."""
        check_floating(features=features)
        check_shape("features", features, (None, self.heads[0][0].in_features))  # type: ignore[index]
        projected = torch.stack([head(features) for head in self.heads])
        return unit_rows(projected).to(projected.dtype)

    def forward(self, features_a: Tensor, features_b: Tensor) -> Tensor:
        """Return the loss of two views, 0-d.

        Args:
            features_a: encoder output for the first views, ``[B, in_dim]``, ``B >= 2``.
            features_b: for the second views, ``[B, in_dim]``.
        """
        check_floating(features_a=features_a, features_b=features_b)
        check_same_shape(features_a=features_a, features_b=features_b)
        if features_a.dim() != 2 or len(features_a) < 2:
            shape = list(features_a.shape)
            raise ValueError(f"features_a must have shape [B >= 2, in_dim], got {shape}")
        views = self.project(torch.cat((features_a, features_b)))
        others = views.roll(len(features_a), 1)  # the other view of each
        wide = widen(views)
        dim = views.shape[-1]
        similar = cosines(views, others)
        numerator = _log_density(similar, self.temperature(views, others), dim, self.beta)
        denominator = self._against_negatives(views, products(wide, wide))
        return (denominator - numerator).sum(0).mean().to(features_a.dtype)

    def _against_negatives(self, views: Tensor, similarity: Tensor) -> Tensor:
        """Log-density of the hardest negative, or of all, ``[C, 2B]``."""
        count, dim = views.shape[1:]
        place = torch.arange(count, device=views.device)
        excluded = place[:, None] % (count // 2) == place % (count // 2)
        if self.mode == "hard":
            hardest = similarity.detach().masked_fill(excluded, -torch.inf).argmax(-1, keepdim=True)
            chosen = views.gather(1, hardest.expand(-1, -1, dim))
            tau = self.temperature(views, chosen)
            return _log_density(similarity.gather(-1, hardest).squeeze(-1), tau, dim, self.beta)
        tau = self.temperature(views[:, :, None], views[:, None])
        every = _log_density(similarity, tau, dim, self.beta)
        return every.masked_fill(excluded, -torch.inf).logsumexp(-1)


def _log_density(similarity: Tensor, temperature: Tensor, dim: int, beta: float) -> Tensor:
    tau = temperature.to(similarity.dtype)
    return similarity / tau - beta * temperature_penalty(tau, dim)


def _check_bounds(low: float, high: float) -> None:
    check_range("low", low, above=0.0)
    check_range("high", high)
    if not high > low:
        raise ValueError(f"high must be greater than low, {low}, got {high}")
