"""The server's skin: any Flower Grid, with arrays swapped for CIDs in both directions."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from flwr.app import ArrayRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from fedipfs.errors import (
    BadUpdate,
    EdgeError,
    FormatError,
    SignatureRefused,
    StoreError,
    one_line,
)
from fedipfs.exchange.arrays import StoredArrays, specs_of, store_arrays
from fedipfs.exchange.default import default_vault
from fedipfs.exchange.heart import Exchange
from fedipfs.exchange.inspect import open_update
from fedipfs.exchange.mod import PREFETCH
from fedipfs.exchange.signing import Stamp, address, signature_of, signed_bytes, stamp_of
from fedipfs.exchange.vault import Vault, explicit
from fedipfs.flower_compat import CLIENT_APP_RAISED_EXCEPTION, NODE_UNAVAILABLE, error_instead
from fedipfs.ipld import CID
from fedipfs.store import Store
from fedipfs.trust import PublicIdentity
from fedipfs.weights import TensorSpec

_Sent = tuple[Message, dict[str, StoredArrays]]  # a message and the arrays that went with it
_REFUSALS = (BadUpdate, EdgeError, StoreError, FormatError, SignatureRefused)


class CidGrid(Grid):
    """Wraps `grid` so that only CIDs and small scalars pass through it.

    Array records of outgoing messages go into `store` and their CIDs into the messages; replies
    come back as records that fetch arrays from the store on access. A reply that cannot be used
    (unknown or damaged CID, other tensors than the model's, NaN) becomes an error Message with
    the reason, and so does a node that has not answered at the timeout.

    Parameters: `store` is a store, or the vault over it with this coordinator's keys; it defaults
    to what the environment names (see default.py). `read_updates=False` checks only an update's
    structure and leaves reading its values to the strategy. `name_of` gives the organization
    that a node belongs to, if that is known: only that one may sign its replies.

    With keys, messages are signed for the run and round in `stamp`; while that is None, for
    Flower's run id with a nonce of this grid's and the "server-round" that Flower's strategies put
    into messages.
    """

    def __init__(
        self,
        grid: Grid,
        store: Store | Vault | None = None,
        *,
        read_updates: bool = True,
        name_of: Callable[[int], str] | None = None,
    ) -> None:
        self._grid = grid
        self._exchange = Exchange(
            default_vault("coordinator") if store is None else explicit(store)
        )
        self._read_updates = read_updates
        self._name_of = name_of
        self.stamp: Stamp | None = None
        self._nonce = secrets.token_hex(8)  # run ids are the SuperLink's, which could use one twice
        self._announced: list[str] = []
        self.signed: dict[int, tuple[bytes, bytes]] = {}  # node -> what it signed last, and how
        self._sent: dict[str, _Sent] = {}  # message id -> what was pushed
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
        ids = self._grid.push_messages(slim)  # sets the message ids
        for message, stored in zip(slim, arrays, strict=True):
            self._sent[message.metadata.message_id] = (message, stored)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._matched(self._grid.pull_messages(message_ids), self._sent)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        slim, arrays = self._slim(messages)
        answers = self._grid.send_and_receive(slim, timeout=timeout)  # sets the message ids
        sent = {
            message.metadata.message_id: (message, stored)
            for message, stored in zip(slim, arrays, strict=True)
        }
        replies = self._matched(answers, sent)
        for message, _ in sent.values():
            reason = f"no answer within {timeout:g} s" if timeout else "no answer"
            replies.append(Message(Error(NODE_UNAVAILABLE, reason), reply_to=message))
        # One order for every strategy: floating-point sums must not depend on who was faster.
        return sorted(replies, key=lambda reply: reply.metadata.src_node_id)

    def announce(self, arrays: ArrayRecord) -> None:
        """Tell every node of the next model, so that its store has it when the round begins.

        Nodes fetch it while the server evaluates or waits (see cid_mod); their answers are not
        waited for, and dropped.
        """
        self._announced = self._unanswered()
        told = [
            self.create_message(RecordDict({"arrays": arrays}), PREFETCH, node, "")
            for node in self.get_node_ids()
        ]
        slim, _ = self._slim(told)
        self._announced += self._grid.push_messages(slim)

    def _unanswered(self) -> list[str]:
        """What was announced and has not been answered; the answers are taken off the grid."""
        if not self._announced:
            return []
        answers = self._grid.pull_messages(self._announced)
        answered = {reply.metadata.reply_to_message_id for reply in answers}
        return [number for number in self._announced if number not in answered]

    def _matched(self, answers: Iterable[Message], sent: dict[str, _Sent]) -> list[Message]:
        """Answers to what was sent, opened; what they answer is taken out of `sent`."""
        replies = []
        for reply in answers:
            message, stored = sent.pop(reply.metadata.reply_to_message_id, (None, {}))
            if message is None:
                continue  # an answer to nothing that was asked
            if reply.has_error():
                # For a lost node the SuperLink answers under its own node id.
                reply = Message(reply.error, reply_to=message)
            elif reply.metadata.src_node_id != message.metadata.dst_node_id:
                reason = f"node {reply.metadata.src_node_id} answered what was asked of this one"
                reply = Message(Error(CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
            replies.append(self._open(reply, message, stored))
        return replies

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
            message.content = self._exchange.swap_out(content, self._stamp(message))
            slim.append(message)
            sent.append(stored)
        return slim, sent

    def _stamp(self, message: Message) -> Stamp | None:
        """What a message is signed for."""
        if self._exchange.vault.party is None:
            return None
        to = address(message, message.metadata.dst_node_id)
        if self.stamp is not None:
            return self.stamp._replace(to=to)
        records = message.content.config_records.values()
        rounds = [record.get("server-round") for record in records]
        number = next((value for value in rounds if isinstance(value, int)), 0)
        return Stamp(f"flower:{message.metadata.run_id}:{self._nonce}", number, to)

    def _store(self, key: str, record: ArrayRecord) -> StoredArrays:
        model = self._model.get(key)
        if model is None or model.keys() != record.keys():
            model = self._model[key] = specs_of(record)
        return store_arrays(self._exchange.vault, record, model)

    def _open(self, reply: Message, message: Message, sent: dict[str, StoredArrays]) -> Message:
        if reply.has_error():
            return reply
        node = reply.metadata.src_node_id
        name = self._name_of(node) if self._name_of else None
        try:
            content = reply.content
            reply.content = self._exchange.swap_in(
                reply.content,
                partial(self._update, sent),
                expected=stamp_of(message.content),
                name=name,
            )
            if self._exchange.vault.party is not None:
                self.signed[node] = (signed_bytes(content), signature_of(content))
        except _REFUSALS as error:
            kind = f"{type(error).__name__}: " if isinstance(error, SignatureRefused) else ""
            reason = one_line(f"{kind}{error}")
            return error_instead(reply, Error(CLIENT_APP_RAISED_EXCEPTION, reason))
        return reply

    def _update(
        self,
        sent: dict[str, StoredArrays],
        key: str,
        cid: CID,
        order: CID | None,
        sender: PublicIdentity | None,
    ) -> StoredArrays:
        """A reply's arrays, which answer the record of the same name or the only one sent."""
        vault = self._exchange.vault
        if not sent:
            return StoredArrays.open(vault, cid, order, sender)
        model = sent.get(key) or (next(iter(sent.values())) if len(sent) == 1 else None)
        if model is None:
            raise EdgeError(f"its array record {key[:80]!r} answers none that was sent")
        return open_update(vault, cid, model, sender, read=self._read_updates)
