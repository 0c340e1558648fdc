"""Mark-and-sweep garbage collection of a folder store, while others read and write.

A block stays when a pin leads to it or when its file is younger than the grace age. Putting a
block that is present makes its file young again, so the grace age must exceed the time between
the first block of an object and its pin.

Sweeping renames a block's file away, looks at its age once more, and only then deletes it. A
writer that refreshed the age just before is seen and the file goes back; one that comes just
after finds no file and writes a new one. So no lock is needed for putting.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator

from fedipfs.errors import BlockCorrupt, BlockNotFound, FormatError
from fedipfs.ipld import CID, RAW, links
from fedipfs.store import layout
from fedipfs.store.base import GcReport, Store
from fedipfs.store.files import TEMPORARY, os_errors
from fedipfs.store.pins import Pins

_DOOMED = ".gc-"  # how the name of a file that is being swept starts
_TEMPORARY_S = 600.0  # no write of one block takes longer


@contextlib.contextmanager
def locked(folder: str, *, exclusive: bool) -> Iterator[None]:
    """Hold the collection lock, exclusively or shared, waiting for it."""
    path = f"{folder}/gc.lock"
    with os_errors(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        with os_errors(path):
            fcntl.flock(handle, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


def collect(store: Store, folder: str, pinned: Callable[[], Pins], grace_s: float) -> GcReport:
    """Remove blocks of `store`, which lies in `folder`, that nothing in `pinned()` leads to."""
    blocks = f"{folder}/blocks"
    with locked(folder, exclusive=True), os_errors(blocks):
        _restore_doomed(blocks)
        now = time.time()
        live, missing, complete = _mark(store, pinned())
        removed = removed_bytes = kept = 0
        for entry in layout.scan(blocks):
            if entry.name.startswith(TEMPORARY):
                _remove_older(entry.path, now - max(grace_s, _TEMPORARY_S))
                continue
            cid = layout.cid_of(entry)
            if cid is None:
                continue
            size = None
            if complete and cid.digest not in live:
                size = _sweep(entry.path, now - grace_s)
            if size is None:
                kept += 1
            else:
                removed += 1
                removed_bytes += size
    return GcReport(removed, removed_bytes, kept, missing, complete)


def _mark(store: Store, pinned: Pins) -> tuple[set[bytes], list[CID], bool]:
    """Digests of what is pinned, what of it is missing, and whether all links are known."""
    leaves: set[bytes] = set()
    nodes: set[CID] = set()
    complete = True
    # What is pinned alone; each of them was there when it was pinned.
    alone = {root.digest for root, names in pinned.items() if not all(deep for _, deep in names)}
    missing = [
        root
        for root, names in pinned.items()
        if not any(deep for _, deep in names) and not store.has(root)
    ]
    stack = [root for root, names in pinned.items() if any(deep for _, deep in names)]
    while stack:
        cid = stack.pop().to_v1()
        if cid.codec == RAW:
            if cid.digest not in leaves:
                leaves.add(cid.digest)
                if not store.has(cid):
                    missing.append(cid)
            continue
        if cid in nodes:
            continue
        nodes.add(cid)
        try:
            stack.extend(links(cid, store.get(cid)))
        except (BlockNotFound, BlockCorrupt, FormatError):
            missing.append(cid)
            complete = False
    return alone | leaves | {cid.digest for cid in nodes}, missing, complete


def _sweep(path: str, cutoff: float) -> int | None:
    """Delete a block's file if it is older than `cutoff`; its bytes, or None if it stays."""
    folder, name = os.path.split(path)
    doomed = f"{folder}/{_DOOMED}{name}"
    try:
        if os.stat(path).st_mtime > cutoff:
            return None
        os.rename(path, doomed)
    except FileNotFoundError:
        return None
    found = os.stat(doomed)
    if found.st_mtime > cutoff:
        _put_back(doomed, path)
        return None
    os.unlink(doomed)
    return found.st_size


def _put_back(doomed: str, path: str) -> None:
    # A block that came meanwhile is as good or better.
    with contextlib.suppress(FileExistsError):
        os.link(doomed, path)
    os.unlink(doomed)


def _restore_doomed(blocks: str) -> None:
    """Put back what a collection that was killed had renamed."""
    for entry in list(layout.scan(blocks)):
        if entry.name.startswith(_DOOMED):
            folder = os.path.dirname(entry.path)
            _put_back(entry.path, f"{folder}/{entry.name.removeprefix(_DOOMED)}")


def _remove_older(path: str, cutoff: float) -> None:
    with contextlib.suppress(FileNotFoundError):
        if os.stat(path).st_mtime <= cutoff:
            os.unlink(path)
