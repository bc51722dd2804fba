"""The distillation trainer: blocks of logits give the losses of the package, files the same.

Run as a script (by the test of two processes), this file trains and writes what it logged.
"""

import copy
import math
import pickle
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

import peft
import transformers
from datasets import Dataset, IterableDataset
from safetensors.torch import save_file

from steelyard.distillation import (
    adpa_loss,
    dckd_loss,
    kd_loss,
    pld_loss,
    sinkhorn_kd_loss,
    teacher_advantage,
)
from steelyard.integrations.trl import (
    ADPA,
    DCKD,
    PLD,
    AdvantageCache,
    DistillationTrainer,
    SinKD,
)
from steelyard.integrations.trl._backbone import LinearHead, through
from steelyard.integrations.trl._row_loss import LikelihoodAndDivergence, row_loss
from steelyard.integrations.trl.advantage_cache import TokenAdvantages
from steelyard.lab.tiny_lm import tiny_lm, tiny_tokenizer
from two_processes import assert_same, run_in_two, write

SYMBOLS = [*map(str, range(12)), "="]
VOCABULARY = len(SYMBOLS) + 3
ROWS = {
    "prompt": ["1 2 =", "3 =", "7 8 9 =", "4 4 ="],
    "chosen": [" 1 2", " 3", " 7 8 9 9", " 4"],
    "rejected": [" 2", " 4 4 4", " 9 8", " 5 6"],
}
PAIRS = Dataset.from_dict(ROWS)
OWN = [[3, 4, 2], [5, 2], [6, 7, 8, 9], [2]]


def model_of(seed, *, symbols=SYMBOLS, hidden_size=16):
    model = tiny_lm(tiny_tokenizer(symbols), hidden_size=hidden_size, num_heads=2, seed=seed)
    with torch.no_grad():
        model.lm_head.weight *= 30  # so that the models are sure of different tokens
    return model


ALIGNED, BEFORE = model_of(1, hidden_size=24), model_of(2, hidden_size=24)


def make(tmp_path, objective, *, data=PAIRS, student=None, double=False, **settings):
    ours = {
        name: settings.pop(name)
        for name in (
            *("teacher", "reference_teacher", "advantages", "eval_dataset", "peft_config"),
            *("max_length", "max_new_tokens", "processing_class"),
        )
        if name in settings
    }
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        **{
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "max_steps": 3,
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
    models = {"teacher": ALIGNED, "reference_teacher": BEFORE}
    models = {name: ours.pop(name, model) for name, model in models.items()}
    if not hasattr(objective, "kinds") or "own" not in objective.kinds:
        models["reference_teacher"] = None
    if double:
        models = {k: m and copy.deepcopy(m).double() for k, m in models.items()}
        student = model_of(0).double()
    trainer = DistillationTrainer(
        model_of(0) if student is None else student,
        args=args,
        train_dataset=data,
        objective=objective,
        **{"processing_class": tiny_tokenizer(SYMBOLS), **models, **ours},
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def with_own(data=PAIRS):
    return data.add_column("own_ids", OWN)


def batch_of(trainer):
    return trainer.data_collator([trainer.train_dataset[row] for row in range(4)])


def gradient_of(trainer, loss):
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters)
    return torch.cat([g.flatten() for g in found])


def logits_of(model, part):
    output = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"])
    return output.logits[:, :-1]


def plain(trainer, batch):
    """Logits of all models on all responses, tokens and masks, by whole forward passes."""
    found = {}
    for kind, part in batch.items():
        found[kind] = {
            "student": logits_of(trainer.model, part),
            "tokens": part["input_ids"][:, 1:],
            "mask": part["completion_mask"][:, 1:],
        }
        for name in ("teacher", "reference_teacher"):
            model = getattr(trainer, name)
            if model is not None:
                with torch.no_grad():
                    found[kind][name] = logits_of(model, part)
    return found


def check_against(trainer, formula):
    """The trainer's loss and gradient are those of a formula of whole logits."""
    batch = batch_of(trainer)
    expected = formula(**plain(trainer, batch))
    gradient = gradient_of(trainer, expected)
    loss = trainer.objective_loss(trainer.model, batch)
    assert gradient.abs().max() > 1e-2
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient_of(trainer, loss), gradient, rtol=0, atol=1e-9)


