"""Codecs that send a share of all coordinates: the largest, or random ones.

Coordinates are counted through all floating-point tensors of the model, in the order of the file.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np

from fedipfs.errors import BadPayload, CompressionError
from fedipfs.weights.compression.spec import Spec
from fedipfs.weights.layout import DTYPES

VALUES = ("F16", "F32")
GAPS = ("U8", "U16", "U32")
MOST = 1 << 31  # coordinates sent: their gaps then add up within 64 bits

_GROUP = 1024  # coordinates after which an index is kept
_F16_LEAST, _F16_MOST = 2.0**-16, 65504.0  # largest values that float16 holds to 0.2 % of them


class Chosen(NamedTuple):
    """Coordinates that are sent, strictly increasing, and their values."""

    indices: np.ndarray  # int64
    values: np.ndarray


def top(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest magnitudes, zeros left out; of equal ones the first.

    Aji and Heafield 2017, "Sparse Communication for Distributed Gradient Descent".
    """
    sizes = np.abs(values)
    if count < sizes.size:
        least = np.partition(sizes, sizes.size - count)[sizes.size - count]
    else:
        least = sizes.dtype.type(0)
    chosen = np.flatnonzero(sizes > least)
    if least:
        ties = np.flatnonzero(sizes == least)[: count - chosen.size]
        chosen = np.sort(np.concatenate([chosen, ties]))
    return chosen


def strata(
    elements: int, count: int, first: int = 0, last: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """First index and length of `count` consecutive strata that differ in length by one at most.

    Of the strata `first` to below `last`, all by default.
    """
    length, longer = divmod(elements, count)
    number = np.arange(first, count if last is None else last, dtype=np.int64)
    return number * length + np.minimum(number, longer), length + (number < longer)


def stratum(elements: int, count: int, index: int) -> int:
    """The number of the stratum that `index` lies in."""
    length, longer = divmod(elements, count)
    after = index - longer * (length + 1)
    return index // (length + 1) if after < 0 else longer + after // length


def drawn(
    elements: int, count: int, seed: int, first: int = 0, last: int | None = None
) -> np.ndarray:
    """One index out of each stratum, by SplitMix64 from `seed` (Steele et al. 2014, figure 17).

    Every coordinate of a stratum is as likely: rand-k (Stich et al. 2018, "Sparsified SGD with
    Memory", section 2.2) with less variance, and sorted. Those of the strata `first` to below
    `last`, all by default.
    """
    last = count if last is None else last
    starts, lengths = strata(elements, count, first, last)
    z = np.arange(first + 1, last + 1, dtype=np.uint64)
    z = z * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return starts + (z % lengths.astype(np.uint64)).astype(np.int64)


def encode(spec: Spec, values: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Parts and metadata of flat, finite floats.

    `randk` without feedback multiplies each value by its stratum's length, so that what arrives
    is right on average; with feedback it sends the values as they are.
    """
    count, metadata = spec.count(values.size), {}
    if count >= MOST:
        raise CompressionError(f"{spec} sends {count} coordinates; fewer than {MOST} are possible")
    parts: dict[str, np.ndarray] = {}
    if spec.codec == "topk":
        indices = top(values, count)
        gaps = np.diff(indices, prepend=-1) - 1
        code = next((c for c in GAPS if gaps.max(initial=0) <= np.iinfo(DTYPES[c]).max), None)
        if code is None:
            raise CompressionError("two coordinates lie 2**32 apart; choose a larger fraction")
        parts["gaps"] = gaps.astype(DTYPES[code])
        metadata["gaps"] = code
        picked = values[indices]
    else:
        seed = int.from_bytes(hashlib.sha256(values.view(np.uint8).data).digest()[:8], "little")
        metadata["seed"] = str(seed)
        indices = drawn(values.size, count, seed) if count else np.zeros(0, np.int64)
        picked = values[indices]
        if not spec.feedback and count:
            picked = picked * strata(values.size, count)[1]
    largest = np.abs(picked).max(initial=0)
    code = "F16" if _F16_LEAST <= largest <= _F16_MOST else "F32"
    with np.errstate(over="ignore"):
        parts["values"] = picked.astype(DTYPES[code])
    if not np.isfinite(parts["values"]).all():
        raise CompressionError(f"a value of {largest:.3g} is beyond float32")
    metadata |= {"count": str(indices.size), "values": code}
    return parts, metadata


class Sent:
    """The coordinates that a payload sends, as narrow as it holds them, looked up by range.

    `topk`: `gaps` counts those left out before each; the index of the last of every 1024 is kept
    beside, in 8 bytes. `randk`: they are drawn again. BadPayload for one beyond `elements`.
    """

    def __init__(
        self, spec: Spec, elements: int, seed: int, gaps: np.ndarray, values: np.ndarray
    ) -> None:
        self._elements, self._seed, self._gaps, self._values = elements, seed, gaps, values
        self._drawn = spec.codec == "randk"
        if not self._drawn:
            groups = (gaps[at : at + _GROUP] for at in range(0, gaps.size, _GROUP))
            lengths = [int(group.sum(dtype=np.int64)) + group.size for group in groups]
            self._ends = np.cumsum(np.array(lengths, np.int64)) - 1
            if gaps.size and self._ends[-1] >= elements:
                raise BadPayload(f"coordinate {self._ends[-1]} of a model that has {elements}")

    def between(self, start: int, stop: int) -> Chosen:
        """Those from `start` to below `stop`."""
        if start >= stop or not self._values.size:
            return Chosen(np.zeros(0, np.int64), self._values[:0])
        if self._drawn:
            elements, count = self._elements, self._values.size
            at = stratum(elements, count, start)
            end = stratum(elements, count, stop - 1) + 1
            indices = drawn(elements, count, self._seed, at, end)
        else:
            first, last = np.searchsorted(self._ends, [start, stop - 1]).tolist()
            at, end = first * _GROUP, (last + 1) * _GROUP
            before = int(self._ends[first - 1]) if first else -1
            indices = np.cumsum(self._gaps[at:end].astype(np.int64) + 1) + before
        low, high = np.searchsorted(indices, [start, stop]).tolist()
        return Chosen(indices[low:high], self._values[at + low : at + high])
