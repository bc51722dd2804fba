"""The Flower adapter: its step is our aggregation, and Flower's loop around it is intact."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    Metadata,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from steelyard.federated import ParticipationWeights, aggregate
from steelyard.integrations.flower import FedAU

# Rows are rounds, columns clients; nobody comes in the third.
PATTERN = torch.tensor(
    [[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1], [0, 1, 1, 1]]
).bool()
CENTRES = torch.tensor([[0.0, 1.0], [4.0, -2.0], [9.0, 0.5], [-3.0, 7.0]], dtype=torch.float64)
SLOW_START = 300.0
"""Seconds that Ray may take; a whole simulation needs about twenty."""


def record(values, dtype=np.float64, name="w"):
    return ArrayRecord({name: Array(np.asarray(values, dtype=dtype))})


def reply(node, arrays=None, *, error=None, examples=1, config=None, **metrics):
    envelope = Metadata(
        run_id=0,
        message_id="",
        src_node_id=node,
        dst_node_id=1,
        reply_to_message_id="",
        group_id="",
        created_at=0.0,
        ttl=60.0,
        message_type="train",
    )
    if error is not None:
        return Message(Error(code=0, reason=error), metadata=envelope)
    content = RecordDict()
    if arrays is not None:
        content["arrays"] = arrays
        content["metrics"] = MetricRecord({"num-examples": examples, **metrics})
    if config is not None:
        content["config"] = ConfigRecord(config)
    return Message(content, metadata=envelope)


def values(arrays, name="w"):
    return torch.tensor(arrays[name].numpy())


def local(x, node, rate=0.5):
    return x + rate * (CENTRES[node] - x)


def by_hand(pattern, *, cutoff=None, lr=1.0, rate=0.5):
    """Yield the parameters after each round from the functions of the library."""
    tracker = ParticipationWeights(pattern.shape[1], cutoff)
    x = torch.zeros(2, dtype=torch.float64)
    for came in pattern:
        deltas = torch.stack([local(x, node, rate) - x for node in range(len(CENTRES))])
        x = aggregate(x, deltas, came, weights=tracker.weights, lr=lr).x
        tracker.update(came)
        yield x


class InProcess(Grid):
    """Runs a function in the place of each client, without processes and messages on a wire."""

    def __init__(self, client, nodes):
        self.client, self.nodes = client, nodes
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1

    def set_run(self, run):
        pass

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        raise NotImplementedError

    def get_node_ids(self):
        return self.nodes

    def push_messages(self, messages):
        raise NotImplementedError

    def pull_messages(self, message_ids):
        raise NotImplementedError

    def send_and_receive(self, messages, *, timeout=None):
        return [self.client(message) for message in messages]


def in_turn(message):
    """Train as ``PATTERN`` says: come, decline, or (client 3) fail."""
    node = message.metadata.dst_node_id
    if not PATTERN[message.content["config"]["server-round"] - 1, node]:
        if node == 3:
            return Message(Error(code=0, reason="battery"), reply_to=message)
        return Message(RecordDict(), reply_to=message)
    x = values(message.content["arrays"])
    content = {
        "arrays": record(local(x, node)),
        "metrics": MetricRecord({"num-examples": 1 + node, "loss": float(node)}),
    }
    return Message(RecordDict(content), reply_to=message)


@pytest.mark.parametrize(("cutoff", "lr"), [(None, 1.0), (2, 0.3), (1, 1.0)])
def test_rounds_equal_the_functions_of_the_library(cutoff, lr):
    strategy, arrays = FedAU(4, cutoff, lr=lr), record([0, 0])
    for came, expected in zip(PATTERN, by_hand(PATTERN, cutoff=cutoff, lr=lr), strict=True):
        nodes = came.nonzero().flatten().tolist()
        replies = [reply(node, record(local(values(arrays), node))) for node in nodes]
        arrays, _ = strategy.step(arrays, replies)
        torch.testing.assert_close(values(arrays), expected, rtol=0, atol=1e-12)


def test_the_loop_of_flower_ends_where_the_functions_end():
    seen = {}
    strategy = FedAU(4, 3, fraction_evaluate=0.0)
    result = strategy.start(
        InProcess(in_turn, range(4)),
        record([0, 0]),
        num_rounds=len(PATTERN),
        evaluate_fn=lambda turn, arrays: seen.update({turn: values(arrays)}),
    )
    assert len(seen) == len(PATTERN) + 1
    for turn, expected in enumerate(by_hand(PATTERN, cutoff=3), start=1):
        torch.testing.assert_close(seen[turn], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(values(result.arrays), seen[len(PATTERN)], rtol=0, atol=0)
    metrics = result.train_metrics_clientapp
    assert [metrics[turn]["fedau-participants"] for turn in range(1, 7)] == [2, 2, 0, 2, 3, 3]
    assert metrics[1]["loss"] == pytest.approx(2 / 3)  # weighted by the examples, 1 and 2
    assert "loss" not in metrics[3]


def test_cutoff_one_is_the_mean_over_all_clients():
    strategy = FedAU(4, 1)
    arrays, _ = strategy.step(record([0, 0]), [reply(2, record([4, 8]))])
    arrays, _ = strategy.step(record([0, 0]), [reply(2, record([4, 8]))])
    torch.testing.assert_close(values(arrays), torch.tensor([1.0, 2.0], dtype=torch.float64))


def test_examples_do_not_weigh_the_step():
    replies = [
        reply(0, record([1, 0]), examples=1),
        reply(1, record([0, 1]), examples=99),
    ]
    arrays, _ = FedAU(2).step(record([0, 0]), replies)
    torch.testing.assert_close(values(arrays), torch.tensor([0.5, 0.5], dtype=torch.float64))


def test_order_of_arrival_changes_no_bit():
    torch.manual_seed(0)
    locals_ = [torch.randn(50, dtype=torch.float32).numpy() for _ in range(7)]
    replies = [reply(node, record(end, np.float32)) for node, end in enumerate(locals_)]
    start = record(np.zeros(50), np.float32)
    forward, _ = FedAU(9).step(start, replies)
    backward, _ = FedAU(9).step(start, replies[::-1])
    assert forward["w"].data == backward["w"].data
    assert forward["w"].data != start["w"].data


def test_a_state_saved_in_the_middle_continues_to_the_same_end(tmp_path):
    whole = list(by_hand(PATTERN, cutoff=3))
    strategy, arrays = FedAU(4, 3), record([0, 0])
    for turn, came in enumerate(PATTERN):
        if turn == 3:
            torch.save(strategy.state_dict(), tmp_path / "fedau.pt")
            strategy = FedAU(4, 3)
            strategy.load_state_dict(torch.load(tmp_path / "fedau.pt", weights_only=True))
        nodes = came.nonzero().flatten().tolist()
        replies = [reply(node, record(local(values(arrays), node))) for node in nodes]
        arrays, _ = strategy.step(arrays, replies)
    torch.testing.assert_close(values(arrays), whole[-1], rtol=0, atol=1e-12)


def test_a_client_keeps_its_history_when_its_node_id_changes():
    strategy = FedAU(2, client_id_key="name")
    for turn, names in enumerate([("a", "b"), ("a",), ("a",), ("a", "b")]):
        replies = [
            reply(100 * turn + place, record([0.0]), config={"name": name})
            for place, name in enumerate(names)
        ]
        strategy.step(record([0.0]), replies)
    assert strategy.clients == ["a", "b"]
    assert strategy.participation.weights.tolist() == [1.0, 2.0]


def test_nodes_that_connect_later_are_counted_from_then_on():
    grid = InProcess(in_turn, [0, 1])
    strategy = FedAU(cutoff=3, fraction_evaluate=0.0)
    strategy.start(grid, record([0, 0]), num_rounds=1)
    assert strategy.participation.weights.shape == (2,)
    grid.nodes = [0, 1, 2, 3]
    arrays = strategy.start(grid, record([0, 0]), num_rounds=1).arrays
    assert strategy.clients == [0, 1, 2, 3]
    assert strategy.participation.completed.tolist() == [2, 2, 0, 0]
    # the sum of the updates of clients 0 and 1, divided by the four that are registered
    expected = 0.5 * (CENTRES[0] + CENTRES[1]) / 4
    torch.testing.assert_close(values(arrays), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtypes_and_shapes_are_kept_and_counters_stay(dtype):
    start = ArrayRecord(
        {
            "w": Array(np.zeros((2, 3), dtype)),
            "scale": Array(np.asarray(1, dtype)),
            "steps": Array(np.asarray(7)),
        }
    )
    end = ArrayRecord(
        {
            "w": Array(np.full((2, 3), 2048, dtype)),
            "scale": Array(np.asarray(3, dtype)),
            "steps": Array(np.asarray(9)),
        }
    )
    # forty updates of 2048 sum past what float16 can hold
    arrays, _ = FedAU(40).step(start, [reply(node, end) for node in range(40)])
    for name, expected in (("w", np.full((2, 3), 2048, dtype)), ("scale", 3), ("steps", 7)):
        value = arrays[name].numpy()
        assert value.dtype == start[name].numpy().dtype
        assert value.shape == start[name].numpy().shape
        np.testing.assert_array_equal(value, expected)


def test_an_update_that_is_not_finite_counts_as_absent():
    strategy = FedAU(2)
    replies = [reply(0, record([1.0])), reply(1, record([np.nan]))]
    arrays, metrics = strategy.step(record([0.0]), replies)
    assert values(arrays).tolist() == [0.5]
    assert metrics["fedau-participants"] == 1
    assert strategy.participation.completed.tolist() == [1, 0]


def test_a_round_without_anybody_moves_time_and_no_parameter():
    strategy = FedAU(3)
    arrays, metrics = strategy.step(record([5.0]), [reply(0, error="off"), reply(1)])
    assert values(arrays).tolist() == [5.0]
    assert metrics["fedau-participants"] == 0
    assert strategy.participation.elapsed.tolist() == [1, 1, 1]


def test_errors_name_what_is_wrong():
    start = record([0.0])
    with pytest.raises(ValueError, match="num_clients must be >= 1, got 0"):
        FedAU(0)
    with pytest.raises(TypeError, match="cutoff must be an integer"):
        FedAU(2, 1.5)
    with pytest.raises(ValueError, match=r"lr must be > 0\.0"):
        FedAU(2, lr=0.0)
    with pytest.raises(ValueError, match="num_clients must be given with client_id_key"):
        FedAU(client_id_key="name")
    with pytest.raises(ValueError, match=r"num_clients is 1, but 2 clients came: 3, 4"):
        FedAU(1).step(start, [reply(3, start), reply(4, start)])
    with pytest.raises(ValueError, match=r"must have shape \[1\], got \[2\]"):
        FedAU(1).step(start, [reply(0, record([0.0, 1.0]))])
    with pytest.raises(ValueError, match=r"must send the arrays \['w'\], got \['v'\]"):
        FedAU(1).step(start, [reply(0, record([0.0], name="v"))])
    with pytest.raises(TypeError, match="must be real or integer, got complex128"):
        FedAU(1).step(record([0], complex), [reply(0, record([0], complex))])
    with pytest.raises(ValueError, match="replies must name each client once"):
        FedAU(2).step(start, [reply(0, start), reply(0, start)])
    named = FedAU(2, client_id_key="name")
    with pytest.raises(ValueError, match="replies must hold 'name' in a ConfigRecord"):
        named.step(start, [reply(0, start)])
    with pytest.raises(TypeError, match="name must be a string or an integer, got float"):
        named.step(start, [reply(0, start, config={"name": 0.5})])
    with pytest.raises(RuntimeError, match="configure_train"):
        FedAU(2).aggregate_train(1, [])
    with pytest.raises(ValueError, match="state must be of 3 clients, got 2"):
        FedAU(3).load_state_dict(FedAU(2).state_dict())
    with pytest.raises(ValueError, match="clients missing"):
        FedAU(3).load_state_dict(ParticipationWeights(3).state_dict())


SIMULATION = """
import os, sys

