"""Unsigned varints (multiformats unsigned-varint spec): LEB128, shortest form, at most 63 bits."""

from __future__ import annotations

from typing import Any

from fedipfs.errors import FormatError

MAX = (1 << 63) - 1
MAX_BYTES = 9


def encode(value: int) -> bytes:
    """The shortest encoding of `value`, 0 to 2**63 - 1."""
    if not 0 <= value <= MAX:
        raise FormatError(f"{value} does not fit an unsigned varint: use 0 to 2**63 - 1")
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def decode(buffer: Any, position: int, error: type[FormatError]) -> tuple[int, int]:
    """Read one varint of `buffer` (bytes-like) at `position`; return it and the next position.

    Raises `error` for one that is cut short, not in its shortest form or over 63 bits.
    """
    value = 0
    end = len(buffer)
    for shift in range(0, 7 * MAX_BYTES, 7):
        if position >= end:
            raise error(f"varint cut short at byte {position}: the bytes are truncated")
        byte = buffer[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if byte == 0 and shift:
                raise error(f"varint before byte {position} is not in its shortest form")
            return value, position
    raise error(f"varint before byte {position} is longer than {MAX_BYTES} bytes")
