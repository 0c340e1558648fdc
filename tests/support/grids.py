"""A Grid that calls ClientApps in this process and keeps what crossed it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.serverapp import Grid

from fedipfs.flower_compat import message_from_bytes, message_to_bytes, set_identity, set_message_id


class DirectGrid(Grid):
    """`nodes` nodes with ids from 2; replies come back in an order drawn from `shuffle`."""

    def __init__(self, app: Any, nodes: int, *, shuffle: int | None = None) -> None:
        self.app, self.nodes = app, range(2, 2 + nodes)
        self.shuffle = random.Random(shuffle) if shuffle is not None else None
        self.contexts = {
            node: Context(1, node, {"partition-id": node - 2}, RecordDict(), {})
            for node in self.nodes
        }
        self.crossed: list[Message] = []
        self.sizes: list[int] = []
        self.tamper: Callable[[Message], None] = lambda reply: None
        self.silent: set[int] = set()
        set_identity(run_id=1, node_id=1)

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self._replies = []
        ids = []
        for number, message in enumerate(messages):
            set_message_id(message, f"m{number}")
            ids.append(f"m{number}")
            if message.metadata.dst_node_id not in self.silent:
                self._replies.append(self._call(message))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._replies

    def send_and_receive(self, messages, *, timeout=None) -> Iterable[Message]:
        self.push_messages(messages)
        if self.shuffle:
            self.shuffle.shuffle(self._replies)
        return self._replies

    def _call(self, message: Message) -> Message:
        message = self._wire(message)
        node = message.metadata.dst_node_id
        try:
            reply = self.app(message, self.contexts[node])
        except Exception as error:
            return Message(Error(2, f"{type(error).__name__}: {error}"), reply_to=message)
        self.tamper(reply)
        return self._wire(reply)

    def _wire(self, message: Message) -> Message:
        """What arrives of a message at the other end; a copy is kept."""
        wire = message_to_bytes(message)
        self.sizes.append(len(wire))
        self.crossed.append(message_from_bytes(wire))
        return message_from_bytes(wire)

    @property
    def arrays_crossed(self) -> int:
        """Array records in any message that crossed."""
        return sum(
            isinstance(record, ArrayRecord)
            for message in self.crossed
            if message.has_content()
            for record in message.content.values()
        )
