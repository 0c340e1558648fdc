"""The rounds of a run: ask, combine, evaluate, record; one call a round."""

from __future__ import annotations

import copy
import logging
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy

from fedipfs.errors import BadUpdate, Diverged, RunFailed, WeightsError, one_line
from fedipfs.exchange import (
    NOT_FINITE,
    CidGrid,
    StoredArrays,
    Vault,
    check_update,
    cost_of,
    specs_of,
    store_arrays,
    stored_cid,
)
from fedipfs.ipld import CID
from fedipfs.secagg import Parameters
from fedipfs.server import private, records
from fedipfs.server.asking import Asking
from fedipfs.server.engine.base import NodeGrid
from fedipfs.server.records import Update
from fedipfs.server.secure import Secure, secure_metrics
from fedipfs.server.selection import Selection
from fedipfs.server.spending import OfClients, OfRecords, Spending
from fedipfs.strategies import parts, require, save_state, screen, update_in
from fedipfs.strategies.fedsgd import FedSGD
from fedipfs.weights.compression import Spec

log = logging.getLogger(__name__)

Evaluator = Callable[[StoredArrays, CID | None], dict[str, float]]
_Aggregate = tuple[ArrayRecord | None, MetricRecord | None, list[Update], dict[int, str]]


@dataclass
class Round:
    """What a completed round leaves: its record's CID and what people want to know of it."""

    number: int
    record: CID
    details: CID | None  # of the record, where they are sealed
    needed: list[CID]  # what a resumed run needs, besides the model
    model: StoredArrays  # what the next round begins with
    result: CID  # what the run yields: the model, or an ensemble
    selected: int
    succeeded: int
    failures: dict[str, str]
    train: dict[str, Any]
    evaluate: dict[str, Any] | None
    median: dict[str, float] | None  # of what the clients measured
    server: dict[str, float] | None
    aggregation: dict[str, Any]  # how the strategy combined the updates
    compression: dict[str, float] | None  # of the updates, where they are compressed
    privacy: dict[str, Any] | None  # what it has cost so far
    sgd_steps: int


