"""The rounds of a run: ask, combine, evaluate, record; one call a round."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp.strategy import Strategy

from fedipfs.errors import BadUpdate, RunFailed, WeightsError
from fedipfs.exchange import (
    CidGrid,
    Stamp,
    StoredArrays,
    Vault,
    check_update,
    specs_of,
    store_arrays,
    stored_cid,
)
from fedipfs.ipld import CID
from fedipfs.server import records
from fedipfs.server.engine.local import LocalGrid
from fedipfs.server.records import Update
from fedipfs.strategies import parts, require, save_state, screen

log = logging.getLogger(__name__)

Evaluator = Callable[[StoredArrays], dict[str, float]]
_Aggregate = tuple[ArrayRecord | None, MetricRecord | None, list[Update], dict[int, str]]


@dataclass
class Round:
    """What a completed round leaves: its record's CID and what people want to know of it."""

    number: int
    record: CID
    needed: list[CID]  # what a resumed run needs, besides the model
    model: StoredArrays
    selected: int
    succeeded: int
    failures: dict[str, str]
    train: dict[str, Any]
    evaluate: dict[str, Any] | None
    server: dict[str, float] | None
    sgd_steps: int


@dataclass
class Federation:
    """A strategy, a grid and a model that goes from round to round.

    `grid` is wrapped in a CidGrid here, so strategies see array records and Flower carries CIDs.
    `evaluate` measures a model on the server's test set; None leaves that out. With `prefetch`,
    all nodes are told of the new model before it is evaluated. `on_phase` is told
    what a round is at.
    """

    vault: Vault
    grid: LocalGrid
    strategy: Strategy
    model: StoredArrays
    config: CID
    run: CID
    head: CID
    seed: int
    min_successes: int
    evaluate: Evaluator | None = None
    prefetch: bool = False
    on_phase: Callable[[str], None] = lambda text: None
    _edge: CidGrid = field(init=False)

    def __post_init__(self) -> None:
        self._screens = bool(getattr(self.strategy, "screens_replies", False))
        self._edge = CidGrid(
            self.grid,
            self.vault,
            read_updates=not self._screens,
            name_of=self.grid.name_of,
        )

    def play(self, number: int, *, evaluate: bool) -> Round:
        """Run round `number` (from 1) and store its record, which becomes `head`.

        Raises RunFailed if too few clients succeed or the strategy gives no usable model.
        """
        model_in = self.model
        if self.vault.party is not None:
            self._edge.stamp = Stamp(str(self.run), number)
        self.on_phase("training")
        replies = self._ask("train", number)
        self.on_phase("aggregating")
        aggregate = self._aggregate_own if self._screens else self._aggregate_stock
        arrays, metrics, updates, failures = aggregate(number, replies)
        self.model = self._adopt(arrays, number)
        named = self._names(failures)
        train = dict(metrics or {})
        train.pop("steps", None)

        if self.prefetch:
            self._edge.announce(self.model)
        self.on_phase("evaluating")
        federated, absent = self._evaluate_clients(number)
        server = self.evaluate(self.model) if evaluate and self.evaluate else None
        for name, reason in absent.items():
            named.setdefault(name, f"evaluate: {reason}")
        strategy, tensors = save_state(self.strategy, self.vault)
        record = records.round_record(
            number=number,
            run=self.run,
            parent=self.head,
            config=self.config,
            model_in=stored_cid(model_in),
            model_out=stored_cid(self.model),
            order=self.model.order,
            updates=updates,
            failures=named,
            metrics={"train": train, "evaluate": federated, "server": server},
            strategy=strategy,
            clients=self.grid.states,
        )
        self.head = records.put(self.vault, record, self.run)
        order = [self.model.order] if self.model.order is not None else []
        return Round(
            number=number,
            record=self.head,
            needed=[self.config, *order, strategy, tensors, *self.grid.states.values()],
            model=self.model,
            selected=len(replies),
            succeeded=len(replies) - len(failures),
            failures=named,
            train=train,
            evaluate=federated,
            server=server,
            sgd_steps=sum(_steps(update) for update in updates),
        )

    def _ask(self, what: str, number: int) -> list[Message]:
        # Flower's strategies draw the cohort from the global generator, which clients in this
        # process (engine=serial) have used meanwhile.
        seed = np.random.SeedSequence([self.seed, number, what == "evaluate"])
        random.seed(int(seed.generate_state(1)[0]))
        configure = getattr(self.strategy, f"configure_{what}")
        config = ConfigRecord({"run-config": str(self.config)})
        messages = configure(number, self.model, config, self._edge)
        return list(self._edge.send_and_receive(messages))

    def _screened(
        self, replies: list[Message], *, arrays: bool = True
    ) -> tuple[list[Message], dict[int, str]]:
        loss_key = getattr(self.strategy, "train_loss_key", None) if arrays else None
        return screen(replies, self._weight_key, arrays=arrays, loss_key=loss_key)

    @property
    def _weight_key(self) -> str:
        return str(getattr(self.strategy, "weighted_by_key", "num-examples"))

    def _aggregate_stock(self, number: int, replies: list[Message]) -> _Aggregate:
        """A strategy of Flower's gets the replies that are good."""
        good, failures = self._screened(replies)
        require(self.min_successes, len(good), self._names(failures), f"round {number}")
        updates = [self._update(reply) for reply in good]  # some strategies empty the records
        return *self.strategy.aggregate_train(number, good), updates, failures

    def _aggregate_own(self, number: int, replies: list[Message]) -> _Aggregate:
        """Our own strategies look at the replies themselves and say what they left out."""
        try:
            arrays, metrics = self.strategy.aggregate_train(number, replies)
        finally:  # a failure is told with the clients' names
            failures = self._excluded()
            good = [reply for reply in replies if reply.metadata.src_node_id not in failures]
            require(self.min_successes, len(good), self._names(failures), f"round {number}")
        return arrays, metrics, [self._update(reply) for reply in good], failures

    def _excluded(self) -> dict[int, str]:
        return dict(getattr(self.strategy, "excluded", {}))

    def _evaluate_clients(self, number: int) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """Metrics on what clients hold out, if any were asked, and who failed to say."""
        replies = self._ask("evaluate", number)
        if not replies:
            return None, {}
        good, failures = self._screened(replies, arrays=False)
        for node, reason in failures.items():
            log.warning("round %d: %s: evaluate: %s", number, self.grid.name_of(node), reason)
        metrics = self.strategy.aggregate_evaluate(number, good) if good else None
        return dict(metrics or {}), self._names(failures)

    def _adopt(self, arrays: ArrayRecord | None, number: int) -> StoredArrays:
        """The aggregated arrays, in the store and in the model's dtypes."""
        strategy = type(self.strategy).__name__
        if arrays is None:
            raise RunFailed(
                f"round {number}: {strategy} gave no model from these updates; the log says why"
            )
        try:
            stored = store_arrays(self.vault, arrays, specs_of(self.model))
            if not self._screens:
                check_update(stored, specs_of(self.model))
        except (BadUpdate, WeightsError) as error:
            raise RunFailed(
                f"round {number}: {strategy} gave a model that cannot be used: {error}; "
                "lower the learning rates, or choose another strategy"
            ) from error
        return stored

    def _update(self, reply: Message) -> Update:
        (arrays,), (metrics,) = parts(reply)
        numbers: dict[str, Any] = dict(metrics)
        examples = numbers.pop(self._weight_key, 0)
        node = reply.metadata.src_node_id
        signed = self._edge.signed.get(node, (b"", b""))
        return Update(self.grid.name_of(node), stored_cid(arrays), examples, numbers, *signed)

    def _names(self, failures: Mapping[int, str]) -> dict[str, str]:
        return {self.grid.name_of(node): reason for node, reason in failures.items()}


def _steps(update: Update) -> int:
    """The SGD steps that a client says it took; 0 for nonsense."""
    steps = update.metrics.get("steps")
    return int(steps) if isinstance(steps, int | float) and 0 <= steps < 2**53 else 0
