"""The resident worker: what it answers, what it remembers, and what cannot stop it."""

from __future__ import annotations

import grp
import logging
import os
import pwd
import signal
import socket
import struct
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from children import child, wait
from flwr.app import ConfigRecord, Message, RecordDict
from partner import CONFIG, TASK, Partners

from fedipfs import CidGrid, data, use_store
from fedipfs.clients import wire
from fedipfs.clients.activity import entries
from fedipfs.clients.memory import Memory
from fedipfs.clients.serving import STUCK, Server
from fedipfs.data import Examples
from fedipfs.errors import BudgetSpent, ConfigError, FormatError, ParallelFailed
from fedipfs.exchange import StoredArrays, Vault, from_numpy, stored_cid
from fedipfs.flower_compat import message_to_bytes
from fedipfs.server.engine.local import LocalGrid
from fedipfs.server.engine.pool import SerialPool
from fedipfs.store import FolderStore

NAMES = ("north", "south")


def parts() -> list[Examples]:
    """The data of two clients of the local engine."""
    train = data.load("digits", root=None, fallback="digits").train
    split = {name: CONFIG["data"][name] for name in ("shards_per_client", "classes_per_client")}
    found = data.partition(
        train.targets, name="iid", clients=2, seed=CONFIG["seed"], alpha=0.5, **split
    )
    return [Examples(train.inputs[part], train.targets[part]) for part in found]


@pytest.fixture(scope="module")
def partners(tmp_path_factory):
    found = Partners(tmp_path_factory.mktemp("partners"), NAMES, parts())
    try:
        for name in NAMES:
            found.start(name)
        found.ready(*NAMES)
        yield found
    finally:
        found.stop()


class Rounds:
    """Round numbers that nobody has asked for yet: the worker answers each once."""

    number = 0

    def __next__(self) -> int:
        Rounds.number += 1
        return Rounds.number


rounds = Rounds()


def local(partners: Partners, number: int):
    """What the local engine's clients answer to the same."""
    pool = SerialPool(
        "fedipfs.clients.worker:serve",
        {
            "app": "fedipfs.clients.app:app",
            "store": {"kind": "folder", "path": str(partners.store.path), "durable": False},
            "run_id": 1,
            "seed": CONFIG["seed"],
            "run_config": {},
            "node_config": {"allowed-tasks": TASK.partition(":")[0], "simulated": True},
            "threads": 1,
            "offline": True,
            "keys": None,
            "seal": "none",
        },
    )
    try:
        grid = CidGrid(LocalGrid(pool, 2), partners.store)
        config = {"run-config": partners.config(), "server-round": number}
        model = StoredArrays.open(partners.store, stored_cid(partners.model()))
        content = RecordDict({"config": ConfigRecord(config), "arrays": model})
        replies = grid.send_and_receive(
            [grid.create_message(content, "train", node, "") for node in (2, 3)]
        )
        return {NAMES[reply.metadata.src_node_id - 2]: reply for reply in replies}
    finally:
        pool.close()


@pytest.mark.slow
def test_what_a_partner_answers_is_what_the_local_engine_gives(partners):
    number = next(rounds)
    theirs = partners.ask(partners.grid(), number)
    ours = local(partners, number)
    for name in NAMES:
        assert not theirs[name].has_error(), theirs[name].error.reason
        mine, other = theirs[name].content, ours[name].content
        assert stored_cid(mine["arrays"]) == stored_cid(other["arrays"])
        assert dict(mine["metrics"]) == dict(other["metrics"])
    assert stored_cid(theirs["north"].content["arrays"]) != stored_cid(
        theirs["south"].content["arrays"]
    )


@pytest.mark.slow
def test_what_it_did_is_in_the_activity_log(partners):
    number = next(rounds)
    reply = partners.ask(partners.grid(), number)["north"]
    entry = list(entries(partners.homes["north"].activity))[-1]
    assert entry.event == "trained" and entry.fields["coordinator"] == "hub"
    assert entry.fields["round"] == str(number) and entry.fields["task"] == TASK
    assert entry.fields["update"] == str(stored_cid(reply.content["arrays"]))


