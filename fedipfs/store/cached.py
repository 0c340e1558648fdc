"""A folder in front of a service: what is here is neither fetched nor sent again."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn, Protocol

from fedipfs.errors import (
    BlockCorrupt,
    BlockNotFound,
    StoreError,
    StoreFull,
    StoreTimeout,
    StoreUnreachable,
)
from fedipfs.ipld import CID, DAG_CBOR, RAW, unixfs
from fedipfs.ipld.ahead import map_ahead
from fedipfs.store import dag
from fedipfs.store.base import Counters, GcReport, StoreStat
from fedipfs.store.folder import FolderStore

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from fedipfs.store.kubo import KuboStore

log = logging.getLogger(__name__)

_KNOWN = 1 << 18  # CIDs remembered as being at home
_STREAMS = 4  # blocks asked for at once
_REST_S = 30.0  # a source that did not answer is asked last for so long


class Source(Protocol):
    """Where blocks come from that are not in the folder."""

    counters: Counters

    def get(self, cid: CID) -> bytes: ...

    def leaves(self, root: CID) -> Iterator[tuple[CID, bytes]]:
        """A file's blocks in one stream, each checked."""
        ...


class CachedStore:
    """Reads from the folder `front`, then from `home`, then from `others` in turn.

    What is put goes into the folder and on its way to `home`; pins are `home`'s, so the folder may
    be emptied at any time (without a `home` it is where things live, and pins are its own).
    Blocks that `home` has are not sent again: frozen layers of a model cost nothing. A block that
    is damaged in the folder is replaced.
    """

    streams = 1

    def __init__(
        self, front: FolderStore, home: KuboStore | None = None, others: Sequence[Source] = ()
    ) -> None:
        self.front, self.home = front, home
        self.sources: list[Source] = [*([home] if home is not None else []), *others]
        self._counters = front.counters
        self._lock = threading.Lock()
        self._publishing = threading.Lock()
        self._at_home: set[CID] = set()
        self._unsure: set[CID] = set()  # put here, and present before: perhaps at home
        self._failed: dict[Source, float] = {}  # when a source did not answer

    def __repr__(self) -> str:
        return f"CachedStore({self.front!r}, {self.sources!r})"

    @property
    def shared(self) -> bool:
        """Whether there is a home, which others can read."""
        return self.home is not None

    @property
    def counters(self) -> Counters:
        """What was put and got here, and of that what was sent and fetched."""
        total = self._counters.copy()
        for source in self.sources:
            total.sent_blocks += source.counters.sent_blocks
            total.sent_bytes += source.counters.sent_bytes
            total.fetched_blocks += source.counters.fetched_blocks
            total.fetched_bytes += source.counters.fetched_bytes
        return total

    def put(self, block: Buffer, codec: int = RAW) -> CID:
        """Store a block of at most 2 MiB; it is on its way home when this returns."""
        try:
            cid, new = self.front.place(block, codec)
        except StoreFull:
            if self.home is None:
                raise
            cid = self.home.put(block, codec)
            self._counters.count_put(memoryview(block).nbytes)
            return cid
        if self.home is None or cid in self._at_home:
            return cid
        if new:
            self.home.put(block, codec)
            self._remember(cid)
        else:
            with self._lock:
                self._unsure.add(cid)
        return cid

    def get(self, cid: CID) -> bytes:
        """A block's bytes, hashed every time. Raises BlockNotFound, or why it cannot be had."""
        try:
            return self.front.get(cid)
        except BlockNotFound as error:
            missing: StoreError = error
        except BlockCorrupt as error:
            missing = error
            log.warning("%s; fetching it anew", error)
        block, source = self._seek(cid, missing)
        self._counters.count_get(len(block))
        try:
            self._keep(cid, block, source)
        except StoreFull as error:
            log.info("%s; the block is used but not kept", error)
        return block

    def _seek(self, cid: CID, missing: StoreError) -> tuple[bytes, Source]:
        """A block from the first source that gives it, and that source."""
        problems: list[StoreError] = [missing] if isinstance(missing, BlockCorrupt) else []
        for source in self._in_turn():
            try:
                return source.get(cid), source
            except StoreError as error:
                self._note(source, error)
                problems.append(error)
        _give_up(missing, problems)

    def _in_turn(self) -> list[Source]:
        """The sources, last those that have just not answered: each would cost its timeout."""
        since = time.monotonic() - _REST_S
        return sorted(self.sources, key=lambda source: self._failed.get(source, since) > since)

    def _note(self, source: Source, error: StoreError) -> None:
        if isinstance(error, StoreUnreachable | StoreTimeout):
            self._failed[source] = time.monotonic()

    def has(self, cid: CID) -> bool:
        """Whether the folder or home holds the block."""
        return self.front.has(cid) or (self.home is not None and self.home.has(cid))

    def size(self, cid: CID) -> int:
        """Bytes of that one block. Raises BlockNotFound."""
        if self.home is None or self.front.has(cid):
            return self.front.size(cid)
        return self.home.size(cid)

    def fetch(self, root: CID) -> None:
        """Bring the blocks of a file here that are not: all at once, or only those missing.

        As many as the folder may hold.
        """
        if root.codec == DAG_CBOR or not self.sources:
            return
        leaves = {cid for cid, _ in unixfs.leaf_links(root, self.get)}
        missing = self._missing(leaves)
        try:
            if root.codec != RAW and len(missing) == len(leaves):
                self._stream(root)
                missing = self._missing(leaves)
            for _ in map_ahead(self._bring, missing, _STREAMS):
                pass
        except StoreFull as error:
            log.warning("%s; what is missing is fetched each time that it is read", error)

    def _missing(self, leaves: set[CID]) -> list[CID]:
        return sorted(cid for cid in leaves if not self.front.has(cid))

    def _bring(self, cid: CID) -> None:
        self._keep(cid, *self._seek(cid, BlockNotFound(f"block {cid} is in no source")))

    def _stream(self, root: CID) -> None:
        """A file of which no leaf is here, as one stream from the first source that has it."""
        for source in self._in_turn():
            came = False
            try:
                for cid, block in source.leaves(root):
                    self._keep(cid, block, source)
                    came = True
                return
            except StoreFull:
                raise
            except StoreError as error:
                log.info("%s", error)
                self._note(source, error)
                if came:
                    return  # the rest is fetched block by block

    def _keep(self, cid: CID, block: bytes, source: Source) -> None:
        if source is self.home:
            self._remember(cid)
        self.front.keep(cid, block)

    def _remember(self, cid: CID) -> None:
        with self._lock:
            if len(self._at_home) >= _KNOWN:
                self._at_home.clear()
            self._at_home.add(cid)

    def publish(self) -> None:
        """Wait until home has all that was put; raises what went wrong with any of it."""
        if self.home is None:
            return
        with self._publishing:  # who comes second waits for what the first has taken over
            self._publish(self.home)

    def _publish(self, home: KuboStore) -> None:
        with self._lock:
            unsure, self._unsure = self._unsure, set()
        try:
            asked = map_ahead(lambda cid: (cid, self._is_home(cid)), sorted(unsure), _STREAMS)
            for cid, there in asked:
                if not there:
                    home.put(self.front.get(cid), cid.codec)
                self._remember(cid)
            home.publish()
        except BaseException:
            with self._lock:  # nothing is certain: the next call looks again
                self._unsure |= unsure
                self._at_home.clear()
            raise

    def _is_home(self, cid: CID) -> bool:
        assert self.home is not None
        return cid in self._at_home or self.home.has(cid)

    def ready(self) -> None:
        """Raise what keeps home from being written."""
        if self.home is not None:
            self.home.ready()

    def flush(self) -> None:
        """Make everything put so far survive a power loss: at home, where there is one."""
        if self.home is None:
            self.front.flush()
        else:
            self.publish()

    def pin(self, root: CID, name: str = "", *, recursive: bool = True) -> None:
        """Keep a block, and with `recursive` all it links to, as long as it has any name.

        What home has lost meanwhile, to its garbage collection, is sent again.
        """
        if self.home is None:
            self.front.pin(root, name, recursive=recursive)
            return
        self.publish()
        try:
            self.home.pin(root, name, recursive=recursive)
        except (BlockNotFound, StoreTimeout) as error:
            log.warning("%s; sending what it lacks from %s", error, self.front.path)
            for cid in dag.walk(self, root) if recursive else [root]:
                if self.front.has(cid) and not self.home.has(cid):
                    self.home.put(self.front.get(cid), cid.codec)
            self.home.pin(root, name, recursive=recursive)

    def unpin(self, root: CID, name: str | None = None) -> None:
        """Take one name of a root away, or all; nothing happens where it has not that name."""
        (self.home or self.front).unpin(root, name)

    def pins(self) -> dict[CID, tuple[str, ...]]:
        """The pinned roots and their names, sorted; at least one each."""
        return (self.home or self.front).pins()

    def gc(self, grace_s: float) -> GcReport:
        """Collect at home and in the folder; `grace_s` as each of them takes it."""
        here = self.front.gc(grace_s)
        if self.home is None:
            return here
        there = self.home.gc(grace_s)
        self._at_home.clear()
        return GcReport(
            here.removed + there.removed,
            here.removed_bytes + there.removed_bytes,
            here.kept + there.kept,
            [*here.missing, *there.missing],
            here.complete and there.complete,
        )

    def stat(self) -> StoreStat:
        """Of home, where there is one."""
        return (self.home or self.front).stat()


def _give_up(missing: StoreError, problems: list[StoreError]) -> NoReturn:
    """The most telling of what went wrong: a service that failed before one that has it not."""
    if not problems:
        raise missing
    told = "; ".join(str(problem) for problem in problems)
    worst = next((p for p in problems if not isinstance(p, BlockNotFound)), problems[0])
    raise type(worst)(told)
