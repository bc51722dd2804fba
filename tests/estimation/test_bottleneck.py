"""The bottleneck objective against its formulas in plain matrices, and as a module."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from steelyard.divergences import cauchy_schwarz_mutual_information, median_bandwidth
from steelyard.estimation import CauchySchwarzBottleneck, cs_ib_loss

quick = settings(deadline=None, max_examples=20)
seeds = st.integers(0, 2**31)
close = {"rtol": 1e-9, "atol": 1e-11}


def batch(seed, n=7):
    g = torch.Generator().manual_seed(seed)
    shapes = ((n, 3), (n, 1), (n, 1), (n, 2))
    return [torch.randn(*s, dtype=torch.float64, generator=g) for s in shapes]


def kernel(a, b, width):
    return torch.exp(-(a.unsqueeze(1) - b).square().sum(2) / (2 * width**2))


def objective(x, y, y_hat, t, beta, widths, squares=False):
    """The two propositions, written with full matrices."""
    s_x, s_y, s_t = widths
    K, Q = kernel(x, x, s_x), kernel(t, t, s_t)
    row = K.square().sum(1) if squares else K.sum(1) ** 2
    A, B, C = (
        ((K * L).sum(1) / row).sum()
        for L in (kernel(y, y, s_y), kernel(y_hat, y_hat, s_y), kernel(y_hat, y, s_y))
    )
    n = len(x)
    a, b = (K * Q).sum() / n**2, K.sum() * Q.sum() / n**4
    c = (K @ Q).sum() / n**3
    return (A * B / C**2).log() + beta * (a * b / c**2).log()


@quick
@given(seeds, st.floats(0, 2), st.floats(0.3, 3), st.floats(0.3, 3), st.floats(0.3, 3))
def test_objective_is_the_two_propositions(seed, beta, s_x, s_y, s_t):
    data, widths = batch(seed), (s_x, s_y, s_t)
    names = dict(zip(("bandwidth_x", "bandwidth_y", "bandwidth_t"), widths, strict=True))
    got = cs_ib_loss(*data, beta=beta, **names)
    torch.testing.assert_close(got, objective(*data, beta, widths), **close)
    released = cs_ib_loss(*data, beta=beta, denominator="reference", **names)
    torch.testing.assert_close(released, objective(*data, beta, widths, squares=True), **close)


@quick
@given(seeds)
def test_gradient_of_the_prediction_is_the_closed_form(seed):
    x, y, y_hat, t = batch(seed)
    s_y = 0.8
    y_hat.requires_grad_()
    loss = cs_ib_loss(x, y, y_hat, t, beta=0.5, bandwidth_y=s_y)
    (grad,) = torch.autograd.grad(loss, y_hat)
    K = kernel(x, x, 1.0)
    row = K.sum(1, keepdim=True) ** 2
    R, P = K * kernel(y_hat, y_hat, s_y) / row, K * kernel(y_hat, y, s_y) / row
    apart = (y_hat.unsqueeze(0) - y_hat.unsqueeze(1)).squeeze(2)  # [m, i] = y_hat_i - y_hat_m
    pulled = (y.unsqueeze(0) - y_hat.unsqueeze(1)).squeeze(2)
    expected = ((R + R.T) * apart).sum(1) / R.sum() - 2 * (P * pulled).sum(1) / P.sum()
    torch.testing.assert_close(grad.squeeze(1), (expected / s_y**2).detach(), **close)


@quick
@given(seeds)
def test_perfect_prediction_and_constant_representation_cost_nothing(seed):
    x, y, y_hat, t = batch(seed)
    constant = torch.ones_like(t)
    assert cs_ib_loss(x, y, y, constant, beta=3.0).abs() < 1e-12
    first = cs_ib_loss(x, y, y_hat, constant, beta=3.0)
    torch.testing.assert_close(first, cs_ib_loss(x, y, y_hat, t, beta=0.0), **close)
    # the same items in another order, and twice over
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    value = cs_ib_loss(x, y, y_hat, t, beta=0.7)
    shuffled = [v[order] for v in (x, y, y_hat, t)]
    torch.testing.assert_close(cs_ib_loss(*shuffled, beta=0.7), value, **close)
    doubled = [torch.cat([v, v]) for v in (x, y, y_hat, t)]
    torch.testing.assert_close(cs_ib_loss(*doubled, beta=0.7), value, **close)


@quick
@given(seeds)
def test_mask_leaves_the_kept_items(seed):
    data = batch(seed)
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1])
    wild = [v.clone() for v in data]
    for v in wild:
        v[mask == 0] = math.nan
    for kind in (mask.bool(), mask.double()):
        got = cs_ib_loss(*wild, beta=0.4, mask=kind)
        kept = [v[mask == 1] for v in data]
        torch.testing.assert_close(got, cs_ib_loss(*kept, beta=0.4), **close)


def test_nothing_kept_is_exactly_zero_with_zero_gradient():
    x, y, y_hat, t = batch(0)
    y_hat, t = (torch.full_like(v, math.inf).requires_grad_() for v in (y_hat, t))
    loss = cs_ib_loss(x, y, y_hat, t, beta=1.0, mask=torch.zeros(7))
    assert loss == 0
    grads = torch.autograd.grad(loss, (y_hat, t))
    assert all((g == 0).all() for g in grads)


def test_narrow_input_kernel_is_the_correntropy_of_single_items():
    x, y, y_hat, t = batch(1)
    got = cs_ib_loss(x, y, y_hat, t, beta=0.0, bandwidth_x=1e-3)
    residual = (y_hat - y).squeeze(1)
    expected = -2 * torch.exp(-residual.square() / 2).mean().log()
    torch.testing.assert_close(got, expected, **close)


def test_bandwidth_none_is_the_median_distance():
    x, y, y_hat, t = batch(2)
    got = cs_ib_loss(x, y, y_hat, t, beta=0.3, bandwidth_x=None, bandwidth_y=None, bandwidth_t=None)
    widths = (median_bandwidth(x), median_bandwidth(y), median_bandwidth(t))
    torch.testing.assert_close(got, objective(x, y, y_hat, t, 0.3, widths), **close)


def test_only_predictions_and_representation_carry_a_gradient():
    x, y, y_hat, t = (v.requires_grad_() for v in batch(3))
    loss = cs_ib_loss(x, y, y_hat, t, beta=1.0)
    grads = torch.autograd.grad(loss, (x, y, y_hat, t), allow_unused=True)
    assert grads[1] is None
    assert all((g != 0).any() for g in (grads[0], grads[2], grads[3]))


def test_gradcheck_and_blocks():
    x, y, y_hat, t = batch(4)
    y_hat.requires_grad_()
    t.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p, r: cs_ib_loss(x, y, p, r, beta=0.6, normalized=True), (y_hat, t)
    )
    whole = cs_ib_loss(x, y, y_hat, t, beta=0.6)
    blocks = cs_ib_loss(x, y, y_hat, t, beta=0.6, block_size=2)
    torch.testing.assert_close(blocks, whole, **close)


def test_extreme_predictions_are_finite_and_pulled_back():
    x, y, _, t = batch(5)
    y_hat = torch.full_like(y, 1e4).requires_grad_()
    loss = cs_ib_loss(x, y, y_hat, t, beta=1.0)
    assert torch.isfinite(loss)
    (grad,) = torch.autograd.grad(loss, y_hat)
    assert (grad > 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_follows_the_inputs(dtype):
    data = [v.to(dtype) for v in batch(6)]
    loss = cs_ib_loss(*data, beta=0.5)
    assert loss.dtype == dtype
    expected = cs_ib_loss(*(v.double() for v in data), beta=0.5)
    assert loss.double().item() == pytest.approx(expected.item(), rel=2e-2, abs=1e-3)


def test_loss_compiles_without_a_graph_break():
    x, y, y_hat, t = batch(7)
    compiled = torch.compile(cs_ib_loss, backend="eager", fullgraph=True)
    expected = cs_ib_loss(x, y, y_hat, t, beta=0.5)
    torch.testing.assert_close(compiled(x, y, y_hat, t, beta=0.5), expected, **close)


def model(**options):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    return CauchySchwarzBottleneck(encoder, nn.Linear(2, 1), **options).double()


def test_module_predicts_and_reports_its_terms():
    x, y, _, _ = batch(8)
    net = model(beta=0.4, bandwidth_x=2.0)
    t = net.encode(x)
    torch.testing.assert_close(net(x), net.decoder(t))
    terms = net.loss(x, y)
    torch.testing.assert_close(
        terms.loss, cs_ib_loss(x, y, net(x), t, beta=0.4, bandwidth_x=2.0), **close
    )
    torch.testing.assert_close(terms.loss, terms.divergence + 0.4 * terms.information, **close)
    information = cauchy_schwarz_mutual_information(x, t, 2.0, 1.0)
    torch.testing.assert_close(terms.information, information, **close)
    nothing = net.loss(x, y, mask=torch.zeros(7))
    assert nothing.loss == nothing.divergence == nothing.information == 0


def test_noise_is_added_while_training_only():
    x, y, _, _ = batch(9)
    net = model(beta=0.4, noise=0.5, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(net(x), net(x))
    spread = torch.stack([net.encode(x) for _ in range(400)]).std(0)
    # relative standard error 1 / sqrt(800) = 3.5 %: six of them
    torch.testing.assert_close(spread, torch.full_like(spread, 0.5), rtol=0.22, atol=0)
    net.eval()
    assert torch.equal(net(x), net(x))
    net.loss(x, y).loss.backward()


def test_compression_lowers_the_information_and_outliers_do_not_bend_the_fit():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(120, 3, dtype=torch.float64, generator=g)
    y = x[:, :1].sin()
    information = []
    for beta in (0.0, 2.0):
        net = model(beta=beta)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
        for _ in range(40):
            optimizer.zero_grad()
            net.loss(x, y).loss.backward()
            optimizer.step()
        information.append(net.loss(x, y).information.item())
    assert information[1] < 0.7 * information[0]
    bent = y.clone()
    bent[:18] += 5.0  # 15 % of the labels
    level = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([level], lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        cs_ib_loss(x, bent, y + level, x, beta=0.0, bandwidth_x=0.2, bandwidth_y=0.7).backward()
        optimizer.step()
    assert level.abs() < 0.1  # the mean of the residuals is 0.75


def test_errors_name_the_argument():
    x, y, y_hat, t = batch(10)
    with pytest.raises(ValueError, match=r"y must have shape \[7, any\], got \[7\]"):
        cs_ib_loss(x, y.squeeze(1), y_hat, t, beta=0.1)
    with pytest.raises(ValueError, match=r"y_hat must have shape \[7, 1\]"):
        cs_ib_loss(x, y, t, t, beta=0.1)
    with pytest.raises(ValueError, match=r"t must have shape \[7, any\]"):
        cs_ib_loss(x, y, y_hat, t[:3], beta=0.1)
    with pytest.raises(ValueError, match="x must not be empty"):
        cs_ib_loss(x[:0], y[:0], y_hat[:0], t[:0], beta=0.1)
    with pytest.raises(ValueError, match="beta must be >= 0"):
        cs_ib_loss(x, y, y_hat, t, beta=-0.1)
    with pytest.raises(ValueError, match="bandwidth_y must be > 0"):
        cs_ib_loss(x, y, y_hat, t, beta=0.1, bandwidth_y=0.0)
    with pytest.raises(ValueError, match=r"mask must have shape \[7\]"):
        cs_ib_loss(x, y, y_hat, t, beta=0.1, mask=torch.ones(7, 1))
    with pytest.raises(TypeError, match="t must have a floating dtype"):
        cs_ib_loss(x, y, y_hat, t.long(), beta=0.1)
    with pytest.raises(ValueError, match="denominator must be one of"):
        cs_ib_loss(x, y, y_hat, t, beta=0.1, denominator="paper")
    with pytest.raises(ValueError, match="noise must be >= 0"):
        CauchySchwarzBottleneck(nn.Identity(), nn.Identity(), 0.1, noise=-1.0)
