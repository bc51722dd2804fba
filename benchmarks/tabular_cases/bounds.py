"""Extremes of a mean over an f-ball around many laws of finite support."""

from typing import Any

import numpy as np
import torch

from paired import OURS, Contest, Run, agreeing

PROPENSITY = 0.4
# with its own tolerances CLARABEL misses some of 500 bounds by more than 1e-6; these cost nothing
ACCURATE = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-10)


def contest(problems: int, support: int, divergence: Any) -> Contest:
    """The convex solver gets one problem with parameters, compiled once, and solves each law."""
    runs, small = (runs_of(number, support, divergence) for number in (problems, 1))

    def errors() -> dict[str, float]:
        return agreeing({name: run() for name, run in runs.items()}, OURS, 1e-6)

    return Contest(runs, errors, small)


def runs_of(problems: int, support: int, divergence: Any) -> dict[str, Run]:
    import cvxpy

    from steelyard.causal import divergence_radius, finite_support_bounds

    generator = torch.Generator().manual_seed(0)
    y = torch.randn(problems, support, generator=generator, dtype=torch.float64)
    p = torch.rand(problems, support, generator=generator, dtype=torch.float64) + 0.01
    p /= p.sum(1, keepdim=True)
    s = cvxpy.Variable(support, nonneg=True)
    law, payoff = cvxpy.Parameter(support, nonneg=True), cvxpy.Parameter(support)
    cost = {
        "kl": lambda: -cvxpy.log(s),
        "hellinger": lambda: (1 + s - 2 * cvxpy.sqrt(s)) / 2,
        "chi2": lambda: (cvxpy.inv_pos(s) - 2 + s) / 2,
    }[divergence]()
    radius = divergence_radius(PROPENSITY, divergence).item()
    ball = [law @ s == 1, law @ cost <= radius]
    problem = cvxpy.Problem(cvxpy.Maximize(payoff @ s), ball)

    def ours() -> torch.Tensor:
        return torch.stack(finite_support_bounds(y, p, PROPENSITY, divergence))

    def theirs() -> torch.Tensor:
        ends = np.empty((2, problems))
        for k in range(problems):
            law.value = p[k].numpy()
            for place, sign in enumerate((-1, 1)):
                payoff.value = sign * (p[k] * y[k]).numpy()
                ends[place, k] = sign * problem.solve(solver="CLARABEL", **ACCURATE)
        return torch.from_numpy(ends)

    return {OURS: ours, "cvxpy CLARABEL": theirs}
