import copy
import math
import pickle

import pytest
import scipy.special
import torch
from torch.autograd import gradcheck, gradgradcheck

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
    skew_jensen_shannon,
)

LOG_2 = math.log(2.0)
INF = math.inf


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


RATIOS = tensor(1e-6, 0.01, 0.3, 0.9, 1.0, 1.1, 2.5, 40.0, 1e5)
INTERIOR = tensor(0.05, 0.3, 0.9, 1.2, 2.5, 40.0)


def close(actual, expected, rtol=1e-9, atol=1e-9):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def skew_formula(b):
    return lambda t: b * t * t.log() - (b * t + 1 - b) * (b * t + 1 - b).log()


def alpha_formula(a):
    return lambda t: (t**a - a * t - (1 - a)) / (a * (a - 1))


TABLE = [  # the columns f, f(0), f'(inf) of the table of the paper, written as published
    (KL, lambda t: t * t.log(), 0.0, INF),
    (KL.centred(), lambda t: t * t.log() - t + 1, 1.0, INF),
    (REVERSE_KL, lambda t: -t.log(), INF, 0.0),
    (REVERSE_KL.centred(), lambda t: -t.log() + t - 1, INF, 1.0),
    (
        JENSEN_SHANNON,
        lambda t: (t * (2 * t / (1 + t)).log() + (2 / (1 + t)).log()) / 2,
        LOG_2 / 2,
        LOG_2 / 2,
    ),
    (
        JENSEN_SHANNON_DOUBLE,
        lambda t: t * (2 * t / (1 + t)).log() + (2 / (1 + t)).log(),
        LOG_2,
        LOG_2,
    ),
    (skew_jensen_shannon(0.2), skew_formula(0.2), -0.8 * math.log(0.8), -0.2 * math.log(0.2)),
    (TOTAL_VARIATION, lambda t: (t - 1).abs() / 2, 0.5, 0.5),
    (PEARSON_CHI2, lambda t: (t - 1) ** 2, 1.0, INF),
    (NEYMAN_CHI2, lambda t: (t - 1) ** 2 / t, INF, 1.0),
    (SQUARED_HELLINGER, lambda t: (t.sqrt() - 1) ** 2, 1.0, 1.0),
    (JEFFREYS, lambda t: (t - 1) * t.log(), INF, INF),
    (alpha_divergence(0.3), alpha_formula(0.3), 1 / 0.3, 1 / 0.7),
    (alpha_divergence(3.0), alpha_formula(3.0), 1 / 3, INF),
    (alpha_divergence(-1.0), alpha_formula(-1.0), INF, 0.5),
    (SOFTENED_REVERSE_KL, lambda t: (t + 1) * ((t + 1) / (2 * t)).log(), INF, -LOG_2),
]

CONJUGATES = [  # the column f*, with the end of its domain
    (KL, lambda y: (y - 1).exp(), INF),
    (KL.centred(), lambda y: y.exp() - 1, INF),
    (REVERSE_KL, lambda y: -1 - (-y).log(), 0.0),
    (REVERSE_KL.centred(), lambda y: -(1 - y).log(), 1.0),
    (JENSEN_SHANNON, lambda y: -(2 - (2 * y).exp()).log() / 2, LOG_2 / 2),
    (JENSEN_SHANNON_DOUBLE, lambda y: -(2 - y.exp()).log(), LOG_2),
    (
        skew_jensen_shannon(0.2),
        lambda y: -0.8 * ((1 - 0.2 * (y / 0.2).exp()) / 0.8).log(),
        -0.2 * math.log(0.2),
    ),
    (TOTAL_VARIATION, lambda y: y.clamp(min=-0.5), 0.5),
    (PEARSON_CHI2, lambda y: torch.where(y < -2, -1.0, y + y**2 / 4), INF),
    (NEYMAN_CHI2, lambda y: 2 - 2 * (1 - y).sqrt(), 1.0),
    (SQUARED_HELLINGER, lambda y: y / (1 - y), 1.0),
    (alpha_divergence(0.3), lambda y: ((1 - 0.7 * y) ** (-0.3 / 0.7) - 1) / 0.3, 1 / 0.7),
    (
        SOFTENED_REVERSE_KL.reversed(),
        lambda y: torch.where(y < 1 - LOG_2, LOG_2, 2 * (y - 1).exp() - y),
        INF,
    ),
]


