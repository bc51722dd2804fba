"""The TRL adapter: with our GRPO it is TRL's trainer to the last digits, and the rest is intact.

Run as a script (by the test of two processes), this file trains and writes what it logged.
"""

import functools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

import peft
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from steelyard.integrations.trl import GRPOTrainer, objectives
from steelyard.integrations.trl._fused_head import has_plain_head
from steelyard.integrations.trl._rewards import check_prompt_column
from steelyard.policy import (
    canon_mu_schedule,
    gbpo_loss,
    group_relative_advantages,
    grpo_loss,
    mean_token_entropy,
)
from two_processes import assert_same, run_in_two, write

WORDS = ["<pad>", "<eos>", *map(str, range(26)), "=", "<unk>"]
PROMPTS = ["1 2 =", "3 =", "7 8 9 =", "4 4 ="]
GROUP = 4
LONGEST = 6


def save_tiny_model(folder):
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    save_tiny_model(path)
    return path


SMALL = set(WORDS[2:12])


def many_small_numbers(completions, **_):
    """Reward with ties, so that there are groups in which all are equal."""
    return [float(sum(word in SMALL for word in text.split()) > 1) for text in completions]


def make(folder, kind=GRPOTrainer, *, reward=many_small_numbers, data=None, peft=None, **settings):
    ours = {
        name: settings.pop(name)
        for name in ("policy_loss", "advantages", "batch_weight", "fused_head", "rollout_func")
        if name in settings
    }
    args = trl.GRPOConfig(
        output_dir=str(folder / "out"),
        **{
            "per_device_train_batch_size": 8,
            "num_generations": GROUP,
            "max_completion_length": LONGEST,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "bf16": False,
            "use_cpu": True,
            "seed": 3,
            **settings,
        },
    )
    data = Dataset.from_dict({"prompt": PROMPTS}) if data is None else data
    trainer = kind(str(folder), reward, args, data, peft_config=peft, **ours)
    trainer.current_gradient_accumulation_steps = 1  # set by `train`, needed without it
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def batch_of(trainer, prompts=PROMPTS[:2], *, seed=0):
    """One batch of completions, as `train` makes it; equal seeds, equal completions."""
    torch.manual_seed(seed)
    trainer.model.train()
    return trainer._generate_and_score_completions(
        [{"prompt": prompt} for prompt in prompts for _ in range(GROUP)]
    )


