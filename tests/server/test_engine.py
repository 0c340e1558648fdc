"""The local engine: warm workers, state between rounds, faults that stay one client's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest
from flwr.app import ConfigRecord, RecordDict

from fedipfs.server.engine.local import FIRST_NODE, LocalGrid
from fedipfs.server.engine.pool import ProcessPool, SerialPool, warm_up

FACTORY = "fedipfs.clients.worker:serve"


def options(store, app: str = "engine_apps:app") -> dict:
    return {
        "app": app,
        "store": {"kind": "folder", "path": str(store.path), "durable": False},
        "run_id": 1,
        "seed": 5,
        "run_config": {},
        "node_config": {},
        "threads": None,
        "offline": True,
        "keys": None,
        "seal": "none",
    }


@pytest.fixture
def pools(store):
    opened = []

    def make(workers: int = 2, timeout_s: float = 60, **changes):
        if workers == 0:
            pool = SerialPool(FACTORY, {**options(store), **changes})
        else:
            warm_up(["fedipfs.clients.worker"])
            pool = ProcessPool(
                FACTORY, {**options(store), **changes}, workers=workers, timeout_s=timeout_s
            )
        opened.append(pool)
        return pool

    yield make
    for pool in opened:
        pool.close()


def ask(grid: LocalGrid, nodes=None, **config):
    content = RecordDict({"config": ConfigRecord({"server-round": 1, **config})})
    messages = [
        grid.create_message(content, "train", node, "") for node in nodes or grid.get_node_ids()
    ]
    replies = grid.send_and_receive(messages)
    return {reply.metadata.src_node_id - FIRST_NODE: reply for reply in replies}


def metrics(reply):
    return dict(reply.content["metrics"])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_client_answers_once_with_its_own_partition(pools, workers):
    replies = ask(LocalGrid(pools(workers), 7))
    assert {n: metrics(r)["partition"] for n, r in replies.items()} == {n: n for n in range(7)}


def test_two_workers_share_the_work_outside_this_process(pools):
    replies = ask(LocalGrid(pools(2), 20))
    pids = {metrics(reply)["pid"] for reply in replies.values()}
    assert os.getpid() not in pids
    assert len(pids) == 2


def test_random_numbers_do_not_depend_on_the_number_of_workers(pools):
    draws = []
    for workers in (0, 1, 2, 4):
        grid = LocalGrid(pools(workers), 6)
        draws.append([metrics(ask(grid)[n])["draw"] for n in range(6)])
    assert draws[0] == draws[1] == draws[2] == draws[3]
    assert len(set(draws[0])) == 6


def test_client_state_survives_whichever_worker_serves(pools):
    grid = LocalGrid(pools(2), 5)
    for round_ in range(1, 4):
        replies = ask(grid, round=round_)
        assert {metrics(reply)["calls"] for reply in replies.values()} == {round_}
    # Another engine goes on from the states that this one leaves.
    later = LocalGrid(pools(1), 5, states=grid.states)
    assert {metrics(reply)["calls"] for reply in ask(later).values()} == {4}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raise", "ValueError: no such scanner"),
        ("hang", "no answer within engine.timeout_s=1"),
        ("spin", "no answer within engine.timeout_s=1"),
        ("exit", "its process ended with exit code 7"),
        ("kill", "its process ended with signal 9"),
    ],
)
def test_a_client_that_fails_is_named_and_the_others_answer(pools, fault, reason):
    grid = LocalGrid(pools(2, timeout_s=1.0), 6)
    ask(grid)  # processes are up
    replies = ask(grid, victim=2, fault=fault)
    assert len(replies) == 6
    assert replies[2].error.reason == reason
    assert not any(replies[n].has_error() for n in range(6) if n != 2)
    assert not any(reply.has_error() for reply in ask(grid).values())


def test_push_and_pull_do_not_wait(pools):
    grid = LocalGrid(pools(1), 2)
    content = RecordDict({"config": ConfigRecord({"server-round": 1})})
    ids = list(grid.push_messages([grid.create_message(content, "train", FIRST_NODE, "")]))
    replies, until = [], time.monotonic() + 60
    while not replies and time.monotonic() < until:
        replies = list(grid.pull_messages(ids))
    assert len(replies) == 1
    assert list(grid.pull_messages(ids)) == []


def test_an_app_that_cannot_be_loaded_is_every_clients_error(pools):
    grid = LocalGrid(pools(1, app="no_such_module:app"), 2)
    reasons = {reply.error.reason for reply in ask(grid).values()}
    assert reasons == {"ModuleNotFoundError: No module named 'no_such_module'"}
    grid = LocalGrid(pools(1, app="os:path"), 1)
    assert "not a flwr ClientApp" in ask(grid)[0].error.reason


def test_a_worker_that_died_idle_is_no_clients_failure(pools):
    pool = pools(2)
    grid = LocalGrid(pool, 6)
    ask(grid)
    for worker in pool._workers:
        worker.process.kill()
        worker.process.join()
    assert not any(reply.has_error() for reply in ask(grid).values())


def test_a_worker_that_cannot_start_says_why(pools, tmp_path, capfd):
    (tmp_path / "plain-file").write_text("not a store")
    grid = LocalGrid(pools(1, store={"kind": "folder", "path": str(tmp_path / "plain-file")}), 2)
    for reply in ask(grid).values():
        assert reply.error.reason.startswith("its worker cannot start: StoreUnusable: ")
    assert "Traceback" not in capfd.readouterr().err


def test_an_answer_after_the_time_out_is_dropped(pools):
    grid = LocalGrid(pools(1), 1)
    content = RecordDict({"config": ConfigRecord({"server-round": 1})})
    message = grid.create_message(content, "train", FIRST_NODE, "")
    assert list(grid.send_and_receive([message], timeout=1e-9)) == []
    assert len(ask(grid)) == 1
    assert grid._done == {}
    assert grid._waiting == {}


def test_no_process_outlives_close(pools):
    pool = pools(3)
    children = [worker.process.pid for worker in pool._workers]
    assert all(psutil.pid_exists(pid) for pid in children)
    pool.close()
    assert not any(psutil.pid_exists(pid) for pid in children)


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_when_their_server_is_killed_even_in_mid_job(store, sig):
    script = f"""
        import sys, time
        sys.path.insert(0, {os.path.dirname(__file__) + "/../support"!r})
        if __name__ == "__main__":
            from flwr.app import ConfigRecord, RecordDict
            from fedipfs.server.engine.local import LocalGrid
            from fedipfs.server.engine.pool import ProcessPool
            pool = ProcessPool({FACTORY!r}, {options(store)!r}, workers=2, timeout_s=600)
            grid = LocalGrid(pool, 2)
            record = ConfigRecord({{"server-round": 1, "victim": 0, "fault": "hang"}})
            print(*[w.process.pid for w in pool._workers], flush=True)
            content = RecordDict({{"config": record}})
            grid.send_and_receive([grid.create_message(content, "train", 2, "")])
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    time.sleep(0.5)
    process.send_signal(sig)
    process.wait(10)
    until = time.monotonic() + 10
    while any(_alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in pids)


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
