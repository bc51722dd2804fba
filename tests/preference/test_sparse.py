"""SparsePO against the derivation of token-level advantages, and the masks against their rules."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid

from steelyard.preference import (
    LearnedTokenMask,
    activation_mask,
    f_dpo_loss,
    mask_sparsity,
    sparse_po_loss,
    sparse_po_reward,
    tdpo1_loss,
    tdpo2_loss,
)

quick = settings(deadline=None, max_examples=20)
seeds = st.integers(0, 2**31)
close = {"rtol": 0, "atol": 1e-12}
MASKS = ("reward_mask_chosen", "reward_mask_rejected", "kl_mask_chosen", "kl_mask_rejected")


def batch(seed: int, b: int = 3, t: int = 5, s: int = 7):
    """Log ratios and divergences of chosen and rejected responses, weights and token masks."""
    g = torch.Generator().manual_seed(seed)

    def normal(length):
        return torch.randn(b, length, dtype=torch.float64, generator=g)

    tensors = [normal(t), normal(s), normal(t).square(), normal(s).square()]
    weights = dict(zip(MASKS, (normal(x).relu() for x in (t, s, t, s)), strict=True))
    kept = {}
    for name, length in (("mask_chosen", t), ("mask_rejected", s)):
        kept[name] = torch.arange(length) < torch.randint(1, length + 1, (b, 1), generator=g)
    return tensors, weights, kept


def zeros_like(tensors):
    chosen, rejected = tensors[:2]
    return dict(zip(MASKS, (torch.zeros_like(x) for x in (chosen, rejected) * 2), strict=True))


def loop(tensors, weights, kept, beta, l1_reward=0.0, l1_kl=0.0):
    """The published loss, token by token."""
    rho_w, rho_l, kl_w, kl_l = tensors
    losses = []
    for i in range(len(rho_w)):
        u = delta = l1_u = l1_d = 0.0
        for t in range(rho_w.shape[1]):
            if kept["mask_chosen"][i, t]:
                u += weights["reward_mask_chosen"][i, t] * rho_w[i, t]
                delta -= weights["kl_mask_chosen"][i, t] * kl_w[i, t]
                l1_u += weights["reward_mask_chosen"][i, t]
                l1_d += weights["kl_mask_chosen"][i, t]
        for t in range(rho_l.shape[1]):
            if kept["mask_rejected"][i, t]:
                u -= weights["reward_mask_rejected"][i, t] * rho_l[i, t]
                delta += weights["kl_mask_rejected"][i, t] * kl_l[i, t]
                l1_u += weights["reward_mask_rejected"][i, t]
                l1_d += weights["kl_mask_rejected"][i, t]
        losses.append(-logsigmoid(beta * (u - delta)) + l1_reward * l1_u + l1_kl * l1_d)
    return torch.stack(losses)


@quick
@given(seeds, st.floats(0.05, 3), st.floats(0, 0.1), st.floats(0, 0.1))
def test_loss_is_the_loop_over_tokens(seed, beta, l1_reward, l1_kl):
    tensors, weights, kept = batch(seed)
    options = {"beta": beta, "l1_reward": l1_reward, "l1_kl": l1_kl}
    got = sparse_po_loss(*tensors, **options, **weights, **kept, reduction="none")
    torch.testing.assert_close(got, loop(tensors, weights, kept, **options), **close)
    mean = sparse_po_loss(*tensors, **options, **weights, **kept)
    torch.testing.assert_close(mean, got.mean(), **close)
    total = sparse_po_loss(*tensors, **options, **weights, **kept, reduction="sum")
    torch.testing.assert_close(total, got.sum(), **close)


def test_worked_example():
    ref = torch.tensor([0.5, 0.5], dtype=torch.float64)
    policy = torch.tensor([0.8, 0.2], dtype=torch.float64)
    rho = (policy / ref).log()
    kl = (ref * (ref / policy).log()).sum().view(1, 1)
    assert kl.item() == pytest.approx(0.2231436, abs=1e-7)
    given = (rho[0].view(1, 1), rho[1].view(1, 1), kl, kl)
    zero = torch.zeros(1, 1)
    for masks, expected in (
        ({}, math.log(5 / 4)),
        ({"kl_mask_rejected": zero}, math.log(6 / 5)),
        ({"reward_mask_chosen": zero}, math.log(1.4)),
    ):
        loss = sparse_po_loss(*given, beta=1.0, **masks)
        assert loss.item() == pytest.approx(expected, abs=1e-12)


@quick
@given(seeds)
def test_without_kl_masks_it_is_dpo(seed):
    tensors, _, kept = batch(seed)
    zero = {k: v for k, v in zeros_like(tensors).items() if k.startswith("kl")}
    got = sparse_po_loss(*tensors, beta=0.3, **zero, **kept)
    sums = [
        (x * m).sum(-1)
        for x, m in zip(tensors[:2], (kept["mask_chosen"], kept["mask_rejected"]), strict=True)
    ]
    torch.testing.assert_close(got, f_dpo_loss(*sums, beta=0.3), **close)


@quick
@given(seeds)
def test_with_masks_of_one_it_is_tdpo1(seed):
    tensors, _, kept = batch(seed)
    ones = {name: torch.ones_like(x) for name, x in zeros_like(tensors).items()}
    expected = sparse_po_loss(*tensors, **ones, **kept)
    torch.testing.assert_close(tdpo1_loss(*tensors, **kept), expected, **close)
    torch.testing.assert_close(sparse_po_loss(*tensors, **kept), expected, **close)
    torch.testing.assert_close(tdpo2_loss(*tensors, alpha=1.0, **kept), expected, **close)
    booleans = {name: x.bool() for name, x in ones.items()}
    torch.testing.assert_close(sparse_po_loss(*tensors, **booleans, **kept), expected, **close)


def test_tdpo2_is_its_formula_and_stops_the_gradient_on_chosen_divergences():
    tensors, _, _ = batch(0)
    rho_w, rho_l, kl_w, kl_l = (x.requires_grad_() for x in tensors)
    margin = rho_w.sum(-1) - rho_l.sum(-1) - 0.5 * (kl_l.sum(-1) - kl_w.sum(-1))
    loss = tdpo2_loss(rho_w, rho_l, kl_w, kl_l, beta=0.4)
    torch.testing.assert_close(loss, -logsigmoid(0.4 * margin).mean(), **close)
    slopes = torch.autograd.grad(loss, (rho_w, kl_w, kl_l), allow_unused=True)
    assert slopes[1] is None
    assert (slopes[0] < 0).all()
    assert (slopes[2] > 0).all()
    first = torch.autograd.grad(tdpo1_loss(rho_w, rho_l, kl_w, kl_l), kl_w)[0]
    assert (first < 0).all()  # TDPO1 raises the divergence on chosen responses


def test_with_masks_of_zero_the_loss_is_log_two_and_the_policy_gets_no_gradient():
    tensors, _, kept = batch(1)
    tensors = [x.requires_grad_() for x in tensors]
    loss = sparse_po_loss(*tensors, **zeros_like(tensors), **kept)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-15)
    assert all((x.grad == 0).all() for x in tensors)


def test_at_the_reference_the_loss_is_log_two_and_the_masks_get_no_gradient():
    tensors, weights, kept = batch(2)
    weights = {name: x.requires_grad_() for name, x in weights.items()}
    loss = sparse_po_loss(*(torch.zeros_like(x) for x in tensors), **weights, **kept)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-15)
    assert all((x.grad == 0).all() for x in weights.values())


@quick
@given(seeds, st.floats(0.1, 10))
def test_masks_and_beta_are_known_up_to_a_common_scale(seed, scale):
    tensors, weights, kept = batch(seed)
    scaled = {name: scale * x for name, x in weights.items()}
    before = sparse_po_loss(*tensors, beta=0.5, **weights, **kept)
    after = sparse_po_loss(*tensors, beta=0.5 / scale, **scaled, **kept)
    torch.testing.assert_close(after, before, **close)


def test_padding_changes_nothing_whatever_it_holds():
    tensors, weights, kept = batch(3)
    before = sparse_po_loss(*tensors, **weights, **kept, l1_reward=0.1, l1_kl=0.2)

    def padded(x, fill):
        return torch.cat((x, torch.full((len(x), 4), fill, dtype=torch.float64).to(x.dtype)), 1)

    for fill in (math.nan, math.inf, -1e300):
        longer = [padded(x, fill).requires_grad_() for x in tensors]
        more = {name: padded(x, fill) for name, x in weights.items()}
        rest = {name: padded(x, 0) for name, x in kept.items()}
        after = sparse_po_loss(*longer, **more, **rest, l1_reward=0.1, l1_kl=0.2)
        torch.testing.assert_close(after, before, **close)
        after.backward()
        assert all(x.grad.isfinite().all() for x in longer)
        assert (longer[0].grad[:, -4:] == 0).all()


@quick
@given(seeds)
def test_swapping_the_responses_changes_the_sign_of_the_margin(seed):
    (rho_w, rho_l, kl_w, kl_l), weights, _ = batch(seed, t=6, s=6)
    swapped = {name: weights[_other(name)] for name in weights}
    there = sparse_po_loss(rho_w, rho_l, kl_w, kl_l, beta=0.7, **weights, reduction="none")
    back = sparse_po_loss(rho_l, rho_w, kl_l, kl_w, beta=0.7, **swapped, reduction="none")
    rewards = [
        sparse_po_reward(
            rho,
            kl,
            beta=0.7,
            reward_mask=weights[f"reward_mask_{which}"],
            kl_mask=weights[f"kl_mask_{which}"],
        )
        for rho, kl, which in ((rho_w, kl_w, "chosen"), (rho_l, kl_l, "rejected"))
    ]
    torch.testing.assert_close(there - back, rewards[1] - rewards[0], **close)


def _other(name: str) -> str:
    stem, which = name.rsplit("_", 1)
    return f"{stem}_{'rejected' if which == 'chosen' else 'chosen'}"


def test_only_the_divergences_tell_the_sign_of_delta():
    """A chosen response with more divergence is preferred: delta = K(l) - K(w) is negative."""
    rho = torch.zeros(1, 1)
    high, low = torch.full((1, 1), 2.0), torch.full((1, 1), 0.5)
    loss = sparse_po_loss(rho, rho, high, low, beta=1.0)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1.5)))


@quick
@given(seeds, st.floats(0.05, 3), st.floats(0.1, 3))
def test_optimal_policy_of_a_state_has_this_advantage(seed, beta, weight):
    """pi = ref exp(Q / (beta m)) / Z: A = beta m (log pi/ref + KL(ref||pi)), E_ref[A] = 0."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(5, dtype=torch.float64, generator=g)
    ref = torch.randn(5, dtype=torch.float64, generator=g).softmax(-1)
    log_policy = (ref.log() + q / (beta * weight)).log_softmax(-1)
    log_ratio = log_policy - ref.log()
    kl = -(ref * log_ratio).sum()
    mask = torch.full((5, 1), weight, dtype=torch.float64)
    got = sparse_po_reward(
        log_ratio[:, None],
        kl.expand(5, 1),
        beta=beta,
        reward_mask=mask,
        kl_mask=mask,
    )
    advantage = q - (ref * q).sum()
    torch.testing.assert_close(got, advantage, rtol=1e-9, atol=1e-9)
    assert abs((ref * got).sum()) < 1e-9