import numpy as np
import ray
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation

from steelyard.integrations.flower import FedAU

out, scratch = sys.argv[1:]
PATTERN = {pattern}
CENTRES = {centres}

try:
    ray.init(
        num_cpus=1, include_dashboard=False, object_store_memory=100 * 2**20, _temp_dir=scratch,
        log_to_driver=False,
    )
except Exception as error:
    print(f"Ray does not start: {{error}}", file=sys.stderr)
    os._exit(77)

client_app, server_app = ClientApp(), ServerApp()


@client_app.train()
def train(message, context):
    me = context.node_config["partition-id"]
    if not PATTERN[message.content["config"]["server-round"] - 1][me]:
        if me == 3:
            raise RuntimeError("this client fails instead of declining")
        return Message(RecordDict(), reply_to=message)
    x = message.content["arrays"]["w"].numpy()
    content = {{
        "arrays": ArrayRecord({{"w": Array(x + 0.5 * (np.asarray(CENTRES[me]) - x))}}),
        "metrics": MetricRecord({{"num-examples": 10}}),
        "config": ConfigRecord({{"partition": me}}),
    }}
    return Message(RecordDict(content), reply_to=message)


@server_app.main()
def main(grid, context):
    strategy = FedAU(
        len(CENTRES), 2, client_id_key="partition", fraction_evaluate=0.0,
        min_train_nodes=4, min_available_nodes=4,
    )
    rounds = []
    strategy.start(
        grid, ArrayRecord({{"w": Array(np.zeros(2))}}), num_rounds=len(PATTERN), timeout=200,
        evaluate_fn=lambda turn, arrays: rounds.append(torch.tensor(arrays["w"].numpy())),
    )
    torch.save({{"rounds": torch.stack(rounds), "state": strategy.state_dict()}}, out)


