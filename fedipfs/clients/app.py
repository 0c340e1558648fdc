"""The ClientApp: fetch the model by CID, train on local data, store the update, answer its CID.

A train message's "config" record holds `server-round` and `run-config`, the CID of the run's
configuration; Flower's FedProx adds `proximal-mu`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedipfs import data, tasks
from fedipfs.clients.trainer import train as train_model
from fedipfs.data import Dataset, Examples
from fedipfs.exchange import (
    cid_mod,
    default_vault,
    from_torch,
    stored_cid,
    to_torch,
)
from fedipfs.ipld import CID

app = ClientApp(mods=[cid_mod])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the model that came in on this client's examples."""
    site, ask = _site(message, context), _ask(message)
    examples, _ = site.examples(context)
    server_round = int(ask["server-round"])  # type: ignore[arg-type]
    model = site.load(message)
    seed = np.random.SeedSequence(
        [site.config["seed"], server_round, int(context.node_config["partition-id"])]
    )
    metrics = train_model(
        site.task,
        model,
        examples.inputs,
        examples.targets,
        config=site.config["train"],
        seed=int(seed.generate_state(1)[0]),
        server_round=server_round,
        proximal_mu=float(ask.get("proximal-mu", 0.0)),  # type: ignore[arg-type]
    )
    content = RecordDict(
        {"arrays": from_torch(model.state_dict()), "metrics": MetricRecord(dict(metrics))}
    )
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the model that came in on the examples this client holds out."""
    site = _site(message, context)
    _, examples = site.examples(context)
    metrics = tasks.evaluate(
        site.task,
        site.load(message),
        examples.inputs,
        examples.targets,
        batch_size=site.config["evaluate"]["batch_size"],
        device=site.config["train"]["device"],
    )
    record = MetricRecord({"num-examples": len(examples.targets), **metrics})
    return Message(RecordDict({"metrics": record}), reply_to=message)


class Site(NamedTuple):
    """What a client keeps between messages of one run."""

    config: dict[str, Any]
    task: tasks.Task
    model: Any  # one torch module, loaded anew for every message
    dataset: Dataset
    parts: list[np.ndarray]

    def load(self, message: Message) -> Any:
        """The module with the weights that came with `message`."""
        arrays = message.content["arrays"]
        assert isinstance(arrays, ArrayRecord)
        self.model.load_state_dict(_state_dict(arrays))
        return self.model

    def examples(self, context: Context) -> tuple[Examples, Examples]:
        """This client's training and held-out examples."""
        indices = self.parts[int(context.node_config["partition-id"])]
        held_out = round(len(indices) * (self.config["data"]["validation"] or 0.0))
        train, test = np.split(indices, [len(indices) - held_out])
        return _take(self.dataset.train, train), _take(self.dataset.train, test)


_latest: list[tuple[CID, dict[str, Any]]] = []  # all clients of a round begin with the same model


def _state_dict(arrays: ArrayRecord) -> dict[str, Any]:
    cid = stored_cid(arrays)
    if not _latest or _latest[0][0] != cid:
        _latest[:] = [(cid, to_torch(arrays))]
    return _latest[0][1]


def _take(examples: Examples, indices: np.ndarray) -> Examples:
    return Examples(examples.inputs[indices], examples.targets[indices])


def _ask(message: Message) -> ConfigRecord:
    record = message.content["config"]
    assert isinstance(record, ConfigRecord)
    return record


def _site(message: Message, context: Context) -> Site:
    node = context.node_config
    return _open_site(
        str(_ask(message)["run-config"]),
        int(node["num-partitions"]),
        str(node.get("data-root") or ""),
        str(node.get("allowed-tasks") or ""),
    )


@lru_cache(maxsize=1)
def _open_site(config_cid: str, partitions: int, root: str, allowed: str) -> Site:
    config = default_vault("participant").get_record(CID.parse(config_cid))
    task = tasks.load(
        config["task"]["target"],
        config["task"]["options"],
        allowed=(*tasks.ALLOWED, *filter(None, allowed.split(","))),
    )
    dataset = task.data(root=root or None, fallback=config["data"]["fallback"])
    options = config["data"]
    parts = data.partition(
        dataset.train.targets,
        name=options["partition"],
        clients=partitions,
        seed=config["seed"],
        alpha=options["alpha"],
        shards_per_client=options["shards_per_client"],
        classes_per_client=options["classes_per_client"],
    )
    return Site(config, task, task.model(), dataset, parts)
