"""A tiny run of every part of the preference recipes, and their own mathematics."""

import copy
import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from steelyard.divergences import KL, REVERSE_KL, f_divergence
from steelyard.lab import Lab, load_recipe, real_models
from steelyard.lab.preferences import PairScores
from steelyard.lab.tiny_lm import tiny_lm, tiny_tokenizer
from steelyard.recipes import (
    _f_dpo_tools,
    _ranking_accuracy_tools,
    f_dpg,
    f_dpo,
    ranking_accuracy,
    sparse_po,
)

RECIPES = {
    "f-dpg": f_dpg,
    "f-dpo": f_dpo,
    "sparse-po": sparse_po,
    "ranking-accuracy": ranking_accuracy,
}
SIBLINGS = (_f_dpo_tools, _ranking_accuracy_tools)
WORDS = "the day was good and war is bad we love no peace in this time"
LEXICON = {"good": 1.9, "war": -2.9, "bad": -2.5, "love": 3.2, "peace": 2.5}


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path, 0, tensorboard=False, checkpoint_seconds=3600)


@pytest.fixture(autouse=True)
def small_text(monkeypatch):
    """Sixteen words in place of a data set, and a model of them in place of SmolLM2."""
    words, generator = WORDS.split(), torch.Generator().manual_seed(0)
    picks = torch.randint(len(words), (20, 40), generator=generator)
    texts = [("c", " ".join(words[pick] for pick in row)) for row in picks.tolist()]

    def packaged(name):
        tokenizer = tiny_tokenizer(words)
        return tiny_lm(tokenizer, hidden_size=16, num_heads=2), tokenizer

    for module in (*RECIPES.values(), *SIBLINGS):
        monkeypatch.setattr(module, "newsgroups", lambda split: texts, raising=False)
        monkeypatch.setattr(module, "sentiment_lexicon", lambda name: LEXICON, raising=False)
    for recipe in (f_dpg, f_dpo):
        monkeypatch.setattr(recipe, "load_language_model", packaged)
    for module in (f_dpg, real_models):
        monkeypatch.setattr(module, "question_prompts", lambda tokenizer: ["the day", "we"])


def judged(recipe) -> set[str]:
    keys = {claim.metric for claim in recipe.CLAIMS}
    return keys | {c.baseline for c in recipe.CLAIMS if isinstance(c.baseline, str)}


def drawn(recipe, config, metrics):
    return recipe.figures({"config": vars(config), "metrics": {"0": metrics}})


def test_ranking_accuracy_runs_every_part_and_gives_what_its_claims_need(lab):
    config = ranking_accuracy.Config(
        parts=ranking_accuracy.PARTS,
        pairs=32,
        held_out=32,
        updates=10,
        base_steps=2,
        text_updates=10,
        text_base_steps=2,
    )
    metrics = ranking_accuracy.run(config, lab)
    assert judged(ranking_accuracy) <= set(metrics)
    assert metrics["exact/violations"] == metrics["tokens/violations"] == 0
    assert metrics["exact/largest_error"] < 1e-6
    assert metrics["exact/ranking_accuracy"] == metrics["exact/ceiling"]
    assert metrics["exact/ipo_loss"] < 1e-12
    assert metrics["exact/ipo_wrong"] > 0
    assert set(drawn(ranking_accuracy, config, metrics)) == {"flips", "accuracies"}


def test_f_dpg_runs_every_part_and_gives_what_its_claims_need(lab):
    config = f_dpg.Config(
        parts=f_dpg.PARTS,
        updates=3,
        text_updates=2,
        text_samples=4,
        text_base_steps=2,
        text_evaluation=8,
        smollm2_updates=2,
    )
    metrics = f_dpg.run(config, lab)
    assert judged(f_dpg) <= set(metrics)
    assert metrics["exact/common/z"] == pytest.approx(0.07)
    assert metrics["exact/rare/z"] == pytest.approx(0.006)


