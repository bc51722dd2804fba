"""f-DPG against enumeration of a small space of sequences, and its theorems."""

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
    NEYMAN_CHI2,
    PEARSON_CHI2,
    REVERSE_KL,
    SOFTENED_REVERSE_KL,
    SQUARED_HELLINGER,
    TOTAL_VARIATION,
    alpha_divergence,
    f_divergence,
    monte_carlo_divergence,
    skew_jensen_shannon,
)
from steelyard.preference import (
    LogPartition,
    RunningBaseline,
    dpg_divergence,
    dpg_loss,
    dpg_pseudo_rewards,
    exponential_log_target,
    fit_distributional_constraints,
    leave_one_out_baseline,
    pointwise_log_target,
    rlhf_log_target,
    variance_optimal_baseline,
)

EVERY = [
    KL,
    REVERSE_KL,
    JENSEN_SHANNON,
    JENSEN_SHANNON_DOUBLE,
    TOTAL_VARIATION,
    PEARSON_CHI2,
    NEYMAN_CHI2,
    SQUARED_HELLINGER,
    JEFFREYS,
    SOFTENED_REVERSE_KL,
    alpha_divergence(0.5),
    alpha_divergence(-0.7),
    alpha_divergence(2.5),
    skew_jensen_shannon(0.2),
]
FINITE_WHERE_FORBIDDEN = [d for d in EVERY if math.isfinite(d.slope_at_infinity)]
by_name = pytest.mark.parametrize("divergence", EVERY, ids=lambda d: d.name)
quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)
close = {"rtol": 1e-9, "atol": 1e-10}
VOCABULARY, LENGTH = 3, 3


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def sequences() -> torch.Tensor:
    return torch.cartesian_prod(*[torch.arange(VOCABULARY)] * LENGTH)


def sequence_logprobs(parameters: list[torch.Tensor]) -> torch.Tensor:
    """Log-probability of all 27 sequences under an autoregressive table, summed over tokens."""
    every, prefix = sequences(), torch.zeros(VOCABULARY**LENGTH, dtype=torch.long)
    total = torch.zeros(len(every), dtype=torch.float64)
    for t, table in enumerate(parameters):
        total = total + table.log_softmax(-1)[prefix, every[:, t]]
        prefix = prefix * VOCABULARY + every[:, t]
    return total


