"""The penalty and the measures of fairness against closed forms, loops and dcor."""

import itertools
import math

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.divergences import distance_covariance, u_centred_distances
from steelyard.tabular._sensitive import encode_sensitive, intersectional_groups
from steelyard.tabular.audit import audit_fairness
from steelyard.tabular.calibration import choose_strength
from steelyard.tabular.fairness import (
    DistanceCovarianceRegularizer,
    group_js,
    ranked_probability_score,
    unfairness,
)

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)
close = {"rtol": 0, "atol": 1e-10}
MEASURES = ("concatenated", "joint", "marginal")


def items(seed: int, n: int = 12) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Predictions without ties; a bit, three levels and a number."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randperm(n, generator=g).double() / n + 0.01 * torch.rand(n, generator=g).double()
    bit = torch.randint(0, 2, (n,), generator=g).double()
    level = torch.eye(3, dtype=torch.float64)[torch.randint(0, 3, (n,), generator=g)]
    return y, [bit, level, torch.rand(n, generator=g, dtype=torch.float64)]


def xor(copies: int = 1) -> tuple[torch.Tensor, list[torch.Tensor]]:
    s1 = torch.tensor([0.0, 0, 1, 1], dtype=torch.float64).repeat(copies)
    s2 = torch.tensor([0.0, 1, 0, 1], dtype=torch.float64).repeat(copies)
    return (s1 != s2).double(), [s1, s2]


def by_definition(y, attributes, measure, c):
    n = len(y)
    if measure == "joint":
        product = torch.ones(n, n, dtype=torch.float64)
        for variable in (y, *attributes):
            product = product * (u_centred_distances(variable) + c)
        return product.sum() / (n * (n - 3)) - c ** (len(attributes) + 1) * n / (n - 3)
    if measure == "concatenated":
        attributes = [torch.cat([s.reshape(n, -1) for s in attributes], 1)]
    centred = u_centred_distances(y)
    return sum((centred * u_centred_distances(s)).sum() for s in attributes) / (n * (n - 3))


@quick
@given(seeds, st.sampled_from(MEASURES), st.floats(0.1, 3), st.integers(1, 3))
def test_penalty_is_its_definition_times_the_strength(seed, measure, c, d):
    y, attributes = items(seed)
    penalty = DistanceCovarianceRegularizer(measure, 2.5, c=c)
    expected = 2.5 * by_definition(y, attributes[:d], measure, c)
    torch.testing.assert_close(penalty(y, attributes[:d]), expected, **close)


def test_xor_is_seen_by_joint_and_concatenated_and_not_by_the_margins():
    y, attributes = xor()
    # dCov^2 of y and the concatenation is the mean product of centred distances over 16 pairs
    s = torch.stack(attributes, 1)
    a, b = (torch.cdist(v, v) for v in (y[:, None], s))
    expected = (a * b).mean() + a.mean() * b.mean() - 2 * (a.mean(0) * b.mean(0)).mean()
    values = [
        DistanceCovarianceRegularizer(m, unbiased=False)(y, attributes).item() for m in MEASURES
    ]
    assert values[0] == pytest.approx((2 - math.sqrt(2)) / 8, abs=1e-12)
    assert values[0] == pytest.approx(expected.item(), abs=1e-12)
    assert values[1] == pytest.approx(1 / 8, abs=1e-12)
    assert values[2] == pytest.approx(0, abs=1e-12)


@quick
@given(seeds, st.floats(0.0, 5))
def test_one_attribute_makes_the_three_measures_one(seed, c):
    y, attributes = items(seed)
    values = [DistanceCovarianceRegularizer(m, c=c)(y, attributes[2:]) for m in MEASURES]
    expected = distance_covariance(y, attributes[2])
    for value in values:
        torch.testing.assert_close(value, expected, **close)


