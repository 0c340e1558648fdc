"""CARv1 streams (IPLD CAR spec): a header with the roots, then blocks with their CIDs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from fedipfs.errors import CarError, CidError, DagCborError
from fedipfs.ipld import dagcbor, varint
from fedipfs.ipld.cid import CID

MAX_HEADER = 1 << 20  # bytes
MAX_BLOCK = 2 << 20  # bytes
_MAX_CID = 45  # version, a 9-byte codec, multihash


class Readable(Protocol):
    """A binary stream."""

    def read(self, size: int, /) -> bytes: ...


def write(roots: Sequence[CID], blocks: Iterable[tuple[CID, bytes]]) -> Iterator[bytes]:
    """The pieces of a CARv1 stream, one a block, lazily."""
    header = dagcbor.encode({"version": 1, "roots": list(roots)})
    yield varint.encode(len(header)) + header
    for cid, block in blocks:
        name = cid.bytes
        yield varint.encode(len(name) + len(block)) + name + block


def read(stream: Readable) -> tuple[list[CID], Iterator[tuple[CID, bytes]]]:
    """The roots of a CARv1 stream and its blocks, each checked against its CID, lazily.

    At most one block is in memory. Raises CarError, at once for a bad header and from the
    iterator for a bad block, for anything that is cut short, too large or not what it says.
    """
    length = _read_length(stream, "header")
    if length is None:
        raise CarError("not a CAR: the stream is empty")
    if not 0 < length <= MAX_HEADER:
        raise CarError(f"CAR header of {length} bytes: the limit is {MAX_HEADER}; is this a CAR?")
    try:
        header = dagcbor.decode(_read_exactly(stream, length, "header"))
    except DagCborError as error:
        raise CarError(f"not a CAR: bad header ({error})") from None
    if not isinstance(header, dict) or header.get("version") != 1:
        version = header.get("version") if isinstance(header, dict) else None
        raise CarError(f"CAR version {version!r:.40} is not supported: use CARv1")
    roots = header.get("roots")
    if not isinstance(roots, list) or not all(isinstance(root, CID) for root in roots):
        raise CarError("CAR header without a list of roots")
    return roots, _read_blocks(stream)


def _read_blocks(stream: Readable) -> Iterator[tuple[CID, bytes]]:
    number = 0
    while (length := _read_length(stream, f"block {number}")) is not None:
        if not 0 < length <= MAX_BLOCK + _MAX_CID:
            raise CarError(f"CAR block {number} of {length} bytes: the limit is {MAX_BLOCK}")
        section = _read_exactly(stream, length, f"block {number}")
        try:
            cid, start = CID.read(section, 0)
        except CidError as error:
            raise CarError(f"CAR block {number} has no valid CID: {error}") from None
        block = section[start:]
        if not cid.matches(block):
            raise CarError(f"CAR block {number} does not hash to its CID {cid}: get the CAR again")
        yield cid, block
        number += 1


def _read_length(stream: Readable, what: str) -> int | None:
    data = b""
    while byte := stream.read(1):
        data += byte
        if byte[0] < 0x80 or len(data) > varint.MAX_BYTES:
            return varint.decode(data, 0, CarError)[0]
    if data:
        raise CarError(f"CAR cut short in the length of {what}")
    return None


def _read_exactly(stream: Readable, length: int, what: str) -> bytes:
    parts: list[bytes] = []
    missing = length
    while missing:
        part = stream.read(missing)
        if not part:
            raise CarError(f"CAR cut short in {what}: {missing} of {length} bytes are missing")
        parts.append(part)
        missing -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
