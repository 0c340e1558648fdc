"""The folder store: one file a block on this machine. The default, and no service to start."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fedipfs.errors import BlockCorrupt, BlockNotFound, ConfigError, StoreError
from fedipfs.ipld import CID, RAW
from fedipfs.store import gc, layout, pins
from fedipfs.store.base import MAX_BLOCK, Counters, GcReport, StoreStat, VerifyReport
from fedipfs.store.files import os_errors, sync, sync_filesystem, translated, write_whole
from fedipfs.store.options import check_flag, check_number
from fedipfs.store.usage import Cap

if TYPE_CHECKING:
    from typing_extensions import Buffer


class FolderStore:
    """A store in a folder (see layout.py); many processes and threads may use it at once.

    With `durable`, a block survives a power loss once `put` returns; without, once `flush` does
    (one sync of the file system, far cheaper than one a block). `max_bytes` caps the blocks'
    bytes, approximately when several processes write (see usage.py). With `create`, an absent or
    empty folder becomes a store. Raises StoreUnusable for anything else that is not one.
    """

    streams = 1
    shared = False

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        durable: bool = True,
        max_bytes: int | None = None,
        create: bool = True,
    ) -> None:
        if max_bytes is not None:
            check_number("max_bytes", max_bytes, least=1, most=1e18)
        check_flag("durable", durable)
        self.path = Path(path)
        self.durable = durable
        self.counters = Counters()
        layout.open_folder(self.path, create=create, durable=durable)
        self._blocks = f"{self.path}/blocks"
        self._pins = f"{self.path}/pins"
        self._cap: Cap | None = None
        if max_bytes:
            self._cap = Cap(max_bytes, lambda: self._measure()[1], str(self.path))

    def __repr__(self) -> str:
        return f"FolderStore({str(self.path)!r})"

    def put(self, block: Buffer, codec: int = RAW) -> CID:
        """Store a block of at most 2 MiB; returns its CIDv1.

        Of a block that is there already only the age is refreshed (see gc.py), unless its size
        is wrong: then it is written anew. Raises StoreFull and StoreUnusable, leaving nothing.
        """
        return self.place(block, codec)[0]

    def place(self, block: Buffer, codec: int = RAW) -> tuple[CID, bool]:
        """As `put`; and whether the block is new here."""
        size = len(block) if isinstance(block, bytes) else memoryview(block).nbytes
        if size > MAX_BLOCK:
            raise StoreError(f"block of {size} bytes: cut it into blocks of at most {MAX_BLOCK}")
        cid = CID.of(block, codec)
        path = layout.block_path(self._blocks, cid)
        try:
            new = not self._refresh(path, size)
            if new:
                if self._cap:
                    self._cap.take(size)
                write_whole(path, block, durable=self.durable)
        except OSError as error:
            raise translated(error, path) from error
        self.counters.count_put(size)
        return cid, new

    def keep(self, cid: CID, block: bytes) -> None:
        """Write a block that was checked elsewhere, also in the place of a damaged one.

        It is not counted as put. Raises StoreFull and StoreUnusable, leaving nothing.
        """
        path = layout.block_path(self._blocks, cid)
        with os_errors(path):
            if self._cap:
                self._cap.take(len(block))
            write_whole(path, block, durable=self.durable)

    def get(self, cid: CID) -> bytes:
        """A block's bytes, hashed every time. Raises BlockNotFound, BlockCorrupt."""
        path = layout.block_path(self._blocks, cid)
        try:
            block = _read(path)
        except FileNotFoundError:
            raise self._not_found(cid) from None
        except OSError as error:
            if error.errno != errno.EIO:
                raise translated(error, path) from error
            block = None
        if block is None or hashlib.sha256(block).digest() != cid.digest:
            raise BlockCorrupt(
                f"block {cid} is damaged in {path}: delete that file, then add or import again "
                "what it belongs to ('fedipfs store verify' lists all damage)"
            )
        self.counters.count_get(len(block))
        return block

    def has(self, cid: CID) -> bool:
        """Whether the store holds the block; its bytes are not read."""
        return self._size(cid) is not None

    def size(self, cid: CID) -> int:
        """Bytes of that one block, not hashed. Raises BlockNotFound."""
        size = self._size(cid)
        if size is None:
            raise self._not_found(cid)
        return size

    def pin(self, root: CID, name: str = "", *, recursive: bool = True) -> None:
        """Keep a block, and with `recursive` all it links to, from `gc`; waits while that runs.

        It stays pinned until every name it was pinned with is taken away. Raises BlockNotFound
        when the root itself is not here; what it links to is not checked.
        """
        with gc.locked(str(self.path), exclusive=False):
            if not self.has(root):
                raise self._not_found(root)
            pins.add(self._pins, root, name, recursive=recursive, durable=self.durable)

    def unpin(self, root: CID, name: str | None = None) -> None:
        """Take one name of a root away, or all; nothing happens where it has not that name."""
        pins.remove(self._pins, root, name, durable=self.durable)

    def pins(self) -> dict[CID, tuple[str, ...]]:
        """The pinned roots and their names, sorted; at least one each."""
        return {
            root: tuple(sorted({name for name, _ in names}))
            for root, names in pins.read(self._pins).items()
        }

    def flush(self) -> None:
        """Make what any process has put so far survive a power loss; at once when `durable`."""
        if not self.durable:
            with os_errors(str(self.path)):
                sync_filesystem(str(self.path))

    def ready(self) -> None:
        """Nothing: opening the folder has shown that it can be used."""

    def publish(self) -> None:
        """Nothing: who reads this folder sees what is put at once."""

    def fetch(self, root: CID) -> None:
        """Nothing: all that there is, is here."""

    def __iter__(self) -> Iterator[CID]:
        """The CIDs (version 1) of all blocks, in no order."""
        return (cid for cid, _ in self._entries())

    def gc(self, grace_s: float) -> GcReport:
        """Remove blocks that no pin leads to and that are older than `grace_s` seconds.

        Waits while another collection runs. Raises StoreUnusable.
        """
        if grace_s < 0:
            raise ConfigError(f"grace_s={grace_s} must not be negative")
        return gc.collect(self, str(self.path), lambda: pins.read(self._pins), grace_s)

    def verify(self) -> VerifyReport:
        """Read and hash every block."""
        blocks = total = 0
        damaged: list[CID] = []
        for cid in self:
            try:
                total += len(self.get(cid))
            except BlockNotFound:
                continue  # removed meanwhile
            except BlockCorrupt:
                damaged.append(cid)
            blocks += 1
        return VerifyReport(blocks, total, sorted(damaged))

    def stat(self) -> StoreStat:
        """Counts, bytes and free space now."""
        blocks, total = self._measure()
        with os_errors(str(self.path)):
            free = shutil.disk_usage(self.path).free
        if self._cap:
            free = min(free, max(self._cap.limit - total, 0))
        return StoreStat(blocks, total, len(self.pins()), free)

    def _refresh(self, path: str, size: int) -> bool:
        """Whether `path` is there with its right size; if so, it is young again."""
        try:
            os.utime(path)
            if os.stat(path).st_size != size:
                return False
            if self.durable:  # whoever wrote it may not have been
                sync(path)
                sync(os.path.dirname(path))
        except FileNotFoundError:
            return False
        return True

    def _size(self, cid: CID) -> int | None:
        path = layout.block_path(self._blocks, cid)
        try:
            return os.stat(path).st_size
        except FileNotFoundError:
            return None
        except OSError as error:
            raise translated(error, path) from error

    def _not_found(self, cid: CID) -> BlockNotFound:
        return BlockNotFound(
            f"block {cid} is not in the store {self.path}: import it, or name the store that has it"
        )

    def _entries(self) -> Iterator[tuple[CID, os.DirEntry[str]]]:
        with os_errors(self._blocks):
            for entry in layout.scan(self._blocks):
                cid = layout.cid_of(entry)
                if cid is not None:
                    yield cid, entry

    def _measure(self) -> tuple[int, int]:
        """Number and bytes of the blocks."""
        blocks = total = 0
        for _, entry in self._entries():
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                total += entry.stat().st_size
                blocks += 1
        return blocks, total


def _read(path: str) -> bytes | None:
    """A file's bytes; None for one that is too large to be a block."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(file).st_size
        if size > MAX_BLOCK:
            return None
        data = os.read(file, size)
        while len(data) < size and (more := os.read(file, size - len(data))):
            data += more
        return data
    finally:
        os.close(file)
