"""Adapters, open questions and merged models, on a model of a few words."""

import copy

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from steelyard.lab.pretrained import load_language_model
from steelyard.lab.real_models import (
    QUESTIONS,
    answer_pairs,
    mean_score,
    question_prompts,
    save_model,
    with_adapters,
)
from steelyard.lab.tiny_lm import tiny_lm, tiny_tokenizer

WORDS = sorted({word for question in QUESTIONS for word in question.split()})


@pytest.fixture(scope="module")
def tokenizer():
    found = tiny_tokenizer(WORDS)
    found.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return found


@pytest.fixture
def model(tokenizer):
    return tiny_lm(tokenizer, hidden_size=16, num_heads=2)


def logits(model, tokenizer):
    ids = torch.tensor([tokenizer(QUESTIONS[0])["input_ids"]])
    with torch.no_grad():
        return model(input_ids=ids).logits


def words_of(text):
    return float(len(text.split()))


def test_questions_end_where_the_answer_begins(tokenizer):
    assert question_prompts(tokenizer) == list(QUESTIONS)


def test_the_longer_answer_is_chosen_if_length_is_the_score(model, tokenizer):
    generator = torch.Generator().manual_seed(0)
    pairs = answer_pairs(
        model, tokenizer, words_of, count=40, max_new_tokens=30, generator=generator
    )
    chosen, rejected = pairs.lengths
    assert 0 < len(pairs) <= 40
    assert bool((chosen >= rejected).all())  # of equal length if one ended
    mean = mean_score(model, tokenizer, words_of, max_new_tokens=30, generator=generator)
    assert 1 < mean <= 30


def test_adapters_start_at_nothing_train_alone_and_leave_the_generator_as_it_was(model, tokenizer):
    before = logits(model, tokenizer)
    state = torch.get_rng_state()
    adapted = with_adapters(copy.deepcopy(model), rank=2, seed=3)
    assert torch.get_rng_state().equal(state)
    torch.testing.assert_close(logits(adapted, tokenizer), before)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


def test_what_is_saved_is_the_model_with_its_adapters_merged(model, tokenizer, tmp_path):
    adapted = with_adapters(model, rank=2, seed=3)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                value.normal_(generator=torch.Generator().manual_seed(0))
    changed = logits(adapted, tokenizer)
    save_model(adapted, tokenizer, tmp_path / "model")
    torch.testing.assert_close(logits(adapted, tokenizer), changed)  # not merged in place
    loaded, _ = load_language_model(tmp_path / "model")
    torch.testing.assert_close(logits(loaded, tokenizer), changed, atol=1e-5, rtol=1e-4)
