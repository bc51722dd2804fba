"""The separable convolution against the full sum, the residual block against its formula."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from steelyard.equivariant import (
    BundleConvolution,
    Geometry,
    KernelBasis,
    PonitaBlock,
    convnext_residual,
    separable_convolution,
)

quick = settings(deadline=None, max_examples=20)
seeds = st.integers(0, 2**31)
close = {"rtol": 0, "atol": 1e-12}


def arguments(seed: int, points: int = 4, directions: int = 3, channels: int = 2, edges: int = 9):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    index = torch.randint(0, points, (2, edges), generator=g)
    spatial = draw(edges, directions, channels)
    fiber = draw(directions, directions, channels)
    return draw(points, directions, channels), spatial, fiber, index


@quick
@given(seeds)
def test_separable_convolution_is_the_full_one_with_the_product_kernel(seed):
    x, spatial, fiber, index = arguments(seed)
    expected = torch.zeros_like(x)
    for e, (send, receive) in enumerate(index.T.tolist()):
        for start in range(3):
            for end in range(3):
                kernel = spatial[e, start] * fiber[start, end]
                expected[receive, end] += kernel * x[send, start] / 3
    torch.testing.assert_close(separable_convolution(x, spatial, fiber, index), expected, **close)


@quick
@given(seeds)
def test_a_constant_fiber_kernel_makes_the_result_independent_of_the_direction(seed):
    x, spatial, fiber, index = arguments(seed)
    constant = fiber[:1, :1].expand_as(fiber)
    got = separable_convolution(x, spatial, constant, index)
    torch.testing.assert_close(got, got[:, :1].expand_as(got), **close)


@quick
@given(seeds)
def test_distance_kernels_and_scalars_make_a_distance_convolution(seed):
    x, spatial, fiber, index = arguments(seed)
    scalars, distance = x[:, :1].expand_as(x), spatial[:, :1].expand_as(spatial)
    got = separable_convolution(scalars, distance, torch.ones_like(fiber), index)
    messages = distance[:, 0] * scalars[index[0], 0]
    expected = torch.zeros_like(x[:, 0]).index_add_(0, index[1], messages)
    torch.testing.assert_close(got, expected[:, None].expand_as(got), **close)


def test_a_point_without_edges_gets_nothing_and_neighbours_are_summed():
    x, fiber = torch.ones(3, 1, 1), torch.ones(1, 1, 1)
    index = torch.tensor([[0, 1, 1], [2, 2, 2]])
    got = separable_convolution(x, torch.ones(3, 1, 1), fiber, index)
    assert got.flatten().tolist() == [0.0, 0.0, 3.0]
    none = separable_convolution(x, torch.ones(0, 1, 1), fiber, index[:, :0])
    assert none.abs().max() == 0


def test_gradients_are_right_twice():
    x, spatial, fiber, index = arguments(0, edges=4)
    leaves = [t.requires_grad_() for t in (x, spatial, fiber)]
    function = lambda *t: separable_convolution(*t, index)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_half_precision_sums_in_single():
    """4096 ones beside 0.5: in float16 the sum would stop at 2048."""
    x = torch.ones(1, 1, 1, dtype=torch.float16)
    index = torch.zeros(2, 4096, dtype=torch.long)
    spatial = torch.ones(4096, 1, 1, dtype=torch.float16)
    got = separable_convolution(x, spatial, x, index)
    assert got.dtype == torch.float16
    assert got.item() == 4096


def test_strided_arguments_give_the_same_result():
    x, spatial, fiber, index = arguments(1)
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, spatial, fiber)]
    got = separable_convolution(*strided, index.T.contiguous().T)
    assert torch.equal(got, separable_convolution(x, spatial, fiber, index))


@pytest.mark.parametrize("gradient", [False, True])
def test_separable_convolution_compiles_without_a_graph_break(gradient):
    x, spatial, fiber, index = arguments(2)
    x.requires_grad_(gradient)
    torch.compiler.reset()
    compiled = torch.compile(separable_convolution, backend="aot_eager", fullgraph=True)
    got, expected = (f(x, spatial, fiber, index) for f in (compiled, separable_convolution))
    torch.testing.assert_close(got, expected, **close)
    if gradient:
        grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (got, expected)]
        torch.testing.assert_close(*grads, **close)


def test_separable_convolution_maps_over_kernels_with_vmap():
    x, spatial, fiber, index = arguments(3)
    fibers = torch.stack((fiber, 2 * fiber))
    mapped = torch.func.vmap(lambda k: separable_convolution(x, spatial, k, index))(fibers)
    torch.testing.assert_close(mapped[1], 2 * mapped[0], **close)


def residual_arguments(seed: int, channels: int = 3, width: int = 5):
    g = torch.Generator().manual_seed(seed)
    shapes = [(2, channels), (2, channels), (width, channels), (width,), (channels, width)]
    shapes += [(channels,)] * 4
    return [torch.randn(*shape, dtype=torch.float64, generator=g) for shape in shapes]


@quick
@given(seeds)
def test_residual_is_its_formula(seed):
    g, f, w1, b1, w2, b2, weight, bias, scale = residual_arguments(seed)
    centred = g - g.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight + bias
    inner = normed @ w1.T + b1
    inner = inner * 0.5 * (1 + torch.special.erf(inner / math.sqrt(2)))
    expected = f + scale * (inner @ w2.T + b2)
    options = {"norm_weight": weight, "norm_bias": bias, "layer_scale": scale}
    got = convnext_residual(g, f, w1, b1, w2, b2, **options)
    torch.testing.assert_close(got, expected, **close)
    plain = convnext_residual(g, f, w1, b1, w2, b2)
    ones = {"norm_weight": weight * 0 + 1, "norm_bias": bias * 0, "layer_scale": scale * 0 + 1}
    torch.testing.assert_close(plain, convnext_residual(g, f, w1, b1, w2, b2, **ones), **close)


def test_layer_scale_zero_is_the_identity():
    g, f, w1, b1, w2, b2, *_ = residual_arguments(0)
    got = convnext_residual(g, f, w1, b1, w2, b2, layer_scale=torch.zeros(3, dtype=torch.float64))
    assert torch.equal(got, f)


def test_gradcheck_of_the_residual():
    leaves = [t.requires_grad_() for t in residual_arguments(1)]

    def function(*t):
        return convnext_residual(*t[:6], norm_weight=t[6], norm_bias=t[7], layer_scale=t[8])

    assert torch.autograd.gradcheck(function, leaves)


def test_parameters_of_a_default_block_are_those_counted():
    C, B = 6, 10
    block = PonitaBlock(C, B, fiber=True, receiver=False, widening=4, layer_scale=1e-6)
    expected = 2 * B * C + C + 2 * C + 8 * C**2 + 5 * C + C
    assert sum(p.numel() for p in block.parameters()) == expected
    kernels = [KernelBasis(2, C, B, 3), KernelBasis(1, C, B, 3)]
    counted = [sum(p.numel() for p in kernel.parameters()) for kernel in kernels]
    assert counted == [15 * C + (C + 1) * B, 4 * C + (C + 1) * B]


def geometry(seed: int, *, receiver: bool) -> tuple[torch.Tensor, Geometry]:
    x, spatial, fiber, index = arguments(seed, channels=4)
    return x, Geometry(index, spatial, fiber, spatial.flip(0) if receiver else None)


def test_the_third_factor_sees_the_direction_of_the_receiver():
    x, shape = geometry(0, receiver=True)
    torch.manual_seed(0)
    layer = BundleConvolution(4, 4, fiber=True, receiver=True).double()
    nn.init.normal_(layer.bias)
    spatial, fiber = layer.spatial(shape.spatial), layer.fiber(shape.fiber)
    receiver = layer.receiver(shape.receiver)
    expected = layer.bias.expand(x.shape).clone()
    for e, (send, receive) in enumerate(shape.edge_index.T.tolist()):
        turned = torch.einsum("oc,opc->pc", spatial[e] * x[send], fiber) / 3
        expected[receive] += receiver[e] * turned
    torch.testing.assert_close(layer(x, shape), expected, **close)


@pytest.mark.parametrize("receiver", [False, True])
def test_calibration_keeps_the_spread_and_a_second_one_changes_nothing(receiver):
    x, shape = geometry(0, receiver=receiver)
    torch.manual_seed(0)
    layer = BundleConvolution(4, 4, fiber=True, receiver=receiver).double()
    assert abs(layer(x, shape).std() / x.std() - 1) > 0.1
    layer.calibrate(x, shape)
    torch.testing.assert_close(layer(x, shape).std(), x.std(), **close)
    before = [p.clone() for p in layer.parameters()]
    layer.calibrate(x, shape)
    for p, q in zip(layer.parameters(), before, strict=True):
        torch.testing.assert_close(p, q, **close)


def test_calibration_leaves_kernels_alone_on_an_empty_signal():
    x, shape = geometry(0, receiver=False)
    layer = BundleConvolution(4, 4, fiber=True, receiver=False).double()
    before = layer.spatial.weight.clone()
    layer.calibrate(torch.zeros_like(x), shape)
    assert torch.equal(layer.spatial.weight, before)


def test_kernel_basis_is_a_network_of_the_polynomials():
    torch.manual_seed(0)
    basis = KernelBasis(1, 3, 2, 2).double()
    t = torch.tensor([[0.5]], dtype=torch.float64)
    powers = torch.tensor([[0.5, 0.25]], dtype=torch.float64)
    inner = functional.gelu(basis.first(powers))
    torch.testing.assert_close(basis(t), functional.gelu(basis.second(inner)), **close)


X, S, K, E = arguments(0)
R = residual_arguments(0)


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: separable_convolution(X[0], S, K, E), ValueError, "x must"),
        (lambda: separable_convolution(X[:0], S, K, E), ValueError, "x must"),
        (lambda: separable_convolution(X, S[:2], K, E), ValueError, "spatial_kernel"),
        (lambda: separable_convolution(X, S, K[:2], E), ValueError, "fiber_kernel"),
        (lambda: separable_convolution(X, S, K, E + 9), ValueError, "edge_index"),
        (lambda: separable_convolution(X, S, K, E.double()), TypeError, "edge_index"),
        (lambda: separable_convolution(X.long(), S, K, E), TypeError, "x must"),
        (lambda: convnext_residual(R[0][:1], *R[1:6]), ValueError, "block_in"),
        (lambda: convnext_residual(*R[:2], R[2].T, *R[3:6]), ValueError, "w1"),
        (lambda: convnext_residual(*R[:3], R[3][:1], *R[4:6]), ValueError, "b1"),
        (lambda: convnext_residual(*R[:4], R[4].T, R[5]), ValueError, "w2"),
        (lambda: convnext_residual(*R[:5], R[5][:1]), ValueError, "b2"),
        (lambda: convnext_residual(*R[:6], layer_scale=R[6][:1]), ValueError, "layer_scale"),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()
