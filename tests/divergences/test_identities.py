"""The theorems that tie the divergences together, and to the policy gradient.

The numbers in the section titles are those of the identities listed for Go et al. (2023),
arXiv:2302.08215: the first argument is the policy, the second the target.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.divergences import (
    JEFFREYS,
    JENSEN_SHANNON,
    JENSEN_SHANNON_DOUBLE,
    KL,
    PEARSON_CHI2,
    REVERSE_KL,
    SQUARED_HELLINGER,
    TOTAL_VARIATION,
    alpha_divergence,
    f_divergence,
    monte_carlo_divergence,
    skew_jensen_shannon,
)

LOG_2 = math.log(2.0)
ONE = torch.ones((), dtype=torch.float64)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(actual, expected, rtol=1e-9, atol=1e-9):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


logits = st.lists(st.floats(-8, 8), min_size=5, max_size=5)


def law(values):
    return torch.tensor(values, dtype=torch.float64).log_softmax(-1)


def policy_gradient(policy_logits, log_target, divergence, baseline=0.0):
    """Gradient of -sum_x pi(x) (r(x) - B) log pi(x) with the reward held fixed, by enumeration."""
    log_pi = policy_logits.log_softmax(-1)
    reward = divergence.pseudo_reward((log_pi - log_target).detach())
    loss = -(log_pi.exp().detach() * (reward - baseline) * log_pi).sum()
    return torch.autograd.grad(loss, policy_logits)[0]


# --- 1. the gradient theorem -------------------------------------------------------------------


def test_policy_gradient_is_the_gradient_of_the_divergence(divergence, laws):
    policy_logits, log_target = laws[0][0].clone().requires_grad_(), laws[1][0]
    value = f_divergence(policy_logits.log_softmax(-1), log_target, divergence)
    (exact,) = torch.autograd.grad(value, policy_logits)
    close(policy_gradient(policy_logits, log_target, divergence), exact)


def test_policy_gradient_uses_the_slope_at_infinity_where_the_target_is_empty(divergence, laws):
    if math.isinf(divergence.slope_at_infinity):
        return  # the theorem needs the support of the policy inside that of the target
    policy_logits = laws[0][0].clone().requires_grad_()
    log_target = tensor(0.1, 0.2, 0.3, 0.4, 0.0, 0.0).log()
    value = f_divergence(policy_logits.log_softmax(-1), log_target, divergence)
    (exact,) = torch.autograd.grad(value, policy_logits)
    close(policy_gradient(policy_logits, log_target, divergence), exact)


# --- 2. f and f + c (t - 1) are the same divergence --------------------------------------------


def test_adding_a_multiple_of_t_minus_one_shifts_every_reward_by_a_constant(divergence, laws):
    centred = divergence.centred()
    log_t = laws[0][0] - laws[1][0]
    shift = centred.pseudo_reward(log_t) - divergence.pseudo_reward(log_t)
    close(shift, divergence.slope_at_one * torch.ones_like(shift))
    policy_logits = laws[0][0].clone().requires_grad_()
    close(
        policy_gradient(policy_logits, laws[1][0], centred),
        policy_gradient(policy_logits, laws[1][0], divergence),
    )
    close(f_divergence(*laws, centred), f_divergence(*laws, divergence))


# --- 3. symmetry and perspective ---------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(p=logits, q=logits)
@pytest.mark.parametrize(
    "symmetric",
    [JENSEN_SHANNON, JENSEN_SHANNON_DOUBLE, TOTAL_VARIATION, SQUARED_HELLINGER, JEFFREYS],
    ids=lambda d: d.name,
)
def test_symmetric_divergences_are_symmetric(symmetric, p, q):
    forward, backward = (
        f_divergence(a, b, symmetric) for a, b in ((law(p), law(q)), (law(q), law(p)))
    )
    close(forward, backward)


@settings(deadline=None, max_examples=25)
@given(p=logits, q=logits, order=st.floats(-3, 3), beta=st.floats(0.01, 0.99))
def test_families_are_closed_under_swapping_the_arguments(p, q, order, beta):
    log_p, log_q = law(p), law(q)
    close(
        f_divergence(log_p, log_q, alpha_divergence(order)),
        f_divergence(log_q, log_p, alpha_divergence(1 - order)),
        1e-8,
    )
    close(
        f_divergence(log_p, log_q, skew_jensen_shannon(beta)),
        f_divergence(log_q, log_p, skew_jensen_shannon(1 - beta)),
    )


# --- 4. bounds ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(p=logits, q=logits)
def test_classical_inequalities(p, q):
    log_p, log_q = law(p), law(q)
    value = {
        d: f_divergence(log_p, log_q, d).item()
        for d in (KL, JENSEN_SHANNON, TOTAL_VARIATION, SQUARED_HELLINGER, PEARSON_CHI2)
    }
    kl, js, tv, h2, chi2 = value.values()
    slack = 1e-12
    assert -slack <= js <= LOG_2 + slack
    assert tv <= 1 + slack
    assert tv <= math.sqrt(max(kl, 0) / 2) + 1e-8  # Pinsker
    assert h2 / 2 <= tv + slack
    assert tv <= math.sqrt(max(h2 - h2 * h2 / 4, 0)) + 1e-8
    assert kl <= math.log1p(chi2) + slack


@settings(deadline=None, max_examples=50)
@given(p=logits, q=logits, order=st.floats(-2, 3))
def test_alpha_divergences_are_non_negative(p, q, order):
    assert f_divergence(law(p), law(q), alpha_divergence(order)) >= -1e-12


# --- 5. Fenchel ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(log_t=st.floats(-12, 12), log_s=st.floats(-12, 12))
def test_fenchel_young_inequality_with_equality_at_the_derivative(divergence, log_t, log_s):
    t, s = tensor(log_t).exp(), tensor(log_s).exp()
    y = divergence.derivative(s)
    gap = divergence.f(t) + divergence.conjugate(y) - t * y
    assert gap >= -1e-9 * (1 + (t * y).abs() + divergence.f(t).abs())
    close(divergence.f(s) + divergence.conjugate(y), s * y, 1e-9, 1e-7)


def test_variational_bound_is_tight_at_the_optimal_witness(divergence, laws):
    log_p, log_q = laws[0][0], laws[1][0]
    witness = divergence.derivative_at_log(log_p - log_q)
    bound = (log_p.exp() * witness - log_q.exp() * divergence.conjugate(witness)).sum()
    close(bound, f_divergence(log_p, log_q, divergence))


# --- 6, 7. reductions ---------------------------------------------------------------------------


def test_kl_to_the_tilted_reference_is_the_regularised_reward_gradient(laws):
    policy_logits, log_ref = laws[0][0].clone().requires_grad_(), laws[1][0]
    reward, beta = torch.linspace(-1, 1, 6, dtype=torch.float64), 0.3
    log_pi = policy_logits.log_softmax(-1)
    objective = (log_pi.exp() * reward).sum() - beta * f_divergence(log_pi, log_ref, KL)
    (ascent,) = torch.autograd.grad(objective, policy_logits)
    log_target = (log_ref + reward / beta).log_softmax(-1)
    close(ascent, -beta * policy_gradient(policy_logits, log_target, KL))


def test_reverse_kl_reward_weights_samples_by_the_target_over_the_policy(laws):
    policy_logits, log_target = laws[0][0].clone().requires_grad_(), laws[1][0]
    log_pi = policy_logits.log_softmax(-1)
    # Distributional policy gradient: -E_q[(P/q)/Z grad log pi], here with q = pi.
    (dpg,) = torch.autograd.grad(-(log_target.exp() * log_pi).sum(), policy_logits)
    close(policy_gradient(policy_logits, log_target, REVERSE_KL), dpg)
    log_t = (log_pi - log_target).detach()
    close(REVERSE_KL.pseudo_reward(log_t), (-log_t).exp())


# --- 8. at the optimum --------------------------------------------------------------------------


def test_at_the_target_all_advantages_vanish(divergence, laws):
    log_target = laws[0][0]
    policy_logits = log_target.clone().requires_grad_()
    log_t = policy_logits.detach() - log_target
    reward = divergence.pseudo_reward(log_t)
    close(reward, -divergence.slope_at_one * torch.ones_like(reward))
    gradient = policy_gradient(policy_logits, log_target, divergence, -divergence.slope_at_one)
    close(gradient, torch.zeros_like(gradient), atol=1e-14)
    (exact,) = torch.autograd.grad(
        f_divergence(policy_logits.log_softmax(-1), log_target, divergence), policy_logits
    )
    close(exact, torch.zeros_like(exact), atol=1e-14)


# --- 9. data processing -------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(p=logits, q=logits)
def test_merging_outcomes_never_increases_a_divergence(divergence, p, q):
    log_p, log_q = law(p), law(q)

    def merge(log_x):
        return torch.cat([log_x[:3], log_x[3:].logsumexp(0, keepdim=True)])

    merged = f_divergence(merge(log_p), merge(log_q), divergence)
    whole = f_divergence(log_p, log_q, divergence)
    assert merged <= whole + 1e-9 * (1 + whole.abs())


# --- 11. partition function ---------------------------------------------------------------------


def test_unnormalised_targets_only_need_the_partition_function(divergence, laws):
    log_pi, log_target = laws[0][0], laws[1][0]
    log_score = log_target + 1.7  # log P = log p + log Z
    proposal = torch.full_like(log_pi, -math.log(6))
    # The mean of P/q over a proposal that enumerates the space is Z exactly.
    log_z = (log_score - proposal).logsumexp(0) - math.log(6)
    close(log_z, 1.7 * ONE)
    estimate = monte_carlo_divergence(
        log_pi - log_score + log_z, divergence, log_weights=log_score - proposal
    )
    close(estimate, f_divergence(log_pi, log_target, divergence))


# --- 12. second order ---------------------------------------------------------------------------

CURVATURES = [
    (JENSEN_SHANNON, 0.25),
    (JENSEN_SHANNON_DOUBLE, 0.5),
    (KL, 1.0),
    (REVERSE_KL, 1.0),
    (PEARSON_CHI2, 2.0),
    (SQUARED_HELLINGER, 0.5),
    (JEFFREYS, 2.0),
    (alpha_divergence(0.3), 1.0),
    (skew_jensen_shannon(0.2), 0.16),
    (skew_jensen_shannon(0.2, rescaled=True), 1.0),
]


@pytest.mark.parametrize(("divergence", "curvature"), CURVATURES)
def test_every_divergence_is_a_chi_square_nearby(divergence, curvature):
    close(divergence.second_derivative(ONE), curvature * ONE)
    p, direction, eps = tensor(0.2, 0.3, 0.5), tensor(1.0, 1.0, -2.0), 1e-5
    value = f_divergence((p + eps * direction).log(), p.log(), divergence)
    close(value / eps**2, curvature / 2 * (direction**2 / p).sum(), 1e-3, 0.0)


# --- 13. the hand case: pi = (1/2, 1/2), p = (1, 0) ---------------------------------------------


@pytest.mark.parametrize(
    ("divergence", "value"),
    [
        (REVERSE_KL, LOG_2),
        (KL, math.inf),
        (TOTAL_VARIATION, 0.5),
        (JENSEN_SHANNON_DOUBLE, 0.4315231086776713),
        (JENSEN_SHANNON, 0.4315231086776713 / 2),
    ],
)
def test_hand_case(divergence, value):
    policy, target = tensor(0.5, 0.5).log(), tensor(1.0, 0.0).log()
    close(f_divergence(policy, target, divergence), value * ONE, atol=1e-15)
    assert pytest.approx(1.5 * math.log(4 / 3), abs=1e-15) == 0.4315231086776713


# --- conventions: the test that each known mistake fails ----------------------------------------


def test_argument_order_of_the_kl():
    p, q = tensor(0.9, 0.1).log(), tensor(0.5, 0.5).log()
    close(f_divergence(p, q, KL), (0.9 * math.log(1.8) + 0.1 * math.log(0.2)) * ONE)
    close(f_divergence(p, q, REVERSE_KL), 0.5 * math.log(0.25 / 0.09) * ONE)


def test_mixture_weight_belongs_to_the_first_argument():
    # With beta near 0 the mixture is q, and D/beta is KL(p || q): swapped weights give KL(q || p).
    p, q = tensor(0.9, 0.1).log(), tensor(0.5, 0.5).log()
    scaled = f_divergence(p, q, skew_jensen_shannon(1e-7)) / 1e-7
    close(scaled, f_divergence(p, q, KL), 1e-5)


def test_jensen_shannon_takes_the_kl_to_the_mixture_not_from_it():
    # KL(m || p) instead of KL(p || m) is infinite on disjoint supports; the divergence is log 2.
    p, q = tensor(1.0, 0.0).log(), tensor(0.0, 1.0).log()
    close(f_divergence(p, q, JENSEN_SHANNON), LOG_2 * ONE)


def test_chi_squares_are_not_swapped():
    p, q = tensor(0.5, 0.5).log(), tensor(1.0, 0.0).log()
    assert f_divergence(p, q, PEARSON_CHI2) == math.inf
    close(f_divergence(p, q, PEARSON_CHI2.reversed()), ONE)
