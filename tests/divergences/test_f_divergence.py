import math

import pytest
import scipy.spatial.distance
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import Categorical, kl_divergence
from torch.nn.functional import kl_div

from steelyard.divergences import (
    JEFFREYS,
    JENSEN_SHANNON,
    JENSEN_SHANNON_DOUBLE,
    KL,
    NEYMAN_CHI2,
    PEARSON_CHI2,
    REVERSE_KL,
    SOFTENED_REVERSE_KL,
    SQUARED_HELLINGER,
    TOTAL_VARIATION,
    alpha_divergence,
    f_divergence,
    skew_jensen_shannon,
)

INF = math.inf


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(actual, expected, rtol=1e-9, atol=1e-9):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


# --- values ------------------------------------------------------------------------------------


def test_value_is_the_mean_of_the_generator_under_q(divergence, laws):
    log_p, log_q = laws
    expected = (log_q.exp() * divergence.f((log_p - log_q).exp())).sum(-1)
    close(f_divergence(log_p, log_q, divergence), expected)


def test_equal_laws_are_at_distance_zero(divergence, laws):
    log_p, _ = laws
    close(f_divergence(log_p, log_p, divergence), torch.zeros(2, dtype=torch.float64), atol=1e-15)


def test_reversed_swaps_the_arguments(divergence, laws):
    log_p, log_q = laws
    swapped = f_divergence(log_q, log_p, divergence)
    close(f_divergence(log_p, log_q, divergence.reversed()), swapped)


def test_centring_leaves_the_divergence_unchanged(divergence, laws):
    close(f_divergence(*laws, divergence.centred()), f_divergence(*laws, divergence))


def test_kl_agrees_with_scipy_distributions_and_functional(laws):
    log_p, log_q = laws
    value = f_divergence(log_p, log_q, KL)
    p, q = log_p.exp(), log_q.exp()
    close(value, torch.as_tensor(scipy.special.rel_entr(p.numpy(), q.numpy())).sum(-1))
    close(value, torch.as_tensor(scipy.special.kl_div(p.numpy(), q.numpy())).sum(-1))
    close(value, kl_divergence(Categorical(logits=log_p), Categorical(logits=log_q)))
    close(value, kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))


def test_jensen_shannon_agrees_with_the_square_of_scipys_distance(laws):
    log_p, log_q = laws
    distance = scipy.spatial.distance.jensenshannon(log_p.exp(), log_q.exp(), axis=-1)
    close(f_divergence(log_p, log_q, JENSEN_SHANNON), torch.as_tensor(distance) ** 2)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_skew_jensen_shannon_is_the_weighted_sum_of_kls_to_the_mixture(beta, laws):
    log_p, log_q = laws
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    expected = beta * f_divergence(log_p, log_m, KL) + (1 - beta) * f_divergence(log_q, log_m, KL)
    close(f_divergence(log_p, log_q, skew_jensen_shannon(beta)), expected)
    rescaled = f_divergence(log_p, log_q, skew_jensen_shannon(beta, rescaled=True))
    close(rescaled, expected / (beta * (1 - beta)))


@pytest.mark.parametrize(
    ("divergence", "formula"),
    [
        (TOTAL_VARIATION, lambda p, q: (p - q).abs() / 2),
        (PEARSON_CHI2, lambda p, q: (p - q) ** 2 / q),
        (NEYMAN_CHI2, lambda p, q: (p - q) ** 2 / p),
        (SQUARED_HELLINGER, lambda p, q: (p.sqrt() - q.sqrt()) ** 2),
        (alpha_divergence(0.3), lambda p, q: (p**0.3 * q**0.7 - 0.3 * p - 0.7 * q) / (0.3 * -0.7)),
        (SOFTENED_REVERSE_KL, lambda p, q: (p + q) * ((p + q) / (2 * p)).log()),
    ],
)
def test_value_column_of_the_published_table(divergence, formula, laws):
    log_p, log_q = laws
    close(f_divergence(log_p, log_q, divergence), formula(log_p.exp(), log_q.exp()).sum(-1))


# --- zeros -------------------------------------------------------------------------------------


def times(limit, mass):
    return 0.0 if mass == 0.0 else limit * mass


