"""A tiny run of every part of the distillation recipes, and their own mathematics."""

import copy

import numpy as np
import pytest
import torch
from scipy import stats

pytest.importorskip("transformers")
pytest.importorskip("sklearn")

from steelyard.distillation import sinkhorn_kd_loss
from steelyard.lab import Lab
from steelyard.lab.tiny_lm import tiny_lm, tiny_tokenizer
from steelyard.recipes import _adpa_smollm2, _adpa_testbed, _adpa_text, _pld_data, adpa, pld, sinkd

RANDOM = torch.Generator().manual_seed(0)
WORDS = "the day was good and war is bad we love no peace in this time x"
LEXICON = {"good": 1.9, "war": -2.9, "bad": -2.5, "love": 3.2, "peace": 2.5, "x": 3.0}


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path, 0, tensorboard=False, checkpoint_seconds=3600)


@pytest.fixture
def small_text(monkeypatch):
    """Sixteen words in place of a data set, and a model of them in place of SmolLM2."""
    words, generator = WORDS.split(), torch.Generator().manual_seed(0)
    picks = torch.randint(len(words), (20, 40), generator=generator)
    texts = [("c", " ".join(words[pick] for pick in row)) for row in picks.tolist()]

    def packaged(name):
        tokenizer = tiny_tokenizer(words)
        return tiny_lm(tokenizer, hidden_size=16, num_heads=2, num_layers=5), tokenizer

    monkeypatch.setattr(_adpa_text, "newsgroups", lambda split: texts)
    for module in (_adpa_text, _adpa_smollm2):
        monkeypatch.setattr(module, "sentiment_lexicon", lambda name: LEXICON)
    monkeypatch.setattr(_adpa_smollm2, "load_language_model", packaged)
    monkeypatch.setattr(_adpa_smollm2, "question_prompts", lambda tokenizer: ["the day ", "we "])


def judged(recipe) -> set[str]:
    keys = {claim.metric for claim in recipe.CLAIMS}
    return keys | {c.baseline for c in recipe.CLAIMS if isinstance(c.baseline, str)}


def normal(*shape):
    return torch.randn(*shape, generator=RANDOM, dtype=torch.float64)


# SinKD.


def test_sinkd_runs_every_part_and_gives_what_its_claims_need(lab):
    metrics = sinkd.run(sinkd.Config(parts=sinkd.PARTS, shuffled=(0.0, 1.0), steps=1), lab)
    assert judged(sinkd) <= set(metrics)
    assert metrics["pairing/exact/difference"] < 1e-12
    assert metrics["pairing/exact/kd_difference"] > 0.1
    assert sinkd.figures({"config": {"parts": []}, "metrics": {"0": metrics}}) == {}
    config = {"parts": sinkd.PARTS, "shuffled": (0.0, 1.0)}
    assert set(sinkd.figures({"config": config, "metrics": {"0": metrics}})) == {"pairing", "grid"}


@pytest.mark.parametrize(("share", "moved"), [(0.0, 0), (0.5, 4), (1.0, 8)])
def test_rows_are_dealt_to_others_and_none_is_lost(share, moved):
    source = sinkd.dealt(8, share, torch.Generator().manual_seed(1))
    assert (source != torch.arange(8)).sum() == moved
    assert source.sort().values.equal(torch.arange(8))


def test_transport_of_one_item_is_what_the_mode_study_minimises():
    students, teacher = normal(5, 50).softmax(1), normal(50).softmax(0)
    found = sinkd.losses_on_bins(students, teacher)
    for row, student in enumerate(students):
        loss = sinkhorn_kd_loss(student.log()[None], teacher.log()[None], temperature=1.0)
        torch.testing.assert_close(found["sinkd"][row], loss)
        along = stats.wasserstein_distance(range(50), range(50), student, teacher)
        assert found["bins"][row].item() == pytest.approx(along)


def test_mode_study_tells_averaging_from_choosing():
    found = sinkd.mode_study(0)
    assert found["kl/mean_error"] < 1
    assert found["reverse-kl/mean_error"] > 5
    assert found["sinkd/renaming_error"] < 1e-12
    assert found["sinkd/tv_error"] < 1e-12


# PLD.