def test_gradients_of_masks_are_those_of_the_paper():
    tensors, weights, _ = batch(4)
    rho_w, rho_l, kl_w, kl_l = tensors
    weights = {name: x.requires_grad_() for name, x in weights.items()}
    sparse_po_loss(*tensors, beta=0.6, **weights, reduction="sum").backward()
    w = {name: x.detach() for name, x in weights.items()}
    margin = (w["reward_mask_chosen"] * rho_w + w["kl_mask_chosen"] * kl_w).sum(-1)
    margin = margin - (w["reward_mask_rejected"] * rho_l + w["kl_mask_rejected"] * kl_l).sum(-1)
    c = 0.6 * torch.sigmoid(-0.6 * margin)[:, None]
    for name, expected in zip(MASKS, (-c * rho_w, c * rho_l, -c * kl_w, c * kl_l), strict=True):
        torch.testing.assert_close(weights[name].grad, expected, **close)
    assert (weights["kl_mask_chosen"].grad <= 0).all()
    assert (weights["kl_mask_rejected"].grad >= 0).all()


def test_gradcheck_in_everything_down_to_the_logits():
    tensors, weights, kept = batch(5, b=2, t=2, s=3)
    inputs = [x.requires_grad_() for x in (*tensors, *weights.values())]

    def loss(*given):
        masks = dict(zip(MASKS, given[4:], strict=True))
        return sparse_po_loss(*given[:4], **masks, **kept, l1_reward=0.1, l1_kl=0.3)

    positive = [x.detach().abs().add(0.1).requires_grad_() for x in inputs[4:]]
    assert torch.autograd.gradcheck(loss, (*inputs[:4], *positive))

    g = torch.Generator().manual_seed(0)
    logits, ref = torch.randn(2, 2, 1, 2, 4, dtype=torch.float64, generator=g)
    ref = ref.log_softmax(-1)
    tokens = torch.tensor([[[0, 1]], [[2, 3]]])

    def from_logits(x):
        policy = x.log_softmax(-1)
        rho = (policy - ref).gather(-1, tokens[..., None])[..., 0]
        kl = (ref.exp() * (ref - policy)).sum(-1)
        return sparse_po_loss(rho[0], rho[1], kl[0], kl[1], beta=0.8)

    assert torch.autograd.gradcheck(from_logits, logits.requires_grad_())


