"""Hypervolume of a set of points."""

import numpy as np
import torch
from torch import Tensor

from paired import OURS, Contest, Run, agreeing

PEER, SWEEP = "pymoo", "steelyard without moocore"


def contest(points: int, objectives: int) -> Contest:
    """Random points near a front: some dominated, some not."""
    runs, small = runs_of(points, objectives), runs_of(20, objectives)

    def errors() -> dict[str, float]:
        values = {name: torch.as_tensor(run(), dtype=torch.float64) for name, run in runs.items()}
        return agreeing(values, PEER, 1e-9)

    return Contest(runs, errors, small)


def runs_of(points: int, objectives: int) -> dict[str, Run]:
    from pymoo.indicators.hv import HV

    from steelyard.diffusion import hypervolume, pareto

    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(points, objectives, generator=generator, dtype=torch.float64)
    rows = rows / rows.norm(dim=1, keepdim=True)
    rows = rows * (1 + 0.1 * torch.rand(points, 1, generator=generator, dtype=torch.float64))
    rows = 1.2 - rows
    reference = torch.full((objectives,), 1.2, dtype=torch.float64)
    indicator = HV(ref_point=reference.numpy())
    array: np.ndarray = rows.numpy()
    return {
        OURS: lambda: hypervolume(rows, reference),
        PEER: lambda: indicator(array),
        SWEEP: lambda: own_sweep(rows, reference, pareto),
    }


def own_sweep(rows: Tensor, reference: Tensor, pareto: object) -> float:
    return float(pareto._volume_of_any_dimension(rows.numpy(), reference.numpy()))  # type: ignore[attr-defined]
