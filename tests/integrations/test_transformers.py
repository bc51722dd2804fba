"""Info-Gain decoding around models of Hugging Face Transformers."""

from types import SimpleNamespace

import pytest
import torch

from steelyard.diffusion.masked_decoding import decode_masked
from steelyard.integrations.transformers import InfoGainSampler

MASK, VOCAB = 5, 40


@pytest.fixture(scope="module")
def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(config)


def test_generation_is_decode_masked_on_the_prompt_and_masks(bert):
    prompt = torch.tensor([7, 8, 9])
    sampler = InfoGainSampler(bert, MASK)
    got = sampler.generate(prompt, 6, block_size=4, generator=torch.Generator().manual_seed(0))
    start = torch.cat([prompt, torch.full((6,), MASK)])
    bert.eval()
    expected = decode_masked(
        lambda ids: bert(input_ids=ids).logits,
        start,
        mask_id=MASK,
        block_size=4,
        generator=torch.Generator().manual_seed(0),
    )
    bert.train()
    assert torch.equal(got.tokens, expected.tokens)
    assert torch.equal(got.order, expected.order)
    assert torch.equal(got.tokens[:3], prompt)
    assert not (got.tokens == MASK).any()
    assert sorted(got.order[:4].tolist()) == [3, 4, 5, 6]


def test_dropout_is_off_while_sampling_and_every_module_is_set_back(bert):
    bert.train()
    bert.bert.embeddings.eval()
    before = [module.training for module in bert.modules()]
    sampler = InfoGainSampler(bert, MASK, position_temperature=0.0)
    runs = [sampler.generate(torch.tensor([7]), 5) for _ in range(2)]
    assert torch.equal(runs[0].tokens, runs[1].tokens)
    assert runs[0].cumulative_entropy == runs[1].cumulative_entropy
    assert [module.training for module in bert.modules()] == before
    assert True in before
    assert False in before
    bert.train()


def test_modules_are_set_back_after_an_error(bert):
    bert.train()
    with pytest.raises(ValueError, match="steps"):
        InfoGainSampler(bert, MASK).generate(torch.tensor([7]), 5, steps=0)
    assert all(module.training for module in bert.modules())


def test_a_batch_is_its_rows(bert):
    sampler = InfoGainSampler(bert, MASK, sampler="entropy")
    prompts = torch.tensor([[7, 8], [9, 10], [11, 11]])
    got = sampler.generate(prompts, 4)
    assert got.tokens.shape == (3, 6)
    assert got.order.shape == (3, 4)
    assert got.cumulative_entropy.shape == (3,)
    for row, prompt in enumerate(prompts):
        alone = sampler.generate(prompt, 4)
        assert torch.equal(got.tokens[row], alone.tokens)
        assert torch.equal(got.order[row], alone.order)


def test_filling_keeps_what_is_not_masked(bert):
    ids = torch.tensor([7, MASK, 9, MASK, 11])
    got = InfoGainSampler(bert, MASK, num_candidates=None, bypass=None).fill(ids)
    assert torch.equal(got.tokens[[0, 2, 4]], ids[[0, 2, 4]])
    assert sorted(got.order.tolist()) == [1, 3]


def test_the_mask_id_comes_from_the_tokenizer_or_the_configuration(bert):
    tokenizer = SimpleNamespace(mask_token_id=3)
    assert InfoGainSampler(bert, tokenizer=tokenizer).mask_id == 3
    assert InfoGainSampler(bert, 0, tokenizer=tokenizer).mask_id == 0
    with_config = torch.nn.Linear(1, 1)
    with_config.config = SimpleNamespace(mask_token_id=9)
    assert InfoGainSampler(with_config).mask_id == 9
    with pytest.raises(ValueError, match=r"^mask_id"):
        InfoGainSampler(torch.nn.Linear(1, 1))


class Fixed(torch.nn.Module):
    """Logits that depend on the position only."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.logits.expand(len(input_ids), -1, -1))


def test_penalties_and_shifted_logits_change_what_is_chosen():
    logits = torch.zeros(4, 4)
    logits[torch.arange(4), torch.tensor([0, 1, 2, 2])] = 3.0
    logits[:, 3] = 2.0
    plain = InfoGainSampler(Fixed(logits), 9).generate(torch.tensor([0]), 3)
    assert plain.tokens.tolist() == [0, 1, 2, 2]
    shifted = InfoGainSampler(Fixed(logits), 9, shift_logits=True).generate(torch.tensor([0]), 3)
    assert shifted.tokens.tolist() == [0, 0, 1, 2]
    penalised = InfoGainSampler(Fixed(logits), 9, penalties={2: 4.0}).generate(torch.tensor([0]), 3)
    assert penalised.tokens.tolist() == [0, 1, 3, 3]


def test_an_empty_prompt_is_generated_from_nothing():
    got = InfoGainSampler(Fixed(torch.eye(3)), 9).generate(torch.zeros(0, dtype=torch.long), 3)
    assert got.tokens.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda s: s.generate([1, 2], 3), TypeError, "prompt_ids"),
        (lambda s: s.generate(torch.ones(2), 3), TypeError, "prompt_ids"),
        (lambda s: s.generate(torch.ones(1, 1, 1).long(), 3), ValueError, "prompt_ids"),
        (lambda s: s.generate(torch.tensor([1]), 0), ValueError, "max_new_tokens"),
        (lambda s: s.fill(torch.tensor([[1, 9], [1, 1]])), ValueError, "ids"),
    ],
)
def test_wrong_arguments_are_named(call, error, named):
    with pytest.raises(error, match=f"^{named}"):
        call(InfoGainSampler(Fixed(torch.eye(3)), 9))
