"""Two checkpoints on disk, compared as a user would."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from steelyard.cli import main
from steelyard.integrations.token_report import compare_checkpoints, read_prompts
from steelyard.lab.rlvr import base_model, finetune
from steelyard.lab.tasks import sorting
from steelyard.lab.tiny_lm import tiny_lm, tiny_tokenizer

TASK = sorting(3, values=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    model, tokenizer = base_model(
        TASK, seed=0, steps=60, demonstrations=512, hidden_size=16, num_heads=2
    )
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "rl"):
        model.save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
        finetune(model, tokenizer, TASK, generator=generator, demonstrations=512, steps=40)
    rows = TASK.sample(12, generator)
    (path / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (path / "prompts.txt").write_text("\n".join(row["prompt"] for row in rows))
    other = tiny_tokenizer(tuple("abcdefghij"))
    tiny_lm(other, hidden_size=16, num_heads=2).save_pretrained(path / "other")
    other.save_pretrained(path / "other")
    return path


def test_a_checkpoint_has_not_moved_from_itself(folder):
    found = compare_checkpoints(folder / "base", folder / "base", folder / "prompts.txt")
    assert found["share_below"] == 1.0
    assert found["js_p99"] < 1e-6


def test_training_shows_and_the_page_holds_the_answers(folder, tmp_path):
    page = tmp_path / "map.html"
    found = compare_checkpoints(
        folder / "base", folder / "rl", folder / "prompts.jsonl", max_new_tokens=4, heat_map=page
    )
    assert 12 <= found["tokens"] <= 48
    assert found["js_p99"] > 0.01
    assert "Token shift of 8 answers" in page.read_text()
    assert page.with_suffix(".svg").is_file()


def test_the_command_line_analyses_two_checkpoints(folder, tmp_path):
    out = tmp_path / "run"
    models = ("--model", str(folder / "base"), "--rl-model", str(folder / "rl"))
    prompts = ("--prompts", str(folder / "prompts.txt"), "--max-new-tokens", "4")
    code = main(["run", "token-shift", *models, *prompts, "--seeds", "1", "--out", str(out)])
    assert code == 0
    assert (out / "heat_map.html").is_file()
    metrics = json.loads((out / "result.json").read_text())["metrics"]["0"]
    assert metrics["comparison/js_p99"] > 0.01


def test_models_with_other_vocabularies_are_refused(folder):
    with pytest.raises(ValueError, match="must have the same vocabulary"):
        compare_checkpoints(folder / "base", folder / "other", folder / "prompts.txt")


def test_prompts_that_cannot_be_read_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="lacks the field 'question'; it has: prompt, answer"):
        read_prompts(folder / "prompts.jsonl", column="question")
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"prompt": ""}')
    with pytest.raises(ValueError, match=r"record 1 .* must be a text or a list of messages"):
        read_prompts(empty)
    with pytest.raises(ValueError, match="no file at"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(tmp_path / "blank.txt")
