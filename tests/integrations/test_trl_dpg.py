"""The f-DPG trainer: its loss is that of the package on its samples, and it reaches a target.

Run as a script (by the test of two processes), this file trains and writes what it saw.
"""

import copy
import functools
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

import peft
import transformers
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file

from steelyard.divergences import (
    JENSEN_SHANNON_DOUBLE,
    KL,
    REVERSE_KL,
    TOTAL_VARIATION,
)
from steelyard.integrations.trl import DPGTrainer
from steelyard.lab.tiny_lm import tiny_lm, tiny_tokenizer
from steelyard.preference import (
    RunningBaseline,
    dpg_divergence,
    dpg_loss,
    dpg_pseudo_rewards,
    leave_one_out_baseline,
    pointwise_log_target,
    rlhf_log_target,
)
from two_processes import assert_same, run_in_two, write

SYMBOLS = ["a", "b", "c", "="]
PROMPTS = Dataset.from_dict({"prompt": ["a =", "b c =", "c ="], "wanted": ["a", "b", "c"]})


def model_of(seed=0, *, symbols=SYMBOLS):
    return tiny_lm(tiny_tokenizer(symbols), hidden_size=16, num_heads=2, seed=seed)


def says_wanted(base_logprobs, completions, columns):
    found = [
        want in text.split() for want, text in zip(columns["wanted"], completions, strict=True)
    ]
    return pointwise_log_target(base_logprobs, torch.tensor(found))


def soft(base_logprobs, completions):
    rewards = torch.tensor([float(text.split().count("a")) for text in completions])
    return rlhf_log_target(base_logprobs, rewards.to(base_logprobs), beta=0.7)


OURS = ("divergence", "base_model", "proposal", "num_samples", "max_new_tokens", "baseline")
OURS = (*OURS, "log_z", "max_log_z", "reward_range", "eval_dataset", "peft_config")
OURS = (*OURS, "generation_batch_size")


