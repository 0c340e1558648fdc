"""The trivial client, and a plain Flower Grid that calls it in this process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedipfs import cid_mod
from fedipfs.flower_compat import message_from_bytes, message_to_bytes, set_identity, set_message_id


def make_app(*mods: Any) -> ClientApp:
    """A client that answers each array plus one: nothing but what surrounds training is left."""
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        sent = message.content["arrays"]
        arrays = [array + np.float32(1) for array in sent.to_numpy_ndarrays()]
        content = RecordDict(
            {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 1})}
        )
        return Message(content, reply_to=message)

    return app


app = make_app(cid_mod)
plain_app = make_app()


def model(parameters: int, layers: int = 1) -> ArrayRecord:
    """`parameters` float32 zeros in `layers` arrays."""
    return ArrayRecord([np.zeros(parameters // layers, np.float32) for _ in range(layers)])


class PlainGrid(Grid):
    """Flower as it is: `nodes` nodes, array records in the messages, all in this process.

    Messages are serialised and read again both ways, as in any Flower deployment or simulation;
    `crossed` counts their bytes.
    """

    def __init__(self, app: ClientApp, nodes: int) -> None:
        self._app, self._nodes, self.crossed = app, range(2, 2 + nodes), 0
        set_identity(run_id=1, node_id=1)

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError("only send_and_receive is needed here")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError("only send_and_receive is needed here")

    def send_and_receive(self, messages, *, timeout=None) -> Iterable[Message]:
        return [self._call(number, message) for number, message in enumerate(messages)]

    def _call(self, number: int, message: Message) -> Message:
        set_message_id(message, f"m{number}")
        node = message.metadata.dst_node_id
        context = Context(1, node, {"partition-id": node - 2}, RecordDict(), {})
        return self._wire(self._app(self._wire(message), context))

    def _wire(self, message: Message) -> Message:
        data = message_to_bytes(message)
        self.crossed += len(data)
        return message_from_bytes(data)


def plain_round(grid: PlainGrid, arrays: ArrayRecord, number: int) -> ArrayRecord:
    """One round of Flower's own FedAvg over all nodes."""
    strategy = FedAvg(fraction_evaluate=0.0)
    messages = strategy.configure_train(number, arrays, ConfigRecord(), grid)
    new, _ = strategy.aggregate_train(number, grid.send_and_receive(messages))
    assert new is not None
    return new
