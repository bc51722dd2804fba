"""Bases, weights, fits and their bounds; the scikit-learn estimator."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.estimation import (
    chernoff_rate,
    christoffel,
    orthonormal_basis,
    required_samples,
    sample_optimal_iid,
    sample_volume,
    weighted_least_squares,
)

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)
close = {"rtol": 1e-9, "atol": 1e-11}


def candidates(seed, points=9, m=3):
    """Features, an uneven law with one impossible point, and the orthonormal basis."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(points, m, dtype=torch.float64, generator=g)
    measure = torch.rand(points, dtype=torch.float64, generator=g) + 0.05
    measure[0] = 0.0
    measure = measure / measure.sum()
    return features, measure, orthonormal_basis(features, measure)


@quick
@given(seeds, st.integers(1, 5))
def test_basis_is_what_gram_schmidt_gives(seed, m):
    features, measure, basis = candidates(seed, m=m)
    columns = []
    for column in features.T:
        rest = column
        for _ in range(2):
            for q in columns:
                rest = rest - (measure * q * rest).sum() * q
        columns.append(rest / (measure * rest * rest).sum().sqrt())
    torch.testing.assert_close(basis, torch.stack(columns, 1), rtol=1e-7, atol=1e-9)
    gram = basis.T @ (measure.unsqueeze(1) * basis)
    torch.testing.assert_close(gram, torch.eye(m, dtype=torch.float64), rtol=0, atol=1e-12)


def test_basis_stays_orthonormal_for_features_that_are_nearly_dependent():
    x = torch.linspace(0.2, 1, 500, dtype=torch.float64)
    measure = torch.full_like(x, 1 / 500)
    basis = orthonormal_basis(x.unsqueeze(1) ** torch.arange(12), measure)
    gram = basis.T @ basis / 500
    torch.testing.assert_close(gram, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-11)
    signs = (measure.unsqueeze(1) * basis * x.unsqueeze(1) ** torch.arange(12)).sum(0)
    assert (signs[:8] > 0).all()


@quick
@given(seeds)
def test_optimal_design_is_a_law_with_constant_weighted_kernel(seed):
    _, measure, basis = candidates(seed)
    design = christoffel(basis, measure)
    assert design.probabilities.sum().item() == pytest.approx(1.0, rel=1e-12)
    torch.testing.assert_close(design.probabilities * design.weights, measure, **close)
    weighted = design.weights * basis.square().sum(1)
    torch.testing.assert_close(weighted, torch.full_like(measure, 3.0), **close)


def test_fourier_basis_needs_no_weights():
    angle = torch.arange(40, dtype=torch.float64) * 2 * math.pi / 40
    waves = [torch.ones_like(angle)]
    for k in (1, 2):
        waves += [math.sqrt(2) * torch.cos(k * angle), math.sqrt(2) * torch.sin(k * angle)]
    design = christoffel(torch.stack(waves, 1), torch.full_like(angle, 1 / 40))
    torch.testing.assert_close(design.weights, torch.ones_like(angle), **close)


@quick
@given(seeds, st.integers(3, 12))
def test_fit_solves_the_normal_equations_and_finds_functions_of_the_space(seed, n):
    _, measure, basis = candidates(seed)
    g = torch.Generator().manual_seed(seed)
    points, weights = sample_optimal_iid(basis, measure, n, generator=g)
    rows, values = basis[points], torch.randn(n, dtype=torch.float64, generator=g)
    fit = weighted_least_squares(rows, values, weights)
    gram = rows.T @ (weights.unsqueeze(1) * rows) / n
    torch.testing.assert_close(fit.gram, gram, **close)
    eigenvalues = torch.linalg.eigvalsh(gram)
    torch.testing.assert_close(fit.lambda_min, eigenvalues[0].clamp(min=0), rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(fit.lambda_max, eigenvalues[-1], **close)
    torch.testing.assert_close(
        gram @ fit.coef, rows.T @ (weights * values) / n, rtol=1e-6, atol=1e-8
    )
    if fit.lambda_min > 1e-6:
        truth = torch.randn(3, dtype=torch.float64, generator=g)
        again = weighted_least_squares(rows, rows @ truth, weights)
        torch.testing.assert_close(again.coef, truth, rtol=1e-6, atol=1e-7)


@quick
@given(seeds, st.integers(5, 9))
def test_leave_one_out_is_the_error_of_each_point_predicted_from_the_others(seed, n):
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, 2, dtype=torch.float64, generator=g)
    values = torch.randn(n, dtype=torch.float64, generator=g)
    weights = torch.rand(n, dtype=torch.float64, generator=g) + 0.1
    total = 0.0
    for i in range(n):
        rest = torch.arange(n) != i
        coef = weighted_least_squares(rows[rest], values[rest], weights[rest]).coef
        total += weights[i] * (values[i] - rows[i] @ coef) ** 2 / n
    got = weighted_least_squares(rows, values, weights).leave_one_out
    torch.testing.assert_close(got, total, rtol=1e-7, atol=1e-10)