def policy(seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    parameters = [
        normal(seed + t, VOCABULARY**t, VOCABULARY).requires_grad_() for t in range(LENGTH)
    ]
    return parameters, sequence_logprobs(parameters)


def gradient(value: torch.Tensor, parameters: list[torch.Tensor]) -> torch.Tensor:
    grads = torch.autograd.grad(value, parameters, retain_graph=True)
    return torch.cat([g.flatten() for g in grads])


def target(seed: int, *, with_zeros: bool = False) -> torch.Tensor:
    scores = normal(seed, VOCABULARY**LENGTH)
    if with_zeros:
        scores[::3] = -math.inf
    return scores


# --- the gradient theorem ----------------------------------------------------------------------


@by_name
@pytest.mark.parametrize("baseline", [0.0, 3.0])
def test_expected_gradient_on_policy_is_that_of_the_divergence(divergence, baseline):
    for seed in range(2):
        parameters, log_pi = policy(seed)
        scores = target(seed + 100)
        losses = dpg_loss(
            log_pi,
            scores + 7.0,
            scores.logsumexp(0) + 7.0,
            divergence=divergence,
            baseline=baseline,
            reduction="none",
        )
        ours = gradient((log_pi.exp().detach() * losses).sum(), parameters)
        exact = gradient(f_divergence(log_pi, scores.log_softmax(0), divergence), parameters)
        torch.testing.assert_close(ours, exact, **close)


@by_name
def test_expected_gradient_off_policy_is_that_of_the_divergence(divergence):
    for seed in range(2):
        parameters, log_pi = policy(seed)
        scores = target(seed + 100)
        log_q = normal(seed + 200, len(scores)).log_softmax(0)
        losses = dpg_loss(
            log_pi,
            scores,
            float(scores.logsumexp(0)),
            divergence=divergence,
            proposal_logprobs=log_q,
            baseline=torch.tensor(-2.0),
            reduction="none",
        )
        ours = gradient((log_q.exp() * losses).sum(), parameters)
        exact = gradient(f_divergence(log_pi, scores.log_softmax(0), divergence), parameters)
        torch.testing.assert_close(ours, exact, **close)


@pytest.mark.parametrize("divergence", FINITE_WHERE_FORBIDDEN, ids=lambda d: d.name)
def test_gradient_theorem_holds_with_forbidden_sequences(divergence):
    parameters, log_pi = policy(1)
    scores = target(2, with_zeros=True)
    losses = dpg_loss(log_pi, scores, scores.logsumexp(0), divergence=divergence, reduction="none")
    ours = gradient((log_pi.exp().detach() * losses).sum(), parameters)
    exact = gradient(f_divergence(log_pi, scores.log_softmax(0), divergence), parameters)
    torch.testing.assert_close(ours, exact, **close)


@by_name
def test_gradient_of_a_conditional_target_is_the_mean_over_contexts(divergence):
    contexts = torch.arange(2).repeat_interleave(VOCABULARY**LENGTH)
    (p0, log_pi0), (p1, log_pi1) = policy(3), policy(30)
    scores = torch.stack((target(4), target(5) + 9.0))
    log_pi = torch.cat((log_pi0, log_pi1))
    # Uniform draws, all of them once: the running estimate is exact.
    partition = LogPartition(num_contexts=2)
    partition.update(scores.flatten() + math.log(VOCABULARY**LENGTH), contexts)
    losses = dpg_loss(
        log_pi,
        scores.flatten(),
        partition.value[contexts],
        divergence=divergence,
        reduction="none",
    )
    ours = gradient((log_pi.exp().detach() * losses).sum() / 2, p0 + p1)
    pairs = zip((log_pi0, log_pi1), scores.log_softmax(-1), strict=True)
    exact = sum(f_divergence(a, b, divergence) for a, b in pairs) / 2
    torch.testing.assert_close(ours, gradient(exact, p0 + p1), **close)


def test_value_is_the_surrogate_written_out():
    log_pi, scores, log_q = normal(0, 9) - 5, normal(1, 9) - 5, normal(2, 9) - 5
    losses = dpg_loss(
        log_pi,
        scores,
        0.3,
        divergence=JENSEN_SHANNON_DOUBLE,
        proposal_logprobs=log_q,
        baseline=0.2,
        reduction="none",
    )
    reward = torch.log((1 + torch.exp(scores - 0.3 - log_pi)) / 2)
    expected = -(log_pi - log_q).exp() * (reward - 0.2) * log_pi
    torch.testing.assert_close(losses, expected, **close)


@pytest.mark.parametrize("divergence", FINITE_WHERE_FORBIDDEN, ids=lambda d: d.name)
def test_a_bounded_step_along_the_gradient_lowers_the_divergence(divergence):
    parameters, log_pi = policy(6)
    scores = target(7, with_zeros=True)
    losses = dpg_loss(log_pi, scores, scores.logsumexp(0), divergence=divergence, reduction="none")
    step = torch.autograd.grad((log_pi.exp().detach() * losses).sum(), parameters)
    moved = [p.detach() - 1e-3 * g for p, g in zip(parameters, step, strict=True)]
    log_p = scores.log_softmax(0)
    before = f_divergence(log_pi, log_p, divergence)
    assert f_divergence(sequence_logprobs(moved), log_p, divergence) < before


# --- pseudo-rewards ----------------------------------------------------------------------------

TABLE = [
    (REVERSE_KL, lambda t: 1 / t, 0.0),
    (KL, lambda t: -(t.log() + 1), -math.inf),
    (JENSEN_SHANNON_DOUBLE, lambda t: ((1 + 1 / t) / 2).log(), -math.log(2)),
    (TOTAL_VARIATION, lambda t: -torch.sign(t - 1) / 2, -0.5),
    (PEARSON_CHI2, lambda t: 2 * (1 - t), -math.inf),
    (NEYMAN_CHI2, lambda t: t**-2 - 1, -1.0),
    (SQUARED_HELLINGER, lambda t: 1 / t.sqrt() - 1, -1.0),
    (alpha_divergence(0.3), lambda t: (t**-0.7 - 1) / 0.7, -1 / 0.7),
]


@pytest.mark.parametrize(("divergence", "formula", "forbidden"), TABLE, ids=lambda x: str(x)[:20])
def test_pseudo_rewards_are_those_of_the_table(divergence, formula, forbidden):
    log_pi, scores, log_z = normal(0, 40), normal(1, 40), 0.7
    rewards = dpg_pseudo_rewards(log_pi, scores, log_z, divergence=divergence)
    t = (log_pi - scores + log_z).exp()
    torch.testing.assert_close(rewards, formula(t), rtol=1e-10, atol=1e-10)
    scores = scores.fill_(-math.inf)
    rewards = dpg_pseudo_rewards(log_pi, scores, log_z, divergence=divergence)
    torch.testing.assert_close(rewards, torch.full_like(rewards, forbidden))
    assert not dpg_pseudo_rewards(
        log_pi.requires_grad_(), log_pi, 0.0, divergence=divergence
    ).requires_grad


@by_name
def test_at_the_target_every_advantage_and_the_gradient_are_zero(divergence):
    _, log_pi = policy(8)
    log_pi = log_pi.detach().requires_grad_()
    slope = divergence.derivative(torch.ones((), dtype=torch.float64))
    scores = log_pi.detach() + 4.0
    rewards = dpg_pseudo_rewards(log_pi, scores, 4.0, divergence=divergence)
    if divergence != TOTAL_VARIATION:  # its reward jumps there, and rounding decides
        torch.testing.assert_close(rewards, -slope.expand_as(rewards), **close)
        loss = dpg_loss(log_pi, scores, 4.0, divergence=divergence, baseline=-slope)
        (grad,) = torch.autograd.grad(loss, log_pi)
        assert grad.abs().max() < 1e-12
    # equal without rounding: exactly 0 for total variation too
    exact = dpg_loss(log_pi, log_pi.detach(), 0.0, divergence=divergence, baseline=-slope)
    assert exact == 0


@by_name
def test_an_affine_change_of_f_shifts_rewards_and_leaves_the_expected_gradient(divergence):
    parameters, log_pi = policy(9)
    scores = target(10)
    log_z = scores.logsumexp(0)
    centred = divergence.centred()
    shift = divergence.derivative(torch.ones((), dtype=torch.float64))
    rewards, shifted = (
        dpg_pseudo_rewards(log_pi, scores, log_z, divergence=d) for d in (divergence, centred)
    )
    torch.testing.assert_close(shifted, rewards + shift, **close)
    grads = []
    for d in (divergence, centred):
        losses = dpg_loss(log_pi, scores, log_z, divergence=d, reduction="none")
        grads.append(gradient((log_pi.exp().detach() * losses).sum(), parameters))
    torch.testing.assert_close(grads[0], grads[1], **close)


@quick
@given(seeds)
def test_forward_kl_is_dpg_whose_weight_ignores_the_policy(seed):
    scores, log_q = target(seed), normal(seed + 1, 27).log_softmax(0)
    log_z = scores.logsumexp(0)
    expected = -(scores - log_z - log_q).exp()  # of grad log pi
    for logits in (normal(seed + 2, 27), 50 * normal(seed + 3, 27)):
        log_pi = logits.log_softmax(0).requires_grad_()
        loss = dpg_loss(
            log_pi,
            scores,
            log_z,
            divergence=REVERSE_KL,
            proposal_logprobs=log_q,
            reduction="sum",
        )
        (grad,) = torch.autograd.grad(loss, log_pi)
        torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-10)


