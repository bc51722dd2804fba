"""PONITA forward and backward on many small clouds."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paired import OURS, Contest, Run, agreeing

KERNEL = "plain torch, a kernel [O, O, C] for each edge"
FIBER = "plain torch, directions mixed edge by edge"

Convolve = Callable[[Tensor, Any], Tensor]


def contest(systems: int, particles: int, directions: int, hidden: int, layers: int) -> Contest:
    """Charged particles with their velocity, as in the N-body experiment."""
    sizes = particles, directions, hidden, layers
    runs, small = runs_of(systems, *sizes), runs_of(4, *sizes)

    def errors() -> dict[str, float]:
        return agreeing({name: run() for name, run in small.items()}, KERNEL, 1e-4)

    return Contest(runs, errors, small)


def runs_of(
    systems: int, particles: int, directions: int, hidden: int, layers: int
) -> dict[str, Run]:
    from steelyard.equivariant import Ponita

    torch.manual_seed(0)
    count = systems * particles
    pos, vel = torch.randn(count, 3), torch.randn(count, 1, 3)
    charge = torch.randint(2, (count, 1)).float() * 2 - 1
    cloud = torch.arange(count) // particles
    # With the layer scale off, or an error in the convolution would not show.
    model = Ponita(1, 1, hidden, layers, 0, 1, orientations=directions, layer_scale=None)
    models = {OURS: model, KERNEL: copy.deepcopy(model), FIBER: copy.deepcopy(model)}
    for name, convolve in ((KERNEL, with_whole_kernels), (FIBER, with_fibers_by_edge)):
        for block in models[name].blocks:
            block.convolution._convolve = convolve(block.convolution)

    def run(name: str) -> Run:
        model = models[name]

        def both_ways() -> Tensor:
            model.zero_grad()
            model(pos, charge, vel, batch=cloud).vector.square().mean().backward()
            return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

        return both_ways

    return {name: run(name) for name in models}


def with_whole_kernels(convolution: Any) -> Convolve:
    """For each edge a kernel between all directions, ``[E, O, O, C]``."""

    def convolve(x: Tensor, geometry: Any) -> Tensor:
        send, receive = geometry.edge_index
        near, among = convolution.spatial(geometry.spatial), convolution.fiber(geometry.fiber)
        kernel = near[:, :, None] * among  # edge, from, to, channel
        messages = (kernel * x[send][:, :, None]).sum(1) / x.shape[1]
        return torch.zeros_like(x).index_add(0, receive, messages)

    return convolve


def with_fibers_by_edge(convolution: Any) -> Convolve:
    """The same, but the directions of each message are mixed by a product of matrices."""

    def convolve(x: Tensor, geometry: Any) -> Tensor:
        send, receive = geometry.edge_index
        near, among = convolution.spatial(geometry.spatial), convolution.fiber(geometry.fiber)
        messages = torch.einsum("efc,ftc->etc", near * x[send], among) / x.shape[1]
        return torch.zeros_like(x).index_add(0, receive, messages)

    return convolve
