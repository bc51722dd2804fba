"""The examples run as their first lines say: alone, by torchrun and by accelerate."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")

ROOT = Path(__file__).parents[2]
LAUNCHERS = {
    "python": (sys.executable,),
    "torchrun": (
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    ),
    "accelerate": (  # without a GPU its "multi_gpu" means two processes on gloo
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
        *("--num_processes", "2", "--num_machines", "1", "--main_process_port", "29713"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
    ),
}


def run(launcher, name, out, *arguments):
    command = [*LAUNCHERS[launcher], str(ROOT / "examples" / name), "--out", str(out), *arguments]
    done = subprocess.run(
        command,
        cwd=out.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "metrics.json").read_text()), done.stdout


@pytest.mark.parametrize("launcher", ["python", "torchrun"])
def test_preferences_are_learned_on_one_process_and_on_two(launcher, tmp_path):
    options = ["--divergence", "JENSEN_SHANNON_DOUBLE"]
    found, said = run(launcher, "preference.py", tmp_path / "out", *options)
    assert found["processes"] == (1 if launcher == "python" else 2)
    assert found["eval_ranking/accuracy"] > 0.9
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert said.count("ranking accuracy") == 1


def test_a_policy_learns_by_reward_on_two_processes(tmp_path):
    found, said = run(
        "accelerate", "policy.py", tmp_path / "out", "--objective", "canon", "--steps", "20"
    )
    assert found["processes"] == 2
    rewards = found["rewards"]
    assert len(rewards) == 20
    assert sum(rewards[-5:]) > sum(rewards[:5])
    assert said.count("reward ") == 1
