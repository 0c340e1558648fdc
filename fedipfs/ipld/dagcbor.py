"""DAG-CBOR blocks (IPLD dag-cbor spec): canonical only, CIDs as real links.

libipld does the parsing. It shows links and byte strings alike as bytes, and would write any
bytes that happen to look like a CID (one random 64-byte signature in a thousand) as a link. So
byte strings, links and containers are written here, and `decode` walks the parsed value along
the block: that tells links from bytes, and finds every item that is not in canonical form.
"""

from __future__ import annotations

from typing import Any

import libipld

from fedipfs.errors import CidError, DagCborError
from fedipfs.ipld.cid import CID

MAX_BLOCK = 2 << 20  # bytes
MAX_DEPTH = 128

_LINK = b"\xd8\x2a"  # tag 42
_BYTES, _LIST, _MAP = 2, 4, 5  # CBOR major types


def encode(value: Any) -> bytes:
    """The block of a value made of None, bool, int, float, str, bytes, list, dict and CID.

    Equal values give equal bytes, whatever the order of dict keys. Raises DagCborError for NaN
    and infinities, integers outside -2**64 .. 2**64 - 1, keys that are not text, other types and
    nesting deeper than 128.
    """
    parts: list[bytes] = []
    _encode(value, parts, 0)
    return b"".join(parts)


def decode(block: bytes) -> Any:
    """The value of a block; links come back as CID. Raises DagCborError unless canonical."""
    if len(block) > MAX_BLOCK:
        raise DagCborError(f"dag-cbor block of {len(block)} bytes: the limit is {MAX_BLOCK}")
    block = bytes(block)
    try:
        parsed = libipld.decode_dag_cbor(block)
    except (ValueError, RecursionError) as error:
        raise DagCborError(f"not DAG-CBOR: {_one_line(error)}") from None
    value, _ = _resolve(parsed, block, 0, 0)
    return value


def _head(major: int, count: int) -> bytes:
    if count < 24:
        return bytes((major << 5 | count,))
    for extra, size in ((24, 1), (25, 2), (26, 4), (27, 8)):
        if count < 1 << 8 * size:
            return bytes((major << 5 | extra,)) + count.to_bytes(size, "big")
    raise DagCborError(f"length {count} does not fit DAG-CBOR")


def _sort_key(key: str) -> tuple[int, bytes]:
    try:
        data = key.encode()
    except UnicodeEncodeError:
        raise DagCborError(f"map key {key!r:.80} is not valid Unicode") from None
    return len(data), data


def _scalar(value: Any) -> bytes:
    """An item that holds no other: link, bytes, or what libipld writes unambiguously."""
    kind = type(value)
    if kind is CID:
        return _link(value.bytes)
    if kind in (bytes, bytearray, memoryview):
        return _head(_BYTES, memoryview(value).nbytes) + bytes(value)
    if not (value is None or kind in (bool, int, float, str)):
        raise DagCborError(f"{value!r:.80} is a {kind.__name__}: DAG-CBOR cannot hold it")
    try:
        return bytes(libipld.encode_dag_cbor(value))
    except ValueError as error:
        raise DagCborError(f"{value!r:.80}: {_one_line(error)}") from None


def _link(cid: bytes) -> bytes:
    return _LINK + _head(_BYTES, len(cid) + 1) + b"\0" + cid


def _encode(value: Any, parts: list[bytes], depth: int) -> None:
    if depth > MAX_DEPTH:
        raise DagCborError(f"value is nested deeper than {MAX_DEPTH}")
    if isinstance(value, dict):
        for key in value:
            if type(key) is not str:
                raise DagCborError(f"map key {key!r:.80} is not text")
        parts.append(_head(_MAP, len(value)))
        for key in sorted(value, key=_sort_key):
            parts.append(_scalar(key))
            _encode(value[key], parts, depth + 1)
    elif isinstance(value, list | tuple):
        parts.append(_head(_LIST, len(value)))
        for item in value:
            _encode(item, parts, depth + 1)
    else:
        parts.append(_scalar(value))


def _resolve(parsed: Any, block: bytes, position: int, depth: int) -> tuple[Any, int]:
    """`parsed`, its links made CID in place, and where its encoding, which starts here, ends."""
    if depth > MAX_DEPTH:
        raise DagCborError(f"value is nested deeper than {MAX_DEPTH}")
    if type(parsed) is dict:
        position = _expect(_head(_MAP, len(parsed)), block, position)
        for key, item in parsed.items():
            position = _expect(_scalar(key), block, position)
            parsed[key], position = _resolve(item, block, position, depth + 1)
        return parsed, position
    if type(parsed) is list:
        position = _expect(_head(_LIST, len(parsed)), block, position)
        for index, item in enumerate(parsed):
            parsed[index], position = _resolve(item, block, position, depth + 1)
        return parsed, position
    if type(parsed) is bytes and block.startswith(_LINK, position):
        try:
            value = CID.decode(parsed)
        except CidError as error:
            raise DagCborError(f"link at byte {position}: {error}") from None
        return value, _expect(_link(parsed), block, position)
    return parsed, _expect(_scalar(parsed), block, position)


def _expect(encoded: bytes, block: bytes, position: int) -> int:
    if not block.startswith(encoded, position):
        raise DagCborError(f"not canonical DAG-CBOR at byte {position}")
    return position + len(encoded)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
