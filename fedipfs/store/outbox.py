"""Blocks on their way to a service: gathered into batches, sent from the background."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from fedipfs.ipld import CID

BATCH = 8 << 20  # bytes of blocks sent at a time
IN_FLIGHT = 2  # batches sent at once; with the one that is filling, three are in memory

Blocks = list[tuple[CID, bytes]]


class Outbox:
    """Calls `send(blocks)` for batches of what is added; safe to use from several threads.

    A batch that could not be sent waits for the next `add` or `flush`; its error is raised once.
    """

    def __init__(self, send: Callable[[Blocks], None]) -> None:
        self._send = send
        self._lock = threading.Lock()
        self._filling: dict[CID, bytes] = {}
        self._size = 0
        self._under_way: list[tuple[Future[None], dict[CID, bytes]]] = []
        self._pool: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def add(self, cid: CID, block: bytes) -> None:
        """Take a block; waits while `IN_FLIGHT` batches are under way and a third is full."""
        with self._lock:
            if cid in self._filling:
                return
            self._filling[cid] = block
            self._size += len(block)
            if self._size >= BATCH:
                while len(self._under_way) >= IN_FLIGHT:
                    self._land()
                self._depart()

    def get(self, cid: CID) -> bytes | None:
        """A block that is still on its way."""
        batches = [batch for _, batch in list(self._under_way)]
        return next((batch[cid] for batch in (*batches, self._filling) if cid in batch), None)

    def flush(self) -> None:
        """Wait until all that was added has been sent."""
        with self._lock:
            if self._filling:
                self._depart()
            while self._under_way:
                self._land()

    def _depart(self) -> None:
        if self._pool is None or self._process != os.getpid():  # threads do not survive a fork
            self._pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="fedipfs-upload")
            self._process = os.getpid()
        batch, self._filling, self._size = self._filling, {}, 0
        self._under_way.append((self._pool.submit(self._send, list(batch.items())), batch))

    def _land(self) -> None:
        future, batch = self._under_way[0]
        try:
            future.result()
        except BaseException:
            self._filling = {**batch, **self._filling}
            self._size = sum(map(len, self._filling.values()))
            raise
        finally:
            self._under_way.pop(0)