@quick
@given(seeds, st.floats(0.1, 3.0))
def test_rlhf_is_the_kl_to_the_tilted_reference(seed, beta):
    parameters, log_pi = policy(seed % 1000)
    reference, rewards = normal(seed, 27).log_softmax(0), normal(seed + 1, 27)
    scores = rlhf_log_target(reference, rewards, beta)
    losses = dpg_loss(log_pi, scores, scores.logsumexp(0), divergence=KL, reduction="none")
    ours = gradient((log_pi.exp().detach() * losses).sum(), parameters)
    pi = log_pi.exp()
    objective = (pi * rewards).sum() - beta * (pi * (log_pi - reference)).sum()
    torch.testing.assert_close(-beta * ours, gradient(objective, parameters), **close)
    z = scores.logsumexp(0)
    value = beta * z - beta * f_divergence(log_pi, scores - z, KL)
    torch.testing.assert_close(objective, value, **close)


# --- extremes, masks, dtypes -------------------------------------------------------------------


@by_name
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_off_policy_weights_that_underflow_give_no_nan(divergence, dtype):
    log_pi = torch.tensor([-1000.0, -1400.0, -20.0], dtype=dtype)
    log_q = torch.tensor([-100.0, -300.0, -20.0], dtype=dtype)
    loss = dpg_loss(
        log_pi,
        log_q.clone(),
        0.0,
        divergence=divergence,
        proposal_logprobs=log_q,
        reduction="none",
    )
    assert not loss.isnan().any()
    if divergence == REVERSE_KL:  # the weight is p/q = 1, though pi/q is 0 and p/pi infinite
        torch.testing.assert_close(loss, -log_pi)


GROWTH = [(REVERSE_KL, 1.0), (NEYMAN_CHI2, 2.0), (SQUARED_HELLINGER, 0.5), (JEFFREYS, 1.0)]


@pytest.mark.parametrize(("divergence", "power"), GROWTH, ids=lambda x: str(x)[:30])
def test_a_weight_that_underflows_times_a_reward_that_overflows_is_their_product(divergence, power):
    # r grows as t^-power; q is such that (pi/q) r is an ordinary number. In float32 both factors
    # leave the range, in float64 neither does.
    gap, size = torch.tensor([200.0, 190.0, 240.0]), torch.tensor([2.0, -3.0, 0.5])
    log_pi = -60.0 - gap
    log_q = log_pi + power * gap - size
    results = []
    for dtype in (torch.float32, torch.float64):
        policy_logprobs, q = log_pi.to(dtype), log_q.to(dtype)
        p = torch.full_like(q, -60.0)
        overflown = divergence.pseudo_reward(policy_logprobs - p).isinf()
        assert overflown.all() if dtype == torch.float32 else not overflown.any()
        results.append(
            dpg_loss(
                policy_logprobs,
                p,
                0.0,
                divergence=divergence,
                proposal_logprobs=q,
                baseline=1.0,
                reduction="none",
            )
        )
    torch.testing.assert_close(results[0].double(), results[1], rtol=2e-4, atol=0)
    size_of_weight = results[1] / -log_pi
    torch.testing.assert_close(size_of_weight.log(), size.double(), rtol=1e-9, atol=1e-9)


@by_name
def test_extreme_log_ratios_give_no_nan(divergence):
    log_pi = torch.tensor([-1e4, -1.0, -400.0, -500.0, -1e4], requires_grad=True)
    scores = torch.tensor([-1.0, -1e4, -100.0, -900.0, -1e4])
    losses = dpg_loss(log_pi, scores, 0.0, divergence=divergence, reduction="none")
    assert not losses.isnan().any()
    clipped = dpg_loss(log_pi, scores, 0.0, divergence=divergence, reward_range=(-10.0, 10.0))
    assert clipped.isfinite()
    (grad,) = torch.autograd.grad(clipped, log_pi)
    assert grad.abs().max() <= 2.0


