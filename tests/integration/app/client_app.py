"""A Flower client as its users write it; its updates depend on its partition and the round."""

from __future__ import annotations

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    partition = context.node_config["partition-id"]
    rng = np.random.default_rng([partition, message.content["config"]["server-round"]])
    arrays = [
        array + rng.standard_normal(array.shape, array.dtype)
        for array in message.content["arrays"].to_numpy_ndarrays()
    ]
    metrics = MetricRecord({"num-examples": 10 + partition})
    return Message(
        RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message
    )
