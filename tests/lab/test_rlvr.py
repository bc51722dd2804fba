"""The shared loop of reinforcement learning with verifiable rewards."""

import dataclasses

import pytest
import torch

pytest.importorskip("transformers")

from steelyard.lab.rlvr import (
    RLVRLearner,
    RLVRSettings,
    Rollouts,
    Update,
    base_copies,
    evaluate,
    finetune,
    score,
    summarise_rewards,
)
from steelyard.lab.tasks import filler_sorting, sorting
from steelyard.policy import group_relative_advantages, grpo_loss

TASK = sorting(3, values=5)
SMALL = {"steps": 150, "demonstrations": 512, "hidden_size": 16, "num_heads": 2}
SETTINGS = RLVRSettings(prompts=4, samples=4, minibatches=2, epochs=2, learning_rate=1e-3)


@pytest.fixture(scope="module")
def copies():
    return base_copies(TASK, seed=0, **SMALL)


def objective(rollouts: Rollouts) -> Update:
    advantages = group_relative_advantages(rollouts.rewards, rollouts.groups)

    def loss(log_ratio: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return grpo_loss(log_ratio, advantages[index], mask=rollouts.mask[index])

    return Update(loss, {"answers": float(len(rollouts.rewards))})


def learner(copies, objective=objective, settings=SETTINGS, seed=0) -> RLVRLearner:
    model, tokenizer = copies()
    return RLVRLearner(model, tokenizer, TASK, objective, settings, seed=seed)


def test_a_restored_learner_goes_on_with_the_same_numbers(copies):
    unbroken = learner(copies)
    rows = [unbroken.advance() for _ in range(3)]
    first = learner(copies)
    first.advance()
    second = learner(copies, seed=5)
    second.load_state_dict(first.state_dict())
    assert [second.advance() for _ in range(2)] == rows[1:]


def test_the_first_log_ratio_of_a_batch_is_zero(copies):
    seen = []

    def spy(rollouts: Rollouts) -> Update:
        inner = objective(rollouts).loss

        def loss(log_ratio: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            seen.append(log_ratio.detach().abs().max().item())
            return inner(log_ratio, index)

        return Update(loss)

    learner(copies, spy, dataclasses.replace(SETTINGS, epochs=1, minibatches=1)).advance()
    assert seen[0] < 1e-5


def test_minibatches_partition_the_batch_and_keep_groups_whole(copies):
    indices = []

    def spy(rollouts: Rollouts) -> Update:
        def loss(log_ratio: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            indices.append((index, rollouts.groups[index]))
            return log_ratio.sum() * 0

        return Update(loss)

    learner(copies, spy).advance()
    assert len(indices) == 4
    for epoch in (indices[:2], indices[2:]):
        assert torch.cat([index for index, _ in epoch]).sort().values.tolist() == list(range(16))
    for _, groups in indices:
        assert groups.unique(return_counts=True)[1].tolist() == [4, 4]


def test_training_raises_the_reward(copies):
    settings = RLVRSettings(prompts=16, samples=8, learning_rate=2e-3)
    trained = learner(copies, settings=settings)
    rows = [trained.advance() for _ in range(12)]
    first, last = (sum(row["reward"] for row in part) for part in (rows[:3], rows[-3:]))
    assert last > 1.3 * first > 0


def test_a_loss_that_is_not_finite_stops_with_its_value(copies):
    def broken(rollouts: Rollouts) -> Update:
        return Update(lambda log_ratio, index: log_ratio.sum() * torch.nan)

    with pytest.raises(FloatingPointError, match="loss is nan"):
        learner(copies, broken).advance()


def test_families_are_logged_apart():
    task = filler_sorting(3, direction="mixed")
    rows = [{"prompt": "", "family": "hard"}, {"prompt": "", "family": "easy"}] * 2
    rollouts = Rollouts(
        *(torch.zeros(4, 1),) * 2,
        torch.zeros(4, 3),
        torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0]]).bool(),
        torch.zeros(4, 3),
        torch.zeros(4),
        torch.tensor([1.0, 0.0, 0.0, 1.0]),
        torch.arange(4),
        rows,
        0,
    )
    row = summarise_rewards(rollouts)
    assert row["reward/hard"] == 0.5
    assert row["length/hard"] == 2.5
    assert row["length/easy"] == 1.0
    assert task.symbols[-2:] == ("hard", "easy")


def test_log_of_the_objective_reaches_the_row(copies):
    assert learner(copies).advance()["answers"] == 16.0


def test_supervised_training_on_right_answers_makes_answers_right(copies):
    model, tokenizer = copies()
    generator = torch.Generator().manual_seed(1)
    rows = TASK.sample(64, generator)
    before = evaluate(model, tokenizer, TASK, rows, generator=generator).accuracy
    finetune(model, tokenizer, TASK, generator=generator, demonstrations=512, steps=120)
    after = evaluate(model, tokenizer, TASK, rows, temperature=0.0)
    assert after.accuracy > max(0.6, before)
    assert 3 <= after.length <= 5


@pytest.mark.parametrize(
    ("rewards", "message"), [([1.0], "must give 2 numbers"), ([1.0, float("nan")], "is NaN")]
)
def test_wrong_rewards_name_the_task(copies, rewards, message):
    _, tokenizer = copies()
    task = dataclasses.replace(TASK, reward=lambda prompts, completions, **_: rewards)
    rows = TASK.sample(2, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=f"reward of task sort3 {message}"):
        score(task, tokenizer, rows, torch.full((2, 2), 3), torch.ones(2, 2).bool())


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"prompts": 0}, ValueError),
        ({"prompts": 4, "minibatches": 3}, ValueError),
        ({"samples": 1.5}, TypeError),
        ({"learning_rate": 0.0}, ValueError),
        ({"optimizer": "lion"}, ValueError),
    ],
)
def test_settings_out_of_range_are_named(wrong, error):
    with pytest.raises(error, match=list(wrong)[-1]):
        RLVRSettings(**wrong)
