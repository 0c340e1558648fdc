"""A Flower app as its users write it, apart from two lines (marked) that bring in FedIPFS."""

from __future__ import annotations

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedipfs import cid_mod


def make_app(*mods) -> ClientApp:
    """The app with the mods given: none for plain Flower."""
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = message.content["arrays"].to_numpy_ndarrays()
        rng = np.random.default_rng(
            [context.node_config["partition-id"], message.content["config"]["server-round"]]
        )
        arrays = [(a + rng.normal(size=a.shape)).astype(a.dtype) for a in arrays]
        record = ArrayRecord(dict(zip(message.content["arrays"], map(_array, arrays), strict=True)))
        metrics = MetricRecord(
            {"num-examples": 10 + context.node_config["partition-id"], "train_loss": 0.5}
        )
        return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        total = sum(float(a.sum()) for a in message.content["arrays"].to_numpy_ndarrays())
        metrics = MetricRecord({"num-examples": 10, "loss": total})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def _array(values: np.ndarray):
    from flwr.app import Array

    return Array(np.asarray(values))


plain_app = make_app()
app = make_app(cid_mod)  # line one; line two is CidGrid(grid) on the server
