import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import one_hot

from steelyard.divergences import (
    concatenated_distance_covariance,
    distance_correlation,
    distance_correlation_test,
    distance_covariance,
    joint_distance_covariance,
    u_centred_distances,
)

F64 = torch.float64
SIZES = (4, 5, 8, 33, 70)


def close(actual, expected, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=F64), rtol=rtol, atol=atol)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def integers(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed)).to(F64)


def one_hot_rows(levels, n, seed=0):
    return one_hot(integers(levels, n, seed=seed).long(), levels).to(F64)


def matrix(x):
    x = x.reshape(len(x), -1)
    squares = (x[:, None] - x).square().sum(-1)
    same = squares == 0
    return torch.where(same, 0.0, torch.where(same, 1.0, squares).sqrt())


def dense(*variables, c=0.0, unbiased=True):
    # the definition, with whole matrices
    n, d, product = len(variables[0]), len(variables), 1.0
    for variable in variables:
        a = matrix(variable.to(F64))
        if unbiased:
            row, everything = a.sum(1) / (n - 2), a.sum() / ((n - 1) * (n - 2))
            centred = (row[:, None] + row - a - everything) * (1 - torch.eye(n, dtype=F64))
        else:
            centred = a.mean(0) + a.mean(1, keepdim=True) - a - a.mean()
        product = product * (centred + c)
    if unbiased:
        return product.sum() / (n * (n - 3)) - c**d * n / (n - 3)
    return product.mean() - c**d


def cases(n):
    x, y = normal(n, seed=1), normal(n, seed=2) + normal(n, seed=1)
    x3, y2 = normal(n, 3, seed=3), normal(n, 2, seed=4)
    ties, few, category = integers(4, n, seed=5), integers(3, n, seed=6), one_hot_rows(3, n, seed=7)
    return {
        "scalars": (x, y),
        "ties in one": (ties, y),
        "ties in the other": (x, few),
        "ties in both": (ties, few),
        "columns of one": (x[:, None], y[:, None]),
        "scalar and category": (x, category),
        "category and tied scalar": (category, ties),
        "scalar and vector": (x, x3),
        "vectors": (x3, y2),
        "vector and category": (x3, category),
    }


CASES = tuple(cases(4))


def gradients(function, variables):
    leaves = [v.clone().requires_grad_() for v in variables]
    value = function(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves)


# --- the definition ----------------------------------------------------------------------------


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_are_those_of_the_dense_formula(case, n, unbiased):
    x, y = cases(n)[case]
    expected, slopes = gradients(lambda x, y: dense(x, y, unbiased=unbiased), (x, y))
    value, actual = gradients(lambda x, y: distance_covariance(x, y, unbiased=unbiased), (x, y))
    close(value, expected)
    close(distance_covariance(x, y, unbiased=unbiased), expected)  # constants take other paths
    for slope, wanted in zip(actual, slopes, strict=True):
        close(slope, wanted, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_gradient_in_one_variable_does_not_depend_on_the_other_requiring_one(case):
    x, y = cases(40)[case]
    _, (x_slope, y_slope) = gradients(dense, (x, y))
    close(gradients(lambda x: distance_covariance(x, y), (x,))[1][0], x_slope, atol=1e-10)
    close(gradients(lambda y: distance_covariance(x, y), (y,))[1][0], y_slope, atol=1e-10)


@pytest.mark.parametrize("block_size", [1, 2, 7, 32, 33, 1000])
def test_any_block_size_gives_the_same(block_size):
    x, y, z = normal(33, 3, seed=1), normal(33, 2, seed=2), integers(3, 33)
    pair = gradients(dense, (x, y))
    torch.testing.assert_close(
        gradients(lambda x, y: distance_covariance(x, y, block_size=block_size), (x, y)), pair
    )
    triple = gradients(lambda *v: dense(*v, c=0.3), (x, y, z))
    torch.testing.assert_close(
        gradients(
            lambda *v: joint_distance_covariance(*v, c=0.3, block_size=block_size), (x, y, z)
        ),
        triple,
    )


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(-3, 3), st.integers(-2, 2)), min_size=4, max_size=90),
    st.booleans(),
)
def test_ties_are_exact(pairs, unbiased):
    x, y = torch.tensor(pairs, dtype=F64).unbind(1)
    expected, slopes = gradients(lambda x, y: dense(x, y, unbiased=unbiased), (x, y))
    value, actual = gradients(lambda x, y: distance_covariance(x, y, unbiased=unbiased), (x, y))
    close(value, expected)
    for slope, wanted in zip(actual, slopes, strict=True):
        close(slope, wanted, atol=1e-10)