def test_forbidden_samples_are_infinite_for_kl_unless_the_reward_is_clipped():
    log_pi, scores = torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -math.inf])
    assert dpg_loss(log_pi, scores, 0.0, divergence=KL).isinf()
    off_policy = {"proposal_logprobs": torch.tensor([-1.0, 1e4])}  # weight 0
    assert dpg_loss(log_pi, scores, 0.0, divergence=KL, **off_policy).isinf()
    clipped = dpg_loss(
        log_pi, scores, 0.0, divergence=KL, reward_range=(-5.0, math.inf), reduction="none"
    )
    torch.testing.assert_close(clipped, torch.tensor([-1.0, -5.0]))


@pytest.mark.parametrize("off_policy", [False, True])
def test_masked_samples_and_unknown_contexts_have_no_part(off_policy):
    log_pi = normal(0, 6).requires_grad_()
    scores, log_q = normal(1, 6), normal(2, 6)
    mask = torch.tensor([True, True, False, True, True, False])
    log_z = torch.tensor([0.1, 0.2, 0.3, -math.inf, 0.5, 0.6])
    kept = torch.tensor([0, 1, 4])
    options = {"divergence": KL, "baseline": 0.4}
    proposal = {"proposal_logprobs": log_q} if off_policy else {}
    few = {"proposal_logprobs": log_q[kept]} if off_policy else {}
    poisoned = log_pi.masked_fill(~mask, math.nan)
    bad_scores = scores.masked_fill(~mask, math.nan).masked_fill(log_z == -math.inf, -math.inf)
    for reduction in ("mean", "sum"):
        whole = dpg_loss(
            poisoned, bad_scores, log_z, mask=mask, reduction=reduction, **options, **proposal
        )
        part = dpg_loss(
            log_pi[kept], scores[kept], log_z[kept], reduction=reduction, **options, **few
        )
        torch.testing.assert_close(whole, part)
        grads = [torch.autograd.grad(x, log_pi, retain_graph=True)[0] for x in (whole, part)]
        torch.testing.assert_close(*grads)
    nothing = dpg_loss(log_pi, scores, -math.inf, **options, **proposal)
    assert nothing == 0
    assert torch.autograd.grad(nothing, log_pi)[0].eq(0).all()
    assert dpg_divergence(log_pi, scores, -math.inf, divergence=KL, **proposal) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("off_policy", [False, True])
def test_half_precision_is_computed_in_float32(dtype, off_policy):
    log_pi, scores, log_q = (normal(s, 50).to(dtype) for s in range(3))
    proposal = {"proposal_logprobs": log_q} if off_policy else {}
    wide = {"proposal_logprobs": log_q.float()} if off_policy else {}
    for call in (dpg_loss, dpg_divergence):
        half = call(log_pi, scores, 0.25, divergence=JENSEN_SHANNON, **proposal)
        full = call(log_pi.float(), scores.float(), 0.25, divergence=JENSEN_SHANNON, **wide)
        assert half.dtype == dtype
        assert half == full.to(dtype)


def test_non_contiguous_input_and_single_samples_work():
    wide = normal(0, 8, 2)
    loss = dpg_loss(wide[:, 0], wide[:, 1], 0.0, divergence=KL)
    assert loss == dpg_loss(wide[:, 0].clone(), wide[:, 1].clone(), 0.0, divergence=KL)
    one = dpg_loss(torch.tensor([-2.0]), torch.tensor([-1.0]), 0.0, divergence=KL)
    torch.testing.assert_close(one, torch.tensor(0.0))  # r = -(log t + 1) = 0


def test_loss_is_traced_and_vectorised():
    log_pi, scores, log_q = normal(0, 4, 5), normal(1, 4, 5), normal(2, 4, 5)

    def loss(a, b, q):
        return dpg_loss(a, b, 0.1, divergence=REVERSE_KL, proposal_logprobs=q)

    expected = torch.stack([loss(*row) for row in zip(log_pi, scores, log_q, strict=True)])
    torch.testing.assert_close(torch.func.vmap(loss)(log_pi, scores, log_q), expected)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(log_pi[0], scores[0], log_q[0]), expected[0])


# --- divergence estimates ----------------------------------------------------------------------


@by_name
def test_divergence_estimate_is_exact_when_the_proposal_is_enumerated(divergence):
    parameters, log_pi = policy(11)
    scores = target(12)
    uniform = torch.full_like(scores, -math.log(len(scores)))
    given = (log_pi, scores, scores.logsumexp(0))
    estimate = dpg_divergence(*given, divergence=divergence, proposal_logprobs=uniform)
    exact = f_divergence(log_pi, scores.log_softmax(0), divergence)
    torch.testing.assert_close(estimate, exact, **close)
    loss = dpg_loss(*given, divergence=divergence, proposal_logprobs=uniform)
    torch.testing.assert_close(gradient(estimate, parameters), gradient(loss, parameters), **close)
    weighted = monte_carlo_divergence(
        log_pi - scores.log_softmax(0), divergence, log_weights=scores
    )
    torch.testing.assert_close(estimate, weighted, **close)


