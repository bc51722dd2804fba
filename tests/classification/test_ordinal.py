"""The ordered likelihood, the penalty on changes of slope, and the exact path."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from steelyard.classification import (
    lambda_max,
    presto_path,
    presto_penalty,
    proportional_odds_nll,
)
from steelyard.classification._lasso_quadratic import lasso_quadratic

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31)


def parameters(seed, rows=7, p=3, classes=4, spread=0.3):
    """Features, labels and boundaries that do not cross."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(rows, p, dtype=torch.float64, generator=g).clamp(-2, 2)
    coef = spread * torch.rand(p, classes - 1, dtype=torch.float64, generator=g)
    steps = 1 + 2 * spread * p + torch.rand(classes - 1, dtype=torch.float64, generator=g)
    y = torch.randint(classes, (rows,), generator=g)
    return X, y, steps.cumsum(0) - 3, coef


def sample(seed, n=300, p=5, classes=4, spread=0.6):
    """Rows of a model whose slopes change at some boundaries."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, p)) * np.linspace(0.5, 2, p) + 1
    start, changes = rng.choice([0, spread], p), rng.choice([0, 0, spread], (p, classes - 1))
    coef = start[:, None] + np.cumsum(changes, 1) * rng.choice([-1, 1])
    eta = np.maximum.accumulate(np.arange(classes - 1) * 1.2 + (X - 1) @ coef, axis=1)
    y = (rng.random((n, 1)) > 1 / (1 + np.exp(-eta))).sum(1)
    y[:classes] = np.arange(classes)
    return X, y


def standardised(X):
    return (X - X.mean(0)) / X.std(0)


def slopes_of_changes(X, y, intercept, coef):
    """Gradients of the mean likelihood in intercepts and in the changes of slope, by autograd."""
    tensors = [torch.as_tensor(t).double().requires_grad_() for t in (intercept, coef)]
    nll = proportional_odds_nll(torch.as_tensor(X).double(), torch.as_tensor(y), *tensors)
    alpha, beta = torch.autograd.grad(nll, tensors)
    return alpha, beta.flip(1).cumsum(1).flip(1)


def violation(X, y, intercept, coef, lam, *, penalize_base=True, l1_ratio=1.0):
    """Largest violation of the conditions of optimality; X and coef in the scale penalised."""
    alpha, slope = slopes_of_changes(X, y, intercept, coef)
    psi = torch.as_tensor(np.diff(coef, axis=1, prepend=0.0))
    weights = torch.full_like(psi, lam)
    if not penalize_base:
        weights[:, 0] = 0
    smooth = slope + (1 - l1_ratio) * weights * psi
    bound = l1_ratio * weights
    zero = psi.abs() < 1e-12
    worst = torch.where(zero, (smooth.abs() - bound).clamp(min=0), smooth + bound * psi.sign())
    return max(float(worst.abs().max()), float(alpha.abs().max()))


# The likelihood


@quick
@given(seeds, st.integers(2, 6))
def test_probabilities_sum_to_one_and_equal_the_naive_form(seed, classes):
    X, _, intercept, coef = parameters(seed, classes=classes)
    probs = torch.stack(
        [
            -proportional_odds_nll(X, torch.full((7,), k), intercept, coef, reduction="none")
            for k in range(classes)
        ]
    ).exp()
    torch.testing.assert_close(probs.sum(0), torch.ones(7, dtype=torch.float64))
    edges = (intercept + X @ coef).sigmoid()
    ones = torch.ones(7, 1, dtype=torch.float64)
    naive = torch.cat([edges, ones], 1) - torch.cat([0 * ones, edges], 1)
    torch.testing.assert_close(probs.T, naive, rtol=1e-9, atol=1e-12)


@quick
@given(seeds)
def test_gradient_is_that_of_the_formula(seed):
    X, y, intercept, coef = parameters(seed)
    eta = (intercept + X @ coef).requires_grad_()
    one = torch.eye(3, dtype=torch.float64)
    nll = sum(proportional_odds_nll(one[:1] * 0, y[i : i + 1], eta[i], coef * 0) for i in range(7))
    (got,) = torch.autograd.grad(nll, eta)
    c = eta.detach().sigmoid()
    pi = torch.cat([c, torch.ones(7, 1)], 1) - torch.cat([torch.zeros(7, 1), c], 1)
    hit = torch.nn.functional.one_hot(y, 4).double() / pi
    torch.testing.assert_close(got, -c * (1 - c) * (hit[:, :-1] - hit[:, 1:]))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_first_and_second_derivatives(reduction):
    X, y, intercept, coef = parameters(3)
    tensors = (intercept.requires_grad_(), coef.requires_grad_())

    def function(a, b):
        return proportional_odds_nll(X, y, a, b, reduction=reduction)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@quick
@given(seeds)
def test_reversing_the_classes_turns_the_boundaries_around(seed):
    X, y, intercept, coef = parameters(seed)
    there = proportional_odds_nll(X, y, intercept, coef)
    back = proportional_odds_nll(X, 3 - y, -intercept.flip(0), -coef.flip(1))
    torch.testing.assert_close(there, back)
    changes = presto_penalty(coef, penalize_base=False)
    torch.testing.assert_close(presto_penalty(-coef.flip(1), penalize_base=False), changes)
    base = presto_penalty(-coef.flip(1)) - changes
    torch.testing.assert_close(base, coef[:, -1].abs().sum())  # the base moves to the other end


@quick
@given(seeds)
def test_merging_the_last_classes_leaves_the_terms_of_the_others(seed):
    X, y, intercept, coef = parameters(seed)
    full = proportional_odds_nll(X, y, intercept, coef, reduction="none")
    merged = proportional_odds_nll(X, y.clamp(max=2), intercept[:2], coef[:, :2], reduction="none")
    torch.testing.assert_close(full[y < 2], merged[y < 2])


def test_expected_information_of_three_classes_is_that_of_the_closed_form():
    X = torch.tensor([[0.7]], dtype=torch.float64)
    point = torch.tensor([-0.4, 1.5, 0.8], dtype=torch.float64)

    def loss(v, k):
        return proportional_odds_nll(
            X, torch.tensor([k]), v[:2], v[2].expand(1, 2), reduction="sum"
        )

    probs = torch.stack([(-loss(point, k)).exp() for k in range(3)])
    got = sum(
        probs[k] * torch.autograd.functional.hessian(lambda v, k=k: loss(v, k), point)
        for k in range(3)
    )
    p1, p2, p3 = probs.tolist()
    s1, s2, x = p1 * (1 - p1), p3 * (1 - p3), 0.7
    expected = [
        [s1**2 * (1 / p1 + 1 / p2), -s1 * s2 / p2, x * (1 - p3) * p1 * (1 - p1)],
        [-s1 * s2 / p2, s2**2 * (1 / p2 + 1 / p3), x * (1 - p1) * p3 * (1 - p3)],
        [0, 0, x * x * (1 - p1) * (1 - p2) * (1 - p3)],
    ]
    expected[2][:2] = expected[0][2], expected[1][2]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_two_classes_are_logistic_regression_of_the_lower():
    X, _, intercept, coef = parameters(1, classes=2)
    y = torch.tensor([0, 1, 1, 0, 1, 0, 0])
    logits = (intercept + X @ coef).squeeze(1)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, (1 - y).double())
    torch.testing.assert_close(proportional_odds_nll(X, y, intercept, coef), expected)


def test_extreme_boundaries_stay_exact():
    X = torch.zeros(3, 1, dtype=torch.float64)
    coef = torch.zeros(1, 2, dtype=torch.float64)
    y = torch.arange(3)
    far = torch.tensor([-1e4, 1e4], dtype=torch.float64)
    got = proportional_odds_nll(X, y, far, coef, reduction="none")
    assert got.tolist() == [1e4, 0.0, 1e4]
    # at 40 the rare class has a probability that 1 - sigma(40) would round to 0
    near = torch.tensor([40.0, 40.0 + 1e-9], dtype=torch.float64)
    got = proportional_odds_nll(X, y, near, coef, reduction="none")
    torch.testing.assert_close(got[2], torch.tensor(40.0, dtype=torch.float64))
    torch.testing.assert_close(got[1], 40 - torch.log(near[1] - near[0]), rtol=1e-9, atol=0)


def test_crossed_boundaries_cost_infinity_with_a_zero_gradient():
    X = torch.zeros(3, 1)
    intercept = torch.tensor([1.0, 0.5], requires_grad=True)
    losses = proportional_odds_nll(
        X, torch.arange(3), intercept, torch.zeros(1, 2), reduction="none"
    )
    assert torch.isinf(losses).tolist() == [False, True, False]
    losses[1].backward()
    assert intercept.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_accumulates_wide(dtype):
    X, y, intercept, coef = (t.to(dtype) if t.is_floating_point() else t for t in parameters(2))
    got = proportional_odds_nll(X, y, intercept, coef)
    assert got.dtype == dtype
    exact = proportional_odds_nll(X.double(), y, intercept.double(), coef.double())
    torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps * 2, atol=0)


def test_a_strided_view_and_a_batch_of_functions():
    X, y, intercept, coef = parameters(5)
    wide = torch.stack([X, -X], 2)[..., 0]
    assert not wide.is_contiguous()
    value = proportional_odds_nll(X, y, intercept, coef)
    assert proportional_odds_nll(wide, y, intercept, coef) == value
    several = torch.stack([intercept, intercept + 1])
    got = torch.func.vmap(lambda a: proportional_odds_nll(X, y, a, coef))(several)
    torch.testing.assert_close(got[0], value)


def test_nan_passes_through():
    X, y, intercept, coef = parameters(5)
    X[0, 0] = torch.nan
    assert torch.isnan(proportional_odds_nll(X, y, intercept, coef))


def test_likelihood_names_what_is_wrong():
    X, y, intercept, coef = parameters(0)
    with pytest.raises(TypeError, match=r"y must have an integer dtype, got torch\.float64"):
        proportional_odds_nll(X, y.double(), intercept, coef)
    with pytest.raises(ValueError, match=r"y must be in \[0, 3\]"):
        proportional_odds_nll(X, y + 2, intercept, coef)
    with pytest.raises(ValueError, match=r"coef must have shape \[3, 3\]"):
        proportional_odds_nll(X, y, intercept, coef.T[:2])
    with pytest.raises(ValueError, match="X must not be empty"):
        proportional_odds_nll(X[:0], y[:0], intercept, coef)
    with pytest.raises(ValueError, match=r"y must have shape \[7\]"):
        proportional_odds_nll(X, y[:5], intercept, coef)


# The penalty


def test_penalty_is_the_sum_written_out():
    beta = torch.tensor([[1.0, 4.0, 2.0], [0.0, -1.0, -1.0]], dtype=torch.float64)
    for base, mix in itertools.product((True, False), (0.0, 0.3, 1.0)):
        kept = torch.tensor([3.0, 2.0, 1.0, 0.0] + [1.0, 0.0] * base)
        expected = mix * kept.sum() + (1 - mix) / 2 * kept.square().sum()
        got = presto_penalty(beta, penalize_base=base, l1_ratio=mix)
        torch.testing.assert_close(got, expected.double())


def test_penalty_has_its_derivative():
    beta = parameters(4)[3].requires_grad_()
    assert torch.autograd.gradcheck(lambda b: presto_penalty(b, l1_ratio=0.4), (beta,))
    with pytest.raises(ValueError, match=r"l1_ratio must be >= 0\.0 and <= 1\.0"):
        presto_penalty(beta, l1_ratio=1.5)


# The quadratic problem inside each step


@quick
@given(seeds, st.integers(1, 12))
def test_quadratic_with_penalty_is_solved_to_rounding(seed, size):
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((size, size + 1))
    hessian = root @ root.T + 1e-3 * np.eye(size)
    linear, weights = 3 * rng.standard_normal(size), rng.choice([0.0, 0.5, 2.0], size)
    start = rng.choice([0.0, 1.0], size) * rng.standard_normal(size)
    u = lasso_quadratic(hessian, linear, weights, start, tolerance=1e-10)
    slope = hessian @ u - linear
    worst = np.where(u == 0, np.maximum(np.abs(slope) - weights, 0), slope + weights * np.sign(u))
    assert np.abs(worst).max() < 1e-8 * max(1.0, np.abs(slope).max())


# The path


def test_at_lambda_max_only_the_shares_of_the_classes_are_left():
    X, y = sample(0)
    top = lambda_max(X, y)
    path = presto_path(X, y, lambdas=torch.tensor([1.001, 1.0, 0.98]).double() * top)
    assert path.nonzero.tolist() == [0, 0, 1]
    shares = torch.tensor([(y <= k).mean() for k in range(3)])
    torch.testing.assert_close(path.intercept[0], torch.logit(shares), rtol=1e-9, atol=1e-11)
    assert path.coef[0].abs().max() == 0


@pytest.mark.parametrize("penalize_base", [True, False])
@pytest.mark.parametrize("l1_ratio", [1.0, 0.5, 0.0])
def test_each_fit_satisfies_the_conditions_of_optimality(penalize_base, l1_ratio):
    X, y = sample(1)
    options = {"penalize_base": penalize_base, "l1_ratio": l1_ratio}
    path = presto_path(X, y, n_lambdas=6, **options)
    Z = standardised(X)
    scale = lambda_max(X, y)
    for lam, intercept, coef in zip(path.lambdas, path.intercept, path.coef, strict=True):
        scaled = coef.numpy() * X.std(0)[:, None]
        moved = intercept.numpy() + X.mean(0) @ coef.numpy()
        assert violation(Z, y, moved, scaled, float(lam), **options) < 1e-8 * scale
    assert (path.kkt < 1e-8 * scale).all()


@pytest.mark.parametrize(("penalize_base", "l1_ratio"), [(True, 1.0), (False, 1.0), (True, 0.5)])
def test_fits_equal_those_of_a_convex_solver(penalize_base, l1_ratio):
    cvxpy = pytest.importorskip("cvxpy")
    X, y = sample(2, n=150, p=3)
    Z, lam = standardised(X), 0.02
    alpha, psi = cvxpy.Variable(3), cvxpy.Variable((3, 3))
    beta = cvxpy.vstack([cvxpy.sum(psi[:, : k + 1], axis=1) for k in range(3)]).T
    losses = []
    for k in range(4):
        rows = Z[y == k]
        upper = rows @ beta[:, k] + alpha[k] if k < 3 else None
        lower = rows @ beta[:, k - 1] + alpha[k - 1] if k else None
        if upper is not None:
            losses.append(cvxpy.sum(cvxpy.logistic(-upper)))
        if lower is not None:
            losses.append(cvxpy.sum(cvxpy.logistic(lower)))
        if upper is not None and lower is not None:
            losses.append(-cvxpy.sum(cvxpy.log(1 - cvxpy.exp(-(upper - lower)))))
    paid = psi if penalize_base else psi[:, 1:]
    penalty = l1_ratio * cvxpy.sum(cvxpy.abs(paid))
    if l1_ratio < 1:
        penalty += (1 - l1_ratio) / 2 * cvxpy.sum_squares(paid)
    problem = cvxpy.Problem(cvxpy.Minimize(sum(losses) / len(y) + lam * penalty))
    problem.solve(solver="CLARABEL")
    path = presto_path(
        X, y, lambdas=torch.tensor([lam]), penalize_base=penalize_base, l1_ratio=l1_ratio
    )
    scaled = path.coef[0] * torch.tensor(X.std(0)).unsqueeze(1)
    cost = presto_penalty(scaled, penalize_base=penalize_base, l1_ratio=l1_ratio)
    ours = float(path.nll[0] + lam * cost)
    assert ours <= problem.value + 1e-9
    assert ours == pytest.approx(problem.value, abs=1e-6)
    np.testing.assert_allclose(scaled.numpy(), np.cumsum(psi.value, 1), atol=2e-4)


def test_the_strongest_penalty_with_a_free_base_is_proportional_odds():
    ordinal = pytest.importorskip("statsmodels.miscmodels.ordinal_model")
    X, y = sample(3, n=200, p=2)
    peer = ordinal.OrderedModel(y, X, distr="logit").fit(method="bfgs", disp=False, gtol=1e-8)
    top = lambda_max(X, y, penalize_base=False)
    path = presto_path(X, y, lambdas=torch.tensor([top * 1.001]), penalize_base=False)
    slopes = peer.params[: X.shape[1]]
    np.testing.assert_allclose(-path.coef[0].numpy(), slopes[:, None].repeat(3, 1), atol=1e-5)
    edges = peer.model.transform_threshold_params(peer.params)[1:-1]
    np.testing.assert_allclose(path.intercept[0].numpy(), edges, atol=1e-5)
    assert float(path.nll[0]) == pytest.approx(-peer.llf / len(y), abs=1e-10)
    below = presto_path(X, y, lambdas=torch.tensor([top * 0.99]), penalize_base=False)
    assert below.nonzero[0] == path.nonzero[0] + 1


def test_without_penalty_a_binary_feature_gives_the_empirical_logits():
    x = np.repeat([0.0, 1.0], [40, 60])
    y = np.concatenate([np.repeat([0, 1, 2], [20, 15, 5]), np.repeat([0, 1, 2], [12, 18, 30])])
    path = presto_path(x[:, None], y, lambdas=torch.tensor([0.0]))
    logit = np.array(
        [[np.log(s / (1 - s)) for s in shares] for shares in [(0.5, 0.875), (0.2, 0.5)]]
    )
    np.testing.assert_allclose(path.intercept[0].numpy(), logit[0], atol=1e-9)
    np.testing.assert_allclose(path.coef[0, 0].numpy(), logit[1] - logit[0], atol=1e-9)


def test_two_classes_are_the_lasso_logistic_regression():
    linear = pytest.importorskip("sklearn.linear_model")
    X, y = sample(4, classes=2)
    lam = 0.03
    path = presto_path(X, y, lambdas=torch.tensor([lam]), standardize=False)
    peer = linear.LogisticRegression(
        l1_ratio=1.0, C=1 / (lam * len(y)), solver="saga", tol=1e-10, max_iter=100_000
    ).fit(X, y == 0)
    np.testing.assert_allclose(path.coef[0].numpy().ravel(), peer.coef_[0], atol=1e-5)


def test_objective_is_below_that_of_a_general_optimiser_on_split_variables():
    X, y = sample(5, n=200, p=4)
    Z, lam, q, p = torch.tensor(standardised(X)), 0.01, 3, 4
    label = torch.tensor(y)

    def objective(v):
        v = torch.tensor(v, requires_grad=True)
        alpha, up, down = v[:q], v[q : q + p * q], v[q + p * q :]
        beta = (up - down).reshape(p, q).cumsum(1)
        value = proportional_odds_nll(Z, label, alpha, beta) + lam * (up + down).sum()
        if not torch.isfinite(value):
            return 1e10, np.zeros(len(v))
        value.backward()
        return value.item(), v.grad.numpy()

    start = np.zeros(q + 2 * p * q)
    start[:q] = np.log([(y <= k).mean() / (y > k).mean() for k in range(q)])
    bounds = [(None, None)] * q + [(0, None)] * (2 * p * q)
    peer = minimize(
        objective,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={"maxiter": 2000, "ftol": 1e-14, "gtol": 1e-9},
    )
    path = presto_path(X, y, lambdas=torch.tensor([lam]))
    scaled = path.coef[0] * torch.tensor(X.std(0)).unsqueeze(1)
    ours = float(path.nll[0] + lam * presto_penalty(scaled))
    assert ours <= peer.fun + 1e-12
    assert ours == pytest.approx(peer.fun, abs=1e-6)


def test_units_of_the_features_do_not_matter_when_they_are_standardised():
    X, y = sample(6)
    path = presto_path(X, y, n_lambdas=4)
    other = presto_path(X * [1e-3, 7, 1, 50, 1e4] - 3, y, n_lambdas=4)
    torch.testing.assert_close(other.lambdas, path.lambdas, rtol=1e-9, atol=0)
    torch.testing.assert_close(other.nll, path.nll, rtol=1e-9, atol=0)
    assert not torch.allclose(
        presto_path(X, y, n_lambdas=4, standardize=False).nll, path.nll, rtol=1e-3
    )


def test_weights_are_repetitions():
    X, y = sample(7, n=60)
    times = np.random.default_rng(0).integers(0, 4, 60)
    times[:4] = 1
    weighted = presto_path(X, y, n_lambdas=4, sample_weight=torch.tensor(times).double())
    repeated = presto_path(X.repeat(times, 0), y.repeat(times), n_lambdas=4)
    torch.testing.assert_close(weighted.coef, repeated.coef, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(weighted.lambdas, repeated.lambdas, rtol=1e-10, atol=0)


def test_a_warm_start_ends_where_a_cold_one_does():
    X, y = sample(8)
    path = presto_path(X, y, n_lambdas=12)
    for place in (3, 11):
        alone = presto_path(X, y, lambdas=path.lambdas[place : place + 1])
        torch.testing.assert_close(alone.coef[0], path.coef[place], rtol=1e-6, atol=1e-8)


def test_the_likelihood_falls_along_the_path():
    X, y = sample(9)
    path = presto_path(X, y, n_lambdas=15)
    assert (path.nll.diff() <= 1e-12).all()
    assert path.nonzero[0] == 0
    assert path.nonzero[-1] >= 8


def test_more_features_than_rows_equal_ones_and_constant_ones():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((60, 150))
    X[:, 1] = X[:, 0]
    X[:, 2] = 5.0
    y = np.digitize(2 * X[:, 0] + X[:, 5] + rng.logistic(size=60), [-1.0, 2.0])
    path = presto_path(X, y, n_lambdas=10, ratio=0.1)
    assert (path.kkt <= 1e-8 * path.lambdas[0]).all()
    assert path.coef[:, 2].abs().max() == 0
    assert 0 < path.nonzero[-1] < 120
    Z = standardised(np.delete(X, 2, 1))
    coef = np.delete(path.coef[-1].numpy(), 2, 0) * np.delete(X.std(0), 2)[:, None]
    moved = path.intercept[-1].numpy() + np.delete(X.mean(0), 2) @ np.delete(
        path.coef[-1].numpy(), 2, 0
    )
    assert violation(Z, y, moved, coef, float(path.lambdas[-1])) < 1e-8


def test_a_ridge_path_begins_at_a_hundred_times_the_slope():
    X, y = sample(0)
    path = presto_path(X, y, n_lambdas=2, l1_ratio=0.0)
    assert float(path.lambdas[0]) == pytest.approx(100 * lambda_max(X, y))
    half = presto_path(X, y, n_lambdas=2, l1_ratio=0.5)
    assert float(half.lambdas[0]) == pytest.approx(2 * lambda_max(X, y))


def test_path_names_what_is_wrong():
    X, y = sample(0, n=20)
    with pytest.raises(ValueError, match="X must be finite"):
        presto_path(X * np.nan, y)
    with pytest.raises(TypeError, match="y must have an integer dtype, got float64"):
        presto_path(X, y + 0.5)
    with pytest.raises(ValueError, match="y must hold at least two classes"):
        presto_path(X, y * 0)
    with pytest.raises(ValueError, match=r"got none of \[1\]"):
        presto_path(X, np.where(y == 1, 0, y))
    with pytest.raises(ValueError, match=r"y must be in 0\.\.K-1, got -1"):
        lambda_max(X, y - 1)
    with pytest.raises(ValueError, match=r"y must have shape \[20\]"):
        lambda_max(X, y[:3])
    with pytest.raises(ValueError, match="X must have shape"):
        lambda_max(X[:, 0], y)
    with pytest.raises(ValueError, match="sample_weight"):
        presto_path(X, y, sample_weight=-np.ones(20))
    with pytest.raises(ValueError, match="lambdas must be a row of penalties >= 0"):
        presto_path(X, y, lambdas=torch.tensor([-1.0]))
    with pytest.raises(ValueError, match=r"ratio must be > 0\.0 and < 1\.0"):
        presto_path(X, y, ratio=1.0)
