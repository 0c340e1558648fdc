"""The server's skin: any Flower Grid, with arrays swapped for CIDs in both directions."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

from flwr.app import ArrayRecord, Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedipfs.errors import (
    BadUpdate,
    ConfigError,
    EdgeError,
    FormatError,
    SignatureRefused,
    StoreError,
    one_line,
)
from fedipfs.exchange.arrays import StoredArrays, specs_of, store_arrays
from fedipfs.exchange.compressing import compress_model, put_stored
from fedipfs.exchange.default import default_vault
from fedipfs.exchange.heart import Exchange
from fedipfs.exchange.inspect import open_update
from fedipfs.exchange.mod import PREFETCH
from fedipfs.exchange.over import GridOver
from fedipfs.exchange.signing import Stamp, address, signature_of, signed_bytes, stamp_of
from fedipfs.exchange.vault import Vault, explicit
from fedipfs.exchange.waiting import receive
from fedipfs.flower_compat import CLIENT_APP_RAISED_EXCEPTION, NODE_UNAVAILABLE, error_instead
from fedipfs.ipld import CID
from fedipfs.store import Store
from fedipfs.trust import PublicIdentity
from fedipfs.weights import TensorSpec
from fedipfs.weights.compression import Spec

_Sent = tuple[Message, dict[str, StoredArrays]]  # a message and the arrays that went with it
_REFUSALS = (BadUpdate, EdgeError, StoreError, FormatError, SignatureRefused)


class CidGrid(GridOver):
    """Wraps `grid` so that only CIDs and small scalars pass through it.

    Array records of outgoing messages go into `store` and their CIDs into the messages; replies
    come back as records that fetch arrays from the store on access. A reply that cannot be used
    (unknown or damaged CID, other tensors than the model's, NaN) becomes an error Message with
    the reason, and so does a node that has not answered at the timeout.

    Parameters: `store` is a store, or the vault over it with this coordinator's keys; it defaults
    to what the environment names (see default.py). `read_updates=False` checks only an update's
    structure and leaves reading its values to the strategy. `name_of` gives the organization
    that a node belongs to, if that is known: only that one may sign its replies.

    With `compression`, clients that train are told to answer in that form, and their updates are
    decoded as they are read; another form is refused. With `compress_models` the models that go
    out have it, too, and updates are relative to what of them arrives. Array records under the
    keys `exact` (a strategy's `extra_arrays`) travel as they are in both directions: what a
    control variate lost would part the server's from those that the clients keep.

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
        compression: Spec | None = None,
        compress_models: bool = False,
        exact: Collection[str] = (),
    ) -> None:
        super().__init__(grid)
        self._exchange = Exchange(
            default_vault("coordinator") if store is None else explicit(store)
        )
        self._read_updates = read_updates
        self._name_of = name_of
        self._compression, self._exact = compression, frozenset(exact)
        if compress_models and compression is None:
            raise ConfigError("compress_models=True says nothing without a compression")
        self._down = compression.for_models() if compression and compress_models else None
        self._last_down: dict[str, tuple[StoredArrays, StoredArrays]] = {}  # key -> as is, as sent
        self.stamp: Stamp | None = None
        self.attempt: int | None = None  # how often a coordinator has begun anew on its run
        self._nonce = secrets.token_hex(8)  # run ids are the SuperLink's, which could use one twice
        self._announced: list[str] = []
        self.signed: dict[
            int, tuple[bytes, bytes]
        ] = {}  # node -> its last update as signed, and how
        self._sent: dict[str, _Sent] = {}  # message id -> what was pushed
        self._model: dict[str, dict[str, TensorSpec]] = {}  # record key -> as it first went out

    def get_nodes(self) -> Iterable[Any]:
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        slim, arrays = self._slim(messages)
        ids = list(self._grid.push_messages(slim))  # sets the message ids
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

    def receive(self, message_ids: Iterable[str], timeout: float | None) -> list[Message]:
        """Wait for at least one reply to what was pushed; [] if none came in `timeout` seconds.

        `timeout` None waits for as long as the grid below does.
        """
        answers = receive(self._grid, list(message_ids), timeout)
        return self._matched(answers, self._sent)

    def give_up(self, message_ids: Iterable[str], reason: str) -> list[Message]:
        """No longer wait for replies to these; returns an error Message with `reason` for each."""
        ids = [number for number in message_ids if number in self._sent]
        if cancel := getattr(self._grid, "cancel", None):
            cancel(ids)
        messages = [self._sent.pop(number)[0] for number in ids]
        return [Message(Error(NODE_UNAVAILABLE, reason), reply_to=each) for each in messages]

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
            message.content = self._exchange.swap_out(
                content,
                self._stamp(message),
                put=put_stored,
                compression=self._asked(message, stored),
                attempt=self.attempt,
            )
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
        number = _round_of(message.content) or 0
        return Stamp(f"flower:{message.metadata.run_id}:{self._nonce}", number, to)

    def _store(self, key: str, record: ArrayRecord) -> StoredArrays:
        model = self._model.get(key)
        if model is None or model.keys() != record.keys():
            model = self._model[key] = specs_of(record)
        stored = store_arrays(self._exchange.vault, record, model)
        if self._down is None or key in self._exact:
            return stored
        last = self._last_down.get(key)
        if last is None or last[0].cid != stored.cid:  # sealed again it would have another CID
            last = self._last_down[key] = (stored, compress_model(stored, self._down))
        return last[1]

    def _asked(self, message: Message, sent: Iterable[str]) -> dict[str, Spec]:
        """The form in which answers to the array records `sent` with a message are to come."""
        training = message.metadata.message_type.split(".")[0] == MessageType.TRAIN
        if self._compression is None or not training:
            return {}
        return {key: self._compression for key in sent if key not in self._exact}

    def _open(self, reply: Message, message: Message, sent: dict[str, StoredArrays]) -> Message:
        if reply.has_error():
            return reply
        node = reply.metadata.src_node_id
        name = self._name_of(node) if self._name_of else None
        try:
            content = reply.content
            reply.content = self._exchange.swap_in(
                reply.content,
                partial(self._update, sent, message),
                expected=stamp_of(message.content),
                name=name,
            )
            trained = message.metadata.message_type.startswith("train")
            if self._exchange.vault.party is not None and trained:
                self.signed[node] = (signed_bytes(content), signature_of(content))
        except _REFUSALS as error:
            kind = f"{type(error).__name__}: " if isinstance(error, SignatureRefused) else ""
            reason = one_line(f"{kind}{error}")
            return error_instead(reply, Error(CLIENT_APP_RAISED_EXCEPTION, reason))
        return reply

    def _update(
        self,
        sent: dict[str, StoredArrays],
        message: Message,
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
        return open_update(
            vault,
            cid,
            model,
            sender,
            read=self._read_updates,
            asked=_round_of(message.content),
            compression=self._asked(message, sent).get(key),
        )


def _round_of(content: RecordDict) -> int | None:
    """The "server-round" that Flower's strategies put into what they send."""
    rounds = [record.get("server-round") for record in content.config_records.values()]
    return next((value for value in rounds if isinstance(value, int)), None)