def test_hand_case_of_a_policy_half_off_the_target():
    log_pi, log_p = torch.tensor([0.5, 0.5]).double().log(), torch.tensor([1.0, 0.0]).double().log()
    expected = {
        REVERSE_KL: math.log(2),
        KL: math.inf,
        TOTAL_VARIATION: 0.5,
        JENSEN_SHANNON_DOUBLE: 0.4315231086776713,
        JENSEN_SHANNON: 0.4315231086776713 / 2,
    }
    for divergence, value in expected.items():
        got = dpg_divergence(log_pi, log_p, 0.0, divergence=divergence)
        torch.testing.assert_close(got, torch.tensor(value, dtype=torch.float64))


# --- baselines ---------------------------------------------------------------------------------


def test_leave_one_out_is_the_loop_over_the_others_of_the_context():
    rewards = normal(0, 12)
    rewards[3], rewards[7] = -math.inf, math.nan
    contexts = torch.tensor([5, 5, 5, 5, -1, -1, -1, -1, 9, 9, 9, 70])
    got = leave_one_out_baseline(rewards, contexts=contexts)
    for i in range(12):
        others = [
            float(rewards[j])
            for j in range(12)
            if j != i and contexts[j] == contexts[i] and rewards[j].isfinite()
        ]
        assert got[i] == pytest.approx(sum(others) / len(others) if others else 0.0, abs=1e-12)
    plain = leave_one_out_baseline(normal(1, 4))
    torch.testing.assert_close(plain, (normal(1, 4).sum() - normal(1, 4)) / 3)


def test_leave_one_out_leaves_the_expected_gradient_as_it_is():
    # All 3 x 3 pairs of draws from a law over three outcomes, each with its probability.
    logits = normal(0, 3).requires_grad_()
    log_pi, scores = logits.log_softmax(0), normal(1, 3)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            pair, chance = torch.tensor([i, j]), (log_pi[i] + log_pi[j]).exp().detach()
            given = (log_pi[pair], scores[pair], scores.logsumexp(0))
            rewards = dpg_pseudo_rewards(*given, divergence=REVERSE_KL)
            loss = dpg_loss(*given, divergence=REVERSE_KL, baseline=leave_one_out_baseline(rewards))
            total = total + chance * loss
    exact = f_divergence(log_pi, scores.log_softmax(0), REVERSE_KL)
    torch.testing.assert_close(gradient(total, [logits]), gradient(exact, [logits]), **close)


@pytest.mark.parametrize("off_policy", [False, True])
def test_optimal_baseline_minimises_the_variance_of_the_gradient(off_policy):
    logits = normal(0, 6)
    log_pi, scores = logits.log_softmax(0), normal(1, 6)
    log_q = normal(2, 6).log_softmax(0) if off_policy else log_pi
    rewards = dpg_pseudo_rewards(log_pi, scores, scores.logsumexp(0), divergence=REVERSE_KL)
    directions = torch.eye(6, dtype=torch.float64) - log_pi.exp()  # grad log pi of each outcome
    norms = directions.square().sum(-1)

    def variance(baseline):
        weight = (log_pi - log_q).exp() * (rewards - baseline)
        samples = weight[:, None] * directions
        mean = log_q.exp() @ samples
        return (log_q.exp() * (samples - mean).square().sum(-1)).sum()

    # Outcomes stand for themselves with probability q: it enters the weights once.
    best = variance_optimal_baseline(
        rewards, log_weights=log_pi - log_q, squared_norms=norms * log_q.exp()
    )
    slope = torch.func.grad(variance)(best)
    assert slope.abs() < 1e-12
    assert variance(best) < min(
        variance(best + 0.1), variance(best - 0.1), variance(rewards.mean())
    )


def test_optimal_baseline_survives_extreme_weights_and_unknown_rewards():
    rewards = torch.tensor([1.0, -math.inf, 3.0])
    assert variance_optimal_baseline(rewards) == 2.0
    weights = torch.tensor([900.0, 0.0, -900.0])
    assert variance_optimal_baseline(rewards, log_weights=weights) == 1.0
    assert variance_optimal_baseline(torch.tensor([math.nan])) == 0.0


def test_running_baseline_is_the_mean_of_the_window():
    baseline = RunningBaseline(window=5)
    assert baseline.value == 0
    seen: list[float] = []
    for seed, size in enumerate((2, 1, 4, 9, 3, 5)):
        batch = normal(seed, size)
        baseline.update(batch)
        seen += batch.tolist()
        assert float(baseline.value) == pytest.approx(sum(seen[-5:]) / len(seen[-5:]), abs=1e-12)
    copy = RunningBaseline(window=5)
    copy.load_state_dict(baseline.state_dict())
    copy.update(torch.tensor([math.nan, -math.inf]))
    assert copy.value == baseline.value


# --- the partition function --------------------------------------------------------------------


def test_partition_is_exact_when_the_proposal_is_enumerated_and_has_no_variance_at_the_target():
    scores = target(13)
    uniform = torch.full_like(scores, -math.log(len(scores)))
    partition = LogPartition()
    partition.update(scores - uniform)
    torch.testing.assert_close(partition.value, scores.logsumexp(0), **close)
    at_target = scores - scores.log_softmax(0)
    torch.testing.assert_close(at_target, scores.logsumexp(0).expand(27), **close)


