"""Files, records and CARs over any store.

root = dag.add_file(store, "model.safetensors")
b"".join(dag.cat(store, root))
cid = dag.put_record(store, {"model": root, "round": 3})
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from fedipfs.errors import CarError, DagCborError
from fedipfs.ipld import CID, DAG_CBOR, RAW, car, dagcbor, links, unixfs
from fedipfs.store.base import Store

if TYPE_CHECKING:
    from typing_extensions import Buffer

_THREADS = 2  # for writing: hashing and file access release the GIL; a third gained nothing


def add(store: Store, chunks: Iterable[Buffer]) -> CID:
    """Store a file, given as its leaves (`unixfs.chunk` cuts them); returns its root CID.

    A few leaves are in hand at a time: do not reuse a chunk's memory until this returns.
    """
    return unixfs.build(chunks, store.put, _THREADS)


def add_file(store: Store, path: str | os.PathLike[str]) -> CID:
    """Store a file in leaves of 1 MiB; returns its root CID. Raises OSError if it is unreadable."""
    with open(path, "rb", buffering=0) as file:
        return add(store, unixfs.chunk(file))


def cat(store: Store, cid: CID) -> Iterator[bytes]:
    """The bytes of a file, leaf by leaf, every block checked. Raises UnixFSError, StoreError."""
    return unixfs.leaves(cid, store.get, store.streams)


def walk(store: Store, root: CID) -> Iterator[CID]:
    """`root` and everything it leads to, each CID once, parents before their children.

    Leaves are not fetched. Raises BlockNotFound, BlockCorrupt or a FormatError below.
    """
    return _walk(store, [root])


def _walk(store: Store, roots: Iterable[CID]) -> Iterator[CID]:
    seen: set[CID] = set()
    stack = list(roots)[::-1]
    while stack:
        cid = stack.pop()
        if cid in seen:
            continue
        seen.add(cid)
        yield cid
        if cid.codec != RAW:
            stack.extend(reversed(links(cid, store.get(cid))))


def put_record(store: Store, value: Any) -> CID:
    """Store a DAG-CBOR record (see ipld.dagcbor for what it may hold); returns its CID."""
    return store.put(dagcbor.encode(value), DAG_CBOR)


def get_record(store: Store, cid: CID) -> Any:
    """A DAG-CBOR record's value. Raises DagCborError, StoreError."""
    if cid.codec != DAG_CBOR:
        raise DagCborError(f"{cid} is not a record: its codec is {cid.codec:#x}, not dag-cbor")
    return dagcbor.decode(store.get(cid))


def export_car(store: Store, roots: Iterable[CID], file: BinaryIO) -> None:
    """Write `roots` and everything they lead to as a CARv1 stream, each block once."""
    roots = list(roots)
    blocks = ((cid, store.get(cid)) for cid in _walk(store, roots))
    for piece in car.write(roots, blocks):
        file.write(piece)


def import_car(store: Store, file: BinaryIO) -> list[CID]:
    """Store every block of a CARv1 stream, each checked; returns its roots.

    Raises CarError, also when blocks that others link to are neither in it nor in the store: a
    stream that is cut between two blocks looks whole. What came before an error stays stored.
    Pin the roots to keep them.
    """
    roots, blocks = car.read(file)
    came: set[CID] = set()
    wanted = {root.to_v1() for root in roots}
    for cid, block in blocks:
        came.add(store.put(block, cid.codec))
        wanted.update(link.to_v1() for link in links(cid, block))
    if missing := [cid for cid in sorted(wanted - came) if not store.has(cid)]:
        raise CarError(
            f"the CAR lacks {len(missing)} blocks that it links to, {missing[0]} first, and so "
            "does the store: was it copied whole? Export it again, or import the others first"
        )
    return roots