def make(tmp_path, target=says_wanted, *, data=PROMPTS, model=None, **settings):
    ours = {name: settings.pop(name) for name in OURS if name in settings}
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        **{
            "per_device_train_batch_size": 3,
            "per_device_eval_batch_size": 2,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 3,
            **settings,
        },
    )
    trainer = DPGTrainer(
        model_of() if model is None else model,
        target,
        args,
        data,
        processing_class=tiny_tokenizer(SYMBOLS),
        **{"divergence": JENSEN_SHANNON_DOUBLE, "num_samples": 6, "max_new_tokens": 4, **ours},
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def batch_of(trainer):
    rows = len(trainer.train_dataset)
    return trainer.data_collator([trainer.train_dataset[row] for row in range(rows)])


def logprob(model, prompt, completion):
    """Log-probability of one completion, from full logits."""
    ids = torch.tensor([prompt + completion])
    logs = model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return logs.gather(1, torch.tensor(completion)[:, None]).sum()


def recorded(target, seen):
    """The same target, with what it was given."""

    @functools.wraps(target)
    def wrapped(**given):
        seen.update(given)
        return target(**{k: v for k, v in given.items() if k in needed})

    needed = target.__code__.co_varnames[: target.__code__.co_argcount]

    def function(base_logprobs, completions, prompts, completion_ids, columns, step):
        return wrapped(
            base_logprobs=base_logprobs,
            completions=completions,
            prompts=prompts,
            completion_ids=completion_ids,
            columns=columns,
            step=step,
        )

    return function


# The loss.


@pytest.mark.parametrize("kind", ["others", "previous", "batch"])
@pytest.mark.parametrize("off_policy", [False, True], ids=["on", "off"])
def test_the_loss_is_that_of_the_package_on_the_samples(tmp_path, kind, off_policy):
    seen = {}
    proposal = model_of(5).double() if off_policy else None
    trainer = make(
        tmp_path,
        recorded(soft, seen),
        model=model_of(1).double(),
        base_model=model_of(2).double(),
        proposal=proposal,
        log_z=kind,
    )
    earlier = torch.tensor([0.3, -0.2, 0.5, 0.1])
    trainer._partition.update(earlier, torch.tensor([0, 0, 1, 2]))
    trainer.model.train()
    batch = batch_of(trainer)
    loss = trainer.objective_loss(trainer.model, batch)
    prompts = [ids for ids in batch["prompt_ids"] for _ in range(6)]
    pairs = list(zip(prompts, seen["completion_ids"], strict=True))
    policy = torch.stack([logprob(trainer.model, *pair) for pair in pairs])
    with torch.no_grad():
        base = torch.stack([logprob(trainer._base, *pair) for pair in pairs])
        q = policy if proposal is None else torch.stack([logprob(proposal, *p) for p in pairs])
    torch.testing.assert_close(seen["base_logprobs"], base)
    target = soft(base, seen["completions"])
    contexts = torch.arange(3).repeat_interleave(6)
    weights = (target - q.detach()).exp()
    log_z = []
    for i, context in enumerate(contexts.tolist()):
        here = [earlier[:2].double().exp(), earlier[2:3].double().exp(), earlier[3:].double().exp()]
        used = [here[context]]
        if kind != "previous":
            keep = contexts == context
            keep[i] &= kind == "batch"
            used.append(weights[keep])
        log_z.append(torch.cat(used).mean().log())
    log_z = torch.stack(log_z)
    settings = {"divergence": JENSEN_SHANNON_DOUBLE}
    rewards = dpg_pseudo_rewards(policy, target, log_z, **settings)
    expected = dpg_loss(
        policy,
        target,
        log_z,
        **settings,
        proposal_logprobs=None if proposal is None else q,
        baseline=leave_one_out_baseline(rewards, contexts=contexts),
    )
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    parameters = list(trainer.model.parameters())
    found = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    right = torch.cat([g.flatten() for g in torch.autograd.grad(expected, parameters)])
    assert right.abs().max() > 1e-3
    torch.testing.assert_close(found, right, rtol=0, atol=1e-5)
    log = trainer._metrics["train"]
    distance = dpg_divergence(
        policy.detach(),
        target,
        log_z,
        **settings,
        proposal_logprobs=None if proposal is None else q,
    )
    assert log["divergence"][0] == pytest.approx(distance.item(), abs=1e-5)
    assert ("kl_to_base" in log) == (not off_policy)
    # The weights are added only now: the next batch sees them.
    for context in range(3):
        everything = torch.cat([
            (earlier[:2], earlier[2:3], earlier[3:])[context].double().exp(),
            weights[contexts == context],
        ])  # fmt: skip
        expected_z = everything.mean().log()
        assert trainer._partition.value[context].item() == pytest.approx(
            expected_z.item(), abs=1e-5
        )


def test_a_target_is_given_what_it_names(tmp_path):
    seen = {}
    trainer = make(tmp_path, recorded(says_wanted, seen))
    trainer.objective_loss(trainer.model, batch_of(trainer))
    assert seen["prompts"] == [text for text in PROMPTS["prompt"] for _ in range(6)]
    assert seen["columns"]["wanted"] == ["a"] * 6 + ["b"] * 6 + ["c"] * 6
    assert seen["step"] == 0
    decoded = trainer.processing_class.batch_decode(
        seen["completion_ids"], skip_special_tokens=True
    )
    assert seen["completions"] == decoded
    assert all(1 <= len(ids) <= 4 for ids in seen["completion_ids"])
    assert all(2 not in ids[:-1] for ids in seen["completion_ids"])


def test_targets_compose(tmp_path):
    scores = []

    def first(base_logprobs):
        return base_logprobs - 1

    def second(base_logprobs, completions):
        scores.append(base_logprobs)
        return base_logprobs * 2

    trainer = make(tmp_path, [first, second])
    base = torch.tensor([-3.0, -2.0])
    found = trainer._judge(base, [[4]] * 2, [[5], [6]], [{"prompt": "a"}] * 2)
    assert scores[0].tolist() == [-4.0, -3.0]
    assert found.tolist() == [-8.0, -6.0]
    with pytest.raises(TypeError, match=r"second and later functions .* must take 'base_logprobs'"):
        make(tmp_path, [first, lambda completions: 0])


def test_the_base_of_an_adapter_is_the_model_without_it(tmp_path):
    seen = {}
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    trainer = make(tmp_path, recorded(soft, seen), peft_config=adapter)
    trainer.objective_loss(trainer.model, batch_of(trainer))
    prompts = [ids for ids in batch_of(trainer)["prompt_ids"] for _ in range(6)]
    with torch.no_grad():
        base = [
            logprob(model_of(), *pair) for pair in zip(prompts, seen["completion_ids"], strict=True)
        ]
        policy = logprob(trainer.model, prompts[0], seen["completion_ids"][0])
    torch.testing.assert_close(seen["base_logprobs"].double(), torch.stack(base), atol=1e-5, rtol=0)
    assert abs(policy - base[0]) > 1e-3


def test_without_prompts_there_is_one_context(tmp_path):
    trainer = make(tmp_path, soft, data=Dataset.from_dict({"prompt": [""]}))
    assert trainer.train_dataset[0]["prompt_ids"] == [1]  # the token that begins a text
    loss = trainer.objective_loss(trainer.model, batch_of(trainer))
    assert loss.isfinite()


def test_the_first_samples_of_a_prompt_are_left_out_if_only_earlier_ones_count(tmp_path):
    trainer = make(tmp_path, soft, log_z="previous")
    batch = batch_of(trainer)
    assert trainer.objective_loss(trainer.model, batch) == 0
    assert trainer.objective_loss(trainer.model, batch) != 0


# Training.


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_training_reaches_the_target(tmp_path, lora):
    settings = {"learning_rate": 3e-2}
    if lora:
        names = ["q_proj", "v_proj", "down_proj", "up_proj"]
        adapter = peft.LoraConfig(r=4, lora_alpha=32, target_modules=names)
        settings = {"peft_config": adapter, "learning_rate": 1e-2, "gradient_checkpointing": True}
    model = model_of()
    with torch.no_grad():  # an adapter has to do with the logits that the head can make
        model.lm_head.weight *= 20 if lora else 1
    trainer = make(
        tmp_path,
        model=model,
        max_steps=25,
        num_samples=24,
        eval_dataset=PROMPTS,
        lr_scheduler_type="constant",
        **settings,
    )
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    torch.manual_seed(0)
    start = trainer.evaluate()
    trainer.train()
    end = trainer.evaluate()
    assert end["eval_allowed"] > start["eval_allowed"] + 0.25
    assert end["eval_divergence"] < start["eval_divergence"]
    assert end["eval_loss"] == pytest.approx(end["eval_divergence"], abs=0.2)
    log = trainer.state.log_history
    named = {"log_z", "allowed", "pseudo_reward", "kl_to_base", "entropy", "completion_length"}
    assert named <= next(row for row in log if "loss" in row).keys()
    changed = {
        key for key, value in trainer.model.state_dict().items() if not value.equal(before[key])
    }
    assert changed
    assert all("lora" in key for key in changed) or not lora


@pytest.mark.parametrize(
    "settings",
    [
        {"divergence": REVERSE_KL, "gradient_accumulation_steps": 2},
        {"divergence": KL, "reward_range": (-10.0, 10.0), "baseline": RunningBaseline(64)},
        {"divergence": TOTAL_VARIATION, "baseline": None, "log_z": "batch", "max_log_z": 0.0},
        {"divergence": REVERSE_KL, "proposal": model_of(0), "bf16": True},
    ],
    ids=["reverse_kl", "kl", "total_variation", "off-policy"],
)
def test_each_setting_trains_to_the_end(tmp_path, settings):
    trainer = make(tmp_path, eval_dataset=PROMPTS, eval_strategy="epoch", **settings)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 2
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)