@quick
@given(seeds)
def test_partition_over_batches_is_the_log_mean_of_all_weights_by_context(seed):
    g = generator(seed)
    weights = [30 * torch.randn(n, dtype=torch.float64, generator=g) for n in (7, 1, 12)]
    weights[2][0] = -math.inf
    contexts = [torch.randint(3, w.shape, generator=g) for w in weights]
    single, several = LogPartition(), LogPartition(num_contexts=4)
    for w, c in zip(weights, contexts, strict=True):
        single.update(w)
        before = several.value
        assert torch.equal(several(w, c), before[c])
    every, where = torch.cat(weights), torch.cat(contexts)
    torch.testing.assert_close(single.value, every.logsumexp(0) - math.log(20), **close)
    for k in range(4):
        mine = every[where == k]
        expected = mine.logsumexp(0) - math.log(len(mine)) if len(mine) else -math.inf
        torch.testing.assert_close(several.value[k], torch.as_tensor(expected).double(), **close)


def test_partition_counts_zero_weights_and_survives_huge_ones():
    partition = LogPartition()
    assert partition.value == -math.inf
    partition.update(torch.tensor([-math.inf, -math.inf]))
    assert partition.value == -math.inf
    partition.update(torch.tensor([1e4, 1e4]))
    torch.testing.assert_close(partition.value, torch.tensor(1e4 - math.log(2)).double())
    assert LogPartition(max_log_z=0.5).value == -math.inf
    capped = LogPartition(max_log_z=0.5)
    capped.update(torch.tensor([3.0]))
    assert capped.value == 0.5
    assert partition.value.requires_grad is False


def test_partition_state_is_stored_and_restored():
    partition = LogPartition(num_contexts=2)
    partition.update(torch.tensor([0.5, 1.5]), torch.tensor([0, 1]))
    copy = LogPartition(num_contexts=2)
    copy.load_state_dict(partition.state_dict())
    for one in (partition, copy):
        one.update(torch.tensor([2.0]), torch.tensor([1]))
    assert torch.equal(partition.value, copy.value)
    assert "num_contexts=2" in repr(copy)


def test_log_of_the_estimate_is_low_by_the_delta_method():
    # 40,000 estimates from 20 weights: the mean of log Z-hat has a standard error of about 5e-4,
    # the bias is about -0.0125. A band of 5 standard errors and the next order: false alarm < 1e-6.
    weights = torch.rand(20, 40_000, dtype=torch.float64, generator=generator(0)) + 0.5
    index = torch.arange(40_000).expand(20, -1).flatten()
    partition = LogPartition(num_contexts=40_000)
    partition.update(weights.log().flatten(), index)
    bias = partition.value.mean()
    expected = -(1 / 12) / (2 * 20)
    assert abs(bias - expected) < 5 * 0.065 / 200 + 2e-4
    assert bias < -5 * 0.065 / 200


# --- targets -----------------------------------------------------------------------------------


def test_pointwise_target_is_the_conditional_law():
    base = normal(0, 27).log_softmax(0)
    holds = (sequences() == 2).any(-1)
    scores = pointwise_log_target(base, holds)
    torch.testing.assert_close(scores.logsumexp(0).exp(), base.exp()[holds].sum(), **close)
    conditional = base.exp().where(holds, 0.0) / base.exp()[holds].sum()
    torch.testing.assert_close(scores.softmax(0), conditional, **close)
    floored = pointwise_log_target(base, holds, log_floor=-20.0)
    torch.testing.assert_close(floored, torch.where(holds, base, base - 20), **close)
    graded = pointwise_log_target(base, holds.double() * 0.5)
    torch.testing.assert_close(graded[holds], base[holds] + math.log(0.5), **close)
    half = pointwise_log_target(base.half(), holds)
    assert half.dtype == torch.float16


def problem(seed: int, k: int):
    """A base law, features and moments that some tilt of the base has."""
    base = normal(seed, 27).log_softmax(0)
    features = normal(seed + 1, 27, k)
    truth = normal(seed + 2, k)
    return base, features, (base + features @ truth).softmax(0) @ features, truth


@quick
@given(seeds, st.integers(1, 4))
def test_fitted_coefficients_meet_the_moments_and_pythagoras(seed, k):
    base, features, moments, truth = problem(seed, k)
    coefficients = fit_distributional_constraints(features, moments, log_weights=base + 3.0)
    torch.testing.assert_close(coefficients, truth, rtol=1e-6, atol=1e-6)
    log_p = exponential_log_target(base, features, coefficients).log_softmax(0)
    torch.testing.assert_close(log_p.exp() @ features, moments, rtol=0, atol=1e-9)
    # Another law with the same moments: p moved in a direction orthogonal to 1 and phi.
    constraints = torch.cat((features, torch.ones(27, 1, dtype=torch.float64)), -1)
    direction = normal(seed + 3, 27)
    direction = (
        direction - constraints @ torch.linalg.lstsq(constraints, direction[:, None])[0][:, 0]
    )
    q = log_p.exp() + 0.5 * direction * (log_p.exp() / direction.abs()).min()
    log_q = q.log()
    torch.testing.assert_close(q @ features, moments, rtol=0, atol=1e-9)
    left = f_divergence(log_q, base, KL)
    right = f_divergence(log_q, log_p, KL) + f_divergence(log_p, base, KL)
    torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-9)