@quick
@given(seeds)
def test_unbiased_concatenated_penalty_is_the_mean_over_quadruples(seed):
    y, attributes = items(seed, 6)
    s = torch.cat([v.reshape(6, -1) for v in attributes], 1)
    a, b = torch.cdist(y[:, None], y[:, None]), torch.cdist(s, s)
    kernel = [
        a[i, j] * b[i, j] + a[i, j] * b[q, r] - 2 * a[i, j] * b[i, q]
        for i, j, q, r in itertools.permutations(range(6), 4)
    ]
    value = DistanceCovarianceRegularizer("concatenated")(y, attributes)
    torch.testing.assert_close(value, torch.stack(kernel).mean(), rtol=0, atol=1e-9)


@quick
@given(seeds, st.sampled_from(MEASURES))
def test_order_of_items_and_labels_of_levels_do_not_matter(seed, measure):
    y, (bit, level, number) = items(seed)
    penalty = DistanceCovarianceRegularizer(measure)
    expected = penalty(y, [bit, level, number])
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    moved = penalty(y[order], [bit[order], level[order], number[order]])
    torch.testing.assert_close(moved, expected, **close)
    relabelled = penalty(y + 7, [1 - bit, level[:, [2, 0, 1]], -number])
    torch.testing.assert_close(relabelled, expected, **close)


@quick
@given(seeds, st.floats(-3, 3))
def test_concatenated_and_marginal_scale_with_the_predictions_and_joint_does_not(seed, scale):
    y, attributes = items(seed)
    for measure in ("concatenated", "marginal"):
        penalty = DistanceCovarianceRegularizer(measure)
        torch.testing.assert_close(
            penalty(scale * y, attributes), abs(scale) * penalty(y, attributes), **close
        )
    # the dependence among attributes stays when predictions are constant: the floor of joint
    joint = DistanceCovarianceRegularizer("joint")(torch.zeros_like(y), attributes[:2])
    torch.testing.assert_close(joint, distance_covariance(*attributes[:2]), **close)


def test_duplicating_an_attribute_changes_the_concatenated_penalty():
    y, attributes = items(0)
    penalty = DistanceCovarianceRegularizer()
    assert abs(penalty(y, attributes) - penalty(y, [*attributes, attributes[0]])) > 1e-4


@pytest.mark.parametrize("measure", MEASURES)
def test_permuted_predictions_have_a_penalty_of_mean_zero_up_to_the_floor(measure):
    # 400 permutations, threshold 4 standard errors: false alarm below 1e-4
    y, attributes = items(5, 40)
    penalty = DistanceCovarianceRegularizer(measure)
    g = torch.Generator().manual_seed(0)
    values = torch.stack(
        [penalty(y[torch.randperm(40, generator=g)], attributes) for _ in range(400)]
    )
    floor = penalty(torch.zeros_like(y), attributes)
    assert abs(values.mean() - floor) < 4 * values.std() / 20


@pytest.mark.parametrize("measure", MEASURES)
def test_constant_predictions_have_no_gradient(measure):
    _, attributes = items(1)
    y = torch.full((12,), 0.3, dtype=torch.float64, requires_grad=True)
    DistanceCovarianceRegularizer(measure)(y, attributes).backward()
    assert y.grad.abs().max() < 1e-15


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("unbiased", [True, False])
def test_gradient_is_exact_and_sums_to_zero(measure, unbiased):
    y, attributes = items(2)
    y.requires_grad_()
    penalty = DistanceCovarianceRegularizer(measure, 3.0, c=0.7, unbiased=unbiased)
    assert torch.autograd.gradcheck(lambda v: penalty(v, attributes), (y,))
    (gradient,) = torch.autograd.grad(penalty(y, attributes), y)
    assert abs(gradient.sum()) < 1e-10


def test_gradient_formula_of_the_scalar_case():
    y, attributes = items(3)
    n, s = len(y), torch.cat([v.reshape(12, -1) for v in attributes], 1)
    b = u_centred_distances(s)
    sign = torch.sign(y[:, None] - y)
    y.requires_grad_()
    (gradient,) = torch.autograd.grad(DistanceCovarianceRegularizer()(y, attributes), y)
    torch.testing.assert_close(gradient, -2 / (n * (n - 3)) * (b * sign).sum(1), **close)


