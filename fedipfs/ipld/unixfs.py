"""UnixFS files as balanced DAGs (UnixFS spec; profile unixfs-v1-2025 of IPIP-499).

CIDv1, sha2-256, raw leaves of up to 1 MiB, 1024 links a node. Leaves may be uneven: a file cut
elsewhere has another root CID but the same bytes, and every IPFS tool reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fedipfs.errors import UnixFSError
from fedipfs.ipld import dagpb, varint
from fedipfs.ipld.ahead import map_ahead
from fedipfs.ipld.cid import CID, DAG_PB, RAW

if TYPE_CHECKING:
    from typing_extensions import Buffer

PROFILE = "unixfs-v1-2025"
CHUNK = 1 << 20  # bytes of a full leaf
MAX_LINKS = 1024  # of a node that we write
MAX_BLOCK = 2 << 20  # bytes of a block that we read
MAX_DEPTH = 16  # levels of nodes that we read; 1024**6 leaves of 1 MiB exceed 64-bit sizes
MAX_LEAVES = 1 << 18  # of a list of leaves that we hold in memory
SPARE_NODES = 64  # nodes with links that we read beyond one for every four leaves
NODE_BYTES = 128  # of a node, and again of each of its links, beyond the data it holds

_RAW_TYPE, _FILE_TYPE = 0, 2  # Data.DataType
_TYPE, _DATA, _FILESIZE, _BLOCKSIZES = 0x08, 0x12, 0x18, 0x20  # Data: protobuf tags
_IGNORED_VARINTS, _MTIME = (0x28, 0x30, 0x38), 0x42  # hashType, fanout, mode; mtime
_NOT_FILES = {1: "directory", 3: "metadata", 4: "symlink", 5: "directory shard"}

Get = Callable[[CID], bytes]


class Readable(Protocol):
    """A binary stream."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class _Entry:
    cid: CID
    size: int  # bytes of file below
    tsize: int  # bytes of blocks below


def chunk(source: Readable | Buffer, size: int = CHUNK) -> Iterator[Buffer]:
    """Cut a binary stream (bytes) or a buffer (memoryviews, no copy) every `size` bytes."""
    if not hasattr(source, "read"):
        view = memoryview(source).cast("B")
        for start in range(0, len(view), size):
            yield view[start : start + size]
        return
    while piece := source.read(size):
        while len(piece) < size and (more := source.read(size - len(piece))):
            piece += more  # pipes and sockets return less than was asked
        yield piece


def build(chunks: Iterable[Buffer], put: Callable[[Buffer, int], CID], threads: int = 1) -> CID:
    """Store a file, given as its leaves' bytes in order, and return its root CID.

    `put(block, codec)` stores a block and returns its CID; with `threads` above 1 it is called
    for leaves from that many threads. No more than 1024 links a level are held. Empty chunks
    are left out; no bytes at all give the raw block of no bytes, one chunk its raw leaf.
    Raises UnixFSError for a chunk over 1 MiB.
    """

    def leaf(piece: Buffer) -> _Entry:
        size = memoryview(piece).nbytes
        if size > CHUNK:
            raise UnixFSError(f"leaf of {size} bytes: cut it every {CHUNK} bytes")
        return _Entry(put(piece, RAW), size, size)

    levels: list[list[_Entry]] = [[]]

    def add(entry: _Entry, level: int) -> None:
        if level == len(levels):
            levels.append([])
        if len(levels[level]) == MAX_LINKS:
            close(level)
        levels[level].append(entry)

    def close(level: int) -> None:
        entries, levels[level] = levels[level], []
        add(_node(entries, put), level + 1)

    pieces = (piece for piece in chunks if memoryview(piece).nbytes)
    for entry in map_ahead(leaf, pieces, threads):
        add(entry, 0)
    if not levels[0]:
        return put(b"", RAW)
    level = 0
    while len(levels) > level + 1 or len(levels[level]) > 1:
        close(level)
        level += 1
    return levels[level][0].cid


def cid_of(source: Readable | Buffer, threads: int = 2) -> CID:
    """The root CID of a stream's or buffer's bytes; nothing is stored."""
    return build(chunk(source), CID.of, threads)


def _node(entries: list[_Entry], put: Callable[[Buffer, int], CID]) -> _Entry:
    size = sum(entry.size for entry in entries)
    data = bytes((_TYPE, _FILE_TYPE, _FILESIZE)) + varint.encode(size)
    data += b"".join(bytes((_BLOCKSIZES,)) + varint.encode(entry.size) for entry in entries)
    links = [dagpb.Link(entry.cid, "", entry.tsize) for entry in entries]
    block = dagpb.encode(dagpb.Node(links, data))
    tsize = len(block) + sum(entry.tsize for entry in entries)
    return _Entry(put(block, DAG_PB), size, tsize)


def size(root: CID, get: Get) -> int:
    """Bytes of the file, as its root block declares. Raises UnixFSError if it is not a file."""
    block = _fetch(root, get)
    return len(block) if root.codec == RAW else _decode(root, block).size


