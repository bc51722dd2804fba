import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from steelyard.fused import linear_logprobs

CHUNKS = (None, 1, 2, 100)


@pytest.fixture
def plain(logprobs_of):
    def formula(hidden, weight, targets, bias=None, temperature=1.0):
        logprobs = logprobs_of(hidden, weight, bias, temperature)
        probs = logprobs.exp()
        terms = torch.where(probs > 0, probs * logprobs.clamp(min=-1e30), 0.0)
        return logprobs.gather(1, targets.long()[:, None])[:, 0], -terms.sum(-1)

    return formula


@pytest.fixture
def inputs(tensor):
    targets = torch.tensor([0, 12, 3, 3, 7, 1, 11])
    return tensor(7, 5), tensor(13, 5), targets, tensor(13)


def upstream(logprobs, entropy):
    factors = torch.linspace(-1.0, 2.0, len(logprobs), dtype=logprobs.dtype)
    return (factors * logprobs + factors.flip(0).square() * entropy).sum()


def results(function, hidden, weight, targets, bias, **options):
    outputs = function(hidden, weight, targets, bias=bias, **options)
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    return (*outputs, *torch.autograd.grad(upstream(*outputs), leaves))


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_values_and_gradients_are_those_of_the_plain_formula(
    inputs, plain, chunk_size, with_bias, dtype, bound
):
    hidden, weight, targets, bias = inputs
    cast = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight, bias)]
    mine = results(
        linear_logprobs,
        *cast[:2],
        targets,
        cast[2] if with_bias else None,
        temperature=0.7,
        chunk_size=chunk_size,
    )
    exact = results(plain, hidden, weight, targets, bias if with_bias else None, temperature=0.7)
    for one, other in zip(mine, exact, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=bound, atol=bound)


def test_gradcheck(inputs):
    hidden, weight, targets, bias = inputs
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logprobs(h, w, targets, bias=b, temperature=1.3),
        (hidden, weight, bias),
    )


