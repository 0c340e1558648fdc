"""The name of a data set that its content gives it, under which its privacy ledger is kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedipfs.errors import DataError

FORMAT = "fedipfs-data-set/v1"
_CHUNK_BYTES = 1 << 22


def fingerprint(inputs: NDArray[Any], targets: NDArray[Any]) -> str:
    """64 hexadecimal digits; the same records in whatever order have the same.

    `inputs` (N, ...) and `targets` (N, ...) are numbers of any dtype, the inputs and the target of
    N records. The result is SHA-256 of a header and the sorted SHA-256 digests of the records. The
    header is five lines: FORMAT; NumPy's dtype and the shape of a record's input; those of its
    target; N; nothing. A record is the bytes of input and target, little-endian, in C order.
    Whoever can guess the data can check the guess with it, so it stays at the site.
    Raises DataError for other arrays, and for none.
    """
    parts, header = [inputs, targets], [FORMAT]
    for part in parts:
        if part.dtype.kind not in "biufc" or part.ndim < 1 or part.size == 0:
            raise DataError(
                f"an array of {part.dtype} in the shape {part.shape} has no fingerprint: "
                "give numbers, a row for each record"
            )
        header.append(f"{part.dtype.newbyteorder('<').str} {part.shape[1:]}")
    if len(inputs) != len(targets):
        raise DataError(
            f"inputs {inputs.shape} and targets {targets.shape} do not pair up: give as many rows"
        )
    whole = hashlib.sha256("\n".join([*header, str(len(inputs)), ""]).encode())
    whole.update(b"".join(sorted(_digests(parts))))
    return whole.hexdigest()


def digests(inputs: NDArray[Any], targets: NDArray[Any]) -> Iterator[bytes]:
    """SHA-256 of each record, 32 bytes, in their order."""
    return _digests([inputs, targets])


def _digests(parts: list[NDArray[Any]]) -> Iterator[bytes]:
    """One of each record; copies are of a few megabytes at a time."""
    count = len(parts[0])
    size = sum(part.nbytes for part in parts) // count
    rows = max(1, _CHUNK_BYTES // size)
    for start in range(0, count, rows):
        chunk = np.hstack([_bytes(part[start : start + rows]) for part in parts])
        data = chunk.data.cast("B")
        for at in range(0, len(data), size):
            yield hashlib.sha256(data[at : at + size]).digest()


def _bytes(part: NDArray[Any]) -> NDArray[np.uint8]:
    """(n, bytes of a record) of an array of n records."""
    little = np.ascontiguousarray(part, dtype=part.dtype.newbyteorder("<"))
    return little.reshape(len(part), -1).view(np.uint8)
