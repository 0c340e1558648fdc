"""Sealing and opening against plain AES-GCM over the same chunks, and against SHA-256.

`python benchmarks/sealing.py`. All take turns, so a busy moment hits each of them; chunks are
used as they come and not kept.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Iterable

from _common import row, timed, title
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedipfs.trust import Identity, Opener, PublicIdentity, open_stream, seal
from fedipfs.trust.envelope import CHUNK, PLAIN

SIZE = 50_000_000  # bytes
REPEATS = 15
RECIPIENTS = 10
GOAL = 1.0  # GB/s
PEAK = 8 * CHUNK  # bytes


def main() -> None:
    """Measure and print."""
    identity = Identity.new("measured")
    recipients = [identity.public, *(Identity.new("other").public for _ in range(RECIPIENTS - 1))]
    content = os.urandom(SIZE)
    seconds = measure(content, recipients, identity)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    title(f"{SIZE // 10**6} MB to {RECIPIENTS} recipients", f"median of {REPEATS}, one thread")
    for name, against in (
        ("seal", "AESGCM.encrypt"),
        ("open, a stream", "AESGCM.decrypt"),
        ("open, chunk by chunk", "AESGCM.decrypt"),
    ):
        speed = SIZE / medians[name] / 1e9
        row(f"{name}, GB/s", f"{speed:.2f}", f">= {GOAL}", speed >= GOAL)
        row(f"  speed of {against} alone", f"{medians[against] / medians[name]:.2f}x")
        row("  speed of hashlib.sha256", f"{medians['hashlib.sha256'] / medians[name]:.2f}x")
    for name in ("AESGCM.encrypt", "AESGCM.decrypt", "hashlib.sha256"):
        row(f"{name}, GB/s", f"{SIZE / medians[name] / 1e9:.2f}")
    row(f"1 kB to {RECIPIENTS} recipients: seal, ms", f"{medians['small seal'] * 1000:.2f}")
    row("  open, ms", f"{medians['small open'] * 1000:.2f}")
    for count in (16, 256):
        peak = peak_memory(count, recipients, identity)
        row(
            f"peak memory, {count} MiB sealed and opened",
            f"{peak / CHUNK:.1f} MiB",
            "<= 8",
            peak <= PEAK,
        )


def measure(
    content: bytes, recipients: list[PublicIdentity], identity: Identity
) -> dict[str, list[float]]:
    """Seconds of every way, in turns; the first turn only warms up."""
    cipher, nonce, bound = AESGCM(os.urandom(32)), bytes(12), bytes(32)
    plain = [memoryview(content)[at : at + PLAIN] for at in range(0, SIZE, PLAIN)]
    ciphered = [cipher.encrypt(nonce, chunk, bound) for chunk in plain]
    header, *chunks = seal([content], recipients, identity.public)
    small = list(seal([content[:1000]], recipients, identity.public))
    last = len(chunks) - 1

    def open_chunks() -> None:
        opener = Opener(header, identity)
        for index, chunk in enumerate(chunks):
            opener.open(index, chunk, last=index == last)

    ways: dict[str, Callable[[], None]] = {
        "seal": lambda: use(seal([content], recipients, identity.public)),
        "open, a stream": lambda: use(open_stream([header, *chunks], identity)),
        "open, chunk by chunk": open_chunks,
        "AESGCM.encrypt": lambda: use(cipher.encrypt(nonce, chunk, bound) for chunk in plain),
        "AESGCM.decrypt": lambda: use(cipher.decrypt(nonce, chunk, bound) for chunk in ciphered),
        "hashlib.sha256": lambda: use(hashlib.sha256(chunk).digest() for chunk in plain),
        "small seal": lambda: use(seal([content[:1000]], recipients, identity.public)),
        "small open": lambda: use(open_stream(small, identity)),
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    for turn in range(REPEATS + 1):
        for name, way in ways.items():
            taken = timed(way)
            if turn:
                seconds[name].append(taken)
    return seconds


def use(chunks: Iterable[bytes]) -> None:
    """Take every chunk and keep none."""
    for _ in chunks:
        pass


def peak_memory(count: int, recipients: list[PublicIdentity], identity: Identity) -> int:
    """The most bytes that sealing and opening `count` MiB hold at a time."""
    piece = os.urandom(CHUNK)
    tracemalloc.start()
    blocks = seal((piece for _ in range(count)), recipients, identity.public)
    use(open_stream(blocks, identity))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


if __name__ == "__main__":
    main()
