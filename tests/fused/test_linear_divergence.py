import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from steelyard.divergences import (
    JEFFREYS,
    JENSEN_SHANNON,
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
from steelyard.fused import _slopes, linear_divergence

ALL = [
    KL,
    REVERSE_KL,
    JENSEN_SHANNON,
    TOTAL_VARIATION,
    PEARSON_CHI2,
    NEYMAN_CHI2,
    SQUARED_HELLINGER,
    JEFFREYS,
    SOFTENED_REVERSE_KL,
    alpha_divergence(1.0),
    alpha_divergence(0.3),
    skew_jensen_shannon(0.1),
    skew_jensen_shannon(0.9, rescaled=True),
    KL.centred(),
]
NAMES = ("p_hidden", "p_weight", "q_hidden", "q_weight", "p_bias", "q_bias")
MASK = torch.tensor([1, 0, 1, 1, 0, 1, 1])


@pytest.fixture
def heads(tensor):
    """Two heads of different widths."""
    shapes = ((7, 5), (13, 5), (7, 4), (13, 4), (13,), (13,))
    return {
        n: tensor(*s, seed=i, scale=0.7) for i, (n, s) in enumerate(zip(NAMES, shapes, strict=True))
    }


@pytest.fixture
def plain(logprobs_of):
    def formula(
        p_hidden,
        p_weight,
        q_hidden,
        q_weight,
        divergence,
        *,
        p_bias=None,
        q_bias=None,
        temperature=1.0,
        mask=None,
        reduction="mean",
    ):
        p = logprobs_of(p_hidden, p_weight, p_bias, temperature)
        q = logprobs_of(q_hidden, q_weight, q_bias, temperature)
        return f_divergence(p, q, divergence, mask=mask, reduction=reduction)

    return formula


def results(function, heads, divergence, **options):
    value = function(divergence=divergence, **heads, **options)
    factors = torch.linspace(-1.0, 2.0, value.numel(), dtype=value.dtype)
    loss = 3 * (value * factors).sum() if value.dim() else 3 * value
    leaves = [x for x in heads.values() if x is not None and x.requires_grad]
    return (value, *torch.autograd.grad(loss, leaves))


def assert_close(mine, exact, bound=1e-12):
    for one, other in zip(mine, exact, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=bound, atol=bound)


@pytest.mark.parametrize("divergence", ALL, ids=lambda d: d.name)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_values_and_gradients_are_those_of_the_plain_formula(heads, plain, divergence, reduction):
    options = {"temperature": 0.8, "mask": MASK, "reduction": reduction}
    mine = results(linear_divergence, heads, divergence, **options)
    exact = results(plain, heads, divergence, **options)
    assert_close(mine, exact, 1e-10)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_any_chunk_size_gives_the_same(heads, plain, chunk_size, dtype):
    cast = {name: x.detach().to(dtype).requires_grad_() for name, x in heads.items()}
    mine = results(linear_divergence, cast, JENSEN_SHANNON, chunk_size=chunk_size)
    exact = results(plain, heads, JENSEN_SHANNON)
    assert all(x.dtype == dtype for x in mine)
    assert_close(mine, exact, 1e-12 if dtype == torch.float64 else 1e-5)


@given(
    rows=st.integers(0, 5),
    vocabulary=st.integers(1, 9),
    chunk=st.integers(1, 7),
    divergence=st.sampled_from([KL, JENSEN_SHANNON, TOTAL_VARIATION, PEARSON_CHI2]),
)
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_size_gives_the_same(plain, tensor, rows, vocabulary, chunk, divergence):
    heads = (tensor(rows, 3), tensor(vocabulary, 3), tensor(rows, 2), tensor(vocabulary, 2))
    mine = linear_divergence(*heads, divergence, chunk_size=chunk, reduction="none")
    exact = plain(*heads, divergence, reduction="none")
    torch.testing.assert_close(mine, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradcheck(heads, reduction):
    assert torch.autograd.gradcheck(
        lambda *x: linear_divergence(
            *x[:4], JENSEN_SHANNON, p_bias=x[4], q_bias=x[5], mask=MASK, reduction=reduction
        ),
        tuple(heads.values()),
    )


@pytest.mark.parametrize("trained", [*NAMES, "all of q"])
def test_only_tensors_that_require_it_get_a_gradient(heads, plain, trained):
    wanted = NAMES[2:4] if trained == "all of q" else (trained,)
    frozen = {n: x.detach().requires_grad_(n in wanted) for n, x in heads.items()}
    assert_close(results(linear_divergence, frozen, KL), results(plain, frozen, KL))


def test_no_gradients_are_formed_when_none_is_wanted(heads, monkeypatch):
    calls = []
    slopes = _slopes.torch.addcmul
    monkeypatch.setattr(
        _slopes.torch, "addcmul", lambda *a, **k: calls.append(1) or slopes(*a, **k)
    )
    with torch.no_grad():
        linear_divergence(divergence=KL, **heads)
    linear_divergence(divergence=KL, **{name: x.detach() for name, x in heads.items()})
    assert not calls
    linear_divergence(divergence=KL, **heads)
    assert calls  # what is watched is what forms them


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 7])
def test_without_a_kept_row_value_and_gradients_are_zero(heads, reduction, rows):
    cut = {n: x[:rows] if "hidden" in n else x for n, x in heads.items()}
    cut = {n: x.detach().clone().requires_grad_() for n, x in cut.items()}
    value = linear_divergence(
        divergence=KL, **cut, mask=torch.zeros(rows, dtype=torch.bool), reduction=reduction
    )
    value.sum().backward()
    assert value.shape == ((rows,) if reduction == "none" else ())
    assert not value.any()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in cut.values())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows_at_all_give_zero_and_zero_gradients(heads, reduction):
    cut = {n: x[:0] if "hidden" in n else x for n, x in heads.items()}
    value, *grads = results(linear_divergence, cut, JENSEN_SHANNON, reduction=reduction)
    assert value.shape == ((0,) if reduction == "none" else ())
    assert not value.any()
    assert all(
        torch.equal(g, torch.zeros_like(x)) for g, x in zip(grads, cut.values(), strict=True)
    )


