"""What keeps a site's processes up: whom it starts anew, and when it gives up."""

from __future__ import annotations

import os

import pytest

from fedipfs.clients.activity import Activity
from fedipfs.clients.home import VARIABLE, Home
from fedipfs.clients.supervisor import Child, Supervisor, Why
from fedipfs.errors import NodeFailed, NodeUnusable


class Enough(Exception):
    """The test has seen what it waited for."""


@pytest.fixture
def home(tmp_path):
    """With a log of one line, which the command `log` prints before it ends."""
    found = Home(tmp_path)
    Activity(found.activity).note("started", organization="north")
    return found


def supervise(home: Home, said: list[str], most: int, **options) -> None:
    """Keep `fedipfs-client log` up until it was started anew `most` times."""

    def say(line: str) -> None:
        said.append(line)
        if len(said) == most:
            raise Enough

    child = Child("log", ["log"], {**os.environ, VARIABLE: str(home.path)}, **options)
    Supervisor(home, [child], say).run()


@pytest.mark.slow
def test_what_was_ready_once_is_started_anew_for_ever_after_longer_pauses(home):
    said = []
    with pytest.raises(Enough):
        supervise(home, said, 4, ready="2")  # the century
    assert [line.rpartition("anew in ")[2] for line in said] == ["0.5 s", "2 s", "5 s", "15 s"]
    assert said[0].startswith("the log ended with code 0 (see ")


@pytest.mark.slow
def test_what_never_gets_ready_is_given_up(home):
    said = []
    with pytest.raises(NodeFailed, match=r"as often as it was started; .* started") as caught:
        supervise(home, said, 5, ready="never")
    assert len(said) == 3 and caught.value.exit_code == 3


@pytest.mark.slow
def test_a_refusal_that_stays_is_for_a_person_to_put_right(home):
    said = []
    with pytest.raises(NodeUnusable, match=r"^no member \(more in ") as caught:
        supervise(home, said, 5, ready="2", explain=lambda code, lines: Why("no member", False))
    assert len(said) == 3 and caught.value.exit_code == 2


def test_a_refusal_that_is_final_is_not_tried_again(home):
    said = []
    with pytest.raises(NodeUnusable, match=r"^expired$"):
        supervise(home, said, 1, explain=lambda code, lines: Why("expired", True))
    assert said == []
