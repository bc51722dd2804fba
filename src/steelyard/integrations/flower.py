r"""FedAU as a Flower strategy.

Sampling, messages, evaluation, results and files stay those of Flower; what this module adds is the
server's step: :func:`steelyard.federated.aggregate` with the weights of
:class:`steelyard.federated.ParticipationWeights` in the place of the weighted mean.

Source: Wang and Ji (2024), A Lightweight Method for Tackling Unknown Participation Statistics in
Federated Averaging, arXiv:2306.03401.
"""
# ruff: noqa: E402, a missing extra must be reported before its imports are tried

from steelyard._extras import require

require("flwr", extra="federated")

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from steelyard._checks import check_count, check_range
from steelyard.federated import ParticipationWeights, aggregate

__all__ = ["FedAU"]

_log = logging.getLogger("flwr")

ClientId = int | str
MetricsAggregation = Callable[[list[RecordDict], str], MetricRecord]


class _Update(NamedTuple):
    slot: int
    arrays: ArrayRecord


class FedAU(FedAvg):
    r"""Federated averaging that corrects for clients taking part at different, unknown rates.

    With ``N`` registered clients, the parameters :math:`x_t` that were sent, and
    :math:`\Delta_n` = what client ``n`` sent back minus :math:`x_t`,

    .. math:: x_{t+1} = x_t + \frac{\mathrm{lr}}{N} \sum_{n \text{ took part}} \omega_n \Delta_n ,

    where :math:`\omega_n` is the mean number of rounds from one visit of client ``n`` to the next,
    counted before this round. A client takes part when its reply holds arrays. It does not when it
    was not connected or not sampled, when its reply is an error or late, when the update holds
    NaN or infinity (logged), or when it declines: a reply with an empty ``RecordDict``.

    The sum is divided by ``N``, and ``num-examples`` weighs metrics only: every client counts the
    same. Entries that are not floating (counters of batch normalisation) keep the server's value.

    Args:
        num_clients: registered clients ``N``, whether or not they ever come. ``None`` = the nodes
            that have been connected so far; one that connects later is counted from then on.
        cutoff: longest interval ``K``, which bounds the weights; ``None`` for none. See
            :func:`steelyard.federated.interval_moments`.
        lr: global learning rate, > 0.
        client_id_key: entry of the reply's ``ConfigRecord`` that names the client, a string or an
            integer, for clients whose node id changes (simulated nodes get new ones in each run).
            Needs ``num_clients``. ``None`` = the node id.
        fraction_train: share of the connected nodes that is asked. 1, unlike in an experiment that
            samples: who takes part is up to the clients.
        fraction_evaluate: share of the connected nodes that evaluates.
        min_train_nodes: fewest nodes to ask; the round waits until so many are connected.
        min_evaluate_nodes: the same for evaluation.
        min_available_nodes: fewest connected nodes to start a round.
        weighted_by_key: number of examples in the reply's ``MetricRecord``, for metrics only.
        arrayrecord_key: name of the arrays in messages.
        configrecord_key: name of the configuration in messages.
        train_metrics_aggr_fn: as in ``FedAvg``.
        evaluate_metrics_aggr_fn: as in ``FedAvg``.

    Attributes:
        participation: the :class:`steelyard.federated.ParticipationWeights`, for the coming round.
        clients: client ids in the order of its entries; ids not met yet have none.

    Training metrics gain ``fedau-participants`` and, if anybody came, ``fedau-weight-mean`` and
    ``fedau-weight-max`` of those who came.

    Raises:
        ValueError: a setting is out of range; a reply does not fit the arrays that were sent; two
            replies name the same client; more than ``num_clients`` clients came.
        TypeError: an array is neither real nor integer, or a client id neither string nor integer.

    Example:
        Client 1 came at once and then after three rounds, so every second round on average:

        >>> from flwr.app import Metadata
        >>> def reply(node):
        ...     content = {"arrays": ArrayRecord({"w": Array(np.zeros(1))}),
        ...                "metrics": MetricRecord({"num-examples": 1})}
        ...     envelope = Metadata(run_id=0, message_id="", src_node_id=node, dst_node_id=9,
        ...                         reply_to_message_id="", group_id="", created_at=0.0, ttl=60.0,
        ...                         message_type="train")
        ...     return Message(RecordDict(content), metadata=envelope)
        >>> strategy, arrays = FedAU(num_clients=2), ArrayRecord({"w": Array(np.zeros(1))})
        >>> for came in [(0, 1), (0,), (0,), (0, 1)]:
        ...     arrays, metrics = strategy.step(arrays, [reply(node) for node in came])
        >>> strategy.clients, strategy.participation.weights
        ([0, 1], tensor([1., 2.], dtype=torch.float64))

    Source: arXiv:2306.03401, Algorithms 1 and 2. The message-based strategies of
    ``flwr.serverapp`` are the ones that Flower recommends; those of ``flwr.server.strategy`` need
    a server or a simulation that it calls deprecated.
    """

    def __init__(
        self,
        num_clients: int | None = None,
        cutoff: int | None = None,
        *,
        lr: float = 1.0,
        client_id_key: str | None = None,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_train_nodes: int = 1,
        min_evaluate_nodes: int = 1,
        min_available_nodes: int = 1,
        weighted_by_key: str = "num-examples",
        arrayrecord_key: str = "arrays",
        configrecord_key: str = "config",
        train_metrics_aggr_fn: MetricsAggregation | None = None,
        evaluate_metrics_aggr_fn: MetricsAggregation | None = None,
    ) -> None:
        super().__init__(
            fraction_train=fraction_train,
            fraction_evaluate=fraction_evaluate,
            min_train_nodes=min_train_nodes,
            min_evaluate_nodes=min_evaluate_nodes,
            min_available_nodes=min_available_nodes,
            weighted_by_key=weighted_by_key,
            arrayrecord_key=arrayrecord_key,
            configrecord_key=configrecord_key,
            train_metrics_aggr_fn=train_metrics_aggr_fn,
            evaluate_metrics_aggr_fn=evaluate_metrics_aggr_fn,
        )
        if num_clients is not None:
            check_count("num_clients", num_clients)
        elif client_id_key is not None:
            raise ValueError("num_clients must be given with client_id_key, got None")
        if cutoff is not None:
            check_count("cutoff", cutoff)
        check_range("lr", lr, above=0.0)
        self.num_clients = num_clients
        self.cutoff = cutoff
        self.lr = lr
        self.client_id_key = client_id_key
        self.participation = ParticipationWeights(num_clients or 1, cutoff)
        self._slots: dict[ClientId, int] = {}
        self._sent: ArrayRecord | None = None

    @property
    def clients(self) -> list[ClientId]:
        """Ids of the clients met so far, in the order of the weights."""
        return list(self._slots)

    def summary(self) -> None:
        """Log the settings when the strategy starts."""
        registered = "those that connect" if self.num_clients is None else self.num_clients
        _log.info("\t├──> FedAU settings:")
        _log.info("\t│\t├── Registered clients: %s", registered)
        _log.info("\t│\t└── Cutoff: %s | lr: %.6g", self.cutoff, self.lr)
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask for updates of ``arrays``, and remember them: updates are differences to them."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._sent = arrays
        if self.num_clients is None:
            self._register(grid.get_node_ids())
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Take the step, then enter who came; ``None`` for the arrays when nobody did."""
        if self._sent is None:
            raise RuntimeError("aggregate_train needs the arrays that configure_train has sent")
        arrays, metrics = self.step(self._sent, replies)
        came = metrics["fedau-participants"] != 0
        return (arrays if came else None), metrics

    def step(
        self, arrays: ArrayRecord, replies: Iterable[Message]
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Apply one round's replies to the arrays that were sent, without a grid.

        Args:
            arrays: the global parameters that the clients started from.
            replies: their replies, in any order, with errors and empty ones among them.

        Returns:
            The new parameters and the training metrics. The weights are then those of the next
            round.
        """
        answers = [reply for reply in replies if reply.has_error() or _holds_arrays(reply.content)]
        valid, _ = self._check_and_log_replies(answers, is_train=True)
        sane = [reply for reply in valid if _is_finite(reply, arrays)]
        updates = self._updates(sane)
        slots = torch.tensor([update.slot for update in updates], dtype=torch.int64)
        omega = self.participation.weights[slots]
        metrics = MetricRecord()
        if updates:
            metrics = self.train_metrics_aggr_fn([m.content for m in sane], self.weighted_by_key)
            metrics["fedau-weight-mean"] = float(omega.mean())
            metrics["fedau-weight-max"] = float(omega.max())
            arrays = self._apply(arrays, [update.arrays for update in updates], omega)
        metrics["fedau-participants"] = len(updates)
        if self.num_clients or self._slots:
            came = torch.zeros(len(self.participation.weights), dtype=torch.bool)
            came[slots] = True
            self.participation.update(came)
        return arrays, metrics

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold beside the arrays.

        Tensors, and a list of client ids: ``torch.save`` writes it, and
        ``torch.load(..., weights_only=True)`` reads it.
        """
        return {**self.participation.state_dict(), "clients": self.clients}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint of :meth:`state_dict`.

        Raises:
            ValueError: it is of another number of clients, or misses an entry.
        """
        missing = sorted({"weights", "completed", "elapsed", "clients"} - set(state))
        if missing:
            raise ValueError(
                f"state must hold weights, completed, elapsed and clients, "
                f"{', '.join(missing)} missing"
            )
        count, clients = len(state["weights"]), list(state["clients"])
        if self.num_clients is not None and count != self.num_clients:
            raise ValueError(f"state must be of {self.num_clients} clients, got {count}")
        if len(set(clients)) != len(clients) or len(clients) > count:
            raise ValueError(f"state must hold at most {count} clients, each once, got {clients}")
        self.participation = ParticipationWeights(count, self.cutoff)
        tensors = {name: value for name, value in state.items() if name != "clients"}
        self.participation.load_state_dict(tensors)
        self._slots = {client: slot for slot, client in enumerate(clients)}

    def _register(self, clients: Iterable[ClientId]) -> None:
        """Give each client that is met for the first time the next entry of the weights."""
        for client in clients:
            if client not in self._slots:
                self._slots[client] = len(self._slots)
        have, want = len(self.participation.weights), len(self._slots)
        if self.num_clients is not None and want > have:
            raise ValueError(
                f"num_clients is {self.num_clients}, but {want} clients came: "
                f"{', '.join(map(str, self._slots))}"
            )
        if want > have:  # only without num_clients
            grown = ParticipationWeights(want, self.cutoff)
            for name, value in self.participation.named_buffers():
                grown.get_buffer(name)[:have] = value
            self.participation = grown

    def _updates(self, replies: list[Message]) -> list[_Update]:
        """Pair the replies with their clients, in an order that arrival does not change."""
        named = [(self._client_of(reply), reply) for reply in replies]
        ids = [client for client, _ in named]
        if len(set(ids)) != len(ids):
            raise ValueError(f"replies must name each client once, got {sorted(map(str, ids))}")
        self._register(sorted(ids, key=str))
        updates = [
            _Update(self._slots[client], next(iter(reply.content.array_records.values())))
            for client, reply in named
        ]
        return sorted(updates, key=lambda update: update.slot)

    def _client_of(self, reply: Message) -> ClientId:
        node = reply.metadata.src_node_id
        if self.client_id_key is None:
            return node
        for record in reply.content.config_records.values():
            if self.client_id_key in record:
                client = record[self.client_id_key]
                if isinstance(client, bool) or not isinstance(client, int | str):
                    raise TypeError(
                        f"{self.client_id_key} must be a string or an integer, "
                        f"got {type(client).__name__} from node {node}"
                    )
                return client
        raise ValueError(
            f"replies must hold {self.client_id_key!r} in a ConfigRecord, "
            f"the one of node {node} does not"
        )

    def _apply(self, arrays: ArrayRecord, locals_: list[ArrayRecord], omega: Tensor) -> ArrayRecord:
        # aggregate divides by the rows it is given, which are those who came, and not by N
        weights = omega * (len(locals_) / len(self.participation.weights))
        stepped = {
            name: _step(sent.numpy(), [local[name].numpy() for local in locals_], weights, self.lr)
            for name, sent in arrays.items()
        }
        return ArrayRecord({name: Array(value) for name, value in stepped.items()})


