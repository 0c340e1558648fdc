"""The rounds of a run: ask, combine, evaluate, record; one call a round."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp.strategy import Strategy

from fedipfs.errors import RunFailed
from fedipfs.exchange import CidGrid, StoredArrays, check_update, specs_of, store_arrays
from fedipfs.ipld import CID
from fedipfs.server.engine.local import LocalGrid
from fedipfs.server.records import Update, round_record
from fedipfs.store import Store, dag
from fedipfs.strategies import require, save_state, screen

Evaluator = Callable[[StoredArrays], dict[str, float]]


@dataclass
class Round:
    """What a completed round leaves: its record's CID and what people want to know of it."""

    number: int
    record: CID
    model: StoredArrays
    selected: int
    failures: dict[str, str]
    train: dict[str, Any]
    evaluate: dict[str, Any] | None
    server: dict[str, float] | None
    sgd_steps: int


@dataclass
class Federation:
    """A strategy, a grid and a model that goes from round to round.

    `grid` is wrapped in a CidGrid here, so strategies see array records and Flower carries CIDs.
    `evaluate` measures a model on the server's test set; None leaves that out. `on_phase` is told
    what a round is at.
    """

    store: Store
    grid: LocalGrid
    strategy: Strategy
    model: StoredArrays
    config: CID
    head: CID
    seed: int
    min_successes: int
    evaluate: Evaluator | None = None
    on_phase: Callable[[str], None] = lambda text: None
    _edge: CidGrid = field(init=False)

    def __post_init__(self) -> None:
        self._screens = bool(getattr(self.strategy, "screens_replies", False))
        self._edge = CidGrid(self.grid, self.store, read_updates=not self._screens)

    def play(self, number: int, *, evaluate: bool) -> Round:
        """Run round `number` (from 1) and store its record, which becomes `head`.

        Raises RunFailed if too few clients succeed or the strategy gives no usable model.
        """
        # Flower's strategies draw the cohort from the global generator.
        random.seed(int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0]))
        model_in = self.model
        self.on_phase("training")
        replies = self._ask("train", number)
        selected = len(replies)
        good, failures = self._screened(replies)
        updates = [_update(self.grid, reply) for reply in good]  # some strategies empty records
        self.on_phase("aggregating")
        if not self._screens:
            require(self.min_successes, len(good), self._names(failures), f"round {number}")
            arrays, metrics = self.strategy.aggregate_train(number, good)
        else:
            try:
                arrays, metrics = self.strategy.aggregate_train(number, replies)
            except RunFailed:  # say it with the clients' names
                failures = dict(getattr(self.strategy, "excluded", {}))
                good_ones = selected - len(failures)
                require(self.min_successes, good_ones, self._names(failures), f"round {number}")
                raise
            failures = dict(getattr(self.strategy, "excluded", {}))
        self.model = self._adopt(arrays, number)
        named = self._names(failures)
        updates = [update._replace(used=update.client not in named) for update in updates]
        train = dict(metrics or {})
        sgd_steps = sum(int(update.metrics.get("steps", 0)) for update in updates if update.used)
        train.pop("steps", None)

        self.on_phase("evaluating")
        federated = self._evaluate_clients(number)
        server = self.evaluate(self.model) if evaluate and self.evaluate else None
        record = round_record(
            number=number,
            parent=self.head,
            config=self.config,
            model_in=_cid(model_in),
            model_out=_cid(self.model),
            order=self.model.order,
            updates=updates,
            failures=named,
            metrics={"train": train, "evaluate": federated, "server": server},
            strategy=save_state(self.strategy, self.store),
            clients=self.grid.states,
        )
        self.head = dag.put_record(self.store, record)
        return Round(
            number, self.head, self.model, selected, named, train, federated, server, sgd_steps
        )

    def _ask(self, what: str, number: int) -> list[Message]:
        configure = getattr(self.strategy, f"configure_{what}")
        config = ConfigRecord({"run-config": str(self.config)})
        messages = configure(number, self.model, config, self._edge)
        return list(self._edge.send_and_receive(messages))

    def _screened(self, replies: list[Message]) -> tuple[list[Message], dict[int, str]]:
        return screen(replies, getattr(self.strategy, "weighted_by_key", "num-examples"))

    def _evaluate_clients(self, number: int) -> dict[str, Any] | None:
        replies = self._ask("evaluate", number)
        if not replies:
            return None
        good, _ = screen(
            replies, getattr(self.strategy, "weighted_by_key", "num-examples"), arrays=False
        )
        metrics = self.strategy.aggregate_evaluate(number, good) if good else None
        return dict(metrics or {})

    def _adopt(self, arrays: ArrayRecord | None, number: int) -> StoredArrays:
        """The aggregated arrays, in the store and in the model's dtypes."""
        if arrays is None:
            raise RunFailed(
                f"round {number}: {type(self.strategy).__name__} gave no model from these "
                "updates; the log says why"
            )
        stored = store_arrays(self.store, arrays, specs_of(self.model))
        if not self._screens:
            check_update(stored, specs_of(self.model))
        return stored

    def _names(self, failures: Mapping[int, str]) -> dict[str, str]:
        return {self.grid.name_of(node): reason for node, reason in failures.items()}


def _update(grid: LocalGrid, reply: Message) -> Update:
    (arrays,) = reply.content.array_records.values()
    (metrics,) = reply.content.metric_records.values()
    numbers: dict[str, Any] = dict(metrics)
    examples = numbers.pop("num-examples", 0)
    return Update(
        grid.name_of(reply.metadata.src_node_id), _cid(arrays), examples, numbers, used=True
    )


def _cid(arrays: ArrayRecord) -> CID:
    assert isinstance(arrays, StoredArrays)
    assert arrays.cid is not None
    return arrays.cid
