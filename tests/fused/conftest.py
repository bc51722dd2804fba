import pytest
import torch

N, V, D = 7, 13, 5


def make(*shape, dtype=torch.float64, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    values = torch.randn(*shape, dtype=torch.float64, generator=generator) * scale
    return values.to(dtype).requires_grad_()


@pytest.fixture
def tensor():
    return make


def unblocked(hidden, weight, bias, temperature):
    logits = hidden @ weight.T
    return ((logits if bias is None else logits + bias) / temperature).log_softmax(-1)


@pytest.fixture
def logprobs_of():
    """The plain formula that holds all logits."""
    return unblocked


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks far smaller than the data, so that every loop runs more than once."""
    from steelyard.fused import _blocks

    monkeypatch.setattr(_blocks, "_CPU_ROWS", 3)
    monkeypatch.setattr(_blocks, "_CPU_BLOCK_BYTES", 120)
    monkeypatch.setattr(_blocks, "_CPU_ROWS_BYTES", 1)
    monkeypatch.setattr(_blocks, "_FEWEST_ROWS", 3)
    monkeypatch.setattr(_blocks, "_CPU_CACHE_BYTES", 300)
    monkeypatch.setattr(_blocks, "_CPU_COLUMNS", 4)