# Losses.


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_dckd_is_that_of_whole_logits(tmp_path, alpha):
    def formula(chosen, rejected):
        return dckd_loss(
            *(part[name] for name in ("student", "teacher") for part in (chosen, rejected)),
            chosen["tokens"],
            rejected["tokens"],
            alpha=alpha,
            mask_chosen=chosen["mask"],
            mask_rejected=rejected["mask"],
        )

    trainer = make(tmp_path, DCKD(alpha=alpha), double=True)
    check_against(trainer, formula)
    log = trainer._metrics["train"]
    assert log["nll"][0] > 0
    assert log["kl_chosen"][0] > 0


@pytest.mark.parametrize("top_k", [3, VOCABULARY, 1000])
def test_adpa_is_that_of_whole_logits(tmp_path, top_k):
    def formula(chosen, own):
        advantage = teacher_advantage(
            own["teacher"], own["reference_teacher"], top_k=min(top_k, VOCABULARY)
        )
        return adpa_loss(
            chosen["student"],
            chosen["tokens"],
            own["student"],
            advantage,
            gamma=0.3,
            mask_chosen=chosen["mask"],
            mask_own=own["mask"],
        )

    trainer = make(tmp_path, ADPA(gamma=0.3, top_k=top_k), data=with_own(), double=True)
    assert trainer.train_dataset["own_ids"][:] == OWN
    check_against(trainer, formula)
    log = trainer._metrics["train"]
    assert log["mass"][0] == pytest.approx(1.0) if top_k > 3 else 0 < log["mass"][0] < 1


def test_pld_is_that_of_whole_logits(tmp_path):
    def formula(chosen):
        kept = chosen["mask"] != 0
        parts = (chosen[name][kept] for name in ("student", "teacher", "tokens"))
        return pld_loss(*parts, temperature=2.0)

    check_against(make(tmp_path, PLD(temperature=2.0), double=True), formula)


@pytest.mark.parametrize("gradient", ["unroll", "detach"])
def test_sinkd_is_likelihood_divergence_and_transport(tmp_path, gradient):
    def formula(chosen):
        kept = chosen["mask"] != 0
        student, teacher, tokens = (chosen[x][kept] for x in ("student", "teacher", "tokens"))
        paired = kd_loss(student, teacher, tokens, alpha=0.5, temperature=1.0)
        kl = kd_loss(student, teacher, tokens, alpha=0.0, temperature=1.0)
        nll = 2 * paired - kl
        places = torch.tensor([0, 4, 7, 11])  # four of twelve tokens, evenly spaced
        transport = sinkhorn_kd_loss(student[places], teacher[places], gradient=gradient)
        return nll + 0.2 * kl + 0.7 * transport / 4

    setting = SinKD(weight=0.7, kd_weight=0.2, gradient=gradient, max_rows=4)
    check_against(make(tmp_path, setting, double=True), formula)


