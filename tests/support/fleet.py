"""Clients that are the real ClientApp, over one store, and rounds as the server plays them."""

from __future__ import annotations

import random
from typing import Any

import torch
from flwr.app import ConfigRecord, Message
from flwr.serverapp.strategy import Strategy
from grids import DirectGrid

from fedipfs import CidGrid, tasks, use_store
from fedipfs.clients.app import app
from fedipfs.clients.state import load_state, save_state
from fedipfs.exchange import StoredArrays, from_torch, specs_of, store_arrays, to_torch, vault_of
from fedipfs.strategies import Brief, build

QUADRATIC = f"{__file__.rpartition('/')[0]}/quadratic.py:Quadratic"


class Fleet:
    """`clients` nodes from 2 on; what they remember passes through the store after each round."""

    def __init__(
        self,
        store,
        task: str = "fedipfs.tasks.small:Digits",
        clients: int = 4,
        *,
        options: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        **train: Any,
    ) -> None:
        use_store(store)
        self.vault, self.clients = vault_of(store), clients
        self.train = {
            "batch_size": 32,
            "epochs": 1,
            "steps": None,
            "optimizer": {"name": "SGD", "lr": 0.1},
            "schedule": None,
            "clip_norm": None,
            "device": "cpu",
            **train,
        }
        self.config = {
            "seed": 1,
            "task": {"target": task, "options": options or {}},
            "data": {
                "partition": "iid",
                "fallback": "digits",
                "alpha": 0.5,
                "shards_per_client": 2,
                "classes_per_client": 1,
                "validation": 0.0,
                **(data or {}),
            },
            "privacy": {"name": "none"},
            "train": self.train,
            "evaluate": {"batch_size": 200},
        }
        place = task.rpartition(":")[0]
        allowed = "" if place.startswith("fedipfs.") else place
        self.task = tasks.load(task, options, allowed=(*tasks.ALLOWED, allowed))
        self.raw = DirectGrid(app, clients)
        for context in self.raw.contexts.values():
            context.node_config |= {"num-partitions": clients, "allowed-tasks": allowed}
        self.grid = CidGrid(self.raw, store, read_updates=False)
        self.run_config = str(self.vault.put_record(self.config))
        torch.manual_seed(1)
        self.model = store_arrays(store, from_torch(self.task.model().state_dict()))
        self.replies: list[Message] = []

    def build(self, name: str, **options: Any) -> Strategy:
        """The strategy `name`, told of this run."""
        brief = Brief(
            per_round=self.clients,
            min_successes=1,
            clients=self.clients,
            train=self.train,
            task=self.task,
            evaluates=True,
        )
        return build({"name": name, **options}, brief)

    def play(self, strategy: Strategy, first: int = 1, last: int = 1) -> dict[str, torch.Tensor]:
        """Rounds `first` to `last` from `self.model`, which becomes the last one's."""
        for number in range(first, last + 1):
            self.replies = self.ask(strategy.configure_train, number)
            arrays, self.metrics = strategy.aggregate_train(number, self.replies)
            self.model = store_arrays(self.vault, arrays, specs_of(self.model))
        return to_torch(self.model)

    def evaluate(self, strategy: Strategy, number: int = 1) -> dict[int, dict[str, float]]:
        """By node, what the clients measure."""
        replies = self.ask(strategy.configure_evaluate, number)
        return {each.metadata.src_node_id: dict(each.content["metrics"]) for each in replies}

    def ask(self, configure: Any, number: int) -> list[Message]:
        random.seed(number)
        config = ConfigRecord({"run-config": self.run_config})
        messages = configure(number, self.model, config, self.grid)
        replies = list(self.grid.send_and_receive(messages))
        for context in self.raw.contexts.values():
            context.state = load_state(self.vault, save_state(self.vault, context.state)[0])
        return replies

    def update(self, node: int, key: str = "arrays") -> dict[str, torch.Tensor]:
        """What a node answered last."""
        (reply,) = [each for each in self.replies if each.metadata.src_node_id == node]
        arrays = reply.content[key]
        assert isinstance(arrays, StoredArrays)
        return to_torch(arrays)