def test_zero_probability_rules(divergence):
    p, q = tensor(0.5, 0.3, 0.2, 0.0, 0.0), tensor(0.4, 0.0, 0.35, 0.25, 0.0)
    interior = (q * divergence.f(p / q))[[0, 2]].sum().item()
    expected = interior + divergence.at_zero * 0.25 + divergence.slope_at_infinity * 0.3
    close(f_divergence(p.log(), q.log(), divergence), tensor(expected)[0])


def test_terms_follow_the_zero_rules_one_by_one(divergence):
    log_p, log_q = tensor(-INF, -1.0, -INF), tensor(-2.0, -INF, -INF)
    expected = tensor(
        times(divergence.at_zero, math.exp(-2)),
        times(divergence.slope_at_infinity, math.exp(-1)),
        0,
    )
    close(divergence.terms(log_p, log_q), expected)


def test_disjoint_supports(divergence):
    log_p, log_q = tensor(1.0, 0.0).log(), tensor(0.0, 1.0).log()
    expected = divergence.at_zero + divergence.slope_at_infinity
    close(f_divergence(log_p, log_q, divergence), tensor(expected)[0])


def test_gradient_is_finite_at_zero_probabilities_where_the_value_is(divergence):
    shared = tensor(0.5, 0.5, 0.0, 0.0)
    cases = [(shared, tensor(0.2, 0.8, 0.0, 0.0))]  # both zero
    if math.isfinite(divergence.at_zero):
        cases.append((shared, tensor(0.2, 0.3, 0.5, 0.0)))
    if math.isfinite(divergence.slope_at_infinity):
        cases.append((tensor(0.2, 0.3, 0.5, 0.0), shared))
    for p, q in cases:
        log_p, log_q = p.log().requires_grad_(), q.log().requires_grad_()
        f_divergence(log_p, log_q, divergence).backward()
        both = (p > 0) & (q > 0)
        t = torch.where(both, p / q, 1.0)
        in_p = torch.where(both, p * divergence.derivative(t), p * divergence.slope_at_infinity)
        twin = divergence.reversed()
        in_q = torch.where(both, q * twin.derivative(1 / t), q * divergence.at_zero)
        close(log_p.grad, torch.where(p > 0, in_p, 0.0))
        close(log_q.grad, torch.where(q > 0, in_q, 0.0))


def test_gradient_through_logits_with_a_forbidden_item_has_no_nan(divergence):
    p_logits = tensor(0.3, -1.0, -INF).requires_grad_()
    q_logits = tensor(0.1, 0.7, -INF).requires_grad_()
    f_divergence(p_logits.log_softmax(-1), q_logits.log_softmax(-1), divergence).backward()
    assert p_logits.grad[:2].isfinite().all()
    assert q_logits.grad[:2].isfinite().all()


def test_an_infinite_value_does_not_poison_other_rows(divergence):
    log_p = torch.stack([tensor(0.0, 1.0), tensor(0.4, 0.6)]).log().requires_grad_()
    log_q = torch.stack([tensor(1.0, 0.0), tensor(0.5, 0.5)]).log()
    f_divergence(log_p, log_q, divergence).sum().backward()
    assert log_p.grad.isfinite().all()


# --- gradients ---------------------------------------------------------------------------------


def test_gradient_in_p_is_f_prime_and_in_q_is_the_intercept(divergence, laws):
    log_p, log_q = (x.clone().requires_grad_() for x in laws)
    f_divergence(log_p, log_q, divergence, reduction="sum").backward()
    t = (log_p - log_q).exp().detach()
    # d/d log p = p d/dp
    close(log_p.grad, (log_p.exp() * divergence.derivative(t)).detach())
    intercept = divergence.f(t) - t * divergence.derivative(t)
    close(log_q.grad, (log_q.exp() * intercept).detach())


def test_gradcheck(divergence, laws):
    log_p, log_q = (x[0].clone().requires_grad_() for x in laws)
    assert gradcheck(lambda a, b: f_divergence(a, b, divergence), (log_p, log_q))
    assert gradgradcheck(lambda a, b: f_divergence(a, b, divergence), (log_p, log_q))


def test_hessian_at_equal_laws_is_the_curvature_times_fisher(divergence, laws):
    if divergence == TOTAL_VARIATION:
        return  # not differentiable there
    logits = laws[0][0]
    q = logits.log_softmax(-1)
    hessian = torch.func.hessian(lambda z: f_divergence(z.log_softmax(-1), q, divergence))(logits)
    fisher = q.exp().diag() - q.exp()[:, None] * q.exp()
    curvature = divergence.second_derivative(tensor(1.0))
    close(hessian, curvature * fisher)


