"""The checks of a Kubo node and of gateways; see doctor.py."""

from __future__ import annotations

import contextlib
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, cast

from fedipfs.errors import StoreBadAnswer, StoreError, StoreTimeout, StoreUnreachable, one_line
from fedipfs.ipld import CID
from fedipfs.observe.summary import duration
from fedipfs.store import held
from fedipfs.store.doctor import PIN, TRIAL, Check, Finding, Level, free_space, read_back
from fedipfs.store.gateway import GatewayStore
from fedipfs.store.guard import FAILURES, Guard, innermost, new_session, protect
from fedipfs.store.kubo import KuboStore
from fedipfs.store.spec import open_store

OLDEST, NEWEST = (0, 30), (0, 41)  # releases of Kubo whose RPC was read or tried
CLOCK_S, CLOCKS_APART_S = 60.0, 600.0  # differences to warn of, and that are a problem
TIMEOUT_S = 5.0  # of one call
PATIENCE_S = 10.0  # of one that makes the node count
_LEASE_S = 60  # how long the node keeps what was uploaded, if the doctor is stopped midway
_PUBLIC = ("bootstrap.libp2p.io", "/104.131.131.82/")  # of the public network's first nodes
_PROBE = "bafkqaaa"  # the identity CID of nothing, by which trustless gateways are recognized
_RAW = "application/vnd.ipld.raw"