def test_fit_agrees_with_a_general_minimiser():
    optimize = pytest.importorskip("scipy.optimize")
    base, features, moments, _ = problem(5, 3)

    def dual(lam):
        lam = torch.as_tensor(lam)
        return float((base + features @ lam).logsumexp(0) - lam @ moments)

    found = optimize.minimize(dual, torch.zeros(3).double().numpy(), method="BFGS", tol=1e-10).x
    ours = fit_distributional_constraints(features, moments, log_weights=base)
    torch.testing.assert_close(ours, torch.as_tensor(found), rtol=0, atol=1e-4)
    assert dual(ours) <= dual(found) + 1e-12


def test_fit_ignores_scale_and_copies_of_features_and_dropped_samples():
    base, features, moments, _ = problem(6, 2)
    ours = fit_distributional_constraints(features, moments, log_weights=base)
    scale = torch.tensor([1e4, 1e-4], dtype=torch.float64)
    scaled = fit_distributional_constraints(features * scale, moments * scale, log_weights=base)
    torch.testing.assert_close(scaled * scale, ours, rtol=1e-7, atol=1e-8)
    twice = fit_distributional_constraints(
        features.repeat(1, 2), moments.repeat(2), log_weights=base
    )
    torch.testing.assert_close(twice[:2] + twice[2:], ours, rtol=1e-7, atol=1e-8)
    weights = torch.cat((base, torch.tensor([-math.inf], dtype=torch.float64)))
    more = torch.cat((features, torch.full((1, 2), 1e6, dtype=torch.float64)))
    torch.testing.assert_close(
        fit_distributional_constraints(more, moments, log_weights=weights), ours
    )
    constant = torch.cat((features, torch.ones(27, 1, dtype=torch.float64)), -1)
    wanted = torch.cat((moments, torch.ones(1, dtype=torch.float64)))
    with_constant = fit_distributional_constraints(constant, wanted, log_weights=base)
    torch.testing.assert_close(with_constant[:2], ours, rtol=1e-7, atol=1e-8)


def test_a_rare_feature_gets_its_exact_odds():
    # One sample in a million has it; half should: the odds rise by 999,999.
    features = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    weights = torch.tensor([1e-6, 1 - 1e-6], dtype=torch.float64).log()
    (found,) = fit_distributional_constraints(features, features.new_tensor([0.5]), weights)
    assert float(found) == pytest.approx(math.log(999_999), abs=1e-9)


def test_moments_out_of_reach_are_refused():
    features = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    for moments in ([1.0, 0.2], [0.0, 0.2], [2.0, 0.2]):
        with pytest.raises(ValueError, match=r"moments\[0\]"):
            fit_distributional_constraints(features, features.new_tensor(moments))
    with pytest.raises(ValueError, match="taken together"):  # outside of the triangle
        fit_distributional_constraints(features, features.new_tensor([0.7, 0.7]))
    same = features[:, :1].repeat(1, 2)
    with pytest.raises(ValueError, match="taken together"):  # one feature, two means
        fit_distributional_constraints(same, features.new_tensor([0.3, 0.6]))


def test_pointwise_and_distributional_targets_compose():
    base, holds = normal(0, 27).log_softmax(0), (sequences() == 2).any(-1)
    feature = (sequences() == 0).double().sum(-1, keepdim=True)
    inside = pointwise_log_target(base, holds)
    coefficients = fit_distributional_constraints(
        feature, feature.new_tensor([0.9]), log_weights=inside
    )
    p = exponential_log_target(inside, feature, coefficients).softmax(0)
    assert p[~holds].eq(0).all()
    assert float(p @ feature[:, 0]) == pytest.approx(0.9, abs=1e-9)


def test_rlhf_target_is_the_reference_tilted():
    reference, rewards = normal(0, 5), normal(1, 5)
    got = rlhf_log_target(reference, rewards, 0.1)
    torch.testing.assert_close(got, reference + rewards / 0.1, **close)


# --- training by samples -----------------------------------------------------------------------


@pytest.mark.parametrize("divergence", [REVERSE_KL, JENSEN_SHANNON_DOUBLE, TOTAL_VARIATION])
def test_sampled_training_reaches_the_constraint(divergence):
    torch.manual_seed(0)
    base = torch.tensor([0.9, 0.05, 0.03, 0.02]).log()
    holds = torch.tensor([False, True, True, True])
    scores = pointwise_log_target(base, holds)
    logits = base.clone().requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=0.05)
    partition, baseline = LogPartition(), RunningBaseline()
    for _ in range(150):
        log_pi = logits.log_softmax(0)
        x = torch.multinomial(log_pi.detach().exp(), 128, replacement=True)
        given = (log_pi[x], scores[x])
        log_z = partition(scores[x] - log_pi[x])
        loss = dpg_loss(*given, log_z, divergence=divergence, baseline=baseline.value)
        baseline.update(dpg_pseudo_rewards(*given, log_z, divergence=divergence))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    # Z = 0.1; without training a tenth of the samples satisfies it.
    assert partition.value.exp().item() == pytest.approx(0.1, rel=0.1)
    assert logits.softmax(0)[holds].sum() > 0.9


