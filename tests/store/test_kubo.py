"""A node as a store: an imitation of Kubo's RPC in this process, and real daemons (slow)."""

from __future__ import annotations

import io
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from daemons import JsIpfs, Remote, collect_garbage
from hostile_http import HostileServer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from fedipfs.errors import BlockNotFound, StoreError, StoreTimeout, StoreUnreachable
from fedipfs.ipld import CID, DAG_CBOR, DAG_PB, RAW, dagcbor, links, unixfs
from fedipfs.store import FolderStore, dag
from fedipfs.store.kubo import KuboStore
from fedipfs.weights import Weights, put

real = pytest.mark.slow


def open_kubo(address: str, **options: Any) -> KuboStore:
    return KuboStore(address, **{"timeout_s": 20.0, "retries": 2, **options})


def data_of(seed: object, size: int = 1000) -> bytes:
    return random.Random(str(seed)).randbytes(size)


def children(store: KuboStore, root: CID) -> list[bool]:
    return [store.has(cid) for cid in [root, *links(root, store.get(root))]]


def test_put_get_has_size(address: str) -> None:
    store = open_kubo(address)
    records = [(b"", RAW), (data_of("a"), RAW), (data_of("b", 1 << 20), RAW)]
    records += [(dagcbor.encode({"a": data_of("c")}), DAG_CBOR)]
    cids = [store.put(block, codec) for block, codec in records]
    for again in (store, store, open_kubo(address)):
        for cid, (block, codec) in zip(cids, records, strict=True):
            assert cid == CID.of(block, codec)
            assert again.get(cid) == block and again.has(cid) and again.size(cid) == len(block)
        store.publish()
    assert store.counters.put_blocks == 4 and store.counters.sent_blocks == 4 + 1  # a lease
    assert store.counters.sent_bytes >= store.counters.put_bytes
    store.flush()
    store.ready()


def test_what_is_not_there(address: str) -> None:
    store = open_kubo(address, timeout_s=1.5)
    absent = CID.of(b"absent")
    assert not store.has(absent)
    with pytest.raises(BlockNotFound, match=str(absent)):
        store.size(absent)
    with pytest.raises((BlockNotFound, StoreTimeout), match=str(absent)):
        store.get(absent)
    with pytest.raises((BlockNotFound, StoreTimeout), match=str(absent)):
        store.pin(absent, "x")
    assert absent not in store.pins()


def test_blocks_that_are_too_large(address: str) -> None:
    with pytest.raises(StoreError, match="cut it"):
        open_kubo(address).put(bytes((2 << 20) + 1))


def test_version_0_names_the_same_block(address: str) -> None:
    store = open_kubo(address)
    root = unixfs.build([data_of("v0"), data_of("v00")], store.put)
    old = CID(0, DAG_PB, root.digest)
    for _ in range(2):  # on its way, and there
        assert store.get(old) == store.get(root) and store.has(old) and store.size(old)
        store.publish()


def test_files_and_records(address: str) -> None:
    store = open_kubo(address)
    data = data_of("file", 5_000_000)
    root = dag.add(store, unixfs.chunk(data))
    record = dag.put_record(store, {"model": root, "round": 3})
    assert b"".join(dag.cat(store, root)) == data
    store.publish()
    other = open_kubo(address)
    assert b"".join(dag.cat(other, root)) == data
    assert dag.get_record(other, record) == {"model": root, "round": 3}
    streamed = dict(open_kubo(address).leaves(root))
    assert b"".join(unixfs.leaves(root, streamed.__getitem__)) == data
    assert dict(store.leaves(CID.of(data[: 1 << 20]))) == {CID.of(data[: 1 << 20]): data[: 1 << 20]}


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32), width=st.integers(0, 12), depth=st.integers(1, 3))
def test_any_dag_comes_back(seed: int, width: int, depth: int) -> None:
    with HostileServer() as server:
        _round_trip(server.address, seed, width, depth)


@real
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32), width=st.integers(0, 12), depth=st.integers(1, 3))
def test_any_dag_comes_back_from_a_daemon(
    ipfs_daemon: JsIpfs | Remote, seed: int, width: int, depth: int
) -> None:
    _round_trip(ipfs_daemon.address, seed, width, depth)


