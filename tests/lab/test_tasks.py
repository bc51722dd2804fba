"""Tasks with checkable answers: solutions are right, mistakes are not, the shares are as stated."""

import time

import pytest
import torch

from steelyard.lab.tasks import (
    FillerFamily,
    filler_sorting,
    modular_arithmetic,
    reasoning_gym_task,
    sorting,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gym(name, **config):
    pytest.importorskip("reasoning_gym")
    return reasoning_gym_task(name, seed=1, **config)


MAKERS = {
    "sort7": sorting,
    "sort12": lambda: sorting(12),
    "filler-long": filler_sorting,
    "filler-short": lambda: filler_sorting(direction="short"),
    "filler-none": lambda: filler_sorting(3, direction="none", max_filler=8),
    "filler-mixed": lambda: filler_sorting(direction="mixed"),
    "mod7": modular_arithmetic,
    "mod5x2": lambda: modular_arithmetic(5, 2, operations="+-*"),
    "mod11x6": lambda: modular_arithmetic(11, 6, operations=("*", "-"), scratch=1.0),
    "gym-chain-sum": lambda: gym("chain_sum", max_terms=3),
    "gym-number-sorting": lambda: gym("number_sorting", max_numbers=4),
    "gym-gcd": lambda: gym("gcd"),
    "gym-products": lambda: gym("products", allow_negation=True),
    "gym-basic-arithmetic": lambda: gym("basic_arithmetic", max_terms=3, max_digits=2),
    "gym-text": lambda: gym("spell_backward", form="text"),
}


@pytest.fixture(scope="module", params=list(MAKERS))
def task(request):
    return MAKERS[request.param]()


def columns(rows):
    return {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}


def score(task, rows, completions):
    return task.reward([row["prompt"] for row in rows], completions, **columns(rows))


def test_every_demonstration_is_right_and_fits(task):
    rows = task.sample(256, generator())
    shown = task.demonstrate(rows, generator(1))
    assert score(task, rows, shown) == [1.0] * 256
    if task.symbols:
        known = set(task.symbols)
        assert all(set(row["prompt"].split()) <= known for row in rows)
        assert all(set(text.split()) <= known for text in shown)
        assert all(len(text.split()) < task.max_new_tokens for text in shown)


def test_mixed_demonstrations_are_right_only_part_of_the_time(task):
    rows = task.sample(256, generator())
    shown = task.demonstrate_mixed(rows, generator(1))
    right = sum(value == 1.0 for value in score(task, rows, shown))
    assert 0.1 * 256 < right < 0.9 * 256


def test_same_generator_gives_the_same_rows(task):
    assert task.sample(20, generator(3)) == task.sample(20, generator(3))
    assert task.sample(20, generator(3)) != task.sample(20, generator(4))


def test_garbage_and_silence_earn_nothing(task):
    rows = task.sample(3, generator())
    for text in ("", ". .", "= =", "zebra"):
        assert max(score(task, rows, [text] * 3)) < 0.5


def test_a_longer_text_than_the_room_is_wrong(task):
    if task.name.startswith("reasoning-gym"):
        pytest.skip("its verifier decides; for it 1.50 is 1.5")
    rows = task.sample(64, generator())
    shown = [
        (text.split() + [task.symbols[0]] * task.max_new_tokens)[: task.max_new_tokens]
        for text in task.demonstrate(rows, generator(1))
    ]
    scores = score(task, rows, [" ".join(words) for words in shown])
    assert 1.0 not in scores


def test_wrong_lengths_are_refused(task):
    rows = task.sample(3, generator())
    shown = task.demonstrate(rows, generator())
    prompts, rest = [row["prompt"] for row in rows], columns(rows)
    with pytest.raises(ValueError, match="prompts must have one entry for each of the 3"):
        task.reward(prompts[:2], shown, **rest)
    name = "index" if "index" in rest else "answer"
    with pytest.raises(ValueError, match=f"{name} must have one entry for each of the 3"):
        task.reward(prompts, shown, **rest | {name: rest[name][:2]})
    with pytest.raises(TypeError, match="completions must be texts or lists of messages"):
        task.reward(prompts, [1, 2, 3], **rest)
    with pytest.raises(ValueError, match="count must be >= 1"):
        task.sample(0, generator())


def test_chat_messages_and_extra_columns_of_trl_are_read(task):
    rows = task.sample(3, generator())
    chats = [
        [{"role": "assistant", "content": text}] for text in task.demonstrate(rows, generator())
    ]
    prompts = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    scores = task.reward(
        prompts=prompts,
        completions=chats,
        completion_ids=[[1]] * 3,
        trainer_state=None,
        **columns(rows),
    )
    assert scores == [1.0] * 3


@pytest.mark.parametrize("name", ["sort7", "filler-mixed", "mod7"])
def test_a_batch_is_scored_in_milliseconds(name):
    task = MAKERS[name]()
    rows = task.sample(256, generator())
    shown = task.demonstrate(rows, generator())
    times = []
    for _ in range(5):
        start = time.perf_counter()
        score(task, rows, shown)
        times.append(time.perf_counter() - start)
    assert min(times) < 5e-3


def right_share_by_filler(task, count=12000, family=None):
    """Share of right mixed demonstrations for each number of fillers."""
    rows = task.sample(count, generator(5))
    rows = [row for row in rows if family in (None, row["family"])]
    shown = task.demonstrate_mixed(rows, generator(6))
    right = torch.tensor(score(task, rows, shown))
    filler = torch.tensor([text.count(".") for text in shown])
    return [float(right[filler == k].mean()) for k in range(int(filler.max()) + 1)]


# Each share below is a mean of at least 900 draws: its standard error is at most 0.017, and 0.06
# is 3.5 of them, so a wrong alarm in one of 30 shares has a chance below 2 %. Seeds are fixed.
TOLERANCE = 0.06


def test_sorting_is_right_at_the_stated_share():
    task = sorting(4, right=0.3)
    rows = task.sample(12000, generator())
    share = sum(score(task, rows, task.demonstrate_mixed(rows, generator(1)))) / 12000
    assert share == pytest.approx(0.3, abs=TOLERANCE / 3)


def test_long_and_short_directions_mirror_each_other():
    rising = [0.10 + 0.08 * k for k in range(6)]
    long = right_share_by_filler(filler_sorting(direction="long"))
    short = right_share_by_filler(filler_sorting(direction="short"))
    level = right_share_by_filler(filler_sorting(direction="none"))
    assert long == pytest.approx(rising, abs=TOLERANCE)
    assert short == pytest.approx(rising[::-1], abs=TOLERANCE)
    assert level == pytest.approx([0.3] * 6, abs=TOLERANCE)


def test_mixed_difficulty_has_a_hard_long_and_an_easy_short_family():
    task = filler_sorting(direction="mixed")
    hard = right_share_by_filler(task, 24000, "hard")
    easy = right_share_by_filler(task, 24000, "easy")
    assert hard == pytest.approx([0.10 + 0.08 * k for k in range(6)], abs=TOLERANCE)
    assert easy == pytest.approx([1.0 - 0.08 * k for k in range(6)], abs=TOLERANCE)
    rows = task.sample(2000, generator())
    assert all(row["prompt"].split()[0] == row["family"] for row in rows)
    assert sum(row["family"] == "hard" for row in rows) == pytest.approx(1000, abs=100)


def test_families_can_be_given():
    task = filler_sorting(
        3,
        max_filler=1,
        families=[FillerFamily("a", (0.0, 1.0), 3.0), FillerFamily("b", (1.0, 0.0))],
    )
    assert right_share_by_filler(task, 1000, "a") == [0.0, 1.0]
    assert right_share_by_filler(task, 1000, "b") == [1.0, 0.0]


def test_filler_reward_looks_at_the_numbers_and_the_limit_only():
    task = filler_sorting(3, max_filler=2)
    texts = ["1 2 3", ". 1 2 3", ". . 1 2 3", ". . . 1 2 3", "1 . 2 3", "1 2 3 .", ": 1 2 3"]
    scores = task.reward([""] * 7, texts, answer=["1 2 3"] * 7)
    assert scores == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_mixed_sums_slip_and_scratch_helps():
    task = modular_arithmetic(7, 4, scratch=0.5, right=0.9, right_direct=0.3)
    rows = task.sample(8000, generator())
    shown = task.demonstrate_mixed(rows, generator(1))
    scores = torch.tensor(score(task, rows, shown))
    written = torch.tensor([text.index("=") > 0 for text in shown])
    assert float(written.float().mean()) == pytest.approx(0.5, abs=TOLERANCE)
    assert float(scores[written].mean()) == pytest.approx(0.9, abs=TOLERANCE)
    assert float(scores[~written].mean()) == pytest.approx(0.3, abs=TOLERANCE)


def test_sums_agree_with_python():
    task = modular_arithmetic(11, 3, operations=("+", "-", "*"), scratch=1.0)
    for row, text in zip(
        rows := task.sample(200, generator()), task.demonstrate(rows, generator()), strict=True
    ):
        a, f, b, g, c, mark = row["prompt"].split()
        first = eval(f"({a} {f} {b}) % 11")
        assert mark == ":"
        assert text == f"{first} = {eval(f'({first} {g} {c}) % 11')}"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sorting(1), "size must be >= 2"),
        (lambda: sorting(5, values=4), "values must be >= 5"),
        (lambda: sorting(right=1.5), "right must be"),
        (lambda: filler_sorting(direction="up"), "direction must be one of"),
        (lambda: filler_sorting(slope=0.3), "probability in family"),
        (lambda: filler_sorting(families=[]), "families must not be empty"),
        (lambda: filler_sorting(families=[FillerFamily("a", (0.5,))]), "must have 6 probab"),
        (lambda: filler_sorting(families=[FillerFamily("3", (0.5,) * 6)]), "distinct names"),
        (lambda: filler_sorting(families=[FillerFamily("a", (0.5,) * 6, 0.0)]), "share of family"),
        (lambda: modular_arithmetic(1), "modulus must be >= 2"),
        (lambda: modular_arithmetic(operations="/"), "operations must be one of"),
        (lambda: modular_arithmetic(operations=()), "operations must not be empty"),
        (lambda: modular_arithmetic(scratch=-0.1), "scratch must be"),
        (lambda: gym("chain_sum", form="speech"), "form must be one of"),
        (lambda: gym("sudoku"), "dataset_name must be one of 'chain_sum'"),
        (lambda: gym("no_such_set", form="text"), "does not make 'no_such_set'"),
        (lambda: gym("chain_sum", max_termz=3), "max_termz"),
        (lambda: gym("chain_sum", max_new_tokens=0), "max_new_tokens must be >= 1"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_free_text_answers_are_read_from_their_tags():
    task = gym("chain_sum", form="text", max_terms=2)
    rows = task.sample(4, generator())
    answers = [row["answer"] for row in rows]
    assert score(task, rows, [f"think\n<answer> {a} </answer> done" for a in answers]) == [1.0] * 4
    assert (
        score(task, rows, [f"<answer>x</answer><answer>{a}</answer>" for a in answers]) == [1] * 4
    )


def test_exact_gives_no_part_of_the_mark():
    settings = {"form": "text", "max_terms": 2}
    lenient, strict = (gym("chain_sum", exact=exact, **settings) for exact in (False, True))
    rows = lenient.sample(4, generator())
    near = [row["answer"] + "7" for row in rows]
    assert all(0.0 < value < 1.0 for value in score(lenient, rows, near))
    assert score(strict, rows, near) == [0.0] * 4
    assert score(strict, rows, [row["answer"] for row in rows]) == [1.0] * 4


def test_grpo_trainer_takes_a_task_as_it_is(tmp_path):
    pytest.importorskip("transformers")
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from steelyard.lab.tiny_lm import tiny_lm, tiny_tokenizer

    task = filler_sorting(2, max_filler=1, direction="mixed")
    tokenizer = tiny_tokenizer(task.symbols)
    model = tiny_lm(tokenizer, hidden_size=16, num_heads=2)
    before = [p.detach().clone() for p in model.parameters()]
    seen = []

    def reward(prompts, completions, **kwargs):
        values = task.reward(prompts, completions, **kwargs)
        seen.append((prompts, completions, values))
        return [value + 0.1 * len(text) for value, text in zip(values, completions, strict=True)]

    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=[task.reward, reward],
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(task.sample(8, generator())),
        args=trl.GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=task.max_new_tokens,
            report_to="none",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            learning_rate=1e-2,
            disable_tqdm=True,
        ),
    )
    trainer.train()
    prompts, completions, values = seen[0]
    assert set(prompts[0].split()) <= set(task.symbols)
    assert all(set(text.split()) <= {*task.symbols, "<bos>"} for text in completions)
    assert set(values) <= {0.0, 1.0}
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
