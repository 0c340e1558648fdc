"""What our own strategies have in common: they read updates from the store, when they need them."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from fedipfs.errors import BadUpdate, EdgeError, FormatError, StoreError
from fedipfs.exchange import StoredArrays, Vault, check_update, specs_of, store_arrays
from fedipfs.strategies.screen import parts, require, screen

log = logging.getLogger(__name__)


class ClientUpdate(NamedTuple):
    """What one client answered, checked: `arrays` has the structure of `arrays.base`."""

    node: int
    arrays: StoredArrays
    examples: float  # above 0
    metrics: MetricRecord
    others: Mapping[str, StoredArrays] = {}  # further array records, by key


class StoreStrategy(FlowerFedAvg):
    """A Flower strategy that combines what lies in the store, piece by piece; see `combine`.

    Takes the arguments of `flwr.serverapp.strategy.FedAvg` and `min_successes`: fewer usable
    updates than that end the round with RunFailed. An update that is missing, damaged, of another
    structure than the model or not finite is left out; `excluded` maps its node id to the reason.

    Needs `CidGrid(..., read_updates=False)`: it looks at the values itself, while combining them.
    """

    screens_replies = True
    extra_arrays: ClassVar[tuple[str, ...]] = ()  # keys of array records besides the model

    def __init__(self, *args: Any, min_successes: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.min_successes = min_successes
        self._excluded: dict[int, str] = {}
        self._model: StoredArrays | None = None
        self._notes: dict[str, Any] = {}

    @abstractmethod
    def combine(self, server_round: int, updates: list[ClientUpdate]) -> StoredArrays:
        """The next model, from at least one update, in the order of node ids.

        `self.model` is the model that the round began with. `read` below may call this twice.
        Raises BadUpdate, StoreError or FormatError where reading an update's values does.
        """

    @property
    def model(self) -> StoredArrays:
        """The model of the round under way."""
        if self._model is None:
            raise EdgeError(f"{type(self).__name__} needs its first model in the store")
        return self._model

    def origin(self, updates: Sequence[ClientUpdate]) -> StoredArrays:
        """w_t, the model that the clients of a synchronous round began with, as it reached them.

        `self.model`, or what was left of it where models are sent compressed.
        """
        return updates[0].arrays.base or self.model

    @property
    def excluded(self) -> dict[int, str]:
        """Node id -> reason, for the round aggregated last."""
        return self._excluded

    @property
    def notes(self) -> dict[str, Any]:
        """How the updates were combined last, for the round's record: what DAG-CBOR can hold."""
        return self._notes

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        # A Flower app's first model is in the store once it was sent: updates know it as theirs.
        self._model = arrays if isinstance(arrays, StoredArrays) else None
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        good, self._excluded = screen(
            replies, self.weighted_by_key, arrays=1 + len(self.extra_arrays)
        )
        self._notes = {}
        usable = self._usable(good, read=False)
        self._report(server_round, len(usable))
        try:
            arrays = self.combine(server_round, [self._update(reply) for reply in usable])
        except (BadUpdate, StoreError, FormatError):
            # Rare: an update proved bad after part of it was added. Read them all first.
            usable = self._usable(usable, read=True)
            self._report(server_round, len(usable))
            arrays = self.combine(server_round, [self._update(reply) for reply in usable])
        contents = [reply.content for reply in usable]
        return arrays, self.train_metrics_aggr_fn(contents, self.weighted_by_key)

    def _usable(self, replies: list[Message], *, read: bool) -> list[Message]:
        usable = []
        for reply in replies:
            try:
                update = self._update(reply)
                if self._model is None:
                    self._model = update.arrays.base
                for arrays in (update.arrays, *update.others.values()):
                    check_update(
                        arrays,
                        specs_of(self.model if arrays.base is None else arrays.base),
                        read=read,
                    )
            except BadUpdate as error:
                self._excluded[reply.metadata.src_node_id] = str(error)
            else:
                usable.append(reply)
        return usable

    def _report(self, server_round: int, good: int) -> None:
        for node, reason in self._excluded.items():
            log.warning("round %d: update of node %d left out: %s", server_round, node, reason)
        require(max(1, self.min_successes), good, self._excluded, f"round {server_round}")

    def _update(self, reply: Message) -> ClientUpdate:
        arrays, (metrics,) = parts(reply)
        others = {}
        for key in self.extra_arrays:
            if key not in arrays:
                raise BadUpdate(f"its array record {key!r} is missing")
            others[key] = _stored(arrays.pop(key))
        (model,) = arrays.values()
        examples = float(metrics[self.weighted_by_key])  # type: ignore[arg-type]
        return ClientUpdate(reply.metadata.src_node_id, _stored(model), examples, metrics, others)


def as_model(update: StoredArrays, vault: Vault) -> StoredArrays:
    """One client's update as a model, stored so that everybody on the other side can read it.

    It is sealed wherever updates are, for all participants; decoded; and without its base, as each
    model would hold on to the one before it. Raises what storing and reading raise.
    """
    stored = store_arrays(vault.sealing_all(), update)
    return StoredArrays(stored.vault, stored.weights, list(stored), stored.order)


def _stored(arrays: ArrayRecord) -> StoredArrays:
    if not isinstance(arrays, StoredArrays):
        raise EdgeError("updates are read from the store: run the strategy on a CidGrid")
    return arrays