def _round_trip(address: str, seed: int, width: int, depth: int) -> None:
    source = random.Random(seed)
    store = open_kubo(address)
    level = [unixfs.build([source.randbytes(source.randrange(1, 3000))] * 2, store.put)]
    for _ in range(depth):
        level = [
            dag.put_record(store, {"to": source.sample(level, 1), "n": source.random(), "b": [b""]})
            for _ in range(width)
        ] + level
    root = dag.put_record(store, level)
    wanted = {cid: store.get(cid) for cid in dag.walk(store, root)}
    store.publish()
    other = open_kubo(address)
    assert {cid: other.get(cid) for cid in dag.walk(other, root)} == wanted
    other.pin(root, "random")
    assert "random" in other.pins()[root]
    other.unpin(root, "random")
    assert root not in other.pins()


def test_two_names_of_one_root_in_two_stores(address: str) -> None:
    a, b = open_kubo(address), open_kubo(address)
    root = unixfs.build([data_of("two"), data_of("names")], a.put)
    a.pin(root, "run a")
    b.pin(root, "run b")
    a.pin(root, "run a")
    assert a.pins()[root] == b.pins()[root] == ("run a", "run b")
    a.unpin(root, "run a")
    a.unpin(root, "run a")
    a.unpin(root, "never")
    assert a.pins()[root] == b.pins()[root] == ("run b",)
    b.pin(root, "")
    b.pin(root, "x" * 5000 + "é\n")
    assert len(a.pins()[root]) == 3
    a.unpin(root)
    assert root not in a.pins() and root not in b.pins()


def test_names_of_any_kind(address: str) -> None:
    store = open_kubo(address)
    cid = store.put(data_of("names"))
    names = ["", "a", "ü" * 300, "🦀" * 100, "\x00\n", "&name=x%20+"]
    for name in names:
        store.pin(cid, name, recursive=False)
    assert store.pins()[cid] == tuple(sorted(names))
    for name in names:
        store.unpin(cid, name)
    assert cid not in store.pins()


def test_pins_keep_through_a_collection(own_address: str) -> None:
    store = open_kubo(own_address)
    kept = unixfs.build([data_of(f"kept {i}") for i in range(5)], store.put)
    lone = unixfs.build([data_of("lone 1"), data_of("lone 2")], store.put)
    loose = unixfs.build([data_of("loose 1"), data_of("loose 2")], store.put)
    record = dag.put_record(store, {"file": kept, "lone": lone})
    store.pin(record, "run")
    store.pin(loose, "head", recursive=False)
    leaves = links(loose, store.get(loose))
    extra = unixfs.build([data_of("extra 1"), data_of("extra 2")], store.put)
    store.publish()
    report = store.gc(3600)
    assert report.complete and all(children(store, extra))  # on lease
    report = store.gc(0)
    assert report.removed >= 4 and report.removed_bytes > 0 and report.complete
    assert len(list(dag.walk(store, record))) == 10
    assert store.has(loose) and not any(map(store.has, leaves)) and not store.has(extra)
    assert store.pins() == {record: ("run",), loose: ("head",)}
    before = store.stat()
    store.unpin(record, "run")
    store.unpin(loose)
    store.gc(0)
    after = store.stat()
    assert not store.has(record) and not store.has(kept) and store.pins() == {}
    assert after.blocks < before.blocks and after.bytes < before.bytes
    assert before.pins == 2 and after.pins == 0 and after.free > 0


def test_leases_end_by_their_own_age_whoever_collects(own_address: str) -> None:
    writer = open_kubo(own_address, lease_s=3600)
    cid = writer.put(data_of("young"))
    writer.publish()
    tidy = open_kubo(own_address, lease_s=86400)  # another configuration, as that of a command
    tidy.gc(600)
    assert tidy.has(cid)
    tidy.gc(0)
    assert not tidy.has(cid)


def test_a_lease_of_no_time_is_over_at_once(own_address: str) -> None:
    store = open_kubo(own_address, lease_s=0)
    cid = store.put(data_of("ephemeral"))
    store.publish()
    open_kubo(own_address).gc(3600)
    assert not store.has(cid)


def test_collected_between_two_runs_it_can_be_put_again(own_address: str) -> None:
    store = open_kubo(own_address)
    cid = store.put(data_of("again"))
    store.publish()
    store.gc(0)
    assert not store.has(cid) and store.put(data_of("again")) == cid
    store.pin(cid, "x")
    store.gc(0)
    assert store.get(cid) == data_of("again")


