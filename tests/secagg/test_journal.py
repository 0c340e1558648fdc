"""The journal: after a crash the same answer, or none; secrets are closed and do not stay."""

from __future__ import annotations

import multiprocessing
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from fedipfs.errors import JournalError, OutOfTurn, SecondAnswer, TooLate
from fedipfs.secagg import Journal, Parameters, Session
from fedipfs.secagg import journal as module
from fedipfs.secagg.journal import STAGES, Entry

SESSION = Session("run", 2, ("a", "b", "c"), Parameters.choose(3, 4))
FIRST = Entry(b"\1" * 32, b"answer", {"secret": b"\7" * 32, "more": {"b": [b"x", b"y"]}})


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "journal", SESSION)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_what_is_written_is_there_for_another_process(journal, tmp_path):
    assert journal.read("advertise") is None
    assert journal.write("advertise", FIRST) is FIRST
    again = Journal(tmp_path / "journal", SESSION)
    assert again.read("advertise") == again.need("advertise") == FIRST


def test_the_first_answer_stays(journal):
    journal.write("advertise", FIRST)
    other = Entry(FIRST.request, b"another answer", {})
    assert journal.write("advertise", other) == FIRST
    with pytest.raises(SecondAnswer, match="nobody gets a second answer"):
        journal.write("advertise", replace(other, request=bytes(32)))
    assert journal.need("advertise") == FIRST


def test_only_its_owner_reads_it(journal, tmp_path):
    old = os.umask(0)
    try:
        for stage in STAGES[:3]:
            journal.write(stage, FIRST)
    finally:
        os.umask(old)
    for path in (tmp_path / "journal").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
    path = next((tmp_path / "journal").rglob("share"))
    path.chmod(0o640)
    with pytest.raises(JournalError, match="is open to other users: chmod 600 it"):
        journal.read("share")


def test_an_answer_is_synced_before_it_leaves(journal, monkeypatch):
    done = []
    for name in ("fsync", "replace", "mkdir"):
        original = getattr(os, name)

        def record(*args, name=name, original=original, **options):
            done.append(name)
            return original(*args, **options)

        monkeypatch.setattr(module.os, name, record)
    journal.write("advertise", FIRST)
    folders = ["mkdir", "fsync"] * 3  # of all runs, of the run, of the session
    assert done == [*folders, "fsync", "replace", "fsync"]
    done.clear()
    Journal(journal._run.parent, SESSION, durable=False).write("share", FIRST)
    assert done == ["replace"]


def test_a_crash_while_writing_leaves_no_answer(journal, monkeypatch):
    journal.write("advertise", FIRST)

    def crash(*paths: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.os, "replace", crash)
        journal.write("share", FIRST)
    assert journal.read("share") is None
    assert journal.write("share", FIRST) is FIRST  # it never left: another one may


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: data * 2]
)
def test_damage_is_noticed(journal, tmp_path, damage):
    journal.write("advertise", FIRST)
    path = next((tmp_path / "journal").rglob("advertise"))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(JournalError, match="is damaged"):
        journal.read("advertise")


def test_links_are_not_followed(journal, tmp_path):
    journal.write("advertise", FIRST)
    path = next((tmp_path / "journal").rglob("advertise"))
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(JournalError):
        journal.read("advertise")


def test_the_last_answer_leaves_nothing_secret(journal, tmp_path):
    for stage in STAGES[:-1]:
        journal.write(stage, FIRST)
    last = Entry(b"\2" * 32, b"shares")
    journal.write("unmask", last)
    assert [name.split("/")[-1] for name in files(tmp_path / "journal")] == ["unmask", "lock"]
    assert journal.need("unmask") == last
    for stage in STAGES[:-1]:
        with pytest.raises(TooLate, match="round 2 of run has ended here"):
            journal.need(stage)
        with pytest.raises(TooLate):
            journal.write(stage, FIRST)


def test_a_newer_session_removes_the_one_before(journal, tmp_path):
    journal.write("advertise", FIRST)
    (journal._run / "notes.txt").touch()  # whoever put that there
    newer = Journal(tmp_path / "journal", replace(SESSION, round=3))
    newer.write("advertise", FIRST)
    assert len(files(tmp_path / "journal")) == 3
    for late in (lambda: journal.need("advertise"), lambda: journal.write("share", FIRST)):
        with pytest.raises(TooLate, match="round 3 has begun"):
            late()
    with pytest.raises(OutOfTurn):
        newer.need("share")