def test_blocks_of_any_size_give_the_same_loss_and_gradient():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(9, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(9, (7,), generator=generator)
    leaves = (hidden, weight, bias)
    logits = hidden @ weight.T + bias
    expected = 0.5 * torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    truth = torch.autograd.grad(3 * expected, leaves)
    for size in (1, 3, 7, None):
        parts = [LikelihoodAndDivergence(part, nll=0.5) for part in (targets[:2], targets[2:])]
        loss = row_loss(hidden, LinearHead(weight, bias), parts, chunk_size=size)
        torch.testing.assert_close(loss, expected)
        for found, right in zip(torch.autograd.grad(3 * loss, leaves), truth, strict=True):
            torch.testing.assert_close(found, right)
    with pytest.raises(RuntimeError, match="one backward pass"):
        torch.autograd.grad(loss, leaves)


def test_no_logits_of_the_batch_are_made(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the head was called")

    trainer = make(tmp_path, ADPA(top_k=2), data=with_own())
    for model in (trainer.model, trainer.teacher, trainer.reference_teacher):
        monkeypatch.setattr(model.lm_head, "forward", refuse)
    trainer.objective_loss(trainer.model, batch_of(trainer)).backward()


# The student's own responses, and the file of advantages.


def test_responses_are_sampled_from_the_student_and_end_where_it_ends_them(tmp_path):
    student = model_of(0)
    with torch.no_grad():  # always says the end token
        student.lm_head.weight.zero_()
        student.model.norm.weight.fill_(1.0)
    trainer = make(tmp_path, ADPA(), student=student, max_new_tokens=5)
    own = trainer.train_dataset["own_ids"][:]
    assert all(1 <= len(ids) <= 5 for ids in own)
    assert all(2 not in ids[:-1] for ids in own)
    assert all(ids[-1] == 2 or len(ids) == 5 for ids in own)
    assert len({tuple(ids) for ids in own}) > 1


def test_a_file_of_advantages_gives_the_same_loss_without_teachers(tmp_path):
    path = tmp_path / "some" / "advantages.safetensors"
    setting = ADPA(gamma=0.5, top_k=4)
    written = make(tmp_path, setting, data=with_own(), advantages=path)
    direct = make(tmp_path, setting, data=with_own())
    read = make(tmp_path, setting, advantages=path, teacher=None, reference_teacher=None)
    losses, gradients = [], []
    for trainer in (direct, written, read):
        loss = trainer.objective_loss(trainer.model, batch_of(trainer))
        losses.append(loss.detach())
        gradients.append(gradient_of(trainer, loss))
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        torch.testing.assert_close(loss, losses[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(gradient, gradients[0], rtol=0, atol=1e-5)
    cache = AdvantageCache(path)
    assert (len(cache), cache.top_k, cache.vocab_size) == (4, 4, VOCABULARY)
    assert [cache[row].response for row in range(4)] == OWN
    ids = torch.tensor([read.train_dataset[1]["prompt_ids"] + OWN[1]])
    with torch.no_grad():
        teachers = [m(ids).logits[0, 1:-1].double() for m in (ALIGNED, BEFORE)]
    dense = teacher_advantage(*teachers, top_k=4)
    found = torch.zeros_like(dense).scatter(1, cache[1].advantages.indices,
                                            cache[1].advantages.values.double())  # fmt: skip
    torch.testing.assert_close(found, dense, rtol=0, atol=1e-5)
    assert pickle.loads(pickle.dumps(cache))[3].response == OWN[3]


def test_a_response_that_is_cut_keeps_the_advantages_of_its_tokens(tmp_path):
    path = tmp_path / "advantages.safetensors"
    make(tmp_path, ADPA(top_k=2), data=with_own(), advantages=path)
    short = make(tmp_path, ADPA(top_k=2), advantages=path, teacher=None, max_length=6)
    own = batch_of(short)["own"]
    assert own["completion_mask"].sum(1).tolist() == [3, 2, 2, 1]
    cache = AdvantageCache(path)
    torch.testing.assert_close(
        own["values"][2][own["completion_mask"][2] != 0], cache[2].advantages.values[:2]
    )


def test_a_file_that_does_not_belong_to_the_data_is_reported(tmp_path):
    path = tmp_path / "advantages.safetensors"
    make(tmp_path, ADPA(top_k=2), data=with_own(), advantages=path)
    with pytest.raises(ValueError, match=r"a response for each of 2 rows of the data, got 4"):
        make(tmp_path, ADPA(), data=PAIRS.select([0, 1]), advantages=path)
    with pytest.raises(ValueError, match=r"got another prompt in row 1"):
        make(tmp_path, ADPA(), data=PAIRS.select([0, 2, 1, 3]), advantages=path)
    larger = tiny_tokenizer([*SYMBOLS, "new"])
    student = tiny_lm(larger, hidden_size=16, num_heads=2)
    with pytest.raises(ValueError, match=r"one vocabulary, got 17 tokens and 16"):
        make(
            tmp_path,
            ADPA(),
            student=student,
            advantages=path,
            processing_class=larger,
            teacher=None,
            reference_teacher=None,
        )
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match="must be a file of advantages"):
        AdvantageCache(other)


def test_rows_that_cannot_be_stored_are_reported(tmp_path):
    path = tmp_path / "x.safetensors"
    good = TokenAdvantages(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3))
    for rows, message in (
        ([], "rows must not be empty"),
        ([([1], [], good)], "row 0: the student's response is an empty completion"),
        ([([1], [1], good)], r"indices of row 0 must have shape \[1, "),
        ([([1], [1, 2], good._replace(values=torch.full((2, 3), math.nan)))], "row 0: .*got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            AdvantageCache.write(path, rows, vocab_size=9)
    assert not path.exists()


# Training.

OBJECTIVES = {
    "pld": PLD(),
    "sinkd": SinKD(weight=0.5),
    "dckd": DCKD(alpha=0.5),
    "adpa": ADPA(gamma=0.5, top_k=5),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_each_objective_trains_to_the_end(tmp_path, name, lora):
    settings = {}
    if lora:
        adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        settings = {"peft_config": adapter, "gradient_checkpointing": True, "bf16": True}
    trainer = make(
        tmp_path,
        OBJECTIVES[name],
        eval_dataset=PAIRS,
        eval_strategy="steps",
        eval_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_new_tokens=3,
        advantages=str(tmp_path / "advantages.safetensors") if name == "adpa" else None,
        **settings,
    )
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    log = [row for row in trainer.state.log_history if "loss" in row]
    assert len(log) == 3
    assert log[-1]["loss"] < log[0]["loss"]
    evaluated = next(row for row in trainer.state.log_history if "eval_loss" in row)
    assert math.isfinite(evaluated["eval_loss"])
    if name != "pld":
        assert {"nll", "learning_rate"} <= log[0].keys()
        assert "eval_nll" in evaluated
    changed = {
        key for key, value in trainer.model.state_dict().items() if not value.equal(before[key])
    }
    assert changed
    assert all("lora" in key for key in changed) or not lora


def test_micro_batches_count_alike(tmp_path):
    losses = []
    for rows, steps in ((2, 2), (1, 4)):
        data = Dataset.from_dict({"prompt": ["1 ="] * 4, "completion": [" 2"] * 4})
        trainer = make(
            tmp_path,
            PLD(),
            data=data,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=steps,
            max_steps=1,
        )
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    fresh = make(tmp_path, PLD(), data=data)
    assert losses[0] == pytest.approx(fresh.objective_loss(fresh.model, batch).item(), rel=1e-5)


def test_conversations_are_split_by_their_template(tmp_path):
    tokenizer = tiny_tokenizer(SYMBOLS)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% if m['role'] == 'assistant' %}"
        "{{ eos_token }} {% endif %}{% endfor %}{% if add_generation_prompt %}= {% endif %}"
    )
    row = {
        "prompt": [{"role": "user", "content": "1 2 ="}],
        "chosen": [{"role": "assistant", "content": "= 3"}],
        "rejected": [{"role": "assistant", "content": "= 4"}],
    }
    trainer = make(tmp_path, DCKD(), data=Dataset.from_list([row]), processing_class=tokenizer)
    tokens = trainer.train_dataset[0]
    assert tokenizer.convert_ids_to_tokens(tokens["prompt_ids"]) == ["1", "2", "=", "="]
    assert tokenizer.convert_ids_to_tokens(tokens["chosen_ids"]) == ["3", "<eos>"]


def test_work_inside_a_wrapper_leaves_the_model_as_it_was():
    inner = torch.nn.Linear(2, 2)
    wrapped = torch.nn.Sequential(inner)
    assert through(wrapped, inner, lambda x: inner(x).sum(), torch.ones(2)).dim() == 0
    assert "forward" not in inner.__dict__
    with pytest.raises(ZeroDivisionError):
        through(wrapped, inner, lambda x: 1 / 0, torch.ones(2))
    assert wrapped(torch.ones(2)).shape == (2,)


# Errors.


def with_row(**row):
    return Dataset.from_dict({key: [*ROWS[key], row.get(key, "1 =")] for key in ROWS})


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"teacher": None}, ValueError, r"teacher must be given for DCKD\(alpha=1.0\)"),
        ({"advantages": "x"}, ValueError, "advantages must be None for DCKD"),
        ({"objective": 3}, TypeError, r"objective must be like DCKD\(\), got int"),
        (
            {"objective": ADPA(), "reference_teacher": None},
            ValueError,
            "teacher and reference_teacher must both be given for advantages, or a file",
        ),
        (
            {"objective": ADPA(), "teacher": None, "advantages": "not-there"},
            ValueError,
            "must both be given for advantages, as there is no file not-there yet",
        ),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ({"data": PAIRS.remove_columns("prompt")}, ValueError, "must have a column 'prompt'"),
        ({"data": PAIRS.remove_columns("rejected")}, ValueError, "must have a column 'rejected'"),
        ({"data": with_row(chosen="")}, ValueError, "row 4: 'chosen' must not be empty"),
        (
            {"data": with_row(chosen=" 1", rejected=" 1")},
            ValueError,
            "row 4: .*identical responses of 2 tokens",
        ),
        ({"max_length": 3}, ValueError, "row 0: the prompt must leave room .* max_length=3"),
        (
            {"objective": ADPA(), "data": PAIRS.add_column("own_ids", [[3], [], [3], [3]])},
            ValueError,
            "row 1: 'own_ids' is an empty completion",
        ),
        (
            {"data": IterableDataset.from_generator(lambda: iter([]))},
            TypeError,
            "train_dataset must be a datasets.Dataset",
        ),
    ],
)
def test_what_does_not_fit_is_reported(tmp_path, settings, kind, message):
    settings = {"objective": DCKD(), **settings}
    with pytest.raises(kind, match=message):
        make(tmp_path, **settings)