def test_pins_of_others_are_shown_and_left(own_address: str) -> None:
    store = open_kubo(own_address)
    cid = store.put(data_of("theirs"))
    record = dag.put_record(store, {"type": "theirs"})
    store.publish()
    for pinned in (cid, record):
        store.rpc.ask("test", "/pin/add", str(pinned))
    assert store.pins() == {cid: ("",), record: ("",)}
    store.pin(cid, "ours")
    store.unpin(cid, "ours")
    store.gc(0)
    assert store.pins() == {cid: ("",), record: ("",)} and store.has(cid)


def test_without_pins(own_address: str) -> None:
    store = open_kubo(own_address, pin=False)
    cid = store.put(data_of("unpinned"))
    store.pin(cid, "x")
    store.unpin(cid, "x")
    assert store.has(cid) and store.pins() == {}
    assert open_kubo(own_address).stat().pins == 0
    open_kubo(own_address).gc(3600)
    assert not store.has(cid)


def test_a_car_goes_in_and_out_with_the_same_cids(address: str, tmp_path: Path) -> None:
    folder = FolderStore(tmp_path / "a", durable=False)
    file = dag.add(folder, unixfs.chunk(data_of("car", 3_000_000)))
    root = dag.put_record(folder, {"file": file, "note": "x"})
    car = io.BytesIO()
    dag.export_car(folder, [root], car)
    store = open_kubo(address)
    assert dag.import_car(store, io.BytesIO(car.getvalue())) == [root]
    store.pin(root, "car")
    back = io.BytesIO()
    dag.export_car(open_kubo(address), [root], back)
    assert back.getvalue() == car.getvalue()
    exported = store.rpc.call("export", lambda o: b"".join(_export(store, root)), limit=1 << 23)
    other = FolderStore(tmp_path / "b", durable=False)
    assert dag.import_car(other, io.BytesIO(exported)) == [root]
    assert sorted(other) == sorted(folder)


def _export(store: KuboStore, root: CID) -> Iterator[bytes]:
    if "imitation" in os.environ["PYTEST_CURRENT_TEST"]:
        file = io.BytesIO()
        dag.export_car(store, [root], file)
        return iter([file.getvalue()])
    return store.rpc.stream("export", "/dag/export", str(root), 1 << 23)


def test_models_are_the_same_files_as_anywhere(address: str, tmp_path: Path) -> None:
    source = np.random.default_rng(0)
    model = {
        "big": source.normal(size=(700, 600)).astype(np.float32),
        "bias": source.normal(size=700).astype(np.float32),
        "steps": np.array([3], np.int64),
    }
    store, folder = open_kubo(address), FolderStore(tmp_path / "a", durable=False)
    cid = put(store, model)
    assert cid == put(folder, model)
    store.publish()
    found = open_kubo(address)
    leaves = unixfs.leaf_links(cid, found.get)
    assert [size for _, size in leaves[1:]] == [8, 2800, 1 << 20, 700 * 600 * 4 - (1 << 20)]
    data = b"".join(dag.cat(found, cid))
    assert data == save(model) and set(load(data)) == set(model)
    weights = Weights(found, cid)
    assert all(np.array_equal(weights.tensor(name), model[name]) for name in model)
    changed = {**model, "bias": model["bias"] + 1}
    shared = set(unixfs.leaf_links(put(store, changed), store.get)) & set(leaves)
    assert len(shared) == len(leaves) - 1


def run_threads(count: int, work: Callable[[int], None]) -> None:
    problems: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert problems == []


def test_eight_threads(address: str) -> None:
    store = open_kubo(address)
    shared = [data_of(i, 50_000) for i in range(10)]

    def work(number: int) -> None:
        mine = [data_of((number, i), 200_000) for i in range(20)]
        cids = [store.put(block) for block in [*mine, *shared]]
        for cid, block in zip(cids, [*mine, *shared], strict=True):
            assert store.get(cid) == block
        if number % 2:
            store.publish()
        for cid, block in zip(cids, [*mine, *shared], strict=True):
            assert store.get(cid) == block
        store.pin(cids[0], f"thread {number}")
        assert f"thread {number}" in store.pins()[cids[0]]

    run_threads(8, work)
    other = open_kubo(address)
    assert all(other.has(CID.of(data_of((n, i), 200_000))) for n in range(8) for i in range(20))
    for number in range(8):
        store.unpin(CID.of(data_of((number, 0), 200_000)))