class Node:
    """The checks of the node that the options of a KuboStore name."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options
        self._version: Any = None

    def checks(self) -> Iterator[Check]:
        """Does it answer? The others only then."""
        yield Check("node", "reached", self.reached)
        if self._version is None:
            return
        yield Check("node", "version", self.version)
        if "/tcp/" in self.store.address.multiaddr:
            yield Check("node", "clock", self.clock)
        yield Check("node", "blocks", self.blocks)
        yield Check("node", "pins", self.pins)
        yield Check("node", "space", self.space)
        yield Check("node", "peers", self.swarm)
        for peer in self.options.get("peers") or ():
            yield Check("node", "peers", lambda peer=peer: self.peer(peer))  # type: ignore[misc]

    def reached(self) -> Iterator[Finding]:
        """Its address is permitted, and it answers there with these credentials."""
        own = cast(KuboStore, open_store(self.options))  # raises what a run would
        patience = min(own.rpc.timeout_s, TIMEOUT_S)
        impatient = {"timeout_s": patience, "retries": 0, "peers": (), "lease_s": _LEASE_S}
        self.store = cast(KuboStore, open_store({**self.options, **impatient}))
        began = time.monotonic()
        self._version = self.store.rpc.ask("version", "/version")
        text = f"{self.store.address.text} answers in {duration(time.monotonic() - began)}"
        yield Finding("node", "reached", "ok", text)

    def version(self) -> Iterator[Finding]:
        """A Kubo of a release that we know."""
        told = self._version if isinstance(self._version, dict) else {}
        number = told.get("Version")
        match = re.match(r"(\d{1,4})\.(\d{1,4})", number) if isinstance(number, str) else None
        if match is None:
            raise StoreBadAnswer("it tells no version; set store.address to the RPC of a Kubo")
        release = int(match[1]), int(match[2])
        known = f"Kubo {_dotted(OLDEST)} to {_dotted(NEWEST)}"
        name, remedy = f"Kubo {number:.40}", ""
        if "ipfs-core" in told:
            name, remedy = f"js-ipfs {number:.40}", f"use {known}: js-ipfs is not maintained"
        elif "Golang" not in told:
            name, remedy = f"version {number:.40} of an unknown program", f"use {known}"
        elif release < OLDEST:
            remedy = f"older than what is known to work: update it to {known}"
        elif release > NEWEST:
            remedy = f"newer than what is known to work ({known}): try a short run first"
        yield Finding("node", "version", "warning" if remedy else "ok", repr(name)[1:-1], remedy)

    def clock(self) -> Iterator[Finding]:
        """Its clock and ours; and, as no credentials are shown for that, who may use it."""
        address = self.store.address
        port = re.findall(r"/tcp/(\d+)", address.multiaddr)[0]
        host = f"[{address.host}]" if ":" in address.host else address.host
        scheme = "https" if address.secure else "http"
        answer = _ask("POST", f"{scheme}://{host}:{port}/{address.base}/version", near=True)
        yield _clock("node", answer)
        yield exposure(
            local=address.local,
            asks=answer.status in (401, 403),
            open_rpc=self.options.get("open_rpc") is True,
        )

    def blocks(self) -> Iterator[Finding]:
        """A block is uploaded, comes back the same, and is given up."""
        block, began, start = secrets.token_bytes(TRIAL), int(time.time()), time.monotonic()
        try:
            read_back(self.store, block)
            text = f"64 KiB went there and came back in {duration(time.monotonic() - start)}"
            yield Finding("node", "blocks", "ok", text)
        finally:
            self._give_up(CID.of(block), began)

    def pins(self) -> Iterator[Finding]:
        """A block is pinned and unpinned."""
        if self.options.get("pin") is False:
            yield Finding("node", "pins", "ok", "nothing is pinned there (store.pin=false)")
            return
        block, began = secrets.token_bytes(32), int(time.time())
        record: CID | None = held.pin_record(CID.of(block), PIN, True)[0]
        try:
            self.store.put(block)
            self.store.pin(CID.of(block), PIN)
            answer = self.store.rpc.ask("list of pins", "/pin/ls", str(record), type="recursive")
            if str(record) not in str(answer):
                raise StoreBadAnswer("what was pinned is not among its pins; look at its log")
            self.store.rpc.ask("unpinning", "/pin/rm", str(record))
            record = None
            yield Finding("node", "pins", "ok", "a block was pinned and unpinned")
        finally:
            self._give_up(CID.of(block), began, record)

    def _give_up(self, cid: CID, began: int, pin: CID | None = None) -> None:
        """Unpin a block that was put since `began`; the node's garbage collection takes it."""
        if self.options.get("pin") is False:
            return
        moments = range(began, int(time.time()) + 1)
        leases = (held.lease_record([cid], held.Lease(at, at + _LEASE_S))[0] for at in moments)
        for names in ((pin,) if pin else (), leases):  # of the leases there is one
            for name in names:
                try:
                    self.store.rpc.ask("unpinning", "/pin/rm", str(name))
                    break
                except (StoreUnreachable, StoreTimeout):
                    return
                except StoreError:
                    continue  # that one is not pinned

    def space(self) -> Iterator[Finding]:
        """What is free below the node's own limit."""
        what = "size of the repository"
        quick = {"size-only": "true"}
        try:
            answer = self.store.rpc.ask(what, "/repo/stat", timeout_s=PATIENCE_S, **quick)
        except StoreTimeout:
            text = f"it does not tell its size within {PATIENCE_S:g} s"
            yield Finding("node", "space", "warning", text, "look with `ipfs repo stat`")
            return
        try:
            free = int(answer["StorageMax"]) - int(answer["RepoSize"])
        except (KeyError, TypeError, ValueError):
            raise StoreBadAnswer(f"{what}: the answer has no sizes; is this a Kubo?") from None
        where = "below the node's Datastore.StorageMax"
        yield free_space("node", free, where, "raise that, or run `fedipfs store gc` on it")

    def swarm(self) -> Iterator[Finding]:
        """How many nodes it is connected to, and whose network that is."""
        count = len(self._connected())
        first = str(self.store.rpc.ask("bootstrap list", "/bootstrap/list"))
        public = any(mark in first for mark in _PUBLIC)
        text = f"{count} nodes are connected"
        if public:
            text += ", on the public IPFS network, where anybody sees which CIDs there are"
        if not count and not self.options.get("peers"):
            remedy = "name the federation's other nodes as store.peers, if there are any"
            yield Finding("node", "peers", "warning", text, remedy)
            return
        hint = "; `fedipfs keys swarm` makes the key of a private network" if public else ""
        yield Finding("node", "peers", "ok", text + hint)

    def peer(self, peer: str) -> Iterator[Finding]:
        """One of the nodes that are configured."""
        ident = str(peer).rpartition("/p2p/")[2]
        if ident in self._connected():
            yield Finding("node", "peers", "ok", f"{peer} is connected")
            return
        try:
            self.store.connect_to(peer)
        except StoreError as error:
            remedy = "check the address, the swarm's key and the firewall on both sides"
            yield Finding("node", "peers", "problem", one_line(error, 300), remedy)
            return
        yield Finding("node", "peers", "ok", f"{peer} was connected")

    def _connected(self) -> set[str]:
        answer = self.store.rpc.ask("list of peers", "/swarm/peers")
        try:
            return {str(entry["Peer"]) for entry in answer["Peers"] or ()}
        except (KeyError, TypeError):
            raise StoreBadAnswer("list of peers: the answer has none; is this a Kubo?") from None


