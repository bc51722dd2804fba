"""Heads over a large vocabulary, without their ``[N, V]`` logits.

``logits = (hidden W^T + bias) / temperature`` are made block by block, used, and overwritten.
"""

from steelyard.fused._shift import TokenShift
from steelyard.fused.linear_divergence import linear_divergence
from steelyard.fused.linear_logprob import LinearLogprobs, linear_logprobs
from steelyard.fused.linear_token_shift import linear_token_shift

__all__ = [
    "LinearLogprobs",
    "TokenShift",
    "linear_divergence",
    "linear_logprobs",
    "linear_token_shift",
]