def test_f_dpo_runs_every_part_and_gives_what_its_claims_need(lab):
    config = f_dpo.Config(
        parts=f_dpo.PARTS,
        draws=1,
        updates=2,
        text_pairs=16,
        text_updates=1,
        text_base_steps=2,
        text_evaluation=16,
        smollm2_pairs=16,
        smollm2_updates=1,
    )
    metrics = f_dpo.run(config, lab)
    assert judged(f_dpo) <= set(metrics)
    rewards = [metrics[f"optimum/{name}/reward"] for name in f_dpo.DIVERGENCES]
    assert max(rewards) - min(rewards) < 1e-9
    own = {name: metrics[f"optimum/{name}/forward_kl"] for name in f_dpo.DIVERGENCES}
    assert min(own, key=own.__getitem__) == "forward-kl"
    assert set(drawn(f_dpo, config, metrics)) == {"pairs", "pairs-loss"}


def test_sparse_po_runs_every_part_and_gives_what_its_claims_need(lab):
    config = sparse_po.Config(
        parts=sparse_po.PARTS,
        updates=3,
        pairs=20,
        text_pairs=16,
        text_updates=1,
        text_base_steps=2,
        text_evaluation=16,
    )
    metrics = sparse_po.run(config, lab)
    assert judged(sparse_po) <= set(metrics)
    assert metrics["exact/beta=0.3/oracle/wasted"] == 0


def test_a_users_file_trains_a_users_model(tmp_path, lab):
    tokenizer = tiny_tokenizer(WORDS.split())
    tiny_lm(tokenizer, hidden_size=16, num_heads=2).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    path = tmp_path / "pairs.jsonl"
    lines = [
        {"prompt": "the day was", "chosen": f"good {word}", "rejected": f"bad {word}"}
        for word in WORDS.split()
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    config = f_dpo.Config(
        model=str(tmp_path / "start"),
        pairs=str(path),
        divergence="jsd",
        beta=0.5,
        own_updates=20,
        learning_rate=1e-2,
    )
    metrics = f_dpo.run(config, lab)
    assert metrics["own/held_out_accuracy"] == 1.0
    assert metrics["own/held_out_loss"] < 0.6
    assert list((lab.folder / "model").glob("*.safetensors"))
    path.write_text("\n".join(map(json.dumps, [lines[0], {**lines[1], "rejected": ""}])))
    with pytest.raises(ValueError, match=r"line 2 of .*empty completion"):
        f_dpo.run(config, Lab(tmp_path / "again", 0, tensorboard=False))
    assert f_dpo.run(config, Lab(tmp_path / "again", 1, tensorboard=False)) == {}


def test_gradient_noise_is_the_variance_over_all_sequences():
    problem = f_dpg.Exact(3, 0)
    slopes = torch.autograd.functional.jacobian(
        lambda table: problem.space.logprobs(table).sum(-1), problem.table, vectorize=True
    ).flatten(1)
    for name in ("forward-kl", "tv"):
        divergence = f_dpg.DIVERGENCES[name]
        variance, ratio = f_dpg.gradient_noise(problem, divergence)
        policy = problem.base.clone().requires_grad_()
        probs, squared = problem.base.exp(), slopes.square().sum(1)
        reward = divergence.pseudo_reward(problem.base - problem.target)
        best = (probs * squared * reward).sum() / (probs * squared).sum()
        terms = (reward - best)[:, None] * slopes
        mean = (probs[:, None] * terms).sum(0)
        expected = (probs[:, None] * (terms - mean).square()).sum()
        assert variance == pytest.approx(expected.item())
        assert ratio == pytest.approx((mean.square().sum() / expected).item())
        # And the mean is the gradient of the divergence.
        table = problem.table.clone().requires_grad_()
        policy = problem.space.logprobs(table).sum(-1)
        f_divergence(policy, problem.target, divergence).backward()
        torch.testing.assert_close(table.grad.flatten(), -mean)


def test_a_floor_is_put_under_what_reverse_kl_forbids():
    problem = f_dpg.Exact(3, 0)
    assert problem.scores(KL).isfinite().all()
    assert problem.scores(REVERSE_KL).isneginf().any()


def test_a_dpg_run_resumes_with_its_estimates(lab):
    config = f_dpg.Config(text_samples=4, text_base_steps=2, text_evaluation=8)
    setting = f_dpg.text_setting(config, 0)
    target = f_dpg.text_target("lexicon", setting, 0.5)
    task = f_dpg.sampling_task("t", ["<bos>"], lambda prompts, completions, **_: [0.5] * 4, 6)

    def make():
        return f_dpg.DPGLearner(
            copy.deepcopy(setting.base),
            setting.text.tokenizer,
            task,
            f_dpg.DPG(setting.base, target, f_dpg.DIVERGENCES["js"]),
            f_dpg.RLVRSettings(prompts=1, samples=4),
            seed=0,
            total=99,
            last=lambda model: {},
        )

    whole, broken, resumed = make(), make(), make()
    broken.advance()
    resumed.load_state_dict(copy.deepcopy(broken.state_dict()))
    rows = [whole.advance(), whole.advance()]
    assert resumed.advance() == rows[1]
    assert rows[0]["log_z"] == pytest.approx(1.0, abs=1e-4)  # P/a = exp(r / beta), everywhere


def test_the_target_of_the_moment_has_that_moment():
    config = f_dpg.Config(text_base_steps=2, text_evaluation=16)
    setting = f_dpg.text_setting(config, 0)
    target = f_dpg.text_target("moment", setting, 0.1)
    feature = target.wanted(setting.drawn.tokens, setting.drawn.mask)
    scores = target.scores(setting.logprobs, feature, 0.0)
    share = ((scores - setting.logprobs).softmax(0) * feature).sum()
    assert share == pytest.approx(f_dpg.WANTED_SHARE, abs=1e-5)


def test_a_broken_threshold_is_counted(monkeypatch):
    reference = PairScores(torch.tensor([-9.0, -9.0]).double(), torch.tensor([-4.0, -4.0]).double())
    policy = PairScores(torch.tensor([-5.0, -8.0]).double(), torch.tensor([-6.0, -4.0]).double())
    assert _ranking_accuracy_tools.broken_thresholds(policy, reference, 0.1) == 0
    monkeypatch.setattr(
        _ranking_accuracy_tools,
        "dpo_flip_threshold",
        lambda ratio, beta, gamma: torch.zeros_like(ratio),
    )
    assert _ranking_accuracy_tools.broken_thresholds(policy, reference, 0.1) == 1


def test_flips_go_by_quarters_of_the_reference_error():
    error = torch.tensor([1.0, 2.0, 3.0, 4.0, -5.0])
    policy = PairScores(torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]), torch.full((5,), 0.5))
    found = _ranking_accuracy_tools.flips_by_error(error, policy)
    assert list(found.values()) == [1.0, 1.0, 0.0, 0.0]


