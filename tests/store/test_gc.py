from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedipfs.errors import ConfigError
from fedipfs.ipld import CID, DAG_CBOR, DAG_PB, unixfs
from fedipfs.store import FolderStore, dag, gc


def age(store: FolderStore, seconds: float = 1000) -> None:
    """Make everything in the store that much older."""
    for path in store.path.glob("blocks/*/*"):
        then = path.stat().st_mtime - seconds
        os.utime(path, (then, then))


def path_of(store: FolderStore, cid: CID) -> Path:
    (path,) = store.path.glob(f"blocks/*/{cid.to_v1()}")
    return path


def test_keeps_what_pins_lead_to_through_files_and_records(store: FolderStore) -> None:
    model = unixfs.build([b"a", b"b", b"c"], store.put)
    first = dag.put_record(store, {"model": model})
    head = dag.put_record(store, {"parent": first, "list": [{"deep": store.put(b"deep")}]})
    store.put(b"loose")
    unixfs.build([b"a", b"other"], store.put)
    store.pin(head)
    age(store)
    report = store.gc(10)
    assert (report.removed, report.kept) == (3, 7) and report.removed_bytes > 10
    assert report.missing == [] and report.complete
    assert sorted(store) == sorted({head, *dag.walk(store, head)})
    store.unpin(head)
    assert store.gc(10).removed == 7
    assert list(store) == []


def test_young_blocks_stay_and_putting_again_makes_young(store: FolderStore) -> None:
    old, again = store.put(b"old"), store.put(b"again")
    age(store)
    young = store.put(b"young")
    store.put(b"again")
    assert store.gc(100).removed == 1
    assert sorted(store) == sorted([young, again]) and not store.has(old)
    assert store.gc(0).removed == 2


def test_a_negative_grace_age_is_refused(store: FolderStore) -> None:
    with pytest.raises(ConfigError, match="grace_s=-1"):
        store.gc(-1)


def test_a_version_0_pin_keeps_its_blocks(store: FolderStore) -> None:
    root = unixfs.build([b"a", b"b"], store.put)
    store.pin(CID(0, DAG_PB, root.digest))
    age(store)
    assert store.gc(0).removed == 0


def test_a_missing_leaf_is_reported_and_the_rest_is_swept(store: FolderStore) -> None:
    root = unixfs.build([b"a", b"b"], store.put)
    loose = store.put(b"loose")
    store.pin(root)
    path_of(store, CID.of(b"a")).unlink()
    age(store)
    report = store.gc(10)
    assert report.missing == [CID.of(b"a")] and report.complete and report.removed == 1
    assert not store.has(loose) and store.has(root)


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_a_node_that_cannot_be_read_stops_the_sweep(store: FolderStore, damage: str) -> None:
    inner = unixfs.build([b"a", b"b"], store.put)
    root = dag.put_record(store, {"model": inner})
    store.put(b"loose")
    store.pin(root)
    path = path_of(store, inner)
    block = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(bytes([block[0] ^ 1]) + block[1:])
    age(store)
    report = store.gc(10)
    assert report.missing == [inner] and not report.complete and report.removed == 0
    assert store.has(CID.of(b"a"))  # a backup of the node would bring the file back
    path.unlink(missing_ok=True)
    store.put(block, DAG_PB)
    assert store.gc(10).removed == 1 and b"".join(dag.cat(store, inner)) == b"ab"


def test_a_pinned_block_that_is_no_dag_cbor_stops_the_sweep(store: FolderStore) -> None:
    bad = store.put(b"\xff\xff", DAG_CBOR)
    strange = store.put(b"{}", 0x0129)
    loose = store.put(b"loose")
    age(store)
    for root in (bad, strange):
        store.pin(root)
        report = store.gc(10)
        assert root in report.missing and not report.complete and store.has(loose)
        store.unpin(root)


def test_pinning_and_other_collections_wait_for_a_collection(store: FolderStore) -> None:
    cid = store.put(b"x")
    age(store)
    with gc.locked(str(store.path), exclusive=True):
        waiting = [
            threading.Thread(target=store.pin, args=(cid,)),
            threading.Thread(target=store.gc, args=(5000,)),
        ]
        for thread in waiting:
            thread.start()
        time.sleep(0.1)
        assert all(thread.is_alive() for thread in waiting) and store.pins() == {}
    for thread in waiting:
        thread.join(10)
    assert store.pins() == {cid: ("",)} and store.has(cid)


def test_temporary_files_go_when_stale(store: FolderStore) -> None:
    cid = store.put(b"x")
    shard = path_of(store, cid).parent
    stale, fresh = shard / ".tmp-stale", shard / ".tmp-fresh"
    stale.write_bytes(b"?")
    fresh.write_bytes(b"?")
    os.utime(stale, (1, 1))
    store.gc(0)
    assert not stale.exists() and fresh.exists()


def test_a_killed_collection_loses_nothing(store: FolderStore) -> None:
    cid = store.put(b"pinned meanwhile")
    path = path_of(store, cid)
    path.rename(path.with_name(f".gc-{path.name}"))
    root = dag.put_record(store, {"x": cid})
    store.pin(root)
    age(store)
    assert store.gc(10).removed == 0
    assert store.get(cid) == b"pinned meanwhile"
    path.rename(path.with_name(f".gc-{path.name}"))
    store.put(b"pinned meanwhile")  # both are there now
    assert store.gc(10).removed == 0
    assert store.get(cid) == b"pinned meanwhile" and not list(store.path.glob("blocks/*/.gc-*"))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_writer_that_comes_while_its_block_is_swept(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    cid = store.put(b"contended")
    age(store)
    rename = os.rename

    def contend(source: str, target: str) -> None:
        if when == "before":
            store.put(b"contended")
        rename(source, target)
        if when == "after":
            store.put(b"contended")

    monkeypatch.setattr(gc.os, "rename", contend)
    store.gc(10)
    assert store.get(cid) == b"contended"


def test_collecting_while_others_write_never_takes_a_young_block(store: FolderStore) -> None:
    stop, errors = threading.Event(), []

    def write(number: int) -> None:
        mine = FolderStore(store.path, durable=False)
        while not stop.is_set():
            for i in range(30):
                cid = mine.put(b"%d" % (i % 20 + number))
                try:
                    mine.get(cid)
                except Exception as error:
                    errors.append(error)

    writers = [threading.Thread(target=write, args=(n,)) for n in (0, 10)]
    for writer in writers:
        writer.start()
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        store.gc(30)
    stop.set()
    for writer in writers:
        writer.join()
    assert errors == [] and store.verify().damaged == []


shapes = st.recursive(
    st.integers(0, 5), lambda inner: st.lists(inner, min_size=1, max_size=3), max_leaves=12
)


@settings(max_examples=40)
@given(st.lists(st.tuples(shapes, st.booleans()), max_size=4))
def test_exactly_the_reachable_blocks_stay(
    tmp_path_factory: pytest.TempPathFactory, trees: list[tuple[Any, bool]]
) -> None:
    store = FolderStore(tmp_path_factory.mktemp("s"), durable=False)

    def write(shape: Any) -> CID:
        if isinstance(shape, int):
            return store.put(b"%d" % shape)
        return dag.put_record(store, [write(item) for item in shape])

    roots = [(write(shape), pinned) for shape, pinned in trees]
    expected: set[CID] = set()
    for root, pinned in roots:
        if pinned:
            store.pin(root)
            expected.update(dag.walk(store, root))
    age(store)
    store.gc(10)
    assert set(store) == expected