def test_token_kl_is_positive_but_at_equal_laws():
    g = torch.Generator().manual_seed(1)
    policy, ref = torch.randn(2, 20, 6, dtype=torch.float64, generator=g).log_softmax(-1)
    kl = (ref.exp() * (ref - policy)).sum(-1)
    assert (kl > 0).all()
    zero = torch.zeros(20, 1, dtype=torch.float64)
    assert (sparse_po_reward(zero, kl[:, None]) > 0).all()
    assert (sparse_po_reward(zero, zero) == 0).all()


@quick
@given(seeds)
def test_masking_irrelevant_tokens_with_equal_terms_in_both_changes_nothing(seed):
    (rho_w, rho_l, kl_w, kl_l), _, _ = batch(seed, t=6, s=6)
    relevant = torch.tensor([False, True, False, False, True, False])
    rho_l = torch.where(relevant, rho_l, rho_w)
    kl_l = torch.where(relevant, kl_l, kl_w)
    oracle = relevant.expand(3, 6)
    masks = dict.fromkeys(MASKS, oracle)
    full = sparse_po_loss(rho_w, rho_l, kl_w, kl_l)
    torch.testing.assert_close(sparse_po_loss(rho_w, rho_l, kl_w, kl_l, **masks), full, **close)


def test_l1_is_a_sum_over_tokens_or_a_mean():
    zero = torch.zeros(2, 4)
    weight = torch.full((2, 4), 0.5)
    kept = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    masks = {"reward_mask_chosen": weight, "reward_mask_rejected": weight}
    common = {"mask_chosen": kept, "mask_rejected": kept, "reduction": "none", "l1_reward": 1.0}
    for how, norms in (("sum", [4.0, 2.0]), ("mean", [1.0, 1.0])):
        got = sparse_po_loss(zero, zero, zero, zero, **masks, **common, l1_aggregate=how)
        torch.testing.assert_close(got, math.log(2) + torch.tensor(norms))
    got = sparse_po_loss(zero, zero, zero, zero, l1_kl=1.0, reduction="none")
    torch.testing.assert_close(got, torch.full((2,), math.log(2) + 8))  # masks of one


