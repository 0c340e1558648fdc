"""Gateways: each block checked, the next gateway for what is missing, late or wrong."""

from __future__ import annotations

import os
import random
import threading
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from hostile_http import (
    HONEST,
    Answer,
    HostileServer,
    bomb,
    closing,
    drip,
    drip_chunks,
    endless,
    flood,
    head,
    raw,
    redirect,
    reply,
    reset,
    silence,
    truncated,
)

from fedipfs.errors import (
    BlockCorrupt,
    BlockNotFound,
    StoreBadAnswer,
    StoreError,
    StoreTimeout,
    StoreUnreachable,
    StoreUnusable,
    UnixFSError,
)
from fedipfs.ipld import CID, DAG_PB, car
from fedipfs.store import dag
from fedipfs.store.gateway import GatewayStore

TIMEOUT_S = 0.5
LEAVES = [random.Random(seed).randbytes(300_000) for seed in range(4)]
BLOCK, CID_ = LEAVES[0], CID.of(LEAVES[0])


@pytest.fixture
def gateway() -> Iterator[HostileServer]:
    with HostileServer() as server:
        server.hold(LEAVES)
        yield server


@pytest.fixture
def other() -> Iterator[HostileServer]:
    with HostileServer() as server:
        server.hold(LEAVES)
        yield server


def open_gateways(*servers: HostileServer) -> GatewayStore:
    return GatewayStore([server.url for server in servers], timeout_s=TIMEOUT_S)


def failure(store: GatewayStore, cid: CID, *, most_s: float = TIMEOUT_S + 1) -> StoreError:
    began = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(StoreError) as caught:
            store.get(cid)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert time.monotonic() - began < most_s
    text = str(caught.value)
    assert str(cid) in text and "\n" not in text and len(text) < 900
    return caught.value


def test_blocks_and_files(gateway: HostileServer) -> None:
    (root,) = gateway.hold(LEAVES)
    store = open_gateways(gateway)
    assert store.get(CID_) == BLOCK and store.has(CID_) and store.size(CID_) == len(BLOCK)
    assert b"".join(dag.cat(store, root)) == b"".join(LEAVES)
    request = gateway.requests[0]
    assert request.query["format"] == "raw"
    assert request.headers["accept"] == "application/vnd.ipld.raw"
    assert store.counters.fetched_blocks == 3 + 5 == store.counters.get_blocks
    old = CID(0, DAG_PB, root.digest)
    assert store.get(old) == gateway.blocks[root]


def test_a_file_in_one_stream(gateway: HostileServer) -> None:
    (root,) = gateway.hold(LEAVES)
    store = open_gateways(gateway)
    assert dict(store.leaves(root)) == gateway.below(root)
    assert dict(store.leaves(CID_)) == {CID_: BLOCK}
    assert gateway.requests[0].query["dag-scope"] == "all"
    assert len(gateway.requests) == 2 and store.counters.fetched_blocks == 6
    old = CID(0, DAG_PB, root.digest)
    assert len(list(store.leaves(old))) == 5


def test_a_file_with_equal_leaves_comes_once(gateway: HostileServer) -> None:
    (root,) = gateway.hold([b"a", b"b", b"a"])
    assert len(list(open_gateways(gateway).leaves(root))) == 3


def test_reading_only(gateway: HostileServer) -> None:
    store = open_gateways(gateway)
    for call in (lambda: store.put(b""), lambda: store.pin(CID_), lambda: store.unpin(CID_)):
        with pytest.raises(StoreUnusable, match="store=kubo or store=cached"):
            call()
    assert store.pins() == {}
    store.publish()
    store.flush()
    store.fetch(CID_)
    assert gateway.requests == []