L = torch.zeros(3)
F, M = torch.rand(4, 2, generator=generator(0)), torch.full((2,), 0.5)


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: dpg_loss(L, L[:2], 0.0, divergence=KL), ValueError, "target_log_scores"),
        (lambda: dpg_loss(L[:0], L[:0], 0.0, divergence=KL), ValueError, "policy_logprobs"),
        (lambda: dpg_loss(L[None], L[None], 0.0, divergence=KL), ValueError, "policy_logprobs"),
        (lambda: dpg_loss(L.long(), L, 0.0, divergence=KL), TypeError, "policy_logprobs"),
        (lambda: dpg_loss(L, L, L[:2], divergence=KL), ValueError, "log_z"),
        (lambda: dpg_loss(L, L, "0", divergence=KL), TypeError, "log_z"),
        (lambda: dpg_loss(L, L, 0.0, divergence=KL, baseline=L[:2]), ValueError, "baseline"),
        (
            lambda: dpg_loss(L, L, 0.0, divergence=KL, proposal_logprobs=L[:2]),
            ValueError,
            "proposal_logprobs",
        ),
        (lambda: dpg_loss(L, L, 0.0, divergence=KL, mask=L[:2] > 0), ValueError, "mask"),
        (lambda: dpg_loss(L, L, 0.0, divergence=KL, reduction="x"), ValueError, "reduction"),
        (
            lambda: dpg_loss(L, L, 0.0, divergence=KL, reward_range=(1.0, 1.0)),
            ValueError,
            "reward_range",
        ),
        (lambda: dpg_pseudo_rewards(L, L[:2], 0.0, divergence=KL), ValueError, "target_log"),
        (lambda: dpg_divergence(L, L, 0.0, divergence=KL, mask=L[:2]), ValueError, "mask"),
        (lambda: leave_one_out_baseline(L[:0]), ValueError, "rewards"),
        (lambda: leave_one_out_baseline(L, contexts=L), TypeError, "contexts"),
        (lambda: leave_one_out_baseline(L, contexts=L.long()[:2]), ValueError, "contexts"),
        (lambda: variance_optimal_baseline(L, log_weights=L[:2]), ValueError, "log_weights"),
        (lambda: RunningBaseline(0), ValueError, "window"),
        (lambda: RunningBaseline(5).update(L[:0]), ValueError, "rewards"),
        (lambda: LogPartition(0), ValueError, "num_contexts"),
        (lambda: LogPartition(2.0), TypeError, "num_contexts"),
        (lambda: LogPartition(max_log_z=math.nan), ValueError, "max_log_z"),
        (lambda: LogPartition().update(L[:0]), ValueError, "log_weights"),
        (lambda: LogPartition().update(L, L.long()), ValueError, "contexts"),
        (lambda: LogPartition(2).update(L), ValueError, "contexts"),
        (lambda: LogPartition(2).update(L, L), TypeError, "contexts"),
        (lambda: LogPartition(2).update(L, L.long() + 2), ValueError, "0..1, got 2"),
        (lambda: LogPartition(2).update(L, L.long() - 1), ValueError, "contexts"),
        (lambda: pointwise_log_target(L, L[:2]), ValueError, "satisfied"),
        (lambda: pointwise_log_target(L, L, log_floor=0.0), ValueError, "log_floor"),
        (lambda: exponential_log_target(L, F, M), ValueError, "features"),
        (lambda: exponential_log_target(L, F[:3], L), ValueError, "coefficients"),
        (lambda: rlhf_log_target(L, L, 0.0), ValueError, "beta"),
        (lambda: rlhf_log_target(L, L[:2], 1.0), ValueError, "rewards"),
        (lambda: fit_distributional_constraints(F, L), ValueError, "moments"),
        (lambda: fit_distributional_constraints(F[:0], M), ValueError, "features"),
        (lambda: fit_distributional_constraints(F * math.nan, M), ValueError, "finite"),
        (lambda: fit_distributional_constraints(F, M, L), ValueError, "log_weights"),
        (
            lambda: fit_distributional_constraints(F, M, torch.full((4,), -math.inf)),
            ValueError,
            "log_weights",
        ),
        (lambda: fit_distributional_constraints(F.long(), M), TypeError, "features"),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()


def test_an_unknown_normaliser_is_not_taken_for_an_empty_context():
    logprobs = torch.tensor([-1.0, -2.0])
    for log_z, expected in ((math.nan, math.nan), (-math.inf, 0.0)):
        for value in (
            dpg_divergence(logprobs, logprobs, log_z, divergence=KL),
            dpg_loss(logprobs, logprobs, log_z, divergence=KL),
        ):
            torch.testing.assert_close(value, torch.tensor(expected), equal_nan=True)


@pytest.mark.parametrize("value", ["0.1", None, 1j, [0.5]])
def test_a_cap_of_the_normaliser_that_is_no_number_is_named(value):
    with pytest.raises(TypeError, match="max_log_z must be a number"):
        LogPartition(max_log_z=value)


def test_contexts_of_any_integer_dtype_pick_the_same_normalisers():
    contexts, weights = torch.tensor([0, 1, 1, 0]), torch.tensor([0.5, 1.0, 2.0, 3.0])
    for dtype in (torch.uint8, torch.int32):
        partitions = LogPartition(num_contexts=2), LogPartition(num_contexts=2)
        for _ in range(2):
            wanted = partitions[0](weights, contexts)
            found = partitions[1](weights, contexts.to(dtype))
        torch.testing.assert_close(found, wanted)
