"""The server's skin: any Flower Grid, with arrays swapped for CIDs in both directions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from fedipfs.errors import BadUpdate, EdgeError, FormatError, StoreError
from fedipfs.exchange.arrays import StoredArrays, specs_of, store_arrays
from fedipfs.exchange.default import default_store
from fedipfs.exchange.heart import Exchange
from fedipfs.exchange.inspect import check_update
from fedipfs.flower_compat import CLIENT_APP_RAISED_EXCEPTION, NODE_UNAVAILABLE, error_instead
from fedipfs.store import Store
from fedipfs.weights import TensorSpec


class CidGrid(Grid):
    """Wraps `grid` so that only CIDs and small scalars pass through it.

    Array records of outgoing messages go into `store` and their CIDs into the messages; replies
    come back as records that fetch arrays from the store on access. A reply that cannot be used
    (unknown or damaged CID, other tensors than the model's, NaN) becomes an error Message with
    the reason, and so does a node that has not answered at the timeout.

    Parameters: `store` defaults to the one that $FEDIPFS_STORE names. `read_updates=False` checks
    only an update's structure and leaves reading its values to the strategy.
    """

    def __init__(
        self, grid: Grid, store: Store | None = None, *, read_updates: bool = True
    ) -> None:
        self._grid = grid
        self._exchange = Exchange(store or default_store())
        self._read_updates = read_updates
        self._sent: dict[str, dict[str, StoredArrays]] = {}  # message id -> arrays that went out
        self._model: dict[str, dict[str, TensorSpec]] = {}  # record key -> as it first went out

    def set_run(self, run: Any) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        slim, arrays = self._slim(messages)
        ids = list(self._grid.push_messages(slim))
        # A grid may refuse some or all messages; it then gives fewer ids, or none for one.
        self._sent.update((id_, sent) for id_, sent in zip(ids, arrays, strict=False) if id_)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for reply in self._grid.pull_messages(message_ids):
            sent = self._sent.pop(reply.metadata.reply_to_message_id, {})
            replies.append(self._open(reply, sent))
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        slim, arrays = self._slim(messages)
        answers = list(self._grid.send_and_receive(slim, timeout=timeout))
        # By message id, which the grid below set while sending: for a lost node the SuperLink
        # answers under its own node id.
        sent = {
            message.metadata.message_id: (message, stored)
            for message, stored in zip(slim, arrays, strict=True)
        }
        replies = []
        for reply in answers:
            message, stored = sent.pop(reply.metadata.reply_to_message_id, (None, {}))
            if message is None:
                continue  # an answer to nothing that was asked
            if reply.has_error():
                reply = Message(reply.error, reply_to=message)  # from the node it is about
            replies.append(self._open(reply, stored))
        for message, _ in sent.values():
            reason = f"no answer within {timeout:g} s" if timeout else "no answer"
            replies.append(Message(Error(NODE_UNAVAILABLE, reason), reply_to=message))
        # One order for every strategy: floating-point sums must not depend on who was faster.
        return sorted(replies, key=lambda reply: reply.metadata.src_node_id)

    def _slim(
        self, messages: Iterable[Message]
    ) -> tuple[list[Message], list[dict[str, StoredArrays]]]:
        """Messages without arrays, and per message the stored arrays they refer to.

        Strategies put one RecordDict into many messages: each array record is encoded once, and
        every message gets content of its own.
        """
        known: dict[int, tuple[ArrayRecord, StoredArrays]] = {}  # the record keeps its id taken
        slim, sent = [], []
        for message in messages:
            stored: dict[str, StoredArrays] = {}
            content = message.content.copy()
            for key, record in message.content.items():
                if isinstance(record, ArrayRecord):
                    if id(record) not in known:
                        known[id(record)] = (record, self._store(key, record))
                    content[key] = stored[key] = known[id(record)][1]
            message.content = self._exchange.swap_out(content)
            slim.append(message)
            sent.append(stored)
        return slim, sent

    def _store(self, key: str, record: ArrayRecord) -> StoredArrays:
        model = self._model.get(key)
        if model is None or model.keys() != record.keys():
            model = self._model[key] = specs_of(record)
        return store_arrays(self._exchange.store, record, model)

    def _open(self, reply: Message, sent: dict[str, StoredArrays]) -> Message:
        if reply.has_error():
            return reply
        try:
            reply.content = self._exchange.swap_in(reply.content)
            for key, arrays in reply.content.array_records.items():
                # A reply's arrays answer the record of the same name, or the only one sent.
                model = sent.get(key) or (next(iter(sent.values())) if len(sent) == 1 else None)
                if model is not None and isinstance(arrays, StoredArrays):
                    check_update(arrays, model.weights.specs, read=self._read_updates)
        except (BadUpdate, EdgeError, StoreError, FormatError) as error:
            return error_instead(reply, Error(CLIENT_APP_RAISED_EXCEPTION, str(error)))
        return reply
