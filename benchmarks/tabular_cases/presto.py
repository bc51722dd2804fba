"""PRESTO at one penalty and along a path, beside L-BFGS-B on split variables and a conic solver."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from paired import OURS, Contest, Run

Array = NDArray[np.float64]
GAP = 1e-8
LIMITS = {"maxiter": 5000, "maxfun": 20_000}
LOOSE = "steelyard, tol 1e-4"
CONIC = "cvxpy CLARABEL"


def contest(rows: int, features: int, classes: int, penalties: int) -> Contest:
    """The penalty is a tenth of the largest, or a path from that one down to a hundredth.

    Ours and SciPy's with their default tolerances: with these, both come within ``GAP``.
    """
    problem = Problem(rows, features, classes, penalties)
    small = Problem(100, 2, 3, min(penalties, 2))
    return Contest(problem.runs(), problem.errors, small.runs())


class Problem:
    """Ordered classes, the last one rare; features of variance 1."""

    def __init__(self, rows: int, features: int, classes: int, penalties: int) -> None:
        from steelyard.classification import lambda_max

        random = np.random.default_rng(0)
        x = random.standard_normal((rows, features))
        self.x = (x - x.mean(0)) / x.std(0)
        latent = self.x[:, : features // 2] @ np.linspace(1, -0.5, features // 2)
        latent += random.logistic(size=rows)
        shares = np.append(np.linspace(0.4, 0.9, classes - 2), 0.97)
        self.y = np.searchsorted(np.quantile(latent, shares), latent)
        self.boundaries = classes - 1
        top = float(lambda_max(self.x, self.y))
        ratios = np.logspace(0, -2, penalties) if penalties > 1 else np.array([0.1])
        self.lambdas = top * ratios

    def runs(self) -> dict[str, Run]:
        runs = {OURS: self.ours, LOOSE: lambda: self.ours(1e-4), "SciPy L-BFGS-B": self.scipy}
        return runs | ({CONIC: self.conic} if len(self.lambdas) == 1 else {})

    def ours(self, tol: float = 1e-8) -> list[float]:
        from steelyard.classification import presto_path

        path = presto_path(self.x, self.y, lambdas=self.lambdas, tol=tol)
        change = np.diff(path.coef.numpy(), axis=2, prepend=0.0)
        return (path.nll.numpy() + self.lambdas * np.abs(change).sum((1, 2))).tolist()

    def scipy(self) -> list[float]:
        """Each penalty from the start: increments as differences of two that are not negative."""
        from scipy.optimize import minimize

        q, p = self.boundaries, self.x.shape[1]
        counts = np.cumsum(np.bincount(self.y))[:-1] / len(self.y)
        alpha = np.log(counts / (1 - counts))
        bounds = [(None, None)] * q + [(0, None)] * (2 * p * q)
        start = np.concatenate([np.diff(alpha, prepend=0.0), np.zeros(2 * p * q)])

        def objective(theta: Array, lam: float) -> tuple[float, Array]:
            plus, minus = theta[q:].reshape(2, p, q)
            value, slope_alpha, slope = self.likelihood(theta[:q], plus - minus)
            value += lam * theta[q:].sum()
            return value, np.concatenate(
                [slope_alpha, (slope + lam).ravel(), (lam - slope).ravel()]
            )

        return [
            float(
                minimize(
                    objective,
                    start,
                    args=(lam,),
                    jac=True,
                    bounds=bounds,
                    method="L-BFGS-B",
                    options=LIMITS,
                ).fun
            )
            for lam in self.lambdas
        ]

    def likelihood(self, delta: Array, psi: Array) -> tuple[float, Array, Array]:
        """Mean negative log-likelihood of increments ``[q]``, ``[p, q]``, and its slopes."""
        from scipy.special import expit, log1p

        q, y, rows = self.boundaries, self.y, np.arange(len(self.y))
        gaps = delta + self.x @ psi
        eta = gaps.cumsum(1)
        has_upper, has_lower = y < q, y > 0
        both = has_upper & has_lower
        upper = eta[rows[has_upper], y[has_upper]]
        lower = eta[rows[has_lower], y[has_lower] - 1]
        gap = np.maximum(gaps[rows[both], y[both]], 1e-9)  # a wall where boundaries cross
        value = np.logaddexp(0, -upper).sum() + np.logaddexp(0, lower).sum()
        value -= log1p(-np.exp(-gap)).sum()
        slope = np.zeros_like(eta)
        slope[rows[has_upper], y[has_upper]] -= expit(-upper)
        slope[rows[has_lower], y[has_lower] - 1] += expit(lower)
        slope = slope[:, ::-1].cumsum(1)[:, ::-1]  # an increment moves all boundaries from its own
        slope[rows[both], y[both]] -= 1 / np.expm1(gap)
        return value / len(y), slope.mean(0), self.x.T @ slope / len(y)

    def conic(self) -> list[float]:
        import cvxpy

        q, p = self.boundaries, self.x.shape[1]
        alpha, psi = cvxpy.Variable(q), cvxpy.Variable((p, q))
        eta = [self.x @ cvxpy.sum(psi[:, : k + 1], axis=1) + alpha[k] for k in range(q)]
        losses: list[Any] = []
        for k in range(q + 1):
            rows = np.flatnonzero(self.y == k)
            if k < q:
                losses.append(cvxpy.sum(cvxpy.logistic(-eta[k][rows])))
            if k > 0:
                losses.append(cvxpy.sum(cvxpy.logistic(eta[k - 1][rows])))
            if 0 < k < q:
                gap = eta[k][rows] - eta[k - 1][rows]
                losses.append(-cvxpy.sum(cvxpy.log(1 - cvxpy.exp(-gap))))
        penalty = float(self.lambdas[0]) * cvxpy.sum(cvxpy.abs(psi))
        problem = cvxpy.Problem(cvxpy.Minimize(sum(losses) / len(self.y) + penalty))
        return [float(problem.solve(solver="CLARABEL"))]

    def errors(self) -> dict[str, float]:
        """Largest distance of the objective from that of ours, solved once more to rounding."""
        best = np.array(self.ours(1e-13))
        found = {name: np.array(run()) for name, run in self.runs().items()}
        gaps = {name: float(np.abs(value - best).max()) for name, value in found.items()}
        for name, gap in gaps.items():
            if gap > (1e-6 if name == CONIC else GAP):
                raise AssertionError(f"{name} is {gap:.1e} from the optimum")
        return gaps
