"""A ClientApp in which partition 1 does what `run_config["fault"]` says; the others are good."""

from __future__ import annotations

import numpy as np
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedipfs import cid_mod
from fedipfs.exchange import from_numpy

app = ClientApp()
BIG = 1.7e308


def _metrics(fault: str) -> dict:
    good = {"num-examples": 10, "train_loss": 0.5, "steps": 3}
    changes: dict[str, dict] = {
        "steps_nan": {"steps": float("nan")},
        "steps_inf": {"steps": float("inf")},
        "steps_list": {"steps": [1, 2]},
        "loss_list": {"train_loss": [0.5, 0.5]},
        "loss_empty": {"train_loss": []},
        "loss_nan": {"train_loss": float("nan")},
        "loss_negative": {"train_loss": -1.0},
        "examples_nan": {"num-examples": float("nan")},
        "examples_list": {"num-examples": [10]},
        "long_name": {"x" * 3_000_000: 1.0},
        "many_metrics": {f"m{i}": 1.0 for i in range(20_000)},
        "extra_metric": {"bonus": 1.0},
    }
    return {**good, **changes.get(fault, {})}


def _content(message: Message, context: Context, fault: str) -> RecordDict:
    arrays = {n: a.numpy() * 1.5 for n, a in message.content["arrays"].items()}
    if fault == "overflow":
        arrays = {n: np.full_like(a, BIG) for n, a in arrays.items()}
    key = "weights" if fault == "array_name" else "arrays"
    content = RecordDict({key: from_numpy(arrays)})
    if fault != "no_metrics":
        name = "numbers" if fault == "metric_name" else "metrics"
        content[name] = MetricRecord(_metrics(fault))
    if fault == "two_metrics":
        content["again"] = MetricRecord(_metrics(""))
    if fault == "two_arrays":
        content["again"] = from_numpy(arrays)
    if fault == "many_values":
        content["c"] = ConfigRecord({f"k{i}": "x" * 1000 for i in range(3000)})
    return content


def train(message: Message, context: Context) -> Message:
    fault = str(context.run_config["fault"])
    if context.node_config["partition-id"] != 1:
        fault = "overflow" if fault == "overflow_all" else ""
    if fault == "raise_long":
        raise ValueError("x" * 3_000_000)
    if fault == "raise_surrogate":
        raise ValueError("bad \udc80 text")
    if fault == "system_exit":
        raise SystemExit(5)
    if fault == "error_reply":
        return Message(Error(99, "y" * 5_000_000), reply_to=message)
    if fault == "not_a_message":
        return None  # type: ignore[return-value]
    reply = Message(_content(message, context, fault), reply_to=message)
    if fault == "spoof":
        reply.metadata.__dict__["_src_node_id"] = 2
    return reply


def edge(message: Message, context: Context, call_next) -> Message:
    """As cid_mod, but some faults happen behind it, where a hostile client works."""
    reply = cid_mod(message, context, call_next)
    if context.node_config["partition-id"] != 1 or not reply.has_content():
        return reply
    references = reply.content.get("fedipfs")
    fault = context.run_config["fault"]
    if fault in ("order_numbers", "order_swapped"):
        from fedipfs.exchange import default_vault

        names = [0, 1] if fault == "order_numbers" else ["b", "a"]
        references["order:arrays"] = str(default_vault("participant").put_record(names))
    elif fault == "cid_list":
        references["cid:arrays"] = ["a", "b"]
    elif fault == "raw_arrays":
        reply.content["raw"] = from_numpy({"a": np.ones(3, "f4")})
    return reply


@app.train(mods=[edge])
def _train(message: Message, context: Context) -> Message:
    return train(message, context)


@app.evaluate(mods=[cid_mod])
def evaluate(message: Message, context: Context) -> Message:
    metrics = {"num-examples": 5, "loss": 1.0}
    fault = context.run_config["fault"]
    if context.node_config["partition-id"] == 1:
        if fault == "evaluate_list":
            metrics["loss"] = [1.0, 2.0]
        if fault == "evaluate_raise":
            raise RuntimeError("no disk")
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
