import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from steelyard.policy import PPO, AutogradUpdater, gae, mlp_actor_critic
from steelyard.policy.objectives import Samples

pytestmark = pytest.mark.rl
Script = Callable[[str], ModuleType]
TINY: dict[str, Any] = {"rollouts": 1, "num_envs": 2, "steps": 8, "epochs": 2, "minibatch": 8}


def loop(script: Script, **changes: Any) -> Any:
    settings = {"num_envs": 4, "steps": 16, "minibatch": 16, "epochs": 3, "seed": 0} | changes
    return script("single_file").SingleFilePPO("InvertedPendulum-v5", **settings)


def run(contestant: str, number: int, cpu: float) -> dict[str, Any]:
    parts = {"cpu": cpu, "wall": cpu, "stepping": 0.0, "update": 0.0, "rest": cpu}
    return {
        "round": number,
        "env": "Hopper-v5",
        "minibatch": 64,
        "contestant": contestant,
        "ms_per_step": parts,
        "peak_mib": 1.0,
        "start_mib": 1.0,
    }


def test_all_contestants_do_the_same_steps_and_updates(script: Script) -> None:
    rl = script("rl")
    assert {"steelyard", *rl.PEERS} <= set(rl.CONTESTANTS)
    for contestant in rl.CONTESTANTS:
        measured = rl.measure(rl.Case(contestant, "Hopper-v5", **TINY))
        assert measured["env_steps"] == 8 * 2, contestant
        assert measured["updates"] == 2 * (8 * 2 // 8), contestant
        times = measured["ms_per_step"]
        parts = [times["stepping"], times["update"], times["rest"]]
        assert min(parts) > 0, contestant
        assert sum(parts) == pytest.approx(times["cpu"], abs=1e-4), contestant
        assert measured["peak_mib"] >= measured["start_mib"] > 10


@pytest.mark.parametrize("name", ["steelyard", "steelyard, autograd updater"])
def test_the_updater_is_the_one_the_row_names(script: Script, name: str) -> None:
    contestant = script("rl").CONTESTANTS[name](script("rl").Case(name, "Hopper-v5", **TINY))
    before = contestant.updates()
    contestant.advance(2)
    assert contestant.updates() - before == 2 * 2 * 2
    assert contestant.updating.calls == 2 * 2


def test_the_single_file_learns(script: Script) -> None:
    ppo = loop(script, num_envs=8, steps=128, minibatch=64, epochs=10)
    for _ in range(6):
        ppo.advance()
    early, late = ppo.returns[:50], ppo.returns[-20:]
    assert sum(late) / len(late) > 3 * sum(early) / len(early)


def test_the_single_file_has_the_advantages_of_gae(script: Script) -> None:
    ppo = loop(script)
    rewards, values = torch.randn(16, 4), torch.randn(16, 4)
    dones = torch.rand(16, 4) < 0.2
    ppo.done = torch.tensor([1.0, 0.0, 0.0, 1.0])
    ended = torch.cat((dones[1:], ppo.done[None].bool()))
    last = ppo.agent.value(ppo.observation).detach().flatten()
    expected, _ = gae(
        rewards,
        values,
        torch.cat((values[1:], last[None])),
        ended,
        torch.zeros_like(ended),
        gamma=0.99,
        gae_lambda=0.95,
    )
    torch.testing.assert_close(ppo.advantages(rewards, values, dones.float()), expected)


def test_the_single_file_takes_the_steps_of_the_library(script: Script) -> None:
    ppo = loop(script, minibatch=64, epochs=5)
    batch = ppo.collect()
    policy = mlp_actor_critic(4, 1, continuous=True)
    policy.actor.load_state_dict(ppo.agent.actor.state_dict())
    policy.critic.load_state_dict(ppo.agent.critic.state_dict())
    updater = AutogradUpdater(policy, PPO())
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    ppo.update(batch)
    for _ in range(5):
        updater.epoch(Samples(*batch), 64, 3e-4)
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(policy.parameters(), before, strict=True))
    for mine, theirs in ((policy.actor, ppo.agent.actor), (policy.critic, ppo.agent.critic)):
        torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), atol=1e-5, rtol=0)
    torch.testing.assert_close(policy.log_std, ppo.agent.log_std[0], atol=1e-5, rtol=0)


