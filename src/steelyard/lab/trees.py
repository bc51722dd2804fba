"""Language models small enough to enumerate: a law of the next token for every prefix."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

__all__ = ["Prefix", "Tree", "leaves", "random_tree", "tree_model"]

Prefix = tuple[int, ...]
Tree = Mapping[Prefix, Tensor]
"""Probabilities of the next token ``[V]`` by prefix; a prefix that is not in it is complete."""


def random_tree(depth: int, width: int, generator: torch.Generator) -> dict[Prefix, Tensor]:
    """Draw a tree whose responses have ``depth`` tokens out of ``width``, in float64.

    Example:
        >>> tree = random_tree(2, 3, torch.Generator().manual_seed(0))
        >>> len(tree), len(leaves(tree))
        (4, 9)
    """
    prefixes: list[Prefix] = [()]
    for prefix in prefixes:  # it grows on the way
        if len(prefix) < depth - 1:
            prefixes.extend((*prefix, token) for token in range(width))
    logits = torch.randn(len(prefixes), width, generator=generator, dtype=torch.float64)
    return dict(zip(prefixes, logits.softmax(-1), strict=True))


def leaves(tree: Tree) -> list[Prefix]:
    """Return all complete responses."""
    children = ((*prefix, token) for prefix, law in tree.items() for token in range(len(law)))
    return [child for child in children if child not in tree]


def tree_model(tree: Tree) -> Callable[[Tensor], Tensor]:
    """Turn a tree into a model ``ids [B, T] -> logits [B, V]``; the first id is the prompt."""

    def logits(ids: Tensor) -> Tensor:
        return torch.stack([tree[tuple(row[1:])].log() for row in ids.tolist()])

    return logits