def in_child(work: Callable[[], bool]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    return child


def ended_well(child: int) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


def test_forks_share_the_store_but_not_its_connections(address: str) -> None:
    store = open_kubo(address)
    before = [data_of(("before", i), 300_000) for i in range(10)]
    cids = [store.put(block) for block in before[:5]]
    store.publish()
    cids += [store.put(block) for block in before[5:]]  # on their way when the process forks

    def work() -> bool:
        new = [data_of(("child", os.getpid(), i), 100_000) for i in range(10)]
        names = [store.put(block) for block in new]
        store.publish()
        seen = [store.get(cid) for cid in [*cids, *names]]
        return seen == [*before, *new]

    forks = [in_child(work) for _ in range(3)]
    for _ in range(5):
        assert [store.get(cid) for cid in cids] == before
    assert all(map(ended_well, forks))
    store.publish()
    assert [open_kubo(address).get(cid) for cid in cids] == before


def test_a_unix_socket(tmp_path: Path) -> None:
    with HostileServer(tmp_path / "api.sock") as server:
        store = open_kubo(server.address)
        cid = store.put(b"through a file")
        store.publish()
        assert open_kubo(server.address).get(cid) == b"through a file"
        assert len(server.calls("/dag/import")) == 1


def test_nothing_is_asked_before_it_is_needed() -> None:
    with HostileServer() as server:
        store = open_kubo(server.address, peers=["/ip4/127.0.0.1/tcp/1"])
        store.put(b"x")
        repr(store)
        assert server.requests == []


@real
def test_a_daemon_that_is_killed_while_blocks_go_up(own_daemon: JsIpfs) -> None:
    store = open_kubo(own_daemon.address, timeout_s=60, retries=6)
    blocks = [data_of(("up", i), 1 << 20) for i in range(40)]
    cids: list[CID] = []
    back = threading.Timer(0.1, own_daemon.start)
    for number, block in enumerate(blocks):
        cids.append(store.put(block))
        if number == 20:
            own_daemon.kill()
            back.start()
    store.publish()
    back.join()
    own_daemon.restart()  # what it said it has is on its disk
    other = open_kubo(own_daemon.address)
    assert all(other.get(cid) == block for cid, block in zip(cids, blocks, strict=True))


@real
def test_a_daemon_that_stays_away_is_an_error_and_back_again_it_goes_on(
    own_daemon: JsIpfs,
) -> None:
    store = open_kubo(own_daemon.address, timeout_s=3, retries=6)
    kept = store.put(data_of("kept"))
    store.pin(kept, "x")
    own_daemon.kill()
    waiting = [store.put(data_of(("late", i), 1 << 20)) for i in range(12)]
    for call in (store.publish, lambda: store.get(kept), store.pins, store.ready):
        began = time.monotonic()
        with pytest.raises(StoreUnreachable, match="ipfs daemon"):
            call()
        assert time.monotonic() - began < 4
    own_daemon.start()
    store.publish()
    assert all(map(open_kubo(own_daemon.address).has, waiting))
    assert store.get(kept) == data_of("kept") and store.pins() == {kept: ("x",)}


@real
def test_a_daemon_that_is_suspended(own_daemon: JsIpfs) -> None:
    store = open_kubo(own_daemon.address, timeout_s=1.0)
    root = unixfs.build([data_of("s1", 300_000), data_of("s2", 300_000)], store.put)
    store.pin(root, "x")
    own_daemon.suspend()
    late = store.put(data_of("while suspended"))
    calls = (
        lambda: store.get(root),
        lambda: store.has(root),
        lambda: list(store.leaves(root)),
        store.publish,
        store.pins,
        store.stat,
    )
    for call in calls:
        began = time.monotonic()
        with pytest.raises(StoreTimeout, match=r"within 1 s.*store\.timeout_s"):
            call()
        assert time.monotonic() - began < 2
    own_daemon.resume()
    store.publish()
    assert open_kubo(own_daemon.address).get(late) == data_of("while suspended")
    assert len(list(store.leaves(root))) == 3 and store.pins() == {root: ("x",)}


@real
def test_a_collection_by_others_during_a_run(own_daemon: JsIpfs) -> None:
    store = open_kubo(own_daemon.address, timeout_s=2)
    leased = store.put(data_of("leased"))
    store.publish()
    unleased = open_kubo(own_daemon.address, lease_s=0, pin=False)
    gone = unleased.put(data_of("gone"))
    unleased.publish()
    collect_garbage(own_daemon)
    assert store.get(leased) == data_of("leased")
    began = time.monotonic()
    with pytest.raises((BlockNotFound, StoreTimeout), match=str(gone)):
        store.get(gone)
    assert time.monotonic() - began < 3