def test_attributes_are_detached_and_typed():
    y, attributes = items(4)
    leaf = attributes[2].clone().requires_grad_()
    value = DistanceCovarianceRegularizer()(y.requires_grad_(), [attributes[0], leaf])
    assert torch.autograd.grad(value, leaf, allow_unused=True) == (None,)
    as_bool = DistanceCovarianceRegularizer()(y, {"sex": attributes[0].bool()})
    torch.testing.assert_close(as_bool, DistanceCovarianceRegularizer()(y, attributes[0]), **close)
    with pytest.raises(TypeError, match=r"sensitive\[0\].*encode_sensitive"):
        DistanceCovarianceRegularizer()(y, [attributes[0].long()])


@pytest.mark.parametrize("measure", MEASURES)
def test_mask_drops_items_and_an_empty_one_gives_zero_without_gradient(measure):
    y, attributes = items(6)
    penalty = DistanceCovarianceRegularizer(measure)
    mask = torch.arange(12) % 3 != 0
    expected = penalty(y[mask], [s[mask] for s in attributes])
    torch.testing.assert_close(penalty(y, attributes, mask=mask), expected, **close)
    y.requires_grad_()
    nothing = penalty(y, attributes, mask=torch.zeros(12))
    nothing.backward()
    assert nothing == 0
    assert torch.equal(y.grad, torch.zeros_like(y))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_keeps_its_dtype_and_the_value(dtype):
    y, attributes = items(7, 64)
    value = DistanceCovarianceRegularizer("joint")(y.to(dtype), attributes)
    exact = DistanceCovarianceRegularizer("joint")(y.to(dtype).double(), attributes)
    assert value.dtype == dtype
    torch.testing.assert_close(value, exact.to(dtype), rtol=1e-5, atol=1e-5)


def test_large_and_strided_predictions_stay_finite():
    y, attributes = items(8)
    y = torch.stack([1e4 * y, -y], 1)[:, 0].requires_grad_()
    value = DistanceCovarianceRegularizer()(y, attributes)
    (gradient,) = torch.autograd.grad(value, y)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()
    assert DistanceCovarianceRegularizer()(y * math.nan, attributes).isnan()


def test_penalty_names_wrong_arguments():
    y, attributes = items(9)
    penalty = DistanceCovarianceRegularizer()
    with pytest.raises(ValueError, match="measure"):
        DistanceCovarianceRegularizer("pairwise")
    with pytest.raises(ValueError, match="strength"):
        DistanceCovarianceRegularizer(strength=-1.0)
    with pytest.raises(ValueError, match="sensitive must hold"):
        penalty(y, [])
    with pytest.raises(ValueError, match=r"sensitive\[0\]"):
        penalty(y, [attributes[0][:5]])
    with pytest.raises(ValueError, match="N >= 4"):
        penalty(y[:3], [attributes[0][:3]])
    with pytest.raises(TypeError, match="outputs"):
        penalty(y.long(), attributes)
    with pytest.raises(ValueError, match="mask"):
        penalty(y, attributes, mask=torch.ones(3))


def test_penalty_is_dcor_on_the_encoded_attributes():
    dcor = pytest.importorskip("dcor")
    y, attributes = items(10, 50)
    s = torch.cat([v.reshape(50, -1) for v in attributes], 1)
    value = DistanceCovarianceRegularizer()(y, attributes).item()
    assert value == pytest.approx(dcor.u_distance_covariance_sqr(y.numpy(), s.numpy()), abs=1e-12)


# Divergence, unfairness, scores


