"""Asking clients: messages out, replies in, with an end to the waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from flwr.app import Message
from flwr.serverapp import Grid

from fedipfs.exchange import CidGrid, GridOver, StoredArrays

FollowUp = Callable[[Message], Iterable[Message]]


class CohortGrid(GridOver):
    """Shows only `nodes` of a grid, so that a strategy that asks all of them asks the cohort."""

    def __init__(self, grid: Grid, nodes: Iterable[int]) -> None:
        super().__init__(grid)
        self._nodes = list(nodes)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._nodes)


class Answers(NamedTuple):
    """Replies by node id, replies to follow-ups, and how many clients were not needed."""

    replies: list[Message]
    follow_ups: list[Message]
    unneeded: int = 0


def ask(
    edge: CidGrid,
    messages: Iterable[Message],
    *,
    now: Callable[[], float],
    enough: int | None = None,
    deadline_s: float | None = None,
    follow_up: FollowUp | None = None,
) -> Answers:
    """Send `messages` and wait for all replies, for `enough` good ones, or for the deadline.

    What `follow_up` gives for a good reply is sent at once, while others are still waited for.
    Who has not answered by the deadline gets an error reply; who was not needed gets none.
    """
    pending, further = set(edge.push_messages(messages)), set[str]()
    end = None if deadline_s is None else now() + deadline_s
    replies: list[Message] = []
    follow_ups: list[Message] = []
    good = unneeded = 0
    while pending or further:
        came = edge.receive(pending | further, None if end is None else end - now())
        if not came:
            why = f"no answer within {deadline_s:g} s" if deadline_s else "no answer"
            replies += edge.give_up(pending, why)
            follow_ups += edge.give_up(further, why)
            break
        for reply in came:
            number = reply.metadata.reply_to_message_id
            if number in further:
                further.discard(number)
                follow_ups.append(reply)
                continue
            pending.discard(number)
            if enough is not None and good >= enough:
                unneeded += 1  # it came with the last one that was needed
                continue
            replies.append(reply)
            if reply.has_error():
                continue
            good += 1
            if follow_up is not None:
                further |= set(edge.push_messages(list(follow_up(reply))))
        if enough is not None and good >= enough and pending:
            unneeded += len(edge.give_up(pending, "not needed"))
            pending.clear()
    return Answers(_by_node(replies), _by_node(follow_ups), unneeded)


def _by_node(replies: list[Message]) -> list[Message]:
    # One order for every strategy: floating-point sums must not depend on who was faster.
    return sorted(replies, key=lambda reply: reply.metadata.src_node_id)


class Flight(NamedTuple):
    """A client at work: with which model, for which round, since when."""

    node: int
    asked: int
    base: StoredArrays
    began: float


class Flights:
    """The clients at work, over round after round; `edge` must be pushed to through `send`."""

    def __init__(self, edge: CidGrid, now: Callable[[], float], deadline_s: float | None) -> None:
        self._edge, self._now, self._deadline_s = edge, now, deadline_s
        self._flying: dict[str, Flight] = {}

    def __len__(self) -> int:
        return len(self._flying)

    def all(self) -> list[Flight]:
        """All that are at work, in the order of sending."""
        return list(self._flying.values())

    def send(self, messages: Iterable[Message], asked: int, base: StoredArrays) -> None:
        """Send messages that ask for updates of `base` in round `asked`."""
        sent = list(messages)
        nodes = [message.metadata.dst_node_id for message in sent]
        for number, node in zip(self._edge.push_messages(sent), nodes, strict=True):
            self._flying[number] = Flight(node, asked, base, self._now())

    def land(self) -> list[Message]:
        """At least one reply, an error for who is past the deadline; [] if none can come."""
        limit, now = self._deadline_s, self._now()
        if limit is None:
            left = None
        else:
            left = max(0.0, min(flight.began for flight in self._flying.values()) + limit - now)
        came = self._edge.receive(self._flying, left)
        if not came and limit is not None:
            first = min(flight.began for flight in self._flying.values())
            late = [number for number, flight in self._flying.items() if flight.began == first]
            came = self._edge.give_up(late, f"no answer within {limit:g} s")
        for reply in came:
            self._flying.pop(reply.metadata.reply_to_message_id, None)
        return _by_node(came)
