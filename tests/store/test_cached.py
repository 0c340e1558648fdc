"""A folder in front of a node and of gateways."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_http import HONEST, HostileServer, reply, reset, said, silence, truncated

from fedipfs.errors import (
    BlockCorrupt,
    BlockNotFound,
    StoreError,
    StoreFull,
    StoreTimeout,
    StoreUnreachable,
)
from fedipfs.ipld import CID, DAG_PB, unixfs
from fedipfs.store import CachedStore, FolderStore, dag
from fedipfs.store.gateway import GatewayStore
from fedipfs.store.kubo import KuboStore
from fedipfs.weights import Weights, put

real = pytest.mark.slow


@pytest.fixture
def node() -> Iterator[HostileServer]:
    with HostileServer() as server:
        yield server


@pytest.fixture
def gateway() -> Iterator[HostileServer]:
    with HostileServer() as server:
        yield server


def home_at(address: str, **options: Any) -> KuboStore:
    return KuboStore(address, **{"timeout_s": 20.0, "retries": 0, **options})


def open_cached(
    folder: Path,
    node: HostileServer | str | None,
    *gateways: HostileServer,
    max_bytes: int | None = None,
    **options: Any,
) -> CachedStore:
    front = FolderStore(folder, durable=False, max_bytes=max_bytes)
    address = node.address if isinstance(node, HostileServer) else node
    home = None if address is None else home_at(address, **options)
    others = [GatewayStore([gateway.url], timeout_s=0.5) for gateway in gateways]
    return CachedStore(front, home, others)


def data_of(seed: object, size: int = 1000) -> bytes:
    return random.Random(str(seed)).randbytes(size)


def file_of(store: CachedStore, cid: CID) -> Path:
    (path,) = store.front.path.glob(f"blocks/*/{cid.to_v1()}")
    return path


def test_put_once_and_read_elsewhere(tmp_path: Path, own_address: str) -> None:
    store = open_cached(tmp_path / "a", own_address)
    data = data_of("file", 3_000_000)
    root = dag.add(store, unixfs.chunk(data))
    assert store.counters.fetched_bytes == 0 and b"".join(dag.cat(store, root)) == data
    store.publish()
    assert store.counters.sent_blocks == 4 + 1 and store.counters.fetched_bytes == 0
    reader = open_cached(tmp_path / "b", own_address)
    assert not reader.front.has(root) and reader.has(root) and reader.size(root) == store.size(root)
    reader.fetch(root)
    fetched = reader.counters.fetched_bytes
    assert set(reader.front) == set(store.front) and fetched >= 3_000_000
    assert b"".join(dag.cat(reader, root)) == data
    reader.fetch(root)
    assert reader.counters.fetched_bytes == fetched
    assert reader.counters.get_bytes >= 3_000_000


def test_what_was_fetched_is_counted_as_got(tmp_path: Path, node: HostileServer) -> None:
    node.hold([b"a"])
    store = open_cached(tmp_path / "a", node)
    for _ in range(3):
        assert store.get(CID.of(b"a")) == b"a"
    counters = store.counters
    assert (counters.get_blocks, counters.get_bytes) == (3, 3)
    assert (counters.fetched_blocks, counters.fetched_bytes) == (1, 1)


LAYERS = {f"layer.{i:02}": (500, 250) for i in range(20)}  # 500 KB each


def model(seed: int, changed: int = 0) -> dict[str, np.ndarray]:
    """A model whose first `changed` layers are other ones than with `changed` 0."""
    made = {}
    for number, (name, shape) in enumerate(LAYERS.items()):
        version = seed + 1000 if number < changed else seed
        source = np.random.default_rng([version, number])
        made[name] = source.normal(size=shape).astype(np.float32)
    return made


def nbytes(tensors: dict[str, np.ndarray]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("restarted", [False, True])
def test_frozen_layers_are_neither_sent_nor_fetched_again(
    tmp_path: Path, own_address: str, restarted: bool
) -> None:
    first, second = model(0), model(0, changed=2)
    writer, reader = (
        open_cached(tmp_path / "w", own_address),
        open_cached(tmp_path / "r", own_address),
    )
    root = put(writer, first)
    writer.publish()
    writer.pin(root, "round 1")
    assert writer.counters.sent_bytes >= nbytes(first)
    reader.fetch(root)
    if restarted:
        writer, reader = (
            open_cached(tmp_path / "w", own_address),
            open_cached(tmp_path / "r", own_address),
        )
    sent, fetched = writer.counters.sent_bytes, reader.counters.fetched_bytes
    root = put(writer, second)
    writer.publish()
    writer.pin(root, "round 2")
    reader.fetch(root)
    found = Weights(reader, root).tensors()
    assert all(np.array_equal(found[name], second[name]) for name in second)
    assert 0.1 * nbytes(first) <= writer.counters.sent_bytes - sent <= 0.12 * nbytes(first)
    assert 0.1 * nbytes(first) <= reader.counters.fetched_bytes - fetched <= 0.12 * nbytes(first)


def test_a_model_that_is_new_comes_in_one_stream(tmp_path: Path, node: HostileServer) -> None:
    root = put(home := home_at(node.address), model(1))
    home.publish()
    node.requests.clear()
    store = open_cached(tmp_path / "a", node)
    store.fetch(root)
    assert len(node.calls("/cat")) == 1 and len(node.calls("/block/get")) <= 2
    assert store.front.verify().damaged == [] and len(list(store.front)) == 22


def test_blocks_put_again_after_home_lost_them(tmp_path: Path, own_address: str) -> None:
    store = open_cached(tmp_path / "a", own_address)
    cid = store.put(data_of("lost"))
    store.publish()
    home_at(own_address).gc(0)
    again = open_cached(tmp_path / "a", own_address)  # knows not what is at home, and asks
    assert again.put(data_of("lost")) == cid
    again.publish()
    assert home_at(own_address).has(cid)


def test_pinning_sends_what_home_has_lost(tmp_path: Path, own_address: str) -> None:
    store = open_cached(tmp_path / "a", own_address, timeout_s=2.0)
    kept = put(store, model(2))
    store.pin(kept, "round 1")
    root = put(store, model(2, changed=2))
    record = dag.put_record(store, {"model": root})
    store.publish()
    home = home_at(own_address)
    home.gc(0)
    assert not home.has(record)
    sent = store.counters.sent_bytes
    store.pin(record, "round 2")
    home.gc(0)
    assert all(map(home.has, dag.walk(store.front, record)))
    assert store.pins() == {kept: ("round 1",), record: ("round 2",)}
    assert store.counters.sent_bytes - sent <= 0.12 * nbytes(model(2))


def test_a_pin_of_what_nobody_has(tmp_path: Path, node: HostileServer) -> None:
    store = open_cached(tmp_path / "a", node)
    with pytest.raises(BlockNotFound, match=str(CID.of(b"absent"))):
        store.pin(CID.of(b"absent"), "x")


def test_a_damaged_block_is_fetched_and_replaced(
    tmp_path: Path, node: HostileServer, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_cached(tmp_path / "a", node)
    cid = store.put(data_of("x"))
    store.publish()
    for damage in (b"", b"other", data_of("x") + b"!", bytes(3 << 20)):
        file_of(store, cid).write_bytes(damage)
        assert store.get(cid) == data_of("x")
        assert file_of(store, cid).read_bytes() == data_of("x")
    assert caplog.text.count("fetching it anew") == 4
    file_of(store, cid).write_bytes(b"other")
    node.blocks.clear()
    with pytest.raises(StoreError) as caught:
        store.get(cid)
    assert isinstance(caught.value, BlockCorrupt)
    assert str(file_of(store, cid)) in str(caught.value) and "could not find" in str(caught.value)


def test_damage_is_not_sent(tmp_path: Path, node: HostileServer) -> None:
    cid = open_cached(tmp_path / "a", None).put(data_of("x"))
    store = open_cached(tmp_path / "a", node)
    file_of(store, cid).write_bytes(b"y" * 1000)
    store.put(data_of("x"))
    with pytest.raises(BlockCorrupt, match=str(cid)):
        store.publish()
    assert cid not in node.blocks


def test_the_next_source_for_what_is_missing_or_wrong(
    tmp_path: Path, node: HostileServer, gateway: HostileServer
) -> None:
    (root,) = gateway.hold([data_of(i) for i in range(4)])
    store = open_cached(tmp_path / "a", node, gateway, timeout_s=0.5)
    assert b"".join(dag.cat(store, root)) == b"".join(data_of(i) for i in range(4))
    for number, wrong in enumerate((reply(b"wrong"), truncated(b""), silence, said("no"))):
        node.plan("/block/get", wrong)
        store = open_cached(tmp_path / f"b{number}", node, gateway, timeout_s=0.5)
        store.fetch(root)
        assert set(store.front) == set(gateway.below(root))
        assert store.front.verify().damaged == []
        node.hang_up()


def test_home_is_down_and_the_gateway_up(tmp_path: Path, gateway: HostileServer) -> None:
    with HostileServer() as gone:
        pass
    leaves = [data_of(i) for i in range(30)]
    root, other = gateway.hold(leaves, [*leaves[:15], *(data_of(-i) for i in range(1, 16))])
    store = open_cached(tmp_path / "a", gone, gateway, timeout_s=5, retries=3)
    began = time.monotonic()
    store.fetch(root)  # in one stream
    store.fetch(other)  # block by block: home is not waited for again and again
    assert time.monotonic() - began < 4  # each try takes 1.4 s
    assert b"".join(dag.cat(store, root)) == b"".join(leaves)
    cid = store.put(data_of("new"))
    with pytest.raises(StoreUnreachable, match="ipfs daemon"):
        store.publish()
    assert store.get(cid) == data_of("new")


def test_both_are_down(tmp_path: Path, node: HostileServer) -> None:
    with HostileServer() as gone:
        pass
    store = open_cached(tmp_path / "a", gone, gone, timeout_s=0.5)
    cid = CID.of(b"absent")
    with pytest.raises(StoreUnreachable, match=str(cid)) as caught:
        store.get(cid)
    text = str(caught.value)
    assert gone.address in text and gone.url in text and "\n" not in text
    with pytest.raises(StoreUnreachable):
        store.fetch(cid)
    with pytest.raises(StoreUnreachable):
        store.fetch(CID.of(b"absent", DAG_PB))
    store = open_cached(tmp_path / "b", node, gone, timeout_s=0.5)
    with pytest.raises(StoreUnreachable):  # the gateway may have it
        store.get(cid)
    store = open_cached(tmp_path / "c", node, node, timeout_s=0.5)
    with pytest.raises(BlockNotFound, match=str(cid)):
        store.get(cid)


def test_after_an_outage_everything_goes_home(tmp_path: Path, node: HostileServer) -> None:
    store = open_cached(tmp_path / "a", node, timeout_s=1.0)
    old = store.put(data_of("old"))
    node.plan("/dag/import", reply("", 503))
    with pytest.raises(StoreUnreachable):
        store.publish()
    new = store.put(data_of("new"))
    store.put(data_of("old"))
    with pytest.raises(StoreUnreachable):
        store.publish()
    node.plan("/dag/import", reset(), HONEST)
    with pytest.raises(StoreUnreachable):
        store.publish()
    store.publish()
    assert {old, new} <= set(node.blocks)


def test_after_a_crash_in_an_outage_too(tmp_path: Path, node: HostileServer) -> None:
    node.plan("/dag/import", reply("", 503))
    root = put(open_cached(tmp_path / "a", node, timeout_s=1.0), model(3))
    again = open_cached(tmp_path / "a", node)  # the process was killed
    node.plan("/dag/import", HONEST)
    assert put(again, model(3)) == root
    again.publish()
    assert set(dag.walk(again.front, root)) <= set(node.blocks)


def test_a_full_folder_still_reads_and_writes(
    tmp_path: Path, node: HostileServer, caplog: pytest.LogCaptureFixture
) -> None:
    root = put(home := home_at(node.address), model(4))
    home.publish()
    store = open_cached(tmp_path / "a", node, max_bytes=2_000_000)
    store.fetch(root)
    assert store.counters.fetched_bytes < 4_000_000  # no more than fits is fetched ahead
    assert caplog.text.count("max_bytes") == 1
    found = Weights(store, root).tensors()
    assert all(np.array_equal(found[name], tensor) for name, tensor in model(4).items())
    assert store.front.stat().bytes <= 2_000_000
    new = put(store, model(5))
    store.publish()
    assert new in node.blocks and store.counters.put_bytes > nbytes(model(5))
    assert np.array_equal(Weights(store, new).tensor("layer.03"), model(5)["layer.03"])
    alone = open_cached(tmp_path / "b", None, max_bytes=1000)
    with pytest.raises(StoreFull):
        alone.put(data_of("x", 2000))


def test_without_a_home_the_folder_is_it(tmp_path: Path, gateway: HostileServer) -> None:
    (root,) = gateway.hold([b"a", b"b"])
    store = open_cached(tmp_path / "a", None, gateway)
    store.fetch(root)
    store.pin(root, "x")
    loose = store.put(b"loose")
    store.publish()
    store.flush()
    store.ready()
    assert store.pins() == {root: ("x",)} and store.stat().pins == 1
    store.gc(0)
    assert store.has(root) and not store.has(loose)
    store.unpin(root, "x")
    assert store.pins() == {}


def test_collecting_empties_the_folder_and_nothing_pinned_is_lost(
    tmp_path: Path, own_address: str
) -> None:
    store = open_cached(tmp_path / "a", own_address)
    root, loose = put(store, model(6)), store.put(b"loose")
    store.pin(root, "x")
    report = store.gc(0)
    assert report.removed >= 24 and report.complete
    assert list(store.front) == [] and not store.has(loose)
    assert np.array_equal(Weights(store, root).tensor("layer.07"), model(6)["layer.07"])
    assert store.put(b"loose") == loose
    store.publish()
    assert home_at(own_address).has(loose)  # it was not taken for being there still


def test_hostile_blocks_never_reach_the_folder(tmp_path: Path, node: HostileServer) -> None:
    (root,) = node.hold([data_of(i) for i in range(4)])
    wrong = b"".join(data_of(i) for i in range(3)) + data_of("other")
    node.plan("/cat", reply(wrong))
    node.plan("/block/get", HONEST, HONEST, reply(b"lies"))
    store = open_cached(tmp_path / "a", node)
    with pytest.raises(BlockCorrupt):
        store.fetch(root)
    assert store.front.verify().damaged == []
    assert set(store.front) <= set(node.below(root))


def test_who_publishes_second_waits_for_the_first(tmp_path: Path, node: HostileServer) -> None:
    for block in (b"a", b"b"):
        open_cached(tmp_path / "a", None).put(block)
    store = open_cached(tmp_path / "a", node)  # both are in the folder, perhaps at home
    store.put(b"a")
    store.put(b"b")

    def slowly(exchange: Any) -> None:
        exchange.wait(0.3)
        HONEST(exchange)

    node.plan("/block/stat", slowly)
    first = threading.Thread(target=store.publish)
    first.start()
    while not node.calls("/block/stat"):
        time.sleep(0.01)
    store.publish()
    assert {CID.of(b"a"), CID.of(b"b")} <= set(node.blocks)
    first.join(10)


def test_a_fork_publishes_for_itself(tmp_path: Path, own_address: str) -> None:
    store = open_cached(tmp_path / "a", own_address)
    root = put(store, model(7))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            other = put(store, model(7, changed=2))
            store.publish()
            code = 0 if all(map(home_at(own_address).has, dag.walk(store.front, other))) else 2
        finally:
            os._exit(code)
    store.publish()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert all(map(home_at(own_address).has, dag.walk(store.front, root)))


def test_a_home_that_hangs_is_a_timeout(tmp_path: Path, node: HostileServer) -> None:
    store = open_cached(tmp_path / "a", node, timeout_s=0.5)
    store.front.put(b"old")
    store.put(b"old")
    node.plan("/block/stat", silence)
    node.plan("/pin/add", silence)
    began = time.monotonic()
    with pytest.raises(StoreTimeout, match=str(CID.of(b"old"))):
        store.publish()
    assert time.monotonic() - began < 1.5
    node.hang_up()
    node.plan("/block/stat", HONEST)
    store.publish()
    assert CID.of(b"old") in node.blocks
