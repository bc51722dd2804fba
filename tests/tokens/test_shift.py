"""Token shift on logits, the nucleus, and the summary over positions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.divergences import JENSEN_SHANNON, KL, f_divergence
from steelyard.fused import linear_token_shift
from steelyard.tokens import TokenShift, nucleus, shift_summary, token_shift
from steelyard.tokens import shift as shift_module

properties = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31)
LOG_2 = math.log(2.0)


def pair(seed, *shape, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64))


def entropy(p):
    return torch.special.entr(p).sum(-1)


def ranked(row):
    return sorted(range(len(row)), key=lambda v: (-row[v], v))


def nucleus_by_the_book(probs, top_p):
    kept, mass = [], 0.0
    for token in ranked(probs):
        kept.append(token)
        mass += probs[token]
        if mass >= top_p - 1e-12:
            break
    return [probs[v] / mass if v in kept else 0.0 for v in range(len(probs))]


@properties
@given(seeds, st.integers(1, 9))
def test_every_field_is_that_of_the_plain_formula(seed, top_k):
    base, rl = pair(seed, 2, 3, 7)
    shift = token_shift(base, rl, top_k=top_k)
    p, q = base.softmax(-1), rl.softmax(-1)
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(
        shift.js, entropy((p + q) / 2) - entropy(p) / 2 - entropy(q) / 2, **close
    )
    torch.testing.assert_close(shift.js, f_divergence(p.log(), q.log(), JENSEN_SHANNON), **close)
    torch.testing.assert_close(shift.kl, f_divergence(p.log(), q.log(), KL), **close)
    torch.testing.assert_close(shift.base_entropy, entropy(p), **close)
    torch.testing.assert_close(shift.rl_entropy, entropy(q), **close)
    for i in range(2):
        for t in range(3):
            first, second = ranked(p[i, t].tolist()), ranked(q[i, t].tolist())
            assert shift.rl_top1_base_rank[i, t] == first.index(second[0]) + 1
            assert shift.base_top1_rl_rank[i, t] == second.index(first[0]) + 1
            assert shift.rl_top1_base_prob[i, t].item() == pytest.approx(p[i, t, second[0]].item())
            sizes = range(1, min(top_k, 7) + 1)
            shares = [len({*first[:k]} & {*second[:k]}) / k for k in sizes]
            assert shift.overlap[i, t].tolist() == pytest.approx(shares, abs=1e-15)


@properties
@given(seeds)
def test_js_is_symmetric_bounded_by_log_two_and_zero_only_at_equality(seed):
    base, rl = pair(seed, 8, 5, scale=4.0)
    js = token_shift(base, rl).js
    torch.testing.assert_close(js, token_shift(rl, base).js, rtol=0, atol=1e-15)
    assert ((js > 0) & (js <= LOG_2)).all()
    assert token_shift(base, base).js.max() < 1e-15


def test_js_is_log_two_exactly_for_disjoint_supports():
    base = torch.tensor([0.0, 1.0, -math.inf, -math.inf], dtype=torch.float64)
    shift = token_shift(base, base.flip(0))
    assert shift.js.item() == pytest.approx(LOG_2, abs=1e-15)
    assert shift.kl.item() == math.inf
    touching = torch.tensor([-math.inf, 0.0, 0.0, -math.inf], dtype=torch.float64)
    assert token_shift(base, touching).js.item() < LOG_2 - 0.1


@properties
@given(seeds)
def test_the_square_root_of_js_obeys_the_triangle_inequality(seed):
    a, b = pair(seed, 50, 4, scale=3.0)
    c, _ = pair(seed + 1, 50, 4, scale=3.0)
    ab, bc, ac = (token_shift(*x).js.sqrt() for x in ((a, b), (b, c), (a, c)))
    assert (ac <= ab + bc + 1e-12).all()


@properties
@given(seeds)
def test_js_lies_between_half_the_square_of_tv_and_tv_log_two(seed):
    base, rl = pair(seed, 50, 6, scale=3.0)
    tv = (base.softmax(-1) - rl.softmax(-1)).abs().sum(-1) / 2
    js = token_shift(base, rl).js
    assert (js <= tv * LOG_2 + 1e-12).all()
    assert (js >= tv.square() / 2 - 1e-12).all()


@properties
@given(seeds, st.floats(-50, 50), st.sampled_from([None, 0.7]))
def test_constants_and_the_order_of_the_vocabulary_do_not_matter(seed, constant, top_p):
    base, rl = pair(seed, 4, 6)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    plain = token_shift(base, rl, top_p=top_p)
    for changed in ((base + constant, rl - constant), (base[:, order], rl[:, order])):
        for one, other in zip(token_shift(*changed, top_p=top_p), plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@properties
@given(seeds)
def test_overlap_of_the_whole_vocabulary_is_one_and_overlap_is_symmetric(seed):
    base, rl = pair(seed, 4, 6)
    overlap = token_shift(base, rl, top_k=6).overlap
    assert (overlap[:, -1] == 1).all()
    assert torch.equal(overlap, token_shift(rl, base, top_k=6).overlap)


def test_top_p_truncates_each_side_before_js_and_kl_only():
    base, rl = pair(3, 5, 6)
    p = torch.tensor([nucleus_by_the_book(row, 0.7) for row in base.softmax(-1).tolist()])
    q = torch.tensor([nucleus_by_the_book(row, 0.7) for row in rl.softmax(-1).tolist()])
    plain, cut = token_shift(base, rl), token_shift(base, rl, top_p=0.7)
    expected = token_shift(p.double().log(), q.double().log())
    torch.testing.assert_close(cut.js, expected.js, rtol=0, atol=1e-6)
    torch.testing.assert_close(cut.kl, expected.kl, rtol=0, atol=1e-6)
    assert cut.kl.isinf().any()  # a token of P's nucleus that Q's lacks
    for name in TokenShift._fields[2:]:
        assert torch.equal(getattr(cut, name), getattr(plain, name)), name
    for one, other in zip(token_shift(base, rl, top_p=1.0), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_truncation_may_enlarge_the_divergence():
    base = torch.tensor([0.69, 0.16, 0.15], dtype=torch.float64).log()
    rl = torch.tensor([0.71, 0.15, 0.14], dtype=torch.float64).log()
    full, cut = token_shift(base, rl).js, token_shift(base, rl, top_p=0.7).js
    assert full < 1e-3
    assert cut > 0.05


def test_it_is_what_the_fused_head_gives_and_blocks_do_not_show(monkeypatch):
    base, rl = pair(1, 9, 13)
    head = torch.eye(13, dtype=torch.float64)
    fused = linear_token_shift(base, head, rl, head, top_k=4)
    monkeypatch.setattr(shift_module, "_CPU_BLOCK", 30)
    for one, other in zip(token_shift(base, rl, top_k=4), fused, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_ties_go_to_the_lower_index():
    base = torch.zeros(4)
    rl = torch.tensor([0.0, 0.0, 1.0, 1.0])
    shift = token_shift(base, rl, top_k=2)
    assert shift.rl_top1_base_rank == 3
    assert shift.base_top1_rl_rank == 3
    assert shift.overlap.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    base, rl = (x.to(dtype) for x in pair(2, 3, 50))
    low, wide = token_shift(base, rl), token_shift(base.double(), rl.double())
    assert low.js.dtype == dtype
    for one, other in zip(low, wide, strict=True):
        torch.testing.assert_close(one, other.to(one.dtype))
    assert token_shift(base, rl.double()).js.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_1e4_and_one_token_stay_finite(dtype):
    base = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype)
    shift = token_shift(base, base.flip(1), top_p=0.9)
    assert shift.js.item() == pytest.approx(LOG_2)
    assert token_shift(base, base.flip(1)).kl.item() == 1e4
    single = token_shift(base[:, :1], base[:, 1:2])
    assert single.js.item() == 0.0
    assert single.overlap.tolist() == [[1.0]]


def test_strides_gradients_and_nan_rows():
    base, rl = pair(5, 6, 4)
    strided = token_shift(base.T.contiguous().T.requires_grad_(), rl)
    assert torch.equal(strided.js, token_shift(base, rl).js)
    assert not strided.js.requires_grad
    broken = base.clone()
    broken[2, 1] = math.nan
    js = token_shift(broken, rl).js
    assert js.isnan().tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"base_logits": torch.zeros(2, 4)}, ValueError, "rl_logits must have the shape"),
        ({"base_logits": torch.zeros(2, 3).long()}, TypeError, "base_logits must have a floating"),
        ({"base_logits": torch.zeros(0, 3), "rl_logits": torch.zeros(0, 3)}, ValueError, "empty"),
        ({"base_logits": torch.zeros(()), "rl_logits": torch.zeros(())}, ValueError, "scalar"),
        ({"top_p": 0.0}, ValueError, "top_p must be > 0"),
        ({"top_p": 1.1}, ValueError, "top_p must be"),
        ({"top_p": math.nan}, ValueError, "top_p must be"),
        ({"top_k": 0}, ValueError, "top_k must be >= 1"),
        ({"top_k": 1.5}, TypeError, "top_k must be an integer"),
    ],
)
def test_errors_of_token_shift_name_the_argument(change, error, message):
    arguments = {"base_logits": torch.zeros(2, 3), "rl_logits": torch.zeros(2, 3), **change}
    with pytest.raises(error, match=message):
        token_shift(**arguments)


@properties
@given(seeds, st.floats(0.01, 0.99))
def test_nucleus_is_the_shortest_prefix_that_holds_the_mass(seed, top_p):
    probs = pair(seed, 5, 7)[0].softmax(-1)
    got = nucleus(probs, top_p)
    for row, cut in zip(probs.tolist(), got.tolist(), strict=True):
        assert cut == pytest.approx(nucleus_by_the_book(row, top_p), abs=1e-12)


def test_nucleus_is_that_of_transformers():
    warpers = pytest.importorskip("transformers").generation.logits_process
    logits = pair(9, 20, 30)[0]
    kept = warpers.TopPLogitsWarper(0.8)(None, logits).softmax(-1)
    torch.testing.assert_close(nucleus(logits.softmax(-1), 0.8), kept, rtol=0, atol=1e-12)


def test_nucleus_at_exact_sums_ties_and_ends():
    for dtype in (torch.float32, torch.float64):
        probs = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1], dtype=dtype)
        assert (nucleus(probs, 0.8) > 0).tolist() == [True, True, True, False, False]
        assert (nucleus(probs, 1e-300) > 0).tolist() == [True, False, False, False, False]
        torch.testing.assert_close(nucleus(probs, 1.0), probs)
    tail = torch.tensor([1.0, 1e-30])
    assert nucleus(tail, 1.0)[1] > 0  # 1 keeps every token, however small
    weights = torch.tensor([[1.0, 3.0], [4.0, 4.0]])
    assert nucleus(weights, 0.75).tolist() == [[0.0, 1.0], [0.5, 0.5]]
    assert nucleus(torch.tensor([math.nan, 1.0]), 0.5).isnan().all()
    assert nucleus(probs.half(), 0.8).dtype == torch.float16


@pytest.mark.parametrize(
    ("probs", "top_p", "error", "message"),
    [
        (torch.tensor([0.5, -0.1]), 0.5, ValueError, "probs must be non-negative"),
        (torch.zeros(3), 0.5, ValueError, "positive sum"),
        (torch.zeros(0), 0.5, ValueError, "probs must not be empty"),
        (torch.ones(2).long(), 0.5, TypeError, "probs must have a floating"),
        (torch.ones(2), 0.0, ValueError, "top_p"),
    ],
)
def test_errors_of_nucleus_name_the_argument(probs, top_p, error, message):
    with pytest.raises(error, match=message):
        nucleus(probs, top_p)


@properties
@given(seeds, st.integers(1, 6), st.booleans())
def test_summary_is_the_loop_over_kept_tokens(seed, bins, masked):
    generator = torch.Generator().manual_seed(seed)
    js = LOG_2 * torch.rand(4, 9, generator=generator, dtype=torch.float64).square()
    mask = torch.rand(4, 9, generator=generator) < 0.6 if masked else None
    summary = shift_summary(js, mask, thresholds=(0.05, 0.2), position_bins=bins)
    kept, by_bin = [], [[] for _ in range(bins)]
    for row, keep in zip(js, torch.ones(4, 9).bool() if mask is None else mask, strict=True):
        values = row[keep].tolist()
        kept += values
        for t, value in enumerate(values):
            share = t / (len(values) - 1) if len(values) > 1 else 0.0
            by_bin[min(bins - 1, math.floor(bins * share + 1e-9))].append(value)
    assert summary.share_below.item() == pytest.approx(np.mean([x <= 0.05 for x in kept]))
    assert summary.share_above.item() == pytest.approx(np.mean([x > 0.2 for x in kept]))
    expected = np.percentile(kept, [50, 90, 95, 99])
    assert summary.percentiles.numpy() == pytest.approx(expected, abs=1e-12)
    means = [np.mean(x) if x else 0.0 for x in by_bin]
    assert summary.position_means.numpy() == pytest.approx(means, abs=1e-12)


def test_thresholds_are_inclusive_below_and_strict_above():
    summary = shift_summary(torch.tensor([[0.01, 0.02, 0.1, 0.2]]))
    assert summary.share_below == 0.25
    assert summary.share_above == 0.25


def test_a_fully_masked_summary_is_zero_and_masked_nan_does_not_matter():
    js = torch.full((2, 3), math.nan)
    for field in shift_summary(js, torch.zeros(2, 3)):
        assert (field == 0).all()
    js[0, 1] = 0.5
    one = shift_summary(js, js == 0.5)
    assert one.percentiles.tolist() == [0.5] * 4
    assert one.position_means.tolist() == [0.5, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="js must not be NaN"):
        shift_summary(js)
    assert shift_summary(one.percentiles.bfloat16()[None]).share_above.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"js": torch.zeros(3)}, ValueError, "js must have shape"),
        ({"js": torch.zeros(0, 3)}, ValueError, "js must not be empty"),
        ({"js": torch.zeros(2, 3).long()}, TypeError, "js must have a floating"),
        ({"mask": torch.zeros(3)}, ValueError, "mask must have shape"),
        ({"thresholds": (0.1,)}, ValueError, "thresholds must be two"),
        ({"thresholds": (0.1, math.nan)}, ValueError, "thresholds must not be NaN"),
        ({"thresholds": (0.1, "x")}, TypeError, "thresholds must be a number"),
        ({"position_bins": 0}, ValueError, "bins must be >= 1"),
    ],
)
def test_errors_of_the_summary_name_the_argument(change, error, message):
    arguments = {"js": torch.zeros(2, 3), **change}
    with pytest.raises(error, match=message):
        shift_summary(**arguments)
