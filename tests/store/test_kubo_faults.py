"""A node, or what answers in its place, that is slow, broken, full or hostile."""

from __future__ import annotations

import logging
import random
import threading
import time
import traceback
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hostile_http import (
    DRIPS,
    HONEST,
    Answer,
    HostileServer,
    bomb,
    closing,
    deafness,
    drip,
    drip_chunks,
    endless,
    flood,
    head,
    raw,
    redirect,
    reply,
    reset,
    said,
    silence,
    truncated,
)

from fedipfs.errors import (
    BlockCorrupt,
    BlockNotFound,
    StoreBadAnswer,
    StoreError,
    StoreFull,
    StoreTimeout,
    StoreUnreachable,
    StoreUnusable,
    UnixFSError,
)
from fedipfs.ipld import CID, DAG_CBOR, DAG_PB, dagcbor, dagpb, unixfs
from fedipfs.store import CachedStore, FolderStore
from fedipfs.store.kubo import KuboStore

TIMEOUT_S = 0.5
BLOCK = random.Random(0).randbytes(100_000)
CID_ = CID.of(BLOCK)
CHUNKED = head(Transfer_Encoding="chunked")
NEWLINES = b"[" + b"\n" * 900_000  # a parser that tries again at each line needs minutes
NESTED = b"[" * 200_000
MANY = b'{"Keys": {' + b'"k":0,' * 100


@pytest.fixture
def node() -> Iterator[HostileServer]:
    with HostileServer() as server:
        server.blocks[CID_] = BLOCK
        yield server


def open_kubo(node: HostileServer, **options: Any) -> KuboStore:
    return KuboStore(node.address, **{"timeout_s": TIMEOUT_S, "retries": 0, **options})