def test_every_sparse_method_starts_at_log_two_and_the_oracle_leaves_the_rest_alone():
    problem = sparse_po.Problem(20, 0)
    config = sparse_po.Config(updates=1)
    for name in sparse_po.METHODS:
        found = sparse_po.fit(problem, name, 0.3, replace(config, updates=2))
        assert found["early/reward"] == pytest.approx(
            sparse_po.fit(problem, "dpo", 0.3, config)["early/reward"]
        )
    assert sparse_po.fit(problem, "misplaced", 0.3, replace(config, updates=3))["wasted_share"] == 1


def test_the_area_under_the_curve_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (60,), generator=generator).float()
    inside = torch.rand(60, generator=generator) < 0.4
    expected = metrics.roc_auc_score(inside, scores)
    assert sparse_po.area_under_curve(scores[inside], scores[~inside]) == pytest.approx(expected)


def test_jsd_with_a_small_beta_loses_the_reward_and_not_the_loss():
    problem = f_dpo.compared_items(0)
    usual, bounded = (
        f_dpo.fit_items(problem, f_dpo.DIVERGENCES[name], 0.3, 300)
        for name in ("reverse-kl", "jsd")
    )
    assert bounded["loss"] < usual["loss"] + 0.1
    assert bounded["reward"] < usual["reward"] - 0.5
    assert bounded["chosen_change"] < 0


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_load_with_forms_of_one_thread(name):
    recipe = load_recipe(name)
    assert recipe.quick.threads == recipe.full.threads == 1
    assert recipe.quick.minutes <= 10
    assert recipe.full.minutes <= 60


@pytest.mark.parametrize("recipe", RECIPES.values())
def test_unknown_parts_are_refused(recipe):
    with pytest.raises(ValueError, match="parts"):
        recipe.Config(parts=("nonsense",))


def test_a_model_needs_pairs():
    with pytest.raises(ValueError, match="belong together"):
        f_dpo.Config(model="somewhere")
