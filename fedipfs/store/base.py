"""What a block store does, whatever is behind it, and what it reports."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from fedipfs.ipld import CID, RAW

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAX_BLOCK = 2 << 20  # bytes; larger blocks do not travel between IPFS nodes


@dataclass
class Counters:
    """Blocks and bytes that one store object has put and got, present blocks put again included.

    Of these, `sent` and `fetched` went to and came from a service; a folder sends and fetches none.
    """

    put_blocks: int = 0
    put_bytes: int = 0
    get_blocks: int = 0
    get_bytes: int = 0
    sent_blocks: int = 0
    sent_bytes: int = 0
    fetched_blocks: int = 0
    fetched_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def count_put(self, size: int) -> None:
        with self._lock:
            self.put_blocks += 1
            self.put_bytes += size

    def count_get(self, size: int) -> None:
        with self._lock:
            self.get_blocks += 1
            self.get_bytes += size

    def count_sent(self, blocks: int, size: int) -> None:
        with self._lock:
            self.sent_blocks += blocks
            self.sent_bytes += size

    def count_fetched(self, size: int) -> None:
        with self._lock:
            self.fetched_blocks += 1
            self.fetched_bytes += size

    def copy(self) -> Counters:
        """The counts now; they do not change when this store's do."""
        with self._lock:
            return replace(self, _lock=threading.Lock())


class Store(Protocol):
    """Blocks by CID, and pins. Safe to use from several threads.

    Methods raise StoreUnusable when the store cannot be written, and, of a store that is a service,
    StoreUnreachable, StoreTimeout and StoreBadAnswer.
    """

    @property
    def counters(self) -> Counters:
        """What has passed; `copy` it to compare with later."""
        ...

    @property
    def streams(self) -> int:
        """How many blocks it pays to get at once."""
        ...

    @property
    def shared(self) -> bool:
        """Whether others than this machine's users can read what is put."""
        ...

    def ready(self) -> None:
        """Raise what keeps the store from being written, at once: nothing is tried again."""
        ...

    def put(self, block: Buffer, codec: int = RAW) -> CID:
        """Store a block of at most 2 MiB; returns its CIDv1. Raises StoreFull."""
        ...

    def get(self, cid: CID) -> bytes:
        """A block's bytes, hashed every time. Raises BlockNotFound, BlockCorrupt."""
        ...

    def has(self, cid: CID) -> bool:
        """Whether the store holds the block; its bytes are not read."""
        ...

    def size(self, cid: CID) -> int:
        """Bytes of that one block, not hashed. Raises BlockNotFound."""
        ...

    def pin(self, root: CID, name: str = "", *, recursive: bool = True) -> None:
        """Keep a block, and with `recursive` all it links to, for as long as it has any name.

        Names are any text; a root may have several. Raises BlockNotFound without the root.
        """
        ...

    def unpin(self, root: CID, name: str | None = None) -> None:
        """Take one name of a root away, or all; nothing happens where it has not that name."""
        ...

    def pins(self) -> dict[CID, tuple[str, ...]]:
        """The pinned roots and their names, sorted; at least one each."""
        ...

    def flush(self) -> None:
        """Make everything put so far survive a power loss."""
        ...

    def publish(self) -> None:
        """Hand what was put to where others read it; CIDs may be given to others after that."""
        ...

    def fetch(self, root: CID) -> None:
        """Bring a file's or a record's blocks near, where that makes reading them quicker."""
        ...


@dataclass(frozen=True, slots=True)
class StoreStat:
    """`free` is what can still be put: bytes left on the disk, or below the cap if that is less.

    `pins` counts pinned roots, however many names they have.
    """

    blocks: int
    bytes: int
    pins: int
    free: int


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Blocks read, the bytes of the whole ones, and the CIDs of the damaged ones."""

    blocks: int
    bytes: int
    damaged: list[CID]


@dataclass(frozen=True, slots=True)
class GcReport:
    """What a garbage collection did.

    `missing` names blocks below a pin that are absent or damaged. When one of them could link to
    others, what it linked to is unknown: then `complete` is false and no block was removed.
    """

    removed: int
    removed_bytes: int
    kept: int
    missing: list[CID]
    complete: bool
