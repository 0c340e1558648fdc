"""The direct links of a block, whatever its codec."""

from __future__ import annotations

from typing import Any

from fedipfs.errors import CidError
from fedipfs.ipld import dagcbor, dagpb
from fedipfs.ipld.cid import CID, DAG_CBOR, DAG_PB, RAW


def links(cid: CID, block: bytes) -> list[CID]:
    """The CIDs that a raw, dag-pb or dag-cbor block links to, in order, repeats included.

    Raises a FormatError when the block does not follow its codec, CidError for another codec.
    """
    if cid.codec == RAW:
        return []
    if cid.codec == DAG_PB:
        return [link.cid for link in dagpb.decode(block).links]
    if cid.codec == DAG_CBOR:
        found: list[CID] = []
        _collect(dagcbor.decode(block), found)
        return found
    raise CidError(f"{cid} has codec {cid.codec:#x}: only raw, dag-pb and dag-cbor can be followed")


def _collect(value: Any, found: list[CID]) -> None:
    if isinstance(value, CID):
        found.append(value)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, found)
    elif isinstance(value, list):
        for item in value:
            _collect(item, found)
