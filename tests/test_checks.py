"""Argument checks: each one passes what it should and names the argument it stops."""

import math

import numpy as np
import pytest
import torch

from steelyard._checks import (
    check_choice,
    check_floating,
    check_groups,
    check_mask,
    check_not_empty,
    check_range,
    check_same_shape,
    check_shape,
    given,
)

FLOATS = torch.ones(2, 3)


def test_floating_tensors_of_every_width_pass():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        check_floating(x=FLOATS.to(dtype))


def test_optional_arguments_are_checked_only_if_given():
    check_floating(x=FLOATS, **given(nothing=None))
    with pytest.raises(TypeError, match="there must have a floating dtype"):
        check_floating(x=FLOATS, **given(nothing=None, there=FLOATS.long()))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (FLOATS.long(), "x must have a floating dtype, got torch.int64"),
        (FLOATS.bool(), "x must have a floating dtype, got torch.bool"),
        (FLOATS.cfloat(), "x must have a floating dtype, got torch.complex64"),
        ([1.0], "x must be a torch.Tensor, got list"),
        (np.ones(2), "x must be a torch.Tensor, got ndarray"),
        (1.0, "x must be a torch.Tensor, got float"),
        (None, "x must be a torch.Tensor, got NoneType"),
        (FLOATS.to_sparse(), "x must be a dense tensor, got the layout torch.sparse_coo"),
    ],
)
def test_other_types_and_dtypes_are_named(wrong, message):
    with pytest.raises(TypeError, match=message):
        check_floating(fine=FLOATS, x=wrong)


def test_same_shapes_and_none_pass():
    check_same_shape(a=FLOATS, b=FLOATS.long(), c=None)
    check_same_shape(a=None, b=FLOATS)


def test_a_different_shape_is_named_with_both_shapes():
    with pytest.raises(ValueError, match=r"c must have the shape of a, \[2, 3\], got \[2, 1\]"):
        check_same_shape(a=FLOATS, b=None, c=torch.ones(2, 1))


@pytest.mark.parametrize("expected", [(2, 3), (None, 3), (None, None)])
def test_fitting_shapes_pass(expected):
    check_shape("x", FLOATS, expected)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ((3, None), r"x must have shape \[3, any\], got \[2, 3\]"),
        ((None,), r"x must have shape \[any\], got \[2, 3\]"),
        ((None, None, None), r"x must have shape \[any, any, any\], got \[2, 3\]"),
        ((), r"x must have shape \[\], got \[2, 3\]"),
    ],
)
def test_other_shapes_are_named(expected, message):
    with pytest.raises(ValueError, match=message):
        check_shape("x", FLOATS, expected)


def test_a_shape_of_no_tensor_is_a_type_error():
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got tuple"):
        check_shape("x", (1, 2), (None,))


def test_a_mask_of_any_dtype_or_none_passes():
    for mask in (None, FLOATS, FLOATS.bool(), FLOATS.to(torch.uint8)):
        check_mask(mask, FLOATS)


def test_a_mask_never_broadcasts():
    for wrong in (torch.ones(3), torch.ones(1, 3), torch.ones(2, 1), torch.tensor(1)):
        with pytest.raises(ValueError, match=r"mask must have shape \[2, 3\], got"):
            check_mask(wrong, FLOATS)
    with pytest.raises(TypeError, match=r"keep must be a torch\.Tensor, got list"):
        check_mask([[1, 1, 1]] * 2, FLOATS, name="keep")


@pytest.mark.parametrize(
    ("limits", "inside", "outside", "message"),
    [
        ({"above": 0.0}, [1e-300, 5], [0, -1, math.nan], "x must be > 0.0"),
        ({"at_least": 0.0}, [0, 3.5], [-1e-300, math.nan], "x must be >= 0.0"),
        ({"below": 1.0}, [-9, 0.999], [1.0, math.nan], "x must be < 1.0"),
        ({"at_most": 1.0}, [1.0, True], [1.001], "x must be <= 1.0"),
        (
            {"at_least": 0.0, "below": 1.0},
            [0.0, 0.5],
            [1.0, -0.1],
            "x must be >= 0.0 and < 1.0",
        ),
        ({"above": 0.0, "at_most": 1.0}, [1.0], [0.0, 2], "x must be > 0.0 and <= 1.0"),
        ({"above": -math.inf, "below": math.inf}, [0.0], [math.inf, math.nan], "x must be finite"),
    ],
)
def test_numbers_are_held_to_their_interval(limits, inside, outside, message):
    for value in inside:
        check_range("x", value, **limits)
    for value in outside:
        with pytest.raises(ValueError, match=message):
            check_range("x", value, **limits)


@pytest.mark.parametrize("wrong", ["0.2", None, [0.2]])
def test_what_is_no_number_is_named(wrong):
    with pytest.raises(TypeError, match="x must be a number"):
        check_range("x", wrong, at_least=0.0)


def test_an_infinite_number_is_told_to_be_finite():
    with pytest.raises(ValueError, match=r"x must be .*finite.* got inf"):
        check_range("x", math.inf, at_least=0.0)


def test_choices():
    check_choice("kind", "a", ("a", "b"))
    with pytest.raises(ValueError, match="kind must be one of 'a', 'b', got 'c'"):
        check_choice("kind", "c", ("a", "b"))


def test_empty_tensors_are_named():
    check_not_empty("x", torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"x must not be empty, got shape \[0, 3\]"):
        check_not_empty("x", torch.ones(0, 3))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.uint8])
def test_integer_groups_pass(dtype):
    check_groups(torch.zeros(2, dtype=dtype), FLOATS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_groups_of_other_dtypes_are_named(dtype):
    with pytest.raises(TypeError, match=f"prompts must have an integer dtype, got {dtype}"):
        check_groups(torch.zeros(2, dtype=dtype), FLOATS, name="prompts")


def test_groups_of_other_shapes_and_types_are_named():
    with pytest.raises(ValueError, match=r"groups must have shape \[2\], got \[3\]"):
        check_groups(torch.zeros(3, dtype=torch.long), FLOATS)
    with pytest.raises(TypeError, match=r"groups must be a torch\.Tensor, got list"):
        check_groups([0, 0], FLOATS)


def test_checks_compile_without_a_graph_break():
    def checked(x: torch.Tensor, mask: torch.Tensor, epsilon: float) -> torch.Tensor:
        check_floating(x=x)
        check_same_shape(x=x, mask=mask)
        check_shape("x", x, (None, 3))
        check_mask(mask, x)
        check_range("epsilon", epsilon, above=0.0, at_most=1.0)
        check_choice("kind", "a", ("a", "b"))
        check_not_empty("x", x)
        return x * epsilon

    compiled = torch.compile(checked, fullgraph=True, backend="eager")
    assert torch.equal(compiled(FLOATS, FLOATS, 0.5), FLOATS * 0.5)
