"""DAG-PB blocks (IPLD dag-pb spec): a node of named, sized links and optional data.

The encoder writes the one canonical form. The decoder accepts that form only: links before data,
fields in order, shortest varints, nothing unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedipfs.errors import CidError, UnixFSError
from fedipfs.ipld import varint
from fedipfs.ipld.cid import CID

MAX_BLOCK = 2 << 20  # bytes; what bitswap carries

_LINKS, _DATA = 0x12, 0x0A  # PBNode: field 2 and field 1, both length-delimited
_HASH, _NAME, _TSIZE = 0x0A, 0x12, 0x18  # PBLink: bytes, string, varint


@dataclass(frozen=True, slots=True)
class Link:
    """A link of a dag-pb node; `tsize` is the bytes of the whole tree below, blocks included."""

    cid: CID
    name: str | None = None
    tsize: int | None = None


@dataclass(frozen=True, slots=True)
class Node:
    """A dag-pb node."""

    links: Sequence[Link] = ()
    data: bytes | None = None


def encode(node: Node) -> bytes:
    """The canonical block of a node."""
    parts: list[bytes] = []
    for link in node.links:
        cid = link.cid.bytes
        body = bytes((_HASH, len(cid))) + cid
        if link.name is not None:
            name = link.name.encode()
            body += bytes((_NAME,)) + varint.encode(len(name)) + name
        if link.tsize is not None:
            body += bytes((_TSIZE,)) + varint.encode(link.tsize)
        parts += (bytes((_LINKS,)), varint.encode(len(body)), body)
    if node.data is not None:
        parts += (bytes((_DATA,)), varint.encode(len(node.data)), node.data)
    return b"".join(parts)


def decode(block: bytes) -> Node:
    """The node of a block. Raises UnixFSError for bytes that are not canonical dag-pb."""
    if len(block) > MAX_BLOCK:
        raise UnixFSError(f"dag-pb block of {len(block)} bytes: the limit is {MAX_BLOCK}")
    links: list[Link] = []
    position = 0
    while position < len(block) and block[position] == _LINKS:
        body, position = take(block, position + 1)
        links.append(_decode_link(body))
    data = None
    if position < len(block) and block[position] == _DATA:
        data, position = take(block, position + 1)
    if position != len(block):
        raise UnixFSError(f"unexpected field {block[position]:#x} of dag-pb at byte {position}")
    return Node(tuple(links), data)


def take(buffer: bytes, position: int) -> tuple[bytes, int]:
    """A length-delimited field's content at `position`, and where it ends."""
    length, start = varint.decode(buffer, position, UnixFSError)
    end = start + length
    if end > len(buffer):
        raise UnixFSError(f"field of {length} bytes at {start} runs past the block's end")
    return buffer[start:end], end


def _decode_link(body: bytes) -> Link:
    cid: CID | None = None
    fields: dict[str, Any] = {}
    position = last = 0
    while position < len(body):
        tag = body[position]
        if tag <= last:
            raise UnixFSError(f"dag-pb link has field {tag:#x} twice or out of order")
        last = tag
        if tag == _HASH:
            raw, position = take(body, position + 1)
            try:
                cid = CID.decode(raw)
            except CidError as error:
                raise UnixFSError(f"dag-pb link is not a CID: {error}") from None
        elif tag == _NAME:
            raw, position = take(body, position + 1)
            try:
                fields["name"] = raw.decode()
            except UnicodeDecodeError:
                raise UnixFSError(f"dag-pb link name {raw[:40]!r} is not UTF-8") from None
        elif tag == _TSIZE:
            fields["tsize"], position = varint.decode(body, position + 1, UnixFSError)
        else:
            raise UnixFSError(f"dag-pb link has an unknown field {tag:#x}")
    if cid is None:
        raise UnixFSError("dag-pb link without a hash")
    return Link(cid, **fields)