def test_masked_rows_may_hold_anything(heads, plain):
    spoilt = {n: x.detach().clone() for n, x in heads.items()}
    spoilt["p_hidden"][MASK == 0] = torch.nan
    spoilt["q_hidden"][MASK == 0] = torch.inf
    leaves = {n: x.requires_grad_() for n, x in spoilt.items()}
    for reduction in ("mean", "none"):
        options = {"mask": MASK, "reduction": reduction}
        assert_close(
            results(linear_divergence, leaves, KL, **options),
            results(plain, heads, KL, **options),
        )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_graph_may_be_used_twice_and_gradients_accumulate(heads, plain, reduction):
    grads = []
    for formula in (linear_divergence, plain):
        leaves = {n: x.detach().clone().requires_grad_() for n, x in heads.items()}
        value = formula(divergence=JENSEN_SHANNON, **leaves, reduction=reduction).sum()
        (2 * value).backward(retain_graph=True)
        (5 * value).backward(retain_graph=True)
        (value * value.detach() + formula(divergence=KL, **leaves)).backward()
        grads.append([x.grad for x in leaves.values()])
    assert_close(*grads)


def test_tied_weights_get_the_sum_of_both_gradients(tensor, plain):
    weight, p_hidden, q_hidden = tensor(13, 5), tensor(7, 5), tensor(7, 5, seed=3)
    mine, exact = (
        torch.autograd.grad(f(p_hidden, weight, q_hidden, weight, KL), (weight, p_hidden))
        for f in (linear_divergence, plain)
    )
    assert_close(mine, exact)


def test_a_head_is_at_no_distance_from_itself(tensor):
    hidden, weight = tensor(7, 5), tensor(13, 5)
    for divergence in ALL:
        value = linear_divergence(hidden, weight, hidden, weight, divergence)
        gradient = torch.autograd.grad(value, hidden)[0]
        assert abs(value.item()) < 1e-14
        assert gradient.abs().max() < 1e-14