def test_many_items_have_the_gradient_of_the_definition():
    # several tiles; the value would cost N^2, a few rows of its gradient cost N each
    n = 200_000
    x, y = normal(n, seed=1).requires_grad_(), normal(n, seed=2)
    (slope,) = torch.autograd.grad(distance_covariance(x, y), x)
    some = torch.arange(0, n, n // 8)
    b = matrix_rows(y, some)
    y_rows = distance_rows(y)
    centred = y_rows[some, None] / (n - 2) + y_rows / (n - 2) - b - y_rows.sum() / (n - 1) / (n - 2)
    centred[torch.arange(len(some)), some] = 0
    signs = torch.sign(x.detach()[some, None] - x.detach())
    expected = -2 * (centred * signs).sum(1) / (n * (n - 3))
    close(slope[some] * n, expected * n, rtol=1e-9, atol=1e-9)


def matrix_rows(y, items):
    return (y[items, None] - y).abs()


def distance_rows(y):
    values, order = y.sort()
    n, place = len(y), torch.arange(len(y), dtype=F64)
    below = values.cumsum(0)
    sums = (2 * place - n) * values + 2 * (values.sum() / 2 - below + values)
    return torch.empty_like(y).scatter(0, order, sums)


def test_unbiased_form_averages_the_kernel_over_distinct_quadruples():
    x, y = normal(7, 2, seed=1), normal(7, seed=2)
    a, b = matrix(x), matrix(y)
    kernel = [
        a[i, j] * b[i, j] + a[i, j] * b[q, r] - 2 * a[i, j] * b[i, q]
        for i, j, q, r in itertools.permutations(range(7), 4)
    ]
    close(distance_covariance(x, y), torch.stack(kernel).mean())


def test_gradient_is_the_signed_sum_of_the_other_centred_matrix():
    x, y = normal(30, seed=1), one_hot_rows(4, 30)
    _, (slope,) = gradients(lambda x: distance_covariance(x, y), (x,))
    signs = torch.sign(x[:, None] - x)
    close(slope, -2 / (30 * 27) * (u_centred_distances(y) * signs).sum(1))
    close(slope.sum(), 0.0)


# --- theorems ----------------------------------------------------------------------------------


def enumerate_law(probabilities, repeat):
    # a sample whose frequencies are exactly the law
    return torch.tensor(
        [row for row, times in zip(probabilities, repeat, strict=True) for _ in range(times)],
        dtype=F64,
    )


def test_zero_exactly_under_independence_on_enumerated_laws():
    support = list(itertools.product([0.0, 1.0, 5.0], [-1.0, 2.0]))
    independent = enumerate_law(support, [a * b for a in (1, 2, 3) for b in (2, 1)])
    x, y = independent.unbind(1)
    close(distance_covariance(x, y, unbiased=False), 0.0)
    dependent = enumerate_law(support, [2, 1, 4, 2, 3, 6])
    x, y = dependent.unbind(1)
    assert distance_covariance(x, y, unbiased=False) > 1e-3


def test_exclusive_or_is_seen_by_the_whole_and_by_no_pair():
    s1, s2 = torch.tensor(list(itertools.product([0.0, 1.0], repeat=2)), dtype=F64).unbind(1)
    x = (s1 != s2).to(F64)
    for pair in ((x, s1), (x, s2), (s1, s2)):
        close(distance_covariance(*pair, unbiased=False), 0.0)
    whole = concatenated_distance_covariance(x, [s1, s2], unbiased=False)
    close(whole, (2 - math.sqrt(2)) / 8)
    close(joint_distance_covariance(x, s1, s2, unbiased=False), 1 / 8)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_shift_rotation_and_scale(case, unbiased):
    x, y = cases(25)[case]
    base = distance_covariance(x, y, unbiased=unbiased)
    close(distance_covariance(-3 * x + 1e3, y / 2 - 7, unbiased=unbiased), 1.5 * base)
    if x.dim() == 2:
        rotation, _ = torch.linalg.qr(normal(x.shape[1], x.shape[1], seed=9))
        close(distance_covariance(x @ rotation, y, unbiased=unbiased), base)


@pytest.mark.parametrize("case", CASES)
def test_symmetric_and_blind_to_a_common_order(case):
    x, y = cases(25)[case]
    order = torch.randperm(25, generator=torch.Generator().manual_seed(0))
    close(distance_covariance(y, x), distance_covariance(x, y))
    close(distance_covariance(x[order], y[order]), distance_covariance(x, y))


def test_plug_in_form_is_never_negative_and_unbiased_form_has_mean_zero():
    values = torch.stack(
        [
            torch.stack(
                [
                    distance_covariance(normal(20, seed=s), normal(20, seed=s + 999), unbiased=u)
                    for u in (True, False)
                ]
            )
            for s in range(300)
        ]
    )
    unbiased, plug_in = values.unbind(1)
    assert (plug_in >= 0).all()
    assert unbiased.mean().abs() < 4 * unbiased.std() / math.sqrt(300)
    assert plug_in.mean() > 4 * plug_in.std() / math.sqrt(300)


@pytest.mark.parametrize("variable", [normal(30), normal(30, 3), integers(3, 30)])
def test_correlation_of_similar_samples_is_one(variable):
    close(distance_correlation(variable, 5 - 2 * variable), 1.0)
    noise = normal(30, seed=8)
    expected = dense(variable, noise) / (dense(variable, variable) * dense(noise, noise)).sqrt()
    close(distance_correlation(variable, noise), expected)


@pytest.mark.parametrize("constant", [torch.full((9,), 0.1), torch.full((9, 2), 0.1)])
def test_constants_give_zero_with_zero_gradient(constant):
    x = normal(9).requires_grad_()
    constant = constant.to(F64).requires_grad_()
    for function in (distance_covariance, distance_correlation):
        value = function(x, constant)
        close(value.detach(), 0.0, atol=1e-15)
        for slope in torch.autograd.grad(value, (x, constant)):
            assert slope.abs().max() < 1e-15
    result = distance_correlation_test(x, constant)
    close(result.statistic.detach(), 1.0)


@pytest.mark.parametrize("c", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("unbiased", [True, False])
def test_joint_form_is_the_dense_formula_and_the_sum_over_subsets(c, unbiased):
    variables = (normal(20, seed=1), one_hot_rows(3, 20), normal(20, 2, seed=2), integers(2, 20))
    joint = joint_distance_covariance(*variables, c=c, unbiased=unbiased)
    close(joint, dense(*variables, c=c, unbiased=unbiased))
    subsets = (s for k in (2, 3, 4) for s in itertools.combinations(variables, k))
    parts = [c ** (4 - len(s)) * dense(*s, unbiased=unbiased) for s in subsets]
    close(joint, torch.stack(parts).sum())


@pytest.mark.parametrize("unbiased", [True, False])
def test_joint_form_of_two_is_the_covariance_for_every_c(unbiased):
    x, y = normal(15, seed=1), normal(15, 2, seed=2)
    base = distance_covariance(x, y, unbiased=unbiased)
    for c in (0.0, 1.0, 7.0):
        close(joint_distance_covariance(x, y, c=c, unbiased=unbiased), base)
        close(dense(x, y, c=c, unbiased=unbiased), base)


def test_concatenation_is_the_covariance_with_the_stacked_columns():
    x, s1, s2 = normal(20), one_hot_rows(3, 20), normal(20, seed=3)
    base = concatenated_distance_covariance(x, [s1, s2])
    close(base, dense(x, torch.cat([s1, s2[:, None]], 1)))
    close(concatenated_distance_covariance(x, [s2, s1[:, [2, 0, 1]]]), base)
    close(concatenated_distance_covariance(x, [s1]), distance_covariance(x, s1))
    assert abs(concatenated_distance_covariance(x, [s1, s1, s2]) - base) > 1e-6


def test_false_alarms_of_the_test_stay_below_its_level_and_dependence_is_found():
    p_values = torch.stack(
        [
            distance_correlation_test(normal(60, seed=s), normal(60, seed=s + 5000)).p_value
            for s in range(400)
        ]
    )
    # level 0.05: at most 0.05 plus three standard errors, and not a test that never fires
    rate = (p_values < 0.05).double().mean()
    assert 0.005 < rate < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)
    x = normal(100)
    statistic, p_value = distance_correlation_test(x, x.square())
    close(statistic, 100 * distance_correlation(x, x.square()) + 1)
    close(p_value, 1 - torch.special.gammainc(torch.tensor(0.5, dtype=F64), statistic / 2))
    assert p_value < 1e-4


def test_u_centred_distances_have_the_sign_of_the_kernel_and_zero_rows():
    for x in (normal(9), normal(9, 3)):
        centred, a = u_centred_distances(x), matrix(x)
        close(centred.sum(0), torch.zeros(9))
        close(centred, centred.T)
        row = a.sum(1) / 7
        off = ~torch.eye(9, dtype=torch.bool)
        close(centred[off], (row[:, None] + row - a - a.sum() / 56)[off])
        close((centred * u_centred_distances(x**2)).sum() / 54, distance_covariance(x, x**2))


# --- derivatives -------------------------------------------------------------------------------


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("case", ["scalars", "scalar and vector", "vectors"])
def test_gradcheck(case, unbiased):
    leaves = tuple(v.clone().requires_grad_() for v in cases(9)[case])
    assert gradcheck(lambda x, y: distance_covariance(x, y, unbiased=unbiased), leaves)
    assert gradcheck(distance_correlation, leaves)
    joint = (*leaves, normal(9, seed=11).requires_grad_())
    assert gradcheck(lambda *v: joint_distance_covariance(*v, unbiased=unbiased), joint)


def test_gradcheck_of_the_categorical_path_and_the_matrix():
    x, category = normal(12).requires_grad_(), one_hot_rows(3, 12)
    assert gradcheck(lambda x: distance_covariance(x, category), (x,))
    assert gradcheck(lambda x: distance_correlation(category, x), (x,))
    assert gradcheck(u_centred_distances, (x,))


def test_scalars_have_second_derivatives():
    leaves = (normal(40, seed=1).requires_grad_(), normal(40, seed=2).requires_grad_())
    assert gradgradcheck(distance_covariance, leaves, atol=1e-6)


def test_functional_gradient_is_that_of_backward():
    for case in ("scalars", "scalar and vector", "vectors"):
        x, y = cases(20)[case]
        expected = gradients(distance_covariance, (x, y))[1][0]
        close(torch.func.grad(distance_covariance)(x, y), expected)


# --- dtypes, layout, errors --------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_float32_is_close_to_float64_and_far_from_the_origin_too(case):
    x, y = cases(70)[case]
    value = distance_covariance(x.float(), y.float())
    assert value.dtype == torch.float32
    close(value.double(), dense(x, y), rtol=1e-5, atol=1e-6)
    far = (x.float() + 64).double()
    close(distance_covariance(far.float(), y.float()).double(), dense(far, y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["scalars", "scalar and category", "vectors"])
def test_half_precision_returns_its_dtype(case, dtype):
    x, y = (v.to(dtype) for v in cases(40)[case])
    value, slopes = gradients(distance_covariance, (x, y))
    assert value.dtype == slopes[0].dtype == dtype
    close(value.double(), dense(x, y), rtol=1e-2, atol=1e-3)
    assert distance_correlation_test(x, y).p_value.dtype == dtype
    assert u_centred_distances(x).dtype == dtype


def test_non_contiguous_inputs():
    wide = normal(30, 6)
    x, y = wide[:, 1], wide[:, 2:6:2]
    close(distance_covariance(x, wide[:, 3]), dense(x, wide[:, 3]))
    close(distance_covariance(x, y), dense(x, y))
    close(distance_covariance(wide.T[:6], y[:6]), dense(wide.T[:6], y[:6]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("case", CASES)
def test_nan_and_infinity_give_nan(case, bad):
    x, y = (v.clone() for v in cases(20)[case])
    y[3] = bad
    assert distance_covariance(x, y).isnan()
    assert distance_correlation(x, y).isnan()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: distance_covariance(x[:3], x[:3]), "N >= 4 items, got N = 3"),
        (lambda x: distance_covariance(x[:0], x[:0], unbiased=False), "N >= 1 items"),
        (lambda x: distance_correlation(x[:3], x[:3]), "N >= 4"),
        (lambda x: distance_correlation_test(x[:3], x[:3]), "N >= 4"),
        (lambda x: u_centred_distances(x[:3]), "N >= 4"),
        (lambda x: distance_covariance(x, x[:5]), "y must have N = 8 items like x"),
        (lambda x: distance_covariance(x, x.view(2, 2, 2)), r"y must have shape \[N\]"),
        (lambda x: distance_covariance(x[0], x), r"x must have shape \[N\]"),
        (lambda x: distance_covariance(x, x[:, None][:, :0]), r"y must have shape \[N\]"),
        (lambda x: distance_covariance(x, x, block_size=0), "block_size must be >= 1"),
        (joint_distance_covariance, "two or more tensors, got 1"),
        (lambda x: joint_distance_covariance(x, x, x[:7]), r"variables\[2\] must have N = 8"),
        (lambda x: joint_distance_covariance(x, x, x, c=math.nan), "c must be finite"),
        (lambda x: joint_distance_covariance(x[:3], x[:3], x[:3]), "N >= 4"),
        (lambda x: concatenated_distance_covariance(x, []), "attributes must hold"),
        (lambda x: concatenated_distance_covariance(x, [x[:7]]), r"attributes\[0\] must have N"),
    ],
)
def test_wrong_shapes_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(normal(8))


def test_wrong_types_name_the_argument():
    with pytest.raises(TypeError, match=r"y must have a floating dtype, got torch\.int64"):
        distance_covariance(normal(8), torch.arange(8))
    with pytest.raises(TypeError, match=r"attributes\[0\] must be a torch.Tensor, got list"):
        concatenated_distance_covariance(normal(8), [[1.0] * 8])


def test_one_item_has_no_plug_in_dependence():
    x = normal(1).requires_grad_()
    value = distance_covariance(x, normal(1, seed=1), unbiased=False)
    close(value.detach(), 0.0)
    close(torch.autograd.grad(value, x)[0], torch.zeros(1))
