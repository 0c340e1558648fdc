"""A Flower Grid whose nodes are simulated on this machine: no SuperLink, no Ray."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from flwr.app import Error, Message

from fedipfs.exchange import frame, unframe
from fedipfs.flower_compat import (
    CLIENT_APP_CRASHED,
    CLIENT_APP_RAISED_EXCEPTION,
    SERVER_NODE_ID,
    message_from_bytes,
    message_to_bytes,
    set_identity,
    set_message_id,
)
from fedipfs.ipld import CID
from fedipfs.server.engine.base import FIRST_NODE, NodeGrid, Traffic
from fedipfs.server.engine.pool import Outcome, Pool

RUN_ID = 1


class _Done(NamedTuple):
    """A reply that nobody has taken yet, with the client's state before and after it."""

    reply: Message
    kind: str  # the type of the message that it answers
    before: list[CID] | None
    after: list[CID] | None


def client_name(partition: int) -> str:
    """The name of the client that holds a partition, in logs, records and trust lists."""
    return f"client-{partition}"


class LocalGrid(NodeGrid):
    """`clients` nodes, served by `pool`; implements Flower's public Grid.

    A node's `Context.state` survives between messages: it lives in the store, so any worker can
    serve any node, and a resumed run finds it again. `states` has its CID by node, and after it
    those of what it links. `on_reply(name, ok)` is called as
    replies come in; `config_of(partition)` adds to that client's own `Context.node_config`.
    """

    def __init__(
        self,
        pool: Pool,
        clients: int,
        *,
        states: dict[int, list[CID]] | None = None,
        on_reply: Callable[[str, bool], None] = lambda name, ok: None,
        config_of: Callable[[int], Mapping[str, Any]] = lambda partition: {},
    ) -> None:
        self._pool = pool
        self._nodes = range(FIRST_NODE, FIRST_NODE + clients)
        self.states = dict(states or {})
        self.traffic = Traffic()
        self._on_reply, self._config_of = on_reply, config_of
        self._waiting: dict[
            str, tuple[Message, list[CID] | None]
        ] = {}  # and the state it went with
        self._done: dict[str, _Done] = {}
        set_identity(run_id=RUN_ID, node_id=SERVER_NODE_ID)

    def set_run(self, run: Any) -> None:
        """Nothing to do: a LocalGrid serves one run."""

    @property
    def run(self) -> Any:
        raise NotImplementedError("a local run has no SuperLink run")

    def get_node_ids(self) -> Iterable[int]:
        return list(self._nodes)

    def name_of(self, node_id: int) -> str:
        """The name of a node in logs and records."""
        return client_name(node_id - FIRST_NODE)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            job, node = uuid.uuid4().hex, message.metadata.dst_node_id
            set_message_id(message, job)
            wire = message_to_bytes(message)
            self.traffic.flower += len(wire)
            state = self.states.get(node)
            self._waiting[job] = (message, state)
            call = {
                "node": node,
                "partition": node - FIRST_NODE,
                "partitions": len(self._nodes),
                "config": dict(self._config_of(node - FIRST_NODE)),
                "state": state and str(state[0]),
            }
            self._pool.submit(job, frame(call, wire))
            ids.append(job)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self._collect(0.0)
        return [self._hand_out(job) for job in message_ids if job in self._done]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self._replies(list(self.push_messages(messages)), timeout)

    def _replies(self, ids: list[str], timeout: float | None) -> Iterator[Message]:
        """Replies as they come, so that they are looked at while other clients still train."""
        end = None if timeout is None else self.now() + timeout
        missing = set(ids)
        while missing:
            left = None if end is None else end - self.now()
            replies = self.receive(missing, left)
            if not replies:
                break
            missing -= {reply.metadata.reply_to_message_id for reply in replies}
            yield from replies
        self.cancel(missing)

    def receive(self, message_ids: Iterable[str], timeout: float | None) -> list[Message]:
        """At least one reply; [] if none came within `timeout` seconds or none can come."""
        end = None if timeout is None else time.monotonic() + timeout
        wanted = list(message_ids)
        while True:
            if ready := [self._hand_out(job) for job in wanted if job in self._done]:
                return ready
            left = None if end is None else end - time.monotonic()
            if not any(job in self._waiting for job in wanted) or (left is not None and left <= 0):
                return []
            self._collect(left)

    def cancel(self, message_ids: Iterable[str]) -> None:
        """Give these up: what is under way is stopped, what comes all the same is dropped."""
        jobs = set(message_ids)
        self._pool.cancel(jobs)
        for job in jobs:
            self._waiting.pop(job, None)
            self._done.pop(job, None)

    def now(self) -> float:
        """Seconds, from an unknown beginning."""
        return time.monotonic()

    def _collect(self, timeout_s: float | None) -> None:
        outcomes = self._pool.collect(timeout_s)
        set_identity(run_id=RUN_ID, node_id=SERVER_NODE_ID)  # clients in this process had theirs
        for outcome in outcomes:
            if outcome.job not in self._waiting:
                continue  # it came after the time-out of whoever asked
            message, before = self._waiting.pop(outcome.job)
            reply, after = self._reply(message, outcome)
            self._done[outcome.job] = _Done(reply, message.metadata.message_type, before, after)
            if not message.metadata.message_type.startswith("query"):
                self._on_reply(self.name_of(message.metadata.dst_node_id), not reply.has_error())

    def _hand_out(self, job: str) -> Message:
        """A reply, whose client now is as it was after it: only what is taken note of has been."""
        reply, kind, before, after = self._done.pop(job)
        node = reply.metadata.src_node_id
        # Asked two things at once, a client keeps what it learnt in training.
        if after is not None and (kind.startswith("train") or self.states.get(node) == before):
            self.states[node] = after
        return reply

    def _reply(self, message: Message, outcome: Outcome) -> tuple[Message, list[CID] | None]:
        if outcome.reply is None:
            return Message(Error(CLIENT_APP_CRASHED, outcome.reason), reply_to=message), None
        answer, wire = unframe(outcome.reply)
        self.traffic.store_put += answer["put"]
        self.traffic.store_get += answer["get"]
        self.traffic.sent += answer["sent"]
        self.traffic.fetched += answer["fetched"]
        self.traffic.peak_rss = max(self.traffic.peak_rss, answer["rss"])
        if answer["error"] is not None:
            error = Error(CLIENT_APP_RAISED_EXCEPTION, answer["error"])
            return Message(error, reply_to=message), None
        kept = answer["state"]
        state = None if kept is None else [CID.parse(each) for each in kept]
        self.traffic.flower += len(wire)
        reply = message_from_bytes(wire)
        # Who answered is known here; what the reply says of it is not believed.
        said = {"error": reply.error} if reply.has_error() else {"content": reply.content}
        return Message(**said, reply_to=message), state