WRONG: dict[str, tuple[Answer, type[StoreError]]] = {
    "other bytes": (reply(b"x" + BLOCK[1:]), BlockCorrupt),
    "a web page": (reply("<html>not here, but 200"), BlockCorrupt),
    "packed": (bomb(1 << 26), BlockCorrupt),
    "length too short": (reply(BLOCK, Content_Length=9), BlockCorrupt),
    "cut at the end of the connection": (closing(BLOCK[:-1]), BlockCorrupt),
    "endless": (endless(), StoreBadAnswer),
    "length of an exabyte": (flood(head(Content_Length=1 << 60)), StoreBadAnswer),
    "negative chunk": (flood(head(Transfer_Encoding="chunked") + b"-5\r\n"), StoreBadAnswer),
    "chunk of an exabyte": (
        flood(head(Transfer_Encoding="chunked") + b"%x\r\n" % (1 << 60)),
        StoreBadAnswer,
    ),
    "cut short": (truncated(BLOCK), StoreUnreachable),
    "reset": (reset(head(Content_Length=len(BLOCK)) + BLOCK[:9]), StoreUnreachable),
    "no HTTP": (raw(b"garbage\r\n\r\n"), StoreUnreachable),
    "silence": (silence, StoreTimeout),
    "slow headers": (drip(b"HTTP/1.1 200 OK\r\n"), StoreTimeout),
    "slow": (drip(head(Content_Length=len(BLOCK))), StoreTimeout),
    "slow chunks": (drip_chunks(), StoreTimeout),
    "slow, closing": (drip(head(Connection="close")), StoreTimeout),
    "missing": (reply("", 404), BlockNotFound),
    "gone": (reply("", 410), BlockNotFound),
    "forbidden": (reply("", 403), StoreUnreachable),
    "too many requests": (reply("", 429), StoreUnreachable),
    "broken": (reply("ipfs resolve: block not found" * 9999, 500), StoreUnreachable),
    "endless error": (endless(status=500), StoreUnreachable),
    "late itself": (reply("", 504), StoreUnreachable),
    "in circles": (redirect("/ipfs/x"), StoreBadAnswer),
    "redirect without end": (endless(status=302, Location="http://127.0.0.1:9/"), StoreUnreachable),
}


@pytest.mark.parametrize("name", WRONG)
def test_each_fault_has_its_error_and_the_next_gateway_is_asked(
    gateway: HostileServer, other: HostileServer, name: str
) -> None:
    answer, kind = WRONG[name]
    gateway.plan("/ipfs/", answer)
    store = open_gateways(gateway)
    error = failure(store, CID_)
    assert isinstance(error, kind) and gateway.url in str(error), repr(error)
    assert store.counters.fetched_bytes == 0
    both = open_gateways(gateway, other)
    began = time.monotonic()
    assert both.get(CID_) == BLOCK
    assert time.monotonic() - began < TIMEOUT_S + 1
    asked = len(gateway.requests)
    assert both.get(CID_) == BLOCK  # the one that answered is asked first
    assert len(gateway.requests) == asked
    gateway.hang_up()


def test_all_fail(gateway: HostileServer, other: HostileServer) -> None:
    absent = CID.of(b"absent")
    error = failure(open_gateways(gateway, other), absent)
    assert type(error) is BlockNotFound and "none of 2 gateways" in str(error)
    assert not open_gateways(gateway, other).has(absent)
    gateway.plan("/ipfs/", reply(b"wrong"))
    error = failure(open_gateways(gateway, other), absent)
    assert type(error) is BlockCorrupt
    assert gateway.url in str(error) and other.url in str(error)


def test_a_gateway_that_is_not_there(other: HostileServer) -> None:
    with HostileServer() as gone:
        pass
    assert type(failure(open_gateways(gone), CID_)) is StoreUnreachable
    assert open_gateways(gone, other).get(CID_) == BLOCK


def test_redirects_are_followed_and_checked(gateway: HostileServer, other: HostileServer) -> None:
    gateway.plan("/ipfs/", redirect(f"{other.url}/ipfs/{CID_}?format=raw"))
    assert open_gateways(gateway).get(CID_) == BLOCK
    other.plan("/ipfs/", reply(b"wrong"))
    assert type(failure(open_gateways(gateway), CID_)) is BlockCorrupt
    other.plan("/ipfs/", drip(head(Content_Length=len(BLOCK))))
    assert type(failure(open_gateways(gateway), CID_)) is StoreTimeout


def car_of(server: HostileServer, root: CID, *more: tuple[CID, bytes]) -> bytes:
    return b"".join(car.write([root], [*server.below(root).items(), *more]))


