"""A user's own file of preferences: what is read, and what is refused by its line."""

import copy
import json

import pytest

pytest.importorskip("transformers")

from steelyard.lab.preference_files import encode_pairs, read_pairs
from steelyard.lab.tiny_lm import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(["a", "b", "c"])


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("not json", "line 3 of .* is not JSON"),
        ('{"prompt": "a", "chosen": "b"}', "line 3 of .* lacks the field 'rejected'"),
        ('{"prompt": "a", "chosen": " ", "rejected": "b"}', "line 3 .*'chosen' .*empty completion"),
        ('{"prompt": "", "chosen": "c", "rejected": "b"}', "line 3 .*'prompt' .*empty prompt"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "line 3 .* must differ"),
        ('{"prompt": "a", "chosen": 4, "rejected": "b"}', "line 3 .* text or a list of messages"),
    ],
)
def test_a_line_that_cannot_be_learned_from_is_named(tmp_path, line, match):
    path = tmp_path / "pairs.jsonl"
    good = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"})
    path.write_text(f"{good}\n\n{line}\n")
    with pytest.raises(ValueError, match=match):
        read_pairs(path)


def test_messages_are_read_by_their_last_one(tmp_path, tokenizer):
    path = tmp_path / "pairs.jsonl"
    chat = {"prompt": [{"role": "user", "content": "a b"}]}
    chat |= {
        name: [{"role": "assistant", "content": text}]
        for name, text in (("chosen", "c"), ("rejected", "b b"))
    }
    path.write_text(json.dumps(chat))
    with pytest.raises(ValueError, match="no chat template"):
        encode_pairs(tokenizer, read_pairs(path))
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = "{% for m in messages %}{{ m.content }} c {% endfor %}"
    pairs = encode_pairs(chatting, read_pairs(path))
    assert pairs.prompt_ids.tolist() == [[3, 4, 5]]
    assert pairs.chosen.tolist() == [[5, 2, 0]]
    assert pairs.rejected.tolist() == [[4, 4, 2]]


def test_long_texts_are_cut_and_what_is_left_must_differ(tokenizer):
    record = {"prompt": "a b c a", "chosen": "a b", "rejected": "a c"}
    pairs = encode_pairs(tokenizer, [record], max_tokens=2)
    assert pairs.prompt_ids.tolist() == [[5, 3]]
    assert pairs.chosen.tolist() == [[3, 4]]
    with pytest.raises(ValueError, match=r"pair 0: .* must differ"):
        encode_pairs(tokenizer, [record], max_tokens=1)