@pytest.mark.slow
def test_a_task_that_is_not_allowed_is_refused_and_not_imported(partners):
    config = partners.config(task={"target": "antigravity:Fly", "options": {}})
    reply = partners.ask(partners.grid(), next(rounds), **{"run-config": config})["north"]
    assert "policy.tasks" in reply.error.reason
    assert list(entries(partners.homes["north"].activity))[-1].event == "refused"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["query.capabilities", "query.unknown", "query.prefetch"])
def test_messages_of_other_kinds_get_an_answer(partners, kind):
    reply = partners.ask(partners.grid(), next(rounds), kind=kind)["south"]
    if kind == "query.unknown":
        assert reply.error.reason == "failed (ValueError): the site's own log says why"
        entry = list(entries(partners.homes["south"].activity))[-1]
        assert (entry.event, entry.fields["kind"]) == ("failed", "query.unknown")
        assert entry.fields["reason"].startswith("No query function")
    elif kind == "query.capabilities":
        assert reply.content["capabilities"]["examples"] == len(parts()[1])
    else:
        assert reply.has_content()


@pytest.mark.slow
def test_an_error_of_the_task_is_the_reply_and_the_next_message_is_answered(partners):
    bad = partners.config(train={**CONFIG["train"], "batch_size": 0})
    reply = partners.ask(partners.grid(), next(rounds), **{"run-config": bad})["north"]
    assert reply.error.reason.startswith("ConfigError: train.batch_size=0")
    assert partners.ask(partners.grid(), next(rounds))["north"].has_content()


@pytest.mark.slow
def test_a_partner_remembers_by_round_and_again_where_a_round_is_asked_again(partners):
    """Personal layers: what a round left is put on in the next."""
    grid = partners.grid()
    first, second = next(rounds), next(rounds)

    def asked(number, attempt=0, run="again"):
        ask = {"personal": ["3.*"], "attempt": attempt, "run": run}
        reply = partners.ask(grid, number, **ask)["north"]
        assert not reply.has_error(), reply.error.reason
        return stored_cid(reply.content["arrays"])

    asked(first)
    before = asked(second)
    assert asked(second, attempt=1) == before  # from what the first left, not from its own
    assert asked(second, run="fresh") != before  # from nothing
    kept = [each for names in partners.store.pins().values() for each in names]
    assert any(name.startswith("north/hub/again/state/") for name in kept)
    partners.store.gc(0)
    asked(next(rounds), attempt=1)


@pytest.mark.slow
def test_hostile_peers_do_not_stop_it(partners):
    path = partners.homes["north"].socket
    held = []
    try:
        for data_ in (
            b"",
            b"GET / HTTP/1.1\r\n\r\n",
            struct.pack(">I", 1 << 31),
            struct.pack(">I", 100) + b"half",
            struct.pack(">I", 4) + b"\xff\xfe\n\n",
            struct.pack(">I", 3) + b"[]\n",
            struct.pack(">I", 20) + b'{"kind": "answer"}\n\n',
        ):
            connection = wire.connect(path, 5)
            connection.sendall(data_)
            held.append(connection)
        for _ in range(100):  # more than it keeps
            held.append(wire.connect(path, 5))
        with wire.connect(path, 5) as connection:
            wire.send(connection, {"kind": "message"}, b"no message of Flower's")
            header, _ = wire.receive(connection, 10)
        assert header["kind"] == "failure" and header["reason"]
        junk = RecordDict({"packed": ConfigRecord({"records": b"junk"})})
        message = message_to_bytes(Message(junk, 2, "train"))
        with wire.connect(path, 5) as connection:
            wire.send(connection, {"kind": "message"}, message)
            assert wire.receive(connection, 10)[0]["kind"] == "failure"
        noted = list(entries(partners.homes["north"].activity))[-2:]
        assert [entry.event for entry in noted] == ["failed", "failed"]
        assert (noted[1].fields["kind"], noted[1].fields["error"]) == ("train", "EdgeError")
        assert partners.ask(partners.grid(), next(rounds))["north"].has_content()
    finally:
        for connection in held:
            connection.close()


