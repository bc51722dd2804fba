r"""The Cauchy-Schwarz information bottleneck for regression (CS-IB).

.. math::
    \min_{\text{encoder, decoder}} \; D_{CS}\big( p(y \mid x);\, q(\hat y \mid x) \big)
        + \beta\, I_{CS}(x; t), \qquad t = \text{encoder}(x), \quad \hat y = \text{decoder}(t)

Predict like the data, and forget the rest of the input. Both terms are kernel statistics of the
batch: no law of the decoder is assumed and no bound is optimised. Memory is ``O(N * block)``; the
terms depend on the size of the batch, so compare values at one size only.

Source: Yu, Yu, Lokse, Jenssen, Principe (2024), Cauchy-Schwarz Divergence Information Bottleneck
for Regression, arXiv:2404.17951.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from steelyard._checks import (
    check_floating,
    check_mask,
    check_not_empty,
    check_range,
    check_shape,
    check_tensor,
)
from steelyard.divergences import (
    cauchy_schwarz_mutual_information,
    conditional_cauchy_schwarz,
    median_bandwidth,
)

__all__ = ["BottleneckTerms", "CauchySchwarzBottleneck", "cs_ib_loss"]

Width = float | Tensor | None
Denominator = Literal["text", "reference"]


class BottleneckTerms(NamedTuple):
    """The objective and its two parts, 0-d: ``loss = divergence + beta * information``."""

    loss: Tensor
    divergence: Tensor
    information: Tensor


def cs_ib_loss(
    x: Tensor,
    y: Tensor,
    y_hat: Tensor,
    t: Tensor,
    *,
    beta: float,
    bandwidth_x: Width = 1.0,
    bandwidth_y: Width = 1.0,
    bandwidth_t: Width = 1.0,
    normalized: bool = False,
    denominator: Denominator = "text",
    mask: Tensor | None = None,
    block_size: int | None = None,
) -> Tensor:
    r"""Match the conditional law of the targets, and compress the representation.

    .. math:: L = D_{CS}\big( p(y \mid x);\, q(\hat y \mid x) \big) + \beta\, I_{CS}(x; t)

    with the estimators of :func:`steelyard.divergences.conditional_cauchy_schwarz` and
    :func:`steelyard.divergences.cauchy_schwarz_mutual_information`, in nats. A wild label has a
    bounded pull, unlike under the squared error. The value can be slightly negative.

    Args:
        x: inputs, ``[N, D]``, standardised; a gradient reaches them only if they require one.
        y: targets, ``[N, K]``, standardised; detached.
        y_hat: predictions, ``[N, K]``.
        t: representation, ``[N, E]``.
        beta: weight of the compression, >= 0.
        bandwidth_x: of the kernel of ``x``, > 0; ``None`` = the median distance in the batch,
            detached, which makes the loss look at neighbourhoods rather than single items. At 1
            (the paper's) in ten or more dimensions the divergence is the correntropy loss of
            single items.
        bandwidth_y: of the kernel of the targets, likewise. Far-off predictions are pulled by a
            softmax of distances; start from a fit by squared error or anneal from wide to narrow.
        bandwidth_t: of the kernel of ``t``, likewise.
        normalized: divide the information by ``sqrt(I(x;x) I(t;t))``, as the released code does.
        denominator: ``"text"``, or ``"reference"`` = that of the released code.
        mask: ``[N]``, true = the item counts; the estimates are over kept items.
        block_size: rows a block of the kernels; ``None`` = about half a million pairs.

    Returns:
        0-d tensor, dtype of the inputs; 0 with a zero gradient if nothing is kept.

    Raises:
        TypeError: not floating point.
        ValueError: wrong shapes (1-D targets are refused: write ``y.unsqueeze(1)``), empty, or a
            number out of range.

    Example:
        Of two perfect predictors the one that forgets an input's sign costs less:

        >>> x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
        >>> y = x.abs()
        >>> for t in (x, x.abs()):
        ...     print(f"{cs_ib_loss(x, y, y, t, beta=1.0):.3f}")
        0.659
        0.063

    Source: arXiv:2404.17951, objective with Propositions 1 and 2.
    """
    check_range("beta", beta, at_least=0.0)
    settings = (bandwidth_x, bandwidth_y, bandwidth_t, normalized, denominator, block_size)
    return _terms(x, y, y_hat, t, mask, beta, *settings, information=beta > 0).loss


class CauchySchwarzBottleneck(nn.Module):
    r"""An encoder and a decoder trained by the Cauchy-Schwarz bottleneck.

    .. math:: t = \text{encoder}(x) + \text{noise} \cdot \xi, \qquad \hat y = \text{decoder}(t)

    with :math:`\xi \sim \mathcal{N}(0, I)` in training mode only. ``forward`` predicts, ``loss``
    gives the objective with its parts.

    Args:
        encoder: maps inputs ``[N, D]`` to ``[N, E]``.
        decoder: maps ``[N, E]`` to predictions ``[N, K]``.
        beta: weight of the compression, >= 0; the paper searches 1e-4 to 1.
        bandwidth_x: see :func:`cs_ib_loss`; ``None`` = median distance of each batch.
        bandwidth_y: likewise.
        bandwidth_t: likewise.
        noise: standard deviation added to the representation while training, >= 0; 0 = a
            deterministic encoder, which is what the released training loop runs.
        normalized: normalise the information, as the released code does.
        denominator: ``"text"`` or ``"reference"``.
        block_size: rows a block of the kernels; ``None`` = about half a million pairs.
        generator: random numbers of the noise, on the device of the representation.

    Raises:
        ValueError: a number out of range.

    Example:
        Compression pulls the representation together, here by its gradient:

        >>> torch.manual_seed(0)
        <torch._C.Generator object at ...>
        >>> model = CauchySchwarzBottleneck(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), beta=1.0)
        >>> x = torch.linspace(-1, 1, 9).unsqueeze(1)
        >>> terms = model.loss(x, x)
        >>> terms.information.backward()
        >>> scale = model.encoder.weight
        >>> bool((scale * scale.grad > 0).all())  # descent shrinks the scale
        True
        >>> model(x).shape
        torch.Size([9, 1])

    Source: arXiv:2404.17951.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        beta: float,
        *,
        bandwidth_x: Width = 1.0,
        bandwidth_y: Width = 1.0,
        bandwidth_t: Width = 1.0,
        noise: float = 0.0,
        normalized: bool = False,
        denominator: Denominator = "text",
        block_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_range("beta", beta, at_least=0.0)
        check_range("noise", noise, at_least=0.0)
        widths = {
            "bandwidth_x": bandwidth_x,
            "bandwidth_y": bandwidth_y,
            "bandwidth_t": bandwidth_t,
        }
        for name, width in widths.items():
            if width is not None and not isinstance(width, Tensor):
                check_range(name, width, above=0.0)
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.beta, self.noise, self.generator = beta, noise, generator
        self.bandwidth_x, self.bandwidth_y, self.bandwidth_t = bandwidth_x, bandwidth_y, bandwidth_t
        self.normalized, self.denominator = normalized, denominator
        self.block_size = block_size

    def encode(self, x: Tensor) -> Tensor:
        """Return the representation ``[N, E]``, noisy in training mode if ``noise > 0``."""
        check_tensor("x", x)
        t: Tensor = self.encoder(x)
        if not self.training or self.noise == 0:
            return t
        shape, dtype, device = t.shape, t.dtype, t.device
        draw = torch.randn(shape, generator=self.generator, dtype=dtype, device=device)
        return t + self.noise * draw

    def forward(self, x: Tensor) -> Tensor:
        """Predict ``[N, K]``."""
        y_hat: Tensor = self.decoder(self.encode(x))
        return y_hat

    def loss(self, x: Tensor, y: Tensor, *, mask: Tensor | None = None) -> BottleneckTerms:
        """Return the objective on a batch, its divergence and its information (0-d, nats).

        Args:
            x: inputs, ``[N, D]``.
            y: targets, ``[N, K]``; detached.
            mask: ``[N]``, true = the item counts.
        """
        t = self.encode(x)
        widths = (self.bandwidth_x, self.bandwidth_y, self.bandwidth_t)
        settings = (*widths, self.normalized, self.denominator, self.block_size)
        # kernels work on rows: flatten images and the like
        y_hat = self.decoder(t)
        check_shape("y", y, tuple(y_hat.shape))
        return _terms(x.flatten(1), y, y_hat, t, mask, self.beta, *settings)


