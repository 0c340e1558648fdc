"""The activity log: a line an event whatever a coordinator calls things, and changes show."""

from __future__ import annotations

import json
import multiprocessing
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedipfs.clients.activity import EVENTS, MAX_VALUE, Activity, entries, verify
from fedipfs.errors import ActivityError, ActivityTampered, one_line


@pytest.fixture
def log(tmp_path):
    return Activity(tmp_path / "activity.log")


def lines(log) -> list[str]:
    return log.path.read_text().splitlines(keepends=True)


def test_it_reads_like_this(log):
    log.note("started", organization="hospital-a")
    log.note("trained", run="bafy", round=3, seconds=1.25, masked=True, attempt=None)
    log.note("refused", rule="policy.hours", reason='it is "14:03"')
    before = datetime.now(UTC)
    texts = [line.partition(" ")[2].rpartition(" #")[0] for line in lines(log)]
    assert texts == [
        "started organization=hospital-a",
        "trained run=bafy round=3 seconds=1.25 masked=true",
        'refused rule=policy.hours reason="it is \\"14:03\\""',
    ]
    found = list(entries(log.path))
    assert [entry.event for entry in found] == ["started", "trained", "refused"]
    assert found[1].fields == {"run": "bafy", "round": "3", "seconds": "1.25", "masked": "true"}
    assert found[2].fields["reason"] == 'it is "14:03"'
    assert all(timedelta(0) <= before - entry.time < timedelta(minutes=1) for entry in found)
    assert log.recent() == found
    assert log.path.stat().st_mode & 0o777 == 0o600


HOSTILE = st.one_of(
    st.text(),
    st.sampled_from(
        [
            "x\n2026-12-01T02:02:22+00:00 trained run=fake #0123456789abcdef",
            'x" rule="none',
            "x #0123456789abcdef",
            "a=b c=d",
            "\u202eevil\u2028line\x1b[31m",
            "\\",
            '"',
            "",
            "é ü 漢",
        ]
    ),
)
FIELDS = st.dictionaries(
    st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True),
    HOSTILE,
    max_size=6,
)


@settings(max_examples=100)
@given(st.lists(st.tuples(st.sampled_from(EVENTS), FIELDS), min_size=1, max_size=5))
def test_what_goes_in_comes_out_and_a_line_stays_a_line(tmp_path_factory, events):
    log = Activity(tmp_path_factory.mktemp("log") / "activity.log")
    for event, fields in events:
        log.note(event, **fields)
    found = [(entry.event, entry.fields) for entry in entries(log.path)]
    assert found == [
        (event, {name: one_line(value, MAX_VALUE) for name, value in fields.items()})
        for event, fields in events
    ]
    assert verify(log.path) == len(events) == log.path.read_bytes().count(b"\n")
    assert all(char.isprintable() or char == "\n" for char in log.path.read_text())


def change(lines: list[str]) -> list[str]:
    return [lines[0], lines[1].replace("round=1", "round=7"), *lines[2:]]


def take_out(lines: list[str]) -> list[str]:
    return [lines[0], *lines[2:]]


def take_out_first(lines: list[str]) -> list[str]:
    return lines[1:]


def swap(lines: list[str]) -> list[str]:
    return [lines[0], lines[2], lines[1], *lines[3:]]


def twice(lines: list[str]) -> list[str]:
    return [*lines[:2], *lines[1:]]


def slip_in(lines: list[str]) -> list[str]:
    return [*lines[:2], "2026-12-01T02:02:22+00:00 stopped #0123456789abcdef\n", *lines[2:]]


def not_a_line(lines: list[str]) -> list[str]:
    return [*lines[:2], "hello\n", *lines[2:]]


def another_time(lines: list[str]) -> list[str]:
    return [lines[0], lines[1].replace("T", "t", 1), *lines[2:]]


@pytest.mark.parametrize(
    "harm", [change, take_out, take_out_first, swap, twice, slip_in, not_a_line, another_time]
)
def test_a_line_that_was_changed_moved_or_taken_out_shows(log, harm):
    for number in range(4):
        log.note("answered", round=number)
    assert verify(log.path) == 4
    log.path.write_text("".join(harm(lines(log))))
    with pytest.raises(ActivityTampered, match=r"line [123] does not follow") as caught:
        verify(log.path)
    assert caught.value.exit_code == 2
    log.note("answered", round=4)  # it goes on, and the harm still shows
    with pytest.raises(ActivityTampered):
        verify(log.path)


def test_a_line_that_a_crash_cut_short_is_taken_off_and_noted(log):
    log.note("answered", round=1)
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + b"2026-12-01T02:02:22+00:00 trai")
    assert verify(log.path) == 1
    log.note("answered", round=2)
    assert [entry.fields for entry in entries(log.path)] == [
        {"round": "1"},
        {"round": "2", "removed": "30"},
    ]
    assert log.path.read_bytes().startswith(whole)


def test_moved_away_it_begins_another(log):
    log.note("started")
    log.path.rename(log.path.with_suffix(".1"))
    log.note("stopped")
    assert verify(log.path) == verify(log.path.with_suffix(".1")) == 1


def test_recent_lines_are_the_last_ones(log):
    assert log.recent() == []
    for number in range(6000):
        log.note("answered", round=number, reason="x" * 200)
    found = log.recent()
    assert 1000 < len(found) < 6000 and found[-1].fields["round"] == "5999"


@pytest.mark.parametrize("place", ["folder", "no/such"])
def test_what_cannot_be_written_or_read_is_an_error_of_one_line(tmp_path, place):
    (tmp_path / "folder").mkdir()
    (tmp_path / "no").write_text("")
    with pytest.raises(ActivityError, match="nothing is done that is not in it") as caught:
        Activity(tmp_path / place).note("started")
    assert "\n" not in str(caught.value)
    with pytest.raises(ActivityError, match="cannot read"):
        verify(tmp_path / place)


def test_it_does_not_follow_a_link(tmp_path):
    (tmp_path / "theirs").write_text("")
    (tmp_path / "activity.log").symlink_to(tmp_path / "theirs")
    with pytest.raises(ActivityError):
        Activity(tmp_path / "activity.log").note("started")
    assert (tmp_path / "theirs").read_text() == ""


def _write(path, name) -> None:
    for number in range(100):
        Activity(path).note("answered", by=name, round=number)


def test_several_processes_write_one_log(log):
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_write, args=(log.path, f"p{n}")) for n in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert verify(log.path) == 400
    for name in ("p0", "p3"):
        mine = [entry.fields["round"] for entry in entries(log.path) if entry.fields["by"] == name]
        assert mine == [str(number) for number in range(100)]


def test_the_longest_line_is_read_back(log):
    hard = {f"field_{letter}": '漢"\\' * 200 for letter in "abcdefghijklmnop"}
    log.note("failed", **hard)
    log.note("failed", **hard)
    assert verify(log.path) == 2
    assert json.dumps(one_line('漢"\\' * 200, MAX_VALUE), ensure_ascii=False) in lines(log)[1]
