"""IDX, the format of the MNIST files: two zero bytes, a type byte, the number of dimensions,
each dimension as a big-endian uint32, then the values in row-major order
(http://yann.lecun.com/exdb/mnist/, "The IDX file format"). Unsigned bytes only, plain or gzip.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from io import BufferedIOBase
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedipfs.errors import DataError

UNSIGNED_BYTE = 0x08
# Eight times MNIST's training images: room for larger sets, an end to decompression bombs.
MAX_BYTES = 8 * 47_040_016


def parse(stream: BufferedIOBase, name: str, *, max_bytes: int = MAX_BYTES) -> NDArray[np.uint8]:
    """The array in an IDX stream; `name` is what messages call it.

    Raises DataError for anything but one whole array of unsigned bytes.
    """
    start = stream.read(4)
    if len(start) < 4 or start[:2] != b"\0\0":
        raise DataError(f"{name} is not an IDX file (it begins with {start.hex() or 'nothing'})")
    kind, dimensions = start[2], start[3]
    if kind != UNSIGNED_BYTE or not 1 <= dimensions <= 4:
        raise DataError(
            f"{name} holds type 0x{kind:02x} in {dimensions} dimensions;"
            " unsigned bytes (0x08) in 1 to 4 are expected"
        )
    header = stream.read(4 * dimensions)
    if len(header) < 4 * dimensions:
        raise DataError(f"{name} is cut short within its header")
    shape = struct.unpack(f">{dimensions}I", header)
    size = 1
    for length in shape:
        size *= length
    if size > max_bytes:
        raise DataError(f"{name} declares {size} bytes of values; at most {max_bytes} are read")
    values = np.empty(size, dtype=np.uint8)
    filled, view = 0, values.data
    while filled < size and (count := stream.readinto(view[filled:])):
        filled += count
    if filled < size:
        raise DataError(f"{name} is cut short: {filled} of {size} bytes; fetch it again")
    if stream.read(1):
        raise DataError(f"{name} goes on after its {size} bytes of values; fetch it again")
    return values.reshape(shape)


def read(path: Path) -> NDArray[np.uint8]:
    """The array in the IDX file at `path`, decompressed first if it begins as gzip does.

    Raises DataError, naming the file, where it cannot be read or is not what it should be.
    """
    try:
        with open(path, "rb") as stream:
            packed = stream.read(2) == b"\x1f\x8b"
            stream.seek(0)
            if not packed:
                return parse(stream, str(path))
            with gzip.GzipFile(fileobj=stream) as plain:
                return parse(plain, str(path))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch it again") from error
