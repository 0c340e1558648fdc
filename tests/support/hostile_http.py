"""A loopback HTTP server that a test programs: an IPFS node's RPC and gateway, until told to lie.

    server.plan("/block/get", reset(), HONEST)   # the first call is cut off, the others answered

An answer is a function of an Exchange that writes what it likes to the socket; see the makers at
the end. The last one planned for a path is given to all further calls.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import select
import socket
import socketserver
import struct
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from fedipfs.ipld import CID, DAG_CBOR, DAG_PB, RAW, car, links, unixfs

STEP_S = 0.05  # between the bytes of a drip
DRIPS = b"." * 10**6


class Request(NamedTuple):
    """A request as it came; `call` is its path without the API's base, or "/ipfs/"."""

    call: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


class Exchange(NamedTuple):
    """A request and the socket that waits for its answer."""

    server: HostileServer
    request: Request
    sock: socket.socket

    def write(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.sock.sendall(piece)
            self.server.sent += len(piece)

    def wait(self, seconds: float) -> None:
        """Sleep, unless either side hangs up."""
        watch = select.poll()
        watch.register(self.sock, select.POLLRDHUP)
        if watch.poll(1000 * seconds):
            raise ConnectionAbortedError


Answer = Callable[[Exchange], None]


class HostileServer:
    """Serves on 127.0.0.1, or on the Unix socket `path`, until the end of the `with` block.

    `blocks` and `pins` are the node's repository; `network`, what it could fetch from its peers.
    `requests` are all that came, `sent` the bytes that went out.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.blocks: dict[CID, bytes] = {}
        self.network: dict[CID, bytes] = {}
        self.pins: set[CID] = set()
        self.requests: list[Request] = []
        self.sent = 0
        self.ended = threading.Event()
        self._plans: dict[str, list[Answer]] = {}
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        kind: Any = _TCP if path is None else _Unix
        self._server = kind(("127.0.0.1", 0) if path is None else str(path), _Connection)
        self._server.hostile = self
        self.address = f"/unix{path}"
        if path is None:
            port = self._server.server_address[1]
            self.address, self.url = f"/ip4/127.0.0.1/tcp/{port}", f"http://127.0.0.1:{port}"

    def __enter__(self) -> HostileServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()
        self.hang_up()

    def hang_up(self) -> None:
        """Close all connections, as a node that ends does."""
        for sock in list(self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def plan(self, call: str, *answers: Answer) -> None:
        """Answer the next calls of `call` ("/block/get", "/ipfs/") with these, in turn."""
        self._plans[call] = list(answers)

    def calls(self, call: str) -> list[Request]:
        """What was asked of `call`."""
        return [request for request in self.requests if request.call == call]

    def hold(self, *files: Iterable[bytes]) -> list[CID]:
        """Put files, each given as its leaves, into the repository; their roots."""
        return [unixfs.build(leaves, self._put) for leaves in files]

    def _put(self, block: Any, codec: int) -> CID:
        cid = CID.of(block, codec)
        self.blocks[cid] = bytes(block)
        return cid

    def answer_to(self, call: str) -> Answer:
        with self._lock:
            plan = self._plans.get(call, [HONEST])
            return plan.pop(0) if len(plan) > 1 else plan[0]

    # The honest node. Blocks are kept by their hash: another codec's CID finds them, too.

    def find(self, cid: CID, *, far: bool = True) -> bytes | None:
        for blocks in (self.blocks, self.network) if far else (self.blocks,):
            for codec in (cid.codec, RAW, DAG_PB, DAG_CBOR):
                if (block := blocks.get(CID(1, codec, cid.digest))) is not None:
                    return block
        return None

    def below(self, root: CID) -> dict[CID, bytes]:
        """A DAG's blocks, parents before their children. Raises KeyError for a missing one."""
        found: dict[CID, bytes] = {}
        waiting = [root.to_v1()]
        while waiting:
            cid = waiting.pop()
            if cid not in found:
                block = self.find(cid)
                if block is None:
                    raise KeyError(cid)
                found[cid] = block
                waiting.extend(reversed(links(cid, block)))
        return found

    def honest(self, exchange: Exchange) -> None:
        call, query = exchange.request.call, exchange.request.query
        try:
            respond = getattr(self, "_do" + call.rstrip("/").replace("/", "_"))
            body = respond(exchange.request, query.get("arg", ""))
        except KeyError as error:
            absent = f"block was not found locally (offline): ipld: could not find {error}"
            (reply(absent, 404) if call == "/ipfs/" else said(absent))(exchange)
        except ValueError as error:
            said(str(error))(exchange)
        else:
            reply(body if isinstance(body, bytes) else json.dumps(body).encode())(exchange)

    def _do_block_get(self, request: Request, arg: str) -> bytes:
        block = self.find(CID.parse(arg))
        if block is None:
            raise KeyError(arg)
        return block

    def _do_block_stat(self, request: Request, arg: str) -> object:
        block = self.find(CID.parse(arg), far=False)
        if block is None:
            raise KeyError(arg)
        return {"Key": arg, "Size": len(block)}

    def _do_cat(self, request: Request, arg: str) -> bytes:
        blocks = self.below(CID.parse(arg))
        return b"".join(unixfs.leaves(CID.parse(arg), blocks.__getitem__))

    def _do_dag_import(self, request: Request, arg: str) -> bytes:
        start = request.body.index(b"\r\n\r\n") + 4
        roots, blocks = car.read(io.BytesIO(request.body[start : request.body.rindex(b"\r\n--")]))
        count = 0
        for cid, block in blocks:
            self.blocks[cid.to_v1()] = block
            count += 1
        lines: list[object] = []
        if request.query["pin-roots"] == "true":
            lines = [self._pinned(root) for root in roots]
        lines.append({"Stats": {"BlockCount": count, "BlockBytesCount": 1}})
        return b"".join(json.dumps(line).encode() + b"\n" for line in lines)

    def _pinned(self, root: CID) -> object:
        """What Kubo says of a root that it imported: it reads the whole DAG before it pins it."""
        problem = ""
        try:
            self.below(root)
            self.pins.add(root)
        except KeyError as error:
            problem = f"block was not found locally (offline): ipld: could not find {error}"
        return {"Root": {"Cid": {"/": str(root)}, "PinErrorMsg": problem}}

    def _do_pin_add(self, request: Request, arg: str) -> object:
        cid = CID.parse(arg)
        self.blocks |= self.below(cid)
        self.pins.add(cid)
        return {"Pins": [arg]}

    def _do_pin_rm(self, request: Request, arg: str) -> object:
        if CID.parse(arg) not in self.pins:
            raise ValueError("not pinned or pinned indirectly")
        self.pins.remove(CID.parse(arg))
        return {"Pins": [arg]}

    def _do_pin_ls(self, request: Request, arg: str) -> object:
        kept = {str(cid): {"Type": "recursive", "Name": ""} for cid in self.pins}
        return {"Keys": kept} if kept else {}  # as Kubo does

    def _do_repo_stat(self, request: Request, arg: str) -> object:
        size = sum(map(len, self.blocks.values()))
        return {"RepoSize": size, "StorageMax": 10**10, "NumObjects": len(self.blocks)}

    def _do_repo_gc(self, request: Request, arg: str) -> bytes:
        kept = {cid.digest for pin in self.pins for cid in self.below(pin)}
        gone = [cid for cid in self.blocks if cid.digest not in kept]
        for cid in gone:
            del self.blocks[cid]
        return b"".join(json.dumps({"Key": {"/": str(cid)}}).encode() + b"\n" for cid in gone)

    def _do_version(self, request: Request, arg: str) -> object:
        return {"Version": "0.41.0"}

    def _do_swarm_connect(self, request: Request, arg: str) -> object:
        return {"Strings": [f"connect {arg} success"]}

    def _do_ipfs(self, request: Request, arg: str) -> bytes:
        cid = CID.parse(arg)
        if request.query["format"] == "raw":
            return self._do_block_get(request, arg)
        return b"".join(car.write([cid], self.below(cid).items()))


class _TCP(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64


class _Unix(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False


class _Connection(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        hostile: HostileServer = self.server.hostile  # type: ignore[attr-defined]
        hostile._open.add(self.request)
        if self.request.family == socket.AF_INET:
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        try:
            while (line := self.rfile.readline()) and self._exchange(hostile, line):
                pass
        except (OSError, ValueError):
            pass  # either side hung up
        finally:
            hostile._open.discard(self.request)

    def _exchange(self, hostile: HostileServer, line: bytes) -> bool:
        url = urlsplit(line.split()[1].decode())
        headers: dict[str, str] = {}
        while (header := self.rfile.readline().strip()) != b"":
            name, _, value = header.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        call = "/" + url.path.removeprefix("/api/v0").lstrip("/")
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if call.startswith("/ipfs/"):
            call, query = "/ipfs/", {**query, "arg": call.removeprefix("/ipfs/")}
        answer = hostile.answer_to(call)
        deaf = answer is deafness
        body = b"" if deaf else self.rfile.read(int(headers.get("content-length", 0)))
        request = Request(call, query, headers, body)
        with hostile._lock:
            hostile.requests.append(request)
        answer(Exchange(hostile, request, self.connection))
        return not getattr(answer, "last", False)


def _last(answer: Answer) -> Answer:
    """After this answer the connection is closed."""
    answer.last = True  # type: ignore[attr-defined]
    return answer


def HONEST(exchange: Exchange) -> None:
    """What a node would answer."""
    exchange.server.honest(exchange)


def head(status: int = 200, **headers: object) -> bytes:
    """A status line and headers; their names are given with underscores."""
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items()]
    return f"HTTP/1.1 {status} Whatever\r\n{''.join(lines)}\r\n".encode()


def reply(body: bytes | str, status: int = 200, **headers: object) -> Answer:
    """That body."""
    data = body.encode() if isinstance(body, str) else body
    headers = {"Content_Length": len(data), **headers}
    return lambda exchange: exchange.write(head(status, **headers), data)


def said(message: str, status: int = 500) -> Answer:
    """An IPFS daemon's error."""
    return reply(json.dumps({"Message": message, "Code": 0, "Type": "error"}), status)


def closing(body: bytes) -> Answer:
    """That body, whose end is the connection's."""
    return _last(lambda exchange: exchange.write(head(Connection="close"), body))


def raw(*pieces: bytes) -> Answer:
    """These bytes instead of an HTTP response, and the end."""
    return _last(lambda exchange: exchange.write(*pieces))


def truncated(body: bytes, missing: int = 1000) -> Answer:
    """A body that ends before its Content-Length."""
    return raw(head(Content_Length=len(body) + missing), body)


def endless(piece: bytes = bytes(1 << 16), status: int = 200, **headers: object) -> Answer:
    """Chunks without end."""

    def answer(exchange: Exchange) -> None:
        exchange.write(head(status, Transfer_Encoding="chunked", **headers))
        chunk = b"%x\r\n%s\r\n" % (len(piece), piece)
        while not exchange.server.ended.is_set():
            exchange.write(chunk)

    return _last(answer)


def flood(start: bytes, piece: bytes = bytes(1 << 16)) -> Answer:
    """Raw bytes, then more without end."""

    def answer(exchange: Exchange) -> None:
        exchange.write(start)
        while not exchange.server.ended.is_set():
            exchange.write(piece)

    return _last(answer)


def drip(start: bytes, rest: bytes = DRIPS, piece: int = 1) -> Answer:
    """`start` at once and the rest very slowly: no single wait is long."""

    def answer(exchange: Exchange) -> None:
        exchange.write(start)
        for place in range(0, len(rest), piece):
            exchange.wait(STEP_S)
            exchange.write(rest[place : place + piece])

    return _last(answer)


def drip_chunks(piece: bytes = b"x", **headers: object) -> Answer:
    """Chunks without end, very slowly."""
    chunk = b"%x\r\n%s\r\n" % (len(piece), piece)
    start = head(Transfer_Encoding="chunked", **headers)
    return drip(start, chunk * 100_000, len(chunk))


def silence(exchange: Exchange) -> None:
    """Nothing, until the client hangs up."""
    exchange.wait(60)


def deafness(exchange: Exchange) -> None:
    """Nothing, and the request's body is not read."""
    exchange.wait(60)


def bomb(size: int = 1 << 28) -> Answer:
    """A small body that unpacks to `size` zeros."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb") as file:
        for _ in range(size >> 20):
            file.write(bytes(1 << 20))
    return reply(packed.getvalue(), Content_Encoding="gzip")


def reset(after: bytes = b"") -> Answer:
    """A few bytes, then a connection reset."""

    def answer(exchange: Exchange) -> None:
        exchange.write(after)
        exchange.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        exchange.sock.close()

    return _last(answer)


def redirect(to: str, status: int = 302) -> Answer:
    """Elsewhere."""
    return reply("", status, Location=to)
