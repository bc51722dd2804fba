"""The DPO adapter: with KL it is TRL's sigmoid loss to the last digits, and what it corrects.

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
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, models, pre_tokenizers

from steelyard.divergences import (
    JENSEN_SHANNON,
    JENSEN_SHANNON_DOUBLE,
    KL,
    PEARSON_CHI2,
    REVERSE_KL,
    TOTAL_VARIATION,
    alpha_divergence,
)
from steelyard.integrations.trl import DPOTrainer, FDPOTrainer, SparsePO
from steelyard.integrations.trl._preference_rows import check_tokenized_pairs
from steelyard.preference import (
    LearnedTokenMask,
    activation_mask,
    f_dpo_loss,
    idealized_ranking_accuracy,
    implicit_reward,
    preference_calibration_error,
    ranking_accuracy,
    sparse_po_loss,
    sparse_po_reward,
    tdpo1_loss,
)
from two_processes import assert_same, run_in_two, write

WORDS = ["<pad>", "<eos>", *map(str, range(26)), "=", "<unk>"]
ROWS = {
    "prompt": ["1 2 =", "3 =", "7 8 9 =", "4 4 =", "5 ="],
    "chosen": [" 1 2", " 3", " 7 8 9 9", " 4", " 5 5 5"],
    "rejected": [" 2", " 4 4 4", " 9 8", " 5 6", " 1"],
}
PAIRS = Dataset.from_dict(ROWS)


def tiny_tokenizer():
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("<eos>", "isolated"), pre_tokenizers.WhitespaceSplit()]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def tiny_model(seed=0, *, vocabulary=30):
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
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
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config)


OURS = ("divergence", "sparse", "fused_head", "rater_share", "idealized_betas", "ref_model")
OURS = (*OURS, "eval_dataset", "peft_config", "optimizers")


def make(tmp_path, kind=DPOTrainer, *, model=None, data=PAIRS, **settings):
    ours = {name: settings.pop(name) for name in OURS if name in settings}
    if not {"peft_config", "ref_model"} & ours.keys():
        ours["ref_model"] = tiny_model(7)
    args = trl.DPOConfig(
        output_dir=str(tmp_path / "out"),
        **{
            "per_device_train_batch_size": 5,
            "per_device_eval_batch_size": 2,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "seed": 3,
            **settings,
        },
    )
    trainer = kind(
        tiny_model() if model is None else model,
        args=args,
        train_dataset=data,
        processing_class=tiny_tokenizer(),
        **ours,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def batch_of(trainer):
    return trainer.data_collator([trainer.train_dataset[row] for row in range(5)])


def loss_and_gradient(trainer, batch=None):
    trainer.model.zero_grad()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch_of(trainer) if batch is None else batch)
    loss.backward()
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return loss.detach(), torch.cat([g.flatten() for g in gradients])


def logits_of(model, batch):
    with torch.no_grad():
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return output.logits[:, :-1].double()


def token_logprobs(model, batch):
    """Log-probabilities of the tokens of responses, by the plain formula."""
    logprobs = logits_of(model, batch).log_softmax(-1)
    found = logprobs.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return found * batch["completion_mask"][:, 1:]


def log_ratios(trainer, batch):
    ratio = token_logprobs(trainer.model, batch) - token_logprobs(trainer.ref_model, batch)
    return ratio.sum(1).chunk(2)


def close(ours, theirs, tolerance=1e-6):
    """Equal to `tolerance` of the largest entry, which is what float32 sums can promise."""
    scale = max(1.0, float(torch.as_tensor(theirs).abs().max()))
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale, check_dtype=False)


# TRL's losses.

TYPES = {
    "reverse_kl": KL,
    "forward_kl": REVERSE_KL,
    "js_divergence": JENSEN_SHANNON_DOUBLE,
    "alpha_divergence": alpha_divergence(0.5),
}


@pytest.mark.parametrize("named", TYPES)
@pytest.mark.parametrize("fused", [False, True], ids=["trl-kernel", "our-kernel"])
def test_each_divergence_of_trl_has_its_loss_and_gradient(tmp_path, named, fused):
    theirs = make(tmp_path, trl.DPOTrainer, f_divergence_type=named, beta=0.05)
    loss, gradient = loss_and_gradient(theirs)
    assert gradient.abs().max() > 1e-3
    for settings in ({"divergence": TYPES[named]}, {"f_divergence_type": named}):
        ours = make(tmp_path, fused_head=fused, beta=0.05, **settings)
        our_loss, our_gradient = loss_and_gradient(ours)
        close(our_loss, loss)
        close(our_gradient, gradient)
    for key in theirs._metrics["train"]:
        if not key.startswith("rewards"):
            close(ours._metrics["train"][key], theirs._metrics["train"][key], 2e-6)
    assert ours._metrics["train"]["mean_token_accuracy"][0] < 1
    expected = f_dpo_loss(*log_ratios(ours, batch_of(ours)), beta=0.05, divergence=TYPES[named])
    close(our_loss, expected)


def test_training_ends_with_the_weights_and_the_log_of_trl(tmp_path):
    # SGD, as Adam would blow up the rounding errors of gradients near 0.
    settings = {
        "optim": "sgd",
        "learning_rate": 0.3,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    theirs, ours = (make(tmp_path, kind, **settings) for kind in (trl.DPOTrainer, FDPOTrainer))
    for trainer in (theirs, ours):
        trainer.train()
    start = tiny_model().state_dict()
    moved = [(v - start[k]).abs().max() for k, v in theirs.model.state_dict().items()]
    assert max(moved) > 1e-2
    for name, value in theirs.model.state_dict().items():
        close(ours.model.state_dict()[name], value, 1e-5)
    timed = ("time", "runtime", "per_second")
    for mine, other in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        for key in [key for key in other if not any(word in key for word in timed)]:
            close(mine[key], other[key], 1e-5)
    assert {"health/chosen_change", "health/both_fall"} <= ours.state.log_history[0].keys()


def test_other_losses_of_trl_are_left_as_they_are(tmp_path):
    for settings in (
        {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.5]},
        {"ld_alpha": 0.5},
        {"use_weighting": True},
    ):
        pair = [make(tmp_path, kind, **settings) for kind in (trl.DPOTrainer, DPOTrainer)]
        (loss, gradient), (our_loss, our_gradient) = map(loss_and_gradient, pair)
        close(our_loss, loss)
        close(our_gradient, gradient)


def test_precomputed_log_probabilities_of_the_reference_give_the_same_loss(tmp_path):
    expected, gradient = loss_and_gradient(make(tmp_path, divergence=JENSEN_SHANNON))
    settings = {"precompute_ref_log_probs": True, "divergence": JENSEN_SHANNON}
    found, our_gradient = loss_and_gradient(make(tmp_path, **settings))
    close(found, expected)
    close(our_gradient, gradient)


# What is corrected.


class FarReference(transformers.LlamaForCausalLM):
    """A reference whose head is so sharp that log ratios are hundreds of nats."""


def far_reference():
    model = tiny_model(7)
    with torch.no_grad():
        model.lm_head.weight *= 40
    return model


def test_trl_overflows_at_log_ratios_at_which_we_are_finite(tmp_path):
    # The policy is much likelier than the reference or much less: TRL's 1 - exp(-log ratio) of
    # -100 and less is -inf, and the difference of two of these is NaN.
    reference = functools.partial(tiny_model, 7)
    settings = {"f_divergence_type": "forward_kl"}
    results = []
    for kind in (trl.DPOTrainer, DPOTrainer):
        model = far_reference()
        trainer = make(tmp_path, kind, model=model, ref_model=reference(), **settings)
        results.append(loss_and_gradient(trainer))
    (loss, gradient), (our_loss, our_gradient) = results
    assert not loss.isfinite() or not gradient.isfinite().all()
    assert our_loss.isfinite()
    assert our_gradient.isfinite().all()
    assert our_gradient.abs().max() > 0


def test_trl_has_no_gradient_at_log_ratios_at_which_we_pull(tmp_path):
    # TRL clamps the exponent of an alpha-divergence at 80: beyond, the loss is flat.
    far = torch.tensor([-300.0], requires_grad=True)
    clamped = (torch.exp((-0.5 * far).clamp(max=80.0)) - 1) * -2
    (flat,) = torch.autograd.grad(clamped, far)
    assert flat == 0
    reward = implicit_reward(far, beta=1.0, divergence=alpha_divergence(0.5))
    (pull,) = torch.autograd.grad(reward, far)
    assert pull > 0
    results = []
    for kind in (trl.DPOTrainer, DPOTrainer):
        model = far_reference()
        with torch.no_grad():
            model.lm_head.weight *= 4
        settings = {"f_divergence_type": "alpha_divergence", "ref_model": tiny_model(7)}
        results.append(loss_and_gradient(make(tmp_path, kind, model=model, **settings)))
    assert results[0][1].abs().max() < results[1][1].abs().max()


def test_trl_takes_orders_for_which_the_method_does_not_hold(tmp_path):
    # Order 2 is half of Pearson's chi-square: f'(0) = -1, so the optimum may leave responses out.
    settings = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 2.0}
    assert loss_and_gradient(make(tmp_path, trl.DPOTrainer, **settings))[0].isfinite()
    with pytest.raises(ValueError, match=r"f_alpha_divergence_coef must be at most 1, got 2.0.*f'"):
        make(tmp_path, **settings)


def test_double_precision_is_kept_by_our_kernel_and_not_by_that_of_trl(tmp_path):
    errors = {}
    for kind in (trl.DPOTrainer, DPOTrainer):
        settings = {"model": tiny_model().double(), "ref_model": tiny_model(7).double()}
        settings |= {"fused_head": True} if kind is DPOTrainer else {}
        trainer = make(tmp_path, kind, **settings)
        loss, _ = loss_and_gradient(trainer)
        expected = f_dpo_loss(*log_ratios(trainer, batch_of(trainer)))
        errors[kind] = float((loss.double() - expected).abs())
    assert errors[DPOTrainer] < 1e-10 < errors[trl.DPOTrainer]


def test_rewards_are_those_of_the_divergence(tmp_path):
    # TRL logs beta log u for every divergence, which is the implicit reward of KL alone.
    trainer = make(tmp_path, divergence=JENSEN_SHANNON_DOUBLE, beta=0.2)
    loss_and_gradient(trainer)
    ratios = log_ratios(trainer, batch_of(trainer))
    settings = {"beta": 0.2, "divergence": JENSEN_SHANNON_DOUBLE}
    chosen, rejected = (implicit_reward(ratio, **settings) for ratio in ratios)
    log = trainer._metrics["train"]
    close(log["rewards/chosen"], [float(chosen.mean())])
    close(log["rewards/margins"], [float((chosen - rejected).mean())])
    close(log["rewards/accuracies"], [float((chosen > rejected).double().mean())])
    assert abs(log["rewards/chosen"][0] - 0.2 * float(ratios[0].mean())) > 1e-2


# SparsePO.


def plain_sparse(trainer, batch):
    """Log ratios and KL(ref || policy) of each token by full logits, and all hidden states."""
    policy, ref = (
        logits_of(model, batch).log_softmax(-1) for model in (trainer.model, trainer.ref_model)
    )
    kl = (ref.exp() * (ref - policy)).sum(-1)
    with torch.no_grad():
        output = trainer.ref_model.base_model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            output_hidden_states=True,
        )
    hidden = torch.stack(output.hidden_states[1:])[:, :, :-1]
    ratio = token_logprobs(trainer.model, batch) - token_logprobs(trainer.ref_model, batch)
    return ratio, kl, hidden, batch["completion_mask"][:, 1:]


@pytest.mark.parametrize("fused", [False, True], ids=["trl-kernel", "our-kernel"])
def test_sparse_po_is_the_plain_formula(tmp_path, fused):
    trainer = make(tmp_path, sparse=SparsePO(activation_mask), fused_head=fused, beta=0.3)
    loss, gradient = loss_and_gradient(trainer)
    ratio, kl, hidden, mask = plain_sparse(trainer, batch_of(trainer))
    weights = activation_mask(hidden, mask).double()
    parts = [part for x in (ratio, kl) for part in x.chunk(2)]
    kept, weighed = mask.chunk(2), weights.chunk(2)
    expected = sparse_po_loss(
        *parts,
        beta=0.3,
        reward_mask_chosen=weighed[0],
        reward_mask_rejected=weighed[1],
        kl_mask_chosen=weighed[0],
        kl_mask_rejected=weighed[1],
        mask_chosen=kept[0],
        mask_rejected=kept[1],
    )
    close(loss, expected)
    assert gradient.abs().max() > 1e-3
    reward = sparse_po_reward(
        ratio, kl, beta=0.3, reward_mask=weights, kl_mask=weights, mask=mask
    ).chunk(2)
    log = trainer._metrics["train"]
    close(log["rewards/chosen"], [float(reward[0].mean())])
    close(log["masks/token_kl"], [float((kl * mask).sum() / mask.sum())])
    assert 0 < log["masks/reward_mean"][0] < 1


def test_masks_of_one_are_tdpo1_and_its_gradient_is_that_of_full_logits(tmp_path):
    trainer = make(tmp_path, sparse=SparsePO(), beta=0.3)
    loss, gradient = loss_and_gradient(trainer)
    batch, model = batch_of(trainer), trainer.model
    mask = batch["completion_mask"][:, 1:]
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    policy = output.logits[:, :-1].log_softmax(-1)
    ref = logits_of(trainer.ref_model, batch).float().log_softmax(-1)
    kl = (ref.exp() * (ref - policy)).sum(-1)
    ratio = (policy - ref).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    parts = [part for x in (ratio, kl) for part in x.chunk(2)]
    kept = mask.chunk(2)
    model.zero_grad()
    expected = tdpo1_loss(*parts, beta=0.3, mask_chosen=kept[0], mask_rejected=kept[1])
    expected.backward()
    close(loss, expected.detach())
    close(gradient, torch.cat([p.grad.flatten() for p in model.parameters()]), 2e-6)


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_learned_masks_train_and_come_back_from_a_checkpoint(tmp_path, lora):
    def setting():
        masks = [LearnedTokenMask(2, 32) for _ in range(2)]
        return SparsePO(*masks, l1_reward=1e-3, l1_kl=1e-3, learning_rate=1e-2)

    def options():
        if not lora:
            return {}
        adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        return {"peft_config": adapter}

    sparse = setting()
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    trainer = make(tmp_path, sparse=sparse, **saving, **options())
    trainer.train()
    log = trainer.state.log_history
    assert all(math.isfinite(row["loss"]) for row in log if "loss" in row)
    assert log[0]["masks/reward_mean"] == 1.0  # as it starts
    assert log[1]["masks/reward_mean"] != 1.0
    assert any(bool((p != q).any()) for p, q in zip(
        sparse.kl_mask.parameters(), LearnedTokenMask(2, 32).parameters(), strict=True
    ))  # fmt: skip
    fresh = setting()
    again = make(tmp_path, sparse=fresh, **saving, **options())
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    for name, module in sparse.modules().items():
        for key, value in module.state_dict().items():
            close(fresh.modules()[name].state_dict()[key], value)
    assert not [name for name, _ in trainer.model.named_parameters() if "mask" in name]


# Evaluation.


def test_evaluation_logs_how_well_all_pairs_are_ranked(tmp_path):
    # Five pairs in batches of two: means are over pairs, not over batches.
    share = [0.9, 0.6, 0.2, 0.8, 1.0]
    data = PAIRS.add_column("votes", share)
    trainer = make(tmp_path, eval_dataset=data, rater_share="votes", divergence=JENSEN_SHANNON)
    metrics = trainer.evaluate()
    batch = batch_of(trainer)
    policy, ref = (
        token_logprobs(model, batch).sum(1).chunk(2) for model in (trainer.model, trainer.ref_model)
    )
    lengths = batch["completion_mask"].sum(1).chunk(2)
    ideal = idealized_ranking_accuracy(ref[0] - ref[1], torch.tensor(share).double())
    margin = [
        implicit_reward(p - r, divergence=JENSEN_SHANNON) for p, r in zip(policy, ref, strict=True)
    ]
    expected = {
        "accuracy": ranking_accuracy(*policy),
        "accuracy_per_token": ranking_accuracy(
            *policy, chosen_lengths=lengths[0], rejected_lengths=lengths[1]
        ),
        "reference_accuracy": ranking_accuracy(*ref),
        "idealized_min": ideal.min,
        "idealized_median": ideal.median,
        "idealized_max": ideal.max,
        "alignment_gap": ideal.median - ranking_accuracy(*policy),
    }
    for name, value in expected.items():
        close(metrics[f"eval_ranking/{name}"], value)
    close(metrics["eval_calibration_error"], preference_calibration_error(margin[0] - margin[1]))
    assert 0 < metrics["eval_ranking/reference_accuracy"] < 1
    assert metrics["eval_ranking/idealized_max"] == 0.8  # one pair has its majority against it
    assert (
        trainer.state.log_history[-1]["eval_ranking/accuracy"] == metrics["eval_ranking/accuracy"]
    )


def test_one_share_for_all_pairs_gives_the_idealized_accuracy(tmp_path):
    trainer = make(tmp_path, eval_dataset=PAIRS, rater_share=1.0, idealized_betas=(0.1,))
    metrics = trainer.evaluate()
    ref = token_logprobs(trainer.ref_model, batch_of(trainer)).sum(1).chunk(2)
    close(
        metrics["eval_ranking/idealized_median"],
        idealized_ranking_accuracy(ref[0] - ref[1], 1.0, (0.1,)).median,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"divergence": JENSEN_SHANNON_DOUBLE},
        {"divergence": REVERSE_KL, "beta": 0.03, "bf16": True},
        {"sparse": SparsePO(activation_mask)},
        {"loss_type": "hinge"},
    ],
    ids=["js", "forward-bf16", "sparse", "trl-hinge"],
)
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_each_objective_trains_to_the_end(tmp_path, settings, lora):
    if lora:
        adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        settings = {**settings, "peft_config": adapter, "gradient_checkpointing": True}
    trainer = make(tmp_path, fused_head=True, eval_dataset=PAIRS, eval_strategy="epoch", **settings)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    log = [row for row in trainer.state.log_history if "loss" in row]
    assert len(log) == 2
    assert log[1]["loss"] < log[0]["loss"]
    if lora:
        tolerance = 2e-2 if "bf16" in settings else 1e-6  # the policy starts as the reference
        start = 1.0 if "loss_type" in settings else math.log(2)
        assert log[0]["loss"] == pytest.approx(start, abs=tolerance)
    changed = {
        key for key, value in trainer.model.state_dict().items() if not value.equal(before[key])
    }
    assert changed
    assert all("lora" in key for key in changed) or not lora
    assert any("eval_ranking/accuracy" in row for row in trainer.state.log_history)


# Errors.


@pytest.mark.parametrize("divergence", [PEARSON_CHI2, TOTAL_VARIATION], ids=lambda d: d.name)
def test_a_divergence_that_can_leave_responses_out_is_refused_with_the_reason(tmp_path, divergence):
    with pytest.raises(ValueError, match=rf"f'\(0\) = -inf, got {divergence.name}.*no mass"):
        make(tmp_path, divergence=divergence)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"divergence": "kl"}, TypeError, "divergence must be an FDivergence, got str"),
        ({"sparse": 3}, TypeError, "sparse must be a SparsePO, got int"),
        ({"divergence": KL, "loss_type": "ipo"}, ValueError, r"loss_type must be \['sigmoid'\]"),
        ({"sparse": SparsePO(), "ld_alpha": 0.5}, ValueError, "ld_alpha must be None with sparse="),
        ({"divergence": KL, "use_weighting": True}, ValueError, "use_weighting must be False"),
        (
            {"divergence": KL, "f_divergence_type": "forward_kl"},
            ValueError,
            "f_divergence_type must be left alone with divergence=",
        ),
        ({"divergence": KL, "sparse": SparsePO()}, ValueError, "divergence must be None"),
        (
            {"sparse": SparsePO(), "precompute_ref_log_probs": True},
            ValueError,
            "precompute_ref_log_probs must be False with sparse=",
        ),
        ({"rater_share": 1.5}, ValueError, "rater_share"),
        ({"f_divergence_type": "renyi"}, ValueError, "f_divergence_type must be .*'renyi'"),
    ],
)
def test_settings_that_do_not_fit_are_reported(tmp_path, settings, kind, message):
    with pytest.raises(kind, match=message):
        make(tmp_path, **settings)


def test_masks_that_do_not_fit_are_reported(tmp_path):
    with pytest.raises(TypeError, match="reward_mask= needs 'age'"):
        SparsePO(lambda age: age)
    with pytest.raises(ValueError, match="l1_kl"):
        SparsePO(l1_kl=-1.0)
    trainer = make(tmp_path, sparse=SparsePO(lambda hidden: hidden[0, :, :, 0][:, 1:]))
    with pytest.raises(ValueError, match="returned by reward_mask= must have shape"):
        loss_and_gradient(trainer)
    learned = SparsePO(LearnedTokenMask(2, 32))
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = make(tmp_path, model=model, sparse=learned, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="must hold the parameters of the token masks"):
        trainer.train()


def test_a_reference_with_another_vocabulary_is_reported(tmp_path):
    with pytest.raises(ValueError, match=r"share one vocabulary.*model 30, ref_model 33"):
        make(tmp_path, ref_model=tiny_model(7, vocabulary=33))


def test_sparse_po_refuses_a_head_that_is_not_linear(tmp_path):
    model = tiny_model()
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="model must have a linear head"):
        make(tmp_path, model=model, sparse=SparsePO())


def with_row(**row):
    return Dataset.from_dict({key: [*ROWS[key], row.get(key, "1 =")] for key in ROWS})


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"chosen": "", "rejected": " 1"}, {}, "train_dataset row 5: 'chosen' must not be empty"),
        ({"chosen": " 1", "rejected": " "}, {}, "row 5: 'rejected' must not be empty, got ' '"),
        ({"chosen": " 1 2", "rejected": " 1 2"}, {}, "train_dataset row 5: .* identical responses"),
        (
            {"chosen": " 1 2 3 4 5", "rejected": " 1 2 3 4 6"},
            {"max_length": 6},
            "row 5: .*identical responses of 4 tokens within max_length=6",
        ),
    ],
)
def test_pairs_without_anything_to_learn_are_reported_by_their_row(
    tmp_path, row, settings, message
):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, data=with_row(**row), **settings)


def test_conversations_and_streams_are_checked_too():
    pair = {"prompt_ids": [3], "chosen_ids": [4, 1], "rejected_ids": [4, 1]}
    stream = IterableDataset.from_generator(lambda: iter([{**pair, "rejected_ids": [5]}, pair]))
    rows = iter(check_tokenized_pairs("train_dataset", stream, None))
    assert next(rows)["rejected_ids"] == [5]
    with pytest.raises(ValueError, match=r"train_dataset row 1: .*identical"):
        next(rows)
    empty = Dataset.from_dict({key: [value] for key, value in {**pair, "chosen_ids": []}.items()})
    with pytest.raises(ValueError, match="row 0: 'chosen' is an empty completion"):
        check_tokenized_pairs("train_dataset", empty, None)


@pytest.mark.parametrize("broken", ["model", "ref_model"])
def test_a_score_that_is_nan_is_reported_with_its_pair(tmp_path, broken):
    models = {"model": tiny_model(), "ref_model": tiny_model(7)}
    with torch.no_grad():
        models[broken].model.embed_tokens.weight[WORDS.index("8")] = math.nan
    trainer = make(tmp_path, **models)
    who = {"model": "policy", "ref_model": "reference"}[broken]
    with pytest.raises(ValueError, match=rf"of the {who} must be finite, got nan .* of pair 2"):
        loss_and_gradient(trainer)


def test_missing_or_wrong_votes_are_reported(tmp_path):
    trainer = make(tmp_path, eval_dataset=PAIRS, rater_share="votes")
    with pytest.raises(ValueError, match="must have the column 'votes'"):
        trainer.evaluate()
    trainer = make(tmp_path, eval_dataset=PAIRS.add_column("votes", [7.0] * 5), rater_share="votes")
    with pytest.raises(ValueError, match=r"'votes' \(rater_share\) must be in \[0, 1\]"):
        trainer.evaluate()


def test_importing_the_adapters_does_not_import_trl():
    code = (
        "import sys, steelyard.integrations.trl as t; assert 'FDPOTrainer' in dir(t);"
        "assert 'trl' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Several processes.


def reports(folder, rows):
    """What is logged with so many pairs for each process."""
    data = Dataset.from_dict({key: [*values[:4], *values[:4]] for key, values in ROWS.items()})
    learned = SparsePO(LearnedTokenMask(2, 32), l1_reward=1e-2, learning_rate=1e-2)
    cases = {"js": {"divergence": JENSEN_SHANNON_DOUBLE}, "sparse": {"sparse": learned}}
    found = {}
    for case, settings in cases.items():
        trainer = make(
            folder,
            data=data,
            fused_head=True,
            eval_dataset=PAIRS,
            per_device_train_batch_size=rows,
            max_steps=3,
            **settings,
        )
        trainer.train()
        log = [row for row in trainer.state.log_history if "loss" in row]
        keys = ("loss", "grad_norm", "rewards/margins", "masks/reward_mean")
        found[case] = {key: [row[key] for row in log if key in row] for key in keys}
        assert len(found[case]["loss"]) == 3
        metrics = trainer.evaluate()
        names = ("accuracy", "idealized_median", "accuracy_per_token")
        found[case]["ranking"] = [metrics[f"eval_ranking/{name}"] for name in names]
    return found


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    """On gloo."""
    two = run_in_two(__file__, tmp_path / "two", out=tmp_path / "two.json")
    one = reports(tmp_path, 4)
    assert_same(two, one)


if __name__ == "__main__":
    write(reports(Path(sys.argv[1]), 2), sys.argv[2])
