import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steelyard.divergences import JENSEN_SHANNON, KL, f_divergence
from steelyard.fused import TokenShift, linear_token_shift
from steelyard.fused._shift import shift_of_rows, top_tokens


def order(row):
    """Tokens from likely to unlikely, ties by index."""
    return sorted(range(len(row)), key=lambda v: (-row[v], v))


def by_the_book(base_logits, rl_logits, top_k):
    p, q = base_logits.log_softmax(-1), rl_logits.log_softmax(-1)
    fields = {name: [] for name in TokenShift._fields}
    for a, b in zip(p, q, strict=True):
        first, second = order(a.tolist()), order(b.tolist())
        fields["js"].append(f_divergence(a, b, JENSEN_SHANNON))
        fields["kl"].append(f_divergence(a, b, KL))
        fields["base_entropy"].append(torch.distributions.Categorical(logits=a).entropy())
        fields["rl_entropy"].append(torch.distributions.Categorical(logits=b).entropy())
        sizes = range(1, min(top_k, len(a)) + 1)
        shares = [len({*first[:k]} & {*second[:k]}) / k for k in sizes]
        fields["overlap"].append(torch.tensor(shares, dtype=a.dtype))
        fields["rl_top1_base_rank"].append(torch.tensor(first.index(second[0]) + 1))
        fields["rl_top1_base_prob"].append(a[second[0]].exp())
        fields["base_top1_rl_rank"].append(torch.tensor(second.index(first[0]) + 1))
    return TokenShift(**{name: torch.stack(rows) for name, rows in fields.items()})


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 100])
@pytest.mark.parametrize("top_k", [1, 4, 50])
def test_every_field_is_that_of_the_plain_formula(tensor, chunk_size, top_k):
    heads = (tensor(7, 5), tensor(13, 5), tensor(7, 4), tensor(13, 4))
    mine = linear_token_shift(*heads, top_k=top_k, chunk_size=chunk_size)
    exact = by_the_book(heads[0] @ heads[1].T, heads[2] @ heads[3].T, top_k)
    for name, one, other in zip(TokenShift._fields, mine, exact, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-10, atol=1e-12, msg=name)
        assert not one.requires_grad


@given(
    base=st.lists(st.integers(0, 2), min_size=1, max_size=8),
    data=st.data(),
    top_k=st.integers(1, 9),
)
@settings(max_examples=50, deadline=None)
def test_ties_go_to_the_lower_index(base, data, top_k):
    rl = data.draw(st.lists(st.integers(0, 2), min_size=len(base), max_size=len(base)))
    logits = torch.tensor([base, rl], dtype=torch.float64)[:, None]
    mine, exact = shift_of_rows(*logits, top_k), by_the_book(*logits, top_k)
    for name in ("overlap", "rl_top1_base_rank", "base_top1_rl_rank"):
        assert torch.equal(getattr(mine, name), getattr(exact, name)), name
    assert top_tokens(logits[0], top_k).tolist() == [order(base)[:top_k]]


def test_disjoint_supports_are_log_2_apart_and_infinitely_so_in_kl():
    base = torch.tensor([[0.0, 0.0, -math.inf, -math.inf]], dtype=torch.float64)
    shift = shift_of_rows(base, base.flip(1), 4)
    torch.testing.assert_close(shift.js, torch.tensor([math.log(2.0)], dtype=torch.float64))
    assert shift.kl.item() == math.inf
    torch.testing.assert_close(shift.base_entropy, shift.js)
    assert shift.overlap.tolist() == [[0.0, 0.0, 2 / 3, 1.0]]
    assert shift.rl_top1_base_rank.tolist() == [3]
    assert shift.rl_top1_base_prob.tolist() == [0.0]