def test_attempts(tmp_path):
    def at(attempt: int, round: int = 2) -> Journal:
        return Journal(tmp_path, replace(SESSION, round=round, attempt=attempt))

    at(0).write("advertise", FIRST)
    at(1).write("advertise", FIRST)
    with pytest.raises(TooLate):
        at(0).write("advertise", FIRST)
    for stage in ("mask", "unmask"):
        at(1).write(stage, FIRST)
        with pytest.raises(SecondAnswer, match="round 2 may have left in another attempt"):
            at(2).write("advertise", FIRST)
    at(0, round=3).write("advertise", FIRST)
    assert len(files(tmp_path)) == 2


def test_a_client_that_leaves(journal, tmp_path):
    journal.end()  # of what has not begun there is nothing
    for stage in STAGES[:3]:
        journal.write(stage, FIRST)
    journal.end()
    journal.end()
    assert [name.split("/")[-1] for name in files(tmp_path / "journal")] == ["unmask", "lock"]
    for stage in STAGES[:-1]:
        with pytest.raises(TooLate):
            journal.write(stage, FIRST)
    with pytest.raises(SecondAnswer):
        journal.write("unmask", FIRST)


def test_runs_do_not_meet(journal, tmp_path):
    journal.write("advertise", FIRST)
    other = Journal(tmp_path / "journal", replace(SESSION, run="../run"))
    assert other.read("advertise") is None
    other.write("advertise", replace(FIRST, request=bytes(32)))
    assert journal.need("advertise") == FIRST
    assert len(list((tmp_path / "journal").iterdir())) == 2


def _answer(folder, number, results) -> None:
    entry = Entry(FIRST.request, bytes([number]), {})
    results.put(Journal(folder, SESSION).write("advertise", entry).answer)


def test_of_several_processes_one_answers(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    workers = [
        context.Process(target=_answer, args=(tmp_path, number, results)) for number in range(8)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len({results.get() for _ in workers}) == 1


def test_secrets_are_not_shown():
    assert "secret" not in repr(FIRST)


STAGE_METHODS = {
    "advertise": lambda world, name: world.client(name).advertise(),
    "share": lambda world, name: world.client(name).share(world.roster),
    "mask": lambda world, name: world.client(name).mask(
        world.deliveries[name], world.vectors[name].copy(), world.put
    ),
    "confirm": lambda world, name: world.client(name).confirm(world.survivors),
    "unmask": lambda world, name: world.client(name).unmask(world.request),
}


@pytest.mark.parametrize("stage", STAGE_METHODS)
def test_a_client_that_crashed_after_an_answer_gives_it_again(world, stage):
    # Every World.client is a client that knows nothing but its journal.
    played = world().until(stage)
    ask = STAGE_METHODS[stage]
    first = ask(played, "a01")
    assert ask(played, "a01") == first == ask(played, "a01")
    assert len(played.store) in (0, 1, 5)
    if stage == "mask":
        played.server.take(first, played.store[first.vector])
        played.mask()
    else:
        getattr(played, stage)()
    while played.server.stage != "unmask":
        next_stage = {"share": "share", "masked": "mask", "confirm": "confirm"}
        getattr(played, next_stage[played.server.stage])()
    assert (played.unmask().total == played.sum(played.names)).all()


@pytest.mark.parametrize("stage", STAGE_METHODS)
def test_a_client_that_crashed_before_its_answer_was_written(world, stage, monkeypatch):
    played = world().until(stage)
    original = Journal.write

    def crash(self, at, entry):
        if at == {"mask": "masked"}.get(stage, stage):
            raise KeyboardInterrupt
        return original(self, at, entry)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "write", crash)
        STAGE_METHODS[stage](played, "a01")
    if stage == "mask":  # the vector may have left
        with pytest.raises(SecondAnswer, match="may have left"):
            STAGE_METHODS[stage](played, "a01")
    else:
        STAGE_METHODS[stage](played, "a01")


def test_no_file_of_a_client_is_open_to_others(world):
    played = world().until("unmask")
    for path in played.folder.rglob("*"):
        if path != played.folder and path.parent != played.folder:
            assert not stat.S_IMODE(path.stat().st_mode) & 0o077
