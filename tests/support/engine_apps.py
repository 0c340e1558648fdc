"""ClientApps for the engine's tests: trivial, stateful, and misbehaving."""

from __future__ import annotations

import os
import random
import signal
import time

import numpy as np
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedipfs import cid_mod

app = ClientApp(mods=[cid_mod])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Does what the config record says to the partition it names; counts its calls."""
    config = message.content["config"]
    if context.node_config["partition-id"] == config.get("victim", -1):
        match config["fault"]:
            case "raise":
                raise ValueError("no such scanner")
            case "hang":
                time.sleep(3600)
            case "spin":
                while True:
                    pass
            case "exit":
                os._exit(7)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
    state = context.state.setdefault("seen", ConfigRecord({"calls": 0}))
    state["calls"] += 1
    metrics = MetricRecord(
        {
            "num-examples": 1,
            "calls": state["calls"],
            "partition": context.node_config["partition-id"],
            "draw": random.random() + float(np.random.random()),
            "pid": os.getpid(),
        }
    )
    content = RecordDict({"metrics": metrics})
    if "arrays" in message.content:
        content["arrays"] = message.content["arrays"]
    return Message(content, reply_to=message)