@pytest.mark.slow
def test_its_socket_is_its_users_alone(partners):
    home = partners.homes["north"]
    assert os.stat(home.socket).st_mode & 0o777 == 0o600
    assert os.stat(home.activity).st_mode & 0o077 == 0


@pytest.mark.slow
def test_a_second_worker_of_a_home_is_refused(partners):
    process = partners.start("north")
    assert process.wait(60) == 2
    assert "its worker runs already" in partners.said("north")
    partners.processes.remove(process)
    assert partners.answers("north")


@pytest.fixture
def lonely(tmp_path):
    """Partners whose workers a test may kill."""
    found = Partners(tmp_path, NAMES, parts())
    found.wait = tmp_path / "wait"
    found.wait.touch()
    found.slow = found.config(task={"target": TASK, "options": {"wait": str(found.wait)}})
    try:
        yield found
    finally:
        found.stop()


@pytest.mark.slow
def test_a_worker_that_is_killed_or_not_there_is_said_so(lonely):
    process = lonely.start("north")
    lonely.ready("north")
    timer = threading.Timer(2.0, process.kill)
    timer.start()
    began = time.monotonic()
    reply = lonely.ask(lonely.grid(), 1, nodes=[2], **{"run-config": lonely.slow})["north"]
    assert reply.error.reason == "its worker ended"
    assert time.monotonic() - began < 10
    assert process.wait(5) == -signal.SIGKILL
    lonely.processes.remove(process)
    reply = lonely.ask(lonely.grid(), 2, nodes=[2])["north"]  # its socket is there still
    assert reply.error.reason == "its worker is not there"
    # Begun anew, it goes on where it was, and does not train on the same message twice.
    lonely.wait.unlink()
    lonely.start("north")
    lonely.ready("north")
    reply = lonely.ask(lonely.grid(), 1, nodes=[2], **{"run-config": lonely.slow})["north"]
    assert "was asked for before" in reply.error.reason
    assert lonely.ask(lonely.grid(), 2, nodes=[2])["north"].has_content()


@pytest.mark.slow
def test_a_message_that_takes_too_long_ends_the_worker(lonely):
    lonely.configure("north", client={"timeout_s": 2})
    process = lonely.start("north")
    lonely.ready("north")
    reply = lonely.ask(lonely.grid(), 1, nodes=[2], **{"run-config": lonely.slow})["north"]
    assert reply.error.reason == "no answer within client.timeout_s=2"
    assert process.wait(10) == STUCK
    lonely.processes.remove(process)
    assert "no answer within" in lonely.said("north")