def test_ratios_are_taken_inside_a_round(script: Script) -> None:
    rl = script("rl")
    times = {"steelyard": (1.0, 2.0, 10.0), "single file": (4.0, 6.0, 50.0)}
    times["stable-baselines3"] = (3.0, 10.0, 40.0)
    runs = [run(name, i, cpu) for name, cpus in times.items() for i, cpu in enumerate(cpus)]
    # Rounds in another order, as they are run, must pair up all the same.
    runs = [one for i in (0, 1, 2) for one in runs[:: (-1) ** i] if one["round"] == i]
    rows = {row["contestant"]: row["ratio"] for row in rl.summarize(runs)}
    assert rows["steelyard"] == [1.0, 1.0, 1.0]
    assert rows["single file"] == [4.0, 3.0, 5.0]
    assert rows["stable-baselines3"] == [4.0, 3.0, 5.0]
    assert [row["ratio"] for row in rl.against_better(runs)] == [[3.0, 3.0, 4.0]]


def test_rounds_alternate_and_the_result_is_stored(
    script: Script,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rl = script("rl")
    order = []

    def fake(case: Any) -> dict[str, Any]:
        order.append(case.contestant)
        measured = run(case.contestant, 0, 1.0 + (case.contestant != "steelyard"))
        del measured["round"]
        return measured | {"env": case.env, "minibatch": case.minibatch}

    monkeypatch.setattr(rl, "measure_alone", fake)
    out = tmp_path / "new/rl.json"
    assert rl.main(["--rounds", "2", "--envs", "Ant-v5", "--out", str(out)]) == 0
    names = list(rl.CONTESTANTS)
    assert order == names * 2 + names[::-1] * 2
    stored = json.loads(out.read_text())
    assert len(stored["runs"]) == 4 * len(names)
    assert [row["ratio"] for row in stored["against_better"]] == [[2.0, 2.0, 2.0]] * 2
    assert stored["settings"]["rounds"] == 2
    assert "torch" in stored["versions"]
    assert f"Results: {out}" in capsys.readouterr().out


def test_quick_stores_nothing(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    rl = script("rl")
    monkeypatch.setattr(rl, "RESULT", Path("/nonexistent/rl.json"))
    monkeypatch.setattr(
        rl,
        "measure_alone",
        lambda case: run(case.contestant, 0, 1.0) | {"env": case.env, "minibatch": case.minibatch},
    )
    assert rl.main(["--quick"]) == 0


def test_the_page_shows_ratios_parts_and_memory(script: Script, tmp_path: Path) -> None:
    rl = script("rl")
    runs = [
        run(name, i, 0.25 * (1 + (name in rl.PEERS))) for name in rl.CONTESTANTS for i in (0, 1)
    ]
    file = tmp_path / "rl.json"
    file.write_text(json.dumps(rl.result(runs, rounds=2, rollouts=4, seconds=120.0)))
    section = script("generate").rl_benchmark(file)
    assert "2 rounds; 4 counted rollouts of 256 steps of 8 environments, 10 epochs" in section
    assert "| Hopper-v5 | 64 | **2.00 (2.00 to 2.00)** |" in section
    assert "### Hopper-v5, minibatch 64" in section
    row = "0.500 | 2,000 | 2.00 (2.00 to 2.00) | 0.000 | 0.000 | 0.500 | 1 (1) |"
    assert f"| single file | {row}" in section
    assert script("generate").rl_benchmark(tmp_path / "no.json") == "No result is committed yet."


@pytest.mark.parametrize("rounds", ["0", "-1", "two"])
def test_rounds_must_be_a_positive_number(
    script: Script, rounds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script("rl").main(["--rounds", rounds])
    assert "--rounds" in capsys.readouterr().err


def test_the_committed_result_is_whole_and_names_no_machine(script: Script) -> None:
    rl = script("rl")
    text = rl.RESULT.read_text(encoding="utf-8")
    stored = json.loads(text)
    assert not re.search(r"/(home|root|Users|tmp|work)\b", text)
    cases = len(rl.ENVS) * len(rl.MINIBATCHES)
    assert stored["settings"]["rounds"] >= 3
    assert len(stored["runs"]) == cases * len(rl.CONTESTANTS) * stored["settings"]["rounds"]
    assert stored["summary"] == rl.summarize(stored["runs"])
    assert stored["against_better"] == rl.against_better(stored["runs"])
    assert len({(r["minibatch"], r["env_steps"], r["updates"]) for r in stored["runs"]}) == 2