@given(rows=st.integers(0, 6), vocabulary=st.integers(1, 9), chunk=st.integers(1, 8))
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_size_and_any_chunk_give_the_same(plain, tensor, rows, vocabulary, chunk):
    hidden, weight = tensor(rows, 3), tensor(vocabulary, 3, seed=1)
    targets = torch.arange(rows) % vocabulary
    mine = linear_logprobs(hidden, weight, targets, chunk_size=chunk)
    for one, other in zip(mine, plain(hidden, weight, targets), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone_has_the_right_gradient(inputs, plain, used):
    hidden, weight, targets, bias = inputs
    mine = linear_logprobs(hidden, weight, targets, bias=bias)[used].square().sum()
    other = plain(hidden, weight, targets, bias)[used].square().sum()
    for one, two in zip(
        torch.autograd.grad(mine, (hidden, weight, bias)),
        torch.autograd.grad(other, (hidden, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_no_rows_give_empty_results_and_zero_gradients(tensor):
    hidden, weight = tensor(0, 5), tensor(13, 5)
    logprobs, entropy = linear_logprobs(hidden, weight, torch.zeros(0, dtype=torch.long))
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == entropy.shape == (0,)
    assert torch.equal(weight.grad, torch.zeros(13, 5, dtype=torch.float64))


def test_gradients_accumulate_and_a_head_may_be_used_twice(inputs, plain):
    hidden, weight, targets, _ = inputs
    for formula in (linear_logprobs, plain):
        weight.grad = None
        twice = formula(hidden * formula(hidden, weight, targets)[0][:, None], weight, targets)
        upstream(*twice).backward(retain_graph=True)
        upstream(*twice).backward()
        upstream(*formula(hidden, weight, targets)).backward()
        if formula is linear_logprobs:
            mine = weight.grad
    torch.testing.assert_close(mine, weight.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_1e4_stay_finite(dtype):
    hidden = torch.tensor([[1e4], [-1e4], [0.0]], dtype=dtype, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5], [1.0]], dtype=dtype, requires_grad=True)
    logprobs, entropy = linear_logprobs(hidden, weight, torch.tensor([1, 1, 2]))
    (logprobs + entropy).sum().backward()
    assert logprobs[0] == -2e4 - torch.tensor(2.0, dtype=dtype).log()
    assert entropy[1] == 0.0
    torch.testing.assert_close(entropy[2], torch.tensor(4.0, dtype=dtype).log())
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_excluded_entries_have_no_mass_and_no_gradient(inputs, plain):
    hidden, weight, targets, _ = inputs
    bias = torch.zeros(13, dtype=torch.float64)
    bias[[0, 1, 2, 3, 4, 5, 12]] = -torch.inf
    kept = torch.tensor([6, 7, 8, 9, 10, 11, 7])
    bias.requires_grad_()
    mine = results(linear_logprobs, hidden, weight, kept, bias, chunk_size=2)
    rest = bias.isfinite().nonzero()[:, 0]
    exact = results(plain, hidden, weight[rest], kept - 6, bias[rest].detach().requires_grad_())
    torch.testing.assert_close(mine[:3], exact[:3], rtol=1e-12, atol=1e-12)
    assert not mine[3][[0, 5, 12]].any()
    assert linear_logprobs(hidden, weight, targets, bias=bias).logprobs[0] == -torch.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("native", [True, False])
def test_half_precision_accumulates_in_float32(inputs, plain, dtype, native, monkeypatch):
    from steelyard.fused import _blocks

    monkeypatch.setattr(_blocks, "_has_fast_products", lambda *_: native)
    hidden, weight, targets, bias = inputs
    cast = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight, bias)]
    wide = [x.detach().double().requires_grad_() for x in cast]
    mine = results(linear_logprobs, *cast[:2], targets, cast[2], temperature=2.0)
    exact = results(plain, *wide[:2], targets, wide[2], temperature=2.0)
    eps = torch.finfo(dtype).eps * (8 if native else 1)
    for one, other in zip(mine, exact, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=eps, atol=eps)


def test_hidden_and_weight_may_differ_in_precision(inputs, plain):
    hidden, weight, targets, _ = inputs
    low = hidden.detach().bfloat16().requires_grad_()
    wide = weight.detach().float().requires_grad_()
    mine = results(linear_logprobs, low, wide, targets, None)
    exact = results(plain, low.detach().double().requires_grad_(), weight, targets, None)
    assert [x.dtype for x in mine] == [torch.float32, torch.float32, torch.bfloat16, torch.float32]
    torch.testing.assert_close(mine[3].double(), exact[3], rtol=1e-5, atol=1e-5)


def test_autocast_changes_nothing(inputs):
    hidden, weight, targets, _ = (
        x.detach().float() if x.is_floating_point() else x for x in inputs
    )
    outside = linear_logprobs(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear_logprobs(hidden, weight, targets)
    assert torch.equal(outside.logprobs, inside.logprobs)
    assert torch.equal(outside.entropy, inside.entropy)


def test_non_contiguous_inputs_give_the_same(inputs):
    hidden, weight, targets, bias = inputs
    strided = (
        hidden.detach().T.contiguous().T,
        weight.detach().repeat_interleave(2, 1)[:, ::2],
        targets.repeat_interleave(2)[::2],
    )
    mine = linear_logprobs(*strided, bias=bias.detach().repeat_interleave(2)[::2])
    torch.testing.assert_close(
        tuple(mine), tuple(linear_logprobs(hidden, weight, targets, bias=bias))
    )


def test_a_head_shared_with_the_hidden_states_gets_both_gradients(tensor, plain):
    embedding, targets = tensor(7, 5), torch.arange(7)
    mine, other = (
        torch.autograd.grad(upstream(*f(embedding, embedding, targets)), embedding)[0]
        for f in (linear_logprobs, plain)
    )
    torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(inputs, reentrant):
    hidden, weight, targets, _ = inputs
    direct = torch.autograd.grad(upstream(*linear_logprobs(hidden, weight, targets)), weight)[0]
    outputs = checkpoint(linear_logprobs, hidden, weight, targets, use_reentrant=reentrant)
    upstream(*outputs).backward()
    assert torch.equal(weight.grad, direct)


def test_a_compiled_caller_gets_the_same(inputs):
    hidden, weight, targets, _ = inputs

    def loss(hidden, weight):
        return upstream(*linear_logprobs(hidden * 2, weight, targets)) * 3

    compiled = torch.compile(loss, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, weight), loss(hidden, weight))
    mine = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
    torch.testing.assert_close(mine, torch.autograd.grad(loss(hidden, weight), (hidden, weight)))


def test_functional_gradients_work(inputs):
    hidden, weight, targets, _ = inputs
    mine = torch.func.grad(lambda w: upstream(*linear_logprobs(hidden.detach(), w, targets)))(
        weight
    )
    direct = torch.autograd.grad(upstream(*linear_logprobs(hidden, weight, targets)), weight)[0]
    torch.testing.assert_close(mine, direct)


def test_nan_spreads_to_its_row_only(inputs):
    hidden, weight, targets, _ = inputs
    broken = hidden.detach().clone()
    broken[2, 0] = torch.nan
    logprobs, entropy = linear_logprobs(broken, weight, targets, chunk_size=3)
    assert logprobs.isnan().nonzero().tolist() == [[2]]
    assert entropy.isnan().nonzero().tolist() == [[2]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(7)}, ValueError, "hidden must have shape"),
        ({"hidden": torch.zeros(7, 5).long()}, TypeError, "hidden must have a floating dtype"),
        ({"weight": torch.zeros(13, 4)}, ValueError, "weight must have shape"),
        ({"weight": torch.zeros(0, 5)}, ValueError, "weight must have at least one row"),
        ({"targets": torch.zeros(6).long()}, ValueError, "targets must have shape"),
        ({"targets": torch.zeros(7)}, TypeError, "targets must have an integer dtype"),
        ({"targets": torch.full((7,), 13)}, ValueError, r"targets must be in \[0, 13\)"),
        ({"targets": torch.full((7,), -1)}, ValueError, r"targets must be in \[0, 13\)"),
        ({"bias": torch.zeros(12)}, ValueError, "bias must have shape"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0"),
        ({"temperature": -1.0}, ValueError, "temperature must be > 0"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be >= 1"),
        ({"chunk_size": 2.0}, TypeError, "chunk_size must be an integer"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {
        "hidden": torch.zeros(7, 5),
        "weight": torch.zeros(13, 5),
        "targets": torch.zeros(7, dtype=torch.long),
        **change,
    }
    with pytest.raises(error, match=message):
        linear_logprobs(**arguments)