def test_fully_masked_pairs_count_zero_and_no_pair_is_zero():
    tensors, weights, _ = batch(6)
    tensors = [x.requires_grad_() for x in tensors]
    kept = {"mask_chosen": torch.ones(3, 5), "mask_rejected": torch.ones(3, 7)}
    for mask in kept.values():
        mask[1] = 0
    each = sparse_po_loss(*tensors, **weights, **kept, l1_kl=1.0, reduction="none")
    assert each[1] == 0
    mean = sparse_po_loss(*tensors, **weights, **kept, l1_kl=1.0)
    torch.testing.assert_close(mean, (each[0] + each[2]) / 2)
    none = {name: torch.zeros_like(x) for name, x in kept.items()}
    loss = sparse_po_loss(*tensors, **weights, **none, l1_kl=1.0)
    loss.backward()
    assert loss.item() == 0
    assert all((x.grad == 0).all() for x in tensors)
    kept["mask_rejected"][1] = 1  # an empty chosen response alone is a pair
    assert sparse_po_loss(*tensors, **weights, **kept, reduction="none")[1] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extreme_ratios_are_finite_in_every_dtype(dtype):
    size = 400.0
    ends = torch.tensor([[-size, size], [size, size], [-size, -size]], dtype=dtype)
    kl = torch.tensor([[0.0, 1e4], [1e4, 1e4], [0.0, 0.0]], dtype=dtype)
    given = [x.clone().requires_grad_() for x in (ends, ends.flip(0), kl, kl.flip(0))]
    loss = sparse_po_loss(*given)
    loss.backward()
    assert loss.dtype == dtype
    assert loss.isfinite()
    assert all(x.grad.isfinite().all() for x in given)
    tensors, weights, kept = batch(7)
    low = [x.to(dtype) for x in tensors]
    masks = {name: x.to(dtype) for name, x in weights.items()}
    wide = {name: x.double() for name, x in masks.items()}
    got = sparse_po_loss(*low, **masks, **kept)
    expected = sparse_po_loss(*(x.double() for x in low), **wide, **kept)
    torch.testing.assert_close(got.double(), expected, rtol=torch.finfo(dtype).eps * 4, atol=1e-6)


