"""Content addressing: CIDs, UnixFS files, DAG-CBOR records and CAR streams, as pure functions."""

from __future__ import annotations

from fedipfs.ipld import car, dagcbor, dagpb, unixfs
from fedipfs.ipld.cid import CID, DAG_CBOR, DAG_PB, RAW
from fedipfs.ipld.links import links

__all__ = ["CID", "DAG_CBOR", "DAG_PB", "RAW", "car", "dagcbor", "dagpb", "links", "unixfs"]