def _step(x: np.ndarray, locals_: list[np.ndarray], weights: Tensor, lr: float) -> np.ndarray:
    if x.dtype.kind != "f":
        return x
    wide = np.promote_types(x.dtype, np.float32)
    start = torch.tensor(x.astype(wide).ravel())
    ends = torch.from_numpy(np.stack([local.astype(wide).ravel() for local in locals_]))
    came = torch.ones(len(locals_), dtype=torch.bool)
    result = aggregate(start, ends - start, came, weights=weights, lr=lr).x
    return result.numpy().reshape(x.shape).astype(x.dtype)


def _holds_arrays(content: RecordDict) -> bool:
    return any(len(record) for record in content.array_records.values())


def _is_finite(reply: Message, arrays: ArrayRecord) -> bool:
    """Check a reply against what was sent; tell whether its numbers can be used."""
    node = reply.metadata.src_node_id
    record = next(iter(reply.content.array_records.values()))
    if set(record) != set(arrays):
        raise ValueError(f"node {node} must send the arrays {sorted(arrays)}, got {sorted(record)}")
    for name, sent in arrays.items():
        value, start = record[name].numpy(), sent.numpy()
        if value.shape != start.shape:
            raise ValueError(
                f"array {name!r} of node {node} must have shape {list(start.shape)}, "
                f"got {list(value.shape)}"
            )
        if start.dtype.kind not in "fiub":
            raise TypeError(f"array {name!r} must be real or integer, got {start.dtype}")
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            _log.warning("FedAU: node %s left out, %r is not finite", node, name)
            return False
    return True
