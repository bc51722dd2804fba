"""Arguments of the wrong kind are refused by name."""

import pytest
import torch

from steelyard import tokens


@pytest.mark.parametrize("words", [None, 3, "text", [1]])
def test_a_heat_map_refuses_what_is_no_sequence_of_strings(words):
    with pytest.raises(TypeError, match="tokens must be a sequence of strings"):
        tokens.heat_map_html(words, torch.tensor([0.4]))