def js_loop(outputs, groups, bandwidth, grid, weights, base):
    points = np.linspace(min(outputs), max(outputs), grid)
    laws, sizes = [], []
    for group in sorted(set(groups)):
        mine = [v for v, g in zip(outputs, groups, strict=True) if g == group]
        density = sum(np.exp(-0.5 * ((points - v) / bandwidth) ** 2) for v in mine)
        laws.append(density / density.sum())
        sizes.append(len(mine))
    pi = np.array(sizes) / sum(sizes) if weights == "proportion" else np.ones(len(laws)) / len(laws)

    def entropy(p):
        p = np.maximum(p, 1e-10)
        return -(p * np.log(p) / np.log(base)).sum()

    mix = sum(w * p for w, p in zip(pi, laws, strict=True))
    return entropy(mix) - sum(w * entropy(p) for w, p in zip(pi, laws, strict=True)), pi


@quick
@given(seeds, st.sampled_from(["proportion", "equal"]), st.sampled_from([2.0, math.e]))
def test_group_js_is_the_loop_and_is_bounded_by_the_entropy_of_the_shares(seed, weights, base):
    random = np.random.default_rng(seed)
    outputs, groups = random.random(40), random.integers(0, 4, 40)
    got = group_js(outputs, groups, bandwidth=0.15, weights=weights, base=base, grid=200)
    expected, pi = js_loop(outputs, groups.tolist(), 0.15, 200, weights, base)
    assert got == pytest.approx(expected, abs=1e-7)  # the loop clips every empty cell
    assert 0 <= got <= -(pi * np.log(pi)).sum() / math.log(base)


def test_group_js_is_zero_for_equal_groups_and_the_entropy_for_disjoint_ones():
    outputs = np.array([0.1, 0.2, 0.3] * 3)
    assert group_js(outputs, np.repeat([0, 1, 2], 3), bandwidth=0.05) < 1e-12
    sizes = np.array([1, 2, 5])
    far = np.repeat([0.0, 0.5, 1.0], sizes)
    shares = sizes / 8
    for bandwidth in (1e-6, 1e-3, 0.0):
        got = group_js(far, np.repeat(["a", "b", "c"], sizes), bandwidth=bandwidth)
        assert got == pytest.approx(-(shares * np.log2(shares)).sum(), abs=1e-9)
    assert group_js(far, ["one"] * 8, bandwidth=0.1) == 0
    assert group_js([0.3] * 4, [0, 0, 1, 1], bandwidth=0.1) == 0


def test_the_papers_bandwidth_hides_what_a_relative_one_sees_in_small_rates():
    random = np.random.default_rng(0)
    groups = np.repeat([0, 1], 300)
    rates = 0.05 + 0.05 * groups + 0.005 * random.normal(size=600)
    assert group_js(rates, groups, bandwidth=0.15) < 0.05
    assert group_js(rates, groups, bandwidth="relative") > 0.5


def test_groups_may_be_labels_or_rows_of_columns():
    outputs = np.linspace(0, 1, 8)
    table = pd.DataFrame({"a": list("xxyyxxyy"), "b": [1, 2] * 4})
    joined = (table["a"] + table["b"].astype(str)).tolist()
    for measure in (unfairness, lambda o, g: group_js(o, g, bandwidth=0.1)):
        expected = measure(outputs, joined)
        assert measure(outputs, table) == pytest.approx(expected, abs=1e-14)
        assert measure(outputs, pl.from_pandas(table)) == pytest.approx(expected, abs=1e-14)


@quick
@given(seeds)
def test_unfairness_is_the_ratio_of_variances(seed):
    random = np.random.default_rng(seed)
    outputs, groups = random.normal(size=30), np.arange(30) % 4
    means = [outputs[groups == g].mean() for g in range(4)]
    expected = np.var(means, ddof=1) / np.var(outputs, ddof=1)
    assert unfairness(outputs, groups) == pytest.approx(expected, rel=1e-12)


