import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from steelyard.divergences import JENSEN_SHANNON, KL
from steelyard.fused import linear_divergence, linear_logprobs, linear_token_shift


class Largest(TorchDispatchMode):
    """Remembers the largest number of entries of any tensor made while it is active."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.entries = max(self.entries, *sizes, 0)
        return result


def test_no_tensor_ever_has_a_row_of_logits_for_every_token(tensor):
    hidden, weight, other = tensor(40, 2), tensor(30, 2), tensor(40, 2, seed=1)
    targets = torch.arange(40) % 30
    with Largest() as largest:
        logprobs, entropy = linear_logprobs(hidden, weight, targets, chunk_size=4)
        (logprobs + entropy).sum().backward()
        for divergence in (KL, JENSEN_SHANNON):
            for reduction in ("none", "mean"):
                linear_divergence(
                    hidden, weight, other, weight, divergence, chunk_size=4, reduction=reduction
                ).sum().backward()
        linear_token_shift(hidden, weight, other, weight, top_k=2, chunk_size=4)
    assert largest.entries <= 4 * (30 + 16)


def test_the_plain_formula_would_be_caught(tensor):
    with Largest() as largest:
        (tensor(40, 2) @ tensor(30, 2).T).log_softmax(-1)
    assert largest.entries == 40 * 30
