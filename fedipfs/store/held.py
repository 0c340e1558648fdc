"""Records that keep blocks from a daemon's garbage collection.

A daemon has one pin a CID, without an owner: of two runs that share a model, the one that unpins
it would take it from the other. So what is pinned is a small record that links to the content: one
for each name of each root ("fedipfs/pin/v1"), and one for each upload, that holds its blocks until
somebody names them ("fedipfs/lease/v1", with the Unix times of its begin and its end).

A link with the raw codec holds that block alone: daemons keep blocks by their hash, and raw blocks
link to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from fedipfs.errors import DagCborError
from fedipfs.ipld import CID, DAG_CBOR, DAG_PB, RAW, dagcbor

_PIN, _LEASE = "fedipfs/pin/v1", "fedipfs/lease/v1"


class Pin(NamedTuple):
    """`root` is kept under `name`; with `recursive`, so is all that it links to."""

    root: CID
    name: str
    recursive: bool


class Lease(NamedTuple):
    """Blocks are kept from `since` until `until`, seconds of Unix time."""

    since: int
    until: int


def pin_record(root: CID, name: str, recursive: bool) -> tuple[CID, bytes]:
    """The record of a pin, and its CID; the same arguments give the same."""
    return _record(
        {
            "type": _PIN,
            "name": name,
            "codec": root.codec,
            "root": root.to_v1() if recursive else _alone(root),
        }
    )


def lease_record(blocks: Iterable[CID], lease: Lease) -> tuple[CID, bytes]:
    """The record that keeps `blocks`, and its CID."""
    kept = [_alone(cid) for cid in blocks]
    return _record({"type": _LEASE, **lease._asdict(), "blocks": kept})


def read(block: bytes) -> Pin | Lease | None:
    """What a pinned DAG-CBOR block is for; None if it is not one of ours."""
    try:
        record: Any = dagcbor.decode(block)
    except DagCborError:
        return None
    match record:
        case {"type": "fedipfs/pin/v1", "name": str(name), "codec": codec, "root": CID() as r} if (
            codec in (RAW, DAG_PB, DAG_CBOR)
        ):
            return Pin(CID(1, codec, r.digest), name, r.codec == codec)
        case {"type": "fedipfs/lease/v1", "since": int(since), "until": int(until)}:
            return Lease(since, until)
    return None


def _record(value: dict[str, Any]) -> tuple[CID, bytes]:
    block = dagcbor.encode(value)
    return CID.of(block, DAG_CBOR), block


def _alone(cid: CID) -> CID:
    return CID(1, RAW, cid.digest)