def test_unfairness_weighs_groups_equally_and_may_exceed_one():
    outputs = np.r_[np.zeros(99), 1.0]
    assert unfairness(outputs, np.r_[np.zeros(99), 1.0]) == pytest.approx(50)
    assert unfairness(np.ones(4), [0, 0, 1, 1]) == 0


def test_ranked_probability_scores_are_their_sums():
    mean, counts = np.array([0.5, 2.0, 7.0]), np.array([0, 3, 12])
    expected = 0.0
    for m, y in zip(mean, counts, strict=True):
        for k in range(11):
            below = sum(math.exp(-m) * m**j / math.factorial(j) for j in range(k + 1))
            expected += (below - (k >= y)) ** 2 / 3
    assert ranked_probability_score(mean, counts) == pytest.approx(expected, abs=1e-12)
    p, y = np.array([0.2, 0.9]), np.array([1, 1])
    brier = ranked_probability_score(p, y, family="bernoulli")
    assert brier == pytest.approx((0.64 + 0.01) / 2, abs=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_js([0.1, math.nan], [0, 1], bandwidth=0.1), "outputs must be finite"),
        (lambda: group_js([], [], bandwidth=0.1), "outputs"),
        (lambda: group_js([0.1, 0.2], [0], bandwidth=0.1), "groups"),
        (lambda: group_js([0.1, 0.2], [0, None], bandwidth=0.1), "missing"),
        (lambda: group_js([0.1, 0.2], [0, 1], bandwidth=-1.0), "bandwidth"),
        (lambda: group_js([0.1, 0.2], [0, 1], bandwidth=0.1, weights="size"), "weights"),
        (lambda: unfairness([0.1, 0.2], [1, 1]), "two different groups"),
        (lambda: ranked_probability_score([-1.0], [0]), "prediction"),
        (lambda: ranked_probability_score([1.0], [0.5]), "counts"),
        (lambda: ranked_probability_score([1.0], [2], family="bernoulli"), "0 or 1"),
        (lambda: ranked_probability_score([1.0, 1.0], [1]), "2 items"),
        (lambda: ranked_probability_score([1.0], [1], family="normal"), "family"),
    ],
)
def test_measures_name_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Encoding and cells


def test_attributes_of_every_type_are_encoded_alike_from_every_container():
    table = pd.DataFrame(
        {"race": pd.Categorical([3, 1, 2, 1]), "sex": ["f", "m", "f", "f"], "age": [20, 30, 60, 40]}
    )
    expected = {
        "race": [[0, 0, 1], [1, 0, 0], [0, 1, 0], [1, 0, 0]],
        "sex": [[0], [1], [0], [0]],
        "age": [[0], [0.25], [1], [0.5]],
    }
    plain = table.astype({"race": int})
    cases = [
        encode_sensitive(table),
        encode_sensitive(plain, categorical=["race"]),
        encode_sensitive(pl.from_pandas(plain), categorical=["race"]),
        encode_sensitive(plain.to_dict("list"), categorical=["race"]),
    ]
    for got in cases:
        assert {name: s.tolist() for name, s in got.items()} == expected
    by_place = encode_sensitive(plain.to_numpy(), categorical=[0])
    assert [s.tolist() for s in by_place.values()] == list(expected.values())
    mixed = encode_sensitive([["f", 1.0], ["m", 2.0], ["f", 5.0]])  # strings don't swallow numbers
    assert mixed["1"].squeeze().tolist() == [0, 0.25, 1]


def test_integer_codes_of_a_category_would_impose_an_order():
    y = torch.tensor([0.0, 1, 0, 0, 1, 0], dtype=torch.float64)
    codes = torch.tensor([0.0, 1, 2, 0, 1, 2], dtype=torch.float64)
    penalty = DistanceCovarianceRegularizer(unbiased=False)
    one_hot = encode_sensitive(codes.numpy(), categorical=[0])
    assert penalty(y, one_hot) > 2 * penalty(y, codes / 2)


