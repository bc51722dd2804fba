import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from steelyard.lab import Lab, NonFiniteError, StoppedError


def learner(toy: ModuleType, **changes: Any) -> Any:
    return toy.Regression(0, 0.9, toy.Config(**{"steps": 8, "pause": 0.0} | changes))


def lab(folder: Path, **options: Any) -> Lab:
    return Lab(folder, 0, **{"checkpoint_seconds": 0, "tensorboard": False} | options)


def test_numbers_do_not_depend_on_when_checkpoints_are_taken(
    tmp_path: Path, toy: ModuleType
) -> None:
    often = lab(tmp_path / "a").train("x", lambda: learner(toy), 8)
    never = lab(tmp_path / "b", checkpoint_seconds=1000).train("x", lambda: learner(toy), 8)
    assert often == never
    assert len(list(tmp_path.glob("b/seeds/0/x/checkpoints/*.pt"))) == 1  # the last state is kept


def test_the_log_holds_the_rows_and_no_time(tmp_path: Path, toy: ModuleType) -> None:
    rows = lab(tmp_path).train("x", lambda: learner(toy), 8)
    lines = (tmp_path / "seeds/0/x/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[0].keys() == {"step", "loss", "weight"}


def test_a_finished_trial_is_read_back_without_a_learner(tmp_path: Path, toy: ModuleType) -> None:
    rows = lab(tmp_path).train("x", lambda: learner(toy), 8)

    def forbidden() -> Any:
        raise AssertionError("make must not be called")

    assert lab(tmp_path).train("x", forbidden, 8) == rows


def test_a_finished_trial_goes_on_if_more_steps_are_asked_for(
    tmp_path: Path, toy: ModuleType
) -> None:
    lab(tmp_path).train("x", lambda: learner(toy), 5)
    longer = lab(tmp_path).train("x", lambda: learner(toy), 8)
    assert longer == lab(tmp_path / "unbroken").train("x", lambda: learner(toy), 8)


@pytest.mark.parametrize(
    ("fault", "step", "text"),
    [("nan", 5, "loss is nan"), ("floating", 4, "gradient of weight is nan")],
)
def test_a_non_finite_value_stops_with_trial_step_name_and_last_good_checkpoint(
    fault: str, step: int, text: str, tmp_path: Path, toy: ModuleType
) -> None:
    with pytest.raises(NonFiniteError) as caught:
        lab(tmp_path).train("a/b", lambda: learner(toy, faults=(fault,)), 8)
    error = caught.value
    checkpoint = tmp_path / "seeds/0/a/b/checkpoints/step-4.pt"
    assert (error.trial, error.step, error.quantity) == ("a/b", step, text)
    assert error.checkpoint == checkpoint
    assert checkpoint.exists()
    assert str(error) == f"trial a/b, step {step}: {text}; last good checkpoint {checkpoint}"
    assert not list(checkpoint.parent.glob("step-5*"))
    assert "nan" not in (tmp_path / "seeds/0/a/b/metrics.jsonl").read_text().lower()


def test_a_non_finite_value_before_any_checkpoint_says_so(tmp_path: Path, toy: ModuleType) -> None:
    with pytest.raises(NonFiniteError, match="no checkpoint yet"):
        lab(tmp_path, checkpoint_seconds=1000).train("x", lambda: learner(toy, faults=("nan",)), 8)
    with pytest.raises(NonFiniteError, match="trial y, step 0: bound is inf"):
        lab(tmp_path).compute("y", lambda: {"bound": float("inf")})


def test_a_stop_in_the_middle_writes_a_checkpoint_and_resumes_to_the_same_rows(
    tmp_path: Path, toy: ModuleType
) -> None:
    first = lab(tmp_path, checkpoint_seconds=1000)
    stopped = learner(toy)
    advance = stopped.advance

    def advance_and_stop() -> Any:
        if stopped.step == 3:
            first.request_stop()  # as a signal handler does, in the middle of an advance
        return advance()

    stopped.advance = advance_and_stop
    with pytest.raises(StoppedError):
        first.train("x", lambda: stopped, 8)
    assert (tmp_path / "seeds/0/x/checkpoints/step-4.pt").exists()
    with pytest.raises(StoppedError):
        first.train("y", lambda: learner(toy), 8)
    rows = lab(tmp_path).train("x", lambda: learner(toy), 8)
    assert rows == lab(tmp_path / "unbroken").train("x", lambda: learner(toy), 8)


def test_a_stop_outside_an_advance_is_immediate(tmp_path: Path) -> None:
    first = lab(tmp_path)
    with pytest.raises(StoppedError):
        first.compute("x", lambda: first.request_stop() or {"a": 1.0})
    assert lab(tmp_path).compute("x", lambda: {"a": 2.0}) == {"a": 2.0}


def test_compute_is_done_once(tmp_path: Path) -> None:
    assert lab(tmp_path).compute("x", lambda: {"a": 1, "b": 0.1}) == {"a": 1.0, "b": 0.1}
    assert lab(tmp_path).compute("x", lambda: {"a": 2.0}) == {"a": 1.0, "b": 0.1}


@pytest.mark.parametrize("damage", ["{}", "", '{"step": 0, "a": 9.0}\n'])
def test_a_damaged_computation_is_named_and_done_again(
    damage: str, tmp_path: Path, notes: Any
) -> None:
    lab(tmp_path).compute("x", lambda: {"a": 1.0})
    (tmp_path / "seeds/0/x/metrics.jsonl").write_text(damage)
    again = lab(tmp_path, observer=notes).compute("x", lambda: {"a": 1.0})
    assert again == {"a": 1.0}
    assert "seed 0, x: metrics.jsonl" in notes.warnings[0]


def test_a_warning_reaches_python_without_an_observer(tmp_path: Path) -> None:
    lab(tmp_path).compute("x", lambda: {"a": 1.0})
    (tmp_path / "seeds/0/x/done.json").write_text("")
    with pytest.warns(RuntimeWarning, match=r"done\.json is truncated"):
        lab(tmp_path).compute("x", lambda: {"a": 1.0})


UNSAFE = ["", "/a", "a/", "a//b", "..", "a/../b", "a\\b", "a:b", "a\0b", "a\n", " a", "a*", "a."]
RESERVED = ["checkpoints", "a/done.json", "result.json", "error.log", "lock"]


@pytest.mark.parametrize("name", [*UNSAFE, *RESERVED, "x" * 101])
def test_a_name_that_is_no_safe_path_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name must be a relative path"):
        lab(tmp_path).compute(name, lambda: {"a": 1.0})
    assert not (tmp_path / "seeds").exists()


def test_a_name_is_used_once(tmp_path: Path) -> None:
    one = lab(tmp_path)
    one.compute("control/Hopper-v5/epochs=40/bpo", lambda: {"a": 1.0})
    with pytest.raises(ValueError, match="was used already"):
        one.compute("control/hopper-v5/epochs=40/BPO", lambda: {"a": 1.0})


def test_a_learner_that_breaks_its_contract_is_named(tmp_path: Path, toy: ModuleType) -> None:
    still = learner(toy)
    still.advance = lambda: {"loss": 1.0}
    with pytest.raises(ValueError, match="must raise step above 0, got 0"):
        lab(tmp_path).train("still", lambda: still, 8)
    lab(tmp_path).train("forgetful", lambda: learner(toy), 4)
    forgetful = learner(toy)
    forgetful.load_state_dict = lambda state: None
    with pytest.raises(ValueError, match="must restore step 4, got 0"):
        lab(tmp_path).train("forgetful", lambda: forgetful, 8)


def test_a_learner_is_closed_however_it_ends(tmp_path: Path, toy: ModuleType) -> None:
    closed = []
    for fault in ("", "raise"):
        one = learner(toy, faults=(fault,))
        one.close = lambda fault=fault: closed.append(fault)
        try:
            lab(tmp_path).train(f"x{fault}", lambda one=one: one, 8)
        except KeyError:
            assert fault
    assert closed == ["", "raise"]


@pytest.mark.parametrize(
    ("options", "text"),
    [({"seed": -1}, "seed must be >= 0"), ({"checkpoint_seconds": -1.0}, "checkpoint_seconds")],
)
def test_a_lab_with_impossible_settings_is_refused(options: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=text):
        Lab(tmp_path, **{"seed": 0} | options)
    with pytest.raises(ValueError, match="total must be >= 1, got 0"):
        lab(tmp_path).train("x", lambda: None, 0)


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path, toy: ModuleType) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"tensorboard": True, "checkpoint_seconds": 1000}
    broken = learner(toy, faults=("raise",))
    with pytest.raises(KeyError):  # at step 4, all of which is lost
        lab(tmp_path, **options).train("x", lambda: broken, 8)
    rows = lab(tmp_path, **options).train("x", lambda: learner(toy), 8)
    events = EventAccumulator(str(tmp_path / "tensorboard/seed0/x")).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in shown] == list(range(1, 9))
    assert [value for _, value in shown] == pytest.approx([row["loss"] for row in rows], rel=1e-6)