@pytest.mark.slow
@pytest.mark.parametrize(("end", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_ends_it_in_order(lonely, end, code):
    process = lonely.start("north")
    lonely.ready("north")
    process.send_signal(end)
    assert process.wait(10) == code
    lonely.processes.remove(process)
    assert not lonely.homes["north"].socket.exists()
    assert [entry.event for entry in entries(lonely.homes["north"].activity)] == [
        "started",
        "stopped",
    ]


@pytest.mark.slow
def test_data_that_cannot_be_read_are_said_so_in_a_line(lonely):
    (lonely.homes["north"].path / "own.npz").write_bytes(b"nothing")
    process = lonely.start("north")
    assert process.wait(60) == 2
    lonely.processes.remove(process)
    last = lonely.said("north").splitlines()[-1]
    assert last.startswith("fedipfs-client: ") and "own.npz" in last


# ---- in this process


@pytest.fixture
def served(tmp_path):
    """A server in a thread, that echoes."""
    servers = []

    def make(answer=lambda data: data, **options):
        folder = tmp_path / ("long" * 30)  # longer than the address of a socket can be
        folder.mkdir(exist_ok=True)
        path = folder / "worker.sock"
        server = Server(path, answer, timeout_s=60, **options)
        threading.Thread(target=server.serve, daemon=True).start()
        servers.append(server)
        return path

    yield make
    for server in servers:
        server.close()


def request(path, body: bytes):
    with wire.connect(path, 5) as connection:
        wire.send(connection, {"kind": "message"}, body)
        return wire.receive(connection, 5)


def test_answers_larger_than_the_limit_are_errors(served):
    path = served(lambda data: bytes(wire.LIMIT))
    header, body = request(path, b"x")
    assert header["kind"] == "failure" and "EdgeError" in header["reason"] and body == b""
    with pytest.raises(FormatError, match="at most"), wire.connect(path, 5) as connection:
        wire.send(connection, {"kind": "message"}, bytes(wire.LIMIT))


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        (BudgetSpent("too much"), "BudgetSpent: too much"),
        (IndexError("Target 17 is out of bounds."), None),
        (FileNotFoundError(2, "No such file", "/srv/patients.csv"), None),
        (ParallelFailed("rank 1 failed (IndexError: Target 17 is out of bounds.)"), None),
        (SystemExit("secret"), None),
    ],
)
def test_what_may_quote_the_data_is_in_the_sites_own_log_only(served, caplog, problem, told):
    def answer(data: bytes) -> bytes:
        raise problem

    header, _ = request(served(answer), b"x")
    kind = type(problem).__name__
    assert header["reason"] == (told or f"failed ({kind}): the site's own log says why")
    if told is None:
        assert str(problem) in caplog.text and "Traceback" in caplog.text