@pytest.mark.parametrize(
    ("sensitive", "message"),
    [
        ({"age": [1.0, math.nan, 3.0]}, "missing"),
        ({"race": ["a", None, "b"]}, "missing"),
        ({"age": [1.0, math.inf, 3.0]}, "finite"),
        ({"age": [1, 2, 3], "sex": ["f", "m"]}, "3 items"),
        ({}, "at least one attribute"),
        (pd.DataFrame([[1, 2], [3, 4]], columns=["a", "a"]), "repeat"),
        (np.zeros((2, 2, 2)), "shape"),
    ],
)
def test_encoding_names_what_is_wrong(sensitive, message):
    with pytest.raises(ValueError, match=message):
        encode_sensitive(sensitive)


def test_unknown_categorical_name_is_an_error():
    with pytest.raises(ValueError, match="race"):
        encode_sensitive({"age": [1, 2]}, categorical=["race"])


def test_cells_are_the_combinations_with_quantile_bins():
    age = np.arange(100.0)
    cells = intersectional_groups({"sex": ["f", "m"] * 50, "age": age}, bins=4)
    assert len(set(cells)) == 8
    assert {len(cells[cells == cell]) for cell in set(cells)} <= {12, 13}
    assert len(set(intersectional_groups({"x": [5.0] * 4}))) == 1


# Audit and choice of the strength


def test_permutation_test_ignores_dependence_among_attributes():
    # attributes are equal, predictions independent of them; the p-value is that of one draw, and
    # falls below 0.05 with probability 0.05: the seed is fixed
    random = np.random.default_rng(1)
    sex = random.integers(0, 2, 200)
    report = audit_fairness(
        random.random(200), {"sex": sex, "copy": sex}, permutations=99, random_state=0
    )
    assert report.joint > 0.1  # the joint measure is far from 0 all the same
    assert report.p_value > 0.05


def test_audit_finds_the_intersection_and_reports_its_remainder():
    y, (s1, s2) = xor(50)
    both = {"a": s1.numpy(), "b": s2.numpy()}
    report = audit_fairness(y.numpy(), both, permutations=49, bandwidth=0.01)
    assert report.p_value == 1 / 50
    assert report.remainder == pytest.approx(report.covariance - sum(report.marginal.values()))
    assert report.remainder > 0.07
    assert report.divergence == pytest.approx(1, abs=1e-6)
    assert set(report.group_sizes.values()) == {50}


def test_choice_of_strength_by_target_and_by_elbow():
    strengths, curve = [0, 1, 2, 3, 4], [1.0, 0.2, 0.1, 0.05, 0.0]
    assert choose_strength(strengths, curve) == 1
    assert choose_strength(strengths, curve, target=0.1) == 2
    assert choose_strength(strengths, [0.1, 0.2, 0.3, 0.4, 0.5]) == 0
    with pytest.raises(ValueError, match="reached by no strength"):
        choose_strength(strengths, [0.5] * 5, target=0.1)
    with pytest.raises(ValueError, match="increasing"):
        choose_strength([1, 0], [1, 1])
    with pytest.raises(ValueError, match="divergence"):
        choose_strength(strengths, [1.0])


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: DistanceCovarianceRegularizer()(None, torch.ones(4)), TypeError, "outputs"),
        (lambda: DistanceCovarianceRegularizer()(torch.ones(4), 3), TypeError, "sensitive"),
        (
            lambda: DistanceCovarianceRegularizer()(torch.ones(4), torch.ones(4), mask=[1] * 4),
            TypeError,
            "mask",
        ),
        (lambda: unfairness(["a", "b"], [0, 1]), TypeError, "outputs"),
        (lambda: audit_fairness([0.0] * 4, [0, 0, 1, 1], random_state=2.5), TypeError, "random"),
        (lambda: audit_fairness([0.0] * 4, [0, 0, 1, 1], random_state=-1), ValueError, "random"),
    ],
)
def test_what_is_of_another_kind_is_named(call, error, named):
    with pytest.raises(error, match=f"^{named}"):
        call()