@pytest.mark.parametrize("divergence", [JENSEN_SHANNON, TOTAL_VARIATION, SQUARED_HELLINGER, KL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_1e4_stay_finite(divergence, dtype, plain):
    p_hidden = torch.tensor([[1e4], [-1e4], [0.0]], dtype=dtype, requires_grad=True)
    q_hidden = torch.tensor([[-1e4], [1e4], [1e4]], dtype=dtype, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], dtype=dtype, requires_grad=True)
    mine, exact = (
        [
            v := f(p_hidden, weight, q_hidden, weight, divergence),
            *torch.autograd.grad(v, (p_hidden, q_hidden, weight)),
        ]
        for f in (linear_divergence, plain)
    )
    assert all(x.isfinite().all() for x in mine)
    assert_close(mine, exact, 1e-5)


@pytest.mark.parametrize("divergence", ALL, ids=lambda d: d.name)
def test_excluded_entries_follow_the_zero_rules(heads, plain, divergence):
    biases = {n: torch.zeros(13, dtype=torch.float64) for n in ("p_bias", "q_bias")}
    biases["p_bias"][[0, 1, 2]] = -torch.inf
    biases["q_bias"][[2, 3]] = -torch.inf
    cut = {**heads, **{n: x.requires_grad_() for n, x in biases.items()}}
    value, *grads = results(linear_divergence, cut, divergence)
    exact, *exact_grads = results(plain, cut, divergence)
    torch.testing.assert_close(value, exact, rtol=1e-12, atol=1e-12)
    if exact.isfinite():
        assert_close(grads, exact_grads)
    assert not any(x.isnan().any() for x in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("native", [True, False])
def test_half_precision_accumulates_in_float32(heads, plain, dtype, native, monkeypatch):
    from steelyard.fused import _blocks

    monkeypatch.setattr(_blocks, "_has_fast_products", lambda *_: native)
    cast = {n: x.detach().to(dtype).requires_grad_() for n, x in heads.items()}
    wide = {n: x.detach().double().requires_grad_() for n, x in cast.items()}
    mine = results(linear_divergence, cast, JENSEN_SHANNON, temperature=2.0)
    exact = results(plain, wide, JENSEN_SHANNON, temperature=2.0)
    assert all(x.dtype == dtype for x in mine)
    assert_close(mine, exact, torch.finfo(dtype).eps * (8 if native else 1))


def test_a_float16_gradient_is_scaled_before_it_is_rounded():
    hidden = torch.tensor([[1e-3, 0.0]], dtype=torch.float16, requires_grad=True)
    head = torch.eye(2, dtype=torch.float16)
    value = linear_divergence(torch.zeros_like(hidden), head, hidden * 1e-2, head, KL)
    (value.float() * 65536).backward()
    assert hidden.grad.abs().min() > 0


def test_non_contiguous_inputs_give_the_same(heads):
    strided = {
        n: x.detach().T.contiguous().T if x.dim() == 2 else x.detach().repeat_interleave(2)[::2]
        for n, x in heads.items()
    }
    torch.testing.assert_close(
        linear_divergence(divergence=KL, **strided), linear_divergence(divergence=KL, **heads)
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(heads, reentrant):
    arguments = [heads[name] for name in NAMES[:4]]
    direct = torch.autograd.grad(linear_divergence(*arguments, KL), arguments)
    value = checkpoint(linear_divergence, *arguments, KL, use_reentrant=reentrant)
    value.backward()
    assert_close([x.grad for x in arguments], direct, 0.0)


def test_a_compiled_caller_gets_the_same(heads):
    def loss(p_hidden, p_weight, q_hidden, q_weight):
        return 2 * linear_divergence(p_hidden, p_weight, 3 * q_hidden, q_weight, KL, mask=MASK)

    arguments = [heads[name] for name in NAMES[:4]]
    value = torch.compile(loss, backend="aot_eager")(*arguments)
    torch.testing.assert_close(value, loss(*arguments))
    exact = torch.autograd.grad(loss(*arguments), arguments)
    assert_close(torch.autograd.grad(value, arguments), exact)


def test_functional_gradients_work(heads):
    p_hidden, p_weight, q_hidden, q_weight = (heads[name].detach() for name in NAMES[:4])

    def loss(weight):
        return 2 * linear_divergence(p_hidden, p_weight, q_hidden, weight, JENSEN_SHANNON)

    leaf = q_weight.clone().requires_grad_()
    exact = torch.autograd.grad(loss(leaf), leaf)[0]
    torch.testing.assert_close(torch.func.grad(loss)(q_weight), exact)


def test_an_overflowing_derivative_falls_back_to_the_terms():
    # Float32: the ratio is exp(95), its square no number; the divergence is.
    p = torch.tensor([[0.0, -60.0]], dtype=torch.float32)
    q = torch.tensor([[0.0, -155.0]], dtype=torch.float32, requires_grad=True)
    value, (_, slope) = _slopes.divergence_and_slopes(p, q, KL, (False, True))
    assert 0.0 <= value.item() < 1e-6
    assert slope.isfinite().all()


def test_total_variation_is_accurate_in_float32_where_no_token_ties(tensor, plain):
    shapes = ((64, 16), (500, 16), (64, 8), (500, 8))
    low = [tensor(*shape, dtype=torch.float32, scale=0.7) for shape in shapes]
    wide = [x.detach().double().requires_grad_() for x in low]
    log_p, log_q = ((h @ w.T).log_softmax(-1) for h, w in (wide[:2], wide[2:]))
    no_tie = ((log_p - log_q).abs() > 1e-5).all(-1)
    assert no_tie.sum() > 32
    grads = [
        torch.autograd.grad(f(*x, TOTAL_VARIATION, mask=no_tie), x)
        for f, x in ((linear_divergence, low), (plain, wide))
    ]
    for mine, exact in zip(*grads, strict=True):
        assert (mine - exact).abs().max() < 1e-5 * exact.abs().max()


def test_a_sign_lost_to_rounding_changes_the_slope_by_the_tokens_probability_at_most():
    # Logits that differ in the last bits: float32 cannot know which law gives a token more.
    generator = torch.Generator().manual_seed(0)
    z_p = 3 * torch.randn(4, 500, generator=generator)
    z_q = z_p * (
        1 + torch.finfo(torch.float32).eps * torch.randint(-3, 4, (4, 500), generator=generator)
    )
    _, slopes = _slopes.divergence_and_slopes(z_p, z_q, TOTAL_VARIATION, (True, True))
    wide = z_p.double(), z_q.double()
    _, exact = _slopes.divergence_and_slopes(*wide, TOTAL_VARIATION, (True, True))
    for z, slope, truth in zip(wide, slopes, exact, strict=True):
        error, weight = (slope - truth).abs(), z.softmax(-1)
        assert error.max() > 1e-4  # some signs are lost
        assert (error <= weight * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"p_hidden": torch.zeros(7)}, ValueError, "p_hidden must have shape"),
        ({"q_hidden": torch.zeros(6, 4)}, ValueError, "q_hidden must have shape"),
        ({"q_weight": torch.zeros(12, 4)}, ValueError, "q_weight must have shape"),
        ({"q_weight": torch.zeros(13, 5)}, ValueError, "q_weight must have shape"),
        ({"p_weight": torch.zeros(13, 5).int()}, TypeError, "p_weight must have a floating"),
        ({"q_bias": torch.zeros(12)}, ValueError, "q_bias must have shape"),
        ({"mask": torch.ones(7, 1)}, ValueError, "mask must have shape"),
        ({"divergence": "kl"}, TypeError, "divergence must be an FDivergence, got str"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0"),
        ({"chunk_size": -1}, ValueError, "chunk_size must be >= 1"),
        ({"chunk_size": 1.5}, TypeError, "chunk_size must be an integer or None, got float"),
        ({"p_weight": torch.zeros(0, 5)}, ValueError, "p_weight must have at least one row"),
    ],
)
def test_errors_name_the_argument(heads, change, error, message):
    arguments = {**{n: heads[n] for n in NAMES[:4]}, "divergence": KL, **change}
    with pytest.raises(error, match=message):
        linear_divergence(**arguments)
