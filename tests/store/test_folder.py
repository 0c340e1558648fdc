from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedipfs.errors import (
    BlockCorrupt,
    BlockNotFound,
    ConfigError,
    StoreError,
    StoreFull,
    StoreUnusable,
)
from fedipfs.ipld import CID, DAG_CBOR, DAG_PB, RAW
from fedipfs.store import FolderStore, StoreStat, files, open_store


def file_of(store: FolderStore, cid: CID) -> Path:
    (path,) = store.path.glob(f"blocks/*/{cid.to_v1()}")
    return path


def leftovers(store: FolderStore) -> list[Path]:
    return list(store.path.rglob(".*"))


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("block", [b"", b"hello", bytes(1 << 20), bytes(2 << 20)], ids=len)
def test_put_get_has_size(tmp_path: Path, durable: bool, block: bytes) -> None:
    store = FolderStore(tmp_path / "s", durable=durable)
    for codec in (RAW, DAG_PB, DAG_CBOR):
        cid = store.put(block, codec)
        assert cid == CID.of(block, codec)
        assert store.get(cid) == block and store.has(cid) and store.size(cid) == len(block)
    store.flush()
    assert FolderStore(tmp_path / "s", create=False).get(cid) == block
    assert leftovers(store) == []


def test_buffers_of_any_kind(store: FolderStore) -> None:
    data = bytes(range(200))
    for buffer in (bytearray(data), memoryview(data), memoryview(data).cast("I")):
        assert store.get(store.put(buffer)) == data


def test_version_0_names_the_same_block(store: FolderStore) -> None:
    cid = store.put(b"\x0a\x00", DAG_PB)
    old = CID(0, DAG_PB, cid.digest)
    assert store.get(old) == b"\x0a\x00" and store.has(old) and list(store) == [cid]


def test_a_missing_block_is_named(store: FolderStore) -> None:
    cid = CID.of(b"nothing")
    assert not store.has(cid)
    for call in (store.get, store.size, store.pin):
        with pytest.raises(BlockNotFound, match=str(cid)) as caught:
            call(cid)
        assert str(store.path) in str(caught.value)


def test_blocks_over_two_mebibytes_are_refused(store: FolderStore) -> None:
    with pytest.raises(StoreError, match="cut it"):
        store.put(bytes((2 << 20) + 1))
    assert list(store) == []