def test_nan_propagates_and_strides_do_not_matter():
    tensors, weights, _ = batch(8)
    loss = sparse_po_loss(*tensors, **weights)
    turned = [x.T.contiguous().T for x in tensors]
    torch.testing.assert_close(sparse_po_loss(*turned, **weights), loss)
    tensors[1][0, 0] = math.nan
    assert sparse_po_loss(*tensors, **weights).isnan()
    single = [x[:1, :1] for x in batch(9)[0]]
    assert sparse_po_loss(*single).isfinite()


def test_loss_compiles_in_one_graph_and_works_under_vmap():
    tensors, weights, kept = batch(10)

    def loss(*x):
        return sparse_po_loss(*x, **weights, **kept, l1_reward=0.1)

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors), loss(*tensors), **close)
    each = torch.func.vmap(lambda *x: sparse_po_loss(*(y[None] for y in x)))(*tensors)
    torch.testing.assert_close(each, sparse_po_loss(*tensors, reduction="none"), **close)


# --- masks -------------------------------------------------------------------------------------


def states(seed: int, layers=3, b=2, t=6, d=4, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(layers, b, t, d, dtype=torch.float64, generator=g).to(dtype)
    mask = torch.arange(t) < torch.randint(2, t + 1, (b, 1), generator=g)
    return hidden, mask


@quick
@given(seeds)
def test_activation_mask_is_the_published_recipe_with_the_z_score(seed):
    hidden, mask = states(seed)
    got = activation_mask(hidden, mask)
    expected = torch.zeros_like(got)
    for layer, i in itertools.product(range(3), range(2)):
        a = hidden[layer, i, mask[i]].mean(-1)
        z = (a - a.mean()) / (a.std() + 1e-12)
        expected[i, mask[i]] += (z - z.min()) / (z.max() - z.min()) / 3
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    assert ((got >= 0) & (got <= 1)).all()
    assert (got[~mask] == 0).all()


@quick
@given(seeds, st.floats(0.1, 10), st.floats(-5, 5))
def test_activation_mask_ignores_scale_and_offset_and_spans_zero_to_one(seed, scale, offset):
    hidden, mask = states(seed, layers=1)
    got = activation_mask(hidden, mask)
    moved = activation_mask(scale * hidden + offset, mask)
    torch.testing.assert_close(moved, got, rtol=0, atol=1e-9)
    for row, kept in zip(got, mask, strict=True):
        assert row[kept].min() == 0
        assert row[kept].max() == 1


def test_equally_active_tokens_and_single_tokens_have_weight_one():
    hidden = torch.ones(2, 3, 4, 5, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    got = activation_mask(hidden, mask)
    assert not got.requires_grad
    torch.testing.assert_close(got, mask.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_activation_mask_stays_in_range_in_low_precision(dtype):
    hidden, mask = states(3, dtype=dtype)
    for scaled in (hidden, 1e4 * hidden):
        got = activation_mask(scaled, mask)
        assert got.dtype == dtype
        assert ((got >= 0) & (got <= 1)).all()
    padded = hidden.clone()
    padded[:, ~mask] = math.nan
    assert torch.equal(activation_mask(padded, mask), activation_mask(hidden, mask))
    hidden[0, 0, 0, 0] = math.nan
    got = activation_mask(hidden, mask)
    assert got[0, mask[0]].isnan().all()
    assert got[1].isfinite().all()


def formula(head: LearnedTokenMask, hidden: torch.Tensor) -> torch.Tensor:
    """The learned mask by hand."""
    mixed = 0.0
    for w, b, v, h in zip(head.layer_weight, head.layer_bias, head.mix_weight, hidden, strict=True):
        centred = h - h.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        normed = scaled * head.norm.weight + head.norm.bias
        mixed = mixed + v * ((normed * w).sum(-1) + b).clamp(min=0)
    return mixed.clamp(min=0)


def random_head(seed: int, layers=3, d=4) -> LearnedTokenMask:
    g = torch.Generator().manual_seed(seed)
    head = LearnedTokenMask(layers, d).double()
    with torch.no_grad():
        for x in head.parameters():
            x.copy_(torch.randn(x.shape, dtype=torch.float64, generator=g))
    return head


@quick
@given(seeds)
def test_learned_mask_is_its_formula(seed):
    head, (hidden, _) = random_head(seed), states(seed)
    torch.testing.assert_close(head(hidden), formula(head, hidden), rtol=0, atol=1e-10)
    assert (head(hidden) >= 0).all()


def test_learned_mask_starts_at_one_with_a_gradient_in_every_parameter_that_has_an_effect():
    head = LearnedTokenMask(3, 4).double()
    hidden, _ = states(0)
    mask = head(hidden)
    torch.testing.assert_close(mask, torch.ones_like(mask), rtol=0, atol=1e-7)  # 1/3 in float32
    (mask * torch.arange(6)).sum().backward()
    for x in (head.layer_weight, head.layer_bias, head.mix_weight):
        assert (x.grad != 0).any(-1).all()
    assert {name: list(x.shape) for name, x in head.state_dict().items()} == {
        "norm.weight": [4],
        "norm.bias": [4],
        "layer_weight": [3, 4],
        "layer_bias": [3],
        "mix_weight": [3],
    }
    assert head.norm.eps == 1e-5


def test_learned_mask_is_exactly_zero_below_the_kink_and_no_gradient_passes():
    head = random_head(1)
    hidden, _ = states(1)
    with torch.no_grad():
        head.layer_bias.fill_(-100.0)
    mask = head(hidden)
    mask.sum().backward()
    assert (mask == 0).all()
    assert all((x.grad == 0).all() for x in head.parameters())
    head = random_head(1)
    with torch.no_grad():
        head.mix_weight.copy_(-head.mix_weight.abs())
    mask = head(hidden)
    mask.sum().backward()
    assert (mask == 0).all()
    assert all((x.grad == 0).all() for x in head.parameters())


def test_learned_mask_gradients_by_finite_differences():
    head, (hidden, _) = random_head(0), states(2, b=1, t=2)
    names = [name for name, _ in head.named_parameters()]
    with torch.no_grad():
        head.mix_weight.abs_()
    values = [x.detach().clone().requires_grad_() for x in head.parameters()]

    def run(*given):
        return torch.func.functional_call(head, dict(zip(names, given, strict=True)), hidden)

    assert (run(*values) > 0).any()
    assert torch.autograd.gradcheck(run, values)


def test_a_head_trained_by_the_loss_finds_the_states_that_matter():
    """One feature marks the relevant states; the head turns the weight of the others down."""
    g = torch.Generator().manual_seed(0)
    relevant = torch.rand(64, 8, generator=g) < 0.3
    rho_w = torch.where(relevant, 1.0, 0.0) + 0.05 * torch.randn(64, 8, generator=g)
    rho_l = -rho_w
    kl = torch.zeros(64, 8)
    hidden = torch.randn(1, 64, 8, 4, generator=g)
    hidden[0, :, :, 0] = torch.where(relevant, 3.0, -3.0)
    head = LearnedTokenMask(1, 4)
    optimiser = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(60):
        optimiser.zero_grad()
        m = head(hidden)
        masks = dict.fromkeys(MASKS, m)
        sparse_po_loss(rho_w, rho_l, kl, kl, beta=0.5, **masks, l1_reward=0.02).backward()
        optimiser.step()
    m = head(hidden).detach()
    assert m[relevant].mean() > 1
    assert m[~relevant].mean() < 0.2
    assert mask_sparsity(m) > 0.4


def test_dropout_is_off_in_evaluation_and_scales_survivors():
    head = LearnedTokenMask(1, 4, dropout=0.5)
    hidden = torch.randn(1, 20, 50, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    assert set(head(hidden).detach().unique().tolist()) == {0.0, 4.0}
    assert (head.eval()(hidden) == 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states_meet_float32_parameters(dtype):
    head = random_head(4).float()
    hidden, _ = states(4)
    low = head(hidden.to(dtype))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, head(hidden.to(dtype).float()))
    assert head.to(dtype)(hidden.to(dtype)).dtype == dtype


def test_sparsity_is_a_mean_over_responses_of_shares_of_kept_tokens():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    weight = torch.tensor([[0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 5.0, 5.0], [0.0, 0.0, 0.0, 0.0]])
    assert mask_sparsity(weight, mask).item() == (0.25 + 1.0) / 2
    assert mask_sparsity(weight, torch.zeros(3, 4)) == 0
    assert mask_sparsity(weight.half(), mask).dtype == torch.float32


A, B = torch.zeros(2, 3), torch.zeros(2, 4)
H = torch.zeros(2, 2, 3, 4)


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: sparse_po_loss(A, B, B, B), ValueError, "chosen_kl"),
        (lambda: sparse_po_loss(A, B, A, A), ValueError, "rejected_kl"),
        (lambda: sparse_po_loss(A, B[:1], A, B[:1]), ValueError, "rejected_log_ratio"),
        (lambda: sparse_po_loss(A[0], B, A[0], B), ValueError, "chosen_log_ratio"),
        (lambda: sparse_po_loss(A[:0], B[:0], A[:0], B[:0]), ValueError, "chosen_log_ratio"),
        (lambda: sparse_po_loss(A.long(), B, A, B), TypeError, "chosen_log_ratio"),
        (lambda: sparse_po_loss(A, B, A.long(), B), TypeError, "chosen_kl"),
        (lambda: sparse_po_loss(A, B, A, B, beta=0.0), ValueError, "beta"),
        (lambda: sparse_po_loss(A, B, A, B, l1_reward=-1.0), ValueError, "l1_reward"),
        (lambda: sparse_po_loss(A, B, A, B, l1_kl=math.nan), ValueError, "l1_kl"),
        (lambda: sparse_po_loss(A, B, A, B, l1_aggregate="x"), ValueError, "l1_aggregate"),
        (lambda: sparse_po_loss(A, B, A, B, reduction="x"), ValueError, "reduction"),
        (lambda: sparse_po_loss(A, B, A, B, mask_chosen=B), ValueError, "mask_chosen"),
        (lambda: sparse_po_loss(A, B, A, B, mask_rejected=A), ValueError, "mask_rejected"),
        *(
            (lambda name=name: sparse_po_loss(A, B, A, B, **{name: A[0]}), ValueError, name)
            for name in MASKS
        ),
        (lambda: sparse_po_reward(A, B), ValueError, "kl"),
        (lambda: sparse_po_reward(A, A, mask=B), ValueError, "mask"),
        (lambda: sparse_po_reward(A, A, beta=-1.0), ValueError, "beta"),
        (lambda: tdpo2_loss(A, B, A, B, alpha=-1.0), ValueError, "alpha"),
        (lambda: activation_mask(H[0]), ValueError, "hidden"),
        (lambda: activation_mask(H.long()), TypeError, "hidden"),
        (lambda: activation_mask(H[:0]), ValueError, "hidden"),
        (lambda: activation_mask(H, torch.ones(3, 2)), ValueError, "mask"),
        (lambda: LearnedTokenMask(0, 4), ValueError, "num_layers"),
        (lambda: LearnedTokenMask(2, 4.0), TypeError, "hidden_size"),
        (lambda: LearnedTokenMask(2, 4, dropout=1.0), ValueError, "dropout"),
        (lambda: LearnedTokenMask(3, 4)(H), ValueError, "hidden"),
        (lambda: LearnedTokenMask(2, 5)(H), ValueError, "hidden"),
        (lambda: mask_sparsity(A[0]), ValueError, "token_mask"),
        (lambda: mask_sparsity(A, B), ValueError, "mask"),
        (lambda: mask_sparsity(A.bool()), TypeError, "token_mask"),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()