def test_what_is_remembered_comes_back_from_a_checkpoint(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    trainer = make(tmp_path, baseline=RunningBaseline(32), **saving)
    trainer.train()
    stored = load_file(tmp_path / "out" / "checkpoint-2" / "dpg_state.safetensors")
    assert stored["partition.count"].tolist() == [12, 12, 12]
    again = make(tmp_path, baseline=RunningBaseline(32), **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert again._partition.count.tolist() == [18, 18, 18]
    assert again._baseline.count == trainer._baseline.count > 32
    torch.testing.assert_close(again._partition.value, trainer._partition.value)


# Errors.


def with_scores(value, place=2):
    def wrong(base_logprobs):
        scores = base_logprobs.clone()
        scores[place] = value
        return scores

    return wrong


@pytest.mark.parametrize(
    ("target", "kind", "message"),
    [
        (
            with_scores(math.nan),
            ValueError,
            "must be finite, or -inf .*got nan for completion 2: '",
        ),
        (with_scores(math.inf), ValueError, "got inf for completion 2"),
        (lambda base_logprobs: base_logprobs[1:], ValueError, r"target= must have shape \[18\]"),
        (lambda completions: [0.0] * 18, TypeError, "target= must return a tensor, got list"),
    ],
)
def test_wrong_scores_are_reported(tmp_path, target, kind, message):
    trainer = make(tmp_path, target)
    with pytest.raises(kind, match=message):
        trainer.train()


def test_an_infinite_pseudo_reward_is_reported_with_what_helps(tmp_path):
    trainer = make(tmp_path, with_scores(-math.inf), divergence=KL)
    with pytest.raises(ValueError, match=r"of kl is -inf .* target forbids.*log_floor=-20"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"divergence": "kl"}, TypeError, "divergence must be an FDivergence, got str"),
        ({"target": 3}, TypeError, "target= must be a function, got int"),
        ({"target": []}, ValueError, "target must be a function or several, got none"),
        ({"target": lambda age: age}, TypeError, "target= needs 'age'"),
        ({"num_samples": 1}, ValueError, "num_samples must be at least 2 with log_z='others'"),
        ({"log_z": "mine"}, ValueError, "log_z must be one of"),
        ({"data": Dataset.from_dict({"text": ["a"]})}, ValueError, "must have a column 'prompt'"),
        ({"data": PROMPTS.select([])}, ValueError, "must have at least one prompt"),
        (
            {"data": IterableDataset.from_generator(lambda: iter([]))},
            TypeError,
            "train_dataset must be a datasets.Dataset",
        ),
        (
            {"base_model": model_of(symbols=[*SYMBOLS, "new"])},
            ValueError,
            "share one vocabulary.*base_model 8",
        ),
    ],
)
def test_settings_that_do_not_fit_are_reported(tmp_path, settings, kind, message):
    with pytest.raises(kind, match=message):
        make(tmp_path, **settings)