@settings(max_examples=60)
@given(data=st.data())
def test_no_damage_is_ever_returned(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    store = FolderStore(tmp_path_factory.mktemp("s"), durable=False)
    block = data.draw(st.binary(min_size=1, max_size=60))
    cid = store.put(block)
    damaged = bytearray(block)
    if data.draw(st.booleans()):
        damaged[data.draw(st.integers(0, len(block) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        damaged = damaged[: data.draw(st.integers(0, len(block) - 1))]
    path = file_of(store, cid)
    path.write_bytes(damaged)
    with pytest.raises(BlockCorrupt) as caught:
        store.get(cid)
    assert str(cid) in str(caught.value) and str(path) in str(caught.value)
    assert "delete that file" in str(caught.value)
    assert store.verify().damaged == [cid]
    path.unlink()  # the remedy
    store.put(block)
    assert store.get(cid) == block and store.verify().damaged == []


def test_a_block_cut_short_is_healed_by_putting_it_again(store: FolderStore) -> None:
    cid = store.put(b"a whole block")
    file_of(store, cid).write_bytes(b"")  # what a power loss can leave without fsync
    assert store.put(b"a whole block") == cid
    assert store.get(cid) == b"a whole block"


def test_a_huge_file_in_a_block_s_place_is_not_read(store: FolderStore) -> None:
    cid = store.put(b"x")
    with open(file_of(store, cid), "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BlockCorrupt):
        store.get(cid)
    assert store.verify().damaged == [cid]


def test_putting_a_present_block_only_makes_it_young(store: FolderStore) -> None:
    cid = store.put(b"x")
    path = file_of(store, cid)
    os.utime(path, (1, 1))
    inode = path.stat().st_ino
    store.put(b"x")
    assert path.stat().st_mtime > 1 and path.stat().st_ino == inode


def test_listing_skips_strangers(store: FolderStore) -> None:
    cids = sorted(store.put(b"%d" % i, codec) for i in range(9) for codec in (RAW, DAG_CBOR))
    shard = file_of(store, cids[0]).parent
    for name in ("notes.txt", ".tmp-1", ".gc-2", str(CID.of(b"elsewhere"))):
        (shard / name).write_bytes(b"?")
    (store.path / "blocks" / "stray").write_bytes(b"?")
    assert sorted(store) == cids
    report = store.verify()
    assert (report.blocks, report.bytes, report.damaged) == (18, 18, [])


def test_stat_and_counters(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "s", durable=False)
    a = store.put(b"12345")
    store.put(b"678")
    store.put(b"678")
    before = store.counters.copy()
    store.get(a)
    store.pin(a, "first")
    found = store.stat()
    assert found == StoreStat(2, 8, 1, found.free) and found.free > 0
    counts = store.counters
    assert (counts.put_blocks, counts.put_bytes) == (3, 11)
    assert (counts.get_blocks, counts.get_bytes) == (1, 5) and before.get_blocks == 0
    assert FolderStore(tmp_path / "s", max_bytes=10).stat().free == 2


# ---- opening


def test_opening_what_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreUnusable, match="there is no store"):
        FolderStore(tmp_path / "absent", create=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreUnusable, match="is a file"):
        FolderStore(tmp_path / "file")
    with pytest.raises(StoreUnusable, match="file"):
        FolderStore(tmp_path / "file" / "below")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    for create in (True, False):
        with pytest.raises(StoreUnusable, match="is not a store"):
            FolderStore(tmp_path / "home", create=create)
    assert os.listdir(tmp_path / "home") == ["thesis.tex"]
    FolderStore(tmp_path / "s")
    (tmp_path / "s" / "fedipfs-store").write_text("fedipfs folder store 9\n")
    with pytest.raises(StoreUnusable, match="another version"):
        FolderStore(tmp_path / "s")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreUnusable, match="there is no store"):
        FolderStore(tmp_path / "empty", create=False)
    FolderStore(tmp_path / "empty").put(b"x")


@pytest.mark.parametrize("limit", [0, -5])
def test_a_cap_that_makes_no_sense(tmp_path: Path, limit: int) -> None:
    with pytest.raises(ConfigError, match=f"max_bytes={limit}"):
        FolderStore(tmp_path, max_bytes=limit)


def test_open_store(tmp_path: Path) -> None:
    path = tmp_path / "s"
    cid = open_store(path).put(b"x")
    options = {"kind": "folder", "path": str(path), "max_bytes": None, "durable": False}
    for spec in (str(path), f"folder:{path}", {"path": path}, options):
        store = open_store(spec)
        assert isinstance(store, FolderStore) and store.get(cid) == b"x"
    with pytest.raises(ConfigError, match="'ftp' is unknown"):
        open_store({"kind": "ftp", "path": "x"})
    with pytest.raises(ConfigError, match="no path"):
        open_store({"kind": "folder"})
    with pytest.raises(ConfigError, match="speed"):
        open_store({"path": str(path), "speed": 3})


# ---- full disks, read-only disks


def failing(code: int, after: int = 0) -> Callable[..., Any]:
    """Something that raises OSError from call number `after` on."""
    calls = 0

    def fail(*_: Any, **__: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(code, os.strerror(code))
        return None

    return fail


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["write", "fsync", "replace", "mkdir"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str) -> None:
    store = FolderStore(tmp_path / "s")
    with monkeypatch.context() as patch:
        patch.setattr(files.os, call, failing(code))
        with pytest.raises(StoreFull, match="free some space") as caught:
            store.put(b"block")
    assert "\n" not in str(caught.value)
    assert list(store) == [] and leftovers(store) == [] and store.counters.put_blocks == 0
    assert store.get(store.put(b"block")) == b"block"


def test_a_disk_that_fills_up_in_the_middle_of_a_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FolderStore(tmp_path / "s")
    write, room = os.write, 1000

    def scarce(handle: int, data: memoryview) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = write(handle, data[:room])
        room -= done
        return done

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "write", scarce)
        with pytest.raises(StoreFull):
            store.put(bytes(5000))
    assert list(store) == [] and leftovers(store) == []


def test_a_real_full_file_system() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    handle = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(StoreFull), files.os_errors("/dev/full"):
            files._write_all(handle, b"x")
    finally:
        os.close(handle)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_read_only_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    store = FolderStore(tmp_path / "s")
    cid = store.put(b"there")
    store.pin(cid)
    with monkeypatch.context() as patch:
        opened = os.open

        def read_only(path: str, flags: int, *rest: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                raise OSError(code, os.strerror(code), path)
            return opened(path, flags, *rest)

        patch.setattr(files.os, "open", read_only)
        for call in (lambda: store.put(b"new"), lambda: store.pin(cid), lambda: store.gc(0)):
            with pytest.raises(StoreUnusable, match="permissions") as caught:
                call()
            assert "\n" not in str(caught.value)
        again = FolderStore(tmp_path / "s")
        assert again.get(cid) == b"there" and again.pins() == {cid: ("",)}
        assert again.verify().damaged == []
        with pytest.raises(StoreUnusable, match="permissions"):
            FolderStore(tmp_path / "other")


def test_a_disk_that_cannot_read_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FolderStore(tmp_path / "s")
    cid = store.put(b"x")
    monkeypatch.setattr(files.os, "read", failing(errno.EIO))
    with pytest.raises(BlockCorrupt, match=str(cid)):
        store.get(cid)


def test_an_interrupt_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FolderStore(tmp_path / "s")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.put(b"x")
    assert list(store) == [] and leftovers(store) == []


# ---- the cap


def test_the_cap_counts_what_is_there(tmp_path: Path) -> None:
    FolderStore(tmp_path / "s").put(bytes(60))
    store = FolderStore(tmp_path / "s", max_bytes=100)
    cid = store.put(bytes(range(40)))
    with pytest.raises(StoreFull, match="100 of at most 100 bytes and 1 more do not fit"):
        store.put(b"x")
    store.put(bytes(range(40)))  # what is there needs no room
    file_of(store, CID.of(bytes(60))).unlink()
    store.put(b"x")
    assert sorted(store) == sorted([cid, CID.of(b"x")])


def test_two_processes_under_one_cap_overshoot_little(tmp_path: Path) -> None:
    limit, block = 16_000, 100
    stores = [FolderStore(tmp_path / "s", max_bytes=limit, durable=False) for _ in range(2)]
    full = 0
    for i in range(400):
        try:
            stores[i % 2].put(i.to_bytes(4, "big") * (block // 4))
        except StoreFull:
            full += 1
    assert full and limit <= stores[0].stat().bytes <= limit * (1 + 2 / 16)


# ---- what durable means


def test_durable_syncs_block_and_folder_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def kind(handle: int) -> str:
        return "folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file"

    monkeypatch.setattr(files.os, "fsync", lambda h: (events.append(kind(h)), fsync(h)))
    monkeypatch.setattr(
        files.os, "replace", lambda *names: (events.append("replace"), replace(*names))
    )
    store = FolderStore(tmp_path / "s")
    store.put(b"first")
    events.clear()
    store.put(b"first")
    assert events == ["file", "folder"]  # another process may have put it without sync
    store.put(b"in a new folder")
    assert events[2:] == ["folder", "file", "replace", "folder"]
    events.clear()
    quick = FolderStore(tmp_path / "s", durable=False)
    quick.put(b"quick")
    assert events == ["replace"]


def test_flush_without_durable_syncs_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FolderStore(tmp_path / "s", durable=False)
    store.put(b"x")
    store.flush()
    monkeypatch.setattr(
        "fedipfs.store.folder.sync_filesystem", failing(errno.ENOSPC)
    )  # delayed allocation can find the disk full only now
    with pytest.raises(StoreFull):
        store.flush()