@pytest.mark.parametrize(("divergence", "formula", "at_zero", "slope"), TABLE)
def test_values_are_those_of_the_published_table(divergence, formula, at_zero, slope):
    close(divergence.f(RATIOS), formula(RATIOS))
    assert divergence.at_zero == pytest.approx(at_zero, abs=1e-15)
    assert divergence.slope_at_infinity == pytest.approx(slope, abs=1e-15)


@pytest.mark.parametrize(("divergence", "formula", "end"), CONJUGATES)
def test_conjugates_are_those_of_the_published_table(divergence, formula, end):
    y = tensor(-50.0, -3.0, -2.0, -1.0, -0.4, -1e-3, 0.1, 0.29, 0.6, 0.9, 3.0)
    inside = y[y < end]
    close(divergence.conjugate(inside), formula(inside))
    outside = y[y > end]
    assert torch.equal(divergence.conjugate(outside), torch.full_like(outside, INF))


def test_generator_is_zero_at_one_and_its_ends_are_the_attributes(divergence):
    close(divergence.f(tensor(1.0)), tensor(0.0), atol=1e-15)
    close(divergence.f(tensor(0.0)), tensor(divergence.at_zero))
    if math.isfinite(divergence.slope_at_infinity):
        t = tensor(1e30)
        close(divergence.f(t) / t, tensor(divergence.slope_at_infinity), 1e-4)
    else:
        assert divergence.f(tensor(1e30)) / 1e30 > 60


def test_derivatives_match_central_differences(divergence):
    h = 1e-4 * INTERIOR
    f, derivative = divergence.f, divergence.derivative
    close(derivative(INTERIOR), (f(INTERIOR + h) - f(INTERIOR - h)) / (2 * h), 1e-6, 1e-6)
    numeric = (derivative(INTERIOR + h) - derivative(INTERIOR - h)) / (2 * h)
    close(divergence.second_derivative(INTERIOR), numeric, 1e-6, 1e-6)


def test_derivatives_match_autograd(divergence):
    t = INTERIOR.clone().requires_grad_()
    (first,) = torch.autograd.grad(divergence.f(t).sum(), t, create_graph=True)
    close(first, divergence.derivative(t))
    close(torch.autograd.grad(first.sum(), t)[0], divergence.second_derivative(t))


def test_derivative_at_log_is_the_derivative(divergence):
    close(divergence.derivative_at_log(RATIOS.log()), divergence.derivative(RATIOS))
    close(divergence.pseudo_reward(RATIOS.log()), -divergence.derivative(RATIOS))


def test_derivative_at_log_keeps_its_limits(divergence):
    log_t = tensor(-INF, -1e4, 1e4, INF)
    low, nearly_low, nearly_high, high = divergence.derivative_at_log(log_t).tolist()
    assert high == pytest.approx(divergence.slope_at_infinity, abs=1e-12)
    assert low <= nearly_low <= nearly_high <= high
    if math.isfinite(low):
        assert nearly_low == pytest.approx(low, abs=1e-9)
    assert low == divergence.derivative(tensor(0.0)).item()


@pytest.mark.parametrize(
    ("divergence", "rewards"),
    [  # pseudo-rewards at log t = -inf, 0, +inf (table of the policy-gradient theorem)
        (REVERSE_KL, (INF, 1.0, 0.0)),
        (KL, (INF, -1.0, -INF)),
        (JENSEN_SHANNON_DOUBLE, (INF, 0.0, -LOG_2)),
        (TOTAL_VARIATION, (0.5, 0.0, -0.5)),
        (PEARSON_CHI2, (2.0, 0.0, -INF)),
        (NEYMAN_CHI2, (INF, 0.0, -1.0)),
        (SQUARED_HELLINGER, (INF, 0.0, -1.0)),
        (alpha_divergence(0.4), (INF, 0.0, -1.0 / 0.6)),
    ],
)
def test_pseudo_rewards_at_the_ends(divergence, rewards):
    close(divergence.pseudo_reward(tensor(-INF, 0.0, INF)), tensor(*rewards))


