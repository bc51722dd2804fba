"""The large-vocabulary route against logits made whole, gradients and memory included."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from steelyard.preference import (
    f_dpo_loss,
    fused_log_ratios,
    fused_logprobs,
    fused_token_kl,
    sparse_po_loss,
)

B, T, D, V = 3, 5, 4, 11


def heads(seed: int = 0, dtype: torch.dtype = torch.float64, v: int = V):
    """Hidden states and heads of policy and reference (another width), tokens and a mask."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g).to(dtype)

    policy = (normal(B, T, D), normal(v, D), normal(v))
    reference = (normal(B, T, D + 2), normal(v, D + 2), normal(v))
    tokens = torch.randint(v, (B, T), generator=g)
    mask = torch.arange(T) < torch.tensor([[5], [2], [0]])
    return policy, reference, tokens, mask


def plain_logprobs(hidden, weight, bias=None, temperature=1.0):
    logits = hidden @ weight.T + (0 if bias is None else bias)
    return (logits / temperature).log_softmax(-1)


def plain_ratios(policy, reference, tokens, **options):
    log_p, log_q = (plain_logprobs(*x, **options) for x in (policy, reference))
    return (log_p - log_q).gather(-1, tokens[..., None])[..., 0]


def plain_kl(policy, reference, **options):
    log_p, log_q = (plain_logprobs(*x, **options) for x in (policy, reference))
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def fused_pair(policy, reference, tokens, **options):
    """Both quantities, from the triples (hidden, weight, bias)."""
    given = (*policy[:2], *reference[:2])
    options |= {"policy_bias": policy[2], "ref_bias": reference[2]}
    return fused_log_ratios(*given, tokens, **options), fused_token_kl(*given, **options)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_values_and_gradients_are_those_of_the_plain_formula(temperature, chunk_size):
    policy, reference, tokens, mask = heads()
    policy = [x.requires_grad_() for x in policy]
    ratios, kl = fused_pair(
        policy, reference, tokens, mask=mask, temperature=temperature, chunk_size=chunk_size
    )
    expected = plain_ratios(policy, reference, tokens, temperature=temperature) * mask
    expected_kl = plain_kl(policy, reference, temperature=temperature) * mask
    torch.testing.assert_close(ratios, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(kl, expected_kl, rtol=0, atol=1e-12)
    upstream = torch.randn(2, B, T, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad((upstream * torch.stack((ratios, kl))).sum(), policy)
    plain = torch.autograd.grad((upstream * torch.stack((expected, expected_kl))).sum(), policy)
    for a, b in zip(got, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_without_mask_and_bias_it_is_the_plain_formula_too():
    policy, reference, tokens, _ = heads(2)
    given = (*policy[:2], *reference[:2])
    expected = plain_ratios(policy[:2], reference[:2], tokens)
    torch.testing.assert_close(fused_log_ratios(*given, tokens), expected, rtol=0, atol=1e-12)
    expected = plain_kl(policy[:2], reference[:2])
    torch.testing.assert_close(fused_token_kl(*given), expected, rtol=0, atol=1e-12)
    got = fused_logprobs(*policy[:2], tokens)
    expected = plain_logprobs(*policy[:2]).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_gradcheck():
    policy, reference, tokens, mask = heads(3, v=5)
    tokens = tokens.clamp(max=4)
    policy = [x.requires_grad_() for x in policy]
    assert torch.autograd.gradcheck(
        lambda *x: fused_pair(x, reference, tokens, mask=mask), policy, atol=1e-6
    )


def test_losses_from_heads_have_the_gradients_of_losses_from_logits():
    policy, reference, tokens, mask = heads(4)
    mask = mask.flip(0) | (torch.arange(T) == 0)
    policy = [x.requires_grad_() for x in policy]
    half = {"mask_chosen": mask, "mask_rejected": mask}
    ratios, kl = fused_pair(policy, reference, tokens, mask=mask)
    plain, whole = plain_ratios(policy, reference, tokens), plain_kl(policy, reference)
    for mine, theirs in (
        (
            f_dpo_loss(ratios.sum(-1), -ratios.sum(-1)),
            f_dpo_loss((plain * mask).sum(-1), -(plain * mask).sum(-1)),
        ),
        (
            sparse_po_loss(ratios, ratios.flip(0), kl, kl.flip(0), **half),
            sparse_po_loss(plain, (plain * mask).flip(0), whole, (whole * mask).flip(0), **half),
        ),
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
        got = torch.autograd.grad(mine, policy, retain_graph=True)
        expected = torch.autograd.grad(theirs, policy, retain_graph=True)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_the_reference_gets_no_gradient():
    policy, reference, tokens, mask = heads(5)
    everything = [x.requires_grad_() for x in (*policy, *reference)]
    ratios, kl = fused_pair(policy, reference, tokens, mask=mask)
    slopes = torch.autograd.grad((ratios + kl).sum(), everything, allow_unused=True)
    assert all(x is not None and (x != 0).any() for x in slopes[:3])
    assert all(x is None for x in slopes[3:])


def test_equal_models_have_ratio_zero_and_divergence_zero():
    policy, _, tokens, _ = heads(6)
    ratios, kl = fused_pair(policy, policy, tokens)
    assert (ratios == 0).all()
    torch.testing.assert_close(kl, torch.zeros_like(kl), rtol=0, atol=1e-14)
    other, reference, _, _ = heads(7)
    assert (fused_pair(other, reference, tokens)[1] > 0).all()


def test_masked_tokens_cost_nothing_and_may_hold_anything():
    policy, reference, tokens, mask = heads(8)
    expected = fused_pair(policy, reference, tokens, mask=mask)
    tokens[~mask] = -100
    spoiled = [x.clone() for x in (policy[0], reference[0])]
    for x in spoiled:
        x[~mask] = math.nan
    spoiled[0].requires_grad_()
    got = fused_pair((spoiled[0], *policy[1:]), (spoiled[1], *reference[1:]), tokens, mask=mask)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
        assert (a[~mask] == 0).all()
    (got[0] + got[1]).sum().backward()
    assert (spoiled[0].grad[~mask] == 0).all()
    assert spoiled[0].grad.isfinite().all()


def test_nothing_kept_is_zero_with_a_zero_gradient():
    policy, reference, tokens, _ = heads(9)
    policy = [x.requires_grad_() for x in policy]
    ratios, kl = fused_pair(policy, reference, tokens, mask=torch.zeros(B, T))
    (ratios + kl).sum().backward()
    assert (ratios == 0).all()
    assert (kl == 0).all()
    assert all((x.grad == 0).all() for x in policy)


class _Largest(TorchDispatchMode):
    """Remember the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
        return out


def test_no_tensor_is_as_large_as_the_logits():
    g = torch.Generator().manual_seed(0)
    b, t, d, v = 4, 32, 3, 5000
    hidden, weight = torch.randn(b, t, d, generator=g), torch.randn(v, d, generator=g)
    ref_hidden, ref_weight = torch.randn(b, t, d, generator=g), torch.randn(v, d, generator=g)
    tokens = torch.randint(v, (b, t), generator=g)
    hidden.requires_grad_(), weight.requires_grad_()
    with _Largest() as largest:
        given = (hidden, weight, ref_hidden, ref_weight)
        ratios = fused_log_ratios(*given, tokens, chunk_size=8)
        kl = fused_token_kl(*given, chunk_size=8)
        (ratios + kl).sum().backward()
    # blocks of 8 rows, with a scratch block beside
    assert largest.numbers < b * t * v / 4
    with _Largest() as largest:
        plain_logprobs(hidden, weight)
    assert largest.numbers == b * t * v


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_float32_ratios(dtype):
    """In bfloat16 a log-probability near -3 is known to 0.016, more than a step changes it."""
    policy, reference, tokens, mask = heads(10, dtype)
    policy = [x.requires_grad_() for x in policy]
    ratios, kl = fused_pair(policy, reference, tokens, mask=mask)
    assert ratios.dtype == kl.dtype == torch.float32
    wide = [[x.double() for x in model] for model in (policy, reference)]
    expected = plain_ratios(*wide, tokens) * mask
    torch.testing.assert_close(ratios.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kl.double(), plain_kl(*wide) * mask, rtol=1e-4, atol=1e-4)
    (ratios + kl).sum().backward()
    for x in policy:
        assert x.grad.dtype == dtype
        assert x.grad.isfinite().all()


def test_large_logits_and_strides():
    policy, reference, tokens, _ = heads(11)
    scaled = (1e4 * policy[0], *policy[1:])
    ratios, kl = fused_pair(scaled, reference, tokens)
    assert ratios.isfinite().all()
    assert kl.isfinite().all()
    turned = [
        (x[0].transpose(0, 1).contiguous().transpose(0, 1), *x[1:]) for x in (policy, reference)
    ]
    for a, b in zip(
        fused_pair(*turned, tokens), fused_pair(policy, reference, tokens), strict=True
    ):
        torch.testing.assert_close(a, b)


P, R, Y, M = heads()
PH, PW, RH, RW = P[0], P[1], R[0], R[1]


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: fused_log_ratios(PH, PW, RH, RW[:-1], Y), ValueError, "ref_weight"),
        (lambda: fused_token_kl(PH, PW, RH, RW[:-1]), ValueError, "ref_weight"),
        (lambda: fused_log_ratios(PH, PW[:, :-1], RH, RW, Y), ValueError, "policy_weight"),
        (lambda: fused_log_ratios(PH, PW, RH[:, :-1], RW, Y), ValueError, "ref_hidden"),
        (lambda: fused_log_ratios(PH[0], PW, RH, RW, Y), ValueError, "policy_hidden"),
        (lambda: fused_log_ratios(PH, PW, RH, RW, Y[:, :-1]), ValueError, "policy_hidden"),
        (lambda: fused_log_ratios(PH, PW, RH, RW, Y.double()), TypeError, "tokens"),
        (lambda: fused_log_ratios(PH, PW, RH, RW, Y + V), ValueError, "tokens must be in"),
        (lambda: fused_token_kl(PH, PW, RH, RW, policy_bias=PH), ValueError, "policy_bias"),
        (lambda: fused_token_kl(PH, PW, RH, RW, ref_bias=[0.0]), TypeError, "ref_bias"),
        (lambda: fused_log_ratios(PH, PW, RH, RW, Y, mask=M[0]), ValueError, "mask"),
        (lambda: fused_token_kl(PH, PW, RH, RW, mask=M[0]), ValueError, "mask"),
        (lambda: fused_token_kl(PH.long(), PW, RH, RW), TypeError, "policy_hidden"),
        (lambda: fused_token_kl(PH, PW, RH, RW, temperature=0.0), ValueError, "temperature"),
        (lambda: fused_logprobs(PH, PW, Y, chunk_size=0), ValueError, "chunk_size"),
        (lambda: fused_logprobs(PH, PW, None), TypeError, "tokens"),
        (lambda: fused_logprobs(PH, PW, Y[:, :-1]), ValueError, "hidden"),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()
