"""Hugging Face models: the cache changes no token, and heads need no logits."""

import pytest
import torch
from torch import nn

from steelyard.fused import TokenShift
from steelyard.tokens import (
    CachedNextToken,
    cross_sample,
    hidden_states_and_head,
    model_logprobs,
    model_token_shift,
    token_shift,
)
from steelyard.tokens._decoding import as_next_token

transformers = pytest.importorskip("transformers")
V = 23


def llama(seed, *, scale=0.3, vocab_size=V, dtype=torch.float64, **settings):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=scale,
        **settings,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def with_bias(seed):
    model = llama(seed)
    model.lm_head = nn.Linear(16, V, bias=True, dtype=torch.float64)
    return model.eval()


def gemma(seed):
    torch.manual_seed(seed)
    config = transformers.Gemma2Config(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        initializer_range=1.0,
        final_logit_softcapping=2.0,
        sliding_window=4,
    )
    return transformers.Gemma2ForCausalLM(config).double().eval()


def granite(seed):
    torch.manual_seed(seed)
    config = transformers.GraniteConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        logits_scaling=3.0,
    )
    return transformers.GraniteForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def base():
    return llama(0)


@pytest.fixture(scope="module")
def rl():
    return llama(1)


@pytest.fixture
def ids():
    return torch.randint(0, V, (3, 6), generator=torch.Generator().manual_seed(0))


def plain(model):
    """Run in full at every step."""
    return lambda ids: model(input_ids=ids, use_cache=False).logits[:, -1]


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("budget", [None, 2])
def test_the_cache_changes_no_token(base, rl, ids, budget):
    settings = {"js_threshold": 0.1, "budget": budget, "max_new_tokens": 10}
    cached = cross_sample(base, rl, ids, generator=generator(), **settings)
    full = cross_sample(plain(base), plain(rl), ids, generator=generator(), **settings)
    assert torch.equal(cached.tokens, full.tokens)
    assert torch.equal(cached.switched, full.switched)
    assert cached.switched.any()
    mixed = cross_sample(base, plain(rl), ids, generator=generator(), **settings)
    assert torch.equal(mixed.tokens, full.tokens)


def test_each_token_is_fed_once_and_a_shared_prompt_once_for_all_thresholds(base, rl, ids):
    host, other = CachedNextToken(base), CachedNextToken(rl)
    for number, threshold in enumerate((0.05, 0.1, 0.3)):
        sample = cross_sample(
            host, other, ids, js_threshold=threshold, max_new_tokens=7, generator=generator()
        )
        full = cross_sample(
            plain(base),
            plain(rl),
            ids,
            js_threshold=threshold,
            max_new_tokens=7,
            generator=generator(),
        )
        assert torch.equal(sample.tokens, full.tokens)
        # Prompt and all new tokens but the last; later runs go on from the prompt's last token
        # or further where their responses agree.
        if number == 0:
            assert host.fed_tokens == other.fed_tokens == 6 + 6
        assert host.fed_tokens <= 12 + number * 7


def test_a_cached_call_is_the_full_one_wherever_it_departs(base, ids):
    cached = CachedNextToken(base)
    changed = ids.clone()
    changed[1, 3] = (changed[1, 3] + 1) % V
    longer = torch.cat((changed, ids[:, :2]), 1)
    for call, fed in ((ids, 6), (longer, 6 + 5), (longer, 12), (ids[:, :4], 12 + 1), (ids[:1], 19)):
        torch.testing.assert_close(cached(call), plain(base)(call), rtol=0, atol=1e-12)
        assert cached.fed_tokens == fed
        assert cached.cached_tokens == call.shape[1]


def test_a_cache_that_cannot_go_back_is_rebuilt(ids):
    model = gemma(0)  # its window of 4 tokens forgets
    cached = CachedNextToken(model)
    for call in (ids, ids[:, :5], ids.flip(1), torch.cat((ids.flip(1), ids), 1)):
        torch.testing.assert_close(cached(call), plain(model)(call), rtol=0, atol=1e-12)


def test_a_failing_call_leaves_no_cache_behind(base, ids):
    cached = CachedNextToken(base)
    cached(ids)
    with pytest.raises(IndexError):
        cached(torch.cat((ids, torch.full((3, 1), V + 1)), 1))
    assert cached.cached_tokens == 0
    torch.testing.assert_close(cached(ids), plain(base)(ids))


def test_callables_and_modules_with_a_config_of_their_own_stay_plain():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = {"vocabulary": V}

        def forward(self, ids):
            return torch.zeros(len(ids), V)

    model = Own()
    assert as_next_token("host_model", model) is model
    sample = cross_sample(
        model, model, torch.zeros(2, 1).long(), js_threshold=0.1, max_new_tokens=2
    )
    assert sample.tokens.shape == (2, 2)


def test_a_model_without_a_cache_is_run_in_full(base, ids):
    class Stateless:
        config = base.config

        def __call__(self, input_ids, **kwargs):
            output = base(input_ids=input_ids, use_cache=False)
            return transformers.modeling_outputs.CausalLMOutput(logits=output.logits)

    cached = as_next_token("host_model", Stateless())
    assert isinstance(cached, CachedNextToken)
    for call in (ids, torch.cat((ids, ids), 1)):
        torch.testing.assert_close(cached(call), plain(base)(call))
    assert cached.fed_tokens == 6 + 12


