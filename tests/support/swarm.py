"""Swarms of test daemons: each party's own, and blocks that move between those connected.

js-ipfs daemons (daemons.py) are offline: their libp2p does not run with the releases that still
install. So a relay per party, before the RPC of that party's daemon, stands for bitswap. It
forwards all calls; a block that is asked for by its CID and that the daemon lacks it takes from a
daemon that it is connected to, puts it into its own, and then answers. As in a real swarm nothing
moves that nobody asks for, a daemon that is not connected gives and gets nothing, and who asks for
what nobody has waits until its time is over.

Bitswap itself, between real Kubo nodes, is in tests/integration/test_bitswap.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import urllib3
from daemons import JsIpfs

from fedipfs.ipld import CID, RAW, car, links
from fedipfs.store.rpc import Upload

API = "/api/v0"
CALL_S = 600.0  # the longest that a daemon may take
WAIT_S = 10.0  # for a block, where the caller does not say how long
_MARGIN_S, _POLL_S = 0.3, 0.1
_BATCH = 8 << 20  # bytes of blocks that are imported at once


class Moved(NamedTuple):
    """Blocks and bytes that went from one daemon to another."""

    blocks: int = 0
    bytes: int = 0


class Swarm:
    """Relays by their parties' names, and who is connected to whom."""

    def __init__(self) -> None:
        self.relays: dict[str, Relay] = {}
        self.moved: dict[tuple[str, str], Moved] = {}  # by who gave and who got
        self.links: dict[CID, list[CID]] = {}  # of blocks that were seen; they never change
        self._edges: set[frozenset[str]] = set()
        self._cut: set[str] = set()
        self._lock = threading.Lock()

    def add(self, name: str, daemon: JsIpfs) -> Relay:
        """Start a relay before a daemon that runs. It is connected to nobody."""
        self.relays[name] = Relay(self, name, daemon)
        return self.relays[name]

    def connect(self, one: str, other: str) -> None:
        """Connect two parties' daemons, as `ipfs swarm connect` does."""
        self._edges.add(frozenset((one, other)))

    def cut(self, name: str) -> None:
        """Cut a party off from all others."""
        self._cut.add(name)

    def mend(self, name: str) -> None:
        """Give it back the connections that it had."""
        self._cut.discard(name)

    def reaches(self, one: str, other: str) -> bool:
        """Whether neither of two is cut off."""
        return one not in self._cut and other not in self._cut

    def peers(self, name: str) -> Iterator[Relay]:
        """Those that a party is connected to now."""
        for other, relay in self.relays.items():
            if frozenset((name, other)) in self._edges and self.reaches(name, other):
                yield relay

    def count(self, giver: str, taker: str, size: int) -> None:
        """Note that a block has moved."""
        with self._lock:
            blocks, total = self.moved.get((giver, taker), Moved())
            self.moved[giver, taker] = Moved(blocks + 1, total + size)

    def stop(self) -> None:
        """Stop the relays; the daemons run on."""
        for relay in self.relays.values():
            relay.stop()