def leaves(root: CID, get: Get, threads: int = 1) -> Iterator[bytes]:
    """The file's bytes, leaf by leaf in order, lazily, in constant memory.

    With `threads` above 1, `get` is called for the leaves ahead from that many threads.

    Work is bounded by the size that `size` reports: every link must declare at least one byte,
    sizes must add up, nodes may be 16 levels deep and hold no padding, and with n leaves read no
    more than n/4 + 64 nodes with links are. Raises UnixFSError.
    """

    def leaf(item: tuple[CID, int | None] | bytes) -> bytes:
        if isinstance(item, bytes):
            return item
        cid, expected = item
        block = _fetch(cid, get)
        if expected is not None and len(block) != expected:
            raise UnixFSError(f"leaf {cid} has {len(block)} bytes, its parent says {expected}")
        return block

    return map_ahead(leaf, _walk(root, get), threads)


def leaf_links(root: CID, get: Get) -> list[tuple[CID, int]]:
    """The leaves' CIDs and bytes in order; raw leaves are not fetched, except a lone root.

    Raises UnixFSError also for over 2**18 leaves and for data inside dag-pb nodes.
    """
    if root.codec == RAW:
        return [(root, len(_fetch(root, get)))]
    found: list[tuple[CID, int]] = []
    for item in _walk(root, get):
        if isinstance(item, bytes):
            raise UnixFSError(f"{root} holds data inside its nodes: add it again with raw leaves")
        cid, leaf_size = item
        found.append((cid, leaf_size or 0))
        if len(found) > MAX_LEAVES:
            raise UnixFSError(f"{root} has more than {MAX_LEAVES} leaves")
    return found


@dataclass(frozen=True, slots=True)
class _File:
    data: bytes
    size: int
    children: list[tuple[CID, int]]


def _walk(root: CID, get: Get) -> Iterator[tuple[CID, int | None] | bytes]:
    """Raw leaves as (CID, declared bytes) and data held by nodes as bytes, in order."""
    stack: list[tuple[CID, int | None, int]] = [(root, None, 0)]
    spare = 4 * SPARE_NODES  # chains of nodes would cost much and declare little
    while stack:
        cid, expected, depth = stack.pop()
        if cid.codec == RAW:
            spare += 1
            yield cid, expected
            continue
        if depth >= MAX_DEPTH:
            raise UnixFSError(f"{root} is deeper than {MAX_DEPTH} levels at {cid}")
        file = _decode(cid, _fetch(cid, get))
        if expected is not None and file.size != expected:
            raise UnixFSError(f"{cid} declares {file.size} bytes, its parent says {expected}")
        if file.children:
            spare -= 4
            if spare < 0:
                raise UnixFSError(f"{root} has too many nodes for its leaves at {cid}")
        if file.data:
            spare += 1
            yield file.data
        stack.extend((child, count, depth + 1) for child, count in reversed(file.children))


def _fetch(cid: CID, get: Get) -> bytes:
    block = get(cid)
    if len(block) > MAX_BLOCK:
        raise UnixFSError(f"block {cid} has {len(block)} bytes: the limit is {MAX_BLOCK}")
    return block


def _decode(cid: CID, block: bytes) -> _File:
    """A file node of a dag-pb block, its sizes checked against each other."""
    if cid.codec != DAG_PB:
        raise UnixFSError(f"{cid} has codec {cid.codec:#x}: not a UnixFS file")
    node = dagpb.decode(block)
    kind, data, filesize, sizes = _decode_data(cid, node.data or b"")
    if kind not in (_RAW_TYPE, _FILE_TYPE):
        raise UnixFSError(f"{cid} is a UnixFS {_NOT_FILES.get(kind, kind)}, not a file")
    padding = len(block) - len(data) - NODE_BYTES * (1 + len(node.links))
    if padding > 0:
        raise UnixFSError(f"{cid} holds {padding} bytes that are no part of a file: add it again")
    if len(sizes) != len(node.links):
        raise UnixFSError(f"{cid} has {len(node.links)} links but {len(sizes)} block sizes")
    total = len(data) + sum(sizes)
    if filesize != total and (filesize is not None or sizes):
        raise UnixFSError(f"{cid} declares {filesize} bytes, its parts add up to {total}")
    if 0 in sizes:
        raise UnixFSError(f"{cid} links to a part of no bytes")
    children = [(link.cid, count) for link, count in zip(node.links, sizes, strict=True)]
    return _File(data, total, children)


def _decode_data(cid: CID, raw: bytes) -> tuple[int, bytes, int | None, list[int]]:
    """The fields of a UnixFS `Data` message: type, data, filesize, blocksizes."""
    kind: int | None = None
    data, filesize = b"", None
    sizes: list[int] = []
    position = last = 0
    while position < len(raw):
        tag = raw[position]
        if tag < last or (tag == last and tag != _BLOCKSIZES):
            raise UnixFSError(f"{cid} has UnixFS field {tag:#x} twice or out of order")
        last = tag
        if tag in (_DATA, _MTIME):
            content, position = dagpb.take(raw, position + 1)
            data = content if tag == _DATA else data
            continue
        if tag not in (_TYPE, _FILESIZE, _BLOCKSIZES, *_IGNORED_VARINTS):
            raise UnixFSError(f"{cid} has an unknown UnixFS field {tag:#x}")
        number, position = varint.decode(raw, position + 1, UnixFSError)
        if tag == _TYPE:
            kind = number
        elif tag == _FILESIZE:
            filesize = number
        elif tag == _BLOCKSIZES:
            sizes.append(number)
    if kind is None:
        raise UnixFSError(f"{cid} is dag-pb but not UnixFS: it has no type")
    return kind, data, filesize, sizes
