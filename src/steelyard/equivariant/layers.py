r"""Layers on functions of position and direction: convolutions, kernels, the residual block.

A feature is ``[P, O, C]``: points, directions, channels. The separable convolution sums over
neighbours at a fixed direction, then averages over directions at a fixed point, each channel on
its own; the residual block mixes channels.

Source: Bekkers et al. (2024), Fast, Expressive SE(n) Equivariant Networks through Weight-Sharing in
Position-Orientation Space, arXiv:2310.02970.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from steelyard._checks import (
    check_count,
    check_floating,
    check_not_empty,
    check_range,
    check_same_shape,
    check_shape,
)
from steelyard._reduce import accumulation_dtype
from steelyard.equivariant.attributes import check_edge_index, polynomial_features

__all__ = [
    "BundleConvolution",
    "Geometry",
    "KernelBasis",
    "PonitaBlock",
    "convnext_residual",
    "separable_convolution",
]

NORM_EPS = 1e-5


def separable_convolution(
    x: Tensor, spatial_kernel: Tensor, fiber_kernel: Tensor, edge_index: Tensor
) -> Tensor:
    r"""Convolve over neighbours, then over directions, each channel on its own.

    .. math::
        f'_i(o) = \frac1O \sum_{o'} k^{\mathrm{fib}}_{o' o} \sum_{j \to i}
            k^{\mathrm{sp}}_{ji}(o')\, f_j(o')

    The same as the full convolution whose kernel is the product
    :math:`k^{\mathrm{sp}}_{ji}(o')\, k^{\mathrm{fib}}_{o' o}`, at a cost of ``E O C + P O^2 C``
    in place of ``E O^2 C``. The sum over neighbours is a sum, not a mean; no self-loop is added.

    Args:
        x: ``[P, O, C]``.
        spatial_kernel: one value for each edge, direction and channel, ``[E, O, C]``.
        fiber_kernel: ``[O, O, C]``: from direction, to direction, channel.
        edge_index: integers in ``[0, P)``, ``[2, E]``, senders in row 0, receivers in row 1.

    Returns:
        ``[P, O, C]`` in the dtype of ``x``; half precision is summed in float32.

    Raises:
        ValueError: shapes that do not fit, an empty ``x``, or an edge out of range.
        TypeError: wrong dtypes.

    Example:
        Point 1 hears point 0 in the first direction; the fiber kernel hands that to the second:

        >>> import torch
        >>> x, edges = torch.tensor([[[4.0], [9.0]], [[0.0], [0.0]]]), torch.tensor([[0], [1]])
        >>> from_first_to_second = torch.tensor([[[0.0], [1.0]], [[0.0], [0.0]]])
        >>> separable_convolution(x, torch.ones(1, 2, 1), from_first_to_second, edges)[1, :, 0]
        tensor([0., 2.])

    Source: Bekkers et al. (2024), separable convolution, arXiv:2310.02970.
    """
    check_floating(x=x, spatial_kernel=spatial_kernel, fiber_kernel=fiber_kernel)
    check_shape("x", x, (None, None, None))
    check_not_empty("x", x)
    points, directions, channels = x.shape
    check_edge_index(edge_index, points)
    check_shape("spatial_kernel", spatial_kernel, (edge_index.shape[1], directions, channels))
    check_shape("fiber_kernel", fiber_kernel, (directions, directions, channels))
    summed = _sum_over_neighbours(x, spatial_kernel, edge_index)
    kernel = fiber_kernel.to(summed.dtype)
    return _average_over_directions(summed, kernel).to(x.dtype)


def _sum_over_neighbours(x: Tensor, kernel: Tensor, edge_index: Tensor) -> Tensor:
    """Sum ``kernel * sender``, ``[P, O, C]`` in at least float32."""
    send, receive = edge_index
    messages = (kernel * x[send]).to(accumulation_dtype(x.dtype))
    return messages.new_zeros(x.shape).index_add(0, receive, messages)


def _average_over_directions(x: Tensor, kernel: Tensor) -> Tensor:
    return torch.einsum("pfc,ftc->ptc", x, kernel) / x.shape[1]


def convnext_residual(
    conv_out: Tensor,
    block_in: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    layer_scale: Tensor | None = None,
) -> Tensor:
    r"""Mix channels of a convolution's output and add the block's input.

    .. math::
        y = f + \gamma \odot \left(W_2\, \mathrm{GELU}(W_1\, \mathrm{LN}(g) + b_1) + b_2\right)

    with ``g`` the convolution's output, ``f`` the block's input and LN over channels.

    Args:
        conv_out: ``[.., C]``.
        block_in: ``[.., C]``.
        w1: ``[W, C]``.
        b1: ``[W]``.
        w2: ``[C, W]``.
        b2: ``[C]``.
        norm_weight: ``[C]``; ``None`` = ones.
        norm_bias: ``[C]``; ``None`` = zeros.
        layer_scale: gamma, ``[C]``; ``None`` = ones. At 0 the block is the identity.

    Returns:
        ``[.., C]``.

    Raises:
        ValueError: shapes that do not fit. TypeError: not floating point.

    Example:
        >>> import torch
        >>> f, w = torch.tensor([[1.0, 2.0]]), torch.ones(2, 2)
        >>> convnext_residual(torch.randn(1, 2), f, w, w[0], w, w[0], layer_scale=torch.zeros(2))
        tensor([[1., 2.]])

    Source: Bekkers et al. (2024), arXiv:2310.02970, after Liu et al. (2022), A ConvNet for the
    2020s, arXiv:2201.03545.
    """
    check_floating(conv_out=conv_out, block_in=block_in, w1=w1, b1=b1, w2=w2, b2=b2)
    check_same_shape(conv_out=conv_out, block_in=block_in)
    if conv_out.dim() == 0:
        raise ValueError("conv_out must have shape [.., C], got []")
    channels = conv_out.shape[-1]
    check_shape("w1", w1, (None, channels))
    width = w1.shape[0]
    check_shape("b1", b1, (width,))
    check_shape("w2", w2, (channels, width))
    check_shape("b2", b2, (channels,))
    for name, tensor in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        _check_double(name, tensor, conv_out)
    optional = (
        ("norm_weight", norm_weight),
        ("norm_bias", norm_bias),
        ("layer_scale", layer_scale),
    )
    for name, vector in optional:
        if vector is not None:
            check_shape(name, vector, (channels,))
            _check_double(name, vector, conv_out)
    normed = functional.layer_norm(conv_out, (channels,), norm_weight, norm_bias, NORM_EPS)
    mixed = functional.linear(functional.gelu(functional.linear(normed, w1, b1)), w2, b2)
    return block_in + (mixed if layer_scale is None else layer_scale * mixed)


def _check_double(name: str, vector: Tensor, conv_out: Tensor) -> None:
    """Require float64 in both or neither: the one dtype that autocast does not convert."""
    if not vector.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {vector.dtype}")
    if (vector.dtype == torch.float64) != (conv_out.dtype == torch.float64):
        raise TypeError(
            f"{name} must have the dtype of conv_out, {conv_out.dtype}, got {vector.dtype}"
        )


class Geometry(NamedTuple):
    """What a convolution needs of the cloud; shared by all blocks.

    Elements are points with all their directions (``O`` of them), or single directions
    (``O = 1``, no fiber basis).
    """

    edge_index: Tensor
    """Pairs of elements, ``[2, E]``."""
    spatial: Tensor
    """Basis of the kernel at the sender's direction, ``[E, O, B]``."""
    fiber: Tensor | None
    """Basis of the kernel between directions, ``[O, O, B]`` (from, to)."""
    receiver: Tensor | None
    """Basis of the kernel at the receiver's direction, ``[E, O, B]``."""


def _check_bundle(x: Tensor, geometry: Geometry, hidden: int) -> None:
    check_floating(x=x)
    check_shape("x", x, (None, None, hidden))
    if not isinstance(geometry, Geometry):
        raise TypeError(f"geometry must be a Geometry, got {type(geometry).__name__}")


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        check_count(name, size)


class KernelBasis(nn.Module):
    """Functions of the invariants that the kernels of all layers are combined from.

    Args:
        attributes: number of invariants.
        hidden: width of the network.
        basis: number of functions.
        degree: of the polynomials of the invariants fed to the network.

    Example:
        >>> basis = KernelBasis(attributes=3, hidden=16, basis=8, degree=2)
        >>> basis(torch.zeros(5, 3)).shape
        torch.Size([5, 8])

    Source: Bekkers et al. (2024), arXiv:2310.02970.
    """

    def __init__(self, attributes: int, hidden: int, basis: int, degree: int) -> None:
        super().__init__()
        _check_sizes(attributes=attributes, hidden=hidden, basis=basis, degree=degree)
        features = sum(attributes**power for power in range(1, degree + 1))
        self.degree = degree
        self.first = nn.Linear(features, hidden)
        self.second = nn.Linear(hidden, basis)

    def forward(self, attributes: Tensor) -> Tensor:
        """Map ``[.., A]`` to ``[.., B]``."""
        check_floating(attributes=attributes)
        inner = functional.gelu(self.first(polynomial_features(attributes, self.degree)))
        return functional.gelu(self.second(inner))


class BundleConvolution(nn.Module):
    """Depth-wise convolution whose kernels are linear in shared bases.

    Args:
        hidden: channels ``C``.
        basis: number of basis functions ``B``.
        fiber: whether to convolve over directions.
        receiver: whether a third kernel looks at the receiver's direction.

    Example:
        Two points that see each other, without directions:

        >>> convolution = BundleConvolution(4, 8, fiber=False, receiver=False)
        >>> edges = torch.tensor([[0, 1], [1, 0]])
        >>> geometry = Geometry(edges, torch.ones(2, 1, 8), None, None)
        >>> convolution(torch.ones(2, 1, 4), geometry).shape
        torch.Size([2, 1, 4])

    Source: Bekkers et al. (2024), arXiv:2310.02970.
    """

    def __init__(self, hidden: int, basis: int, *, fiber: bool, receiver: bool) -> None:
        super().__init__()
        _check_sizes(hidden=hidden, basis=basis)
        self.spatial = nn.Linear(basis, hidden, bias=False)
        self.fiber = nn.Linear(basis, hidden, bias=False) if fiber else None
        self.receiver = nn.Linear(basis, hidden, bias=False) if receiver else None
        self.bias = nn.Parameter(torch.zeros(hidden))

    def forward(self, x: Tensor, geometry: Geometry) -> Tensor:
        """Map ``[P, O, C]`` to ``[P, O, C]``."""
        return self._convolve(x, geometry) + self.bias

    def _convolve(self, x: Tensor, geometry: Geometry) -> Tensor:
        _check_bundle(x, geometry, len(self.bias))
        edges, kernel = geometry.edge_index, self.spatial(geometry.spatial)
        if self.fiber is None:
            return _sum_over_neighbours(x, kernel, edges).to(x.dtype)
        fiber = self.fiber(geometry.fiber)
        if self.receiver is None:
            return separable_convolution(x, kernel, fiber, edges)
        # The third factor needs the message turned to the receiver's direction edge by edge.
        turned = _average_over_directions(kernel * x[edges[0]], fiber)
        messages: Tensor = self.receiver(geometry.receiver) * turned
        messages = messages.to(accumulation_dtype(x.dtype))
        return messages.new_zeros(x.shape).index_add(0, edges[1], messages).to(x.dtype)

    @torch.no_grad()
    def calibrate(self, x: Tensor, geometry: Geometry) -> None:
        """Scale the kernels so that each step keeps the standard deviation of ``x``."""
        _check_bundle(x, geometry, len(self.bias))
        spread = x.std()
        kernel = self.spatial(geometry.spatial)
        summed = _sum_over_neighbours(x, kernel, geometry.edge_index).to(x.dtype)
        self.spatial.weight.mul_(_ratio(spread, summed.std()))
        if self.fiber is not None:
            self.fiber.weight.mul_(_ratio(spread, self._convolve(x, geometry).std()))


def _ratio(before: Tensor, after: Tensor) -> Tensor:
    """How much to scale by; 1 where a standard deviation is 0 or undefined."""
    ratio = before / after
    return torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)


