"""A stored file as a list of leaves that can be read in any order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from fedipfs.errors import WeightsError
from fedipfs.ipld import CID, unixfs
from fedipfs.store import Store


class Leaves(Protocol):
    """What `Weights` reads: leaf by leaf, with the sizes known before."""

    cid: CID
    sizes: list[int]

    def leaf(self, index: int) -> bytes:
        """The bytes of a leaf, `sizes[index]` of them."""
        ...


class StoredLeaves:
    """The leaves of a UnixFS file in a store; every block is verified as it is read.

    From a store that is worth several streams the next leaves are fetched while one is used. A
    file that declares over `max_bytes` is refused from its root block alone. Raises WeightsError
    (too large), UnixFSError, and what reading a block raises.
    """

    def __init__(self, store: Store, cid: CID, *, max_bytes: int | None = None) -> None:
        self.store, self.cid = store, cid
        root = store.get(cid)

        def get(wanted: CID) -> bytes:
            return root if wanted == cid else store.get(wanted)

        if max_bytes is not None and (declared := unixfs.size(cid, get)) > max_bytes:
            raise WeightsError(f"{cid} declares {declared} bytes; at most {max_bytes} are expected")
        links = [(leaf, size) for leaf, size in unixfs.leaf_links(cid, get) if size]
        self.cids = [leaf for leaf, _ in links]
        self.sizes = [size for _, size in links]
        self._ahead = _Ahead(self._get, len(links), store.streams) if store.streams > 1 else None

    def leaf(self, index: int) -> bytes:
        """The bytes of a leaf."""
        return self._get(index) if self._ahead is None else self._ahead.get(index)

    def _get(self, index: int) -> bytes:
        leaf = self.store.get(self.cids[index])
        if len(leaf) != self.sizes[index]:
            raise WeightsError(
                f"{self.cid}: leaf {self.cids[index]} has {len(leaf)} bytes, "
                f"its parent says {self.sizes[index]}"
            )
        return leaf


class _Ahead:
    """Calls `get` for the indices after the one that was asked for, `streams` of them at once."""

    def __init__(self, get: Callable[[int], bytes], count: int, streams: int) -> None:
        self._get, self._count, self._streams = get, count, streams
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[int, Future[bytes]] = {}

    def get(self, index: int) -> bytes:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._streams, thread_name_prefix="fedipfs-ahead")
            wanted = range(index, min(index + 2 * self._streams, self._count))
            for stale in self._coming.keys() - set(wanted):
                self._coming.pop(stale).cancel()
            for number in wanted:
                if number not in self._coming:
                    self._coming[number] = self._pool.submit(self._get, number)
            future = self._coming.pop(index)
        return future.result()
