"""A Kubo node's repository, through its RPC."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fedipfs.errors import (
    BlockCorrupt,
    BlockNotFound,
    ConfigError,
    StoreBadAnswer,
    StoreError,
    StoreTimeout,
    StoreUnreachable,
    UnixFSError,
)
from fedipfs.ipld import CID, DAG_CBOR, RAW, car, unixfs
from fedipfs.ipld.ahead import map_ahead
from fedipfs.store import held
from fedipfs.store.address import Address, Credentials, permit
from fedipfs.store.base import MAX_BLOCK, Counters, GcReport, StoreStat
from fedipfs.store.options import check_flag, check_number
from fedipfs.store.outbox import Outbox
from fedipfs.store.rpc import MAX_LISTING, DaemonGaveUp, Rpc, Upload

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger(__name__)

_HAS_S = 1.0  # the longest wait for whether the node holds a block: js-ipfs would wait for peers
_SLACK = 64 << 10  # bytes of an answer beyond the block, for words of error


class KuboStore:
    """Blocks in the node behind `address`, a multiaddr or a URL of its RPC.

    Blocks go up many at a time, as CARs, from the background: `publish` waits until all are there.
    Each upload is kept from the node's garbage collection for `lease_s` seconds, until somebody
    pins what it belongs to. Every CID that the node answers is compared with ours, every block
    that it sends is hashed.

    `timeout_s` bounds each call with its retries, `retries` how often one is tried again after a
    lost connection. `credentials` names a private file (see address.py; without it,
    $FEDIPFS_KUBO_CREDENTIALS counts). An RPC on another machine needs credentials and https, or
    `open_rpc`. `peers` are multiaddrs of other nodes, to which ours is connected at once and when
    something is not found. With `pin` false nothing is pinned: for a node that never collects
    garbage. Nothing is asked of the node before the first call.
    """

    streams = 4
    shared = True

    def __init__(
        self,
        address: str = "/ip4/127.0.0.1/tcp/5001",
        *,
        timeout_s: float = 60.0,
        retries: int = 6,
        credentials: str | None = None,
        open_rpc: bool = False,
        pin: bool = True,
        lease_s: float = 86400.0,
        peers: Sequence[str] = (),
    ) -> None:
        check_number("timeout_s", timeout_s, least=0.1)
        check_number("lease_s", lease_s, least=0)
        check_number("retries", retries, least=0)
        check_flag("open_rpc", open_rpc)
        check_flag("pin", pin)
        listed = isinstance(peers, Sequence) and not isinstance(peers, str)
        if not listed or not all(isinstance(peer, str) for peer in peers):
            raise ConfigError(f"store.peers={peers!r:.80} is no list of multiaddrs")
        self.address = Address.parse(address)
        secret = Credentials.find(credentials)
        permit(self.address, secret, open_rpc=open_rpc)
        self.counters = Counters()
        self.rpc = Rpc(self.address, secret, timeout_s, int(retries))
        self.peers = tuple(peers)
        self._pin, self._lease_s = pin, lease_s
        self._outbox = Outbox(self._import)
        self._process = 0  # whose node has been connected to its peers
        self._leases: list[tuple[int, CID]] = []  # made here; others' end by `gc`
        self._records: dict[CID, held.Pin | held.Lease | None] = {}  # what pinned CIDs are for

    def __repr__(self) -> str:
        return f"KuboStore({self.address.text!r})"

    def ready(self) -> None:
        """Raise why the node does not answer, at once."""
        self.rpc.ask("version", "/version", retries=0)

    def put(self, block: Buffer, codec: int = RAW) -> CID:
        """Store a block of at most 2 MiB; it is on its way when this returns (see `publish`)."""
        data = bytes(block)
        if len(data) > MAX_BLOCK:
            raise StoreError(
                f"block of {len(data)} bytes: cut it into blocks of at most {MAX_BLOCK}"
            )
        cid = CID.of(data, codec)
        self._outbox.add(cid, data)
        self.counters.count_put(len(data))
        return cid

    def get(self, cid: CID) -> bytes:
        """A block's bytes, hashed every time; the node looks for it among its peers, too."""
        block = self._outbox.get(cid.to_v1())
        if block is None:
            try:
                block = self._fetch(cid)
            except (BlockNotFound, StoreTimeout):
                if not self.connect():
                    raise
                block = self._fetch(cid)
            self.counters.count_fetched(len(block))
        self.counters.count_get(len(block))
        return block

    def _fetch(self, cid: CID) -> bytes:
        self._first_call()
        block: bytes = self.rpc.call(
            f"block {cid}",
            lambda options: self.rpc.client.block.get(str(cid.to_v1()), opts=options),
            limit=MAX_BLOCK + _SLACK,
        )
        return self._checked(cid, block)

    def _checked(self, cid: CID, block: bytes) -> bytes:
        if not cid.matches(block):
            raise BlockCorrupt(
                f"block {cid}: {self.rpc.name} sent {len(block)} bytes that do not hash to it; "
                "they are not used. Check that node (`ipfs repo verify`), or use another"
            )
        return block

    def leaves(self, root: CID) -> Iterator[tuple[CID, bytes]]:
        """A file's blocks, nodes first, then its leaves in order, each checked: in one stream.

        For a file that is not here yet as a whole. Memory: a few leaves.
        """
        nodes: dict[CID, bytes] = {}

        def get(cid: CID) -> bytes:
            nodes[cid] = self.get(cid)
            return nodes[cid]

        links = unixfs.leaf_links(root, get)
        yield from nodes.items()
        if root.codec == RAW:
            return
        for cid, size in links:
            if size > MAX_BLOCK:
                raise UnixFSError(f"leaf {cid} of {root} is said to have {size} bytes: too many")
        total = sum(size for _, size in links)
        stream = self.rpc.stream(f"file {root}", "/cat", str(root.to_v1()), total + _SLACK)
        cut = _cut(stream, [size for _, size in links], root)
        pieces = zip((cid for cid, _ in links), cut, strict=True)
        for cid, block in map_ahead(lambda pair: (pair[0], self._checked(*pair)), pieces, 2):
            self.counters.count_fetched(len(block))
            self.counters.count_get(len(block))
            yield cid, block

    def has(self, cid: CID) -> bool:
        """Whether the node itself holds the block; its peers are not asked."""
        return self._outbox.get(cid.to_v1()) is not None or self._size(cid) is not None

    def size(self, cid: CID) -> int:
        """Bytes of that one block, not hashed. Raises BlockNotFound."""
        block = self._outbox.get(cid.to_v1())
        size = len(block) if block is not None else self._size(cid)
        if size is None:
            raise BlockNotFound(f"block {cid} is not in {self.rpc.name}: import it there")
        return size

    def _size(self, cid: CID) -> int | None:
        self._first_call()
        what = f"block {cid}"
        try:
            answer = self.rpc.ask(
                what, "/block/stat", str(cid.to_v1()), offline="true", timeout=f"{_HAS_S}s"
            )
        except (BlockNotFound, DaemonGaveUp):
            return None
        return _integer(answer, "Size", what)

    def publish(self) -> None:
        """Wait until the node has all that was put; raises what went wrong with any of it."""
        self._outbox.flush()

    def flush(self) -> None:
        """The same: what the node has answered for is on its disk."""
        self.publish()

    def fetch(self, root: CID) -> None:
        """Nothing: the node fetches what it is asked for."""

    def pin(self, root: CID, name: str = "", *, recursive: bool = True) -> None:
        """Keep a block, and with `recursive` everything it links to, until it has no name left.

        The node fetches what it lacks. Raises BlockNotFound or StoreTimeout if it cannot be had.
        """
        self.publish()
        if not self._pin:
            return
        self._first_call()
        what = f"pin of {root}"
        record, block = held.pin_record(root, name, recursive)
        try:
            # Stored and pinned in one call: no garbage collection comes in between.
            self._send(what, [(record, block)], [record], pin=True)
            return
        except BlockNotFound:
            pass  # some of the content is not there: asked again, the node looks among its peers
        answer = self.rpc.ask(what, "/pin/add", str(record))
        if [_cid(text, what) for text in _field(answer, "Pins", list, what)] != [record]:
            raise StoreBadAnswer(f"{what}: {self.rpc.name} says that it pinned another CID")

    def unpin(self, root: CID, name: str | None = None) -> None:
        """Take one name of a root away, or all; nothing happens where it has not that name.

        A pin that others made on the node goes only when the root has no name of ours.
        """
        if not self._pin:
            return
        if name is None:
            found = [record for record, pin in self._pinned() if pin.root == root.to_v1()]
            records = [record for record in found if record.to_v1() != root.to_v1()] or found
        else:
            records = [held.pin_record(root, name, recursive)[0] for recursive in (True, False)]
        for record in records:
            self._release(record)

    def pins(self) -> dict[CID, tuple[str, ...]]:
        """The pinned roots and their names, sorted; what others pinned there has the name ""."""
        found: dict[CID, set[str]] = {}
        for _, pin in self._pinned():
            found.setdefault(pin.root, set()).add(pin.name)
        return {root: tuple(sorted(names)) for root, names in found.items()}

    def gc(self, grace_s: float) -> GcReport:
        """Give up leases that began `grace_s` seconds ago or earlier, and let the node collect.

        The node knows no age of blocks: what is neither pinned nor leased goes.
        """
        self.publish()
        for cid, entry in self._entries():
            if isinstance(entry, held.Lease) and (
                min(entry.since + grace_s, entry.until) <= time.time()
            ):
                self._release(cid)
        before = self.stat()
        answer = self.rpc.post(
            "garbage collection",
            "/repo/gc",
            limit=MAX_LISTING,
            timeout_s=max(self.rpc.timeout_s, 600.0),
        )
        after = self.stat()
        lines = [line for line in answer if isinstance(line, dict)]
        removed = sum("Key" in line for line in lines)
        whole = not any(line.get("Error") for line in lines)
        return GcReport(removed, max(before.bytes - after.bytes, 0), after.blocks, [], whole)

    def stat(self) -> StoreStat:
        """What the node says of its repository."""
        what = "size of the repository"
        answer = self.rpc.ask(what, "/repo/stat")
        used, most = _integer(answer, "RepoSize", what), _integer(answer, "StorageMax", what)
        return StoreStat(
            _integer(answer, "NumObjects", what), used, len(self.pins()), max(most - used, 0)
        )

    def connect(self) -> bool:
        """Connect the node to each of `peers`; whether any connection is there now."""
        connected = False
        for peer in self.peers:
            try:
                self.connect_to(peer)
                connected = True
            except StoreUnreachable as error:  # our own node is: nobody can be connected
                log.warning("%s", error)
                return connected
            except StoreError as error:
                log.warning("%s", error)
        return connected

    def connect_to(self, peer: str) -> None:
        """Connect the node to the one at the multiaddr `peer`."""
        self.rpc.ask(
            f"connection to {peer}",
            "/swarm/connect",
            peer,
            timeout_s=min(self.rpc.timeout_s, 10.0),
        )

    def _first_call(self) -> None:
        """Connect to the peers once a process; a fork has the store but not the connections."""
        if self._process != os.getpid():
            self._process = os.getpid()
            if self.peers:
                self.connect()

    def _import(self, blocks: list[tuple[CID, bytes]]) -> None:
        """Send blocks as one CAR, with the lease that keeps them."""
        self._first_call()
        what = f"upload of {len(blocks)} blocks, {blocks[0][0]} first"
        if not self._pin:
            self._send(what, blocks, [blocks[0][0]], pin=False)
            return
        now = int(time.time())
        times = held.Lease(now, now + int(self._lease_s))
        root, lease = held.lease_record([cid for cid, _ in blocks], times)
        self._send(what, [*blocks, (root, lease)], [root], pin=True)
        self._leases.append((times.until, root))
        for ended in [lease for lease in self._leases.copy() if lease[0] <= now]:
            with contextlib.suppress(ValueError):  # another upload's thread has come first
                self._leases.remove(ended)
                self._release(ended[1])

    def _send(
        self, what: str, blocks: list[tuple[CID, bytes]], roots: list[CID], *, pin: bool
    ) -> None:
        flags: Any = {"pin-roots": str(pin).lower(), "stats": "true"}
        upload = Upload(list(car.write(roots, blocks)))
        answers = self.rpc.post(what, "/dag/import", upload=upload, **flags)
        told = False
        for line in answers:
            match line:
                case {"Root": {"Cid": {"/": str(text)}} as root}:
                    if _cid(text, what) not in roots:
                        raise StoreBadAnswer(f"{what}: {self.rpc.name} answers with the CID {text}")
                    if problem := root.get("PinErrorMsg"):
                        raise self.rpc.reported(str(problem), f"{what}, not kept")
                    told = True
                case {"Stats": {"BlockCount": int(count)}}:
                    if count != len(blocks):
                        raise StoreBadAnswer(f"{what}: {self.rpc.name} took {count} of them")
                    told = told or not pin
                case _:
                    raise StoreBadAnswer(f"{what}: {self.rpc.name} gave an unknown answer")
        # js-ipfs says nothing of what it does not pin, and so does Kubo when it fails midway.
        if not told and (pin or self._size(blocks[-1][0]) is None):
            raise StoreBadAnswer(f"{what}: {self.rpc.name} does not say what it imported")
        self.counters.count_sent(len(blocks), sum(len(block) for _, block in blocks))

    def _pinned(self) -> Iterator[tuple[CID, held.Pin]]:
        """What is pinned, by us or others, as (the CID that the node pins, what that is for)."""
        for cid, entry in self._entries():
            if entry is None:
                yield cid, held.Pin(cid.to_v1(), "", True)
            elif isinstance(entry, held.Pin):
                yield cid, entry

    def _entries(self) -> Iterator[tuple[CID, held.Pin | held.Lease | None]]:
        what = "list of pins"
        answer = self.rpc.ask(what, "/pin/ls", limit=MAX_LISTING, type="recursive")
        if answer == {}:  # so says Kubo that there are none
            return
        for text in _field(answer, "Keys", dict, what):
            cid = _cid(text, what)
            if cid not in self._records:
                try:
                    ours = held.read(self._fetch(cid)) if cid.codec == DAG_CBOR else None
                except (BlockNotFound, DaemonGaveUp):
                    continue  # unpinned and collected meanwhile
                self._records[cid] = ours
            yield cid, self._records[cid]

    def _release(self, cid: CID) -> None:
        try:
            self.rpc.ask(f"unpinning of {cid}", "/pin/rm", str(cid))
        except StoreError as error:
            if "not pinned" not in str(error):
                raise