@pytest.mark.parametrize("make", [llama, with_bias])
def test_hidden_states_and_head_make_the_logits(make, ids):
    model = make(3)
    run = hidden_states_and_head(model, ids)
    assert run.logits is None
    assert run.vocabulary == V
    logits = run.hidden @ run.weight.T + (0 if run.bias is None else run.bias)
    torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=1e-12)


def test_no_full_logits_are_made_for_a_linear_head(base, ids):
    rows = []
    handle = base.lm_head.register_forward_hook(lambda m, i, output: rows.append(output.shape[1]))
    hidden_states_and_head(base, ids)
    handle.remove()
    assert rows == [1]
    assert not base.model._forward_hooks


@pytest.mark.parametrize("make", [gemma, granite])
def test_capped_and_scaled_heads_fall_back_to_logits(make, ids):
    model = make(0)
    run = hidden_states_and_head(model, ids)
    assert run.hidden is None
    assert run.vocabulary == V
    assert torch.equal(run.logits, model(ids).logits)


def test_an_adapter_on_the_head_falls_back_and_one_below_does_not(ids):
    peft = pytest.importorskip("peft")
    for target, linear in (("lm_head", False), ("q_proj", True)):
        config = peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
        model = peft.get_peft_model(llama(0), config).double().eval()
        run = hidden_states_and_head(model, ids)
        assert (run.logits is None) == linear
        mine = model_logprobs(model, ids).logprobs
        logprobs = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        expected = logprobs.gather(-1, ids[:, 1:, None])[..., 0]
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("make", [llama, with_bias, gemma, granite])
@pytest.mark.parametrize("top_p", [None, 0.7])
def test_token_shift_of_models_is_that_of_their_logits(rl, ids, make, top_p):
    model = make(0)
    mine = model_token_shift(model, rl, ids, top_p=top_p, top_k=4, chunk_size=4)
    full = token_shift(model(ids).logits[:, :-1], rl(ids).logits[:, :-1], top_p=top_p, top_k=4)
    assert mine.js.shape == (3, 5)
    assert mine.overlap.shape == (3, 5, 4)
    for name, one, other in zip(TokenShift._fields, mine, full, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("make", [llama, with_bias, gemma])
def test_logprobs_and_their_gradient_are_those_of_the_logits(make, ids):
    model = make(0)
    mine = model_logprobs(model, ids, temperature=0.7, chunk_size=4)
    logprobs = (model(ids).logits[:, :-1] / 0.7).log_softmax(-1)
    expected = logprobs.gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(mine.logprobs, expected, rtol=0, atol=1e-10)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    torch.testing.assert_close(mine.entropy, entropy, rtol=0, atol=1e-10)
    weight = model.lm_head.weight
    slopes = [torch.autograd.grad(x.sum(), weight)[0] for x in (mine.logprobs, expected)]
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-9)


def test_padding_on_the_right_does_not_change_the_tokens_before(base, rl, ids):
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    padded = model_token_shift(base, rl, ids, attention_mask=mask)
    alone = model_token_shift(base, rl, ids[:1, :4])
    torch.testing.assert_close(padded.js[0, :3], alone.js[0], rtol=0, atol=1e-12)


def test_half_precision_models_agree_with_their_float32_copies(ids):
    low = [llama(seed, dtype=torch.bfloat16) for seed in (0, 1)]
    mine = model_token_shift(*low, ids)
    assert hidden_states_and_head(low[0], ids).logits is None
    assert mine.js.dtype == torch.bfloat16
    full = token_shift(*(model(ids).logits[:, :-1] for model in low))
    torch.testing.assert_close(mine.js, full.js, rtol=0.05, atol=0.01)


def test_heads_padded_to_different_sizes_are_cut_to_the_common_vocabulary(base, ids):
    wide = llama(1, vocab_size=V + 5)
    with pytest.raises(ValueError, match="equally many tokens, got 23 and 28"):
        model_token_shift(base, wide, ids)
    mine = model_token_shift(base, wide, ids, vocabulary=V)
    full = token_shift(base(ids).logits[:, :-1], wide(ids).logits[:, :-1, :V])
    torch.testing.assert_close(mine.js, full.js, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="vocabulary must be <= 23, got 24"):
        model_token_shift(base, wide, ids, vocabulary=V + 1)


def test_errors_name_the_argument(base, ids):
    with pytest.raises(TypeError, match="input_ids must have a wide integer"):
        hidden_states_and_head(base, ids.double())
    with pytest.raises(ValueError, match="at least one token a row"):
        hidden_states_and_head(base, ids[:, :0])
    with pytest.raises(ValueError, match="attention_mask must have shape"):
        hidden_states_and_head(base, ids, attention_mask=ids[:, :2])
    with pytest.raises(ValueError, match="at least two tokens a row"):
        model_logprobs(base, ids[:, :1])
    with pytest.raises(ValueError, match="temperature"):
        model_logprobs(base, ids, temperature=0.0)
    with pytest.raises(ValueError, match="top_p"):
        model_token_shift(base, base, ids, top_p=2.0)
    with pytest.raises(TypeError, match="chunk_size must be an integer"):
        model_token_shift(base, base, ids, chunk_size=2.0)
    with pytest.raises(TypeError, match=r"the model must return logits \[B, T, V\]"):
        hidden_states_and_head(lambda **kwargs: 3, ids)
