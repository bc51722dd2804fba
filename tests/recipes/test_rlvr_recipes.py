"""A tiny run of every part of the language-model recipes, and what their methods promise."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from steelyard.lab import Lab, load_recipe
from steelyard.lab.rlvr import Rollouts
from steelyard.recipes import adora, canon, gbpo, token_shift

SMALL = {"steps": 2, "base_steps": 4, "samples": 4}


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path, 0, tensorboard=False, checkpoint_seconds=3600)


def rollouts(lengths, rewards, groups) -> Rollouts:
    lengths = torch.tensor(lengths)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    number = len(lengths)
    return Rollouts(
        torch.zeros(number, 1, dtype=torch.long),
        torch.ones(number, 1).bool(),
        torch.zeros_like(mask, dtype=torch.long),
        mask,
        torch.zeros(mask.shape),
        torch.zeros(number),
        torch.tensor(rewards),
        torch.tensor(groups),
        [{}] * number,
        0,
    )


def judged(recipe) -> set[str]:
    keys = {claim.metric for claim in recipe.CLAIMS}
    return keys | {c.baseline for c in recipe.CLAIMS if isinstance(c.baseline, str)}


def test_canon_runs_every_part_and_gives_what_its_claims_need(lab):
    config = canon.Config(parts=canon.PARTS, prompts=4, early=2, **SMALL)
    metrics = canon.run(config, lab)
    assert judged(canon) <= set(metrics)
    assert metrics["exact/smallest_amplification"] == pytest.approx(2.0, abs=1e-9)


def test_adora_runs_every_part_and_gives_what_its_claims_need(lab):
    metrics = adora.run(adora.Config(parts=adora.PARTS, share_batches=2, prompts=8, **SMALL), lab)
    assert judged(adora) <= set(metrics)
    assert 0.0 <= metrics["share/amplify/hard_share"] <= 1.0


def test_gbpo_runs_every_part_and_gives_what_its_claims_need(lab):
    config = gbpo.Config(
        parts=gbpo.PARTS,
        epochs=(12,),
        grpo_rates=(1e-4,),
        gbpo_rates=(1e-4,),
        bands=(0.2, 0.3),
        prompts=2,
        **SMALL | {"steps": 1},
    )
    assert judged(gbpo) <= set(gbpo.run(config, lab))


def test_token_shift_runs_exact_sort_and_weights(lab):
    config = token_shift.Config(parts=("exact", "sort", "weights"), groups=4, questions=32, **SMALL)
    metrics = token_shift.run(config, lab)
    assert {key for key in judged(token_shift) if key.startswith(("exact/", "sort/"))} <= set(
        metrics
    )
    assert metrics["exact/largest_error"] < 4.5  # 20 draws: one in 7,000 is above by chance


def test_random_weights_of_adora_are_those_of_amplify_dealt_anew():
    batch = rollouts([5, 3, 3, 5, 4, 4], [1.0, 0.0, 1.0, 0.0, 0.0, 1.0], [0, 0, 1, 1, 2, 2])
    dealt, chosen = (adora.prompt_weights(batch, mode) for mode in ("random", "amplify"))
    assert dealt.sort().values.tolist() == chosen.sort().values.tolist()
    assert chosen.tolist() == [2.0, 2.0, 1.0, 1.0, 1.0, 1.0]
    assert adora.prompt_weights(batch, "normalized").mean() == pytest.approx(1.0)


def test_a_length_bonus_favours_long_answers_and_alpha_one_is_dr_grpo():
    batch = rollouts([2, 4], [1.0, 1.0], [0, 0])
    index, log_ratio = torch.arange(2), torch.zeros(2, 4, requires_grad=True)
    canon.dr_grpo(batch, per_token=0.1).loss(log_ratio, index).backward()
    assert log_ratio.grad[0].sum() > 0 > log_ratio.grad[1].sum()
    mixed = rollouts([2, 4, 3, 1], [1.0, 0.0, 1.0, 0.0], [0, 0, 0, 0])
    ratio = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) / 10
    plain = canon.dr_grpo(mixed).loss(ratio, torch.arange(4))
    halves = canon.canon(mixed, mu=0.5).loss(ratio, torch.arange(4))
    assert halves == pytest.approx(plain.item())


def test_weighted_tokens_without_scale_are_grpo():
    batch = rollouts([2, 4], [1.0, 0.0], [0, 0])
    ratio = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)) / 10
    index = torch.arange(2)
    from steelyard.policy import group_relative_advantages, grpo_loss

    advantages = group_relative_advantages(batch.rewards, batch.groups)
    expected = grpo_loss(ratio, advantages, epsilon_high=0.28, mask=batch.mask)
    found = token_shift.weighted_grpo(batch, scale=0.0).loss(ratio, index)
    assert found == pytest.approx(expected.item())


def test_collapse_is_the_fall_from_the_best_stretch():
    rows = [
        {"reward": reward, "out_of_band": 0.0, "approx_kl": 0.0}
        for reward in (0.2, 0.9, 0.9, 0.5, 0.4)
    ]
    found = gbpo.summarise(rows)
    assert found["reward"] == 0.4
    assert found["collapse"] == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["canon", "adora", "gbpo", "token-shift"])
def test_recipes_load_with_forms_of_one_thread(name):
    recipe = load_recipe(name)
    assert recipe.quick.threads == recipe.full.threads == 1
    assert recipe.quick.minutes <= 10
    assert recipe.full.minutes <= 60


def test_checkpoints_need_all_three_arguments():
    with pytest.raises(ValueError, match="belong together"):
        token_shift.Config(model="somewhere")


def test_unknown_parts_are_refused():
    for recipe in (canon, adora, gbpo, token_shift):
        with pytest.raises(ValueError, match="parts"):
            replace(recipe.Config(), parts=("nonsense",))