def test_cars_that_go_wrong(gateway: HostileServer, other: HostileServer) -> None:
    (root,) = gateway.hold(LEAVES)
    blocks = list(gateway.below(root).items())
    foreign = (CID.of(b"foreign"), b"foreign")
    whole = car_of(gateway, root)
    at = whole.index(LEAVES[2])
    cases: list[tuple[Answer, type[Exception], str]] = [
        (reply(car_of(gateway, root, foreign)), StoreBadAnswer, "no part of it"),
        (reply(b"".join(car.write([root], [foreign]))), StoreBadAnswer, "no part of it"),
        (reply(b"".join(car.write([root], blocks[::-1]))), StoreBadAnswer, "no part of it"),
        (reply(car_of(gateway, root, blocks[1])), StoreBadAnswer, "a second time"),
        (reply(b"".join(car.write([root], blocks[:-1]))), StoreBadAnswer, "left out 1"),
        (reply(b"".join(car.write([root], []))), StoreBadAnswer, "left out 1"),
        (reply(whole[:-1]), StoreBadAnswer, "cut short"),
        (reply(whole[:at] + b"!" + whole[at + 1 :]), StoreBadAnswer, "does not hash"),
        (reply(b"plain bytes of the file"), StoreBadAnswer, "CAR"),
        (reply(b""), StoreBadAnswer, "CAR"),
        (truncated(whole[:at]), StoreUnreachable, "does not answer"),
        (drip(head(Content_Length=len(whole)) + whole[:at]), StoreTimeout, "within"),
        (drip_chunks(), StoreTimeout, "within"),
        (endless(whole), StoreBadAnswer, "CAR"),
        (endless(), StoreBadAnswer, "CAR"),
        (reply("", 404), BlockNotFound, "404"),
        (reply("", 500), StoreUnreachable, "500"),
    ]
    for answer, kind, word in cases:
        gateway.plan("/ipfs/", answer)
        began = time.monotonic()
        with pytest.raises(StoreError, match=word) as caught:
            list(open_gateways(gateway).leaves(root))
        assert type(caught.value) is kind and str(root) in str(caught.value), repr(caught.value)
        assert gateway.url in str(caught.value) and "\n" not in str(caught.value)
        assert time.monotonic() - began < TIMEOUT_S + 1
        gateway.hang_up()
    gateway.plan("/ipfs/", reply("", 404))
    assert len(list(open_gateways(gateway, other).leaves(root))) == 5


def test_a_block_that_is_not_what_its_codec_says(gateway: HostileServer) -> None:
    root = CID.of(b"\xff\xff", DAG_PB)
    gateway.blocks[root] = b"\xff\xff"
    gateway.plan("/ipfs/", reply(b"".join(car.write([root], [(root, b"\xff\xff")]))))
    with pytest.raises(UnixFSError):
        list(open_gateways(gateway).leaves(root))


def test_a_stream_takes_constant_memory_and_time_goes_by_blocks(gateway: HostileServer) -> None:
    leaves = [random.Random(seed).randbytes(1 << 20) for seed in range(48)]
    (root,) = gateway.hold(leaves)
    pieces = list(car.write([root], gateway.below(root).items()))

    def slowly(exchange: Any) -> None:
        exchange.write(head(Content_Length=sum(map(len, pieces))))
        for number, piece in enumerate(pieces):
            if number % 8 == 0:
                exchange.wait(TIMEOUT_S / 3)
            exchange.write(piece)

    gateway.plan("/ipfs/", slowly)
    tracemalloc.start()
    began = time.monotonic()
    count = sum(1 for _ in open_gateways(gateway).leaves(root))
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()
    assert count == 49 and time.monotonic() - began > 2 * TIMEOUT_S


def test_a_stream_that_is_left_closes_its_connection(gateway: HostileServer) -> None:
    (root,) = gateway.hold(LEAVES)
    gateway.plan("/ipfs/", flood(head(Content_Length=1 << 60), car_of(gateway, root)))
    stream = open_gateways(gateway).leaves(root)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 5
    while gateway._open:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_eight_threads(gateway: HostileServer, other: HostileServer) -> None:
    (root,) = gateway.hold(LEAVES)
    gateway.plan("/ipfs/", reply("", 503), HONEST)
    store = open_gateways(gateway, other)
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(b"".join(dag.cat(store, root))))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == [b"".join(LEAVES)] * 8 and sorted(store.urls) == sorted(
        (gateway.url, other.url)
    )


def test_a_fork_has_connections_of_its_own(gateway: HostileServer) -> None:
    store = open_gateways(gateway)
    store.get(CID_)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if all(store.get(CID.of(leaf)) == leaf for leaf in LEAVES) else 2
        finally:
            os._exit(code)
    for leaf in LEAVES:
        assert store.get(CID.of(leaf)) == leaf
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