def test_conjugate_is_the_supremum_of_its_definition(divergence):
    t = torch.cat([tensor(0.0), torch.logspace(-6, 4, 200_001, dtype=torch.float64)])
    slopes = divergence.derivative(tensor(1e-3, 0.1, 0.7, 1.0, 1.4, 8.0, 300.0))
    y = torch.cat([slopes, slopes[:1] - 0.3])
    brute = (y[:, None] * t - divergence.f(t)).amax(-1)
    close(divergence.conjugate(y), brute, 1e-6, 1e-6)


def test_fenchel_equality_holds_at_the_derivative(divergence):
    y = divergence.derivative(RATIOS)
    close(divergence.f(RATIOS) + divergence.conjugate(y), RATIOS * y)


def test_conjugate_at_zero_is_minus_the_minimum(divergence):
    t = torch.logspace(-9, 9, 400_001, dtype=torch.float64)
    minimum, at = divergence.f(t).min(0)
    if t[at] < 1e8:
        close(divergence.conjugate(tensor(0.0)), -minimum[None], 1e-6, 1e-6)
    else:  # unbounded below: -log t and its softened form
        assert divergence.conjugate(tensor(0.0)) == INF


def test_gradient_of_the_conjugate_is_the_maximising_ratio(divergence):
    if divergence == TOTAL_VARIATION:
        return  # the maximiser is not unique at the kink
    y = divergence.derivative(INTERIOR).requires_grad_()
    (ratio,) = torch.autograd.grad(divergence.conjugate(y).sum(), y, create_graph=True)
    close(ratio, INTERIOR)
    (curvature,) = torch.autograd.grad(ratio.sum(), y)
    close(curvature, 1 / divergence.second_derivative(INTERIOR), 1e-7, 1e-7)


def test_conjugate_ends(divergence):
    y = tensor(-INF, divergence.slope_at_infinity, INF).requires_grad_()
    value = divergence.conjugate(y)
    assert value[0] == -divergence.at_zero
    assert value[2] == INF
    if math.isfinite(divergence.slope_at_infinity):
        # At the end of the domain: the limit of t f'(t) - f(t).
        close(value[1], -divergence.reversed().derivative(tensor(0.0))[0])
    assert divergence.conjugate(tensor(math.nan)).isnan()


@pytest.mark.parametrize("y", [-1e4, -30.0, -1.0, 0.0, 0.5, 1.0, 3.0, 600.0])
def test_jeffreys_conjugate_agrees_with_lambert_w(y):
    if y < -500:  # W(exp z) has no float64 argument here: check z = log w + w instead
        w = scipy.special.wrightomega(1 - y)
    else:
        w = scipy.special.lambertw(math.exp(1 - y)).real
    close(JEFFREYS.conjugate(tensor(y)), tensor(w + 1 / w + y - 2))


@pytest.mark.parametrize("y", [-600.0, -5.0, -1.0, -0.8, -0.7])
def test_softened_reverse_kl_conjugate_agrees_with_lambert_w(y):
    v = -scipy.special.lambertw(-2 * math.exp(y - 1), -1).real
    close(SOFTENED_REVERSE_KL.conjugate(tensor(y)), tensor(-1 - math.log(v / 2)))


def test_conjugates_do_not_overflow_before_their_value_does():
    y = torch.tensor([-1e4, -100.0, 80.0])
    assert JEFFREYS.conjugate(y).isfinite().all()
    assert SOFTENED_REVERSE_KL.conjugate(torch.tensor([-1e4, -100.0])).isfinite().all()


def test_reversed_is_the_perspective(divergence):
    twin = divergence.reversed()
    close(twin.f(INTERIOR), INTERIOR * divergence.f(1 / INTERIOR))
    inverse = 1 / INTERIOR
    close(
        twin.derivative(INTERIOR),
        divergence.f(inverse) - divergence.derivative(inverse) * inverse,
    )
    close(twin.second_derivative(INTERIOR), divergence.second_derivative(inverse) / INTERIOR**3)
    assert (twin.at_zero, twin.slope_at_infinity) == (
        divergence.slope_at_infinity,
        divergence.at_zero,
    )
    close(
        twin.conjugate(twin.derivative(INTERIOR)) + twin.f(INTERIOR),
        INTERIOR * twin.derivative(INTERIOR),
    )
    assert twin.reversed() == divergence
    close(twin.reversed().f(INTERIOR), divergence.f(INTERIOR), atol=0)