@pytest.mark.parametrize("who", ["policy", "base model"])
def test_a_model_that_scores_nan_is_reported(tmp_path, who):
    broken = model_of(1)
    with torch.no_grad():
        broken.lm_head.weight[4] = math.nan
    if who == "policy":
        # It cannot sample either, so another one does.
        trainer = make(tmp_path, model=broken, base_model=model_of(0), proposal=model_of(0))
    else:
        trainer = make(tmp_path, base_model=copy.deepcopy(broken))
    with pytest.raises(ValueError, match=f"of the {who} must be finite, got nan"):
        trainer.train()


# Several processes.


def reports(folder, rows):
    """What is remembered after training with so many prompts for each process."""
    data = Dataset.from_dict({"prompt": ["a =", "b =", "c =", "a b ="]})
    trainer = make(folder, soft, data=data, per_device_train_batch_size=rows, max_steps=3)
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    apart = trainer.accelerator.gather(weights[None]).double().std(0, correction=0).max()
    seen = trainer._partition.count.tolist()
    return {"policy": {"seen": seen, "apart": [apart.item()]}}


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    """On gloo."""
    two = run_in_two(__file__, tmp_path / "two", out=tmp_path / "two.json")
    one = reports(tmp_path, 4)
    assert_same(two, one)


if __name__ == "__main__":
    write(reports(Path(sys.argv[1]), 2), sys.argv[2])