@dataclass
class Federation:
    """A strategy, a grid and a model that goes from round to round.

    `grid` is wrapped in a CidGrid here, so strategies see array records and Flower carries CIDs.
    `selection` says who is asked; a round's training ends after `deadline_s`. `compression` is how
    updates travel, and with `compress_models` models, too. `poison` replaces
    replies as an adversary would (server/attack.py). `evaluate` measures a model, or what stands
    for it, on the server's test set; None leaves that out. With `prefetch`, all nodes are told of
    the new model before it is evaluated. `spending` counts what answers cost in privacy.
    With `secagg`, the section of the configuration, the strategy gets the mean of the updates, and
    the server sees no single one; `session` then names the run in what clients sign, and `masks`,
    where clients add noise of their own, gives a cohort's parameters. `attempt`, the number of
    processes that began on the run before, and the cohort's size are told to partners. `on_phase`
    is told what a round is at.
    """

    vault: Vault
    grid: NodeGrid
    strategy: Strategy
    selection: Selection
    model: StoredArrays
    config: CID
    run: CID
    head: CID
    seed: int
    min_successes: int
    deadline_s: float | None = None
    compression: Spec | None = None
    compress_models: bool = False
    poison: Callable[[int, list[Message]], list[Message]] | None = None
    evaluate: Evaluator | None = None
    prefetch: bool = False
    spending: Spending | None = None
    secagg: Mapping[str, Any] | None = None
    session: str = ""
    attempt: int | None = None
    masks: Callable[[int, int], Parameters] | None = None
    on_phase: Callable[[str], None] = lambda text: None
    _edge: CidGrid = field(init=False)

    def __post_init__(self) -> None:
        self._screens = bool(getattr(self.strategy, "screens_replies", False))
        self._noised = isinstance(self.spending, OfClients)
        self._edge = CidGrid(
            self.grid,
            self.vault,
            # The first so many must not be those that send rubbish fastest.
            read_updates=not self._screens or self.selection.extra > 0,
            name_of=self.grid.name_of,
            compression=self.compression,
            compress_models=self.compress_models,
            exact=getattr(self.strategy, "extra_arrays", ()),
        )
        self._edge.attempt = self.attempt
        self.asking = Asking(
            self._edge,
            self.grid,
            self.strategy,
            self.selection,
            self.config,
            self.seed,
            run=None if self.vault.party is None else str(self.run),
            deadline_s=self.deadline_s,
            poison=self.poison,
            told=self._told(),
            tells_cohort=self.attempt is not None,
            secure=self._secure(),
        )

    def _secure(self) -> Secure | None:
        if self.secagg is None or self.secagg["name"] == "off":
            return None
        self.strategy.min_successes = 1  # type: ignore[attr-defined] # it gets one update
        return Secure(
            self._edge,
            self.vault,
            self.session,
            self.secagg,
            () if self._noised else secure_metrics(self.spending is not None),
            not isinstance(self.strategy, FedSGD),
            self.grid.name_of,
            self.grid.now,
            self.deadline_s,
            self.masks,
            self.min_successes,
        )

    def _told(self) -> dict[str, Any]:
        """What clients must know to keep their records private."""
        if self.spending is None:
            return {}
        told: dict[str, Any] = {"run": str(self.run)}
        return told | ({"loss": True} if private.reports_loss(self.strategy) else {})

    def play(self, number: int, *, evaluate: Callable[[], bool]) -> Round:
        """Run round `number` (from 1) and store its record, which becomes `head`.

        Whether the server is to `evaluate` is asked when the new model is there.

        Raises RunFailed if too few clients succeed or the strategy gives no usable model.
        """
        model_in = self.model
        self._began_with = model_in.cid
        self.on_phase("training")
        if isinstance(self.spending, OfClients) and self.asking.secure is not None:
            self.spending.released()  # who is told the sum learns it as it is unmasked
        answers = self.asking.train(number, self.model)
        replies = answers.replies
        self._count(replies + answers.follow_ups)
        arrived = [update for reply in replies if (update := self._update_in(reply)) is not None]
        self.on_phase("aggregating")
        if answers.follow_ups:
            self.strategy.take_follow_ups(answers.follow_ups)  # type: ignore[attr-defined]
        if isinstance(self.spending, OfClients) and self.asking.secure is None:
            self.spending.released()
        aggregate = self._aggregate_own if self._screens else self._aggregate_stock
        if self.asking.secure is not None:
            aggregate = self._aggregate_sum
        arrays, metrics, updates, failures = aggregate(number, replies)
        if isinstance(self.spending, OfClients):
            self.spending.survived(len(updates))
        self.asking.heard(number, replies, failures)
        self.model = self._adopt(arrays, number)
        result = getattr(self.strategy, "result", None)
        named = self._names(failures)
        train = dict(metrics or {})
        train.pop("steps", None)

        if self.prefetch:
            self._edge.announce(self.model)
        self.on_phase("evaluating")
        asked = [reply.metadata.src_node_id for reply in replies]
        federated, median, absent = self._evaluate_clients(number, asked)
        server = self.evaluate(self.model, result) if self.evaluate and evaluate() else None
        for name, reason in absent.items():
            named.setdefault(name, f"evaluate: {reason}")
        spent = None if self.spending is None else self.spending.close()
        aggregation = self._named(getattr(self.strategy, "notes", {}))
        if self.asking.secure is not None and self.asking.secure.sum is not None:
            aggregation["secagg"] = self.asking.secure.sum.note
        strategy, links = save_state(self.strategy, self.vault)
        record = records.round_record(
            number=number,
            run=self.run,
            parent=self.head,
            config=self.config,
            model_in=stored_cid(model_in),
            model_out=stored_cid(self.model),
            order=self.model.order,
            result=result,
            updates=updates,
            failures=named,
            metrics={
                "train": train,
                "evaluate": federated,
                "median": median,
                "server": server,
            },
            aggregation=aggregation,
            strategy=strategy,
            clients=self.grid.states,
            asking=self.asking.state(),
            privacy=spent,
        )
        record, details = records.hide(self.vault, record, links)
        self.head = records.put(self.vault, record, self.run)
        states = [cid for state in self.grid.states.values() for cid in state]
        order = [self.model.order] if self.model.order is not None else []
        needed = [self.config, stored_cid(self.model), *order, strategy, *links, *states]
        needed += self.asking.bases
        return Round(
            number=number,
            record=self.head,
            details=details,
            needed=list(dict.fromkeys(needed)),
            model=self.model,
            result=result or stored_cid(self.model),
            selected=len(replies) + answers.unneeded,
            succeeded=len(replies) - len(failures),
            failures=named,
            train=train,
            evaluate=federated,
            median=median,
            server=server,
            aggregation=aggregation,
            compression=_mean_cost(arrived) if self.compression and not self._noised else None,
            privacy=spent,
            sgd_steps=self._sgd_steps(updates),
        )

    def _sgd_steps(self, updates: list[Update]) -> int:
        if self.asking.secure is not None and self.asking.secure.sum is not None:
            return max(0, round(self.asking.secure.sum.metrics.get("steps", 0)))
        return sum(_steps(update) for update in updates)

    def _count(self, replies: list[Message]) -> None:
        if isinstance(self.spending, OfRecords):
            for reply in replies:
                self.spending.heard(self.grid.name_of(reply.metadata.src_node_id), reply)

    def _named(self, value: Any) -> Any:
        """`value` with the names of clients in the place of node ids."""
        if isinstance(value, list):
            return [self._named(each) for each in value]
        if not isinstance(value, Mapping):
            return value
        named: dict[str, Any] = {}
        for key, item in value.items():
            if key == "node":
                named["client"] = self.grid.name_of(item)
            elif key == "nodes":
                named["clients"] = [self.grid.name_of(node) for node in item]
            else:
                named[key] = self._named(item)
        return named

    def _screened(
        self, replies: list[Message], *, arrays: int = 1
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

    def _aggregate_sum(self, number: int, replies: list[Message]) -> _Aggregate:
        """The strategy gets one update, the mean of those under masks."""
        secure = self.asking.secure
        assert secure is not None and secure.sum is not None
        found = secure.sum
        failures = {
            reply.metadata.src_node_id: one_line(reply.error.reason or "error without a reason")
            for reply in replies
            if reply.has_error()
        }
        good = [reply for reply in replies if not reply.has_error()]
        require(self.min_successes, len(good), self._names(failures), f"round {number}")
        updates = [
            Update(self.grid.name_of(node), cid, 1, {}) for node, cid in found.vectors.items()
        ]
        mean = copy.copy(good[0])
        told: dict[str, Any] = {self._weight_key: found.metrics["weight"]}
        told |= {name: found.metrics[name] for name in secure.metrics}
        mean.content = RecordDict({"arrays": found.arrays, "metrics": MetricRecord(told)})
        arrays, metrics = self.strategy.aggregate_train(number, [mean])
        return arrays, metrics, updates, failures

    def _excluded(self) -> dict[int, str]:
        return dict(getattr(self.strategy, "excluded", {}))

    def _evaluate_clients(
        self, number: int, cohort: list[int]
    ) -> tuple[dict[str, Any] | None, dict[str, float] | None, dict[str, str]]:
        """Metrics on what clients hold out, if any were asked, and who failed to say.

        First as the strategy aggregates them, then the median client's.
        """
        replies = self.asking.evaluate(number, self.model, cohort)
        self._count(replies)
        if not replies:
            return None, None, {}
        good, failures = self._screened(replies, arrays=0)
        for node, reason in failures.items():
            log.warning("round %d: %s: evaluate: %s", number, self.grid.name_of(node), reason)
        metrics = self.strategy.aggregate_evaluate(number, good) if good else None
        return dict(metrics or {}), _medians(good), self._names(failures)

    def _adopt(self, arrays: ArrayRecord | None, number: int) -> StoredArrays:
        """The aggregated arrays, in the store and in the model's dtypes."""
        strategy = type(self.strategy).__name__
        if arrays is None:
            raise RunFailed(
                f"round {number}: {strategy} gave no model from these updates; the log says why"
            )
        try:
            stored = store_arrays(self.vault, arrays, specs_of(self.model))
            if not isinstance(arrays, StoredArrays):
                check_update(stored, specs_of(self.model))
        except (BadUpdate, WeightsError) as error:
            raise (Diverged if NOT_FINITE in str(error) else RunFailed)(
                f"round {number}: {strategy} gave a model that cannot be used: {error}; "
                "lower the learning rates, or choose another strategy"
            ) from error
        return stored

    def _update_in(self, reply: Message) -> StoredArrays | None:
        update = update_in(reply, getattr(self.strategy, "extra_arrays", ()))
        return update if isinstance(update, StoredArrays) else None

    def _update(self, reply: Message) -> Update:
        _, (metrics,) = parts(reply)
        update = self._update_in(reply)
        assert update is not None
        numbers: dict[str, Any] = dict(metrics)
        examples = numbers.pop(self._weight_key, 0)
        if self._noised:  # the record is not to tell what the noise is to hide
            numbers, examples = {}, 1
        node = reply.metadata.src_node_id
        signed = self._edge.signed.get(node, (b"", b""))
        base = None if update.base is None else update.base.cid
        return Update(
            self.grid.name_of(node),
            stored_cid(update),
            examples,
            numbers,
            *signed,
            base=None if base == self._began_with else base,
        )

    def _names(self, failures: Mapping[int, str]) -> dict[str, str]:
        return {self.grid.name_of(node): reason for node, reason in failures.items()}


def _steps(update: Update) -> int:
    """The SGD steps that a client says it took; 0 for nonsense."""
    steps = update.metrics.get("steps")
    return int(steps) if isinstance(steps, int | float) and 0 <= steps < 2**53 else 0


def _medians(replies: list[Message]) -> dict[str, float] | None:
    """The median over clients of each number that they measured."""
    values: dict[str, list[float]] = {}
    for reply in replies:
        for name, value in parts(reply)[1][0].items():
            if isinstance(value, int | float):
                values.setdefault(name, []).append(float(value))
    return {name: statistics.median(found) for name, found in values.items()} or None


def _mean_cost(updates: list[StoredArrays]) -> dict[str, float] | None:
    """Bytes of the updates as a share of what they are uncompressed, and their mean error."""
    costs = [cost_of(update) for update in updates]
    dense = sum(cost.dense for cost in costs)
    if not dense:
        return None
    ratio = sum(cost.stored for cost in costs) / dense
    return {"ratio": ratio, "error": sum(cost.error for cost in costs) / len(costs)}