# --- extremes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kl_of_logits_of_magnitude_ten_thousand(dtype):
    logits = torch.tensor([1e4, 0.0, -1e4], dtype=dtype)
    log_p, log_q = logits.log_softmax(-1), logits.flip(0).log_softmax(-1)
    for divergence in (KL, REVERSE_KL):
        assert f_divergence(log_p, log_q, divergence).item() == pytest.approx(2e4)
    assert f_divergence(log_p, log_q, JENSEN_SHANNON).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_logits_give_no_nan_and_finite_gradients(divergence, dtype):
    p_logits = torch.tensor([1e4, 0.0, -1e4, 9.9e3], dtype=dtype, requires_grad=True)
    q_logits = torch.tensor([-1e4, 1e4, 0.0, 1e4], dtype=dtype, requires_grad=True)
    value = f_divergence(p_logits.log_softmax(-1), q_logits.log_softmax(-1), divergence)
    assert not value.isnan()
    if value.isfinite():
        value.backward()
        assert p_logits.grad.isfinite().all()
        assert q_logits.grad.isfinite().all()


def test_a_finite_chi_square_survives_underflow_of_both_probabilities():
    # p^2/q = exp(-2000 + 1990): both probabilities are zero in float64, the term is not.
    log_p, log_q = tensor(0.0, -1000.0), tensor(0.0, -1990.0)
    close(f_divergence(log_p, log_q, PEARSON_CHI2), tensor(math.exp(-10))[0])


@settings(deadline=None, max_examples=50)
@given(
    p=st.lists(st.floats(-50, 50), min_size=4, max_size=4),
    q=st.lists(st.floats(-50, 50), min_size=4, max_size=4),
)
@pytest.mark.parametrize(
    "bounded", [JENSEN_SHANNON, TOTAL_VARIATION, SQUARED_HELLINGER], ids=lambda d: d.name
)
def test_bounded_divergences_stay_in_their_bounds_in_float32(bounded, p, q):
    log_p, log_q = (torch.tensor(x).log_softmax(-1) for x in (p, q))
    value = f_divergence(log_p, log_q, bounded).item()
    bound = bounded.at_zero + bounded.slope_at_infinity
    assert -1e-6 <= value <= bound + 1e-6


def test_nearly_equal_laws_keep_a_relative_accuracy_in_jensen_shannon():
    step = 1e-5
    p, q = tensor(0.5 + step, 0.5 - step), tensor(0.5, 0.5)
    value = f_divergence(p.log(), q.log(), JENSEN_SHANNON).item()
    assert value == pytest.approx(step**2 / 2, rel=1e-5)  # f''(1)/2 sum d^2/q = 1/8 * 4 d^2


# --- dtypes, shapes, masks ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(divergence, dtype):
    logits = torch.randn(2, 3, 500, generator=torch.Generator().manual_seed(1))
    log_p, log_q = logits.log_softmax(-1).to(dtype).unbind(0)
    value = f_divergence(log_p, log_q, divergence)
    assert value.dtype == dtype
    assert torch.equal(value, f_divergence(log_p.float(), log_q.float(), divergence).to(dtype))


def test_mixed_dtypes_give_the_wider_one():
    log_p, log_q = tensor(0.5, 0.5).log(), torch.tensor([0.25, 0.75]).log()
    assert f_divergence(log_p, log_q, KL).dtype == torch.float64


def test_dim_and_memory_layout_do_not_matter(divergence, laws):
    log_p, log_q = laws
    expected = f_divergence(log_p, log_q, divergence)
    for dim in (0, -2):
        close(f_divergence(log_p.T, log_q.T, divergence, dim=dim), expected, 1e-13)
    assert not log_p.T.is_contiguous()


