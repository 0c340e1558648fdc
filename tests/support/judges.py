"""Clients whose model is one number, how good it is; and rounds in which they judge each other."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from grids import DirectGrid
from parties import Link

from fedipfs import CidGrid, cid_mod
from fedipfs.exchange import StoredArrays, from_numpy, store_arrays
from fedipfs.flower_compat import set_message_id
from fedipfs.server.cohort import Answers, ask
from fedipfs.strategies.base import StoreStrategy

FIRST = 2  # the first node's id


class Judges:
    """Node i trains a model whose "w" is `quality[i]`, which is its accuracy at an honest client.

    Node i says of its own model what is in `claims`, of every model what is in `verdicts`; it
    fails to evaluate if that is an exception.
    """

    def __init__(self, *quality: float, mod=cid_mod) -> None:
        self.quality = dict(enumerate(quality, FIRST))
        self.claims: dict[int, float] = {}
        self.verdicts: dict[int, Any] = {}
        self.evaluated: list[tuple[int, float]] = []  # evaluator, quality of what it was given
        self.given: dict[int, float] = {}  # node -> the "w" it was to train last
        self.told: dict[int, dict[str, Any]] = {}  # node -> its train message's config
        self.app = ClientApp(mods=[mod])
        self.app.train()(self._train)
        self.app.evaluate()(self._evaluate)

    def _train(self, message: Message, context: Any) -> Message:
        node = context.node_id
        self.told[node] = dict(message.content["config"])
        self.given[node] = float(message.content["arrays"]["w"].numpy()[0])
        w = np.array([self.quality[node]], "f4")
        metrics = {"num-examples": 10 * (node - FIRST + 1), "train_loss": 0.5}
        if self.told[node].get("report"):
            metrics["val_accuracy"] = self.claims.get(node, float(w[0]))
        content = RecordDict({"arrays": from_numpy({"w": w}), "metrics": MetricRecord(metrics)})
        return Message(content, reply_to=message)

    def _evaluate(self, message: Message, context: Any) -> Message:
        found = float(message.content["arrays"]["w"].numpy()[0])
        self.evaluated.append((context.node_id, found))
        verdict = self.verdicts.get(context.node_id, found)
        if isinstance(verdict, Exception):
            raise verdict
        metrics = MetricRecord({"num-examples": 5, "loss": 1.0, "accuracy": verdict})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)


class _Queued:
    """Replies lie ready until they are asked for, one at a time, in an order drawn from `order`."""

    def push_messages(self, messages):
        ids = []
        for message in messages:
            number = f"m{next(self._numbers)}"
            set_message_id(message, number)
            ids.append(number)
            self._ready[number] = self._call(message)
        return ids

    def pull_messages(self, message_ids):
        return [self._ready.pop(number) for number in list(message_ids) if number in self._ready]

    def receive(self, message_ids, timeout):
        ready = sorted(number for number in message_ids if number in self._ready)
        return self.pull_messages([self.order.choice(ready)]) if ready else []

    def queue(self, order: int):
        self._numbers, self._ready = itertools.count(), {}
        self.order = random.Random(order)
        return self


class QueuedGrid(_Queued, DirectGrid):
    """A DirectGrid for messages that follow up others."""


class QueuedLink(_Queued, Link):
    """The same between parties with keys."""


def first_model(where: Any, model: Mapping[str, np.ndarray]) -> StoredArrays:
    return store_arrays(where, from_numpy(model))


def play(
    strategy: StoreStrategy, grid: CidGrid, model: StoredArrays, number: int = 1
) -> tuple[StoredArrays, Answers]:
    """A round's training as Federation does it; its model, and what was answered."""
    config = ConfigRecord({"run-config": "none"})
    messages = list(strategy.configure_train(number, model, config, grid))
    answers = ask(
        grid,
        messages,
        now=lambda: 0.0,
        follow_up=lambda reply: strategy.follow_up(number, reply, grid),
    )
    strategy.take_follow_ups(answers.follow_ups)
    arrays, _ = strategy.aggregate_train(number, answers.replies)
    assert isinstance(arrays, StoredArrays)
    return arrays, answers
