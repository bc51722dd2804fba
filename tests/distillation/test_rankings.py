"""The fast paths of ranked losses against the plain formulas, under every way to differentiate."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steelyard.distillation import pld_loss
from steelyard.distillation._rankings import SPAN, _plain, descending, plackett_luce


def drawn(seed, rows, classes, scale=1.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    ranked = scale * torch.randn(rows, classes, generator=g, dtype=dtype)
    return ranked.requires_grad_(), torch.randn(rows, classes, generator=g, dtype=dtype)


def losses_and_gradient(function, ranked, weights):
    losses = function(ranked, weights)
    up = torch.linspace(0.5, 2.0, len(losses), dtype=losses.dtype)
    return losses.detach(), torch.autograd.grad(losses @ up, ranked)[0]


@given(
    st.integers(0, 10**6),
    st.integers(1, 5),
    st.integers(1, 40),
    st.sampled_from([0.1, 1.0, 30.0, 300.0, 1e4]),
)
def test_losses_and_gradients_are_those_of_the_plain_formula(seed, rows, classes, scale):
    case = drawn(seed, rows, classes, scale)  # weights of both signs; ranges on both sides of SPAN
    for got, expected in zip(
        losses_and_gradient(plackett_luce, *case), losses_and_gradient(_plain, *case), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_blocks_of_rows_that_are_near_and_far_apart_agree_with_the_plain_formula():
    ranked, weights = drawn(0, 5, 2**17)
    with torch.no_grad():
        ranked[2] *= 1e4  # one block of rows takes the plain formula, its neighbours do not
    for got, expected in zip(
        losses_and_gradient(plackett_luce, ranked, weights),
        losses_and_gradient(_plain, ranked, weights),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-7)


def test_float32_gradients_are_nearer_to_the_truth_than_float32_sums():
    ranked, weights = drawn(0, 4, 3000, 4.0, torch.float32)
    truth = losses_and_gradient(_plain, ranked.detach().double().requires_grad_(), weights.double())
    got = losses_and_gradient(plackett_luce, ranked, weights)
    plain = losses_and_gradient(_plain, ranked, weights)
    for ours, theirs, exact in zip(got, plain, truth, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - exact).abs().max() <= (theirs - exact).abs().max()


@pytest.mark.parametrize("scale", [1.0, 2 * SPAN])
def test_first_and_second_derivatives_are_right(scale):
    ranked, weights = drawn(1, 2, 4)
    ranked = (ranked.detach() + scale * torch.tensor([0.0, 0.0, 0.0, -1.0])).requires_grad_()

    def function(logits):
        return plackett_luce(logits, weights)

    assert torch.autograd.gradcheck(function, ranked, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, ranked)


def test_function_transforms_agree_with_the_plain_formula():
    ranked, weights = (x.detach() for x in drawn(2, 3, 5))
    batch = torch.stack([ranked, 2 * ranked, ranked.flip(1)])
    for transform in (
        lambda f: torch.func.hessian(lambda r: f(r, weights).sum())(ranked),
        lambda f: torch.func.jacrev(lambda r: f(r, weights))(ranked),
        lambda f: torch.func.vmap(f, (0, None))(batch, weights),
        lambda f: torch.func.vmap(f, (1, 1))(batch, batch),
        lambda f: torch.func.vmap(torch.func.grad(lambda r: f(r, weights).sum()))(batch),
        lambda f: torch.func.grad(lambda b: torch.func.vmap(f, (0, None))(b, weights).sum())(batch),
    ):
        torch.testing.assert_close(transform(plackett_luce), transform(_plain))


def test_compiled_losses_are_the_same():
    ranked, weights = drawn(3, 3, 6)
    compiled = torch.compile(plackett_luce, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ranked, weights), plackett_luce(ranked, weights))


@given(st.integers(0, 10**6), st.sampled_from([torch.float32, torch.float64]), st.booleans())
def test_order_is_that_of_a_stable_sort(seed, dtype, ties):
    g = torch.Generator().manual_seed(seed)
    values = 3 * torch.randn(3, 17, generator=g, dtype=dtype)
    values = values.round() if ties else values
    values[0, :4] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf], dtype=dtype)
    expected = values.argsort(dim=-1, descending=True, stable=True)
    assert torch.equal(descending(values), expected)
    assert torch.equal(torch.vmap(descending)(values), expected)
    assert torch.equal(descending(values[:, ::2]), expected_of(values[:, ::2]))


def expected_of(values):
    return values.argsort(dim=-1, descending=True, stable=True)


@pytest.mark.parametrize("extreme", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_seen(extreme):
    ranked, weights = drawn(4, 2, 3)
    with torch.no_grad():
        ranked[0, 1] = extreme
    losses = plackett_luce(ranked, weights)
    torch.testing.assert_close(losses, _plain(ranked, weights), equal_nan=True)
    assert not losses[0].isfinite()
    assert losses[1].isfinite()


def test_a_mapped_loss_of_distillation_is_that_of_each_batch():
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, 6, 5, generator=g)
    labels = torch.randint(0, 5, (4, 6), generator=g)
    mapped = torch.vmap(pld_loss)(student, teacher, labels)
    each = [pld_loss(*case) for case in zip(student, teacher, labels, strict=True)]
    torch.testing.assert_close(mapped, torch.stack(each))
