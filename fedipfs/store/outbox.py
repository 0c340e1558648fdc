"""Blocks on their way to a service: gathered into batches, sent from the background."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from fedipfs.ipld import CID

BATCH = 8 << 20  # bytes of blocks sent at a time
IN_FLIGHT = 2  # batches sent at once; with the one that is filling, three are in memory
_EACH = 256  # bytes that a block counts besides its own: its CID, here and in a lease (held.py)

Batch = dict[CID, bytes]


class Outbox:
    """Calls `send(blocks)` for batches of what is added; safe to use from several threads.

    What could not be sent waits for the next `add` or `flush`; the error is raised once. A fork
    of the process has what was on its way, and sends it again when it sends.
    """

    def __init__(self, send: Callable[[list[tuple[CID, bytes]]], None]) -> None:
        self._send = send
        self._waiting: Batch = {}
        self._under_way: list[tuple[Future[None], Batch]] = []
        self._begin()
        _outboxes.add(self)

    def add(self, cid: CID, block: bytes) -> None:
        """Take a block; before that, wait for a batch to land where three are in memory.

        When that fails, the block is not taken: no more than three batches wait.
        """
        with self._turn:
            if self.get(cid) is not None:
                return
            while self._size >= BATCH:
                self._depart()
            with self._lock:
                self._waiting[cid] = block
            self._size += len(block) + _EACH

    def get(self, cid: CID) -> bytes | None:
        """A block that is still on its way."""
        with self._lock:
            batches = (self._waiting, *(batch for _, batch in self._under_way))
            return next((batch[cid] for batch in batches if cid in batch), None)

    def flush(self) -> None:
        """Wait until all that was added has been sent."""
        with self._turn:
            while self._waiting:
                self._depart()
            while self._under_way:
                self._land()

    def _begin(self) -> None:
        self._turn = threading.Lock()  # held by who may wait, and change what follows
        self._lock = threading.Lock()  # held while a block changes its place
        for _, batch in self._under_way:
            self._waiting |= batch
        self._under_way = []
        self._size = _cost(self._waiting)

    def _depart(self) -> None:
        """Send a batch of what waits, as soon as fewer than `IN_FLIGHT` are under way."""
        if len(self._under_way) == IN_FLIGHT:
            self._land()
        batch: Batch = {}
        size = 0
        for cid, block in self._waiting.items():
            if size >= BATCH:
                break
            batch[cid] = block
            size += len(block) + _EACH
        with self._lock:
            self._under_way.append((_begun(self._send, list(batch.items())), batch))
            for cid in batch:
                del self._waiting[cid]
        self._size -= size

    def _land(self) -> None:
        """Wait for the batch that departed first. If it failed, for all, and raise its error."""
        future, batch = self._under_way[0]
        problem = future.exception()
        with self._lock:
            del self._under_way[0]
            if problem is not None:
                self._waiting |= batch
        if problem is None:
            return
        self._size += _cost(batch)
        while self._under_way:
            with contextlib.suppress(Exception):
                self._land()
        try:
            raise problem
        finally:
            del problem, batch, future  # a cycle with this frame would keep the blocks


def _begun(send: Callable[[list[tuple[CID, bytes]]], None], blocks: Any) -> Future[None]:
    """What becomes of `send(blocks)`, in a thread for which a process that ends does not wait."""
    future: Future[None] = Future()
    name = "fedipfs-upload"
    threading.Thread(target=_run, args=(future, send, blocks), name=name, daemon=True).start()
    return future


def _run(future: Future[None], send: Callable[[Any], None], blocks: Any) -> None:
    try:
        send(blocks)
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(None)
    finally:
        del future, blocks  # a cycle with the error's frame would keep the blocks


def _cost(batch: Batch) -> int:
    return sum(map(len, batch.values())) + _EACH * len(batch)


def _after_fork() -> None:
    # Of the process's threads one is left, and locks stay as they were.
    for outbox in _outboxes:
        outbox._begin()


_outboxes: weakref.WeakSet[Outbox] = weakref.WeakSet()
os.register_at_fork(after_in_child=_after_fork)
