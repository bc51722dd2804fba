"""The bad-input campaign: it forgets no function, sees bad answers, and a slice of it is clean."""

import json
import math
import time
from pathlib import Path

import pytest
import torch

RESULT = Path(__file__).parents[2] / "reliability" / "results" / "fuzz.json"
SLICE = (
    "policy.ppo_loss",
    "preference.f_dpo_loss",
    "distillation.kd_loss",
    "divergences.f_divergence",
    "divergences.median_bandwidth",
)


def test_every_public_callable_has_a_case_or_a_reason(script):
    registry = script("_fuzz_registry")
    assert registry.missing() == []
    assert registry.obsolete() == []


def test_a_new_public_function_is_noticed(script, monkeypatch):
    registry = script("_fuzz_registry")
    from steelyard import policy

    monkeypatch.setattr(policy, "new_loss", lambda log_ratio: log_ratio, raising=False)
    monkeypatch.setattr(policy, "__all__", [*policy.__all__, "new_loss"])
    assert registry.missing() == ["policy.new_loss"]


@pytest.mark.parametrize("name", SLICE)
def test_a_slice_of_the_campaign_finds_nothing(script, name):
    fuzz = script("fuzz")
    tally = fuzz.fuzz(name, examples=60, seed=0)
    assert tally.bad == {}
    assert tally.tried >= 30
    assert tally.accepted > 0
    assert tally.refused > 0


def test_the_result_holds_no_bad_answer_and_adds_up(script):
    registry = script("_fuzz_registry")
    result = json.loads(RESULT.read_text())
    tallies = result["by_function"].values()
    assert result["bad"] == 0
    assert result["tried"] == sum(t["tried"] for t in tallies)
    assert set(result["by_function"]) == set(registry.CASES)
    for tally in tallies:
        assert tally["tried"] >= tally["accepted"] + tally["refused"] + len(
            tally["known"] | tally["open"]
        )


def judged(script, call, value, label="nan", kind="nan"):
    verdict = script("_fuzz_verdict")
    mutation = script("_fuzz_mutations").Mutation(label, kind, lambda v: v)
    return verdict.judge(call, {"x": value}, {"x": mutation})


def test_a_named_error_is_fine_and_an_unnamed_one_is_bad(script):
    def refuse(message):
        def call(x):
            raise ValueError(message)

        return call

    assert judged(script, refuse("x must be finite"), 1.0).status == "refused"
    assert judged(script, refuse("must be finite"), 1.0).status == "bad"
    assert judged(script, refuse("xy must be finite"), 1.0).status == "bad"


def test_other_errors_are_bad(script):
    def crash(x):
        return [][x]

    assert judged(script, crash, 0, "0", "value").reason.startswith("IndexError")


def test_nan_must_come_out_as_nan(script):
    nan = torch.tensor([math.nan, 1.0])
    assert judged(script, lambda x: x.sum(), nan).status == "accepted"
    assert judged(script, lambda x: x.nansum(), nan).reason == "NaN in, no NaN out"


def test_finite_numbers_must_not_give_nan_or_infinity(script):
    assert (
        "NaN out"
        in judged(script, lambda x: x - 2 + x.log(), torch.tensor(-1.0), "", "value").reason
    )
    assert "infinity" in judged(script, lambda x: 1 / x, torch.tensor(0.0), "", "value").reason
    assert judged(script, lambda x: x.exp(), torch.tensor(1e4), "", "huge").status == "accepted"


def test_a_hang_is_bad(script, monkeypatch):
    verdict = script("_fuzz_verdict")
    monkeypatch.setattr(verdict, "SECONDS", 0.1)
    found = judged(script, lambda x: time.sleep(5), 1.0, "", "value")
    assert found.status == "bad"
    assert found.reason.startswith("hang")