def test_leave_one_out_is_infinite_where_a_point_stands_alone():
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    values = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    assert weighted_least_squares(rows, values, torch.ones(3).double()).leave_one_out == math.inf
    square = weighted_least_squares(rows[1:], values[1:], torch.ones(2).double())
    assert square.leave_one_out == math.inf
    torch.testing.assert_close(rows[1:] @ square.coef, values[1:])


def test_repeated_points_give_the_smallest_solution_and_no_stability():
    rows = torch.tensor([[3.0, 4.0], [3.0, 4.0]], dtype=torch.float64)
    fit = weighted_least_squares(rows, torch.tensor([5.0, 5.0]).double(), torch.ones(2).double())
    assert fit.lambda_min == 0
    torch.testing.assert_close(fit.coef, torch.tensor([0.6, 0.8], dtype=torch.float64))
    nothing = weighted_least_squares(rows, torch.ones(2).double(), torch.zeros(2).double())
    assert (nothing.coef == 0).all()
    assert nothing.lambda_max == 0


@quick
@given(seeds)
def test_a_rotation_of_the_basis_rotates_the_coefficients(seed):
    _, measure, basis = candidates(seed)
    g = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=g)).Q
    points, weights = sample_volume(basis, measure, 6, generator=g)
    values = torch.randn(6, dtype=torch.float64, generator=g)
    fit = weighted_least_squares(basis[points], values, weights)
    turned = weighted_least_squares(basis[points] @ rotation, values, weights)
    torch.testing.assert_close(rotation @ turned.coef, fit.coef, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(turned.lambda_min, fit.lambda_min, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(
        christoffel(basis @ rotation, measure).weights, christoffel(basis, measure).weights, **close
    )


def test_unstable_draws_are_rarer_than_the_chernoff_bound():
    # The bound is an expectation, ours an average of 400 draws; it is an order of magnitude loose.
    _, measure, basis = candidates(0, points=60, m=4)
    g = torch.Generator().manual_seed(0)
    n, delta = 60, 0.75
    unstable = 0
    for _ in range(400):
        points, weights = sample_optimal_iid(basis, measure, n, generator=g)
        fit = weighted_least_squares(basis[points], basis[points][:, 0], weights)
        unstable += bool(fit.lambda_min < 1 - delta)
    assert unstable / 400 <= 4 * math.exp(-n * chernoff_rate(delta) / 4)


def test_required_samples_meet_the_bound_and_one_fewer_does_not():
    for m, delta, eta in ((10, 0.9, 0.01), (50, 0.5, 0.1), (1, 0.3, 0.5)):
        n = required_samples(m, delta, eta)
        assert m * math.exp(-n * chernoff_rate(delta) / m) <= eta * (1 + 1e-12)
        if n > m:
            assert m * math.exp(-(n - 1) * chernoff_rate(delta) / m) > eta
    assert required_samples(1, 0.999, 0.99) == 1


def test_chernoff_rate_keeps_its_digits():
    assert chernoff_rate(1e-9) == pytest.approx(5e-19, rel=1e-8)
    for delta in (0.0999999, 0.1, 0.5):
        expected = delta + (1 - delta) * math.log(1 - delta)
        assert chernoff_rate(delta) == pytest.approx(expected, rel=1e-12)


def test_gradients():
    g = torch.Generator().manual_seed(0)
    features = torch.randn(7, 3, dtype=torch.float64, generator=g).requires_grad_()
    values = torch.randn(7, dtype=torch.float64, generator=g).requires_grad_()
    weights = torch.rand(7, dtype=torch.float64, generator=g) + 0.2
    measure = torch.full((7,), 1 / 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda f: orthonormal_basis(f, measure), features)
    assert torch.autograd.gradcheck(
        lambda f, v: weighted_least_squares(f, v, weights), (features, values)
    )


def test_dtype_follows_the_input_and_strides_do_not_matter():
    features, measure, basis = candidates(0)
    single = orthonormal_basis(features.float(), measure.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, basis.float(), rtol=1e-4, atol=1e-5)
    assert christoffel(single, measure.float()).weights.dtype == torch.float32
    strided = orthonormal_basis(features.T.contiguous().T, measure)
    torch.testing.assert_close(strided, basis, **close)


def test_errors_name_the_argument():
    features, measure, basis = candidates(0)
    with pytest.raises(ValueError, match="column 2 is not"):
        orthonormal_basis(features[:, [0, 1, 0]], measure)
    with pytest.raises(ValueError, match="no more columns than candidates"):
        orthonormal_basis(features[:3], torch.tensor([0.0, 0.5, 0.5]).double())
    with pytest.raises(ValueError, match="measure must sum to 1"):
        orthonormal_basis(features, 2 * measure)
    with pytest.raises(ValueError, match="basis must be orthonormal for measure"):
        christoffel(2 * basis, measure)
    with pytest.raises(ValueError, match="basis must be orthonormal for measure"):
        christoffel(basis * math.nan, measure)
    with pytest.raises(ValueError, match=r"values must have shape \[9\]"):
        weighted_least_squares(basis, measure[:3], measure)
    with pytest.raises(ValueError, match="weights must be >= 0"):
        weighted_least_squares(basis, measure, -measure)
    with pytest.raises(ValueError, match="basis must not be empty"):
        weighted_least_squares(basis[:0], measure[:0], measure[:0])
    with pytest.raises(ValueError, match="delta must be > 0"):
        chernoff_rate(0.0)
    with pytest.raises(ValueError, match="eta must be > 0"):
        required_samples(3, 0.5, 0.0)


def test_estimator_passes_the_checks_of_scikit_learn():
    pytest.importorskip("sklearn")
    from sklearn.utils.estimator_checks import check_estimator

    from steelyard.estimation import WeightedLeastSquares

    check_estimator(WeightedLeastSquares())
    check_estimator(WeightedLeastSquares(fit_intercept=True))


def test_estimator_is_linear_regression_with_weights():
    linear = pytest.importorskip("sklearn.linear_model")
    import numpy as np

    from steelyard.estimation import WeightedLeastSquares

    rng = np.random.default_rng(0)
    X, y, w = rng.normal(size=(20, 3)), rng.normal(size=20), rng.uniform(0.1, 2, 20)
    for intercept in (False, True):
        theirs = linear.LinearRegression(fit_intercept=intercept).fit(X, y, sample_weight=w)
        for population in (None, rng.normal(size=(50, 3))):
            ours = WeightedLeastSquares(fit_intercept=intercept, candidates=population)
            ours.fit(X, y, sample_weight=w)
            np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-8)
            np.testing.assert_allclose(ours.intercept_, theirs.intercept_, rtol=1e-8, atol=1e-12)
            np.testing.assert_allclose(ours.predict(X), theirs.predict(X), rtol=1e-8)


def test_stability_of_the_estimator_is_relative_to_the_population_whatever_the_features():
    pytest.importorskip("sklearn")
    from steelyard.estimation import WeightedLeastSquares

    features, measure, basis = candidates(3, points=30)
    points, weights = sample_volume(basis, measure, 8, generator=torch.Generator().manual_seed(0))
    values = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = weighted_least_squares(basis[points], values, weights)
    data = values.numpy(), weights.numpy()
    plain = WeightedLeastSquares().fit(basis[points].numpy(), *data)
    torch.testing.assert_close(torch.from_numpy(plain.coef_), expected.coef, **close)
    for scale in (1.0, 1e4):
        raw = features * torch.tensor([1.0, scale, 1.0])
        model = WeightedLeastSquares(candidates=raw.numpy(), measure=measure.numpy())
        model.fit(raw[points].numpy(), *data)
        assert model.lambda_min_ == pytest.approx(expected.lambda_min.item(), rel=1e-8)
        assert model.leave_one_out_ == pytest.approx(expected.leave_one_out.item(), rel=1e-8)
        prediction = torch.from_numpy(model.predict(raw.numpy()))
        torch.testing.assert_close(prediction, basis @ expected.coef, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_estimator_takes_frames_in_a_pipeline(library):
    frames = pytest.importorskip(library)
    pytest.importorskip("sklearn")
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from steelyard.estimation import WeightedLeastSquares

    columns = {"age": [1.0, 2.0, 4.0, 3.0], "income": [2.0, 1.0, 5.0, 4.0]}
    frame, y = frames.DataFrame(columns), [3.0, 3.0, 9.0, 7.0]
    model = WeightedLeastSquares(candidates=frame).fit(frame, y)
    assert list(model.feature_names_in_) == ["age", "income"]
    assert model.predict(frame).tolist() == pytest.approx(y)
    assert model.lambda_min_ == pytest.approx(1.0)  # the sample is the population
    make_pipeline(StandardScaler(), WeightedLeastSquares(fit_intercept=True)).fit(frame, y)
    with pytest.raises(ValueError, match="candidates must have the 2 features of X, got 1"):
        WeightedLeastSquares(candidates=frame[["age"]]).fit(frame, y)


def test_the_package_loads_without_scikit_learn_and_names_the_extra():
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['sklearn'] = None; import steelyard.estimation as e\n"
        "try: e.WeightedLeastSquares\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "steelyard[tabular]" in run.stdout
