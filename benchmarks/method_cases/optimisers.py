"""One step of AdamP or SGDP over 25 million parameters."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from paired import OURS, Contest, agreeing

TIMM, LOOP, FOREACH = "timm", "pytorch_optimizer", "pytorch_optimizer, foreach"
FUSED, FUSED_SGD = "torch AdamW fused (no projection)", "torch SGD fused (no projection)"
# So small that a tangent gradient stays tangent for the whole measurement.
STILL = 1e-7

Optimiser = torch.optim.Optimizer
Make = Callable[[Sequence[nn.Parameter]], Optimiser]


def contest(task: str, tensors: str) -> Contest:
    """One step of ``task``, ``"adamp"`` or ``"sgdp"``, over ``tensors``, see :func:`shapes`."""
    makers = adamp(STILL) if task == "adamp" else sgdp(STILL)
    grads = [gradient(weight, n) for n, weight in enumerate(weights(shapes(tensors)))]
    steps = {}
    for name, make in makers.items():
        params = weights(shapes(tensors))
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        steps[name] = make(params).step
        steps[name]()  # makes its state
    return Contest(steps, lambda: errors(adamp(1e-2) if task == "adamp" else sgdp(1e-2)))


def shapes(tensors: str) -> list[tuple[int, ...]]:
    """Return 25M parameters in ``"100 matrices"``, or in ``"240 mixed"`` tensors of many sizes."""
    if tensors == "small":
        return [(7, 30), (6,), (5, 4, 3, 3), (9, 16)]
    if tensors == "100 matrices":
        return [(500, 500)] * 100
    block = [(640, 592), (640,), (64, 32, 3, 3), (640,)]
    return block * 60


def weights(shapes: Sequence[tuple[int, ...]]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(0.05 * torch.randn(shape, generator=generator)) for shape in shapes]


def gradient(weight: Tensor, number: int) -> Tensor:
    """Return a random gradient; that of every other matrix is tangent, so that it is projected."""
    generator = torch.Generator().manual_seed(1 + number)
    grad = torch.randn(weight.shape, generator=generator)
    if weight.dim() > 1 and number % 4 in (0, 3):
        rows, slopes = weight.detach().flatten(1), grad.flatten(1)
        along = (rows * slopes).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True)
        grad = (slopes - along * rows).view_as(grad)
    return grad


def adamp(rate: float) -> dict[str, Make]:
    import pytorch_optimizer

    from steelyard.optim import AdamP

    settings: dict[str, Any] = {"lr": rate, "weight_decay": 1e-2}
    return {
        OURS: partial(AdamP, **settings),
        TIMM: partial(timm("adamp").AdamP, **settings),
        LOOP: partial(pytorch_optimizer.AdamP, **settings),
        FOREACH: partial(pytorch_optimizer.AdamP, foreach=True, **settings),
        FUSED: partial(torch.optim.AdamW, fused=True, **settings),
    }


def sgdp(rate: float) -> dict[str, Make]:
    import pytorch_optimizer

    from steelyard.optim import SGDP

    settings: dict[str, Any] = {"lr": rate, "momentum": 0.9, "weight_decay": 1e-2}
    return {
        OURS: partial(SGDP, **settings),
        TIMM: partial(timm("sgdp").SGDP, **settings),
        LOOP: partial(pytorch_optimizer.SGDP, **settings),
        FOREACH: partial(pytorch_optimizer.SGDP, foreach=True, **settings),
        FUSED: partial(torch.optim.AdamW, lr=rate, weight_decay=1e-2, fused=True),
        FUSED_SGD: partial(torch.optim.SGD, fused=True, **settings),
    }


def timm(name: str) -> ModuleType:
    """Import one file of ``timm.optim`` alone: the package as a whole needs torchvision."""
    if "timm_optim" not in sys.modules:
        found = importlib.util.find_spec("timm")
        if found is None or found.origin is None:
            raise ModuleNotFoundError("timm")
        folder = ModuleType("timm_optim")
        folder.__path__ = [str(Path(found.origin).parent / "optim")]
        sys.modules["timm_optim"] = folder
    return importlib.import_module(f"timm_optim.{name}")


def errors(makers: dict[str, Make]) -> dict[str, float]:
    """Compare how far five steps with a projected and an unprojected matrix carry the weights."""
    arrived = {}
    for name, make in makers.items():
        if name in (FUSED, FUSED_SGD):
            continue
        params = weights(shapes("small"))
        before = torch.cat([param.detach().flatten() for param in params])
        optimiser = make(params)
        for step in range(5):
            for number, param in enumerate(params):
                param.grad = gradient(param, number) * (1 + step)
            optimiser.step()
        arrived[name] = torch.cat([param.detach().flatten() for param in params]) - before
    return agreeing(arrived, TIMM, 1e-4)
