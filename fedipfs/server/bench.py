"""What a run needs and what can fail before it leaves a trace: store, task, data, strategy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy

from fedipfs import data, tasks
from fedipfs.data import Dataset
from fedipfs.errors import ConfigError
from fedipfs.exchange import StoredArrays, from_torch, to_torch
from fedipfs.ipld import CID
from fedipfs.store import Store, dag, open_store
from fedipfs.strategies import Cohort, build, required_successes


@dataclass
class Bench:
    """The parts of a run, ready before its folder is made."""

    store: Store
    task: tasks.Task
    dataset: Dataset
    strategy: Strategy
    min_successes: int  # of a round
    model: ArrayRecord  # the model that the first round begins with

    @classmethod
    def prepare(cls, config: Mapping[str, Any]) -> Bench:
        """Everything that the checked `config` names; UserError for what the user can mend."""
        clients, target = config["clients"], config["task"]["target"]
        cohort = Cohort(
            total=clients["total"],
            train=clients["per_round"],
            evaluate=clients["per_round"] if config["evaluate"]["federated"] else 0,
            min_successes=clients["min_successes"],
        )
        strategy = build(config["strategy"], cohort)
        min_successes = required_successes(config["strategy"], cohort)
        store = open_store(config["store"])
        store.ready()
        # The configuration is the coordinator's own here, so what it names may be loaded.
        task = tasks.load(
            target, config["task"]["options"], allowed=(*tasks.ALLOWED, target.rpartition(":")[0])
        )
        tasks.optim.check(config["train"])
        options = config["data"]
        dataset = task.data(root=options["root"], fallback=options["fallback"])
        # Workers will find the partition in the cache; here it fails early if it cannot be made.
        data.partition(
            dataset.train.targets,
            name=options["partition"],
            clients=clients["total"],
            seed=config["seed"],
            alpha=options["alpha"],
            shards_per_client=options["shards_per_client"],
            classes_per_client=options["classes_per_client"],
        )
        model = _initial_model(store, task, config["seed"], config["init_from"])
        return cls(store, task, dataset, strategy, min_successes, model)

    def evaluate(self, model: ArrayRecord, config: Mapping[str, Any]) -> dict[str, float]:
        """Loss and metrics of `model` on the server's test set."""
        module = self.task.model()
        module.load_state_dict(to_torch(model))
        test = self.dataset.test
        return tasks.evaluate(
            self.task,
            module,
            test.inputs,
            test.targets,
            batch_size=config["evaluate"]["batch_size"],
            device=config["train"]["device"],
        )


def _initial_model(store: Store, task: tasks.Task, seed: int, init_from: str | None) -> ArrayRecord:
    """The task's own model, initialised by `seed`, with the weights of `init_from` if given."""
    import torch

    torch.manual_seed(seed)
    module = task.model()
    if init_from is not None:
        arrays = _given_model(store, init_from)
        try:
            module.load_state_dict(to_torch(arrays))
        except RuntimeError as error:
            why = str(error).splitlines()[-1].strip()
            raise ConfigError(f"init_from={init_from} does not fit the task: {why}") from None
    return from_torch(module.state_dict())


def _given_model(store: Store, init_from: str) -> StoredArrays:

    path = Path(init_from)
    cid = dag.add_file(store, path) if path.is_file() else _cid(init_from)
    return StoredArrays.open(store, cid)


def _cid(text: str) -> CID:
    try:
        return CID.parse(text)
    except ValueError:
        raise ConfigError(
            f"init_from={text} is neither a safetensors file nor the CID of one"
        ) from None
