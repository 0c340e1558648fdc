"""Blocks on their way: batches, failures, threads and forks."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable

import pytest

from fedipfs.errors import StoreUnreachable
from fedipfs.ipld import CID
from fedipfs.store.outbox import BATCH, IN_FLIGHT, Outbox


class Sink:
    """Where batches go; each waits for `gate`, and fails while `broken`."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[CID, bytes]]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.broken = False
        self.now = self.most = 0
        self._lock = threading.Lock()

    def __call__(self, blocks: list[tuple[CID, bytes]]) -> None:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        self.gate.wait(10)
        with self._lock:
            self.now -= 1
            if self.broken:
                raise StoreUnreachable("down")
            self.batches.append(blocks)

    @property
    def blocks(self) -> dict[CID, bytes]:
        return {cid: block for batch in self.batches for cid, block in batch}


def blocks_of(count: int, size: int, seed: int = 0) -> dict[CID, bytes]:
    source = random.Random(seed)
    made = [source.randbytes(size) for _ in range(count)]
    return {CID.of(block): block for block in made}


def add_all(outbox: Outbox, blocks: dict[CID, bytes]) -> None:
    for cid, block in blocks.items():
        outbox.add(cid, block)


def in_thread(call: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_flush_sends_what_was_added_once() -> None:
    sink = Sink()
    outbox = Outbox(sink)
    outbox.flush()
    assert sink.batches == []
    blocks = blocks_of(10, 100)
    add_all(outbox, blocks)
    add_all(outbox, blocks)
    assert sink.batches == []  # together, when they are many or when it is time
    outbox.flush()
    outbox.flush()
    assert sink.batches == [list(blocks.items())]


def test_batches_leave_by_themselves_and_are_bounded() -> None:
    sink = Sink()
    outbox = Outbox(sink)
    blocks = blocks_of(50, 1 << 20)
    add_all(outbox, blocks)
    outbox.flush()
    assert sink.blocks == blocks and sink.most <= IN_FLIGHT
    sizes = [sum(len(block) for _, block in batch) for batch in sink.batches]
    assert len(sizes) == 7 and max(sizes) <= BATCH + (2 << 20)


def test_tiny_blocks_do_not_make_huge_batches() -> None:
    sink = Sink()
    outbox = Outbox(sink)
    blocks = {CID(1, 0x55, number.to_bytes(32, "big")): b"" for number in range(100_000)}
    add_all(outbox, blocks)
    outbox.flush()
    assert sink.blocks == blocks
    # A link takes 41 bytes in the lease that goes along, and a block holds 2 MiB.
    assert max(map(len, sink.batches)) * 41 < 2 << 20


def test_adding_waits_while_too_much_is_in_memory() -> None:
    sink = Sink()
    sink.gate.clear()
    outbox = Outbox(sink)
    done: list[CID] = []

    def add() -> None:
        for cid, block in blocks_of(64, 1 << 20).items():
            outbox.add(cid, block)
            done.append(cid)

    thread = in_thread(add)
    wait_until(lambda: len(done) >= IN_FLIGHT * 8 + 7)
    time.sleep(0.1)
    assert len(done) <= (IN_FLIGHT + 1) * 8  # and no more go in
    assert sink.now == IN_FLIGHT
    sink.gate.set()
    thread.join(10)
    outbox.flush()
    assert len(sink.blocks) == 64


def test_blocks_can_be_read_wherever_they_are() -> None:
    """Each block at any moment, while others move it from hand to hand and back."""
    sink = Sink()
    sink.broken = True
    outbox = Outbox(sink)
    blocks = blocks_of(40, 1 << 20)
    cids = list(blocks)[:16]
    for cid in cids:
        outbox.add(cid, blocks[cid])
    missed: list[CID] = []
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            missed.extend(cid for cid in cids if outbox.get(cid) != blocks[cid])

    readers = [in_thread(read) for _ in range(3)]
    for _ in range(100):
        with pytest.raises(StoreUnreachable):
            outbox.flush()
    ended.set()
    for reader in readers:
        reader.join(10)
    assert missed == []
    sink.broken = False
    outbox.flush()
    assert set(sink.blocks) == set(cids) and outbox.get(cids[0]) is None


def test_an_error_is_raised_once_for_all_that_failed() -> None:
    sink = Sink()
    sink.broken = True
    outbox = Outbox(sink)
    blocks = blocks_of(20, 1 << 20)
    add_all(outbox, blocks)
    with pytest.raises(StoreUnreachable):
        outbox.flush()
    sink.broken = False
    outbox.flush()
    assert sink.blocks == blocks


def test_in_an_outage_adding_fails_and_takes_nothing_more() -> None:
    sink = Sink()
    sink.broken = True
    outbox = Outbox(sink)
    taken: dict[CID, bytes] = {}
    failed = 0
    for cid, block in blocks_of(100, 1 << 20).items():
        try:
            outbox.add(cid, block)
            taken[cid] = block
        except StoreUnreachable:
            failed += 1
            assert outbox.get(cid) is None
    assert failed > 70 and len(taken) <= (IN_FLIGHT + 1) * 8
    sink.broken = False
    outbox.flush()
    assert sink.blocks == taken


def test_threads_share_one() -> None:
    sink = Sink()
    outbox = Outbox(sink)
    blocks = [blocks_of(60, 100_000, seed) for seed in range(8)]

    def work(mine: dict[CID, bytes]) -> None:
        add_all(outbox, mine)
        outbox.flush()
        assert set(mine) <= set(sink.blocks)

    threads = [in_thread(lambda mine=mine: work(mine)) for mine in blocks]  # type: ignore[misc]
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert len(sink.blocks) == 480 and sum(map(len, sink.batches)) == 480


def test_a_flush_waits_for_what_another_thread_sends() -> None:
    sink = Sink()
    sink.gate.clear()
    outbox = Outbox(sink)
    blocks = blocks_of(3, 100)
    add_all(outbox, blocks)
    first = in_thread(outbox.flush)
    wait_until(lambda: sink.now == 1)
    second = in_thread(outbox.flush)
    time.sleep(0.05)
    assert second.is_alive()
    sink.gate.set()
    second.join(5)
    first.join(5)
    assert sink.blocks == blocks and len(sink.batches) == 1


def test_a_fork_sends_what_was_on_its_way() -> None:
    sink = Sink()
    sink.gate.clear()
    outbox = Outbox(sink)
    blocks = blocks_of(20, 1 << 20)
    add_all(outbox, blocks)  # two batches are under way, a third waits
    wait_until(lambda: sink.now == IN_FLIGHT)
    flushing = in_thread(outbox.flush)  # holds the lock, in a thread that the child has not
    time.sleep(0.05)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            mine = Sink()
            outbox._send = mine
            if all(outbox.get(cid) == block for cid, block in blocks.items()):
                outbox.add(CID.of(b"more"), b"more")
                outbox.flush()
                code = 0 if mine.blocks == {**blocks, CID.of(b"more"): b"more"} else 2
        finally:
            os._exit(code)
    assert _wait(child) == 0
    sink.gate.set()
    flushing.join(10)
    assert sink.blocks == blocks


def _wait(child: int) -> int:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise AssertionError("the child hangs")