@pytest.mark.parametrize(
    ("divergence", "twin"),
    [
        (KL, REVERSE_KL),
        (KL.centred(), REVERSE_KL.centred()),
        (JENSEN_SHANNON, JENSEN_SHANNON),
        (JENSEN_SHANNON_DOUBLE, JENSEN_SHANNON_DOUBLE),
        (TOTAL_VARIATION, TOTAL_VARIATION),
        (PEARSON_CHI2, NEYMAN_CHI2),
        (SQUARED_HELLINGER, SQUARED_HELLINGER),
        (JEFFREYS, JEFFREYS),
        (alpha_divergence(0.3), alpha_divergence(0.7)),
        (skew_jensen_shannon(0.2), skew_jensen_shannon(0.8)),
        (skew_jensen_shannon(0.0, rescaled=True), skew_jensen_shannon(1.0, rescaled=True)),
    ],
)
def test_reversing_a_known_divergence_gives_its_known_twin(divergence, twin):
    swapped = divergence.reversed()
    assert swapped == twin
    y = twin.derivative(INTERIOR)
    for name, at in (("f", INTERIOR), ("derivative", INTERIOR), ("second_derivative", INTERIOR)):
        close(getattr(swapped, name)(at), getattr(twin, name)(at))
    close(swapped.conjugate(y), twin.conjugate(y))


def test_centred_generators_are_non_negative_and_flat_at_one(divergence):
    centred = divergence.centred()
    one = tensor(1.0)
    close(centred.derivative(one), tensor(0.0), atol=1e-15)
    assert (centred.f(RATIOS) >= -1e-12).all()
    close(
        centred.f(RATIOS),
        divergence.f(RATIOS) - divergence.derivative(one) * (RATIOS - 1),
    )
    assert centred.centred() is centred


ALPHA_LIMITS = [
    (1.0, KL.centred(), 1.0),
    (0.0, REVERSE_KL.centred(), 1.0),
    (0.5, SQUARED_HELLINGER, 2.0),
    (2.0, PEARSON_CHI2, 0.5),
    (-1.0, NEYMAN_CHI2, 0.5),
]


@pytest.mark.parametrize(("order", "known", "factor"), ALPHA_LIMITS)
@pytest.mark.parametrize("step", [0.0, 1e-12, -1e-12, 1e-300])
def test_alpha_family_passes_through_the_known_divergences(order, known, factor, step):
    alpha = alpha_divergence(order + step)
    close(alpha.f(INTERIOR), factor * known.f(INTERIOR))
    close(alpha.derivative(INTERIOR), factor * known.derivative(INTERIOR))
    close(alpha.second_derivative(INTERIOR), factor * known.second_derivative(INTERIOR))
    y = alpha.derivative(INTERIOR)
    close(alpha.conjugate(y), factor * known.conjugate(y / factor))


def test_alpha_derivative_is_the_f_dpo_score_of_one_minus_the_order():
    alpha = 0.3
    expected = (1 - INTERIOR**-alpha) / alpha
    close(alpha_divergence(1 - alpha).derivative(INTERIOR), expected)


@pytest.mark.parametrize(("beta", "end"), [(0.0, KL), (1.0, REVERSE_KL)])
def test_rescaled_skew_reaches_the_two_kls_without_a_jump(beta, end):
    near = skew_jensen_shannon(abs(beta - 1e-10), rescaled=True)
    at = skew_jensen_shannon(beta, rescaled=True)
    for divergence in (near, at):
        close(divergence.f(INTERIOR), end.centred().f(INTERIOR), 1e-6, 1e-6)
        close(divergence.derivative(INTERIOR), end.centred().derivative(INTERIOR), 1e-6, 1e-6)


