"""What every policy loss promises: masks, dtypes, extremes, gradients, transforms, errors."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from steelyard.policy import (
    bpo_loss,
    bpo_target_ratio,
    bpo_threshold_loss,
    gbpo_loss,
    grpo_loss,
    ppo_gap,
    ppo_loss,
)

B, T = 4, 3
HALVES = [torch.float16, torch.bfloat16]
REDUCTIONS = ("mean", "sum", "none")
AGGREGATES = ("token", "sequence", "sequence_sum")


class Case(NamedTuple):
    """A loss as ``call(x, *fixed, **options)``: ``x`` carries the gradient, ``fixed`` must not."""

    name: str
    call: Callable[..., Tensor]
    names: tuple[str, ...]
    fixed: Callable[[torch.Generator], tuple[Tensor, ...]]
    option: str = "reduction"

    def inputs(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        x = 0.3 * torch.randn(B, T, generator=generator, dtype=torch.float64)
        return tuple(tensor.to(dtype) for tensor in (x, *self.fixed(generator)))

    @property
    def variants(self) -> tuple[dict[str, Any], ...]:
        choices = REDUCTIONS if self.option == "reduction" else AGGREGATES
        return tuple({self.option: choice} for choice in choices)


def normal(*shape: int) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    return lambda generator: (torch.randn(*shape, generator=generator, dtype=torch.float64),)


def target_and_weight(*shape: int) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        target = 1 + 0.2 * torch.randn(*shape, generator=generator, dtype=torch.float64).tanh()
        return target, torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.1

    return make


def threshold_loss(kind: str) -> Callable[..., Tensor]:
    def call(threshold: Tensor, returns: Tensor, **options: Any) -> Tensor:
        return bpo_threshold_loss(returns, threshold, kind=kind, temperature=0.5, **options)

    return call


RATIO_LOSSES = [
    Case("ppo", ppo_loss, ("log_ratio", "advantages"), normal(B, T)),
    Case("bpo", bpo_loss, ("log_ratio", "target_ratio", "weight"), target_and_weight(B, T)),
    Case("grpo", grpo_loss, ("log_ratio", "advantages"), normal(B), "aggregate"),
    Case(
        "gbpo",
        gbpo_loss,
        ("log_ratio", "target_ratio", "weight"),
        target_and_weight(B),
        "aggregate",
    ),
]
THRESHOLD_LOSSES = [
    Case(kind, threshold_loss(kind), ("threshold", "returns"), normal(B, T))
    for kind in ("code", "temperature", "median")
]
LOSSES = RATIO_LOSSES + THRESHOLD_LOSSES

every_loss = pytest.mark.parametrize("case", LOSSES, ids=lambda case: case.name)
every_ratio_loss = pytest.mark.parametrize("case", RATIO_LOSSES, ids=lambda case: case.name)


def mask_of(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


RAGGED = mask_of([1, 1, 1], [1, 0, 0], [0, 1, 1], [0, 0, 0])


def value_and_gradient(
    case: Case, inputs: tuple[Tensor, ...], **options: Any
) -> tuple[Tensor, Tensor]:
    x = inputs[0].detach().clone().requires_grad_()
    loss = case.call(x, *inputs[1:], **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


# ---------------------------------------------------------------- gradients


@every_loss
def test_gradients_are_exact(case):
    x, *fixed = case.inputs()
    for options in case.variants:
        for mask in (None, RAGGED):
            torch.autograd.gradcheck(
                lambda x, mask=mask, options=options: case.call(x, *fixed, mask=mask, **options),
                (x.clone().requires_grad_(),),
            )


def test_gradients_of_the_ppo_gap_are_exact():
    x, advantages = RATIO_LOSSES[0].inputs()
    torch.autograd.gradcheck(lambda x: ppo_gap(x, advantages, 0.2), (x.requires_grad_(),))


@every_loss
def test_only_the_policy_or_the_threshold_carries_a_gradient(case):
    x, *fixed = (tensor.requires_grad_() for tensor in case.inputs())
    case.call(x, *fixed).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(tensor.grad is None for tensor in fixed)
    assert not case.call(x.detach(), *fixed).requires_grad


def test_targets_and_gap_weights_are_detached():
    a, b = (torch.randn(4, requires_grad=True) for _ in range(2))
    assert not bpo_target_ratio(a, b).requires_grad
    assert not ppo_gap(a.detach(), b, 0.2).requires_grad


# ---------------------------------------------------------------- masks and reductions


@every_loss
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_fully_masked_batch_is_exactly_zero_with_zero_gradient(case, poison):
    inputs = tuple(torch.full_like(tensor, poison) for tensor in case.inputs())
    mask = torch.zeros(B, T, dtype=torch.bool)
    for options in case.variants:
        loss, grad = value_and_gradient(case, inputs, mask=mask, **options)
        assert (loss == 0).all()
        assert (grad == 0).all()


@every_loss
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e300])
def test_whatever_stands_at_masked_places_does_not_matter(case, poison):
    clean = case.inputs()
    hidden = RAGGED == 0
    dirty = tuple(
        tensor.masked_fill(hidden if tensor.dim() == 2 else hidden.all(-1), poison)
        for tensor in clean
    )
    for options in case.variants:
        loss, grad = value_and_gradient(case, clean, mask=RAGGED, **options)
        dirty_loss, dirty_grad = value_and_gradient(case, dirty, mask=RAGGED, **options)
        assert torch.equal(loss, dirty_loss)
        assert torch.equal(grad, dirty_grad)
        assert (grad[hidden] == 0).all()
        assert grad[~hidden].abs().min() > 0 or case.name in {"ppo", "grpo"}


@every_loss
def test_boolean_integer_and_float_masks_agree(case):
    inputs = case.inputs()
    losses = [
        case.call(*inputs, mask=RAGGED.to(dtype))
        for dtype in (torch.bool, torch.long, torch.float32, torch.bfloat16)
    ]
    assert all(torch.equal(loss, losses[0]) for loss in losses)


@pytest.mark.parametrize(
    "case", [c for c in LOSSES if c.option == "reduction"], ids=lambda case: case.name
)
def test_reductions_follow_from_the_values_per_item(case):
    inputs = case.inputs()
    for mask in (None, RAGGED):
        values = case.call(*inputs, mask=mask, reduction="none")
        kept = torch.ones(B, T) if mask is None else mask
        assert values.shape == (B, T)
        assert (values[kept == 0] == 0).all()
        total = case.call(*inputs, mask=mask, reduction="sum")
        mean = case.call(*inputs, mask=mask)
        torch.testing.assert_close(total, values.sum())
        torch.testing.assert_close(mean, values.sum() / kept.sum())


# ---------------------------------------------------------------- numbers


@every_loss
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_accumulates_in_float32(case, dtype):
    halves = case.inputs(dtype)
    singles = tuple(tensor.float() for tensor in halves)
    for options in case.variants:
        loss, grad = value_and_gradient(case, halves, mask=RAGGED, **options)
        expected, expected_grad = value_and_gradient(case, singles, mask=RAGGED, **options)
        assert loss.dtype == grad.dtype == dtype
        assert torch.equal(loss, expected.to(dtype))
        torch.testing.assert_close(grad, expected_grad.to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_long_half_precision_mean_does_not_stall(dtype):
    """Adding 0.25 in bfloat16 stops at 64; the mean of a constant is the constant."""
    n = 20_000
    log_ratio, advantages = torch.zeros(n, dtype=dtype), torch.full((n,), -0.25, dtype=dtype)
    assert ppo_loss(log_ratio, advantages).item() == 0.25
    assert grpo_loss(log_ratio[None], advantages[:1], aggregate="sequence").item() == 0.25


@every_ratio_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_log_ratios_stay_finite_and_give_no_gradient(case, dtype, extreme):
    _, *fixed = case.inputs(dtype)
    loss, grad = value_and_gradient(case, (torch.full((B, T), extreme, dtype=dtype), *fixed))
    assert loss.isfinite()
    assert (grad == 0).all()


@pytest.mark.parametrize("case", THRESHOLD_LOSSES, ids=lambda case: case.name)
@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_thresholds_have_slope_one_half(case, extreme):
    inputs = (torch.full((B, T), extreme), torch.zeros(B, T))
    loss, grad = value_and_gradient(case, inputs, reduction="sum")
    assert loss.item() == pytest.approx(B * T * 5e3)
    assert (grad == math.copysign(0.5, extreme)).all()


@every_loss
def test_strided_inputs_give_the_same_result(case):
    inputs = case.inputs()
    strided = tuple(torch.stack((tensor, tensor), -1)[..., 0] for tensor in inputs)
    assert not any(tensor.is_contiguous() for tensor in strided)
    mask = RAGGED.T.contiguous().T
    for options in case.variants:
        expected = value_and_gradient(case, inputs, mask=RAGGED, **options)
        actual = value_and_gradient(case, strided, mask=mask, **options)
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


@every_loss
def test_nan_at_a_kept_place_reaches_the_loss(case):
    for poisoned in range(len(case.names)):
        inputs = list(case.inputs())
        inputs[poisoned] = inputs[poisoned].index_fill(0, torch.tensor([0]), math.nan)
        assert case.call(*inputs, mask=RAGGED).isnan()
        values = case.call(*inputs, mask=1 - RAGGED)  # its first row is masked here
        assert values.isfinite()


# ---------------------------------------------------------------- transforms


@every_loss
def test_compile_traces_without_a_graph_break(case):
    inputs = case.inputs()
    torch._dynamo.reset()
    compiled = torch.compile(case.call, fullgraph=True, backend="eager")
    expected = value_and_gradient(case, inputs, mask=RAGGED)
    actual = value_and_gradient(case._replace(call=compiled), inputs, mask=RAGGED)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


def test_compile_traces_the_gap_and_the_target():
    x, advantages = RATIO_LOSSES[0].inputs()
    for function, last in ((ppo_gap, {"epsilon": 0.2}), (bpo_target_ratio, {"epsilon": 0.2})):
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x, advantages, **last), function(x, advantages, **last))


@every_loss
def test_functional_gradient_and_vmap_equal_autograd_in_a_loop(case):
    batches = [case.inputs(seed=seed) for seed in range(3)]
    stacked = tuple(torch.stack(tensors) for tensors in zip(*batches, strict=True))
    masks = torch.stack((RAGGED, torch.ones_like(RAGGED), torch.zeros_like(RAGGED)))

    def loss(mask: Tensor, *inputs: Tensor) -> Tensor:
        return case.call(*inputs, mask=mask)

    per_batch = torch.func.vmap(torch.func.grad_and_value(loss, argnums=1))(masks, *stacked)
    for i, inputs in enumerate(batches):
        expected, expected_grad = value_and_gradient(case, inputs, mask=masks[i])
        torch.testing.assert_close(per_batch[0][i], expected_grad, atol=1e-12, rtol=0)
        torch.testing.assert_close(per_batch[1][i], expected, atol=1e-12, rtol=0)


# ---------------------------------------------------------------- errors


@every_loss
def test_wrong_tensors_are_named(case):
    inputs = case.inputs()
    for i, name in enumerate(case.names):
        wrong_shape, wrong_dtype, no_tensor = list(inputs), list(inputs), list(inputs)
        wrong_shape[i] = torch.ones(B + 1, T, 2, dtype=torch.float64)
        wrong_dtype[i] = inputs[i].long()
        no_tensor[i] = inputs[i].tolist()
        first_may_speak = "|".join(case.names) if i == 0 else name
        with pytest.raises(ValueError, match=first_may_speak):
            case.call(*wrong_shape)
        with pytest.raises(TypeError, match=f"{name} must have a floating dtype, got torch.int64"):
            case.call(*wrong_dtype)
        with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got list"):
            case.call(*no_tensor)


@every_loss
def test_wrong_masks_and_options_are_named(case):
    inputs = case.inputs()
    for mask in (RAGGED[:, :1], RAGGED[0], RAGGED[None]):
        with pytest.raises(ValueError, match=r"mask must have shape \[4, 3\]"):
            case.call(*inputs, mask=mask)
    with pytest.raises(TypeError, match=r"mask must be a torch\.Tensor"):
        case.call(*inputs, mask=RAGGED.tolist())
    with pytest.raises(ValueError, match=f"{case.option} must be one of .* got 'average'"):
        case.call(*inputs, **{case.option: "average"})


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: ppo_loss(ONE, ONE, epsilon=-0.1), "epsilon must be"),
        (lambda: ppo_loss(ONE, ONE, epsilon=1.1), "epsilon must be"),
        (lambda: ppo_loss(ONE, ONE, epsilon=math.nan), "epsilon must be"),
        (lambda: ppo_loss(ONE, ONE, epsilon_high=-0.1), "epsilon_high must be"),
        (lambda: grpo_loss(ONE[None], ONE, epsilon=2.0), "epsilon must be"),
        (lambda: grpo_loss(ONE[None], ONE, epsilon_high=-1.0), "epsilon_high must be"),
        (lambda: grpo_loss(ONE, ONE), "log_ratio must have shape"),
        (lambda: gbpo_loss(ONE, ONE, ONE), "log_ratio must have shape"),
        (lambda: ppo_gap(ONE, ONE, 1.5), "epsilon must be"),
        (lambda: ppo_gap(ONE, torch.ones(2), 0.2), "advantages must have"),
        (lambda: bpo_target_ratio(ONE, ONE, epsilon=0.0), "epsilon must be"),
        (lambda: bpo_target_ratio(ONE, ONE, epsilon_high=0.0), "epsilon_high must be"),
        (lambda: bpo_target_ratio(ONE, ONE, temperature=-1.0), "temperature must be"),
        (lambda: bpo_target_ratio(ONE, torch.ones(2)), "threshold must have"),
        (
            lambda: bpo_threshold_loss(ONE, ONE, kind="temperature", temperature=0.0),
            "temperature must be",
        ),
        (lambda: bpo_threshold_loss(ONE, ONE, kind="mean"), "kind must be one of"),
    ],
)
def test_values_out_of_range_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
