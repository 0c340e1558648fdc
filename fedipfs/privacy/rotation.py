"""Random signs, then a Walsh-Hadamard transform: a public rotation that evens out coordinates.

Without it, a sum of n clipped updates may have one coordinate as large as n times the clipping
norm, and integers modulo 2^32 must leave room for that. Rotated, each coordinate is a signed sum of
a whole block's values and small beside the norm whatever the update (Kairouz, Liu and Steinke 2021,
"The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure Aggregation",
section 4.2), so the same integers carry more clients or finer steps. Privacy does not rest on it:
the signs are public, and lengths are kept.

The matrix is block-diagonal, in blocks of 2^14 values. Flattening needs no more: the bound falls
with the root of the block's length, and the factor of 14 that such a block buys is already more
than the headroom needs. In return the padding stays below 2^14 values, where one transform of a
whole vector pads to the next power of two, up to twice as many to mask and send; and a block's
two multiplications by a 128 x 128 Hadamard matrix stay in the cache.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import numpy as np
from scipy.linalg import hadamard

SEED_BYTES = 32
MOST_BLOCK = 1 << 14


def block(dimension: int) -> int:
    """Length of the blocks in which `dimension` values are rotated: a power of two."""
    return min(MOST_BLOCK, 1 << max(0, dimension - 1).bit_length())


def padded(dimension: int) -> int:
    """How many values `dimension` values are once rotated: whole blocks."""
    length = block(dimension)
    return -(-dimension // length) * length


def rotate(values: np.ndarray, seed: bytes) -> np.ndarray:
    """`values` (d,) float32 or float64, rotated: (padded(d),) of the same dtype and length (L2)."""
    rotated = np.zeros(padded(values.size), values.dtype)
    rotated[: values.size] = values
    rotated *= _signs(seed, rotated.size, values.dtype)
    _transform(rotated, block(values.size))
    return rotated


def unrotate(rotated: np.ndarray, seed: bytes, dimension: int) -> np.ndarray:
    """The (dimension,) values that `rotate` made (padded(dimension),) `rotated` of, same dtype."""
    if rotated.shape != (padded(dimension),):
        raise ValueError(f"{dimension} rotated values come as {padded(dimension)}: {rotated.shape}")
    values = rotated.copy()
    _transform(values, block(dimension))
    values *= _signs(seed, values.size, values.dtype)
    return values[:dimension]


def _signs(seed: bytes, size: int, dtype: np.dtype) -> np.ndarray:
    """1 or -1, from the bits of SHAKE-256 of the seed: the same on every machine and version."""
    if len(seed) != SEED_BYTES:
        raise ValueError(f"a rotation's seed has {SEED_BYTES} bytes, not {len(seed)}")
    drawn = hashlib.shake_256(b"fedipfs rotation 1" + seed).digest(-(-size // 8))
    bits = np.unpackbits(np.frombuffer(drawn, np.uint8), count=size)
    return 1 - 2 * bits.astype(dtype)


def _transform(values: np.ndarray, length: int) -> None:
    """Multiply each block, in place, by the orthonormal Hadamard matrix: its own inverse.

    That of 2^(a+b) values is the Kronecker product of those of 2^a and 2^b, so a block, seen as a
    matrix of 2^a rows, is multiplied from both sides.
    """
    rows = 1 << (length.bit_length() - 1) // 2
    columns = length // rows
    left, right = _hadamard(rows, values.dtype), _hadamard(columns, values.dtype)
    for at in range(0, values.size, length):
        part = values[at : at + length].reshape(rows, columns)
        part[:] = left @ part @ right


@lru_cache(maxsize=32)
def _hadamard(size: int, dtype: np.dtype) -> np.ndarray:
    """(size, size), symmetric, orthonormal."""
    return np.asarray(hadamard(size) / math.sqrt(size), dtype)
