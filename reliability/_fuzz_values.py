"""Small valid arguments, the same at every call: what the campaign starts from and then spoils."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPE = torch.float64


def real(*shape: int, shift: float = 0.0) -> Tensor:
    """Numbers in (-1, 1), no two of them equal and in no order."""
    count = math.prod(shape)
    return torch.sin(torch.arange(count, dtype=DTYPE) * 12.9898 + 1.0 + shift).reshape(shape)


def positive(*shape: int, shift: float = 0.0) -> Tensor:
    """Numbers in (0.3, 1.7)."""
    return 1.0 + 0.7 * real(*shape, shift=shift)


def unit(*shape: int, shift: float = 0.0) -> Tensor:
    """Numbers in (0.1, 0.9)."""
    return 0.5 + 0.4 * real(*shape, shift=shift)


def probs(*shape: int, shift: float = 0.0) -> Tensor:
    """Probabilities over the last axis."""
    return real(*shape, shift=shift).softmax(-1)


def logprobs(*shape: int, shift: float = 0.0) -> Tensor:
    """Log-probabilities over the last axis."""
    return real(*shape, shift=shift).log_softmax(-1)


def negative(*shape: int, shift: float = 0.0) -> Tensor:
    """Numbers in (-1.7, -0.3): log-probabilities of single events."""
    return -positive(*shape, shift=shift)


def ones(*shape: int) -> Tensor:
    """A mask that keeps everything, so that no NaN may hide behind it."""
    return torch.ones(shape, dtype=torch.bool)


def classes(*shape: int, of: int = 2) -> Tensor:
    """Integer labels 0, 1, .. of - 1 in turn."""
    return torch.arange(math.prod(shape)).reshape(shape) % of


def integers(*values: int) -> Tensor:
    """An integer vector."""
    return torch.tensor(values)


def covariance(size: int, shift: float = 0.0) -> Tensor:
    """A positive definite matrix."""
    factor = real(size, size, shift=shift)
    return factor @ factor.T + torch.eye(size, dtype=DTYPE)


def generator() -> torch.Generator:
    """A seeded generator."""
    return torch.Generator().manual_seed(0)


def array(*shape: int, shift: float = 0.0) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The numbers of ``real`` as an array."""
    values: np.ndarray[Any, np.dtype[np.float64]] = real(*shape, shift=shift).numpy()
    return values


def linear(inputs: int, outputs: int) -> torch.nn.Linear:
    """A linear layer with fixed weights."""
    layer = torch.nn.Linear(inputs, outputs, dtype=DTYPE)
    with torch.no_grad():
        layer.weight.copy_(real(outputs, inputs))
        layer.bias.copy_(real(outputs))
    return layer
