"""Run a test file as a program in two processes on gloo, and compare what it found with one's."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def run_in_two(file, *args, out):
    """What `write` stored when the file ran with these arguments and `out` in two processes."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(str(part) for part in (file, *args, out)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(Path(out).read_text())
    assert found.pop("processes") == 2
    return found


def write(found, out):
    """Store what the first process found, with the number of processes, and end the group."""
    if torch.distributed.get_rank() == 0:
        found["processes"] = torch.distributed.get_world_size()
        Path(out).write_text(json.dumps(found))
    gc.collect()  # DDP's reducer has to go before its process group, or torch may lock up
    torch.distributed.destroy_process_group()


def assert_same(two, one):
    """Every number of every case agrees to 1e-5."""
    assert two.keys() == one.keys()
    for case, numbers in one.items():
        for key, values in numbers.items():
            assert two[case][key] == pytest.approx(values, rel=1e-5, abs=1e-5), (case, key)