@contextmanager
def bounded(most: int = 32 << 20) -> Iterator[None]:
    """At most `most` bytes more are held at any moment within."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def failure(call: Callable[[], object], kind: type[Exception], *words: str) -> str:
    """The one line that `call` fails with, in time and in little memory."""
    began = time.monotonic()
    with bounded(), pytest.raises(StoreError) as caught:
        call()
    assert time.monotonic() - began < TIMEOUT_S + 1
    text = str(caught.value)
    assert isinstance(caught.value, kind), repr(caught.value)
    assert "\n" not in text and len(text) < 700 and text.isprintable()
    for word in words:
        assert word in text
    return text


REMEDY = {
    StoreTimeout: "store.timeout_s",
    StoreUnreachable: "ipfs daemon",
    BlockCorrupt: "ipfs repo verify",
    BlockNotFound: "import it",
    StoreUnusable: "store.credentials",
    StoreFull: "free space",
    StoreBadAnswer: "IPFS daemon",
}

SLOW: dict[str, Answer] = {
    "nothing": silence,
    "deaf": deafness,
    "status line": drip(b"", b"HTTP/1.1 200 " + DRIPS),
    "headers": drip(b"HTTP/1.1 200 OK\r\n", b"X-A: " + DRIPS),
    "many headers": drip(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 1000, 6),
    "informational": flood(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    "body": drip(head(Content_Length=len(BLOCK))),
    "body until the end": drip(head(Connection="close")),
    "HTTP 1.0": drip(b"HTTP/1.0 200 OK\r\n\r\n"),
    "chunks": drip_chunks(),
    "chunks, closing": drip_chunks(Connection="close"),
    "chunk length": drip(CHUNKED, b"0" * 10**6),
    "trailers": drip(CHUNKED + b"0\r\n", b"X: y\r\n" * 10**5, 6),
    "error": drip(head(500, Content_Length=1000)),
    "redirect": drip(head(302, Location="http://127.0.0.1:9/", Content_Length=1000)),
}


@pytest.mark.parametrize("answer", SLOW.values(), ids=SLOW)
def test_however_slow_the_time_is_kept(node: HostileServer, answer: Answer) -> None:
    node.plan("/block/get", answer)
    store = open_kubo(node)
    failure(lambda: store.get(CID_), StoreTimeout, str(CID_), REMEDY[StoreTimeout])
    node.hang_up()
    node.plan("/block/get", HONEST)
    assert store.get(CID_) == BLOCK


WRONG: dict[str, tuple[Answer, type[StoreError]]] = {
    "other bytes": (reply(b"x" + BLOCK[1:]), BlockCorrupt),
    "no bytes": (reply(b""), BlockCorrupt),
    "a byte more": (reply(BLOCK + b"x"), BlockCorrupt),
    "length too short": (reply(BLOCK, Content_Length=99_999), BlockCorrupt),
    "cut at the end of the connection": (closing(BLOCK[:-1]), BlockCorrupt),
    "packed": (bomb(), BlockCorrupt),
    "much larger": (reply(bytes(4 << 20)), StoreBadAnswer),
    "endless": (endless(), StoreBadAnswer),
    "endless, in small chunks": (endless(b"x"), StoreTimeout),
    "length of an exabyte": (flood(head(Content_Length=1 << 60)), StoreBadAnswer),
    "chunk of an exabyte": (flood(CHUNKED + b"%x\r\n" % (1 << 60)), StoreBadAnswer),
    "negative chunk": (flood(CHUNKED + b"-5\r\n"), StoreError),
    "chunk length without end": (flood(CHUNKED, b"1" * 65536), StoreUnreachable),
    "chunk length that is none": (raw(CHUNKED, b"zz\r\n"), StoreUnreachable),
    "trailer without end": (flood(CHUNKED + b"0\r\n", b"x" * 65536), StoreUnreachable),
    "status line without end": (flood(b"HTTP/1.1 200 ", b"x" * 65536), StoreUnreachable),
    "header without end": (flood(b"HTTP/1.1 200 OK\r\nX: ", b"x" * 65536), StoreUnreachable),
    "headers without end": (flood(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 9999), StoreUnreachable),
    "cut short": (truncated(BLOCK), StoreUnreachable),
    "cut short in a chunk": (raw(CHUNKED, b"ff\r\n", BLOCK[:9]), StoreUnreachable),
    "no HTTP": (raw(b"SSH-2.0-OpenSSH_9.6\r\n"), StoreUnreachable),
    "nothing and the end": (raw(b""), StoreUnreachable),
    "reset before": (reset(), StoreUnreachable),
    "reset within": (reset(head(Content_Length=len(BLOCK)) + BLOCK[:1000]), StoreUnreachable),
    "another place": (redirect("http://127.0.0.1:9/"), StoreBadAnswer),
    "the same place": (redirect("/api/v0/block/get", 307), StoreBadAnswer),
    "redirect without end": (endless(status=302, Location="http://127.0.0.1:9/"), StoreBadAnswer),
    "not allowed": (reply("", 401), StoreUnusable),
    "forbidden": (reply("403 - Forbidden", 403), StoreUnusable),
    "a gateway's 404": (reply("404 page not found", 404), StoreBadAnswer),
    "not POST": (reply("", 405), StoreBadAnswer),
    "plain 500": (reply("oops", 500), StoreBadAnswer),
    "garbled 500": (reply(b"\xff\xfe{", 500), StoreBadAnswer),
    "deep 500": (reply(NESTED, 500), StoreBadAnswer),
    "500 of many lines": (reply(NEWLINES, 500), StoreBadAnswer),
    "endless 500": (endless(status=500), StoreBadAnswer),
    "500 of another shape": (reply('{"Message": {"a": [1]}}', 500), StoreError),
    "busy": (reply("", 429), StoreUnreachable),
    "bad gateway": (reply("<html>" * 9999, 502), StoreUnreachable),
    "restarting": (reply("", 503), StoreUnreachable),
    "late gateway": (reply("", 504), StoreUnreachable),
    "missing": (said("block was not found locally (offline): ipld: could not find"), BlockNotFound),
    "gone": (said("Failed to get block: request timed out"), StoreTimeout),
    "gone from Kubo": (said("context deadline exceeded"), StoreTimeout),
    "disk full": (said("write /blocks/x: no space left on device"), StoreFull),
    "a novel": (said("something\nquite \x1b[31mnew " * 100), StoreError),
    "a library": (said("something\nquite \x1b[31mnew " * 1000), StoreBadAnswer),
}
NO_REMEDY = ("a novel", "500 of", "negative chunk", "busy", "bad gateway", "restarting", "late ")


@pytest.mark.parametrize("name", WRONG)
def test_nothing_wrong_is_used_and_each_has_its_error(
    node: HostileServer, tmp_path: Path, name: str
) -> None:
    answer, kind = WRONG[name]
    node.plan("/block/get", answer)
    store = CachedStore(FolderStore(tmp_path / "front", durable=False), open_kubo(node))
    text = failure(lambda: store.get(CID_), kind, str(CID_))
    if not name.startswith(NO_REMEDY):
        assert REMEDY[kind] in text
    assert list(store.front) == [] and store.counters.fetched_bytes == 0
    node.hang_up()
    node.plan("/block/get", HONEST)
    assert store.get(CID_) == BLOCK and list(store.front) == [CID_]


@pytest.mark.parametrize(
    "answer", [reply("", 503), reset(), truncated(BLOCK[:10]), raw(b"")], ids=str
)
def test_a_lost_connection_is_tried_again_with_growing_pauses(
    node: HostileServer, answer: Answer
) -> None:
    node.plan("/block/get", answer, answer, HONEST)
    began = time.monotonic()
    assert open_kubo(node, timeout_s=5, retries=2).get(CID_) == BLOCK
    assert 0.16 + 0.32 <= time.monotonic() - began < 2
    assert len(node.calls("/block/get")) == 3


def test_tries_end(node: HostileServer) -> None:
    node.plan("/block/get", reply("", 503))
    with pytest.raises(StoreUnreachable, match=str(CID_)):
        open_kubo(node, timeout_s=5, retries=2).get(CID_)
    assert len(node.calls("/block/get")) == 3
    with pytest.raises(StoreUnreachable):
        open_kubo(node, timeout_s=5, retries=0).get(CID_)
    assert len(node.calls("/block/get")) == 4
    began = time.monotonic()
    with pytest.raises(StoreUnreachable):
        open_kubo(node, timeout_s=0.5, retries=100).get(CID_)
    assert time.monotonic() - began < 1.5


@pytest.mark.parametrize("answer", [reply("", 401), said("novel"), reply(b"x")], ids=str)
def test_what_will_not_change_is_not_tried_again(node: HostileServer, answer: Answer) -> None:
    node.plan("/block/get", answer)
    with pytest.raises(StoreError):
        open_kubo(node).get(CID_)
    assert len(node.calls("/block/get")) == 1


def test_nobody_listens() -> None:
    with HostileServer() as server:
        store = open_kubo(server)
    failure(lambda: store.get(CID_), StoreUnreachable, str(CID_), "refused", "store.address")


def quoted(pattern: str, *cids: CID) -> Answer:
    """JSON with CIDs in the place of its $s."""
    for cid in cids:
        pattern = pattern.replace("$", str(cid), 1)
    return reply(pattern)


OTHER_ROOT = '{"Root": {"Cid": {"/": "$"}}}'
JUNK = {
    "no JSON": b"<html>",
    "nothing": b"",
    "cut short": b'{"Keys": {',
    "not UTF-8": b'{"Keys": "\xff"}',
    "two answers": b"{}{}",
    "deep": NESTED,
    "deep objects": b'{"Keys":' * 100_000,
    "many lines": NEWLINES,
    "a huge number": b'{"RepoSize": ' + b"9" * 100_000 + b"}",
    "list": b"[]",
    "null": b"null",
    "text": b'"Keys"',
    "number": b"7",
    "other keys": b'{"a": 1}',
    "wrong types": b'{"Keys": [1], "RepoSize": {}, "StorageMax": [], "Pins": 5, "Size": null}',
    "texts": b'{"Keys": "k", "RepoSize": "many", "StorageMax": "1", "Pins": "a", "Size": "x"}',
    "no CIDs": b'{"Keys": {"k": {}}, "RepoSize": NaN, "StorageMax": 1, "Pins": ["k"], "Size": 0.5}',
    "an error late": b'{"Message": "late", "Type": "error"}',
}


@pytest.mark.parametrize("body", JUNK.values(), ids=JUNK)
def test_garbage_instead_of_json(node: HostileServer, body: bytes) -> None:
    store = open_kubo(node)
    for call in ("/pin/ls", "/dag/import", "/repo/stat", "/block/stat"):
        node.plan(call, reply(body))
    failure(store.pins, StoreBadAnswer, "list of pins")
    failure(store.stat, StoreBadAnswer, "repository")
    failure(lambda: store.size(CID_), StoreBadAnswer, str(CID_))
    failure(lambda: store.pin(CID_, "name"), StoreBadAnswer, str(CID_))


@pytest.mark.parametrize(
    "answer", [endless(), endless(b"[],"), endless(b'"a",\n'), endless(b" " * 999)], ids=str
)
def test_lists_of_pins_without_end(node: HostileServer, answer: Answer) -> None:
    node.plan("/pin/ls", answer)
    node.plan("/repo/stat", answer)
    store = open_kubo(node)
    failure(store.pins, StoreError, "list of pins")
    failure(store.stat, StoreError, "repository")


def upload(node: HostileServer) -> tuple[KuboStore, CID]:
    store = open_kubo(node)
    return store, store.put(b"new")


@pytest.mark.parametrize(
    ("answer", "kind", "word"),
    [
        (deafness, StoreTimeout, "within"),
        (reset(), StoreUnreachable, "does not answer"),
        (said("ENOSPC: no space left on device, write"), StoreFull, "no space left"),
        (said("block quota exceeded"), StoreFull, "quota"),
        (said("Failed to import DAG: Unexpected end of data"), StoreError, "Unexpected end"),
        (reply("", 413), StoreBadAnswer, "413"),
        (reply('{"Stats": {"BlockCount": 9}}'), StoreBadAnswer, "9 of them"),
        (reply('{"Stats": {"BlockCount": "2"}}'), StoreBadAnswer, "unknown answer"),
        (reply('{"Root": {"Cid": {"/": "junk"}}}'), StoreBadAnswer, "junk"),
        (reply('{"Root": {"Cid": 5}}'), StoreBadAnswer, "unknown answer"),
        (reply("[1]"), StoreBadAnswer, "unknown answer"),
        (reply(""), StoreBadAnswer, "does not say"),
        (quoted(OTHER_ROOT, CID.of(b"other")), StoreBadAnswer, "answers with the CID baf"),
        (quoted(OTHER_ROOT * 2, CID_, CID_), StoreBadAnswer, "answers with the CID baf"),
        (endless(), StoreBadAnswer, "larger"),
    ],
)
def test_an_upload_that_goes_wrong_is_named_and_goes_again(
    node: HostileServer, answer: Answer, kind: type[StoreError], word: str
) -> None:
    node.plan("/dag/import", answer)
    store, cid = upload(node)
    failure(store.publish, kind, str(cid), word)
    assert store.counters.sent_bytes == 0
    assert store.get(cid) == b"new" and store.has(cid) and store.size(cid) == 3
    node.hang_up()
    node.plan("/dag/import", HONEST)
    store.publish()
    assert node.blocks[cid] == b"new" and node.pins


def pin_error(message: str) -> Answer:
    """An upload whose root the node cannot keep."""

    def answer(exchange: Any) -> None:
        exchange.request.query["pin-roots"] = "true"
        body = exchange.server._do_dag_import(exchange.request, "")
        reply(body.replace(b'"PinErrorMsg": ""', b'"PinErrorMsg": "%s"' % message.encode()))(
            exchange
        )

    return answer


def test_what_the_node_cannot_keep_is_an_error(node: HostileServer) -> None:
    node.plan("/dag/import", pin_error("blockstore: block not found"))
    store, cid = upload(node)
    failure(store.publish, BlockNotFound, str(cid), "blockstore: block not found")
    node.plan("/dag/import", pin_error("a\\nb" * 5000))
    failure(store.publish, StoreError, str(cid), "a b")
    node.plan("/dag/import", pin_error("no space left on device"))
    failure(store.publish, StoreFull, str(cid))


def test_without_pins_an_upload_of_which_nothing_is_said_is_looked_for(node: HostileServer) -> None:
    store = open_kubo(node, pin=False)
    cid = store.put(b"new")
    node.plan("/dag/import", reply(""))
    failure(store.publish, StoreBadAnswer, str(cid))
    node.blocks[cid] = b"new"  # as js-ipfs, which says nothing and has it
    store.publish()
    assert store.counters.sent_bytes == 3


def test_after_an_outage_one_publish_sends_all_that_waited(node: HostileServer) -> None:
    node.plan("/dag/import", reply("", 503))
    store = open_kubo(node, retries=0)
    blocks = [random.Random(seed).randbytes(1 << 20) for seed in range(17)]  # two are under way
    cids = [store.put(block) for block in blocks]
    failure(store.publish, StoreUnreachable)
    node.plan("/dag/import", HONEST)
    store.publish()
    assert all(node.blocks[cid] == block for cid, block in zip(cids, blocks, strict=True))
    assert store.counters.sent_blocks == 17 + 3  # with the leases


def test_what_waits_in_an_outage_has_a_limit(node: HostileServer) -> None:
    def full(exchange: Any) -> None:
        node.requests.clear()
        reply("", 503)(exchange)

    node.plan("/dag/import", full)
    store = open_kubo(node, retries=0)
    failed = 0
    with bounded(96 << 20):  # three batches, two of them as requests here and in the server
        for seed in range(120):
            try:
                store.put(random.Random(seed).randbytes(1 << 20))
            except StoreUnreachable:
                failed += 1
    assert failed > 90


def test_a_pin_of_something_else_is_noticed(node: HostileServer) -> None:
    absent = CID.of(b"absent")  # so it is asked again, by a call that looks for it
    node.plan("/pin/add", quoted('{"Pins": ["$"]}', CID_))
    failure(lambda: open_kubo(node).pin(absent, "x"), StoreBadAnswer, str(absent), "another CID")


def test_pins_that_vanish_while_they_are_listed(node: HostileServer) -> None:
    store = open_kubo(node)
    store.pin(CID_, "a")
    gone = CID.of(dagcbor.encode("gone"), DAG_CBOR)
    node.plan("/pin/ls", quoted('{"Keys": {"$": {}, "$": {}}}', gone, *node.pins))
    assert store.pins() == {CID_: ("a",)}


def test_foreign_pins_may_be_anything(node: HostileServer) -> None:
    records = [b"\xff", dagcbor.encode([1]), dagcbor.encode({"type": "fedipfs/pin/v1", "name": 5})]
    odd = [CID.of(record, DAG_CBOR) for record in records]
    node.blocks |= dict(zip(odd, records, strict=True))
    node.pins |= {*odd, CID_}
    assert open_kubo(node).pins() == dict.fromkeys([*odd, CID_], ("",))


def test_errors_of_a_collection_make_it_incomplete(node: HostileServer) -> None:
    node.plan("/repo/gc", quoted('{"Key":{"/":"$"}}\n{"Error":"busy","Key":null}', CID_))
    assert open_kubo(node).gc(0).complete is False


# Streams.

LEAVES = [random.Random(seed).randbytes(700_000) for seed in range(4)]


def test_a_stream_is_the_file(node: HostileServer) -> None:
    (root,) = node.hold(LEAVES)
    store = open_kubo(node)
    got = dict(store.leaves(root))
    assert got == node.below(root)
    assert store.counters.fetched_blocks == 5
    assert len(node.calls("/cat")) == 1 and len(node.calls("/block/get")) == 1


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (reply(b"".join(LEAVES)[:-1]), StoreBadAnswer),
        (reply(b"".join(LEAVES) + b"x"), StoreBadAnswer),
        (reply(b"".join(LEAVES[::-1])), BlockCorrupt),
        (truncated(LEAVES[0] * 2), StoreUnreachable),
        (reset(head(Content_Length=2_800_000) + LEAVES[0]), StoreUnreachable),
        (endless(), BlockCorrupt),
        (endless(LEAVES[0][:65536]), BlockCorrupt),
        (drip(head(Content_Length=2_800_000) + LEAVES[0]), StoreTimeout),
        (drip_chunks(), StoreTimeout),
        (reply("", 404), StoreBadAnswer),
        (said("no link named x"), StoreError),
    ],
)
def test_a_stream_that_goes_wrong(
    node: HostileServer, tmp_path: Path, answer: Answer, kind: type[StoreError]
) -> None:
    (root,) = node.hold(LEAVES)
    store = open_kubo(node)
    node.plan("/cat", answer)
    failure(lambda: list(store.leaves(root)), kind, str(root) if kind is not BlockCorrupt else "")
    cached = CachedStore(FolderStore(tmp_path / "front", durable=False), open_kubo(node))
    cached.fetch(root)  # block by block what did not come in the stream
    assert set(cached.front) == set(node.below(root)) and cached.front.verify().damaged == []


def test_a_stream_may_take_longer_than_the_timeout_as_long_as_it_goes_on(
    node: HostileServer,
) -> None:
    leaves = [random.Random(seed).randbytes(1 << 20) for seed in range(8)]
    (root,) = node.hold(leaves)
    data = b"".join(leaves)

    def slowly(exchange: Any) -> None:
        exchange.write(head(Content_Length=len(data)))
        for start in range(0, len(data), 1 << 20):
            exchange.write(data[start : start + (1 << 20)])
            exchange.wait(TIMEOUT_S / 3)

    node.plan("/cat", slowly)
    began = time.monotonic()
    assert len(dict(open_kubo(node).leaves(root))) == 9
    assert time.monotonic() - began > 2 * TIMEOUT_S


def test_a_file_that_lies_about_its_leaves_takes_no_memory(node: HostileServer) -> None:
    size = 1 << 40
    node_data = bytes((0x08, 2, 0x18)) + _varint(size) + bytes((0x20,)) + _varint(size)
    block = dagpb.encode(dagpb.Node([dagpb.Link(CID.of(b"leaf"), "", size)], node_data))
    root = CID.of(block, DAG_PB)
    node.blocks[root] = block
    node.plan("/cat", endless())
    with bounded(), pytest.raises(UnixFSError, match=str(root)):
        list(open_kubo(node).leaves(root))


def _varint(number: int) -> bytes:
    out = b""
    while number >= 0x80:
        out += bytes((number & 0x7F | 0x80,))
        number >>= 7
    return out + bytes((number,))


def test_uploads_and_streams_take_constant_memory(node: HostileServer, tmp_path: Path) -> None:
    pieces = [random.Random(seed).randbytes(1 << 20) for seed in range(64)]
    (root,) = node.hold(pieces)  # 64 MiB, and the reply is made of them: not counted below
    node.plan("/cat", lambda exchange: exchange.write(head(Content_Length=64 << 20), *pieces))
    cached = CachedStore(FolderStore(tmp_path / "front", durable=False), open_kubo(node))
    with bounded():
        cached.fetch(root)
    assert cached.counters.fetched_bytes > 64 << 20
    store = open_kubo(node, timeout_s=20)
    node.plan("/dag/import", lambda exchange: _swallow(node, exchange))
    with bounded(100 << 20):  # the server's copies of two requests included
        for piece in pieces:
            store.put(piece)
        store.publish()
    assert store.counters.sent_bytes >= 64 << 20


def _swallow(node: HostileServer, exchange: Any) -> None:
    with _one_at_a_time:
        HONEST(exchange)
        node.blocks.clear()
        node.requests.clear()


_one_at_a_time = threading.Lock()


# Secrets, sessions.

TOKEN = "Zq7-very-secret-token"


@pytest.mark.parametrize("kind", ["bearer", "basic"])
def test_credentials_are_sent_and_never_told(
    node: HostileServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    caplog.set_level(logging.DEBUG)
    file = tmp_path / "secret"
    file.write_text(f"bearer:{TOKEN}\n" if kind == "bearer" else f"basic:user:{TOKEN}\n")
    file.chmod(0o600)
    store = open_kubo(node, credentials=str(file))
    assert store.get(CID_) == BLOCK
    header = node.requests[-1].headers["authorization"]
    assert header == f"Bearer {TOKEN}" or header.startswith("Basic dXNlcjpacTct")
    told = [repr(store), repr(store.rpc), repr(store.address)]
    answers = [answer for answer, _ in WRONG.values()]
    for answer in [*answers, said(f"I know {header}"), reply(f'"{header}', 500), redirect("/x")]:
        node.plan("/block/get", answer)
        with pytest.raises(StoreError) as caught:
            open_kubo(node, credentials=str(file), retries=0).get(CID_)
        told.append("".join(traceback.format_exception(caught.value)))
        node.hang_up()
    secrets = (TOKEN, header.partition(" ")[2])
    for text in (*told, caplog.text):
        assert not any(secret in text for secret in secrets)


def test_credentials_do_not_follow_a_redirect(node: HostileServer, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(f"bearer:{TOKEN}")
    file.chmod(0o600)
    with HostileServer() as elsewhere:
        for status in (301, 302, 303, 307, 308):
            node.plan("/block/get", redirect(f"{elsewhere.url}/api/v0/block/get", status))
            with pytest.raises(StoreBadAnswer):
                open_kubo(node, credentials=str(file)).get(CID_)
        assert elsewhere.requests == []


def test_cookies_are_not_kept(node: HostileServer) -> None:
    store = open_kubo(node)
    node.plan("/block/get", reply(BLOCK, Set_Cookie="a=" + "b" * 4000))
    store.get(CID_)
    store.get(CID_)
    assert all("cookie" not in request.headers for request in node.requests)


def test_the_environments_proxies_do_not_see_the_rpc(
    node: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert open_kubo(node).get(CID_) == BLOCK


def test_one_slow_call_does_not_hold_up_others(node: HostileServer) -> None:
    store = open_kubo(node, timeout_s=2.0)
    node.plan("/block/get", drip_chunks(), HONEST)
    problems: list[Exception] = []

    def wait() -> None:
        try:
            store.get(CID_)
        except StoreError as problem:
            problems.append(problem)

    slow = threading.Thread(target=wait)
    slow.start()
    while not node.calls("/block/get"):
        time.sleep(0.01)
    for _ in range(20):
        assert store.get(CID_) == BLOCK
    assert slow.is_alive() and problems == []
    slow.join(5)
    assert [type(problem) for problem in problems] == [StoreTimeout]


def test_hung_calls_leave_nothing_behind(node: HostileServer) -> None:
    store = open_kubo(node, timeout_s=0.1, retries=0)
    node.plan("/block/get", silence)
    with pytest.raises(StoreTimeout):
        store.get(CID_)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        with pytest.raises(StoreTimeout):
            store.get(CID_)
    node.hang_up()
    deadline = time.monotonic() + 5
    while len(list(Path("/proc/self/fd").iterdir())) > before + 4:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_peers_address_is_given_to_the_node_once(node: HostileServer) -> None:
    peer = "/ip4/10.0.0.1/tcp/4001/p2p/QmYT46md5J68yTn8ULYW3QxXoacuW1tP5g3N7xiGWqRARt"
    store = open_kubo(node, peers=[peer])
    assert node.requests == []
    store.get(CID_)
    store.get(CID_)
    assert [request.query["arg"] for request in node.calls("/swarm/connect")] == [peer]
    node.plan("/block/get", said("ipld: could not find"), HONEST)
    assert store.get(CID_) == BLOCK  # connected anew, and asked again
    assert len(node.calls("/swarm/connect")) == 2
    node.plan("/block/get", reply(b"wrong"))
    failure(lambda: store.get(CID_), BlockCorrupt)
    assert len(node.calls("/swarm/connect")) == 2


def test_peers_that_do_not_answer_cost_a_warning(
    node: HostileServer, caplog: pytest.LogCaptureFixture
) -> None:
    node.plan("/swarm/connect", said("failed to dial: all dials failed"))
    assert open_kubo(node, peers=["/ip4/10.0.0.1/tcp/1", "/ip4/10.0.0.2/tcp/1"]).get(CID_) == BLOCK
    assert caplog.text.count("all dials failed") == 2


def test_has_tells_absence_from_a_node_that_hangs(node: HostileServer) -> None:
    store = open_kubo(node)
    assert store.has(CID_) and not store.has(CID.of(b"absent"))
    node.plan("/block/stat", said("Failed to get block stats: request timed out"))
    assert not store.has(CID_)  # js-ipfs
    failure(lambda: store.size(CID_), BlockNotFound, str(CID_))
    node.plan("/block/stat", silence)
    failure(lambda: store.has(CID_), StoreTimeout, str(CID_))
    node.plan("/block/stat", reply("", 503))
    failure(lambda: store.has(CID_), StoreUnreachable, str(CID_))


def test_the_hash_decides_whatever_cid_the_node_claims(node: HostileServer) -> None:
    # block/stat says the CID in other bases or versions, which means nothing for what we asked.
    node.plan("/block/stat", quoted('{"Key": "$", "Size": "5"}', CID.of(b"other")))
    assert open_kubo(node).size(CID_) == 5
    assert unixfs.cid_of(BLOCK) == CID_