run_simulation(
    server_app, client_app, num_supernodes=len(CENTRES),
    backend_config={{"client_resources": {{"num_cpus": 1, "num_gpus": 0.0}}}},
)
"""


def simulate(script, out, scratch):
    """Run a simulation in processes of its own, and leave none behind."""
    quiet = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": str(int(SLOW_START)),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, str(script), str(out), scratch],
        env={**os.environ, **quiet},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=SLOW_START)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        pytest.fail(f"the simulation did not end in {SLOW_START:.0f} s:\n{said[-3000:]}")
    if process.returncode == 77:
        pytest.skip(said.strip().splitlines()[-1])
    assert process.returncode == 0, said[-5000:]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Ray is experimental there")
def test_a_simulation_on_ray_takes_the_steps_of_the_functions(tmp_path):
    pytest.importorskip("ray")
    rounds = PATTERN[:4]
    script, out = tmp_path / "simulation.py", tmp_path / "out.pt"
    script.write_text(SIMULATION.format(pattern=rounds.tolist(), centres=CENTRES.tolist()))
    # a socket of Ray has a path of at most 107 letters, so not below tmp_path
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as scratch:
        simulate(script, out, scratch)
    result = torch.load(Path(out), weights_only=True)
    expected = torch.stack([torch.zeros(2, dtype=torch.float64), *by_hand(rounds, cutoff=2)])
    torch.testing.assert_close(result["rounds"], expected, rtol=0, atol=1e-12)
    assert sorted(result["state"]["clients"]) == [0, 1, 2, 3]