def _terms(
    x: Tensor,
    y: Tensor,
    y_hat: Tensor,
    t: Tensor,
    mask: Tensor | None,
    beta: float,
    bandwidth_x: Width,
    bandwidth_y: Width,
    bandwidth_t: Width,
    normalized: bool,
    denominator: Denominator,
    block_size: int | None,
    *,
    information: bool = True,
) -> BottleneckTerms:
    check_floating(x=x, y=y, y_hat=y_hat, t=t)
    check_shape("x", x, (None, None))
    check_shape("y", y, (x.shape[0], None))
    check_shape("y_hat", y_hat, tuple(y.shape))
    check_shape("t", t, (x.shape[0], None))
    for name, tensor in (("x", x), ("y", y), ("t", t)):
        check_not_empty(name, tensor)
    y = y.detach()
    if mask is not None:
        check_mask(mask, x[:, 0])
        kept = mask != 0
        x, y, y_hat, t = x[kept], y[kept], y_hat[kept], t[kept]
        if len(x) == 0:
            nothing = y_hat.sum() + t.sum()  # of no rows: 0, with a zero gradient
            return BottleneckTerms(nothing, nothing.detach(), nothing.detach())
    width_x = median_bandwidth(x) if bandwidth_x is None else bandwidth_x
    width_y = median_bandwidth(y) if bandwidth_y is None else bandwidth_y
    width_t = median_bandwidth(t) if bandwidth_t is None else bandwidth_t
    divergence = conditional_cauchy_schwarz(
        x, y, y_hat, width_x, width_y, denominator=denominator, block_size=block_size
    )
    if not information:
        return BottleneckTerms(divergence, divergence, torch.zeros_like(divergence))
    shared = cauchy_schwarz_mutual_information(
        x, t, width_x, width_t, normalized=normalized, block_size=block_size
    )
    return BottleneckTerms(divergence + beta * shared, divergence, shared)