def move(trainer, *, scale=0.05, seed=1):
    """Change the weights, so that ratios are away from 1 and some are clipped."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def loss_and_gradient(trainer, batch):
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return loss.detach(), torch.cat([g.flatten() for g in gradients])


def close(ours, theirs, tolerance=1e-6):
    """Equal to `tolerance` of the largest entry, which is what float32 sums can promise."""
    scale = max(1.0, float(torch.as_tensor(theirs).abs().max()))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale)


def sum_over_longest(log_ratio, advantages, mask, max_completion_length, epsilon_high=None):
    total = grpo_loss(
        log_ratio, advantages, mask=mask, epsilon_high=epsilon_high, aggregate="sequence_sum"
    )
    return total / max_completion_length


as_trl = functools.partial(group_relative_advantages, eps=1e-4)
"""TRL adds 1e-4 to the deviation."""

LOSSES = {
    "grpo": (functools.partial(grpo_loss, aggregate="sequence"), "equal"),
    "bnpo": (functools.partial(grpo_loss, aggregate="token"), "equal"),
    "dapo": (functools.partial(grpo_loss, aggregate="token"), "tokens"),
    "dr_grpo": (sum_over_longest, "equal"),
    "luspo": (functools.partial(grpo_loss, aggregate="sequence_sum"), "equal"),
}


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta": 0.1, "scale_rewards": "batch", "epsilon_high": 0.3},
        {"importance_sampling_level": "sequence", "beta": 0.1, "use_bias_correction_kl": True},
        {"top_entropy_quantile": 0.5, "entropy_coef": 0.01},
        {"off_policy_mask_threshold": 0.05},
    ],
    ids=lambda settings: ",".join(settings) or "plain",
)
def test_our_grpo_has_the_loss_and_the_gradient_of_trl(folder, loss_type, settings):
    policy_loss, weight = LOSSES[loss_type]
    high = settings.get("epsilon_high")
    if high is not None:
        policy_loss = functools.partial(policy_loss, epsilon_high=high)
    settings = {"loss_type": loss_type, "num_iterations": 2, "temperature": 0.7, **settings}
    theirs = make(folder, trl.GRPOTrainer, **settings)
    ours = make(
        folder,
        policy_loss=policy_loss,
        batch_weight=weight,
        advantages=functools.partial(as_trl, scale=settings.get("scale_rewards", "group")),
        **settings,
    )
    expected, found = batch_of(theirs), batch_of(ours)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        close(found[name], value)
    assert expected["advantages"].abs().max() > 0.5
    for trainer in (theirs, ours):
        move(trainer)
    loss, gradient = loss_and_gradient(theirs, expected)
    our_loss, our_gradient = loss_and_gradient(ours, found)
    assert gradient.abs().max() > 1e-3
    close(our_gradient, gradient)
    if not settings.keys() & {"top_entropy_quantile", "off_policy_mask_threshold"}:
        close(our_loss, loss)  # these weights scale the gradient of a token, not its loss
    clipped = [key for key in theirs._metrics["train"] if key.startswith("clip_ratio")]
    assert len(clipped) == 5
    assert max(theirs._metrics["train"]["clip_ratio/region_mean"]) > 0
    for key in (*clipped, "entropy", *(("kl",) if settings.get("beta") else ())):
        close(ours._metrics["train"][key][-1], theirs._metrics["train"][key][-1])


def test_training_with_our_grpo_ends_with_the_weights_and_the_log_of_trl(folder):
    settings = {
        "loss_type": "dapo",
        "beta": 0.05,
        "num_iterations": 2,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "optim": "sgd",  # Adam would blow up the rounding errors of gradients near 0
        "learning_rate": 0.3,
    }
    theirs = make(folder, trl.GRPOTrainer, **settings)
    loss, weight = LOSSES["dapo"]
    ours = make(folder, policy_loss=loss, advantages=as_trl, batch_weight=weight, **settings)
    for trainer in (theirs, ours):
        torch.manual_seed(0)
        trainer.train()
    before = transformers.LlamaForCausalLM.from_pretrained(folder).state_dict()
    for name, value in theirs.model.state_dict().items():
        close(ours.model.state_dict()[name], value, 1e-5)
    moved = [(v - before[n]).abs().max() for n, v in theirs.model.state_dict().items()]
    assert max(moved) > 1e-2
    timed = ("time", "runtime", "per_second")
    for mine, other in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        assert mine.keys() == other.keys()
        for key in [key for key in other if not any(word in key for word in timed)]:
            close(torch.tensor(mine[key]), torch.tensor(other[key]), 1e-5)
    assert list(ours._logs["advantages"]) == pytest.approx(list(theirs._logs["advantages"]))


def test_advantages_alone_go_into_the_loss_of_trl(folder):
    plain = make(folder, trl.GRPOTrainer, scale_rewards="none", loss_type="grpo")
    ours = make(
        folder,
        loss_type="grpo",
        advantages=lambda rewards, groups: 2 * objectives.dr_grpo()["advantages"](rewards, groups),
    )
    expected, expected_gradient = loss_and_gradient(plain, batch_of(plain))
    found, gradient = loss_and_gradient(ours, batch_of(ours))
    close(found, 2 * expected)
    close(gradient, 2 * expected_gradient)


def test_a_function_is_given_what_it_names(folder):
    seen = {}

    def advantages(
        rewards,
        groups,
        lengths,
        entropy,
        rewards_per_function,
        columns,
        step,
        total_steps,
        max_completion_length,
        eps=1.0,
    ):
        seen.update(locals())
        return rewards

    def half(completions, **_):
        return [0.5] * len(completions)

    rewards = [many_small_numbers, half]
    trainer = make(folder, reward=rewards, advantages=advantages, temperature=0.7, max_steps=9)
    batch = batch_of(trainer)
    completion, mask = batch["completion_ids"], batch["completion_mask"]
    texts = trainer.processing_class.batch_decode(completion, skip_special_tokens=True)
    per_function = torch.tensor([many_small_numbers(texts), [0.5] * 8]).T
    close(seen["rewards_per_function"], per_function)
    close(seen["rewards"], per_function.sum(1))
    assert seen["groups"].tolist() == [0] * GROUP + [1] * GROUP
    assert seen["lengths"].tolist() == mask.sum(1).tolist()
    assert 1 < seen["lengths"].float().mean() <= LONGEST
    assert seen["columns"] == {"prompt": [PROMPTS[0]] * GROUP + [PROMPTS[1]] * GROUP}
    assert (seen["step"], seen["max_completion_length"], seen["eps"]) == (0, LONGEST, 1.0)
    ids = torch.cat([batch["prompt_ids"], completion], 1)
    attention = torch.cat([batch["prompt_mask"], mask], 1)
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=attention).logits
    entropy = mean_token_entropy(logits[:, -LONGEST - 1 : -1] / 0.7, mask)
    close(seen["entropy"], entropy, 1e-5)
    assert list(trainer._logs["advantages"]) == seen["rewards"].tolist()


def test_a_completion_without_a_reward_is_left_out_of_its_group(folder):
    def sometimes(completions, **_):
        return [None, 1.0, 0.0, 0.0, 1.0, 0.0, None, None]

    trainer = make(folder, reward=sometimes, **objectives.gbpo(epsilon_high=0.3))
    batch = batch_of(trainer)
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0])
    expected = objectives.gbpo(epsilon_high=0.3)["advantages"](
        rewards, torch.tensor([0, 0, 0, 1, 1])
    )
    there = [1, 2, 3, 4, 5]
    close(batch["advantages"][there], expected.advantages)
    close(batch["signals/target_ratio"][there], expected.target_ratio)
    assert batch["signals/weight"][[0, 6, 7]].tolist() == [0.0] * 3
    assert batch["advantages"][[0, 6, 7]].tolist() == [0.0] * 3


def test_gbpo_trains_on_its_targets(folder):
    trainer = make(folder, **objectives.gbpo(), num_iterations=2)
    batch = batch_of(trainer)
    weight, target = batch["signals/weight"], batch["signals/target_ratio"]
    mask = batch["completion_mask"]
    on_policy = ((weight * (1 - target).abs())[:, None] * mask).sum() / mask.sum()
    assert on_policy > 0
    loss, _ = loss_and_gradient(trainer, batch)
    close(loss, on_policy)
    move(trainer)
    loss, gradient = loss_and_gradient(trainer, batch)
    now = batch["old_per_token_logps"]
    trainer.model.zero_grad()
    logprobs, _, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
        torch.cat([batch["prompt_mask"], mask], 1),
        LONGEST,
    )
    by_hand = gbpo_loss(logprobs - now, target, weight, mask=mask)
    close(loss, by_hand.detach())
    by_hand.backward()
    close(gradient, torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))


def test_a_ratio_that_overflows_in_trl_is_finite_here(folder):
    settings = {"loss_type": "bnpo", "num_iterations": 2, "beta": 0.1}
    theirs = make(folder, trl.GRPOTrainer, **settings)
    ours = make(folder, **objectives.gbpo(), **settings)
    for trainer in (theirs, ours):
        batch = batch_of(trainer)
        batch["old_per_token_logps"] -= 1000.0
        loss, gradient = loss_and_gradient(trainer, batch)
        finite = bool(loss.isfinite()) and bool(gradient.isfinite().all())
        assert finite == (trainer is ours)


def test_a_batch_whose_completions_are_all_masked_has_no_loss_and_no_gradient(folder):
    trainer = make(folder, **objectives.gbpo(), mask_truncated_completions=True)
    batch = batch_of(trainer)
    batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    loss, gradient = loss_and_gradient(trainer, batch)
    assert loss == 0
    assert gradient.abs().max() == 0


def in_column(completions, **_):
    return many_small_numbers(completions)


OBJECTIVES = {
    "grpo": objectives.grpo(aggregate="sequence"),
    "dr_grpo": objectives.dr_grpo(),
    "gbpo": objectives.gbpo(ties="exact"),
    "canon-length": objectives.canon(
        mu=functools.partial(canon_mu_schedule, warmup=1, cycles=1), alpha=0.9
    ),
    "canon-entropy": objectives.canon(metric="entropy", mu=1.0),
    "adora": objectives.adora(mode="amplify", variant="llm"),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_each_objective_trains_to_the_end(folder, name, lora):
    settings = {"beta": 0.02, "num_iterations": 2, "gradient_accumulation_steps": 2, "max_steps": 3}
    if lora:
        settings["peft"] = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        settings["fused_head"] = True
    trainer = make(folder, per_device_train_batch_size=4, data=None, **OBJECTIVES[name], **settings)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    log = [row for row in trainer.state.log_history if "loss" in row]
    assert len(log) == 3
    assert all(math.isfinite(row[key]) for row in log for key in ("loss", "grad_norm", "kl"))
    assert max(abs(row["loss"]) for row in log) > 0
    changed = {
        key for key, value in trainer.model.state_dict().items() if not value.equal(before[key])
    }
    assert changed
    if lora:
        assert all("lora" in key for key in changed)
    named = {"gbpo": "signals/target_ratio", "adora": "signals/prompt_weight"}.get(name)
    if named is not None:
        assert named in log[0]
    assert {"reward", "entropy", "completions/mean_length"} <= log[0].keys()


def test_canon_takes_its_metric_from_a_column_that_a_rollout_fills(folder):
    def rollout(prompts, trainer):
        ids = [[5 + row, 1] for row in range(len(prompts))]
        depth = [float(row % GROUP) for row in range(len(prompts))]
        return {"prompt_ids": [[3]] * len(prompts), "completion_ids": ids, "logprobs": None,
                "depth": depth}  # fmt: skip

    def deep_is_right(depth, **_):
        return [float(value >= 2) for value in depth]

    settings = objectives.canon(metric="depth", mu=1.0)
    trainer = make(folder, reward=deep_is_right, rollout_func=rollout, **settings)
    assert batch_of(trainer)["advantages"].tolist() == [-1, -1, 1, 1] * 2
    trainer = make(
        folder, reward=deep_is_right, rollout_func=rollout, **objectives.canon(metric="x")
    )
    with pytest.raises(ValueError, match=r"or a column, got 'x'.*'depth'"):
        batch_of(trainer)


def test_evaluation_uses_the_same_objective(folder):
    data = Dataset.from_dict({"prompt": PROMPTS[:2]})
    settings = {"per_device_eval_batch_size": 4, "num_generations_eval": 2, "eval_strategy": "no"}
    trainer = make(folder, data=data, **objectives.gbpo(), **settings)
    trainer.eval_dataset = data
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_loss"])
    assert "eval_signals/target_ratio" in trainer.state.log_history[-1]


# The fused head.


def count_calls(monkeypatch):
    from steelyard.integrations.trl import _fused_head

    calls = []

    def counted(hidden, *args, **kwargs):
        calls.append(hidden.dtype)
        return kernel(hidden, *args, **kwargs)

    kernel = _fused_head.linear_logprobs
    monkeypatch.setattr(_fused_head, "linear_logprobs", counted)
    return calls


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_the_fused_head_gives_the_same_numbers(folder, lora, monkeypatch):
    calls = count_calls(monkeypatch)
    losses = []
    for fused in (False, True):
        adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        torch.manual_seed(0)
        trainer = make(
            folder,
            **objectives.gbpo(),
            fused_head=fused,
            temperature=0.7,
            beta=0.1,
            num_iterations=2,
            entropy_coef=0.01,  # so that entropies carry a gradient
            peft=adapter if lora else None,
        )
        batch = batch_of(trainer)
        move(trainer)
        assert bool(calls) == fused
        losses.append((*loss_and_gradient(trainer, batch), batch))
    (loss, gradient, batch), (our_loss, our_gradient, our_batch) = losses
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        close(our_batch[name], batch[name], 2e-6)
    close(our_loss, loss, 2e-6)
    close(our_gradient, gradient, 2e-6)
    assert gradient.abs().max() > 1e-3


def test_the_fused_head_keeps_single_precision_under_autocast(folder, monkeypatch):
    calls = count_calls(monkeypatch)
    trainer = make(folder, **objectives.gbpo(), fused_head=True, bf16=True, num_iterations=2)
    trainer.train()
    assert set(calls) == {torch.float32}
    assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_a_head_in_half_precision_stays_with_trl(folder, monkeypatch):
    calls = count_calls(monkeypatch)
    trainer = make(
        folder,
        **objectives.gbpo(),
        fused_head=True,
        num_iterations=2,
        model_init_kwargs={"dtype": "bfloat16"},
    )
    batch = batch_of(trainer)
    assert not calls
    assert batch["old_per_token_logps"].abs().max() > 0


def test_heads_that_cap_or_scale_are_not_taken_for_linear(folder):
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    assert has_plain_head(model)
    for name, value in (("final_logit_softcapping", 30.0), ("logit_scale", 0.5)):
        setattr(model.config, name, value)
        assert not has_plain_head(model)
        delattr(model.config, name)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    assert not has_plain_head(model)


# Errors.


def with_reward(answer):
    def my_reward(completions, **_):
        return answer

    return my_reward


def many(value):
    return [value] * 8


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (
            [1.0] * 7,
            ValueError,
            "'my_reward' must return 8 rewards, one for each completion, got 7",
        ),
        ([0.0, math.nan, *[1.0] * 6], ValueError, "'my_reward' .*finite.*got nan for completion 1"),
        ([math.inf] * 8, ValueError, "'my_reward' .*finite.*got inf for completion 0"),
        (1.0, TypeError, "'my_reward' must return a list"),
        (["good"] * 8, TypeError, "'my_reward' must return a list"),
        ([None] * 8, ValueError, "rewards must not all be None"),
    ],
)
def test_a_wrong_reward_is_reported_by_the_name_of_its_function(folder, answer, kind, message):
    trainer = make(folder, reward=with_reward(answer), **objectives.grpo())
    with pytest.raises(kind, match=message):
        batch_of(trainer)


def test_an_async_reward_is_awaited_and_checked(folder):
    async def later(completions, **_):
        return many(math.nan) if wrong else many(2.0)

    trainer = make(folder, reward=later, **objectives.grpo())
    wrong = False
    assert batch_of(trainer)["advantages"].tolist() == many(0.0)
    wrong = True
    with pytest.raises(ValueError, match=r"'later' .*finite"):
        batch_of(trainer)


def test_a_reward_model_that_returns_nan_is_reported(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    config.num_labels = 1
    model = transformers.LlamaForSequenceClassification(config)
    torch.nn.init.constant_(model.score.weight, math.nan)
    trainer = make(folder, reward=model, **objectives.grpo())
    trainer.reward_processing_classes = [trainer.processing_class]
    with pytest.raises(ValueError, match=r"reward model .* must return finite"):
        batch_of(trainer)


def test_a_data_set_without_prompts_is_reported(folder):
    data = Dataset.from_dict({"question": PROMPTS})
    with pytest.raises(ValueError, match=r"train_dataset must have a column 'prompt', .*question"):
        make(folder, data=data, **objectives.grpo())
    named = {"good": Dataset.from_dict({"prompt": PROMPTS}), "bad": data}
    with pytest.raises(ValueError, match=r"eval_dataset\['bad'\] must have a column 'prompt'"):
        check_prompt_column("eval_dataset", named)


def test_groups_that_do_not_match_their_prompts_are_reported(folder):
    trainer = make(folder, **objectives.grpo())
    with pytest.raises(ValueError, match=r"groups must be 4 completions of one prompt"):
        trainer._generate_and_score_completions([{"prompt": PROMPTS[row % 2]} for row in range(8)])
    rows = [{"prompt": PROMPTS[0]} for _ in range(6)]
    with pytest.raises(ValueError, match=r"groups must be of 4 completions .* got 6 rewards"):
        trainer._signals(rows, {}, torch.zeros(6, 1))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"completion_ids": [[5, 1]] * 7 + [[]]}, "completion 7 of rollout_func is empty"),
        ({"completion_ids": [[5, 1]] * 7}, "must return 8 completions.*got 7"),
        (
            {"completion_ids": [[5, 1]] * 8, "env_mask": [[1, 0]] * 7 + [[0, 0]]},
            "completion 7 has no token of the model",
        ),
        ({}, "must return keys"),
    ],
)
def test_an_empty_completion_is_reported(folder, output, message):
    def rollout(prompts, trainer):
        return {"prompt_ids": [[3]] * 8, "logprobs": None, **output}

    trainer = make(folder, rollout_func=rollout, **objectives.grpo())
    with pytest.raises(ValueError, match=message):
        batch_of(trainer)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"policy_loss": 3}, TypeError, "policy_loss= must be a function, got int"),
        ({"policy_loss": lambda log_ratio: 0}, TypeError, "policy_loss= must take 'mask'"),
        ({"advantages": lambda groups: 0}, TypeError, "advantages= must take 'rewards'"),
        ({"advantages": lambda rewards, age: 0}, TypeError, "advantages= needs 'age', but can"),
        ({"advantages": lambda rewards, /: 0}, TypeError, "takes 'rewards' by position only"),
        ({"batch_weight": "mass"}, ValueError, "batch_weight must be one of"),
        ({"policy_loss": grpo_loss, "loss_type": "cispo"}, ValueError, "loss_type .*'cispo'"),
        ({"policy_loss": grpo_loss, "delta": 2.0}, ValueError, "delta must be None"),
        (
            {
                "advantages": group_relative_advantages,
                "multi_objective_aggregation": "normalize_then_sum",
            },
            ValueError,
            "multi_objective_aggregation",
        ),
    ],
)
def test_settings_that_do_not_fit_are_reported(folder, settings, kind, message):
    with pytest.raises(kind, match=message):
        make(folder, **settings)


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (lambda rewards: rewards[1:], ValueError, r"'advantages' .*must have shape \[8\]"),
        (lambda rewards: rewards / 0, ValueError, "'advantages' .* must be finite"),
        (lambda rewards: {"weight": rewards}, ValueError, "field 'advantages'.*weight"),
        (lambda rewards: rewards.tolist(), TypeError, "must return a tensor"),
    ],
)
def test_wrong_advantages_are_reported(folder, answer, kind, message):
    trainer = make(folder, advantages=answer)
    with pytest.raises(kind, match=message):
        batch_of(trainer)


def test_a_loss_that_wants_a_signal_nobody_made_is_reported(folder):
    trainer = make(folder, policy_loss=gbpo_loss, advantages=group_relative_advantages)
    with pytest.raises(TypeError, match=r"policy_loss= needs 'target_ratio', 'weight'"):
        loss_and_gradient(trainer, batch_of(trainer))


def test_a_loss_that_is_not_one_number_is_reported(folder):
    trainer = make(folder, policy_loss=lambda log_ratio, mask: log_ratio)
    with pytest.raises(ValueError, match="returned by policy_loss="):
        loss_and_gradient(trainer, batch_of(trainer))


def test_a_trl_that_no_longer_masks_its_policy_loss_is_reported(folder, monkeypatch):
    trainer = make(folder, **objectives.grpo())
    batch = batch_of(trainer)
    trainer.off_policy_mask_threshold = None
    with pytest.raises(RuntimeError, match="does not ask for an off-policy mask"):
        loss_and_gradient(trainer, batch)


def test_importing_the_adapters_does_not_import_trl():
    code = (
        "import sys, steelyard.integrations as i, steelyard.integrations.trl as t;"
        "t.objectives.gbpo(); assert 'GRPOTrainer' in dir(t);"
        "assert 'trl' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    from steelyard.integrations import trl as package

    with pytest.raises(AttributeError, match="no attribute 'PPOTrainer'"):
        _ = package.PPOTrainer


# Several processes.


def fixed_completions(prompts, trainer):
    """The same completions whichever process they are made on, of uneven lengths."""
    first = trainer.accelerator.process_index * len(prompts)
    step = trainer.state.global_step
    rows = range(first, first + len(prompts))
    ids = [[2 + (row * 7 + step + t) % 26 for t in range(1 + row % 5)] + [1] for row in rows]
    return {"prompt_ids": [[3, 4]] * len(prompts), "completion_ids": ids, "logprobs": None}


def share_of_work(folder, objective, rows, **settings):
    return make(
        Path(folder),
        rollout_func=fixed_completions,
        per_device_train_batch_size=rows,
        num_generations=8,  # one group spans the processes
        num_iterations=2,
        beta=0.05,
        loss_type="dapo",
        max_steps=4,
        learning_rate=1e-2,
        **objective,
        **settings,
    )


def log_of_training(folder, objective, rows, **settings):
    trainer = share_of_work(folder, objective, rows, **settings)
    trainer.train()
    log = [row for row in trainer.state.log_history if "loss" in row]
    keys = ("loss", "grad_norm", "kl", "entropy", "signals/weight")
    return {key: [row[key] for row in log if key in row] for key in keys}


def loss_and_gradient_in_shards(folder, rows, *, sharded):
    """Of one batch, with FSDP2 around each layer and the whole, or without."""
    trainer = share_of_work(folder, objectives.gbpo(), rows, fused_head=True)
    model = trainer.model
    if sharded:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        assert "FSDP" in type(model).__name__
        assert isinstance(model.lm_head.weight, DTensor)
    model.train()
    prompts = [{"prompt": PROMPTS[0]} for _ in range(rows)]
    batch = trainer._generate_and_score_completions(prompts)
    batch["old_per_token_logps"] -= 0.1  # away from ratio 1
    loss = trainer._compute_loss(model, batch)
    loss.backward()
    grads = [p.grad.full_tensor() if sharded else p.grad for p in model.parameters()]
    mean = trainer.accelerator.reduce(loss.detach(), reduction="mean")
    return {"loss": [mean.item()], "gradient": torch.cat([g.flatten() for g in grads]).tolist()}


def reports(folder, rows, *, sharded):
    canon = objectives.canon(metric="entropy", mu=0.8)
    return {
        "ddp": log_of_training(folder, objectives.gbpo(), rows),
        "ddp, fused": log_of_training(folder, canon, rows, fused_head=True),
        "fsdp2, fused": loss_and_gradient_in_shards(folder, rows, sharded=sharded),
    }


@pytest.mark.slow
def test_two_processes_train_as_one_does(folder, tmp_path):
    """On gloo. `accelerate` has no FSDP on a CPU, so FSDP2 is put around the model by hand."""
    two = run_in_two(__file__, folder, out=tmp_path / "two.json")
    one = reports(folder, 8, sharded=False)
    assert_same(two, one)
    for numbers in one.values():
        assert max(map(abs, numbers["loss"])) > 1e-3
    assert len(one["ddp"]["loss"]) == 4
    assert max(one["ddp"]["signals/weight"]) > 0


if __name__ == "__main__":
    write(reports(sys.argv[1], 4, sharded=True), sys.argv[2])
