import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

Script = Callable[[str], ModuleType]
SUITES = ("methods", "preference", "distillation", "tabular")


def row(name: str, ratio: float, mib: float, **size: Any) -> dict[str, Any]:
    return {
        "task": "sum",
        "size": size,
        "name": name,
        "cpu_seconds": 0.2,
        "peak_extra_mib": mib,
        "ours_over_this": [ratio, ratio, ratio],
        "error": None,
    }


@pytest.mark.parametrize("name", SUITES)
def test_every_target_is_for_a_task_and_every_task_has_a_title(script: Script, name: str) -> None:
    suite = script(name).SUITE
    assert suite.name == name
    assert {target.task for target in suite.targets} <= set(suite.tasks)
    assert set(suite.tasks) <= set(script("benchmark_pages").METHOD_TASKS)
    assert all(any(c.quick for c in suite.cases if c.task == task) for task in suite.tasks)


def test_a_target_is_judged_against_the_peer_that_is_hardest_to_beat(script: Script) -> None:
    suite = script("suite")
    rows = [
        row("steelyard", 1.0, 10.0, n=5),
        row("peer a", 0.5, 100.0, n=5),
        row("peer b", 0.9, 20.0, n=5),
    ]

    def judged(figure: str, peers: str, most: float, least: int = 0) -> list[dict[str, Any]]:
        target = suite.Target("sum", figure, peers, most, least)
        return suite.Suite("x", [], [target], []).judged(rows)

    (time,) = judged("time", "peer", 0.9)
    assert (time["peer"], time["value"], time["met"]) == ("peer b", 0.9, True)
    (memory,) = judged("memory", "peer", 0.3)
    assert (memory["peer"], memory["value"], memory["met"]) == ("peer b", 0.5, False)
    (seconds,) = judged("seconds", "", 0.1)
    assert (seconds["value"], seconds["met"]) == (0.2, False)
    assert judged("time", "nobody", 1.0) == []
    assert judged("time", "peer", 1.0, least=6) == []


def test_a_run_of_some_tasks_keeps_the_other_rows(script: Script, tmp_path: Path) -> None:
    suite = script("suite")
    out = tmp_path / "out.json"
    out.write_text(json.dumps({"results": [row("steelyard", 1.0, 1.0) | {"task": "old"}]}))
    fresh = {k: v for k, v in row("steelyard", 1.0, 2.0).items() if k not in ("task", "size")}
    cases = [suite.Case(task, "none", {"n": 1}, None) for task in ("new", "old")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "in_a_process", lambda *_: [fresh])
        patch.setattr("sys.argv", ["x.py", "--only", "new", "--out", str(out)])
        suite.main(suite.Suite("x", cases, [], ["torch"]), "x.py", "")
    found = json.loads(out.read_text())["results"]
    assert [(r["task"], r["peak_extra_mib"]) for r in found] == [("new", 2.0), ("old", 1.0)]


@pytest.mark.parametrize(
    ("module", "size"),
    [
        ("binning", {"columns": 3, "rows": 3000}),
        ("exact", {"prebins": 12, "bins": 4, "seconds": 2}),
        ("presto", {"rows": 200, "features": 4, "classes": 3, "penalties": 3}),
        ("dcov", {"n": 40}),
        ("bounds", {"problems": 2, "support": 5, "divergence": "chi2"}),
    ],
)
def test_contestants_of_the_tables_agree(script: Script, module: str, size: dict) -> None:
    pytest.importorskip("optbinning")
    pytest.importorskip("cvxpy")
    contest = script(f"tabular_cases.{module}").contest(**size)
    assert set(contest.errors()) == set(contest.runs)
    assert next(iter(contest.runs)) == "steelyard"
    assert set(contest.warm) == set(contest.runs)


@pytest.mark.parametrize("task", ["parquet_iv", "parquet_psi"])
def test_counts_of_a_file_agree(script: Script, task: str, tmp_path: Path) -> None:
    pytest.importorskip("optbinning")
    parquet = script("tabular_cases.parquet")
    paths = parquet.written(tmp_path, "full", 2000, 2)
    assert [path.stat().st_size > 0 for path in paths] == [True, True]
    assert parquet.errors(parquet.runs_of(task, paths, 2))["optbinning"] < 1e-9


def test_a_wrong_value_stops_the_benchmark(script: Script) -> None:
    parquet, exact = script("tabular_cases.parquet"), script("tabular_cases.exact")
    with pytest.raises(AssertionError, match="differ"):
        parquet.errors({"steelyard": lambda: [1.0, 2.0], "peer": lambda: [1.0, 2.01]})
    with pytest.raises(AssertionError, match="above the optimum"):
        exact.errors({"steelyard": lambda: 1.0, "peer": lambda: 1.01})


def test_the_likelihood_given_to_scipy_has_its_gradient(script: Script) -> None:
    problem = script("tabular_cases.presto").Problem(60, 4, 4, 1)
    random = np.random.default_rng(0)
    delta, psi = np.array([-1.0, 2.0, 2.0]), 0.1 * random.standard_normal((4, 3))
    value, *slopes = problem.likelihood(delta, psi)
    from steelyard.classification import proportional_odds_nll

    alpha, steps = (torch.tensor(v).requires_grad_() for v in (delta, psi))
    arguments = (torch.tensor(problem.x), torch.tensor(problem.y), alpha.cumsum(0), steps.cumsum(1))
    nll = proportional_odds_nll(*arguments)
    nll.backward()
    assert value == pytest.approx(nll.item(), abs=1e-12)
    np.testing.assert_allclose(slopes[0], alpha.grad, atol=1e-12)
    np.testing.assert_allclose(slopes[1], steps.grad, atol=1e-12)


@pytest.mark.parametrize("task", ["pld", "sinkd"])
def test_contestants_of_distillation_agree(script: Script, task: str) -> None:
    if task == "sinkd":
        pytest.importorskip("ot")
    contest = script("distillation").contest(task, batch=8, classes=20)
    assert max(contest.errors().values()) < 1e-3


@pytest.mark.parametrize("task", ["f_dpo", "sparse_po", "dckd", "adpa"])
def test_contestants_of_preferences_agree(script: Script, task: str) -> None:
    pytest.importorskip("trl")
    contest = script("preference").contest(task, vocabulary=64, length=16, prompt=4, width=16)
    assert max(contest.errors().values()) < 1e-3
    assert set(contest.warm) == set(contest.runs)