def test_pld_runs_every_part_and_gives_what_its_claims_need(lab, monkeypatch):
    def clothes(split):
        drawn = np.random.default_rng(len(split))
        images = drawn.integers(0, 256, (80, 28, 28), dtype=np.uint8)
        return images, drawn.integers(0, 10, 80)

    def teacher_of(config, data, seed, *, noisy):
        if data == "digits":  # its training takes seconds
            return pld.seeded(pld.TEACHERS[data], seed)
        return train_teacher(config, data, seed, noisy=noisy)

    train_teacher = pld.train_teacher
    monkeypatch.setattr(pld, "train_teacher", teacher_of)
    monkeypatch.setattr(_pld_data, "fashion_mnist", clothes)
    config = pld.Config(
        parts=pld.PARTS,
        digits_images=60,
        digits_epochs=1,
        fashion_images=20,
        fashion_teacher_images=40,
        fashion_epochs=1,
        fashion_settings=1,
    )
    metrics = pld.run(config, lab)
    assert judged(pld) <= set(metrics)
    assert metrics["digits/clean/teacher_accuracy"] == metrics["digits/noisy/teacher_accuracy"]
    assert metrics["digits/clean/label_agreement"] != metrics["digits/noisy/label_agreement"]
    assert "fashion/clean/order/accuracy" not in metrics
    shown = {"parts": pld.PARTS, "conditions": ("clean", "noisy")}
    assert set(pld.figures({"config": shown, "metrics": {"0": metrics}})) == {"sensitivity"}


def test_every_method_of_pld_has_the_same_number_of_settings():
    assert {len(settings) for settings in pld.METHODS.values()} == {6}
    assert {len(settings) for settings in pld.KNOBS.values()} == {5}


def test_decoupled_kd_weighted_by_what_the_teacher_leaves_is_kd():
    """KL = KL of (label, not label) + (1 - teacher's label) KL among the rest."""
    student, teacher, labels = normal(1, 6), normal(1, 6), torch.tensor([2])
    temperature = 3.0
    p = (teacher / temperature).softmax(1)
    gaps = (teacher / temperature).log_softmax(1) - (student / temperature).log_softmax(1)
    found = pld.decoupled_kd(
        student,
        teacher,
        labels,
        non_target=1 - p[0, 2].item(),
        temperature=temperature,
        mixing=0.0,
    )
    torch.testing.assert_close(found, 2 * temperature**2 * (p * gaps).sum())


@pytest.mark.parametrize("falling", [False, True])
def test_listmle_ranks_the_label_first_and_weighs_ranks_as_told(falling):
    student, teacher = normal(1, 4), torch.tensor([[0.0, 3.0, 1.0, 2.0]]).double()
    order = [2, 1, 3, 0]  # the label, then the teacher's order
    weights = [2 ** (4 - k) - 1 for k in range(1, 5)] if falling else [1, 1, 1, 1]
    scores = student[0, order]
    terms = [w * (scores[k:].logsumexp(0) - scores[k]) for k, w in enumerate(weights)]
    found = pld.list_mle(student, teacher, torch.tensor([2]), falling=falling)
    torch.testing.assert_close(found, sum(terms) / sum(weights))


def test_teachers_order_never_sees_a_label():
    student, teacher = normal(5, 4), normal(5, 4)
    one, two = (
        pld.teacher_order(student, teacher, torch.full((5,), label), temperature=1.0)
        for label in (0, 3)
    )
    assert one.equal(two)


def test_kendalls_tau_is_that_of_scipy():
    a, b = normal(6, 10), normal(6, 10)
    expected = [stats.kendalltau(x, y).statistic for x, y in zip(a, b, strict=True)]
    assert pld.kendall(a, b).item() == pytest.approx(np.mean(expected))


def test_spoiled_labels_are_other_labels_in_their_share():
    labels = torch.randint(10, (20_000,), generator=RANDOM)
    wrong = _pld_data.spoiled(labels, 0.2, seed=1)
    # Standard deviation of the share 0.0028: five of them, one false alarm in 1.7 million.
    assert (wrong != labels).double().mean().item() == pytest.approx(0.2, abs=0.0142)
    assert wrong.min() >= 0
    assert wrong.max() <= 9


# ADPA.


