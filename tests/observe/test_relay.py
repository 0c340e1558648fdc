"""Progress that is written in one process and shown in another."""

from __future__ import annotations

import io

from fedipfs.observe.progress import Progress
from fedipfs.observe.relay import Relay, Tail, show

LINE = {
    "round": 1,
    "seconds": 1.0,
    "clients": {"selected": 2, "succeeded": 2, "failed": {}},
    "metrics": {"server": {"accuracy": 0.5, "loss": 1.0}},
}


def tell(progress: Progress) -> None:
    progress.tell("what is to be known")
    progress.tell("WARNING: mind this", important=True)
    progress.phase("training")
    progress.round_started(1, 2)
    progress.client_done("north", True)


def test_what_is_told_there_is_shown_here(tmp_path):
    direct, relayed = io.StringIO(), io.StringIO()
    tell(Progress(direct))
    relay = Relay(tmp_path / "events")
    tell(relay)
    for what, given, named in Tail(tmp_path / "events").new():
        assert show(Progress(relayed), what, given, named)
    assert relayed.getvalue() == direct.getvalue()
    assert "mind this" in relayed.getvalue()
    assert (tmp_path / "events").stat().st_mode & 0o777 == 0o600


def test_events_come_whole_and_once(tmp_path):
    path = tmp_path / "events"
    tail = Tail(path)
    assert list(tail.new()) == []  # it is not there yet
    path.write_bytes(b'["phase", ["a"], {}]\n["pha')
    assert [given for _, given, _ in tail.new()] == [["a"]]
    with path.open("ab") as file:
        file.write(b'se", ["b"], {}]\n["end", [0, ""], {}]\n')
    assert [(what, given) for what, given, _ in tail.new()] == [("phase", ["b"]), ("end", [0, ""])]
    assert list(tail.new()) == []
    assert not show(Progress(io.StringIO()), "end", [0, ""], {})
