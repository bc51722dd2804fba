"""Valid calls of divergences, fused heads, token measures, optimisers and the anatomy."""

# ruff: noqa: C408, PLW0108 - a case reads like the call it stands for

import torch

from _fuzz_values import (
    classes,
    covariance,
    generator,
    integers,
    logprobs,
    ones,
    positive,
    probs,
    real,
)
from steelyard import anatomy, divergences, optim, tokens
from steelyard.divergences import KL

TWO_SAMPLES = {"x": (5, 2), "y": (6, 2)}


def samples(**shapes):
    """Samples of the given shapes."""
    return {name: real(*shape, shift=i) for i, (name, shape) in enumerate(shapes.items())}


def transport(**more):
    """A transport problem of two by three points."""
    return dict(cost=positive(2, 3), epsilon=0.5, a=probs(2), b=probs(3), num_iterations=3) | more


def language_model():
    """A tiny causal language model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).eval()


def next_token(shift=0.0):
    """A model as a function of ids: the same law everywhere."""
    return lambda ids: real(5, shift=shift).repeat(len(ids), 1)


def two_models(**more):
    """A host, an intervening model and a prompt."""
    return (
        dict(
            host_model=next_token(),
            intervention_model=next_token(1.0),
            prompt_ids=classes(2, 3, of=5),
            budget=2,
            max_new_tokens=2,
            generator=generator(),
            eos_id=4,
        )
        | more
    )


def shift():
    """A token shift to tabulate."""
    return tokens.token_shift(real(2, 3, 5), real(2, 3, 5, shift=1), top_k=3)


def parameters():
    """Parameters with gradients."""
    weight = real(3, 2).requires_grad_()
    weight.grad = real(3, 2, shift=1)
    return [weight]


def closure():
    """A loss of nothing."""
    return 0.5


def joint(variables, **options):
    """``joint_distance_covariance`` with its variables in a list."""
    return divergences.joint_distance_covariance(*variables, **options)


def curve():
    """A curve of cross-sampling."""
    return tokens.CrossSamplingCurve(share_switched=[0.0, 0.5, 1.0], success=[0.1, 0.4, 0.6])


def square(logits, labels):
    """A loss to take apart."""
    return (logits.gather(-1, labels.unsqueeze(-1)) - 1).square().sum()


DIVERGENCES = {
    "divergences.FDivergence.f": lambda: dict(self_=KL, t=positive(4)),
    "divergences.FDivergence.derivative": lambda: dict(self_=KL, t=positive(4)),
    "divergences.FDivergence.second_derivative": lambda: dict(self_=KL, t=positive(4)),
    "divergences.FDivergence.conjugate": lambda: dict(self_=KL, y=real(4)),
    "divergences.FDivergence.derivative_at_log": lambda: dict(self_=KL, log_t=real(4)),
    "divergences.FDivergence.pseudo_reward": lambda: dict(self_=KL, log_t=real(4)),
    "divergences.FDivergence.terms": lambda: dict(
        self_=KL, p_logprobs=logprobs(2, 4), q_logprobs=logprobs(2, 4, shift=1)
    ),
    "divergences.alpha_divergence": lambda: dict(order=0.5),
    "divergences.skew_jensen_shannon": lambda: dict(beta=0.3),
    "divergences.cauchy_schwarz_divergence": lambda: dict(
        **samples(**TWO_SAMPLES), bandwidth=1.0, block_size=4
    ),
    "divergences.mmd_squared": lambda: dict(**samples(**TWO_SAMPLES), bandwidth=1.0, block_size=4),
    "divergences.hsic": lambda: dict(
        **samples(x=(5, 2), t=(5, 3)), bandwidth_x=1.0, bandwidth_t=1.0, block_size=4
    ),
    "divergences.cauchy_schwarz_mutual_information": lambda: dict(
        **samples(x=(5, 2), t=(5, 3)), bandwidth_x=1.0, bandwidth_t=1.0, block_size=4
    ),
    "divergences.conditional_cauchy_schwarz": lambda: dict(
        **samples(x=(5, 2), y=(5, 3), y_hat=(5, 3)), bandwidth_x=1.0, bandwidth_y=1.0, block_size=4
    ),
    "divergences.gaussian_cauchy_schwarz": lambda: dict(
        mean_p=real(3), cov_p=covariance(3), mean_q=real(3, shift=1), cov_q=covariance(3, shift=1)
    ),
    "divergences.median_bandwidth": lambda: dict(x=real(6, 2)),
    "divergences.distance_correlation": lambda: dict(**samples(x=(6,), y=(6, 2)), block_size=4),
    "divergences.distance_correlation_test": lambda: samples(x=(6,), y=(6,)),
    "divergences.distance_covariance": lambda: dict(**samples(x=(6,), y=(6, 2)), block_size=4),
    "divergences.concatenated_distance_covariance": lambda: dict(
        x=real(6), attributes=[real(6, shift=1), real(6, 2, shift=2)], block_size=4
    ),
    "divergences.joint_distance_covariance": lambda: dict(
        call_=joint,
        variables=[real(6), real(6, 2, shift=1), real(6, shift=2)],
        c=1.0,
        unbiased=True,
        block_size=4,
    ),
    "divergences.u_centred_distances": lambda: dict(x=real(6, 2)),
    "divergences.f_divergence": lambda: dict(
        p_logprobs=logprobs(2, 4), q_logprobs=logprobs(2, 4, shift=1), divergence=KL, mask=ones(2)
    ),
    "divergences.kl_estimate": lambda: dict(log_ratio=real(4)),
    "divergences.monte_carlo_divergence": lambda: dict(
        log_ratio=real(4), divergence=KL, log_weights=real(4, shift=1)
    ),
    "divergences.sinkhorn_plan": transport,
    "divergences.sinkhorn_potentials": transport,
    "divergences.sinkhorn_divergence": lambda: dict(
        cost_xy=positive(2, 3),
        cost_xx=covariance(2),
        cost_yy=covariance(3),
        epsilon=0.5,
        a=probs(2),
        b=probs(3),
        num_iterations=3,
    ),
}

FUSED = {
    "fused.linear_logprobs": lambda: dict(
        hidden=real(4, 3),
        weight=real(5, 3),
        targets=classes(4, of=5),
        bias=real(5),
        chunk_size=2,
    ),
    "fused.linear_divergence": lambda: dict(
        p_hidden=real(4, 3),
        p_weight=real(5, 3, shift=1),
        q_hidden=real(4, 2),
        q_weight=real(5, 2, shift=1),
        divergence=KL,
        p_bias=real(5),
        q_bias=real(5, shift=2),
        mask=ones(4),
        chunk_size=2,
    ),
    "fused.linear_token_shift": lambda: dict(
        base_hidden=real(4, 3),
        base_weight=real(5, 3, shift=1),
        rl_hidden=real(4, 2),
        rl_weight=real(5, 2, shift=1),
        chunk_size=2,
    ),
}

TOKENS = {
    "tokens.CachedNextToken": lambda: dict(model=language_model()),
    "tokens.CachedNextToken.__call__": lambda: dict(
        self_=tokens.CachedNextToken(language_model()), ids=integers(1, 2, 3).unsqueeze(0)
    ),
    "tokens.CrossSamplingCurve": lambda: dict(share_switched=[0.0, 1.0], success=[0.1, 0.6]),
    "tokens.cross_sample": lambda: two_models(js_threshold=0.01),
    "tokens.trace_cross_sampling": lambda: two_models(rule=tokens.switch_above_js(0.01)),
    "tokens.exact_cross_sampling": lambda: dict(
        base={(): [0.5, 0.5], (0,): [0.9, 0.1]},
        rl={(): [0.2, 0.8], (0,): [0.1, 0.9]},
        success=lambda prefix: prefix == (0, 1),
        js_threshold=0.01,
        budget=1,
    ),
    "tokens.heat_map_html": lambda: dict(tokens=["a", "b", "c"], js=positive(3)),
    "tokens.heat_map_text": lambda: dict(tokens=["a", "b", "c"], js=positive(3)),
    "tokens.hidden_states_and_head": lambda: dict(
        model=language_model(), input_ids=classes(2, 3, of=5), attention_mask=classes(2, 3) * 0 + 1
    ),
    "tokens.model_logprobs": lambda: dict(
        model=language_model(), input_ids=classes(2, 3, of=5), attention_mask=classes(2, 3) * 0 + 1
    ),
    "tokens.model_token_shift": lambda: dict(
        base_model=language_model(),
        rl_model=language_model(),
        input_ids=classes(2, 3, of=5),
        attention_mask=classes(2, 3) * 0 + 1,
        top_p=0.9,
    ),
    "tokens.mass_reallocation": lambda: dict(
        base_logits=real(2, 5), rl_logits=real(2, 5, shift=1), top_k=3
    ),
    "tokens.nucleus": lambda: dict(probs=probs(2, 5), top_p=0.8),
    "tokens.plot_cross_sampling": lambda: dict(
        switched=curve(), control=curve(), host_success=0.1, intervention_success=0.6, samples=8
    ),
    "tokens.plot_js_percentiles": lambda: dict(curves={"rl": positive(9)}),
    "tokens.positional_profile": lambda: dict(values=positive(2, 5), mask=ones(2, 5), bins=2),
    "tokens.random_switch_positions": lambda: dict(
        switched=classes(2, 5).bool(), mask=ones(2, 5), generator=generator()
    ),
    "tokens.rank_table": lambda: dict(shift=shift(), mask=ones(2, 3), max_rank=3),
    "tokens.response_means": lambda: dict(values=positive(2, 5), mask=ones(2, 5)),
    "tokens.shift_summary": lambda: dict(
        js=positive(2, 5), mask=ones(2, 5), thresholds=(0.01, 0.1)
    ),
    "tokens.switch_above_entropy": lambda: dict(threshold=0.5),
    "tokens.switch_above_js": lambda: dict(threshold=0.5),
    "tokens.switch_below_js": lambda: dict(threshold=0.5),
    "tokens.switch_at": lambda: dict(positions=classes(2, 4).bool()),
    "tokens.token_shift": lambda: dict(
        base_logits=real(2, 5), rl_logits=real(2, 5, shift=1), top_p=0.9, top_k=3
    ),
}

OPTIM = {
    "optim.AdamP": lambda: dict(params=parameters()),
    "optim.AdamP.step": lambda: dict(self_=optim.AdamP(parameters()), closure=closure),
    "optim.SGDP.step": lambda: dict(self_=optim.SGDP(parameters(), lr=0.1), closure=closure),
    "optim.SGDP": lambda: dict(params=parameters(), lr=0.1),
    "optim.scale_invariance_score": lambda: dict(weight=real(3, 2), grad=real(3, 2, shift=1)),
    "optim.tangent_project": lambda: dict(update=real(3, 2), weight=real(3, 2, shift=1)),
}

ANATOMY = {
    "anatomy.decompose": lambda: dict(
        call_=lambda loss_fn, logits, labels: anatomy.decompose(loss_fn, logits, labels),
        loss_fn=square,
        logits=real(3, 4),
        labels=classes(3, of=4),
    ),
    "anatomy.weight_curves": lambda: dict(
        objectives={"square": lambda x: x.square()}, over="log_ratio", limits=(0.5, 1.5), points=5
    ),
    "anatomy.plot_weights": lambda: dict(
        objectives={"square": lambda x: x.square()}, over="log_ratio", limits=(0.5, 1.5), points=5
    ),
    "anatomy.draw_curves": lambda: dict(
        curves=anatomy.weight_curves({"square": lambda x: x.square()}, "log_ratio", points=5)
    ),
}


def students(**more):
    """Logits of a student and its teacher on four items of three classes."""
    return (
        dict(student_logits=real(4, 3), teacher_logits=real(4, 3, shift=1), labels=classes(4, of=3))
        | more
    )


def classic(**more):
    """The same under the short names of the baselines."""
    return dict(student=real(4, 3), teacher=real(4, 3, shift=1), labels=classes(4, of=3)) | more


DISTILLATION = {
    "distillation.adpa_loss": lambda: dict(
        student_chosen=real(2, 3, 5),
        chosen_tokens=classes(2, 3, of=5),
        student_own=real(2, 4, 5),
        advantage=real(2, 4, 5, shift=1),
        mask_chosen=ones(2, 3),
        mask_own=ones(2, 4),
    ),
    "distillation.adpa_term": lambda: dict(
        student_logits=real(2, 3, 5), advantage=real(2, 3, 5, shift=1), mask=ones(2, 3)
    ),
    "distillation.dckd_loss": lambda: dict(
        student_chosen=real(2, 3, 5),
        student_rejected=real(2, 4, 5),
        teacher_chosen=real(2, 3, 5, shift=1),
        teacher_rejected=real(2, 4, 5, shift=1),
        chosen_tokens=classes(2, 3, of=5),
        rejected_tokens=classes(2, 4, of=5),
        alpha=0.5,
        mask_chosen=ones(2, 3),
        mask_rejected=ones(2, 4),
    ),
    "distillation.dist_loss": lambda: classic(alpha=0.5, beta=0.5, gamma=0.5),
    "distillation.kd_loss": classic,
    "distillation.plackett_luce_loss": lambda: dict(
        student_logits=real(4, 3),
        permutation=classes(4, 3, of=3),
        weights=positive(4, 3),
    ),
    "distillation.pld_loss": students,
    "distillation.sinkhorn_kd_loss": lambda: dict(
        student_logits=real(4, 3), teacher_logits=real(4, 3, shift=1), num_iterations=3
    ),
    "distillation.teacher_advantage": lambda: dict(
        dpo_logits=real(4, 5), ref_logits=real(4, 5, shift=1), top_k=3
    ),
}

CASES = {**DIVERGENCES, **FUSED, **TOKENS, **OPTIM, **ANATOMY, **DISTILLATION}
SLOW = {
    "tokens.heat_map_text",
    "tokens.model_token_shift",
    "tokens.plot_cross_sampling",
    "tokens.plot_js_percentiles",
    "anatomy.plot_weights",
    "anatomy.draw_curves",
}
