"""A Flower Grid whose nodes are a federation's members, behind a SuperLink."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import httpx
from flwr.app import Error, Message
from flwr.serverapp import Grid

from fedipfs.errors import EdgeError, RunFailed
from fedipfs.exchange import GridOver, pack, unpack
from fedipfs.flower_compat import NODE_UNAVAILABLE, message_to_bytes, set_message_id
from fedipfs.flower_deploy import RunNotRunning
from fedipfs.ipld import CID
from fedipfs.server.engine.base import FIRST_NODE, NodeGrid, Traffic

_POLLS_S = (0.1, 0.5)  # at first, and when nothing has come for a while
_SLOWER = 1.1  # times longer after each look


class Seat(NamedTuple):
    """A member's place: the name it signs with, and its node's id at the SuperLink."""

    name: str
    node_id: int


class SuperLinkGrid(NodeGrid, GridOver):
    """Members by their numbers: strategies see the node ids that the local engine would give.

    So a run has the cohorts, the seeds and the order of sums that its simulation has. The
    SuperLink's own ids, which are random, are known in here only. `seats` gives the members as
    they are now, by number: who is removed during a run is asked no more. `interrupted` is asked
    at every look for replies and raises to end the run. Of fewer than `least` members that are
    connected, others are waited for, `join_s` seconds at most; `on_wait` is told of them.
    """

    def __init__(
        self,
        grid: Grid,
        seats: Callable[[], Mapping[int, Seat]],
        *,
        least: int = 1,
        join_s: float = 0.0,
        on_reply: Callable[[str, bool], None] = lambda name, ok: None,
        on_wait: Callable[[list[str]], None] = lambda names: None,
        interrupted: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(grid)
        self._seats = seats
        self._least, self._join_s = least, join_s
        self._on_reply, self._on_wait, self._interrupted = on_reply, on_wait, interrupted
        self.states: dict[int, list[CID]] = {}  # partners keep their own
        self.traffic = Traffic()
        self._names: dict[int, str] = {}
        # What was asked, as strategies see it, and of which node.
        self._sent: dict[str, tuple[Message, int | None]] = {}
        self._failed: dict[str, Message] = {}  # replies to what the SuperLink would not take

    def get_node_ids(self) -> Iterable[int]:
        """The nodes of the members that are connected, waiting for some if they are too few."""
        there = self._connected()
        if len(there) < self._least:
            there = self.wait(self._least)
        return there

    def wait(self, enough: int) -> list[int]:
        """The nodes that are connected, when they are `enough` or `join_s` seconds have passed."""
        end, told = time.monotonic() + self._join_s, None
        while True:
            self._interrupted()
            there = self._connected()
            missing = [
                seat.name
                for number, seat in sorted(self._seats().items())
                if FIRST_NODE + number not in there
            ]
            if len(there) >= enough or time.monotonic() >= end:
                return there
            if missing != told:
                self._on_wait(missing)
                told = missing
            time.sleep(_POLLS_S[1])

    def name_of(self, node_id: int) -> str:
        if node_id not in self._names:
            seat = self._seats().get(node_id - FIRST_NODE)
            self._names[node_id] = seat.name if seat else f"member-{node_id - FIRST_NODE}"
        return self._names[node_id]

    def now(self) -> float:
        return time.monotonic()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent, seats = list(messages), self._seats()
        carried: list[tuple[Message, int]] = []
        for message in sent:
            self.traffic.flower += len(message_to_bytes(message))
            seat = seats.get(message.metadata.dst_node_id - FIRST_NODE)
            if seat is None:
                self._refuse(message, "is a member no more")
            else:
                carried.append((message, seat.node_id))
        taken = self._asked(lambda: self._grid.push_messages([_to(*each) for each in carried]))
        for index, (message, node) in enumerate(carried):
            number = taken[index] if index < len(taken) else None
            if number is None:
                self._refuse(message, "is not known to the SuperLink: `fedipfs-server members`")
                continue
            set_message_id(message, number)
            self._sent[number] = (message, node)
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = [each for each in message_ids if each in self._sent]
        replies = [self._failed.pop(each) for each in wanted if each in self._failed]
        asked = [each for each in wanted if self._sent[each][1] is not None]
        if asked:
            replies += [
                reply
                for each in self._asked(lambda: self._grid.pull_messages(asked))
                if (reply := self._reply(each)) is not None
            ]
        for reply in replies:
            message, _ = self._sent.pop(reply.metadata.reply_to_message_id)
            if not message.metadata.message_type.startswith("query"):
                self._on_reply(self.name_of(message.metadata.dst_node_id), not reply.has_error())
        return replies

    def receive(self, message_ids: Iterable[str], timeout: float | None) -> list[Message]:
        """At least one reply; [] if none came within `timeout` seconds or none can come."""
        wanted = list(message_ids)
        end = None if timeout is None else time.monotonic() + timeout
        pause = _POLLS_S[0]
        while any(each in self._sent for each in wanted):
            self._interrupted()
            if replies := list(self.pull_messages(wanted)):
                return replies
            left = pause if end is None else end - time.monotonic()
            if left <= 0:
                break
            time.sleep(min(pause, left))
            pause = min(pause * _SLOWER, _POLLS_S[1])
        return []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        pending = set(self.push_messages(messages))
        end = None if timeout is None else self.now() + timeout
        replies: list[Message] = []
        while pending:
            came = self.receive(pending, None if end is None else end - self.now())
            if not came:
                self.cancel(pending)
                break
            pending -= {reply.metadata.reply_to_message_id for reply in came}
            replies += came
        return replies

    def cancel(self, message_ids: Iterable[str]) -> None:
        for each in message_ids:
            self._sent.pop(each, None)
            self._failed.pop(each, None)

    def _connected(self) -> list[int]:
        online = set(self._asked(self._grid.get_node_ids))
        there = []
        for number, seat in sorted(self._seats().items()):
            if seat.node_id in online:
                there.append(FIRST_NODE + number)
        return there

    def _reply(self, reply: Message) -> Message | None:
        """A reply as from the node that was asked, whatever it says of itself."""
        message, node = self._sent.get(reply.metadata.reply_to_message_id, (None, None))
        if message is None:
            return None
        self.traffic.flower += len(message_to_bytes(reply))
        if reply.has_error():
            return Message(reply.error, reply_to=message)
        if reply.metadata.src_node_id != node:
            error = Error(NODE_UNAVAILABLE, "another node answered what was asked of this one")
            return Message(error, reply_to=message)
        try:
            return Message(unpack(reply.content), reply_to=message)
        except EdgeError as error:
            return Message(Error(NODE_UNAVAILABLE, str(error)), reply_to=message)

    def _refuse(self, message: Message, why: str) -> None:
        """Answer in the place of a node to which a message cannot be sent."""
        name = self.name_of(message.metadata.dst_node_id)
        set_message_id(message, f"not-sent-{uuid.uuid4().hex}")
        number = message.metadata.message_id
        self._sent[number] = (message, None)
        self._failed[number] = Message(Error(NODE_UNAVAILABLE, f"{name} {why}"), reply_to=message)

    def _asked(self, call: Callable[[], Iterable[Any]]) -> list[Any]:
        """What the SuperLink answers; while it is away Flower itself tries again."""
        try:
            return list(call())
        except httpx.HTTPStatusError as error:
            self._interrupted()  # a run that was stopped may not speak any more
            raise RunFailed(
                f"the SuperLink refuses this run ({error.response.status_code} "
                f"{error.response.text.strip()[:200]})"
            ) from error
        except httpx.TransportError as error:
            raise RunFailed(
                "the SuperLink is away, and has been for as long as a round may take "
                f"({type(error).__name__}): start it, and resume the run"
            ) from error
        except RunNotRunning as error:
            self._interrupted()
            raise RunFailed("the run was stopped at the SuperLink") from error


def _to(message: Message, node: int) -> Message:
    """A copy of a message, packed, for a node by the SuperLink's own id."""
    what = message.metadata
    return Message(
        pack(message.content), node, what.message_type, ttl=what.ttl, group_id=what.group_id
    )