class PonitaBlock(nn.Module):
    """Convolution, layer norm, two-layer network, residual.

    Args:
        hidden: channels ``C``.
        basis: basis functions of the kernels.
        fiber: see :class:`BundleConvolution`.
        receiver: see :class:`BundleConvolution`.
        widening: width of the network over ``C``.
        layer_scale: start of the learned scale of each channel; ``None`` = no scale.

    Example:
        A scale of 0 makes the block the identity:

        >>> block = PonitaBlock(4, 8, fiber=False, receiver=False, widening=2, layer_scale=0.0)
        >>> geometry = Geometry(torch.tensor([[0, 1], [1, 0]]), torch.ones(2, 1, 8), None, None)
        >>> x = torch.randn(2, 1, 4)
        >>> torch.equal(block(x, geometry), x)
        True

    Source: Bekkers et al. (2024), arXiv:2310.02970, after ConvNeXt, arXiv:2201.03545.
    """

    def __init__(
        self,
        hidden: int,
        basis: int,
        *,
        fiber: bool,
        receiver: bool,
        widening: int,
        layer_scale: float | None,
    ) -> None:
        super().__init__()
        _check_sizes(hidden=hidden, basis=basis, widening=widening)
        if layer_scale is not None:
            largest = torch.finfo(torch.get_default_dtype()).max
            check_range("layer_scale", layer_scale, at_least=-largest, at_most=largest)
            layer_scale = float(layer_scale)
        self.convolution = BundleConvolution(hidden, basis, fiber=fiber, receiver=receiver)
        self.norm = nn.LayerNorm(hidden, eps=NORM_EPS)
        self.first = nn.Linear(hidden, widening * hidden)
        self.second = nn.Linear(widening * hidden, hidden)
        self.layer_scale = (
            None if layer_scale is None else nn.Parameter(torch.full((hidden,), layer_scale))
        )

    def forward(self, x: Tensor, geometry: Geometry) -> Tensor:
        """Map ``[P, O, C]`` to ``[P, O, C]``."""
        return convnext_residual(
            self.convolution(x, geometry),
            x,
            self.first.weight,
            self.first.bias,
            self.second.weight,
            self.second.bias,
            norm_weight=self.norm.weight,
            norm_bias=self.norm.bias,
            layer_scale=self.layer_scale,
        )
