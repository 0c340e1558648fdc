"""Positions of runs: no message is taken twice, in whatever order they come, restarts included."""

from __future__ import annotations

import json
import multiprocessing
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedipfs.clients.replay import MOST, Positions
from fedipfs.errors import ActivityError, Replayed
from fedipfs.exchange import Stamp

RUN = "bafyrun"


def taken(folder, number: int, to: str = "train 2", attempt: int = 0, run: str = RUN, by="one"):
    """Whether a message is taken, by an object that has only what is on disk."""
    try:
        Positions(folder).take(by, Stamp(run, number, to), attempt)
    except Replayed:
        return False
    return True


MESSAGES = st.tuples(
    st.sampled_from(["one", "two"]),
    st.sampled_from(["r", "s"]),
    st.integers(0, 2),  # attempt
    st.integers(0, 3),  # round
    st.sampled_from(["train 2", "train 2 g", "evaluate 2", "query.secagg 2 share"]),
)


@settings(max_examples=60)
@given(st.lists(MESSAGES, max_size=40))
def test_whatever_comes_in_whatever_order_nothing_is_taken_twice_and_nothing_goes_back(
    tmp_path_factory, messages
):
    folder = tmp_path_factory.mktemp("positions")
    accepted: list[tuple] = []
    for message in messages:
        by, run, attempt, number, to = message
        lane = [each for each in accepted if each[:2] == (by, run) and each[4][:5] == to[:5]]
        # What the specification says of it, from all that was taken before.
        fresh = message not in accepted and all(each[2:4] <= (attempt, number) for each in lane)
        assert taken(folder, number, to, attempt, run, by) == fresh
        if fresh:
            accepted.append(message)
    assert len(set(accepted)) == len(accepted)


def test_rounds_go_on_and_a_round_may_be_left_out(tmp_path):
    assert [taken(tmp_path, number) for number in (1, 2, 5, 6)] == [True] * 4
    assert not taken(tmp_path, 4)


def test_the_reason_says_which_round_and_what_came_before(tmp_path):
    positions = Positions(tmp_path)
    positions.take("one", Stamp(RUN, 3, "train 2"), 1)
    with pytest.raises(Replayed, match=r"^round 3 of run bafyrun \(train\) was asked for before"):
        positions.take("one", Stamp(RUN, 3, "train 2"), 1)
    with pytest.raises(Replayed, match=r"^round 9 .* is asked for after round 3 in attempt 1$"):
        positions.take("one", Stamp(RUN, 9, "train 2"), 0)
    assert Replayed("").exit_code == 3


def test_a_resumed_coordinator_asks_for_a_round_again(tmp_path):
    assert taken(tmp_path, 7)
    assert not taken(tmp_path, 7)
    assert taken(tmp_path, 7, attempt=1)
    assert not taken(tmp_path, 7, attempt=1)
    assert taken(tmp_path, 5, attempt=2)  # it lost what was not on its disk
    assert not taken(tmp_path, 8, attempt=1)


def test_several_questions_in_a_round_and_all_stages_of_secure_aggregation(tmp_path):
    """Also a model that is announced for the last round after the next one has begun."""
    stages = ("advertise", "share", "masked", "confirm", "unmask")
    for number in (1, 2):
        for stage in stages:
            kind = "train.secagg" if stage == "masked" else "query.secagg"
            assert taken(tmp_path, number, f"{kind} 2 {stage}")
        assert taken(tmp_path, number, "evaluate 2 bafyone")
        assert taken(tmp_path, number, "evaluate 2 bafytwo")
        assert taken(tmp_path, number, "query.prefetch 2") is True
    assert not taken(tmp_path, 2, "query.secagg 2 unmask")
    assert not taken(tmp_path, 1, "evaluate 2 bafyone")


def test_a_coordinator_cannot_close_the_run_of_another_by_its_name(tmp_path):
    assert taken(tmp_path, 10**9, attempt=10**9, by="mallory")
    assert taken(tmp_path, 1, by="one")


def test_a_round_has_an_end(tmp_path):
    """A file cannot be made to grow for ever."""
    positions = Positions(tmp_path)
    positions.take("one", Stamp(RUN, 1, "train 2"), 0)
    (path,) = tmp_path.iterdir()
    value = json.loads(path.read_text())
    value["at"]["train"][2] += ["x"] * (MOST - 1)
    path.write_text(json.dumps(value))
    with pytest.raises(Replayed, match=f"more than {MOST} messages"):
        positions.take("one", Stamp(RUN, 1, "train 2 other"), 0)
    positions.take("one", Stamp(RUN, 2, "train 2"), 0)
    assert path.stat().st_size < 1000


def test_files_are_this_users_alone_and_named_after_nothing_that_came(tmp_path):
    folder = tmp_path / "state" / "positions"
    assert taken(folder, 1, run="../../evil", by="one")
    (path,) = folder.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600 and folder.stat().st_mode & 0o777 == 0o700
    assert len(path.name) == 37


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": "fedipfs-positions/v2", "at": {}}', '{"format": 1}']
)
def test_a_damaged_file_is_not_taken_for_an_empty_one(tmp_path, text):
    assert taken(tmp_path, 5)
    (path,) = tmp_path.iterdir()
    path.write_text(text)
    with pytest.raises(ActivityError, match="is damaged: put it back from a backup"):
        taken(tmp_path, 6)


def test_a_file_that_others_can_change_counts_for_nothing(tmp_path):
    assert taken(tmp_path, 5)
    (path,) = tmp_path.iterdir()
    path.chmod(0o666)
    with pytest.raises(ActivityError, match="open to other users: chmod 600"):
        taken(tmp_path, 6)


def test_a_folder_that_cannot_be_made_lets_nothing_through(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ActivityError, match="nothing is answered"):
        taken(tmp_path / "file" / "positions", 1)


def _race(folder, results) -> None:
    results.put(sum(taken(folder, number) for number in range(20)))


def test_of_several_processes_one_takes_a_message(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [context.Process(target=_race, args=(tmp_path, results)) for _ in range(4)]
    for child in children:
        child.start()
    counts = [results.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert 0 < sum(counts) <= 20
    assert not [name for name in os.listdir(tmp_path) if not name.endswith(".json")]
