"""All sequences of a few tokens, so that expectations under a policy are exact sums.

A policy is a table of logits with a row for each prefix: no sharing between contexts, no error of
sampling. Losses that take log-probabilities of sequences can be checked on it to all digits.
"""

import torch
from torch import Tensor

from steelyard._checks import check_count, check_shape

__all__ = ["AllSequences"]

_MOST = 2**20


class AllSequences:
    """Every sequence of ``length`` tokens out of ``vocabulary``, in lexicographic order.

    Args:
        vocabulary: ``V``, number of tokens.
        length: ``L``, tokens of a sequence; ``S = V ** L`` sequences, at most a million.

    Attributes:
        tokens: ``[S, L]``.
        prefixes: ``[S, L]``, row of the table that predicts each token.
        num_prefixes: ``P``, rows of a table; ``[P, V]`` is a policy.

    Raises:
        ValueError: a number below 1, or too many sequences.

    Example:
        A table of zeros is uniform, and the probabilities of all sequences sum to 1:

        >>> space = AllSequences(vocabulary=3, length=2)
        >>> space.tokens.shape, space.num_prefixes
        (torch.Size([9, 2]), 4)
        >>> round(space.logprobs(torch.zeros(4, 3)).sum(-1).exp().sum().item(), 6)
        1.0
    """

    def __init__(self, vocabulary: int, length: int) -> None:
        check_count("vocabulary", vocabulary)
        check_count("length", length)
        if vocabulary**length > _MOST:
            raise ValueError(f"there must be at most {_MOST} sequences, got {vocabulary**length}")
        every = torch.arange(vocabulary**length)
        powers = vocabulary ** torch.arange(length - 1, -1, -1)
        self.tokens = every[:, None] // powers % vocabulary
        # The prefixes of t tokens come after all shorter ones.
        values = every[:, None] // (powers * vocabulary)
        starts = torch.tensor([sum(vocabulary**n for n in range(t)) for t in range(length)])
        self.prefixes = starts + values
        self.num_prefixes = sum(vocabulary**t for t in range(length))
        self.vocabulary, self.length = vocabulary, length

    def logprobs(self, table: Tensor, rows: Tensor | None = None) -> Tensor:
        """Log-probability of each token under a table of logits.

        Args:
            table: ``[P, V]``.
            rows: numbers of sequences ``[N]``; ``None`` = all, in order.

        Returns:
            ``[N, L]``; sum over the last dimension for sequences.
        """
        check_shape("table", table, (self.num_prefixes, self.vocabulary))
        laws = table.log_softmax(-1)
        tokens, prefixes = self.tokens, self.prefixes
        if rows is not None:
            tokens, prefixes = tokens[rows], prefixes[rows]
        return laws[prefixes, tokens]

    def kl_by_position(self, table: Tensor, reference: Tensor) -> Tensor:
        """``KL(table || reference)`` of the sequences, split by position.

        Args:
            table: ``[P, V]``.
            reference: ``[P, V]``.

        Returns:
            ``[L]``, nats; the sum is the divergence of the two laws of sequences.
        """
        logprobs = self.logprobs(table)
        log_ratio = logprobs - self.logprobs(reference)
        return (logprobs.sum(-1, keepdim=True).exp() * log_ratio).sum(0)
