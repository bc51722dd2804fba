"""Samples of a projection DPP and of the volume-rescaled law on a set of candidates."""

import math
from collections import Counter

import numpy as np
import torch
from torch import Tensor

from paired import OURS, Contest, Run

PEER = "DPPy"
MODES = ("GS", "GS_bis")  # the third one of DPPy, KuTa12, is slower by orders of magnitude
CHECKED = 3000


def contest(task: str, candidates: int, width: int) -> Contest:
    """``task`` is ``"dpp"`` or ``"volume"``, which draws ``2 * width`` points."""
    runs, small = runs_of(task, candidates, width), runs_of(task, 12, 3)
    return Contest(runs, lambda: errors(small, task), small)


def problem(candidates: int, width: int) -> tuple[Tensor, Tensor]:
    """Polynomials on points of [-1, 1] with unequal probabilities."""
    from steelyard.estimation import orthonormal_basis

    x = torch.linspace(-1, 1, candidates, dtype=torch.float64)
    measure = (1.5 + x) / (1.5 + x).sum()
    powers = torch.cos(torch.arange(width) * torch.acos(x)[:, None])
    return orthonormal_basis(powers, measure), measure


def runs_of(task: str, candidates: int, width: int) -> dict[str, Run]:
    from dppy.finite_dpps import FiniteDPP

    from steelyard.estimation import sample_projection_dpp, sample_volume

    basis, measure = problem(candidates, width)
    generator = torch.Generator().manual_seed(0)
    rng = np.random.RandomState(0)
    vectors = (measure.sqrt()[:, None] * basis).numpy()
    peer = FiniteDPP("correlation", projection=True, K_eig_dec=(np.ones(width), vectors))
    density = np.square(vectors).sum(1) / width
    size = 2 * width

    def theirs(mode: str) -> Run:
        def run() -> list[int]:
            repelling = peer.sample_exact(mode=mode, random_state=rng)
            peer.flush_samples()
            if task == "dpp":
                return list(repelling)
            independent = rng.choice(candidates, size - width, p=density)
            return rng.permutation(np.concatenate((repelling, independent))).tolist()

        return run

    def ours() -> list[int]:
        if task == "dpp":
            return sample_projection_dpp(basis, measure, generator=generator).indices.tolist()
        return sample_volume(basis, measure, size, generator=generator).indices.tolist()

    return {OURS: ours} | {f"{PEER} {mode}": theirs(mode) for mode in MODES}


def errors(runs: dict[str, Run], task: str) -> dict[str, float]:
    """Largest deviation of the mean counts on a small problem, in standard errors."""
    basis, measure = problem(12, 3)
    expected = measure * basis.square().sum(1) * (2 if task == "volume" else 1)
    found = {}
    for name, run in runs.items():
        counts = Counter(index for _ in range(CHECKED) for index in run())
        mean = torch.tensor([counts[index] for index in range(12)]).double() / CHECKED
        # A sum of a Bernoulli variable and independent draws has at most this variance.
        z = (mean - expected).abs() / (expected / CHECKED).sqrt()
        found[name] = float(z.max())
        if not (math.isfinite(found[name]) and found[name] < 5):
            raise AssertionError(f"{name} follows another law: {found[name]:.1f} standard errors")
    return found