@pytest.mark.parametrize("which", ["teacher", "reference_teacher"])
def test_a_teacher_of_another_vocabulary_is_reported(tmp_path, which):
    other = model_of(1, symbols=[*SYMBOLS, "new"])
    with pytest.raises(ValueError, match=rf"share one vocabulary.*{which} 17"):
        make(tmp_path, ADPA(), **{which: other})


def test_a_head_that_is_not_linear_is_reported(tmp_path):
    teacher = model_of(1)
    teacher.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="teacher must have a linear head"):
        make(tmp_path, DCKD(), teacher=teacher)


def test_a_tokenizer_without_an_end_is_reported(tmp_path):
    tokenizer = tiny_tokenizer(SYMBOLS)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="must be a tokenizer with an end token"):
        make(tmp_path, DCKD(), processing_class=tokenizer)


def test_an_adapter_on_an_adapter_is_reported(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    student = peft.get_peft_model(model_of(0), config)
    with pytest.raises(ValueError, match="peft_config must be None"):
        make(tmp_path, DCKD(), student=student, peft_config=config)
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="must change weights, as LoRA does; got prompt learning"):
        make(tmp_path, DCKD(), peft_config=prompts)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_scores_that_are_nan_are_reported_with_whose_they_are(tmp_path, who):
    broken = model_of(1)
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    trainer = make(tmp_path, DCKD(), **{who: broken})
    with pytest.raises(ValueError, match=rf"scores of the {who} must be finite, got NaN"):
        trainer.train()
    if who == "teacher":
        with pytest.raises(ValueError, match=r"row 0: advantages of the teachers must be finite"):
            make(tmp_path, ADPA(), data=with_own(), teacher=broken, advantages=tmp_path / "x")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: DCKD(alpha=-1.0), "alpha"),
        (lambda: ADPA(gamma=-1.0), "gamma"),
        (lambda: ADPA(top_k=0), "top_k"),
        (lambda: PLD(temperature=0.0), "temperature"),
        (lambda: SinKD(gradient="implicit"), "gradient"),
        (lambda: SinKD(max_rows=0), "max_rows"),
    ],
)
def test_settings_out_of_range_are_reported(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


# Several processes.


def reports(folder, rows):
    """What is logged; responses of equal length make means over tokens equal."""
    letters = [f" {i} {i + 1}" for i in range(8)]
    data = Dataset.from_dict(
        {
            "prompt": [f"{i} =" for i in range(8)],
            "chosen": letters,
            "rejected": letters[::-1],
            "own_ids": [[3 + i, 4 + i, 2] for i in range(8)],
        }
    )
    found = {}
    for name in ("dckd", "adpa", "sampled"):
        sampled = name == "sampled"
        trainer = make(
            folder / name,
            OBJECTIVES["adpa" if sampled else name],
            data=data.remove_columns("own_ids") if sampled else data,
            advantages=folder / name / "advantages.safetensors" if name == "adpa" else None,
            per_device_train_batch_size=rows,
            max_new_tokens=1,
        )
        trainer.train()
        log = [row for row in trainer.state.log_history if "loss" in row]
        keys = ("loss", "grad_norm", "nll", "advantage", "kl_chosen")
        found[name] = {key: [row[key] for row in log if key in row] for key in keys}
        assert len(found[name]["loss"]) == 3
        if sampled:  # other tokens on other ranks
            found[name] = {"responses": [len(ids) for ids in trainer.train_dataset["own_ids"]]}
    return found


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    """On gloo."""
    two = run_in_two(__file__, tmp_path / "two", out=tmp_path / "two.json")
    one = reports(tmp_path, 4)
    assert_same(two, one)


if __name__ == "__main__":
    write(reports(Path(sys.argv[1]), 2), sys.argv[2])
