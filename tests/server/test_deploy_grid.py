"""Members behind a SuperLink: their numbers, who is away, and what is asked of whom."""

from __future__ import annotations

import random
import time

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedipfs.errors import RunFailed
from fedipfs.exchange import pack, unpack
from fedipfs.flower_compat import set_identity, set_message_id
from fedipfs.flower_deploy import RunNotRunning
from fedipfs.server.engine.base import FIRST_NODE
from fedipfs.server.engine.deploy import Seat, SuperLinkGrid

SEATS = {0: Seat("north", 10**18 + 7), 1: Seat("south", 5), 3: Seat("west", 2**63 + 1)}


class Link(Grid):
    """A SuperLink in this process: nodes echo what they are asked, and who, when let to."""

    def __init__(self) -> None:
        set_identity(run_id=1, node_id=1)
        self.online = [seat.node_id for seat in SEATS.values()]
        self.unknown: set[int] = set()
        self.inbox: dict[str, Message] = {}
        self.held: set[int] = set()  # nodes that do not answer yet
        self.impostor: int | None = None
        self.fault: Exception | None = None
        self.rubbish: RecordDict | None = None

    def set_run(self, run) -> None: ...

    @property
    def run(self):
        return None

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self):
        return list(self.online)

    def push_messages(self, messages):
        if self.fault:
            raise self.fault
        ids = []
        for message in messages:
            if message.metadata.dst_node_id in self.unknown:
                ids.append(None)
                continue
            number = f"m{random.random()}"
            set_message_id(message, number)
            self.inbox[number] = message
            ids.append(number)
        return ids

    def pull_messages(self, message_ids):
        replies = []
        for number in message_ids:
            message = self.inbox.get(number)
            if message is None or message.metadata.dst_node_id in self.held:
                continue
            del self.inbox[number]
            node = message.metadata.dst_node_id
            assert len(message.content) == 1  # Flower charges by the record
            record = ConfigRecord({"node": str(node), **unpack(message.content)["config"]})
            reply = Message(pack(RecordDict({"config": record})), reply_to=message)
            if self.rubbish is not None:
                reply.content = self.rubbish
            if self.impostor is not None:
                reply.metadata.__dict__["_src_node_id"] = self.impostor
            replies.append(reply)
        return replies

    def send_and_receive(self, messages, *, timeout=None):
        raise AssertionError("its poll takes three seconds")


def ask(grid: SuperLinkGrid, *nodes: int) -> list[Message]:
    return [
        grid.create_message(
            RecordDict({"config": ConfigRecord({"what": node})}), "train", node, "", ttl=60
        )
        for node in nodes
    ]


def grid_over(link: Link, **options) -> SuperLinkGrid:
    return SuperLinkGrid(link, lambda: SEATS, **options)


def test_strategies_see_the_nodes_of_a_local_run():
    heard = []
    grid = grid_over(Link(), on_reply=lambda name, ok: heard.append((name, ok)))
    nodes = list(grid.get_node_ids())
    assert nodes == [FIRST_NODE, FIRST_NODE + 1, FIRST_NODE + 3]
    assert [grid.name_of(node) for node in nodes] == ["north", "south", "west"]
    sent = ask(grid, *nodes)
    replies = {reply.metadata.src_node_id: reply for reply in grid.send_and_receive(sent)}
    assert [message.metadata.dst_node_id for message in sent] == nodes  # nothing shows through
    for number, seat in SEATS.items():
        reply = replies[FIRST_NODE + number]
        assert reply.content["config"]["node"] == str(seat.node_id)
        assert reply.content["config"]["what"] == FIRST_NODE + number
    assert sorted(heard) == [("north", True), ("south", True), ("west", True)]
    assert grid.traffic.flower > 0


def test_who_does_not_answer_is_waited_for_no_longer_than_said():
    link = Link()
    link.held = {SEATS[1].node_id}
    grid = grid_over(link)
    list(grid.get_node_ids())
    ids = list(grid.push_messages(ask(grid, FIRST_NODE, FIRST_NODE + 1)))
    (first,) = grid.receive(ids, 5)
    assert first.metadata.src_node_id == FIRST_NODE
    began = time.monotonic()
    assert grid.receive(ids, 0.3) == []
    assert 0.25 < time.monotonic() - began < 2
    grid.cancel(ids)
    link.held = set()
    assert grid.receive(ids, 5) == []  # what comes after all is dropped


def test_who_is_no_member_or_not_known_has_failed_at_once():
    link = Link()
    link.unknown = {SEATS[1].node_id}
    grid = grid_over(link)
    list(grid.get_node_ids())
    nodes = [FIRST_NODE + 1, FIRST_NODE + 2, FIRST_NODE + 3]
    replies = {r.metadata.src_node_id: r for r in grid.send_and_receive(ask(grid, *nodes))}
    assert "south is not known to the SuperLink" in replies[nodes[0]].error.reason
    assert "is a member no more" in replies[nodes[1]].error.reason
    assert replies[nodes[2]].has_content()


def test_an_answer_of_another_node_is_none():
    link = Link()
    link.impostor = SEATS[3].node_id
    grid = grid_over(link)
    list(grid.get_node_ids())
    (reply,) = grid.send_and_receive(ask(grid, FIRST_NODE))
    assert reply.metadata.src_node_id == FIRST_NODE
    assert "another node answered" in reply.error.reason


@pytest.mark.parametrize("record", [{"records": b"\xff\xff"}, {"records": "text"}, {"other": 1}])
def test_an_answer_that_cannot_be_unpacked_is_a_failure(record):
    link = Link()
    link.rubbish = RecordDict({"packed": ConfigRecord(record)})
    grid = grid_over(link)
    list(grid.get_node_ids())
    (reply,) = grid.send_and_receive(ask(grid, FIRST_NODE))
    assert "packed records" in reply.error.reason


def test_too_few_are_waited_for_and_named():
    link, told = Link(), []
    link.online = [SEATS[0].node_id]
    grid = grid_over(link, least=2, join_s=5, on_wait=lambda names: (told.append(names), come()))

    def come():
        link.online.append(SEATS[3].node_id)

    assert list(grid.get_node_ids()) == [FIRST_NODE, FIRST_NODE + 3]
    assert told == [["south", "west"]]
    link.online.clear()
    assert list(grid_over(link, least=1, join_s=0.1).get_node_ids()) == []


def test_a_run_that_is_stopped_says_so():
    link = Link()
    grid = grid_over(link)
    list(grid.get_node_ids())
    link.fault = RunNotRunning()
    with pytest.raises(RunFailed, match="stopped at the SuperLink"):
        grid.push_messages(ask(grid, FIRST_NODE))

    def interrupted():
        raise KeyboardInterrupt

    link.fault, link.held = None, {SEATS[0].node_id}
    grid = grid_over(link, interrupted=interrupted)
    ids = list(grid.push_messages(ask(grid, FIRST_NODE)))
    with pytest.raises(KeyboardInterrupt):
        grid.receive(ids, None)