def test_raw_skew_vanishes_at_the_ends():
    assert skew_jensen_shannon(1e-9).f(INTERIOR).max() < 2e-7


def test_softened_reverse_kl_and_double_js_add_up_to_reverse_kl():
    total = JENSEN_SHANNON_DOUBLE.f(RATIOS) + SOFTENED_REVERSE_KL.f(RATIOS)
    close(total, REVERSE_KL.f(RATIOS))


@pytest.mark.parametrize(
    ("divergence", "weight"),
    [  # h(r) = r^2 f''(r), the weights of distribution matching
        (REVERSE_KL, torch.ones_like),
        (SOFTENED_REVERSE_KL, lambda r: 1 / (r + 1)),
        (JENSEN_SHANNON_DOUBLE, lambda r: r / (r + 1)),
        (SQUARED_HELLINGER, lambda r: r.sqrt() / 2),
        (KL, lambda r: r),
        (JEFFREYS, lambda r: r + 1),
        (NEYMAN_CHI2, lambda r: 2 / r),
    ],
)
def test_curvature_weights_are_those_of_distribution_matching(divergence, weight):
    close(RATIOS**2 * divergence.second_derivative(RATIOS), weight(RATIOS))


def test_second_derivative_at_zero_has_no_nan(divergence):
    value = divergence.second_derivative(tensor(0.0))
    assert not value.isnan().any()


def test_gradients_of_the_methods_pass_gradcheck(divergence):
    t = tensor(0.2, 0.8, 1.7, 6.0).requires_grad_()
    assert gradcheck(divergence.f, t)
    assert gradcheck(divergence.derivative_at_log, t)
    assert gradgradcheck(divergence.f, t)
    if divergence != TOTAL_VARIATION:
        assert gradcheck(divergence.conjugate, divergence.derivative(t).detach().requires_grad_())


def test_gradient_at_ratio_zero_is_not_nan(divergence):
    t = tensor(0.0, 1.5).requires_grad_()
    value = divergence.f(t)
    value[1].backward()
    assert not t.grad.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(divergence, dtype):
    t = torch.tensor([0.25, 1.0, 3.0], dtype=dtype)
    for method in (divergence.f, divergence.derivative, divergence.second_derivative):
        value = method(t)
        assert value.dtype == dtype
        assert torch.equal(value, method(t.float()).to(dtype))


def test_divergences_survive_pickle_and_copy(divergence):
    for twin in (pickle.loads(pickle.dumps(divergence)), copy.deepcopy(divergence)):
        assert twin == divergence
        assert torch.equal(twin.f(RATIOS), divergence.f(RATIOS))


def test_divergence_is_frozen():
    with pytest.raises(AttributeError):
        KL.name = "other"


def test_names_distinguish_the_generators():
    assert alpha_divergence(0.5) != alpha_divergence(0.51)
    assert skew_jensen_shannon(0.5) != skew_jensen_shannon(0.5, rescaled=True)
    assert len({KL, REVERSE_KL, KL.reversed().reversed()}) == 2


@pytest.mark.parametrize("order", [INF, -INF, math.nan])
def test_alpha_order_must_be_finite(order):
    with pytest.raises(ValueError, match="order"):
        alpha_divergence(order)


@pytest.mark.parametrize(
    ("beta", "rescaled"),
    [(0.0, False), (1.0, False), (-0.1, True), (1.1, True), (math.nan, True)],
)
def test_skew_must_lie_between_the_two_laws(beta, rescaled):
    with pytest.raises(ValueError, match="beta"):
        skew_jensen_shannon(beta, rescaled)


def test_methods_refuse_what_is_not_a_floating_tensor():
    with pytest.raises(TypeError, match=r"t must be a torch\.Tensor, got float"):
        KL.f(0.5)
    with pytest.raises(TypeError, match=r"log_t must have a floating dtype, got torch\.int64"):
        KL.derivative_at_log(torch.tensor([1]))


def test_nan_in_gives_nan_out(divergence):
    bad = tensor(math.nan)
    for name in ("f", "derivative", "second_derivative", "conjugate"):
        assert getattr(divergence, name)(bad).isnan().all()
    assert divergence.f(tensor(-1.0)).isnan().all()