def test_adpa_runs_exact_and_text_and_gives_what_its_claims_need(lab, small_text):
    config = adpa.Config(
        parts=("exact", "text"),
        pairs=20,
        steps=16,
        words=16,
        base_steps=2,
        text_pairs=12,
        updates=6,
        prompts=8,
    )
    metrics = adpa.run(config, lab)
    assert judged(adpa) <= set(metrics)
    result = {"config": {"parts": adpa.PARTS}, "metrics": {"0": metrics}}
    assert set(adpa.figures(result)) == {"budgets"}
    assert adpa.figures({"config": {"parts": ["smollm2"]}, "metrics": {"0": metrics}}) == {}


def test_smollm2_part_trains_only_what_it_cut_out(lab, small_text):
    pytest.importorskip("trl")
    config = adpa.Config(parts=("smollm2",), smollm2_pairs=6, smollm2_updates=3)
    before = torch.random.get_rng_state()
    metrics = adpa.run(config, lab)
    assert torch.random.get_rng_state().equal(before)
    assert metrics["smollm2/advantage_last"] != metrics["smollm2/advantage_first"]
    assert {"smollm2/before/reward", "smollm2/taught/reward"} <= set(metrics)


def test_smollm2_part_belongs_to_seed_zero(tmp_path):
    lab = Lab(tmp_path, 1, tensorboard=False)
    assert adpa.run(adpa.Config(parts=("smollm2",)), lab) == {}


def test_a_cut_out_student_has_the_first_and_the_last_layer_and_works():
    teacher = tiny_lm(tiny_tokenizer(["a", "b"]), hidden_size=16, num_heads=2, num_layers=5)
    held = copy.deepcopy(teacher.state_dict())
    student = _adpa_smollm2.cut_down(teacher, 3)
    for place, source in enumerate((0, 2, 4)):
        theirs = teacher.model.layers[source].mlp.up_proj.weight
        assert student.model.layers[place].mlp.up_proj.weight.equal(theirs)
    ids = torch.tensor([[3, 4, 3]])
    whole = student(input_ids=ids, use_cache=False).logits
    first = student(input_ids=ids[:, :2], use_cache=True)
    after = student(input_ids=ids[:, 2:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(after[:, 0], whole[:, 2])
    assert all(held[name].equal(value) for name, value in teacher.state_dict().items())


def test_aligned_teacher_is_the_optimum_and_its_advantages_are_the_rewards():
    bed = _adpa_testbed.make_testbed(50, 0)
    assert max(_adpa_testbed.identities(bed).values()) < 1e-12
    law, before = (bed.space.logprobs(table).sum(-1) for table in (bed.aligned, bed.before))
    optimum = (before + bed.reward / _adpa_testbed.BETA).log_softmax(0)
    torch.testing.assert_close(law, optimum)


def test_kd_of_the_testbed_is_likelihood_and_divergence_on_chosen_responses():
    bed = _adpa_testbed.make_testbed(50, 0)
    bigram = normal(1 + _adpa_testbed.VOCABULARY, _adpa_testbed.VOCABULARY)
    loss = adpa.student_loss(bed, bed.aligned, "kd", 2.0, bed.own)(bigram)
    places = bed.space.prefixes[bed.chosen]
    student, teacher = (t.log_softmax(-1)[places] for t in (bigram[bed.last], bed.aligned))
    nll = -student.gather(-1, bed.space.tokens[bed.chosen][..., None]).mean()
    kl = (teacher.exp() * (teacher - student)).sum(-1).mean()
    torch.testing.assert_close(loss, nll + 2.0 * kl)


def test_the_best_look_within_a_budget_is_chosen_by_its_score():
    looks = [
        _adpa_testbed.Look(kl, score, reward)
        for kl, score, reward in ((0.5, 1.0, 1.1), (0.9, 2.0, 0.3), (1.1, 9.0, 9.0))
    ]
    before = _adpa_testbed.Look(0.0, 0.0, 0.2)
    assert adpa.within(looks, before, 1.0).reward == 0.3
    assert adpa.within(looks, before, 0.1) is before


@pytest.mark.parametrize("steps", [6, 7, 11, 100])
def test_looks_come_early_and_at_the_end(steps):
    found = sorted(_adpa_text.look_steps(steps, 6))
    assert len(found) == 6
    assert found[-1] == steps
    assert found[2] <= steps / 2


def test_single_letters_have_no_rating(small_text):
    text = _adpa_text.word_text([WORDS], words=16, window=2)
    reward = _adpa_text.lexicon(text, "any")
    assert reward.values[text.id_of("good")] == pytest.approx(1.9)
    assert reward.values[text.id_of("x")] == 0
