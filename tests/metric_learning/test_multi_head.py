"""Pair temperatures and the multi-head loss against Gaussian densities and InfoNCE."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.metric_learning import (
    MultiHeadContrastive,
    PairTemperature,
    adaptive_temperature_loss,
    bounded_temperature,
    temperature_penalty,
)

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)
close = {"rtol": 0, "atol": 1e-9}


def problem(seed, heads=2, batch=3, negatives=4, dim=5):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    z = [draw(heads, batch, dim), draw(heads, batch, dim), draw(heads, batch, negatives, dim)]
    tau = [0.1 + x.sigmoid() for x in (draw(heads, batch), draw(heads, batch, negatives))]
    return [torch.nn.functional.normalize(x, dim=-1) for x in z] + tau


@quick
@given(seeds)
def test_hard_form_is_a_ratio_of_gaussian_densities_at_beta_one(seed):
    anchor, positive, negatives, tau_positive, tau_negative = problem(seed)
    got = adaptive_temperature_loss(*problem(seed), reduction="none")
    expected = torch.zeros(3, dtype=torch.float64)
    for c in range(2):
        for b in range(3):
            worst = (negatives[c, b] @ anchor[c, b]).argmax()

            def log_density(x, tau, mean=anchor[c, b]):
                normal = torch.distributions.Normal(mean, tau.sqrt())
                return normal.log_prob(x).sum()

            expected[b] += log_density(negatives[c, b, worst], tau_negative[c, b, worst])
            expected[b] -= log_density(positive[c, b], tau_positive[c, b])
    torch.testing.assert_close(got, expected, **close)


@quick
@given(seeds, st.floats(0.05, 2))
def test_soft_form_with_the_positive_among_constant_temperatures_is_info_nce(seed, tau):
    anchor, positive, negatives, t_pos, _ = problem(seed, heads=1)
    candidates = torch.cat((positive[:, :, None], negatives), 2)
    constant = [torch.full_like(t_pos, tau), torch.full((1, 3, 5), tau, dtype=torch.float64)]
    got = adaptive_temperature_loss(
        anchor, positive, candidates, *constant, beta=0.0, mode="soft", reduction="none"
    )
    logits = (candidates[0] * anchor[0][:, None]).sum(-1) / tau
    expected = torch.nn.functional.cross_entropy(
        logits, torch.zeros(3, dtype=torch.long), reduction="none"
    )
    torch.testing.assert_close(got, expected, **close)


@quick
@given(seeds)
def test_equal_heads_add_up(seed):
    single = problem(seed, heads=1)
    thrice = [x.expand(3, *x.shape[1:]) for x in single]
    for mode in ("hard", "soft"):
        one = adaptive_temperature_loss(*single, mode=mode)
        torch.testing.assert_close(adaptive_temperature_loss(*thrice, mode=mode), 3 * one, **close)


@quick
@given(seeds)
def test_soft_lies_between_hard_and_hard_plus_log_n(seed):
    *z, tau_positive, _ = problem(seed)
    shared = tau_positive[..., None].expand(2, 3, 4)
    hard, soft = (
        adaptive_temperature_loss(*z, tau_positive, shared, mode=mode, reduction="none")
        for mode in ("hard", "soft")
    )
    assert (soft >= hard - 1e-12).all()
    assert (soft <= hard + 2 * math.log(4) + 1e-12).all()  # two heads


@quick
@given(seeds)
def test_one_negative_makes_both_forms_equal(seed):
    data = problem(seed, negatives=1)
    values = [adaptive_temperature_loss(*data, beta=0.3, mode=m) for m in ("hard", "soft")]
    torch.testing.assert_close(*values, **close)


@quick
@given(seeds)
def test_lengths_and_the_order_of_heads_items_and_negatives_do_not_matter(seed):
    data = problem(seed)
    for mode in ("hard", "soft"):
        expected = adaptive_temperature_loss(*data, mode=mode)
        scaled = [5 * x for x in data[:3]] + data[3:]
        flipped = [x.flip(0, 1) for x in data]
        shuffled = [*data[:2], data[2].flip(2), data[3], data[4].flip(2)]
        for changed in (scaled, flipped, shuffled):
            got = adaptive_temperature_loss(*changed, mode=mode)
            torch.testing.assert_close(got, expected, **close)


@pytest.mark.parametrize("dim", [2, 16, 128])
def test_the_penalty_is_least_at_two_over_dim_and_convex_below_four_over_dim(dim):
    tau = torch.tensor([2.0, 3.9, 4.1], dtype=torch.float64).div(dim).requires_grad_()
    value = temperature_penalty(tau, dim)
    assert value[0].item() == pytest.approx(dim / 2 * (1 + math.log(2 / dim)))
    slope = torch.autograd.grad(value.sum(), tau, create_graph=True)[0]
    assert slope[0].item() == pytest.approx(0, abs=1e-9)
    curvature = torch.autograd.grad(slope.sum(), tau)[0]
    assert (curvature[:2] > 0).all()
    assert curvature[2] < 0
    assert temperature_penalty(torch.ones(1), dim) == 1


@pytest.mark.parametrize(("cosine", "beta"), [(-0.5, 1.0), (0.4, 1.0), (0.05, 0.1)])
def test_the_stationary_temperature_of_a_positive(cosine, beta):
    best = 2 * (beta - cosine) / (beta * 8)
    tau = torch.tensor([best, 0.9 * best, 1.1 * best], dtype=torch.float64, requires_grad=True)
    value = -cosine / tau + beta * temperature_penalty(tau, 8)
    slope = torch.autograd.grad(value.sum(), tau)[0]
    assert slope[0].item() == pytest.approx(0, abs=1e-9)
    assert value[0] < value[1:].min()


def test_below_beta_one_a_similar_positive_runs_to_the_lower_bound():
    tau = torch.tensor([1e-3, 1e-2, 1e-1], dtype=torch.float64)
    published = -0.5 / tau + 0.1 * temperature_penalty(tau, 128)
    assert (published.diff() > 0).all()
    assert published[0] < -300
    likelihood = -0.5 / tau + temperature_penalty(tau, 128)
    assert likelihood.argmin() == 1  # near 2 (1 - s) / D = 0.0078


def test_the_stationary_temperature_of_a_negative_is_a_maximum():
    tau = torch.linspace(0.05, 1, 50, dtype=torch.float64)
    value = 0.2 / tau - temperature_penalty(tau, 8)  # s - beta = -0.8: stationary at 0.2
    assert tau[value.argmax()].item() == pytest.approx(0.2, abs=0.02)


@quick
@given(st.floats(-1e4, 1e4), st.floats(0.01, 1), st.floats(0.01, 3))
def test_temperatures_stay_inside_their_bounds(raw, low, width):
    got = bounded_temperature(torch.tensor(raw).double(), low=low, high=low + width).item()
    assert low <= got <= low + width
    expected = low + width * torch.tensor(raw).double().sigmoid().item()
    assert got == pytest.approx(expected, abs=1e-12)


def test_pair_network_is_the_network_on_the_concatenation_and_broadcasts():
    torch.manual_seed(0)
    net = PairTemperature(3, hidden=7, low=0.1, high=0.7).double()
    z_i, z_j = torch.randn(2, 4, 3).double(), torch.randn(2, 4, 3).double()
    raw = net.out(net.pair(torch.cat((z_i, z_j), -1)).relu()).squeeze(-1)
    torch.testing.assert_close(net(z_i, z_j), 0.1 + 0.6 * raw.sigmoid(), **close)
    table = net(z_i[:, :, None], z_j[:, None])
    torch.testing.assert_close(table[:, 1, 2], net(z_i[:, 1], z_j[:, 2]), **close)


def test_detached_inputs_get_no_gradient():
    z = torch.randn(2, 3, requires_grad=True)
    net = PairTemperature(3, detach_inputs=True)
    net(z, z).sum().backward()
    assert z.grad is None
    assert net.pair.weight.grad is not None


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_module_is_the_function_on_all_views(mode):
    torch.manual_seed(1)
    module = MultiHeadContrastive(6, 8, 4, heads=2, beta=0.7, mode=mode).double()
    a, b = torch.randn(2, 3, 6).double()
    views = torch.cat((module.project(a), module.project(b)), 1)
    others = [[k for k in range(6) if k % 3 != i % 3] for i in range(6)]
    negatives = views[:, torch.tensor(others)]
    positive = views[:, [3, 4, 5, 0, 1, 2]]
    anchors = views[:, :, None].expand_as(negatives)
    tau = module.temperature(views, positive), module.temperature(anchors, negatives)
    expected = adaptive_temperature_loss(views, positive, negatives, *tau, beta=0.7, mode=mode)
    got = module(a, b)
    torch.testing.assert_close(got, expected, **close)
    parameters = list(module.parameters())
    pairs = zip(*(torch.autograd.grad(x, parameters) for x in (got, expected)), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, **close)


def test_a_learned_temperature_recovers_the_noise_of_each_group_of_pairs():
    """At beta = 1 the optimum is 2 (1 - s) / D; two kinds of pairs, told apart by their anchor."""
    torch.manual_seed(0)
    cosine = torch.tensor([0.2, 0.8])
    anchor = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    other = cosine[:, None] * anchor
    other[:, 2] = (1 - cosine.square()).sqrt()
    net = PairTemperature(4, hidden=16, low=0.01, high=1.0)
    optimiser = torch.optim.Adam(net.parameters(), 0.05)
    for _ in range(200):
        tau = net(anchor, other)
        loss = (-cosine / tau + temperature_penalty(tau, 4)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    torch.testing.assert_close(net(anchor, other), (1 - cosine) / 2, rtol=0.02, atol=0)


def test_gradients_by_finite_differences():
    data = [x.requires_grad_() for x in problem(0, batch=2, negatives=2, dim=3)]
    for mode in ("hard", "soft"):
        assert torch.autograd.gradcheck(
            lambda *x, mode=mode: adaptive_temperature_loss(*x, mode=mode), data
        )
    raw = torch.tensor([-2.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(bounded_temperature, raw)
    assert torch.autograd.gradcheck(lambda x: temperature_penalty(x.exp(), 6), raw)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bound", [0.05, 1.0])
def test_half_precision_is_finite_at_both_bounds(dtype, bound):
    data = [x.to(dtype) for x in problem(0)]
    data[3].fill_(bound)
    data[4].fill_(bound)
    for mode in ("hard", "soft"):
        loss = adaptive_temperature_loss(*data, mode=mode)
        assert loss.dtype == dtype
        assert loss.isfinite()


def test_nan_shows_in_the_loss():
    data = problem(0)
    data[2][0, 0, 0] = torch.nan
    assert adaptive_temperature_loss(*data).isnan()


Z, N, TP, TN = torch.ones(2, 3, 4), torch.ones(2, 3, 5, 4), torch.ones(2, 3), torch.ones(2, 3, 5)


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: temperature_penalty(TP, 0), ValueError, "dim"),
        (lambda: temperature_penalty(0.5, 4), TypeError, "temperature"),
        (lambda: bounded_temperature(TP, low=0.0), ValueError, "low"),
        (lambda: bounded_temperature(TP, low=0.5, high=0.5), ValueError, "high"),
        (lambda: PairTemperature(0), ValueError, "dim"),
        (lambda: PairTemperature(4)(Z, Z[..., :3]), ValueError, "z_j"),
        (lambda: adaptive_temperature_loss(Z[0], Z, N, TP, TN), ValueError, "anchor"),
        (lambda: adaptive_temperature_loss(Z, Z[:1], N, TP, TN), ValueError, "positive"),
        (lambda: adaptive_temperature_loss(Z, Z, N[:, :2], TP, TN), ValueError, "negatives"),
        (lambda: adaptive_temperature_loss(Z, Z, N[:, :, :0], TP, TN), ValueError, "negatives"),
        (lambda: adaptive_temperature_loss(Z, Z, N, TN, TN), ValueError, "temperature_positive"),
        (lambda: adaptive_temperature_loss(Z, Z, N, TP, TP), ValueError, "temperature_negative"),
        (lambda: adaptive_temperature_loss(Z, Z, N, TP, TN, beta=-1.0), ValueError, "beta"),
        (lambda: adaptive_temperature_loss(Z, Z, N, TP, TN, mode="x"), ValueError, "mode"),
        (lambda: MultiHeadContrastive(4, 4, 4, heads=0), ValueError, "heads"),
        (lambda: MultiHeadContrastive(4, 4, 4, mode="x"), ValueError, "mode"),
        (lambda: MultiHeadContrastive(4, 4, 4)(Z[0, :1], Z[0, :1]), ValueError, "features_a"),
        (lambda: MultiHeadContrastive(4, 4, 4)(Z[0], Z[0, :2]), ValueError, "features_b"),
        (lambda: MultiHeadContrastive(4, 4, 4).project(Z), ValueError, "features"),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()