def exposure(*, local: bool, asks: bool, open_rpc: bool) -> Finding:
    """What it means who reaches the RPC, and whether it `asks` for credentials."""
    if local:
        return Finding("node", "exposure", "ok", "its RPC is on this machine")
    if asks:
        return Finding("node", "exposure", "ok", "its RPC asks for credentials, and takes ours")
    level: Level = "warning" if open_rpc else "problem"
    text = "its RPC takes commands without credentials: whoever reaches that port controls it"
    remedy = "set API.Authorizations on the node, or let it listen on its loopback address only"
    return Finding("node", "exposure", level, text, remedy)


def gateway_checks(options: Mapping[str, Any]) -> Iterator[Check]:
    """Each of the gateways: does it answer as a trustless one?"""
    urls: list[str] = []

    def settings() -> Iterator[Finding]:
        urls.extend(cast(GatewayStore, open_store(options)).urls)
        yield from ()

    yield Check("gateway", "settings", settings)
    for url in urls:
        yield Check("gateway", "reached", lambda url=url: _gateway(url))  # type: ignore[misc]


def _gateway(url: str) -> Iterator[Finding]:
    """Specification: Trustless Gateway, protocol probing: the block of the identity CID."""
    answer = _ask("GET", f"{url}/ipfs/{_PROBE}?format=raw", near=False)
    kind = answer.headers.get("Content-Type", "nothing").partition(";")[0].strip()
    if answer.status == 200 and kind == _RAW and not answer.body:
        text = f"{url} answers in {duration(answer.seconds)}"
        yield Finding("gateway", "reached", "ok", text)
        yield _clock("gateway", answer)
        return
    told = f"HTTP {answer.status}" if answer.status != 200 else f"{kind!r:.60} instead of a block"
    yield Finding(
        "gateway",
        "reached",
        "problem",
        f"{url} answers {told}: it is no trustless gateway",
        f"name one that serves ?format=raw, such as a Kubo's Gateway address ({_RAW})",
    )


class _Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes
    at: float  # Unix time halfway between request and answer
    seconds: float


def _ask(method: str, url: str, *, near: bool) -> _Answer:
    """One request without credentials; `near` asks the machine itself, through no proxy."""
    session = new_session()
    if near:
        protect(session, elsewhere=False)
    with Guard(TIMEOUT_S, TRIAL) as guard, contextlib.closing(session):
        before, start = time.time(), time.monotonic()
        try:
            with guard.sending():
                response = session.request(
                    method, url, headers={"Accept": "*/*" if near else _RAW}, stream=True
                )
            seconds = time.monotonic() - start
            with response:
                body = b"".join(response.iter_content(None))
        except StoreBadAnswer as error:
            raise StoreBadAnswer(f"{url}: {error}: use another") from None
        except FAILURES as error:
            if guard.expired:
                late = f"{url} did not answer within {TIMEOUT_S:g} s: try again, or use another"
                raise StoreTimeout(late) from None
            raise StoreUnreachable(
                f"{url} does not answer ({innermost(error)}): use another"
            ) from None
    return _Answer(response.status_code, response.headers, body, before + seconds / 2, seconds)


def _clock(part: str, answer: _Answer) -> Finding:
    """This machine's clock against the Date of an answer, whose resolution is a second."""
    try:
        date = parsedate_to_datetime(answer.headers["Date"]).timestamp()
        age = int(answer.headers.get("Age", 0))  # of what a cache answers
    except (KeyError, TypeError, ValueError, OverflowError):
        text = "it sends no date to compare this machine's clock with"
        return Finding(part, "clock", "warning", text, "compare them yourself: date -u")
    apart = date + 0.5 + age - answer.at
    if abs(apart) <= CLOCK_S:
        return Finding(part, "clock", "ok", f"differs from this machine's by {abs(apart):.0f} s")
    level: Level = "problem" if abs(apart) > CLOCKS_APART_S else "warning"
    text = f"is {duration(abs(apart))} {'ahead of' if apart > 0 else 'behind'} this machine's"
    remedy = "set the wrong one by NTP: by the clock, keys begin and cease to count"
    return Finding(part, "clock", level, text, remedy)


def _dotted(release: tuple[int, int]) -> str:
    return f"{release[0]}.{release[1]}"