def test_one_message_at_a_time_and_all_are_answered(served):
    busy, most = [0], [0]

    def answer(data: bytes) -> bytes:
        busy[0] += 1
        most[0] = max(most[0], busy[0])
        time.sleep(0.05)
        busy[0] -= 1
        return data

    path, found = served(answer), []
    threads = [
        threading.Thread(target=lambda n=n: found.append(request(path, b"%d" % n)[1]))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [b"%d" % n for n in range(8)] and most[0] == 1


def test_who_has_sent_nothing_makes_room(served):
    path = served()
    held = [wire.connect(path, 5) for _ in range(60)]
    assert request(path, b"here") == ({"kind": "answer"}, b"here")
    held[0].settimeout(5)
    assert held[0].recv(1) == b""  # the oldest was closed
    for each in held:
        each.close()


def test_an_asker_that_is_gone_does_not_keep_the_answer_from_others(served):
    path = served(lambda data: (time.sleep(0.2), data)[1])
    connection = wire.connect(path, 5)
    wire.send(connection, {"kind": "message"}, b"gone")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    assert request(path, b"here") == ({"kind": "answer"}, b"here")


class Dawdler(logging.Handler):
    """Takes its time, as a full disk does."""

    def emit(self, record: logging.LogRecord) -> None:
        time.sleep(1)


def test_an_answer_that_comes_while_the_message_is_given_up_is_not_sent_too(tmp_path):
    path = tmp_path / "s"

    def serve():
        logging.getLogger("fedipfs.clients.serving").addHandler(Dawdler())
        Server(path, lambda data: (time.sleep(0.8), data)[1], timeout_s=0.5).serve()

    pid = child(serve)
    deadline = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with wire.connect(path, 5) as connection:
        wire.send(connection, {"kind": "message"}, b"here")
        header, _ = wire.receive(connection, 5)
        assert header == {"kind": "failure", "reason": "no answer within client.timeout_s=0.5"}
        assert connection.recv(1) == b""
    assert wait(pid) == STUCK


def test_a_group_that_there_is_not_is_said_so(tmp_path):
    with pytest.raises(ConfigError, match=r"node\.group='nobody-has-this'"):
        Server(tmp_path / "s", bytes, timeout_s=1, group="nobody-has-this")


def test_a_group_may_use_the_socket(served):
    name = grp.getgrgid(os.getgid()).gr_name
    path = served(group=name)
    assert os.stat(path).st_mode & 0o777 == 0o660 and os.stat(path).st_gid == os.getgid()
    assert request(path, b"here")[1] == b"here"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_user_is_refused_whatever_the_mode_of_the_socket():
    nobody = pwd.getpwnam("nobody")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        for group, answered in ((None, False), (grp.getgrgid(nobody.pw_gid).gr_name, True)):
            path = Path(folder) / f"{group}.sock"
            server = Server(path, lambda data: data, timeout_s=60, group=group)
            threading.Thread(target=server.serve, daemon=True).start()
            os.chmod(path, 0o666)

            def ask(path=path):
                os.setgroups([])
                os.setgid(nobody.pw_gid)
                os.setuid(nobody.pw_uid)
                assert request(path, b"here")[1] == b"here"

            assert (wait(child(ask)) == 0) == answered
            server.close()


class TestMemory:
    def state(self, value: float) -> RecordDict:
        return RecordDict(
            {"a": from_numpy({"w": np.full(3, value)}), "c": ConfigRecord({"v": value})}
        )

    def value(self, memory: Memory, run: str, number: int, by: str = "hub") -> float | None:
        found = memory.load(by, run, number)
        if not found:
            return None
        assert found["a"]["w"].numpy()[0] == found["c"]["v"]
        return found["c"]["v"]

    @pytest.fixture
    def memory(self, tmp_path, store):
        use_store(store)
        return Memory(tmp_path / "state" / "memory.json", Vault(store), "north")

    def test_the_last_round_before_is_what_is_remembered(self, memory):
        for number in (1, 2, 4):
            memory.save("hub", "run", number, self.state(number))
        found = {number: self.value(memory, "run", number) for number in range(1, 6)}
        assert found == {1: None, 2: 1.0, 3: 2.0, 4: 2.0, 5: 4.0}
        assert self.value(memory, "other", 5) is None

    def test_a_round_that_is_asked_again_takes_its_own_place(self, memory):
        for number, value in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 22.0)):
            memory.save("hub", "run", number, self.state(value))
        assert self.value(memory, "run", 4) == 22.0
        assert self.value(memory, "run", 2) == 1.0

    def test_another_process_finds_it_and_what_is_pinned_is_bounded(self, memory, tmp_path, store):
        for number in range(1, 9):
            memory.save("hub", "run", number, self.state(number))
        for other in range(40):
            memory.save("hub", f"run-{other}", 1, self.state(other))
        again = Memory(tmp_path / "state" / "memory.json", Vault(store), "north")
        assert self.value(again, "run", 9) is None  # 40 runs ago
        assert self.value(again, "run-39", 2) == 39.0
        assert sum(map(len, store.pins().values())) == 16
        for number in range(1, 9):
            again.save("hub", "run-39", number, self.state(number))
        assert sum(map(len, store.pins().values())) == 15 + 3

    def test_what_is_kept_for_one_coordinator_is_no_others(self, memory, tmp_path, store):
        memory.save("hub", "run", 1, self.state(1.0))
        assert self.value(memory, "run", 2, by="other") is None
        memory.save("other", "run", 1, self.state(2.0))
        for each in range(20):  # more runs than are kept of one
            memory.save("other", f"run-{each}", 1, self.state(each))
        again = Memory(tmp_path / "state" / "memory.json", Vault(store), "north")
        store.gc(0)
        assert self.value(again, "run", 2) == 1.0
        assert self.value(again, "run", 2, by="other") is None  # 20 runs ago

    def test_it_survives_a_garbage_collection(self, memory, store: FolderStore):
        memory.save("hub", "run", 1, self.state(5.0))
        store.gc(0)
        assert self.value(memory, "run", 2) == 5.0

    def test_nothing_is_kept_of_those_who_remember_nothing(self, memory, tmp_path):
        memory.save("hub", "run", 1, RecordDict())
        assert not (tmp_path / "state").exists()

    def test_a_damaged_file_is_said_so(self, memory, tmp_path, store):
        memory.save("hub", "run", 1, self.state(1.0))
        (tmp_path / "state" / "memory.json").write_text('{"hub": {"run": [1]}}')
        with pytest.raises(ConfigError, match="damaged"):
            Memory(tmp_path / "state" / "memory.json", Vault(store), "north")