def _cut(stream: Iterator[bytes], sizes: list[int], root: CID) -> Iterator[bytes]:
    """The pieces of a stream put together anew, so that they have `sizes`."""
    buffer = bytearray()
    for size in sizes:
        while len(buffer) < size:
            piece = next(stream, None)
            if piece is None:
                raise StoreBadAnswer(f"file {root}: its bytes end too early; try again")
            buffer += piece
        yield bytes(memoryview(buffer)[:size])
        del buffer[:size]
    if buffer or next(stream, b""):
        raise StoreBadAnswer(f"file {root}: more bytes come than it has; try again")


def _cid(text: object, what: str) -> CID:
    try:
        return CID.parse(text)  # type: ignore[arg-type]
    except ValueError:
        raise StoreBadAnswer(f"{what}: {text!r:.80} stands in the answer for a CID") from None


def _field(answer: Any, key: str, kind: type, what: str) -> Any:
    """A field of an answer, which ipfshttpclient gives as it came, if it is as it should be."""
    try:
        value = answer[key]
    except (KeyError, TypeError, IndexError):
        value = None
    if not isinstance(value, kind):
        raise StoreBadAnswer(
            f"{what}: the answer has no {key} that can be used; is this an IPFS daemon?"
        )
    return value


def _integer(answer: Any, key: str, what: str) -> int:
    """A whole number, which js-ipfs gives as text."""
    value = _field(answer, key, int | str, what)  # type: ignore[arg-type]
    try:
        return int(value)
    except ValueError:
        raise StoreBadAnswer(f"{what}: {key} is {value!r:.40} in the answer, no number") from None
