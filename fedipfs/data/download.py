"""Fetch one gzip file from the first mirror that gives it: checked, and bounded in every way."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import queue
import threading
import time
import urllib.request
import zlib
from collections.abc import Sequence
from pathlib import Path

from fedipfs.data import cache
from fedipfs.errors import DataError

TIMEOUT_S = 4.0  # until a mirror answers, and for each later read
TOTAL_S = 60.0  # for one file from one mirror, however slowly it trickles
PIECE = 1 << 16
SLACK = 1 << 16  # what gzip may add to bytes that do not compress


def fetch(
    urls: Sequence[str],
    path: Path,
    *,
    sha256: str,
    size: int,
    timeout_s: float = TIMEOUT_S,
    total_s: float = TOTAL_S,
) -> None:
    """Download the first of `urls` that works, decompress it, and keep it at `path`.

    `sha256` (hex) and `size` (bytes) are those of the decompressed file, which is also what is
    kept. `path` appears whole or not at all, and only if the checksum is right.
    Raises DataError with each mirror's reason, or where `path` cannot be written.
    """
    reasons = []
    for url in urls:
        try:
            plain = _get(url, size, timeout_s, total_s)
        except (DataError, OSError, EOFError, http.client.HTTPException, zlib.error) as error:
            reasons.append(f"{url}: {error}")
            continue
        digest = hashlib.sha256(plain).hexdigest()
        if digest != sha256:
            reasons.append(f"{url}: wrong checksum (sha256 {digest}, not {sha256})")
            continue
        try:
            with cache.replacing(path) as stream:
                stream.write(plain)
        except OSError as error:
            raise DataError(f"{path} cannot be written ({error.strerror})") from error
        return
    raise DataError("; ".join(reasons) or f"no mirror is named for {path.name}")


def _get(url: str, size: int, timeout_s: float, total_s: float) -> bytes:
    """The decompressed body of `url`, which must be `size` bytes long."""
    deadline = time.monotonic() + total_s
    with _open(url, timeout_s) as response:
        body = _body(response, size + SLACK, deadline)
    with gzip.GzipFile(fileobj=io.BytesIO(body)) as unpacked:
        plain = unpacked.read(size + 1)
    if len(plain) != size:
        raise DataError(f"{min(len(plain), size)} of {size} bytes, or more than those")
    return plain


def _open(url: str, timeout_s: float) -> http.client.HTTPResponse:
    """The response to `url`, which must begin within `timeout_s`.

    The socket's own timeout covers neither the name look-up nor the second address and the
    third, so the attempt is made in a thread that is left behind when it takes too long.
    """
    answer: queue.SimpleQueue[http.client.HTTPResponse | Exception] = queue.SimpleQueue()

    def attempt() -> None:
        try:
            answer.put(urllib.request.urlopen(url, timeout=timeout_s))
        except Exception as error:
            answer.put(error)

    threading.Thread(target=attempt, name="fedipfs-download", daemon=True).start()
    try:
        response = answer.get(timeout=timeout_s)
    except queue.Empty:
        raise DataError(f"no answer within {timeout_s:g} s") from None
    if isinstance(response, Exception):
        raise response
    return response


def _body(response: http.client.HTTPResponse, limit: int, deadline: float) -> bytes:
    """All of the response, refused beyond `limit` bytes or after `deadline`."""
    body = bytearray()
    # read1 returns what has come; read would wait for more, beyond any deadline.
    while piece := response.read1(PIECE):
        body += piece
        if len(body) > limit:
            raise DataError("longer than the file can be")
        if time.monotonic() > deadline:
            raise DataError("too slow")
    return bytes(body)
