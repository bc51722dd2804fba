"""Words as tokens, lexicons as rewards, and measures of diversity."""

import math

import pytest
import torch

pytest.importorskip("transformers")

from steelyard.lab.words import (
    LexiconReward,
    distinct,
    lexicon_score,
    self_bleu,
    word_model,
    word_text,
)


def test_windows_hold_frequent_words_only():
    text = word_text(["a b rare a b a b", "b a b a"], words=2, window=3, stride=1)
    assert text.words == ("a", "b")
    assert text.windows.tolist() == [[3, 4, 3], [4, 3, 4], [4, 3, 4], [3, 4, 3]]
    with pytest.raises(ValueError, match="is not among"):
        text.id_of("rare")


def test_copies_are_not_diverse():
    every = torch.ones(3, 4, dtype=torch.bool)
    copies = torch.arange(1, 5).expand(3, 4)
    assert self_bleu(copies, every) == pytest.approx(1.0)
    assert distinct(copies, every) == pytest.approx(1 / 3)
    twice = torch.tensor([[1, 1, 2, 3], [1, 4, 5, 6], [7, 8, 9, 10]])
    # "1" occurs twice in the first row and once in the second: one of the two is found.
    assert self_bleu(twice, every, most=1) == pytest.approx((1 / 4 + 1 / 4 + 0) / 3)


def test_a_lexicon_counts_words_whatever_their_case():
    assert lexicon_score("Good, GOOD; goodness", {"good": 2.0}) == pytest.approx(4 / math.sqrt(31))


def test_a_reward_looks_at_the_tokens_inside_the_mask_and_scores_as_text_is_scored():
    text = word_text(["good day bad day"], words=3, window=4)
    lexicon = {"good": 2.0, "bad": -3.0}
    reward = LexiconReward(text, lexicon)
    tokens = text.windows.repeat(2, 1)
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    expected = [lexicon_score("good day bad day", lexicon), lexicon_score("good day", lexicon)]
    assert reward(tokens, mask).tolist() == pytest.approx(expected)


def test_a_word_model_learns_its_windows_and_depends_on_its_seed_only():
    text = word_text(["a b c d e f g h"], words=8, window=8)
    one, two = (word_model(text, seed=0, steps=120, hidden_size=16) for _ in range(2))
    shown = torch.cat([torch.tensor([[text.tokenizer.bos_token_id]]), text.windows], dim=1)
    loss = one(input_ids=shown, labels=shown).loss.item()
    assert loss < 0.5 < math.log(8)
    assert loss == two(input_ids=shown, labels=shown).loss.item()
