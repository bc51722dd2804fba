"""All sequences of a few tokens."""

import pytest
import torch

from steelyard.lab.enumeration import AllSequences


def test_sequences_and_their_positions_add_up():
    space = AllSequences(3, 4)
    generator = torch.Generator().manual_seed(0)
    policy, reference = (
        torch.randn(space.num_prefixes, 3, dtype=torch.float64, generator=generator)
        for _ in range(2)
    )
    one, two = (space.logprobs(table).sum(-1) for table in (policy, reference))
    torch.testing.assert_close(one.exp().sum().item(), 1.0)
    whole = (one.exp() * (one - two)).sum()
    torch.testing.assert_close(space.kl_by_position(policy, reference).sum(), whole)
    rows = torch.tensor([5, 80])
    assert space.logprobs(policy, rows).equal(space.logprobs(policy)[rows])
    assert len({tuple(row) for row in space.prefixes[:, -1:].tolist()}) == 27


def test_too_many_sequences_and_wrong_tables_are_refused():
    with pytest.raises(ValueError, match="at most 1048576 sequences, got 2097152"):
        AllSequences(2, 21)
    with pytest.raises(ValueError, match="table"):
        AllSequences(2, 3).logprobs(torch.zeros(6, 2))