class Relay:
    """What a party takes for its own daemon's RPC, on a loopback port of its own."""

    def __init__(self, swarm: Swarm, name: str, daemon: JsIpfs) -> None:
        self._swarm, self.name, self._daemon = swarm, name, daemon
        self._pool = urllib3.HTTPConnectionPool("127.0.0.1", daemon.port, maxsize=16)
        self._held: set[bytes] = set()  # digests of what the daemon holds
        self.peer_id = str(json.loads(self.call("/id").data)["ID"])
        self.look()
        relay = self

        class Handler(_Handler):
            owner = relay

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        """The multiaddr at which its own party finds the RPC."""
        return f"/ip4/127.0.0.1/tcp/{self.port}"

    @property
    def swarm_address(self) -> str:
        """The multiaddr at which other parties' daemons find this one."""
        return f"{self.address}/p2p/{self.peer_id}"

    def stop(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()
        self._pool.close()

    def call(self, path: str, **request: Any) -> urllib3.BaseHTTPResponse:
        """Ask the daemon itself. Raises urllib3's HTTPError if it does not answer."""
        request = {"retries": False, "timeout": CALL_S, **request}
        return self._pool.request("POST", f"{API}{path}", **request)

    def look(self) -> None:
        """Find out which blocks the daemon holds."""
        lines = self.call("/refs/local").data.splitlines()
        refs = (json.loads(line).get("Ref") for line in lines if line.strip())
        self._held = {CID.parse(each).digest for each in refs if each}

    def holds(self, cid: CID) -> bool:
        """Whether the daemon itself holds a block."""
        return cid.digest in self._held

    def note(self, cids: list[CID]) -> None:
        """Remember that it holds them."""
        self._held.update(cid.digest for cid in cids)

    def block(self, cid: CID) -> bytes | None:
        """A block of the daemon's own."""
        answer = self.call(f"/block/get?arg={cid}&timeout=10s")
        if answer.status == 200 and cid.matches(answer.data):
            return answer.data
        self._held.discard(cid.digest)
        return None

    def bring(self, root: CID, *, deep: bool, end: float) -> CID | None:
        """Have the daemon hold a block, and with `deep` all below it, from whom it is connected to.

        The first that nobody had until the moment `end`, if any.
        """
        batch: list[tuple[CID, bytes]] = []
        try:
            for cid, block in self._missing(root, deep, end):
                if block is None:
                    return cid
                batch.append((cid, block))
                if sum(len(each) for _, each in batch) >= _BATCH:
                    self._put(batch)
                    batch = []
        finally:
            self._put(batch)
        return None

    def lacks(self, roots: list[CID], given: set[bytes]) -> CID | None:
        """The first block below `roots` that is neither here nor among `given` digests."""
        for root in roots:
            for cid in self._walk(root, given):
                if cid.digest not in given and not self.holds(cid):
                    return cid
        return None

    def dial(self, address: str) -> str | None:
        """Connect to the daemon at another relay's `swarm_address`; None, or what went wrong."""
        for other, relay in self._swarm.relays.items():
            if address == relay.swarm_address and self._swarm.reaches(self.name, other):
                self._swarm.connect(self.name, other)
                return None
        return f"failed to dial {address}: all dials failed"

    def _missing(self, root: CID, deep: bool, end: float) -> Iterator[tuple[CID, bytes | None]]:
        stack, seen = [root], set()
        while stack:
            cid = stack.pop()
            if cid in seen:
                continue
            seen.add(cid)
            if not self.holds(cid):
                block = self._ask(cid, end)
                yield cid, block
                if block is None:
                    return
                self.learn(cid, block)
            if deep:
                stack.extend(reversed(self._links(cid)))

    def _walk(self, root: CID, given: set[bytes]) -> Iterator[CID]:
        stack, seen = [root], set()
        while stack:
            cid = stack.pop()
            if cid in seen:
                continue
            seen.add(cid)
            yield cid
            stack.extend(reversed(self._links(cid)))

    def learn(self, cid: CID, block: bytes) -> None:
        """Remember what a block links to."""
        if cid.codec != RAW:
            self._swarm.links[cid] = links(cid, block)

    def _links(self, cid: CID) -> list[CID]:
        if cid.codec == RAW:
            return []
        if cid not in self._swarm.links and (block := self.block(cid)) is not None:
            self.learn(cid, block)
        return self._swarm.links.get(cid, [])

    def _ask(self, cid: CID, end: float) -> bytes | None:
        """A block from whoever has it; somebody may connect meanwhile, or get it."""
        while True:
            for peer in self._swarm.peers(self.name):
                if not peer.holds(cid):
                    continue
                with contextlib.suppress(urllib3.exceptions.HTTPError):  # that daemon is gone
                    block = peer.block(cid)
                    if block is not None and self._swarm.reaches(self.name, peer.name):
                        self._swarm.count(peer.name, self.name, len(block))
                        return block
            if time.monotonic() >= end:
                return None
            time.sleep(_POLL_S)

    def _put(self, blocks: list[tuple[CID, bytes]]) -> None:
        if not blocks:
            return
        upload = Upload(list(car.write([blocks[0][0]], blocks)))
        answer = self.call(
            "/dag/import?pin-roots=false", body=b"".join(upload), headers=upload.headers
        )
        if answer.status != 200:
            raise RuntimeError(f"{self.name}'s daemon took no blocks: {answer.data!r:.500}")
        self.note([cid for cid, _ in blocks])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    owner: Relay

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        options = {name: values[-1] for name, values in parse_qs(url.query).items()}
        try:
            self._answer(url.path.removeprefix(API), options, body)
        except urllib3.exceptions.HTTPError:
            self.close_connection = True  # as where no daemon listens
        except OSError:  # the caller has gone
            self.close_connection = True

    def _answer(self, call: str, options: dict[str, str], body: bytes) -> None:
        relay = self.owner
        end = time.monotonic() + _seconds(options.get("timeout")) - _MARGIN_S
        if call == "/swarm/connect":
            problem = relay.dial(options["arg"])
            self._say(problem or {"Strings": [f"connect {options['arg']} success"]})
            return
        if call == "/dag/import":
            self._import(options, body)
            return
        if call in ("/block/get", "/block/stat", "/cat", "/pin/add"):
            cid = CID.parse(options["arg"])
            if call == "/block/stat" and options.get("offline") == "true":
                if not relay.holds(cid):
                    self._say(_LACKING.format(cid))
                    return
            else:
                deep = call == "/cat" or (
                    call == "/pin/add" and options.get("recursive") != "false"
                )
                if lacking := relay.bring(cid, deep=deep, end=end):
                    self._say(f"{call}: {lacking}: context deadline exceeded")
                    return
        answer = self._forward(self.path, body)
        if call == "/repo/gc":
            relay.look()
        self._send(answer.status, answer.data, answer.headers.get("Content-Type"))

    def _import(self, options: dict[str, str], body: bytes) -> None:
        """Blocks from its own party; like Kubo, pin only what is wholly here."""
        relay = self.owner
        roots, read = car.read(io.BytesIO(_part(body, self.headers["Content-Type"])))
        cids = []
        for cid, block in read:
            relay.learn(cid, block)
            cids.append(cid)
        pinning = options.get("pin-roots") != "false"
        lacking = relay.lacks(roots, {cid.digest for cid in cids}) if pinning else None
        path = self.path.replace("pin-roots=true", "pin-roots=false") if lacking else self.path
        answer = self._forward(path, body)
        if answer.status == 200:
            relay.note(cids)
        if lacking and answer.status == 200:
            message = _LACKING.format(lacking)
            self._say(
                *({"Root": {"Cid": {"/": str(each)}, "PinErrorMsg": message}} for each in roots)
            )
            return
        self._send(answer.status, answer.data, answer.headers.get("Content-Type"))

    def _forward(self, path: str, body: bytes) -> urllib3.BaseHTTPResponse:
        kept = {name: self.headers[name] for name in ("Content-Type",) if name in self.headers}
        return self.owner.call(path.removeprefix(API), body=body, headers=kept)

    def _say(self, *answers: dict[str, Any] | str) -> None:
        """JSON as daemons give it; a text is what went wrong."""
        failed = isinstance(answers[0], str)
        told = [
            {"Message": each, "Code": 0, "Type": "error"} if failed else each for each in answers
        ]
        text = "".join(json.dumps(each) + "\n" for each in told)
        self._send(500 if failed else 200, text.encode(), "application/json")

    def _send(self, status: int, body: bytes, kind: str | None) -> None:
        self.send_response(status)
        if kind:
            self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


_LACKING = "block was not found locally (offline): ipld: could not find {}"


def _seconds(text: str | None) -> float:
    return float(text.removesuffix("s")) if text else WAIT_S


def _part(body: bytes, kind: str) -> bytes:
    """The one file in a multipart body."""
    boundary = kind.partition("boundary=")[2].strip('"').encode()
    begin = body.index(b"\r\n\r\n") + 4
    return body[begin : body.rindex(b"\r\n--" + boundary)]
