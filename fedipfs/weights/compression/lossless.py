"""zstd frames (RFC 8878) whose size is known before they are opened."""

from __future__ import annotations

from threading import local

import zstandard
from typing_extensions import Buffer

from fedipfs.errors import BadPayload

_LEVEL = 3
_threads = local()  # a compressor or decompressor serves one thread at a time


def compress(data: Buffer, frame: int) -> list[bytes]:
    """`data` in frames that hold `frame` bytes each, the last one what is left."""
    view = memoryview(data).cast("B")
    return [_compressor().compress(view[at : at + frame]) for at in range(0, len(view), frame)]


def decompress(data: bytes, size: int) -> bytes:
    """The `size` bytes that a frame holds; BadPayload if it is none, or says it holds others.

    Memory: `size` bytes, whatever the frame claims: that is compared before it is opened.
    """
    try:
        found = zstandard.get_frame_parameters(data)
        if found.content_size != size or found.dict_id:
            raise BadPayload(f"a zstd frame holds {found.content_size} bytes instead of {size}")
        return _decompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise BadPayload(f"zstd: {error}") from None


def _compressor() -> zstandard.ZstdCompressor:
    if not hasattr(_threads, "compressor"):
        _threads.compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False)
    found: zstandard.ZstdCompressor = _threads.compressor
    return found


def _decompressor() -> zstandard.ZstdDecompressor:
    if not hasattr(_threads, "decompressor"):
        _threads.decompressor = zstandard.ZstdDecompressor()
    found: zstandard.ZstdDecompressor = _threads.decompressor
    return found