def test_one_item_and_no_row():
    assert f_divergence(tensor(0.0), tensor(0.0), KL) == 0
    assert f_divergence(torch.zeros(0, 3), torch.zeros(0, 3), KL).shape == (0,)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_mask_and_reductions_count_kept_rows_only(divergence, laws, kind):
    log_p, log_q = torch.cat(laws), torch.cat(laws[::-1])
    log_p[1] = math.nan
    mask = torch.tensor([True, False, True, True])
    rows = f_divergence(log_p, log_q, divergence, mask=mask.to(kind))
    kept = f_divergence(log_p[mask], log_q[mask], divergence)
    assert rows[1] == 0
    close(rows[mask], kept)
    mean = f_divergence(log_p, log_q, divergence, mask=mask.to(kind), reduction="mean")
    close(mean, kept.mean())
    close(f_divergence(log_p, log_q, divergence, mask=mask, reduction="sum"), kept.sum())


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_fully_masked_nan_is_exactly_zero_with_a_zero_gradient(divergence, reduction):
    log_p = torch.full((2, 3), math.nan, requires_grad=True)
    log_q = torch.full((2, 3), INF, requires_grad=True)
    mask = torch.zeros(2, dtype=torch.bool)
    value = f_divergence(log_p, log_q, divergence, mask=mask, reduction=reduction)
    assert (value == 0).all()
    value.sum().backward()
    assert torch.equal(log_p.grad, torch.zeros(2, 3))
    assert torch.equal(log_q.grad, torch.zeros(2, 3))


def test_mask_with_another_dim(laws):
    log_p, log_q = (x.T for x in laws)
    rows = f_divergence(log_p, log_q, KL, dim=0, mask=torch.tensor([False, True]))
    assert rows[0] == 0
    close(rows[1], f_divergence(*laws, KL)[1])


def test_nan_that_counts_comes_out_as_nan(divergence):
    for other in (-0.9, -INF, math.nan):
        bad, good = tensor(-0.1, math.nan), tensor(-0.5, other)
        assert f_divergence(bad, good, divergence).isnan()
        assert f_divergence(good, bad, divergence).isnan()


# --- transforms --------------------------------------------------------------------------------


ONE_OF_EACH_FAMILY = [
    KL.centred(),
    JENSEN_SHANNON,
    TOTAL_VARIATION,
    NEYMAN_CHI2,
    JEFFREYS,
    SOFTENED_REVERSE_KL,
    alpha_divergence(0.3),
]


@pytest.mark.parametrize("divergence", ONE_OF_EACH_FAMILY, ids=lambda d: d.name)
def test_compiles_without_a_graph_break(divergence, laws):
    torch.compiler.reset()

    def loss(log_p, log_q, mask):
        t = (log_p - log_q).exp()
        y = divergence.derivative(t)
        methods = divergence.f(t) + divergence.conjugate(y) + divergence.pseudo_reward(t.log())
        value = f_divergence(log_p, log_q, divergence, mask=mask, reduction="mean")
        return value + methods.mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    mask = torch.tensor([True, False])
    log_p, eager = laws[0].clone().requires_grad_(), laws[0].clone().requires_grad_()
    value, expected = compiled(log_p, laws[1], mask), loss(eager, laws[1], mask)
    close(value, expected)
    value.backward()
    expected.backward()
    close(log_p.grad, eager.grad)


def test_vmap_and_grad_compose(divergence, laws):
    log_p, log_q = laws

    def loss(a, b):
        return f_divergence(a, b, divergence)

    close(torch.func.vmap(loss)(log_p, log_q), loss(log_p, log_q))
    per_row = torch.func.vmap(torch.func.grad(loss))(log_p, log_q)
    reference = log_p.clone().requires_grad_()
    loss(reference, log_q).sum().backward()
    close(per_row, reference.grad)


# --- errors ------------------------------------------------------------------------------------


def test_wrong_inputs_are_named():
    good = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"q_logprobs must have the shape of p_logprobs"):
        f_divergence(good, torch.zeros(3), KL)
    with pytest.raises(TypeError, match="p_logprobs must have a floating dtype"):
        f_divergence(good.long(), good, KL)
    with pytest.raises(ValueError, match="dim must be"):
        f_divergence(good, good, KL, dim=2)
    with pytest.raises(ValueError, match="dim must be"):
        f_divergence(torch.tensor(0.0), torch.tensor(0.0), KL)
    with pytest.raises(ValueError, match="must not be empty along dim"):
        f_divergence(torch.zeros(2, 0), torch.zeros(2, 0), KL)
    with pytest.raises(ValueError, match=r"mask must have shape \[2\], got \[2, 3\]"):
        f_divergence(good, good, KL, mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="reduction must be one of"):
        f_divergence(good, good, KL, reduction="batchmean")
    with pytest.raises(ValueError, match="q_logprobs must have the shape"):
        JENSEN_SHANNON_DOUBLE.terms(good, torch.zeros(2, 1))