def test_a_model_has_not_moved_from_itself(tensor):
    hidden, weight = tensor(7, 5), tensor(13, 5)
    shift = linear_token_shift(hidden, weight, hidden, weight)
    assert shift.js.max() < 1e-15
    assert shift.kl.abs().max() < 1e-15
    assert (shift.overlap == 1.0).all()
    assert (shift.rl_top1_base_rank == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_1e4_stay_finite(dtype):
    base = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype)
    shift = shift_of_rows(base, base.flip(1), 2)
    torch.testing.assert_close(shift.js, torch.tensor([1e4 / 1e4], dtype=dtype) * math.log(2.0))
    assert shift.kl.item() == 1e4
    assert shift.base_entropy.item() == 0.0


@given(seed=st.integers(0, 2**16))
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_js_lies_between_half_the_square_of_tv_and_tv_log_2(tensor, seed):
    base, rl = tensor(3, 9, seed=seed, scale=3.0), tensor(3, 9, seed=seed + 1, scale=3.0)
    variation = (base.softmax(-1) - rl.softmax(-1)).abs().sum(-1) / 2
    js = shift_of_rows(base, rl, 1).js
    assert (js <= variation * math.log(2.0) + 1e-12).all()
    assert (js >= variation.square() / 2 - 1e-12).all()


def test_non_contiguous_inputs_give_the_same(tensor):
    heads = (tensor(7, 5), tensor(13, 5), tensor(7, 4), tensor(13, 4))
    strided = [x.detach().T.contiguous().T for x in heads]
    for one, other in zip(linear_token_shift(*strided), linear_token_shift(*heads), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_heads_with_logits_of_1e4_give_the_limits(dtype):
    base = torch.tensor([[1e4], [-1e4], [0.0]], dtype=dtype)
    rl = torch.tensor([[-1e4], [-1e4], [1e4]], dtype=dtype)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], dtype=dtype)
    shift = linear_token_shift(base, weight, rl, weight)
    log_2 = math.log(2.0)
    assert all(field.isfinite().all() for field in shift)
    # Opposite certainties; the same one; the uniform law against one token.
    assert shift.js.tolist() == pytest.approx([log_2, 0.0, log_2 / 6 + math.log(1.5) / 2], 1e-6)
    assert shift.kl[:2].tolist() == [2e4, 0.0]
    assert shift.rl_top1_base_rank.tolist() == [3, 1, 1]


def test_no_rows_give_empty_fields(tensor):
    shift = linear_token_shift(tensor(0, 5), tensor(13, 5), tensor(0, 4), tensor(13, 4))
    assert shift.overlap.shape == (0, 10)
    assert all(len(field) == 0 for field in shift)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(tensor, dtype):
    low = [x.detach().to(dtype) for x in (tensor(7, 5), tensor(13, 5), tensor(7, 4), tensor(13, 4))]
    mine = linear_token_shift(*low)
    wide = linear_token_shift(*(x.double() for x in low))
    assert mine.js.dtype == dtype
    assert torch.equal(mine.rl_top1_base_rank, wide.rl_top1_base_rank)
    for one, other in zip(mine, wide, strict=True):
        torch.testing.assert_close(one, other.to(one.dtype))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"base_hidden": torch.zeros(7)}, ValueError, "base_hidden must have shape"),
        ({"rl_hidden": torch.zeros(6, 5)}, ValueError, "rl_hidden must have shape"),
        ({"rl_weight": torch.zeros(12, 5)}, ValueError, "rl_weight must have shape"),
        ({"base_weight": torch.zeros(13, 5).int()}, TypeError, "base_weight must have a floating"),
        ({"top_k": 0}, ValueError, "top_k must be >= 1"),
        ({"top_k": 2.5}, TypeError, "top_k must be an integer, got float"),
        ({"top_k": True}, TypeError, "top_k must be an integer, got bool"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be >= 1"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {
        "base_hidden": torch.zeros(7, 5),
        "base_weight": torch.zeros(13, 5),
        "rl_hidden": torch.zeros(7, 5),
        "rl_weight": torch.zeros(13, 5),
        **change,
    }
    with pytest.raises(error, match=message):
        linear_token_shift(**arguments)
