"""Masks: AES-256 in counter mode (NIST SP 800-38A), added to vectors of uint32 modulo 2**32.

A mask's key is used for one vector only, so the counter starts at zero. Words are little-endian.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

TILE = 1 << 15  # words: key stream and vector of a tile stay in a core's cache

_ZEROS = memoryview(bytes(4 * TILE))


def buffer() -> bytearray:
    """Room for a tile of key stream, and for the block more that `update_into` asks for."""
    return bytearray(4 * TILE + 15)


class Keystream:
    """The words of one key (32 bytes), a tile at a time, in a buffer that others may share."""

    def __init__(self, key: bytes, room: bytearray) -> None:
        self._cipher = Cipher(AES256(key), CTR(bytes(16))).encryptor()
        self._buffer = room

    def words(self, count: int) -> np.ndarray:
        """The next `count` words, at most TILE: uint32, good until the buffer is used again.

        After fewer than TILE words, call it no more.
        """
        self._cipher.update_into(_ZEROS[: 4 * count], self._buffer)
        return np.frombuffer(self._buffer, "<u4", count)


def apply(vector: np.ndarray, add: Iterable[bytes] = (), subtract: Iterable[bytes] = ()) -> None:
    """Add and subtract the masks of these keys (32 bytes each), in place.

    `vector` is flat, contiguous uint32 of any length. All masks of a tile are done before the next
    tile: the vector crosses memory once.
    """
    if vector.dtype != np.uint32 or vector.ndim != 1 or not vector.flags.c_contiguous:
        raise ValueError(f"masks go on a flat vector of uint32, not {vector.dtype} {vector.shape}")
    room = buffer()
    added = [Keystream(key, room) for key in add]
    subtracted = [Keystream(key, room) for key in subtract]
    for start in range(0, len(vector), TILE):
        tile = vector[start : start + TILE]
        for stream in added:
            np.add(tile, stream.words(len(tile)), out=tile)
        for stream in subtracted:
            np.subtract(tile, stream.words(len(tile)), out=tile)
